//! The append-only writer: a qcow2 file made in one pass, its bytes never touched again but for the header.
//!
//! ```text
//!  host offset 0            cluster_size ->                                                             end
//!  [ header, written last ][ data data L2 | data data refcounts data L2 | ... | L1 | refcounts | refcount table ]
//! ```
//!
//! Guest clusters come in ascending order. An L2 table follows the last cluster of its reach; a refcount block
//! follows as soon as the host range it covers is full. So memory holds one table of each kind, the L1 table and
//! the refcount table, whatever the size of the disk.

use super::options::{Compression, Preallocation, WriteOptions};
use super::{COPIED, CompressedAt, L1_BYTES_MAX, REFCOUNT_TABLE_BYTES_MAX, compression_type, incompatible};
use crate::format::SECTOR_BYTES;
use crate::io::{self, Block, Finished, Sink, Writer};
use crate::{Error, ErrorKind, Result};

/// Uncompressed clusters kept back until the cluster that compressed ones share is full.
const HELD_BYTES_MAX: usize = 2 << 20;

/// A shared cluster counts as full when at most one part in so many of it is left: hardly ever does a stream end with it.
const UNUSED_PART: u64 = 64;

/// Largest value of a 16-bit reference count.
const REFCOUNT_MAX: u16 = u16::MAX;

/// Bytes of the header proper, up to and with the padding after the compression type.
const HEADER_BYTES: u32 = 112;

/// Writes a qcow2 version 3 file.
pub(super) struct Qcow2Writer<'a> {
    sink: &'a mut dyn Sink,
    options: WriteOptions,
    cluster_bits: u32,
    /// Next byte of the file.
    at: u64,
    refcounts: Refcounts,
    l1: Vec<u64>,
    /// The table under construction, and its place in `l1`.
    l2: Vec<u64>,
    l2_index: u64,
    l2_used: bool,
    /// Uncompressed clusters and their places in `l2`.
    held: Vec<(usize, Vec<u8>)>,
    held_bytes: usize,
    /// With preallocation: the guest cluster that gets the next place.
    next_index: u64,
}

/// Reference counts of the clusters from `base` on, and where the full blocks went.
struct Refcounts {
    counts: Vec<u16>,
    base: u64,
    blocks: Vec<u64>,
}

impl<'a> Qcow2Writer<'a> {
    pub(super) fn new(
        sink: &'a mut dyn Sink,
        options: &WriteOptions,
        virtual_size: Option<u64>,
    ) -> Result<Self> {
        let cluster_bits = options.cluster_bits()?;
        let cluster_size = 1u64 << cluster_bits;
        let writer = Self {
            sink,
            options: *options,
            cluster_bits,
            at: cluster_size,
            // The header's own cluster.
            refcounts: Refcounts { counts: vec![1], base: 0, blocks: Vec::new() },
            l1: Vec::new(),
            l2: vec![0; (cluster_size / 8) as usize],
            l2_index: 0,
            l2_used: false,
            held: Vec::new(),
            held_bytes: 0,
            next_index: 0,
        };
        writer.check_size(virtual_size.unwrap_or(0).max(options.virtual_size_min))?;
        writer.sink.append_zeros(cluster_size)?;
        Ok(writer)
    }

    /// Fails with [`ErrorKind::Limit`] if a disk of `virtual_size` needs a larger L1 table than readers accept.
    fn check_size(&self, virtual_size: u64) -> Result<()> {
        if virtual_size.div_ceil(self.l2_reach()) > L1_BYTES_MAX / 8 {
            return Err(Error::new(
                ErrorKind::Limit,
                format!(
                    "a qcow2 file with clusters of {} bytes cannot hold a disk of {virtual_size} bytes; choose \
                     larger clusters",
                    self.cluster_size()
                ),
            ));
        }
        Ok(())
    }

    /// Stores guest cluster number `index` as it is.
    fn put_plain(&mut self, index: u64, cluster: &[u8]) -> Result<()> {
        let slot = self.slot(index)?;
        if self.at.is_multiple_of(self.cluster_size()) {
            return self.append_plain(slot, cluster);
        }
        // Compressed clusters share the current host cluster: let them fill it first.
        self.held.push((slot, cluster.to_vec()));
        self.held_bytes += cluster.len();
        if self.held_bytes > HELD_BYTES_MAX { self.release_held() } else { Ok(()) }
    }

    /// Stores guest cluster number `index` as the stream `compressed`, shorter than a cluster.
    fn put_compressed(&mut self, index: u64, compressed: &[u8]) -> Result<()> {
        let slot = self.slot(index)?;
        let bytes = compressed.len() as u64;
        let cluster_size = self.cluster_size();
        let room = (cluster_size - self.at % cluster_size) % cluster_size;
        let block_is_full = self.refcounts.is_full(self.at >> self.cluster_bits, self.counts_per_block());
        if room < bytes && room <= cluster_size / UNUSED_PART && !self.held.is_empty() {
            self.release_held()?;
        } else if block_is_full || self.refcounts.at(self.at >> self.cluster_bits) == REFCOUNT_MAX {
            self.align()?;
        }
        let entry = CompressedAt::encode(self.at, bytes, self.cluster_bits)
            .ok_or_else(|| self.too_large("compressed clusters cannot be addressed beyond"))?;
        self.l2[slot] = entry;
        self.append(compressed)
    }

