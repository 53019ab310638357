//! Upload sessions: chunks, resuming, cancelling, and what must not come of them.

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream;

use crate::support::{IN_BUCKET, Raw, Reply, Served, eventually, files, noise, sha256, sha512, v2};

#[tokio::test]
async fn every_way_of_pushing_ends_in_the_same_blob() {
    let served = Served::new().await;
    let bytes = noise(3_000_000, 1);
    let digest = sha256(&bytes);
    // Pieces of odd sizes, and no length told beforehand.
    let unsized_body = || {
        let pieces: Vec<_> = bytes.chunks(77_777).map(Bytes::copy_from_slice).collect();
        reqwest::Body::wrap_stream(stream::iter(pieces.into_iter().map(Ok::<_, std::io::Error>)))
    };
    let put = |session: &str| format!("{session}?digest={digest}");
    for repo in ["post", "put", "chunks", "chunks-put", "stream", "stream-put"] {
        let reply = match repo {
            "post" => {
                let path = format!("/v2/{repo}/blobs/uploads/?digest={digest}");
                served.send("POST", &path, &[], bytes.clone()).await
            }
            "put" => served.send("PUT", &put(&served.begin(repo).await), &[], bytes.clone()).await,
            "chunks" => served.ask("PUT", &put(&push_chunks(&served, repo, &bytes, 700_001).await)).await,
            "chunks-put" => {
                let session = push_chunks(&served, repo, &bytes[..2_000_000], 1_000_000).await;
                let range = [("content-range", "2000000-2999999")];
                served.send("PUT", &put(&session), &range, bytes[2_000_000..].to_vec()).await
            }
            "stream" => {
                let session = served.begin(repo).await;
                let reply = served.send("PATCH", &session, &[], unsized_body()).await.expect(202);
                assert_eq!(reply.header("range"), "0-2999999");
                served.ask("PUT", &put(&reply.location())).await
            }
            _ => served.send("PUT", &put(&served.begin(repo).await), &[], unsized_body()).await,
        };
        let reply = reply.expect(201);
        assert_eq!(reply.header("docker-content-digest"), digest, "{repo}");
        assert!(served.get(&reply.location()).await.expect(200).body == bytes, "{repo}");
        assert_no_sessions(&served, repo);
    }
}

/// Pushes in chunks, with `Content-Range`, and returns the session's path.
async fn push_chunks(served: &Served, repo: &str, bytes: &[u8], chunk_bytes: usize) -> String {
    let mut session = served.begin(repo).await;
    for (n, chunk) in bytes.chunks(chunk_bytes).enumerate() {
        let first = n * chunk_bytes;
        let last = first + chunk.len() - 1;
        let range = format!("{first}-{last}");
        let reply = served.send("PATCH", &session, &[("content-range", &range)], chunk.to_vec()).await;
        let reply = reply.expect(202);
        assert_eq!(reply.header("range"), format!("0-{last}"));
        session = reply.location();
    }
    session
}

/// Checks that nothing is left of a repository's sessions, where they can be seen.
#[track_caller]
fn assert_no_sessions(served: &Served, repo: &str) {
    if IN_BUCKET {
        return;
    }
    let left = std::fs::read_dir(served.path(&format!("repositories/{repo}/_uploads")));
    assert_eq!(left.map_or(0, Iterator::count), 0, "{repo}");
    assert!(files(&served.dir().join("root/dvcr/tmp")).is_empty());
}

#[tokio::test]
async fn a_session_with_a_name_is_found_again_with_its_note() {
    let served = Served::new().await;
    let bytes = noise(300_000, 1);
    let begin = async |repo: &str| {
        let path = format!("/v2/{repo}/blobs/uploads/?session=import-1.2_x");
        served.send("POST", &path, &[], Vec::new()).await.expect(202)
    };
    let first = begin("a").await;
    assert_eq!(first.header("dvcr-upload-note"), "");
    for (n, note) in ["bm90ZQ==", "later"].into_iter().enumerate() {
        let (from, to) = (n * 100_000, (n + 1) * 100_000);
        let range = format!("{from}-{}", to - 1);
        let headers = [("content-range", range.as_str()), ("dvcr-upload-note", note)];
        served.send("PATCH", &first.location(), &headers, bytes[from..to].to_vec()).await.expect(202);
        let again = begin("a").await;
        assert_eq!(again.location(), first.location());
        assert_eq!(again.header("range"), format!("0-{}", to - 1));
        assert_eq!(again.header("dvcr-upload-note"), note);
    }
    assert_ne!(begin("b").await.location(), first.location());

    let note = "n".repeat(8193);
    let headers = [("dvcr-upload-note", note.as_str())];
    served.send("PATCH", &first.location(), &headers, bytes[200_000..].to_vec()).await.expect(400);
    for name in ["a/b", "a%20b", &"x".repeat(129)] {
        let path = format!("/v2/a/blobs/uploads/?session={name}");
        served.send("POST", &path, &[], Vec::new()).await.expect(400);
    }
    let path = format!("{}?digest={}", first.location(), sha256(&bytes));
    served.send("PUT", &path, &[], bytes[200_000..].to_vec()).await.expect(201);
    assert_eq!(begin("a").await.header("dvcr-upload-note"), "");
}

