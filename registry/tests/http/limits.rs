//! What clients may take of the machine: quotas, free space, requests, time.

use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dvcr_registry::{Auth, Config, Outcome, Quota, Task, control};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{OCI_INDEX, OCI_MANIFEST, Raw, Served, eventually, image, noise, sha256};

async fn served(change: impl FnOnce(&mut Config)) -> Served {
    Served::open_with(tempfile::tempdir().unwrap(), change).await
}

fn quotas(all: &[(&str, u64)]) -> Vec<Quota> {
    all.iter().map(|(prefix, bytes)| Quota { prefix: prefix.parse().unwrap(), bytes: *bytes }).collect()
}

async fn used(served: &Served, prefix: &str) -> u64 {
    served.metric(&format!("dvcr_registry_quota_used_bytes{{prefix=\"{prefix}\"}}")).await
}

#[tokio::test]
async fn what_a_quota_does_not_leave_is_refused_before_the_body_is_read() {
    let served =
        served(|config| config.limits.quotas = quotas(&[("vi/*/", 10_000), ("vi/big/", 1 << 20)])).await;
    served.push_blob("vi/a/x", &noise(6000, 1)).await;
    // It waits to be asked for its body, and is not.
    let digest = sha256(b"never sent");
    let headers = [("content-length", "5000"), ("expect", "100-continue")];
    let line = format!("POST /v2/vi/a/y/blobs/uploads/?digest={digest}");
    let reply = Raw::start(served.address, &line, &headers).await.finish().await.expect_error(403, "DENIED");
    let error = &reply.json()["errors"][0];
    assert_eq!(error["detail"], serde_json::json!({"prefix": "vi/a/", "limit": 10_000, "used": 6000}));
    assert!(error["message"].as_str().unwrap().contains("vi/a/"), "{error}");
    // Far more than is read of a body that is refused; the answer comes at once.
    let headers = [("content-length", "100000000000")];
    let begun = Instant::now();
    Raw::start(served.address, &line, &headers).await.finish().await.expect_error(403, "DENIED");
    assert!(begun.elapsed() < Duration::from_secs(5));

    // What is left can be used to the last byte, and others have their own.
    served.push_blob("vi/a/y", &noise(4000, 2)).await;
    served.push_blob("vi/b/x", &noise(10_000, 3)).await;
    served.push_blob("vi/big/x", &noise(100_000, 4)).await;
    served.push_blob("elsewhere", &noise(100_000, 5)).await;
    assert_eq!(used(&served, "vi/a/").await, 10_000);
    assert_eq!(served.metric("dvcr_registry_quota_limit_bytes{prefix=\"vi/big/\"}").await, 1 << 20);

    // A blob counts once below a prefix, also when it is mounted.
    let blob = sha256(&noise(6000, 1));
    served.ask("POST", &format!("/v2/vi/a/z/blobs/uploads/?mount={blob}&from=vi/a/x")).await.expect(201);
    let other = sha256(&noise(100_000, 5));
    let path = format!("/v2/vi/a/z/blobs/uploads/?mount={other}&from=elsewhere");
    served.ask("POST", &path).await.expect_error(403, "DENIED");
    let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []});
    let headers = [("content-type", OCI_INDEX)];
    let put = async |repo| {
        served.send("PUT", &format!("/v2/{repo}/manifests/v"), &headers, manifest.to_string()).await
    };
    put("vi/a/x").await.expect_error(403, "DENIED");

    // One link of two goes, then the other.
    for (repo, left) in [("vi/a/x", 10_000), ("vi/a/z", 4000)] {
        served.ask("DELETE", &format!("/v2/{repo}/blobs/{blob}")).await.expect(202);
        assert_eq!(used(&served, "vi/a/").await, left);
    }
    put("vi/a/x").await.expect(201);
    assert_eq!(used(&served, "vi/a/").await, 4000 + manifest.to_string().len() as u64);
    put("vi/a/x").await.expect(201);
    served
        .ask("DELETE", &format!("/v2/vi/a/x/manifests/{}", sha256(manifest.to_string().as_bytes())))
        .await
        .expect(202);
    assert_eq!(used(&served, "vi/a/").await, 4000);
}

