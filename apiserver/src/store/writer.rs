//! The thread that writes. It takes what waits, commits it as one transaction, tells the watchers, and answers.
//!
//! ```text
//!            ┌──────── nothing fits its expectation: no transaction ────────┐
//!            │        ┌──> journal (one sync) ──> commit ───────┐           ▼
//!  wait ──> group ────┤                                         ├──> watchers, answers ──> wait
//!                     └──> the journal is full: commit, synced ─┘                           ▲
//!                                        │ any of it fails                                  │
//!                                        └──> answers: the failure ──> open anew ───────────┘
//! ```
//!
//! After a failure nobody knows whether the writes are on the disk: a sync that failed may have written all. The database is opened
//! anew, and what is read from the journal then has happened: it is synced again, and told to the watchers.

use std::collections::HashSet;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use redb::{Builder, Database, Durability};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::journal::{Journal, encode};
use super::tables::{Medium, State, Tables, prepare};
use super::{Draft, Error, Event, Expect, Options, Shared, Slot, Write};

/// Requests in one transaction.
const GROUP_REQUESTS_MAX: usize = 1024;
/// Bytes of texts after which a transaction takes no further request.
const GROUP_BYTES_MAX: usize = 16 << 20;
/// Events that one transaction forgets, beside as many as it writes.
const TRIM_EVENTS_MAX: usize = 256;
/// Room that has to be left on the disk for a transaction to begin, beside four times what it writes: for pages of the database that
/// are not written yet.
const ROOM_BYTES_MIN: u64 = 32 << 20;
/// How long writes are refused after a failure, as opening the database anew may read all of it.
const FAILURE_PAUSE_MS: u64 = 1000;
/// A file of less is not compacted.
const COMPACT_FILE_BYTES_MIN: u64 = 32 << 20;
/// A file of so many times the bytes that are in it is compacted.
const COMPACT_FACTOR: u64 = 4;

/// What the writer is asked for.
pub(super) enum Message {
    Write(Job),
    Close(oneshot::Sender<()>),
}

/// Writes that are committed together or not at all.
pub(super) struct Job {
    pub writes: Vec<Write>,
    pub reply: oneshot::Sender<Answer>,
    /// Its place in the queue.
    pub _permit: OwnedSemaphorePermit,
}

pub(super) type Answer = Result<Vec<Arc<Event>>, Error>;

pub(super) struct Writer {
    pub shared: Arc<Shared>,
    pub medium: Box<dyn Medium>,
    pub journal: Journal,
    pub options: Options,
    pub queue: mpsc::Receiver<Message>,
    /// When writes are tried again, and why not before.
    pub failed: Option<(Instant, Error)>,
    /// Length of the file above which it is compacted, if that pays.
    pub compact_above: u64,
    /// Keeps other processes out until the database is closed.
    pub _lock: File,
}

impl Drop for Writer {
    // Also when the thread panics: nobody is left waiting.
    fn drop(&mut self) {
        self.shared.hub.end_all(true, 0);
        self.shared.replace(Slot::Closed);
    }
}

impl Writer {
    /// Writes until the store is closed, or nobody has it any more.
    pub fn run(mut self) {
        let mut closing = None;
        while closing.is_none() {
            let Some(message) = self.next() else { break };
            let (mut group, mut bytes) = (Vec::new(), 0usize);
            let mut next = Some(message);
            while let Some(message) = next {
                match message {
                    Message::Write(job) => {
                        bytes = bytes.saturating_add(job.writes.iter().map(Write::bytes).sum());
                        group.push(job);
                    }
                    Message::Close(done) => {
                        closing = Some(done);
                        break;
                    }
                }
                let full = group.len() >= GROUP_REQUESTS_MAX || bytes >= GROUP_BYTES_MAX;
                next = if full { None } else { self.queue.try_recv().ok() };
            }
            if !group.is_empty() {
                self.write(group, bytes as u64);
            }
            if self.queue.is_empty() && closing.is_none() {
                self.compact();
            }
        }
        if !self.journal.is_empty() {
            // The next process need not read it. If that fails, it has to.
            let synced = self.sync();
            let _ = synced.inspect_err(|error| {
                tracing::warn!(error = error as &dyn std::error::Error, "the store was not synced")
            });
        }
        drop(self);
        if let Some(done) = closing {
            let _ = done.send(());
        }
    }

