//! What happened: the audit log, and webhooks with receivers of all kinds.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dvcr_registry::{Auth, Bearer, Events, Ignore, Size, Time, Webhook};
use http::{HeaderMap, StatusCode};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::support::{OCI_MANIFEST, Place, Raw, Served, eventually, files, image, noise, sha256};

const EVENTS_TYPE: &str = "application/vnd.docker.distribution.events.v2+json";

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// The lines of the audit log, once there are so many.
async fn entries(path: &Path, count: usize) -> Vec<Value> {
    eventually("audit entries", async || {
        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        (lines.len() >= count).then_some(lines)
    })
    .await
}

/// Picks fields, in their order.
fn pick(entry: &Value, fields: &[&str]) -> Vec<Value> {
    fields.iter().map(|field| entry[*field].clone()).collect()
}

async fn audited(change: impl FnOnce(&Path, &mut dvcr_registry::Config)) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    Served::open_with(dir, |config| {
        config.events.audit_log = Some(path.join("audit.log"));
        change(&path, config);
    })
    .await
}

#[tokio::test]
async fn the_audit_log_tells_who_did_what_to_what() {
    let served = audited(|_, _| ()).await;
    let log = served.dir().join("audit.log");
    assert_eq!(std::fs::metadata(&log).unwrap().permissions().mode() & 0o137, 0);
    let layer = noise(1000, 1);
    let (config, layer_digest) = (sha256(b"{}"), sha256(&layer));
    served.push_blob("a/b", b"{}").await;
    let session = served.begin("a/b").await;
    served.send("PATCH", &session, &[], layer[..400].to_vec()).await.expect(202);
    served
        .send("PUT", &format!("{session}?digest={layer_digest}"), &[], layer[400..].to_vec())
        .await
        .expect(201);
    let digest = served.push_manifest("a/b", "v1", &image(OCI_MANIFEST, b"{}", &[&layer])).await;
    served.ask("POST", &format!("/v2/c/d/blobs/uploads/?mount={config}&from=a/b")).await.expect(201);
    served.get("/v2/a/b/manifests/v1").await.expect(200);
    served.ask("HEAD", &format!("/v2/a/b/blobs/{layer_digest}")).await.expect(200);
    let blob = format!("/v2/a/b/blobs/{layer_digest}");
    served.send("GET", &blob, &[("range", "bytes=0-99")], "").await.expect(206);
    served.get("/v2/a/b/manifests/none").await.expect(404);
    served.get("/v2/a/b/tags/list").await.expect(200);
    served.ask("DELETE", "/v2/a/b/manifests/v1").await.expect(202);
    served.ask("DELETE", &format!("/v2/a/b/manifests/{digest}")).await.expect(202);
    served.ask("DELETE", &format!("/v2/c/d/blobs/{config}")).await.expect(202);
    let cancelled = served.begin("a/b").await;
    served.ask("DELETE", &cancelled).await.expect(204);
    served.get("/v2/_nothing").await.expect(404);
    // What nobody sends without meaning it.
    let headers = [("user-agent", "curl\u{9b}\"\\"), ("x-forwarded-for", "10.9.8.7")];
    Raw::start(served.address, "GET /v2/a/b/manifests/v1", &headers).await.finish().await.expect(404);

    let entries = entries(&log, 16).await;
    let manifest = image(OCI_MANIFEST, b"{}", &[&layer]).to_string().len();
    let expected = [
        json!(["push", "blob", "a/b", null, config, 201, "ok", 2, 0]),
        json!(["upload-start", "blob", "a/b", null, null, 202, "ok", 0, 0]),
        json!(["upload", "blob", "a/b", null, null, 202, "ok", 400, 0]),
        json!(["push", "blob", "a/b", null, layer_digest, 201, "ok", 600, 0]),
        json!(["push", "manifest", "a/b", "v1", digest, 201, "ok", manifest, 0]),
        json!(["mount", "blob", "c/d", null, config, 201, "ok", 0, 0]),
        json!(["pull", "manifest", "a/b", "v1", digest, 200, "ok", 0, manifest]),
        json!(["head", "blob", "a/b", null, layer_digest, 200, "ok", 0, 0]),
        json!(["pull", "blob", "a/b", null, layer_digest, 206, "ok", 0, 100]),
        json!(["pull", "manifest", "a/b", "none", null, 404, "failed", 0, entries[9]["sent_bytes"]]),
        json!(["delete", "manifest", "a/b", "v1", null, 202, "ok", 0, 0]),
        json!(["delete", "manifest", "a/b", digest, digest, 202, "ok", 0, 0]),
        json!(["delete", "blob", "c/d", null, config, 202, "ok", 0, 0]),
        json!(["upload-start", "blob", "a/b", null, null, 202, "ok", 0, 0]),
        json!(["upload-cancel", "blob", "a/b", null, null, 204, "ok", 0, 0]),
        json!(["pull", "manifest", "a/b", "v1", null, 404, "failed", 0, entries[15]["sent_bytes"]]),
    ];
    let fields = [
        "action",
        "kind",
        "repository",
        "reference",
        "digest",
        "status",
        "result",
        "received_bytes",
        "sent_bytes",
    ];
    for (entry, expected) in entries.iter().zip(&expected) {
        assert_eq!(Value::from(pick(entry, &fields)), *expected, "{entry}");
    }
    assert_eq!(entries.len(), expected.len(), "{entries:?}");
    assert_eq!(entries[5]["from"], "a/b");
    assert!(session.ends_with(entries[2]["upload"].as_str().unwrap()));
    let last = &entries[15];
    assert_eq!(last["user_agent"], "curl\u{fffd}\"\\");
    assert_eq!(last["forwarded_for"], "10.9.8.7");
    assert!(last["address"].as_str().unwrap().starts_with("127.0.0.1:"), "{last}");
    assert_eq!(pick(last, &["user", "auth"]), [Value::Null, json!("none")]);
    let ids: BTreeMap<_, _> = entries.iter().map(|entry| (entry["id"].to_string(), ())).collect();
    assert_eq!(ids.len(), entries.len());
    assert_eq!(served.metric("dvcr_registry_audit_entries_total").await, 16);
}

