//! Several processes serve one bucket: they are killed, and stopped for longer than a lease lasts, while they collect and clients push.

use crate::support::{Client, Image, OCI_MANIFEST, digest, image, noise};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use dvcr_tests::{Output, Registry, S3Server, cmd, dvcr, run_output, temp_dir};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const REPOS: [&str; 2] = ["team/app", "team/app/debug"];
/// Layers that all images are made of.
const LAYERS: u64 = 10;
const PUSHERS: u64 = 3;
/// How long a client waits for a replica that stands still.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(4);
/// A lease lasts 60 s, and a collection begins with a pause of 25 s; the rest is for what stands in the way.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(180);
/// How long a collection may be on before its replica is stopped: by then it waits, looks, removes, or has ended.
const HEAD_START_MS_MAX: u64 = 30_000;

/// Manifests that were acknowledged, and that nobody has asked to delete, by repository and digest.
type Accepted = Arc<Mutex<BTreeMap<(usize, String), Image>>>;

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_are_killed_or_stand_still_lose_nothing_beside_collections() -> Result<()> {
    let (server, dir) = (S3Server::shared_minio(), temp_dir());
    let bucket = server.new_bucket()?;
    let start = |name: &str| {
        let args = ["--gc-schedule", "off", "--gc-grace", "1s"];
        Registry::start_in_bucket(&dir.path().join(name), (&server, &bucket, "/root"), &args)
    };
    let (first, second, mut third) = (start("first")?, start("second")?, start("third")?);
    let hasty = reqwest::Client::builder().timeout(CLIENT_TIMEOUT).build()?;
    let clients = [&first, &second, &third].map(|replica| {
        let mut client = Client::new(&replica.url());
        client.http = hasty.clone();
        client
    });
    let (accepted, stop, pushed) = (Accepted::default(), Arc::<AtomicBool>::default(), Arc::default());
    let pushers: Vec<_> = (0..PUSHERS)
        .map(|n| {
            tokio::spawn(push(
                clients.clone(),
                n,
                Arc::clone(&accepted),
                Arc::clone(&stop),
                Arc::clone(&pushed),
            ))
        })
        .collect();
    let mut random = Random::now();
    eprintln!("seed {}", random.0);

    // The first collects, and stands still for longer than its lease lasts.
    let first_root = first.root().to_owned();
    let collection = tokio::task::spawn_blocking(move || collect(first_root));
    tokio::time::sleep(Duration::from_millis(random.below(HEAD_START_MS_MAX))).await;
    first.pause()?;
    // The third is killed and stopped again and again, also while it collects.
    let third_stops = Arc::clone(&stop);
    let restless = tokio::task::spawn_blocking(move || {
        while !third_stops.load(Ordering::Relaxed) {
            let root = third.root().to_owned();
            let collection = std::thread::spawn(move || collect(root));
            std::thread::sleep(Duration::from_millis(random.below(8000)));
            third.pause()?;
            std::thread::sleep(Duration::from_millis(random.below(5000)));
            third.resume()?;
            std::thread::sleep(Duration::from_millis(random.below(2000)));
            third.kill9()?;
            drop(collection.join());
            third.restart()?;
        }
        anyhow::Ok(third)
    });
    // The second collects in its place, as soon as it can.
    let begun = Instant::now();
    loop {
        let root = second.root().to_owned();
        let done = tokio::task::spawn_blocking(move || collect(root)).await??;
        if done.status.success() {
            eprintln!("collected after {} s: {}", begun.elapsed().as_secs(), done.stdout.trim());
            break;
        }
        ensure!(begun.elapsed() < TAKE_OVER_TIMEOUT, "{}\n{}", done.stderr, second.log());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    first.resume()?;
    let done = collection.await??;
    eprintln!("the first says: {}{}", done.stdout.trim(), done.stderr.trim());
    stop.store(true, Ordering::Relaxed);
    for pusher in pushers {
        pusher.await?;
    }
    let third = restless.await??;

    let accepted = std::mem::take(&mut *accepted.lock().unwrap_or_else(PoisonError::into_inner));
    eprintln!("{} images pushed, {} are left", pushed.load(Ordering::Relaxed), accepted.len());
    ensure!(!accepted.is_empty(), "nothing was pushed: {}", second.log());
    for replica in [&first, &second, &third] {
        let client = Client::new(&replica.url());
        for ((repo, manifest), image) in accepted.iter() {
            image.check(&client, REPOS[*repo]).await.with_context(|| format!("{manifest} is lost"))?;
        }
    }
    for mut replica in [first, second, third] {
        ensure!(replica.terminate()?.success(), "{}", replica.log());
    }
    Ok(())
}

/// Has the registry that serves a directory's bucket collect.
fn collect(root: PathBuf) -> Result<Output> {
    let root = root.to_str().context("a path that is no UTF-8")?;
    run_output(&cmd(dvcr()?, ["registry", "gc", "--root", root, "--output", "json"]))
}

/// Pushes images of shared layers to whichever replica answers, and deletes most of them.
async fn push(
    clients: [Client; 3],
    n: u64,
    accepted: Accepted,
    stop: Arc<AtomicBool>,
    pushed: Arc<AtomicU64>,
) {
    let mut random = Random(n);
    while !stop.load(Ordering::Relaxed) {
        let client = &clients[random.below(3) as usize];
        let at = random.below(2) as usize;
        let layers = [random.below(LAYERS), random.below(LAYERS)].map(|seed| noise(2000, seed));
        let image = image(OCI_MANIFEST, &[&layers[..], &[noise(16, random.next())]].concat());
        // One that is not answered may have been pushed, or deleted: nothing is expected of it.
        if !push_image(client, at, &image).await.unwrap_or(false) {
            continue;
        }
        pushed.fetch_add(1, Ordering::Relaxed);
        let key = (at, image.digest());
        if random.below(8) == 0 {
            accepted.lock().unwrap_or_else(PoisonError::into_inner).insert(key, image);
        } else {
            let _ = client.delete(&format!("/v2/{}/manifests/{}", REPOS[at], key.1)).await;
        }
    }
}

/// Pushes what is not there, as clients do; tells whether the manifest was accepted.
async fn push_image(client: &Client, at: usize, image: &Image) -> Result<bool> {
    let (repo, other) = (REPOS[at], REPOS[1 - at]);
    for blob in &image.blobs {
        let digest = digest(blob);
        let head = client.send("HEAD", &format!("/v2/{repo}/blobs/{digest}"), &[], Bytes::new()).await?;
        if head.status == 200 {
            continue;
        }
        let mount = format!("/v2/{repo}/blobs/uploads/?mount={digest}&from={other}");
        if client.send("POST", &mount, &[], Bytes::new()).await?.status != 201 {
            client.push_blob_some_way(repo, blob, 0).await?;
        }
    }
    let put = client.put_manifest(repo, &image.digest(), OCI_MANIFEST, &image.manifest).await?;
    Ok(put.status == 201)
}

/// SplitMix64.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn now() -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self(now.as_nanos() as u64)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
