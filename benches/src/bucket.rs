//! Registries in a bucket side by side: every round starts MinIO and each server on an empty bucket, and runs every row.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::http::Connection;
use crate::registry::{self, Server, digest, in_parallel, noise, peer_config_on, stamp};
use crate::table::{Against, Better, Table};

const KEY: &str = "dvcr-benches";
const SECRET: &str = "secret-of-the-benches";
const BUCKET: &str = "images";
const START_TIMEOUT: Duration = Duration::from_secs(30);
const READ_REQUESTS: usize = 2000;
const CONNECTIONS: usize = 8;
const PUSHES_AT_ONCE: usize = 4;
const LISTS: usize = 5;
/// Connections that make garbage: that is not measured, and what takes its time are syncs.
const FILLERS: usize = 32;
const GARBAGE_BYTES: usize = 1000;

/// How much there is to do.
pub struct Amounts {
    pub rounds: usize,
    pub blob_bytes: usize,
    /// Tags of the repository that is listed.
    pub tags: usize,
    /// Blobs that nothing refers to.
    pub garbage: usize,
}

/// Runs all rows on both servers and prints the table.
pub fn run(
    dvcr: &Path,
    distribution: &Path,
    minio: &Path,
    dir: &Path,
    amounts: &Amounts,
) -> anyhow::Result<()> {
    for program in [dvcr, distribution, minio] {
        ensure!(program.exists(), "{} is not there: cargo build --release, make tools", program.display());
    }
    let servers = [("dvcr", dvcr), ("distribution v3", distribution)];
    let mut table = Table::default();
    let mut blob = noise(amounts.blob_bytes);
    for round in 0..amounts.rounds {
        stamp(&mut blob, round);
        let of_blob = digest(&blob);
        for (name, program) in servers {
            eprintln!("round {} of {}: {name}", round + 1, amounts.rounds);
            let home = tempfile::tempdir_in(dir)?;
            let minio = Minio::start(minio, &home.path().join("minio"))?;
            let server = serve(name, program, &minio, home.path())?;
            let mut add = |row: &str, better, value| table.add(row, better, name, value);
            let done = registry::measure(&server, &blob, &of_blob, READ_REQUESTS, &mut add)
                .and_then(|()| push_at_once(&server, &mut blob, round, &mut add));
            done.with_context(|| format!("measuring {name}"))?;
        }
    }
    for (name, program) in servers {
        eprintln!("{} tags: {name}", amounts.tags);
        let home = tempfile::tempdir_in(dir)?;
        let minio = Minio::start(minio, &home.path().join("minio"))?;
        let server = serve(name, program, &minio, home.path())?;
        list(&server, amounts.tags, &mut |row, better, value| table.add(row, better, name, value))
            .with_context(|| format!("listing {name}"))?;
    }
    if amounts.garbage > 0 {
        collect(&servers, minio, dir, amounts.garbage, &mut table)?;
    }
    table.print(Against::Best);
    Ok(())
}

/// Pushes some large blobs at a time.
fn push_at_once(
    server: &Server,
    blob: &mut [u8],
    round: usize,
    add: &mut dyn FnMut(&str, Better, f64),
) -> anyhow::Result<()> {
    let blobs: Vec<(Vec<u8>, String)> = (0..PUSHES_AT_ONCE)
        .map(|n| {
            let mut blob = blob[..blob.len() / PUSHES_AT_ONCE].to_vec();
            stamp(&mut blob, 1000 * (round + 1) + n);
            let digest = digest(&blob);
            (blob, digest)
        })
        .collect();
    let mib = blobs.iter().map(|(blob, _)| blob.len()).sum::<usize>() as f64 / (1 << 20) as f64;
    let begun = Instant::now();
    in_parallel(PUSHES_AT_ONCE, |worker| {
        let (blob, digest) = &blobs[worker];
        registry::push(&mut Connection::open(server.addr)?, "at-once", digest, blob)
    })?;
    add("4 pushes of a quarter, total MiB/s", Better::Higher, mib / begun.elapsed().as_secs_f64());
    Ok(())
}

fn list(server: &Server, tags: usize, add: &mut dyn FnMut(&str, Better, f64)) -> anyhow::Result<()> {
    registry::push_manifest(&mut Connection::open(server.addr)?, "tags", "first")?;
    let begun = Instant::now();
    in_parallel(CONNECTIONS, |worker| {
        let mut connection = Connection::open(server.addr)?;
        for n in (worker..tags).step_by(CONNECTIONS) {
            registry::put_manifest(&mut connection, "tags", &format!("v{n}"))?;
        }
        Ok(())
    })?;
    add("tags put, tags/s", Better::Higher, tags as f64 / begun.elapsed().as_secs_f64());
    let mut connection = Connection::open(server.addr)?;
    for _ in 0..LISTS {
        let begun = Instant::now();
        let listed = connection.expect(200, "GET", "/v2/tags/tags/list", "", &[])?;
        ensure!(listed.body_bytes as usize > tags * 5, "{} bytes are not all tags", listed.body_bytes);
        add(&format!("list {tags} tags, ms"), Better::Lower, begun.elapsed().as_secs_f64() * 1e3);
    }
    Ok(())
}

