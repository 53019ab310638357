//! Directories as crashes, other programs and bad disks leave them: the rest is served, and nothing half or damaged.

use std::fs;
use std::path::Path;

use dvcr_registry::inventory::Inventory;
use dvcr_registry::{Config, Registry, Rules};
use serde_json::json;

use crate::support::{
    OCI_MANIFEST, Place, Served, blob_path, files, image, link_dir, noise, referrer, sha256, v2,
};

const ID: &str = "11111111-2222-4333-8444-555555555555";

/// A directory with an image in it, whose tag is `good`.
async fn directory() -> (Place, String) {
    let served = Served::new().await;
    let digest = served.push_image("a/b", "good", 1).await;
    (served.close().await, digest)
}

fn write(path: &Path, bytes: impl AsRef<[u8]>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Checks that the image is served in whole.
async fn assert_good(served: &Served, digest: &str) {
    let manifest = served.get("/v2/a/b/manifests/good").await.expect(200);
    assert_eq!(sha256(&manifest.body), digest);
    let layer = manifest.json()["layers"][0]["digest"].as_str().unwrap().to_owned();
    assert_eq!(sha256(&served.get(&format!("/v2/a/b/blobs/{layer}")).await.expect(200).body), layer);
}

#[tokio::test]
async fn what_was_on_its_way_when_the_process_died_is_cleared() {
    let (dir, digest) = directory().await;
    let tmp = dir.path().join("root/dvcr/tmp");
    write(&tmp.join("0"), b"half a manifest");
    write(&tmp.join("1f/current/link"), b"half a tag");
    let served = Served::open(dir).await;
    assert!(fs::read_dir(&tmp).unwrap().next().is_none());
    assert_good(&served, &digest).await;
    served.push_image("a/b", "more", 2).await;
}

#[tokio::test]
async fn sessions_in_any_state_are_resumed_or_unknown() {
    let (dir, digest) = directory().await;
    let uploads = v2(dir.path()).join("repositories/a/b/_uploads");
    let bytes = noise(5000, 1);
    let id = |n: u32| format!("{n:08}{}", &ID[8..]);
    let at = |n: u32, name: &str| uploads.join(id(n)).join(name);
    // 0: only a directory. 1: begun, no bytes. 2: bytes, no state. 3: a torn state. 4: a state beyond the bytes.
    fs::create_dir_all(at(0, "")).unwrap();
    write(&at(1, "startedat"), "2026-01-01T00:00:00Z");
    write(&at(2, "data"), &bytes[..1234]);
    write(&at(3, "data"), &bytes[..1234]);
    write(&at(3, "hashstates/sha256/1000"), b"sha\x03torn");
    write(&at(4, "data"), &bytes[..1234]);
    write(&at(4, "hashstates/sha256/4000"), [7; 108]);
    // 5: a file in place of a session. 6: a name that is no id. 7: names inside that are none.
    write(&uploads.join(id(5)), b"x");
    write(&uploads.join("no-uuid/data"), b"x");
    write(&at(7, "data"), &bytes[..1234]);
    write(&at(7, "hashstates/sha256/not-a-number"), b"x");
    write(&at(7, "hashstates/md5/5"), b"x");

    let served = Served::open(dir).await;
    assert_good(&served, &digest).await;
    for n in [0, 1, 2, 3, 4, 7] {
        let session = format!("/v2/a/b/blobs/uploads/{}", id(n));
        let state = served.get(&session).await.expect(204);
        let came: usize = match state.header("range") {
            "0-0" => 0,
            "0-1233" => 1234,
            other => panic!("session {n}: {other}"),
        };
        // Whatever it claims to have, going on from there ends in the right bytes.
        let put = format!("{session}?digest={}", sha256(&bytes));
        let range = format!("{came}-4999");
        let reply = served.send("PUT", &put, &[("content-range", &range)], bytes[came..].to_vec()).await;
        assert_eq!(reply.status, 201, "session {n}: {}", reply.text());
        let blob = format!("/v2/a/b/blobs/{}", sha256(&bytes));
        assert!(served.get(&blob).await.expect(200).body == bytes, "session {n}");
        served.ask("DELETE", &blob).await.expect(202);
    }
    for none in [id(5).as_str(), "no-uuid"] {
        let session = format!("/v2/a/b/blobs/uploads/{none}");
        served.get(&session).await.expect_error(404, "BLOB_UPLOAD_UNKNOWN");
        served.send("PATCH", &session, &[], "x").await.expect_error(404, "BLOB_UPLOAD_UNKNOWN");
    }
}

#[tokio::test]
async fn a_tag_that_names_nothing_is_unknown_and_can_be_given_anew() {
    let (dir, digest) = directory().await;
    let tags = v2(dir.path()).join("repositories/a/b/_manifests/tags");
    let missing = sha256(b"missing");
    write(&tags.join("missing/current/link"), &missing);
    write(&tags.join("truncated/current/link"), &digest[..30]);
    write(&tags.join("empty/current/link"), b"");
    write(&tags.join("garbage/current/link"), [0xff; 71]);
    write(&tags.join("long/current/link"), vec![b'a'; 1 << 20]);
    fs::create_dir_all(tags.join("bare")).unwrap();
    fs::create_dir_all(tags.join("halfway/current")).unwrap();
    write(&tags.join("index-only/index").join(link_dir(&digest)).join("link"), &digest);
    fs::create_dir_all(tags.join("directory/current/link")).unwrap();
    write(&tags.join("file"), b"x");
    write(&tags.join(".hidden/current/link"), &digest);
    // Written by an editor, say: the line's end is no part of the digest.
    write(&tags.join("newline/current/link"), format!("{digest}\n"));

    let served = Served::open(dir).await;
    assert_good(&served, &digest).await;
    served.get("/v2/a/b/manifests/newline").await.expect(200);
    let broken =
        ["missing", "truncated", "empty", "garbage", "long", "bare", "halfway", "index-only", "file"];
    for tag in broken {
        let path = format!("/v2/a/b/manifests/{tag}");
        for method in ["GET", "HEAD"] {
            assert_eq!(served.ask(method, &path).await.status, 404, "{method} {tag}");
        }
    }
    served.get("/v2/a/b/manifests/.hidden").await.expect(404);
    let directory = served.get("/v2/a/b/manifests/directory").await.status;
    assert!(directory >= 400, "{directory}");
    // Those that hold no digest are not listed.
    let listed = served.get("/v2/a/b/tags/list").await.expect(200).json();
    assert_eq!(listed["tags"], json!(["good", "newline"]));
    for tag in broken.into_iter().filter(|tag| *tag != "file") {
        served.push_image("a/b", tag, 1).await;
        let pulled = served.get(&format!("/v2/a/b/manifests/{tag}")).await.expect(200);
        assert_eq!(sha256(&pulled.body), digest, "{tag}");
    }
}

#[tokio::test]
async fn a_blob_whose_link_or_content_is_missing_is_unknown() {
    let (dir, digest) = directory().await;
    let layers = v2(dir.path()).join("repositories/a/b/_layers");
    let link = |digest: &str| layers.join(link_dir(digest)).join("link");
    let blobs: Vec<String> = (0..6u8).map(|n| sha256(&[n])).collect();
    write(&link(&blobs[0]), &blobs[0]);
    write(&link(&blobs[1]), b"");
    write(&link(&blobs[2]), &blobs[2][..50]);
    write(&link(&blobs[3]), b"../../../../../../../../../etc/passwd");
    fs::create_dir_all(link(&blobs[4]).parent().unwrap()).unwrap();
    write(&link(&blobs[5]), &blobs[5]);
    fs::create_dir_all(v2(dir.path()).join(blob_path(&blobs[5])).parent().unwrap()).unwrap();

    let served = Served::open(dir).await;
    assert_good(&served, &digest).await;
    for (n, blob) in blobs.iter().enumerate() {
        let path = format!("/v2/a/b/blobs/{blob}");
        assert_eq!(served.get(&path).await.status, 404, "{n}");
        assert_eq!(served.ask("HEAD", &path).await.status, 404, "{n}");
        // A mount must not make more of such links.
        let mount = format!("/v2/c/blobs/uploads/?mount={blob}&from=a/b");
        served.ask("POST", &mount).await.expect(202);
        let manifest = json!({
            "schemaVersion": 2,
            "config": {"mediaType": "application/x", "digest": blob, "size": 1},
            "layers": [],
        });
        let put = served.send("PUT", "/v2/a/b/manifests/new", &[], manifest.to_string()).await;
        put.expect_error(400, "MANIFEST_BLOB_UNKNOWN");
        served.push_blob("a/b", &[n as u8]).await;
        assert_eq!(served.get(&path).await.expect(200).body, [n as u8].as_slice());
    }
}

#[tokio::test]
async fn a_damaged_manifest_is_not_served_and_healed_by_a_push() {
    let (mut dir, digest) = directory().await;
    let content = v2(dir.path()).join(blob_path(&digest));
    let bytes = fs::read(&content).unwrap();
    let mut flipped = bytes.clone();
    flipped[20] ^= 1;
    for damaged in [&bytes[..100], &[], &flipped, &vec![b' '; 5 << 20]] {
        fs::write(&content, damaged).unwrap();
        let served = Served::open(dir).await;
        for reference in ["good", &digest] {
            for method in ["GET", "HEAD"] {
                let path = format!("/v2/a/b/manifests/{reference}");
                let reply = served.ask(method, &path).await;
                assert!(reply.status >= 400, "{method} {reference}: {}", reply.status);
            }
        }
        // One bad manifest does not hide the others.
        served.push_image("a/b", "other", 2).await;
        served.get(&format!("/v2/a/b/referrers/{digest}")).await.expect(200);
        served.get("/v2/a/b/tags/list").await.expect(200);
        served.push_image("a/b", "good", 1).await;
        assert_good(&served, &digest).await;
        assert_eq!(fs::read(&content).unwrap(), bytes);
        dir = served.close().await;
    }
    // It can be deleted too.
    fs::write(&content, b"").unwrap();
    let served = Served::open(dir).await;
    served.ask("DELETE", &format!("/v2/a/b/manifests/{digest}")).await.expect(202);
    served.get("/v2/a/b/manifests/good").await.expect_error(404, "MANIFEST_UNKNOWN");
}

#[tokio::test]
async fn a_referrer_is_listed_only_if_it_is_there() {
    let (dir, digest) = directory().await;
    let entries = dir.path().join("root/dvcr/referrers/a/b/_subjects").join(link_dir(&digest));
    write(&entries.join(sha256(b"never pushed").replace(':', "-")), b"");
    write(&entries.join("garbage"), b"");
    write(&entries.join("sha256-0"), b"");
    fs::create_dir_all(entries.join("directory")).unwrap();
    let served = Served::open(dir).await;
    let listed = served.get(&format!("/v2/a/b/referrers/{digest}")).await.expect(200);
    assert_eq!(listed.json()["manifests"], json!([]));
    assert_good(&served, &digest).await;
}

#[tokio::test]
async fn strange_things_among_the_repositories_are_passed_over() {
    let (dir, digest) = directory().await;
    let repositories = v2(dir.path()).join("repositories");
    write(&repositories.join("file"), b"x");
    write(&repositories.join("UPPER/_layers/x"), b"x");
    write(&repositories.join("a/b/_unknown/x"), b"x");
    fs::create_dir_all(repositories.join("empty/inner")).unwrap();
    fs::create_dir_all(repositories.join("a/b/_manifests/revisions/sha256/short")).unwrap();
    std::os::unix::fs::symlink("..", repositories.join("loop")).unwrap();
    let served = Served::open(dir).await;
    assert_good(&served, &digest).await;
    let listed = served.get("/v2/_catalog").await.expect(200).json();
    assert_eq!(listed["repositories"], json!(["a/b"]));
    served.get("/v2/file/tags/list").await.expect_error(404, "NAME_UNKNOWN");
    served.get(&format!("/v2/a/b/referrers/{digest}")).await.expect(200);
}

#[tokio::test]
async fn a_directory_is_served_by_one_process_of_ours_at_a_time() {
    let served = Served::new().await;
    served.push_image("a/b", "good", 1).await;
    let before = files(served.dir());
    let root = served.dir().join("root");
    let config = Config::new(&root);
    let refused = tokio::task::spawn_blocking(move || Registry::open(config)).await.unwrap().unwrap_err();
    assert!(refused.to_string().contains(root.to_str().unwrap()), "{refused}");
    let source = std::error::Error::source(&refused).unwrap().to_string();
    assert!(source.contains("another dvcr registry"), "{source}");
    assert_eq!(files(served.dir()), before);
    let dir = served.close().await;
    Served::open(dir).await;
}

#[tokio::test]
async fn gaps_that_the_rules_allow_are_no_damage() {
    let rules = |patterns: &[&str]| {
        let sparse_manifests = patterns.iter().map(|pattern| pattern.parse().unwrap()).collect();
        Rules { sparse_manifests, ..Rules::default() }
    };
    let served =
        Served::open_with(tempfile::tempdir().unwrap(), |config| config.rules = rules(&["mirror/**"])).await;
    served.push_blob("mirror/a", b"{}").await;
    let layer = noise(1000, 1);
    served.push_manifest("mirror/a", "tag", &image(OCI_MANIFEST, b"{}", &[&layer])).await;
    let check = |patterns| {
        let inventory = Inventory::open(&served.dir().join("root")).unwrap();
        let found = inventory.check(None, &rules(patterns)).unwrap();
        (found.is_sound(), found.missing, found.gaps, found.damaged)
    };
    assert_eq!(check(&[]), (false, 1, 0, 0));
    assert_eq!(check(&["other/**"]), (false, 1, 0, 0));
    assert_eq!(check(&["mirror/**"]), (true, 0, 1, 0));
    // What is there, and is not what it should be, is damage also there.
    let blob = served.push_blob("mirror/a", &layer).await;
    fs::write(served.path(&blob_path(&blob)), "short").unwrap();
    assert_eq!(check(&["mirror/**"]), (false, 0, 0, 1));
}

#[tokio::test]
async fn the_index_of_referrers_is_rebuilt_when_it_is_lost() {
    let served = Served::new().await;
    served.push_blob("a", b"{}").await;
    let subject = image(OCI_MANIFEST, b"{}", &[]);
    served.push_manifest("a", "sbom", &referrer(&subject, Some("application/sbom"), "sbom")).await;
    let path = format!("/v2/a/referrers/{}", sha256(subject.to_string().as_bytes()));
    let before = served.get(&path).await.expect(200).json();
    assert_eq!(before["manifests"].as_array().unwrap().len(), 1);

    let dir = served.close().await;
    fs::remove_dir_all(dir.path().join("root/dvcr")).unwrap();
    let served = Served::open(dir).await;
    assert_eq!(served.get(&path).await.expect(200).json(), before);
}

#[tokio::test]
async fn an_image_of_docker_schema_1_is_served_with_a_warning_and_not_taken() {
    const SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+json";
    let served = Served::new().await;
    served.push_blob("a", b"{}").await;
    // An image of old times, as a registry of old times laid it down.
    let old = json!({
        "schemaVersion": 1,
        "name": "a",
        "tag": "old",
        "architecture": "amd64",
        "fsLayers": [{"blobSum": sha256(b"{}")}],
        "history": [{"v1Compatibility": "{}"}],
    })
    .to_string();
    let digest = sha256(old.as_bytes());
    let put = served.send("PUT", "/v2/a/manifests/old", &[("content-type", SCHEMA_1)], old.clone()).await;
    put.expect_error(400, "MANIFEST_INVALID");
    let revision = format!("repositories/a/_manifests/revisions/{}/link", digest.replacen(':', "/", 1));
    let tag = "repositories/a/_manifests/tags/old/current/link".to_owned();
    for (path, bytes) in [(blob_path(&digest), &old), (revision, &digest), (tag, &digest)] {
        let path = served.path(&path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    for method in ["GET", "HEAD"] {
        let got = served.ask(method, "/v2/a/manifests/old").await.expect(200);
        assert_eq!(got.header("content-type"), SCHEMA_1);
        assert!(got.header("warning").starts_with("299 - \"this image is of Docker schema 1"), "{method}");
    }
}
