//! Imports: what comes out of a populated disk is what `qemu-img` makes of the source, and what goes wrong publishes
//! nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{
    Files, MIB, Registry, Serving, Web, chain, import_one, import_request, noise, path, populate_one, run,
};
use dvcr_converter::progress::Progress;
use dvcr_image::layout::{LABEL_FORMAT, LABEL_VIRTUAL_SIZE};
use dvcr_importer::{ErrorKind, ImportSummary, import};

/// What every import test looks at in the end: the disk, and that nothing else stayed behind.
async fn assert_holds(registry: &Registry, name: &str, raw: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out.raw");
    populate_one(&registry.reference(name), &target)
        .await
        .unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
    assert!(std::fs::read(&target).unwrap() == raw, "{name}: the disk differs");
    // A configuration, the layer of the disk and that of its index; what was staged is gone.
    assert_eq!(registry.layers(name), 3, "{name}");
}

async fn round_trips(registry: Registry) {
    let files = Files::new();
    let raw_path = files.path("disk.raw");
    let qcow2_path = files.qcow2(&[]);
    let mut sources = vec![(raw_path.clone(), "disk.qcow2", true), (qcow2_path.clone(), "disk.qcow2", false)];
    for extension in ["gz", "xz", "zst", "bz2", "lz4"] {
        sources.push((files.wrap(&raw_path, extension), "disk.qcow2", true));
    }
    sources.push((files.wrap(&qcow2_path, "xz"), "disk.qcow2", false));
    let mut digests = Vec::new();
    for (n, (source, file_name, re_encoded)) in sources.iter().enumerate() {
        let name = format!("a/n{n}");
        let done = import_one(path(source), &registry.reference(&name)).await;
        let done = done.unwrap_or_else(|e| panic!("{}: {}", source.display(), chain(&e)));
        assert_eq!((done.format.as_str(), done.file_name.as_str()), ("qcow2", *file_name));
        assert_eq!(done.virtual_size, files.raw.len() as u64);
        assert_eq!(done.source_size, std::fs::metadata(source).unwrap().len());
        assert!(done.stored_size < 20 << 20, "zeros are not stored: {done:?}");
        assert_holds(&registry, &name, &files.raw).await;
        digests.push((*re_encoded, done.digest));
    }
    // However the disk came, the same disk makes the same image.
    for kind in [true, false] {
        let mut same = digests.iter().filter(|(re_encoded, _)| *re_encoded == kind).map(|(_, digest)| digest);
        let first = same.next().unwrap();
        assert!(same.all(|digest| digest == first), "{digests:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_source_makes_the_same_disk_in_our_registry() {
    round_trips(Registry::ours().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_source_makes_the_same_disk_in_debians_registry() {
    round_trips(Registry::debian()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qcow2_and_iso_are_stored_byte_for_byte() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let qcow2 = files.qcow2(&["-c", "-o", "cluster_size=4k"]);
    std::fs::create_dir(files.path("tree")).unwrap();
    std::fs::write(files.path("tree/readme"), noise(3 * MIB, 3)).unwrap();
    let iso = files.path("medium.iso");
    run("xorriso", &["-as", "mkisofs", "-quiet", "-r", "-o", path(&iso), path(&files.path("tree"))]);
    for (source, format) in [(&qcow2, "qcow2"), (&iso, "iso")] {
        let web = Web::serve(Serving::new(std::fs::read(source).unwrap())).await;
        let file_name = source.file_name().unwrap().to_str().unwrap();
        let done = import_one(&web.url(&format!("images/{file_name}?x=1")), &registry.reference(format))
            .await
            .unwrap();
        assert_eq!((done.format.as_str(), done.file_name.as_str()), (format, file_name));
        let oci = files.path(&format!("{format}-oci"));
        let reference = format!("docker://{}", registry.reference(format));
        let inspected = run("skopeo", &["inspect", "--config", "--tls-verify=false", &reference]);
        let config: serde_json::Value = serde_json::from_slice(&inspected).unwrap();
        assert_eq!(config["config"]["Labels"][LABEL_FORMAT], format);
        run(
            "skopeo",
            &["copy", "-q", "--src-tls-verify=false", &reference, &format!("oci:{}:x", path(&oci))],
        );
        let bundle = files.path(&format!("{format}-bundle"));
        run("umoci", &["unpack", "--rootless", "--image", &format!("{}:x", path(&oci)), path(&bundle)]);
        let stored = std::fs::read(bundle.join("rootfs/disk").join(file_name)).unwrap();
        assert!(stored == std::fs::read(source).unwrap(), "{format}");
    }
    assert_holds(&registry, "iso", &std::fs::read(&iso).unwrap()).await;
}

/// The metadata of a VHDX file may lie anywhere in it.
#[tokio::test(flavor = "multi_thread")]
async fn a_vhdx_image_is_labelled_with_the_size_of_its_disk() {
    let files = Files::new();
    let source = files.path("disk.vhdx");
    run("qemu-img", &["convert", "-O", "vhdx", path(&files.path("disk.raw")), path(&source)]);
    let sources = [("plain", source.clone()), ("wrapped", files.wrap(&source, "gz"))];
    for registry in [Registry::ours().await, Registry::debian()] {
        for (name, source) in &sources {
            let done = import_one(path(source), &registry.reference(name)).await.unwrap();
            assert_eq!((done.format.as_str(), done.file_name.as_str()), ("vhdx", "disk.vhdx"));
            assert_eq!(done.virtual_size, files.raw.len() as u64);
            let reference = format!("docker://{}", registry.reference(name));
            let inspected = run("skopeo", &["inspect", "--config", "--tls-verify=false", &reference]);
            let config: serde_json::Value = serde_json::from_slice(&inspected).unwrap();
            assert_eq!(config["config"]["Labels"][LABEL_VIRTUAL_SIZE], files.raw.len().to_string());
            assert_holds(&registry, name, &files.raw).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_image_whose_size_is_not_at_its_beginning_is_not_published() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let source = files.path("disk.vhdx");
    run("qemu-img", &["create", "-q", "-f", "vhdx", path(&source), "64M"]);
    let mut bytes = std::fs::read(&source).unwrap();
    // Both region tables.
    bytes[192 << 10] = 0;
    bytes[256 << 10] = 0;
    std::fs::write(&source, bytes).unwrap();
    let error = import_one(path(&source), &registry.reference("a")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Image, "{}", chain(&error));
    assert!(chain(&error).contains("region table"), "{}", chain(&error));
    assert!(registry.repository("a").image("latest").await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn http_without_a_length_and_with_cut_connections_brings_the_same_disk() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let qcow2 = std::fs::read(files.qcow2(&[])).unwrap();
    let plain = Serving::new(qcow2.clone());
    let cases = [
        ("plain", plain.clone()),
        ("chunked", Serving { chunked: true, ..plain.clone() }),
        ("cut", Serving { cut_after: Some(5 * MIB), ..plain.clone() }),
        ("no-ranges", Serving { ranges: false, ..plain }),
    ];
    let mut digests: Vec<String> = Vec::new();
    for (name, serving) in cases {
        let web = Web::serve(serving).await;
        let done: ImportSummary = import_one(&web.url("disk.qcow2"), &registry.reference(name))
            .await
            .unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
        assert_eq!(done.source_size, qcow2.len() as u64);
        assert_holds(&registry, name, &files.raw).await;
        if name == "cut" {
            assert_eq!(web.connections() as usize, qcow2.len().div_ceil(5 * MIB));
        }
        digests.push(done.digest);
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_wrong_at_the_source_publishes_nothing_and_says_why() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let plain = Serving::new(std::fs::read(files.qcow2(&[])).unwrap());
    let html = Serving::new(b"\n<!DOCTYPE html><html><body>Not here</body></html>".to_vec());
    let foreign = {
        run("qemu-img", &["create", "-q", "-f", "qed", path(&files.path("x.qed")), "10M"]);
        Serving::new(std::fs::read(files.path("x.qed")).unwrap())
    };
    let backed = {
        let made = files.path("b.qcow2");
        files.qcow2(&[]);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", path(&made)]);
        Serving::new(std::fs::read(files.path("b.qcow2")).unwrap())
    };
    let cut_gz = {
        let mut bytes = std::fs::read(files.wrap(&files.path("disk.raw"), "gz")).unwrap();
        bytes.truncate(bytes.len() / 2);
        Serving::new(bytes)
    };
    let cases = [
        (
            "too-short",
            Serving { length_error: 10, ranges: false, ..plain.clone() },
            ErrorKind::Source,
            "broke off",
        ),
        (
            "cut-no-ranges",
            Serving { cut_after: Some(MIB), ranges: false, ..plain.clone() },
            ErrorKind::Source,
            "broke off",
        ),
        (
            "changed-between-ranges",
            Serving { cut_after: Some(MIB), etag_of_ranges: Some("\"v2\""), ..plain.clone() },
            ErrorKind::Changed,
            "changed",
        ),
        ("not-found", Serving { status: Some("404 Not Found"), ..plain.clone() }, ErrorKind::Source, "404"),
        ("empty", Serving::new(Vec::new()), ErrorKind::Source, "empty"),
        ("empty-chunked", Serving { chunked: true, ..Serving::new(Vec::new()) }, ErrorKind::Source, "empty"),
        ("html", Serving { content_type: "text/html; charset=utf-8", ..html }, ErrorKind::Source, "web page"),
        ("foreign", foreign, ErrorKind::Image, "qed"),
        ("backed", backed, ErrorKind::Image, "backing"),
        ("cut-gz", cut_gz, ErrorKind::Image, "gz"),
    ];
    for (name, serving, kind, part) in cases {
        let web = Web::serve(serving).await;
        let url = format!("http://alice:s3cret@{}/disk.img?token=t0ken", web.address);
        let error = import_one(&url, &registry.reference(name)).await.unwrap_err();
        let text = chain(&error);
        assert_eq!(error.kind(), kind, "{name}: {text}");
        assert!(text.contains(part), "{name}: {text}");
        assert!(!text.contains("s3cret") && !text.contains("t0ken") && !text.contains("alice"), "{text}");
        assert!(web.requests.lock().unwrap()[0].contains("authorization: Basic YWxpY2U6czNjcmV0"), "{name}");
        assert_nothing_left(&registry, name).await;
    }
    let web = Web::serve(plain).await;
    let error = import_one(&web.url("loop?token=t0ken"), &registry.reference("loop")).await.unwrap_err();
    assert!(error.to_string().contains("redirects more than 10 times"), "{}", chain(&error));
    let requests = web.requests.lock().unwrap().clone();
    assert!(requests.iter().all(|request| !request.to_ascii_lowercase().contains("referer")), "{requests:?}");
}

async fn assert_nothing_left(registry: &Registry, name: &str) {
    assert_eq!(registry.repository(name).manifest_digest("latest").await.unwrap(), None, "{name}");
    assert_eq!((registry.sessions(name), registry.layers(name)), (0, 0), "{name}");
}

#[tokio::test(flavor = "multi_thread")]
async fn checksums_are_over_the_bytes_received_and_decide() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let source = files.wrap(&files.path("disk.raw"), "gz");
    let sum = |program: &str| {
        let text = String::from_utf8(run(program, &[path(&source)])).unwrap();
        text.split_whitespace().next().unwrap().to_owned()
    };
    let right = [
        format!("md5:{}", sum("md5sum")),
        format!("sha1:{}", sum("sha1sum")),
        format!("sha256:{}", sum("sha256sum")),
        format!("sha512:{}", sum("sha512sum")),
    ];
    let mut request = import_request(path(&source), &registry.reference("right"));
    request.checksums = right.iter().map(|text| text.parse().unwrap()).collect();
    import(request.clone(), Arc::new(Progress::default())).await.unwrap();

    request.destination = registry.reference("wrong").parse().unwrap();
    request.checksums.push(format!("streebog256:{}", "0".repeat(64)).parse().unwrap());
    let error = import(request, Arc::new(Progress::default())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Checksum);
    assert_nothing_left(&registry, "wrong").await;
    // The straight way ends as clean.
    let mut request = import_request(path(&files.qcow2(&[])), &registry.reference("straight"));
    request.checksums = vec![right[0].parse().unwrap()];
    let error = import(request, Arc::new(Progress::default())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Checksum);
    assert_nothing_left(&registry, "straight").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_import_ends_at_once_and_leaves_nothing_but_what_is_gone_on_with() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let qcow2 = std::fs::read(files.qcow2(&[])).unwrap();
    for (name, chunked) in [("straight", false), ("staged", true)] {
        let web =
            Web::serve(Serving { stall_after: Some(12 * MIB), chunked, ..Serving::new(qcow2.clone()) }).await;
        let progress = Arc::new(Progress::default());
        let running = tokio::spawn(import(
            import_request(&web.url("disk.qcow2"), &registry.reference(name)),
            progress.clone(),
        ));
        let deadline = Instant::now() + Duration::from_secs(60);
        while progress.done() < 12 * MIB as u64 || registry.sessions(name) == 0 {
            assert!(Instant::now() < deadline, "{name}: {} bytes came", progress.done());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let begun = Instant::now();
        progress.cancel();
        let error = running.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        match chunked {
            true => assert_nothing_left(&registry, name).await,
            false => {
                assert_eq!(registry.repository(name).manifest_digest("latest").await.unwrap(), None);
                assert_eq!((registry.sessions(name), registry.layers(name)), (1, 0));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_share_of_progress_never_goes_back_and_ends_at_the_whole() {
    let (registry, files) = (Registry::ours().await, Files::new());
    for (name, source) in [("staged", files.path("disk.raw")), ("straight", files.qcow2(&[]))] {
        let progress = Arc::new(Progress::default());
        let request = import_request(path(&source), &registry.reference(name));
        let running = tokio::spawn(import(request, progress.clone()));
        let mut before = 0.0;
        while !running.is_finished() {
            let (done, total) = (progress.done(), progress.total());
            if total > 0 {
                let share = done as f64 / total as f64;
                assert!(share >= before, "{name}: {share} after {before}");
                before = share;
            }
            tokio::task::yield_now().await;
        }
        running.await.unwrap().unwrap();
        assert_eq!(progress.done(), progress.total(), "{name}");
        assert_eq!(progress.phase(), "commit");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_with_a_digest_is_refused() {
    let registry = Registry::ours().await;
    let digest = format!("sha256:{}", "0".repeat(64));
    let error = import_one("/dev/null", &format!("{}@{digest}", registry.reference("a"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_imported_out_of_another_registry() {
    let (theirs, ours, files) = (Registry::debian(), Registry::ours().await, Files::new());
    let first = import_one(path(&files.path("disk.raw")), &theirs.reference("a")).await.unwrap();
    let source = format!("docker://{}", theirs.reference("a"));
    let second = import_one(&source, &ours.reference("b")).await.unwrap();
    assert_eq!((second.digest, second.file_name), (first.digest, first.file_name));
    assert_holds(&ours, "b", &files.raw).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn staging_never_deletes_a_blob_of_somebody_else() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let qcow2 = files.qcow2(&[]);
    let wrapped = files.wrap(&qcow2, "gz");
    // The stored file without anything around it, as tools for artifacts push it.
    let live = std::fs::read(&qcow2).unwrap();
    let size = live.len() as u64;
    let repository = registry.repository("a");
    let digest = repository.push_blob(live.into()).await.unwrap();
    import_one(path(&wrapped), &registry.reference("a")).await.unwrap();
    assert_eq!(repository.blob_size(&digest).await.unwrap(), Some(size));
    assert_eq!(registry.layers("a"), 4, "the live blob, a configuration and two layers");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_imports_of_one_source_do_not_disturb_each_other() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let wrapped = files.wrap(&files.path("disk.raw"), "gz");
    let (one, other) = (registry.reference("a:one"), registry.reference("a:other"));
    let (one, other) = tokio::join!(import_one(path(&wrapped), &one), import_one(path(&wrapped), &other));
    let (one, other) =
        (one.unwrap_or_else(|e| panic!("{}", chain(&e))), other.unwrap_or_else(|e| panic!("{}", chain(&e))));
    assert_eq!(one.digest, other.digest);
    let target = files.path("out.raw");
    populate_one(&registry.reference("a:one"), &target).await.unwrap();
    assert!(std::fs::read(&target).unwrap() == files.raw);
    assert_eq!(registry.layers("a"), 3, "what was staged is gone");
}
