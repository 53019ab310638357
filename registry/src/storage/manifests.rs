//! Manifests by digest, and tags.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::blobs::{found, read_link};
use super::collect::key;
use super::layout::tag_index_link;
use super::quota::Room;
use super::space::Purpose;
use super::sync::sync_dir;
use super::{Error, Result, Storage};
use crate::digest::Digest;
use crate::names::{Reference, RepoName, Tag};
use crate::store::{MANIFEST_BYTES_MAX, Manifest};

/// Manifests kept in memory, bytes.
const CACHE_BYTES_MAX: usize = 6 << 20;
/// What an entry costs besides its bytes.
const CACHE_ENTRY_BYTES: usize = 512;
/// Larger manifests are not kept.
const CACHED_MANIFEST_BYTES_MAX: usize = 256 << 10;
/// The directories that make a directory a repository; one with upload sessions alone is none yet.
pub(super) const REPO_DIRS: [&str; 2] = ["_layers", "_manifests"];

/// Manifests by digest. Content never changes under its digest, so nothing here goes stale; whether a repository has
/// the manifest is asked on disk every time.
#[derive(Debug, Default)]
pub(crate) struct Cache(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    manifests: HashMap<Digest, Manifest>,
    /// Oldest first.
    order: VecDeque<Digest>,
    bytes: usize,
}

impl Storage {
    /// Finds what a reference names.
    pub(crate) fn resolve(&self, repo: &RepoName, reference: &Reference) -> Result<Option<Digest>> {
        match reference {
            Reference::Digest(digest) => Ok(Some(digest.clone())),
            Reference::Tag(tag) => read_link(&self.layout.tag_current_link(repo, tag)),
        }
    }

    /// Finds a manifest of a repository, the content included, and tells its length.
    pub(crate) fn stat_manifest(&self, repo: &RepoName, digest: &Digest) -> Result<Option<u64>> {
        match self.has_revision(repo, digest)? {
            true => self.content_bytes(digest),
            false => Ok(None),
        }
    }

    /// Reads a manifest of a repository.
    ///
    /// # Errors
    /// Also when the bytes on disk are not those of the digest: a damaged manifest is never handed out.
    pub(crate) fn manifest(&self, repo: &RepoName, digest: &Digest) -> Result<Option<Manifest>> {
        if !self.has_revision(repo, digest)? {
            return Ok(None);
        }
        if let Some(manifest) = self.manifests.get(digest) {
            return Ok(Some(manifest));
        }
        let path = self.layout.blob(digest);
        let Some(bytes) =
            found(read_at_most(&path, MANIFEST_BYTES_MAX)).map_err(Error::at("cannot read", &path))?
        else {
            return Ok(None);
        };
        if Digest::of(digest.algorithm(), &bytes) != *digest {
            return Err(Error::new(
                format!("the manifest {digest} is damaged on disk; push it again"),
                ErrorKind::InvalidData.into(),
            ));
        }
        let media_type = crate::model::media_type_of(&bytes);
        let manifest =
            Manifest { digest: digest.clone(), bytes: bytes.into(), media_type: media_type.into() };
        self.manifests.put(manifest.clone());
        Ok(Some(manifest))
    }

    /// Stores a manifest, and lets tags name it; durable when it returns, with all that the caller saw it refer to.
    ///
    /// A tag is placed only when all it depends on is durable: no crash leaves one that names nothing.
    pub(crate) fn put_manifest(
        &self,
        repo: &RepoName,
        manifest: Manifest,
        tags: &[Tag],
        subject: Option<&Digest>,
    ) -> Result<()> {
        let digest = manifest.digest.clone();
        let blob = self.layout.blob(&digest);
        let mut changes = self.dirs.changes();
        let length = manifest.bytes.len() as u64;
        let _grant = self.space.take(length, Purpose::Manifest)?;
        let temp = self.dirs.write_temp(&manifest.bytes).map_err(Error::at("cannot write", &blob))?;
        let link = self.link_temp(&digest)?;
        self.settled();
        let _not_deleting = self.deleting.read().unwrap_or_else(PoisonError::into_inner);
        let placing = self.placing();
        changes.place(temp, &blob).map_err(Error::at("cannot place", &blob))?;
        if let Some(subject) = subject {
            self.place_referrer(&mut changes, repo, subject, &digest)?;
        }
        let revision = self.layout.revision_link(repo, &digest);
        let room = &mut Room::default();
        self.quotas.placing(repo, &revision, (&digest, length), room, || {
            self.place_link(&mut changes, link, &revision)
        })?;
        changes.sync().map_err(Error::at("cannot sync directories of", &revision))?;
        drop(placing);
        self.healed(&digest);
        self.manifests.put(manifest);
        tags.iter().try_for_each(|tag| self.put_tag(repo, tag, &digest))
    }

