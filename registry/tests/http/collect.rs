//! Garbage collection beside clients that push, mount, pull and delete.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use dvcr_registry::{Collected, Config, Outcome, Task, control};
use serde_json::json;

use crate::support::{OCI_MANIFEST, Served, eventually, image, noise, sha256};

/// Operations of the stress run; `DVCR_STRESS_OPERATIONS` asks for more.
const OPERATIONS: u64 = 4000;
const CLIENTS: u64 = 6;
const REPOS: [&str; 3] = ["a", "b/c", "b/d"];

fn grace(config: &mut Config) {
    config.collection.grace = Duration::from_millis(200);
}

/// Asks the registry by its control socket.
async fn collect(served: &Served, dry_run: bool) -> Result<Collected, dvcr_registry::Error> {
    let mut config = Config::new(served.dir().join("root"));
    grace(&mut config);
    let work = move || control::perform(config, &Task::Collect { dry_run }, &AtomicBool::new(false), |_| ());
    tokio::task::spawn_blocking(work).await.unwrap().map(collected)
}

#[track_caller]
fn collected(outcome: Outcome) -> Collected {
    match outcome {
        Outcome::Collected(done) => done,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_command_collects_by_way_of_the_running_registry() {
    let served = Served::open_with(tempfile::tempdir().unwrap(), grace).await;
    let manifest = served.push_image("a", "v1", 1).await;
    let loose = served.push_blob("a", &noise(5000, 2)).await;
    let done = eventually("garbage of 5000 bytes", async || {
        let done = collect(&served, true).await.unwrap();
        (done.freed_bytes == 5000).then_some(done)
    })
    .await;
    assert_eq!((done.removed_blobs, served.metric("dvcr_registry_gc_runs_total").await), (1, 0));
    let done = collect(&served, false).await.unwrap();
    assert_eq!((done.removed_blobs, done.removed_links, done.freed_bytes), (1, 1, 5000));
    served.ask("HEAD", &format!("/v2/a/blobs/{loose}")).await.expect(404);
    assert_eq!(sha256(&served.get("/v2/a/manifests/v1").await.expect(200).body), manifest);
    assert_eq!(served.metric("dvcr_registry_gc_freed_bytes_total").await, 5000);
}

#[tokio::test]
async fn a_command_works_alone_where_nobody_serves() {
    let served = Served::open_with(tempfile::tempdir().unwrap(), grace).await;
    served.push_image("a", "v1", 1).await;
    let dir = served.close().await;
    let root = dir.path().join("root");
    let work = |root| {
        control::perform(
            Config::new(root),
            &Task::Collect { dry_run: false },
            &AtomicBool::new(false),
            |_| (),
        )
    };
    let done = collected(work(root.clone()).unwrap());
    assert_eq!((done.repositories, done.manifests, done.blobs, done.removed_blobs), (1, 1, 3, 0));
    let error = work(root.join("elsewhere")).unwrap_err();
    assert!(error.to_string().contains("elsewhere") && !root.join("elsewhere").exists(), "{error}");
}

/// What the clients of the stress run know, and share.
struct World {
    served: Served,
    /// Accepted manifests that nobody has deleted, and the blobs they refer to.
    accepted: std::sync::Mutex<BTreeMap<(usize, String), Vec<String>>>,
    refused: AtomicU64,
    mounted: AtomicU64,
    verified: AtomicU64,
}

/// Numbers without a pattern.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

impl World {
    async fn operate(&self, dice: &mut Dice, serial: u64) {
        match dice.roll(10) {
            0..=3 => self.push(dice, serial).await,
            4..=7 => self.delete(dice).await,
            _ => {
                let picked = self.pick(dice);
                if let Some((at, blobs)) = picked {
                    self.verify(&at, &blobs).await;
                }
            }
        }
    }

    fn pick(&self, dice: &mut Dice) -> Option<((usize, String), Vec<String>)> {
        let accepted = self.accepted.lock().unwrap();
        let nth = dice.roll(accepted.len().max(1) as u64) as usize;
        accepted.iter().nth(nth).map(|(at, blobs)| (at.clone(), blobs.clone()))
    }

    /// Brings an image in as clients do: what is there is not sent, what another repository has is mounted.
    async fn push(&self, dice: &mut Dice, serial: u64) {
        let repo = dice.roll(3) as usize;
        let name = REPOS[repo];
        let contents: Vec<Vec<u8>> = (0..3).map(|_| noise(300, dice.roll(40))).collect();
        for content in &contents {
            let digest = sha256(content);
            if self.served.ask("HEAD", &format!("/v2/{name}/blobs/{digest}")).await.status == 200 {
                continue;
            }
            let from = REPOS[dice.roll(3) as usize];
            let mount = format!("/v2/{name}/blobs/uploads/?mount={digest}&from={from}");
            match self.served.ask("POST", &mount).await.status {
                201 => drop(self.mounted.fetch_add(1, Ordering::Relaxed)),
                _ => drop(self.served.push_blob(name, content).await),
            }
        }
        let mut manifest = image(OCI_MANIFEST, &contents[0], &[&contents[1], &contents[2]]);
        manifest["annotations"] = json!({"serial": serial.to_string()});
        let bytes = manifest.to_string();
        let digest = sha256(bytes.as_bytes());
        let path = format!("/v2/{name}/manifests/{digest}");
        let answer = self.served.send("PUT", &path, &[("content-type", OCI_MANIFEST)], bytes).await;
        match answer.status {
            201 => {
                let blobs = contents.iter().map(|content| sha256(content)).collect();
                self.accepted.lock().unwrap().insert((repo, digest), blobs);
            }
            // A mount whose source went at the same moment, or a grace period that was too short: push it again.
            _ => {
                answer.expect_error(400, "MANIFEST_BLOB_UNKNOWN");
                self.refused.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    async fn delete(&self, dice: &mut Dice) {
        let Some((at, _)) = self.pick(dice) else { return };
        // Whoever takes it from the list deletes it.
        if self.accepted.lock().unwrap().remove(&at).is_some() {
            let path = format!("/v2/{}/manifests/{}", REPOS[at.0], at.1);
            self.served.ask("DELETE", &path).await.expect(202);
        }
    }

    async fn verify(&self, at: &(usize, String), blobs: &[String]) {
        let name = REPOS[at.0];
        let mut missing = Vec::new();
        for (kind, digest) in
            [("manifests", &at.1)].into_iter().chain(blobs.iter().map(|digest| ("blobs", digest)))
        {
            let answer = self.served.get(&format!("/v2/{name}/{kind}/{digest}")).await;
            if answer.status != 200 || sha256(&answer.body) != *digest {
                missing.push((answer.status, digest));
            }
        }
        // Another client may have deleted it meanwhile.
        let is_wanted = self.accepted.lock().unwrap().contains_key(at);
        self.verified.fetch_add(is_wanted.into(), Ordering::Relaxed);
        assert!(missing.is_empty() || !is_wanted, "{name} lost of {}: {missing:?}", at.1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_accepted_manifest_loses_a_blob_while_garbage_is_collected() {
    let operations = std::env::var("DVCR_STRESS_OPERATIONS").map_or(OPERATIONS, |text| text.parse().unwrap());
    let served = Served::open_with(tempfile::tempdir().unwrap(), grace).await;
    let world = Arc::new(World {
        served,
        accepted: std::sync::Mutex::default(),
        refused: AtomicU64::new(0),
        mounted: AtomicU64::new(0),
        verified: AtomicU64::new(0),
    });
    let ended = Arc::new(AtomicBool::new(false));
    let collector = tokio::spawn({
        let (world, ended) = (Arc::clone(&world), Arc::clone(&ended));
        async move {
            let mut all = Collected::default();
            while !ended.load(Ordering::Relaxed) {
                let done = collect(&world.served, false).await.unwrap();
                all.removed_blobs += done.removed_blobs;
                all.removed_links += done.removed_links;
            }
            all
        }
    });
    let clients = (0..CLIENTS).map(|client| {
        let world = Arc::clone(&world);
        tokio::spawn(async move {
            let mut dice = Dice(client + 1);
            for turn in 0..operations / CLIENTS {
                world.operate(&mut dice, turn * CLIENTS + client).await;
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    ended.store(true, Ordering::Relaxed);
    let mut all = collector.await.unwrap();
    let accepted = world.accepted.lock().unwrap().clone();
    for (at, blobs) in &accepted {
        world.verify(at, blobs).await;
    }
    let [refused, mounted, verified] =
        [&world.refused, &world.mounted, &world.verified].map(|count| count.load(Ordering::Relaxed));
    eprintln!("{verified} verified, {refused} refused, {mounted} mounted, {all:?}");
    assert!(all.removed_blobs > 0 && mounted > 0 && verified > 0, "{all:?}");
    // Those that were told that a blob is there have time to build on it.
    assert!(refused * 10 < operations, "{refused} of {operations}");
    // And nothing stays that nobody wants.
    for (repo, digest) in accepted.keys() {
        world.served.ask("DELETE", &format!("/v2/{}/manifests/{digest}", REPOS[*repo])).await.expect(202);
    }
    eventually("an empty registry", async || {
        let done = collect(&world.served, false).await.unwrap();
        all.removed_links += done.removed_links;
        (done.blobs == 0).then_some(())
    })
    .await;
    assert!(all.removed_links > 0, "{all:?}");
}
