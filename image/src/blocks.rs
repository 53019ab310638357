//! The blocks of a file that are here, on their way, or known to be out of reach; a bounded number of them.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::Error;
use crate::ahead::{AHEAD_BLOCKS_MAX, Ahead};

/// Unit of what is kept and asked for, bytes: a chunk of the index.
pub(crate) const BLOCK_BYTES: u64 = crate::index::CHUNK_BYTES;
/// Most blocks kept that somebody has read: several readers stand in as many of them, and come back for the rest.
const READ_BLOCKS_MAX: usize = 32;
/// A block asked for ahead that was not wanted while so many others were is not waited for any longer.
const UNREAD_AGE_BLOCKS: u64 = 2 * AHEAD_BLOCKS_MAX;
/// Most blocks asked for before a reader waits for them; these, those that were read and one for each reader that waits
/// bound the memory of one open file.
pub(crate) const BLOCKS_MAX: usize = READ_BLOCKS_MAX + AHEAD_BLOCKS_MAX as usize;

/// A block's bytes as they came.
#[derive(Clone, Debug)]
pub(crate) struct Block(Arc<[Bytes]>);

impl Block {
    pub(crate) fn new(parts: Vec<Bytes>) -> Self {
        Self(parts.into())
    }

    pub(crate) fn parts(&self) -> &[Bytes] {
        &self.0
    }

    /// Fills `buf` from byte `from`; the block has them all.
    pub(crate) fn copy_to(&self, buf: &mut [u8], from: usize) {
        let (mut skip, mut filled) = (from, 0);
        for part in self.parts() {
            if skip >= part.len() {
                skip -= part.len();
                continue;
            }
            let count = (part.len() - skip).min(buf.len() - filled);
            buf[filled..filled + count].copy_from_slice(&part[skip..skip + count]);
            (skip, filled) = (0, filled + count);
            if filled == buf.len() {
                return;
            }
        }
        debug_assert_eq!(filled, buf.len(), "a block is shorter than its reader was told");
    }
}

/// How far a block is.
#[derive(Debug)]
pub(crate) enum State {
    Loading,
    /// All of it came; nobody has verified it.
    Arrived(Block),
    /// A reader is at it.
    Checking,
    Ready(Block),
    Failed(Arc<Error>),
}

#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) state: State,
    /// Whether it was asked for ahead and nobody has wanted it yet.
    ahead: bool,
    /// Whether it is asked for a second time, having been wrong the first time.
    pub(crate) again: bool,
    /// Whether a reader waits for it to change.
    pub(crate) waited_for: bool,
    /// Bytes of it that were read, some of them maybe twice.
    pub(crate) read: u64,
    /// When it was wanted last, and what had been read by all when it was asked for.
    used: u64,
    born: u64,
}

/// The blocks of one open file.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    slots: HashMap<u64, Slot>,
    ahead: Ahead,
    unread: u64,
    clock: u64,
}

impl Blocks {
    /// The slot of a block that is wanted now.
    pub(crate) fn touch(&mut self, number: u64) -> Option<&mut Slot> {
        self.clock += 1;
        let slot = self.slots.get_mut(&number)?;
        slot.used = self.clock;
        if std::mem::take(&mut slot.ahead) {
            self.unread -= 1;
        }
        Some(slot)
    }

    pub(crate) fn slot(&mut self, number: u64) -> Option<&mut Slot> {
        self.slots.get_mut(&number)
    }

    pub(crate) fn forget(&mut self, number: u64) {
        if let Some(slot) = self.slots.remove(&number)
            && slot.ahead
        {
            self.unread -= 1;
            self.ahead.waste();
        }
    }

    /// Notes that the blocks `first..end` of a file of `count` blocks are wanted, and returns those to ask for, in runs of
    /// neighbours, each as long as one request is to be; they are `Loading` from now on. The first is always among them if
    /// it is not here; others only while there is room.
    pub(crate) fn want(&mut self, first: u64, end: u64, count: u64) -> Vec<std::ops::Range<u64>> {
        let beyond = self.ahead.want(first..end, self.unread);
        let beyond = beyond.start.min(count)..beyond.end.min(count);
        self.drop_read();
        let step = self.ahead.step().max(end - first);
        let mut requests: Vec<std::ops::Range<u64>> = Vec::new();
        for (number, ahead) in (first..end).map(|n| (n, false)).chain(beyond.map(|n| (n, true))) {
            let full = self.slots.len() >= BLOCKS_MAX && number != first;
            if full || self.slots.contains_key(&number) {
                continue;
            }
            self.clock += 1;
            let (used, born) = (self.clock, self.ahead.read());
            let slot =
                Slot { state: State::Loading, ahead, again: false, waited_for: false, read: 0, used, born };
            self.slots.insert(number, slot);
            self.unread += u64::from(ahead);
            match requests.last_mut() {
                Some(last) if last.end == number && last.end - last.start < step => last.end += 1,
                _ => requests.push(number..number + 1),
            }
        }
        requests
    }

    /// Drops the blocks that were read, wholly before partly, and not used for longest; and those that a reader who went
    /// elsewhere left unread.
    fn drop_read(&mut self) {
        let now = self.ahead.read();
        let idle = |slot: &Slot| !matches!(slot.state, State::Loading | State::Checking);
        let (mut read, mut unwanted) = (Vec::new(), Vec::new());
        for (number, slot) in self.slots.iter().filter(|(_, slot)| idle(slot)) {
            match slot.ahead {
                false => read.push((slot.read < BLOCK_BYTES, slot.used, *number)),
                true if now - slot.born > UNREAD_AGE_BLOCKS => unwanted.push(*number),
                true => {}
            }
        }
        read.sort_unstable();
        let surplus = read.len().saturating_sub(READ_BLOCKS_MAX);
        for number in read.iter().take(surplus).map(|(.., number)| *number).chain(unwanted) {
            self.forget(number);
        }
    }
}
