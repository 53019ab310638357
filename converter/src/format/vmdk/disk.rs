//! Random access to the virtual disk of a sparse extent.

use std::sync::Arc;

use super::descriptor::Descriptor;
use super::header::Header;
use super::tables::{Table, Tables};
use super::{GTE_ZEROED, HEADER_BYTES, corrupt, details, marker};
use crate::format::SECTOR_BYTES;
use crate::format::check_range;
use crate::format::expansion::Expansion;
use crate::format::pieces::{Piece, Pieces, Pool};
use crate::io::{Details, Disk, Extent, ExtentKind, ReadAt, Value};
use crate::limits::Limits;
use crate::{Error, Result};

/// What the stream of a grain that does not shrink is longer than the grain at most, its marker included, if it was
/// made by a usual encoder. A longer one costs a second read.
const STREAM_EXCESS_BYTES: u64 = 1024;

/// The virtual disk of a sparse extent.
pub(super) struct SparseDisk {
    source: Arc<dyn ReadAt>,
    header: Header,
    descriptor: Option<Descriptor>,
    tables: Tables,
    expansion: Expansion,
    decoders: Pool<Decoder>,
}

/// Where a grain is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Hole,
    Zero,
    /// As it is, from this byte of the file.
    Plain(u64),
    /// As a stream that begins at this byte of the file, its marker first.
    Compressed(u64),
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

/// Of a compressed grain: where it is on the virtual disk, and how many bytes of it come before the wanted ones.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    start: u64,
    skip: usize,
}

/// The decompressor and scratch space of one worker.
struct Decoder {
    zlib: libdeflater::Decompressor,
    /// Neighbouring grains as read from the file.
    stored: Vec<u8>,
    /// One decoded grain of which only a part is wanted.
    grain: Vec<u8>,
}

impl Decoder {
    fn new() -> Self {
        Self { zlib: libdeflater::Decompressor::new(), stored: Vec::new(), grain: Vec::new() }
    }
}

impl SparseDisk {
    /// Opens the disk: reads and validates the grain directory; grain tables follow when they are needed.
    pub(super) fn open(
        source: Arc<dyn ReadAt>,
        header: Header,
        descriptor: Option<Descriptor>,
        limits: &Limits,
    ) -> Result<Self> {
        let gd_offset = header.gd_offset.ok_or_else(|| corrupt("the VMDK file has no grain directory"))?;
        let tables = Tables::load(source.as_ref(), &header, gd_offset, limits)?;
        let expansion = Expansion::new(source.len(), limits);
        Ok(Self { source, header, descriptor, tables, expansion, decoders: Pool::new() })
    }

    /// Finds the grain at `offset` in its `table`.
    fn place(&self, table: &Table, offset: u64) -> Result<Place> {
        let index = (offset / self.header.grain_bytes % self.header.gtes_per_gt) as usize;
        let sector = match table.get(index).copied().unwrap_or(0) {
            0 => return Ok(Place::Hole),
            GTE_ZEROED if self.header.zeroed_gte => return Ok(Place::Zero),
            sector => sector,
        };
        let host = u64::from(sector) * SECTOR_BYTES;
        // Unlike qemu, which reads zeros there: a file that was cut short would pass for a disk.
        let start = offset / self.header.grain_bytes * self.header.grain_bytes;
        let bytes = match self.header.compressed {
            true => SECTOR_BYTES,
            false => self.header.grain_bytes.min(self.header.virtual_size - start),
        };
        let needed = if self.header.compressed { 1 } else { bytes };
        if host + needed > self.source.len() {
            let why = format!("its bytes at sector {sector} are beyond the end of the file");
            return Err(self.damaged(offset, why));
        }
        self.check_overlap(host, bytes, offset)?;
        Ok(if self.header.compressed { Place::Compressed(host) } else { Place::Plain(host) })
    }

