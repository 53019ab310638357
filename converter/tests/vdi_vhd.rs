//! VDI and VHD: images made by qemu, read by us and compared with qemu; images written by us and judged by qemu; and
//! damage of every kind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::{assert_same_bytes, failure, image_path, noise, path, prose, qemu_img, run, temp_dir};
use dvcr_converter::convert::{self, Options};
use dvcr_converter::error::ErrorKind;
use dvcr_converter::file::{self, Output};
use dvcr_converter::format::{self, Format, create_options};
use dvcr_converter::io::{ExtentKind, Finished, ReadAt};
use dvcr_converter::limits::Limits;
use dvcr_converter::plain::PlainReader;
use dvcr_converter::progress::Progress;
use dvcr_converter::sink::{ImageTarget, StreamTarget};
use dvcr_converter::{Error, Result};
use proptest::prelude::*;

/// The flavours: format and its options, as qemu-img has them, and ours.
const FLAVOURS: [(&str, &str); 6] = [
    ("vdi", "static=off"),
    ("vdi", "static=on"),
    ("vpc", "subformat=dynamic,force_size=on"),
    ("vpc", "subformat=dynamic,force_size=off"),
    ("vpc", "subformat=fixed,force_size=on"),
    ("vpc", "subformat=fixed,force_size=off"),
];

/// An image file in memory.
struct Bytes(Vec<u8>);

