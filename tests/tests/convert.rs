//! `dvcr info` and `dvcr convert` as a user meets them, with qemu-img beside.

use anyhow::Result;
use dvcr_tests::{cmd, dvcr, fixture, qemu, run, run_dvcr, run_output, temp_dir, utf8};
use serde_json::Value;

const VIRTUAL_BYTES: u64 = 64 << 20;
const DATA_BYTES: usize = 3 << 20;

#[test]
fn every_pair_of_formats_holds_the_same_disk() -> Result<()> {
    let dir = temp_dir();
    let path = |name: &str| dir.path().join(name);
    let source = path("source.qcow2");
    fixture::noise_qcow2(&source, VIRTUAL_BYTES, DATA_BYTES)?;
    qemu::convert(&source, "qcow2", &path("disk.raw"), "raw")?;
    run(&cmd("xz", ["-0", "-k", utf8(&path("disk.raw"))]))?;
    let outputs: [(&str, &[&str]); 4] = [
        ("raw", &[]),
        ("qcow2", &["-O", "qcow2"]),
        ("qcow2", &["-O", "qcow2", "-c", "-o", "cluster_size=2M"]),
        ("qcow2", &["-O", "qcow2", "-c", "-o", "compression_type=zstd", "--workers", "3"]),
    ];
    for input in ["source.qcow2", "disk.raw", "disk.raw.xz"] {
        for (format, options) in outputs {
            let (input, target) = (path(input), path("target"));
            run_dvcr(&[&["convert", utf8(&input), utf8(&target)], options].concat())?;
            qemu::assert_same_disk(&source, "qcow2", &target, format)?;
            if format == "qcow2" {
                qemu::qemu_img(&["check", "-q", "-f", "qcow2", utf8(&target)])?;
            }
        }
    }
    Ok(())
}

#[test]
fn info_says_what_qemu_img_says_under_the_same_names() -> Result<()> {
    let dir = temp_dir();
    let image = dir.path().join("disk.img");
    fixture::noise_qcow2(&image, VIRTUAL_BYTES, DATA_BYTES)?;
    let ours: Value = serde_json::from_str(&run_dvcr(&["info", utf8(&image), "--output", "json"])?)?;
    let theirs: Value = serde_json::from_str(&qemu::qemu_img(&["info", "--output=json", utf8(&image)])?)?;
    for name in ["filename", "format", "virtual-size", "actual-size", "cluster-size", "dirty-flag"] {
        assert_eq!(ours[name], theirs[name], "{name}");
    }
    assert_eq!(ours["format-specific"], theirs["format-specific"]);
    assert!(run_dvcr(&["info", utf8(&image)])?.contains("format: qcow2"));
    Ok(())
}

#[test]
fn an_image_that_names_another_file_is_refused_and_nothing_is_written() -> Result<()> {
    let dir = temp_dir();
    let (image, target) = (dir.path().join("disk.qcow2"), dir.path().join("target"));
    qemu::qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-b",
        "/etc/hostname",
        "-F",
        "raw",
        utf8(&image),
        "1M",
    ])?;
    let output = run_output(&cmd(dvcr()?, ["convert", utf8(&image), utf8(&target)]))?;
    assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
    assert!(output.stderr.contains("backing file"), "{}", output.stderr);
    assert!(!target.exists());
    Ok(())
}
