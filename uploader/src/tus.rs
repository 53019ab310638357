//! The tus resumable upload protocol, version 1.0.0 (tus.io/protocols/resumable-upload), on one address.
//!
//! The extensions are creation, creation-with-upload, creation-defer-length, expiration, termination and checksum. Bodies may
//! be `Content-Encoding: zstd`, which the answers announce by `Accept-Encoding` (RFC 9110, 12.5.3); offsets count what was
//! coded. The last byte is acknowledged when the image is durable: so every client waits for the verdict, by sending it
//! again as often as need be, whatever time-outs a proxy has.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use chrono::{TimeDelta, Utc};
use http::header::{ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use http::request::Parts;
use http::{HeaderMap, HeaderName, Method, StatusCode};
use sha1::{Digest, Sha1};
use sha2::Sha256;
use tokio::time::timeout;

use crate::answer::{self, with};
use crate::api::{self, Wanted, broken, concluded, is_left_behind, is_name, number, text};
use crate::app::{App, Phase, Taken, new_id};
use crate::body::{Coding, Incoming};
use crate::session::{New, Poured, Session};

/// Longest wait for the verdict before a client is told to ask again: less than proxies wait for an answer.
pub(crate) const VERDICT_HOLD: Duration = Duration::from_secs(10);
/// Longest part that comes with a checksum, bytes; it is kept in memory until it is verified.
const CHECKED_BYTES_MAX: usize = 32 << 20;

const VERSION: &str = "1.0.0";
const EXTENSIONS: &str =
    "creation,creation-with-upload,creation-defer-length,expiration,termination,checksum";
const OFFSET_STREAM: &str = "application/offset+octet-stream";

const TUS_RESUMABLE: HeaderName = HeaderName::from_static("tus-resumable");
const TUS_VERSION: HeaderName = HeaderName::from_static("tus-version");
const TUS_EXTENSION: HeaderName = HeaderName::from_static("tus-extension");
const TUS_CHECKSUM_ALGORITHM: HeaderName = HeaderName::from_static("tus-checksum-algorithm");
const UPLOAD_OFFSET: HeaderName = HeaderName::from_static("upload-offset");
const UPLOAD_LENGTH: HeaderName = HeaderName::from_static("upload-length");
const UPLOAD_DEFER_LENGTH: HeaderName = HeaderName::from_static("upload-defer-length");
const UPLOAD_METADATA: HeaderName = HeaderName::from_static("upload-metadata");
const UPLOAD_EXPIRES: HeaderName = HeaderName::from_static("upload-expires");
const UPLOAD_CHECKSUM: HeaderName = HeaderName::from_static("upload-checksum");
const METHOD_OVERRIDE: HeaderName = HeaderName::from_static("x-http-method-override");
const PREFER: HeaderName = HeaderName::from_static("prefer");

pub(crate) fn is_tus(headers: &HeaderMap) -> bool {
    headers.contains_key(TUS_RESUMABLE)
}

/// Answers a request of the protocol.
pub(crate) async fn answer(app: &Arc<App>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let mut stated =
        parts.headers.get(METHOD_OVERRIDE).and_then(|name| Method::from_bytes(name.as_bytes()).ok());
    let method = stated.take().unwrap_or_else(|| parts.method.clone());
    let response = if method == Method::OPTIONS {
        options()
    } else if text(&parts.headers, &TUS_RESUMABLE) != Some(VERSION) {
        let why = format!("only version {VERSION} of tus is spoken");
        with(answer::refused(StatusCode::PRECONDITION_FAILED, why), TUS_VERSION, VERSION)
    } else {
        let wanted = Wanted::of(&parts.uri);
        match method.as_str() {
            "POST" => create(app, parts, wanted, body).await,
            "HEAD" => head(app, wanted).await,
            "PATCH" => patch(app, parts, wanted, body).await,
            "DELETE" => delete(app, wanted).await,
            "GET" => answer::status(&app.phase()),
            other => answer::refused(StatusCode::METHOD_NOT_ALLOWED, format!("tus has no {other}")),
        }
    };
    with(with(response, TUS_RESUMABLE, VERSION), ACCEPT_ENCODING, "zstd")
}

/// Tells what is spoken.
fn options() -> Response {
    let response = with(answer::empty(StatusCode::NO_CONTENT), TUS_VERSION, VERSION);
    with(with(response, TUS_EXTENSION, EXTENSIONS), TUS_CHECKSUM_ALGORITHM, "sha1,sha256")
}

/// Begins an upload, with the first of its bytes if they are there.
async fn create(app: &Arc<App>, parts: Parts, wanted: Wanted, body: Body) -> Response {
    let headers = &parts.headers;
    let deferred = text(headers, &UPLOAD_DEFER_LENGTH) == Some("1");
    let len = number(headers, &UPLOAD_LENGTH);
    if len.is_none() && !deferred {
        let why = "Upload-Length tells the length, or Upload-Defer-Length: 1 that it is told later";
        return answer::refused(StatusCode::BAD_REQUEST, why);
    }
    if len == Some(0) {
        return answer::refused(StatusCode::BAD_REQUEST, "the upload is empty (0 bytes): send an image");
    }
    let name = filename(headers).or(wanted.name);
    let (own, id) = (wanted.id.is_some(), wanted.id.unwrap_or_else(new_id));
    let metadata = headers.get(UPLOAD_METADATA).cloned();
    let new = New { id: id.clone(), len, name: name.clone(), metadata, resumable: true };
    // One that has got nothing yet may be this client's own, whose answer was lost; one with this id is.
    let replaces = |old: &Session| {
        let is_own = old.received() == 0 || own && old.id == id;
        is_left_behind(old) || is_own && !old.is_taken() && !old.is_storing()
    };
    let session = match app.begin(new, replaces).await {
        Ok(session) => session,
        Err(taken) => return answer::taken(&taken, StatusCode::CONFLICT),
    };
    let begun = async {
        let mut seat = session.try_take()?;
        seat.begin().await.ok()
    };
    let response = match begun.await {
        None => return concluded(&session).await,
        // What was sent before under this id is gone on with.
        Some(position) if position > 0 || text(headers, &CONTENT_TYPE) != Some(OFFSET_STREAM) => {
            offset(app, answer::empty(StatusCode::CREATED), &session)
        }
        Some(_) => {
            let response = take(app, &session, &parts, body, 0).await;
            if !response.status().is_success() {
                return response;
            }
            let is_whole = response.status() == StatusCode::OK;
            if is_whole { response } else { offset(app, answer::empty(StatusCode::CREATED), &session) }
        }
    };
    with(response, LOCATION, &Wanted::location(&session.id, len, name.as_deref()))
}

/// Tells how far an upload is.
async fn head(app: &Arc<App>, wanted: Wanted) -> Response {
    let session = match find(app, &wanted).await {
        Ok(session) => session,
        Err(response) => return response,
    };
    match session.concluded() {
        Some(Err(error)) => return answer::telling(answer::empty(answer::status_of(&error))),
        None if session.is_storing() => {
            // A client that comes back learns the end by its own last byte.
        }
        // The connection that still seems to send is not its client's any more.
        None if wanted.id.is_some() => drop(session.take().await),
        _ => {}
    }
    session.touch();
    let mut response = offset(app, answer::empty(StatusCode::OK), &session);
    response = match session.len() {
        Some(len) => with(response, UPLOAD_LENGTH, &len.to_string()),
        None => with(response, UPLOAD_DEFER_LENGTH, "1"),
    };
    if let Some(metadata) = &session.metadata {
        response.headers_mut().insert(UPLOAD_METADATA, metadata.clone());
    }
    response
}

/// Takes bytes at an offset.
async fn patch(app: &Arc<App>, parts: Parts, wanted: Wanted, body: Body) -> Response {
    if text(&parts.headers, &CONTENT_TYPE) != Some(OFFSET_STREAM) {
        let why = format!("the Content-Type of a PATCH is {OFFSET_STREAM}");
        return answer::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, why);
    }
    let Some(at) = number(&parts.headers, &UPLOAD_OFFSET) else {
        return answer::refused(StatusCode::BAD_REQUEST, "Upload-Offset tells where the bytes belong");
    };
    let session = match find(app, &wanted).await {
        Ok(session) => session,
        Err(response) => return response,
    };
    if let Some(len) = number(&parts.headers, &UPLOAD_LENGTH)
        && !session.set_len(len)
    {
        return answer::refused(StatusCode::BAD_REQUEST, "Upload-Length is not the one that was told before");
    }
    take(app, &session, &parts, body, at).await
}

