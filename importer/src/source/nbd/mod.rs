//! An export of an NBD server: read at random by several threads, or as a stream; connected again when a connection is lost.

mod connection;
pub mod server;
mod tls;
mod wire;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use dvcr_converter::io::{Extent, ExtentKind, ReadAt};
use dvcr_converter::progress::Progress;
use dvcr_image::{is_certificate_refused, is_identity_refused};
use futures_util::{StreamExt, TryStreamExt, stream};
use percent_encoding::percent_decode_str;
use reqwest::Url;
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio::runtime::Handle;
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;

use super::policy::SourcePolicy;
use super::{Opened, Pieces, Place, Pump, SourceOptions, changed};
use crate::import::cancelled;
use crate::{Error, ErrorKind, Result};
use connection::{Connection, Export, Failure, Run, Stream};
use tls::Tls;

/// The port that IANA gave to NBD.
const PORT: u16 = 10809;
/// Longest name of an export (protocol, "Values"), bytes.
const NAME_BYTES_MAX: usize = 4096;
const CONNECT_TIMEOUT_MS: u64 = 15_000;
/// Attempts in a row, with no request of the export answered meanwhile, before one is given up.
const ATTEMPTS_MAX: u32 = 6;
/// Wait before the second attempt; it doubles from one to the next.
const BACKOFF_FIRST_MS: u64 = 250;
/// Longest request, bytes; a server may allow less.
const REQUEST_BYTES_MAX: u32 = 2 << 20;
/// Requests in flight for one reader: what a stream reads ahead, and the parts of one long read.
const IN_FLIGHT_MAX: usize = 4;
/// Pieces of a stream that may wait for their reader.
const PIECES_WAITING_MAX: usize = 2;
/// How far ahead zeros are asked for at once, bytes.
const STATUS_BYTES: u64 = 1 << 30;

static ZEROS: [u8; REQUEST_BYTES_MAX as usize] = [0; REQUEST_BYTES_MAX as usize];

/// Where an export is: `nbd://host[:port]/export`, `nbd+unix:///export?socket=/path`, or `nbds` in place of `nbd` for TLS
/// (the NBD project's doc/uri.md).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    server: Server,
    tls: bool,
    /// The default export if empty.
    export: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Server {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            let text = format!(
                "the address of an NBD export {why}; write nbd://host[:port]/export or \
                 nbd+unix:///export?socket=/path"
            );
            Error::new(ErrorKind::Invalid, text)
        };
        let url = Url::parse(text).map_err(|_| bad("is no URL"))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(bad("has a user"));
        }
        let decoded = |text: &str| percent_decode_str(text).decode_utf8().map(|text| text.into_owned());
        let export = decoded(url.path().strip_prefix('/').unwrap_or(url.path()));
        let export = export.map_err(|_| bad("is not UTF-8"))?;
        if export.len() > NAME_BYTES_MAX {
            return Err(bad(&format!("names an export of more than {NAME_BYTES_MAX} bytes")));
        }
        let host = url.host_str().filter(|host| !host.is_empty());
        let socket = url.query_pairs().find(|(key, _)| key == "socket").map(|(_, path)| path.into_owned());
        let (tls, server) = match (url.scheme(), host, socket) {
            (scheme @ ("nbd" | "nbds"), Some(host), None) => {
                let host = decoded(host).map_err(|_| bad("is not UTF-8"))?;
                let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
                (scheme == "nbds", Server::Tcp { host, port: url.port().unwrap_or(PORT) })
            }
            (scheme @ ("nbd+unix" | "nbds+unix"), None, Some(socket)) => {
                (scheme == "nbds+unix", Server::Unix(socket.into()))
            }
            ("nbd" | "nbds", None, _) => return Err(bad("has no host")),
            ("nbd+unix" | "nbds+unix", _, _) => return Err(bad("names no socket, or a host")),
            ("nbd" | "nbds", _, Some(_)) => return Err(bad("names a host and a socket")),
            _ => return Err(bad("has another scheme")),
        };
        Ok(Self { server, tls, export })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secure = if self.tls { "s" } else { "" };
        match &self.server {
            Server::Tcp { host, port } if host.contains(':') => {
                write!(f, "nbd{secure}://[{host}]:{port}/{}", self.export)
            }
            Server::Tcp { host, port } => write!(f, "nbd{secure}://{host}:{port}/{}", self.export),
            Server::Unix(path) => write!(f, "nbd{secure}+unix:///{}?socket={}", self.export, path.display()),
        }
    }
}

