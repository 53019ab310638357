//! Accepts connections, and ends when the upload is over.

use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware::map_request;
use axum::routing::get;
use dvcr_converter::progress::Progress;
use dvcr_tls::{Clients, Terms};
use http::StatusCode;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use crate::app::{App, Phase};
use crate::{Config, Outcome, answer, api, body};

/// Connections at a time; more wait to be accepted.
const CONNECTIONS_MAX: usize = 64;
/// How long a request's head may take, and a connection may be idle, unless uploads may be so for less.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest head of a request, bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// How long a client may take to agree on a TLS connection.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes received that wait to be taken, per connection.
const RECEIVE_BYTES_MAX: usize = 256 << 10;
/// Pause after a failure to accept, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a client whose connection broke may take to come for the verdict; that anybody has come for it ends the wait.
const LINGER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it can be asked for again after that: what was sent may have been lost on the way.
const TOLD_LINGER: Duration = Duration::from_secs(3);
/// How long answers may take to be sent at the end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the import may take to put things in order when it is stopped.
const STOP_TIMEOUT: Duration = Duration::from_secs(8);

/// Where to listen.
#[derive(Debug)]
pub struct Listeners {
    /// For uploads.
    pub upload: TcpListener,
    /// For `/healthz`; always plain HTTP.
    pub health: Option<TcpListener>,
}

/// How TLS is spoken, and who may speak it.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    client_name: Option<String>,
}

impl Tls {
    /// Reads the certificate and its key. With `client_ca` clients need a certificate from there, with `client_name` one
    /// whose common name is that. Blocks.
    ///
    /// # Errors
    /// When a file cannot be used, or the terms are not there.
    pub fn open(
        cert: &Path,
        key: &Path,
        client_ca: Option<&Path>,
        client_name: Option<String>,
        terms: &Terms,
    ) -> Result<Self, dvcr_tls::Error> {
        let clients = client_ca.map_or(Clients::Any, Clients::Required);
        Ok(Self { acceptor: dvcr_tls::acceptor(cert, key, clients, terms)?, client_name })
    }

    /// Whether a client with this certificate may upload.
    fn admits(&self, stream: &tokio_rustls::server::TlsStream<TcpStream>) -> bool {
        let Some(wanted) = &self.client_name else { return true };
        let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        certificate.and_then(dvcr_tls::common_name).as_ref() == Some(wanted)
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("client_name", &self.client_name).finish_non_exhaustive()
    }
}

/// Takes one upload, and returns what became of it when its client has been told, or `shutdown` is ready.
///
/// `progress` is given that of each import that begins: an upload that is started over has a new one.
pub async fn serve(
    config: Config,
    listeners: Listeners,
    tls: Option<Tls>,
    progress: watch::Sender<Arc<Progress>>,
    shutdown: impl Future<Output = ()>,
) -> Outcome {
    let head_timeout = config.idle_timeout.min(HEAD_TIMEOUT);
    let app = Arc::new(App::new(config, progress));
    let mut beside = JoinSet::new();
    if let Some(health) = listeners.health {
        let router = Router::new().route("/healthz", get(async || "OK"));
        let server = Server { router, tls: None, head_timeout, graceful: GracefulShutdown::new() };
        beside.spawn(async move { server.accept(health).await });
    }
    let router = Router::new().fallback(api::answer).with_state(Arc::clone(&app));
    let router = router.layer(map_request(body::patient));
    let server = Server { router, tls, head_timeout, graceful: GracefulShutdown::new() };
    let outcome = tokio::select! {
        () = server.accept(listeners.upload) => Outcome::Stopped,
        outcome = ended(&app) => outcome,
        () = pin!(shutdown) => {
            let _ = timeout(STOP_TIMEOUT, app.stop()).await;
            Outcome::Stopped
        }
    };
    if timeout(DRAIN_TIMEOUT, server.graceful.shutdown()).await.is_err() {
        tracing::debug!("connections still open at the end are cut");
    }
    outcome
}

/// Waits until there is nothing more to do.
async fn ended(app: &App) -> Outcome {
    loop {
        match app.phase() {
            Phase::Waiting(since) => {
                let changed = app.changed.notified();
                match app.config.start_timeout {
                    // The notification only spares the wait.
                    None => changed.await,
                    Some(limit) => {
                        let left = limit.saturating_sub(since.elapsed());
                        let waited = timeout(left, changed).await;
                        if waited.is_err()
                            && matches!(app.phase(), Phase::Waiting(since) if since.elapsed() >= limit)
                        {
                            return Outcome::NotStarted(limit);
                        }
                    }
                }
            }
            Phase::Running(_) => app.changed.notified().await,
            Phase::Over(session) => {
                // A client that has been told is told enough; one that lost its connection may come again.
                let _ = timeout(LINGER_TIMEOUT, app.told.notified()).await;
                sleep(TOLD_LINGER).await;
                return match session.verdict().await {
                    Ok(summary) => Outcome::Done(summary),
                    Err(error) => Outcome::Failed(error),
                };
            }
        }
    }
}

struct Server {
    router: Router,
    tls: Option<Tls>,
    head_timeout: Duration,
    graceful: GracefulShutdown,
}

impl Server {
    /// Serves whoever comes, for ever.
    async fn accept(&self, listener: TcpListener) {
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(self.head_timeout);
        http.max_buf_size(RECEIVE_BYTES_MAX).max_header_size(HEAD_BYTES_MAX);
        loop {
            // The semaphore is never closed.
            let permit = Arc::clone(&connections).acquire_owned().await.ok();
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            // Answers are small: waiting for more to send gains nothing.
            let _ = stream.set_nodelay(true);
            let (router, http, watcher) = (self.router.clone(), http.clone(), self.graceful.watcher());
            match self.tls.clone() {
                None => tokio::spawn(connection(stream, router, http, watcher, permit)),
                Some(tls) => tokio::spawn(secured(tls, stream, peer, (router, http, watcher, permit))),
            };
        }
    }
}

type Serving = (Router, http1::Builder, Watcher, Option<OwnedSemaphorePermit>);

/// Serves one connection inside TLS.
async fn secured(tls: Tls, stream: TcpStream, peer: SocketAddr, (router, http, watcher, permit): Serving) {
    let stream = match timeout(HANDSHAKE_TIMEOUT, tls.acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::info!(%peer, %error, "no agreement on TLS"),
        Err(_) => return tracing::info!(%peer, "no agreement on TLS in time"),
    };
    let router = match tls.admits(&stream) {
        true => router,
        false => {
            let refuse = async || {
                let why = "the certificate is not that of the client that may upload";
                answer::refused(StatusCode::UNAUTHORIZED, why)
            };
            Router::new().fallback(refuse).layer(map_request(body::patient))
        }
    };
    connection(stream, router, http, watcher, permit).await;
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    http: http1::Builder,
    watcher: Watcher,
    permit: Option<OwnedSemaphorePermit>,
) {
    let service = TowerToHyperService::new(router);
    if let Err(error) = watcher.watch(http.serve_connection(TokioIo::new(stream), service)).await {
        tracing::debug!(%error, "connection ended early");
    }
    drop(permit);
}
