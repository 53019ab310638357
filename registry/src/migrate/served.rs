//! The store that requests see, which may become another one while they go on.
//!
//! ```text
//!  reads ───────────────────────────> first, or next once there is one
//!  changes ──> gate ──> the same ──> noted for those who copy
//!                └── closed: wait until it opens, and go on with what there is then
//!
//!  a session that was begun in the first ──> commit ──> first ──> copied to next
//! ```

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use uuid::Uuid;

use super::copy;
use crate::digest::{Algorithm, Digest};
use crate::lock;
use crate::model::Checked;
use crate::names::{Reference, RepoName, Tag};
use crate::rules::Rules;
use crate::store::{
    Blob, ChangeError, Content, Ending, Error, Intake, Kind, Manifest, Page, Removed, Result, Session, Stats,
    Stopped, Store, UploadError, collect,
};

/// Changes that wait at a closed gate; each holds a thread.
const WAITING_MAX: usize = 64;
/// How long one waits before its client is told to come again.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long it is waited for changes that are under way, before a gate is closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(120);
/// Changes that are remembered for one who copies; when there are more, everything counts as changed.
const CHANGES_MAX: usize = 100_000;

/// A store that may become another.
#[derive(Debug)]
pub(crate) struct Served {
    first: Arc<dyn Store>,
    /// What has taken its place.
    next: OnceLock<Arc<dyn Store>>,
    gate: Gate,
    observers: Mutex<Vec<Weak<Changes>>>,
}

/// Something that may be otherwise than it was; in the order in which it is copied.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Change {
    Blob(RepoName, Digest),
    Manifest(RepoName, Digest),
    Tag(RepoName, Tag),
    /// All tags and manifests.
    Repository(RepoName),
}

/// What has changed since it was last asked.
#[derive(Debug, Default)]
pub(crate) struct Changes(Mutex<Noted>);

#[derive(Debug, Default)]
pub(crate) struct Noted {
    pub(crate) changes: BTreeSet<Change>,
    /// Whether there was more than can be told.
    pub(crate) is_all: bool,
    /// When the oldest was noted.
    pub(crate) since: Option<Instant>,
}

impl Changes {
    pub(crate) fn take(&self) -> Noted {
        std::mem::take(&mut *lock(&self.0))
    }

    /// Puts back what could not be done yet.
    pub(crate) fn put_back(&self, noted: Noted) {
        let mut known = lock(&self.0);
        known.is_all |= noted.is_all;
        known.since = match (known.since, noted.since) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        known.changes.extend(noted.changes);
        known.bound();
    }

    /// How many there are, and when the oldest was noted.
    pub(crate) fn pending(&self) -> (usize, Option<Instant>) {
        let known = lock(&self.0);
        (known.changes.len().saturating_add(known.is_all.into()), known.since)
    }
}

impl Noted {
    fn bound(&mut self) {
        if self.changes.len() > CHANGES_MAX {
            self.changes.clear();
            self.is_all = true;
        }
    }
}

/// Lets changes through, or not.
#[derive(Debug, Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    inside: usize,
    waiting: usize,
    is_closed: bool,
}

/// A change that is let through.
struct Inside<'a>(&'a Gate);

/// A closed gate; open again when it is dropped.
pub(crate) struct Closed<'a>(&'a Gate);

impl Gate {
    fn enter(&self) -> Result<Inside<'_>> {
        let mut state = lock(&self.state);
        if state.is_closed {
            let busy = |why: &str| Err(Error::of(Kind::Unavailable, "the registry is being moved", why));
            if state.waiting >= WAITING_MAX {
                return busy("too many wait for that already; try again in a minute");
            }
            state.waiting += 1;
            let waited = self.changed.wait_timeout_while(state, WAIT_TIMEOUT, |state| state.is_closed);
            state = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
            state.waiting -= 1;
            if state.is_closed {
                return busy("it takes longer than a change may wait; try again in a minute");
            }
        }
        state.inside += 1;
        Ok(Inside(self))
    }

    fn close(&self) -> Result<Closed<'_>> {
        let mut state = lock(&self.state);
        if state.is_closed {
            return Err(Error::other("the registry is being moved already"));
        }
        state.is_closed = true;
        let closed = Closed(self);
        let waited = self.changed.wait_timeout_while(state, CLOSE_TIMEOUT, |state| state.inside > 0);
        let state = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        let is_empty = state.inside == 0;
        drop(state);
        match is_empty {
            true => Ok(closed),
            false => Err(Error::other("a change that is under way does not come to its end")),
        }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).inside -= 1;
        self.0.changed.notify_all();
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).is_closed = false;
        self.0.changed.notify_all();
    }
}

