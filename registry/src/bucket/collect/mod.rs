//! Garbage collection, by one replica at a time, while all go on.
//!
//! ```text
//!  lease ──> take over ──> announce, wait ──> retain ──> mark ─────────────> sweep ──────────> end, give the lease back
//!            a round of     nobody places     tags and   links that no       blobs without
//!            one that died  a link unseen     manifests  manifest needs      a link
//!                                                │          │                   │
//!                                                └──────────┴── rounds <────────┘   condemn, spare what is claimed, remove
//! ```
//!
//! The protocol, and why nothing that is wanted is lost, is in `docs/decisions/0004-a-registry-in-a-bucket.md`. What is
//! garbage is what it is in a directory (`storage::collect`), but that the store counts in seconds.

mod mark;
mod pages;
mod retain;
mod rounds;
#[cfg(test)]
mod tests;
mod uploads;

use std::collections::HashSet;
use std::io::ErrorKind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use tokio::sync::Semaphore;
use tokio::sync::mpsc::{self, Receiver, Sender};

use super::Bucket;
use super::condemned::{Condemned, ROUND_ENTRIES_MAX};
use super::lease::Lease;
use super::run::{Phase, State};
use crate::digest::Digest;
use crate::lock;
use crate::storage::collect::key;
use crate::store::collect::{Counts, Options};
use crate::store::{Error, Result};
use rounds::{Flight, Garbage, Rounds};

/// How long a collection that is told to stop has for what it is about.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// How long a pause may last before it looks whether it is to stop.
const STEP: Duration = Duration::from_millis(100);
/// Garbage that was found and waits for its round.
const QUEUE_MAX: usize = 1000;
/// Manifests, or links, that are read at a time.
const READS_AT_ONCE_MAX: usize = 32;
/// The store tells times that are cut to the second.
const SECOND: Duration = Duration::from_secs(1);

impl Bucket {
    /// Removes garbage; `None` if another collects. What is left over by one that died is done first.
    ///
    /// # Errors
    /// When `stop` is set, the store fails, or another replica takes over, since this one stood still for too long.
    pub(super) async fn collect(
        &self,
        options: &Options,
        counts: &Counts,
        stop: &AtomicBool,
    ) -> Result<Option<()>> {
        if options.dry_run {
            if self.is_leased().await? {
                return Ok(None);
            }
            let begun = self.client.server_now().await?.earliest;
            let run = Run::new(self, options, counts, stop, begun);
            return tokio::select! {
                done = run.go(None) => done.map(Some),
                () = overdue(stop) => Err(stopped()),
            };
        }
        let Some(lease) = self.take_lease().await? else { return Ok(None) };
        let flight = Flight::default();
        let done = tokio::select! {
            done = self.collect_with(&lease, &flight, options, counts, stop) => done,
            lost = lease.keep() => Err(lost),
            () = overdue(stop) => Err(stopped()),
        };
        // A removal that is still under way is signed with the lease: then it has to run out.
        if flight.until().is_none() {
            lease.give_back().await;
        }
        done.map(Some)
    }

    /// Does what a replica that died has left of a round, so that those who wait for its end get on; nothing, if it lives.
    pub(super) async fn end_dead_round(&self) -> Result<()> {
        let Some(lease) = self.take_lease().await? else { return Ok(()) };
        let (flight, stop) = (Flight::default(), AtomicBool::default());
        let done = tokio::select! {
            done = self.take_over(&lease, &flight, &stop) => done.map(drop),
            lost = lease.keep() => Err(lost),
        };
        if flight.until().is_none() {
            lease.give_back().await;
        }
        done
    }

    async fn collect_with(
        &self,
        lease: &Lease<'_>,
        flight: &Flight,
        options: &Options,
        counts: &Counts,
        stop: &AtomicBool,
    ) -> Result<()> {
        let state = self.take_over(lease, flight, stop).await?;
        let rate = options.removals_per_second.into();
        let (mut rounds, begun) = Rounds::announce(self, lease, flight, stop, state, rate).await?;
        let run = Run::new(self, options, counts, stop, begun);
        let done = match rounds.await_marking().await {
            Ok(()) => run.go(Some(&mut rounds)).await,
            Err(error) => Err(error),
        };
        if done.is_err() && flight.until().is_some() {
            // The state says what may still go; the next one takes over from here.
            return done;
        }
        // Nothing of the round is under way, so that nobody need wait for it, also when it has failed.
        let ended = rounds.end().await;
        done.and(ended.map(drop))?;
        self.quotas.count_all().await
    }

