//! What each fuzz target does with its input. `converter/tests/corpus.rs` does the same with every file of the corpus.
#![allow(dead_code, reason = "each target uses its own body")]

use std::sync::Arc;

use dvcr_converter::format::{self, Image};
use dvcr_converter::io::{Disk, ReadAt};
use dvcr_converter::limits::Limits;

#[path = "checksums.rs"]
pub mod checksums;
#[path = "sparse.rs"]
pub mod sparse;
#[path = "wrappers.rs"]
pub mod wrappers;

/// Most bytes of a disk read for one input.
const DISK_BYTES_MAX: u64 = 2 << 20;

/// Most extents asked for in one input.
const EXTENTS_MAX: usize = 256;

/// Extents of one input whose beginning is read in several ways.
const PIECEWISE_MAX: usize = 4;

/// Bytes read at once, and in small pieces that begin and end at odd places.
const READ_BYTES: u64 = 100_000;
const PIECE_BYTES: usize = 33_331;

/// A fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    /// The name of the target and of its corpus.
    pub name: &'static str,
    /// What is done with an input. It panics if the reader breaks a promise.
    pub body: fn(&[u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "ova", body: ova },
    Target { name: "qcow2", body: qcow2 },
    Target { name: "raw", body: raw },
    Target { name: "vdi", body: vdi },
    Target { name: "vhdx", body: vhdx },
    Target { name: "vmdk", body: vmdk },
    Target { name: "vpc", body: vpc },
    Target { name: "wrapper", body: wrappers::nested },
    Target { name: "wrapper_bz2", body: wrappers::bz2 },
    Target { name: "wrapper_gz", body: wrappers::gz },
    Target { name: "wrapper_lz4", body: wrappers::lz4 },
    Target { name: "wrapper_xz", body: wrappers::xz },
    Target { name: "wrapper_zst", body: wrappers::zst },
];

/// Reads a qcow2 image.
pub fn qcow2(bytes: &[u8]) {
    image("qcow2", sparse::expand(bytes));
}

/// Reads a VMDK image.
pub fn vmdk(bytes: &[u8]) {
    image("vmdk", sparse::expand(bytes));
}

/// Reads a VDI image.
pub fn vdi(bytes: &[u8]) {
    image("vdi", sparse::expand(bytes));
}

/// Reads a VHD image, as it is and with right checksums.
pub fn vpc(bytes: &[u8]) {
    with_checksums("vpc", bytes, checksums::vpc);
}

/// Reads a VHDX image, as it is and with right checksums.
pub fn vhdx(bytes: &[u8]) {
    with_checksums("vhdx", bytes, checksums::vhdx);
}

/// Reads the first disk of an archive, as it is and with right checksums.
pub fn ova(bytes: &[u8]) {
    with_checksums("ova", bytes, checksums::tar);
}

/// Probes the input with and without a known length, and reads what is a raw disk.
pub fn raw(bytes: &[u8]) {
    let bytes = sparse::expand(bytes);
    let limits = Limits::default();
    let head = &bytes[..bytes.len().min(format::PROBE_BYTES)];
    for length in [None, Some(bytes.len() as u64), Some(u64::MAX)] {
        if let Ok(probe) = format::probe(head, length, &limits)
            && let Some(size) = probe.virtual_size
        {
            assert!(size <= limits.virtual_size_max && size % 512 == 0);
        }
    }
    image("raw", bytes.clone());
    image("iso", bytes);
}

/// The bounds of one input. Large enough that what is refused for its size alone is not worth reading.
pub fn limits() -> Limits {
    Limits { virtual_size_max: 1 << 44, table_bytes_max: 4 << 20, ..Limits::default() }
}

/// Opens image bytes that are held in memory.
pub fn open(bytes: Arc<Vec<u8>>) -> dvcr_converter::Result<Image> {
    format::open(Arc::new(Bytes(bytes)), &limits())
}

