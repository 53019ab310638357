//! The pull-through cache: one fetch for many, nothing wrong served or kept, upstreams that fail, what is kept and for
//! how long.

mod relay;
#[path = "../registry/support.rs"]
#[allow(dead_code, reason = "made for the tests of the registry")]
mod support;

use anyhow::{Context, Result, ensure};
use axum::http::Method;
use bytes::Bytes;
use dvcr_tests::{PeerRegistry, Registry, TempDir, cmd, dvcr, run, run_output, temp_dir, tool, utf8};
use futures_util::future::try_join_all;
use relay::Relay;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use support::{Client, DOCKER_MANIFEST, Image, OCI_MANIFEST, digest, eventually, image, layers, noise};

/// A registry that has things, a relay before it, and one that fetches them by way of the relay.
struct Setup {
    _dir: TempDir,
    _upstream: Registry,
    origin: Client,
    relay: Relay,
    cache: Registry,
    client: Client,
}

impl Setup {
    /// `more` is said of the upstream in the file of settings; `args` are further arguments of the cache.
    async fn new(more: &str, args: &[&str]) -> Result<Self> {
        let dir = temp_dir();
        let upstream = Registry::start(&dir.path().join("upstream"))?;
        let relay = Relay::start(&upstream.url()).await?;
        let cache = start_cache(dir.path(), &relay.url(), more, args)?;
        let (origin, client) = (Client::new(&upstream.url()), Client::new(&cache.url()));
        Ok(Self { _dir: dir, _upstream: upstream, origin, relay, cache, client })
    }

    /// Pushes an image to the upstream.
    async fn push(&self, repo: &str, tag: &str, seed: u64, lengths: &[usize]) -> Result<Image> {
        let pushed = image(OCI_MANIFEST, &layers(seed, lengths));
        pushed.push(&self.origin, repo, tag).await?;
        Ok(pushed)
    }

