//! The metadata region: what disk the file holds.

use super::header::Span;
use super::{
    BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, FILE_PARAMETERS, Guid, HAS_PARENT, LEAVE_BLOCKS_ALLOCATED,
    LOGICAL_SECTOR_SIZE, PARENT_LOCATOR, PHYSICAL_SECTOR_SIZE, VIRTUAL_DISK_ID, VIRTUAL_DISK_SIZE, corrupt,
    guid_at, guid_text, le16, le32,
};
use crate::io::ReadAt;
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

/// Bytes of the metadata table; items lie behind it.
const TABLE_BYTES: u64 = 64 << 10;

/// Bytes read at once: the table, and the items where writers put them.
const HEAD_BYTES: u64 = 128 << 10;

/// Most entries of the table, and bytes of one.
const ITEMS_MAX: u16 = 2047;
const ENTRY_BYTES: usize = 32;

/// Most bytes of a parent locator that are looked at for the parent's name.
const LOCATOR_BYTES_MAX: usize = 16 << 10;

/// Entry flags.
const IS_USER: u32 = 1;
const IS_REQUIRED: u32 = 4;

/// What the metadata says of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    /// Bytes of a payload block: a power of two from 1 to 256 MiB.
    pub(super) block_bytes: u64,
    /// Whether every block has its place in the file.
    pub(super) fixed: bool,
    pub(super) virtual_size: u64,
    pub(super) disk_id: Guid,
    /// 512 or 4096.
    pub(super) logical_sector_bytes: u64,
    pub(super) physical_sector_bytes: u64,
}

impl Metadata {
    pub(super) fn read(source: &dyn ReadAt, region: Span, limits: &Limits) -> Result<Self> {
        let items = Items::read(source, region)?;
        let mut parameters = [0; 8];
        items.fill(&FILE_PARAMETERS, "file parameters", &mut parameters)?;
        let [block @ .., f0, f1, f2, f3] = parameters;
        let block_bytes = u64::from(u32::from_le_bytes(block));
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & HAS_PARENT != 0 {
            let name = items.parent().map(|name| format!(" {name:?}")).unwrap_or_default();
            return Err(Error::new(
                ErrorKind::ForeignFile,
                format!(
                    "the VHDX image is a differencing disk with parent{name}; merge it into its parent first"
                ),
            ));
        }
        if !block_bytes.is_power_of_two() || !(BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block_bytes) {
            return Err(corrupt(format!(
                "the VHDX block size {block_bytes} is not a power of two from 1 MiB to 256 MiB"
            )));
        }
        let mut size = [0; 8];
        items.fill(&VIRTUAL_DISK_SIZE, "virtual disk size", &mut size)?;
        let virtual_size = u64::from_le_bytes(size);
        let logical_sector_bytes = items.sector_size(&LOGICAL_SECTOR_SIZE, "logical sector size")?;
        let physical_sector_bytes = items.sector_size(&PHYSICAL_SECTOR_SIZE, "physical sector size")?;
        let mut disk_id = [0; 16];
        items.fill(&VIRTUAL_DISK_ID, "virtual disk identifier", &mut disk_id)?;
        if virtual_size > limits.virtual_size_max {
            return Err(Error::new(
                ErrorKind::Limit,
                format!(
                    "the VHDX disk of {virtual_size} bytes is larger than the limit of {}",
                    limits.virtual_size_max
                ),
            ));
        }
        if !virtual_size.is_multiple_of(logical_sector_bytes) {
            return Err(corrupt(format!(
                "the VHDX disk of {virtual_size} bytes does not end at a sector of {logical_sector_bytes} bytes"
            )));
        }
        let fixed = flags & LEAVE_BLOCKS_ALLOCATED != 0;
        Ok(Self { block_bytes, fixed, virtual_size, disk_id, logical_sector_bytes, physical_sector_bytes })
    }
}

/// The known items of the table, and the beginning of the region.
struct Items<'a> {
    source: &'a dyn ReadAt,
    region: Span,
    head: Vec<u8>,
    /// Identifier, and place in the region.
    known: Vec<(Guid, Span)>,
}

