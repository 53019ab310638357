//! Blobs: HEAD, GET with ranges, DELETE.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH, IF_RANGE,
    LOCATION, RANGE,
};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, StatusCode};
use serde_json::json;

use super::error::{ApiError, Code};
use super::range::{Selected, select};
use super::{Answer, App, CONTENT_DIGEST, blocking, empty, header, header_str};
use crate::digest::Digest;
use crate::names::RepoName;
use crate::store::Blob;

/// Content never changes under its digest: caches may keep it for a year.
const IMMUTABLE: &str = "max-age=31536000, immutable";

pub(super) async fn head(app: &App, repo: RepoName, digest: Digest) -> Answer {
    // Clients ask this most, and a bucket answers from one request: another thread would cost more than that.
    let length = match Arc::clone(&app.store).claim_without_blocking(repo.clone(), digest.clone()) {
        Some(claimed) => claimed.await?,
        None => {
            let (repo, digest) = (repo.clone(), digest.clone());
            app.ask(move |store| store.claim_blob(&repo, &digest)).await?
        }
    };
    let length = length.ok_or_else(|| unknown(&repo, &digest))?;
    let mut response = empty(StatusCode::OK);
    describe(response.headers_mut(), &digest);
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
    Ok(response)
}

pub(super) async fn get(app: &Arc<App>, repo: RepoName, digest: Digest, parts: &Parts) -> Answer {
    if let Some(lasts) = app.redirect {
        let (repo, digest) = (repo.clone(), digest.clone());
        if let Some(url) = app.ask(move |store| store.locate_blob(&repo, &digest, lasts)).await? {
            return Ok(redirect(&url));
        }
    }
    let opened = app.ask(move |store| {
        let blob = Arc::clone(store).open_blob(&repo, &digest)?.ok_or_else(|| unknown(&repo, &digest))?;
        Ok::<_, ApiError>((digest, blob))
    });
    let (digest, blob) = opened.await?;
    answer_stored(app, blob, &digest, parts)
}

/// Sends a client to where it gets the same for a while. The URL is a secret: nobody else is to keep it.
fn redirect(url: &str) -> Response {
    let mut response = empty(StatusCode::TEMPORARY_REDIRECT);
    response.headers_mut().insert(LOCATION, header(url));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Gives a blob that is stored.
pub(super) fn answer_stored(app: &Arc<App>, blob: Box<dyn Blob>, digest: &Digest, parts: &Parts) -> Answer {
    answer(digest, blob.length(), parts, |first, end| body(Arc::clone(app), blob.read(first, end)))
}

/// Gives a blob of so many bytes, or the part that is asked for, which `body` reads from the first byte up to the end.
pub(super) fn answer(
    digest: &Digest,
    length: u64,
    parts: &Parts,
    body: impl FnOnce(u64, u64) -> Body,
) -> Answer {
    if header_str(parts, IF_NONE_MATCH).is_some_and(|tags| names(tags, digest)) {
        let mut response = empty(StatusCode::NOT_MODIFIED);
        describe(response.headers_mut(), digest);
        return Ok(response);
    }
    // A client that continues another version's download gets all of this one (RFC 9110, 13.1.5). Our entity tags are
    // strong and we give no dates, so nothing but the same tag is the same version.
    let same = header_str(parts, IF_RANGE).is_none_or(|tag| tag.trim() == format!("\"{digest}\""));
    let range = header_str(parts, RANGE).filter(|_| same);
    let (status, first, end) = match select(range, length) {
        Selected::Whole => (StatusCode::OK, 0, length),
        Selected::Part(first, end) => (StatusCode::PARTIAL_CONTENT, first, end),
        Selected::Nothing => {
            let message = format!("the range begins behind the blob's {length} bytes");
            return Err(ApiError::new(StatusCode::RANGE_NOT_SATISFIABLE, Code::SizeInvalid, message)
                .with(CONTENT_RANGE, header(format!("bytes */{length}")))
                .with(ACCEPT_RANGES, HeaderValue::from_static("bytes")));
        }
    };
    let mut response = Response::new(body(first, end));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    describe(headers, digest);
    headers.insert(CONTENT_LENGTH, (end - first).into());
    if status == StatusCode::PARTIAL_CONTENT {
        headers.insert(CONTENT_RANGE, header(format!("bytes {first}-{}/{length}", end - 1)));
    }
    Ok(response)
}

pub(super) async fn delete(app: Arc<App>, repo: RepoName, digest: Digest) -> Answer {
    let store = Arc::clone(&app.store);
    let (name, of) = (repo.clone(), digest.clone());
    match blocking(move || store.delete_blob(&name, &of)).await? {
        true => Ok(empty(StatusCode::ACCEPTED)),
        false => Err(unknown(&repo, &digest)),
    }
}

/// Says that a repository has no such blob.
pub(super) fn unknown(repo: &RepoName, digest: &Digest) -> ApiError {
    ApiError::not_found(Code::BlobUnknown, format!("{repo} has no blob {digest}"))
        .detail(json!({"digest": digest.as_str()}))
}

/// Whether an `If-None-Match` header names this content.
pub(super) fn names(tags: &str, digest: &Digest) -> bool {
    tags.split(',').any(|tag| {
        let tag = tag.trim();
        tag == "*" || tag.strip_prefix("W/").unwrap_or(tag).trim_matches('"') == digest.as_str()
    })
}

pub(super) fn describe(headers: &mut HeaderMap, digest: &Digest) {
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_DIGEST, header(digest.as_str()));
    headers.insert(ETAG, header(format!("\"{digest}\"")));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static(IMMUTABLE));
}

fn body(app: Arc<App>, bytes: BoxStream<'static, io::Result<Bytes>>) -> Body {
    Body::from_stream(bytes.inspect(move |bytes| match bytes {
        Ok(bytes) => {
            app.metrics.sent_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        // The connection breaks off, which tells the client; here is told why.
        Err(error) => tracing::error!(%error, "a blob could not be read to its end"),
    }))
}
