//! Manifests: every accepted type, both digests, tags that move, deletion, limits.

use serde_json::{Value, json};

use crate::support::{
    DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Served, blob_path, image, index, noise, sha256,
    sha512,
};

/// Largest manifest, bytes.
const MANIFEST_BYTES_MAX: usize = 4 << 20;

#[tokio::test]
async fn manifests_of_every_type_come_back_byte_for_byte() {
    let served = Served::new().await;
    let (config, layers) = (b"{\"os\":\"linux\"}".as_slice(), [noise(1000, 1), noise(1000, 2)]);
    for blob in [config, &layers[0], &layers[1]] {
        served.push_blob("a/b", blob).await;
    }
    let layers = [layers[0].as_slice(), &layers[1]];
    let oci = image(OCI_MANIFEST, config, &layers);
    let docker = image(DOCKER_MANIFEST, config, &layers);
    let both = [&oci, &docker];
    for (tag, manifest) in [
        ("oci", &oci),
        ("docker", &docker),
        ("index", &index(OCI_INDEX, &both)),
        ("list", &index(DOCKER_LIST, &both)),
        ("nested", &index(OCI_INDEX, &[&index(DOCKER_LIST, &both)])),
        ("empty", &index(OCI_INDEX, &[])),
    ] {
        // The exact bytes count, with whatever blanks their author liked.
        let bytes = serde_json::to_string_pretty(manifest).unwrap() + "\n \n";
        let media_type = manifest["mediaType"].as_str().unwrap();
        let content_type = [("content-type", media_type)];
        let plain = manifest.to_string();
        served
            .send("PUT", &format!("/v2/a/b/manifests/{}", sha256(plain.as_bytes())), &content_type, plain)
            .await
            .expect(201);
        let path = format!("/v2/a/b/manifests/{tag}");
        let put = served.send("PUT", &path, &content_type, bytes.clone()).await.expect(201);
        let digest = sha256(bytes.as_bytes());
        assert_eq!(put.header("docker-content-digest"), digest);
        assert_eq!(put.location(), format!("/v2/a/b/manifests/{digest}"));
        for path in [path, put.location()] {
            let got = served.get(&path).await.expect(200);
            assert_eq!(got.text(), bytes);
            let head = served.ask("HEAD", &path).await.expect(200);
            for reply in [&got, &head] {
                assert_eq!(reply.header("content-type"), media_type);
                assert_eq!(reply.header("content-length"), bytes.len().to_string());
                assert_eq!(reply.header("docker-content-digest"), digest);
            }
            let etag = got.header("etag").to_owned();
            served.send("GET", &path, &[("if-none-match", &etag)], "").await.expect(304);
        }
    }
}

#[tokio::test]
async fn a_manifest_is_pushed_and_pulled_by_its_sha512_digest() {
    let served = Served::new().await;
    let (config, layer) = (b"{}".as_slice(), noise(1000, 1));
    let path = |blob: &[u8]| format!("/v2/a/blobs/uploads/?digest={}", sha512(blob));
    for blob in [config, &layer] {
        served.send("POST", &path(blob), &[], blob.to_vec()).await.expect(201);
    }
    let mut manifest = image(OCI_MANIFEST, config, &[&layer]);
    manifest["config"]["digest"] = json!(sha512(config));
    manifest["layers"][0]["digest"] = json!(sha512(&layer));
    let bytes = manifest.to_string();
    let digest = sha512(bytes.as_bytes());
    let path = format!("/v2/a/manifests/{digest}");
    let content_type = [("content-type", OCI_MANIFEST)];
    let put = served.send("PUT", &path, &content_type, bytes.clone()).await.expect(201);
    assert_eq!(put.header("docker-content-digest"), digest);
    assert_eq!(served.get(&path).await.expect(200).text(), bytes);

    let other = format!("/v2/a/manifests/{}", sha512(b"other"));
    served.send("PUT", &other, &content_type, bytes).await.expect_error(400, "DIGEST_INVALID");
    served.get(&other).await.expect_error(404, "MANIFEST_UNKNOWN");
    served.ask("DELETE", &path).await.expect(202);
    served.get(&path).await.expect_error(404, "MANIFEST_UNKNOWN");
}

