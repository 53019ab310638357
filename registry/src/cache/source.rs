//! One upstream: its names, its client, its manifests, and what is known of it for a while.
//!
//! ```text
//!  tag:     stored and asked about within the freshness time ──> served
//!           else one HEAD for all who ask ── the same digest ──> served, fresh again
//!                │                        ── another ──> GET, verify, store, move the tag
//!                │                        ── 404 ──> the tag goes here, too
//!                └─ no answer, 429, 5xx ──> what is stored is served with a warning; for a while nothing is asked
//!  digest:  stored ──> served; else one GET for all who ask, verify, store
//! ```

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use dvcr_client::{AuthStore, Credentials, ErrorKind, Registry, RegistryOptions, Repository};
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio::time::timeout;

use super::config::Upstream;
use super::fetch::Fetches;
use super::flights::{Flights, Recent};
use super::{Counters, Failure, TURN_TIMEOUT};
use crate::api::error::Chain;
use crate::digest::Digest;
use crate::names::{Reference, RepoName};
use crate::reload::{self, Reloaded};
use crate::rules::Rules;
use crate::storage::Storage;
use crate::storage::evict::Eviction;
use crate::store::Manifest;
use crate::{Error, Result, lock, model};

/// Longest wait for an answer of an upstream to begin.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);
/// Times that one request is tried.
const ATTEMPTS_MAX: u32 = 3;
/// Questions about manifests, tags and lengths at a time; more wait.
const QUESTIONS_MAX: usize = 64;
/// How long an upstream is asked about a tag that is stored.
const REVALIDATION_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an upstream that failed is not asked about tags that are stored.
const PAUSE: Duration = Duration::from_secs(10);
/// How long it is known that the upstream does not have something.
const ABSENT_AGE_MAX: Duration = Duration::from_secs(5);
const ABSENT_MAX: usize = 4096;
/// Tags of which it is known when the upstream was asked.
const CHECKED_MAX: usize = 65_536;
/// Contents whose use is not on disk yet.
const USES_MAX: usize = 16_384;
/// Largest file with a password, or with certificates, bytes.
const PASSWORD_BYTES_MAX: u64 = 4 << 10;
const PEM_BYTES_MAX: u64 = 1 << 20;

/// A repository and something in it.
pub(super) type Place<T> = (RepoName, T);

/// One upstream.
#[derive(Debug)]
pub(crate) struct Source {
    upstream: Upstream,
    client: Reloaded<Registry>,
    rules: Arc<Rules>,
    pub(super) storage: Arc<Storage>,
    pub(super) fetches: Fetches,
    pub(crate) counters: Counters,
    manifests: Flights<Place<Reference>, Result<Served, Failure>>,
    lengths: Flights<Place<Digest>, Result<u64, Failure>>,
    questions: Semaphore,
    /// What the upstream did not have a moment ago.
    pub(super) absent: Recent<Place<Reference>>,
    /// Tags that name what the upstream has.
    checked: Recent<Place<Reference>>,
    paused: Mutex<Option<Instant>>,
    /// When contents were used, and whether they are manifests.
    uses: Mutex<HashMap<Place<Digest>, (bool, SystemTime)>>,
    /// Bytes that are stored, as far as is known.
    stored: AtomicU64,
    /// Bytes on their way.
    pub(super) arriving: AtomicU64,
    /// Whether what is stored has been counted since the start.
    counted: AtomicBool,
    evicting: AtomicBool,
    /// Held by the one who takes contents out.
    alone: Mutex<()>,
}

/// A manifest that can be given to a client.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    pub(crate) manifest: Manifest,
    /// Whether the upstream could not be asked.
    pub(crate) is_stale: bool,
}

