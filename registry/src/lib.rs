//! An OCI registry (distribution-spec 1.1) on a directory, in the on-disk layout of CNCF distribution.
//!
//! ```text
//!            serve (server.rs): connections, orderly end ── tasks, control: work beside requests
//!              │   └── tls, reload          certificates; files that are read again
//!              │
//!            api/ ── auth/, metrics     HTTP: routes, answers, error codes; who may do what
//!              │  └── events/             what happened: the audit log, webhooks
//!              ├── uploads  blobs  manifests  lists
//!              │          │
//!              │        model           what is read of a manifest
//!              │          │
//!            store/                     what keeps the bytes, as the API sees it: a trait, and tests of its promises
//!              │
//!            storage/ ──┬── uploads, ingest   a directory: sessions; hash and write while bytes arrive
//!                       ├── blobs, manifests, changes, referrers
//!                       ├── collect, scrub     garbage; damage
//!                       └── sync, layout      durable placement; who lies where
//!            bucket/ ── s3/             an S3 bucket, which many replicas share; its client
//!            migrate/                   from one store into another, while it is served
//!            cache/                     what upstream registries have, fetched by way of dvcr-client
//!            inventory                  what a directory holds, for people
//!            rules                      what is kept, what never changes
//!            units                      sizes and times as people write them
//!            digest, names              the grammars everything from outside must pass
//! ```
//!
//! What is promised: 201 means that content and directory entries are on disk; a process killed, or a machine switched
//! off, at any moment leaves no damaged or half-visible blob, manifest or tag; a directory written by CNCF distribution is
//! served as it is, and the other way round. `docs/registry.md` tells how.

mod api;
mod auth;
mod bucket;
mod cache;
pub mod control;
mod digest;
mod events;
pub mod inventory;
mod metrics;
mod migrate;
mod model;
mod names;
mod patience;
mod place;
mod reload;
mod rules;
mod s3;
mod server;
mod storage;
mod store;
mod tasks;
mod tls;
mod units;

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;

pub use auth::{Auth, Bearer, ExternalUrl, UrlError};
pub use cache::{Cache, Upstream, UpstreamAddress};
pub use events::{Events, Ignore, Webhook};
pub use place::{MirrorTo, Place};
pub use rules::{Pattern, Retention, Rules, Tags};
pub use s3::{Encryption, Settings as BucketSettings};
pub use server::serve;
pub use storage::quota::{Prefix, Quota};
pub use tasks::{Collected, Migrated, Outcome, Schedule, Scrubbed, Task, Watch};
pub use tls::Tls;
pub use units::{OrOff, Size, Time};