impl ReadAt for Bytes {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let bytes = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)?.get(..buf.len()));
        buf.copy_from_slice(bytes.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

fn open(bytes: Vec<u8>) -> Result<format::Image> {
    format::open(Arc::new(Bytes(bytes)), &Limits::default())
}

/// The disk in an image, its first 64 MiB at most.
fn read_through(bytes: Vec<u8>) -> Result<Vec<u8>> {
    let disk = open(bytes)?.disk;
    let mut raw = vec![0xa5; disk.virtual_size().min(64 << 20) as usize];
    let (mut at, mut extents) = (0, 0);
    while at < raw.len() as u64 && extents < 1000 {
        let extent = disk.extent_at(at)?;
        assert!(extent.start == at && extent.len > 0 && extent.end() <= disk.virtual_size(), "{extent:?}");
        (at, extents) = (extent.end(), extents + 1);
    }
    for (i, part) in raw.chunks_mut(1 << 20).enumerate() {
        disk.read_at(part, (i << 20) as u64)?;
    }
    Ok(raw)
}

fn assert_refused(bytes: Vec<u8>, kind: ErrorKind, says: &str) {
    let error: Error = failure(read_through(bytes));
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

/// Writes a disk: share of the disk, sectors, and what to fill it with.
type Piece = (f64, u64, u8);

fn pieces() -> impl Strategy<Value = (u64, Vec<Piece>)> {
    // Up to 12 MiB: six VHD blocks.
    (1u64..24 << 10, proptest::collection::vec((0.0..1.0f64, 1u64..6 << 10, any::<u8>()), 0..8))
}

/// A raw disk with these pieces.
fn raw_disk(dir: &Path, sectors: u64, pieces: &[Piece]) -> std::path::PathBuf {
    let mut disk = vec![0; sectors as usize * 512];
    for &(at, len, seed) in pieces {
        let start = (at * sectors as f64) as usize * 512;
        let end = (start + len as usize * 512).min(disk.len());
        match seed {
            0..20 => disk[start..end].fill(0),
            20..60 => disk[start..end].fill(seed),
            _ => disk[start..end].copy_from_slice(&prose(end - start, seed.into())),
        }
    }
    let path = dir.join("disk.raw");
    std::fs::write(&path, disk).unwrap();
    path
}

/// An image that qemu makes by writing piece after piece, so that blocks lie in the order of the writes.
fn qemu_image(
    dir: &Path,
    (name, options): (&str, &str),
    sectors: u64,
    pieces: &[Piece],
) -> std::path::PathBuf {
    let image = dir.join("image");
    qemu_img(&["create", "-q", "-f", name, "-o", options, path(&image), &(sectors * 512).to_string()]);
    let text = dir.join("text");
    std::fs::write(&text, prose(4 << 20, 7)).unwrap();
    let mut args = vec!["-f".to_owned(), name.to_owned()];
    for &(at, len, seed) in pieces {
        let start = (at * sectors as f64) as u64;
        let (start, len) = (start * 512, len.min(sectors - start) * 512);
        let what = match seed {
            0..20 => "-z".to_owned(),
            20..120 => format!("-P {seed}"),
            _ => format!("-s {}", path(&text)),
        };
        args.extend(["-c".to_owned(), format!("write -q {what} {start} {len}")]);
    }
    args.push(path(&image).to_owned());
    if !pieces.is_empty() {
        run("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
    }
    image
}

fn pairs(options: &str) -> Vec<(&str, &str)> {
    options.split(',').map(|pair| pair.split_once('=').unwrap()).collect()
}

/// Converts with our engine to a file of this flavour.
fn write(from: &Path, to: &Path, (name, options): (&str, &str), how: &Options) -> Result<Finished> {
    let image = common::open(from)?;
    let form = create_options(name.parse()?, false, &pairs(options))?;
    let mut target = ImageTarget::create(to)?;
    let finished =
        convert::to_image(image.disk.as_ref(), &mut target, form.as_ref(), how, &Progress::default())?;
    target.finish(&finished)?;
    Ok(finished)
}

/// What qemu-img says the virtual size is.
fn qemu_size(name: &str, image: &Path) -> u64 {
    let info = qemu_img(&["info", "-f", name, "--output=json", path(image)]);
    let (_, rest) = info.split_once("\"virtual-size\": ").unwrap();
    rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, max_shrink_iters: 40, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config(40))]

    #[test]
    fn any_image_that_qemu_makes_reads_as_qemu_reads_it(
        flavour in 0usize..6, (sectors, pieces) in pieces(), workers in 1usize..4, at in 0.0..1.0f64,
        len in 1usize..3_000_000,
    ) {
        let dir = temp_dir();
        let (name, _) = FLAVOURS[flavour];
        let image = qemu_image(dir.path(), FLAVOURS[flavour], sectors, &pieces);
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        qemu_img(&["convert", "-f", name, "-O", "raw", path(&image), path(&theirs)]);
        prop_assert_eq!(common::open(&image).unwrap().info.format.name(), name);
        common::to_raw(&image, &ours, &Options { workers, ..Options::default() }).unwrap();
        assert_same_bytes(&ours, &theirs);

        let raw = std::fs::read(&theirs).unwrap();
        let disk = common::open(&image).unwrap().disk;
        let mut offset = 0;
        while offset < raw.len() as u64 {
            let extent = disk.extent_at(offset).unwrap();
            prop_assert!(extent.start == offset && extent.len > 0 && extent.end() <= raw.len() as u64);
            let bytes = &raw[offset as usize..extent.end() as usize];
            if let Some(host) = extent.host {
                let stored = &std::fs::read(&image).unwrap()[host as usize..][..extent.len as usize];
                prop_assert!(extent.kind == ExtentKind::Data && stored == bytes);
            } else {
                prop_assert!(bytes.iter().all(|&b| b == 0), "{:?} is not zero", extent);
            }
            offset = extent.end();
        }
        let start = (at * raw.len() as f64) as usize;
        let len = len.min(raw.len() - start);
        let mut buf = vec![0xa5; len];
        disk.read_at(&mut buf, start as u64).unwrap();
        prop_assert!(buf == raw[start..start + len]);
    }

    #[test]
    fn any_disk_we_write_is_sound_and_equal_for_qemu_and_us(
        flavour in 0usize..6, (sectors, pieces) in pieces(), workers in 1usize..4, unit_bits in 16u32..23,
    ) {
        let dir = temp_dir();
        let (name, options) = FLAVOURS[flavour];
        let raw = raw_disk(dir.path(), sectors, &pieces);
        let (image, back) = (dir.path().join("image"), dir.path().join("back"));
        let how = Options { workers, unit_bytes: 1 << unit_bits };
        let finished = write(&raw, &image, FLAVOURS[flavour], &how).unwrap();
        prop_assert_eq!(finished.file_bytes, std::fs::metadata(&image).unwrap().len());
        prop_assert_eq!(finished.virtual_size, qemu_size(name, &image));
        prop_assert!(options.contains("force_size=off") || finished.virtual_size == sectors * 512);
        if name == "vdi" {
            let check = qemu_img(&["check", "-f", name, path(&image)]);
            prop_assert!(check.contains("No errors were found"), "{}", check);
        }
        std::fs::File::options().write(true).open(&raw).unwrap().set_len(finished.virtual_size).unwrap();
        qemu_img(&["compare", "-f", name, "-F", "raw", path(&image), path(&raw)]);
        let opened = common::open(&image).unwrap();
        prop_assert_eq!(opened.info.format.name(), name);
        common::to_raw(&image, &back, &Options::default()).unwrap();
        assert_same_bytes(&back, &raw);
    }
}

proptest! {
    #![proptest_config(config(300))]

    #[test]
    fn damage_never_panics_and_ends_soon(
        flavour in 0usize..6,
        damage in proptest::collection::vec((0usize..4, 0.0..1.0f64, any::<u8>(), 1usize..9), 1..6),
        mend in any::<bool>(),
        cut in proptest::option::weighted(0.2, 0.0..1.0f64),
    ) {
        let mut bytes = samples()[flavour].0.clone();
        let places = [0..512, 0x40..0x48, 512..2048, bytes.len().saturating_sub(512)..bytes.len()];
        for (place, at, value, run) in damage {
            let place = &places[place];
            let at = place.start + (at * place.len() as f64) as usize;
            let end = (at + run).min(bytes.len());
            bytes[at.min(end)..end].fill(value);
        }
        if let Some(cut) = cut {
            bytes.truncate((cut * bytes.len() as f64) as usize);
        }
        if mend {
            mend_checksums(&mut bytes);
        }
        let begun = std::time::Instant::now();
        let _ = read_through(bytes);
        prop_assert!(begun.elapsed().as_secs() < 20);
    }

    #[test]
    fn a_file_cut_short_is_refused_or_reads_the_same(flavour in 0usize..3, cut in 0.0..1.0f64, near in 0usize..2000) {
        let (bytes, raw) = &samples()[flavour];
        let mut bytes = bytes.clone();
        // Half of the cuts are near the end, where they are least noticed.
        let cut = if near % 2 == 0 { bytes.len() - near / 2 } else { (cut * bytes.len() as f64) as usize };
        bytes.truncate(cut);
        let read = read_through(bytes);
        // Without the signature nothing tells a VDI from a raw disk.
        prop_assert!(read.is_err() || cut < 0x44 || read.unwrap() == *raw, "cut at {}", cut);
    }
}

/// One image of each flavour with its disk, in memory; blocks are out of order.
fn samples() -> &'static [(Vec<u8>, Vec<u8>)] {
    static SAMPLES: std::sync::OnceLock<Vec<(Vec<u8>, Vec<u8>)>> = std::sync::OnceLock::new();
    SAMPLES.get_or_init(|| {
        let pieces = [(0.7, 3000, 200), (0.0, 2100, 201), (0.9, 10, 202)];
        FLAVOURS
            .iter()
            .map(|&flavour| {
                let dir = temp_dir();
                let image = qemu_image(dir.path(), flavour, 12_345, &pieces);
                let raw = dir.path().join("raw");
                qemu_img(&["convert", "-f", flavour.0, "-O", "raw", path(&image), path(&raw)]);
                (std::fs::read(&image).unwrap(), std::fs::read(&raw).unwrap())
            })
            .collect()
    })
}

