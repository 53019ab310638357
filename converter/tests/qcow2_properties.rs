//! Random images made by qemu, read by us and compared with qemu; the same disks written by us and judged by qemu.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::path::Path;
use std::process::Command;

use common::{assert_same_bytes, assert_sound_and_equal, noise, path, prose, qemu_img, qemu_io, temp_dir};
use dvcr_converter::convert::Options;
use dvcr_converter::qcow2::{Compression, Preallocation, WriteOptions};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// How a test image is made: `qemu-img create` with these, then the operations.
#[derive(Clone, Debug)]
struct Recipe {
    cluster_bits: u32,
    compat: &'static str,
    extended_l2: bool,
    zstd: bool,
    sectors: u64,
    operations: Vec<Operation>,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Pattern(u8),
    Noise,
    Prose,
    Zero,
    ZeroUnmap,
    Discard,
    Compressed(u8),
    CompressedProse,
    CompressedNoise,
}

/// Places are shares of the disk, so that they shrink well.
#[derive(Clone, Copy, Debug)]
struct Operation {
    kind: Kind,
    start: f64,
    clusters: f64,
}

fn recipes() -> impl Strategy<Value = Recipe> {
    let kind = prop_oneof![
        any::<u8>().prop_map(Kind::Pattern),
        Just(Kind::Noise),
        Just(Kind::Prose),
        Just(Kind::Zero),
        Just(Kind::ZeroUnmap),
        Just(Kind::Discard),
        any::<u8>().prop_map(Kind::Compressed),
        Just(Kind::CompressedProse),
        Just(Kind::CompressedNoise),
    ];
    let operation = (kind, 0.0..1.0f64, 0.0..5.0f64).prop_map(|(kind, start, clusters)| Operation {
        kind,
        start,
        clusters,
    });
    (9u32..=21, 0..4u8, 0.0..1.0f64, proptest::collection::vec(operation, 0..14)).prop_map(
        |(cluster_bits, flavour, size, operations)| {
            // Three L2 tables of the smallest clusters, a few clusters of the largest.
            let sectors_max = (3u64 << (2 * cluster_bits - 3)).min(40 << 20) >> 9;
            let (compat, zstd, extended_l2) = match flavour {
                0 => ("0.10", false, false),
                1 => ("1.1", false, false),
                2 => ("1.1", true, false),
                _ => ("1.1", cluster_bits % 2 == 0, cluster_bits >= 14),
            };
            let sectors = 1 + (size * sectors_max as f64) as u64;
            Recipe { cluster_bits, compat, extended_l2, zstd, sectors, operations }
        },
    )
}

impl Recipe {
    /// Makes the image; `None` if qemu damaged it, as 7.2 does in some compressed writes over other clusters.
    fn make(&self, dir: &Path) -> Option<std::path::PathBuf> {
        let image = dir.join("image.qcow2");
        let mut options = format!("cluster_size={},compat={}", 1u32 << self.cluster_bits, self.compat);
        if self.extended_l2 {
            options += ",extended_l2=on";
        }
        if self.zstd {
            options += ",compression_type=zstd";
        }
        let size = (self.sectors * 512).to_string();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path(&image), &size]);
        let (noise_file, prose_file) = (dir.join("noise"), dir.join("prose"));
        std::fs::write(&noise_file, noise(10 << 20, 1)).unwrap();
        std::fs::write(&prose_file, prose(10 << 20, 2)).unwrap();
        let commands: Vec<String> = self
            .operations
            .iter()
            .map(|operation| self.command(operation, path(&noise_file), path(&prose_file)))
            .collect();
        let is_whole = commands.is_empty() || qemu_io(&image, &commands);
        (is_whole && is_undamaged(&image)).then_some(image)
    }

    fn command(&self, operation: &Operation, noise: &str, prose: &str) -> String {
        let cluster = 1u64 << self.cluster_bits;
        let size = self.sectors * 512;
        let mut start = (operation.start * self.sectors as f64) as u64 * 512;
        let mut len = ((operation.clusters * cluster as f64) as u64).max(512) / 512 * 512;
        let compressed =
            matches!(operation.kind, Kind::Compressed(_) | Kind::CompressedProse | Kind::CompressedNoise);
        if compressed {
            start = start / cluster * cluster;
            len = len.next_multiple_of(cluster);
        }
        let len = len.min(size - start);
        match operation.kind {
            Kind::Pattern(p) => format!("write -q -P {p} {start} {len}"),
            Kind::Noise => format!("write -q -s {noise} {start} {len}"),
            Kind::Prose => format!("write -q -s {prose} {start} {len}"),
            Kind::Zero => format!("write -q -z {start} {len}"),
            Kind::ZeroUnmap => format!("write -q -z -u {start} {len}"),
            Kind::Discard => format!("discard -q {start} {len}"),
            Kind::Compressed(p) => format!("write -q -c -P {p} {start} {len}"),
            Kind::CompressedProse => format!("write -q -c -s {prose} {start} {len}"),
            Kind::CompressedNoise => format!("write -q -c -s {noise} {start} {len}"),
        }
    }
}