#[tokio::test]
async fn a_session_that_says_how_much_will_come_is_refused_where_there_is_no_room_for_it() {
    let served = served(|config| config.limits.quotas = quotas(&[("q/", 10_000)])).await;
    served.push_blob("q/a", &noise(6000, 1)).await;
    for path in ["/v2/q/b/blobs/uploads/", "/v2/q/b/blobs/uploads/?session=mine"] {
        let begin =
            async |length: &str| served.send("POST", path, &[("dvcr-upload-length", length)], "").await;
        let refused = begin("5000").await.expect_error(403, "DENIED");
        let error = &refused.json()["errors"][0];
        assert_eq!(error["detail"], serde_json::json!({"prefix": "q/", "limit": 10_000, "used": 6000}));
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("no room for 5000 more, 1000 are missing"), "{message}");
        let refused = begin("9000000000000000000").await;
        assert!(refused.status == 403 || refused.status == 507, "{}", refused.status);
        begin("5 KB").await.expect_error(400, "BLOB_UPLOAD_INVALID");
        // Nothing is held for who only asks.
        for _ in 0..3 {
            begin("4000").await.expect(202);
        }
        assert_eq!(used(&served, "q/").await, 6000);
    }
    // What has come of it counts already.
    let path = "/v2/q/b/blobs/uploads/?session=mine";
    let location = served.ask("POST", path).await.expect(202).header("location").to_owned();
    served.send("PATCH", &location, &[], noise(3000, 2)).await.expect(202);
    served.send("POST", path, &[("dvcr-upload-length", "4000")], "").await.expect(202);
    served.send("POST", path, &[("dvcr-upload-length", "4001")], "").await.expect_error(403, "DENIED");
    served
        .send("POST", "/v2/free/blobs/uploads/", &[("dvcr-upload-length", "1000000")], "")
        .await
        .expect(202);
}

#[tokio::test]
async fn an_upload_that_tells_no_length_is_refused_as_soon_as_it_passes() {
    let served = served(|config| config.limits.quotas = quotas(&[("q/", 3 << 20)])).await;
    let location = served.begin("q/a").await;
    let first = noise(1 << 20, 1);
    served.send("PATCH", &location, &[], first.clone()).await.expect(202);
    assert_eq!(used(&served, "q/").await, 1 << 20);
    // Chunked: nobody knows how much it will be.
    let mut raw =
        Raw::start(served.address, &format!("PATCH {location}"), &[("transfer-encoding", "chunked")]).await;
    let piece = noise(1 << 20, 2);
    for _ in 0..3 {
        raw.send(format!("{:x}\r\n", piece.len()).as_bytes()).await;
        raw.send(&piece).await;
        raw.send(b"\r\n").await;
    }
    raw.send(b"0\r\n\r\n").await;
    raw.finish().await.expect_error(403, "DENIED");
    // What was acknowledged before is still there, and can be finished.
    assert_eq!(used(&served, "q/").await, 1 << 20);
    assert_eq!(served.get(&location).await.expect(204).header("range"), "0-1048575");
    served.send("PATCH", &location, &[], piece.clone()).await.expect(202);

    // It counts after a restart, too.
    let dir = served.close().await;
    let served = Served::open_with(dir, |config| config.limits.quotas = quotas(&[("q/", 3 << 20)])).await;
    let line = "POST /v2/q/b/blobs/uploads/?digest=".to_owned() + &sha256(b"x");
    let headers = [("content-length", "1048577"), ("expect", "100-continue")];
    Raw::start(served.address, &line, &headers).await.finish().await.expect_error(403, "DENIED");
    assert_eq!(used(&served, "q/").await, 2 << 20);
    let digest = sha256(&[first, piece].concat());
    served.ask("PUT", &format!("{location}?digest={digest}")).await.expect(201);
    assert_eq!(used(&served, "q/").await, 2 << 20);

    // An upload that is cancelled leaves its room to others.
    let location = served.begin("q/b").await;
    served.send("PATCH", &location, &[], noise(1 << 20, 3)).await.expect(202);
    assert_eq!(used(&served, "q/").await, 3 << 20);
    served.ask("DELETE", &location).await.expect(204);
    assert_eq!(used(&served, "q/").await, 2 << 20);
}

