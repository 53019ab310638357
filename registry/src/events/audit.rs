//! The audit log: a file of JSON lines, one for each request that reads or changes content, or is refused.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use super::writer::Store;
use super::{Ending, Event, Kind, rfc3339};
use crate::auth::Identity;

/// The owner writes, the group reads.
const MODE: u32 = 0o640;
/// How often it is looked at whether the file was moved away.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A line; `docs/registry-events.md` tells what the fields mean.
#[derive(Serialize)]
struct Entry<'a> {
    time: String,
    id: String,
    user: Option<&'a str>,
    auth: &'static str,
    address: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    forwarded_for: Option<&'a str>,
    action: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    method: &'a str,
    repository: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<&'a str>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    tags: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    upload: Option<String>,
    status: u16,
    result: &'static str,
    received_bytes: u64,
    sent_bytes: u64,
    duration_ms: u64,
    user_agent: Option<&'a str>,
}

/// Writes an event as a line, without its end.
pub(super) fn entry(event: &Event) -> Vec<u8> {
    let result = match (event.status, event.ending) {
        (401 | 403 | 429, _) => "refused",
        (400.., _) => "failed",
        (_, Ending::Broken) => "broken",
        (_, Ending::Whole) => "ok",
    };
    let asked = &event.asked;
    let entry = Entry {
        time: rfc3339(asked.time),
        id: asked.id.to_string(),
        user: event.who.name(),
        auth: match &event.who {
            Identity::Anonymous if asked.has_credentials && event.status == 401 => "invalid",
            who => who.how(),
        },
        address: asked.address.map(|address| address.to_string()),
        forwarded_for: asked.forwarded_for.as_deref(),
        action: event.action.name(),
        kind: event.kind.map(Kind::name),
        method: asked.method.as_str(),
        repository: event.repository.as_deref(),
        path: event.path.as_deref(),
        reference: event.reference.as_deref(),
        tags: &event.tags,
        digest: event.digest.as_deref(),
        from: event.from.as_deref(),
        upload: event.upload.map(|id| id.to_string()),
        status: event.status,
        result,
        received_bytes: asked.received_bytes(),
        sent_bytes: event.sent_bytes,
        duration_ms: u64::try_from(asked.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        user_agent: asked.user_agent.as_deref(),
    };
    // A struct of texts and numbers is always JSON.
    serde_json::to_vec(&entry).unwrap_or_default()
}

/// The file, which others may move away at any time.
pub(super) struct Log {
    path: PathBuf,
    file: File,
    /// Lines on their way, and how much of them is in the file.
    lines: Vec<u8>,
    written: usize,
    looked: Instant,
}

impl Log {
    /// Opens the file, or makes it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        Ok(Self { path: path.to_owned(), file, lines: Vec::new(), written: 0, looked: Instant::now() })
    }

    /// Opens the path again if something else is there now.
    fn look(&mut self) {
        self.looked = Instant::now();
        let same = |ours: &std::fs::Metadata, there: &std::fs::Metadata| {
            (ours.dev(), ours.ino()) == (there.dev(), there.ino())
        };
        let ours = self.file.metadata();
        if let (Ok(ours), Ok(there)) = (&ours, std::fs::metadata(&self.path))
            && same(ours, &there)
        {
            return;
        }
        match open(&self.path) {
            Ok(file) => {
                self.file = file;
                // A line that is half in the other file comes here as a whole.
                let lines = &self.lines[..self.written];
                self.written = lines.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
                tracing::info!(path = %self.path.display(), "the audit log is opened again");
            }
            Err(error) => {
                tracing::error!(path = %self.path.display(), %error, "the audit log cannot be opened again");
            }
        }
    }
}

impl Store for Log {
    const SYNC_INTERVAL: Duration = Duration::from_secs(1);

    fn put(&mut self, records: &mut VecDeque<Vec<u8>>) -> io::Result<()> {
        if self.looked.elapsed() >= LOOK_INTERVAL {
            self.look();
        }
        for record in records.drain(..) {
            self.lines.extend_from_slice(&record);
            self.lines.push(b'\n');
        }
        while self.written < self.lines.len() {
            match self.file.write(&self.lines[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => self.written += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.lines.clear();
        self.written = 0;
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        match self.file.sync_data() {
            // A pipe, or a terminal.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            done => done,
        }
    }

    fn refresh(&mut self) {
        self.look();
    }

    fn gap(&self, lost: u64) -> Option<Vec<u8>> {
        let time = rfc3339(SystemTime::now());
        Some(serde_json::json!({"time": time, "action": "lost", "entries": lost}).to_string().into_bytes())
    }
}

fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().create(true).append(true).mode(MODE).open(path)?;
    end_line(path, &file)?;
    Ok(file)
}

/// Ends a line that a process wrote to its half.
fn end_line(path: &Path, mut file: &File) -> io::Result<()> {
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() == 0 {
        return Ok(());
    }
    let mut last = [0];
    // Ours may only be written; who may not read the log cannot look.
    let Ok(mut reader) = File::open(path) else { return Ok(()) };
    reader.seek(SeekFrom::End(-1))?;
    reader.read_exact(&mut last)?;
    if last == *b"\n" { Ok(()) } else { file.write_all(b"\n") }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn put(log: &mut Log, lines: &[&str]) {
        let mut records = lines.iter().map(|line| line.as_bytes().to_vec()).collect();
        log.put(&mut records).unwrap();
        assert!(records.is_empty());
    }

    #[test]
    fn lines_are_appended_and_a_torn_one_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        put(&mut Log::open(&path).unwrap(), &["one", "two"]);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777 & !MODE, 0);
        fs::write(&path, "one\ntw").unwrap();
        put(&mut Log::open(&path).unwrap(), &["three"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntw\nthree\n");
        assert!(Log::open(&dir.path().join("no/such")).is_err());
    }

    #[test]
    fn a_file_that_was_moved_away_or_removed_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("audit.log"), dir.path().join("audit.log.1"));
        let mut log = Log::open(&path).unwrap();
        put(&mut log, &["one"]);
        fs::rename(&path, &old).unwrap();
        log.refresh();
        put(&mut log, &["two"]);
        assert_eq!(fs::read_to_string(&old).unwrap(), "one\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "two\n");
        fs::remove_file(&path).unwrap();
        log.refresh();
        put(&mut log, &["three"]);
        log.refresh();
        put(&mut log, &["four"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "three\nfour\n");
        // Emptied in its place, as `copytruncate` does.
        fs::write(&path, "").unwrap();
        put(&mut log, &["five"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "five\n");
        log.sync().unwrap();
    }

    #[test]
    fn what_a_full_disk_does_not_take_is_written_later_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let mut log = Log::open(&path).unwrap();
        log.file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut records: VecDeque<_> = [b"one".to_vec()].into();
        assert_eq!(log.put(&mut records).unwrap_err().kind(), io::ErrorKind::StorageFull);
        records.push_back(b"two".to_vec());
        assert!(log.put(&mut records).is_err());
        // Half a line came before it was full.
        log.written = 2;
        log.refresh();
        put(&mut log, &["three"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\nthree\n");
    }
}
