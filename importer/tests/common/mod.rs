//! What the tests share: registries, disks, and an HTTP server that can be told to misbehave.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test helpers: a test fails by a panic, and not every test file uses all of them"
)]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dvcr_converter::limits::Limits;
use dvcr_converter::progress::Progress;
use dvcr_image::{ClientOptions, Repository};
use dvcr_importer::{
    Error, ImportRequest, ImportSummary, PopulateRequest, PopulateSummary, SourceOptions, TargetFormat,
    import, populate,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const START_TIMEOUT: Duration = Duration::from_secs(30);

pub const MIB: usize = 1 << 20;

/// A registry of one kind or the other, with its directory.
pub struct Registry {
    pub address: SocketAddr,
    pub dir: TempDir,
    child: Option<Child>,
}

impl Registry {
    /// Ours, inside the test.
    pub async fn ours() -> Self {
        Self::with(registry_config).await
    }

    /// Ours with settings for its directory.
    pub async fn with(config: impl FnOnce(&Path) -> dvcr_registry::Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let opened =
            tokio::task::spawn_blocking(move || dvcr_registry::Registry::open(config)).await.unwrap();
        let router = opened.unwrap().router();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, dir, child: None }
    }

    /// Debian's docker-registry, as a process.
    pub fn debian() -> Self {
        for _ in 0..5 {
            let dir = tempfile::tempdir().unwrap();
            // Somebody else may take the port first; then the registry ends, and another try is made.
            let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let config = dir.path().join("config.yml");
            let text = format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: \
                 true}}}}\nhttp: {{addr: '{address}'}}\n",
                dir.path().display()
            );
            std::fs::write(&config, text).unwrap();
            let mut command = Command::new(docker_registry());
            command
                .arg("serve")
                .arg(&config)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            let mut child = command.spawn().expect("docker-registry is there, see `make tools`");
            let deadline = Instant::now() + START_TIMEOUT;
            while Instant::now() < deadline && child.try_wait().unwrap().is_none() {
                if TcpStream::connect(address).is_ok() {
                    return Self { address, dir, child: Some(child) };
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("docker-registry does not start");
    }

    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    pub fn repository(&self, name: &str) -> Repository {
        Repository::open(&self.reference(name).parse().unwrap(), &ClientOptions::default()).unwrap()
    }

    /// Upload sessions that are still there for a repository.
    pub fn sessions(&self, name: &str) -> usize {
        let uploads = self.dir.path().join(format!("docker/registry/v2/repositories/{name}/_uploads"));
        std::fs::read_dir(uploads).map_or(0, Iterator::count)
    }

    /// Whether it is Debian's.
    pub fn is_debians(&self) -> bool {
        self.child.is_some()
    }

    /// How much of its uploads to a repository ours has put away.
    pub fn acknowledged(&self, name: &str) -> u64 {
        let uploads = self.dir.path().join(format!("docker/registry/v2/repositories/{name}/_uploads"));
        let sessions = std::fs::read_dir(uploads).into_iter().flatten().flatten();
        let states = sessions.flat_map(|session| std::fs::read_dir(session.path().join("hashstates/sha256")));
        let offsets = states.flatten().flatten().filter_map(|state| state.file_name().to_str()?.parse().ok());
        offsets.max().unwrap_or(0)
    }

    /// Blobs that a repository refers to as layers.
    pub fn layers(&self, name: &str) -> usize {
        let layers = self.dir.path().join(format!("docker/registry/v2/repositories/{name}/_layers/sha256"));
        let is_linked =
            |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().path().join("link").exists();
        std::fs::read_dir(layers).map_or(0, |entries| entries.map(is_linked).filter(|linked| *linked).count())
    }
}

/// Debian's registry, where `make tools` puts it, or as it is installed.
fn docker_registry() -> PathBuf {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/tools/bin/docker-registry");
    if unpacked.is_file() { unpacked } else { "docker-registry".into() }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub fn registry_config(dir: &Path) -> dvcr_registry::Config {
    dvcr_registry::Config::new(dir)
}

/// Passes connections on, and breaks each one that carried so many bytes, either way.
pub struct Relay {
    pub address: SocketAddr,
    passed: Arc<AtomicU64>,
    cuts: Arc<AtomicU32>,
}

impl Relay {
    pub async fn start(upstream: SocketAddr, cut_after: u64) -> Self {
        Self::with(cut_after, u32::MAX, move || tokio::net::TcpStream::connect(upstream)).await
    }

    /// Is gone for good once it broke a connection.
    pub async fn dying(upstream: SocketAddr, cut_after: u64) -> Self {
        Self::with(cut_after, 1, move || tokio::net::TcpStream::connect(upstream)).await
    }

    /// Passes on to a local socket.
    pub async fn to_socket(upstream: PathBuf, cut_after: u64) -> Self {
        Self::with(cut_after, u32::MAX, move || tokio::net::UnixStream::connect(upstream.clone())).await
    }

    async fn with<S, F>(cut_after: u64, cuts_max: u32, connect: impl Fn() -> F + Send + 'static) -> Self
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + 'static,
        F: Future<Output = std::io::Result<S>> + Send + 'static,
    {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (passed, cuts) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU32::new(0)));
        let counted = (passed.clone(), cuts.clone());
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                if counted.1.load(Ordering::Relaxed) >= cuts_max {
                    return;
                }
                let ((passed, cuts), far) = (counted.clone(), connect());
                tokio::spawn(async move {
                    let Ok(far) = far.await else { return };
                    let ((near_in, near_out), (far_in, far_out)) = (near.split(), tokio::io::split(far));
                    let is_gone = || cuts.load(Ordering::Relaxed) >= cuts_max;
                    let there = pipe(near_in, far_out, cut_after, &passed, is_gone);
                    let back = pipe(far_in, near_out, cut_after, &passed, is_gone);
                    let cut = tokio::select! { cut = there => cut, cut = back => cut };
                    cuts.fetch_add(u32::from(cut), Ordering::Relaxed);
                });
            }
        });
        Self { address, passed, cuts }
    }

    /// Bytes that went either way.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    pub fn cuts(&self) -> u32 {
        self.cuts.load(Ordering::Relaxed)
    }
}