    /// The next message. While the database is given up, it is tried to open it meanwhile: who reads waits for it.
    fn next(&mut self) -> Option<Message> {
        while !self.shared.is_open() {
            match self.queue.try_recv() {
                Ok(message) => return Some(message),
                Err(mpsc::error::TryRecvError::Disconnected) => return None,
                Err(mpsc::error::TryRecvError::Empty) => {
                    std::thread::sleep(Duration::from_millis(FAILURE_PAUSE_MS));
                    let _ = self.ready(0);
                }
            }
        }
        self.queue.blocking_recv()
    }

    fn write(&mut self, group: Vec<Job>, bytes: u64) {
        let (replies, jobs): (Vec<_>, Vec<_>) =
            group.into_iter().map(|job| ((job.reply, job._permit), job.writes)).unzip();
        let answers = self.ready(bytes).and_then(|()| {
            self.commit(jobs).inspect_err(|error| {
                tracing::error!(error = error as &dyn std::error::Error, "a transaction of the store failed");
                self.fail(error.clone());
            })
        });
        match answers {
            Ok(answers) => {
                let events: Vec<_> = answers.iter().flatten().flatten().cloned().collect();
                self.shared.hub.publish(&events);
                for ((reply, _permit), answer) in replies.into_iter().zip(answers) {
                    let _ = reply.send(answer);
                }
            }
            Err(error) => {
                for (reply, _permit) in replies {
                    let _ = reply.send(Err(error.clone()));
                }
            }
        }
    }

    /// Whether a transaction can be tried.
    fn ready(&mut self, bytes: u64) -> Result<(), Error> {
        if let Some((until, error)) = &self.failed {
            if Instant::now() < *until {
                return Err(error.clone());
            }
            self.failed = None;
        }
        if !self.shared.is_open() {
            self.reopen()?;
        }
        let wanted = bytes.saturating_mul(4).saturating_add(ROOM_BYTES_MIN);
        let free = self.medium.room_bytes().map_err(Error::io("cannot ask for the room on the disk"))?;
        if free < wanted {
            return Err(Error::Full { free, wanted });
        }
        Ok(())
    }