/// Fills a bucket with blobs that nothing refers to, and has each collect them from a copy of it, and the last from itself.
fn collect(
    servers: &[(&str, &Path)],
    minio: &Path,
    dir: &Path,
    garbage: usize,
    table: &mut Table,
) -> anyhow::Result<()> {
    let home = tempfile::tempdir_in(dir)?;
    let full = home.path().join("minio");
    eprintln!("making {garbage} blobs of garbage");
    {
        let minio = Minio::start(minio, &full)?;
        let (name, program) = servers[0];
        let server = serve(name, program, &minio, home.path())?;
        in_parallel(FILLERS, |worker| {
            let mut connection = Connection::open(server.addr)?;
            let mut blob = noise(GARBAGE_BYTES);
            for n in (worker..garbage).step_by(FILLERS) {
                stamp(&mut blob, n);
                let digest = digest(&blob);
                let path = format!("/v2/garbage-{worker}/blobs/uploads/?digest={digest}");
                let headers = "Content-Type: application/octet-stream\r\n";
                connection.expect(201, "POST", &path, headers, &blob)?;
            }
            Ok(())
        })?;
        registry::push_manifest(&mut Connection::open(server.addr)?, "garbage-0", "kept")?;
    }
    for (name, program) in servers {
        eprintln!("collecting garbage: {name}");
        let home = tempfile::tempdir_in(dir)?;
        let copy = home.path().join("minio");
        if servers.last().is_some_and(|(last, _)| last == name) {
            // Copying so many small files takes minutes.
            std::fs::rename(&full, &copy)?;
        } else {
            let copied = Command::new("cp").args(["-a", "--reflink=auto"]).args([&full, &copy]).status()?;
            ensure!(copied.success(), "cp failed");
        }
        let minio = Minio::start(minio, &copy)?;
        let mut command = Command::new(program);
        if *name == "dvcr" {
            command.args(["--log", "warn", "registry", "gc", "--gc-grace", "1s", "--root"]).arg(home.path());
            command.arg("--config").arg(settings(&minio, home.path())?);
        } else {
            let address = "127.0.0.1:0".parse()?;
            command.arg("garbage-collect").arg(peer_config_on(home.path(), &storage(&minio), address)?);
        }
        let begun = Instant::now();
        ensure!(command.stdout(Stdio::null()).stderr(Stdio::null()).status()?.success(), "{name} failed");
        let seconds = begun.elapsed().as_secs_f64();
        table.add(&format!("collect {garbage} blobs, s"), Better::Lower, name, seconds);
    }
    Ok(())
}

fn serve(name: &str, program: &Path, minio: &Minio, home: &Path) -> anyhow::Result<Server> {
    Server::start_by(name, |addr| {
        let mut command = Command::new(program);
        if name == "dvcr" {
            command.args([
                "--log",
                "warn",
                "registry",
                "--gc-schedule",
                "off",
                "--listen",
                &addr.to_string(),
            ]);
            command.arg("--root").arg(home.join("root")).arg("--config").arg(settings(minio, home)?);
        } else {
            command.arg("serve").arg(peer_config_on(home, &storage(minio), addr)?);
        }
        Ok(command)
    })
}

/// Our file of settings.
fn settings(minio: &Minio, home: &Path) -> anyhow::Result<PathBuf> {
    let path = |name: &str| home.join(name);
    std::fs::write(path("key"), KEY)?;
    std::fs::write(path("secret"), SECRET)?;
    let text = format!(
        "bucket:\n  bucket: {BUCKET}\n  endpoint: http://{}\n  access-key-file: {}\n  secret-key-file: {}\n",
        minio.addr,
        path("key").display(),
        path("secret").display()
    );
    std::fs::write(path("registry.yaml"), text)?;
    Ok(path("registry.yaml"))
}

/// What distribution's file of settings says of the bucket.
fn storage(minio: &Minio) -> String {
    format!(
        "  redirect:\n    disable: true\n  s3:\n    regionendpoint: http://{}\n    forcepathstyle: true\n    region: \
         us-east-1\n    accesskey: {KEY}\n    secretkey: {SECRET}\n    bucket: {BUCKET}\n",
        minio.addr
    )
}

/// MinIO on a folder with a bucket; it is gone when this is dropped.
struct Minio {
    child: Child,
    addr: SocketAddr,
}

impl Minio {
    fn start(program: &Path, data: &Path) -> anyhow::Result<Self> {
        let addr = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        std::fs::create_dir_all(data)?;
        let mut command = Command::new(program);
        command.args(["server", "--address", &addr.to_string()]).arg(data);
        command.envs([("MINIO_ROOT_USER", KEY), ("MINIO_ROOT_PASSWORD", SECRET), ("MINIO_BROWSER", "off")]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let minio = Self { child, addr };
        let deadline = Instant::now() + START_TIMEOUT;
        while Connection::open(addr)
            .and_then(|mut c| c.expect(200, "GET", "/minio/health/ready", "", &[]))
            .is_err()
        {
            ensure!(Instant::now() < deadline, "MinIO did not answer within {START_TIMEOUT:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        let url = format!("http://{addr}/{BUCKET}");
        let mut curl = Command::new("curl");
        curl.args(["-sS", "-X", "PUT", "--user", &format!("{KEY}:{SECRET}")]);
        curl.args(["--aws-sigv4", "aws:amz:us-east-1:s3", &url]).stdout(Stdio::null());
        ensure!(curl.status()?.success(), "cannot make a bucket");
        Ok(minio)
    }
}

impl Drop for Minio {
    fn drop(&mut self) {
        // It may have died by itself; there is nothing to do about it then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
