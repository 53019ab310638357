//! Uploads in which nothing happened for long, and multipart uploads that no session knows.

use std::collections::{BTreeMap, HashSet};
use std::time::SystemTime;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use uuid::Uuid;

use super::pages::Session;
use super::{READS_AT_ONCE_MAX, Run, count};
use crate::names::RepoName;
use crate::s3;
use crate::store::Result;

impl Run<'_> {
    /// Gives up the sessions of a repository in which nothing has happened for long, and returns the others.
    pub(super) async fn give_up_uploads(
        &self,
        repo: &RepoName,
        sessions: BTreeMap<Uuid, Session>,
    ) -> Result<Vec<Uuid>> {
        let mut live = Vec::new();
        for (id, session) in sessions {
            if self.given_up().is_none_or(|before| session.modified > before) {
                live.push(id);
                continue;
            }
            self.check()?;
            if self.options.dry_run || self.bucket.give_up_upload(repo, id).await? {
                count(&self.counts.removed_uploads, 1);
                count(&self.counts.freed_bytes, session.bytes);
            }
        }
        Ok(live)
    }

    /// Ends the multipart uploads that began long ago and that none of the sessions which go on knows: those of a replica that died
    /// between two requests, or of a copy that broke off.
    ///
    /// A store that lists such uploads only to who knows their keys, as MinIO, has none to tell of.
    pub(super) async fn abort_orphans(&self, live: Vec<(RepoName, Uuid)>) -> Result<()> {
        let Some(before) = self.given_up() else { return Ok(()) };
        let (mut old, mut next) = (Vec::new(), None);
        loop {
            self.check()?;
            let page = self.bucket.client.uploads("", next.as_ref()).await?;
            let is_old = |(upload, begun): (s3::Upload, SystemTime)| (begun <= before).then_some(upload);
            old.extend(page.uploads.into_iter().filter_map(is_old));
            next = page.next;
            if next.is_none() {
                break;
            }
        }
        if old.is_empty() {
            return Ok(());
        }
        let known = live.iter().map(|(repo, id)| self.multipart_of(repo, *id));
        let known: HashSet<String> =
            stream::iter(known).buffer_unordered(READS_AT_ONCE_MAX).try_concat().await?;
        for upload in old.iter().filter(|upload| !known.contains(&upload.id)) {
            self.check()?;
            if !self.options.dry_run {
                self.bucket.client.abort_upload(upload).await?;
            }
            count(&self.counts.removed_uploads, 1);
        }
        Ok(())
    }

    async fn multipart_of(&self, repo: &RepoName, id: Uuid) -> Result<HashSet<String>> {
        self.check()?;
        let known = self.bucket.multipart_of(repo, id).await?;
        Ok(known.into_iter().map(|upload| upload.id).collect())
    }
}
