//! The pull-through cache: repositories below a prefix are those of an upstream registry, fetched when they are wanted.
//!
//! ```text
//!  request ──of(repo)──> Source ──┬── what is stored ──────────────────────────────────> answer as for any repository
//!                                 ├── manifests: Flights, one question for all who ask ──> verify ──> store ──> answer
//!                                 └── fetch: one for all who want the blob ── Ingest ──> verify ──> commit
//!                                      │                                        └── growing file ──> Arriving bodies
//!                                      └── no room: Passing bodies, each from the upstream
//!  commit ──> more than may stay ──> storage::evict        uses: in memory, put on disk now and then
//! ```
//!
//! Nobody pushes there. Where the upstreams are is the operator's word alone; `docs/registry-cache.md` tells the rules.

mod config;
mod fetch;
mod flights;
mod source;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

pub use config::{Cache, Upstream, UpstreamAddress};
pub(crate) use fetch::{Arriving, Content, Passing};
pub(crate) use source::{Served, Source};

use crate::names::RepoName;
use crate::rules::Rules;
use crate::storage::{self, Storage};
use crate::{Error, Result};

/// Blobs fetched at a time; more wait.
const FETCHES_MAX: u32 = 16;
/// How long a fetch, or a question, waits for its turn.
const TURN_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is put on disk what was used when.
pub(crate) const USES_INTERVAL: Duration = Duration::from_secs(60);
/// How long fetches may take to clean up when the registry ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// All upstreams of one registry.
#[derive(Debug)]
pub(crate) struct Sources {
    /// Those with the longest prefixes first.
    sources: Vec<Arc<Source>>,
    turns: Arc<Semaphore>,
    closing: watch::Sender<bool>,
}

/// Why something could not be had of an upstream.
#[derive(Clone, Debug)]
pub(crate) enum Failure {
    /// The upstream does not have it.
    Unknown,
    /// The upstream does not let us have it.
    Denied,
    /// Too much is being fetched.
    Busy,
    /// The upstream gives no answer, none that can be used, or not the content that was asked for. The log has the rest.
    Upstream(&'static str),
    Storage(Arc<storage::Error>),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("the upstream does not have it"),
            Self::Denied => f.write_str("the upstream refuses it"),
            Self::Busy => f.write_str("too much is being fetched"),
            Self::Upstream(why) => f.write_str(why),
            Self::Storage(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Failure {}

impl From<storage::Error> for Failure {
    fn from(error: storage::Error) -> Self {
        Self::Storage(Arc::new(error))
    }
}

/// What is counted of an upstream.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) stale: AtomicU64,
    pub(crate) failures: AtomicU64,
    pub(crate) fetched_bytes: AtomicU64,
    pub(crate) evicted_bytes: AtomicU64,
    pub(crate) in_flight: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }
}

impl Sources {
    /// Reads the files with secrets and certificates; `None` if there is no upstream. Blocks.
    pub(crate) fn open(
        cache: Cache,
        storage: Option<&Arc<Storage>>,
        rules: &Arc<Rules>,
    ) -> Result<Option<Self>> {
        if cache.upstreams.is_empty() {
            return Ok(None);
        }
        let Some(storage) = storage else {
            let why = "what upstreams have is kept in a directory only; serve it by another dvcr registry, from a \
                       directory, that has this one as an upstream";
            return Err(Error::Invalid { why: why.to_owned() });
        };
        let (closing, _) = watch::channel(false);
        let turns = Arc::new(Semaphore::new(FETCHES_MAX as usize));
        let open = |upstream| {
            Source::open(upstream, storage, rules, Arc::clone(&turns), closing.subscribe()).map(Arc::new)
        };
        let mut sources = cache.upstreams.into_iter().map(open).collect::<Result<Vec<_>>>()?;
        sources.sort_by_key(|source| std::cmp::Reverse(source.prefix().len()));
        for pair in sources.windows(2) {
            if pair[0].prefix() == pair[1].prefix() {
                return Err(Error::Invalid { why: format!("{} has two upstreams", pair[0].prefix()) });
            }
        }
        Ok(Some(Self { sources, turns, closing }))
    }

    /// The upstream that has a repository.
    pub(crate) fn of(&self, repo: &RepoName) -> Option<&Arc<Source>> {
        self.sources.iter().find(|source| repo.as_str().starts_with(source.prefix()))
    }

    /// What a repository is called here that a client calls by its name at the upstream `ns`.
    pub(crate) fn renamed(&self, ns: &str, repo: &RepoName) -> Option<RepoName> {
        let source = self.sources.iter().find(|source| source.is_called(ns))?;
        source.local(repo)
    }

    pub(crate) fn all(&self) -> &[Arc<Source>] {
        &self.sources
    }

    /// Reads files again that changed. Blocks.
    pub(crate) fn refresh(&self, force: bool) {
        self.sources.iter().for_each(|source| source.refresh(force));
    }

    /// Puts on disk what was used when. Blocks.
    pub(crate) fn keep_uses(&self) {
        self.sources.iter().for_each(|source| source.keep_uses());
    }

    /// Ends what is being fetched, and waits until it is cleaned up.
    pub(crate) async fn close(&self) {
        self.closing.send_replace(true);
        let all = self.turns.acquire_many(FETCHES_MAX);
        if tokio::time::timeout(CLOSE_TIMEOUT, all).await.is_err() {
            tracing::warn!(
                "blobs were still being fetched at the end; what has come of them is dropped later"
            );
        }
    }
}
