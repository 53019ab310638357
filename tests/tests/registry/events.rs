//! Webhooks: what CNCF distribution tells and what we tell of the same, and what outlives kill -9.
#![allow(clippy::unwrap_used, reason = "tests: a lock that a panic left behind fails the test anyway")]

use crate::support::{
    Client, DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, descriptor, digest, eventually, image,
    layers, noise, with_digest,
};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use dvcr_tests::{PeerRegistry, Registry, temp_dir, utf8};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A receiver of events.
struct Sink {
    address: SocketAddr,
    is_up: Arc<AtomicBool>,
    events: Arc<Mutex<Vec<Value>>>,
    types: Arc<Mutex<Vec<String>>>,
}

impl Sink {
    fn new() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let sink = Self {
            address: listener.local_addr()?,
            is_up: Arc::new(AtomicBool::new(true)),
            events: Arc::default(),
            types: Arc::default(),
        };
        let (is_up, events, types) =
            (Arc::clone(&sink.is_up), Arc::clone(&sink.events), Arc::clone(&sink.types));
        // It ends with the process; what it has does no harm until then.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (is_up, events, types) = (Arc::clone(&is_up), Arc::clone(&events), Arc::clone(&types));
                std::thread::spawn(move || while answer(&stream, &is_up, &events, &types).is_ok() {});
            }
        });
        Ok(sink)
    }

    fn events(&self) -> Vec<Value> {
        self.events.lock().unwrap().clone()
    }
}

/// Takes one request; an error is the end of the connection.
fn answer(
    mut stream: &TcpStream,
    is_up: &AtomicBool,
    events: &Mutex<Vec<Value>>,
    types: &Mutex<Vec<String>>,
) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let (mut length, mut media_type) = (0, String::new());
    loop {
        let mut line = String::new();
        ensure!(reader.read_line(&mut line)? > 0, "no request");
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            if line.trim_end().is_empty() { break } else { continue }
        };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse()?,
            "content-type" => value.clone_into(&mut media_type),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let status = if is_up.load(Ordering::SeqCst) { "200 OK" } else { "503 Down" };
    if is_up.load(Ordering::SeqCst) {
        let envelope: Value = serde_json::from_slice(&body)?;
        events.lock().unwrap().extend(envelope["events"].as_array().context("a list")?.iter().cloned());
        types.lock().unwrap().push(media_type);
    }
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n")?;
    Ok(())
}

fn start_telling(dir: &Path, sink: &Sink, more: &str) -> Result<Registry> {
    let file = dir.join("registry.yaml");
    let text = format!("webhooks:\n  - name: sink\n    url: http://{}/events\n{more}", sink.address);
    std::fs::write(&file, text)?;
    Registry::start_with(&dir.join("root"), &["--config", utf8(&file)])
}

/// Does everything of which events are told, and some of which none are.
async fn use_it(client: &Client) -> Result<()> {
    const ACCEPT: (&str, &str) = ("accept", "*/*, application/vnd.oci.image.manifest.v1+json");
    let put = async |repo: &str, bytes: &Bytes| {
        let session = client.begin(repo).await?;
        let path = with_digest(&session, &digest(bytes));
        client.send("PUT", &path, &[("content-type", "application/octet-stream")], bytes.clone()).await
    };
    let oci = image(OCI_MANIFEST, &layers(1, &[1000, 0, 70_000]));
    let docker = image(DOCKER_MANIFEST, &layers(2, &[500]));
    for blob in oci.blobs.iter().chain(&docker.blobs) {
        put("team/app", blob).await?.expect(201)?;
    }
    // In chunks; and one that is refused.
    let bytes = noise(3000, 3);
    let session = client.begin("team/app").await?;
    let session =
        client.patch(&session, 0, bytes.slice(..1000)).await?.expect(202)?.header("location").to_owned();
    let path = with_digest(&session, &digest(&bytes));
    client
        .send("PUT", &path, &[("content-type", "application/octet-stream")], bytes.slice(1000..))
        .await?
        .expect(201)?;
    let session = client.begin("team/app").await?;
    let wrong = with_digest(&session, &digest(&noise(1, 1)));
    client.send("PUT", &wrong, &[], bytes.clone()).await?.expect(400)?;

    client.put_manifest("team/app", "v1", OCI_MANIFEST, &oci.manifest).await?.expect(201)?;
    client.put_manifest("team/app", "same", OCI_MANIFEST, &oci.manifest).await?.expect(201)?;
    client.put_manifest("team/app", "docker", DOCKER_MANIFEST, &docker.manifest).await?.expect(201)?;
    client
        .put_manifest("team/app", &docker.digest(), DOCKER_MANIFEST, &docker.manifest)
        .await?
        .expect(201)?;
    for (media_type, of) in [(OCI_INDEX, &oci), (DOCKER_LIST, &docker)] {
        let mut entry = descriptor(of.media_type, &of.manifest);
        entry["platform"] = json!({"architecture": "amd64", "os": "linux"});
        let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": [entry]});
        client.put_manifest("team/app", "all", media_type, &index.to_string().into()).await?.expect(201)?;
    }
    let missing = image(OCI_MANIFEST, &layers(9, &[10]));
    client.put_manifest("team/app", "v2", OCI_MANIFEST, &missing.manifest).await?;

    let blob = format!("/v2/team/app/blobs/{}", digest(&oci.blobs[0]));
    client.get(&blob).await?.expect(200)?;
    client.send("HEAD", &blob, &[], "").await?.expect(200)?;
    client.send("GET", &blob, &[("range", "bytes=10-19")], "").await?.expect(206)?;
    client.get(&format!("/v2/team/app/blobs/{}", digest(&noise(1, 1)))).await?.expect(404)?;
    for reference in ["v1", "all", &oci.digest()] {
        let path = format!("/v2/team/app/manifests/{reference}");
        client.get(&path).await?.expect(200)?;
        client.send("HEAD", &path, &[ACCEPT, ("accept", DOCKER_LIST)], "").await?.expect(200)?;
    }
    client.get("/v2/team/app/manifests/none").await?.expect(404)?;
    client.get("/v2/team/app/tags/list").await?.expect(200)?;
    let not_again = [ACCEPT, ("if-none-match", &*format!("\"{}\"", oci.digest()))];
    client.send("GET", "/v2/team/app/manifests/v1", &not_again, "").await?.expect(304)?;

    let mount = async |blob: &Bytes, from: &str| {
        let path = format!("/v2/other/app/blobs/uploads/?mount={}&from={from}", digest(blob));
        client.send("POST", &path, &[], "").await
    };
    mount(&oci.blobs[0], "team/app").await?.expect(201)?;
    mount(&missing.blobs[0], "team/app").await?.expect(202)?;
    client.delete(&format!("/v2/other/app/blobs/{}", digest(&oci.blobs[0]))).await?;
    client.delete("/v2/team/app/manifests/docker").await?;
    // Two tags name it.
    client.delete(&format!("/v2/team/app/manifests/{}", oci.digest())).await?;
    put("team/app", &noise(1, 5)).await?.expect(201).map(drop)
}

