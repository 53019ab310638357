//! The main job from end to end: a published image becomes a disk that boots.
//!
//! `make demo` shows it to people, `tests/main_job.rs` proves it: both run this code.

use crate::qemu::{self, Accelerator};
use crate::{FileServer, Registry, cmd, dvcr, fixture, run, run_visible, temp_dir};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const GROWTH_BYTES: u64 = 1 << 30;
const PROMPT: &str = "dvcr-demo login:";

/// What the job left behind, until it is dropped.
#[derive(Debug)]
pub struct Done {
    /// The image that was imported (qcow2).
    pub source: PathBuf,
    /// The disk that was populated and booted: raw, [`Done::growth_bytes`] larger than the source.
    pub disk: PathBuf,
    pub growth_bytes: u64,
    /// The disk as it was before the guest wrote to it, when that was asked for.
    pub pristine: Option<PathBuf>,
    /// What each step was and took.
    pub steps: Vec<(String, Duration)>,
    _dir: TempDir,
}

impl Done {
    /// Formats the steps as a table.
    pub fn table(&self) -> String {
        let width = self.steps.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let total: Duration = self.steps.iter().map(|(_, took)| *took).sum();
        let row = |name: &str, took: Duration| format!("  {name:width$}  {:>7.1} s\n", took.as_secs_f64());
        let rule = format!("  {:-<width$}  ---------\n", "");
        let rows: String = self.steps.iter().map(|(name, took)| row(name, *took)).collect();
        format!("{rule}{rows}{rule}{}", row("total", total))
    }
}

/// Runs the job, telling each step on standard output; `keep_pristine` copies the disk before it boots.
pub fn main_job(keep_pristine: bool) -> Result<Done> {
    let dir = temp_dir();
    let mut steps = Steps::default();

    let source = steps.run("Debian image", fixture::debian_image)?;
    let (folder, name) = (source.parent().context("a folder")?, source.file_name().context("a name")?);

    let (server, registry) = steps.run("HTTP server and registry", || {
        let server = FileServer::start(folder)?;
        Ok((server, Registry::start(&dir.path().join("registry"))?))
    })?;
    let url = server.url(&name.to_string_lossy());
    let reference = registry.reference("vi/demo/debian:12");

    steps.run("import", || shown(dvcr()?, &["import", &url, &reference]))?;
    steps.run("inspect", || {
        let image = format!("docker://{reference}");
        println!("{}", run(&cmd("skopeo", ["inspect", "--tls-verify=false", &image]))?.trim_end());
        Ok(())
    })?;

    let disk = dir.path().join("disk.raw");
    let target = disk.to_str().context("the temporary directory has an odd name")?;
    steps.run("populate", || {
        let size = (qemu::virtual_size(&source, "qcow2")? + GROWTH_BYTES).to_string();
        shown(dvcr()?, &["populate", &reference, target, "--size", &size])
    })?;
    let pristine = keep_pristine.then(|| dir.path().join("pristine.raw"));
    if let Some(pristine) = &pristine {
        run(cmd("cp", ["--sparse=always"]).arg(&disk).arg(pristine))?;
    }

    let accelerator = steps.run("KVM probe", || Ok(Accelerator::choose(&disk, "raw")))?;
    let console = steps.run(&format!("boot to the login prompt ({accelerator:?})"), || {
        qemu::boot(&disk, "raw", accelerator, PROMPT)
    })?;
    println!("{}", console_tail(&console));
    Ok(Done { source, disk, growth_bytes: GROWTH_BYTES, pristine, steps: steps.0, _dir: dir })
}

#[derive(Default)]
struct Steps(Vec<(String, Duration)>);

impl Steps {
    fn run<T>(&mut self, name: &str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        println!("\n== {name}");
        let started = Instant::now();
        let result = step().with_context(|| format!("the step failed: {name}"))?;
        self.0.push((name.to_owned(), started.elapsed()));
        Ok(result)
    }
}

/// Runs a program before the user's eyes, command line first.
fn shown(program: PathBuf, args: &[&str]) -> Result<()> {
    println!("$ dvcr {}", args.join(" "));
    run_visible(&cmd(program, args))
}

/// Returns the last lines of a console without what moves the cursor.
fn console_tail(console: &str) -> String {
    let lines: Vec<_> = console.lines().map(|line| line.replace(|c: char| c.is_control(), "")).collect();
    lines[lines.len().saturating_sub(4)..].join("\n")
}