/// Passwords, a token and the value of a header, that must be nowhere.
struct Secrets {
    token: String,
}

impl Secrets {
    const ADMIN: &str = "admins-password";
    const HEADER: &str = "Bearer of-the-webhook";

    fn assert_absent(&self, dir: &Path) {
        let parts = ["audit.log", "root/dvcr"].map(|part| dir.join(part));
        let found = parts.iter().flat_map(|path| match path.is_dir() {
            true => files(path),
            false => [(path.clone(), std::fs::read(path).unwrap())].into(),
        });
        let found: Vec<_> = found.collect();
        assert!(found.iter().any(|(_, bytes)| bytes.len() > 1000));
        for (path, bytes) in found {
            let text = String::from_utf8_lossy(&bytes);
            let basic = STANDARD.encode(format!("admin:{}", Self::ADMIN));
            for secret in [Self::ADMIN, Self::HEADER, "of-the-webhook", &self.token, &basic, "wrong-password"]
            {
                assert!(!text.contains(secret), "{} has {secret}", path.display());
            }
        }
    }
}

/// A registry with users, tokens and the Bearer flow, and the secrets of all.
async fn with_users(events: impl FnOnce(&Path, &mut Events)) -> (Served, Secrets) {
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let claims = json!({
        "iss": "virtualization-controller", "aud": "dvcr", "iat": now, "nbf": now, "exp": now + 600,
        "access": [{"type": "repository", "name": "vi/ns/a", "actions": ["pull", "push"]}],
    });
    let header = Header { kid: Some("dvcr".to_owned()), ..Header::new(Algorithm::ES256) };
    let key = EncodingKey::from_ec_der(&pair.serialize_der());
    let secrets = Secrets { token: encode(&header, &claims, &key).unwrap() };
    let served = audited(|dir, config| {
        let file = |name: &str, content: &str| {
            std::fs::write(dir.join(name), content).unwrap();
            Some(dir.join(name))
        };
        config.auth = Some(Auth {
            admin_password: file("admin", Secrets::ADMIN),
            node_puller_password: file("puller", "pull-only"),
            token_key: file("token.pub", &pair.public_key_pem()),
            anonymous_pull: vec!["public/*".parse().unwrap()],
            bearer: Some(Bearer::default()),
            ..Auth::default()
        });
        events(dir, &mut config.events);
    })
    .await;
    (served, secrets)
}

