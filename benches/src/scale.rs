//! What many blobs cost: the same registry directory, with few and with many blobs, under each server in turn.
//!
//! A directory holds images of nine blobs and a manifest, one tag each, in repositories `vi/nsX/imageN`; a quarter of them have
//! lost their manifest, so that their blobs are garbage. All of it is old. It is written as CNCF distribution lays it out.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, ensure};

use crate::http::Connection;
use crate::registry::{Server, digest, in_parallel, peer_config, push_small, requests_of_many};
use crate::table::{Against, Better, Table};

/// Blobs of an image, but for its manifest.
const IMAGE_BLOBS: usize = 9;
const NAMESPACES: usize = 100;
const WRITING_THREADS: usize = 8;
/// Images whose requests are timed.
const ASKED_IMAGES: usize = 1000;
const REQUESTS: usize = 24_000;
const PAGE_NAMES: usize = 100;
/// A collection that takes longer is given up.
const COLLECTION_TIMEOUT: Duration = Duration::from_secs(900);
const AGE: Duration = Duration::from_secs(100 * 86_400);

/// Makes a directory of each size, runs all rows on both servers and prints the table.
pub fn run(dvcr: &Path, distribution: &Path, dir: &Path, sizes: &[usize]) -> anyhow::Result<()> {
    let mut table = Table::default();
    for blobs in sizes {
        let root = tempfile::tempdir_in(dir)?;
        eprintln!("making {blobs} blobs");
        let images = make(&root.path().join("data"), *blobs)?;
        for (number, (name, program)) in
            [("dvcr", dvcr), ("distribution v3", distribution)].into_iter().enumerate()
        {
            if !program.exists() {
                continue;
            }
            eprintln!("{blobs} blobs: {name}");
            let scale = Scale { number, name, program, root: root.path(), images: &images };
            scale
                .measure(&mut |row, better, value| {
                    eprintln!("  {row}: {value:.2}");
                    table.add(&format!("{row}, {blobs} blobs"), better, name, value);
                })
                .with_context(|| format!("measuring {name}"))?;
        }
        eprintln!("removing {blobs} blobs");
    }
    table.print(Against::Best);
    Ok(())
}

struct Scale<'a> {
    number: usize,
    name: &'a str,
    program: &'a Path,
    root: &'a Path,
    images: &'a [Image],
}

/// An image that has its manifest.
struct Image {
    repository: String,
    blob: String,
}

