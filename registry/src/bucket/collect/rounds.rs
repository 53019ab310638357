//! The rounds of a run: each says what is about to go, spares of it what is claimed, and removes the rest.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream::TryStreamExt;
use uuid::Uuid;

use super::super::Bucket;
use super::super::condemned::{self, Condemned};
use super::super::lease::{Lease, is_taken, lost};
use super::super::run::{Phase, State};
use super::{STEP, check};
use crate::digest::Digest;
use crate::lock;
use crate::s3::{self, DELETE_KEYS_MAX, Kind, Listing, Put, Validity};
use crate::storage::pace::Pace;
use crate::store::Result;

/// Requests that remove, under way at a time.
const AT_ONCE_MAX: usize = 4;
/// How often what was not removed is tried again, since the request came too late or the store was not well.
const ATTEMPTS_MAX: u32 = 5;

/// Something that nobody needs.
#[derive(Clone, Debug)]
pub(super) struct Garbage {
    pub(super) what: Condemned,
    /// What its removal frees.
    pub(super) bytes: u64,
    /// The digest under which a layer is stored, if that is another than its name.
    pub(super) target: Option<Digest>,
}

impl From<Condemned> for Garbage {
    fn from(what: Condemned) -> Self {
        Self { what, bytes: 0, target: None }
    }
}

impl Garbage {
    /// What it is claimed by, and what stays with it.
    pub(super) fn digests(&self) -> impl Iterator<Item = &Digest> {
        let named = match &self.what {
            Condemned::Blob(digest)
            | Condemned::Layer { digest, .. }
            | Condemned::Manifest { digest, .. } => Some(digest),
            Condemned::Tag { .. } => None,
        };
        named.into_iter().chain(&self.target)
    }
}

/// The removals whose answers are not known: until when they may still take effect.
#[derive(Debug, Default)]
pub(super) struct Flight(Mutex<Vec<SystemTime>>);

impl Flight {
    /// Returns the end of the validity of the last of them.
    pub(super) fn until(&self) -> Option<SystemTime> {
        lock(&self.0).iter().max().copied()
    }

    fn take_off(&self, validity: Validity) {
        lock(&self.0).push(validity.end());
    }

    /// Its answer came, and it was sent once.
    fn land(&self, validity: Validity) {
        let mut all = lock(&self.0);
        if let Some(at) = all.iter().position(|end| *end == validity.end()) {
            all.swap_remove(at);
        }
    }

    fn clear(&self) {
        lock(&self.0).clear();
    }
}

/// A run that is on, and whose state this replica has written last.
pub(super) struct Rounds<'a> {
    bucket: &'a Bucket,
    lease: &'a Lease<'a>,
    flight: &'a Flight,
    stop: &'a AtomicBool,
    state: State,
    run: Uuid,
    round: u32,
    pace: Mutex<Pace>,
    /// When nobody places a link any more who does not know of the run.
    marking: SystemTime,
    /// What runs have left that ended before their time.
    dead: Vec<String>,
}

impl<'a> Rounds<'a> {
    /// Begins a run; returns also the server's time, at the earliest, when that was.
    pub(super) async fn announce(
        bucket: &'a Bucket,
        lease: &'a Lease<'a>,
        flight: &'a Flight,
        stop: &'a AtomicBool,
        state: State,
        removals_per_second: u64,
    ) -> Result<(Self, SystemTime)> {
        let collections = bucket.keys.collections();
        let listing = Listing { prefix: &collections, delimiter: Some('/'), ..Listing::default() };
        // Listed before the announcement, so that it cannot be a run of another, who takes over from us.
        let dead = bucket.client.list(listing, None).await?.prefixes;
        let (run, begun) = (Uuid::new_v4(), bucket.client.server_now().await?.earliest);
        let pace = Mutex::new(Pace::new(Some(removals_per_second)));
        let mut rounds =
            Self { bucket, lease, flight, stop, state, run, round: 0, pace, marking: begun, dead };
        rounds.replace(Phase::Marking { run }).await?;
        let timing = &bucket.options.timing;
        rounds.marking =
            bucket.client.server_now().await?.latest + timing.validity.saturating_add(timing.settling());
        Ok((rounds, begun))
    }

