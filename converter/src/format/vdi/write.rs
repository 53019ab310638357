//! The writer.
//!
//! ```text
//!  dynamic   [ header, map: written last | blocks that are not zero, in the guest's order ]
//!  static    [ header, map               | all blocks; zeros are holes of the file        ]
//! ```

use uuid::Uuid;

use super::header::{BLOCK_BYTES, HEADER_BYTES, NewHeader};
use crate::format::blocks::{UNALLOCATED, other_size, plain, refuse_compression};
use crate::format::{Format, options};
use crate::io::{Block, Compression, CreateOptions, Finished, Sink, Writer};
use crate::{Error, ErrorKind, Result};

/// Most blocks of a disk: 11 TiB, with a map of 44 MiB.
const BLOCKS_MAX: u64 = 11 << 20;

/// What a static image is written in: the finer, the more of its zeros are holes.
const STATIC_STEP_BYTES: u64 = 64 << 10;

/// The first block begins at a multiple of this, as in VirtualBox's own images.
const DATA_ALIGN_BYTES: u64 = 1 << 20;

/// Map entries written at a time.
const MAP_CHUNK_ENTRIES: usize = 256 << 10;

/// What kind of VDI file to write: version 1.1, blocks of 1 MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VdiOptions {
    /// Every block gets its place, in the guest's order; those that are zero are holes of the file.
    pub preallocated: bool,
}

impl VdiOptions {
    /// Understands the options that `qemu-img convert -O vdi` has for this.
    pub(super) fn parse(compress: bool, pairs: &[(&str, &str)]) -> Result<Self> {
        refuse_compression(compress, Format::Vdi)?;
        let mut read = Self::default();
        for &(name, value) in pairs {
            match name {
                "static" => read.preallocated = options::switch(name, value)?,
                "preallocation" => {
                    read.preallocated = match value {
                        "off" => false,
                        "metadata" => true,
                        _ => return Err(options::invalid(name, value, "off or metadata")),
                    }
                }
                _ => return Err(options::unknown(Format::Vdi, name, "static, preallocation")),
            }
        }
        Ok(read)
    }
}

impl CreateOptions for VdiOptions {
    fn format(&self) -> Format {
        Format::Vdi
    }

    fn create<'a>(&self, sink: &'a mut dyn Sink, virtual_size: Option<u64>) -> Result<Box<dyn Writer + 'a>> {
        let Some(virtual_size) = virtual_size else {
            let text = "a VDI file needs the size of the disk before its first block";
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let blocks = virtual_size.div_ceil(BLOCK_BYTES);
        if blocks > BLOCKS_MAX {
            let text = format!(
                "a VDI file holds disks of up to {} bytes here, not of {virtual_size}; choose qcow2",
                BLOCKS_MAX * BLOCK_BYTES
            );
            return Err(Error::new(ErrorKind::Limit, text));
        }
        let data_offset = (HEADER_BYTES as u64 + blocks * 4).next_multiple_of(DATA_ALIGN_BYTES);
        // Both fit: there are at most BLOCKS_MAX blocks.
        let form = Form { virtual_size, data_offset: data_offset as u32, blocks: blocks as u32 };
        if self.preallocated {
            sink.append(&form.header(true, form.blocks))?;
            for start in (0..form.blocks).step_by(MAP_CHUNK_ENTRIES) {
                let end = form.blocks.min(start.saturating_add(MAP_CHUNK_ENTRIES as u32));
                sink.append(&map_bytes(start..end))?;
            }
            sink.append_zeros(data_offset - HEADER_BYTES as u64 - blocks * 4)?;
            return Ok(Box::new(StaticWriter { sink, form, at: 0 }));
        }
        sink.append_zeros(data_offset)?;
        Ok(Box::new(DynamicWriter { sink, form, map: vec![UNALLOCATED; blocks as usize], allocated: 0 }))
    }

    fn is_stream(&self) -> bool {
        self.preallocated
    }
}

/// What is known of the file from the start.
struct Form {
    virtual_size: u64,
    data_offset: u32,
    blocks: u32,
}

impl Form {
    fn header(&self, is_static: bool, blocks_allocated: u32) -> [u8; HEADER_BYTES] {
        let uuids = [Uuid::new_v4(), Uuid::new_v4()].map(|uuid| uuid.to_bytes_le());
        let Self { virtual_size, data_offset, blocks } = *self;
        NewHeader { is_static, virtual_size, data_offset, blocks, blocks_allocated, uuids }.encode()
    }

    fn check_size(&self, virtual_size: u64) -> Result<()> {
        match virtual_size == self.virtual_size {
            true => Ok(()),
            false => Err(other_size(Format::Vdi, self.virtual_size, virtual_size)),
        }
    }

    fn finished(&self, blocks: u32) -> Finished {
        let file_bytes = u64::from(self.data_offset) + u64::from(blocks) * BLOCK_BYTES;
        Finished { file_bytes, virtual_size: self.virtual_size }
    }
}

struct DynamicWriter<'a> {
    sink: &'a mut dyn Sink,
    form: Form,
    map: Vec<u32>,
    allocated: u32,
}

impl Writer for DynamicWriter<'_> {
    fn block_bytes(&self) -> usize {
        BLOCK_BYTES as usize
    }

    fn compression(&self) -> Compression {
        Compression::None
    }

    fn put(&mut self, index: u64, block: Block<'_>) -> Result<()> {
        let block = plain(block, Format::Vdi)?;
        let entry = usize::try_from(index).ok().and_then(|index| self.map.get_mut(index));
        let size = self.form.virtual_size;
        *entry.ok_or_else(|| other_size(Format::Vdi, size, index.saturating_mul(BLOCK_BYTES)))? =
            self.allocated;
        self.allocated += 1;
        self.sink.append(block)
    }

    fn finish(self: Box<Self>, virtual_size: u64) -> Result<Finished> {
        self.form.check_size(virtual_size)?;
        let mut at = HEADER_BYTES as u64;
        for chunk in self.map.chunks(MAP_CHUNK_ENTRIES) {
            let bytes = map_bytes(chunk.iter().copied());
            self.sink.rewrite(&bytes, at)?;
            at += bytes.len() as u64;
        }
        self.sink.rewrite(&self.form.header(false, self.allocated), 0)?;
        Ok(self.form.finished(self.allocated))
    }
}

struct StaticWriter<'a> {
    sink: &'a mut dyn Sink,
    form: Form,
    /// Next byte of the virtual disk.
    at: u64,
}

impl Writer for StaticWriter<'_> {
    fn block_bytes(&self) -> usize {
        STATIC_STEP_BYTES as usize
    }

    fn compression(&self) -> Compression {
        Compression::None
    }

    fn put(&mut self, index: u64, block: Block<'_>) -> Result<()> {
        let block = plain(block, Format::Vdi)?;
        let start = index.saturating_mul(STATIC_STEP_BYTES);
        if start < self.at || start >= self.form.virtual_size {
            return Err(other_size(Format::Vdi, self.form.virtual_size, start));
        }
        self.sink.append_zeros(start - self.at)?;
        self.at = start + block.len() as u64;
        self.sink.append(block)
    }

    fn finish(self: Box<Self>, virtual_size: u64) -> Result<Finished> {
        self.form.check_size(virtual_size)?;
        self.sink.append_zeros(u64::from(self.form.blocks) * BLOCK_BYTES - self.at)?;
        Ok(self.form.finished(self.form.blocks))
    }
}

fn map_bytes(entries: impl Iterator<Item = u32>) -> Vec<u8> {
    entries.flat_map(u32::to_le_bytes).collect()
}
