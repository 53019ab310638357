//! The check of image files: its verdict is that of `qemu-img check`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{noise, path, qemu_img, qemu_io, temp_dir};
use dvcr_converter::check::Report;
use dvcr_converter::convert::Options;
use dvcr_converter::error::ErrorKind;
use dvcr_converter::file;
use dvcr_converter::limits::Limits;
use dvcr_converter::progress::Progress;
use proptest::prelude::*;
use serde_json::Value;

fn check(image: &Path, with_data: bool) -> dvcr_converter::Result<Report> {
    let (limits, progress) = (Limits::default(), Progress::default());
    Ok(file::check(image, with_data, &Options::default(), &limits, &progress)?.1)
}

/// The exit code of `qemu-img check`, and its report if it made one.
fn qemu_check(image: &Path) -> (i32, Option<Value>) {
    let output = Command::new("qemu-img")
        .args(["check", "--output=json", "-f", "qcow2", path(image)])
        .output()
        .unwrap();
    (output.status.code().unwrap(), serde_json::from_slice(&output.stdout).ok())
}

/// What `dvcr check` exits with.
fn verdict(report: &Report) -> i32 {
    match report {
        Report { check_errors: 1.., .. } => 1,
        Report { corruptions: 1.., .. } => 2,
        Report { leaks: 1.., .. } => 3,
        _ => 0,
    }
}

/// Asserts that all counts are those of qemu-img, which leaves out the ones that are zero.
fn assert_same_counts(report: &Report, theirs: &Value) {
    let clusters = report.clusters.unwrap();
    for (name, count) in [
        ("total-clusters", clusters.total),
        ("allocated-clusters", clusters.allocated),
        ("fragmented-clusters", clusters.fragmented),
        ("compressed-clusters", clusters.compressed),
        ("image-end-offset", report.image_end.unwrap()),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("check-errors", report.check_errors),
    ] {
        assert_eq!(count, theirs[name].as_u64().unwrap_or(0), "{name}: {report:?}");
    }
}

