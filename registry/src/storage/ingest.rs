//! Takes the bytes of one request into an upload session: receiving, hashing and writing overlap.
//!
//! ```text
//!  HTTP body ──copy──> aligned 1 MiB buffer ──┬──> hashing thread: SHA-2, a saved state now and then
//!  (async task)                               └──> writing thread: O_DIRECT, page cache for unaligned edges
//! ```
//!
//! Both threads read the same buffer; the queues hold one buffer each, and the pool bounds all uploads together.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, OFlags};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::pool::{ALIGN_BYTES, Buffer, Pool};
use super::space::{Purpose, Space};
use super::uploads::save_state;
use super::{Error, Result};
use crate::digest::{Algorithm, Hasher};
use crate::store::Stopped;

/// Bytes per buffer of the upload pool, a multiple of [`ALIGN_BYTES`].
pub(crate) const INGEST_BUFFER_BYTES: usize = 1 << 20;
/// Buffers waiting for one thread.
const QUEUE_BUFFERS_MAX: usize = 1;
/// Least run of bytes worth a direct write.
const DIRECT_BYTES_MIN: usize = 64 << 10;
/// How often the hash state is put on disk while a request goes on, so that a killed stream can be resumed.
const CHECKPOINT_BYTES: u64 = 64 << 20;
/// Least announced length that space is reserved for.
const RESERVE_BYTES_MIN: u64 = 1 << 20;

/// The receiving end of one request.
pub(crate) struct Ingest {
    pool: Arc<Pool>,
    buffer: Option<Buffer>,
    /// Where the first byte of the current buffer that is not ours to fill ends.
    start: usize,
    end: usize,
    offset: u64,
    to_hash: mpsc::Sender<Arc<Piece>>,
    to_write: mpsc::Sender<Arc<Piece>>,
    /// Up to where the file has its bytes.
    written: watch::Receiver<u64>,
    hashing: JoinHandle<Hasher>,
    writing: JoinHandle<Result<()>>,
}

/// A filled buffer and its place in the file.
struct Piece {
    buffer: Buffer,
    start: usize,
    offset: u64,
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        &self.buffer.as_ref()[self.start..]
    }
}

impl Ingest {
    /// Begins at `offset` of `data`, whose content up to there is what `hasher` has hashed; the rest is cut off.
    ///
    /// `length` is what the request announced, and 0 if it did not. Must be called on a Tokio runtime.
    pub(crate) fn start(
        (pool, space): (&Arc<Pool>, &Arc<Space>),
        data: &Path,
        hashstates: PathBuf,
        offset: u64,
        hasher: Hasher,
        length: u64,
    ) -> Self {
        let (to_hash, hash_queue) = mpsc::channel(QUEUE_BUFFERS_MAX);
        let (to_write, write_queue) = mpsc::channel(QUEUE_BUFFERS_MAX);
        let data = data.to_owned();
        let start = usize::try_from(offset % ALIGN_BYTES as u64).unwrap_or(0);
        let (reached, written) = watch::channel(offset);
        let hashable = written.clone();
        let space = Arc::clone(space);
        Self {
            pool: Arc::clone(pool),
            buffer: None,
            start,
            end: start,
            offset,
            to_hash,
            to_write,
            written,
            hashing: tokio::task::spawn_blocking(move || {
                hash(hasher, offset, &hashstates, hash_queue, &hashable)
            }),
            writing: tokio::task::spawn_blocking(move || {
                write(&data, offset, length, &space, write_queue, &reached)
            }),
        }
    }

    /// Tells up to where the file has its bytes, which can be read from then on.
    pub(crate) fn written(&self) -> watch::Receiver<u64> {
        self.written.clone()
    }

    /// Takes bytes in, waiting while both queues are full.
    ///
    /// # Errors
    /// When writing failed, which [`Ingest::finish`] tells more of; the session then goes on from its last saved state.
    pub(crate) async fn push(&mut self, mut bytes: &[u8]) -> Result<(), Stopped> {
        while !bytes.is_empty() {
            let mut buffer = match self.buffer.take() {
                Some(buffer) => buffer,
                None => self.pool.get().await,
            };
            let room = buffer.as_mut().get_mut(self.end..).unwrap_or_default();
            let (now, later) = bytes.split_at(bytes.len().min(room.len()));
            room[..now.len()].copy_from_slice(now);
            self.end += now.len();
            bytes = later;
            if now.len() == room.len() {
                self.hand_over(buffer).await?;
            } else {
                self.buffer = Some(buffer);
            }
        }
        Ok(())
    }

