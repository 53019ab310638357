//! A directory as the [`Store`] that the API sees.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use uuid::Uuid;

use super::blobs::{self, Reader};
use super::ingest::{Ingest, join_error};
use super::{Error, Result, Storage, uploads};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::model::Checked;
use crate::names::{Reference, RepoName, Tag};
use crate::rules::Rules;
use crate::store::{
    Blob, ChangeError, Content, Ending, Intake, Manifest, Page, Removed, Session, Stats, Stopped, Store,
    UploadError, collect,
};

/// Each chunk costs a request and a state on disk.
const CHUNK_BYTES_MIN: u64 = 1 << 20;

/// Each method is one of [`Storage`]'s own, which is preferred where both have the same name.
impl Store for Storage {
    fn is_remote(&self) -> bool {
        false
    }

    fn claim_blob(&self, repo: &RepoName, digest: &Digest) -> Result<Option<u64>> {
        self.claim_blob(repo, digest)
    }

    fn open_blob(self: Arc<Self>, repo: &RepoName, digest: &Digest) -> Result<Option<Box<dyn Blob>>> {
        Ok(Storage::open_blob(&self, repo, digest)?.map(|blob| Box::new(blob) as Box<dyn Blob>))
    }

    fn locate_blob(&self, _: &RepoName, _: &Digest, _: Duration) -> Result<Option<String>> {
        Ok(None)
    }

    fn find_manifest(&self, repo: &RepoName, reference: &Reference) -> Result<Option<Manifest>> {
        match self.resolve(repo, reference)? {
            Some(digest) => self.manifest(repo, &digest),
            None => Ok(None),
        }
    }

    fn begin_upload(&self, repo: &RepoName, algorithm: Algorithm) -> Result<Uuid> {
        self.begin_upload(repo, algorithm)
    }

    fn begin_upload_as(&self, repo: &RepoName, id: Uuid, algorithm: Algorithm) -> Result<()> {
        self.begin_upload_as(repo, id, algorithm)
    }

    fn start_upload(
        self: Arc<Self>,
        repo: &RepoName,
        algorithm: Algorithm,
    ) -> Result<Box<dyn Session>, UploadError> {
        let id = Storage::begin_upload(&self, repo, algorithm)?;
        let session = Store::open_upload(self, repo, id)?;
        session.ok_or_else(|| Error::other("an upload that was just begun is gone").into())
    }

    fn has_room(&self, repo: &RepoName, bytes: u64) -> Result<()> {
        self.has_room(repo, bytes)
    }

    fn chunk_bytes_min(&self) -> u64 {
        CHUNK_BYTES_MIN
    }

    fn opens_quickly(&self, id: Uuid) -> bool {
        self.is_fresh_upload(id)
    }

    fn open_upload(
        self: Arc<Self>,
        repo: &RepoName,
        id: Uuid,
    ) -> Result<Option<Box<dyn Session>>, UploadError> {
        let session = Storage::open_upload(&self, repo, id)?;
        Ok(session.map(|session| Box::new(Held { storage: self, session }) as Box<dyn Session>))
    }

    fn upload_offset(&self, repo: &RepoName, id: Uuid) -> Result<Option<u64>> {
        self.upload_offset(repo, id)
    }

    fn upload_note(&self, repo: &RepoName, id: Uuid) -> Result<Option<String>> {
        self.upload_note(repo, id)
    }

    fn mount_blob(&self, from: &RepoName, to: &RepoName, digest: &Digest) -> Result<Option<u64>> {
        self.mount_blob(from, to, digest)
    }

    fn delete_blob(&self, repo: &RepoName, digest: &Digest) -> Result<bool> {
        self.delete_blob(repo, digest)
    }

    fn accept_manifest(
        &self,
        repo: &RepoName,
        manifest: Manifest,
        checked: &Checked,
        tags: &[Tag],
        rules: &Rules,
    ) -> Result<Vec<Digest>, ChangeError> {
        self.accept_manifest(repo, manifest, checked, tags, rules)
    }

    fn remove(
        &self,
        repo: &RepoName,
        reference: Option<&Reference>,
        rules: &Rules,
    ) -> Result<Removed, ChangeError> {
        self.remove(repo, reference, rules)
    }

    fn tags(&self, repo: &RepoName, after: Option<&str>, limit: usize) -> Result<Option<Page>> {
        self.tags(repo, after, limit)
    }

    fn repositories(&self, after: Option<&str>, limit: usize) -> Result<Page> {
        self.repositories(after, limit)
    }

    fn digests(
        &self,
        repo: &RepoName,
        of: Content,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Digest>> {
        self.digests(repo, of, after, limit)
    }

    fn referrers(
        &self,
        repo: &RepoName,
        subject: &Digest,
        after: Option<&Digest>,
        visit: &mut dyn FnMut(&Manifest) -> ControlFlow<()>,
    ) -> Result<()> {
        for digest in self.referrers(repo, subject)? {
            if after.is_none_or(|after| digest > *after)
                && let Some(manifest) = self.sound_manifest(repo, &digest)
                && visit(&manifest).is_break()
            {
                break;
            }
        }
        Ok(())
    }

    fn collect(
        &self,
        options: &collect::Options,
        counts: &collect::Counts,
        stop: &AtomicBool,
    ) -> Result<Option<()>> {
        self.collect(options, counts, stop)
    }

    fn freeze(&self, _: Duration) -> Result<()> {
        Ok(())
    }

    fn note_moved(&self, to: Option<&str>) -> Result<()> {
        self.note_moved(to)
    }

    fn moved(&self) -> Result<Option<String>> {
        self.moved()
    }

    fn probe(&self) -> Result<()> {
        self.probe()
    }

    fn stats(&self) -> Stats {
        self.stats()
    }

    fn close(&self) {
        self.keep_pending_uploads();
    }
}

impl Blob for blobs::Blob {
    fn length(&self) -> u64 {
        self.length
    }

