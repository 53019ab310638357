//! Pushing a blob in chunks: each is kept until the registry acknowledged it, so a broken one is continued.
//!
//! ```text
//!  start (POST) ──> open ──append (PATCH)──> open ──commit (PUT)──> blob
//!                    │ a chunk breaks: ask what arrived (GET), send the rest
//!                    └─ dropped: cancel (DELETE) in the background, unless a note was left
//! ```
//!
//! A session may have a name (docs/registry.md, "Named sessions"). A registry that knows such finds it again for whoever asks by
//! that name, and gives back the note that came with the last chunk: by it another process goes on. Other registries begin a
//! session like any other.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONTENT_RANGE, HeaderName, LOCATION, RANGE};
use http::{Method, StatusCode};
use reqwest::Response;
use url::Url;

use crate::digest::{self, Digest, Hasher};
use crate::repository::{Access, Repository, fixed};
use crate::request::{ATTEMPTS_MAX, Outgoing, Transport, back_off, header, is_transient, retry_after};
use crate::{Error, ErrorKind, Result};

/// Size of the chunks that [`BlobWriter`] is best fed with, bytes.
pub const CHUNK_BYTES: usize = 8 << 20;
/// How long a chunk is tried that a registry does not take, from its first failure on, milliseconds: a registry that is
/// started again, or moved to another machine, is back by then.
const PATIENCE_MS: u64 = 10 * 60 * 1_000;
/// Longest wait for the registry to make a blob of what was uploaded, milliseconds. Some copy all of it then.
const COMMIT_TIMEOUT_MS: u64 = 30 * 60 * 1_000;

const OCI_CHUNK_MIN_LENGTH: HeaderName = HeaderName::from_static("oci-chunk-min-length");
/// What whoever goes on with a named session needs to know; visible ASCII.
const UPLOAD_NOTE: HeaderName = HeaderName::from_static("dvcr-upload-note");
/// How long the blob is that a session is for.
const UPLOAD_LENGTH: HeaderName = HeaderName::from_static("dvcr-upload-length");
const OCTETS: &str = "application/octet-stream";

/// An open upload session. Dropping it cancels the session in the background, unless a note was left with it.
#[derive(Debug)]
pub struct Upload {
    repository: Repository,
    location: Url,
    /// Bytes that the registry acknowledged.
    offset: u64,
    what: String,
    open: bool,
    /// What the session goes by, if it was asked for by a name.
    name: Option<String>,
    /// Whether the registry keeps notes with this session.
    is_named: bool,
    /// Sent with the next chunk.
    note: Option<String>,
    /// How long the registry wants to be left alone that did not take the last chunk.
    wanted_wait: Option<Duration>,
    /// Whether it outlives us, for whoever asks for it by its name.
    stays: bool,
}

