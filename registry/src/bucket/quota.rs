//! Byte quotas that replicas keep together: a ledger per prefix of repositories, replaced by `If-Match` alone.
//!
//! ```text
//!  reach ──> held: the upload may have so many bytes ──> link placed ──> placed: they are the prefix's
//!                                                   └──> release
//!  count ──> since = 0 ... list links, look at blobs ... bytes = what was found + since
//! ```
//!
//! Bytes are held before a link is placed, and become the prefix's afterwards: so a count that goes on meanwhile sees the link, or
//! the bytes come to it as `since`; both at worst. What two repositories below a prefix share is added twice, and what is removed
//! stays, until the prefix is counted again, which a collection does, and whoever would be refused. So the ledger never says too
//! little, and nobody is refused by one that says too much.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use uuid::Uuid;

use super::found;
use super::keys::Keys;
use crate::digest::Digest;
use crate::names::RepoName;
use crate::s3::{self, Client, Kind, Put};
use crate::storage::quota::{Exceeded, Limits, Quota, Usage};
use crate::store::{self, Error, Result};

/// Largest ledger, bytes.
const LEDGER_BYTES_MAX: u64 = 1 << 20;
/// Uploads that hold bytes of one prefix.
const HELD_MAX: usize = 4096;
/// Bytes held at a time for an upload that does not tell its length, if there are so many.
const GRANT_BYTES: u64 = 64 << 20;
/// How long bytes are held for an upload that does not ask again.
const HELD_TIME: Duration = Duration::from_secs(86_400);
/// How often a change is tried that others get before.
const CHANGES_MAX: u32 = 60;
/// Pause after others got before, by chance up to so long.
const CHANGE_PAUSE_MS_MAX: u64 = 50;
/// A count this young is not made again for one who would be refused.
const COUNT_AGE_MIN: Duration = Duration::from_secs(20);
/// A count that takes longer is taken to be that of a replica which is gone.
const COUNT_TIME_MAX: Duration = Duration::from_secs(120);
/// How often one looks whether another replica has counted, and the pause between two looks.
const COUNT_LOOKS_MAX: u32 = 600;
const COUNT_LOOK_PAUSE: Duration = Duration::from_millis(250);
/// Blobs whose length is asked for at a time.
const LOOKS_MAX: usize = 32;
/// Prefixes whose ledger is remembered; when there are more all are read again.
const PREFIXES_MAX: usize = 1024;

/// The quotas of a bucket. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Quotas(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limits: Limits,
    client: Client,
    keys: Keys,
    runtime: Handle,
    known: Mutex<HashMap<String, Arc<Known>>>,
}

/// What this replica knows of a ledger; one request of ours changes it at a time.
#[derive(Debug)]
struct Known {
    limit: u64,
    /// As it was last read or written, with its ETag; `None` if that is to be read again.
    last: tokio::sync::Mutex<Option<(Ledger, String)>>,
    /// Held by the one who counts.
    counting: tokio::sync::Mutex<()>,
    /// Bytes, for those who watch; `None` before the first look.
    used: Mutex<Option<u64>>,
}

/// What a prefix has. Times are seconds since 1970 by the server's clock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Ledger {
    /// Bytes of its blobs and manifests.
    bytes: u64,
    /// When the last count of them began.
    counted: Option<u64>,
    /// By the upload's id.
    held: BTreeMap<String, Held>,
    count: Option<Count>,
}

/// Bytes that an upload may have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    bytes: u64,
    until: u64,
}

/// A count that goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Count {
    id: String,
    began: u64,
    /// Bytes that were placed meanwhile.
    since: u64,
}

/// What one upload has been granted; what it does not keep is given back when it is dropped.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// `None` where there is no quota.
    of: Option<(Quotas, Arc<Known>, String)>,
    id: Uuid,
    granted: u64,
    kept: AtomicU64,
    /// An upload of no more bytes needs no room: it is to be a blob of this length that the repository has.
    known: u64,
    /// What the prefix has more when the link is placed.
    new: u64,
}

impl Ledger {
    fn used(&self) -> u64 {
        self.held.values().fold(self.bytes, |sum, held| sum.saturating_add(held.bytes))
    }

