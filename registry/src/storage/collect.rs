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
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, SystemTime};

use super::blobs::{found, read_link};
use super::manifests::{MANIFEST_BYTES_MAX, REPO_DIRS, read_at_most, walk};
use super::pace::Pace;
use super::{Error, Result, Storage};
use crate::digest::{Algorithm, Digest};
use crate::model;
use crate::names::RepoName;
use crate::rules::Rules;

/// Removals under one hold of the lock that keeps pushes out.
const BATCH_REMOVALS_MAX: usize = 128;
/// Threads that look and remove at a time; more of them than cores, as they wait for the disk.
const THREADS: usize = 6;
/// Repositories, or directories of blobs, that wait for a thread.
const QUEUE_MAX: usize = 2 * THREADS;

/// How a collection is run.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// What of the repositories is kept.
    pub(crate) rules: Arc<Rules>,
    /// Uploads in which nothing happened for so long are given up.
    pub(crate) upload_age: Duration,
    /// Only tells what would be removed.
    pub(crate) dry_run: bool,
    /// Files removed per second, at most.
    pub(crate) removals_per_second: u32,
}

/// What a collection found and removed; the dry run only found it.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) repositories: AtomicU64,
    pub(crate) manifests: AtomicU64,
    pub(crate) blobs: AtomicU64,
    pub(crate) removed_tags: AtomicU64,
    pub(crate) removed_manifests: AtomicU64,
    pub(crate) removed_links: AtomicU64,
    pub(crate) removed_blobs: AtomicU64,
    pub(crate) removed_uploads: AtomicU64,
    /// Bytes of the removed blobs and uploads.
    pub(crate) freed_bytes: AtomicU64,
    pub(crate) removed_repositories: AtomicU64,
}

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
        Self { storage, options, counts, stop, failed, begun, cutoff, live, pace }
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
                self.mark_repo(&repo)?;
                self.collect_uploads(&repo)?;
                self.forget_empty(&repo)
            },
        )?;
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
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
        let next = || receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().ok();
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

    /// Notes what a repository has, and removes its links to blobs that none of its manifests refers to.
    fn mark_repo(&self, repo: &RepoName) -> Result<()> {
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
            // Only the link of another algorithm's digest names something else than it is called.
            let target = match digest.algorithm() {
                Algorithm::Sha256 => Some(digest.clone()),
                Algorithm::Sha512 => read_link(&path)?,
            };
            let Some(target) = target.as_ref().map(key) else { return Ok(()) };
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
        self.live.lock().unwrap_or_else(PoisonError::into_inner).extend(live);
        Ok(())
    }

    fn remove_links(&self, repo: &RepoName, doomed: &mut Vec<Doomed>) -> Result<Vec<u128>> {
        self.remove(Some(repo), doomed, |_| count(&self.counts.removed_links, 1))
    }

    fn sweep(&self) -> Result<()> {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
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
        let mut removals = 0;
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
                let fail = |error| Error::at("cannot collect", &path)(error);
                match of {
                    Some(repo) => self.storage.quotas.removing(repo, &path, target).map(drop),
                    None => fs::remove_file(&path),
                }
                .map_err(fail)?;
                remove_empty(path.parent()).map_err(fail)?;
                removals += 1;
            }
            removed(bytes);
        }
        drop(exclusive);
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
        self.pace.lock().unwrap_or_else(PoisonError::into_inner).spend(removals, self.stop);
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
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::names::Tag;
    use crate::storage::manifests::Manifest;
    use crate::storage::scrub;

    fn options() -> Options {
        Options {
            rules: Arc::default(),
            upload_age: Duration::from_secs(7 * 86_400),
            dry_run: false,
            removals_per_second: u32::MAX,
        }
    }

    fn repo(name: &str) -> RepoName {
        RepoName::parse(name).unwrap()
    }

    fn push_blob(storage: &Storage, repo: &RepoName, content: &str) -> Digest {
        let digest = Digest::of(Algorithm::Sha256, content.as_bytes());
        storage.store_blob(repo, content.as_bytes(), &digest).unwrap();
        digest
    }

    fn push_manifest(storage: &Storage, repo: &RepoName, bytes: String, tag: Option<&str>) -> Digest {
        let digest = Digest::of(Algorithm::Sha256, bytes.as_bytes());
        let manifest = Manifest {
            digest: digest.clone(),
            bytes: Bytes::from(bytes),
            media_type: model::OCI_MANIFEST.into(),
        };
        storage.put_manifest(repo, manifest, tag.and_then(Tag::parse).as_slice(), None).unwrap();
        digest
    }

    fn image(config: &Digest, layers: &[&Digest]) -> String {
        let layers: Vec<_> =
            layers.iter().map(|digest| serde_json::json!({"digest": digest.as_str()})).collect();
        serde_json::json!({"schemaVersion": 2, "config": {"digest": config.as_str()}, "layers": layers})
            .to_string()
    }

    /// Makes everything there is old.
    fn age(storage: &Storage) {
        let old = SystemTime::now() - Duration::from_secs(100 * 86_400);
        let mut dirs = vec![storage.layout.root().to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                fs::File::open(&path).unwrap().set_modified(old).unwrap();
                if path.is_dir() {
                    dirs.push(path);
                }
            }
        }
    }

    fn collect(storage: &Storage, options: &Options) -> Counts {
        let counts = Counts::default();
        storage.collect(options, &counts, &AtomicBool::new(false)).unwrap().unwrap();
        counts
    }

    fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }

    fn storage() -> (tempfile::TempDir, Storage) {
        let root = tempfile::tempdir().unwrap();
        let storage = Storage::open(root.path(), Grace::default()).unwrap();
        (root, storage)
    }

    #[test]
    fn what_a_manifest_needs_stays_and_the_rest_goes_when_it_is_old() {
        let (_root, storage) = storage();
        let (a, b) = (repo("a"), repo("b/c"));
        let config = push_blob(&storage, &a, "config");
        let layer = push_blob(&storage, &a, "layer");
        let manifest = push_manifest(&storage, &a, image(&config, &[&layer]), Some("v1"));
        let loose = push_blob(&storage, &a, "loose");
        let everywhere = push_blob(&storage, &a, "in both");
        push_blob(&storage, &b, "in both");
        let needed = push_manifest(&storage, &b, image(&everywhere, &[]), None);

        let counts = collect(&storage, &options());
        assert_eq!((get(&counts.removed_blobs), get(&counts.removed_links)), (0, 0), "all is new");

        age(&storage);
        let counts = collect(&storage, &Options { dry_run: true, ..options() });
        let told = |counts: &Counts| {
            [&counts.removed_blobs, &counts.removed_links, &counts.freed_bytes, &counts.blobs].map(get)
        };
        assert_eq!(told(&counts), [1, 2, 5, 6]);
        assert!(storage.stat_blob(&a, &loose).unwrap().is_some(), "it was a dry run");

        assert_eq!(told(&collect(&storage, &options())), [1, 2, 5, 6]);
        assert!(!storage.layout.blob(&loose).parent().unwrap().exists());
        assert_eq!(storage.stat_blob(&a, &loose).unwrap(), None);
        assert_eq!(
            storage.stat_blob(&a, &everywhere).unwrap(),
            None,
            "no manifest of this repository needs it"
        );
        for (repo, digest) in [(&a, &config), (&a, &layer), (&b, &everywhere)] {
            assert!(storage.stat_blob(repo, digest).unwrap().is_some());
        }
        assert!(storage.manifest(&a, &manifest).unwrap().is_some());

        assert!(storage.delete_manifest(&b, &needed).unwrap().is_some());
        age(&storage);
        let counts = collect(&storage, &options());
        assert_eq!(told(&counts)[..2], [2, 1], "the manifest itself, and what it alone needed");
        assert_eq!(get(&counts.removed_repositories), 1);
        assert_eq!(storage.repositories(None, 10).unwrap().names, ["a"]);
        push_blob(&storage, &b, "again");
        assert_eq!(storage.repositories(None, 10).unwrap().names, ["a", "b/c"]);
    }

    #[test]
    fn what_a_client_was_told_is_there_stays_until_it_can_build_on_it() {
        let (_root, storage) = storage();
        let (a, b) = (repo("a"), repo("b"));
        let seen = push_blob(&storage, &a, "seen");
        let mounted = push_blob(&storage, &a, "mounted");
        age(&storage);
        storage.claim_blob(&a, &seen).unwrap().unwrap();
        assert!(storage.mount_blob(&a, &b, &mounted).unwrap());
        collect(&storage, &options());
        assert!(storage.stat_blob(&a, &seen).unwrap().is_some());
        assert!(storage.stat_blob(&b, &mounted).unwrap().is_some());
        assert_eq!(storage.stat_blob(&a, &mounted).unwrap(), None);
    }

    #[test]
    fn a_manifest_that_cannot_be_read_keeps_all_blobs_of_its_repository() {
        for damage in [&b"{}x"[..], b""] {
            let (_root, storage) = storage();
            let a = repo("a");
            let layer = push_blob(&storage, &a, "layer");
            let manifest = push_manifest(&storage, &a, image(&layer, &[]), Some("v"));
            fs::write(storage.layout.blob(&manifest), damage).unwrap();
            age(&storage);
            collect(&storage, &options());
            assert!(storage.stat_blob(&a, &layer).unwrap().is_some());
        }
        let (_root, storage) = storage();
        let a = repo("a");
        let layer = push_blob(&storage, &a, "layer");
        push_manifest(&storage, &a, "no JSON".to_owned(), None);
        age(&storage);
        collect(&storage, &options());
        assert!(storage.stat_blob(&a, &layer).unwrap().is_some());
    }

    #[test]
    fn a_manifest_that_was_put_aside_keeps_all_blobs_of_its_repository() {
        let (_root, storage) = storage();
        let a = repo("a");
        let layer = push_blob(&storage, &a, "layer");
        let manifest = push_manifest(&storage, &a, image(&layer, &[]), Some("v"));
        fs::write(storage.layout.blob(&manifest), b"{}x").unwrap();
        let (counts, stop) = (scrub::Counts::default(), AtomicBool::new(false));
        storage.scrub(&scrub::Pass { rate: None, counts: &counts, stop: &stop }).unwrap();
        assert_eq!(storage.quarantined_count(), 1);
        age(&storage);
        assert_eq!(get(&collect(&storage, &options()).removed_blobs), 0);
        assert!(storage.stat_blob(&a, &layer).unwrap().is_some());
        assert_eq!(storage.quarantined_bytes(&manifest), Some(3));

        assert!(storage.delete_manifest(&a, &manifest).unwrap().is_some());
        let told = |counts: &Counts| [&counts.removed_blobs, &counts.freed_bytes].map(get);
        let dry = collect(&storage, &Options { dry_run: true, ..options() });
        assert_eq!((told(&dry), storage.quarantined_count()), ([2, 8], 1));
        assert_eq!(told(&collect(&storage, &options())), [2, 8]);
        assert_eq!((storage.quarantined_count(), storage.quarantined_bytes(&manifest)), (0, None));
    }

    #[test]
    fn what_schema_1_and_indexes_refer_to_stays() {
        let (_root, storage) = storage();
        let a = repo("a");
        let layer = push_blob(&storage, &a, "layer");
        let schema1 = serde_json::json!({"schemaVersion": 1, "fsLayers": [{"blobSum": layer.as_str()}]});
        let child = push_manifest(&storage, &a, schema1.to_string(), None);
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [{"digest": child.as_str()}]});
        push_manifest(&storage, &a, index.to_string(), Some("all"));
        age(&storage);
        assert_eq!(get(&collect(&storage, &options()).removed_blobs), 0);
        assert!(storage.stat_blob(&a, &layer).unwrap().is_some());
        assert!(storage.manifest(&a, &child).unwrap().is_some());
    }

    #[test]
    fn the_link_of_another_algorithm_keeps_what_it_names() {
        let (_root, storage) = storage();
        let a = repo("a");
        let blob = push_blob(&storage, &a, "content");
        let alias = Digest::of(Algorithm::Sha512, b"content");
        let link = storage.layout.layer_link(&a, &alias);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        fs::write(&link, blob.as_str()).unwrap();
        push_manifest(&storage, &a, image(&alias, &[]), Some("v"));
        age(&storage);
        collect(&storage, &options());
        assert!(storage.stat_blob(&a, &alias).unwrap().is_some());
    }

    #[test]
    fn uploads_that_nothing_happens_in_are_given_up_unless_a_request_holds_them() {
        let (_root, storage) = storage();
        let a = repo("a");
        let begin = || {
            let id = storage.begin_upload(&a, Algorithm::Sha256).unwrap();
            let mut session = storage.open_upload(&a, id).unwrap().unwrap();
            storage.settle_upload(&mut session).unwrap();
            fs::write(session.data(), b"12345").unwrap();
            (id, session)
        };
        let (held, session) = begin();
        let (old, _) = begin();
        age(&storage);
        let (new, _) = begin();
        let pending = storage.begin_upload(&a, Algorithm::Sha256).unwrap();
        let counts = collect(&storage, &options());
        assert_eq!((get(&counts.removed_uploads), get(&counts.freed_bytes)), (1, 5));
        for (id, stays) in [(held, true), (old, false), (new, true)] {
            assert_eq!(storage.layout.upload(&a, id).exists(), stays);
        }
        assert!(storage.is_fresh_upload(pending));
        drop(session);
        assert_eq!(
            get(&collect(&storage, &Options { upload_age: Duration::ZERO, ..options() }).removed_uploads),
            2
        );
        assert!(!storage.is_fresh_upload(pending));
    }

    /// Makes a tag's push, and its manifest's, so many days old.
    fn age_tag(storage: &Storage, repo: &RepoName, tag: &str, digest: &Digest, days: u64) {
        let then = SystemTime::now() - Duration::from_secs(days * 86_400);
        let current = storage.layout.tag_current_link(repo, &Tag::parse(tag).unwrap());
        for path in [current, storage.layout.revision_link(repo, digest)] {
            fs::File::open(path).unwrap().set_modified(then).unwrap();
        }
    }

    #[test]
    fn rules_take_the_tags_that_are_too_many_and_what_only_they_named() {
        let (_root, storage) = storage();
        let a = repo("ci/app");
        let config = push_blob(&storage, &a, "config");
        let tags = ["one", "two", "three", "four", "v1", "gold"];
        let mut digests = Vec::new();
        for (days, tag) in tags.iter().enumerate() {
            let layer = push_blob(&storage, &a, tag);
            digests.push(push_manifest(&storage, &a, image(&config, &[&layer]), Some(tag)));
            age_tag(&storage, &a, tag, &digests[days], 10 + days as u64);
        }
        let rules: Rules = serde_json::from_value(serde_json::json!({
            "retention": [
                {"repositories": "ci/**", "keep-tags": ["v*"], "keep-newest": 2, "untagged-after": "1h"},
                {"repositories": "**", "keep-newest": 0},
            ],
            "pinned": [{"repositories": "ci/app", "tags": "gold"}],
        }))
        .unwrap();
        let options = Options { rules: Arc::new(rules), ..options() };
        let told = |counts: &Counts| [&counts.removed_tags, &counts.removed_manifests].map(get);
        let dry = collect(&storage, &Options { dry_run: true, ..options.clone() });
        assert_eq!(told(&dry), [2, 2]);
        assert_eq!(storage.tags(&a, None, 10).unwrap().unwrap().names.len(), 6);
        assert_eq!(told(&collect(&storage, &options)), [2, 2]);
        assert_eq!(storage.tags(&a, None, 10).unwrap().unwrap().names, ["gold", "one", "two", "v1"]);
        for (tag, digest) in tags.iter().zip(&digests) {
            let stays = !matches!(*tag, "three" | "four");
            assert_eq!(storage.manifest(&a, digest).unwrap().is_some(), stays, "{tag}");
        }
        assert_eq!(told(&collect(&storage, &options)), [0, 0]);
    }

    #[test]
    fn untagged_manifests_go_but_for_children_and_signatures_of_what_stays() {
        let (_root, storage) = storage();
        let a = repo("a");
        let config = push_blob(&storage, &a, "config");
        let with = |name: &str, more: serde_json::Value| {
            let mut manifest: serde_json::Value = serde_json::from_str(&image(&config, &[])).unwrap();
            manifest["annotations"] = serde_json::json!({"name": name});
            manifest.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
            push_manifest(&storage, &a, manifest.to_string(), None)
        };
        let none = || serde_json::json!({});
        let (child, loose, young) = (with("child", none()), with("loose", none()), with("young", none()));
        let about = |digest: &Digest| serde_json::json!({"subject": {"digest": digest.as_str()}});
        let signature = with("signature of the index", serde_json::json!({}));
        let index =
            serde_json::json!({"schemaVersion": 2, "manifests": [{"digest": child.as_str()}]}).to_string();
        let index = push_manifest(&storage, &a, index, Some("all"));
        let signed = with("signed", about(&index));
        let of_child = with("of the child", about(&child));
        let of_loose = with("of the loose one", about(&loose));
        age(&storage);
        storage.claim_manifest(&a, &young).unwrap();
        let rules = serde_json::json!({"retention": [{"repositories": "a", "untagged-after": "1d"}]});
        let rules = Arc::new(serde_json::from_value(rules).unwrap());
        let counts = collect(&storage, &Options { rules, ..options() });
        assert_eq!(get(&counts.removed_manifests), 3);
        for (digest, stays) in [
            (&index, true),
            (&child, true),
            (&signed, true),
            (&of_child, true),
            (&young, true),
            (&loose, false),
            (&of_loose, false),
            (&signature, false),
        ] {
            assert_eq!(storage.manifest(&a, digest).unwrap().is_some(), stays, "{digest}");
        }
    }

    #[test]
    fn a_collection_can_be_stopped_and_is_the_only_one() {
        let (_root, storage) = storage();
        push_blob(&storage, &repo("a"), "blob");
        let stopped = storage.collect(&options(), &Counts::default(), &AtomicBool::new(true));
        assert!(stopped.unwrap_err().to_string().contains("stopped"));
        let _running = storage.collecting.lock().unwrap();
        assert!(storage.collect(&options(), &Counts::default(), &AtomicBool::new(false)).unwrap().is_none());
    }

    #[test]
    fn many_repositories_are_collected_as_each_alone_would_be() {
        let (_root, storage) = storage();
        let repos: Vec<RepoName> = (0..200).map(|n| repo(&format!("vi/ns{}/image-{n}", n % 7))).collect();
        let shared = push_blob(&storage, &repos[0], "shared");
        for (n, repo) in repos.iter().enumerate() {
            let config = push_blob(&storage, repo, &format!("config of {n}"));
            push_blob(&storage, repo, &format!("garbage of {n}"));
            storage.mount_blob(&repos[0], repo, &shared).unwrap();
            if n % 2 == 0 {
                push_manifest(&storage, repo, image(&config, &[&shared]), Some("v1"));
            }
        }
        age(&storage);
        let counts = collect(&storage, &options());
        assert_eq!((get(&counts.repositories), get(&counts.manifests)), (200, 100));
        assert_eq!((get(&counts.blobs), get(&counts.removed_blobs)), (501, 300));
        assert_eq!((get(&counts.removed_links), get(&counts.removed_repositories)), (400, 100));
        for (n, repo) in repos.iter().enumerate() {
            assert_eq!(storage.stat_blob(repo, &shared).unwrap().is_some(), n % 2 == 0, "{repo}");
        }
        assert_eq!(get(&collect(&storage, &options()).removed_blobs), 0);
    }

    #[test]
    fn what_fails_in_one_repository_ends_the_collection_and_is_what_is_told() {
        let (_root, storage) = storage();
        for n in 0..50 {
            push_blob(&storage, &repo(&format!("repo-{n}")), &format!("blob of {n}"));
        }
        let broken = push_manifest(&storage, &repo("repo-7"), r#"{"schemaVersion": 2}"#.to_owned(), None);
        let path = storage.layout.blob(&broken);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        age(&storage);
        let counts = Counts::default();
        let error = storage.collect(&options(), &counts, &AtomicBool::new(false)).unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert_eq!(get(&counts.removed_blobs), 0, "nothing is swept when not all is marked");
    }
}