use api::App;
use auth::Guard;
use cache::Sources;
use events::Recorder;
use migrate::{Mirror, Served};
use place::Opened;
use storage::Storage;
use storage::layout::Layout;
use store::Store;
use tls::Acceptors;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a registry cannot be opened, or did not end well.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("cannot serve a registry from {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot serve a registry from the bucket {name:?}")]
    Bucket { name: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error(
        "the registry in {from} has moved to {to}; use the settings of that, or move it back by `dvcr registry migrate`"
    )]
    Moved { from: String, to: String },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("{path}, line {line}: {why}")]
    Htpasswd { path: PathBuf, line: usize, why: &'static str },
    #[error("{path} {why}")]
    Secret { path: PathBuf, why: &'static str },
    #[error("cannot use {path} for TLS")]
    Tls { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("{what} is running already; wait for its end")]
    Busy { what: &'static str },
    #[error("{why}")]
    Invalid { why: String },
    #[error("the work is not done")]
    Task { source: Box<dyn std::error::Error + Send + Sync> },
    #[error("stopped before the end; the same again goes on")]
    Stopped,
    #[error("cannot talk to the registry that serves the directory")]
    Control { source: io::Error },
    #[error("the registry that serves the directory says: {why}")]
    Refused { why: String },
    #[error("cannot put away the uploads that were going on")]
    Finish { source: Box<dyn std::error::Error + Send + Sync> },
}

/// How a registry is run.
#[derive(Clone, Debug)]
pub struct Config {
    /// The directory, distribution's `rootdirectory`; with a bucket, where this replica has what is its own: the socket for
    /// commands, and what webhooks are still to be told.
    pub root: PathBuf,
    /// The bucket that has the content in place of the directory.
    pub bucket: Option<BucketSettings>,
    /// Says that nobody else serves the bucket, so that it need not be able to decide between several.
    pub single_replica: bool,
    /// Who may do what; `None` lets everybody do everything.
    pub auth: Option<Auth>,
    /// `None` is plain HTTP.
    pub tls: Option<Tls>,
    /// Requests that stream content in at a time; more wait 10 s and are then turned away with 429. Each may hold up to
    /// 4 MiB, all together 48 MiB.
    pub uploads_max: usize,
    /// Connections at a time; more wait to be accepted.
    pub connections_max: usize,
    /// How garbage is collected.
    pub collection: Collection,
    /// What of the repositories is kept, and what never changes.
    pub rules: Rules,
    /// How damage is looked for.
    pub scrub: Scrub,
    /// What clients may take of the machine.
    pub limits: Limits,
    /// Whose content is fetched when somebody asks for it.
    pub cache: Cache,
    /// What is recorded of requests, and who is told.
    pub events: Events,
    /// What is kept like this one.
    pub mirror: Option<MirrorTo>,
}

/// What clients may take of the machine.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes by prefix of repositories; the longest prefix counts.
    pub quotas: Vec<Quota>,
    /// Free bytes that uploads leave; `None` is the smaller of 1 GiB and a twentieth of the volume.
    pub reserve_bytes: Option<u64>,
    /// Requests per second of one user, or, where there are no users, of one address; `None` counts none. Ten seconds'
    /// worth may come at once.
    pub request_rate: Option<u32>,
    /// How long a client may take to bring, or to take, 16 KiB, or what is left of a body.
    pub idle_timeout: Duration,
    /// How long a client may use the URL of a blob in the bucket, which it is then sent to; `None` sends all through us.
    pub redirect: Option<Duration>,
    /// Bytes of blobs in the bucket that are kept in the root directory, as they are read again and again; `None` keeps none.
    pub read_cache_bytes: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            quotas: Vec::new(),
            reserve_bytes: None,
            request_rate: None,
            idle_timeout: Duration::from_secs(60),
            redirect: None,
            read_cache_bytes: None,
        }
    }
}

/// How damage is looked for while the registry serves.
#[derive(Clone, Debug)]
pub struct Scrub {
    /// Bytes read per second, at most; `None` is only when asked for.
    pub rate: Option<u64>,
    /// How long after the start it begins.
    pub delay: Duration,
    /// How long from the beginning of one pass over all blobs to the next, at least.
    pub period: Duration,
}

impl Default for Scrub {
    fn default() -> Self {
        Self { rate: Some(8 << 20), delay: Duration::from_secs(60), period: Duration::from_secs(86_400) }
    }
}

/// How garbage is collected.
#[derive(Clone, Debug)]
pub struct Collection {
    /// When; `None` is only when asked for.
    pub schedule: Option<Schedule>,
    /// How long a blob may wait for the manifest that refers to it; at least 200 ms. Half of it is what a client has that
    /// was told that a blob is there already.
    pub grace: Duration,
    /// How long an upload may rest.
    pub upload_age: Duration,
    /// Files removed per second, at most.
    pub removals_per_second: u32,
}

impl Default for Collection {
    fn default() -> Self {
        Self {
            schedule: None,
            grace: Duration::from_secs(3600),
            upload_age: Duration::from_secs(7 * 86_400),
            removals_per_second: 20_000,
        }
    }
}

impl Config {
    /// Serves `root` to everybody, with the usual bounds.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            bucket: None,
            single_replica: false,
            auth: None,
            tls: None,
            uploads_max: 40,
            connections_max: 1024,
            collection: Collection::default(),
            rules: Rules::default(),
            scrub: Scrub::default(),
            limits: Limits::default(),
            cache: Cache::default(),
            events: Events::default(),
            mirror: None,
        }
    }
}

