//! Blobs that are read again and again, kept on this replica's own disk.
//!
//! ```text
//!  asked for once ──> remembered
//!  asked for again ─> fetched beside the request, hashed, synced, put under its digest ──> served from the disk
//! ```
//!
//! What is not what its digest says is not kept. When there is no room, what was not read for longest goes. Whether a repository
//! has the blob is asked of the bucket each time: the disk only spares its bytes.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};

use super::keys::{digest_of, name_of};
use crate::digest::{Digest, Hasher};
use crate::lock;
use crate::s3::{Client, RangeBody};
use crate::store;

/// Blobs that are fetched at a time.
const FETCHES_MAX: usize = 2;
/// Pieces of one that have come and are not yet on disk.
const PIECES_MAX: usize = 16;
/// Blobs that are remembered as asked for once; when there are more, all are forgotten.
const REMEMBERED_MAX: usize = 4096;
/// Bytes of one read from the disk, and reads at a time of one download.
const READ_BYTES: u64 = 512 << 10;
const READS_AT_ONCE: usize = 2;
/// The name of what is not whole yet.
const PARTIAL: &str = "partial-";

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The kept blobs. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Kept(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    bytes_max: u64,
    client: Client,
    runtime: Handle,
    state: Mutex<State>,
    fetches: Semaphore,
    hits: AtomicU64,
    misses: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    blobs: HashMap<Digest, Entry>,
    /// Of the blobs.
    bytes: u64,
    /// Of those that are being fetched.
    reserved: u64,
    /// Counts what is read.
    tick: u64,
    asked: HashSet<Digest>,
    coming: HashSet<Digest>,
}

#[derive(Debug)]
struct Entry {
    bytes: u64,
    read: u64,
}

/// A kept blob, open.
pub(super) struct Blob {
    file: Arc<File>,
    length: u64,
}

