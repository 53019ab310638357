//! A queue of records in files: in order, bounded, and there again after a restart.
//!
//! ```text
//!  append ──> last segment ... first segment ──read──> batch ──ack──> position; a segment read to its end is removed
//!                 │                  └── more than fits: removed, read or not
//!                 └── sync: from then on a power cut takes nothing
//! ```
//!
//! What lies in the directory:
//!
//! | file | content |
//! | --- | --- |
//! | 16 hex digits | a segment, in the order of their numbers: a line per record |
//! | `position` | one line: number of a segment, a space, an offset in it, 16 hex digits each; before it all is acknowledged |
//!
//! A line is the CRC-32C of what follows it in 8 hex digits, a space, the bytes, and a line end. A line that is not its
//! checksum's is passed over, and what lies behind the last line end is cut off: both are what a power cut leaves of
//! lines that were never synced. Without a usable position all segments are read again.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::units::Size;

/// Longest record, bytes.
pub(crate) const RECORD_BYTES_MAX: usize = 64 << 10;
/// A segment is an eighth of the queue, and at most this long.
const SEGMENT_BYTES_MAX: u64 = 4 << 20;
/// Least bound of a queue: a segment has room for any line.
pub(crate) const QUEUE_BYTES_MIN: Size = Size(8 * LINE_BYTES_MAX);
/// No line is longer.
const LINE_BYTES_MAX: u64 = 128 << 10;
/// Checksum, space and line end.
const LINE_EXTRA_BYTES: usize = 10;
const POSITION_BYTES_MAX: u64 = 256;
const POSITION: &str = "position";
/// Who may read what was not sent yet.
const MODE: u32 = 0o600;

/// Records that wait in a directory. All of it blocks.
#[derive(Debug)]
pub(crate) struct Queue {
    dir: PathBuf,
    bytes_max: u64,
    segment_bytes: u64,
    /// In the order of their numbers; the first is read, the last written.
    segments: VecDeque<Segment>,
    /// All their bytes.
    bytes: u64,
    /// The last segment, once it is written to.
    active: Option<Arc<File>>,
    is_dirty: bool,
    /// In the first segment, if there is one.
    read: Position,
    position: File,
    next_number: u64,
    /// Records that went unread since the queue was opened.
    dropped: u64,
}

#[derive(Debug)]
struct Segment {
    number: u64,
    bytes: u64,
    /// Records that are not acknowledged.
    records: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Position {
    segment: u64,
    offset: u64,
}

/// Records as they were read; they stay until they are acknowledged.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) records: Vec<Vec<u8>>,
    start: Position,
    end: Position,
}