impl Source {
    pub(super) fn open(
        upstream: Upstream,
        storage: &Arc<Storage>,
        rules: &Arc<Rules>,
        turns: Arc<Semaphore>,
        closing: watch::Receiver<bool>,
    ) -> Result<Self> {
        upstream.check().map_err(|why| Error::Invalid { why })?;
        let files = [&upstream.password_file, &upstream.auth_file, &upstream.ca_file];
        let files: Vec<PathBuf> = files.into_iter().flatten().cloned().collect();
        let from = upstream.clone();
        let client = Reloaded::open("credentials of an upstream", files, move || client(&from))?;
        Ok(Self {
            checked: Recent::new(upstream.tag_freshness.0, CHECKED_MAX),
            upstream,
            client,
            rules: Arc::clone(rules),
            storage: Arc::clone(storage),
            fetches: Fetches::new(turns, closing),
            counters: Counters::default(),
            manifests: Flights::default(),
            lengths: Flights::default(),
            questions: Semaphore::new(QUESTIONS_MAX),
            absent: Recent::new(ABSENT_AGE_MAX, ABSENT_MAX),
            paused: Mutex::default(),
            uses: Mutex::default(),
            stored: AtomicU64::new(0),
            arriving: AtomicU64::new(0),
            counted: AtomicBool::new(false),
            evicting: AtomicBool::new(false),
            alone: Mutex::default(),
        })
    }

    pub(crate) fn prefix(&self) -> &str {
        &self.upstream.prefix
    }

    pub(super) fn is_called(&self, ns: &str) -> bool {
        self.upstream.ns.iter().any(|name| name == ns)
    }

    /// What a repository of the upstream is called here.
    pub(super) fn local(&self, remote: &RepoName) -> Option<RepoName> {
        let rest = remote.as_str().strip_prefix(&self.upstream.remote_prefix)?;
        RepoName::parse(&format!("{}{rest}", self.upstream.prefix))
    }

    /// The repository of the upstream that one of ours stands for.
    pub(super) fn remote(&self, repo: &RepoName) -> Repository {
        let rest = repo.as_str().strip_prefix(&self.upstream.prefix).unwrap_or(repo.as_str());
        self.client.get().repository(&format!("{}{rest}", self.upstream.remote_prefix))
    }

    pub(super) fn refresh(&self, force: bool) {
        self.client.refresh(force);
    }

