//! Wrappers made by the real gzip, xz, zstd and bzip2, peeled off by us.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{noise, path, pipe, prose, qemu_img, run, temp_dir};
use dvcr_converter::convert::{self, Options};
use dvcr_converter::error::ErrorKind;
use dvcr_converter::file::{self, Output};
use dvcr_converter::format::{self, Format, PROBE_BYTES};
use dvcr_converter::io::ReadAt;
use dvcr_converter::limits::Limits;
use dvcr_converter::local::{FileSource, RawTarget};
use dvcr_converter::progress::Progress;
use dvcr_converter::qcow2::{Compression, WriteOptions};
use dvcr_converter::wrapper::{self, Wrapper};
use dvcr_converter::{Error, Result};
use proptest::prelude::*;

const ALL: [Wrapper; 5] = [Wrapper::Gzip, Wrapper::Xz, Wrapper::Zstd, Wrapper::Bzip2, Wrapper::Lz4];

fn compress(wrapper: Wrapper, bytes: &[u8]) -> Vec<u8> {
    let program = match wrapper {
        Wrapper::Gzip => ["gzip", "-1"],
        Wrapper::Xz => ["xz", "-0"],
        Wrapper::Zstd => ["zstd", "-1"],
        Wrapper::Bzip2 => ["bzip2", "-1"],
        Wrapper::Lz4 => ["lz4", "-1"],
    };
    pipe(&program, bytes)
}

fn decode(bytes: &[u8], limits: &Limits) -> Result<(Vec<Wrapper>, Vec<u8>)> {
    let mut unwrapped = wrapper::unwrap(Box::new(bytes), limits)?;
    let mut out = Vec::new();
    unwrapped.reader.read_to_end(&mut out).map_err(|e| Error::io("decoding", e))?;
    assert_eq!(unwrapped.head, out[..out.len().min(PROBE_BYTES)]);
    Ok((unwrapped.wrappers, out))
}

#[test]
fn every_pair_of_wrappers_is_peeled_off() {
    let inner = prose(300_000, 3);
    for outer in ALL {
        let once = compress(outer, &inner);
        assert_eq!(wrapper::detect(&once), Some(outer));
        assert!(decode(&once, &Limits::default()).unwrap() == (vec![outer], inner.clone()));
        for second in ALL {
            let twice = compress(outer, &compress(second, &inner));
            assert!(decode(&twice, &Limits::default()).unwrap() == (vec![outer, second], inner.clone()));
        }
    }
    assert!(decode(&inner, &Limits::default()).unwrap() == (vec![], inner));
}

#[test]
fn a_third_wrapper_is_refused() {
    let thrice = compress(Wrapper::Xz, &compress(Wrapper::Gzip, &compress(Wrapper::Zstd, b"disk")));
    let error = decode(&thrice, &Limits::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
}

#[test]
fn an_empty_file_stays_empty_in_every_wrapper() {
    for wrapper in ALL {
        assert_eq!(decode(&compress(wrapper, b""), &Limits::default()).unwrap(), (vec![wrapper], vec![]));
    }
}

#[test]
fn a_stream_that_is_cut_short_or_damaged_is_corrupt() {
    let inner = noise(400_000, 4);
    for wrapper in ALL {
        let whole = compress(wrapper, &inner);
        for cut in [whole.len() - 1, whole.len() - 9, whole.len() / 2, 20] {
            let error = decode(&whole[..cut], &Limits::default()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{wrapper} cut at {cut}: {error}");
        }
        // zstd -1 stores noise without a checksum in old versions: damage the frame's structure, not its content.
        let mut damaged = whole.clone();
        let at = if wrapper == Wrapper::Zstd { 6 } else { whole.len() / 2 };
        damaged[at..at + 8].fill(0xff);
        let error = decode(&damaged, &Limits::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{wrapper}: {error}");
    }
}

/// An error of a network or a file: not one of ours.
#[derive(Debug)]
struct Lost;

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the digest is another one")
    }
}

impl std::error::Error for Lost {}

/// Gives some bytes, then an error of the kind that decoders use for damage.
struct Failing<'a>(&'a [u8]);

