//! `dvcr convert`.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use dvcr_converter::convert::Options;
use dvcr_converter::file::{self, Destination, Input, Output};
use dvcr_converter::format::{Format, create_options};
use dvcr_converter::local::Preallocation;

use crate::sandbox;
use crate::size::Human;
use crate::work;

/// Converts a disk image file to another format.
///
/// Reads all formats by content, also inside gz, xz, zst, bz2 and lz4. The target is synced and gets its name only
/// when it is complete. A block device as the target is overwritten.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image file or block device to read.
    input: PathBuf,
    /// The file or, for raw, block device to write; - is standard output, for formats written from front to end.
    output: PathBuf,
    /// The disk of an OVA to convert, by its id or its file; by default the first one.
    #[arg(long, value_name = "NAME")]
    disk: Option<String>,
    /// Format to write: raw, qcow2, vmdk, vdi, vpc (VHD) or vhdx.
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw")]
    format: Format,
    /// Compress, for formats that can.
    #[arg(short, long)]
    compress: bool,
    /// Options of the format, named as qemu-img does.
    ///
    /// qcow2: cluster_size=64K (512 to 2M), compression_type=zlib|zstd, preallocation=off|metadata.
    ///
    /// vmdk: subformat=monolithicSparse|streamOptimized (the latter with -c), adapter_type=ide|lsilogic|buslogic|legacyESX,
    /// hwversion=4, toolsversion=2147483647.
    ///
    /// vdi: static=off|on.
    ///
    /// vpc: subformat=dynamic|fixed, force_size=on|off (off rounds up to whole cylinders).
    ///
    /// vhdx: subformat=dynamic|fixed, block_size=0 (by the size of the disk; or 1M to 256M), log_size=1M,
    /// block_state_zero=on|off.
    #[arg(short, long = "option", value_name = "NAME=VALUE,...", value_delimiter = ',', value_parser = pair)]
    options: Vec<(String, String)>,
    /// When a new file gets its room: off as it is written, with holes for zeros; falloc all at once; full by writing
    /// the zeros too.
    #[arg(long, value_name = "WHEN", default_value = "off")]
    preallocation: Preallocation,
    /// Threads that read and code; by default one per core, from 2 to 8.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    workers: Option<u8>,
    #[command(flatten)]
    limits: crate::limits::Args,
    #[command(flatten)]
    sandbox: sandbox::Args,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) =
        text.split_once('=').ok_or_else(|| format!("{text:?} is not of the form NAME=VALUE"))?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let limits = args.limits.limits();
    let begun = Instant::now();
    let pairs: Vec<_> = args.options.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let output = match args.format {
        Format::Raw if pairs.is_empty() && !args.compress => Output::Raw,
        format => Output::Image(create_options(format, args.compress, &pairs)?),
    };
    let mut options = Options::default();
    if let Some(workers) = args.workers {
        options.workers = workers.into();
    }
    let (from, disk, to) = (args.input.clone(), args.disk, args.output.clone());
    let preallocation = args.preallocation;
    let to_stdout = args.output.as_os_str() == "-";
    let stdout = to_stdout.then(|| stdout_for_bytes(preallocation)).transpose()?;
    let place = (!to_stdout).then(|| sandbox::place_of(&args.output));
    let writable: Vec<_> = place.iter().map(PathBuf::as_path).collect();
    args.sandbox.confine(&writable)?;
    let converted = work::run(&args.input.display().to_string(), |progress| async move {
        let convert = move || {
            let destination = match stdout {
                Some(stdout) => Destination::Stream(Box::new(stdout)),
                None => Destination::Path(&to, preallocation),
            };
            let source = Input { path: &from, disk: disk.as_deref() };
            file::convert(source, destination, output, &options, &limits, &progress)
        };
        Ok(tokio::task::spawn_blocking(convert).await??)
    })
    .with_context(|| format!("cannot convert {} to {}", args.input.display(), args.output.display()))?;
    if to_stdout {
        return Ok(());
    }
    println!(
        "{}: {} converted, virtual size {}, stored {}, in {:.1?}",
        args.output.display(),
        converted.format,
        Human(converted.virtual_size),
        Human(converted.stored_bytes),
        begun.elapsed()
    );
    Ok(())
}

/// Standard output without the buffer that looks for ends of lines.
fn stdout_for_bytes(preallocation: Preallocation) -> anyhow::Result<File> {
    let stdout = io::stdout();
    if stdout.is_terminal() {
        bail!("standard output is a terminal, which cannot show a disk; redirect it, or name a file");
    }
    if preallocation != Preallocation::Off {
        bail!("standard output gets no room in advance; leave out --preallocation, or name a file");
    }
    Ok(stdout.as_fd().try_clone_to_owned().context("opening standard output")?.into())
}
