//! `dvcr compare`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use dvcr_converter::compare::Comparison;
use dvcr_converter::convert::Options;
use dvcr_converter::file::{self, Input};
use serde_json::json;

use super::Output;
use crate::work;

/// Tells whether two image files hold the same disk.
///
/// Formats and compression may differ, and one disk may be larger if it has only zeros there. Exit codes: 0 identical, 1
/// different, 2 they could not be compared (and wrong usage).
#[derive(Debug, clap::Args)]
pub struct Args {
    /// An image file or block device.
    a: PathBuf,
    /// Another one.
    b: PathBuf,
    /// The disk of the first file that is compared, if that is an OVA, by its id or its file; by default the first one.
    #[arg(long, value_name = "NAME")]
    disk: Option<String>,
    /// The disk of the second file that is compared, if that is an OVA.
    #[arg(long, value_name = "NAME")]
    other_disk: Option<String>,
    /// Disks of different sizes are different.
    #[arg(long)]
    strict: bool,
    /// How to print the answer.
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,
    /// Threads that read and decode; by default one per core, from 2 to 8.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    workers: Option<u8>,
    #[command(flatten)]
    limits: crate::limits::Args,
    #[command(flatten)]
    sandbox: crate::sandbox::Args,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Args { a, b, disk, other_disk, strict, output, workers, limits, sandbox } = args;
    let limits = limits.limits();
    let names = [a.display().to_string(), b.display().to_string()];
    let mut options = Options::default();
    if let Some(workers) = workers {
        options.workers = workers.into();
    }
    sandbox.confine(&[])?;
    let comparison = work::run(&names[0], |progress| async move {
        let compare = move || {
            let a = Input { path: &a, disk: disk.as_deref() };
            let b = Input { path: &b, disk: other_disk.as_deref() };
            file::compare([a, b], strict, &options, &limits, &progress)
        };
        Ok(tokio::task::spawn_blocking(compare).await??)
    })
    .with_context(|| format!("cannot compare {} and {}", names[0], names[1]))?;
    let identical = comparison.is_identical(strict);
    match output {
        Output::Human => println!("{}", human(&comparison, identical)),
        Output::Json => println!("{:#}", json(&names, &comparison, identical)),
    }
    Ok(ExitCode::from(u8::from(!identical)))
}

fn human(comparison: &Comparison, identical: bool) -> String {
    let [a, b] = comparison.virtual_sizes;
    match comparison.first_difference {
        Some(at) => format!("the disks differ at offset {at}"),
        None if !identical => format!("the disks differ in size: {a} and {b} bytes"),
        None if a != b => {
            format!("the disks are identical, but for the zeros at the end of one: {a} and {b} bytes")
        }
        None => "the disks are identical".to_owned(),
    }
}

fn json(names: &[String; 2], comparison: &Comparison, identical: bool) -> serde_json::Value {
    json!({
        "filenames": names,
        "virtual-sizes": comparison.virtual_sizes,
        "identical": identical,
        "first-difference": comparison.first_difference,
    })
}
