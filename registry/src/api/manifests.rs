//! Manifests: GET and HEAD by tag and digest, PUT, DELETE.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::response::Response;
use http::header::{
    CONTENT_LENGTH, CONTENT_TYPE, ETAG, EXPECT, HeaderName, IF_NONE_MATCH, LOCATION, WARNING,
};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::{Value, json};

use super::error::{ApiError, Code};
use super::route::params;
use super::{
    Answer, App, CONTENT_DIGEST, DRAIN_BYTES_MAX, OCI_TAG, blobs, blocking, drain, empty, header, header_str,
};
use crate::digest::{Algorithm, Digest};
use crate::events::{Stored, Untagged};
use crate::model;
use crate::names::{Reference, ReferenceError, RepoName, Tag};
use crate::store::{ChangeError, MANIFEST_BYTES_MAX, Manifest};

const OCI_SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
/// Tags that one push may bring as parameters (distribution-spec, main branch: 10 at least). Each is told back in a header
/// of its own, and some clients read no more than 100 headers.
const TAG_PARAMS_MAX: usize = 50;
/// Missing descriptors told back to the client.
const MISSING_SHOWN_MAX: usize = 20;

pub(super) async fn get(app: &App, repo: RepoName, reference: Reference, parts: &Parts) -> Answer {
    let found = app
        .ask(move |store| store.find_manifest(&repo, &reference)?.ok_or_else(|| unknown(&repo, &reference)));
    Ok(answer(app, &found.await?, parts))
}

