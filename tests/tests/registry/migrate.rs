//! A registry moves into another directory or bucket while it serves, also when it is killed on the way; and it has a mirror.

use crate::support::{Client, Image, OCI_MANIFEST, eventually, image, layers, noise};
use anyhow::{Result, ensure};
use dvcr_tests::{Daemon, Output, Registry, S3Server, cmd, dvcr, run_output, temp_dir, utf8, wait_until};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MOVE_TIMEOUT: Duration = Duration::from_secs(120);

async fn migrate(from: &Path, to: &Path) -> Result<Output> {
    let args = ["registry", "migrate", "--from", utf8(from), "--to", utf8(to), "--output", "json"];
    let command = cmd(dvcr()?, args);
    tokio::task::spawn_blocking(move || run_output(&command)).await?
}

fn moved(output: &Output) -> Result<Value> {
    ensure!(output.status.success(), "{}", output.stderr);
    Ok(serde_json::from_str(&output.stdout)?)
}

/// Pushes images until it is told to stop, and returns those that were acknowledged.
async fn push_on(client: Client, stop: Arc<AtomicBool>) -> Result<Vec<(String, Image)>> {
    let mut pushed = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let n = pushed.len();
        let image = image(OCI_MANIFEST, &[noise(3000 + n, 5), noise(20_000, n as u64)]);
        let repo = format!("busy/r{}", n % 3);
        image.push(&client, &repo, &format!("t{n}")).await?;
        pushed.push((repo, image));
    }
    Ok(pushed)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_served_registry_moves_into_a_bucket_and_back_without_a_failed_push() -> Result<()> {
    let (server, dir) = (S3Server::shared_minio(), temp_dir());
    let (first, last) = (dir.path().join("first"), dir.path().join("last"));
    let bucket =
        Registry::bucket_settings(&dir.path().join("replica"), (&server, &server.new_bucket()?, "/x"))?;
    let mut registry = Registry::start(&first)?;
    let mut client = Client::new(&registry.url());
    let large = image(OCI_MANIFEST, &layers(1, &[1000, 5 << 20]));
    large.push(&client, "team/app", "v1").await?;
    let session = client.begin("team/app").await?;
    let bytes = noise(300_000, 9);
    client.patch(&session, 0, bytes.slice(..100_000)).await?.expect(202)?;

    for place in [&first, &bucket] {
        let refused = migrate(place, place).await?;
        ensure!(!refused.status.success() && refused.stderr.contains("are both"), "{}", refused.stderr);
    }
    let mut known = Vec::new();
    for (from, to) in [(&first, &bucket), (&bucket, &last)] {
        let stop = Arc::<AtomicBool>::default();
        let pushing = tokio::spawn(push_on(client.clone(), Arc::clone(&stop)));
        eventually("pushes", async || Ok(!client.tags("busy/r2").await.unwrap_or_default().is_empty()))
            .await?;
        let done = moved(&migrate(from, to).await?)?;
        ensure!(done["switched"] == true, "{done}");
        let new = image(OCI_MANIFEST, &layers(2, &[10]));
        new.push(&client, "after", "v1").await?;
        stop.store(true, Ordering::Relaxed);
        known.extend(pushing.await??);
        if from == &first {
            // An upload that was begun before.
            client.finish(&session, 100_000, &bytes).await?;
        }
        for (repo, image) in &known {
            image.check(&client, repo).await?;
        }
        large.check(&client, "team/app").await?;

        // What was left is not served by mistake; what it became is.
        ensure!(registry.terminate()?.success(), "{}", registry.log());
        let refused = match from == &first {
            true => ["registry", "--root", utf8(&first)],
            false => ["registry", "--config", utf8(&bucket)],
        };
        let refused = run_output(&cmd(dvcr()?, [&refused[..], &["--listen", "127.0.0.1:0"]].concat()))?;
        ensure!(!refused.status.success() && refused.stderr.contains("has moved to"), "{}", refused.stderr);
        registry = match from == &first {
            true => Registry::start_with(&dir.path().join("replica"), &["--config", utf8(&bucket)])?,
            false => Registry::start(&last)?,
        };
        client = Client::new(&registry.url());
        for (repo, image) in &known {
            image.check(&client, repo).await?;
        }
        new.check(&client, "after").await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_is_killed_goes_on_and_changes_nothing_until_it_ends() -> Result<()> {
    let dir = temp_dir();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let mut registry = Registry::start(&first)?;
    let client = Client::new(&registry.url());
    let images: Vec<_> = (0..6).map(|n| image(OCI_MANIFEST, &layers(n, &[30 << 20, 100]))).collect();
    for (n, image) in images.iter().enumerate() {
        image.push(&client, "app", &format!("v{n}")).await?;
    }
    ensure!(registry.terminate()?.success(), "{}", registry.log());
    let blobs = second.join("docker/registry/v2/blobs/sha256");
    let copied = || fs::read_dir(&blobs).map_or(0, Iterator::count);
    // Nobody serves it: the command does all itself. It is killed each time when there is more.
    for _ in 0..3 {
        let before = copied();
        let mut moving = Daemon::spawn(&cmd(
            dvcr()?,
            ["registry", "migrate", "--from", utf8(&first), "--to", utf8(&second)],
        ))?;
        wait_until(MOVE_TIMEOUT, "a blob is copied", || copied() > before || !moving.is_running())?;
        moving.kill9()?;
        if !moved_away(&first) {
            registry.restart()?;
            images[0].check(&client, "app").await?;
            ensure!(registry.terminate()?.success(), "{}", registry.log());
        }
    }
    if !moved_away(&first) {
        moved(&migrate(&first, &second).await?)?;
    }
    let registry = Registry::start(&second)?;
    let client = Client::new(&registry.url());
    ensure!(client.tags("app").await?.len() == images.len());
    for image in &images {
        image.check(&client, "app").await?;
    }
    Ok(())
}

fn moved_away(root: &Path) -> bool {
    root.join("dvcr/moved").exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_has_what_is_pushed_and_lacks_what_is_deleted_within_seconds() -> Result<()> {
    let dir = temp_dir();
    let (first, second, file) =
        (dir.path().join("first"), dir.path().join("second"), dir.path().join("c.yml"));
    fs::write(&file, json!({"mirror": {"root": second}}).to_string())?;
    let mut registry = Registry::start_with(&first, &["--config", utf8(&file)])?;
    let client = Client::new(&registry.url());
    let [one, two] = [1, 2].map(|seed| image(OCI_MANIFEST, &layers(seed, &[1000, 100_000])));
    one.push(&client, "app", "one").await?;
    two.push(&client, "app", "two").await?;
    client.delete("/v2/app/manifests/one").await?;
    eventually("the mirror has all", async || {
        let metrics = client.get("/metrics").await?.expect(200)?.body;
        let metrics = String::from_utf8_lossy(&metrics).into_owned();
        let has = |line: &str| metrics.lines().any(|other| other == line);
        Ok(has("dvcr_registry_mirror_lag_seconds 0")
            && has("dvcr_registry_mirror_pending_changes 0")
            && metrics.contains("dvcr_registry_mirror_compared_seconds "))
    })
    .await?;
    // The first is lost.
    registry.kill9()?;
    fs::remove_dir_all(&first)?;
    let registry = Registry::start(&second)?;
    let client = Client::new(&registry.url());
    ensure!(client.tags("app").await? == ["two"]);
    two.check(&client, "app").await
}
