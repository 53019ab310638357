//! What the store refuses, and what fails.

use std::path::PathBuf;
use std::sync::Arc;

use super::{Expect, Key};
use crate::status::{Cause, Reason, Status};

/// A refusal or a failure of the store. A failure of a transaction is told to all whose writes were in it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("not the name of an object: {0}")]
    Key(String),
    #[error("{key:?} is not as expected ({expected:?}): it is {}", state(*current))]
    Conflict { key: Key, expected: Expect, current: Option<u64> },
    #[error("writes that belong together have {0:?} twice")]
    Twice(Key),
    #[error("{bytes} bytes are too many for a write: {limit} is the most")]
    TooLarge { bytes: usize, limit: usize },
    #[error("too old resource version: {revision} ({oldest})")]
    TooOld { revision: u64, oldest: u64 },
    #[error("Too large resource version: {revision}, current: {newest}")]
    TooNew { revision: u64, newest: u64 },
    #[error("{0} watches are the most")]
    TooManyWatches(usize),
    #[error("{} is in use by another process: end it, or take another folder", .0.display())]
    InUse(PathBuf),
    #[error("the store has format {found}, and this program knows {known}: use a newer one")]
    Format { found: u64, known: u64 },
    #[error(
        "the disk is full: {free} bytes are free, and a write wants {wanted}; make room, and write again"
    )]
    Full { free: u64, wanted: u64 },
    #[error("the store is damaged: {0}")]
    Damaged(String),
    #[error("the store failed")]
    Storage(#[source] Arc<redb::Error>),
    #[error("{context}")]
    Io { context: String, source: Arc<std::io::Error> },
    #[error("the store is closed")]
    Closed,
}

fn state(current: Option<u64>) -> String {
    current.map_or_else(|| "not there".to_owned(), |revision| format!("at revision {revision}"))
}

impl Error {
    pub(super) fn io(context: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let context = context.into();
        move |source| Self::Io { context, source: Arc::new(source) }
    }

    pub(super) fn storage(error: impl Into<redb::Error>) -> Self {
        Self::Storage(Arc::new(error.into()))
    }

    /// Whether the database was given up since, for one that is opened anew.
    pub(super) fn is_given_up(&self) -> bool {
        let Self::Storage(error) = self else { return false };
        matches!(**error, redb::Error::PreviousIo | redb::Error::DatabaseClosed)
    }
}

macro_rules! storage {
    ($($error:ty),*) => {$(
        impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self::storage(error)
            }
        }
    )*};
}

storage!(
    redb::StorageError,
    redb::TableError,
    redb::TransactionError,
    redb::CommitError,
    redb::DatabaseError
);

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match &error {
            Error::Conflict { key, expected, current } => conflict(key, *expected, *current),
            Error::Key(_) | Error::Twice(_) => Self::bad_request(text),
            Error::TooLarge { .. } => Self::new(Reason::RequestEntityTooLarge, text),
            Error::TooOld { .. } => Self::new(Reason::Expired, text),
            Error::TooNew { .. } => too_new(&text),
            Error::TooManyWatches(_) => Self::new(Reason::TooManyRequests, text),
            Error::Full { .. } | Error::Closed => Self::new(Reason::ServiceUnavailable, text),
            Error::InUse(_)
            | Error::Format { .. }
            | Error::Damaged(_)
            | Error::Storage(_)
            | Error::Io { .. } => Self::internal("the store failed", &error),
        }
    }
}

/// Clients ask again after a second, by the cause.
fn too_new(text: &str) -> Status {
    let mut status = Status::new(Reason::Timeout, format!("Timeout: {text}"));
    status.details.retry_after_seconds = Some(1);
    status.details.causes = vec![Cause {
        reason: "ResourceVersionTooLarge".to_owned(),
        message: "Too large resource version".to_owned(),
        field: String::new(),
    }];
    status
}

/// As Kubernetes tells it, with the resource as `plural.group`.
fn conflict(key: &Key, expected: Expect, current: Option<u64>) -> Status {
    let (group, plural) = key.resource().rsplit_once('/').unwrap_or(("", key.resource()));
    let name = key.name();
    let resource = if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") };
    let mut status = match (expected, current) {
        (Expect::Absent, Some(_)) => {
            Status::new(Reason::AlreadyExists, format!("{resource} \"{name}\" already exists"))
        }
        (_, None) => Status::new(Reason::NotFound, format!("{resource} \"{name}\" not found")),
        _ => Status::new(
            Reason::Conflict,
            format!(
                "Operation cannot be fulfilled on {resource} \"{name}\": the object has been modified; \
                 please apply your changes to the latest version and try again"
            ),
        ),
    };
    status.details.name = name.to_owned();
    status.details.group = group.to_owned();
    status.details.kind = plural.to_owned();
    status
}
