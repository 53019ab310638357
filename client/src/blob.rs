//! A blob, or a part of it, as a stream that goes on where a connection broke.

use std::ops::Range;

use bytes::Bytes;
use http::header::{CONTENT_RANGE, RANGE};
use http::{Method, StatusCode};
use reqwest::Response;

use crate::digest::{self, Digest};
use crate::repository::{Access, Repository};
use crate::request::{Outgoing, back_off, content_length, header, next_chunk};
use crate::{Error, ErrorKind, Result};

/// Largest blob that is read into memory, bytes.
const SMALL_BLOB_BYTES_MAX: u64 = 4 << 20;
/// Times that one blob is gone on with, however far each time leads.
const BREAKS_MAX: u32 = 64;

/// Bytes of a blob in order. Not verified against the digest: the reader that sees all bytes does that.
pub struct BlobStream {
    repository: Repository,
    digest: Digest,
    position: u64,
    end: u64,
    /// Whether a part was asked for from the start; a whole blob is first asked for without a range.
    ranged: bool,
    response: Option<Response>,
    /// Failures since the last bytes, and in all.
    failures: u32,
    breaks: u32,
}

impl Repository {
    /// Reads a whole blob of `size` bytes.
    pub fn blob(&self, digest: &Digest, size: u64) -> BlobStream {
        self.stream(digest, 0..size, false)
    }

    /// Reads a blob of `size` bytes, at most 4 MiB, into memory, and verifies its digest.
    pub async fn small_blob(&self, digest: &Digest, size: u64) -> Result<Vec<u8>> {
        if size > SMALL_BLOB_BYTES_MAX {
            let text = format!(
                "blob {digest} of {} has {size} bytes, at most {SMALL_BLOB_BYTES_MAX} are read",
                self.name
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let mut stream = self.blob(digest, size);
        let mut blob = Vec::new();
        while let Some(bytes) = stream.next().await? {
            blob.extend_from_slice(&bytes);
        }
        digest::verify(&blob, digest, &format!("blob {digest} of {}", self.name))?;
        Ok(blob)
    }

    /// Reads the bytes `range` of a blob; they must lie inside it. The first read fails with
    /// [`ErrorKind::Unsupported`] if the registry ignores ranges.
    pub fn blob_range(&self, digest: &Digest, range: Range<u64>) -> BlobStream {
        self.stream(digest, range, true)
    }

    /// Begins to read a whole blob, whose length the answer tells; `None` if the repository does not have it.
    pub async fn open_blob(&self, digest: &Digest) -> Result<Option<BlobStream>> {
        let what = format!("reading blob {digest} of {}", self.name);
        let url = self.url(&format!("blobs/{digest}")).await?;
        let request = Outgoing::new(Method::GET, url, Access::Pull, &self.name, &what);
        let response = self.transport.send_following(&request).await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(None),
            _ => return Err(self.transport.refused(response, &what).await),
        }
        let Some(length) = content_length(response.headers()) else {
            return Err(Error::new(ErrorKind::Protocol, format!("{what}: the answer tells no length")));
        };
        let mut stream = self.stream(digest, 0..length, false);
        stream.response = Some(response);
        Ok(Some(stream))
    }

    fn stream(&self, digest: &Digest, range: Range<u64>, ranged: bool) -> BlobStream {
        BlobStream {
            repository: self.clone(),
            digest: digest.clone(),
            position: range.start,
            end: range.end,
            ranged,
            response: None,
            failures: 0,
            breaks: 0,
        }
    }
}

impl BlobStream {
    /// The blob's digest.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Where the bytes end; of a whole blob its length.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The next bytes, `None` after the last. A broken connection is continued a bounded number of times.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        while self.position < self.end {
            let error = match self.advance().await {
                Ok(bytes) => {
                    self.failures = 0;
                    return Ok(Some(bytes));
                }
                Err(error) => error,
            };
            self.response = None;
            self.failures += 1;
            self.breaks += 1;
            let attempts_max = self.repository.transport.attempts_max;
            if error.kind() != ErrorKind::Unavailable
                || self.failures >= attempts_max
                || self.breaks >= BREAKS_MAX
            {
                return Err(error);
            }
            tracing::debug!(digest = %self.digest, position = self.position, %error, "a blob broke off, going on");
            back_off(self.failures, None).await;
        }
        Ok(None)
    }

    async fn advance(&mut self) -> Result<Bytes> {
        let response = match &mut self.response {
            Some(response) => response,
            None => {
                let response = self.request().await?;
                self.response.insert(response)
            }
        };
        let what = || format!("blob {} of {}", self.digest, self.repository.name);
        let Some(bytes) = next_chunk(response).await? else {
            let text = format!("{} ended at byte {} of {}", what(), self.position, self.end);
            return Err(Error::new(ErrorKind::Unavailable, text));
        };
        let left = self.end - self.position;
        if bytes.len() as u64 > left {
            let text = format!("{} goes on past its announced end at byte {}", what(), self.end);
            return Err(Error::new(ErrorKind::Mismatch, text));
        }
        self.position += bytes.len() as u64;
        Ok(bytes)
    }

    async fn request(&self) -> Result<Response> {
        let repository = &self.repository;
        let what = format!("reading blob {} of {}", self.digest, repository.name);
        let url = repository.url(&format!("blobs/{}", self.digest)).await?;
        let mut request = Outgoing::new(Method::GET, url, Access::Pull, &repository.name, &what);
        let ranged = self.ranged || self.position > 0;
        if ranged {
            request =
                request.header(RANGE, &format!("bytes={}-{}", self.position, self.end.saturating_sub(1)));
        }
        let response = repository.transport.send_following(&request).await?;
        match (response.status(), ranged) {
            (StatusCode::PARTIAL_CONTENT, true) => {
                let begun = header(response.headers(), &CONTENT_RANGE).and_then(range_start);
                if begun != Some(self.position) {
                    let text = format!("{what}: asked for bytes from {}, got {begun:?}", self.position);
                    return Err(Error::new(ErrorKind::Protocol, text));
                }
                Ok(response)
            }
            (StatusCode::OK, false) => match content_length(response.headers()) {
                Some(length) if length != self.end => Err(Error::new(
                    ErrorKind::Mismatch,
                    format!("{what}: it has {length} bytes, the manifest says {}", self.end),
                )),
                _ => Ok(response),
            },
            (StatusCode::OK, true) => {
                Err(Error::new(ErrorKind::Unsupported, format!("{what}: the registry serves no ranges")))
            }
            _ => Err(repository.transport.refused(response, &what).await),
        }
    }
}

/// The first byte of `bytes 10-19/20`.
fn range_start(value: &str) -> Option<u64> {
    value.trim().strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}
