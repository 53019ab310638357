//! What keeps the bytes of a registry, as the API sees it.
//!
//! ```text
//!   api/, tasks, server ── App::ask, blocking
//!                │
//!              Store ──┬── open_blob ───────> Blob ─── read ──> the bytes, as a stream
//!                      ├── start, open ─────> Session ── receive ──> Intake ── push* ── end ──> Session ── commit
//!                      ├── find_manifest, tags, repositories, referrers
//!                      ├── accept_manifest, mount_blob, delete_blob, remove
//!                      └── collect, stats, probe, close
//!                ^
//!          storage/: a directory           `conformance` holds every implementation to the same promises
//! ```
//!
//! The operations are those of the API and not those of a filesystem: each implementation does them its own way, with its own
//! means against what happens at the same time (`docs/decisions/0004-a-registry-in-a-bucket.md`). Nothing here knows HTTP.
//!
//! What every implementation keeps:
//!
//! - *Durable*: what a change has done outlives the process and the machine when the method returns, but for the bytes of a
//!   session, which outlive the process.
//! - *Whole*: nobody sees a part of a blob, a manifest or a tag, also after a crash in the middle. A tag is seen only when all
//!   that its manifest was found to refer to is there.
//! - *At once*: what a method has done is seen by everyone who asks after it has returned.
//! - *Kept*: what an accepted manifest refers to stays as long as the manifest does, whatever is collected meanwhile.
//!
//! Methods block unless they say that they do not. Where [`Store::is_remote`] is false, those that say that they are *quick* may
//! be called on an async thread. All are called on a thread of a Tokio runtime, or one of its blocking threads.

pub(crate) mod collect;
#[cfg(test)]
pub(crate) mod conformance;
mod error;

use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

pub(crate) use error::{ChangeError, Error, Kind, Result, UploadError};

use crate::digest::{Algorithm, Digest};
use crate::model::Checked;
use crate::names::{Reference, RepoName, Tag};
use crate::rules::Rules;
use crate::storage::quota;

/// Largest manifest, bytes (distribution-spec: registries should take at least 4 MiB).
pub(crate) const MANIFEST_BYTES_MAX: usize = 4 << 20;

/// Longest note that a client leaves with a session, bytes.
pub(crate) const NOTE_BYTES_MAX: usize = 8 << 10;

/// The id of the one session of a repository that goes by `name`, for who must find it again without a note.
pub(crate) fn session_id(repo: &RepoName, name: &str) -> Uuid {
    let mut hasher = Sha256::new();
    hasher.update(repo.as_str());
    hasher.update([0]);
    hasher.update(name);
    let mut id = [0; 16];
    id.iter_mut().zip(hasher.finalize()).for_each(|(to, from)| *to = from);
    uuid::Builder::from_custom_bytes(id).into_uuid()
}

/// What keeps the blobs, manifests, tags and uploads of a registry.
pub(crate) trait Store: fmt::Debug + Send + Sync {
    /// Tells whether each question is a request to another machine, so that none belongs on an async thread.
    fn is_remote(&self) -> bool;

    /// Finds a blob of a repository and tells its length. Quick.
    ///
    /// It is for one who will build on it: the blob stays for at least half of the grace period, so that the manifest that
    /// refers to it can be pushed.
    fn claim_blob(&self, repo: &RepoName, digest: &Digest) -> Result<Option<u64>>;

