//! `dvcr uploader`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use dvcr_converter::progress::Progress;
use dvcr_image::{AuthStore, ClientOptions, Credentials, Network, Reference};
use dvcr_importer::checksum::Checksum;
use dvcr_importer::{ErrorKind, ImportSummary};
use dvcr_registry::Time;
use dvcr_tls::Terms;
use dvcr_uploader::{Config, Listeners, Outcome, Tls, serve};
use dvcr_worker::metrics::Family;
use dvcr_worker::termination::Report;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::{Secret, boolean, path};
use crate::source::certificates;
use crate::work::{self, Signals, Usage};
use crate::worker::{self, chain};

/// How long a thread may take to notice the end.
const WIND_DOWN: Duration = Duration::from_secs(1);

/// Takes one upload of a disk image, and stores it in an OCI registry
///
/// Serves /upload until an image is durable, and then ends: by PUT or POST with all of the image, by PUT with
/// Content-Range in parts, or by tus 1.0, which `dvcr upload` speaks. A broken upload goes on where it was.
///
/// Exit codes: 0 the image is stored, or does not have the checksum that it should; 1 failed, or no upload began in
/// time; 2 wrong usage; 130 and 143 stopped by SIGINT and SIGTERM.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Address to listen on
    #[arg(long, env = "LISTEN_ADDRESS", default_value = "0.0.0.0", value_name = "ADDRESS")]
    listen_address: IpAddr,

    /// Port for uploads
    #[arg(long, env = "LISTEN_PORT", default_value_t = 8444, value_name = "PORT")]
    listen_port: u16,

    /// Port of /healthz, which is always plain HTTP
    #[arg(long, env = "HEALTHZ_PORT", default_value_t = 8080, value_name = "PORT")]
    healthz_port: u16,

    /// Certificate (PEM); with its key, TLS is spoken
    #[arg(long, env = "TLS_CERT_FILE", value_name = "FILE", value_parser = path)]
    server_cert: Option<PathBuf>,

    /// Private key (PEM) of the certificate
    #[arg(long, env = "TLS_KEY_FILE", value_name = "FILE", value_parser = path)]
    server_key: Option<PathBuf>,

    /// Certificates (PEM) that those of clients have to come from
    #[arg(long, env = "CLIENT_CA_FILE", value_name = "FILE", value_parser = path)]
    client_ca: Option<PathBuf>,

    /// Common name that the certificate of a client must have
    #[arg(long, env = "CLIENT_NAME", value_name = "NAME")]
    client_name: Option<String>,

    /// Cipher suites that may be spoken, by their IANA names
    #[arg(long, env = "TLS_CIPHERS", value_name = "NAME,...", value_delimiter = ',')]
    tls_ciphers: Vec<String>,

    /// Oldest version of TLS: VersionTLS12 or VersionTLS13
    #[arg(
        long,
        env = "TLS_MIN_VERSION",
        default_value = "",
        value_name = "VERSION",
        hide_default_value = true
    )]
    tls_min_version: String,

    // Texts, because clap shows what it cannot parse, and a reference may hold a password.
    /// The tag to give the image: host[:port]/repository[:tag]
    #[arg(long, env = "UPLOADER_DESTINATION_ENDPOINT", value_name = "REFERENCE")]
    destination_endpoint: String,

    /// User of the registry
    #[arg(long, env = "UPLOADER_DESTINATION_ACCESS_KEY_ID", value_name = "USER", hide_env_values = true)]
    destination_access_key_id: Option<String>,

    /// Password of the user; better given by the environment, which others do not see
    #[arg(long, env = "UPLOADER_DESTINATION_SECRET_KEY", value_name = "PASSWORD", hide_env_values = true)]
    destination_secret_key: Option<Secret>,

    /// Credentials of the registry, as docker and podman keep them
    #[arg(long, env = "UPLOADER_DESTINATION_AUTH_CONFIG", value_name = "FILE", value_parser = path)]
    destination_auth_config: Option<PathBuf>,

    /// Accept any certificate of the registry, and plain HTTP; true or false
    #[arg(
        long,
        env = "DESTINATION_INSECURE_TLS",
        value_name = "BOOL",
        num_args = 0..=1,
        default_missing_value = "true",
        value_parser = boolean
    )]
    destination_insecure_tls: Option<bool>,

    /// Certificates (PEM) that those of the registry may come from: a file, or a folder of files
    #[arg(long, env = "UPLOADER_DESTINATION_CA_BUNDLE", value_name = "PATH", value_parser = path)]
    destination_ca_bundle: Option<PathBuf>,

    /// Checksums that the uploaded bytes must have; all of them
    #[arg(long, env = "UPLOADER_CHECKSUMS", value_name = "ALGORITHM:HEX,...", value_delimiter = ',')]
    checksums: Vec<String>,

    /// How long an upload may take to begin; 0 is for ever
    #[arg(long, env = "UPLOADER_START_TIMEOUT", default_value = "10m", value_name = "TIME", value_parser = time_or_zero)]
    start_timeout: Time,

    /// How long the client of a broken upload may stay away
    #[arg(long, env = "UPLOADER_IDLE_TIMEOUT", default_value = "10m", value_name = "TIME")]
    idle_timeout: Time,

    /// Keep what comes of a raw or compressed image, so that it goes on after a restart, once the rest is to take so long
    #[arg(long, env = "UPLOADER_KEEP_AFTER", default_value = "60s", value_name = "TIME")]
    keep_after: Time,

    #[command(flatten)]
    worker: worker::Args,

    #[command(flatten)]
    limits: crate::limits::Args,
}