#[tokio::test]
async fn a_tag_names_what_it_was_last_given() {
    let served = Served::new().await;
    let old = served.push_image("a", "latest", 1).await;
    let new = served.push_image("a", "latest", 2).await;
    assert_ne!(old, new);
    let digest = async |reference: &str| {
        let reply = served.ask("HEAD", &format!("/v2/a/manifests/{reference}")).await.expect(200);
        reply.header("docker-content-digest").to_owned()
    };
    assert_eq!(digest("latest").await, new);
    assert_eq!(digest(&old).await, old);
    served.push_image("a", "latest", 1).await;
    assert_eq!(digest("latest").await, old);
}

#[tokio::test]
async fn a_deleted_tag_leaves_the_manifest() {
    let served = Served::new().await;
    let digest = served.push_image("a", "one", 1).await;
    served.push_image("a", "two", 1).await;
    served.ask("DELETE", "/v2/a/manifests/one").await.expect(202);
    served.get("/v2/a/manifests/one").await.expect_error(404, "MANIFEST_UNKNOWN");
    served.ask("DELETE", "/v2/a/manifests/one").await.expect_error(404, "MANIFEST_UNKNOWN");
    served.get("/v2/a/manifests/two").await.expect(200);
    served.get(&format!("/v2/a/manifests/{digest}")).await.expect(200);
    assert_eq!(served.get("/v2/a/tags/list").await.json()["tags"], json!(["two"]));
    served.push_image("a", "one", 2).await;
    served.get("/v2/a/manifests/one").await.expect(200);
}

#[tokio::test]
async fn a_deleted_manifest_takes_its_tags_along() {
    let served = Served::new().await;
    let digest = served.push_image("a", "one", 1).await;
    served.push_image("a", "two", 1).await;
    served.push_image("a", "other", 2).await;
    served.push_image("b", "one", 1).await;
    let path = format!("/v2/a/manifests/{digest}");
    served.ask("DELETE", &path).await.expect(202);
    for gone in [path.as_str(), "/v2/a/manifests/one", "/v2/a/manifests/two"] {
        for method in ["GET", "DELETE"] {
            served.ask(method, gone).await.expect_error(404, "MANIFEST_UNKNOWN");
        }
        served.ask("HEAD", gone).await.expect(404);
    }
    assert_eq!(served.get("/v2/a/tags/list").await.json()["tags"], json!(["other"]));
    served.get("/v2/b/manifests/one").await.expect(200);
    served.get(&format!("/v2/b/manifests/{digest}")).await.expect(200);
}

#[tokio::test]
async fn a_manifest_of_another_repository_is_unknown() {
    let served = Served::new().await;
    let digest = served.push_image("a", "one", 1).await;
    served.push_image("b", "two", 2).await;
    served.get(&format!("/v2/b/manifests/{digest}")).await.expect_error(404, "MANIFEST_UNKNOWN");
    // Nor is a blob a manifest, or a manifest a blob.
    let blob = served.push_blob("a", b"{}").await;
    served.get(&format!("/v2/a/manifests/{blob}")).await.expect_error(404, "MANIFEST_UNKNOWN");
}

#[tokio::test]
async fn what_a_manifest_refers_to_must_be_in_its_repository() {
    let served = Served::new().await;
    let (config, layers) = (b"{}".as_slice(), [noise(1000, 1), noise(1000, 2)]);
    let manifest = image(OCI_MANIFEST, config, &[&layers[0], &layers[1]]);
    served.push_blob("a", config).await;
    served.push_blob("a", &layers[0]).await;
    // Elsewhere does not count.
    served.push_blob("b", &layers[1]).await;
    let put = async |manifest: &Value, tag: &str| {
        let content_type = [("content-type", manifest["mediaType"].as_str().unwrap())];
        served.send("PUT", &format!("/v2/a/manifests/{tag}"), &content_type, manifest.to_string()).await
    };
    let refused = put(&manifest, "one").await.expect_error(400, "MANIFEST_BLOB_UNKNOWN");
    let detail = &refused.json()["errors"][0]["detail"]["digests"];
    assert_eq!(*detail, json!([sha256(&layers[1])]));
    let list = index(OCI_INDEX, &[&manifest]);
    let refused = put(&list, "list").await.expect_error(400, "MANIFEST_BLOB_UNKNOWN");
    let missing = sha256(manifest.to_string().as_bytes());
    assert_eq!(refused.json()["errors"][0]["detail"]["digests"], json!([missing]));
    for nothing in ["one", "list", &missing] {
        served.get(&format!("/v2/a/manifests/{nothing}")).await.expect_error(404, "MANIFEST_UNKNOWN");
    }
    assert!(!served.path(&blob_path(&missing)).exists());

    served.push_blob("a", &layers[1]).await;
    put(&manifest, "one").await.expect(201);
    put(&list, "list").await.expect(201);
}