    /// Commits what fits its expectations, and gives the answers in the order of the jobs.
    fn commit(&mut self, jobs: Vec<Vec<Write>>) -> Result<Vec<Answer>, Error> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let (options, journal, shared) = (&self.options, &mut self.journal, &self.shared);
        shared.with(|db| {
            let mut txn = db.begin_write()?;
            let mut tables = Tables::open(&txn)?;
            let mut answers = Vec::with_capacity(jobs.len());
            let mut written = 0usize;
            for writes in jobs {
                let answer = match check(&tables, &writes)? {
                    Some(refusal) => Err(refusal),
                    None => {
                        written += writes.len();
                        Ok(apply(&mut tables, time, writes)?)
                    }
                };
                answers.push(answer);
            }
            if written == 0 {
                drop(tables);
                txn.abort()?;
                return Ok(answers);
            }
            trim(&mut tables, options, time, written)?;
            let group = encode(time, answers.iter().flatten().flatten());
            let state = if journal.fits(&group) {
                let state = tables.finish()?;
                txn.set_durability(Durability::None).map_err(Error::storage)?;
                journal.append(group)?;
                txn.commit()?;
                state
            } else {
                tables.state.epoch = journal.epoch().saturating_add(1);
                let state = tables.finish()?;
                txn.set_quick_repair(true);
                txn.commit()?;
                journal.begin(state.epoch);
                state
            };
            shared.committed(state, written as u64);
            Ok(answers)
        })
    }

    /// Syncs the database with all that the journal has, which begins anew.
    fn sync(&mut self) -> Result<(), Error> {
        let (journal, shared) = (&mut self.journal, &self.shared);
        shared.with(|db| {
            let mut txn = db.begin_write()?;
            let mut tables = Tables::open(&txn)?;
            tables.state.epoch = journal.epoch().saturating_add(1);
            let state = tables.finish()?;
            txn.set_quick_repair(true);
            txn.commit()?;
            journal.begin(state.epoch);
            shared.committed(state, 0);
            Ok(())
        })
    }

    /// Gives the database up, and opens it anew.
    fn fail(&mut self, error: Error) {
        self.shared.replace(Slot::Failed);
        if let Err(error) = self.reopen() {
            tracing::error!(error = &error as &dyn std::error::Error, "the store cannot be opened anew");
        }
        self.failed = Some((Instant::now() + Duration::from_millis(FAILURE_PAUSE_MS), error));
    }

    fn reopen(&mut self) -> Result<(), Error> {
        let (db, journal, state) = open(&*self.medium, &self.options)?;
        self.journal = journal;
        self.shared.replace(Slot::Open(db));
        self.shared.committed(state, 0);
        // What the failed transaction has written after all.
        let mut at = self.shared.hub.newest();
        while at < state.revision {
            match self.shared.read(|snapshot| snapshot.events(None, at, state.revision)) {
                Ok((events, to)) => {
                    self.shared.hub.publish(&events);
                    at = to;
                }
                Err(_) => {
                    self.shared.hub.end_all(false, state.revision);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Makes the file small again when most of it is empty. Reads and writes wait meanwhile.
    fn compact(&mut self) {
        let Ok(file_bytes) = self.medium.file_bytes() else { return };
        if !self.shared.is_open() {
            return;
        }
        let state = self.shared.state();
        let used = state.object_bytes.saturating_add(state.history_bytes).saturating_mul(COMPACT_FACTOR);
        if file_bytes <= self.compact_above.max(used) {
            return;
        }
        match self.shared.compact() {
            // Somebody reads: after the next writes, perhaps.
            Err(redb::CompactionError::TransactionInProgress) => return,
            // Compaction leaves a file that has to be verified after a crash; what is synced now does not.
            result => {
                if let Err(error) = result.map_err(Error::storage).and_then(|()| self.sync()) {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "the store cannot be compacted"
                    );
                    self.fail(error);
                }
            }
        }
        self.compact_above = compact_above(self.medium.file_bytes().unwrap_or(file_bytes));
    }
}

/// Opens the database, in the form of this version, with all that the journal has.
pub(super) fn open(medium: &dyn Medium, options: &Options) -> Result<(Database, Journal, State), Error> {
    let mut builder = Builder::new();
    builder.set_cache_size(options.cache_bytes);
    let db = medium.open(&builder).map_err(Error::storage)?;
    let mut state = prepare(&db)?;
    let file = medium.open_journal(options.journal_bytes).map_err(Error::io("cannot open the journal"))?;
    let mut journal = Journal::new(file, state.epoch)?;
    let mut txn = db.begin_write()?;
    let mut tables = Tables::open(&txn)?;
    while let Some(group) = journal.read()? {
        // A database that was closed has them.
        if group.last() > tables.state.revision {
            let (time, written) = (group.time, group.writes.len());
            tables.put_group(group)?;
            trim(&mut tables, options, time, written)?;
        }
    }
    if journal.is_empty() {
        drop(tables);
        txn.abort()?;
    } else {
        journal.sync()?;
        state = tables.finish()?;
        // It stays in the journal until that is full: this way a full disk can be read from.
        txn.set_durability(Durability::None).map_err(Error::storage)?;
        txn.commit()?;
    }
    Ok((db, journal, state))
}

/// A file that was compacted to this length is compacted again when it is twice as long.
pub(super) fn compact_above(file_bytes: u64) -> u64 {
    file_bytes.saturating_mul(2).max(COMPACT_FILE_BYTES_MIN)
}

/// What is against these writes.
fn check(tables: &Tables<'_>, writes: &[Write]) -> Result<Option<Error>, Error> {
    let mut keys = HashSet::with_capacity(writes.len());
    for Write { key, expect, value } in writes {
        if !keys.insert(key) {
            return Ok(Some(Error::Twice(key.clone())));
        }
        let current = tables.current(key)?;
        let fits = match *expect {
            // There is nothing to delete where nothing is.
            Expect::Any => value.is_some() || current.is_some(),
            Expect::Absent => current.is_none() && value.is_some(),
            Expect::Present => current.is_some(),
            Expect::Revision(revision) => current == Some(revision),
        };
        if !fits {
            return Ok(Some(Error::Conflict { key: key.clone(), expected: *expect, current }));
        }
    }
    Ok(None)
}

fn apply(tables: &mut Tables<'_>, time: u64, writes: Vec<Write>) -> Result<Vec<Arc<Event>>, Error> {
    let put = |Write { key, value, .. }: Write| {
        let text = value.map(|draft: Draft| |revision| draft.at_revision(revision));
        let (revision, before, after) = tables.put(&key, time, text)?;
        Ok(Arc::new(Event::new(revision, key, before, after)))
    };
    writes.into_iter().map(put).collect()
}

/// Forgets what is beyond the bounds of the history.
fn trim(tables: &mut Tables<'_>, options: &Options, now: u64, written: usize) -> Result<(), Error> {
    for _ in 0..written.saturating_add(TRIM_EVENTS_MAX) {
        let state = tables.state;
        let many = state.revision - state.trimmed > options.history_events_max;
        let large = state.history_bytes > options.history_bytes_max;
        let Some(oldest) = tables.oldest()? else { break };
        let old = oldest.time.saturating_add(options.history_age_max_s) < now;
        if !(many || large || old) {
            break;
        }
        tables.forget(&oldest)?;
    }
    Ok(())
}
