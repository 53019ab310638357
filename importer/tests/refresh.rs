//! Imports that are asked for again and again: nothing is done for what has not changed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

mod common;

use std::sync::Arc;

use common::{Files, Registry, Serving, Web, chain, import_one, import_request, path};
use dvcr_converter::progress::Progress;
use dvcr_importer::{ErrorKind, ImportSummary, Outcome, import};

async fn refresh(source: &str, destination: &str) -> ImportSummary {
    refresh_with(source, destination, &[]).await
}

async fn refresh_with(source: &str, destination: &str, checksums: &[&str]) -> ImportSummary {
    let mut request = import_request(source, destination);
    request.if_changed = true;
    request.checksums = checksums.iter().map(|text| text.parse().unwrap()).collect();
    import(request, Arc::new(Progress::default())).await.unwrap_or_else(|e| panic!("{source}: {}", chain(&e)))
}

#[tokio::test(flavor = "multi_thread")]
async fn only_new_content_makes_a_new_image() {
    let files = Files::new();
    let disk = files.path("disk.raw");
    for registry in [Registry::ours().await, Registry::debian()] {
        let (source, tag) = (path(&disk), registry.reference("vi/disk:12"));
        std::fs::write(&disk, &files.raw).unwrap();
        let first = refresh(source, &tag).await;
        assert_eq!(first.outcome, Outcome::Imported);
        // The note changes nothing about the image.
        assert_eq!(import_one(source, &registry.reference("other")).await.unwrap().digest, first.digest);

        let second = refresh(source, &tag).await;
        assert_eq!((second.outcome, second.source_size), (Outcome::Unchanged, 0));
        assert_eq!((&second.digest, &second.file_name), (&first.digest, &first.file_name));
        assert_eq!((second.virtual_size, second.stored_size), (first.virtual_size, first.stored_size));

        // The same bytes, written again.
        std::fs::remove_file(&disk).unwrap();
        std::fs::write(&disk, &files.raw).unwrap();
        let third = refresh(source, &tag).await;
        assert_eq!((third.outcome, &third.digest), (Outcome::SameContent, &first.digest));
        assert_eq!(refresh(source, &tag).await.outcome, Outcome::Unchanged);

        let mut raw = files.raw.clone();
        raw[0] ^= 1;
        std::fs::write(&disk, raw).unwrap();
        let fourth = refresh(source, &tag).await;
        assert_eq!(fourth.outcome, Outcome::Imported);
        assert_ne!(fourth.digest, first.digest);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_validator_of_http_decides_with_ranges_and_without() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let qcow2 = std::fs::read(files.qcow2(&[])).unwrap();
    for (name, ranges) in [("ranges", true), ("none", false)] {
        // The etag goes with the ranges in this server.
        let web = Web::serve(Serving { ranges, ..Serving::new(qcow2.clone()) }).await;
        let (url, tag) = (web.url("disk.qcow2?token=s3cret"), registry.reference(name));
        let first = refresh(&url, &tag).await;
        assert_eq!(first.outcome, Outcome::Imported);
        let again = refresh(&url, &tag).await;
        let expected = if ranges { Outcome::Unchanged } else { Outcome::SameContent };
        assert_eq!((again.outcome, &again.digest), (expected, &first.digest));
    }
    // Another address is another source, whatever its validators.
    let (web, tag) = (Web::serve(Serving::new(qcow2)).await, registry.reference("address"));
    refresh(&web.url("a/disk.qcow2"), &tag).await;
    assert_eq!(refresh(&web.url("b/disk.qcow2"), &tag).await.outcome, Outcome::SameContent);
    assert_eq!(refresh(&web.url("b/disk.qcow2"), &tag).await.outcome, Outcome::Unchanged);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_somebody_else_gave_is_imported_again() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let (raw, qcow2) = (files.path("disk.raw"), files.qcow2(&["-c"]));
    let tag = registry.reference("a:1");
    let first = refresh(path(&raw), &tag).await;
    import_one(path(&qcow2), &tag).await.unwrap();
    let again = refresh(path(&raw), &tag).await;
    assert_eq!((again.outcome, again.digest), (Outcome::Imported, first.digest));
    let repository = registry.repository("a");
    assert!(repository.manifest_digest("1.source").await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_checksum_is_not_passed_over() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let (raw, tag) = (files.path("disk.raw"), registry.reference("a"));
    refresh(path(&raw), &tag).await;
    let sum = String::from_utf8(common::run("md5sum", &[path(&raw)])).unwrap();
    let sum = format!("md5:{}", &sum[..32]);
    assert_eq!(refresh_with(path(&raw), &tag, &[&sum]).await.outcome, Outcome::SameContent);
    assert_eq!(refresh_with(path(&raw), &tag, &[&sum]).await.outcome, Outcome::Unchanged);
    let mut request = import_request(path(&raw), &tag);
    request.if_changed = true;
    request.checksums = vec![format!("md5:{}", "0".repeat(32)).parse().unwrap()];
    let error = import(request, Arc::new(Progress::default())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Checksum);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_a_registry_is_known_by_its_digest() {
    let (theirs, ours, files) = (Registry::debian(), Registry::ours().await, Files::new());
    let source = format!("docker://{}", theirs.reference("a"));
    import_one(path(&files.path("disk.raw")), &theirs.reference("a")).await.unwrap();
    let tag = ours.reference("a");
    assert_eq!(refresh(&source, &tag).await.outcome, Outcome::Copied);
    assert_eq!(refresh(&source, &tag).await.outcome, Outcome::Unchanged);
    import_one(path(&files.qcow2(&[])), &theirs.reference("a")).await.unwrap();
    assert_eq!(refresh(&source, &tag).await.outcome, Outcome::Copied);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_too_long_for_its_note_is_refused() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let mut request =
        import_request(path(&files.path("disk.raw")), &registry.reference(&format!("a:{}", "x".repeat(122))));
    request.if_changed = true;
    let error = import(request, Arc::new(Progress::default())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}
