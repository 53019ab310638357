//! OVA: disks in archives that tar makes, and archives that are damaged or hostile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Bytes, assert_same_bytes, failure, noise, path, prose, qemu_img, read_through, run, temp_dir};
use dvcr_converter::convert::Options;
use dvcr_converter::error::ErrorKind;
use dvcr_converter::file::{self, Input, Output};
use dvcr_converter::format::{self, Format, Image};
use dvcr_converter::io::Value;
use dvcr_converter::limits::Limits;
use dvcr_converter::map;
use dvcr_converter::progress::Progress;
use dvcr_converter::{Result, wrapper};
use proptest::prelude::*;

/// The envelope of a machine with these disks (id, file); attributes of a file or disk come after a `|`.
fn envelope(disks: &[(&str, &str)]) -> String {
    let (mut files, mut section) = (String::new(), String::new());
    for (i, (id, file)) in disks.iter().enumerate() {
        let (id, disk_more) = id.split_once('|').unwrap_or((id, ""));
        let (file, file_more) = file.split_once('|').unwrap_or((file, ""));
        files += &format!("<File ovf:href=\"{file}\" ovf:id=\"file{i}\" ovf:size=\"1\" {file_more}/>\n");
        section += &format!(
            "<Disk ovf:capacity=\"4\" ovf:capacityAllocationUnits=\"byte * 2^20\" ovf:diskId=\"{id}\" \
             ovf:fileRef=\"file{i}\" {disk_more}/>\n"
        );
    }
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!-- a comment -->\n\
         <Envelope xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\" \
         xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\">\n\
         <References>\n{files}</References>\n\
         <DiskSection>\n<Info>Disks &amp; more</Info>\n\
         <Disk ovf:diskId=\"empty\" ovf:capacity=\"1\"/>\n{section}</DiskSection>\n\
         <VirtualSystem ovf:id=\"vm\"><Disk ovf:diskId=\"decoy\" ovf:fileRef=\"file0\"/></VirtualSystem>\n\
         </Envelope>\n"
    )
}

const VMDK: &str = "ovf:format=\"http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized\"";

/// A disk of 4 MiB; two of them differ.
fn disk(seed: u64) -> Vec<u8> {
    let mut disk = prose(300_000, seed);
    disk.resize(1 << 20, 0);
    disk.extend(noise(100_000, seed));
    disk.resize(4 << 20, 0);
    disk
}

/// Packs files of `dir`, in this order.
fn tar(dir: &Path, format: &str, names: &[&str]) -> Vec<u8> {
    let (archive, format) = (dir.join("vm.ova"), format!("--format={format}"));
    let mut args = vec![format.as_str(), "--sort=none", "-cf", path(&archive), "-C", path(dir)];
    args.extend(names);
    run("tar", &args);
    std::fs::read(&archive).unwrap()
}

/// An archive of an envelope and files.
fn archive(envelope: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    let dir = temp_dir();
    std::fs::write(dir.path().join("vm.ovf"), envelope).unwrap();
    let mut names = vec!["vm.ovf"];
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
        names.push(name);
    }
    tar(dir.path(), "ustar", &names)
}

/// A disk in a format that qemu writes.
fn stored(disk: &[u8], format: &str, options: &str) -> Vec<u8> {
    let dir = temp_dir();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("image"));
    std::fs::write(&raw, disk).unwrap();
    let mut args = vec!["convert", "-q", "-f", "raw", "-O", format];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([path(&raw), path(&image)]);
    qemu_img(&args);
    std::fs::read(&image).unwrap()
}

fn stream(seed: u64) -> Vec<u8> {
    stored(&disk(seed), "vmdk", "subformat=streamOptimized")
}

fn open_named(archive: Vec<u8>, name: &str) -> Result<Image> {
    format::open_member(Arc::new(Bytes(archive)), Some(name), &Limits::default())
}

