//! Writing in one pass over the disk: the log and the metadata, the blocks, and at last the BAT and the headers.
//!
//! ```text
//!  0                1 MiB                                                                        end
//!  [ header section | log: a hole | metadata | BAT, written late | block | block | ... ]
//!    written last
//! ```
//!
//! A block gets its place with its first granule that is not zero. What is zero in it becomes a hole of the file.

use sha2::{Digest as _, Sha256};

use super::options::WriteOptions;
use super::{
    BAT_REGION, FILE_PARAMETERS, FILE_SIGNATURE, Guid, LEAVE_BLOCKS_ALLOCATED, LOGICAL_SECTOR_SIZE,
    METADATA_REGION, MIB, PHYSICAL_SECTOR_SIZE, VIRTUAL_DISK_ID, VIRTUAL_DISK_SIZE, bat_entries, checksum,
    chunk_ratio, section, state,
};
use crate::io::{self, Block, Finished, Sink, Writer};
use crate::{Error, ErrorKind, Result};

/// Bytes of the disk that are stored or left out together.
const GRANULE_BYTES: u64 = 64 << 10;

/// Largest disk that the format allows, bytes.
const VIRTUAL_SIZE_MAX: u64 = 64 << 40;

/// Most bytes of the BAT, which is held in memory.
const BAT_BYTES_MAX: u64 = 48 << 20;

/// Sectors that a guest sees, and that the disk has, bytes. qemu has the same.
const LOGICAL_SECTOR_BYTES: u32 = 512;
const PHYSICAL_SECTOR_BYTES: u32 = 512;

/// Bytes of the metadata table; the items follow.
const METADATA_TABLE_BYTES: usize = 64 << 10;

/// Flags of a metadata item: of the disk, or of the file; required to be understood.
const OF_DISK: u32 = 0b110;
const OF_FILE: u32 = 0b100;

/// Entries of the BAT written at a time.
const BAT_PIECE_ENTRIES: usize = 128 << 10;

/// Who made the file.
const CREATOR: &str = "dvcr";

/// Writes a VHDX file.
pub(super) struct VhdxWriter<'a> {
    sink: &'a mut dyn Sink,
    options: WriteOptions,
    virtual_size: u64,
    block_bytes: u64,
    chunk_ratio: u64,
    /// The table as it will be in the file.
    bat: Vec<u64>,
    /// The block that granules go to, and the end of its place in the file; `at` is not before its beginning.
    current: Option<u64>,
    current_end: u64,
    /// Next byte of the file.
    at: u64,
    /// Of everything that makes this disk differ from others.
    identity: Sha256,
}

impl<'a> VhdxWriter<'a> {
    pub(super) fn new(sink: &'a mut dyn Sink, options: &WriteOptions, virtual_size: u64) -> Result<Self> {
        let block_bytes = options.block_bytes(virtual_size);
        let blocks = virtual_size.div_ceil(block_bytes);
        let chunk_ratio = chunk_ratio(block_bytes, LOGICAL_SECTOR_BYTES.into());
        let entries = bat_entries(blocks, chunk_ratio);
        if virtual_size > VIRTUAL_SIZE_MAX || entries > BAT_BYTES_MAX / 8 {
            return Err(Error::new(
                ErrorKind::Limit,
                format!(
                    "a VHDX file with blocks of {block_bytes} bytes cannot hold a disk of {virtual_size} bytes; \
                     choose larger blocks, and a disk of at most 64 TiB"
                ),
            ));
        }
        let empty = if options.state_zero { state::ZERO } else { state::NOT_PRESENT };
        let mut identity = Sha256::new();
        for part in [virtual_size, block_bytes, options.fixed.into(), options.log_bytes.into(), empty] {
            identity.update(part.to_le_bytes());
        }
        let mut writer = Self {
            sink,
            options: *options,
            virtual_size,
            block_bytes,
            chunk_ratio,
            bat: vec![0; entries as usize],
            current: None,
            current_end: 0,
            at: 0,
            identity,
        };
        for block in 0..blocks {
            let host = writer.payload_start() + block * block_bytes;
            let entry = if options.fixed { host | state::FULLY_PRESENT } else { empty };
            if let Some(slot) = writer.slot(block) {
                *slot = entry;
            }
        }
        writer.append_zeros(writer.payload_start())?;
        Ok(writer)
    }