    /// Bytes that are stored, as far as is known.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.stored.load(Ordering::Relaxed)
    }

    pub(super) fn bytes_max(&self) -> Option<u64> {
        self.upstream.bytes_max.map(|size| size.0)
    }

    /// Finds a manifest, here or at the upstream.
    pub(crate) async fn manifest(
        self: &Arc<Self>,
        repo: &RepoName,
        reference: &Reference,
    ) -> Result<Served, Failure> {
        let place = (repo.clone(), reference.clone());
        if let Some(manifest) = self.stored_manifest(repo, reference)?
            && self.is_fresh(&place)
        {
            Counters::add(&self.counters.hits, 1);
            self.used(repo, &manifest.digest, true);
            return Ok(Served { manifest, is_stale: false });
        }
        Counters::add(&self.counters.misses, 1);
        let this = Arc::clone(self);
        let asked = place.clone();
        let found = self.manifests.join(place, move || async move { this.look_for(asked).await }).await;
        let served = found.unwrap_or(Err(Failure::Upstream("the question to the upstream broke off")))?;
        self.used(repo, &served.manifest.digest, true);
        Ok(served)
    }

    /// Tells the length of a blob, here or at the upstream.
    pub(crate) async fn blob_length(
        self: &Arc<Self>,
        repo: &RepoName,
        digest: &Digest,
    ) -> Result<u64, Failure> {
        if let Some(length) = self.storage.stat_blob(repo, digest)? {
            Counters::add(&self.counters.hits, 1);
            return Ok(length);
        }
        Counters::add(&self.counters.misses, 1);
        let this = Arc::clone(self);
        let place = (repo.clone(), digest.clone());
        let (repo, digest) = place.clone();
        let found = self.lengths.join(place, move || async move {
            let absent = (repo.clone(), Reference::Digest(digest.clone()));
            if this.absent.has(&absent) {
                return Err(Failure::Unknown);
            }
            let _turn = this.turn().await?;
            let length = this.remote(&repo).blob_size(&remote_digest(&digest)?).await;
            match length.map_err(|error| this.failed(&repo, digest.as_str(), &error))? {
                Some(length) => Ok(length),
                None => {
                    this.absent.note(absent);
                    Err(Failure::Unknown)
                }
            }
        });
        found.await.unwrap_or(Err(Failure::Upstream("the question to the upstream broke off")))
    }

    /// Forgets what is known of a repository's content that is taken away.
    pub(crate) fn forget(&self, repo: &RepoName, reference: &Reference) {
        self.checked.forget(&(repo.clone(), reference.clone()));
    }

    /// Notes that a content was used just now.
    pub(super) fn used(self: &Arc<Self>, repo: &RepoName, digest: &Digest, is_manifest: bool) {
        let mut uses = lock(&self.uses);
        uses.insert((repo.clone(), digest.clone()), (is_manifest, SystemTime::now()));
        let is_full = uses.len() == USES_MAX;
        drop(uses);
        if is_full {
            let this = Arc::clone(self);
            tokio::task::spawn_blocking(move || this.keep_uses());
        }
    }

    /// Puts on disk what was used when. Blocks.
    pub(super) fn keep_uses(&self) {
        let uses = std::mem::take(&mut *lock(&self.uses));
        for ((repo, digest), (is_manifest, at)) in uses {
            if let Err(error) = self.storage.set_used(&repo, &digest, is_manifest, at) {
                tracing::warn!(error = %Chain(&error), "it is not kept when a cached content was used");
                return;
            }
        }
    }

    /// Counts bytes that were stored.
    pub(super) fn grown(&self, bytes: u64) {
        self.stored.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Takes contents out in the background if there are more bytes than may stay, or nobody has counted them since the
    /// start.
    pub(crate) fn evict_if_full(self: &Arc<Self>) {
        let Some(bytes_max) = self.bytes_max() else { return };
        let arriving = self.arriving.load(Ordering::Relaxed);
        let is_full = self.stored_bytes().saturating_add(arriving) > bytes_max;
        let is_known_to_fit = self.counted.load(Ordering::Relaxed) && !is_full;
        if is_known_to_fit || self.evicting.swap(true, Ordering::SeqCst) {
            return;
        }
        let this = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            this.evict(0);
            this.evicting.store(false, Ordering::SeqCst);
        });
    }

    /// Takes out what was not used for longest: until what is stored and what is arriving is no more than may stay, and
    /// `short` bytes less are stored than now. Blocks.
    pub(super) fn evict(&self, short: u64) {
        if short > 0 && !self.counted.load(Ordering::Relaxed) {
            self.evict(0);
        }
        let _alone = lock(&self.alone);
        self.keep_uses();
        let before = self.stored_bytes();
        let arriving = self.arriving.load(Ordering::Relaxed);
        let bytes_max = self.bytes_max().map_or(u64::MAX, |max| max.saturating_sub(arriving));
        let bytes_max = match short {
            0 => bytes_max,
            short => bytes_max.min(before.saturating_sub(short)),
        };
        let eviction = Eviction {
            prefix: &self.upstream.prefix,
            bytes_max,
            // Some more than is needed, so that not every blob that comes has another one removed.
            bytes_goal: bytes_max.min(self.bytes_max().map_or(u64::MAX, |max| max / 10 * 9)),
            is_pinned: &|repo, tag| self.rules.is_pinned(repo, tag),
            is_used: &|repo, digest| lock(&self.uses).contains_key(&(repo.clone(), digest.clone())),
        };
        match self.storage.evict(&eviction) {
            Ok(done) => {
                self.counted.store(true, Ordering::Relaxed);
                Counters::add(&self.counters.evicted_bytes, done.removed_bytes);
                // What was stored meanwhile may be counted twice, until the next time.
                let _ = self.stored.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
                    Some(done.kept_bytes.saturating_add(now.saturating_sub(before)))
                });
                if done.removed > 0 {
                    tracing::info!(
                        prefix = self.prefix(),
                        removed = done.removed,
                        bytes = done.removed_bytes,
                        freed_bytes = done.freed_bytes,
                        kept_bytes = done.kept_bytes,
                        "cached content taken out that was not used for longest"
                    );
                }
            }
            Err(error) => {
                tracing::error!(prefix = self.prefix(), error = %Chain(&error), "cached content cannot be taken out");
            }
        }
    }

    /// What went wrong at the upstream; the log tells more than the client hears.
    pub(super) fn failed(&self, repo: &RepoName, what: &str, error: &dvcr_client::Error) -> Failure {
        let failure = match error.kind() {
            ErrorKind::NotFound => return Failure::Unknown,
            ErrorKind::Unauthorized | ErrorKind::Denied => Failure::Denied,
            ErrorKind::Unavailable | ErrorKind::Full => Failure::Upstream("the upstream is not available"),
            ErrorKind::Untrusted => Failure::Upstream("the certificate of the upstream is not trusted"),
            ErrorKind::Mismatch => Failure::Upstream("the upstream has other content than its digest says"),
            _ => Failure::Upstream("the upstream gives answers that cannot be used"),
        };
        Counters::add(&self.counters.failures, 1);
        tracing::warn!(%repo, what, error = %Chain(error), "not fetched");
        failure
    }

    fn stored_manifest(&self, repo: &RepoName, reference: &Reference) -> Result<Option<Manifest>, Failure> {
        let Some(digest) = self.storage.resolve(repo, reference)? else { return Ok(None) };
        // One that is damaged is fetched again.
        Ok(self.storage.sound_manifest(repo, &digest))
    }

    fn is_fresh(&self, place: &Place<Reference>) -> bool {
        match &place.1 {
            Reference::Digest(_) => true,
            Reference::Tag(tag) => self.checked.has(place) || self.rules.is_immutable(&place.0, tag),
        }
    }

    /// Asks the upstream for a manifest, and makes do with what is stored if it gives no answer.
    async fn look_for(self: Arc<Self>, place: Place<Reference>) -> Result<Served, Failure> {
        let (repo, reference) = &place;
        let stored = self.stored_manifest(repo, reference)?;
        let Some(manifest) = stored else {
            if self.absent.has(&place) {
                return Err(Failure::Unknown);
            }
            let found = self.ask(&place, None).await;
            match &found {
                Ok(_) => self.checked.note(place),
                Err(Failure::Unknown) => self.absent.note(place),
                Err(_) => {}
            }
            return found.map(|manifest| Served { manifest, is_stale: false });
        };
        // Somebody may have asked between our look and our turn.
        if self.is_fresh(&place) {
            return Ok(Served { manifest, is_stale: false });
        }
        let found = match self.is_paused() {
            true => Err(Failure::Upstream("the upstream was not available a moment ago")),
            false => match timeout(REVALIDATION_TIMEOUT, self.ask(&place, Some(&manifest))).await {
                Ok(found) => found,
                Err(_) => {
                    Counters::add(&self.counters.failures, 1);
                    tracing::warn!(%repo, what = %shown(reference), "the upstream gives no answer in time");
                    Err(Failure::Upstream("the upstream gives no answer"))
                }
            },
        };
        match found {
            Ok(manifest) => {
                self.checked.note(place);
                Ok(Served { manifest, is_stale: false })
            }
            Err(Failure::Unknown) => {
                if let Reference::Tag(tag) = reference {
                    let (storage, repo, tag) = (Arc::clone(&self.storage), repo.clone(), tag.clone());
                    tracing::info!(%repo, %tag, "the upstream has the tag no longer; it goes here, too");
                    blocking(move || storage.delete_tag(&repo, &tag)).await?;
                }
                self.absent.note(place);
                Err(Failure::Unknown)
            }
            Err(Failure::Upstream(_)) => {
                self.pause();
                Counters::add(&self.counters.stale, 1);
                Ok(Served { manifest, is_stale: true })
            }
            Err(failure) => Err(failure),
        }
    }

    /// Asks the upstream, and stores what it has; `stored` is what a tag names here.
    async fn ask(&self, place: &Place<Reference>, stored: Option<&Manifest>) -> Result<Manifest, Failure> {
        let (repo, reference) = place;
        let _turn = self.turn().await?;
        let what = shown(reference);
        let failed = |error: dvcr_client::Error| self.failed(repo, &what, &error);
        let remote = self.remote(repo);
        let mut target = what.clone();
        if let Some(stored) = stored {
            let now = remote.manifest_digest(&target).await.map_err(failed)?.ok_or(Failure::Unknown)?;
            if now.as_ref() == stored.digest.as_str() {
                return Ok(stored.clone());
            }
            target = now.to_string();
        }
        let fetched = remote.manifest(&target).await.map_err(failed)?;
        Counters::add(&self.counters.fetched_bytes, fetched.bytes.len() as u64);
        let refused = |why: &dyn std::fmt::Display| {
            Counters::add(&self.counters.failures, 1);
            tracing::warn!(%repo, what, %why, "a manifest of the upstream is not taken");
            Failure::Upstream("the upstream has a manifest of a kind that is not taken")
        };
        let digest: Digest = fetched.digest.to_string().parse().map_err(|error| refused(&error))?;
        let checked =
            model::check(&fetched.bytes, Some(&fetched.media_type)).map_err(|error| refused(&error))?;
        if Digest::of(digest.algorithm(), &fetched.bytes) != digest {
            return Err(Failure::Upstream("the upstream has other content than its digest says"));
        }
        let media_type = Arc::from(checked.media_type);
        let manifest = Manifest { digest, bytes: fetched.bytes, media_type };
        let tags = match reference {
            Reference::Tag(tag) => vec![tag.clone()],
            Reference::Digest(_) => Vec::new(),
        };
        let (storage, to, put, subject) =
            (Arc::clone(&self.storage), repo.clone(), manifest.clone(), checked.subject);
        let stored = blocking(move || {
            let _accepting = storage.accepting();
            storage.put_manifest(&to, put, &tags, subject.as_ref())
        });
        match stored.await {
            Ok(()) => {
                self.grown(manifest.bytes.len() as u64);
                tracing::info!(%repo, what, digest = %manifest.digest, "manifest fetched");
            }
            // It is what the client asked for, all the same.
            Err(error) => tracing::error!(%repo, what, %error, "a manifest was fetched and cannot be stored"),
        }
        Ok(manifest)
    }

    /// Waits for the turn of a question.
    async fn turn(&self) -> Result<SemaphorePermit<'_>, Failure> {
        timeout(TURN_TIMEOUT, self.questions.acquire()).await.ok().and_then(Result::ok).ok_or(Failure::Busy)
    }

    fn pause(&self) {
        let mut paused = lock(&self.paused);
        if paused.is_none_or(|since| since.elapsed() >= PAUSE) {
            *paused = Some(Instant::now());
        }
    }

    fn is_paused(&self) -> bool {
        lock(&self.paused).is_some_and(|since| since.elapsed() < PAUSE)
    }
}