fn assert_refused(archive: Vec<u8>, kind: ErrorKind, says: &str) {
    let error = failure(read_through(archive));
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

#[test]
fn the_first_disk_is_read_whatever_its_format_and_that_of_the_archive() {
    let long = format!("{}.vmdk", "n".repeat(180));
    for (format, options) in [
        ("vmdk", "subformat=streamOptimized"),
        ("vmdk", "subformat=monolithicSparse"),
        ("qcow2", ""),
        ("raw", ""),
    ] {
        let dir = temp_dir();
        let image = stored(&disk(1), format, options);
        for name in ["disk one.img", &long] {
            std::fs::write(dir.path().join(name), &image).unwrap();
            std::fs::write(dir.path().join("vm.ovf"), envelope(&[("disk", name)])).unwrap();
            std::fs::write(dir.path().join("vm.mf"), "SHA256(vm.ovf)= 00\n").unwrap();
            for tar_format in ["gnu", "posix", "ustar"] {
                if tar_format == "ustar" && name == long {
                    continue;
                }
                let archive = tar(dir.path(), tar_format, &["vm.ovf", "vm.mf", name]);
                let opened = format::open(Arc::new(Bytes(archive.clone())), &Limits::default()).unwrap();
                assert_eq!(opened.info.format, Format::Ova);
                assert_eq!(opened.info.file_bytes, archive.len() as u64);
                let told = |name: &str| {
                    let found = opened.info.details.specific.iter().find(|(field, _)| *field == name);
                    found.map(|(_, value)| value.clone())
                };
                assert_eq!(told("disk-format"), Some(Value::Text(format.to_owned())));
                assert_eq!(told("disk"), Some(Value::Text("disk".to_owned())));
                assert!(read_through(archive).unwrap() == disk(1), "{format} {tar_format} {name}");
            }
        }
    }
}

#[test]
fn extents_are_places_in_the_archive() {
    let archive = archive(&envelope(&[("disk", "disk.img")]), &[("disk.img", &disk(3))]);
    let image = format::open(Arc::new(Bytes(archive.clone())), &Limits::default()).unwrap();
    let extent = image.disk.extent_at(512).unwrap();
    let host = extent.host.unwrap() as usize;
    assert!(archive[host..host + 1000] == disk(3)[512..1512]);
}

#[test]
fn a_disk_is_chosen_by_its_file_or_its_id() {
    let disks = [("disk1", "a.vmdk"), ("disk2", "b.vmdk")];
    let bytes = archive(&envelope(&disks), &[("a.vmdk", &stream(1)), ("b.vmdk", &stream(2))]);
    assert!(read_through(bytes.clone()).unwrap() == disk(1));
    for (name, seed) in [("disk1", 1), ("a.vmdk", 1), ("disk2", 2), ("b.vmdk", 2)] {
        let image = open_named(bytes.clone(), name).unwrap();
        let mut buf = vec![0; 4 << 20];
        image.disk.read_at(&mut buf, 0).unwrap();
        assert!(buf == disk(seed), "{name}");
    }
    for name in ["", "disk3", "vm.ovf", "empty", "decoy"] {
        let error = failure(open_named(bytes.clone(), name));
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("\"a.vmdk\" (\"disk1\"), \"b.vmdk\" (\"disk2\")"), "{error}");
    }
    let raw = failure(open_named(vec![1; 512], "disk1"));
    assert_eq!(raw.kind(), ErrorKind::Unsupported);
}

