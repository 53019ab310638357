//! Answers: statuses and JSON bodies.

use axum::body::Body;
use axum::response::Response;
use chrono::SecondsFormat;
use dvcr_importer::{Error, ErrorKind};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, RETRY_AFTER};
use http::{HeaderValue, StatusCode};
use serde_json::{Value, json};

use crate::app::{Phase, Taken};
use crate::session::{Session, Verdict, chain};

/// Marks the answers that tell what became of the upload.
#[derive(Clone, Copy)]
struct Told;

/// Seconds after which a client that was turned away may come again.
const RETRY_AFTER_SECONDS: u64 = 10;

pub(crate) fn empty(status: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    with(response, CACHE_CONTROL, "no-store")
}

pub(crate) fn json(status: StatusCode, value: &Value) -> Response {
    let mut response = with(empty(status), CONTENT_TYPE, "application/json");
    *response.body_mut() = Body::from(format!("{value}\n"));
    response
}

/// Tells what was wrong with a request.
pub(crate) fn refused(status: StatusCode, why: impl Into<String>) -> Response {
    json(status, &json!({ "error": why.into() }))
}

/// Adds a header whose value is ours, thus valid.
pub(crate) fn with(mut response: Response, name: HeaderName, value: &str) -> Response {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
    response
}

/// Tells what became of the upload: 200 with the summary, 422 where its content is at fault, 413 where there is no room, else 500.
pub(crate) fn verdict(verdict: &Verdict) -> Response {
    telling(match verdict {
        Ok(summary) => json(StatusCode::OK, &json!(**summary)),
        Err(error) => refused(status_of(error), message(error)),
    })
}

/// Marks an answer that tells what became of the upload.
pub(crate) fn telling(mut response: Response) -> Response {
    response.extensions_mut().insert(Told);
    response
}

/// Whether an answer does so.
pub(crate) fn tells(response: &Response) -> bool {
    response.extensions().get::<Told>().is_some()
}

pub(crate) fn status_of(error: &Error) -> StatusCode {
    match error.kind() {
        ErrorKind::Source | ErrorKind::Changed | ErrorKind::Checksum | ErrorKind::Image => {
            StatusCode::UNPROCESSABLE_ENTITY
        }
        ErrorKind::Full => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorKind::Cancelled => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Invalid
        | ErrorKind::Policy
        | ErrorKind::Registry
        | ErrorKind::Target
        | ErrorKind::TooLarge
        | ErrorKind::Untrusted => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// What the client learns of a failure. How the registry is reached, and what it says but for lack of room, is not its business.
fn message(error: &Error) -> String {
    if error.kind() == ErrorKind::Full {
        let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
        let why = causes.last().map(ToString::to_string).unwrap_or_default();
        return format!("there is no room for the image: {why}");
    }
    match status_of(error) {
        StatusCode::INTERNAL_SERVER_ERROR => {
            "the image could not be stored; the log of the uploader tells why".to_owned()
        }
        StatusCode::SERVICE_UNAVAILABLE => "the uploader was stopped; try again".to_owned(),
        _ => chain(error),
    }
}

/// Turns an upload away, and tells of the one that is in its way.
pub(crate) fn taken(taken: &Taken, status_if_busy: StatusCode) -> Response {
    match taken {
        Taken::Busy(session) => {
            let mut told = of_session(session);
            told["error"] = "another upload is under way; this target takes one at a time".into();
            with(json(status_if_busy, &told), RETRY_AFTER, &RETRY_AFTER_SECONDS.to_string())
        }
        Taken::Over(session) => over(session),
    }
}

/// Tells that there was an upload already.
pub(crate) fn over(session: &Session) -> Response {
    let mut told = of_session(session);
    told["error"] = match session.concluded() {
        Some(Err(error)) => message(&error).into(),
        _ => "this target has its image already".into(),
    };
    telling(json(StatusCode::GONE, &told))
}

/// Tells what goes on.
pub(crate) fn status(phase: &Phase) -> Response {
    match phase {
        Phase::Waiting(_) => json(StatusCode::OK, &json!({ "state": "waiting" })),
        Phase::Running(session) => json(StatusCode::OK, &of_session(session)),
        Phase::Over(session) => over(session),
    }
}

fn of_session(session: &Session) -> Value {
    let state = match session.concluded() {
        Some(Ok(_)) => "done",
        Some(Err(_)) => "failed",
        None if session.is_storing() => "storing",
        None => "uploading",
    };
    json!({
        "state": state,
        "name": session.name,
        "received": session.received(),
        "total": session.len(),
        "since": session.begun.to_rfc3339_opts(SecondsFormat::Secs, true),
    })
}