impl Queue {
    /// Opens a directory, or makes it. The queue has at most `bytes_max` in its segments, or one record.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub(crate) fn open(dir: &Path, bytes_max: u64) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        for dir in dir.ancestors().take(3) {
            sync_dir(dir)?;
        }
        let position = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(MODE)
            .open(dir.join(POSITION))?;
        let mut queue = Self {
            dir: dir.to_owned(),
            bytes_max,
            segment_bytes: (bytes_max / 8).clamp(1, SEGMENT_BYTES_MAX),
            segments: VecDeque::new(),
            bytes: 0,
            active: None,
            is_dirty: false,
            read: read_position(&position)?.unwrap_or_default(),
            position,
            next_number: 0,
            dropped: 0,
        };
        queue.find_segments()?;
        Ok(queue)
    }

    /// Adds a record; it can be read at once. A power cut may take it until it is synced.
    ///
    /// # Errors
    /// When it cannot be written; the queue is as it was, but for old records that made room.
    pub(crate) fn append(&mut self, record: &[u8]) -> io::Result<()> {
        let line = line(record)?;
        let length = line.len() as u64;
        let is_full = |segment: &Segment| segment.bytes > 0 && segment.bytes + length > self.segment_bytes;
        let file = match &self.active {
            Some(file) if !self.segments.back().is_none_or(is_full) => Arc::clone(file),
            _ => self.begin_segment(length)?,
        };
        while self.bytes + length > self.bytes_max && self.segments.len() > 1 {
            self.drop_first()?;
        }
        let Some(segment) = self.segments.back_mut() else { return Err(ErrorKind::NotFound.into()) };
        // Not behind the file's end: what a failed write left there is written over.
        file.write_all_at(&line, segment.bytes)?;
        self.is_dirty = true;
        segment.bytes += length;
        segment.records += 1;
        self.bytes += length;
        Ok(())
    }

    /// Returns what has to be synced for all records to be durable; the caller does so, without holding the queue.
    pub(crate) fn unsynced(&mut self) -> Option<Arc<File>> {
        match std::mem::take(&mut self.is_dirty) {
            true => self.active.clone(),
            false => None,
        }
    }

    /// Reads the next records that are not acknowledged: one at least, `records_max` at most, and not many more bytes
    /// than `bytes_max`. `None` if there are none.
    ///
    /// # Errors
    /// When they cannot be read.
    pub(crate) fn read(&mut self, records_max: usize, bytes_max: usize) -> io::Result<Option<Batch>> {
        loop {
            let Some(segment) = self.segments.front() else { return Ok(None) };
            let left = segment.bytes.saturating_sub(self.read.offset);
            if left == 0 {
                if self.segments.len() == 1 {
                    return Ok(None);
                }
                self.drop_first()?;
                continue;
            }
            let window = left.min((bytes_max as u64).max(LINE_BYTES_MAX));
            let mut bytes = vec![0; usize::try_from(window).unwrap_or(usize::MAX)];
            let path = self.path(segment.number);
            match File::open(path).and_then(|file| file.read_exact_at(&mut bytes, self.read.offset)) {
                Ok(()) => {}
                // Somebody removed or cut it.
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::UnexpectedEof) => {
                    self.active = self.active.take().filter(|_| self.segments.len() > 1);
                    self.drop_first()?;
                    continue;
                }
                Err(error) => return Err(error),
            }
            let (records, taken) = take_records(&bytes, records_max, bytes_max);
            // Damage without a line end is longer than any line.
            let taken = if taken == 0 { bytes.len() } else { taken };
            let end = Position { offset: self.read.offset + taken as u64, ..self.read };
            if !records.is_empty() {
                return Ok(Some(Batch { records, start: self.read, end }));
            }
            self.read = end;
        }
    }

    /// Notes that a batch has arrived where it should: it is not read again.
    ///
    /// # Errors
    /// When that cannot be written down; after a restart the batch may be read again.
    pub(crate) fn ack(&mut self, batch: &Batch) -> io::Result<()> {
        // What made room meanwhile is gone already.
        if batch.start != self.read {
            return Ok(());
        }
        self.read = batch.end;
        if let Some(segment) = self.segments.front_mut() {
            segment.records = segment.records.saturating_sub(batch.records.len() as u64);
            if self.read.offset >= segment.bytes && self.segments.len() > 1 {
                return self.drop_first();
            }
        }
        self.save_position()
    }

    /// How many records are not acknowledged.
    pub(crate) fn pending(&self) -> u64 {
        self.segments.iter().map(|segment| segment.records).sum()
    }

    /// How many records went without being acknowledged, since the queue was opened.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    fn find_segments(&mut self) -> io::Result<()> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let name = name.to_str().filter(|name| name.len() == 16);
            numbers.extend(name.and_then(|name| u64::from_str_radix(name, 16).ok()));
        }
        numbers.sort_unstable();
        self.next_number = numbers.last().copied().unwrap_or(0).max(self.read.segment).saturating_add(1);
        let (old, numbers): (Vec<_>, Vec<_>) =
            numbers.into_iter().partition(|number| *number < self.read.segment);
        for number in old {
            fs::remove_file(self.path(number))?;
        }
        if numbers.first() != Some(&self.read.segment) {
            self.read = Position { segment: numbers.first().copied().unwrap_or(self.next_number), offset: 0 };
        }
        for number in numbers {
            let content = fs::read(self.path(number))?;
            let whole = content.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            if number == self.read.segment {
                self.read.offset = self.read.offset.min(whole as u64);
            }
            let from = if number == self.read.segment { self.read.offset } else { 0 };
            let from = usize::try_from(from).unwrap_or(usize::MAX).min(whole);
            let records = content[from..whole].split(|byte| *byte == b'\n').filter_map(record).count();
            if whole < content.len() {
                let file = OpenOptions::new().write(true).open(self.path(number))?;
                file.set_len(whole as u64)?;
                file.sync_all()?;
            }
            self.bytes += whole as u64;
            self.segments.push_back(Segment { number, bytes: whole as u64, records: records as u64 });
        }
        // What is appended from now on must not lie before a position that was ahead of what outlived a power cut.
        self.save_position()?;
        self.position.sync_all()
    }

    /// Makes the last segment ready for a line: it is opened, or a new one is begun.
    fn begin_segment(&mut self, length: u64) -> io::Result<Arc<File>> {
        let last = self.segments.back().filter(|last| last.bytes + length <= self.segment_bytes);
        let number = match last {
            Some(last) => last.number,
            None => self.next_number,
        };
        let is_new = last.is_none();
        if let Some(file) = self.unsynced() {
            file.sync_data()?;
        }
        let mut options = OpenOptions::new();
        options.write(true).create(is_new).truncate(is_new).mode(MODE);
        let file = Arc::new(options.open(self.path(number))?);
        if is_new {
            sync_dir(&self.dir)?;
            self.next_number = number.saturating_add(1);
            if self.segments.is_empty() {
                self.read = Position { segment: number, offset: 0 };
            }
            self.segments.push_back(Segment { number, bytes: 0, records: 0 });
        }
        self.active = Some(Arc::clone(&file));
        Ok(file)
    }

    /// Removes the first segment; what of it was not acknowledged is dropped.
    fn drop_first(&mut self) -> io::Result<()> {
        let Some(first) = self.segments.pop_front() else { return Ok(()) };
        self.bytes = self.bytes.saturating_sub(first.bytes);
        self.dropped += first.records;
        let segment = self.segments.front().map_or(self.next_number, |segment| segment.number);
        self.read = Position { segment, offset: 0 };
        self.save_position()?;
        match fs::remove_file(self.path(first.number)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn save_position(&self) -> io::Result<()> {
        let Position { segment, offset } = self.read;
        self.position.write_all_at(&line(format!("{segment:016x} {offset:016x}").as_bytes())?, 0)
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:016x}"))
    }
}

