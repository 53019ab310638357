//! A static file server over HTTP that counts what it sends and can stop in the middle.

use anyhow::{Context, Result, anyhow};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, Method, Response, StatusCode, header};
use bytes::Bytes;
use futures_util::stream;
use std::io::{Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};
use tokio::sync::{Notify, oneshot};

const SEND_BLOCK_BYTES: u64 = 64 << 10;
/// How long [`FileServer::wait_held`] waits for a client to come that far.
const HELD_TIMEOUT: Duration = Duration::from_secs(60);

/// Serves the files of a directory with ranges and entity tags on a free port of 127.0.0.1.
///
/// [`FileServer::hold_after`] makes "in the middle of a transfer" an exact place: the server sends that many bytes of
/// bodies in all and then nothing more until [`FileServer::release`].
#[derive(Debug)]
pub struct FileServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl FileServer {
    pub fn start(root: &Path) -> Result<Self> {
        let shared = Arc::new(Shared {
            root: root.canonicalize().with_context(|| format!("cannot serve {}", root.display()))?,
            state: Mutex::new(Counters { limit: u64::MAX, ranges: true, ..Counters::default() }),
            released: Notify::new(),
        });
        let listener = std::net::TcpListener::bind("127.0.0.1:0").context("no free port on 127.0.0.1")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let app = Router::new().route("/{*path}", axum::routing::get(serve)).with_state(Arc::clone(&shared));
        let (stop, stopped) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("file-server".into()).spawn(move || {
            runtime.block_on(async move {
                let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
                // Not graceful: an open transfer must not keep a finished test waiting.
                tokio::select! {
                    _ = axum::serve(listener, app) => {}
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self { address, shared, stop: Some(stop), thread: Some(thread) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the URL of a file below the root.
    pub fn url(&self, name: &str) -> String {
        format!("http://{}/{name}", self.address)
    }

    /// Returns how many requests were answered.
    pub fn requests(&self) -> u64 {
        self.shared.state.lock().unwrap().requests
    }

    /// Returns how many bytes of bodies were sent.
    pub fn bytes_sent(&self) -> u64 {
        self.shared.state.lock().unwrap().sent
    }

    /// Says whether ranges are honoured from now on; without them every answer is the whole file.
    pub fn set_ranges(&self, ranges: bool) {
        self.shared.state.lock().unwrap().ranges = ranges;
    }

    /// Sends `bytes` more bytes of bodies and then stops until [`FileServer::release`].
    pub fn hold_after(&self, bytes: u64) {
        let mut state = self.shared.state.lock().unwrap();
        state.limit = state.sent.saturating_add(bytes);
    }

    /// Waits until a client has got all that [`FileServer::hold_after`] lets through and wants more.
    pub fn wait_held(&self) -> Result<()> {
        crate::wait_until(HELD_TIMEOUT, "a client that the file server holds", || {
            self.shared.state.lock().unwrap().held > 0
        })
        .map_err(|error| anyhow!("{error}; {} bytes were sent", self.bytes_sent()))
    }

    /// Lets all transfers go on without limit.
    pub fn release(&self) {
        self.shared.state.lock().unwrap().limit = u64::MAX;
        self.shared.released.notify_waiters();
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    state: Mutex<Counters>,
    released: Notify,
}

#[derive(Debug, Default)]
struct Counters {
    requests: u64,
    sent: u64,
    limit: u64,
    /// How many transfers wait for [`FileServer::release`].
    held: u64,
    ranges: bool,
}

impl Shared {
    /// Takes leave to send up to `wanted` bytes, waiting while the limit is reached.
    async fn grant(&self, wanted: u64) -> u64 {
        let mut waiting = None;
        loop {
            let released = self.released.notified();
            tokio::pin!(released);
            // Registered before the limit is read, so that a release in between is not lost.
            released.as_mut().enable();
            {
                let mut state = self.state.lock().unwrap();
                let granted = wanted.min(state.limit.saturating_sub(state.sent));
                if granted > 0 {
                    state.sent += granted;
                    return granted;
                }
            }
            waiting.get_or_insert_with(|| Waiting::new(self));
            released.await;
        }
    }
}

/// Counts a held transfer for as long as it is held, also when its client goes away.
struct Waiting<'a>(&'a Shared);

impl<'a> Waiting<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.state.lock().unwrap().held += 1;
        Self(shared)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().held -= 1;
    }
}

async fn serve(
    State(shared): State<Arc<Shared>>,
    UrlPath(path): UrlPath<String>,
    method: Method,
    headers: HeaderMap,
) -> Response<Body> {
    let ranges = {
        let mut state = shared.state.lock().unwrap();
        state.requests += 1;
        state.ranges
    };
    match answer(&shared, &path, &method, &headers, ranges) {
        Ok(response) => response,
        Err(error) => text(StatusCode::NOT_FOUND, &format!("{error:#}")),
    }
}

fn answer(
    shared: &Arc<Shared>,
    path: &str,
    method: &Method,
    headers: &HeaderMap,
    ranges: bool,
) -> Result<Response<Body>> {
    let relative = Path::new(path);
    if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
        return Ok(text(StatusCode::BAD_REQUEST, "only plain paths are served"));
    }
    let mut file =
        std::fs::File::open(shared.root.join(relative)).with_context(|| format!("no file {path}"))?;
    let metadata = file.metadata()?;
    let size = metadata.len();
    let changed = metadata.modified()?.duration_since(UNIX_EPOCH)?.as_nanos();
    let tag = format!("\"{size:x}-{changed:x}\"");

    let value = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let unchanged = value(header::IF_RANGE).is_none_or(|wanted| wanted == tag);
    let range = value(header::RANGE).filter(|_| ranges && unchanged);
    let builder = Response::builder()
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::ETAG, &tag)
        .header(header::ACCEPT_RANGES, if ranges { "bytes" } else { "none" });
    let (builder, start, length) = match range.map(|range| parse_range(range, size)) {
        None => (builder.status(StatusCode::OK), 0, size),
        Some(Some((start, length))) => {
            let last = start + length - 1;
            let builder = builder.header(header::CONTENT_RANGE, format!("bytes {start}-{last}/{size}"));
            (builder.status(StatusCode::PARTIAL_CONTENT), start, length)
        }
        Some(None) => {
            let builder = builder.header(header::CONTENT_RANGE, format!("bytes */{size}"));
            return Ok(builder.status(StatusCode::RANGE_NOT_SATISFIABLE).body(Body::empty())?);
        }
    };
    let builder = builder.header(header::CONTENT_LENGTH, length);
    if method == Method::HEAD {
        return Ok(builder.body(Body::empty())?);
    }
    file.seek(SeekFrom::Start(start))?;
    let body =
        stream::try_unfold((Arc::clone(shared), file, length), |(shared, mut file, left)| async move {
            if left == 0 {
                return Ok::<_, std::io::Error>(None);
            }
            let granted = shared.grant(left.min(SEND_BLOCK_BYTES)).await;
            let mut block = vec![0; usize::try_from(granted).map_err(std::io::Error::other)?];
            file.read_exact(&mut block)?;
            Ok(Some((Bytes::from(block), (shared, file, left - granted))))
        });
    Ok(builder.body(Body::from_stream(body))?)
}

/// Reads a single byte range (RFC 9110, 14.1.2) as start and length; `None` is one that the file cannot satisfy.
fn parse_range(range: &str, size: u64) -> Option<(u64, u64)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let (start, end) = match (first, last) {
        ("", suffix) => (size.saturating_sub(suffix.parse().ok()?), size),
        (first, "") => (first.parse().ok()?, size),
        (first, last) => (first.parse().ok()?, last.parse::<u64>().ok()?.saturating_add(1).min(size)),
    };
    (start < end).then(|| (start, end - start))
}

fn text(status: StatusCode, message: &str) -> Response<Body> {
    let mut response = Response::new(Body::from(message.to_owned()));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Daemon, cmd, run, temp_dir};

    #[test]
    fn ranges_are_those_of_the_file() {
        let dir = temp_dir();
        std::fs::write(dir.path().join("digits"), "0123456789").unwrap();
        let server = FileServer::start(dir.path()).unwrap();
        let get = |range: &str| run(&cmd("curl", ["-sS", "-f", "-r", range, &server.url("digits")])).unwrap();
        assert_eq!(get("2-4"), "234");
        assert_eq!(get("7-"), "789");
        assert_eq!(get("-3"), "789");
        assert!(run(&cmd("curl", ["-sS", "-f", "-r", "10-", &server.url("digits")])).is_err());
        assert_eq!((server.requests(), server.bytes_sent()), (4, 9));
        server.set_ranges(false);
        assert_eq!(get("2-4"), "0123456789");
    }

    #[test]
    fn a_held_transfer_ends_well_after_the_release() {
        let dir = temp_dir();
        let data = vec![7u8; 1 << 20];
        std::fs::write(dir.path().join("data"), &data).unwrap();
        let server = FileServer::start(dir.path()).unwrap();
        server.hold_after(300_000);
        let target = dir.path().join("copy");
        let mut curl =
            Daemon::spawn(&cmd("curl", ["-sS", "-f", "-o", target.to_str().unwrap(), &server.url("data")]))
                .unwrap();
        server.wait_held().unwrap();
        assert_eq!(server.bytes_sent(), 300_000);
        assert!(curl.is_running());
        server.release();
        assert!(curl.wait(Duration::from_secs(30)).unwrap().success());
        assert_eq!(std::fs::read(target).unwrap(), data);
    }
}
