//! A disk that is full, or fails at any write or sync.

use std::ops::Bound;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use redb::backends::FileBackend;
use redb::{BackendError, Builder, StorageBackend};

use super::*;

/// Counts down with each write, growth and sync; below zero they fail. What fails may be done all the same.
#[derive(Debug, Default)]
struct Fault {
    left: AtomicI64,
    done_all_the_same: std::sync::atomic::AtomicBool,
    room_bytes: AtomicU64,
}

impl Fault {
    fn none() -> Arc<Self> {
        let fault = Self::default();
        fault.left.store(i64::MAX, Ordering::SeqCst);
        fault.room_bytes.store(1 << 40, Ordering::SeqCst);
        Arc::new(fault)
    }

    fn meet(&self, work: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<()> {
        if self.left.fetch_sub(1, Ordering::SeqCst) > 0 {
            return work();
        }
        if self.done_all_the_same.load(Ordering::SeqCst) {
            work()?;
        }
        Err(rustix::io::Errno::NOSPC.into())
    }
}

struct Faulty(InFolder, Arc<Fault>);

impl Medium for Faulty {
    fn open(&self, builder: &Builder) -> Result<Database, redb::Error> {
        let path = self.0.0.join("objects.redb");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        Ok(builder.create_with_backend(Disk(FileBackend::new(file)?, self.1.clone()))?)
    }

    fn open_journal(&self, bytes: u64) -> std::io::Result<Box<dyn JournalFile>> {
        Ok(Box::new(FaultyJournal(self.0.open_journal(bytes)?, self.1.clone())))
    }

    fn room_bytes(&self) -> std::io::Result<u64> {
        Ok(self.1.room_bytes.load(Ordering::SeqCst))
    }

    fn file_bytes(&self) -> std::io::Result<u64> {
        self.0.file_bytes()
    }
}

struct FaultyJournal(Box<dyn JournalFile>, Arc<Fault>);

impl JournalFile for FaultyJournal {
    fn bytes(&self) -> std::io::Result<u64> {
        self.0.bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.0.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, buffer: &[u8]) -> std::io::Result<()> {
        self.1.meet(|| self.0.write_at(offset, buffer))
    }

    fn sync(&self) -> std::io::Result<()> {
        self.1.meet(|| self.0.sync())
    }
}

#[derive(Debug)]
struct Disk(FileBackend, Arc<Fault>);

impl StorageBackend for Disk {
    fn len(&self) -> std::io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.1.meet(|| self.0.set_len(len))
    }

    fn sync_data(&self) -> std::io::Result<()> {
        self.1.meet(|| self.0.sync_data())
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.1.meet(|| self.0.write(offset, data))
    }

    fn close(&self) -> std::io::Result<()> {
        self.0.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.try_lock_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.unlock_range(start, end)
    }
}

fn open_faulty(folder: &Path, fault: &Arc<Fault>) -> Store {
    let medium = Faulty(InFolder(folder.to_owned()), fault.clone());
    // Room for eight small groups, so that the database is synced as well.
    let options = Options { journal_bytes: 8 * 4096, ..Options::default() };
    Store::open_on(folder, Box::new(medium), options).unwrap()
}

/// Writes until it is taken.
async fn write_again(store: &Store, write: Write) -> Arc<Event> {
    loop {
        match store.write(write.clone()).await {
            Ok(event) => return event,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

#[tokio::test]
async fn a_full_disk_refuses_writes_and_goes_on_reading() {
    let folder = tempfile::tempdir().unwrap();
    let fault = Fault::none();
    let store = open_faulty(folder.path(), &fault);
    let mut watch = store.watch(&all(), 0).unwrap();
    store.write(put(&key("", "x"), 1)).await.unwrap();
    fault.room_bytes.store(1000, Ordering::SeqCst);
    let refused = store.write(put(&key("", "x"), 2)).await.unwrap_err();
    assert!(refused.to_string().starts_with("the disk is full: 1000 bytes are free"), "{refused}");
    assert_eq!(parse(store.get(&key("", "x")).unwrap().unwrap().json()), (1, 1));
    fault.room_bytes.store(1 << 40, Ordering::SeqCst);
    assert_eq!(store.write(put(&key("", "x"), 3)).await.unwrap().revision, 2);
    assert_eq!(watch.next().await.unwrap().revision, 1);
    assert_eq!(watch.next().await.unwrap().revision, 2);
}

/// Whichever write or sync fails: nothing that was acknowledged is lost, reads go on, watchers see what is there, and when the disk
/// works again the store does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fails_anywhere_loses_nothing_and_recovers() {
    let cases: Vec<_> = (0..64).map(|calls| tokio::spawn(fail_after(calls, calls % 2 == 1))).collect();
    for case in cases {
        case.await.unwrap();
    }
}

async fn fail_after(calls: i64, done_all_the_same: bool) {
    let folder = tempfile::tempdir().unwrap();
    let fault = Fault::none();
    let store = open_faulty(folder.path(), &fault);
    let mut watch = store.watch(&all(), 0).unwrap();
    for number in 1..=3 {
        store.write(put(&key("", "x"), number)).await.unwrap();
    }
    fault.done_all_the_same.store(done_all_the_same, Ordering::SeqCst);
    fault.left.store(calls, Ordering::SeqCst);
    let mut acknowledged = 3;
    let failed = loop {
        match store.write(put(&key("", "x"), acknowledged + 1)).await {
            Ok(_) => acknowledged += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(failed, Error::Storage(_) | Error::Io { .. }), "{calls}: {failed:?}");
    fault.left.store(i64::MAX, Ordering::SeqCst);
    let last = write_again(&store, put(&key("", "y"), 7)).await;
    let (revision, number) = parse(store.get(&key("", "x")).unwrap().unwrap().json());
    assert!(number == acknowledged || number == acknowledged + 1, "{calls}: {number} of {acknowledged}");
    assert_eq!((revision, last.revision), (number, number + 1), "{calls}");
    let seen = drain(&store, &mut watch).await.unwrap();
    let seen: Vec<_> =
        seen.into_iter().map(|(revision, key, _, _)| (revision, key.name().to_owned())).collect();
    let name = |revision| if revision == last.revision { "y" } else { "x" };
    assert_eq!(seen, (1..=last.revision).map(|at| (at, name(at).to_owned())).collect::<Vec<_>>(), "{calls}");
    store.close().await;
    assert_eq!(open(folder.path()).revision(), last.revision);
}
