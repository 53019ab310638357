//! Random access to the virtual disk.

use std::sync::Arc;

use super::decode::Decoder;
use super::tables::{Table, Tables};
use super::{COMPRESSED, CompressedAt, Header, OFFSET_MASK, ZERO};
use crate::format::check_range;
use crate::format::expansion::Expansion;
use crate::format::pieces::{Piece, Pieces, Pool};
use crate::io::{Details, Disk, Extent, ExtentKind, ReadAt, Value};
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

/// Subclusters of a cluster with extended L2 entries.
const SUBCLUSTERS: u64 = 32;

/// The virtual disk of a qcow2 image.
pub(super) struct Qcow2Disk {
    source: Arc<dyn ReadAt>,
    header: Header,
    tables: Tables,
    expansion: Expansion,
    decoders: Pool<Decoder>,
}

/// How many decoded bytes of a compressed cluster come before the wanted ones.
type Skip = usize;

/// Where a run of the virtual disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Hole,
    Zero,
    /// As it is, from this byte of the file.
    Plain(u64),
    /// In a compressed cluster.
    Compressed(CompressedAt),
}

impl Place {
    /// What it is to those who look at the byte `skip` of it, and where they find that byte.
    fn seen_from(self, skip: u64) -> (ExtentKind, Option<u64>) {
        match self {
            Place::Hole => (ExtentKind::Hole, None),
            Place::Zero => (ExtentKind::Zero, None),
            Place::Plain(host) => (ExtentKind::Data, Some(host + skip)),
            Place::Compressed(_) => (ExtentKind::Compressed, None),
        }
    }
}

impl Qcow2Disk {
    /// Opens the disk: reads and validates the L1 table; L2 tables follow when they are needed.
    pub(super) fn open(source: Arc<dyn ReadAt>, header: &Header, limits: &Limits) -> Result<Self> {
        let tables = Tables::load(source.as_ref(), header, limits)?;
        let expansion = Expansion::new(source.len(), limits);
        Ok(Self { source, header: header.clone(), tables, expansion, decoders: Pool::new() })
    }

    fn entry_words(&self) -> u64 {
        if self.header.extended_l2 { 2 } else { 1 }
    }

    fn l2_entries(&self) -> u64 {
        self.header.cluster_size() / (8 * self.entry_words())
    }

    /// Bytes of the virtual disk under one L2 table.
    fn l2_reach(&self) -> u64 {
        self.header.cluster_size() * self.l2_entries()
    }

    /// The smallest run that is stored in one way: a cluster, or a subcluster.
    fn grain(&self) -> u64 {
        if self.header.extended_l2 {
            self.header.cluster_size() / SUBCLUSTERS
        } else {
            self.header.cluster_size()
        }
    }

    /// Finds the grain at `offset` in its L2 `table`.
    fn place(&self, table: &Table, offset: u64) -> Result<Place> {
        let cluster_size = self.header.cluster_size();
        let word = (offset / cluster_size % self.l2_entries() * self.entry_words()) as usize;
        let entry = table.get(word).copied().unwrap_or(0);
        if entry & COMPRESSED != 0 {
            return self.compressed(entry, offset).map(Place::Compressed);
        }
        let host = entry & OFFSET_MASK;
        let in_cluster = offset % cluster_size / self.grain() * self.grain();
        if self.header.extended_l2 {
            let bitmap = table.get(word + 1).copied().unwrap_or(0);
            let subcluster = in_cluster / self.grain();
            let (allocated, zero) = (bitmap as u32, (bitmap >> SUBCLUSTERS) as u32);
            // Of the whole cluster, as qemu has it, and not only of the part that is wanted.
            if allocated & zero != 0 || host == 0 && allocated != 0 {
                return Err(
                    self.corrupt(offset, format!("its subcluster bitmap {bitmap:#x} contradicts itself"))
                );
            }
            let is_set = |bits: u32| bits >> subcluster & 1 != 0;
            return match (is_set(allocated), is_set(zero)) {
                (true, _) => self.plain(host, in_cluster, offset),
                (false, true) => Ok(Place::Zero),
                (false, false) => Ok(Place::Hole),
            };
        }
        if entry & ZERO != 0 {
            if self.header.version < 3 {
                return Err(self.corrupt(offset, "it has the zero flag, which version 2 does not know"));
            }
            return Ok(Place::Zero);
        }
        if host == 0 {
            return Ok(Place::Hole);
        }
        self.plain(host, in_cluster, offset)
    }

