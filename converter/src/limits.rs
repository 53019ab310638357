//! The bounds inside which untrusted images are handled; `docs/limits.md` tells how each one is chosen and tripped.

use std::time::Duration;

/// Bounds for one image. Every value is inclusive; crossing one ends in [`crate::ErrorKind::Limit`].
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Most bytes the compressed clusters or grains of an image may decode to, per byte of the file that they occupy, once
    /// 1 GiB was read; plain ones may not be more than what they occupy.
    pub image_expansion_ratio_max: u64,
    /// Most bytes a wrapper may decode to in all.
    pub decoded_bytes_max: u64,
    /// Most memory the decoders of nested wrappers may ask for together (xz dictionary, zstd window), bytes.
    pub decoder_memory_bytes_max: u64,
    /// Most wrappers and archives around an image, one inside the other.
    pub chain_depth_max: u32,
    /// Most time for one piece of work from its beginning.
    pub wall_time_max: Duration,
    /// Most bytes stored in the target as data.
    pub output_bytes_max: u64,
}

impl Limits {
    /// The limits of what is inside so many wrappers or archives.
    pub fn inside(&self, levels: usize) -> Self {
        let levels = u32::try_from(levels).unwrap_or(u32::MAX);
        Self { chain_depth_max: self.chain_depth_max.saturating_sub(levels), ..self.clone() }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            virtual_size_max: 64 << 40,
            table_bytes_max: 48 << 20,
            expansion_ratio_max: 100_000,
            bzip2_expansion_ratio_max: 2_000_000,
            image_expansion_ratio_max: 25_000,
            decoded_bytes_max: 64 << 40,
            decoder_memory_bytes_max: 120 << 20,
            chain_depth_max: 2,
            wall_time_max: Duration::from_secs(24 * 3600),
            output_bytes_max: 64 << 40,
        }
    }
}
