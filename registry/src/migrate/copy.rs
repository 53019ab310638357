//! Copies blobs, manifests and tags from one store into another.
//!
//! What is there already is not copied again, so whoever is interrupted begins anew and finds what is done. A large blob is
//! copied by an upload session that whoever copies the same blob finds, so it goes on in its middle.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use bytes::BytesMut;
use futures_util::StreamExt;
use tokio::runtime::Handle;
use uuid::Uuid;

use super::served::Change;
use crate::digest::Digest;
use crate::lock;
use crate::model::{self, Checked};
use crate::names::{Reference, RepoName, Tag};
use crate::rules::Rules;
use crate::store::{
    ChangeError, Ending, Error, Kind, Manifest, Result, Session, Store, UploadError, session_id,
};

/// Blobs up to this are held in memory on their way.
const SMALL_BYTES_MAX: u64 = 64 << 10;
/// How much of a blob is copied before it is put away for good; a multiple of usual parts of uploads to S3.
const CHUNK_BYTES: u64 = 256 << 20;
/// Blobs of which it is remembered which repository of the target has them.
const PLACED_MAX: usize = 100_000;
/// Manifests inside manifests inside manifests.
const DEPTH_MAX: u32 = 8;
/// Damaged blobs that are remembered.
const DAMAGED_MAX: usize = 10_000;

/// What was done so far.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) repositories: AtomicU64,
    pub(crate) blobs: AtomicU64,
    /// Of the blobs, as they are read.
    pub(crate) bytes: AtomicU64,
    pub(crate) manifests: AtomicU64,
    pub(crate) tags: AtomicU64,
    /// Blobs, manifests and tags that the target had and the source has not.
    pub(crate) removed: AtomicU64,
}

/// Copies from one store to another. All methods block, on threads that are not a runtime's.
pub(crate) struct Copier<'a> {
    pub(crate) from: &'a Arc<dyn Store>,
    pub(crate) to: &'a Arc<dyn Store>,
    pub(crate) counts: &'a Counts,
    stop: &'a AtomicBool,
    /// Why all is to stop, other than by `stop`.
    halted: Mutex<Option<Error>>,
    /// Let anything be sparse, and change.
    rules: Rules,
    handle: Handle,
    /// Which repository of the target has a blob.
    placed: Mutex<HashMap<Digest, RepoName>>,
    flights: Flights,
    damaged: Mutex<BTreeMap<Digest, RepoName>>,
}

/// Copies one blob, for one who waits.
pub(super) fn blob(
    from: &Arc<dyn Store>,
    to: &Arc<dyn Store>,
    repo: &RepoName,
    digest: &Digest,
) -> Result<()> {
    let (counts, stop) = (Counts::default(), AtomicBool::default());
    let copier = Copier::new(from, to, &counts, &stop);
    copier.blob(repo, digest)?;
    match copier.damaged().is_empty() {
        true => Ok(()),
        false => Err(Error::other(&format!("the blob {digest} of {repo} is damaged"))),
    }
}

impl<'a> Copier<'a> {
    pub(crate) fn new(
        from: &'a Arc<dyn Store>,
        to: &'a Arc<dyn Store>,
        counts: &'a Counts,
        stop: &'a AtomicBool,
    ) -> Self {
        Self {
            from,
            to,
            counts,
            stop,
            halted: Mutex::default(),
            rules: Rules { sparse_manifests: "**".parse().into_iter().collect(), ..Rules::default() },
            handle: Handle::current(),
            placed: Mutex::default(),
            flights: Flights::default(),
            damaged: Mutex::default(),
        }
    }

    /// Why everything was to stop.
    pub(super) fn take_halt(&self) -> Option<Error> {
        lock(&self.halted).take()
    }

    /// The blobs of the source that are not what their digests say, each with a repository that has it.
    pub(crate) fn damaged(&self) -> BTreeMap<Digest, RepoName> {
        lock(&self.damaged).clone()
    }

    /// Has everything stop for a reason.
    pub(super) fn halt(&self, why: Error) {
        lock(&self.halted).get_or_insert(why);
    }

    /// Whether a repository of the target has got a blob by this copier.
    pub(super) fn is_placed(&self, repo: &RepoName, digest: &Digest) -> bool {
        lock(&self.placed).get(digest) == Some(repo)
    }

    /// Fails if all is to stop.
    pub(crate) fn check(&self) -> Result<()> {
        if lock(&self.halted).is_some() {
            return Err(interrupted());
        }
        match self.stop.load(Ordering::Relaxed) {
            true => Err(interrupted()),
            false => Ok(()),
        }
    }

