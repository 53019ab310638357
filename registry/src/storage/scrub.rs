//! Looks for damage: hashes all blobs again, at a bounded rate, and puts those aside that are not what they are called.
//!
//! ```text
//!  blobs in order ──> read past the page cache, hash ──> right: go on, and now and then note how far (dvcr/scrub)
//!                          │ wrong, twice
//!                          v
//!                     quarantine: dvcr/quarantine/<alg>/<hex>; clients are told that it is unknown
//!                          │ a push brings the content
//!                          v
//!                     healed: a new blob; what was put aside is removed
//! ```
//!
//! A client that finds a blob on the registry does not push it, so a damaged one that stays in its place stays for ever.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{Advice, OFlags};
use serde::{Deserialize, Serialize};

use super::blobs::found;
use super::layout::Layout;
use super::manifests::walk;
use super::pace::Pace;
use super::pool::{ALIGN_BYTES, Pool};
use super::{Error, Result, Storage};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::names::RepoName;

/// Bytes read at a time.
const READ_BYTES: usize = 1 << 20;
/// What a blob costs at least, in bytes of the rate: finding a small one takes the disk as long as reading so much.
const BLOB_BYTES_MIN: u64 = 64 << 10;
/// How often it is noted how far a pass is.
const CURSOR_INTERVAL: Duration = Duration::from_secs(30);
/// Longest cursor that is read, bytes.
const CURSOR_BYTES_MAX: usize = 1024;
/// So many blobs in a row that cannot be read are no damage to them but to the disk as a whole.
const UNREADABLE_RUN_MAX: u32 = 3;
/// Repositories of a damaged blob told in the log.
const REPOSITORIES_SHOWN_MAX: usize = 20;

/// What a pass, or all of them, have seen.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) blobs: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) damaged: AtomicU64,
}

/// How a pass is run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass<'a> {
    /// Bytes per second, at most.
    pub(crate) rate: Option<u64>,
    pub(crate) counts: &'a Counts,
    pub(crate) stop: &'a AtomicBool,
}

/// The blobs that were put aside, and what scrubbing has seen since the start.
#[derive(Debug, Default)]
pub(super) struct Scrubbing {
    quarantined: Mutex<HashSet<Digest>>,
    /// How many those are, so that a push need not take the lock.
    quarantined_count: AtomicUsize,
    pub(super) seen: Counts,
    /// When the last pass over everything ended, seconds since 1970.
    pub(super) finished: AtomicU64,
}

/// How far the scrubbing in the background is; the file `dvcr/scrub`.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Cursor {
    /// When the pass began, seconds since 1970.
    begun: u64,
    /// The last blob that was read; none before the first.
    #[serde(default)]
    after: Option<String>,
    #[serde(default)]
    finished: bool,
}

impl Storage {
    /// Goes through all blobs once; blocks.
    ///
    /// # Errors
    /// When it is stopped, the filesystem fails, or nothing can be read any more.
    pub(crate) fn scrub(&self, pass: &Pass) -> Result<()> {
        self.scrub_behind(None, pass, &mut |_| Ok(()))
    }

