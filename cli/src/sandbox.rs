//! The fence around commands that read images: what they may still do once they begin.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use dvcr_worker::sandbox::{Entered, Sandbox};

/// Most address space, bytes: far above what any command needs, far below what a machine has.
const ADDRESS_SPACE_BYTES_MAX: u64 = 16 << 30;

/// Whether there is a fence.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(skip)]
pub struct Args {
    /// Keep the privileges of whoever starts this: no Landlock, no seccomp, no limits
    #[arg(long, env = "DVCR_NO_SANDBOX")]
    no_sandbox: bool,
}

impl Args {
    /// Gives up all privileges but to write to `writable`. To be called when files of settings and secrets are read, and before there
    /// are other threads.
    pub fn confine(&self, writable: &[&Path]) -> anyhow::Result<()> {
        if let Some(Entered { landlock, seccomp }) = self.enter(writable)? {
            tracing::debug!(landlock, seccomp, "confined");
        }
        Ok(())
    }

    /// Does as [`Args::confine`], and tells what the kernel took on; `None` if there is to be no fence.
    pub fn enter(&self, writable: &[&Path]) -> anyhow::Result<Option<Entered>> {
        if self.no_sandbox {
            return Ok(None);
        }
        let writable = writable.iter().map(|path| path.to_path_buf()).collect();
        let address_space_bytes_max = Some(ADDRESS_SPACE_BYTES_MAX);
        let sandbox = Sandbox { writable, address_space_bytes_max, ..Sandbox::default() };
        sandbox.enter().map(Some).context("use --no-sandbox to do without")
    }
}

/// What has to be writable for a disk to be made at `target`: the block device, or the folder that a file gets its name in.
pub fn place_of(target: &Path) -> PathBuf {
    let target = target.canonicalize().unwrap_or_else(|_| target.to_owned());
    if target.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device()) {
        return target;
    }
    match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}