#[tokio::test]
async fn a_chunk_out_of_order_is_refused_and_the_upload_goes_on() {
    let served = Served::new().await;
    let bytes = noise(200_000, 1);
    let session = served.begin("a").await;
    let patch = async |session: &str, first: usize, end: usize| -> Reply {
        let range = format!("{first}-{}", end - 1);
        served.send("PATCH", session, &[("content-range", &range)], bytes[first..end].to_vec()).await
    };
    patch(&session, 100, 200).await.expect_error(416, "BLOB_UPLOAD_INVALID");
    let session = patch(&session, 0, 100_000).await.expect(202).location();
    for (first, end) in [(0, 100_000), (99_999, 150_000), (100_001, 150_000), (150_000, 200_000)] {
        let refused = patch(&session, first, end).await.expect_error(416, "BLOB_UPLOAD_INVALID");
        assert_eq!(refused.header("range"), "0-99999");
        assert_eq!(refused.location(), session);
    }
    let state = served.get(&session).await.expect(204);
    assert_eq!((state.header("range"), state.location()), ("0-99999", session.clone()));
    let session = patch(&session, 100_000, 200_000).await.expect(202).location();
    let digest = sha256(&bytes);
    served.ask("PUT", &format!("{session}?digest={digest}")).await.expect(201);
    assert!(served.get(&format!("/v2/a/blobs/{digest}")).await.body == bytes);
}

#[tokio::test]
async fn a_chunk_of_another_length_than_announced_does_not_count() {
    let served = Served::new().await;
    let bytes = noise(300_000, 1);
    let session = push_chunks(&served, "a", &bytes[..100_000], 100_000).await;
    let contradiction = [("content-range", "100000-199999")];
    served
        .send("PATCH", &session, &contradiction, bytes[100_000..150_000].to_vec())
        .await
        .expect_error(400, "SIZE_INVALID");
    // Without a Content-Length the mismatch shows at the end.
    for length in [50_000, 150_000] {
        let body = bytes[100_000..100_000 + length].to_vec();
        let body = reqwest::Body::wrap_stream(stream::iter([Ok::<_, std::io::Error>(body)]));
        served.send("PATCH", &session, &contradiction, body).await.expect_error(400, "SIZE_INVALID");
    }
    assert_eq!(served.get(&session).await.expect(204).header("range"), "0-99999");
    for bad in ["100000", "x-y", "200000-100000"] {
        let reply = served.send("PATCH", &session, &[("content-range", bad)], "x").await;
        reply.expect_error(400, "BLOB_UPLOAD_INVALID");
    }
    let digest = sha256(&bytes);
    let put = format!("{session}?digest={digest}");
    served.send("PUT", &put, &[], bytes[100_000..].to_vec()).await.expect(201);
}

#[tokio::test]
async fn a_broken_connection_keeps_what_came() {
    let served = Served::new().await;
    let bytes = noise(3_000_000, 1);
    let session = served.begin("a").await;
    let mut came = 0;
    for end in [1, 4096, 1_500_000, 2_999_999] {
        let length = (bytes.len() - came).to_string();
        let mut raw =
            Raw::start(served.address, &format!("PATCH {session}"), &[("content-length", &length)]).await;
        raw.send(&bytes[came..end]).await;
        drop(raw);
        // Of one byte the state looks as of none: then the number of requests at work tells.
        let range = format!("0-{}", end - 1);
        eventually("the state of what came", async || {
            let idle = served.metric("dvcr_registry_uploads_in_progress").await == 0
                && served.metric("dvcr_registry_received_bytes_total").await == end as u64;
            (idle && served.get(&session).await.expect(204).header("range") == range).then_some(())
        })
        .await;
        came = end;
    }
    let digest = sha256(&bytes);
    let put = format!("{session}?digest={digest}");
    let rest = [("content-range", "2999999-2999999")];
    eventually("the last byte", async || {
        let reply = served.send("PUT", &put, &rest, bytes[came..].to_vec()).await;
        (reply.status != 409).then(|| reply.expect(201))
    })
    .await;
    assert!(served.get(&format!("/v2/a/blobs/{digest}")).await.expect(200).body == bytes);
}