    /// Holds bytes for an upload, if the limit leaves so many.
    fn hold(&mut self, id: &str, bytes: u64, limit: u64, now: u64) -> Result<(), Refused> {
        if self.counted.is_none() {
            return Err(Refused::Full { used: 0, more: bytes });
        }
        if self.held.len() >= HELD_MAX && !self.held.contains_key(id) {
            return Err(Refused::Crowded);
        }
        let had = self.held.get(id).map_or(0, |held| held.bytes);
        let more = bytes.saturating_sub(had);
        let used = self.used();
        if used.checked_add(more).is_none_or(|all| all > limit) {
            return Err(Refused::Full { used, more });
        }
        self.held.insert(
            id.to_owned(),
            Held { bytes: bytes.max(had), until: now.saturating_add(HELD_TIME.as_secs()) },
        );
        Ok(())
    }

    fn placed(&mut self, id: &str, bytes: u64) {
        self.held.remove(id);
        self.bytes = self.bytes.saturating_add(bytes);
        if let Some(count) = &mut self.count {
            count.since = count.since.saturating_add(bytes);
        }
    }

    /// Ends a count; `false` if another replica took it over.
    fn counted(&mut self, count: &Count, found: u64) -> bool {
        let since = match self.count.take() {
            Some(going) if going.id == count.id => going.since,
            other => {
                self.count = other;
                return false;
            }
        };
        self.bytes = found.saturating_add(since);
        self.counted = Some(count.began);
        // A link of theirs would have been placed before this count began.
        self.held.retain(|_, held| held.until >= count.began);
        true
    }
}

/// Who counts.
enum Counting {
    Done,
    Elsewhere,
    Here(Count),
}

/// Why an upload may not have its bytes, by what the ledger says.
#[derive(Clone, Copy, Debug)]
enum Refused {
    /// The limit leaves no room.
    Full { used: u64, more: u64 },
    /// So many others hold bytes that the ledger has no place for one more.
    Crowded,
}

impl Refused {
    fn into_error(self, prefix: &str, limit: u64) -> Error {
        match self {
            Self::Full { used, more } => {
                let exceeded = Exceeded { prefix: prefix.to_owned(), limit, used, more };
                Error::of(store::Kind::Exceeded, "a quota is used up", exceeded)
            }
            Self::Crowded => {
                let why =
                    format!("{HELD_MAX} uploads below {prefix} are under way, or were left within a day");
                let told = "too many uploads hold bytes of a quota; try again when some of them have ended";
                Error::of(store::Kind::Unavailable, told, why)
            }
        }
    }
}

impl Quotas {
    pub(super) fn new(quotas: Vec<Quota>, client: Client, keys: Keys, runtime: Handle) -> Self {
        let limits = Limits::new(quotas);
        Self(Arc::new(Inner { limits, client, keys, runtime, known: Mutex::default() }))
    }

    /// Returns the room of an upload, which has `had` bytes of it.
    pub(super) fn room(&self, repo: &RepoName, id: Uuid, had: u64) -> Room {
        let of = self.0.limits.of(repo).map(|(prefix, limit)| {
            let mut known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.len() >= PREFIXES_MAX {
                known.retain(|_, known| Arc::strong_count(known) > 1);
            }
            let new = || {
                Arc::new(Known {
                    limit,
                    last: Default::default(),
                    counting: Default::default(),
                    used: Mutex::default(),
                })
            };
            let known = Arc::clone(known.entry(prefix.to_owned()).or_insert_with(new));
            (self.clone(), known, prefix.to_owned())
        });
        Room { of, id, granted: had, kept: AtomicU64::new(had), known: 0, new: 0 }
    }

    /// Tells what is known of each prefix, without asking.
    pub(super) fn usage(&self) -> Vec<Usage> {
        let known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        let usage = |(prefix, known): (&String, &Arc<Known>)| Usage {
            prefix: prefix.clone(),
            limit: known.limit,
            used: *known.used.lock().unwrap_or_else(PoisonError::into_inner),
        };
        self.0.limits.usage(known.iter().map(usage))
    }

