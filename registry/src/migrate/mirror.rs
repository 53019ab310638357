//! A second store that is kept like the first.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::copy::{self, Copier};
use super::pass::Pass;
use super::served::{Changes, Served};
use crate::lock;
use crate::store::{Result, Store};

/// How often it is looked for changes.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Pause after a failure, twice as long after each further one.
const BACKOFF: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(300);

/// Keeps a second store like the one that is served.
#[derive(Debug)]
pub(crate) struct Mirror {
    to: Arc<dyn Store>,
    /// How often all is gone through, for what other replicas have changed.
    interval: Duration,
    changes: Arc<Changes>,
    /// Since when the oldest change waits that is being copied.
    copying: Mutex<Option<Instant>>,
    counts: copy::Counts,
    failures: AtomicU64,
    damaged: AtomicU64,
    /// When all was last found to be the same.
    complete: Mutex<Option<Instant>>,
}

/// What is told of it to those who watch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// How long the oldest change waits that the second store lacks, seconds; 0 if none does.
    pub(crate) lag_seconds: f64,
    pub(crate) pending: usize,
    /// Since all was last compared and found the same, seconds; `None` if that never was.
    pub(crate) complete_seconds: Option<f64>,
    pub(crate) blobs: u64,
    pub(crate) bytes: u64,
    pub(crate) failures: u64,
    pub(crate) damaged: u64,
}

impl Mirror {
    pub(crate) fn new(served: &Served, to: Arc<dyn Store>, interval: Duration) -> Self {
        Self {
            to,
            interval,
            changes: served.observe(),
            copying: Mutex::default(),
            counts: copy::Counts::default(),
            failures: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
            complete: Mutex::default(),
        }
    }

    pub(crate) fn seen(&self) -> Seen {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (pending, since) = self.changes.pending();
        let since = (*lock(&self.copying)).or(since);
        Seen {
            lag_seconds: since.map_or(0.0, |since| since.elapsed().as_secs_f64()),
            pending,
            complete_seconds: lock(&self.complete).map(|then| then.elapsed().as_secs_f64()),
            blobs: get(&self.counts.blobs),
            bytes: get(&self.counts.bytes),
            failures: get(&self.failures),
            damaged: get(&self.damaged),
        }
    }

    /// Copies until it is stopped, or what is served has moved elsewhere. Blocks, on a thread that is not a runtime's own.
    pub(crate) fn run(&self, served: &Served, stop: &AtomicBool) {
        let (mut due, mut backoff) = (Instant::now(), BACKOFF);
        while !stop.load(Ordering::Relaxed) && !served.has_moved() {
            let is_due = Instant::now() >= due;
            if !is_due && self.changes.pending().0 == 0 {
                thread::sleep(POLL_INTERVAL);
                continue;
            }
            match self.copy(served, is_due, stop) {
                Ok(()) => {
                    backoff = BACKOFF;
                    if is_due {
                        due = Instant::now() + self.interval;
                        *lock(&self.complete) = Some(Instant::now());
                    }
                }
                Err(_) if stop.load(Ordering::Relaxed) => {}
                Err(error) => {
                    self.failures.fetch_add(1, Ordering::Relaxed);
                    let source = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::error!(%error, source, "the mirror lacks something; it is tried again");
                    let until = Instant::now() + backoff;
                    while Instant::now() < until && !stop.load(Ordering::Relaxed) {
                        thread::sleep(POLL_INTERVAL);
                    }
                    backoff = backoff.saturating_mul(2).min(BACKOFF_MAX);
                }
            }
        }
    }

    fn copy(&self, served: &Served, everything: bool, stop: &AtomicBool) -> Result<()> {
        let copier = Copier::new(served.current(), &self.to, &self.counts, stop);
        let pass = Pass { copier: &copier, looks_at_all: false, prunes: true };
        // What changes meanwhile is noted, and what was noted before is seen.
        let noted = self.changes.take();
        *lock(&self.copying) = noted.since;
        let done = match everything || noted.is_all {
            true => pass.everything().map(drop),
            false => pass.changes(&noted),
        };
        *lock(&self.copying) = None;
        if let Err(error) = done {
            self.changes.put_back(noted);
            return Err(error);
        }
        let damaged = copier.damaged();
        self.damaged.store(damaged.len() as u64, Ordering::Relaxed);
        if let Some((digest, repo)) = damaged.first_key_value() {
            tracing::error!(count = damaged.len(), first = %digest, of = %repo, "damaged blobs are not mirrored");
        }
        Ok(())
    }
}
