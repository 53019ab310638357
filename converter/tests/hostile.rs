//! Attacks that are known, bombs, and limits: each ends in its error, soon, and in little memory.
//!
//! A case runs in a process of its own, so that a watchdog can end it and its peak of memory is its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;
#[path = "hostile/qcow2.rs"]
mod qcow2;
#[path = "hostile/sandbox.rs"]
mod sandbox;
#[path = "hostile/vmdk.rs"]
mod vmdk;

#[path = "../../fuzz/bodies.rs"]
mod bodies;

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::Duration;

use common::{failure, noise, temp_dir};
use dvcr_converter::convert::Options;
use dvcr_converter::file::{self, Output};
use dvcr_converter::limits::Limits;
use dvcr_converter::progress::Progress;
use dvcr_converter::wrapper::{self, Wrapper};
use dvcr_converter::{Error, ErrorKind, Result};
use sandbox::{Computed, Sparse, hostile, read_through};

/// Names that programs with a block layer of their own take for more than files.
const PSEUDO_NAMES: [&str; 6] = [
    "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}}",
    "json:{\"driver\":\"nbd\",\"host\":\"127.0.0.1\",\"port\":\"1\"}",
    "nbd://127.0.0.1:1/disk",
    "fd:0",
    "/etc/passwd",
    "https://127.0.0.1:1/disk",
];

#[test]
fn cve_2024_32498_an_external_data_file_is_never_opened() {
    for name in PSEUDO_NAMES {
        let image = qcow2::Image { data_file: Some(name), ..qcow2::Image::default() };
        hostile(ErrorKind::ForeignFile, "external data file", || read_through(image.source()));
    }
}

#[test]
fn cve_2024_32498_a_backing_file_is_never_opened() {
    for name in PSEUDO_NAMES {
        let image = qcow2::Image { backing: Some(name), ..qcow2::Image::default() };
        hostile(ErrorKind::ForeignFile, &format!("{name:?}"), || read_through(image.source()));
    }
    // Whoever opens a pipe waits for the other end; the watchdog would see it.
    let dir = temp_dir();
    let pipe = dir.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let image = qcow2::Image { backing: pipe.to_str(), ..qcow2::Image::default() };
    hostile(ErrorKind::ForeignFile, "backing file", || read_through(image.source()));
}

#[test]
fn cve_2024_4467_json_in_a_data_file_name_is_never_understood() {
    // The attack: "info" on an image whose data file name is a description of another block device.
    let name = "json:{\"driver\":\"raw\",\"file.driver\":\"file\",\"file.filename\":\"/dev/zero\"}";
    let image = qcow2::Image { data_file: Some(name), backing: Some(name), ..qcow2::Image::default() };
    let dir = temp_dir();
    let path = dir.path().join("image");
    std::fs::write(&path, image.bytes()).unwrap();
    hostile(ErrorKind::ForeignFile, "", || {
        file::inspect(&path, &Limits::default(), &Progress::default()).map(drop)
    });
}

#[test]
fn cve_2026_2243_a_vmdk_grain_that_ends_out_of_bounds_is_refused() {
    for (bytes, left, says) in [
        (u32::MAX, 1 << 20, "said to have"),
        (0, 1 << 20, "said to have"),
        ((128 << 10) + 1, 1 << 20, "said to have"),
        (4096, 1024, "ends beyond the file"),
        (501, 512, "ends beyond the file"),
        (1, 11, "marker is beyond the end"),
        (1, 1, "marker is beyond the end"),
        (1, 0, "beyond the end"),
    ] {
        hostile(ErrorKind::Corrupt, says, || read_through(vmdk::out_of_bounds(bytes, left)));
    }
    hostile(ErrorKind::Corrupt, "cannot be decoded", || read_through(vmdk::grain_that_grows()));
}