    /// Gives every guest cluster before `index` that has none a place, without writing to it.
    fn preallocate(&mut self, index: u64) -> Result<()> {
        while self.options.preallocation == Preallocation::Metadata && self.next_index < index {
            let slot = self.slot(self.next_index)?;
            self.align()?;
            self.l2[slot] = self.at | COPIED;
            self.sink.append_zeros(self.cluster_size())?;
            self.count(self.cluster_size())?;
            self.next_index += 1;
        }
        self.next_index = index + 1;
        Ok(())
    }

    /// Writes the remaining tables and the header of a disk of `virtual_size` bytes.
    fn complete(mut self, virtual_size: u64) -> Result<Finished> {
        let virtual_size = virtual_size.max(self.options.virtual_size_min);
        let virtual_size = virtual_size
            .checked_next_multiple_of(SECTOR_BYTES)
            .ok_or_else(|| self.too_large("the virtual disk ends beyond"))?;
        self.check_size(virtual_size)?;
        self.preallocate(virtual_size.div_ceil(self.cluster_size()))?;
        self.finish_l2()?;
        self.align()?;
        let l1_offset = self.at;
        // The format has no disk without an L1 table.
        let l1_entries = virtual_size.div_ceil(self.l2_reach()).max(1);
        let mut l1 = std::mem::take(&mut self.l1);
        l1.resize(l1_entries as usize, 0);
        self.append(&be_words(&l1))?;
        self.pad()?;

        // The last refcount blocks and the table count themselves: grow until that changes nothing.
        let (cluster_size, per_block) = (self.cluster_size(), self.counts_per_block());
        let used = self.at >> self.cluster_bits;
        let (mut blocks, mut table) = (0, 0);
        let total = loop {
            let total = used + blocks + table;
            let blocks_needed = (total - self.refcounts.base).div_ceil(per_block);
            let table_needed =
                ((self.refcounts.blocks.len() as u64 + blocks_needed) * 8).div_ceil(cluster_size);
            if (blocks_needed, table_needed) == (blocks, table) {
                break total;
            }
            (blocks, table) = (blocks_needed, table_needed);
        };
        for cluster in used..total {
            self.refcounts.add(cluster);
        }
        for _ in 0..blocks {
            let block = self.refcounts.take_block(self.at, per_block);
            self.write(&block)?;
        }
        let refcount_table_offset = self.at;
        let refcount_table = be_words(&self.refcounts.blocks);
        if refcount_table.len() as u64 > REFCOUNT_TABLE_BYTES_MAX {
            return Err(self.too_large("the refcount table cannot cover a file beyond"));
        }
        self.write(&refcount_table)?;
        self.pad()?;
        let header = self.header(virtual_size, l1_entries, l1_offset, refcount_table_offset, table);
        self.sink.rewrite(&header, 0)?;
        Ok(Finished { file_bytes: self.at, virtual_size })
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn l2_reach(&self) -> u64 {
        self.cluster_size() * self.cluster_size() / 8
    }

    /// Counts of 16 bits in one refcount block.
    fn counts_per_block(&self) -> u64 {
        self.cluster_size() / 2
    }

    /// The place of guest cluster `index` in the current L2 table, after finishing the tables before it.
    fn slot(&mut self, index: u64) -> Result<usize> {
        let entries = self.l2.len() as u64;
        let l2_index = index / entries;
        if l2_index != self.l2_index {
            self.finish_l2()?;
            self.l2_index = l2_index;
            if l2_index >= L1_BYTES_MAX / 8 {
                return Err(self.too_large("the L1 table is full; choose larger clusters: no room beyond"));
            }
        }
        self.l2_used = true;
        Ok((index % entries) as usize)
    }

    fn finish_l2(&mut self) -> Result<()> {
        self.release_held()?;
        if !self.l2_used {
            return Ok(());
        }
        self.align()?;
        self.l1.resize(self.l2_index as usize, 0);
        self.l1.push(self.at | COPIED);
        let table = be_words(&self.l2);
        self.l2.fill(0);
        self.l2_used = false;
        self.append(&table)
    }

    fn release_held(&mut self) -> Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        self.align()?;
        for (slot, cluster) in std::mem::take(&mut self.held) {
            self.append_plain(slot, &cluster)?;
        }
        self.held_bytes = 0;
        Ok(())
    }

    fn append_plain(&mut self, slot: usize, cluster: &[u8]) -> Result<()> {
        self.align()?;
        self.l2[slot] = self.at | COPIED;
        self.append(cluster)
    }

