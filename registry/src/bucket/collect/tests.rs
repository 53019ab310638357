//! Collections of a bucket on real servers; that nothing is lost beside pushes is in `bucket::tests`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dvcr_tests::{Asked, Fault, S3Proxy};
use futures_util::stream::TryStreamExt;
use serde_json::json;
use uuid::Uuid;

use super::super::condemned::{self, Condemned};
use super::super::run::Phase;
use super::super::tests::Opened;
use crate::bucket::Bucket;
use crate::digest::{Algorithm, Digest};
use crate::model;
use crate::names::{Reference, RepoName, Tag};
use crate::rules::Rules;
use crate::s3::Put;
use crate::store::Result;
use crate::store::collect::{Counts, Options};
use crate::store::conformance::{collecting, image, manifest, repo, sha256, tag};

/// How long something may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// A bucket in which everything is old after two seconds.
async fn bucket(server: Arc<dvcr_tests::S3Server>) -> Opened {
    Opened::with_grace(server, Duration::ZERO).await
}

impl Bucket {
    async fn put_key(&self, key: &str, content: impl Into<Bytes>) {
        self.client.put(key, content.into(), Put::default()).await.unwrap();
    }

    async fn put_blob(&self, repo: &RepoName, content: &str) -> Digest {
        let digest = sha256(content.as_bytes());
        self.put_key(&self.keys.blob(&digest), content.to_owned()).await;
        self.put_layer(repo, &digest).await;
        digest
    }

    async fn put_layer(&self, repo: &RepoName, digest: &Digest) {
        self.put_key(&self.keys.layer_link(repo, digest), digest.to_string()).await;
    }

    async fn put_manifest(&self, repo: &RepoName, content: String, tags: &[&str]) -> Result<Digest> {
        let (manifest, checked) = (manifest(&content), model::check(content.as_bytes(), None).unwrap());
        let tags: Vec<Tag> = tags.iter().map(|name| tag(name)).collect();
        match self.accept_manifest(repo, &manifest, &checked, &tags, &Rules::default()).await {
            Ok(_) => Ok(manifest.digest),
            Err(crate::store::ChangeError::Store(error)) => Err(error),
            Err(error) => panic!("{error:?}"),
        }
    }

    async fn has(&self, key: &str) -> bool {
        super::super::found(self.client.head(key).await).unwrap().is_some()
    }

    async fn has_blob_of(&self, repo: &RepoName, digest: &Digest) -> bool {
        self.has(&self.keys.blob(digest)).await && self.has(&self.keys.layer_link(repo, digest)).await
    }

    async fn has_manifest(&self, repo: &RepoName, digest: &Digest) -> bool {
        self.find_manifest(repo, &Reference::Digest(digest.clone())).await.unwrap().is_some()
    }

    /// All keys below a prefix.
    async fn below(&self, prefix: &str) -> BTreeSet<String> {
        let objects = self.client.pages(prefix, None).try_concat().await.unwrap();
        objects.into_iter().map(|(key, _)| key).collect()
    }

