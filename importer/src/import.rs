//! An image from a source into a registry; the crate's documentation has the picture.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dvcr_converter::format;
use dvcr_converter::limits::Limits;
use dvcr_converter::progress::Progress;
use dvcr_image::digest::{self, Digest, Hasher};
use dvcr_image::index::{Builder, Index};
use dvcr_image::layout::DiskLabels;
use dvcr_image::{BlobWriter, ClientOptions, RangedBlob, Reference, Repository, Upload, Window, tar};
use serde::Serialize;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::checksum::{Checksum, Checksums};
use crate::chunks::{self, ChunkReader};
use crate::decide;
use crate::keep::{self, Keeper, KeptReader};
use crate::produce::{Produced, Producer, Route, SALT_BYTES, empty};
use crate::resume::{self, Begun, Kept, Mark, Note, Rest, StoredFile};
use crate::source::{Opened, Place, Pump, Received, Source, SourceOptions};
use crate::{Error, ErrorKind, Result};

/// How often a running import looks whether it was cancelled, milliseconds.
const CANCEL_POLL_MS: u64 = 50;
/// Times that an import begins anew because its source, or the registry, has changed under it.
const ATTEMPTS_MAX: u32 = 3;

/// What to import, and where to.
#[derive(Clone, Debug)]
pub struct ImportRequest {
    /// Where the image is.
    pub source: Source,
    /// The tag it gets; a reference with a digest is refused.
    pub destination: Reference,
    /// Checksums of the source's bytes as received; all must match before anything is published.
    pub checksums: Vec<Checksum>,
    /// How to reach the source.
    pub source_options: SourceOptions,
    /// How to talk to the destination.
    pub client: ClientOptions,
    /// Do nothing if the tag names what was made of the very version of the source that is there now.
    pub if_changed: bool,
    /// Keep what comes of a source that is decoded or encoded on the way when the rest is expected to take so long, so that the next
    /// import need not read it again if this one is killed. The registry has it meanwhile; see docs/import.md.
    pub keep_after: Duration,
    /// Bounds for the image.
    pub limits: Limits,
}

/// What was imported.
#[derive(Clone, Debug, Serialize)]
pub struct ImportSummary {
    /// The tag that was given.
    pub reference: String,
    /// Digest of the manifest.
    pub digest: String,
    /// How it came there.
    pub outcome: Outcome,
    /// Name of the stored file.
    pub file_name: String,
    /// Format of the stored file.
    pub format: String,
    /// Bytes a guest sees.
    pub virtual_size: u64,
    /// Bytes of the stored file.
    pub stored_size: u64,
    /// Bytes of the source.
    pub source_size: u64,
    /// Bytes of it that an earlier import, which was broken off, had brought.
    pub resumed_bytes: u64,
    /// From the first request to the tag.
    pub seconds: f64,
    /// Bytes received per second.
    pub bytes_per_second: u64,
}

/// How an image came to be under its tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The disk was read from the source, and an image made of it.
    Imported,
    /// The source is an image of the same making, and was copied as it is.
    Copied,
    /// The source may have changed, and was imported, but the image is the one that the tag had before.
    SameContent,
    /// The source has not changed since the tag was made of it, and nothing was done.
    Unchanged,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Imported => "imported",
            Self::Copied => "copied, as it is",
            Self::SameContent => "the same content as before",
            Self::Unchanged => "the source has not changed, nothing was done",
        })
    }
}

