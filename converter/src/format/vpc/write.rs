//! The writer.
//!
//! ```text
//!  dynamic   [ footer copy, dynamic header, table: written last | bitmap, block | bitmap, block | ... | footer ]
//!  fixed     [ disk; zeros are holes of the file | footer ]
//! ```

use uuid::Uuid;

use super::dynamic::{self, HEADER_BYTES, bitmap_bytes};
use super::footer::{FOOTER_BYTES, Kind, NOWHERE, NewFooter};
use crate::format::blocks::{UNALLOCATED, other_size, plain, refuse_compression};
use crate::format::{Format, SECTOR_BYTES, options};
use crate::io::{Block, Compression, CreateOptions, Finished, Sink, Writer};
use crate::{Error, ErrorKind, Result};

/// Bytes of a block of a dynamic disk, and of the sector bitmap before it.
const BLOCK_BYTES: u64 = 2 << 20;
const BITMAP_BYTES: usize = 512;

/// Where the table is: right behind the dynamic header.
const TABLE_OFFSET: u64 = (FOOTER_BYTES + HEADER_BYTES) as u64;

/// Blocks (not their bitmaps) begin at a multiple of this, for the good of direct I/O and of disks with large sectors.
const BLOCK_ALIGN_BYTES: u64 = 4096;

/// What a fixed disk is written in: the finer, the more of its zeros are holes.
const FIXED_STEP_BYTES: u64 = 64 << 10;

/// How the disk is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Subformat {
    /// Blocks that are not zero, found by a table.
    #[default]
    Dynamic,
    /// The disk as it is, and a footer.
    Fixed,
}

/// What kind of VHD file to write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VhdOptions {
    /// How the disk is stored.
    pub subformat: Subformat,
    /// Rounds the disk up to whole cylinders, as Virtual PC wants it. Otherwise its size is kept to the sector, and
    /// the footer says that a program counts by it which does so, as Hyper-V, Azure and QEMU understand.
    pub by_geometry: bool,
}

impl VhdOptions {
    /// Understands the options that `qemu-img convert -O vpc` has for this.
    pub(super) fn parse(compress: bool, pairs: &[(&str, &str)]) -> Result<Self> {
        refuse_compression(compress, Format::Vpc)?;
        let mut read = Self::default();
        for &(name, value) in pairs {
            match name {
                "subformat" => {
                    read.subformat = match value {
                        "dynamic" => Subformat::Dynamic,
                        "fixed" => Subformat::Fixed,
                        _ => return Err(options::invalid(name, value, "dynamic or fixed")),
                    }
                }
                "force_size" => read.by_geometry = !options::switch(name, value)?,
                _ => return Err(options::unknown(Format::Vpc, name, "subformat, force_size")),
            }
        }
        Ok(read)
    }
}

impl CreateOptions for VhdOptions {
    fn format(&self) -> Format {
        Format::Vpc
    }

    fn create<'a>(&self, sink: &'a mut dyn Sink, virtual_size: Option<u64>) -> Result<Box<dyn Writer + 'a>> {
        let Some(announced) = virtual_size else {
            let text = "a VHD file needs the size of the disk before its first block";
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let form = Form {
            announced,
            virtual_size: NewFooter::size(announced, self.by_geometry)?,
            by_geometry: self.by_geometry,
        };
        if self.subformat == Subformat::Fixed {
            return Ok(Box::new(FixedWriter { sink, form, at: 0 }));
        }
        let entries = form.virtual_size.div_ceil(BLOCK_BYTES) as usize;
        let at = (TABLE_OFFSET + entries as u64 * 4).next_multiple_of(SECTOR_BYTES);
        sink.append_zeros(at)?;
        Ok(Box::new(DynamicWriter { sink, form, table: vec![UNALLOCATED; entries], at }))
    }

    fn is_stream(&self) -> bool {
        self.subformat == Subformat::Fixed
    }
}

/// What is known of the file from the start.
struct Form {
    announced: u64,
    virtual_size: u64,
    by_geometry: bool,
}

