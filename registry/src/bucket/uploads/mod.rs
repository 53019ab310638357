//! Upload sessions: parts of a multipart upload, and a state that any replica goes on from.
//!
//! ```text
//!   push ──┬── Hashing: other threads, 1 MiB at a time
//!          └── part's buffer ── full, and more comes ──> under way, 4 at a time ──> multipart upload
//!                 │                                        (begun by the first, which puts the state before itself)
//!                 ├── Acknowledged ──> tail: in the state, or an object of its own; then the state, by If-Match
//!                 └── Committed ─────> `commit`: nothing in parts: one PUT of the blob
//!                                               parts at the blob's key: they are put together, there
//!                                               parts beside the state: put together, copied within the store
//! ```
//!
//! A session that no request goes on with, and that stays below one part, leaves nothing but the blob and its link: two
//! requests. Its state is written when it is begun, when a multipart upload is, and with each chunk that is acknowledged.
//!
//! Of two replicas that go on with one session, one writes the state; the other's write fails, and what it had put into
//! parts is found out by their ETags when they are put together. Within a replica a session is held by one request at a time.

mod commit;
mod hashing;
mod intake;
mod state;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::stream::TryStreamExt;
use tokio::sync::Semaphore;
use uuid::Uuid;

use super::keys::Keys;
use super::quota::Room;
use super::{Bucket, found};
use crate::digest::{Algorithm, Digest};
use crate::lock;
use crate::names::RepoName;
use crate::s3::{self, Put};
use crate::store::{Error, Intake, Kind, Result, Session, UploadError};
use intake::Receiving;
use state::{Multipart, Progress, STATE_BYTES_MAX, Tail};

/// Names the state of a session.
const STATE: &str = "dvcr";
/// Names a session's bytes, where the digest was not known when its first part was full; as distribution does.
const DATA: &str = "data";
/// The media type of what is put, as distribution has it.
const CONTENT_TYPE: &str = "application/octet-stream";
/// Parts of the usual size that all uploads together have under way; each upload has one more that it fills.
const PARTS_UNDER_WAY_MAX: u64 = 24;
/// What parts under way are counted in, bytes.
const PERMIT_BYTES: u64 = 1 << 20;

/// The sessions that requests of this replica hold, and what they may have under way.
#[derive(Debug)]
pub(super) struct Held {
    busy: Arc<Mutex<HashSet<Uuid>>>,
    permits: Arc<Semaphore>,
    permits_max: u32,
}

impl Held {
    /// `part_bytes` is the usual size of a part.
    pub(super) fn new(part_bytes: u64) -> Self {
        let permits = part_bytes.div_ceil(PERMIT_BYTES).saturating_mul(PARTS_UNDER_WAY_MAX);
        let permits_max = u32::try_from(permits).unwrap_or(u32::MAX);
        let permits = usize::try_from(permits_max).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self { busy: Arc::default(), permits: Arc::new(Semaphore::new(permits)), permits_max }
    }

    fn lease(&self, id: Uuid) -> Option<Lease> {
        let is_free = lock(&self.busy).insert(id);
        is_free.then(|| Lease { busy: Arc::clone(&self.busy), id })
    }
}

#[derive(Debug)]
struct Lease {
    busy: Arc<Mutex<HashSet<Uuid>>>,
    id: Uuid,
}

impl Drop for Lease {
    fn drop(&mut self) {
        lock(&self.busy).remove(&self.id);
    }
}

/// A session held by one request.
pub(super) struct Upload {
    bucket: Arc<Bucket>,
    home: Home,
    progress: Progress,
    /// The ETag of the state in the bucket; `None` if there is none.
    stored: Option<String>,
    /// Whether a client was told the id, so that another request may go on with it.
    is_known: bool,
    /// Whether the bucket has more of it than the state.
    is_large: bool,
    /// What came behind the last whole part, once it is in memory.
    rest: Option<Bytes>,
    room: Room,
    _lease: Option<Lease>,
}

impl Bucket {
    pub(super) async fn begin_upload(&self, repo: &RepoName, algorithm: Algorithm) -> Result<Uuid> {
        let id = Uuid::new_v4();
        self.begin_upload_as(repo, id, algorithm).await?;
        Ok(id)
    }

    /// Begins a session of this id, which nobody else has.
    pub(super) async fn begin_upload_as(
        &self,
        repo: &RepoName,
        id: Uuid,
        algorithm: Algorithm,
    ) -> Result<()> {
        match Home::new(self, repo, id).put_state(&Progress::new(algorithm), None).await {
            Ok(_) => Ok(()),
            Err(UploadError::Store(error)) => Err(error),
            Err(_) => Err(Error::other("an upload of the same id is there already")),
        }
    }

    pub(super) fn start_upload(bucket: Arc<Self>, repo: &RepoName, algorithm: Algorithm) -> Upload {
        let id = Uuid::new_v4();
        Upload {
            _lease: bucket.uploads.lease(id),
            room: bucket.quotas.room(repo, id, 0),
            home: Home::new(&bucket, repo, id),
            bucket,
            progress: Progress::new(algorithm),
            stored: None,
            is_known: false,
            is_large: false,
            rest: None,
        }
    }

