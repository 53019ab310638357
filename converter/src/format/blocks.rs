//! Disks of equal blocks that one table in memory finds: what VDI and dynamic VHD have in common.

use std::sync::Arc;

use super::{Format, check_range};
use crate::io::{Block, Details, Disk, Extent, ExtentKind, ReadAt};
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

/// Table entry of a block that was never written.
pub(super) const UNALLOCATED: u32 = u32::MAX;

/// Bytes of a table read at a time.
const TABLE_CHUNK_BYTES: usize = 1 << 20;

/// What a header says of the blocks of a disk.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub format: Format,
    /// Bytes a guest sees.
    pub virtual_size: u64,
    /// Bytes of the virtual disk in one block.
    pub block_bytes: u64,
    /// Place of the table in the file. It has an entry of four bytes for each block, or more.
    pub table_offset: u64,
    /// Makes a number of the bytes of an entry.
    pub decode: fn([u8; 4]) -> u32,
    /// Entry `n` stands for a block that is stored at `base + n * unit`, for a unit of at least 512.
    pub base: u64,
    pub unit: u64,
    /// Bytes that belong to a block and are stored right before it.
    pub lead: u64,
    /// Entry of a block that is all zeros.
    pub zero: Option<u32>,
    /// Whether all blocks have their place in advance, so that holes of the file are holes of the disk.
    pub preallocated: bool,
}

/// A virtual disk with its table.
pub(super) struct BlockDisk {
    source: Arc<dyn ReadAt>,
    layout: Layout,
    table: Vec<u32>,
}

/// What the blocks of a run are, and where the first byte of it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Hole,
    Zero,
    Stored(u64),
}

impl BlockDisk {
    /// Reads the table and holds every entry against the file: a block has all of its bytes there that a guest
    /// sees, and shares them neither with another block nor with the `reserved` ranges (what, offset, bytes).
    pub(super) fn open(
        source: Arc<dyn ReadAt>,
        layout: Layout,
        reserved: &[(&str, u64, u64)],
        limits: &Limits,
    ) -> Result<Self> {
        let table = layout.read_table(source.as_ref(), limits)?;
        let disk = Self { source, layout, table };
        let table_bytes = disk.table.len() as u64 * 4;
        let table = [("block table", disk.layout.table_offset, table_bytes)];
        let mut stored = 0u64;
        for index in 0..disk.table.len() as u64 {
            if let Place::Stored(host) = disk.place(index) {
                disk.check_entry(index, host, reserved.iter().chain(&table))?;
                stored += 1;
            }
        }
        disk.check_sharing(stored, limits)?;
        Ok(disk)
    }

    fn check_entry<'a>(
        &self,
        index: u64,
        host: u64,
        reserved: impl Iterator<Item = &'a (&'a str, u64, u64)>,
    ) -> Result<()> {
        let layout = &self.layout;
        let seen = layout.block_bytes.min(layout.virtual_size - index * layout.block_bytes);
        if host.saturating_add(seen) > self.source.len() {
            let why =
                format!("its bytes at {host:#x} are beyond the end of the file of {}", self.source.len());
            return Err(layout.corrupt(index, why));
        }
        let (start, end) = (host - layout.lead, host + layout.block_bytes);
        for (what, offset, bytes) in reserved {
            if start < offset.saturating_add(*bytes) && *offset < end {
                return Err(layout.corrupt(index, format!("its bytes at {host:#x} overlap the {what}")));
            }
        }
        Ok(())
    }

    /// Fails if two of the `stored` blocks overlap: each reads as a block, but costs four bytes.
    fn check_sharing(&self, stored: u64, limits: &Limits) -> Result<()> {
        let layout = &self.layout;
        let step = (layout.lead + layout.block_bytes).div_ceil(layout.unit);
        let entries = || self.table.iter().copied().filter(|&entry| !layout.is_special(entry));
        let shared = |entry: u32| {
            let index = self.table.iter().position(|&other| other == entry).unwrap_or(0);
            let host = layout.host(entry);
            layout.corrupt(index as u64, format!("its bytes at {host:#x} belong to another block too"))
        };
        if step == 1 {
            // Blocks on a grid are the same or apart. No entry is beyond the end of the file.
            let cells = entries().max().map_or(0, |last| u64::from(last) + 1);
            layout.check_memory(self.table.len() as u64, cells.div_ceil(8), limits)?;
            let mut seen = vec![0u8; cells.div_ceil(8) as usize];
            for entry in entries() {
                let (cell, bit) = (&mut seen[entry as usize / 8], 1 << (entry % 8));
                if *cell & bit != 0 {
                    return Err(shared(entry));
                }
                *cell |= bit;
            }
            return Ok(());
        }
        layout.check_memory(self.table.len() as u64, stored * 4, limits)?;
        let mut sorted: Vec<u32> = Vec::with_capacity(stored as usize);
        sorted.extend(entries());
        sorted.sort_unstable();
        match sorted.windows(2).find(|pair| u64::from(pair[1] - pair[0]) < step) {
            Some(pair) => Err(shared(pair[1])),
            None => Ok(()),
        }
    }

    fn place(&self, index: u64) -> Place {
        let entry = usize::try_from(index).ok().and_then(|index| self.table.get(index));
        match entry.copied() {
            None | Some(UNALLOCATED) => Place::Hole,
            Some(entry) if Some(entry) == self.layout.zero => Place::Zero,
            Some(entry) => Place::Stored(self.layout.host(entry)),
        }
    }

    /// The run of blocks in one place that holds `offset`, as far as `bytes_max` from there on.
    fn run(&self, offset: u64, bytes_max: u64) -> (Place, u64) {
        let block_bytes = self.layout.block_bytes;
        let (mut index, skip) = (offset / block_bytes, offset % block_bytes);
        let first = self.place(index).skip(skip);
        let mut len = block_bytes - skip;
        while len < bytes_max {
            index += 1;
            if self.place(index) != first.skip(len) {
                break;
            }
            len += block_bytes;
        }
        (first, len.min(bytes_max))
    }
}

