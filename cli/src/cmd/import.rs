//! `dvcr import`.

use std::path::PathBuf;

use anyhow::Context;
use clap::ValueEnum;
use dvcr_image::{AuthStore, ClientOptions, Reference};
use dvcr_importer::checksum::Checksum;
use dvcr_importer::{ImportRequest, Source, import};
use dvcr_registry::Time;

use crate::size::Human;
use crate::work::{self, Usage};

/// Imports a disk image into an OCI registry.
///
/// The image streams through: nothing is kept on the local disk, and nothing is published unless all of it is
/// right. One that was interrupted, or killed, is gone on with by the same command. qcow2 and iso are stored byte for byte, out of gz, xz, zst, bz2 and lz4 if need be; a raw disk becomes
/// qcow2 with zstd clusters. The summary goes to standard output, progress to standard error.
#[derive(Debug, clap::Args)]
pub struct Args {
    // Texts, because clap shows what it cannot parse, and a URL may hold a password.
    /// Where the image is: an http(s) URL, docker://REFERENCE, s3://BUCKET/KEY, nbd://HOST/EXPORT, a file, a folder with
    /// the file disk.img, or a block device.
    source: String,
    /// The tag to give it: host[:port]/repository[:tag].
    destination: String,
    /// A checksum that the source's bytes must have: md5, sha1, sha256, sha512, streebog256 or streebog512. May be
    /// repeated.
    #[arg(long = "checksum", value_name = "ALGORITHM:HEX")]
    checksums: Vec<Checksum>,
    #[command(flatten)]
    from: crate::source::Args,
    /// Accept any certificate of the destination, and plain HTTP. Loopback hosts need no permission for that.
    #[arg(long)]
    insecure: bool,
    /// Do nothing if the tag was made of the version of the source that is there now, as ETag, time, length or digest tell.
    #[arg(long)]
    if_changed: bool,
    /// Keep what comes of a raw or compressed source in the registry, so that the next import goes on if this one is killed, once
    /// reading the rest is to take so long; 0s is at once.
    #[arg(long, value_name = "TIME", default_value = "60s")]
    keep_after: Time,
    /// Credentials of the registries, as docker and podman keep them.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// How to print the summary.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
    #[command(flatten)]
    limits: crate::limits::Args,
    #[command(flatten)]
    sandbox: crate::sandbox::Args,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let source: Source = args.source.parse().context(Usage("SOURCE"))?;
    let destination: Reference = args.destination.parse().context(Usage("DESTINATION"))?;
    let auth = AuthStore::discover(args.authfile.as_deref(), |name| std::env::var_os(name))?;
    let title = destination.repository().to_owned();
    let source_options = args.from.options(&source, auth.clone(), |name| std::env::var_os(name))?;
    let request = ImportRequest {
        source,
        destination,
        checksums: args.checksums,
        source_options,
        if_changed: args.if_changed,
        keep_after: args.keep_after.0,
        client: ClientOptions { insecure: args.insecure, auth, ..ClientOptions::default() },
        limits: args.limits.limits(),
    };
    args.sandbox.confine(&[])?;
    let done = work::run(&title, |progress| async move { Ok(import(request, progress).await?) })?;
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&done).context("printing the summary")?),
        Output::Text => println!(
            "{}\n  outcome       {}\n  digest        {}\n  file          {} ({})\n  virtual size  {}\n  stored size   {}\n  \
             source size   {}{}\n  speed         {}/s, {:.1} s",
            done.reference,
            done.outcome,
            done.digest,
            done.file_name,
            done.format,
            Human(done.virtual_size),
            Human(done.stored_size),
            Human(done.source_size),
            match done.resumed_bytes {
                0 => String::new(),
                bytes => format!(", {} of it brought before", Human(bytes)),
            },
            Human(done.bytes_per_second),
            done.seconds,
        ),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cmd::{Cli, Command};

    #[test]
    fn wrong_usage_shows_no_password() {
        for (source, destination) in [
            ("ftp://user:s3cret@h/a", "h/a"),
            ("docker://user:s3cret@h/r", "h/a"),
            ("/a", "user:s3cret@h/r"),
            ("/a", "docker://user:s3cret@h/r"),
        ] {
            let cli = Cli::try_parse_from(["dvcr", "import", source, destination]).unwrap();
            let Command::Import(args) = cli.command else { panic!("another command") };
            let error = run(*args).unwrap_err();
            assert!(error.is::<Usage>(), "{error:?}");
            assert!(!format!("{error:?}").contains("s3cret"), "{error:?}");
        }
    }
}
