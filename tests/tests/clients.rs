//! Other people's clients, both ways: they pull what we pushed and push what we pull.

use anyhow::{Context, Result};
use dvcr_tests::{
    Daemon, Registry, TempDir, assert_same_bytes, cmd, fixture, qemu, run, run_dvcr, temp_dir, tool, utf8,
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const VIRTUAL_BYTES: u64 = 64 << 20;
const DATA_BYTES: usize = 5 << 20;
const START_TIMEOUT: Duration = Duration::from_secs(30);

struct Setup {
    dir: TempDir,
    registry: Registry,
    source: PathBuf,
}

impl Setup {
    fn new() -> Result<Self> {
        let dir = temp_dir();
        let source = dir.path().join("disk.qcow2");
        fixture::noise_qcow2(&source, VIRTUAL_BYTES, DATA_BYTES)?;
        let registry = Registry::start(&dir.path().join("registry"))?;
        Ok(Self { dir, registry, source })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Imports the source with `dvcr`.
    fn import(&self, name: &str) -> Result<String> {
        let reference = self.registry.reference(name);
        run_dvcr(&["import", utf8(&self.source), &reference])?;
        Ok(reference)
    }

    /// Asks skopeo for the digest of what a reference names.
    fn digest(&self, reference: &str) -> Result<String> {
        let text = run(&cmd("skopeo", ["inspect", "--tls-verify=false", &format!("docker://{reference}")]))?;
        let digest = serde_json::from_str::<Value>(&text)?["Digest"].as_str().map(str::to_owned);
        digest.with_context(|| format!("no digest in {text}"))
    }

    /// Populates a disk from a reference and compares it with the source.
    fn assert_populates(&self, reference: &str) -> Result<()> {
        let disk = self.path("populated.raw");
        run_dvcr(&["populate", reference, utf8(&disk)])?;
        qemu::assert_same_disk(&self.source, "qcow2", &disk, "raw")?;
        Ok(std::fs::remove_file(disk)?)
    }
}

#[test]
fn skopeo_pulls_and_pushes_with_the_same_digest() -> Result<()> {
    let setup = Setup::new()?;
    let ours = setup.import("vi/tests/disk:1")?;
    let layout = format!("oci:{}:1", setup.path("layout").display());
    let copy = |from: &str, to: &str| {
        run(&cmd(
            "skopeo",
            [
                "copy",
                "-q",
                "--preserve-digests",
                "--src-tls-verify=false",
                "--dest-tls-verify=false",
                from,
                to,
            ],
        ))
    };
    copy(&format!("docker://{ours}"), &layout)?;
    let back = setup.registry.reference("vi/tests/by-skopeo:1");
    copy(&layout, &format!("docker://{back}"))?;
    assert_eq!(setup.digest(&back)?, setup.digest(&ours)?);
    setup.assert_populates(&back)
}

#[test]
fn crane_pulls_and_pushes_with_the_same_digest() -> Result<()> {
    let setup = Setup::new()?;
    let ours = setup.import("vi/tests/disk:1")?;
    let crane = |args: &[&str]| run(&cmd(tool("crane")?, args));
    let layout = setup.path("layout");
    let layout = utf8(&layout);
    // Not `crane validate`, which takes every layer for gzip; pulling checks digests and sizes too.
    crane(&["pull", "--format=oci", &ours, layout])?;
    let back = setup.registry.reference("vi/tests/by-crane:1");
    crane(&["push", layout, &back])?;
    let digest = |reference: &str| crane(&["digest", reference]).map(|text| text.trim().to_owned());
    assert_eq!(digest(&back)?, digest(&ours)?);
    // Between repositories of one registry it mounts the blobs.
    let copied = setup.registry.reference("vi/tests/copied:1");
    crane(&["copy", &ours, &copied])?;
    assert_eq!(digest(&copied)?, digest(&ours)?);
    setup.assert_populates(&back)
}

#[test]
fn a_pushed_image_unpacks_as_a_container_disk() -> Result<()> {
    let setup = Setup::new()?;
    let ours = setup.import("vi/tests/disk:1")?;
    let layout = setup.path("layout").display().to_string();
    run(&cmd(
        "skopeo",
        ["copy", "-q", "--src-tls-verify=false", &format!("docker://{ours}"), &format!("oci:{layout}:1")],
    ))?;
    let bundle = setup.path("bundle");
    run(cmd("umoci", ["unpack", "--rootless", "--image", &format!("{layout}:1")]).arg(&bundle))?;

    // KubeVirt takes the only file below /disk, whatever its name.
    let files: Vec<PathBuf> = bundle
        .join("rootfs/disk")
        .read_dir()?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    assert_eq!(files, [bundle.join("rootfs/disk/disk.qcow2")]);
    assert_same_bytes(&setup.source, &files[0], None)
}

#[test]
fn a_container_disk_that_buildah_made_imports_and_populates() -> Result<()> {
    let setup = Setup::new()?;
    std::fs::write(setup.path("Containerfile"), "FROM scratch\nCOPY --chown=107:107 disk.qcow2 /disk/\n")?;
    let theirs = setup.registry.reference("team/disk:1");
    let storage = setup.path("storage");
    run(buildah(&storage).args(["build", "--isolation", "chroot", "-t", "disk"]).arg(setup.dir.path()))?;
    run(buildah(&storage).args(["push", "--tls-verify=false", "disk", &format!("docker://{theirs}")]))?;
    run(buildah(&storage).args(["rmi", "--all"]))?;
    let manifest =
        run(&cmd("skopeo", ["inspect", "--tls-verify=false", "--raw", &format!("docker://{theirs}")]))?;
    assert!(manifest.contains("gzip"), "the layer is compressed: {manifest}");

    setup.assert_populates(&theirs)?;
    let imported = setup.registry.reference("vi/tests/disk:1");
    run_dvcr(&["import", &format!("docker://{theirs}"), &imported])?;
    setup.assert_populates(&imported)?;

    run(buildah(&storage).args(["pull", "--tls-verify=false", &format!("docker://{imported}")]))?;
    run(buildah(&storage).args(["rmi", "--all"]))?;
    Ok(())
}

#[test]
fn skopeo_converts_lists_and_deletes() -> Result<()> {
    let setup = Plain::new()?;
    let inspect = |name: &str, what: &str| -> Result<Value> {
        let named = format!("docker://{}", setup.named(name));
        let text = run(&cmd("skopeo", ["inspect", "--tls-verify=false", "--raw", &named]))?;
        Ok(serde_json::from_str::<Value>(&text)?[what].clone())
    };
    // From the one kind of manifest to the other and back.
    for (from, to, format, media_type) in [
        ("app:oci", "converted:docker", "v2s2", "application/vnd.docker.distribution.manifest.v2+json"),
        ("converted:docker", "converted:oci", "oci", "application/vnd.oci.image.manifest.v1+json"),
    ] {
        let (from, named) = (setup.named(from), setup.named(to));
        let tls = ["--src-tls-verify=false", "--dest-tls-verify=false"];
        let mut copy = cmd("skopeo", ["copy", "-q", "--format", format]);
        run(copy.args(tls).args([format!("docker://{from}"), format!("docker://{named}")]))?;
        assert_eq!(inspect(to, "mediaType")?, media_type);
    }
    let list =
        |name: &str| run(&cmd("skopeo", ["list-tags", "--tls-verify=false", &format!("docker://{name}")]));
    let tags: Value = serde_json::from_str(&list(&setup.named("converted"))?)?;
    assert_eq!(tags["Tags"], serde_json::json!(["docker", "oci"]));
    let doomed = format!("docker://{}", setup.named("converted:docker"));
    run(&cmd("skopeo", ["delete", "--tls-verify=false", &doomed]))?;
    let tags: Value = serde_json::from_str(&list(&setup.named("converted"))?)?;
    assert_eq!(tags["Tags"], serde_json::json!(["oci"]));
    Ok(())
}

#[test]
fn crane_lists_tags_and_deletes() -> Result<()> {
    let setup = Plain::new()?;
    let crane = |args: &[&str]| run(&cmd(tool("crane")?, args));
    assert_eq!(crane(&["catalog", &setup.registry.address().to_string()])?.trim(), "team/app");
    crane(&["tag", &setup.named("app:oci"), "latest"])?;
    assert_eq!(
        crane(&["ls", &setup.named("app")])?.lines().collect::<Vec<_>>(),
        ["docker", "index", "latest", "oci"]
    );
    crane(&["copy", &setup.named("app:index"), &setup.named("other:index")])?;
    crane(&["validate", "--remote", &setup.named("other:index")])?;
    let digest = crane(&["digest", &setup.named("app:latest")])?;
    crane(&["delete", &setup.named(&format!("app@{}", digest.trim()))])?;
    assert_eq!(crane(&["ls", &setup.named("app")])?.lines().collect::<Vec<_>>(), ["docker", "index"]);
    Ok(())
}

#[test]
fn oras_pushes_attaches_discovers_copies_and_pulls() -> Result<()> {
    let setup = Plain::new()?;
    let dir = setup.dir.path();
    std::fs::write(dir.join("model.bin"), fixture::Noise::new(1).bytes(300_000))?;
    std::fs::write(dir.join("note.txt"), "signed off")?;
    let oras = |args: &[&str]| {
        let mut command = cmd(tool("oras")?, args);
        run(command.current_dir(dir).env("HOME", dir).env("DOCKER_CONFIG", dir))
    };
    let (art, copy) = (setup.named("art:1"), setup.named("copy:1"));
    let kind = ["--artifact-type", "application/vnd.example.model"];
    let note = ["--artifact-type", "application/vnd.example.note"];
    oras(&["push", "--plain-http", kind[0], kind[1], &art, "model.bin:application/octet-stream"])?;
    oras(&["attach", "--plain-http", note[0], note[1], &art, "note.txt"])?;
    oras(&["copy", "--from-plain-http", "--to-plain-http", "--recursive", &art, &format!("{copy},2")])?;
    for name in [&art, &copy] {
        let found: Value = serde_json::from_str(&oras(&[
            "discover",
            "--plain-http",
            "--format",
            "json",
            note[0],
            note[1],
            name,
        ])?)?;
        assert_eq!(found["referrers"][0]["artifactType"], note[1], "{found}");
        let referrer = found["referrers"][0]["reference"].as_str().context("a reference")?;
        oras(&["pull", "--plain-http", "--output", "out", name])?;
        oras(&["pull", "--plain-http", "--output", "out", referrer])?;
        for file in ["model.bin", "note.txt"] {
            assert_same_bytes(&dir.join(file), &dir.join("out").join(file), None)?;
        }
        std::fs::remove_dir_all(dir.join("out"))?;
    }
    assert_eq!(
        oras(&["repo", "tags", "--plain-http", &setup.named("copy")])?.lines().collect::<Vec<_>>(),
        ["1", "2"]
    );
    oras(&["manifest", "delete", "--plain-http", "--force", &copy])?;
    assert!(oras(&["pull", "--plain-http", &copy]).is_err());
    Ok(())
}

#[test]
fn helm_pushes_and_pulls_a_chart() -> Result<()> {
    let setup = Plain::new()?;
    let dir = setup.dir.path();
    let helm = |args: &[&str]| {
        let mut command = cmd(tool("helm")?, args);
        for (name, below) in
            [("HELM_CONFIG_HOME", "config"), ("HELM_CACHE_HOME", "cache"), ("HELM_DATA_HOME", "data")]
        {
            command.env(name, dir.join(below));
        }
        run(command.current_dir(dir))
    };
    std::fs::create_dir_all(dir.join("demo/templates"))?;
    std::fs::write(dir.join("demo/Chart.yaml"), "apiVersion: v2\nname: demo\nversion: 0.1.0+build.1\n")?;
    std::fs::write(
        dir.join("demo/templates/note.yaml"),
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: note}\n",
    )?;
    helm(&["package", "demo"])?;
    let (chart, charts) = ("demo-0.1.0+build.1.tgz", format!("oci://{}", setup.named("charts")));
    helm(&["push", "--plain-http", chart, &charts])?;
    std::fs::create_dir(dir.join("pulled"))?;
    let named = format!("{charts}/demo");
    helm(&["pull", "--plain-http", &named, "--version", "0.1.0+build.1", "--destination", "pulled"])?;
    assert_same_bytes(&dir.join(chart), &dir.join("pulled").join(chart), None)?;
    assert!(helm(&["template", "--plain-http", "x", &named])?.contains("kind: ConfigMap"));
    Ok(())
}

#[test]
fn cosign_signs_and_verifies_with_a_key() -> Result<()> {
    let setup = Plain::new()?;
    let dir = setup.dir.path();
    let cosign = |args: &[&str]| {
        let mut command = cmd(tool("cosign")?, args);
        run(command
            .current_dir(dir)
            .env("HOME", dir)
            .env("DOCKER_CONFIG", dir)
            .env("COSIGN_PASSWORD", "test"))
    };
    let by_digest = |name: &str| -> Result<String> {
        let digest = run(&cmd(tool("crane")?, ["digest", &setup.named(name)]))?;
        Ok(setup.named(&format!("app@{}", digest.trim())))
    };
    let (signed, unsigned) = (by_digest("app:oci")?, by_digest("app:docker")?);
    cosign(&["generate-key-pair"])?;
    // Nothing leaves the machine: no transparency log, no services of others.
    let alone = ["--tlog-upload=false", "--use-signing-config=false", "--allow-http-registry", "--yes"];
    cosign(&[&["sign", "--key", "cosign.key"], alone.as_slice(), &[signed.as_str()]].concat())?;
    let verify = |name: &str| {
        let known = ["--key", "cosign.pub", "--insecure-ignore-tlog=true", "--allow-http-registry"];
        cosign(&[&["verify"], known.as_slice(), &[name]].concat())
    };
    verify(&signed)?;
    assert!(verify(&unsigned).is_err());
    Ok(())
}

#[test]
fn containerd_pulls_and_pushes_with_the_same_digest() -> Result<()> {
    let setup = Plain::new()?;
    let containerd = Containerd::start(&setup.dir.path().join("containerd"))?;
    let crane = |name: &str| run(&cmd(tool("crane")?, ["digest", &setup.named(name)]));
    for name in ["app:docker", "app:oci", "app:index"] {
        let named = setup.named(name);
        containerd.ctr(&["content", "fetch", "--plain-http", "--all-platforms", &named])?;
        let back = setup.named(&name.replace("app", "by-ctr"));
        containerd.ctr(&["images", "tag", &named, &back])?;
        containerd.ctr(&["images", "push", "--plain-http", &back])?;
        assert_eq!(crane(&name.replace("app", "by-ctr"))?, crane(name)?, "{name}");
        run(&cmd(tool("crane")?, ["pull", "--format=oci", &back, utf8(&setup.dir.path().join("back"))]))?;
    }
    let listed = containerd.ctr(&["images", "ls"])?;
    assert!(listed.contains("application/vnd.docker.distribution.manifest.v2+json"), "{listed}");
    Ok(())
}

/// A containerd of its own.
struct Containerd {
    socket: PathBuf,
    _daemon: Daemon,
}

impl Containerd {
    fn start(dir: &Path) -> Result<Self> {
        std::fs::create_dir(dir)?;
        let (config, socket) = (dir.join("config.toml"), dir.join("socket"));
        let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
        // What it would run containers with is not needed, and wants more rights than a test may have.
        let text = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\", \
             \"io.containerd.snapshotter.v1.aufs\", \"io.containerd.snapshotter.v1.btrfs\", \
             \"io.containerd.snapshotter.v1.devmapper\", \"io.containerd.snapshotter.v1.overlayfs\", \
             \"io.containerd.snapshotter.v1.zfs\"]\n\
             [grpc]\naddress = {socket:?}\nuid = {uid}\ngid = {gid}\n",
            root = dir.join("root"),
            state = dir.join("state"),
            uid = uid.as_raw(),
            gid = gid.as_raw(),
        );
        std::fs::write(&config, text)?;
        let mut daemon = Daemon::spawn(cmd(tool("containerd")?, ["--config"]).arg(&config))?;
        let socket_of = |line: &str| line.contains("successfully booted").then_some(());
        daemon.wait_for_line(START_TIMEOUT, socket_of).context("containerd did not start")?;
        Ok(Self { socket, _daemon: daemon })
    }

    fn ctr(&self, args: &[&str]) -> Result<String> {
        run(cmd(tool("ctr")?, ["--address"]).arg(&self.socket).args(args))
    }
}

