//! Writing sparse extents: what both kinds begin with, and the kind that can be written to later.
//!
//! ```text
//!  0        1            21    overhead                                                     sectors
//!  [ header | descriptor | redundant directory, tables | directory, tables | grain | grain | ... ]
//! ```
//!
//! All tables have their place from the beginning; those with entries are patched, some at a time, as the grains come
//! in ascending order. So memory holds few of them, whatever the size of the disk. The header is written last.

use super::options::{AdapterType, Subformat, WriteOptions};
use super::{GTES_PER_GT_MAX, HEADER_BYTES, SPARSE_MAGIC, compression, corrupt, flag, limit, unsupported};
use crate::Result;
use crate::format::SECTOR_BYTES;
use crate::io::{Block, Compression, Finished, Sink, Writer};

/// Bytes of a grain.
pub(super) const GRAIN_BYTES: usize = 64 << 10;
pub(super) const GRAIN_SECTORS: u64 = GRAIN_BYTES as u64 / SECTOR_BYTES;

/// Entries and bytes of a grain table.
pub(super) const GTES_PER_GT: usize = GTES_PER_GT_MAX as usize;
pub(super) const GT_BYTES: usize = GTES_PER_GT * 4;
pub(super) const GT_SECTORS: u64 = GT_BYTES as u64 / SECTOR_BYTES;

/// Where the embedded descriptor is, and its room; VMware's and qemu's numbers.
const DESCRIPTOR_SECTOR: u64 = 1;
const DESCRIPTOR_SECTORS: u64 = 20;

/// First sector after the descriptor.
pub(super) const DESCRIPTOR_END_SECTOR: u64 = DESCRIPTOR_SECTOR + DESCRIPTOR_SECTORS;

/// Largest grain directory, bytes: that of a disk of 384 TiB.
const GD_BYTES_MAX: u64 = 48 << 20;

/// Grain tables patched at once.
const BATCH_TABLES_MAX: usize = 128;

/// Directory entries appended at once.
const DIRECTORY_CHUNK_ENTRIES: usize = 16 << 10;

/// The content id of a disk that was not written to since it was made, as VMware has it. It does not tell disks apart:
/// the same disk always gives the same bytes.
const CID: u32 = 0xffff_fffe;
const NO_PARENT: u32 = 0xffff_ffff;

/// Writes a file of the subformat monolithicSparse.
pub(super) struct SparseWriter<'a> {
    sink: &'a mut dyn Sink,
    virtual_size: u64,
    layout: Layout,
    /// Next sector of the file.
    sector: u64,
    /// Tables that are not written yet, the first of them number `first_table`.
    tables: Vec<u8>,
    first_table: u64,
}

/// Where the tables are, in sectors.
struct Layout {
    tables: u64,
    directory_sectors: u64,
    redundant_directory: u64,
    directory: u64,
    overhead: u64,
}

impl Layout {
    fn new(virtual_size: u64) -> Result<Self> {
        let tables = table_count(virtual_size)?;
        let directory_sectors = (tables * 4).div_ceil(SECTOR_BYTES);
        let redundant_directory = DESCRIPTOR_END_SECTOR;
        let directory = redundant_directory + directory_sectors + tables * GT_SECTORS;
        let overhead = directory + directory_sectors + tables * GT_SECTORS;
        let overhead = overhead.next_multiple_of(GRAIN_SECTORS);
        Ok(Self { tables, directory_sectors, redundant_directory, directory, overhead })
    }
}