    pub(super) async fn open_upload(
        self: &Arc<Self>,
        repo: &RepoName,
        id: Uuid,
    ) -> Result<Option<Upload>, UploadError> {
        let lease = self.uploads.lease(id).ok_or(UploadError::Busy)?;
        let home = Home::new(self, repo, id);
        let Some((progress, etag)) = home.state().await? else { return Ok(None) };
        let is_large = progress.multipart.is_some() || matches!(progress.tail, Some(Tail::Object(_)));
        let upload = Upload {
            room: self.quotas.room(repo, id, progress.offset),
            bucket: Arc::clone(self),
            home,
            progress,
            stored: Some(etag),
            is_known: true,
            is_large,
            rest: None,
            _lease: Some(lease),
        };
        Ok(Some(upload))
    }

    pub(super) async fn upload_offset(&self, repo: &RepoName, id: Uuid) -> Result<Option<u64>> {
        let home = Home::new(self, repo, id);
        Ok(home.state().await?.map(|(progress, _)| progress.offset))
    }

    pub(super) async fn upload_note(&self, repo: &RepoName, id: Uuid) -> Result<Option<String>> {
        let state = Home::new(self, repo, id).state().await?;
        Ok(state.and_then(|(progress, _)| progress.note))
    }

    /// Tells which multipart upload has the parts of a session, for the collection.
    pub(super) async fn multipart_of(&self, repo: &RepoName, id: Uuid) -> Result<Option<s3::Upload>> {
        let state = Home::new(self, repo, id).state().await?;
        Ok(state.and_then(|(progress, _)| progress.multipart).map(|multipart| multipart.upload))
    }

    /// Removes all there is of a session, for the collection; `false` if a request of this replica works on it.
    ///
    /// One that a request of another replica works on comes to an end there: its next state finds none to replace.
    pub(super) async fn give_up_upload(&self, repo: &RepoName, id: Uuid) -> Result<bool> {
        let Some(_lease) = self.uploads.lease(id) else { return Ok(false) };
        let home = Home::new(self, repo, id);
        // What cannot be read is removed without its parts, which the search for such finds.
        let progress = match home.state().await {
            Ok(state) => state.map(|(progress, _)| progress),
            Err(error) if error.kind() == Kind::Unavailable => return Err(error),
            Err(error) => {
                tracing::warn!(%repo, %id, %error, "an upload is given up whose state cannot be read");
                None
            }
        };
        home.remove(progress.as_ref().and_then(|progress| progress.multipart.as_ref()), true).await?;
        Ok(true)
    }
}

impl Session for Upload {
    fn id(&self) -> Uuid {
        self.home.id
    }

    fn offset(&self) -> u64 {
        self.progress.offset
    }

    fn is_fresh(&self) -> bool {
        self.progress.offset == 0 && self.progress.multipart.is_none()
    }

    fn admits_quickly(&self) -> bool {
        !self.room.is_bounded()
    }

    fn admit(&mut self, length: Option<u64>, digest: Option<&Digest>) -> Result<()> {
        if !self.room.is_bounded() {
            return Ok(());
        }
        let bucket = Arc::clone(&self.bucket);
        bucket.wait(self.make_room(length.unwrap_or(0), digest))
    }

    fn leave_note(&mut self, note: String) {
        self.progress.note = Some(note);
    }

    fn receive(
        self: Box<Self>,
        length: u64,
        digest: Option<&Digest>,
    ) -> Result<Box<dyn Intake>, UploadError> {
        let bucket = Arc::clone(&self.bucket);
        Ok(Box::new(bucket.wait(Receiving::begin(*self, length, digest))?))
    }

    fn commit(self: Box<Self>, expected: &Digest) -> Result<(), UploadError> {
        let bucket = Arc::clone(&self.bucket);
        bucket.wait(self.finish(expected))
    }

    fn commit_small(self: Box<Self>, body: &[u8], expected: &Digest) -> Result<(), UploadError> {
        let bucket = Arc::clone(&self.bucket);
        bucket.wait(self.store(Bytes::copy_from_slice(body), expected))
    }

    fn cancel(self: Box<Self>) -> Result<(), UploadError> {
        let bucket = Arc::clone(&self.bucket);
        Ok(bucket.wait(self.remove())?)
    }
}

impl Upload {
    /// Makes room for so many more bytes; what the repository has under this digest needs none.
    async fn make_room(&mut self, more: u64, digest: Option<&Digest>) -> Result<()> {
        let bytes = self.progress.offset.saturating_add(more);
        if let Some(digest) = digest
            && self.bucket.claim_blob(&self.home.repo, digest).await? == Some(bytes)
        {
            self.room.know(bytes);
        }
        self.room.reach(bytes).await
    }

    /// Removes all there is of it.
    async fn remove(&self) -> Result<()> {
        self.room.keep(0);
        match self.stored {
            None => Ok(()),
            Some(_) => self.home.remove(self.progress.multipart.as_ref(), self.is_large).await,
        }
    }

