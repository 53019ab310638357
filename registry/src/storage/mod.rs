//! Blobs, links and upload sessions on a filesystem.
//!
//! ```text
//!  Storage ──┬── uploads    sessions, commit          ──┬── ingest   hash and write while bytes arrive ── pool
//!            ├── blobs      lookup, reading             │
//!            ├── manifests  revisions, tags             ├── sync     temp file, rename, fsync
//!            ├── changes    what looks before it acts   │
//!            ├── lists      tags, catalogue             │
//!            ├── collect    garbage                     │
//!            ├── evict      what was not used for long  │
//!            ├── scrub      damage                      │
//!            ├── quota, space   bounds                  │
//!            └── referrers  index beside the layout   ──┴── layout   paths
//! ```
//!
//! `store` makes of this the [`Store`](crate::store::Store) that the API sees; the pull-through cache, the search for damage and
//! the inventory, which are of a directory alone, call it as it is. Nothing here knows HTTP. Functions block on the filesystem; the
//! few that wait for the network's pace are async.

pub(crate) mod blobs;
mod changes;
pub(crate) mod collect;
pub(crate) mod evict;
pub(crate) mod ingest;
pub(crate) mod layout;
pub(crate) mod lists;
pub(crate) mod manifests;
pub(crate) mod pace;
pub(crate) mod pool;
pub(crate) mod quota;
mod referrers;
pub(crate) mod retain;
pub(crate) mod scrub;
pub(crate) mod space;
mod store;
mod sync;
pub(crate) mod uploads;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use rustix::fs::FlockOperation;

use ingest::INGEST_BUFFER_BYTES;
use layout::Layout;
use pool::Pool;
use sync::Dirs;

use crate::store::Stats;
pub(crate) use crate::store::{Error, Result};

/// Upload buffers of all uploads together: 48 MiB.
const INGEST_BUFFERS_MAX: usize = 48;
/// Upload buffers kept for the next upload: 4 MiB.
const INGEST_BUFFERS_IDLE_MAX: usize = 4;
/// Reading ahead of all downloads together: 32 MiB.
const READ_BUFFERS_MAX: usize = 64;
/// Read buffers kept for the next download: 4 MiB.
const READ_BUFFERS_IDLE_MAX: usize = 8;

/// Makes a root directory if it is not there, and keeps other processes of ours from it as long as the file is open.
///
/// # Errors
/// When another process has it, or it cannot be written.
pub(crate) fn take(root: &Path) -> io::Result<(PathBuf, File)> {
    fs::create_dir_all(root)?;
    let root = root.canonicalize()?;
    let layout = Layout::new(&root);
    fs::create_dir_all(layout.tmp())?;
    let lock = File::create(layout.lock())?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
        rustix::io::Errno::WOULDBLOCK => io::Error::new(
            io::ErrorKind::ResourceBusy,
            "another dvcr registry serves this directory; stop it, or choose another --root",
        ),
        error => error.into(),
    })?;
    Ok((root, lock))
}

/// One root directory.
#[derive(Debug)]
pub(crate) struct Storage {
    layout: Layout,
    dirs: Dirs,
    uploads: uploads::Uploads,
    manifests: manifests::Cache,
    referrers: referrers::Checked,
    ingest_pool: Arc<Pool>,
    read_pool: Arc<Pool>,
    downloads: blobs::Downloads,
    scrubbing: scrub::Scrubbing,
    quotas: quota::Quotas,
    space: Arc<space::Space>,
    /// How old garbage must be.
    grace: collect::Grace,
    /// Held for reading while a push looks at what is there and builds on it, for writing while garbage is removed.
    accepting: RwLock<()>,
    /// How many are about to remove blobs without a link: everything that gets one meanwhile is touched.
    relink: AtomicUsize,
    /// Held by the one collection that may run.
    collecting: Mutex<()>,
    /// Held for reading while what is placed, and so can be seen, is not yet durable.
    placing: RwLock<()>,
    /// Held while a tag that never changes is put, or something is deleted that it may name.
    immutable: Mutex<()>,
    /// Held for writing while a manifest is deleted with its tags, for reading while one is put with its tag.
    deleting: RwLock<()>,
    /// Which boot of the machine this is, where the system tells.
    boot: Option<Box<str>>,
    /// Held by the one who serves the directory.
    _lock: Option<File>,
}

impl Storage {
    /// Opens a root directory, making what is missing and clearing what a killed process left in `dvcr/tmp`.
    ///
    /// # Errors
    /// When another process of ours serves the directory, or it cannot be written.
    pub(crate) fn open(root: &Path, grace: collect::Grace) -> io::Result<Self> {
        let missing = root.ancestors().take_while(|dir| !dir.exists()).count();
        let (root, lock) = take(root)?;
        let layout = Layout::new(&root);
        let tmp = layout.tmp();
        fs::remove_dir_all(&tmp)?;
        fs::create_dir(&tmp)?;
        let dirs = Dirs::new(&root, &tmp);
        dirs.make(&layout.blobs())?;
        dirs.make(&layout.repositories())?;
        let mut changes = dirs.changes();
        changes.touch(&layout.blobs());
        changes.touch(&layout.repositories());
        changes.sync()?;
        // The root is an entry in its parent, and so on up to the directory that was there before.
        for parent in root.ancestors().skip(1).take(missing.max(1)) {
            sync::sync_dir(parent)?;
        }
        let scrubbing = scrub::Scrubbing::open(&layout)?;
        Ok(Self { scrubbing, ..Self::new(layout, dirs, grace, Some(lock)) })
    }

