//! Local files and block devices: the only module that touches them.
//!
//! A target is recognisably incomplete until it is finished: a file has another name, a block device begins with
//! zeros (its real first MiB comes last, after everything else is on stable storage, and of that its first page).

mod direct;
mod partial;
mod same;

use std::fs::{File, OpenOptions};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;

use self::direct::CACHED_BYTES_MAX;
pub(crate) use self::direct::DirectFile;
pub(crate) use self::partial::Partial;
use self::partial::partial_path;
pub use self::same::refuse_same_storage;
use crate::io::{Extent, ExtentKind, ReadAt};
use crate::zeros::runs;
use crate::{Error, ErrorKind, Result};

/// First bytes of a block device, written last.
const DEVICE_HEAD_BYTES: u64 = 1 << 20;

/// The very last bytes written to a block device: few enough to be one page, and enough for every magic number that
/// marks the start of a disk.
const DEVICE_FIRST_BYTES: usize = 4096;

/// Zeros written at a time where the device cannot be told to zero a range.
const ZERO_BYTES: usize = 1 << 20;

/// Shortest run of zeros that is left out of a fresh file.
const SPARSE_BYTES_MIN: usize = 4 << 10;

/// Shortest run of zeros for which a device is asked to zero a range; a shorter one is written as data.
const DEVICE_ZERO_BYTES_MIN: usize = 64 << 10;

/// Largest unit of the page cache, bytes: the kernel drops whole ones (on x86-64, a huge page).
const FOLIO_BYTES_MAX: u64 = 2 << 20;

/// When a new file gets its room on the file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// With the data: zeros are holes.
    #[default]
    Off,
    /// All of it, at once, without being written: no later write fails for want of room.
    Falloc,
    /// All of it, by zeros being written as data is.
    Full,
}

impl FromStr for Preallocation {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "off" => Ok(Preallocation::Off),
            "falloc" => Ok(Preallocation::Falloc),
            "full" => Ok(Preallocation::Full),
            other => Err(Error::new(
                ErrorKind::Unsupported,
                format!("unknown preallocation {other:?}; known are off, falloc, full"),
            )),
        }
    }
}

/// A regular file or block device that is read at random.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    len: u64,
    sparse: bool,
}

impl FileSource {
    /// Opens `path` for reading.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(format!("opening {}", path.display()), e))?;
        let metadata = file.metadata().map_err(|e| Error::io(format!("examining {}", path.display()), e))?;
        let kind = metadata.file_type();
        let len = if kind.is_block_device() {
            device_bytes(&file, path)?
        } else if kind.is_file() {
            metadata.len()
        } else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{} is neither a regular file nor a block device", path.display()),
            ));
        };
        Ok(Self { file, len, sparse: kind.is_file() })
    }

    /// Takes what was read out of the page cache, where nobody else uses it.
    pub fn forget(&self, offset: u64, len: u64) {
        // What was read in order before belongs to the same folio, and is dropped with the end of it or not at all.
        let start = offset / FOLIO_BYTES_MAX * FOLIO_BYTES_MAX;
        let (len, offset) = (len.saturating_add(offset - start), start);
        // Mere advice: a file system without a cache has nothing to drop.
        let _ = rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(len), rustix::fs::Advice::DontNeed);
    }

    /// Length in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.len
    }

    /// Bytes that the file occupies on its file system.
    pub fn allocated_bytes(&self) -> Result<u64> {
        let metadata = self.file.metadata().map_err(|e| Error::io("examining the image file", e))?;
        Ok(metadata.blocks() * 512)
    }
}

impl ReadAt for FileSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn extent_at(&self, offset: u64) -> Option<Extent> {
        if !self.sparse || offset >= self.len {
            return None;
        }
        let (start, kind, end) = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => (offset, ExtentKind::Hole, data),
            Ok(_) => (offset, ExtentKind::Data, rustix::fs::seek(&self.file, SeekFrom::Hole(offset)).ok()?),
            // No data up to the end.
            Err(Errno::NXIO) => (offset, ExtentKind::Hole, self.len),
            Err(_) => return None,
        };
        let len = end.min(self.len).checked_sub(start)?;
        (len > 0).then_some(Extent { start, len, kind, host: None })
    }
}

