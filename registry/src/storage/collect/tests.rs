use std::sync::Arc;

use bytes::Bytes;

use super::*;
use crate::names::Tag;
use crate::rules::Rules;
use crate::storage::scrub;
use crate::storage::testing::storage;
use crate::store::Manifest;

fn options() -> Options {
    Options {
        rules: Arc::default(),
        upload_age: Duration::from_secs(7 * 86_400),
        dry_run: false,
        removals_per_second: u32::MAX,
    }
}

fn repo(name: &str) -> RepoName {
    RepoName::parse(name).unwrap()
}

fn push_blob(storage: &Storage, repo: &RepoName, content: &str) -> Digest {
    let digest = Digest::of(Algorithm::Sha256, content.as_bytes());
    storage.store_blob(repo, content.as_bytes(), &digest).unwrap();
    digest
}

fn push_manifest(storage: &Storage, repo: &RepoName, bytes: String, tag: Option<&str>) -> Digest {
    let digest = Digest::of(Algorithm::Sha256, bytes.as_bytes());
    let manifest = Manifest {
        digest: digest.clone(),
        bytes: Bytes::from(bytes),
        media_type: model::OCI_MANIFEST.into(),
    };
    storage.put_manifest(repo, manifest, tag.and_then(Tag::parse).as_slice(), None).unwrap();
    digest
}

fn image(config: &Digest, layers: &[&Digest]) -> String {
    let layers: Vec<_> = layers.iter().map(|digest| serde_json::json!({"digest": digest.as_str()})).collect();
    serde_json::json!({"schemaVersion": 2, "config": {"digest": config.as_str()}, "layers": layers})
        .to_string()
}

/// Makes everything there is old.
fn age(storage: &Storage) {
    let old = SystemTime::now() - Duration::from_secs(100 * 86_400);
    let mut dirs = vec![storage.layout.root().to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            fs::File::open(&path).unwrap().set_modified(old).unwrap();
            if path.is_dir() {
                dirs.push(path);
            }
        }
    }
}