impl Kept {
    /// Opens a directory, making it if it is not there; of what is in it the newest stays, as far as there is room. Blocks.
    pub(super) fn open(dir: &Path, bytes_max: u64, client: Client, runtime: Handle) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let mut found: Vec<(SystemTime, Digest, u64)> = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let (name, metadata) = (entry.file_name(), entry.metadata()?);
            match name.to_str().and_then(digest_of) {
                Some(digest) => {
                    found.push((
                        metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                        digest,
                        metadata.len(),
                    ));
                }
                None if name.to_string_lossy().starts_with(PARTIAL) => fs::remove_file(entry.path())?,
                None => {}
            }
        }
        found.sort();
        let mut state = State::default();
        for (_, digest, bytes) in found {
            state.keep(digest, bytes);
        }
        let kept = Self(Arc::new(Inner {
            dir: dir.to_owned(),
            bytes_max,
            client,
            runtime,
            state: Mutex::new(state),
            fetches: Semaphore::new(FETCHES_MAX),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }));
        let surplus = lock(&kept.0.state).reserve(0, bytes_max).unwrap_or_default();
        kept.remove(&surplus);
        Ok(kept)
    }

    /// Whether a blob is kept, as far as is known without a look at the disk.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        lock(&self.0.state).blobs.contains_key(digest)
    }

    /// Opens a blob, if it is kept, for one who may have it. Blocks on the disk.
    pub(super) fn get(&self, digest: &Digest) -> Option<Blob> {
        {
            let mut state = lock(&self.0.state);
            state.tick = state.tick.saturating_add(1);
            let tick = state.tick;
            state.blobs.get_mut(digest)?.read = tick;
        }
        let file = File::open(self.path(digest)).and_then(|file| Ok((file.metadata()?.len(), file)));
        match file {
            Ok((length, file)) => {
                self.0.hits.fetch_add(1, Ordering::Relaxed);
                Some(Blob { file: Arc::new(file), length })
            }
            Err(error) => {
                let gone = lock(&self.0.state).forget(digest);
                tracing::debug!(%digest, %error, gone, "a kept blob is not there any more");
                None
            }
        }
    }

    /// Takes note that a blob was asked for that is not kept, at a key of the bucket; the second time it is fetched.
    pub(super) fn missed(&self, digest: &Digest, key: String, bytes: u64) {
        self.0.misses.fetch_add(1, Ordering::Relaxed);
        if bytes > self.0.bytes_max {
            return;
        }
        {
            let mut state = lock(&self.0.state);
            if state.asked.len() >= REMEMBERED_MAX {
                state.asked.clear();
            }
            if state.asked.insert(digest.clone())
                || state.blobs.contains_key(digest)
                || !state.coming.insert(digest.clone())
            {
                return;
            }
            state.asked.remove(digest);
        }
        let (kept, digest) = (self.clone(), digest.clone());
        self.0.runtime.spawn(async move {
            let done = match kept.0.fetches.try_acquire() {
                Ok(_permit) => kept.fetch(&digest, &key, bytes).await,
                // Whoever asks next has it fetched.
                Err(_) => Ok(()),
            };
            lock(&kept.0.state).coming.remove(&digest);
            if let Err(error) = done {
                tracing::warn!(%digest, error = &*error, "a blob is not kept on disk");
            }
        });
    }

    /// Blobs that were read from the disk, and that were not; and the bytes that are kept.
    pub(super) fn stats(&self) -> store::Kept {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        store::Kept { hits: get(&self.0.hits), misses: get(&self.0.misses), bytes: lock(&self.0.state).bytes }
    }

    /// Fetches a blob, if those that others fetch leave room for it.
    async fn fetch(&self, digest: &Digest, key: &str, bytes: u64) -> Result<(), BoxError> {
        let body = self.0.client.get_range(key, 0..bytes, None).await?;
        let Some(surplus) = lock(&self.0.state).reserve(bytes, self.0.bytes_max) else { return Ok(()) };
        let written = self.write(digest, body, surplus).await;
        let mut state = lock(&self.0.state);
        state.reserved = state.reserved.saturating_sub(bytes);
        if written.is_ok() {
            state.keep(digest.clone(), bytes);
        }
        written
    }

    /// Writes what comes to the disk, once the surplus is gone from there.
    async fn write(
        &self,
        digest: &Digest,
        mut body: RangeBody,
        surplus: Vec<Digest>,
    ) -> Result<(), BoxError> {
        let (sender, pieces) = mpsc::channel::<Bytes>(PIECES_MAX);
        let (kept, digest) = (self.clone(), digest.clone());
        let writing = tokio::task::spawn_blocking(move || {
            kept.remove(&surplus);
            let partial = kept.partial(&digest);
            let written = write_whole(&partial, &kept.path(&digest), &digest, pieces);
            if written.is_err() {
                let _ = fs::remove_file(partial);
            }
            written
        });
        let mut broken = None;
        loop {
            match body.next().await {
                Ok(Some(piece)) => {
                    // When the writing has ended, it tells why.
                    if sender.send(piece).await.is_err() {
                        break;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    broken = Some(error);
                    break;
                }
            }
        }
        drop(sender);
        writing.await?.map_err(|error| broken.map_or_else(|| error.into(), Into::into))
    }

    /// Removes the files of blobs that were forgotten. Blocks on the disk.
    fn remove(&self, surplus: &[Digest]) {
        for digest in surplus {
            if let Err(error) = fs::remove_file(self.path(digest)) {
                tracing::warn!(%digest, %error, "a kept blob is not removed");
            }
        }
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.0.dir.join(name_of(digest))
    }

    fn partial(&self, digest: &Digest) -> PathBuf {
        self.0.dir.join(format!("{PARTIAL}{}", name_of(digest)))
    }
}

impl State {
    /// Reserves room for a blob, and returns the blobs that have to go for it, which are forgotten: those that were not read for
    /// longest. `None` if what is being fetched leaves no room.
    fn reserve(&mut self, more: u64, bytes_max: u64) -> Option<Vec<Digest>> {
        let reserved = self.reserved.checked_add(more).filter(|reserved| *reserved <= bytes_max)?;
        let mut surplus = Vec::new();
        while self.bytes > bytes_max.saturating_sub(reserved) {
            let oldest = self.blobs.iter().min_by_key(|(_, entry)| entry.read);
            let Some(digest) = oldest.map(|(digest, _)| digest.clone()) else { break };
            self.forget(&digest);
            surplus.push(digest);
        }
        self.reserved = reserved;
        Some(surplus)
    }

    fn keep(&mut self, digest: Digest, bytes: u64) {
        self.tick = self.tick.saturating_add(1);
        self.bytes = self.bytes.saturating_add(bytes);
        self.blobs.insert(digest, Entry { bytes, read: self.tick });
    }

    /// Forgets a blob; returns its bytes.
    fn forget(&mut self, digest: &Digest) -> u64 {
        let bytes = self.blobs.remove(digest).map_or(0, |entry| entry.bytes);
        self.bytes = self.bytes.saturating_sub(bytes);
        bytes
    }
}

impl store::Blob for Blob {
    fn length(&self) -> u64 {
        self.length
    }

