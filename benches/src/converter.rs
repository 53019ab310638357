//! Converters side by side, on files of one test disk, output synced.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::table::{Against, Better, Table};

const DISK_BYTES: u64 = 10 << 30;
const CONTENT_MIB_MAX: u64 = 1800;

/// Contestants that take longest run in so many rounds of [`SHARE_OF`] only.
pub(crate) const SLOW_SHARE: usize = 3;
pub(crate) const SHARE_OF: usize = 5;

const RSS_POLL_MS: u64 = 20;
/// Polls after which the processes of a script are looked for again.
const SCRIPT_POLLS: u32 = 10;

const DVCR: &str = "dvcr";
const BEST: &str = "qemu-img, best flags";
/// How virtualization platforms call it.
const USUAL: &str = "qemu-img -t writeback";

/// A format of the test disk: what its rows are called, the file, and how qemu-img is told to write it.
struct Shape {
    name: &'static str,
    file: &'static str,
    arguments: &'static [&'static str],
    /// What else qemu-img may be given to write this format; the first round finds out what is quickest.
    flags: &'static [Flags],
    /// Whether qemu-img needs so long to write it that fewer rounds have to do.
    slow: bool,
}

type Flags = &'static [&'static str];

/// Past the page cache, out of order, eight at a time.
const DIRECT: Flags = &["-t", "none", "-W", "-m", "8"];
/// Compressed clusters come in odd lengths, and direct writes of these take several times as long.
const BUFFERED: Flags = &["-W", "-m", "8"];
const IN_ORDER: Flags = &["-t", "none"];

const SHAPES: [Shape; 9] = [
    Shape { name: "qcow2", file: "plain.qcow2", arguments: &["-O", "qcow2"], flags: &[DIRECT], slow: false },
    Shape {
        name: "qcow2 zlib",
        file: "zlib.qcow2",
        arguments: &["-c", "-O", "qcow2"],
        flags: &[BUFFERED],
        slow: true,
    },
    Shape {
        name: "qcow2 zstd",
        file: "zstd.qcow2",
        arguments: &["-c", "-O", "qcow2", "-o", "compression_type=zstd"],
        flags: &[BUFFERED],
        slow: false,
    },
    Shape {
        name: "vmdk streamOptimized",
        file: "stream.vmdk",
        arguments: &["-O", "vmdk", "-o", "subformat=streamOptimized"],
        flags: &[&[], BUFFERED],
        slow: true,
    },
    Shape {
        name: "vmdk sparse",
        file: "sparse.vmdk",
        arguments: &["-O", "vmdk", "-o", "subformat=monolithicSparse"],
        flags: &[DIRECT, BUFFERED, IN_ORDER],
        slow: false,
    },
    Shape {
        name: "vdi",
        file: "dynamic.vdi",
        arguments: &["-O", "vdi"],
        flags: &[DIRECT, BUFFERED, IN_ORDER],
        slow: false,
    },
    Shape {
        name: "vhd",
        file: "dynamic.vhd",
        arguments: &["-O", "vpc", "-o", "subformat=dynamic,force_size=on"],
        flags: &[DIRECT, BUFFERED, IN_ORDER],
        slow: false,
    },
    Shape {
        name: "vhdx",
        file: "dynamic.vhdx",
        arguments: &["-O", "vhdx", "-o", "subformat=dynamic"],
        flags: &[DIRECT, BUFFERED, IN_ORDER],
        slow: false,
    },
    Shape { name: RAW, file: "disk.raw", arguments: &["-O", "raw"], flags: &[DIRECT], slow: false },
];

const RAW: &str = "raw";
const TO_RAW: &str = " -> raw";

/// Converts each source to raw, and the plain qcow2 source to each format, with each contestant in turn; prints tables
/// of seconds, CPU seconds, peak memory and output bytes. `only` is a part of the names of rows that are wanted.
pub fn run(
    dvcr: &Path,
    qemu_img: &Path,
    content: &Path,
    dir: &Path,
    rounds: usize,
    only: &str,
) -> anyhow::Result<()> {
    ensure!(dvcr.exists(), "{} is not there: cargo build --release", dvcr.display());
    let version = version(qemu_img)?;
    let sources = dir.join("sources");
    make_sources(qemu_img, content, &sources, |_| true)?;
    let out_dir = tempfile::tempdir_in(dir)?;
    let out = out_dir.path().join("out");
    let mut tables = Tables::default();
    let mut quickest = Quickest::new();
    for round in 0..rounds {
        for (row, source, contest) in rows(dvcr, qemu_img, &sources, &out) {
            if !row.contains(only) {
                continue;
            }
            eprintln!("round {} of {rounds}: {row}", round + 1);
            // Whoever comes first must not pay for the others' cached source.
            std::io::copy(&mut File::open(&source)?, &mut std::io::sink())?;
            for mut contestant in in_turn(contest, round) {
                if contestant.slow && round >= (rounds * SLOW_SHARE).div_ceil(SHARE_OF) {
                    continue;
                }
                let sample = contestant.run(&row, &mut quickest, &out)?;
                tables.add(&row, contestant.name, &sample);
            }
        }
    }
    println!("{rounds} rounds (the slowest in {SLOW_SHARE} of {SHARE_OF}); {version}\n");
    tables.print();
    println!("Best flags, where several were tried:\n");
    for ((row, _), flags) in quickest.iter().filter(|((row, who), _)| *who == BEST && !row.ends_with(TO_RAW))
    {
        println!("- {row}: `{}`", flags.join(" "));
    }
    Ok(())
}

