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
