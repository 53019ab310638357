//! Reference counts held against what the tables really use, as `qemu-img check` does it.
//!
//! ```text
//!           ┌─ window ─┐
//!  clusters ░░░░░░░░░░░░▒▒▒▒▒▒▒▒▒▒▒▒▒▒   stored counts of a window, and counts of what is used in it:
//!           stored  used                 every table is walked once per window
//! ```
//!
//! Tables are read here as they are, and not through [`super::tables`], which refuses a damaged file as a whole.

use super::{COMPRESSED, COPIED, CompressedAt, Header, OFFSET_MASK};
use crate::check::{Clusters, Report};
use crate::error::limit;
use crate::io::ReadAt;
use crate::limits::Limits;
use crate::progress::Progress;
use crate::{Error, Result};

/// Most windows; with clusters of 64 KiB and the usual limits each has 384 GiB of file.
const WINDOWS_MAX: u64 = 1024;

/// Most bytes of tables read in all, so that tables that are named again and again come to an end. A disk of 4 TiB in
/// clusters of 64 KiB takes 6 GiB in the usual windows.
const TABLE_BYTES_MAX: u64 = 8 << 30;

/// Bytes of a table read at a time.
const CHUNK_BYTES: u64 = 64 << 10;

/// Bounds that qemu has too.
const SNAPSHOTS_MAX: u32 = 65_536;
const SNAPSHOT_L1_BYTES_MAX: u64 = super::L1_BYTES_MAX;
const BITMAP_DIRECTORY_BYTES_MAX: u64 = 64 << 20;

/// Bytes of the entries of two tables before their names.
const SNAPSHOT_BYTES_MIN: u64 = 40;
const BITMAP_BYTES_MIN: u64 = 24;

/// Bits of entries that have to be zero.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const REFCOUNT_RESERVED: u64 = 0x1ff;
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;

/// Checks all tables of the image in `source`.
pub(super) fn check(
    source: &dyn ReadAt,
    header: &Header,
    limits: &Limits,
    report: &mut Report,
    progress: &Progress,
) -> Result<()> {
    let cluster_size = header.cluster_size();
    let table_bytes = u64::from(header.refcount_table_clusters) * cluster_size;
    if table_bytes > limits.table_bytes_max {
        return Err(limit(format!("the qcow2 refcount table of {table_bytes} bytes is too large")));
    }
    // Half of the memory is left to the refcount table; each cluster has two counts of two bytes.
    let window = (limits.table_bytes_max / 2 / 4).max(1);
    let clusters = source.len().div_ceil(cluster_size);
    // What lies across the end of the file may touch one more.
    let windows = (clusters + 1).div_ceil(window);
    if windows > WINDOWS_MAX {
        let bytes = source.len();
        return Err(limit(format!("a file of {bytes} bytes in clusters of {cluster_size} is too large")));
    }
    let mut check = Check {
        source,
        header,
        progress,
        report,
        refcount_table: Vec::new(),
        table_bytes: 0,
        first: true,
        start: 0,
        used: Vec::new(),
        stored: Vec::new(),
        clusters: Clusters { total: header.virtual_size.div_ceil(cluster_size), ..Clusters::default() },
        last_in_use: None,
    };
    check.refcount_table = check.read_table(header.refcount_table_offset, table_bytes)?;
    for number in 0..windows {
        let len = (clusters + 1 - number * window).min(window) as usize;
        check.first = number == 0;
        check.start = number * window;
        check.used.clear();
        check.used.resize(len, 0);
        check.load_stored(len)?;
        check.walk()?;
        check.compare(clusters);
    }
    let (clusters, last) = (check.clusters, check.last_in_use);
    report.clusters = Some(clusters);
    report.image_end = Some(last.map_or(0, |cluster| cluster + 1).saturating_mul(cluster_size));
    Ok(())
}

