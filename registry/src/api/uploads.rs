//! Pushing blobs: POST, PATCH, PUT, and the upload's state (distribution-spec 1.1, "Pushing blobs").
//!
//! ```text
//!  POST ?mount&from ─────────────> 201 | 202 + session
//!  POST ?digest     body ────────> 201
//!  POST ─> 202 ─> PATCH* ─> 202 ─> PUT ?digest ─> 201
//!                   └── connection breaks: what came is kept; GET tells how much ──> PATCH
//! ```
//!
//! The work on a session runs as a task of its own: when the client goes away, it still puts away what has come.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, EXPECT, HeaderName, LOCATION, RANGE, RETRY_AFTER};
use http::request::Parts;
use http::{HeaderValue, StatusCode};
use http_body_util::BodyExt;
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;

use super::error::{ApiError, Code};
use super::route::{self, param, upload_unknown};
use super::{
    Answer, App, CONTENT_DIGEST, DRAIN_BYTES_MAX, UPLOAD_UUID, blocking, drain, empty, header, header_str,
    range,
};
use crate::digest::{Algorithm, Digest};
use crate::events::Stored;
use crate::names::RepoName;
use crate::patience::PROGRESS_BYTES_MIN;
use crate::store::{self, Ending, Intake, NOTE_BYTES_MAX, Session, UploadError};

/// Largest body that is held in memory until it is stored.
const SMALL_BODY_BYTES_MAX: u64 = 64 << 10;
/// What the client of a named session is told when it comes back (docs/registry.md).
const UPLOAD_NOTE: HeaderName = HeaderName::from_static("dvcr-upload-note");
/// How long the blob is that a session is begun for (docs/registry.md).
const UPLOAD_LENGTH: HeaderName = HeaderName::from_static("dvcr-upload-length");
/// Longest name of a session, bytes.
const SESSION_NAME_BYTES_MAX: usize = 128;
const OCI_CHUNK_MIN_LENGTH: HeaderName = HeaderName::from_static("oci-chunk-min-length");
/// How long a request waits for its turn before it is turned away.
const TURN_TIMEOUT: Duration = Duration::from_secs(10);

/// Begins a session, mounts a blob, or takes a whole blob.
pub(super) async fn post(app: Arc<App>, repo: RepoName, parts: Parts, body: Body) -> Answer {
    let query = parts.uri.query();
    let length = content_length(&parts);
    if let Some(digest) = param(query, "mount") {
        let digest: Digest = digest.parse()?;
        if let Some(from) = param(query, "from") {
            let from = route::repo(&from)?;
            let store = Arc::clone(&app.store);
            let (to, mounted) = (repo.clone(), digest.clone());
            if let Some(bytes) = blocking(move || store.mount_blob(&from, &to, &mounted)).await? {
                return Ok(created(&app, &repo, &digest, bytes));
            }
        }
    } else if let Some(digest) = param(query, "digest") {
        let digest: Digest = digest.parse()?;
        // Without a body it is a client that tells early what will follow by PUT.
        if length != Some(0) || digest == Digest::of(digest.algorithm(), b"") {
            let algorithm = digest.algorithm();
            let started = app.ask(move |store| {
                let session = Arc::clone(store).start_upload(&repo, algorithm)?;
                Ok::<_, UploadError>((repo, session))
            });
            let (repo, session) = started.await?;
            let incoming = Incoming { body, length, expected: length };
            let (session, incoming) = admit(session, incoming, &parts, Some(&digest)).await?;
            return detached(complete(app, repo, session, incoming, digest)).await;
        }
    }
    let algorithm = match param(query, "digest-algorithm") {
        Some(name) => Algorithm::from_name(&name).ok_or_else(|| {
            let message = format!("digest-algorithm {name:?} is not supported; use sha256 or sha512");
            ApiError::bad_request(Code::DigestInvalid, message)
        })?,
        None => Algorithm::Sha256,
    };
    let announced = announced(&parts)?;
    let mut response = match param(query, "session") {
        Some(name) => return_to(&app, repo, &name, algorithm, announced).await?,
        None => {
            let repo = match announced {
                None => repo,
                Some(bytes) => {
                    let store = Arc::clone(&app.store);
                    blocking(move || store.has_room(&repo, bytes).map(|()| repo)).await?
                }
            };
            let begun = app.ask(move |store| {
                let id = store.begin_upload(&repo, algorithm)?;
                Ok::<_, store::Error>((repo, id))
            });
            let (repo, id) = begun.await?;
            progress(StatusCode::ACCEPTED, &repo, id, 0)
        }
    };
    response.headers_mut().insert(OCI_CHUNK_MIN_LENGTH, app.store.chunk_bytes_min().into());
    Ok(response)
}