#[test]
fn the_disk_that_is_named_is_mapped_checked_and_compared() {
    let dir = temp_dir();
    let (machine, wrapped, bare) =
        (dir.path().join("m.ova"), dir.path().join("m.ova.gz"), dir.path().join("b"));
    let mut sparse = stored(&disk(2), "vmdk", "");
    // Beyond the end of the file: damage to the second disk only.
    let directory = u64::from_le_bytes(*sparse[56..].first_chunk().unwrap()) as usize * 512;
    let table = u32::from_le_bytes(*sparse[directory..].first_chunk().unwrap()) as usize * 512;
    let members = |second: &[u8]| {
        archive(
            &envelope(&[("one", "a.vmdk"), ("two", "b.vmdk")]),
            &[("a.vmdk", &stream(1)), ("b.vmdk", second)],
        )
    };
    std::fs::write(&machine, members(&sparse)).unwrap();
    run("gzip", &["-1", "--keep", path(&machine)]);
    std::fs::write(&bare, disk(2)).unwrap();
    let (options, limits, progress) = (Options::default(), Limits::default(), Progress::default());
    for file in [&machine, &wrapped] {
        let named = |disk| Input { path: file, disk: Some(disk) };
        for (name, difference) in [("two", None), ("one", Some(0))] {
            let found =
                file::compare([named(name), (&bare).into()], true, &options, &limits, &progress).unwrap();
            assert_eq!(found.first_difference, difference, "{name}");
        }
        let runs = |name| {
            let opened = file::open(named(name), &limits, &progress).unwrap();
            map::runs(&opened.image).map(Result::unwrap).collect::<Vec<_>>()
        };
        assert!(runs("one").iter().all(|run| run.compressed == run.data), "a stream");
        assert!(runs("two").iter().all(|run| !run.compressed), "sparse");
        assert_eq!(file::check(named("two"), true, &options, &limits, &progress).unwrap().1.corruptions, 0);
    }
    sparse[table..table + 4].copy_from_slice(&0x00ff_ffff_u32.to_le_bytes());
    std::fs::write(&machine, members(&sparse)).unwrap();
    for (name, whole) in [(None, true), (Some("one"), true), (Some("two"), false)] {
        let input = Input { path: &machine, disk: name };
        let report = file::check(input, false, &options, &limits, &progress).unwrap().1;
        assert_eq!(report.corruptions == 0, whole, "{name:?}: {report:?}");
    }
    for other in [&bare, &dir.path().join("missing")] {
        let input = Input { path: other, disk: Some("one") };
        failure(file::check(input, false, &options, &limits, &progress));
        failure(file::open(input, &limits, &progress));
    }
}

#[test]
fn disks_outside_the_archive_are_refused() {
    for href in ["http://example.org/disk.vmdk", "file:///etc/passwd", "/etc/passwd", "../disk.vmdk"] {
        let bytes = archive(&envelope(&[("disk", href)]), &[("disk.vmdk", &stream(1))]);
        assert_refused(bytes, ErrorKind::ForeignFile, href);
    }
    let parent = [("disk|ovf:parentRef=\"base\"", "disk.vmdk")];
    assert_refused(archive(&envelope(&parent), &[("disk.vmdk", &stream(1))]), ErrorKind::ForeignFile, "base");
    // What a disk in the archive names is refused as anywhere else.
    let text = b"# Disk DescriptorFile\nversion=1\nRW 8 FLAT \"/etc/passwd\" 0\n";
    let bytes = archive(&envelope(&[("disk", "disk.vmdk")]), &[("disk.vmdk", text)]);
    assert_refused(bytes, ErrorKind::ForeignFile, "/etc/passwd");
}

#[test]
fn what_has_to_be_unpacked_first_is_told() {
    for (attribute, says) in [("ovf:compression=\"gzip\"", "gzip"), ("ovf:chunkSize=\"1000\"", "chunks")] {
        let file = format!("disk.vmdk|{attribute}");
        let bytes = archive(&envelope(&[("disk", &file)]), &[("disk.vmdk", &stream(1))]);
        assert_refused(bytes, ErrorKind::Unsupported, says);
    }
    let inner = archive(&envelope(&[("disk", "disk.vmdk")]), &[("disk.vmdk", &stream(1))]);
    let bytes = archive(&envelope(&[("disk", "inner.ova")]), &[("inner.ova", &inner)]);
    assert_refused(bytes, ErrorKind::Unsupported, "an archive itself");
    let packed = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 3, 0];
    assert_eq!(wrapper::detect(&packed), Some(wrapper::Wrapper::Gzip));
    let bytes = archive(&envelope(&[("disk", "disk.img")]), &[("disk.img", &packed)]);
    assert_refused(bytes, ErrorKind::Unsupported, "compressed (gz)");
    assert_refused(archive(&envelope(&[]), &[]), ErrorKind::Unsupported, "no disk with a file");
}