    /// The entry of a block; those of sector bitmaps, one after each chunk, stay unused.
    fn slot(&mut self, block: u64) -> Option<&mut u64> {
        self.bat.get_mut((block + block / self.chunk_ratio) as usize)
    }

    fn metadata_start(&self) -> u64 {
        section::BYTES + u64::from(self.options.log_bytes)
    }

    fn bat_start(&self) -> u64 {
        self.metadata_start() + MIB
    }

    /// Bytes of the BAT region, which is never empty.
    fn bat_bytes(&self) -> u64 {
        (self.bat.len().max(1) as u64 * 8).next_multiple_of(MIB)
    }

    fn payload_start(&self) -> u64 {
        self.bat_start() + self.bat_bytes()
    }

    /// Stores the granule that begins at virtual `offset`.
    fn put_granule(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let block = offset / self.block_bytes;
        let (fixed, block_bytes, is_new) =
            (self.options.fixed, self.block_bytes, self.current != Some(block));
        // The block before is filled up first, so that this one begins on a boundary.
        let next = self.current_end.max(self.at);
        let Some(entry) = self.slot(block) else {
            let context = format!("data at offset {offset} is beyond the end of the disk");
            return Err(Error::new(ErrorKind::Target, context));
        };
        if is_new && !fixed {
            *entry = next | state::FULLY_PRESENT;
        }
        self.current_end = (*entry & state::OFFSET_MASK) + block_bytes;
        self.current = Some(block);
        let place = self.current_end - self.block_bytes + offset % self.block_bytes;
        self.append_zeros(place - self.at)?;
        self.identity.update(offset.to_le_bytes());
        self.identity.update(crc32c::crc32c(bytes).to_le_bytes());
        self.sink.append(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn append_zeros(&mut self, len: u64) -> Result<()> {
        self.sink.append_zeros(len)?;
        self.at += len;
        Ok(())
    }

    fn complete(mut self) -> Result<Finished> {
        let last = match self.bat.last() {
            Some(entry) if self.options.fixed => (entry & state::OFFSET_MASK) + self.block_bytes,
            _ => self.current_end,
        };
        let end = last.max(self.at);
        self.append_zeros(end - self.at)?;
        let seed = std::mem::take(&mut self.identity).finalize();
        let name = |what: &[u8]| derive(&seed, what);
        let metadata = self.metadata(name(b"virtual disk"));
        self.sink.rewrite(&metadata, self.metadata_start())?;
        let mut place = self.bat_start();
        for piece in self.bat.chunks(BAT_PIECE_ENTRIES) {
            let bytes: Vec<u8> = piece.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            self.sink.rewrite(&bytes, place)?;
            place += bytes.len() as u64;
        }
        let header = self.header_section(name(b"file write"), name(b"data write"));
        self.sink.rewrite(&header, 0)?;
        Ok(Finished { file_bytes: self.at, virtual_size: self.virtual_size })
    }

    /// The table of the metadata region, and the items.
    fn metadata(&self, disk_id: Guid) -> Vec<u8> {
        let flags = if self.options.fixed { LEAVE_BLOCKS_ALLOCATED } else { 0 };
        let parameters = u64::from(flags) << 32 | self.block_bytes;
        let items: [(Guid, &[u8], u32); 5] = [
            (FILE_PARAMETERS, &parameters.to_le_bytes(), OF_FILE),
            (VIRTUAL_DISK_SIZE, &self.virtual_size.to_le_bytes(), OF_DISK),
            (VIRTUAL_DISK_ID, &disk_id, OF_DISK),
            (LOGICAL_SECTOR_SIZE, &LOGICAL_SECTOR_BYTES.to_le_bytes(), OF_DISK),
            (PHYSICAL_SECTOR_SIZE, &PHYSICAL_SECTOR_BYTES.to_le_bytes(), OF_DISK),
        ];
        let mut table = b"metadata\0\0".to_vec();
        table.extend((items.len() as u16).to_le_bytes());
        table.resize(32, 0);
        let mut values: Vec<u8> = Vec::new();
        for (id, value, flags) in items {
            table.extend(id);
            table.extend(((METADATA_TABLE_BYTES + values.len()) as u32).to_le_bytes());
            table.extend((value.len() as u32).to_le_bytes());
            table.extend(flags.to_le_bytes());
            table.extend([0; 4]);
            values.extend(value);
        }
        table.resize(METADATA_TABLE_BYTES, 0);
        table.extend(values);
        table
    }

    /// The file type identifier, both headers and both region tables.
    fn header_section(&self, file_write: Guid, data_write: Guid) -> Vec<u8> {
        let mut bytes = vec![0; section::END as usize];
        let mut place = |offset: u64, part: &[u8]| {
            let at = offset as usize;
            bytes[at..at + part.len()].copy_from_slice(part);
        };
        let creator: Vec<u8> = CREATOR.encode_utf16().flat_map(u16::to_le_bytes).collect();
        place(0, FILE_SIGNATURE);
        place(FILE_SIGNATURE.len() as u64, &creator);

        for (sequence, offset) in (1u64..).zip(section::HEADERS) {
            let mut header = b"head\0\0\0\0".to_vec();
            header.extend(sequence.to_le_bytes());
            header.extend(file_write);
            header.extend(data_write);
            header.extend([0; 16]); // the log is empty
            header.extend(0u16.to_le_bytes()); // version of the log
            header.extend(1u16.to_le_bytes()); // version of the format
            header.extend(self.options.log_bytes.to_le_bytes());
            header.extend(section::BYTES.to_le_bytes());
            header.resize(section::HEADER_BYTES, 0);
            place(offset, &sealed(header));
        }

        let mut table = b"regi\0\0\0\0".to_vec();
        table.extend(2u64.to_le_bytes()); // two entries
        for (id, start, len) in
            [(BAT_REGION, self.bat_start(), self.bat_bytes()), (METADATA_REGION, self.metadata_start(), MIB)]
        {
            table.extend(id);
            table.extend(start.to_le_bytes());
            table.extend((len as u32).to_le_bytes());
            table.extend(1u32.to_le_bytes()); // required
        }
        table.resize(section::REGION_TABLE_BYTES, 0);
        let table = sealed(table);
        for offset in section::REGION_TABLES {
            place(offset, &table);
        }
        bytes
    }
}

impl Writer for VhdxWriter<'_> {
    fn block_bytes(&self) -> usize {
        GRANULE_BYTES as usize
    }

    fn compression(&self) -> io::Compression {
        io::Compression::None
    }

    fn put(&mut self, index: u64, block: Block<'_>) -> Result<()> {
        match block {
            Block::Plain(bytes) => self.put_granule(index * GRANULE_BYTES, bytes),
            Block::Packed(_) => {
                Err(Error::new(ErrorKind::Unsupported, "a VHDX file holds no compressed blocks"))
            }
        }
    }

    fn finish(self: Box<Self>, virtual_size: u64) -> Result<Finished> {
        if virtual_size != self.virtual_size {
            return Err(Error::new(
                ErrorKind::Target,
                format!("a VHDX file for {} bytes cannot take {virtual_size}", self.virtual_size),
            ));
        }
        self.complete()
    }
}

/// Puts its checksum into a structure.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let sum = checksum(&bytes).to_le_bytes();
    bytes[4..8].copy_from_slice(&sum);
    bytes
}

/// Makes an identifier of `seed` that is the same for the same seed: a UUID of version 8.
fn derive(seed: &[u8], what: &[u8]) -> Guid {
    let hash = Sha256::new().chain_update(seed).chain_update(what).finalize();
    let mut guid: Guid = [0; 16];
    guid.copy_from_slice(&hash[..16]);
    // Of a little-endian field: its high half is the second byte.
    guid[7] = guid[7] & 0x0f | 0x80;
    guid[8] = guid[8] & 0x3f | 0x80;
    guid
}
