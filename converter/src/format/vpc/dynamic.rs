//! Dynamic disks: the dynamic header and the block allocation table.

use std::sync::Arc;

use super::footer::{COOKIE, FOOTER_BYTES, Footer, NOWHERE, checksum, long, word};
use crate::format::blocks::{BlockDisk, Layout};
use crate::format::{Format, SECTOR_BYTES};
use crate::io::ReadAt;
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

pub(super) const HEADER_BYTES: usize = 1024;

/// What a dynamic header begins with.
const HEADER_COOKIE: &[u8] = b"cxsparse";

/// The only version of the dynamic header.
const HEADER_VERSION: u32 = 0x0001_0000;

/// The smallest block: the sector bitmap of a smaller one is counted differently by different programs.
const BLOCK_BYTES_MIN: u64 = 4096;

/// Offsets of the fields.
mod at {
    pub const DATA_OFFSET: usize = 8;
    pub const TABLE_OFFSET: usize = 16;
    pub const VERSION: usize = 24;
    pub const ENTRIES: usize = 28;
    pub const BLOCK_SIZE: usize = 32;
    pub const CHECKSUM: usize = 36;
}

/// Whether the dynamic header that `footer` names is in the beginning of the file, `head`.
pub(super) fn is_headed(head: &[u8], footer: &Footer) -> bool {
    let header = usize::try_from(footer.data_offset).ok().and_then(|at| head.get(at..));
    header.is_some_and(|header| header.starts_with(HEADER_COOKIE))
}

pub(super) fn open(
    source: Arc<dyn ReadAt>,
    head: &[u8],
    footer: &Footer,
    limits: &Limits,
) -> Result<BlockDisk> {
    let virtual_size = footer.virtual_size(limits)?;
    let layout = layout(&read_header(source.as_ref(), head, footer)?, virtual_size)?;
    let footer_copy = if head.starts_with(COOKIE) { FOOTER_BYTES as u64 } else { 0 };
    let reserved =
        [("copy of the footer", 0, footer_copy), ("dynamic header", footer.data_offset, HEADER_BYTES as u64)];
    BlockDisk::open(source, layout, &reserved, limits)
}

/// Bytes of the sector bitmap before a block: one bit for each sector, in whole sectors.
pub(super) fn bitmap_bytes(block_bytes: u64) -> u64 {
    (block_bytes / SECTOR_BYTES / 8).next_multiple_of(SECTOR_BYTES)
}

/// Makes the dynamic header of a new file.
pub(super) fn new_header(table_offset: u64, entries: u32, block_bytes: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..HEADER_COOKIE.len()].copy_from_slice(HEADER_COOKIE);
    header[at::DATA_OFFSET..at::DATA_OFFSET + 8].copy_from_slice(&NOWHERE.to_be_bytes());
    header[at::TABLE_OFFSET..at::TABLE_OFFSET + 8].copy_from_slice(&table_offset.to_be_bytes());
    for (at, word) in [(at::VERSION, HEADER_VERSION), (at::ENTRIES, entries), (at::BLOCK_SIZE, block_bytes)] {
        header[at..at + 4].copy_from_slice(&word.to_be_bytes());
    }
    let sum = checksum(&header, at::CHECKSUM);
    header[at::CHECKSUM..at::CHECKSUM + 4].copy_from_slice(&sum.to_be_bytes());
    header
}

fn read_header(source: &dyn ReadAt, head: &[u8], footer: &Footer) -> Result<[u8; HEADER_BYTES]> {
    let mut header = [0; HEADER_BYTES];
    let offset = footer.data_offset;
    let end = offset.checked_add(HEADER_BYTES as u64);
    if end.is_none_or(|end| end > source.len()) {
        return Err(corrupt(format!("its offset {offset:#x} is beyond the end of the file")));
    }
    let near = usize::try_from(offset).ok().and_then(|at| head.get(at..)?.get(..HEADER_BYTES));
    match near {
        Some(near) => header.copy_from_slice(near),
        None => source.read_exact_at(&mut header, offset).map_err(|e| {
            Error::io(format!("reading the dynamic header of the VHD image at {offset:#x}"), e)
        })?,
    }
    if !header.starts_with(HEADER_COOKIE) {
        return Err(corrupt(format!("there is none at {offset:#x}")));
    }
    if word(&header, at::CHECKSUM) != checksum(&header, at::CHECKSUM) {
        return Err(corrupt("its checksum is wrong".to_owned()));
    }
    Ok(header)
}

fn layout(header: &[u8; HEADER_BYTES], virtual_size: u64) -> Result<Layout> {
    let block_bytes = u64::from(word(header, at::BLOCK_SIZE));
    if !block_bytes.is_power_of_two() || block_bytes < BLOCK_BYTES_MIN {
        let text = format!(
            "the VHD image has blocks of {block_bytes} bytes, which are not a power of two from {BLOCK_BYTES_MIN} on"
        );
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    let mapped = u64::from(word(header, at::ENTRIES)) * block_bytes;
    if virtual_size > mapped {
        return Err(corrupt(format!("the disk has {virtual_size} bytes, but its table only finds {mapped}")));
    }
    let bitmap_bytes = bitmap_bytes(block_bytes);
    Ok(Layout {
        format: Format::Vpc,
        virtual_size,
        block_bytes,
        table_offset: long(header, at::TABLE_OFFSET),
        decode: u32::from_be_bytes,
        base: bitmap_bytes,
        unit: SECTOR_BYTES,
        lead: bitmap_bytes,
        zero: None,
        preallocated: false,
    })
}

fn corrupt(why: String) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the dynamic header of the VHD image is damaged: {why}"))
}
