//! Decompression bombs. One test, because what it measures is the memory of its whole process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::time::{Duration, Instant};

use common::pipe;
use dvcr_converter::error::ErrorKind;
use dvcr_converter::limits::Limits;
use dvcr_converter::{Error, Result, wrapper};

/// Decodes all of `bytes` and counts; kept out are the bytes themselves.
fn decode(bytes: &[u8], limits: &Limits, workers: usize) -> Result<u64> {
    let unwrapped = wrapper::unwrap_with(Box::new(bytes), limits, workers)?;
    let mut reader = unwrapped.reader;
    std::io::copy(&mut reader, &mut std::io::sink()).map_err(|e| Error::io("decoding", e))
}

/// The most memory that this process ever had, bytes.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Streams inside a bomb.
const UNITS: usize = 16;

const GZIP: &[&str] = &["gzip", "-9"];
const XZ: &[&str] = &["xz", "-T2", "--block-size=16MiB"];
const ZSTD: &[&str] = &["zstd", "-19"];
const BZIP2: &[&str] = &["bzip2", "-9"];
const LZ4: &[&str] = &["lz4", "-9"];
const ALL: [&[&str]; 5] = [GZIP, XZ, ZSTD, BZIP2, LZ4];

#[test]
fn a_bomb_ends_in_seconds_below_the_memory_bound_and_leaves_no_thread() {
    // Streams of 64 MiB of zeros one after another, as many as hold 1 GiB, in a second wrapper.
    let unit = 64 << 20;
    let zeros = vec![0; unit];
    let units = ALL.map(|program| pipe(program, &zeros));
    drop(zeros);
    let mut bombs = Vec::new();
    for (inner, unit) in ALL.iter().zip(&units) {
        let long = unit.repeat(UNITS);
        for outer in ALL {
            bombs.push((outer[0], inner[0], pipe(outer, &long)));
        }
    }
    let (before, threads) = (peak_bytes(), threads());

    // Bounds of the ratio, as the largest of them gives it away.
    let defaults = Limits::default();
    for workers in [1, 4] {
        for (outer, inner, bomb) in &bombs {
            // lz4 and gzip pack too little: it takes the bound on the whole, or on the virtual disk.
            let ratio = (UNITS * unit) as u64 / bomb.len() as u64;
            let allowed = if [*outer, *inner].contains(&"bzip2") { 2_000_000 } else { 100_000 };
            let limits = match ratio > allowed {
                true => defaults.clone(),
                false => Limits { decoded_bytes_max: 100 << 20, ..defaults.clone() },
            };
            let begun = Instant::now();
            let error = decode(bomb, &limits, workers).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Limit, "{inner} in {outer}: {error}");
            assert!(begun.elapsed() < Duration::from_secs(60), "{inner} in {outer}: {:?}", begun.elapsed());
        }
        for (program, unit) in ALL.iter().zip(&units) {
            let limits = Limits { decoded_bytes_max: 100 << 20, ..Limits::default() };
            let error = decode(&unit.repeat(4), &limits, workers).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Limit, "{program:?}: {error}");
        }
    }

    // What asks for much memory by few bytes: a dictionary of 1.5 GiB, a window of 2 GiB, a block of 1 GiB.
    let small = pipe(&["xz", "--lzma2=preset=0,dict=1536MiB"], b"disk");
    let window = [&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0x01, 0x00, 0x00][..], b"disk"].concat();
    for bytes in [&small, &window] {
        for workers in [1, 4] {
            assert_eq!(decode(bytes, &defaults, workers).unwrap_err().kind(), ErrorKind::Limit);
        }
    }
    let blocks = pipe(&["xz", "-T2", "-0", "--block-size=1GiB"], &vec![0; 100 << 20]);
    assert_eq!(decode(&blocks, &defaults, 4).unwrap(), 100 << 20);

    // All readers are gone, most of them halfway through their file.
    assert_eq!(self::threads(), threads);

    let (peak, bound) =
        (peak_bytes(), before.max(100 << 20) + defaults.decoder_memory_bytes_max + (32 << 20));
    assert!(
        peak <= bound,
        "the peak was {} MiB of {} MiB; {} MiB before",
        peak >> 20,
        bound >> 20,
        before >> 20
    );
    eprintln!("the peak was {} MiB, {} MiB before", peak >> 20, before >> 20);
}
