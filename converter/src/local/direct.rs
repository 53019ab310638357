//! Writes beside the page cache.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::OFlags;

use crate::buffer::ALIGN_BYTES;

/// Bytes that go through the page cache, where writes past it are refused, before they are written out and dropped from it.
pub(super) const CACHED_BYTES_MAX: u64 = 32 << 20;

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
    pub(super) fn drop_behind(&self, bytes: u64) -> std::io::Result<()> {
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