    /// Goes on with the pass that an earlier call left, or begins the next if its time has come; blocks. Returns how long
    /// it is until the next one.
    ///
    /// # Errors
    /// As [`Storage::scrub`]; the next call goes on.
    pub(crate) fn scrub_on(&self, pass: &Pass, period: Duration) -> Result<Duration> {
        let path = self.layout.scrub_cursor();
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut cursor = read_cursor(&path).map_err(Error::at("cannot read", &path))?;
        if cursor.finished || cursor.begun == 0 {
            let now = seconds(SystemTime::now());
            // A beginning ahead of us was written under another clock.
            let passed = Duration::from_secs(now.checked_sub(cursor.begun).unwrap_or(u64::MAX));
            if let Some(rest) = period.checked_sub(passed).filter(|rest| !rest.is_zero()) {
                return Ok(rest);
            }
            cursor = Cursor { begun: now, ..Cursor::default() };
        }
        let begun = cursor.begun;
        let note = |after: Option<&Digest>, finished| {
            let cursor = Cursor { begun, after: after.map(Digest::to_string), finished };
            self.write_cursor(&path, &cursor).map_err(Error::at("cannot write", &path))
        };
        let behind = cursor.after.and_then(|digest| digest.parse().ok());
        let (mut last, mut noted) = (None, Instant::now());
        let done = self.scrub_behind(behind.clone(), pass, &mut |digest| {
            if noted.elapsed() >= CURSOR_INTERVAL {
                noted = Instant::now();
                note(Some(digest), false)?;
            }
            last = Some(digest.clone());
            Ok(())
        });
        if done.is_err() {
            note(last.or(behind).as_ref(), false)?;
            return done.map(|()| period);
        }
        note(None, true)?;
        let now = SystemTime::now();
        self.scrubbing.finished.store(seconds(now), Ordering::Relaxed);
        let since = Duration::from_secs(seconds(now).saturating_sub(begun));
        Ok(period.saturating_sub(since))
    }

    /// Whether a blob was found damaged, and nobody has brought it again.
    pub(super) fn is_quarantined(&self, digest: &Digest) -> bool {
        self.scrubbing.count() > 0 && self.scrubbing.quarantined().contains(digest)
    }

    /// Removes what was put aside of a blob that has just been placed. The caller holds [`Storage::accepting`].
    pub(super) fn healed(&self, digest: &Digest) {
        if self.scrubbing.count() > 0 && self.forget_quarantined(digest) {
            tracing::info!(%digest, "a damaged blob was replaced by a push");
        }
    }

    /// Removes blobs that were put aside and are not `wanted`, and calls `removed` with their lengths; a dry run only
    /// tells.
    pub(super) fn collect_quarantined(
        &self,
        dry_run: bool,
        wanted: impl Fn(&Digest) -> bool,
        removed: impl Fn(u64),
    ) {
        let all: Vec<Digest> = self.scrubbing.quarantined().iter().cloned().collect();
        for digest in all.iter().filter(|digest| !wanted(digest)) {
            let bytes = self.quarantined_bytes(digest);
            if dry_run || self.forget_quarantined(digest) {
                removed(bytes.unwrap_or(0));
            }
        }
    }

    /// The length of a blob that was put aside.
    pub(super) fn quarantined_bytes(&self, digest: &Digest) -> Option<u64> {
        fs::metadata(self.layout.quarantined(digest)).ok().map(|metadata| metadata.len())
    }

    pub(super) fn quarantined_count(&self) -> usize {
        self.scrubbing.count()
    }

    fn forget_quarantined(&self, digest: &Digest) -> bool {
        let was = self.scrubbing.change(|quarantined| quarantined.remove(digest));
        if was {
            let path = self.layout.quarantined(digest);
            if let Err(error) = self.dirs.remove_file(&path) {
                tracing::warn!(%error, path = %path.display(), "what was put aside of a damaged blob is not removed");
            }
        }
        was
    }

    fn scrub_behind(
        &self,
        after: Option<Digest>,
        pass: &Pass,
        done: &mut dyn FnMut(&Digest) -> Result<()>,
    ) -> Result<()> {
        let mut eye = Eye::new(pass);
        let mut unreadable = 0;
        for algorithm in Algorithm::ALL {
            let base = self.layout.blobs().join(algorithm.name());
            let behind = after.as_ref().filter(|after| after.algorithm() >= algorithm);
            if behind.is_some_and(|after| after.algorithm() > algorithm) {
                continue;
            }
            let behind = behind.map_or("", Digest::hex);
            for part in names(&base)?.iter().filter(|part| part.as_str() >= behind.get(..2).unwrap_or("")) {
                for hex in names(&base.join(part))?.iter().filter(|hex| hex.as_str() > behind) {
                    let Ok(digest) = format!("{}:{hex}", algorithm.name()).parse::<Digest>() else {
                        continue;
                    };
                    let verdict = self.look_at(&mut eye, &digest)?;
                    unreadable = if verdict == Verdict::Unreadable { unreadable + 1 } else { 0 };
                    if unreadable == UNREADABLE_RUN_MAX {
                        let context = format!("{unreadable} blobs in a row cannot be read: the disk fails");
                        return Err(Error::new(context, ErrorKind::Other.into()));
                    }
                    done(&digest)?;
                }
            }
        }
        Ok(())
    }