#[tokio::test]
async fn a_blob_that_the_prefix_has_is_pushed_again_without_room() {
    let served = served(|config| config.limits.quotas = quotas(&[("q/", 1 << 20)])).await;
    let (small, large) = (noise(10_000, 1), noise(900_000, 2));
    for content in [&small, &large] {
        served.push_blob("q/a", content).await;
    }
    for content in [&small, &large] {
        served.push_blob("q/a", content).await;
        served.push_blob("q/b", content).await;
        let path = format!("{}?digest={}", served.begin("q/c").await, sha256(content));
        served.send("PUT", &path, &[], content.clone()).await.expect(201);
    }
    assert_eq!(used(&served, "q/").await, 910_000);

    // What is no such blob needs room, whatever it is called: before its body is read, or when it has come.
    let named = format!("POST /v2/q/a/blobs/uploads/?digest={}", sha256(&large));
    let headers = [("content-length", "1100000"), ("expect", "100-continue")];
    Raw::start(served.address, &named, &headers).await.finish().await.expect_error(403, "DENIED");
    let path = format!("/v2/q/a/blobs/uploads/?digest={}", sha256(&large));
    let liar = served.send("POST", &path, &[], noise(900_000, 3)).await;
    liar.expect_error(400, "DIGEST_INVALID");
    let location = served.begin("q/a").await;
    served.send("PATCH", &location, &[], large.clone()).await.expect_error(403, "DENIED");

    // What breaks off is no blob, and is kept as far as there is room.
    for (sent, kept) in [(500_000, "0-0"), (100_000, "0-99999")] {
        let location = served.begin("q/a").await;
        let line = format!("PUT {location}?digest={}", sha256(&large));
        let mut raw = Raw::start(served.address, &line, &[("content-length", "900000")]).await;
        raw.send(&large[..sent]).await;
        eventually("the upload to go on", async || {
            (served.metric("dvcr_registry_uploads_in_progress").await == 1).then_some(())
        })
        .await;
        drop(raw);
        eventually("its end", async || {
            (served.metric("dvcr_registry_uploads_in_progress").await == 0).then_some(())
        })
        .await;
        assert_eq!(served.get(&location).await.expect(204).header("range"), kept);
        let left = if sent == 100_000 { 100_000 } else { 0 };
        assert_eq!(used(&served, "q/").await, 910_000 + left);
    }
}

#[tokio::test]
async fn uploads_side_by_side_cannot_pass_together() {
    let served = served(|config| config.limits.quotas = quotas(&[("q/", 5 << 20)])).await;
    let served = std::sync::Arc::new(served);
    let pushes = (0..12).map(|n| {
        let served = std::sync::Arc::clone(&served);
        tokio::spawn(async move {
            let location = served.begin(&format!("q/{n}")).await;
            let content = noise((1 << 20) - 7, n);
            let path = format!("{location}?digest={}", sha256(&content));
            served.send("PUT", &path, &[], content).await.status
        })
    });
    let mut accepted = 0;
    for push in pushes.collect::<Vec<_>>() {
        match push.await.unwrap() {
            201 => accepted += 1,
            status => assert_eq!(status, 403),
        }
    }
    assert_eq!(accepted, 5);
    assert_eq!(used(&served, "q/").await, 5 * ((1 << 20) - 7));
}

#[tokio::test]
async fn usage_is_what_a_new_count_finds_after_changes_of_all_kinds() {
    let limits = |config: &mut Config| {
        config.limits.quotas = quotas(&[("q/", 1 << 30)]);
        config.collection.grace = Duration::from_millis(200);
    };
    let mut served = Served::open_with(tempfile::tempdir().unwrap(), limits).await;
    let mut serial = 0;
    for round in 0..3 {
        for repo in ["q/a", "q/b", "q/b/c", "p"] {
            for _ in 0..3 {
                serial += 1;
                served.push_image(repo, &format!("v{serial}"), serial % 7).await;
            }
            let loose = served.push_blob(repo, &noise(500, serial % 5)).await;
            let path = format!("/v2/q/b/blobs/uploads/?mount={loose}&from={repo}");
            served.ask("POST", &path).await.expect(201);
            let tag = format!("/v2/{repo}/manifests/v{serial}");
            let digest = served.get(&tag).await.expect(200).header("docker-content-digest").to_owned();
            served.ask("DELETE", &format!("/v2/{repo}/manifests/{digest}")).await.expect(202);
            served.ask("DELETE", &format!("/v2/q/b/blobs/{loose}")).await;
            let location = served.begin(repo).await;
            served.send("PATCH", &location, &[], noise(100 + round, serial)).await.expect(202);
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
        let mut config = Config::new(served.dir().join("root"));
        limits(&mut config);
        let work = move || {
            control::perform(config, &Task::Collect { dry_run: false }, &AtomicBool::new(false), |_| ())
        };
        let done = tokio::task::spawn_blocking(work).await.unwrap().unwrap();
        assert!(matches!(done, Outcome::Collected(done) if done.removed_links > 0));
        let kept = used(&served, "q/").await;
        served = Served::open_with(served.close().await, limits).await;
        // The first push counts everything anew.
        served.push_blob("q/a", b"").await;
        assert_eq!((round, used(&served, "q/").await), (round, kept));
        assert!(kept > 0);
    }
}

/// A filesystem of so many bytes, if this machine lets us have one.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mount = |kind: &str, options: &str, what: &str| {
            let mut command = Command::new("mount");
            command.args(["-t", kind, "-o", options, what]).arg(dir.path());
            command.output().is_ok_and(|output| output.status.success())
        };
        mount("tmpfs", &format!("size={bytes}"), "tmpfs").then_some(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).output();
    }
}

