//! The traits that carry bytes and disks through the crate.

use crate::Result;

/// Random-access bytes of a stored file: a local file, a ranged HTTP resource, a part of a registry blob.
///
/// Implementations are shared by all workers and may be called from several threads at once.
pub trait ReadAt: Send + Sync {
    /// Length in bytes. It does not change while the value lives.
    fn len(&self) -> u64;

    /// Whether the file has no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from `offset` (bytes). Fails with [`std::io::ErrorKind::UnexpectedEof`] past the end.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()>;

    /// Whether going back costs reading again what was passed, as in a compressed stream.
    fn is_forward_only(&self) -> bool {
        false
    }

    /// Returns the run of stored bytes, or of a hole that reads as zeros, that begins at `offset`; `None` where
    /// that is not cheaply known.
    fn extent_at(&self, offset: u64) -> Option<Extent> {
        let _ = offset;
        None
    }
}

/// What is known about a run of the virtual disk without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Stored bytes; they may still turn out to be zeros.
    Data,
    /// Reads as zeros, and the format says so explicitly.
    Zero,
    /// Never written; reads as zeros.
    Hole,
}

/// A run of the virtual disk of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte on the virtual disk.
    pub start: u64,
    /// Bytes; never zero.
    pub len: u64,
    /// What the run is.
    pub kind: ExtentKind,
}

impl Extent {
    /// First byte after the run.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Whether the run has to be read to know its content.
    pub fn is_data(&self) -> bool {
        self.kind == ExtentKind::Data
    }
}

/// A virtual disk inside an image file, read at random by any number of threads.
pub trait Disk: Send + Sync {
    /// Bytes a guest sees.
    fn virtual_size(&self) -> u64;

    /// Returns the run that begins at `offset` (below [`Disk::virtual_size`]), as long as cheaply known: adjacent
    /// runs may be of the same kind, and a run never passes the end of the disk.
    fn extent_at(&self, offset: u64) -> Result<Extent>;

    /// Fills `buf` with the guest's bytes from `offset`; the range must lie inside the disk.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;
}
