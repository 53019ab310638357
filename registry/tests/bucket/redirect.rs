//! Clients that are sent to the bucket.

use std::time::Duration;

use crate::support::{Served, noise};

#[tokio::test]
async fn a_client_that_is_sent_to_the_bucket_finds_the_blob_there_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let served =
        Served::open_with(dir, |config| config.limits.redirect = Some(Duration::from_secs(60))).await;
    let bytes = noise(200_000, 1);
    let digest = served.push_blob("a", &bytes).await;
    let path = format!("/v2/a/blobs/{digest}");
    // The client of the tests follows.
    assert!(served.get(&path).await.expect(200).body == bytes);
    let part = served.send("GET", &path, &[("range", "bytes=1000-1999")], "").await.expect(206);
    assert!(part.body == bytes[1000..2000]);
    assert_eq!(served.ask("HEAD", &path).await.expect(200).header("docker-content-digest"), digest);

    let client = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().unwrap();
    let sent = client.get(format!("http://{}{path}", served.address)).send().await.unwrap();
    assert_eq!(
        (sent.status().as_u16(), &sent.headers()["cache-control"]),
        (307, &"no-store".parse().unwrap())
    );
    let url = sent.headers()["location"].to_str().unwrap();
    assert!(url.contains("X-Amz-Expires=60"), "{url}");
    let other = url.replacen("/sha256/", "/sha512/", 1);
    assert_ne!(other, url);
    assert_eq!(client.get(other).send().await.unwrap().status().as_u16(), 403);
    // Without a blob there is nowhere to go.
    let absent = format!("/v2/b/blobs/{digest}");
    served.get(&absent).await.expect_error(404, "BLOB_UNKNOWN");
}
