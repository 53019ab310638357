//! What the real programs write, whole and damaged, through one thread and through several.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::io::{ErrorKind, Read};

use common::{noise, path, pipe, pipe_any, prose, run, temp_dir};
use dvcr_converter::limits::Limits;
use dvcr_converter::wrapper::{self, Wrapper};
use proptest::prelude::*;

const WORKERS: [usize; 3] = [1, 2, 5];

/// A source that gives a few bytes at a time, and is interrupted between them.
struct Trickle<'a> {
    bytes: &'a [u8],
    state: u64,
    interrupted: bool,
}

impl Read for Trickle<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.interrupted = !self.interrupted;
        if self.interrupted {
            return Err(ErrorKind::Interrupted.into());
        }
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let most = [1, 3, 700, 70_000][(self.state >> 60) as usize % 4];
        let n = most.min(buf.len());
        self.bytes.read(&mut buf[..n])
    }
}

/// Reads pieces of odd sizes, as whoever reads does not ask for round ones.
fn read_all(mut reader: impl Read) -> std::io::Result<Vec<u8>> {
    let (mut out, mut piece) = (Vec::new(), vec![0; 100_003]);
    loop {
        match reader.read(&mut piece) {
            Ok(0) => return Ok(out),
            Ok(n) => out.extend_from_slice(&piece[..n]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

fn decode(wrapper: Wrapper, bytes: &[u8], workers: usize) -> std::io::Result<Vec<u8>> {
    read_all(wrapper::decoder_with(wrapper, Box::new(bytes), &Limits::default(), workers).unwrap())
}

/// Asserts that `stored` is recognised, and decodes to `whole` however it is read.
fn assert_decodes(wrapper: Wrapper, stored: &[u8], whole: &[u8], what: &str) {
    assert_eq!(wrapper::detect(stored), Some(wrapper), "{what}");
    for workers in WORKERS {
        assert!(decode(wrapper, stored, workers).unwrap() == whole, "{what}, {workers} workers");
    }
    let trickle = Trickle { bytes: stored, state: 1, interrupted: false };
    let unwrapped = wrapper::unwrap_with(Box::new(trickle), &Limits::default(), 3).unwrap();
    assert_eq!(unwrapped.wrappers, [wrapper], "{what}");
    assert!(read_all(unwrapped.reader).unwrap() == whole, "{what}, in little pieces");
}

/// A program with its options.
type Program = &'static [&'static str];

/// The ways in which the real programs compress, and what the result is.
const PROGRAMS: [(Wrapper, Program); 22] = [
    (Wrapper::Gzip, &["gzip", "-1"]),
    (Wrapper::Gzip, &["gzip", "-9"]),
    (Wrapper::Xz, &["xz", "-0"]),
    (Wrapper::Xz, &["xz", "-1", "--check=sha256"]),
    (Wrapper::Xz, &["xz", "-0", "--check=none"]),
    (Wrapper::Xz, &["xz", "-0", "-T2", "--block-size=64KiB"]),
    (Wrapper::Xz, &["xz", "-6", "-T2", "--block-size=2MiB"]),
    (Wrapper::Xz, &["xz", "-T1", "-0", "--block-size=100KiB"]),
    (Wrapper::Xz, &["xz", "--x86", "--lzma2=preset=0"]),
    (Wrapper::Zstd, &["zstd", "-1"]),
    (Wrapper::Zstd, &["zstd", "-19", "--no-check"]),
    (Wrapper::Zstd, &["zstd", "-T0", "--long=24"]),
    (Wrapper::Zstd, &["pzstd", "-1", "-p2"]),
    (Wrapper::Zstd, &["pzstd", "-3", "-p7"]),
    (Wrapper::Bzip2, &["bzip2", "-1"]),
    (Wrapper::Bzip2, &["bzip2", "-9"]),
    (Wrapper::Lz4, &["lz4", "-1"]),
    (Wrapper::Lz4, &["lz4", "-9", "-B4", "-BD"]),
    (Wrapper::Lz4, &["lz4", "-B5", "-BX"]),
    (Wrapper::Lz4, &["lz4", "-B6", "-BD", "-BX", "--no-frame-crc"]),
    (Wrapper::Lz4, &["lz4", "-1", "--no-frame-crc"]),
    (Wrapper::Lz4, &["lz4", "-l"]),
];

#[test]
fn what_the_real_programs_write_decodes_to_what_they_were_given() {
    let mut mixed = prose(2 << 20, 1);
    mixed.extend(noise(1 << 20, 2));
    mixed.resize(mixed.len() + (3 << 20), 0);
    mixed.extend(prose(77, 3));
    for whole in [&mixed[..], &mixed[..100_000], &mixed[..65_536], b"x", b""] {
        for (wrapper, program) in PROGRAMS {
            assert_decodes(wrapper, &pipe(program, whole), whole, &format!("{program:?} of {}", whole.len()));
        }
    }
    // With names, sizes and times of a file, and with the size of the content.
    let dir = temp_dir();
    let file = dir.path().join("disk");
    std::fs::write(&file, &mixed).unwrap();
    run("gzip", &["-k", path(&file)]);
    run("zstd", &["-q", path(&file)]);
    run("lz4", &["-q", "-B5", "--content-size", path(&file), path(&dir.path().join("disk.lz4"))]);
    for (wrapper, name) in [(Wrapper::Gzip, "gz"), (Wrapper::Zstd, "zst"), (Wrapper::Lz4, "lz4")] {
        let stored = std::fs::read(file.with_extension(name)).unwrap();
        assert_decodes(wrapper, &stored, &mixed, name);
    }
}

#[test]
fn skippable_frames_are_passed_over_wherever_they_are() {
    let skippable = |len: usize| {
        let mut frame = vec![0x5a, 0x2a, 0x4d, 0x18];
        frame.extend((len as u32).to_le_bytes());
        frame.extend(noise(len, 5));
        frame
    };
    let whole = prose(300_000, 4);
    for (wrapper, program) in PROGRAMS.into_iter().filter(|(w, _)| matches!(w, Wrapper::Zstd | Wrapper::Lz4))
    {
        let frame = pipe(program, &whole);
        for len in [0, 5, 90_000] {
            let file =
                [skippable(len), frame.clone(), skippable(1), skippable(len), frame.clone(), skippable(len)];
            assert_decodes(wrapper, &file.concat(), &whole.repeat(2), &format!("{program:?}, {len}"));
            let mut cut = file.concat();
            cut.extend(&skippable(9)[..16]);
            for workers in WORKERS {
                assert!(decode(wrapper, &cut, workers).is_err(), "{program:?}");
            }
        }
    }
}

/// A file of two streams or frames, each of several blocks if the program was told so.
struct Small {
    wrapper: Wrapper,
    program: Program,
    stored: Vec<u8>,
    whole: Vec<u8>,
    /// Bytes of the first stream, decoded.
    first: usize,
}

/// A small file of each form that has a checksum.
fn small_files() -> impl Iterator<Item = Small> {
    let (whole, first) = (prose(1500, 6), 700);
    let checked = PROGRAMS.into_iter().filter(|(_, program)| {
        !["--check=none", "--no-check", "--no-frame-crc", "-l", "-T0"].iter().any(|p| program.contains(p))
    });
    checked.map(move |(wrapper, program)| {
        let stored = [pipe(program, &whole[..first]), pipe(program, &whole[first..])].concat();
        Small { wrapper, program, stored, whole: whole.clone(), first }
    })
}

#[test]
fn a_file_that_is_cut_anywhere_is_an_error_or_ends_at_a_member() {
    for Small { wrapper, program, stored, whole, first } in small_files() {
        let end = pipe(program, &whole[..first]).len();
        // pzstd puts a skippable frame of twelve bytes before each frame.
        let ends = match program[0] {
            "pzstd" => vec![(12, 0), (end, first), (end + 12, first)],
            _ => vec![(end, first)],
        };
        for len in 0..stored.len() {
            for workers in [1, 3] {
                if let Ok(out) = decode(wrapper, &stored[..len], workers) {
                    assert!(ends.contains(&(len, out.len())), "{program:?} cut at {len}: {}", out.len());
                    assert!(whole.starts_with(&out), "{program:?} cut at {len}");
                }
            }
        }
    }
}

#[test]
fn a_flipped_bit_is_an_error_or_changes_nothing() {
    for Small { wrapper, program, mut stored, whole, .. } in small_files() {
        let mut accepted = Vec::new();
        for bit in 0..stored.len() * 8 {
            stored[bit / 8] ^= 1 << (bit % 8);
            let [one, many] = [1, 3].map(|workers| decode(wrapper, &stored, workers));
            assert_eq!(one.is_ok(), many.is_ok(), "{program:?} bit {bit}: {one:?} {many:?}");
            if let (Ok(one), Ok(many)) = (one, many) {
                assert!(one == whole && many == whole, "{program:?} bit {bit}: {} bytes", one.len());
                accepted.push(stored.clone());
            }
            stored[bit / 8] ^= 1 << (bit % 8);
        }
        // What we accept, the real program accepts; pzstd alone insists on its own skippable frames.
        let program = if program[0] == "pzstd" { "zstd" } else { program[0] };
        for stored in accepted.iter().step_by(accepted.len() / 10 + 1) {
            let (ok, out) = pipe_any(&[program, "-d"], stored);
            assert!(ok && out == whole, "{program:?} refuses what we accept: {stored:02x?}");
        }
    }
}

#[test]
fn a_failed_decoder_stays_failed() {
    for Small { wrapper, program, mut stored, .. } in small_files() {
        let at = stored.len() - 30;
        stored.truncate(at);
        for workers in [1, 3] {
            let mut reader =
                wrapper::decoder_with(wrapper, Box::new(&stored[..]), &Limits::default(), workers).unwrap();
            assert!(read_all(&mut reader).is_err(), "{program:?}");
            assert!(reader.read(&mut [0; 10]).is_err(), "{program:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn members_blocks_and_frames_decode_the_same_through_any_number_of_threads(
        program in proptest::sample::select(&PROGRAMS[..]),
        parts in proptest::collection::vec((0usize..400_000, any::<u64>(), any::<bool>()), 1..6),
        workers in 1usize..9,
        memory in proptest::sample::select(&[17_u64 << 20, 24 << 20, 120 << 20][..]),
        seed in any::<u64>(),
    ) {
        let (wrapper, program) = program;
        let (mut whole, mut stored) = (Vec::new(), Vec::new());
        for (len, seed, random) in parts {
            let part = if random { noise(len, seed) } else { prose(len, seed) };
            stored.extend(pipe(program, &part));
            whole.extend(part);
        }
        let limits = Limits { decoder_memory_bytes_max: memory, ..Limits::default() };
        let trickle = Trickle { bytes: &stored, state: seed, interrupted: false };
        let decoder = wrapper::decoder_with(wrapper, Box::new(trickle), &limits, workers).unwrap();
        match read_all(decoder) {
            Ok(out) => prop_assert!(out == whole, "{:?}", program),
            // A window of 16 MiB fits in a buffer of that size alone.
            Err(e) => prop_assert!(program.contains(&"--long=24") && memory < 32 << 20, "{program:?} {e}"),
        }
    }
}