/// Imports an image. Nothing is published unless all of it is right.
///
/// `progress` passes the phases "transfer", for some sources "assemble", and "commit". It counts the source's bytes;
/// with "assemble" the total is twice these and the second half counts the layer's bytes in proportion, so that the
/// share never goes back. The total is zero while the source's length is unknown.
///
/// When the future is dropped, or [`Progress::cancel`] is called, the transfer ends at once, and staged blobs are cleaned up as
/// far as the registry answers within a few seconds. So are open uploads, but for one that the same request, from this process or
/// another, goes on with: that of a source that is stored as it comes, and whose version can be told.
pub async fn import(request: ImportRequest, progress: Arc<Progress>) -> Result<ImportSummary> {
    if let Some(digest) = request.destination.digest() {
        let text =
            format!("the destination names the digest {digest}, which only its content decides; name a tag");
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    request.source_options.admit(&request.source, &request.checksums)?;
    let repository = Repository::open(&request.destination, &request.client)
        .map_err(|e| Error::with(ErrorKind::Registry, "preparing the registry client", e))?;
    progress.bound(&request.limits);
    let outcome = tokio::select! {
        outcome = decide::run(&request, &repository, &progress) => outcome,
        error = cancelled(&progress) => Err(error),
    };
    repository.settle().await;
    outcome
}

/// Makes an image of the disk at the source.
pub(crate) async fn transfer(
    request: &ImportRequest,
    repository: &Repository,
    progress: &Arc<Progress>,
) -> Result<ImportSummary> {
    Transfer { request, repository, progress, keeps: AtomicBool::new(true) }.run().await
}

/// Waits until somebody cancels, or the time is over.
pub async fn cancelled(progress: &Progress) -> Error {
    loop {
        if let Err(stopped) = progress.check() {
            return Error::stopped(stopped);
        }
        tokio::time::sleep(Duration::from_millis(CANCEL_POLL_MS)).await;
    }
}

struct Transfer<'a> {
    request: &'a ImportRequest,
    repository: &'a Repository,
    progress: &'a Arc<Progress>,
    /// Whether anything is kept of the source: not again where it was in the way.
    keeps: AtomicBool,
}

/// Where an import begins, or goes on.
struct Start {
    opened: Opened,
    /// Of the first bytes of the source, where these are read by themselves.
    beginning: Option<Pump>,
    checksums: Checksums,
    session: Session,
}

/// What an import does with the session that goes by its name.
enum Session {
    /// It decides when it sees what the source is; an earlier one may have kept something of it.
    Open(Upload, Kept),
    /// It goes on with a layer.
    Layer(Box<BlobWriter>, Begun),
}

/// The session while the source thread finds out what the source is.
enum Held {
    Layer(BlobWriter),
    Keeper(Keeper),
}

type SourceThread = JoinHandle<Result<Produced>>;

