//! Images of registries as sources: those of this project are copied as they are, those that others made give up the disk
//! in them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::{
    Files, MIB, Registry, Relay, chain, import_one, import_request, noise, path, populate_one,
    registry_config, run,
};
use dvcr_converter::format::Format;
use dvcr_converter::progress::Progress;
use dvcr_image::layout::DiskLabels;
use dvcr_image::{AuthStore, digest, media_type};
use dvcr_importer::{ErrorKind, ImportSummary, Outcome, import};
use dvcr_registry::Auth;

async fn assert_holds(registry: &Registry, name: &str, raw: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out.raw");
    let populated = populate_one(&registry.reference(name), &target).await;
    populated.unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
    assert!(std::fs::read(&target).unwrap() == raw, "{name}: the disk differs");
}

async fn import_image(registry: &Registry, name: &str, to: &str) -> ImportSummary {
    let source = format!("docker://{}", registry.reference(name));
    import_one(&source, to).await.unwrap_or_else(|e| panic!("{name}: {}", chain(&e)))
}

/// Bytes of all blobs of a manifest.
async fn blob_bytes(registry: &Registry, name: &str) -> u64 {
    let (_, image) = registry.repository(name).image("latest").await.unwrap();
    image.config().size() + image.layers().iter().map(|layer| layer.size()).sum::<u64>()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_our_making_is_copied_between_registries_as_it_is() {
    let (theirs, ours, files) = (Registry::debian(), Registry::ours().await, Files::new());
    let made = import_one(path(&files.path("disk.raw")), &theirs.reference("a")).await.unwrap();
    assert_eq!(made.outcome, Outcome::Imported);
    let bytes = blob_bytes(&theirs, "a").await;
    for (from, name, to, sent) in
        [(&theirs, "a", &ours, bytes), (&theirs, "a", &ours, 0), (&ours, "a", &theirs, 0)]
    {
        let copied = import_image(from, name, &to.reference("a")).await;
        assert_eq!((copied.outcome, copied.source_size), (Outcome::Copied, sent));
        assert_eq!((copied.digest, copied.file_name), (made.digest.clone(), made.file_name.clone()));
        assert_eq!((copied.virtual_size, copied.stored_size), (made.virtual_size, made.stored_size));
        assert_eq!(to.layers("a"), 3);
    }
    assert_holds(&ours, "a", &files.raw).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn between_repositories_of_one_registry_no_blob_is_sent() {
    let files = Files::new();
    for registry in [Registry::ours().await, Registry::debian()] {
        let made = import_one(path(&files.path("disk.raw")), &registry.reference("a")).await.unwrap();
        let copied = import_image(&registry, "a", &registry.reference("b/c:1")).await;
        assert_eq!((copied.outcome, copied.source_size), (Outcome::Copied, 0));
        assert_eq!(copied.digest, made.digest);
        assert_eq!((registry.sessions("b/c"), registry.layers("b/c")), (0, 3));
        assert_holds(&registry, "b/c:1", &files.raw).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_goes_on_where_connections_broke() {
    let (theirs, ours, files) = (Registry::debian(), Registry::ours().await, Files::new());
    let made = import_one(path(&files.path("disk.raw")), &theirs.reference("a")).await.unwrap();
    let bytes = blob_bytes(&theirs, "a").await;
    // Three on the way from the source, and then three on the way to the destination.
    let cut_after = bytes / 4 + 1;
    let from = Relay::start(theirs.address, cut_after).await;
    let copied = import_one(&format!("docker://{}/a", from.address), &ours.reference("a")).await;
    assert_eq!(copied.unwrap_or_else(|e| panic!("{}", chain(&e))).digest, made.digest);
    assert!(from.cuts() >= 3, "{}", from.cuts());
    let passed = from.passed();
    assert!(passed < bytes + bytes / 20 + MIB as u64, "{passed} bytes for {bytes}");
    let to = Relay::start(ours.address, cut_after).await;
    let copied = import_image(&theirs, "a", &format!("{}/b", to.address)).await;
    assert_eq!((copied.outcome, copied.digest), (Outcome::Copied, made.digest));
    assert!(to.cuts() >= 3, "{}", to.cuts());
    assert_holds(&ours, "b", &files.raw).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_broke_off_is_gone_on_with_by_the_next_one() {
    let (theirs, ours, files) = (Registry::debian(), Registry::ours().await, Files::new());
    let raw = noise(44 * MIB, 5);
    let disk = files.path("noise.raw");
    std::fs::write(&disk, &raw).unwrap();
    let made = import_one(path(&disk), &theirs.reference("a")).await.unwrap();
    let bytes = blob_bytes(&theirs, "a").await;
    let relay = Relay::dying(theirs.address, 30 * MIB as u64).await;
    let error = import_one(&format!("docker://{}/a", relay.address), &ours.reference("a")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Source, "{}", chain(&error));
    assert_eq!((ours.sessions("a"), ours.layers("a")), (1, 0), "what was brought stays");

    let copied = import_image(&theirs, "a", &ours.reference("a")).await;
    assert_eq!((copied.outcome, &copied.digest), (Outcome::Copied, &made.digest));
    assert!(copied.resumed_bytes >= 16 * MIB as u64, "{copied:?}");
    assert_eq!(copied.resumed_bytes + copied.source_size, bytes);
    assert_eq!((ours.sessions("a"), ours.layers("a")), (0, 3));
    assert_holds(&ours, "a", &raw).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demanded_checksum_is_held_against_the_file_in_the_layer() {
    let (theirs, ours, files) = (Registry::debian(), Registry::ours().await, Files::new());
    let qcow2 = files.qcow2(&[]);
    let made = import_one(path(&qcow2), &theirs.reference("a")).await.unwrap();
    let sum = String::from_utf8(run("sha256sum", &[path(&qcow2)])).unwrap();
    let sum = format!("sha256:{}", sum.split_whitespace().next().unwrap());
    let source = format!("docker://{}", theirs.reference("a"));
    let mut request = import_request(&source, &ours.reference("a"));
    request.checksums = vec![sum.parse().unwrap()];
    let done = import(request.clone(), Arc::new(Progress::default())).await.unwrap();
    assert_eq!((done.outcome, done.digest), (Outcome::Imported, made.digest));
    request.destination = ours.reference("b").parse().unwrap();
    request.checksums = vec![format!("md5:{}", "0".repeat(32)).parse().unwrap()];
    let error = import(request, Arc::new(Progress::default())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Checksum);
    assert_eq!(ours.repository("b").manifest_digest("latest").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_blob_is_not_copied() {
    let (theirs, ours, files) = (Registry::debian(), Registry::ours().await, Files::new());
    import_one(path(&files.path("disk.raw")), &theirs.reference("a")).await.unwrap();
    let (_, image) = theirs.repository("a").image("latest").await.unwrap();
    let hex = image.layers()[0].digest().digest().to_owned();
    let data = theirs.dir.path().join(format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]));
    let mut bytes = std::fs::read(&data).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&data, bytes).unwrap();
    let source = format!("docker://{}", theirs.reference("a"));
    let error = import_one(&source, &ours.reference("a")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Source, "{}", chain(&error));
    assert!(chain(&error).contains("damaged or replaced"), "{}", chain(&error));
    assert_eq!((ours.sessions("a"), ours.layers("a")), (0, 0));
    assert_eq!(ours.repository("a").manifest_digest("latest").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_whose_labels_lie_is_imported_with_true_ones() {
    let (theirs, ours, files) = (Registry::debian(), Registry::ours().await, Files::new());
    let made = import_one(path(&files.path("disk.raw")), &theirs.reference("a")).await.unwrap();
    let repository = theirs.repository("a");
    let (_, image) = repository.image("latest").await.unwrap();
    let layer = (image.layers()[0].digest(), image.layers()[0].size());
    let labels = DiskLabels { size: made.stored_size, virtual_size: 512, format: Format::Qcow2 };
    dvcr_image::publish(&repository, "lies", &labels, layer, None).await.unwrap();
    let done = import_image(&theirs, "a:lies", &ours.reference("a")).await;
    assert_eq!((done.outcome, done.virtual_size), (Outcome::Imported, made.virtual_size));
    assert_eq!(done.digest, made.digest);
}

/// buildah with a storage of its own.
fn buildah(storage: &Path, args: &[&str]) {
    let mut command = Command::new("buildah");
    command.args(["--storage-driver", "vfs", "--root"]).arg(storage.join("root"));
    let output = command.arg("--runroot").arg(storage.join("run")).args(args).output().unwrap();
    assert!(output.status.success(), "buildah {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A containerDisk that buildah made of `disk.qcow2`, as a layout of skopeo.
fn container_disk(files: &Files) -> PathBuf {
    files.qcow2(&[]);
    let (layout, storage) = (files.path("layout"), files.path("storage"));
    let context = files.path("context");
    std::fs::create_dir(&context).unwrap();
    std::fs::rename(files.path("disk.qcow2"), context.join("disk.qcow2")).unwrap();
    std::fs::write(context.join("Containerfile"), "FROM scratch\nCOPY --chown=107:107 disk.qcow2 /disk/\n")
        .unwrap();
    buildah(&storage, &["build", "--isolation", "chroot", "-t", "disk", path(&context)]);
    buildah(&storage, &["push", "disk", &format!("oci:{}:1", path(&layout))]);
    buildah(&storage, &["rmi", "--all"]);
    layout
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_in_gzip_zstd_and_plain_layers_are_imported() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let layout = container_disk(&files);
    let oci = format!("oci:{}:1", path(&layout));
    let mut digests = Vec::new();
    for (name, options) in [
        ("gzip", &["--dest-compress-format", "gzip"][..]),
        ("zstd", &["--dest-compress-format", "zstd"]),
        ("docker", &["--format", "v2s2"]),
    ] {
        let to = format!("docker://{}", registry.reference(name));
        run("skopeo", &[&["copy", "-q", "--dest-tls-verify=false"], options, &[&oci, &to]].concat());
        digests.push(import_image(&registry, name, &registry.reference(&format!("of-{name}"))).await.digest);
        assert_holds(&registry, &format!("of-{name}"), &files.raw).await;
    }
    // Out of a folder of plain layers.
    let (plain, folder) = (format!("docker://{}", registry.reference("plain")), files.path("folder"));
    let folder = format!("dir:{}", path(&folder));
    run("skopeo", &["copy", "-q", "--dest-decompress", &oci, &folder]);
    run("skopeo", &["copy", "-q", "--dest-tls-verify=false", &folder, &plain]);
    let (_, image) = registry.repository("plain").image("latest").await.unwrap();
    let kinds: Vec<String> = image.layers().iter().map(|layer| layer.media_type().to_string()).collect();
    let done = import_image(&registry, "plain", &registry.reference("of-plain")).await;
    assert_eq!(done.outcome, Outcome::Imported, "{kinds:?}");
    assert_holds(&registry, "of-plain", &files.raw).await;
    digests.push(done.digest);
    // umoci's way to make one.
    let made = files.path("umoci");
    let image = format!("{}:1", path(&made));
    run("umoci", &["init", "--layout", path(&made)]);
    run("umoci", &["new", "--image", &image]);
    let disk = files.path("context/disk.qcow2");
    run("umoci", &["insert", "--rootless", "--image", &image, path(&disk), "/disk/disk.qcow2"]);
    let to = format!("docker://{}", registry.reference("umoci"));
    run("skopeo", &["copy", "-q", "--dest-tls-verify=false", &format!("oci:{image}"), &to]);
    digests.push(import_image(&registry, "umoci", &registry.reference("of-umoci")).await.digest);
    assert!(digests.iter().all(|digest| *digest == digests[0]), "one disk, one image: {digests:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_index_the_image_for_this_architecture_is_imported() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let storage = files.path("storage");
    let here = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    buildah(&storage, &["manifest", "create", "all"]);
    for architecture in ["amd64", "arm64"] {
        let context = files.path(architecture);
        std::fs::create_dir(&context).unwrap();
        let mut raw = files.raw.clone();
        raw[..5].copy_from_slice(architecture.as_bytes());
        std::fs::write(context.join("disk.img"), raw).unwrap();
        std::fs::write(context.join("Containerfile"), "FROM scratch\nCOPY disk.img /disk/\n").unwrap();
        let of = ["--arch", architecture, "--manifest", "all"];
        buildah(
            &storage,
            &[&["build", "--isolation", "chroot"], &of[..], &["-t", architecture, path(&context)]].concat(),
        );
    }
    let to = format!("docker://{}", registry.reference("all"));
    buildah(&storage, &["manifest", "push", "--all", "--tls-verify=false", "all", &to]);
    buildah(&storage, &["rmi", "--all", "--force"]);
    let index = registry.repository("all").manifest("latest").await.unwrap();
    assert!(media_type::OCI_INDEX == index.media_type || media_type::DOCKER_LIST == index.media_type);
    import_image(&registry, "all", &registry.reference("one")).await;
    let mut raw = files.raw.clone();
    raw[..5].copy_from_slice(here.as_bytes());
    assert_holds(&registry, "one", &raw).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_secret_opens_a_source_and_nothing_else_does() {
    let (ours, files) = (Registry::ours().await, Files::new());
    let password = files.path("password");
    std::fs::write(&password, "s3cret").unwrap();
    let guarded = Registry::with(|dir| {
        let auth = Auth { admin_password: Some(password.clone()), ..Auth::default() };
        dvcr_registry::Config { auth: Some(auth), ..registry_config(dir) }
    })
    .await;
    let secret = files.path("secret.json");
    // "admin:s3cret"
    let auths = format!("{{\"auths\":{{\"{}\":{{\"auth\":\"YWRtaW46czNjcmV0\"}}}}}}", guarded.address);
    std::fs::write(&secret, auths).unwrap();
    let auth = AuthStore::discover(Some(&secret), |_| None).unwrap();
    let mut request = import_request(path(&files.path("disk.raw")), &guarded.reference("a"));
    request.client.auth = auth.clone();
    let made = import(request, Arc::new(Progress::default())).await.unwrap();

    let source = format!("docker://{}", guarded.reference("a"));
    let error = import_one(&source, &ours.reference("a")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Source);
    assert!(chain(&error).contains("401") && chain(&error).contains("--authfile"), "{}", chain(&error));
    let mut request = import_request(&source, &ours.reference("a"));
    request.source_options.auth = auth;
    let copied = import(request, Arc::new(Progress::default())).await.unwrap();
    assert_eq!((copied.outcome, copied.digest), (Outcome::Copied, made.digest));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_is_not_there_is_the_sources_fault() {
    let registry = Registry::ours().await;
    for name in ["a", "a:other", &format!("a@{}", digest::sha256(b"x").unwrap())] {
        let source = format!("docker://{}", registry.reference(name));
        let error = import_one(&source, &registry.reference("b")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Source, "{}", chain(&error));
        assert!(error.to_string().contains(name), "{}", chain(&error));
    }
}