#[tokio::test]
async fn every_role_has_its_entries_and_no_secret_is_in_any_file() {
    let sink = Sink::new().await;
    let (url, down) = (sink.url(), "http://127.0.0.1:9/never/of-the-webhook".to_owned());
    let (served, secrets) = with_users(|dir, events| {
        std::fs::write(dir.join("header"), format!("{}\n", Secrets::HEADER)).unwrap();
        let hook = |name: &str, url: &str| Webhook {
            secret_headers: BTreeMap::from([("authorization".to_owned(), dir.join("header"))]),
            ..webhook(name, url)
        };
        events.webhooks = vec![hook("up", &url), hook("down", &down)];
    })
    .await;
    let ask = async |method: &str, path: &str, authorization: Option<&str>| {
        let headers: Vec<_> = authorization.map(|value| ("authorization", value)).into_iter().collect();
        served.send(method, path, &headers, "x").await
    };
    let (admin, puller) = (basic("admin", Secrets::ADMIN), basic("node-puller", "pull-only"));
    let token = basic("importer", &secrets.token);
    let digest = sha256(b"x");
    for (repo, who) in [("vi/ns/a", &token), ("public/x", &admin)] {
        ask("POST", &format!("/v2/{repo}/blobs/uploads/?digest={digest}"), Some(who)).await.expect(201);
    }
    let blob = format!("/v2/vi/ns/a/blobs/{digest}");
    ask("GET", &blob, Some(&puller)).await.expect(200);
    ask("DELETE", &blob, Some(&puller)).await.expect(403);
    ask("DELETE", &blob, Some(&token)).await.expect(403);
    ask("GET", &blob, None).await.expect(401);
    ask("GET", &blob, Some(&basic("admin", "wrong-password"))).await.expect(401);
    ask("GET", &format!("/v2/public/x/blobs/{digest}"), None).await.expect(200);
    ask("GET", "/v2/", None).await.expect(401);
    ask("GET", "/v2/_catalog", Some(&puller)).await.expect(403);
    ask("GET", "/v2/no/route/at/all", None).await.expect(401);
    let path = "/token?service=dvcr&scope=repository:vi/ns/a:pull";
    let issued = ask("GET", path, Some(&admin)).await.expect(200).json();
    let bearer = issued["token"].as_str().unwrap();
    ask("GET", &blob, Some(&format!("Bearer {bearer}"))).await.expect(200);
    ask("DELETE", &blob, Some(&admin)).await.expect(202);

    let log = served.dir().join("audit.log");
    let entries = entries(&log, 14).await;
    let fields = ["action", "repository", "user", "auth", "status", "result"];
    let found: Vec<_> = entries.iter().map(|entry| Value::from(pick(entry, &fields))).collect();
    let expected = [
        json!(["push", "vi/ns/a", "importer", "token", 201, "ok"]),
        json!(["push", "public/x", "admin", "password", 201, "ok"]),
        json!(["pull", "vi/ns/a", "node-puller", "password", 200, "ok"]),
        json!(["delete", "vi/ns/a", "node-puller", "password", 403, "refused"]),
        json!(["delete", "vi/ns/a", "importer", "token", 403, "refused"]),
        json!(["pull", "vi/ns/a", null, "anonymous", 401, "refused"]),
        json!(["pull", "vi/ns/a", null, "invalid", 401, "refused"]),
        json!(["pull", "public/x", null, "anonymous", 200, "ok"]),
        json!(["other", null, null, "anonymous", 401, "refused"]),
        json!(["list", null, "node-puller", "password", 403, "refused"]),
        json!(["other", null, null, "anonymous", 401, "refused"]),
        json!(["token", null, "admin", "password", 200, "ok"]),
        json!(["pull", "vi/ns/a", "admin", "bearer", 200, "ok"]),
        json!(["delete", "vi/ns/a", "admin", "password", 202, "ok"]),
    ];
    assert_eq!(found, expected);
    assert_eq!(entries[10]["path"], "/v2/no/route/at/all");

    let told = sink.events(6).await;
    let actors: Vec<_> = told.iter().map(|event| json!([event["action"], event["actor"]])).collect();
    let expected = [
        json!(["push", {"name": "importer"}]),
        json!(["push", {"name": "admin"}]),
        json!(["pull", {"name": "node-puller"}]),
        json!(["pull", {}]),
        json!(["pull", {"name": "admin"}]),
        json!(["delete", {"name": "admin"}]),
    ];
    assert_eq!(actors, expected);
    for headers in &*sink.headers.lock().unwrap() {
        assert_eq!(headers["authorization"], Secrets::HEADER);
        assert_eq!(headers["content-type"], EVENTS_TYPE);
    }
    assert!(!served.get("/metrics").await.text().contains("of-the-webhook"));
    let bearer = Secrets { token: bearer.to_owned() };
    let dir = served.close().await;
    secrets.assert_absent(dir.path());
    bearer.assert_absent(dir.path());
}

