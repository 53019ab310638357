//! The footer: 512 bytes, big-endian.

use crate::format::SECTOR_BYTES;
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

pub(super) const FOOTER_BYTES: usize = 512;

/// What a footer begins with.
pub(super) const COOKIE: &[u8] = b"conectix";

/// The offset of something that is not there.
pub(super) const NOWHERE: u64 = u64::MAX;

/// Sectors of the largest disk: 2040 GiB.
const SECTORS_MAX: u64 = 0xff00_0000;

/// The only version of the format, 1.0, and the part of it that tells whether a file can be read.
const VERSION: u32 = 0x0001_0000;
const VERSION_MAJOR: u32 = 0xffff_0000;

/// The bit of the features that is always set.
const FEATURES_RESERVED: u32 = 2;

/// Offsets of the fields.
mod at {
    pub const FEATURES: usize = 8;
    pub const VERSION: usize = 12;
    pub const DATA_OFFSET: usize = 16;
    pub const CREATOR: usize = 28;
    pub const CREATOR_VERSION: usize = 32;
    pub const CREATOR_SYSTEM: usize = 36;
    pub const ORIGINAL_SIZE: usize = 40;
    pub const CURRENT_SIZE: usize = 48;
    pub const CYLINDERS: usize = 56;
    pub const HEADS: usize = 58;
    pub const SECTORS: usize = 59;
    pub const DISK_TYPE: usize = 60;
    pub const CHECKSUM: usize = 64;
    pub const UUID: usize = 68;
}

/// Creator applications whose disks are as large as the footer's current size says: Hyper-V, disk2vhd, XenServer,
/// XenConverter, Azure, and QEMU when it was told to. The disks of all others end with their last whole cylinder.
const EXACT_CREATORS: [[u8; 4]; 6] = [*b"win ", *b"d2v ", *b"tap\0", *b"CTXS", *b"wa\0\0", *b"qem2"];

/// How the disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Fixed,
    Dynamic,
    Differencing,
    Other(u32),
}

/// Cylinders, heads and sectors per track, as old systems address a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub cylinders: u16,
    pub heads: u8,
    pub sectors: u8,
}

impl Geometry {
    /// The largest one; disks that have it may be larger.
    pub(super) const MAX: Self = Self { cylinders: 65535, heads: 16, sectors: 255 };

    /// The geometry of a disk of so many sectors, rounded down to whole cylinders (the specification's appendix
    /// "CHS Calculation").
    pub(super) fn of(sectors: u64) -> Self {
        let total = sectors.min(Self::MAX.sectors());
        let (per_track, heads) = if total >= 65535 * 16 * 63 {
            (255, 16)
        } else {
            let heads = (total / 17).div_ceil(1024).max(4);
            if heads <= 16 && total / 17 < heads * 1024 {
                (17, heads)
            } else if total / 31 < 16 * 1024 {
                (31, 16)
            } else {
                (63, 16)
            }
        };
        // Each fits: the total is bounded so that there are at most 65535 cylinders.
        Self {
            cylinders: (total / per_track / heads).min(65535) as u16,
            heads: heads as u8,
            sectors: per_track as u8,
        }
    }

    /// The geometry of the smallest disk of whole cylinders that has so many sectors or more.
    pub(super) fn of_at_least(sectors: u64) -> Self {
        let mut asked = sectors;
        loop {
            let found = Self::of(asked);
            if found.sectors() >= sectors || found == Self::MAX {
                return found;
            }
            asked += 1;
        }
    }

    pub(super) fn sectors(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors)
    }
}

/// A footer whose checksum is right.
#[derive(Clone, Debug)]
pub(super) struct Footer {
    pub kind: Kind,
    /// Where the dynamic header is.
    pub data_offset: u64,
    current_size: u64,
    creator: [u8; 4],
    geometry: Geometry,
}

impl Footer {
    /// Reads the footer that `bytes` begin with; `None` if there is none, or it is damaged.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (bytes, _) = bytes.split_first_chunk::<FOOTER_BYTES>()?;
        let word = |at| word(bytes, at);
        if !bytes.starts_with(COOKIE)
            || word(at::VERSION) & VERSION_MAJOR != VERSION
            || word(at::CHECKSUM) != checksum(bytes, at::CHECKSUM)
        {
            return None;
        }
        let kind = match word(at::DISK_TYPE) {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => Kind::Differencing,
            other => Kind::Other(other),
        };
        let cylinders = (word(at::CYLINDERS) >> 16) as u16;
        Some(Self {
            kind,
            data_offset: long(bytes, at::DATA_OFFSET),
            current_size: long(bytes, at::CURRENT_SIZE),
            creator: word(at::CREATOR).to_be_bytes(),
            geometry: Geometry { cylinders, heads: bytes[at::HEADS], sectors: bytes[at::SECTORS] },
        })
    }

    /// Whether this is the end of a file of `file_bytes` that is a fixed disk.
    pub(super) fn is_of_fixed(&self, file_bytes: u64) -> bool {
        self.kind == Kind::Fixed && self.current_size.checked_add(FOOTER_BYTES as u64) == Some(file_bytes)
    }

    /// Fails unless the disk is fixed or dynamic.
    pub(super) fn refuse_others(&self) -> Result<()> {
        match self.kind {
            Kind::Fixed | Kind::Dynamic => Ok(()),
            Kind::Differencing => Err(Error::new(
                ErrorKind::ForeignFile,
                "the VHD image is a differencing disk that needs its parent, which is refused; merge it with \
                 Merge-VHD first",
            )),
            Kind::Other(kind) => Err(Error::new(
                ErrorKind::Unsupported,
                format!("the VHD image has the unknown disk type {kind}"),
            )),
        }
    }

    /// Bytes a guest sees, by the rules of qemu.
    pub(super) fn virtual_size(&self, limits: &Limits) -> Result<u64> {
        let by_geometry = self.geometry.sectors();
        let exact = EXACT_CREATORS.contains(&self.creator) || self.geometry == Geometry::MAX;
        let sectors = if exact { self.current_size / SECTOR_BYTES } else { by_geometry };
        let bytes = sectors * SECTOR_BYTES;
        if sectors > SECTORS_MAX || bytes > limits.virtual_size_max {
            let max = limits.virtual_size_max.min(SECTORS_MAX * SECTOR_BYTES);
            let text = format!("a VHD disk of {bytes} bytes is larger than the limit of {max}");
            return Err(Error::new(ErrorKind::Limit, text));
        }
        Ok(bytes)
    }

    /// Bytes before the footer of a fixed disk.
    pub(super) fn current_size(&self) -> u64 {
        self.current_size
    }
}

