//! Raw disks: the file is the disk.

use std::sync::Arc;

use super::{Format, SECTOR_BYTES, Tail, options};
use crate::io::{
    Block, Compression, CreateOptions, Disk, Extent, ExtentKind, Finished, ReadAt, Sink, Writer,
};
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

pub(super) struct Driver;

impl super::Driver for Driver {
    fn recognises(&self, _head: &[u8], _tail: Option<Tail<'_>>) -> bool {
        true
    }

    fn virtual_size(&self, _head: &[u8], file_bytes: Option<u64>, limits: &Limits) -> Result<Option<u64>> {
        file_bytes.map(|bytes| virtual_size(bytes, limits)).transpose()
    }

    fn open(
        &self,
        source: Arc<dyn ReadAt>,
        _head: &[u8],
        _member: Option<&str>,
        limits: &Limits,
    ) -> Result<Box<dyn Disk>> {
        Ok(Box::new(RawDisk::new(source, limits)?))
    }

    fn create_options(
        &self,
        compress: bool,
        options: &[(&str, &str)],
    ) -> Option<Result<Box<dyn CreateOptions>>> {
        Some(match options.first() {
            Some((name, _)) => Err(options::unknown(Format::Raw, name, "none")),
            None if compress => Err(Error::new(
                ErrorKind::Unsupported,
                "a raw disk is not compressed; leave out the compression, or write another format",
            )),
            None => Ok(Box::new(RawOptions)),
        })
    }
}

/// Virtual size of a raw file of `file_bytes`: whole sectors, rounded up as qemu does.
fn virtual_size(file_bytes: u64, limits: &Limits) -> Result<u64> {
    match file_bytes.checked_next_multiple_of(SECTOR_BYTES) {
        Some(size) if size <= limits.virtual_size_max => Ok(size),
        _ => Err(Error::new(
            ErrorKind::Limit,
            format!("a disk of {file_bytes} bytes is larger than the limit of {}", limits.virtual_size_max),
        )),
    }
}

pub(super) struct RawDisk {
    source: Arc<dyn ReadAt>,
    virtual_size: u64,
}

impl RawDisk {
    pub(super) fn new(source: Arc<dyn ReadAt>, limits: &Limits) -> Result<Self> {
        let virtual_size = virtual_size(source.len(), limits)?;
        Ok(Self { source, virtual_size })
    }
}

impl Disk for RawDisk {
    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let rest = self.virtual_size.saturating_sub(offset);
        let whole = Extent { start: offset, len: rest, kind: ExtentKind::Data, host: Some(offset) };
        let Some(known) = self.source.extent_at(offset) else { return Ok(whole) };
        // The zeros that fill the last sector belong to the last run of the file.
        let end = if known.end() >= self.source.len() { self.virtual_size } else { known.end() };
        match end.checked_sub(offset) {
            Some(len) if len > 0 => {
                let host = known.is_data().then_some(offset);
                Ok(Extent { start: offset, len: len.min(rest), kind: known.kind, host })
            }
            _ => Ok(whole),
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let stored = self.source.len().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (stored, tail) = buf.split_at_mut(stored);
        tail.fill(0);
        if stored.is_empty() {
            return Ok(());
        }
        self.source.read_exact_at(stored, offset).map_err(|e| {
            Error::io(format!("reading {} bytes of the disk at offset {offset}", stored.len()), e)
        })
    }
}

/// A raw disk written from front to end; [`crate::local::RawTarget`] is the faster way into a file.
struct RawOptions;

impl CreateOptions for RawOptions {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn create<'a>(&self, sink: &'a mut dyn Sink, _virtual_size: Option<u64>) -> Result<Box<dyn Writer + 'a>> {
        Ok(Box::new(RawWriter { sink, at: 0 }))
    }

    fn needs_size(&self) -> bool {
        false
    }

    fn is_stream(&self) -> bool {
        true
    }
}

struct RawWriter<'a> {
    sink: &'a mut dyn Sink,
    /// Bytes appended so far.
    at: u64,
}

impl RawWriter<'_> {
    fn zeros_until(&mut self, end: u64) -> Result<()> {
        if end > self.at {
            self.sink.append_zeros(end - self.at)?;
            self.at = end;
        }
        Ok(())
    }
}

impl Writer for RawWriter<'_> {
    fn block_bytes(&self) -> usize {
        // A sector, so that a disk never ends inside a block.
        SECTOR_BYTES as usize
    }

    fn compression(&self) -> Compression {
        Compression::None
    }

    fn put(&mut self, index: u64, block: Block<'_>) -> Result<()> {
        let (Block::Plain(bytes) | Block::Packed(bytes)) = block;
        self.zeros_until(index.saturating_mul(SECTOR_BYTES))?;
        self.sink.append(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn finish(mut self: Box<Self>, virtual_size: u64) -> Result<Finished> {
        self.zeros_until(virtual_size)?;
        Ok(Finished { file_bytes: self.at, virtual_size })
    }
}