impl Served {
    pub(crate) fn new(first: Arc<dyn Store>) -> Self {
        Self { first, next: OnceLock::new(), gate: Gate::default(), observers: Mutex::default() }
    }

    /// The store that has the content now.
    pub(crate) fn current(&self) -> &Arc<dyn Store> {
        self.next.get().unwrap_or(&self.first)
    }

    pub(crate) fn has_moved(&self) -> bool {
        self.next.get().is_some()
    }

    /// Tells of all changes from now on, as long as it is kept.
    pub(crate) fn observe(&self) -> Arc<Changes> {
        let changes = Arc::new(Changes::default());
        let mut observers = lock(&self.observers);
        observers.retain(|observer| observer.strong_count() > 0);
        observers.push(Arc::downgrade(&changes));
        changes
    }

    /// Lets no change of this process begin, and waits until those that have begun have ended, and are noted.
    ///
    /// # Errors
    /// When that takes too long, or somebody else has closed it.
    pub(crate) fn close_gate(&self) -> Result<Closed<'_>> {
        self.gate.close()
    }

    /// Has all go to another store from now on; the gate is closed.
    ///
    /// # Errors
    /// When that was done before.
    pub(crate) fn switch(&self, _: &Closed<'_>, next: Arc<dyn Store>) -> Result<()> {
        self.next.set(next).map_err(|_| super::moved_before())
    }

    fn note(&self, changes: impl IntoIterator<Item = Change>) {
        let observers: Vec<_> = lock(&self.observers).iter().filter_map(Weak::upgrade).collect();
        if observers.is_empty() {
            return;
        }
        let changes: Vec<_> = changes.into_iter().collect();
        for observer in observers {
            let mut known = lock(&observer.0);
            known.since.get_or_insert_with(Instant::now);
            known.changes.extend(changes.iter().cloned());
            known.bound();
        }
    }

    fn note_all(&self) {
        for observer in lock(&self.observers).iter().filter_map(Weak::upgrade) {
            let mut known = lock(&observer.0);
            known.since.get_or_insert_with(Instant::now);
            known.is_all = true;
        }
    }

    /// The session's store is `of`.
    fn guarded(
        self: Arc<Self>,
        session: Box<dyn Session>,
        repo: &RepoName,
        of: &Arc<dyn Store>,
    ) -> Box<dyn Session> {
        let is_of_first = Arc::ptr_eq(of, &self.first);
        Box::new(Guarded { served: self, session, repo: repo.clone(), is_of_first })
    }
}

impl Store for Served {
    fn is_remote(&self) -> bool {
        self.current().is_remote()
    }

    fn claim_blob(&self, repo: &RepoName, digest: &Digest) -> Result<Option<u64>> {
        self.current().claim_blob(repo, digest)
    }

