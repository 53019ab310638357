//! Looking blobs up, linking them, and reading them.

use std::fs::{self, File};
use std::io::{self, ErrorKind, IoSliceMut, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use rustix::io::ReadWriteFlags;
use tokio::task::JoinHandle;

use super::pool::{Buffer, Pool};
use super::quota::Room;
use super::{Error, Result, Storage};
use crate::digest::{Algorithm, Digest};
use crate::names::RepoName;

/// Bytes per buffer of the read pool.
pub(crate) const READ_BUFFER_BYTES: usize = 512 << 10;
/// Longest link that is read; a sha512 digest takes 135 bytes.
const LINK_BYTES_MAX: u64 = 256;

/// A blob a repository has, open.
pub(crate) struct Blob {
    pub(super) storage: Arc<Storage>,
    pub(crate) file: File,
    pub(crate) length: u64,
}

impl Storage {
    /// Finds a blob of a repository and tells its length.
    pub(crate) fn stat_blob(&self, repo: &RepoName, digest: &Digest) -> Result<Option<u64>> {
        let Some(target) = self.layer(repo, digest)? else { return Ok(None) };
        let path = self.layout.blob(&target);
        found(fs::metadata(&path).map(|metadata| metadata.len())).map_err(Error::at("cannot look at", &path))
    }

    /// Finds a blob of a repository for one who will build on it: it counts as new to the collector. Only one who holds
    /// [`Storage::accepting`] can be sure that it is still there a moment later.
    pub(crate) fn claim_blob(&self, repo: &RepoName, digest: &Digest) -> Result<Option<u64>> {
        let length = self.stat_blob(repo, digest)?;
        if length.is_some() {
            self.touch(&self.layout.layer_link(repo, digest))?;
        }
        Ok(length)
    }

    /// Opens a blob of a repository.
    pub(crate) fn open_blob(self: &Arc<Self>, repo: &RepoName, digest: &Digest) -> Result<Option<Blob>> {
        let Some(target) = self.layer(repo, digest)? else { return Ok(None) };
        let path = self.layout.blob(&target);
        let open = || {
            let file = File::open(&path)?;
            let length = file.metadata()?.len();
            Ok(Blob { storage: Arc::clone(self), file, length })
        };
        found(open()).map_err(Error::at("cannot open", &path))
    }

    /// Gives `to` a blob that `from` has; durable when it returns. Returns its length, `None` if `from` lacks it.
    pub(crate) fn mount_blob(&self, from: &RepoName, to: &RepoName, digest: &Digest) -> Result<Option<u64>> {
        let mut room = Room::default();
        // Before anybody is held up.
        if self.quotas.is_for(to) {
            let Some(target) = self.layer(from, digest)? else { return Ok(None) };
            let Some(bytes) = self.stat_blob(from, digest)? else { return Ok(None) };
            room = self.room_for(to, &target, bytes)?;
        }
        let _accepting = self.accepting();
        let Some(target) = self.layer(from, digest)? else { return Ok(None) };
        let blob = self.layout.blob(&target);
        let length = found(fs::metadata(&blob)).map_err(Error::at("cannot look at", &blob))?;
        let Some(bytes) = length.filter(fs::Metadata::is_file).map(|metadata| metadata.len()) else {
            return Ok(None);
        };
        self.touch(&blob)?;
        self.settled();
        let link = self.link_temp(&target)?;
        let mut changes = self.dirs.changes();
        let path = self.layout.layer_link(to, digest);
        let _placing = self.placing();
        self.quotas
            .placing(to, &path, (&target, bytes), &mut room, || self.place_link(&mut changes, link, &path))?;
        changes.sync().map_err(Error::at("cannot sync directories of", &path))?;
        Ok(Some(bytes))
    }

    /// Takes a blob from a repository; its bytes stay, for other repositories may have it. Returns whether it was there.
    pub(crate) fn delete_blob(&self, repo: &RepoName, digest: &Digest) -> Result<bool> {
        let link = self.layout.layer_link(repo, digest);
        let target = link_target(&link, digest)?;
        self.remove_link(repo, &link, target.as_ref().unwrap_or(digest))
    }

    /// Reads a blob's link. Distribution lets the digest of one algorithm name a blob that is stored under another.
    fn layer(&self, repo: &RepoName, digest: &Digest) -> Result<Option<Digest>> {
        read_link(&self.layout.layer_link(repo, digest))
    }
}

/// Reads a link; one that holds no digest counts as absent.
pub(super) fn read_link(path: &Path) -> Result<Option<Digest>> {
    let read = || {
        let mut text = Vec::new();
        match File::open(path)?.take(LINK_BYTES_MAX).read_to_end(&mut text) {
            Err(error) if error.kind() != ErrorKind::IsADirectory => Err(error),
            _ => Ok(text),
        }
    };
    let Some(text) = found(read()).map_err(Error::at("cannot read", path))? else { return Ok(None) };
    match String::from_utf8_lossy(&text).trim_end().parse() {
        Ok(digest) => Ok(Some(digest)),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "a link holds no digest and is passed over");
            Ok(None)
        }
    }
}