pub(super) fn time_or_zero(text: &str) -> Result<Time, String> {
    if text == "0" { Ok(Time::default()) } else { text.parse() }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let ended = args.worker.confine(&[]).and_then(|()| take(&args));
    let report = match &ended {
        Ok(Ended::Stored(_, report)) => report.clone(),
        Ok(Ended::Refused(error)) | Err(error) => Report::failure(&chain(error)),
    };
    args.worker.leave(&report.text());
    match ended? {
        Ended::Stored(summary, _) => {
            println!("{}", serde_json::to_string_pretty(&summary).context("printing the summary")?);
            Ok(ExitCode::SUCCESS)
        }
        Ended::Refused(error) => {
            // The verdict on what was uploaded stands: the same again would fail the same way.
            work::report(&error, 1);
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// How an upload ends that is not to be tried again.
enum Ended {
    Stored(Box<ImportSummary>, Report),
    Refused(anyhow::Error),
}

fn take(args: &Args) -> anyhow::Result<Ended> {
    let config = config(args)?;
    let tls = tls(args)?;
    let runtime = work::runtime()?;
    let (outcome, interrupted) = runtime.block_on(async {
        let mut signals = Signals::listen()?;
        let bind = async |port| {
            let address = SocketAddr::new(args.listen_address, port);
            TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
        };
        let (upload, health) = (bind(args.listen_port).await?, bind(args.healthz_port).await?);
        let (progress, mut uploads) = watch::channel(Arc::new(Progress::default()));
        let first = Arc::clone(&uploads.borrow());
        let (metrics, _server) = args.worker.serve(Family::Registry, first).await?;
        let following = tokio::spawn(async move {
            // An upload that starts over is counted anew.
            while uploads.changed().await.is_ok() {
                metrics.follow(Arc::clone(&uploads.borrow_and_update()));
            }
        });
        let (addr, healthz) = (upload.local_addr()?, health.local_addr()?);
        let (destination, tls_on) = (&config.destination, tls.is_some());
        tracing::info!(%addr, %healthz, tls = tls_on, %destination, "listening");
        let mut interrupted = None;
        let shutdown = async { interrupted = Some(signals.next().await) };
        let listeners = Listeners { upload, health: Some(health) };
        let outcome = serve(config, listeners, tls, progress, shutdown).await;
        following.abort();
        anyhow::Ok((outcome, interrupted))
    })?;
    runtime.shutdown_timeout(WIND_DOWN);
    match outcome {
        Outcome::Done(summary) => {
            // From the beginning of the upload to its verdict; the process waited before, and lingers behind it.
            let elapsed = Duration::try_from_secs_f64(summary.seconds).unwrap_or_default();
            let report = worker::report(&summary, summary.bytes_per_second, elapsed);
            Ok(Ended::Stored(Box::new((*summary).clone()), report))
        }
        Outcome::Failed(error) if error.kind() == ErrorKind::Checksum => Ok(Ended::Refused(error.into())),
        Outcome::Failed(error) => Err(error.into()),
        Outcome::NotStarted(limit) => bail!("no upload began in {} s; start again", limit.as_secs_f32()),
        Outcome::Stopped => match interrupted {
            Some(interrupted) => Err(interrupted.into()),
            None => bail!("the service ended early"),
        },
    }
}

fn config(args: &Args) -> anyhow::Result<Config> {
    let endpoint = args.destination_endpoint.trim_start_matches("docker://");
    let destination: Reference = endpoint.parse().context(Usage("--destination-endpoint"))?;
    let auth = match (&args.destination_access_key_id, &args.destination_secret_key) {
        (Some(user), Some(password)) if !user.is_empty() || !password.reveal().is_empty() => {
            let credentials = Credentials { username: user.clone(), password: password.reveal().to_owned() };
            AuthStore::single(destination.host(), credentials)
        }
        _ => {
            let file = args.destination_auth_config.as_deref().filter(|path| !path.as_os_str().is_empty());
            AuthStore::discover(file, |name| std::env::var_os(name))?
        }
    };
    let roots = args.destination_ca_bundle.as_deref().filter(|path| !path.as_os_str().is_empty());
    let roots = roots.map(certificates).transpose().context("--destination-ca-bundle")?.unwrap_or_default();
    let insecure = args.destination_insecure_tls.unwrap_or(false);
    // An empty variable is one that is not set.
    let demanded = args.checksums.iter().filter(|text| !text.is_empty());
    let checksums: Result<Vec<Checksum>, _> = demanded.map(|text| text.parse()).collect();
    Ok(Config {
        destination,
        checksums: checksums.context(Usage("--checksums"))?,
        client: ClientOptions { insecure, auth, network: Network { roots, ..Network::default() } },
        limits: args.limits.limits(),
        start_timeout: Some(args.start_timeout.0).filter(|limit| !limit.is_zero()),
        idle_timeout: args.idle_timeout.0,
        keep_after: args.keep_after.0,
    })
}

fn tls(args: &Args) -> anyhow::Result<Option<Tls>> {
    let given = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
    let (cert, key, ca) = (given(&args.server_cert), given(&args.server_key), given(&args.client_ca));
    let name = args.client_name.clone().filter(|name| !name.is_empty());
    let (cert, key) = match (cert, key) {
        (Some(cert), Some(key)) => (cert, key),
        (None, None) => {
            ensure!(
                ca.is_none() && name.is_none(),
                "--client-ca and --client-name need --server-cert and --server-key"
            );
            return Ok(None);
        }
        _ => bail!("--server-cert and --server-key need each other"),
    };
    ensure!(name.is_none() || ca.is_some(), "--client-name needs --client-ca");
    let ciphers = args.tls_ciphers.iter().filter(|name| !name.is_empty()).cloned().collect();
    let terms = Terms { min_version: args.tls_min_version.clone(), ciphers };
    Ok(Some(Tls::open(&cert, &key, ca.as_deref(), name, &terms)?))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cmd::{Cli, Command};

    fn args(more: &[&str]) -> Args {
        let args = ["dvcr", "uploader", "--destination-endpoint", "r.example/a:1"].iter().chain(more);
        match Cli::try_parse_from(args).unwrap().command {
            Command::Uploader(args) => *args,
            _ => panic!("another command"),
        }
    }

    #[test]
    fn an_operators_booleans_are_understood() {
        for (given, insecure) in [
            (&["--destination-insecure-tls"][..], true),
            (&["--destination-insecure-tls=true"], true),
            (&["--destination-insecure-tls=0"], false),
            (&["--destination-insecure-tls="], false),
            (&[], false),
        ] {
            assert_eq!(config(&args(given)).unwrap().client.insecure, insecure, "{given:?}");
        }
    }

    #[test]
    fn what_tls_needs_is_there_together_or_not_at_all() {
        assert!(tls(&args(&["--server-cert", "", "--client-name", ""])).unwrap().is_none());
        for wrong in [
            &["--server-cert", "a"][..],
            &["--client-ca", "a"],
            &["--server-cert", "a", "--server-key", "b", "--client-name", "x"],
        ] {
            assert!(tls(&args(wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_time_to_begin_can_be_for_ever_and_no_password_is_shown() {
        assert_eq!(config(&args(&["--start-timeout", "0"])).unwrap().start_timeout, None);
        assert_eq!(config(&args(&[])).unwrap().start_timeout, Some(Duration::from_secs(600)));
        let secret = args(&["--destination-access-key-id", "u", "--destination-secret-key", "s3cret"]);
        assert!(!format!("{secret:?} {:?}", config(&secret).unwrap()).contains("s3cret"));
    }
}