    fn read(self: Box<Self>, first: u64, end: u64) -> BoxStream<'static, io::Result<Bytes>> {
        let reader = Reader::new(self.file, &self.storage, first, end);
        Box::pin(stream::unfold(reader, async |mut reader| {
            let bytes = reader.next().await.transpose()?;
            Some((bytes, reader))
        }))
    }
}

/// A session, and whose it is.
struct Held {
    storage: Arc<Storage>,
    session: uploads::Session,
}

impl Session for Held {
    fn id(&self) -> Uuid {
        self.session.id()
    }

    fn offset(&self) -> u64 {
        self.session.offset()
    }

    fn is_fresh(&self) -> bool {
        self.session.is_fresh()
    }

    fn admits_quickly(&self) -> bool {
        self.storage.admits_quickly(self.session.repo())
    }

    fn admit(&mut self, length: Option<u64>, digest: Option<&Digest>) -> Result<()> {
        self.storage.admit(&mut self.session, length, digest)
    }

    fn leave_note(&mut self, note: String) {
        self.session.leave_note(note);
    }

    fn receive(
        self: Box<Self>,
        length: u64,
        digest: Option<&Digest>,
    ) -> Result<Box<dyn Intake>, UploadError> {
        let Self { storage, mut session } = *self;
        if let Some(digest) = digest {
            session.prefer(digest.algorithm());
        }
        storage.settle_upload(&mut session)?;
        let (hasher, offset) = (session.hasher(), session.offset());
        let ingest = Ingest::start(
            (storage.ingest_pool(), storage.space()),
            &session.data(),
            session.hashstates(),
            offset,
            session.hasher(),
            length,
        );
        Ok(Box::new(Receiving {
            storage,
            session,
            ingest,
            began: (hasher, offset),
            reached: offset,
            refused: None,
        }))
    }

    fn commit(self: Box<Self>, expected: &Digest) -> Result<(), UploadError> {
        self.storage.commit_upload(self.session, expected)
    }

    fn commit_small(self: Box<Self>, body: &[u8], expected: &Digest) -> Result<(), UploadError> {
        self.storage.commit_small(self.session, body, expected)
    }

    fn cancel(self: Box<Self>) -> Result<(), UploadError> {
        Ok(self.storage.cancel_upload(self.session)?)
    }
}

/// A session that bytes are coming into.
struct Receiving {
    storage: Arc<Storage>,
    session: uploads::Session,
    ingest: Ingest,
    /// What the session was when the request began.
    began: (Hasher, u64),
    /// What it will have with all that has come.
    reached: u64,
    /// Why a quota left no room for more.
    refused: Option<Error>,
}

impl Intake for Receiving {
    fn push(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), Stopped>> {
        Box::pin(async move {
            self.reached = self.reached.saturating_add(bytes.len() as u64);
            if let Err(error) = self.session.reach(self.reached) {
                self.refused = Some(error);
                return Err(Stopped);
            }
            self.ingest.push(&bytes).await
        })
    }

    fn end(self: Box<Self>, ending: Ending) -> BoxFuture<'static, Result<Box<dyn Session>, UploadError>> {
        Box::pin(async move {
            let held = self.finish(ending).await?;
            Ok(Box::new(held) as Box<dyn Session>)
        })
    }
}

impl Receiving {
    async fn finish(self, ending: Ending) -> Result<Held> {
        let Self { storage, mut session, ingest, began, refused, .. } = self;
        // A disk that took no more is told here.
        let came = match (ingest.finish().await, refused) {
            (Ok(came), None) => came,
            (Ok(_), Some(error)) => return Err(give_back(session, began, error).await),
            (Err(error), _) if error.is_full() => return Err(give_back(session, began, error).await),
            (Err(error), _) => return Err(error),
        };
        if ending == Ending::Committed {
            session.set(came.0, came.1);
            return Ok(Held { storage, session });
        }
        let session = blocking(move || {
            match ending {
                Ending::Acknowledged | Ending::Committed => session.advance(came.0, came.1)?,
                // Good to the last byte: the client asks by GET and goes on from there.
                Ending::BrokenOff => session.keep(came, began)?,
                Ending::TakenBack => session.rewind(began.0, began.1)?,
            }
            Ok(session)
        });
        Ok(Held { storage, session: session.await? })
    }
}

/// Takes a request's bytes back, so that they leave room for others.
async fn give_back(mut session: uploads::Session, (hasher, offset): (Hasher, u64), error: Error) -> Error {
    if let Err(error) = blocking(move || session.rewind(hasher, offset)).await {
        tracing::warn!(%error, "an upload that found no room keeps its place until it goes on or is given up");
    }
    error
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(join_error)?
}

#[cfg(test)]
mod tests {
    use super::super::collect::Grace;
    use super::*;
    use crate::store::conformance::{Place, conformance};

    fn directory() -> Place {
        let root = tempfile::tempdir().unwrap();
        Place::new(move |grace| Arc::new(Storage::open(root.path(), Grace::new(grace)).unwrap()))
    }

    conformance!(directory);
}
