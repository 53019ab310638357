//! The log: what was to be written to the metadata when the writer was cut off (section "Log").
//!
//! ```text
//!  entry      entry                    entry             the active sequence: entries one after the other, each
//! ┌─────────┬───────────────────────┬─────────┬─ ─       numbered one higher, from where the last one's tail points
//! │ header  │ header   ┌──────────┐ │ header  │
//! │ zero    │ desc desc│sector of │…│ desc    │          replayed in that order onto the file
//! │         │          │data      │ │         │
//! └─────────┴──────────┴──────────┴─┴─────────┴─ ─
//! ```

use std::sync::Arc;

use super::header::{Header, Span};
use super::overlay::{Overlay, Sector};
use super::{Guid, LOG_SECTOR_BYTES, MIB, checksum, corrupt, guid_at, le32, le64, section};
use crate::io::ReadAt;
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

/// Bytes of an entry's header, and of a descriptor.
const ENTRY_HEADER_BYTES: usize = 64;
const DESCRIPTOR_BYTES: usize = 32;

/// Entries of an honest log overlap at most those of the round before: checksums over more than this many times the
/// log are a trap.
const CHECKED_LOGS_MAX: usize = 4;

/// Share of `Limits::table_bytes_max` that a log may have; its patches take up to three times as much.
const TABLE_SHARE: u64 = 4;

/// Replays the log known by `guid` in memory: `source` itself is only read.
pub(super) fn replay(
    source: Arc<dyn ReadAt>,
    header: &Header,
    guid: &Guid,
    limits: &Limits,
) -> Result<Arc<dyn ReadAt>> {
    let Span { start, len } = header.log;
    if len > limits.table_bytes_max / TABLE_SHARE {
        return Err(Error::new(
            ErrorKind::Limit,
            format!(
                "the VHDX log of {len} bytes, which has to be replayed, is larger than the limit of {}; repair a \
                 copy of the image with `qemu-img check -r all`",
                limits.table_bytes_max / TABLE_SHARE
            ),
        ));
    }
    if header.log.end() > source.len() {
        return Err(corrupt(format!(
            "the VHDX log ends at offset {}, beyond the end of the file of {} bytes: the file is cut short",
            header.log.end(),
            source.len()
        )));
    }
    let mut bytes = vec![0; len as usize];
    source
        .read_exact_at(&mut bytes, start)
        .map_err(|e| Error::io(format!("reading the VHDX log at offset {start}"), e))?;
    let log = Log::read(bytes, guid)?;
    let active = log.active_sequence().ok_or_else(|| {
        corrupt(format!(
            "the VHDX file was not closed cleanly, and its log at offset {start} has no valid sequence of entries \
             to replay"
        ))
    })?;
    let mut overlay = Overlay::new(source.clone());
    for entry in active {
        if entry.flushed_bytes > source.len() {
            return Err(corrupt(format!(
                "the VHDX file has {} bytes; its log knows of {}: the file is cut short",
                source.len(),
                entry.flushed_bytes
            )));
        }
        log.apply(entry, header.log, &mut overlay)?;
    }
    Ok(Arc::new(overlay))
}

/// The log's bytes, a ring of sectors, and the valid entries in them.
struct Log {
    bytes: Vec<u8>,
    /// By the sector they begin in.
    entries: Vec<Option<Entry>>,
}

/// A valid entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// First sector in the log, and their number.
    first: usize,
    sectors: usize,
    /// Sector of the first entry that was not yet applied when this one was written.
    tail: usize,
    sequence: u64,
    /// Bytes of the file on stable storage when the entry was written.
    flushed_bytes: u64,
    /// Bytes that the file has to have.
    last_bytes: u64,
}

impl Log {
    fn read(bytes: Vec<u8>, guid: &Guid) -> Result<Self> {
        let mut log = Self { bytes, entries: Vec::new() };
        let mut left = log.bytes.len() * CHECKED_LOGS_MAX;
        for first in 0..log.sectors() {
            let entry = log.entry(first, guid, &mut left);
            if left == 0 {
                return Err(corrupt("the entries of the VHDX log overlap each other many times"));
            }
            log.entries.push(entry);
        }
        Ok(log)
    }

    fn sectors(&self) -> usize {
        self.bytes.len() / LOG_SECTOR_BYTES
    }

    /// Copies `count` sectors from `first` on, over the end of the ring.
    fn copy(&self, first: usize, count: usize) -> Vec<u8> {
        let (start, len) = (first * LOG_SECTOR_BYTES, count * LOG_SECTOR_BYTES);
        let before_end = len.min(self.bytes.len().saturating_sub(start));
        let mut copy = Vec::with_capacity(len);
        copy.extend_from_slice(self.bytes.get(start..start + before_end).unwrap_or_default());
        copy.extend_from_slice(self.bytes.get(..len - before_end).unwrap_or_default());
        copy
    }

