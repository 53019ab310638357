//! Fixed disks: the bytes of the disk, then the footer.

use std::io;
use std::sync::Arc;

use super::footer::Footer;
use crate::Result;
use crate::format::check_range;
use crate::format::raw::RawDisk;
use crate::io::{Details, Disk, Extent, ReadAt};
use crate::limits::Limits;

pub(super) fn open(source: Arc<dyn ReadAt>, footer: &Footer, limits: &Limits) -> Result<FixedDisk> {
    // Nobody writes a geometry larger than the disk; what lies behind that is the footer, and no data.
    let virtual_size = footer.virtual_size(limits)?.min(footer.current_size());
    Ok(FixedDisk(RawDisk::new(Arc::new(Front { source, len: virtual_size }), limits)?))
}

/// The disk before the footer, which reads as a raw one.
pub(super) struct FixedDisk(RawDisk);

impl Disk for FixedDisk {
    fn virtual_size(&self) -> u64 {
        self.0.virtual_size()
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.0.extent_at(offset)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(buf, offset, self.0.virtual_size())?;
        self.0.read_at(buf, offset)
    }

    fn details(&self) -> Details {
        Details { dirty: Some(false), ..Details::default() }
    }
}

/// The first bytes of a file.
struct Front {
    source: Arc<dyn ReadAt>,
    len: u64,
}

impl ReadAt for Front {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= self.len => self.source.read_exact_at(buf, offset),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn is_forward_only(&self) -> bool {
        self.source.is_forward_only()
    }

    fn extent_at(&self, offset: u64) -> Option<Extent> {
        let known = self.source.extent_at(offset)?;
        let len = known.end().min(self.len).checked_sub(known.start)?;
        (len > 0).then_some(Extent { len, ..known })
    }
}