impl Address {
    /// Whether TLS is to be spoken.
    pub(crate) fn tls(&self) -> bool {
        self.tls
    }

    /// The scheme of its URL.
    pub(super) fn scheme(&self) -> &'static str {
        match (&self.server, self.tls) {
            (Server::Tcp { .. }, false) => "nbd",
            (Server::Tcp { .. }, true) => "nbds",
            (Server::Unix(_), false) => "nbd+unix",
            (Server::Unix(_), true) => "nbds+unix",
        }
    }

    /// Whether TLS is spoken.
    pub(super) fn is_secure(&self) -> bool {
        self.tls
    }

    /// The server's host, unless it is behind a socket of this machine.
    pub(super) fn host(&self) -> Option<&str> {
        match &self.server {
            Server::Tcp { host, .. } => Some(host),
            Server::Unix(_) => None,
        }
    }

    /// Connects to the server, at an address that the policy allows.
    async fn dial(&self, policy: Option<&SourcePolicy>) -> io::Result<Box<dyn Stream>> {
        let (host, port) = match &self.server {
            Server::Tcp { host, port } => (host.as_str(), *port),
            Server::Unix(path) => return Ok(Box::new(UnixStream::connect(path).await?)),
        };
        let mut failure = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
        for address in lookup_host((host, port)).await? {
            if let Some(Err(why)) = policy.map(|policy| policy.admit_address(address.ip())) {
                failure = io::Error::new(io::ErrorKind::PermissionDenied, why);
                continue;
            }
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(Box::new(stream));
                }
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }
}

/// An export that can be read.
#[derive(Clone)]
pub(crate) struct Nbd {
    shared: Arc<Shared>,
    runtime: Handle,
    /// Of the work that the export is read for: when that is cancelled, no answer is waited for any more.
    progress: Option<Arc<Progress>>,
}

struct Shared {
    address: Address,
    tls: Option<Tls>,
    policy: Option<Arc<SourcePolicy>>,
    export: Export,
    /// `None` after a loss, until the next request.
    connection: Mutex<Option<Arc<Connection>>>,
    zeros: Mutex<Zeros>,
    /// Requests that were answered.
    answers: AtomicU64,
}

/// What the server told last about zeros.
#[derive(Default)]
struct Zeros {
    start: u64,
    runs: Vec<Run>,
    /// It tells nothing after all.
    is_silent: bool,
}

/// Opens an export. It cannot be gone on with later, as nothing tells whether it is still the same.
pub(super) async fn open(address: &Address, options: &SourceOptions, at: Option<&Place>) -> Result<Opened> {
    let shown = address.to_string();
    if at.is_some() {
        return Err(changed(&shown));
    }
    let random = open_random(address, options).await?;
    let name = Some(address.export.clone()).filter(|name| !name.is_empty());
    let (sender, pieces) = mpsc::channel(PIECES_WAITING_MAX);
    let pump = tokio::spawn(random.shared.clone().stream(sender));
    Ok(Opened {
        reader: Box::new(Pieces::of_task(pieces)),
        len: Some(random.len()),
        random: Some(Arc::new(random)),
        validator: None,
        name,
        stamp: None,
        if_page: None,
        shown,
        pump: Some(Pump(pump.abort_handle())),
    })
}