/// Gives a manifest, as much of it as is asked for.
pub(super) fn answer(app: &App, manifest: &Manifest, parts: &Parts) -> Response {
    if header_str(parts, IF_NONE_MATCH).is_some_and(|tags| blobs::names(tags, &manifest.digest)) {
        let mut response = empty(StatusCode::NOT_MODIFIED);
        describe(response.headers_mut(), manifest);
        return response;
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
    describe(response.headers_mut(), manifest);
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
    response
}

pub(super) async fn put(
    app: Arc<App>,
    repo: RepoName,
    reference: Reference,
    parts: &Parts,
    body: Body,
) -> Answer {
    let target = match Target::read(reference, parts.uri.query()) {
        Ok(target) => target,
        Err(error) => {
            drain(body, parts.headers.contains_key(EXPECT), DRAIN_BYTES_MAX).await;
            return Err(error);
        }
    };
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
    let bytes =
        match super::uploads::patiently(app.idle_timeout, Limited::new(body, MANIFEST_BYTES_MAX).collect())
            .await
        {
            Ok(Ok(collected)) => collected.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(too_large()),
            Ok(Err(error)) => {
                return Err(ApiError::bad_request(
                    Code::ManifestInvalid,
                    format!("the body broke off: {error}"),
                ));
            }
            Err(reason) => return Err(ApiError::bad_request(Code::ManifestInvalid, reason)),
        };
    app.metrics.received_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    let content_type = header_str(parts, CONTENT_TYPE).map(str::to_owned);
    blocking(move || store(&app, &repo, target, bytes, content_type.as_deref())).await
}

pub(super) async fn delete(app: Arc<App>, repo: RepoName, reference: Reference) -> Answer {
    let (shared, name, of) = (Arc::clone(&app), repo.clone(), reference.clone());
    let removed = blocking(move || {
        match &of {
            // Whether it is there or not.
            Reference::Tag(tag) if shared.rules.is_immutable(&name, tag) => Err(cannot_go(&name, tag)),
            _ => shared.store.remove(&name, Some(&of), &shared.rules).map_err(|error| match error {
                ChangeError::Immutable { tag, .. } => cannot_go(&name, &tag),
                error => refused(&name, error),
            }),
        }
    });
    let removed = removed.await?;
    if removed.count == 0 {
        return Err(unknown(&repo, &reference));
    }
    let mut response = empty(StatusCode::ACCEPTED);
    app.note(&mut response, || Untagged(removed.tags));
    Ok(response)
}

fn cannot_go(repo: &RepoName, tag: &Tag) -> ApiError {
    let message =
        format!("the tag {tag} of {repo} is immutable: neither it nor what it names can be deleted");
    ApiError::denied(message)
}

/// What a client hears whose change is refused.
fn refused(repo: &RepoName, error: ChangeError) -> ApiError {
    match error {
        ChangeError::Immutable { tag, names } => {
            let message = format!("the tag {tag} of {repo} is immutable and names {names}; push another tag");
            ApiError::denied(message)
        }
        ChangeError::Missing(missing) => {
            let shown: Vec<_> =
                missing.iter().take(MISSING_SHOWN_MAX).map(|digest| json!(digest.as_str())).collect();
            ApiError::new(StatusCode::BAD_REQUEST, Code::ManifestBlobUnknown, lacks(repo, &missing))
                .detail(json!({"digests": Value::Array(shown)}))
        }
        ChangeError::Store(error) => error.into(),
    }
}

fn lacks(repo: &RepoName, missing: &[Digest]) -> String {
    format!("the manifest refers to {} blobs or manifests that {repo} lacks", missing.len())
}

/// What a push names.
struct Target {
    /// The digest that the manifest must have, if the client tells one.
    digest: Option<Digest>,
    /// The tags that are to name it.
    tags: Vec<Tag>,
}

impl Target {
    /// Reads the reference of a push and its parameters `tag`, which are for a push by digest.
    fn read(reference: Reference, query: Option<&str>) -> Result<Self, ApiError> {
        let mut wanted = params(query, "tag").peekable();
        let digest = match reference {
            Reference::Tag(tag) if wanted.peek().is_none() => {
                return Ok(Self { digest: None, tags: vec![tag] });
            }
            Reference::Tag(_) => {
                let message =
                    "the parameter tag goes with a push by digest; push to manifests/<digest>?tag=...";
                return Err(ApiError::bad_request(Code::TagInvalid, message));
            }
            Reference::Digest(digest) => digest,
        };
        let mut tags = Vec::new();
        for (text, before) in wanted.zip(0..) {
            if before == TAG_PARAMS_MAX {
                let message = format!(
                    "a push may have {TAG_PARAMS_MAX} parameters tag; push the others by a further one"
                );
                return Err(ApiError::new(StatusCode::URI_TOO_LONG, Code::TagInvalid, message));
            }
            let tag = Tag::parse(&text).ok_or_else(|| ReferenceError::tag(&text))?;
            if !tags.contains(&tag) {
                tags.push(tag);
            }
        }
        Ok(Self { digest: Some(digest), tags })
    }
}

fn store(
    app: &App,
    repo: &RepoName,
    Target { digest, tags }: Target,
    bytes: bytes::Bytes,
    content_type: Option<&str>,
) -> Result<Response, ApiError> {
    let by_digest = digest.is_some();
    let digest = match digest {
        None => Digest::of(Algorithm::Sha256, &bytes),
        Some(expected) => {
            let actual = Digest::of(expected.algorithm(), &bytes);
            if actual != expected {
                let message = format!("the manifest's digest is {actual}");
                return Err(ApiError::bad_request(Code::DigestInvalid, message));
            }
            expected
        }
    };
    let checked = model::check(&bytes, content_type)
        .map_err(|refusal| ApiError::bad_request(Code::ManifestInvalid, refusal.to_string()))?;
    let length = bytes.len() as u64;
    let media_type: Arc<str> = checked.media_type.as_str().into();
    let manifest = Manifest { digest: digest.clone(), bytes, media_type: Arc::clone(&media_type) };
    let missing = app
        .store
        .accept_manifest(repo, manifest, &checked, &tags, &app.rules)
        .map_err(|error| refused(repo, error))?;
    let mut response = empty(StatusCode::CREATED);
    app.note(&mut response, || Stored { media_type, bytes: length });
    let headers = response.headers_mut();
    headers.insert(LOCATION, header(format!("/v2/{repo}/manifests/{digest}")));
    headers.insert(CONTENT_DIGEST, header(digest.as_str()));
    headers.insert(CONTENT_LENGTH, 0.into());
    if let Some(subject) = &checked.subject {
        headers.insert(OCI_SUBJECT, header(subject.as_str()));
    }
    for tag in tags.iter().filter(|_| by_digest) {
        headers.append(OCI_TAG, header(tag.as_str()));
    }
    if let Some(text) = checked.warning {
        headers.append(WARNING, warning(text));
    }
    if !missing.is_empty() {
        headers.append(WARNING, warning(&lacks(repo, &missing)));
    }
    Ok(response)
}

pub(super) fn unknown(repo: &RepoName, reference: &Reference) -> ApiError {
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
    if let Some(text) = model::deprecation(&manifest.media_type) {
        headers.insert(WARNING, warning(text));
    }
}

/// A text for the people behind a client (distribution-spec 1.1, "Warnings"); it has no quotes.
fn warning(text: &str) -> HeaderValue {
    header(format!("299 - \"{text}\""))
}
