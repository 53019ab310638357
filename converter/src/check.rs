//! Whether an image file is whole: what a check finds, and the check that every format gets.
//!
//! A format that knows more than its extents tell (reference counts, checksums) checks them in its own way.

use std::sync::Mutex;

use crate::convert::{Options, Range, Ranges, Team, lock, run_team};
use crate::io::{Disk, Extent, ExtentKind};
use crate::limits::Limits;
use crate::progress::Progress;
use crate::{Error, ErrorKind, Result};

/// Findings kept in words; the others are only counted.
pub const MESSAGES_MAX: usize = 100;

/// Most memory that a check holds to know which parts of the file are in use, bytes; the file is gone through in
/// windows that fit into it.
const WINDOW_BYTES_MAX: u64 = 16 << 20;

/// Most windows; 64 GiB of file each.
const WINDOWS_MAX: u64 = 256;

/// The grain in which parts of the file are told from each other, bytes.
const GRAIN_BYTES: u64 = 512;

/// What is passed over behind damage, bytes, where a format has no unit of allocation.
const STEP_BYTES: u64 = 64 << 10;

/// Data read at a time, bytes.
const UNIT_BYTES: usize = 2 << 20;

/// What a check found; the counts have the meaning that `qemu-img check` gives them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Contradictions: a guest reads something wrong, or will after the next write.
    pub corruptions: u64,
    /// Parts of the file that are held and not used.
    pub leaks: u64,
    /// What could not be checked, because it could not be read.
    pub check_errors: u64,
    /// End of the last part of the file in use, bytes, where the format has no other meaning for what follows.
    pub image_end: Option<u64>,
    /// How the disk is allocated, for formats that have a unit of allocation.
    pub clusters: Option<Clusters>,
    /// The first [`MESSAGES_MAX`] findings in words.
    pub messages: Vec<String>,
}

/// How a disk is allocated, in units of its format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clusters {
    /// Clusters of the virtual disk.
    pub total: u64,
    /// Those that are stored.
    pub allocated: u64,
    /// Those stored elsewhere than behind the one before them; compressed ones count as such.
    pub fragmented: u64,
    /// Those that are stored compressed.
    pub compressed: u64,
}

impl Report {
    /// Notes a contradiction.
    pub(crate) fn corruption(&mut self, message: impl Into<String>) {
        self.corruptions = self.corruptions.saturating_add(1);
        self.tell(message);
    }

    /// Notes a part of the file that is held and not used.
    pub(crate) fn leak(&mut self, message: impl Into<String>) {
        self.leaks = self.leaks.saturating_add(1);
        self.tell(message);
    }

    /// Notes the failure of one step of the check, by its kind; fails with those that end all of it.
    pub(crate) fn failure(&mut self, error: Error) -> Result<()> {
        match error.kind() {
            ErrorKind::Corrupt => self.corruption(error.to_string()),
            ErrorKind::Io => {
                self.check_errors = self.check_errors.saturating_add(1);
                self.tell(error.to_string());
            }
            _ => return Err(error),
        }
        Ok(())
    }

    fn tell(&mut self, message: impl Into<String>) {
        if self.messages.len() < MESSAGES_MAX {
            self.messages.push(message.into());
        }
    }
}