impl<'a> SparseWriter<'a> {
    pub(super) fn new(sink: &'a mut dyn Sink, options: &WriteOptions, virtual_size: u64) -> Result<Self> {
        let layout = Layout::new(virtual_size)?;
        sector_number(layout.overhead)?;
        sink.append_zeros(HEADER_BYTES as u64)?;
        sink.append(&descriptor(options, virtual_size))?;
        for directory in [layout.redundant_directory, layout.directory] {
            append_directory(sink, directory, &layout)?;
        }
        let end = layout.directory + layout.directory_sectors + layout.tables * GT_SECTORS;
        sink.append_zeros((layout.overhead - end) * SECTOR_BYTES)?;
        let sector = layout.overhead;
        Ok(Self { sink, virtual_size, layout, sector, tables: Vec::new(), first_table: 0 })
    }

    /// The place of grain `index` in the tables that are kept, after writing others.
    fn entry(&mut self, index: u64) -> Result<&mut [u8]> {
        let (table, slot) = (index / GTES_PER_GT as u64, (index % GTES_PER_GT as u64) as usize);
        if table >= self.first_table + BATCH_TABLES_MAX as u64 || self.tables.is_empty() {
            self.write_tables()?;
            self.first_table = table;
        }
        let at = (table - self.first_table) as usize * GT_BYTES;
        if self.tables.len() < at + GT_BYTES {
            self.tables.resize(at + GT_BYTES, 0);
        }
        Ok(&mut self.tables[at + slot * 4..at + slot * 4 + 4])
    }

    /// Writes the tables that are kept over their places in both sets.
    fn write_tables(&mut self) -> Result<()> {
        if self.tables.is_empty() {
            return Ok(());
        }
        for directory in [self.layout.redundant_directory, self.layout.directory] {
            let first = directory + self.layout.directory_sectors + self.first_table * GT_SECTORS;
            self.sink.rewrite(&self.tables, first * SECTOR_BYTES)?;
        }
        self.tables.clear();
        Ok(())
    }
}

impl Writer for SparseWriter<'_> {
    fn block_bytes(&self) -> usize {
        GRAIN_BYTES
    }

    fn compression(&self) -> Compression {
        Compression::None
    }

    fn put(&mut self, index: u64, block: Block<'_>) -> Result<()> {
        let (Block::Plain(grain) | Block::Packed(grain)) = block;
        let sector = sector_number(self.sector)?;
        self.entry(index)?.copy_from_slice(&sector.to_le_bytes());
        self.sink.append(grain)?;
        self.sector += GRAIN_SECTORS;
        Ok(())
    }

    fn finish(mut self: Box<Self>, virtual_size: u64) -> Result<Finished> {
        check_size(self.virtual_size, virtual_size)?;
        self.write_tables()?;
        let header = Header {
            version: 1,
            flags: flag::NEWLINE_TEST | flag::REDUNDANT_DIRECTORY,
            compression: compression::NONE,
            virtual_size,
            redundant_directory: self.layout.redundant_directory,
            directory: self.layout.directory,
            overhead: self.layout.overhead,
        };
        self.sink.rewrite(&header.bytes(), 0)?;
        Ok(Finished { file_bytes: self.sector * SECTOR_BYTES, virtual_size })
    }
}

/// Appends a directory that is to be at sector `start`, and room for its tables.
fn append_directory(sink: &mut dyn Sink, start: u64, layout: &Layout) -> Result<()> {
    let first = start + layout.directory_sectors;
    let mut at = 0;
    while at < layout.tables {
        let end = layout.tables.min(at + DIRECTORY_CHUNK_ENTRIES as u64);
        let sectors = (at..end).map(|table| sector_number(first + table * GT_SECTORS).map(u32::to_le_bytes));
        let bytes = sectors.collect::<Result<Vec<_>>>()?.into_flattened();
        sink.append(&bytes)?;
        at = end;
    }
    let padding = layout.directory_sectors * SECTOR_BYTES - layout.tables * 4;
    sink.append_zeros(padding + layout.tables * GT_BYTES as u64)
}