/// A registry with small images of both kinds, `team/app:docker` and `team/app:oci`, and an index over them.
struct Plain {
    dir: TempDir,
    registry: Registry,
}

impl Plain {
    fn new() -> Result<Self> {
        let dir = temp_dir();
        let registry = Registry::start(&dir.path().join("registry"))?;
        let setup = Self { dir, registry };
        let layer = setup.dir.path().join("layer.tar.gz");
        std::fs::write(setup.dir.path().join("content"), fixture::Noise::new(1).bytes(150_000))?;
        run(cmd("tar", ["-C", utf8(setup.dir.path()), "-czf"]).arg(&layer).arg("content"))?;
        for (tag, base) in [("docker", None), ("oci", Some("--oci-empty-base"))] {
            let mut append = cmd(tool("crane")?, ["append", "-f", utf8(&layer), "-t"]);
            run(append.arg(setup.named(&format!("app:{tag}"))).args(base))?;
        }
        let images = [setup.named("app:docker"), setup.named("app:oci")];
        let index = setup.named("app:index");
        run(&cmd(tool("crane")?, ["index", "append", "-m", &images[0], "-m", &images[1], "-t", &index]))?;
        Ok(setup)
    }

    /// Returns the reference of a name below `team`.
    fn named(&self, name: &str) -> String {
        self.registry.reference(&format!("team/{name}"))
    }
}

/// Starts a buildah command line with image storage of its own.
fn buildah(storage: &Path) -> Command {
    let mut command = cmd("buildah", ["--storage-driver", "vfs"]);
    command.arg("--root").arg(storage.join("root")).arg("--runroot").arg(storage.join("run"));
    command
}
