//! What a store honours, found out by trying it.
//!
//! Several replicas share a bucket only if the store decides between two of them, and refuses what comes late. Stores
//! that speak S3 differ in both, and do not say so; they answer 200 to what they do not understand.

use std::time::Duration;

use bytes::Bytes;
use uuid::Uuid;

use super::client::Client;
use super::error::{Error, Kind, Result};
use super::object::{Listing, Put};
use super::wire::Validity;

/// Where the objects of a trial lie.
const DIRECTORY: &str = "dvcr/probe/";
/// How long a request of a trial is valid.
const VALIDITY: Duration = Duration::from_secs(20);
/// How long ago the time of an expired one ended.
const EXPIRED_FOR: Duration = Duration::from_secs(40);
/// Largest object of a trial, bytes.
const OBJECT_BYTES_MAX: u64 = 64;

/// What was found of one ability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub is_honoured: bool,
    /// A sentence for people.
    pub says: &'static str,
}

/// What was found of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Findings {
    /// Writes that must not replace anything.
    pub create: Finding,
    /// Writes that must replace what was read, and only that.
    pub replace: Finding,
    /// Requests that come after their time.
    pub expiry: Finding,
    /// Requests that somebody else has signed.
    pub signature: Finding,
    /// Reading what has just been written.
    pub read: Finding,
    /// Listing what has just been written, or removed.
    pub list: Finding,
}

impl Findings {
    /// Every finding with its name.
    pub(crate) fn all(&self) -> [(&'static str, &Finding); 6] {
        [
            ("create", &self.create),
            ("replace", &self.replace),
            ("expiry", &self.expiry),
            ("signature", &self.signature),
            ("read", &self.read),
            ("list", &self.list),
        ]
    }

    /// Whether several replicas may share the bucket; the signature does not matter for that.
    pub(crate) fn is_safe_for_replicas(&self) -> bool {
        [&self.create, &self.replace, &self.expiry, &self.read, &self.list]
            .iter()
            .all(|found| found.is_honoured)
    }
}

impl Client {
    /// Tries the store out on a few small objects, which are removed again.
    ///
    /// # Errors
    /// When the store cannot be written, read or listed at all.
    pub(crate) async fn probe(&self) -> Result<Findings> {
        let trial = Trial { client: self, key: format!("{DIRECTORY}{}", Uuid::new_v4().simple()) };
        let found = trial.run().await;
        let removed = trial.remove().await;
        let found = found?;
        removed.map(|()| found)
    }
}

struct Trial<'a> {
    client: &'a Client,
    key: String,
}

