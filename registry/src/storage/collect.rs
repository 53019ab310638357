//! Garbage collection while the registry serves.
//!
//! A blob is garbage when no repository has it, and a repository's link to a blob is garbage when none of its manifests
//! refers to it. Both only once they are old: a client that was told that a blob is there has at least [half the grace
//! period](Grace) to push the manifest that refers to it.
//!
//! ```text
//!  begin ──> mark, for each repository:  rules (retain.rs) ──> manifests ──> what they refer to ──> other old links: remove
//!    │                                                             └──── digests that have a link ────┐
//!    └─> cutoff = begin - grace                                                                       v
//!        sweep, for each blob:                                  not among them, and old: remove <── live
//! ```
//!
//! Repositories, and then the directories of blobs, are gone through by several threads: what they wait for is the disk.
//!
//! Why nothing that is wanted is lost, and what holds the two sides apart ([`Storage::accepting`]), is argued in
//! `docs/garbage-collection.md`; `interleavings` tries all of a model of it.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, SystemTime};

use super::blobs::{found, link_target};
use super::manifests::{REPO_DIRS, read_at_most, walk};
use super::pace::Pace;
use super::{Error, Result, Storage};
use crate::digest::{Algorithm, Digest};
use crate::lock;
use crate::model;
use crate::names::RepoName;
use crate::store::MANIFEST_BYTES_MAX;
use crate::store::collect::{Counts, Options};

/// Removals under one hold of the lock that keeps pushes out.
const BATCH_REMOVALS_MAX: usize = 128;
/// Threads that look and remove at a time; more of them than cores, as they wait for the disk.
const THREADS: usize = 24;
/// Repositories, or directories of blobs, that wait for a thread.
const QUEUE_MAX: usize = 2 * THREADS;

/// How old what nothing refers to must be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grace(Duration);

impl Default for Grace {
    fn default() -> Self {
        Self::new(Duration::from_secs(3600))
    }
}

impl Grace {
    /// Shorter ones would be lost in the steps in which kernels count the time of files.
    const MIN: Duration = Duration::from_millis(200);

    pub(crate) fn new(grace: Duration) -> Self {
        Self(grace.max(Self::MIN))
    }

    pub(super) fn period(self) -> Duration {
        self.0
    }

    /// Whether what was last touched at `then` has to be touched again, so that it counts as new for at least half of
    /// the period from `now` on. A time ahead of us was written under another clock.
    fn is_due(self, then: SystemTime, now: SystemTime) -> bool {
        now.duration_since(then).map_or(true, |age| age >= self.0 / 2)
    }
}

impl Storage {
    /// Keeps the collector from removing anything, from the look at what a push builds on until it is placed.
    ///
    /// Taken before `deleting` and `placing`.
    pub(crate) fn accepting(&self) -> std::sync::RwLockReadGuard<'_, ()> {
        self.accepting.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `visit` with the digest of every link of a repository to a blob.
    pub(crate) fn each_layer(&self, repo: &RepoName, visit: impl FnMut(Digest) -> Result<()>) -> Result<()> {
        each_digest(&self.layout.layers(repo), visit)
    }

    /// Calls `visit` with the digest of every manifest of a repository.
    pub(crate) fn each_revision(
        &self,
        repo: &RepoName,
        mut visit: impl FnMut(Digest) -> Result<()>,
    ) -> Result<()> {
        each_digest(&self.layout.revisions(repo), |digest| match self.has_revision(repo, &digest)? {
            true => visit(digest),
            // The directory of one that was deleted.
            false => Ok(()),
        })
    }

    /// Makes what is at `path` count as new to the collector.
    pub(super) fn touch(&self, path: &Path) -> Result<()> {
        let touch = || {
            let now = SystemTime::now();
            if self.relink.load(Ordering::SeqCst) > 0
                || self.grace.is_due(fs::metadata(path)?.modified()?, now)
            {
                fs::File::options().write(true).open(path)?.set_modified(now)?;
            }
            Ok(())
        };
        touch().map_err(Error::at("cannot touch", path))
    }

