//! Manifests: GET and HEAD by tag and digest, PUT, DELETE.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use axum::body::Body;
use axum::response::Response;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, EXPECT, HeaderName, IF_NONE_MATCH, LOCATION};
use http::request::Parts;
use http::{HeaderMap, Method, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::{Value, json};

use super::error::{ApiError, Code};
use super::{
    Answer, App, CONTENT_DIGEST, DRAIN_BYTES_MAX, blobs, blocking, drain, empty, header, header_str,
};
use crate::digest::{Algorithm, Digest};
use crate::model;
use crate::names::{Reference, RepoName, Tag};
use crate::storage::manifests::{MANIFEST_BYTES_MAX, Manifest};

const OCI_SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
/// Missing descriptors told back to the client.
const MISSING_SHOWN_MAX: usize = 20;

pub(super) fn get(app: &App, repo: &RepoName, reference: &Reference, parts: &Parts) -> Answer {
    let digest = app.storage.resolve(repo, reference)?;
    let manifest = match &digest {
        Some(digest) => app.storage.manifest(repo, digest)?,
        None => None,
    };
    let manifest = manifest.ok_or_else(|| unknown(repo, reference))?;
    if header_str(parts, IF_NONE_MATCH).is_some_and(|tags| blobs::names(tags, &manifest.digest)) {
        let mut response = empty(StatusCode::NOT_MODIFIED);
        describe(response.headers_mut(), &manifest);
        return Ok(response);
    }
    let length = manifest.bytes.len();
    let body = match parts.method {
        Method::HEAD => Body::empty(),
        _ => {
            app.metrics.sent_bytes.fetch_add(length as u64, Ordering::Relaxed);
            Body::from(manifest.bytes.clone())
        }
    };
    let mut response = Response::new(body);
    describe(response.headers_mut(), &manifest);
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
    Ok(response)
}

pub(super) async fn put(
    app: Arc<App>,
    repo: RepoName,
    reference: Reference,
    parts: &Parts,
    body: Body,
) -> Answer {
    let too_large = || {
        let message = format!("a manifest may have {MANIFEST_BYTES_MAX} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, Code::SizeInvalid, message)
    };
    let length = header_str(parts, CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
    if length.is_some_and(|length| length > MANIFEST_BYTES_MAX as u64) {
        drain(body, parts.headers.contains_key(EXPECT), DRAIN_BYTES_MAX).await;
        return Err(too_large());
    }
    let _turn = super::uploads::turn(&app.manifests).await?;
    let bytes = match super::uploads::patiently(Limited::new(body, MANIFEST_BYTES_MAX).collect()).await {
        Ok(Ok(collected)) => collected.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(too_large()),
        Ok(Err(error)) => {
            return Err(ApiError::bad_request(Code::ManifestInvalid, format!("the body broke off: {error}")));
        }
        Err(reason) => return Err(ApiError::bad_request(Code::ManifestInvalid, reason)),
    };
    app.metrics.received_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    let content_type = header_str(parts, CONTENT_TYPE).map(str::to_owned);
    blocking(move || store(&app, &repo, reference, bytes, content_type.as_deref())).await
}

pub(super) async fn delete(app: Arc<App>, repo: RepoName, reference: Reference) -> Answer {
    let (name, of) = (repo.clone(), reference.clone());
    let deleted = blocking(move || {
        refuse_deletion(&app, &name, &of)?;
        Ok::<_, ApiError>(match of {
            Reference::Tag(tag) => app.storage.delete_tag(&name, &tag)?,
            Reference::Digest(digest) => app.storage.delete_manifest(&name, &digest)?,
        })
    });
    match deleted.await? {
        true => Ok(empty(StatusCode::ACCEPTED)),
        false => Err(unknown(&repo, &reference)),
    }
}

/// Fails if a tag that never changes would go.
fn refuse_deletion(app: &App, repo: &RepoName, reference: &Reference) -> Result<(), ApiError> {
    let denied = |tag: &Tag| {
        let message =
            format!("the tag {tag} of {repo} is immutable: neither it nor what it names can be deleted");
        Err(ApiError::denied(message))
    };
    match reference {
        Reference::Tag(tag) if app.rules.is_immutable(repo, tag) => denied(tag),
        Reference::Digest(digest) if app.rules.may_be_immutable(repo) => {
            let tags = app.storage.tags_of(repo, digest)?;
            tags.iter().find(|tag| app.rules.is_immutable(repo, tag)).map_or(Ok(()), denied)
        }
        _ => Ok(()),
    }
}

fn store(
    app: &App,
    repo: &RepoName,
    reference: Reference,
    bytes: bytes::Bytes,
    content_type: Option<&str>,
) -> Result<Response, ApiError> {
    let (digest, tag) = match reference {
        Reference::Tag(tag) => (Digest::of(Algorithm::Sha256, &bytes), Some(tag)),
        Reference::Digest(expected) => {
            let actual = Digest::of(expected.algorithm(), &bytes);
            if actual != expected {
                let message = format!("the manifest's digest is {actual}");
                return Err(ApiError::bad_request(Code::DigestInvalid, message));
            }
            (expected, None)
        }
    };
    let storage = &app.storage;
    // Two that put the same new tag come one after the other.
    let _immutable = match &tag {
        Some(tag) if app.rules.is_immutable(repo, tag) => {
            let guard = app.immutable.lock().unwrap_or_else(PoisonError::into_inner);
            let named = storage.resolve(repo, &Reference::Tag(tag.clone()))?;
            if let Some(named) = named.filter(|named| *named != digest) {
                let message =
                    format!("the tag {tag} of {repo} is immutable and names {named}; push another tag");
                return Err(ApiError::denied(message));
            }
            Some(guard)
        }
        _ => None,
    };
    let checked = model::check(&bytes, content_type)
        .map_err(|refusal| ApiError::bad_request(Code::ManifestInvalid, refusal.to_string()))?;
    let mut missing = Vec::new();
    let _accepting = storage.accepting();
    for blob in checked.blobs {
        if storage.claim_blob(repo, &blob)?.is_none() {
            missing.push(blob);
        }
    }
    for manifest in checked.manifests {
        if !storage.claim_manifest(repo, &manifest)? {
            missing.push(manifest);
        }
    }
    if !missing.is_empty() {
        let shown: Vec<_> =
            missing.iter().take(MISSING_SHOWN_MAX).map(|digest| json!(digest.as_str())).collect();
        let message =
            format!("the manifest refers to {} blobs or manifests that {repo} lacks", missing.len());
        return Err(ApiError::new(StatusCode::BAD_REQUEST, Code::ManifestBlobUnknown, message)
            .detail(json!({"digests": Value::Array(shown)})));
    }
    let manifest = Manifest { digest: digest.clone(), bytes, media_type: checked.media_type.into() };
    storage.put_manifest(repo, manifest, tag.as_ref(), checked.subject.as_ref())?;
    let mut response = empty(StatusCode::CREATED);
    let headers = response.headers_mut();
    headers.insert(LOCATION, header(format!("/v2/{repo}/manifests/{digest}")));
    headers.insert(CONTENT_DIGEST, header(digest.as_str()));
    headers.insert(CONTENT_LENGTH, 0.into());
    if let Some(subject) = &checked.subject {
        headers.insert(OCI_SUBJECT, header(subject.as_str()));
    }
    Ok(response)
}

fn unknown(repo: &RepoName, reference: &Reference) -> ApiError {
    let (key, name) = match reference {
        Reference::Tag(tag) => ("tag", tag.as_str()),
        Reference::Digest(digest) => ("digest", digest.as_str()),
    };
    ApiError::not_found(Code::ManifestUnknown, format!("{repo} has no manifest {name}"))
        .detail(json!({key: name}))
}

fn describe(headers: &mut HeaderMap, manifest: &Manifest) {
    headers.insert(CONTENT_TYPE, header(&*manifest.media_type));
    headers.insert(CONTENT_DIGEST, header(manifest.digest.as_str()));
    headers.insert(ETAG, header(format!("\"{}\"", manifest.digest)));
}