#[test]
fn a_vmdk_extent_in_another_file_is_never_opened() {
    // Names there have no quotes in them.
    for name in PSEUDO_NAMES.map(|name| name.replace('"', "'")) {
        for extent in [format!("RW 2048 FLAT {name:?} 0"), format!("RW 2048 SPARSE {name:?}")] {
            let text = vmdk::descriptor(&extent);
            let file = Sparse { len: text.len() as u64, parts: vec![(0, text)] };
            hostile(ErrorKind::ForeignFile, "", || read_through(file));
        }
    }
    let parent = vmdk::descriptor("parentFileNameHint=\"/etc/passwd\"\nRW 1 SPARSE \"a\"");
    let file = Sparse { len: parent.len() as u64, parts: vec![(0, parent)] };
    hostile(ErrorKind::ForeignFile, "", || read_through(file));
}

#[test]
fn a_vmdk_descriptor_of_gigabytes_ends() {
    let text = b"# Disk DescriptorFile\n".repeat(4096);
    for len in [3 << 20, 4 << 30, 1 << 50] {
        let parts = (0..len / text.len() as u64).take(40).map(|i| i * text.len() as u64);
        let parts = parts.map(|at| (at, text.clone().into())).collect();
        hostile(ErrorKind::Limit, "descriptor", || read_through(Sparse { len, parts }));
    }
    for sectors in [2049, 8 << 20, u64::MAX] {
        let header = vmdk::Header { descriptor_sectors: sectors, ..vmdk::Header::default() };
        let file = Sparse { len: 1 << 50, ..header.source() };
        hostile(ErrorKind::Limit, "descriptor", || read_through(file));
    }
}

#[test]
fn a_vmdk_directory_of_megabytes_ends() {
    // Tables of one entry, grains of one sector: the directory has four bytes for each sector.
    for (sectors, kind) in [(12u64 << 20, ErrorKind::Limit), (6 << 20, ErrorKind::Corrupt)] {
        let header = vmdk::Header { capacity_sectors: sectors, ..vmdk::Header::default() };
        let mut head = header.bytes().to_vec();
        head[20..28].copy_from_slice(&1u64.to_le_bytes());
        head[44..48].copy_from_slice(&1u32.to_le_bytes());
        // The last entries are in no order, and the same.
        let end = vmdk::GD * vmdk::SECTOR + sectors * 4;
        let last = [1u32 << 30, 1 << 29, 1 << 29].map(u32::to_le_bytes).concat();
        let file = Sparse { len: 1 << 50, parts: vec![(0, head.into()), (end - 12, last.into())] };
        hostile(kind, "", || read_through(file));
    }
}

#[test]
fn a_vmdk_whose_grains_are_all_one_ends() {
    for compressed in [false, true] {
        hostile(ErrorKind::Limit, "too few bytes", || read_through(vmdk::bomb(compressed)));
    }
}

#[test]
fn a_path_is_a_file_name_whatever_it_looks_like() {
    let dir = temp_dir();
    for name in PSEUDO_NAMES.iter().filter(|name| !name.contains('/')) {
        let path = dir.path().join(name);
        std::fs::write(&path, noise(1024, 1)).unwrap();
        let inspection = file::inspect(&path, &Limits::default(), &Progress::default()).unwrap();
        assert_eq!(inspection.info.virtual_size, 1024, "{name}");
    }
    for name in PSEUDO_NAMES.iter().filter(|name| !name.starts_with('/')) {
        let missing = file::inspect(Path::new(name), &Limits::default(), &Progress::default());
        let missing = failure(missing);
        assert_eq!(missing.kind(), ErrorKind::Io, "{missing}");
        assert!(missing.to_string().contains(name), "{missing}");
    }
}

#[test]
fn a_qcow2_whose_compressed_clusters_are_all_one_ends() {
    for (zstd, tables) in [(false, 1), (true, 16)] {
        let image = qcow2::bomb(qcow2::Spot::Compressed { zstd }, tables);
        hostile(ErrorKind::Limit, "too few bytes", || read_through(image));
    }
}

