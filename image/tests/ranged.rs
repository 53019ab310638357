//! Random access to a file in a registry: what it costs, and that every byte is the right one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

#[path = "../../client/tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::Response;
use bytes::Bytes;
use common::{noise, open, serve};
use dvcr_converter::io::ReadAt;
use dvcr_image::index::{Builder, CHUNK_BYTES, Index};
use dvcr_image::{ErrorKind, RangedBlob, Window, digest};
use proptest::prelude::*;
use tokio::runtime::Handle;

const MIB: u64 = 1 << 20;

/// A registry of one blob that counts what it serves.
struct Server {
    blob: Bytes,
    /// Bytes that were asked for, requests, and requests at the same time.
    served: AtomicU64,
    requests: AtomicUsize,
    at_once: AtomicUsize,
    at_once_max: AtomicUsize,
    delay: Duration,
    misbehave: Box<dyn Fn(usize, std::ops::Range<usize>) -> Misbehaviour + Send + Sync>,
}

enum Misbehaviour {
    None,
    Status(StatusCode),
    /// The bit of this byte of the blob is changed.
    Flip(usize),
}

impl Server {
    /// Serves `blob`; `misbehave` is asked for each request, by its number and its range.
    async fn start(
        blob: Vec<u8>,
        delay: Duration,
        misbehave: impl Fn(usize, std::ops::Range<usize>) -> Misbehaviour + Send + Sync + 'static,
    ) -> (Arc<Self>, RangedBlob) {
        let server = Arc::new(Self {
            blob: blob.into(),
            served: AtomicU64::new(0),
            requests: AtomicUsize::new(0),
            at_once: AtomicUsize::new(0),
            at_once_max: AtomicUsize::new(0),
            delay,
            misbehave: Box::new(misbehave),
        });
        let serving = server.clone();
        let handler = move |request: Request| {
            let server = serving.clone();
            let range = request.headers()["range"].to_str().unwrap().to_owned();
            async move { server.answer(&range).await }
        };
        let address = serve(axum::Router::new().fallback(handler)).await;
        let digest = digest::sha256(b"nobody looks").unwrap();
        let size = server.blob.len() as u64;
        (server, RangedBlob::new(open(address, "a"), digest, size, Handle::current()))
    }

    async fn answer(&self, range: &str) -> Response {
        let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let range = from.parse::<usize>().unwrap()..to.parse::<usize>().unwrap() + 1;
        let number = self.requests.fetch_add(1, Ordering::SeqCst);
        let at_once = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        self.at_once_max.fetch_max(at_once, Ordering::SeqCst);
        tokio::time::sleep(self.delay).await;
        self.at_once.fetch_sub(1, Ordering::SeqCst);
        let mut bytes = self.blob.slice(range.clone());
        match (self.misbehave)(number, range.clone()) {
            Misbehaviour::Status(status) => {
                return Response::builder().status(status).body(Body::empty()).unwrap();
            }
            Misbehaviour::Flip(at) if range.contains(&at) => {
                let mut changed = bytes.to_vec();
                changed[at - range.start] ^= 1;
                bytes = changed.into();
            }
            _ => {}
        }
        self.served.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        let told = format!("bytes {}-{}/{}", range.start, range.end - 1, self.blob.len());
        Response::builder().status(206).header("content-range", told).body(Body::from(bytes)).unwrap()
    }

