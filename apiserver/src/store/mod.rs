//! Where objects are kept: every write is durable before it is answered, and watchers learn of it in order.
//!
//! ```text
//!  write ──> queue ──> writer ──> journal, one sync ──> one transaction ──┬──> watchers
//!           (bounded)  (a thread)                objects, texts, history  └──> answers
//!
//!  get, list ──> snapshot          watch ──> the history, then what comes
//! ```
//!
//! There is one counter for all: each write gets the next revision, and it is the `resourceVersion` of what it writes. A text is kept
//! under the revision that made it and never changes; an object is its key with the newest of them, and the history knows, for a
//! bounded time, what came before. So an older state, and what happened since, are read from the same texts.
//!
//! Requests that wait while a transaction is synced are the next transaction: the more write, the fewer syncs has each. The form of
//! the files is in `docs/formats/store.md`.

mod error;
mod journal;
mod key;
mod snapshot;
mod tables;
mod text;
mod watch;
mod writer;

#[cfg(test)]
mod tests;

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use redb::{Database, ReadableDatabase};
use tokio::sync::{Semaphore, mpsc, oneshot};

pub use error::Error;
pub use journal::JournalFile;
pub use key::{KEY_BYTES_MAX, Key, Range};
pub use snapshot::{List, PAGE_BYTES_MAX, Place, Snapshot};
pub use tables::{Medium, State};
pub use text::{Draft, TEXT_BYTES_MAX, Text};
pub use watch::{End, Event, QUEUE_BYTES_MAX, QUEUE_EVENTS_MAX, WATCHES_MAX, Watch};

use tables::InFolder;
use watch::Hub;
use writer::{Job, Message, Writer};

/// Requests that wait for the writer; more wait for a place.
pub const WAITING_REQUESTS_MAX: usize = 1024;
/// Bytes of the requests that wait.
pub const WAITING_BYTES_MAX: usize = 64 << 20;
/// Bytes of writes that are committed together.
pub const TOGETHER_BYTES_MAX: usize = 16 << 20;
/// What a write costs in the queue beside its text.
const WRITE_BYTES: usize = 256;

/// How often, and how long, a read waits for a database that is opened anew.
const REOPEN_TRIES: u32 = 200;
const REOPEN_PAUSE_MS: u64 = 10;

/// Bounds of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Events that watches and lists can go back.
    pub history_events_max: u64,
    /// Bytes of the texts that only the history has, and of its records.
    pub history_bytes_max: u64,
    /// Age of the oldest event. It is forgotten with the first write after that.
    pub history_age_max_s: u64,
    /// Length of the journal. The longer, the fewer syncs of the database, and the longer it takes to open it after a crash.
    pub journal_bytes: u64,
    /// Memory for pages of the file. The system's page cache is behind it.
    pub cache_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            history_events_max: 50_000,
            history_bytes_max: 64 << 20,
            history_age_max_s: 3600,
            journal_bytes: 16 << 20,
            cache_bytes: 16 << 20,
        }
    }
}

/// What has to be there for a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Whatever, but for a deletion there has to be an object.
    Any,
    /// Nothing.
    Absent,
    /// An object.
    Present,
    /// An object at this revision.
    Revision(u64),
}

/// A write to one object.
#[derive(Clone, Debug)]
pub struct Write {
    pub key: Key,
    pub expect: Expect,
    /// The object; `None` deletes it.
    pub value: Option<Draft>,
}

impl Write {
    fn bytes(&self) -> usize {
        WRITE_BYTES + self.key.stored().len() + self.value.as_ref().map_or(0, Draft::bytes)
    }
}

/// What a store has done and has.
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    pub state: State,
    /// Transactions, each with a sync of the journal or of the database, since the store was opened.
    pub transactions: u64,
    /// Writes in them.
    pub writes: u64,
    pub watches: usize,
}

/// Objects in a folder. A clone is the same store.
///
/// When the last clone is dropped, the thread that writes ends by itself, some time later; [`close`](Self::close) waits for that.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Message>,
    waiting: Arc<Semaphore>,
}

