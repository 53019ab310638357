//! Manifests, tags and lists in a bucket: what the suite of all stores does not say.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use bytes::Bytes;
use dvcr_tests::{Chaos, Fault};
use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::*;
use crate::digest::{Algorithm, Digest};
use crate::model;
use crate::names::{Reference, RepoName};
use crate::rules::{Rules, Tags};
use crate::s3::Put;
use crate::store::conformance::{self, by_tag, manifest, repo, tag};
use crate::store::{ChangeError, Manifest};

/// An index without manifests, as it is pushed.
fn index(name: &str, subject: Option<&Digest>) -> Manifest {
    manifest(&conformance::index(name, subject))
}

impl Opened {
    async fn accept(
        &self,
        repo: &RepoName,
        manifest: &Manifest,
        tags: &[&str],
        rules: &Rules,
    ) -> Result<(), ChangeError> {
        let checked = model::check(&manifest.bytes, None).unwrap();
        let tags: Vec<_> = tags.iter().map(|name| tag(name)).collect();
        self.bucket.accept_manifest(repo, manifest, &checked, &tags, rules).await.map(drop)
    }

    pub(super) async fn put(&self, repo: &RepoName, manifest: &Manifest, tags: &[&str]) {
        self.accept(repo, manifest, tags, &Rules::default()).await.unwrap();
    }

    /// What distribution would have written of a manifest.
    async fn write(&self, repo: &RepoName, manifest: &Manifest) {
        let keys = &self.bucket.keys;
        let (data, link) = (keys.blob(&manifest.digest), keys.revision_link(repo, &manifest.digest));
        self.object(&data, &manifest.bytes).await;
        self.object(&link, manifest.digest.as_str().as_bytes()).await;
    }

    pub(super) async fn object(&self, key: &str, content: &[u8]) {
        let content = Bytes::copy_from_slice(content);
        self.bucket.client.put(key, content, Put::default()).await.unwrap();
    }

    pub(super) async fn tagged(&self, repo: &RepoName, name: &str) -> Option<Digest> {
        let found = self.bucket.find_manifest(repo, &by_tag(name)).await.unwrap();
        found.map(|manifest| manifest.digest)
    }

    pub(super) async fn remove(&self, repo: &RepoName, reference: Option<Reference>) -> u64 {
        self.bucket.remove(repo, reference.as_ref(), &Rules::default()).await.unwrap().count
    }

    async fn referrers(&self, repo: &RepoName, subject: &Digest) -> Vec<Digest> {
        let mut seen = Vec::new();
        let mut visit = |manifest: &Manifest| {
            seen.push(manifest.digest.clone());
            ControlFlow::Continue(())
        };
        self.bucket.referrers(repo, subject, None, &mut visit).await.unwrap();
        seen
    }

    async fn keys(&self, prefix: &str) -> Vec<String> {
        let objects = self.bucket.client.pages(prefix, None).try_concat().await.unwrap();
        objects.into_iter().map(|(key, _)| key).collect()
    }

    /// The same bucket behind a proxy that does nothing but count.
    pub(super) async fn counted(&self) -> (Self, S3Proxy) {
        let proxy = S3Proxy::start(self.server.address(), |_| Fault::None).unwrap();
        (self.through(&proxy).await, proxy)
    }
}

/// How many requests something takes, but for looks at whether a collection is on or the bucket has moved, which there are every
/// so often.
pub(super) async fn requests<T>(proxy: &S3Proxy, work: impl Future<Output = T>) -> (usize, T) {
    let is_look = |path: &str| ["/dvcr/gc/run", "/dvcr/moved"].iter().any(|look| path.contains(look));
    let count = || proxy.seen().iter().filter(|(asked, _)| !is_look(&asked.path)).count();
    let before = count();
    let done = work.await;
    (count() - before, done)
}

#[tokio::test]
async fn a_damaged_manifest_is_never_handed_out_and_a_push_heals_it() {
    let opened = Opened::new(Opened::minio().await).await;
    let (r, manifest) = (repo("r"), index("one", None));
    opened.write(&r, &manifest).await;
    let data = opened.bucket.keys.blob(&manifest.digest);
    opened.object(&data, b"{}").await;
    let by_digest = Reference::Digest(manifest.digest.clone());
    let error = opened.bucket.find_manifest(&r, &by_digest).await.unwrap_err();
    assert!(error.to_string().contains("push it again"), "{error}");
    opened.put(&r, &manifest, &["v1"]).await;
    let other_process = opened.again().await;
    assert_eq!(other_process.tagged(&r, "v1").await, Some(manifest.digest));
}