impl Read for Failing<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        match self.0.read(buf)? {
            0 => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, Lost)),
            n => Ok(n),
        }
    }
}

#[test]
fn an_error_of_the_source_is_not_taken_for_damage() {
    let inner = noise(400_000, 4);
    for outer in ALL {
        for second in ALL {
            let whole = compress(outer, &compress(second, &inner));
            for bytes in [&whole[..whole.len() / 2], &whole[..11]] {
                let read = wrapper::unwrap(Box::new(Failing(bytes)), &Limits::default()).and_then(
                    |mut unwrapped| {
                        let read = std::io::copy(&mut unwrapped.reader, &mut std::io::sink());
                        read.map_err(|e| Error::io("decoding", e))
                    },
                );
                let error = read.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Io, "{outer} {second}: {error}");
                let source = std::error::Error::source(&error).unwrap();
                let source = source.downcast_ref::<std::io::Error>().unwrap();
                assert_eq!(source.kind(), std::io::ErrorKind::InvalidData);
                assert!(source.get_ref().unwrap().is::<Lost>(), "{source:?}");
            }
        }
    }
    // Damage tells what the decoder said.
    let whole = compress(Wrapper::Xz, &inner);
    let error = decode(&whole[..whole.len() / 2], &Limits::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let carried = std::error::Error::source(&error).unwrap();
    let carried = carried.downcast_ref::<std::io::Error>().unwrap().get_ref().unwrap();
    assert!(std::error::Error::source(carried).is_some(), "{carried:?}");
}