#[tokio::test]
async fn an_upload_goes_on_after_an_orderly_restart() {
    let bytes = noise(150_000, 1);
    let served = Served::new().await;
    let fresh = served.begin("fresh").await;
    let begun = push_chunks(&served, "begun", &bytes[..100_001], 33_333).await;
    let long = served.ask("POST", "/v2/long/blobs/uploads/?digest-algorithm=sha512").await.expect(202);
    let long = long.location();
    served.send("PATCH", &long, &[], bytes[..70_000].to_vec()).await.expect(202);

    let served = Served::open(served.close().await).await;
    for (session, came, digest) in
        [(fresh, 0, sha256(&bytes)), (begun, 100_001, sha256(&bytes)), (long, 70_000, sha512(&bytes))]
    {
        let state = served.get(&session).await.expect(204);
        assert_eq!(state.header("range"), format!("0-{}", usize::saturating_sub(came, 1)));
        let range = format!("{came}-149999");
        let put = format!("{session}?digest={digest}");
        let put = served.send("PUT", &put, &[("content-range", &range)], bytes[came..].to_vec()).await;
        assert!(served.get(&put.expect(201).location()).await.expect(200).body == bytes);
    }
}

#[tokio::test]
async fn an_upload_may_end_in_a_digest_of_the_other_algorithm() {
    let served = Served::new().await;
    let bytes = noise(2_000_000, 1);
    let session = push_chunks(&served, "a", &bytes, 1_000_000).await;
    let digest = sha512(&bytes);
    let put = served.ask("PUT", &format!("{session}?digest={digest}")).await.expect(201);
    assert!(served.get(&put.location()).await.expect(200).body == bytes);
}

#[tokio::test]
async fn a_cancelled_upload_is_gone() {
    let served = Served::new().await;
    let begun = push_chunks(&served, "a", &noise(100_000, 1), 100_000).await;
    for session in [served.begin("a").await, begun] {
        served.ask("DELETE", &session).await.expect(204);
        assert_unknown(&served, &session).await;
    }
    assert_no_sessions(&served, "a");
}

#[tokio::test]
async fn an_upload_is_known_in_its_own_repository_only() {
    let served = Served::new().await;
    let begun = push_chunks(&served, "team/a", &noise(100_000, 1), 100_000).await;
    for session in [served.begin("team/a").await, begun] {
        assert_unknown(&served, &session.replace("team/a", "team/b")).await;
        served.get(&session).await.expect(204);
    }
    assert_unknown(&served, "/v2/team/a/blobs/uploads/00000000-0000-0000-0000-000000000000").await;
    assert_unknown(&served, "/v2/team/a/blobs/uploads/no-uuid").await;
}

async fn assert_unknown(served: &Served, session: &str) {
    let put = format!("{session}?digest={}", sha256(b"x"));
    for (method, path) in [("GET", session), ("PATCH", session), ("PUT", put.as_str()), ("DELETE", session)] {
        served.send(method, path, &[], "x").await.expect_error(404, "BLOB_UPLOAD_UNKNOWN");
    }
}

#[tokio::test]
async fn requests_on_one_upload_do_not_mix() {
    let served = Served::new().await;
    let session = served.begin("a").await;
    let bodies: Vec<Vec<u8>> = (0..12).map(|n| vec![n; 200_000 + usize::from(n) * 1111]).collect();
    let replies = join_all(bodies.iter().map(|body| served.send("PATCH", &session, &[], body.clone()))).await;
    let mut taken = Vec::new();
    for (n, reply) in replies.iter().enumerate() {
        match reply.status {
            202 => taken.push((reply.header("range").to_owned(), n)),
            409 => assert!(!reply.header("retry-after").is_empty()),
            status => panic!("{status} {}", reply.text()),
        }
    }
    // The ranges tell in which order they were taken; each is there in one piece.
    taken.sort_by_key(|(range, _)| range[2..].parse::<u64>().unwrap());
    let content: Vec<u8> = taken.iter().flat_map(|(_, n)| bodies[*n].iter().copied()).collect();
    assert!(!taken.is_empty());
    let put = served.ask("PUT", &format!("{session}?digest={}", sha256(&content))).await.expect(201);
    assert!(served.get(&put.location()).await.expect(200).body == content);
}

#[tokio::test]
async fn while_one_request_works_on_an_upload_others_are_turned_away() {
    let served = Served::new().await;
    let bytes = noise(200_000, 1);
    let session = served.begin("a").await;
    let head = [("content-length", "200000")];
    let mut first = Raw::start(served.address, &format!("PATCH {session}"), &head).await;
    first.send(&bytes[..100_000]).await;
    eventually("the first request's bytes", async || {
        (served.metric("dvcr_registry_received_bytes_total").await == 100_000).then_some(())
    })
    .await;
    let put = format!("{session}?digest={}", sha256(b"other"));
    for (method, path) in [("PATCH", &session), ("PUT", &put), ("DELETE", &session)] {
        served.send(method, path, &[], "other").await.expect_error(409, "BLOB_UPLOAD_INVALID");
    }
    served.get(&session).await.expect(204);
    first.send(&bytes[100_000..]).await;
    assert_eq!(first.finish().await.expect(202).header("range"), "0-199999");
    served.ask("PUT", &format!("{session}?digest={}", sha256(&bytes))).await.expect(201);
}