    /// Fails unless the filesystem, which may be another machine's, agrees with us about the time.
    fn check_clock(&self) -> Result<()> {
        let path = self.dirs.temp_path();
        let look = || {
            fs::write(&path, b"")?;
            let theirs = fs::metadata(&path)?.modified();
            fs::remove_file(&path)?;
            theirs
        };
        let (theirs, ours) = (look().map_err(Error::at("cannot write", &path))?, SystemTime::now());
        let apart = ours.duration_since(theirs).unwrap_or_else(|error| error.duration());
        if apart >= self.grace.0 / 4 {
            let context =
                format!("the filesystem's clock is {apart:?} from this machine's; set the clocks right");
            return Err(Error::new(context, ErrorKind::InvalidData.into()));
        }
        Ok(())
    }

    /// Removes garbage; `None` if a collection is running. Blocks, for minutes if there are millions of blobs.
    ///
    /// # Errors
    /// When `stop` is set, or the filesystem fails; what was removed by then stays removed, and the next run goes on.
    pub(crate) fn collect(
        &self,
        options: &Options,
        counts: &Counts,
        stop: &AtomicBool,
    ) -> Result<Option<()>> {
        let Ok(_running) = self.collecting.try_lock() else { return Ok(None) };
        self.check_clock()?;
        let run = Run::begin(self, options, counts, stop);
        run.mark()?;
        run.sweep()?;
        Ok(Some(()))
    }
}

/// One collection.
pub(super) struct Run<'a> {
    pub(super) storage: &'a Storage,
    pub(super) options: &'a Options,
    pub(super) counts: &'a Counts,
    stop: &'a AtomicBool,
    /// Set when one of the threads has failed.
    failed: AtomicBool,
    pub(super) begun: SystemTime,
    /// What was touched since is new.
    pub(super) cutoff: SystemTime,
    /// Digests that a repository has, by their first 128 bits. Two that agree in them can only keep garbage.
    live: Mutex<Vec<u128>>,
    pace: Mutex<Pace>,
    /// Held by the thread that removes.
    turn: Mutex<()>,
}

/// A file that is garbage, if it is still old when its turn comes.
struct Doomed {
    path: PathBuf,
    /// What it stands for, or holds.
    target: u128,
}

impl<'a> Run<'a> {
    fn begin(storage: &'a Storage, options: &'a Options, counts: &'a Counts, stop: &'a AtomicBool) -> Self {
        // Whoever looked at something earlier has placed what is built on it.
        let all = storage.accepting.write().unwrap_or_else(PoisonError::into_inner);
        let begun = SystemTime::now();
        drop(all);
        let cutoff = begun.checked_sub(storage.grace.0).unwrap_or(SystemTime::UNIX_EPOCH);
        let pace = Mutex::new(Pace::new(Some(options.removals_per_second.into())));
        let (failed, live) = (AtomicBool::default(), Mutex::default());
        Self { storage, options, counts, stop, failed, begun, cutoff, live, pace, turn: Mutex::default() }
    }

    fn mark(&self) -> Result<()> {
        if let (Some(before), false) = (self.given_up(), self.options.dry_run) {
            self.storage.forget_pending_uploads(before);
        }
        let base = self.storage.layout.repositories();
        self.on_threads(
            |hand_out| {
                walk(&base, &["_layers", "_manifests", "_uploads"], &mut |repo| hand_out(repo.clone()))
            },
            |repo| {
                let has_something = self.mark_repo(&repo)?;
                self.collect_uploads(&repo)?;
                match has_something {
                    true => Ok(()),
                    false => self.forget_empty(&repo),
                }
            },
        )?;
        let mut live = lock(&self.live);
        live.sort_unstable();
        live.dedup();
        Ok(())
    }

