//! Errors: the specification's codes, methods that are not there, and paths that try to leave the root.

use serde_json::{Value, json};

use crate::support::{OCI_INDEX, OCI_MANIFEST, Raw, Served, files, image, index, sha256};

#[tokio::test]
async fn every_error_tells_the_code_of_the_specification() {
    let served = Served::new().await;
    served.push_image("a", "tag", 1).await;
    let session = served.begin("a").await;
    let none = sha256(b"none");
    let long_name = "n".repeat(256);
    let long_tag = "t".repeat(129);
    for (method, path, status, code) in [
        ("GET", format!("/v2/a/blobs/{none}"), 404, "BLOB_UNKNOWN"),
        ("GET", format!("/v2/nobody/blobs/{none}"), 404, "BLOB_UNKNOWN"),
        ("DELETE", format!("/v2/a/blobs/{none}"), 404, "BLOB_UNKNOWN"),
        ("GET", "/v2/a/blobs/sha256:abc".into(), 400, "DIGEST_INVALID"),
        ("GET", format!("/v2/a/blobs/sha256:{}", "G".repeat(64)), 400, "DIGEST_INVALID"),
        ("GET", format!("/v2/a/blobs/md5:{}", "0".repeat(32)), 400, "DIGEST_INVALID"),
        ("GET", "/v2/a/manifests/none".into(), 404, "MANIFEST_UNKNOWN"),
        ("GET", format!("/v2/a/manifests/{none}"), 404, "MANIFEST_UNKNOWN"),
        ("GET", "/v2/a/manifests/.wrong".into(), 404, "MANIFEST_UNKNOWN"),
        ("PUT", "/v2/a/manifests/.wrong".into(), 400, "TAG_INVALID"),
        ("PUT", format!("/v2/a/manifests/{long_tag}"), 400, "TAG_INVALID"),
        ("PUT", "/v2/a/manifests/sha256:0".into(), 400, "DIGEST_INVALID"),
        ("DELETE", "/v2/a/manifests/none".into(), 404, "MANIFEST_UNKNOWN"),
        ("GET", "/v2/a/referrers/sha256:0".into(), 400, "DIGEST_INVALID"),
        ("GET", "/v2/UPPER/tags/list".into(), 400, "NAME_INVALID"),
        ("GET", format!("/v2/{long_name}/tags/list"), 400, "NAME_INVALID"),
        ("GET", "/v2/nobody/tags/list".into(), 404, "NAME_UNKNOWN"),
        ("POST", "/v2/a//b/blobs/uploads/".into(), 400, "NAME_INVALID"),
        ("POST", "/v2/a/blobs/uploads/?digest=sha256:0".into(), 400, "DIGEST_INVALID"),
        ("POST", "/v2/a/blobs/uploads/?mount=sha256:0&from=b".into(), 400, "DIGEST_INVALID"),
        ("POST", format!("/v2/a/blobs/uploads/?mount={none}&from=NO"), 400, "NAME_INVALID"),
        ("POST", "/v2/a/blobs/uploads/?digest-algorithm=md5".into(), 400, "DIGEST_INVALID"),
        ("PUT", session.clone(), 400, "DIGEST_INVALID"),
        ("PUT", format!("{session}?digest=sha256:0"), 400, "DIGEST_INVALID"),
        ("GET", "/v2/nowhere".into(), 404, "UNSUPPORTED"),
        ("GET", "/v1/".into(), 404, "UNSUPPORTED"),
        ("GET", "/v2/a/blobs/uploads/no-such-upload".into(), 404, "BLOB_UPLOAD_UNKNOWN"),
    ] {
        served.send(method, &path, &[], "x").await.expect_error(status, code);
    }
    // None of them did the session harm.
    served.send("PUT", &format!("{session}?digest={}", sha256(b"x")), &[], "x").await.expect(201);
}