    /// A grain never lies in the header, in the descriptor, in the directory or in its own table.
    fn check_overlap(&self, host: u64, bytes: u64, offset: u64) -> Result<()> {
        let (gd, gd_end) = self.tables.gd_range();
        let gt = self.tables.gt_offset(offset / self.header.gt_reach());
        let (descriptor, descriptor_bytes) = self.header.descriptor.unwrap_or((0, 0));
        for (what, start, end) in [
            ("header", 0, HEADER_BYTES as u64),
            ("descriptor", descriptor, descriptor + descriptor_bytes),
            ("grain directory", gd, gd_end),
            ("grain table", gt, gt + self.header.gt_bytes()),
        ] {
            if host < end && start < host + bytes {
                let sector = host / SECTOR_BYTES;
                return Err(self.damaged(offset, format!("its bytes at sector {sector} overlap the {what}")));
            }
        }
        Ok(())
    }

    fn damaged(&self, offset: u64, why: impl std::fmt::Display) -> Error {
        corrupt(format!("the VMDK grain at virtual offset {offset} is damaged: {why}"))
    }

    /// Most bytes that the stream of a grain can have, its marker not counted; qemu's bound.
    fn stream_bytes_max(&self) -> u64 {
        2 * self.header.grain_bytes
    }

    /// Bytes to read for the stream of the grain at `offset`, which begins at `host`: up to the next grain in the
    /// table, where streams are in order. An estimate, as only the stream tells.
    fn stored_bytes(&self, table: &Table, offset: u64, host: u64) -> u64 {
        let index = (offset / self.header.grain_bytes % self.header.gtes_per_gt) as usize;
        let later = table.get(index + 1..).unwrap_or_default();
        let next = later.iter().copied().find(|&sector| sector > GTE_ZEROED);
        let usual = self.header.grain_bytes + STREAM_EXCESS_BYTES;
        let stored = match next.map(|sector| u64::from(sector) * SECTOR_BYTES) {
            Some(next) if next > host => (next - host).min(usual),
            _ => usual,
        };
        stored.min(self.source.len() - host)
    }

    /// Fills the unstored parts of `buf` with zeros and lists the stored ones.
    fn plan(&self, buf: &mut [u8], offset: u64) -> Result<Pieces<Wanted>> {
        let mut pieces = Pieces::new();
        let (reach, grain) = (self.header.gt_reach(), self.header.grain_bytes);
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let index = at / reach;
            let table_end = (index + 1).saturating_mul(reach).min(end);
            let Some(table) = self.tables.gt(self.source.as_ref(), index)? else {
                buf[(at - offset) as usize..(table_end - offset) as usize].fill(0);
                at = table_end;
                continue;
            };
            while at < table_end {
                let skip = at % grain;
                let len = (grain - skip).min(table_end - at) as usize;
                let start = (at - offset) as usize;
                match self.place(&table, at)? {
                    Place::Hole | Place::Zero => buf[start..start + len].fill(0),
                    Place::Plain(host) => {
                        let host = host + skip;
                        pieces.push(Piece { at: start, len, host, stored: len as u64, code: None });
                    }
                    Place::Compressed(host) => {
                        let stored = self.stored_bytes(&table, at, host);
                        let wanted = Wanted { start: at - skip, skip: skip as usize };
                        pieces.push(Piece { at: start, len, host, stored, code: Some(wanted) });
                    }
                }
                at += len as u64;
            }
        }
        Ok(pieces)
    }

    /// Decodes the grain that begins in `stored` at file offset `host`, and puts the wanted part of it into `into`.
    fn decode(
        &self,
        decoder: &mut Decoder,
        host: u64,
        wanted: Wanted,
        stored: &[u8],
        into: &mut [u8],
    ) -> Result<()> {
        let grain = self.header.grain_bytes;
        let (at, bytes) = self.stream(host, wanted.start, stored)?;
        let longer;
        let stored = match stored.get(at as usize..(at + bytes) as usize) {
            Some(stream) => stream,
            None => {
                longer = self.read_stream(host + at, bytes)?;
                &longer
            }
        };
        // What is beyond the end of the disk may be left out.
        let needed = grain.min(self.header.virtual_size - wanted.start) as usize;
        let undecodable = |_| {
            let sector = host / SECTOR_BYTES;
            self.damaged(wanted.start, format!("its zlib stream at sector {sector} cannot be decoded"))
        };
        if into.len() == grain as usize {
            let n = decoder.zlib.zlib_decompress(stored, into).map_err(undecodable)?;
            return self.check_length(wanted.start, n, needed);
        }
        decoder.grain.resize(grain as usize, 0);
        let n = decoder.zlib.zlib_decompress(stored, &mut decoder.grain).map_err(undecodable)?;
        self.check_length(wanted.start, n, needed)?;
        into.copy_from_slice(&decoder.grain[wanted.skip..wanted.skip + into.len()]);
        Ok(())
    }

    /// Where the stream of the grain at `start` is in `stored`, and how long it is: perhaps longer than that.
    fn stream(&self, host: u64, start: u64, stored: &[u8]) -> Result<(u64, u64)> {
        let left = self.source.len() - host;
        if !self.header.markers {
            // Where it ends only the decoder finds out.
            return Ok((0, self.stream_bytes_max().min(left)));
        }
        let Some((lba, bytes)) = stored.split_first_chunk().and_then(|(lba, rest)| {
            Some((u64::from_le_bytes(*lba), u64::from(u32::from_le_bytes(*rest.first_chunk()?))))
        }) else {
            return Err(self.damaged(start, "its marker is beyond the end of the file"));
        };
        if lba != start / SECTOR_BYTES {
            return Err(self.damaged(start, format!("the marker before it is that of sector {lba}")));
        }
        if bytes == 0 || bytes > self.stream_bytes_max() {
            return Err(self.damaged(start, format!("its stream is said to have {bytes} bytes")));
        }
        if marker::GRAIN_BYTES + bytes > left {
            return Err(self.damaged(start, format!("its stream of {bytes} bytes ends beyond the file")));
        }
        Ok((marker::GRAIN_BYTES, bytes))
    }

    fn read_stream(&self, host: u64, bytes: u64) -> Result<Vec<u8>> {
        let mut stream = vec![0; bytes as usize];
        self.source
            .read_exact_at(&mut stream, host)
            .map_err(|e| Error::io(format!("reading the image at file offset {host}"), e))?;
        Ok(stream)
    }

    fn check_length(&self, start: u64, decoded: usize, needed: usize) -> Result<()> {
        if decoded >= needed {
            return Ok(());
        }
        Err(self.damaged(start, format!("its stream decodes to {decoded} bytes, not {needed}")))
    }
}

