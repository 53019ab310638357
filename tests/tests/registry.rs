//! The registry as a program: conformance, a directory shared with other registries, kill -9, an orderly end.

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use dvcr_tests::{PeerRegistry, Registry, cmd, run, run_output, temp_dir, tool, utf8};
use futures_util::future::join_all;
use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use sha2::{Digest, Sha256, Sha512};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

const CONFORMANCE_PASSED_MIN: u64 = 70;
const STATE_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

#[test]
fn the_oci_conformance_program_finds_no_failure() -> Result<()> {
    let dir = temp_dir();
    let registry = Registry::start(&dir.path().join("root"))?;
    // It writes its reports to where it runs.
    let mut command = cmd(tool("conformance.test")?, ["-ginkgo.no-color"]);
    command.current_dir(dir.path()).env("OCI_ROOT_URL", registry.url());
    command.env("OCI_NAMESPACE", "conformance/one").env("OCI_CROSSMOUNT_NAMESPACE", "conformance/two");
    for workflow in ["PULL", "PUSH", "CONTENT_DISCOVERY", "CONTENT_MANAGEMENT"] {
        command.env(format!("OCI_TEST_{workflow}"), "1");
    }
    command.env("OCI_HIDE_SKIPPED_WORKFLOWS", "0").env("OCI_DEBUG", "0");
    let output = run_output(&command)?;
    let summary = output.stdout.lines().rev().find(|line| line.contains(" Passed "));
    let summary = summary.with_context(|| format!("no summary in {}", output.stdout))?;
    // "SUCCESS! -- 74 Passed | 0 Failed | 0 Pending | 5 Skipped"
    let count = |what: &str| -> Option<u64> {
        let part = summary.split([' ', '|']).collect::<Vec<_>>();
        part.windows(2).find(|pair| pair[1] == what)?[0].parse().ok()
    };
    assert_eq!(count("Failed"), Some(0), "{}", output.stdout);
    assert!(count("Passed") >= Some(CONFORMANCE_PASSED_MIN), "{summary}");
    assert!(output.status.success(), "{}\n{}", output.stdout, output.stderr);
    Ok(())
}

// ---- One directory, several registries

type StartPeer = fn(&Path) -> Result<PeerRegistry>;

#[tokio::test(flavor = "multi_thread")]
async fn debians_registry_and_ours_serve_each_others_directory() -> Result<()> {
    interchange(PeerRegistry::debian).await
}

#[tokio::test(flavor = "multi_thread")]
async fn distribution_v3_and_ours_serve_each_others_directory() -> Result<()> {
    interchange(PeerRegistry::distribution_v3).await
}

