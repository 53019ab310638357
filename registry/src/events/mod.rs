//! What happened: each request is turned into one event, which the audit log and the webhooks are told.
//!
//! ```text
//!  request ──> Asked ──> api ──> answer ──> Event ──┬──> audit ──> writer ──> file
//!                │                   │              └──> webhook: who wants it ──> writer ──> queue ──> POST, in order,
//!          bytes that came    bytes that went                                                          until it is taken
//! ```
//!
//! An event is complete when the answer's body is: delivered, or broken off. Nothing here waits for a disk or for another
//! machine while a request does: what cannot be kept is counted.

mod audit;
mod config;
mod queue;
mod webhook;
mod writer;

use std::fmt::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use http::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HOST, HeaderName, USER_AGENT,
};
use http::request::Parts;
use http::{HeaderMap, Method, Uri};
use http_body::{Body as _, Frame, SizeHint};
use tokio::task::JoinSet;
use uuid::Uuid;

pub use self::config::{Events, Ignore, Webhook};
use self::webhook::Hook;
use self::writer::Writer;
use crate::api::limits::Address;
use crate::api::route::{Route, param};
use crate::api::{CONTENT_DIGEST, OCI_TAG};
use crate::auth::{Bearer, Identity, base_url};
use crate::digest::Digest;
use crate::metrics::{RouteLabel, head};
use crate::names::{Reference, RepoName, Tag};
use crate::{Error, Result};

/// Characters kept of what a client says about itself.
const TEXT_CHARS_MAX: usize = 256;
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Takes down what happens.
#[derive(Debug)]
pub(crate) struct Recorder {
    audit: Option<Writer>,
    hooks: Vec<Arc<Hook>>,
    ids: Ids,
    instance: Uuid,
    machine: String,
    listening: OnceLock<SocketAddr>,
    bearer: Option<Bearer>,
    is_tls: bool,
}

/// A request, as it is before it is answered.
#[derive(Debug)]
pub(crate) struct Asked {
    started: Instant,
    time: SystemTime,
    id: Uuid,
    method: Method,
    uri: Uri,
    /// `None` of a path that is none of the API's.
    route: Option<Route>,
    address: Option<SocketAddr>,
    forwarded_for: Option<String>,
    user_agent: Option<String>,
    host: Option<String>,
    /// What the client calls us.
    base_url: Option<String>,
    has_credentials: bool,
    received: Arc<AtomicU64>,
}

/// A request that was answered.
#[derive(Debug)]
struct Event {
    asked: Asked,
    who: Identity,
    action: Action,
    kind: Option<Kind>,
    repository: Option<String>,
    /// A tag or a digest, as the request has it.
    reference: Option<String>,
    digest: Option<String>,
    tags: Vec<String>,
    /// The repository that a blob is mounted from.
    from: Option<String>,
    upload: Option<Uuid>,
    /// A path that names no repository.
    path: Option<String>,
    stored: Option<Stored>,
    status: u16,
    sent_bytes: u64,
    ending: Ending,
}

/// What a request is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Pull,
    Head,
    Push,
    Mount,
    Delete,
    UploadStart,
    Upload,
    UploadCancel,
    UploadStatus,
    Token,
    List,
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Manifest,
    Blob,
}

/// How the answer's body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Whole,
    /// The client went away, or the blob could not be read on.
    Broken,
}

/// Content that a request is about; handlers put it beside those answers that do not tell it.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) media_type: Arc<str>,
    pub(crate) bytes: u64,
}

/// Tags that went with the manifest they named, put beside the answer.
#[derive(Clone, Debug)]
pub(crate) struct Untagged(pub(crate) Vec<Tag>);