fn read_position(file: &File) -> io::Result<Option<Position>> {
    let length = file.metadata()?.len().min(POSITION_BYTES_MAX);
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)?;
    let text = bytes.split(|byte| *byte == b'\n').next().and_then(record);
    let text = text.and_then(|text| std::str::from_utf8(text).ok());
    let number = |text| u64::from_str_radix(text, 16).ok();
    Ok(text.and_then(|text| {
        let (segment, offset) = text.split_once(' ')?;
        Some(Position { segment: number(segment)?, offset: number(offset)? })
    }))
}

fn line(record: &[u8]) -> io::Result<Vec<u8>> {
    if record.len() > RECORD_BYTES_MAX || record.contains(&b'\n') {
        let message = format!("a record of {} bytes is too long, or has several lines", record.len());
        return Err(io::Error::new(ErrorKind::InvalidInput, message));
    }
    let mut line = Vec::with_capacity(record.len() + LINE_EXTRA_BYTES);
    line.extend_from_slice(format!("{:08x} ", crc32c::crc32c(record)).as_bytes());
    line.extend_from_slice(record);
    line.push(b'\n');
    Ok(line)
}

/// The record of a line, if its checksum is right.
fn record(line: &[u8]) -> Option<&[u8]> {
    let (sum, record) = line.split_at_checked(LINE_EXTRA_BYTES - 1)?;
    let sum = std::str::from_utf8(sum).ok()?.strip_suffix(' ')?;
    (u32::from_str_radix(sum, 16) == Ok(crc32c::crc32c(record))).then_some(record)
}

