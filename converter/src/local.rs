//! Local files and block devices: the only module that touches them.
//!
//! A target is recognisably incomplete until it is finished: a file has another name, a block device begins with
//! zeros (its real first MiB comes last, after everything else is on stable storage, and of that its first page).

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::num::NonZeroU64;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, FlockOperation, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::buffer::ALIGN_BYTES;
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

/// Bytes that go through the page cache, where writes past it are refused, before they are written out and dropped from it.
const CACHED_BYTES_MAX: u64 = 32 << 20;

/// Largest unit of the page cache, bytes: the kernel drops whole ones (on x86-64, a huge page).
const FOLIO_BYTES_MAX: u64 = 2 << 20;

/// Bits of a file's mode that a new file takes over from the one it replaces, and the owner's right to write.
const PERMISSION_BITS: u32 = 0o777;
const OWNER_WRITES: u32 = 0o600;

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

/// Refuses to write over the storage that is read: the same block device under any name, a partition of it or the disk
/// around it, the file behind it, or the same file.
///
/// Fails with [`ErrorKind::Target`]. Only a target that is overwritten in place needs this; a new file does not.
pub fn refuse_same_storage(source: &Path, target: &Path) -> Result<()> {
    let (Ok(from), Ok(to)) = (source.metadata(), target.metadata()) else { return Ok(()) };
    if same_storage(&from, &to) {
        return Err(Error::new(
            ErrorKind::Target,
            format!(
                "{} and {} are the same storage, and writing would destroy what is read; name another target",
                source.display(),
                target.display()
            ),
        ));
    }
    Ok(())
}

fn same_storage(from: &Metadata, to: &Metadata) -> bool {
    if (from.dev(), from.ino()) == (to.dev(), to.ino()) {
        return true;
    }
    if !to.file_type().is_block_device() {
        return false;
    }
    let target = BlockDevice::find(to.rdev());
    if !from.file_type().is_block_device() {
        let backing = target.backing_file().and_then(|file| file.metadata().ok());
        return backing.is_some_and(|file| (file.dev(), file.ino()) == (from.dev(), from.ino()));
    }
    // Two nodes of one device have different inodes; two partitions of one disk have nothing in common.
    let source = BlockDevice::find(from.rdev());
    let whole = |device: &BlockDevice| device.number == device.disk;
    source.number == target.number || source.disk == target.disk && (whole(&source) || whole(&target))
}

/// A block device, as sysfs tells of it.
struct BlockDevice {
    number: u64,
    /// The disk that it is, or is a partition of.
    disk: u64,
}

impl BlockDevice {
    fn find(number: u64) -> Self {
        let disk = || {
            let directory = Self::directory(number).canonicalize().ok()?;
            directory.join("partition").try_exists().ok()?.then_some(())?;
            let parent = std::fs::read_to_string(directory.parent()?.join("dev")).ok()?;
            let (major, minor) = parent.trim().split_once(':')?;
            Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
        };
        Self { number, disk: disk().unwrap_or(number) }
    }

    /// The file that a loop device stands for.
    fn backing_file(&self) -> Option<PathBuf> {
        let file = std::fs::read(Self::directory(self.disk).join("loop/backing_file")).ok()?;
        Some(PathBuf::from(OsString::from_vec(file.trim_ascii_end().to_vec())))
    }

    fn directory(number: u64) -> PathBuf {
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
    }
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
        let zeros = crate::buffer::AlignedBuf::new(ZERO_BYTES);
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

/// A file that is written past the page cache where the file system can do that.
#[derive(Debug)]
pub(crate) struct DirectFile {
    pub(crate) buffered: File,
    direct: Option<File>,
    direct_works: AtomicBool,
    /// Bytes that went through the page cache since it was emptied.
    cached: AtomicU64,
}

impl DirectFile {
    /// `buffered` is the file at `path`, which is opened once more with these flags.
    pub(crate) fn new(buffered: File, path: &Path, flags: OFlags) -> Self {
        let flags = OFlags::DIRECT | flags;
        let direct = OpenOptions::new().write(true).custom_flags(flags.bits() as i32).open(path).ok();
        Self { buffered, direct, direct_works: AtomicBool::new(true), cached: AtomicU64::new(0) }
    }

    /// Writes all of `bytes` at `offset`; fast when both begin at multiples of [`ALIGN_BYTES`].
    pub(crate) fn write_all_at(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        let mut done = 0;
        if let Some(direct) = &self.direct
            && self.direct_works.load(Ordering::Relaxed)
            && offset.is_multiple_of(ALIGN_BYTES as u64)
            && bytes.as_ptr().addr().is_multiple_of(ALIGN_BYTES)
        {
            let whole = bytes.len() / ALIGN_BYTES * ALIGN_BYTES;
            match direct.write_all_at(&bytes[..whole], offset) {
                Ok(()) => done = whole,
                // The file system took the flag but not the write.
                Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => {
                    self.direct_works.store(false, Ordering::Relaxed);
                }
                Err(e) => return Err(e),
            }
        }
        let rest = &bytes[done..];
        self.buffered.write_all_at(rest, offset + done as u64)?;
        self.drop_behind(rest.len() as u64)
    }