async fn interchange(start_peer: StartPeer) -> Result<()> {
    let dir = temp_dir();
    let root = dir.path().join("root");
    let mut ours = Registry::start(&root)?;
    let by_us = Content::push(&Client::new(&ours.url()), "team/ours", 1).await?;
    by_us.check(&Client::new(&ours.url()), &ours.reference("team/ours"), &dir.path().join("a")).await?;
    let half = Half::push(&Client::new(&ours.url()), "team/half").await?;
    ensure!(ours.terminate()?.success(), "{}", ours.log());

    let mut theirs = start_peer(&root)?;
    let at_theirs = Client::new(&theirs.url());
    by_us.check(&at_theirs, &theirs.reference("team/ours"), &dir.path().join("b")).await?;
    let by_them = Content::push(&at_theirs, "team/theirs", 2).await?;
    let their_half = Half::push(&at_theirs, "team/their-half").await?;
    theirs.terminate()?;

    ours.restart()?;
    let at_ours = Client::new(&ours.url());
    by_them.check(&at_ours, &ours.reference("team/theirs"), &dir.path().join("c")).await?;
    by_us.check(&at_ours, &ours.reference("team/ours"), &dir.path().join("d")).await?;
    half.finish(&at_ours).await?;
    their_half.finish(&at_ours).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_either_registry_changes_the_other_sees() -> Result<()> {
    const REPO: &str = "team/app";
    for start_peer in [PeerRegistry::debian as StartPeer, PeerRegistry::distribution_v3] {
        let dir = temp_dir();
        let mut ours = Registry::start(dir.path())?;
        let client = Client::new(&ours.url());
        let [one, two, three, four] =
            [1, 2, 3, 4].map(|seed| image(OCI_MANIFEST, &layers(seed, &[1000, 70_000])));
        one.push(&client, REPO, "latest").await?;
        one.push(&client, REPO, "stays").await?;
        two.push(&client, REPO, "doomed").await?;
        // Looked at, so that whatever may be remembered is.
        for tag in ["latest", "stays", "doomed"] {
            client.manifest_digest(REPO, tag).await?.context("pushed just now")?;
        }
        ours.terminate()?;

        // They move a tag, make one, and delete a manifest with its tag.
        let mut theirs = start_peer(dir.path())?;
        let peer = Client::new(&theirs.url());
        assert_eq!(peer.manifest_digest(REPO, "latest").await?, Some(one.digest()));
        three.push(&peer, REPO, "latest").await?;
        three.push(&peer, REPO, "theirs").await?;
        peer.delete(&format!("/v2/{REPO}/manifests/{}", two.digest())).await?;
        theirs.terminate()?;

        ours.restart()?;
        assert_eq!(client.tags(REPO).await?, ["latest", "stays", "theirs"]);
        for (tag, image) in [("latest", &three), ("stays", &one), ("theirs", &three)] {
            assert_eq!(client.manifest_digest(REPO, tag).await?, Some(image.digest()), "{tag}");
            image.check(&client, REPO).await?;
        }
        for gone in ["doomed", &two.digest()] {
            assert_eq!(client.manifest_digest(REPO, gone).await?, None, "{gone}");
        }

        // We move it back, make one of ours, and delete a tag alone; they see it while we still run.
        one.push(&client, REPO, "latest").await?;
        four.push(&client, REPO, "ours").await?;
        client.delete(&format!("/v2/{REPO}/manifests/theirs")).await?;
        let theirs = start_peer(dir.path())?;
        let peer = Client::new(&theirs.url());
        assert_eq!(peer.tags(REPO).await?, ["latest", "ours", "stays"]);
        for (tag, image) in [("latest", &one), ("ours", &four), ("stays", &one)] {
            assert_eq!(peer.manifest_digest(REPO, tag).await?, Some(image.digest()), "{tag}");
            image.check(&peer, REPO).await?;
        }
        assert_eq!(peer.manifest_digest(REPO, "theirs").await?, None);
        three.check(&peer, REPO).await?;
        // What changes under a running reader is seen at once, both ways.
        two.push(&client, REPO, "latest").await?;
        assert_eq!(peer.manifest_digest(REPO, "latest").await?, Some(two.digest()));
        four.push(&peer, REPO, "latest").await?;
        assert_eq!(client.manifest_digest(REPO, "latest").await?, Some(four.digest()));
        peer.delete(&format!("/v2/{REPO}/manifests/{}", four.digest())).await?;
        assert_eq!(client.manifest_digest(REPO, &four.digest()).await?, None);
        assert_eq!(client.tags(REPO).await?, ["stays"]);
    }
    Ok(())
}

/// Images of both kinds, an index over them, and blobs by sha512 where the registry takes them.
struct Content {
    repo: String,
    tags: BTreeMap<&'static str, Bytes>,
    images: [Image; 2],
    sha512: Vec<Bytes>,
}

impl Content {
    async fn push(client: &Client, repo: &str, seed: u64) -> Result<Self> {
        let layers = layers(seed, &[1, 512, 70_000, 3_000_000]);
        let images = [image(OCI_MANIFEST, &layers), image(DOCKER_MANIFEST, &layers[1..])];
        let mut tags = BTreeMap::new();
        for (image, names) in images.iter().zip([["oci", "v1.0-rc_1"], ["docker", "UPPER"]]) {
            for tag in names {
                image.push(client, repo, tag).await?;
                tags.insert(tag, image.manifest.clone());
            }
        }
        let descriptors = images.iter().zip(["amd64", "arm64"]).map(|(image, architecture)| {
            let mut descriptor = descriptor(image.media_type, &image.manifest);
            descriptor["platform"] = json!({"architecture": architecture, "os": "linux"});
            descriptor
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": descriptors.collect::<Vec<_>>(),
        });
        let index = Bytes::from(serde_json::to_vec_pretty(&index)?);
        client.put_manifest(repo, "index", OCI_INDEX, &index).await?.expect(201)?;
        tags.insert("index", index);
        let mut sha512 = Vec::new();
        for length in [100, 200_000] {
            let bytes = noise(length, seed + 100);
            if client.push_blob_as(repo, &digest_512(&bytes), &bytes).await?.status == 201 {
                sha512.push(bytes);
            }
        }
        // Ours does; the others may.
        ensure!(seed != 1 || sha512.len() == 2, "sha512 is refused");
        Ok(Self { repo: repo.to_owned(), tags, images, sha512 })
    }

    /// Pulls everything, by HTTP and by other people's clients.
    async fn check(&self, client: &Client, reference: &str, dir: &Path) -> Result<()> {
        let mut tags: Vec<_> = self.tags.keys().copied().collect();
        tags.sort_unstable();
        assert_eq!(client.tags(&self.repo).await?, tags);
        for (tag, manifest) in &self.tags {
            assert_eq!(client.manifest_digest(&self.repo, tag).await?, Some(digest(manifest)), "{tag}");
            let got = client.get(&format!("/v2/{}/manifests/{tag}", self.repo)).await?.expect(200)?;
            assert_eq!(got.body, manifest, "{tag}");
        }
        for image in &self.images {
            image.check(client, &self.repo).await?;
        }
        for bytes in &self.sha512 {
            let path = format!("/v2/{}/blobs/{}", self.repo, digest_512(bytes));
            assert!(client.get(&path).await?.expect(200)?.body == bytes, "{path}");
        }
        let crane = |args: &[&str]| run(&cmd(tool("crane")?, args));
        for (tag, manifest) in &self.tags {
            let named = format!("{reference}:{tag}");
            assert_eq!(crane(&["digest", &named])?.trim(), digest(manifest));
            let copy = dir.join(tag);
            let source = format!("docker://{named}");
            let target = format!("dir:{}", copy.display());
            std::fs::create_dir_all(&copy)?;
            run(&cmd(
                "skopeo",
                [
                    "copy",
                    "-q",
                    "--all",
                    "--preserve-digests",
                    "--src-tls-verify=false",
                    source.as_str(),
                    &target,
                ],
            ))?;
            assert_eq!(std::fs::read(copy.join("manifest.json"))?, *manifest, "{tag}");
            // It checks digests as it copies, and names the files by them.
            let images = self.images.iter().filter(|image| *tag == "index" || image.manifest == *manifest);
            for blob in images.flat_map(|image| image.blobs.iter()) {
                let file = copy.join(&digest(blob)["sha256:".len()..]);
                assert!(std::fs::read(&file)? == *blob, "{}", file.display());
            }
        }
        let layout = dir.join("crane");
        crane(&["pull", "--format=oci", &format!("{reference}:index"), utf8(&layout)])?;
        Ok(())
    }
}

/// An upload that is half done.
struct Half {
    session: String,
    bytes: Bytes,
    came: usize,
}

impl Half {
    async fn push(client: &Client, repo: &str) -> Result<Self> {
        let bytes = noise(1_500_000, 9);
        let session = client.begin(repo).await?;
        let came = 1_000_001;
        let patched = client.patch(&session, 0, bytes.slice(..came)).await?.expect(202)?;
        let session = patched.header("location").to_owned();
        // The others' sessions carry a token of their own in the query, which is not for us.
        let path = session.split('?').next().unwrap_or_default();
        let path = path.find("/v2/").map_or(path, |at| &path[at..]).to_owned();
        Ok(Self { session: path, bytes, came })
    }

    async fn finish(self, client: &Client) -> Result<()> {
        assert_eq!(client.offset(&self.session).await?, self.came);
        client.finish(&self.session, self.came, &self.bytes).await
    }
}

// ---- kill -9

/// What the registry has acknowledged.
#[derive(Default)]
struct Acknowledged {
    blobs: BTreeSet<(String, String)>,
    manifests: BTreeSet<(String, String)>,
    tags: BTreeMap<(String, String), Tag>,
}

/// What a tag names: the last that was acknowledged, or a push that was never answered.
#[derive(Default)]
struct Tag {
    named: Option<String>,
    perhaps: Option<String>,
}

impl Acknowledged {
    /// Adds what was acknowledged later.
    fn add(&mut self, later: Self) {
        self.blobs.extend(later.blobs);
        self.manifests.extend(later.manifests);
        for (name, Tag { named, perhaps }) in later.tags {
            let tag = self.tags.entry(name).or_default();
            tag.named = named.or(tag.named.take());
            tag.perhaps = perhaps;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_outlives_kill_9_and_nothing_half_is_seen() -> Result<()> {
    const ROUNDS: u64 = 12;
    const PUSHERS: u64 = 8;
    let dir = temp_dir();
    let mut registry = Registry::start(dir.path())?;
    let mut acknowledged = Acknowledged::default();
    for round in 0..ROUNDS {
        let images = Arc::new(AtomicU64::new(0));
        let client = Client::new(&registry.url());
        let pushers = (0..PUSHERS).map(|pusher| {
            tokio::spawn(push_until_killed(client.clone(), Arc::clone(&images), round, pusher))
        });
        let pushers: Vec<_> = pushers.collect();
        // Not before something is acknowledged; then at any moment of what goes on.
        let random = noise(2, round);
        let enough = 5 + u64::from(random[0]) % 40;
        eventually("images pushed", async || Ok(images.load(Ordering::Relaxed) >= enough)).await?;
        tokio::time::sleep(Duration::from_micros(u64::from(random[1]) * 100)).await;
        registry.kill9()?;
        for pusher in join_all(pushers).await {
            acknowledged.add(pusher??);
        }
        registry.restart()?;
        assert_blobs_are_whole(dir.path())?;
        assert_acknowledged(&client, &mut acknowledged).await?;
        assert_tags_resolve(&client, &acknowledged).await?;
        assert_eq!(std::fs::read_dir(dir.path().join("dvcr/tmp"))?.count(), 0);
    }
    println!("{} images, {} blobs", acknowledged.manifests.len(), acknowledged.blobs.len());
    Ok(())
}

/// Pushes image after image until the registry is gone, and returns what it acknowledged.
async fn push_until_killed(
    client: Client,
    images: Arc<AtomicU64>,
    round: u64,
    pusher: u64,
) -> Result<Acknowledged> {
    let mut acknowledged = Acknowledged::default();
    let repo = format!("crash/p{}", pusher % 3);
    for n in 0.. {
        let seed = (round << 32) + (pusher << 16) + n;
        let random = noise(8, seed);
        // Small ones go another way than large ones.
        let lengths = [usize::from(random[0]) * 300, usize::from(random[1]) * 1000 + 1];
        let image = image(OCI_MANIFEST, &layers(seed, &lengths));
        for (blob, way) in image.blobs.iter().zip(&random[3..]) {
            if is_gone(client.push_blob_some_way(&repo, blob, *way).await)? {
                return Ok(acknowledged);
            }
            acknowledged.blobs.insert((repo.clone(), digest(blob)));
        }
        // A tag of its own: nobody else moves it.
        let tag = format!("p{pusher}-{}", random[2] % 3);
        let name = (repo.clone(), tag.clone());
        acknowledged.tags.entry(name.clone()).or_default().perhaps = Some(image.digest());
        let put = client.put_manifest(&repo, &tag, OCI_MANIFEST, &image.manifest).await;
        if is_gone(put.and_then(|reply| reply.expect(201)))? {
            break;
        }
        acknowledged.manifests.insert((repo.clone(), image.digest()));
        acknowledged.tags.insert(name, Tag { named: Some(image.digest()), perhaps: None });
        images.fetch_add(1, Ordering::Relaxed);
    }
    Ok(acknowledged)
}

/// Tells whether a connection broke, as it does with a kill; any other failure is one.
fn is_gone<T>(done: Result<T>) -> Result<bool> {
    match done {
        Ok(_) => Ok(false),
        Err(error) if error.is::<reqwest::Error>() => Ok(true),
        Err(error) => Err(error),
    }
}

/// Checks that every file in place of a blob has the content its name says.
fn assert_blobs_are_whole(root: &Path) -> Result<()> {
    let mut blobs = 0;
    for file in files(&root.join("docker/registry/v2/blobs"))? {
        let hex = file.parent().and_then(Path::file_name).context("a blob lies in a directory")?;
        let content = Bytes::from(std::fs::read(&file)?);
        assert_eq!(digest(&content), format!("sha256:{}", hex.to_string_lossy()), "{}", file.display());
        blobs += 1;
    }
    ensure!(blobs > 0, "no blobs at all");
    Ok(())
}

/// Checks that all is there, and notes which tags were moved by a push that was not answered.
async fn assert_acknowledged(client: &Client, acknowledged: &mut Acknowledged) -> Result<()> {
    let blobs =
        acknowledged.blobs.iter().map(|(repo, digest)| (format!("/v2/{repo}/blobs/{digest}"), digest));
    let manifests = acknowledged.manifests.iter();
    let manifests = manifests.map(|(repo, digest)| (format!("/v2/{repo}/manifests/{digest}"), digest));
    for (path, expected) in blobs.chain(manifests) {
        let got = client.get(&path).await?.expect(200)?;
        assert_eq!(digest(&got.body), *expected, "{path}");
    }
    for ((repo, name), tag) in &mut acknowledged.tags {
        let found = client.manifest_digest(repo, name).await?;
        let fits = found == tag.named || (found.is_some() && found == tag.perhaps);
        assert!(fits, "{repo}:{name} names {found:?}, not {:?}, perhaps {:?}", tag.named, tag.perhaps);
        *tag = Tag { named: found, perhaps: None };
    }
    Ok(())
}

async fn assert_tags_resolve(client: &Client, acknowledged: &Acknowledged) -> Result<()> {
    let repos: BTreeSet<_> = acknowledged.manifests.iter().map(|(repo, _)| repo).collect();
    for repo in repos {
        for tag in client.tags(repo).await? {
            let got = client.get(&format!("/v2/{repo}/manifests/{tag}")).await?.expect(200)?;
            assert_eq!(digest(&got.body), got.header("docker-content-digest"), "{repo}:{tag}");
            let manifest: Value = serde_json::from_slice(&got.body)?;
            let layers = manifest["layers"].as_array().context("layers")?;
            for blob in layers.iter().chain([&manifest["config"]]) {
                let path = format!("/v2/{repo}/blobs/{}", blob["digest"].as_str().context("a digest")?);
                let found = client.send("HEAD", &path, &[], Bytes::new()).await?.expect(200)?;
                assert_eq!(found.header("content-length"), blob["size"].to_string(), "{path}");
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunked_upload_goes_on_after_kill_9_from_what_was_acknowledged() -> Result<()> {
    const CHUNK_BYTES: usize = 300_001;
    let dir = temp_dir();
    let mut registry = Registry::start(dir.path())?;
    let client = Client::new(&registry.url());
    let bytes = noise(6_000_000, 1);
    let session = client.begin("a/b").await?;
    let mut came = 0;
    for round in 0..5 {
        for _ in 0..2 {
            let chunk = bytes.slice(came..came + CHUNK_BYTES);
            client.patch(&session, came, chunk).await?.expect(202)?;
            came += CHUNK_BYTES;
        }
        // In the middle of the next one; how much of it has arrived differs.
        let sent = came + CHUNK_BYTES * round / 4;
        let (pieces, request) = client.patch_slowly(&session);
        pieces.send(bytes.slice(came..sent)).await?;
        let request = tokio::spawn(request);
        let working = format!("{}/metrics", registry.url());
        eventually("the chunk's beginning", async || {
            let text = client.http.get(&working).send().await?.text().await?;
            Ok(text.contains("dvcr_registry_uploads_in_progress 1"))
        })
        .await?;
        registry.kill9()?;
        assert!(request.await?.is_err(), "a chunk that was not sent to its end was acknowledged");
        drop(pieces);
        registry.restart()?;

        let offset = client.offset(&session).await?;
        assert!((came..=sent).contains(&offset), "{offset} bytes, {came} acknowledged, {sent} sent");
        let refused = client.patch(&session, offset + 1, Bytes::from_static(b"x")).await?.expect(416)?;
        assert_eq!(refused.header("range"), format!("0-{}", offset - 1));
        came = offset;
    }
    client.finish(&session, came, &bytes).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_stream_killed_with_9_goes_on_from_a_saved_state() -> Result<()> {
    const SAVED_EVERY_BYTES: usize = 64 << 20;
    let dir = temp_dir();
    let mut registry = Registry::start(dir.path())?;
    let client = Client::new(&registry.url());
    let piece = noise(1 << 20, 1);
    let total = SAVED_EVERY_BYTES + (20 << 20);
    let session = client.begin("a/b").await?;
    let (pieces, request) = client.patch_slowly(&session);
    let request = tokio::spawn(request);
    for _ in 0..total / piece.len() {
        pieces.send(piece.clone()).await?;
    }
    eventually("a saved state", async || Ok(client.offset(&session).await? >= SAVED_EVERY_BYTES)).await?;
    registry.kill9()?;
    assert!(request.await?.is_err());
    registry.restart()?;

    let offset = client.offset(&session).await?;
    assert!((SAVED_EVERY_BYTES..=total).contains(&offset), "{offset}");
    let bytes = Bytes::from(piece.repeat(total / piece.len()));
    client.finish(&session, offset, &bytes).await
}

// ---- The end

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_a_push_end_and_cuts_one_that_stalls_without_harm() -> Result<()> {
    let dir = temp_dir();
    let registry = Registry::start(dir.path())?;
    let client = Client::new(&registry.url());
    let (address, bytes) = (registry.address(), noise(4_000_000, 1));
    let pushed = image(OCI_MANIFEST, &layers(1, &[1000]));
    pushed.push(&client, "a/b", "tag").await?;
    let half = bytes.len() / 2;
    let (moving, stalled) = (client.begin("a/b").await?, client.begin("a/b").await?);
    let untouched = client.begin("a/b").await?;
    let (pieces, moving_request) = client.patch_slowly(&moving);
    let (never, stalled_request) = client.patch_slowly(&stalled);
    let (moving_request, stalled_request) = (tokio::spawn(moving_request), tokio::spawn(stalled_request));
    pieces.send(bytes.slice(..half)).await?;
    never.send(bytes.slice(..half)).await?;
    let metrics = format!("{}/metrics", registry.url());
    eventually("both halves", async || {
        let text = client.http.get(&metrics).send().await?.text().await?;
        let received = 2 * half as u64 + pushed.blobs.iter().map(|blob| blob.len() as u64).sum::<u64>();
        let received = received + pushed.manifest.len() as u64;
        Ok(text.lines().any(|line| line == format!("dvcr_registry_received_bytes_total {received}")))
    })
    .await?;

    let ended = tokio::task::spawn_blocking(move || {
        let mut registry = registry;
        registry.terminate().map(|status| (registry, status))
    });
    eventually("no more connections", async || Ok(!accepts(address))).await?;
    pieces.send(bytes.slice(half..)).await?;
    drop(pieces);
    let finished = moving_request.await??.expect(202)?;
    assert_eq!(finished.header("range"), format!("0-{}", bytes.len() - 1));
    let (mut registry, status) = ended.await??;
    assert_eq!(status.code(), Some(0), "{}", registry.log());
    assert!(!stalled_request.await?.is_ok_and(|reply| reply.status < 400), "half a stream was acknowledged");
    drop(never);

    registry.restart()?;
    pushed.check(&client, "a/b").await?;
    client.finish(&moving, bytes.len(), &bytes).await?;
    // What had come of the other is kept too.
    assert_eq!(client.offset(&stalled).await?, half);
    client.finish(&stalled, half, &bytes).await?;
    client.finish(&untouched, 0, &bytes).await
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_does_not_wait_for_idle_connections() -> Result<()> {
    let dir = temp_dir();
    let mut registry = Registry::start(dir.path())?;
    let client = Client::new(&registry.url());
    // Kept open by the client; and one that never says a word.
    client.get("/v2/").await?.expect(200)?;
    let silent = TcpStream::connect(registry.address())?;
    client.get("/v2/").await?.expect(200)?;
    let started = Instant::now();
    assert_eq!(registry.terminate()?.code(), Some(0), "{}", registry.log());
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    drop(silent);
    Ok(())
}

fn accepts(address: SocketAddr) -> bool {
    TcpStream::connect(address).is_ok()
}

// ---- What the tests push

/// An image: config and layers, and the manifest that names them.
struct Image {
    media_type: &'static str,
    blobs: Vec<Bytes>,
    manifest: Bytes,
}

fn image(media_type: &'static str, layers: &[Bytes]) -> Image {
    let diff_ids: Vec<_> = layers.iter().map(digest).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = Bytes::from(config.to_string());
    let (config_type, layer_type) = match media_type {
        DOCKER_MANIFEST => {
            ("application/vnd.docker.container.image.v1+json", "application/vnd.docker.image.rootfs.diff.tar")
        }
        _ => ("application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar"),
    };
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": descriptor(config_type, &config),
        "layers": layers.iter().map(|layer| descriptor(layer_type, layer)).collect::<Vec<_>>(),
    });
    let blobs = layers.iter().cloned().chain([config]).collect();
    Image { media_type, blobs, manifest: manifest.to_string().into() }
}

impl Image {
    fn digest(&self) -> String {
        digest(&self.manifest)
    }

    async fn push(&self, client: &Client, repo: &str, tag: &str) -> Result<()> {
        for (blob, way) in self.blobs.iter().zip(0..) {
            client.push_blob_some_way(repo, blob, way).await?;
        }
        client.put_manifest(repo, tag, self.media_type, &self.manifest).await?.expect(201).map(drop)
    }

    /// Checks that everything can be pulled by digest and has its content.
    async fn check(&self, client: &Client, repo: &str) -> Result<()> {
        let got = client.get(&format!("/v2/{repo}/manifests/{}", self.digest())).await?.expect(200)?;
        assert_eq!(got.body, self.manifest);
        assert_eq!(got.header("content-type"), self.media_type);
        for blob in &self.blobs {
            let path = format!("/v2/{repo}/blobs/{}", digest(blob));
            assert!(client.get(&path).await?.expect(200)?.body == blob, "{path}");
        }
        Ok(())
    }
}

fn layers(seed: u64, lengths: &[usize]) -> Vec<Bytes> {
    lengths.iter().zip(seed * 1000..).map(|(length, seed)| noise(*length, seed)).collect()
}

fn descriptor(media_type: &str, bytes: &Bytes) -> Value {
    json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len()})
}

fn digest(bytes: &Bytes) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

fn digest_512(bytes: &Bytes) -> String {
    format!("sha512:{}", hex(&Sha512::digest(bytes)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes without a pattern.
fn noise(length: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.push(path),
        }
    }
    Ok(found)
}

/// Polls until the work says yes.
async fn eventually(what: &str, mut work: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + STATE_TIMEOUT;
    while !work().await? {
        if Instant::now() >= deadline {
            bail!("waited {} s in vain for {what}", STATE_TIMEOUT.as_secs());
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

// ---- A thin client

#[derive(Clone)]
struct Client {
    http: reqwest::Client,
    url: String,
}

struct Reply {
    request: String,
    status: u16,
    headers: HeaderMap,
    body: Bytes,
}

impl Reply {
    fn expect(self, status: u16) -> Result<Self> {
        if self.status != status {
            bail!(
                "{} is {}, not {status}: {}",
                self.request,
                self.status,
                String::from_utf8_lossy(&self.body)
            );
        }
        Ok(self)
    }

    /// The value of a header; empty if there is none.
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

impl Client {
    fn new(url: &str) -> Self {
        Self { http: reqwest::Client::new(), url: url.to_owned() }
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<reqwest::Body>,
    ) -> Result<Reply> {
        // The others' locations are whole URLs.
        let url = if path.starts_with('/') { format!("{}{path}", self.url) } else { path.to_owned() };
        let mut request = self.http.request(method.parse()?, url).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Ok(Reply { request: format!("{method} {path}"), status, headers, body: response.bytes().await? })
    }

    async fn get(&self, path: &str) -> Result<Reply> {
        // Distribution answers by what is accepted.
        let accept = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST].join(", ");
        self.send("GET", path, &[("accept", &accept)], Bytes::new()).await
    }

    async fn delete(&self, path: &str) -> Result<()> {
        self.send("DELETE", path, &[], Bytes::new()).await?.expect(202).map(drop)
    }

    async fn tags(&self, repo: &str) -> Result<Vec<String>> {
        let reply = self.get(&format!("/v2/{repo}/tags/list")).await?.expect(200)?;
        let list: Value = serde_json::from_slice(&reply.body)?;
        let mut tags: Vec<String> = serde_json::from_value(list["tags"].clone())?;
        // Distribution 2.8 lists them in the order of its directory.
        tags.sort_unstable();
        Ok(tags)
    }

    async fn manifest_digest(&self, repo: &str, reference: &str) -> Result<Option<String>> {
        let reply = self.get(&format!("/v2/{repo}/manifests/{reference}")).await?;
        if reply.status == 404 {
            return Ok(None);
        }
        Ok(Some(reply.expect(200)?.header("docker-content-digest").to_owned()))
    }

    async fn put_manifest(&self, repo: &str, tag: &str, media_type: &str, bytes: &Bytes) -> Result<Reply> {
        let path = format!("/v2/{repo}/manifests/{tag}");
        self.send("PUT", &path, &[("content-type", media_type)], bytes.clone()).await
    }

    /// Begins an upload and returns where it goes on.
    async fn begin(&self, repo: &str) -> Result<String> {
        let path = format!("/v2/{repo}/blobs/uploads/");
        let begun = self.send("POST", &path, &[], Bytes::new()).await?.expect(202)?;
        Ok(begun.header("location").to_owned())
    }

    async fn patch(&self, session: &str, first: usize, chunk: Bytes) -> Result<Reply> {
        let range = format!("{first}-{}", first + chunk.len() - 1);
        let headers = [("content-range", range.as_str()), ("content-type", "application/octet-stream")];
        self.send("PATCH", session, &headers, chunk).await
    }

    /// Streams what is sent through a channel, for as long as it is open.
    fn patch_slowly(
        &self,
        session: &str,
    ) -> (mpsc::Sender<Bytes>, impl Future<Output = Result<Reply>> + Send + use<>) {
        let (sender, receiver) = mpsc::channel::<Bytes>(4);
        let pieces = futures_util::stream::unfold(receiver, async |mut receiver| {
            let piece = receiver.recv().await?;
            Some((Ok::<_, std::io::Error>(piece), receiver))
        });
        let (client, session) = (self.clone(), session.to_owned());
        (sender, async move { client.send("PATCH", &session, &[], reqwest::Body::wrap_stream(pieces)).await })
    }

    /// How many bytes of an upload the registry has.
    async fn offset(&self, session: &str) -> Result<usize> {
        let state = self.get(session).await?.expect(204)?;
        match state.header("range") {
            "0-0" => Ok(0),
            range => Ok(range.strip_prefix("0-").context("a range")?.parse::<usize>()? + 1),
        }
    }

    /// Sends the rest of an upload, ends it, and compares what is pulled.
    async fn finish(&self, session: &str, came: usize, bytes: &Bytes) -> Result<()> {
        let put = format!("{session}?digest={}", digest(bytes));
        let reply = self.send("PUT", &put, &[], bytes.slice(came..)).await?.expect(201)?;
        let pulled = self.get(reply.header("location")).await?.expect(200)?;
        ensure!(pulled.body == bytes, "{session} ended in other bytes");
        Ok(())
    }

    async fn push_blob_as(&self, repo: &str, digest: &str, bytes: &Bytes) -> Result<Reply> {
        let session = self.begin(repo).await?;
        let mark = if session.contains('?') { '&' } else { '?' };
        let headers = [("content-type", "application/octet-stream")];
        self.send("PUT", &format!("{session}{mark}digest={digest}"), &headers, bytes.clone()).await
    }

    /// Pushes a blob in one of the ways there are.
    async fn push_blob_some_way(&self, repo: &str, bytes: &Bytes, way: u8) -> Result<()> {
        let digest = digest(bytes);
        if way.is_multiple_of(2) || bytes.len() < 2 {
            return self.push_blob_as(repo, &digest, bytes).await?.expect(201).map(drop);
        }
        let mut session = self.begin(repo).await?;
        let mut came = 0;
        for chunk in bytes.chunks(bytes.len().div_ceil(usize::from(way % 3) + 1)) {
            let patched = self.patch(&session, came, bytes.slice_ref(chunk)).await?.expect(202)?;
            session = patched.header("location").to_owned();
            came += chunk.len();
        }
        let mark = if session.contains('?') { '&' } else { '?' };
        let path = format!("{session}{mark}digest={digest}");
        self.send("PUT", &path, &[], Bytes::new()).await?.expect(201).map(drop)
    }
}
