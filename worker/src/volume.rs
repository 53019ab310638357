//! The volume that an operator gives a worker to fill: a block device, or a folder on a filesystem for one file.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use dvcr_converter::local::{self, FileSource};

/// Where the disk goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Volume {
    /// A block device, which holds the disk as it is.
    Block(PathBuf),
    /// A file on a filesystem.
    File(PathBuf),
}

impl Volume {
    /// Tells which one is there: the device if there is anything at its path, else the file.
    pub fn find(device: &Path, file: &Path) -> Self {
        match device.symlink_metadata() {
            Ok(_) => Self::Block(device.to_owned()),
            Err(_) => Self::File(file.to_owned()),
        }
    }

    /// The disk's path.
    pub fn path(&self) -> &Path {
        match self {
            Self::Block(path) | Self::File(path) => path,
        }
    }

    /// Bytes that the volume has for a disk: all of a device; of a filesystem what is available and what a killed worker's
    /// unfinished file holds, which the next one takes over, but for the share `overhead`.
    ///
    /// # Errors
    /// When the volume is not there, or is no such thing.
    pub fn usable_bytes(&self, overhead: f64) -> io::Result<u64> {
        match self {
            Self::Block(path) if !path.metadata()?.file_type().is_block_device() => {
                let text = format!("{} is no block device", path.display());
                Err(io::Error::new(io::ErrorKind::InvalidInput, text))
            }
            Self::Block(path) => Ok(FileSource::open(path).map_err(io::Error::other)?.file_bytes()),
            Self::File(path) => {
                let untold =
                    || io::Error::new(io::ErrorKind::NotFound, "nothing tells how much room there is");
                let available = local::free_bytes(path).ok_or_else(untold)?;
                Ok((available as f64 * (1.0 - overhead)) as u64)
            }
        }
    }

    /// Removes the disk of an earlier worker, whose room this one needs. A device is overwritten.
    ///
    /// # Errors
    /// When there is something that cannot be removed.
    pub fn clear(&self) -> io::Result<()> {
        let Self::File(path) = self else { return Ok(()) };
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_used_if_there_is_one_and_nothing_else_passes_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let (device, file) = (dir.path().join("device"), dir.path().join("disk.img"));
        assert_eq!(Volume::find(&device, &file), Volume::File(file.clone()));
        fs::write(&device, "no device").unwrap();
        let volume = Volume::find(&device, &file);
        assert_eq!(volume, Volume::Block(device.clone()));
        assert_eq!(volume.usable_bytes(0.0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn what_earlier_workers_left_is_room_for_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::File(dir.path().join("disk.img"));
        volume.clear().unwrap();
        fs::write(volume.path(), "old").unwrap();
        volume.clear().unwrap();
        assert!(!volume.path().exists());
        let empty = volume.usable_bytes(0.5).unwrap();
        let huge = volume.usable_bytes(0.0).unwrap();
        assert!(empty < huge && empty > 0, "{empty} {huge}");
        assert_eq!(volume.usable_bytes(1.0).unwrap(), 0);
    }
}
