//! The grain directory and a bounded cache of grain tables, shared by all workers.

use std::sync::{Arc, Mutex, MutexGuard};

use super::header::Header;
use super::{HEADER_BYTES, corrupt, limit};
use crate::format::SECTOR_BYTES;
use crate::format::cache::Cache;
use crate::io::ReadAt;
use crate::limits::Limits;
use crate::{Error, Result};

/// Most bytes of grain tables kept; 16 MiB map 256 GiB of disk at the usual grain size.
const CACHE_BYTES_MAX: u64 = 16 << 20;

/// Fewest grain tables kept, whatever the limit: one per worker that walks the disk in order, and those read ahead.
const TABLES_MIN: u64 = 64;

/// Memory of a cached table beyond its entries, about.
const TABLE_OVERHEAD_BYTES: u64 = 64;

/// Adjacent grain tables are read together, up to this many bytes.
const READ_AHEAD_BYTES: u64 = 64 << 10;

/// One grain table: the first sector of each grain.
pub(super) type Table = Arc<[u32]>;

pub(super) struct Tables {
    /// First sector of each grain table; 0 if there is none.
    gd: Vec<u32>,
    gd_offset: u64,
    gt_bytes: u64,
    cache: Mutex<Cache<Table>>,
}

impl Tables {
    /// Reads and validates the grain directory at `gd_offset`.
    pub(super) fn load(
        source: &dyn ReadAt,
        header: &Header,
        gd_offset: u64,
        limits: &Limits,
    ) -> Result<Self> {
        let entries = header.virtual_size.div_ceil(header.gt_reach());
        // The virtual size is bounded: no overflow.
        let gd_bytes = entries * 4;
        // It is held twice while it is read, and when it has to be sorted to be checked.
        if gd_bytes > limits.table_bytes_max / 2 {
            return Err(limit(format!("the VMDK grain directory of {gd_bytes} bytes is too large")));
        }
        if gd_offset < HEADER_BYTES as u64 {
            return Err(corrupt("the VMDK grain directory is said to be where the header is"));
        }
        if gd_offset.checked_add(gd_bytes).is_none_or(|end| end > source.len()) {
            return Err(corrupt(format!(
                "the VMDK grain directory of {gd_bytes} bytes at {gd_offset} ends beyond the end of the file: it is \
                 cut short or damaged"
            )));
        }
        let mut bytes = vec![0; gd_bytes as usize];
        source
            .read_exact_at(&mut bytes, gd_offset)
            .map_err(|e| Error::io(format!("reading the VMDK grain directory at offset {gd_offset}"), e))?;
        let gd: Vec<u32> = words(&bytes).collect();
        drop(bytes);
        check_directory(&gd, gd_offset, header, source.len())?;

        // A stream begins again for a table it has passed: then as many as memory holds are read first.
        let room = limits.table_bytes_max - gd_bytes;
        let cache_bytes = if source.is_forward_only() { room } else { room.min(CACHE_BYTES_MAX) };
        let tables_max = (cache_bytes / (header.gt_bytes() + TABLE_OVERHEAD_BYTES)).max(TABLES_MIN) as usize;
        let cache = Mutex::new(Cache::new(tables_max));
        let tables = Self { gd, gd_offset, gt_bytes: header.gt_bytes(), cache };
        if source.is_forward_only() {
            tables.preload(source, tables_max)?;
        }
        Ok(tables)
    }

    /// Reads as many grain tables as the cache holds, in the order of the file.
    fn preload(&self, source: &dyn ReadAt, tables_max: usize) -> Result<()> {
        let tables = self.gd.iter().zip(0u64..).filter(|(sector, _)| **sector != 0);
        let mut tables: Vec<(u32, u64)> =
            tables.map(|(&sector, index)| (sector, index)).take(tables_max).collect();
        tables.sort_unstable();
        for (_, index) in tables {
            self.gt(source, index)?;
        }
        Ok(())
    }

    /// Bytes of the grain directory, from the first to the one after the last.
    pub(super) fn gd_range(&self) -> (u64, u64) {
        (self.gd_offset, self.gd_offset + self.gd.len() as u64 * 4)
    }

    /// Where grain table number `index` is; zero if there is none, so that nothing under it is stored.
    pub(super) fn gt_offset(&self, index: u64) -> u64 {
        let sector = usize::try_from(index).ok().and_then(|at| self.gd.get(at)).copied().unwrap_or(0);
        u64::from(sector) * SECTOR_BYTES
    }

    /// Grain table number `index`, from the cache or the file; `None` if there is none.
    pub(super) fn gt(&self, source: &dyn ReadAt, index: u64) -> Result<Option<Table>> {
        let offset = self.gt_offset(index);
        if offset == 0 {
            return Ok(None);
        }
        if let Some(table) = self.lock().get(index) {
            return Ok(Some(table));
        }
        // Read without the lock: another worker may read the same table meanwhile, which only costs the read.
        let mut tables = 1;
        while self.gt_offset(index + tables) == offset + tables * self.gt_bytes
            && (tables + 1) * self.gt_bytes <= READ_AHEAD_BYTES
        {
            tables += 1;
        }
        let mut bytes = vec![0; (tables * self.gt_bytes) as usize];
        source
            .read_exact_at(&mut bytes, offset)
            .map_err(|e| Error::io(format!("reading the VMDK grain table at offset {offset}"), e))?;
        let mut cache = self.lock();
        let mut wanted = None;
        // Backwards, so that the wanted one is the youngest.
        for (i, table) in bytes.chunks_exact(self.gt_bytes as usize).enumerate().rev() {
            let table: Table = words(table).collect();
            wanted = Some(table.clone());
            cache.put(index + i as u64, table);
        }
        Ok(wanted)
    }

    fn lock(&self) -> MutexGuard<'_, Cache<Table>> {
        self.cache.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Every grain table must lie in the file, beside the directory and all others: shared ones would let a small file
/// claim an endless disk.
fn check_directory(gd: &[u32], gd_offset: u64, header: &Header, file_bytes: u64) -> Result<()> {
    let gd_end = gd_offset + gd.len() as u64 * 4;
    let gt_bytes = header.gt_bytes();
    for (i, &sector) in gd.iter().enumerate().filter(|(_, sector)| **sector != 0) {
        let offset = u64::from(sector) * SECTOR_BYTES;
        let end = offset + gt_bytes;
        if end > file_bytes {
            return Err(corrupt(format!(
                "VMDK grain directory entry {i} points to sector {sector}, beyond the end of the file of \
                 {file_bytes} bytes: the file is cut short or damaged"
            )));
        }
        if offset < gd_end && end > gd_offset {
            return Err(corrupt(format!(
                "VMDK grain directory entry {i} points to sector {sector}, into the directory itself"
            )));
        }
    }
    let beside = |a: &u32, b: &u32| u64::from(*a) * SECTOR_BYTES + gt_bytes <= u64::from(*b) * SECTOR_BYTES;
    let sectors = || gd.iter().copied().filter(|&sector| sector != 0);
    // Most writers lay tables out in order; only the others cost a second copy of the directory.
    if sectors().is_sorted_by(beside) {
        return Ok(());
    }
    let mut sorted: Vec<u32> = sectors().collect();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| !beside(&pair[0], &pair[1])) {
        Some(pair) => {
            let text =
                format!("VMDK grain tables overlap or are shared: sectors {} and {}", pair[0], pair[1]);
            Err(corrupt(text))
        }
        None => Ok(()),
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    let (words, _) = bytes.as_chunks::<4>();
    words.iter().map(|w| u32::from_le_bytes(*w))
}
