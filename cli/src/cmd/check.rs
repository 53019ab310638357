//! `dvcr check`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use dvcr_converter::check::{MESSAGES_MAX, Report};
use dvcr_converter::convert::Options;
use dvcr_converter::file::{self, Input};
use dvcr_converter::format::Format;
use serde_json::json;

use super::Output;
use crate::work;

/// Checks whether an image file is whole. Nothing is repaired.
///
/// All tables are held against each other and against the file; for qcow2 that includes the reference counts, and those
/// of snapshots. Exit codes: 0 whole, 1 it could not be checked, 2 damaged (and wrong usage), 3 only leaks: parts of
/// the file that are held and not used.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image file or block device.
    file: PathBuf,
    /// The disk of an OVA to check, by its id or its file; by default the first one.
    #[arg(long, value_name = "NAME")]
    disk: Option<String>,
    /// Also read and decode all data.
    #[arg(long)]
    data: bool,
    /// How to print the answer; json names its fields as `qemu-img check` does.
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,
    /// Threads that read data; by default one per core, from 2 to 8.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    workers: Option<u8>,
    #[command(flatten)]
    limits: crate::limits::Args,
    #[command(flatten)]
    sandbox: crate::sandbox::Args,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let limits = args.limits.limits();
    let (path, disk) = (args.file, args.disk);
    let name = path.display().to_string();
    let mut options = Options::default();
    if let Some(workers) = args.workers {
        options.workers = workers.into();
    }
    args.sandbox.confine(&[])?;
    let (format, report) = work::run(&name, |progress| async move {
        let check = move || {
            let input = Input { path: &path, disk: disk.as_deref() };
            file::check(input, args.data, &options, &limits, &progress)
        };
        Ok(tokio::task::spawn_blocking(check).await??)
    })
    .with_context(|| format!("cannot check {name}"))?;
    match args.output {
        Output::Human => print!("{}", human(&report)),
        Output::Json => println!("{:#}", json(&name, format, &report)),
    }
    Ok(ExitCode::from(match report {
        Report { check_errors: 1.., .. } => 1,
        Report { corruptions: 1.., .. } => 2,
        Report { leaks: 1.., .. } => 3,
        _ => 0,
    }))
}

fn human(report: &Report) -> String {
    let mut text: String = report.messages.iter().map(|message| format!("{message}\n")).collect();
    if report.messages.len() == MESSAGES_MAX {
        text += "(there may be more)\n";
    }
    for (count, what) in [
        (report.corruptions, "errors were found: the disk is damaged, or will be by the next write"),
        (report.leaks, "leaked clusters were found: they waste space and do no harm"),
        (report.check_errors, "parts could not be read"),
    ] {
        if count > 0 {
            text += &format!("{count} {what}\n");
        }
    }
    if (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0) {
        text += "no errors were found\n";
    }
    if let Some(clusters) = report.clusters {
        let share = |part: u64, of: u64| 100.0 * part as f64 / of.max(1) as f64;
        text += &format!(
            "{} of {} clusters ({:.2}%) are allocated; of these {:.2}% are fragmented, {:.2}% compressed\n",
            clusters.allocated,
            clusters.total,
            share(clusters.allocated, clusters.total),
            share(clusters.fragmented, clusters.allocated),
            share(clusters.compressed, clusters.allocated),
        );
    }
    if let Some(end) = report.image_end {
        text += &format!("image end offset: {end}\n");
    }
    text
}

fn json(name: &str, format: Format, report: &Report) -> serde_json::Value {
    let mut value = json!({
        "filename": name,
        "format": format.name(),
        "check-errors": report.check_errors,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "messages": report.messages,
    });
    if let Some(clusters) = report.clusters {
        value["total-clusters"] = clusters.total.into();
        value["allocated-clusters"] = clusters.allocated.into();
        value["fragmented-clusters"] = clusters.fragmented.into();
        value["compressed-clusters"] = clusters.compressed.into();
    }
    if let Some(end) = report.image_end {
        value["image-end-offset"] = end.into();
    }
    value
}
