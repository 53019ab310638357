//! Takes what was not used for longest out of the repositories below a prefix, until they hold no more than they may.
//!
//! What a blob was used last is the time (`mtime`) of the repository's link to it. A link is taken out first; the blob
//! goes when no repository has it any more, at once and not with the next collection:
//!
//! ```text
//!  entries below the prefix, oldest first ──> remove links ──> relink + 1; wait for who holds `accepting`; begun = now
//!                                                                      │
//!   under `accepting`, for each blob without a link: not touched since begun ──> remove <── links of all repositories
//! ```
//!
//! A mount or a commit that places a link meanwhile touches the blob, always while `relink` is not 0, and not only when it
//! is old as they do otherwise. One that began earlier is waited for, and its link is seen. So no repository ever has a
//! link whose blob was taken from under it. Only what is newer than [`SETTLE`] stays, for it may be a small blob that was
//! written and waits to be placed.

use std::collections::hash_map::Entry as Place;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use super::blobs::{found, link_target};
use super::collect::key;
use super::manifests::{REPO_DIRS, walk_below};
use super::{Error, Result, Storage};
use crate::digest::Digest;
use crate::model;
use crate::names::{RepoName, Tag};

/// How long a blob that was written may take to be placed; less if the grace period is.
const SETTLE: Duration = Duration::from_secs(60);
/// Removals under one hold of the lock that keeps pushes out.
const BATCH_REMOVALS_MAX: usize = 64;

/// What is taken out of the repositories below a prefix.
pub(crate) struct Eviction<'a> {
    /// Ends with `/`.
    pub(crate) prefix: &'a str,
    /// Bytes that may stay.
    pub(crate) bytes_max: u64,
    /// If there are more, so many stay.
    pub(crate) bytes_goal: u64,
    /// Whether what a tag names stays, with all that it refers to.
    pub(crate) is_pinned: &'a dyn Fn(&RepoName, &Tag) -> bool,
    /// Whether a content of a repository was used since its link was touched.
    pub(crate) is_used: &'a dyn Fn(&RepoName, &Digest) -> bool,
}

/// What became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Evicted {
    /// Bytes that the repositories still have.
    pub(crate) kept_bytes: u64,
    /// Contents that they no longer have, and their bytes.
    pub(crate) removed: u64,
    pub(crate) removed_bytes: u64,
    /// Bytes of those that no other repository had, and are gone from the disk.
    pub(crate) freed_bytes: u64,
}

/// A content, and who has it.
struct Entry {
    digest: Digest,
    bytes: u64,
    used: SystemTime,
    pinned: bool,
    /// With whether it is a manifest there.
    held: Vec<(RepoName, bool)>,
}

impl Storage {
    /// Takes out what was not used for longest. Blocks.
    pub(crate) fn evict(&self, eviction: &Eviction<'_>) -> Result<Evicted> {
        let entries = self.entries_below(eviction)?;
        let mut all: Vec<Entry> = entries.into_values().collect();
        let mut done =
            Evicted { kept_bytes: all.iter().map(|entry| entry.bytes).sum(), ..Evicted::default() };
        if done.kept_bytes <= eviction.bytes_max {
            return Ok(done);
        }
        all.sort_by_key(|entry| entry.used);
        let mut gone = HashMap::new();
        for entry in all {
            if done.kept_bytes <= eviction.bytes_goal {
                break;
            }
            if entry.pinned || entry.held.iter().any(|(repo, _)| (eviction.is_used)(repo, &entry.digest)) {
                continue;
            }
            for (repo, is_manifest) in &entry.held {
                self.take_out(repo, &entry.digest, *is_manifest)?;
            }
            done.kept_bytes = done.kept_bytes.saturating_sub(entry.bytes);
            done.removed += 1;
            done.removed_bytes = done.removed_bytes.saturating_add(entry.bytes);
            gone.insert(key(&entry.digest), entry.digest);
        }
        if !gone.is_empty() {
            done.freed_bytes = self.free(gone)?;
        }
        Ok(done)
    }

