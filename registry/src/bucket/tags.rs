//! Tags: what they name, placed, and never changed where that is the rule.

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::Bucket;
use super::links::Link;
use crate::digest::Digest;
use crate::names::{RepoName, Tag};
use crate::rules::Rules;
use crate::s3::{self, Condition, Head, Kind, Validity};

/// Tags that are placed or looked at by one request of a client at a time.
pub(super) const TAGS_AT_ONCE_MAX: usize = 32;
/// How often a tag that never changes is tried to be placed while others place and remove it.
const TRIES_MAX: u32 = 8;

/// A tag that stays as it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Immutable {
    pub(super) tag: Tag,
    pub(super) names: Digest,
}

impl Bucket {
    /// Returns what a tag names, whether or not that is there.
    pub(super) async fn tag_link(&self, repo: &RepoName, tag: &Tag) -> s3::Result<Option<Link>> {
        self.read_link(&self.keys.tag_current_link(repo, tag)).await
    }

    /// Finds one of the tags that never change, and that names another manifest which is there.
    pub(super) async fn find_immutable(
        &self,
        repo: &RepoName,
        tags: &[Tag],
        digest: &Digest,
        rules: &Rules,
    ) -> s3::Result<Option<Immutable>> {
        let tags = tags.iter().filter(|tag| rules.is_immutable(repo, tag));
        let looks = stream::iter(tags).map(async |tag| {
            let other = self.tag_link(repo, tag).await?.map(|link| link.target);
            match other.filter(|names| names != digest) {
                Some(names) if self.has_revision(repo, &names).await? => {
                    Ok(Some(Immutable { tag: tag.clone(), names }))
                }
                _ => Ok(None),
            }
        });
        looks
            .buffered(TAGS_AT_ONCE_MAX)
            .try_filter_map(async |found| Ok(found))
            .boxed_local()
            .try_next()
            .await
    }

    /// Lets tags name a manifest that was placed by the same view. Returns one that never changes, if it names another one.
    pub(super) async fn place_tags(
        &self,
        repo: &RepoName,
        tags: &[Tag],
        digest: &Digest,
        rules: &Rules,
        validity: Validity,
    ) -> s3::Result<Option<Immutable>> {
        let placed = stream::iter(tags).map(async |tag| {
            let names = match rules.is_immutable(repo, tag) {
                true => self.place_immutable(repo, tag, digest, validity).await?,
                false => {
                    self.place_link(&self.keys.tag_current_link(repo, tag), digest, validity).await?;
                    None
                }
            };
            // The history comes behind, so that no tag has nothing else if this ends here.
            if names.is_none() {
                self.place_link(&self.keys.tag_index_link(repo, tag, digest), digest, validity).await?;
            }
            Ok(names.map(|names| Immutable { tag: tag.clone(), names }))
        });
        let refused: Vec<_> = placed
            .buffered(TAGS_AT_ONCE_MAX)
            .try_filter_map(async |refused| Ok(refused))
            .try_collect()
            .await?;
        Ok(refused.into_iter().next())
    }

    /// Places a tag that never changes; returns what it names, if that is another manifest which is there.
    ///
    /// The store decides between two who do so at the same time. A tag that was left behind when its manifest was deleted names
    /// nothing, and is replaced.
    async fn place_immutable(
        &self,
        repo: &RepoName,
        tag: &Tag,
        digest: &Digest,
        validity: Validity,
    ) -> s3::Result<Option<Digest>> {
        let key = self.keys.tag_current_link(repo, tag);
        let mut condition = Condition::Absent;
        let mut tries = 1;
        loop {
            let error = match self.place_link_if(&key, digest, Some(condition), validity).await {
                Ok(()) => return Ok(None),
                Err(error) => error,
            };
            if !matches!(error.kind(), Kind::Precondition | Kind::NotFound) || tries >= TRIES_MAX {
                return Err(error);
            }
            tries += 1;
            condition = match self.read_link(&key).await? {
                None => Condition::Absent,
                Some(link) if link.target == *digest => return Ok(None),
                Some(link) if self.has_revision(repo, &link.target).await? => return Ok(Some(link.target)),
                Some(link) => Condition::Is(link.etag),
            };
        }
    }

    /// Whether a repository has a manifest, by its link.
    pub(super) async fn has_revision(&self, repo: &RepoName, digest: &Digest) -> s3::Result<bool> {
        Ok(self.revision(repo, digest).await?.is_some())
    }

    /// Looks at a repository's link to a manifest.
    pub(super) async fn revision(&self, repo: &RepoName, digest: &Digest) -> s3::Result<Option<Head>> {
        let link = self.look_together(&self.keys.revision_link(repo, digest)).await?;
        // A link is written whole or not at all, so its content need not be read.
        Ok(link.filter(|link| link.bytes > 0))
    }
}