/// A tag or a digest, as it is asked for.
fn shown(reference: &Reference) -> String {
    match reference {
        Reference::Tag(tag) => tag.to_string(),
        Reference::Digest(digest) => digest.to_string(),
    }
}

/// A digest as the client has it.
pub(super) fn remote_digest(digest: &Digest) -> Result<dvcr_client::digest::Digest, Failure> {
    dvcr_client::digest::parse(digest.as_str()).map_err(|_| Failure::Unknown)
}

/// Runs what blocks on a thread of its own.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> crate::storage::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(error) => {
            let error = std::io::Error::other(error);
            Err(crate::storage::Error::new("work on the cache did not end well", error).into())
        }
    }
}

/// Makes the client of an upstream from its files.
fn client(upstream: &Upstream) -> Result<Registry> {
    let invalid = |error: dvcr_client::Error| Error::Invalid {
        why: format!("the upstream of {}: {}", upstream.prefix, Chain(&error)),
    };
    let host = upstream.url.split_once("://").map_or("", |(_, host)| host.trim_end_matches('/'));
    let credentials = match (&upstream.username, &upstream.password_file, &upstream.auth_file) {
        (Some(username), Some(file), _) => {
            let password = String::from_utf8(reload::read(file, PASSWORD_BYTES_MAX)?)
                .map_err(|_| Error::Secret { path: file.clone(), why: "is not text" })?;
            let password = password.trim_end_matches(['\r', '\n']).to_owned();
            Some(Credentials { username: username.clone(), password })
        }
        (_, _, Some(file)) => {
            let store = AuthStore::discover(Some(file), |_| None).map_err(invalid)?;
            let found = store.of_host(host).cloned();
            if found.is_none() {
                tracing::warn!(file = %file.display(), host, "the file has no credentials for the upstream");
            }
            found
        }
        _ => None,
    };
    let roots = match &upstream.ca_file {
        Some(file) => reload::read(file, PEM_BYTES_MAX)?,
        None => Vec::new(),
    };
    let options = RegistryOptions {
        credentials,
        roots,
        response_timeout: RESPONSE_TIMEOUT,
        attempts_max: ATTEMPTS_MAX,
    };
    Registry::open(&upstream.url, options).map_err(invalid)
}