    /// Counts every prefix again that has a ledger: what was collected is free from then on.
    pub(super) async fn count_all(&self) -> Result<()> {
        let mut pages = self.0.client.pages(self.0.keys.ledgers(), None);
        while let Some(page) = pages.try_next().await? {
            for (key, _) in &page {
                let Some(of) = self.0.keys.prefix_of_ledger(key) else { continue };
                // Any name below it tells whether there still is such a quota.
                let Some(repo) = RepoName::parse(&format!("{of}x")) else { continue };
                let room = self.room(&repo, Uuid::nil(), 0);
                if let Some((_, known, prefix)) = room.of.as_ref().filter(|(_, _, prefix)| prefix == of) {
                    // One that began in this second may have begun too early.
                    self.count(prefix, known, self.now().await?.saturating_add(1)).await?;
                }
            }
        }
        Ok(())
    }

    /// Changes a ledger, and returns what `change` does.
    ///
    /// It is called again when somebody else got before, and once more when it fails by a ledger that is not the newest; what fails
    /// changes nothing.
    async fn change<T, E>(
        &self,
        prefix: &str,
        known: &Known,
        mut change: impl FnMut(&mut Ledger, u64) -> Result<T, E>,
    ) -> Result<Result<T, E>> {
        let (client, key) = (&self.0.client, self.0.keys.ledger(prefix));
        let mut last = known.last.lock().await;
        for _ in 0..CHANGES_MAX {
            let remembered = last.take();
            let is_remembered = remembered.is_some();
            let read = match remembered {
                Some(remembered) => Some(remembered),
                None => read(client, &key).await?,
            };
            let (before, etag) = read.map_or_else(Default::default, |(ledger, etag)| (ledger, Some(etag)));
            let mut ledger = before.clone();
            let changed = change(&mut ledger, self.now().await?);
            if changed.is_err() && is_remembered {
                continue;
            }
            if changed.is_err() || ledger == before {
                known.tell(&before);
                *last = etag.map(|etag| (before, etag));
                return Ok(changed);
            }
            let content = serde_json::to_vec(&ledger)
                .map_err(|error| Error::of(store::Kind::Other, "cannot write a ledger", error))?;
            let put = etag.map_or_else(Put::new, Put::over);
            match client.put(&key, Bytes::from(content), put).await {
                Ok(etag) => {
                    known.tell(&ledger);
                    *last = Some((ledger, etag));
                    return Ok(changed);
                }
                Err(error) if matches!(error.kind(), Kind::Precondition | Kind::NotFound) => pause().await,
                Err(error) => return Err(error.into()),
            }
        }
        let why = format!("other replicas change {key} all the time");
        Err(Error::of(store::Kind::Unavailable, "cannot keep a quota", why))
    }

    /// Has `ask` ask a ledger for room; one that refuses is counted again first, unless that was done just now.
    async fn ask<T>(
        &self,
        prefix: &str,
        known: &Known,
        ask: impl Fn(&mut Ledger, u64) -> Result<T, Refused>,
    ) -> Result<T> {
        let began = self.now().await?;
        let mut is_counted = false;
        loop {
            let asked = self.change(prefix, known, |ledger, now| {
                ask(ledger, now).map_err(|refused| (refused, ledger.counted))
            });
            let (refused, counted) = match asked.await? {
                Ok(granted) => return Ok(granted),
                Err(refused) => refused,
            };
            let since = began.saturating_sub(COUNT_AGE_MIN.as_secs());
            if is_counted || counted.is_some_and(|counted| counted >= since) {
                return Err(refused.into_error(prefix, known.limit));
            }
            self.count(prefix, known, since).await?;
            is_counted = true;
        }
    }