    /// Makes the target like the source in one point.
    pub(crate) fn change(&self, change: &Change) -> Result<()> {
        self.check()?;
        match change {
            Change::Blob(repo, digest) => {
                if !self.blob(repo, digest)? && self.to.delete_blob(repo, digest)? {
                    count(&self.counts.removed, 1);
                }
            }
            Change::Manifest(repo, digest) => {
                if !self.manifest(repo, digest, 0)? {
                    self.remove(repo, &Reference::Digest(digest.clone()))?;
                }
            }
            Change::Tag(repo, tag) => {
                if !self.tag(repo, tag)? {
                    self.remove(repo, &Reference::Tag(tag.clone()))?;
                }
            }
            // Whoever goes through repositories does this.
            Change::Repository(_) => {}
        }
        Ok(())
    }

    /// Removes what the source does not have.
    pub(crate) fn remove(&self, repo: &RepoName, reference: &Reference) -> Result<()> {
        let removed = self.to.remove(repo, Some(reference), &self.rules).map_err(of_change)?;
        count(&self.counts.removed, removed.count);
        Ok(())
    }

    /// Copies a tag with all that it needs; returns whether the source has it.
    pub(crate) fn tag(&self, repo: &RepoName, tag: &Tag) -> Result<bool> {
        let reference = Reference::Tag(tag.clone());
        let Some(manifest) = self.from.find_manifest(repo, &reference)? else { return Ok(false) };
        let there = self.to.find_manifest(repo, &reference)?;
        if there.is_none_or(|there| there.digest != manifest.digest) {
            // By itself, so that it is counted once.
            self.manifest(repo, &manifest.digest, 0)?;
            self.place(repo, manifest, std::slice::from_ref(tag), 0)?;
            count(&self.counts.tags, 1);
        }
        Ok(true)
    }

    /// Copies a manifest with all that it needs; returns whether the source has it.
    fn manifest(&self, repo: &RepoName, digest: &Digest, depth: u32) -> Result<bool> {
        let reference = Reference::Digest(digest.clone());
        if self.to.find_manifest(repo, &reference)?.is_some() {
            return self.from.find_manifest(repo, &reference).map(|there| there.is_some());
        }
        let Some(manifest) = self.from.find_manifest(repo, &reference)? else { return Ok(false) };
        self.place(repo, manifest, &[], depth)?;
        count(&self.counts.manifests, 1);
        Ok(true)
    }

    fn place(&self, repo: &RepoName, manifest: Manifest, tags: &[Tag], depth: u32) -> Result<()> {
        self.check()?;
        // What distribution has taken and we would not is served as it is, and so it is copied.
        let checked = model::check(&manifest.bytes, None).unwrap_or_else(|_| Checked {
            media_type: manifest.media_type.to_string(),
            blobs: Vec::new(),
            manifests: Vec::new(),
            subject: model::subject_of(&manifest.bytes),
            warning: None,
        });
        for blob in &checked.blobs {
            self.blob(repo, blob)?;
        }
        if depth < DEPTH_MAX {
            for inner in &checked.manifests {
                self.manifest(repo, inner, depth + 1)?;
            }
        }
        self.to.accept_manifest(repo, manifest, &checked, tags, &self.rules).map_err(of_change)?;
        Ok(())
    }

    /// Copies a blob; returns whether the source has it.
    pub(crate) fn blob(&self, repo: &RepoName, digest: &Digest) -> Result<bool> {
        let Some(length) = self.from.claim_blob(repo, digest)? else { return Ok(false) };
        let _flight = self.flights.take(digest);
        if self.to.claim_blob(repo, digest)? == Some(length) {
            self.remember(repo, digest);
            return Ok(true);
        }
        let other = lock(&self.placed).get(digest).cloned();
        if let Some(other) = other.filter(|other| other != repo)
            && self.to.mount_blob(&other, repo, digest)?.is_some()
        {
            count(&self.counts.blobs, 1);
            return Ok(true);
        }
        self.check()?;
        let copied = match length {
            ..=SMALL_BYTES_MAX => self.small(repo, digest),
            _ => self.large(repo, digest, length),
        };
        match copied {
            Ok(true) => {
                count(&self.counts.blobs, 1);
                self.remember(repo, digest);
                Ok(true)
            }
            // It went meanwhile.
            Ok(false) => Ok(false),
            Err(UploadError::Digest { .. }) => {
                let mut damaged = lock(&self.damaged);
                if damaged.len() < DAMAGED_MAX {
                    damaged.insert(digest.clone(), repo.clone());
                }
                Ok(true)
            }
            Err(UploadError::Busy) => {
                Err(Error::other(&format!("somebody else copies the blob {digest} of {repo} just now")))
            }
            Err(UploadError::Store(error)) => Err(error),
        }
    }

