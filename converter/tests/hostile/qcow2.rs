//! qcow2 files made by hand, for what no program writes.

use std::io::Write as _;
use std::sync::Arc;

use crate::sandbox::Sparse;

/// Where [`Image`] has its L1 table with clusters of 512 bytes.
pub const L1_AT_512: u64 = 1024;

/// Header extension with the name of an external data file.
const DATA_FILE_EXTENSION: u32 = 0x4441_5441;

/// A version 3 header: clusters 0, 1 and 2 are the header, the refcount table and the L1 table.
pub struct Image<'a> {
    pub cluster_bits: u32,
    pub size: u64,
    pub l1_entries: u32,
    pub zstd: bool,
    pub backing: Option<&'a str>,
    pub data_file: Option<&'a str>,
}

impl Default for Image<'_> {
    fn default() -> Self {
        Self { cluster_bits: 16, size: 1 << 20, l1_entries: 1, zstd: false, backing: None, data_file: None }
    }
}

impl Image<'_> {
    /// The header.
    pub fn bytes(&self) -> Vec<u8> {
        let cluster = 1u64 << self.cluster_bits;
        let mut head = b"QFI\xfb\0\0\0\x03".to_vec();
        let backing = self.backing.unwrap_or_default();
        let backing_at = if self.backing.is_some() { 2048u64 } else { 0 };
        head.extend(backing_at.to_be_bytes());
        head.extend((backing.len() as u32).to_be_bytes());
        head.extend(self.cluster_bits.to_be_bytes());
        head.extend(self.size.to_be_bytes());
        head.extend(0u32.to_be_bytes());
        head.extend(self.l1_entries.to_be_bytes());
        head.extend((2 * cluster).to_be_bytes());
        head.extend(cluster.to_be_bytes());
        head.extend(1u32.to_be_bytes());
        head.extend([0; 12]);
        let features = u64::from(self.data_file.is_some()) << 2 | u64::from(self.zstd) << 3;
        head.extend(features.to_be_bytes());
        head.extend([0; 16]);
        head.extend(4u32.to_be_bytes());
        head.extend(112u32.to_be_bytes());
        head.extend([u8::from(self.zstd), 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(head.len(), 112);
        if let Some(name) = self.data_file {
            head.extend(DATA_FILE_EXTENSION.to_be_bytes());
            head.extend((name.len() as u32).to_be_bytes());
            head.extend(name.as_bytes());
        }
        if self.backing.is_some() {
            head.resize(2048, 0);
            head.extend(backing.as_bytes());
        }
        head
    }

    /// The file, with an empty L1 table.
    pub fn source(&self) -> Sparse {
        Sparse { len: 8 << self.cluster_bits, parts: vec![(0, self.bytes().into())] }
    }
}

/// What all clusters of a bomb are.
pub enum Spot {
    Plain,
    Compressed { zstd: bool },
}

/// A disk of 512 GiB for each of `tables` L2 tables, all of it the same cluster of zeros.
pub fn bomb(spot: Spot, tables: u32) -> Sparse {
    let cluster = 2u64 << 20;
    let zeros = vec![0; cluster as usize];
    let mut image = Image { cluster_bits: 21, l1_entries: tables, ..Image::default() };
    image.size = u64::from(tables) * (cluster / 8) * cluster;
    let spot_at = 3 * cluster;
    let (entry, stored) = match spot {
        Spot::Plain => (spot_at, Vec::new()),
        Spot::Compressed { zstd } => {
            image.zstd = zstd;
            let stored = if zstd {
                zstd::bulk::compress(&zeros, 19).unwrap()
            } else {
                let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
                encoder.write_all(&zeros).unwrap();
                encoder.finish().unwrap()
            };
            let more_sectors = (stored.len() as u64 - 1) / 512;
            (1 << 62 | more_sectors << 49 | spot_at, stored)
        }
    };
    let table: Arc<[u8]> = entry.to_be_bytes().repeat((cluster / 8) as usize).into();
    let first = 4 * cluster;
    let at = |i: u32| first + u64::from(i) * cluster;
    let l1: Vec<u8> = (0..tables).flat_map(|i| at(i).to_be_bytes()).collect();
    let mut parts = vec![(0, image.bytes().into()), (2 * cluster, l1.into()), (spot_at, stored.into())];
    parts.extend((0..tables).map(|i| (at(i), table.clone())));
    Sparse { len: first + u64::from(tables) * cluster, parts }
}

/// Images with one entry that points where no entry may.
pub fn self_references() -> Vec<(Sparse, &'static str)> {
    let cluster = 1u64 << 16;
    let image = Image::default();
    let (l1_at, l2_at) = (2 * cluster, 3 * cluster);
    let with = |l1: u64, l2: u64| {
        let mut parts = vec![(0, image.bytes().into()), (l1_at, Arc::from(l1.to_be_bytes()))];
        parts.push((l2_at, Arc::from(l2.to_be_bytes())));
        Sparse { len: 8 * cluster, parts }
    };
    vec![
        (with(l1_at, 0), "the L1 table itself"),
        (with(l2_at, l2_at), "overlap the L2 table"),
        (with(l2_at, l1_at), "overlap the L1 table"),
        (with(l2_at, l2_at | 1 << 62), "overlap the L2 table"),
        (with(l2_at, l1_at | 1 << 62), "overlap the L1 table"),
        (with(l2_at, 1 << 62), "overlap the header"),
        (with(8 * cluster, 0), "beyond the end"),
        (with(l2_at, 8 * cluster), "beyond the end"),
    ]
}
