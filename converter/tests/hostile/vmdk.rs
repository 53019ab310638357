//! VMDK files made by hand, for what no program writes.

use std::io::Write as _;
use std::sync::Arc;

use crate::sandbox::Sparse;

pub const SECTOR: u64 = 512;

/// Sectors and bytes of a grain.
const GRAIN_SECTORS: u64 = 128;
const GRAIN: u64 = GRAIN_SECTORS * SECTOR;

/// Entries of a grain table.
const ENTRIES: u64 = 512;

/// Where the directory, the first grain table and the grains are, in sectors.
pub const GD: u64 = 64;
const GT: u64 = 1024;

/// Flags of the header: line breaks are tested, grains are compressed, and begin with a marker.
const NEWLINE_TEST: u32 = 1;
const COMPRESSED: u32 = 1 << 16;
const MARKERS: u32 = 1 << 17;

/// A sparse header without a descriptor of its own.
pub struct Header {
    pub capacity_sectors: u64,
    pub compressed: bool,
    pub markers: bool,
    pub descriptor_sectors: u64,
}

impl Default for Header {
    fn default() -> Self {
        Self { capacity_sectors: GRAIN_SECTORS, compressed: false, markers: false, descriptor_sectors: 0 }
    }
}

impl Header {
    pub fn bytes(&self) -> Arc<[u8]> {
        let mut flags = NEWLINE_TEST;
        flags |= if self.compressed { COMPRESSED } else { 0 };
        flags |= if self.markers { MARKERS } else { 0 };
        let mut head = b"KDMV".to_vec();
        head.extend(3u32.to_le_bytes());
        head.extend(flags.to_le_bytes());
        for word in [self.capacity_sectors, GRAIN_SECTORS, 1, self.descriptor_sectors] {
            head.extend(word.to_le_bytes());
        }
        head.extend((ENTRIES as u32).to_le_bytes());
        for word in [0, GD, GT] {
            head.extend(word.to_le_bytes());
        }
        head.extend(b"\0\n \r\n");
        head.extend(u16::from(self.compressed).to_le_bytes());
        head.resize(512, 0);
        head.into()
    }

    pub fn source(&self) -> Sparse {
        Sparse { len: 8 << 20, parts: vec![(0, self.bytes())] }
    }
}

/// A disk of 16 GiB whose grains are all one and the same.
pub fn bomb(compressed: bool) -> Sparse {
    let tables = 512u64;
    let header =
        Header { capacity_sectors: tables * ENTRIES * GRAIN_SECTORS, compressed, ..Header::default() };
    let table_sectors = ENTRIES * 4 / SECTOR;
    let spot = GT + tables * table_sectors;
    let directory: Vec<u8> =
        (0..tables).flat_map(|i| ((GT + i * table_sectors) as u32).to_le_bytes()).collect();
    let all = (spot as u32).to_le_bytes().repeat((tables * ENTRIES) as usize);
    let stored = if compressed { zlib(&vec![0; GRAIN as usize]) } else { Vec::new() };
    Sparse {
        len: (spot + GRAIN_SECTORS) * SECTOR,
        parts: vec![
            (0, header.bytes()),
            (GD * SECTOR, directory.into()),
            (GT * SECTOR, all.into()),
            (spot * SECTOR, stored.into()),
        ],
    }
}

/// A compressed grain whose marker says `bytes`, in a file that ends `left` bytes after the beginning of the marker.
pub fn out_of_bounds(bytes: u32, left: u64) -> Sparse {
    let header = Header { compressed: true, markers: true, ..Header::default() };
    let at = GT + 8;
    let mut grain = 0u64.to_le_bytes().to_vec();
    grain.extend(bytes.to_le_bytes());
    grain.extend(zlib(&[7; GRAIN as usize]));
    Sparse {
        len: at * SECTOR + left,
        parts: vec![
            (0, header.bytes()),
            (GD * SECTOR, Arc::from((GT as u32).to_le_bytes())),
            (GT * SECTOR, Arc::from((at as u32).to_le_bytes())),
            (at * SECTOR, grain.into()),
        ],
    }
}

/// A compressed grain of a right length whose stream decodes to much more than a grain.
pub fn grain_that_grows() -> Sparse {
    let mut file = out_of_bounds(0, 1 << 20);
    let stream = zlib(&vec![0; 64 << 20]);
    let mut grain = 0u64.to_le_bytes().to_vec();
    grain.extend((stream.len() as u32).to_le_bytes());
    grain.extend(stream);
    if let Some(last) = file.parts.last_mut() {
        last.1 = grain.into();
    }
    file
}

/// Directories and tables that point at themselves and each other.
pub fn self_references() -> Vec<(Sparse, &'static str)> {
    let image = |capacity: u64, directory: &[u32], entry: u32| {
        let header = Header { capacity_sectors: capacity, ..Header::default() };
        let directory: Vec<u8> = directory.iter().flat_map(|sector| sector.to_le_bytes()).collect();
        Sparse {
            len: 8 << 20,
            parts: vec![
                (0, header.bytes()),
                (GD * SECTOR, directory.into()),
                (GT * SECTOR, Arc::from(entry.to_le_bytes())),
            ],
        }
    };
    let one = GRAIN_SECTORS;
    let two = 2 * ENTRIES * GRAIN_SECTORS;
    vec![
        (image(one, &[GD as u32], 0), "into the directory itself"),
        (image(two, &[GT as u32, GT as u32], 0), "overlap or are shared"),
        (image(two, &[GT as u32, GT as u32 + 1], 0), "overlap or are shared"),
        (image(one, &[GT as u32], GT as u32), "overlap the grain table"),
        (image(one, &[GT as u32], GD as u32), "overlap the grain directory"),
        (image(one, &[u32::MAX], 0), "beyond the end"),
        (image(one, &[GT as u32], u32::MAX), "beyond the end"),
    ]
}

/// A descriptor file whose one extent is in the file named.
pub fn descriptor(extent: &str) -> Arc<[u8]> {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\n{extent}\n"
    )
    .into_bytes()
    .into()
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