#[tokio::test]
async fn a_manifest_that_is_none_is_refused() {
    let served = Served::new().await;
    served.push_blob("a", b"{}").await;
    let good = image(OCI_MANIFEST, b"{}", &[]);
    let with = |key: &str, value: Value| {
        let mut manifest = good.clone();
        manifest[key] = value;
        manifest.to_string()
    };
    for (content_type, body) in [
        (OCI_MANIFEST, String::new()),
        (OCI_MANIFEST, "no JSON".into()),
        (OCI_MANIFEST, "[]".into()),
        (OCI_MANIFEST, "[".repeat(1 << 20)),
        (OCI_MANIFEST, good.to_string() + "x"),
        (OCI_MANIFEST, with("schemaVersion", json!(1))),
        (OCI_MANIFEST, with("config", json!({"digest": "sha256:../../../etc/passwd"}))),
        (OCI_MANIFEST, with("layers", json!([{"digest": "sha256:short"}]))),
        (OCI_MANIFEST, with("subject", json!({"digest": "none"}))),
        (OCI_MANIFEST, with("manifests", json!([]))),
        (OCI_INDEX, good.to_string()),
        (OCI_MANIFEST, index(OCI_INDEX, &[&good]).to_string()),
        ("application/vnd.docker.distribution.manifest.v1+prettyjws", r#"{"schemaVersion":1}"#.into()),
        ("text/html", r#"{"schemaVersion":2}"#.into()),
    ] {
        let shown: String = body.chars().take(200).collect();
        let reply = served.send("PUT", "/v2/a/manifests/x", &[("content-type", content_type)], body).await;
        assert_eq!(reply.status, 400, "{content_type} {shown}: {}", reply.text());
        reply.expect_error(400, "MANIFEST_INVALID");
    }
    served.get("/v2/a/manifests/x").await.expect_error(404, "MANIFEST_UNKNOWN");
}

#[tokio::test]
async fn a_method_that_is_not_there_is_told_the_others() {
    let served = Served::new().await;
    let digest = served.push_blob("a", b"x").await;
    let session = served.begin("a").await;
    for (path, allowed) in [
        ("/v2/".to_owned(), "GET, HEAD"),
        ("/v2/_catalog".into(), "GET"),
        ("/v2/a/tags/list".into(), "GET"),
        (format!("/v2/a/referrers/{digest}"), "GET"),
        (format!("/v2/a/blobs/{digest}"), "GET, HEAD, DELETE"),
        ("/v2/a/manifests/x".into(), "GET, HEAD, PUT, DELETE"),
        ("/v2/a/blobs/uploads/".into(), "POST"),
        (session, "GET, PATCH, PUT, DELETE"),
        ("/metrics".into(), "GET, HEAD"),
    ] {
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"] {
            if !allowed.split(", ").any(|name| name == method) {
                let reply = served.ask(method, &path).await.expect_error(405, "UNSUPPORTED");
                assert_eq!(reply.header("allow"), allowed, "{method} {path}");
            }
        }
    }
}

#[tokio::test]
async fn no_path_leads_out_of_the_root() {
    let served = Served::new().await;
    // What an attacker would like to read, beside the root and by the names the layout has inside.
    std::fs::create_dir_all(served.dir().join("outside/_layers")).unwrap();
    let secret = "the secret";
    for name in ["secret", "outside/link", "outside/data", "outside/_layers/link"] {
        std::fs::write(served.dir().join(name), secret).unwrap();
    }
    let digest = served.push_image("a", "tag", 1).await;
    let session = served.begin("a").await;
    let before = files(served.dir());

    let long = "x".repeat(8000);
    let names = [
        "..",
        "../..",
        "../../../../outside",
        "a/../../outside",
        "%2e%2e",
        "%2e%2e/%2e%2e/outside",
        "%2e%2e%2f%2e%2e%2foutside",
        "..%2foutside",
        "..%5coutside",
        "a%2f..%2f..%2foutside",
        "%252e%252e",
        "%2fetc",
        "/etc",
        ".",
        "a/.",
        "a/./b",
        "_layers",
        "a/_layers",
        "a/_manifests/tags/tag",
        "a%00b",
        "a%0d%0aX:y",
        "%ff%fe",
        "a%20b",
        "a?b",
        &long,
        "a/b/c/d/e/f/g/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/outside",
    ];
    let mut lines = Vec::new();
    for name in names {
        for (methods, tail) in [
            (["GET", "DELETE"], format!("blobs/{digest}")),
            (["GET", "DELETE"], "manifests/tag".into()),
            (["PUT", "DELETE"], format!("manifests/{digest}")),
            (["GET", "GET"], "tags/list".into()),
            (["GET", "GET"], format!("referrers/{digest}")),
            (["POST", "GET"], "blobs/uploads/".into()),
            (["PATCH", "DELETE"], session.replacen("/v2/a/", "", 1)),
        ] {
            lines.extend(methods.map(|method| format!("{method} /v2/{name}/{tail}")));
        }
        lines.push(format!("GET /v2/a/manifests/{name}"));
        lines.push(format!("DELETE /v2/a/manifests/{name}"));
        lines.push(format!("GET /v2/a/blobs/{name}"));
        lines.push(format!("GET /v2/a/blobs/sha256:{name}"));
        lines.push(format!("DELETE /v2/a/blobs/sha256:{name}"));
        lines.push(format!("GET /v2/a/referrers/{name}"));
        lines.push(format!("GET /v2/a/blobs/uploads/{name}"));
        lines.push(format!("DELETE /v2/a/blobs/uploads/{name}"));
        let quoted = name.replace('/', "%2f").replace('?', "%3f");
        lines.push(format!("POST /v2/a/blobs/uploads/?mount={digest}&from={quoted}"));
        lines.push(format!("POST /v2/a/blobs/uploads/?mount=sha256:{quoted}&from=a"));
        lines.push(format!("POST /v2/a/blobs/uploads/?digest={quoted}"));
        lines.push(format!("GET /v2/a/tags/list?last={quoted}&n={quoted}"));
        lines.push(format!("GET {name}"));
    }
    for line in &lines {
        let shown: String = line.chars().take(200).collect();
        let reply = Raw::start(served.address, line, &[("content-length", "0")]).await.finish().await;
        assert!(!reply.text().contains(secret), "{shown}: {}", reply.text());
        assert!(reply.status < 500 && !reply.headers.contains_key("x"), "{shown}: {}", reply.status);
        // Only what names things inside may succeed: a repository that is not there has no referrers.
        let harmless = reply.status == 200 && reply.json()["manifests"] == json!([]);
        assert!(reply.status >= 400 || harmless, "{shown}: {} {}", reply.status, reply.text());
    }
    let after = files(served.dir());
    let changed: Vec<_> = after.iter().filter(|(path, bytes)| before.get(*path) != Some(bytes)).collect();
    assert!(changed.is_empty() && after.len() == before.len(), "{changed:?}");
}
