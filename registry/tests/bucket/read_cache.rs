//! Blobs that a replica keeps on its own disk.

use std::fs;
use std::path::Path;

use crate::support::{Served, eventually, noise};

const BYTES_MAX: u64 = 300_000;

/// The files of kept blobs.
fn kept(served: &Served) -> Vec<fs::DirEntry> {
    fs::read_dir(cache(served.dir())).unwrap().map(Result::unwrap).collect()
}

fn cache(dir: &Path) -> std::path::PathBuf {
    dir.join("root/dvcr/read-cache")
}

/// Pulls until the blob comes from the disk.
async fn warm(served: &Served, path: &str, bytes: &[u8]) {
    let before = served.metric("dvcr_registry_read_cache_hits_total").await;
    eventually("a pull from the disk", async || {
        assert!(served.get(path).await.expect(200).body == bytes);
        (served.metric("dvcr_registry_read_cache_hits_total").await > before).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_is_pulled_again_and_again_is_kept_within_the_bound_and_given_to_those_who_have_it() {
    let limit = |config: &mut dvcr_registry::Config| config.limits.read_cache_bytes = Some(BYTES_MAX);
    let served = Served::open_with(tempfile::tempdir().unwrap(), limit).await;
    let blobs = [noise(200_000, 1), noise(150_000, 2)];
    let mut paths = Vec::new();
    for blob in &blobs {
        paths.push(format!("/v2/a/blobs/{}", served.push_blob("a", blob).await));
    }
    assert!(served.get(&paths[0]).await.expect(200).body == blobs[0]);
    assert!(kept(&served).is_empty(), "it was pulled once");
    warm(&served, &paths[0], &blobs[0]).await;
    let part = served.send("GET", &paths[0], &[("range", "bytes=100-1999")], "").await.expect(206);
    assert!(part.body == blobs[0][100..2000]);
    // The repository decides, and not the disk, which is not even looked at.
    let hits = served.metric("dvcr_registry_read_cache_hits_total").await;
    served.get(&paths[0].replace("/a/", "/b/")).await.expect_error(404, "BLOB_UNKNOWN");
    assert_eq!(served.metric("dvcr_registry_read_cache_hits_total").await, hits);

    let served = Served::open_with(served.close().await, limit).await;
    assert!(served.get(&paths[0]).await.expect(200).body == blobs[0]);
    assert_eq!(served.metric("dvcr_registry_read_cache_hits_total").await, 1, "it outlives a restart");
    warm(&served, &paths[1], &blobs[1]).await;
    assert_eq!(kept(&served).len(), 1, "the other one made room");
    assert_eq!(served.metric("dvcr_registry_read_cache_bytes").await, 150_000);
    served.ask("DELETE", &paths[1]).await.expect(202);
    served.get(&paths[1]).await.expect_error(404, "BLOB_UNKNOWN");

    // A file that somebody took away, and one that was not finished.
    let place = served.close().await;
    let dir = cache(place.path());
    fs::write(dir.join(format!("partial-sha256-{}", "0".repeat(64))), "a part").unwrap();
    let served = Served::open_with(place, limit).await;
    assert_eq!(kept(&served).len(), 1);
    fs::remove_file(kept(&served)[0].path()).unwrap();
    served.push_blob("a", &blobs[1]).await;
    assert!(served.get(&paths[1]).await.expect(200).body == blobs[1]);
}