impl Form {
    fn footer(&self, kind: Kind, data_offset: u64) -> [u8; FOOTER_BYTES] {
        let Self { virtual_size, by_geometry, .. } = *self;
        NewFooter { kind, virtual_size, by_geometry, data_offset, uuid: Uuid::new_v4().into_bytes() }.encode()
    }

    fn check_size(&self, virtual_size: u64) -> Result<()> {
        match virtual_size == self.announced {
            true => Ok(()),
            false => Err(other_size(Format::Vpc, self.announced, virtual_size)),
        }
    }
}

struct DynamicWriter<'a> {
    sink: &'a mut dyn Sink,
    form: Form,
    table: Vec<u32>,
    /// Next byte of the file.
    at: u64,
}

impl Writer for DynamicWriter<'_> {
    fn block_bytes(&self) -> usize {
        BLOCK_BYTES as usize
    }

    fn compression(&self) -> Compression {
        Compression::None
    }

    fn put(&mut self, index: u64, block: Block<'_>) -> Result<()> {
        let block = plain(block, Format::Vpc)?;
        let bitmap = bitmap_bytes(BLOCK_BYTES);
        let start = (self.at + bitmap).next_multiple_of(BLOCK_ALIGN_BYTES) - bitmap;
        let entry = usize::try_from(index).ok().and_then(|index| self.table.get_mut(index));
        let announced = self.form.announced;
        let entry =
            entry.ok_or_else(|| other_size(Format::Vpc, announced, index.saturating_mul(BLOCK_BYTES)))?;
        // Fits: the largest disk has 2040 GiB.
        *entry = (start / SECTOR_BYTES) as u32;
        self.sink.append_zeros(start - self.at)?;
        self.sink.append(&[0xff; BITMAP_BYTES])?;
        self.sink.append(block)?;
        self.at = start + bitmap + BLOCK_BYTES;
        Ok(())
    }

    fn finish(self: Box<Self>, virtual_size: u64) -> Result<Finished> {
        self.form.check_size(virtual_size)?;
        let footer = self.form.footer(Kind::Dynamic, FOOTER_BYTES as u64);
        self.sink.append(&footer)?;
        let entries = self.table.len() as u32;
        let mut table: Vec<u8> = self.table.into_iter().flat_map(u32::to_be_bytes).collect();
        table.resize(table.len().next_multiple_of(SECTOR_BYTES as usize), 0xff);
        self.sink.rewrite(&table, TABLE_OFFSET)?;
        let header = dynamic::new_header(TABLE_OFFSET, entries, BLOCK_BYTES as u32);
        self.sink.rewrite(&header, FOOTER_BYTES as u64)?;
        self.sink.rewrite(&footer, 0)?;
        Ok(Finished { file_bytes: self.at + FOOTER_BYTES as u64, virtual_size: self.form.virtual_size })
    }
}

struct FixedWriter<'a> {
    sink: &'a mut dyn Sink,
    form: Form,
    /// Next byte of the disk.
    at: u64,
}

impl Writer for FixedWriter<'_> {
    fn block_bytes(&self) -> usize {
        FIXED_STEP_BYTES as usize
    }

    fn compression(&self) -> Compression {
        Compression::None
    }

    fn put(&mut self, index: u64, block: Block<'_>) -> Result<()> {
        let block = plain(block, Format::Vpc)?;
        let start = index.saturating_mul(FIXED_STEP_BYTES);
        if start < self.at || start >= self.form.announced {
            return Err(other_size(Format::Vpc, self.form.announced, start));
        }
        // What fills up the last block does not belong to the disk.
        let block = &block[..(self.form.announced - start).min(block.len() as u64) as usize];
        self.sink.append_zeros(start - self.at)?;
        self.at = start + block.len() as u64;
        self.sink.append(block)
    }

    fn finish(self: Box<Self>, virtual_size: u64) -> Result<Finished> {
        self.form.check_size(virtual_size)?;
        let virtual_size = self.form.virtual_size;
        self.sink.append_zeros(virtual_size - self.at)?;
        self.sink.append(&self.form.footer(Kind::Fixed, NOWHERE))?;
        Ok(Finished { file_bytes: virtual_size + FOOTER_BYTES as u64, virtual_size })
    }
}