/// Ends an upload.
async fn delete(app: &Arc<App>, wanted: Wanted) -> Response {
    let session = match find(app, &wanted).await {
        Ok(session) => session,
        Err(response) => return response,
    };
    if session.is_storing() || session.concluded().is_some() || wanted.id.is_none() && session.is_taken() {
        return answer::taken(&Taken::Busy(session), StatusCode::CONFLICT);
    }
    app.discard(&session, "its client ended it", false).await;
    answer::empty(StatusCode::NO_CONTENT)
}

/// Takes the bytes of a body at an offset; all in, waits a while for the verdict.
async fn take(app: &Arc<App>, session: &Arc<Session>, parts: &Parts, body: Body, at: u64) -> Response {
    let Some(coding) = api::coding(&parts.headers) else { return api::unknown_coding() };
    if session.is_storing() || session.concluded().is_some() {
        drop(body);
        return match at == session.offset() || matches!(session.concluded(), Some(Err(_))) {
            true => held(app, session, &parts.headers).await,
            false => wrong_offset(session.offset()),
        };
    }
    let mut incoming = match text(&parts.headers, &UPLOAD_CHECKSUM) {
        None => Incoming::new(body, coding),
        Some(_) if coding != Coding::Identity => {
            return answer::refused(StatusCode::BAD_REQUEST, "Upload-Checksum goes with uncoded bytes alone");
        }
        Some(checksum) => match checked(body, checksum).await {
            Ok(bytes) => Incoming::Whole(bytes),
            Err(response) => return response,
        },
    };
    let mut seat = session.take().await;
    let Ok(position) = seat.begin().await else {
        drop((seat, incoming));
        return held(app, session, &parts.headers).await;
    };
    if at != position {
        return wrong_offset(position);
    }
    let len = session.len();
    let announced = number(&parts.headers, &CONTENT_LENGTH).filter(|_| coding == Coding::Identity);
    if len.zip(announced).is_some_and(|(len, more)| at.saturating_add(more) > len) {
        return broken(Poured::TooLong);
    }
    session.resumable.store(true, Ordering::Relaxed);
    let poured = seat.pour(&mut incoming, len).await;
    match poured {
        Poured::All | Poured::Broke(_) | Poured::Displaced if session.is_whole() => {
            seat.finish();
            held(app, session, &parts.headers).await
        }
        Poured::All => offset(app, answer::empty(StatusCode::NO_CONTENT), session),
        Poured::Concluded => {
            drop((seat, incoming));
            held(app, session, &parts.headers).await
        }
        Poured::TooLong => {
            drop(seat);
            // What was taken may be anything.
            app.discard(session, "more came than was announced", false).await;
            broken(poured)
        }
        poured => broken(poured),
    }
}

