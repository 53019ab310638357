//! Blobs: both digests, ranges, mounts, deletion.

use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, TestRunner};

use crate::support::{IN_BUCKET, Served, blob_path, link_dir, noise, sha256, sha512};

#[tokio::test]
async fn a_blob_is_read_back_by_the_digest_it_was_pushed_by() {
    let served = Served::new().await;
    for length in [0, 1, 70_000, 3 << 20] {
        let bytes = noise(length, length as u64);
        for digest in [sha256(&bytes), sha512(&bytes)] {
            let posted = served
                .send("POST", &format!("/v2/a/b/blobs/uploads/?digest={digest}"), &[], bytes.clone())
                .await
                .expect(201);
            assert_eq!(posted.header("docker-content-digest"), digest);
            let path = posted.location();
            assert_eq!(path, format!("/v2/a/b/blobs/{digest}"));
            let got = served.get(&path).await.expect(200);
            assert!(got.body == bytes, "{digest}");
            let head = served.ask("HEAD", &path).await.expect(200);
            for reply in [&got, &head] {
                assert_eq!(reply.header("content-length"), length.to_string());
                assert_eq!(reply.header("docker-content-digest"), digest);
                assert_eq!(reply.header("accept-ranges"), "bytes");
                assert_eq!(reply.header("etag"), format!("\"{digest}\""));
            }
            if !IN_BUCKET {
                assert!(std::fs::read(served.path(&blob_path(&digest))).unwrap() == bytes);
                let link = format!("repositories/a/b/_layers/{}/link", link_dir(&digest));
                assert_eq!(std::fs::read_to_string(served.path(&link)).unwrap(), digest);
            }
            let etag = format!("\"{digest}\"");
            let known = served.send("GET", &path, &[("if-none-match", &etag)], "").await.expect(304);
            assert!(known.body.is_empty());
        }
    }
}

/// A range as a client may ask for it.
#[derive(Clone, Debug)]
enum Asked {
    Closed(u64, u64),
    From(u64),
    Suffix(u64),
}

impl Asked {
    fn header(&self) -> String {
        match self {
            Self::Closed(first, last) => format!("bytes={first}-{last}"),
            Self::From(first) => format!("bytes={first}-"),
            Self::Suffix(length) => format!("bytes=-{length}"),
        }
    }

    /// The bytes it selects, and where they begin; `None` if it selects none.
    fn slice<'a>(&self, bytes: &'a [u8]) -> Option<(usize, &'a [u8])> {
        let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        let (first, end) = match *self {
            Self::Closed(first, last) => (at(first), at(last).saturating_add(1).min(bytes.len())),
            Self::From(first) => (at(first), bytes.len()),
            Self::Suffix(length) => (bytes.len().saturating_sub(at(length)), bytes.len()),
        };
        bytes.get(first..end).filter(|slice| !slice.is_empty()).map(|slice| (first, slice))
    }
}

#[test]
fn every_range_is_the_slice_of_the_blob() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let blobs: Vec<Vec<u8>> = [0, 1, 4096, (256 << 10) + 1, (1 << 20) - 3].map(|n| noise(n, 7)).into();
    let served = runtime.block_on(Served::new());
    let digests: Vec<String> =
        blobs.iter().map(|blob| runtime.block_on(served.push_blob("a", blob))).collect();
    let offset = || {
        prop_oneof![
            4 => 0..(1u64 << 20) + 10,
            2 => 0..5000u64,
            1 => (256u64 << 10) - 2..(256 << 10) + 3,
            1 => Just(u64::MAX),
        ]
    };
    let asked = prop_oneof![
        (offset(), offset()).prop_map(|(one, other)| Asked::Closed(one, other)),
        (offset(), 0..100u64).prop_map(|(first, more)| Asked::Closed(first, first.saturating_add(more))),
        offset().prop_map(Asked::From),
        offset().prop_map(Asked::Suffix),
    ];
    let mut runner = TestRunner::new(Cases { cases: 400, failure_persistence: None, ..Cases::default() });
    runner
        .run(&(0..blobs.len(), asked), |(which, asked)| {
            let (blob, path) = (&blobs[which], format!("/v2/a/blobs/{}", digests[which]));
            let reply = runtime.block_on(served.send("GET", &path, &[("range", &asked.header())], ""));
            let (length, content_range) = (blob.len(), reply.header("content-range").to_owned());
            match asked.slice(blob) {
                Some((first, slice)) => {
                    prop_assert_eq!(reply.status, 206);
                    let expected = format!("bytes {first}-{}/{length}", first + slice.len() - 1);
                    prop_assert_eq!(content_range, expected);
                    prop_assert_eq!(reply.header("content-length"), slice.len().to_string());
                    prop_assert!(reply.body == slice);
                }
                None => {
                    prop_assert_eq!(reply.status, 416);
                    prop_assert_eq!(content_range, format!("bytes */{length}"));
                }
            }
            Ok(())
        })
        .unwrap();
}