/// A qcow2 image that was written to here and there, has two snapshots and, if the format allows it, a bitmap.
fn sample(dir: &Path, options: &str) -> PathBuf {
    let image = dir.join("image.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path(&image), "6M"]);
    let write = |commands: &[&str]| {
        let commands = commands.iter().map(|command| (*command).to_owned()).collect::<Vec<_>>();
        assert!(qemu_io(&image, &commands));
    };
    write(&[
        "write -q -P 1 0 300k",
        "write -q -P 2 5M 64k",
        "write -q -c -P 3 2M 256k",
        "write -q -z 1M 128k",
    ]);
    qemu_img(&["snapshot", "-c", "first", path(&image)]);
    write(&["write -q -P 4 100k 100k", "write -q -P 5 3M 10k", "discard -q 5M 64k"]);
    if !options.contains("compat=0.10") {
        qemu_img(&["bitmap", "--add", "-f", "qcow2", path(&image), "changes"]);
        write(&["write -q -P 6 4M 200k"]);
    }
    qemu_img(&["snapshot", "-c", "second", path(&image)]);
    image
}

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

const OPTIONS: [&str; 7] = [
    "cluster_size=64k",
    "cluster_size=512,refcount_bits=8",
    "cluster_size=4k,refcount_bits=64",
    "cluster_size=64k,refcount_bits=4",
    "cluster_size=32k,extended_l2=on,refcount_bits=32",
    "compat=0.10,cluster_size=2k",
    "cluster_size=16k,compression_type=zstd,lazy_refcounts=on",
];

#[test]
fn whole_images_are_whole_with_the_counts_of_qemu_img() {
    let dir = temp_dir();
    for options in OPTIONS {
        let image = sample(dir.path(), options);
        let (code, theirs) = qemu_check(&image);
        assert_eq!(code, 0, "{options}");
        let report = check(&image, true).unwrap();
        assert_eq!(verdict(&report), 0, "{options}: {report:?}");
        assert_same_counts(&report, &theirs.unwrap());
    }
    let image = dir.path().join("allocated.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path(&image), "200M"]);
    assert_same_counts(&check(&image, false).unwrap(), &qemu_check(&image).1.unwrap());
}

#[test]
fn a_file_that_is_checked_in_many_windows_gets_the_same_answer() {
    let dir = temp_dir();
    let limits = Limits { table_bytes_max: 4096, ..Limits::default() };
    for options in ["cluster_size=512,refcount_bits=8", "cluster_size=1k,refcount_bits=64"] {
        let image = sample(dir.path(), options);
        let in_windows = || {
            let (options, progress) = (Options::default(), Progress::default());
            file::check(&image, false, &options, &limits, &progress).unwrap().1
        };
        assert_eq!(in_windows(), check(&image, false).unwrap(), "{options}");
        // Behind the first window: clusters that nothing counts, and counts that nothing uses.
        let mut bytes = std::fs::read(&image).unwrap();
        let table = be64(&bytes, 48) as usize;
        let block = be64(&bytes, table + 8) as usize;
        bytes[block..block + 64].fill(0);
        bytes[block + 64..block + 128].fill(0x11);
        std::fs::write(&image, bytes).unwrap();
        let (windows, whole) = (in_windows(), check(&image, false).unwrap());
        assert!(whole.corruptions > 0 && whole.leaks > 0, "{options}: {whole:?}");
        let counts = |report: &Report| (report.corruptions, report.leaks, report.image_end, report.clusters);
        assert_eq!(counts(&windows), counts(&whole), "{options}");
    }
}

#[test]
fn a_leaked_cluster_is_no_damage() {
    let dir = temp_dir();
    let image = sample(dir.path(), "cluster_size=64k");
    let mut bytes = std::fs::read(&image).unwrap();
    // Four clusters at the end that nothing points to, one of them counted.
    let cluster = bytes.len().div_ceil(65536);
    bytes.resize((cluster + 4) * 65536, 0);
    let block = be64(&bytes, 65536) as usize;
    bytes[block + 2 * cluster + 1] = 1;
    std::fs::write(&image, bytes).unwrap();
    let (code, theirs) = qemu_check(&image);
    let report = check(&image, true).unwrap();
    assert_eq!((code, verdict(&report), report.leaks), (3, 3, 1), "{report:?}");
    assert_same_counts(&report, &theirs.unwrap());
}

#[test]
fn data_that_cannot_be_decoded_is_found_when_it_is_read() {
    let dir = temp_dir();
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    std::fs::write(&raw, common::prose(1 << 20, 7)).unwrap();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-c", path(&raw), path(&image)]);
    let mut bytes = std::fs::read(&image).unwrap();
    let l1 = be64(&bytes, 40) as usize;
    let l2 = (be64(&bytes, l1) & OFFSET_MASK) as usize;
    // Two clusters of sixteen begin with a block type that deflate does not have.
    for i in [3, 9] {
        let stream = be64(&bytes, l2 + 8 * i) & ((1 << 54) - 1);
        bytes[stream as usize] = 0xff;
    }
    std::fs::write(&image, bytes).unwrap();
    assert_eq!(verdict(&check(&image, false).unwrap()), 0);
    assert_eq!(qemu_check(&image).0, 0);
    let report = check(&image, true).unwrap();
    assert_eq!((verdict(&report), report.corruptions), (2, 2), "{report:?}");
}

/// Images of one disk of 9 MiB, as qemu-img writes them in the formats that have no check of their own here.
fn others(dir: &Path) -> Vec<PathBuf> {
    let raw = dir.join("raw");
    let mut disk = noise(3 << 20, 1);
    disk.resize(7 << 20, 0);
    disk.extend(common::prose(2 << 20, 2));
    std::fs::write(&raw, disk).unwrap();
    let make = |(format, options): &(&str, &str)| {
        let image = dir.join(format!("{format}{options}"));
        let mut args = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([path(&raw), path(&image)]);
        qemu_img(&args);
        image
    };
    let formats =
        [("vdi", ""), ("vdi", "static=on"), ("vpc", ""), ("vmdk", ""), ("vmdk", "subformat=streamOptimized")];
    formats.iter().map(make).collect()
}

#[test]
fn images_of_the_other_formats_are_whole_until_they_are_cut() {
    let dir = temp_dir();
    for image in others(dir.path()) {
        let report = check(&image, true).unwrap();
        assert_eq!(verdict(&report), 0, "{image:?}: {report:?}");
        let file = std::fs::File::options().write(true).open(&image).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        let report = check(&image, true).unwrap();
        assert_eq!(verdict(&report), 2, "{image:?}: {report:?}");
    }
}

#[test]
fn a_block_that_is_used_twice_is_damage() {
    let dir = temp_dir();
    let image = others(dir.path()).remove(0);
    let mut bytes = std::fs::read(&image).unwrap();
    // The map of a VDI file, whose place is told at 340: the second block is where the first is.
    let map = u32::from_le_bytes(bytes[340..344].try_into().unwrap()) as usize;
    bytes.copy_within(map..map + 4, map + 4);
    std::fs::write(&image, bytes).unwrap();
    let report = check(&image, false).unwrap();
    assert_eq!((verdict(&report), report.corruptions), (2, 1), "{report:?}");
}

#[test]
fn a_raw_disk_has_nothing_to_be_checked_and_a_wrapped_image_is_checked_inside() {
    let dir = temp_dir();
    let raw = dir.path().join("raw");
    std::fs::write(&raw, noise(100_000, 3)).unwrap();
    assert_eq!(check(&raw, true).unwrap(), Report::default());

    let image = sample(dir.path(), "cluster_size=64k");
    let whole = check(&image, true).unwrap();
    common::run("gzip", &["-1", "-k", path(&image)]);
    let wrapped = image.with_extension("qcow2.gz");
    assert_eq!(check(&wrapped, true).unwrap(), whole);
}

#[test]
fn tables_that_name_each_other_without_end_are_a_limit() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path(&image), "1G"]);
    let mut bytes = std::fs::read(&image).unwrap();
    // 65,536 snapshots, all with the same L1 table of 4 Mi entries, which all name one L2 table.
    let end = bytes.len().next_multiple_of(2 << 20);
    bytes.resize(end, 0);
    bytes[60..64].copy_from_slice(&65_536u32.to_be_bytes());
    bytes[64..72].copy_from_slice(&(end as u64).to_be_bytes());
    let l1 = end + (4 << 20);
    for _ in 0..65_536 {
        let mut entry = [0; 40];
        entry[..8].copy_from_slice(&(l1 as u64).to_be_bytes());
        entry[8..12].copy_from_slice(&(4u32 << 20).to_be_bytes());
        bytes.extend(entry);
    }
    bytes.resize(l1, 0);
    for _ in 0..4 << 20 {
        bytes.extend(((l1 + (32 << 20)) as u64).to_be_bytes());
    }
    bytes.resize(bytes.len() + (2 << 20), 0);
    std::fs::write(&image, bytes).unwrap();
    let limits = Limits::default();
    let progress = Progress::default();
    let result = std::thread::scope(|scope| {
        let check = scope.spawn(|| file::check(&image, false, &Options::default(), &limits, &progress));
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
        while !check.is_finished() && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        progress.cancel();
        check.join().unwrap()
    });
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Limit);
}