#[tokio::test]
async fn a_manifest_is_taken_up_to_the_limit() {
    let served = Served::new().await;
    served.push_blob("a", b"{}").await;
    let padded = |length: usize| {
        let mut text = image(OCI_MANIFEST, b"{}", &[]).to_string();
        text.extend(std::iter::repeat_n(' ', length - text.len()));
        text
    };
    let content_type = [("content-type", OCI_MANIFEST)];
    let largest = padded(MANIFEST_BYTES_MAX);
    served.send("PUT", "/v2/a/manifests/largest", &content_type, largest.clone()).await.expect(201);
    assert!(served.get("/v2/a/manifests/largest").await.expect(200).body == largest);

    let larger = padded(MANIFEST_BYTES_MAX + 1);
    let put = served.send("PUT", "/v2/a/manifests/larger", &content_type, larger.clone()).await;
    put.expect_error(413, "SIZE_INVALID");
    let pieces: Vec<_> = larger.into_bytes().chunks(100_000).map(<[u8]>::to_vec).collect();
    let pieces = futures_util::stream::iter(pieces.into_iter().map(Ok::<_, std::io::Error>));
    let body = reqwest::Body::wrap_stream(pieces);
    let put = served.send("PUT", "/v2/a/manifests/larger", &content_type, body).await;
    put.expect_error(413, "SIZE_INVALID");
    served.get("/v2/a/manifests/larger").await.expect_error(404, "MANIFEST_UNKNOWN");
}

#[tokio::test]
async fn immutable_tags_neither_move_nor_go() {
    let rules = json!({"immutable": [{"repositories": "golden/**", "tags": "v*"}]});
    let rules = serde_json::from_value(rules).unwrap();
    let served = Served::open_with(tempfile::tempdir().unwrap(), |config| config.rules = rules).await;
    let digest = served.push_image("golden/a", "v1", 1).await;
    assert_eq!(served.push_image("golden/a", "v1", 1).await, digest, "the same again changes nothing");
    let config = b"{}".as_slice();
    let other = image(OCI_MANIFEST, config, &[config]).to_string();
    let put =
        async |path: &str| served.send("PUT", path, &[("content-type", OCI_MANIFEST)], other.clone()).await;
    put("/v2/golden/a/manifests/v1").await.expect_error(403, "DENIED");
    for reference in ["v1", &digest] {
        let path = format!("/v2/golden/a/manifests/{reference}");
        served.ask("DELETE", &path).await.expect_error(403, "DENIED");
    }
    assert_eq!(sha256(&served.get("/v2/golden/a/manifests/v1").await.expect(200).body), digest);
    put("/v2/golden/a/manifests/latest").await.expect(201);
    served.ask("DELETE", "/v2/golden/a/manifests/latest").await.expect(202);
    served.push_image("a", "v1", 1).await;
    served.ask("DELETE", "/v2/a/manifests/v1").await.expect(202);
}