    /// Opens a root directory that another process may serve, to look at it and change nothing.
    ///
    /// # Errors
    /// When it holds no registry.
    pub(crate) fn look(root: &Path) -> io::Result<Self> {
        let root = root.canonicalize()?;
        let layout = Layout::new(&root);
        fs::read_dir(layout.repositories())?;
        let dirs = Dirs::new(&root, &layout.tmp());
        Ok(Self::new(layout, dirs, collect::Grace::default(), None))
    }

    /// Sets what may be taken in.
    pub(crate) fn bounded(self, quotas: Vec<quota::Quota>, reserve: Option<u64>) -> Self {
        let space = Arc::new(space::Space::new(self.layout.root(), reserve));
        Self { quotas: quota::Quotas::new(quotas), space, ..self }
    }

    fn new(layout: Layout, dirs: Dirs, grace: collect::Grace, lock: Option<File>) -> Self {
        Self {
            quotas: quota::Quotas::default(),
            space: Arc::new(space::Space::new(layout.root(), None)),
            layout,
            dirs,
            uploads: uploads::Uploads::default(),
            manifests: manifests::Cache::default(),
            referrers: referrers::Checked::default(),
            ingest_pool: Pool::new(INGEST_BUFFER_BYTES, INGEST_BUFFERS_MAX, INGEST_BUFFERS_IDLE_MAX),
            read_pool: Pool::new(blobs::READ_BUFFER_BYTES, READ_BUFFERS_MAX, READ_BUFFERS_IDLE_MAX),
            downloads: blobs::Downloads::new(),
            scrubbing: scrub::Scrubbing::default(),
            grace,
            accepting: RwLock::default(),
            relink: AtomicUsize::new(0),
            collecting: Mutex::default(),
            placing: RwLock::default(),
            immutable: Mutex::default(),
            deleting: RwLock::default(),
            boot: fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(Into::into),
            _lock: lock,
        }
    }

    /// Marks that something is placed that is durable only when the guard is gone.
    fn placing(&self) -> RwLockReadGuard<'_, ()> {
        self.placing.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all that can be seen now is durable, so that what is built on it does not outlive it.
    fn settled(&self) {
        drop(self.placing.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Tells what is there and what was found, for those who watch the registry.
    pub(crate) fn stats(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let scrubbed = &self.scrubbing.seen;
        let volume = self.space.volume().ok();
        Stats {
            scrubbed_blobs: get(&scrubbed.blobs),
            scrubbed_bytes: get(&scrubbed.bytes),
            damaged_blobs: get(&scrubbed.damaged),
            quarantined_blobs: self.quarantined_count() as u64,
            scrub_finished: get(&self.scrubbing.finished),
            free_bytes: volume.map(|volume| volume.free),
            volume_bytes: volume.map(|volume| volume.bytes),
            reserved_bytes: self.space.reserve(),
            quotas: self.quotas.usage(),
            kept: None,
        }
    }

    pub(crate) fn space(&self) -> &Arc<space::Space> {
        &self.space
    }

    pub(crate) fn ingest_pool(&self) -> &Arc<Pool> {
        &self.ingest_pool
    }

    /// Notes where the content has gone to, so that nobody serves it from here any more; or that it is here.
    pub(crate) fn note_moved(&self, to: Option<&str>) -> Result<()> {
        let path = self.layout.moved();
        let note = || match to {
            Some(to) => {
                let temp = self.dirs.temp_path();
                let mut file = File::create(&temp)?;
                file.write_all(to.as_bytes())?;
                file.sync_all()?;
                fs::rename(&temp, &path)
            }
            None => match fs::remove_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                removed => removed,
            },
        };
        let noted = note().and_then(|()| path.parent().map_or(Ok(()), sync::sync_dir));
        noted.map_err(Error::at("cannot note where the registry is, in", &path))
    }

    /// Tells where the content has gone to, if it has.
    pub(crate) fn moved(&self) -> Result<Option<String>> {
        let path = self.layout.moved();
        match fs::read(&path) {
            Ok(to) => Ok(Some(String::from_utf8_lossy(&to).into_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::at("cannot read", &path)(error)),
        }
    }

    /// Tells whether the root can still be written: the readiness probe.
    pub(crate) fn probe(&self) -> Result<()> {
        let temp = self.dirs.temp_path();
        let write = || {
            fs::write(&temp, b"")?;
            fs::remove_file(&temp)
        };
        write().map_err(Error::at("cannot write below", self.layout.root()))
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Opens an empty storage, which is gone with its directory.
    pub(crate) fn storage() -> (tempfile::TempDir, Storage) {
        let root = tempfile::tempdir().unwrap();
        let storage = Storage::open(root.path(), collect::Grace::default()).unwrap();
        (root, storage)
    }
}