/// Where the tables of an image are, header excluded, and the size of its clusters.
fn tables(bytes: &[u8]) -> (Vec<usize>, usize) {
    let offset = |at: usize| (be64(bytes, at) & OFFSET_MASK) as usize;
    let cluster_size = 1usize << u32::from_be_bytes(bytes[20..24].try_into().unwrap());
    let (l1, refcounts) = (be64(bytes, 40) as usize, be64(bytes, 48) as usize);
    let mut tables = vec![l1, refcounts];
    let l1_entries = u32::from_be_bytes(bytes[36..40].try_into().unwrap()) as usize;
    tables.extend((0..l1_entries).map(|i| offset(l1 + 8 * i)));
    tables.extend((0..4).map(|i| offset(refcounts + 8 * i)));
    tables.retain(|&table| table > 0);
    (tables, cluster_size)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_verdict_on_damaged_tables_is_that_of_qemu_img(
        options in proptest::sample::select(OPTIONS.to_vec()),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), 0u64..64, 0u8..8, any::<bool>()), 1..4),
    ) {
        let dir = temp_dir();
        let image = sample(dir.path(), options);
        let mut bytes = std::fs::read(&image).unwrap();
        let (tables, cluster_size) = tables(&bytes);
        for (table, at, bit, anywhere) in damage {
            let table = tables[table.index(tables.len())];
            // Most tables are empty towards their end.
            let at = if anywhere { at as usize * cluster_size / 64 } else { at as usize };
            if let Some(byte) = bytes.get_mut(table + at) {
                *byte ^= 1 << bit;
            }
        }
        std::fs::write(&image, bytes).unwrap();
        let (code, theirs) = qemu_check(&image);
        match check(&image, false) {
            Err(e) => prop_assert_eq!(code, 1, "{}", e),
            // What qemu-img cannot open is damaged.
            Ok(report) if code == 1 => prop_assert_ne!(verdict(&report), 0, "{:?}", report),
            Ok(report) => {
                prop_assert_eq!(verdict(&report), code, "{:?} {:?}", report, theirs);
                if code == 3 {
                    prop_assert_eq!(report.leaks, theirs.unwrap()["leaks"].as_u64().unwrap());
                }
            }
        }
    }
}
