//! A bucket as the [`Store`] that the API sees.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use futures_util::future::BoxFuture;
use uuid::Uuid;

use super::Bucket;
use super::blobs::Seen;
use super::kept::Kept;
use super::moved::Note;
use crate::digest::{Algorithm, Digest};
use crate::model::Checked;
use crate::names::{Reference, RepoName, Tag};
use crate::rules::Rules;
use crate::store::{
    Blob, ChangeError, Content, Error, Manifest, Page, Removed, Result, Session, Stats, Store, UploadError,
    collect,
};

/// Each method waits for one of [`Bucket`]'s own, which is preferred where both have the same name.
impl Store for Bucket {
    fn is_remote(&self) -> bool {
        true
    }

    fn claim_blob(&self, repo: &RepoName, digest: &Digest) -> Result<Option<u64>> {
        self.wait(self.claim_blob(repo, digest))
    }

    fn claim_without_blocking(
        self: Arc<Self>,
        repo: RepoName,
        digest: Digest,
    ) -> Option<BoxFuture<'static, Result<Option<u64>>>> {
        Some(Box::pin(async move {
            let target = match self.see_blob(&repo, &digest).await? {
                Seen::Absent => return Ok(None),
                Seen::Young(bytes) => return Ok(Some(bytes)),
                Seen::Old(target) => target,
            };
            let claim = move || self.wait(self.claim_old(&repo, &digest, target));
            let claimed = tokio::task::spawn_blocking(claim).await;
            claimed.unwrap_or_else(|error| Err(Error::new("cannot claim a blob", error.into())))
        }))
    }

    fn open_blob(self: Arc<Self>, repo: &RepoName, digest: &Digest) -> Result<Option<Box<dyn Blob>>> {
        if let Some(kept) = &self.kept
            && kept.has(digest)
            && self.wait(self.has_as_it_is_called(repo, digest))?
            && let Some(blob) = kept.get(digest)
        {
            return Ok(Some(Box::new(blob)));
        }
        let Some(blob) = self.wait(Bucket::open_blob(&self, repo, digest))? else { return Ok(None) };
        if let Some(kept) = &self.kept {
            kept.missed(digest, self.keys.blob(digest), blob.length());
        }
        Ok(Some(Box::new(blob)))
    }

    fn locate_blob(&self, repo: &RepoName, digest: &Digest, lasts: Duration) -> Result<Option<String>> {
        self.wait(self.locate_blob(repo, digest, lasts))
    }

    fn find_manifest(&self, repo: &RepoName, reference: &Reference) -> Result<Option<Manifest>> {
        self.wait(self.find_manifest(repo, reference))
    }

    fn begin_upload(&self, repo: &RepoName, algorithm: Algorithm) -> Result<Uuid> {
        self.wait(self.begin_upload(repo, algorithm))
    }

    fn begin_upload_as(&self, repo: &RepoName, id: Uuid, algorithm: Algorithm) -> Result<()> {
        self.wait(self.begin_upload_as(repo, id, algorithm))
    }

    fn start_upload(
        self: Arc<Self>,
        repo: &RepoName,
        algorithm: Algorithm,
    ) -> Result<Box<dyn Session>, UploadError> {
        Ok(Box::new(Bucket::start_upload(self, repo, algorithm)))
    }

    fn has_room(&self, repo: &RepoName, bytes: u64) -> Result<()> {
        self.wait(async { self.quotas.room(repo, Uuid::new_v4(), 0).check(bytes).await })
    }

    fn chunk_bytes_min(&self) -> u64 {
        // What is behind the last whole part is written anew with each chunk.
        self.client.settings().part_size.0
    }

    fn opens_quickly(&self, _: Uuid) -> bool {
        false
    }

    fn open_upload(
        self: Arc<Self>,
        repo: &RepoName,
        id: Uuid,
    ) -> Result<Option<Box<dyn Session>>, UploadError> {
        let session = self.wait(Bucket::open_upload(&self, repo, id))?;
        Ok(session.map(|session| Box::new(session) as Box<dyn Session>))
    }

    fn upload_offset(&self, repo: &RepoName, id: Uuid) -> Result<Option<u64>> {
        self.wait(self.upload_offset(repo, id))
    }

    fn upload_note(&self, repo: &RepoName, id: Uuid) -> Result<Option<String>> {
        self.wait(self.upload_note(repo, id))
    }

    fn mount_blob(&self, from: &RepoName, to: &RepoName, digest: &Digest) -> Result<Option<u64>> {
        self.wait(self.mount_blob(from, to, digest))
    }

    fn delete_blob(&self, repo: &RepoName, digest: &Digest) -> Result<bool> {
        self.wait(self.delete_blob(repo, digest))
    }

    fn accept_manifest(
        &self,
        repo: &RepoName,
        manifest: Manifest,
        checked: &Checked,
        tags: &[Tag],
        rules: &Rules,
    ) -> Result<Vec<Digest>, ChangeError> {
        self.wait(self.accept_manifest(repo, &manifest, checked, tags, rules))
    }

    fn remove(
        &self,
        repo: &RepoName,
        reference: Option<&Reference>,
        rules: &Rules,
    ) -> Result<Removed, ChangeError> {
        self.wait(self.remove(repo, reference, rules))
    }

    fn tags(&self, repo: &RepoName, after: Option<&str>, limit: usize) -> Result<Option<Page>> {
        self.wait(self.tags(repo, after, limit))
    }

    fn repositories(&self, after: Option<&str>, limit: usize) -> Result<Page> {
        self.wait(self.repositories(after, limit))
    }

    fn digests(
        &self,
        repo: &RepoName,
        of: Content,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Digest>> {
        self.wait(self.digests(repo, of, after, limit))
    }

    fn referrers(
        &self,
        repo: &RepoName,
        subject: &Digest,
        after: Option<&Digest>,
        visit: &mut dyn FnMut(&Manifest) -> ControlFlow<()>,
    ) -> Result<()> {
        self.wait(self.referrers(repo, subject, after, visit))
    }

    fn collect(
        &self,
        options: &collect::Options,
        counts: &collect::Counts,
        stop: &AtomicBool,
    ) -> Result<Option<()>> {
        self.wait(self.collect(options, counts, stop))
    }

    fn freeze(&self, lasts: Duration) -> Result<()> {
        Ok(self.wait(self.freeze(lasts))?)
    }

    fn note_moved(&self, to: Option<&str>) -> Result<()> {
        Ok(self.wait(self.note_moved(to))?)
    }

    fn moved(&self) -> Result<Option<String>> {
        Ok(self.wait(self.read_moved())?.and_then(Note::gone_to))
    }

    fn probe(&self) -> Result<()> {
        self.wait(self.probe())
    }

    fn stats(&self) -> Stats {
        Stats { quotas: self.quotas.usage(), kept: self.kept.as_ref().map(Kept::stats), ..Stats::default() }
    }

    fn close(&self) {}
}
