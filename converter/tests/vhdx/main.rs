//! VHDX images made by qemu, read by us and compared with qemu; the same disks written by us and judged by qemu.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[path = "../common/mod.rs"]
mod common;

mod image;
mod log;
mod malformed;

use std::path::{Path, PathBuf};

use common::{assert_same_bytes, noise, path, qemu_img, run, temp_dir};
use dvcr_converter::convert::{self, Options};
use dvcr_converter::error::ErrorKind;
use dvcr_converter::format::{self, Format};
use dvcr_converter::io::{Extent, ExtentKind, Value};
use dvcr_converter::progress::Progress;
use dvcr_converter::sink::ImageTarget;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

const MIB: u64 = 1 << 20;

/// How a test image is made: `qemu-img create` with these, then the writes.
#[derive(Clone, Debug)]
struct Recipe {
    fixed: bool,
    block_mib: u64,
    state_zero: bool,
    sectors: u64,
    writes: Vec<Write>,
}

/// Places are shares of the disk, so that they shrink well.
#[derive(Clone, Copy, Debug)]
struct Write {
    /// `None` for noise.
    pattern: Option<u8>,
    start: f64,
    kib: u64,
}

fn recipes() -> impl Strategy<Value = Recipe> {
    let write = (proptest::option::of(any::<u8>()), 0.0..1.0f64, 1u64..3000)
        .prop_map(|(pattern, start, kib)| Write { pattern, start, kib });
    let writes = proptest::collection::vec(write, 0..8);
    (any::<bool>(), 0u32..4, any::<bool>(), 1u64..(24 * MIB / 512), writes).prop_map(
        |(fixed, block_bits, state_zero, sectors, writes)| Recipe {
            fixed,
            block_mib: 1 << block_bits,
            state_zero,
            sectors,
            writes,
        },
    )
}

impl Recipe {
    fn options(&self) -> String {
        format!(
            "subformat={},block_size={}M,block_state_zero={}",
            if self.fixed { "fixed" } else { "dynamic" },
            self.block_mib,
            if self.state_zero { "on" } else { "off" },
        )
    }

    fn make(&self, dir: &Path) -> PathBuf {
        let image = dir.join("image.vhdx");
        let size = self.sectors * 512;
        qemu_img(&["create", "-q", "-f", "vhdx", "-o", &self.options(), path(&image), &size.to_string()]);
        let noisy = dir.join("noise");
        std::fs::write(&noisy, noise(3 << 20, 1)).unwrap();
        let mut commands = Vec::new();
        for Write { pattern, start, kib } in &self.writes {
            let start = (start * self.sectors as f64) as u64 * 512;
            let len = (kib * 1024).min(size - start);
            commands.push(match pattern {
                Some(value) => format!("write -q -P {value} {start} {len}"),
                None => format!("write -q -s {} {start} {len}", path(&noisy)),
            });
        }
        qemu_io(&image, &commands);
        image
    }
}

