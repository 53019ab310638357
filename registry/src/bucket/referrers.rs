//! Which manifests refer to a subject: an index of empty objects beside distribution's layout, as in a directory.
//!
//! An entry is placed before the manifest it stands for and removed after it, so a lookup that passes over entries without a
//! manifest misses none. What another registry wrote to the bucket has no entry: the first lookup of each process in a repository
//! goes through its manifests.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Mutex;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::Bucket;
use super::keys::digest_of;
use super::manifests::Found;
use crate::digest::{Algorithm, Digest};
use crate::model;
use crate::names::RepoName;
use crate::s3::{self, Put};
use crate::store::{Manifest, Result};

/// Repositories remembered as gone through; when there are more all are forgotten.
const CHECKED_REPOS_MAX: usize = 4096;
/// Manifests that are read at a time; each has up to 4 MiB.
const READS_AT_ONCE_MAX: usize = 16;

/// The repositories whose index is known to be complete.
#[derive(Debug, Default)]
pub(super) struct Complete(Mutex<HashSet<RepoName>>);

impl Bucket {
    /// Visits the manifests whose subject is `subject`, in the order of their digests and behind `after`.
    pub(super) async fn referrers(
        &self,
        repo: &RepoName,
        subject: &Digest,
        after: Option<&Digest>,
        visit: &mut dyn FnMut(&Manifest) -> ControlFlow<()>,
    ) -> Result<()> {
        self.complete_index(repo).await?;
        let prefix = self.keys.referrers(repo, subject);
        let after = after.map(|after| self.keys.referrer(repo, subject, after));
        let mut pages = self.client.pages(prefix, after);
        while let Some(page) = pages.try_next().await? {
            let digests = page.iter().filter_map(|(key, _)| referrer_of(key));
            let read = async |digest| self.sound_manifest(repo, &digest).await;
            let mut manifests = stream::iter(digests).map(read).buffered(READS_AT_ONCE_MAX).boxed_local();
            while let Some(manifest) = manifests.try_next().await? {
                if manifest.is_some_and(|manifest| visit(&manifest).is_break()) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Reads a manifest for a list: one that is damaged must not hide the others.
    async fn sound_manifest(&self, repo: &RepoName, digest: &Digest) -> s3::Result<Option<Manifest>> {
        match self.read_manifest(repo, digest).await? {
            Some(Found::Whole(manifest)) => Ok(Some(manifest)),
            Some(Found::Damaged) => {
                tracing::warn!(%repo, %digest, "a damaged manifest is left out of the referrers");
                Ok(None)
            }
            None => Ok(None),
        }
    }

    pub(super) async fn place_referrer(
        &self,
        repo: &RepoName,
        subject: &Digest,
        referrer: &Digest,
    ) -> s3::Result<()> {
        let key = self.keys.referrer(repo, subject, referrer);
        self.client.put(&key, Bytes::new(), Put::default()).await.map(drop)
    }

    /// Removes an entry; one that stays is passed over by lookups.
    ///
    /// If the same manifest is pushed at the same moment, it may be left without an entry until a process looks for referrers in
    /// the repository for the first time.
    pub(super) async fn remove_referrer(&self, repo: &RepoName, subject: &Digest, referrer: &Digest) {
        let key = self.keys.referrer(repo, subject, referrer);
        if let Err(error) = self.client.delete(&key, None).await {
            tracing::warn!(key, %error, "a referrer's entry was not removed");
        }
    }

    /// Makes the entries of manifests that another registry wrote.
    async fn complete_index(&self, repo: &RepoName) -> s3::Result<()> {
        if crate::lock(&self.referrers.0).contains(repo) {
            return Ok(());
        }
        let mut known = HashSet::new();
        let mut pages = self.client.pages(self.keys.all_referrers(repo), None);
        while let Some(page) = pages.try_next().await? {
            known.extend(page.iter().filter_map(|(key, _)| referrer_of(key)));
        }
        let mut pages = self.client.pages(self.keys.revisions(repo), None);
        while let Some(page) = pages.try_next().await? {
            let digests = page.iter().filter_map(|(key, _)| revision_of(key));
            // A manifest has one subject, so one that has an entry has them all.
            let digests = digests.filter(|digest| !known.contains(digest));
            let made = stream::iter(digests).map(async |digest| {
                let Some(manifest) = self.sound_manifest(repo, &digest).await? else { return Ok(()) };
                match model::subject_of(&manifest.bytes) {
                    Some(subject) => self.place_referrer(repo, &subject, &digest).await,
                    None => Ok(()),
                }
            });
            made.buffer_unordered(READS_AT_ONCE_MAX).try_collect::<()>().await?;
        }
        let mut complete = crate::lock(&self.referrers.0);
        if complete.len() >= CHECKED_REPOS_MAX {
            complete.clear();
        }
        complete.insert(repo.clone());
        Ok(())
    }
}

/// The manifest that an entry stands for.
pub(super) fn referrer_of(key: &str) -> Option<Digest> {
    digest_of(key.rsplit('/').next()?)
}

/// The manifest that a revision's link names by its place.
pub(super) fn revision_of(key: &str) -> Option<Digest> {
    let mut parts = key.strip_suffix("/link")?.rsplit('/');
    let (hex, algorithm) = (parts.next()?, Algorithm::from_name(parts.next()?)?);
    format!("{}:{hex}", algorithm.name()).parse().ok()
}
