//! VMDK: disks that qemu makes read as qemu reads them, disks we write are accepted by qemu, and damage is told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{assert_same_bytes, failure, noise, path, prose, qemu_img, read_through, run, temp_dir};
use dvcr_converter::convert::{self, Options};
use dvcr_converter::error::ErrorKind;
use dvcr_converter::format::Format;
use dvcr_converter::io::{CreateOptions, Value};
use dvcr_converter::progress::Progress;
use dvcr_converter::sink::StreamTarget;
use dvcr_converter::vmdk::{AdapterType, Subformat, WriteOptions};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// Bytes of a grain, and of what a grain table maps, as everybody writes them.
const GRAIN: usize = 64 << 10;
const REACH: usize = 32 << 20;

/// A raw disk: so many sectors, and what is in them.
#[derive(Clone, Debug)]
struct Recipe {
    sectors: usize,
    runs: Vec<Run>,
}

/// Places are shares of the disk, so that they shrink well.
#[derive(Clone, Copy, Debug)]
struct Run {
    content: Content,
    start: f64,
    grains: f64,
}

#[derive(Clone, Copy, Debug)]
enum Content {
    Pattern(u8),
    Noise,
    Prose,
    Zero,
}

fn recipes() -> impl Strategy<Value = Recipe> {
    let content = prop_oneof![
        any::<u8>().prop_map(Content::Pattern),
        Just(Content::Noise),
        Just(Content::Prose),
        Just(Content::Zero),
    ];
    let run = (content, 0.0..1.0f64, 0.0..6.0f64).prop_map(|(content, start, grains)| Run {
        content,
        start,
        grains,
    });
    (0.0..1.0f64, proptest::collection::vec(run, 0..12)).prop_map(|(size, runs)| {
        // Small disks as well as some with three grain tables.
        let sectors = 1 + (size.powi(3) * (2.2 * REACH as f64 / 512.0)) as usize;
        Recipe { sectors, runs }
    })
}

impl Recipe {
    /// First byte and length of a run.
    fn place(&self, run: &Run) -> (usize, usize) {
        let start = (run.start * self.sectors as f64) as usize * 512;
        let len = ((run.grains * GRAIN as f64) as usize).max(512) / 512 * 512;
        (start, len.min(self.sectors * 512 - start))
    }

    fn disk(&self) -> Vec<u8> {
        let mut disk = vec![0; self.sectors * 512];
        for run in &self.runs {
            let (start, len) = self.place(run);
            let place = &mut disk[start..start + len];
            match run.content {
                Content::Pattern(byte) => place.fill(byte),
                Content::Noise => place.copy_from_slice(&noise(len, 1)),
                Content::Prose => place.copy_from_slice(&prose(len, 2)),
                Content::Zero => place.fill(0),
            }
        }
        disk
    }

    /// The raw disk in a sparse file.
    fn raw(&self, dir: &Path) -> PathBuf {
        let raw = dir.join("disk.raw");
        write_sparse(&raw, &self.disk());
        raw
    }
}

fn write_sparse(file: &Path, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let target = std::fs::File::create(file).unwrap();
    target.set_len(bytes.len() as u64).unwrap();
    for (i, chunk) in bytes.chunks(4096).enumerate().filter(|(_, chunk)| chunk.iter().any(|&b| b != 0)) {
        target.write_all_at(chunk, i as u64 * 4096).unwrap();
    }
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        max_shrink_iters: 40,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    }
}

/// The extents must cover the disk without a gap; what they call zero must be zero in `raw`, and where they say a byte
/// is in the file, it must be.
fn assert_extents_are_true(image: &Path, raw: &[u8]) {
    let file = std::fs::read(image).unwrap();
    let image = common::open(image).unwrap();
    let mut at = 0;
    while at < image.disk.virtual_size() {
        let extent = image.disk.extent_at(at).unwrap();
        assert_eq!(extent.start, at);
        assert!(extent.len > 0 && extent.end() <= image.disk.virtual_size(), "{extent:?}");
        let bytes = &raw[at as usize..extent.end() as usize];
        if !extent.is_data() {
            assert!(bytes.iter().all(|&b| b == 0), "{extent:?} is not zero");
        }
        if let Some(host) = extent.host {
            let stored = &file[host as usize..(host as usize + bytes.len()).min(file.len())];
            assert!(bytes.starts_with(stored), "{extent:?} is elsewhere");
        }
        at = extent.end();
    }
}