    /// Sets when a content of a repository was used last.
    pub(crate) fn set_used(
        &self,
        repo: &RepoName,
        digest: &Digest,
        is_manifest: bool,
        at: SystemTime,
    ) -> Result<()> {
        let link = match is_manifest {
            true => self.layout.revision_link(repo, digest),
            false => self.layout.layer_link(repo, digest),
        };
        let set = || fs::File::options().write(true).open(&link)?.set_modified(at);
        found(set()).map(drop).map_err(Error::at("cannot touch", &link))
    }

    /// Notes below which prefixes repositories are those of an upstream, for those who only look at the directory.
    pub(crate) fn note_cached<'a>(&self, prefixes: impl Iterator<Item = &'a str>) -> Result<()> {
        let path = self.layout.cached();
        let text: String = prefixes.map(|prefix| format!("{prefix}\n")).collect();
        let note = || match (text.is_empty(), found(fs::read_to_string(&path))?) {
            (true, None) => Ok(()),
            (true, Some(_)) => fs::remove_file(&path),
            (false, Some(before)) if before == text => Ok(()),
            (false, _) => self.dirs.write_temp(text.as_bytes())?.move_to(&path),
        };
        note().map_err(Error::at("cannot write", &path))
    }

    /// The prefixes that were noted.
    pub(crate) fn cached(&self) -> Result<Vec<String>> {
        let path = self.layout.cached();
        let text = found(fs::read_to_string(&path)).map_err(Error::at("cannot read", &path))?;
        Ok(text.unwrap_or_default().lines().map(str::to_owned).collect())
    }

    fn entries_below(&self, eviction: &Eviction<'_>) -> Result<HashMap<u128, Entry>> {
        let mut entries: HashMap<u128, Entry> = HashMap::new();
        let name = eviction.prefix.trim_end_matches('/');
        let Some(base) = RepoName::parse(name) else { return Ok(entries) };
        walk_below(&self.layout.repo(&base), name, &REPO_DIRS, &mut |repo| {
            if !repo.as_str().starts_with(eviction.prefix) {
                return Ok(());
            }
            let pinned = self.pinned_in(repo, eviction.is_pinned)?;
            let mut add = |digest: Digest, is_manifest: bool| {
                let link = match is_manifest {
                    true => self.layout.revision_link(repo, &digest),
                    false => self.layout.layer_link(repo, &digest),
                };
                let used = found(fs::metadata(&link).and_then(|metadata| metadata.modified()));
                let Some(used) = used.map_err(Error::at("cannot look at", &link))? else { return Ok(()) };
                let pinned = pinned.contains(&digest);
                let entry = match entries.entry(key(&digest)) {
                    Place::Occupied(entry) => entry.into_mut(),
                    Place::Vacant(entry) => {
                        // A link without content is taken out as well, in its turn.
                        let bytes = self.content_bytes(&digest)?.unwrap_or(0);
                        entry.insert(Entry { digest, bytes, used, pinned, held: Vec::new() })
                    }
                };
                entry.used = entry.used.max(used);
                entry.pinned |= pinned;
                entry.held.push((repo.clone(), is_manifest));
                Ok(())
            };
            self.each_layer(repo, |digest| add(digest, false))?;
            self.each_revision(repo, |digest| add(digest, true))
        })?;
        Ok(entries)
    }

    /// What pinned tags name, and all that it refers to.
    fn pinned_in(
        &self,
        repo: &RepoName,
        is_pinned: &dyn Fn(&RepoName, &Tag) -> bool,
    ) -> Result<HashSet<Digest>> {
        let mut pinned = HashSet::new();
        let named = self.named(repo)?;
        let mut todo: Vec<Digest> =
            named.into_iter().filter(|named| is_pinned(repo, &named.tag)).map(|named| named.digest).collect();
        while let Some(digest) = todo.pop() {
            if pinned.contains(&digest) {
                continue;
            }
            if let Some(manifest) = self.sound_manifest(repo, &digest) {
                todo.extend(model::references(&manifest.bytes).unwrap_or_default());
            }
            pinned.insert(digest);
        }
        Ok(pinned)
    }

    fn take_out(&self, repo: &RepoName, digest: &Digest, is_manifest: bool) -> Result<()> {
        if is_manifest {
            return self.delete_manifest(repo, digest).map(drop);
        }
        // Not synced: a link that a crash brings back, and whose blob is gone, counts as absent.
        let link = self.layout.layer_link(repo, digest);
        self.quotas
            .removing(repo, key(digest), || fs::remove_file(&link))
            .map_err(Error::at("cannot remove", &link))?;
        if let Some(dir) = link.parent() {
            let _ = fs::remove_dir(dir);
        }
        Ok(())
    }

    /// Removes those of the blobs that no repository has; returns their bytes.
    fn free(&self, mut gone: HashMap<u128, Digest>) -> Result<u64> {
        let _relink = Raised::by_one(&self.relink);
        // Whoever began earlier has placed its link.
        drop(self.accepting.write().unwrap_or_else(PoisonError::into_inner));
        let settle = SETTLE.min(self.grace.period());
        let cutoff = SystemTime::now().checked_sub(settle).unwrap_or(SystemTime::UNIX_EPOCH);
        self.each_repo(&mut |repo| {
            self.each_layer(repo, |digest| {
                if let Some(target) = link_target(&self.layout.layer_link(repo, &digest), &digest)? {
                    gone.remove(&key(&target));
                }
                Ok(())
            })?;
            self.each_revision(repo, |digest| {
                gone.remove(&key(&digest));
                Ok(())
            })
        })?;
        let gone: Vec<Digest> = gone.into_values().collect();
        let mut freed = 0u64;
        for batch in gone.chunks(BATCH_REMOVALS_MAX) {
            let _exclusive = self.accepting.write().unwrap_or_else(PoisonError::into_inner);
            for digest in batch {
                let path = self.layout.blob(digest);
                let remove = || -> std::io::Result<u64> {
                    let Some(metadata) = found(fs::symlink_metadata(&path))? else { return Ok(0) };
                    if metadata.modified()? >= cutoff {
                        return Ok(0);
                    }
                    fs::remove_file(&path)?;
                    if let Some(dir) = path.parent() {
                        let _ = fs::remove_dir(dir);
                    }
                    Ok(metadata.len())
                };
                freed = freed.saturating_add(remove().map_err(Error::at("cannot remove", &path))?);
            }
        }
        Ok(freed)
    }
}