    /// Has several threads work on what `source` hands out, until all is done or one of them fails.
    fn on_threads<T: Send>(
        &self,
        source: impl FnOnce(&mut dyn FnMut(T) -> Result<()>) -> Result<()>,
        work: impl Fn(T) -> Result<()> + Sync,
    ) -> Result<()> {
        let (sender, receiver) = mpsc::sync_channel(QUEUE_MAX);
        let receiver = Mutex::new(receiver);
        let next = || lock(&receiver).recv().ok();
        let worker = || {
            let mut done = Ok(());
            // When one has failed, all take what is still handed out, and that ends soon.
            while let Some(item) = next() {
                if self.failed.load(Ordering::Relaxed) {
                    continue;
                }
                if let Err(error) = work(item)
                    && !self.failed.swap(true, Ordering::Relaxed)
                {
                    done = Err(error);
                }
            }
            done
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..THREADS).map(|_| scope.spawn(worker)).collect();
            let handed_out = source(&mut |item| {
                self.check()?;
                sender.send(item).map_err(|_| Error::other("a collecting thread ended early"))
            });
            drop(sender);
            let mut done = Ok(());
            for worker in workers {
                let ended = worker.join();
                done =
                    done.and(ended.unwrap_or_else(|_| Err(Error::other("a collecting thread ended early"))));
            }
            done.and(handed_out)
        })
    }

    /// Notes what a repository has, and removes its links to blobs that none of its manifests refers to; returns whether
    /// anything is left.
    fn mark_repo(&self, repo: &RepoName) -> Result<bool> {
        count(&self.counts.repositories, 1);
        let storage = self.storage;
        let gone = self.retain(repo)?;
        let (mut live, mut referenced) = (Vec::new(), Vec::new());
        let mut all_are_read = true;
        each_digest(&storage.layout.revisions(repo), |digest| {
            self.check()?;
            if !storage.has_revision(repo, &digest)? {
                return self.clear(&storage.layout.revision_link(repo, &digest));
            }
            // Of a dry run.
            if gone.contains(&digest) {
                return Ok(());
            }
            count(&self.counts.manifests, 1);
            live.push(key(&digest));
            match references(storage, &digest)? {
                Some(digests) => referenced.extend(digests.iter().map(key)),
                None => all_are_read = false,
            }
            Ok(())
        })?;
        if !all_are_read {
            tracing::warn!(%repo, "a manifest cannot be read, so that all blobs of its repository are kept");
        }
        referenced.sort_unstable();
        referenced.dedup();
        let mut doomed = Vec::new();
        storage.each_layer(repo, |digest| {
            self.check()?;
            let path = storage.layout.layer_link(repo, &digest);
            let Some(target) = link_target(&path, &digest)?.as_ref().map(key) else { return Ok(()) };
            let wanted = |key: u128| referenced.binary_search(&key).is_ok();
            if !all_are_read || wanted(key(&digest)) || wanted(target) {
                live.push(target);
                return Ok(());
            }
            doomed.push(Doomed { path, target });
            match doomed.len() < BATCH_REMOVALS_MAX {
                true => Ok(()),
                false => self.remove_links(repo, &mut doomed).map(|kept| live.extend(kept)),
            }
        })?;
        live.extend(self.remove_links(repo, &mut doomed)?);
        let has_something = !live.is_empty();
        lock(&self.live).extend(live);
        Ok(has_something)
    }

    fn remove_links(&self, repo: &RepoName, doomed: &mut Vec<Doomed>) -> Result<Vec<u128>> {
        self.remove(Some(repo), doomed, |_| count(&self.counts.removed_links, 1))
    }

    fn sweep(&self) -> Result<()> {
        let live = lock(&self.live);
        let is_live = |digest: &Digest| live.binary_search(&key(digest)).is_ok();
        let removed = |bytes| {
            count(&self.counts.removed_blobs, 1);
            count(&self.counts.freed_bytes, bytes);
        };
        self.on_threads(
            |hand_out| each_part(&self.storage.layout.blobs(), hand_out),
            |part| self.sweep_part(&part, is_live, removed),
        )?;
        self.storage.collect_quarantined(self.options.dry_run, is_live, removed);
        Ok(())
    }

    /// Removes the blobs of one directory that no repository has.
    fn sweep_part(
        &self,
        part: &Part,
        is_live: impl Fn(&Digest) -> bool,
        removed: impl Fn(u64) + Copy,
    ) -> Result<()> {
        let mut doomed = Vec::new();
        part.each_blob(|digest| {
            self.check()?;
            count(&self.counts.blobs, 1);
            if !is_live(&digest) {
                doomed.push(Doomed { path: self.storage.layout.blob(&digest), target: key(&digest) });
            }
            match doomed.len() < BATCH_REMOVALS_MAX {
                true => Ok(()),
                false => self.remove(None, &mut doomed, removed).map(drop),
            }
        })?;
        self.remove(None, &mut doomed, removed).map(drop)
    }

    /// Removes the files that are old, each with its directory, and calls `removed` with its length; returns what the
    /// others stand for. Nothing is synced: a removal that a crash undoes is done again by the next run.
    ///
    /// With the lock held the directories are only moved away: to free what they take waits for the disk.
    ///
    /// `of` is the repository whose links the files are.
    fn remove(
        &self,
        of: Option<&RepoName>,
        doomed: &mut Vec<Doomed>,
        removed: impl Fn(u64),
    ) -> Result<Vec<u128>> {
        let mut kept = Vec::new();
        // What is new stays new. And to have looked at a file once before makes the hold short.
        for Doomed { path, target } in mem::take(doomed) {
            match self.look(&path)? {
                Look::New => kept.push(target),
                Look::Gone => self.clear(&path)?,
                Look::Old(_) => doomed.push(Doomed { path, target }),
            }
        }
        if doomed.is_empty() {
            return Ok(kept);
        }
        let grave = self.storage.dirs.temp_path();
        if !self.options.dry_run {
            fs::create_dir(&grave).map_err(Error::at("cannot make", &grave))?;
        }
        let mut removals = 0;
        // One at a time, so that those who push find the lock free between two of us.
        let turn = lock(&self.turn);
        let exclusive = self.storage.accepting.write().unwrap_or_else(PoisonError::into_inner);
        if SystemTime::now() < self.begun {
            let context = "the clock was set back during the collection";
            return Err(Error::new(context, ErrorKind::Interrupted.into()));
        }
        for Doomed { path, target } in doomed.drain(..) {
            let bytes = match self.look(&path)? {
                Look::New => {
                    kept.push(target);
                    continue;
                }
                Look::Gone => {
                    self.clear(&path)?;
                    continue;
                }
                Look::Old(bytes) => bytes,
            };
            if !self.options.dry_run {
                let place = grave.join(removals.to_string());
                let bury = || path.parent().map_or(Ok(()), |dir| fs::rename(dir, place));
                match of {
                    Some(repo) => self.storage.quotas.removing(repo, target, bury).map(drop),
                    None => bury(),
                }
                .map_err(Error::at("cannot collect", &path))?;
                removals += 1;
            }
            removed(bytes);
        }
        drop(exclusive);
        drop(turn);
        if !self.options.dry_run {
            fs::remove_dir_all(&grave).map_err(Error::at("cannot remove", &grave))?;
        }
        self.pace(removals);
        Ok(kept)
    }

    fn look(&self, path: &Path) -> Result<Look> {
        let fail = |error| Error::at("cannot collect", path)(error);
        let Some(metadata) = found(fs::symlink_metadata(path)).map_err(fail)? else { return Ok(Look::Gone) };
        match metadata.modified().map_err(fail)? >= self.cutoff {
            true => Ok(Look::New),
            false => Ok(Look::Old(metadata.len())),
        }
    }

    /// Keeps all threads together to the rate.
    fn pace(&self, removals: u64) {
        lock(&self.pace).spend(removals, self.stop);
    }

    /// Removes the directory that an earlier removal, or a deletion, has left of what is not at `path` any more.
    fn clear(&self, path: &Path) -> Result<()> {
        match self.options.dry_run {
            true => Ok(()),
            false => remove_empty(path.parent()).map_err(Error::at("cannot collect", path)),
        }
    }

    /// Gives up uploads in which nothing has happened for long.
    fn collect_uploads(&self, repo: &RepoName) -> Result<()> {
        let Some(before) = self.given_up() else { return Ok(()) };
        let base = self.storage.layout.uploads(repo);
        for entry in
            found(fs::read_dir(&base)).map_err(Error::at("cannot list", &base))?.into_iter().flatten()
        {
            self.check()?;
            let entry = entry.map_err(Error::at("cannot list", &base))?;
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let given_up = self.storage.give_up_upload(repo, id, before, self.options.dry_run)?;
            if let Some(bytes) = given_up {
                count(&self.counts.removed_uploads, 1);
                count(&self.counts.freed_bytes, bytes);
                self.pace(1);
            }
        }
        Ok(())
    }

    /// Removes the directories of a repository that has nothing any more, so that catalogues do not list it.
    fn forget_empty(&self, repo: &RepoName) -> Result<()> {
        if self.options.dry_run {
            return Ok(());
        }
        let dir = self.storage.layout.repo(repo);
        let _exclusive = self.storage.accepting.write().unwrap_or_else(PoisonError::into_inner);
        let forgotten = self.storage.dirs.remove_empty(&dir, &REPO_DIRS, &["_uploads"]);
        if forgotten.map_err(Error::at("cannot remove", &dir))? {
            count(&self.counts.removed_repositories, 1);
        }
        Ok(())
    }

    /// The last activity of uploads that are given up.
    fn given_up(&self) -> Option<SystemTime> {
        self.begun.checked_sub(self.options.upload_age)
    }

    pub(super) fn check(&self) -> Result<()> {
        match self.stop.load(Ordering::Relaxed) || self.failed.load(Ordering::Relaxed) {
            true => Err(Error::new("the collection was stopped", ErrorKind::Interrupted.into())),
            false => Ok(()),
        }
    }
}