    fn served(&self) -> u64 {
        self.served.load(Ordering::SeqCst)
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

fn well(_: usize, _: std::ops::Range<usize>) -> Misbehaviour {
    Misbehaviour::None
}

fn index_of(file: &[u8]) -> Arc<Index> {
    let mut builder = Builder::new();
    builder.update(file);
    Arc::new(builder.finish().unwrap())
}

/// Reads the file in units by threads that take the next one in turn, as a conversion does.
async fn read_forward(window: &Window, file: &Bytes, unit: u64, threads: usize) {
    let next = Arc::new(AtomicU64::new(0));
    let readers: Vec<_> = (0..threads)
        .map(|_| {
            let (window, file, next) = (window.clone(), file.clone(), next.clone());
            tokio::task::spawn_blocking(move || {
                loop {
                    let start = next.fetch_add(unit, Ordering::SeqCst);
                    if start >= window.len() {
                        return;
                    }
                    let mut buf = vec![0; unit.min(window.len() - start) as usize];
                    window.read_exact_at(&mut buf, start).unwrap();
                    assert!(buf == file[start as usize..start as usize + buf.len()], "at {start}");
                }
            })
        })
        .collect();
    for reader in readers {
        reader.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_forward_has_every_byte_asked_for_once_in_few_requests_of_which_several_run() {
    let file = Bytes::from(noise(150 * MIB as usize + 12_345, 7));
    let (server, blob) = Server::start(file.to_vec(), Duration::from_millis(5), well).await;
    for (unit, threads) in [(2 * MIB, 2), (300_000, 1), (3 * MIB + 512, 8)] {
        let (served, requests) = (server.served(), server.requests());
        server.at_once_max.store(0, Ordering::SeqCst);
        let window = Window::verified(&blob, 0, index_of(&file)).unwrap();
        read_forward(&window, &file, unit, threads).await;
        let case = format!("{threads} threads, {unit} bytes each");
        let served = server.served() - served;
        // One that is left behind by the others may find that its block had to make room.
        let vain_max = if threads == 1 { 0 } else { file.len() as u64 / 20 };
        assert!(served - file.len() as u64 <= vain_max, "{case}: {served} bytes");
        let requests = server.requests() - requests;
        assert!(requests <= 90, "{case}: {requests} requests");
        let at_once = server.at_once_max.load(Ordering::SeqCst);
        assert!((3..=20).contains(&at_once), "{case}: {at_once} requests at once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_jumps_is_charged_for_little_more_than_what_it_reads() {
    let file = noise(400 * MIB as usize, 8);
    let (server, blob) = Server::start(file.clone(), Duration::ZERO, well).await;
    let window = Window::new(&blob, 0, file.len() as u64).unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        // Every third block once, in an order that is none: tables and clusters of a file that was written at random.
        for step in 0..133u64 {
            let at = step * 89 % 133 * 3 * MIB + step * 1000;
            let mut buf = vec![0; 64 << 10];
            window.read_exact_at(&mut buf, at).unwrap();
            assert!(buf == file[at as usize..at as usize + buf.len()], "at {at}");
        }
    });
    reading.await.unwrap();
    assert!(server.served() <= (133 + 8) * MIB * 103 / 100, "{} bytes", server.served());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_ahead_reaches_the_reader_who_needs_the_block_and_nobody_else() {
    let file = noise(60 * MIB as usize, 9);
    let bad = 20 * MIB as usize;
    let (_server, blob) = Server::start(file.clone(), Duration::from_millis(1), move |_, range| {
        let covers = range.start <= bad && bad < range.end;
        if covers { Misbehaviour::Status(StatusCode::FORBIDDEN) } else { Misbehaviour::None }
    })
    .await;
    let window = Window::new(&blob, 0, file.len() as u64).unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let mut failed = Vec::new();
        for at in (0..file.len() as u64).step_by(MIB as usize) {
            let mut buf = vec![0; MIB as usize];
            match window.read_exact_at(&mut buf, at) {
                Ok(()) => assert!(buf == file[at as usize..at as usize + buf.len()], "at {at}"),
                Err(e) => {
                    let error = e.downcast::<dvcr_image::Error>().unwrap();
                    assert_eq!(error.kind(), ErrorKind::Denied);
                    assert!(error.to_string().contains(&at.to_string()), "{error}");
                    failed.push(at);
                }
            }
        }
        // All blocks of the request that failed, and none of them for ever but the one.
        assert!(failed.contains(&(bad as u64)) && failed.len() <= 8, "{failed:?}");
        for at in failed {
            let again = window.read_exact_at(&mut vec![0; MIB as usize], at);
            assert_eq!(again.is_err(), at == bad as u64, "{at}");
        }
    });
    reading.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_was_changed_on_the_way_is_asked_for_again_and_a_damaged_one_is_named() {
    let file = Bytes::from(noise(12 * MIB as usize + 5, 10));
    let flipped = 7 * MIB as usize + 99;
    for lasting in [false, true] {
        let changed = AtomicUsize::new(0);
        let (server, blob) = Server::start(file.to_vec(), Duration::ZERO, move |_, range| {
            let first = range.contains(&flipped) && changed.fetch_add(1, Ordering::SeqCst) == 0;
            if first || lasting { Misbehaviour::Flip(flipped) } else { Misbehaviour::None }
        })
        .await;
        let window = Window::verified(&blob, 0, index_of(&file)).unwrap();
        if !lasting {
            read_forward(&window, &file, 2 * MIB, 3).await;
            assert_eq!(server.served(), file.len() as u64 + CHUNK_BYTES);
            continue;
        }
        let reading = tokio::task::spawn_blocking(move || {
            window.read_exact_at(&mut [0; 100], 6 * MIB).unwrap();
            let error = window.read_exact_at(&mut vec![0; 3 * MIB as usize], 6 * MIB).unwrap_err();
            let error = error.downcast::<dvcr_image::Error>().unwrap();
            let chain = format!("{error}: {:?}", std::error::Error::source(&error));
            assert_eq!(error.kind(), ErrorKind::Mismatch, "{chain}");
            assert!(chain.contains("chunk 7 "), "{chain}");
            window.read_exact_at(&mut [0; 100], 8 * MIB).unwrap();
        });
        reading.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_begins_anywhere_in_its_blob_is_verified_by_its_own_chunks() {
    let blob = noise(5 * MIB as usize, 11);
    let (_server, ranged) = Server::start(blob.clone(), Duration::ZERO, well).await;
    let file = blob[65_536..65_536 + 4 * MIB as usize - 77].to_vec();
    let window = Window::verified(&ranged, 65_536, index_of(&file)).unwrap();
    assert!(Window::new(&ranged, 65_537, 5 * MIB).is_err(), "a file longer than its blob");
    let reading = tokio::task::spawn_blocking(move || {
        let mut buf = vec![0; file.len()];
        window.read_exact_at(&mut buf, 0).unwrap();
        assert!(buf == file);
        let past = window.read_exact_at(&mut [0; 2], file.len() as u64 - 1).unwrap_err();
        assert_eq!(past.kind(), std::io::ErrorKind::UnexpectedEof);
    });
    reading.await.unwrap();
}

#[test]
fn a_reader_that_outlives_its_runtime_fails_and_does_not_hang() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let file = noise(3 * MIB as usize, 16);
    let (_server, blob) = runtime.block_on(Server::start(file, Duration::ZERO, well));
    let window = Window::new(&blob, 0, 3 * MIB).unwrap();
    window.read_exact_at(&mut [0; 10], 0).unwrap();
    runtime.shutdown_background();
    let error = window.read_exact_at(&mut [0; 10], 2 * MIB).unwrap_err().downcast::<dvcr_image::Error>();
    assert_eq!(error.unwrap().kind(), ErrorKind::Unavailable);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn whatever_is_read_by_however_many_is_what_the_file_has(
        len in 1u64..(90 << 20),
        indexed in any::<bool>(),
        readers in proptest::collection::vec(
            proptest::collection::vec((any::<prop::sample::Index>(), 1usize..3_000_000, 1usize..6), 1..12), 1..5),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let file = Bytes::from(noise(len as usize, 12));
            let (_server, blob) = Server::start(file.to_vec(), Duration::ZERO, well).await;
            let window = if indexed {
                Window::verified(&blob, 0, index_of(&file)).unwrap()
            } else {
                Window::new(&blob, 0, len).unwrap()
            };
            let readers: Vec<_> = readers.into_iter().map(|reads| {
                let (window, file) = (window.clone(), file.clone());
                tokio::task::spawn_blocking(move || {
                    for (at, count, times) in reads {
                        // A few in order from anywhere.
                        let mut at = at.index(file.len());
                        for _ in 0..times {
                            let count = count.min(file.len() - at);
                            let mut buf = vec![0; count];
                            window.read_exact_at(&mut buf, at as u64).unwrap();
                            assert!(buf == file[at..at + count], "{count} bytes at {at}");
                            at += count;
                        }
                    }
                })
            }).collect();
            for reader in readers {
                reader.await.unwrap();
            }
        });
    }
}
