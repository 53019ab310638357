//! Registries side by side: every round starts each server on an empty folder and runs every row against it.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use sha2::{Digest, Sha256};

use crate::http::Connection;
use crate::table::{Against, Better, Table};

const CHUNK_BYTES: usize = 16 << 20;
const SMALL_BLOB_BYTES: usize = 4096;
const SMALL_BLOBS: usize = 1600;
const SMALL_CONNECTIONS: usize = 8;
/// Requests of a row that reads small things; the servers answer from memory.
const READ_REQUESTS: usize = 24_000;
const READ_CONNECTIONS: usize = 32;
/// The blobs of the image that rows about manifests use.
const CONFIG: &[u8] = b"{}";
const LAYER: &[u8] = b"layer";
const START_TIMEOUT_S: u64 = 20;

/// Runs all rows on all servers that are there and prints the table.
pub fn run(
    dvcr: &Path,
    distribution: &Path,
    debian: &Path,
    dir: &Path,
    rounds: usize,
    blob_bytes: usize,
) -> anyhow::Result<()> {
    ensure!(dvcr.exists(), "{} is not there: cargo build --release", dvcr.display());
    let servers: Vec<(&str, &Path)> =
        [("dvcr", dvcr), ("distribution v3", distribution), ("docker-registry 2.8", debian)]
            .into_iter()
            .filter(|(_, program)| program.exists())
            .collect();
    let mut blob = noise(blob_bytes);
    let mut table = Table::default();
    for round in 0..rounds {
        stamp(&mut blob, round);
        let digest = digest(&blob);
        for (name, program) in &servers {
            eprintln!("round {} of {rounds}: {name}", round + 1);
            let fresh = Fresh::start(name, program, dir)?;
            measure(&fresh.server, &blob, &digest, READ_REQUESTS, &mut |row, better, value| {
                table.add(row, better, name, value)
            })
            .with_context(|| format!("measuring {name}"))?;
        }
    }
    table.print(Against::Best);
    Ok(())
}

/// Runs all rows against a server that has nothing yet.
pub(crate) fn measure(
    server: &Server,
    blob: &[u8],
    digest: &str,
    read_requests: usize,
    add: &mut dyn FnMut(&str, Better, f64),
) -> anyhow::Result<()> {
    let mib = blob.len() as f64 / (1 << 20) as f64;
    let gib = mib / 1024.0;
    let mut connection = Connection::open(server.addr)?;
    add("RSS idle, MiB", Better::Lower, server.rss_mib("VmRSS")?);

    let cpu = server.cpu_seconds()?;
    let begun = Instant::now();
    push(&mut connection, "push", digest, blob)?;
    let pushed = begun.elapsed();
    add("push 1 blob, MiB/s", Better::Higher, mib / pushed.as_secs_f64());
    add("server CPU per GiB pushed, s", Better::Lower, (server.cpu_seconds()? - cpu) / gib);

    let begun = Instant::now();
    pull(&mut connection, "push", digest, blob.len())?;
    let pulled = begun.elapsed();
    add("first pull after the push, MiB/s", Better::Higher, mib / pulled.as_secs_f64());
    add("push and first pull together, s", Better::Lower, (pushed + pulled).as_secs_f64());
    let begun = Instant::now();
    pull(&mut connection, "push", digest, blob.len())?;
    add("pull again, MiB/s", Better::Higher, mib / begun.elapsed().as_secs_f64());

    let begun = Instant::now();
    push_chunks(&mut connection, "chunks", digest, blob)?;
    add("push in 16 MiB chunks, MiB/s", Better::Higher, mib / begun.elapsed().as_secs_f64());

    let begun = Instant::now();
    in_parallel(4, |_| pull(&mut Connection::open(server.addr)?, "push", digest, blob.len()))?;
    add("4 pulls, total MiB/s", Better::Higher, 4.0 * mib / begun.elapsed().as_secs_f64());

    push_manifest(&mut connection, "small", "v1")?;
    let accept = "Accept: application/vnd.oci.image.manifest.v1+json\r\n";
    let (rate, p99) = requests(server.addr, "GET", "/v2/small/manifests/v1", accept, read_requests)?;
    add("manifest GET by tag, requests/s", Better::Higher, rate);
    add("manifest GET by tag, p99 ms", Better::Lower, p99);
    let (rate, p99) = requests(server.addr, "HEAD", &format!("/v2/push/blobs/{digest}"), "", read_requests)?;
    add("blob HEAD, requests/s", Better::Higher, rate);
    add("blob HEAD, p99 ms", Better::Lower, p99);

    let (rate, p99) = push_small(server.addr, 0, |_| "small".to_owned())?;
    add("4 KiB blobs, blobs/s", Better::Higher, rate);
    add("4 KiB blobs, p99 ms", Better::Lower, p99);
    add("RSS peak, MiB", Better::Lower, server.rss_mib("VmHWM")?);
    Ok(())
}

