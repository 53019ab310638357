//! Repositories that are those of an upstream: what is not here is fetched; nobody pushes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use futures_util::stream;
use http::header::{ALLOW, CONTENT_LENGTH, WARNING};
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode};

use super::error::{ApiError, Code};
use super::route::{self, Route};
use super::{Answer, App, blobs, empty, manifests};
use crate::cache::{Arriving, Content, Failure, Passing, Served, Source};
use crate::digest::Digest;
use crate::names::{Reference, RepoName};

/// What a client is told whose tag could not be compared with the upstream's (RFC 7234, 5.5).
const STALE: HeaderValue = HeaderValue::from_static("110 - \"Response is Stale\"");
const REVALIDATION_FAILED: HeaderValue = HeaderValue::from_static("111 - \"Revalidation Failed\"");

/// Answers what needs the upstream, or is refused because there is one; gives everything else back.
pub(super) async fn serve(
    app: &Arc<App>,
    source: &Arc<Source>,
    parts: &Parts,
    route: &Route,
) -> Option<Answer> {
    match (route, &parts.method) {
        (Route::Manifest(repo, reference), &Method::GET | &Method::HEAD) => {
            Some(manifest(app, source, repo, reference, parts).await)
        }
        (Route::Blob(repo, digest), &Method::GET) => Some(blob(app, source, repo, digest, parts).await),
        (Route::Blob(repo, digest), &Method::HEAD) => Some(head(source, repo, digest).await),
        (Route::Manifest(repo, reference), &Method::DELETE) => {
            source.forget(repo, reference);
            None
        }
        (Route::Manifest(..), &Method::PUT) | (Route::Uploads(_), &Method::POST) => {
            Some(Err(read_only(source)))
        }
        (Route::Upload(..), &Method::PATCH | &Method::PUT | &Method::DELETE) => Some(Err(read_only(source))),
        _ => None,
    }
}

/// Gives a route the name that its repository has here, if the client calls the upstream by the parameter `ns`.
pub(super) fn renamed(app: &App, parts: &Parts, route: Route) -> Route {
    let (Some(sources), Some(query)) = (&app.cache, parts.uri.query()) else { return route };
    let Some(ns) = route::param(Some(query), "ns") else { return route };
    match route.repo().and_then(|repo| sources.renamed(&ns, repo)) {
        Some(repo) => route.of(repo),
        None => route,
    }
}

fn read_only(source: &Source) -> ApiError {
    let message = format!(
        "the repositories below {} are those of another registry, and are only read here; push to that one, or to another name",
        source.prefix()
    );
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, Code::Unsupported, message)
        .with(ALLOW, HeaderValue::from_static("GET, HEAD, DELETE"))
}

async fn manifest(
    app: &App,
    source: &Arc<Source>,
    repo: &RepoName,
    reference: &Reference,
    parts: &Parts,
) -> Answer {
    let found = source.manifest(repo, reference).await;
    let Served { manifest, is_stale } =
        found.map_err(|failure| answer(failure, manifests::unknown(repo, reference)))?;
    let mut response = manifests::answer(app, &manifest, parts);
    if is_stale {
        response.headers_mut().append(WARNING, STALE);
        response.headers_mut().append(WARNING, REVALIDATION_FAILED);
    }
    Ok(response)
}

async fn head(source: &Arc<Source>, repo: &RepoName, digest: &Digest) -> Answer {
    let length = source.blob_length(repo, digest).await;
    let length = length.map_err(|failure| answer(failure, blobs::unknown(repo, digest)))?;
    let mut response = empty(StatusCode::OK);
    blobs::describe(response.headers_mut(), digest);
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
    Ok(response)
}

async fn blob(
    app: &Arc<App>,
    source: &Arc<Source>,
    repo: &RepoName,
    digest: &Digest,
    parts: &Parts,
) -> Answer {
    let content = source.blob(repo, digest).await;
    match content.map_err(|failure| answer(failure, blobs::unknown(repo, digest)))? {
        Content::Stored(blob) => blobs::answer_stored(app, Box::new(blob), digest, parts),
        Content::Arriving(arriving) => {
            let length = arriving.length();
            blobs::answer(digest, length, parts, |first, end| {
                arriving_body(Arc::clone(app), arriving.part(first, end))
            })
        }
        Content::Passing(length) => {
            let pass = |first, end| source.pass(repo, digest, (first, end, length));
            blobs::answer(digest, length, parts, |first, end| match pass(first, end) {
                Ok(passing) => passing_body(Arc::clone(app), passing),
                Err(failure) => Body::from_stream(stream::iter([Err::<bytes::Bytes, _>(failure)])),
            })
        }
    }
}

/// What a client hears of a failure; `unknown` if the upstream does not have it.
fn answer(failure: Failure, unknown: ApiError) -> ApiError {
    match failure {
        Failure::Unknown => unknown,
        Failure::Denied => {
            ApiError::denied("the registry behind this one does not let it read this; its log tells more")
        }
        Failure::Busy => ApiError::too_many("too much is being fetched; try again later"),
        Failure::Upstream(why) => ApiError::new(StatusCode::BAD_GATEWAY, Code::Unknown, why),
        Failure::Storage(error) => ApiError::internal(&error),
    }
}

fn arriving_body(app: Arc<App>, arriving: Arriving) -> Body {
    Body::from_stream(stream::unfold((app, arriving), async |(app, mut arriving)| {
        let bytes = arriving.next().await.transpose()?;
        Some((sent(&app, bytes), (app, arriving)))
    }))
}

fn passing_body(app: Arc<App>, passing: Passing) -> Body {
    Body::from_stream(stream::unfold((app, passing), async |(app, mut passing)| {
        let bytes = passing.next().await.transpose()?;
        Some((sent(&app, bytes), (app, passing)))
    }))
}

/// Counts what is sent; a body that fails breaks off its connection, which tells the client.
fn sent(app: &App, bytes: std::io::Result<bytes::Bytes>) -> std::io::Result<bytes::Bytes> {
    match &bytes {
        Ok(bytes) => {
            app.metrics.sent_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        Err(error) => tracing::warn!(%error, "the body of a blob that is being fetched breaks off"),
    }
    bytes
}