/// Bytes that the filesystem has free on which a file at `path` is, or would be, with what a killed process has left for the next
/// to take over; `None` for a block device, and where nothing tells.
pub fn free_bytes(path: &Path) -> Option<u64> {
    if std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device()) {
        return None;
    }
    let file = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let volume = rustix::fs::statvfs(folder).ok()?;
    let left = std::fs::symlink_metadata(partial_path(&file)).map_or(0, |left| left.blocks() * 512);
    Some(volume.f_bavail.saturating_mul(volume.f_frsize).saturating_add(left))
}

/// A raw disk under construction: a sparse file or a block device, written by any number of threads.
#[derive(Debug)]
pub struct RawTarget {
    path: PathBuf,
    file: DirectFile,
    size: AtomicU64,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// A new file, renamed when it is complete; it is zero where nothing was written.
    Fresh(Partial, Preallocation),
    /// Storage that exists and may hold old bytes. Its first bytes are kept here until the end.
    InPlace { capacity: u64, head: Mutex<Vec<u8>> },
}

impl RawTarget {
    /// Starts a raw disk of `size` bytes at `path`: a block device is overwritten, everything else becomes a new
    /// file, which replaces an existing one when it is finished.
    ///
    /// Fails with [`ErrorKind::Target`] if `path` is a device smaller than `size`, or nothing to write a disk to.
    pub fn create(path: &Path, size: u64) -> Result<Self> {
        Self::create_with(path, size, Preallocation::Off)
    }

