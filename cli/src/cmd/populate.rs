//! `dvcr populate`.

use std::path::PathBuf;

use anyhow::Context;
use clap::ValueEnum;
use dvcr_image::{AuthStore, ClientOptions, Reference};
use dvcr_importer::{PopulateRequest, TargetFormat, populate};

use crate::sandbox;
use crate::size::{self, Human};
use crate::work::{self, Usage};

/// Makes a disk from an image in a registry.
///
/// The target is synced and complete when the command succeeds: a file gets its name only then, and a block device
/// its first bytes. A disk is made larger on request, never smaller.
#[derive(Debug, clap::Args)]
pub struct Args {
    // A text, because clap shows what it cannot parse, and people write passwords into references.
    /// The image: host[:port]/repository[:tag][@digest].
    reference: String,
    /// The file to write, or for raw a block device to overwrite.
    target: PathBuf,
    /// Size of the new disk, in bytes or with K, M, G or T; by default that of the image, or of the block device.
    #[arg(long, value_parser = size::parse)]
    size: Option<u64>,
    /// Format to write.
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    format: Format,
    /// Permission bits of the file, octal, such as 0660; by default those of the file that is replaced, or the usual ones.
    #[arg(long, value_name = "OCTAL", value_parser = mode)]
    mode: Option<u32>,
    /// Accept any certificate, and plain HTTP. Loopback hosts need no permission for that.
    #[arg(long)]
    insecure: bool,
    /// Credentials of the registry, as docker and podman keep them.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    #[command(flatten)]
    limits: crate::limits::Args,
    #[command(flatten)]
    sandbox: sandbox::Args,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
}

/// Permission bits as chmod takes them.
pub(super) fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| format!("{text:?} is no octal number from 0 to 777"))
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let reference: Reference = args.reference.parse().context(Usage("REFERENCE"))?;
    let auth = AuthStore::discover(args.authfile.as_deref(), |name| std::env::var_os(name))?;
    args.sandbox.confine(&[&sandbox::place_of(&args.target)])?;
    let title = args.target.display().to_string();
    let request = PopulateRequest {
        reference,
        target: args.target,
        size: args.size,
        size_max: None,
        workers: None,
        format: match args.format {
            Format::Raw => TargetFormat::Raw,
            Format::Qcow2 => TargetFormat::Qcow2,
        },
        mode: args.mode,
        client: ClientOptions { insecure: args.insecure, auth, ..ClientOptions::default() },
        limits: args.limits.limits(),
    };
    let done = work::run(&title, |progress| async move { Ok(populate(request, progress).await?) })?;
    println!(
        "{}: {} from {} ({}), virtual size {}, written {}, in {:.1} s",
        done.target.display(),
        done.format,
        done.reference,
        done.source_format,
        Human(done.virtual_size),
        Human(done.written_bytes),
        done.seconds,
    );
    Ok(())
}
