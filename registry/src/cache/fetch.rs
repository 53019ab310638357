//! Fetches of blobs: one for all who want a blob, streamed to them while it is stored.
//!
//! ```text
//!            GET at the upstream        length known                     digest compared, durable
//!  Asking ──────────────────────┬──> Arriving ───────────────────────────────────────────────> Stored
//!                               │        └── broke off too often, wrong digest, nobody wants it ──> Failed
//!                               ├── small: held in memory ───────────────────────────────────> Stored
//!                               ├── no room: Passing, each client for itself
//!                               └── 404, no answer ──────────────────────────────────────────> Failed
//! ```
//!
//! A fetch takes the way of an upload, so that a crash leaves what one of those leaves. Clients read the growing file up
//! to where it is written, but for its end: that they get when the whole is known to be what it should be. So a body that
//! is complete is right, and any other breaks off.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{File, OpenOptions};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use dvcr_client::BlobStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use super::source::{Place, Source, blocking, remote_digest};
use super::{Counters, Failure, TURN_TIMEOUT};
use crate::digest::{Digest, Hasher};
use crate::lock;
use crate::names::{Reference, RepoName};
use crate::storage::Storage;
use crate::storage::blobs::{Blob, Reader};
use crate::storage::ingest::Ingest;
use crate::storage::uploads::Session;
use crate::store::UploadError;

/// Largest blob that is held in memory until it is stored; larger ones are streamed.
const SMALL_BLOB_BYTES_MAX: u64 = 64 << 10;
/// The end of a blob that clients get only when all of it is verified.
const HELD_BACK_BYTES: u64 = 64 << 10;
/// How long a fetch goes on that nobody wants.
const UNWANTED_TIMEOUT: Duration = Duration::from_secs(60);
/// With so little left it goes on to its end.
const UNWANTED_BYTES_MAX: u64 = 256 << 20;

/// The fetches of one upstream.
pub(super) struct Fetches {
    running: Mutex<HashMap<Place<Digest>, Arc<watch::Sender<State>>>>,
    turns: Arc<Semaphore>,
    closing: watch::Receiver<bool>,
}

/// How far a fetch is.
#[derive(Clone, Debug)]
enum State {
    Asking,
    Arriving(Growing),
    Passing(u64),
    Stored,
    Failed(Failure),
}

/// A file that grows.
#[derive(Clone, Debug)]
struct Growing {
    file: Arc<File>,
    length: u64,
    written: watch::Receiver<u64>,
}

/// A blob that can be given to a client.
pub(crate) enum Content {
    Stored(Blob),
    Arriving(Arriving),
    /// It is not stored; [`Source::pass`] brings it.
    Passing(u64),
}

impl Fetches {
    pub(super) fn new(turns: Arc<Semaphore>, closing: watch::Receiver<bool>) -> Self {
        Self { running: Mutex::default(), turns, closing }
    }
}

impl std::fmt::Debug for Fetches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fetches").field("running", &lock(&self.running).len()).finish_non_exhaustive()
    }
}

impl Source {
    /// Finds a blob here, or has it fetched.
    pub(crate) async fn blob(self: &Arc<Self>, repo: &RepoName, digest: &Digest) -> Result<Content, Failure> {
        if let Some(blob) = self.storage.open_blob(repo, digest)? {
            Counters::add(&self.counters.hits, 1);
            self.used(repo, digest, false);
            return Ok(Content::Stored(blob));
        }
        Counters::add(&self.counters.misses, 1);
        let Some(mut state) = self.join(repo, digest)? else { return self.stored(repo, digest) };
        loop {
            let now = state.borrow_and_update().clone();
            match now {
                State::Asking => {
                    if state.changed().await.is_err() {
                        return Err(Failure::Upstream("the fetch broke off"));
                    }
                }
                State::Arriving(growing) => {
                    let storage = Arc::clone(&self.storage);
                    let (offset, end) = (0, growing.length);
                    let arriving =
                        Arriving { growing, state, storage, offset, end, reader: None, is_written: false };
                    return Ok(Content::Arriving(arriving));
                }
                State::Passing(length) => return Ok(Content::Passing(length)),
                State::Stored => return self.stored(repo, digest),
                State::Failed(failure) => return Err(failure),
            }
        }
    }

