//! What an answer of the store means, and what to do about it.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{BoxError, ProvideErrorMetadata, SdkError};

use super::wire::{self, Validity};

/// Result of this room.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Longest time that a store may ask us to wait before we come again, seconds.
const RETRY_AFTER_S_MAX: u64 = 20;
/// Longest text of the store that is shown, characters.
const MESSAGE_CHARS_MAX: usize = 300;

/// What went wrong with one operation on a bucket.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {place}: {}", kind.advice())]
pub(crate) struct Error {
    kind: Kind,
    operation: &'static str,
    place: Place,
    uncertain: bool,
    source: Option<BoxError>,
}

/// What is to be done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// There is no such object, upload or part.
    NotFound,
    /// The object is not what the condition says.
    Precondition,
    /// The request came after its time.
    Expired,
    /// The store does not let us.
    Denied,
    /// The store does not answer, or asks us to come back.
    Unavailable,
    /// What trying again does not help against.
    Other,
}

impl Error {
    pub(super) fn new(
        kind: Kind,
        operation: &'static str,
        place: Place,
        source: impl Into<Option<BoxError>>,
    ) -> Self {
        Self { kind, operation, place, uncertain: false, source: source.into() }
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether the request, or one of those before it, may have done its work although its answer was lost.
    ///
    /// With [`Kind::NotFound`], the end of an upload or its removal has then most likely happened.
    pub(crate) fn is_uncertain(&self) -> bool {
        self.uncertain
    }

    pub(crate) fn is_not_found(&self) -> bool {
        self.kind == Kind::NotFound
    }
}

impl Kind {
    fn advice(self) -> &'static str {
        match self {
            Self::NotFound => "it is not there",
            Self::Precondition => "somebody else has written it; read it again",
            Self::Expired => "the request came after its time; decide again, and send a new one",
            Self::Denied => "the store refuses; check the credentials and what they allow",
            Self::Unavailable => "the store does not answer as it should; try again later",
            Self::Other => "the store cannot do it; check the settings of the bucket",
        }
    }
}

/// A bucket, and what in it is meant.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub bucket: String,
    /// A key, or the beginning of some; empty is the bucket itself.
    pub key: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bucket, key } = self;
        if key.is_empty() {
            write!(f, "bucket {bucket:?}")
        } else {
            write!(f, "{key:?} in bucket {bucket:?}")
        }
    }
}

/// Why one attempt failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub kind: Kind,
    /// Whether another attempt may go better.
    pub retry: bool,
    /// Whether the work may be done all the same.
    pub uncertain: bool,
    /// What the store asks us to wait.
    pub after: Option<Duration>,
    source: BoxError,
}

impl Failure {
    /// An answer that is not what was asked for.
    pub(super) fn wrong(why: impl Into<BoxError>) -> Self {
        Self { kind: Kind::Other, retry: false, uncertain: false, after: None, source: why.into() }
    }

    /// An answer that did not come whole.
    pub(super) fn broken(why: impl Into<BoxError>) -> Self {
        Self { kind: Kind::Unavailable, retry: true, uncertain: true, after: None, source: why.into() }
    }

    /// Reads what an operation gave in place of its answer.
    pub(super) fn of<E>(error: SdkError<E, HttpResponse>, validity: Option<Validity>) -> Self
    where
        E: ProvideErrorMetadata + StdError + Send + Sync + 'static,
    {
        match &error {
            SdkError::ServiceError(refused) => {
                let (response, told) = (refused.raw(), refused.err().meta());
                if response.status().is_success() && told.code().is_none() {
                    return Self::wrong(chain(&error));
                }
                Answer::read(response, told.code(), told.message()).judge(response, validity)
            }
            SdkError::ConstructionFailure(_) => Self::wrong(chain(&error)),
            SdkError::DispatchFailure(failure) if failure.is_user() => Self::wrong(chain(&error)),
            _ if is_of_credentials(&error) => {
                // Whoever gives credentials may be out of reach for a moment, too.
                Self { kind: Kind::Denied, retry: true, uncertain: false, after: None, source: chain(&error) }
            }
            _ => Self::broken(chain(&error)),
        }
    }