    /// Makes room for a manifest that is about to be put; to be kept until it is. Not to be called while pushes are held
    /// up: it may have to go through all repositories of a quota.
    pub(crate) fn admit_manifest(&self, repo: &RepoName, digest: &Digest, bytes: u64) -> Result<Room> {
        self.room_for(repo, digest, bytes)
    }

    /// Removes a link of a repository durably; returns whether there was one.
    pub(super) fn remove_link(&self, repo: &RepoName, link: &Path, target: &Digest) -> Result<bool> {
        let remove = || {
            let removed = self.quotas.removing(repo, key(target), || fs::remove_file(link))?;
            if let (true, Some(dir)) = (removed, link.parent()) {
                sync_dir(dir)?;
            }
            Ok(removed)
        };
        remove().map_err(Error::at("cannot remove", link))
    }

    /// Deletes a manifest and the tags that name it; returns those tags, `None` if it was not there.
    pub(crate) fn delete_manifest(&self, repo: &RepoName, digest: &Digest) -> Result<Option<Vec<Tag>>> {
        // A tag that is put meanwhile would name what is gone.
        let _deleting = self.deleting.write().unwrap_or_else(PoisonError::into_inner);
        if !self.has_revision(repo, digest)? {
            return Ok(None);
        }
        let subject = self.manifest(repo, digest).ok().flatten();
        let subject = subject.and_then(|manifest| crate::model::subject_of(&manifest.bytes));
        let tags = self.tags_of(repo, digest)?;
        for tag in &tags {
            self.delete_tag(repo, tag)?;
        }
        let link = self.layout.revision_link(repo, digest);
        let deleted = self.remove_link(repo, &link, digest)?;
        if let Some(subject) = subject {
            self.remove_referrer(repo, &subject, digest);
        }
        Ok(deleted.then_some(tags))
    }

    /// Lists the tags that name a manifest.
    pub(crate) fn tags_of(&self, repo: &RepoName, digest: &Digest) -> Result<Vec<Tag>> {
        let mut tags = Vec::new();
        for name in self.tag_names(repo)?.unwrap_or_default() {
            let Some(tag) = Tag::parse(&name) else { continue };
            if read_link(&self.layout.tag_current_link(repo, &tag))?.as_ref() == Some(digest) {
                tags.push(tag);
            }
        }
        Ok(tags)
    }

    /// Deletes a tag, not what it names; returns whether it was there.
    pub(crate) fn delete_tag(&self, repo: &RepoName, tag: &Tag) -> Result<bool> {
        let dir = self.layout.tag(repo, tag);
        self.dirs.remove_tree(&dir).map_err(Error::at("cannot remove the tag", &dir))
    }

    /// Calls `visit` with every repository that has something, after those below it.
    pub(crate) fn each_repo(&self, visit: &mut impl FnMut(&RepoName) -> Result<()>) -> Result<()> {
        walk(&self.layout.repositories(), &REPO_DIRS, visit)
    }

    /// Lists the digests of all manifests of a repository.
    pub(crate) fn revisions(&self, repo: &RepoName) -> Result<Vec<Digest>> {
        let mut digests = Vec::new();
        self.each_revision(repo, |digest| {
            digests.push(digest);
            Ok(())
        })?;
        Ok(digests)
    }

    pub(super) fn has_revision(&self, repo: &RepoName, digest: &Digest) -> Result<bool> {
        let link = self.layout.revision_link(repo, digest);
        let metadata = found(fs::metadata(&link)).map_err(Error::at("cannot look at", &link))?;
        // A link is written whole or not at all, so its content need not be read.
        Ok(metadata.is_some_and(|metadata| metadata.len() > 0))
    }