#[tokio::test]
async fn a_full_disk_refuses_uploads_loses_nothing_and_can_be_cleaned() {
    // Without the right to mount, the reserve makes a large disk as full.
    let disk = SmallDisk::mount(24 << 20);
    let dir = match &disk {
        Some(disk) => tempfile::tempdir_in(disk.0.path()).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    let free = {
        let volume = rustix::fs::statvfs(dir.path()).unwrap();
        volume.f_bavail * volume.f_frsize
    };
    let reserve = if disk.is_some() { 4 << 20 } else { free - (20 << 20) };
    let limits = move |config: &mut Config| {
        config.limits.reserve_bytes = Some(reserve);
        config.collection.grace = Duration::from_millis(200);
    };
    let served = Served::open_with(dir, limits).await;
    let pushed = served.push_image("a", "v1", 1).await;

    // Known beforehand.
    let line = format!("POST /v2/a/blobs/uploads/?digest={}", sha256(b"x"));
    let headers = [("content-length", "30000000"), ("expect", "100-continue")];
    Raw::start(served.address, &line, &headers).await.finish().await.expect_error(507, "UNKNOWN");
    let announced = [("dvcr-upload-length", "30000000")];
    let refused =
        served.send("POST", "/v2/a/blobs/uploads/", &announced, "").await.expect_error(507, "UNKNOWN");
    let message = refused.json()["errors"][0]["message"].as_str().unwrap().to_owned();
    assert!(
        message.contains("30000000 bytes more") && message.contains(&format!("{reserve} are reserved")),
        "{message}"
    );

    // Not known beforehand: chunks fill it up, and what was acknowledged stays.
    let location = served.begin("a").await;
    let mut content = Vec::new();
    let refused = loop {
        let piece = noise(3 << 20, content.len() as u64);
        let stream: Vec<Result<bytes::Bytes, std::io::Error>> = vec![Ok(piece.clone().into())];
        let body = reqwest::Body::wrap_stream(futures_util::stream::iter(stream));
        let reply = served.send("PATCH", &location, &[], body).await;
        if reply.status != 202 {
            break reply;
        }
        content.extend(piece);
        assert!(content.len() < 40 << 20);
        // The filesystem is asked ten times a second.
        tokio::time::sleep(Duration::from_millis(120)).await;
    };
    refused.expect_error(507, "UNKNOWN");
    assert!(content.len() >= 6 << 20, "{}", content.len());
    let told = served.get(&location).await.expect(204).header("range").to_owned();
    assert_eq!(told, format!("0-{}", content.len() - 1));

    // What has come can be finished, a manifest can be put, things can be deleted, garbage be collected.
    let digest = sha256(&content);
    served.ask("PUT", &format!("{location}?digest={digest}")).await.expect(201);
    assert_eq!(served.get(&format!("/v2/a/blobs/{digest}")).await.expect(200).body, content);
    served.push_manifest("a", "v2", &image(OCI_MANIFEST, b"{}", &[&noise(1000, 1)])).await;
    if disk.is_some() {
        // The rest, too: somebody else fills the disk to the last byte.
        let _ = std::fs::write(served.dir().join("filler"), vec![1; 24 << 20]);
    }
    served.get("/v2/a/manifests/v1").await.expect(200);
    served.ask("DELETE", "/v2/a/manifests/v2").await.expect(202);
    served.ask("DELETE", &format!("/v2/a/blobs/{digest}")).await.expect(202);
    tokio::time::sleep(Duration::from_millis(250)).await;
    let mut config = Config::new(served.dir().join("root"));
    limits(&mut config);
    let work =
        move || control::perform(config, &Task::Collect { dry_run: false }, &AtomicBool::new(false), |_| ());
    let done = tokio::task::spawn_blocking(work).await.unwrap().unwrap();
    assert!(
        matches!(&done, Outcome::Collected(done) if done.freed_bytes == content.len() as u64),
        "{done:?}"
    );
    let _ = std::fs::remove_file(served.dir().join("filler"));
    eventually("room for a new blob", async || {
        let content = noise(5 << 20, 77);
        let path = format!("/v2/a/blobs/uploads/?digest={}", sha256(&content));
        (served.send("POST", &path, &[], content).await.status == 201).then_some(())
    })
    .await;
    assert_eq!(sha256(&served.get("/v2/a/manifests/v1").await.expect(200).body), pushed);
    drop(served.close().await);
    drop(disk);
}

#[tokio::test]
async fn a_client_that_asks_too_often_is_told_when_to_come_again() {
    let served = served(|config| config.limits.request_rate = Some(1)).await;
    let mut refused = None;
    for _ in 0..60 {
        let reply = served.get("/v2/").await;
        if reply.status != 200 {
            refused = Some(reply);
            break;
        }
    }
    let reply = refused.expect("a refusal").expect_error(429, "TOOMANYREQUESTS");
    let seconds: u64 = reply.header("retry-after").parse().unwrap();
    assert!((1..=2).contains(&seconds), "{seconds}");
    served.get("/healthz").await.expect(200);
    assert_eq!(served.metric("dvcr_registry_rate_limited_total").await, 1);
    eventually("its next turn", async || (served.get("/v2/").await.status == 200).then_some(())).await;
}

#[tokio::test]
async fn every_user_has_a_rate_of_their_own_and_strangers_take_no_share_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, name).unwrap();
        Some(path)
    };
    let (admin_password, node_puller_password) = (file("admin"), file("puller"));
    let served = Served::open_with(dir, |config| {
        config.limits.request_rate = Some(1);
        config.auth = Some(Auth { admin_password, node_puller_password, ..Auth::default() });
    })
    .await;
    let ask = async |credentials: Option<(&str, &str)>| {
        let header = credentials
            .map(|(user, password)| format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))));
        let headers: Vec<_> = header.iter().map(|header| ("authorization", header.as_str())).collect();
        served.send("GET", "/v2/", &headers, "").await.status
    };
    let flood = async |credentials| {
        for _ in 0..200 {
            if ask(credentials).await == 429 {
                return;
            }
        }
        panic!("{credentials:?} are never too many");
    };
    let (admin, puller) = (Some(("admin", "admin")), Some(("node-puller", "puller")));
    // Nobody, and somebody who only says to be the admin, are one client: their address.
    flood(None).await;
    flood(Some(("admin", "wrong"))).await;
    // Ten seconds' worth at once is everybody's share; all from this one address.
    for _ in 0..10 {
        assert_eq!(ask(admin).await, 200);
    }
    flood(admin).await;
    for _ in 0..10 {
        assert_eq!(ask(puller).await, 200);
    }
}