#[test]
fn a_missing_member_and_one_that_is_not_what_it_is_said_to_be_are_damage() {
    let bytes = archive(&envelope(&[("disk", "disk.vmdk")]), &[("other.vmdk", &stream(1))]);
    assert_refused(bytes, ErrorKind::Corrupt, "no member \"disk.vmdk\"");
    let id = format!("disk|{VMDK}");
    let bytes = archive(&envelope(&[(&id, "disk.vmdk")]), &[("disk.vmdk", &noise(1 << 20, 1))]);
    assert_refused(bytes, ErrorKind::Corrupt, "said to be vmdk");
    let bytes = archive(&envelope(&[(&id, "disk.vmdk")]), &[("disk.vmdk", &stream(1))]);
    assert!(read_through(bytes).unwrap() == disk(1));
}

#[test]
fn envelopes_that_expand_nest_or_never_end_are_refused() {
    let whole = envelope(&[("disk", "disk.img")]);
    let bomb = whole.replace(
        "<!-- a comment -->",
        "<!DOCTYPE x [<!ENTITY a \"aaaaaaaaaa\"><!ENTITY b \"&a;&a;&a;&a;\">]>",
    );
    let nested = whole.replace("<References>", &"<a>".repeat(100_000));
    let many = whole.replace("<References>", &format!("<References>{}", "<File id=\"x\"/>".repeat(2000)));
    let wide: String = (0..200_000).map(|i| format!("a{i}=\"\" ")).collect();
    let wide = whole.replace("<File ", &format!("<File {wide}"));
    let long = whole.replace("a comment", &"x".repeat(5 << 20));
    let cut = whole[..whole.find("<VirtualSystem").unwrap()].to_owned();
    let begun = std::time::Instant::now();
    for (text, kind, says) in [
        (bomb, ErrorKind::Unsupported, "document type"),
        (whole.replace("disk.img", "&a;"), ErrorKind::Corrupt, "attribute"),
        (nested, ErrorKind::Limit, "nested"),
        (many, ErrorKind::Limit, "1024"),
        (wide, ErrorKind::Limit, "attributes"),
        (long, ErrorKind::Limit, "longer"),
        (cut, ErrorKind::Corrupt, "cut short"),
        (whole.replace("</References>", "</Reference>"), ErrorKind::Corrupt, "damaged"),
    ] {
        assert_refused(archive(&text, &[("disk.img", &disk(1))]), kind, says);
    }
    assert!(begun.elapsed().as_secs() < 20);
}

