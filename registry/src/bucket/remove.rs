//! Removal of tags and manifests.
//!
//! S3 removes whatever is there: not every store has a removal on a condition. So a tag is looked at right before it goes, and of
//! one who moves it in the moment between, the removal may come behind. No removal comes later than its validity, which is that of
//! a view, also when its answer is lost.

use std::collections::HashSet;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::Bucket;
use super::manifests::Found;
use super::referrers::{referrer_of, revision_of};
use super::tags::TAGS_AT_ONCE_MAX;
use crate::digest::Digest;
use crate::model;
use crate::names::{Reference, RepoName, Tag};
use crate::rules::Rules;
use crate::s3;
use crate::store::{ChangeError, Removed, Result};

/// Tags that are removed at a time.
const REMOVALS_AT_ONCE_MAX: usize = 8;
/// How the key ends by which a tag is there.
const CURRENT: &str = "/current/link";

impl Bucket {
    /// Removes a tag, a manifest with its tags, or everything of a repository; what they alone needed goes with the next collection.
    ///
    /// A tag that is put at the same time as its manifest is deleted names nothing afterwards, and reads as if it were not there.
    /// That one of those that never change would go is looked for before anything is removed, and once more afterwards: then the
    /// manifest is put back, but not its other tags.
    pub(super) async fn remove(
        &self,
        repo: &RepoName,
        reference: Option<&Reference>,
        rules: &Rules,
    ) -> Result<Removed, ChangeError> {
        match reference {
            Some(Reference::Tag(tag)) => {
                self.refuse_removal(repo, std::slice::from_ref(tag), rules).await?;
                let count = self.remove_tag(repo, tag, None).await?.into();
                Ok(Removed { count, tags: Vec::new() })
            }
            Some(Reference::Digest(digest)) => self.remove_manifest(repo, digest, rules).await,
            None => self.remove_all(repo, rules).await,
        }
    }

    async fn remove_manifest(
        &self,
        repo: &RepoName,
        digest: &Digest,
        rules: &Rules,
    ) -> Result<Removed, ChangeError> {
        let Some(manifest) = self.read_manifest(repo, digest).await? else { return Ok(Removed::default()) };
        let naming = self.tags_of(repo, digest).await?;
        self.refuse_removal(repo, &naming, rules).await?;
        let removed = stream::iter(naming)
            .map(async |tag| Ok(self.remove_tag(repo, &tag, Some(digest)).await?.then_some(tag)))
            .buffered(REMOVALS_AT_ONCE_MAX)
            .try_filter_map(async |tag| Ok(tag));
        let tags: Vec<Tag> = removed.try_collect::<Vec<_>>().await.map_err(|error: s3::Error| error)?;
        let link = self.keys.revision_link(repo, digest);
        self.place(&[], async |view| self.client.delete(&link, Some(view.validity())).await).await?;
        if rules.may_be_immutable(repo) {
            // One may have been put since they were looked for; who puts it looks for the manifest afterwards.
            let naming = self.tags_of(repo, digest).await?;
            if let Some(tag) = naming.into_iter().find(|tag| rules.is_immutable(repo, tag)) {
                if let Found::Whole(manifest) = &manifest {
                    self.put_back(repo, manifest, rules).await?;
                }
                return Err(ChangeError::Immutable { tag, names: digest.clone() });
            }
        }
        let subject = match manifest {
            Found::Whole(manifest) => model::subject_of(&manifest.bytes),
            Found::Damaged => None,
        };
        if let Some(subject) = subject {
            self.remove_referrer(repo, &subject, digest).await;
        }
        Ok(Removed { count: 1, tags })
    }