    /// Waits until everything is hashed and written (to the page cache or the device, not synced).
    ///
    /// Returns the hasher and the length of the content so far.
    pub(crate) async fn finish(mut self) -> Result<(Hasher, u64)> {
        let handed_over = match self.buffer.take() {
            Some(buffer) => self.hand_over(buffer).await,
            None => Ok(()),
        };
        drop((self.to_hash, self.to_write));
        self.writing.await.map_err(join_error)??;
        let hasher = self.hashing.await.map_err(join_error)?;
        handed_over.map_err(|Stopped| Error::other("an upload's thread ended early"))?;
        Ok((hasher, self.offset))
    }

    async fn hand_over(&mut self, mut buffer: Buffer) -> Result<(), Stopped> {
        buffer.truncate(self.end);
        let piece = Arc::new(Piece { buffer, start: self.start, offset: self.offset });
        self.offset = self.offset.checked_add((self.end - self.start) as u64).ok_or(Stopped)?;
        (self.start, self.end) = (0, 0);
        self.to_hash.send(Arc::clone(&piece)).await.map_err(|_| Stopped)?;
        self.to_write.send(piece).await.map_err(|_| Stopped)
    }
}

pub(super) fn join_error(error: tokio::task::JoinError) -> Error {
    Error::new("an upload's thread did not end well", io::Error::other(error))
}

fn hash(
    mut hasher: Hasher,
    mut offset: u64,
    hashstates: &Path,
    mut queue: mpsc::Receiver<Arc<Piece>>,
    written: &watch::Receiver<u64>,
) -> Hasher {
    let mut next_checkpoint = offset.saturating_add(CHECKPOINT_BYTES);
    let mut checkpoint: Option<(Hasher, u64)> = None;
    while let Some(piece) = queue.blocking_recv() {
        hasher.update(piece.bytes());
        offset += piece.bytes().len() as u64;
        drop(piece);
        if offset >= next_checkpoint {
            next_checkpoint = offset.saturating_add(CHECKPOINT_BYTES);
            checkpoint = Some((hasher.clone(), offset));
        }
        // A state ahead of the file would be of no use, and it takes the place of the one before.
        if let Some((state, at)) = checkpoint.take_if(|(_, at)| *written.borrow() >= *at)
            && let Err(error) = save_state(hashstates, &state, at)
        {
            // One that cannot be saved is not missed now.
            tracing::warn!(%error, path = %hashstates.display(), "hash state not saved");
        }
    }
    hasher
}

fn write(
    data: &Path,
    offset: u64,
    length: u64,
    space: &Space,
    mut queue: mpsc::Receiver<Arc<Piece>>,
    written: &watch::Sender<u64>,
) -> Result<()> {
    let all = match length {
        RESERVE_BYTES_MIN.. => Some(space.take(length, Purpose::Blob)?),
        _ => None,
    };
    let mut target =
        Target::open(data, offset, length).map_err(Error::at("cannot open upload data", data))?;
    // What the file has been given is the filesystem's to count.
    let all = all.filter(|_| !target.reserved);
    while let Some(piece) = queue.blocking_recv() {
        let _grant = match target.reserved || all.is_some() {
            true => None,
            false => Some(space.take(piece.bytes().len() as u64, Purpose::Blob)?),
        };
        target.write(piece.bytes(), piece.offset).map_err(Error::at("cannot write upload data", data))?;
        written.send_replace(piece.offset + piece.bytes().len() as u64);
    }
    Ok(())
}

/// The session's data file.
struct Target {
    cached: File,
    /// Bypasses the page cache; `None` where the filesystem refuses.
    direct: Option<File>,
    /// Whether the filesystem has set the announced length aside.
    reserved: bool,
}

