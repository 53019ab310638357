//! Converters side by side, on files of one test disk, output synced.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};

use crate::table::{Better, Table};

const DISK_BYTES: u64 = 10 << 30;
const CONTENT_MIB_MAX: u64 = 1800;

/// Converts each source in turn with each contestant and prints the table of seconds.
pub fn run(dvcr: &Path, content: &Path, dir: &Path, rounds: usize) -> anyhow::Result<()> {
    ensure!(dvcr.exists(), "{} is not there: cargo build --release", dvcr.display());
    let sources = sources(content, dir)?;
    let out_dir = tempfile::tempdir_in(dir)?;
    let out = out_dir.path().join("out");
    let mut table = Table::default();
    for round in 0..rounds {
        for (name, path) in &sources {
            eprintln!("round {} of {rounds}: {name}", round + 1);
            // Whoever comes first must not pay for the others' cached source.
            std::io::copy(&mut File::open(path)?, &mut std::io::sink())?;
            for (contestant, mut command) in in_turn(readers(dvcr, path, &out), round) {
                let row = format!("{name} -> raw, s");
                table.add(&row, Better::Lower, contestant, seconds(&mut command, &out)?);
            }
        }
        for compression in ["zlib", "zstd"] {
            eprintln!("round {} of {rounds}: qcow2 -> qcow2 {compression}", round + 1);
            for (contestant, mut command) in in_turn(writers(dvcr, &sources[0].1, &out, compression), round) {
                let row = format!("qcow2 -> qcow2 {compression}, s");
                table.add(&row, Better::Lower, contestant, seconds(&mut command, &out)?);
            }
        }
    }
    table.print();
    Ok(())
}

/// Lets another one begin in every round: whoever comes first finds the machine in another state.
fn in_turn(mut contest: Contest, round: usize) -> Contest {
    let first = round % contest.len();
    contest.rotate_left(first);
    contest
}

type Contest = Vec<(&'static str, Command)>;

/// `-t writeback` is how virtualization platforms call it; the best flags write directly, out of order, eight at a time.
fn readers(dvcr: &Path, source: &Path, out: &Path) -> Contest {
    let mut ours = Command::new(dvcr);
    ours.args(["convert", "-O", "raw"]).arg(source).arg(out);
    let mut usual = Command::new("qemu-img");
    usual.args(["convert", "-t", "writeback", "-O", "raw"]).arg(source).arg(out);
    let mut best = Command::new("qemu-img");
    best.args(["convert", "-t", "none", "-W", "-m", "8", "-O", "raw"]).arg(source).arg(out);
    vec![("dvcr", ours), ("qemu-img", usual), ("qemu-img, best flags", best)]
}

/// Compressing takes no direct writes; the best flags are those that use all cores.
fn writers(dvcr: &Path, source: &Path, out: &Path, compression: &str) -> Contest {
    let mut ours = Command::new(dvcr);
    let option = format!("compression_type={compression}");
    ours.args(["convert", "-c", "-O", "qcow2", "-o", &option]).arg(source).arg(out);
    let mut best = Command::new("qemu-img");
    best.args(["convert", "-c", "-W", "-m", "8", "-O", "qcow2", "-o", &option]).arg(source).arg(out);
    vec![("dvcr", ours), ("qemu-img, best flags", best)]
}

/// Runs the command and syncs what it wrote; the file is removed afterwards, outside the time.
fn seconds(command: &mut Command, out: &Path) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "{command:?} failed: run it by hand to see why");
    File::open(out)?.sync_all()?;
    let taken = begun.elapsed().as_secs_f64();
    std::fs::remove_file(out)?;
    Ok(taken)
}

/// The test disk, an ext4 filesystem of real files, in each format; made once and kept.
fn sources(content: &Path, dir: &Path) -> anyhow::Result<Vec<(&'static str, PathBuf)>> {
    let kept = dir.join("sources");
    let plan: [(&str, &str, &[&str]); 4] = [
        ("qcow2", "plain.qcow2", &["-O", "qcow2"]),
        ("qcow2 zlib", "zlib.qcow2", &["-c", "-O", "qcow2"]),
        ("qcow2 zstd", "zstd.qcow2", &["-c", "-O", "qcow2", "-o", "compression_type=zstd"]),
        ("raw", "disk.raw", &["-O", "raw"]),
    ];
    if !kept.exists() {
        let making = tempfile::tempdir_in(dir)?;
        let raw = making.path().join("made.raw");
        make_disk(content, &making.path().join("tree"), &raw)?;
        for (_, file, options) in &plan {
            let mut convert = Command::new("qemu-img");
            convert.arg("convert").args(*options).arg(&raw).arg(making.path().join(file));
            success(&mut convert)?;
        }
        std::fs::remove_file(&raw)?;
        std::fs::rename(making.path(), &kept)?;
        // The folder now has its final name; nothing is left to remove under the temporary one.
        let _ = making.keep();
    }
    Ok(plan.iter().map(|(name, file, _)| (*name, kept.join(file))).collect())
}

/// Fills an ext4 disk with copies of real files, up to [`CONTENT_MIB_MAX`].
fn make_disk(content: &Path, tree: &Path, raw: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(tree)?;
    let list = format!(
        "cd '{}' && find . -xdev -type f -size -8192k -printf '%s %p\\n' 2>/dev/null | sort -k2 | awk '{{ s += $1; if (s > {}) exit; print $2 }}' | tar -cf - -T - | tar -C '{}' -xf -",
        content.display(),
        CONTENT_MIB_MAX << 20,
        tree.display()
    );
    success(Command::new("sh").args(["-c", &list]))?;
    File::create(raw)?.set_len(DISK_BYTES)?;
    success(Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(tree).arg(raw))?;
    std::fs::remove_dir_all(tree)?;
    Ok(())
}

fn success(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
