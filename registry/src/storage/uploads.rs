//! Upload sessions.
//!
//! ```text
//!            begin                  first bytes                      PUT with the digest
//!  (nothing) ─────> in memory ─────────────────────> directory ──┬──────────────────────────> blob
//!                       │   └─ PUT of a small body ──────────────┼──────────────────────────> blob
//!                       └─ too many in memory, or shutdown ──────┤
//!                                                                └─ DELETE, wrong digest ───> (nothing)
//! ```
//!
//! A session that has no bytes yet lives in memory: most are pushed to in one request, and making and removing their
//! directories would cost more than the blob. From the first byte on everything is on disk, so that whoever serves the
//! directory next, CNCF distribution included, goes on with it. At most one request works on a session at a time.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use chrono::{DateTime, SecondsFormat, Utc};
use uuid::Uuid;

use super::blobs::found;
use super::ingest::hash_file;
use super::quota::Room;
use super::space::Purpose;
use super::sync::Changes;
use super::{Error, Result, Storage};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::lock;
use crate::names::RepoName;
use crate::store::{NOTE_BYTES_MAX, UploadError};

/// Sessions without bytes that are kept in memory; the oldest of more are put on disk.
const PENDING_SESSIONS_MAX: usize = 4096;
/// Names the file of a session that tells under which boot of the machine its states were saved.
const BOOT_FILE: &str = "boot";
/// What the client left with a session.
const NOTE_FILE: &str = "note";
/// Longest saved state that is read (sha512 takes 204 bytes).
const STATE_BYTES_MAX: u64 = 512;

/// The sessions this process knows of.
#[derive(Debug, Default)]
pub(crate) struct Uploads {
    busy: Arc<Mutex<HashSet<Uuid>>>,
    pending: Mutex<Pending>,
}

#[derive(Debug, Default)]
struct Pending {
    sessions: HashMap<Uuid, Fresh>,
    /// Oldest first; ids that are no longer pending stay until the next cleaning.
    order: VecDeque<Uuid>,
}

#[derive(Clone, Debug)]
struct Fresh {
    repo: RepoName,
    algorithm: Algorithm,
    started: SystemTime,
}

/// A session held by one request.
pub(crate) struct Session {
    id: Uuid,
    repo: RepoName,
    dir: PathBuf,
    offset: u64,
    hasher: Hasher,
    /// When it began, if it is not on disk yet.
    fresh: Option<SystemTime>,
    /// What the client leaves with it, until that is on disk.
    note: Option<String>,
    /// What a quota grants it; given back before the lease is.
    room: Room,
    _lease: Lease,
}

struct Lease {
    busy: Arc<Mutex<HashSet<Uuid>>>,
    id: Uuid,
}

impl Drop for Lease {
    fn drop(&mut self) {
        lock(&self.busy).remove(&self.id);
    }
}

impl Session {
    pub(crate) fn id(&self) -> Uuid {
        self.id
    }

    pub(crate) fn repo(&self) -> &RepoName {
        &self.repo
    }