/// Whether `qemu-img check` finds nothing worse than leaked clusters, its exit code 3.
fn is_undamaged(image: &Path) -> bool {
    let check = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(image).output().unwrap();
    matches!(check.status.code(), Some(0 | 3))
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        max_shrink_iters: 40,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    }
}

/// The extents must cover the disk without a gap, and what they call zero must be zero in `raw`.
fn assert_extents_are_true(image: &Path, raw: &[u8]) {
    let image = common::open(image).unwrap();
    let mut at = 0;
    while at < image.disk.virtual_size() {
        let extent = image.disk.extent_at(at).unwrap();
        assert_eq!(extent.start, at);
        assert!(extent.len > 0 && extent.end() <= image.disk.virtual_size(), "{extent:?}");
        if !extent.is_data() {
            let bytes = &raw[at as usize..extent.end() as usize];
            assert!(bytes.iter().all(|&b| b == 0), "{extent:?} is not zero");
        }
        at = extent.end();
    }
}

proptest! {
    #![proptest_config(config(96))]

    #[test]
    fn any_image_that_qemu_makes_reads_as_qemu_reads_it(
        recipe in recipes(), workers in 1usize..4, unit_bits in 16u32..23, at in 0.0..1.0f64, len in 1usize..300_000,
    ) {
        let dir = temp_dir();
        let image = recipe.make(dir.path());
        prop_assume!(image.is_some());
        let image = image.unwrap();
        let (ours, theirs) = (dir.path().join("ours.raw"), dir.path().join("theirs.raw"));
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path(&image), path(&theirs)]);
        common::to_raw(&image, &ours, &Options { workers, unit_bytes: 1 << unit_bits }).unwrap();
        assert_same_bytes(&ours, &theirs);

        let raw = std::fs::read(&theirs).unwrap();
        assert_extents_are_true(&image, &raw);
        // A read of any range, not only of whole units.
        let start = (at * raw.len() as f64) as usize;
        let len = len.min(raw.len() - start);
        let mut buf = vec![0xa5; len];
        common::open(&image).unwrap().disk.read_at(&mut buf, start as u64).unwrap();
        prop_assert!(buf == raw[start..start + len]);
    }

    #[test]
    fn any_disk_we_write_as_qcow2_is_sound_and_equal(
        recipe in recipes(),
        cluster_bits in 9u32..=21,
        compression in prop_oneof![Just(Compression::None), Just(Compression::Zlib), Just(Compression::Zstd)],
        workers in 1usize..4,
        unit_bits in 16u32..23,
        preallocate in any::<bool>(),
        more_sectors in prop_oneof![Just(0u64), 1u64..1 << 16],
    ) {
        let dir = temp_dir();
        let image = recipe.make(dir.path());
        prop_assume!(image.is_some());
        let image = image.unwrap();
        let ours = dir.path().join("ours.qcow2");
        let size = recipe.sectors * 512 + more_sectors * 512;
        let write = WriteOptions {
            cluster_size: 1 << cluster_bits,
            compression,
            preallocation: if preallocate && compression == Compression::None { Preallocation::Metadata } else { Preallocation::Off },
            virtual_size_min: size,
        };
        let finished =
            common::to_qcow2(&image, &ours, &write, &Options { workers, unit_bytes: 1 << unit_bits }).unwrap();
        prop_assert_eq!(finished.virtual_size, size);
        prop_assert_eq!(finished.file_bytes, std::fs::metadata(&ours).unwrap().len());
        let (back, theirs) = (dir.path().join("back.raw"), dir.path().join("theirs.raw"));
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path(&image), path(&theirs)]);
        // Not by `qemu-img resize` of the source: that shows what a guest left behind the end of its last cluster.
        std::fs::File::options().write(true).open(&theirs).unwrap().set_len(size).unwrap();
        assert_sound_and_equal(&ours, &theirs, "raw");
        // And we read it back ourselves.
        common::to_raw(&ours, &back, &Options::default()).unwrap();
        assert_same_bytes(&back, &theirs);
    }
}
