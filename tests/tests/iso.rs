//! Installation media: kept byte for byte, known as what they are.

use anyhow::Result;
use dvcr_tests::{FileServer, Registry, assert_same_bytes, cmd, fixture, run, run_dvcr, temp_dir, utf8};
use serde_json::Value;

#[test]
fn a_bootable_iso_is_kept_byte_for_byte() -> Result<()> {
    let dir = temp_dir();
    let iso = fixture::rescue_iso()?;
    let server = FileServer::start(iso.parent().unwrap())?;
    let registry = Registry::start(&dir.path().join("registry"))?;
    let reference = registry.reference("cvi/rescue:1");
    run_dvcr(&["import", &server.url("grub-rescue-cdrom.iso"), &reference])?;

    let image = format!("docker://{reference}");
    let config: Value =
        serde_json::from_str(&run(&cmd("skopeo", ["inspect", "--tls-verify=false", "--config", &image]))?)?;
    let labels = &config["config"]["Labels"];
    let size = iso.metadata()?.len().to_string();
    assert_eq!(labels["source-image-format"], "iso", "{labels}");
    assert_eq!(labels["source-image-size"], Value::from(size.clone()), "{labels}");
    assert_eq!(labels["source-image-virtual-size"], Value::from(size), "{labels}");

    // What a containerDisk's user sees is the file itself, under its name.
    let layout = format!("oci:{}:1", dir.path().join("layout").display());
    run(&cmd("skopeo", ["copy", "-q", "--src-tls-verify=false", &image, &layout]))?;
    let image = format!("{}:1", dir.path().join("layout").display());
    let unpacked = dir.path().join("unpacked");
    run(cmd("umoci", ["unpack", "--rootless", "--image", &image]).arg(&unpacked))?;
    assert_same_bytes(&iso, &unpacked.join("rootfs/disk/grub-rescue-cdrom.iso"), None)?;

    let disk = dir.path().join("disk.raw");
    run_dvcr(&["populate", &reference, utf8(&disk)])?;
    assert_same_bytes(&iso, &disk, None)
}
