//! The bounds inside which untrusted images are handled.

/// Bounds for one image. Every value is inclusive; crossing one ends in [`crate::ErrorKind::Limit`].
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest virtual disk accepted, bytes.
    pub virtual_size_max: u64,
    /// Most bytes of metadata tables held in memory at once for one open image.
    pub table_bytes_max: u64,
    /// Most bytes a wrapper (gz, xz, zst, lz4), or one inside another, may decode to, per byte of the file around them,
    /// once 64 MiB were decoded.
    pub expansion_ratio_max: u64,
    /// The same for bz2, which packs zeros about 1.3 million to one: a blank disk is no bomb.
    pub bzip2_expansion_ratio_max: u64,
    /// Most bytes a wrapper may decode to in all.
    pub decoded_bytes_max: u64,
    /// Most memory the decoders of nested wrappers may ask for together (xz dictionary, zstd window), bytes.
    pub decoder_memory_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            virtual_size_max: 64 << 40,
            table_bytes_max: 48 << 20,
            expansion_ratio_max: 100_000,
            bzip2_expansion_ratio_max: 2_000_000,
            decoded_bytes_max: 64 << 40,
            decoder_memory_bytes_max: 120 << 20,
        }
    }
}
