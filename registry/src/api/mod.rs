//! The HTTP side: routing, authorization, answers, the request log.
//!
//! ```text
//!  request ──> /healthz /readyz /metrics ──────────────────────────────────────────┐
//!     ├──────> token ──────────────────────────────────────────────────────────────┤
//!     └──────> admit: who, Route::parse, may they ─┬> blobs uploads manifests lists ──> headers, metrics, log ──> answer
//!                                                  └> cached: what an upstream has
//! ```
//!
//! On a directory small lookups (a link, a length, a manifest in memory) run on the async threads: they are answered from the
//! kernel's caches in microseconds, less than handing them to another thread costs. What syncs, hashes or moves content does not,
//! and neither does what asks another machine; [`App::ask`] makes the difference.

#[cfg(test)]
mod access;
mod blobs;
mod cached;
pub(crate) mod error;
pub(crate) mod limits;
mod lists;
mod manifests;
mod range;
pub(crate) mod route;
mod token;
mod uploads;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::{ALLOW, CONTENT_LENGTH, EXPECT, HeaderName};
use http::request::Parts;
use http::{HeaderValue, Method, Request, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt;
use tokio::sync::Semaphore;

use self::error::{ApiError, Code};
use self::limits::{Address, Rates};
use self::route::Route;
use crate::Limits;
use crate::auth::{Guard, Identity, TOKEN_PATH};
use crate::cache::Sources;
use crate::events::Recorder;
use crate::metrics::{Metrics, RouteLabel};
use crate::migrate::Mirror;
use crate::rules::Rules;
use crate::store::Store;

/// Bodies that are held in memory until they are stored, at a time.
const SMALL_BODIES_MAX: usize = 256;
/// Manifests that are taken in at a time.
const MANIFESTS_MAX: usize = 16;
/// How much of a refused body is read, so that a client that is still sending sees the answer.
const DRAIN_BYTES_MAX: u64 = 64 << 20;
/// The same, for a client that is not let in.
const UNAUTHORIZED_DRAIN_BYTES_MAX: u64 = 64 << 10;
/// How long that may take.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
pub(crate) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
pub(crate) const OCI_TAG: HeaderName = HeaderName::from_static("oci-tag");
const UPLOAD_UUID: HeaderName = HeaderName::from_static("docker-upload-uuid");

/// What every request sees.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) store: Arc<dyn Store>,
    /// Who may do what; `None` lets everybody do everything.
    pub(crate) guard: Option<Guard>,
    pub(crate) rules: Arc<Rules>,
    /// Whose repositories are fetched when they are wanted; `None` if there is no upstream.
    pub(crate) cache: Option<Sources>,
    /// How long a client may use the URL of a blob that it is sent to; `None` sends it nowhere.
    pub(crate) redirect: Option<Duration>,
    /// How often each client may ask.
    pub(crate) rates: Option<Rates>,
    /// How long a client may take to bring a little of a body.
    pub(crate) idle_timeout: Duration,
    pub(crate) metrics: Metrics,
    /// Whether the end has been asked for.
    pub(crate) is_ending: AtomicBool,
    /// What is kept like what is served; `None` if nothing.
    pub(crate) mirror: Option<Arc<Mirror>>,
    /// Who is told of each request; `None` if nobody.
    pub(crate) events: Option<Arc<Recorder>>,
    /// Requests that stream content in.
    pub(crate) uploads: Arc<Semaphore>,
    /// Requests whose content is held in memory.
    pub(crate) small_bodies: Arc<Semaphore>,
    /// Requests that bring a manifest.
    pub(crate) manifests: Arc<Semaphore>,
}