    fn plain(&self, host: u64, in_cluster: u64, offset: u64) -> Result<Place> {
        if !host.is_multiple_of(self.header.cluster_size()) {
            return Err(
                self.corrupt(offset, format!("its bytes at {host:#x} do not begin at a cluster boundary"))
            );
        }
        // Of the last cluster of a file only the written part may be there; qemu reads the rest as zeros.
        if host >= self.source.len() {
            return Err(
                self.corrupt(offset, format!("its bytes at {host:#x} are beyond the end of the file"))
            );
        }
        self.check_overlap(host, self.header.cluster_size(), offset)?;
        Ok(Place::Plain(host + in_cluster))
    }

    fn compressed(&self, entry: u64, offset: u64) -> Result<CompressedAt> {
        let at = CompressedAt::decode(entry, self.header.cluster_bits);
        if at.host >= self.source.len() {
            return Err(self.corrupt(
                offset,
                format!("its compressed bytes at {:#x} are beyond the end of the file", at.host),
            ));
        }
        self.check_overlap(at.host, at.len, offset)?;
        Ok(at)
    }

    /// A cluster never lies in the header, in the L1 table or in its own L2 table.
    fn check_overlap(&self, host: u64, bytes: u64, offset: u64) -> Result<()> {
        let l2 = self.tables.l1_entry(offset / self.l2_reach());
        let l1_bytes = self.tables.l1_len() * 8;
        let cluster_size = self.header.cluster_size();
        for (what, start, len) in [
            ("header", 0, cluster_size),
            ("L1 table", self.header.l1_offset, l1_bytes),
            ("L2 table", l2, cluster_size),
        ] {
            if host < start + len && start < host + bytes {
                return Err(self.corrupt(offset, format!("its bytes at {host:#x} overlap the {what}")));
            }
        }
        Ok(())
    }

    fn corrupt(&self, offset: u64, why: impl std::fmt::Display) -> Error {
        Error::new(
            ErrorKind::Corrupt,
            format!("the qcow2 cluster at virtual offset {offset} is damaged: {why}"),
        )
    }

    /// Fills the unstored parts of `buf` with zeros and lists the stored ones.
    fn plan(&self, buf: &mut [u8], offset: u64) -> Result<Pieces<Skip>> {
        let mut pieces = Pieces::new();
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let l1_index = at / self.l2_reach();
            let table_end = (l1_index + 1).saturating_mul(self.l2_reach()).min(end);
            let Some(table) = self.tables.l2(self.source.as_ref(), l1_index)? else {
                buf[(at - offset) as usize..(table_end - offset) as usize].fill(0);
                at = table_end;
                continue;
            };
            while at < table_end {
                let place = self.place(&table, at)?;
                // A compressed cluster is one piece, whatever the grain.
                let grain = match place {
                    Place::Compressed(_) => self.header.cluster_size(),
                    _ => self.grain(),
                };
                let skip = at % grain;
                let len = (grain - skip).min(table_end - at);
                let start = (at - offset) as usize;
                let piece = match place {
                    Place::Hole | Place::Zero => {
                        buf[start..start + len as usize].fill(0);
                        None
                    }
                    Place::Plain(host) => {
                        let host = host + skip;
                        let stored = self.source.len().saturating_sub(host).min(len);
                        buf[start + stored as usize..start + len as usize].fill(0);
                        Some(Piece { at: start, len: stored as usize, host, stored, code: None })
                            .filter(|piece| piece.len > 0)
                    }
                    Place::Compressed(CompressedAt { host, len: stored }) => {
                        let stored = stored.min(self.source.len() - host);
                        Some(Piece { at: start, len: len as usize, host, stored, code: Some(skip as usize) })
                    }
                };
                if let Some(piece) = piece {
                    pieces.push(piece);
                }
                at += len;
            }
        }
        Ok(pieces)
    }

    /// Decodes a cluster whose stream is at the start of `stored`, and puts what comes after `skip` into `into`.
    fn decode(&self, decoder: &mut Decoder, stored: &[u8], skip: Skip, into: &mut [u8]) -> bool {
        let cluster_size = self.header.cluster_size() as usize;
        if into.len() == cluster_size {
            return decoder.decode(self.header.compression, stored, into);
        }
        let mut cluster = std::mem::take(&mut decoder.cluster);
        cluster.resize(cluster_size, 0);
        let whole = decoder.decode(self.header.compression, stored, &mut cluster);
        into.copy_from_slice(&cluster[skip..skip + into.len()]);
        decoder.cluster = cluster;
        whole
    }
}