impl Store {
    /// Opens the store in a folder, or makes both: the folder with mode 0700, the files with 0600.
    ///
    /// After a process was killed, what it has written since the last sync of the database is put back from the journal.
    ///
    /// # Errors
    /// [`Error::InUse`] if another process has it, [`Error::Format`] if a newer program made it, and those of the file system.
    pub fn open(folder: &Path, options: Options) -> Result<Self, Error> {
        Self::open_on(folder, Box::new(InFolder(folder.to_owned())), options)
    }

    /// Opens a store whose database is on that medium; the folder is for the lock.
    ///
    /// # Errors
    /// Those of [`open`](Self::open).
    pub fn open_on(folder: &Path, medium: Box<dyn Medium>, options: Options) -> Result<Self, Error> {
        let lock = lock(folder)?;
        let (db, journal, state) = writer::open(&*medium, &options)?;
        // The name of a new file has to outlast a crash as well.
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(Error::io(format!("cannot sync {}", folder.display())))?;
        let shared = Arc::new(Shared {
            slot: RwLock::new(Slot::Open(db)),
            hub: Hub::new(state.revision),
            numbers: Mutex::new(Stats { state, transactions: 0, writes: 0, watches: 0 }),
        });
        let (sender, queue) = mpsc::channel(WAITING_REQUESTS_MAX);
        let writer = Writer {
            shared: shared.clone(),
            medium,
            journal,
            options,
            queue,
            failed: None,
            compact_above: writer::compact_above(0),
            _lock: lock,
        };
        std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || writer.run())
            .map_err(Error::io("cannot start the thread of the store"))?;
        Ok(Self { shared, queue: sender, waiting: Arc::new(Semaphore::new(WAITING_BYTES_MAX)) })
    }

    /// Writes one object. When it returns, the write is on the disk, and every read sees it.
    ///
    /// A caller that goes away meanwhile may have written.
    ///
    /// # Errors
    /// [`Error::Conflict`] if what is there is not as expected, [`Error::Full`] if the disk is full, [`Error::Storage`] if it failed:
    /// then the write may have happened or not.
    pub async fn write(&self, write: Write) -> Result<Arc<Event>, Error> {
        let mut events = self.write_all(vec![write]).await?;
        events.pop().ok_or(Error::Closed)
    }

    /// Writes several objects, all or none, with revisions that follow each other in the order of the writes.
    ///
    /// # Errors
    /// Those of [`write`](Self::write); [`Error::Twice`] if two are to the same object, and [`Error::TooLarge`] beyond
    /// [`TOGETHER_BYTES_MAX`].
    pub async fn write_all(&self, writes: Vec<Write>) -> Result<Vec<Arc<Event>>, Error> {
        let bytes = writes.iter().map(Write::bytes).fold(0, usize::saturating_add);
        if bytes > TOGETHER_BYTES_MAX {
            return Err(Error::TooLarge { bytes, limit: TOGETHER_BYTES_MAX });
        }
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let permit = self.waiting.clone().acquire_many_owned(permits).await.map_err(|_| Error::Closed)?;
        let (reply, answer) = oneshot::channel();
        let job = Job { writes, reply, _permit: permit };
        self.queue.send(Message::Write(job)).await.map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)?
    }

    /// The object of this key, if there is one. It takes microseconds, unless the disk is slow.
    ///
    /// # Errors
    /// Those of [`Snapshot::get`].
    pub fn get(&self, key: &Key) -> Result<Option<Text>, Error> {
        self.shared.read(|snapshot| snapshot.get(key))
    }

    /// A page of the objects in a range. See [`Snapshot::list`].
    ///
    /// # Errors
    /// Those of [`Snapshot::list`].
    pub fn list(&self, range: &Range, from: &Place, limit: usize) -> Result<List, Error> {
        self.shared.read(|snapshot| snapshot.list(range, from, limit))
    }

    /// Everything as it is now, for several reads that have to fit together.
    ///
    /// # Errors
    /// [`Error::Storage`] if the file cannot be read, [`Error::Closed`] if the store is closed.
    pub fn snapshot(&self) -> Result<Snapshot, Error> {
        self.shared.snapshot()
    }

    /// Events of the range behind the revision: those that the history has, then what comes.
    ///
    /// # Errors
    /// [`Error::TooOld`] if the history does not reach back to it, [`Error::TooManyWatches`] beyond [`WATCHES_MAX`].
    pub fn watch(&self, range: &Range, from: u64) -> Result<Watch, Error> {
        let watch = self.shared.hub.watch(self.shared.clone(), range, from)?;
        let trimmed = self.shared.state().trimmed;
        if from < trimmed {
            return Err(Error::TooOld { revision: from, oldest: trimmed });
        }
        Ok(watch)
    }

    /// The newest revision that watchers were told. Every answered write is in it.
    pub fn revision(&self) -> u64 {
        self.shared.hub.newest()
    }

    /// Waits until there is this revision, or the store is closed.
    pub async fn wait_for(&self, revision: u64) {
        let _ = self.shared.hub.follow().wait_for(|newest| *newest >= revision).await;
    }

    /// Numbers of the store.
    pub fn stats(&self) -> Stats {
        Stats { watches: self.shared.hub.count(), ..self.shared.numbers() }
    }

    /// Ends the watches and closes the file, after the writes that were asked for before. The next process opens it at once.
    pub async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.queue.send(Message::Close(done)).await.is_ok() {
            let _ = closed.await;
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("stats", &self.stats()).finish()
    }
}

