//! What a control group is charged with while `dvcr populate` writes a large disk in it: its own memory and the page cache.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, ensure};

use crate::converter::success;
use crate::registry::Server;

/// The limit that the work is done under, MiB.
const LIMIT_MIB: u64 = 256;

/// Makes an image of so many GiB of noise, and writes it to a raw file, to a qcow2 file and to `device` in a control group:
/// without a limit, which shows what is used when nothing is taken away, and with one.
pub fn run(dvcr: &Path, dir: &Path, gib: u64, device: Option<&Path>) -> anyhow::Result<()> {
    ensure!(dvcr.exists(), "{} is not there: cargo build --release", dvcr.display());
    let work = tempfile::tempdir_in(dir)?;
    let server = Server::start("dvcr", dvcr, work.path())?;
    let source = work.path().join("noise.qcow2");
    eprintln!("making {gib} GiB of noise");
    let raw = work.path().join("noise.raw");
    let noise = format!(
        "head -c {gib}G /dev/zero | openssl enc -aes-128-ctr -K {:032} -iv {:032} > '{}'",
        1,
        2,
        raw.display()
    );
    success(Command::new("sh").args(["-ec", &noise]))?;
    success(Command::new(dvcr).arg("convert").arg(&raw).arg(&source).args(["-O", "qcow2"]))?;
    std::fs::remove_file(&raw)?;
    let reference = format!("{}/noise:1", server.addr);
    success(Command::new(dvcr).arg("import").arg(&source).arg(&reference))?;
    std::fs::remove_file(&source)?;
    let out = work.path().join("out");
    let mut targets = vec![("raw file", out.as_path(), "raw"), ("qcow2 file", out.as_path(), "qcow2")];
    targets.extend(device.map(|device| ("block device", device, "raw")));
    println!("| {gib} GiB to a | limit | seconds | most memory, MiB |\n| --- | --- | --- | --- |");
    for (what, target, format) in targets {
        for limit in [None, Some(LIMIT_MIB << 20)] {
            let group = Group::create(limit)?;
            let begun = Instant::now();
            let script = format!("echo $$ > '{}' && exec \"$@\"", group.path.join("cgroup.procs").display());
            let mut command = Command::new("sh");
            command.args(["-ec", &script, "sh"]).arg(dvcr).arg("populate").arg(&reference).arg(target);
            success(command.args(["--format", format]))?;
            let seconds = begun.elapsed().as_secs_f64();
            let limit = limit.map_or("none".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
            println!("| {what} | {limit} | {seconds:.1} | {} |", group.peak()? >> 20);
            if target == out {
                std::fs::remove_file(&out)?;
            }
        }
    }
    Ok(())
}

/// A control group for memory, of version 2 or 1; removed when dropped.
struct Group {
    path: PathBuf,
    peak: &'static str,
}

impl Group {
    fn create(limit: Option<u64>) -> anyhow::Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let name = format!("dvcr-bench-{}", std::process::id());
        let version_2 = std::fs::read_to_string(root.join("cgroup.controllers"));
        let (path, peak, limit_file) = match version_2 {
            Ok(controllers) if controllers.split_whitespace().any(|name| name == "memory") => {
                // It may be on already, or not be ours to switch; then the file for the peak is missing.
                let _ = std::fs::write(root.join("cgroup.subtree_control"), "+memory");
                (root.join(name), "memory.peak", "memory.max")
            }
            _ => (root.join("memory").join(name), "memory.max_usage_in_bytes", "memory.limit_in_bytes"),
        };
        std::fs::create_dir(&path).with_context(|| {
            format!("cannot make {}: this needs root and a memory controller", path.display())
        })?;
        let group = Self { path, peak };
        ensure!(group.path.join(peak).exists(), "{} has no {peak}", group.path.display());
        if let Some(bytes) = limit {
            std::fs::write(group.path.join(limit_file), bytes.to_string())?;
        }
        Ok(group)
    }

    fn peak(&self) -> anyhow::Result<u64> {
        Ok(std::fs::read_to_string(self.path.join(self.peak))?.trim().parse()?)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.path);
    }
}
