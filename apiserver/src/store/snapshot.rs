//! Reading: the objects as they are at one revision, or were at an older one.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use redb::{ReadOnlyTable, ReadTransaction};

use super::tables::{COUNTS, EVENTS, OBJECTS, Record, STATE, State, TEXTS};
use super::{Error, Event, Key, Range, text::Text};

/// Bytes of texts after which a page of a list ends, whatever its limit.
pub const PAGE_BYTES_MAX: usize = 32 << 20;

/// Texts of a list share buffers of this length.
const BUFFER_BYTES: usize = 256 << 10;

/// Events that are looked at before those that were found are handed out.
const REPLAY_EVENTS_MAX: usize = 1024;
/// Bytes of texts after which events are handed out.
const REPLAY_BYTES_MAX: usize = 1 << 20;

/// Where a list begins. The default is at the first object, at the newest revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Behind which key; `None` for the first.
    pub after: Option<Key>,
    /// At which revision; `None` for the newest.
    pub revision: Option<u64>,
    /// How many objects there are from here on, if the page before has counted them.
    pub left: Option<u64>,
}

/// A page of a list.
#[derive(Clone, Debug)]
pub struct List {
    /// The JSON texts, in the order of their keys.
    pub texts: Vec<Bytes>,
    /// The revision that all of them are as of.
    pub revision: u64,
    /// Where the next page begins; `None` at the end. Its `left` is how many objects remain.
    pub next: Option<Place>,
}

/// What is read at one moment: everything that it gives is as of one revision, whatever is written meanwhile.
///
/// Reads do not wait for writes, nor writes for reads. The pages of the file that writes replace are kept while a snapshot lives, so
/// that the file grows: hold it for a request, not longer.
///
/// Its functions read from memory or from the page cache of the system: some microseconds for [`get`](Self::get), and some for each
/// object of a list. A list of many pages, or on a slow disk, belongs into `spawn_blocking`.
pub struct Snapshot {
    txn: ReadTransaction,
    state: State,
}

impl Snapshot {
    pub(super) fn new(txn: ReadTransaction) -> Result<Self, Error> {
        let state = State::load(&txn.open_table(STATE)?)?;
        Ok(Self { txn, state })
    }

    /// The newest revision in it.
    pub fn revision(&self) -> u64 {
        self.state.revision
    }

    /// The object of this key, if there is one.
    ///
    /// # Errors
    /// [`Error::Storage`] if the file cannot be read.
    pub fn get(&self, key: &Key) -> Result<Option<Text>, Error> {
        let Some(revision) = self.txn.open_table(OBJECTS)?.get(key.stored())? else { return Ok(None) };
        text(&self.txn.open_table(TEXTS)?, revision.value(), Bytes::copy_from_slice).map(Some)
    }

    /// How many objects are in the range. It costs as much as the range has namespaces.
    ///
    /// # Errors
    /// [`Error::Storage`] if the file cannot be read.
    pub fn count(&self, range: &Range) -> Result<u64, Error> {
        let mut count = 0u64;
        for row in self.txn.open_table(COUNTS)?.range(range.start()..range.end())? {
            count = count.saturating_add(row?.1.value());
        }
        if count == 0 && self.txn.open_table(OBJECTS)?.get(range.start())?.is_some() {
            count = 1;
        }
        Ok(count)
    }

    /// A page of the objects in the range: at most `limit`, and about [`PAGE_BYTES_MAX`]. Whoever wants all goes on at
    /// [`List::next`] until there is none.
    ///
    /// # Errors
    /// [`Error::TooOld`] if the history does not reach back to the place's revision, [`Error::TooNew`] if there is no such revision
    /// yet, and [`Error::Storage`] if the file cannot be read.
    pub fn list(&self, range: &Range, from: &Place, limit: usize) -> Result<List, Error> {
        let revision = from.revision.unwrap_or(self.state.revision);
        let undone = self.undo(range, revision)?;
        let total = match from.left {
            Some(left) => Some(left),
            None if from.after.is_none() => Some(self.count_at(range, &undone)?),
            None => None,
        };
        let texts = self.txn.open_table(TEXTS)?;
        let mut buffer = BytesMut::new();
        let mut page = List { texts: Vec::new(), revision, next: None };
        let mut bytes = 0usize;
        let mut last = None;
        for entry in self.entries(range, from.after.as_ref(), &undone)? {
            let (key, at) = entry?;
            if page.texts.len() >= limit || bytes >= PAGE_BYTES_MAX {
                let after = last.as_deref().and_then(Key::from_stored).or_else(|| from.after.clone());
                let left = total.map(|total| total.saturating_sub(page.texts.len() as u64));
                page.next = Some(Place { after, revision: Some(revision), left });
                break;
            }
            let text = text(&texts, at, |json| {
                if buffer.capacity() < json.len() {
                    buffer = BytesMut::with_capacity(json.len().max(BUFFER_BYTES));
                }
                buffer.extend_from_slice(json);
                buffer.split().freeze()
            })?;
            bytes = bytes.saturating_add(text.json().len());
            page.texts.push(text.json().clone());
            last = Some(key);
        }
        Ok(page)
    }

