//! The L1 table and a bounded cache of L2 tables, shared by all workers.

use std::sync::{Arc, Mutex};

use super::{Header, OFFSET_MASK};
use crate::format::cache::Cache;
use crate::io::ReadAt;
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

/// Fewest L2 tables kept, whatever the limit: one per worker that walks the disk in order, and a neighbour.
const TABLES_MIN: u64 = 8;

/// Most bytes of L2 tables kept; 16 MiB map 128 GiB of disk at the usual cluster size.
const CACHE_BYTES_MAX: u64 = 16 << 20;

/// Adjacent L2 tables of small clusters are read together, up to this many bytes.
const READ_AHEAD_BYTES: u64 = 64 << 10;

/// One L2 table: its entries (two words each when extended).
pub(super) type Table = Arc<[u64]>;

pub(super) struct Tables {
    l1: Vec<u64>,
    cluster_size: u64,
    cache: Mutex<Cache<Table>>,
}

impl Tables {
    /// Reads and validates the L1 table.
    pub(super) fn load(source: &dyn ReadAt, header: &Header, limits: &Limits) -> Result<Self> {
        let cluster_size = header.cluster_size();
        // The header bounds the count at 4 Mi.
        let mut bytes = vec![0; header.l1_entries as usize * 8];
        source.read_exact_at(&mut bytes, header.l1_offset).map_err(|e| {
            Error::io(format!("reading the qcow2 L1 table at offset {}", header.l1_offset), e)
        })?;
        let l1: Vec<u64> = words(&bytes).map(|entry| entry & OFFSET_MASK).collect();
        drop(bytes);
        check_l1(&l1, header, source.len())?;
        let l1_bytes = l1.len() as u64 * 8;
        let cache_bytes = limits.table_bytes_max.saturating_sub(l1_bytes).min(CACHE_BYTES_MAX);
        let tables_max = (cache_bytes / cluster_size).max(TABLES_MIN) as usize;
        let tables = Self { l1, cluster_size, cache: Mutex::new(Cache::new(tables_max)) };
        // Tables behind what they map, as in files written in one pass: read each when it is needed, and a stream
        // would begin again for every one.
        let behind = tables.l1.iter().any(|&offset| offset != 0 && offset < header.l1_offset);
        if source.is_forward_only() && behind {
            tables.preload(source, tables_max)?;
        }
        Ok(tables)
    }

    /// Reads as many L2 tables as the cache holds, in the order of the file.
    fn preload(&self, source: &dyn ReadAt, tables_max: usize) -> Result<()> {
        let tables = self.l1.iter().zip(0u64..).filter(|(offset, _)| **offset != 0);
        let mut tables: Vec<(u64, u64)> =
            tables.map(|(&offset, index)| (offset, index)).take(tables_max).collect();
        tables.sort_unstable();
        for (_, index) in tables {
            self.l2(source, index)?;
        }
        Ok(())
    }

    /// Number of L1 entries.
    pub(super) fn l1_len(&self) -> u64 {
        self.l1.len() as u64
    }

    /// Whether no cluster in the reach of an L1 entry is allocated.
    pub(super) fn is_hole(&self, l1_index: u64) -> bool {
        self.l1_entry(l1_index) == 0
    }

    /// Where the L2 table of an L1 entry is; zero if there is none.
    pub(super) fn l1_entry(&self, l1_index: u64) -> u64 {
        usize::try_from(l1_index).ok().and_then(|i| self.l1.get(i)).copied().unwrap_or(0)
    }

    /// The L2 table of an L1 entry, from the cache or the file; `None` if there is none.
    pub(super) fn l2(&self, source: &dyn ReadAt, l1_index: u64) -> Result<Option<Table>> {
        let offset = self.l1_entry(l1_index);
        if offset == 0 {
            return Ok(None);
        }
        if let Some(table) = self.lock().get(l1_index) {
            return Ok(Some(table));
        }
        // Read without the lock: another worker may read the same table meanwhile, which only costs the read.
        let mut tables = 1;
        while self.l1_entry(l1_index + tables) == offset + tables * self.cluster_size
            && (tables + 1) * self.cluster_size <= READ_AHEAD_BYTES
        {
            tables += 1;
        }
        let mut bytes = vec![0; (tables * self.cluster_size) as usize];
        source
            .read_exact_at(&mut bytes, offset)
            .map_err(|e| Error::io(format!("reading the qcow2 L2 table at offset {offset}"), e))?;
        let mut cache = self.lock();
        let mut wanted = None;
        // Backwards, so that the wanted one is the youngest.
        for (i, table) in bytes.chunks_exact(self.cluster_size as usize).enumerate().rev() {
            let table: Table = words(table).collect();
            wanted = Some(table.clone());
            cache.put(l1_index + i as u64, table);
        }
        Ok(wanted)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cache<Table>> {
        self.cache.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Every L2 table must lie in the file, beside the header and the L1 table, and belong to one L1 entry only:
/// a shared one would let a small file claim an endless disk.
fn check_l1(l1: &[u64], header: &Header, file_bytes: u64) -> Result<()> {
    let corrupt = |context: String| Err(Error::new(ErrorKind::Corrupt, context));
    let cluster_size = header.cluster_size();
    let l1_end = header.l1_offset + l1.len() as u64 * 8;
    for (i, &offset) in l1.iter().enumerate().filter(|(_, offset)| **offset != 0) {
        // The mask keeps offsets below 2^56: no overflow.
        let end = offset + cluster_size;
        if offset % cluster_size != 0 {
            return corrupt(format!("qcow2 L1 entry {i} is {offset:#x}, not at a cluster boundary"));
        }
        if end > file_bytes {
            return corrupt(format!(
                "qcow2 L1 entry {i} points to {offset:#x}, beyond the end of the file of {file_bytes} bytes: the \
                 file is cut short or damaged"
            ));
        }
        if offset < l1_end && end > header.l1_offset {
            return corrupt(format!("qcow2 L1 entry {i} points to {offset:#x}, into the L1 table itself"));
        }
    }
    let offsets = || l1.iter().copied().filter(|&offset| offset != 0);
    // Most writers lay tables out in order; only the others cost a second copy of the table.
    if offsets().is_sorted_by(|a, b| a < b) {
        return Ok(());
    }
    let mut sorted: Vec<u64> = offsets().collect();
    sorted.sort_unstable();
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return corrupt(format!("two qcow2 L1 entries share the L2 table at {:#x}", pair[0]));
    }
    Ok(())
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|w| u64::from_be_bytes(*w))
}