/// How a file looks that is garbage if it is old.
enum Look {
    Gone,
    /// Somebody has touched it since the cutoff.
    New,
    /// Its bytes.
    Old(u64),
}

/// What a stored manifest refers to; `None` if it is damaged or of an unknown kind.
fn references(storage: &Storage, digest: &Digest) -> Result<Option<Vec<Digest>>> {
    let path = storage.layout.blob(digest);
    let bytes = match read_at_most(&path, MANIFEST_BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::FileTooLarge => return Ok(None),
        // It comes back with the next push, and then needs what it referred to.
        Err(error) if error.kind() == ErrorKind::NotFound && storage.is_quarantined(digest) => {
            return Ok(None);
        }
        // A link without content: no client can have it, and what it referred to is not known.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Some(Vec::new())),
        Err(error) => return Err(Error::at("cannot read", &path)(error)),
    };
    if Digest::of(digest.algorithm(), &bytes) != *digest {
        return Ok(None);
    }
    Ok(model::references(&bytes))
}

/// Calls `visit` for every `<alg>/<hex>` below `base`.
fn each_digest(base: &Path, mut visit: impl FnMut(Digest) -> Result<()>) -> Result<()> {
    for algorithm in Algorithm::ALL {
        each_name(&base.join(algorithm.name()), |hex| match digest(algorithm, hex) {
            Some(digest) => visit(digest),
            None => Ok(()),
        })?;
    }
    Ok(())
}

