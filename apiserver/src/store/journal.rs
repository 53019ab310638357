//! The journal: what was acknowledged since the last transaction that the database has synced.
//!
//! A sync of the database writes pages all over its file. A group of writes is appended to the journal instead, with one short sync,
//! and goes into the database without any; whenever the journal is full, one transaction of the database is synced, and the journal
//! begins anew. What a crash takes from the database is put back from the journal.
//!
//! Each beginning has a number, the epoch, which the database remembers: what is left of older ones is told apart by it, and nothing
//! has to be erased. The form is in `docs/formats/store.md`.

use std::io;
use std::sync::Arc;

use super::{Error, Event, Key, text::Text};

/// A group begins on a boundary of these, so that no block that is synced is ever written again before the journal begins anew.
const BLOCK_BYTES: u64 = 4096;
/// Bytes of a group before its writes.
const HEAD_BYTES: usize = 32;
/// Bytes that the checksum is not of: itself, and what is before it is.
const CHECKSUM: std::ops::Range<usize> = 12..16;

/// The file of a journal, of a fixed length.
pub trait JournalFile: Send {
    /// Length in bytes.
    ///
    /// # Errors
    /// Those of the file system.
    fn bytes(&self) -> io::Result<u64>;

    /// Reads all of the buffer.
    ///
    /// # Errors
    /// Those of the file system.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Writes all of the buffer.
    ///
    /// # Errors
    /// Those of the file system.
    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<()>;

    /// Returns when all that was written is on the disk.
    ///
    /// # Errors
    /// Those of the file system.
    fn sync(&self) -> io::Result<()>;
}

impl JournalFile for std::fs::File {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, offset)
    }

    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, buffer, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// Writes that were committed together.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// The revision of the first; the others have those that follow.
    pub first: u64,
    /// When, in seconds since 1970.
    pub time: u64,
    /// What they put; `None` deletes.
    pub writes: Vec<(Key, Option<Text>)>,
}

impl Group {
    /// The revision of the last write.
    pub fn last(&self) -> u64 {
        self.first.saturating_add(self.writes.len() as u64).saturating_sub(1)
    }
}

/// The journal of an open store.
pub(super) struct Journal {
    file: Box<dyn JournalFile>,
    /// Length of the file.
    length: u64,
    epoch: u64,
    /// Where the next group goes.
    at: u64,
}

impl Journal {
    /// The journal of the epoch that the database is in. It is read before it is written.
    pub fn new(file: Box<dyn JournalFile>, epoch: u64) -> Result<Self, Error> {
        let length = file.bytes().map_err(Error::io("cannot read the length of the journal"))?;
        Ok(Self { file, length, epoch, at: 0 })
    }

    /// The next group of the epoch; `None` behind the last.
    ///
    /// What is read is written again: a sync that failed may have left it in memory only, where it would be read now and not after
    /// the next crash. [`sync`](Self::sync) has to follow.
    pub fn read(&mut self) -> Result<Option<Group>, Error> {
        let room = self.length.saturating_sub(self.at);
        if room < HEAD_BYTES as u64 {
            return Ok(None);
        }
        let failed = || Error::io("cannot read the journal");
        let mut bytes = vec![0; HEAD_BYTES];
        self.file.read_at(self.at, &mut bytes).map_err(failed())?;
        let Some(length) = length_of(&bytes, self.epoch).filter(|length| *length as u64 <= room) else {
            return Ok(None);
        };
        bytes.resize(length, 0);
        self.file.read_at(self.at, &mut bytes).map_err(failed())?;
        if checksum(&bytes).to_le_bytes() != bytes[CHECKSUM] {
            return Ok(None);
        }
        // The checksum is right, so this is what was written.
        let group = decode(&bytes).ok_or_else(|| Error::Damaged(format!("the journal at {}", self.at)))?;
        self.put(&bytes)?;
        Ok(Some(group))
    }

    /// Returns when what was read is on the disk.
    pub fn sync(&self) -> Result<(), Error> {
        self.file.sync().map_err(Error::io("cannot sync the journal"))
    }

    /// Whether nothing was read or written in this epoch.
    pub fn is_empty(&self) -> bool {
        self.at == 0
    }

    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether a group of these bytes has room.
    pub fn fits(&self, group: &[u8]) -> bool {
        self.at.saturating_add(group.len() as u64) <= self.length
    }

    /// Appends a group, and returns when it is on the disk.
    pub fn append(&mut self, mut group: Vec<u8>) -> Result<(), Error> {
        group[..8].copy_from_slice(&self.epoch.to_le_bytes());
        let checksum = checksum(&group);
        group[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
        self.put(&group)?;
        self.sync()
    }

    /// Begins anew, in the epoch that the database has been synced with.
    pub fn begin(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.at = 0;
    }

    fn put(&mut self, group: &[u8]) -> Result<(), Error> {
        self.file.write_at(self.at, group).map_err(Error::io("cannot write the journal"))?;
        self.at = self.at.saturating_add(group.len() as u64).next_multiple_of(BLOCK_BYTES);
        Ok(())
    }
}

/// A group of these events, without epoch and checksum.
pub(super) fn encode<'a>(time: u64, events: impl Iterator<Item = &'a Arc<Event>>) -> Vec<u8> {
    let mut group = vec![0; HEAD_BYTES];
    let mut first = 0;
    for event in events {
        if first == 0 {
            first = event.revision;
        }
        let key = event.key.stored();
        group.extend_from_slice(&(key.len() as u16).to_le_bytes());
        group.extend_from_slice(key);
        let length = event.after.as_ref().map_or(0, Text::stored_bytes);
        group.extend_from_slice(&(length as u32).to_le_bytes());
        if let Some(text) = &event.after {
            text.store(&mut group);
        }
    }
    let length = group.len() as u32;
    group[8..12].copy_from_slice(&length.to_le_bytes());
    group[16..24].copy_from_slice(&first.to_le_bytes());
    group[24..32].copy_from_slice(&time.to_le_bytes());
    group
}

/// Length of the group of which this is the head, if it is one of the epoch.
fn length_of(head: &[u8], epoch: u64) -> Option<usize> {
    let (found, rest) = head.split_first_chunk()?;
    let (length, _) = rest.split_first_chunk()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    (u64::from_le_bytes(*found) == epoch && length >= HEAD_BYTES).then_some(length)
}

fn checksum(group: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&group[..CHECKSUM.start]), &group[CHECKSUM.end..])
}

fn decode(group: &[u8]) -> Option<Group> {
    let (first, rest) = group.get(CHECKSUM.end..)?.split_first_chunk()?;
    let (time, mut rest) = rest.split_first_chunk()?;
    let first = u64::from_le_bytes(*first);
    let mut writes = Vec::new();
    while !rest.is_empty() {
        let (length, behind) = rest.split_first_chunk()?;
        let (key, behind) = behind.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
        let (length, behind) = behind.split_first_chunk()?;
        let (text, behind) = behind.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
        let revision = first.checked_add(writes.len() as u64)?;
        let text = match text {
            [] => None,
            text => Some(Text::from_stored(revision, text, bytes::Bytes::copy_from_slice).ok()?),
        };
        writes.push((Key::from_stored(key)?, text));
        rest = behind;
    }
    Some(Group { first, time: u64::from_le_bytes(*time), writes })
}