fn with_checksums(format: &str, bytes: &[u8], fix: fn(&mut [u8]) -> bool) {
    // Zeros that nobody wrote to cost nothing, a copy of them does.
    let mut right = sparse::expand(bytes);
    if fix(&mut right) {
        image(format, sparse::expand(bytes));
    }
    image(format, right);
}

/// Opens an image of the format named, and holds what it tells and what it reads against each other.
fn image(format: &str, bytes: Vec<u8>) {
    let file = Arc::new(bytes);
    let Ok(image) = open(file.clone()) else { return };
    if image.info.format.name() != format {
        return;
    }
    let disk = image.disk.as_ref();
    let size = disk.virtual_size();
    assert!(size == image.info.virtual_size && size <= limits().virtual_size_max, "{size}");
    walk(disk, &file);
    two_threads_read_the_same(disk, &file);
    // Past the end there is nothing, whatever the image says.
    assert!(disk.read_at(&mut [0; 512], size).is_err() || size == 0 || image.info.format.is_plain());
}

/// Walks the extents and reads from their starts.
fn walk(disk: &dyn Disk, file: &[u8]) {
    let size = disk.virtual_size();
    let mut buf = vec![0; READ_BYTES as usize];
    let (mut at, mut read, mut piecewise) = (0, 0, 0);
    for _ in 0..EXTENTS_MAX {
        if at >= size || read > DISK_BYTES_MAX {
            break;
        }
        let Ok(extent) = disk.extent_at(at) else { break };
        assert!(extent.start == at && extent.len > 0 && extent.end() <= size, "{extent:?}");
        assert!(extent.host.is_none() || extent.is_data(), "{extent:?}");
        let n = (size - at).min(READ_BYTES);
        let buf = &mut buf[..n as usize];
        let whole = disk.read_at(buf, at);
        if whole.is_ok() {
            let known = &buf[..extent.len.min(n) as usize];
            if !extent.is_data() {
                assert!(known.iter().all(|&b| b == 0), "{extent:?} is not zero");
            }
            if let Some(host) = extent.host {
                assert!(host < file.len() as u64, "{extent:?} is beyond the file");
                let stored = &file[host as usize..];
                let stored = &stored[..stored.len().min(known.len())];
                assert!(&known[..stored.len()] == stored, "{extent:?} is not where it is said to be");
                assert!(known[stored.len()..].iter().all(|&b| b == 0), "{extent:?} has more than the file");
            }
        }
        if extent.is_data() && piecewise < PIECEWISE_MAX {
            piecewise += 1;
            let mut small = vec![0xaa; buf.len()];
            let mut pieces = Ok(());
            let mut start = at;
            for piece in small.chunks_mut(PIECE_BYTES) {
                pieces = pieces.and(disk.read_at(piece, start));
                start += piece.len() as u64;
            }
            assert_eq!(whole.is_ok(), pieces.is_ok(), "{extent:?}: {whole:?}, {pieces:?}");
            assert!(whole.is_err() || small == buf, "{extent:?} reads differently in pieces");
        }
        read += n;
        at = extent.end();
    }
}

/// Now and then, for a thread costs more than most inputs.
fn two_threads_read_the_same(disk: &dyn Disk, file: &[u8]) {
    let looked_at = file.iter().take(4096);
    let hash = looked_at.fold(file.len() as u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
    if hash.wrapping_mul(0x9e37_79b9) >> 28 != 0 {
        return;
    }
    let read = || {
        let mut buf = vec![0; disk.virtual_size().min(READ_BYTES) as usize];
        disk.read_at(&mut buf, 0).map(|()| buf).map_err(|e| e.kind())
    };
    let (one, other) = std::thread::scope(|scope| {
        let other = scope.spawn(read);
        (read(), other.join().expect("the other thread panicked"))
    });
    assert!(one == other, "two threads read different bytes");
}

/// An image file in memory.
struct Bytes(Arc<Vec<u8>>);

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
