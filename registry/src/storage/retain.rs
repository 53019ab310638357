//! What a collection takes of a repository by its rules: tags that are too many or too old, and manifests without a tag.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use super::blobs::{found, read_link};
use super::collect::{Run, key};
use super::{Error, Result, Storage};
use crate::digest::Digest;
use crate::model;
use crate::names::{RepoName, Tag};
use crate::rules::{Retention, Rules};
use crate::store::MANIFEST_BYTES_MAX;

/// A tag as it was when it was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) tag: Tag,
    pub(crate) digest: Digest,
    pub(crate) pushed: SystemTime,
}

impl Run<'_> {
    /// Deletes what the rules do not keep; returns the manifests that are gone, or would be if this was no dry run.
    pub(super) fn retain(&self, repo: &RepoName) -> Result<BTreeSet<Digest>> {
        let options = self.options;
        let rules = &*options.rules;
        let Some(rule) = rules.retention_of(repo) else { return Ok(BTreeSet::new()) };
        let mut tags = self.storage.named(repo)?;
        // The collector's own grace holds for tags, too: one that has just been moved is not old.
        if rule.limits_tags() {
            let (kept, surplus): (Vec<_>, Vec<_>) =
                tags.into_iter().partition(|named| stays_always(rules, rule, repo, &named.tag));
            let surplus = surplus_of(surplus, |named| (&named.tag, named.pushed), rule, self.begun);
            tags = kept;
            for (named, goes) in surplus {
                if goes && self.delete_tag(repo, &named)? {
                    self.counts.removed_tags.fetch_add(1, Ordering::Relaxed);
                } else {
                    tags.push(named);
                }
            }
        }
        match rule.untagged_after.and_then(|age| self.begun.checked_sub(age.0)) {
            Some(before) => self.delete_untagged(repo, &tags, before.min(self.cutoff)),
            None => Ok(BTreeSet::new()),
        }
    }

    /// Deletes a tag if it is still what it was; returns whether it is gone.
    fn delete_tag(&self, repo: &RepoName, named: &Named) -> Result<bool> {
        self.check()?;
        let _exclusive = self.storage.accepting.write().unwrap_or_else(PoisonError::into_inner);
        if self.storage.named_by(repo, &named.tag)?.as_ref() != Some(named) {
            return Ok(false);
        }
        Ok(self.options.dry_run || self.storage.delete_tag(repo, &named.tag)?)
    }

    /// Deletes manifests that were last touched before `before`, and that neither a tag nor a manifest that stays refers to.
    fn delete_untagged(
        &self,
        repo: &RepoName,
        tags: &[Named],
        before: SystemTime,
    ) -> Result<BTreeSet<Digest>> {
        let storage = self.storage;
        let mut manifests = BTreeMap::new();
        for digest in storage.revisions(repo)? {
            self.check()?;
            // One that cannot be read may refer to any other.
            let Some(links) = storage.links_of(repo, &digest)? else { return Ok(BTreeSet::new()) };
            manifests.insert(digest, links);
        }
        let mut kept: BTreeSet<Digest> = tags.iter().map(|named| named.digest.clone()).collect();
        for digest in manifests.keys() {
            if storage.revision_touched(repo, digest)?.is_none_or(|touched| touched >= before) {
                kept.insert(digest.clone());
            }
        }
        keep_tied(&mut kept, &manifests);
        let mut gone = BTreeSet::new();
        for (digest, links) in manifests {
            self.check()?;
            if kept.contains(&digest) || !self.delete_revision(repo, &digest, before)? {
                continue;
            }
            if let (Some(subject), false) = (&links.subject, self.options.dry_run) {
                storage.remove_referrer(repo, subject, &digest);
            }
            self.counts.removed_manifests.fetch_add(1, Ordering::Relaxed);
            gone.insert(digest);
        }
        Ok(gone)
    }

    /// Deletes a manifest if nobody has touched it meanwhile: a push that builds on it, or names it, does.
    fn delete_revision(&self, repo: &RepoName, digest: &Digest, before: SystemTime) -> Result<bool> {
        let storage = self.storage;
        let _exclusive = storage.accepting.write().unwrap_or_else(PoisonError::into_inner);
        if storage.revision_touched(repo, digest)?.is_none_or(|touched| touched >= before) {
            return Ok(false);
        }
        let link = storage.layout.revision_link(repo, digest);
        if !self.options.dry_run {
            storage
                .quotas
                .removing(repo, key(digest), || fs::remove_file(&link))
                .map_err(Error::at("cannot remove", &link))?;
        }
        Ok(true)
    }
}