fn collect(storage: &Storage, options: &Options) -> Counts {
    let counts = Counts::default();
    storage.collect(options, &counts, &AtomicBool::new(false)).unwrap().unwrap();
    counts
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[test]
fn what_a_manifest_needs_stays_and_the_rest_goes_when_it_is_old() {
    let (_root, storage) = storage();
    let (a, b) = (repo("a"), repo("b/c"));
    let config = push_blob(&storage, &a, "config");
    let layer = push_blob(&storage, &a, "layer");
    let manifest = push_manifest(&storage, &a, image(&config, &[&layer]), Some("v1"));
    let loose = push_blob(&storage, &a, "loose");
    let everywhere = push_blob(&storage, &a, "in both");
    push_blob(&storage, &b, "in both");
    let needed = push_manifest(&storage, &b, image(&everywhere, &[]), None);

    let counts = collect(&storage, &options());
    assert_eq!((get(&counts.removed_blobs), get(&counts.removed_links)), (0, 0), "all is new");

    age(&storage);
    let counts = collect(&storage, &Options { dry_run: true, ..options() });
    let told = |counts: &Counts| {
        [&counts.removed_blobs, &counts.removed_links, &counts.freed_bytes, &counts.blobs].map(get)
    };
    assert_eq!(told(&counts), [1, 2, 5, 6]);
    assert!(storage.stat_blob(&a, &loose).unwrap().is_some(), "it was a dry run");

    assert_eq!(told(&collect(&storage, &options())), [1, 2, 5, 6]);
    assert!(!storage.layout.blob(&loose).parent().unwrap().exists());
    assert_eq!(storage.stat_blob(&a, &loose).unwrap(), None);
    assert_eq!(storage.stat_blob(&a, &everywhere).unwrap(), None, "no manifest of this repository needs it");
    for (repo, digest) in [(&a, &config), (&a, &layer), (&b, &everywhere)] {
        assert!(storage.stat_blob(repo, digest).unwrap().is_some());
    }
    assert!(storage.manifest(&a, &manifest).unwrap().is_some());

    assert!(storage.delete_manifest(&b, &needed).unwrap().is_some());
    age(&storage);
    let counts = collect(&storage, &options());
    assert_eq!(told(&counts)[..2], [2, 1], "the manifest itself, and what it alone needed");
    assert_eq!(get(&counts.removed_repositories), 1);
    assert_eq!(storage.repositories(None, 10).unwrap().names, ["a"]);
    push_blob(&storage, &b, "again");
    assert_eq!(storage.repositories(None, 10).unwrap().names, ["a", "b/c"]);
}

#[test]
fn what_a_client_was_told_is_there_stays_until_it_can_build_on_it() {
    let (_root, storage) = storage();
    let (a, b) = (repo("a"), repo("b"));
    let seen = push_blob(&storage, &a, "seen");
    let mounted = push_blob(&storage, &a, "mounted");
    age(&storage);
    storage.claim_blob(&a, &seen).unwrap().unwrap();
    assert!(storage.mount_blob(&a, &b, &mounted).unwrap().is_some());
    collect(&storage, &options());
    assert!(storage.stat_blob(&a, &seen).unwrap().is_some());
    assert!(storage.stat_blob(&b, &mounted).unwrap().is_some());
    assert_eq!(storage.stat_blob(&a, &mounted).unwrap(), None);
}

#[test]
fn a_manifest_that_cannot_be_read_keeps_all_blobs_of_its_repository() {
    for damage in [&b"{}x"[..], b""] {
        let (_root, storage) = storage();
        let a = repo("a");
        let layer = push_blob(&storage, &a, "layer");
        let manifest = push_manifest(&storage, &a, image(&layer, &[]), Some("v"));
        fs::write(storage.layout.blob(&manifest), damage).unwrap();
        age(&storage);
        collect(&storage, &options());
        assert!(storage.stat_blob(&a, &layer).unwrap().is_some());
    }
    let (_root, storage) = storage();
    let a = repo("a");
    let layer = push_blob(&storage, &a, "layer");
    push_manifest(&storage, &a, "no JSON".to_owned(), None);
    age(&storage);
    collect(&storage, &options());
    assert!(storage.stat_blob(&a, &layer).unwrap().is_some());
}

#[test]
fn a_manifest_that_was_put_aside_keeps_all_blobs_of_its_repository() {
    let (_root, storage) = storage();
    let a = repo("a");
    let layer = push_blob(&storage, &a, "layer");
    let manifest = push_manifest(&storage, &a, image(&layer, &[]), Some("v"));
    fs::write(storage.layout.blob(&manifest), b"{}x").unwrap();
    let (counts, stop) = (scrub::Counts::default(), AtomicBool::new(false));
    storage.scrub(&scrub::Pass { rate: None, counts: &counts, stop: &stop }).unwrap();
    assert_eq!(storage.quarantined_count(), 1);
    age(&storage);
    assert_eq!(get(&collect(&storage, &options()).removed_blobs), 0);
    assert!(storage.stat_blob(&a, &layer).unwrap().is_some());
    assert_eq!(storage.quarantined_bytes(&manifest), Some(3));

    assert!(storage.delete_manifest(&a, &manifest).unwrap().is_some());
    let told = |counts: &Counts| [&counts.removed_blobs, &counts.freed_bytes].map(get);
    let dry = collect(&storage, &Options { dry_run: true, ..options() });
    assert_eq!((told(&dry), storage.quarantined_count()), ([2, 8], 1));
    assert_eq!(told(&collect(&storage, &options())), [2, 8]);
    assert_eq!((storage.quarantined_count(), storage.quarantined_bytes(&manifest)), (0, None));
}

#[test]
fn what_schema_1_and_indexes_refer_to_stays() {
    let (_root, storage) = storage();
    let a = repo("a");
    let layer = push_blob(&storage, &a, "layer");
    let schema1 = serde_json::json!({"schemaVersion": 1, "fsLayers": [{"blobSum": layer.as_str()}]});
    let child = push_manifest(&storage, &a, schema1.to_string(), None);
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [{"digest": child.as_str()}]});
    push_manifest(&storage, &a, index.to_string(), Some("all"));
    age(&storage);
    assert_eq!(get(&collect(&storage, &options()).removed_blobs), 0);
    assert!(storage.stat_blob(&a, &layer).unwrap().is_some());
    assert!(storage.manifest(&a, &child).unwrap().is_some());
}

