//! Parts of a file that are read like a file.

use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;

use crate::io::{Extent, ReadAt};

/// A run of bytes inside a file.
pub(super) struct Window {
    source: Arc<dyn ReadAt>,
    start: u64,
    len: u64,
}

impl Window {
    /// The `len` bytes from `start` of `source`, which has them.
    pub(super) fn new(source: Arc<dyn ReadAt>, start: u64, len: u64) -> Self {
        Self { source, start, len }
    }
}

impl ReadAt for Window {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= self.len => self.source.read_exact_at(buf, self.start + offset),
            _ => Err(Error::from(ErrorKind::UnexpectedEof)),
        }
    }

    fn is_forward_only(&self) -> bool {
        self.source.is_forward_only()
    }

    fn extent_at(&self, offset: u64) -> Option<Extent> {
        let extent = self.source.extent_at(self.start.checked_add(offset)?)?;
        let start = extent.start.checked_sub(self.start)?;
        let len = extent.len.min(self.len.checked_sub(start)?);
        let host = extent.host.and_then(|host| host.checked_sub(self.start));
        (len > 0).then_some(Extent { start, len, host, ..extent })
    }
}

/// The beginning of a file.
pub(super) struct Head<'a>(pub(super) &'a [u8]);

impl ReadAt for Head<'_> {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let bytes = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)?.get(..buf.len()));
        buf.copy_from_slice(bytes.ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}