    /// Does as [`Store::claim_blob`] without blocking; `None` where that is to be called.
    fn claim_without_blocking(
        self: Arc<Self>,
        _repo: RepoName,
        _digest: Digest,
    ) -> Option<BoxFuture<'static, Result<Option<u64>>>> {
        None
    }

    /// Opens a blob of a repository. Quick.
    fn open_blob(self: Arc<Self>, repo: &RepoName, digest: &Digest) -> Result<Option<Box<dyn Blob>>>;

    /// Tells where whoever has the URL can get a blob of a repository for so long, without us; `None` if the repository has no such
    /// blob, or it is to be had from us alone.
    fn locate_blob(&self, repo: &RepoName, digest: &Digest, lasts: Duration) -> Result<Option<String>>;

    /// Reads the manifest that a reference names in a repository. Quick.
    ///
    /// # Errors
    /// Also when the bytes are not those of the digest: a damaged manifest is never handed out.
    fn find_manifest(&self, repo: &RepoName, reference: &Reference) -> Result<Option<Manifest>>;

    /// Begins a session that another request will go on with. `algorithm` is the hash its bytes will be run through. Quick.
    ///
    /// A session without bytes may be forgotten with the process, unless that ends by [`Store::close`].
    fn begin_upload(&self, repo: &RepoName, algorithm: Algorithm) -> Result<Uuid>;

    /// Begins a session of this id, which nobody else has, for one who must find it again without a note.
    fn begin_upload_as(&self, repo: &RepoName, id: Uuid, algorithm: Algorithm) -> Result<()>;

    /// Begins a session that the same request ends. Quick.
    fn start_upload(
        self: Arc<Self>,
        repo: &RepoName,
        algorithm: Algorithm,
    ) -> Result<Box<dyn Session>, UploadError>;

    /// Fails if there is no room for so many more bytes in a repository. None are held: of several who ask, each may be told that
    /// there is room for theirs alone.
    ///
    /// # Errors
    /// When the quota or the free space does not leave so many; see [`Error::exceeded`] and [`Error::is_full`].
    fn has_room(&self, repo: &RepoName, bytes: u64) -> Result<()>;

    /// Bytes of a chunk that clients are asked for at least; shorter ones are taken as well, but cost more than they need. Does not
    /// block.
    fn chunk_bytes_min(&self) -> u64;

    /// Tells whether [`Store::open_upload`] is quick for this session. Does not block.
    fn opens_quickly(&self, id: Uuid) -> bool;

    /// Takes hold of a session; `None` if the repository has none of this id. It is free again when it is dropped.
    ///
    /// # Errors
    /// [`UploadError::Busy`] when another request holds it. Where several processes serve one store, it may also come later: of two
    /// that change a session each on its own, one succeeds, and the other is told so by the method that would.
    fn open_upload(
        self: Arc<Self>,
        repo: &RepoName,
        id: Uuid,
    ) -> Result<Option<Box<dyn Session>>, UploadError>;

    /// Tells how many bytes of a session are acknowledged, also while a request works on it.
    fn upload_offset(&self, repo: &RepoName, id: Uuid) -> Result<Option<u64>>;

    /// Reads what the client left with a session; see [`Session::leave_note`].
    fn upload_note(&self, repo: &RepoName, id: Uuid) -> Result<Option<String>>;

    /// Gives `to` a blob that `from` has, and returns its length; `None` if `from` lacks it, or is about to lose it.
    ///
    /// # Errors
    /// Also when the quota of `to` leaves no room; see [`Error::exceeded`].
    fn mount_blob(&self, from: &RepoName, to: &RepoName, digest: &Digest) -> Result<Option<u64>>;

    /// Takes a blob from a repository, whether or not a manifest refers to it; other repositories keep it. Returns whether it was
    /// there.
    fn delete_blob(&self, repo: &RepoName, digest: &Digest) -> Result<bool>;

    /// Stores a manifest if the repository has all that `checked` says it refers to, and then lets the tags name it. Returns what
    /// is missing where `rules` let manifests be sparse.
    ///
    /// That the repository has it, and that it stays, is one promise: nothing that is collected meanwhile comes between the look
    /// and the manifest. A tag that never changes, by `rules`, is placed only if there is none of its name, or it names the same
    /// manifest, also when two push it at once: one of them then gets [`ChangeError::Immutable`], and of its other tags some may
    /// have been placed. Until a tag is placed, it names what it named before.
    ///
    /// # Errors
    /// [`ChangeError::Missing`] and [`ChangeError::Immutable`], with nothing changed but what is said above; those of the store.
    fn accept_manifest(
        &self,
        repo: &RepoName,
        manifest: Manifest,
        checked: &Checked,
        tags: &[Tag],
        rules: &Rules,
    ) -> Result<Vec<Digest>, ChangeError>;

    /// Removes a tag, but not what it names; a manifest and the tags that name it; or, without a reference, all tags and
    /// manifests of a repository.
    ///
    /// # Errors
    /// [`ChangeError::Immutable`] if a tag would go that never does, by `rules`; nothing is removed then. No tag that is put at the
    /// same time, and that never changes, is left naming what is gone.
    fn remove(
        &self,
        repo: &RepoName,
        reference: Option<&Reference>,
        rules: &Rules,
    ) -> Result<Removed, ChangeError>;

    /// Lists up to `limit` tags behind `after`, in lexical order; `None` if there is no such repository. What names nothing is left
    /// out.
    fn tags(&self, repo: &RepoName, after: Option<&str>, limit: usize) -> Result<Option<Page>>;

    /// Lists up to `limit` repositories behind `after`, in lexical order. One that has upload sessions alone is none yet.
    fn repositories(&self, after: Option<&str>, limit: usize) -> Result<Page>;

    /// Lists up to `limit` digests of what a repository has of one kind, behind `after`, in their order. There are more if it is
    /// so many.
    fn digests(
        &self,
        repo: &RepoName,
        of: Content,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Digest>>;

    /// Visits the manifests whose subject is `subject`, in the order of their digests and behind `after`, until it is told to stop.
    /// One that is damaged is left out, so that it does not hide the others; the log tells.
    fn referrers(
        &self,
        repo: &RepoName,
        subject: &Digest,
        after: Option<&Digest>,
        visit: &mut dyn FnMut(&Manifest) -> ControlFlow<()>,
    ) -> Result<()>;

    /// Removes garbage; `None` if a collection is running, here or elsewhere. May take hours.
    ///
    /// # Errors
    /// When `stop` is set, or the store fails; what was removed by then stays removed, and the next run goes on.
    fn collect(
        &self,
        options: &collect::Options,
        counts: &collect::Counts,
        stop: &AtomicBool,
    ) -> Result<Option<()>>;

    /// Lets nobody place or remove a link for so long, in whatever process. When it returns, all that was placed before can be seen.
    /// Said again before that is over, it lasts on.
    ///
    /// Where one process alone has the store open, that one sees to it, and nothing is done here.
    fn freeze(&self, lasts: Duration) -> Result<()>;

    /// Notes where the content has gone to, while it is frozen, so that nobody serves it from here any more; or, by `None`, that it
    /// is to be served from here.
    ///
    /// # Errors
    /// When the freeze was over before the note was there: then it is not there.
    fn note_moved(&self, to: Option<&str>) -> Result<()>;

    /// Tells where the content has gone to, if it has.
    fn moved(&self) -> Result<Option<String>>;

    /// Tells whether the store can be written just now: the readiness probe.
    fn probe(&self) -> Result<()>;

    /// Tells what is known without asking far: it is called on an async thread, also where [`Store::is_remote`] is true.
    fn stats(&self) -> Stats;

    /// Puts away what lives in memory, before the process ends; what cannot be is told in the log.
    fn close(&self);
}

