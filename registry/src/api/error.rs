//! Error answers: status, code and body by the distribution-spec ("Error Codes").

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde_json::{Value, json};

use crate::digest::DigestError;
use crate::names::ReferenceError;
use crate::storage::quota;
use crate::store::{self, Kind};

/// Seconds after which a client that was turned away may come again.
const RETRY_AFTER_SECONDS: u64 = 2;

/// The codes of the specification, and `UNKNOWN` for failures of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    BlobUnknown,
    BlobUploadInvalid,
    BlobUploadUnknown,
    Denied,
    DigestInvalid,
    ManifestBlobUnknown,
    ManifestInvalid,
    ManifestUnknown,
    NameInvalid,
    NameUnknown,
    PaginationNumberInvalid,
    SizeInvalid,
    TagInvalid,
    TooManyRequests,
    Unauthorized,
    Unsupported,
    Unknown,
}

impl Code {
    fn name(self) -> &'static str {
        match self {
            Self::BlobUnknown => "BLOB_UNKNOWN",
            Self::BlobUploadInvalid => "BLOB_UPLOAD_INVALID",
            Self::BlobUploadUnknown => "BLOB_UPLOAD_UNKNOWN",
            Self::Denied => "DENIED",
            Self::DigestInvalid => "DIGEST_INVALID",
            Self::ManifestBlobUnknown => "MANIFEST_BLOB_UNKNOWN",
            Self::ManifestInvalid => "MANIFEST_INVALID",
            Self::ManifestUnknown => "MANIFEST_UNKNOWN",
            Self::NameInvalid => "NAME_INVALID",
            Self::NameUnknown => "NAME_UNKNOWN",
            Self::PaginationNumberInvalid => "PAGINATION_NUMBER_INVALID",
            Self::SizeInvalid => "SIZE_INVALID",
            Self::TagInvalid => "TAG_INVALID",
            Self::TooManyRequests => "TOOMANYREQUESTS",
            Self::Unauthorized => "UNAUTHORIZED",
            Self::Unsupported => "UNSUPPORTED",
            Self::Unknown => "UNKNOWN",
        }
    }
}

/// An answer other than what was asked for.
#[derive(Debug)]
pub(crate) struct ApiError(Box<Inner>);

#[derive(Debug)]
struct Inner {
    status: StatusCode,
    code: Code,
    message: String,
    detail: Value,
    headers: HeaderMap,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: Code, message: impl Into<String>) -> Self {
        let (message, detail, headers) = (message.into(), Value::Null, HeaderMap::new());
        Self(Box::new(Inner { status, code, message, detail, headers }))
    }

    pub(crate) fn bad_request(code: Code, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub(crate) fn not_found(code: Code, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, message)
    }

    /// Refuses what the client, or nobody, may do.
    pub(crate) fn denied(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, Code::Denied, message)
    }

    /// Turns a request away that may be repeated.
    pub(crate) fn too_many(message: &str) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, Code::TooManyRequests, message)
            .with(RETRY_AFTER, RETRY_AFTER_SECONDS.into())
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.0.status
    }

    pub(crate) fn detail(mut self, detail: Value) -> Self {
        self.0.detail = detail;
        self
    }

    pub(crate) fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers.append(name, value);
        self
    }

    /// Reports a failure of ours: the cause is logged, the client learns only that there was one.
    pub(crate) fn internal(error: &dyn std::error::Error) -> Self {
        tracing::error!(error = %Chain(error), "request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, Code::Unknown, "the registry failed; its log tells why")
    }
}

impl From<store::Error> for ApiError {
    fn from(error: store::Error) -> Self {
        if let Some(exceeded) = error.exceeded() {
            let message = format!("{exceeded}; delete what is not needed, or have the quota raised");
            let quota::Exceeded { prefix, limit, used, .. } = exceeded;
            return Self::denied(message).detail(json!({"prefix": prefix, "limit": limit, "used": used}));
        }
        let kind = error.kind();
        let mut answer = Self::internal(&error);
        match kind {
            Kind::Full => {
                answer.0.status = StatusCode::INSUFFICIENT_STORAGE;
                answer.0.message = match error.no_room() {
                    Some(no_room) => format!("the registry's disk is full: {no_room}; nothing was stored"),
                    None => "the registry's disk is full; nothing was stored".to_owned(),
                };
            }
            Kind::Unavailable => {
                answer.0.status = StatusCode::SERVICE_UNAVAILABLE;
                answer.0.message = "what keeps the registry's content gives no answer; try again".to_owned();
                answer = answer.with(RETRY_AFTER, RETRY_AFTER_SECONDS.into());
            }
            Kind::Exceeded | Kind::Other => {}
        }
        answer
    }
}

impl From<DigestError> for ApiError {
    fn from(error: DigestError) -> Self {
        Self::bad_request(Code::DigestInvalid, error.to_string())
    }
}

impl From<ReferenceError> for ApiError {
    fn from(error: ReferenceError) -> Self {
        match error {
            ReferenceError::Digest(error) => error.into(),
            ReferenceError::Tag(_) => Self::bad_request(Code::TagInvalid, error.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Inner { status, code, message, detail, headers } = *self.0;
        let mut error = json!({"code": code.name(), "message": message});
        if !detail.is_null() {
            error["detail"] = detail;
        }
        let body = json!({"errors": [error]}).to_string();
        let length = body.len();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response.headers_mut().insert(CONTENT_LENGTH, length.into());
        response
    }
}

/// Shows an error with everything below it.
pub(crate) struct Chain<'a>(pub(crate) &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut below = self.0.source();
        while let Some(error) = below {
            write!(f, ": {error}")?;
            below = error.source();
        }
        Ok(())
    }
}