/// The database, if it is open.
enum Slot {
    Open(Database),
    /// Given up after a failure, to be opened anew.
    Failed,
    Closed,
}

/// What readers, watchers and the writer share.
struct Shared {
    /// Only the writer takes it to write, for a moment or to compact.
    slot: RwLock<Slot>,
    hub: Hub,
    numbers: Mutex<Stats>,
}

impl Shared {
    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, Error>) -> Result<T, Error> {
        match &*self.slot.read().unwrap_or_else(PoisonError::into_inner) {
            Slot::Open(db) => work(db),
            Slot::Failed => Err(Error::storage(redb::Error::DatabaseClosed)),
            Slot::Closed => Err(Error::Closed),
        }
    }

    fn snapshot(&self) -> Result<Snapshot, Error> {
        self.with(|db| Snapshot::new(db.begin_read()?))
    }

    /// Reads, and does so again if the database was opened anew meanwhile.
    fn read<T>(&self, work: impl Fn(&Snapshot) -> Result<T, Error>) -> Result<T, Error> {
        let mut tries = 0;
        loop {
            let result = self.snapshot().and_then(|snapshot| work(&snapshot));
            match result {
                Err(error) if error.is_given_up() && tries < REOPEN_TRIES => {
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(REOPEN_PAUSE_MS));
                }
                result => return result,
            }
        }
    }

    fn is_open(&self) -> bool {
        matches!(&*self.slot.read().unwrap_or_else(PoisonError::into_inner), Slot::Open(_))
    }

    fn replace(&self, slot: Slot) {
        *self.slot.write().unwrap_or_else(PoisonError::into_inner) = slot;
    }

    fn compact(&self) -> Result<(), redb::CompactionError> {
        match &mut *self.slot.write().unwrap_or_else(PoisonError::into_inner) {
            Slot::Open(db) => db.compact().map(|_| ()),
            Slot::Failed | Slot::Closed => Ok(()),
        }
    }

    fn committed(&self, state: State, writes: u64) {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.state = state;
        if writes > 0 {
            numbers.transactions += 1;
            numbers.writes += writes;
        }
    }

    fn numbers(&self) -> Stats {
        *self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> State {
        self.numbers().state
    }
}

/// Makes the folder its owner's, and keeps other processes out of it.
fn lock(folder: &Path) -> Result<File, Error> {
    let make = || {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        std::fs::set_permissions(folder, Permissions::from_mode(0o700))
    };
    make().map_err(Error::io(format!("cannot make {}", folder.display())))?;
    let path = folder.join("lock");
    let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let lock = lock.map_err(Error::io(format!("cannot open {}", path.display())))?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::InUse(folder.to_owned())),
        Err(error) => Err(Error::io(format!("cannot lock {}", path.display()))(error.into())),
    }
}
