//! A disk that lies in one piece behind its descriptor, in the same file.

use std::sync::Arc;

use super::descriptor::{Descriptor, ExtentLine};
use super::{corrupt, details, limit, unsupported};
use crate::format::SECTOR_BYTES;
use crate::format::check_range;
use crate::io::{Details, Disk, Extent, ExtentKind, ReadAt, Value};
use crate::limits::Limits;
use crate::{Error, Result};

/// The virtual disk of a flat extent.
pub(super) struct FlatDisk {
    source: Arc<dyn ReadAt>,
    descriptor: Descriptor,
    /// First byte of the disk in the file.
    start: u64,
    virtual_size: u64,
}

impl FlatDisk {
    /// Opens the only extent that `descriptor` names; the descriptor itself ends at `descriptor_end` of the file.
    ///
    /// Whether the extent is in this file, its place tells: behind the descriptor, and inside the file. The name does
    /// not, as files are renamed; it is never opened. [`ErrorKind::ForeignFile`] for every other extent.
    pub(super) fn open(
        source: Arc<dyn ReadAt>,
        descriptor: Descriptor,
        descriptor_end: u64,
        limits: &Limits,
    ) -> Result<Self> {
        let (start, virtual_size) = place(&descriptor, descriptor_end, source.len(), limits)?;
        Ok(Self { source, descriptor, start, virtual_size })
    }
}

/// First byte and length of the only extent, if it is in the file of `file_bytes`.
pub(super) fn place(
    descriptor: &Descriptor,
    descriptor_end: u64,
    file_bytes: u64,
    limits: &Limits,
) -> Result<(u64, u64)> {
    let Some(extent) = descriptor.only_extent()? else {
        return Err(corrupt("the VMDK descriptor names no extent, so that the disk is nowhere"));
    };
    if extent.kind == "ZERO" {
        return Err(unsupported("a VMDK disk of nothing but zeros is not read: make an empty disk instead"));
    }
    let start = extent.offset.unwrap_or(0).checked_mul(SECTOR_BYTES);
    let len = extent.sectors.checked_mul(SECTOR_BYTES);
    let end = start.zip(len).and_then(|(start, len)| start.checked_add(len));
    match (start, len, end) {
        (Some(start), Some(len), Some(end))
            if extent.kind == "FLAT"
                && is_plain_name(extent)
                && start >= descriptor_end
                && end <= file_bytes =>
        {
            if len > limits.virtual_size_max {
                let text = format!(
                    "the virtual disk has {len} bytes, more than the limit of {}",
                    limits.virtual_size_max
                );
                return Err(limit(text));
            }
            Ok((start, len))
        }
        _ => Err(extent.refused()),
    }
}

/// Whether the name can be that of the file that the descriptor is in: one without a folder.
fn is_plain_name(extent: &ExtentLine) -> bool {
    !extent.file.is_empty() && !extent.file.contains(['/', '\\', ':'])
}

impl Disk for FlatDisk {
    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let len = self.virtual_size.saturating_sub(offset);
        Ok(Extent { start: offset, len, kind: ExtentKind::Data, host: Some(self.start + offset) })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(buf, offset, self.virtual_size)?;
        let at = self.start + offset;
        self.source
            .read_exact_at(buf, at)
            .map_err(|e| Error::io(format!("reading the image at file offset {at}"), e))
    }

    fn details(&self) -> Details {
        let extent = vec![("virtual-size", Value::Number(self.virtual_size)), ("format", "FLAT".into())];
        Details { cluster_size: None, dirty: None, specific: details(Some(&self.descriptor), extent) }
    }
}