/// An open registry.
#[derive(Clone, Debug)]
pub struct Registry {
    app: Arc<App>,
    /// What the API sees of what keeps the bytes.
    served: Arc<Served>,
    /// What keeps the bytes, where something is done that is of a directory alone; `None` is a bucket.
    directory: Option<Arc<Storage>>,
    root: PathBuf,
    /// Keeps others from the root where the directory does not.
    _lock: Option<Arc<File>>,
    uploads_max: usize,
    connections_max: usize,
    collection: Collection,
    limits: Limits,
    mirror: Option<Arc<Mirror>>,
    tls: Option<Arc<Acceptors>>,
    scrub: Scrub,
    /// Held while damage is looked for in the background.
    scrubbing: Arc<tokio::sync::Mutex<()>>,
    /// What the tasks that nobody waits for are stopped by.
    background: Watch,
}

impl Registry {
    /// Opens the directory, making it if it is not there, or the bucket. Blocks on the filesystem, and on the bucket, which
    /// needs a runtime of several threads around it.
    ///
    /// # Errors
    /// When another process of ours serves the same directory, it cannot be written, or a file with secrets or certificates
    /// cannot be used; when the bucket cannot be reached, or cannot be shared.
    pub fn open(config: Config) -> Result<Self> {
        let Config {
            root,
            bucket,
            single_replica,
            auth,
            tls,
            uploads_max,
            connections_max,
            collection,
            rules,
            scrub,
            limits,
            cache,
            events,
            mirror,
        } = config;
        let place = Place { root: root.clone(), bucket: bucket.clone(), single_replica };
        let bearer = auth.as_ref().and_then(|auth| auth.bearer.clone());
        let guard = auth.map(|auth| Guard::open(auth, tls.is_some())).transpose()?;
        let tls = tls.map(Acceptors::open).transpose()?.map(Arc::new);
        let rules = Arc::new(rules);
        let lock = match bucket {
            Some(_) => {
                let (_, lock) =
                    storage::take(&root).map_err(|source| Error::Open { path: root.clone(), source })?;
                Some(Arc::new(lock))
            }
            None => None,
        };
        let Opened { store, directory } = place.open(collection.grace, &limits)?;
        if let Some(to) = place.moved(&*store)? {
            return Err(Error::Moved { from: place.to_string(), to });
        }
        let served = Arc::new(Served::new(store));
        let mirror = mirror.map(|mirror| mirror.open(&served, collection.grace)).transpose()?.map(Arc::new);
        let cache = Sources::open(cache, directory.as_ref(), &rules)?;
        let bounded = |permits: usize| permits.clamp(1, tokio::sync::Semaphore::MAX_PERMITS);
        let (uploads_max, connections_max) = (bounded(uploads_max), bounded(connections_max));
        let queues = Layout::new(&root).events();
        let events = Recorder::open(&events, &queues, bearer, tls.is_some())?.map(Arc::new);
        let store: Arc<dyn Store> = Arc::<Served>::clone(&served);
        let mut app = App::new(store, guard, rules, cache, uploads_max, &limits, events);
        app.mirror.clone_from(&mirror);
        let app = Arc::new(app);
        Ok(Self {
            app,
            served,
            mirror,
            directory,
            root,
            _lock: lock,
            uploads_max,
            connections_max,
            collection,
            tls,
            scrub,
            limits,
            scrubbing: Arc::default(),
            background: Watch::default(),
        })
    }

    /// Reads the files with secrets and certificates again, whether they changed or not, and opens the audit log again if
    /// it was moved away; the log tells how that went.
    /// While it is served, a registry looks itself every 5 s whether they changed. Blocks.
    pub fn reload(&self) {
        self.refresh(true);
    }

    fn refresh(&self, force: bool) {
        if let Some(guard) = &self.app.guard {
            guard.refresh(force);
        }
        if let Some(tls) = &self.tls {
            tls.refresh(force);
        }
        if let Some(sources) = &self.app.cache {
            sources.refresh(force);
        }
        if let Some(events) = &self.app.events {
            events.refresh(force);
        }
    }

    /// Returns the service: the API below `/v2/`, and `/healthz`, `/readyz`, `/metrics`.
    pub fn router(&self) -> Router {
        api::router(Arc::clone(&self.app))
    }
}

/// Locks what stays sound when a thread that held it panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