impl Recorder {
    /// Opens what is configured; `None` if that is nothing. `dir` holds the queues. Blocks.
    ///
    /// # Errors
    /// When a file cannot be used, or a setting makes no sense.
    pub(crate) fn open(
        events: &Events,
        dir: &Path,
        bearer: Option<Bearer>,
        is_tls: bool,
    ) -> Result<Option<Self>> {
        events.check()?;
        if *events == Events::default() {
            return Ok(None);
        }
        tell_of_leftovers(events, dir);
        let cannot = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Write { path, source }
        };
        let audit = events.audit_log.as_ref().map(|path| {
            let log = audit::Log::open(path).map_err(cannot(path))?;
            Writer::start("the audit log".to_owned(), log).map_err(cannot(path))
        });
        let hooks = events.webhooks.iter().map(|hook| Hook::open(hook, &dir.join(&hook.name)).map(Arc::new));
        let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Ok(Some(Self {
            audit: audit.transpose()?,
            hooks: hooks.collect::<Result<_>>()?,
            ids: Ids::new(),
            instance: Uuid::new_v4(),
            machine: machine.trim().to_owned(),
            listening: OnceLock::new(),
            bearer,
            is_tls,
        }))
    }

    /// Tells where requests come in.
    pub(crate) fn listens(&self, address: SocketAddr) {
        // The first address is where the registry is known to be.
        let _ = self.listening.set(address);
    }

    /// Starts sending what webhooks wait for; the tasks may be ended at any time.
    pub(crate) fn deliver(&self, tasks: &mut JoinSet<()>) {
        for hook in &self.hooks {
            tasks.spawn(Arc::clone(hook).deliver());
        }
    }

    /// Reads files again, if they changed or anyway, and opens the audit log again if it was moved away. Blocks.
    pub(crate) fn refresh(&self, force: bool) {
        self.hooks.iter().for_each(|hook| hook.refresh(force));
        if let Some(audit) = self.audit.as_ref().filter(|_| force) {
            audit.refresh();
        }
    }

    /// Waits until all that happened is on disk. Blocks.
    pub(crate) fn flush(&self, limit: Duration) {
        let until = Instant::now() + limit;
        for writer in self.audit.iter().chain(self.hooks.iter().map(|hook| hook.writer())) {
            if !writer.flush(until.saturating_duration_since(Instant::now())) {
                tracing::error!("events of the last moments may not have been written");
            }
        }
    }

    /// Takes down what is asked, and counts the bytes that come with it.
    pub(crate) fn asked(&self, parts: &Parts, route: Option<Route>, body: Body) -> (Asked, Body) {
        let headers = &parts.headers;
        let text = |name| headers.get(name).map(|value| bounded(value.as_bytes()));
        let received = Arc::<AtomicU64>::default();
        let base_url = match self.hooks.is_empty() {
            true => None,
            false => base_url(self.bearer.as_ref(), self.is_tls, headers),
        };
        let asked = Asked {
            started: Instant::now(),
            time: SystemTime::now(),
            id: self.ids.next(),
            method: parts.method.clone(),
            uri: parts.uri.clone(),
            route,
            address: parts.extensions.get::<Address>().map(|address| address.0),
            forwarded_for: text(FORWARDED_FOR),
            user_agent: text(USER_AGENT),
            host: text(HOST),
            base_url,
            has_credentials: headers.contains_key(AUTHORIZATION),
            received: Arc::clone(&received),
        };
        let body = match body.is_end_stream() {
            true => body,
            false => Body::new(Received { body, bytes: received }),
        };
        (asked, body)
    }

    /// Takes down what was answered, when the body is delivered.
    pub(crate) fn answered(
        self: &Arc<Self>,
        asked: Asked,
        who: Identity,
        label: RouteLabel,
        response: Response,
    ) -> Response {
        let Some(event) = Event::new(asked, who, label, &response) else { return response };
        if response.body().is_end_stream() {
            self.record(&event);
            return response;
        }
        let (parts, body) = response.into_parts();
        let expected = length(&parts.headers).or(body.size_hint().exact());
        let event = Some(Box::new(event));
        Response::from_parts(parts, Body::new(Sent { body, expected, event, recorder: Arc::clone(self) }))
    }

    fn record(&self, event: &Event) {
        if let Some(audit) = &self.audit {
            audit.write(audit::entry(event));
        }
        for hook in &self.hooks {
            hook.tell(event, self);
        }
    }

    /// Writes counters as text.
    pub(crate) fn write_metrics(&self, out: &mut String) -> fmt::Result {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        if let Some(audit) = &self.audit {
            let counts = audit.counts();
            for (name, help, counter) in [
                ("dvcr_registry_audit_entries_total", "Entries of the audit log.", &counts.written),
                ("dvcr_registry_audit_lost_total", "Entries that could not be written.", &counts.lost),
            ] {
                head(out, name, "counter", help)?;
                writeln!(out, "{name} {}", get(counter))?;
            }
        }
        webhook::write_metrics(&self.hooks, out)
    }
}

