//! The requests of an upload, and what is done when one fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use dvcr_converter::progress::Progress;
use dvcr_image::{is_certificate_refused, is_identity_refused};
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderName, Method, StatusCode};
use reqwest::{Body, Client, RequestBuilder, Response};
use tokio::sync::mpsc;
use url::Url;

use super::parts::{Manner, PART_DATA_BYTES_MAX, PART_DATA_BYTES_MIN, Part, Trial, read_ahead};
use super::{Error, Image, TUS_RESUMABLE, TUS_VERSION, Uploaded, VERSION, answer, is_passing, refused};
use crate::session::chain;

/// How long a server may be out of reach before it is given up: as long as one keeps what has come.
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(600);
/// Wait before the second attempt; it doubles from one to the next.
const BACKOFF_FIRST: Duration = Duration::from_millis(200);
/// Longest wait between attempts, but for a server that asks for more.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Longest wait that a server may ask for by Retry-After.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(300);
/// Longest time for one request, with its part of the file.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(900);
/// Longest wait for the server to forget an upload that is of no use.
const TERMINATE_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a part should take: what a break costs.
const PART_SECONDS: f64 = 4.0;
/// Compressed data worth sending has at most this share of its size.
const SHARE_MAX: f64 = 0.9;
/// Parts that are sent as they are before it is tried again whether compressing pays.
const PLAIN_PARTS_MAX: u32 = 16;

const UPLOAD_OFFSET: HeaderName = HeaderName::from_static("upload-offset");
const UPLOAD_LENGTH: HeaderName = HeaderName::from_static("upload-length");
const UPLOAD_METADATA: HeaderName = HeaderName::from_static("upload-metadata");
const PREFER: HeaderName = HeaderName::from_static("prefer");

pub(crate) struct Sender {
    client: Client,
    url: Url,
    image: Arc<Image>,
    progress: Arc<Progress>,
    manner: Arc<Manner>,
    /// Bytes of bodies sent.
    sent: u64,
    /// Parts sent as they are since compressing was last tried.
    plain_parts: u32,
    patience: Patience,
}

/// What an upload needs next.
enum Next {
    /// The bytes from here on.
    From(u64),
    /// To be asked how far it is.
    Ask,
    /// To be begun.
    Begin,
    Done(Uploaded),
}

impl Sender {
    pub(crate) fn new(client: Client, url: Url, image: Arc<Image>, progress: Arc<Progress>) -> Self {
        let manner = Manner {
            codes: false,
            // Tried with the first part.
            pays: AtomicBool::new(true),
            part_bytes: AtomicUsize::new(PART_DATA_BYTES_MAX),
        };
        let (manner, patience) = (Arc::new(manner), Patience::default());
        Self { client, url, image, progress, manner, sent: 0, plain_parts: 0, patience }
    }

    /// Asks whether the server speaks tus, and what codings it takes; follows where it points.
    pub(crate) async fn speaks_tus(&mut self) -> Result<bool, Error> {
        loop {
            let response = self.request(Method::OPTIONS, &self.url).send().await;
            let Some(response) = self.patience.judge("asking what the server speaks", response).await? else {
                continue;
            };
            self.url = response.url().clone();
            let has = |name: HeaderName, word: &str| {
                let values = response.headers().get_all(name);
                let mut words =
                    values.iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
                words.any(|one| one.trim().eq_ignore_ascii_case(word))
            };
            if has(ACCEPT_ENCODING, "zstd") {
                self.manner = Arc::new(Manner {
                    codes: true,
                    pays: AtomicBool::new(true),
                    part_bytes: AtomicUsize::new(PART_DATA_BYTES_MAX),
                });
            }
            return Ok(response.status().is_success() && has(TUS_VERSION, VERSION));
        }
    }