/// The footer of a new file.
pub(super) struct NewFooter {
    pub kind: Kind,
    pub virtual_size: u64,
    /// Whether the size is that of the geometry, as Virtual PC wants it.
    pub by_geometry: bool,
    pub data_offset: u64,
    pub uuid: [u8; 16],
}

impl NewFooter {
    /// The sizes that a disk of so many bytes can have; fails with [`ErrorKind::Limit`] if it is too large.
    pub(super) fn size(virtual_size: u64, by_geometry: bool) -> Result<u64> {
        let sectors = virtual_size.div_ceil(SECTOR_BYTES);
        if sectors > SECTORS_MAX {
            let text = format!(
                "a VHD file holds disks of up to {} bytes, not of {virtual_size}; choose vhdx or qcow2",
                SECTORS_MAX * SECTOR_BYTES
            );
            return Err(Error::new(ErrorKind::Limit, text));
        }
        let rounded = Geometry::of_at_least(sectors).sectors();
        // Beyond the largest geometry the size counts again.
        let sectors = if by_geometry { rounded.max(sectors) } else { sectors };
        Ok(sectors * SECTOR_BYTES)
    }

    pub(super) fn encode(&self) -> [u8; FOOTER_BYTES] {
        let geometry = Geometry::of(self.virtual_size / SECTOR_BYTES);
        let kind = match self.kind {
            Kind::Fixed => 2,
            Kind::Dynamic => 3,
            Kind::Differencing => 4,
            Kind::Other(kind) => kind,
        };
        let mut footer = [0; FOOTER_BYTES];
        footer[..COOKIE.len()].copy_from_slice(COOKIE);
        let (creator, version) =
            if self.by_geometry { (*b"qemu", 0x0005_0003) } else { (*b"win ", 0x000a_0000) };
        let words = [
            (at::FEATURES, FEATURES_RESERVED),
            (at::VERSION, VERSION),
            (at::CREATOR, u32::from_be_bytes(creator)),
            (at::CREATOR_VERSION, version),
            (at::CREATOR_SYSTEM, u32::from_be_bytes(*b"Wi2k")),
            (at::DISK_TYPE, kind),
        ];
        for (at, word) in words {
            footer[at..at + 4].copy_from_slice(&word.to_be_bytes());
        }
        for (at, long) in [
            (at::DATA_OFFSET, self.data_offset),
            (at::ORIGINAL_SIZE, self.virtual_size),
            (at::CURRENT_SIZE, self.virtual_size),
        ] {
            footer[at..at + 8].copy_from_slice(&long.to_be_bytes());
        }
        footer[at::CYLINDERS..at::HEADS].copy_from_slice(&geometry.cylinders.to_be_bytes());
        footer[at::HEADS] = geometry.heads;
        footer[at::SECTORS] = geometry.sectors;
        footer[at::UUID..at::UUID + 16].copy_from_slice(&self.uuid);
        let sum = checksum(&footer, at::CHECKSUM);
        footer[at::CHECKSUM..at::CHECKSUM + 4].copy_from_slice(&sum.to_be_bytes());
        footer
    }
}

/// The complement of the sum of all bytes but the four at `field`, where it is stored.
pub(super) fn checksum(bytes: &[u8], field: usize) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().fold(0u32, |sum, &byte| sum.wrapping_add(byte.into()));
    !sum(bytes).wrapping_sub(sum(&bytes[field..field + 4]))
}

/// The number of four bytes at `at`, a constant inside `bytes`.
pub(super) fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(word)
}

/// The number of eight bytes at `at`, a constant inside `bytes`.
pub(super) fn long<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from(word(bytes, at)) << 32 | u64::from(word(bytes, at + 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometries_are_those_of_the_specification() {
        for (sectors, cylinders, heads, per_track) in [
            (0, 0, 4, 17),
            (68, 1, 4, 17),
            (10_240, 150, 4, 17),
            (100_000, 980, 6, 17),
            (1 << 18, 963, 16, 17),
            (400_000, 806, 16, 31),
            (1 << 21, 2080, 16, 63),
            (65535 * 16 * 63 - 1, 65534, 16, 63),
            (65535 * 16 * 63, 16191, 16, 255),
            (u64::MAX, 65535, 16, 255),
        ] {
            let found = Geometry::of(sectors);
            assert_eq!(found, Geometry { cylinders, heads, sectors: per_track }, "{sectors}");
        }
    }

    #[test]
    fn a_rounded_geometry_is_never_smaller_than_the_disk() {
        for sectors in (0..200_000).step_by(997).chain([65535 * 16 * 63 - 1, 65535 * 16 * 63 + 1]) {
            let found = Geometry::of_at_least(sectors).sectors();
            assert!(found >= sectors && found < sectors + 16 * 255 * 17, "{sectors} {found}");
        }
        assert_eq!(Geometry::of_at_least(u64::MAX), Geometry::MAX);
    }
}
