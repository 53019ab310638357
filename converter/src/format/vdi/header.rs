//! The header: 512 bytes, little-endian.

use crate::format::blocks::Layout;
use crate::format::{Format, SECTOR_BYTES};
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

/// Bytes of the file before the block map.
pub(super) const HEADER_BYTES: usize = 512;

/// Bytes in a block of every image that is known; those of other sizes are accepted between these bounds.
pub(super) const BLOCK_BYTES: u64 = 1 << 20;
const BLOCK_BYTES_MIN: u64 = 4 << 10;
const BLOCK_BYTES_MAX: u64 = 64 << 20;

/// What stands at [`at::SIGNATURE`].
const SIGNATURE: u32 = 0xbeda_107f;

/// Version 1.1.
const VERSION: u32 = 0x0001_0001;

/// Map entry of a block that was discarded: it reads as zeros.
const DISCARDED: u32 = 0xffff_fffe;

/// Values of the image type.
mod image_type {
    pub const DYNAMIC: u32 = 1;
    pub const STATIC: u32 = 2;
    pub const UNDO: u32 = 3;
    pub const DIFFERENCING: u32 = 4;
}

/// Offsets of the fields.
mod at {
    pub const SIGNATURE: usize = 0x40;
    pub const VERSION: usize = 0x44;
    pub const HEADER_SIZE: usize = 0x48;
    pub const IMAGE_TYPE: usize = 0x4c;
    pub const MAP_OFFSET: usize = 0x154;
    pub const DATA_OFFSET: usize = 0x158;
    pub const SECTOR_SIZE: usize = 0x168;
    pub const DISK_SIZE: usize = 0x170;
    pub const BLOCK_SIZE: usize = 0x178;
    pub const BLOCK_EXTRA: usize = 0x17c;
    pub const BLOCKS: usize = 0x180;
    pub const BLOCKS_ALLOCATED: usize = 0x184;
    pub const IMAGE_UUID: usize = 0x188;
    pub const SNAPSHOT_UUID: usize = 0x198;
    pub const LINK_UUID: usize = 0x1a8;
    pub const PARENT_UUID: usize = 0x1b8;
}

/// Whether a file that begins with `head` is a VDI of any version.
pub(super) fn recognises(head: &[u8]) -> bool {
    head.get(at::SIGNATURE..).is_some_and(|rest| rest.starts_with(&SIGNATURE.to_le_bytes()))
}

/// A header that was read and found good.
#[derive(Clone, Debug)]
pub(super) struct Header {
    is_static: bool,
    /// Bytes a guest sees.
    pub virtual_size: u64,
    map_offset: u64,
    data_offset: u64,
    block_bytes: u64,
}