#[test]
fn the_link_of_another_algorithm_keeps_what_it_names() {
    let (_root, storage) = storage();
    let a = repo("a");
    let blob = push_blob(&storage, &a, "content");
    let alias = Digest::of(Algorithm::Sha512, b"content");
    let link = storage.layout.layer_link(&a, &alias);
    fs::create_dir_all(link.parent().unwrap()).unwrap();
    fs::write(&link, blob.as_str()).unwrap();
    push_manifest(&storage, &a, image(&alias, &[]), Some("v"));
    age(&storage);
    collect(&storage, &options());
    assert!(storage.stat_blob(&a, &alias).unwrap().is_some());
}

#[test]
fn uploads_that_nothing_happens_in_are_given_up_unless_a_request_holds_them() {
    let (_root, storage) = storage();
    let a = repo("a");
    let begin = || {
        let id = storage.begin_upload(&a, Algorithm::Sha256).unwrap();
        let mut session = storage.open_upload(&a, id).unwrap().unwrap();
        storage.settle_upload(&mut session).unwrap();
        fs::write(session.data(), b"12345").unwrap();
        (id, session)
    };
    let (held, session) = begin();
    let (old, _) = begin();
    age(&storage);
    let (new, _) = begin();
    let pending = storage.begin_upload(&a, Algorithm::Sha256).unwrap();
    let counts = collect(&storage, &options());
    assert_eq!((get(&counts.removed_uploads), get(&counts.freed_bytes)), (1, 5));
    for (id, stays) in [(held, true), (old, false), (new, true)] {
        assert_eq!(storage.layout.upload(&a, id).exists(), stays);
    }
    assert!(storage.is_fresh_upload(pending));
    drop(session);
    assert_eq!(
        get(&collect(&storage, &Options { upload_age: Duration::ZERO, ..options() }).removed_uploads),
        2
    );
    assert!(!storage.is_fresh_upload(pending));
}

/// Makes a tag's push, and its manifest's, so many days old.
fn age_tag(storage: &Storage, repo: &RepoName, tag: &str, digest: &Digest, days: u64) {
    let then = SystemTime::now() - Duration::from_secs(days * 86_400);
    let current = storage.layout.tag_current_link(repo, &Tag::parse(tag).unwrap());
    for path in [current, storage.layout.revision_link(repo, digest)] {
        fs::File::open(path).unwrap().set_modified(then).unwrap();
    }
}

#[test]
fn rules_take_the_tags_that_are_too_many_and_what_only_they_named() {
    let (_root, storage) = storage();
    let a = repo("ci/app");
    let config = push_blob(&storage, &a, "config");
    let tags = ["one", "two", "three", "four", "v1", "gold"];
    let mut digests = Vec::new();
    for (days, tag) in tags.iter().enumerate() {
        let layer = push_blob(&storage, &a, tag);
        digests.push(push_manifest(&storage, &a, image(&config, &[&layer]), Some(tag)));
        age_tag(&storage, &a, tag, &digests[days], 10 + days as u64);
    }
    let rules: Rules = serde_json::from_value(serde_json::json!({
        "retention": [
            {"repositories": "ci/**", "keep-tags": ["v*"], "keep-newest": 2, "untagged-after": "1h"},
            {"repositories": "**", "keep-newest": 0},
        ],
        "pinned": [{"repositories": "ci/app", "tags": "gold"}],
    }))
    .unwrap();
    let options = Options { rules: Arc::new(rules), ..options() };
    let told = |counts: &Counts| [&counts.removed_tags, &counts.removed_manifests].map(get);
    let dry = collect(&storage, &Options { dry_run: true, ..options.clone() });
    assert_eq!(told(&dry), [2, 2]);
    assert_eq!(storage.tags(&a, None, 10).unwrap().unwrap().names.len(), 6);
    assert_eq!(told(&collect(&storage, &options)), [2, 2]);
    assert_eq!(storage.tags(&a, None, 10).unwrap().unwrap().names, ["gold", "one", "two", "v1"]);
    for (tag, digest) in tags.iter().zip(&digests) {
        let stays = !matches!(*tag, "three" | "four");
        assert_eq!(storage.manifest(&a, digest).unwrap().is_some(), stays, "{tag}");
    }
    assert_eq!(told(&collect(&storage, &options)), [0, 0]);
}