    async fn remove_all(&self, repo: &RepoName, rules: &Rules) -> Result<Removed, ChangeError> {
        if rules.may_be_immutable(repo) {
            self.refuse_removal(repo, &self.all_tags(repo).await?, rules).await?;
        }
        let tags = self.keys.tags(repo);
        self.clear(&tags, |key| !key.ends_with(CURRENT)).await?;
        let current = self.clear(&tags, |key| key.ends_with(CURRENT)).await?;
        self.clear(&tags, |key| !key.ends_with(CURRENT)).await?;
        let revisions = self.clear(&self.keys.revisions(repo), |_| true).await?;
        // One that never changes and was put meanwhile must not stay alone.
        if rules.may_be_immutable(repo) {
            self.clear(&tags, |_| true).await?;
        }
        let gone: HashSet<_> = revisions.iter().filter_map(|key| revision_of(key)).collect();
        let is_of_gone = |key: &str| referrer_of(key).is_some_and(|digest| gone.contains(&digest));
        self.clear(&self.keys.all_referrers(repo), is_of_gone).await?;
        let count = (current.len() as u64).saturating_add(gone.len() as u64);
        Ok(Removed { count, tags: Vec::new() })
    }

    /// Removes a tag, if it names this manifest or whatever it names; returns whether it was there.
    ///
    /// Its history goes first: if this ends in the middle, the tag is as it was. What of it another has placed meanwhile goes last.
    async fn remove_tag(&self, repo: &RepoName, tag: &Tag, names: Option<&Digest>) -> s3::Result<bool> {
        let (all, current) = (self.keys.tag(repo, tag), self.keys.tag_current_link(repo, tag));
        let is_history = |key: &str| key != current;
        let is_meant = async || {
            let link = self.read_link(&current).await?;
            Ok::<_, s3::Error>(link.is_some_and(|link| names.is_none_or(|names| *names == link.target)))
        };
        if names.is_none() || is_meant().await? {
            self.clear(&all, is_history).await?;
        }
        let removed = self.place(&[], async |view| {
            if !is_meant().await? {
                return Ok(false);
            }
            self.client.delete(&current, Some(view.validity())).await?;
            Ok(true)
        });
        let removed = removed.await?;
        if removed {
            self.clear(&all, is_history).await?;
        }
        Ok(removed)
    }

    /// Fails if one of the tags never changes, and is there.
    async fn refuse_removal(&self, repo: &RepoName, tags: &[Tag], rules: &Rules) -> Result<(), ChangeError> {
        let tags = tags.iter().filter(|tag| rules.is_immutable(repo, tag));
        let looks = stream::iter(tags).map(async |tag| Ok((tag, self.tag_link(repo, tag).await?)));
        let mut looks = looks.buffered(TAGS_AT_ONCE_MAX).boxed_local();
        while let Some((tag, link)) = looks.try_next().await.map_err(|error: s3::Error| error)? {
            if let Some(link) = link {
                return Err(ChangeError::Immutable { tag: tag.clone(), names: link.target });
            }
        }
        Ok(())
    }

    /// Lists the tags that name a manifest; takes a request for each tag of the repository.
    async fn tags_of(&self, repo: &RepoName, digest: &Digest) -> Result<Vec<Tag>> {
        let looks = stream::iter(self.all_tags(repo).await?).map(async |tag| {
            let link = self.tag_link(repo, &tag).await?;
            Ok(link.filter(|link| link.target == *digest).map(|_| tag))
        });
        let naming = looks.buffered(TAGS_AT_ONCE_MAX).try_filter_map(async |tag| Ok(tag));
        Ok(naming.try_collect::<Vec<_>>().await.map_err(|error: s3::Error| error)?)
    }

    async fn all_tags(&self, repo: &RepoName) -> Result<Vec<Tag>> {
        let page = self.tags(repo, None, usize::MAX).await?.unwrap_or_default();
        Ok(page.names.iter().filter_map(|name| Tag::parse(name)).collect())
    }

    /// Removes those of the keys with a prefix that are meant; returns them.
    async fn clear(&self, prefix: &str, is_meant: impl Fn(&str) -> bool) -> s3::Result<Vec<String>> {
        let mut cleared = Vec::new();
        let remove = async |keys: &[String], validity| {
            let left = self.client.delete_many(keys, Some(validity)).await?;
            left.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
        };
        let mut pages = self.client.pages(prefix, None);
        while let Some(page) = pages.try_next().await? {
            let keys = page.into_iter().map(|(key, _)| key).filter(|key| is_meant(key));
            let mut keys: Vec<String> = keys.collect();
            if !keys.is_empty() {
                self.place(&[], async |view| remove(&keys, view.validity()).await).await?;
            }
            cleared.append(&mut keys);
        }
        Ok(cleared)
    }
}