/// One of the directories that blobs are spread over, `<alg>/<2 hex>`.
struct Part {
    algorithm: Algorithm,
    dir: PathBuf,
}

impl Part {
    /// Calls `visit` for every `<hex>` in it.
    fn each_blob(&self, mut visit: impl FnMut(Digest) -> Result<()>) -> Result<()> {
        let prefix = self.dir.file_name().and_then(OsStr::to_str).unwrap_or_default();
        each_name(&self.dir, |hex| match digest(self.algorithm, hex) {
            Some(digest) if hex.starts_with(prefix) => visit(digest),
            _ => Ok(()),
        })
    }
}

/// Calls `visit` for every directory of blobs below `base`.
fn each_part(base: &Path, visit: &mut dyn FnMut(Part) -> Result<()>) -> Result<()> {
    for algorithm in Algorithm::ALL {
        let base = base.join(algorithm.name());
        each_name(&base, |part| visit(Part { algorithm, dir: base.join(part) }))?;
    }
    Ok(())
}

fn each_name(dir: &Path, mut visit: impl FnMut(&str) -> Result<()>) -> Result<()> {
    for entry in found(fs::read_dir(dir)).map_err(Error::at("cannot list", dir))?.into_iter().flatten() {
        let entry = entry.map_err(Error::at("cannot list", dir))?;
        if let Some(name) = entry.file_name().to_str() {
            visit(name)?;
        }
    }
    Ok(())
}

fn digest(algorithm: Algorithm, hex: &str) -> Option<Digest> {
    format!("{}:{hex}", algorithm.name()).parse().ok()
}

/// The first 128 bits of a digest.
pub(crate) fn key(digest: &Digest) -> u128 {
    // A digest has at least 32 digits.
    digest.hex().get(..32).and_then(|hex| u128::from_str_radix(hex, 16).ok()).unwrap_or_default()
}

fn remove_empty(dir: Option<&Path>) -> io::Result<()> {
    let Some(dir) = dir else { return Ok(()) };
    match fs::remove_dir(dir) {
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty) => {
            Err(error)
        }
        _ => Ok(()),
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

#[cfg(test)]
mod interleavings;

#[cfg(test)]
mod tests;