fn patched(flavour: usize, patches: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = samples()[flavour].0.clone();
    for (at, patch) in patches {
        bytes[*at..at + patch.len()].copy_from_slice(patch);
    }
    bytes
}

/// Makes the checksums of a VHD right again, wherever there is a footer or a dynamic header.
fn mend_checksums(bytes: &mut [u8]) {
    let last = bytes.len().saturating_sub(512);
    for (at, len, field, cookie) in
        [(0, 512, 64, b"conectix"), (512, 1024, 36, b"cxsparse"), (last, 512, 64, b"conectix")]
    {
        let Some(part) = bytes.get_mut(at..at + len).filter(|part| part.starts_with(cookie)) else {
            continue;
        };
        part[field..field + 4].fill(0);
        let sum = part.iter().fold(0u32, |sum, &byte| sum.wrapping_add(byte.into()));
        part[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
    }
}

fn mended(flavour: usize, patches: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = patched(flavour, patches);
    mend_checksums(&mut bytes);
    bytes
}

/// A dynamic VHD with the same change in both copies of its footer.
fn vhd_with_footers(at: usize, patch: &[u8]) -> Vec<u8> {
    let last = samples()[2].0.len() - 512;
    mended(2, &[(at, patch), (last + at, patch)])
}

#[test]
fn a_vdi_that_needs_another_file_is_refused() {
    for (kind, says) in [(3u32, "undo"), (4, "differencing")] {
        assert_refused(patched(0, &[(0x4c, &kind.to_le_bytes())]), ErrorKind::ForeignFile, says);
    }
    for uuid in [0x1a8, 0x1b8 + 15] {
        assert_refused(patched(0, &[(uuid, &[1])]), ErrorKind::ForeignFile, "UUID");
    }
}

#[test]
fn a_vdi_that_we_do_not_know_is_unsupported() {
    for (at, value, says) in [
        (0x44, 0x0001_0000u32, "version 1.0"),
        (0x4c, 9, "image type 9"),
        (0x168, 4096, "sectors of 4096"),
        (0x178, 12345, "blocks of 12345"),
        (0x178, 512, "blocks of 512"),
        (0x178, 1 << 31, "blocks of 2147483648"),
        (0x17c, 512, "512 extra bytes"),
    ] {
        assert_refused(patched(0, &[(at, &value.to_le_bytes())]), ErrorKind::Unsupported, says);
    }
}

#[test]
fn a_vdi_map_that_points_nowhere_twice_or_to_itself_is_refused() {
    let map = 512;
    let word = |value: u32| value.to_le_bytes();
    assert_refused(patched(0, &[(map, &word(9999))]), ErrorKind::Corrupt, "beyond the end");
    let same = samples()[0].0[map..map + 4].to_vec();
    assert_refused(patched(0, &[(map + 4, &same)]), ErrorKind::Corrupt, "another block");
    assert_refused(patched(0, &[(0x158, &word(512))]), ErrorKind::Corrupt, "block table");
    assert_refused(patched(0, &[(0x158, &word(0))]), ErrorKind::Corrupt, "first block at 0x0");
    assert_refused(patched(0, &[(0x154, &word(0x1234))]), ErrorKind::Corrupt, "sector boundary");
    assert_refused(patched(0, &[(0x154, &word(0xffff_fe00))]), ErrorKind::Corrupt, "beyond the end");
    assert_refused(patched(0, &[(0x180, &word(1))]), ErrorKind::Corrupt, "the block map only finds 1048576");
}

#[test]
fn absurd_sizes_end_in_a_limit() {
    let huge = u64::MAX.to_le_bytes();
    assert_refused(patched(0, &[(0x170, &huge)]), ErrorKind::Limit, "limit");
    // 60 TiB in blocks of 1 MiB: a map of 240 MiB.
    let (size, blocks) = ((60u64 << 40).to_le_bytes(), (60u32 << 20).to_le_bytes());
    assert_refused(patched(0, &[(0x170, &size), (0x180, &blocks)]), ErrorKind::Limit, "block table");
    let sectors_max = 0xff00_0000u64;
    assert_refused(vhd_with_footers(48, &((sectors_max + 1) * 512).to_be_bytes()), ErrorKind::Limit, "limit");
    // The largest disk in the smallest blocks: a table of 2 GiB.
    let mut bytes = vhd_with_footers(48, &(sectors_max * 512).to_be_bytes());
    bytes[512 + 28..512 + 32].copy_from_slice(&u32::MAX.to_be_bytes());
    bytes[512 + 32..512 + 36].copy_from_slice(&4096u32.to_be_bytes());
    mend_checksums(&mut bytes);
    assert_refused(bytes, ErrorKind::Limit, "block table");
}

#[test]
fn discarded_vdi_blocks_are_zero_and_unallocated_ones_are_holes() {
    let bytes = patched(0, &[(512, &[0xfe, 0xff, 0xff, 0xff]), (516, &[0xff; 4])]);
    let disk = open(bytes).unwrap().disk;
    assert_eq!(disk.extent_at(5).unwrap().kind, ExtentKind::Zero);
    assert_eq!(disk.extent_at(1 << 20).unwrap().kind, ExtentKind::Hole);
    let mut buf = vec![1; 2 << 20];
    disk.read_at(&mut buf, 0).unwrap();
    assert!(buf.iter().all(|&b| b == 0));
}

#[test]
fn vdi_blocks_of_other_sizes_are_read() {
    let mut bytes = patched(0, &[]);
    bytes.truncate(1024);
    for (at, value) in [(0x158, 1024u32), (0x170, 8192), (0x178, 4096), (0x180, 2)] {
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    bytes[512..520].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
    let content = noise(8192, 3);
    bytes.extend(&content);
    let raw = read_through(bytes).unwrap();
    assert!(raw[..4096] == content[4096..] && raw[4096..] == content[..4096]);
}

#[test]
fn a_differencing_vhd_is_refused() {
    assert_refused(vhd_with_footers(60, &4u32.to_be_bytes()), ErrorKind::ForeignFile, "parent");
    assert_refused(vhd_with_footers(60, &9u32.to_be_bytes()), ErrorKind::Unsupported, "type 9");
}

#[test]
fn either_vhd_footer_may_be_damaged_but_not_both() {
    let (bytes, raw) = &samples()[2];
    let last = bytes.len() - 512;
    for damaged in [0, 8, 50, 500, last, last + 8, last + 500] {
        let read = read_through(patched(2, &[(damaged, &[0x55])])).unwrap();
        assert!(read == *raw, "{damaged}");
    }
    assert_refused(patched(2, &[(50, &[0x55]), (last + 50, &[0x55])]), ErrorKind::Corrupt, "both");
    // Without either cookie it is a raw disk.
    let image = open(patched(2, &[(0, b"x"), (last, b"x")])).unwrap();
    assert_eq!(image.info.format, Format::Raw);
}

#[test]
fn a_damaged_vhd_header_or_table_is_refused() {
    let entry = u32::from_be_bytes(samples()[2].0[1536..1540].try_into().unwrap());
    let table = |value: u32| mended(2, &[(1536, &value.to_be_bytes())]);
    assert_refused(patched(2, &[(512 + 32, &[1])]), ErrorKind::Corrupt, "checksum");
    assert_refused(mended(2, &[(512, b"CX")]), ErrorKind::Corrupt, "there is none");
    assert_refused(vhd_with_footers(16, &u64::MAX.to_be_bytes()), ErrorKind::Corrupt, "beyond the end");
    assert_refused(mended(2, &[(512 + 16, &[0xff; 8])]), ErrorKind::Corrupt, "beyond the end");
    assert_refused(mended(2, &[(512 + 28, &1u32.to_be_bytes())]), ErrorKind::Corrupt, "only finds");
    assert_refused(
        mended(2, &[(512 + 32, &2048u32.to_be_bytes())]),
        ErrorKind::Unsupported,
        "blocks of 2048",
    );
    assert_refused(table(1 << 20), ErrorKind::Corrupt, "beyond the end");
    assert_refused(table(2), ErrorKind::Corrupt, "dynamic header");
    assert_refused(table(0), ErrorKind::Corrupt, "copy of the footer");
    let other = (0..4).map(|i| 1536 + 4 * i).find(|&at| {
        samples()[2].0[at..at + 4] != entry.to_be_bytes() && samples()[2].0[at..at + 4] != [0xff; 4]
    });
    let near = mended(2, &[(other.unwrap(), &(entry + 1).to_be_bytes())]);
    assert!(read_through(near).is_err(), "blocks overlap, or end beyond the file");
    let twice = mended(2, &[(other.unwrap(), &entry.to_be_bytes())]);
    assert_refused(twice, ErrorKind::Corrupt, "another block");
}

#[test]
fn sector_bitmaps_of_dynamic_vhds_do_not_count_as_for_qemu() {
    let dir = temp_dir();
    let (bytes, raw) = &samples()[2];
    let mut bytes = bytes.clone();
    for at in (1536..1552).step_by(4) {
        let entry = u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        if entry != u32::MAX {
            bytes[entry as usize * 512..][..512].fill(0x5a);
        }
    }
    let (image, theirs) = (image_path(&dir, "image"), image_path(&dir, "theirs"));
    std::fs::write(&image, &bytes).unwrap();
    qemu_img(&["convert", "-f", "vpc", "-O", "raw", path(&image), path(&theirs)]);
    assert!(std::fs::read(&theirs).unwrap() == *raw && read_through(bytes).unwrap() == *raw);
}

#[test]
fn the_virtual_size_of_a_vhd_is_that_of_qemu_for_every_creator() {
    let dir = temp_dir();
    let image = image_path(&dir, "image");
    let max = [0xff, 0xff, 16, 255];
    for creator in [b"vpc ", b"qemu", b"vbox", b"win ", b"d2v ", b"tap\0", b"CTXS", b"qem2", b"none"] {
        for geometry in [[0, 100, 4, 17], [0, 180, 4, 17], max] {
            for flavour in [2, 4] {
                let last = samples()[flavour].0.len() - 512;
                let footers: &[usize] = if flavour == 2 { &[0, last] } else { &[last] };
                let mut bytes = samples()[flavour].0.clone();
                for at in footers {
                    bytes[at + 28..at + 32].copy_from_slice(creator);
                    bytes[at + 56..at + 60].copy_from_slice(&geometry);
                }
                mend_checksums(&mut bytes);
                std::fs::write(&image, &bytes).unwrap();
                let ours = open(bytes).unwrap().info;
                assert_eq!(ours.format, Format::Vpc);
                assert_eq!(ours.virtual_size, qemu_size("vpc", &image), "{creator:?} {geometry:?} {flavour}");
            }
        }
    }
    // Newer than the qemu at hand: Azure counts by the current size.
    let azure = open(vhd_with_footers(28, b"wa\0\0")).unwrap().info.virtual_size;
    assert_eq!(azure, samples()[2].1.len() as u64);
}

#[test]
fn only_a_footer_of_just_this_file_makes_a_fixed_vhd() {
    let bytes = &samples()[4].0;
    assert_eq!(open(bytes.clone()).unwrap().info.format, Format::Vpc);
    let mut longer = vec![0; 512];
    longer.extend(bytes);
    assert_eq!(open(longer).unwrap().info.format, Format::Raw);
    assert_eq!(open(bytes[512..].to_vec()).unwrap().info.format, Format::Raw);
    assert_eq!(open(patched(4, &[(bytes.len() - 1, &[1])])).unwrap().info.format, Format::Raw);
}

/// Reads at most `step` bytes at a time through a [`PlainReader`].
fn read_plain(bytes: &[u8], step: usize) -> (Vec<u8>, Format) {
    struct Short<'a>(&'a [u8]);
    impl std::io::Read for Short<'_> {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            let n = buf.len().min(777);
            self.0.read(&mut buf[..n])
        }
    }
    let mut reader = PlainReader::new(Short(bytes));
    let (mut all, mut buf) = (Vec::new(), vec![0; step]);
    loop {
        let n = std::io::Read::read(&mut reader, &mut buf).unwrap();
        if n == 0 {
            return (all, reader.format(Format::Raw));
        }
        all.extend(&buf[..n]);
    }
}