    /// Moves to the next cluster boundary, and writes the refcount blocks whose range is then full.
    fn align(&mut self) -> Result<()> {
        self.pad()?;
        let per_block = self.counts_per_block();
        while self.refcounts.is_full(self.at >> self.cluster_bits, per_block) {
            let block = self.refcounts.take_block(self.at, per_block);
            self.append(&block)?;
        }
        Ok(())
    }

    fn pad(&mut self) -> Result<()> {
        let rest = (self.cluster_size() - self.at % self.cluster_size()) % self.cluster_size();
        self.sink.append_zeros(rest)?;
        self.pass(rest)
    }

    /// Writes one object and counts a reference to each cluster it touches.
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.sink.append(bytes)?;
        self.count(bytes.len() as u64)
    }

    /// Counts a reference to each cluster that the next `bytes` of the file touch, and passes them.
    fn count(&mut self, bytes: u64) -> Result<()> {
        let first = self.at >> self.cluster_bits;
        self.pass(bytes)?;
        for cluster in first..self.at.div_ceil(self.cluster_size()) {
            self.refcounts.add(cluster);
        }
        Ok(())
    }

    /// Writes what is counted elsewhere.
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.sink.append(bytes)?;
        self.pass(bytes.len() as u64)
    }

    fn pass(&mut self, bytes: u64) -> Result<()> {
        self.at = self.at.checked_add(bytes).ok_or_else(|| self.too_large("the file cannot grow beyond"))?;
        Ok(())
    }

    fn header(
        &self,
        virtual_size: u64,
        l1_entries: u64,
        l1_offset: u64,
        refcount_table_offset: u64,
        refcount_table_clusters: u64,
    ) -> Vec<u8> {
        let (features, compression_type) = match self.options.compression {
            Compression::Zstd => (incompatible::COMPRESSION_TYPE, compression_type::ZSTD),
            Compression::None | Compression::Zlib => (0, compression_type::ZLIB),
        };
        let mut header = Vec::with_capacity(self.cluster_size() as usize);
        header.extend(b"QFI\xfb");
        header.extend(3u32.to_be_bytes());
        header.extend([0; 12]); // no backing file
        header.extend(self.cluster_bits.to_be_bytes());
        header.extend(virtual_size.to_be_bytes());
        header.extend([0; 4]); // not encrypted
        header.extend((l1_entries as u32).to_be_bytes());
        header.extend(l1_offset.to_be_bytes());
        header.extend(refcount_table_offset.to_be_bytes());
        header.extend((refcount_table_clusters as u32).to_be_bytes());
        header.extend([0; 12]); // no snapshots
        header.extend(features.to_be_bytes());
        header.extend([0; 16]); // no compatible and no autoclear features
        header.extend(4u32.to_be_bytes()); // refcount_order: 16 bits
        header.extend(HEADER_BYTES.to_be_bytes());
        header.push(compression_type);
        // Padding of the header, then the extension that ends the extensions: all zeros.
        header.resize(self.cluster_size() as usize, 0);
        header
    }

    fn too_large(&self, what: &str) -> Error {
        Error::new(ErrorKind::Limit, format!("qcow2: {what} {} bytes of file", self.at))
    }
}

impl Writer for Qcow2Writer<'_> {
    fn block_bytes(&self) -> usize {
        1 << self.cluster_bits
    }

    fn compression(&self) -> io::Compression {
        match self.options.compression {
            Compression::None => io::Compression::None,
            Compression::Zlib => io::Compression::Deflate,
            Compression::Zstd => io::Compression::Zstd,
        }
    }

    fn put(&mut self, index: u64, block: Block<'_>) -> Result<()> {
        self.preallocate(index)?;
        match block {
            Block::Plain(cluster) => self.put_plain(index, cluster),
            Block::Packed(stream) => self.put_compressed(index, stream),
        }
    }

    fn finish(self: Box<Self>, virtual_size: u64) -> Result<Finished> {
        self.complete(virtual_size)
    }
}

impl Refcounts {
    /// Whether every cluster of the current block lies before `cluster`, so that its counts are final.
    fn is_full(&self, cluster: u64, per_block: u64) -> bool {
        cluster >= self.base + per_block
    }

    /// Takes the current block, to be written at `offset`.
    fn take_block(&mut self, offset: u64, per_block: u64) -> Vec<u8> {
        let present = self.counts.len().min(per_block as usize);
        let mut block: Vec<u8> = self.counts.drain(..present).flat_map(u16::to_be_bytes).collect();
        block.resize(per_block as usize * 2, 0);
        self.base += per_block;
        self.blocks.push(offset);
        block
    }

    fn at(&self, cluster: u64) -> u16 {
        self.counts.get((cluster - self.base) as usize).copied().unwrap_or(0)
    }

    /// Counts one more reference. Clusters come in ascending order, never below the current block.
    fn add(&mut self, cluster: u64) {
        let index = (cluster - self.base) as usize;
        if index >= self.counts.len() {
            self.counts.resize(index + 1, 0);
        }
        self.counts[index] = self.counts[index].saturating_add(1);
    }
}

fn be_words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}