/// Grain tables of a disk. Fails with [`crate::ErrorKind::Limit`] if they are too many for a directory, and with
/// [`crate::ErrorKind::Unsupported`] for an empty disk: a capacity of 0 means something else.
pub(super) fn table_count(virtual_size: u64) -> Result<u64> {
    if virtual_size == 0 {
        return Err(unsupported("a VMDK file cannot hold an empty disk; write qcow2 or raw"));
    }
    let tables = virtual_size.div_ceil((GTES_PER_GT * GRAIN_BYTES) as u64);
    if tables * 4 > GD_BYTES_MAX {
        let text = format!("a VMDK file cannot hold a disk of {virtual_size} bytes; write qcow2 or raw");
        return Err(limit(text));
    }
    Ok(tables)
}

/// A sector of the file as tables name it. Fails with [`crate::ErrorKind::Limit`] beyond 2 TiB.
pub(super) fn sector_number(sector: u64) -> Result<u32> {
    u32::try_from(sector)
        .map_err(|_| limit("a VMDK file cannot grow beyond 2 TiB; write qcow2 or raw".to_owned()))
}

/// The size stands at the beginning of the file: it must be the one that was announced.
pub(super) fn check_size(announced: u64, actual: u64) -> Result<()> {
    if announced == actual {
        return Ok(());
    }
    Err(corrupt(format!(
        "the disk has {actual} bytes, not {announced} as announced: it was changed meanwhile"
    )))
}

/// What the header tells, sectors.
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) flags: u32,
    pub(super) compression: u16,
    /// In bytes.
    pub(super) virtual_size: u64,
    pub(super) redundant_directory: u64,
    pub(super) directory: u64,
    pub(super) overhead: u64,
}

impl Header {
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend(SPARSE_MAGIC);
        header.extend(self.version.to_le_bytes());
        header.extend(self.flags.to_le_bytes());
        header.extend((self.virtual_size / SECTOR_BYTES).to_le_bytes());
        header.extend(GRAIN_SECTORS.to_le_bytes());
        header.extend(DESCRIPTOR_SECTOR.to_le_bytes());
        header.extend(DESCRIPTOR_SECTORS.to_le_bytes());
        header.extend((GTES_PER_GT as u32).to_le_bytes());
        header.extend(self.redundant_directory.to_le_bytes());
        header.extend(self.directory.to_le_bytes());
        header.extend(self.overhead.to_le_bytes());
        header.push(0); // closed cleanly
        header.extend(super::NEWLINE_TEST);
        header.extend(self.compression.to_le_bytes());
        header.resize(HEADER_BYTES, 0);
        header
    }
}

/// The descriptor, filled up to the room it has.
///
/// The name of the extent is that of no file: readers take the file that the descriptor is in, whatever its name.
pub(super) fn descriptor(options: &WriteOptions, virtual_size: u64) -> Vec<u8> {
    let WriteOptions { subformat, adapter_type, hw_version, tools_version } = options;
    let extent = match subformat {
        Subformat::MonolithicSparse => "disk.vmdk",
        Subformat::StreamOptimized => "disk-stream.vmdk",
    };
    let sectors = virtual_size / SECTOR_BYTES;
    let heads = if *adapter_type == AdapterType::Ide { 16 } else { 255 };
    let cylinders = sectors / (heads * 63);
    let text = format!(
        "# Disk DescriptorFile\n\
         version=1\n\
         CID={CID:08x}\n\
         parentCID={NO_PARENT:08x}\n\
         createType=\"{subformat}\"\n\
         \n\
         # Extent description\n\
         RW {sectors} SPARSE \"{extent}\"\n\
         \n\
         # The Disk Data Base\n\
         #DDB\n\
         \n\
         ddb.virtualHWVersion = \"{hw_version}\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"63\"\n\
         ddb.adapterType = \"{adapter_type}\"\n\
         ddb.toolsVersion = \"{tools_version}\"\n"
    );
    let mut bytes = text.into_bytes();
    bytes.resize((DESCRIPTOR_SECTORS * SECTOR_BYTES) as usize, 0);
    bytes
}