    /// Reads the state of the run, being the one who holds the lease, and ends the round of one that died.
    async fn take_over(&self, lease: &Lease<'_>, flight: &Flight, stop: &AtomicBool) -> Result<State> {
        let state = self.read_run().await?;
        // Else it might be another's, who took the lease in between, and whose round we would end.
        lease.renew().await?;
        let Phase::Condemned { run, round } = state.phase else { return Ok(state) };
        tracing::info!(%run, round, "going on with a collection that another replica has begun");
        let mut rounds = Rounds::adopt(self, lease, flight, stop, state).await?;
        let left = match self.read_condemned(run, round).await {
            Ok(left) => left,
            Err(error) if error.is_not_found() => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        rounds.remove(left.into_iter().map(Garbage::from).collect()).await?;
        rounds.end().await
    }
}

/// One collection.
struct Run<'a> {
    bucket: &'a Bucket,
    options: &'a Options,
    counts: &'a Counts,
    stop: &'a AtomicBool,
    /// The server's time, at the earliest, when the run was announced.
    begun: SystemTime,
    /// What was written since is new.
    cutoff: SystemTime,
    /// Digests that a repository has, by their first 128 bits. Two that agree in them can only keep garbage.
    live: Mutex<Vec<u128>>,
    /// Manifests that the rules do not keep: those of a dry run, as in others they are gone.
    gone: Mutex<HashSet<u128>>,
    reads: Semaphore,
}

impl<'a> Run<'a> {
    fn new(
        bucket: &'a Bucket,
        options: &'a Options,
        counts: &'a Counts,
        stop: &'a AtomicBool,
        begun: SystemTime,
    ) -> Self {
        let age = bucket.options.grace.saturating_add(SECOND);
        let cutoff = begun.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
        let reads = Semaphore::new(READS_AT_ONCE_MAX);
        let (live, gone) = (Mutex::default(), Mutex::default());
        Self { bucket, options, counts, stop, begun, cutoff, live, gone, reads }
    }

    /// Finds garbage, and has it removed; only finds it where there are no rounds.
    async fn go(&self, mut rounds: Option<&mut Rounds<'_>>) -> Result<()> {
        self.retain(rounds.as_deref_mut()).await?;
        let live = self.take_away_found(async |found| self.mark(found).await, rounds.as_deref_mut()).await?;
        {
            let mut all = lock(&self.live);
            all.sort_unstable();
            all.dedup();
        }
        self.take_away_found(async |found| self.sweep(found).await, rounds).await?;
        self.abort_orphans(live).await
    }

    /// Has garbage removed while it is searched for.
    async fn take_away_found<T>(
        &self,
        search: impl AsyncFnOnce(Sender<Garbage>) -> Result<T>,
        rounds: Option<&mut Rounds<'_>>,
    ) -> Result<T> {
        let (sender, receiver) = mpsc::channel(QUEUE_MAX);
        // A search that fails does not break off a round: others wait for its end.
        let search = async { Ok::<_, Error>(search(sender).await) };
        let (done, ()) = tokio::try_join!(search, self.take_away(receiver, rounds))?;
        done
    }

    /// Has what is found removed in rounds, each of as much as it may be of.
    async fn take_away(
        &self,
        mut found: Receiver<Garbage>,
        mut rounds: Option<&mut Rounds<'_>>,
    ) -> Result<()> {
        loop {
            let mut batch = Vec::new();
            while batch.len() < ROUND_ENTRIES_MAX
                && let Some(garbage) = found.recv().await
            {
                batch.push(garbage);
            }
            if batch.is_empty() {
                return Ok(());
            }
            for kept in self.condemn(batch, rounds.as_deref_mut()).await? {
                lock(&self.live).extend(kept.digests().map(key));
            }
        }
    }

    /// Has one round, counts what it removed, and returns what it did not.
    async fn condemn(&self, garbage: Vec<Garbage>, rounds: Option<&mut Rounds<'_>>) -> Result<Vec<Garbage>> {
        let (removed, kept) = match rounds {
            Some(rounds) => rounds.condemn(garbage).await?,
            None => (garbage, Vec::new()),
        };
        for one in removed {
            let counter = match one.what {
                Condemned::Blob(_) => &self.counts.removed_blobs,
                Condemned::Layer { .. } => &self.counts.removed_links,
                Condemned::Manifest { .. } => &self.counts.removed_manifests,
                Condemned::Tag { .. } => &self.counts.removed_tags,
            };
            count(counter, 1);
            count(&self.counts.freed_bytes, one.bytes);
        }
        Ok(kept)
    }

    fn is_old(&self, modified: SystemTime) -> bool {
        modified <= self.cutoff
    }

    fn check(&self) -> Result<()> {
        check(self.stop)
    }
}

/// Waits until a collection has been told to stop, and has not done so for long.
async fn overdue(stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(STEP).await;
    }
    tokio::time::sleep(STOP_PATIENCE).await;
}

fn check(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) { Err(stopped()) } else { Ok(()) }
}

fn stopped() -> Error {
    Error::new("the collection was stopped", ErrorKind::Interrupted.into())
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// The digest that a part of a key stands for.
fn digest(algorithm: &str, hex: &str) -> Option<Digest> {
    format!("{algorithm}:{hex}").parse().ok()
}