/// Checks what every format has: each extent of the disk lies inside the file of `file_bytes`, and none on another.
pub(crate) fn walk(
    disk: &dyn Disk,
    file_bytes: u64,
    limits: &Limits,
    report: &mut Report,
    progress: &Progress,
) -> Result<()> {
    let cluster_size = disk.details().cluster_size.filter(|&bytes| bytes > 0);
    let step = cluster_size.unwrap_or(STEP_BYTES);
    let map_bytes = limits.table_bytes_max.clamp(GRAIN_BYTES, WINDOW_BYTES_MAX);
    let window_bytes = map_bytes * 8 * GRAIN_BYTES;
    let windows = file_bytes.div_ceil(window_bytes).max(1);
    if windows > WINDOWS_MAX {
        let text = format!("a file of {file_bytes} bytes is too large to be checked");
        return Err(Error::new(ErrorKind::Limit, text));
    }
    let mut clusters = Clusters { total: disk.virtual_size().div_ceil(step), ..Clusters::default() };
    for window in 0..windows {
        let first = window == 0;
        let start = window * window_bytes;
        let mut used = Bitmap::new(window_bytes.min(file_bytes.saturating_sub(start)).div_ceil(GRAIN_BYTES));
        let mut stored_end = None;
        let mut at = 0;
        while at < disk.virtual_size() {
            progress.check()?;
            let extent = match disk.extent_at(at) {
                Ok(extent) => extent,
                Err(e) => {
                    if first {
                        report.failure(e)?;
                    }
                    at = (at / step + 1).saturating_mul(step);
                    continue;
                }
            };
            // However wrong an extent may be, the walk comes to its end.
            at = extent.end().max(at.saturating_add(1));
            if first {
                clusters.count(&extent, step, &mut stored_end);
            }
            let (Some(host), true) = (extent.host, extent.is_data()) else { continue };
            let end = host.saturating_add(extent.len);
            if first && end > file_bytes {
                report.corruption(format!(
                    "the bytes of virtual offset {} are at {host:#x} to {end:#x}, beyond the end of the file of \
                     {file_bytes} bytes",
                    extent.start
                ));
            }
            let end = end.min(file_bytes);
            // Parts may begin and end inside a grain, which two of them share then.
            let from = host.div_ceil(GRAIN_BYTES).max(start / GRAIN_BYTES) - start / GRAIN_BYTES;
            let to = (end / GRAIN_BYTES).saturating_sub(start / GRAIN_BYTES).min(used.len);
            if used.insert(from, to) {
                report.corruption(format!(
                    "the bytes of virtual offset {} at {host:#x} to {end:#x} belong to other offsets too",
                    extent.start
                ));
            }
        }
    }
    report.clusters = cluster_size.map(|_| clusters);
    Ok(())
}

/// Reads and decodes all data of the disk. Damage that the extents tell of is left to the check of the metadata.
///
/// `progress` counts bytes of the disk.
pub(crate) fn read_data(
    disk: &dyn Disk,
    report: &mut Report,
    options: &Options,
    progress: &Progress,
) -> Result<()> {
    progress.set_total(disk.virtual_size());
    let step = disk.details().cluster_size.filter(|&bytes| bytes > 0).unwrap_or(STEP_BYTES);
    let ranges = Mutex::new(Ranges::new(disk, UNIT_BYTES as u64));
    let report = Mutex::new(report);
    let team = Team::new(());
    run_team(&team, options.workers(), |_| {
        let mut buf = vec![0; UNIT_BYTES];
        while !team.stopped() {
            progress.check()?;
            let range = {
                let mut ranges = lock(&ranges);
                // Where the extents are damaged, the rest of the unit is looked at in small steps.
                ranges.next().or_else(|e| ranges.next_in_spite_of(e))?
            };
            match range {
                None => break,
                Some(Range::Zero { len, .. }) => progress.advance(len),
                Some(Range::Data { start, len }) => {
                    if disk.read_at(&mut buf[..len], start).is_err() {
                        read_by_step(disk, &mut buf, start, start + len as u64, step, &report)?;
                    }
                    progress.advance(len as u64);
                }
            }
        }
        Ok(())
    })
}

/// Reads what is readable of a unit that is not as a whole, one cluster after the other.
fn read_by_step(
    disk: &dyn Disk,
    buf: &mut [u8],
    start: u64,
    end: u64,
    step: u64,
    report: &Mutex<&mut Report>,
) -> Result<()> {
    let mut at = start;
    while at < end {
        let next = (at / step + 1).saturating_mul(step).min(end);
        let len = (next - at) as usize;
        if disk.extent_at(at).is_ok()
            && let Err(e) = disk.read_at(&mut buf[..len], at)
        {
            lock(report).failure(e)?;
        }
        at = next;
    }
    Ok(())
}

