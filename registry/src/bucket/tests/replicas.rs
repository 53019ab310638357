//! Several replicas of one bucket that push the same things while two collect, by way of networks that delay, hold back, lose and
//! repeat requests; each dies in the middle of what it does, again and again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dvcr_tests::{Asked, Chaos, Fault, S3Proxy, S3Server};
use futures_util::stream::TryStreamExt;
use serde_json::json;
use tokio::runtime::{Builder, Runtime};

use super::{Opened, TIMING};
use crate::bucket::Bucket;
use crate::bucket::run::Phase;
use crate::digest::{Algorithm, Digest};
use crate::lock;
use crate::model;
use crate::names::{Reference, RepoName};
use crate::rules::Rules;
use crate::store::collect::Counts;
use crate::store::conformance::collecting;
use crate::store::{ChangeError, Manifest, Store};

/// Replicas that push, and those that collect.
const PUSHERS: u64 = 3;
const COLLECTORS: u64 = 2;
/// How long they do; `DVCR_STRESS_SECONDS` is for a long run.
const TIME: Duration = Duration::from_secs(25);
/// Contents that all push again and again.
const CONTENTS: u64 = 12;
/// After how long a replica gives up one attempt of a request, which is held back for longer at times.
const REQUEST_TIMEOUT: Duration = Duration::from_millis(1500);
/// How long what is left of those who died is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a manifest refers to, by what was accepted and has not been deleted.
type Accepted = Mutex<BTreeMap<(RepoName, Digest), Vec<Digest>>>;

