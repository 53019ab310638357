//! The lease of the one who collects: an object that is renewed while it is held, and that another may take when it is not.
//!
//! It is the server's clock that says how long ago it was renewed, as it is that clock which refuses the removals that were signed
//! with it: so the lease and they run out by one measure, whatever the clocks of the replicas do. Where a store consists of machines
//! whose clocks differ, they may do so by what the lease lasts longer than a removal is valid: more than half a minute.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use uuid::Uuid;

use super::{Bucket, found};
use crate::s3::{self, Kind, Put, Validity};
use crate::store::{self, Error};

/// Largest lease, bytes.
const LEASE_BYTES_MAX: u64 = 1024;
/// A time that the store tells is cut to the second.
const SECOND: Duration = Duration::from_secs(1);

/// The lease, held.
#[derive(Debug)]
pub(super) struct Lease<'a> {
    bucket: &'a Bucket,
    holder: Uuid,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    etag: String,
    /// The server's time, at the earliest, when it was last asked whether the lease is ours, and it was.
    seen: SystemTime,
    lost: bool,
}

/// The object.
#[derive(Serialize, Deserialize)]
struct Written {
    /// `None` if it was given back.
    holder: Option<String>,
    /// Differs with each write, and so does the ETag, which is made of the content.
    write: String,
}

impl Bucket {
    /// Takes the lease; `None` if another has it, or takes it now.
    pub(super) async fn take_lease(&self) -> s3::Result<Option<Lease<'_>>> {
        let put = match self.read_lease().await? {
            Found::Absent => Put::new(),
            Found::Free { etag } => Put::over(etag),
            Found::Held => return Ok(None),
        };
        let (holder, seen) = (Uuid::new_v4(), self.client.server_now().await?.earliest);
        match self.write_lease(Some(holder), put).await {
            Ok(etag) => {
                let held = Mutex::new(Held { etag, seen, lost: false });
                Ok(Some(Lease { bucket: self, holder, held }))
            }
            Err(error) if is_taken(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Tells whether somebody collects.
    pub(super) async fn is_leased(&self) -> s3::Result<bool> {
        Ok(matches!(self.read_lease().await?, Found::Held))
    }

    async fn read_lease(&self) -> s3::Result<Found> {
        let key = self.keys.lease();
        let Some(object) = found(self.client.get(&key, LEASE_BYTES_MAX).await)? else {
            return Ok(Found::Absent);
        };
        let written: Written = serde_json::from_slice(&object.content)
            .map_err(|error| self.client.error(Kind::Other, "understand", &key, error))?;
        let now = self.client.server_now().await?.earliest;
        let age = now.duration_since(object.modified).unwrap_or_default();
        let is_over = age > self.options.timing.lease.saturating_add(SECOND);
        Ok(match written.holder.is_none() || is_over {
            true => Found::Free { etag: object.etag },
            false => Found::Held,
        })
    }

    async fn write_lease(&self, holder: Option<Uuid>, put: Put) -> s3::Result<String> {
        let key = self.keys.lease();
        let holder = holder.map(|holder| holder.to_string());
        let written = serde_json::to_vec(&Written { holder, write: Uuid::new_v4().to_string() });
        let written = written.map_err(|error| self.client.error(Kind::Other, "write", &key, error))?;
        self.client.put(&key, Bytes::from(written), put).await
    }
}

enum Found {
    Absent,
    /// It was given back, or has run out.
    Free {
        etag: String,
    },
    Held,
}

impl Lease<'_> {
    /// Sees whether the lease is still ours, and makes it last.
    ///
    /// # Errors
    /// When another has taken it.
    pub(super) async fn renew(&self) -> store::Result<()> {
        self.renew_held(&mut *self.held.lock().await).await
    }

    /// Returns the validity of what is removed now: from a time when the lease was ours, which is not long ago.
    pub(super) async fn validity(&self) -> store::Result<Validity> {
        let mut held = self.held.lock().await;
        let lasts = self.bucket.options.timing.validity;
        let now = self.bucket.client.server_now().await?.latest;
        if held.lost || now.duration_since(held.seen).unwrap_or_default() > lasts / 4 {
            self.renew_held(&mut held).await?;
        }
        Ok(Validity { from: held.seen, lasts })
    }

    /// Renews the lease again and again; ends when another has taken it.
    pub(super) async fn keep(&self) -> Error {
        loop {
            tokio::time::sleep(self.bucket.options.timing.lease / 4).await;
            match self.renew().await {
                Ok(()) => {}
                Err(error) if error.kind() == store::Kind::Unavailable => {
                    // It runs out by itself, and then it is seen that another has it.
                    tracing::warn!(error = &error as &dyn std::error::Error, "the lease is not renewed");
                }
                Err(error) => return error,
            }
        }
    }

    /// Gives the lease back, so that the next need not wait for its end. Nothing that was signed with it may be under way.
    pub(super) async fn give_back(self) {
        let held = self.held.into_inner();
        if held.lost {
            return;
        }
        if let Err(error) = self.bucket.write_lease(None, Put::over(held.etag)).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "the lease runs out by itself");
        }
    }

    async fn renew_held(&self, held: &mut Held) -> store::Result<()> {
        let seen = self.bucket.client.server_now().await?.earliest;
        if !held.lost {
            match self.bucket.write_lease(Some(self.holder), Put::over(&*held.etag)).await {
                Ok(etag) => {
                    (held.etag, held.seen) = (etag, seen);
                    return Ok(());
                }
                Err(error) if is_taken(&error) => held.lost = true,
                Err(error) => return Err(error.into()),
            }
        }
        Err(lost())
    }
}