/// Copies until one side ends, or `limit` bytes went by, which returns true.
async fn pipe(
    mut from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    limit: u64,
    passed: &AtomicU64,
    is_gone: impl Fn() -> bool,
) -> bool {
    let (mut buf, mut left) = (vec![0; 64 << 10], limit);
    while left > 0 {
        let room = buf.len().min(left as usize);
        let Ok(count @ 1..) = from.read(&mut buf[..room]).await else { return false };
        if is_gone() || to.write_all(&buf[..count]).await.is_err() {
            return false;
        }
        left -= count as u64;
        passed.fetch_add(count as u64, Ordering::Relaxed);
    }
    true
}

pub fn import_request(source: &str, destination: &str) -> ImportRequest {
    ImportRequest {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        checksums: Vec::new(),
        source_options: SourceOptions::default(),
        client: ClientOptions::default(),
        if_changed: false,
        keep_after: Duration::from_secs(60),
        limits: Limits::default(),
    }
}

pub async fn import_one(source: &str, destination: &str) -> Result<ImportSummary, Error> {
    import(import_request(source, destination), Arc::new(Progress::default())).await
}

pub fn populate_request(reference: &str, target: &Path) -> PopulateRequest {
    PopulateRequest {
        reference: reference.parse().unwrap(),
        target: target.to_owned(),
        size: None,
        size_max: None,
        workers: None,
        format: TargetFormat::Raw,
        mode: None,
        client: ClientOptions::default(),
        limits: Limits::default(),
    }
}

pub async fn populate_one(reference: &str, target: &Path) -> Result<PopulateSummary, Error> {
    populate(populate_request(reference, target), Arc::new(Progress::default())).await
}

/// The error with everything behind it, as a person would see it.
pub fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

/// Runs a program that must succeed.
pub fn run(program: &str, args: &[&str]) -> Vec<u8> {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

pub fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Bytes without a pattern that compression or a wrong offset could hide behind.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// A disk of 40 MiB with data, text and much nothing.
pub fn disk() -> Vec<u8> {
    let mut disk = vec![0; 40 * MIB];
    disk[MIB..3 * MIB].copy_from_slice(&noise(2 * MIB, 1));
    disk[9 * MIB + 700..21 * MIB].copy_from_slice(&noise(12 * MIB - 700, 2));
    let text = b"to be compressed ".repeat(60_000);
    disk[30 * MIB..30 * MIB + text.len()].copy_from_slice(&text);
    disk[40 * MIB - 512..].fill(7);
    disk
}

/// A directory with the disk as raw, and as other files on demand.
pub struct Files {
    pub dir: TempDir,
    pub raw: Vec<u8>,
}

impl Files {
    pub fn new() -> Self {
        let (dir, raw) = (tempfile::tempdir().unwrap(), disk());
        std::fs::write(dir.path().join("disk.raw"), &raw).unwrap();
        Self { dir, raw }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes `disk.qcow2` by qemu-img with the given options.
    pub fn qcow2(&self, options: &[&str]) -> PathBuf {
        let (from, to) = (self.path("disk.raw"), self.path("disk.qcow2"));
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
        args.extend(options);
        args.extend([path(&from), path(&to)]);
        run("qemu-img", &args);
        to
    }

    /// Compresses a file by the program that belongs to the extension.
    pub fn wrap(&self, file: &Path, extension: &str) -> PathBuf {
        let program = match extension {
            "gz" => "gzip",
            "xz" => "xz",
            "zst" => "zstd",
            "bz2" => "bzip2",
            _ => "lz4",
        };
        let wrapped = PathBuf::from(format!("{}.{extension}", path(file)));
        let mut args = vec!["-k", "-1", "-q", path(file)];
        // Without a name for its output, lz4 writes to a pipe.
        if program == "lz4" {
            args.push(path(&wrapped));
        }
        run(program, &args);
        wrapped
    }
}

/// How a body is served.
#[derive(Clone, Debug)]
pub struct Serving {
    pub body: Arc<Vec<u8>>,
    /// Send no length, but chunks.
    pub chunked: bool,
    /// Cut every connection after so many bytes of the body.
    pub cut_after: Option<usize>,
    /// Say that ranges are served, and serve them.
    pub ranges: bool,
    pub etag: &'static str,
    /// Another version is served to whoever asks for a range, whatever its If-Range says.
    pub etag_of_ranges: Option<&'static str>,
    /// Added to the true length.
    pub length_error: i64,
    /// A status line in place of the file, such as `404 Not Found`.
    pub status: Option<&'static str>,
    pub content_type: &'static str,
    /// After a whole body was announced, send nothing behind so many bytes of the file, whichever part of it was asked for.
    pub stall_after: Option<usize>,
}

impl Serving {
    pub fn new(body: Vec<u8>) -> Self {
        Self {
            body: Arc::new(body),
            chunked: false,
            cut_after: None,
            ranges: true,
            etag: "\"v1\"",
            etag_of_ranges: None,
            length_error: 0,
            status: None,
            content_type: "application/octet-stream",
            stall_after: None,
        }
    }
}

/// A server that answers every request by hand, so that it can break every rule; one request per connection.
pub struct Web {
    pub address: SocketAddr,
    pub requests: Arc<std::sync::Mutex<Vec<String>>>,
    serving: Arc<std::sync::Mutex<Serving>>,
    connections: Arc<AtomicU32>,
}

impl Web {
    pub async fn serve(serving: Serving) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(std::sync::Mutex::new(Vec::new()));
        let connections = Arc::new(AtomicU32::new(0));
        let serving = Arc::new(std::sync::Mutex::new(serving));
        let (seen, counted, served) = (requests.clone(), connections.clone(), serving.clone());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                let serving = served.lock().unwrap().clone();
                tokio::spawn(answer(socket, serving, seen.clone()));
            }
        });
        Self { address, requests, serving, connections }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }

    /// Serves this to whoever connects from now on.
    pub fn now(&self, serving: Serving) {
        *self.serving.lock().unwrap() = serving;
    }

    pub fn connections(&self) -> u32 {
        self.connections.load(Ordering::Relaxed)
    }
}