fn qemu_io(image: &Path, commands: &[String]) {
    let mut args = vec!["-f", "vhdx"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(path(image));
    if !commands.is_empty() {
        assert_eq!(run("qemu-io", &args), "");
    }
}

/// Converts with our engine to a VHDX file.
fn to_vhdx(source: &Path, target: &Path, options: &[(&str, &str)], engine: &Options) {
    let source = common::open(source).unwrap();
    let create = format::create_options(Format::Vhdx, false, options).unwrap();
    let mut file = ImageTarget::create(target).unwrap();
    let finished =
        convert::to_image(source.disk.as_ref(), &mut file, create.as_ref(), engine, &Progress::default())
            .unwrap();
    file.finish(&finished).unwrap();
    assert_eq!(finished.virtual_size, source.info.virtual_size);
    assert_eq!(finished.file_bytes, std::fs::metadata(target).unwrap().len());
}

/// Asserts that qemu finds no fault in a VHDX file, and that it holds the raw disk.
fn assert_sound_and_equal(image: &Path, raw: &Path) {
    let check = qemu_img(&["check", "-f", "vhdx", path(image)]);
    assert!(check.contains("No errors were found"), "{check}");
    qemu_img(&["compare", "-f", "vhdx", "-F", "raw", path(image), path(raw)]);
}

/// The extents must cover the disk without a gap, what they call zero must be zero in `raw`, and what they say of the
/// place in the file true.
fn assert_extents_are_true(image: &Path, raw: &[u8]) -> Vec<Extent> {
    let file = std::fs::read(image).unwrap();
    let disk = common::open(image).unwrap().disk;
    let mut extents = Vec::new();
    let mut at = 0;
    while at < disk.virtual_size() {
        let extent = disk.extent_at(at).unwrap();
        assert!(extent.start == at && extent.len > 0 && extent.end() <= disk.virtual_size(), "{extent:?}");
        let bytes = &raw[at as usize..extent.end() as usize];
        if !extent.is_data() {
            assert!(bytes.iter().all(|&b| b == 0), "{extent:?} is not zero");
        }
        if let Some(host) = extent.host {
            let there = &file[host as usize..][..bytes.len()];
            assert!(there == bytes, "{extent:?} is elsewhere");
        }
        at = extent.end();
        extents.push(extent);
    }
    extents
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        max_shrink_iters: 30,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn any_image_that_qemu_makes_reads_as_qemu_reads_it(
        recipe in recipes(), workers in 1usize..4, unit_bits in 16u32..23, at in 0.0..1.0f64, len in 1usize..3_000_000,
    ) {
        let dir = temp_dir();
        let image = recipe.make(dir.path());
        let (ours, theirs) = (dir.path().join("ours.raw"), dir.path().join("theirs.raw"));
        qemu_img(&["convert", "-f", "vhdx", "-O", "raw", path(&image), path(&theirs)]);
        common::to_raw(&image, &ours, &Options { workers, unit_bytes: 1 << unit_bits }).unwrap();
        assert_same_bytes(&ours, &theirs);
        let raw = std::fs::read(&theirs).unwrap();
        assert_extents_are_true(&image, &raw);
        // A read that begins and ends anywhere.
        let at = (at * raw.len() as f64) as usize;
        let len = len.min(raw.len() - at);
        let mut buf = vec![1; len];
        common::open(&image).unwrap().disk.read_at(&mut buf, at as u64).unwrap();
        prop_assert!(buf == raw[at..at + len]);
    }

    #[test]
    fn any_disk_that_we_write_is_accepted_by_qemu_and_equal(
        recipe in recipes(), fixed in any::<bool>(), block_mib in prop_oneof![Just(0u64), Just(1), Just(2), Just(16)],
        log_mib in 0u64..3, workers in 1usize..4, unit_bits in 16u32..23,
    ) {
        let dir = temp_dir();
        let (ours, theirs) = (dir.path().join("ours.vhdx"), dir.path().join("theirs.raw"));
        let image = recipe.make(dir.path());
        qemu_img(&["convert", "-f", "vhdx", "-O", "raw", path(&image), path(&theirs)]);
        let (block_size, log_size) = (format!("{block_mib}M"), format!("{log_mib}M"));
        let subformat = if fixed { "fixed" } else { "dynamic" };
        let state_zero = if recipe.state_zero { "on" } else { "off" };
        let options = [
            ("subformat", subformat), ("block_size", &block_size), ("log_size", &log_size), ("block_state_zero", state_zero),
        ];
        to_vhdx(&image, &ours, &options, &Options { workers, unit_bytes: 1 << unit_bits });
        assert_sound_and_equal(&ours, &theirs);
        // And we read it back ourselves.
        let back = dir.path().join("back.raw");
        common::to_raw(&ours, &back, &Options::default()).unwrap();
        assert_same_bytes(&back, &theirs);
        assert_extents_are_true(&ours, &std::fs::read(&theirs).unwrap());
        let info = common::open(&ours).unwrap().info;
        prop_assert_eq!(info.details.cluster_size, Some(if block_mib == 0 { 8 } else { block_mib } * MIB));
        prop_assert!(info.details.specific.contains(&("subformat", Value::from(subformat))));
    }
}

#[test]
fn info_tells_what_qemu_tells() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    for (size, block) in [("512M", 8), ("2G", 16), ("200G", 32), ("40T", 64)] {
        qemu_img(&["create", "-q", "-f", "vhdx", path(&image), size]);
        let info = common::open(&image).unwrap().info;
        assert_eq!(info.format, Format::Vhdx);
        assert_eq!(info.details.cluster_size, Some(block * MIB));
        assert_eq!(info.details.dirty, Some(false));
        let theirs = qemu_img(&["info", "--output=json", path(&image)]);
        assert!(theirs.contains(&format!("\"virtual-size\": {},", info.virtual_size)), "{theirs}");
        assert!(theirs.contains(&format!("\"cluster-size\": {},", block * MIB)), "{theirs}");
        // What we write has the same block sizes.
        let ours = dir.path().join("ours");
        to_vhdx(&image, &ours, &[], &Options::default());
        assert_eq!(common::open(&ours).unwrap().info.details.cluster_size, Some(block * MIB));
        qemu_img(&["check", "-q", "-f", "vhdx", path(&ours)]);
    }
}