/// Asserts that qemu finds nothing wrong in `vmdk`, and the disk of `raw` in it.
fn assert_sound_and_equal(vmdk: &Path, raw: &Path) {
    let check = qemu_img(&["check", "-f", "vmdk", path(vmdk)]);
    assert!(check.contains("No errors were found"), "{check}");
    qemu_img(&["compare", "-f", "vmdk", "-F", "raw", path(vmdk), path(raw)]);
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn any_disk_that_qemu_writes_as_vmdk_reads_as_qemu_reads_it(
        recipe in recipes(),
        flavour in 0usize..3,
        workers in 1usize..4,
        unit_bits in 16u32..23,
        zeroed in proptest::collection::vec((0.0..1.0f64, 0.0..4.0f64), 0..4),
        at in 0.0..1.0f64,
        len in 1usize..300_000,
    ) {
        let dir = temp_dir();
        let raw = recipe.raw(dir.path());
        let (image, theirs) = (dir.path().join("image.vmdk"), dir.path().join("theirs.raw"));
        let options = ["subformat=streamOptimized", "subformat=monolithicSparse", "zeroed_grain=on"][flavour];
        qemu_img(&["convert", "-q", "-f", "raw", "-O", "vmdk", "-o", options, path(&raw), path(&image)]);
        if flavour > 0 {
            // In place: zeroed grains, and grains out of order.
            let mut args = vec!["-f".to_owned(), "vmdk".to_owned()];
            for (start, grains) in zeroed {
                let (start, len) = recipe.place(&Run { content: Content::Zero, start, grains });
                args.extend(["-c".to_owned(), format!("write -q -z {start} {len}")]);
                args.extend(["-c".to_owned(), format!("write -q -P 7 {start} 512")]);
            }
            args.push(path(&image).to_owned());
            if args.len() > 3 {
                Command::new("qemu-io").args(&args).output().unwrap();
            }
        }
        qemu_img(&["convert", "-q", "-f", "vmdk", "-O", "raw", path(&image), path(&theirs)]);
        let ours = dir.path().join("ours.raw");
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
    fn any_disk_we_write_as_vmdk_is_sound_and_equal(
        recipe in recipes(), stream in any::<bool>(), workers in 1usize..4, unit_bits in 16u32..23,
    ) {
        let dir = temp_dir();
        let raw = recipe.raw(dir.path());
        let (vmdk, again, back) =
            (dir.path().join("ours.vmdk"), dir.path().join("again.vmdk"), dir.path().join("back.raw"));
        let subformat = if stream { Subformat::StreamOptimized } else { Subformat::MonolithicSparse };
        let write = WriteOptions { subformat, ..WriteOptions::default() };
        let options = Options { workers, unit_bytes: 1 << unit_bits };
        let finished = common::to_image(&raw, &vmdk, &write, &options).unwrap();
        prop_assert_eq!(finished.virtual_size, recipe.sectors as u64 * 512);
        prop_assert_eq!(finished.file_bytes, std::fs::metadata(&vmdk).unwrap().len());
        assert_sound_and_equal(&vmdk, &raw);
        // And we read it back ourselves.
        common::to_raw(&vmdk, &back, &Options::default()).unwrap();
        assert_same_bytes(&back, &raw);
        assert_extents_are_true(&vmdk, &std::fs::read(&raw).unwrap());
        // The same disk gives the same bytes.
        common::to_image(&back, &again, &write, &Options::default()).unwrap();
        assert_same_bytes(&vmdk, &again);
    }
}

/// A disk of 4 MiB with noise, prose and zeros.
fn sample_disk() -> Vec<u8> {
    let mut disk = noise(3 * GRAIN, 1);
    disk.extend(prose(2 * GRAIN + 512, 2));
    disk.resize(2 << 20, 0);
    disk.extend(prose(10 * GRAIN, 3));
    disk.resize(4 << 20, 0);
    disk
}

/// The sample as qemu writes it.
fn theirs(options: &str) -> Vec<u8> {
    let dir = temp_dir();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("disk.vmdk"));
    write_sparse(&raw, &sample_disk());
    qemu_img(&["convert", "-q", "-f", "raw", "-O", "vmdk", "-o", options, path(&raw), path(&image)]);
    std::fs::read(&image).unwrap()
}