    /// Waits until all that was written by now is older than the time that a store tells.
    async fn grow_old(&self) {
        let then = self.client.server_now().await.unwrap().latest + 2 * super::SECOND;
        while self.client.server_now().await.unwrap().earliest < then {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn collect_all(&self, options: &Options) -> Counts {
        let counts = Counts::default();
        self.collect(options, &counts, &AtomicBool::default()).await.unwrap().expect("nobody else collects");
        counts
    }
}

#[tokio::test]
async fn what_no_manifest_needs_goes_and_so_does_what_the_run_has_written() {
    for server in Opened::servers().await {
        let opened = bucket(server).await;
        let (bucket, a, b) = (&opened.bucket, repo("a"), repo("a/b"));
        let config = bucket.put_blob(&a, "config").await;
        let (shared, loose) = (bucket.put_blob(&a, "shared").await, bucket.put_blob(&b, "loose").await);
        bucket.put_layer(&b, &shared).await;
        let manifest = bucket
            .put_manifest(&a, image("a", &config, std::slice::from_ref(&shared)), &["v1"])
            .await
            .unwrap();
        // What a run has left that died, and what somebody does not know to be over.
        bucket.put_key("dvcr/gc/7c0bd4a2-1fb8-4fbc-a5d9-9fd4f16bb9a1/claims/sha256-ab", "").await;
        bucket.grow_old().await;
        let dry = bucket.collect_all(&Options { dry_run: true, ..collecting() }).await;
        assert!(bucket.has_blob_of(&b, &loose).await && bucket.has_blob_of(&b, &shared).await);
        let counts = bucket.collect_all(&collecting()).await;
        for counts in [&dry, &counts] {
            assert_eq!([&counts.repositories, &counts.manifests, &counts.blobs].map(get), [2, 1, 4]);
            let removed = [&counts.removed_links, &counts.removed_blobs, &counts.removed_repositories];
            assert_eq!(removed.map(get), [2, 1, 1]);
            assert_eq!(get(&counts.freed_bytes), 5);
        }
        assert!(!bucket.has(&bucket.keys.blob(&loose)).await);
        assert!(bucket.has_blob_of(&a, &shared).await && bucket.has_blob_of(&a, &config).await);
        assert!(bucket.has_manifest(&a, &manifest).await);
        assert_eq!(bucket.below(&bucket.keys.repo(&b)).await, BTreeSet::new());
        let left = bucket.below("dvcr/gc/").await;
        assert!(left.iter().eq(["dvcr/gc/lease", "dvcr/gc/run"]), "{left:?}");
        assert_eq!(get(&bucket.collect_all(&collecting()).await.removed_blobs), 0);
    }
}

#[tokio::test]
async fn what_is_claimed_while_a_run_is_on_is_spared() {
    let opened = bucket(Opened::minio().await).await;
    let (bucket, a, b) = (&opened.bucket, repo("a"), repo("b"));
    let (claimed, loose) = (bucket.put_blob(&a, "claimed").await, bucket.put_blob(&a, "loose").await);
    bucket.grow_old().await;
    let options = collecting();
    let collection = bucket.collect_all(&options);
    let mount = async {
        until(async || bucket.read_run().await.unwrap().phase != Phase::None).await;
        bucket.mount_blob(&a, &b, &claimed).await.unwrap().unwrap();
    };
    let (counts, ()) = tokio::join!(collection, mount);
    assert_eq!([&counts.removed_links, &counts.removed_blobs].map(get), [1, 1]);
    assert!(bucket.has_blob_of(&a, &claimed).await && bucket.has_blob_of(&b, &claimed).await);
    assert!(!bucket.has_blob_of(&a, &loose).await);
}

#[tokio::test]
async fn repositories_with_very_many_blobs_are_collected_as_others_are() {
    let opened = bucket(Opened::minio().await).await;
    let (bucket, a) = (&opened.bucket, repo("a"));
    let config = bucket.put_blob(&a, "config").await;
    bucket.put_manifest(&a, image("a", &config, &[]), &["v1"]).await.unwrap();
    let garbage: Vec<String> = (0..2100).map(|n| format!("blob {n}")).collect();
    for several in garbage.chunks(32) {
        let puts = several.iter().map(|content| bucket.put_blob(&a, content));
        futures_util::future::join_all(puts).await;
    }
    for n in 0..40 {
        let config = bucket.put_blob(&repo(&format!("b{n}/c")), "config").await;
        let content = image(&n.to_string(), &config, &[]);
        bucket.put_manifest(&repo(&format!("b{n}/c")), content, &["v1"]).await.unwrap();
    }
    bucket.grow_old().await;
    let counts = bucket.collect_all(&collecting()).await;
    assert_eq!([&counts.repositories, &counts.manifests, &counts.blobs].map(get), [41, 41, 2142]);
    assert_eq!([&counts.removed_links, &counts.removed_blobs].map(get), [2100, 2100]);
    assert!(bucket.has_blob_of(&a, &config).await && bucket.has_blob_of(&repo("b7/c"), &config).await);
}

#[tokio::test]
async fn a_manifest_that_cannot_be_read_keeps_the_blobs_of_its_repository() {
    let opened = bucket(Opened::minio().await).await;
    let (bucket, a, b) = (&opened.bucket, repo("a"), repo("b"));
    let config = bucket.put_blob(&a, "config").await;
    for (broken, content) in [("damaged", "{}"), ("unknown", r#"{"schemaVersion": 9}"#)] {
        let repo = repo(broken);
        bucket.put_layer(&repo, &config).await;
        let digest = sha256(if broken == "damaged" { b"another" } else { content.as_bytes() });
        bucket.put_key(&bucket.keys.blob(&digest), content).await;
        bucket.put_key(&bucket.keys.revision_link(&repo, &digest), digest.to_string()).await;
    }
    let lost = sha256(b"lost");
    bucket.put_layer(&b, &config).await;
    bucket.put_key(&bucket.keys.revision_link(&b, &lost), lost.to_string()).await;
    bucket.grow_old().await;
    let counts = bucket.collect_all(&collecting()).await;
    assert_eq!([&counts.removed_links, &counts.removed_blobs].map(get), [1, 0]);
    for repo in ["damaged", "unknown", "b"].map(repo) {
        assert!(bucket.has_blob_of(&repo, &config).await, "{repo}");
    }
}

#[tokio::test]
async fn a_collection_is_the_only_one_and_can_be_stopped() {
    for server in Opened::servers().await {
        let opened = bucket(server).await;
        let bucket = &opened.bucket;
        let loose = bucket.put_blob(&repo("a"), "loose").await;
        let lease = bucket.take_lease().await.unwrap().unwrap();
        for dry_run in [false, true] {
            let options = Options { dry_run, ..collecting() };
            let done = bucket.collect(&options, &Counts::default(), &AtomicBool::default()).await;
            assert!(done.unwrap().is_none());
        }
        lease.give_back().await;
        let (stop, begun) = (AtomicBool::default(), Instant::now());
        let (options, counts) = (collecting(), Counts::default());
        let collection = bucket.collect(&options, &counts, &stop);
        let (done, ()) = tokio::join!(collection, async {
            until(async || bucket.read_run().await.unwrap().phase != Phase::None).await;
            stop.store(true, Ordering::Relaxed);
        });
        assert!(done.unwrap_err().to_string().contains("stopped"));
        assert!(begun.elapsed() < PATIENCE / 4);
        // Nobody waits for one that has ended.
        assert_eq!(bucket.read_run().await.unwrap().phase, Phase::None);
        assert!(bucket.has_blob_of(&repo("a"), &loose).await);
        assert!(bucket.take_lease().await.unwrap().is_some());
    }
}

#[tokio::test]
async fn who_waits_for_a_round_whose_replica_died_ends_it() {
    let opened = bucket(Opened::minio().await).await;
    let (bucket, a) = (&opened.bucket, repo("a"));
    let (one, two) = (bucket.put_blob(&a, "one").await, bucket.put_blob(&a, "two").await);
    let begun = Instant::now();
    let lease = bucket.take_lease().await.unwrap().unwrap();
    let state = bucket.read_run().await.unwrap();
    let (run, round) = (Uuid::new_v4(), 3);
    let state = bucket.replace_run(&state, Phase::Marking { run }).await.unwrap();
    bucket.claim(run, std::slice::from_ref(&two)).await.unwrap();
    let layers = [&one, &two].map(|digest| Condemned::Layer { repo: a.clone(), digest: digest.clone() });
    bucket.put_key(&bucket.keys.condemned(run, round), condemned::write(layers.iter())).await;
    let state = bucket.replace_run(&state, Phase::Condemned { run, round }).await.unwrap();
    // It dies when all is condemned, and nothing is removed.
    drop(lease);
    let other = opened.again().await;
    let view = other.bucket.view().await.unwrap();
    assert!([&one, &two].iter().all(|digest| view.is_condemned(&a, digest)));
    other.bucket.wait_until_removed(&a, &one).await.unwrap();
    assert!(begun.elapsed() >= bucket.options.timing.lease && begun.elapsed() < PATIENCE);
    assert!(!bucket.has(&bucket.keys.layer_link(&a, &one)).await);
    assert!(bucket.has(&bucket.keys.layer_link(&a, &two)).await, "it was claimed");
    // If it was not dead after all, it cannot end what is not its own any more.
    assert!(bucket.replace_run(&state, Phase::None).await.is_err());
    assert_eq!(bucket.read_run().await.unwrap().phase, Phase::None);
}

#[tokio::test]
async fn a_round_does_not_end_before_a_removal_whose_answer_was_lost_is_over() {
    let opened = bucket(Opened::minio().await).await;
    let (direct, a) = (&opened.bucket, repo("a"));
    let loose = direct.put_blob(&a, "loose").await;
    direct.grow_old().await;
    // The first removal is done, and nobody hears of it.
    let lost = AtomicBool::default();
    let decide = move |asked: &Asked| match asked.path.contains("?delete") || asked.path.contains("&delete") {
        true if !lost.swap(true, Ordering::Relaxed) => Fault::DropAfter,
        _ => Fault::None,
    };
    let proxy = S3Proxy::start(opened.server.address(), decide).unwrap();
    let through = opened.through(&proxy).await;
    let options = collecting();
    let watch = async {
        until(async || !direct.has(&direct.keys.layer_link(&a, &loose)).await).await;
        let gone = Instant::now();
        direct.wait_until_removed(&a, &loose).await.unwrap();
        gone.elapsed()
    };
    let (counts, waited) = tokio::join!(through.bucket.collect_all(&options), watch);
    // Of the validity a quarter may have been over, and what is less than a second is cut off.
    let timing = direct.options.timing;
    assert!(waited >= timing.validity * 3 / 4 + timing.settling() - 2 * super::SECOND, "{waited:?}");
    assert_eq!([&counts.removed_links, &counts.removed_blobs].map(get), [1, 1]);
    assert!(proxy.seen().iter().any(|(_, fault)| *fault == Fault::DropAfter));
}

#[tokio::test]
async fn rules_take_tags_that_are_too_many_and_what_only_they_named() {
    let opened = bucket(Opened::minio().await).await;
    let (bucket, a) = (&opened.bucket, repo("ci/app"));
    let config = bucket.put_blob(&a, "config").await;
    let tags = ["one", "two", "three", "v1", "gold"];
    let mut digests = Vec::new();
    for name in tags {
        let layer = bucket.put_blob(&a, name).await;
        digests.push(bucket.put_manifest(&a, image(name, &config, &[layer]), &[name]).await.unwrap());
        // A second apart, so that it is known which is older.
        bucket.grow_old().await;
    }
    let rules: Rules = serde_json::from_value(json!({
        "retention": [
            {"repositories": "ci/**", "keep-tags": ["v*"], "keep-newest": 1, "untagged-after": "1s"},
            {"repositories": "**", "keep-newest": 0},
        ],
        "pinned": [{"repositories": "ci/app", "tags": "gold"}],
    }))
    .unwrap();
    let with_rules = Options { rules: Arc::new(rules), ..collecting() };
    let dry = bucket.collect_all(&Options { dry_run: true, ..with_rules.clone() }).await;
    let counts = bucket.collect_all(&with_rules).await;
    for counts in [&dry, &counts] {
        assert_eq!([&counts.removed_tags, &counts.removed_manifests].map(get), [2, 2]);
        assert_eq!([&counts.removed_links, &counts.removed_blobs].map(get), [2, 4]);
    }
    let left = bucket.tags(&a, None, 10).await.unwrap().unwrap().names;
    assert_eq!(left, ["gold", "three", "v1"]);
    for (name, digest) in tags.iter().zip(&digests) {
        assert_eq!(bucket.has_manifest(&a, digest).await, !matches!(*name, "one" | "two"), "{name}");
    }
    assert_eq!(get(&bucket.collect_all(&with_rules).await.removed_tags), 0);
}

#[tokio::test]
async fn untagged_manifests_go_but_for_children_and_signatures_of_what_stays() {
    let opened = bucket(Opened::minio().await).await;
    let (bucket, a) = (&opened.bucket, repo("a"));
    let config = bucket.put_blob(&a, "config").await;
    let with = async |name: &str, subject: Option<&Digest>| {
        let mut manifest: serde_json::Value = serde_json::from_str(&image(name, &config, &[])).unwrap();
        if let Some(subject) = subject {
            manifest["subject"] = json!({"mediaType": "x/y", "digest": subject.as_str(), "size": 1});
        }
        bucket.put_manifest(&a, manifest.to_string(), &[]).await.unwrap()
    };
    let index = async |name: &str, child: &Digest, tags: &[&str]| {
        let child = json!({"mediaType": "x/y", "digest": child.as_str(), "size": 1});
        let index = json!({"schemaVersion": 2, "manifests": [child], "annotations": {"name": name}});
        bucket.put_manifest(&a, index.to_string(), tags).await.unwrap()
    };
    let (child, loose) = (with("child", None).await, with("loose", None).await);
    let kept_index = index("kept", &child, &["all"]).await;
    let loose_index = index("loose", &loose, &[]).await;
    let (signed, of_loose) = (with("s", Some(&kept_index)).await, with("t", Some(&loose_index)).await);
    bucket.grow_old().await;
    let rules = json!({"retention": [{"repositories": "a", "untagged-after": "1s"}]});
    let with_rules = Options { rules: Arc::new(serde_json::from_value(rules).unwrap()), ..collecting() };
    let dry = bucket.collect_all(&Options { dry_run: true, ..with_rules.clone() }).await;
    bucket.grow_old().await;
    let counts = bucket.collect_all(&with_rules).await;
    assert_eq!([&dry, &counts].map(|counts| get(&counts.removed_manifests)), [3, 3]);
    for (digest, stays) in [
        (&kept_index, true),
        (&child, true),
        (&signed, true),
        (&loose, false),
        (&loose_index, false),
        (&of_loose, false),
    ] {
        assert_eq!(bucket.has_manifest(&a, digest).await, stays, "{digest}");
    }
    assert_eq!(bucket.below(&bucket.keys.referrers(&a, &loose_index)).await, BTreeSet::new());
}

#[tokio::test]
async fn uploads_that_rest_for_long_are_given_up_and_multipart_uploads_that_nobody_knows() {
    let [minio, moto] = Opened::servers().await;
    for (server, lists_uploads) in [(minio, false), (moto, true)] {
        let opened = bucket(server).await;
        let (bucket, a) = (&opened.bucket, repo("a"));
        let id = bucket.begin_upload(&a, Algorithm::Sha256).await.unwrap();
        bucket.put_key(&format!("{}startedat", bucket.keys.upload(&a, id)), "2026-01-01T00:00:00Z").await;
        let orphan = bucket.client.create_upload(&bucket.keys.blob(&sha256(b"x")), None).await.unwrap();
        bucket.grow_old().await;
        let young = bucket.begin_upload(&a, Algorithm::Sha256).await.unwrap();
        let at_once = Options { upload_age: Duration::ZERO, ..collecting() };
        // By moto all multipart uploads began in 2010, and MinIO tells of none.
        let orphans = u64::from(lists_uploads);
        let dry = bucket.collect_all(&Options { dry_run: true, ..collecting() }).await;
        assert_eq!(get(&dry.removed_uploads), orphans);
        let dry = bucket.collect_all(&Options { dry_run: true, ..at_once.clone() }).await;
        assert!(get(&dry.removed_uploads) > orphans);
        // The time counts from when the collection begins: on a slow day the young one is old by then.
        let counts = bucket.collect_all(&at_once).await;
        assert!(get(&counts.removed_uploads) > orphans);
        assert_eq!(bucket.below(&bucket.keys.upload(&a, id)).await, BTreeSet::new());
        assert_eq!(bucket.upload_offset(&a, id).await.unwrap(), None);
        if get(&counts.removed_uploads) == 1 + orphans {
            assert_eq!(bucket.upload_offset(&a, young).await.unwrap(), Some(0));
        }
        let left = bucket.client.uploads(&orphan.key, None).await.unwrap().uploads;
        assert_eq!(left.is_empty(), lists_uploads, "{left:?}");
    }
}

/// Waits for something.
async fn until(is_so: impl AsyncFn() -> bool) {
    let begun = Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < PATIENCE, "it does not come to be so");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