/// One table for each thing that is measured.
#[derive(Default)]
struct Tables {
    seconds: Table,
    cpu: Table,
    rss: Table,
    output: Table,
}

impl Tables {
    fn add(&mut self, row: &str, contestant: &str, sample: &Sample) {
        self.seconds.add(row, Better::Lower, contestant, sample.seconds);
        self.cpu.add(row, Better::Lower, contestant, sample.cpu_seconds);
        self.rss.add(row, Better::Lower, contestant, sample.rss_mib);
        if !row.ends_with(TO_RAW) {
            self.output.add(row, Better::Lower, contestant, sample.output_mb);
        }
    }

    fn print(&self) {
        let tables = [
            ("Seconds until the output is on the disk", &self.seconds),
            ("CPU seconds, user and system", &self.cpu),
            ("Peak RSS, MiB", &self.rss),
            ("Length of the output, MB", &self.output),
        ];
        for (title, table) in tables {
            println!("{title}:\n");
            table.print(Against::Each);
            println!();
        }
    }
}

struct Contestant {
    name: &'static str,
    /// Ways to do it, each with its flags.
    ways: Vec<(Flags, Command)>,
    slow: bool,
}

/// The flags that were the quickest in the first round, by row and contestant.
type Quickest = BTreeMap<(String, &'static str), Flags>;

impl Contestant {
    /// Runs the quickest way; all of them if that is not known yet.
    fn run(&mut self, row: &str, quickest: &mut Quickest, out: &Path) -> anyhow::Result<Sample> {
        let key = (row.to_owned(), self.name);
        if let Some(known) = quickest.get(&key) {
            self.ways.retain(|(flags, _)| flags == known);
        }
        let mut best: Option<(Flags, Sample)> = None;
        for (flags, command) in &mut self.ways {
            let sample = measure(command, out)?;
            if best.as_ref().is_none_or(|(_, best)| sample.seconds < best.seconds) {
                best = Some((*flags, sample));
            }
        }
        let (flags, sample) = best.context("a contestant without a command")?;
        quickest.insert(key, flags);
        Ok(sample)
    }
}

/// Every row: its name, what is read, and who competes, the first one being us.
fn rows(dvcr: &Path, qemu_img: &Path, sources: &Path, out: &Path) -> Vec<(String, PathBuf, Vec<Contestant>)> {
    let convert = |program: &Path, flags: Flags, shape: &Shape, source: &Path| {
        let mut command = Command::new(program);
        command.arg("convert").args(flags).args(shape.arguments).arg(source).arg(out);
        (flags, command)
    };
    let contest = |shape: &Shape, source: &Path, usual: bool| {
        let ours = vec![convert(dvcr, &[], shape, source)];
        let best = shape.flags.iter().map(|flags| convert(qemu_img, flags, shape, source)).collect();
        let mut contest = vec![
            Contestant { name: DVCR, ways: ours, slow: false },
            Contestant { name: BEST, ways: best, slow: shape.slow },
        ];
        if usual {
            let usual = vec![convert(qemu_img, &["-t", "writeback"], shape, source)];
            contest.push(Contestant { name: USUAL, ways: usual, slow: true });
        }
        contest
    };
    let raw = SHAPES.iter().find(|shape| shape.name == RAW);
    let readers = SHAPES.iter().zip(raw.into_iter().cycle()).map(|(shape, raw)| {
        let source = sources.join(shape.file);
        let contest = contest(raw, &source, true);
        (format!("{}{TO_RAW}", shape.name), source, contest)
    });
    let writers = SHAPES.iter().filter(|shape| shape.name != RAW).map(|shape| {
        let source = sources.join(SHAPES[0].file);
        // Platforms write raw and plain qcow2 only.
        let contest = contest(shape, &source, shape.name == SHAPES[0].name);
        (format!("qcow2 -> {}", shape.name), source, contest)
    });
    readers.chain(writers).collect()
}

/// Lets another one begin in every round: whoever comes first finds the machine in another state.
fn in_turn(mut contest: Vec<Contestant>, round: usize) -> Vec<Contestant> {
    let first = round % contest.len();
    contest.rotate_left(first);
    contest
}

/// What one run took and made.
pub(crate) struct Sample {
    pub(crate) seconds: f64,
    pub(crate) cpu_seconds: f64,
    /// Of all processes of the command, if it is several.
    pub(crate) rss_mib: f64,
    output_mb: f64,
}

/// Runs the command and syncs what it wrote; the file is removed afterwards, outside the time.
pub(crate) fn measure(command: &mut Command, out: &Path) -> anyhow::Result<Sample> {
    let cpu_before = children_cpu_seconds()?;
    let begun = Instant::now();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let (pid, done) = (child.id(), AtomicBool::new(false));
    let command_is_script = command.get_program() == "sh";
    let (status, rss_mib) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let (mut rss_mib, mut below_mib) = (0.0f64, 0.0);
            for poll in 0u32.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                // To look at all processes is not free.
                if command_is_script && poll % SCRIPT_POLLS == 0 {
                    below_mib = peak_rss_below_mib(pid);
                }
                rss_mib = rss_mib.max(peak_rss_mib(pid).unwrap_or(0.0) + below_mib);
                std::thread::sleep(Duration::from_millis(RSS_POLL_MS));
            }
            rss_mib
        });
        let status = child.wait();
        done.store(true, Ordering::Relaxed);
        let taken = begun.elapsed();
        (status.map(|status| (status, taken)), watch.join().unwrap_or(0.0))
    });
    let (status, run) = status?;
    ensure!(status.success(), "{command:?} failed: run it by hand to see why");
    let syncing = Instant::now();
    File::open(out)?.sync_all()?;
    let seconds = (run + syncing.elapsed()).as_secs_f64();
    let sample = Sample {
        seconds,
        cpu_seconds: children_cpu_seconds()? - cpu_before,
        rss_mib,
        output_mb: std::fs::metadata(out)?.len() as f64 / 1e6,
    };
    std::fs::remove_file(out)?;
    Ok(sample)
}