    fn read(self: Box<Self>, first: u64, end: u64) -> BoxStream<'static, io::Result<Bytes>> {
        let pieces = (0..end.saturating_sub(first).div_ceil(READ_BYTES)).map(move |n| {
            let begin = first.saturating_add(n.saturating_mul(READ_BYTES));
            (begin, end.saturating_sub(begin).min(READ_BYTES))
        });
        let reads = stream::iter(pieces).map(move |(begin, bytes)| {
            let file = Arc::clone(&self.file);
            async move {
                let read = tokio::task::spawn_blocking(move || {
                    let mut buffer = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
                    file.read_exact_at(&mut buffer, begin)?;
                    Ok(Bytes::from(buffer))
                });
                read.await.map_err(io::Error::other)?
            }
        });
        Box::pin(reads.buffered(READS_AT_ONCE))
    }
}

/// Writes what comes to a file, which gets its name when all of it is there, and is what the digest says.
fn write_whole(
    partial: &Path,
    whole: &Path,
    expected: &Digest,
    mut pieces: mpsc::Receiver<Bytes>,
) -> io::Result<()> {
    let mut hasher = Hasher::new(expected.algorithm());
    let mut file = File::create(partial)?;
    while let Some(piece) = pieces.blocking_recv() {
        hasher.update(&piece);
        file.write_all(&piece)?;
    }
    let actual = hasher.finish();
    if actual != *expected {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("its content is {actual}")));
    }
    file.sync_data()?;
    fs::rename(partial, whole)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use dvcr_tests::{S3Server, TempDir, temp_dir};

    use super::*;
    use crate::digest::Algorithm;
    use crate::s3::{Put, testing};

    const BLOB_BYTES: u64 = 1 << 20;
    const PATIENCE: Duration = Duration::from_secs(60);

    struct Fixture {
        kept: Kept,
        dir: TempDir,
        _lives: (Arc<S3Server>, TempDir),
    }

    impl Fixture {
        /// One with room for a blob and a half.
        async fn new() -> Self {
            let server = tokio::task::spawn_blocking(S3Server::shared_minio).await.unwrap();
            let (dir, keys) = (temp_dir(), temp_dir());
            let mut settings = testing::settings(&server, &keys);
            settings.bucket = server.new_bucket().unwrap();
            let client = Client::open(settings).await.unwrap();
            let kept = Kept::open(dir.path(), BLOB_BYTES * 3 / 2, client, Handle::current()).unwrap();
            Self { kept, dir, _lives: (server, keys) }
        }

        /// Puts a blob of one and the same byte, and returns its digest.
        async fn put(&self, key: &str, byte: u8) -> Digest {
            let content = Bytes::from(vec![byte; BLOB_BYTES as usize]);
            let digest = Digest::of(Algorithm::Sha256, &content);
            self.kept.0.client.put(key, content, Put::default()).await.unwrap();
            digest
        }

        /// Has it fetched.
        fn ask_twice(&self, digest: &Digest, key: &str) {
            for _ in 0..2 {
                self.kept.missed(digest, key.to_owned(), BLOB_BYTES);
            }
        }

        /// Waits until nothing is being fetched; returns the bytes that are kept, and those on disk.
        async fn bytes(&self) -> (u64, u64) {
            let begun = Instant::now();
            while !lock(&self.kept.0.state).coming.is_empty() {
                assert!(begun.elapsed() < PATIENCE, "it never ends");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            assert_eq!(lock(&self.kept.0.state).reserved, 0);
            let files = fs::read_dir(self.dir.path()).unwrap();
            let on_disk = files.map(|file| file.unwrap().metadata().unwrap().len()).sum();
            (self.kept.stats().bytes, on_disk)
        }
    }

    #[tokio::test]
    async fn blobs_that_are_fetched_at_once_are_together_within_the_bound() {
        let fixture = Fixture::new().await;
        let (a, b) = (fixture.put("a", 1).await, fixture.put("b", 2).await);
        fixture.ask_twice(&a, "a");
        fixture.ask_twice(&b, "b");
        assert_eq!(fixture.bytes().await, (BLOB_BYTES, BLOB_BYTES));
    }

    #[tokio::test]
    async fn what_is_not_what_its_digest_says_takes_no_room() {
        let fixture = Fixture::new().await;
        let (a, b) = (fixture.put("a", 1).await, fixture.put("b", 2).await);
        fixture.ask_twice(&a, "b");
        assert_eq!(fixture.bytes().await, (0, 0));
        fixture.ask_twice(&b, "b");
        assert_eq!(fixture.bytes().await, (BLOB_BYTES, BLOB_BYTES));
        assert!(fixture.kept.has(&b) && !fixture.kept.has(&a));
    }
}
