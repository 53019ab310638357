//! The traits that carry bytes and disks through the crate.

use crate::Result;
use crate::format::Format;

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
    /// Stored bytes as they are; they may still turn out to be zeros.
    Data,
    /// Stored bytes that have to be decoded.
    Compressed,
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
    /// For data: where its first byte is in the file, the others following, if that is so.
    pub host: Option<u64>,
}

impl Extent {
    /// First byte after the run.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Whether the run has to be read to know its content.
    pub fn is_data(&self) -> bool {
        matches!(self.kind, ExtentKind::Data | ExtentKind::Compressed)
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

    /// What people ask of the image beyond its size.
    fn details(&self) -> Details {
        Details::default()
    }
}

/// What a header says, under the names that `qemu-img info --output=json` has for it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Details {
    /// The unit of allocation, bytes, if the format has one.
    pub cluster_size: Option<u64>,
    /// Whether the image was not closed cleanly, if the format can tell.
    pub dirty: Option<bool>,
    /// What only this format has.
    pub specific: Vec<(&'static str, Value)>,
}

/// One value of [`Details`].
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A flag.
    Bool(bool),
    /// A number.
    Number(u64),
    /// A text.
    Text(String),
    /// Several things of several fields each.
    List(Vec<Vec<(&'static str, Value)>>),
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Value::Bool(value)
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Value::Number(value)
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Value::Text(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Value::Text(value.to_owned())
    }
}

/// Where the writer of an image format puts the bytes of the file.
pub trait Sink: Send {
    /// Appends bytes.
    fn append(&mut self, bytes: &[u8]) -> Result<()>;

    /// Appends zeros; where the target can have holes they take no room.
    fn append_zeros(&mut self, len: u64) -> Result<()>;

    /// Writes over bytes appended before, from `offset` on. A stream cannot do that, and fails with
    /// [`crate::ErrorKind::Target`].
    fn rewrite(&mut self, bytes: &[u8], offset: u64) -> Result<()>;
}

/// Makes the image file of one disk, block by block.
pub trait Writer: Send {
    /// Bytes of the virtual disk in one block: a power of two of at most 2 MiB.
    fn block_bytes(&self) -> usize;

    /// How blocks are to be compressed before they come.
    fn compression(&self) -> Compression;

    /// Stores block number `index`. Indices ascend; a block that is skipped reads as zeros.
    fn put(&mut self, index: u64, block: Block<'_>) -> Result<()>;

    /// Completes the file of a disk of `virtual_size` bytes, which is not less than was announced.
    fn finish(self: Box<Self>, virtual_size: u64) -> Result<Finished>;
}

/// How the blocks of an image file are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Stored as they are.
    None,
    /// RFC 1951, bare.
    Deflate,
    /// RFC 1950: deflate with a header and a checksum.
    Zlib,
    /// One zstd frame.
    Zstd,
}

/// A block on its way to a [`Writer`].
#[derive(Clone, Copy, Debug)]
pub enum Block<'a> {
    /// All of its bytes.
    Plain(&'a [u8]),
    /// A stream that decodes to it, shorter than the block.
    Packed(&'a [u8]),
}

/// What a [`Writer`] made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Bytes of the whole file.
    pub file_bytes: u64,
    /// Bytes a guest sees.
    pub virtual_size: u64,
}

/// The options of a format that can be written.
pub trait CreateOptions: Send + Sync {
    /// The name of the format.
    fn format(&self) -> Format;

    /// Begins a file. `virtual_size` is that of the disk in bytes, a multiple of 512; `None` for a stream of unknown
    /// length, which only happens if [`CreateOptions::needs_size`] is false.
    ///
    /// Fails with [`crate::ErrorKind::Limit`] if the format cannot hold such a disk.
    fn create<'a>(&self, sink: &'a mut dyn Sink, virtual_size: Option<u64>) -> Result<Box<dyn Writer + 'a>>;

    /// Whether the size has to be known before the first block.
    fn needs_size(&self) -> bool {
        true
    }

    /// Whether the file is written from front to end, so that a pipe can take it.
    fn is_stream(&self) -> bool {
        false
    }
}