#[test]
fn a_qcow2_whose_plain_clusters_are_all_one_ends() {
    hostile(ErrorKind::Limit, "too few bytes", || read_through(qcow2::bomb(qcow2::Spot::Plain, 4)));
}

#[test]
fn a_virtual_size_of_16_eib_ends() {
    for size in [u64::MAX, 1 << 63, (64 << 40) + 512] {
        let image = qcow2::Image { size, ..qcow2::Image::default() };
        hostile(ErrorKind::Limit, "limit", || read_through(image.source()));
        let image = vmdk::Header { capacity_sectors: size / 512 + 1, ..vmdk::Header::default() };
        hostile(ErrorKind::Limit, "limit", || read_through(image.source()));
        hostile(ErrorKind::Limit, "limit", || read_through(Sparse { len: size, parts: Vec::new() }));
    }
}

#[test]
fn an_l1_table_of_gigabytes_ends() {
    let image = qcow2::Image { size: 64 << 40, l1_entries: u32::MAX, ..qcow2::Image::default() };
    let file = Sparse { len: 1 << 50, parts: vec![(0, image.bytes().into())] };
    hostile(ErrorKind::Limit, "L1 table", || read_through(file));
}

#[test]
fn the_largest_l1_table_full_of_garbage_ends() {
    let entries = 4u32 << 20;
    let image = qcow2::Image {
        cluster_bits: 9,
        size: u64::from(entries) << 15,
        l1_entries: entries,
        ..qcow2::Image::default()
    };
    // Cluster boundaries inside the file, in no order, and the last one twice.
    let file = Computed {
        file: Sparse { len: 1 << 50, parts: vec![(0, image.bytes().into())] },
        table_at: qcow2::L1_AT_512,
        words: entries.into(),
        word: |i| (i.min((4 << 20) - 2).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 24 & !511) | 1 << 41,
    };
    hostile(ErrorKind::Corrupt, "share", || read_through(file));
}

#[test]
fn tables_that_overlap_or_refer_to_themselves_are_refused() {
    for (file, says) in qcow2::self_references().into_iter().chain(vmdk::self_references()) {
        hostile(ErrorKind::Corrupt, says, || read_through(file));
    }
}

/// An image of the fuzz corpus, changed.
fn patched(name: &str, patch: impl FnOnce(&mut [u8])) -> Sparse {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
    let mut file = bodies::sparse::expand(&std::fs::read(path).unwrap());
    patch(&mut file);
    Sparse { len: file.len() as u64, parts: vec![(0, file.into())] }
}

/// Where a VHDX file has the region with this beginning of its GUID.
fn vhdx_region(file: &[u8], guid: [u8; 4]) -> usize {
    let table = &file[192 << 10..];
    let entry = (0..8).map(|i| &table[16 + 32 * i..]).find(|entry| entry.starts_with(&guid)).unwrap();
    u64::from_le_bytes(entry[16..24].try_into().unwrap()) as usize
}

const VHDX_BAT: [u8; 4] = [0x66, 0x77, 0xc2, 0x2d];
const VHDX_METADATA: [u8; 4] = [0x06, 0xa2, 0x7c, 0x8b];

#[test]
fn blocks_that_are_the_same_bytes_are_refused() {
    let vdi = patched("vdi/dynamic", |file| {
        let map = u32::from_le_bytes(file[0x154..0x158].try_into().unwrap()) as usize;
        file.copy_within(map..map + 4, map + 4);
    });
    let vhd = patched("vpc/dynamic", |file| {
        let header = u64::from_be_bytes(file[16..24].try_into().unwrap()) as usize;
        let table = u64::from_be_bytes(file[header + 16..header + 24].try_into().unwrap()) as usize;
        file.copy_within(table..table + 4, table + 4);
    });
    let vhdx = patched("vhdx/dynamic", |file| {
        let bat = vhdx_region(file, VHDX_BAT);
        file.copy_within(bat..bat + 8, bat + 8);
    });
    for image in [vdi, vhd, vhdx] {
        hostile(ErrorKind::Corrupt, "", || read_through(image));
    }
}