    /// Bytes acknowledged, and hashed.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether nothing of it is on disk.
    pub(crate) fn is_fresh(&self) -> bool {
        self.fresh.is_some()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub(crate) fn hashstates(&self) -> PathBuf {
        hashstates(&self.dir, self.hasher.algorithm())
    }

    pub(crate) fn hasher(&self) -> Hasher {
        self.hasher.clone()
    }

    /// Keeps a text for the client that comes back; it is put on disk before the next state.
    pub(super) fn leave_note(&mut self, note: String) {
        self.note = Some(note);
    }

    /// Chooses the hash of a session that has no bytes yet.
    pub(crate) fn prefer(&mut self, algorithm: Algorithm) {
        if self.offset == 0 {
            self.hasher = Hasher::new(algorithm);
        }
    }

    /// Records what one request brought, and puts the state on disk: from here on it survives the process.
    pub(crate) fn advance(&mut self, hasher: Hasher, offset: u64) -> Result<()> {
        if let Some(note) = self.note.take() {
            let path = self.dir.join(NOTE_FILE);
            let aside = path.with_extension("new");
            let write = || fs::write(&aside, &note).and_then(|()| fs::rename(&aside, &path));
            write().map_err(Error::at("cannot keep the client's note", &path))?;
        }
        let dir = hashstates(&self.dir, hasher.algorithm());
        save_state(&dir, &hasher, offset).map_err(Error::at("cannot save the hash state", &dir))?;
        (self.hasher, self.offset) = (hasher, offset);
        self.room.keep(offset);
        Ok(())
    }

    /// Records what one request brought, for a commit that follows at once.
    pub(crate) fn set(&mut self, hasher: Hasher, offset: u64) {
        (self.hasher, self.offset) = (hasher, offset);
        self.room.keep(offset);
    }

    /// Makes room for so many bytes in all.
    ///
    /// # Errors
    /// When the quota does not leave so many.
    pub(crate) fn reach(&mut self, bytes: u64) -> Result<()> {
        self.room.reach(bytes)
    }

    /// Records what one request brought that broke off, or, if there is no room to keep it, goes back to `before`.
    pub(crate) fn keep(&mut self, (hasher, offset): (Hasher, u64), before: (Hasher, u64)) -> Result<()> {
        match self.room.take(offset) {
            Ok(()) => self.advance(hasher, offset),
            Err(_) => self.rewind(before.0, before.1),
        }
    }

    /// Goes back to `offset` and its hash, after a request whose bytes do not count.
    pub(crate) fn rewind(&mut self, hasher: Hasher, offset: u64) -> Result<()> {
        let data = self.data();
        let cut = || fs::OpenOptions::new().write(true).open(&data)?.set_len(offset);
        match cut() {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Error::at("cannot cut the upload back", &data)(error));
            }
            _ => {}
        }
        self.advance(hasher, offset)
    }
}

impl Storage {
    /// Begins a session. `algorithm` is the hash its bytes will be run through.
    pub(crate) fn begin_upload(&self, repo: &RepoName, algorithm: Algorithm) -> Result<Uuid> {
        let id = Uuid::new_v4();
        self.begin_upload_as(repo, id, algorithm)?;
        Ok(id)
    }

