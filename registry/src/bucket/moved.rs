//! The note that the content goes elsewhere, by which all replicas let nobody change anything.
//!
//! ```text
//!  freeze ──> until t ──> (all views that were read before are over) ──> until t' ... ──> gone to B
//! ```
//!
//! Every view is read with the note; one that has it places and removes nothing. A freeze that is not renewed ends by itself, so a
//! replica that dies while it moves the registry leaves one that works.

use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Bucket, found};
use crate::lock;
use crate::s3::{self, Kind, Put, Validity};

/// Largest note, bytes.
const NOTE_BYTES_MAX: u64 = 4096;
/// How often the server's clock is looked at.
const CLOCK_INTERVAL: Duration = Duration::from_millis(250);

/// The freeze that this replica has said, as long as a request is valid that is to find it.
#[derive(Debug, Default)]
pub(super) struct Frozen(Mutex<Option<Validity>>);

impl Frozen {
    /// Whether it was this replica that said so: it knows best what may still come, such as the end of an upload that goes along.
    pub(super) fn is_ours(&self) -> bool {
        lock(&self.0).is_some()
    }
}

/// The object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Note {
    /// Nobody changes anything before this time of the server, seconds since 1970.
    FrozenUntil(u64),
    GoneTo(String),
}

impl Note {
    pub(super) fn gone_to(self) -> Option<String> {
        match self {
            Self::GoneTo(to) => Some(to),
            Self::FrozenUntil(_) => None,
        }
    }

    /// Tells why nothing changes, if it is so at what is perhaps the time.
    pub(super) fn forbids(&self, earliest: SystemTime) -> Option<String> {
        match self {
            Self::GoneTo(to) => Some(format!("the registry has moved to {to}; serve it with its settings")),
            Self::FrozenUntil(until) if earliest < at(*until) => {
                Some("the registry is being moved; try again in a minute".to_owned())
            }
            Self::FrozenUntil(_) => None,
        }
    }
}

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(UNIX_EPOCH)
}

impl Bucket {
    pub(super) async fn read_moved(&self) -> s3::Result<Option<Note>> {
        let key = self.keys.moved();
        let Some(object) = found(self.client.get(&key, NOTE_BYTES_MAX).await)? else { return Ok(None) };
        let note = serde_json::from_slice(&object.content);
        note.map(Some).map_err(|error| self.client.error(Kind::Other, "understand", &key, error))
    }

    /// Has nobody place or remove a link for so long, by whole seconds; waits until those who did not know are done.
    pub(super) async fn freeze(&self, lasts: Duration) -> s3::Result<()> {
        let from = self.client.server_now().await?.earliest;
        let until = from.checked_add(lasts).and_then(|until| until.duration_since(UNIX_EPOCH).ok());
        let note = Note::FrozenUntil(until.unwrap_or_default().as_secs());
        let last = *lock(&self.frozen.0);
        // One that is renewed must not have ended meanwhile.
        self.put_note(&note, last).await?;
        if last.is_none() {
            let wait = self.options.timing.validity.saturating_add(self.options.timing.settling());
            let placed = self.client.server_now().await?.latest;
            let is_over = |now: SystemTime| now.duration_since(placed).is_ok_and(|over| over >= wait);
            while !is_over(self.client.server_now().await?.earliest) {
                tokio::time::sleep(CLOCK_INTERVAL).await;
            }
        }
        // A second less: the note has whole ones.
        let lasts = lasts.saturating_sub(Duration::from_secs(1));
        *lock(&self.frozen.0) = Some(Validity { from, lasts });
        Ok(())
    }

    /// Notes where the content has gone to while it is frozen, or that it is here.
    pub(super) async fn note_moved(&self, to: Option<&str>) -> s3::Result<()> {
        match to {
            Some(to) => {
                let frozen = *lock(&self.frozen.0);
                let key = self.keys.moved();
                let why = "nothing is frozen";
                let frozen = frozen.ok_or_else(|| self.client.error(Kind::Expired, "put", &key, why))?;
                self.put_note(&Note::GoneTo(to.to_owned()), Some(frozen)).await
            }
            None => {
                *lock(&self.frozen.0) = None;
                self.client.delete(&self.keys.moved(), None).await
            }
        }
    }

    async fn put_note(&self, note: &Note, validity: Option<Validity>) -> s3::Result<()> {
        let key = self.keys.moved();
        let text =
            serde_json::to_vec(note).map_err(|error| self.client.error(Kind::Other, "write", &key, error))?;
        self.client.put(&key, Bytes::from(text), Put { validity, ..Put::default() }).await?;
        Ok(())
    }
}
