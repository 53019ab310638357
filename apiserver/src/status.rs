//! The errors of the API: `Status` objects with a reason, as Kubernetes' clients know them.
//!
//! | reason | code | when |
//! | --- | --- | --- |
//! | BadRequest | 400 | the request cannot be understood |
//! | Unauthorized | 401 | nobody knows who asks |
//! | Forbidden | 403 | whoever asks may not, or a quota or a rule is in the way |
//! | NotFound | 404 | no such object, or no such resource |
//! | MethodNotAllowed | 405 | no such verb for this resource |
//! | NotAcceptable | 406 | none of the media types that are wanted |
//! | AlreadyExists | 409 | a create of what is there |
//! | Conflict | 409 | the object has changed since it was read, or another manager owns the field |
//! | Gone, Expired | 410 | a resource version, or a place in a list, that is not kept any more |
//! | RequestEntityTooLarge | 413 | a body beyond the limit |
//! | UnsupportedMediaType | 415 | a body in none of the media types that are read |
//! | Invalid | 422 | an object against its schema or its rules |
//! | TooManyRequests | 429 | try again later |
//! | InternalError | 500 | a failure of ours |
//! | ServiceUnavailable | 503 | not yet, or not any more |
//! | Timeout | 504 | it took too long |

use std::fmt;

use serde::Serialize;

/// Result of this crate.
pub type Result<T, E = Status> = std::result::Result<T, E>;

/// `reason` of a `Status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Reason {
    BadRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    NotAcceptable,
    AlreadyExists,
    Conflict,
    Gone,
    Expired,
    RequestEntityTooLarge,
    UnsupportedMediaType,
    Invalid,
    TooManyRequests,
    InternalError,
    ServiceUnavailable,
    Timeout,
}

impl Reason {
    /// The HTTP status code.
    pub fn code(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::NotAcceptable => 406,
            Self::AlreadyExists | Self::Conflict => 409,
            Self::Gone | Self::Expired => 410,
            Self::RequestEntityTooLarge => 413,
            Self::UnsupportedMediaType => 415,
            Self::Invalid => 422,
            Self::TooManyRequests => 429,
            Self::InternalError => 500,
            Self::ServiceUnavailable => 503,
            Self::Timeout => 504,
        }
    }
}

/// One cause in `details.causes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cause {
    /// Such as `FieldValueInvalid`.
    pub reason: String,
    pub message: String,
    /// Path of the field, such as `spec.containers[0].name`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
}

/// `details` of a `Status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Details {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// The resource, by its plural name, or the kind in an error of validation.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u32>,
}

/// A failure, as it is told to a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub reason: Reason,
    pub message: String,
    pub details: Box<Details>,
}

impl Status {
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), details: Box::default() }
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(Reason::BadRequest, message)
    }

    /// A failure of ours. The cause goes to the log, not to the client.
    pub fn internal(context: &str, cause: &dyn std::error::Error) -> Self {
        let causes = std::iter::successors(Some(cause), |error| error.source()).map(ToString::to_string);
        tracing::error!(cause = causes.collect::<Vec<_>>().join(": "), "{context}");
        Self::new(Reason::InternalError, format!("Internal error occurred: {context}"))
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Status {}