impl App {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        guard: Option<Guard>,
        rules: Arc<Rules>,
        cache: Option<Sources>,
        uploads_max: usize,
        limits: &Limits,
        events: Option<Arc<Recorder>>,
    ) -> Self {
        Self {
            store,
            guard,
            rules,
            cache,
            redirect: limits.redirect,
            rates: limits.request_rate.map(Rates::new),
            idle_timeout: limits.idle_timeout,
            metrics: Metrics::default(),
            is_ending: AtomicBool::new(false),
            events,
            mirror: None,
            uploads: Arc::new(Semaphore::new(uploads_max)),
            small_bodies: Arc::new(Semaphore::new(SMALL_BODIES_MAX)),
            manifests: Arc::new(Semaphore::new(MANIFESTS_MAX)),
        }
    }

    /// Asks the store what it is quick to tell: at once, or, where each question is a request to another machine, on a thread of
    /// its own.
    async fn ask<T, E>(
        &self,
        question: impl FnOnce(&Arc<dyn Store>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, ApiError>
    where
        T: Send + 'static,
        E: Into<ApiError> + Send + 'static,
    {
        if !self.store.is_remote() {
            return question(&self.store).map_err(Into::into);
        }
        let store = Arc::clone(&self.store);
        blocking(move || question(&store)).await
    }

    /// Whether somebody wants to know where requests come from.
    pub(crate) fn wants_addresses(&self) -> bool {
        self.rates.is_some() || self.events.is_some()
    }

    /// Puts a fact beside an answer, if somebody wants to know.
    fn note<T: Clone + Send + Sync + 'static>(&self, response: &mut Response, fact: impl FnOnce() -> T) {
        if self.events.is_some() {
            response.extensions_mut().insert(fact());
        }
    }
}

pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new().fallback(handle).with_state(app)
}

type Answer = Result<Response, ApiError>;

async fn handle(State(app): State<Arc<App>>, request: Request<Body>) -> Response {
    let Some(events) = app.events.clone() else { return answer(&app, request).await.2 };
    let (parts, body) = request.into_parts();
    // As it is served: with the name that the repository has here.
    let route = Route::parse(&parts.method, parts.uri.path()).ok();
    let route = route.map(|route| cached::renamed(&app, &parts, route));
    let (asked, body) = events.asked(&parts, route, body);
    let is_reading = matches!(parts.method, Method::GET | Method::HEAD);
    let recorded = async move {
        let (label, who, response) = answer(&app, Request::from_parts(parts, body)).await;
        events.answered(asked, who, label, response)
    };
    if is_reading {
        return recorded.await;
    }
    // A change is told of, also when its client is gone before it is made.
    tokio::spawn(recorded).await.unwrap_or_else(|error| ApiError::internal(&error).into_response())
}

async fn answer(app: &Arc<App>, request: Request<Body>) -> (RouteLabel, Identity, Response) {
    let started = Instant::now();
    let (parts, body) = request.into_parts();
    let method = parts.method.clone();
    let path = parts.uri.path().to_owned();
    let (label, who, answer) = dispatch(app, parts, body).await;
    let mut response = answer.unwrap_or_else(IntoResponse::into_response);
    response.headers_mut().insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    let (status, elapsed) = (response.status().as_u16(), started.elapsed());
    app.metrics.record(label, method.as_str(), status, elapsed);
    let bytes = response.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()).unwrap_or("0");
    // The query stays out: it can hold tokens of other programs' sessions.
    tracing::info!(
        target: "dvcr_registry::access",
        %method,
        path,
        status,
        bytes,
        ms = elapsed.as_millis(),
        user = who.name().unwrap_or("-"),
        "request"
    );
    (label, who, response)
}