    /// Goes on with the round of another, who cannot write the state any more then.
    pub(super) async fn adopt(
        bucket: &'a Bucket,
        lease: &'a Lease<'a>,
        flight: &'a Flight,
        stop: &'a AtomicBool,
        state: State,
    ) -> Result<Self> {
        let run = state.phase.run().unwrap_or_default();
        let (pace, phase, marking) = (Mutex::new(Pace::new(None)), state.phase, SystemTime::UNIX_EPOCH);
        let mut rounds =
            Self { bucket, lease, flight, stop, state, run, round: 0, pace, marking, dead: Vec::new() };
        rounds.replace(phase).await?;
        Ok(rounds)
    }

    /// Waits until all links that were placed without knowing of the run are there, and tidies up meanwhile.
    pub(super) async fn await_marking(&mut self) -> Result<()> {
        for dead in mem::take(&mut self.dead) {
            self.clear(&dead).await;
        }
        self.wait_for(self.marking).await
    }

    /// Condemns up to [`condemned::ROUND_ENTRIES_MAX`] things and removes them; returns what is removed, and what is not.
    ///
    /// # Errors
    /// When another replica has taken over, `stop` is set, or the store fails.
    pub(super) async fn condemn(&mut self, garbage: Vec<Garbage>) -> Result<(Vec<Garbage>, Vec<Garbage>)> {
        check(self.stop)?;
        self.round = self.round.saturating_add(1);
        let key = self.bucket.keys.condemned(self.run, self.round);
        let list = condemned::write(garbage.iter().map(|garbage| &garbage.what));
        self.bucket.client.put(&key, Bytes::from(list), Put::default()).await?;
        self.replace(Phase::Condemned { run: self.run, round: self.round }).await?;
        self.remove(garbage).await
    }

    /// Removes what the state says to be condemned, but for what is claimed.
    pub(super) async fn remove(&mut self, garbage: Vec<Garbage>) -> Result<(Vec<Garbage>, Vec<Garbage>)> {
        let claimed = self.bucket.claimed(self.run).await?;
        let is_claimed = |garbage: &Garbage| {
            claimed.contains(&garbage.what.claim())
                || garbage.target.as_ref().is_some_and(|target| claimed.contains(target))
        };
        let (mut kept, doomed): (Vec<_>, Vec<_>) = garbage.into_iter().partition(is_claimed);
        let mut removed = Vec::with_capacity(doomed.len());
        let mut stages: [Vec<Garbage>; 4] = Default::default();
        for garbage in doomed {
            // Nothing goes before what names it.
            let stage = match garbage.what {
                Condemned::Tag { .. } => 0,
                Condemned::Manifest { .. } => 1,
                Condemned::Layer { .. } => 2,
                Condemned::Blob(_) => 3,
            };
            if let Some(stage) = stages.get_mut(stage) {
                stage.push(garbage);
            }
        }
        for stage in stages {
            let (gone, left) = self.remove_stage(stage).await?;
            removed.extend(gone);
            kept.extend(left);
        }
        self.settle().await?;
        Ok((removed, kept))
    }

    /// Ends the run, and removes what was written for it.
    pub(super) async fn end(mut self) -> Result<State> {
        self.replace(Phase::None).await?;
        let prefix = self.bucket.keys.of_run(self.run);
        self.clear(&prefix).await;
        Ok(self.state)
    }

    async fn remove_stage(&self, stage: Vec<Garbage>) -> Result<(Vec<Garbage>, Vec<Garbage>)> {
        let mut keys = HashMap::new();
        for (at, garbage) in stage.iter().enumerate() {
            for key in self.keys_of(&garbage.what).await? {
                keys.insert(key, at);
            }
        }
        let failed = self.delete(keys.keys().cloned().collect()).await?;
        if let Some((key, error)) = failed.first() {
            let (count, error) = (failed.len(), error as &dyn std::error::Error);
            tracing::warn!(count, key, error, "garbage stays that the store does not remove");
        }
        let left: HashSet<usize> = failed.iter().filter_map(|(key, _)| keys.get(key).copied()).collect();
        let (mut gone, mut kept) = (Vec::with_capacity(stage.len()), Vec::new());
        for (at, garbage) in stage.into_iter().enumerate() {
            if left.contains(&at) { kept.push(garbage) } else { gone.push(garbage) }
        }
        Ok((gone, kept))
    }

