//! Whether two disks hold the same.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Result;
use crate::convert::{Options, Range, Team, ZERO_BYTES_MAX, lock, run_team};
use crate::io::{Disk, Extent};
use crate::progress::Progress;
use crate::zeros::BLOCK_BYTES;

/// What a comparison found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Bytes of the two disks.
    pub virtual_sizes: [u64; 2],
    /// The first byte that differs; what lies behind the end of a disk counts as zero.
    pub first_difference: Option<u64>,
}

impl Comparison {
    /// Whether the disks hold the same; a larger one may have more zeros unless `strict`.
    pub fn is_identical(&self, strict: bool) -> bool {
        let [a, b] = self.virtual_sizes;
        self.first_difference.is_none() && !(strict && a != b)
    }
}

/// Compares two disks up to the first difference. Ranges that both say are zero are not read.
///
/// `progress` counts bytes of the larger disk.
pub fn compare(disks: [&dyn Disk; 2], options: &Options, progress: &Progress) -> Result<Comparison> {
    let virtual_sizes = disks.map(Disk::virtual_size);
    let end = virtual_sizes.into_iter().fold(0, u64::max);
    progress.set_total(end);
    let unit = options.unit(BLOCK_BYTES);
    let feed = Mutex::new(Pairs { disks, unit: unit as u64, at: 0, end, extents: [None; 2] });
    // Units are handed out in order, and one that was handed out is compared: the smallest is the first.
    let first_difference = AtomicU64::new(u64::MAX);
    let team = Team::new(());
    run_team(&team, options.workers(), |_| {
        let mut bufs = [vec![0; unit], vec![0; unit]];
        while !team.stopped() {
            progress.check()?;
            let range = {
                let mut feed = lock(&feed);
                if first_difference.load(Ordering::Relaxed) < feed.at {
                    break;
                }
                feed.next()?
            };
            match range {
                None => break,
                Some(Range::Zero { len, .. }) => progress.advance(len),
                Some(Range::Data { start, len }) => {
                    for (disk, buf) in disks.iter().zip(&mut bufs) {
                        let stored = disk.virtual_size().saturating_sub(start).min(len as u64) as usize;
                        if stored > 0 {
                            disk.read_at(&mut buf[..stored], start)?;
                        }
                        buf[stored..len].fill(0);
                    }
                    if let Some(at) = difference(&bufs[0][..len], &bufs[1][..len]) {
                        first_difference.fetch_min(start + at as u64, Ordering::Relaxed);
                    }
                    progress.advance(len as u64);
                }
            }
        }
        Ok(())
    })?;
    let first_difference = Some(first_difference.into_inner()).filter(|&at| at != u64::MAX);
    Ok(Comparison { virtual_sizes, first_difference })
}

/// Walks two disks at once and cuts them on a grid of units.
struct Pairs<'a> {
    disks: [&'a dyn Disk; 2],
    unit: u64,
    at: u64,
    end: u64,
    extents: [Option<Extent>; 2],
}

impl Pairs<'_> {
    fn next(&mut self) -> Result<Option<Range>> {
        let start = self.at;
        if start >= self.end {
            return Ok(None);
        }
        let zero_end = self.zero_end(0)?.min(self.zero_end(1)?);
        let zero_end = if zero_end >= self.end { self.end } else { zero_end / self.unit * self.unit };
        if zero_end > start {
            let len = (zero_end - start).min(ZERO_BYTES_MAX / self.unit * self.unit);
            self.at = start + len;
            return Ok(Some(Range::Zero { start, len }));
        }
        self.at = (start / self.unit + 1).saturating_mul(self.unit).min(self.end);
        Ok(Some(Range::Data { start, len: (self.at - start) as usize }))
    }

    /// Up to where one of the disks says it is zero from here on.
    fn zero_end(&mut self, which: usize) -> Result<u64> {
        let (disk, at) = (self.disks[which], self.at);
        if at >= disk.virtual_size() {
            return Ok(self.end);
        }
        let extent = match self.extents[which] {
            Some(extent) if extent.end() > at => extent,
            _ => *self.extents[which].insert(disk.extent_at(at)?),
        };
        Ok(match extent.is_data() {
            true => at,
            false if extent.end() >= disk.virtual_size() => self.end,
            false => extent.end(),
        })
    }
}

/// The first byte in which two slices of one length differ.
fn difference(a: &[u8], b: &[u8]) -> Option<usize> {
    let blocks = a.chunks(BLOCK_BYTES).zip(b.chunks(BLOCK_BYTES));
    // Whole blocks are compared by memcmp, bytes only where it says no.
    let (block, (a, b)) = blocks.enumerate().find(|(_, (a, b))| a != b)?;
    let byte = a.iter().zip(b).position(|(a, b)| a != b)?;
    Some(block * BLOCK_BYTES + byte)
}