    fn claim_without_blocking(
        self: Arc<Self>,
        repo: RepoName,
        digest: Digest,
    ) -> Option<BoxFuture<'static, Result<Option<u64>>>> {
        Arc::clone(self.current()).claim_without_blocking(repo, digest)
    }

    fn open_blob(self: Arc<Self>, repo: &RepoName, digest: &Digest) -> Result<Option<Box<dyn Blob>>> {
        Arc::clone(self.current()).open_blob(repo, digest)
    }

    fn locate_blob(&self, repo: &RepoName, digest: &Digest, lasts: Duration) -> Result<Option<String>> {
        self.current().locate_blob(repo, digest, lasts)
    }

    fn find_manifest(&self, repo: &RepoName, reference: &Reference) -> Result<Option<Manifest>> {
        self.current().find_manifest(repo, reference)
    }

    fn begin_upload(&self, repo: &RepoName, algorithm: Algorithm) -> Result<Uuid> {
        self.current().begin_upload(repo, algorithm)
    }

    fn begin_upload_as(&self, repo: &RepoName, id: Uuid, algorithm: Algorithm) -> Result<()> {
        self.current().begin_upload_as(repo, id, algorithm)
    }

    fn start_upload(
        self: Arc<Self>,
        repo: &RepoName,
        algorithm: Algorithm,
    ) -> Result<Box<dyn Session>, UploadError> {
        let store = Arc::clone(self.current());
        let session = Arc::clone(&store).start_upload(repo, algorithm)?;
        Ok(self.guarded(session, repo, &store))
    }

    fn has_room(&self, repo: &RepoName, bytes: u64) -> Result<()> {
        self.current().has_room(repo, bytes)
    }

    fn chunk_bytes_min(&self) -> u64 {
        self.current().chunk_bytes_min()
    }

    fn opens_quickly(&self, id: Uuid) -> bool {
        self.current().opens_quickly(id)
    }

    fn open_upload(
        self: Arc<Self>,
        repo: &RepoName,
        id: Uuid,
    ) -> Result<Option<Box<dyn Session>>, UploadError> {
        // What was begun before all moved is gone on with where it is.
        for store in [self.current(), &self.first].map(Arc::clone) {
            if let Some(session) = Arc::clone(&store).open_upload(repo, id)? {
                return Ok(Some(self.guarded(session, repo, &store)));
            }
            if !self.has_moved() {
                break;
            }
        }
        Ok(None)
    }

    fn upload_offset(&self, repo: &RepoName, id: Uuid) -> Result<Option<u64>> {
        match self.current().upload_offset(repo, id)? {
            None if self.has_moved() => self.first.upload_offset(repo, id),
            offset => Ok(offset),
        }
    }

    fn upload_note(&self, repo: &RepoName, id: Uuid) -> Result<Option<String>> {
        match self.current().upload_note(repo, id)? {
            None if self.has_moved() => self.first.upload_note(repo, id),
            note => Ok(note),
        }
    }

    fn mount_blob(&self, from: &RepoName, to: &RepoName, digest: &Digest) -> Result<Option<u64>> {
        let _inside = self.gate.enter()?;
        let mounted = self.current().mount_blob(from, to, digest);
        self.note([Change::Blob(to.clone(), digest.clone())]);
        mounted
    }

    fn delete_blob(&self, repo: &RepoName, digest: &Digest) -> Result<bool> {
        let _inside = self.gate.enter()?;
        let deleted = self.current().delete_blob(repo, digest);
        self.note([Change::Blob(repo.clone(), digest.clone())]);
        deleted
    }

    fn accept_manifest(
        &self,
        repo: &RepoName,
        manifest: Manifest,
        checked: &Checked,
        tags: &[Tag],
        rules: &Rules,
    ) -> Result<Vec<Digest>, ChangeError> {
        let _inside = self.gate.enter()?;
        let digest = manifest.digest.clone();
        let accepted = self.current().accept_manifest(repo, manifest, checked, tags, rules);
        // Also when it failed: some of it may be there.
        let tags = tags.iter().map(|tag| Change::Tag(repo.clone(), tag.clone()));
        self.note(tags.chain([Change::Manifest(repo.clone(), digest)]));
        accepted
    }

    fn remove(
        &self,
        repo: &RepoName,
        reference: Option<&Reference>,
        rules: &Rules,
    ) -> Result<Removed, ChangeError> {
        let _inside = self.gate.enter()?;
        let removed = self.current().remove(repo, reference, rules);
        self.note([match (reference, &removed) {
            (Some(Reference::Tag(tag)), _) => Change::Tag(repo.clone(), tag.clone()),
            // Its tags go with it wherever it is removed.
            (Some(Reference::Digest(digest)), Ok(_)) => Change::Manifest(repo.clone(), digest.clone()),
            _ => Change::Repository(repo.clone()),
        }]);
        removed
    }

    fn tags(&self, repo: &RepoName, after: Option<&str>, limit: usize) -> Result<Option<Page>> {
        self.current().tags(repo, after, limit)
    }

    fn repositories(&self, after: Option<&str>, limit: usize) -> Result<Page> {
        self.current().repositories(after, limit)
    }

    fn digests(
        &self,
        repo: &RepoName,
        of: Content,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Digest>> {
        self.current().digests(repo, of, after, limit)
    }

    fn referrers(
        &self,
        repo: &RepoName,
        subject: &Digest,
        after: Option<&Digest>,
        visit: &mut dyn FnMut(&Manifest) -> ControlFlow<()>,
    ) -> Result<()> {
        self.current().referrers(repo, subject, after, visit)
    }

    fn collect(
        &self,
        options: &collect::Options,
        counts: &collect::Counts,
        stop: &AtomicBool,
    ) -> Result<Option<()>> {
        let collected = self.current().collect(options, counts, stop);
        if !options.dry_run && !matches!(collected, Ok(None)) {
            self.note_all();
        }
        collected
    }

    fn freeze(&self, lasts: Duration) -> Result<()> {
        self.current().freeze(lasts)
    }

    fn note_moved(&self, to: Option<&str>) -> Result<()> {
        self.current().note_moved(to)
    }

    fn moved(&self) -> Result<Option<String>> {
        self.current().moved()
    }

    fn probe(&self) -> Result<()> {
        self.current().probe()
    }

    fn stats(&self) -> Stats {
        self.current().stats()
    }

    fn close(&self) {
        self.first.close();
        if let Some(next) = self.next.get() {
            next.close();
        }
    }
}