    async fn keys_of(&self, what: &Condemned) -> Result<Vec<String>> {
        let keys = &self.bucket.keys;
        Ok(match what {
            Condemned::Blob(digest) => vec![keys.blob(digest)],
            Condemned::Layer { repo, digest } => vec![keys.layer_link(repo, digest)],
            Condemned::Manifest { repo, digest, subject } => {
                let referrer = subject.as_ref().map(|subject| keys.referrer(repo, subject, digest));
                [keys.revision_link(repo, digest)].into_iter().chain(referrer).collect()
            }
            Condemned::Tag { repo, tag } => self.keys_below(&keys.tag(repo, tag)).await?,
        })
    }

    async fn keys_below(&self, prefix: &str) -> s3::Result<Vec<String>> {
        let pages = self.bucket.client.pages(prefix, None);
        pages.map_ok(|page| page.into_iter().map(|(key, _)| key).collect::<Vec<_>>()).try_concat().await
    }

    /// Removes objects by requests that expire, and returns those that the store did not remove.
    async fn delete(&self, mut keys: Vec<String>) -> Result<Vec<(String, s3::Error)>> {
        let mut failed = Vec::new();
        for attempt in 1..=ATTEMPTS_MAX {
            let mut again = Vec::new();
            for several in keys.chunks(DELETE_KEYS_MAX.saturating_mul(AT_ONCE_MAX)) {
                check(self.stop)?;
                let answers = several.chunks(DELETE_KEYS_MAX).map(|keys| self.delete_batch(keys));
                // All of them, also when one fails: none of the others is left under way.
                for answer in join_all(answers).await {
                    for (key, error) in answer? {
                        match error.kind() {
                            Kind::Expired | Kind::Unavailable if attempt < ATTEMPTS_MAX => again.push(key),
                            _ => failed.push((key, error)),
                        }
                    }
                }
            }
            if again.is_empty() {
                break;
            }
            tracing::debug!(count = again.len(), attempt, "removing again what was not removed");
            keys = again;
        }
        Ok(failed)
    }

    async fn delete_batch(&self, keys: &[String]) -> Result<Vec<(String, s3::Error)>> {
        let mut attempt = 1;
        loop {
            let validity = self.lease.validity().await?;
            self.flight.take_off(validity);
            let answer = self.bucket.client.delete_batch(keys, Some(validity)).await;
            let is_known = match &answer {
                Ok(deletion) => {
                    !deletion.is_repeated
                        && deletion.kept.iter().all(|(_, error)| error.kind() != Kind::Unavailable)
                }
                Err(error) => !error.is_uncertain(),
            };
            if is_known {
                self.flight.land(validity);
            }
            match answer {
                Ok(deletion) => {
                    let pause = lock(&self.pace).take(keys.len() as u64);
                    self.pause_until(pause).await;
                    return Ok(deletion.kept);
                }
                Err(error) if error.kind() == Kind::Expired && attempt < ATTEMPTS_MAX => attempt += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits until no removal of the round is under way any more: the state may go on then.
    async fn settle(&self) -> Result<()> {
        if let Some(until) = self.flight.until() {
            let until = until.checked_add(self.bucket.options.timing.settling()).unwrap_or(until);
            tracing::debug!("an answer to a removal was lost: waiting until it cannot come any more");
            self.wait_for(until).await?;
            self.flight.clear();
        }
        Ok(())
    }

    /// Waits until the server's clock is past a time.
    async fn wait_for(&self, time: SystemTime) -> Result<()> {
        loop {
            check(self.stop)?;
            let now = self.bucket.client.server_now().await?.earliest;
            match time.duration_since(now) {
                Ok(left) => tokio::time::sleep(left.min(STEP).max(STEP / 10)).await,
                Err(_) => return Ok(()),
            }
        }
    }

    /// Pauses, unless all is to stop.
    async fn pause_until(&self, time: Instant) {
        while check(self.stop).is_ok()
            && let Some(left) = time.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
        {
            tokio::time::sleep(left.min(STEP)).await;
        }
    }

    /// Replaces the state, which nobody else has replaced.
    async fn replace(&mut self, phase: Phase) -> Result<()> {
        match self.bucket.replace_run(&self.state, phase).await {
            Ok(state) => {
                self.state = state;
                Ok(())
            }
            Err(error) if is_taken(&error) => Err(lost()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes what was written for a run that is over.
    async fn clear(&self, prefix: &str) {
        let clear = async {
            for keys in self.keys_below(prefix).await?.chunks(DELETE_KEYS_MAX) {
                self.bucket.client.delete_many(keys, None).await?;
            }
            Ok::<_, s3::Error>(())
        };
        if let Err(error) = clear.await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(prefix, error, "what a collection has written stays until the next one");
        }
    }
}