impl Transfer<'_> {
    /// Begins anew, a few times, when what was begun cannot be gone on with.
    async fn run(&self) -> Result<ImportSummary> {
        let begun = Instant::now();
        let mut attempt = 1;
        loop {
            match self.attempt(begun).await {
                Err(error) if error.kind() == ErrorKind::Changed && attempt < ATTEMPTS_MAX => {
                    tracing::warn!(%error, attempt, "the import begins anew");
                    attempt += 1;
                }
                outcome => return outcome,
            }
        }
    }

    async fn attempt(&self, begun: Instant) -> Result<ImportSummary> {
        self.progress.set_phase("transfer");
        let Start { mut opened, beginning, checksums, session } = self.start().await?;
        // Live as long as this future: when it is dropped, the source thread is not left waiting.
        let _pumps = (beginning, opened.pump.take());
        if opened.len == Some(0) {
            return Err(empty(&opened.shown));
        }
        let validator = opened.validator.clone();
        let (position, resumed_bytes, kept_end) = match &session {
            Session::Layer(_, begun) => (begun.mark.position, begun.mark.position, 0),
            Session::Open(_, kept) => (0, kept.bytes(), kept.end()),
        };
        let reader = std::mem::replace(&mut opened.reader, Box::new(io::empty()));
        let begin = Mark::new(position, &checksums);
        self.progress.skip_to(resumed_bytes);
        let received = Received::new(reader, position, checksums, self.progress.clone());
        let (held, resumed) = match session {
            Session::Layer(blob, begun) => (Held::Layer(*blob), Some((begun.layer, begun.file))),
            Session::Open(session, kept) => {
                let keep_after = self.keeps.load(Ordering::Relaxed).then_some(self.request.keep_after);
                let (repository, source) = (self.repository.clone(), &self.request.source);
                let (keeper, tee) = Keeper::new(repository, session, kept, source, &opened, keep_after);
                received.keep(tee);
                (Held::Keeper(keeper), None)
            }
        };
        let (writer, mut chunks) = chunks::channel();
        let (tell_route, route) = oneshot::channel();
        let is_plain = self.request.checksums.is_empty();
        let producer = Producer {
            len: opened.len,
            random: opened.random.take().filter(|_| is_plain),
            received,
            opened,
            kept_end,
            resumed,
            limits: self.request.limits.clone(),
            progress: self.progress.clone(),
            begin,
            writer,
        };
        let thread = tokio::task::spawn_blocking(move || producer.run(tell_route));

        let (manifest, produced, virtual_size) = match (route.await, held) {
            (Ok(Route::Straight(file)), held) => {
                let (blob, is_resumed) = match held {
                    Held::Layer(blob) => (blob, true),
                    Held::Keeper(keeper) => (keeper.into_layer().await?, false),
                };
                if let Some(bytes) = tar::layer_bytes(file.size) {
                    blob.announce(bytes).await.map_err(|e| self.registry(e))?;
                }
                let note = |mark: Mark, layer| {
                    let begun = Begun::new(layer, mark, file.clone());
                    Note::new(validator.as_deref()?, Rest::Layer(begun)).write()
                };
                let (layer, mut produced) =
                    self.push_layer(blob, &mut chunks, note, thread, is_resumed).await?;
                if is_resumed {
                    produced.index = self.index_again(&layer, produced.file.size).await?;
                }
                self.publish(&layer, produced).await?
            }
            (Ok(Route::Staged), Held::Keeper(keeper)) => self.stage_and_keep(chunks, thread, keeper).await?,
            // The source thread failed before it knew.
            (_, held) => {
                let error = ended(thread).await.err();
                let outcome = Err(error.unwrap_or_else(|| {
                    Error::new(ErrorKind::Source, "the source thread ended without a word")
                }));
                if let Held::Keeper(keeper) = held {
                    keeper.end(&outcome).await;
                }
                return outcome;
            }
        };
        let seconds = begun.elapsed().as_secs_f64();
        let received = produced.source_size - resumed_bytes;
        Ok(ImportSummary {
            reference: self.request.destination.to_string(),
            digest: manifest.to_string(),
            outcome: Outcome::Imported,
            file_name: produced.file.name,
            format: produced.file.format.to_string(),
            virtual_size,
            stored_size: produced.file.size,
            source_size: produced.source_size,
            resumed_bytes,
            seconds,
            bytes_per_second: (received as f64 / seconds.max(1e-9)) as u64,
        })
    }

    /// Opens the session that goes by this import's name, and the source at the place that fits it.
    ///
    /// # Errors
    /// [`ErrorKind::Changed`] when what an earlier process left is of no use; it is gone then.
    async fn start(&self) -> Result<Start> {
        let ImportRequest { source, source_options, limits, destination, .. } = self.request;
        let checksums = Checksums::new(&self.request.checksums)?;
        let name = resume::session_name(destination.target(), &source.identity());
        let bytes = source.stored_bytes().and_then(tar::layer_bytes);
        let upload = self.repository.return_to_upload(&name, bytes).await;
        let (upload, text) = upload.map_err(|e| self.registry(e))?;
        let Some(text) = text else {
            let opened = source.open(source_options, limits, None).await?;
            let session = Session::Open(upload, Kept::default());
            return Ok(Start { opened, beginning: None, checksums, session });
        };
        match Note::read(&text).map(|note| (note.version_of_source(), note.rest)) {
            Some((version, Rest::Layer(begun))) => self.go_on(upload, version, begun, checksums).await,
            Some((version, Rest::Pieces(kept))) => self.go_on_behind(upload, version, kept, checksums).await,
            None => Err(unusable(upload).await),
        }
    }

    /// Goes on with a layer.
    async fn go_on(
        &self,
        upload: Upload,
        version: Place,
        begun: Begun,
        mut checksums: Checksums,
    ) -> Result<Start> {
        let there = upload.offset();
        let position = begun.mark.position;
        let fits = position == begun.layer.saturating_sub(tar::DATA_OFFSET);
        let Some(hash) = begun.hash().filter(|_| fits && begun.mark.restore(&mut checksums)) else {
            return Err(unusable(upload).await);
        };
        let opened = match self.open(Place { position, ..version }).await {
            Err(error) if error.kind() == ErrorKind::Changed => {
                upload.cancel().await;
                return Err(error);
            }
            opened => opened?,
        };
        let blob = BlobWriter::resume(upload, begun.layer, &hash).map_err(|e| self.lost(e, true))?;
        let read_again = there.saturating_sub(begun.layer);
        tracing::info!(position, read_again, "the import goes on where it was");
        Ok(Start { opened, beginning: None, checksums, session: Session::Layer(Box::new(blob), begun) })
    }

    /// Goes on behind what is kept of the source, which is read back before that.
    async fn go_on_behind(
        &self,
        upload: Upload,
        version: Place,
        kept: Kept,
        checksums: Checksums,
    ) -> Result<Start> {
        match self.open_behind(version, &kept).await {
            Ok((opened, beginning)) => {
                let (position, read_again) = (kept.end(), kept.from);
                tracing::info!(position, read_again, "the import goes on where it was");
                Ok(Start { opened, beginning, checksums, session: Session::Open(upload, kept) })
            }
            Err(error) => {
                if error.kind() == ErrorKind::Changed {
                    keep::forget(self.repository, Some(upload), &kept.pieces).await;
                }
                Err(error)
            }
        }
    }

    /// Opens the source as a whole: its beginning, what is kept, and the rest.
    async fn open_behind(&self, version: Place, kept: &Kept) -> Result<(Opened, Option<Pump>)> {
        let missing = keep::missing(self.repository, kept).await.map_err(|e| self.registry(e))?;
        if let Some(piece) = missing {
            let text = format!("the registry does not have any more what was kept of the source, {piece}");
            return Err(Error::new(ErrorKind::Changed, text));
        }
        let mut opened = self.open(Place { position: kept.end(), ..version.clone() }).await?;
        let rest = std::mem::replace(&mut opened.reader, Box::new(io::empty()));
        let pieces = KeptReader::new(self.repository.clone(), kept);
        if kept.from == 0 {
            opened.reader = Box::new(pieces.chain(rest));
            return Ok((opened, None));
        }
        let beginning = self.open(Place { position: 0, ..version }).await?;
        opened.reader = Box::new(beginning.reader.take(kept.from).chain(pieces).chain(rest));
        Ok((opened, beginning.pump))
    }

    async fn open(&self, at: Place) -> Result<Opened> {
        let ImportRequest { source, source_options, limits, .. } = self.request;
        source.open(source_options, limits, Some(&at)).await
    }

    /// Makes the image by way of a staged blob, while what comes of the source is kept for the next import.
    async fn stage_and_keep(
        &self,
        chunks: ChunkReader,
        thread: SourceThread,
        mut keeper: Keeper,
    ) -> Result<(Digest, Produced, u64)> {
        let outcome = keeper.beside(self.stage(chunks, thread)).await;
        let is_full = outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Full);
        let took_room = is_full && keeper.has_kept() && self.request.source.opens_again();
        keeper.end(&outcome).await;
        match outcome {
            Err(error) if took_room => {
                self.keeps.store(false, Ordering::Relaxed);
                self.repository.settle().await;
                let text = "the registry has no room for the image beside what was kept of the source";
                Err(Error::with(ErrorKind::Changed, text, error))
            }
            outcome => outcome,
        }
    }

    /// Makes the image by way of a staged blob.
    async fn stage(&self, mut chunks: ChunkReader, thread: SourceThread) -> Result<(Digest, Produced, u64)> {
        let mut blob = self.repository.start_blob().await.map_err(|e| self.registry(e))?;
        chunks.push_to(&mut blob, |_, _| None, |_| {}).await.map_err(|e| self.registry(e))?;
        let mut produced = ended(thread).await?;
        let (digest, size) = blob.finish().await.map_err(|e| self.registry(e))?;
        let staged = Staged { repository: self.repository.clone(), digest, size };
        self.progress.set_phase("assemble");
        let (layer, index) = self.assemble(&staged, &produced).await?;
        produced.index = index;
        self.progress.set_phase("commit");
        self.publish(&layer, produced).await
    }

    /// Pushes the layer as it is produced. What it had come to stays with the registry when this fails, unless it is of no use.
    async fn push_layer(
        &self,
        mut blob: BlobWriter,
        chunks: &mut ChunkReader,
        note: impl Fn(Mark, (u64, Vec<u8>)) -> Option<String>,
        thread: SourceThread,
        resumed: bool,
    ) -> Result<((Digest, u64), Produced)> {
        let pushed = chunks.push_to(&mut blob, note, |_| {}).await.map_err(|e| self.lost(e, resumed));
        // A source that failed explains why there were no more chunks.
        let produced = match pushed {
            Ok(()) => ended(thread).await,
            Err(error) => Err(error),
        };
        let produced = match produced {
            Ok(produced) => produced,
            Err(error) => {
                if error.kind().spoils() {
                    blob.cancel().await;
                }
                return Err(error);
            }
        };
        self.progress.set_phase("commit");
        let layer = blob.finish().await.map_err(|e| self.lost(e, resumed))?;
        Ok((layer, produced))
    }

    /// Makes the image; returns the digest of its manifest, and the bytes a guest sees.
    async fn publish(&self, layer: &(Digest, u64), produced: Produced) -> Result<(Digest, Produced, u64)> {
        let (digest, size) = layer;
        let Produced { file, index, .. } = &produced;
        let virtual_size = match file.virtual_size {
            Some(virtual_size) => virtual_size,
            None => self.look_inside(digest, *size, file).await?,
        };
        let labels = DiskLabels { size: file.size, virtual_size, format: file.format };
        let target = self.request.destination.target();
        if index.is_none() {
            tracing::warn!(
                bytes = file.size,
                "the file is too long for an index; ranges of it cannot be verified"
            );
        }
        let manifest =
            dvcr_image::publish(self.repository, target, &labels, (digest, *size), index.as_ref()).await;
        let manifest = manifest.map_err(|e| self.registry(e))?;
        tracing::debug!(layer = %digest, %manifest, "the image is published");
        Ok((manifest, produced, virtual_size))
    }

    /// Reads a layer back and makes the index of the file in it: of one that several processes have pushed, none has seen
    /// all. The layer is held against its digest, so that the index is of what was pushed.
    async fn index_again(&self, layer: &(Digest, u64), file_bytes: u64) -> Result<Option<Index>> {
        let mut stream = self.repository.blob(&layer.0, layer.1);
        let mut hasher = Hasher::matching(&layer.0).map_err(|e| self.registry(e))?;
        let expected = layer.0.clone();
        let runtime = tokio::runtime::Handle::current();
        let thread = tokio::task::spawn_blocking(move || -> dvcr_image::Result<Option<Index>> {
            let mut index = Builder::new();
            let (mut before, mut left) = (tar::DATA_OFFSET, file_bytes);
            while let Some(mut bytes) = runtime.block_on(stream.next())? {
                hasher.update(&bytes);
                let skipped = before.min(bytes.len() as u64);
                let _ = bytes.split_to(skipped as usize);
                before -= skipped;
                bytes.truncate(left.min(bytes.len() as u64) as usize);
                left -= bytes.len() as u64;
                index.update(&bytes);
            }
            digest::same(&hasher.finish()?, &expected, "the layer that was pushed")?;
            Ok(index.finish())
        });
        let read = thread
            .await
            .map_err(|e| Error::with(ErrorKind::Registry, "the thread that reads a layer ended early", e))?;
        read.map_err(|e| self.registry(e))
    }

    /// Reads the staged blob back into a layer, without its salt.
    async fn assemble(&self, staged: &Staged, produced: &Produced) -> Result<((Digest, u64), Option<Index>)> {
        let size = produced.file.size;
        let mut begin = tar::prefix(&produced.file.name, size).map_err(|e| self.registry(e))?;
        begin.extend(&produced.header);
        let mut index = Builder::new();
        index.update(&produced.header);
        let end = tar::suffix(size);
        let whole = (begin.len() + end.len()) as u64 + staged.size.saturating_sub(SALT_BYTES as u64);
        let mut share = Share::new(self.progress, produced.source_size, whole);

        let (mut writer, mut chunks) = chunks::channel();
        let mut stream = self.repository.blob(&staged.digest, staged.size);
        let mut hasher = Hasher::matching(&staged.digest).map_err(|e| self.registry(e))?;
        let expected = staged.digest.clone();
        let runtime = tokio::runtime::Handle::current();
        let thread = tokio::task::spawn_blocking(move || -> io::Result<Option<Index>> {
            writer.write_all(&begin)?;
            let mut salt_left = SALT_BYTES;
            while let Some(mut bytes) = runtime.block_on(stream.next())? {
                hasher.update(&bytes);
                let salt = bytes.split_to(salt_left.min(bytes.len()));
                salt_left -= salt.len();
                index.update(&bytes);
                writer.write_all(&bytes)?;
            }
            digest::same(&hasher.finish()?, &expected, "what was staged in the registry")?;
            writer.write_all(&end)?;
            writer.finish()?;
            Ok(index.finish())
        });

        let mut layer = self.repository.start_blob().await.map_err(|e| self.registry(e))?;
        chunks
            .push_to(&mut layer, |_, _| None, |bytes| share.advance(bytes))
            .await
            .map_err(|e| self.registry(e))?;
        let read = thread
            .await
            .map_err(|e| Error::with(ErrorKind::Registry, "the assembling thread ended early", e))?;
        let index = read.map_err(|e| {
            Error::with(ErrorKind::Registry, "reading back what was staged in the registry", e)
        })?;
        self.progress.set_phase("commit");
        Ok((layer.finish().await.map_err(|e| self.registry(e))?, index))
    }

    /// Opens the image where it lies now, in a layer that nobody refers to yet, and returns the bytes a guest sees. A
    /// layer that is refused is left to the registry's garbage collection, for it may be in another image too.
    async fn look_inside(&self, layer: &Digest, layer_bytes: u64, file: &StoredFile) -> Result<u64> {
        let begin = tar::prefix(&file.name, file.size).map_err(|e| self.registry(e))?;
        let runtime = tokio::runtime::Handle::current();
        let blob = RangedBlob::new(self.repository.clone(), layer.clone(), layer_bytes, runtime);
        let window = Window::new(&blob, begin.len() as u64, file.size).map_err(|e| self.registry(e))?;
        let limits = self.request.limits.clone();
        let opened = tokio::task::spawn_blocking(move || format::open(Arc::new(window), &limits)).await;
        let opened = opened
            .map_err(|e| Error::with(ErrorKind::Registry, "the thread that looks inside ended early", e))?;
        let refused = |e| {
            let text = format!("{} is not an image that can be imported", file.name);
            Error::with(ErrorKind::Image, text, e)
        };
        opened.map(|image| image.info.virtual_size).map_err(refused)
    }

    /// The error of a session that failed: [`ErrorKind::Changed`] if the registry does not have what it had.
    fn lost(&self, error: dvcr_image::Error, resumed: bool) -> Error {
        use dvcr_image::ErrorKind::{Mismatch, NotFound, Protocol};
        let kind = error.kind();
        if kind != NotFound && !(resumed && matches!(kind, Mismatch | Protocol)) {
            return self.registry(error);
        }
        let text = format!("the registry lost what it had of {}", self.request.destination);
        Error::with(ErrorKind::Changed, text, error)
    }

    fn registry(&self, error: dvcr_image::Error) -> Error {
        Error::storing(format!("importing into {}", self.request.destination), error)
    }
}

