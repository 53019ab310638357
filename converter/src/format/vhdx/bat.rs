//! The block allocation table: where each payload block is. Read in pages, of which a bounded number is kept.

use std::sync::{Arc, Mutex, MutexGuard};

use super::header::Regions;
use super::metadata::Metadata;
use super::{MIB, bat_entries, chunk_ratio, corrupt, state};
use crate::format::cache::Cache;
use crate::io::ReadAt;
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

/// Entries in a page: 64 KiB of table, which map 8 GiB of disk or more.
const PAGE_ENTRIES: u64 = 8192;

/// Most bytes of pages kept.
const CACHE_BYTES_MAX: u64 = 16 << 20;

/// Fewest pages kept, whatever the limit: one per worker that walks the disk in order, and a neighbour.
const PAGES_MIN: u64 = 8;

/// Where a payload block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Hole,
    Zero,
    /// From this byte of the file on.
    Stored(u64),
}

/// Entries of the table.
type Page = Arc<[u64]>;

pub(super) struct Bat {
    regions: Regions,
    block_bytes: u64,
    virtual_size: u64,
    chunk_ratio: u64,
    entries: u64,
    pages: Mutex<Cache<Page>>,
}

impl Bat {
    /// Reads the table once and holds every entry against the file and the others.
    pub(super) fn load(
        source: &dyn ReadAt,
        regions: Regions,
        metadata: &Metadata,
        limits: &Limits,
    ) -> Result<Self> {
        let blocks = metadata.virtual_size.div_ceil(metadata.block_bytes);
        let chunk_ratio = chunk_ratio(metadata.block_bytes, metadata.logical_sector_bytes);
        let entries = bat_entries(blocks, chunk_ratio);
        if entries > regions.bat.len / 8 {
            return Err(corrupt(format!(
                "the VHDX BAT has room for {} entries, the virtual disk of {} bytes needs {entries}",
                regions.bat.len / 8,
                metadata.virtual_size
            )));
        }
        let cache_bytes = limits.table_bytes_max.min(CACHE_BYTES_MAX);
        let pages_max = (cache_bytes / (PAGE_ENTRIES * 8)).max(PAGES_MIN) as usize;
        let bat = Self {
            regions,
            block_bytes: metadata.block_bytes,
            virtual_size: metadata.virtual_size,
            chunk_ratio,
            entries,
            pages: Mutex::new(Cache::new(pages_max)),
        };
        bat.check(source, limits)?;
        Ok(bat)
    }

    /// Blocks of the virtual disk.
    pub(super) fn blocks(&self) -> u64 {
        self.virtual_size.div_ceil(self.block_bytes)
    }

    /// Places of the blocks from `block` on, up to the end of a page of the table.
    pub(super) fn places<'a>(
        &'a self,
        source: &'a dyn ReadAt,
        block: u64,
    ) -> Result<impl Iterator<Item = Result<Place>> + 'a> {
        let page = self.entry_of(block) / PAGE_ENTRIES;
        let table = self.page(source, page)?;
        let blocks = (block..self.blocks()).take_while(move |b| self.entry_of(*b) / PAGE_ENTRIES == page);
        Ok(blocks.map(move |block| {
            let slot = (self.entry_of(block) % PAGE_ENTRIES) as usize;
            self.place(block, table.get(slot).copied().unwrap_or(0), source.len())
        }))
    }

    /// The entry of a block: one of a sector bitmap comes after each chunk.
    fn entry_of(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    /// Bytes of a block that belong to the disk: of the last one perhaps not all.
    fn bytes_of(&self, block: u64) -> u64 {
        self.virtual_size.saturating_sub(block.saturating_mul(self.block_bytes)).min(self.block_bytes)
    }

    fn place(&self, block: u64, entry: u64, file_bytes: u64) -> Result<Place> {
        let damaged = |why: String| corrupt(format!("VHDX block {block} is damaged: {why}"));
        match entry & state::MASK {
            state::ZERO => Ok(Place::Zero),
            state::NOT_PRESENT | state::UNDEFINED | state::UNMAPPED | state::UNMAPPED_V095 => Ok(Place::Hole),
            state::FULLY_PRESENT => {
                let host = entry & state::OFFSET_MASK;
                // qemu has written last blocks that are not whole.
                let bytes = self.bytes_of(block);
                if host.checked_add(bytes).is_none_or(|end| end > file_bytes) {
                    return Err(damaged(format!(
                        "its bytes at {host:#x} are beyond the end of the file of {file_bytes} bytes: the file is \
                         cut short or damaged"
                    )));
                }
                if self.regions.overlap(host, bytes) {
                    return Err(damaged(format!("its bytes at {host:#x} overlap the metadata of the file")));
                }
                Ok(Place::Stored(host))
            }
            state::PARTIALLY_PRESENT => {
                Err(damaged("it is partly in a parent, and the disk has none".to_owned()))
            }
            other => Err(damaged(format!("its state {other} is not known"))),
        }
    }

    /// Every entry must be right, and no two blocks may share a place: a small file could claim an endless disk.
    fn check(&self, source: &dyn ReadAt, limits: &Limits) -> Result<()> {
        let slots = source.len().div_ceil(MIB);
        let bitmap_bytes = slots.div_ceil(8);
        if bitmap_bytes > limits.table_bytes_max {
            return Err(Error::new(
                ErrorKind::Limit,
                format!(
                    "the VHDX file of {} bytes is too large: keeping account of it takes {bitmap_bytes} bytes",
                    source.len()
                ),
            ));
        }
        let mut used = vec![0u8; bitmap_bytes as usize];
        let mut block = 0;
        while block < self.blocks() {
            for place in self.places(source, block)? {
                if let Place::Stored(host) = place? {
                    for slot in host / MIB..(host + self.bytes_of(block)).div_ceil(MIB) {
                        let (byte, bit) = ((slot / 8) as usize, 1 << (slot % 8));
                        let Some(byte) = used.get_mut(byte).filter(|byte| **byte & bit == 0) else {
                            return Err(corrupt(format!(
                                "VHDX block {block} is damaged: its bytes at {host:#x} belong to another block too"
                            )));
                        };
                        *byte |= bit;
                    }
                }
                block += 1;
            }
        }
        Ok(())
    }

    /// A page of the table, from the cache or the file.
    fn page(&self, source: &dyn ReadAt, index: u64) -> Result<Page> {
        if let Some(page) = self.lock().get(index) {
            return Ok(page);
        }
        // Read without the lock: another worker may read the same page meanwhile, which only costs the read.
        let first = index * PAGE_ENTRIES;
        let entries = self.entries.saturating_sub(first).min(PAGE_ENTRIES);
        let mut bytes = vec![0; entries as usize * 8];
        let offset = self.regions.bat.start + first * 8;
        source
            .read_exact_at(&mut bytes, offset)
            .map_err(|e| Error::io(format!("reading the VHDX BAT at offset {offset}"), e))?;
        let (words, _) = bytes.as_chunks::<8>();
        let page: Page = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        self.lock().put(index, Arc::clone(&page));
        Ok(page)
    }

    fn lock(&self) -> MutexGuard<'_, Cache<Page>> {
        self.pages.lock().unwrap_or_else(|e| e.into_inner())
    }
}
