//! An import that was broken off is gone on with by the next one, or begun anew where that cannot be.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Files, MIB, Registry, Serving, Web, chain, import_request, noise, path, populate_one, run};
use dvcr_converter::progress::Progress;
use dvcr_importer::{ErrorKind, ImportRequest, ImportSummary, import};

/// What a request is broken off behind, bytes: in the middle of the third chunk.
const BROKEN_OFF_AT: usize = 19 * MIB;

async fn run_import(request: &ImportRequest) -> dvcr_importer::Result<ImportSummary> {
    import(request.clone(), Arc::new(Progress::default())).await
}

/// Runs an import until so many bytes of the source were read and a session is there, and drops it, as a signal would.
async fn break_off(registry: &Registry, request: &ImportRequest, bytes: usize) {
    let progress = Arc::new(Progress::default());
    let running = tokio::spawn(import(request.clone(), progress.clone()));
    let deadline = Instant::now() + Duration::from_secs(60);
    let name = request.destination.repository();
    // Ours tells how much it has put away: two chunks.
    let is_put_away = || registry.is_debians() || registry.acknowledged(name) >= 16 * MIB as u64;
    while progress.done() < bytes as u64 || registry.sessions(name) == 0 || !is_put_away() {
        assert!(Instant::now() < deadline && !running.is_finished(), "{} bytes came", progress.done());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    progress.cancel();
    assert_eq!(running.await.unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
}

async fn assert_is(registry: &Registry, name: &str, dir: &Path, qcow2: &Path) {
    let target = dir.join(format!("{name}.raw"));
    populate_one(&registry.reference(name), &target).await.unwrap_or_else(|e| panic!("{}", chain(&e)));
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", path(&target), path(qcow2)]);
}

/// A qcow2 file of 40 MiB, and another one of the same length.
fn two_versions(files: &Files) -> [Vec<u8>; 2] {
    [3, 4].map(|seed| {
        std::fs::write(files.path("disk.raw"), noise(40 * MIB, seed)).unwrap();
        std::fs::read(files.qcow2(&[])).unwrap()
    })
}

fn sha256(bytes: &[u8]) -> String {
    dvcr_image::digest::sha256(bytes).unwrap().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_goes_on_where_an_earlier_one_was_broken_off() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let [first, second] = two_versions(&files);
    std::fs::write(files.path("first.qcow2"), &first).unwrap();
    std::fs::write(files.path("second.qcow2"), &second).unwrap();
    let served = |body: &[u8], etag| Serving { etag, ..Serving::new(body.to_vec()) };
    let web = Web::serve(served(&first, "\"v1\"")).await;
    let url = web.url("disk.qcow2");

    for (name, then, resumes) in [
        ("same", served(&first, "\"v1\""), true),
        ("changed", served(&second, "\"v2\""), false),
        ("no-ranges", Serving { ranges: false, ..served(&first, "\"v1\"") }, false),
    ] {
        web.now(Serving { stall_after: Some(BROKEN_OFF_AT), ..served(&first, "\"v1\"") });
        let mut request = import_request(&url, &registry.reference(name));
        let body = then.body.clone();
        // Where the version changes, nothing but that tells.
        if resumes {
            request.checksums = vec![sha256(&first).parse().unwrap()];
        }
        break_off(&registry, &request, BROKEN_OFF_AT).await;
        assert_eq!(registry.sessions(name), 1, "{name}");
        assert_eq!(registry.repository(name).manifest_digest("latest").await.unwrap(), None);

        web.now(then);
        web.requests.lock().unwrap().clear();
        let summary = run_import(&request).await.unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
        let again = web.requests.lock().unwrap().concat().to_ascii_lowercase();
        match resumes {
            // Two chunks of the layer are there, which begins with 64 KiB of its own; the note is of where the second began.
            true => {
                assert_eq!(summary.resumed_bytes, 8 * MIB as u64 - 65_536, "{name}");
                assert!(again.contains("range: bytes=8323072-"), "{again}");
            }
            false => assert_eq!(summary.resumed_bytes, 0, "{name}"),
        }
        let version = if *body == first { "first.qcow2" } else { "second.qcow2" };
        assert_is(&registry, name, files.dir.path(), &files.path(version)).await;
        assert_eq!(registry.sessions(name), 0, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_was_read_in_part_is_gone_on_with_unless_it_was_changed() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let [_, second] = two_versions(&files);
    let source = files.path("disk.qcow2");
    let request = import_request(path(&source), &registry.reference("file"));
    for changed in [false, true] {
        let progress = Arc::new(Progress::default());
        let running = tokio::spawn(import(request.clone(), progress.clone()));
        while progress.done() < 8 * MIB as u64 && !running.is_finished() {
            tokio::task::yield_now().await;
        }
        progress.cancel();
        let was_broken_off = running.await.unwrap().is_err();
        if changed {
            std::fs::write(&source, &second).unwrap();
        }
        let summary = run_import(&request).await.unwrap();
        assert!(was_broken_off || summary.resumed_bytes == 0);
        assert!(!changed || summary.resumed_bytes == 0, "{}", summary.resumed_bytes);
        assert_is(&registry, "file", files.dir.path(), &source).await;
        assert_eq!(registry.sessions("file"), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checksum_is_over_what_both_imports_brought() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let [first, _] = two_versions(&files);
    let web = Web::serve(Serving { stall_after: Some(BROKEN_OFF_AT), ..Serving::new(first.clone()) }).await;
    let mut request = import_request(&web.url("disk.qcow2"), &registry.reference("a"));
    let wrong = format!("sha256:{}", "0".repeat(64));
    request.checksums = vec![wrong.parse().unwrap()];
    break_off(&registry, &request, BROKEN_OFF_AT).await;
    web.now(Serving::new(first.clone()));
    let error = run_import(&request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Checksum);
    assert!(error.to_string().contains(&sha256(&first)), "{error}");
    // Nothing goes on with what is known to be wrong.
    assert_eq!(registry.sessions("a"), 0);
    request.checksums = vec![sha256(&first).parse().unwrap()];
    assert_eq!(run_import(&request).await.unwrap().resumed_bytes, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_knows_no_names_is_begun_with_anew() {
    let (registry, files) = (Registry::debian(), Files::new());
    let [_, second] = two_versions(&files);
    let web = Web::serve(Serving { stall_after: Some(BROKEN_OFF_AT), ..Serving::new(second.clone()) }).await;
    let request = import_request(&web.url("disk.qcow2"), &registry.reference("a"));
    break_off(&registry, &request, BROKEN_OFF_AT).await;
    web.now(Serving::new(second));
    assert_eq!(run_import(&request).await.unwrap().resumed_bytes, 0);
    assert_is(&registry, "a", files.dir.path(), &files.path("disk.qcow2")).await;
}