    /// Reads the entry that begins in sector `first`; `None` if none does that is valid. Takes the bytes it verifies
    /// from `left`.
    fn entry(&self, first: usize, guid: &Guid, left: &mut usize) -> Option<Entry> {
        let header = self.bytes.get(first * LOG_SECTOR_BYTES..)?;
        let bytes = le32(header, 8)? as usize;
        let tail = le32(header, 12)? as usize;
        let entry = Entry {
            first,
            sectors: bytes / LOG_SECTOR_BYTES,
            tail: tail / LOG_SECTOR_BYTES,
            sequence: le64(header, 16)?,
            flushed_bytes: le64(header, 48)?,
            last_bytes: le64(header, 56)?,
        };
        let plausible = header.starts_with(b"loge")
            && bytes.is_multiple_of(LOG_SECTOR_BYTES)
            && (1..=self.sectors()).contains(&entry.sectors)
            && tail.is_multiple_of(LOG_SECTOR_BYTES)
            && entry.tail < self.sectors()
            && entry.sequence > 0
            && guid_at(header, 32)? == *guid;
        if !plausible {
            return None;
        }
        *left = left.saturating_sub(bytes);
        if *left == 0 {
            return None;
        }
        let copy = self.copy(first, entry.sectors);
        if le32(&copy, 4)? != checksum(&copy) {
            return None;
        }
        patches(&copy, entry.sequence)?.all(|patch| patch.is_some()).then_some(entry)
    }

    /// The entries that have to be replayed, in their order: of all valid sequences that with the highest number.
    fn active_sequence(&self) -> Option<Vec<&Entry>> {
        let mut best: Option<Vec<&Entry>> = None;
        for start in self.entries.iter().flatten() {
            let mut sequence = vec![start];
            let mut head = start;
            // The numbers rise, so that no entry comes twice.
            while let Some(next) = self.entries.get((head.first + head.sectors) % self.sectors())
                && let Some(next) = next
                && Some(next.sequence) == head.sequence.checked_add(1)
            {
                sequence.push(next);
                head = next;
            }
            let newer = best.as_ref().and_then(|best| best.last()).is_none_or(|b| head.sequence > b.sequence);
            if newer && let Some(tail) = sequence.iter().position(|entry| entry.first == head.tail) {
                best = Some(sequence.split_off(tail));
            }
        }
        best
    }

    /// Puts what `entry` says onto the file.
    fn apply(&self, entry: &Entry, log: Span, overlay: &mut Overlay) -> Result<()> {
        let bytes = self.copy(entry.first, entry.sectors);
        let beyond = || corrupt(format!("entry {} of the VHDX log writes beyond any file", entry.sequence));
        for patch in patches(&bytes, entry.sequence).into_iter().flatten().flatten() {
            let (start, len) = match &patch {
                Patch::Zeros { start, len } => (*start, *len),
                Patch::Sector { start, .. } => (*start, LOG_SECTOR_BYTES as u64),
            };
            // These are never written through the log, and were read already.
            if len > 0 && (start < section::HEADERS_END || log.overlaps(start, len)) {
                return Err(corrupt(format!(
                    "entry {} of the VHDX log writes {len} bytes at offset {start}, over the headers or the log",
                    entry.sequence
                )));
            }
            match patch {
                Patch::Zeros { start, len } => overlay.put_zeros(start, len),
                Patch::Sector { start, sector } => overlay.put_sector(start, sector),
            }
            .ok_or_else(beyond)?;
        }
        // As qemu does, for writers that count bytes.
        overlay.extend(entry.last_bytes.checked_next_multiple_of(MIB).ok_or_else(beyond)?);
        Ok(())
    }
}

/// What a descriptor asks for.
enum Patch {
    Zeros { start: u64, len: u64 },
    Sector { start: u64, sector: Sector },
}

/// The patches of an entry of these `bytes`; each is `None` if its descriptor or its data are not valid.
fn patches(bytes: &[u8], sequence: u64) -> Option<impl Iterator<Item = Option<Patch>> + '_> {
    let count = le32(bytes, 24)? as usize;
    let descriptors_end = count.checked_mul(DESCRIPTOR_BYTES)?.checked_add(ENTRY_HEADER_BYTES)?;
    let descriptors = bytes.get(ENTRY_HEADER_BYTES..descriptors_end)?;
    let mut data =
        bytes.get(descriptors_end.next_multiple_of(LOG_SECTOR_BYTES)..)?.chunks_exact(LOG_SECTOR_BYTES);
    Some(descriptors.chunks_exact(DESCRIPTOR_BYTES).map(move |descriptor| {
        let start = le64(descriptor, 16)?;
        if le64(descriptor, 24)? != sequence || !start.is_multiple_of(LOG_SECTOR_BYTES as u64) {
            return None;
        }
        if descriptor.starts_with(b"zero") {
            let len = le64(descriptor, 8)?;
            return len.is_multiple_of(LOG_SECTOR_BYTES as u64).then_some(Patch::Zeros { start, len });
        }
        if !descriptor.starts_with(b"desc") {
            return None;
        }
        let stored = data.next()?;
        let high = u64::from(le32(stored, 4)?);
        let low = u64::from(le32(stored, LOG_SECTOR_BYTES - 4)?);
        if !stored.starts_with(b"data") || high << 32 | low != sequence {
            return None;
        }
        // The ends of the sector gave their room to the marks of its integrity.
        let mut sector = Box::new([0; LOG_SECTOR_BYTES]);
        sector.copy_from_slice(stored);
        sector[..8].copy_from_slice(descriptor.get(8..16)?);
        sector[LOG_SECTOR_BYTES - 4..].copy_from_slice(descriptor.get(4..8)?);
        Some(Patch::Sector { start, sector })
    }))
}
