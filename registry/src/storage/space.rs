//! Keeps a part of the volume free: deletions, garbage collection and the machine itself need some to go on.
//!
//! The filesystem is asked ten times a second, and before anybody is refused. In between, what is granted is taken off what it said; what is
//! granted and not yet written is taken off its next answer.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Error, Result};
use crate::store::Kind;

/// How old an answer of the filesystem may be.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// The reserve, when none is chosen, is the smaller of this and a twentieth of the volume.
const RESERVE_BYTES_DEFAULT: u64 = 1 << 30;

/// The free space of the volume, but for the reserve.
#[derive(Debug)]
pub(crate) struct Space {
    root: PathBuf,
    reserve: u64,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    at: Option<Instant>,
    /// What is free and not granted.
    free: u64,
    /// What is granted and perhaps not yet written.
    granted: u64,
}

/// What a filesystem says of itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Volume {
    /// Its size.
    pub(crate) bytes: u64,
    /// What it has for programs like ours, the reserve included.
    pub(crate) free: u64,
}

/// The bytes are more than the volume has besides the reserve.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error(
    "there is no room for {more} bytes more: {free} are free, of which {reserve} are reserved, and {} are missing",
    .more.saturating_add(*.reserve).saturating_sub(*.free)
)]
pub(crate) struct NoRoom {
    pub(crate) more: u64,
    pub(crate) free: u64,
    pub(crate) reserve: u64,
}

/// What the bytes are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Blob,
    /// It makes use of blobs that were taken already, and may have half of the reserve.
    Manifest,
}

/// Space that may be written to; to be kept until it is.
#[derive(Debug)]
#[must_use = "the space counts as written when it is dropped"]
pub(crate) struct Grant<'a> {
    space: &'a Space,
    bytes: u64,
}

impl Space {
    pub(super) fn new(root: &Path, reserve: Option<u64>) -> Self {
        let reserve = reserve.unwrap_or_else(|| match volume(root) {
            Ok(volume) => (volume.bytes / 20).min(RESERVE_BYTES_DEFAULT),
            Err(_) => RESERVE_BYTES_DEFAULT,
        });
        Self { root: root.to_owned(), reserve, seen: Mutex::default() }
    }

    pub(crate) fn reserve(&self) -> u64 {
        self.reserve
    }

    /// Asks the filesystem.
    pub(crate) fn volume(&self) -> io::Result<Volume> {
        volume(&self.root)
    }

    fn free(&self) -> io::Result<u64> {
        Ok(self.volume()?.free)
    }

    /// Grants so many bytes.
    ///
    /// # Errors
    /// When that would touch the reserve; [`Error::is_full`] is then true.
    pub(crate) fn take(&self, bytes: u64, purpose: Purpose) -> Result<Grant<'_>> {
        self.take_of(bytes, purpose, || self.free())
    }

    /// Grants what `look` says that the filesystem has.
    fn take_of(
        &self,
        bytes: u64,
        purpose: Purpose,
        look: impl FnOnce() -> io::Result<u64>,
    ) -> Result<Grant<'_>> {
        let mut seen = self.seen();
        let reserve = match purpose {
            Purpose::Blob => self.reserve,
            Purpose::Manifest => self.reserve / 2,
        };
        let is_little = |seen: &Seen| bytes.checked_add(reserve).is_none_or(|needed| needed > seen.free);
        // Nobody is refused for what was so a moment ago.
        if seen.at.is_none_or(|at| at.elapsed() >= LOOK_INTERVAL) || is_little(&seen) {
            let free = look().map_err(Error::at("cannot ask for the free space of", &self.root))?;
            seen.free = free.saturating_sub(seen.granted);
            seen.at = Some(Instant::now());
        }
        if is_little(&seen) {
            let context = format!("there is no room in {}", self.root.display());
            return Err(Error::of(Kind::Full, context, NoRoom { more: bytes, free: seen.free, reserve }));
        }
        seen.free -= bytes;
        seen.granted = seen.granted.saturating_add(bytes);
        Ok(Grant { space: self, bytes })
    }

    /// Tells whether so many bytes of a blob could be taken just now.
    pub(crate) fn check(&self, bytes: u64) -> Result<()> {
        let grant = self.take(bytes, Purpose::Blob)?;
        self.seen().free += grant.bytes;
        Ok(())
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn volume(root: &Path) -> io::Result<Volume> {
    let volume = rustix::fs::statvfs(root)?;
    let bytes = |blocks: u64| blocks.saturating_mul(volume.f_frsize);
    Ok(Volume { bytes: bytes(volume.f_blocks), free: bytes(volume.f_bavail) })
}

impl Drop for Grant<'_> {
    fn drop(&mut self) {
        let mut seen = self.space.seen();
        seen.granted = seen.granted.saturating_sub(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_granted_is_not_granted_again() {
        let root = tempfile::tempdir().unwrap();
        let space = Space::new(root.path(), None);
        assert!(space.reserve() > 0 && space.reserve() <= RESERVE_BYTES_DEFAULT);
        let (free, reserve) = (1000 + space.reserve(), space.reserve());
        let take = |bytes, purpose, written| space.take_of(bytes, purpose, || Ok(free - written));
        take(1001, Purpose::Blob, 0).unwrap_err();
        let first = take(600, Purpose::Blob, 0).unwrap();
        let second = take(400, Purpose::Blob, 0).unwrap();
        let refused = take(1, Purpose::Blob, 0).unwrap_err();
        assert!(refused.is_full(), "{refused:?}");
        drop(take(reserve / 2, Purpose::Manifest, 0).unwrap());
        drop((first, second));
        let written = 1000 + reserve / 2;
        take(2, Purpose::Manifest, written).unwrap_err();
        take(1, Purpose::Blob, written).unwrap_err();
        assert_eq!(space.seen().granted, 0);
        take(u64::MAX, Purpose::Blob, written).unwrap_err();
    }

    #[test]
    fn asking_takes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let space = Space::new(root.path(), Some(0));
        // An answer that stays new for the test.
        let at = Instant::now() + Duration::from_secs(3600);
        *space.seen() = Seen { at: Some(at), free: 1000, granted: 0 };
        for _ in 0..2 {
            space.check(1000).unwrap();
            let seen = space.seen();
            assert_eq!((seen.free, seen.granted), (1000, 0));
        }
    }

    #[test]
    fn nobody_is_refused_for_what_was_so_a_moment_ago() {
        let root = tempfile::tempdir().unwrap();
        let space = Space::new(root.path(), Some(0));
        space.take_of(1000, Purpose::Blob, || Ok(10)).unwrap_err();
        drop(space.take_of(1000, Purpose::Blob, || Ok(2000)).unwrap());
    }

    #[test]
    fn what_is_not_written_yet_is_taken_off_the_next_answer() {
        let root = tempfile::tempdir().unwrap();
        let space = Space::new(root.path(), Some(0));
        let half = space.free().unwrap() / 2;
        let kept = space.take(half, Purpose::Blob).unwrap();
        space.seen().at = None;
        space.check(half + half / 2).unwrap_err();
        drop(kept);
        space.seen().at = None;
        space.check(half + half / 2).unwrap();
    }
}
