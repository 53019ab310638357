//! The registry as a program: conformance, a directory shared with other registries, kill -9, an orderly end, a move elsewhere.

mod bucket;
mod conformance;
mod crash;
mod events;
mod interchange;
mod migrate;
mod replicas;
mod support;
mod takeover;

use anyhow::{Context, Result};
use dvcr_tests::{Registry, cmd, run_output, temp_dir, tool};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};
use support::{Client, OCI_MANIFEST, eventually, image, layers, noise};

const CONFORMANCE_PASSED_MIN: u64 = 70;

#[test]
fn the_oci_conformance_program_finds_no_failure() -> Result<()> {
    let dir = temp_dir();
    let registry = Registry::start(&dir.path().join("root"))?;
    // It writes its reports to where it runs.
    let mut command = cmd(tool("conformance.test")?, ["-ginkgo.no-color"]);
    command.current_dir(dir.path()).env("OCI_ROOT_URL", registry.url());
    command.env("OCI_NAMESPACE", "conformance/one").env("OCI_CROSSMOUNT_NAMESPACE", "conformance/two");
    for workflow in ["PULL", "PUSH", "CONTENT_DISCOVERY", "CONTENT_MANAGEMENT"] {
        command.env(format!("OCI_TEST_{workflow}"), "1");
    }
    command.env("OCI_HIDE_SKIPPED_WORKFLOWS", "0").env("OCI_DEBUG", "0");
    let output = run_output(&command)?;
    let summary = output.stdout.lines().rev().find(|line| line.contains(" Passed "));
    let summary = summary.with_context(|| format!("no summary in {}", output.stdout))?;
    // "SUCCESS! -- 74 Passed | 0 Failed | 0 Pending | 5 Skipped"
    let count = |what: &str| -> Option<u64> {
        let part = summary.split([' ', '|']).collect::<Vec<_>>();
        part.windows(2).find(|pair| pair[1] == what)?[0].parse().ok()
    };
    assert_eq!(count("Failed"), Some(0), "{}", output.stdout);
    assert!(count("Passed") >= Some(CONFORMANCE_PASSED_MIN), "{summary}");
    assert!(output.status.success(), "{}\n{}", output.stdout, output.stderr);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_a_push_end_and_cuts_one_that_stalls_without_harm() -> Result<()> {
    let dir = temp_dir();
    let registry = Registry::start(dir.path())?;
    let client = Client::new(&registry.url());
    let (address, bytes) = (registry.address(), noise(4_000_000, 1));
    let pushed = image(OCI_MANIFEST, &layers(1, &[1000]));
    pushed.push(&client, "a/b", "tag").await?;
    let half = bytes.len() / 2;
    let (moving, stalled) = (client.begin("a/b").await?, client.begin("a/b").await?);
    let untouched = client.begin("a/b").await?;
    let (pieces, moving_request) = client.patch_slowly(&moving);
    let (never, stalled_request) = client.patch_slowly(&stalled);
    let (moving_request, stalled_request) = (tokio::spawn(moving_request), tokio::spawn(stalled_request));
    pieces.send(bytes.slice(..half)).await?;
    never.send(bytes.slice(..half)).await?;
    let metrics = format!("{}/metrics", registry.url());
    eventually("both halves", async || {
        let text = client.http.get(&metrics).send().await?.text().await?;
        let received = 2 * half as u64 + pushed.blobs.iter().map(|blob| blob.len() as u64).sum::<u64>();
        let received = received + pushed.manifest.len() as u64;
        Ok(text.lines().any(|line| line == format!("dvcr_registry_received_bytes_total {received}")))
    })
    .await?;

    let ended = tokio::task::spawn_blocking(move || {
        let mut registry = registry;
        registry.terminate().map(|status| (registry, status))
    });
    eventually("no more connections", async || Ok(!accepts(address))).await?;
    pieces.send(bytes.slice(half..)).await?;
    drop(pieces);
    let finished = moving_request.await??.expect(202)?;
    assert_eq!(finished.header("range"), format!("0-{}", bytes.len() - 1));
    let (mut registry, status) = ended.await??;
    assert_eq!(status.code(), Some(0), "{}", registry.log());
    assert!(!stalled_request.await?.is_ok_and(|reply| reply.status < 400), "half a stream was acknowledged");
    drop(never);

    registry.restart()?;
    pushed.check(&client, "a/b").await?;
    client.finish(&moving, bytes.len(), &bytes).await?;
    // What had come of the other is kept too.
    assert_eq!(client.offset(&stalled).await?, half);
    client.finish(&stalled, half, &bytes).await?;
    client.finish(&untouched, 0, &bytes).await
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_does_not_wait_for_idle_connections() -> Result<()> {
    let dir = temp_dir();
    let mut registry = Registry::start(dir.path())?;
    let client = Client::new(&registry.url());
    // Kept open by the client; and one that never says a word.
    client.get("/v2/").await?.expect(200)?;
    let silent = TcpStream::connect(registry.address())?;
    client.get("/v2/").await?.expect(200)?;
    let started = Instant::now();
    assert_eq!(registry.terminate()?.code(), Some(0), "{}", registry.log());
    assert!(started.elapsed() < Duration::from_secs(9), "{:?}", started.elapsed());
    drop(silent);
    Ok(())
}

fn accepts(address: SocketAddr) -> bool {
    TcpStream::connect(address).is_ok()
}