/// Pushes small blobs; returns how many per second over all connections, and the 99th percentile in milliseconds.
/// They are others for each `salt`.
pub(crate) fn push_small(
    addr: SocketAddr,
    salt: usize,
    repo: impl Fn(usize) -> String + Sync,
) -> anyhow::Result<(f64, f64)> {
    let begun = Instant::now();
    let times = in_parallel(SMALL_CONNECTIONS, |worker| {
        let mut connection = Connection::open(addr)?;
        let mut small = noise(SMALL_BLOB_BYTES);
        let mut times = Vec::new();
        for i in 0..SMALL_BLOBS / SMALL_CONNECTIONS {
            let number = 1 + (salt * SMALL_CONNECTIONS + worker) * SMALL_BLOBS + i;
            stamp(&mut small, number);
            let digest = digest(&small);
            let begun = Instant::now();
            push(&mut connection, &repo(number), &digest, &small)?;
            times.push(begun.elapsed());
        }
        Ok(times)
    })?;
    Ok((SMALL_BLOBS as f64 / begun.elapsed().as_secs_f64(), p99_ms(times)))
}

pub(crate) fn push(connection: &mut Connection, repo: &str, digest: &str, blob: &[u8]) -> anyhow::Result<()> {
    let upload = start_upload(connection, repo)?;
    let headers = "Content-Type: application/octet-stream\r\n";
    connection.expect(201, "PUT", &with_digest(&upload, digest), headers, blob)?;
    Ok(())
}

fn push_chunks(connection: &mut Connection, repo: &str, digest: &str, blob: &[u8]) -> anyhow::Result<()> {
    let mut upload = start_upload(connection, repo)?;
    for (i, chunk) in blob.chunks(CHUNK_BYTES).enumerate() {
        let first = i * CHUNK_BYTES;
        let headers = format!(
            "Content-Type: application/octet-stream\r\nContent-Range: {first}-{}\r\n",
            first + chunk.len() - 1
        );
        let response = connection.expect(202, "PATCH", &upload, &headers, chunk)?;
        upload = response.location.context("a chunk's answer without Location")?;
    }
    connection.expect(201, "PUT", &with_digest(&upload, digest), "", &[])?;
    Ok(())
}

fn start_upload(connection: &mut Connection, repo: &str) -> anyhow::Result<String> {
    let response = connection.expect(202, "POST", &format!("/v2/{repo}/blobs/uploads/"), "", &[])?;
    response.location.context("an upload without Location")
}

fn with_digest(upload: &str, digest: &str) -> String {
    let separator = if upload.contains('?') { '&' } else { '?' };
    format!("{upload}{separator}digest={digest}")
}

fn pull(connection: &mut Connection, repo: &str, digest: &str, bytes: usize) -> anyhow::Result<()> {
    let response = connection.expect(200, "GET", &format!("/v2/{repo}/blobs/{digest}"), "", &[])?;
    ensure!(response.body_bytes == bytes as u64, "{} bytes instead of {bytes}", response.body_bytes);
    Ok(())
}

pub(crate) fn push_manifest(connection: &mut Connection, repo: &str, tag: &str) -> anyhow::Result<()> {
    for blob in [CONFIG, LAYER] {
        push(connection, repo, &digest(blob), blob)?;
    }
    put_manifest(connection, repo, tag)
}

/// Has a tag name the image whose blobs are there.
pub(crate) fn put_manifest(connection: &mut Connection, repo: &str, tag: &str) -> anyhow::Result<()> {
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":{}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{}","size":{}}}]}}"#,
        digest(CONFIG),
        CONFIG.len(),
        digest(LAYER),
        LAYER.len()
    );
    let headers = "Content-Type: application/vnd.oci.image.manifest.v1+json\r\n";
    connection.expect(201, "PUT", &format!("/v2/{repo}/manifests/{tag}"), headers, manifest.as_bytes())?;
    Ok(())
}

/// Requests per second over all connections, and the 99th percentile in milliseconds.
fn requests(
    addr: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    count: usize,
) -> anyhow::Result<(f64, f64)> {
    requests_of_many(addr, method, &[path.to_owned()], headers, count)
}