    /// Uploads by tus.
    pub(crate) async fn by_parts(&mut self) -> Result<Uploaded, Error> {
        let mut session = self.url.clone();
        {
            let mut query = session.query_pairs_mut();
            query.append_pair("upload", &self.image.id).append_pair("length", &self.image.len.to_string());
            if let Some(name) = &self.image.name {
                query.append_pair("filename", name);
            }
        }
        let uploaded = self.go_through(&mut session).await;
        if let Err(Error::Changed(_)) = &uploaded {
            // Nobody can go on with it, and it would be in the way of the next one.
            let _ = self.tus(Method::DELETE, &session).timeout(TERMINATE_TIMEOUT).send().await;
        }
        uploaded
    }

    async fn go_through(&mut self, session: &mut Url) -> Result<Uploaded, Error> {
        let mut next = Next::Ask;
        loop {
            next = match next {
                Next::Ask => self.ask(session).await?,
                Next::Begin => self.begin(session).await?,
                Next::From(position) => self.send_from(session, position).await?,
                Next::Done(uploaded) => return Ok(uploaded),
            }
        }
    }

    /// Asks how far the upload is.
    async fn ask(&mut self, session: &Url) -> Result<Next, Error> {
        let response = self.tus(Method::HEAD, session).send().await;
        let Some(response) = self.patience.judge("asking how far the upload is", response).await? else {
            return Ok(Next::Ask);
        };
        let headers = response.headers();
        match response.status() {
            StatusCode::OK | StatusCode::NO_CONTENT => {
                let position = number(headers, &UPLOAD_OFFSET).ok_or(Error::Protocol("no Upload-Offset"))?;
                let len = number(headers, &UPLOAD_LENGTH);
                if position > self.image.len || len.is_some_and(|len| len != self.image.len) {
                    return Err(Error::Protocol("the upload is of another length"));
                }
                self.count(position);
                Ok(Next::From(position))
            }
            StatusCode::NOT_FOUND => Ok(Next::Begin),
            // An answer to HEAD has no words.
            _ => {
                let told = self.tus(Method::GET, session).send().await;
                Err(match told {
                    Ok(told) if !told.status().is_success() => refused(told).await,
                    _ => refused(response).await,
                })
            }
        }
    }

    /// Begins the upload, and learns its address.
    async fn begin(&mut self, session: &mut Url) -> Result<Next, Error> {
        let mut request = self.tus(Method::POST, session).header(UPLOAD_LENGTH, self.image.len);
        if let Some(name) = &self.image.name {
            request = request.header(UPLOAD_METADATA, format!("filename {}", STANDARD.encode(name)));
        }
        let Some(response) = self.patience.judge("beginning the upload", request.send().await).await? else {
            // It may have begun all the same.
            return Ok(Next::Ask);
        };
        if response.status() != StatusCode::CREATED {
            return Err(refused(response).await);
        }
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        if let Some(location) = location {
            let found = response.url().join(location);
            *session = found.map_err(|_| Error::Protocol("the address of the upload is no URL"))?;
        }
        Ok(Next::From(number(response.headers(), &UPLOAD_OFFSET).unwrap_or(0)))
    }

    /// Sends the file from `position` on, part by part.
    async fn send_from(&mut self, session: &Url, mut position: u64) -> Result<Next, Error> {
        if position == self.image.len {
            // It came whole before; only the words are missing.
            let part = Part { len: 0, body: Bytes::new(), is_coded: false, trial: None };
            return self.send_part(session, position, &part).await;
        }
        let mut parts = read_ahead(Arc::clone(&self.image), position, Arc::clone(&self.manner));
        while let Some(part) = parts.recv().await {
            let part = part?;
            let behind = position + part.len;
            match self.send_part(session, position, &part).await? {
                Next::From(next) if next == behind && next < self.image.len => position = next,
                next => return Ok(next),
            }
        }
        Ok(Next::Ask)
    }

