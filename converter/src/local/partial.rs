//! Files that are not there before they are complete.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use crate::{Error, ErrorKind, Result};

/// Bits of a file's mode that a new file takes over from the one it replaces, and the owner's right to write.
const PERMISSION_BITS: u32 = 0o777;
const OWNER_WRITES: u32 = 0o600;

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
pub(super) fn partial_path(path: &Path) -> PathBuf {
    path.file_name().map_or_else(|| path.to_owned(), |name| partial_name(path, name))
}

fn partial_name(path: &Path, name: &OsStr) -> PathBuf {
    let mut partial = OsString::from(".");
    partial.push(name);
    partial.push(".dvcr-partial");
    path.with_file_name(partial)
}