    /// Reads one blob, and puts it aside if it is damaged.
    fn look_at(&self, eye: &mut Eye, digest: &Digest) -> Result<Verdict> {
        let path = self.layout.blob(digest);
        let mut verdict = eye.look(&path, digest).map_err(Error::at("cannot read", &path))?;
        if verdict.is_damaged() {
            // It may have been the memory, or the way to it.
            verdict = eye.look(&path, digest).map_err(Error::at("cannot read", &path))?;
        }
        let moved = match &eye.file {
            Some(file) if verdict.is_damaged() => self.quarantine(digest, file)?,
            _ => false,
        };
        for counts in [eye.pass.counts, &self.scrubbing.seen] {
            counts.blobs.fetch_add(u64::from(verdict != Verdict::Gone), Ordering::Relaxed);
            counts.bytes.fetch_add(eye.bytes, Ordering::Relaxed);
            counts.damaged.fetch_add(u64::from(moved), Ordering::Relaxed);
        }
        if moved {
            let repositories = self.holders(digest).unwrap_or_default();
            tracing::error!(
                %digest,
                ?repositories,
                cause = ?verdict,
                "a blob is damaged on disk and is put aside; push it again"
            );
        }
        Ok(verdict)
    }

    /// Puts a damaged blob aside, unless another file has taken its place; returns whether it did.
    fn quarantine(&self, digest: &Digest, seen: &File) -> Result<bool> {
        let from = self.layout.blob(digest);
        let to = self.layout.quarantined(digest);
        let fail = |error| Error::at("cannot put aside", &from)(error);
        // Nobody builds on it meanwhile, or places it anew.
        let _exclusive = self.accepting.write().unwrap_or_else(PoisonError::into_inner);
        let Some(now) = found(fs::metadata(&from)).map_err(fail)? else { return Ok(false) };
        let seen = seen.metadata().map_err(fail)?;
        if (now.dev(), now.ino()) != (seen.dev(), seen.ino()) {
            return Ok(false);
        }
        let mut changes = self.dirs.changes();
        changes.rename(&from, &to).map_err(fail)?;
        // A crash that undoes it leaves it to the next pass.
        drop(changes);
        self.scrubbing.change(|quarantined| quarantined.insert(digest.clone()));
        self.manifests.forget(digest);
        if let Some(dir) = from.parent() {
            let _ = fs::remove_dir(dir);
        }
        Ok(true)
    }

    /// Names repositories that have a blob, the first that are found.
    fn holders(&self, digest: &Digest) -> Result<Vec<String>> {
        let mut names = Vec::new();
        walk(&self.layout.repositories(), &super::manifests::REPO_DIRS, &mut |repo: &RepoName| {
            let links = [self.layout.layer_link(repo, digest), self.layout.revision_link(repo, digest)];
            if names.len() < REPOSITORIES_SHOWN_MAX && links.iter().any(|link| link.exists()) {
                names.push(repo.to_string());
            }
            Ok(())
        })?;
        Ok(names)
    }

    fn write_cursor(&self, path: &Path, cursor: &Cursor) -> io::Result<()> {
        self.dirs.write_temp(&serde_json::to_vec(cursor)?)?.move_to(path)
    }
}

impl Scrubbing {
    /// Finds what was put aside before.
    pub(super) fn open(layout: &Layout) -> io::Result<Self> {
        let mut quarantined = HashSet::new();
        for algorithm in Algorithm::ALL {
            let dir = layout.quarantine().join(algorithm.name());
            for entry in found(fs::read_dir(dir))?.into_iter().flatten() {
                let name = entry?.file_name();
                quarantined
                    .extend(format!("{}:{}", algorithm.name(), name.to_string_lossy()).parse::<Digest>());
            }
        }
        let quarantined_count = AtomicUsize::new(quarantined.len());
        Ok(Self { quarantined: Mutex::new(quarantined), quarantined_count, ..Self::default() })
    }