impl Event {
    /// Derives what happened; `None` of what is neither content nor refused.
    fn new(mut asked: Asked, who: Identity, label: RouteLabel, response: &Response) -> Option<Self> {
        let (status, headers) = (response.status().as_u16(), response.headers());
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let route = asked.route.take();
        let mut event = Self {
            who,
            action: Action::Other,
            kind: None,
            repository: None,
            reference: None,
            digest: text(CONTENT_DIGEST),
            tags: Vec::new(),
            from: None,
            upload: None,
            path: None,
            stored: response.extensions().get::<Stored>().cloned(),
            status,
            sent_bytes: 0,
            ending: Ending::Whole,
            asked,
        };
        let is_refused = matches!(status, 401 | 403 | 429);
        match route {
            Some(route) => {
                event.set(route, headers);
                if let Some(Untagged(tags)) = response.extensions().get() {
                    event.tags.extend(tags.iter().map(|tag| tag.as_str().to_owned()));
                }
            }
            None => {
                event.path = Some(bounded(event.asked.uri.path().as_bytes()));
                if label == RouteLabel::Token {
                    event.action = Action::Token;
                }
            }
        }
        let is_content =
            !matches!(event.action, Action::List | Action::Other | Action::UploadStatus) || is_refused;
        is_content.then_some(event)
    }

    fn set(&mut self, route: Route, headers: &HeaderMap) {
        let method = self.asked.method.clone();
        match route {
            Route::Base => self.path = Some("/v2/".to_owned()),
            Route::Catalog => {
                self.action = Action::List;
                self.path = Some("/v2/_catalog".to_owned());
            }
            Route::Tags(repo) | Route::Referrers(repo, _) => {
                self.action = Action::List;
                self.repository = Some(repo.as_str().to_owned());
            }
            Route::Manifest(repo, reference) => {
                self.kind = Some(Kind::Manifest);
                self.repository = Some(repo.as_str().to_owned());
                self.action = match method {
                    Method::GET => Action::Pull,
                    Method::HEAD => Action::Head,
                    Method::PUT => Action::Push,
                    Method::DELETE => Action::Delete,
                    _ => Action::Other,
                };
                match &reference {
                    Reference::Tag(tag) => {
                        self.tags = vec![tag.as_str().to_owned()];
                        self.reference = Some(tag.as_str().to_owned());
                    }
                    Reference::Digest(digest) => {
                        let tags = headers.get_all(OCI_TAG).iter().filter_map(|tag| tag.to_str().ok());
                        self.tags = tags.map(str::to_owned).collect();
                        self.reference = Some(digest.as_str().to_owned());
                        self.digest.get_or_insert_with(|| digest.as_str().to_owned());
                    }
                }
                if let (Action::Pull | Action::Head, 200, Some(bytes)) =
                    (self.action, self.status, length(headers))
                {
                    let media_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
                    self.stored = Some(Stored { media_type: media_type.unwrap_or_default().into(), bytes });
                }
            }
            Route::Blob(repo, digest) => {
                self.kind = Some(Kind::Blob);
                self.repository = Some(repo.as_str().to_owned());
                self.digest = Some(digest.as_str().to_owned());
                self.action = match method {
                    Method::GET => Action::Pull,
                    Method::HEAD => Action::Head,
                    Method::DELETE => Action::Delete,
                    _ => Action::Other,
                };
                let bytes = match self.status {
                    200 => length(headers),
                    206 => whole(headers),
                    _ => None,
                };
                self.stored = bytes.map(Stored::blob);
            }
            Route::Uploads(repo) => {
                self.kind = Some(Kind::Blob);
                self.repository = Some(repo.as_str().to_owned());
                let query = self.asked.uri.query();
                let (mount, digest) = (param(query, "mount"), param(query, "digest"));
                self.action = match (method, self.status, &mount, &digest) {
                    (Method::POST, 202, ..) | (Method::POST, _, None, None) => Action::UploadStart,
                    (Method::POST, _, Some(_), _) => Action::Mount,
                    (Method::POST, ..) => Action::Push,
                    _ => Action::Other,
                };
                if self.action == Action::Mount {
                    self.from = param(query, "from").filter(|from| RepoName::parse(from).is_some());
                }
                self.wanted(mount.or(digest));
            }
            Route::Upload(repo, id) => {
                self.kind = Some(Kind::Blob);
                self.repository = Some(repo.as_str().to_owned());
                self.upload = Some(id);
                self.action = match method {
                    Method::PATCH => Action::Upload,
                    Method::PUT => Action::Push,
                    Method::DELETE => Action::UploadCancel,
                    Method::GET => Action::UploadStatus,
                    _ => Action::Other,
                };
                self.wanted(param(self.asked.uri.query(), "digest"));
            }
        }
    }

