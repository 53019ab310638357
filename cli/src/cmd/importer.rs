//! `dvcr importer`.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::ValueEnum;
use dvcr_image::{AuthStore, ClientOptions, Reference};
use dvcr_importer::checksum::Checksum;
use dvcr_importer::{ImportRequest, ImportSummary, Source, SourceOptions, import};
use dvcr_registry::Time;
use dvcr_worker::metrics::Family;
use dvcr_worker::retry;
use dvcr_worker::termination::Report;

use super::{Secret, boolean, path};
use crate::source::Trust;
use crate::work::{self, Usage};
use crate::worker::{self, chain};

/// Imports a disk image into an OCI registry, as the worker of an operator
///
/// Does what `dvcr import` does, told by the environment; tries again for a quarter of an hour what fails in passing, and goes
/// on where it was; serves metrics, and leaves a report. Exit codes: 0 done; 1 failed; 2 wrong usage; 130 and 143 stopped by
/// SIGINT and SIGTERM.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What the source is
    #[arg(long, env = "IMPORTER_SOURCE", value_enum, value_name = "KIND")]
    source: Kind,

    // Texts, because clap shows what it cannot parse, and a URL may hold a password.
    /// Where it is: a URL, docker://REFERENCE, or for dvcr a reference
    #[arg(
        long,
        env = "IMPORTER_ENDPOINT",
        default_value = "",
        hide_default_value = true,
        hide_env_values = true
    )]
    endpoint: String,

    /// The tag to give the image: host[:port]/repository[:tag]
    #[arg(long, env = "IMPORTER_DESTINATION_ENDPOINT", value_name = "REFERENCE")]
    destination_endpoint: String,

    /// Credentials of the destination, as docker and podman keep them; of a source of kind dvcr too
    #[arg(long, env = "IMPORTER_DESTINATION_AUTH_CONFIG", value_name = "FILE", value_parser = path)]
    destination_auth_config: Option<PathBuf>,

    /// Accept any certificate of the destination, and plain HTTP; true or false
    #[arg(long, env = "DESTINATION_INSECURE_TLS", value_name = "BOOL", default_value = "false", value_parser = boolean)]
    destination_insecure_tls: bool,

    /// Credentials of a source in a registry, as docker and podman keep them
    #[arg(long, env = "IMPORTER_AUTH_CONFIG", value_name = "FILE", value_parser = path)]
    auth_config: Option<PathBuf>,

    /// Accept any certificate of the source, and plain HTTP; true or false
    #[arg(long, env = "INSECURE_TLS", value_name = "BOOL", default_value = "false", value_parser = boolean)]
    insecure_tls: bool,

    /// Folder with certificates (PEM) that those of the source may come from
    #[arg(long, env = "IMPORTER_CERT_DIR", value_name = "DIR", value_parser = path)]
    cert_dir: Option<PathBuf>,

    /// Folder with certificates (PEM) that those of a proxy may come from
    #[arg(long, env = "IMPORTER_PROXY_CERT_DIR", value_name = "DIR", value_parser = path)]
    proxy_cert_dir: Option<PathBuf>,

    /// Checksums that the source's bytes must have; all of them
    #[arg(long, env = "IMPORTER_CHECKSUMS", value_name = "ALGORITHM:HEX,...", value_delimiter = ',')]
    checksums: Vec<String>,

    /// User of an http source, or key to a bucket
    #[arg(long, env = "IMPORTER_ACCESS_KEY_ID", value_name = "USER", hide_env_values = true)]
    access_key_id: Option<String>,

    /// Password of an http source, or secret of the key; better given by the environment, which others do not see
    #[arg(long, env = "IMPORTER_SECRET_KEY", value_name = "PASSWORD", hide_env_values = true)]
    secret_key: Option<Secret>,

    /// The folder with disk.img of a source of kind filesystem
    #[arg(long, env = "IMPORTER_FILESYSTEM", default_value = "/tmp/fs", value_name = "DIR")]
    filesystem: PathBuf,

    /// The device of a source of kind blockDevice
    #[arg(long, env = "IMPORTER_BLOCK_DEVICE", default_value = "/dev/xvda", value_name = "FILE")]
    block_device: PathBuf,

    /// What the source may be (YAML; docs/import.md)
    #[arg(long, env = "IMPORTER_SOURCE_POLICY", value_name = "FILE", value_parser = path)]
    source_policy: Option<PathBuf>,

    /// Keep what comes of a raw or compressed source, so that it goes on after a kill, once the rest is to take so long
    #[arg(long, env = "IMPORTER_KEEP_AFTER", default_value = "60s", value_name = "TIME")]
    keep_after: Time,

    /// Taken, and of no meaning here: images are stored as they are found
    #[arg(
        long,
        env = "IMPORTER_CONTENTTYPE",
        default_value = "",
        hide_default_value = true,
        value_name = "TYPE"
    )]
    contenttype: String,

    /// Taken, and of no meaning here: an image is as large as it is
    #[arg(
        long,
        env = "IMPORTER_IMAGE_SIZE",
        default_value = "",
        hide_default_value = true,
        value_name = "SIZE"
    )]
    image_size: String,

    /// Taken, and of no meaning here: no volume is written
    #[arg(
        long,
        env = "FILESYSTEM_OVERHEAD",
        default_value = "",
        hide_default_value = true,
        value_name = "SHARE"
    )]
    filesystem_overhead: String,

    /// Taken, and of no meaning here: --log says what is logged
    #[arg(short = 'v', long = "verbosity", default_value = "", hide_default_value = true, value_name = "N")]
    verbosity: String,

    #[command(flatten)]
    worker: worker::Args,

    #[command(flatten)]
    limits: crate::limits::Args,
}

