//! The crate's error: a stable kind, what and where, and the source.

use std::fmt;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The bytes contradict their format: bad magic, tables outside the file, truncated data.
    Corrupt,
    /// A valid image that uses something this crate does not do.
    Unsupported,
    /// The image names another file (backing file, external data file); such images are refused.
    ForeignFile,
    /// A bound of [`crate::limits::Limits`] was crossed.
    Limit,
    /// The target cannot take the disk (too small, wrong type).
    Target,
    /// Reading or writing failed.
    Io,
    /// The caller asked to stop.
    Cancelled,
}

/// An error with its place; `Display` does not repeat the source, the logger prints the chain.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<std::io::Error>,
}

impl Error {
    /// Makes an error of `kind`; `context` says what was wrong, with the value, where, and what to do about it.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// Makes an error of `kind` with its cause; `context` does not repeat the cause.
    pub fn with(kind: ErrorKind, context: impl Into<String>, source: std::io::Error) -> Self {
        Self { kind, context: context.into(), source: Some(source) }
    }

    /// Wraps an I/O error; `context` says what was being done, and where.
    ///
    /// An error of this crate that travelled through [`std::io::Read`] keeps its kind.
    pub fn io(context: impl Into<String>, source: std::io::Error) -> Self {
        let carried = source.get_ref().and_then(|e| e.downcast_ref::<Error>()).map(Error::kind);
        Self { kind: carried.unwrap_or(ErrorKind::Io), context: context.into(), source: Some(source) }
    }

    /// The stable kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

/// Shorthands for the kinds of error that reading an image ends in most.
pub(crate) fn corrupt(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, context)
}

pub(crate) fn unsupported(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, context)
}

pub(crate) fn limit(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Limit, context)
}

pub(crate) fn foreign(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::ForeignFile, context)
}

/// Lets an error pass through [`std::io::Read`]; [`Error::io`] finds its kind again.
impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        std::io::Error::other(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|e| e as _)
    }
}
