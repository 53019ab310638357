//! Images that are damaged, hostile, or ask for what we do not do: a clear error, soon, and never a panic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::{Bytes, failure, noise, path, prose, qemu_img, qemu_io, read_through, temp_dir};
use dvcr_converter::Error;
use dvcr_converter::error::ErrorKind;
use dvcr_converter::format::{self, Format};
use dvcr_converter::limits::Limits;
use proptest::prelude::*;

/// An image of 4 MiB with plain, compressed and zero clusters.
fn image(dir: &Path, options: &str) -> PathBuf {
    let image = dir.join("image.qcow2");
    let (noisy, text) = (dir.join("noise"), dir.join("prose"));
    std::fs::write(&noisy, noise(1 << 20, 1)).unwrap();
    std::fs::write(&text, prose(1 << 20, 2)).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path(&image), "4M"]);
    let commands = [
        format!("write -q -s {} 0 300k", path(&noisy)),
        format!("write -q -c -s {} 1M 512k", path(&text)),
        "write -q -z 2M 256k".to_owned(),
        format!("write -q -s {} 3M 1M", path(&text)),
    ];
    assert!(qemu_io(&image, &commands));
    image
}

/// An image with fields of the header, or any other place, changed.
fn patched(patches: &[(usize, &[u8])]) -> Vec<u8> {
    let dir = temp_dir();
    let mut bytes = std::fs::read(image(dir.path(), "cluster_size=65536")).unwrap();
    for (at, patch) in patches {
        bytes[*at..at + patch.len()].copy_from_slice(patch);
    }
    bytes
}

fn assert_refused(bytes: Vec<u8>, kind: ErrorKind, says: &str) {
    let error: Error = failure(read_through(bytes));
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

fn l1_offset(bytes: &[u8]) -> usize {
    u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize
}

fn first_l2_offset(bytes: &[u8]) -> usize {
    let entry = &bytes[l1_offset(bytes)..][..8];
    (u64::from_be_bytes(entry.try_into().unwrap()) & 0x00ff_ffff_ffff_fe00) as usize
}

#[test]
fn a_backing_file_is_refused_by_name() {
    let dir = temp_dir();
    let base = image(dir.path(), "cluster_size=65536");
    let overlay = dir.path().join("overlay.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", path(&base), "-F", "qcow2", path(&overlay)]);
    assert_refused(std::fs::read(&overlay).unwrap(), ErrorKind::ForeignFile, path(&base));
}

#[test]
fn an_external_data_file_is_refused() {
    let dir = temp_dir();
    let (image, data) = (dir.path().join("image"), dir.path().join("data"));
    let options = format!("data_file={}", path(&data));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path(&image), "4M"]);
    assert_refused(std::fs::read(&image).unwrap(), ErrorKind::ForeignFile, "external data file");
}

#[test]
fn encryption_is_refused() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    let secret = "secret,id=key,data=abc";
    let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let args = ["create", "-q", "--object", secret, "-f", "qcow2", "-o", options, path(&image), "4M"];
    // It weighs its key derivation by the CPU time of a few milliseconds, which a busy machine may not give it.
    let created = (0..10).any(|_| Command::new("qemu-img").args(args).status().unwrap().success());
    assert!(created, "qemu-img {args:?}");
    assert_refused(std::fs::read(&image).unwrap(), ErrorKind::Unsupported, "LUKS");
    assert_refused(patched(&[(32, &1u32.to_be_bytes())]), ErrorKind::Unsupported, "AES");
}

#[test]
fn an_unknown_incompatible_feature_is_refused_with_its_bit_and_name() {
    let unnamed = (1u64 << 40).to_be_bytes();
    assert_refused(patched(&[(72, &unnamed)]), ErrorKind::Unsupported, "bit 40");
    // The feature name table lies right after the header of 112 bytes; its first entry gets another bit.
    let named = (1u64 << 41).to_be_bytes();
    let bytes = patched(&[(72, &named), (121, &[41])]);
    assert_eq!(bytes[112..116], 0x6803_f857_u32.to_be_bytes());
    assert_refused(bytes, ErrorKind::Unsupported, "bit 41 (\"dirty bit\")");
}