/// A session whose commit is a change.
struct Guarded {
    served: Arc<Served>,
    session: Box<dyn Session>,
    repo: RepoName,
    /// Whether the session is in the store that was there first.
    is_of_first: bool,
}

impl Guarded {
    fn commit_by(
        self,
        expected: &Digest,
        commit: impl FnOnce(Box<dyn Session>) -> Result<(), UploadError>,
    ) -> Result<(), UploadError> {
        let Self { served, session, repo, is_of_first } = self;
        let inside = served.gate.enter()?;
        let committed = commit(session);
        served.note([Change::Blob(repo.clone(), expected.clone())]);
        let next = served.next.get().filter(|_| is_of_first);
        // Reading it again may take long, and what comes into the next store changes nothing that is copied.
        drop(inside);
        committed?;
        match next {
            Some(next) => Ok(copy::blob(&served.first, next, &repo, expected)?),
            None => Ok(()),
        }
    }
}

impl Session for Guarded {
    fn id(&self) -> Uuid {
        self.session.id()
    }

    fn offset(&self) -> u64 {
        self.session.offset()
    }

    fn is_fresh(&self) -> bool {
        self.session.is_fresh()
    }

    fn admits_quickly(&self) -> bool {
        self.session.admits_quickly()
    }

    fn admit(&mut self, length: Option<u64>, digest: Option<&Digest>) -> Result<()> {
        self.session.admit(length, digest)
    }

    fn leave_note(&mut self, note: String) {
        self.session.leave_note(note);
    }

    fn receive(
        self: Box<Self>,
        length: u64,
        digest: Option<&Digest>,
    ) -> Result<Box<dyn Intake>, UploadError> {
        let Self { served, session, repo, is_of_first } = *self;
        let intake = session.receive(length, digest)?;
        Ok(Box::new(Receiving { served, intake, repo, is_of_first }))
    }

    fn commit(self: Box<Self>, expected: &Digest) -> Result<(), UploadError> {
        self.commit_by(expected, |session| session.commit(expected))
    }

    fn commit_small(self: Box<Self>, body: &[u8], expected: &Digest) -> Result<(), UploadError> {
        self.commit_by(expected, |session| session.commit_small(body, expected))
    }

    fn cancel(self: Box<Self>) -> Result<(), UploadError> {
        self.session.cancel()
    }
}

/// Such a session that bytes are coming into.
struct Receiving {
    served: Arc<Served>,
    intake: Box<dyn Intake>,
    repo: RepoName,
    is_of_first: bool,
}

impl Intake for Receiving {
    fn push(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), Stopped>> {
        self.intake.push(bytes)
    }

    fn end(self: Box<Self>, ending: Ending) -> BoxFuture<'static, Result<Box<dyn Session>, UploadError>> {
        let Self { served, intake, repo, is_of_first } = *self;
        Box::pin(async move {
            let session = intake.end(ending).await?;
            Ok(Box::new(Guarded { served, session, repo, is_of_first }) as Box<dyn Session>)
        })
    }
}