/// User and system time of all children that have been waited for; clock ticks are 1/100 s on Linux.
fn children_cpu_seconds() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat.rsplit_once(") ").context("no command in stat")?;
    let ticks: Vec<f64> = fields.split(' ').skip(13).take(2).flat_map(str::parse).collect();
    Ok(ticks.iter().sum::<f64>() / 100.0)
}

/// The most memory that the process had so far.
fn peak_rss_mib(pid: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1024.0)
}

/// The same of all processes that run below `root`, together.
fn peak_rss_below_mib(root: u32) -> f64 {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let parents: Vec<(u32, u32)> = processes
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            Some((pid, stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?))
        })
        .collect();
    let children = |of: u32| parents.iter().filter(move |(_, parent)| *parent == of).map(|(pid, _)| *pid);
    let mut below: Vec<u32> = children(root).collect();
    let mut at = 0;
    while at < below.len() {
        below.extend(children(below[at]));
        at += 1;
    }
    below.into_iter().filter_map(peak_rss_mib).sum()
}

pub(crate) fn version(qemu_img: &Path) -> anyhow::Result<String> {
    let output = Command::new(qemu_img).arg("--version").output();
    let output = output.with_context(|| format!("starting {}", qemu_img.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().context("qemu-img tells no version")?.to_owned())
}

/// Makes what is missing of the test disk, an ext4 filesystem of real files, in each wanted format. The files are kept.
pub(crate) fn make_sources(
    qemu_img: &Path,
    content: &Path,
    kept: &Path,
    wanted: impl Fn(&str) -> bool,
) -> anyhow::Result<()> {
    std::fs::create_dir_all(kept)?;
    let disk = SHAPES.iter().find(|shape| shape.name == RAW).context("no raw shape")?;
    let disk = kept.join(disk.file);
    if !disk.exists() {
        // The others are of another disk then.
        std::fs::remove_dir_all(kept)?;
        std::fs::create_dir_all(kept)?;
        make_disk(content, kept, &disk)?;
    }
    for shape in SHAPES.iter().filter(|shape| wanted(shape.file)) {
        let (file, part) = (kept.join(shape.file), kept.join("part"));
        if !file.exists() {
            eprintln!("making {} once", file.display());
            success(Command::new(qemu_img).arg("convert").args(shape.arguments).arg(&disk).arg(&part))?;
            File::open(&part)?.sync_all()?;
            std::fs::rename(&part, &file)?;
        }
    }
    Ok(())
}

/// Makes an ext4 disk with copies of real files, up to [`CONTENT_MIB_MAX`].
fn make_disk(content: &Path, dir: &Path, disk: &Path) -> anyhow::Result<()> {
    let making = tempfile::tempdir_in(dir)?;
    let (tree, raw) = (making.path().join("tree"), making.path().join("raw"));
    std::fs::create_dir_all(&tree)?;
    let list = format!(
        "cd '{}' && find . -xdev -type f -size -8192k -printf '%s %p\\n' 2>/dev/null | sort -k2 | awk '{{ s += $1; if (s > {}) exit; print $2 }}' | tar -cf - -T - | tar -C '{}' -xf -",
        content.display(),
        CONTENT_MIB_MAX << 20,
        tree.display()
    );
    success(Command::new("sh").args(["-c", &list]))?;
    File::create(&raw)?.set_len(DISK_BYTES)?;
    success(Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&raw))?;
    std::fs::rename(&raw, disk)?;
    Ok(())
}

pub(crate) fn success(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
