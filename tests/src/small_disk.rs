//! A filesystem that is soon full.

use crate::{TempDir, cmd, run, temp_dir};
use anyhow::{Context, Result};
use std::path::Path;

/// A tmpfs of its own, unmounted when dropped. Mounting needs root, as tests run.
#[derive(Debug)]
pub struct SmallDisk(TempDir);

impl SmallDisk {
    /// Makes one of so many bytes.
    pub fn new(bytes: u64) -> Result<Self> {
        let disk = Self(temp_dir());
        disk.mount(&format!("size={bytes}"))?;
        Ok(disk)
    }

    /// Makes it larger.
    pub fn grow(&self, bytes: u64) -> Result<()> {
        self.mount(&format!("remount,size={bytes}"))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    fn mount(&self, options: &str) -> Result<()> {
        let mount = cmd("mount", ["-t", "tmpfs", "-o", options, "dvcr-test"]);
        run({ mount }.arg(self.path())).context("a small disk is a tmpfs, which root may mount")?;
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily, as a program may hold a file there until it has been killed.
        let _ = run(cmd("umount", ["--lazy"]).arg(self.path()));
    }
}
