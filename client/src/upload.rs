//! Pushing a blob in chunks: each is kept until the registry acknowledged it, so a broken one is continued.
//!
//! ```text
//!  start (POST) ──> open ──append (PATCH)──> open ──commit (PUT)──> blob
//!                    │ a chunk breaks: ask what arrived (GET), send the rest
//!                    └─ dropped: cancel (DELETE) in the background
//! ```

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_RANGE, HeaderName, LOCATION, RANGE};
use http::{Method, StatusCode};
use reqwest::Response;
use url::Url;

use crate::digest::{self, Digest, Hasher};
use crate::repository::{Access, Repository, fixed};
use crate::request::{ATTEMPTS_MAX, Outgoing, Transport, back_off, header, is_transient};
use crate::{Error, ErrorKind, Result};

/// Size of the chunks that [`BlobWriter`] is best fed with, bytes.
pub const CHUNK_BYTES: usize = 8 << 20;
/// Longest wait for the registry to make a blob of what was uploaded, milliseconds. Some copy all of it then.
const COMMIT_TIMEOUT_MS: u64 = 30 * 60 * 1_000;

const OCI_CHUNK_MIN_LENGTH: HeaderName = HeaderName::from_static("oci-chunk-min-length");
const OCTETS: &str = "application/octet-stream";

/// An open upload session. Dropping it cancels the session in the background.
#[derive(Debug)]
pub struct Upload {
    repository: Repository,
    location: Url,
    /// Bytes that the registry acknowledged.
    offset: u64,
    what: String,
    open: bool,
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

    /// Opens an upload session and hashes what goes into it.
    pub async fn start_blob(&self) -> Result<BlobWriter> {
        Ok(BlobWriter { upload: self.start_upload().await?, hasher: Hasher::sha256() })
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
        let upload = Self { repository, location, offset: 0, what, open: true };
        match minimum.filter(|bytes| *bytes > CHUNK_BYTES as u64) {
            Some(bytes) => Err(Error::new(
                ErrorKind::Unsupported,
                format!("{}: the registry wants chunks of at least {bytes} bytes", upload.what),
            )),
            None => Ok(upload),
        }
    }

    /// Bytes that the registry has.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Sends one chunk and returns when the registry acknowledged all of it. A chunk that breaks on the way is
    /// continued from what arrived, a bounded number of times.
    pub async fn append(&mut self, chunk: Bytes) -> Result<()> {
        let start = self.offset;
        let end = start + chunk.len() as u64;
        let mut attempt = 1;
        while self.offset < end {
            let before = self.offset;
            let rest = chunk.slice((before - start) as usize..);
            let mut outcome = self.patch(rest).await;
            if outcome.is_ok() && self.offset <= before {
                // Success that moves nothing is tried again like a failure, not for ever.
                let text = format!("{}: the registry took nothing of a chunk at byte {before}", self.what);
                outcome = Err(Error::new(ErrorKind::Unavailable, text));
            }
            match outcome {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Unavailable && attempt < ATTEMPTS_MAX => {
                    tracing::debug!(offset = self.offset, attempt, %error, "a chunk broke off, going on");
                    back_off(attempt, None).await;
                    attempt += 1;
                    self.offset = self.acknowledged().await?;
                }
                Err(error) => return Err(error),
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

    /// Makes the session the blob `digest`.
    pub async fn commit(mut self, digest: &Digest) -> Result<()> {
        let mut attempt = 1;
        loop {
            let mut url = self.location.clone();
            url.query_pairs_mut().append_pair("digest", digest.as_ref());
            let mut request = self.request(Method::PUT, url);
            request.timeout = Some(Duration::from_millis(COMMIT_TIMEOUT_MS));
            let outcome = self.transport().send(&request).await;
            let error = match outcome {
                Ok(response) if response.status().is_success() => break,
                Ok(response) => self.transport().refused(response, &self.what).await,
                Err(error) => error,
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
            back_off(attempt, None).await;
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
        let response = self.transport().send(&request).await?;
        let status = response.status();
        // 416 means that the registry has another offset in mind, which asking for it settles.
        if status == StatusCode::RANGE_NOT_SATISFIABLE || is_transient(status) {
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
        if !self.open {
            return;
        }
        let (repository, location) = (self.repository.clone(), self.location.clone());
        self.repository.clean_up(async move {
            let request = Outgoing::new(
                Method::DELETE,
                location,
                Access::Push,
                &repository.name,
                "cancelling an upload",
            );
            // A session that cannot be cancelled is the registry's to expire.
            for attempt in 1..ATTEMPTS_MAX {
                match repository.transport.send(&request).await {
                    // The registry is still busy with the chunk that was broken off.
                    Ok(answer) if answer.status() == StatusCode::CONFLICT => back_off(attempt, None).await,
                    _ => break,
                }
            }
        });
    }
}

/// A blob on its way: hashed on another thread while it is sent.
#[derive(Debug)]
pub struct BlobWriter {
    upload: Upload,
    hasher: Hasher,
}

impl BlobWriter {
    /// Sends a chunk; chunks of [`CHUNK_BYTES`] serve best.
    pub async fn push(&mut self, chunk: Bytes) -> Result<()> {
        let mut hasher = std::mem::replace(&mut self.hasher, Hasher::sha256());
        let bytes = chunk.clone();
        let hashing = tokio::task::spawn_blocking(move || {
            hasher.update(&bytes);
            hasher
        });
        let (sent, hashed) = tokio::join!(self.upload.append(chunk), hashing);
        self.hasher =
            hashed.map_err(|e| Error::with(ErrorKind::Unavailable, "the hashing thread ended early", e))?;
        sent
    }

    /// Bytes sent.
    pub fn size(&self) -> u64 {
        self.upload.offset()
    }

    /// Makes the blob, and returns its digest and size.
    pub async fn finish(self) -> Result<(Digest, u64)> {
        let size = self.size();
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
