//! A server of one disk, to be read (`docs/formats/nbd.md`).
//!
//! ```text
//!  socket ──> handshake ──> requests ──> pieces of 1 MiB, a few ahead ──> answers, in order ──> socket
//! ```
//!
//! What is asked for is read in pieces, so that memory does not depend on what clients ask for.

mod handshake;
mod transmit;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use dvcr_converter::io::ReadAt;
use dvcr_converter::local::FileSource;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::connection::Stream;

/// Connections served at a time; more wait.
const CONNECTIONS_MAX: usize = 16;
/// Longest handshake, milliseconds.
const HANDSHAKE_TIMEOUT_MS: u64 = 30_000;
/// Wait after a connection that could not be taken, milliseconds.
const ACCEPT_PAUSE_MS: u64 = 100;

/// Where a server listens.
#[derive(Debug)]
pub enum Listener {
    /// At an address.
    Tcp(TcpListener),
    /// At a socket of this machine.
    Unix(UnixListener),
}

impl Listener {
    async fn accept(&self) -> io::Result<(Box<dyn Stream>, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok((Box::new(stream), peer.to_string()))
            }
            Self::Unix(listener) => Ok((Box::new(listener.accept().await?.0), "a local socket".to_owned())),
        }
    }
}

/// Serves `disk` under every name until `shutdown` is over. With `tls` nobody gets it without.
pub async fn serve(
    listener: Listener,
    disk: Arc<FileSource>,
    tls: Option<TlsAcceptor>,
    shutdown: impl Future<Output = ()>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let accept = async {
        // Its tasks end with it.
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
                    continue;
                }
            };
            let (disk, tls) = (disk.clone(), tls.clone());
            connections.spawn(async move {
                let _place = place;
                tracing::info!(peer, "a client is there");
                match connection(stream, disk, tls.as_ref()).await {
                    Ok(()) => tracing::info!(peer, "the client has left"),
                    Err(error) => tracing::warn!(peer, %error, "the client is left"),
                }
            });
        }
    };
    tokio::select! {
        () = accept => {}
        () = shutdown => {}
    }
}

async fn connection(
    stream: Box<dyn Stream>,
    disk: Arc<FileSource>,
    tls: Option<&TlsAcceptor>,
) -> io::Result<()> {
    let limit = Duration::from_millis(HANDSHAKE_TIMEOUT_MS);
    let negotiated = timeout(limit, handshake::negotiate(stream, disk.len(), tls)).await;
    match negotiated.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?? {
        Some((stream, terms)) => transmit::transmit(stream, disk, terms).await,
        None => Ok(()),
    }
}

/// What a client does that it is not to do.
fn wrong(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the NBD client {}", text.into()))
}