/// Makes the checksum of the header at `at` right again.
fn fix_checksum(archive: &mut [u8], at: usize) {
    archive[at + 148..at + 156].fill(b' ');
    let sum: u32 = archive[at..at + 512].iter().map(|&b| u32::from(b)).sum();
    archive[at + 148..at + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

#[test]
fn hostile_headers_are_refused() {
    let whole = archive(&envelope(&[("disk", "disk.img")]), &[("disk.img", &disk(1))]);
    let second = 512 + envelope(&[("disk", "disk.img")]).len().next_multiple_of(512);
    let changed = |at: usize, bytes: &[u8]| {
        let mut archive = whole.clone();
        archive[second + at..second + at + bytes.len()].copy_from_slice(bytes);
        fix_checksum(&mut archive, second);
        archive
    };
    assert!(read_through(changed(100, b"0000777")).unwrap() == disk(1));
    // Sizes: beyond the end, and near the largest number there is.
    let mut huge = [0xff; 12];
    huge[0] = 0x80;
    huge[1..4].fill(0);
    for (size, says) in [(&b"77777777777\0"[..], "ends beyond"), (&huge, "ends beyond"), (b"zzz", "damaged")]
    {
        assert_refused(changed(124, size), ErrorKind::Corrupt, says);
    }
    assert_refused(changed(156, b"S"), ErrorKind::Unsupported, "sparse");
    assert_refused(changed(156, b"x"), ErrorKind::Limit, "extended header");
    assert_refused(changed(156, b"L"), ErrorKind::Limit, "extended header");
    let mut wrong = whole.clone();
    wrong[second] ^= 1;
    assert_refused(wrong, ErrorKind::Corrupt, "damaged");
    // A hundred thousand empty members before the disk.
    let mut member = whole[..512].to_vec();
    member[..6].copy_from_slice(b"vm.txt");
    member[124..136].copy_from_slice(b"00000000000\0");
    fix_checksum(&mut member, 0);
    let mut many = whole[..second].to_vec();
    many.extend(member.repeat(100_000));
    many.extend(&whole[second..]);
    assert_refused(many, ErrorKind::Limit, "members");
}

#[test]
fn an_archive_cut_short_anywhere_ends_in_an_error_or_the_same_disk() {
    let whole = archive(&envelope(&[("disk", "disk.vmdk")]), &[("disk.vmdk", &stream(1))]);
    let places = (0..64).map(|i| i * whole.len() / 64).chain([1, 511, 512, 513, 1024, whole.len() - 1]);
    for len in places {
        let opened = format::open(Arc::new(Bytes(whole[..len].to_vec())), &Limits::default());
        if opened.as_ref().is_ok_and(|image| image.info.format == Format::Raw) {
            // Not even the first header is there.
            assert!(len < 512, "{len}");
            continue;
        }
        if let Ok(read) = read_through(whole[..len].to_vec()) {
            assert!(read == disk(1), "{len} of {}", whole.len());
        }
    }
}

fn named<'a>(path: &'a Path, disk: &'a str) -> Input<'a> {
    Input { path, disk: Some(disk) }
}

#[test]
fn an_archive_inside_gz_is_read() {
    let dir = temp_dir();
    let (ova, raw, back) = (dir.path().join("vm.ova"), dir.path().join("raw"), dir.path().join("back"));
    let disks = [("disk1", "a.vmdk"), ("disk2", "b.vmdk")];
    std::fs::write(&ova, archive(&envelope(&disks), &[("a.vmdk", &stream(1)), ("b.vmdk", &stream(2))]))
        .unwrap();
    std::fs::write(&raw, disk(1)).unwrap();
    run("gzip", &["-1", path(&ova)]);
    let (options, limits, progress) = (Options::default(), Limits::default(), Progress::default());
    let packed = dir.path().join("vm.ova.gz");
    file::convert(&packed, &back, Output::Raw, &options, &limits, &progress).unwrap();
    assert_same_bytes(&back, &raw);

    std::fs::write(&raw, disk(2)).unwrap();
    file::convert(named(&packed, "b.vmdk"), &back, Output::Raw, &options, &limits, &progress).unwrap();
    assert_same_bytes(&back, &raw);
    let told = file::inspect(named(&packed, "disk2"), &limits, &progress).unwrap();
    assert_eq!(told.info.format, Format::Ova);
    assert!(told.info.details.specific.contains(&("file", Value::Text("b.vmdk".to_owned()))));
    // A plain disk has no others inside, whether it is compressed or not.
    run("gzip", &["-1", "-k", path(&raw)]);
    for file in [dir.path().join("raw.gz"), raw] {
        let told = failure(file::inspect(named(&file, "disk2"), &limits, &progress));
        let made = file::convert(named(&file, "disk2"), &back, Output::Raw, &options, &limits, &progress);
        assert_eq!((told.kind(), failure(made).kind()), (ErrorKind::Unsupported, ErrorKind::Unsupported));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_never_panics_and_ends_soon(
        damage in proptest::collection::vec((0usize..4, 0.0..1.0f64, any::<u8>(), 1usize..9), 1..6),
        fixed in any::<bool>(),
    ) {
        static WHOLE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let text = envelope(&[("disk", "disk.vmdk")]);
        let mut bytes =
            WHOLE.get_or_init(|| archive(&text, &[("disk.vmdk", &stream(1))])).clone();
        let second = 512 + text.len().next_multiple_of(512);
        let places = [0..512, 512..512 + text.len(), second..second + 512, second + 512..second + 600];
        for (place, at, value, run) in damage {
            let place = &places[place];
            let at = place.start + (at * place.len() as f64) as usize;
            bytes[at..at + run].fill(value);
        }
        if fixed {
            fix_checksum(&mut bytes, 0);
            fix_checksum(&mut bytes, second);
        }
        let begun = std::time::Instant::now();
        let _ = read_through(bytes);
        prop_assert!(begun.elapsed().as_secs() < 20);
    }
}
