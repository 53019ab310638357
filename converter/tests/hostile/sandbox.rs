//! A process of its own for a hostile case: a watchdog ends it, and its peak of memory is its own.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use dvcr_converter::format::{self, Image};
use dvcr_converter::io::ReadAt;
use dvcr_converter::limits::Limits;
use dvcr_converter::{ErrorKind, Result};

/// What a case may take: seconds on an idle machine, more on a busy one.
const CASE_TIME_MS: u64 = 120_000;

/// Peak of resident memory: 64 MiB, and buffers of two workers with what a test program needs anyway.
const CASE_MEMORY_KIB: u64 = (64 + 32) << 10;

/// Most virtual memory, so that a failing case cannot take the machine with it.
const ADDRESS_SPACE_BYTES: u64 = 4 << 30;

/// Tells the process of a case which one of its test it is.
const CASE_VARIABLE: &str = "DVCR_HOSTILE_CASE";

/// Begins the line that tells how the case ended.
const OUTCOME: &str = "hostile case ended:";

/// Runs `work` in a process of its own: it fails with `kind`, its message has `says` in it, in bounded time and memory.
///
/// The process is this test program again, with this very test; there the case is run, and all others are passed over.
pub fn hostile(kind: ErrorKind, says: &str, work: impl FnOnce() -> Result<()>) {
    thread_local!(static CASES: AtomicUsize = const { AtomicUsize::new(0) });
    let case = CASES.with(|cases| cases.fetch_add(1, Ordering::Relaxed));
    if let Ok(wanted) = std::env::var(CASE_VARIABLE) {
        if wanted == case.to_string() {
            let limit = rustix::process::Rlimit { current: Some(ADDRESS_SPACE_BYTES), maximum: None };
            rustix::process::setrlimit(rustix::process::Resource::As, limit).unwrap();
            // What the test prepared is not the case's.
            std::fs::write("/proc/self/clear_refs", "5").unwrap();
            let outcome = match work() {
                Ok(()) => "no error".to_owned(),
                Err(e) => format!("{:?}: {e}", e.kind()),
            };
            println!("\n{OUTCOME} {} {outcome}", peak_kib());
        }
        return;
    }
    let test = std::thread::current().name().unwrap().to_owned();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([&test, "--exact", "--nocapture"])
        .env(CASE_VARIABLE, case.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_millis(CASE_TIME_MS);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{test}, case {case}: it does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let outcome =
        text.lines().find_map(|line| line.strip_prefix(OUTCOME)).unwrap_or_else(|| panic!("{test}: {text}"));
    let (peak, outcome) = outcome.trim().split_once(' ').unwrap();
    let expected = format!("{kind:?}: ");
    assert!(
        outcome.starts_with(&expected) && outcome.contains(says),
        "{test}, case {case}: {outcome}, not {expected}{says}"
    );
    let peak: u64 = peak.parse().unwrap();
    assert!(peak <= CASE_MEMORY_KIB, "{test}, case {case}: {peak} KiB");
}

/// Peak of resident memory of this process.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Opens an image inside `limits`.
pub fn open(source: impl ReadAt + 'static, limits: &Limits) -> Result<Image> {
    format::open(Arc::new(source), limits)
}

/// Opens the image and reads all of its data, as a conversion does.
pub fn read_through(source: impl ReadAt + 'static) -> Result<()> {
    let disk = open(source, &Limits::default())?.disk;
    let mut buf = vec![0; 2 << 20];
    let mut at = 0;
    while at < disk.virtual_size() {
        let extent = disk.extent_at(at)?;
        if !extent.is_data() {
            at = extent.end();
            continue;
        }
        let n = (disk.virtual_size() - at).min(buf.len() as u64);
        disk.read_at(&mut buf[..n as usize], at)?;
        at += n;
    }
    Ok(())
}

/// A file that is mostly zeros.
pub struct Sparse {
    pub len: u64,
    /// What is not, by its offset; later ones lie on top.
    pub parts: Vec<(u64, Arc<[u8]>)>,
}

impl ReadAt for Sparse {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|&end| end <= self.len);
        let end = end.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        buf.fill(0);
        for (at, part) in &self.parts {
            let (from, to) = (offset.max(*at), end.min(at + part.len() as u64));
            if from < to {
                let len = (to - from) as usize;
                let into = (from - offset) as usize;
                buf[into..into + len].copy_from_slice(&part[(from - at) as usize..][..len]);
            }
        }
        Ok(())
    }
}

/// A file with a table of big-endian words that are computed where they are read.
pub struct Computed {
    pub file: Sparse,
    pub table_at: u64,
    pub words: u64,
    pub word: fn(u64) -> u64,
}

impl ReadAt for Computed {
    fn len(&self) -> u64 {
        self.file.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.file.read_exact_at(buf, offset)?;
        let (from, to) =
            (offset.max(self.table_at), (offset + buf.len() as u64).min(self.table_at + self.words * 8));
        for at in from..to {
            let (index, byte) = ((at - self.table_at) / 8, (at - self.table_at) % 8);
            buf[(at - offset) as usize] = (self.word)(index).to_be_bytes()[byte as usize];
        }
        Ok(())
    }
}
