//! A thread that writes what requests leave behind, so that no request waits for it.
//!
//! ```text
//!  requests ──write──> channel ──> thread: put, sync now and then ──> store
//!               │ full: lost, counted      │ fails: said, tried again; the channel fills meanwhile
//! ```

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Records that wait for the thread; each has some hundred bytes.
const WAITING_MAX: usize = 8192;
/// Records that are taken at a time.
const BATCH_MAX: usize = 1024;
/// Pause before a store that failed is tried again.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);
/// How often the log tells of a store that goes on failing.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Where records are kept. Blocks.
pub(super) trait Store: Send + 'static {
    /// How long after it was put a record may be lost in a power cut.
    const SYNC_INTERVAL: Duration;

    /// Keeps records in their order, and takes from the queue those it answers for. After a failure it is called again, to
    /// go on.
    fn put(&mut self, records: &mut VecDeque<Vec<u8>>) -> io::Result<()>;

    /// Makes what was put durable.
    fn sync(&mut self) -> io::Result<()>;

    /// Looks again whether all is as it was.
    fn refresh(&mut self) {}

    /// Makes a record that tells how many were lost before it, where such a thing has its place.
    fn gap(&self, lost: u64) -> Option<Vec<u8>>;
}

/// The end of the channel that requests have.
pub(super) struct Writer {
    channel: SyncSender<Message>,
    counts: Arc<Counts>,
}

/// What became of records.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) written: AtomicU64,
    /// The channel was full.
    pub(super) lost: AtomicU64,
}

enum Message {
    Record(Vec<u8>),
    Refresh,
    /// Answered when all before it is written and synced.
    Flush(SyncSender<()>),
}

impl Writer {
    /// Starts the thread; `what` names it in the log. It ends, with all written, when the writer is dropped.
    pub(super) fn start(what: String, store: impl Store) -> io::Result<Self> {
        let (channel, messages) = sync_channel(WAITING_MAX);
        let counts = Arc::<Counts>::default();
        let shared = Arc::clone(&counts);
        thread::Builder::new()
            .name("dvcr-events".to_owned())
            .spawn(move || Work { what, store, counts: shared, told: None, told_lost: 0 }.run(&messages))?;
        Ok(Self { channel, counts })
    }

