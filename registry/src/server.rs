//! Accepts connections and speaks HTTP/1.1 on them, inside TLS where that is set up.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use crate::api::error::Chain;
use crate::api::limits::Address;
use crate::auth::Peer;
use crate::cache::USES_INTERVAL;
use crate::control::Control;
use crate::patience::Patient;
use crate::reload::RELOAD_INTERVAL;
use crate::{Error, Registry, Result};

/// How long requests may go on after the end was asked for.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long what happened may take to be written at the end.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);
/// How long uploads whose connection was cut then may take to put away what has come.
const KEEP_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a request's head may take, and a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// How long a client may take to agree on a TLS connection.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes received that wait to be taken, per connection.
const RECEIVE_BYTES_MAX: usize = 256 << 10;
/// Pause after a failure to accept that does not go away at once, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves a registry until `shutdown` is ready, then lets running requests end, for at most 10 s.
///
/// # Errors
/// When the sessions that live in memory cannot be put on disk at the end.
pub async fn serve(
    listener: TcpListener,
    registry: Registry,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let router = registry.router();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(RECEIVE_BYTES_MAX);
    let graceful = GracefulShutdown::new();
    let connections = Arc::new(Semaphore::new(registry.connections_max));
    let mut tasks = JoinSet::new();
    let mut beside = JoinSet::new();
    beside.spawn(registry.clone().keep_schedule());
    beside.spawn(registry.clone().keep_files());
    beside.spawn(registry.clone().keep_scrubbing());
    beside.spawn(registry.clone().keep_cache());
    beside.spawn(registry.clone().keep_mirror());
    if let Some(events) = &registry.app.events {
        if let Ok(address) = listener.local_addr() {
            events.listens(address);
        }
        events.deliver(&mut beside);
    }
    match Control::listen(&registry.root) {
        Ok(control) => {
            beside.spawn(control.serve(registry.clone()));
        }
        Err(error) => tracing::error!(%error, "commands cannot reach this registry"),
    }
    let mut shutdown = pin!(shutdown);
    loop {
        let (stream, peer, permit) = tokio::select! {
            accepted = accept(&listener, &connections) => accepted,
            () = &mut shutdown => break,
        };
        // Answers are small or come in large pieces: waiting for more to send gains nothing.
        let _ = stream.set_nodelay(true);
        let router = match registry.app.wants_addresses() {
            true => router.clone().layer(Extension(Address(peer))),
            false => router.clone(),
        };
        let stream = Patient::new(stream, registry.limits.idle_timeout);
        // Forgets those that have ended.
        while tasks.try_join_next().is_some() {}
        if let Some(acceptors) = &registry.tls {
            let (acceptor, router, http) = (acceptors.get(), router, http.clone());
            let watcher = graceful.watcher();
            tasks.spawn(async move {
                secured(&acceptor, stream, router, &http, watcher).await;
                drop(permit);
            });
            continue;
        }
        let service = TowerToHyperService::new(router);
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tasks.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended early");
            }
            drop(permit);
        });
    }
    registry.app.is_ending.store(true, Ordering::Relaxed);
    drop(listener);
    registry.background.stop();
    beside.shutdown().await;
    // A disk that does not answer holds up neither those who read from elsewhere nor the end.
    let ended = async { tokio::join!(graceful.shutdown(), registry.scrubbing_ended()) };
    if timeout(DRAIN_TIMEOUT, ended).await.is_err() {
        tracing::warn!(
            seconds = DRAIN_TIMEOUT.as_secs(),
            "requests, or a search for damage, still run at the end and are cut"
        );
    }
    // A body breaks off with its connection, and the upload it was for puts away what has come.
    tasks.shutdown().await;
    registry.finish(KEEP_TIMEOUT).await
}

/// Serves one connection inside TLS.
async fn secured(
    acceptor: &TlsAcceptor,
    stream: Patient<TcpStream>,
    router: Router,
    http: &http1::Builder,
    watcher: Watcher,
) {
    let stream = match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "no agreement on TLS"),
        Err(_) => return tracing::debug!("no agreement on TLS in time"),
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let router = match certificate.and_then(dvcr_tls::common_name) {
        Some(name) => router.layer(Extension(Peer::new(&name))),
        None => router,
    };
    let service = TowerToHyperService::new(router);
    if let Err(error) = watcher.watch(http.serve_connection(TokioIo::new(stream), service)).await {
        tracing::debug!(%error, "connection ended early");
    }
}

/// Waits for a connection, and first for room for one.
async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
) -> (TcpStream, SocketAddr, Option<OwnedSemaphorePermit>) {
    // The semaphore is never closed.
    let permit = Arc::clone(connections).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => return (stream, peer, permit),
            Err(error) if is_of_connection(&error) => {}
            Err(error) => {
                tracing::error!(%error, "cannot accept connections");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Whether only the connection that was being accepted is lost.
fn is_of_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

impl Registry {
    /// Looks now and then whether files with secrets and certificates changed.
    async fn keep_files(self) {
        let app = &self.app;
        if app.guard.is_none() && self.tls.is_none() && app.cache.is_none() && app.events.is_none() {
            return;
        }
        loop {
            sleep(RELOAD_INTERVAL).await;
            let registry = self.clone();
            // Should it panic, there is the next time.
            let _ = tokio::task::spawn_blocking(move || registry.refresh(false)).await;
        }
    }

    /// Leaves word of what is fetched from elsewhere for those who look at the directory.
    async fn note_cached(&self) {
        let (app, Some(directory)) = (Arc::clone(&self.app), self.directory.clone()) else { return };
        let noted = tokio::task::spawn_blocking(move || {
            let sources = app.cache.iter().flat_map(|sources| sources.all());
            directory.note_cached(sources.map(|source| source.prefix()))
        });
        if let Ok(Err(error)) = noted.await {
            let error = Chain(&error);
            tracing::warn!(%error, "`dvcr registry check` will miss what was not fetched");
        }
    }

    /// Notes now and then what was used of what upstreams have, and takes out what is too much.
    async fn keep_cache(self) {
        self.note_cached().await;
        if self.app.cache.is_none() {
            return;
        }
        loop {
            let registry = self.clone();
            let kept = tokio::task::spawn_blocking(move || {
                registry.app.cache.iter().for_each(|sources| sources.keep_uses());
            });
            // Should it panic, there is the next time.
            let _ = kept.await;
            let sources = self.app.cache.iter().flat_map(|sources| sources.all());
            sources.for_each(|source| source.evict_if_full());
            sleep(USES_INTERVAL).await;
        }
    }

    async fn finish(self, limit: Duration) -> Result<()> {
        if let Some(sources) = &self.app.cache {
            sources.close().await;
        }
        let all = u32::try_from(self.uploads_max).unwrap_or(u32::MAX);
        if timeout(limit, self.app.uploads.acquire_many(all)).await.is_err() {
            tracing::warn!(
                "uploads were still being put away at the end; they go on from their last saved state"
            );
        }
        let app = Arc::clone(&self.app);
        let kept = tokio::task::spawn_blocking(move || {
            app.cache.iter().for_each(|sources| sources.keep_uses());
            app.store.close();
            if let Some(events) = &app.events {
                events.flush(FLUSH_TIMEOUT);
            }
        });
        kept.await.map_err(|error| Error::Finish { source: Box::new(error) })
    }
}