/// Waits for the verdict as long as a proxy does; then the last byte has to be sent again.
async fn held(app: &App, session: &Session, headers: &HeaderMap) -> Response {
    match timeout(VERDICT_HOLD, concluded(session)).await {
        // Clients of tus want to see no content, unless they ask for it (RFC 7240, 4.2).
        Ok(response) if response.status() == StatusCode::OK => {
            let wants = text(headers, &PREFER).is_some_and(|prefer| prefer.contains("return=representation"));
            offset(app, if wants { response } else { answer::empty(StatusCode::NO_CONTENT) }, session)
        }
        Ok(response) => response,
        Err(_) => offset(app, answer::empty(StatusCode::NO_CONTENT), session),
    }
}

/// The upload that a request means; one that another process of ours began is gone on with.
async fn find(app: &Arc<App>, wanted: &Wanted) -> Result<Arc<Session>, Response> {
    let is_meant = |session: &Session| wanted.id.as_ref().is_none_or(|id| session.id == *id);
    let missing = || answer::refused(StatusCode::NOT_FOUND, "there is no such upload; begin one by POST");
    match app.phase() {
        Phase::Running(session) | Phase::Over(session) if is_meant(&session) => {
            session.settle().await;
            Ok(session)
        }
        Phase::Over(session) => Err(answer::over(&session)),
        Phase::Waiting(_) if wanted.id.is_some() => {
            let new = New {
                id: wanted.id.clone().unwrap_or_default(),
                len: wanted.len,
                name: wanted.name.clone(),
                metadata: None,
                resumable: true,
            };
            match app.resume(new).await {
                Ok(Some(session)) => Ok(session),
                _ => Err(missing()),
            }
        }
        _ => Err(missing()),
    }
}