async fn dispatch(app: &Arc<App>, parts: Parts, body: Body) -> (RouteLabel, Identity, Answer) {
    if let Some(answer) = probe(app, &parts).await {
        return (RouteLabel::Probe, Identity::Anonymous, answer);
    }
    if let Some(guard) = app.guard.as_ref().filter(|guard| guard.issues_tokens())
        && parts.uri.path() == TOKEN_PATH
    {
        if let Err(error) = throttle(app, None, &parts) {
            drain(body, false, UNAUTHORIZED_DRAIN_BYTES_MAX).await;
            return (RouteLabel::Token, Identity::Anonymous, Err(error));
        }
        let (who, answer) = token::answer(guard, parts, body).await;
        return (RouteLabel::Token, who, answer);
    }
    let expects = parts.headers.contains_key(EXPECT);
    let route = Route::parse(&parts.method, parts.uri.path());
    let label = route.as_ref().map_or(RouteLabel::Other, Route::label);
    // Before it is asked who may do it: the name that counts is the one here.
    let route = route.map(|route| cached::renamed(app, &parts, route));
    let (who, admitted) = admit(app, &parts, route).await;
    if let Err(error) = throttle(app, who.name(), &parts) {
        drain(body, expects, UNAUTHORIZED_DRAIN_BYTES_MAX).await;
        return (label, who, Err(error));
    }
    match admitted {
        Ok(route) => (label, who, serve(app, parts, body, route).await),
        Err(error) => {
            let is_stranger = error.status() == StatusCode::UNAUTHORIZED;
            let bytes_max = if is_stranger { UNAUTHORIZED_DRAIN_BYTES_MAX } else { DRAIN_BYTES_MAX };
            drain(body, expects, bytes_max).await;
            (label, who, Err(error))
        }
    }
}

/// Finds out who asks for what, and whether they may. Who is not known learns nothing about paths.
async fn admit(
    app: &App,
    parts: &Parts,
    route: Result<Route, ApiError>,
) -> (Identity, Result<Route, ApiError>) {
    let Some(guard) = &app.guard else { return (Identity::Anybody, route) };
    let who = match guard.identify(parts).await {
        Ok(who) => who,
        Err(error) => return (Identity::Anonymous, Err(error)),
    };
    let admitted = match route {
        Ok(route) => guard.authorize(&who, &route, parts).map(|()| route),
        Err(_) if matches!(who, Identity::Anonymous) => {
            Err(guard.challenge(parts, "user name and password are needed", None))
        }
        Err(error) => Err(error),
    };
    (who, admitted)
}

/// Turns away clients that ask too often.
fn throttle(app: &App, user: Option<&str>, parts: &Parts) -> Result<(), ApiError> {
    let Some(rates) = &app.rates else { return Ok(()) };
    let checked = rates.check(user, parts.extensions.get::<Address>().copied());
    if checked.is_err() {
        app.metrics.rate_limited.fetch_add(1, Ordering::Relaxed);
    }
    checked
}

/// Answers those that look whether we live; they need no credentials.
async fn probe(app: &Arc<App>, parts: &Parts) -> Option<Answer> {
    let path = parts.uri.path();
    if !matches!(path, "/" | "/healthz" | "/readyz" | "/metrics") {
        return None;
    }
    if !matches!(parts.method, Method::GET | Method::HEAD) {
        return Some(Err(not_allowed("GET, HEAD")));
    }
    Some(match path {
        "/metrics" => {
            let mut text = app.metrics.render(&app.store.stats(), app.cache.as_ref(), app.mirror.as_deref());
            if let Some(events) = &app.events {
                // Writing to a string does not fail.
                let _ = events.write_metrics(&mut text);
            }
            let mut response = text.into_response();
            let text = HeaderValue::from_static("text/plain; version=0.0.4");
            response.headers_mut().insert(http::header::CONTENT_TYPE, text);
            Ok(response)
        }
        "/readyz" if app.is_ending.load(Ordering::Relaxed) => {
            let message = "the registry ends; what is new belongs elsewhere";
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, Code::Unknown, message))
        }
        "/readyz" => {
            let store = Arc::clone(&app.store);
            blocking(move || store.probe()).await.map(|()| "ok\n".into_response()).map_err(|_| {
                let message = "the storage cannot be written; the log tells why";
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, Code::Unknown, message)
            })
        }
        _ => Ok("ok\n".into_response()),
    })
}

