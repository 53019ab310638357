//! What nobody needs: links of repositories to blobs that none of their manifests refers to, and blobs without a link.

use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::sync::mpsc::Sender;
use uuid::Uuid;

use super::super::condemned::Condemned;
use super::pages::{Entry, Repo};
use super::rounds::Garbage;
use super::{READS_AT_ONCE_MAX, Run, count, digest};
use crate::digest::Digest;
use crate::lock;
use crate::model;
use crate::names::RepoName;
use crate::s3::Kind;
use crate::storage::collect::key;
use crate::store::{Error, MANIFEST_BYTES_MAX, Result};

/// Repositories that are looked at at a time.
const REPOS_AT_ONCE_MAX: usize = 16;

impl Run<'_> {
    /// Notes what repositories have, and hands out links that none of their manifests needs. Returns the uploads that go on.
    pub(super) async fn mark(&self, found: Sender<Garbage>) -> Result<Vec<(RepoName, Uuid)>> {
        let live = Mutex::new(Vec::new());
        self.each_repo(
            |_| false,
            async |repo| {
                let sessions = self.mark_repo(repo, &found).await?;
                lock(&live).extend(sessions);
                Ok(())
            },
        )
        .await?;
        Ok(live.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Hands out the blobs that no repository has.
    pub(super) async fn sweep(&self, found: Sender<Garbage>) -> Result<()> {
        let base = self.bucket.keys.blobs();
        let mut pages = std::pin::pin!(self.bucket.digest_pages(base.clone()));
        while let Some(page) = pages.try_next().await? {
            self.check()?;
            let mut doomed = Vec::new();
            {
                let live = lock(&self.live);
                for (name, head) in page {
                    let parts: Vec<_> = name.strip_prefix(&base).unwrap_or_default().split('/').collect();
                    let [algorithm, part, hex, "data"] = parts[..] else { continue };
                    let Some(digest) = digest(algorithm, hex).filter(|_| hex.starts_with(part)) else {
                        continue;
                    };
                    count(&self.counts.blobs, 1);
                    if self.is_old(head.modified) && live.binary_search(&key(&digest)).is_err() {
                        doomed.push(Garbage {
                            what: Condemned::Blob(digest),
                            bytes: head.bytes,
                            target: None,
                        });
                    }
                }
            }
            send(&found, doomed).await?;
        }
        Ok(())
    }

    /// Visits all repositories, several at a time.
    pub(super) async fn each_repo(
        &self,
        wants_tags: impl Fn(&RepoName) -> bool,
        visit: impl AsyncFn(Repo) -> Result<()>,
    ) -> Result<()> {
        let visit = &visit;
        stream::try_unfold(self.bucket.all_repos(wants_tags), async |mut repos| {
            self.check()?;
            let whole = repos.next().await?;
            let each = |whole: Vec<Repo>| stream::iter(whole.into_iter().map(Ok::<_, Error>));
            Ok::<_, Error>(whole.map(|whole| (each(whole), repos)))
        })
        .try_flatten()
        .try_for_each_concurrent(REPOS_AT_ONCE_MAX, async |repo| visit(repo).await)
        .await
    }

    async fn mark_repo(&self, repo: Repo, found: &Sender<Garbage>) -> Result<Vec<(RepoName, Uuid)>> {
        self.check()?;
        count(&self.counts.repositories, 1);
        let name = &repo.name;
        let revisions: Vec<_> = {
            let gone = lock(&self.gone);
            let stays = |entry: &&Entry| !gone.contains(&of_repo(name, &entry.digest));
            repo.revisions.iter().filter(stays).map(|entry| &entry.digest).collect()
        };
        count(&self.counts.manifests, revisions.len() as u64);
        let mut live: Vec<u128> = revisions.iter().map(|digest| key(digest)).collect();
        let (mut referenced, mut all_are_read) = (Vec::new(), true);
        let mut manifests = stream::iter(revisions)
            .map(|digest| self.references(name, digest))
            .buffer_unordered(READS_AT_ONCE_MAX);
        while let Some(references) = manifests.try_next().await? {
            match references {
                Some(digests) => referenced.extend(digests),
                None => all_are_read = false,
            }
        }
        drop(manifests);
        if !all_are_read {
            tracing::warn!(repo = %name, "a manifest cannot be read, so that all blobs of its repository are kept");
        }
        referenced.sort_unstable();
        referenced.dedup();
        let needs = Needs { referenced, all_are_read };
        let mut has_garbage = self.judge(name, repo.layers, &needs, &mut live, found).await?;
        if repo.has_more_layers {
            let base = self.bucket.keys.layers(name);
            let mut pages = std::pin::pin!(self.bucket.digest_pages(base.clone()));
            while let Some(page) = pages.try_next().await? {
                self.check()?;
                let entry = |(name, head): (String, crate::s3::Head)| {
                    let parts: Vec<_> = name.strip_prefix(&base)?.split('/').collect();
                    let [algorithm, hex, "link"] = parts[..] else { return None };
                    let digest = digest(algorithm, hex)?;
                    Some(Entry { digest, modified: head.modified, bytes: head.bytes })
                };
                let layers = page.into_iter().filter_map(entry).collect();
                has_garbage |= self.judge(name, layers, &needs, &mut live, found).await?;
            }
        }
        let is_empty = live.is_empty() && !repo.has_tags;
        lock(&self.live).extend(live);
        let sessions = self.give_up_uploads(name, repo.sessions).await?;
        if is_empty && has_garbage && sessions.is_empty() {
            // Nothing has to be removed besides: it is there as long as something lies in it.
            count(&self.counts.removed_repositories, 1);
        }
        Ok(sessions.into_iter().map(|id| (name.clone(), id)).collect())
    }

    /// Tells links that are needed, or new, from garbage; returns whether there was any.
    async fn judge(
        &self,
        repo: &RepoName,
        layers: Vec<Entry>,
        needs: &Needs,
        live: &mut Vec<u128>,
        found: &Sender<Garbage>,
    ) -> Result<bool> {
        let mut doomed = Vec::new();
        for Entry { digest, modified, bytes } in layers {
            // A link that is as long as the digest it is called by names that.
            let target = match bytes == digest.as_str().len() as u64 {
                true => None,
                false => match self.target(repo, &digest).await? {
                    Some(target) => Some(target),
                    None => continue,
                },
            };
            let stored = key(target.as_ref().unwrap_or(&digest));
            if needs.has(key(&digest)) || needs.has(stored) || !self.is_old(modified) {
                live.push(stored);
                continue;
            }
            doomed.push(Garbage { what: Condemned::Layer { repo: repo.clone(), digest }, bytes: 0, target });
        }
        let has_garbage = !doomed.is_empty();
        send(found, doomed).await?;
        Ok(has_garbage)
    }

    /// Reads a link that does not name the digest it is called by.
    async fn target(&self, repo: &RepoName, digest: &Digest) -> Result<Option<Digest>> {
        let _permit = self.reads.acquire().await;
        let link = self.bucket.read_link(&self.bucket.keys.layer_link(repo, digest)).await?;
        Ok(link.map(|link| link.target))
    }

    /// Tells what a manifest refers to; `None` if that cannot be known.
    async fn references(&self, repo: &RepoName, digest: &Digest) -> Result<Option<Vec<u128>>> {
        let Some(bytes) = self.manifest(repo, digest).await? else { return Ok(None) };
        Ok(model::references(&bytes).map(|digests| digests.iter().map(key).collect()))
    }

    /// Reads a manifest; `None`, and the log tells, if it is not there, or damaged.
    pub(super) async fn manifest(&self, repo: &RepoName, digest: &Digest) -> Result<Option<bytes::Bytes>> {
        let _permit = self.reads.acquire().await;
        self.check()?;
        let content = self.bucket.client.get(&self.bucket.keys.blob(digest), MANIFEST_BYTES_MAX as u64).await;
        let error = match content {
            Ok(object) if Digest::of(digest.algorithm(), &object.content) == *digest => {
                return Ok(Some(object.content));
            }
            Ok(_) => {
                tracing::warn!(%repo, %digest, "a manifest is damaged; push it again, or delete it");
                return Ok(None);
            }
            Err(error) if error.kind() == Kind::Unavailable => return Err(error.into()),
            Err(error) => error,
        };
        let error = &error as &dyn std::error::Error;
        tracing::warn!(%repo, %digest, error, "a manifest cannot be read; push it again, or delete it");
        Ok(None)
    }

    /// What was last written before then is given up, if it is an upload.
    pub(super) fn given_up(&self) -> Option<SystemTime> {
        self.begun.checked_sub(self.options.upload_age.saturating_add(super::SECOND))
    }
}

/// What the manifests of a repository refer to.
struct Needs {
    /// Sorted.
    referenced: Vec<u128>,
    all_are_read: bool,
}

impl Needs {
    fn has(&self, key: u128) -> bool {
        !self.all_are_read || self.referenced.binary_search(&key).is_ok()
    }
}

/// What tells a manifest of one repository from that of another.
pub(super) fn of_repo(repo: &RepoName, digest: &Digest) -> u128 {
    let both = Digest::of(digest.algorithm(), format!("{digest} {repo}").as_bytes());
    key(&both)
}

async fn send(found: &Sender<Garbage>, garbage: Vec<Garbage>) -> Result<()> {
    for one in garbage {
        found.send(one).await.map_err(|_| Error::other("the collection has ended"))?;
    }
    Ok(())
}