    /// Starts a raw disk like [`RawTarget::create`]; a file gets its room as told. A block device has it already, and
    /// anything but [`Preallocation::Off`] fails with [`ErrorKind::Target`].
    pub fn create_with(path: &Path, size: u64, preallocation: Preallocation) -> Result<Self> {
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.file_type().is_block_device() => {
                if preallocation != Preallocation::Off {
                    let text = format!("{} is a block device: there is no room to allocate", path.display());
                    return Err(Error::new(ErrorKind::Target, text));
                }
                Self::in_place(path, size)
            }
            _ => {
                let partial = Partial::create(path)?;
                let buffered = partial
                    .file
                    .try_clone()
                    .map_err(|e| Error::io(format!("opening {}", partial.temporary.display()), e))?;
                // Not through a link that took the name meanwhile.
                let file = DirectFile::new(buffered, &partial.temporary, OFlags::NOFOLLOW);
                let kind = Kind::Fresh(partial, preallocation);
                let target = Self { path: path.to_owned(), file, size: AtomicU64::new(0), kind };
                target.grow(size)?;
                Ok(target)
            }
        }
    }

    /// Starts a raw disk of `size` bytes over the storage at `path`, a block device or a file of fixed length,
    /// which may hold old bytes. Its first MiB is wiped at once and gets its content in [`RawTarget::finish`].
    pub fn in_place(path: &Path, size: u64) -> Result<Self> {
        let context = |e| Error::io(format!("opening {} for writing", path.display()), e);
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        // On a block device: fail if it is mounted or otherwise in use.
        let buffered =
            options.clone().custom_flags(OFlags::EXCL.bits() as i32).open(path).map_err(context)?;
        let metadata = buffered.metadata().map_err(context)?;
        let capacity = if metadata.file_type().is_block_device() {
            device_bytes(&buffered, path)?
        } else {
            metadata.len()
        };
        let head = Mutex::new(vec![0; DEVICE_HEAD_BYTES.min(capacity) as usize]);
        let target = Self {
            path: path.to_owned(),
            file: DirectFile::new(buffered, path, OFlags::empty()),
            size: AtomicU64::new(0),
            kind: Kind::InPlace { capacity, head },
        };
        target.grow(size)?;
        let wiped = vec![0; DEVICE_HEAD_BYTES.min(capacity) as usize];
        target.write_data(&wiped, 0)?;
        target.sync()?;
        Ok(target)
    }

    /// Gives the file these permission bits when it is complete, instead of those of the file it replaces or the usual
    /// ones. A block device keeps its own.
    pub fn set_mode(&mut self, mode: u32) -> Result<()> {
        match &mut self.kind {
            Kind::Fresh(partial, _) => partial.set_mode(mode),
            Kind::InPlace { .. } => Ok(()),
        }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Makes the disk at least `size` bytes; fails with [`ErrorKind::Target`] if there is no room for it.
    pub fn grow(&self, size: u64) -> Result<()> {
        if size <= self.size() {
            return Ok(());
        }
        match &self.kind {
            Kind::Fresh(partial, preallocation) => {
                self.file.buffered.set_len(size).map_err(|e| {
                    Error::io(format!("making {} {size} bytes long", partial.temporary.display()), e)
                })?;
                if *preallocation == Preallocation::Falloc {
                    allocate(&self.file.buffered, self.size(), size, &partial.temporary)?;
                }
            }
            Kind::InPlace { capacity, .. } if size > *capacity => {
                return Err(Error::new(
                    ErrorKind::Target,
                    format!(
                        "{} has {capacity} bytes, the disk needs {size}; use a larger target",
                        self.path.display()
                    ),
                ));
            }
            Kind::InPlace { .. } => {}
        }
        self.size.fetch_max(size, Ordering::Relaxed);
        Ok(())
    }

    /// Writes `bytes` at `offset` and returns how many of them went out as data: zeros need not be stored.
    ///
    /// Fast when both begin at multiples of 4096.
    pub fn write_sparse(&self, bytes: &[u8], offset: u64) -> Result<u64> {
        let zero_bytes_min = match self.kind {
            Kind::Fresh(_, Preallocation::Full) => {
                self.write_data(bytes, offset)?;
                return Ok(bytes.len() as u64);
            }
            Kind::Fresh(..) => SPARSE_BYTES_MIN,
            Kind::InPlace { .. } => DEVICE_ZERO_BYTES_MIN,
        };
        let mut data_bytes = 0;
        for run in runs(bytes, zero_bytes_min) {
            let at = offset + run.start as u64;
            if run.zero {
                self.write_zeros(at, (run.end - run.start) as u64)?;
                continue;
            }
            data_bytes += (run.end - run.start) as u64;
            let rest = self.keep_head(&bytes[run.start..run.end], at);
            let kept = run.end - run.start - rest.len();
            self.write_data(rest, at + kept as u64)?;
        }
        Ok(data_bytes)
    }

    /// Makes `len` bytes at `offset` zero.
    pub fn write_zeros(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.saturating_add(len);
        let mut at = offset;
        let head = match &self.kind {
            Kind::Fresh(_, Preallocation::Full) => return self.write_zero_bytes(offset, end),
            Kind::Fresh(..) => return Ok(()),
            Kind::InPlace { head, .. } => head,
        };
        {
            let mut head = lock(head);
            if let Some(kept) = head.get_mut(at.min(DEVICE_HEAD_BYTES) as usize..) {
                let n = len.min(kept.len() as u64);
                kept[..n as usize].fill(0);
                at += n;
            }
        }
        if at >= end {
            return Ok(());
        }
        // On a block device the first is what BLKZEROOUT does without its fallback to writing: the device unmaps the
        // range and promises zeros, which a discard (BLKDISCARD) does not promise. The second keeps the range allocated,
        // and writes in the kernel where the device can do neither.
        for flags in [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE] {
            let flags = flags | FallocateFlags::KEEP_SIZE;
            if rustix::fs::fallocate(&self.file.buffered, flags, at, end - at).is_ok() {
                return Ok(());
            }
        }
        self.write_zero_bytes(at, end)
    }

    fn write_zero_bytes(&self, mut at: u64, end: u64) -> Result<()> {
        let zeros = crate::buffer::AlignedBuf::new(ZERO_BYTES)?;
        while at < end {
            let n = (end - at).min(ZERO_BYTES as u64);
            self.write_data(zeros.first(n as usize), at)?;
            at += n;
        }
        Ok(())
    }

    /// Makes the whole target a copy of `source` that shares its blocks, where the file system can do that; tells whether
    /// it did. A target that is longer is zero behind the copy.
    pub fn reflink(&self, source: &FileSource) -> Result<bool> {
        let Kind::Fresh(partial, Preallocation::Off) = &self.kind else { return Ok(false) };
        if !source.sparse {
            return Ok(false);
        }
        let (file, size) = (&self.file.buffered, self.size());
        // The last block of a file is only shared where the copy ends too. A refusal, whatever its reason, leaves the file
        // empty, and its bytes to be copied.
        let shared = file.set_len(0).and_then(|()| {
            let shared = rustix::fs::ioctl_ficlone(file, &source.file).is_ok();
            file.set_len(size).map(|()| shared)
        });
        shared.map_err(|e| Error::io(format!("making {} {size} bytes long", partial.temporary.display()), e))
    }

    /// Copies some of `len` bytes at `offset` of `source` to the same place inside of the kernel, past the page cache as far as
    /// it lets; returns how many. `None` where the kernel, or this target, cannot do that.
    pub fn copy_within_kernel(&self, source: &FileSource, offset: u64, len: u64) -> Result<Option<u64>> {
        let Kind::Fresh(_, Preallocation::Off) = &self.kind else { return Ok(None) };
        let step = usize::try_from(len.min(CACHED_BYTES_MAX)).unwrap_or(ZERO_BYTES);
        let (mut from, mut to) = (offset, offset);
        let copied = rustix::fs::copy_file_range(
            &source.file,
            Some(&mut from),
            &self.file.buffered,
            Some(&mut to),
            step,
        );
        match copied {
            // Of another kind of file, or behind the end of one that was cut.
            Ok(0) | Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => {
                Ok(None)
            }
            Ok(copied) => {
                let copied = copied as u64;
                source.forget(offset, copied);
                self.file.drop_behind(copied).map_err(|e| self.write_error(offset, e))?;
                Ok(Some(copied))
            }
            Err(e) => Err(self.write_error(offset, e.into())),
        }
    }

    /// Completes the disk: everything is on stable storage, and under its name, when this returns.
    pub fn finish(self) -> Result<()> {
        self.sync()?;
        match &self.kind {
            Kind::InPlace { head, .. } => {
                let head = lock(head);
                let head = &head[..head.len().min(self.size() as usize)];
                let (first, rest) = head.split_at(head.len().min(DEVICE_FIRST_BYTES));
                // Two steps: a crash inside one long write could leave the first bytes without the others.
                for (bytes, offset) in [(rest, first.len() as u64), (first, 0)] {
                    self.file
                        .buffered
                        .write_all_at(bytes, offset)
                        .map_err(|e| self.write_error(offset, e))?;
                    self.sync()?;
                }
                Ok(())
            }
            Kind::Fresh(..) => {
                let Kind::Fresh(partial, _) = self.kind else { return Ok(()) };
                partial.commit()
            }
        }
    }

    /// Keeps the part of `bytes` that belongs to the head of a device; returns the rest.
    fn keep_head<'b>(&self, bytes: &'b [u8], offset: u64) -> &'b [u8] {
        let Kind::InPlace { head, .. } = &self.kind else { return bytes };
        let mut head = lock(head);
        let Some(kept) = head.get_mut(offset.min(DEVICE_HEAD_BYTES) as usize..) else { return bytes };
        let (first, rest) = bytes.split_at(kept.len().min(bytes.len()));
        kept[..first.len()].copy_from_slice(first);
        rest
    }

    fn write_data(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|e| self.write_error(offset, e))
    }

    fn sync(&self) -> Result<()> {
        self.file.buffered.sync_data().map_err(|e| Error::io(format!("syncing {}", self.path.display()), e))
    }

    fn write_error(&self, offset: u64, source: std::io::Error) -> Error {
        Error::io(format!("writing {} at offset {offset}", self.path.display()), source)
    }
}

/// Gives `from..to` of a file its room on the file system; what is there stays.
pub(crate) fn allocate(file: &File, from: u64, to: u64, path: &Path) -> Result<()> {
    if from >= to {
        return Ok(());
    }
    rustix::fs::fallocate(file, FallocateFlags::empty(), from, to - from).map_err(|e| {
        let way_out = if e == Errno::OPNOTSUPP { " (this file system needs preallocation full)" } else { "" };
        Error::io(format!("allocating {} bytes for {}{way_out}", to - from, path.display()), e.into())
    })
}

fn device_bytes(file: &File, path: &Path) -> Result<u64> {
    rustix::fs::seek(file, SeekFrom::End(0))
        .map_err(|e| Error::io(format!("finding the size of {}", path.display()), e.into()))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