    /// Keeps the page cache small when `bytes` more went through it: what was written is not read again, and counts as
    /// memory of whoever wrote it.
    fn drop_behind(&self, bytes: u64) -> std::io::Result<()> {
        if self.cached.fetch_add(bytes, Ordering::Relaxed) + bytes < CACHED_BYTES_MAX {
            return Ok(());
        }
        self.cached.store(0, Ordering::Relaxed);
        self.buffered.sync_data()?;
        // Mere advice: a file system without a cache has nothing to drop.
        let _ = rustix::fs::fadvise(&self.buffered, 0, None, rustix::fs::Advice::DontNeed);
        Ok(())
    }
}

/// A file that has a temporary name beside its own until it is complete, and vanishes if it never is.
#[derive(Debug)]
pub(crate) struct Partial {
    pub(crate) file: File,
    pub(crate) temporary: PathBuf,
    path: PathBuf,
    /// Permission bits of the file that is replaced.
    mode: Option<u32>,
    committed: bool,
}

impl Partial {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        // Through a symbolic link: the file is replaced, not the link.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let not_a_file = |what: &str| {
            Error::new(ErrorKind::Target, format!("{} {what}: name a file or a block device", path.display()))
        };
        let mode = match path.metadata() {
            Ok(metadata) if !metadata.is_file() => return Err(not_a_file("is not a regular file")),
            Ok(metadata) => Some(metadata.mode() & PERMISSION_BITS),
            Err(_) => None,
        };
        let name = path.file_name().ok_or_else(|| not_a_file("has no file name"))?;
        let temporary = partial_name(&path, name);
        let context = |e| Error::io(format!("creating {}", temporary.display()), e);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&temporary)
            .map_err(context)?;
        let busy = || {
            Error::new(
                ErrorKind::Target,
                format!("another process is writing {}; wait for it to end", temporary.display()),
            )
        };
        // A file left by a killed process is taken over; one that a living process writes is not.
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // Some network file systems have no locks: there two writers are not kept apart.
            Ok(()) | Err(Errno::NOLCK | Errno::OPNOTSUPP) => {}
            Err(Errno::WOULDBLOCK) => return Err(busy()),
            Err(e) => return Err(Error::io(format!("locking {}", temporary.display()), e.into())),
        }
        // Nor one that the other process has just renamed or removed.
        let named = std::fs::symlink_metadata(&temporary).map_err(|_| busy())?;
        let locked = file.metadata().map_err(context)?;
        if (named.dev(), named.ino()) != (locked.dev(), locked.ino()) {
            return Err(busy());
        }
        file.set_len(0).map_err(context)?;
        if let Some(mode) = mode {
            // Never wider than it will be; but ours to write meanwhile.
            file.set_permissions(Permissions::from_mode(mode | OWNER_WRITES)).map_err(context)?;
        }
        Ok(Self { file, temporary, path, mode, committed: false })
    }

    /// Gives the file these permission bits in the end, and at once what may be had of them.
    pub(crate) fn set_mode(&mut self, mode: u32) -> Result<()> {
        let mode = mode & PERMISSION_BITS;
        self.mode = Some(mode);
        self.file
            .set_permissions(Permissions::from_mode(mode | OWNER_WRITES))
            .map_err(|e| Error::io(format!("setting the mode of {}", self.temporary.display()), e))
    }

    pub(crate) fn commit(mut self) -> Result<()> {
        let context =
            |e| Error::io(format!("moving {} to {}", self.temporary.display(), self.path.display()), e);
        if let Some(mode) = self.mode {
            self.file.set_permissions(Permissions::from_mode(mode)).map_err(context)?;
        }
        std::fs::rename(&self.temporary, &self.path).map_err(context)?;
        self.committed = true;
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|e| Error::io(format!("syncing directory {}", directory.display()), e))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing to do about a failure: the next run takes the file over.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Where the file at `path` is until it is complete; what is left there by a killed process is taken over by the next.
fn partial_path(path: &Path) -> PathBuf {
    path.file_name().map_or_else(|| path.to_owned(), |name| partial_name(path, name))
}

fn partial_name(path: &Path, name: &OsStr) -> PathBuf {
    let mut partial = OsString::from(".");
    partial.push(name);
    partial.push(".dvcr-partial");
    path.with_file_name(partial)
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by a panic")]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_go_past_the_page_cache_does_not_stay_in_it() {
        // In the folder of the build, which is no tmpfs: that has nothing but the page cache.
        let here = std::env::current_exe().unwrap();
        let dir = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let path = dir.path().join("disk");
        let mut file = DirectFile::new(File::create_new(&path).unwrap(), &path, OFlags::empty());
        file.direct = None;
        let (step, steps) = (4 << 20, 48);
        let bytes: Vec<u8> = (0..step).map(|n| (n % 251) as u8).collect();
        for n in 0..steps {
            file.write_all_at(&bytes, n * step as u64).unwrap();
        }
        let output = std::process::Command::new("fincore").args(["-bno", "RES"]).arg(&path).output().unwrap();
        let kept: u64 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
        assert!(kept <= CACHED_BYTES_MAX, "{kept} of {} bytes are in the page cache", steps * step as u64);
        let read = std::fs::read(&path).unwrap();
        assert!(read.chunks(step).all(|chunk| chunk == bytes));
    }
}