    /// Counts a prefix, unless that was done since a time; one replica does, and the others wait for it.
    async fn count(&self, prefix: &str, known: &Known, since: u64) -> Result<()> {
        let _one = known.counting.lock().await;
        for _ in 0..COUNT_LOOKS_MAX {
            let begun = self.change(prefix, known, |ledger, now| {
                let is_done = ledger.counted.is_some_and(|counted| counted >= since);
                let is_going = |count: &Count| count.began.saturating_add(COUNT_TIME_MAX.as_secs()) > now;
                Ok::<_, Never>(match &ledger.count {
                    _ if is_done => Counting::Done,
                    Some(count) if is_going(count) => Counting::Elsewhere,
                    _ => {
                        let count = Count { id: Uuid::new_v4().to_string(), began: now, since: 0 };
                        Counting::Here(ledger.count.insert(count).clone())
                    }
                })
            });
            let Ok(begun) = begun.await?;
            match begun {
                Counting::Done => return Ok(()),
                Counting::Elsewhere => tokio::time::sleep(COUNT_LOOK_PAUSE).await,
                Counting::Here(count) => {
                    let found = self.look_through(prefix).await?;
                    let end = |ledger: &mut Ledger, _| Ok::<_, Never>(ledger.counted(&count, found));
                    if let Ok(true) = self.change(prefix, known, end).await? {
                        return Ok(());
                    }
                }
            }
        }
        let why = format!("another replica counts {prefix} all the time");
        Err(Error::of(store::Kind::Unavailable, "cannot keep a quota", why))
    }

    /// Adds up the distinct blobs and manifests that the repositories of a prefix have.
    async fn look_through(&self, prefix: &str) -> Result<u64> {
        let Inner { client, keys, limits, .. } = &*self.0;
        let (base, mut bytes, mut seen) = (keys.repositories(), 0_u64, HashSet::new());
        let mut pages = client.pages(format!("{base}{prefix}"), None);
        while let Some(page) = pages.try_next().await? {
            let mut new = Vec::new();
            for (key, _) in &page {
                let Some((repo, digest)) = key.strip_prefix(&base).and_then(link) else { continue };
                // A longer prefix may have taken the repository.
                if limits.of(&repo).is_some_and(|(of, _)| of == prefix) && seen.insert(digest.clone()) {
                    new.push(digest);
                }
            }
            let looks = new.into_iter().map(|digest| async move {
                let head = found(client.head(&keys.blob(&digest)).await)?;
                Ok::<_, s3::Error>(head.map_or(0, |head| head.bytes))
            });
            let looks = stream::iter(looks).buffer_unordered(LOOKS_MAX);
            bytes = looks.try_fold(bytes, async |sum, more| Ok(sum.saturating_add(more))).await?;
        }
        Ok(bytes)
    }

    /// Seconds since 1970 by the server's clock.
    async fn now(&self) -> Result<u64> {
        let now = self.0.client.server_now().await?.earliest;
        Ok(now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
    }
}

impl Known {
    fn tell(&self, ledger: &Ledger) {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Some(ledger.used());
    }
}

impl Room {
    /// Makes room for an upload of so many bytes.
    ///
    /// # Errors
    /// When the quota does not leave so many, by a count that is new; [`Error::exceeded`] tells.
    pub(super) async fn reach(&mut self, bytes: u64) -> Result<()> {
        let Some((quotas, known, prefix)) = self.of.as_ref().filter(|_| bytes > self.granted.max(self.known))
        else {
            return Ok(());
        };
        let (id, limit) = (self.id.to_string(), known.limit);
        let generous = match self.granted {
            // Most uploads tell their length with the first word.
            0 => bytes,
            granted => bytes.max(granted.saturating_add(GRANT_BYTES)),
        };
        let hold = |ledger: &mut Ledger, now| {
            let more = ledger.hold(&id, generous, limit, now).map(|()| generous);
            more.or_else(|_| ledger.hold(&id, bytes, limit, now).map(|()| bytes))
        };
        self.granted = quotas.ask(prefix, known, hold).await?;
        Ok(())
    }

    /// Tells whether there is room for an upload of so many bytes, and holds none.
    ///
    /// # Errors
    /// As [`Self::reach`].
    pub(super) async fn check(&self, bytes: u64) -> Result<()> {
        let Some((quotas, known, prefix)) = &self.of else { return Ok(()) };
        let (id, limit) = (self.id.to_string(), known.limit);
        let look = |ledger: &mut Ledger, now| ledger.clone().hold(&id, bytes, limit, now);
        quotas.ask(prefix, known, look).await
    }

    /// Makes room for so many bytes that a link is about to give to the repository, unless the link is there.
    ///
    /// # Errors
    /// As [`Self::reach`].
    pub(super) async fn make_way(&mut self, link: &str, bytes: u64) -> Result<()> {
        let Some((quotas, ..)) = &self.of else { return Ok(()) };
        let link = found(quotas.0.client.head(link).await)?;
        if link.is_none_or(|link| link.bytes == 0) {
            self.reach(bytes).await?;
            self.new = bytes;
        }
        Ok(())
    }