#[tokio::test]
async fn a_push_by_digest_brings_its_tags_along() {
    let served = Served::new().await;
    served.push_blob("a", b"{}").await;
    let bytes = image(OCI_MANIFEST, b"{}", &[]).to_string();
    let content_type = [("content-type", OCI_MANIFEST)];
    for (digest, tags) in [
        (sha256(bytes.as_bytes()), ["1.2.3", "1.2", "latest"]),
        // The only way to a tag that names a digest by sha512; one of them moves.
        (sha512(bytes.as_bytes()), ["512", "512-too", "latest"]),
    ] {
        let path = format!("/v2/a/manifests/{digest}");
        let [one, two, three] = tags;
        // Twice the same is once.
        let put = format!("{path}?tag={one}&tag={two}&tag={three}&tag={one}");
        let put = served.send("PUT", &put, &content_type, bytes.clone()).await.expect(201);
        assert_eq!(put.location(), path);
        assert_eq!(put.header("docker-content-digest"), digest);
        let told: Vec<_> = put.headers.get_all("oci-tag").iter().collect();
        assert_eq!(told, tags);
        for tag in tags {
            let got = served.get(&format!("/v2/a/manifests/{tag}")).await.expect(200);
            assert_eq!((got.text(), got.header("docker-content-digest")), (bytes.clone(), digest.as_str()));
        }
    }
    let listed = served.get("/v2/a/tags/list").await.json();
    assert_eq!(listed["tags"], json!(["1.2", "1.2.3", "512", "512-too", "latest"]));
    let plain = served.send("PUT", "/v2/a/manifests/plain", &content_type, bytes.clone()).await.expect(201);
    assert_eq!(plain.header("oci-tag"), "");
}

#[tokio::test]
async fn tags_that_cannot_be_put_keep_a_push_from_being_taken() {
    /// Tags in one push.
    const TAG_PARAMS_MAX: usize = 50;
    let served = Served::new().await;
    served.push_blob("a", b"{}").await;
    let bytes = image(OCI_MANIFEST, b"{}", &[]).to_string();
    let path = format!("/v2/a/manifests/{}", sha256(bytes.as_bytes()));
    let put = async |path: &str, query: &str| {
        let path = format!("{path}?{query}");
        served.send("PUT", &path, &[("content-type", OCI_MANIFEST)], bytes.clone()).await
    };
    put(&path, "tag=good&tag=-bad").await.expect_error(400, "TAG_INVALID");
    put("/v2/a/manifests/one", "tag=two").await.expect_error(400, "TAG_INVALID");
    let many = |count: usize| (0..count).map(|n| format!("tag=t{n}")).collect::<Vec<_>>().join("&");
    put(&path, &many(TAG_PARAMS_MAX + 1)).await.expect_error(414, "TAG_INVALID");
    served.get(&path).await.expect_error(404, "MANIFEST_UNKNOWN");
    put(&path, &many(TAG_PARAMS_MAX)).await.expect(201);
    let listed = served.get("/v2/a/tags/list").await.json();
    assert_eq!(listed["tags"].as_array().unwrap().len(), TAG_PARAMS_MAX);
}

#[tokio::test]
async fn an_immutable_tag_is_not_moved_by_a_parameter() {
    let served = Served::open_with(tempfile::tempdir().unwrap(), |config| {
        let immutable = json!({"immutable": [{"repositories": "a", "tags": "v*"}]});
        config.rules = serde_json::from_value(immutable).unwrap();
    })
    .await;
    let first = served.push_image("a", "v1", 1).await;
    let second = served.push_image("a", "other", 2).await;
    let bytes = served.get("/v2/a/manifests/other").await.expect(200).body;
    let put = async |query: &str| {
        let path = format!("/v2/a/manifests/{second}?{query}");
        served.send("PUT", &path, &[("content-type", OCI_MANIFEST)], bytes.clone()).await
    };
    put("tag=new&tag=v1").await.expect_error(403, "DENIED");
    served.get("/v2/a/manifests/new").await.expect_error(404, "MANIFEST_UNKNOWN");
    assert_eq!(served.get("/v2/a/manifests/v1").await.expect(200).header("docker-content-digest"), first);
    put("tag=new&tag=v2").await.expect(201);
    put("tag=v2").await.expect(201);
}

