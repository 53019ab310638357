//! What is in the file: tables and their rows. The byte-level page is `docs/formats/store.md`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use redb::{Builder, Database, ReadableDatabase, ReadableTable, Table, TableDefinition, WriteTransaction};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::journal::{Group, JournalFile};
use super::{Error, Key, text::Text};

/// Version of the format of this file.
const FORMAT: u64 = 1;

/// Key of an object: the revision of its text.
pub(super) const OBJECTS: TableDefinition<'_, &[u8], u64> = TableDefinition::new("objects");
/// A revision: the text that it made, as long as an object or the history has it.
pub(super) const TEXTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("texts");
/// A revision: what it did to which object.
pub(super) const EVENTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("events");
/// Resource and namespace: how many objects there are.
pub(super) const COUNTS: TableDefinition<'_, &[u8], u64> = TableDefinition::new("counts");
/// The numbers of [`State`] by their names.
pub(super) const STATE: TableDefinition<'_, &str, u64> = TableDefinition::new("state");

/// Where the file is kept: what opens it, and tells the room beside it.
pub trait Medium: Send + Sync + 'static {
    /// Opens the database, or makes it.
    ///
    /// # Errors
    /// Those of the database.
    fn open(&self, builder: &Builder) -> Result<Database, redb::Error>;

    /// Opens the file of the journal, which gets this length if it is shorter, with room on the disk for all of it.
    ///
    /// # Errors
    /// Those of the file system.
    fn open_journal(&self, bytes: u64) -> std::io::Result<Box<dyn JournalFile>>;

    /// Bytes that can still be written.
    ///
    /// # Errors
    /// Those of the file system.
    fn room_bytes(&self) -> std::io::Result<u64>;

    /// Length of the file in bytes.
    ///
    /// # Errors
    /// Those of the file system.
    fn file_bytes(&self) -> std::io::Result<u64>;
}

/// Files in a folder.
pub(super) struct InFolder(pub PathBuf);

impl InFolder {
    fn objects(&self) -> PathBuf {
        self.0.join("objects.redb")
    }
}

fn open_file(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

impl Medium for InFolder {
    fn open(&self, builder: &Builder) -> Result<Database, redb::Error> {
        let file = open_file(&self.objects())?;
        Ok(builder.create_with_backend(redb::backends::FileBackend::new(file)?)?)
    }

    fn open_journal(&self, bytes: u64) -> std::io::Result<Box<dyn JournalFile>> {
        let file = open_file(&self.0.join("journal"))?;
        if file.metadata()?.len() < bytes {
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
                Ok(()) => {}
                // A file system that cannot promise room: then a write may find none.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(bytes)?,
                Err(error) => return Err(error.into()),
            }
            // Its length, too, so that later syncs are of the content alone.
            file.sync_all()?;
        }
        Ok(Box::new(file))
    }

    fn room_bytes(&self) -> std::io::Result<u64> {
        let volume = rustix::fs::statvfs(&self.0)?;
        Ok(volume.f_bavail.saturating_mul(volume.f_frsize))
    }

    fn file_bytes(&self) -> std::io::Result<u64> {
        Ok(std::fs::metadata(self.objects())?.len())
    }
}

/// The numbers that every transaction keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The newest revision; 0 before the first write.
    pub revision: u64,
    /// The newest revision whose event is not in the history any more.
    pub trimmed: u64,
    /// Bytes of the history: its events, and the texts that only it has.
    pub history_bytes: u64,
    /// Bytes of the objects: their keys and texts.
    pub object_bytes: u64,
    /// The epoch of the journal: which beginning of it follows what is synced.
    pub epoch: u64,
}

impl State {
    pub(super) fn load(table: &impl ReadableTable<&'static str, u64>) -> Result<Self, Error> {
        let row =
            |name: &str| -> Result<u64, Error> { Ok(table.get(name)?.map_or(0, |value| value.value())) };
        Ok(Self {
            revision: row("revision")?,
            trimmed: row("trimmed")?,
            history_bytes: row("history-bytes")?,
            object_bytes: row("object-bytes")?,
            epoch: row("epoch")?,
        })
    }