#[tokio::test]
async fn what_another_replica_deleted_is_gone_though_it_is_in_memory() {
    let opened = Opened::new(Opened::minio().await).await;
    let other = opened.again().await;
    let (r, manifest) = (repo("r"), index("one", None));
    opened.put(&r, &manifest, &["v1"]).await;
    assert!(other.tagged(&r, "v1").await.is_some());
    let by_digest = Reference::Digest(manifest.digest.clone());
    assert_eq!(opened.remove(&r, Some(by_digest.clone())).await, 1);
    assert!(other.bucket.find_manifest(&r, &by_digest).await.unwrap().is_none());
    // As does one that was put in the moment of the deletion.
    let validity = other.bucket.view().await.unwrap().validity();
    let link = other.bucket.keys.tag_current_link(&r, &tag("late"));
    other.bucket.place_link(&link, &manifest.digest, validity).await.unwrap();
    assert_eq!(opened.tagged(&r, "late").await, None);
}

#[tokio::test]
async fn a_blob_that_is_no_manifest_is_none_whatever_its_length() {
    let opened = Opened::new(Opened::minio().await).await;
    let layer = vec![7; crate::store::MANIFEST_BYTES_MAX + 1];
    let digest = Digest::of(Algorithm::Sha256, &layer);
    opened.object(&opened.bucket.keys.blob(&digest), &layer).await;
    let found = opened.bucket.find_manifest(&repo("r"), &Reference::Digest(digest)).await.unwrap();
    assert!(found.is_none());
}

#[tokio::test]
async fn a_tag_that_names_nothing_may_be_placed_though_it_never_changes() {
    for server in Opened::servers().await {
        let opened = Opened::new(server).await;
        let tags = Tags { repositories: "**".parse().unwrap(), tags: "v*".parse().unwrap() };
        let rules = Rules { immutable: vec![tags], ..Rules::default() };
        let (r, one, two) = (repo("r"), index("one", None), index("two", None));
        opened.accept(&r, &one, &["v1"], &rules).await.unwrap();
        let refused = opened.accept(&r, &two, &["v1"], &rules).await;
        assert!(matches!(refused, Err(ChangeError::Immutable { .. })), "{refused:?}");
        opened.bucket.client.delete(&opened.bucket.keys.revision_link(&r, &one.digest), None).await.unwrap();
        opened.accept(&r, &two, &["v1"], &rules).await.unwrap();
        assert_eq!(opened.tagged(&r, "v1").await.as_ref(), Some(&two.digest));
        let refused = opened.accept(&r, &one, &["v1"], &rules).await;
        assert!(matches!(refused, Err(ChangeError::Immutable { .. })), "{refused:?}");
    }
}

#[tokio::test]
async fn what_is_removed_leaves_no_key() {
    for server in Opened::servers().await {
        let opened = Opened::new(server).await;
        let (r, subject) = (repo("r"), index("subject", None).digest);
        let (one, two) = (index("one", Some(&subject)), index("two", None));
        opened.put(&r, &one, &["latest", "v1"]).await;
        opened.put(&r, &two, &["latest", "v2"]).await;
        opened.put(&repo("r/below"), &two, &["v1"]).await;
        assert_eq!(opened.remove(&r, Some(by_tag("latest"))).await, 1);
        assert!(opened.keys(&opened.bucket.keys.tag(&r, &tag("latest"))).await.is_empty());
        assert_eq!(opened.remove(&r, Some(Reference::Digest(one.digest.clone()))).await, 1);
        assert!(opened.referrers(&r, &subject).await.is_empty());
        assert!(opened.keys("dvcr/referrers/").await.is_empty());
        opened.put(&r, &one, &["v1", "v3"]).await;
        assert_eq!(opened.remove(&r, None).await, 5);
        assert!(opened.keys(&format!("{}_manifests/", opened.bucket.keys.repo(&r))).await.is_empty());
        assert!(opened.keys("dvcr/referrers/").await.is_empty());
        assert_eq!(opened.tagged(&repo("r/below"), "v1").await, Some(two.digest));
    }
}

