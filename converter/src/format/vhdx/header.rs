//! The header section: which header counts, where the log is, and where the regions are.

use super::{
    BAT_REGION, Guid, METADATA_REGION, MIB, checksum, corrupt, guid_at, guid_text, le16, le32, le64, section,
};
use crate::io::ReadAt;
use crate::{Error, ErrorKind, Result};

/// Most entries of a region table.
const REGIONS_MAX: u32 = 2047;

/// Bytes before the first entry of a region table, and of an entry.
const TABLE_HEADER_BYTES: usize = 16;
const TABLE_ENTRY_BYTES: usize = 32;

/// A part of the file, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: u64,
    pub(super) len: u64,
}

impl Span {
    pub(super) fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    pub(super) fn overlaps(&self, start: u64, len: u64) -> bool {
        self.start < start.saturating_add(len) && start < self.end()
    }
}

/// What the current header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    sequence: u64,
    version: u16,
    log_version: u16,
    log_guid: Guid,
    /// Where the log is; empty if there is none.
    pub(super) log: Span,
}

/// The header section from the first header to the last region table.
pub(super) struct HeaderSection(Vec<u8>);

impl HeaderSection {
    pub(super) fn read(source: &dyn ReadAt) -> Result<Self> {
        if source.len() < section::BYTES {
            return Err(corrupt(format!(
                "the VHDX file of {} bytes ends inside its header section of 1 MiB: it is cut short",
                source.len()
            )));
        }
        let [start, _] = section::HEADERS;
        let mut bytes = vec![0; (section::END - start) as usize];
        source
            .read_exact_at(&mut bytes, start)
            .map_err(|e| Error::io(format!("reading the VHDX headers at offset {start}"), e))?;
        Ok(Self(bytes))
    }

    fn part(&self, offset: u64, len: usize) -> &[u8] {
        let [start, _] = section::HEADERS;
        self.0.get((offset - start) as usize..).and_then(|rest| rest.get(..len)).unwrap_or_default()
    }

    /// The valid header with the higher sequence number (section "Headers").
    pub(super) fn current_header(&self) -> Result<Header> {
        let [first, second] =
            section::HEADERS.map(|offset| Header::parse(self.part(offset, section::HEADER_BYTES)));
        let header = match (first, second) {
            (None, None) => {
                return Err(corrupt("neither VHDX header has a valid signature and checksum"));
            }
            (Some(only), None) | (None, Some(only)) => only,
            // Some writers leave two that are alike.
            (Some(a), Some(b)) if a == b => a,
            (Some(a), Some(b)) if a.sequence == b.sequence => {
                return Err(corrupt(format!(
                    "both VHDX headers have sequence number {}, and they differ",
                    a.sequence
                )));
            }
            (Some(a), Some(b)) => {
                if a.sequence > b.sequence {
                    a
                } else {
                    b
                }
            }
        };
        header.check()?;
        Ok(header)
    }

    /// The regions that the first valid table names; both are alike (section "Region Table").
    pub(super) fn regions(&self, log: Span, file_bytes: u64) -> Result<Regions> {
        let tables = section::REGION_TABLES.map(|offset| self.part(offset, section::REGION_TABLE_BYTES));
        let valid = tables.into_iter().find(|table| {
            table.starts_with(b"regi")
                && le32(table, 4) == Some(checksum(table))
                && le32(table, 8).is_some_and(|count| count <= REGIONS_MAX)
        });
        let table =
            valid.ok_or_else(|| corrupt("neither VHDX region table has a valid signature and checksum"))?;
        Regions::parse(table, log, file_bytes)
    }
}

impl Header {
    /// Reads a header; `None` if it is not valid.
    fn parse(bytes: &[u8]) -> Option<Self> {
        if !bytes.starts_with(b"head") || le32(bytes, 4)? != checksum(bytes) {
            return None;
        }
        Some(Self {
            sequence: le64(bytes, 8)?,
            log_guid: guid_at(bytes, 48)?,
            log_version: le16(bytes, 64)?,
            version: le16(bytes, 66)?,
            log: Span { start: le64(bytes, 72)?, len: u64::from(le32(bytes, 68)?) },
        })
    }

