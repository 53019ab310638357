//! `dvcr registry`.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, bail};
use dvcr_registry::{Auth, Config, Htpasswd, Registry};
use tokio::net::TcpListener;

use crate::work::{self, Signals};

/// Serves an OCI registry from a directory, in the layout of CNCF distribution
///
/// On a loopback address anybody is served; elsewhere the registry wants to know who may use it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory that holds the registry's data; made if it is not there
    #[arg(long, value_name = "DIR")]
    root: PathBuf,

    /// Address and port to listen on; port 0 takes a free one, which the log tells
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5000")]
    listen: SocketAddr,

    /// File of users and bcrypt hashes, as `htpasswd -B` writes it; every request then needs one of them
    #[arg(long, value_name = "FILE")]
    htpasswd: Option<PathBuf>,

    /// Serve anybody, on any address
    #[arg(long, conflicts_with = "htpasswd")]
    allow_anonymous: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let mut config = Config::new(&args.root);
    config.auth = match &args.htpasswd {
        Some(file) => Auth::Htpasswd(Htpasswd::load(file)?),
        None if args.allow_anonymous || args.listen.ip().is_loopback() => Auth::Anonymous,
        None => bail!(
            "{} is not a loopback address: name the users with --htpasswd FILE, or serve anybody with \
             --allow-anonymous",
            args.listen
        ),
    };
    work::runtime()?.block_on(async {
        let mut signals = Signals::listen()?;
        let registry = Registry::open(config)?;
        let listener = TcpListener::bind(args.listen)
            .await
            .with_context(|| format!("cannot listen on {}", args.listen))?;
        tracing::info!(addr = %listener.local_addr()?, root = %args.root.display(), "listening");
        let ended = async {
            let signal = signals.next().await;
            tracing::info!(?signal, "ending");
        };
        Ok(dvcr_registry::serve(listener, registry, ended).await?)
    })
}
