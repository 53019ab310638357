//! Other people's clients, both ways: they pull what we pushed and push what we pull.

use anyhow::{Context, Result};
use dvcr_tests::{
    Registry, TempDir, assert_same_bytes, cmd, fixture, qemu, run, run_dvcr, temp_dir, tool, utf8,
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

const VIRTUAL_BYTES: u64 = 64 << 20;
const DATA_BYTES: usize = 5 << 20;

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

/// Starts a buildah command line with image storage of its own.
fn buildah(storage: &Path) -> Command {
    let mut command = cmd("buildah", ["--storage-driver", "vfs"]);
    command.arg("--root").arg(storage.join("root")).arg("--runroot").arg(storage.join("run"));
    command
}
