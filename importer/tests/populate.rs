//! Disks out of images that others made: any layer, any compression, any order of clusters.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

mod common;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use common::{Files, MIB, Registry, chain, import_one, path, populate_one, populate_request, run};
use dvcr_converter::progress::Progress;
use dvcr_image::{Repository, media_type};
use dvcr_importer::{ErrorKind, TargetFormat, populate};
use serde_json::json;

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// A layer by GNU tar with one file below `disk/`.
fn layer(dir: &Path, file: &Path) -> Vec<u8> {
    let tree = tempfile::tempdir_in(dir).unwrap();
    std::fs::create_dir(tree.path().join("disk")).unwrap();
    std::fs::copy(file, tree.path().join("disk").join(file.file_name().unwrap())).unwrap();
    run("tar", &["-C", path(tree.path()), "-cf", "-", "disk"])
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

async fn push_image(repository: &Repository, layer_type: &str, layer: Vec<u8>) {
    let config =
        b"{\"architecture\":\"amd64\",\"os\":\"linux\",\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[]}}";
    let config_digest = repository.push_blob(config.to_vec().into()).await.unwrap();
    let size = layer.len();
    let digest = repository.push_blob(layer.into()).await.unwrap();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media_type::OCI_MANIFEST,
        "config": {"mediaType": media_type::OCI_CONFIG, "digest": config_digest.to_string(), "size": config.len()},
        "layers": [{"mediaType": layer_type, "digest": digest.to_string(), "size": size}],
    });
    let manifest = serde_json::to_vec(&manifest).unwrap();
    repository.put_manifest("latest", manifest.into(), media_type::OCI_MANIFEST).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn container_disks_of_others_become_the_same_disk() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let raw = files.path("disk.raw");
    let qcow2 = files.qcow2(&["-c"]);
    let wrapped = [files.wrap(&raw, "gz"), files.wrap(&qcow2, "xz")];
    let mut n = 0;
    for file in [&raw, &qcow2, &wrapped[0], &wrapped[1]] {
        let tar = layer(files.dir.path(), file);
        let zstd = zstd::encode_all(&tar[..], 1).unwrap();
        for (layer_type, layer) in [(media_type::OCI_LAYER, tar.clone()), (GZIP, gzip(&tar)), (ZSTD, zstd)] {
            n += 1;
            let name = format!("disk{n}");
            push_image(&registry.repository(&name), layer_type, layer).await;
            let target = files.path("out.raw");
            let case = format!("{} in {layer_type}", file.display());
            let done = populate_one(&registry.reference(&name), &target).await;
            let done = done.unwrap_or_else(|e| panic!("{case}: {}", chain(&e)));
            assert_eq!(done.virtual_size, files.raw.len() as u64, "{case}");
            assert!(std::fs::read(&target).unwrap() == files.raw, "{case}");
            // And into our own layout.
            let imported = registry.reference(&format!("{name}-imported"));
            import_one(&format!("docker://{}", registry.reference(&name)), &imported)
                .await
                .unwrap_or_else(|e| panic!("{case}: {}", chain(&e)));
            populate_one(&imported, &target).await.unwrap();
            assert!(std::fs::read(&target).unwrap() == files.raw, "{case}, imported");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_grows_but_never_shrinks() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let reference = registry.reference("a");
    import_one(path(&files.qcow2(&[])), &reference).await.unwrap();
    let gz = layer(files.dir.path(), &files.wrap(&files.path("disk.raw"), "gz"));
    push_image(&registry.repository("gz"), GZIP, gzip(&gz)).await;
    let len = files.raw.len() as u64;
    for (reference, form) in [
        (&reference, TargetFormat::Raw),
        (&reference, TargetFormat::Qcow2),
        (&registry.reference("gz"), TargetFormat::Raw),
        (&registry.reference("gz"), TargetFormat::Qcow2),
    ] {
        let case = format!("{reference} as {form}");
        let target = files.path("grown");
        let mut request = populate_request(reference, &target);
        (request.format, request.size) = (form, Some(len + 7 * MIB as u64));
        let done = populate(request.clone(), Arc::new(Progress::default())).await;
        let done = done.unwrap_or_else(|e| panic!("{case}: {}", chain(&e)));
        assert_eq!(done.virtual_size, len + 7 * MIB as u64);
        let plain = files.path("plain.raw");
        run("qemu-img", &["convert", "-f", &form.to_string(), "-O", "raw", path(&target), path(&plain)]);
        let grown = std::fs::read(&plain).unwrap();
        assert_eq!(grown.len() as u64, len + 7 * MIB as u64, "{case}");
        assert!(
            grown[..files.raw.len()] == files.raw && grown[files.raw.len()..].iter().all(|b| *b == 0),
            "{case}"
        );

        std::fs::remove_file(&target).unwrap();
        request.size = Some(len - 512);
        let error = populate(request, Arc::new(Progress::default())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge, "{case}");
        let text = chain(&error);
        assert!(text.contains(&len.to_string()) && text.contains(&(len - 512).to_string()), "{text}");
        assert!(!target.exists(), "{case}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_size_is_rounded_up_to_whole_sectors() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let reference = registry.reference("a");
    import_one(path(&files.qcow2(&[])), &reference).await.unwrap();
    let gz = layer(files.dir.path(), &files.wrap(&files.path("disk.raw"), "gz"));
    push_image(&registry.repository("gz"), GZIP, gzip(&gz)).await;
    let rounded = files.raw.len() as u64 + 1024;
    for reference in [reference, registry.reference("gz")] {
        for form in [TargetFormat::Raw, TargetFormat::Qcow2] {
            let mut request = populate_request(&reference, &files.path("out"));
            (request.format, request.size) = (form, Some(rounded - 511));
            let done = populate(request.clone(), Arc::new(Progress::default())).await;
            let done = done.unwrap_or_else(|e| panic!("{reference} as {form}: {}", chain(&e)));
            assert_eq!(done.virtual_size, rounded, "{reference} as {form}");
            request.size = Some(u64::MAX);
            let error = populate(request, Arc::new(Progress::default())).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Target);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_compressed_layer_leaves_no_target() {
    let (registry, files) = (Registry::ours().await, Files::new());
    for (name, file) in [("raw", files.path("disk.raw")), ("qcow2", files.qcow2(&[]))] {
        let mut damaged = gzip(&layer(files.dir.path(), &file));
        // In the trailer: the data decodes, its checksum does not fit.
        let at = damaged.len() - 6;
        damaged[at] ^= 1;
        push_image(&registry.repository(name), GZIP, damaged).await;
        let target = files.path("out.raw");
        let error = populate_one(&registry.reference(name), &target).await.unwrap_err();
        assert!(!target.exists(), "{}", chain(&error));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_image_is_named() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let error = populate_one(&registry.reference("absent:v1"), &files.path("out")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Registry);
    assert!(error.to_string().contains("absent:v1"), "{}", chain(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_populate_leaves_no_target() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let reference = registry.reference("a");
    import_one(path(&files.qcow2(&[])), &reference).await.unwrap();
    let progress = Arc::new(Progress::default());
    progress.cancel();
    let error = populate(populate_request(&reference, &files.path("out.raw")), progress).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert!(!files.path("out.raw").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn vdi_and_vhd_become_the_same_disk_and_a_fixed_vhd_without_its_footer() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let mut images = Vec::new();
    for (format, options, name) in [
        ("vdi", "static=off", "disk.vdi"),
        ("vpc", "subformat=dynamic,force_size=on", "dynamic.vhd"),
        ("vpc", "subformat=fixed,force_size=on", "fixed.vhd"),
    ] {
        let (raw, image) = (files.path("disk.raw"), files.path(name));
        run("qemu-img", &["convert", "-O", format, "-o", options, path(&raw), path(&image)]);
        images.push(files.wrap(&image, "gz"));
        images.push(image);
    }
    for (n, image) in images.iter().enumerate() {
        let tar = layer(files.dir.path(), image);
        push_image(&registry.repository(&format!("plain{n}")), media_type::OCI_LAYER, tar.clone()).await;
        push_image(&registry.repository(&format!("gz{n}")), GZIP, gzip(&tar)).await;
        import_one(path(image), &registry.reference(&format!("import{n}"))).await.unwrap();
        for name in ["plain", "gz", "import"] {
            let target = files.path("out.raw");
            let case = format!("{} by {name}", image.display());
            let done = populate_one(&registry.reference(&format!("{name}{n}")), &target).await;
            let done = done.unwrap_or_else(|e| panic!("{case}: {}", chain(&e)));
            assert_eq!(done.virtual_size, files.raw.len() as u64, "{case}");
            assert!(std::fs::read(&target).unwrap() == files.raw, "{case}");
        }
    }
}