/// Begins the session of a repository that goes by a name, or finds it, with what its client left there.
async fn return_to(
    app: &Arc<App>,
    repo: RepoName,
    name: &str,
    algorithm: Algorithm,
    announced: Option<u64>,
) -> Result<Response, ApiError> {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > SESSION_NAME_BYTES_MAX || !name.bytes().all(is_name) {
        let message = format!(
            "a session's name has 1 to {SESSION_NAME_BYTES_MAX} letters, digits, '-', '_' and '.'; {name:?} is none"
        );
        return Err(ApiError::bad_request(Code::BlobUploadInvalid, message));
    }
    let id = store::session_id(&repo, name);
    let store = Arc::clone(&app.store);
    let (repo, offset, note) = blocking(move || {
        let there = store.upload_offset(&repo, id)?;
        if let Some(bytes) = announced {
            store.has_room(&repo, bytes.saturating_sub(there.unwrap_or(0)))?;
        }
        let offset = match there {
            Some(offset) => offset,
            None => {
                store.begin_upload_as(&repo, id, algorithm)?;
                0
            }
        };
        let note = store.upload_note(&repo, id)?;
        Ok::<_, store::Error>((repo, offset, note.unwrap_or_default()))
    })
    .await?;
    let mut response = progress(StatusCode::ACCEPTED, &repo, id, offset);
    response.headers_mut().insert(UPLOAD_NOTE, header(note));
    Ok(response)
}

/// Takes a chunk, or a stream of any length.
pub(super) async fn patch(app: Arc<App>, repo: RepoName, id: Uuid, parts: Parts, body: Body) -> Answer {
    let mut session = open(&app, &repo, id).await?;
    let incoming = match Incoming::check(&parts, body, &repo, &*session) {
        Ok(incoming) => incoming,
        Err((error, body)) => {
            // The next request need not wait until this one's body is drained.
            drop(session);
            return refuse(error, &parts, body).await;
        }
    };
    if let Some(note) = header_str(&parts, UPLOAD_NOTE) {
        if note.len() > NOTE_BYTES_MAX {
            let message = format!("a note has at most {NOTE_BYTES_MAX} bytes, this one {}", note.len());
            let error = ApiError::bad_request(Code::BlobUploadInvalid, message);
            drop(session);
            return refuse(error, &parts, incoming.body).await;
        }
        session.leave_note(note.to_owned());
    }
    let (session, incoming) = admit(session, incoming, &parts, None).await?;
    detached(async move {
        let session = receive(&app, session, incoming, None).await?;
        Ok(progress(StatusCode::ACCEPTED, &repo, session.id(), session.offset()))
    })
    .await
}

/// Takes what is missing and turns the session into a blob.
pub(super) async fn put(app: Arc<App>, repo: RepoName, id: Uuid, parts: Parts, body: Body) -> Answer {
    let digest = param(parts.uri.query(), "digest").ok_or_else(|| {
        ApiError::bad_request(
            Code::DigestInvalid,
            "the parameter digest is missing; it names the finished blob",
        )
    });
    let digest = match digest.and_then(|digest| Ok(digest.parse()?)) {
        Ok(digest) => digest,
        Err(error) => return refuse(error, &parts, body).await,
    };
    let session = open(&app, &repo, id).await?;
    match Incoming::check(&parts, body, &repo, &*session) {
        Ok(incoming) => {
            let (session, incoming) = admit(session, incoming, &parts, Some(&digest)).await?;
            detached(complete(app, repo, session, incoming, digest)).await
        }
        Err((error, body)) => {
            drop(session);
            refuse(error, &parts, body).await
        }
    }
}