#[tokio::test]
async fn a_client_that_sends_or_reads_nothing_is_cut_off() {
    let served = served(|config| config.limits.idle_timeout = Duration::from_millis(300)).await;
    let content = noise(32 << 20, 1);
    let digest = served.push_blob("a", &content).await;

    // Sends a little and then nothing, or a trickle.
    for trickle in [false, true] {
        let location = served.begin("a").await;
        let stream = TcpStream::connect(served.address).await.unwrap();
        let (mut reader, mut writer) = stream.into_split();
        let head = format!(
            "PATCH {location} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100000\r\n\r\nsome"
        );
        writer.write_all(head.as_bytes()).await.unwrap();
        let dripping = tokio::spawn(async move {
            while trickle && writer.write_all(b".").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            writer
        });
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(20), reader.read_to_end(&mut answer)).await.unwrap();
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("BLOB_UPLOAD_INVALID"), "{answer}");
        dripping.abort();
    }

    // Asks for much and reads nothing.
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let head = format!("GET /v2/a/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    eventually("the registry to give up", async || {
        // Only the end of the connection on the other side, with unread bytes, makes a write fail.
        stream.write_all(b" ").await.is_err().then_some(())
    })
    .await;
    // One that reads gets all.
    assert_eq!(served.get(&format!("/v2/a/blobs/{digest}")).await.expect(200).body, content);
}