/// Puts a mark in the place of what differs from run to run, if it is what it should be.
fn normalised(event: &Value, registry: SocketAddr) -> Value {
    fn mark(value: &mut Value, is_good: impl Fn(&str) -> bool) {
        if value.as_str().is_some_and(is_good) {
            *value = json!("as it should be");
        }
    }
    let is_id = |text: &str| text.len() == 36 && text.split('-').map(str::len).eq([8, 4, 4, 4, 12]);
    let mut event = event.clone();
    mark(&mut event["id"], is_id);
    mark(&mut event["timestamp"], is_time);
    mark(&mut event["request"]["id"], is_id);
    mark(&mut event["request"]["addr"], |text| {
        text.parse().is_ok_and(|from: SocketAddr| from.ip().is_loopback())
    });
    mark(&mut event["request"]["host"], |text| text == registry.to_string());
    mark(&mut event["source"]["instanceID"], is_id);
    mark(&mut event["source"]["addr"], |text| text.ends_with(&format!(":{}", registry.port())));
    if let Some(url) = event["target"]["url"].as_str() {
        event["target"]["url"] = url.replace(&registry.to_string(), "HOST").into();
    }
    event
}

/// Whether a text is a time in UTC, as RFC 3339 has it.
fn is_time(text: &str) -> bool {
    let shape: String = text.chars().map(|char| if char.is_ascii_digit() { '0' } else { char }).collect();
    shape.starts_with("0000-00-00T00:00:00.0") && shape.ends_with('Z')
}

#[tokio::test(flavor = "multi_thread")]
async fn distribution_v3_and_we_tell_the_same_of_the_same() -> Result<()> {
    let (ours, theirs) = (temp_dir(), temp_dir());
    let (our_sink, their_sink) = (Sink::new()?, Sink::new()?);
    let registry = start_telling(ours.path(), &our_sink, "")?;
    let sections = format!(
        "notifications:\n  endpoints:\n    - name: sink\n      url: http://{}/events\n      timeout: 5s\n      \
         threshold: 3\n      backoff: 1s\n",
        their_sink.address
    );
    let peer = PeerRegistry::distribution_v3_with(theirs.path(), &sections)?;
    let mut told = Vec::new();
    for (client, sink, address) in [
        (Client::new(&registry.url()), &our_sink, registry.address()),
        (Client::new(&peer.url()), &their_sink, peer.address()),
    ] {
        use_it(&client).await?;
        // The last that is done.
        let last = digest(&noise(1, 5));
        eventually("the last event", async || {
            Ok(sink.events().last().is_some_and(|event| event["target"]["digest"] == last))
        })
        .await?;
        let mut events: Vec<_> = sink.events().iter().map(|event| normalised(event, address)).collect();
        // Those that go with their manifest come in any order from distribution.
        let tag_of = |event: &Value| event["target"]["tag"].as_str().unwrap_or_default().to_owned();
        let of_tags = |a: &Value, b: &Value| {
            [a, b].iter().all(|event| event["action"] == "delete" && !tag_of(event).is_empty())
        };
        events.chunk_by_mut(of_tags).for_each(|run| run.sort_by_key(tag_of));
        told.push(events);
        let types = sink.types.lock().unwrap().clone();
        assert!(
            types.iter().all(|name| name == "application/vnd.docker.distribution.events.v2+json"),
            "{types:?}"
        );
    }
    for (ours, theirs) in told[0].iter().zip(&told[1]) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(told[0].len(), told[1].len());

    // docs/registry-events.md lists what differs on purpose. A blob that a client has already:
    for (client, sink, count) in
        [(Client::new(&registry.url()), &our_sink, 0), (Client::new(&peer.url()), &their_sink, 1)]
    {
        let (before, bytes) = (sink.events().len(), noise(3000, 3));
        let path = format!("/v2/team/app/blobs/{}", digest(&bytes));
        let tag = format!("\"{}\"", digest(&bytes));
        client.send("GET", &path, &[("if-none-match", &tag)], "").await?.expect(304)?;
        client.send("HEAD", &path, &[], "").await?.expect(200)?;
        eventually("a pull", async || Ok(sink.events().len() > before + count)).await?;
        assert_eq!(sink.events().len(), before + count + 1);
    }
    Ok(())
}