    async fn metric(&self, name: &str) -> Result<u64> {
        let text = self.client.get("/metrics").await?.expect(200)?.body;
        let text = String::from_utf8_lossy(&text).into_owned();
        let name = format!("dvcr_registry_cache_{name}{{prefix=\"up/\"}} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&name)).with_context(|| name.clone())?;
        Ok(value.parse()?)
    }

    fn v2(&self) -> PathBuf {
        self.cache.root().join("docker/registry/v2")
    }

    fn blob_file(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.v2().join(format!("blobs/sha256/{}/{hex}/data", &hex[..2]))
    }

    fn layer_link(&self, repo: &str, digest: &str) -> PathBuf {
        self.v2().join(format!("repositories/{repo}/_layers/{}/link", digest.replace(':', "/")))
    }

    /// Whether the directory shows nothing of a blob.
    fn is_nowhere(&self, repo: &str, digest: &str) -> bool {
        !self.blob_file(digest).exists() && !self.layer_link(repo, digest).exists()
    }
}

fn start_cache(dir: &Path, url: &str, more: &str, args: &[&str]) -> Result<Registry> {
    let file = dir.join("cache.yaml");
    let mut text = format!("cache:\n  upstreams:\n    - prefix: up/\n      url: {url}\n");
    for line in more.lines().map(str::trim).filter(|line| !line.is_empty()) {
        text += &format!("      {line}\n");
    }
    std::fs::write(&file, text)?;
    Registry::start_with(&dir.join("cache"), &[&["--config", utf8(&file)], args].concat())
}

fn blob_path(repo: &str, bytes: &Bytes) -> String {
    format!("/v2/{repo}/blobs/{}", digest(bytes))
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_clients_cost_one_fetch_and_have_the_beginning_before_the_end_has_come() -> Result<()> {
    let setup = Setup::new("", &[]).await?;
    let pushed = setup.push("a/b", "v1", 1, &[64 << 20]).await?;
    let blob = pushed.blobs[0].clone();
    let (path, held) = (blob_path("up/a/b", &blob), 16 << 20);
    setup.relay.hold_after(held);
    let (begun, mut begins) = tokio::sync::mpsc::channel(20);
    let pulls = (0..20).map(|_| {
        let (client, path, begun) = (setup.client.clone(), path.clone(), begun.clone());
        let url = format!("{}{path}", setup.cache.url());
        tokio::spawn(async move {
            let mut response = client.http.get(url).send().await?.error_for_status()?;
            let mut body = Vec::new();
            while let Some(bytes) = response.chunk().await? {
                if body.is_empty() {
                    begun.send(()).await?;
                }
                body.extend_from_slice(&bytes);
            }
            anyhow::Ok(body)
        })
    });
    let pulls: Vec<_> = pulls.collect();
    for _ in 0..20 {
        tokio::time::timeout(Duration::from_secs(60), begins.recv()).await?.context("a client ended")?;
    }
    assert_eq!(setup.metric("fetches_in_progress").await?, 1);
    // A part that has come is had at once, and one that has not is waited for.
    let part = setup.client.send("GET", &path, &[("range", "bytes=1000-1999")], Bytes::new()).await?;
    assert_eq!((part.status, part.header("content-range")), (206, "bytes 1000-1999/67108864"));
    assert_eq!(part.body, blob[1000..2000]);
    let (client, url) = (setup.client.clone(), path.clone());
    let end =
        tokio::spawn(
            async move { client.send("GET", &url, &[("range", "bytes=-1000")], Bytes::new()).await },
        );
    assert!(setup.is_nowhere("up/a/b", &digest(&blob)));

    setup.relay.release();
    for pull in pulls {
        assert!(pull.await?? == blob);
    }
    let end = end.await??.expect(206)?;
    assert_eq!(end.body, blob[blob.len() - 1000..]);
    let asked = setup.relay.asked(Method::GET, "/blobs/");
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert_eq!(asked[0].path, blob_path("a/b", &blob));
    // From now on it is a blob like any other.
    assert!(setup.client.get(&path).await?.expect(200)?.body == blob);
    assert_eq!(
        setup.client.send("HEAD", &path, &[], Bytes::new()).await?.header("content-length"),
        "67108864"
    );
    assert_eq!(setup.relay.asked_in_all(), 1);
    assert_eq!(setup.metric("fetched_bytes_total").await?, blob.len() as u64);
    assert_eq!(setup.metric("fetches_in_progress").await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_content_is_never_complete_and_never_kept() -> Result<()> {
    let setup = Setup::new("bytes-max: 8M", &[]).await?;
    // Held in memory, streamed while it is stored, and passed on because it is too large.
    let pushed = setup.push("a", "v1", 2, &[1000, 3 << 20, 12 << 20]).await?;
    setup.relay.corrupt(true);
    for blob in &pushed.blobs[..3] {
        let url = format!("{}{}", setup.cache.url(), blob_path("up/a", blob));
        let got = async { setup.client.http.get(&url).send().await?.error_for_status()?.bytes().await };
        assert!(got.await.is_err(), "{} wrong bytes came as a whole", blob.len());
        eventually("the end of the fetch", async || Ok(setup.metric("fetches_in_progress").await? == 0))
            .await?;
        assert!(setup.is_nowhere("up/a", &digest(blob)));
    }
    let uploads = setup.v2().join("repositories/up/a/_uploads");
    assert_eq!(std::fs::read_dir(uploads).map_or(0, |entries| entries.count()), 0);

    setup.relay.corrupt(false);
    pushed.check(&setup.client, "up/a").await?;
    assert!(setup.is_nowhere("up/a", &digest(&pushed.blobs[2])), "more is kept than may be");
    assert!(!setup.is_nowhere("up/a", &digest(&pushed.blobs[1])));
    // A part of what is passed on.
    let path = blob_path("up/a", &pushed.blobs[2]);
    let part =
        setup.client.send("GET", &path, &[("range", "bytes=5000-5999")], Bytes::new()).await?.expect(206)?;
    assert_eq!(part.body, pushed.blobs[2][5000..6000]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_room_is_no_reason_not_to_serve() -> Result<()> {
    let setup = Setup::new("", &["--reserve-space", "900T"]).await?;
    let pushed = setup.push("a", "v1", 90, &[1000, 3 << 20]).await?;
    for _ in 0..2 {
        let got = setup.client.get("/v2/up/a/manifests/v1").await?.expect(200)?;
        assert_eq!(got.body, pushed.manifest);
        pushed.check(&setup.client, "up/a").await?;
    }
    assert!(pushed.blobs.iter().all(|blob| setup.is_nowhere("up/a", &digest(blob))));
    let path = blob_path("up/a", &pushed.blobs[1]);
    let end = setup.client.send("GET", &path, &[("range", "bytes=-10")], Bytes::new()).await?.expect(206)?;
    assert_eq!(end.body, pushed.blobs[1][(3 << 20) - 10..]);
    setup.relay.corrupt(true);
    let url = format!("{}{path}", setup.cache.url());
    let got = async { setup.client.http.get(&url).send().await?.error_for_status()?.bytes().await };
    assert!(got.await.is_err(), "wrong bytes came as a whole");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_breaks_off_is_gone_on_with_where_it_was() -> Result<()> {
    let setup = Setup::new("", &[]).await?;
    let pushed = setup.push("a", "v1", 3, &[16 << 20]).await?;
    let blob = &pushed.blobs[0];
    setup.relay.cut_next_after(5 << 20);
    assert!(setup.client.get(&blob_path("up/a", blob)).await?.expect(200)?.body == blob);
    let asked = setup.relay.asked(Method::GET, "/blobs/");
    let ranges: Vec<_> = asked.iter().filter_map(|asked| asked.range.clone()).collect();
    assert_eq!((asked.len(), ranges.len()), (2, 1), "{asked:?}");
    let begin: usize =
        ranges[0].trim_start_matches("bytes=").split('-').next().context("a range")?.parse()?;
    assert!((1..=5 << 20).contains(&begin), "{ranges:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_follow_the_upstream_and_stand_in_for_one_that_is_down() -> Result<()> {
    let setup = Setup::new("tag-freshness: 0s", &[]).await?;
    let first = setup.push("a", "v1", 4, &[1000]).await?;
    let path = "/v2/up/a/manifests/v1";
    let tag = async || setup.client.get(path).await;
    let got = tag().await?.expect(200)?;
    assert_eq!((got.body.clone(), got.header("content-type")), (first.manifest.clone(), OCI_MANIFEST));
    assert_eq!(got.headers("warning"), [""; 0]);
    first.check(&setup.client, "up/a").await?;

    // Asked again, once for all who want it, and fetched again only when it names something else.
    let before = setup.relay.asked(Method::GET, "/manifests/").len();
    try_join_all((0..20).map(|_| tag())).await?;
    assert_eq!(setup.relay.asked(Method::GET, "/manifests/").len(), before);
    let second = setup.push("a", "v1", 5, &[1000]).await?;
    assert_eq!(tag().await?.expect(200)?.body, second.manifest);

    for status in [503, 429, 500] {
        setup.relay.answer_all_with(Some(status));
        let got = tag().await?.expect(200)?;
        assert_eq!(got.body, second.manifest);
        let warnings = ["110 - \"Response is Stale\"", "111 - \"Revalidation Failed\""];
        assert_eq!(got.headers("warning"), warnings, "{status}");
    }
    assert!(setup.metric("stale_total").await? >= 3);
    // What is not here cannot be had, and is not said to be nowhere.
    setup.client.get("/v2/up/a/manifests/v2").await?.expect(502)?;
    setup.client.get(&blob_path("up/a", &noise(10, 99))).await?.expect(502)?;
    first.check(&setup.client, "up/a").await?;

    setup.relay.answer_all_with(None);
    eventually("an answer without a warning", async || Ok(tag().await?.headers("warning").is_empty()))
        .await?;
    setup.origin.delete("/v2/a/manifests/v1").await?;
    let gone = tag().await?.expect(404)?;
    assert!(String::from_utf8_lossy(&gone.body).contains("MANIFEST_UNKNOWN"));
    assert_eq!(setup.client.tags("up/a").await?, [""; 0]);
    // Who knows its digest has it still.
    first.check(&setup.client, "up/a").await?;
    setup.client.get("/v2/up/nowhere/manifests/v1").await?.expect(404)?;
    assert!(!setup.v2().join("repositories/up/nowhere").exists(), "asking leaves a trace");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_is_fresh_costs_no_question() -> Result<()> {
    let setup = Setup::new("tag-freshness: 1h", &[]).await?;
    let pushed = setup.push("a", "v1", 6, &[1000]).await?;
    let get = async |path: &str| anyhow::Ok(setup.client.get(path).await?.expect(200)?.body);
    try_join_all((0..20).map(|_| get("/v2/up/a/manifests/v1"))).await?;
    assert_eq!(setup.relay.asked_in_all(), 1);
    setup.push("a", "v1", 7, &[1000]).await?;
    assert_eq!(get("/v2/up/a/manifests/v1").await?, pushed.manifest);
    // Who purges the tag has it fetched again.
    setup.client.delete("/v2/up/a/manifests/v1").await?;
    assert_ne!(get("/v2/up/a/manifests/v1").await?, pushed.manifest);
    assert!(setup.metric("hits_total").await? >= 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn crane_and_skopeo_pull_through_and_go_on_without_the_upstream() -> Result<()> {
    let dir = temp_dir();
    let mut upstream = PeerRegistry::distribution_v3(&dir.path().join("upstream"))?;
    let origin = Client::new(&upstream.url());
    for (media_type, tag, seed) in [(OCI_MANIFEST, "oci", 8), (DOCKER_MANIFEST, "docker", 9)] {
        image(media_type, &layers(seed, &[100_000, 3 << 20])).push(&origin, "library/app", tag).await?;
    }
    let cache = start_cache(dir.path(), &upstream.url(), "remote-prefix: library/\ntag-freshness: 0s", &[])?;
    let pull = |round: usize| -> Result<()> {
        for tag in ["oci", "docker"] {
            let reference = cache.reference(&format!("up/app:{tag}"));
            let to = dir.path().join(format!("{tag}-{round}"));
            run(&cmd(tool("crane")?, ["pull", "--format=oci", &reference, utf8(&to)]))?;
            let mut skopeo = cmd("skopeo", ["copy", "-q", "--src-tls-verify=false"]);
            skopeo.arg(format!("docker://{reference}")).arg(format!("dir:{}-skopeo", to.display()));
            run(&skopeo)?;
        }
        Ok(())
    };
    tokio::task::block_in_place(|| pull(1))?;
    upstream.terminate()?;
    tokio::task::block_in_place(|| pull(2))?;
    let client = Client::new(&cache.url());
    assert_eq!(client.tags("up/app").await?, ["docker", "oci"]);
    let catalog = client.get("/v2/_catalog").await?.expect(200)?;
    assert_eq!(catalog.body, r#"{"repositories":["up/app"]}"#);
    // The collector finds no garbage, and a check nothing that is missing.
    let root = utf8(cache.root());
    run(&cmd(dvcr()?, ["registry", "gc", "--root", root]))?;
    run(&cmd(dvcr()?, ["registry", "check", "--root", root]))?;
    tokio::task::block_in_place(|| pull(3))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_only_partly_here_is_no_fault_and_no_garbage() -> Result<()> {
    let setup = Setup::new("", &["--gc-grace", "1s"]).await?;
    let pushed = setup.push("a", "v1", 10, &[1000, 2000]).await?;
    setup.client.get("/v2/up/a/manifests/v1").await?.expect(200)?;
    setup.client.get(&blob_path("up/a", &pushed.blobs[0])).await?.expect(200)?;
    let asked = setup.relay.asked_in_all();
    age(setup.cache.root())?;
    let root = utf8(setup.cache.root());
    let gc = run(&cmd(dvcr()?, ["registry", "gc", "--root", root, "--output", "json"]))?;
    assert!(gc.contains("\"removed-blobs\": 0") && gc.contains("\"removed-links\": 0"), "{gc}");
    run(&cmd(dvcr()?, ["registry", "check", "--root", root]))?;
    setup.client.get("/v2/up/a/manifests/v1").await?.expect(200)?;
    setup.client.get(&blob_path("up/a", &pushed.blobs[0])).await?.expect(200)?;
    assert_eq!(setup.relay.asked_in_all(), asked);
    pushed.check(&setup.client, "up/a").await
}

/// Makes everything in a directory an hour older than it is.
fn age(root: &Path) -> Result<()> {
    for entry in std::fs::read_dir(root)? {
        let (path, kind) = entry.and_then(|entry| Ok((entry.path(), entry.file_type()?)))?;
        if kind.is_dir() {
            age(&path)?;
        } else if kind.is_file() {
            let file = std::fs::File::options().write(true).open(&path)?;
            let then = file.metadata()?.modified()? - Duration::from_secs(3600);
            file.set_modified(then.max(SystemTime::UNIX_EPOCH))?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_used_for_longest_goes_and_others_keep_what_they_share() -> Result<()> {
    let setup = Setup::new("bytes-max: 4M", &[]).await?;
    let mut images = Vec::new();
    for (seed, name) in (20..).zip(["one", "two", "three", "four"]) {
        images.push((name, setup.push(name, "v1", seed, &[1 << 20]).await?));
    }
    let pull = async |name: &str, image: &Image| {
        setup.client.get(&format!("/v2/up/{name}/manifests/v1")).await?.expect(200)?;
        image.check(&setup.client, &format!("up/{name}")).await
    };
    for (name, image) in &images[..3] {
        pull(name, image).await?;
        age(&setup.cache.root().join("docker"))?;
    }
    // A repository of ours has a blob of the oldest, which it did not bring.
    let shared = digest(&images[0].1.blobs[0]);
    let mount = format!("/v2/mine/app/blobs/uploads/?mount={shared}&from=up/one");
    setup.client.send("POST", &mount, &[], Bytes::new()).await?.expect(201)?;
    age(&setup.cache.root().join("docker"))?;
    // The second is used again, so that the first and then the third are the oldest.
    let (_, second) = &images[1];
    second.check(&setup.client, "up/two").await?;
    let (name, fourth) = &images[3];
    pull(name, fourth).await?;
    eventually("the oldest to go", async || {
        Ok(!setup.layer_link("up/one", &shared).exists() && setup.metric("stored_bytes").await? <= 4 << 20)
    })
    .await?;
    assert!(setup.metric("evicted_bytes_total").await? >= 1 << 20);
    let asked = setup.relay.asked_in_all();
    second.check(&setup.client, "up/two").await?;
    fourth.check(&setup.client, "up/four").await?;
    assert_eq!(setup.relay.asked_in_all(), asked, "what was used last is gone");
    let ours = setup.client.get(&format!("/v2/mine/app/blobs/{shared}")).await?.expect(200)?;
    assert_eq!(ours.body, images[0].1.blobs[0]);

    // What nobody else has is gone from the disk, too, not only from the repository.
    let third = digest(&images[2].1.blobs[0]);
    for (seed, name) in (30..).zip(["five", "six"]) {
        age(&setup.cache.root().join("docker"))?;
        let image = setup.push(name, "v1", seed, &[1 << 20]).await?;
        pull(name, &image).await?;
        pull("two", second).await?;
    }
    eventually("the next to go", async || Ok(setup.is_nowhere("up/three", &third))).await?;
    // What has gone comes again when it is wanted.
    pull("three", &images[2].1).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_used_is_known_after_a_restart_and_pinned_tags_stay() -> Result<()> {
    let dir = temp_dir();
    let upstream = Registry::start(&dir.path().join("upstream"))?;
    let origin = Client::new(&upstream.url());
    let images: Vec<_> = (40..44).map(|seed| image(OCI_MANIFEST, &layers(seed, &[1 << 20]))).collect();
    for (image, tag) in images.iter().zip(["a", "b", "c", "d"]) {
        image.push(&origin, "app", tag).await?;
    }
    let mut cache = start_cache(dir.path(), &upstream.url(), "bytes-max: 4M", &[])?;
    // In force after the restart.
    let mut text = std::fs::read_to_string(dir.path().join("cache.yaml"))?;
    text += "rules:\n  pinned:\n    - repositories: up/app\n      tags: a\n";
    std::fs::write(dir.path().join("cache.yaml"), text)?;
    let client = Client::new(&cache.url());
    for (image, tag) in images.iter().zip(["a", "b", "c"]) {
        client.get(&format!("/v2/up/app/manifests/{tag}")).await?.expect(200)?;
        image.check(&client, "up/app").await?;
        age(&cache.root().join("docker"))?;
    }
    images[1].check(&client, "up/app").await?;
    ensure!(cache.terminate()?.success(), "{}", cache.log());
    cache.restart()?;
    images[3].check(&client, "up/app").await?;
    let link = |image: &Image| {
        let digest = digest(&image.blobs[0]).replace(':', "/");
        cache.root().join(format!("docker/registry/v2/repositories/up/app/_layers/{digest}/link"))
    };
    eventually("the oldest to go", async || Ok(!link(&images[2]).exists())).await?;
    assert!(link(&images[0]).exists(), "a pinned image is gone");
    assert!(link(&images[1]).exists(), "what was used last before the restart is gone");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_in_the_middle_of_a_fetch_leaves_nothing_to_be_seen() -> Result<()> {
    let mut setup = Setup::new("", &[]).await?;
    let pushed = setup.push("a", "v1", 50, &[16 << 20]).await?;
    let blob = pushed.blobs[0].clone();
    setup.relay.hold_after(8 << 20);
    let url = format!("{}{}", setup.cache.url(), blob_path("up/a", &blob));
    let mut response = setup.client.http.get(&url).send().await?.error_for_status()?;
    response.chunk().await?.context("the beginning")?;
    setup.cache.kill9()?;
    assert!(response.bytes().await.is_err());
    setup.cache.restart()?;
    assert!(setup.is_nowhere("up/a", &digest(&blob)));
    let catalog = setup.client.get("/v2/_catalog").await?.expect(200)?;
    assert_eq!(catalog.body, r#"{"repositories":[]}"#);
    setup.relay.release();
    assert!(setup.client.get(&blob_path("up/a", &blob)).await?.expect(200)?.body == blob);

    // An orderly end gives up what is being fetched, and leaves nothing of it.
    let pushed = setup.push("b", "v1", 51, &[16 << 20]).await?;
    setup.relay.hold_after(8 << 20);
    let url = format!("{}{}", setup.cache.url(), blob_path("up/b", &pushed.blobs[0]));
    let mut response = setup.client.http.get(&url).send().await?.error_for_status()?;
    response.chunk().await?.context("the beginning")?;
    let mut cache = setup.cache;
    let (status, cache) = tokio::task::spawn_blocking(move || (cache.terminate(), cache)).await?;
    assert!(status?.success(), "{}", cache.log());
    let uploads = cache.root().join("docker/registry/v2/repositories/up/b/_uploads");
    assert_eq!(std::fs::read_dir(uploads).map_or(0, |entries| entries.count()), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_goes_on_when_its_client_has_gone() -> Result<()> {
    let setup = Setup::new("", &[]).await?;
    let pushed = setup.push("a", "v1", 55, &[16 << 20]).await?;
    let blob = &pushed.blobs[0];
    setup.relay.hold_after(8 << 20);
    let url = format!("{}{}", setup.cache.url(), blob_path("up/a", blob));
    let mut response = setup.client.http.get(&url).send().await?.error_for_status()?;
    response.chunk().await?.context("the beginning")?;
    drop(response);
    setup.relay.release();
    eventually("the blob", async || Ok(!setup.is_nowhere("up/a", &digest(blob)))).await?;
    assert!(setup.client.get(&blob_path("up/a", blob)).await?.expect(200)?.body == blob);
    assert_eq!(setup.relay.asked(Method::GET, "/blobs/").len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_with_users_is_logged_in_to_and_the_password_may_change() -> Result<()> {
    for bearer in [&["--bearer"][..], &[]] {
        let dir = temp_dir();
        let (admin, password) = (dir.path().join("admin"), dir.path().join("password"));
        std::fs::write(&admin, "topsecret\n")?;
        std::fs::write(&password, "wrong\n")?;
        let args = [&["--admin-password-file", utf8(&admin)], bearer].concat();
        let upstream = Registry::start_with(&dir.path().join("upstream"), &args)?;
        let layout = dir.path().join("layout");
        let pushed = image(OCI_MANIFEST, &layers(60, &[1000, 100_000]));
        // By way of an open registry, as the client of the tests knows no passwords.
        let open = Registry::start(&dir.path().join("open"))?;
        pushed.push(&Client::new(&open.url()), "app", "v1").await?;
        let mut copy = cmd("skopeo", ["copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"]);
        copy.args(["--dest-creds", "admin:topsecret", "--preserve-digests"]);
        copy.arg(format!("docker://{}", open.reference("app:v1")));
        copy.arg(format!("docker://{}", upstream.reference("app:v1"))).env("REGISTRY_AUTH_FILE", &layout);
        tokio::task::block_in_place(|| run(&copy))?;

        let relay = Relay::start(&upstream.url()).await?;
        let more = format!("username: admin\npassword-file: {}", password.display());
        let cache = start_cache(dir.path(), &relay.url(), &more, &[])?;
        let client = Client::new(&cache.url());
        let refused = client.get("/v2/up/app/manifests/v1").await?.expect(403)?;
        assert!(String::from_utf8_lossy(&refused.body).contains("DENIED"));
        std::fs::write(&password, "topsecret\n")?;
        eventually("the new password", async || {
            Ok(client.get("/v2/up/app/manifests/v1").await?.status == 200)
        })
        .await?;
        pushed.check(&client, "up/app").await?;
        assert!(!cache.log().contains("topsecret"));

        // The same by a file of docker's form.
        let auths = dir.path().join("config.json");
        let host = relay.url().trim_start_matches("http://").to_owned();
        let text = format!(r#"{{"auths": {{"{host}": {{"username": "admin", "password": "topsecret"}}}}}}"#);
        std::fs::write(&auths, text)?;
        std::fs::remove_dir_all(cache.root()).ok();
        let other = dir.path().join("other");
        std::fs::create_dir(&other)?;
        let cache = start_cache(&other, &relay.url(), &format!("auth-file: {}", auths.display()), &[])?;
        pushed.check(&Client::new(&cache.url()), "up/app").await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_with_a_certificate_of_its_own_needs_the_file() -> Result<()> {
    let dir = temp_dir();
    let (key, cert) = (dir.path().join("key.pem"), dir.path().join("cert.pem"));
    let mut request = cmd("openssl", ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]);
    request.args(["-subj", "/CN=upstream", "-addext", "subjectAltName=IP:127.0.0.1"]);
    request.args([
        "-addext",
        "basicConstraints=critical,CA:FALSE",
        "-keyout",
        utf8(&key),
        "-out",
        utf8(&cert),
    ]);
    run(&request)?;
    let upstream = dir.path().join("upstream");
    let pushed = image(OCI_MANIFEST, &layers(65, &[1000]));
    let mut plain = Registry::start(&upstream)?;
    pushed.push(&Client::new(&plain.url()), "app", "v1").await?;
    plain.terminate()?;
    let upstream = Registry::start_with(&upstream, &["--tls-cert", utf8(&cert), "--tls-key", utf8(&key)])?;
    let url = format!("https://{}", upstream.address());
    for (name, more, status) in
        [("without", String::new(), 502), ("with", format!("ca-file: {}", cert.display()), 200)]
    {
        let dir = dir.path().join(name);
        std::fs::create_dir(&dir)?;
        let cache = start_cache(&dir, &url, &more, &[])?;
        let got = Client::new(&cache.url()).get("/v2/up/app/manifests/v1").await?;
        assert_eq!(got.status, status, "{name}: {}", cache.log());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_pushes_to_what_is_fetched_and_who_may_delete_purges() -> Result<()> {
    let setup = Setup::new("", &[]).await?;
    let pushed = setup.push("a", "v1", 70, &[1000]).await?;
    pushed.check(&setup.client, "up/a").await?;
    let id = "00000000-0000-0000-0000-000000000000";
    let digest = digest(&pushed.blobs[0]);
    for (method, path) in [
        ("PUT", "/v2/up/a/manifests/v2".to_owned()),
        ("POST", "/v2/up/a/blobs/uploads/".to_owned()),
        ("POST", format!("/v2/up/a/blobs/uploads/?mount={digest}&from=mine")),
        ("PATCH", format!("/v2/up/a/blobs/uploads/{id}")),
        ("PUT", format!("/v2/up/a/blobs/uploads/{id}?digest={digest}")),
    ] {
        let refused = setup.client.send(method, &path, &[], Bytes::from_static(b"{}")).await?.expect(405)?;
        assert!(String::from_utf8_lossy(&refused.body).contains("UNSUPPORTED"), "{method} {path}");
        assert_eq!(refused.header("allow"), "GET, HEAD, DELETE");
    }
    // Names that only begin alike are ours.
    pushed.push(&setup.client, "upper/a", "v1").await?;
    setup.client.delete(&format!("/v2/up/a/blobs/{digest}")).await?;
    setup.client.delete(&format!("/v2/up/a/manifests/{}", pushed.digest())).await?;
    assert!(!setup.layer_link("up/a", &digest).exists());
    pushed.check(&setup.client, "up/a").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_is_asked_by_the_name_of_its_upstream_and_may_who_may_read_it_there() -> Result<()> {
    let dir = temp_dir();
    let admin = dir.path().join("password");
    std::fs::write(&admin, "topsecret\n")?;
    let args = ["--admin-password-file", utf8(&admin), "--anonymous-pull", "lib/**"];
    let setup = Setup::new("ns: [up.example]", &args).await?;
    let pushed = setup.push("lib/app", "v1", 80, &[1000]).await?;
    let path = "/v2/lib/app/manifests/v1?ns=up.example";
    // What counts is the name here, up/lib/app, and not the one in the path.
    setup.client.get(path).await?.expect(401)?;
    setup.client.get("/v2/up/lib/app/manifests/v1").await?.expect(401)?;
    let url = format!("{}{path}", setup.cache.url());
    let get = async |url: &str| {
        let response = setup.client.http.get(url).basic_auth("admin", Some("topsecret")).send().await?;
        anyhow::Ok((response.status().as_u16(), response.bytes().await?))
    };
    assert_eq!(get(&url).await?, (200, pushed.manifest.clone()));
    let blob = format!("{}?ns=up.example", blob_path("lib/app", &pushed.blobs[0]));
    assert_eq!(get(&format!("{}{blob}", setup.cache.url())).await?, (200, pushed.blobs[0].clone()));
    assert_eq!(get(&url.replace("up.example", "other.example")).await?.0, 404);
    Ok(())
}

#[test]
fn an_upstream_that_cannot_be_is_told_at_the_start() -> Result<()> {
    let dir = temp_dir();
    for (upstream, words) in [
        ("up/=up.example", "no URL"),
        ("up/=https://up.example/v2/", "more than a host"),
        ("up/=https://user:hunter2@up.example", "has a user"),
        ("up=https://up.example", "prefix"),
    ] {
        let root = dir.path().join("root");
        let args = ["registry", "--root", utf8(&root), "--listen", "127.0.0.1:0", "--upstream", upstream];
        let output = run_output(&cmd(dvcr()?, args))?;
        assert!(!output.status.success() && output.stderr.contains(words), "{}", output.stderr);
        assert!(!output.stderr.contains("hunter2"), "{}", output.stderr);
    }
    Ok(())
}
