//! Watching: what is written is handed to whoever wants it, in order, and nobody who reads is waited for.
//!
//! ```text
//!            watch(range, from)                       all until then are read
//!  register ───────────────────> replays the history ────────────────────────> takes from its queue ──> Closed
//!                                        │ trimmed meanwhile                        │ the queue is full
//!                                        └──> TooOld                                └──> Slow, behind what is queued
//! ```
//!
//! A watch is registered before it reads the history, up to the newest revision of that moment: what is written later is in its queue,
//! so that nothing is missed or seen twice.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::{Error, Key, Range, Shared, text::Text};

/// Events that wait for one watcher.
pub const QUEUE_EVENTS_MAX: usize = 4096;
/// Bytes of texts that wait for one watcher. Watchers share them.
pub const QUEUE_BYTES_MAX: usize = 16 << 20;
/// Watches at a time.
pub const WATCHES_MAX: usize = 16_384;

/// One write to one object.
#[derive(Debug)]
pub struct Event {
    pub revision: u64,
    pub key: Key,
    /// The object before; `None` if it is new.
    pub before: Option<Text>,
    /// The object after; `None` if it is gone.
    pub after: Option<Text>,
    gone: OnceLock<Bytes>,
}

impl Event {
    pub(super) fn new(revision: u64, key: Key, before: Option<Text>, after: Option<Text>) -> Self {
        Self { revision, key, before, after, gone: OnceLock::new() }
    }

    /// The object before, with the event's resource version: what a watcher is told whose selection it has left.
    ///
    /// It is made once for all watchers; empty if there was no object before.
    pub fn gone(&self) -> Bytes {
        let make =
            || self.before.as_ref().map(|before| before.with_revision(self.revision)).unwrap_or_default();
        self.gone.get_or_init(make).clone()
    }

    /// Bytes of its texts.
    pub(super) fn bytes(&self) -> usize {
        [&self.before, &self.after].into_iter().flatten().map(|text| text.json().len()).sum()
    }
}

/// Why a watch has ended. It can begin anew at [`Watch::revision`].
#[derive(Clone, Debug, thiserror::Error)]
pub enum End {
    /// The watcher has left more in its queue than fits.
    #[error(
        "the watcher is too slow: it leaves more than {QUEUE_EVENTS_MAX} events or {QUEUE_BYTES_MAX} bytes"
    )]
    Slow,
    /// The store is closed, or cannot tell what happened.
    #[error("the watch has ended with the store")]
    Closed,
    /// The history could not be read, or has been trimmed beyond this watch.
    #[error(transparent)]
    Failed(Error),
}

/// Events of the history, and up to which revision they are all.
type Replayed = Result<(Vec<Arc<Event>>, u64), Error>;

/// Events of a range, in order, each once.
pub struct Watch {
    shared: Arc<Shared>,
    range: Range,
    /// The newest revision that was handed out, or looked at.
    at: u64,
    /// Up to which revision the history is read.
    until: u64,
    replayed: VecDeque<Arc<Event>>,
    replayed_to: u64,
    reading: Option<JoinHandle<Replayed>>,
    queue: mpsc::Receiver<Arc<Event>>,
    seat: Arc<Seat>,
    end: Option<End>,
}

impl Watch {
    /// The next event. It waits until there is one, and can be cancelled without losing any.
    ///
    /// # Errors
    /// The [`End`], again and again, when there is no further event.
    pub async fn next(&mut self) -> Result<Arc<Event>, End> {
        if let Some(end) = &self.end {
            return Err(end.clone());
        }
        let next = self.advance().await;
        match &next {
            Ok(event) => self.at = event.revision,
            Err(end) => self.end = Some(end.clone()),
        }
        next
    }

    async fn advance(&mut self) -> Result<Arc<Event>, End> {
        loop {
            if let Some(event) = self.replayed.pop_front() {
                return Ok(event);
            }
            if self.replayed_to < self.until {
                let (shared, range, after, until) =
                    (self.shared.clone(), self.range.clone(), self.replayed_to, self.until);
                let read = move || shared.read(|snapshot| snapshot.events(Some(&range), after, until));
                // Kept, so that one who is cancelled goes on with it.
                let reading = self.reading.get_or_insert_with(|| tokio::task::spawn_blocking(read));
                let read = reading.await;
                self.reading = None;
                let (events, to) = read.map_err(|_| End::Closed)?.map_err(End::Failed)?;
                self.replayed.extend(events);
                self.replayed_to = to;
                continue;
            }
            let Some(event) = self.queue.recv().await else {
                return Err(self.seat.end.get().cloned().unwrap_or(End::Closed));
            };
            self.seat.bytes.fetch_sub(event.bytes(), Ordering::Relaxed);
            if event.revision > self.replayed_to {
                return Ok(event);
            }
        }
    }

