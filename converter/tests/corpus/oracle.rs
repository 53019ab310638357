//! qemu-img as the oracle for one hostile file: the same content, or a reason why not.

use std::fmt::Write as _;
use std::io::Read as _;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dvcr_converter::format::Format;
use dvcr_converter::{Error, ErrorKind};

use super::bodies;

/// The beginning of the disk that is compared.
const COMPARED_BYTES: u64 = 16 << 20;

/// How long qemu-img may think about one file.
const QEMU_TIME_MS: u64 = 10_000;

/// How much memory it may ask for, KiB.
const QEMU_MEMORY_KIB: u64 = 4 << 20;

/// Where we refuse, or fail to read, what qemu reads: the format, words of our error, and why.
const STRICTER: &[(&str, &str, &str)] = &[
    ("qcow2", "overlap", "qemu reads tables as data; no writer makes such an image"),
    ("qcow2", "share the L2 table", "one table for many places makes endless disks of small files"),
    ("qcow2", "the L1 table itself", "a table inside another one is an attack or damage"),
    ("qcow2", "contradicts", "qemu ignores what the specification forbids"),
    (
        "qcow2",
        "beyond the end",
        "qemu reads zeros there, so that a file that was cut short passes for a disk",
    ),
    ("qcow2", "boundary", "qemu does not look where an L1 table is that it does not need"),
    ("vmdk", "overlap", "qemu reads headers and tables as data"),
    ("vmdk", "the directory itself", "a table inside another one is an attack or damage"),
    ("vmdk", "where the header is", "a directory inside the header is an attack or damage"),
    (
        "vmdk",
        "beyond the end of the file",
        "qemu reads zeros there, so that a file that was cut short passes for a disk",
    ),
    ("vmdk", "that of sector", "qemu does not look whose grain it reads"),
    ("vmdk", "as text", "qemu does not look at the newline test"),
    ("vmdk", "different disks", "qemu takes the footer's word"),
    ("vmdk", "no power of two", "the specification asks for one"),
    ("vmdk", "larger than", "grains of 1 GiB are an attack on memory"),
    ("vmdk", "too large", "directories above the bound"),
    ("vmdk", "more than the limit", "disks above the bound"),
    ("vmdk", "descriptor", "qemu looks for its own fields only"),
    ("vdi", "another block", "equal entries make endless disks of small files"),
    ("vdi", "overlap", "qemu reads the header and the map as data; no writer makes such an image"),
    ("vdi", "beyond the end", "qemu reads zeros there; a file that was cut short is damaged"),
    ("vdi", "is in the header", "qemu reads the header as a map; no writer makes such an image"),
    ("vdi", "image type", "qemu does not look at it"),
    ("vdi", "extra bytes", "qemu does not look at them, and would read the wrong ones"),
    ("vdi", "limit", "the bounds here are lower"),
    ("vpc", "another block", "overlapping blocks make endless disks of small files"),
    ("vpc", "overlap", "qemu reads tables as data; no writer makes such an image"),
    ("vpc", "its checksum is wrong", "qemu does not look at that of the dynamic header"),
    ("vpc", "unknown disk type", "qemu takes it for a dynamic disk"),
    ("vpc", "begins with the footer of a fixed disk", "qemu takes it for a dynamic disk"),
    ("vpc", "damaged: both", "qemu does not look at the version of a footer"),
    ("vpc", "blocks of", "qemu has no bitmaps before blocks that are too small for them"),
    ("vpc", "limit", "the bounds here are lower"),
    ("vhdx", "another block too", "one block for many places makes endless disks of small files"),
    ("vhdx", "no valid sequence", "qemu takes a file whose log is lost for a clean one"),
    ("vhdx", "no virtual disk identifier", "the specification asks for one"),
    ("vhdx", "physical sector size", "qemu does not look at it"),
    ("vhdx", "beyond the end of the file", "qemu reads zeros where a region is cut off"),
    ("vhdx", "boundaries of 1 MiB", "qemu does not look at it"),
    ("vhdx", "is damaged", "qemu looks at the blocks it reads only"),
    ("vhdx", "larger than the limit", "a bound of the inputs"),
];

