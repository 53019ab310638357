//! Maps equal those of `qemu-img map`, comparisons those of the bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::path::Path;

use common::{noise, path, prose, qemu_img, qemu_io, temp_dir};
use dvcr_converter::compare::Comparison;
use dvcr_converter::convert::Options;
use dvcr_converter::file;
use dvcr_converter::limits::Limits;
use dvcr_converter::map::{self, Run};
use dvcr_converter::progress::Progress;
use serde_json::Value;

fn our_map(image: &Path) -> Vec<Run> {
    let opened = file::open(image, &Limits::default(), &Progress::default()).unwrap();
    map::runs(&opened.image).collect::<Result<_, _>>().unwrap()
}

/// The map of `qemu-img`. It knows no compression here (7.2), it looks for holes of the file below data, and tells where
/// a cluster is that is zero all the same: this is taken away.
fn their_map(image: &Path, format: &str) -> Vec<Run> {
    let text = qemu_img(&["map", "--output=json", "-f", format, path(image)]);
    let runs: Value = serde_json::from_str(&text).unwrap();
    let mut merged: Vec<Run> = Vec::new();
    for run in runs.as_array().unwrap() {
        let (number, flag) = (|name: &str| run[name].as_u64(), |name: &str| run[name].as_bool().unwrap());
        let (start, len, data) = (number("start").unwrap(), number("length").unwrap(), flag("data"));
        assert_eq!(number("depth"), Some(0));
        let offset = number("offset").filter(|_| data || format == "raw");
        let next = Run {
            start,
            len,
            present: flag("present"),
            zero: flag("zero") && !data,
            data,
            compressed: data && offset.is_none(),
            offset,
        };
        match merged.last_mut() {
            Some(last)
                if (last.present, last.zero, last.data) == (next.present, next.zero, next.data)
                    && last.offset.map(|offset| offset + last.len) == next.offset =>
            {
                last.len += next.len;
            }
            _ => merged.push(next),
        }
    }
    merged
}

#[test]
fn the_map_is_that_of_qemu_img() {
    let dir = temp_dir();
    for (i, options) in
        ["cluster_size=64k", "cluster_size=512", "cluster_size=2M", "extended_l2=on", "compat=0.10"]
            .into_iter()
            .enumerate()
    {
        let image = dir.path().join(format!("{i}.qcow2"));
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path(&image), "40M"]);
        let commands =
            ["write -q -P 1 0 4M", "write -q -P 2 10M 100k", "write -q -c -P 3 20M 2M", "write -q -z 6M 2M"];
        let more = [
            "write -q -P 4 12M 64k",
            "write -q -P 5 39M 1M",
            "write -q -P 6 10200k 40k",
            "write -q -P 7 30M 512",
        ];
        let commands = commands.into_iter().chain(more).map(str::to_owned).collect::<Vec<_>>();
        assert!(qemu_io(&image, &commands));
        assert_eq!(our_map(&image), their_map(&image, "qcow2"), "{options}");

        let raw = dir.path().join(format!("{i}.raw"));
        qemu_img(&["convert", "-O", "raw", path(&image), path(&raw)]);
        assert_eq!(our_map(&raw), their_map(&raw, "raw"), "{options}");
    }
}

/// What is stored of a disk, and where; runs that go on are one, whatever lies between them says of itself.
fn stored(runs: &[Run]) -> Vec<(u64, u64, Option<u64>)> {
    runs.iter().filter(|run| run.data).map(|run| (run.start, run.len, run.offset)).collect()
}

#[test]
fn data_is_where_qemu_img_finds_it_in_other_formats() {
    let dir = temp_dir();
    let raw = dir.path().join("raw");
    let mut disk = noise(3 << 20, 1);
    disk.resize(20 << 20, 0);
    disk.extend(noise(4 << 20, 2));
    std::fs::write(&raw, disk).unwrap();
    for (format, options) in [
        ("vdi", "static=off"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vpc", "subformat=dynamic,force_size=on"),
    ] {
        let image = dir.path().join(format);
        qemu_img(&["convert", "-f", "raw", "-O", format, "-o", options, path(&raw), path(&image)]);
        assert_eq!(stored(&our_map(&image)), stored(&their_map(&image, format)), "{format}");
    }
}

#[test]
fn the_map_of_a_wrapped_image_is_that_of_the_image() {
    let dir = temp_dir();
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    let mut disk = noise(3 << 20, 1);
    disk.resize(9 << 20, 0);
    std::fs::write(&raw, disk).unwrap();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", path(&raw), path(&image)]);
    let bare = our_map(&image);
    common::run("gzip", &["-1", path(&image)]);
    assert_eq!(our_map(&image.with_extension("gz")), bare);
}

fn compare(a: &Path, b: &Path, strict: bool, workers: usize) -> Comparison {
    let options = Options { workers, ..Options::default() };
    file::compare([a, b], strict, &options, &Limits::default(), &Progress::default()).unwrap()
}

#[test]
fn the_first_difference_is_found_whatever_the_formats() {
    let dir = temp_dir();
    let file = |name: &str| dir.path().join(name);
    let mut disk = prose(5 << 20, 1);
    disk.resize(16 << 20, 0);
    disk.extend(noise(3 << 20, 2));
    std::fs::write(file("a.raw"), &disk).unwrap();
    let (a, qcow2, packed) = (file("a.raw"), file("a.qcow2"), file("a.packed"));
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", path(&a), path(&qcow2)]);
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-c", path(&a), path(&packed)]);
    let xz = file("a.xz");
    std::fs::write(&xz, common::pipe(&["xz", "-0"], &disk)).unwrap();
    for other in [&a, &qcow2, &packed, &xz] {
        for workers in [1, 3] {
            let same = compare(other, &qcow2, true, workers);
            assert!(same.is_identical(true) && same.first_difference.is_none());
        }
    }
    // In data, in a hole, in the last byte; and a second difference behind does not matter.
    for at in [0, 77_777, (5 << 20) + 1, 12 << 20, disk.len() - 1] {
        let mut other = disk.clone();
        other[at] ^= 0x80;
        *other.last_mut().unwrap() ^= 0x80;
        if at == disk.len() - 1 {
            other[at] ^= 0x80 ^ 1;
        }
        std::fs::write(file("b.raw"), &other).unwrap();
        for image in [&a, &qcow2, &packed, &xz] {
            for workers in [1, 4] {
                let found = compare(&file("b.raw"), image, false, workers);
                assert_eq!(found.first_difference, Some(at as u64));
                assert!(!found.is_identical(false));
            }
        }
    }
}

#[test]
fn a_larger_disk_may_have_zeros_more_unless_it_is_strict() {
    let dir = temp_dir();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let mut disk = noise(3 << 20, 1);
    std::fs::write(&a, &disk).unwrap();
    disk.resize((50 << 20) + 512, 0);
    std::fs::write(&b, &disk).unwrap();
    for (a, b) in [(&a, &b), (&b, &a)] {
        assert!(compare(a, b, false, 2).is_identical(false));
        assert!(!compare(a, b, true, 2).is_identical(true));
    }
    *disk.last_mut().unwrap() = 1;
    std::fs::write(&b, &disk).unwrap();
    for (a, b) in [(&a, &b), (&b, &a)] {
        assert_eq!(compare(a, b, false, 2).first_difference, Some(disk.len() as u64 - 1));
    }
}
