//! Pages of tags, of digests and of repositories.

use std::cell::Cell;

use super::order::{Listed, Names};
use super::{Bucket, found};
use crate::digest::Digest;
use crate::names::{RepoName, Tag};
use crate::s3::{self, Listing};
use crate::store::{Content, Page, Result};

/// Entries of one page of a list, at most (S3).
const ENTRIES_MAX: u16 = 1000;
/// Keys of one page of a list that is gone through for names of repositories, at least.
const KEYS_MIN: u16 = 16;
/// What makes a key that of a repository; one with upload sessions alone is none yet.
const REPO_DIRS: [&str; 2] = ["_layers/", "_manifests/"];

impl Bucket {
    /// Lists up to `limit` tags behind `after`; `None` if there is no such repository.
    ///
    /// A tag is listed as long as it has any key. So is one that was put while it was removed, of which the history alone may be
    /// left: it names nothing, and goes when it is removed once more or put again. To look at the link of each would take a
    /// request for each.
    pub(super) async fn tags(
        &self,
        repo: &RepoName,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Option<Page>> {
        let prefix = self.keys.tags(repo);
        // One more tells whether there are more, and another may be the one that they are behind.
        let entries = u16::try_from(limit.saturating_add(2)).map_or(ENTRIES_MAX, |all| all.min(ENTRIES_MAX));
        let list = async |position: &str| {
            let behind = format!("{prefix}{position}");
            let page = self.client.list(
                Listing {
                    prefix: &prefix,
                    delimiter: Some('/'),
                    start_after: Some(&behind).filter(|_| !position.is_empty()).map(String::as_str),
                    page_entries_max: Some(entries),
                },
                None,
            );
            let page = page.await?;
            let names = page.prefixes.iter().filter_map(|key| key.strip_prefix(&prefix)?.strip_suffix('/'));
            // All keys of a tag are before what the slash is followed by. Distribution has nothing else there.
            let others = page.objects.iter().filter_map(|(key, _)| key.strip_prefix(&prefix));
            let last = names.clone().map(|name| format!("{name}0")).chain(others.map(str::to_owned)).max();
            let names = names.filter(|name| Tag::parse(name).is_some()).map(str::to_owned).collect();
            Ok::<_, s3::Error>(Listed { names, next: last.filter(|_| page.next.is_some()) })
        };
        let exists = async |name: &str| match Tag::parse(name) {
            Some(tag) => {
                Ok(found(self.client.head(&self.keys.tag_current_link(repo, &tag)).await)?.is_some())
            }
            None => Ok(false),
        };
        let page = Names::Tags.page(after.unwrap_or_default(), limit, list, exists).await?;
        match page.names.is_empty() && !page.more && !self.is_repo(repo).await? {
            true => Ok(None),
            false => Ok(Some(page)),
        }
    }

    /// Lists up to `limit` digests of what a repository has of one kind, behind `after`.
    pub(super) async fn digests(
        &self,
        repo: &RepoName,
        of: Content,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Digest>> {
        let (prefix, after) = match of {
            Content::Blobs => (self.keys.layers(repo), after.map(|after| self.keys.layer_link(repo, after))),
            Content::Manifests => {
                (self.keys.revisions(repo), after.map(|after| self.keys.revision_link(repo, after)))
            }
        };
        let (mut found, mut next) = (Vec::new(), None);
        loop {
            let left = limit.saturating_sub(found.len());
            let listing = Listing {
                prefix: &prefix,
                start_after: after.as_deref(),
                page_entries_max: Some(
                    u16::try_from(left).map_or(ENTRIES_MAX, |left| left.clamp(1, ENTRIES_MAX)),
                ),
                ..Listing::default()
            };
            let page = self.client.list(listing, next.as_deref()).await?;
            // Old versions of distribution have signatures beside a link.
            found.extend(page.objects.iter().filter_map(|(key, _)| {
                let (algorithm, rest) = key.strip_prefix(&prefix)?.split_once('/')?;
                format!("{algorithm}:{}", rest.strip_suffix("/link")?).parse::<Digest>().ok()
            }));
            next = page.next;
            if next.is_none() || found.len() >= limit {
                found.truncate(limit);
                return Ok(found);
            }
        }
    }

    /// Lists up to `limit` repositories behind `after`.
    ///
    /// It goes through the keys themselves, which show a hundred small repositories by one request. Of what else the last of them
    /// has it goes on behind all; and where repositories are large, with fewer keys at a time.
    pub(super) async fn repositories(&self, after: Option<&str>, limit: usize) -> Result<Page> {
        let prefix = self.keys.repositories();
        // A small repository has some eight.
        let keys = u16::try_from(limit.saturating_add(2).saturating_mul(8)).unwrap_or(ENTRIES_MAX);
        let keys = Cell::new(keys.clamp(KEYS_MIN, ENTRIES_MAX));
        let list = async |position: &str| {
            let behind = format!("{prefix}{position}");
            let page = self.client.list(
                Listing {
                    prefix: &prefix,
                    delimiter: None,
                    start_after: Some(&behind),
                    page_entries_max: Some(keys.get()),
                },
                None,
            );
            let page = page.await?;
            let (mut names, mut last) = (Vec::new(), None);
            let mut seen = 0_usize;
            for below in page.objects.iter().filter_map(|(key, _)| key.strip_prefix(&prefix)) {
                let Some((name, at)) = below.find("/_").map(|at| (&below[..at], at)) else {
                    last = Some(below.to_owned());
                    continue;
                };
                let is_of_repo = REPO_DIRS.iter().any(|dir| below[at + 1..].starts_with(dir));
                if is_of_repo
                    && names.last().is_none_or(|last| last != name)
                    && RepoName::parse(name).is_some()
                {
                    names.push(name.to_owned());
                }
                // Behind all that is the repository's own.
                let end = format!("{name}/`");
                if last.as_ref() != Some(&end) {
                    seen += 1;
                    last = Some(end);
                }
            }
            let next = match seen {
                ..=1 => keys.get() / 4,
                _ => keys.get().saturating_mul(4),
            };
            keys.set(next.clamp(KEYS_MIN, ENTRIES_MAX));
            Ok::<_, s3::Error>(Listed { names, next: last.filter(|_| page.next.is_some()) })
        };
        let exists = async |name: &str| match RepoName::parse(name) {
            Some(repo) => self.is_repo(&repo).await,
            None => Ok(false),
        };
        Ok(Names::Repositories.page(after.unwrap_or_default(), limit, list, exists).await?)
    }

    /// Whether there is a repository of this name, and not merely one below it.
    async fn is_repo(&self, repo: &RepoName) -> s3::Result<bool> {
        let repo = self.keys.repo(repo);
        let prefix = format!("{repo}_");
        let listing = Listing { prefix: &prefix, page_entries_max: Some(1), ..Listing::default() };
        let page = self.client.list(listing, None).await?;
        // What makes a repository comes before its sessions.
        let first = page.objects.first().and_then(|(key, _)| key.strip_prefix(&repo));
        Ok(first.is_some_and(|below| REPO_DIRS.iter().any(|dir| below.starts_with(dir))))
    }
}
