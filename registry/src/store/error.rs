//! What can go wrong with a store, and with what is asked of it.

use std::io::{self, ErrorKind};
use std::path::Path;

use crate::digest::Digest;
use crate::names::Tag;
use crate::storage::quota::Exceeded;
use crate::storage::space::NoRoom;

/// Result of a store.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// What a failure means to the one who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// There is no room: the disk, the filesystem's own quota, or the bucket is full.
    Full,
    /// A quota of ours is used up; [`Error::exceeded`] tells which.
    Exceeded,
    /// What keeps the bytes gives no answer, or asks to be left alone for a while; the same request may succeed later.
    Unavailable,
    /// Something that is for the operator to look at.
    Other,
}

/// A failure of what keeps the bytes, with what was being done to which path or object.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub(crate) struct Error {
    kind: Kind,
    context: String,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl Error {
    /// Makes an error of an I/O error, whose kind tells ours.
    pub(crate) fn new(context: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Kind::Full,
            ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
                Kind::Unavailable
            }
            _ => Kind::Other,
        };
        Self::of(kind, context, source)
    }

    pub(crate) fn of(
        kind: Kind,
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, context: context.into(), source: source.into() }
    }

    pub(crate) fn other(context: &str) -> Self {
        Self::new(context, ErrorKind::Other.into())
    }

    /// Returns what makes an error of an I/O error at `path`; `what` ends before the path.
    pub(crate) fn at(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::new(format!("{what} {}", path.display()), source)
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The quota that is used up, if that is what went wrong.
    pub(crate) fn exceeded(&self) -> Option<&Exceeded> {
        self.source.downcast_ref()
    }

    /// How much room there is, if that is known, and less than was asked for.
    pub(crate) fn no_room(&self) -> Option<&NoRoom> {
        self.source.downcast_ref()
    }

    /// Whether the disk, the filesystem's quota, or the bucket is full.
    pub(crate) fn is_full(&self) -> bool {
        self.kind == Kind::Full
    }
}

/// What can go wrong with a session besides the store.
#[derive(Debug)]
pub(crate) enum UploadError {
    /// Another request works on the session.
    Busy,
    /// The content has another digest than was said.
    Digest {
        actual: Digest,
    },
    Store(Error),
}

impl From<Error> for UploadError {
    fn from(error: Error) -> Self {
        Self::Store(error)
    }
}

/// What can go wrong with a change to tags and manifests besides the store.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChangeError {
    /// A tag would change, or go, that never does.
    #[error("the tag {tag} is immutable and names {names}")]
    Immutable {
        tag: Tag,
        /// What it names.
        names: Digest,
    },
    /// The repository lacks what a manifest refers to.
    #[error("{} blobs or manifests are not there", .0.len())]
    Missing(Vec<Digest>),
    #[error(transparent)]
    Store(#[from] Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_go_away_is_told_from_what_may_not() {
        for (source, kind) in [
            (ErrorKind::StorageFull, Kind::Full),
            (ErrorKind::QuotaExceeded, Kind::Full),
            (ErrorKind::TimedOut, Kind::Unavailable),
            (ErrorKind::PermissionDenied, Kind::Other),
        ] {
            assert_eq!(Error::new("x", source.into()).kind(), kind);
        }
    }
}
