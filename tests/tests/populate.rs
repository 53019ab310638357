//! Disks made from an image in the registry: their size, format and what is refused.

use anyhow::{Context, Result};
use dvcr_tests::{
    ControlGroup, Registry, SmallDisk, TempDir, assert_same_bytes, cmd, dvcr, fixture, qemu, run, run_dvcr,
    run_output, temp_dir, utf8,
};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

const MIB: u64 = 1 << 20;
const VIRTUAL_BYTES: u64 = 256 * MIB;
const DATA_BYTES: usize = 6 << 20;

/// A registry with one image, and the raw disk that has to come out of it.
struct Setup {
    dir: TempDir,
    _registry: Registry,
    reference: String,
    expected: PathBuf,
}

impl Setup {
    fn new() -> Result<Self> {
        let dir = temp_dir();
        let source = dir.path().join("disk.qcow2");
        fixture::noise_qcow2(&source, VIRTUAL_BYTES, DATA_BYTES)?;
        let expected = dir.path().join("expected.raw");
        qemu::convert(&source, "qcow2", &expected, "raw")?;
        let registry = Registry::start(&dir.path().join("registry"))?;
        let reference = registry.reference("vi/tests/disk:1");
        run_dvcr(&["import", utf8(&source), &reference])?;
        Ok(Self { dir, _registry: registry, reference, expected })
    }

    fn target(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn populate(&self, name: &str, options: &[&str]) -> Result<PathBuf> {
        let target = self.target(name);
        let mut args = vec!["populate", &self.reference, utf8(&target)];
        args.extend(options);
        run_dvcr(&args)?;
        Ok(target)
    }
}

#[test]
fn a_raw_disk_is_the_source_and_as_sparse() -> Result<()> {
    let setup = Setup::new()?;
    let disk = setup.populate("disk.raw", &[])?;
    assert_same_bytes(&setup.expected, &disk, None)?;
    let allocated = disk.metadata()?.blocks() * 512;
    assert!(allocated <= DATA_BYTES as u64 + MIB, "{allocated} bytes allocated for {DATA_BYTES} of data");
    Ok(())
}

#[test]
fn a_disk_grows_with_zeros_to_the_size_asked_for() -> Result<()> {
    let setup = Setup::new()?;
    let disk = setup.populate("disk.raw", &["--size", "1G"])?;
    assert_eq!(disk.metadata()?.len(), 1024 * MIB);
    assert_same_bytes(&setup.expected, &disk, Some(VIRTUAL_BYTES))?;
    std::fs::File::options().write(true).open(&setup.expected)?.set_len(1024 * MIB)?;
    assert_same_bytes(&setup.expected, &disk, None)
}

#[test]
fn a_disk_is_never_cut() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target("disk.raw");
    let smaller = (VIRTUAL_BYTES - MIB).to_string();
    let output =
        run_output(cmd(dvcr()?, ["populate", &setup.reference]).arg(&target).args(["--size", &smaller]))?;
    assert!(!output.status.success(), "{output:?}");
    assert!(
        output.stderr.contains(&VIRTUAL_BYTES.to_string()),
        "the message tells the image's size: {}",
        output.stderr
    );
    assert!(!target.exists(), "a refused disk leaves no file");
    Ok(())
}

#[test]
fn a_qcow2_disk_is_sound_and_the_source() -> Result<()> {
    let setup = Setup::new()?;
    let disk = setup.populate("disk.qcow2", &["--format", "qcow2"])?;
    qemu::qemu_img(&["check", "-f", "qcow2", utf8(&disk)])?;
    qemu::assert_same_disk(&setup.expected, "raw", &disk, "qcow2")
}

#[test]
fn a_qcow2_disk_grows_too() -> Result<()> {
    let setup = Setup::new()?;
    let disk = setup.populate("disk.qcow2", &["--format", "qcow2", "--size", "1G"])?;
    qemu::qemu_img(&["check", "-f", "qcow2", utf8(&disk)])?;
    assert_eq!(qemu::virtual_size(&disk, "qcow2")?, 1024 * MIB);
    std::fs::File::options().write(true).open(&setup.expected)?.set_len(1024 * MIB)?;
    qemu::assert_same_disk(&setup.expected, "raw", &disk, "qcow2")
}

