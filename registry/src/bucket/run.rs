//! The state of the collection's run: one small object, which is only ever replaced by who knows what it replaces.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Bucket, found};
use crate::s3::{self, Kind, Put};

/// Largest state of a run, bytes.
const STATE_BYTES_MAX: u64 = 1024;

/// What a run is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "kebab-case")]
pub(super) enum Phase {
    /// There is none.
    #[default]
    None,
    /// It looks at what there is.
    Marking {
        #[serde(with = "text")]
        run: Uuid,
    },
    /// It removes what the list of a round has, but for what is claimed.
    Condemned {
        #[serde(with = "text")]
        run: Uuid,
        round: u32,
    },
}

impl Phase {
    pub(super) fn run(self) -> Option<Uuid> {
        match self {
            Self::None => None,
            Self::Marking { run } | Self::Condemned { run, .. } => Some(run),
        }
    }
}

/// The state as it was read, or written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) phase: Phase,
    /// `None` where no collection has ever been.
    etag: Option<String>,
}

/// The object.
#[derive(Serialize, Deserialize)]
struct Written {
    #[serde(flatten)]
    phase: Phase,
    /// Differs with each write, and so does the ETag, which is made of the content.
    #[serde(with = "text")]
    write: Uuid,
}

/// Identifiers as the text they are known by.
mod text {
    use serde::{Deserialize, Deserializer, Serializer, de};
    use uuid::Uuid;

    pub(super) fn serialize<S: Serializer>(id: &Uuid, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Uuid, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl Bucket {
    pub(super) async fn read_run(&self) -> s3::Result<State> {
        let key = self.keys.run();
        let Some(object) = found(self.client.get(&key, STATE_BYTES_MAX).await)? else {
            return Ok(State { phase: Phase::None, etag: None });
        };
        match serde_json::from_slice::<Written>(&object.content) {
            Ok(written) => Ok(State { phase: written.phase, etag: Some(object.etag) }),
            Err(error) => Err(self.client.error(Kind::Other, "understand", &key, error)),
        }
    }

    /// Replaces the state, if it is what `known` says.
    ///
    /// # Errors
    /// [`Kind::Precondition`] if somebody else has replaced it.
    pub(super) async fn replace_run(&self, known: &State, phase: Phase) -> s3::Result<State> {
        let key = self.keys.run();
        let put = known.etag.as_ref().map_or_else(Put::new, Put::over);
        let written = serde_json::to_vec(&Written { phase, write: Uuid::new_v4() });
        let written = written.map_err(|error| self.client.error(Kind::Other, "write", &key, error))?;
        let etag = self.client.put(&key, Bytes::from(written), put).await?;
        Ok(State { phase, etag: Some(etag) })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Opened;
    use super::*;

    #[tokio::test]
    async fn only_who_knows_the_state_replaces_it() {
        for server in Opened::servers().await {
            let opened = Opened::new(server).await;
            let bucket = &opened.bucket;
            let (run, first) = (Uuid::new_v4(), bucket.read_run().await.unwrap());
            assert_eq!(first.phase, Phase::None);
            let second = bucket.replace_run(&first, Phase::Marking { run }).await.unwrap();
            assert!(bucket.replace_run(&first, Phase::None).await.is_err());
            let third = bucket.replace_run(&second, Phase::Condemned { run, round: 7 }).await.unwrap();
            assert_eq!(bucket.read_run().await.unwrap(), third);
            // The same words again are another state.
            let fourth = bucket.replace_run(&third, third.phase).await.unwrap();
            let late = bucket.replace_run(&third, Phase::None).await.unwrap_err();
            assert_eq!(late.kind(), Kind::Precondition);
            bucket.replace_run(&fourth, Phase::None).await.unwrap();
        }
    }
}