impl Header {
    /// Reads the header in the first bytes of a file.
    pub(super) fn parse(head: &[u8], limits: &Limits) -> Result<Self> {
        let corrupt =
            |why: String| Error::new(ErrorKind::Corrupt, format!("the VDI header is damaged: {why}"));
        let unsupported = |what: String| {
            let text = format!("the VDI image has {what}; convert it with VBoxManage or qemu-img first");
            Error::new(ErrorKind::Unsupported, text)
        };
        let foreign = |what: &str| {
            let text = format!(
                "the VDI image is {what} that needs its parent, which is refused; merge it with VBoxManage clonemedium"
            );
            Error::new(ErrorKind::ForeignFile, text)
        };
        let Some((bytes, _)) = head.split_first_chunk::<HEADER_BYTES>() else {
            return Err(corrupt(format!("it is cut short after {} bytes", head.len())));
        };
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(word)
        };
        let version = word(at::VERSION);
        if version != VERSION {
            return Err(unsupported(format!("version {}.{}, and not 1.1", version >> 16, version & 0xffff)));
        }
        let is_static = match word(at::IMAGE_TYPE) {
            image_type::DYNAMIC => false,
            image_type::STATIC => true,
            image_type::UNDO => return Err(foreign("an undo image")),
            image_type::DIFFERENCING => return Err(foreign("a differencing image")),
            other => return Err(unsupported(format!("the unknown image type {other}"))),
        };
        for uuid in [at::LINK_UUID, at::PARENT_UUID] {
            if bytes[uuid..uuid + 16] != [0; 16] {
                return Err(foreign("one with the UUID of another image,"));
            }
        }
        let sector_size = word(at::SECTOR_SIZE);
        if u64::from(sector_size) != SECTOR_BYTES {
            return Err(unsupported(format!("sectors of {sector_size} bytes")));
        }
        if word(at::BLOCK_EXTRA) != 0 {
            return Err(unsupported(format!("{} extra bytes in each block", word(at::BLOCK_EXTRA))));
        }
        let block_bytes = u64::from(word(at::BLOCK_SIZE));
        if !block_bytes.is_power_of_two() || !(BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block_bytes) {
            let known = format!("powers of two from {BLOCK_BYTES_MIN} to {BLOCK_BYTES_MAX}");
            return Err(unsupported(format!("blocks of {block_bytes} bytes, which are not {known}")));
        }
        let (map_offset, data_offset) = (u64::from(word(at::MAP_OFFSET)), u64::from(word(at::DATA_OFFSET)));
        for (what, offset) in [("block map", map_offset), ("first block", data_offset)] {
            if !offset.is_multiple_of(SECTOR_BYTES) || offset < HEADER_BYTES as u64 {
                let why = format!("the {what} at {offset:#x} is in the header, or not at a sector boundary");
                return Err(corrupt(why));
            }
        }
        let disk_size = u64::from(word(at::DISK_SIZE + 4)) << 32 | u64::from(word(at::DISK_SIZE));
        // VBoxManage convertfromraw makes disks that end within a sector.
        let virtual_size =
            disk_size.checked_next_multiple_of(SECTOR_BYTES).filter(|&size| size <= limits.virtual_size_max);
        let Some(virtual_size) = virtual_size else {
            return Err(Error::new(
                ErrorKind::Limit,
                format!(
                    "a VDI disk of {disk_size} bytes is larger than the limit of {}",
                    limits.virtual_size_max
                ),
            ));
        };
        let mapped = u64::from(word(at::BLOCKS)) * block_bytes;
        if virtual_size > mapped {
            let why = format!("the disk has {virtual_size} bytes, but the block map only finds {mapped}");
            return Err(corrupt(why));
        }
        Ok(Self { is_static, virtual_size, map_offset, data_offset, block_bytes })
    }

    pub(super) fn layout(&self) -> Layout {
        Layout {
            format: Format::Vdi,
            virtual_size: self.virtual_size,
            block_bytes: self.block_bytes,
            table_offset: self.map_offset,
            decode: u32::from_le_bytes,
            base: self.data_offset,
            unit: self.block_bytes,
            lead: 0,
            zero: Some(DISCARDED),
            preallocated: self.is_static,
        }
    }
}

/// What the header of a new image says.
pub(super) struct NewHeader {
    pub is_static: bool,
    pub virtual_size: u64,
    pub data_offset: u32,
    pub blocks: u32,
    pub blocks_allocated: u32,
    /// Names this image and its state, so that VirtualBox can tell it from others.
    pub uuids: [[u8; 16]; 2],
}

impl NewHeader {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        const TEXT: &[u8] = b"<<< Oracle VM VirtualBox Disk Image >>>\n";
        /// From its own field up to and with the geometry that VirtualBox 4 added behind the UUIDs.
        const HEADER_SIZE: u32 = 400;
        let image_type = if self.is_static { image_type::STATIC } else { image_type::DYNAMIC };
        let mut header = [0; HEADER_BYTES];
        header[..TEXT.len()].copy_from_slice(TEXT);
        let words = [
            (at::SIGNATURE, SIGNATURE),
            (at::VERSION, VERSION),
            (at::HEADER_SIZE, HEADER_SIZE),
            (at::IMAGE_TYPE, image_type),
            (at::MAP_OFFSET, HEADER_BYTES as u32),
            (at::DATA_OFFSET, self.data_offset),
            (at::SECTOR_SIZE, SECTOR_BYTES as u32),
            (at::DISK_SIZE, self.virtual_size as u32),
            (at::DISK_SIZE + 4, (self.virtual_size >> 32) as u32),
            (at::BLOCK_SIZE, BLOCK_BYTES as u32),
            (at::BLOCKS, self.blocks),
            (at::BLOCKS_ALLOCATED, self.blocks_allocated),
        ];
        for (at, word) in words {
            header[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        for (at, uuid) in [at::IMAGE_UUID, at::SNAPSHOT_UUID].into_iter().zip(self.uuids) {
            header[at..at + 16].copy_from_slice(&uuid);
        }
        header
    }
}
