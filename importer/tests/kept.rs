//! A source that is decoded or encoded on the way is kept while it comes, so that the next import goes on with it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use bytes::Bytes;
use common::{Files, MIB, Registry, Serving, Web, chain, import_request, noise, populate_one};
use dvcr_converter::progress::Progress;
use dvcr_image::digest;
use dvcr_importer::{ErrorKind, ImportRequest, ImportSummary, import};

/// Bytes of the source in a piece, of a source that is not longer than these.
const PIECE_BYTES: u64 = 16 * MIB as u64;
/// What a request stalls behind: two pieces are whole then.
const STALLED_AT: usize = 35 * MIB;

async fn run_import(request: &ImportRequest) -> dvcr_importer::Result<ImportSummary> {
    import(request.clone(), Arc::new(Progress::default())).await
}

fn directory(registry: &Registry, name: &str, kind: &str) -> PathBuf {
    registry.dir.path().join(format!("docker/registry/v2/repositories/{name}/{kind}"))
}

/// Pieces that are noted, of a few: the session with the notes has four bytes for each, and that of a piece 32 to begin with.
fn noted(registry: &Registry, name: &str) -> u64 {
    let sessions = std::fs::read_dir(directory(registry, name, "_uploads")).into_iter().flatten().flatten();
    let states = sessions.flat_map(|session| std::fs::read_dir(session.path().join("hashstates/sha256")));
    let offsets = states.flatten().flatten();
    let offsets = offsets.filter_map(|state| state.file_name().to_str()?.parse::<u64>().ok());
    offsets.filter(|offset| *offset < 32).max().unwrap_or(0) / 4
}