#[test]
fn dirty_and_corrupt_bits_and_unknown_compatible_bits_do_not_stop_a_reader() {
    let bytes = patched(&[(72, &3u64.to_be_bytes()), (80, &[0xff; 16])]);
    assert_eq!(read_through(bytes).unwrap().len(), 4 << 20);
}

#[test]
fn absurd_sizes_are_refused() {
    assert_refused(patched(&[(24, &u64::MAX.to_be_bytes())]), ErrorKind::Limit, "limit");
    assert_refused(patched(&[(24, &(1u64 << 45).to_be_bytes())]), ErrorKind::Corrupt, "L1 table");
    // The L1 table that such a disk needs.
    let huge = [(24, &(1u64 << 45).to_be_bytes()[..]), (36, &u32::MAX.to_be_bytes()[..])];
    assert_refused(patched(&huge), ErrorKind::Limit, "L1 table");
    for cluster_bits in [0u32, 8, 22, 63, u32::MAX] {
        assert_refused(patched(&[(20, &cluster_bits.to_be_bytes())]), ErrorKind::Corrupt, "cluster_bits");
    }
}

#[test]
fn an_l1_table_beyond_the_file_is_refused() {
    assert_refused(patched(&[(40, &(1u64 << 40).to_be_bytes())]), ErrorKind::Corrupt, "beyond the end");
    assert_refused(patched(&[(40, &(u64::MAX << 16).to_be_bytes())]), ErrorKind::Corrupt, "beyond");
    assert_refused(patched(&[(40, &12345u64.to_be_bytes())]), ErrorKind::Corrupt, "boundary");
}

#[test]
fn l1_entries_that_point_nowhere_or_to_their_own_table_are_refused() {
    let l1 = l1_offset(&patched(&[]));
    for (entry, says) in
        [(1u64 << 50, "beyond the end"), (0x1200, "boundary"), (l1 as u64, "the L1 table itself")]
    {
        assert_refused(patched(&[(l1, &entry.to_be_bytes())]), ErrorKind::Corrupt, says);
    }
}

#[test]
fn l1_entries_that_share_a_table_are_refused() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path(&image), "1M"]);
    assert!(qemu_io(&image, &["write -q 0 512".to_owned()]));
    let mut bytes = std::fs::read(&image).unwrap();
    let l1 = l1_offset(&bytes);
    bytes.copy_within(l1..l1 + 8, l1 + 16);
    assert_refused(bytes, ErrorKind::Corrupt, "share");
}

#[test]
fn l2_entries_that_overlap_tables_are_refused() {
    let whole = patched(&[]);
    let (l1, l2) = (l1_offset(&whole), first_l2_offset(&whole));
    for target in [l1, l2] {
        let entry = (target as u64).to_be_bytes();
        assert_refused(patched(&[(l2, &entry)]), ErrorKind::Corrupt, "overlap");
        // The same as a compressed cluster of one sector.
        let entry = (target as u64 | 1 << 62).to_be_bytes();
        assert_refused(patched(&[(l2, &entry)]), ErrorKind::Corrupt, "overlap");
    }
    let beyond = (1u64 << 40).to_be_bytes();
    assert_refused(patched(&[(l2, &beyond)]), ErrorKind::Corrupt, "beyond the end");
    let askew = (l2 as u64 + 0x1_0200).to_be_bytes();
    assert_refused(patched(&[(l2, &askew)]), ErrorKind::Corrupt, "boundary");
}

#[test]
fn an_l2_table_that_points_every_cluster_to_one_place_ends() {
    let whole = patched(&[]);
    let l2 = first_l2_offset(&whole);
    let entry = whole[l2..l2 + 8].repeat(64);
    assert_eq!(read_through(patched(&[(l2, &entry)])).unwrap().len(), 4 << 20);
}