impl Trial<'_> {
    async fn run(&self) -> Result<Findings> {
        let first = self.put("first", Put::new()).await?;
        let read = self.holds("first").await?;
        let listed = self.is_listed().await?;
        let create = self.create().await?;
        let replace = self.replace(first).await?;
        let expiry = self.expiry().await?;
        let signature = self.signature().await?;
        self.client.delete(&self.key, None).await?;
        let removed = !self.is_listed().await?;
        Ok(Findings {
            create,
            replace,
            expiry,
            signature,
            read: finding(
                read,
                "What was written is read at once.",
                "What was just written cannot be read yet: the store is only consistent after a while.",
            ),
            list: finding(
                listed && removed,
                "What was written or removed is listed so at once.",
                "Lists do not show what was just written or removed: the store is only consistent after a while.",
            ),
        })
    }

    async fn create(&self) -> Result<Finding> {
        let refused = self.is_refused("create", Put::new()).await?;
        Ok(finding(
            refused && self.holds("first").await?,
            "A write with `If-None-Match: *` replaces nothing.",
            "The store ignores `If-None-Match: *`: two replicas could both create the same object.",
        ))
    }

    /// Replaces twice, each time with the ETag that is right and with one that is not.
    async fn replace(&self, first: String) -> Result<Finding> {
        let bad = finding(
            false,
            "",
            "The store does not honour `If-Match` on writes: one replica could undo what another has written.",
        );
        let absent = format!("{}-absent", self.key);
        let nothing = Put::over(first.clone());
        if !refused(self.client.put(&absent, Bytes::from_static(b"none"), nothing).await)? {
            return Ok(bad);
        }
        let (mut etag, mut content) = (first.clone(), "first");
        for next in ["second", "third"] {
            etag = match self.put(next, Put::over(etag)).await {
                Ok(etag) => etag,
                Err(error) if matches!(error.kind(), Kind::Unavailable | Kind::Denied) => return Err(error),
                Err(_) => return Ok(bad),
            };
            content = next;
            if !self.is_refused("stale", Put::over(first.clone())).await? || !self.holds(content).await? {
                return Ok(bad);
            }
        }
        Ok(finding(
            self.holds(content).await?,
            "A write with `If-Match` replaces only what has that ETag.",
            bad.says,
        ))
    }

    async fn expiry(&self) -> Result<Finding> {
        let now = self.client.server_now().await?.earliest;
        let valid = Validity { from: now, lasts: VALIDITY };
        if let Err(error) = self.put("valid", Put::default().valid(valid)).await {
            return match error.kind() {
                Kind::Unavailable => Err(error),
                _ => Ok(finding(
                    false,
                    "",
                    "The store refuses requests that are signed in their query, so none can be made to expire.",
                )),
            };
        }
        let create = Put::new().valid(valid);
        if !self.is_refused("conditional", create).await? || !self.holds("valid").await? {
            let why = "The store ignores conditions on requests that are signed in their query.";
            return Ok(finding(false, "", why));
        }
        let from = now.checked_sub(VALIDITY + EXPIRED_FOR).unwrap_or(now);
        let late = Validity { from, lasts: VALIDITY };
        let put = self.put("late", Put::default().valid(late)).await;
        let is_refused = |result: Result<()>| match result {
            Err(error) if error.kind() == Kind::Expired => Ok(true),
            Err(error) if error.kind() == Kind::Unavailable => Err(error),
            _ => Ok(false),
        };
        let put = is_refused(put.map(drop))?;
        let deleted = is_refused(self.client.delete(&self.key, Some(late)).await)?;
        if !deleted {
            self.put("valid", Put::default()).await?;
        }
        Ok(finding(
            put && deleted && self.holds("valid").await?,
            "A request that comes after its time is refused.",
            "The store takes requests whose time is over: one that was held up could undo what was done since.",
        ))
    }

    async fn signature(&self) -> Result<Finding> {
        let now = self.client.server_now().await?.earliest;
        let put = Put::default().valid(Validity { from: now, lasts: VALIDITY });
        let forged = self.client.put_with(&self.key, Bytes::from_static(b"forged"), put, true).await;
        let is_refused = match forged {
            Err(error) if error.kind() == Kind::Unavailable => return Err(error),
            forged => forged.is_err(),
        };
        Ok(finding(
            is_refused,
            "A request with a wrong signature is refused.",
            "The store does not look at signatures: whoever reaches it may do everything.",
        ))
    }

    async fn put(&self, content: &'static str, put: Put) -> Result<String> {
        self.client.put(&self.key, Bytes::from_static(content.as_bytes()), put).await
    }

    async fn is_refused(&self, content: &'static str, put: Put) -> Result<bool> {
        refused(self.put(content, put).await)
    }

    async fn holds(&self, content: &str) -> Result<bool> {
        match self.client.get(&self.key, OBJECT_BYTES_MAX).await {
            Ok(object) => Ok(object.content == content),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn is_listed(&self) -> Result<bool> {
        let page = self.client.list(Listing { prefix: &self.key, ..Listing::default() }, None).await?;
        Ok(page.objects.iter().any(|(key, _)| *key == self.key))
    }

    async fn remove(&self) -> Result<()> {
        self.client.delete(&format!("{}-absent", self.key), None).await?;
        self.client.delete(&self.key, None).await
    }
}

/// Whether a write was refused for its condition.
fn refused(written: Result<String, Error>) -> Result<bool> {
    match written {
        Ok(_) => Ok(false),
        Err(error) => match error.kind() {
            Kind::Precondition | Kind::NotFound => Ok(true),
            // Some say that they know no conditions.
            Kind::Other => Ok(false),
            _ => Err(error),
        },
    }
}

fn finding(is_honoured: bool, good: &'static str, bad: &'static str) -> Finding {
    Finding { is_honoured, says: if is_honoured { good } else { bad } }
}
