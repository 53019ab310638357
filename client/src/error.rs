//! The crate's error: a stable kind, what and where, and the source.

use std::fmt;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// What went wrong, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A reference, digest, or file that the user gave is malformed.
    Invalid,
    /// The registry has no such repository, manifest or blob, or the image holds no disk.
    NotFound,
    /// The registry wants credentials, or other ones.
    Unauthorized,
    /// The registry knows the caller and refuses.
    Denied,
    /// The registry cannot be reached or answers that it cannot serve now; trying later may help.
    Unavailable,
    /// The registry has no room left on its disk; somebody has to make some.
    Full,
    /// The registry's TLS certificate is not accepted.
    Untrusted,
    /// The caller's own [`crate::Gate`] does not let a request go where it would.
    Forbidden,
    /// The registry answered something that the distribution specification does not allow.
    Protocol,
    /// Content does not have the digest or the length it was announced with.
    Mismatch,
    /// A valid image that uses something this crate does not do.
    Unsupported,
    /// A layer is damaged: bad tar header, truncated entry, broken compression.
    Corrupt,
}

/// An error with its place; `Display` does not repeat the source, the logger prints the chain.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Source>,
}

impl Error {
    /// Makes an error of `kind`; `context` says what was wrong, with the value, where, and what to do about it.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// The same with the error that caused it.
    pub fn with(kind: ErrorKind, context: impl Into<String>, source: impl Into<Source>) -> Self {
        Self { kind, context: context.into(), source: Some(source.into()) }
    }

    /// The stable kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|e| &**e as _)
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        std::io::Error::other(error)
    }
}
