//! The crate's error: a stable kind, what and where, and the source.

use std::fmt;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// What went wrong, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request contradicts itself or is malformed.
    Invalid,
    /// The source cannot be opened or read, or is not what it claims to be.
    Source,
    /// The source is another version than the one that was begun; it has to be begun again.
    Changed,
    /// The source policy does not allow the source, or where it leads to.
    Policy,
    /// The bytes received do not have the checksum that was demanded.
    Checksum,
    /// The image has no signature of the key that was demanded.
    Untrusted,
    /// The source is not a disk image that can be taken.
    Image,
    /// The registry refused or failed.
    Registry,
    /// The target cannot take the disk.
    Target,
    /// The disk is larger than it may be.
    TooLarge,
    /// The caller asked to stop.
    Cancelled,
}

/// An error with its place; `Display` does not repeat the source, the logger prints the chain.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    cause: Option<Cause>,
}

impl Error {
    /// Makes an error of `kind`; `context` says what was wrong, with the value, where, and what to do about it.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), cause: None }
    }

    /// The same with the error that caused it.
    pub fn with(kind: ErrorKind, context: impl Into<String>, cause: impl Into<Cause>) -> Self {
        Self { kind, context: context.into(), cause: Some(cause.into()) }
    }

    /// Tells why [`dvcr_converter::progress::Progress::check`] ended the work.
    pub(crate) fn stopped(why: dvcr_converter::Error) -> Self {
        let kind = match why.kind() {
            dvcr_converter::ErrorKind::Cancelled => ErrorKind::Cancelled,
            _ => ErrorKind::Image,
        };
        Self::new(kind, why.to_string())
    }

    /// The stable kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether the same may succeed later: somebody could not be reached, or was not available.
    pub fn is_passing(&self) -> bool {
        let first = self.cause.as_deref().map(|cause| cause as &(dyn std::error::Error + 'static));
        std::iter::successors(first, |cause| below(*cause)).any(|cause| {
            let registry = cause.downcast_ref::<dvcr_image::Error>();
            let http = cause.downcast_ref::<reqwest::Error>();
            registry.is_some_and(|e| e.kind() == dvcr_image::ErrorKind::Unavailable)
                || http.is_some_and(|e| e.is_connect() || e.is_timeout() || e.is_body() || e.is_request())
        })
    }
}

/// What caused an error. An I/O error that carries another one names that one's cause as its own.
fn below<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a (dyn std::error::Error + 'static)> {
    match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
        Some(carried) => Some(carried),
        None => error.source(),
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_ref().map(|cause| &**cause as _)
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        std::io::Error::other(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass_is_found_however_it_was_carried() {
        let away = |kind| dvcr_image::Error::new(kind, "the registry is away");
        let unavailable = dvcr_image::ErrorKind::Unavailable;
        let carried = dvcr_converter::Error::io("reading", std::io::Error::other(away(unavailable)));
        assert!(Error::with(ErrorKind::Registry, "reading", away(unavailable)).is_passing());
        assert!(Error::with(ErrorKind::Registry, "making a disk", carried).is_passing());
        let denied = std::io::Error::other(away(dvcr_image::ErrorKind::Denied));
        assert!(!Error::with(ErrorKind::Registry, "making a disk", denied).is_passing());
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        assert!(!Error::with(ErrorKind::Registry, "making a disk", full).is_passing());
    }
}