/// With blocks of 1 MiB and sectors of 512 bytes the entry of a sector bitmap comes after every 4 GiB.
#[test]
fn a_disk_of_several_chunks_reads_as_qemu_writes_it_and_the_other_way_round() {
    let dir = temp_dir();
    let (image, ours) = (dir.path().join("image"), dir.path().join("ours"));
    qemu_img(&["create", "-q", "-f", "vhdx", "-o", "block_size=1M", path(&image), "8200M"]);
    let places = [0u8, 1, 2, 3, 4, 5].map(|n| (n + 1, [0, 4094, 4095, 4096, 8191, 8192][usize::from(n)]));
    let each = |verb: &str| places.map(|(value, mib)| format!("{verb} -q -P {value} {mib}M 1M"));
    qemu_io(&image, &each("write"));
    // The whole disk through qemu would take long: only what should be data, and that the rest is none.
    to_vhdx(&image, &ours, &[("block_size", "1M")], &Options::default());
    qemu_img(&["check", "-q", "-f", "vhdx", path(&ours)]);
    qemu_io(&ours, &each("read"));
    for image in [image, ours] {
        let disk = common::open(&image).unwrap().disk;
        let mut data = Vec::new();
        let mut at = 0;
        while at < disk.virtual_size() {
            let extent = disk.extent_at(at).unwrap();
            if extent.is_data() {
                data.extend((at / MIB..extent.end() / MIB).map(|mib| mib as i32));
            }
            at = extent.end();
        }
        assert_eq!(data, places.map(|(_, mib)| mib));
        for (value, mib) in places {
            let mut buf = vec![0; MIB as usize];
            disk.read_at(&mut buf, mib as u64 * MIB).unwrap();
            assert!(buf.iter().all(|&b| b == value), "{mib}");
        }
    }
}

#[test]
fn sectors_of_4096_bytes_are_read() {
    let dir = temp_dir();
    let (image, raw) = (dir.path().join("image"), dir.path().join("raw"));
    // Chunks are eight times as large then: all of this disk is one.
    qemu_img(&["create", "-q", "-f", "vhdx", "-o", "block_size=1M", path(&image), "8G"]);
    qemu_io(&image, &["write -q -P 7 0 1M".to_owned(), "write -q -P 8 4095M 1M".to_owned()]);
    common::to_raw(&image, &raw, &Options::default()).unwrap();
    let mut bytes = std::fs::read(&image).unwrap();
    image::set_metadata_item(&mut bytes, &image::LOGICAL_SECTOR_SIZE, &4096u32.to_le_bytes());
    std::fs::write(&image, &bytes).unwrap();
    let opened = common::open(&image).unwrap();
    assert!(opened.info.details.specific.contains(&("logical-sector-size", Value::from(4096))));
    drop(opened);
    let again = dir.path().join("again");
    common::to_raw(&image, &again, &Options::default()).unwrap();
    qemu_img(&["compare", "-s", "-f", "raw", "-F", "raw", path(&again), path(&raw)]);
}