    fn count(&self) -> usize {
        self.quarantined_count.load(Ordering::Relaxed)
    }

    fn change<T>(&self, change: impl FnOnce(&mut HashSet<Digest>) -> T) -> T {
        let mut quarantined = self.quarantined();
        let changed = change(&mut quarantined);
        self.quarantined_count.store(quarantined.len(), Ordering::Relaxed);
        changed
    }

    fn quarantined(&self) -> MutexGuard<'_, HashSet<Digest>> {
        self.quarantined.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was found of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Sound,
    /// It was removed meanwhile.
    Gone,
    /// Its content has another digest.
    Altered,
    /// The disk does not give it back.
    Unreadable,
}

impl Verdict {
    fn is_damaged(self) -> bool {
        matches!(self, Self::Altered | Self::Unreadable)
    }

    /// Judges what came of reading; a failure that is not the blob's ends the pass.
    fn of(digest: &Digest, read: io::Result<Option<Digest>>) -> io::Result<Self> {
        match read {
            Ok(Some(actual)) if actual == *digest => Ok(Self::Sound),
            Ok(Some(_)) => Ok(Self::Altered),
            Ok(None) => Ok(Self::Gone),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                Ok(Self::Unreadable)
            }
            Err(error) => Err(error),
        }
    }
}

/// Reads and hashes at the pass's rate.
struct Eye<'a> {
    pass: &'a Pass<'a>,
    pool: Arc<Pool>,
    /// What was looked at last. Kept open, its inode number is nobody else's.
    file: Option<File>,
    /// Bytes of it that were read.
    bytes: u64,
    pace: Pace,
}

impl<'a> Eye<'a> {
    fn new(pass: &'a Pass<'a>) -> Self {
        Self { pass, pool: Pool::new(READ_BYTES, 1, 1), file: None, bytes: 0, pace: Pace::new(pass.rate) }
    }

    fn look(&mut self, path: &Path, digest: &Digest) -> io::Result<Verdict> {
        let read = self.read(path, digest.algorithm());
        if self.pass.stop.load(Ordering::Relaxed) {
            return Err(io::Error::new(ErrorKind::Interrupted, "the scrub was stopped"));
        }
        Verdict::of(digest, read)
    }

    fn read(&mut self, path: &Path, algorithm: Algorithm) -> io::Result<Option<Digest>> {
        (self.file, self.bytes) = (None, 0);
        let Some(file) = found(File::open(path))? else { return Ok(None) };
        let file = self.file.insert(file);
        // Past the page cache: what the disk holds is what counts, and what clients read often stays in memory.
        let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0);
        let mut direct = OpenOptions::new().read(true).custom_flags(flags).open(path).ok();
        if direct.is_none() {
            // What a client reads at the same time loses its readahead; nothing else.
            let _ = rustix::fs::fadvise(&*file, 0, None, Advice::Sequential);
        }
        let mut buffer = self.pool.get_extra();
        let mut hasher = Hasher::new(algorithm);
        loop {
            let read = match &direct {
                Some(direct) => direct.read_at(buffer.as_mut(), self.bytes),
                None => file.read_at(buffer.as_mut(), self.bytes),
            };
            let read = match read {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // Some filesystems let a file be opened so, and then not be read.
                Err(error) if error.kind() == ErrorKind::InvalidInput && direct.take().is_some() => continue,
                read => read?,
            };
            hasher.update(buffer.as_mut().get(..read).unwrap_or_default());
            self.bytes += read as u64;
            if direct.is_none() {
                let length = std::num::NonZero::new(self.bytes);
                let _ = rustix::fs::fadvise(&*file, 0, length, Advice::DontNeed);
            }
            let stopped = self.pace.spend(read as u64, self.pass.stop);
            // The end of a file is no whole piece, and what lies behind it cannot be read so.
            if read == 0 || stopped || (direct.is_some() && !read.is_multiple_of(ALIGN_BYTES)) {
                break;
            }
        }
        self.pace.spend(BLOB_BYTES_MIN.saturating_sub(self.bytes), self.pass.stop);
        Ok(Some(hasher.finish()))
    }
}

