//! Which request is which, and the plain upload: one PUT or POST with all of the image.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::{Request, State};
use axum::response::Response;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE};
use http::{HeaderMap, HeaderName, Method, StatusCode, Uri};

use crate::app::{App, new_id};
use crate::body::{Coding, Incoming};
use crate::session::{New, Poured, Session};
use crate::{answer, ranged, tus};

/// Where the service is.
const PATH: &str = "/upload";
/// Says how a clone of a block device is coded.
const CONTENT_TYPE_CDI: HeaderName = HeaderName::from_static("x-cdi-content-type");
/// Longest id of an upload that a client may choose, characters.
const ID_CHARS_MAX: usize = 64;
/// Longest name of an image that is passed on, bytes.
const NAME_BYTES_MAX: usize = 1024;

/// Answers a request.
pub(crate) async fn answer(State(app): State<Arc<App>>, request: Request) -> Response {
    let response = answer_of(&app, request).await;
    if answer::tells(&response) {
        app.told.notify_one();
    }
    response
}

async fn answer_of(app: &Arc<App>, request: Request) -> Response {
    if request.uri().path() != PATH {
        return answer::refused(StatusCode::NOT_FOUND, format!("there is only {PATH} here"));
    }
    let method = request.method();
    if tus::is_tus(request.headers()) || method == Method::OPTIONS {
        return tus::answer(app, request).await;
    }
    match *method {
        Method::GET => answer::status(&app.phase()),
        Method::PUT | Method::POST if request.headers().contains_key(CONTENT_RANGE) => {
            ranged::answer(app, request).await
        }
        Method::PUT | Method::POST => whole(app, request).await,
        _ => answer::refused(StatusCode::NOT_FOUND, format!("{PATH} answers GET, PUT, POST and tus")),
    }
}

/// Takes all of an image.
async fn whole(app: &Arc<App>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let wanted = Wanted::of(&parts.uri);
    let len = number(&parts.headers, &CONTENT_LENGTH);
    if len == Some(0) {
        return answer::refused(StatusCode::BAD_REQUEST, "the upload is empty (0 bytes): send an image");
    }
    let Some(coding) = coding(&parts.headers) else { return unknown_coding() };
    let len = len.filter(|_| coding == Coding::Identity);
    let new = New { id: new_id(), len, name: wanted.name, metadata: None, resumable: false };
    let session = match app.begin(new, is_left_behind).await {
        Ok(session) => session,
        Err(taken) => return answer::taken(&taken, StatusCode::SERVICE_UNAVAILABLE),
    };
    let Some(mut seat) = session.try_take() else {
        return answer::refused(StatusCode::CONFLICT, "another request goes on with this upload");
    };
    let mut incoming = Incoming::new(body, coding);
    let poured = match seat.begin().await {
        Ok(_) => seat.pour(&mut incoming, len).await,
        Err(_) => Poured::Concluded,
    };
    match poured {
        Poured::All | Poured::Broke(_) | Poured::Displaced
            if session.is_whole() || matches!(poured, Poured::All) =>
        {
            seat.finish();
            concluded(&session).await
        }
        Poured::Concluded => {
            drop((seat, incoming));
            concluded(&session).await
        }
        poured => {
            drop(seat);
            // Only whoever can tell where it broke off can go on.
            if coding != Coding::Identity || len.is_none() {
                app.discard(&session, "it broke off", false).await;
            }
            broken(poured)
        }
    }
}

/// Whether an upload was begun by a plain request that is gone.
pub(crate) fn is_left_behind(session: &Session) -> bool {
    !session.resumable.load(Ordering::Relaxed) && !session.is_taken() && !session.is_storing()
}

/// Waits for the verdict, and tells it.
pub(crate) async fn concluded(session: &Session) -> Response {
    answer::verdict(&session.verdict().await)
}

/// Answers a request whose body did not come whole; often nobody is there to read it.
pub(crate) fn broken(poured: Poured) -> Response {
    match poured {
        Poured::Broke(why) => answer::refused(StatusCode::BAD_REQUEST, format!("the body broke off: {why}")),
        Poured::TooLong => {
            answer::refused(StatusCode::PAYLOAD_TOO_LARGE, "the body is longer than was announced")
        }
        _ => answer::refused(StatusCode::CONFLICT, "another request goes on with this upload"),
    }
}

pub(crate) fn unknown_coding() -> Response {
    answer::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, "the only Content-Encoding that is known is zstd")
}

/// How a body is coded; `None` if that is unknown.
pub(crate) fn coding(headers: &HeaderMap) -> Option<Coding> {
    if text(headers, &CONTENT_TYPE_CDI) == Some("blockdevice-clone") {
        return Some(Coding::Snappy);
    }
    match headers.get(CONTENT_ENCODING).map(|value| value.to_str().unwrap_or("?")) {
        None | Some("" | "identity") => Some(Coding::Identity),
        Some(name) if name.eq_ignore_ascii_case("zstd") => Some(Coding::Zstd),
        Some(_) => None,
    }
}

pub(crate) fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

pub(crate) fn number(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    text(headers, name)?.parse().ok()
}

/// What the address of an upload says of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) id: Option<String>,
    pub(crate) len: Option<u64>,
    pub(crate) name: Option<String>,
}

impl Wanted {
    pub(crate) fn of(uri: &Uri) -> Self {
        let mut wanted = Self::default();
        for (key, value) in form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()) {
            match &*key {
                "upload" => wanted.id = Some(value.into_owned()).filter(|id| is_id(id)),
                "length" => wanted.len = value.parse().ok(),
                "filename" => wanted.name = Some(value.into_owned()).filter(|name| is_name(name)),
                _ => {}
            }
        }
        wanted
    }

    /// The address of an upload, relative to the one that was asked: only the query says which it is, for a proxy may let
    /// one exact path through, under another name than ours.
    pub(crate) fn location(id: &str, len: Option<u64>, name: Option<&str>) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("upload", id);
        if let Some(len) = len {
            query.append_pair("length", &len.to_string());
        }
        if let Some(name) = name {
            query.append_pair("filename", name);
        }
        format!("?{}", query.finish())
    }
}

/// Whether a client's own name of an upload can be taken.
fn is_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= ID_CHARS_MAX && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= NAME_BYTES_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_an_upload_says_all_that_another_process_has_to_know() {
        let location = Wanted::location("a-1", Some(7), Some("Имя & Co.img"));
        let uri: Uri = format!("/upload{location}").parse().unwrap();
        let wanted = Wanted { id: Some("a-1".into()), len: Some(7), name: Some("Имя & Co.img".into()) };
        assert_eq!(Wanted::of(&uri), wanted);
        for bad in ["/upload", "/upload?upload=", "/upload?upload=a/b", "/upload?length=-1&upload=%20"] {
            assert_eq!(Wanted::of(&bad.parse().unwrap()), Wanted::default(), "{bad}");
        }
    }
}
