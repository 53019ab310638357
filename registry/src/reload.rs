//! What is read from files that others replace: secrets and certificates.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use crate::api::error::Chain;
use crate::{Error, Result};

/// How often files are looked at.
pub(crate) const RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// A value made from files, and made again when one of them changed.
pub(crate) struct Reloaded<T> {
    what: &'static str,
    files: Vec<PathBuf>,
    load: Box<dyn Fn() -> Result<T> + Send + Sync>,
    /// The files as they were when they were read last, with success or not.
    seen: Mutex<Vec<Option<Stamp>>>,
    current: RwLock<Arc<T>>,
}

/// What changes with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    length: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl<T> Reloaded<T> {
    /// Makes the value the first time. `what` names it in the log. Blocks.
    pub(crate) fn open(
        what: &'static str,
        files: Vec<PathBuf>,
        load: impl Fn() -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        // Looked at before they are read: a change in between is seen the next time.
        let seen = Mutex::new(stamps(&files));
        let current = RwLock::new(Arc::new(load()?));
        Ok(Self { what, files, load: Box::new(load), seen, current })
    }

    /// Returns the value.
    pub(crate) fn get(&self) -> Arc<T> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes the value again if a file changed since the last time, or, when `force` says so, anyway. If that fails, it
    /// stays as it was, and the log tells. Blocks.
    pub(crate) fn refresh(&self, force: bool) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = stamps(&self.files);
        if *seen == stamps && !force {
            return;
        }
        *seen = stamps;
        match (self.load)() {
            Ok(value) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(value);
                tracing::info!(what = self.what, "read again");
            }
            Err(error) => {
                let error = Chain(&error);
                tracing::error!(what = self.what, %error, "cannot be read again; what was read before stays in force");
            }
        }
    }
}

impl<T> fmt::Debug for Reloaded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the value: it holds secrets.
        f.debug_struct("Reloaded")
            .field("what", &self.what)
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

/// Reads a file of at most `bytes_max` bytes.
pub(crate) fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > bytes_max {
            let message = format!("it has more than {bytes_max} bytes");
            return Err(io::Error::new(ErrorKind::FileTooLarge, message));
        }
        Ok(bytes)
    };
    read().map_err(|source| Error::Read { path: path.to_owned(), source })
}

/// One for each file; `None` for one that is not there.
fn stamps(files: &[PathBuf]) -> Vec<Option<Stamp>> {
    let stamp = |path: &PathBuf| {
        let file = fs::metadata(path).ok()?;
        Some(Stamp {
            inode: (file.dev(), file.ino()),
            length: file.len(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        })
    };
    files.iter().map(stamp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> Result<Reloaded<String>> {
        let file = path.to_owned();
        Reloaded::open("a test", vec![path.to_owned()], move || {
            String::from_utf8(read(&file, 8)?)
                .map_err(|_| Error::Secret { path: file.clone(), why: "is bad" })
        })
    }

    #[test]
    fn a_replaced_file_is_read_again_and_a_bad_one_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert!(matches!(open(&path), Err(Error::Read { .. })));
        fs::write(&path, "one").unwrap();
        let value = open(&path).unwrap();
        assert_eq!(*value.get(), "one");

        let replace = |content: &[u8]| {
            let new = dir.path().join("new");
            fs::write(&new, content).unwrap();
            fs::rename(&new, &path).unwrap();
            value.refresh(false);
        };
        replace(b"two");
        assert_eq!(*value.get(), "two");
        replace(b"\xff");
        assert_eq!(*value.get(), "two");
        replace(b"123456789");
        assert_eq!(*value.get(), "two");
        fs::remove_file(&path).unwrap();
        value.refresh(false);
        assert_eq!(*value.get(), "two");
        replace(b"three");
        assert_eq!(*value.get(), "three");
    }
}
