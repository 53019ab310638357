//! `dvcr import`.

use std::path::PathBuf;

use anyhow::Context;
use clap::ValueEnum;
use dvcr_converter::limits::Limits;
use dvcr_image::{AuthStore, ClientOptions, Reference};
use dvcr_importer::checksum::Checksum;
use dvcr_importer::{ImportRequest, Source, import};

use crate::size::Human;
use crate::work;

/// Imports a disk image into an OCI registry.
///
/// The image streams through: nothing is kept on the local disk, and nothing is published unless all of it is
/// right. qcow2 and iso are stored byte for byte, out of gz, xz, zst and bz2 if need be; a raw disk becomes qcow2
/// with zstd clusters. The summary goes to standard output, progress to standard error.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the image is: an http(s) URL, docker://REFERENCE, a file or a block device.
    #[arg(value_parser = source)]
    source: Source,
    /// The tag to give it: host[:port]/repository[:tag].
    destination: Reference,
    /// A checksum that the source's bytes must have: md5, sha1, sha256, sha512, streebog256 or streebog512. May be
    /// repeated.
    #[arg(long = "checksum", value_name = "ALGORITHM:HEX")]
    checksums: Vec<Checksum>,
    /// Accept any certificate of the source, and plain HTTP of a source registry.
    #[arg(long)]
    insecure_source: bool,
    /// Accept any certificate of the destination, and plain HTTP. Loopback hosts need no permission for that.
    #[arg(long)]
    insecure: bool,
    /// Credentials of the registries, as docker and podman keep them.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// How to print the summary.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// A URL may hold a password, and clap would show it in its own message.
fn source(text: &str) -> Result<Source, String> {
    text.parse().map_err(|error: dvcr_importer::Error| error.to_string())
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let auth = AuthStore::discover(args.authfile.as_deref(), |name| std::env::var_os(name))?;
    let title = args.destination.repository().to_owned();
    let request = ImportRequest {
        source: args.source,
        destination: args.destination,
        checksums: args.checksums,
        insecure_source: args.insecure_source,
        client: ClientOptions { insecure: args.insecure, auth },
        limits: Limits::default(),
    };
    let done = work::run(&title, |progress| async move { Ok(import(request, progress).await?) })?;
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&done).context("printing the summary")?),
        Output::Text => println!(
            "{}\n  digest        {}\n  file          {} ({})\n  virtual size  {}\n  stored size   {}\n  \
             source size   {}\n  speed         {}/s, {:.1} s",
            done.reference,
            done.digest,
            done.file_name,
            done.format,
            Human(done.virtual_size),
            Human(done.stored_size),
            Human(done.source_size),
            Human(done.bytes_per_second),
            done.seconds,
        ),
    }
    Ok(())
}