/// Tells how much of an upload has been taken.
pub(super) async fn get(app: Arc<App>, repo: RepoName, id: Uuid) -> Answer {
    let store = Arc::clone(&app.store);
    let name = repo.clone();
    let offset = blocking(move || store.upload_offset(&name, id)).await?.ok_or_else(upload_unknown)?;
    Ok(progress(StatusCode::NO_CONTENT, &repo, id, offset))
}

/// Cancels an upload.
pub(super) async fn delete(app: Arc<App>, repo: RepoName, id: Uuid) -> Answer {
    let session = open(&app, &repo, id).await?;
    blocking(move || session.cancel()).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

/// A body that fits its session.
struct Incoming {
    body: Body,
    /// What `Content-Length` says.
    length: Option<u64>,
    /// What it must bring, by `Content-Length` or `Content-Range`.
    expected: Option<u64>,
}

impl Incoming {
    /// Checks the headers against each other and against what the session has; gives the body back on refusal.
    fn check(
        parts: &Parts,
        body: Body,
        repo: &RepoName,
        session: &dyn Session,
    ) -> Result<Self, (ApiError, Body)> {
        let length = content_length(parts);
        let Some(text) = header_str(parts, CONTENT_RANGE) else {
            return Ok(Self { body, length, expected: length });
        };
        let Some((first, expected)) = range::chunk(text) else {
            let message = format!("Content-Range {text:?} is not of the form first-last");
            return Err((ApiError::bad_request(Code::BlobUploadInvalid, message), body));
        };
        if first != session.offset() {
            let message =
                format!("the chunk begins at {first}, but the upload has {} bytes", session.offset());
            let location = location(repo, session.id());
            let error = ApiError::new(StatusCode::RANGE_NOT_SATISFIABLE, Code::BlobUploadInvalid, message)
                .with(LOCATION, header(location))
                .with(RANGE, taken(session.offset()));
            return Err((error, body));
        }
        if let Some(length) = length.filter(|length| *length != expected) {
            let message = format!("Content-Range announces {expected} bytes, Content-Length {length}");
            return Err((ApiError::bad_request(Code::SizeInvalid, message), body));
        }
        Ok(Self { body, length, expected: Some(expected) })
    }
}

/// Asks, before the body is read, whether there is room for what it is told to bring, and to become.
async fn admit(
    mut session: Box<dyn Session>,
    incoming: Incoming,
    parts: &Parts,
    digest: Option<&Digest>,
) -> Result<(Box<dyn Session>, Incoming), ApiError> {
    let length = incoming.length;
    let admitted = if session.admits_quickly() {
        session.admit(length, digest).map(|()| session).map_err(Into::into)
    } else {
        let digest = digest.cloned();
        blocking(move || session.admit(length, digest.as_ref()).map(|()| session)).await
    };
    match admitted {
        Ok(session) => Ok((session, incoming)),
        Err(error) => {
            drain(incoming.body, parts.headers.contains_key(EXPECT), DRAIN_BYTES_MAX).await;
            Err(error)
        }
    }
}

async fn complete(
    app: Arc<App>,
    repo: RepoName,
    mut session: Box<dyn Session>,
    incoming: Incoming,
    digest: Digest,
) -> Answer {
    let small = incoming.length.is_some_and(|length| length <= SMALL_BODY_BYTES_MAX);
    let length;
    let done = if session.is_fresh() && small {
        let _turn = turn(&app.small_bodies).await?;
        let bytes = collect(&app, incoming).await?;
        length = bytes.len() as u64;
        let digest = digest.clone();
        blocking(move || session.commit_small(&bytes, &digest)).await
    } else {
        if incoming.length != Some(0) {
            session = receive(&app, session, incoming, Some(&digest)).await?;
        }
        length = session.offset();
        let digest = digest.clone();
        blocking(move || session.commit(&digest)).await
    };
    done.map(|()| created(&app, &repo, &digest, length))
}

/// Takes a body into a session; `digest` is what the blob that is made of it next will be.
async fn receive(
    app: &Arc<App>,
    session: Box<dyn Session>,
    incoming: Incoming,
    digest: Option<&Digest>,
) -> Result<Box<dyn Session>, ApiError> {
    let _turn = turn(&app.uploads).await?;
    let _gauge = Gauge::raise(app);
    let length = incoming.length.unwrap_or(0);
    let done = if digest.is_some() { Ending::Committed } else { Ending::Acknowledged };
    let digest = digest.cloned();
    let mut intake = blocking(move || session.receive(length, digest.as_ref())).await?;
    let (came, stop) = pour(app, incoming.body, &mut *intake).await;
    let expected = incoming.expected.unwrap_or(came);
    let ending = match stop {
        None if came == expected => done,
        Some(Stop::Broken(_)) => Ending::BrokenOff,
        _ => Ending::TakenBack,
    };
    // A store that took no more tells why here.
    let session = intake.end(ending).await?;
    match stop {
        Some(Stop::Broken(reason)) => {
            let message = format!("the body broke off after {came} bytes: {reason}");
            Err(ApiError::bad_request(Code::BlobUploadInvalid, message))
        }
        _ if ending == Ending::TakenBack => {
            let message = format!("{expected} bytes were announced, {came} came");
            Err(ApiError::bad_request(Code::SizeInvalid, message))
        }
        _ => Ok(session),
    }
}

/// Why a body was not taken to its end.
enum Stop {
    /// It broke off.
    Broken(String),
    /// The store takes no more.
    Full,
}

/// Moves a body into a session until either ends; returns how many bytes were taken.
async fn pour(app: &App, mut body: Body, intake: &mut dyn Intake) -> (u64, Option<Stop>) {
    let mut came: u64 = 0;
    let mut pace = Pace::new(app.idle_timeout);
    loop {
        let data = match pace.next(&mut body).await {
            Ok(Some(data)) => data,
            Ok(None) => return (came, None),
            Err(reason) => return (came, Some(Stop::Broken(reason))),
        };
        let bytes = data.len() as u64;
        app.metrics.received_bytes.fetch_add(bytes, Ordering::Relaxed);
        if intake.push(data).await.is_err() {
            drain(body, false, DRAIN_BYTES_MAX).await;
            return (came, Some(Stop::Full));
        }
        came = came.saturating_add(bytes);
    }
}

/// Reads a whole body of known, small length.
async fn collect(app: &App, mut incoming: Incoming) -> Result<Bytes, ApiError> {
    let broken =
        |reason| ApiError::bad_request(Code::BlobUploadInvalid, format!("the body broke off: {reason}"));
    let mut pace = Pace::new(app.idle_timeout);
    let Some(first) = pace.next(&mut incoming.body).await.map_err(broken)? else { return Ok(Bytes::new()) };
    app.metrics.received_bytes.fetch_add(incoming.length.unwrap_or(0), Ordering::Relaxed);
    // The length was checked, and no more than that ever comes.
    if Some(first.len() as u64) == incoming.length {
        return Ok(first);
    }
    let mut bytes = BytesMut::from(first);
    while let Some(data) = pace.next(&mut incoming.body).await.map_err(broken)? {
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.freeze())
}

/// Sees to it that a body goes on coming.
struct Pace {
    limit: Duration,
    until: Instant,
    /// Bytes that came since the time was last extended.
    came: u64,
}

impl Pace {
    fn new(limit: Duration) -> Self {
        Self { limit, until: Instant::now() + limit, came: 0 }
    }

    /// Waits for the next piece of a body; an error says why there is none.
    async fn next(&mut self, body: &mut Body) -> Result<Option<Bytes>, String> {
        // What kept us from asking is not the client's fault.
        if self.came >= PROGRESS_BYTES_MIN || self.until <= Instant::now() {
            (self.until, self.came) = (Instant::now() + self.limit, 0);
        }
        loop {
            match timeout_at(self.until, body.frame()).await {
                Err(_) => {
                    return Err(format!("less than {PROGRESS_BYTES_MIN} bytes came in {:?}", self.limit));
                }
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(error.to_string()),
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.came = self.came.saturating_add(data.len() as u64);
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}

async fn open(app: &App, repo: &RepoName, id: Uuid) -> Result<Box<dyn Session>, ApiError> {
    let store = Arc::clone(&app.store);
    let opened = if store.opens_quickly(id) {
        store.open_upload(repo, id)?
    } else {
        let repo = repo.clone();
        blocking(move || store.open_upload(&repo, id)).await?
    };
    opened.ok_or_else(upload_unknown)
}

pub(super) async fn turn(semaphore: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, ApiError> {
    match timeout(TURN_TIMEOUT, Arc::clone(semaphore).acquire_owned()).await {
        Ok(Ok(permit)) => Ok(permit),
        _ => Err(ApiError::too_many("too many uploads at a time; try again later")),
    }
}

/// Waits for a body that is taken in as a whole, as long as one may bring nothing.
pub(super) async fn patiently<T>(limit: Duration, body: impl Future<Output = T>) -> Result<T, String> {
    timeout(limit, body).await.map_err(|_| format!("the body took more than {limit:?}"))
}

/// Answers a request whose body is not taken.
async fn refuse(error: ApiError, parts: &Parts, body: Body) -> Answer {
    drain(body, parts.headers.contains_key(EXPECT), DRAIN_BYTES_MAX).await;
    Err(error)
}

/// Runs to the end whether or not the client waits for it.
async fn detached(work: impl Future<Output = Answer> + Send + 'static) -> Answer {
    tokio::spawn(work).await.unwrap_or_else(|error| Err(ApiError::internal(&error)))
}

/// Counts an upload while it goes on.
struct Gauge(Arc<App>);

impl Gauge {
    fn raise(app: &Arc<App>) -> Self {
        app.metrics.uploads.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(app))
    }
}

impl Drop for Gauge {
    fn drop(&mut self) {
        self.0.metrics.uploads.fetch_sub(1, Ordering::Relaxed);
    }
}

impl From<UploadError> for ApiError {
    fn from(error: UploadError) -> Self {
        match error {
            UploadError::Busy => {
                let message = "another request works on this upload; ask for its state and try again";
                Self::new(StatusCode::CONFLICT, Code::BlobUploadInvalid, message).with(RETRY_AFTER, 1.into())
            }
            UploadError::Digest { actual } => {
                Self::bad_request(Code::DigestInvalid, format!("the content's digest is {actual}"))
                    .detail(json!({"digest": actual.as_str()}))
            }
            UploadError::Store(error) => error.into(),
        }
    }
}

/// What a client says, when it begins a session, that it will bring.
fn announced(parts: &Parts) -> Result<Option<u64>, ApiError> {
    let number = |text: &str| {
        text.parse().map_err(|_| {
            let message = format!("{UPLOAD_LENGTH} is a number of bytes, not {text:?}");
            ApiError::bad_request(Code::BlobUploadInvalid, message)
        })
    };
    header_str(parts, UPLOAD_LENGTH).map(number).transpose()
}

fn content_length(parts: &Parts) -> Option<u64> {
    header_str(parts, CONTENT_LENGTH)?.parse().ok()
}

fn location(repo: &RepoName, id: Uuid) -> String {
    format!("/v2/{repo}/blobs/uploads/{id}")
}

/// Says which bytes are taken; as distribution does, also of none that the first is.
fn taken(offset: u64) -> HeaderValue {
    header(format!("0-{}", offset.saturating_sub(1)))
}

fn progress(status: StatusCode, repo: &RepoName, id: Uuid, offset: u64) -> Response {
    let mut response = empty(status);
    let headers = response.headers_mut();
    headers.insert(LOCATION, header(location(repo, id)));
    headers.insert(RANGE, taken(offset));
    headers.insert(UPLOAD_UUID, header(id.to_string()));
    if status != StatusCode::NO_CONTENT {
        headers.insert(CONTENT_LENGTH, 0.into());
    }
    response
}

fn created(app: &App, repo: &RepoName, digest: &Digest, bytes: u64) -> Response {
    let mut response = empty(StatusCode::CREATED);
    app.note(&mut response, || Stored::blob(bytes));
    let headers = response.headers_mut();
    headers.insert(LOCATION, header(format!("/v2/{repo}/blobs/{digest}")));
    headers.insert(CONTENT_DIGEST, header(digest.as_str()));
    headers.insert(CONTENT_LENGTH, 0.into());
    response
}