async fn answer(
    mut socket: tokio::net::TcpStream,
    serving: Serving,
    seen: Arc<std::sync::Mutex<Vec<String>>>,
) {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        match socket.read_u8().await {
            Ok(byte) => request.push(byte),
            Err(_) => return,
        }
    }
    let request = String::from_utf8(request).unwrap();
    seen.lock().unwrap().push(request.clone());
    let request = request.to_ascii_lowercase();
    if request.starts_with("get /loop") {
        let _ = socket
            .write_all(
                b"HTTP/1.1 302 Found\r\nlocation: /loop\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            )
            .await;
        return;
    }
    if let Some(status) = serving.status {
        let _ = socket
            .write_all(
                format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").as_bytes(),
            )
            .await;
        return;
    }
    let wanted =
        request.split_once("range: bytes=").map(|(_, rest)| rest.split('-').next().unwrap().to_owned());
    // If-Range with another version than this one asks for the whole.
    let same = serving.etag_of_ranges.is_some()
        || !request.contains("if-range:")
        || request.contains(&format!("if-range: {}", serving.etag));
    let start = wanted.filter(|_| serving.ranges && same).map(|start| start.parse::<usize>().unwrap());
    let all = serving.body.len();
    let rest = &serving.body[start.unwrap_or(0)..];
    let mut head = match start {
        None => "HTTP/1.1 200 OK\r\n".to_owned(),
        Some(start) => {
            format!("HTTP/1.1 206 Partial Content\r\ncontent-range: bytes {start}-{}/{all}\r\n", all - 1)
        }
    };
    if serving.ranges {
        let etag = serving.etag_of_ranges.filter(|_| start.is_some()).unwrap_or(serving.etag);
        head += &format!("accept-ranges: bytes\r\netag: {etag}\r\n");
    }
    head += &format!("content-type: {}\r\nconnection: close\r\n", serving.content_type);
    head += &match serving.chunked {
        true => "transfer-encoding: chunked\r\n\r\n".to_owned(),
        false => format!("content-length: {}\r\n\r\n", rest.len() as i64 + serving.length_error),
    };
    let stall_after = serving.stall_after.map(|bytes| bytes.saturating_sub(start.unwrap_or(0)));
    let limit = serving.cut_after.or(stall_after).unwrap_or(usize::MAX).min(rest.len());
    let _ = socket.write_all(head.as_bytes()).await;
    if serving.chunked {
        for part in rest[..limit].chunks(100_000) {
            let frame = [format!("{:x}\r\n", part.len()).as_bytes(), part, b"\r\n"].concat();
            if socket.write_all(&frame).await.is_err() {
                return;
            }
        }
        if limit == rest.len() {
            let _ = socket.write_all(b"0\r\n\r\n").await;
        }
    } else if socket.write_all(&rest[..limit]).await.is_err() {
        return;
    }
    if serving.stall_after.is_some() {
        // Until the other side gives up.
        let _ = socket.read_u8().await;
    }
    let _ = socket.shutdown().await;
}