#[test]
fn a_stream_loses_the_footer_of_a_fixed_vhd_and_nothing_else() {
    let (bytes, raw) = &samples()[4];
    for step in [1000, 513, 4096, 1 << 20] {
        assert!(read_plain(bytes, step) == (raw.clone(), Format::Vpc), "{step}");
        let cut = &bytes[..bytes.len() - 1];
        assert!(read_plain(cut, step) == (cut.to_vec(), Format::Raw), "{step}");
    }
    for len in [0, 1, 511, 512, 513, 5000] {
        for step in [1, 7, 512, 513, 9000] {
            let bytes = noise(len, 5);
            assert!(read_plain(&bytes, step) == (bytes, Format::Raw), "{len} {step}");
        }
    }
    let tail = &bytes[bytes.len() - 8000..];
    assert!(read_plain(tail, 3) == (tail.to_vec(), Format::Raw));
}

#[test]
fn wrapped_images_convert_like_bare_ones() {
    let dir = temp_dir();
    for (flavour, (bytes, raw)) in samples().iter().enumerate() {
        let (image, target) = (image_path(&dir, "image.gz"), image_path(&dir, "target"));
        let file = std::fs::File::create(&image).unwrap();
        let mut gzip =
            Command::new("gzip").args(["-1", "-c"]).stdin(Stdio::piped()).stdout(file).spawn().unwrap();
        gzip.stdin.take().unwrap().write_all(bytes).unwrap();
        assert!(gzip.wait().unwrap().success());
        let (limits, progress) = (Limits::default(), Progress::default());
        let info = file::inspect(&image, &limits, &progress).unwrap().info;
        assert_eq!((info.format.name(), info.virtual_size), (FLAVOURS[flavour].0, raw.len() as u64));
        let checked = file::check(&image, true, &Options::default(), &limits, &progress).unwrap();
        assert_eq!((checked.0.name(), checked.1.corruptions), (FLAVOURS[flavour].0, 0));
        let bare = image_path(&dir, "raw");
        std::fs::write(&bare, raw).unwrap();
        let same = file::compare([&image, &bare], true, &Options::default(), &limits, &progress).unwrap();
        assert_eq!(same.first_difference, None, "{flavour}");
        assert_eq!(same.virtual_sizes, [raw.len() as u64; 2], "{flavour}");
        for (name, options) in [("raw", ""), ("qcow2", "cluster_size=4096"), ("vdi", "static=off")] {
            let output = match name {
                "raw" => Output::Raw,
                _ => Output::Image(create_options(name.parse().unwrap(), false, &pairs(options)).unwrap()),
            };
            let made =
                file::convert(&image, &target, output, &Options::default(), &limits, &progress).unwrap();
            assert_eq!((made.format.name(), made.virtual_size), (FLAVOURS[flavour].0, raw.len() as u64));
            assert!(read_through(std::fs::read(&target).unwrap()).unwrap() == *raw, "{flavour} {name}");
        }
    }
}

