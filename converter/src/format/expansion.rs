//! The bound on how much more a guest sees than the file has: many clusters that are the same few bytes of the file make
//! a small file an endless disk.
//!
//! A bit for every block of the file tells whether it was ever read; what is decoded is weighed against the blocks that
//! were. Only what lies beyond all that was read before is counted, so that reading again costs nothing.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

/// Decoded bytes below which nothing is refused.
const GRACE_BYTES: u64 = 1 << 30;

/// Smallest block, as a power of two.
const BLOCK_BITS_MIN: u32 = 12;

/// Most memory for the bits, bytes.
const BITMAP_BYTES_MAX: u64 = 4 << 20;

/// What one open disk has decoded, and of what. Shared by all its readers without a lock.
pub(super) struct Expansion {
    ratio_max: u64,
    block_bits: u32,
    /// One bit per block of the file.
    touched: Box<[AtomicU64]>,
    /// Bytes that the blocks touched may decode to.
    allowed: AtomicU64,
    /// Bytes of the disk counted.
    counted: AtomicU64,
    /// End of what was counted, on the disk.
    front: AtomicU64,
}

/// A run of the file that is about to be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored {
    /// First byte in the file.
    pub host: u64,
    /// Bytes in the file; not zero.
    pub bytes: u64,
    /// Bytes of the disk that come of it.
    pub disk_bytes: u64,
    /// Whether they are compressed.
    pub packed: bool,
}

impl Expansion {
    /// For a file of `file_bytes`.
    pub(super) fn new(file_bytes: u64, limits: &Limits) -> Self {
        let mut block_bits = BLOCK_BITS_MIN;
        while file_bytes >> block_bits >= BITMAP_BYTES_MAX * 8 {
            block_bits += 1;
        }
        let words = (file_bytes >> block_bits) / 64 + 1;
        Self {
            ratio_max: limits.image_expansion_ratio_max,
            block_bits,
            touched: (0..words).map(|_| AtomicU64::new(0)).collect(),
            allowed: AtomicU64::new(GRACE_BYTES),
            counted: AtomicU64::new(0),
            front: AtomicU64::new(0),
        }
    }

    /// Notes that the disk is read from `start` to `end`, and of what; fails with [`ErrorKind::Limit`] when that is out of
    /// all proportion.
    pub(super) fn record(&self, start: u64, end: u64, stored: impl Iterator<Item = Stored>) -> Result<()> {
        let mut disk_bytes = 0;
        for run in stored {
            disk_bytes += run.disk_bytes;
            let fresh = self.touch(run.host, run.bytes) << self.block_bits;
            // Beyond half of all numbers nothing is refused any more, and the sum must not wrap.
            if fresh > 0 && self.allowed.load(Ordering::Relaxed) < u64::MAX / 2 {
                let allowed = if run.packed { fresh.saturating_mul(self.ratio_max) } else { fresh };
                self.allowed.fetch_add(allowed.min(u64::MAX >> 10), Ordering::Relaxed);
            }
        }
        let front = self.front.fetch_max(end, Ordering::Relaxed);
        let ahead = end.saturating_sub(front.max(start));
        let counted = disk_bytes.min(ahead);
        let counted = self.counted.fetch_add(counted, Ordering::Relaxed).saturating_add(counted);
        if counted > self.allowed.load(Ordering::Relaxed) {
            return Err(Error::new(
                ErrorKind::Limit,
                format!(
                    "the image has {counted} bytes of disk up to offset {end} in far too few bytes of the file: many parts \
                     of the disk are the same bytes, which no honest image has"
                ),
            ));
        }
        Ok(())
    }

    /// Sets the bits of a run; returns how many were not set before.
    fn touch(&self, host: u64, bytes: u64) -> u64 {
        let (first, last) =
            (host >> self.block_bits, host.saturating_add(bytes.saturating_sub(1)) >> self.block_bits);
        let mut fresh = 0;
        let mut block = first;
        while block <= last {
            let word_end = block / 64 * 64 + 63;
            let upto = word_end.min(last);
            let bits = (u64::MAX >> (63 - (upto - block))) << (block % 64);
            let Some(word) = self.touched.get((block / 64) as usize) else { break };
            // A plain load first: those who read again share the cache line.
            if word.load(Ordering::Relaxed) & bits != bits {
                fresh += u64::from((bits & !word.fetch_or(bits, Ordering::Relaxed)).count_ones());
            }
            block = upto + 1;
        }
        fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn record(expansion: &Expansion, at: u64, host: u64, bytes: u64, packed: bool) -> Result<()> {
        let stored = Stored { host, bytes, disk_bytes: 2 * MIB, packed };
        expansion.record(at, at + 2 * MIB, std::iter::once(stored))
    }

    #[test]
    fn clusters_that_are_all_the_same_bytes_end_in_a_limit() {
        for packed in [false, true] {
            let limits = Limits::default();
            let expansion = Expansion::new(4 * MIB, &limits);
            let bytes = if packed { 100 } else { 2 * MIB };
            let refused = (0..).find(|i| record(&expansion, i * 2 * MIB, 4096, bytes, packed).is_err());
            let refused = refused.unwrap() * 2 * MIB;
            assert!((GRACE_BYTES..GRACE_BYTES + 256 * MIB).contains(&refused), "{refused}");
        }
    }

    #[test]
    fn honest_disks_are_never_refused() {
        // The most that zstd makes of constant clusters of 2 MiB, and plain clusters that lie anywhere.
        let expansion = Expansion::new(1 << 40, &Limits::default());
        for i in 0..20_000 {
            record(&expansion, i * 2 * MIB, 512 + i * 105, 105, true).unwrap();
        }
        let expansion = Expansion::new(1 << 40, &Limits::default());
        for i in 0..20_000 {
            record(&expansion, i * 2 * MIB, (20_000 - i) * 2 * MIB, 2 * MIB, false).unwrap();
        }
    }

    #[test]
    fn reading_again_and_out_of_order_counts_nothing() {
        let expansion = Expansion::new(4 * MIB, &Limits::default());
        for _ in 0..2000 {
            record(&expansion, 0, 0, 2 * MIB, false).unwrap();
            record(&expansion, MIB, MIB, 2 * MIB, false).unwrap();
        }
        assert!(expansion.counted.load(Ordering::Relaxed) <= 3 * MIB);
    }

    #[test]
    fn every_block_is_counted_once() {
        let expansion = Expansion::new(1 << 30, &Limits::default());
        assert_eq!(expansion.touch(0, 1), 1);
        assert_eq!(expansion.touch(0, 4097), 1);
        assert_eq!(expansion.touch(63 * 4096, 4096 * 66), 66);
        assert_eq!(expansion.touch(0, 1 << 30), (1 << 18) - 68);
        // Beyond the end there is nothing to count.
        assert_eq!(expansion.touch(2 << 30, 1), 0);
        let huge = Expansion::new(u64::MAX >> 1, &Limits::default());
        assert!(huge.touched.len() as u64 * 8 <= BITMAP_BYTES_MAX + 8);
    }
}
