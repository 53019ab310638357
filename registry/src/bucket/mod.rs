//! A registry in an S3 bucket, in the layout of CNCF distribution, which any number of replicas may serve at a time.
//!
//! ```text
//!  Bucket ──┬── uploads    sessions: parts, state, commit  ──┬── view     what is known of collections, by which links are placed
//!           ├── blobs      lookup, reading, mounts           ├── keys, links   what lies where; what names a digest
//!           ├── manifests  with their tags, referrers      ──┤
//!           ├── remove     manifests and tags                └── s3       the client
//!           ├── lists      tags, catalogue; order
//!           ├── quota      bytes by prefix
//!           ├── kept       blobs on this replica's disk
//!           ├── shared, recent   one reading for all who ask at once; what was seen some seconds ago
//!           ├── moved      that all goes elsewhere, said to all replicas
//!           └── collect    garbage, by one replica at a time
//!                └── lease   which one;  run, condemned, claims   what it and those who push say to each other
//! ```
//!
//! `store` makes of this the [`Store`](crate::store::Store) that the API sees. All is async inside; the methods of the trait block
//! on it. Nothing here is kept in memory that another replica would have to know: contents are, which never change under their digest,
//! but not who has them.
//!
//! How replicas keep out of each other's way is in `docs/decisions/0004-a-registry-in-a-bucket.md`; `interleavings` is a model
//! of it.

mod blobs;
mod claims;
mod collect;
mod condemned;
#[cfg(test)]
mod interleavings;
mod kept;
mod keys;
mod lease;
mod links;
mod lists;
mod manifests;
mod moved;
mod order;
mod parts;
mod quota;
mod recent;
mod referrers;
mod remove;
mod run;
mod shared;
mod store;
mod tags;
#[cfg(test)]
mod tests;
mod uploads;
mod view;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::s3::{self, Client, Head, Settings};
use crate::storage::manifests::Cache;
use crate::storage::quota::Quota;
use crate::store::{ChangeError, Error, Kind, Result};
use claims::Claims;
use kept::Kept;
use keys::Keys;
use links::Link;
use manifests::Named;
use quota::Quotas;
use recent::Recent;
use shared::Shared;
use view::Views;

/// How long requests and leases are good for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// How long a request that places a link, or removes something, is valid from the view that it was decided by on.
    pub(crate) validity: Duration,
    /// How old a view may be before it is read again; well below `validity`.
    pub(crate) view_age: Duration,
    /// After how long a lease ends that is not renewed; longer than `validity`.
    pub(crate) lease: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            validity: Duration::from_secs(20),
            view_age: Duration::from_secs(3),
            lease: Duration::from_secs(60),
        }
    }
}

impl Timing {
    /// How long after the last moment of its validity a request may still take effect: the server looks at its clock when it has
    /// the head of a request, and does the rest then.
    fn settling(&self) -> Duration {
        self.validity / 4
    }

    /// How long one waits who meets what is about to be removed: until another replica may have taken the place of one
    /// that died, and has removed it.
    fn patience(&self) -> Duration {
        self.lease.saturating_add(self.validity.saturating_mul(2))
    }
}

/// How old garbage is, and what else a replica is told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// How long a blob may wait for the manifest that refers to it. The store counts in seconds.
    pub(crate) grace: Duration,
    pub(crate) timing: Timing,
}

/// What a replica does besides.
#[derive(Clone, Debug, Default)]
pub(crate) struct Extras {
    /// Bytes by prefix of repositories.
    pub(crate) quotas: Vec<Quota>,
    /// The directory for blobs that are read again and again, and how many bytes it may have.
    pub(crate) kept: Option<(PathBuf, u64)>,
}