/// The names in a directory, in order.
fn names(dir: &Path) -> Result<Vec<String>> {
    let list = || -> io::Result<Vec<String>> {
        let Some(entries) = found(fs::read_dir(dir))? else { return Ok(Vec::new()) };
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    let mut names = list().map_err(Error::at("cannot list", dir))?;
    names.sort_unstable();
    Ok(names)
}

/// Reads a cursor; what is none is the beginning.
fn read_cursor(path: &Path) -> io::Result<Cursor> {
    match found(super::manifests::read_at_most(path, CURSOR_BYTES_MAX)) {
        Ok(bytes) => Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()),
        Err(error) if error.kind() == ErrorKind::FileTooLarge => Ok(Cursor::default()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::names::Tag;
    use crate::storage::collect::Grace;
    use crate::storage::testing::storage;
    use crate::store::Manifest;

    static RUN: AtomicBool = AtomicBool::new(false);

    fn repo() -> RepoName {
        RepoName::parse("a/b").unwrap()
    }

    fn push(storage: &Storage, content: &[u8]) -> Digest {
        let digest = Digest::of(Algorithm::Sha256, content);
        storage.store_blob(&repo(), content, &digest).unwrap();
        digest
    }

    fn scrub(storage: &Storage) -> [u64; 3] {
        let counts = Counts::default();
        storage.scrub(&Pass { rate: None, counts: &counts, stop: &RUN }).unwrap();
        [&counts.blobs, &counts.bytes, &counts.damaged].map(|counter| counter.load(Ordering::Relaxed))
    }

    #[test]
    fn a_damaged_blob_is_put_aside_and_a_push_heals_it() {
        let (root, storage) = storage();
        let sound = push(&storage, b"sound");
        let long = vec![7; 3 * READ_BYTES + 5];
        let other = push(&storage, &long);
        assert_eq!(scrub(&storage), [2, 5 + long.len() as u64, 0]);
        for damage in [&b"sounb"[..], b"soun", b""] {
            fs::write(storage.layout.blob(&sound), damage).unwrap();
            assert_eq!(scrub(&storage)[2], 1);
            assert_eq!(storage.stat_blob(&repo(), &sound).unwrap(), None);
            assert!(storage.mount_blob(&repo(), &RepoName::parse("c").unwrap(), &sound).unwrap().is_none());
            assert_eq!(fs::read(storage.layout.quarantined(&sound)).unwrap(), damage);
            assert_eq!(scrub(&storage), [1, long.len() as u64, 0], "what was put aside is not looked at");
            push(&storage, b"sound");
            assert_eq!(storage.stat_blob(&repo(), &sound).unwrap(), Some(5));
            assert!(!storage.layout.quarantined(&sound).exists());
            assert_eq!(storage.quarantined_count(), 0);
        }
        fs::write(storage.layout.blob(&other), b"x").unwrap();
        scrub(&storage);
        drop(storage);
        let storage = Storage::open(root.path(), Grace::default()).unwrap();
        assert!(storage.is_quarantined(&other), "after a restart too");
        push(&storage, &long);
        assert!(!storage.is_quarantined(&other) && !storage.layout.quarantined(&other).exists());
    }

    #[test]
    fn a_damaged_manifest_is_no_longer_served_from_memory() {
        let (_root, storage) = storage();
        let bytes = Bytes::from_static(b"{}");
        let digest = Digest::of(Algorithm::Sha256, &bytes);
        let put = || {
            let manifest = Manifest { digest: digest.clone(), bytes: bytes.clone(), media_type: "x".into() };
            storage.put_manifest(&repo(), manifest, Tag::parse("v").as_slice(), None).unwrap();
        };
        put();
        fs::write(storage.layout.blob(&digest), b"{]").unwrap();
        assert!(storage.manifest(&repo(), &digest).unwrap().is_some(), "it is in memory");
        assert_eq!(scrub(&storage)[2], 1);
        assert!(storage.manifest(&repo(), &digest).unwrap().is_none());
        put();
        assert!(storage.manifest(&repo(), &digest).unwrap().is_some());
        assert_eq!((scrub(&storage)[2], storage.quarantined_count()), (0, 0));
    }

    #[test]
    fn a_blob_that_was_replaced_meanwhile_is_not_put_aside() {
        let (_root, storage) = storage();
        let digest = push(&storage, b"content");
        fs::write(storage.layout.blob(&digest), b"damaged").unwrap();
        let seen = File::open(storage.layout.blob(&digest)).unwrap();
        push(&storage, b"content");
        assert!(!storage.quarantine(&digest, &seen).unwrap());
        assert_eq!(storage.stat_blob(&repo(), &digest).unwrap(), Some(7));
        fs::remove_file(storage.layout.blob(&digest)).unwrap();
        assert!(!storage.quarantine(&digest, &seen).unwrap());
    }

    #[test]
    fn a_pass_that_was_stopped_goes_on_after_a_restart() {
        let (root, storage) = storage();
        let mut digests: Vec<_> = (0..40).map(|n: u32| push(&storage, &n.to_be_bytes())).collect();
        digests.sort();
        let (counts, stop) = (Counts::default(), AtomicBool::new(false));
        let pass = Pass { rate: None, counts: &counts, stop: &stop };
        let mut seen = 0;
        // The fifth blob is where somebody pulls the plug.
        let stopped = storage.scrub_behind(None, &pass, &mut |_| {
            seen += 1;
            stop.store(seen == 5, Ordering::Relaxed);
            Ok(())
        });
        assert!(stopped.is_err());
        stop.store(true, Ordering::Relaxed);
        storage.scrub_on(&pass, Duration::from_secs(1000)).unwrap_err();
        let begun = read_cursor(&storage.layout.scrub_cursor()).unwrap().begun;
        let path = storage.layout.scrub_cursor();
        let cursor = Cursor { begun, after: Some(digests[4].to_string()), finished: false };
        storage.write_cursor(&path, &cursor).unwrap();
        drop(storage);
        let storage = Storage::open(root.path(), Grace::default()).unwrap();
        let counts = Counts::default();
        let pass = Pass { rate: None, counts: &counts, stop: &RUN };
        let next = storage.scrub_on(&pass, Duration::from_secs(1000)).unwrap();
        assert_eq!(counts.blobs.load(Ordering::Relaxed), 35);
        assert!(next <= Duration::from_secs(1000) && next > Duration::from_secs(900));
        // The next one is not due.
        assert!(storage.scrub_on(&pass, Duration::from_secs(1000)).unwrap() <= Duration::from_secs(1000));
        assert_eq!(counts.blobs.load(Ordering::Relaxed), 35);
        storage.scrub_on(&pass, Duration::ZERO).unwrap();
        assert_eq!(counts.blobs.load(Ordering::Relaxed), 75);
        for torn in [&b""[..], b"{", &[b'x'; 5000]] {
            fs::write(&path, torn).unwrap();
            assert_eq!(read_cursor(&path).unwrap(), Cursor::default());
        }
    }

    #[test]
    fn only_what_the_disk_does_not_give_back_is_unreadable() {
        let digest = Digest::of(Algorithm::Sha256, b"x");
        let failed = |errno: rustix::io::Errno| Verdict::of(&digest, Err(errno.into()));
        assert_eq!(failed(rustix::io::Errno::IO).unwrap(), Verdict::Unreadable);
        failed(rustix::io::Errno::MFILE).unwrap_err();
        assert_eq!(Verdict::of(&digest, Ok(Some(digest.clone()))).unwrap(), Verdict::Sound);
        assert_eq!(Verdict::of(&digest, Ok(None)).unwrap(), Verdict::Gone);
    }
}