impl Target {
    fn open(path: &Path, offset: u64, length: u64) -> io::Result<Self> {
        let cached = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        // Also gives back what was reserved for a request that broke.
        cached.set_len(offset)?;
        let reserved = length >= RESERVE_BYTES_MIN && reserve(&cached, offset, length)?;
        let direct = match length {
            1..RESERVE_BYTES_MIN => None,
            _ => {
                let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0);
                OpenOptions::new().write(true).custom_flags(flags).open(path).ok()
            }
        };
        Ok(Self { cached, direct, reserved })
    }

    /// Writes at `offset`; the memory is aligned as the offset is.
    fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let Some(direct) = &self.direct else { return self.cached.write_all_at(bytes, offset) };
        let past_edge = usize::try_from(offset % ALIGN_BYTES as u64).unwrap_or(0);
        let head = ((ALIGN_BYTES - past_edge) % ALIGN_BYTES).min(bytes.len());
        let (head, rest) = bytes.split_at(head);
        let (middle, tail) = rest.split_at(rest.len() - rest.len() % ALIGN_BYTES);
        if middle.len() < DIRECT_BYTES_MIN {
            return self.cached.write_all_at(bytes, offset);
        }
        self.cached.write_all_at(head, offset)?;
        let offset = offset + head.len() as u64;
        match direct.write_all_at(middle, offset) {
            Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
                self.direct = None;
                self.cached.write_all_at(middle, offset)?;
            }
            done => done?,
        }
        self.cached.write_all_at(tail, offset + middle.len() as u64)
    }
}

/// Reserves space, so that a full disk is noticed before the bytes are sent, and large extents are found.
/// Returns whether the filesystem did.
fn reserve(file: &File, offset: u64, length: u64) -> io::Result<bool> {
    match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, offset, length) {
        Err(error @ (rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT | rustix::io::Errno::FBIG)) => {
            Err(error.into())
        }
        // Where it is not supported, nothing is lost but speed.
        reserved => Ok(reserved.is_ok()),
    }
}

/// Hashes a file from the beginning; for the rare case that no usable state was kept.
pub(crate) fn hash_file(path: &Path, algorithm: Algorithm, length: u64) -> io::Result<Hasher> {
    let file = File::open(path)?;
    let mut hasher = Hasher::new(algorithm);
    let mut block = vec![0; INGEST_BUFFER_BYTES];
    let mut offset = 0;
    while offset < length {
        let want = usize::try_from(length - offset).unwrap_or(usize::MAX).min(block.len());
        file.read_exact_at(&mut block[..want], offset)?;
        hasher.update(&block[..want]);
        offset += want as u64;
    }
    Ok(hasher)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_that_takes_no_bytes_is_told_at_the_end_and_nothing_panics() {
        let dir = tempfile::tempdir().unwrap();
        let pool = Pool::new(INGEST_BUFFER_BYTES, 8, 1);
        let absent = dir.path().join("absent/data");
        let space = Arc::new(Space::new(dir.path(), Some(0)));
        let hasher = Hasher::new(Algorithm::Sha256);
        let mut ingest = Ingest::start((&pool, &space), &absent, dir.path().to_owned(), 0, hasher, 0);
        let block = vec![1; INGEST_BUFFER_BYTES];
        while ingest.push(&block).await.is_ok() {}
        ingest.push(&block).await.unwrap_err();
        ingest.push(b"a rest").await.ok();
        let Err(error) = ingest.finish().await else { panic!("it went well") };
        assert!(error.to_string().contains("absent/data"), "{error}");
    }

    #[tokio::test]
    async fn a_state_is_saved_only_when_the_file_has_its_bytes() {
        let pool = Pool::new(INGEST_BUFFER_BYTES, 2, 1);
        for (written, saved) in [(0, false), (CHECKPOINT_BYTES, true)] {
            let dir = tempfile::tempdir().unwrap();
            let states = dir.path().join("sha256");
            std::fs::create_dir(&states).unwrap();
            let (sender, queue) = mpsc::channel(1);
            let (to, (_sender, reached)) = (states.clone(), watch::channel(written));
            let hashing = tokio::task::spawn_blocking(move || {
                hash(Hasher::new(Algorithm::Sha256), 0, &to, queue, &reached)
            });
            for n in 0..CHECKPOINT_BYTES / INGEST_BUFFER_BYTES as u64 {
                let offset = n * INGEST_BUFFER_BYTES as u64;
                let piece = Piece { buffer: pool.get().await, start: 0, offset };
                sender.send(Arc::new(piece)).await.ok();
            }
            drop(sender);
            hashing.await.unwrap();
            assert_eq!(states.join(CHECKPOINT_BYTES.to_string()).exists(), saved);
        }
    }
}
