//! VHDX version 1; the bytes are described in `docs/formats/vhdx.md`.
//!
//! ```text
//!  header ──> log ──> overlay ──> header: regions ──> metadata ──> bat ──> disk    read
//!           (if dirty)                                   options ──> write         write
//! ```

mod bat;
mod disk;
mod header;
mod log;
mod metadata;
mod options;
mod overlay;
mod write;

use std::sync::Arc;

use super::Tail;
use crate::error::corrupt;
use crate::io::{CreateOptions, Disk, ReadAt};
use crate::limits::Limits;
use crate::{ErrorKind, Result};

pub(super) struct Driver;

impl super::Driver for Driver {
    fn recognises(&self, head: &[u8], _tail: Option<Tail<'_>>) -> bool {
        head.starts_with(FILE_SIGNATURE)
    }

    /// Tells the size if all that leads to it is in `head`: the headers, the log if it has to be replayed, and the
    /// metadata, which writers put into the first few MiB.
    fn virtual_size(&self, head: &[u8], file_bytes: Option<u64>, limits: &Limits) -> Result<Option<u64>> {
        let source = Arc::new(Head { bytes: head.to_vec(), len: file_bytes.unwrap_or(u64::MAX) });
        match disk::Geometry::read(source, limits) {
            Ok(geometry) => Ok(Some(geometry.metadata.virtual_size)),
            // Nothing but a read beyond `head` can fail.
            Err(e) if e.kind() == ErrorKind::Io => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn open(
        &self,
        source: Arc<dyn ReadAt>,
        _head: &[u8],
        _member: Option<&str>,
        limits: &Limits,
    ) -> Result<Box<dyn Disk>> {
        Ok(Box::new(disk::VhdxDisk::open(source, limits)?))
    }

    fn create_options(
        &self,
        compress: bool,
        options: &[(&str, &str)],
    ) -> Option<Result<Box<dyn CreateOptions>>> {
        Some(options::WriteOptions::parse(compress, options).map(|options| Box::new(options) as _))
    }
}

/// The beginning of a file of `len` bytes.
struct Head {
    bytes: Vec<u8>,
    len: u64,
}

impl ReadAt for Head {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let here = usize::try_from(offset).ok().and_then(|at| self.bytes.get(at..)?.get(..buf.len()));
        buf.copy_from_slice(here.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// What a file begins with.
const FILE_SIGNATURE: &[u8] = b"vhdxfile";

/// The unit in which regions and blocks are placed in a file, bytes.
const MIB: u64 = 1 << 20;

/// The unit of the log, and of what it patches, bytes.
const LOG_SECTOR_BYTES: usize = 4096;

/// Smallest and largest payload block, bytes.
const BLOCK_BYTES_MIN: u64 = 1 << 20;
const BLOCK_BYTES_MAX: u64 = 256 << 20;

/// Where the parts of the header section are, and their lengths, bytes.
mod section {
    pub const BYTES: u64 = 1 << 20;
    pub const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
    pub const HEADERS_END: u64 = 192 << 10;
    pub const HEADER_BYTES: usize = 4096;
    pub const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
    pub const REGION_TABLE_BYTES: usize = 64 << 10;
    pub const END: u64 = 320 << 10;
}

/// Payload block states, the lowest three bits of a BAT entry; the others hold the place in the file in MiB.
mod state {
    pub const NOT_PRESENT: u64 = 0;
    pub const UNDEFINED: u64 = 1;
    pub const ZERO: u64 = 2;
    pub const UNMAPPED: u64 = 3;
    /// What version 0.95 of the specification had for [`UNMAPPED`].
    pub const UNMAPPED_V095: u64 = 5;
    pub const FULLY_PRESENT: u64 = 6;
    pub const PARTIALLY_PRESENT: u64 = 7;
    pub const MASK: u64 = 7;
    pub const OFFSET_MASK: u64 = !0xf_ffff;
}

/// Identifies regions and metadata items; the bytes as they are in a file.
type Guid = [u8; 16];

const BAT_REGION: Guid = guid(0x2dc2_7766, 0xf623, 0x4200, 0x9d64_115e_9bfd_4a08);
const METADATA_REGION: Guid = guid(0x8b7c_a206, 0x4790, 0x4b9a, 0xb8fe_575f_050f_886e);

const FILE_PARAMETERS: Guid = guid(0xcaa1_6737, 0xfa36, 0x4d43, 0xb3b6_33f0_aa44_e76b);
const VIRTUAL_DISK_SIZE: Guid = guid(0x2fa5_4224, 0xcd1b, 0x4876, 0xb211_5dbe_d83b_f4b8);
const VIRTUAL_DISK_ID: Guid = guid(0xbeca_12ab, 0xb2e6, 0x4523, 0x93ef_c309_e000_c746);
const LOGICAL_SECTOR_SIZE: Guid = guid(0x8141_bf1d, 0xa96f, 0x4709, 0xba47_f233_a8fa_ab5f);
const PHYSICAL_SECTOR_SIZE: Guid = guid(0xcda3_48c7, 0x445d, 0x4471, 0x9cc9_e988_5251_c556);
const PARENT_LOCATOR: Guid = guid(0xa8d3_5f2d, 0xb30b, 0x454d, 0xabf7_d3d8_4834_ab0c);

/// File parameter flags.
const LEAVE_BLOCKS_ALLOCATED: u32 = 1;
const HAS_PARENT: u32 = 2;

/// Makes a GUID of its groups as they are written; the first three are little-endian in a file.
const fn guid(first: u32, second: u16, third: u16, rest: u64) -> Guid {
    let ([a, b, c, d], [e, f], [g, h]) = (first.to_le_bytes(), second.to_le_bytes(), third.to_le_bytes());
    let [i, j, k, l, m, n, o, p] = rest.to_be_bytes();
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

/// A GUID as people write it.
fn guid_text(guid: &Guid) -> String {
    let [a, b, c, d, e, f, g, h, rest @ ..] = *guid;
    let rest = rest.iter().fold(0u64, |all, &byte| all << 8 | u64::from(byte));
    let first = u32::from_le_bytes([a, b, c, d]);
    let (second, third) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
    format!("{first:08x}-{second:04x}-{third:04x}-{:04x}-{:012x}", rest >> 48, rest & 0xffff_ffff_ffff)
}

/// Payload blocks whose sector bitmap shares one block: after so many entries of the BAT comes one of a bitmap.
fn chunk_ratio(block_bytes: u64, logical_sector_bytes: u64) -> u64 {
    (logical_sector_bytes << 23) / block_bytes
}

/// Entries of the BAT of a disk without a parent.
fn bat_entries(blocks: u64, chunk_ratio: u64) -> u64 {
    blocks + blocks.saturating_sub(1) / chunk_ratio
}

/// Checksum of a structure, in which the four bytes of the checksum itself, at 4, count as zeros.
fn checksum(bytes: &[u8]) -> u32 {
    let (before, rest) = bytes.split_at(bytes.len().min(4));
    let after = rest.get(4..).unwrap_or_default();
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]), after)
}

fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|b| u16::from_le_bytes(*b))
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_le_bytes(*b))
}

fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|b| u64::from_le_bytes(*b))
}

fn guid_at(bytes: &[u8], at: usize) -> Option<Guid> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guids_are_laid_out_as_in_files() {
        let bytes =
            [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 8];
        assert_eq!(BAT_REGION, bytes);
        assert_eq!(guid_text(&BAT_REGION), "2dc27766-f623-4200-9d64-115e9bfd4a08");
    }

    #[test]
    fn the_bat_has_an_entry_of_a_bitmap_between_chunks() {
        let ratio = chunk_ratio(1 << 20, 512);
        assert_eq!(ratio, 4096);
        for (blocks, entries) in [(0, 0), (1, 1), (4096, 4096), (4097, 4098), (8192, 8193), (8193, 8195)] {
            assert_eq!(bat_entries(blocks, ratio), entries, "{blocks}");
        }
        assert_eq!(chunk_ratio(BLOCK_BYTES_MAX, 512), 16);
    }
}
