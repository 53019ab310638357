//! What the tests share: real programs as oracles, and short ways to convert.
#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use dvcr_converter::convert::{self, Options};
use dvcr_converter::format::{self, Image};
use dvcr_converter::io::{CreateOptions, Finished, ReadAt};
use dvcr_converter::limits::Limits;
use dvcr_converter::local::{FileSource, RawTarget};
use dvcr_converter::progress::Progress;
use dvcr_converter::qcow2::WriteOptions;
use dvcr_converter::sink::ImageTarget;
use dvcr_converter::{Error, Result};

/// An image file in memory.
pub struct Bytes(pub Vec<u8>);

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

/// Opens the image and reads all of it, at most 64 MiB; returns what was read.
pub fn read_through(bytes: Vec<u8>) -> Result<Vec<u8>> {
    let disk = format::open(Arc::new(Bytes(bytes)), &Limits::default())?.disk;
    let end = disk.virtual_size().min(64 << 20);
    let mut read = vec![0xa5; end as usize];
    for (start, piece) in (0..end).step_by(1 << 20).zip(read.chunks_mut(1 << 20)) {
        let extent = disk.extent_at(start)?;
        assert!(extent.start == start && extent.len > 0 && extent.end() <= disk.virtual_size(), "{extent:?}");
        disk.read_at(piece, start)?;
    }
    Ok(read)
}

/// A directory on a real file system: direct I/O and holes behave there as in production.
pub fn temp_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("dvcr-converter-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Runs a program to its successful end and returns what it printed.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

/// Gives `bytes` to a program that compresses, and returns what it makes of them.
pub fn pipe(program: &[&str], bytes: &[u8]) -> Vec<u8> {
    let (ok, out) = pipe_any(program, bytes);
    assert!(ok, "{program:?} failed");
    out
}

/// Does the same, and tells whether the program was content.
pub fn pipe_any(program: &[&str], bytes: &[u8]) -> (bool, Vec<u8>) {
    let mut child = Command::new(program[0])
        .args(&program[1..])
        .args(["-c", "-q"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|e| panic!("{program:?}: {e}"));
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        // One that found fault reads no more.
        scope.spawn(move || std::io::Write::write_all(&mut stdin, bytes));
        let mut out = Vec::new();
        child.stdout.take().unwrap().read_to_end(&mut out).unwrap();
        (child.wait().unwrap().success(), out)
    })
}

pub fn qemu_img(args: &[&str]) -> String {
    run("qemu-img", args)
}

/// Runs `commands` on `image` in one qemu-io. A compressed write over an allocated cluster fails, which is fine
/// for a random test; nothing else may. False if qemu notices that it damages the image, and goes no further.
#[must_use]
pub fn qemu_io(image: &Path, commands: &[String]) -> bool {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(path(image));
    let output = Command::new("qemu-io").args(&args).output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if text.contains("qcow2: Marking image as corrupt: ") {
        return false;
    }
    assert!(text.lines().all(|line| line == "write failed: Input/output error"), "{args:?}: {text}");
    true
}

pub fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn open(image: &Path) -> Result<Image> {
    format::open(Arc::new(FileSource::open(image)?), &Limits::default())
}

/// Converts with our engine to a raw file.
pub fn to_raw(image: &Path, raw: &Path, options: &Options) -> Result<()> {
    let image = open(image)?;
    let target = RawTarget::create(raw, image.disk.virtual_size())?;
    convert::to_raw(image.disk.as_ref(), &target, options, &Progress::default())?;
    target.finish()
}

/// Converts with our engine to a qcow2 file.
pub fn to_qcow2(image: &Path, qcow2: &Path, write: &WriteOptions, options: &Options) -> Result<Finished> {
    let image = open(image)?;
    let mut target = ImageTarget::create(qcow2)?;
    let finished = convert::to_image(image.disk.as_ref(), &mut target, write, options, &Progress::default())?;
    target.finish(&finished)?;
    Ok(finished)
}

/// Converts with our engine to a file in the format of `image`.
pub fn to_image(
    source: &Path,
    target: &Path,
    image: &dyn CreateOptions,
    options: &Options,
) -> Result<Finished> {
    let source = open(source)?;
    let mut sink = ImageTarget::create(target)?;
    let finished = convert::to_image(source.disk.as_ref(), &mut sink, image, options, &Progress::default())?;
    sink.finish(&finished)?;
    Ok(finished)
}

/// Asserts that a qcow2 file is without fault and holds the disk of `expected`.
pub fn assert_sound_and_equal(qcow2: &Path, expected: &Path, expected_format: &str) {
    let check = qemu_img(&["check", "-f", "qcow2", path(qcow2)]);
    assert!(check.contains("No errors were found"), "{check}");
    let (a, b) = (path(qcow2), path(expected));
    qemu_img(&["compare", "-f", "qcow2", "-F", expected_format, a, b]);
}

/// Asserts that two files have the same bytes.
pub fn assert_same_bytes(a: &Path, b: &Path) {
    run("cmp", &[path(a), path(b)]);
}

/// Bytes that no program compresses, the same for the same seed.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Text-like bytes: they compress to about a third.
pub fn prose(len: usize, seed: u64) -> Vec<u8> {
    const WORDS: [&str; 8] =
        ["cluster ", "extent ", "refcount ", "backing ", "sector ", "of ", "the ", "guest\n"];
    let mut bytes = Vec::with_capacity(len + 16);
    for n in noise(len, seed) {
        bytes.extend(WORDS[usize::from(n) % 8].as_bytes());
        bytes.push(n);
        if bytes.len() >= len {
            break;
        }
    }
    bytes.truncate(len);
    bytes
}

/// The error of a conversion that must fail.
pub fn failure<T>(result: Result<T>) -> Error {
    match result {
        Ok(_) => panic!("it succeeded"),
        Err(e) => e,
    }
}

pub fn image_path(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    dir.path().join(name)
}