    pub(super) fn names_manifest(&self, repo: &RepoName, tag: &Tag) -> Result<bool> {
        match read_link(&self.layout.tag_current_link(repo, tag))? {
            Some(digest) => self.has_revision(repo, &digest),
            None => Ok(false),
        }
    }

    /// Whether there is a repository of this name, and not merely one below it.
    pub(super) fn is_repo(&self, repo: &RepoName) -> bool {
        let dir = self.layout.repo(repo);
        REPO_DIRS.iter().any(|name| dir.join(name).is_dir())
    }

    /// Whether a repository has a manifest, for one who will build on it; see [`Storage::claim_blob`].
    pub(crate) fn claim_manifest(&self, repo: &RepoName, digest: &Digest) -> Result<bool> {
        let has = self.stat_manifest(repo, digest)?.is_some();
        if has {
            self.touch(&self.layout.revision_link(repo, digest))?;
        }
        Ok(has)
    }

    /// Tells the length of a content, whoever has it.
    pub(crate) fn content_bytes(&self, digest: &Digest) -> Result<Option<u64>> {
        let path = self.layout.blob(digest);
        found(fs::metadata(&path).map(|metadata| metadata.len())).map_err(Error::at("cannot look at", &path))
    }

    fn put_tag(&self, repo: &RepoName, tag: &Tag, digest: &Digest) -> Result<()> {
        let dir = self.layout.tag(repo, tag);
        if !self.put_new_tag(&dir, digest).map_err(Error::at("cannot make the tag", &dir))? {
            let current = self.link_temp(digest)?;
            let index = self.link_temp(digest)?;
            let mut changes = self.dirs.changes();
            self.place_link(&mut changes, index, &tag_index_link(&dir, digest))?;
            self.place_link(&mut changes, current, &self.layout.tag_current_link(repo, tag))?;
            changes.sync().map_err(Error::at("cannot sync directories of", &dir))?;
        }
        Ok(())
    }

    /// Makes a tag's directory aside and moves it in as a whole; returns whether there was none before.
    fn put_new_tag(&self, dir: &Path, digest: &Digest) -> io::Result<bool> {
        if dir.is_dir() {
            return Ok(false);
        }
        let aside = self.dirs.temp_path();
        let current = aside.join("current");
        let index = tag_index_link(&aside, digest);
        let index = index.parent().unwrap_or(&aside);
        fs::create_dir_all(&current)?;
        fs::create_dir_all(index)?;
        for link in [current.join("link"), index.join("link")] {
            let temp = self.dirs.write_temp(digest.as_str().as_bytes())?;
            temp.move_to(&link)?;
        }
        sync_dir(&current)?;
        for made in index.ancestors().take_while(|made| made.starts_with(&aside)) {
            sync_dir(made)?;
        }
        let mut changes = self.dirs.changes();
        match changes.rename(&aside, dir) {
            Ok(()) => changes.sync().map(|()| true),
            Err(error) => {
                let _ = fs::remove_dir_all(&aside);
                match error.kind() {
                    ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists => Ok(false),
                    _ => Err(error),
                }
            }
        }
    }

    pub(super) fn tag_names(&self, repo: &RepoName) -> Result<Option<BTreeSet<String>>> {
        let dir = self.layout.tags(repo);
        let list = || -> io::Result<BTreeSet<String>> {
            fs::read_dir(&dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
        };
        found(list()).map_err(Error::at("cannot list", &dir))
    }
}

impl Cache {
    pub(crate) fn get(&self, digest: &Digest) -> Option<Manifest> {
        self.entries().manifests.get(digest).cloned()
    }

    pub(crate) fn put(&self, manifest: Manifest) {
        if manifest.bytes.len() > CACHED_MANIFEST_BYTES_MAX {
            return;
        }
        let mut entries = self.entries();
        if entries.manifests.contains_key(&manifest.digest) {
            return;
        }
        entries.bytes += cost(&manifest);
        entries.order.push_back(manifest.digest.clone());
        entries.manifests.insert(manifest.digest.clone(), manifest);
        while entries.bytes > CACHE_BYTES_MAX {
            let Some(oldest) = entries.order.pop_front() else { break };
            if let Some(dropped) = entries.manifests.remove(&oldest) {
                entries.bytes -= cost(&dropped);
            }
        }
    }