    /// Sends one part.
    async fn send_part(&mut self, session: &Url, position: u64, part: &Part) -> Result<Next, Error> {
        let mut request = self.tus(Method::PATCH, session).header(UPLOAD_OFFSET, position);
        request = request.header(CONTENT_TYPE, "application/offset+octet-stream");
        request = request.header(PREFER, "return=representation").timeout(REQUEST_TIMEOUT);
        if part.is_coded {
            request = request.header(CONTENT_ENCODING, "zstd");
        }
        if position + part.len == self.image.len {
            self.progress.set_phase("store");
        }
        let begun = Instant::now();
        let response = request.body(part.body.clone()).send().await;
        self.sent = self.sent.saturating_add(part.body.len() as u64);
        let Some(response) = self.patience.judge("sending a part of the file", response).await? else {
            self.progress.set_phase("upload");
            return Ok(Next::Ask);
        };
        self.learn(part, begun.elapsed());
        let offset = number(response.headers(), &UPLOAD_OFFSET);
        match (response.status(), offset) {
            (StatusCode::OK, _) => {
                self.count(self.image.len);
                let summary = serde_json::from_str(&answer(response).await).ok();
                Ok(Next::Done(Uploaded { summary, sent: self.sent }))
            }
            (StatusCode::NO_CONTENT, Some(offset)) if offset == self.image.len => {
                self.count(offset);
                Ok(Next::Done(Uploaded { summary: None, sent: self.sent }))
            }
            (StatusCode::NO_CONTENT, Some(offset)) if offset < self.image.len => {
                self.count(offset);
                Ok(Next::From(offset))
            }
            (StatusCode::NO_CONTENT, _) => Err(Error::Protocol("no Upload-Offset, or one behind the end")),
            // Another request of this upload was faster, or the server was replaced.
            (StatusCode::CONFLICT | StatusCode::NOT_FOUND, _) => {
                self.patience
                    .wait(Error::Protocol("the upload goes on elsewhere, or is gone again and again"), None)
                    .await?;
                Ok(Next::Ask)
            }
            _ => Err(refused(response).await),
        }
    }

    /// Uploads by one PUT, of which nothing is left when it breaks.
    pub(crate) async fn at_once(&mut self) -> Result<Uploaded, Error> {
        let manner = Arc::new(Manner {
            codes: false,
            pays: AtomicBool::new(false),
            part_bytes: AtomicUsize::new(PART_DATA_BYTES_MIN),
        });
        let parts = read_ahead(Arc::clone(&self.image), 0, manner);
        let request = self.request(Method::PUT, &self.url).header(CONTENT_LENGTH, self.image.len);
        let body = stream(parts, Arc::clone(&self.progress));
        let response = request.header(CONTENT_TYPE, "application/octet-stream").body(body).send().await;
        let response = response.map_err(|e| unreachable("sending the file", e))?;
        if !response.status().is_success() {
            return Err(refused(response).await);
        }
        let summary = serde_json::from_str(&answer(response).await).ok();
        Ok(Uploaded { summary, sent: self.image.len })
    }

    fn request(&self, method: Method, url: &Url) -> RequestBuilder {
        self.client.request(method, url.clone())
    }

    fn tus(&self, method: Method, url: &Url) -> RequestBuilder {
        self.request(method, url).header(TUS_RESUMABLE, VERSION)
    }

    /// Tells the display how much the server has.
    fn count(&mut self, position: u64) {
        let more = position.saturating_sub(self.progress.done());
        if more > 0 {
            self.progress.advance(more);
            self.patience = Patience::default();
        }
    }

    /// Judges by a part that was sent how large the next ones are, and whether compressing them pays: it does when the
    /// compressor and the link behind it are together faster than the link alone.
    fn learn(&mut self, part: &Part, time: Duration) {
        let link = part.body.len() as f64 / time.as_secs_f64().max(1e-6);
        let bytes = (link * PART_SECONDS) as usize;
        let bytes = bytes.clamp(PART_DATA_BYTES_MIN, PART_DATA_BYTES_MAX);
        if part.body.len() >= PART_DATA_BYTES_MIN {
            self.manner.part_bytes.store(bytes, Ordering::Relaxed);
        }
        let pays = match part.trial {
            Some(trial) => pays(trial, link),
            None => {
                self.plain_parts += 1;
                self.plain_parts >= PLAIN_PARTS_MAX
            }
        };
        if pays {
            self.plain_parts = 0;
        }
        self.manner.pays.store(pays, Ordering::Relaxed);
    }
}