/// The sample as we write it.
fn ours(subformat: Subformat) -> Vec<u8> {
    let dir = temp_dir();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("disk.vmdk"));
    write_sparse(&raw, &sample_disk());
    let write = WriteOptions { subformat, ..WriteOptions::default() };
    common::to_image(&raw, &image, &write, &Options::default()).unwrap();
    std::fs::read(&image).unwrap()
}

/// Images of every kind, each made once.
fn flavours() -> &'static [Vec<u8>] {
    static FLAVOURS: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
    FLAVOURS.get_or_init(|| {
        vec![
            theirs("subformat=monolithicSparse"),
            theirs("subformat=streamOptimized"),
            theirs("zeroed_grain=on"),
            ours(Subformat::MonolithicSparse),
            ours(Subformat::StreamOptimized),
        ]
    })
}

const SPARSE: usize = 0;
const STREAM_OF_QEMU: usize = 1;
const ZEROED: usize = 2;
const STREAM: usize = 4;

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

/// Where the grain directory is, in bytes; of a stream with a footer, as that tells.
fn directory(bytes: &[u8]) -> usize {
    match u32_at(bytes, 56) {
        0xffff_ffff => u32_at(bytes, bytes.len() - 1024 + 56) * 512,
        sector => sector * 512,
    }
}

/// Where the first grain table is.
fn table(bytes: &[u8]) -> usize {
    u32_at(bytes, directory(bytes)) * 512
}

/// Where the first grain is.
fn grain(bytes: &[u8]) -> usize {
    u32_at(bytes, table(bytes)) * 512
}

fn patched(flavour: usize, patches: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = flavours()[flavour].clone();
    for (at, patch) in patches {
        bytes[*at..at + patch.len()].copy_from_slice(patch);
    }
    bytes
}

fn assert_refused(bytes: Vec<u8>, kind: ErrorKind, says: &str) {
    let error = failure(read_through(bytes));
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

/// A sparse extent whose descriptor is `text`.
fn with_descriptor(text: &str) -> Vec<u8> {
    let mut descriptor = text.as_bytes().to_vec();
    descriptor.resize(20 * 512, 0);
    patched(SPARSE, &[(512, &descriptor)])
}

#[test]
fn every_flavour_holds_the_sample() {
    for bytes in flavours() {
        assert!(read_through(bytes.clone()).unwrap() == sample_disk());
    }
}

#[test]
fn what_the_header_says_is_told_as_qemu_tells_it() {
    let dir = temp_dir();
    for (flavour, bytes) in flavours().iter().enumerate() {
        let image = dir.path().join("image.vmdk");
        std::fs::write(&image, bytes).unwrap();
        let theirs: serde_json::Value =
            serde_json::from_str(&qemu_img(&["info", "--output=json", path(&image)])).unwrap();
        let info = common::open(&image).unwrap().info;
        assert_eq!(info.format, Format::Vmdk);
        assert_eq!(theirs["virtual-size"], info.virtual_size);
        assert_eq!(theirs["cluster-size"], info.details.cluster_size.unwrap());
        assert_eq!(theirs["dirty-flag"], info.details.dirty.unwrap());
        let data = &theirs["format-specific"]["data"];
        let compare = |theirs: &serde_json::Value, name: &str, ours: &Value| match ours {
            Value::Bool(ours) => assert_eq!(theirs[name], *ours, "{name}"),
            Value::Number(ours) => assert_eq!(theirs[name], *ours, "{name}"),
            Value::Text(ours) => assert_eq!(theirs[name], *ours, "{name}"),
            Value::List(_) => {}
        };
        for (name, ours) in &info.details.specific {
            compare(data, name, ours);
            if let Value::List(extents) = ours {
                for (name, ours) in &extents[0] {
                    // qemu tells no compression that is off.
                    if *ours != Value::Bool(false) {
                        compare(&data["extents"][0], name, ours);
                    }
                }
            }
        }
        let names: Vec<_> = info.details.specific.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["cid", "parent-cid", "create-type", "extents"], "{flavour}");
    }
}

