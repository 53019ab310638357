//! Damage on disk: found, put aside, healed by the next push.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use dvcr_registry::{Config, Outcome, Scrubbed, Task, control};

use crate::support::{OCI_MANIFEST, Served, blob_path, eventually, image, noise};

/// Asks the registry by its control socket, or does it alone where nobody serves.
async fn scrub(dir: &std::path::Path) -> Scrubbed {
    let config = Config::new(dir.join("root"));
    let work = move || control::perform(config, &Task::Scrub { rate: None }, &AtomicBool::new(false), |_| ());
    match tokio::task::spawn_blocking(work).await.unwrap().unwrap() {
        Outcome::Scrubbed(done) => done,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn damage_is_unknown_to_clients_until_they_push_it_again() {
    let served = Served::new().await;
    let manifest = served.push_image("a", "v1", 1).await;
    let layer = noise(1000, 1);
    let digest = served.push_blob("a", &layer).await;
    assert_eq!(scrub(served.dir()).await.damaged, 0);

    std::fs::write(served.path(&blob_path(&digest)), b"damaged").unwrap();
    std::fs::write(served.path(&blob_path(&manifest)), b"damaged").unwrap();
    let done = scrub(served.dir()).await;
    assert_eq!((done.blobs, done.damaged), (3, 2));
    for method in ["HEAD", "GET"] {
        let reply = served.ask(method, &format!("/v2/a/blobs/{digest}")).await.expect(404);
        assert!(method == "HEAD" || reply.text().contains("BLOB_UNKNOWN"));
        let reply = served.ask(method, "/v2/a/manifests/v1").await.expect(404);
        assert!(method == "HEAD" || reply.text().contains("MANIFEST_UNKNOWN"));
    }
    for (name, value) in
        [("scrub_damaged_blobs_total", 2), ("quarantined_blobs", 2), ("scrub_blobs_total", 6)]
    {
        assert_eq!(served.metric(&format!("dvcr_registry_{name}")).await, value, "{name}");
    }

    // As a client does: blobs that are not there, then the manifest.
    let path = format!("/v2/b/blobs/uploads/?mount={digest}&from=a");
    let location = served.ask("POST", &path).await.expect(202).location();
    served.send("PATCH", &location, &[], layer.clone()).await.expect(202);
    served.ask("PUT", &format!("{location}?digest={digest}")).await.expect(201);
    assert_eq!(served.get(&format!("/v2/a/blobs/{digest}")).await.expect(200).body, layer);
    served.push_manifest("a", "v1", &image(OCI_MANIFEST, b"{}", &[&layer])).await;
    served.get("/v2/a/manifests/v1").await.expect(200);
    assert_eq!(served.metric("dvcr_registry_quarantined_blobs").await, 0);

    let dir = served.close().await;
    let done = scrub(dir.path()).await;
    assert_eq!((done.blobs, done.damaged), (3, 0), "also where nobody serves");
}

#[tokio::test]
async fn damage_is_found_in_the_background() {
    let often = |config: &mut Config| {
        config.scrub.rate = Some(1 << 30);
        (config.scrub.delay, config.scrub.period) = (Duration::ZERO, Duration::ZERO);
    };
    let served = Served::open_with(tempfile::tempdir().unwrap(), often).await;
    let digest = served.push_blob("a", &noise(1000, 1)).await;
    std::fs::write(served.path(&blob_path(&digest)), b"damaged").unwrap();
    eventually("the damaged blob to be put aside", async || {
        (served.ask("HEAD", &format!("/v2/a/blobs/{digest}")).await.status == 404).then_some(())
    })
    .await;
    eventually("the end of a pass", async || {
        (served.metric("dvcr_registry_scrub_last_pass_timestamp_seconds").await > 0).then_some(())
    })
    .await;
    // The directory is free at once.
    Served::open(served.close().await).await;
}