/// Digests of the blobs that the repository has.
fn blobs(registry: &Registry, name: &str) -> Vec<String> {
    let layers = std::fs::read_dir(directory(registry, name, "_layers/sha256")).into_iter().flatten();
    let linked = layers.flatten().filter(|entry| entry.path().join("link").exists());
    linked.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

/// Runs an import until so many pieces are kept, and drops it, as a signal would.
async fn break_off(registry: &Registry, request: &ImportRequest, pieces: u64) {
    let progress = Arc::new(Progress::default());
    let running = tokio::spawn(import(request.clone(), progress.clone()));
    let deadline = Instant::now() + Duration::from_secs(120);
    let name = request.destination.repository();
    while noted(registry, name) < pieces {
        assert!(
            Instant::now() < deadline && !running.is_finished(),
            "{name}: {} bytes came",
            progress.done()
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    progress.cancel();
    assert_eq!(running.await.unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!((registry.sessions(name), blobs(registry, name).len()), (1, pieces as usize), "{name}");
    assert_eq!(registry.repository(name).manifest_digest("latest").await.unwrap(), None);
}

/// The same source by an import that nothing disturbs: the digest, and how many blobs there are then.
async fn undisturbed(registry: &Registry, url: &str) -> (String, usize) {
    let name = format!("undisturbed-{}", sha256(url.as_bytes()).replace("sha256:", ""));
    let mut request = import_request(url, &registry.reference(&name));
    request.keep_after = Duration::MAX;
    let summary = run_import(&request).await.unwrap_or_else(|e| panic!("{}", chain(&e)));
    (summary.digest, blobs(registry, &name).len())
}

async fn assert_is(registry: &Registry, name: &str, dir: &Path, raw: &[u8]) {
    let target = dir.join(format!("{name}.raw"));
    populate_one(&registry.reference(name), &target).await.unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert!(std::fs::read(&target).unwrap() == raw, "{name}");
}

fn sha256(bytes: &[u8]) -> String {
    digest::sha256(bytes).unwrap().to_string()
}

/// A disk of 40 MiB of noise, and the qcow2 file of it.
fn noise_disk(files: &Files, seed: u64) -> Vec<u8> {
    let raw = noise(40 * MIB, seed);
    std::fs::write(files.path("disk.raw"), &raw).unwrap();
    files.qcow2(&[]);
    raw
}

/// A gz of a qcow2 of noise, on a server; the request keeps it from the beginning.
async fn gz(registry: &Registry, files: &Files, name: &str) -> (Web, Vec<u8>, Vec<u8>, ImportRequest) {
    let raw = noise_disk(files, 5);
    let body = std::fs::read(files.wrap(&files.path("disk.qcow2"), "gz")).unwrap();
    let web = Web::serve(Serving { stall_after: Some(STALLED_AT), ..Serving::new(body.clone()) }).await;
    let mut request = import_request(&web.url("disk.qcow2.gz"), &registry.reference(name));
    request.keep_after = Duration::ZERO;
    (web, body, raw, request)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_decoded_or_encoded_goes_on_behind_what_was_kept_of_it() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let raw = noise_disk(&files, 3);
    let (disk, qcow2) = (files.path("disk.raw"), files.path("disk.qcow2"));
    for (name, source) in [
        ("gz", files.wrap(&qcow2, "gz")),
        ("xz", files.wrap(&qcow2, "xz")),
        ("raw", disk.clone()),
        ("raw-gz", files.wrap(&disk, "gz")),
    ] {
        let body = std::fs::read(&source).unwrap();
        let file_name = source.file_name().unwrap().to_str().unwrap();
        let web = Web::serve(Serving { stall_after: Some(STALLED_AT), ..Serving::new(body.clone()) }).await;
        let mut request = import_request(&web.url(file_name), &registry.reference(name));
        request.keep_after = Duration::ZERO;
        break_off(&registry, &request, 2).await;

        web.now(Serving::new(body.clone()));
        web.requests.lock().unwrap().clear();
        // Over what both imports brought.
        request.checksums = vec![sha256(&body).parse().unwrap()];
        let summary = run_import(&request).await.unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
        assert_eq!(summary.resumed_bytes, 2 * PIECE_BYTES, "{name}");
        assert_eq!(summary.source_size, body.len() as u64);
        let again = web.requests.lock().unwrap().clone();
        for asked in &again {
            let asked = asked.to_ascii_lowercase();
            let range = asked.split_once("range: bytes=").unwrap_or_else(|| panic!("{asked}")).1;
            let begin: u64 = range.split('-').next().unwrap().parse().unwrap();
            assert!(begin >= 2 * PIECE_BYTES, "{name}: {asked}");
        }
        let (digest, blobs_left) = undisturbed(&registry, &web.url(file_name)).await;
        assert_eq!(summary.digest, digest, "{name}");
        assert_eq!((registry.sessions(name), blobs(&registry, name).len()), (0, blobs_left), "{name}");
        assert_is(&registry, name, files.dir.path(), &raw).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_changed_begins_anew_and_nothing_of_the_old_one_is_left() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let (web, _, _, request) = gz(&registry, &files, "a").await;
    break_off(&registry, &request, 2).await;
    let raw = noise_disk(&files, 6);
    std::fs::remove_file(files.path("disk.qcow2.gz")).unwrap();
    let body = std::fs::read(files.wrap(&files.path("disk.qcow2"), "gz")).unwrap();
    web.now(Serving { etag: "\"v2\"", ..Serving::new(body) });
    let summary = run_import(&request).await.unwrap_or_else(|e| panic!("{}", chain(&e)));
    let (digest, blobs_left) = undisturbed(&registry, &web.url("disk.qcow2.gz")).await;
    assert_eq!((summary.resumed_bytes, summary.digest), (0, digest));
    assert_eq!((registry.sessions("a"), blobs(&registry, "a").len()), (0, blobs_left));
    assert_is(&registry, "a", files.dir.path(), &raw).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_piece_that_is_gone_or_damaged_makes_the_import_begin_anew() {
    let (registry, files) = (Registry::ours().await, Files::new());
    for (name, is_damaged) in [("gone", false), ("damaged", true)] {
        let _ = std::fs::remove_file(files.path("disk.qcow2.gz"));
        let (web, body, raw, request) = gz(&registry, &files, name).await;
        break_off(&registry, &request, 2).await;
        let piece = blobs(&registry, name).remove(1);
        match is_damaged {
            true => {
                let data = format!("docker/registry/v2/blobs/sha256/{}/{piece}/data", &piece[..2]);
                let file = std::fs::File::options().write(true).open(registry.dir.path().join(data)).unwrap();
                file.write_all_at(b"somewhere in the middle", 9 * MIB as u64).unwrap();
            }
            false => {
                let digest = digest::parse(&format!("sha256:{piece}")).unwrap();
                registry.repository(name).delete_blob(&digest).await.unwrap();
            }
        }
        web.now(Serving::new(body));
        let summary = run_import(&request).await.unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
        let (digest, blobs_left) = undisturbed(&registry, &web.url("disk.qcow2.gz")).await;
        assert_eq!((summary.resumed_bytes, summary.digest), (0, digest), "{name}");
        assert_eq!((registry.sessions(name), blobs(&registry, name).len()), (0, blobs_left), "{name}");
        assert_is(&registry, name, files.dir.path(), &raw).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_checksum_is_found_across_both_imports_and_leaves_nothing() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let (web, body, _, mut request) = gz(&registry, &files, "a").await;
    break_off(&registry, &request, 2).await;
    web.now(Serving::new(body.clone()));
    request.checksums = vec![format!("sha256:{}", "0".repeat(64)).parse().unwrap()];
    let error = run_import(&request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Checksum, "{}", chain(&error));
    assert!(error.to_string().contains(&sha256(&body)), "{error}");
    assert_eq!((registry.sessions("a"), blobs(&registry, "a")), (0, Vec::new()));
}

/// As an import leaves it whose source became slow behind its first chunk.
#[tokio::test(flavor = "multi_thread")]
async fn what_came_before_the_first_piece_is_read_from_the_source_again() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let (web, body, raw, request) = gz(&registry, &files, "a").await;
    web.now(Serving::new(body.clone()));
    let (repository, from) = (registry.repository("a"), 8 * MIB);
    let mut piece = repository.start_blob().await.unwrap();
    piece.push(Bytes::from(vec![7; 32])).await.unwrap();
    piece.push(body[from..from + PIECE_BYTES as usize].to_vec().into()).await.unwrap();
    let (digest, _) = piece.finish().await.unwrap();
    let hex = digest.as_ref().strip_prefix("sha256:").unwrap();
    let hex = (0..32).map(|n| u8::from_str_radix(&hex[2 * n..][..2], 16).unwrap()).collect::<Vec<_>>();
    let note = serde_json::json!({
        "version": 2, "kind": "pieces", "validator": format!("{} \"v1\"", body.len()),
        "from": from, "piece_bytes": PIECE_BYTES, "pieces": BASE64_URL_SAFE_NO_PAD.encode(hex),
    });
    let source = format!("{}\0{}", request.destination.target(), web.url("disk.qcow2.gz"));
    let name = sha256(source.as_bytes()).replace("sha256:", "import-");
    let (mut session, _) = repository.return_to_upload(&name, None).await.unwrap();
    session.leave_note(BASE64_URL_SAFE_NO_PAD.encode(note.to_string()));
    session.append(Bytes::from_static(b"note")).await.unwrap();
    drop(session);

    let summary = run_import(&request).await.unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(summary.resumed_bytes, PIECE_BYTES);
    let asked = web.requests.lock().unwrap().concat().to_ascii_lowercase();
    assert!(asked.contains("range: bytes=25165824-"), "{asked}");
    let (digest, blobs_left) = undisturbed(&registry, &web.url("disk.qcow2.gz")).await;
    assert_eq!(summary.digest, digest);
    assert_eq!((registry.sessions("a"), blobs(&registry, "a").len()), (0, blobs_left));
    assert_is(&registry, "a", files.dir.path(), &raw).await;
}

/// Imports to where there is room for so many MiB, keeping from the beginning; returns how many times that was.
async fn with_quota(files: &Files, source: &Path, raw: &[u8], mib: u64) -> usize {
    let registry = Registry::with(|dir| {
        let mut config = common::registry_config(dir);
        config.limits.quotas = vec![format!("q/={}", mib << 20).parse().unwrap()];
        config
    })
    .await;
    let web = Web::serve(Serving::new(std::fs::read(source).unwrap())).await;
    let mut request = import_request(&web.url("disk.qcow2.gz"), &registry.reference("q/a"));
    request.keep_after = Duration::ZERO;
    let summary = run_import(&request).await.unwrap_or_else(|e| panic!("{mib}: {}", chain(&e)));
    assert_eq!(summary.resumed_bytes, 0);
    assert_eq!(registry.sessions("q/a"), 0);
    let target = files.path(&format!("{mib}.raw"));
    populate_one(&registry.reference("q/a"), &target).await.unwrap();
    assert!(std::fs::read(&target).unwrap() == raw, "{mib}");
    let requests = web.requests.lock().unwrap();
    requests.iter().filter(|asked| !asked.to_ascii_lowercase().contains("range: bytes=")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_kept_where_there_is_no_room_for_it() {
    let files = Files::new();
    let raw = noise_disk(&files, 8);
    let source = files.wrap(&files.path("disk.qcow2"), "gz");
    // What is staged and the layer take 80 MiB.
    assert_eq!(with_quota(&files, &source, &raw, 90).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_is_given_up_when_the_import_needs_its_room() {
    let files = Files::new();
    // Compresses to a little more than half, so that room for three of the source is not enough for all.
    let raw: Vec<u8> = noise(64 * MIB, 9).iter().map(|byte| byte & 0x0f).collect();
    std::fs::write(files.path("disk.raw"), &raw).unwrap();
    let source = files.wrap(&files.qcow2(&[]), "gz");
    let mib = source.metadata().unwrap().len() / MIB as u64;
    assert!((32..44).contains(&mib), "{mib} MiB");
    // What is staged and the layer take 128 MiB.
    assert_eq!(with_quota(&files, &source, &raw, 140).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_kept_of_what_comes_quickly_or_where_sessions_have_no_names() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let (web, _, _, mut request) = gz(&registry, &files, "quick").await;
    request.keep_after = Duration::from_secs(1 << 30);
    for (registry, keep_after) in
        [(registry, Duration::from_secs(1 << 30)), (Registry::debian(), Duration::ZERO)]
    {
        request.destination = registry.reference("a").parse().unwrap();
        request.keep_after = keep_after;
        let progress = Arc::new(Progress::default());
        let running = tokio::spawn(import(request.clone(), progress.clone()));
        while progress.done() < STALLED_AT as u64 {
            assert!(!running.is_finished());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        progress.cancel();
        assert!(running.await.unwrap().is_err());
        assert_eq!(blobs(&registry, "a"), Vec::<String>::new());
    }
    drop(web);
}