impl Repository {
    /// Opens an upload session.
    pub async fn start_upload(&self) -> Result<Upload> {
        let what = format!("pushing a blob to {}", self.name);
        let url = self.url("blobs/uploads/").await?;
        let request = Outgoing::new(Method::POST, url, Access::Push, &self.name, &what);
        let response = self.transport.send_retrying(&request).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(self.transport.refused(response, &what).await);
        }
        Upload::adopt(self.clone(), &response, what)
    }

    /// Opens the upload session that goes by `name` (1 to 128 letters, digits, `-`, `_` and `.`), and returns the note that was
    /// left with it: `None` if it is a new one, or the registry knows no names. `bytes` is the length of the whole blob, as far as
    /// known: see [`Upload::announce`].
    pub async fn return_to_upload(&self, name: &str, bytes: Option<u64>) -> Result<(Upload, Option<String>)> {
        let (upload, note) = self.open_named(name, bytes).await?;
        if upload.offset == 0 || note.is_some() {
            return Ok((upload, note));
        }
        // Nobody can tell what came of it.
        upload.cancel().await;
        self.open_named(name, bytes).await
    }

    async fn open_named(&self, name: &str, bytes: Option<u64>) -> Result<(Upload, Option<String>)> {
        let what = format!("pushing a blob to {}", self.name);
        let response = self.ask_for_named(name, bytes, &what).await?;
        let note = header(response.headers(), &UPLOAD_NOTE).map(str::to_owned);
        let received = header(response.headers(), &RANGE).and_then(received_bytes);
        let mut upload = Upload::adopt(self.clone(), &response, what)?;
        upload.name = Some(name.to_owned());
        if note.is_some() {
            // `0-0` is also what registries say of an empty session.
            upload.is_named = true;
            upload.offset = received.filter(|bytes| *bytes > 1).unwrap_or(0);
        }
        let note = note.filter(|note| !note.is_empty());
        upload.stays = note.is_some();
        Ok((upload, note))
    }

    /// Has the registry find the session that goes by `name`, or begin it, for a blob of so many bytes.
    async fn ask_for_named(&self, name: &str, bytes: Option<u64>, what: &str) -> Result<Response> {
        let mut url = self.url("blobs/uploads/").await?;
        url.query_pairs_mut().append_pair("session", name);
        let mut request = Outgoing::new(Method::POST, url, Access::Push, &self.name, what);
        if let Some(bytes) = bytes {
            request = request.header(UPLOAD_LENGTH, &bytes.to_string());
        }
        let response = self.transport.send_retrying(&request).await?;
        match response.status() {
            StatusCode::ACCEPTED => Ok(response),
            _ => Err(self.transport.refused(response, what).await),
        }
    }

    /// Opens an upload session and hashes what goes into it.
    pub async fn start_blob(&self) -> Result<BlobWriter> {
        Ok(self.start_upload().await?.into())
    }

    /// Pushes a small blob, unless the repository has it.
    pub async fn push_blob(&self, bytes: Bytes) -> Result<Digest> {
        let digest = digest::sha256(&bytes)?;
        if self.blob_size(&digest).await?.is_none() {
            let mut upload = self.start_upload().await?;
            upload.append(bytes).await?;
            upload.commit(&digest).await?;
        }
        Ok(digest)
    }
}

impl Upload {
    /// Takes over the session that `response` opened.
    pub(crate) fn adopt(repository: Repository, response: &Response, what: String) -> Result<Self> {
        let location = header(response.headers(), &LOCATION).ok_or_else(|| {
            Error::new(ErrorKind::Protocol, format!("{what}: the registry named no upload location"))
        })?;
        let location = repository.transport.resolve(response.url(), location)?;
        let minimum = header(response.headers(), &OCI_CHUNK_MIN_LENGTH).and_then(|v| v.parse::<u64>().ok());
        let upload = Self {
            repository,
            location,
            offset: 0,
            what,
            open: true,
            name: None,
            is_named: false,
            note: None,
            wanted_wait: None,
            stays: false,
        };
        // Ours asks for the parts of its bucket and takes less; one that does not says so when it gets less.
        if let Some(minimum) = minimum.filter(|bytes| *bytes > CHUNK_BYTES as u64) {
            tracing::debug!(minimum, what = upload.what, "the registry asks for longer chunks than it gets");
        }
        Ok(upload)
    }

    /// Bytes that the registry has.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether the registry keeps notes with this session: it was asked for by a name, and the registry knows such.
    pub fn keeps_notes(&self) -> bool {
        self.is_named
    }

    /// Leaves a note with the next chunk, for whoever returns to this session: from then on it is not cancelled when this is
    /// dropped. Does nothing where the registry keeps no notes.
    pub fn leave_note(&mut self, note: String) {
        if self.is_named {
            (self.note, self.stays) = (Some(note), true);
        }
    }

    /// Tells the registry how many bytes the whole blob will have, so that one that has no room for them refuses now. Does nothing
    /// where the registry knows no names of sessions: it is asked by that.
    ///
    /// # Errors
    /// [`ErrorKind::Full`] when there is no room.
    pub async fn announce(&self, bytes: u64) -> Result<()> {
        match self.name.as_ref().filter(|_| self.is_named) {
            Some(name) => self.repository.ask_for_named(name, Some(bytes), &self.what).await.map(drop),
            None => Ok(()),
        }
    }