#[tokio::test]
async fn a_download_that_breaks_off_counts_what_went_and_tells_no_webhook() {
    let sink = Sink::new().await;
    let url = sink.url();
    let served = audited(|_, config| config.events.webhooks = vec![webhook("one", &url)]).await;
    let bytes = noise(64 << 20, 7);
    let digest = served.push_blob("a", &bytes).await;
    let raw = Raw::start(served.address, &format!("GET /v2/a/blobs/{digest}"), &[]).await;
    let log = served.dir().join("audit.log");
    eventually("some of the download", async || {
        (served.metric("dvcr_registry_sent_bytes_total").await > 1 << 20).then_some(())
    })
    .await;
    drop(raw);
    let entries = entries(&log, 2).await;
    let sent = entries[1]["sent_bytes"].as_u64().unwrap();
    assert_eq!(
        pick(&entries[1], &["action", "status", "result"]),
        [json!("pull"), json!(200), json!("broken")]
    );
    assert!((1 << 20..bytes.len() as u64).contains(&sent), "{sent}");
    assert_eq!(entries[0]["received_bytes"], bytes.len());

    // An upload that breaks off counts what came.
    let session = served.begin("a").await;
    let mut raw =
        Raw::start(served.address, &format!("PATCH {session}"), &[("content-length", "1000")]).await;
    raw.send(&bytes[..300]).await;
    eventually("some of the upload", async || {
        (served.metric("dvcr_registry_received_bytes_total").await > bytes.len() as u64).then_some(())
    })
    .await;
    drop(raw);
    let entries = self::entries(&log, 4).await;
    let fields = ["action", "status", "result", "received_bytes"];
    assert_eq!(Value::from(pick(&entries[3], &fields)), json!(["upload", 400, "failed", 300]));
    // The next that is told is the next that happened.
    served.get(&format!("/v2/a/blobs/{digest}")).await.expect(200);
    let told: Vec<_> = sink.events(2).await.iter().map(|event| event["action"].clone()).collect();
    assert_eq!(told, ["push", "pull"]);
}

#[tokio::test]
async fn a_rotated_audit_log_is_opened_again() {
    let served = audited(|_, _| ()).await;
    let (log, old) = (served.dir().join("audit.log"), served.dir().join("audit.log.1"));
    served.push_blob("a", b"1").await;
    entries(&log, 1).await;
    std::fs::rename(&log, &old).unwrap();
    // Looked at every second when something is written.
    let mut pushed = 1;
    eventually("a new log", async || {
        pushed += 1;
        served.push_blob("a", pushed.to_string().as_bytes()).await;
        log.exists().then_some(())
    })
    .await;
    let here = eventually("all entries", async || {
        let count = |path| std::fs::read_to_string(path).unwrap().lines().count();
        (count(&old) + count(&log) == pushed).then(|| count(&log))
    })
    .await;
    assert!(here > 0);
}