    /// A revision up to which all events of the range were handed out: what a bookmark tells.
    pub fn revision(&self) -> u64 {
        if !self.replayed.is_empty() || self.end.is_some() {
            return self.at;
        }
        if self.replayed_to < self.until {
            return self.at.max(self.replayed_to);
        }
        // Read before the queue is looked at: events are queued before the revision is told.
        let newest = self.shared.hub.newest();
        let all = if self.queue.is_empty() && !self.queue.is_closed() { newest } else { 0 };
        self.at.max(self.replayed_to).max(all)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.hub.remove(self.range.of(), &self.seat);
    }
}

/// What the watcher and the hub have together.
#[derive(Default)]
struct Seat {
    /// Bytes of texts in the queue.
    bytes: AtomicUsize,
    end: OnceLock<End>,
}

struct Watcher {
    range: Range,
    queue: mpsc::Sender<Arc<Event>>,
    seat: Arc<Seat>,
}

#[derive(Default)]
struct Watchers {
    /// By resource.
    all: HashMap<String, Vec<Watcher>>,
    count: usize,
    /// The newest revision whose event was handed out.
    newest: u64,
    closed: bool,
}

/// Who watches.
pub(super) struct Hub {
    watchers: Mutex<Watchers>,
    newest: watch::Sender<u64>,
}

impl Hub {
    pub fn new(newest: u64) -> Self {
        let watchers = Watchers { newest, ..Watchers::default() };
        Self { watchers: Mutex::new(watchers), newest: watch::Sender::new(newest) }
    }

    /// The newest revision that was handed out.
    pub fn newest(&self) -> u64 {
        *self.newest.borrow()
    }

    pub fn follow(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    pub fn count(&self) -> usize {
        self.lock().count
    }

    /// Begins a watch behind a revision.
    pub fn watch(&self, shared: Arc<Shared>, range: &Range, from: u64) -> Result<Watch, Error> {
        let mut watchers = self.lock();
        if watchers.closed {
            return Err(Error::Closed);
        }
        if watchers.count >= WATCHES_MAX {
            return Err(Error::TooManyWatches(WATCHES_MAX));
        }
        let (sender, queue) = mpsc::channel(QUEUE_EVENTS_MAX);
        let seat = Arc::new(Seat::default());
        let watcher = Watcher { range: range.clone(), queue: sender, seat: seat.clone() };
        watchers.all.entry(range.of().to_owned()).or_default().push(watcher);
        watchers.count += 1;
        let until = watchers.newest;
        Ok(Watch {
            shared,
            range: range.clone(),
            at: from,
            until,
            replayed: VecDeque::new(),
            replayed_to: from,
            reading: None,
            queue,
            seat,
            end: None,
        })
    }

    /// Hands events out, which are the next in order.
    pub fn publish(&self, events: &[Arc<Event>]) {
        let Some(last) = events.last() else { return };
        let mut watchers = self.lock();
        let mut ended = 0;
        for event in events {
            let Some(of) = watchers.all.get_mut(event.key.resource()) else { continue };
            let bytes = event.bytes();
            of.retain(|watcher| {
                if !watcher.range.has(&event.key) {
                    return true;
                }
                let queued = watcher.seat.bytes.fetch_add(bytes, Ordering::Relaxed);
                // A single event fits, however large.
                let fits = queued == 0 || queued.saturating_add(bytes) <= QUEUE_BYTES_MAX;
                let stays = fits && watcher.queue.try_send(event.clone()).is_ok();
                if !stays {
                    let _ = watcher.seat.end.set(End::Slow);
                    ended += 1;
                }
                stays
            });
        }
        watchers.count = watchers.count.saturating_sub(ended);
        watchers.newest = watchers.newest.max(last.revision);
        // While the lock is held, so that it never goes back.
        self.newest.send_replace(watchers.newest);
    }

    /// Ends all watches: what happened cannot be told to them. New ones may come, unless it is for good.
    pub fn end_all(&self, for_good: bool, newest: u64) {
        let mut watchers = self.lock();
        watchers.all.clear();
        watchers.count = 0;
        watchers.closed |= for_good;
        watchers.newest = watchers.newest.max(newest);
        self.newest.send_replace(watchers.newest);
    }

    fn remove(&self, resource: &str, seat: &Arc<Seat>) {
        let mut watchers = self.lock();
        let Some(of) = watchers.all.get_mut(resource) else { return };
        let before = of.len();
        of.retain(|watcher| !Arc::ptr_eq(&watcher.seat, seat));
        let removed = before - of.len();
        if of.is_empty() {
            watchers.all.remove(resource);
        }
        watchers.count = watchers.count.saturating_sub(removed);
    }

    fn lock(&self) -> MutexGuard<'_, Watchers> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
