//! imago reads what we write, and we read what it reads: plain and zlib clusters, which is what it knows.
//! Where readers might differ, qemu is asked too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::path::Path;

use common::{noise, path, prose, qemu_img, temp_dir};
use dvcr_converter::convert::Options;
use dvcr_converter::qcow2::{Compression, WriteOptions};
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Storage, StorageOpenOptions};

fn read_with_imago(image: &Path) -> Vec<u8> {
    // Opened here, so that a name inside the image can open nothing.
    let file = imago::file::File::open(StorageOpenOptions::new().filename(image)).unwrap();
    let qcow2 = imago::qcow2::Qcow2::<imago::file::File>::builder(file).open(DenyImplicitOpenGate::default());
    let disk = FormatAccess::new(qcow2.unwrap());
    let mut bytes = vec![0xa5; disk.size() as usize];
    disk.read(&mut bytes, 0).unwrap();
    bytes
}

/// Data that compresses, data that does not, and holes, in runs of odd lengths.
fn sample() -> Vec<u8> {
    let mut disk = prose(700_000, 1);
    disk.resize(3 << 20, 0);
    for i in 0..40 {
        disk.extend(noise(30_000, i));
        disk.extend(prose(90_000, i));
        disk.extend(vec![0; 13_000]);
    }
    disk.resize(disk.len().next_multiple_of(512), 0);
    disk
}

#[test]
fn imago_reads_what_we_write() {
    let dir = temp_dir();
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    let disk = sample();
    std::fs::write(&raw, &disk).unwrap();
    for compression in [Compression::None, Compression::Zlib] {
        for cluster_size in [512, 4096, 65536, 2 << 20] {
            let write = WriteOptions { cluster_size, compression, ..WriteOptions::default() };
            common::to_qcow2(&raw, &image, &write, &Options::default()).unwrap();
            assert!(read_with_imago(&image) == disk, "{compression}, {cluster_size}");
        }
    }
}

#[test]
fn we_and_imago_agree_on_what_qemu_writes() {
    let dir = temp_dir();
    let (raw, image, ours) = (dir.path().join("raw"), dir.path().join("image"), dir.path().join("ours"));
    let disk = sample();
    std::fs::write(&raw, &disk).unwrap();
    for (compat, cluster_size) in [("0.10", 65536), ("1.1", 4096), ("1.1", 65536), ("1.1", 2 << 20)] {
        for compress in [&[][..], &["-c"]] {
            let options = format!("compat={compat},cluster_size={cluster_size}");
            let args = ["convert", "-f", "raw", "-O", "qcow2", "-o", &options];
            qemu_img(&[&args[..], compress, &[path(&raw), path(&image)]].concat());
            common::to_raw(&image, &ours, &Options::default()).unwrap();
            assert!(std::fs::read(&ours).unwrap() == disk, "{options}");
            assert!(read_with_imago(&image) == disk, "{options}");
        }
    }
}

#[test]
fn qemu_and_imago_read_matches_farther_back_than_the_window_that_qemu_asks_for() {
    const APART: usize = 30_000;
    let dir = temp_dir();
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    // Noise said twice compresses only by matches that go back as far as the noise is long.
    let disk: Vec<u8> = (0..160).flat_map(|seed| noise(APART, seed).repeat(4)).collect();
    let disk = &disk[..disk.len() / (2 << 20) * (2 << 20)];
    std::fs::write(&raw, disk).unwrap();
    for cluster_size in [65536, 2 << 20] {
        let write = WriteOptions { cluster_size, compression: Compression::Zlib, ..WriteOptions::default() };
        let finished = common::to_qcow2(&raw, &image, &write, &Options::default()).unwrap();
        assert!(finished.file_bytes < disk.len() as u64, "{cluster_size}: nothing was compressed");
        common::assert_sound_and_equal(&image, &raw, "raw");
        assert!(read_with_imago(&image) == disk, "{cluster_size}");
    }
}