#[test]
fn a_compression_type_that_contradicts_its_feature_bit_is_refused() {
    assert_refused(patched(&[(104, &[1])]), ErrorKind::Corrupt, "compression type");
    assert_refused(patched(&[(72, &8u64.to_be_bytes())]), ErrorKind::Corrupt, "compression type");
    assert_refused(
        patched(&[(72, &8u64.to_be_bytes()), (104, &[2])]),
        ErrorKind::Unsupported,
        "compression type 2",
    );
}

#[test]
fn the_last_cluster_of_a_file_may_be_short() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    qemu_img(&["create", "-q", "-f", "qcow2", path(&image), "1M"]);
    let text = dir.path().join("prose");
    std::fs::write(&text, prose(65536, 2)).unwrap();
    assert!(qemu_io(&image, &[format!("write -q -s {} 0 64k", path(&text))]));
    let mut bytes = std::fs::read(&image).unwrap();
    bytes.truncate(bytes.len() - 40_000);
    std::fs::write(&image, &bytes).unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    qemu_img(&["convert", "-O", "raw", path(&image), path(&theirs)]);
    common::to_raw(&image, &ours, &dvcr_converter::convert::Options::default()).unwrap();
    common::assert_same_bytes(&ours, &theirs);
    // But not missing.
    bytes.truncate(bytes.len() - 30_000);
    assert_refused(bytes, ErrorKind::Corrupt, "beyond the end");
}

#[test]
fn formats_that_qemu_writes_and_we_cannot_read_are_named() {
    let dir = temp_dir();
    for (name, options) in [("qed", "cluster_size=65536"), ("parallels", "cluster_size=1048576")] {
        let image = dir.path().join("image");
        qemu_img(&["create", "-q", "-f", name, "-o", options, path(&image), "4M"]);
        let error = failure(common::open(&image));
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn short_and_empty_files_are_raw() {
    for bytes in [0, 1, 511, 512, 513] {
        let image = format::open(Arc::new(Bytes(vec![7; bytes])), &Limits::default()).unwrap();
        assert_eq!(image.info.format, Format::Raw);
        assert_eq!(image.info.virtual_size, bytes.next_multiple_of(512) as u64);
        let mut buf = vec![1; bytes.next_multiple_of(512)];
        image.disk.read_at(&mut buf, 0).unwrap();
        assert!(buf[..bytes].iter().all(|&b| b == 7) && buf[bytes..].iter().all(|&b| b == 0));
    }
}

/// Images whose bytes are changed below, each of them one flavour of the format.
fn flavours() -> &'static [Vec<u8>] {
    static FLAVOURS: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
    FLAVOURS.get_or_init(|| {
        [
            "cluster_size=65536",
            "cluster_size=65536,compression_type=zstd",
            "cluster_size=512",
            "cluster_size=512,compat=0.10",
            "cluster_size=16384,extended_l2=on",
            "cluster_size=262144,compression_type=zstd",
        ]
        .iter()
        .map(|options| {
            let dir = temp_dir();
            std::fs::read(image(dir.path(), options)).unwrap()
        })
        .collect()
    })
}

/// Where the tables of an image are: the places worth damaging.
fn metadata(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let l1 = l1_offset(bytes);
    let l2 = first_l2_offset(bytes);
    vec![0..104, 0..600, l1..l1 + 64, l2..l2 + 600, 0..bytes.len()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_never_panics_and_ends_soon(
        flavour in 0usize..6,
        damage in proptest::collection::vec((0usize..5, 0.0..1.0f64, any::<u8>(), 1usize..9), 1..6),
        cut in proptest::option::weighted(0.2, 0.0..1.0f64),
    ) {
        let mut bytes = flavours()[flavour].clone();
        let places = metadata(&bytes);
        for (place, at, value, run) in damage {
            let place = &places[place];
            let at = place.start + (at * place.len() as f64) as usize;
            let end = (at + run).min(bytes.len());
            bytes[at.min(end)..end].fill(value);
        }
        if let Some(cut) = cut {
            bytes.truncate((cut * bytes.len() as f64) as usize);
        }
        let begun = std::time::Instant::now();
        let _ = read_through(bytes);
        prop_assert!(begun.elapsed().as_secs() < 20);
    }
}