    /// Drops a manifest whose content on disk is gone.
    pub(super) fn forget(&self, digest: &Digest) {
        let mut entries = self.entries();
        if let Some(dropped) = entries.manifests.remove(digest) {
            entries.bytes -= cost(&dropped);
            entries.order.retain(|kept| kept != digest);
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a manifest in memory counts.
fn cost(manifest: &Manifest) -> usize {
    manifest.bytes.len() + CACHE_ENTRY_BYTES
}

/// Calls `visit` with every repository below `base`, after those below it: what has one of these directories. Names are
/// bounded in length, and so is the depth.
pub(super) fn walk(
    base: &Path,
    dirs: &[&str],
    visit: &mut impl FnMut(&RepoName) -> Result<()>,
) -> Result<()> {
    walk_below(base, "", dirs, visit)
}

/// [`walk`] from a directory whose repositories begin with `prefix`.
pub(super) fn walk_below(
    dir: &Path,
    prefix: &str,
    dirs: &[&str],
    visit: &mut impl FnMut(&RepoName) -> Result<()>,
) -> Result<()> {
    let mut is_repo = false;
    for entry in found(fs::read_dir(dir)).map_err(Error::at("cannot list", dir))?.into_iter().flatten() {
        let entry = entry.map_err(Error::at("cannot list", dir))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if !entry.file_type().map_err(Error::at("cannot list", dir))?.is_dir() {
            continue;
        }
        is_repo |= dirs.contains(&name);
        let name = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
        // What is no name of ours, the layout's own directories included, leads to no repository.
        if RepoName::parse(&name).is_some() {
            walk_below(&entry.path(), &name, dirs, visit)?;
        }
    }
    match RepoName::parse(prefix) {
        Some(repo) if is_repo => visit(&repo),
        _ => Ok(()),
    }
}

pub(super) fn read_at_most(path: &Path, max: usize) -> io::Result<Vec<u8>> {
    let length = fs::metadata(path)?.len();
    match usize::try_from(length) {
        Ok(length) if length <= max => fs::read(path),
        _ => Err(io::Error::new(
            ErrorKind::FileTooLarge,
            format!("{length} bytes are too many for a manifest"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::digest::Algorithm;
    use crate::storage::collect::Grace;

    #[test]
    fn the_cache_is_bounded_in_bytes() {
        let cache = Cache::default();
        for n in 0..100u32 {
            let bytes = Bytes::from(vec![n as u8; 200 << 10]);
            let digest = Digest::of(Algorithm::Sha256, &n.to_be_bytes());
            cache.put(Manifest { digest, bytes, media_type: "x".into() });
        }
        assert!(cache.entries().bytes <= CACHE_BYTES_MAX);
        assert!(cache.get(&Digest::of(Algorithm::Sha256, &99u32.to_be_bytes())).is_some());
        assert!(cache.get(&Digest::of(Algorithm::Sha256, &0u32.to_be_bytes())).is_none());
    }

    #[test]
    fn a_tag_directory_without_a_link_is_no_tag() {
        let root = tempfile::tempdir().unwrap();
        let storage = Storage::open(root.path(), Grace::default()).unwrap();
        let repo = RepoName::parse("r").unwrap();
        fs::create_dir_all(storage.layout.tags(&repo).join("half/current")).unwrap();
        assert!(storage.tags(&repo, None, 10).unwrap().unwrap().names.is_empty());
        let digest = Digest::of(Algorithm::Sha256, b"m");
        for tag in ["half", "new"] {
            let manifest =
                Manifest { digest: digest.clone(), bytes: Bytes::from_static(b"m"), media_type: "x".into() };
            storage.put_manifest(&repo, manifest, &[Tag::parse(tag).unwrap()], None).unwrap();
        }
        assert_eq!(storage.tags(&repo, None, 10).unwrap().unwrap().names, ["half", "new"]);
        assert_eq!(fs::read_dir(storage.layout.tmp()).unwrap().count(), 0);
    }
}
