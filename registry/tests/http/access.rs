//! Who is let in, and what those see who only look whether the registry lives.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dvcr_registry::Auth;
use tempfile::TempDir;

use crate::support::{Served, files, sha256};

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

async fn with_users() -> Served {
    let dir: TempDir = tempfile::tempdir().unwrap();
    let file = dir.path().join("htpasswd");
    let users = [("admin", "secret"), ("other", "pass:word")];
    let lines = users.map(|(user, password)| format!("{user}:{}\n", bcrypt::hash(password, 4).unwrap()));
    std::fs::write(&file, lines.concat()).unwrap();
    Served::open_with(dir, |config| config.auth = Some(Auth { htpasswd: Some(file), ..Auth::default() }))
        .await
}

#[tokio::test]
async fn every_route_needs_credentials() {
    let served = with_users().await;
    let digest = sha256(b"x");
    let upload = "/v2/a/blobs/uploads/00000000-0000-0000-0000-000000000000";
    let routes = [
        ("/v2".to_owned(), ["GET", "HEAD"].as_slice()),
        ("/v2/".into(), &["GET", "HEAD"]),
        ("/v2/_catalog".into(), &["GET"]),
        ("/v2/a/tags/list".into(), &["GET"]),
        (format!("/v2/a/referrers/{digest}"), &["GET"]),
        (format!("/v2/a/blobs/{digest}"), &["GET", "HEAD", "DELETE"]),
        ("/v2/a/manifests/tag".into(), &["GET", "HEAD", "PUT", "DELETE"]),
        (format!("/v2/a/manifests/{digest}"), &["GET", "HEAD", "PUT", "DELETE"]),
        ("/v2/a/blobs/uploads/".into(), &["POST"]),
        (format!("/v2/a/blobs/uploads/?digest={digest}"), &["POST"]),
        (format!("/v2/a/blobs/uploads/?mount={digest}&from=b"), &["POST"]),
        (upload.into(), &["GET", "PATCH", "PUT", "DELETE"]),
        // What is no route tells nothing either.
        ("/v2/nowhere".into(), &["GET", "POST"]),
        ("/v1/".into(), &["GET"]),
        ("/healthz/more".into(), &["GET"]),
    ];
    let wrong = [
        None,
        Some(basic("admin", "wrong")),
        Some(basic("nobody", "secret")),
        Some(basic("admin", "")),
        Some(basic("", "")),
        Some(basic("other", "pass")),
        Some(format!("{}=", basic("admin", "secret").replace("Basic", "Bearer"))),
        Some("Basic !!!".into()),
        Some("Basic".into()),
    ];
    let before = files(served.dir());
    for (path, methods) in &routes {
        for method in *methods {
            for credentials in &wrong {
                let headers: Vec<_> =
                    credentials.iter().map(|value| ("authorization", value.as_str())).collect();
                let reply = served.send(method, path, &headers, "x").await.expect(401);
                assert_eq!(reply.header("www-authenticate"), "Basic realm=\"dvcr\"", "{method} {path}");
                if *method != "HEAD" {
                    reply.expect_error(401, "UNAUTHORIZED");
                }
            }
            let right = [("authorization", basic("admin", "secret"))];
            let right = right.each_ref().map(|(name, value)| (*name, value.as_str()));
            let reply = served.send(method, path, &right, "x").await;
            assert!(![401, 403].contains(&reply.status), "{method} {path}: {}", reply.status);
            if path.contains("digest=") {
                reply.expect(201);
                served.send("DELETE", &format!("/v2/a/blobs/{digest}"), &right, "").await.expect(202);
            }
        }
    }
    // Those who were turned away left nothing: what is there now, a known user pushed.
    let blob = served.path(&format!("blobs/sha256/{}/{}/data", &digest[7..9], &digest[7..]));
    let mut after = files(served.dir());
    after.remove(&blob).expect("the blob that the known user pushed");
    assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
    // Two colons: the password has one.
    let other = basic("other", "pass:word");
    served.send("GET", "/v2/", &[("authorization", &other)], "").await.expect(200);
}

#[tokio::test]
async fn probes_need_no_credentials() {
    let served = with_users().await;
    for path in ["/", "/healthz", "/readyz"] {
        assert_eq!(served.get(path).await.expect(200).text(), "ok\n");
        served.ask("HEAD", path).await.expect(200);
        served.ask("POST", path).await.expect_error(405, "UNSUPPORTED");
    }
}

#[tokio::test]
async fn a_registry_that_cannot_write_is_alive_but_not_ready() {
    let served = Served::new().await;
    served.push_image("a", "tag", 1).await;
    let tmp = served.dir().join("root/dvcr/tmp");
    std::fs::remove_dir(&tmp).unwrap();
    let reply = served.get("/readyz").await.expect_error(503, "UNKNOWN");
    // A probe's answer tells outsiders no paths.
    assert!(!reply.text().contains("dvcr/tmp"), "{}", reply.text());
    served.get("/healthz").await.expect(200);
    served.get("/v2/a/manifests/tag").await.expect(200);
    let digest = sha256(b"x");
    let failed = served.send("POST", &format!("/v2/a/blobs/uploads/?digest={digest}"), &[], "x").await;
    assert!(!failed.expect_error(500, "UNKNOWN").text().contains("dvcr/tmp"));
    std::fs::create_dir(&tmp).unwrap();
    served.get("/readyz").await.expect(200);
    served.push_blob("a", b"x").await;
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let served = with_users().await;
    let right = basic("admin", "secret");
    let digest = sha256(b"12345");
    let path = format!("/v2/a/blobs/uploads/?digest={digest}");
    served.send("POST", &path, &[("authorization", &right)], "12345").await.expect(201);
    let path = format!("/v2/a/blobs/{digest}");
    for _ in 0..3 {
        served.send("GET", &path, &[("authorization", &right)], "").await.expect(200);
    }
    served.get(&path).await.expect(401);
    served.send("GET", "/v2/nowhere", &[("authorization", &right)], "").await.expect(404);

    let reply = served.get("/metrics").await.expect(200);
    assert!(reply.header("content-type").starts_with("text/plain"));
    let text = reply.text();
    for line in [
        "dvcr_registry_requests_total{route=\"upload\",method=\"POST\",status=\"2xx\"} 1",
        "dvcr_registry_requests_total{route=\"blob\",method=\"GET\",status=\"2xx\"} 3",
        "dvcr_registry_requests_total{route=\"blob\",method=\"GET\",status=\"4xx\"} 1",
        "dvcr_registry_requests_total{route=\"other\",method=\"GET\",status=\"4xx\"} 1",
        "dvcr_registry_request_duration_seconds_count{route=\"blob\"} 4",
        "dvcr_registry_received_bytes_total 5",
        "dvcr_registry_sent_bytes_total 15",
        "dvcr_registry_unauthorized_total 1",
        "dvcr_registry_uploads_in_progress 0",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    for help in text.lines().filter(|line| line.starts_with("# TYPE ")) {
        assert!(help.split(' ').count() == 4, "{help}");
    }
}
