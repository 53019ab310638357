//! When to ask for blocks before they are wanted, and for how many.
//!
//! A reader that goes forward is run ahead of; one that jumps is not. What is asked for in vain costs the link, so that it
//! is paid from a credit: a little to begin with, and then a small part of what was read.

use std::ops::Range;

/// Most blocks on their way or waiting that nobody has wanted yet.
pub(crate) const AHEAD_BLOCKS_MAX: u64 = 32;
/// Blocks that may be asked for in vain before anything was read.
const GRACE_BLOCKS: u64 = 8;
/// Of so many blocks that were read one may be asked for in vain.
const WASTE_SHARE: u64 = 32;
/// Blocks wanted one after the other before the reader counts as going forward.
const RUN_BLOCKS_MIN: u64 = 4;
/// How far from the front a reader may want a block and still be going forward: there are several of them at a time, and
/// tables lie between the data.
const BEHIND_BLOCKS: u64 = 64;
const BEYOND_BLOCKS: u64 = 8;
/// Requests that the blocks ahead are spread over.
const REQUESTS: u64 = 4;

/// What is known of the readers of one file.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    /// Blocks that were wanted in order, up to now.
    run: u64,
    /// Behind the furthest block that was wanted in this run, and behind the furthest that was asked for.
    wanted: u64,
    asked: u64,
    /// Blocks that were read, of whatever kind; and those asked for ahead and dropped unread.
    read: u64,
    wasted: u64,
}

impl Ahead {
    /// Notes that the blocks of `range` are wanted. Returns the ones to ask for beyond it, while `unread` that were asked for
    /// before still wait for their reader.
    pub(crate) fn want(&mut self, range: Range<u64>, unread: u64) -> Range<u64> {
        let near = range.start.saturating_add(BEHIND_BLOCKS) >= self.asked
            && range.start <= self.asked.saturating_add(BEYOND_BLOCKS);
        if near {
            let new = range.end.saturating_sub(self.wanted.max(range.start));
            self.run += new;
            self.read += new;
            self.wanted = self.wanted.max(range.end);
            self.asked = self.asked.max(range.end);
        } else {
            self.run = 0;
            self.read += range.end.saturating_sub(range.start);
            (self.wanted, self.asked) = (range.end, range.end);
        }
        let reach = self.reach();
        let end = self.wanted.saturating_add(reach).min(self.asked + reach.saturating_sub(unread));
        let step = (reach / REQUESTS).max(1);
        if self.run < RUN_BLOCKS_MIN || end < self.asked.saturating_add(step) {
            return self.asked..self.asked;
        }
        // Whole steps: many short requests cost more than a few long ones.
        let begun = self.asked;
        self.asked = begun + (end - begun) / step * step;
        begun..self.asked
    }

    /// Notes that a block asked for ahead was dropped before anybody wanted it.
    pub(crate) fn waste(&mut self) {
        self.wasted += 1;
    }

    /// Blocks that were wanted so far: what a block's age is counted in.
    pub(crate) fn read(&self) -> u64 {
        self.read
    }

    /// Blocks of one request.
    pub(crate) fn step(&self) -> u64 {
        (self.reach() / REQUESTS).max(1)
    }

    /// Blocks that may wait for their reader now.
    fn reach(&self) -> u64 {
        let credit = GRACE_BLOCKS + self.read / WASTE_SHARE;
        credit.saturating_sub(self.wasted).min(AHEAD_BLOCKS_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_goes_forward_is_run_ahead_of_further_and_further() {
        let mut ahead = Ahead::default();
        let (mut asked, mut furthest) = (0, 0);
        for block in 0..2000 {
            let unread = u64::saturating_sub(asked, block + 1);
            let more = ahead.want(block..block + 1, unread);
            assert!(more.is_empty() || more.start == asked.max(block + 1), "{more:?} at {block}");
            asked = more.end.max(block + 1);
            furthest = furthest.max(asked - block - 1);
            assert!(asked - block - 1 <= AHEAD_BLOCKS_MAX);
            assert!(block < 4 || asked > block + 1, "{block} and nothing ahead");
        }
        assert!(furthest >= AHEAD_BLOCKS_MAX - 8, "{furthest}");
    }

    #[test]
    fn several_readers_of_one_run_count_as_one() {
        let mut ahead = Ahead::default();
        for pair in 0..50u64 {
            // The second begins before the first, and they share a block.
            ahead.want(pair * 4 + 2..pair * 4 + 5, 0);
            ahead.want(pair * 4..pair * 4 + 3, 0);
        }
        assert!(ahead.run >= 140, "{}", ahead.run);
    }

    #[test]
    fn a_reader_that_jumps_is_not_run_ahead_of() {
        let mut ahead = Ahead::default();
        for step in 0..1000u64 {
            let at = step * 7919 % 100_000;
            assert!(ahead.want(at..at + 2, 0).is_empty(), "step {step}");
        }
    }

    #[test]
    fn what_is_asked_for_in_vain_stays_a_small_part() {
        let mut ahead = Ahead::default();
        let mut wasted = 0;
        let mut read = 0;
        // Just long enough to look like going forward, again and again.
        for run in 0..500u64 {
            let mut unread = 0;
            for block in 0..6 {
                let at = run * 1000 + block;
                let more = ahead.want(at..at + 1, unread);
                unread += more.end - more.start;
                read += 1;
            }
            wasted += unread;
            for _ in 0..unread {
                ahead.waste();
            }
        }
        assert!(wasted <= GRACE_BLOCKS + read / WASTE_SHARE, "{wasted} of {read}");
        assert!(wasted > 0);
    }
}