/// Whether compressing made data small enough, and fast enough for a link of so many bytes per second.
fn pays(trial: Trial, link: f64) -> bool {
    let share = trial.coded as f64 / trial.data.max(1) as f64;
    let compressor = trial.data as f64 / trial.time.as_secs_f64().max(1e-6);
    share <= SHARE_MAX && compressor > link
}

/// Waits between attempts, and knows when to give up.
#[derive(Default)]
struct Patience {
    /// Of the first failure since anything moved.
    since: Option<Instant>,
    attempts: u32,
}

impl Patience {
    /// Passes an answer on; `None` after a failure that may pass, and a wait.
    async fn judge(
        &mut self,
        what: &str,
        response: reqwest::Result<Response>,
    ) -> Result<Option<Response>, Error> {
        match response {
            Ok(response) if is_passing(response.status()) => {
                let wanted = number(response.headers(), &RETRY_AFTER).map(Duration::from_secs);
                self.wait(refused(response).await, wanted).await?;
                Ok(None)
            }
            Ok(response) => Ok(Some(response)),
            Err(error) => {
                let is_final = error.is_builder()
                    || error.is_redirect()
                    || is_certificate_refused(&error)
                    || is_identity_refused(&error);
                let error = unreachable(what, error);
                match is_final {
                    true => Err(error),
                    false => self.wait(error, None).await.map(|()| None),
                }
            }
        }
    }

    /// Waits before the next attempt, as long as is `wanted` of us, or gives up with `error`.
    async fn wait(&mut self, error: Error, wanted: Option<Duration>) -> Result<(), Error> {
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() >= GIVE_UP_TIMEOUT {
            return Err(error);
        }
        let doubled = BACKOFF_FIRST.saturating_mul(1 << self.attempts.min(8)).min(BACKOFF_MAX);
        let wait = wanted.map_or(doubled, |wanted| wanted.min(RETRY_AFTER_MAX));
        self.attempts += 1;
        let (wait_ms, error) = (wait.as_millis() as u64, chain(&error));
        tracing::warn!(attempt = self.attempts, wait_ms, error, "upload: trying again");
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

fn unreachable(what: &str, source: reqwest::Error) -> Error {
    let what = if is_certificate_refused(&source) {
        "the server's certificate is not accepted; --cacert names what to trust, --insecure accepts any"
            .into()
    } else if is_identity_refused(&source) {
        "the server wants a certificate of its client that it trusts; --cert and --key name one".into()
    } else {
        format!("{what} failed")
    };
    Error::Unreachable { what, source: source.without_url() }
}

fn number(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

/// The parts of a file as one body; what is handed over is counted as sent.
fn stream(parts: mpsc::Receiver<Result<Part, Error>>, progress: Arc<Progress>) -> Body {
    Body::wrap_stream(futures_util::stream::unfold((parts, progress), async |(mut parts, progress)| {
        let part = parts.recv().await?;
        let piece = part.map(|part| {
            progress.advance(part.len);
            part.body
        });
        Some((piece, (parts, progress)))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressing_pays_on_a_link_slower_than_the_compressor() {
        let trial = |coded, ms| Trial { data: 1000, coded, time: Duration::from_millis(ms) };
        assert!(pays(trial(500, 10), 50_000.0));
        assert!(!pays(trial(500, 10), 200_000.0), "the link is faster");
        assert!(!pays(trial(950, 10), 50_000.0), "it saves next to nothing");
    }
}