async fn serve(app: &Arc<App>, parts: Parts, body: Body, route: Route) -> Answer {
    if let Some(source) = app.cache.as_ref().and_then(|sources| sources.of(route.repo()?))
        && let Some(answer) = cached::serve(app, source, &parts, &route).await
    {
        if answer.is_err() {
            drain(body, parts.headers.contains_key(EXPECT), DRAIN_BYTES_MAX).await;
        }
        return answer;
    }
    let app = Arc::clone(app);
    match (route, &parts.method) {
        (Route::Base, &Method::GET | &Method::HEAD) => Ok(json("{}".to_owned())),
        (Route::Base, _) => Err(not_allowed("GET, HEAD")),
        (Route::Catalog, &Method::GET) => lists::catalog(app, &parts).await,
        (Route::Catalog, _) => Err(not_allowed("GET")),
        (Route::Tags(repo), &Method::GET) => lists::tags(app, repo, &parts).await,
        (Route::Tags(_), _) => Err(not_allowed("GET")),
        (Route::Referrers(repo, subject), &Method::GET) => lists::referrers(app, repo, subject, &parts).await,
        (Route::Referrers(..), _) => Err(not_allowed("GET")),
        (Route::Blob(repo, digest), &Method::GET) => blobs::get(&app, repo, digest, &parts).await,
        (Route::Blob(repo, digest), &Method::HEAD) => blobs::head(&app, repo, digest).await,
        (Route::Blob(repo, digest), &Method::DELETE) => blobs::delete(app, repo, digest).await,
        (Route::Blob(..), _) => Err(not_allowed("GET, HEAD, DELETE")),
        (Route::Manifest(repo, reference), &Method::GET | &Method::HEAD) => {
            manifests::get(&app, repo, reference, &parts).await
        }
        (Route::Manifest(repo, reference), &Method::PUT) => {
            manifests::put(app, repo, reference, &parts, body).await
        }
        (Route::Manifest(repo, reference), &Method::DELETE) => manifests::delete(app, repo, reference).await,
        (Route::Manifest(..), _) => Err(not_allowed("GET, HEAD, PUT, DELETE")),
        (Route::Uploads(repo), &Method::POST) => uploads::post(app, repo, parts, body).await,
        (Route::Uploads(_), _) => Err(not_allowed("POST")),
        (Route::Upload(repo, id), &Method::PATCH) => uploads::patch(app, repo, id, parts, body).await,
        (Route::Upload(repo, id), &Method::PUT) => uploads::put(app, repo, id, parts, body).await,
        (Route::Upload(repo, id), &Method::GET) => uploads::get(app, repo, id).await,
        (Route::Upload(repo, id), &Method::DELETE) => uploads::delete(app, repo, id).await,
        (Route::Upload(..), _) => Err(not_allowed("GET, PATCH, PUT, DELETE")),
    }
}

fn not_allowed(allowed: &'static str) -> ApiError {
    let message = format!("the method is not supported here; use {allowed}");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, Code::Unsupported, message)
        .with(ALLOW, HeaderValue::from_static(allowed))
}

fn json(body: String) -> Response {
    let length = body.len();
    let mut response = Response::new(Body::from(body));
    let headers = response.headers_mut();
    headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CONTENT_LENGTH, length.into());
    response
}

/// An answer without a body.
fn empty(status: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

/// Makes a header value of a text that has only printable ASCII, as all names, digests and paths of ours have.
fn header(text: impl Into<String>) -> HeaderValue {
    HeaderValue::try_from(text.into()).unwrap_or(HeaderValue::from_static(""))
}

fn header_str(parts: &Parts, name: HeaderName) -> Option<&str> {
    parts.headers.get(name)?.to_str().ok()
}

/// Runs what blocks on a thread of its own.
async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, ApiError>
where
    T: Send + 'static,
    E: Into<ApiError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(Into::into),
        Err(error) => Err(ApiError::internal(&error)),
    }
}

/// Reads and drops a body that is not wanted, within bounds; not if the client waits to be asked for it, or it would not
/// come to its end.
async fn drain(mut body: Body, expects: bool, bytes_max: u64) {
    if expects || body.size_hint().lower() > bytes_max {
        return;
    }
    let mut left = bytes_max;
    let drained = async {
        while let Some(Ok(frame)) = body.frame().await {
            let bytes = frame.data_ref().map_or(0, |data| data.len() as u64);
            left = match left.checked_sub(bytes) {
                Some(left) => left,
                None => break,
            };
        }
    };
    // Whether it ended in time or not, the answer is the same.
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, drained).await;
}
