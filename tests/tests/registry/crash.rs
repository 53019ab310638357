//! kill -9: what was acknowledged stays, and nothing half is ever seen.

use crate::support::{Client, OCI_MANIFEST, digest, eventually, image, layers, noise};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use dvcr_tests::{Registry, temp_dir};
use futures_util::future::join_all;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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
        // One that ended already has failed, and tells why below.
        let pushed = async || {
            let failed = pushers.iter().any(|pusher| pusher.is_finished());
            Ok(failed || images.load(Ordering::Relaxed) >= enough)
        };
        eventually("images pushed", pushed).await?;
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
