//! An image in a local file, in a folder under the name `disk.img`, or on a block device.

use std::fs::{File, Metadata};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use dvcr_converter::local;

use crate::{Error, ErrorKind, Result};

/// The file that is meant where a folder is named, as on a volume that holds one disk.
const DISK_IN_FOLDER: &str = "disk.img";

/// A file opened for reading from its first byte.
pub struct FileSource {
    /// The path, of the disk where a folder was named.
    pub path: PathBuf,
    /// At its first byte.
    pub file: File,
    /// The same, to be read at random.
    pub random: Option<local::FileSource>,
    /// Length in bytes; of a block device, its capacity.
    pub len: u64,
    /// The file's own name, without its folder.
    pub name: Option<String>,
    /// Names this version of it; a block device has none.
    pub version: Option<String>,
}

/// A file that was opened, to see whether it is still what it was then.
pub(crate) struct Stamp {
    file: File,
    version: String,
}

impl Stamp {
    /// # Errors
    /// [`ErrorKind::Changed`] when somebody has written to the file since.
    pub(crate) fn verify(&self, shown: &str) -> Result<()> {
        let failed = |e| Error::with(ErrorKind::Source, format!("cannot look at {shown} again"), e);
        if version(&self.file.metadata().map_err(failed)?) == self.version {
            return Ok(());
        }
        let text = format!("{shown} was written to while it was read; import it when nobody writes to it");
        Err(Error::new(ErrorKind::Changed, text))
    }
}

/// What a file is known by: where it is, its length in bytes, and when it was written to.
fn version(metadata: &Metadata) -> String {
    let (dev, inode, len) = (metadata.dev(), metadata.ino(), metadata.len());
    format!("{dev:x}-{inode:x}-{len:x}-{:x}.{:x}", metadata.mtime(), metadata.mtime_nsec())
}

impl FileSource {
    /// Opens a regular file, that of a folder, or a block device; anything else is refused.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error| Error::with(ErrorKind::Source, format!("cannot read {}", path.display()), error);
        let mut path = path.to_owned();
        let mut kind = std::fs::metadata(&path).map_err(&failed)?.file_type();
        if kind.is_dir() {
            let in_folder = path.join(DISK_IN_FOLDER);
            let context =
                format!("{} is a folder without {DISK_IN_FOLDER}; name the image file in it", path.display());
            let metadata = std::fs::metadata(&in_folder);
            kind = metadata.map_err(|e| Error::with(ErrorKind::Source, context, e))?.file_type();
            path = in_folder;
        }
        // Opening a pipe would wait for somebody to write to it.
        if !kind.is_file() && !kind.is_block_device() {
            let context = format!(
                "{} is neither a regular file nor a block device; store the image in a file, and import that",
                path.display()
            );
            return Err(Error::new(ErrorKind::Source, context));
        }
        let mut file = File::open(&path).map_err(failed)?;
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        file.rewind().map_err(failed)?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let metadata = file.metadata().map_err(failed)?;
        let random = reopened(&path, &metadata);
        let version = metadata.is_file().then(|| version(&metadata));
        Ok(Self { path, file, random, len, name, version })
    }

    /// What tells, once it was read, whether it is the same; nothing does of a block device.
    pub(crate) fn stamp(&self) -> std::io::Result<Option<Stamp>> {
        let stamp = |version: &String| Ok(Stamp { file: self.file.try_clone()?, version: version.clone() });
        self.version.as_ref().map(stamp).transpose()
    }
}

/// Opens `path` again, as looking for holes moves the position that a file is read on from. `None` if another file has
/// taken the name meanwhile.
fn reopened(path: &Path, first: &Metadata) -> Option<local::FileSource> {
    let random = local::FileSource::open(path).ok()?;
    let second = std::fs::metadata(path).ok()?;
    let is_same = (first.dev(), first.ino(), first.len()) == (second.dev(), second.ino(), second.len());
    is_same.then_some(random)
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

    #[test]
    fn a_folder_means_the_disk_in_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("disk.img"), b"a disk").unwrap();
        let source = FileSource::open(dir.path()).unwrap();
        assert_eq!((source.len, source.name.as_deref()), (6, Some("disk.img")));
        std::fs::remove_file(dir.path().join("disk.img")).unwrap();
        std::fs::create_dir(dir.path().join("disk.img")).unwrap();
        assert_eq!(FileSource::open(dir.path()).err().unwrap().kind(), ErrorKind::Source);
    }
}