/// Whether a tag stays however many there are, and however old it is.
pub(crate) fn stays_always(rules: &Rules, rule: &Retention, repo: &RepoName, tag: &Tag) -> bool {
    rules.is_pinned(repo, tag) || rule.keep_tags.iter().any(|pattern| pattern.matches(tag.as_str()))
}

/// Tells of each tag whether it goes: it is neither one of the newest nor young. `read` tells its name, and when it was pushed.
pub(crate) fn surplus_of<T>(
    mut tags: Vec<T>,
    read: impl Fn(&T) -> (&Tag, SystemTime),
    rule: &Retention,
    now: SystemTime,
) -> Vec<(T, bool)> {
    tags.sort_by(|a, b| {
        let ((a, a_pushed), (b, b_pushed)) = (read(a), read(b));
        Reverse(a_pushed).cmp(&Reverse(b_pushed)).then_with(|| a.cmp(b))
    });
    let newest = rule.keep_newest.unwrap_or(0);
    let goes = |(at, tag): (usize, T)| {
        let age = now.duration_since(read(&tag).1).unwrap_or_default();
        let goes = at >= newest && rule.keep_younger.is_none_or(|young| age >= young.0);
        (tag, goes)
    };
    tags.into_iter().enumerate().map(goes).collect()
}

/// Adds to what is kept what that refers to, what was attached to it, and so on.
pub(crate) fn keep_tied(kept: &mut BTreeSet<Digest>, manifests: &BTreeMap<Digest, model::Links>) {
    let mut todo: Vec<Digest> = kept.iter().cloned().collect();
    let mut attached: BTreeMap<&Digest, Vec<&Digest>> = BTreeMap::new();
    for (digest, links) in manifests {
        if let Some(subject) = &links.subject {
            attached.entry(subject).or_default().push(digest);
        }
    }
    while let Some(digest) = todo.pop() {
        let children = manifests.get(&digest).map(|links| links.manifests.iter()).into_iter().flatten();
        let attached = attached.get(&digest).into_iter().flatten().copied();
        for digest in children.chain(attached) {
            if kept.insert(digest.clone()) {
                todo.push(digest.clone());
            }
        }
    }
}

impl Storage {
    /// Lists the tags of a repository in order, also those that name no manifest.
    pub(crate) fn named(&self, repo: &RepoName) -> Result<Vec<Named>> {
        let mut named = Vec::new();
        for name in self.tag_names(repo)?.unwrap_or_default() {
            let Some(tag) = Tag::parse(&name) else { continue };
            named.extend(self.named_by(repo, &tag)?);
        }
        Ok(named)
    }

    fn named_by(&self, repo: &RepoName, tag: &Tag) -> Result<Option<Named>> {
        let link = self.layout.tag_current_link(repo, tag);
        let Some(digest) = read_link(&link)? else { return Ok(None) };
        let pushed = found(fs::metadata(&link).and_then(|metadata| metadata.modified()));
        let pushed = pushed.map_err(Error::at("cannot look at", &link))?;
        Ok(pushed.map(|pushed| Named { tag: tag.clone(), digest, pushed }))
    }

    /// When a manifest was pushed, or built on; `None` if the repository has it not.
    pub(crate) fn revision_touched(&self, repo: &RepoName, digest: &Digest) -> Result<Option<SystemTime>> {
        let link = self.layout.revision_link(repo, digest);
        found(fs::metadata(&link).and_then(|metadata| metadata.modified()))
            .map_err(Error::at("cannot look at", &link))
    }

    /// What other manifests a manifest is tied to; `None` if it cannot be read.
    fn links_of(&self, repo: &RepoName, digest: &Digest) -> Result<Option<model::Links>> {
        let path = self.layout.blob(digest);
        let read = super::manifests::read_at_most(&path, MANIFEST_BYTES_MAX);
        let bytes = match found(read) {
            Ok(Some(bytes)) if Digest::of(digest.algorithm(), &bytes) == *digest => bytes,
            Err(error) if error.kind() != std::io::ErrorKind::FileTooLarge => {
                return Err(Error::at("cannot read", &path)(error));
            }
            _ => {
                tracing::warn!(%repo, %digest, "a manifest cannot be read, so that all of its repository are kept");
                return Ok(None);
            }
        };
        Ok(model::links(&bytes))
    }
}
