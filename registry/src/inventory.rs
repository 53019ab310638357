//! What a directory holds, for people: read without the lock of the registry that may serve it meanwhile.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;
use std::time::SystemTime;

use serde::Serialize;

use crate::digest::Digest;
use crate::names::RepoName;
use crate::rules::{Pattern, Rules};
use crate::storage::collect::key;
use crate::storage::{self, Storage};
use crate::store::Manifest;
use crate::{Error, Result, model};

/// Findings of a check in words; the others are only counted.
const MESSAGES_MAX: usize = 100;

/// A directory that is looked at.
#[derive(Debug)]
pub struct Inventory {
    storage: Storage,
}

/// A tag, or a manifest without one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Listed {
    pub repository: String,
    pub tag: Option<String>,
    pub digest: String,
    pub media_type: String,
    /// Bytes of the manifest and all that it refers to, by its own word.
    pub bytes: u64,
    /// When the tag, or the manifest, was pushed; seconds since 1970.
    pub pushed: u64,
}

/// What a repository takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Usage {
    pub repository: String,
    /// Its blobs and their bytes, manifests included.
    pub blobs: u64,
    pub bytes: u64,
    /// Bytes of those that no other repository has.
    pub own_bytes: u64,
}

/// What all repositories take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Usages {
    pub repositories: Vec<Usage>,
    /// Blobs that a repository has, each counted once, and their bytes.
    pub blobs: u64,
    pub bytes: u64,
}

/// Whether all is there that the directory says is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Soundness {
    pub repositories: u64,
    pub tags: u64,
    pub manifests: u64,
    /// References of manifests to what is not there.
    pub missing: u64,
    /// Manifests and blobs that are not what they should be, as far as the length and the manifest's digest tell.
    pub damaged: u64,
    /// References to what is not there and, by the rules, need not be.
    pub gaps: u64,
    /// Tags that name no manifest, which no client sees.
    pub empty_tags: u64,
    /// The first findings in words.
    pub messages: Vec<String>,
}

impl Inventory {
    /// Opens a directory; fails if it holds no registry. Everything here blocks on the filesystem.
    pub fn open(root: &Path) -> Result<Self> {
        let storage = Storage::look(root).map_err(|source| Error::Open { path: root.to_owned(), source })?;
        Ok(Self { storage })
    }

    /// Calls `show` with the tags, and if `untagged` is set the manifests without one, of the repositories that fit.
    pub fn list(
        &self,
        pattern: Option<&Pattern>,
        untagged: bool,
        mut show: impl FnMut(Listed) -> std::io::Result<()>,
    ) -> Result<()> {
        self.each_repo(pattern, |repo| {
            let mut digests = self.storage.revisions(repo)?;
            digests.sort();
            for named in self.storage.named(repo)? {
                digests.retain(|digest| untagged && *digest != named.digest);
                if let Some(manifest) = self.storage.sound_manifest(repo, &named.digest) {
                    let tag = Some(named.tag.to_string());
                    show(listed(repo, tag, &manifest, named.pushed)).map_err(failed)?;
                }
            }
            for digest in digests.iter().filter(|_| untagged) {
                if let (Some(manifest), Some(pushed)) =
                    (self.storage.sound_manifest(repo, digest), self.storage.revision_touched(repo, digest)?)
                {
                    show(listed(repo, None, &manifest, pushed)).map_err(failed)?;
                }
            }
            Ok(())
        })
    }