    fn check(&self) -> Result<()> {
        if self.version != 1 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("the VHDX file has version {}; only version 1 is known", self.version),
            ));
        }
        let Span { start, len } = self.log;
        if len > 0 && (start < MIB || !start.is_multiple_of(MIB) || !len.is_multiple_of(MIB)) {
            return Err(corrupt(format!(
                "the VHDX log of {len} bytes at offset {start} does not lie on boundaries of 1 MiB"
            )));
        }
        if self.log_guid().is_some() && self.log_version != 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("the VHDX log has version {}; only version 0 is known", self.log_version),
            ));
        }
        Ok(())
    }

    /// What the entries of the log are known by; `None` if the log is empty, as in a file that was closed cleanly.
    pub(super) fn log_guid(&self) -> Option<&Guid> {
        (self.log_guid != [0; 16]).then_some(&self.log_guid)
    }
}

/// Where the regions are.
pub(super) struct Regions {
    pub(super) bat: Span,
    pub(super) metadata: Span,
    /// Everything that is no payload, in the order of the file and without overlaps.
    taken: Vec<Span>,
}

impl Regions {
    fn parse(table: &[u8], log: Span, file_bytes: u64) -> Result<Self> {
        let count = le32(table, 8).unwrap_or(0) as usize;
        let (mut bat, mut metadata) = (None, None);
        let mut taken = vec![Span { start: 0, len: section::BYTES }];
        if log.len > 0 {
            taken.push(log);
        }
        let entries = table.get(TABLE_HEADER_BYTES..).unwrap_or_default();
        for entry in entries.chunks_exact(TABLE_ENTRY_BYTES).take(count) {
            let (Some(id), Some(start), Some(len), Some(flags)) =
                (guid_at(entry, 0), le64(entry, 16), le32(entry, 24), le32(entry, 28))
            else {
                continue;
            };
            let span = Span { start, len: u64::from(len) };
            let name = match id {
                BAT_REGION => "BAT".to_owned(),
                METADATA_REGION => "metadata".to_owned(),
                other => guid_text(&other),
            };
            let known = match id {
                BAT_REGION => Some(&mut bat),
                METADATA_REGION => Some(&mut metadata),
                _ if flags & 1 != 0 => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!("the VHDX file needs the unknown region {name} to be understood"),
                    ));
                }
                _ => None,
            };
            let aligned = start.is_multiple_of(MIB) && span.len.is_multiple_of(MIB);
            if !aligned || span.len == 0 || start.checked_add(span.len).is_none() {
                return Err(corrupt(format!(
                    "the VHDX region {name} of {len} bytes at offset {start} does not lie on boundaries of 1 MiB"
                )));
            }
            if let Some(known) = known {
                if span.end() > file_bytes {
                    return Err(corrupt(format!(
                        "the VHDX region {name} ends at offset {}, beyond the end of the file of {file_bytes} \
                         bytes: the file is cut short or damaged",
                        span.end()
                    )));
                }
                if known.replace(span).is_some() {
                    return Err(corrupt(format!("the VHDX region {name} is there twice")));
                }
            }
            taken.push(span);
        }
        taken.sort_unstable_by_key(|span| span.start);
        for pair in taken.windows(2) {
            if let [a, b] = pair
                && a.end() > b.start
            {
                return Err(corrupt(format!(
                    "two parts of the VHDX file overlap: one ends at offset {}, the next begins at {}",
                    a.end(),
                    b.start
                )));
            }
        }
        let missing = |name| corrupt(format!("the VHDX region table has no {name} region"));
        Ok(Self {
            bat: bat.ok_or_else(|| missing("BAT"))?,
            metadata: metadata.ok_or_else(|| missing("metadata"))?,
            taken,
        })
    }

    /// Whether `len` bytes at `start` touch anything that is no payload.
    pub(super) fn overlap(&self, start: u64, len: u64) -> bool {
        let next = self.taken.partition_point(|span| span.end() <= start);
        self.taken.get(next).is_some_and(|span| span.overlaps(start, len))
    }
}
