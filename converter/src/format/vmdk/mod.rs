//! VMware's VMDK, as far as a disk is in one file; the bytes are described in `docs/formats/vmdk.md`.
//!
//! ```text
//!  header ──> descriptor ──> disk ──> tables (grain directory, bounded cache of grain tables)    read
//!    │             └───────> flat
//!    └──> footer, of a file that was written as a stream
//!                              options ──┬──> write (tables before the grains)                   write
//!                                        └──> stream (from front to end)
//! ```

mod descriptor;
mod disk;
mod flat;
mod header;
mod options;
mod stream;
mod tables;
mod write;

use std::sync::Arc;

pub use options::{AdapterType, Subformat, WriteOptions};

use super::Tail;
use crate::error::{corrupt, foreign, limit, unsupported};
use crate::io::{CreateOptions, Disk, ReadAt, Value};
use crate::limits::Limits;
use crate::{Error, Result};
use descriptor::Descriptor;
use disk::SparseDisk;
use flat::FlatDisk;
use header::{FOOTER_BYTES, Header};

/// The magic number of a sparse extent.
const SPARSE_MAGIC: [u8; 4] = *b"KDMV";

/// The magic numbers of sparse extents that only ESX servers write.
const COWD_MAGIC: [u8; 4] = *b"COWD";
const SESPARSE_MAGIC: [u8; 8] = 0xcafe_babe_u64.to_le_bytes();

/// What a line break looks like after a file transfer that left it alone: line feed, space, carriage return, line feed.
const NEWLINE_TEST: [u8; 4] = *b"\n \r\n";

/// Newest version of a sparse extent that is known.
const VERSION_MAX: u32 = 3;

/// Bytes of the header, padding included.
const HEADER_BYTES: usize = 512;

/// Longest descriptor that is read; VMware reserves 10 KiB, qemu reads as much as this.
const DESCRIPTOR_BYTES_MAX: u64 = 1 << 20;

/// Largest grain that is read, sectors; everybody writes 128.
const GRAIN_SECTORS_MAX: u64 = 4096;

/// Most entries of a grain table; qemu's bound, and what everybody writes.
const GTES_PER_GT_MAX: u32 = 512;

/// The place of the grain directory is told by the footer only.
const GD_AT_END: u64 = u64::MAX;

/// The grain reads as zeros, if the header has [`flag::ZEROED_GTE`].
const GTE_ZEROED: u32 = 1;

/// Flags of the header.
mod flag {
    pub const NEWLINE_TEST: u32 = 1 << 0;
    pub const REDUNDANT_DIRECTORY: u32 = 1 << 1;
    pub const ZEROED_GTE: u32 = 1 << 2;
    pub const COMPRESSED: u32 = 1 << 16;
    pub const MARKERS: u32 = 1 << 17;
}

/// Values of the header's field for compression.
mod compression {
    pub const NONE: u16 = 0;
    pub const DEFLATE: u16 = 1;
}

/// What stands before grains and tables of a stream.
mod marker {
    /// Bytes of the marker of a grain: its first sector on the virtual disk (8), the length of its stream (4).
    pub const GRAIN_BYTES: u64 = 12;

    /// Types of the other markers, which have the length 0 and take a sector.
    pub const END_OF_STREAM: u32 = 0;
    pub const GRAIN_TABLE: u32 = 1;
    pub const GRAIN_DIRECTORY: u32 = 2;
    pub const FOOTER: u32 = 3;

    /// The value, the length and the type of a marker.
    pub fn read(sector: &[u8; 512]) -> (u64, u32, u32) {
        let value = sector.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let u32_at = |at: usize| sector[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        (value, u32_at(8), u32_at(12))
    }
}

pub(super) struct Driver;

impl super::Driver for Driver {
    fn recognises(&self, head: &[u8], _tail: Option<Tail<'_>>) -> bool {
        let magics: [&[u8]; 3] = [&SPARSE_MAGIC, &COWD_MAGIC, &SESPARSE_MAGIC];
        magics.iter().any(|magic| head.starts_with(magic)) || descriptor::is_descriptor(head)
    }