/// A blob that is open: it can be read to its end, also when it is deleted meanwhile, or the reading fails.
pub(crate) trait Blob: Send {
    fn length(&self) -> u64;

    /// Reads from `first` up to `end`, which lie inside the blob. Nothing is read before the stream is asked.
    ///
    /// A stream that ends has brought every byte; one that cannot ends with an error.
    fn read(self: Box<Self>, first: u64, end: u64) -> BoxStream<'static, io::Result<Bytes>>;
}

/// An upload session held by one request. What is dropped before its end can be opened again, as it was when it last changed.
pub(crate) trait Session: Send {
    fn id(&self) -> Uuid;

    /// Bytes acknowledged, and hashed.
    fn offset(&self) -> u64;

    /// Whether nothing was taken into it yet, so that [`Session::commit_small`] can end it.
    fn is_fresh(&self) -> bool;

    /// Whether [`Session::admit`] takes no time worth mentioning. Does not block.
    fn admits_quickly(&self) -> bool;

    /// Makes room for what a request is about to bring, as far as it has told how much, and as which blob.
    ///
    /// # Errors
    /// When the quota or the free space does not leave so much; see [`Error::exceeded`] and [`Error::is_full`].
    fn admit(&mut self, length: Option<u64>, digest: Option<&Digest>) -> Result<()>;

    /// Keeps a text for the client that comes back to the session, in place of the one before. It is put away with what the
    /// next request brings, and not later than that.
    fn leave_note(&mut self, note: String);

