//! Memory is constant in image size: whatever the way in, and on the way out.

use anyhow::{Context, Result, bail};
use dvcr_tests::fixture::Noise;
use dvcr_tests::{Daemon, FileServer, Registry, cmd, dvcr, qemu, run, temp_dir, utf8};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

const DISK_BYTES: u64 = 10 << 30;
/// Pieces of noise, evenly over the disk; together more than twice what an import may use.
const PIECES: u64 = 80;
const PIECE_BYTES: usize = 4 << 20;
const PEAK_BYTES_MAX: u64 = 128 << 20;
const RUN_TIMEOUT: Duration = Duration::from_secs(10 * 60);

#[test]
fn a_10_gib_image_comes_in_and_goes_out_within_128_mib() -> Result<()> {
    let dir = temp_dir();
    let raw = dir.path().join("disk.raw");
    sparse_disk(&raw)?;
    let qcow2 = dir.path().join("disk.qcow2");
    qemu::convert(&raw, "raw", &qcow2, "qcow2")?;
    run(&cmd("zstd", ["-q", "-1", utf8(&raw)]))?;

    let server = FileServer::start(dir.path())?;
    let registry = Registry::start(&dir.path().join("registry"))?;
    for source in ["disk.raw", "disk.qcow2", "disk.raw.zst"] {
        let reference = registry.reference(&format!("vi/memory/{source}:1"));
        let import = peak_rss(&["import", &server.url(source), &reference])?;
        let target = dir.path().join("out.raw");
        let populate = peak_rss(&["populate", &reference, utf8(&target)])?;
        qemu::assert_same_disk(&qcow2, "qcow2", &target, "raw")?;
        for (what, peak) in [("import", import), ("populate", populate)] {
            println!("{what} of {source}: peak {} MiB", peak >> 20);
            assert!(peak < PEAK_BYTES_MAX, "{what} of {source} used {} MiB", peak >> 20);
        }
    }
    Ok(())
}

fn sparse_disk(path: &Path) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    file.set_len(DISK_BYTES)?;
    let mut noise = Noise::new(DISK_BYTES);
    for piece in 0..PIECES {
        file.write_all_at(&noise.bytes(PIECE_BYTES), piece * (DISK_BYTES / PIECES))?;
    }
    Ok(())
}

/// Runs `dvcr` and returns the most memory it had resident, in bytes; the kernel keeps the mark while it runs.
fn peak_rss(args: &[&str]) -> Result<u64> {
    let mut daemon = Daemon::spawn(&cmd(dvcr()?, args))?;
    let status = format!("/proc/{}/status", daemon.id());
    let deadline = Instant::now() + RUN_TIMEOUT;
    let mut peak = 0;
    while daemon.is_running() {
        // A process that has just ended has no mark; the last one seen stands.
        let mark = std::fs::read_to_string(&status).ok().and_then(|text| high_water_mark(&text));
        peak = peak.max(mark.unwrap_or(0));
        if Instant::now() > deadline {
            bail!("dvcr {args:?} still runs\n{}", daemon.log());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    if !daemon.wait(RUN_TIMEOUT)?.success() || peak == 0 {
        bail!("dvcr {args:?} failed\n{}", daemon.log());
    }
    Ok(peak)
}

fn high_water_mark(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}