impl Place {
    fn skip(self, bytes: u64) -> Self {
        match self {
            Place::Stored(host) => Place::Stored(host + bytes),
            other => other,
        }
    }
}

impl Layout {
    fn read_table(&self, source: &dyn ReadAt, limits: &Limits) -> Result<Vec<u32>> {
        let entries = self.virtual_size.div_ceil(self.block_bytes);
        self.check_memory(entries, 0, limits)?;
        let end = self.table_offset.checked_add(entries * 4);
        if end.is_none_or(|end| end > source.len()) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "the {} block table of {entries} entries at {:#x} is beyond the end of the file of {} bytes",
                    self.format,
                    self.table_offset,
                    source.len()
                ),
            ));
        }
        let mut table = Vec::with_capacity(entries as usize);
        let mut chunk = vec![0; TABLE_CHUNK_BYTES.min(entries as usize * 4)];
        while (table.len() as u64) < entries {
            let done = table.len() as u64;
            let chunk_bytes = ((entries - done) * 4).min(chunk.len() as u64) as usize;
            let chunk = &mut chunk[..chunk_bytes];
            source.read_exact_at(chunk, self.table_offset + done * 4).map_err(|e| {
                Error::io(format!("reading the {} block table at {:#x}", self.format, self.table_offset), e)
            })?;
            table.extend(chunk.as_chunks().0.iter().map(|entry| (self.decode)(*entry)));
        }
        Ok(table)
    }

    /// Fails with [`ErrorKind::Limit`] if a table of so many entries and `more` bytes are too much to hold.
    fn check_memory(&self, entries: u64, more: u64, limits: &Limits) -> Result<()> {
        let bytes = entries.saturating_mul(4).saturating_add(more);
        if bytes > limits.table_bytes_max {
            return Err(Error::new(
                ErrorKind::Limit,
                format!(
                    "the {} block table of {entries} entries needs {bytes} bytes of memory, more than the limit of {}",
                    self.format, limits.table_bytes_max
                ),
            ));
        }
        Ok(())
    }

    fn is_special(&self, entry: u32) -> bool {
        entry == UNALLOCATED || Some(entry) == self.zero
    }

    /// Where the block of an entry is; units are far below 2^31 and bases below 2^40, so that nothing overflows.
    fn host(&self, entry: u32) -> u64 {
        self.base.saturating_add(u64::from(entry).saturating_mul(self.unit))
    }

    fn corrupt(&self, index: u64, why: impl std::fmt::Display) -> Error {
        Error::new(ErrorKind::Corrupt, format!("block {index} of the {} disk is damaged: {why}", self.format))
    }
}

impl Disk for BlockDisk {
    fn virtual_size(&self) -> u64 {
        self.layout.virtual_size
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let rest = self.layout.virtual_size.saturating_sub(offset);
        let first = self.run(offset, self.layout.block_bytes.min(rest)).0;
        // A file full of holes is not walked to its end for each of them.
        let known = match first {
            Place::Stored(host) if self.layout.preallocated => self.source.extent_at(host),
            _ => None,
        };
        let known = known.filter(|known| known.len > 0);
        let (place, len) = self.run(offset, known.map_or(rest, |known| known.len.min(rest)));
        let (kind, host) = match place {
            Place::Hole => (ExtentKind::Hole, None),
            Place::Zero => (ExtentKind::Zero, None),
            Place::Stored(_) if known.is_some_and(|known| !known.is_data()) => (ExtentKind::Zero, None),
            Place::Stored(host) => (ExtentKind::Data, Some(host)),
        };
        Ok(Extent { start: offset, len, kind, host })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(buf, offset, self.layout.virtual_size)?;
        let mut done = 0;
        while done < buf.len() {
            let (place, len) = self.run(offset + done as u64, (buf.len() - done) as u64);
            let part = &mut buf[done..done + len as usize];
            match place {
                Place::Hole | Place::Zero => part.fill(0),
                Place::Stored(host) => self
                    .source
                    .read_exact_at(part, host)
                    .map_err(|e| Error::io(format!("reading the image at file offset {host}"), e))?,
            }
            done += len as usize;
        }
        Ok(())
    }

    fn details(&self) -> Details {
        let cluster_size = Some(self.layout.block_bytes);
        Details { cluster_size, dirty: Some(false), specific: Vec::new() }
    }
}

/// The bytes of a block for a writer that asked for no compression.
pub(super) fn plain(block: Block<'_>, format: Format) -> Result<&[u8]> {
    match block {
        Block::Plain(bytes) => Ok(bytes),
        Block::Packed(_) => {
            Err(Error::new(ErrorKind::Unsupported, format!("format {format} has no compression")))
        }
    }
}

/// Refuses to compress in a format that cannot.
pub(super) fn refuse_compression(compress: bool, format: Format) -> Result<()> {
    if compress {
        let text = format!("format {format} has no compression; leave it out, or write qcow2");
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    Ok(())
}

/// The error of a writer that was announced a disk of another size.
pub(super) fn other_size(format: Format, announced: u64, size: u64) -> Error {
    let text =
        format!("the {format} file was begun for a disk of {announced} bytes, and this one has {size}");
    Error::new(ErrorKind::Corrupt, text)
}