/// One bucket, or a directory in it.
#[derive(Debug)]
pub(crate) struct Bucket {
    client: Client,
    keys: Keys,
    options: Options,
    views: Views,
    claims: Claims,
    uploads: uploads::Held,
    manifests: Cache,
    /// Links that are being read, and objects that are being looked at.
    links: Shared<Option<Link>>,
    heads: Shared<Option<Head>>,
    /// Lengths of blobs.
    lengths: Recent<u64>,
    /// Manifests whose content was read or written as it should be.
    sound: Recent<()>,
    /// What tags named when they were last read: where to look first.
    named: Named,
    referrers: referrers::Complete,
    quotas: Quotas,
    /// `None` if this replica keeps nothing.
    kept: Option<Kept>,
    frozen: moved::Frozen,
    /// Where the blocking methods have their work done.
    runtime: Handle,
}

impl Bucket {
    /// Opens a bucket, which has to be there.
    ///
    /// # Errors
    /// When the settings cannot be meant, or the bucket cannot be asked for.
    pub(crate) async fn open_with(settings: Settings, options: Options, extras: Extras) -> Result<Arc<Self>> {
        let client = Client::open(settings).await?;
        client.server_now().await?;
        let runtime = Handle::current();
        let kept = match extras.kept {
            Some((dir, bytes_max)) => {
                let (client, runtime) = (client.clone(), runtime.clone());
                let open = move || {
                    Kept::open(&dir, bytes_max, client, runtime).map_err(Error::at("cannot use", &dir))
                };
                let opened = tokio::task::spawn_blocking(open).await;
                Some(
                    opened
                        .map_err(|error| Error::of(Kind::Other, "the read cache is not opened", error))??,
                )
            }
            None => None,
        };
        let uploads = uploads::Held::new(client.settings().part_size.0);
        let keys = Keys::default();
        Ok(Arc::new(Self {
            quotas: Quotas::new(extras.quotas, client.clone(), keys.clone(), runtime.clone()),
            kept,
            client,
            keys,
            options,
            views: Views::default(),
            claims: Claims::default(),
            uploads,
            manifests: Cache::default(),
            links: Shared::default(),
            heads: Shared::default(),
            lengths: Recent::default(),
            sound: Recent::default(),
            named: Named::default(),
            referrers: referrers::Complete::default(),
            frozen: moved::Frozen::default(),
            runtime,
        }))
    }

    /// Opens one without anything besides.
    #[cfg(test)]
    pub(crate) async fn open(settings: Settings, options: Options) -> Result<Arc<Self>> {
        Self::open_with(settings, options, Extras::default()).await
    }

    /// Tries whether several replicas may share the bucket; `is_alone` says that there is only this one.
    ///
    /// # Errors
    /// With what the store does not honour, unless it need not.
    pub(crate) async fn find_out(&self, is_alone: bool) -> Result<()> {
        let found = self.client.probe().await?;
        let lacks: Vec<_> = found
            .all()
            .into_iter()
            .filter_map(|(name, finding)| (!finding.is_honoured).then_some((name, finding.says)))
            .collect();
        for (name, says) in &lacks {
            tracing::warn!(name, says, "the store of the bucket lacks something");
        }
        if is_alone || found.is_safe_for_replicas() {
            return Ok(());
        }
        let says: Vec<_> = lacks.iter().map(|(_, says)| *says).collect();
        let why = "several replicas cannot share it; if this is the only one, say --single-replica";
        Err(Error::of(Kind::Other, why, says.join(" ")))
    }

    /// Blocks until it is done; not for async threads.
    fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }
}

impl From<s3::Error> for Error {
    fn from(error: s3::Error) -> Self {
        let kind = match error.kind() {
            s3::Kind::Unavailable | s3::Kind::Expired => Kind::Unavailable,
            _ => Kind::Other,
        };
        Self::of(kind, "the bucket does not do its part", error)
    }
}

impl From<s3::Error> for ChangeError {
    fn from(error: s3::Error) -> Self {
        Error::from(error).into()
    }
}

/// Reads `None` where nothing is.
fn found<T>(answer: s3::Result<T>) -> s3::Result<Option<T>> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}
