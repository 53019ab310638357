//! `dvcr convert`.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::ValueEnum;
use dvcr_converter::convert::Options;
use dvcr_converter::file::{self, Output};
use dvcr_converter::limits::Limits;
use dvcr_converter::qcow2::{Compression, WriteOptions};

use crate::size::{self, Human};
use crate::work;

/// Converts a disk image file to raw or qcow2.
///
/// Reads raw, iso and qcow2, by content, also inside gz, xz, zst and bz2. The target is synced and gets its name
/// only when it is complete. A block device as the target is overwritten.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image file or block device to read.
    input: PathBuf,
    /// The file or, for raw, block device to write.
    output: PathBuf,
    /// Format to write.
    #[arg(short = 'O', long, value_enum, default_value_t = Format::Raw)]
    format: Format,
    /// How to compress the clusters of a qcow2 file.
    #[arg(long, value_enum, default_value_t = Clusters::None)]
    compression: Clusters,
    /// Cluster size of a qcow2 file: a power of two from 512 to 2M.
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = size::parse)]
    cluster_size: u64,
    /// Threads that read and code; by default one per core, from 2 to 8.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    workers: Option<u8>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Clusters {
    None,
    Zlib,
    Zstd,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let begun = Instant::now();
    let output = match args.format {
        Format::Raw => Output::Raw,
        Format::Qcow2 => Output::Qcow2(WriteOptions {
            // Too large for its type is too large for qcow2, and refused there with a reason.
            cluster_size: u32::try_from(args.cluster_size).unwrap_or(u32::MAX),
            compression: match args.compression {
                Clusters::None => Compression::None,
                Clusters::Zlib => Compression::Zlib,
                Clusters::Zstd => Compression::Zstd,
            },
            ..WriteOptions::default()
        }),
    };
    let mut options = Options::default();
    if let Some(workers) = args.workers {
        options.workers = workers.into();
    }
    let (from, to) = (args.input.clone(), args.output.clone());
    let converted = work::run(&args.input.display().to_string(), |progress| async move {
        let convert = move || file::convert(&from, &to, output, &options, &Limits::default(), &progress);
        Ok(tokio::task::spawn_blocking(convert).await??)
    })
    .with_context(|| format!("cannot convert {} to {}", args.input.display(), args.output.display()))?;
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