    fn save(&self, table: &mut Table<'_, &'static str, u64>) -> Result<(), Error> {
        table.insert("revision", self.revision)?;
        table.insert("trimmed", self.trimmed)?;
        table.insert("history-bytes", self.history_bytes)?;
        table.insert("object-bytes", self.object_bytes)?;
        table.insert("epoch", self.epoch)?;
        Ok(())
    }
}

/// Makes the tables if there are none, and refuses those of another format.
pub(super) fn prepare(db: &Database) -> Result<State, Error> {
    match db.begin_read()?.open_table(STATE) {
        Ok(table) => {
            let found = table.get("format")?.map_or(0, |value| value.value());
            if found != FORMAT {
                return Err(Error::Format { found, known: FORMAT });
            }
            return State::load(&table);
        }
        Err(redb::TableError::TableDoesNotExist(_)) => {}
        Err(error) => return Err(error.into()),
    }
    let mut txn = db.begin_write()?;
    txn.set_quick_repair(true);
    let first = State { epoch: 1, ..State::default() };
    {
        txn.open_table(OBJECTS)?;
        txn.open_table(TEXTS)?;
        txn.open_table(EVENTS)?;
        txn.open_table(COUNTS)?;
        let mut state = txn.open_table(STATE)?;
        state.insert("format", FORMAT)?;
        first.save(&mut state)?;
    }
    txn.commit()?;
    Ok(first)
}

/// A row of [`EVENTS`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// Revision of the text before; 0 if there was no object.
    pub before: u64,
    /// Stored bytes of the text before.
    pub before_bytes: u32,
    /// Whether there is an object after it.
    pub exists: bool,
    /// When, in seconds since 1970.
    pub time: u64,
    pub key: Key,
}

/// Bytes of a record before the key.
const RECORD_HEAD: usize = 21;

impl Record {
    pub fn stored(&self) -> Vec<u8> {
        let mut stored = Vec::with_capacity(RECORD_HEAD + self.key.stored().len());
        stored.extend_from_slice(&self.before.to_le_bytes());
        stored.extend_from_slice(&self.time.to_le_bytes());
        stored.extend_from_slice(&self.before_bytes.to_le_bytes());
        stored.push(u8::from(self.exists));
        stored.extend_from_slice(self.key.stored());
        stored
    }

    pub fn from_stored(revision: u64, stored: &[u8]) -> Result<Self, Error> {
        let parse = || {
            let (before, rest) = stored.split_first_chunk()?;
            let (time, rest) = rest.split_first_chunk()?;
            let (before_bytes, rest) = rest.split_first_chunk()?;
            let (exists, key) = rest.split_first()?;
            Some(Self {
                before: u64::from_le_bytes(*before),
                before_bytes: u32::from_le_bytes(*before_bytes),
                exists: *exists == 1,
                time: u64::from_le_bytes(*time),
                key: Key::from_stored(key)?,
            })
        };
        parse().ok_or_else(|| Error::Damaged(format!("the event of revision {revision}")))
    }

    /// What the history has for it.
    pub fn bytes(&self) -> u64 {
        (RECORD_HEAD + self.key.stored().len()) as u64 + u64::from(self.before_bytes)
    }
}

/// The tables in a transaction that writes.
pub(super) struct Tables<'a> {
    objects: Table<'a, &'static [u8], u64>,
    texts: Table<'a, u64, &'static [u8]>,
    events: Table<'a, u64, &'static [u8]>,
    counts: Table<'a, &'static [u8], u64>,
    state_rows: Table<'a, &'static str, u64>,
    pub state: State,
}

impl<'a> Tables<'a> {
    pub fn open(txn: &'a WriteTransaction) -> Result<Self, Error> {
        let state_rows = txn.open_table(STATE)?;
        Ok(Self {
            objects: txn.open_table(OBJECTS)?,
            texts: txn.open_table(TEXTS)?,
            events: txn.open_table(EVENTS)?,
            counts: txn.open_table(COUNTS)?,
            state: State::load(&state_rows)?,
            state_rows,
        })
    }

    /// The revision that an object is at.
    pub fn current(&self, key: &Key) -> Result<Option<u64>, Error> {
        Ok(self.objects.get(key.stored())?.map(|revision| revision.value()))
    }