/// The kinds of sources, by the names that operators have for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// A URL: http, https or s3
    Http,
    /// An image in a registry
    Registry,
    /// An image in the registry of the destination, or one like it
    Dvcr,
    /// All of --block-device
    #[value(name = "blockDevice")]
    BlockDevice,
    /// disk.img in --filesystem
    Filesystem,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let outcome = args.worker.confine(&[]).and_then(|()| transfer(&args));
    let report = match &outcome {
        Ok((_, report)) => report.clone(),
        Err(error) => Report::failure(&chain(error)),
    };
    args.worker.leave(&report.text());
    let (summary, _) = outcome?;
    println!("{}", serde_json::to_string_pretty(&summary).context("printing the summary")?);
    Ok(())
}

fn transfer(args: &Args) -> anyhow::Result<(ImportSummary, Report)> {
    let request = request(args)?;
    let title = request.destination.repository().to_owned();
    work::run(&title, |progress| async move {
        let (metrics, _server) = args.worker.serve(Family::Registry, progress.clone()).await?;
        let summary = retry::run(&progress, || import(request.clone(), progress.clone())).await?;
        let report = worker::report(&summary, metrics.average_speed() as u64, metrics.elapsed());
        Ok((summary, report))
    })
}

fn request(args: &Args) -> anyhow::Result<ImportRequest> {
    let destination: Reference = args
        .destination_endpoint
        .trim_start_matches("docker://")
        .parse()
        .context(Usage("--destination-endpoint"))?;
    let auth = authentication(args.destination_auth_config.as_deref())?;
    let source = source(args)?;
    let folders = [&args.cert_dir, &args.proxy_cert_dir].into_iter().flatten().filter(|path| path.is_dir());
    let trust = Trust {
        insecure: args.insecure_tls,
        roots: folders.cloned().collect(),
        policy: args.source_policy.clone().filter(|path| is_given(path)),
    };
    let credentials = match (&args.access_key_id, &args.secret_key) {
        (Some(user), Some(secret)) if !user.is_empty() => Some((user.as_str(), secret.reveal())),
        _ => None,
    };
    let source_auth = match args.source {
        Kind::Dvcr => auth.clone(),
        _ => authentication(args.auth_config.as_deref())?,
    };
    let source_options: SourceOptions = trust.options(&source, source_auth, credentials)?;
    let demanded = args.checksums.iter().filter(|text| !text.is_empty());
    let checksums: Result<Vec<Checksum>, _> = demanded.map(|text| text.parse()).collect();
    Ok(ImportRequest {
        source,
        destination,
        checksums: checksums.context(Usage("--checksums"))?,
        source_options,
        if_changed: false,
        keep_after: args.keep_after.0,
        client: ClientOptions { insecure: args.destination_insecure_tls, auth, ..ClientOptions::default() },
        limits: args.limits.limits(),
    })
}

fn source(args: &Args) -> anyhow::Result<Source> {
    let endpoint = args.endpoint.as_str();
    let text = match args.source {
        Kind::BlockDevice => return Ok(Source::File(args.block_device.clone())),
        Kind::Filesystem => return Ok(Source::File(args.filesystem.clone())),
        Kind::Registry | Kind::Dvcr => format!("docker://{}", endpoint.trim_start_matches("docker://")),
        Kind::Http => endpoint.to_owned(),
    };
    ensure!(!endpoint.is_empty(), "--endpoint (IMPORTER_ENDPOINT) is missing: where the source is");
    let source = text.parse().context(Usage("--endpoint"))?;
    let fits = args.source != Kind::Http || matches!(source, Source::Http(_) | Source::S3(_));
    ensure!(fits, "--endpoint is no address of http, https or s3");
    Ok(source)
}

/// An empty variable is one that is not set.
pub(super) fn is_given(path: &Path) -> bool {
    !path.as_os_str().is_empty()
}

pub(super) fn authentication(file: Option<&Path>) -> anyhow::Result<AuthStore> {
    Ok(AuthStore::discover(file.filter(|path| is_given(path)), |name| std::env::var_os(name))?)
}