    /// Counts what the repositories that fit take; `own_bytes` in the sight of all of them.
    pub fn usage(&self, pattern: Option<&Pattern>) -> Result<Usages> {
        /// The repository that has a blob, and its length; `None` if several have it.
        type Owner = (Option<usize>, u64);
        let mut owners: HashMap<u128, Owner> = HashMap::new();
        let mut all = Usages::default();
        self.each_repo(None, |repo| {
            let this = all.repositories.len();
            let mut usage = Usage { repository: repo.to_string(), blobs: 0, bytes: 0, own_bytes: 0 };
            let mut add = |digest: &Digest| {
                let bytes = match owners.entry(key(digest)) {
                    Entry::Occupied(mut owner) => {
                        let (repo, bytes) = *owner.get();
                        if repo == Some(this) {
                            return Ok(());
                        }
                        owner.insert((None, bytes));
                        bytes
                    }
                    Entry::Vacant(owner) => {
                        let Some(bytes) = self.storage.content_bytes(digest)? else { return Ok(()) };
                        owner.insert((Some(this), bytes)).1
                    }
                };
                usage.blobs += 1;
                usage.bytes = usage.bytes.saturating_add(bytes);
                Ok(())
            };
            self.storage.each_layer(repo, |digest| add(&digest))?;
            self.storage.each_revision(repo, |digest| add(&digest))?;
            all.repositories.push(usage);
            Ok(())
        })?;
        for (owner, bytes) in owners.values() {
            all.blobs += 1;
            all.bytes = all.bytes.saturating_add(*bytes);
            if let Some(usage) = owner.and_then(|owner| all.repositories.get_mut(owner)) {
                usage.own_bytes = usage.own_bytes.saturating_add(*bytes);
            }
        }
        all.repositories.retain(|usage| pattern.is_none_or(|pattern| pattern.matches(&usage.repository)));
        all.repositories.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.repository.cmp(&b.repository)));
        Ok(all)
    }

    /// Checks that every tag names a manifest, and that everything that manifests refer to is there and has its length.
    /// Content is not read; that is the business of a scrub. Where `rules` let manifests be sparse, and in repositories that are
    /// those of an upstream, what is missing is a gap.
    pub fn check(&self, pattern: Option<&Pattern>, rules: &Rules) -> Result<Soundness> {
        let mut found = Soundness::default();
        let cached = self.storage.cached().map_err(|error| Error::Task { source: Box::new(error) })?;
        self.each_repo(pattern, |repo| {
            found.repositories += 1;
            for named in self.storage.named(repo)? {
                found.tags += 1;
                if self.storage.revision_touched(repo, &named.digest)?.is_none() {
                    found.empty_tags += 1;
                    found.tell(format!(
                        "{repo}: the tag {} names {}, which is not there",
                        named.tag, named.digest
                    ));
                }
            }
            let mut digests = Vec::new();
            self.storage.each_revision(repo, |digest| {
                digests.push(digest);
                Ok(())
            })?;
            for digest in digests {
                found.manifests += 1;
                let is_cached = cached.iter().any(|prefix| repo.as_str().starts_with(prefix.as_str()));
                let mut counted =
                    self.check_manifest(repo, &digest, is_cached || rules.may_be_sparse(repo))?;
                found.gaps += counted.gaps;
                // What was deleted in the meantime needs nothing.
                if !counted.messages.is_empty() && self.storage.revision_touched(repo, &digest)?.is_some() {
                    found.missing += counted.missing;
                    found.damaged += counted.damaged;
                    counted.messages.drain(..).for_each(|message| found.tell(message));
                }
            }
            Ok(())
        })?;
        Ok(found)
    }

    fn check_manifest(
        &self,
        repo: &RepoName,
        digest: &Digest,
        may_be_sparse: bool,
    ) -> Result<Soundness, storage::Error> {
        let mut found = Soundness::default();
        let manifest = match self.storage.manifest(repo, digest) {
            Ok(Some(manifest)) => manifest,
            Ok(None) => {
                found.missing += 1;
                found.tell(format!("{repo}: the content of the manifest {digest} is not there"));
                return Ok(found);
            }
            Err(error) => {
                found.damaged += 1;
                found.tell(format!("{repo}: {error}"));
                return Ok(found);
            }
        };
        for wanted in model::needs(&manifest.bytes).unwrap_or_default() {
            let (what, bytes) = match wanted.is_manifest {
                true => ("manifest", self.storage.stat_manifest(repo, &wanted.digest)?),
                false => ("blob", self.storage.stat_blob(repo, &wanted.digest)?),
            };
            match bytes {
                None if may_be_sparse => found.gaps += 1,
                None => {
                    found.missing += 1;
                    found.tell(format!(
                        "{repo}: {digest} refers to the {what} {}, which is not there",
                        wanted.digest
                    ));
                }
                Some(bytes) if wanted.bytes.is_some_and(|wanted| wanted != bytes) => {
                    found.damaged += 1;
                    found.tell(format!("{repo}: the {what} {} of {digest} has {bytes} bytes", wanted.digest));
                }
                Some(_) => {}
            }
        }
        Ok(found)
    }

    fn each_repo(
        &self,
        pattern: Option<&Pattern>,
        mut visit: impl FnMut(&RepoName) -> Result<(), storage::Error>,
    ) -> Result<()> {
        let visited = self.storage.each_repo(&mut |repo| match pattern {
            Some(pattern) if !pattern.matches(repo.as_str()) => Ok(()),
            _ => visit(repo),
        });
        visited.map_err(|error| Error::Task { source: Box::new(error) })
    }
}

impl Soundness {
    /// Whether a client could miss something.
    pub fn is_sound(&self) -> bool {
        self.missing == 0 && self.damaged == 0
    }

    fn tell(&mut self, message: String) {
        if self.messages.len() < MESSAGES_MAX {
            self.messages.push(message);
        }
    }
}

fn listed(repo: &RepoName, tag: Option<String>, manifest: &Manifest, pushed: SystemTime) -> Listed {
    let needs = model::needs(&manifest.bytes).unwrap_or_default();
    let needed = needs.iter().filter_map(|one| one.bytes).fold(0, u64::saturating_add);
    Listed {
        repository: repo.to_string(),
        tag,
        digest: manifest.digest.to_string(),
        media_type: manifest.media_type.to_string(),
        bytes: needed.saturating_add(manifest.bytes.len() as u64),
        pushed: pushed.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
    }
}

fn failed(error: std::io::Error) -> storage::Error {
    storage::Error::new("cannot write the answer", error)
}