/// Reads which blob a repository's link names: only that of a sha512 digest may name another than it is called.
pub(super) fn link_target(link: &Path, digest: &Digest) -> Result<Option<Digest>> {
    match digest.algorithm() {
        Algorithm::Sha256 => Ok(Some(digest.clone())),
        Algorithm::Sha512 => read_link(link),
    }
}

/// Turns "not found" into `None`.
pub(super) fn found<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads a part of a blob in order: the beginning at once if the page cache has it, the rest one buffer ahead on another
/// thread. So reading and sending overlap, and a small blob needs no thread. When there are more downloads than half the
/// cores, what is cached is read when it is wanted: a hop to another thread then costs more than it brings.
pub(crate) struct Reader {
    file: Arc<File>,
    pool: Arc<Pool>,
    download: Download,
    offset: u64,
    end: u64,
    ahead: Option<JoinHandle<io::Result<Buffer>>>,
}

impl Reader {
    /// Reads from `offset` up to `end`, which must lie inside the file.
    pub(crate) fn new(file: File, storage: &Storage, offset: u64, end: u64) -> Self {
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
        let (pool, download) = (Arc::clone(&storage.read_pool), storage.downloads.begin());
        Self { file: Arc::new(file), pool, download, offset, end, ahead: None }
    }

    /// Returns the next bytes, `None` at the end.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let buffer = match self.ahead.take() {
            Some(ahead) => ahead.await.map_err(io::Error::other)??,
            None if self.offset >= self.end => return Ok(None),
            None => {
                let mut buffer = self.pool.get_extra();
                buffer.truncate(self.left());
                match read_cached(&self.file, &mut buffer, self.offset) {
                    true => buffer,
                    false => self.read(buffer, self.offset).await.map_err(io::Error::other)??,
                }
            }
        };
        self.offset += buffer.len() as u64;
        if self.offset < self.end
            && let Some(mut ahead) = self.pool.try_get()
        {
            ahead.truncate(self.left());
            if self.download.is_one_of_few() || !probably_cached(&self.file, self.offset) {
                self.ahead = Some(self.read(ahead, self.offset));
            }
        }
        Ok(Some(Bytes::from_owner(buffer)))
    }

    fn left(&self) -> usize {
        usize::try_from(self.end - self.offset).unwrap_or(usize::MAX)
    }

    fn read(&self, mut buffer: Buffer, offset: u64) -> JoinHandle<io::Result<Buffer>> {
        let file = Arc::clone(&self.file);
        tokio::task::spawn_blocking(move || {
            file.read_exact_at(buffer.as_mut(), offset)?;
            Ok(buffer)
        })
    }
}

/// Counts the downloads that go on.
#[derive(Debug)]
pub(super) struct Downloads {
    active: Arc<AtomicUsize>,
    /// Up to so many have a second core each.
    few_max: usize,
}

impl Downloads {
    pub(super) fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { active: Arc::default(), few_max: cores / 2 }
    }

    fn begin(&self) -> Download {
        self.active.fetch_add(1, Ordering::Relaxed);
        Download { active: Arc::clone(&self.active), few_max: self.few_max }
    }
}

/// One download, counted as long as it lives.
struct Download {
    active: Arc<AtomicUsize>,
    few_max: usize,
}

impl Download {
    fn is_one_of_few(&self) -> bool {
        self.active.load(Ordering::Relaxed) <= self.few_max
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        self.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Fills the buffer if that needs no waiting for the device.
fn read_cached(file: &File, buffer: &mut Buffer, offset: u64) -> bool {
    let wanted = buffer.len();
    let slices = &mut [IoSliceMut::new(buffer.as_mut())];
    rustix::io::preadv2(file, slices, offset, ReadWriteFlags::NOWAIT) == Ok(wanted)
}

fn probably_cached(file: &File, offset: u64) -> bool {
    let mut byte = [0];
    let slices = &mut [IoSliceMut::new(&mut byte)];
    rustix::io::preadv2(file, slices, offset, ReadWriteFlags::NOWAIT) == Ok(1)
}
