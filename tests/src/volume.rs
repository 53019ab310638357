//! Volumes as machines have them: loop devices, and small filesystems on them.

use crate::{cmd, run, run_output, utf8};
use anyhow::Result;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// A file as a block device; detached when dropped.
#[derive(Debug)]
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Makes one, if this machine and this user can.
    pub fn attach(file: &Path) -> Option<Self> {
        let output = run_output(&cmd("losetup", ["--find", "--show", utf8(file)])).ok()?;
        output.status.success().then(|| Self(output.stdout.trim().into()))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = run(&cmd("losetup", ["--detach", utf8(&self.0)]));
    }
}

/// A filesystem of its own; unmounted when dropped.
#[derive(Debug)]
pub struct Filesystem(PathBuf);

impl Filesystem {
    /// Makes one of `bytes` by the program `mkfs`, if this machine and this user can.
    pub fn make(dir: &Path, mkfs: &str, bytes: u64) -> Result<Option<Self>> {
        let (storage, at) = (dir.join("storage"), dir.join("mounted"));
        File::create(&storage)?.set_len(bytes)?;
        fs::create_dir(&at)?;
        run(&cmd(mkfs, ["-q", utf8(&storage)]))?;
        let mounted = run_output(&cmd("mount", ["-o", "loop", utf8(&storage), utf8(&at)]))?;
        Ok(mounted.status.success().then_some(Self(at)))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Filesystem {
    fn drop(&mut self) {
        let _ = run(&cmd("umount", [utf8(&self.0)]));
    }
}