#[test]
fn options_are_those_of_qemu_img() {
    let dir = temp_dir();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("disk.vmdk"));
    write_sparse(&raw, &sample_disk());
    let write = WriteOptions {
        subformat: Subformat::StreamOptimized,
        adapter_type: AdapterType::LsiLogic,
        hw_version: 13,
        tools_version: 10,
    };
    common::to_image(&raw, &image, &write, &Options::default()).unwrap();
    assert_sound_and_equal(&image, &raw);
    let text = String::from_utf8_lossy(&std::fs::read(&image).unwrap()[512..21 * 512]).into_owned();
    for line in [
        "createType=\"streamOptimized\"",
        "RW 8192 SPARSE ",
        "ddb.virtualHWVersion = \"13\"",
        "ddb.adapterType = \"lsilogic\"",
        "ddb.geometry.heads = \"255\"",
        "ddb.toolsVersion = \"10\"",
    ] {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn a_stream_goes_down_a_pipe_and_a_sparse_file_does_not() {
    let dir = temp_dir();
    let raw = dir.path().join("disk.raw");
    write_sparse(&raw, &sample_disk());
    for (subformat, streams) in [(Subformat::StreamOptimized, true), (Subformat::MonolithicSparse, false)] {
        let write = WriteOptions { subformat, ..WriteOptions::default() };
        assert_eq!((write.is_stream(), write.needs_size()), (streams, true));
        let (mut piped, options, progress) = (Vec::new(), Options::default(), Progress::default());
        let mut target = StreamTarget::new(&mut piped, 0);
        let source = common::open(&raw).unwrap();
        let made = convert::to_image(source.disk.as_ref(), &mut target, &write, &options, &progress);
        if !streams {
            assert_eq!(failure(made).kind(), ErrorKind::Target);
            continue;
        }
        target.finish().unwrap();
        assert_eq!(piped.len() as u64, made.unwrap().file_bytes);
        assert!(piped == flavours()[STREAM]);
    }
}

#[test]
fn disks_that_the_format_cannot_hold_are_refused() {
    for subformat in [Subformat::StreamOptimized, Subformat::MonolithicSparse] {
        let write = WriteOptions { subformat, ..WriteOptions::default() };
        for (size, kind) in [
            (Some(1 << 60), ErrorKind::Limit),
            (Some(u64::MAX / 512 * 512), ErrorKind::Limit),
            (Some(0), ErrorKind::Unsupported),
            (None, ErrorKind::Unsupported),
        ] {
            let mut target = StreamTarget::new(Vec::new(), 0);
            assert_eq!(failure(write.create(&mut target, size).map(|_| ())).kind(), kind, "{size:?}");
        }
    }
}

/// A disk that lies behind its descriptor in the same file, which qemu reads if the name is right.
#[test]
fn a_flat_extent_inside_the_same_file_is_read() {
    let dir = temp_dir();
    let disk = noise(1 << 20, 7);
    let (flat, raw) = (dir.path().join("flat.vmdk"), dir.path().join("disk.raw"));
    std::fs::write(&raw, &disk).unwrap();
    let text = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
        RW 2048 FLAT \"flat.vmdk\" 8\n";
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(4096, 0);
    bytes.extend(&disk);
    std::fs::write(&flat, &bytes).unwrap();
    qemu_img(&["compare", "-f", "vmdk", "-F", "raw", path(&flat), path(&raw)]);
    assert!(read_through(bytes.clone()).unwrap() == disk);
    assert_extents_are_true(&flat, &disk);

    // In a sparse extent without grains the descriptor says the same.
    let mut embedded = with_descriptor(&text.replace(" 8\n", " 21\n"));
    embedded[12..20].fill(0);
    embedded[64..72].fill(0);
    embedded.truncate(21 * 512);
    embedded.extend(&disk);
    assert!(read_through(embedded).unwrap() == disk);

    // Cut short, it would have to go on elsewhere.
    bytes.truncate(bytes.len() - 1);
    assert_refused(bytes, ErrorKind::ForeignFile, "flat.vmdk");
}

#[test]
fn extents_in_other_files_are_refused_by_name() {
    let head = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n";
    for (lines, says) in [
        ("RW 8192 FLAT \"disk-flat.vmdk\" 0\n", "disk-flat.vmdk"),
        ("RW 8 FLAT \"/etc/passwd\" 1\n", "/etc/passwd"),
        ("RW 8192 SPARSE \"disk-s001.vmdk\"\n", "disk-s001.vmdk"),
        ("RW 8192 VMFS \"disk-flat.vmdk\"\n", "VMFS"),
        ("RW 8192 VMFSSPARSE \"disk-delta.vmdk\"\n", "VMFSSPARSE"),
        ("RW 8192 SESPARSE \"disk-sesparse.vmdk\"\n", "SESPARSE"),
        ("RW 8192 VMFSRDM \"disk-rdm.vmdk\"\n", "VMFSRDM"),
        ("RW 1 FLAT \"a\" 0\nRW 1 FLAT \"b\" 0\n", "2 extents"),
    ] {
        let text = format!("{head}{lines}");
        let mut bytes = text.clone().into_bytes();
        bytes.resize(4096, 0);
        assert_refused(bytes, ErrorKind::ForeignFile, says);
        if !lines.contains("-s001") {
            assert_refused(with_descriptor(&text), ErrorKind::ForeignFile, says);
        }
    }
    for subformat in ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let dir = temp_dir();
        let image = dir.path().join("disk.vmdk");
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "vmdk",
            "-o",
            &format!("subformat={subformat}"),
            path(&image),
            "4M",
        ]);
        assert_eq!(failure(common::open(&image)).kind(), ErrorKind::ForeignFile, "{subformat}");
    }
}