/// A blob that only lives until its layer is made; deleted in the background when dropped.
///
/// Its random beginning makes it nobody else's: a blob of the bare bytes may be a layer in use, or what another
/// import of the same source has staged.
struct Staged {
    repository: Repository,
    digest: Digest,
    size: u64,
}

impl Drop for Staged {
    fn drop(&mut self) {
        self.repository.discard_blob(self.digest.clone());
    }
}

/// Counts `part` bytes of progress, behind as many of the source, while `whole` bytes of work are done.
struct Share<'a> {
    progress: &'a Progress,
    part: u64,
    whole: u64,
    worked: u64,
}

impl<'a> Share<'a> {
    fn new(progress: &'a Progress, part: u64, whole: u64) -> Self {
        progress.set_total(part.saturating_mul(2));
        Self { progress, part, whole, worked: 0 }
    }

    fn advance(&mut self, bytes: u64) {
        self.worked = (self.worked + bytes).min(self.whole);
        let due = u128::from(self.part) * u128::from(self.worked) / u128::from(self.whole.max(1));
        let due = u64::try_from(due).unwrap_or(self.part);
        self.progress.reach(self.part.saturating_add(due));
    }
}

/// The error of a note that nothing can be done with; its session is gone.
async fn unusable(upload: Upload) -> Error {
    upload.cancel().await;
    let text = "what was begun had other checksums demanded, or was begun by another version of this program";
    Error::new(ErrorKind::Changed, text)
}

/// Waits for what the source thread produced.
async fn ended(thread: SourceThread) -> Result<Produced> {
    thread.await.map_err(|e| Error::with(ErrorKind::Source, "the source thread ended early", e))?
}
