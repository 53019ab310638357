//! A range of an object that comes as a stream, and goes on where it broke.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;

use super::attempt::{Call, backoff};
use super::client::Client;
use super::error::{Failure, Kind, Result};
use super::object::{Head, head};

/// Bytes between two breaks, for the second to count as the first of its kind.
const PROGRESS_BYTES_MIN: u64 = 64 << 10;

/// What is read of an object. It gives all bytes that were asked for, or an error.
#[derive(Debug)]
pub(crate) struct RangeBody {
    client: Client,
    key: Arc<str>,
    etag: String,
    /// What is still to come.
    rest: Range<u64>,
    body: Option<ByteStream>,
    /// How often it broke since it last came far enough, and where it was then.
    breaks: u32,
    broken_at: u64,
}

impl Client {
    /// Reads `range` of an object, of the one with `etag` if that is given.
    ///
    /// # Errors
    /// [`super::Kind::NotFound`], [`super::Kind::Precondition`] if it is another one by now; [`super::Kind::Other`] if it has not as many bytes.
    pub(crate) async fn get_range(
        &self,
        key: &str,
        range: Range<u64>,
        etag: Option<&str>,
    ) -> Result<RangeBody> {
        let call = Call::new(self, "read", key);
        if range.is_empty() {
            // S3 has no words for such a range.
            let head = self.head(key).await?;
            if etag.is_some_and(|etag| etag != head.etag) || range.start > head.bytes {
                let why = format!("it has {} bytes and the ETag {}", head.bytes, head.etag);
                return Err(Failure::wrong(why).into_error(call.operation, call.place(), false));
            }
            return Ok(RangeBody::new(self, key, head.etag, range, None));
        }
        let (body, etag) = call.value(|| begin(&call, &range, etag)).await?;
        Ok(RangeBody::new(self, key, etag, range, Some(body)))
    }

    /// Tells of an object what there is besides its content, and reads its first `bytes` bytes, or all if it has fewer.
    ///
    /// # Errors
    /// [`super::Kind::NotFound`], and what goes wrong between us and the store.
    pub(crate) async fn get_start(&self, key: &str, bytes: u64) -> Result<(Head, RangeBody)> {
        let call = Call::new(self, "read", key);
        let error = match call.value(|| begin_unknown(&call, bytes)).await {
            Ok((body, head)) => {
                let range = 0..head.bytes.min(bytes);
                let body = RangeBody::new(self, key, head.etag.clone(), range, Some(body));
                return Ok((head, body));
            }
            Err(error) => error,
        };
        // Of an object without content no first byte can be asked for.
        match error.kind() {
            Kind::Other => match self.head(key).await {
                Ok(head) if head.bytes == 0 => {
                    let body = RangeBody::new(self, key, head.etag.clone(), 0..0, None);
                    Ok((head, body))
                }
                _ => Err(error),
            },
            _ => Err(error),
        }
    }
}

impl RangeBody {
    fn new(client: &Client, key: &str, etag: String, rest: Range<u64>, body: Option<ByteStream>) -> Self {
        let (client, key, broken_at) = (client.clone(), Arc::from(key), rest.start);
        Self { client, key, etag, rest, body, breaks: 0, broken_at }
    }

    /// Bytes that are still to come.
    pub(crate) fn remaining(&self) -> u64 {
        self.rest.end.saturating_sub(self.rest.start)
    }