impl Disk for SparseDisk {
    fn virtual_size(&self) -> u64 {
        self.header.virtual_size
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let (size, grain, reach) =
            (self.header.virtual_size, self.header.grain_bytes, self.header.gt_reach());
        let index = offset / reach;
        let table_end = |index: u64| (index + 1).saturating_mul(reach).min(size);
        let mut end = table_end(index);
        let Some(table) = self.tables.gt(self.source.as_ref(), index)? else {
            // On through whole tables that are not there; this costs no read.
            while end < size && self.tables.gt_offset(end / reach) == 0 {
                end = table_end(end / reach);
            }
            let len = end.saturating_sub(offset);
            return Ok(Extent { start: offset, len, kind: ExtentKind::Hole, host: None });
        };
        let last = end;
        let (kind, host) = self.place(&table, offset)?.seen_from(offset % grain);
        end = (offset / grain + 1) * grain;
        while end < last {
            let next = self.place(&table, end)?.seen_from(0);
            if next != (kind, host.map(|host| host + (end - offset))) {
                break;
            }
            end += grain;
        }
        end = end.min(last);
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
            let decode = |piece: &Piece<Wanted>, wanted: &Wanted, stored: &[u8], into: &mut [u8]| {
                self.decode(decoder, piece.host, *wanted, stored, into)
            };
            let result = pieces.read(self.source.as_ref(), buf, &mut scratch, decode);
            decoder.stored = scratch;
            result
        })
    }

    fn details(&self) -> Details {
        let extent = vec![
            ("virtual-size", Value::Number(self.header.virtual_size)),
            ("cluster-size", Value::Number(self.header.grain_bytes)),
            ("compressed", Value::Bool(self.header.compressed)),
        ];
        Details {
            cluster_size: Some(self.header.grain_bytes),
            dirty: Some(self.header.unclean),
            specific: details(self.descriptor.as_ref(), extent),
        }
    }
}
