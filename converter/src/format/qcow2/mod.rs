//! qcow2 versions 2 and 3; the bytes are described in `docs/formats/qcow2.md`.
//!
//! ```text
//!  header ──> disk ──> tables (L1, bounded cache of L2) ──> decode (zlib, zstd)      read
//!    └──────> check (reference counts)                                               check
//!                                    options ──> write (append only, header last)    write
//! ```

mod check;
mod decode;
mod disk;
mod header;
mod options;
mod tables;
mod write;

use std::sync::Arc;

pub use options::{Compression, Preallocation, WriteOptions};

use super::Tail;
use crate::Result;
use crate::check::Report;
use crate::io::{CreateOptions, Disk, ReadAt};
use crate::limits::Limits;
use crate::progress::Progress;
use header::Header;

pub(super) struct Driver;

impl super::Driver for Driver {
    fn recognises(&self, head: &[u8], _tail: Option<Tail<'_>>) -> bool {
        header::recognises(head)
    }

    fn virtual_size(&self, head: &[u8], file_bytes: Option<u64>, limits: &Limits) -> Result<Option<u64>> {
        Ok(Some(Header::parse(head, file_bytes, limits)?.virtual_size))
    }

    fn open(
        &self,
        source: Arc<dyn ReadAt>,
        head: &[u8],
        _member: Option<&str>,
        limits: &Limits,
    ) -> Result<Box<dyn Disk>> {
        let header = Header::parse(head, Some(source.len()), limits)?;
        Ok(Box::new(disk::Qcow2Disk::open(source, &header, limits)?))
    }

    fn check(
        &self,
        source: &Arc<dyn ReadAt>,
        head: &[u8],
        _member: Option<&str>,
        limits: &Limits,
        report: &mut Report,
        progress: &Progress,
    ) -> Result<()> {
        let header = Header::parse(head, Some(source.len()), limits)?;
        check::check(source.as_ref(), &header, limits, report, progress)
    }

    fn create_options(
        &self,
        compress: bool,
        options: &[(&str, &str)],
    ) -> Option<Result<Box<dyn CreateOptions>>> {
        Some(WriteOptions::parse(compress, options).map(|options| Box::new(options) as _))
    }
}

/// Smallest and largest cluster, as powers of two.
const CLUSTER_BITS_MIN: u32 = 9;
const CLUSTER_BITS_MAX: u32 = 21;

/// Largest L1 table, bytes; qemu's bound.
const L1_BYTES_MAX: u64 = 32 << 20;

/// Largest refcount table, bytes; qemu's bound.
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;

/// Bits of an L1 entry, or of an L2 entry of an uncompressed cluster, that hold a host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// The cluster has a reference count of exactly one.
const COPIED: u64 = 1 << 63;

/// The L2 entry describes compressed bytes.
const COMPRESSED: u64 = 1 << 62;

/// The cluster reads as zeros (version 3, without extended L2 entries).
const ZERO: u64 = 1;

/// Incompatible feature bits.
mod incompatible {
    pub const DIRTY: u64 = 1 << 0;
    pub const CORRUPT: u64 = 1 << 1;
    pub const DATA_FILE: u64 = 1 << 2;
    pub const COMPRESSION_TYPE: u64 = 1 << 3;
    pub const EXTENDED_L2: u64 = 1 << 4;
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;
}

/// Compatible feature bit: reference counts may be written lazily.
const LAZY_REFCOUNTS: u64 = 1;

/// Values of the compression type field.
mod compression_type {
    pub const ZLIB: u8 = 0;
    pub const ZSTD: u8 = 1;
}

/// Where compressed bytes are: the parts of an L2 entry with [`COMPRESSED`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CompressedAt {
    /// First byte in the file; not aligned.
    host: u64,
    /// Bytes up to the end of the last 512-byte sector touched; the stream may end earlier.
    len: u64,
}

impl CompressedAt {
    /// Bits of the entry below the sector count.
    fn offset_bits(cluster_bits: u32) -> u32 {
        62 - (cluster_bits - 8)
    }

    fn decode(entry: u64, cluster_bits: u32) -> Self {
        let shift = Self::offset_bits(cluster_bits);
        let host = entry & ((1 << shift) - 1);
        let more_sectors = (entry >> shift) & ((1 << (cluster_bits - 8)) - 1);
        Self { host, len: (more_sectors + 1) * 512 - host % 512 }
    }

    /// Makes the entry for `len` > 0 bytes at `host`; `None` if `host` does not fit.
    fn encode(host: u64, len: u64, cluster_bits: u32) -> Option<u64> {
        let shift = Self::offset_bits(cluster_bits);
        let last = host.checked_add(len)?.checked_sub(1)?;
        let more_sectors = last / 512 - host / 512;
        if host >> shift != 0 || more_sectors >> (cluster_bits - 8) != 0 {
            return None;
        }
        Some(COMPRESSED | more_sectors << shift | host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_entries_survive_a_round_trip() {
        for cluster_bits in CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX {
            for (host, len) in [(1 << 20, 1), ((1 << 20) + 511, 2), (12_345, (1u64 << cluster_bits) - 1)] {
                let entry = CompressedAt::encode(host, len, cluster_bits).expect("fits");
                let at = CompressedAt::decode(entry, cluster_bits);
                assert_eq!(at.host, host);
                assert_eq!((at.host + at.len) % 512, 0);
                assert!(at.len >= len && at.len < len + 512);
            }
        }
        assert_eq!(CompressedAt::encode(1 << 61, 1, 9), None);
    }
}