/// Where we read what qemu refuses: the format, words of its message, and why.
const LAXER: &[(&str, &str, &str)] = &[
    ("qcow2", "reference count table", "reference counts are not needed to read"),
    ("qcow2", "Invalid backing file offset", "a name of no bytes is no backing file, wherever it is"),
    ("qcow2", "napshot", "internal snapshots are passed over"),
    ("qcow2", "refcount", "reference counts are not needed to read"),
    ("qcow2", "efcount", "reference counts are not needed to read"),
    ("qcow2", "bitmap", "bitmaps are passed over"),
    ("qcow2", "extension", "unknown extensions are passed over"),
    ("vmdk", "escriptor", "the descriptor of a sparse extent is not needed to read"),
    ("vmdk", "Invalid argument", "qemu says no more; it looks into descriptors that are not needed to read"),
    ("vmdk", "CID", "the descriptor of a sparse extent is not needed to read"),
    ("vmdk", "backup l1 table", "the redundant directory is not read"),
    ("vdi", "block size", "all sizes are read that are safe"),
    ("vdi", "too many blocks", "only those that the disk needs count"),
    ("vpc", "Incorrect header checksum", "the other footer counts"),
    ("vpc", "invalid VPC image", "the footer at the end counts for dynamic disks, too"),
    ("vpc", "The image has been truncated", "only the blocks that a guest sees have to be there"),
    ("vpc", "Invalid argument", "entries that the disk does not need are not read"),
    ("vhdx", "log that needs to be replayed", "the log is replayed in memory"),
    ("vhdx", "Operation not supported", "sectors of 4096 bytes are read"),
    (
        "vhdx",
        "Invalid argument",
        "qemu says no more; it looks at the version and place of a log that is empty",
    ),
];

/// Whether both of us read inputs of this target.
pub fn knows(target: &str) -> bool {
    matches!(target, "qcow2" | "vmdk" | "vdi" | "vpc" | "vhdx") && target.parse::<Format>().is_ok()
}

/// Reads the file both ways; tells how they differ without a reason.
pub fn compare(format: &str, file: Vec<u8>) -> Result<(), String> {
    let ours = read(file.clone().into());
    // qemu would open whatever file it is told to.
    if matches!(&ours, Err(e) if e.kind() == ErrorKind::ForeignFile) {
        return Ok(());
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).map_err(|e| e.to_string())?;
    let (image, raw) = (dir.path().join("image"), dir.path().join("raw"));
    std::fs::write(&image, file).map_err(|e| e.to_string())?;
    let theirs = qemu_dd(format, &image, &raw);
    match (ours, theirs) {
        (Err(_), Err(_)) => Ok(()),
        // qemu is told what it is; here only a footer of just this file makes a fixed VHD.
        (Ok((found, _)), Ok(_)) if format == "vpc" && (found == "raw" || found == "iso") => Ok(()),
        (Ok((found, _)), Ok(_)) if found != format => {
            Err(format!("we take it for {found}, qemu reads it as {format}"))
        }
        (Ok((_, ours)), Ok(theirs)) if ours == theirs => Ok(()),
        (Ok((_, ours)), Ok(theirs)) => Err(match ours.iter().zip(&theirs).position(|(a, b)| a != b) {
            Some(at) => format!("the content differs from byte {at} on"),
            None => format!("we read {} bytes, qemu {}", ours.len(), theirs.len()),
        }),
        (Ok((found, _)), Err(_)) if found != format => Ok(()),
        (Err(ours), Ok(_)) => {
            let mut text = ours.to_string();
            let mut cause = std::error::Error::source(&ours);
            while let Some(error) = cause {
                _ = write!(text, ": {error}");
                cause = error.source();
            }
            reason(STRICTER, format, &text).ok_or_else(|| format!("qemu reads it, we do not: {text}"))
        }
        (Ok(_), Err(theirs)) => {
            reason(LAXER, format, &theirs).ok_or_else(|| format!("we read it, qemu does not: {theirs}"))
        }
    }
}

fn reason(table: &[(&str, &str, &str)], format: &str, text: &str) -> Option<()> {
    table.iter().any(|(of, words, _)| *of == format && text.contains(words)).then_some(())
}

/// Our reading: the format found, and the beginning of the disk.
fn read(file: Arc<Vec<u8>>) -> Result<(String, Vec<u8>), Error> {
    let image = bodies::open(file)?;
    let mut content = vec![0; image.info.virtual_size.min(COMPARED_BYTES) as usize];
    image.disk.read_at(&mut content, 0)?;
    Ok((image.info.format.to_string(), content))
}

/// qemu's reading, or what it says.
fn qemu_dd(format: &str, image: &Path, raw: &Path) -> Result<Vec<u8>, String> {
    // Limits of the shell, as the tests must not touch their own.
    let script = format!(
        "ulimit -v {QEMU_MEMORY_KIB}; ulimit -f 65536; exec qemu-img dd -f {format} -O raw bs=1M count={} if=\"$1\" of=\"$2\"",
        COMPARED_BYTES >> 20
    );
    let mut child = Command::new("bash")
        .args(["-c", &script, "sh"])
        .args([image, raw])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("starting qemu-img: {e}"))?;
    let deadline = Instant::now() + Duration::from_millis(QEMU_TIME_MS);
    let status = loop {
        match child.try_wait().map_err(|e| e.to_string())? {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                _ = child.kill();
                _ = child.wait();
                return Err("timed out".to_owned());
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let mut text = String::new();
    if let Some(stderr) = &mut child.stderr {
        _ = stderr.read_to_string(&mut text);
    }
    match status.code() {
        Some(0) => std::fs::read(raw).map_err(|e| e.to_string()),
        Some(_) => Err(text),
        None => Err(format!("qemu-img crashed by signal {:?}", status.signal())),
    }
}