#[test]
fn untagged_manifests_go_but_for_children_and_signatures_of_what_stays() {
    let (_root, storage) = storage();
    let a = repo("a");
    let config = push_blob(&storage, &a, "config");
    let with = |name: &str, more: serde_json::Value| {
        let mut manifest: serde_json::Value = serde_json::from_str(&image(&config, &[])).unwrap();
        manifest["annotations"] = serde_json::json!({"name": name});
        manifest.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
        push_manifest(&storage, &a, manifest.to_string(), None)
    };
    let none = || serde_json::json!({});
    let (child, loose, young) = (with("child", none()), with("loose", none()), with("young", none()));
    let about = |digest: &Digest| serde_json::json!({"subject": {"digest": digest.as_str()}});
    let signature = with("signature of the index", serde_json::json!({}));
    let index =
        serde_json::json!({"schemaVersion": 2, "manifests": [{"digest": child.as_str()}]}).to_string();
    let index = push_manifest(&storage, &a, index, Some("all"));
    let signed = with("signed", about(&index));
    let of_child = with("of the child", about(&child));
    let of_loose = with("of the loose one", about(&loose));
    age(&storage);
    storage.claim_manifest(&a, &young).unwrap();
    let rules = serde_json::json!({"retention": [{"repositories": "a", "untagged-after": "1d"}]});
    let rules = Arc::new(serde_json::from_value(rules).unwrap());
    let counts = collect(&storage, &Options { rules, ..options() });
    assert_eq!(get(&counts.removed_manifests), 3);
    for (digest, stays) in [
        (&index, true),
        (&child, true),
        (&signed, true),
        (&of_child, true),
        (&young, true),
        (&loose, false),
        (&of_loose, false),
        (&signature, false),
    ] {
        assert_eq!(storage.manifest(&a, digest).unwrap().is_some(), stays, "{digest}");
    }
}

#[test]
fn a_collection_can_be_stopped_and_is_the_only_one() {
    let (_root, storage) = storage();
    push_blob(&storage, &repo("a"), "blob");
    let stopped = storage.collect(&options(), &Counts::default(), &AtomicBool::new(true));
    assert!(stopped.unwrap_err().to_string().contains("stopped"));
    let _running = storage.collecting.lock().unwrap();
    assert!(storage.collect(&options(), &Counts::default(), &AtomicBool::new(false)).unwrap().is_none());
}

#[test]
fn many_repositories_are_collected_as_each_alone_would_be() {
    let (_root, storage) = storage();
    let repos: Vec<RepoName> = (0..200).map(|n| repo(&format!("vi/ns{}/image-{n}", n % 7))).collect();
    let shared = push_blob(&storage, &repos[0], "shared");
    for (n, repo) in repos.iter().enumerate() {
        let config = push_blob(&storage, repo, &format!("config of {n}"));
        push_blob(&storage, repo, &format!("garbage of {n}"));
        storage.mount_blob(&repos[0], repo, &shared).unwrap();
        if n % 2 == 0 {
            push_manifest(&storage, repo, image(&config, &[&shared]), Some("v1"));
        }
    }
    age(&storage);
    let counts = collect(&storage, &options());
    assert_eq!((get(&counts.repositories), get(&counts.manifests)), (200, 100));
    assert_eq!((get(&counts.blobs), get(&counts.removed_blobs)), (501, 300));
    assert_eq!((get(&counts.removed_links), get(&counts.removed_repositories)), (400, 100));
    for (n, repo) in repos.iter().enumerate() {
        assert_eq!(storage.stat_blob(repo, &shared).unwrap().is_some(), n % 2 == 0, "{repo}");
    }
    assert_eq!(get(&collect(&storage, &options()).removed_blobs), 0);
}

#[test]
fn what_fails_in_one_repository_ends_the_collection_and_is_what_is_told() {
    let (_root, storage) = storage();
    for n in 0..50 {
        push_blob(&storage, &repo(&format!("repo-{n}")), &format!("blob of {n}"));
    }
    let broken = push_manifest(&storage, &repo("repo-7"), r#"{"schemaVersion": 2}"#.to_owned(), None);
    let path = storage.layout.blob(&broken);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    age(&storage);
    let counts = Counts::default();
    let error = storage.collect(&options(), &counts, &AtomicBool::new(false)).unwrap_err();
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    assert_eq!(get(&counts.removed_blobs), 0, "nothing is swept when not all is marked");
}
