//! `dvcr map`.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use dvcr_converter::file::{self, Input};
use dvcr_converter::format::Image;
use dvcr_converter::map::{self, Run};
use dvcr_converter::progress::Progress;
use serde_json::json;

use super::Output;
use crate::work;

/// Lists which parts of a disk are stored in an image file, and where.
///
/// Nothing but the tables is read. Of a compressed file the offsets are those inside.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image file or block device.
    file: PathBuf,
    /// The disk of an OVA to map, by its id or its file; by default the first one.
    #[arg(long, value_name = "NAME")]
    disk: Option<String>,
    /// How to print the runs: a table of those with data, or a JSON array of all, named as `qemu-img map` does.
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,
    #[command(flatten)]
    limits: crate::limits::Args,
    #[command(flatten)]
    sandbox: crate::sandbox::Args,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let limits = args.limits.limits();
    let (path, disk, output) = (args.file, args.disk, args.output);
    let name = path.display().to_string();
    let context = || format!("cannot map {name}");
    let open_limits = limits.clone();
    let open = move |progress: Arc<Progress>| {
        let input = Input { path: &path, disk: disk.as_deref() };
        file::open(input, &open_limits, &progress)
    };
    args.sandbox.confine(&[])?;
    let opened = work::run(&name, |progress| async move {
        Ok(tokio::task::spawn_blocking(move || open(progress)).await??)
    })
    .with_context(context)?;
    let title = name.clone();
    work::run_quietly(|progress| async move {
        progress.bound(&limits);
        tokio::task::spawn_blocking(move || print(&opened.image, &title, output, &progress)).await?
    })
    .with_context(context)
}

/// Prints each run as soon as it is known: there may be more of them than memory holds.
fn print(image: &Image, name: &str, output: Output, progress: &Progress) -> anyhow::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    match output {
        Output::Human => writeln!(out, "{:<15} {:<15} {:<15} File", "Offset", "Length", "Mapped to")?,
        Output::Json => write!(out, "[")?,
    }
    let mut separator = "";
    for run in map::runs(image) {
        progress.check()?;
        let run = run?;
        match output {
            Output::Human if run.data => writeln!(out, "{} {name}", row(&run))?,
            Output::Human => {}
            Output::Json => {
                write!(out, "{separator}{}", json(&run))?;
                separator = ",\n";
            }
        }
    }
    if output == Output::Json {
        writeln!(out, "]")?;
    }
    Ok(out.flush()?)
}

fn row(run: &Run) -> String {
    let mapped = match run.offset {
        Some(offset) => format!("{offset:#x}"),
        None if run.compressed => "compressed".to_owned(),
        None => "-".to_owned(),
    };
    format!("{:<#15x} {:<#15x} {mapped:<15}", run.start, run.len)
}

fn json(run: &Run) -> serde_json::Value {
    let mut value = json!({
        "start": run.start,
        "length": run.len,
        // No image here has a backing file.
        "depth": 0,
        "present": run.present,
        "zero": run.zero,
        "data": run.data,
        "compressed": run.compressed,
    });
    if let Some(offset) = run.offset {
        value["offset"] = offset.into();
    }
    value
}