    /// Events of the range behind one revision and up to another, and up to which revision that is all: after some, the rest is for
    /// the next call.
    pub(super) fn events(
        &self,
        range: Option<&Range>,
        after: u64,
        until: u64,
    ) -> Result<(Vec<Arc<Event>>, u64), Error> {
        if after < self.state.trimmed {
            return Err(Error::TooOld { revision: after, oldest: self.state.trimmed });
        }
        let texts = self.txn.open_table(TEXTS)?;
        let (mut events, mut at, mut bytes) = (Vec::new(), after, 0usize);
        let rows = self.txn.open_table(EVENTS)?.range(after.saturating_add(1)..=until)?;
        for (looked_at, row) in rows.enumerate() {
            if looked_at >= REPLAY_EVENTS_MAX || bytes >= REPLAY_BYTES_MAX {
                return Ok((events, at));
            }
            let (revision, stored) = row?;
            at = revision.value();
            let record = Record::from_stored(at, stored.value())?;
            if range.is_some_and(|range| !range.has(&record.key)) {
                continue;
            }
            let text = |revision| text(&texts, revision, Bytes::copy_from_slice);
            let before = (record.before != 0).then(|| text(record.before)).transpose()?;
            let after = record.exists.then(|| text(at)).transpose()?;
            let event = Event::new(at, record.key, before, after);
            bytes = bytes.saturating_add(event.bytes());
            events.push(Arc::new(event));
        }
        Ok((events, until))
    }

    /// What the events behind a revision did to the objects of a range: the revision that each was at, 0 if there was none.
    fn undo(&self, range: &Range, revision: u64) -> Result<Undone, Error> {
        let mut undone = Undone::new();
        if revision > self.state.revision {
            return Err(Error::TooNew { revision, newest: self.state.revision });
        }
        if revision < self.state.trimmed {
            return Err(Error::TooOld { revision, oldest: self.state.trimmed });
        }
        if revision < self.state.revision {
            for row in self.txn.open_table(EVENTS)?.range(revision.saturating_add(1)..)? {
                let (at, stored) = row?;
                let record = Record::from_stored(at.value(), stored.value())?;
                if range.has(&record.key) {
                    undone.entry(record.key.stored().to_vec()).or_insert(record.before);
                }
            }
        }
        Ok(undone)
    }

    fn count_at(&self, range: &Range, undone: &Undone) -> Result<u64, Error> {
        let mut count = self.count(range)?;
        let objects = self.txn.open_table(OBJECTS)?;
        for (key, before) in undone {
            let now = objects.get(key.as_slice())?.is_some();
            let more = i64::from(*before != 0) - i64::from(now);
            count = count.saturating_add_signed(more);
        }
        Ok(count)
    }

    /// Keys of the range with the revisions of their texts, in order, with what is undone.
    fn entries<'a>(
        &self,
        range: &'a Range,
        after: Option<&'a Key>,
        undone: &'a Undone,
    ) -> Result<impl Iterator<Item = Result<(Vec<u8>, u64), Error>> + use<'a>, Error> {
        let start = match after {
            // A place that is not of this range has nothing behind it, or all.
            Some(key) if key.stored() >= range.end() => Bound::Excluded(range.end()),
            Some(key) if key.stored() >= range.start() => Bound::Excluded(key.stored()),
            _ => Bound::Included(range.start()),
        };
        let end = match start {
            Bound::Excluded(start) if start == range.end() => Bound::Included(range.end()),
            _ => Bound::Excluded(range.end()),
        };
        let mut rows = self.txn.open_table(OBJECTS)?.range::<&[u8]>((start, end))?;
        let mut old = undone.range::<[u8], _>((start, end)).peekable();
        let mut now = next_row(&mut rows);
        Ok(std::iter::from_fn(move || {
            loop {
                let is_old = match (&now, old.peek()) {
                    (Some(Err(_)), _) | (Some(_), None) => false,
                    (Some(Ok((key, _))), Some((undone, _))) => *undone <= key,
                    (None, Some(_)) => true,
                    (None, None) => return None,
                };
                if !is_old {
                    let next = next_row(&mut rows);
                    return std::mem::replace(&mut now, next);
                }
                let (key, before) = old.next()?;
                if now.as_ref().is_some_and(|row| row.as_ref().is_ok_and(|(other, _)| other == key)) {
                    now = next_row(&mut rows);
                }
                if *before != 0 {
                    return Some(Ok((key.clone(), *before)));
                }
            }
        }))
    }
}

/// Keys, and the revisions that they were at.
type Undone = BTreeMap<Vec<u8>, u64>;

fn next_row(rows: &mut redb::Range<'static, &'static [u8], u64>) -> Option<Result<(Vec<u8>, u64), Error>> {
    let row = rows.next()?;
    Some(row.map(|(key, at)| (key.value().to_vec(), at.value())).map_err(Error::from))
}

fn text(
    texts: &ReadOnlyTable<u64, &'static [u8]>,
    revision: u64,
    keep: impl FnOnce(&[u8]) -> Bytes,
) -> Result<Text, Error> {
    let stored = texts.get(revision)?;
    let stored = stored.ok_or_else(|| Error::Damaged(format!("no text of revision {revision}")))?;
    Text::from_stored(revision, stored.value(), keep)
}
