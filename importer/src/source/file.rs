//! An image in a local file or on a block device.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::{Error, ErrorKind, Result};

/// A file opened for reading from its first byte.
pub struct FileSource {
    /// At its first byte.
    pub file: File,
    /// Length in bytes; of a block device, its capacity.
    pub len: u64,
    /// The file's own name, without its folder.
    pub name: Option<String>,
    /// Names this version of it; a block device has none.
    pub version: Option<String>,
}

impl FileSource {
    /// Opens a regular file or a block device; anything else is refused.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error| Error::with(ErrorKind::Source, format!("cannot read {}", path.display()), error);
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if kind.is_dir() {
            let context = format!("{} is a folder; name the image file in it", path.display());
            return Err(Error::new(ErrorKind::Source, context));
        }
        // Opening a pipe would wait for somebody to write to it.
        if !kind.is_file() && !kind.is_block_device() {
            let context = format!(
                "{} is neither a regular file nor a block device; store the image in a file, and import that",
                path.display()
            );
            return Err(Error::new(ErrorKind::Source, context));
        }
        let mut file = File::open(path).map_err(failed)?;
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        file.rewind().map_err(failed)?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let metadata = file.metadata().map_err(failed)?;
        let version = metadata.is_file().then(|| {
            let (dev, inode) = (metadata.dev(), metadata.ino());
            format!("{dev:x}-{inode:x}-{len:x}-{:x}.{:x}", metadata.mtime(), metadata.mtime_nsec())
        });
        Ok(Self { file, len, name, version })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_and_no_block_device_is_refused_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for path in [pipe.as_path(), Path::new("/dev/zero"), dir.path()] {
            let error = FileSource::open(path).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Source);
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        }
    }
}