    /// Whether there is a quota.
    pub(super) fn is_bounded(&self) -> bool {
        self.of.is_some()
    }

    /// Has an upload of up to so many bytes need no room.
    pub(super) fn know(&mut self, bytes: u64) {
        self.known = bytes;
    }

    /// Tells what of the upload stays in the bucket when the request ends.
    pub(super) fn keep(&self, bytes: u64) {
        self.kept.store(bytes, Ordering::Relaxed);
    }

    /// Gives the bytes to the prefix: the link is placed that [`Self::make_way`] was told of.
    pub(super) async fn placed(mut self) {
        let (granted, new) = (self.granted, self.new);
        if let Some((quotas, known, prefix)) = self.of.take().filter(|_| granted > 0 || new > 0) {
            quotas.end(&prefix, &known, self.id, End::Placed(new)).await;
        }
    }
}

/// What becomes of the bytes that are held for an upload.
#[derive(Clone, Copy, Debug)]
enum End {
    /// So many are the prefix's.
    Placed(u64),
    /// So many are still held.
    Kept(u64),
}

impl Quotas {
    /// Should that fail, the bytes are held until their time is over, or the prefix is counted.
    async fn end(&self, prefix: &str, known: &Known, id: Uuid, end: End) {
        let id = id.to_string();
        let ended = self.change(prefix, known, |ledger, _| {
            match end {
                End::Placed(bytes) => ledger.placed(&id, bytes),
                End::Kept(0) => drop(ledger.held.remove(&id)),
                End::Kept(bytes) => {
                    if let Some(held) = ledger.held.get_mut(&id) {
                        held.bytes = bytes;
                    }
                }
            }
            Ok::<_, Never>(())
        });
        if let Err(error) = ended.await {
            tracing::warn!(prefix, %error, "bytes of a quota stay taken until they are counted again");
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let kept = *self.kept.get_mut();
        let Some((quotas, known, prefix)) = self.of.take().filter(|_| self.granted != kept) else { return };
        let (runtime, id) = (quotas.0.runtime.clone(), self.id);
        runtime.spawn(async move { quotas.end(&prefix, &known, id, End::Kept(kept)).await });
    }
}

/// What cannot be.
type Never = std::convert::Infallible;

async fn read(client: &Client, key: &str) -> Result<Option<(Ledger, String)>> {
    let Some(object) = found(client.get(key, LEDGER_BYTES_MAX).await)? else { return Ok(None) };
    let ledger = serde_json::from_slice(&object.content).map_err(|error| {
        let why = format!("{key} is no ledger of a quota; remove it, and it is counted anew");
        Error::of(store::Kind::Other, why, error)
    })?;
    Ok(Some((ledger, object.etag)))
}

/// Reads the repository and the digest of a link from its key.
fn link(key: &str) -> Option<(RepoName, Digest)> {
    let rest = key.strip_suffix("/link")?;
    let (rest, hex) = rest.rsplit_once('/')?;
    let (rest, algorithm) = rest.rsplit_once('/')?;
    let repo = rest.strip_suffix("/_layers").or_else(|| rest.strip_suffix("/_manifests/revisions"))?;
    Some((RepoName::parse(repo)?, format!("{algorithm}:{hex}").parse().ok()?))
}

/// Waits by chance, so that those who met do not meet again.
async fn pause() {
    let [byte, ..] = Uuid::new_v4().into_bytes();
    tokio::time::sleep(Duration::from_millis(u64::from(byte) * CHANGE_PAUSE_MS_MAX / 255)).await;
}

#[cfg(test)]
mod tests {
    use dvcr_tests::{S3Server, temp_dir};
    use proptest::prelude::*;

    use super::super::{Bucket, Extras, Options, Timing};
    use super::*;
    use crate::digest::Algorithm;
    use crate::s3::testing;
    use crate::store::{Store, UploadError};

    const LIMIT: u64 = 1000;

    fn counted() -> Ledger {
        Ledger { counted: Some(0), ..Ledger::default() }
    }