#[tokio::test]
async fn a_history_without_a_tag_goes_when_the_tag_is_removed_once_more() {
    let opened = Opened::new(Opened::minio().await).await;
    let (r, one) = (repo("r"), index("one", None));
    opened.put(&r, &one, &["v1"]).await;
    opened.bucket.client.delete(&opened.bucket.keys.tag_current_link(&r, &tag("v1")), None).await.unwrap();
    assert_eq!(opened.tagged(&r, "v1").await, None);
    assert_eq!(opened.remove(&r, Some(by_tag("v1"))).await, 0);
    assert!(opened.bucket.tags(&r, None, 10).await.unwrap().unwrap().names.is_empty());
}

#[tokio::test]
async fn referrers_that_another_registry_wrote_are_found() {
    let opened = Opened::new(Opened::minio().await).await;
    let (r, subject) = (repo("r"), index("subject", None));
    let mut all = Vec::new();
    for n in 0..5 {
        let referrer = index(&format!("signature {n}"), Some(&subject.digest));
        match n {
            0 => opened.put(&r, &referrer, &[]).await,
            _ => opened.write(&r, &referrer).await,
        }
        all.push(referrer.digest);
    }
    opened.write(&r, &subject).await;
    let damaged = index("damaged", Some(&subject.digest));
    opened.write(&r, &damaged).await;
    opened.object(&opened.bucket.keys.blob(&damaged.digest), b"{").await;
    all.sort();
    assert_eq!(opened.referrers(&r, &subject.digest).await, all);
}

#[tokio::test]
async fn thousands_of_tags_are_listed_by_few_requests() {
    const COUNT: usize = 2100;
    for server in Opened::servers().await {
        let opened = Opened::new(server).await;
        let (r, one) = (repo("r"), index("one", None));
        let names: BTreeSet<String> = (0..COUNT).map(|n| format!("build-{}.{n}", n % 3)).collect();
        let put = stream::iter(&names).map(async |name| {
            let link = opened.bucket.keys.tag_current_link(&r, &tag(name));
            opened.object(&link, one.digest.as_str().as_bytes()).await;
        });
        put.buffer_unordered(32).collect::<()>().await;
        let (opened, proxy) = opened.counted().await;
        let list = |after, limit| opened.bucket.tags(&r, after, limit);
        let (count, page) = requests(&proxy, list(None, usize::MAX)).await;
        assert!(page.unwrap().unwrap().names.into_iter().eq(names.iter().cloned()));
        assert_eq!(count, 3);
        let (count, page) = requests(&proxy, list(Some("build-1.7"), 50)).await;
        let behind = names.iter().filter(|name| name.as_str() > "build-1.7").take(50).cloned();
        assert!(page.unwrap().unwrap().names.into_iter().eq(behind));
        assert!(count <= 3, "{count} requests");
    }
}

#[tokio::test]
async fn repositories_are_listed_by_few_requests_whatever_they_have() {
    let opened = Opened::new(Opened::minio().await).await;
    let names: BTreeSet<String> = (0..150).map(|n| format!("vi/ns-{}/disk-{n}", n % 10)).collect();
    let put = stream::iter(&names).map(async |name| {
        let (r, keys) = (repo(name), &opened.bucket.keys);
        let digest = index(name, None).digest;
        let large = if name.ends_with("50") { 300 } else { 2 };
        for n in 0..large {
            let link = keys.tag_current_link(&r, &tag(&format!("t{n}")));
            opened.object(&link, digest.as_str().as_bytes()).await;
        }
    });
    put.buffer_unordered(32).collect::<()>().await;
    let (opened, proxy) = opened.counted().await;
    let (count, page) = requests(&proxy, opened.bucket.repositories(None, 1000)).await;
    assert!(page.unwrap().names.into_iter().eq(names.iter().cloned()));
    assert!(count <= 4, "{count} requests");
    // Pages of fewer keys than the large one has.
    let mut listed: Vec<String> = Vec::new();
    loop {
        let after = listed.last().cloned();
        let (count, page) = requests(&proxy, opened.bucket.repositories(after.as_deref(), 10)).await;
        let page = page.unwrap();
        listed.extend(page.names);
        assert!(count <= 4, "{count} requests behind {after:?}");
        if !page.more {
            break;
        }
    }
    assert!(listed.into_iter().eq(names));
}