#[test]
fn a_disk_larger_than_its_share_of_memory_is_written_beside_the_page_cache() -> Result<()> {
    const SHARE_BYTES: u64 = 256 << 20;
    let dir = temp_dir();
    let Some(group) = ControlGroup::create() else {
        eprintln!("skipped: control groups cannot be made here, or do not count memory");
        return Ok(());
    };
    drop(group);
    let source = dir.path().join("disk.qcow2");
    fixture::noise_qcow2(&source, 1 << 30, 640 << 20)?;
    let registry = Registry::start(&dir.path().join("registry"))?;
    let reference = registry.reference("vi/tests/large:1");
    run_dvcr(&["import", utf8(&source), &reference])?;
    for format in ["raw", "qcow2"] {
        let group = ControlGroup::create().context("another control group")?;
        let target = dir.path().join("disk");
        let populate = cmd(dvcr()?, ["populate", &reference, utf8(&target), "--format", format]);
        run(&group.inside(&populate))?;
        let peak = group.peak()?;
        assert!(peak < SHARE_BYTES, "{format}: {} MiB in use", peak >> 20);
        qemu::assert_same_disk(&source, "qcow2", &target, format)?;
    }
    Ok(())
}

#[test]
fn a_file_gets_the_mode_that_was_asked_for() -> Result<()> {
    let setup = Setup::new()?;
    for format in ["raw", "qcow2"] {
        for mode in ["0660", "600"] {
            let disk = setup.populate("disk", &["--format", format, "--mode", mode])?;
            let got = disk.metadata()?.mode() & 0o777;
            assert_eq!(got, u32::from_str_radix(mode, 8)?, "{format}, {mode}");
        }
    }
    let refused = run_output(&cmd(dvcr()?, ["populate", &setup.reference, "x", "--mode", "999"]))?;
    assert!(!refused.status.success() && refused.stderr.contains("999"), "{refused:?}");
    Ok(())
}

#[test]
fn a_disk_that_its_filesystem_has_no_room_for_is_refused_before_it_is_written() -> Result<()> {
    let setup = Setup::new()?;
    for (room, fits) in [(4 * MIB, false), (16 * MIB, true)] {
        let disk = SmallDisk::new(room)?;
        for format in ["raw", "qcow2"] {
            let target = disk.path().join("disk");
            let populate = ["populate", &setup.reference, utf8(&target), "--format", format];
            let output = run_output(&cmd(dvcr()?, populate))?;
            assert_eq!(output.status.success(), fits, "{format}: {}", output.stderr);
            assert_eq!(target.exists(), fits);
            if fits {
                qemu::assert_same_disk(&setup.expected, "raw", &target, format)?;
                std::fs::remove_file(&target)?;
                continue;
            }
            let (data, free) = (DATA_BYTES.to_string(), format!("{room} bytes are free"));
            assert!(output.stderr.contains(&data) && output.stderr.contains(&free), "{}", output.stderr);
            assert!(disk.path().read_dir()?.next().is_none(), "nothing was begun");
        }
    }
    Ok(())
}

#[test]
fn a_disk_that_the_registry_has_damaged_is_refused_and_the_chunk_is_named() -> Result<()> {
    let setup = Setup::new()?;
    let blobs = setup.dir.path().join("registry/docker/registry/v2/blobs/sha256");
    let mut files = Vec::new();
    for prefix in blobs.read_dir()? {
        for blob in prefix?.path().read_dir()? {
            files.push(blob?.path().join("data"));
        }
    }
    let layer = files.into_iter().max_by_key(|path| path.metadata().map_or(0, |meta| meta.len()));
    let layer = layer.context("no blob")?;
    // In chunk 3 of the file, which begins 64 KiB into the layer.
    let at = 3 * MIB + (64 << 10) + 12_345;
    let file = std::fs::File::options().read(true).write(true).open(&layer)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 1], at)?;
    let target = setup.target("disk.raw");
    let output = run_output(cmd(dvcr()?, ["populate", &setup.reference]).arg(&target))?;
    assert!(!output.status.success(), "{output:?}");
    assert!(output.stderr.contains("chunk 3 "), "{}", output.stderr);
    assert!(!target.exists());
    Ok(())
}
