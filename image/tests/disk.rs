//! Disks in images: what we publish is a proper image, and what others publish is read.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

#[path = "../../client/tests/common/mod.rs"]
mod common;

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use common::{DebianRegistry, noise, open, our_registry, push_image, serve};
use dvcr_converter::format::Format;
use dvcr_converter::io::ReadAt;
use dvcr_converter::limits::Limits;
use dvcr_image::index::{Builder, Index};
use dvcr_image::layout::{self, DiskLabels};
use dvcr_image::{DiskImage, ErrorKind, Repository, digest, media_type, publish, tar};
use serde_json::{Value, json};

fn layer(name: &str, content: &[u8]) -> Vec<u8> {
    let size = content.len() as u64;
    [tar::prefix(name, size).unwrap(), content.to_vec(), tar::suffix(size)].concat()
}

/// A layer made by GNU tar of files given by path.
fn gnu_layer(files: &[(&str, &[u8])]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    for (path, content) in files {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    run(Command::new("tar").args(["-cf", "-", "--sort=name", "."]).current_dir(dir.path()))
}

fn index_of(content: &[u8]) -> Index {
    let mut builder = Builder::new();
    builder.update(content);
    builder.finish().unwrap()
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

async fn read_stream(disk: &DiskImage) -> std::io::Result<Vec<u8>> {
    let disk = disk.clone();
    tokio::task::spawn_blocking(move || {
        let mut all = Vec::new();
        disk.stream()?.read_to_end(&mut all)?;
        Ok(all)
    })
    .await
    .unwrap()
}

async fn read_window(disk: &DiskImage, offset: u64, len: usize) -> Vec<u8> {
    let window = disk.window().unwrap().expect("a plain layer is seekable");
    tokio::task::spawn_blocking(move || {
        let mut buf = vec![0; len];
        window.read_exact_at(&mut buf, offset).unwrap();
        buf
    })
    .await
    .unwrap()
}

async fn locate(repository: &Repository) -> dvcr_image::Result<DiskImage> {
    DiskImage::locate(repository, "latest", &Limits::default()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_is_an_image_that_other_tools_unpack() {
    let registry = DebianRegistry::start(None);
    let repository = open(registry.address, "vi/demo/debian");
    let content = noise(3 << 20, 4);
    let mut blob = repository.start_blob().await.unwrap();
    blob.push(layer("debian.qcow2", &content).into()).await.unwrap();
    let (layer, size) = blob.finish().await.unwrap();
    let labels = DiskLabels { size: content.len() as u64, virtual_size: 10 << 30, format: Format::Qcow2 };
    let index = index_of(&content);
    let manifest = publish(&repository, "latest", &labels, (&layer, size), Some(&index)).await.unwrap();
    let again = publish(&repository, "latest", &labels, (&layer, size), Some(&index)).await.unwrap();
    assert_eq!(again, manifest, "the same disk has the same digest");
    assert_eq!(repository.manifest_digest("latest").await.unwrap(), Some(manifest.clone()));

    let dir = tempfile::tempdir().unwrap();
    let from = format!("docker://{}/vi/demo/debian:latest", registry.address);
    let inspected = run(Command::new("skopeo").args(["inspect", "--tls-verify=false", &from]));
    let inspected: Value = serde_json::from_slice(&inspected).unwrap();
    assert_eq!(inspected["Digest"], json!(manifest.to_string()));
    assert_eq!(inspected["Labels"]["source-image-virtual-size"], json!((10u64 << 30).to_string()));
    assert_eq!(inspected["Labels"]["source-image-size"], json!((3 << 20).to_string()));
    assert_eq!(inspected["Labels"]["source-image-format"], "qcow2");
    assert_eq!(inspected["Labels"]["erofs-compatible-layers"], "true");

    run(Command::new("skopeo")
        .args(["copy", "-q", "--preserve-digests", "--src-tls-verify=false", &from, "oci:oci:x"])
        .current_dir(dir.path()));
    run(Command::new("umoci")
        .args(["unpack", "--rootless", "--image", "oci:x", "bundle"])
        .current_dir(dir.path()));
    assert!(std::fs::read(dir.path().join("bundle/rootfs/disk/debian.qcow2")).unwrap() == content);
    // Two directories, and KubeVirt looks for the only file in the one.
    assert_eq!(std::fs::read_dir(dir.path().join("bundle/rootfs")).unwrap().count(), 2);
    assert_eq!(std::fs::read_dir(dir.path().join("bundle/rootfs/disk")).unwrap().count(), 1);
    assert_eq!(std::fs::read(dir.path().join("bundle/rootfs/dvcr/index")).unwrap(), index.encode());

    let layer_file = dir.path().join("oci/blobs/sha256").join(layer.digest());
    tar_tools_agree(&layer_file, content.len());

    let disk = locate(&repository).await.unwrap();
    assert_eq!((disk.file_name(), disk.size()), ("debian.qcow2", content.len() as u64));
    assert_eq!(disk.manifest(), &manifest);
    assert!(disk.is_indexed());
    assert_eq!(read_window(&disk, 1_234_567, 70_000).await, content[1_234_567..1_304_567]);
    assert!(read_stream(&disk).await.unwrap() == content);
}

fn tar_tools_agree(layer: &Path, size: usize) {
    let listed = String::from_utf8(run(Command::new("tar").arg("-tvf").arg(layer))).unwrap();
    let lines: Vec<_> = listed.lines().collect();
    assert_eq!(lines.len(), 2, "{listed}");
    assert!(lines[0].starts_with("drwxr-xr-x 64535/64535") && lines[0].ends_with("disk/"), "{listed}");
    assert!(
        lines[1].starts_with("-rw-r--r-- 64535/64535") && lines[1].ends_with("disk/debian.qcow2"),
        "{listed}"
    );
    let script =
        "import sys, tarfile; print([(m.name, m.size, m.offset_data) for m in tarfile.open(sys.argv[1])][1])";
    let found = String::from_utf8(run(Command::new("python3").args(["-c", script]).arg(layer))).unwrap();
    assert_eq!(found.trim(), format!("('disk/debian.qcow2', {size}, 65536)"));
}

#[tokio::test(flavor = "multi_thread")]
async fn images_of_others_are_read_whatever_their_layers_are() {
    let dir = tempfile::tempdir().unwrap();
    let address = our_registry(dir.path()).await;
    let content = noise(2_500_000, 5);
    let other = gnu_layer(&[("etc/os-release", b"x"), ("disk.txt", b"no disk")]);
    let long_name = format!("{}.img", "n".repeat(180));
    let long_path = format!("disk/{long_name}");
    let gnu = gnu_layer(&[("disk/downloaded", &content)]);
    let long = gnu_layer(&[("a/first", b"x"), (&long_path, &content)]);
    let zstd = zstd::encode_all(&gnu[..], 1).unwrap();
    const OCI_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    const OCI_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
    const DOCKER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    const DOCKER_TAR: &str = "application/vnd.docker.image.rootfs.diff.tar";
    type Case<'a> = (&'a str, &'a str, Vec<(&'a str, Vec<u8>)>, &'a str, bool);
    let cases: Vec<Case<'_>> = vec![
        (
            "oci-plain",
            media_type::OCI_MANIFEST,
            vec![(media_type::OCI_LAYER, gnu.clone())],
            "downloaded",
            true,
        ),
        ("oci-gzip", media_type::OCI_MANIFEST, vec![(OCI_GZIP, gzip(&gnu))], "downloaded", false),
        ("oci-zstd", media_type::OCI_MANIFEST, vec![(OCI_ZSTD, zstd)], "downloaded", false),
        ("docker-gzip", media_type::DOCKER_MANIFEST, vec![(DOCKER_GZIP, gzip(&gnu))], "downloaded", false),
        ("docker-plain", media_type::DOCKER_MANIFEST, vec![(DOCKER_TAR, gnu.clone())], "downloaded", true),
        (
            "mislabelled",
            media_type::OCI_MANIFEST,
            vec![(media_type::OCI_LAYER, gzip(&gnu))],
            "downloaded",
            false,
        ),
        (
            "several",
            media_type::OCI_MANIFEST,
            vec![
                ("application/vnd.in-toto+json", b"{}".to_vec()),
                (OCI_GZIP, gzip(&other)),
                (media_type::OCI_LAYER, other),
                (media_type::OCI_LAYER, long),
            ],
            &long_name,
            true,
        ),
    ];
    for (name, manifest_type, layers, file_name, seekable) in cases {
        let repository = open(address, name);
        push_image(&repository, manifest_type, &layers).await;
        let disk = locate(&repository).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert_eq!((disk.file_name(), disk.size()), (file_name, content.len() as u64), "{name}");
        assert_eq!(disk.window().unwrap().is_some(), seekable, "{name}");
        assert!(read_stream(&disk).await.unwrap() == content, "{name}");
        if seekable {
            assert!(read_window(&disk, 0, content.len()).await == content, "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_leads_to_the_image_and_an_image_without_a_disk_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let repository = open(our_registry(dir.path()).await, "a");
    let iso = [(media_type::OCI_LAYER, layer("x.iso", b"iso"))];
    let image = push_image(&repository, media_type::OCI_MANIFEST, &iso).await;
    let size = repository.manifest("latest").await.unwrap().bytes.len();
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let index = json!({"schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": [
        {"mediaType": media_type::OCI_MANIFEST, "digest": image.to_string(), "size": size,
         "platform": {"os": "linux", "architecture": arch}},
    ]});
    let index = serde_json::to_vec(&index).unwrap();
    repository.put_manifest("latest", index.into(), media_type::OCI_INDEX).await.unwrap();
    let disk = locate(&repository).await.unwrap();
    assert_eq!((disk.file_name(), disk.manifest()), ("x.iso", &image));

    let layers = [(media_type::OCI_LAYER, gnu_layer(&[("etc/passwd", b"root")]))];
    push_image(&repository, media_type::OCI_MANIFEST, &layers).await;
    assert_eq!(locate(&repository).await.unwrap_err().kind(), ErrorKind::NotFound);
}

/// A registry that serves the given blobs but ignores ranges.
async fn without_ranges(manifest: Vec<u8>, blob: Vec<u8>) -> std::net::SocketAddr {
    let (manifest, blob) = (Bytes::from(manifest), Bytes::from(blob));
    let handler = move |request: Request| {
        let (manifest, blob) = (manifest.clone(), blob.clone());
        async move {
            let is_manifest = request.uri().path().contains("/manifests/");
            let kind = if is_manifest { media_type::OCI_MANIFEST } else { "application/octet-stream" };
            let body = if is_manifest { manifest } else { blob };
            Response::builder().header("content-type", kind).body(Body::from(body)).unwrap()
        }
    };
    serve(axum::Router::new().fallback(handler)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_ranges_a_plain_layer_is_read_as_a_verified_stream() {
    let content = noise(300_000, 6);
    let blob = layer("x.img", &content);
    let manifest = |digest: &str| {
        let descriptor = json!({"mediaType": media_type::OCI_LAYER, "digest": digest, "size": blob.len()});
        serde_json::to_vec(&json!({"schemaVersion": 2, "config": descriptor, "layers": [descriptor]}))
            .unwrap()
    };
    let right = manifest(digest::sha256(&blob).unwrap().as_ref());
    let disk = locate(&open(without_ranges(right, blob.clone()).await, "a")).await.unwrap();
    assert!(disk.window().unwrap().is_none());
    assert!(read_stream(&disk).await.unwrap() == content);

    let wrong = manifest(digest::sha256(b"something else").unwrap().as_ref());
    let disk = locate(&open(without_ranges(wrong, blob.clone()).await, "a")).await.unwrap();
    let error = read_stream(&disk).await.unwrap_err().downcast::<dvcr_image::Error>().unwrap();
    assert_eq!(error.kind(), ErrorKind::Mismatch);
    let insisting = tokio::task::spawn_blocking(move || {
        let mut stream = disk.stream().unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap_err();
        stream.read(&mut [0])
    });
    assert!(insisting.await.unwrap().is_err(), "a second read is no clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_is_the_one_that_the_merged_layers_show() {
    const OCI_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    let dir = tempfile::tempdir().unwrap();
    let address = our_registry(dir.path()).await;
    let base = gnu_layer(&[("disk/base.img", b"base"), ("disk/old.img", b"old")]);
    let white_out = gnu_layer(&[("disk/.wh.base.img", b"")]);
    let all_out = gnu_layer(&[("disk/.wh..wh..opq", b"")]);
    let newer = gnu_layer(&[("disk/new.img", b"new")]);
    type Case<'a> = (&'a str, Vec<&'a Vec<u8>>, Option<&'a str>);
    let cases: [Case<'_>; 5] = [
        ("base", vec![&base], Some("base.img")),
        ("white-out", vec![&base, &white_out], Some("old.img")),
        ("opaque", vec![&base, &all_out], None),
        ("newer", vec![&base, &newer], Some("new.img")),
        ("newer-gone", vec![&newer, &base, &white_out, &white_out], Some("old.img")),
    ];
    for (name, layers, expected) in cases {
        for (kind, compressed) in [(media_type::OCI_LAYER, false), (OCI_GZIP, true)] {
            let layers: Vec<_> = layers
                .iter()
                .map(|layer| (kind, if compressed { gzip(layer) } else { layer.to_vec() }))
                .collect();
            let repository = open(address, name);
            push_image(&repository, media_type::OCI_MANIFEST, &layers).await;
            match (locate(&repository).await, expected) {
                (Ok(disk), Some(expected)) => {
                    assert_eq!(disk.file_name(), expected, "{name}");
                    assert_eq!(
                        read_stream(&disk).await.unwrap(),
                        &expected.as_bytes()[..disk.size() as usize]
                    );
                }
                (Err(error), None) => assert_eq!(error.kind(), ErrorKind::NotFound, "{name}"),
                (outcome, _) => panic!("{name}: {outcome:?}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_there_twice_is_the_last_one_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let repository = open(our_registry(dir.path()).await, "a");
    let mut twice = layer("vm.img", b"first");
    twice.truncate(twice.len() - 1024);
    twice.extend(layer("vm.img", b"last"));
    push_image(&repository, media_type::OCI_MANIFEST, &[(media_type::OCI_LAYER, twice.clone())]).await;
    let disk = locate(&repository).await.unwrap();
    assert_eq!(read_window(&disk, 0, 4).await, b"last");
    assert_eq!(read_stream(&disk).await.unwrap(), b"last");
    let gzipped = [("application/vnd.oci.image.layer.v1.tar+gzip", gzip(&twice))];
    push_image(&repository, media_type::OCI_MANIFEST, &gzipped).await;
    let error = read_stream(&locate(&repository).await.unwrap()).await.unwrap_err();
    assert_eq!(error.downcast::<dvcr_image::Error>().unwrap().kind(), ErrorKind::Unsupported);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_threads_read_one_layer_and_all_see_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let repository = open(our_registry(dir.path()).await, "a");
    let content = std::sync::Arc::new(noise(40 << 20, 7));
    push_image(&repository, media_type::OCI_MANIFEST, &[(media_type::OCI_LAYER, layer("x.img", &content))])
        .await;
    let window = locate(&repository).await.unwrap().window().unwrap().unwrap();
    let readers: Vec<_> = (0..4usize)
        .map(|reader| {
            let (window, content) = (window.clone(), content.clone());
            tokio::task::spawn_blocking(move || {
                for step in 0..200 {
                    let len = 1 + (step * 7919 + reader * 104_729) % 300_000;
                    let offset = (step * 1_299_709 + reader * 15_485_863) % (content.len() - len);
                    let mut buf = vec![0; len];
                    window.read_exact_at(&mut buf, offset as u64).unwrap();
                    assert!(buf == content[offset..offset + len], "{len} bytes at {offset}");
                }
                let past = window.read_exact_at(&mut [0; 2], content.len() as u64 - 1).unwrap_err();
                assert_eq!(past.kind(), std::io::ErrorKind::UnexpectedEof);
            })
        })
        .collect();
    for reader in readers {
        reader.await.unwrap();
    }
}

/// Publishes an image of these layers whose configuration is `config`.
async fn push_configured(repository: &Repository, config: Vec<u8>, layers: &[Vec<u8>]) {
    let mut entries = Vec::new();
    for layer in layers {
        let digest = repository.push_blob(layer.clone().into()).await.unwrap();
        entries.push(
            json!({"mediaType": media_type::OCI_LAYER, "digest": digest.to_string(), "size": layer.len()}),
        );
    }
    let size = config.len();
    let config = repository.push_blob(config.into()).await.unwrap();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media_type::OCI_MANIFEST, "layers": entries,
        "config": {"mediaType": media_type::OCI_CONFIG, "digest": config.to_string(), "size": size},
    });
    let manifest = serde_json::to_vec(&manifest).unwrap();
    repository.put_manifest("latest", manifest.into(), media_type::OCI_MANIFEST).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_our_labels_promise_has_to_be_there_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let repository = open(our_registry(dir.path()).await, "a");
    let content = noise(2_500_000, 13);
    let disk = layer("x.img", &content);
    let labels = DiskLabels { size: content.len() as u64, virtual_size: 1 << 30, format: Format::Raw };
    let disk_digest = digest::sha256(&disk).unwrap();
    let configured = |index: &[u8]| {
        let index = digest::sha256(index).unwrap();
        layout::config(&labels, &disk_digest, Some(&index)).unwrap()
    };
    let index = index_of(&content).layer();

    push_configured(&repository, configured(&index), &[disk.clone(), index.clone()]).await;
    let found = locate(&repository).await.unwrap();
    assert!(found.is_indexed());
    assert!(read_window(&found, 0, content.len()).await == content);

    push_configured(&repository, configured(&index), std::slice::from_ref(&disk)).await;
    let missing = locate(&repository).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Corrupt);
    assert!(missing.to_string().contains("no such layer"), "{missing}");

    let of_another = index_of(&content[1..]).layer();
    let empty = layer("y", b"");
    for (bad, word) in [(of_another, "2499999"), (empty, "cannot be read")] {
        push_configured(&repository, configured(&bad), &[disk.clone(), bad.clone()]).await;
        let error = locate(&repository).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(word), "{error}");
    }

    let mut changed = content.clone();
    changed[2_000_000] ^= 1;
    let wrong = index_of(&changed).layer();
    push_configured(&repository, configured(&wrong), &[disk.clone(), wrong]).await;
    let found = locate(&repository).await.unwrap();
    let window = found.window().unwrap().unwrap();
    let refused = tokio::task::spawn_blocking(move || window.read_exact_at(&mut [0; 10], 1_999_000));
    let refused = refused.await.unwrap().unwrap_err().downcast::<dvcr_image::Error>().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Mismatch);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_built_on_ours_inherits_the_labels_and_its_own_disk_is_read_without_them() {
    let dir = tempfile::tempdir().unwrap();
    let repository = open(our_registry(dir.path()).await, "a");
    let (ours, theirs) = (noise(1_500_000, 14), noise(1_700_000, 15));
    let labels = DiskLabels { size: ours.len() as u64, virtual_size: 1 << 30, format: Format::Raw };
    let disk = layer("x.img", &ours);
    let index = index_of(&ours).layer();
    let index_digest = digest::sha256(&index).unwrap();
    let config = layout::config(&labels, &digest::sha256(&disk).unwrap(), Some(&index_digest)).unwrap();
    let other = gnu_layer(&[("disk/x.img", &theirs)]);
    // With our layers below, and squashed into one.
    for layers in [vec![disk, index, other.clone()], vec![other]] {
        push_configured(&repository, config.clone(), &layers).await;
        let found = locate(&repository).await.unwrap();
        assert!(!found.is_indexed());
        assert!(read_window(&found, 0, theirs.len()).await == theirs);
    }
}