impl Clusters {
    /// Counts the clusters of an extent; `stored_end` is where the one before it ended in the file.
    fn count(&mut self, extent: &Extent, step: u64, stored_end: &mut Option<u64>) {
        if !extent.is_data() {
            return;
        }
        let clusters = extent.len.div_ceil(step);
        self.allocated += clusters;
        if extent.kind == ExtentKind::Compressed {
            self.compressed += clusters;
            self.fragmented += clusters;
        } else if let Some(host) = extent.host {
            self.fragmented += u64::from(stored_end.is_some_and(|end| end != host));
            *stored_end = host.checked_add(extent.len);
        }
    }
}

/// A set of grains.
struct Bitmap {
    words: Vec<u64>,
    len: u64,
}

impl Bitmap {
    fn new(len: u64) -> Self {
        Self { words: vec![0; len.div_ceil(64) as usize], len }
    }

    /// Adds `from..to`, which ends inside the set's bounds; whether some of it was there before.
    fn insert(&mut self, from: u64, to: u64) -> bool {
        let mut there = false;
        let mut at = from;
        while at < to {
            let (bit, n) = (at % 64, (64 - at % 64).min(to - at));
            let mask = (u64::MAX >> (64 - n)) << bit;
            if let Some(word) = self.words.get_mut((at / 64) as usize) {
                there |= *word & mask != 0;
                *word |= mask;
            }
            at += n;
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_tells_what_was_there() {
        let mut bitmap = Bitmap::new(1000);
        assert!(!bitmap.insert(3, 64));
        assert!(!bitmap.insert(64, 64));
        assert!(!bitmap.insert(64, 700));
        assert!(!bitmap.insert(0, 3));
        assert!(bitmap.insert(699, 701));
        assert!(!bitmap.insert(701, 1000));
        assert!(bitmap.insert(0, 1000));
    }

    /// A disk whose extents are given: where each 64 KiB are in the file, or nowhere.
    struct Extents(Vec<Result<u64, ()>>);

    impl Disk for Extents {
        fn virtual_size(&self) -> u64 {
            self.0.len() as u64 * STEP_BYTES
        }

        fn extent_at(&self, offset: u64) -> Result<Extent> {
            let host = self.0[(offset / STEP_BYTES) as usize];
            let host = host.map_err(|()| Error::new(ErrorKind::Corrupt, format!("damage at {offset}")))?;
            Ok(Extent { start: offset, len: STEP_BYTES, kind: ExtentKind::Data, host: Some(host) })
        }

        fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> {
            Err(Error::new(ErrorKind::Corrupt, "not decodable"))
        }
    }

    fn checked(extents: &[Result<u64, ()>], file_bytes: u64) -> Report {
        let mut report = Report::default();
        let (limits, progress) = (Limits::default(), Progress::default());
        walk(&Extents(extents.to_vec()), file_bytes, &limits, &mut report, &progress).unwrap();
        report
    }

    #[test]
    fn damage_overlap_and_what_lies_outside_are_counted_each() {
        let k64 = STEP_BYTES;
        assert_eq!(checked(&[Ok(100), Ok(100 + k64), Ok(3 * k64)], 9 * k64).corruptions, 0);
        let report = checked(&[Ok(k64), Err(()), Ok(0), Err(()), Ok(k64 / 2), Ok(9 * k64 - 512)], 9 * k64);
        assert_eq!(report.corruptions, 4, "{report:?}");
        assert_eq!(report.messages.len(), 4);
    }

    #[test]
    fn overlaps_are_found_behind_the_first_window() {
        let far = 200u64 << 30;
        assert_eq!(checked(&[Ok(far), Ok(0), Ok(far + STEP_BYTES)], far * 2).corruptions, 0);
        assert_eq!(checked(&[Ok(far), Ok(0), Ok(far + 4096)], far * 2).corruptions, 1);
        let window = WINDOW_BYTES_MAX * 8 * GRAIN_BYTES;
        let across = checked(&[Ok(window - 4096), Ok(window)], far * 2);
        assert_eq!(across.corruptions, 1, "{across:?}");
    }

    #[test]
    fn each_cluster_that_cannot_be_read_counts_once() {
        let disk = Extents(vec![Ok(0), Err(()), Ok(STEP_BYTES)]);
        let mut report = Report::default();
        read_data(&disk, &mut report, &Options::default(), &Progress::default()).unwrap();
        assert_eq!(report.corruptions, 2, "{report:?}");
    }
}