    /// Brings a blob, or the part from `offset` to `end` of one of `length` bytes, from the upstream without storing it.
    pub(crate) fn pass(
        self: &Arc<Self>,
        repo: &RepoName,
        digest: &Digest,
        (offset, end, length): (u64, u64, u64),
    ) -> Result<Passing, Failure> {
        let (remote, wanted) = (self.remote(repo), remote_digest(digest)?);
        let whole = (offset, end) == (0, length);
        let stream = match whole {
            true => remote.blob(&wanted, length),
            false => remote.blob_range(&wanted, offset..end),
        };
        let hasher = whole.then(|| Hasher::new(digest.algorithm()));
        Ok(Passing { source: Arc::clone(self), stream, digest: digest.clone(), hasher, held: None })
    }

    fn stored(self: &Arc<Self>, repo: &RepoName, digest: &Digest) -> Result<Content, Failure> {
        match self.storage.open_blob(repo, digest)? {
            Some(blob) => {
                self.used(repo, digest, false);
                Ok(Content::Stored(blob))
            }
            None => Err(Failure::Upstream("the blob was fetched and is gone again")),
        }
    }

    /// Joins the fetch of a blob, or begins it; `None` if the blob is there by now.
    fn join(
        self: &Arc<Self>,
        repo: &RepoName,
        digest: &Digest,
    ) -> Result<Option<watch::Receiver<State>>, Failure> {
        if self.absent.has(&(repo.clone(), Reference::Digest(digest.clone()))) {
            return Err(Failure::Unknown);
        }
        let place = (repo.clone(), digest.clone());
        let mut running = lock(&self.fetches.running);
        let entry = match running.entry(place.clone()) {
            Entry::Occupied(entry) => return Ok(Some(entry.get().subscribe())),
            Entry::Vacant(entry) => entry,
        };
        // A fetch leaves the list after the blob is stored: what is neither there nor here has to be fetched.
        if self.storage.stat_blob(repo, digest)?.is_some() {
            return Ok(None);
        }
        let (sender, receiver) = watch::channel(State::Asking);
        let state = Arc::clone(entry.insert(Arc::new(sender)));
        drop(running);
        let ended = State::Failed(Failure::Upstream("the fetch broke off"));
        let fetch = Fetch { source: Arc::clone(self), place, state, ended };
        Counters::add(&self.counters.in_flight, 1);
        tokio::spawn(async move {
            let ended = fetch.run().await.unwrap_or_else(State::Failed);
            fetch.end(ended);
        });
        Ok(Some(receiver))
    }
}

/// One fetch, which tells those who wait how it ended however it ends.
struct Fetch {
    source: Arc<Source>,
    place: Place<Digest>,
    state: Arc<watch::Sender<State>>,
    ended: State,
}

impl Drop for Fetch {
    fn drop(&mut self) {
        lock(&self.source.fetches.running).remove(&self.place);
        self.source.counters.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.state.send_replace(self.ended.clone());
    }
}

impl Fetch {
    fn end(mut self, ended: State) {
        self.ended = ended;
    }

    async fn run(&self) -> Result<State, Failure> {
        let Self { source, place: (repo, digest), .. } = self;
        let turn = Arc::clone(&source.fetches.turns).acquire_owned();
        let _turn = timeout(TURN_TIMEOUT, turn).await.ok().and_then(Result::ok).ok_or(Failure::Busy)?;
        let begun = Instant::now();
        let asked = source.remote(repo).open_blob(&remote_digest(digest)?).await;
        let Some(stream) = asked.map_err(|error| source.failed(repo, digest.as_str(), &error))? else {
            source.absent.note((repo.clone(), Reference::Digest(digest.clone())));
            return Err(Failure::Unknown);
        };
        let length = stream.end();
        if !self.has_room(length).await? {
            tracing::info!(%repo, %digest, bytes = length, "there is no room for a blob; it is passed on only");
            return Ok(State::Passing(length));
        }
        let arriving = Raised::by(source, length);
        source.evict_if_full();
        match length {
            ..=SMALL_BLOB_BYTES_MAX => self.take_small(stream).await?,
            _ => self.take(stream).await?,
        }
        source.grown(length);
        drop(arriving);
        source.evict_if_full();
        source.used(repo, digest, false);
        tracing::info!(%repo, %digest, bytes = length, ms = begun.elapsed().as_millis(), "blob fetched");
        Ok(State::Stored)
    }

