//! One request, sent again while that helps.

use std::time::Duration;

use aws_sdk_s3::config::Builder;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_smithy_async::time::StaticTimeSource;

use super::client::Client;
use super::error::{Failure, Kind, Place, Result};
use super::wire::{Validity, Wire};

/// Longest wait before the second attempt, milliseconds; twice as long before each further one.
const BACKOFF_MS: u64 = 100;
/// Longest wait before an attempt, milliseconds.
const BACKOFF_MS_MAX: u64 = 10_000;
/// How long a connection may take to come about.
const CONNECT_TIMEOUT_MS: u64 = 5000;
/// How often what places an object is sent while it is refused.
///
/// MinIO has a directory for each part of a key, and answers 403 when one vanishes, with the last object in it, in the moment in
/// which another is placed there.
const PLACING_ATTEMPTS_MAX: u32 = 3;
/// Slowest way of content to the store, bytes per second.
const UPLOAD_RATE_MIN: u64 = 1 << 20;

/// What is asked for, and of whom.
pub(super) struct Call<'a> {
    pub client: &'a Client,
    /// As in "cannot put".
    pub operation: &'static str,
    /// Below the root directory.
    pub key: &'a str,
    /// Bytes of content that go with each attempt, or that the store has to move for it.
    pub bytes: u64,
    pub validity: Option<Validity>,
    /// SHA-256 of the content in hex, by which the store checks what it gets.
    pub payload: Option<String>,
    /// Whether the signature is spoilt.
    pub forge: bool,
    /// Whether an object is placed.
    pub places: bool,
}

/// What came of a call, and whether an attempt before may have done its work, too.
pub(super) struct Outcome<T> {
    pub value: T,
    pub is_repeated: bool,
}

impl<'a> Call<'a> {
    pub(super) fn new(client: &'a Client, operation: &'static str, key: &'a str) -> Self {
        Self { client, operation, key, bytes: 0, validity: None, payload: None, forge: false, places: false }
    }

    pub(super) fn bytes(self, bytes: u64) -> Self {
        Self { bytes, ..self }
    }

    pub(super) fn valid(self, validity: Option<Validity>) -> Self {
        Self { validity, ..self }
    }

    pub(super) fn payload(self, payload: Option<String>) -> Self {
        Self { payload, ..self }
    }

    pub(super) fn placing(self) -> Self {
        Self { places: true, ..self }
    }

    /// What one request of the SDK is told besides its arguments.
    pub(super) fn config(&self) -> Builder {
        let time = self.client.settings().request_timeout.0;
        let time = time.saturating_add(Duration::from_secs(self.bytes / UPLOAD_RATE_MIN));
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(Duration::from_millis(CONNECT_TIMEOUT_MS).min(time))
            .read_timeout(time)
            .operation_attempt_timeout(time)
            .build();
        let wire = Wire::new(self.client.clock(), self.validity, self.payload.clone(), self.forge);
        let config = Builder::new().timeout_config(timeouts).interceptor(wire);
        match self.validity {
            Some(validity) => config.time_source(StaticTimeSource::new(validity.from)),
            None => config,
        }
    }

    /// Attempts it until it succeeds, fails for good, or has failed as often as the settings allow.
    pub(super) async fn run<T, F>(&self, attempt: impl Fn() -> F) -> Result<Outcome<T>>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let mut uncertain = false;
        let mut count = 1;
        loop {
            let failure = match attempt().await {
                Ok(value) => return Ok(Outcome { value, is_repeated: uncertain }),
                Err(failure) => failure,
            };
            uncertain |= failure.uncertain;
            let may_pass = self.places && failure.kind == Kind::Denied && count < PLACING_ATTEMPTS_MAX;
            if !(failure.retry || may_pass) || count >= self.client.settings().attempts.get() {
                return Err(failure.into_error(self.operation, self.place(), uncertain));
            }
            tracing::debug!(operation = self.operation, key = self.key, count, ?failure, "trying again");
            tokio::time::sleep(failure.after.unwrap_or_default().saturating_add(backoff(count))).await;
            count += 1;
        }
    }

    /// Runs it where it does not matter how often it was done.
    pub(super) async fn value<T, F>(&self, attempt: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        self.run(attempt).await.map(|outcome| outcome.value)
    }

    pub(super) fn place(&self) -> Place {
        self.client.place(self.key)
    }
}

/// A time by chance, so that those who were refused together do not come back together.
pub(super) fn backoff(count: u32) -> Duration {
    let most = BACKOFF_MS.saturating_mul(1 << count.saturating_sub(1).min(10)).min(BACKOFF_MS_MAX);
    let [a, b, ..] = uuid::Uuid::new_v4().into_bytes();
    let share = u64::from(u16::from_be_bytes([a, b]));
    Duration::from_millis(most / 2 + most * share / (2 * u64::from(u16::MAX)))
}
