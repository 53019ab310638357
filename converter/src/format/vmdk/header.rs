//! The header of a sparse extent, and its copy at the end of a file that was written as a stream.

use super::{
    DESCRIPTOR_BYTES_MAX, GD_AT_END, GRAIN_SECTORS_MAX, GTES_PER_GT_MAX, HEADER_BYTES, NEWLINE_TEST,
    SPARSE_MAGIC, VERSION_MAX, compression, corrupt, flag, limit, marker, unsupported,
};
use crate::Result;
use crate::format::SECTOR_BYTES;
use crate::limits::Limits;

/// Bytes at the end of a stream: the marker of the footer, the footer, the marker of the end.
pub(super) const FOOTER_BYTES: u64 = 3 * SECTOR_BYTES;

/// A validated header. Sizes and offsets are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) virtual_size: u64,
    /// The unit of allocation; a power of two.
    pub(super) grain_bytes: u64,
    /// Entries of one grain table.
    pub(super) gtes_per_gt: u64,
    /// Where the embedded descriptor is, and how long; `None` if there is none.
    pub(super) descriptor: Option<(u64, u64)>,
    /// Where the grain directory is; `None` if only the footer tells.
    pub(super) gd_offset: Option<u64>,
    /// Grains are zlib streams.
    pub(super) compressed: bool,
    /// A marker stands before each compressed grain.
    pub(super) markers: bool,
    /// A grain table entry of 1 means zeros.
    pub(super) zeroed_gte: bool,
    /// The image was not closed after it was written to.
    pub(super) unclean: bool,
}

impl Header {
    /// Parses and validates the header at the start of `head`; `file_bytes` is the length of the file, if known.
    ///
    /// Fails with [`crate::ErrorKind::Unsupported`] for newer versions, unknown compression and huge grains, with
    /// [`crate::ErrorKind::Limit`] for sizes out of bounds and [`crate::ErrorKind::Corrupt`] for the rest.
    pub(super) fn parse(head: &[u8], file_bytes: Option<u64>, limits: &Limits) -> Result<Self> {
        let fields = Fields::read(head).ok_or_else(|| corrupt("the VMDK header is cut short"))?;
        if !(1..=VERSION_MAX).contains(&fields.version) {
            let text = format!("VMDK version {} is not known (1 to {VERSION_MAX} are)", fields.version);
            return Err(unsupported(text));
        }
        if fields.flags & flag::NEWLINE_TEST != 0 && fields.newline_test != NEWLINE_TEST {
            let text = "the VMDK header's line breaks were changed: the file was transferred as text";
            return Err(corrupt(text));
        }
        let compressed = match fields.compression {
            compression::NONE => false,
            compression::DEFLATE => true,
            other => {
                return Err(unsupported(format!("VMDK compression {other} is not known (0 and 1 are)")));
            }
        };
        if !fields.grain_sectors.is_power_of_two() {
            return Err(corrupt(format!(
                "the VMDK grain size is {} sectors, no power of two",
                fields.grain_sectors
            )));
        }
        if fields.grain_sectors > GRAIN_SECTORS_MAX {
            return Err(unsupported(format!(
                "VMDK grains of {} sectors are larger than {GRAIN_SECTORS_MAX} sectors, which is the most that can \
                 be read; convert the image with qemu-img first",
                fields.grain_sectors
            )));
        }
        if fields.gtes_per_gt == 0 || fields.gtes_per_gt > GTES_PER_GT_MAX {
            return Err(corrupt(format!(
                "VMDK grain tables have {} entries, not 1 to {GTES_PER_GT_MAX}",
                fields.gtes_per_gt
            )));
        }
        let virtual_size = fields.capacity.saturating_mul(SECTOR_BYTES);
        if virtual_size > limits.virtual_size_max {
            return Err(limit(format!(
                "the virtual disk has {} sectors, more than the limit of {} bytes",
                fields.capacity, limits.virtual_size_max
            )));
        }
        if let Some(file_bytes) = file_bytes
            && fields.overhead > file_bytes.div_ceil(SECTOR_BYTES)
        {
            return Err(corrupt(format!(
                "the VMDK tables need {} sectors, the file has {file_bytes} bytes: it is cut short",
                fields.overhead
            )));
        }
        Ok(Self {
            virtual_size,
            grain_bytes: fields.grain_sectors * SECTOR_BYTES,
            gtes_per_gt: u64::from(fields.gtes_per_gt),
            descriptor: descriptor(&fields, file_bytes)?,
            gd_offset: match fields.gd_offset {
                GD_AT_END => None,
                sectors => Some(sectors.checked_mul(SECTOR_BYTES).ok_or_else(|| {
                    corrupt(format!("the VMDK grain directory offset of {sectors} sectors is absurd"))
                })?),
            },
            compressed,
            markers: fields.flags & flag::MARKERS != 0,
            zeroed_gte: fields.flags & flag::ZEROED_GTE != 0,
            unclean: fields.unclean,
        })
    }