    /// Whether there is room for so many bytes, if need be after others were taken out.
    async fn has_room(&self, bytes: u64) -> Result<bool, Failure> {
        let source = &self.source;
        if source.bytes_max().is_some_and(|max| bytes > max) {
            return Ok(false);
        }
        let fits = move |source: &Source| match source.storage.space().check(bytes) {
            Ok(()) => Ok(true),
            Err(error) if error.is_full() => Ok(false),
            Err(error) => Err(error),
        };
        let source = Arc::clone(source);
        blocking(move || {
            Ok(fits(&source)? || {
                source.evict(bytes);
                fits(&source)?
            })
        })
        .await
    }

    async fn begin(&self) -> Result<Session, Failure> {
        let (storage, (repo, digest)) = (Arc::clone(&self.source.storage), self.place.clone());
        let session = blocking(move || {
            let id = storage.begin_upload(&repo, digest.algorithm())?;
            match storage.open_upload(&repo, id) {
                Ok(session) => Ok(session),
                Err(UploadError::Store(error)) => Err(error),
                Err(_) => Ok(None),
            }
        });
        session.await?.ok_or(Failure::Upstream("the fetch broke off"))
    }

    /// The next bytes, unless the fetch is to end.
    async fn next(
        &self,
        stream: &mut BlobStream,
        closing: &mut watch::Receiver<bool>,
    ) -> Result<Option<Bytes>, Failure> {
        let (repo, digest) = &self.place;
        let bytes = tokio::select! {
            _ = closing.wait_for(|closing| *closing) => return Err(Failure::Upstream("the registry is ending")),
            bytes = stream.next() => bytes.map_err(|error| self.source.failed(repo, digest.as_str(), &error))?,
        };
        let count = bytes.as_ref().map_or(0, |bytes| bytes.len() as u64);
        Counters::add(&self.source.counters.fetched_bytes, count);
        Ok(bytes)
    }

    async fn take_small(&self, mut stream: BlobStream) -> Result<(), Failure> {
        let mut body = BytesMut::new();
        let mut closing = self.source.fetches.closing.clone();
        while let Some(bytes) = self.next(&mut stream, &mut closing).await? {
            body.extend_from_slice(&bytes);
        }
        let session = self.begin().await?;
        self.commit(move |storage, digest| storage.commit_small(session, &body, digest)).await
    }

    async fn take(&self, mut stream: BlobStream) -> Result<(), Failure> {
        let mut session = self.begin().await?;
        let storage = Arc::clone(&self.source.storage);
        let length = stream.end();
        let (file, mut session) = blocking(move || {
            storage.settle_upload(&mut session)?;
            let path = session.data();
            let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
            let file = open().map_err(|error| {
                crate::storage::Error::new(format!("cannot open {}", path.display()), error)
            })?;
            Ok((file, session))
        })
        .await?;
        let storage = &self.source.storage;
        let mut ingest = Ingest::start(
            (storage.ingest_pool(), storage.space()),
            &session.data(),
            session.hashstates(),
            0,
            session.hasher(),
            length,
        );
        let growing = Growing { file: Arc::new(file), length, written: ingest.written() };
        self.state.send_replace(State::Arriving(growing));
        let received = self.receive(&mut stream, &mut ingest).await;
        // Its threads let go of the file before it is placed, or removed.
        let ingested = ingest.finish().await.map_err(Failure::from);
        match received.and(ingested) {
            Ok((hasher, length)) => session.set(hasher, length),
            Err(failure) => {
                let storage = Arc::clone(storage);
                if let Err(error) = blocking(move || storage.cancel_upload(session)).await {
                    tracing::warn!(%error, "what was fetched of a blob is not removed; garbage collection will");
                }
                return Err(failure);
            }
        }
        self.commit(move |storage, digest| storage.commit_upload(session, digest)).await
    }

    async fn receive(&self, stream: &mut BlobStream, ingest: &mut Ingest) -> Result<(), Failure> {
        let mut closing = self.source.fetches.closing.clone();
        let mut left = stream.end();
        let mut unwanted: Option<Instant> = None;
        while let Some(bytes) = self.next(stream, &mut closing).await? {
            left = left.saturating_sub(bytes.len() as u64);
            if ingest.push(&bytes).await.is_err() {
                // The end of the ingest tells why.
                return Ok(());
            }
            if self.state.receiver_count() > 0 || left <= UNWANTED_BYTES_MAX {
                unwanted = None;
            } else if unwanted.get_or_insert_with(Instant::now).elapsed() >= UNWANTED_TIMEOUT {
                let (repo, digest) = &self.place;
                tracing::info!(%repo, %digest, left, "a blob that nobody wants any more is not fetched");
                return Err(Failure::Upstream("nobody wanted the blob for a while"));
            }
        }
        Ok(())
    }