    #[test]
    fn bytes_are_held_once_and_only_as_far_as_the_limit_goes() {
        let (mut ledger, [a, b]) = (counted(), ["a", "b"]);
        ledger.hold(a, 600, LIMIT, 0).unwrap();
        ledger.hold(a, 600, LIMIT, 0).unwrap();
        assert!(matches!(ledger.hold(b, 401, LIMIT, 0), Err(Refused::Full { used: 600, more: 401 })));
        ledger.hold(b, 400, LIMIT, 0).unwrap();
        ledger.placed(a, 600);
        assert_eq!((ledger.bytes, ledger.used()), (600, 1000));
        assert!(Ledger::default().hold(a, 1, LIMIT, 0).is_err(), "nothing is granted before it is counted");
    }

    #[test]
    fn that_too_many_uploads_are_under_way_is_not_told_as_a_quota_that_is_used_up() {
        let (mut ledger, limit) = (counted(), u64::MAX);
        for n in 0..HELD_MAX {
            ledger.hold(&n.to_string(), 1, limit, 0).unwrap();
        }
        ledger.hold("0", 2, limit, 0).expect("it is one of them");
        let refused = ledger.hold("one more", 1, limit, 0).unwrap_err().into_error("q/", limit);
        assert!(refused.kind() == store::Kind::Unavailable && refused.exceeded().is_none(), "{refused:?}");
    }

    #[test]
    fn the_bytes_of_a_killed_replica_are_free_when_their_time_is_over() {
        let mut ledger = counted();
        ledger.hold("a", 10, LIMIT, 100).unwrap();
        let count = |began: u64| Count { id: began.to_string(), began, since: 0 };
        for (began, held) in [(100, 10), (100 + HELD_TIME.as_secs(), 10), (101 + HELD_TIME.as_secs(), 0)] {
            ledger.count = Some(count(began));
            assert!(ledger.counted(&count(began), 0));
            assert_eq!(ledger.used(), held);
        }
        ledger.count = Some(count(7));
        assert!(!ledger.counted(&count(8), 0), "another replica counts");
        assert_eq!(ledger.count, Some(count(7)));
    }

    #[test]
    fn links_are_told_by_their_keys() {
        let hex = "ab".repeat(32);
        for (key, is_link) in [
            (format!("a/b/_layers/sha256/{hex}/link"), true),
            (format!("a/b/_manifests/revisions/sha256/{hex}/link"), true),
            (format!("a/b/_manifests/tags/v1/index/sha256/{hex}/link"), false),
            ("a/b/_manifests/tags/v1/current/link".to_owned(), false),
            (format!("a/b/_layers/sha256/{}/link", &hex[1..]), false),
        ] {
            assert_eq!(
                link(&key).map(|(repo, _)| repo.to_string()),
                is_link.then(|| "a/b".to_owned()),
                "{key}"
            );
        }
    }