#[tokio::test]
async fn a_refused_chunk_that_dawdles_holds_nobody_up() {
    let served = Served::new().await;
    let session = served.begin("a").await;
    let head = [("content-length", "1000"), ("content-range", "5-1004")];
    // Its body is read and dropped, but never comes to an end.
    let mut refused = Raw::start(served.address, &format!("PATCH {session}"), &head).await;
    refused.send(b"x").await;
    let started = std::time::Instant::now();
    eventually("a chunk beside it", async || {
        let reply = served.send("PATCH", &session, &[("content-range", "0-2")], "abc").await;
        (reply.status == 202).then_some(())
    })
    .await;
    assert!(started.elapsed().as_secs() < 9, "{:?}", started.elapsed());
}

#[tokio::test]
async fn content_of_another_digest_leaves_nothing() {
    let served = Served::new().await;
    let wrong = sha256(b"something else");
    for (n, length) in [100, 100_000, 2_000_000].into_iter().enumerate() {
        let bytes = noise(length, 1);
        let chunked = push_chunks(&served, "a", &bytes, 90_000).await;
        let put_at_once = served.begin("a").await;
        let other_algorithm = push_chunks(&served, "a", &bytes, 900_000).await;
        let long = sha512(b"something else");
        for (method, path, body) in [
            ("POST", format!("/v2/a/blobs/uploads/?digest={wrong}"), bytes.clone()),
            ("PUT", format!("{put_at_once}?digest={wrong}"), bytes.clone()),
            ("PUT", format!("{chunked}?digest={wrong}"), Vec::new()),
            ("PUT", format!("{other_algorithm}?digest={long}"), Vec::new()),
        ] {
            let reply = served.send(method, &path, &[], body).await.expect_error(400, "DIGEST_INVALID");
            let told = &reply.json()["errors"][0]["detail"]["digest"];
            assert!([sha256(&bytes), sha512(&bytes)].iter().any(|digest| told == digest), "{told}");
        }
        for session in [put_at_once, chunked, other_algorithm] {
            served.get(&session).await.expect_error(404, "BLOB_UPLOAD_UNKNOWN");
        }
        assert_no_sessions(&served, "a");
        assert!(IN_BUCKET || files(&v2(served.dir()).join("blobs")).is_empty(), "round {n}");
    }
    served.get(&format!("/v2/a/blobs/{wrong}")).await.expect_error(404, "BLOB_UNKNOWN");
}

#[tokio::test]
async fn an_upload_beyond_the_bound_waits_and_is_then_turned_away() {
    let dir = tempfile::tempdir().unwrap();
    let served = Served::open_with(dir, |config| config.uploads_max = 1).await;
    let (first, second) = (served.begin("a").await, served.begin("a").await);
    let head = [("content-length", "200000")];
    let mut stalled = Raw::start(served.address, &format!("PATCH {first}"), &head).await;
    stalled.send(b"x").await;
    eventually("the first upload", async || {
        (served.metric("dvcr_registry_uploads_in_progress").await == 1).then_some(())
    })
    .await;
    let bytes = noise(200_000, 1);
    let turned_away = served.send("PATCH", &second, &[], bytes.clone()).await;
    let turned_away = turned_away.expect_error(429, "TOOMANYREQUESTS");
    assert!(turned_away.header("retry-after").parse::<u64>().unwrap() > 0);
    // When the first has ended, the second is as welcome as ever.
    drop(stalled);
    let put = format!("{second}?digest={}", sha256(&bytes));
    served.send("PUT", &put, &[], bytes).await.expect(201);
}

#[tokio::test]
async fn a_new_upload_tells_the_least_chunk_and_shorter_ones_are_taken() {
    let served = Served::new().await;
    let begun = served.ask("POST", "/v2/a/blobs/uploads/").await.expect(202);
    let least = if IN_BUCKET { 16 << 20 } else { 1 << 20 };
    assert_eq!(begun.header("oci-chunk-min-length"), least.to_string());
    let session = begun.location();
    for (at, byte) in ["x", "y"].into_iter().enumerate() {
        let range = format!("{at}-{at}");
        served.send("PATCH", &session, &[("content-range", &range)], byte).await.expect(202);
    }
    served.ask("PUT", &format!("{session}?digest={}", sha256(b"xy"))).await.expect(201);
}
