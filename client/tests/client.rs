//! The client against a real registry, and against stubs that break off, redirect and lie.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

mod common;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use common::{DebianRegistry, noise, open, open_as, our_registry, serve};
use dvcr_client::CHUNK_BYTES;
use dvcr_client::{ErrorKind, digest};
use http::{Method, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

async fn read(mut stream: dvcr_client::BlobStream) -> dvcr_client::Result<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(bytes) = stream.next().await? {
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_basic_auth_is_pushed_to_and_pulled_from() {
    let registry = DebianRegistry::start(Some(("alice", "s3cret")));
    for user in [None, Some(("alice", "wrong"))] {
        let error = open_as(registry.address, "a/b", user).start_upload().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized);
        assert!(!format!("{error:?}").contains("wrong"), "{error:?}");
    }
    let user = Some(("alice", "s3cret"));
    let repository = open_as(registry.address, "a/b", user);
    let content = noise(CHUNK_BYTES + CHUNK_BYTES / 2, 1);
    let mut blob = repository.start_blob().await.unwrap();
    for chunk in content.chunks(CHUNK_BYTES) {
        blob.push(Bytes::copy_from_slice(chunk)).await.unwrap();
    }
    let (digest, size) = blob.finish().await.unwrap();
    assert_eq!((digest.clone(), size), (digest::sha256(&content).unwrap(), content.len() as u64));

    assert_eq!(repository.blob_size(&digest).await.unwrap(), Some(size));
    assert!(read(repository.blob(&digest, size)).await.unwrap() == content);
    assert_eq!(read(repository.blob_range(&digest, 1000..3000)).await.unwrap(), content[1000..3000]);
    let unknown = digest::sha256(b"nowhere").unwrap();
    assert_eq!(repository.blob_size(&unknown).await.unwrap(), None);
    assert_eq!(read(repository.blob(&unknown, 7)).await.unwrap_err().kind(), ErrorKind::NotFound);

    let other = open_as(registry.address, "c", user);
    assert!(other.mount(&digest, "a/b").await.unwrap());
    assert_eq!(other.blob_size(&digest).await.unwrap(), Some(size));
    assert!(!other.mount(&unknown, "a/b").await.unwrap());
    other.delete_blob(&digest).await.unwrap();
    assert_eq!(other.blob_size(&digest).await.unwrap(), None);

    let error = repository.manifest("absent").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("MANIFEST_UNKNOWN"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_upload_leaves_no_session() {
    let dir = tempfile::tempdir().unwrap();
    let repository = open(our_registry(dir.path()).await, "a");
    let mut upload = repository.start_upload().await.unwrap();
    upload.append(Bytes::from_static(b"half of something")).await.unwrap();
    let sessions = dir.path().join("docker/registry/v2/repositories/a/_uploads");
    assert_eq!(std::fs::read_dir(&sessions).unwrap().count(), 1);
    drop(upload);
    repository.settle().await;
    assert_eq!(std::fs::read_dir(&sessions).map_or(0, Iterator::count), 0);
}

/// A registry with one blob that notes who asked with what authorization.
#[derive(Clone, Default)]
struct Stub(Arc<Mutex<Notes>>);

#[derive(Default)]
struct Notes {
    seen: Vec<(Method, String, Option<String>)>,
    received: Vec<u8>,
    faults: u32,
    elsewhere: Option<SocketAddr>,
}

impl Stub {
    async fn serve<H, T>(&self, handler: H) -> SocketAddr
    where
        H: axum::handler::Handler<T, Stub>,
        T: 'static,
    {
        serve(Router::new().fallback(handler).with_state(self.clone())).await
    }

    fn note(&self, request: &Request) -> std::sync::MutexGuard<'_, Notes> {
        let mut notes = self.0.lock().unwrap();
        let authorization = request.headers().get("authorization").map(|v| v.to_str().unwrap().to_owned());
        notes.seen.push((request.method().clone(), request.uri().to_string(), authorization));
        notes
    }

    fn seen(&self) -> Vec<(Method, String, Option<String>)> {
        self.0.lock().unwrap().seen.clone()
    }
}

fn answer(status: u16, headers: &[(&str, String)], body: impl Into<Body>) -> Response {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(*name, value);
    }
    response.body(body.into()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_credentials_go_to_another_origin() {
    let storage = Stub::default();
    let elsewhere = storage
        .serve(|State(stub): State<Stub>, request: Request| async move {
            drop(stub.note(&request));
            match *request.method() {
                Method::GET => answer(200, &[], "content"),
                Method::PATCH => answer(202, &[("range", "0-6".into())], ""),
                _ => answer(201, &[], ""),
            }
        })
        .await;
    let registry = Stub::default();
    registry.0.lock().unwrap().elsewhere = Some(elsewhere);
    let address = registry
        .serve(|State(stub): State<Stub>, request: Request| async move {
            let notes = stub.note(&request);
            if request.headers().get("authorization").is_none() {
                return answer(401, &[("www-authenticate", "Basic realm=\"x\"".into())], "");
            }
            let location = format!("http://{}/there", notes.elsewhere.unwrap());
            let status = if request.method() == Method::POST { 202 } else { 307 };
            answer(status, &[("location", location)], "")
        })
        .await;
    let repository = open_as(address, "a", Some(("alice", "s3cret")));
    let digest = digest::sha256(b"content").unwrap();
    assert_eq!(read(repository.blob(&digest, 7)).await.unwrap(), b"content");
    let mut upload = repository.start_upload().await.unwrap();
    upload.append(Bytes::from_static(b"content")).await.unwrap();
    upload.commit(&digest).await.unwrap();
    assert!(registry.seen().iter().any(|(_, _, authorization)| authorization.is_some()));
    let there = storage.seen();
    assert_eq!(there.len(), 3, "{there:?}");
    assert!(there.iter().all(|(_, _, authorization)| authorization.is_none()), "{there:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_fetched_once_per_scope_and_renewed_when_refused() {
    let stub = Stub::default();
    let address = stub
        .serve(|State(stub): State<Stub>, request: Request| async move {
            let host = request.headers()["host"].to_str().unwrap().to_owned();
            let mut notes = stub.note(&request);
            if request.uri().path() == "/token" {
                notes.faults += 1;
                let token = format!("{{\"token\": \"t{}\", \"expires_in\": 300}}", notes.faults);
                return answer(200, &[], token);
            }
            let current = format!("Bearer t{}", notes.faults);
            let authorization =
                request.headers().get("authorization").map(|v| v.to_str().unwrap().to_owned());
            // The third token is revoked at once.
            if authorization.as_deref() != Some(&current) || notes.faults == 0 {
                let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
                return answer(401, &[("www-authenticate", challenge)], "");
            }
            answer(200, &[("content-length", "7".into())], "")
        })
        .await;
    let repository = open_as(address, "a/b", Some(("alice", "s3cret")));
    let digest = digest::sha256(b"content").unwrap();
    for _ in 0..3 {
        assert_eq!(repository.blob_size(&digest).await.unwrap(), Some(7));
    }
    let tokens = |stub: &Stub| {
        stub.seen().into_iter().filter(|(_, uri, _)| uri.starts_with("/token")).collect::<Vec<_>>()
    };
    let asked = tokens(&stub);
    assert_eq!(asked.len(), 1);
    assert!(asked[0].1.contains("service=s&scope=repository%3Aa%2Fb%3Apull"), "{asked:?}");
    assert!(asked[0].2.as_deref().unwrap().starts_with("Basic "));
    // The registry stops taking the token: another one is fetched.
    stub.0.lock().unwrap().faults = 7;
    assert_eq!(repository.blob_size(&digest).await.unwrap(), Some(7));
    assert_eq!(tokens(&stub).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_breaks_is_continued_from_what_arrived() {
    let stub = Stub::default();
    let address = stub
        .serve(|State(stub): State<Stub>, request: Request| async move {
            let (method, uri) = (request.method().clone(), request.uri().to_string());
            let range = request.headers().get("content-range").map(|v| v.to_str().unwrap().to_owned());
            drop(stub.note(&request));
            let body = axum::body::to_bytes(request.into_body(), usize::MAX).await.unwrap();
            let mut notes = stub.0.lock().unwrap();
            let received = |notes: &Notes| format!("0-{}", notes.received.len().saturating_sub(1));
            match method {
                Method::POST => answer(202, &[("location", "/v2/a/blobs/uploads/1?state=x".into())], ""),
                Method::PATCH => {
                    let start: usize = range.unwrap().split('-').next().unwrap().parse().unwrap();
                    if start != notes.received.len() {
                        return answer(416, &[], "");
                    }
                    notes.faults += 1;
                    if notes.faults % 2 == 1 {
                        // Half of it arrives before the server falls over.
                        notes.received.extend_from_slice(&body[..body.len() / 2]);
                        return answer(503, &[], "");
                    }
                    notes.received.extend_from_slice(&body);
                    answer(
                        202,
                        &[("range", received(&notes)), ("location", "/v2/a/blobs/uploads/2".into())],
                        "",
                    )
                }
                Method::GET => answer(204, &[("range", received(&notes))], ""),
                Method::PUT if uri.starts_with("/v2/a/blobs/uploads/2?digest=sha256") => {
                    let good = uri.contains(&digest::sha256(&notes.received).unwrap().digest().to_owned());
                    answer(if good { 201 } else { 400 }, &[], "")
                }
                _ => answer(404, &[], ""),
            }
        })
        .await;
    let repository = open(address, "a");
    let content = noise(3_000_001, 2);
    let mut blob = repository.start_blob().await.unwrap();
    for chunk in content.chunks(1 << 20) {
        blob.push(Bytes::copy_from_slice(chunk)).await.unwrap();
    }
    let (digest, _) = blob.finish().await.unwrap();
    assert_eq!(digest, digest::sha256(&content).unwrap());
    assert!(stub.0.lock().unwrap().received == content);
}

/// Serves `content` by hand and cuts every connection after 300000 bytes of it; counts the connections.
async fn cutting_server(content: Arc<Vec<u8>>) -> (SocketAddr, Arc<AtomicU32>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicU32::new(0));
    let counted = connections.clone();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(socket.read_u8().await.unwrap());
            }
            let request = String::from_utf8(request).unwrap().to_ascii_lowercase();
            let range = request.split_once("range: bytes=").map(|(_, rest)| rest.split('-').next().unwrap());
            let start = range.map_or(0, |start| start.parse::<usize>().unwrap());
            let (rest, all) = (&content[start..], content.len());
            let head = match range {
                None => "200 OK\r\n".to_owned(),
                Some(_) => {
                    format!("206 Partial Content\r\ncontent-range: bytes {start}-{}/{all}\r\n", all - 1)
                }
            };
            let head = format!("HTTP/1.1 {head}content-length: {}\r\n\r\n", rest.len());
            socket.write_all(head.as_bytes()).await.unwrap();
            socket.write_all(&rest[..rest.len().min(300_000)]).await.unwrap();
            socket.shutdown().await.unwrap();
        }
    });
    (address, connections)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_breaks_off_is_continued_by_range() {
    let content = Arc::new(noise(1_000_000, 3));
    let (address, connections) = cutting_server(content.clone()).await;
    let repository = open(address, "a");
    let digest = digest::sha256(&content).unwrap();
    assert!(read(repository.blob(&digest, 1_000_000)).await.unwrap() == *content);
    assert_eq!(connections.load(Ordering::Relaxed), 4);
    let error = read(repository.blob(&digest, 999_999)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Mismatch);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_down_for_a_moment_is_asked_again_and_a_refusal_is_not() {
    let stub = Stub::default();
    let address = stub
        .serve(|State(stub): State<Stub>, request: Request| async move {
            let mut notes = stub.note(&request);
            if request.uri().path().contains("denied") {
                let body = "{\"errors\": [{\"code\": \"DENIED\", \"message\": \"not you\\u0007\"}]}";
                return (StatusCode::FORBIDDEN, body).into_response();
            }
            notes.faults += 1;
            answer(if notes.faults < 3 { 503 } else { 200 }, &[("content-length", "5".into())], "")
        })
        .await;
    let digest = digest::sha256(b"content").unwrap();
    assert_eq!(open(address, "a").blob_size(&digest).await.unwrap(), Some(5));
    let before = stub.seen().len();
    let error = open(address, "denied").manifest("latest").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.to_string().ends_with("403 Forbidden (DENIED: not you)"), "{error}");
    assert_eq!(stub.seen().len(), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_is_not_what_its_digest_says_is_refused() {
    let stub = Stub::default();
    let address = stub.serve(|| async { answer(200, &[], "{\"layers\": []}") }).await;
    let wrong = digest::sha256(b"other").unwrap();
    let error = open(address, "a").manifest(wrong.as_ref()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Mismatch);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_takes_nothing_is_given_up() {
    let stub = Stub::default();
    let address = stub
        .serve(|State(stub): State<Stub>, request: Request| async move {
            drop(stub.note(&request));
            match *request.method() {
                Method::POST => answer(202, &[("location", "/v2/a/blobs/uploads/1".into())], ""),
                Method::PATCH => answer(202, &[("range", "0-3".into())], ""),
                _ => answer(204, &[("range", "0-3".into())], ""),
            }
        })
        .await;
    let mut upload = open(address, "a").start_upload().await.unwrap();
    let error = upload.append(Bytes::from_static(b"content")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("took nothing"), "{error}");
    let sent = stub.seen().into_iter().filter(|(method, ..)| method == Method::PATCH).count();
    assert!((2..=10).contains(&sent), "{sent} chunks were sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loopback_registry_cannot_lead_elsewhere_without_tls() {
    let stub = Stub::default();
    let address = stub
        .serve(|State(stub): State<Stub>, request: Request| async move {
            drop(stub.note(&request));
            let status = if request.method() == Method::POST { 202 } else { 307 };
            answer(status, &[("location", "http://registry.invalid/there".into())], "")
        })
        .await;
    let repository = open_as(address, "a", Some(("alice", "s3cret")));
    let digest = digest::sha256(b"content").unwrap();
    for error in
        [read(repository.blob(&digest, 7)).await.unwrap_err(), repository.start_upload().await.unwrap_err()]
    {
        assert_eq!(error.kind(), ErrorKind::Protocol);
        assert!(error.to_string().contains("without TLS"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_credentials_go_to_a_token_service_elsewhere_without_tls() {
    let stub = Stub::default();
    let address = stub
        .serve(|State(stub): State<Stub>, request: Request| async move {
            drop(stub.note(&request));
            let challenge = "Bearer realm=\"http://auth.invalid/token\",service=\"s\"";
            answer(401, &[("www-authenticate", challenge.into())], "")
        })
        .await;
    let repository = open_as(address, "a", Some(("alice", "s3cret")));
    let error = repository.manifest("latest").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().contains("no credentials are sent there"), "{error}");
}