#[tokio::test]
async fn what_is_no_single_byte_range_gets_the_whole_blob() {
    let served = Served::new().await;
    let bytes = noise(1000, 1);
    let path = format!("/v2/a/blobs/{}", served.push_blob("a", &bytes).await);
    for range in ["bytes=0-1,5-6", "lines=0-1", "bytes=x-y", "bytes=-", "nonsense"] {
        let reply = served.send("GET", &path, &[("range", range)], "").await.expect(200);
        assert!(reply.body == bytes, "{range}");
    }
}

#[tokio::test]
async fn a_range_is_given_only_if_it_is_of_the_version_the_client_knows() {
    let served = Served::new().await;
    let bytes = noise(1000, 1);
    let digest = served.push_blob("a", &bytes).await;
    let path = format!("/v2/a/blobs/{digest}");
    let range = ("range", "bytes=10-19");
    let same = format!("\"{digest}\"");
    let reply = served.send("GET", &path, &[range, ("if-range", &same)], "").await.expect(206);
    assert!(reply.body == bytes[10..20]);
    // Another entity tag, a weak one, and a date that we never gave.
    for other in ["\"sha256:other\"", &format!("W/{same}"), "Sat, 01 Jan 2000 00:00:00 GMT"] {
        let reply = served.send("GET", &path, &[range, ("if-range", other)], "").await.expect(200);
        assert!(reply.body == bytes, "{other}");
    }
}

#[tokio::test]
async fn a_blob_is_mounted_from_a_repository_that_has_it() {
    let served = Served::new().await;
    let bytes = noise(5000, 1);
    for digest in [sha256(&bytes), sha512(&bytes)] {
        let path = format!("/v2/from/here/blobs/uploads/?digest={digest}");
        served.send("POST", &path, &[], bytes.clone()).await.expect(201);
        served.get(&format!("/v2/to/blobs/{digest}")).await.expect_error(404, "BLOB_UNKNOWN");
        let path = format!("/v2/to/blobs/uploads/?mount={digest}&from=from/here");
        let mounted = served.ask("POST", &path).await.expect(201);
        assert_eq!(mounted.header("docker-content-digest"), digest);
        // What becomes of the source is no longer of interest.
        served.ask("DELETE", &format!("/v2/from/here/blobs/{digest}")).await.expect(202);
        assert!(served.get(&mounted.location()).await.expect(200).body == bytes);
    }
}

#[tokio::test]
async fn a_mount_that_cannot_be_made_begins_an_upload() {
    let served = Served::new().await;
    let bytes = noise(5000, 1);
    let digest = served.push_blob("has/it", &bytes).await;
    let missing = sha256(b"nowhere");
    for query in [
        // Without `from`: which repositories a caller may read is not for the registry to guess.
        format!("mount={digest}"),
        format!("mount={digest}&from="),
        format!("mount={digest}&from=no/such/repository"),
        format!("mount={digest}&from=has"),
        format!("mount={missing}&from=has/it"),
    ] {
        let begun = served.ask("POST", &format!("/v2/to/blobs/uploads/?{query}")).await.expect(202);
        served.get(&format!("/v2/to/blobs/{digest}")).await.expect_error(404, "BLOB_UNKNOWN");
        // The session is as good as any other.
        let content = query.as_bytes();
        let put = format!("{}?digest={}", begun.location(), sha256(content));
        served.send("PUT", &put, &[], content.to_vec()).await.expect(201);
    }
}

#[tokio::test]
async fn a_deleted_blob_is_gone_from_its_repository_alone() {
    let served = Served::new().await;
    let digest = served.push_blob("a", b"content").await;
    served.push_blob("b", b"content").await;
    let path = format!("/v2/a/blobs/{digest}");
    served.ask("DELETE", &path).await.expect(202);
    served.get(&path).await.expect_error(404, "BLOB_UNKNOWN");
    served.ask("HEAD", &path).await.expect(404);
    served.ask("DELETE", &path).await.expect_error(404, "BLOB_UNKNOWN");
    served.get(&format!("/v2/b/blobs/{digest}")).await.expect(200);
    served.push_blob("a", b"content").await;
    assert_eq!(served.get(&path).await.expect(200).text(), "content");
}