#[test]
fn garbage_after_the_last_member_is_an_error_and_zeros_are_padding() {
    for wrapper in [Wrapper::Gzip, Wrapper::Bzip2] {
        let mut padded = compress(wrapper, b"disk");
        padded.resize(padded.len() + 300_000, 0);
        assert_eq!(decode(&padded, &Limits::default()).unwrap().1, b"disk");
        padded.push(1);
        assert_eq!(decode(&padded, &Limits::default()).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn a_decompression_bomb_is_stopped() {
    let bomb = compress(Wrapper::Gzip, &vec![0; 80 << 20]);
    let small_ratio = Limits { expansion_ratio_max: 100, ..Limits::default() };
    let error = decode(&bomb, &small_ratio).map(|(wrappers, _)| wrappers).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
    let few_bytes = Limits { decoded_bytes_max: 1 << 20, ..Limits::default() };
    assert_eq!(decode(&bomb, &few_bytes).unwrap_err().kind(), ErrorKind::Limit);
}

#[test]
fn a_blank_disk_is_no_bomb() {
    let blank = vec![0; 80 << 20];
    for program in [["gzip", "-9"], ["xz", "-9"], ["zstd", "-19"], ["bzip2", "-9"], ["lz4", "-9"]] {
        let packed = pipe(&program, &blank);
        assert!(decode(&packed, &Limits::default()).unwrap().1 == blank, "{program:?}");
    }
}

#[test]
fn a_decoder_gets_no_more_memory_than_allowed() {
    let dir = temp_dir();
    let file = dir.path().join("disk");
    std::fs::write(&file, prose(40 << 20, 5)).unwrap();
    run("zstd", &["-q", "--long=27", "-1", path(&file), "-o", path(&dir.path().join("disk.zst"))]);
    run("xz", &["-k", "--lzma2=preset=0,dict=128MiB", path(&file)]);
    for name in ["disk.zst", "disk.xz"] {
        let bytes = std::fs::read(dir.path().join(name)).unwrap();
        let strict = Limits { decoder_memory_bytes_max: 16 << 20, ..Limits::default() };
        let error = decode(&bytes, &strict).map(|(wrappers, _)| wrappers).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Limit, "{name}: {error}");
        let generous = Limits { decoder_memory_bytes_max: 240 << 20, ..Limits::default() };
        assert_eq!(decode(&bytes, &generous).unwrap().1.len(), 40 << 20, "{name}");
    }
}

#[test]
fn nested_decoders_share_one_memory_budget() {
    let dir = temp_dir();
    let file = dir.path().join("disk");
    std::fs::write(&file, prose(1 << 20, 5)).unwrap();
    run("xz", &["-k", "--lzma2=preset=0,dict=64MiB", path(&file)]);
    let inner = std::fs::read(dir.path().join("disk.xz")).unwrap();
    assert_eq!(decode(&inner, &Limits::default()).unwrap().1.len(), 1 << 20);
    // gzip leaves enough, a second dictionary of that size does not fit.
    assert_eq!(decode(&compress(Wrapper::Gzip, &inner), &Limits::default()).unwrap().1.len(), 1 << 20);
    let error = decode(&compress(Wrapper::Xz, &inner), &Limits::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn members_one_after_another_are_one_file(
        wrapper in prop_oneof![
            Just(Wrapper::Gzip), Just(Wrapper::Xz), Just(Wrapper::Zstd), Just(Wrapper::Bzip2), Just(Wrapper::Lz4)
        ],
        members in proptest::collection::vec((0usize..200_000, any::<u64>()), 1..5),
    ) {
        let mut whole = Vec::new();
        let mut stored = Vec::new();
        for (len, seed) in members {
            let member = prose(len, seed);
            stored.extend(compress(wrapper, &member));
            whole.extend(member);
        }
        prop_assert!(decode(&stored, &Limits::default()).unwrap() == (vec![wrapper], whole));
    }
}

fn convert(input: &Path, output: &Path, kind: Output) -> Result<file::Converted> {
    file::convert(input, output, kind, &Options::default(), &Limits::default(), &Progress::default())
}

#[test]
fn a_wrapped_raw_disk_becomes_raw_or_qcow2_as_it_is_decoded() {
    let dir = temp_dir();
    // Data, a hole, data, and an odd end.
    let mut disk = prose(3 << 20, 6);
    disk.resize(20 << 20, 0);
    disk.extend(noise((5 << 20) + 77, 7));
    let raw = dir.path().join("disk.raw");
    std::fs::write(&raw, &disk).unwrap();
    let padded = disk.len().next_multiple_of(512);
    for wrapper in ALL {
        let wrapped = dir.path().join("wrapped");
        std::fs::write(&wrapped, compress(wrapper, &disk)).unwrap();

        let inspection = file::inspect(&wrapped, &Limits::default(), &Progress::default()).unwrap();
        assert_eq!((inspection.wrappers, inspection.info.virtual_size), (vec![wrapper], padded as u64));

        let out = dir.path().join("out.raw");
        convert(&wrapped, &out, Output::Raw).unwrap();
        let written = std::fs::read(&out).unwrap();
        assert_eq!(written.len(), padded);
        assert!(written[..disk.len()] == disk && written[disk.len()..].iter().all(|&b| b == 0));

        for compression in [Compression::None, Compression::Zlib, Compression::Zstd] {
            for cluster_size in [512, 4096, 65536, 2 << 20] {
                let out = dir.path().join("out.qcow2");
                let write = WriteOptions { cluster_size, compression, ..WriteOptions::default() };
                let converted = convert(&wrapped, &out, Output::Image(Box::new(write))).unwrap();
                assert_eq!(converted.virtual_size, padded as u64);
                common::assert_sound_and_equal(&out, &raw, "raw");
            }
        }
    }
}

#[test]
fn a_wrapped_qcow2_image_becomes_what_qemu_makes_of_the_image_inside() {
    let dir = temp_dir();
    let raw = dir.path().join("disk.raw");
    // Larger than the window over the stream; data, a hole, data.
    let mut disk = noise(26 << 20, 8);
    disk.resize(87 << 20, 0);
    disk.extend(prose(3 << 20, 9));
    std::fs::write(&raw, &disk).unwrap();
    let (qemu, ours) = (dir.path().join("qemu.qcow2"), dir.path().join("ours.qcow2"));
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-c", path(&raw), path(&qemu)]);
    let packed =
        WriteOptions { cluster_size: 4096, compression: Compression::Zstd, ..WriteOptions::default() };
    convert(&raw, &ours, Output::Image(Box::new(packed))).unwrap();
    let (wrapped, out) = (dir.path().join("wrapped"), dir.path().join("out"));
    let expected = dir.path().join("expected");
    for (image, wrappers) in [(&qemu, &ALL[..]), (&ours, &[Wrapper::Zstd])] {
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path(image), path(&expected)]);
        let bytes = std::fs::read(image).unwrap();
        for &wrapper in wrappers {
            std::fs::write(&wrapped, compress(wrapper, &bytes)).unwrap();
            let inspection = file::inspect(&wrapped, &Limits::default(), &Progress::default()).unwrap();
            assert_eq!((inspection.info.format, inspection.info.virtual_size), (Format::Qcow2, 90 << 20));

            let progress = Progress::default();
            let (options, limits) = (Options::default(), Limits::default());
            let converted = file::convert(&wrapped, &out, Output::Raw, &options, &limits, &progress).unwrap();
            assert_eq!((converted.format, converted.virtual_size), (Format::Qcow2, 90 << 20));
            assert_eq!((progress.done(), progress.total()), (90 << 20, 90 << 20));
            common::assert_same_bytes(&out, &expected);
        }
        std::fs::write(&wrapped, compress(Wrapper::Gzip, &bytes)).unwrap();
        convert(&wrapped, &out, Output::Image(Box::new(WriteOptions::default()))).unwrap();
        common::assert_sound_and_equal(&out, &raw, "raw");

        // Damage behind everything that the disk needs is still found.
        let mut cut = compress(Wrapper::Gzip, &bytes);
        cut.truncate(cut.len() - 1);
        std::fs::write(&wrapped, cut).unwrap();
        assert_eq!(convert(&wrapped, &out, Output::Raw).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

/// A file that counts how often it is read backwards.
struct Forward {
    file: FileSource,
    front: AtomicU64,
    turns: AtomicU64,
}

impl ReadAt for Forward {
    fn len(&self) -> u64 {
        self.file.len()
    }
    fn is_forward_only(&self) -> bool {
        true
    }
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        if self.front.swap(offset, Ordering::Relaxed) > offset {
            self.turns.fetch_add(1, Ordering::Relaxed);
        }
        self.file.read_exact_at(buf, offset)
    }
}

#[test]
fn an_image_written_in_one_pass_is_read_in_few() {
    let dir = temp_dir();
    let (raw, image, out) = (dir.path().join("raw"), dir.path().join("qcow2"), dir.path().join("out"));
    std::fs::write(&raw, noise(4 << 20, 1)).unwrap();
    for compression in [Compression::None, Compression::Zlib] {
        // 128 L2 tables, each behind its clusters, and the L1 table at the end.
        let write = WriteOptions { cluster_size: 512, compression, ..WriteOptions::default() };
        convert(&raw, &image, Output::Image(Box::new(write))).unwrap();
        let source = Arc::new(Forward {
            file: FileSource::open(&image).unwrap(),
            front: AtomicU64::new(0),
            turns: AtomicU64::new(0),
        });
        let opened = format::open(source.clone(), &Limits::default()).unwrap();
        let target = RawTarget::create(&out, opened.disk.virtual_size()).unwrap();
        let options = Options { workers: 1, ..Options::default() };
        convert::to_raw(&*opened.disk, &target, &options, &Progress::default()).unwrap();
        target.finish().unwrap();
        common::assert_same_bytes(&raw, &out);
        // From the L1 table to the L2 tables, and from there to the clusters.
        assert_eq!(source.turns.load(Ordering::Relaxed), 2);
    }
}