/// Opens an export to be read at random, from threads outside of the runtime.
pub(crate) async fn open_random(address: &Address, options: &SourceOptions) -> Result<Nbd> {
    let shown = address.to_string();
    let failed = |e: io::Error| {
        let kind = match e.kind() {
            io::ErrorKind::PermissionDenied => ErrorKind::Policy,
            _ => ErrorKind::Source,
        };
        failure(kind, format!("cannot read {shown}"), e)
    };
    let tls = |host: &str| Tls::new(host, options).map_err(failed);
    let tls = match (&address.server, address.tls) {
        (_, false) => None,
        (Server::Tcp { host, .. }, true) => Some(tls(host)?),
        (Server::Unix(_), true) => Some(tls("localhost")?),
    };
    let mut attempt = 1;
    let connection = loop {
        match connect(address, tls.as_ref(), options.policy.as_deref()).await {
            Ok(connection) => break connection,
            Err(error) if is_certificate_refused(&error) => {
                let text = format!(
                    "the certificate of {shown} is not accepted; --source-ca names whom to trust, --insecure-source accepts any"
                );
                return Err(Error::with(ErrorKind::Source, text, error));
            }
            Err(error) if is_identity_refused(&error) => {
                let text = format!(
                    "{shown} wants a certificate of its client that it trusts; --source-cert and --source-key name one"
                );
                return Err(Error::with(ErrorKind::Source, text, error));
            }
            Err(error) if is_passing(&error) && attempt < ATTEMPTS_MAX => back_off(attempt, &error).await,
            Err(error) => return Err(failed(error)),
        }
        attempt += 1;
    };
    let export = connection.export;
    let shared = Arc::new(Shared {
        address: address.clone(),
        tls,
        policy: options.policy.clone(),
        export,
        connection: Mutex::new(Some(Arc::new(connection))),
        zeros: Mutex::new(Zeros { is_silent: !export.tells_zeros, ..Zeros::default() }),
        answers: AtomicU64::new(0),
    });
    Ok(Nbd { shared, runtime: Handle::current(), progress: None })
}

async fn connect(
    address: &Address,
    tls: Option<&Tls>,
    policy: Option<&SourcePolicy>,
) -> io::Result<Connection> {
    let limit = Duration::from_millis(CONNECT_TIMEOUT_MS);
    let stream = timeout(limit, address.dial(policy))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    Connection::open(stream, tls, &address.export).await
}

/// The error of an export that could not be reached, or read.
fn failure(kind: ErrorKind, context: String, error: io::Error) -> Error {
    let passes = is_passing(&error);
    let error = Error::with(kind, context, error);
    if passes { error.passing() } else { error }
}

/// Whether another attempt may do better: not where the server said what is wrong.
fn is_passing(error: &io::Error) -> bool {
    // A policy does not change its mind, nor does a socket that is not ours to open.
    use io::ErrorKind::{InvalidData, InvalidInput, PermissionDenied};
    !matches!(error.kind(), InvalidData | InvalidInput | PermissionDenied)
        && !is_certificate_refused(error)
        && !is_identity_refused(error)
}

async fn back_off(attempt: u32, error: &io::Error) {
    let wait = Duration::from_millis(BACKOFF_FIRST_MS << attempt.saturating_sub(1).min(5));
    tracing::warn!(attempt, wait_ms = wait.as_millis() as u64, %error, "source: trying again");
    tokio::time::sleep(wait).await;
}

impl Shared {
    /// The export from front to back, piece by piece, some read ahead.
    async fn stream(self: Arc<Self>, sender: mpsc::Sender<Result<Option<Bytes>>>) {
        let size = self.export.size;
        let starts = (0..size).step_by(REQUEST_BYTES_MAX as usize);
        // Each in a task of its own: they hold locks, and go on while the reader lets this one wait.
        let pieces = starts.map(|start| {
            let shared = self.clone();
            tokio::spawn(
                async move { shared.piece(start, u64::from(REQUEST_BYTES_MAX).min(size - start)).await },
            )
        });
        let mut pieces = std::pin::pin!(stream::iter(pieces).buffered(IN_FLIGHT_MAX));
        while let Some(piece) = pieces.next().await {
            let piece = piece.unwrap_or_else(|e| Err(io::Error::other(e)));
            let failed = piece.is_err();
            let piece = piece.map(Some).map_err(|e| self.unreadable(e));
            // A reader that went away wants no more.
            if sender.send(piece).await.is_err() || failed {
                return;
            }
        }
        let _ = sender.send(Ok(None)).await;
    }