    /// Returns the next bytes; `None` when all have come.
    ///
    /// # Errors
    /// When it broke and did not come any further, as often as the settings allow; [`super::Kind::Precondition`] if
    /// the object was replaced in between.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>> {
        let (client, key) = (self.client.clone(), Arc::clone(&self.key));
        let call = Call::new(&client, "read", &key);
        while self.rest.start < self.rest.end {
            let failure = match self.attempt(&call).await {
                Ok(Some(chunk)) => return Ok(Some(chunk)),
                Ok(None) => Failure::broken("its answer is shorter than it says"),
                Err(failure) => failure,
            };
            self.body = None;
            if self.rest.start.saturating_sub(self.broken_at) >= PROGRESS_BYTES_MIN {
                self.breaks = 0;
            }
            self.broken_at = self.rest.start;
            self.breaks = self.breaks.saturating_add(1);
            if !failure.retry || self.breaks >= client.settings().attempts.get() {
                return Err(failure.into_error(call.operation, call.place(), false));
            }
            tracing::debug!(key = &*self.key, at = self.rest.start, ?failure, "reading on");
            tokio::time::sleep(failure.after.unwrap_or_default().saturating_add(backoff(self.breaks))).await;
        }
        Ok(None)
    }

    async fn attempt(&mut self, call: &Call<'_>) -> Result<Option<Bytes>, Failure> {
        if self.body.is_none() {
            let (body, _) = begin(call, &self.rest, Some(&self.etag)).await?;
            self.body = Some(body);
        }
        let Some(body) = &mut self.body else { return Ok(None) };
        let chunk = next_chunk(body, self.client.settings().request_timeout.0).await?;
        if let Some(chunk) = &chunk {
            let start = self.rest.start.saturating_add(chunk.len() as u64);
            if start > self.rest.end {
                return Err(Failure::wrong("its answer is longer than the range"));
            }
            self.rest.start = start;
        }
        Ok(chunk)
    }
}

/// Takes the next bytes of an answer, which have to come in time.
pub(super) async fn next_chunk(body: &mut ByteStream, time: Duration) -> Result<Option<Bytes>, Failure> {
    loop {
        match tokio::time::timeout(time, body.next()).await {
            Err(_) => return Err(Failure::broken(format!("nothing came of its content for {time:?}"))),
            Ok(None) => return Ok(None),
            Ok(Some(Ok(chunk))) if chunk.is_empty() => {}
            Ok(Some(Ok(chunk))) => return Ok(Some(chunk)),
            Ok(Some(Err(error))) => return Err(Failure::broken(error)),
        }
    }
}

/// Asks for a range that is not empty, once.
async fn begin(
    call: &Call<'_>,
    range: &Range<u64>,
    etag: Option<&str>,
) -> Result<(ByteStream, String), Failure> {
    let client = call.client;
    let request = client.s3().get_object().bucket(client.bucket()).key(client.full(call.key));
    let asked = format!("{}-{}", range.start, range.end.saturating_sub(1));
    let request = request.range(format!("bytes={asked}")).set_if_match(etag.map(str::to_owned));
    let answer = request.customize().config_override(call.config()).send().await;
    let answer = answer.map_err(|error| Failure::of(error, None))?;
    let told = answer.content_range.unwrap_or_default();
    let is_asked = told.strip_prefix("bytes ").and_then(|told| told.split('/').next()) == Some(&*asked);
    if !is_asked {
        return Err(Failure::wrong(format!("asked for the bytes {asked}, it answers with {told:?}")));
    }
    let etag = answer.e_tag.ok_or_else(|| Failure::wrong("its answer has no ETag"))?;
    Ok((answer.body, etag))
}

/// Asks for the first bytes of an object of unknown length, once.
async fn begin_unknown(call: &Call<'_>, bytes: u64) -> Result<(ByteStream, Head), Failure> {
    let client = call.client;
    let request = client.s3().get_object().bucket(client.bucket()).key(client.full(call.key));
    let request = request.range(format!("bytes=0-{}", bytes.saturating_sub(1)));
    let answer = request.customize().config_override(call.config()).send().await;
    let answer = answer.map_err(|error| Failure::of(error, None))?;
    let told = answer.content_range.unwrap_or_default();
    let range = || {
        let (last, total) = told.strip_prefix("bytes 0-")?.split_once('/')?;
        Some((last.parse::<u64>().ok()?, total.parse::<u64>().ok()?))
    };
    match range() {
        Some((last, total)) if last.checked_add(1) == Some(total.min(bytes)) => {
            let total = i64::try_from(total).ok();
            Ok((answer.body, head(total, answer.e_tag, answer.last_modified)?))
        }
        _ => Err(Failure::wrong(format!("asked for the first {bytes} bytes, it answers with {told:?}"))),
    }
}