    /// Hands a record over; never waits.
    pub(super) fn write(&self, record: Vec<u8>) {
        if self.channel.try_send(Message::Record(record)).is_err() {
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Has the store looked at soon; when there is much to write it is looked at anyway.
    pub(super) fn refresh(&self) {
        let _ = self.channel.try_send(Message::Refresh);
    }

    /// Waits until all that was handed over is written and durable; tells whether that came in time.
    pub(super) fn flush(&self, limit: Duration) -> bool {
        let (done, told) = sync_channel(1);
        let until = Instant::now() + limit;
        let mut message = Message::Flush(done);
        while let Err(error) = self.channel.try_send(message) {
            use std::sync::mpsc::TrySendError::{Disconnected, Full};
            let (Full(back) | Disconnected(back)) = error;
            if Instant::now() >= until {
                return false;
            }
            message = back;
            thread::sleep(Duration::from_millis(1));
        }
        told.recv_timeout(until.saturating_duration_since(Instant::now())).is_ok()
    }

    pub(super) fn counts(&self) -> &Counts {
        &self.counts
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.counts.fmt(f)
    }
}

/// What the thread has.
struct Work<S> {
    what: String,
    store: S,
    counts: Arc<Counts>,
    /// When the log was last told of a failure that goes on.
    told: Option<Instant>,
    /// Lost records that were told of.
    told_lost: u64,
}

impl<S: Store> Work<S> {
    fn run(mut self, messages: &Receiver<Message>) {
        let mut records = VecDeque::new();
        let mut flushes = Vec::new();
        let mut sync_at: Option<Instant> = None;
        loop {
            let message = match sync_at {
                None => messages.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => messages.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            let is_over = matches!(message, Err(RecvTimeoutError::Disconnected));
            let mut refresh = false;
            for message in message.into_iter().chain(messages.try_iter().take(BATCH_MAX)) {
                match message {
                    Message::Record(record) => records.push_back(record),
                    Message::Refresh => refresh = true,
                    Message::Flush(done) => flushes.push(done),
                }
            }
            if refresh {
                self.store.refresh();
            }
            if !records.is_empty() {
                sync_at.get_or_insert_with(|| Instant::now() + S::SYNC_INTERVAL);
                if !self.put(&mut records, is_over) {
                    return;
                }
            }
            if is_over || !flushes.is_empty() || sync_at.is_some_and(|at| at <= Instant::now()) {
                sync_at = None;
                if let Err(error) = self.store.sync() {
                    tracing::error!(what = self.what, %error, "cannot be synced; a power cut may take what was written");
                }
                for done in flushes.drain(..) {
                    let _ = done.try_send(());
                }
            }
            if is_over {
                return;
            }
        }
    }

    /// Writes until all is written, or, at the end, for once. Returns whether it is.
    fn put(&mut self, records: &mut VecDeque<Vec<u8>>, is_over: bool) -> bool {
        let count = records.len() as u64;
        while let Err(error) = self.store.put(records) {
            if self.told.is_none_or(|told| told.elapsed() >= FAILURE_LOG_INTERVAL) {
                self.told = Some(Instant::now());
                tracing::error!(
                    what = self.what,
                    %error,
                    waiting = count,
                    "cannot be written; it is tried again, and {WAITING_MAX} more can wait"
                );
            }
            if is_over {
                self.counts.lost.fetch_add(count, Ordering::Relaxed);
                return false;
            }
            thread::sleep(FAILURE_PAUSE);
        }
        self.counts.written.fetch_add(count, Ordering::Relaxed);
        if self.told.take().is_some() {
            tracing::info!(what = self.what, "is written again");
        }
        let lost = self.counts.lost.load(Ordering::Relaxed);
        let missing = lost.saturating_sub(self.told_lost);
        if missing > 0 {
            self.told_lost = lost;
            tracing::error!(
                what = self.what,
                missing,
                "records came faster than they were written, and are lost"
            );
            if let Some(gap) = self.store.gap(missing) {
                records.push_back(gap);
                return self.put(records, is_over);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[derive(Clone, Default)]
    struct Memory {
        kept: Arc<Mutex<Vec<Vec<u8>>>>,
        synced: Arc<AtomicU64>,
        is_broken: Arc<AtomicBool>,
    }

    impl Store for Memory {
        const SYNC_INTERVAL: Duration = Duration::from_millis(10);

        fn put(&mut self, records: &mut VecDeque<Vec<u8>>) -> io::Result<()> {
            if self.is_broken.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.kept.lock().unwrap().extend(records.drain(..));
            Ok(())
        }

        fn sync(&mut self) -> io::Result<()> {
            self.synced.store(self.kept.lock().unwrap().len() as u64, Ordering::Relaxed);
            Ok(())
        }

        fn gap(&self, lost: u64) -> Option<Vec<u8>> {
            Some(format!("lost {lost}").into_bytes())
        }
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn what_is_written_is_kept_in_order_and_synced() {
        let memory = Memory::default();
        let writer = Writer::start("a test".to_owned(), memory.clone()).unwrap();
        (0..100).for_each(|n: u8| writer.write(vec![n]));
        assert!(writer.flush(LONG));
        assert_eq!(*memory.kept.lock().unwrap(), (0..100).map(|n| vec![n]).collect::<Vec<_>>());
        assert_eq!(memory.synced.load(Ordering::Relaxed), 100);
        // Without being asked too.
        writer.write(vec![100]);
        let until = Instant::now() + LONG;
        while memory.synced.load(Ordering::Relaxed) < 101 {
            assert!(Instant::now() < until);
            thread::yield_now();
        }
        assert_eq!(writer.counts().written.load(Ordering::Relaxed), 101);
    }

    #[test]
    fn while_nothing_can_be_written_nobody_waits_and_what_does_not_fit_is_counted() {
        let memory = Memory::default();
        memory.is_broken.store(true, Ordering::Relaxed);
        let writer = Writer::start("a test".to_owned(), memory.clone()).unwrap();
        let all = 3 * WAITING_MAX as u64;
        (0..all).for_each(|n| writer.write(n.to_string().into_bytes()));
        let lost = writer.counts().lost.load(Ordering::Relaxed);
        assert!((WAITING_MAX as u64..=2 * WAITING_MAX as u64).contains(&lost), "{lost}");
        assert!(!writer.flush(Duration::from_millis(20)));
        memory.is_broken.store(false, Ordering::Relaxed);
        assert!(writer.flush(LONG));
        let kept = memory.kept.lock().unwrap().clone();
        let gap = format!("lost {lost}").into_bytes();
        assert!(kept.contains(&gap));
        assert_eq!(kept.len() as u64, all - lost + 1);
        assert_eq!(kept[0], b"0");
    }

    #[test]
    fn the_end_of_the_writer_leaves_nothing_behind() {
        let memory = Memory::default();
        let writer = Writer::start("a test".to_owned(), memory.clone()).unwrap();
        (0..1000_u16).for_each(|n| writer.write(n.to_be_bytes().to_vec()));
        drop(writer);
        let until = Instant::now() + LONG;
        while memory.synced.load(Ordering::Relaxed) < 1000 {
            assert!(Instant::now() < until);
            thread::yield_now();
        }
    }
}