#[tokio::test]
async fn a_tag_that_never_changes_is_never_left_naming_what_another_replica_deletes() {
    let opened = Opened::new(Opened::minio().await).await;
    let other = opened.again().await;
    let tags = Tags { repositories: "**".parse().unwrap(), tags: "v*".parse().unwrap() };
    let rules = Rules { immutable: vec![tags], ..Rules::default() };
    for round in 0..12 {
        let (r, manifest) = (repo(&format!("r{round}")), index("one", None));
        opened.accept(&r, &manifest, &["latest"], &rules).await.unwrap();
        let by_digest = Reference::Digest(manifest.digest.clone());
        let put = async {
            // Each time it meets another step of the other.
            tokio::time::sleep(Duration::from_millis(round)).await;
            opened.accept(&r, &manifest, &["v1"], &rules).await
        };
        let (put, removed) = tokio::join!(put, other.bucket.remove(&r, Some(&by_digest), &rules));
        put.unwrap();
        match removed {
            Ok(_) | Err(ChangeError::Immutable { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
        assert_eq!(opened.tagged(&r, "v1").await, Some(manifest.digest), "round {round}");
    }
}

#[tokio::test]
async fn what_is_acknowledged_is_so_though_requests_are_lost_late_and_refused() {
    let opened = Opened::new(Opened::minio().await).await;
    let chaos = Chaos { seed: 11, each_per_mille: 15, delay_ms: 0..300, cut_bytes: 0..100 };
    let proxy = S3Proxy::start(opened.server.address(), chaos.decide()).unwrap();
    let replicas = [opened.through(&proxy).await, opened.through(&proxy).await];
    let tags = Tags { repositories: "**".parse().unwrap(), tags: "v*".parse().unwrap() };
    let rules = Rules { immutable: vec![tags], ..Rules::default() };
    let manifests: Vec<_> = (0..4).map(|n| index(&format!("{n}"), None)).collect();
    let (mut repos, mut r) = (1, repo("r0"));
    // What the tags name, and which manifests are there.
    let mut tagged: BTreeMap<&str, Digest> = BTreeMap::new();
    let mut there: BTreeSet<Digest> = BTreeSet::new();
    for round in 0..60_usize {
        let (replica, manifest) = (&replicas[round % 2], &manifests[round / 3 % 4]);
        let digest = &manifest.digest;
        let done = match round % 7 {
            3 => replica.accept(&r, manifest, &["v1"], &rules).await.map(|()| {
                there.insert(digest.clone());
                tagged.insert("v1", digest.clone());
            }),
            5 => replica.bucket.remove(&r, Some(&by_tag("b")), &rules).await.map(|removed| {
                assert_eq!(removed.count, u64::from(tagged.remove("b").is_some()));
            }),
            6 => {
                let done = replica.bucket.remove(&r, Some(&Reference::Digest(digest.clone())), &rules).await;
                done.map(|removed| {
                    assert_eq!(removed.count, u64::from(there.remove(digest)));
                    tagged.retain(|_, names| names != digest);
                })
            }
            _ => replica.accept(&r, manifest, &["a", "b"], &rules).await.map(|()| {
                there.insert(digest.clone());
                tagged.extend([("a", digest.clone()), ("b", digest.clone())]);
            }),
        };
        match done {
            Ok(()) => {}
            Err(ChangeError::Immutable { names, .. }) => assert_eq!(tagged.get("v1"), Some(&names)),
            Err(ChangeError::Missing(missing)) => panic!("{missing:?}"),
            // Nobody knows what became of it, and it may still be on its way.
            Err(ChangeError::Store(_)) => {
                (repos, r) = (repos + 1, repo(&format!("r{repos}")));
                (tagged, there) = Default::default();
            }
        }
        for name in ["a", "b", "v1"] {
            assert_eq!(opened.tagged(&r, name).await.as_ref(), tagged.get(name), "{name} in round {round}");
        }
        for manifest in &manifests {
            let by_digest = Reference::Digest(manifest.digest.clone());
            let found = opened.bucket.find_manifest(&r, &by_digest).await.unwrap();
            assert_eq!(found.is_some(), there.contains(&manifest.digest), "round {round}");
        }
        let listed = replica.bucket.tags(&r, None, 10).await;
        if let Ok(Some(page)) = listed {
            assert!(page.names.iter().eq(tagged.keys()), "round {round}");
        }
    }
    assert!(repos < 10, "most succeeds");
}