#[test]
fn zeros_inside_a_block_take_no_room_and_are_passed_over() {
    let dir = temp_dir();
    let (raw, ours) = (dir.path().join("raw"), dir.path().join("ours"));
    let mut bytes = vec![0; 64 << 20];
    bytes[(5 << 20)..(5 << 20) + 4096].fill(1);
    bytes[(31 << 20)..(31 << 20) + 4096].fill(2);
    std::fs::write(&raw, &bytes).unwrap();
    for subformat in ["dynamic", "fixed"] {
        to_vhdx(&raw, &ours, &[("block_size", "32M"), ("subformat", subformat)], &Options::default());
        assert_sound_and_equal(&ours, &raw);
        let allocated = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&ours).unwrap()) * 512;
        assert!(allocated < 4 * MIB, "{subformat}: {allocated}");
        let extents = assert_extents_are_true(&ours, &bytes);
        let data: u64 = extents.iter().filter(|e| e.is_data()).map(|e| e.len).sum();
        assert!(data <= MIB, "{subformat}: {extents:?}");
    }
}

#[test]
fn the_same_disk_gives_the_same_bytes_and_another_one_another_identity() {
    let dir = temp_dir();
    let raw = dir.path().join("raw");
    let identity = |name: &str, workers: usize| {
        let ours = dir.path().join(name);
        to_vhdx(&raw, &ours, &[], &Options { workers, ..Options::default() });
        let details = common::open(&ours).unwrap().info.details;
        let id = details.specific.into_iter().find(|(name, _)| *name == "virtual-disk-id").unwrap().1;
        (std::fs::read(&ours).unwrap(), id)
    };
    std::fs::write(&raw, noise(5 << 20, 3)).unwrap();
    let (first, again) = (identity("a", 1), identity("b", 4));
    assert!(first == again);
    std::fs::write(&raw, noise(5 << 20, 4)).unwrap();
    assert_ne!(identity("c", 2).1, first.1);
}

#[test]
fn a_block_that_is_not_stored_is_told_as_asked_for() {
    let dir = temp_dir();
    let (raw, ours) = (dir.path().join("raw"), dir.path().join("ours"));
    std::fs::write(&raw, vec![0; 1 << 20]).unwrap();
    for (value, kind) in [("on", ExtentKind::Zero), ("off", ExtentKind::Hole)] {
        to_vhdx(&raw, &ours, &[("block_state_zero", value)], &Options::default());
        assert_eq!(common::open(&ours).unwrap().disk.extent_at(0).unwrap().kind, kind);
    }
}

#[test]
fn options_that_no_file_can_have_are_refused() {
    for (compress, name, value, says) in [
        (false, "block_size", "3M", "power of two"),
        (false, "block_size", "512M", "power of two"),
        (false, "block_size", "64K", "power of two"),
        (false, "log_size", "4G", "below 4G"),
        (false, "subformat", "differencing", "dynamic or fixed"),
        (false, "cluster_size", "64K", "block_size"),
        (true, "log_size", "1M", "no compression"),
    ] {
        let error = common::failure(format::create_options(Format::Vhdx, compress, &[(name, value)]));
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn a_disk_that_is_too_large_is_refused_before_anything_is_written() {
    let dir = temp_dir();
    for (options, size) in [(vec![], 65u64 << 40), (vec![("block_size", "1M")], 64 << 40)] {
        let create = format::create_options(Format::Vhdx, false, &options).unwrap();
        let mut file = ImageTarget::create(&dir.path().join("ours")).unwrap();
        let error = common::failure(create.create(&mut file, Some(size)));
        assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
    }
}

#[test]
fn a_vhdx_image_inside_a_wrapper_is_converted_too() {
    let dir = temp_dir();
    let recipe = Recipe {
        fixed: false,
        block_mib: 2,
        state_zero: true,
        sectors: 20_000,
        writes: vec![
            Write { pattern: None, start: 0.1, kib: 2000 },
            Write { pattern: Some(3), start: 0.7, kib: 9 },
        ],
    };
    let image = recipe.make(dir.path());
    let (ours, theirs) = (dir.path().join("ours.raw"), dir.path().join("theirs.raw"));
    qemu_img(&["convert", "-f", "vhdx", "-O", "raw", path(&image), path(&theirs)]);
    run("gzip", &["-k", path(&image)]);
    let wrapped = dir.path().join("image.vhdx.gz");
    dvcr_converter::file::convert(
        &wrapped,
        &ours,
        dvcr_converter::file::Output::Raw,
        &Options::default(),
        &Default::default(),
        &Progress::default(),
    )
    .unwrap();
    assert_same_bytes(&ours, &theirs);
}