    /// Removes what no request can go on with; what stays is for the collection.
    async fn discard(&self) {
        if let Err(error) = self.remove().await {
            let (repo, id) = (&self.home.repo, self.home.id);
            tracing::warn!(%repo, %id, %error, "an upload that has ended was not removed");
        }
    }

    /// Reads what came behind the last whole part, unless it is in memory.
    async fn load_rest(&mut self) -> Result<Bytes, UploadError> {
        if let Some(rest) = &self.rest {
            return Ok(rest.clone());
        }
        let bytes = self.progress.tail_bytes();
        let rest = match &self.progress.tail {
            None => Bytes::new(),
            Some(Tail::Bytes(bytes)) => bytes.clone(),
            Some(Tail::Object(name)) => match self.home.client.get(&self.home.key(name), bytes).await {
                Err(error) if error.is_not_found() => {
                    return Err(self.home.lacks(self.stored.as_deref(), error).await);
                }
                object => object?.content,
            },
        };
        if rest.len() as u64 != bytes {
            let why = format!("the tail has {} bytes in place of {bytes}", rest.len());
            return Err(self.home.damaged(why).into());
        }
        self.rest = Some(rest.clone());
        Ok(rest)
    }
}

/// Where a session lies.
#[derive(Clone)]
struct Home {
    client: s3::Client,
    keys: Keys,
    repo: RepoName,
    id: Uuid,
}

impl Home {
    fn new(bucket: &Bucket, repo: &RepoName, id: Uuid) -> Self {
        Self { client: bucket.client.clone(), keys: bucket.keys.clone(), repo: repo.clone(), id }
    }

    /// The key of an object of the session.
    fn key(&self, name: &str) -> String {
        self.keys.upload(&self.repo, self.id) + name
    }

    /// Reads the state, and its ETag.
    async fn state(&self) -> Result<Option<(Progress, String)>> {
        let object = found(self.client.get(&self.key(STATE), STATE_BYTES_MAX).await)?;
        let Some(object) = object else { return Ok(None) };
        let progress = Progress::read(&object.content).map_err(|why| self.damaged(why))?;
        Ok(Some((progress, object.etag)))
    }

    /// Writes the state in place of the one with the ETag `over`, or the first; returns its ETag.
    ///
    /// # Errors
    /// [`UploadError::Busy`] if another replica has written it, or ended the session.
    async fn put_state(&self, progress: &Progress, over: Option<&str>) -> Result<String, UploadError> {
        let written = progress.write().map_err(|error| self.damaged(error.to_string()))?;
        if written.len() as u64 > STATE_BYTES_MAX {
            return Err(self.damaged(format!("{} bytes of state are too many", written.len())).into());
        }
        let put = over.map_or_else(Put::new, Put::over);
        let put = Put { content_type: Some("application/json"), ..put };
        match self.client.put(&self.key(STATE), written, put).await {
            Err(error) if matches!(error.kind(), s3::Kind::Precondition | s3::Kind::NotFound) => {
                Err(UploadError::Busy)
            }
            done => Ok(done?),
        }
    }

    /// Removes the session: its multipart upload, what lies beside the state, if there is anything, and then the state.
    async fn remove(&self, multipart: Option<&Multipart>, is_large: bool) -> Result<()> {
        let client = &self.client;
        let abort = async {
            match multipart {
                Some(multipart) => client.abort_upload(&multipart.upload).await,
                None => Ok(()),
            }
        };
        let state = self.key(STATE);
        let objects = async {
            if !is_large {
                return Ok(());
            }
            let mut pages = client.pages(self.key(""), None);
            while let Some(page) = pages.try_next().await? {
                for (key, _) in page.iter().filter(|(key, _)| *key != state) {
                    client.delete(key, None).await?;
                }
            }
            Ok(())
        };
        tokio::try_join!(abort, objects)?;
        Ok(client.delete(&state, None).await?)
    }

    /// Tells what it means that something is not there which the state says is; `stored` is the ETag of the state.
    async fn lacks(&self, stored: Option<&str>, error: s3::Error) -> UploadError {
        match found(self.client.head(&self.key(STATE)).await) {
            // Somebody who tidies the bucket up has removed it.
            Ok(Some(head)) if Some(head.etag.as_str()) == stored => {
                if let Err(error) = self.remove(None, true).await {
                    tracing::warn!(repo = %self.repo, id = %self.id, %error, "an upload that lacks parts was not removed");
                }
                let why = "what an upload had brought is gone; it has to begin anew";
                UploadError::Store(Error::of(Kind::Unavailable, why, error))
            }
            // Another replica is ahead.
            Ok(_) => UploadError::Busy,
            Err(error) => error.into(),
        }
    }

    fn damaged(&self, why: String) -> Error {
        let context = format!("the state of the upload {} to {} cannot be used", self.id, self.repo);
        Error::of(Kind::Other, context, why)
    }
}

impl From<s3::Error> for UploadError {
    fn from(error: s3::Error) -> Self {
        Self::Store(error.into())
    }
}