    async fn commit(
        &self,
        commit: impl FnOnce(&Storage, &Digest) -> Result<(), UploadError> + Send + 'static,
    ) -> Result<(), Failure> {
        let (storage, (repo, digest)) = (Arc::clone(&self.source.storage), self.place.clone());
        let wanted = digest.clone();
        let committed = blocking(move || match commit(&storage, &wanted) {
            Ok(()) => Ok(None),
            Err(UploadError::Store(error)) => Err(error),
            Err(UploadError::Digest { actual }) => Ok(Some(actual.to_string())),
            Err(UploadError::Busy) => Ok(Some("nothing: another one works on it".to_owned())),
        });
        match committed.await? {
            None => Ok(()),
            Some(actual) => {
                Counters::add(&self.source.counters.failures, 1);
                tracing::error!(%repo, %digest, actual, "the upstream has other content than its digest says");
                Err(Failure::Upstream("the upstream has other content than its digest says"))
            }
        }
    }
}

/// Bytes that are arriving, as long as this lives.
struct Raised<'a>(&'a Source, u64);

impl<'a> Raised<'a> {
    fn by(source: &'a Source, bytes: u64) -> Self {
        source.arriving.fetch_add(bytes, Ordering::Relaxed);
        Self(source, bytes)
    }
}

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.arriving.fetch_sub(self.1, Ordering::Relaxed);
    }
}

/// Reads a blob while it arrives.
pub(crate) struct Arriving {
    growing: Growing,
    state: watch::Receiver<State>,
    storage: Arc<Storage>,
    offset: u64,
    end: u64,
    /// Reads what is there.
    reader: Option<Reader>,
    /// Whether nothing more will be written.
    is_written: bool,
}

impl Arriving {
    pub(crate) fn length(&self) -> u64 {
        self.growing.length
    }

    /// Reads from `offset` up to `end`, which lie inside the blob.
    pub(crate) fn part(self, offset: u64, end: u64) -> Self {
        Self { offset, end, ..self }
    }

    /// Returns the next bytes, `None` at the end; waits for what has not come yet.
    ///
    /// # Errors
    /// When the fetch fails; the bytes before were perhaps not those of the blob.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            if let Some(reader) = &mut self.reader {
                if let Some(bytes) = reader.next().await? {
                    self.offset += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
                self.reader = None;
            }
            if self.offset >= self.end {
                return Ok(None);
            }
            let ready = self.ready()?.min(self.end);
            if ready > self.offset {
                let file = self.growing.file.try_clone()?;
                self.reader = Some(Reader::new(file, &self.storage, self.offset, ready));
                continue;
            }
            tokio::select! {
                written = self.growing.written.changed(), if !self.is_written => self.is_written = written.is_err(),
                state = self.state.changed() => if state.is_err() {
                    // It has said all it has to say.
                    self.ready()?;
                },
            }
        }
    }

    /// Up to where a client may read.
    fn ready(&mut self) -> io::Result<u64> {
        let length = self.growing.length;
        match &*self.state.borrow_and_update() {
            State::Stored => Ok(length),
            State::Failed(failure) => Err(io::Error::other(failure.clone())),
            _ => {
                let written = *self.growing.written.borrow_and_update();
                Ok(written.min(length.saturating_sub(HELD_BACK_BYTES)))
            }
        }
    }
}

/// Reads a blob from the upstream that is not stored.
pub(crate) struct Passing {
    source: Arc<Source>,
    stream: BlobStream,
    digest: Digest,
    /// Of a whole blob.
    hasher: Option<Hasher>,
    /// Kept back until what follows is there, and of a whole blob, at its end, until it is verified.
    held: Option<Bytes>,
}

impl Passing {
    /// Returns the next bytes, `None` at the end.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        while let Some(bytes) = self.stream.next().await? {
            Counters::add(&self.source.counters.fetched_bytes, bytes.len() as u64);
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&bytes);
            }
            if let Some(before) = self.held.replace(bytes) {
                return Ok(Some(before));
            }
        }
        if let Some(hasher) = self.hasher.take()
            && hasher.finish() != self.digest
        {
            tracing::error!(digest = %self.digest, "the upstream has other content than its digest says");
            return Err(io::Error::other(Failure::Upstream(
                "the upstream has other content than its digest says",
            )));
        }
        Ok(self.held.take())
    }
}