#[test]
fn a_virtual_size_of_16_eib_ends_in_the_formats_of_others() {
    let vdi = patched("vdi/dynamic", |file| file[0x170..0x178].fill(0xff));
    let vhd = patched("vpc/dynamic", |file| {
        let end = file.len();
        for footer in [0, end - 512] {
            file[footer + 28..footer + 32].copy_from_slice(b"win ");
            file[footer + 48..footer + 56].fill(0xff);
        }
        bodies::checksums::vpc(file);
    });
    let vhdx = patched("vhdx/dynamic", |file| {
        let metadata = vhdx_region(file, VHDX_METADATA);
        let size = (6u64 << 20).to_le_bytes();
        let at = file[metadata..].windows(8).position(|word| word == size).unwrap() + metadata;
        file[at..at + 8].copy_from_slice(&(u64::MAX << 12).to_le_bytes());
    });
    for image in [vdi, vhd, vhdx] {
        hostile(ErrorKind::Limit, "limit", || read_through(image));
    }
}

#[test]
fn everything_cut_short_anywhere_ends() {
    for target in bodies::TARGETS {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target.name);
        for entry in std::fs::read_dir(corpus).unwrap() {
            let path = entry.unwrap().path();
            let file = bodies::sparse::expand(&std::fs::read(&path).unwrap());
            for cut in cuts(&file) {
                let ends = std::panic::catch_unwind(|| (target.body)(&file[..cut])).is_ok();
                assert!(ends, "{} cut to {cut} bytes", path.display());
            }
        }
    }
}

/// Places to cut a file at: where its parts begin and end, and some between.
fn cuts(file: &[u8]) -> Vec<usize> {
    let is_zero = |sector: &[u8]| sector.iter().all(|&b| b == 0);
    let sectors: Vec<bool> = file.chunks(512).map(is_zero).collect();
    let edges = sectors.windows(2).enumerate().filter(|(_, pair)| pair[0] != pair[1]);
    let mut cuts: Vec<usize> = edges.map(|(i, _)| (i + 1) * 512).take(24).collect();
    cuts.extend((0..12).map(|i| file.len() * i / 12));
    cuts.extend([1, 512].map(|tail| file.len().saturating_sub(tail)));
    let near = cuts.iter().flat_map(|&cut| [cut.saturating_sub(1), cut, cut + 7]);
    near.filter(|&cut| cut < file.len()).collect()
}

fn compress(wrapper: Wrapper, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    match wrapper {
        Wrapper::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(&mut out, flate2::Compression::best());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap();
        }
        Wrapper::Xz => {
            let mut encoder = liblzma::write::XzEncoder::new(&mut out, 6);
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap();
        }
        Wrapper::Bzip2 => {
            let mut encoder = bzip2::write::BzEncoder::new(&mut out, bzip2::Compression::best());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap();
        }
        other => panic!("{other} is not needed here"),
    }
    out
}

fn decode(bytes: Vec<u8>, limits: &Limits) -> Result<u64> {
    let mut reader = wrapper::unwrap(Box::new(std::io::Cursor::new(bytes)), limits)?.reader;
    let mut buf = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        match reader.read(&mut buf) {
            Ok(0) => return Ok(total),
            Ok(n) => total += n as u64,
            Err(e) => return Err(Error::io("decoding", e)),
        }
    }
}

#[test]
fn gz_in_xz_of_nothing_but_zeros_ends() {
    // 64 MiB of zeros in each member, 512 members that the outer wrapper finds all the same: 32 GiB in some kilobytes.
    let member = compress(Wrapper::Gzip, &vec![0; 64 << 20]);
    let bomb = compress(Wrapper::Xz, &member.repeat(512));
    assert!(bomb.len() < 100_000, "{}", bomb.len());
    hostile(ErrorKind::Limit, "", || decode(bomb, &Limits::default()).map(drop));
}