    /// A piece of a stream; zeros that the server knows of are not read.
    async fn piece(&self, start: u64, len: u64) -> io::Result<Bytes> {
        match self.run_at(start).await {
            Some(run) if run.is_zero && run.len >= len => Ok(Bytes::from_static(&ZEROS[..len as usize])),
            _ => {
                let mut bytes = vec![0; len as usize];
                self.read(&mut bytes, start).await?;
                Ok(bytes.into())
            }
        }
    }

    /// Fills `buf` from `offset`, by requests as the server wants them.
    async fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.export.size);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let block = u64::from(self.export.block_bytes);
        let step = u64::from(self.export.request_bytes_max.min(REQUEST_BYTES_MAX)) / block * block;
        let first = offset / block * block;
        let last = end.next_multiple_of(block).min(self.export.size);
        let parts = (first..last).step_by(step as usize).map(|start| async move {
            let len = step.min(last - start) as u32;
            let bytes = self.asked(|connection| async move { connection.read(start, len).await }).await?;
            Ok::<_, io::Error>((start, bytes))
        });
        let mut parts = std::pin::pin!(stream::iter(parts).buffered(IN_FLIGHT_MAX));
        while let Some((start, bytes)) = parts.try_next().await? {
            // Blocks of the server reach beyond what is wanted.
            let (from, to) = (start.max(offset), (start + bytes.len() as u64).min(end));
            let wanted = &bytes[(from - start) as usize..(to - start) as usize];
            buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(wanted);
        }
        Ok(())
    }

    /// The run at `offset`, as far as the server tells.
    async fn run_at(&self, offset: u64) -> Option<Run> {
        let mut zeros = self.zeros.lock().await;
        if zeros.is_silent || offset >= self.export.size {
            return None;
        }
        if let Some(run) = zeros.find(offset) {
            return Some(run);
        }
        let block = u64::from(self.export.block_bytes);
        let start = offset / block * block;
        let len = STATUS_BYTES.min(self.export.size - start) as u32;
        let told = self.asked(|connection| async move { connection.status(start, len).await }).await;
        match told {
            Ok(runs) => (zeros.start, zeros.runs) = (start, runs),
            // What is wrong with the connection shows when data are read.
            Err(error) => {
                tracing::debug!(%error, "the server does not tell where zeros are");
                zeros.is_silent = true;
            }
        }
        let run = zeros.find(offset)?;
        Some(Run { len: run.len.min(self.export.size - offset), ..run })
    }

    /// Asks until there is an answer, over another connection when one is lost.
    async fn asked<T, F>(&self, ask: impl Fn(Arc<Connection>) -> F) -> io::Result<T>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let (mut attempt, mut answers) = (0, self.answers.load(Ordering::Relaxed));
        loop {
            let error = match self.connection().await {
                Ok(connection) => match ask(connection.clone()).await {
                    Ok(answer) => {
                        self.answers.fetch_add(1, Ordering::Relaxed);
                        return Ok(answer);
                    }
                    Err(Failure::Refused(error)) => return Err(error),
                    Err(Failure::Lost(error)) => {
                        self.give_up(&connection).await;
                        if !is_passing(&error) {
                            return Err(error);
                        }
                        error
                    }
                },
                Err(error) if !is_passing(&error) => return Err(error),
                Err(error) => error,
            };
            // As long as others get on, this request was unlucky.
            let answered = self.answers.load(Ordering::Relaxed);
            attempt = if answered > answers { 1 } else { attempt + 1 };
            answers = answered;
            if attempt >= ATTEMPTS_MAX {
                return Err(error);
            }
            back_off(attempt, &error).await;
        }
    }

    async fn connection(&self) -> io::Result<Arc<Connection>> {
        let mut current = self.connection.lock().await;
        if let Some(connection) = &*current {
            return Ok(connection.clone());
        }
        let connection = connect(&self.address, self.tls.as_ref(), self.policy.as_deref()).await?;
        if connection.export.size != self.export.size {
            let text = format!(
                "the export has {} bytes now, it had {}: it was changed, start again",
                connection.export.size, self.export.size
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(current.insert(Arc::new(connection)).clone())
    }

    async fn give_up(&self, lost: &Arc<Connection>) {
        let mut current = self.connection.lock().await;
        // Somebody else may have made another one already.
        if current.as_ref().is_some_and(|connection| Arc::ptr_eq(connection, lost)) {
            *current = None;
        }
    }

    fn unreadable(&self, error: io::Error) -> Error {
        failure(ErrorKind::Source, format!("reading {}", self.address), error)
    }
}

impl Zeros {
    /// The rest of the run that `offset` lies in, with what follows of its kind.
    fn find(&self, offset: u64) -> Option<Run> {
        let mut start = self.start;
        let mut found: Option<Run> = None;
        for run in &self.runs {
            let end = start.saturating_add(run.len);
            match &mut found {
                None if (start..end).contains(&offset) => {
                    found = Some(Run { len: end - offset, is_zero: run.is_zero });
                }
                Some(before) if before.is_zero == run.is_zero => {
                    before.len = before.len.saturating_add(run.len)
                }
                Some(_) => break,
                None => {}
            }
            start = end;
        }
        found
    }
}

impl Nbd {
    /// Makes reads fail when `progress` is cancelled, even while the server is silent.
    pub(crate) fn until_cancelled(self, progress: Arc<Progress>) -> Self {
        Self { progress: Some(progress), ..self }
    }

    /// Waits, on a thread outside of the runtime; `None` if the work was cancelled.
    fn wait<T>(&self, answer: impl Future<Output = T>) -> Option<T> {
        self.runtime.block_on(async {
            let Some(progress) = &self.progress else { return Some(answer.await) };
            tokio::select! {
                biased;
                answer = answer => Some(answer),
                _ = cancelled(progress) => None,
            }
        })
    }
}

impl ReadAt for Nbd {
    fn len(&self) -> u64 {
        self.shared.export.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let read = self.wait(self.shared.read(buf, offset));
        let read = read.ok_or_else(|| io::Error::other("the work was cancelled"))?;
        read.map_err(|e| self.shared.unreadable(e).into())
    }

    fn extent_at(&self, offset: u64) -> Option<Extent> {
        let run = self.wait(self.shared.run_at(offset))??;
        let kind = if run.is_zero { ExtentKind::Hole } else { ExtentKind::Data };
        Some(Extent { start: offset, len: run.len, kind, host: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_what_the_uri_specification_says() {
        let tcp = |host: &str, port, tls, export: &str| Address {
            server: Server::Tcp { host: host.into(), port },
            tls,
            export: export.into(),
        };
        let unix = |path: &str, tls, export: &str| Address {
            server: Server::Unix(path.into()),
            tls,
            export: export.into(),
        };
        for (text, address) in [
            ("nbd://h.example", tcp("h.example", PORT, false, "")),
            ("nbd://h.example/", tcp("h.example", PORT, false, "")),
            ("nbd://h.example:1234/a%20b/c", tcp("h.example", 1234, false, "a b/c")),
            ("nbds://[::1]:10/x", tcp("::1", 10, true, "x")),
            ("nbd+unix:///x?socket=/run/nbd.sock", unix("/run/nbd.sock", false, "x")),
            ("nbds+unix:///?socket=/run/a%20b", unix("/run/a b", true, "")),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), address, "{text}");
        }
        assert_eq!(tcp("::1", 10, true, "x").to_string(), "nbds://[::1]:10/x");
        for bad in [
            "nbd://user:s3cret@h/x",
            "nbd:///x",
            "nbd+unix:///x",
            "nbd+unix://h/x?socket=/s",
            "nbd://h/x?socket=/s",
            "nbd://h/%ff",
            "http://h/x",
            "nbd",
        ] {
            let error = bad.parse::<Address>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}");
            assert!(!error.to_string().contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn runs_of_one_kind_are_one_run() {
        let run = |len, is_zero| Run { len, is_zero };
        let runs = vec![run(10, true), run(5, true), run(7, false), run(1, true)];
        let zeros = Zeros { start: 100, runs, is_silent: false };
        assert_eq!(zeros.find(100), Some(run(15, true)));
        assert_eq!(zeros.find(112), Some(run(3, true)));
        assert_eq!(zeros.find(115), Some(run(7, false)));
        assert_eq!(zeros.find(122), Some(run(1, true)));
        for outside in [0, 99, 123, u64::MAX] {
            assert_eq!(zeros.find(outside), None);
        }
    }
}