    /// Puts a text in the place of what is there, or takes it away, and remembers that in the history.
    ///
    /// `text` is made for the revision that it gets; the revision, the text before and the text after are returned.
    pub fn put(
        &mut self,
        key: &Key,
        time: u64,
        text: Option<impl FnOnce(u64) -> Text>,
    ) -> Result<(u64, Option<Text>, Option<Text>), Error> {
        let revision =
            self.state.revision.checked_add(1).ok_or_else(|| Error::Damaged("revisions end".into()))?;
        let before = match self.current(key)? {
            Some(at) => Some(self.text(at)?),
            None => None,
        };
        let after = text.map(|text| text(revision));
        let key_bytes = key.stored().len() as u64;
        if let Some(text) = &before {
            let bytes = text.stored_bytes() + key_bytes;
            self.state.object_bytes = self.state.object_bytes.saturating_sub(bytes);
        }
        match &after {
            Some(text) => {
                self.texts.insert(revision, text.stored().as_slice())?;
                self.objects.insert(key.stored(), revision)?;
                self.state.object_bytes =
                    self.state.object_bytes.saturating_add(text.stored_bytes() + key_bytes);
            }
            None => {
                self.objects.remove(key.stored())?;
            }
        }
        self.count(key, i64::from(after.is_some()) - i64::from(before.is_some()))?;
        let record = Record {
            before: before.as_ref().map_or(0, Text::revision),
            before_bytes: before
                .as_ref()
                .map_or(0, |text| u32::try_from(text.stored_bytes()).unwrap_or(u32::MAX)),
            exists: after.is_some(),
            time,
            key: key.clone(),
        };
        self.events.insert(revision, record.stored().as_slice())?;
        self.state.history_bytes = self.state.history_bytes.saturating_add(record.bytes());
        self.state.revision = revision;
        Ok((revision, before, after))
    }

    /// Puts what a group of the journal has, which follows what is here.
    pub fn put_group(&mut self, group: Group) -> Result<(), Error> {
        if Some(group.first) != self.state.revision.checked_add(1) {
            let (first, newest) = (group.first, self.state.revision);
            return Err(Error::Damaged(format!(
                "the journal goes on at {first}, and the objects end at {newest}"
            )));
        }
        for (key, text) in group.writes {
            self.put(&key, group.time, text.map(|text| |_| text))?;
        }
        Ok(())
    }

    /// The oldest event of the history.
    pub fn oldest(&self) -> Result<Option<Record>, Error> {
        let revision = self.state.trimmed.saturating_add(1);
        let stored = self.events.get(revision)?;
        stored.map(|stored| Record::from_stored(revision, stored.value())).transpose()
    }

    /// Forgets the oldest event, and the text before it.
    pub fn forget(&mut self, oldest: &Record) -> Result<(), Error> {
        let revision = self.state.trimmed.saturating_add(1);
        self.events.remove(revision)?;
        if oldest.before != 0 {
            self.texts.remove(oldest.before)?;
        }
        self.state.history_bytes = self.state.history_bytes.saturating_sub(oldest.bytes());
        self.state.trimmed = revision;
        Ok(())
    }

    /// Ends the transaction's work: what is left is to commit it.
    pub fn finish(mut self) -> Result<State, Error> {
        self.state.save(&mut self.state_rows)?;
        Ok(self.state)
    }

    fn text(&self, revision: u64) -> Result<Text, Error> {
        let stored = self.texts.get(revision)?;
        let stored = stored.ok_or_else(|| Error::Damaged(format!("no text of revision {revision}")))?;
        Text::from_stored(revision, stored.value(), bytes::Bytes::copy_from_slice)
    }

    fn count(&mut self, key: &Key, more: i64) -> Result<(), Error> {
        if more == 0 {
            return Ok(());
        }
        let count =
            self.counts.get(key.counted())?.map_or(0, |count| count.value()).saturating_add_signed(more);
        match count {
            0 => self.counts.remove(key.counted())?,
            count => self.counts.insert(key.counted(), count)?,
        };
        Ok(())
    }
}
