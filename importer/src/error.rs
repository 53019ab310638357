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
    /// The registry has no room for the image; the innermost cause says how much there is.
    Full,
    /// The target cannot take the disk.
    Target,
    /// The disk is larger than it may be.
    TooLarge,
    /// The caller asked to stop.
    Cancelled,
}

impl ErrorKind {
    /// Whether what an import had come to is of no use to the next one.
    pub(crate) fn spoils(self) -> bool {
        matches!(self, Self::Changed | Self::Checksum | Self::Image | Self::Invalid)
    }
}

/// An error with its place; `Display` does not repeat the source, the logger prints the chain.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    cause: Option<Cause>,
    /// Whoever made it knows that the same may succeed later.
    passing: bool,
}

impl Error {
    /// Makes an error of `kind`; `context` says what was wrong, with the value, where, and what to do about it.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), cause: None, passing: false }
    }

    /// The same with the error that caused it.
    pub fn with(kind: ErrorKind, context: impl Into<String>, cause: impl Into<Cause>) -> Self {
        Self { kind, context: context.into(), cause: Some(cause.into()), passing: false }
    }

    /// The error of a registry that is written to.
    pub(crate) fn storing(context: impl Into<String>, error: dvcr_image::Error) -> Self {
        let kind = match error.kind() {
            dvcr_image::ErrorKind::Full => ErrorKind::Full,
            _ => ErrorKind::Registry,
        };
        Self::with(kind, context, error)
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

    /// The same, known to be of a kind that may be over later.
    pub(crate) fn passing(self) -> Self {
        Self { passing: true, ..self }
    }

    /// Whether the same may succeed later: somebody could not be reached, or said that it is not available now. A certificate that
    /// was refused is refused again.
    pub fn is_passing(&self) -> bool {
        std::iter::successors(Some(self as &(dyn std::error::Error + 'static)), |error| below(*error)).any(
            |error| {
                let ours = error.downcast_ref::<Self>();
                let registry = error.downcast_ref::<dvcr_image::Error>();
                let http = error.downcast_ref::<reqwest::Error>();
                ours.is_some_and(|e| e.passing)
                    || registry.is_some_and(|e| e.kind() == dvcr_image::ErrorKind::Unavailable)
                    || http.is_some_and(|e| {
                        (e.is_connect() || e.is_timeout() || e.is_body() || e.is_request())
                            && !dvcr_image::is_certificate_refused(e)
                    })
            },
        )
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
    use dvcr_image::ErrorKind as Registry;

    use super::*;

    #[test]
    fn what_may_pass_is_told_from_what_may_not_however_deep_it_lies() {
        let registry = |kind| Error::with(ErrorKind::Registry, "x", dvcr_image::Error::new(kind, "y"));
        let read = |cause: Error| {
            let io = std::io::Error::from(cause);
            Error::with(ErrorKind::Image, "reading", dvcr_converter::Error::io("decoding", io))
        };
        let source = || Error::new(ErrorKind::Source, "x");
        let unavailable = dvcr_image::Error::new(Registry::Unavailable, "y");
        let held = Error::with(ErrorKind::Registry, "x", std::io::Error::other(unavailable));
        for (error, passes) in [
            (registry(Registry::Unavailable), true),
            (registry(Registry::Untrusted), false),
            (registry(Registry::Full), false),
            (registry(Registry::Denied), false),
            (registry(Registry::Unauthorized), false),
            (registry(Registry::NotFound), false),
            (registry(Registry::Mismatch), false),
            (source(), false),
            (source().passing(), true),
            (read(source()), false),
            (read(source().passing()), true),
            (read(registry(Registry::Unavailable)), true),
            (read(registry(Registry::Untrusted)), false),
            (held, true),
        ] {
            assert_eq!(error.is_passing(), passes, "{error:?}");
        }
    }
}