impl Disk for Qcow2Disk {
    fn virtual_size(&self) -> u64 {
        self.header.virtual_size
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let size = self.header.virtual_size;
        let l1_index = offset / self.l2_reach();
        let table_end = |l1_index: u64| (l1_index + 1).saturating_mul(self.l2_reach()).min(size);
        let mut end = table_end(l1_index);
        let Some(table) = self.tables.l2(self.source.as_ref(), l1_index)? else {
            // On through whole tables that are not there; this costs no read.
            while end < size && self.tables.is_hole(end / self.l2_reach()) {
                end = table_end(end / self.l2_reach());
            }
            let len = end.saturating_sub(offset);
            return Ok(Extent { start: offset, len, kind: ExtentKind::Hole, host: None });
        };
        let last = end;
        let (kind, host) = self.place(&table, offset)?.seen_from(offset % self.grain());
        end = (offset / self.grain() + 1) * self.grain();
        while end < last {
            let next = self.place(&table, end)?.seen_from(0);
            if next != (kind, host.map(|host| host + (end - offset))) {
                break;
            }
            end += self.grain();
        }
        end = end.min(size);
        while kind == ExtentKind::Hole && end < size && end.is_multiple_of(self.l2_reach()) {
            let next = end / self.l2_reach();
            if !self.tables.is_hole(next) {
                break;
            }
            end = table_end(next);
        }
        Ok(Extent { start: offset, len: end.saturating_sub(offset), kind, host })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(buf, offset, self.header.virtual_size)?;
        let pieces = self.plan(buf, offset)?;
        if pieces.is_empty() {
            return Ok(());
        }
        pieces.record(&self.expansion, offset, offset + buf.len() as u64)?;
        self.decoders.with(Decoder::new, |decoder| {
            let mut scratch = std::mem::take(&mut decoder.stored);
            let result = pieces.read(self.source.as_ref(), buf, &mut scratch, |piece, skip, stored, into| {
                if self.decode(decoder, stored, *skip, into) {
                    return Ok(());
                }
                let compression = self.header.compression;
                let why = format!("its {compression} stream at {:#x} cannot be decoded", piece.host);
                Err(self.corrupt(offset + piece.at as u64, why))
            });
            decoder.stored = scratch;
            result
        })
    }

    fn details(&self) -> Details {
        let header = &self.header;
        let mut specific: Vec<(&'static str, Value)> = vec![
            ("compat", if header.version == 2 { "0.10" } else { "1.1" }.into()),
            ("compression-type", header.compression.to_string().into()),
            ("refcount-bits", u64::from(header.refcount_bits).into()),
        ];
        if header.version > 2 {
            specific.push(("lazy-refcounts", header.lazy_refcounts.into()));
            specific.push(("corrupt", header.corrupt.into()));
            specific.push(("extended-l2", header.extended_l2.into()));
        }
        if header.snapshots > 0 {
            specific.push(("internal-snapshots", u64::from(header.snapshots).into()));
        }
        Details { cluster_size: Some(header.cluster_size()), dirty: Some(header.dirty), specific }
    }
}