    #[test]
    fn of_replicas_that_push_at_once_no_more_is_taken_than_the_quota_leaves() {
        let (server, keys) = (S3Server::shared_minio(), temp_dir());
        let mut settings = testing::settings(&server, &keys);
        settings.bucket = server.new_bucket().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let open = || {
            let options = Options { grace: Duration::from_secs(3600), timing: Timing::default() };
            let quotas = vec!["q/=10000".parse().unwrap(), "q/free/=1M".parse().unwrap()];
            let extras = Extras { quotas, kept: None };
            runtime.block_on(Bucket::open_with(settings.clone(), options, extras)).unwrap()
        };
        let replicas = [open(), open()];
        let repo = |name: &str| RepoName::parse(name).unwrap();
        let content = |n: usize| format!("{n:01000}");
        let digest = |n: usize| Digest::of(Algorithm::Sha256, content(n).as_bytes());
        let push = |replica: &Arc<Bucket>, name: &str, n: usize| -> Result<(), UploadError> {
            let mut session = Store::start_upload(Arc::clone(replica), &repo(name), Algorithm::Sha256)?;
            session.admit(Some(1000), Some(&digest(n)))?;
            session.commit_small(content(n).as_bytes(), &digest(n))
        };
        let is_refused = |done: &Result<(), UploadError>| match done {
            Err(UploadError::Store(error)) => error.exceeded().is_some(),
            _ => false,
        };
        let done: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..24)
                .map(|n| {
                    let replica = &replicas[n % 2];
                    scope.spawn(move || (n, push(replica, ["q/a", "q/b"][n / 2 % 2], n)))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let (taken, refused): (Vec<_>, Vec<_>) = done.iter().partition(|(_, done)| done.is_ok());
        assert!(refused.iter().all(|(_, done)| is_refused(done)), "{refused:?}");
        assert_eq!(taken.len(), 10);
        let name = |n: usize| ["q/a", "q/b"][n / 2 % 2];
        let (had, had_not) = (taken[0].0, refused[0].0);
        push(&replicas[1], name(had), had).unwrap();
        push(&replicas[0], "q/free/c", had_not).unwrap();
        let used = |replica: &Bucket| replica.quotas.usage().into_iter().find(|usage| usage.prefix == "q/");
        assert_eq!(used(&replicas[1]).unwrap().used, Some(10_000));
        let asked = |bytes| replicas[1].has_room(&repo("q/a"), bytes);
        let refused = asked(1).unwrap_err();
        assert_eq!(refused.exceeded().map(|no| (no.limit, no.used, no.more)), Some((10_000, 10_000, 1)));
        assert!(replicas[0].wait(replicas[0].delete_blob(&repo(name(had)), &digest(had))).unwrap());
        replicas[0].wait(replicas[0].quotas.count_all()).unwrap();
        for _ in 0..3 {
            asked(1000).unwrap();
            assert!(asked(1001).is_err());
        }
        assert!(is_refused(&push(&replicas[1], name(had), 99).and_then(|()| push(
            &replicas[0],
            name(had),
            98
        ))));
        assert_eq!(used(&replicas[0]).unwrap().used, Some(10_000));
    }

    /// What happens to a prefix with links of one byte each.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Hold(u8),
        Link(u8),
        Place(u8),
        Begin,
        /// The listing comes to this link, and sees it if it is there.
        See(u8),
        End,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let uploads = 0..6_u8;
        let step = prop_oneof![
            uploads.clone().prop_map(Step::Hold),
            uploads.clone().prop_map(Step::Link),
            uploads.clone().prop_map(Step::Place),
            Just(Step::Begin),
            uploads.prop_map(Step::See),
            Just(Step::End),
        ];
        prop::collection::vec(step, 1..80)
    }

    proptest! {
        /// In whatever order uploads and a count take their steps.
        #[test]
        fn a_ledger_never_says_less_than_there_is(steps in steps()) {
            let (mut ledger, mut held, mut linked, mut placed) = (counted(), [false; 6], [false; 6], [false; 6]);
            let mut going: Option<(Count, [Option<bool>; 6])> = None;
            for (n, step) in steps.into_iter().enumerate() {
                let id = |n: u8| n.to_string();
                match step {
                    Step::Hold(n) if !held[usize::from(n)] => {
                        ledger.hold(&id(n), 1, LIMIT, 0).unwrap();
                        held[usize::from(n)] = true;
                    }
                    Step::Link(n) if held[usize::from(n)] => linked[usize::from(n)] = true,
                    Step::Place(n) if linked[usize::from(n)] && !placed[usize::from(n)] => {
                        ledger.placed(&id(n), 1);
                        placed[usize::from(n)] = true;
                    }
                    Step::Begin => {
                        let count = Count { id: n.to_string(), began: 0, since: 0 };
                        ledger.count = Some(count.clone());
                        going = Some((count, [None; 6]));
                    }
                    Step::See(n) => {
                        if let Some((_, seen)) = &mut going {
                            seen[usize::from(n)].get_or_insert(linked[usize::from(n)]);
                        }
                    }
                    Step::End => {
                        if let Some((count, seen)) = going.take() {
                            let found = (0..6).filter(|n| seen[*n].unwrap_or(linked[*n])).count() as u64;
                            ledger.counted(&count, found);
                        }
                    }
                    _ => {}
                }
                let there = linked.iter().filter(|linked| **linked).count() as u64;
                prop_assert!(ledger.used() >= there, "{ledger:?} where {there} are there");
            }
        }
    }
}