/// A receiver of events.
struct Sink {
    address: std::net::SocketAddr,
    /// What is answered.
    status: Arc<AtomicU16>,
    /// A permit is taken for each request before it is answered.
    turns: Arc<Semaphore>,
    requests: Arc<AtomicUsize>,
    /// What was taken: each request.
    taken: Arc<Mutex<Vec<Vec<Value>>>>,
    headers: Arc<Mutex<Vec<HeaderMap>>>,
}

impl Sink {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::on(listener)
    }

    fn on(listener: TcpListener) -> Self {
        let sink = Self {
            address: listener.local_addr().unwrap(),
            status: Arc::new(AtomicU16::new(200)),
            turns: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)),
            requests: Arc::default(),
            taken: Arc::default(),
            headers: Arc::default(),
        };
        let (status, turns, requests) =
            (Arc::clone(&sink.status), Arc::clone(&sink.turns), Arc::clone(&sink.requests));
        let (taken, headers) = (Arc::clone(&sink.taken), Arc::clone(&sink.headers));
        let handler = move |head: HeaderMap, body: bytes::Bytes| async move {
            requests.fetch_add(1, Ordering::Relaxed);
            turns.acquire().await.unwrap().forget();
            let envelope: Value = serde_json::from_slice(&body).unwrap();
            let events = envelope["events"].as_array().unwrap().clone();
            let status = match status.load(Ordering::Relaxed) {
                413 if events.len() == 1 => 200,
                status => status,
            };
            if status < 400 && status != 302 {
                headers.lock().unwrap().push(head);
                taken.lock().unwrap().push(events);
            }
            (StatusCode::from_u16(status).unwrap(), [("location", "/elsewhere")], "thank you")
        };
        let router = Router::new().fallback(handler).layer(DefaultBodyLimit::disable());
        tokio::spawn(axum::serve(listener, router).into_future());
        sink
    }

    fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    /// All events, once there are so many.
    async fn events(&self, count: usize) -> Vec<Value> {
        eventually("events", async || {
            let events = self.taken.lock().unwrap().concat();
            (events.len() >= count).then_some(events)
        })
        .await
    }

    fn answer(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }
}

fn webhook(name: &str, url: &str) -> Webhook {
    Webhook {
        name: name.to_owned(),
        url: url.to_owned(),
        backoff: Time(Duration::from_millis(20)),
        timeout: Time(Duration::from_secs(20)),
        ..Webhook::default()
    }
}

async fn told(dir: impl Into<Place>, hooks: Vec<Webhook>) -> Served {
    Served::open_with(dir, |config| config.events.webhooks = hooks).await
}

fn dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Pushes blobs of their own content, so that each event tells which it is of.
async fn push(served: &Served, numbers: std::ops::Range<usize>) -> Vec<String> {
    let mut digests = Vec::new();
    for number in numbers {
        digests.push(served.push_blob("a", number.to_string().as_bytes()).await);
    }
    digests
}