#[test]
fn a_parent_is_refused_by_name() {
    let dir = temp_dir();
    let (base, child) = (dir.path().join("base.vmdk"), dir.path().join("child.vmdk"));
    qemu_img(&["create", "-q", "-f", "vmdk", path(&base), "4M"]);
    qemu_img(&["create", "-q", "-f", "vmdk", "-b", path(&base), "-F", "vmdk", path(&child)]);
    assert_refused(std::fs::read(&child).unwrap(), ErrorKind::ForeignFile, "base.vmdk");
}

#[test]
fn extents_of_esx_servers_are_named() {
    for magic in [&b"COWD\x01\0\0\0"[..], &0xcafe_babe_u64.to_le_bytes()] {
        let mut bytes = magic.to_vec();
        bytes.resize(4096, 0);
        assert_refused(bytes, ErrorKind::Unsupported, "vmdk");
    }
}

#[test]
fn descriptors_of_gigabytes_are_refused() {
    let begun = std::time::Instant::now();
    for sectors in [2049u64, 1 << 22, u64::MAX] {
        let bytes = patched(SPARSE, &[(36, &sectors.to_le_bytes())]);
        assert_refused(bytes, ErrorKind::Limit, "descriptor");
    }
    let dir = temp_dir();
    let image = dir.path().join("endless.vmdk");
    let line = b"# Disk DescriptorFile\n".repeat(100_000);
    std::fs::write(&image, &line).unwrap();
    assert_eq!(failure(common::open(&image)).kind(), ErrorKind::Limit);
    assert!(begun.elapsed().as_secs() < 5);
}

#[test]
fn headers_that_contradict_themselves_are_refused() {
    let le = |n: u64| n.to_le_bytes();
    for (at, value, kind, says) in [
        (4, &4u32.to_le_bytes()[..], ErrorKind::Unsupported, "version 4"),
        (4, &0u32.to_le_bytes(), ErrorKind::Unsupported, "version 0"),
        (12, &le(u64::MAX), ErrorKind::Limit, "limit"),
        (12, &le(1 << 37), ErrorKind::Corrupt, "directory"),
        (20, &le(0), ErrorKind::Corrupt, "grain size"),
        (20, &le(127), ErrorKind::Corrupt, "grain size"),
        (20, &le(1 << 40), ErrorKind::Unsupported, "grains"),
        (28, &le(1 << 60), ErrorKind::Corrupt, "descriptor"),
        (44, &0u32.to_le_bytes(), ErrorKind::Corrupt, "entries"),
        (44, &513u32.to_le_bytes(), ErrorKind::Corrupt, "entries"),
        (56, &le(0), ErrorKind::Corrupt, "where the header is"),
        (56, &le(1 << 30), ErrorKind::Corrupt, "beyond the end"),
        (56, &le(1 << 60), ErrorKind::Corrupt, "directory offset"),
        (56, &le(u64::MAX), ErrorKind::Corrupt, "footer"),
        (64, &le(1 << 30), ErrorKind::Corrupt, "cut short"),
        (73, b"\r\n \n", ErrorKind::Corrupt, "as text"),
        (77, &2u16.to_le_bytes(), ErrorKind::Unsupported, "compression 2"),
    ] {
        assert_refused(patched(SPARSE, &[(at, value)]), kind, says);
    }
    // A directory that the file backs, but that is larger than what may be held.
    let tiny = [(12, &le(1 << 36)[..]), (20, &le(1)[..]), (44, &1u32.to_le_bytes()[..])];
    assert_refused(patched(SPARSE, &tiny), ErrorKind::Limit, "directory");
}