/// Another replica collects in our place.
pub(super) fn lost() -> Error {
    let why = "another replica has taken over, since this one did not renew its lease in time";
    Error::of(store::Kind::Other, "the collection was taken from this replica", why)
}

/// Whether somebody else has written in between.
pub(super) fn is_taken(error: &s3::Error) -> bool {
    matches!(error.kind(), Kind::Precondition | Kind::NotFound)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::tests::Opened;

    #[tokio::test]
    async fn one_of_many_has_the_lease_until_it_gives_it_back() {
        let [minio, moto] = Opened::servers().await;
        // moto does not decide between two writers who come at the very same time.
        for (server, takers) in [(minio, 5), (moto, 1)] {
            let opened = Opened::new(server).await;
            let bucket = &opened.bucket;
            let all = futures_util::future::join_all((0..takers).map(|_| bucket.take_lease())).await;
            let mut taken: Vec<_> = all.into_iter().filter_map(Result::unwrap).collect();
            assert_eq!(taken.len(), 1, "of {takers} by the side of {}", opened.server.endpoint());
            assert!(bucket.is_leased().await.unwrap());
            let lease = taken.remove(0);
            lease.renew().await.unwrap();
            assert!(bucket.take_lease().await.unwrap().is_none());
            lease.give_back().await;
            assert!(!bucket.is_leased().await.unwrap());
            assert!(bucket.take_lease().await.unwrap().is_some());
        }
    }

    #[tokio::test]
    async fn a_lease_that_is_not_renewed_is_taken_and_the_one_before_learns_it() {
        let opened = Opened::new(Opened::minio().await).await;
        let bucket = &opened.bucket;
        let timing = bucket.options.timing;
        let first = bucket.take_lease().await.unwrap().unwrap();
        let (begun, signed) = (Instant::now(), first.validity().await.unwrap());
        let second = loop {
            if let Some(lease) = bucket.take_lease().await.unwrap() {
                break lease;
            }
            assert!(begun.elapsed() < 5 * timing.lease, "nobody can take it");
            tokio::time::sleep(timing.view_age).await;
        };
        assert!(begun.elapsed() >= timing.lease);
        // What the first had signed is over.
        assert!(bucket.client.server_now().await.unwrap().earliest > signed.end() + timing.settling());
        for lost in [first.renew().await, first.validity().await.map(drop)] {
            assert!(lost.unwrap_err().to_string().contains("taken from this replica"));
        }
        second.renew().await.unwrap();
    }
}
