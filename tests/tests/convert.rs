//! `dvcr info` and `dvcr convert` as a user meets them, with qemu-img beside.

use anyhow::{Context, Result};
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

/// The exit code of `dvcr` and its answer in JSON.
fn answer(args: &[&str]) -> Result<(i32, Value)> {
    let output = run_output(&cmd(dvcr()?, args.iter().chain(&["--output", "json"])))?;
    let code = output.status.code().unwrap_or(-1);
    let json = serde_json::from_str(&output.stdout);
    Ok((code, json.with_context(|| format!("{args:?} exited with {code}: {}", output.stderr))?))
}

#[test]
fn map_says_what_qemu_img_says_under_the_same_names() -> Result<()> {
    let dir = temp_dir();
    let image = dir.path().join("disk.img");
    fixture::noise_qcow2(&image, VIRTUAL_BYTES, DATA_BYTES)?;
    let (code, ours) = answer(&["map", utf8(&image)])?;
    let mut theirs: Value = serde_json::from_str(&qemu::qemu_img(&["map", "--output=json", utf8(&image)])?)?;
    // A field of younger versions.
    for run in theirs.as_array_mut().context("no array")? {
        run["compressed"] = false.into();
    }
    assert_eq!((code, ours), (0, theirs));
    let table = run_dvcr(&["map", utf8(&image)])?;
    assert_eq!(table.lines().next(), qemu::qemu_img(&["map", utf8(&image)])?.lines().next());
    Ok(())
}

#[test]
fn check_and_compare_answer_by_their_exit_codes() -> Result<()> {
    let dir = temp_dir();
    let path = |name: &str| dir.path().join(name);
    let (image, raw) = (path("disk.img"), path("disk.raw"));
    fixture::noise_qcow2(&image, VIRTUAL_BYTES, DATA_BYTES)?;
    qemu::convert(&image, "qcow2", &raw, "raw")?;

    let (code, ours) = answer(&["check", "--data", utf8(&image)])?;
    let theirs: Value = serde_json::from_str(&qemu::qemu_img(&["check", "--output=json", utf8(&image)])?)?;
    assert_eq!(code, 0);
    for name in
        ["filename", "format", "check-errors", "total-clusters", "allocated-clusters", "image-end-offset"]
    {
        assert_eq!(ours[name], theirs[name], "{name}");
    }
    let (code, same) = answer(&["compare", "--strict", utf8(&image), utf8(&raw)])?;
    assert_eq!((code, &same["identical"], &same["first-difference"]), (0, &true.into(), &Value::Null));

    // The first refcount block, emptied: everything is used and nothing is counted.
    let mut bytes = std::fs::read(&image)?;
    bytes[2 * 65536..3 * 65536].fill(0);
    std::fs::write(&image, &bytes)?;
    let (code, ours) = answer(&["check", utf8(&image)])?;
    assert_eq!(code, 2, "{ours}");
    assert!(ours["corruptions"].as_u64() > Some(0) && !ours["messages"][0].is_null(), "{ours}");

    let mut disk = std::fs::read(&raw)?;
    disk[5_000_000] ^= 1;
    std::fs::write(path("other.raw"), &disk)?;
    let (code, different) = answer(&["compare", utf8(&image), utf8(&path("other.raw"))])?;
    assert_eq!((code, &different["first-difference"]), (1, &5_000_000.into()));
    for (command, code) in [("check", 1), ("compare", 2)] {
        let missing = path("missing");
        let args: &[&str] =
            if command == "check" { &[utf8(&missing)] } else { &[utf8(&raw), utf8(&missing)] };
        let output = run_output(&cmd(dvcr()?, [&[command], args].concat()))?;
        assert_eq!(output.status.code(), Some(code), "{}", output.stderr);
    }
    Ok(())
}

#[test]
fn a_disk_goes_down_standard_output() -> Result<()> {
    let dir = temp_dir();
    let (image, out) = (dir.path().join("disk.img"), dir.path().join("out"));
    fixture::noise_qcow2(&image, VIRTUAL_BYTES, DATA_BYTES)?;
    let shell = |options: &str| -> Result<_> {
        let (dvcr, image, out) = (dvcr()?, utf8(&image), utf8(&out));
        run_output(&cmd("sh", ["-c", &format!("{} convert {options} {image} - > {out}", dvcr.display())]))
    };
    let output = shell("")?;
    assert!(output.status.success(), "{}", output.stderr);
    qemu::assert_same_disk(&image, "qcow2", &out, "raw")?;
    let output = shell("-O qcow2")?;
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.contains("front to end"), "{}", output.stderr);
    assert_eq!(std::fs::metadata(&out)?.len(), 0);
    Ok(())
}