/// Pushes blobs of their own content, one after the other, and notes those that were acknowledged.
async fn push(
    client: &Client,
    pushed: &Mutex<Vec<String>>,
    numbers: impl Iterator<Item = u64>,
) -> Result<()> {
    for number in numbers {
        let bytes = Bytes::from(number.to_string());
        let path = format!("/v2/a/b/blobs/uploads/?digest={}", digest(&bytes));
        client.send("POST", &path, &[], bytes.clone()).await?.expect(201)?;
        pushed.lock().unwrap().push(digest(&bytes));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_were_in_the_queue_outlive_kill_9_and_keep_their_order() -> Result<()> {
    const ROUNDS: u64 = 8;
    const CERTAIN: u64 = 25;
    let dir = temp_dir();
    let sink = Sink::new()?;
    let mut registry = start_telling(dir.path(), &sink, "    batch: 3\n    timeout: 10s\n")?;
    let metrics = format!("{}/metrics", registry.url());
    // Those that were in the queue when the process was killed, and all that may have been.
    let (mut certain, mut all) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        sink.is_up.store(round % 2 == 1, Ordering::SeqCst);
        let client = Client::new(&registry.url());
        let counts = async || -> Result<(u64, u64)> {
            let text = client.http.get(&metrics).send().await?.text().await?;
            let value = |name: &str| -> Option<u64> {
                let line = format!("dvcr_registry_webhook_{name}{{webhook=\"sink\"}} ");
                text.lines().find_map(|text| text.strip_prefix(&line)?.parse().ok())
            };
            Ok((value("pending_events").context("pending")?, value("sent_events_total").context("sent")?))
        };
        // With a receiver, none are on their way from one count to the other.
        let is_up = round % 2 == 1;
        eventually("a rest", async || Ok(!is_up || counts().await?.0 == 0)).await?;
        let in_queue = async || counts().await.map(|(pending, sent)| pending + sent);
        let before = in_queue().await?;
        let first = round * 1_000_000;
        let pushed = Arc::default();
        push(&client, &pushed, first..first + CERTAIN).await?;
        eventually("the events in the queue", async || Ok(in_queue().await? >= before + CERTAIN)).await?;
        certain.extend(pushed.lock().unwrap().iter().cloned());
        let (more, numbers) = (Arc::clone(&pushed), first + CERTAIN..first + 1_000_000);
        let pusher = tokio::spawn(async move { push(&client, &more, numbers).await });
        eventually("more pushes", async || Ok(pushed.lock().unwrap().len() as u64 > CERTAIN + 5)).await?;
        tokio::time::sleep(Duration::from_micros(u64::from(noise(1, round)[0]) * 100)).await;
        registry.kill9()?;
        ensure!(pusher.await?.is_err(), "the pusher outlived the registry");
        let pushed = pushed.lock().unwrap();
        all.extend(pushed.iter().cloned());
        // The one whose answer did not come.
        all.push(digest(&Bytes::from((first + pushed.len() as u64).to_string())));
        registry.restart()?;
    }
    sink.is_up.store(true, Ordering::SeqCst);
    let last = Mutex::default();
    push(&Client::new(&registry.url()), &last, std::iter::once(u64::MAX)).await?;
    let last = last.into_inner().unwrap();
    let told = || -> Vec<String> {
        let events = sink.events();
        events.iter().map(|event| event["target"]["digest"].as_str().unwrap_or_default().to_owned()).collect()
    };
    eventually("the last event", async || Ok(told().ends_with(&last))).await?;
    let mut once = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for digest in told() {
        if seen.insert(digest.clone()) {
            once.push(digest);
        }
    }
    all.extend(last);
    let mut rest = all.iter();
    for digest in &once {
        assert!(rest.any(|other| other == digest), "{digest} is out of order");
    }
    for digest in &certain {
        assert!(seen.contains(digest), "{digest} is lost");
    }
    println!("{} pushes, {} told, {} of them again", all.len(), once.len(), told().len() - once.len());
    Ok(())
}
