//! A control group whose memory is counted, the page cache included.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A control group of version 2 or 1, without a limit; removed when dropped.
#[derive(Debug)]
pub struct ControlGroup {
    path: PathBuf,
    peak: &'static str,
}

impl ControlGroup {
    /// Makes one, if this machine and this user can.
    pub fn create() -> Option<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let name = format!("dvcr-test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let places =
            [("/sys/fs/cgroup", "memory.peak"), ("/sys/fs/cgroup/memory", "memory.max_usage_in_bytes")];
        places.into_iter().find_map(|(root, peak)| {
            // A mere folder, if nothing is mounted there.
            let root = Path::new(root);
            root.join("cgroup.procs").exists().then_some(())?;
            let path = root.join(&name);
            std::fs::create_dir(&path).ok()?;
            let group = Self { path, peak };
            group.path.join(peak).exists().then_some(group)
        })
    }

    /// The command, run inside.
    pub fn inside(&self, command: &Command) -> Command {
        let mut inside = Command::new("sh");
        let script = format!("echo $$ > '{}' && exec \"$@\"", self.path.join("cgroup.procs").display());
        inside.args(["-ec", &script, "sh"]).arg(command.get_program()).args(command.get_args());
        inside
    }

    /// The most that was in use at a time, bytes.
    pub fn peak(&self) -> Result<u64> {
        let text =
            std::fs::read_to_string(self.path.join(self.peak)).context("reading the group's memory")?;
        Ok(text.trim().parse()?)
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.path);
    }
}