#[test]
fn footers_that_contradict_the_header_are_refused() {
    let bytes = &flavours()[STREAM];
    let footer = bytes.len() - 1024;
    assert_eq!(&bytes[footer..footer + 4], b"KDMV");
    for (at, value, says) in [
        (footer, &b"VMDK"[..], "does not end in a footer"),
        (footer - 512 + 12, &[4], "does not end in a footer"),
        (footer + 512 + 12, &[1], "does not end in a footer"),
        (footer + 56, &[0xff; 8], "does not tell"),
        (footer + 12, &[1], "different disks"),
    ] {
        assert_refused(patched(STREAM, &[(at, value)]), ErrorKind::Corrupt, says);
    }
    let mut cut = bytes.clone();
    cut.truncate(1000);
    assert_refused(cut, ErrorKind::Corrupt, "cut short");
}

#[test]
fn overlapping_shared_and_self_referencing_tables_are_refused() {
    let bytes = &flavours()[SPARSE];
    let (directory, table) = (directory(bytes), table(bytes));
    let sector = |at: usize| (at as u32 / 512).to_le_bytes();
    assert_refused(
        patched(SPARSE, &[(directory, &sector(directory))]),
        ErrorKind::Corrupt,
        "the directory itself",
    );
    let beyond = (bytes.len() as u32 / 512).to_le_bytes();
    assert_refused(patched(SPARSE, &[(directory, &beyond)]), ErrorKind::Corrupt, "beyond the end");
    // A disk of two tables in a file with a directory for one: the second entry is the padding after the first.
    let large = (REACH as u64 / 512 * 2).to_le_bytes();
    for second in [table, table + 512] {
        let patches = [(12, &large[..]), (directory + 4, &sector(second)[..])];
        assert_refused(patched(SPARSE, &patches), ErrorKind::Corrupt, "overlap or are shared");
    }
    for flavour in [SPARSE, STREAM] {
        let bytes = &flavours()[flavour];
        let (directory, table) = (self::directory(bytes), self::table(bytes));
        for (target, says) in [(512, "descriptor"), (table, "grain table"), (directory, "grain directory")] {
            assert_refused(patched(flavour, &[(table, &sector(target))]), ErrorKind::Corrupt, says);
        }
        assert_refused(patched(flavour, &[(table, &[0xff; 4])]), ErrorKind::Corrupt, "beyond the end");
    }
    // Sector 1 is no place for a grain, but where the flag says so it means zeros.
    assert_refused(patched(SPARSE, &[(table, &1u32.to_le_bytes())]), ErrorKind::Corrupt, "descriptor");
    let zeroed_table = self::table(&flavours()[ZEROED]);
    let read = read_through(patched(ZEROED, &[(zeroed_table, &1u32.to_le_bytes())])).unwrap();
    assert!(read[..GRAIN].iter().all(|&b| b == 0) && read[GRAIN..] == sample_disk()[GRAIN..]);
}

/// CVE-2026-2243: the length in a grain's marker led qemu beyond its buffer.
#[test]
fn cve_2026_2243_a_compressed_grain_out_of_bounds_is_refused() {
    for flavour in [STREAM_OF_QEMU, STREAM] {
        let marker = grain(&flavours()[flavour]);
        for bytes in [0u32, 2 * GRAIN as u32 + 1, 1 << 31, u32::MAX - 11, u32::MAX] {
            let bytes = patched(flavour, &[(marker + 8, &bytes.to_le_bytes())]);
            assert_refused(bytes, ErrorKind::Corrupt, "its stream");
        }
        // As long as allowed, but the file ends before that.
        let mut cut = flavours()[flavour].clone();
        let last = cut.len() - 512;
        cut[last..].fill(0);
        cut[last + 8..last + 12].copy_from_slice(&(2 * GRAIN as u32).to_le_bytes());
        if flavour == STREAM_OF_QEMU {
            let table = table(&cut);
            cut[table..table + 4].copy_from_slice(&(last as u32 / 512).to_le_bytes());
            assert_refused(cut, ErrorKind::Corrupt, "beyond the file");
        }
        // Longer than the stream: what follows is not looked at, as in qemu.
        let long = patched(flavour, &[(marker + 8, &(2 * GRAIN as u32).to_le_bytes())]);
        assert!(read_through(long).unwrap() == sample_disk());
    }
}