#[test]
fn preallocated_and_fixed_files_go_down_a_stream() {
    let dir = temp_dir();
    let raw = raw_disk(dir.path(), 9_999, &[(0.1, 100, 200), (0.9, 9999, 90)]);
    let disk = common::open(&raw).unwrap().disk;
    for (name, options) in FLAVOURS {
        let form = create_options(name.parse().unwrap(), false, &pairs(options)).unwrap();
        let mut bytes = Vec::new();
        let mut target = StreamTarget::new(&mut bytes, 0);
        let made = convert::to_image(&*disk, &mut target, &*form, &Options::default(), &Progress::default());
        if !form.is_stream() {
            assert_eq!(failure(made).kind(), ErrorKind::Target);
            continue;
        }
        let size = made.unwrap().virtual_size;
        target.finish().unwrap();
        let mut expected = std::fs::read(&raw).unwrap();
        expected.resize(size as usize, 0);
        assert!(read_through(bytes).unwrap() == expected, "{name} {options}");
    }
}

#[test]
fn sizes_by_geometry_are_those_of_qemu() {
    let dir = temp_dir();
    let (raw, ours, theirs) = (image_path(&dir, "raw"), image_path(&dir, "ours"), image_path(&dir, "theirs"));
    for size in [512u64, 5 << 20, 123_456 * 512, 3 << 30, 127 << 30, 200 << 30] {
        std::fs::File::create(&raw).unwrap().set_len(size).unwrap();
        let flavour = ("vpc", "subformat=dynamic,force_size=off");
        let made = write(&raw, &ours, flavour, &Options::default()).unwrap();
        qemu_img(&["create", "-q", "-f", "vpc", "-o", flavour.1, path(&theirs), &size.to_string()]);
        assert_eq!(made.virtual_size, qemu_size("vpc", &theirs), "{size}");
        assert_eq!(made.virtual_size, qemu_size("vpc", &ours), "{size}");
    }
}

#[test]
fn disks_too_large_for_a_format_are_refused_before_anything_is_written() {
    let mut bytes = Vec::new();
    for (format, size) in [(Format::Vpc, (2040u64 << 30) + 512), (Format::Vdi, (11 << 40) + 512)] {
        let form = create_options(format, false, &[]).unwrap();
        let mut target = StreamTarget::new(&mut bytes, 0);
        let error = failure(form.create(&mut target, Some(size)));
        assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
        drop(target);
        assert!(bytes.is_empty());
    }
}

#[test]
fn options_that_make_no_sense_are_named() {
    for (name, option, value) in [
        ("vdi", "static", "maybe"),
        ("vdi", "preallocation", "falloc"),
        ("vdi", "subformat", "fixed"),
        ("vpc", "subformat", "thin"),
        ("vpc", "force_size", "1"),
        ("vpc", "static", "on"),
    ] {
        let error = failure(create_options(name.parse().unwrap(), false, &[(option, value)]).map(|_| ()));
        assert!(error.to_string().contains(option), "{error}");
    }
    for name in ["vdi", "vpc"] {
        let error = failure(create_options(name.parse().unwrap(), true, &[]).map(|_| ()));
        assert!(error.to_string().contains("no compression"), "{error}");
    }
}
