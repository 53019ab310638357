//! The bytes of a VHDX image in memory: where things are, and how they are sealed. Independent of the code under test.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use dvcr_converter::Result;
use dvcr_converter::format;
use dvcr_converter::io::ReadAt;
use dvcr_converter::limits::Limits;

use crate::common::{noise, path, qemu_img, temp_dir};

pub const HEADERS: [usize; 2] = [64 << 10, 128 << 10];
pub const REGION_TABLES: [usize; 2] = [192 << 10, 256 << 10];
pub const MIB: usize = 1 << 20;

pub const BAT_REGION: [u8; 4] = [0x66, 0x77, 0xc2, 0x2d];
pub const METADATA_REGION: [u8; 4] = [0x06, 0xa2, 0x7c, 0x8b];
pub const FILE_PARAMETERS: [u8; 4] = [0x37, 0x67, 0xa1, 0xca];
pub const VIRTUAL_DISK_SIZE: [u8; 4] = [0x24, 0x42, 0xa5, 0x2f];
pub const LOGICAL_SECTOR_SIZE: [u8; 4] = [0x1d, 0xbf, 0x41, 0x81];

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

/// Opens the image and reads all of it, at most 64 MiB.
pub fn read_through(bytes: Vec<u8>) -> Result<Vec<u8>> {
    let disk = format::open(Arc::new(Bytes(bytes)), &Limits::default())?.disk;
    let mut all = vec![0; disk.virtual_size().min(64 << 20) as usize];
    for (buf, at) in all.chunks_mut(MIB).zip((0u64..).step_by(MIB)) {
        let extent = disk.extent_at(at)?;
        assert!(extent.start == at && extent.len > 0 && extent.end() <= disk.virtual_size(), "{extent:?}");
        disk.read_at(buf, at)?;
    }
    Ok(all)
}

/// A disk of 8 MiB in blocks of 1 MiB, with data in blocks 0, 2 and 7, as qemu makes it.
pub fn sample() -> Vec<u8> {
    static SAMPLE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    SAMPLE.get_or_init(|| make("block_size=1M", "8M")).clone()
}

/// An image with data in its blocks 0, 2 and 7, of 1 MiB each.
pub fn make(options: &str, size: &str) -> Vec<u8> {
    let dir = temp_dir();
    let (image, noisy) = (dir.path().join("image"), dir.path().join("noise"));
    std::fs::write(&noisy, noise(3 * MIB, 5)).unwrap();
    qemu_img(&["create", "-q", "-f", "vhdx", "-o", options, path(&image), size]);
    let write = |at: &str| format!("write -q -s {} {at}", path(&noisy));
    crate::qemu_io(&image, &[write("0 1M"), write("2560k 300k"), write("7M 1M")]);
    std::fs::read(&image).unwrap()
}

/// What qemu reads from the image in `bytes`, after a repair if it needs one.
pub fn as_qemu_reads(bytes: &[u8]) -> Vec<u8> {
    let dir = temp_dir();
    let (image, raw) = (dir.path().join("image"), dir.path().join("raw"));
    std::fs::write(&image, bytes).unwrap();
    // Without waiting for the disk after each sector of a log.
    qemu_img(&["check", "-q", "-T", "unsafe", "-r", "all", "-f", "vhdx", path(&image)]);
    qemu_img(&["convert", "-f", "vhdx", "-O", "raw", path(&image), path(&raw)]);
    std::fs::read(&raw).unwrap()
}

/// Whether qemu opens the file without a repair.
pub fn qemu_opens(image: &Path) -> bool {
    std::process::Command::new("qemu-img")
        .args(["info", "-f", "vhdx", path(image)])
        .output()
        .unwrap()
        .status
        .success()
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Where the entry of a region is in the first region table.
pub fn region_entry(bytes: &[u8], id: &[u8; 4]) -> usize {
    let table = REGION_TABLES[0] + 16;
    (table..).step_by(32).take(2047).find(|&at| bytes[at..].starts_with(id)).unwrap()
}

pub fn region(bytes: &[u8], id: &[u8; 4]) -> Range<usize> {
    let entry = region_entry(bytes, id);
    let start = u64_at(bytes, entry + 16) as usize;
    start..start + u32_at(bytes, entry + 24) as usize
}

/// Where the entry of an item is in the metadata table.
pub fn metadata_entry(bytes: &[u8], id: &[u8; 4]) -> usize {
    let table = region(bytes, &METADATA_REGION).start + 32;
    (table..).step_by(32).take(2047).find(|&at| bytes[at..].starts_with(id)).unwrap()
}

pub fn set_metadata_item(bytes: &mut [u8], id: &[u8; 4], value: &[u8]) {
    let entry = metadata_entry(bytes, id);
    let at = region(bytes, &METADATA_REGION).start + u32_at(bytes, entry + 16) as usize;
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Changes a field in both headers, and seals them.
pub fn set_in_headers(bytes: &mut [u8], field: usize, value: &[u8]) {
    for header in HEADERS {
        bytes[header + field..header + field + value.len()].copy_from_slice(value);
    }
    seal_headers(bytes);
}

pub fn seal_headers(bytes: &mut [u8]) {
    for header in HEADERS {
        seal(&mut bytes[header..header + 4096]);
    }
}

/// Changes bytes of both region tables, at an offset in the first one, and seals them.
pub fn set_in_region_tables(bytes: &mut [u8], at: usize, value: &[u8]) {
    for table in REGION_TABLES {
        let at = at - REGION_TABLES[0] + table;
        bytes[at..at + value.len()].copy_from_slice(value);
        seal(&mut bytes[table..table + (64 << 10)]);
    }
}

/// Puts the checksum of a structure in its place.
pub fn seal(structure: &mut [u8]) {
    structure[4..8].fill(0);
    let sum = crc32c(structure);
    structure[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// CRC-32C as its definition has it, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

#[test]
fn the_checksum_is_that_of_rfc_3720() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}