    /// Begins to take in the body of one request, behind what is there. `length` is what the request announced, and 0 if it did
    /// not; `digest` is what the blob will be, if this request ends it.
    ///
    /// What an earlier request left behind [`Session::offset`] is dropped.
    fn receive(self: Box<Self>, length: u64, digest: Option<&Digest>)
    -> Result<Box<dyn Intake>, UploadError>;

    /// Turns the session into a blob of its repository. A blob that is there already, or comes at the same time, is the same.
    ///
    /// # Errors
    /// [`UploadError::Digest`] when the content is another; the session ends then, too. If the store fails, either the session can
    /// be opened again or it is gone, and the blob may be there.
    fn commit(self: Box<Self>, expected: &Digest) -> Result<(), UploadError>;

    /// Turns a fresh session, and a body held in memory, into a blob, as [`Session::commit`] does.
    fn commit_small(self: Box<Self>, body: &[u8], expected: &Digest) -> Result<(), UploadError>;

    /// Ends the session and throws its bytes away.
    fn cancel(self: Box<Self>) -> Result<(), UploadError>;
}

/// The receiving end of one request. Dropped before [`Intake::end`], it leaves the session with what it had, or with some of what
/// came.
pub(crate) trait Intake: Send {
    /// Takes bytes in, as fast as the store does. Does not block.
    ///
    /// # Errors
    /// When it takes no more; [`Intake::end`] then tells why.
    fn push(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), Stopped>>;

    /// Waits until all that came is taken in, and gives the session back. Does not block.
    ///
    /// # Errors
    /// When not all was taken in. If there was no room for it, what this request brought is taken back, and leaves room for
    /// others; else the session goes on from what was last put away.
    fn end(self: Box<Self>, ending: Ending) -> BoxFuture<'static, Result<Box<dyn Session>, UploadError>>;
}

/// The store takes no more; [`Intake::end`] tells why.
#[derive(Debug)]
pub(crate) struct Stopped;

/// What a request that brought content leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The state is put away: the bytes are the session's for good.
    Acknowledged,
    /// The blob is made next: nothing need be put away for the case that it is not.
    Committed,
    /// The body broke off. What came is put away, unless a quota leaves no room to keep it.
    BrokenOff,
    /// What came does not count: the session goes back to where the request began.
    TakenBack,
}

/// A manifest as it was pushed.
#[derive(Clone, Debug)]
pub(crate) struct Manifest {
    pub(crate) digest: Digest,
    pub(crate) bytes: Bytes,
    pub(crate) media_type: Arc<str>,
}

/// What a repository has links to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Blobs,
    Manifests,
}

/// What was removed of a repository.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Removed {
    /// Tags and manifests that were named, or of all those there were.
    pub(crate) count: u64,
    /// The tags that went because they named the manifest.
    pub(crate) tags: Vec<Tag>,
}

/// A page of names, in lexical order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) names: Vec<String>,
    /// Whether there are more behind the last.
    pub(crate) more: bool,
}

impl Page {
    /// Takes a name that comes behind the others; returns whether there was room for it.
    pub(crate) fn add(&mut self, name: String, limit: usize) -> bool {
        self.more = self.names.len() >= limit;
        if !self.more {
            self.names.push(name);
        }
        !self.more
    }
}

/// What a store tells about itself.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    /// What scrubbing has seen since the start.
    pub(crate) scrubbed_blobs: u64,
    pub(crate) scrubbed_bytes: u64,
    pub(crate) damaged_blobs: u64,
    /// Damaged blobs that were put aside and not replaced.
    pub(crate) quarantined_blobs: u64,
    /// When the last pass over everything ended, seconds since 1970; 0 for none since the start.
    pub(crate) scrub_finished: u64,
    /// Free on the volume, the reserve included; `None` if there is none, or the system does not tell.
    pub(crate) free_bytes: Option<u64>,
    /// The size of the volume.
    pub(crate) volume_bytes: Option<u64>,
    pub(crate) reserved_bytes: u64,
    pub(crate) quotas: Vec<quota::Usage>,
    /// `None` where nothing is kept besides.
    pub(crate) kept: Option<Kept>,
}

/// What a store that is elsewhere keeps of it on the disk of this machine.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// Blobs that were read from the disk.
    pub(crate) hits: u64,
    /// Blobs that were not.
    pub(crate) misses: u64,
    pub(crate) bytes: u64,
}