struct Check<'a> {
    source: &'a dyn ReadAt,
    header: &'a Header,
    progress: &'a Progress,
    report: &'a mut Report,
    refcount_table: Vec<u64>,
    /// Bytes of tables read so far.
    table_bytes: u64,
    /// Whether this is the first window: what does not belong to one is told there.
    first: bool,
    /// First cluster of the window.
    start: u64,
    /// How often each cluster of the window is used, and how often it says that it is; larger counts are cut.
    used: Vec<u16>,
    stored: Vec<u16>,
    clusters: Clusters,
    last_in_use: Option<u64>,
}

impl Check<'_> {
    /// Counts what is used of the window by all that may use clusters.
    fn walk(&mut self) -> Result<()> {
        let header = self.header;
        self.mark(0, header.cluster_size(), "header");
        self.walk_l1(header.l1_offset, header.l1_stored_entries, true)?;
        self.walk_snapshots()?;
        if let Some((offset, bytes)) = header.bitmap_directory {
            self.walk_bitmaps(offset, bytes)?;
        }
        self.mark(header.refcount_table_offset, self.refcount_table.len() as u64 * 8, "refcount table");
        self.walk_refcount_blocks();
        Ok(())
    }

    fn walk_l1(&mut self, offset: u64, entries: u64, active: bool) -> Result<()> {
        let bytes = entries * 8;
        self.mark(offset, bytes, "L1 table");
        let cluster_size = self.header.cluster_size();
        // More cannot be there, unless one is named twice.
        let mut tables_left = self.source.len().div_ceil(cluster_size);
        let mut at = 0;
        while at < bytes {
            let n = (bytes - at).min(CHUNK_BYTES);
            for (entry, i) in self.read_table(offset.saturating_add(at), n)?.into_iter().zip(at / 8..) {
                if entry == 0 {
                    continue;
                }
                let l2_offset = entry & OFFSET_MASK;
                if entry & L1_RESERVED != 0 {
                    self.corruption(|| format!("L1 entry {i} is {entry:#x}, with bits that have no meaning"));
                }
                if l2_offset == 0 {
                    self.corruption(|| format!("L1 entry {i} is {entry:#x}, without a table"));
                    continue;
                }
                self.mark(l2_offset, cluster_size, "L2 table");
                if !l2_offset.is_multiple_of(cluster_size) {
                    self.corruption(|| format!("L1 entry {i} is {entry:#x}, not at a cluster boundary"));
                    continue;
                }
                if active {
                    self.check_copied(entry, l2_offset, "L2 table");
                }
                if l2_offset < self.source.len() {
                    if tables_left == 0 {
                        self.corruption(|| {
                            format!("the L1 table at {offset:#x} names the same tables again")
                        });
                        return Ok(());
                    }
                    tables_left -= 1;
                    self.walk_l2(l2_offset, active)?;
                }
            }
            at += n;
        }
        Ok(())
    }

    fn walk_l2(&mut self, offset: u64, active: bool) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        let words = if self.header.extended_l2 { 2 } else { 1 };
        let table = self.read_table(offset, cluster_size)?;
        let mut next = None;
        for (i, entry) in table.chunks_exact(words).enumerate() {
            let (entry, bitmap) = (entry[0], entry.get(1).copied().unwrap_or(0));
            if entry == 0 && bitmap == 0 {
                continue;
            }
            let place = || format!("entry {i} ({entry:#x}) of the L2 table at {offset:#x}");
            if entry & COMPRESSED != 0 {
                if entry & COPIED != 0 {
                    self.corruption(|| format!("{} is compressed and has the copied flag", place()));
                }
                if bitmap != 0 {
                    self.corruption(|| format!("{} is compressed and has a subcluster bitmap", place()));
                }
                let at = CompressedAt::decode(entry & !COPIED, self.header.cluster_bits);
                self.mark(at.host, at.len, "compressed cluster");
                self.count(active, |clusters| {
                    clusters.allocated += 1;
                    clusters.compressed += 1;
                    clusters.fragmented += 1;
                });
                continue;
            }
            if entry & L2_RESERVED != 0 {
                self.corruption(|| format!("{} has bits set that have no meaning", place()));
            }
            let host = entry & OFFSET_MASK;
            let allocated_bits = bitmap & u64::from(u32::MAX);
            if host == 0 {
                if allocated_bits != 0 {
                    self.corruption(|| format!("{} has allocated subclusters and no cluster", place()));
                }
                continue;
            }
            if bitmap >> 32 & allocated_bits != 0 {
                self.corruption(|| format!("{} has a contradictory bitmap {bitmap:#x}", place()));
                continue;
            }
            if !host.is_multiple_of(cluster_size) {
                self.corruption(|| format!("{} is not at a cluster boundary", place()));
            }
            self.count(active, |clusters| {
                clusters.allocated += 1;
                clusters.fragmented += u64::from(next.is_some_and(|next| next != host));
            });
            next = Some(host + cluster_size);
            self.mark(host, cluster_size, "cluster");
            if active {
                self.check_copied(entry, host, "cluster");
            }
        }
        Ok(())
    }

    /// Walks the tables of the internal snapshots, and the table that lists them.
    fn walk_snapshots(&mut self) -> Result<()> {
        let table = self.header.snapshots_offset;
        let snapshots = self.header.snapshots.min(SNAPSHOTS_MAX);
        if snapshots < self.header.snapshots {
            self.corruption(|| format!("more than {SNAPSHOTS_MAX} snapshots"));
        }
        let mut at = table;
        for i in 0..snapshots {
            // Aligned, however the one before ended.
            at = at.checked_next_multiple_of(8).unwrap_or(u64::MAX);
            let Some(entry) = self.read_entry(at, SNAPSHOT_BYTES_MIN)? else {
                self.corruption(|| format!("the table of snapshots ends before snapshot {i}"));
                return Ok(());
            };
            let (l1_offset, l1_entries) = (be(&entry, 0, 8), be(&entry, 8, 4));
            let names = be(&entry, 12, 2) + be(&entry, 14, 2) + be(&entry, 36, 4);
            at = at.saturating_add(SNAPSHOT_BYTES_MIN + names);
            if !l1_offset.is_multiple_of(self.header.cluster_size()) || l1_entries * 8 > SNAPSHOT_L1_BYTES_MAX
            {
                self.corruption(|| {
                    format!("snapshot {i} has an L1 table of {l1_entries} entries at {l1_offset:#x}")
                });
                continue;
            }
            self.walk_l1(l1_offset, l1_entries, false)?;
        }
        self.mark(table, at.saturating_sub(table), "table of snapshots");
        Ok(())
    }

    /// Walks the tables of the persistent bitmaps, and the directory that lists them.
    fn walk_bitmaps(&mut self, directory: u64, bytes: u64) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        if bytes > BITMAP_DIRECTORY_BYTES_MAX || !directory.is_multiple_of(cluster_size) {
            self.corruption(|| format!("the directory of bitmaps has {bytes} bytes at {directory:#x}"));
            return Ok(());
        }
        self.mark(directory, bytes, "directory of bitmaps");
        let end = directory.saturating_add(bytes);
        let mut at = directory;
        while at < end {
            let Some(entry) = self.read_entry(at, BITMAP_BYTES_MIN)? else { return Ok(()) };
            let (table, entries) = (be(&entry, 0, 8), be(&entry, 8, 4));
            let names = be(&entry, 18, 2) + be(&entry, 20, 4);
            at = at.saturating_add((BITMAP_BYTES_MIN + names).next_multiple_of(8));
            self.mark(table, entries * 8, "bitmap table");
            let mut done = 0;
            while done < entries * 8 {
                let n = (entries * 8 - done).min(CHUNK_BYTES);
                for entry in self.read_table(table.saturating_add(done), n)? {
                    let host = entry & OFFSET_MASK;
                    if entry & BITMAP_RESERVED != 0 || !host.is_multiple_of(cluster_size) {
                        self.corruption(|| {
                            format!("the bitmap table at {table:#x} has the entry {entry:#x}")
                        });
                    } else if host != 0 {
                        self.mark(host, cluster_size, "bitmap cluster");
                    }
                }
                done += n;
            }
        }
        Ok(())
    }

    fn walk_refcount_blocks(&mut self) {
        let cluster_size = self.header.cluster_size();
        for i in 0..self.refcount_table.len() {
            let entry = self.refcount_table[i];
            let cluster = entry / cluster_size;
            if entry & REFCOUNT_RESERVED != 0 || !entry.is_multiple_of(cluster_size) {
                self.corruption(|| format!("refcount block {i} is at {entry:#x}, not at a cluster boundary"));
            } else if entry >= self.source.len() {
                self.corruption(|| {
                    format!("refcount block {i} is at {entry:#x}, beyond the end of the file")
                });
            } else if entry != 0 {
                self.mark(entry, cluster_size, "refcount block");
                let used = self.index(cluster).map_or(1, |index| self.used[index]);
                if used != 1 {
                    self.report.corruption(format!("refcount block {i} at {entry:#x} is used {used} times"));
                }
            }
        }
    }

    /// Loads the stored counts of the window.
    fn load_stored(&mut self, len: usize) -> Result<()> {
        self.stored.clear();
        self.stored.resize(len, 0);
        let (per_block, bits) = (self.counts_per_block(), self.header.refcount_bits);
        let end = self.start + len as u64;
        let mut at = self.start;
        while at < end {
            let block_end = ((at / per_block + 1) * per_block).min(end);
            let offset = self.refcount_block(at).filter(|&offset| offset != 0);
            if let Some(offset) = offset.filter(|&offset| offset < self.source.len()) {
                let block = self.read(offset, self.header.cluster_size())?;
                for cluster in at..block_end {
                    self.stored[(cluster - self.start) as usize] = count(&block, cluster % per_block, bits);
                }
            }
            at = block_end;
        }
        Ok(())
    }

    /// Holds the counts of the window against each other. `clusters` are those that the file has.
    fn compare(&mut self, clusters: u64) {
        for index in 0..self.used.len() {
            let (used, stored) = (self.used[index], self.stored[index]);
            let cluster = self.start + index as u64;
            if cluster >= clusters && used == 0 {
                continue;
            }
            if used > 0 || stored > 0 {
                self.last_in_use = Some(cluster);
            }
            // A block that is not where it should be has been told already.
            if used == stored || self.refcount_block(cluster).is_none() {
                continue;
            }
            let text = format!("cluster {cluster} has reference count {stored}, and {used} references");
            match stored < used {
                true => self.report.corruption(text),
                false => self.report.leak(text),
            }
        }
    }

    /// Where the stored count of a cluster is: zero if there is no block for it, `None` if its entry is damaged.
    fn refcount_block(&self, cluster: u64) -> Option<u64> {
        let index = usize::try_from(cluster / self.counts_per_block()).ok();
        let entry = index.and_then(|index| self.refcount_table.get(index)).copied().unwrap_or(0);
        entry.is_multiple_of(self.header.cluster_size()).then_some(entry)
    }

    fn counts_per_block(&self) -> u64 {
        self.header.cluster_size() * 8 / u64::from(self.header.refcount_bits)
    }

    /// Counts one use of each cluster that has some of `len` bytes at `offset`.
    fn mark(&mut self, offset: u64, len: u64, what: &str) {
        let file_bytes = self.source.len();
        let (bits, cluster_size) = (self.header.cluster_bits, self.header.cluster_size());
        if len == 0 {
            return;
        }
        // Of the last cluster of a file only a part may be there.
        let end = offset.saturating_add(len);
        if end.saturating_sub(file_bytes) >= cluster_size {
            self.corruption(|| {
                format!("a {what} ends at {end:#x}, beyond the end of the file of {file_bytes} bytes")
            });
            return;
        }
        let from = (offset >> bits).max(self.start);
        let to = ((end - 1) >> bits).saturating_add(1).min(self.start + self.used.len() as u64);
        let max = 1u64.checked_shl(self.header.refcount_bits).map_or(u64::MAX, |max| max - 1);
        for cluster in from..to {
            let used = &mut self.used[(cluster - self.start) as usize];
            if u64::from(*used) == max {
                self.report
                    .corruption(format!("cluster {cluster} has more references than its count can tell"));
            } else {
                *used = used.saturating_add(1);
            }
        }
    }

    /// The copied flag says that the stored count is one.
    fn check_copied(&mut self, entry: u64, host: u64, what: &str) {
        let Some(index) = self.index(host >> self.header.cluster_bits) else { return };
        let stored = self.stored[index];
        if (stored == 1) != (entry & COPIED != 0) {
            self.report.corruption(format!(
                "the {what} at {host:#x} has reference count {stored}, which its entry {entry:#x} contradicts"
            ));
        }
    }

    /// The place of a cluster in the window, if it is there.
    fn index(&self, cluster: u64) -> Option<usize> {
        let index = usize::try_from(cluster.checked_sub(self.start)?).ok()?;
        (index < self.used.len()).then_some(index)
    }

    fn count(&mut self, active: bool, count: impl FnOnce(&mut Clusters)) {
        if active && self.first {
            count(&mut self.clusters);
        }
    }

    /// Notes what belongs to no window, once.
    fn corruption(&mut self, message: impl FnOnce() -> String) {
        if self.first {
            self.report.corruption(message());
        }
    }

    /// Reads an entry of a table whose end may lie beyond that of the file; `None` if the entry does.
    fn read_entry(&mut self, offset: u64, len: u64) -> Result<Option<Vec<u8>>> {
        match offset.checked_add(len).is_some_and(|end| end <= self.source.len()) {
            true => self.read(offset, len).map(Some),
            false => Ok(None),
        }
    }

    fn read_table(&mut self, offset: u64, len: u64) -> Result<Vec<u64>> {
        let bytes = self.read(offset, len)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect())
    }

    /// Reads at most 8 MiB of tables; behind the end of the file are zeros.
    fn read(&mut self, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.progress.check()?;
        self.table_bytes = self.table_bytes.saturating_add(len);
        if self.table_bytes > TABLE_BYTES_MAX {
            return Err(limit(format!(
                "the check of the qcow2 tables read more than {TABLE_BYTES_MAX} bytes of them: they are named again \
                 and again, or the disk needs a larger limit of table bytes to be checked in fewer passes"
            )));
        }
        let mut bytes = vec![0; len as usize];
        let there = self.source.len().saturating_sub(offset).min(len) as usize;
        if there > 0 {
            self.source
                .read_exact_at(&mut bytes[..there], offset)
                .map_err(|e| Error::io(format!("reading a qcow2 table at offset {offset}"), e))?;
        }
        Ok(bytes)
    }
}

/// Count number `i` of a refcount block, cut at what 16 bits hold.
fn count(block: &[u8], i: u64, bits: u32) -> u16 {
    let i = i as usize;
    let value = match bits {
        1 | 2 | 4 => {
            let per_byte = 8 / bits as usize;
            let byte = block.get(i / per_byte).copied().unwrap_or(0);
            u64::from(byte >> (i % per_byte * bits as usize)) & ((1 << bits) - 1)
        }
        _ => {
            let bytes = bits as usize / 8;
            be(block, i * bytes, bytes)
        }
    };
    u16::try_from(value).unwrap_or(u16::MAX)
}

/// A big-endian number of `len` bytes, up to 8.
fn be(bytes: &[u8], at: usize, len: usize) -> u64 {
    let bytes = bytes.get(at..at + len).unwrap_or_default();
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
