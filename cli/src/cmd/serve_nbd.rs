//! `dvcr serve-nbd`.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use dvcr_importer::source::file::FileSource;
use dvcr_importer::source::nbd::server::{Listener, serve};
use dvcr_tls::{Clients, Terms, acceptor};
use tokio::net::{TcpListener, UnixListener};

use crate::sandbox;
use crate::work::{self, Signals};

/// How long a thread may take to notice the end.
const WIND_DOWN: Duration = Duration::from_secs(1);

/// Lets others read a volume by NBD, such as `dvcr clone`, `dvcr import`, qemu or nbdcopy
///
/// The bytes are served as they are, under every export name, until SIGINT or SIGTERM. Whoever reaches the address can read
/// all of them, unless --client-ca says who may.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file, the folder with disk.img, or the block device to serve
    file: PathBuf,

    /// Address to listen on
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:10809", conflicts_with = "socket")]
    listen: SocketAddr,

    /// Local socket to listen on instead; one that nobody listens on any more is replaced
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,

    /// Certificate (PEM, with its chain); with it nobody is served without TLS
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// Private key (PEM) of the certificate
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Certificates (PEM) that those of clients have to come from
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    client_ca: Option<PathBuf>,

    #[command(flatten)]
    sandbox: sandbox::Args,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let opened = FileSource::open(&args.file)?;
    let (shown, bytes) = (opened.path.display().to_string(), opened.len);
    let Some(disk) = opened.random else { bail!("{shown} was replaced meanwhile; start again") };
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(cert), Some(key)) => {
            let clients = args.client_ca.as_deref().map_or(Clients::Any, Clients::Required);
            Some(acceptor(cert, key, clients, &Terms::default())?)
        }
        _ => None,
    };
    match &args.socket {
        Some(socket) => args.sandbox.confine(&[&sandbox::place_of(socket)])?,
        None => args.sandbox.confine(&[])?,
    }
    let runtime = work::runtime()?;
    let served = runtime.block_on(async {
        let mut signals = Signals::listen()?;
        let (listener, address) = match &args.socket {
            Some(path) => {
                remove_stale(path).await?;
                let listener = UnixListener::bind(path);
                let listener = listener.with_context(|| format!("cannot listen on {}", path.display()))?;
                (Listener::Unix(listener), path.display().to_string())
            }
            None => {
                let listener = TcpListener::bind(args.listen).await;
                let listener = listener.with_context(|| format!("cannot listen on {}", args.listen))?;
                let address = listener.local_addr()?;
                (Listener::Tcp(listener), address.to_string())
            }
        };
        tracing::info!(addr = address, volume = shown, bytes, tls = tls.is_some(), "listening");
        let ended = async {
            let signal = signals.next().await;
            tracing::info!(signal = signal.name(), "ending");
        };
        serve(listener, Arc::new(disk), tls, ended).await;
        if let Some(path) = &args.socket {
            // Whoever comes next replaces it.
            let _ = fs::remove_file(path);
        }
        anyhow::Ok(())
    });
    runtime.shutdown_timeout(WIND_DOWN);
    served
}

/// Removes a socket that a killed server has left.
async fn remove_stale(path: &Path) -> anyhow::Result<()> {
    let is_socket = path.symlink_metadata().is_ok_and(|found| found.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    match tokio::net::UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).with_context(|| format!("cannot replace {}", path.display()))
        }
        _ => bail!("somebody listens on {} already", path.display()),
    }
}