    fn remember(&self, repo: &RepoName, digest: &Digest) {
        let mut placed = lock(&self.placed);
        if placed.len() >= PLACED_MAX {
            placed.clear();
        }
        placed.insert(digest.clone(), repo.clone());
    }

    fn small(&self, repo: &RepoName, digest: &Digest) -> Result<bool, UploadError> {
        let Some(blob) = Arc::clone(self.from).open_blob(repo, digest)? else { return Ok(false) };
        let length = blob.length();
        let body = self.handle.block_on(async {
            let (mut body, mut stream) = (BytesMut::new(), blob.read(0, length));
            while let Some(bytes) = stream.next().await {
                body.extend_from_slice(&bytes?);
            }
            Ok(body)
        });
        let body = body.map_err(|error| unreadable(repo, digest, error))?;
        count(&self.counts.bytes, length);
        let session = Arc::clone(self.to).start_upload(repo, digest.algorithm())?;
        session.commit_small(&body, digest)?;
        Ok(true)
    }

    fn large(&self, repo: &RepoName, digest: &Digest, length: u64) -> Result<bool, UploadError> {
        let mut session = match length {
            ..=CHUNK_BYTES => Arc::clone(self.to).start_upload(repo, digest.algorithm())?,
            _ => self.session_of(repo, digest)?,
        };
        session.admit(Some(length.saturating_sub(session.offset())), Some(digest))?;
        while session.offset() < length {
            let first = session.offset();
            let end = length.min(first.saturating_add(CHUNK_BYTES));
            let Some(blob) = Arc::clone(self.from).open_blob(repo, digest)? else {
                session.cancel()?;
                return Ok(false);
            };
            let mut intake = session.receive(end.saturating_sub(first), Some(digest))?;
            let done = if end == length { Ending::Committed } else { Ending::Acknowledged };
            let (poured, ending) = self.handle.block_on(async {
                let mut stream = blob.read(first, end);
                while let Some(bytes) = stream.next().await {
                    let bytes = match bytes {
                        Ok(bytes) => bytes,
                        Err(error) => return (Err(unreadable(repo, digest, error)), Ending::BrokenOff),
                    };
                    if let Err(stopped) = self.check() {
                        return (Err(stopped), Ending::BrokenOff);
                    }
                    count(&self.counts.bytes, bytes.len() as u64);
                    // Why it takes no more it tells at the end.
                    if intake.push(bytes).await.is_err() {
                        break;
                    }
                }
                (Ok(()), done)
            });
            session = self.handle.block_on(intake.end(ending))?;
            poured?;
        }
        session.commit(digest)?;
        Ok(true)
    }

    /// Opens the session by which a blob is copied, also after a crash, or begins it.
    fn session_of(&self, repo: &RepoName, digest: &Digest) -> Result<Box<dyn Session>, UploadError> {
        let id = session_id(repo, digest.as_str());
        if let Some(session) = self.open(repo, id)? {
            return Ok(session);
        }
        self.to.begin_upload_as(repo, id, digest.algorithm())?;
        self.open(repo, id)?.ok_or_else(|| Error::other("an upload that was just begun is gone").into())
    }

    fn open(&self, repo: &RepoName, id: Uuid) -> Result<Option<Box<dyn Session>>, UploadError> {
        Arc::clone(self.to).open_upload(repo, id)
    }
}

fn interrupted() -> Error {
    Error::new("stopped before the end; the same again goes on", io::ErrorKind::Interrupted.into())
}

fn unreadable(repo: &RepoName, digest: &Digest, error: io::Error) -> Error {
    Error::new(format!("cannot read the blob {digest} of {repo}"), error)
}

fn of_change(error: ChangeError) -> Error {
    match error {
        ChangeError::Store(error) => error,
        // There are no rules against it, and anything may be sparse.
        error => Error::of(Kind::Other, "the target refuses a manifest", error),
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// The blobs that are just being copied, each by one thread.
#[derive(Debug, Default)]
struct Flights {
    digests: Mutex<HashSet<Digest>>,
    landed: Condvar,
}

struct Flight<'a> {
    flights: &'a Flights,
    digest: &'a Digest,
}

impl Flights {
    fn take<'a>(&'a self, digest: &'a Digest) -> Flight<'a> {
        let mut digests = lock(&self.digests);
        while !digests.insert(digest.clone()) {
            digests = self.landed.wait(digests).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        Flight { flights: self, digest }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        lock(&self.flights.digests).remove(self.digest);
        self.flights.landed.notify_all();
    }
}