#[tokio::test]
async fn a_sparse_manifest_is_taken_where_the_rules_let_it() {
    let served = Served::open_with(tempfile::tempdir().unwrap(), |config| {
        config.rules.sparse_manifests = vec!["mirror/**".parse().unwrap()];
    })
    .await;
    let layers = [noise(1000, 1), noise(1000, 2)];
    let manifest = image(OCI_MANIFEST, b"{}", &[&layers[0], &layers[1]]);
    let absent = image(OCI_MANIFEST, b"{}", &[]);
    let list = index(OCI_INDEX, &[&manifest, &absent]);
    for repo in ["mirror/a", "other/a"] {
        served.push_blob(repo, b"{}").await;
        served.push_blob(repo, &layers[0]).await;
    }
    for (repo, status) in [("other/a", 400), ("mirror/a", 201)] {
        for (tag, manifest) in [("image", &manifest), ("list", &list)] {
            let content_type = [("content-type", manifest["mediaType"].as_str().unwrap())];
            let path = format!("/v2/{repo}/manifests/{tag}");
            let put = served.send("PUT", &path, &content_type, manifest.to_string()).await.expect(status);
            match status {
                201 => {
                    let warning =
                        format!("299 - \"the manifest refers to 1 blobs or manifests that {repo} lacks\"");
                    // The index has both images in its list, one of which was pushed under a tag.
                    assert_eq!(put.header("warning"), warning);
                    assert_eq!(served.get(&path).await.expect(200).text(), manifest.to_string());
                }
                _ => drop(put.expect_error(400, "MANIFEST_BLOB_UNKNOWN")),
            }
        }
    }
    // What is missing comes later.
    served.push_blob("mirror/a", &layers[1]).await;
    let again = served
        .send("PUT", "/v2/mirror/a/manifests/image", &[("content-type", OCI_MANIFEST)], manifest.to_string())
        .await;
    assert_eq!(again.expect(201).header("warning"), "");
}

#[tokio::test]
async fn a_tag_that_never_changes_does_not_go_with_what_it_names_when_both_come_at_once() {
    let served = Served::open_with(tempfile::tempdir().unwrap(), |config| {
        let immutable = json!({"immutable": [{"repositories": "a", "tags": "v*"}]});
        config.rules = serde_json::from_value(immutable).unwrap();
    })
    .await;
    let content_type = [("content-type", OCI_INDEX)];
    for n in 0..100 {
        let manifest = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [], "annotations": {"n": n.to_string()}});
        let digest = served.push_manifest("a", "any", &manifest).await;
        let (named, tagged) =
            (format!("/v2/a/manifests/{digest}"), format!("/v2/a/manifests/{digest}?tag=v{n}"));
        let (put, deleted) = tokio::join!(
            served.send("PUT", &tagged, &content_type, manifest.to_string()),
            served.ask("DELETE", &named)
        );
        put.expect(201);
        // Either it was deleted first, and put again, or it could not be deleted any more.
        assert!([202, 403].contains(&deleted.status), "{deleted:?}");
        served.get(&format!("/v2/a/manifests/v{n}")).await.expect(200);
    }
}

#[tokio::test]
async fn deprecated_kinds_come_with_a_warning() {
    let served = Served::new().await;
    served.push_blob("a", b"{}").await;
    let content_type = [("content-type", OCI_MANIFEST)];
    let mut manifest = image(OCI_MANIFEST, b"{}", &[&noise(10, 1)]);
    manifest["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.nondistributable.v1.tar".into();
    let put = served.send("PUT", "/v2/a/manifests/foreign", &content_type, manifest.to_string()).await;
    let put = put.expect(201);
    let text =
        put.header("warning").strip_prefix("299 - \"").and_then(|text| text.strip_suffix('"')).unwrap();
    assert!(text.contains("deprecated") && !text.contains('"'), "{text}");
    assert_eq!(served.get("/v2/a/manifests/foreign").await.expect(200).header("warning"), "");
}

#[tokio::test]
async fn parameters_that_are_meant_for_others_are_let_be() {
    let served = Served::new().await;
    let blob = served.push_blob("a", b"{}").await;
    served.push_image("a", "one", 1).await;
    let ns = "ns=registry.example.com";
    for path in ["manifests/one".to_owned(), format!("blobs/{blob}"), "tags/list".to_owned()] {
        let plain = served.get(&format!("/v2/a/{path}")).await.expect(200);
        let proxied = served.get(&format!("/v2/a/{path}?{ns}")).await.expect(200);
        assert_eq!(plain.body, proxied.body, "{path}");
    }
    let referrers = served.get(&format!("/v2/a/referrers/{blob}?{ns}")).await.expect(200);
    assert_eq!(referrers.json()["manifests"], json!([]));
    let session = served.ask("POST", &format!("/v2/a/blobs/uploads/?{ns}")).await.expect(202).location();
    let put = format!("{session}?{ns}&digest={}", sha256(b"x"));
    served.send("PUT", &put, &[], "x").await.expect(201);
}
