//! Changes to tags and manifests that look at what is there before they act.

use std::sync::{MutexGuard, PoisonError};

use super::{Result, Storage};
use crate::digest::Digest;
use crate::model::Checked;
use crate::names::{Reference, RepoName, Tag};
use crate::rules::Rules;
use crate::store::{ChangeError, Manifest, Removed};

impl Storage {
    /// Stores a manifest if the repository has what it refers to; returns what is missing where that is allowed.
    pub(super) fn accept_manifest(
        &self,
        repo: &RepoName,
        manifest: Manifest,
        checked: &Checked,
        tags: &[Tag],
        rules: &Rules,
    ) -> Result<Vec<Digest>, ChangeError> {
        let _immutable = self.hold_immutable(repo, tags, &manifest.digest, rules)?;
        let _room = self.admit_manifest(repo, &manifest.digest, manifest.bytes.len() as u64)?;
        let _accepting = self.accepting();
        let mut missing = Vec::new();
        for blob in &checked.blobs {
            if self.claim_blob(repo, blob)?.is_none() {
                missing.push(blob.clone());
            }
        }
        for manifest in &checked.manifests {
            if !self.claim_manifest(repo, manifest)? {
                missing.push(manifest.clone());
            }
        }
        if !missing.is_empty() && !rules.may_be_sparse(repo) {
            return Err(ChangeError::Missing(missing));
        }
        self.put_manifest(repo, manifest, tags, checked.subject.as_ref())?;
        Ok(missing)
    }

    /// Removes a tag, a manifest with its tags, or everything of a repository; what they alone needed goes with the next
    /// collection.
    pub(super) fn remove(
        &self,
        repo: &RepoName,
        reference: Option<&Reference>,
        rules: &Rules,
    ) -> Result<Removed, ChangeError> {
        // A tag that never changes, put meanwhile, would go with what it names.
        let _immutable = match rules.may_be_immutable(repo) {
            true => {
                let guard = self.immutable();
                self.refuse_removal(repo, reference, rules)?;
                Some(guard)
            }
            false => None,
        };
        Ok(match reference {
            Some(Reference::Tag(tag)) => {
                Removed { count: self.delete_tag(repo, tag)?.into(), tags: Vec::new() }
            }
            Some(Reference::Digest(digest)) => {
                let tags = self.delete_manifest(repo, digest)?;
                Removed { count: tags.is_some().into(), tags: tags.unwrap_or_default() }
            }
            None => {
                let mut count = 0;
                for named in self.named(repo)? {
                    count += u64::from(self.delete_tag(repo, &named.tag)?);
                }
                for digest in self.revisions(repo)? {
                    count += u64::from(self.delete_manifest(repo, &digest)?.is_some());
                }
                Removed { count, tags: Vec::new() }
            }
        })
    }

    /// Keeps others from putting tags that never change while one is put; fails if a tag names something else already.
    fn hold_immutable(
        &self,
        repo: &RepoName,
        tags: &[Tag],
        digest: &Digest,
        rules: &Rules,
    ) -> Result<Option<MutexGuard<'_, ()>>, ChangeError> {
        let mut guard = None;
        for tag in tags.iter().filter(|tag| rules.is_immutable(repo, tag)) {
            guard.get_or_insert_with(|| self.immutable());
            let names = self.resolve(repo, &Reference::Tag(tag.clone()))?;
            if let Some(names) = names.filter(|names| names != digest) {
                return Err(ChangeError::Immutable { tag: tag.clone(), names });
            }
        }
        Ok(guard)
    }

    /// Fails if a tag that never changes would go.
    fn refuse_removal(
        &self,
        repo: &RepoName,
        reference: Option<&Reference>,
        rules: &Rules,
    ) -> Result<(), ChangeError> {
        let going = match reference {
            Some(Reference::Tag(tag)) => vec![tag.clone()],
            Some(Reference::Digest(digest)) => self.tags_of(repo, digest)?,
            None => self.named(repo)?.into_iter().map(|named| named.tag).collect(),
        };
        for tag in going.into_iter().filter(|tag| rules.is_immutable(repo, tag)) {
            if let Some(names) = self.resolve(repo, &Reference::Tag(tag.clone()))? {
                return Err(ChangeError::Immutable { tag, names });
            }
        }
        Ok(())
    }

    fn immutable(&self) -> MutexGuard<'_, ()> {
        self.immutable.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