#[test]
fn replicas_that_die_and_networks_that_are_late_lose_nothing_beside_collections() {
    let seconds = std::env::var("DVCR_STRESS_SECONDS").ok().and_then(|text| text.parse().ok());
    let time = seconds.map_or(TIME, Duration::from_secs);
    let server = S3Server::shared_minio();
    let runtime = runtime();
    let opened = runtime.block_on(Opened::with_grace(server, Duration::ZERO));
    let (accepted, stop) = (Accepted::default(), AtomicBool::default());
    let (removed, runs, deaths) = (AtomicU64::default(), AtomicU64::default(), AtomicU64::default());
    thread::scope(|scope| {
        for n in 0..PUSHERS {
            let (opened, accepted, stop, deaths) = (&opened, &accepted, &stop, &deaths);
            scope.spawn(move || push(opened, n, accepted, stop, deaths));
        }
        for n in 0..COLLECTORS {
            let (opened, removed, stop, runs, deaths) = (&opened, &removed, &stop, &runs, &deaths);
            scope.spawn(move || collect(opened, PUSHERS + n, removed, stop, runs, deaths));
        }
        // Also when something is found to be lost, which those who push the same would soon bring back.
        let _stop = Stop(&stop);
        let begun = Instant::now();
        // On a busy machine it takes longer until something is collected at all.
        let is_idle = || removed.load(Ordering::Relaxed) == 0 && begun.elapsed() < 4 * time;
        while begun.elapsed() < time || is_idle() {
            runtime.block_on(check_accepted(&opened.bucket, &accepted));
        }
    });
    let bucket = &opened.bucket;
    runtime.block_on(async {
        check_accepted(bucket, &accepted).await;
        check_all(bucket).await;
        // One whose network is good does what was left.
        let begun = Instant::now();
        while bucket
            .collect(&collecting(), &Counts::default(), &AtomicBool::default())
            .await
            .unwrap()
            .is_none()
        {
            assert!(begun.elapsed() < PATIENCE, "nobody gives the lease back");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(bucket.read_run().await.unwrap().phase, Phase::None);
        check_accepted(bucket, &accepted).await;
        check_all(bucket).await;
    });
    let [removed, runs, deaths] = [removed, runs, deaths].map(AtomicU64::into_inner);
    let accepted = lock(&accepted).len();
    eprintln!("{accepted} manifests, {removed} things removed in {runs} collections, {deaths} deaths");
    assert!(accepted > 0 && removed > 0 && runs > 0 && deaths > 0);
}

/// Ends the others.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// A network for one life of a replica, which treats of a thousand requests so many in each bad way, and some more are slow.
fn network(opened: &Opened, seed: u64, each_per_mille: u64, slow_per_mille: u64) -> S3Proxy {
    let chaos = Chaos { seed, each_per_mille, delay_ms: 100..5000, cut_bytes: 0..200 };
    let (mut decide, mut random) = (chaos.decide(), Random(seed));
    let decide = move |asked: &Asked| match decide(asked) {
        Fault::None if random.below(1000) < slow_per_mille => {
            Fault::Delay(Duration::from_millis(random.below(1000)))
        }
        fault => fault,
    };
    S3Proxy::start(opened.server.address(), decide).unwrap()
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

fn push(opened: &Opened, n: u64, accepted: &Accepted, stop: &AtomicBool, deaths: &AtomicU64) {
    let mut random = Random(n);
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let runtime = runtime();
        let proxy = network(opened, random.below(u64::MAX), 4, 0);
        let life = Duration::from_millis(500 + random.below(6000));
        let done = runtime.block_on(async {
            let replica = opened.hastily_through(&proxy, REQUEST_TIMEOUT).await;
            let work = async {
                while !stop.load(Ordering::Relaxed) {
                    count += 1;
                    let image = Image::choose(&mut random, &format!("{n} {count}"));
                    image.push_and_delete(&replica.bucket, &mut random, accepted).await;
                }
            };
            tokio::time::timeout(life, work).await
        });
        deaths.fetch_add(u64::from(done.is_err()), Ordering::Relaxed);
        // All that it has begun ends here.
        runtime.shutdown_background();
    }
}

fn collect(
    opened: &Opened,
    n: u64,
    removed: &AtomicU64,
    stop: &AtomicBool,
    runs: &AtomicU64,
    deaths: &AtomicU64,
) {
    let mut random = Random(n);
    while !stop.load(Ordering::Relaxed) {
        let runtime = runtime();
        // Between what it sees and what it removes there is time for the others.
        let proxy = network(opened, random.below(u64::MAX), 5, 400);
        // A run takes longer than a request is valid.
        let life = TIMING.validity + Duration::from_millis(2000 + random.below(15_000));
        let counts = Counts::default();
        let done = runtime.block_on(async {
            let replica = opened.hastily_through(&proxy, REQUEST_TIMEOUT).await;
            let options = collecting();
            let done = replica.bucket.collect(&options, &counts, stop);
            tokio::time::timeout(life, done).await
        });
        match done {
            Err(_) => drop(deaths.fetch_add(1, Ordering::Relaxed)),
            Ok(Ok(Some(()))) => drop(runs.fetch_add(1, Ordering::Relaxed)),
            Ok(Ok(None)) => thread::sleep(Duration::from_millis(200)),
            // The network, or the other one took over.
            Ok(Err(error)) => eprintln!("a collection ended: {}", chain(&error)),
        }
        for counter in [&counts.removed_links, &counts.removed_blobs] {
            removed.fetch_add(counter.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        runtime.shutdown_background();
    }
}

/// What one client pushes.
struct Image {
    repo: RepoName,
    /// From where it tries to mount.
    other: RepoName,
    blobs: Vec<(Digest, Bytes)>,
    manifest: String,
}

impl Image {
    fn choose(random: &mut Random, name: &str) -> Self {
        let repo = |n: u64| RepoName::parse(["a", "a/b", "c"][n as usize % 3]).unwrap();
        let mut blob = || {
            let content = Bytes::from(format!("content {}", random.below(CONTENTS)));
            (Digest::of(Algorithm::Sha256, &content), content)
        };
        let blobs = vec![blob(), blob()];
        let descriptor = |at: usize| {
            let (digest, content) = &blobs[at];
            json!({"mediaType": "x/y", "digest": digest.as_str(), "size": content.len()})
        };
        let manifest = json!({
            "schemaVersion": 2, "mediaType": model::OCI_MANIFEST, "config": descriptor(0),
            "layers": [descriptor(1)], "annotations": {"name": name}
        });
        let at = random.below(3);
        Self { repo: repo(at), other: repo(at + 1 + random.below(2)), blobs, manifest: manifest.to_string() }
    }

    /// Pushes it as clients do; then deletes it, mostly.
    async fn push_and_delete(self, bucket: &Arc<Bucket>, random: &mut Random, accepted: &Accepted) {
        for (digest, content) in &self.blobs {
            let has = bucket.claim_blob(&self.repo, digest).await;
            if matches!(has, Ok(Some(_))) {
                continue;
            }
            let mounted = bucket.mount_blob(&self.other, &self.repo, digest).await;
            if matches!(mounted, Ok(Some(_))) {
                continue;
            }
            let session = Bucket::start_upload(Arc::clone(bucket), &self.repo, Algorithm::Sha256);
            if let Err(error) = session.store(content.clone(), digest).await {
                eprintln!("a blob is not pushed: {error:?}");
                return;
            }
        }
        let checked = model::check(self.manifest.as_bytes(), None).unwrap();
        let digest = Digest::of(Algorithm::Sha256, self.manifest.as_bytes());
        let manifest = Manifest {
            digest: digest.clone(),
            bytes: self.manifest.into(),
            media_type: checked.media_type.as_str().into(),
        };
        match bucket.accept_manifest(&self.repo, &manifest, &checked, &[], &Rules::default()).await {
            Ok(_) => {}
            // The blobs were collected before the manifest came.
            Err(ChangeError::Missing(_)) => return,
            Err(error) => {
                eprintln!("a manifest is not pushed: {error:?}");
                return;
            }
        }
        let key = (self.repo.clone(), digest.clone());
        lock(accepted).insert(key.clone(), self.blobs.into_iter().map(|(digest, _)| digest).collect());
        if random.below(10) > 0 {
            // Whatever becomes of the deletion, it is not expected to be there any more.
            lock(accepted).remove(&key);
            let deleted =
                bucket.remove(&self.repo, Some(&Reference::Digest(digest)), &Rules::default()).await;
            if let Err(error) = deleted {
                eprintln!("a manifest is not deleted: {error:?}");
            }
        }
    }
}

/// Looks for all that was accepted and has not been deleted.
async fn check_accepted(bucket: &Arc<Bucket>, accepted: &Accepted) {
    let expected = lock(accepted).clone();
    for (key, blobs) in &expected {
        let (repo, digest) = key;
        // Somebody may have asked for its deletion in the meantime.
        let is_lost = |is_there: bool| !is_there && lock(accepted).contains_key(key);
        let found = bucket.find_manifest(repo, &Reference::Digest(digest.clone())).await.unwrap();
        assert!(!is_lost(found.is_some()), "{repo} has lost the manifest {digest}");
        for blob in blobs {
            let found = bucket.open_blob(repo, blob).await.unwrap();
            assert!(!is_lost(found.is_some()), "{repo} has lost {blob} of {digest}");
        }
    }
}

/// Looks at all manifests that are there, whoever was told so.
async fn check_all(bucket: &Arc<Bucket>) {
    for name in ["a", "a/b", "c"] {
        let repo = RepoName::parse(name).unwrap();
        let prefix = bucket.keys.revisions(&repo);
        for (key, _) in bucket.client.pages(&prefix, None).try_concat().await.unwrap() {
            let parts: Vec<_> = key[prefix.len()..].split('/').collect();
            let digest: Digest = format!("{}:{}", parts[0], parts[1]).parse().unwrap();
            let found = bucket.find_manifest(&repo, &Reference::Digest(digest.clone())).await.unwrap();
            let found =
                found.unwrap_or_else(|| panic!("{repo} has a link to {digest}, and nothing behind it"));
            for blob in model::references(&found.bytes).unwrap() {
                assert!(
                    bucket.open_blob(&repo, &blob).await.unwrap().is_some(),
                    "{repo} has lost {blob} of {digest}"
                );
            }
        }
    }
    bucket.probe().await.unwrap();
    assert_eq!(bucket.stats().damaged_blobs, 0);
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