    fn virtual_size(&self, head: &[u8], file_bytes: Option<u64>, limits: &Limits) -> Result<Option<u64>> {
        refuse_other_sparse(head)?;
        let file_end = file_bytes.unwrap_or(u64::MAX);
        if !head.starts_with(&SPARSE_MAGIC) {
            let text = descriptor::text(head)?;
            if text.len() == head.len() && text.len() as u64 != file_end {
                // There is more of it.
                return Ok(None);
            }
            let (_, size) = flat::place(&Descriptor::parse(text)?, text.len() as u64, file_end, limits)?;
            return Ok(Some(size));
        }
        let header = Header::parse(head, file_bytes, limits)?;
        let descriptor = header.descriptor.and_then(|(offset, len)| {
            let bytes = head.get(usize::try_from(offset).ok()?..)?;
            Some((bytes.get(..usize::try_from(len).ok()?)?, offset + len))
        });
        let Some((bytes, descriptor_end)) = descriptor else {
            return Ok((header.virtual_size > 0).then_some(header.virtual_size));
        };
        let descriptor = Descriptor::parse(descriptor::text(bytes)?)?;
        if header.virtual_size == 0 {
            return Ok(Some(flat::place(&descriptor, descriptor_end, file_end, limits)?.1));
        }
        check_sparse(&descriptor)?;
        Ok(Some(header.virtual_size))
    }

    fn open(
        &self,
        source: Arc<dyn ReadAt>,
        head: &[u8],
        _member: Option<&str>,
        limits: &Limits,
    ) -> Result<Box<dyn Disk>> {
        refuse_other_sparse(head)?;
        let read = |offset: u64, len: u64| {
            let mut bytes = vec![0; len as usize];
            let failed =
                |e| Error::io(format!("reading the VMDK descriptor or footer at offset {offset}"), e);
            source.read_exact_at(&mut bytes, offset).map_err(failed)?;
            Ok::<_, Error>(bytes)
        };
        if !head.starts_with(&SPARSE_MAGIC) {
            // One byte more than is allowed, so that what is too long shows.
            let bytes = read(0, source.len().min(DESCRIPTOR_BYTES_MAX + 1))?;
            let text = descriptor::text(&bytes)?;
            let (descriptor, end) = (Descriptor::parse(text)?, text.len() as u64);
            return Ok(Box::new(FlatDisk::open(source, descriptor, end, limits)?));
        }
        let mut header = Header::parse(head, Some(source.len()), limits)?;
        let descriptor = match header.descriptor {
            Some((offset, len)) => Some(Descriptor::parse(descriptor::text(&read(offset, len)?)?)?),
            None => None,
        };
        if header.virtual_size == 0 {
            let descriptor = descriptor.ok_or_else(|| corrupt("the VMDK file holds no disk"))?;
            let end = header.descriptor.map_or(0, |(offset, len)| offset + len);
            return Ok(Box::new(FlatDisk::open(source, descriptor, end, limits)?));
        }
        descriptor.as_ref().map_or(Ok(()), check_sparse)?;
        if header.gd_offset.is_none() {
            let at = source
                .len()
                .checked_sub(FOOTER_BYTES)
                .ok_or_else(|| corrupt("the VMDK footer is cut short"))?;
            header = header.parse_footer(&read(at, FOOTER_BYTES)?, source.len(), limits)?;
        }
        Ok(Box::new(SparseDisk::open(source, header, descriptor, limits)?))
    }

    fn create_options(
        &self,
        compress: bool,
        options: &[(&str, &str)],
    ) -> Option<Result<Box<dyn CreateOptions>>> {
        Some(WriteOptions::parse(compress, options).map(|options| Box::new(options) as _))
    }
}

/// The descriptor inside a sparse extent may name that extent and no other.
fn check_sparse(descriptor: &Descriptor) -> Result<()> {
    match descriptor.only_extent()? {
        Some(extent) if extent.kind != "SPARSE" => Err(extent.refused()),
        _ => Ok(()),
    }
}

fn refuse_other_sparse(head: &[u8]) -> Result<()> {
    let name = if head.starts_with(&COWD_MAGIC) {
        "COWD"
    } else if head.starts_with(&SESPARSE_MAGIC) {
        "SEsparse"
    } else {
        return Ok(());
    };
    Err(unsupported(format!(
        "the vmdk file is an extent of type {name} of an ESX server, which is not read; export the disk as \
         streamOptimized or OVA there, or convert it with qemu-img"
    )))
}

/// The fields that only VMDK has, as `qemu-img info` names them; `extent` describes the only extent.
fn details(
    descriptor: Option<&Descriptor>,
    extent: Vec<(&'static str, Value)>,
) -> Vec<(&'static str, Value)> {
    let mut specific = Vec::new();
    if let Some(descriptor) = descriptor {
        specific.extend(descriptor.cid.map(|cid| ("cid", Value::Number(cid.into()))));
        specific.extend(descriptor.parent_cid.map(|cid| ("parent-cid", Value::Number(cid.into()))));
        specific.extend(descriptor.create_type.as_deref().map(|name| ("create-type", name.into())));
    }
    specific.push(("extents", Value::List(vec![extent])));
    specific
}