    /// Begins a session of this id, which nobody else has.
    pub(super) fn begin_upload_as(&self, repo: &RepoName, id: Uuid, algorithm: Algorithm) -> Result<()> {
        let fresh = Fresh { repo: repo.clone(), algorithm, started: SystemTime::now() };
        // One more in memory than allowed, while the oldest is put on disk.
        let surplus = {
            let mut pending = lock(&self.uploads.pending);
            pending.put(id, fresh);
            pending.take_surplus(PENDING_SESSIONS_MAX)
        };
        for (old, fresh) in surplus {
            if let Err(error) = self.spill(old, &fresh) {
                let mut pending = lock(&self.uploads.pending);
                pending.sessions.remove(&id);
                pending.put(old, fresh);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Puts all sessions that live in memory on disk, before the process ends.
    ///
    /// They have no bytes, so one that cannot be put there costs its client a new beginning and nothing else.
    pub(crate) fn keep_pending_uploads(&self) {
        let all = lock(&self.uploads.pending).take_surplus(0);
        for (id, fresh) in all {
            if let Err(error) = self.spill(id, &fresh) {
                tracing::warn!(%error, "an upload that had just begun is forgotten");
            }
        }
    }

    /// Gives up a session on disk in which nothing has happened since `before`, and returns its bytes. One that a request
    /// works on stays, and so does every one in a dry run.
    pub(super) fn give_up_upload(
        &self,
        repo: &RepoName,
        id: Uuid,
        before: SystemTime,
        dry_run: bool,
    ) -> Result<Option<u64>> {
        let Some(_lease) = self.lease(id) else { return Ok(None) };
        let dir = self.layout.upload(repo, id);
        let look = || {
            let mut bytes = None;
            let states = Algorithm::ALL.map(|algorithm| hashstates(&dir, algorithm));
            for path in [dir.clone(), dir.join("startedat"), dir.join("data")].iter().chain(&states) {
                let Some(metadata) = found(fs::metadata(path))? else { continue };
                if metadata.modified()? >= before {
                    return Ok(None);
                }
                bytes = Some(if path.ends_with("data") { metadata.len() } else { bytes.unwrap_or(0) });
            }
            Ok(bytes)
        };
        let bytes = look().map_err(Error::at("cannot look at", &dir))?;
        if bytes.is_some() && !dry_run {
            remove_session_dir(&dir).map_err(Error::at("cannot remove the upload", &dir))?;
            self.quotas.ended(repo, id);
        }
        Ok(bytes)
    }

    /// Forgets the sessions that live in memory and began before `before`.
    pub(super) fn forget_pending_uploads(&self, before: SystemTime) {
        lock(&self.uploads.pending).sessions.retain(|_, fresh| fresh.started >= before);
    }

    fn lease(&self, id: Uuid) -> Option<Lease> {
        let is_free = lock(&self.uploads.busy).insert(id);
        is_free.then(|| Lease { busy: Arc::clone(&self.uploads.busy), id })
    }

    /// Takes hold of a session; `None` if the repository has none of this id.
    pub(crate) fn open_upload(&self, repo: &RepoName, id: Uuid) -> Result<Option<Session>, UploadError> {
        let lease = self.lease(id).ok_or(UploadError::Busy)?;
        let dir = self.layout.upload(repo, id);
        let fresh = lock(&self.uploads.pending).sessions.get(&id).cloned();
        if let Some(fresh) = fresh {
            let session = Session {
                id,
                repo: repo.clone(),
                dir,
                offset: 0,
                hasher: Hasher::new(fresh.algorithm),
                fresh: Some(fresh.started),
                note: None,
                room: Room::default(),
                _lease: lease,
            };
            return Ok((fresh.repo == *repo).then_some(session));
        }
        if !dir.is_dir() {
            return Ok(None);
        }
        let (hasher, offset) =
            resume(&dir, self.boot.as_deref()).map_err(Error::at("cannot resume the upload", &dir))?;
        let repo = repo.clone();
        let room = Room::default();
        Ok(Some(Session { id, repo, dir, offset, hasher, fresh: None, note: None, room, _lease: lease }))
    }

    /// Makes room for what a request is about to bring, as far as it has told how much, and as which blob.
    ///
    /// # Errors
    /// When the quota or the free space does not leave so much; see [`Error::exceeded`] and [`Error::is_full`].
    pub(crate) fn admit(
        &self,
        session: &mut Session,
        length: Option<u64>,
        digest: Option<&Digest>,
    ) -> Result<()> {
        let bytes = session.offset.saturating_add(length.unwrap_or(0));
        session.room = self.room(&session.repo, session.id, session.offset, bytes, digest)?;
        match length {
            // What has come already can always be finished.
            Some(0) => Ok(()),
            _ => self.space.check(length.unwrap_or(1)),
        }
    }

    /// Fails if there is no room for so many more bytes; holds none.
    pub(super) fn has_room(&self, repo: &RepoName, bytes: u64) -> Result<()> {
        // What is granted is given back at once.
        self.room(repo, Uuid::new_v4(), 0, bytes, None)?;
        match bytes {
            0 => Ok(()),
            _ => self.space.check(bytes),
        }
    }

    /// Tells whether [`Storage::admit`] takes no time worth mentioning.
    pub(crate) fn admits_quickly(&self, repo: &RepoName) -> bool {
        self.quotas.is_quick(repo)
    }

    /// Tells how many bytes of a session are acknowledged, also while a request works on it.
    pub(crate) fn upload_offset(&self, repo: &RepoName, id: Uuid) -> Result<Option<u64>> {
        if let Some(fresh) = lock(&self.uploads.pending).sessions.get(&id) {
            return Ok((fresh.repo == *repo).then_some(0));
        }
        let dir = self.layout.upload(repo, id);
        if !dir.is_dir() {
            return Ok(None);
        }
        let offset = resume_offset(&dir).map_err(Error::at("cannot read the upload", &dir))?;
        Ok(Some(offset))
    }

    /// Reads what the client left with a session.
    pub(crate) fn upload_note(&self, repo: &RepoName, id: Uuid) -> Result<Option<String>> {
        let path = self.layout.upload(repo, id).join(NOTE_FILE);
        let read = read_bounded(&path, NOTE_BYTES_MAX as u64).and_then(|note| {
            String::from_utf8(note).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
        });
        found(read).map_err(Error::at("cannot read", &path))
    }

    /// Tells whether a session lives in memory, so that opening it does not wait for the disk.
    pub(crate) fn is_fresh_upload(&self, id: Uuid) -> bool {
        lock(&self.uploads.pending).sessions.contains_key(&id)
    }

    /// Makes the directory of a session that has none.
    pub(crate) fn settle_upload(&self, session: &mut Session) -> Result<()> {
        if let Some(started) = session.fresh {
            self.make_session_dir(&session.dir, session.hasher.algorithm(), started)?;
            session.fresh = None;
            lock(&self.uploads.pending).sessions.remove(&session.id);
        }
        Ok(())
    }

    /// Ends a session and throws its bytes away.
    pub(crate) fn cancel_upload(&self, mut session: Session) -> Result<()> {
        lock(&self.uploads.pending).sessions.remove(&session.id);
        remove_session_dir(&session.dir).map_err(Error::at("cannot remove the upload", &session.dir))?;
        session.room.keep(0);
        self.quotas.ended(&session.repo, session.id);
        Ok(())
    }

    /// Turns a session into a blob of its repository; durable when it returns.
    ///
    /// The session ends, also with a wrong digest. Blocks: syncs, and reads everything once more if `expected` is of
    /// another algorithm than the session's.
    pub(crate) fn commit_upload(&self, mut session: Session, expected: &Digest) -> Result<(), UploadError> {
        if session.is_fresh() {
            return self.commit_small(session, &[], expected);
        }
        let data = session.data();
        let fail = |what| Error::at(what, &data);
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&data)
            .map_err(fail("cannot open the upload"))?;
        // Cuts off what a killed request left behind the acknowledged bytes.
        file.set_len(session.offset).map_err(fail("cannot cut the upload"))?;
        let actual = match session.hasher.algorithm() == expected.algorithm() {
            true => session.hasher.clone().finish(),
            false => hash_file(&data, expected.algorithm(), session.offset)
                .map_err(fail("cannot re-read the upload"))?
                .finish(),
        };
        if actual != *expected {
            self.cancel_upload(session)?;
            return Err(UploadError::Digest { actual });
        }
        if let Err(error) = file.sync_all() {
            // The next sync may succeed though the pages are lost, so no bytes of this session can be trusted again.
            self.cancel_upload(session)?;
            return Err(fail("cannot sync the upload")(error).into());
        }
        let link = self.link_temp(expected)?;
        let mut changes = self.dirs.changes();
        let blob = self.layout.blob(expected);
        let accepting = self.accepting();
        // The last byte may have come long ago.
        self.touch(&data)?;
        let placing = self.placing();
        changes.rename(&data, &blob).map_err(Error::at("cannot place the blob", &blob))?;
        let path = self.layout.layer_link(&session.repo, expected);
        self.quotas.placing(&session.repo, &path, (expected, session.offset), &mut session.room, || {
            self.place_link(&mut changes, link, &path)
        })?;
        changes.sync().map_err(Error::at("cannot sync directories of", &blob))?;
        drop(placing);
        self.healed(expected);
        drop(accepting);
        if let Err(error) = remove_session_dir(&session.dir) {
            // The blob is safe; an empty session merely stays behind.
            tracing::warn!(%error, path = %session.dir.display(), "finished upload not removed");
        }
        Ok(())
    }

    /// Turns a session that has no bytes on disk, and a body held in memory, into a blob.
    pub(crate) fn commit_small(
        &self,
        mut session: Session,
        body: &[u8],
        expected: &Digest,
    ) -> Result<(), UploadError> {
        lock(&self.uploads.pending).sessions.remove(&session.id);
        self.store(&session.repo, body, expected, &mut session.room)
    }

    /// Stores a small blob in a repository; durable when it returns.
    #[cfg(test)]
    pub(super) fn store_blob(
        &self,
        repo: &RepoName,
        body: &[u8],
        expected: &Digest,
    ) -> Result<(), UploadError> {
        self.store(repo, body, expected, &mut Room::default())
    }

    fn store(
        &self,
        repo: &RepoName,
        body: &[u8],
        expected: &Digest,
        room: &mut Room,
    ) -> Result<(), UploadError> {
        let actual = Digest::of(expected.algorithm(), body);
        if actual != *expected {
            return Err(UploadError::Digest { actual });
        }
        let blob = self.layout.blob(expected);
        let _grant = self.space.take(body.len() as u64, Purpose::Blob)?;
        let temp = self.dirs.write_temp(body).map_err(Error::at("cannot write the blob", &blob))?;
        let link = self.link_temp(expected)?;
        let mut changes = self.dirs.changes();
        let _accepting = self.accepting();
        let _placing = self.placing();
        changes.place(temp, &blob).map_err(Error::at("cannot place the blob", &blob))?;
        let path = self.layout.layer_link(repo, expected);
        self.quotas.placing(repo, &path, (expected, body.len() as u64), room, || {
            self.place_link(&mut changes, link, &path)
        })?;
        changes.sync().map_err(Error::at("cannot sync directories of", &blob))?;
        self.healed(expected);
        Ok(())
    }

    pub(super) fn link_temp(&self, digest: &Digest) -> Result<super::sync::Temp> {
        self.dirs
            .write_temp(digest.as_str().as_bytes())
            .map_err(Error::at("cannot write a link in", &self.layout.tmp()))
    }

    pub(super) fn place_link(
        &self,
        changes: &mut Changes<'_>,
        link: super::sync::Temp,
        to: &Path,
    ) -> Result<()> {
        changes.place(link, to).map_err(Error::at("cannot place the link", to))
    }

    fn spill(&self, id: Uuid, fresh: &Fresh) -> Result<()> {
        let dir = self.layout.upload(&fresh.repo, id);
        self.make_session_dir(&dir, fresh.algorithm, fresh.started)
    }

    fn make_session_dir(&self, dir: &Path, algorithm: Algorithm, started: SystemTime) -> Result<()> {
        let make = || {
            let states = hashstates(dir, algorithm);
            self.dirs.make(&states)?;
            fs::write(dir.join("startedat"), rfc3339(started))?;
            if let Some(boot) = &self.boot {
                fs::write(dir.join(BOOT_FILE), boot.as_ref())?;
            }
            save_state(&states, &Hasher::new(algorithm), 0)
        };
        make().map_err(Error::at("cannot begin the upload", dir))
    }
}

impl Pending {
    fn put(&mut self, id: Uuid, fresh: Fresh) {
        self.sessions.insert(id, fresh);
        self.order.push_back(id);
    }

    /// Takes out the oldest sessions beyond `keep`.
    fn take_surplus(&mut self, keep: usize) -> Vec<(Uuid, Fresh)> {
        let mut surplus = Vec::new();
        while self.sessions.len() > keep {
            let Some(id) = self.order.pop_front() else { break };
            surplus.extend(self.sessions.remove_entry(&id));
        }
        if self.order.len() > 2 * PENDING_SESSIONS_MAX {
            self.order.retain(|id| self.sessions.contains_key(id));
        }
        surplus
    }
}

/// Writes a state under the name distribution uses, and removes those that were there before.
pub(crate) fn save_state(hashstates: &Path, hasher: &Hasher, offset: u64) -> io::Result<()> {
    let name = offset.to_string();
    // Beside the states' directory, where every file counts as a state, and moved in as a whole.
    let aside = hashstates.with_extension("new");
    fs::write(&aside, hasher.save())?;
    fs::rename(&aside, hashstates.join(&name))?;
    for entry in fs::read_dir(hashstates)? {
        let entry = entry?;
        if entry.file_name() != name.as_str() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

struct SavedState {
    algorithm: Algorithm,
    offset: u64,
    path: PathBuf,
}

/// Lists the saved states, those furthest on first.
fn states_of(dir: &Path) -> io::Result<Vec<SavedState>> {
    let mut states = Vec::new();
    for algorithm in Algorithm::ALL {
        let entries = match fs::read_dir(hashstates(dir, algorithm)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            if let Some(offset) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
                states.push(SavedState { algorithm, offset, path: entry.path() });
            }
        }
    }
    states.sort_by_key(|state| std::cmp::Reverse(state.offset));
    Ok(states)
}

/// Finds the furthest state that the data on disk reaches.
///
/// Writing is in order and a state is saved after its data was written, so all bytes before it are there as long as the
/// machine kept running: acknowledged chunks survive the process, but are synced at commit only. After the machine went
/// down the states are not believed, and the data is hashed again. So is data without states, which a registry that
/// saves none wrote.
fn resume(dir: &Path, boot: Option<&str>) -> io::Result<(Hasher, u64)> {
    let (offset, state) = furthest(dir)?;
    let marker = dir.join(BOOT_FILE);
    let marked = found(fs::read_to_string(&marker))?;
    // Distribution leaves no marker, and syncs every chunk.
    let believed = boot.is_none_or(|now| marked.as_deref().is_none_or(|then| then == now));
    // What comes from here on is not synced.
    if let Some(boot) = boot.filter(|now| believed && marked.as_deref() != Some(*now)) {
        fs::write(&marker, boot)?;
    }
    if let Some((algorithm, hasher)) = state.as_ref().filter(|_| believed) {
        if states_of(dir)?.len() > 1 {
            // Removes those ahead of the data, which other data could reach.
            save_state(&hashstates(dir, *algorithm), hasher, offset)?;
        }
        return Ok((hasher.clone(), offset));
    }
    let algorithm = state.as_ref().map_or(Algorithm::Sha256, |(algorithm, _)| *algorithm);
    let hasher = match offset {
        0 => Hasher::new(algorithm),
        _ => hash_file(&dir.join("data"), algorithm, offset)?,
    };
    let states = hashstates(dir, algorithm);
    fs::create_dir_all(&states)?;
    save_state(&states, &hasher, offset)?;
    if let (Some(boot), false) = (boot, believed) {
        fs::write(&marker, boot)?;
    }
    Ok((hasher, offset))
}

/// Tells from where [`resume`] will go on, without hashing.
fn resume_offset(dir: &Path) -> io::Result<u64> {
    Ok(furthest(dir)?.0)
}

/// The offset to go on from, and the state saved there.
type Furthest = (u64, Option<(Algorithm, Hasher)>);

fn furthest(dir: &Path) -> io::Result<Furthest> {
    let length = found(fs::metadata(dir.join("data")))?.map_or(0, |metadata| metadata.len());
    let states = states_of(dir)?;
    for state in states.iter().filter(|state| state.offset <= length) {
        // A running request may just be replacing the state by a later one.
        let Some(saved) = found(read_bounded(&state.path, STATE_BYTES_MAX))? else { continue };
        if let Some((hasher, hashed)) = Hasher::restore(state.algorithm, &saved)
            && hashed == state.offset
        {
            return Ok((hashed, Some((state.algorithm, hasher))));
        }
    }
    Ok((if states.is_empty() { length } else { 0 }, None))
}

fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn hashstates(dir: &Path, algorithm: Algorithm) -> PathBuf {
    dir.join("hashstates").join(algorithm.name())
}

fn remove_session_dir(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes a time as `2006-01-02T15:04:05Z`, as distribution does in `startedat`.
fn rfc3339(time: SystemTime) -> String {
    DateTime::<Utc>::from(time).to_rfc3339_opts(SecondsFormat::Secs, true)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::storage::collect::Grace;
    use crate::storage::testing::storage;

    fn repo() -> RepoName {
        RepoName::parse("a/b").unwrap()
    }

    /// Leaves a session as a killed process would: data, and a state behind it.
    fn left_behind(storage: &Storage, data: &[u8], state_at: usize) -> Uuid {
        let id = storage.begin_upload(&repo(), Algorithm::Sha256).unwrap();
        let mut session = storage.open_upload(&repo(), id).unwrap().unwrap();
        storage.settle_upload(&mut session).unwrap();
        fs::write(session.data(), data).unwrap();
        let mut hasher = session.hasher();
        hasher.update(&data[..state_at]);
        session.advance(hasher, state_at as u64).unwrap();
        id
    }

    #[test]
    fn a_session_goes_on_from_the_last_state_and_the_surplus_is_cut() {
        let (_root, storage) = storage();
        let id = left_behind(&storage, b"acknowledged and not", 12);
        assert_eq!(storage.upload_offset(&repo(), id).unwrap(), Some(12));
        let session = storage.open_upload(&repo(), id).unwrap().unwrap();
        let digest = Digest::of(Algorithm::Sha256, b"acknowledged");
        storage.commit_upload(session, &digest).unwrap();
        assert_eq!(fs::read(storage.layout.blob(&digest)).unwrap(), b"acknowledged");
        assert!(!storage.layout.upload(&repo(), id).exists());
    }

    #[test]
    fn a_state_ahead_of_the_data_or_torn_is_passed_over() {
        let (_root, storage) = storage();
        let id = left_behind(&storage, b"0123456789", 4);
        let states = storage.layout.upload(&repo(), id).join("hashstates/sha256");
        fs::write(states.join("9000"), Hasher::new(Algorithm::Sha256).save()).unwrap();
        fs::write(states.join("8"), b"").unwrap();
        fs::write(states.join("7"), Hasher::new(Algorithm::Sha256).save()).unwrap();
        assert_eq!(storage.upload_offset(&repo(), id).unwrap(), Some(4));
    }

    #[test]
    fn a_state_ahead_of_the_data_is_gone_before_other_data_reaches_it() {
        let (_root, storage) = storage();
        let id = left_behind(&storage, b"0123456789", 4);
        let states = storage.layout.upload(&repo(), id).join("hashstates/sha256");
        let mut other = Hasher::new(Algorithm::Sha256);
        other.update(b"other bytes, 19 all");
        fs::write(states.join("19"), other.save()).unwrap();
        drop(storage.open_upload(&repo(), id).unwrap().unwrap());
        assert!(states.join("4").exists() && !states.join("19").exists());
    }

    #[test]
    fn going_on_with_a_session_of_another_registry_marks_it_as_unsynced() {
        let (_root, storage) = storage();
        let id = left_behind(&storage, b"0123456789", 10);
        let marker = storage.layout.upload(&repo(), id).join(BOOT_FILE);
        let marked = fs::read_to_string(&marker).unwrap();
        fs::remove_file(&marker).unwrap();
        let session = storage.open_upload(&repo(), id).unwrap().unwrap();
        assert_eq!(session.offset(), 10);
        assert_eq!(fs::read_to_string(&marker).unwrap(), marked);
    }

    #[test]
    fn a_session_that_cannot_be_put_on_disk_is_not_forgotten_for_a_new_one() {
        let (_root, storage) = storage();
        let ids: Vec<Uuid> = (0..PENDING_SESSIONS_MAX)
            .map(|_| storage.begin_upload(&repo(), Algorithm::Sha256).unwrap())
            .collect();
        let uploads = storage.layout.upload(&repo(), ids[0]).parent().unwrap().to_owned();
        fs::create_dir_all(uploads.parent().unwrap()).unwrap();
        fs::write(&uploads, b"in the way").unwrap();
        storage.begin_upload(&repo(), Algorithm::Sha256).unwrap_err();
        assert_eq!(lock(&storage.uploads.pending).sessions.len(), PENDING_SESSIONS_MAX);
        assert!(ids.iter().all(|id| storage.is_fresh_upload(*id)));
    }

    #[test]
    fn data_without_any_state_is_hashed_again() {
        let (_root, storage) = storage();
        let id = left_behind(&storage, b"0123456789", 4);
        fs::remove_dir_all(storage.layout.upload(&repo(), id).join("hashstates")).unwrap();
        let session = storage.open_upload(&repo(), id).unwrap().unwrap();
        assert_eq!(session.offset(), 10);
        assert_eq!(session.hasher().finish(), Digest::of(Algorithm::Sha256, b"0123456789"));
    }

    #[test]
    fn states_from_before_a_reboot_are_not_believed() {
        let (root, storage) = storage();
        let id = left_behind(&storage, b"0123456789", 8);
        let dir = storage.layout.upload(&repo(), id);
        drop(storage);
        // The power went, and with it a page that was acknowledged but not synced.
        fs::write(dir.join("data"), b"01\0\0\0\0\0\089").unwrap();
        fs::write(dir.join(BOOT_FILE), "an earlier boot").unwrap();
        let storage = Storage::open(root.path(), Grace::default()).unwrap();
        let session = storage.open_upload(&repo(), id).unwrap().unwrap();
        assert_eq!(session.hasher().finish(), Digest::of(Algorithm::Sha256, b"01\0\0\0\0\0\0"));
        let digest = Digest::of(Algorithm::Sha256, b"01234567");
        assert!(matches!(storage.commit_upload(session, &digest), Err(UploadError::Digest { .. })));
        assert!(!dir.exists());
    }

    #[test]
    fn sessions_without_bytes_are_bounded_in_memory_and_outlive_an_orderly_end() {
        let (root, storage) = storage();
        let first = storage.begin_upload(&repo(), Algorithm::Sha512).unwrap();
        for _ in 0..PENDING_SESSIONS_MAX {
            storage.begin_upload(&repo(), Algorithm::Sha256).unwrap();
        }
        assert_eq!(lock(&storage.uploads.pending).sessions.len(), PENDING_SESSIONS_MAX);
        assert!(storage.layout.upload(&repo(), first).is_dir());
        storage.keep_pending_uploads();
        drop(storage);
        let storage = Storage::open(root.path(), Grace::default()).unwrap();
        let session = storage.open_upload(&repo(), first).unwrap().unwrap();
        assert_eq!(session.hasher().algorithm(), Algorithm::Sha512);
    }

    #[test]
    fn times_are_written_as_distribution_does() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_700_000_000, "2023-11-14T22:13:20Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