/// The same, for many paths in turn.
pub(crate) fn requests_of_many(
    addr: SocketAddr,
    method: &str,
    paths: &[String],
    headers: &str,
    requests: usize,
) -> anyhow::Result<(f64, f64)> {
    let begun = Instant::now();
    let times = in_parallel(READ_CONNECTIONS, |worker| {
        let mut connection = Connection::open(addr)?;
        let mut times = Vec::with_capacity(requests / READ_CONNECTIONS);
        for path in
            paths.iter().cycle().skip(worker).step_by(READ_CONNECTIONS).take(requests / READ_CONNECTIONS)
        {
            let begun = Instant::now();
            connection.expect(200, method, path, headers, &[])?;
            times.push(begun.elapsed());
        }
        Ok(times)
    })?;
    Ok((requests as f64 / begun.elapsed().as_secs_f64(), p99_ms(times)))
}

pub(crate) fn in_parallel<T: Send>(
    workers: usize,
    work: impl Fn(usize) -> anyhow::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|worker| scope.spawn(move || work(worker))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a load thread panicked"))))
            .collect()
    })
}

fn p99_ms(times: Vec<Vec<Duration>>) -> f64 {
    let mut times: Vec<Duration> = times.into_iter().flatten().collect();
    times.sort();
    times.get(times.len() * 99 / 100).map_or(0.0, |time| time.as_secs_f64() * 1e3)
}

/// Bytes that do not compress and are the same in every run (xorshift).
pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(bytes);
    out
}

/// Makes a blob unlike every other round's, so that no server can know it already.
pub(crate) fn stamp(blob: &mut [u8], number: usize) {
    blob[..8].copy_from_slice(&(number as u64).to_le_bytes());
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// A registry process on an empty folder of its own; both are gone when it is dropped.
pub(crate) struct Fresh {
    pub(crate) server: Server,
    _root: tempfile::TempDir,
}

impl Fresh {
    pub(crate) fn start(name: &str, program: &Path, dir: &Path) -> anyhow::Result<Self> {
        let root = tempfile::tempdir_in(dir)?;
        Ok(Self { server: Server::start(name, program, root.path())?, _root: root })
    }
}

/// A registry process that serves `data` below a folder; it is gone when this is dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) addr: SocketAddr,
    /// How long it took to answer.
    pub(crate) started: Duration,
}

impl Server {
    pub(crate) fn start(name: &str, program: &Path, root: &Path) -> anyhow::Result<Self> {
        let data = root.join("data");
        Self::start_by(name, |addr| {
            let mut command = Command::new(program);
            if name == "dvcr" {
                let addr = addr.to_string();
                command.args(["--log", "warn", "registry", "--listen", &addr, "--root"]).arg(&data);
            } else {
                command.arg("serve").arg(peer_config(root, &data, addr)?);
            }
            Ok(command)
        })
    }

    /// Starts what `command` makes of a free address.
    pub(crate) fn start_by(
        name: &str,
        command: impl FnOnce(SocketAddr) -> anyhow::Result<Command>,
    ) -> anyhow::Result<Self> {
        // What the server before left to be written is not this one's to wait for.
        ensure!(Command::new("sync").status()?.success(), "sync failed");
        let addr = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = command(addr)?;
        let begun = Instant::now();
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let mut server = Self { child, addr, started: Duration::ZERO };
        let deadline = begun + Duration::from_secs(START_TIMEOUT_S);
        while Connection::open(addr).and_then(|mut c| c.expect(200, "GET", "/v2/", "", &[])).is_err() {
            ensure!(Instant::now() < deadline, "{name} did not answer within {START_TIMEOUT_S} s");
            std::thread::sleep(Duration::from_millis(5));
        }
        server.started = begun.elapsed();
        Ok(server)
    }

    pub(crate) fn rss_mib(&self, field: &str) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find(|line| line.starts_with(field)).context("no such field in status")?;
        let kib: f64 = line.split_whitespace().nth(1).context("no value")?.parse()?;
        Ok(kib / 1024.0)
    }

    /// User and system time of the process so far; clock ticks are 1/100 s on Linux.
    fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let (_, fields) = stat.rsplit_once(") ").context("no command in stat")?;
        let ticks: Vec<f64> = fields.split(' ').skip(11).take(2).flat_map(str::parse).collect();
        Ok(ticks.iter().sum::<f64>() / 100.0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The process may have died by itself; there is nothing to do about it then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn peer_config(root: &Path, data: &Path, addr: SocketAddr) -> anyhow::Result<PathBuf> {
    peer_config_on(root, &format!("  filesystem:\n    rootdirectory: {}\n", data.display()), addr)
}

/// Writes the peers' file of settings; `storage` is what it says of where the content is.
pub(crate) fn peer_config_on(root: &Path, storage: &str, addr: SocketAddr) -> anyhow::Result<PathBuf> {
    let path = root.join("config.yml");
    let config = format!(
        "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n{storage}  delete:\n    enabled: true\n  cache:\n    blobdescriptor: inmemory\nhttp:\n  addr: {addr}\n",
    );
    std::fs::write(&path, config)?;
    Ok(path)
}