    /// Cancels the session, whatever was left with it, and returns when the registry has.
    pub async fn cancel(mut self) {
        self.open = false;
        cancel(self.repository.clone(), self.location.clone()).await;
    }

    /// Sends one chunk and returns when the registry acknowledged all of it. A chunk that breaks on the way is
    /// continued from what arrived, for [`PATIENCE_MS`] once something was acknowledged, a few times before that.
    pub async fn append(&mut self, chunk: Bytes) -> Result<()> {
        let start = self.offset;
        let end = start + chunk.len() as u64;
        let mut attempt = 1;
        let mut failing: Option<Instant> = None;
        while self.offset < end {
            let before = self.offset;
            let rest = chunk.slice((before - start) as usize..);
            let mut outcome = self.patch(rest).await;
            let is_stuck = outcome.is_ok() && self.offset <= before;
            if is_stuck {
                // Success that moves nothing is tried again like a failure, not for ever.
                let text = format!("{}: the registry took nothing of a chunk at byte {before}", self.what);
                outcome = Err(Error::new(ErrorKind::Unavailable, text));
            }
            if outcome.is_err() {
                // A registry that answers, and takes nothing, is not away.
                let begun = *failing.get_or_insert_with(Instant::now);
                let patient = !is_stuck && before > 0 && begun.elapsed() < Duration::from_millis(PATIENCE_MS);
                outcome = self.recover(outcome, attempt, patient).await;
                attempt += 1;
            }
            outcome?;
            if self.offset > before {
                (attempt, failing) = (1, None);
            }
            if self.offset < start || self.offset > end {
                return Err(Error::new(
                    ErrorKind::Protocol,
                    format!(
                        "{}: the registry has {} bytes, sent were {start} to {end}",
                        self.what, self.offset
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Waits after a failure that may pass, and asks what arrived; fails after too many attempts, unless it is to be patient.
    async fn recover(&mut self, failed: Result<()>, attempt: u32, patient: bool) -> Result<()> {
        let Err(error) = failed else { return Ok(()) };
        // A registry that was started again may know nothing of a session that nothing had come to.
        let is_forgotten = |error: &Error| error.kind() == ErrorKind::NotFound;
        let is_empty = self.offset == 0 && attempt < ATTEMPTS_MAX;
        if is_empty && is_forgotten(&error) {
            return self.begin_again().await;
        }
        if error.kind() != ErrorKind::Unavailable || (attempt >= ATTEMPTS_MAX && !patient) {
            return Err(error);
        }
        match attempt {
            ATTEMPTS_MAX => tracing::warn!(%error, "the registry takes no chunks, trying on"),
            _ => tracing::debug!(offset = self.offset, attempt, %error, "a chunk broke off, going on"),
        }
        back_off(attempt, self.wanted_wait.take()).await;
        match self.acknowledged().await {
            Ok(offset) => self.offset = offset,
            Err(error) if error.kind() == ErrorKind::Unavailable => {}
            Err(error) if is_empty && is_forgotten(&error) => return self.begin_again().await,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Opens another session in place of one that had nothing.
    async fn begin_again(&mut self) -> Result<()> {
        let mut fresh = match &self.name {
            Some(name) => self.repository.open_named(name, None).await?.0,
            None => self.repository.start_upload().await?,
        };
        tracing::debug!(what = self.what, "the registry forgot the session, beginning another");
        fresh.open = false;
        (self.location, self.offset, self.is_named) = (fresh.location.clone(), fresh.offset, fresh.is_named);
        Ok(())
    }

    /// Makes the session the blob `digest`.
    pub async fn commit(mut self, digest: &Digest) -> Result<()> {
        let mut attempt = 1;
        loop {
            let mut url = self.location.clone();
            url.query_pairs_mut().append_pair("digest", digest.as_ref());
            let mut request = self.request(Method::PUT, url);
            request.timeout = Some(Duration::from_millis(COMMIT_TIMEOUT_MS));
            let outcome = self.transport().send(&request).await;
            let (error, wanted_wait) = match outcome {
                Ok(response) if response.status().is_success() => break,
                Ok(response) => {
                    let wanted_wait = retry_after(response.headers());
                    (self.transport().refused(response, &self.what).await, wanted_wait)
                }
                Err(error) => (error, None),
            };
            // The answer may have been lost after the blob was made.
            if error.kind() != ErrorKind::Unavailable && attempt == 1 {
                return Err(error);
            }
            if self.repository.blob_size(digest).await.ok().flatten() == Some(self.offset) {
                break;
            }
            if error.kind() != ErrorKind::Unavailable || attempt == ATTEMPTS_MAX {
                return Err(error);
            }
            back_off(attempt, wanted_wait).await;
            attempt += 1;
        }
        self.open = false;
        Ok(())
    }

    async fn patch(&mut self, bytes: Bytes) -> Result<()> {
        let last = self.offset + bytes.len() as u64 - 1;
        let expected = last + 1;
        let request = self
            .request(Method::PATCH, self.location.clone())
            .header(CONTENT_RANGE, &format!("{}-{last}", self.offset))
            .body(fixed(bytes, OCTETS));
        let request = match &self.note {
            Some(note) => request.header(UPLOAD_NOTE, note),
            None => request,
        };
        let response = self.transport().send(&request).await?;
        let status = response.status();
        // 416 means that the registry has another offset in mind, which asking for it settles; 409 that it is still busy with a
        // chunk that was broken off, of a process before this one perhaps.
        let is_passing = matches!(status, StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::CONFLICT);
        if is_passing || is_transient(status) {
            self.wanted_wait = retry_after(response.headers());
            let error = self.transport().refused(response, &self.what).await;
            return Err(Error::new(ErrorKind::Unavailable, error.to_string()));
        }
        if !status.is_success() {
            return Err(self.transport().refused(response, &self.what).await);
        }
        let received = header(response.headers(), &RANGE).and_then(received_bytes);
        self.follow(&response)?;
        self.offset = received.unwrap_or(expected);
        Ok(())
    }

    /// Asks the registry how much arrived.
    async fn acknowledged(&mut self) -> Result<u64> {
        let request = self.request(Method::GET, self.location.clone());
        let response = self.transport().send_retrying(&request).await?;
        if !response.status().is_success() {
            return Err(self.transport().refused(response, &self.what).await);
        }
        let received = header(response.headers(), &RANGE).and_then(received_bytes);
        self.follow(&response)?;
        match received {
            // `0-0` is also what registries say of an empty session; nothing shorter than two bytes is ever resumed.
            Some(1) => Ok(0),
            Some(bytes) => Ok(bytes),
            None if self.offset == 0 => Ok(0),
            None => Err(Error::new(
                ErrorKind::Protocol,
                format!("{}: the registry does not tell how much arrived", self.what),
            )),
        }
    }

    fn follow(&mut self, response: &Response) -> Result<()> {
        if let Some(location) = header(response.headers(), &LOCATION) {
            self.location = self.transport().resolve(response.url(), location)?;
        }
        Ok(())
    }

    fn request(&self, method: Method, url: Url) -> Outgoing<'_> {
        Outgoing::new(method, url, Access::Push, &self.repository.name, &self.what)
    }

    fn transport(&self) -> &Transport {
        &self.repository.transport
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.open && !self.stays {
            self.repository.clean_up(cancel(self.repository.clone(), self.location.clone()));
        }
    }
}

/// Ends a session; one that cannot be cancelled is the registry's to expire.
async fn cancel(repository: Repository, location: Url) {
    let what = "cancelling an upload";
    let request = Outgoing::new(Method::DELETE, location, Access::Push, &repository.name, what);
    for attempt in 1..ATTEMPTS_MAX {
        match repository.transport.send(&request).await {
            // The registry is still busy with the chunk that was broken off.
            Ok(answer) if answer.status() == StatusCode::CONFLICT => back_off(attempt, None).await,
            _ => break,
        }
    }
}

/// A blob on its way: hashed on another thread while it is sent.
#[derive(Debug)]
pub struct BlobWriter {
    upload: Upload,
    /// Has run over the bytes up to `position`.
    hasher: Hasher,
    position: u64,
}

impl From<Upload> for BlobWriter {
    /// Begins a blob in a session that has nothing yet.
    fn from(upload: Upload) -> Self {
        Self { upload, hasher: Hasher::sha256(), position: 0 }
    }
}

impl BlobWriter {
    /// Goes on with a blob of which the registry has at least `position` bytes; `state` is what [`BlobWriter::state`] told there.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] when it has fewer, or the state is none. The session is cancelled then.
    pub fn resume(mut upload: Upload, position: u64, state: &[u8]) -> Result<Self> {
        let hasher = Hasher::restore_sha256(state).filter(|_| position <= upload.offset);
        let Some(hasher) = hasher else {
            let text = format!(
                "{}: the registry has {} bytes of it, which do not fit a note made at byte {position}",
                upload.what, upload.offset
            );
            upload.stays = false;
            return Err(Error::new(ErrorKind::Mismatch, text));
        };
        Ok(Self { upload, hasher, position })
    }

    /// Bytes taken so far, and the state of their hash, for [`BlobWriter::resume`].
    pub fn state(&self) -> (u64, Vec<u8>) {
        (self.position, self.hasher.save_sha256())
    }

    /// See [`Upload::keeps_notes`].
    pub fn keeps_notes(&self) -> bool {
        self.upload.keeps_notes()
    }

    /// See [`Upload::leave_note`].
    pub fn leave_note(&mut self, note: String) {
        self.upload.leave_note(note);
    }

    /// See [`Upload::announce`].
    pub async fn announce(&self, bytes: u64) -> Result<()> {
        self.upload.announce(bytes).await
    }

    /// See [`Upload::cancel`].
    pub async fn cancel(self) {
        self.upload.cancel().await;
    }

    /// Sends a chunk, but for what the registry has of it already; chunks of [`CHUNK_BYTES`] serve best.
    pub async fn push(&mut self, chunk: Bytes) -> Result<()> {
        let there = self.upload.offset.saturating_sub(self.position).min(chunk.len() as u64);
        self.position += chunk.len() as u64;
        let mut hasher = std::mem::replace(&mut self.hasher, Hasher::sha256());
        let bytes = chunk.clone();
        let hashing = tokio::task::spawn_blocking(move || {
            hasher.update(&bytes);
            hasher
        });
        let (sent, hashed) = tokio::join!(self.upload.append(chunk.slice(there as usize..)), hashing);
        self.hasher =
            hashed.map_err(|e| Error::with(ErrorKind::Unavailable, "the hashing thread ended early", e))?;
        sent
    }

    /// Bytes that the registry has.
    pub fn size(&self) -> u64 {
        self.upload.offset()
    }

    /// Makes the blob, which must have the digest `expected`; one with another is not made.
    pub async fn finish_as(self, expected: &Digest) -> Result<()> {
        if let Err(error) = digest::same(&self.hasher.finish()?, expected, "what was sent") {
            self.upload.cancel().await;
            return Err(error);
        }
        self.upload.commit(expected).await
    }

    /// Makes the blob, and returns its digest and size.
    pub async fn finish(self) -> Result<(Digest, u64)> {
        let size = self.size();
        if size != self.position {
            let text = format!(
                "{}: the registry has {size} bytes of a blob of {} bytes",
                self.upload.what, self.position
            );
            return Err(Error::new(ErrorKind::Mismatch, text));
        }
        let digest = self.hasher.finish()?;
        self.upload.commit(&digest).await?;
        Ok((digest, size))
    }
}

/// Bytes received according to `0-99`, or `bytes=0-99` as some write it.
fn received_bytes(value: &str) -> Option<u64> {
    let (first, last) = value.trim().trim_start_matches("bytes=").split_once('-')?;
    let last: u64 = last.trim().parse().ok()?;
    (first.trim() == "0").then(|| last.saturating_add(1))
}