impl<'a> Items<'a> {
    fn read(source: &'a dyn ReadAt, region: Span) -> Result<Self> {
        let mut head = vec![0; region.len.min(HEAD_BYTES) as usize];
        source
            .read_exact_at(&mut head, region.start)
            .map_err(|e| Error::io(format!("reading the VHDX metadata at offset {}", region.start), e))?;
        if !head.starts_with(b"metadata") {
            return Err(corrupt(format!(
                "the VHDX metadata table at offset {} does not begin with its signature",
                region.start
            )));
        }
        let count = le16(&head, 10).unwrap_or(u16::MAX);
        if count > ITEMS_MAX {
            return Err(corrupt(format!(
                "the VHDX metadata table has {count} entries; {ITEMS_MAX} are the most"
            )));
        }
        let mut known: Vec<(Guid, Span)> = Vec::new();
        let entries = head.get(ENTRY_BYTES..TABLE_BYTES as usize).unwrap_or_default();
        for entry in entries.chunks_exact(ENTRY_BYTES).take(usize::from(count)) {
            let (Some(id), Some(start), Some(len), Some(flags)) =
                (guid_at(entry, 0), le32(entry, 16), le32(entry, 20), le32(entry, 24))
            else {
                continue;
            };
            let is_known = [
                FILE_PARAMETERS,
                VIRTUAL_DISK_SIZE,
                VIRTUAL_DISK_ID,
                LOGICAL_SECTOR_SIZE,
                PHYSICAL_SECTOR_SIZE,
                PARENT_LOCATOR,
            ]
            .contains(&id);
            if !is_known || flags & IS_USER != 0 {
                if flags & IS_REQUIRED != 0 {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!(
                            "the VHDX file needs the unknown metadata item {} to be understood",
                            guid_text(&id)
                        ),
                    ));
                }
                continue;
            }
            let span = Span { start: u64::from(start), len: u64::from(len) };
            if span.start < TABLE_BYTES || span.end() > region.len {
                return Err(corrupt(format!(
                    "the VHDX metadata item {} of {len} bytes at {start} lies outside its region",
                    guid_text(&id)
                )));
            }
            if known.iter().any(|(other, _)| *other == id) {
                return Err(corrupt(format!("the VHDX metadata item {} is there twice", guid_text(&id))));
            }
            known.push((id, span));
        }
        Ok(Self { source, region, head, known })
    }

    /// Fills `buf` with the first bytes of an item that every file has.
    fn fill(&self, id: &Guid, name: &str, buf: &mut [u8]) -> Result<()> {
        let item = self.known.iter().find(|(known, _)| known == id).map(|(_, span)| *span);
        let Some(span) = item.filter(|span| span.len >= buf.len() as u64) else {
            return Err(corrupt(format!("the VHDX metadata has no {name}")));
        };
        let in_head = usize::try_from(span.start).ok().and_then(|at| self.head.get(at..)?.get(..buf.len()));
        if let Some(bytes) = in_head {
            buf.copy_from_slice(bytes);
            return Ok(());
        }
        // The region lies in the file, and the item in the region.
        self.source
            .read_exact_at(buf, self.region.start + span.start)
            .map_err(|e| Error::io(format!("reading the VHDX {name}"), e))
    }

    fn sector_size(&self, id: &Guid, name: &str) -> Result<u64> {
        let mut bytes = [0; 4];
        self.fill(id, name, &mut bytes)?;
        match u32::from_le_bytes(bytes) {
            size @ (512 | 4096) => Ok(u64::from(size)),
            other => Err(corrupt(format!("the VHDX {name} is {other}; it has to be 512 or 4096"))),
        }
    }

    /// The path of the parent as a differencing disk tells it (section "Parent Locator"), if it can be made out.
    fn parent(&self) -> Option<String> {
        let (_, span) = self.known.iter().find(|(id, _)| *id == PARENT_LOCATOR)?;
        let mut locator = vec![0; usize::try_from(span.len).ok()?.min(LOCATOR_BYTES_MAX)];
        self.fill(&PARENT_LOCATOR, "parent locator", &mut locator).ok()?;
        let text = |offset: u32, len: u16| {
            let bytes = locator.get(offset as usize..)?.get(..usize::from(len))?;
            let (units, _) = bytes.as_chunks::<2>();
            Some(String::from_utf16_lossy(&units.iter().map(|u| u16::from_le_bytes(*u)).collect::<Vec<_>>()))
        };
        let entries = locator.get(20..)?.chunks_exact(12).take(usize::from(le16(&locator, 18)?));
        let pairs = entries.filter_map(|entry| {
            let key = text(le32(entry, 0)?, le16(entry, 8)?)?;
            Some((key, text(le32(entry, 4)?, le16(entry, 10)?)?))
        });
        pairs.filter(|(key, _)| key.ends_with("_path")).map(|(_, path)| path).next()
    }
}