fn digests(events: &[Value]) -> Vec<String> {
    events.iter().map(|event| event["target"]["digest"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_push_by_digest_tells_of_each_tag_and_filters_keep_quiet() {
    let (all, some) = (Sink::new().await, Sink::new().await);
    let filtered = Webhook {
        ignore: Ignore {
            media_types: vec!["application/octet-stream".to_owned()],
            actions: vec!["pull".to_owned()],
        },
        repositories: vec!["vi/**".parse().unwrap()],
        ..webhook("some", &some.url())
    };
    let served = told(dir(), vec![webhook("all", &all.url()), filtered]).await;
    for repo in ["vi/ns/x", "other"] {
        served.push_blob(repo, b"{}").await;
        let manifest = image(OCI_MANIFEST, b"{}", &[]);
        let digest = sha256(manifest.to_string().as_bytes());
        served.push_manifest(repo, &format!("{digest}?tag=one&tag=two"), &manifest).await;
        served.get(&format!("/v2/{repo}/manifests/one")).await.expect(200);
        served.ask("DELETE", &format!("/v2/{repo}/manifests/{digest}")).await.expect(202);
    }
    let short = |event: &Value| {
        let target = &event["target"];
        json!([event["action"], target["repository"], target["tag"], target["mediaType"]])
    };
    let expected = [
        json!(["push", "vi/ns/x", null, "application/octet-stream"]),
        json!(["push", "vi/ns/x", "one", OCI_MANIFEST]),
        json!(["push", "vi/ns/x", "two", OCI_MANIFEST]),
        json!(["pull", "vi/ns/x", "one", OCI_MANIFEST]),
        json!(["delete", "vi/ns/x", null, ""]),
        json!(["delete", "vi/ns/x", "one", ""]),
        json!(["delete", "vi/ns/x", "two", ""]),
    ];
    let found: Vec<_> = all.events(14).await.iter().map(short).collect();
    assert_eq!(found[..7], expected);
    assert_eq!(found.len(), 14);
    let found: Vec<_> = some.events(5).await.iter().map(short).collect();
    assert_eq!(found, [1, 2, 4, 5, 6].map(|at| expected[at].clone()));
    let [all, some] =
        ["all", "some"].map(|name| format!("dvcr_registry_webhook_sent_events_total{{webhook=\"{name}\"}}"));
    eventually("counts", async || {
        (served.metric(&all).await == 14 && served.metric(&some).await == 5).then_some(())
    })
    .await;
}

#[tokio::test]
async fn events_wait_for_a_receiver_and_arrive_once_and_in_order_across_restarts() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    // Nobody answers there: connections are refused, and later taken up.
    let address = listener.local_addr().unwrap();
    drop(listener);
    let hook = Webhook { batch: 7, ..webhook("one", &url) };
    let mut pushed = Vec::new();
    let mut dir = Place::from(tempfile::tempdir().unwrap());
    for round in 0..3 {
        let served = told(dir, vec![hook.clone()]).await;
        pushed.extend(push(&served, round * 20..(round + 1) * 20).await);
        eventually("events on disk", async || {
            let pending = served.metric("dvcr_registry_webhook_pending_events{webhook=\"one\"}").await;
            (pending == pushed.len() as u64).then_some(())
        })
        .await;
        dir = served.close().await;
    }
    let sink = Sink::on(TcpListener::bind(address).await.unwrap());
    let served = told(dir, vec![hook.clone()]).await;
    assert_eq!(digests(&sink.events(60).await), pushed);
    assert!(sink.taken.lock().unwrap().iter().all(|events| events.len() <= 7));
    eventually("nothing pending", async || {
        (served.metric("dvcr_registry_webhook_pending_events{webhook=\"one\"}").await == 0).then_some(())
    })
    .await;
    // What was taken does not come again.
    let served = told(served.close().await, vec![hook]).await;
    pushed.extend(push(&served, 60..61).await);
    assert_eq!(digests(&sink.events(61).await), pushed);
}

#[tokio::test]
async fn what_is_not_taken_is_sent_again_and_what_is_too_large_in_parts() {
    let sink = Sink::new().await;
    let served = told(dir(), vec![webhook("one", &sink.url())]).await;
    let failures = "dvcr_registry_webhook_failures_total{webhook=\"one\"}";
    let mut pushed = Vec::new();
    // A redirect would have the same request sent elsewhere: that is not to have taken it.
    for status in [500, 400, 302] {
        sink.answer(status);
        let before = served.metric(failures).await;
        pushed.extend(push(&served, pushed.len()..pushed.len() + 1).await);
        eventually("three attempts", async || (served.metric(failures).await >= before + 3).then_some(()))
            .await;
        assert_eq!(sink.taken.lock().unwrap().concat().len(), pushed.len() - 1);
        sink.answer(if status == 400 { 304 } else { 204 });
        assert_eq!(digests(&sink.events(pushed.len()).await), pushed);
    }
    sink.answer(500);
    pushed.extend(push(&served, 10..30).await);
    sink.answer(413);
    assert_eq!(digests(&sink.events(pushed.len()).await), pushed);
}

#[tokio::test]
async fn a_receiver_that_never_answers_slows_nobody_and_the_queue_stays_in_its_bounds() {
    let sink = Sink::new().await;
    let taken = sink.turns.forget_permits(Semaphore::MAX_PERMITS);
    assert_eq!(taken, Semaphore::MAX_PERMITS);
    let hook = Webhook {
        queue_bytes: Size(1 << 20),
        timeout: Time(Duration::from_secs(1)),
        ..webhook("slow", &sink.url())
    };
    let served = told(dir(), vec![hook]).await;
    let repo = vec!["a"; 120].join("/");
    served.push_blob(&repo, b"x").await;
    eventually("a request", async || (sink.requests.load(Ordering::Relaxed) > 0).then_some(())).await;
    let begun = Instant::now();
    let path = format!("/v2/{repo}/blobs/{}", sha256(b"x"));
    let user_agent = "x".repeat(256);
    let count = 1500;
    for _ in 0..count {
        served.send("HEAD", &path, &[("user-agent", &user_agent)], "").await.expect(200);
    }
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    let dropped = "dvcr_registry_webhook_dropped_events_total{webhook=\"slow\"}";
    let pending = "dvcr_registry_webhook_pending_events{webhook=\"slow\"}";
    let dropped = eventually("all of them in the queue", async || {
        let (dropped, pending) = (served.metric(dropped).await, served.metric(pending).await);
        (dropped + pending == count + 1).then_some(dropped)
    })
    .await;
    assert!(dropped > 100, "{dropped}");
    let bytes: usize = files(&served.dir().join("root/dvcr/events/slow")).values().map(Vec::len).sum();
    assert!(bytes <= (1 << 20) + 100, "{bytes}");
    sink.turns.add_permits(Semaphore::MAX_PERMITS - 1000);
    // Those that are left, the newest.
    let last = served.push_blob("last", b"last").await;
    let arrived = eventually("the last", async || {
        let digests = digests(&sink.taken.lock().unwrap().concat());
        digests.contains(&last).then_some(digests.len() as u64)
    })
    .await;
    assert!(arrived >= count + 2 - dropped, "{arrived} {dropped}");
}

#[tokio::test]
async fn a_push_whose_client_does_not_wait_for_the_answer_is_told_too() {
    let sink = Sink::new().await;
    let served = told(dir(), vec![webhook("one", &sink.url())]).await;
    let mut pushed = Vec::new();
    for number in 0..20 {
        let bytes = noise(200_000, number);
        let line = format!("POST /v2/a/blobs/uploads/?digest={}", sha256(&bytes));
        let mut raw = Raw::start(served.address, &line, &[("content-length", "200000")]).await;
        raw.send(&bytes).await;
        drop(raw);
        pushed.push(sha256(&bytes));
    }
    pushed.sort();
    let mut found = digests(&sink.events(pushed.len()).await);
    found.sort();
    assert_eq!(found, pushed);
}

#[tokio::test]
async fn a_receiver_with_a_certificate_of_its_own_is_known_by_its_root() {
    // Any server that takes a POST will do: another registry, that begins an upload.
    let tls = dir();
    let key = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let (cert_file, key_file) = (tls.path().join("cert.pem"), tls.path().join("key.pem"));
    std::fs::write(&cert_file, key.cert.pem()).unwrap();
    std::fs::write(&key_file, key.signing_key.serialize_pem()).unwrap();
    let receiver = Served::open_with(dir(), |config| {
        config.tls = Some(dvcr_registry::Tls { cert: cert_file.clone(), key: key_file, client_ca: None });
    })
    .await;
    let url = format!("https://{}/v2/sink/blobs/uploads/", receiver.address);
    let trusting = Webhook { ca: Some(cert_file), ..webhook("trusting", &url) };
    let served = told(dir(), vec![trusting, webhook("other", &url)]).await;
    served.push_blob("a", b"x").await;
    eventually("one that is taken, and one that is not", async || {
        let sent = served.metric("dvcr_registry_webhook_sent_events_total{webhook=\"trusting\"}").await;
        let failures = served.metric("dvcr_registry_webhook_failures_total{webhook=\"other\"}").await;
        (sent == 1 && failures > 0).then_some(())
    })
    .await;
    assert_eq!(served.metric("dvcr_registry_webhook_sent_events_total{webhook=\"other\"}").await, 0);
}
