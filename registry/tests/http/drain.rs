//! The end: what goes on comes to its end, what is new is not taken.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Raw, Served, eventually, noise, sha256};

/// How long requests may go on.
const DRAIN: Duration = Duration::from_secs(10);

async fn refuses(served: &Served) {
    eventually("new connections to be refused", async || {
        TcpStream::connect(served.address).await.is_err().then_some(())
    })
    .await;
}

async fn read_some(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = vec![0; 1000];
    let read = stream.read(&mut bytes).await.unwrap();
    bytes.truncate(read);
    bytes
}

#[tokio::test]
async fn a_drain_lets_a_pull_and_a_push_end_and_refuses_new_connections() {
    let mut served = Served::open(tempfile::tempdir().unwrap()).await;
    // More than waits in sockets.
    let (pulled, pushed) = (noise(32 << 20, 1), noise(2 << 20, 2));
    let digest = served.push_blob("a", &pulled).await;
    let mut pull = TcpStream::connect(served.address).await.unwrap();
    pull.write_all(format!("GET /v2/a/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut got = read_some(&mut pull).await;
    let line = format!("POST /v2/a/blobs/uploads/?digest={}", sha256(&pushed));
    let length = pushed.len().to_string();
    let mut push = Raw::start(served.address, &line, &[("content-length", &length)]).await;
    push.send(&pushed[..1 << 20]).await;
    eventually("the push to go on", async || {
        (served.metric("dvcr_registry_uploads_in_progress").await == 1).then_some(())
    })
    .await;
    let idle = TcpStream::connect(served.address).await.unwrap();

    served.stop();
    refuses(&served).await;
    push.send(&pushed[1 << 20..]).await;
    push.finish().await.expect(201);
    // The connection ends with the answer.
    pull.read_to_end(&mut got).await.unwrap();
    let head = got.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    assert!(got[head + 4..] == pulled, "{} bytes", got.len());
    // Whoever asks for nothing does not hold the end up.
    let begun = Instant::now();
    let dir = served.close().await;
    assert!(begun.elapsed() < DRAIN);
    drop(idle);
    let served = Served::open(dir).await;
    assert!(served.get(&format!("/v2/a/blobs/{}", sha256(&pushed))).await.expect(200).body == pushed);
}

#[tokio::test]
async fn a_drain_ends_in_time_whatever_clients_do_and_keeps_what_has_come() {
    let mut served = Served::open(tempfile::tempdir().unwrap()).await;
    let location = served.begin("a").await;
    let mut push =
        Raw::start(served.address, &format!("PATCH {location}"), &[("content-length", "4000000")]).await;
    push.send(&noise(1 << 20, 1)).await;
    eventually("the push to come", async || {
        (served.metric("dvcr_registry_received_bytes_total").await == 1 << 20).then_some(())
    })
    .await;
    let begun = Instant::now();
    served.stop();
    let dir = served.close().await;
    // Ten seconds, and three to put away what has come.
    assert!((DRAIN..2 * DRAIN).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    let served = Served::open(dir).await;
    assert_eq!(served.get(&location).await.expect(204).header("range"), "0-1048575");
}

#[tokio::test]
async fn readyz_tells_of_the_drain_who_is_connected_still() {
    let mut served = Served::open(tempfile::tempdir().unwrap()).await;
    let ask = async |path: &str| {
        let mut stream = TcpStream::connect(served.address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n").as_bytes()).await.unwrap();
        stream
    };
    let (mut ready, mut healthy) = (ask("/readyz").await, ask("/healthz").await);
    // Both have been accepted, and begun to be read, before this one is answered.
    served.get("/readyz").await.expect(200);
    served.stop();
    refuses(&served).await;
    for (stream, status) in [(&mut ready, "503"), (&mut healthy, "200")] {
        stream.write_all(b"\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    served.close().await;
}