/// Adds how far it is, and until when it is kept.
fn offset(app: &App, response: Response, session: &Session) -> Response {
    let response = with(response, UPLOAD_OFFSET, &session.offset().to_string());
    // The offset behind the last byte says that the image is durable.
    let response =
        if matches!(session.concluded(), Some(Ok(_))) { answer::telling(response) } else { response };
    let expires = TimeDelta::from_std(app.config.idle_timeout)
        .ok()
        .and_then(|idle| Utc::now().checked_add_signed(idle));
    match expires {
        Some(expires) => {
            with(response, UPLOAD_EXPIRES, &expires.format("%a, %d %b %Y %H:%M:%S GMT").to_string())
        }
        None => response,
    }
}

fn wrong_offset(wanted: u64) -> Response {
    let why = format!("Upload-Offset is not {wanted}, which is the next byte to come");
    with(answer::refused(StatusCode::CONFLICT, why), UPLOAD_OFFSET, &wanted.to_string())
}

/// `filename` of `Upload-Metadata`.
fn filename(headers: &HeaderMap) -> Option<String> {
    let pairs = text(headers, &UPLOAD_METADATA)?.split(',').filter_map(|pair| pair.trim().split_once(' '));
    let (_, value) = pairs.into_iter().find(|(key, _)| *key == "filename")?;
    let name = String::from_utf8(STANDARD.decode(value.trim()).ok()?).ok()?;
    Some(name).filter(|name| is_name(name))
}

/// Reads a body into memory, and holds it against its checksum.
async fn checked(body: Body, checksum: &str) -> Result<Bytes, Response> {
    let unknown =
        || answer::refused(StatusCode::BAD_REQUEST, "Upload-Checksum is `sha1 BASE64` or `sha256 BASE64`");
    let (algorithm, expected) = checksum.split_once(' ').ok_or_else(unknown)?;
    let expected = STANDARD.decode(expected.trim()).map_err(|_| unknown())?;
    let is_sha1 = match algorithm {
        "sha1" => true,
        "sha256" => false,
        _ => return Err(unknown()),
    };
    let bytes = axum::body::to_bytes(body, CHECKED_BYTES_MAX).await.map_err(|error| {
        let why =
            format!("a part with a checksum has at most {CHECKED_BYTES_MAX} bytes, and comes whole: {error}");
        answer::refused(StatusCode::PAYLOAD_TOO_LARGE, why)
    })?;
    let summed = bytes.clone();
    let found = tokio::task::spawn_blocking(move || match is_sha1 {
        true => Sha1::digest(&summed).to_vec(),
        false => Sha256::digest(&summed).to_vec(),
    });
    match found.await {
        Ok(found) if found == expected => Ok(bytes),
        // The protocol's own status.
        _ => Err(answer::refused(
            StatusCode::from_u16(460).unwrap_or(StatusCode::BAD_REQUEST),
            "the part does not have its checksum; send it again",
        )),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn the_name_is_found_in_the_metadata() {
        let mut headers = HeaderMap::new();
        for (value, name) in [
            ("filename ZGlzay5pbWc=", Some("disk.img")),
            ("is_confidential,filetype YQ==, filename ZGlzay5pbWc=", Some("disk.img")),
            ("filename", None),
            ("filename !", None),
            ("name ZGlzay5pbWc=", None),
        ] {
            headers.insert(UPLOAD_METADATA, HeaderValue::from_static(value));
            assert_eq!(filename(&headers).as_deref(), name, "{value}");
        }
    }
}
