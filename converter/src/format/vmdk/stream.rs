//! Writing the subformat streamOptimized, from front to end.
//!
//! ```text
//!  0        1            128                                                                          sectors
//!  [ header | descriptor | grain, grain, ... table | grain, ... table | directory | footer | end of stream ]
//! ```
//!
//! A marker precedes each grain, table, the directory and the footer, which is the header with the place of the
//! directory. A table follows the last grain it names, so that memory holds one table and the directory.

use super::options::WriteOptions;
use super::write::{
    DESCRIPTOR_END_SECTOR, GRAIN_BYTES, GRAIN_SECTORS, GT_BYTES, GT_SECTORS, GTES_PER_GT, Header, check_size,
    descriptor, sector_number, table_count,
};
use super::{GD_AT_END, compression, flag, marker};
use crate::Result;
use crate::format::SECTOR_BYTES;
use crate::io::{Block, Compression, Finished, Sink, Writer};

/// First sector after header and descriptor; VMware's number.
const OVERHEAD_SECTORS: u64 = 128;

/// The version that VMware writes streams with.
const VERSION: u32 = 3;

/// Most bytes of a stored block of RFC 1951.
const STORED_BYTES_MAX: usize = u16::MAX as usize;

/// Writes a file of the subformat streamOptimized.
pub(super) struct StreamWriter<'a> {
    sink: &'a mut dyn Sink,
    virtual_size: u64,
    /// Next sector of the file.
    sector: u64,
    /// Where the tables are; 0 for one that has no entries.
    directory: Vec<u32>,
    /// The table under construction, and its number.
    table: Vec<u32>,
    table_index: u64,
    table_used: bool,
    /// What is appended next: a marker and what follows, up to a whole sector.
    record: Vec<u8>,
}

impl<'a> StreamWriter<'a> {
    pub(super) fn new(sink: &'a mut dyn Sink, options: &WriteOptions, virtual_size: u64) -> Result<Self> {
        let tables = table_count(virtual_size)?;
        sink.append(&header(virtual_size, GD_AT_END).bytes())?;
        sink.append(&descriptor(options, virtual_size))?;
        sink.append_zeros((OVERHEAD_SECTORS - DESCRIPTOR_END_SECTOR) * SECTOR_BYTES)?;
        Ok(Self {
            sink,
            virtual_size,
            sector: OVERHEAD_SECTORS,
            directory: vec![0; tables as usize],
            table: vec![0; GTES_PER_GT],
            table_index: 0,
            table_used: false,
            record: Vec::new(),
        })
    }

    /// Appends the table under construction, if a grain is in it.
    fn finish_table(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.table_used) {
            return Ok(());
        }
        self.begin_marked(GT_SECTORS, marker::GRAIN_TABLE);
        self.record.extend(self.table.iter().flat_map(|sector| sector.to_le_bytes()));
        self.table.fill(0);
        debug_assert_eq!(self.record.len(), SECTOR_BYTES as usize + GT_BYTES);
        let sector = sector_number(self.sector + 1)?;
        if let Some(entry) = self.directory.get_mut(self.table_index as usize) {
            *entry = sector;
        }
        self.append_record()
    }

    /// Begins a record of `sectors` sectors with their marker.
    fn begin_marked(&mut self, sectors: u64, kind: u32) {
        self.record.clear();
        self.record.extend(sectors.to_le_bytes());
        self.record.extend(0u32.to_le_bytes());
        self.record.extend(kind.to_le_bytes());
        self.record.resize(SECTOR_BYTES as usize, 0);
    }

    /// Appends the record, filled up to a whole sector.
    fn append_record(&mut self) -> Result<()> {
        self.record.resize(self.record.len().next_multiple_of(SECTOR_BYTES as usize), 0);
        self.sink.append(&self.record)?;
        self.sector += self.record.len() as u64 / SECTOR_BYTES;
        Ok(())
    }
}

impl Writer for StreamWriter<'_> {
    fn block_bytes(&self) -> usize {
        GRAIN_BYTES
    }

    fn compression(&self) -> Compression {
        Compression::Zlib
    }

    fn put(&mut self, index: u64, block: Block<'_>) -> Result<()> {
        let (table_index, slot) = (index / GTES_PER_GT as u64, (index % GTES_PER_GT as u64) as usize);
        if table_index != self.table_index {
            self.finish_table()?;
            self.table_index = table_index;
        }
        self.table[slot] = sector_number(self.sector)?;
        self.table_used = true;
        self.record.clear();
        self.record.extend((index * GRAIN_SECTORS).to_le_bytes());
        self.record.extend([0; 4]);
        let marker_bytes = self.record.len();
        match block {
            Block::Packed(stream) => self.record.extend(stream),
            Block::Plain(grain) => store(grain, &mut self.record),
        }
        let bytes = (self.record.len() - marker_bytes) as u32;
        self.record[marker_bytes - 4..marker_bytes].copy_from_slice(&bytes.to_le_bytes());
        self.append_record()
    }

    fn finish(mut self: Box<Self>, virtual_size: u64) -> Result<Finished> {
        check_size(self.virtual_size, virtual_size)?;
        self.finish_table()?;
        let directory = std::mem::take(&mut self.directory);
        let sectors = (directory.len() as u64 * 4).div_ceil(SECTOR_BYTES);
        self.begin_marked(sectors, marker::GRAIN_DIRECTORY);
        self.append_record()?;
        let directory_sector = self.sector;
        sector_number(directory_sector + sectors)?;
        self.record.clear();
        self.record.extend(directory.iter().flat_map(|sector| sector.to_le_bytes()));
        drop(directory);
        self.append_record()?;
        self.begin_marked(1, marker::FOOTER);
        self.record.extend(header(virtual_size, directory_sector).bytes());
        self.append_record()?;
        self.begin_marked(0, marker::END_OF_STREAM);
        self.append_record()?;
        Ok(Finished { file_bytes: self.sector * SECTOR_BYTES, virtual_size })
    }
}

fn header(virtual_size: u64, directory: u64) -> Header {
    Header {
        version: VERSION,
        flags: flag::NEWLINE_TEST | flag::COMPRESSED | flag::MARKERS,
        compression: compression::DEFLATE,
        virtual_size,
        redundant_directory: 0,
        directory,
        overhead: OVERHEAD_SECTORS,
    }
}

/// Appends a zlib stream that holds `grain` as it is, for one that does not shrink (RFC 1950; RFC 1951, 3.2.4).
fn store(grain: &[u8], record: &mut Vec<u8>) {
    // Deflate with a window of 32 KiB, the fastest level: the two bytes, as a number, are a multiple of 31.
    record.extend([0x78, 0x01]);
    let mut blocks = grain.chunks(STORED_BYTES_MAX).peekable();
    while let Some(block) = blocks.next() {
        let len = block.len() as u16;
        record.push(u8::from(blocks.peek().is_none()));
        record.extend(len.to_le_bytes());
        record.extend((!len).to_le_bytes());
        record.extend(block);
    }
    record.extend(libdeflater::adler32(grain).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grain_that_does_not_shrink_is_a_valid_stream() {
        for len in [1, 65535, 65536, 200_000] {
            let grain: Vec<u8> = (0..len).map(|i| (i * 7 % 251) as u8).collect();
            let mut stream = Vec::new();
            store(&grain, &mut stream);
            let mut out = vec![0; len];
            let n = libdeflater::Decompressor::new().zlib_decompress(&stream, &mut out).unwrap();
            assert!(n == len && out == grain);
        }
    }
}