    pub(super) fn into_error(self, operation: &'static str, place: Place, uncertain: bool) -> Error {
        Error { kind: self.kind, operation, place, uncertain, source: Some(self.source) }
    }
}

/// An error that the store tells of one key among many; `validity` is that of the request for all of them.
pub(super) fn told(
    code: &str,
    message: &str,
    validity: Option<Validity>,
    operation: &'static str,
    place: Place,
) -> Error {
    let kind = match code {
        "PreconditionFailed" => Kind::Precondition,
        "NoSuchKey" => Kind::NotFound,
        "AccessDenied" if validity.is_some() && is_of_expiry(message) => Kind::Expired,
        "AccessDenied" => Kind::Denied,
        "InternalError" | "SlowDown" | "ServiceUnavailable" => Kind::Unavailable,
        _ => Kind::Other,
    };
    Error::new(kind, operation, place, BoxError::from(format!("{code}: {}", cut(message))))
}

/// What the store says about a request that it refused.
#[derive(Debug, thiserror::Error)]
#[error("{status} {code}: {message}")]
struct Answer {
    status: u16,
    code: String,
    message: String,
}

impl Answer {
    fn read(response: &HttpResponse, code: Option<&str>, message: Option<&str>) -> Self {
        let status = response.status().as_u16();
        let code = code.unwrap_or("without a code").to_owned();
        Self { status, code, message: cut(message.unwrap_or("the store says no more")) }
    }

    fn judge(self, response: &HttpResponse, validity: Option<Validity>) -> Failure {
        let header = |name| response.headers().get(name);
        let expired = || {
            let date = header("date").and_then(wire::date);
            let end = |validity: Validity| validity.end().duration_since(std::time::UNIX_EPOCH).ok();
            let is_over = |validity| matches!((date, end(validity)), (Some(date), Some(end)) if u64::try_from(date).unwrap_or(0) >= end.as_secs());
            // Not all stores say it, but all say what time they think it is.
            validity.is_some_and(|validity| is_of_expiry(&self.message) || is_over(validity))
        };
        let (kind, retry) = match (self.status, self.code.as_str()) {
            (_, "NoSuchBucket") => (Kind::Other, false),
            (404, _) | (400, "InvalidPart") => (Kind::NotFound, false),
            (412, _) => (Kind::Precondition, false),
            // Two wrote at once, and neither was told that it won.
            (_, "ConditionalRequestConflict" | "OperationAborted") => (Kind::Unavailable, true),
            // The answer has just told us the time.
            (_, "RequestTimeTooSkewed") => (Kind::Denied, true),
            (_, "ExpiredToken" | "InvalidAccessKeyId" | "SignatureDoesNotMatch") => (Kind::Denied, false),
            (400 | 403, _) if expired() => (Kind::Expired, false),
            (401 | 403, _) => (Kind::Denied, false),
            (501, _) => (Kind::Other, false),
            (429 | 500.., _) | (_, "RequestTimeout" | "SlowDown" | "Throttling" | "InternalError") => {
                (Kind::Unavailable, true)
            }
            _ => (Kind::Other, false),
        };
        let after = header("retry-after").and_then(|text| text.parse().ok());
        let after = after.map(|seconds: u64| Duration::from_secs(seconds.min(RETRY_AFTER_S_MAX)));
        let uncertain = retry && self.status >= 500;
        Failure { kind, retry, uncertain, after, source: self.into() }
    }
}

/// The texts of an error and its causes, none of which repeats the one before.
fn chain(error: &(dyn StdError + 'static)) -> BoxError {
    let mut text = String::new();
    for cause in causes(error).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text += if text.is_empty() { "" } else { ": " };
            text += &cause;
        }
    }
    text.into()
}

fn is_of_expiry(message: &str) -> bool {
    message.to_ascii_lowercase().contains("has expired")
}

fn is_of_credentials(error: &(dyn StdError + 'static)) -> bool {
    causes(error).any(|error| error.is::<CredentialsError>())
}

/// An error, what caused it, and so on.
fn causes<'e>(error: &'e (dyn StdError + 'static)) -> impl Iterator<Item = &'e (dyn StdError + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let error = next?;
        next = error.source();
        Some(error)
    })
}

fn cut(text: &str) -> String {
    text.chars().take(MESSAGE_CHARS_MAX).collect()
}