#[test]
fn every_limit_is_tripped() {
    let strict = |change: fn(&mut Limits)| {
        let mut limits = Limits::default();
        change(&mut limits);
        limits
    };
    let tripped = |what: &str, result: Result<()>| {
        let error = failure(result);
        assert_eq!(error.kind(), ErrorKind::Limit, "{what}: {error}");
    };
    // A field that is added has to be tripped here.
    let Limits {
        virtual_size_max: _,
        table_bytes_max: _,
        expansion_ratio_max: _,
        bzip2_expansion_ratio_max: _,
        // `a_qcow2_whose_compressed_clusters_are_all_one_ends`
        image_expansion_ratio_max: _,
        decoded_bytes_max: _,
        decoder_memory_bytes_max: _,
        chain_depth_max: _,
        wall_time_max: _,
        output_bytes_max: _,
    } = Limits::default();

    let open = |limits: &Limits| sandbox::open(qcow2::Image::default().source(), limits).map(drop);
    open(&Limits::default()).unwrap();
    tripped("virtual size", open(&strict(|limits| limits.virtual_size_max = 512)));
    tripped("table bytes", open(&strict(|limits| limits.table_bytes_max = 4)));

    let zeros = vec![0; 80 << 20];
    let (gz, bz2) = (compress(Wrapper::Gzip, &zeros), compress(Wrapper::Bzip2, &zeros));
    let few = strict(|limits| limits.expansion_ratio_max = 10);
    tripped("expansion ratio", decode(gz.clone(), &few).map(drop));
    let few = strict(|limits| limits.bzip2_expansion_ratio_max = 10);
    tripped("bzip2 expansion ratio", decode(bz2, &few).map(drop));
    let few = strict(|limits| limits.decoded_bytes_max = 1 << 20);
    tripped("decoded bytes", decode(gz.clone(), &few).map(drop));
    let xz = compress(Wrapper::Xz, b"disk");
    tripped(
        "decoder memory",
        decode(xz, &strict(|limits| limits.decoder_memory_bytes_max = 1 << 20)).map(drop),
    );
    let ova =
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/ova/one-disk")).unwrap();
    let ova = bodies::sparse::expand(&ova);
    let ova = |limits: &Limits| {
        let file = Sparse { len: ova.len() as u64, parts: vec![(0, ova.clone().into())] };
        sandbox::open(file, limits).map(drop)
    };
    ova(&strict(|limits| limits.chain_depth_max = 1)).unwrap();
    tripped("chain depth", ova(&strict(|limits| limits.chain_depth_max = 0)));
    tripped(
        "wall time",
        decode(gz.clone(), &strict(|limits| limits.wall_time_max = Duration::ZERO)).map(drop),
    );
    tripped("chain depth", decode(gz, &strict(|limits| limits.chain_depth_max = 0)).map(drop));

    let dir = temp_dir();
    let (input, output) = (dir.path().join("input"), dir.path().join("output"));
    std::fs::write(&input, noise(1 << 20, 1)).unwrap();
    let compressed = || {
        Output::Image(
            dvcr_converter::format::create_options(dvcr_converter::format::Format::Qcow2, true, &[]).unwrap(),
        )
    };
    for (what, limits) in [
        ("wall time", strict(|limits| limits.wall_time_max = Duration::ZERO)),
        ("output bytes", strict(|limits| limits.output_bytes_max = 100_000)),
    ] {
        for kind in [Output::Raw, compressed()] {
            let progress = Progress::default();
            let result = file::convert(&input, &output, kind, &Options::default(), &limits, &progress);
            tripped(what, result.map(drop));
            assert!(!output.exists(), "{what}");
        }
    }
}
