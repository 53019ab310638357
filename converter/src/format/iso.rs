//! Recognising optical disc images. They are raw disks; only their name differs.

use std::sync::Arc;

use super::{Tail, raw};
use crate::Result;
use crate::io::{Disk, ReadAt};
use crate::limits::Limits;

/// Logical sector of an optical disc, bytes.
const SECTOR_BYTES: usize = 2048;

/// The first 16 sectors belong to whoever boots the disc (a hybrid image keeps its MBR there).
const FIRST_DESCRIPTOR: usize = 16;

/// Volume descriptors looked at; real discs have fewer than ten.
const DESCRIPTORS_MAX: usize = 32;

pub(super) struct Driver;

impl super::Driver for Driver {
    fn recognises(&self, head: &[u8], _tail: Option<Tail<'_>>) -> bool {
        recognises(head)
    }

    fn virtual_size(&self, head: &[u8], file_bytes: Option<u64>, limits: &Limits) -> Result<Option<u64>> {
        raw::Driver.virtual_size(head, file_bytes, limits)
    }

    fn open(
        &self,
        source: Arc<dyn ReadAt>,
        head: &[u8],
        member: Option<&str>,
        limits: &Limits,
    ) -> Result<Box<dyn Disk>> {
        raw::Driver.open(source, head, member, limits)
    }
}

/// Whether `head` begins an ISO 9660 volume (ECMA-119, section 8) or a UDF one (ECMA-167 part 2, section 9).
///
/// Each volume structure descriptor carries five letters after its type byte: `CD001` for ISO 9660; `BEA01`,
/// `NSR02` or `NSR03`, `TEA01` for UDF. A bridge disc has both.
fn recognises(head: &[u8]) -> bool {
    for index in 0..DESCRIPTORS_MAX {
        let at = (FIRST_DESCRIPTOR + index) * SECTOR_BYTES;
        match head.get(at + 1..at + 6) {
            Some(b"CD001") if index == 0 => return true,
            Some(b"NSR02" | b"NSR03") => return true,
            Some(b"CD001" | b"BEA01" | b"BOOT2" | b"CDW02") => {}
            _ => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disc(ids: &[&[u8; 5]]) -> Vec<u8> {
        let mut head = vec![0; 128 * 1024];
        for (i, id) in ids.iter().enumerate() {
            let at = (FIRST_DESCRIPTOR + i) * SECTOR_BYTES;
            head[at + 1..at + 6].copy_from_slice(&id[..]);
        }
        head
    }

    #[test]
    fn iso_9660_udf_and_bridge_discs_are_recognised() {
        assert!(recognises(&disc(&[b"CD001", b"CD001"])));
        assert!(recognises(&disc(&[b"BEA01", b"NSR03", b"TEA01"])));
        assert!(recognises(&disc(&[b"CD001", b"BEA01", b"NSR02", b"TEA01"])));
        assert!(!recognises(&disc(&[])));
        assert!(!recognises(&disc(&[b"BEA01", b"TEA01"])));
        assert!(!recognises(&[0; 32769]));
    }
}
