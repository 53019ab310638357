//! `dvcr clone`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use dvcr_importer::{CloneRequest, CloneSummary, Source, SourceOptions, clone};
use dvcr_registry::Time;
use dvcr_worker::metrics::Family;
use dvcr_worker::{retry, termination};

use super::Output;
use super::populate::mode;
use super::uploader::time_or_zero;
use crate::sandbox;
use crate::size::Human;
use crate::source::{self, roots};
use crate::work::{self, Usage};
use crate::worker::{self, chain};

/// How long a worker waits for its source, unless it is told.
const WORKER_WAIT: Duration = Duration::from_secs(600);

/// Copies a volume, byte for byte, whatever it holds
///
/// On one file system the blocks are shared where it can do that (XFS, Btrfs), else the kernel copies what is allocated. From
/// another node the volume comes by NBD: `dvcr serve-nbd` there, and nbd://node/ as the source here. The target is synced and
/// complete when the command succeeds: a file gets its name only then, and a block device its first bytes.
#[derive(Debug, clap::Args)]
pub struct Args {
    // A text, because clap shows what it cannot parse, and a URL may hold a password.
    /// The volume to copy: a file, a folder with disk.img, a block device, or nbd://host[:port]/export (also nbds://, nbd+unix://)
    source: String,

    /// The file to write, or the block device of at least the same size to overwrite
    target: PathBuf,

    /// Permission bits of the file, octal, such as 0660; by default those of the file that is replaced, or the usual ones
    #[arg(long, value_name = "OCTAL", value_parser = mode)]
    mode: Option<u32>,

    /// How long to wait for a source that is not there yet; by default 0, and 10m as a worker
    #[arg(long, value_name = "TIME", value_parser = time_or_zero)]
    wait: Option<Time>,

    /// Accept any certificate of nbds://
    #[arg(long)]
    insecure_source: bool,

    /// Certificates (PEM) to trust besides those of the system, for nbds://: a file, or a folder of such files. May be repeated
    #[arg(long, value_name = "FILE|DIR")]
    source_ca: Vec<PathBuf>,

    /// Show this certificate (PEM, with its chain) to an nbds:// server that wants one
    #[arg(long, value_name = "FILE", requires = "source_key")]
    source_cert: Option<PathBuf>,

    /// The key of --source-cert (PEM)
    #[arg(long, value_name = "FILE", requires = "source_cert")]
    source_key: Option<PathBuf>,

    /// How to print the summary
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,

    /// Work as the worker of an operator: with metrics, a report, and in a sandbox (docs/worker.md)
    #[arg(long)]
    worker: bool,

    #[command(flatten)]
    pod: worker::Args,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let outcome = request(&args).and_then(|request| {
        args.pod.confine(&[&sandbox::place_of(&args.target)])?;
        copy(&args, request)
    });
    if args.worker {
        args.pod.leave(&match &outcome {
            Ok(_) => termination::import_complete(),
            Err(error) => termination::unable_to_process(&chain(error)),
        });
    }
    let done = outcome?;
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&done).context("printing the summary")?),
        Output::Human => println!(
            "{}: {} of {} {}, written {}, in {:.1} s",
            done.target.display(),
            Human(done.size),
            done.source,
            done.way,
            Human(done.written_bytes),
            done.seconds,
        ),
    }
    Ok(())
}

/// Reads the arguments, and the files that they name.
fn request(args: &Args) -> anyhow::Result<CloneRequest> {
    let source: Source = args.source.parse().context(Usage("SOURCE"))?;
    let usual = if args.worker { WORKER_WAIT } else { Duration::ZERO };
    let mut source_options = SourceOptions {
        insecure: args.insecure_source,
        roots: roots(&args.source_ca)?,
        ..SourceOptions::default()
    };
    if let (Some(certificate), Some(key)) = (&args.source_cert, &args.source_key) {
        source::identify(&mut source_options.http, certificate, key)?;
    }
    Ok(CloneRequest {
        source,
        target: args.target.clone(),
        mode: args.mode,
        wait_max: args.wait.map_or(usual, |Time(wait)| wait),
        source_options,
    })
}

fn copy(args: &Args, request: CloneRequest) -> anyhow::Result<CloneSummary> {
    let title = args.target.display().to_string();
    work::run(&title, |progress| async move {
        let _served = match args.worker {
            true => Some(args.pod.serve(Family::Volume, progress.clone()).await?),
            false => None,
        };
        Ok(match args.worker {
            true => retry::run(&progress, || clone(request.clone(), progress.clone())).await?,
            false => clone(request, progress).await?,
        })
    })
}
