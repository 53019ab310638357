//! Whether two names are of the same storage.

use std::ffi::OsString;
use std::fs::Metadata;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::{Error, ErrorKind, Result};

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