    /// Parses the last [`FOOTER_BYTES`] of a file, whose copy of the header takes precedence over this one.
    pub(super) fn parse_footer(&self, tail: &[u8], file_bytes: u64, limits: &Limits) -> Result<Self> {
        let (sectors, _) = tail.as_chunks::<{ SECTOR_BYTES as usize }>();
        let [before, footer, after] = sectors else { return Err(corrupt("the VMDK footer is cut short")) };
        let (_, before_bytes, before_type) = marker::read(before);
        let (end, end_bytes, end_type) = marker::read(after);
        if (before_bytes, before_type) != (0, marker::FOOTER)
            || (end, end_bytes, end_type) != (0, 0, marker::END_OF_STREAM)
            || !footer.starts_with(&SPARSE_MAGIC)
        {
            return Err(corrupt(
                "the VMDK file does not end in a footer, as its header says: it is cut short",
            ));
        }
        let footer = Self::parse(footer, Some(file_bytes), limits)?;
        if footer.gd_offset.is_none() {
            return Err(corrupt("the VMDK footer does not tell where the grain directory is"));
        }
        if (footer.virtual_size, footer.grain_bytes, footer.gtes_per_gt)
            != (self.virtual_size, self.grain_bytes, self.gtes_per_gt)
        {
            return Err(corrupt("the VMDK footer and header describe different disks"));
        }
        Ok(Self { descriptor: self.descriptor, ..footer })
    }

    /// Bytes of the virtual disk under one grain table.
    pub(super) fn gt_reach(&self) -> u64 {
        self.grain_bytes * self.gtes_per_gt
    }

    /// Bytes of one grain table.
    pub(super) fn gt_bytes(&self) -> u64 {
        self.gtes_per_gt * 4
    }
}

/// Checks where the embedded descriptor is.
fn descriptor(fields: &Fields, file_bytes: Option<u64>) -> Result<Option<(u64, u64)>> {
    if fields.descriptor_offset == 0 || fields.descriptor_sectors == 0 {
        return Ok(None);
    }
    if fields.descriptor_sectors > DESCRIPTOR_BYTES_MAX / SECTOR_BYTES {
        return Err(limit(format!(
            "the VMDK descriptor of {} sectors is longer than {DESCRIPTOR_BYTES_MAX} bytes",
            fields.descriptor_sectors
        )));
    }
    let len = fields.descriptor_sectors * SECTOR_BYTES;
    let offset = fields.descriptor_offset.checked_mul(SECTOR_BYTES);
    let end = offset.and_then(|offset| offset.checked_add(len));
    match (offset, end) {
        (Some(offset), Some(end)) if file_bytes.is_none_or(|file_bytes| end <= file_bytes) => {
            Ok(Some((offset, len)))
        }
        _ => Err(corrupt(format!(
            "the VMDK descriptor at sector {} ends beyond the end of the file: it is cut short or damaged",
            fields.descriptor_offset
        ))),
    }
}

/// The header as it is stored (VMware, "Virtual Disk Format 5.0", section "Hosted Sparse Extents"); sizes and offsets
/// in sectors.
struct Fields {
    version: u32,
    flags: u32,
    capacity: u64,
    grain_sectors: u64,
    descriptor_offset: u64,
    descriptor_sectors: u64,
    gtes_per_gt: u32,
    gd_offset: u64,
    overhead: u64,
    unclean: bool,
    newline_test: [u8; 4],
    compression: u16,
}

impl Fields {
    fn read(head: &[u8]) -> Option<Self> {
        let head = head.first_chunk::<HEADER_BYTES>()?;
        let u32_at = |at: usize| Some(u32::from_le_bytes(*head.get(at..)?.first_chunk()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(*head.get(at..)?.first_chunk()?));
        Some(Self {
            version: u32_at(4)?,
            flags: u32_at(8)?,
            capacity: u64_at(12)?,
            grain_sectors: u64_at(20)?,
            descriptor_offset: u64_at(28)?,
            descriptor_sectors: u64_at(36)?,
            gtes_per_gt: u32_at(44)?,
            gd_offset: u64_at(56)?,
            overhead: u64_at(64)?,
            unclean: head[72] != 0,
            newline_test: *head.get(73..)?.first_chunk()?,
            compression: u16::from_le_bytes(*head.get(77..)?.first_chunk()?),
        })
    }
}