    /// Sets a digest that the request names and the answer does not.
    fn wanted(&mut self, digest: Option<String>) {
        if self.digest.is_none() {
            self.digest = digest.filter(|digest| digest.parse::<Digest>().is_ok());
        }
    }
}

impl Stored {
    pub(crate) fn blob(bytes: u64) -> Self {
        Self { media_type: "application/octet-stream".into(), bytes }
    }
}

impl Asked {
    fn received_bytes(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

impl Action {
    fn name(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Head => "head",
            Self::Push => "push",
            Self::Mount => "mount",
            Self::Delete => "delete",
            Self::UploadStart => "upload-start",
            Self::Upload => "upload",
            Self::UploadCancel => "upload-cancel",
            Self::UploadStatus => "upload-status",
            Self::Token => "token",
            Self::List => "list",
            Self::Other => "other",
        }
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Blob => "blob",
        }
    }
}

/// Makes numbers for requests and events that nobody else has; the system is asked once.
#[derive(Debug)]
struct Ids {
    first: u64,
    next: AtomicU64,
}

impl Ids {
    fn new() -> Self {
        let (first, _) = Uuid::new_v4().as_u64_pair();
        Self { first, next: AtomicU64::new(0) }
    }

    fn next(&self) -> Uuid {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        let pair = Uuid::from_u64_pair(self.first, next);
        uuid::Builder::from_custom_bytes(pair.into_bytes()).into_uuid()
    }
}

/// A request's body, counted.
struct Received {
    body: Body,
    bytes: Arc<AtomicU64>,
}

impl http_body::Body for Received {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            self.bytes.fetch_add(data_bytes(frame), Ordering::Relaxed);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body; its end makes the event complete.
struct Sent {
    body: Body,
    expected: Option<u64>,
    event: Option<Box<Event>>,
    recorder: Arc<Recorder>,
}

impl Sent {
    fn end(&mut self, is_whole: bool) {
        if let Some(mut event) = self.event.take() {
            event.ending = if is_whole { Ending::Whole } else { Ending::Broken };
            self.recorder.record(&event);
        }
    }
}

impl http_body::Body for Sent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(event) = &mut self.event {
                    event.sent_bytes += data_bytes(frame);
                }
            }
            Poll::Ready(Some(Err(_))) => self.end(false),
            Poll::Ready(None) => self.end(true),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        // Who has all bytes that were announced does not ask for the end.
        let sent = self.event.as_ref().map(|event| event.sent_bytes);
        let is_whole = self.body.is_end_stream() || self.expected.is_some() && sent >= self.expected;
        self.end(is_whole);
    }
}

fn data_bytes(frame: &Frame<Bytes>) -> u64 {
    frame.data_ref().map_or(0, |data| data.len() as u64)
}

fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The length of all that a part is of.
fn whole(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_RANGE)?.to_str().ok()?.rsplit_once('/')?.1.parse().ok()
}

/// Makes a text of what a client sent: short, and with nothing that a terminal would act on.
fn bounded(bytes: &[u8]) -> String {
    let kept = &bytes[..bytes.len().min(4 * TEXT_CHARS_MAX)];
    let plain = |char: char| if char.is_control() { char::REPLACEMENT_CHARACTER } else { char };
    String::from_utf8_lossy(kept).chars().take(TEXT_CHARS_MAX).map(plain).collect()
}

fn rfc3339(time: SystemTime) -> String {
    DateTime::<Utc>::from(time).to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// Says that events wait for endpoints that are no longer there.
fn tell_of_leftovers(events: &Events, dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let known = |path: &PathBuf| events.webhooks.iter().any(|hook| path.ends_with(&hook.name));
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| !known(path)) {
        let path = path.display();
        tracing::warn!(%path, "events wait here for a webhook that is not configured; remove them, or bring it back");
    }
}