impl Scale<'_> {
    fn measure(&self, add: &mut dyn FnMut(&str, Better, f64)) -> anyhow::Result<()> {
        forget_cached();
        let server = Server::start(self.name, self.program, self.root)?;
        add("start, ms", Better::Lower, server.started.as_secs_f64() * 1e3);
        let step = (self.images.len() / ASKED_IMAGES).max(1);
        let asked: Vec<&Image> = self.images.iter().step_by(step).take(ASKED_IMAGES).collect();
        let manifests: Vec<String> =
            asked.iter().map(|image| format!("/v2/{}/manifests/v1", image.repository)).collect();
        let blobs: Vec<String> =
            asked.iter().map(|image| format!("/v2/{}/blobs/{}", image.repository, image.blob)).collect();
        let accept = "Accept: application/vnd.oci.image.manifest.v1+json\r\n";
        let (_, p99) = requests_of_many(server.addr, "GET", &manifests, accept, manifests.len())?;
        add("first manifest GET, p99 ms", Better::Lower, p99);
        let (rate, p99) = requests_of_many(server.addr, "GET", &manifests, accept, REQUESTS)?;
        add("manifest GET, requests/s", Better::Higher, rate);
        add("manifest GET, p99 ms", Better::Lower, p99);
        requests_of_many(server.addr, "HEAD", &blobs, "", blobs.len())?;
        let (rate, p99) = requests_of_many(server.addr, "HEAD", &blobs, "", REQUESTS)?;
        add("blob HEAD, requests/s", Better::Higher, rate);
        add("blob HEAD, p99 ms", Better::Lower, p99);
        let (rate, _) = push_small(server.addr, self.number, |n| asked[n % asked.len()].repository.clone())?;
        add("4 KiB blobs, blobs/s", Better::Higher, rate);

        let middle = &self.images[self.images.len() / 2].repository;
        let page = format!("/v2/_catalog?n={PAGE_NAMES}&last={middle}");
        let mut connection = Connection::open(server.addr)?;
        // The first reads directories from the disk.
        connection.expect(200, "GET", &page, "", &[])?;
        let begun = Instant::now();
        connection.expect(200, "GET", &page, "", &[])?;
        add("page of the catalogue, ms", Better::Lower, begun.elapsed().as_secs_f64() * 1e3);
        add("RSS peak of requests, MiB", Better::Lower, server.rss_mib("VmHWM")?);
        drop(connection);
        self.collect(server, add)
    }

    /// Looks for garbage, and has ours collect it, for it comes first and the other is to find the same.
    fn collect(&self, server: Server, add: &mut dyn FnMut(&str, Better, f64)) -> anyhow::Result<()> {
        let data = self.root.join("data");
        let mut collect = |row: &str, arguments: &[&str]| -> anyhow::Result<()> {
            forget_cached();
            let mut command = Command::new(self.program);
            match self.name {
                "dvcr" => command.args(["--log", "warn", "registry", "gc", "--root"]).arg(&data),
                _ => command.arg("garbage-collect").arg(peer_config(self.root, &data, server.addr)?),
            };
            let begun = Instant::now();
            let mut child = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
            while child.try_wait()?.is_none() {
                if begun.elapsed() > COLLECTION_TIMEOUT {
                    child.kill()?;
                    child.wait()?;
                    eprintln!("{row}: given up after {} s", COLLECTION_TIMEOUT.as_secs());
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            ensure!(child.wait()?.success(), "the collection failed");
            add(row, Better::Lower, begun.elapsed().as_secs_f64());
            Ok(())
        };
        let dry_run = "--dry-run";
        collect("looking for garbage, s", &[dry_run])?;
        if self.name == "dvcr" {
            collect("collecting a quarter of the blobs, s", &[])?;
            // It is the server that collects.
            add("RSS peak with the collection, MiB", Better::Lower, server.rss_mib("VmHWM")?);
        }
        Ok(())
    }
}

/// Makes what is asked for next come from the disk, where we may.
fn forget_cached() {
    // Without the right to do so, all servers are measured warm.
    let _ = Command::new("sync").status();
    let _ = fs::write("/proc/sys/vm/drop_caches", "3");
}

/// Writes a directory of so many blobs; returns the images that have a manifest.
fn make(data: &Path, blobs: usize) -> anyhow::Result<Vec<Image>> {
    let images = blobs / (IMAGE_BLOBS + 1);
    let base = data.join("docker/registry/v2");
    let made = in_parallel(WRITING_THREADS, |worker| {
        let mut made = Vec::new();
        for number in (worker..images).step_by(WRITING_THREADS) {
            made.extend(make_image(&base, number)?);
        }
        Ok(made)
    })?;
    Ok(made.into_iter().flatten().collect())
}

fn make_image(base: &Path, number: usize) -> anyhow::Result<Option<Image>> {
    let repository = format!("vi/ns{}/image{number}", number % NAMESPACES);
    let dir = base.join("repositories").join(&repository);
    let mut digests = Vec::new();
    for part in 0..IMAGE_BLOBS {
        let digest = make_blob(base, format!("{number}-{part}").as_bytes())?;
        let hex = digest.trim_start_matches("sha256:");
        write(dir.join("_layers/sha256").join(hex).join("link"), digest.as_bytes())?;
        digests.push(digest);
    }
    if number % 4 == 3 {
        return Ok(None);
    }
    let descriptor = |kind: &str, digest: &str| {
        let size = format!("{number}-0").len();
        format!(r#"{{"mediaType":"application/vnd.oci.image.{kind}","digest":"{digest}","size":{size}}}"#)
    };
    let layers: Vec<String> = digests[1..].iter().map(|digest| descriptor("layer.v1.tar", digest)).collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[{}]}}"#,
        descriptor("config.v1+json", &digests[0]),
        layers.join(",")
    );
    let digest = make_blob(base, manifest.as_bytes())?;
    let hex = digest.trim_start_matches("sha256:");
    let manifests = dir.join("_manifests");
    let tag = manifests.join("tags/v1");
    for link in [manifests.join("revisions/sha256"), tag.join("index/sha256")] {
        write(link.join(hex).join("link"), digest.as_bytes())?;
    }
    write(tag.join("current/link"), digest.as_bytes())?;
    Ok(digests.into_iter().next().map(|blob| Image { repository, blob }))
}

fn make_blob(base: &Path, content: &[u8]) -> anyhow::Result<String> {
    let digest = digest(content);
    let hex = digest.trim_start_matches("sha256:");
    write(base.join("blobs/sha256").join(&hex[..2]).join(hex).join("data"), content)?;
    Ok(digest)
}

fn write(path: PathBuf, content: &[u8]) -> anyhow::Result<()> {
    fs::create_dir_all(path.parent().context("a file without a directory")?)?;
    fs::write(&path, content)?;
    let old = SystemTime::now().checked_sub(AGE).context("a clock before its time")?;
    Ok(File::options().write(true).open(&path)?.set_modified(old)?)
}