/// A number that is greater by one as long as this lives.
struct Raised<'a>(&'a AtomicUsize);

impl<'a> Raised<'a> {
    fn by_one(number: &'a AtomicUsize) -> Self {
        number.fetch_add(1, Ordering::SeqCst);
        Self(number)
    }
}

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;
    use crate::storage::collect::Grace;

    fn storage() -> (tempfile::TempDir, Storage) {
        let root = tempfile::tempdir().unwrap();
        let storage = Storage::open(root.path(), Grace::new(Duration::from_secs(1))).unwrap();
        (root, storage.bounded(Vec::new(), Some(0)))
    }

    fn repo(name: &str) -> RepoName {
        RepoName::parse(name).unwrap()
    }

    /// Stores a blob that was last used, and touched, so many seconds ago.
    fn store(storage: &Storage, repo: &RepoName, content: &str, seconds: u64) -> Digest {
        let digest = Digest::of(Algorithm::Sha256, content.as_bytes());
        storage.store_blob(repo, content.as_bytes(), &digest).unwrap();
        let then = SystemTime::now() - Duration::from_secs(seconds);
        storage.set_used(repo, &digest, false, then).unwrap();
        fs::File::options()
            .write(true)
            .open(storage.layout.blob(&digest))
            .unwrap()
            .set_modified(then)
            .unwrap();
        digest
    }

    fn evict(storage: &Storage, bytes_max: u64, used: &[&Digest]) -> Evicted {
        let eviction = Eviction {
            prefix: "up/",
            bytes_max,
            bytes_goal: bytes_max,
            is_pinned: &|_, _| false,
            is_used: &|_, digest| used.contains(&digest),
        };
        storage.evict(&eviction).unwrap()
    }

    #[test]
    fn the_oldest_go_and_only_what_nobody_else_has_leaves_the_disk() {
        let (_root, storage) = storage();
        let (a, b, ours) = (repo("up/a"), repo("up/b"), repo("mine"));
        let blobs: Vec<Digest> =
            (0..5).map(|n| store(&storage, &a, &format!("blob {n}"), 1000 - n * 100)).collect();
        // The first is also ours; the second was used in another repository; the third just now.
        assert!(storage.mount_blob(&a, &ours, &blobs[0]).unwrap().is_some());
        assert!(storage.mount_blob(&a, &b, &blobs[1]).unwrap().is_some());
        let none = Evicted { kept_bytes: 30, ..Evicted::default() };
        assert_eq!(evict(&storage, 30, &[]), none);
        let done = evict(&storage, 18, &[&blobs[2]]);
        assert_eq!(done, Evicted { kept_bytes: 18, removed: 2, removed_bytes: 12, freed_bytes: 6 });
        let has = |repo: &RepoName, n: usize| storage.stat_blob(repo, &blobs[n]).unwrap().is_some();
        assert_eq!([0, 1, 2, 3, 4].map(|n| has(&a, n)), [false, true, true, false, true]);
        assert!(has(&ours, 0) && has(&b, 1) && !storage.layout.blob(&blobs[3]).exists());
    }

    #[test]
    fn what_is_below_no_prefix_is_not_touched() {
        let (_root, storage) = storage();
        for name in ["up", "upper/a", "mine/up/a"] {
            store(&storage, &repo(name), name, 1000);
        }
        assert_eq!(evict(&storage, 0, &[]), Evicted::default());
    }

    #[test]
    fn while_blobs_go_whoever_makes_a_link_touches_its_blob() {
        let (_root, storage) = storage();
        let storage = Storage { grace: Grace::default(), ..storage };
        let (a, ours) = (repo("up/a"), repo("mine"));
        let digest = store(&storage, &a, "young for the collector", 100);
        let age = || {
            let modified = fs::metadata(storage.layout.blob(&digest)).unwrap().modified().unwrap();
            SystemTime::now().duration_since(modified).unwrap_or_default().as_secs()
        };
        assert!(storage.mount_blob(&a, &ours, &digest).unwrap().is_some());
        assert!(age() >= 90);
        let _going = Raised::by_one(&storage.relink);
        assert!(storage.mount_blob(&a, &ours, &digest).unwrap().is_some());
        assert!(age() < 90);
    }

    #[test]
    fn no_link_that_was_made_meanwhile_loses_its_blob() {
        let (_root, storage) = storage();
        let (a, ours) = (repo("up/a"), repo("mine"));
        let digests: Vec<Digest> =
            (0..300).map(|n| Digest::of(Algorithm::Sha256, format!("blob {n}").as_bytes())).collect();
        let done = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 0..digests.len() {
                    store(&storage, &a, &format!("blob {n}"), 1000);
                    if n % 10 == 9 {
                        evict(&storage, 0, &[]);
                    }
                }
                done.store(1, Ordering::SeqCst);
            });
            scope.spawn(|| {
                while done.load(Ordering::SeqCst) == 0 {
                    for digest in &digests {
                        // Most have not come yet, or have gone.
                        storage.mount_blob(&a, &ours, digest).unwrap();
                    }
                }
            });
        });
        storage
            .each_layer(&ours, |digest| {
                assert!(storage.stat_blob(&ours, &digest).unwrap().is_some(), "{digest} lost its blob");
                Ok(())
            })
            .unwrap();
    }
}