/// Takes whole lines, and tells how many bytes they are.
fn take_records(bytes: &[u8], records_max: usize, bytes_max: usize) -> (Vec<Vec<u8>>, usize) {
    let (mut records, mut taken) = (Vec::new(), 0);
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let is_enough = records.len() >= records_max || !records.is_empty() && taken + line.len() > bytes_max;
        let Some(line) = line.strip_suffix(b"\n").filter(|_| !is_enough) else { break };
        taken += line.len() + 1;
        records.extend(record(line).map(<[u8]>::to_vec));
    }
    (records, taken)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(queue: &mut Queue) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        while let Some(batch) = queue.read(7, 300).unwrap() {
            queue.ack(&batch).unwrap();
            found.extend(batch.records);
        }
        found
    }

    fn texts(numbers: impl IntoIterator<Item = u64>) -> Vec<Vec<u8>> {
        numbers.into_iter().map(|number| number.to_string().into_bytes()).collect()
    }

    fn segments(dir: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        let mut found: Vec<_> = entries.filter(|path| path.file_name().unwrap() != POSITION).collect();
        found.sort();
        found
    }

    #[test]
    fn records_come_back_in_order_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/queue");
        let mut queue = Queue::open(&path, 2000).unwrap();
        assert!(queue.read(10, 1000).unwrap().is_none());
        for record in texts(0..50) {
            queue.append(&record).unwrap();
        }
        let batch = queue.read(10, 10_000).unwrap().unwrap();
        assert_eq!(batch.records, texts(0..10));
        queue.ack(&batch).unwrap();
        // Read, but not acknowledged.
        assert_eq!(queue.read(5, 10_000).unwrap().unwrap().records, texts(10..15));
        assert_eq!(queue.pending(), 40);
        drop(queue);
        let mut queue = Queue::open(&path, 2000).unwrap();
        assert_eq!(queue.pending(), 40);
        queue.append(b"50").unwrap();
        assert_eq!(all(&mut queue), texts(10..51));
        assert_eq!((queue.pending(), queue.dropped()), (0, 0));
        drop(queue);
        assert!(Queue::open(&path, 2000).unwrap().read(10, 1000).unwrap().is_none());
    }

    #[test]
    fn the_oldest_make_room_and_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let mut queue = Queue::open(dir.path(), 800).unwrap();
        let record = [b'x'; 40];
        for n in 0..100 {
            queue.append(&record).unwrap();
            assert_eq!(queue.pending() + queue.dropped(), n + 1);
        }
        assert!(queue.dropped() > 80, "{}", queue.dropped());
        assert_eq!(all(&mut queue).len() as u64 + queue.dropped(), 100);
        // A batch whose segment is gone meanwhile is acknowledged in vain.
        queue.append(b"first").unwrap();
        let batch = queue.read(1, 1000).unwrap().unwrap();
        (0..50).for_each(|_| queue.append(&record).unwrap());
        let (pending, next) = (queue.pending(), queue.read(1, 1000).unwrap().unwrap().records);
        queue.ack(&batch).unwrap();
        assert_eq!(queue.pending(), pending);
        assert_eq!(queue.read(1, 1000).unwrap().unwrap().records, next);
    }

    #[test]
    fn damage_is_passed_over_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let mut queue = Queue::open(dir.path(), 1 << 20).unwrap();
        texts(0..9).iter().for_each(|record| queue.append(record).unwrap());
        drop(queue);
        let segment = segments(dir.path()).pop().unwrap();
        let mut bytes = fs::read(&segment).unwrap();
        // The fourth line; and what would be a line, had its end come.
        bytes[3 * 11 + 2] ^= 0x40;
        bytes.extend(vec![0; 200_000]);
        fs::write(&segment, &bytes).unwrap();
        fs::write(dir.path().join("unknown"), "").unwrap();
        let mut queue = Queue::open(dir.path(), 1 << 20).unwrap();
        assert_eq!(queue.pending(), 8);
        queue.append(b"9").unwrap();
        assert_eq!(all(&mut queue), texts([0, 1, 2, 4, 5, 6, 7, 8, 9]));
        drop(queue);
        // Zeros with lines behind them, as a file has whose pages were not written in order.
        let mut bytes = vec![0; 200_000];
        bytes.extend(b"\n");
        bytes.extend(line(b"10").unwrap());
        fs::write(&segment, &bytes).unwrap();
        fs::write(dir.path().join(POSITION), "nonsense").unwrap();
        assert_eq!(all(&mut Queue::open(dir.path(), 1 << 20).unwrap()), texts([10]));
        // A segment that somebody removed.
        let mut queue = Queue::open(dir.path(), 1 << 20).unwrap();
        queue.append(b"11").unwrap();
        segments(dir.path()).iter().for_each(|path| fs::remove_file(path).unwrap());
        assert!(queue.read(1, 100).unwrap().is_none());
        queue.append(b"12").unwrap();
        assert_eq!(all(&mut queue), texts([12]));
    }

    #[test]
    fn a_position_ahead_of_what_outlived_a_power_cut_hides_nothing_new() {
        let dir = tempfile::tempdir().unwrap();
        let mut queue = Queue::open(dir.path(), 1 << 20).unwrap();
        texts(0..9).iter().for_each(|record| queue.append(record).unwrap());
        assert_eq!(all(&mut queue).len(), 9);
        drop(queue);
        // The records were sent before they were synced, and are lost; the position is not.
        let segment = OpenOptions::new().write(true).open(segments(dir.path()).pop().unwrap()).unwrap();
        segment.set_len(20).unwrap();
        let mut queue = Queue::open(dir.path(), 1 << 20).unwrap();
        texts(20..29).iter().for_each(|record| queue.append(record).unwrap());
        drop(queue);
        assert_eq!(all(&mut Queue::open(dir.path(), 1 << 20).unwrap()), texts(20..29));
    }

    #[test]
    fn what_cannot_be_a_record_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut queue = Queue::open(dir.path(), 1 << 20).unwrap();
        for bad in [&b"a\nb"[..], &vec![b'x'; RECORD_BYTES_MAX + 1]] {
            assert_eq!(queue.append(bad).unwrap_err().kind(), ErrorKind::InvalidInput);
        }
        let longest = vec![b'x'; RECORD_BYTES_MAX];
        queue.append(&longest).unwrap();
        assert_eq!(queue.read(1, 1).unwrap().unwrap().records, [longest]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// Appends so many records of such a length.
        Append(u8, u8),
        /// Reads so many, and acknowledges them or not.
        Read(usize, usize, bool),
        Reopen,
        /// Cuts bytes off the last segment, adds others, and reopens.
        Tear(u8, Vec<u8>),
        LosePosition,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1u8..12, 0u8..90).prop_map(|(count, length)| Step::Append(count, length)),
            4 => (1usize..20, 1usize..400, any::<bool>()).prop_map(|(n, bytes, ack)| Step::Read(n, bytes, ack)),
            1 => Just(Step::Reopen),
            1 => (any::<u8>(), prop::collection::vec(1u8.., 0..30)).prop_map(|(cut, add)| Step::Tear(cut, add)),
            1 => Just(Step::LosePosition),
        ]
    }

    /// What the files of a queue hold: records by number.
    #[derive(Default)]
    struct Model {
        next: u64,
        /// Appended, neither acknowledged nor dropped nor torn off.
        pending: VecDeque<Vec<u8>>,
        dropped: u64,
    }

    impl Model {
        fn check(&mut self, queue: &mut Queue, dir: &Path, bytes_max: u64) {
            let dropped = queue.dropped() - self.dropped;
            self.dropped = queue.dropped();
            self.pending.drain(..usize::try_from(dropped).unwrap());
            assert_eq!(queue.pending(), self.pending.len() as u64);
            let lengths = segments(dir).into_iter().map(|path| fs::metadata(path).unwrap().len());
            assert!(lengths.sum::<u64>() <= bytes_max);
            let first = queue.read(1, 1).unwrap().map(|batch| batch.records);
            assert_eq!(first, self.pending.front().map(|record| vec![record.clone()]));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn a_queue_holds_what_its_model_holds(steps in prop::collection::vec(step(), 1..60), eighth in 101u64..500) {
            // In memory, where syncs cost nothing.
            let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
            let bytes_max = eighth * 8;
            let mut queue = Queue::open(dir.path(), bytes_max).unwrap();
            let mut model = Model::default();
            for step in steps {
                match step {
                    Step::Append(count, length) => for _ in 0..count {
                        let record = format!("{:0width$}", model.next, width = usize::from(length)).into_bytes();
                        queue.append(&record).unwrap();
                        model.pending.push_back(record);
                        model.next += 1;
                    },
                    Step::Read(records_max, bytes, is_acked) => {
                        if let Some(batch) = queue.read(records_max, bytes).unwrap() {
                            // Drops are counted before, or they would be read.
                            let read = batch.records.len();
                            prop_assert!((1..=records_max).contains(&read));
                            prop_assert!(batch.records.iter().eq(model.pending.iter().take(read)));
                            if is_acked {
                                queue.ack(&batch).unwrap();
                                model.pending.drain(..read);
                            }
                        }
                    }
                    Step::Reopen => {
                        queue = Queue::open(dir.path(), bytes_max).unwrap();
                        model.dropped = 0;
                    }
                    Step::Tear(cut, add) => {
                        drop(queue);
                        if let Some(last) = segments(dir.path()).pop() {
                            let mut bytes = fs::read(&last).unwrap();
                            let lines = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == b'\n').count();
                            let before = lines(&bytes);
                            bytes.truncate(bytes.len() - usize::from(cut).min(bytes.len()));
                            let torn = before - lines(&bytes);
                            bytes.extend(add.into_iter().filter(|byte| *byte != b'\n'));
                            fs::write(&last, bytes).unwrap();
                            // Those that were acknowledged are no loss.
                            model.pending.truncate(model.pending.len().saturating_sub(torn));
                        }
                        queue = Queue::open(dir.path(), bytes_max).unwrap();
                        model.dropped = 0;
                    }
                    Step::LosePosition => {
                        drop(queue);
                        fs::write(dir.path().join(POSITION), "").unwrap();
                        queue = Queue::open(dir.path(), bytes_max).unwrap();
                        model.dropped = 0;
                        // All that is in the files comes again: at its end what was pending.
                        let lines = segments(dir.path()).into_iter().flat_map(|path| {
                            let bytes = fs::read(path).unwrap();
                            let lines = bytes.split(|byte| *byte == b'\n').filter_map(record);
                            lines.map(<[u8]>::to_vec).collect::<Vec<_>>()
                        });
                        let again: VecDeque<_> = lines.collect();
                        let known = again.len().checked_sub(model.pending.len()).unwrap();
                        prop_assert!(again.iter().skip(known).eq(&model.pending));
                        model.pending = again;
                    }
                }
                model.check(&mut queue, dir.path(), bytes_max);
            }
            prop_assert!(all(&mut queue).iter().eq(&model.pending));
        }
    }
}