#[test]
fn a_grain_of_another_place_and_a_damaged_one_are_refused() {
    let marker = grain(&flavours()[STREAM]);
    assert_refused(patched(STREAM, &[(marker, &[128])]), ErrorKind::Corrupt, "that of sector 128");
    assert_refused(patched(STREAM, &[(marker + 12, &[0; 4])]), ErrorKind::Corrupt, "cannot be decoded");
    // All grains at one place: only one of them belongs there.
    let table = table(&flavours()[STREAM]);
    let same = flavours()[STREAM][table..table + 4].repeat(64);
    assert_refused(patched(STREAM, &[(table, &same)]), ErrorKind::Corrupt, "marker");
}

#[test]
fn grains_that_decode_to_more_or_less_than_a_grain_are_refused() {
    let marker = grain(&flavours()[STREAM]);
    for len in [GRAIN - 1, GRAIN + 1] {
        let mut stream = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
        std::io::Write::write_all(&mut stream, &vec![0; len]).unwrap();
        let stream = stream.finish().unwrap();
        let bytes = (stream.len() as u32).to_le_bytes();
        let patches = [(marker + 8, &bytes[..]), (marker + 12, &stream[..])];
        assert_refused(patched(STREAM, &patches), ErrorKind::Corrupt, "decode");
    }
}

#[test]
fn a_file_cut_short_anywhere_ends_in_an_error_or_the_same_disk() {
    for bytes in flavours() {
        let places = (0..64).map(|i| i * bytes.len() / 64).chain([0, 3, 4, 511, 512, 513, bytes.len() - 1]);
        for len in places {
            // Less than a magic number is a raw disk; what no guest sees of the last grain may be missing.
            if let Ok(read) = read_through(bytes[..len].to_vec()) {
                assert!(len < 4 || read == sample_disk(), "{len} of {}", bytes.len());
            }
        }
    }
}

#[test]
fn a_stream_inside_gz_is_read_in_few_passes() {
    let dir = temp_dir();
    let (raw, back) = (dir.path().join("disk.raw"), dir.path().join("back.raw"));
    // Two tables, the first with more stored bytes behind it than a forward reader keeps.
    let mut disk = noise(30 << 20, 5);
    disk.resize(34 << 20, 0);
    disk.extend(prose(1 << 20, 6));
    write_sparse(&raw, &disk);
    for subformat in [Subformat::StreamOptimized, Subformat::MonolithicSparse] {
        let image = dir.path().join("disk.vmdk");
        let write = WriteOptions { subformat, ..WriteOptions::default() };
        common::to_image(&raw, &image, &write, &Options::default()).unwrap();
        run("gzip", &["-1", "-k", "-f", path(&image)]);
        let packed = dir.path().join("disk.vmdk.gz");
        let progress = Progress::default();
        let (options, limits) = (Options::default(), dvcr_converter::limits::Limits::default());
        let output = dvcr_converter::file::Output::Raw;
        dvcr_converter::file::convert(&packed, &back, output, &options, &limits, &progress).unwrap();
        assert_same_bytes(&back, &raw);
    }
}

/// Where the tables of an image are: the places worth damaging.
fn metadata(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let (directory, table, grain) = (directory(bytes), table(bytes), grain(bytes));
    let end = bytes.len();
    vec![
        0..80,
        512..1024,
        directory..directory + 8,
        table..table + 260,
        grain..grain + 32,
        end - 1536..end,
        0..end,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_never_panics_and_ends_soon(
        flavour in 0usize..5,
        damage in proptest::collection::vec((0usize..7, 0.0..1.0f64, any::<u8>(), 1usize..9), 1..6),
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
