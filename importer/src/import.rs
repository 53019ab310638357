//! An image from a source into a registry; the crate's documentation has the picture.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dvcr_converter::convert::{Options, stream_to_image};
use dvcr_converter::format::{self, Format};
use dvcr_converter::io::ReadAt;
use dvcr_converter::limits::Limits;
use dvcr_converter::plain::PlainReader;
use dvcr_converter::progress::Progress;
use dvcr_converter::sink::StreamTarget;
use dvcr_converter::{qcow2, wrapper};
use dvcr_image::digest::{self, Digest, Hasher};
use dvcr_image::index::{Builder, Index};
use dvcr_image::layout::DiskLabels;
use dvcr_image::{BlobWriter, ClientOptions, RangedBlob, Reference, Repository, Window, tar};
use serde::Serialize;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::checksum::{Checksum, Checksums};
use crate::chunks::{self, ChunkReader, ChunkWriter};
use crate::decide;
use crate::name::file_name;
use crate::random;
use crate::resume::{self, Mark, Note, StoredFile};
use crate::source::{Opened, Received, Source, SourceOptions};
use crate::{Error, ErrorKind, Result};

/// How often a running import looks whether it was cancelled, milliseconds.
const CANCEL_POLL_MS: u64 = 50;
/// Times that an import begins anew because its source, or the registry, has changed under it.
const ATTEMPTS_MAX: u32 = 3;
/// Length of the random bytes that a staged blob begins with.
const STAGED_SALT_BYTES: usize = 32;

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
    Transfer { request, repository, progress }.run().await
}

/// Waits until somebody cancels, or the time is over.
pub(crate) async fn cancelled(progress: &Progress) -> Error {
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
}

/// How the stored file reaches its layer; known once the first bytes are.
#[derive(Debug)]
enum Route {
    /// The chunks are the layer around this file.
    Straight(StoredFile),
    /// The chunks are the file, or all of it but its first cluster.
    Staged,
}

/// What the source thread tells at its end.
struct Produced {
    file: StoredFile,
    source_size: u64,
    /// The part of the file that goes before what was staged.
    header: Vec<u8>,
    /// Of a file that went straight into its layer, from its beginning; that of others is made when they are read back.
    index: Option<Index>,
}

/// Where an import begins, or goes on.
struct Start {
    opened: Opened,
    checksums: Checksums,
    /// By the session that goes by the import's name; gone on with, or new.
    blob: BlobWriter,
    resumed: Option<Note>,
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
        let Start { mut opened, checksums, blob, resumed } = self.start().await?;
        // Lives as long as this future: when it is dropped, the source thread is not left waiting.
        let _pump = opened.pump.take();
        if opened.len == Some(0) {
            return Err(empty(&opened.shown));
        }
        let validator = opened.validator.clone();
        let position = resumed.as_ref().map_or(0, |note| note.mark.position);
        let is_resumed = resumed.is_some();
        let (writer, mut chunks) = chunks::channel();
        let (tell_route, route) = oneshot::channel();
        let begin = Mark::new(position, &checksums);
        let is_plain = self.request.checksums.is_empty();
        let producer = Producer {
            len: opened.len,
            random: opened.random.take().filter(|_| is_plain),
            received: Received::new(
                std::mem::replace(&mut opened.reader, Box::new(io::empty())),
                position,
                checksums,
                self.progress.clone(),
            ),
            opened,
            resumed: resumed.map(|note| (note.layer, note.file)),
            limits: self.request.limits.clone(),
            progress: self.progress.clone(),
            begin,
            writer,
        };
        let thread = tokio::task::spawn_blocking(move || producer.run(tell_route));

        let (layer, mut produced) = match route.await {
            // The source thread failed before it knew.
            Err(_) => {
                ended(thread).await?;
                return Err(Error::new(ErrorKind::Source, "the source thread ended without a word"));
            }
            Ok(Route::Straight(file)) => {
                if let Some(bytes) = tar::layer_bytes(file.size) {
                    blob.announce(bytes).await.map_err(|e| self.registry(e))?;
                }
                let note =
                    |mark: Mark, layer| Note::new(validator.as_deref()?, layer, mark, file.clone()).write();
                self.push_layer(blob, &mut chunks, note, thread, is_resumed).await?
            }
            Ok(Route::Staged) => {
                // Nothing goes on with what a decoder or an encoder has in its memory.
                drop(blob);
                let mut blob = self.repository.start_blob().await.map_err(|e| self.registry(e))?;
                chunks.push_to(&mut blob, |_, _| None, |_| {}).await.map_err(|e| self.registry(e))?;
                let mut produced = ended(thread).await?;
                let (digest, size) = blob.finish().await.map_err(|e| self.registry(e))?;
                let staged = Staged { repository: self.repository.clone(), digest, size };
                self.progress.set_phase("assemble");
                let (layer, index) = self.assemble(&staged, &produced).await?;
                produced.index = index;
                (layer, produced)
            }
        };
        self.progress.set_phase("commit");
        if is_resumed {
            produced.index = self.index_again(&layer, produced.file.size).await?;
        }
        let (digest, manifest, virtual_size) = self.publish(&layer, &produced).await?;
        tracing::debug!(layer = %digest, %manifest, "the image is published");
        let seconds = begun.elapsed().as_secs_f64();
        let received = produced.source_size - position;
        Ok(ImportSummary {
            reference: self.request.destination.to_string(),
            digest: manifest.to_string(),
            outcome: Outcome::Imported,
            file_name: produced.file.name,
            format: produced.file.format.to_string(),
            virtual_size,
            stored_size: produced.file.size,
            source_size: produced.source_size,
            resumed_bytes: position,
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
            return Ok(Start { opened, checksums, blob: upload.into(), resumed: None });
        };
        let there = upload.offset();
        let mut restored = checksums;
        let fits = |note: &Note| note.mark.position == note.layer.saturating_sub(tar::DATA_OFFSET);
        let note = Note::read(&text).filter(|note| fits(note) && note.mark.restore(&mut restored));
        let Some((note, hash)) = note.and_then(|note| note.hash().map(|hash| (note, hash))) else {
            upload.cancel().await;
            let text = "what was begun had other checksums demanded, or was begun by another version of this program";
            return Err(Error::new(ErrorKind::Changed, text));
        };
        let opened = match source.open(source_options, limits, Some(&note.place())).await {
            Err(error) if error.kind() == ErrorKind::Changed => {
                upload.cancel().await;
                return Err(error);
            }
            opened => opened?,
        };
        let blob = BlobWriter::resume(upload, note.layer, &hash).map_err(|e| self.lost(e, true))?;
        let (position, read_again) = (note.mark.position, there.saturating_sub(note.layer));
        tracing::info!(position, read_again, "the import goes on where it was");
        Ok(Start { opened, checksums: restored, blob, resumed: Some(note) })
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
                use ErrorKind::{Changed, Checksum, Image, Invalid};
                if matches!(error.kind(), Changed | Checksum | Image | Invalid) {
                    blob.cancel().await;
                }
                return Err(error);
            }
        };
        self.progress.set_phase("commit");
        let layer = blob.finish().await.map_err(|e| self.lost(e, resumed))?;
        Ok((layer, produced))
    }

    /// Makes the image; returns the digests of the layer and of the manifest, and the bytes a guest sees.
    async fn publish(&self, layer: &(Digest, u64), produced: &Produced) -> Result<(Digest, Digest, u64)> {
        let (digest, size) = layer;
        let Produced { file, index, .. } = produced;
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
        let layer = (digest, *size);
        let manifest = dvcr_image::publish(self.repository, target, &labels, layer, index.as_ref()).await;
        Ok((digest.clone(), manifest.map_err(|e| self.registry(e))?, virtual_size))
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
        let whole = (begin.len() + end.len()) as u64 + staged.size.saturating_sub(STAGED_SALT_BYTES as u64);
        let mut share = Share::new(self.progress, produced.source_size, whole);

        let (mut writer, mut chunks) = chunks::channel();
        let mut stream = self.repository.blob(&staged.digest, staged.size);
        let mut hasher = Hasher::matching(&staged.digest).map_err(|e| self.registry(e))?;
        let expected = staged.digest.clone();
        let runtime = tokio::runtime::Handle::current();
        let thread = tokio::task::spawn_blocking(move || -> io::Result<Option<Index>> {
            writer.write_all(&begin)?;
            let mut salt_left = STAGED_SALT_BYTES;
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

/// The source thread: from received bytes to chunks.
struct Producer {
    received: Received,
    len: Option<u64>,
    /// The source's bytes in any order, unless something is to be verified that needs them in theirs.
    random: Option<Arc<dyn ReadAt>>,
    opened: Opened,
    /// Bytes of the layer that were produced before, and the file in it.
    resumed: Option<(u64, StoredFile)>,
    limits: Limits,
    progress: Arc<Progress>,
    /// The state of the source at its beginning.
    begin: Mark,
    writer: ChunkWriter,
}

impl Producer {
    fn run(mut self, tell_route: oneshot::Sender<Route>) -> Result<Produced> {
        let received = self.received.clone();
        let (stamp, shown) = (self.opened.stamp.take(), self.opened.shown.clone());
        // What went wrong at the source explains whatever failed after it.
        let produced = match &self.resumed {
            Some((layer, file)) => {
                let (layer, file) = (*layer, file.clone());
                self.go_on(tell_route, layer, file)
            }
            None => self.produce(tell_route),
        };
        let produced = produced.map_err(|error| received.failure().unwrap_or(error));
        // What was made of two versions is of no use, and what failed for them no fault of the image.
        stamp.map_or(Ok(()), |stamp| stamp.verify(&shown)).and(produced)
    }

    /// Produces what is behind so many bytes of a layer, from a source that begins there.
    fn go_on(self, tell_route: oneshot::Sender<Route>, layer: u64, file: StoredFile) -> Result<Produced> {
        self.progress.set_total(file.size);
        tell(tell_route, Route::Straight(file.clone()))?;
        let received = self.received.clone();
        self.layer(Box::new(received), layer, file)
    }

    /// Hands over the layer around a file, from so many bytes on; `reader` begins where the file does, or goes on.
    fn layer(
        mut self,
        mut reader: Box<dyn Read + Send>,
        from: u64,
        mut file: StoredFile,
    ) -> Result<Produced> {
        let position = from.saturating_sub(tar::DATA_OFFSET);
        let received = self.received.clone();
        if from == 0 {
            let begin = tar::prefix(&file.name, file.size)
                .map_err(|e| Error::with(ErrorKind::Image, "making the layer's header", e))?;
            self.writer.mark(self.begin.clone());
            self.writer.write_all(&begin).map_err(pushing)?;
        }
        let mark = |taken: u64| received.mark(position + taken);
        let mut indexed = Indexing { reader: &mut reader, index: Builder::new() };
        let mut reader = self.progress.storing(&mut indexed);
        let read = self.writer.read_all(&mut reader, &mark).map_err(|e| self.reading(e))?;
        drop(reader);
        file.size = position.saturating_add(read);
        let source_size = self.received.clone().finish(self.len)?;
        self.writer.write_all(&tar::suffix(file.size)).map_err(pushing)?;
        self.writer.finish().map_err(pushing)?;
        let index = if from == 0 { indexed.index.finish() } else { None };
        Ok(Produced { file, source_size, header: Vec::new(), index })
    }

    fn produce(mut self, tell_route: oneshot::Sender<Route>) -> Result<Produced> {
        let shown = self.opened.shown.clone();
        let unwrapped = wrapper::unwrap(Box::new(self.received.clone()), &self.limits);
        let unwrapped = unwrapped.map_err(|e| self.refused(e))?;
        if unwrapped.head.is_empty() {
            return Err(empty(&shown));
        }
        if let Some(advice) = self.opened.if_page.filter(|_| looks_like_html(&unwrapped.head)) {
            let text = format!("{shown} is a web page, not a disk image; {advice}");
            return Err(Error::new(ErrorKind::Source, text));
        }
        let stored_len = self.len.filter(|_| unwrapped.wrappers.is_empty());
        let probe = format::probe(&unwrapped.head, stored_len, &self.limits).map_err(|e| self.refused(e))?;
        let re_encoded = probe.format == Format::Raw;
        let format = if re_encoded { Format::Qcow2 } else { probe.format };
        let name = file_name(self.opened.name.as_deref(), &unwrapped.wrappers, format, re_encoded);

        let straight = stored_len.filter(|_| !re_encoded);
        if let Some(len) = self.len {
            let legs = if straight.is_some() { 1 } else { 2 };
            self.progress.set_total(len.saturating_mul(legs));
        }
        if let Some(size) = straight {
            let file = StoredFile { name, format, size, virtual_size: probe.virtual_size };
            tell(tell_route, Route::Straight(file.clone()))?;
            return self.layer(unwrapped.reader, 0, file);
        }
        tell(tell_route, Route::Staged)?;
        let mut reader = unwrapped.reader;
        self.writer.write_all(&staged_salt()).map_err(pushing)?;
        let at_random = match self.random.take().filter(|_| re_encoded && unwrapped.wrappers.is_empty()) {
            Some(source) => random::open_raw(source, &self.limits).map_err(|e| self.refused(e))?,
            None => None,
        };
        let is_streamed = at_random.is_none();
        let (size, virtual_size, header) = if let Some(disk) = at_random {
            drop(reader);
            let form = qcow2::WriteOptions::default();
            let mut target = StreamTarget::new(&mut self.writer, form.cluster_size as usize);
            let finished = random::encode(disk, &mut target, &form, &self.limits, &self.progress);
            let header = finished.and_then(|finished| Ok((finished, target.finish()?)));
            let (finished, header) = header.map_err(|e| match e.kind() {
                dvcr_converter::ErrorKind::Io => Error::with(ErrorKind::Source, "reading the source", e),
                _ => self.refused(e),
            })?;
            (finished.file_bytes, Some(finished.virtual_size), header)
        } else if re_encoded {
            // Cancelling stops the reader; the counts of the conversion are not the source's.
            let uncounted = Progress::default();
            uncounted.bound(&self.limits);
            let form = qcow2::WriteOptions::default();
            let mut target = StreamTarget::new(&mut self.writer, form.cluster_size as usize);
            let disk = Box::new(PlainReader::new(reader));
            let finished = stream_to_image(disk, None, &mut target, &form, &Options::default(), &uncounted);
            let header = finished.and_then(|finished| Ok((finished, target.finish()?)));
            let (finished, header) = header.map_err(|e| self.refused(e))?;
            (finished.file_bytes, Some(finished.virtual_size), header)
        } else {
            let stored = self.writer.read_all(&mut self.progress.storing(&mut reader), &|_| None);
            let size = stored.map_err(|e| self.reading(e))?;
            drop(reader);
            // With its whole length known, the header is held against it.
            let probe =
                format::probe(&unwrapped.head, Some(size), &self.limits).map_err(|e| self.refused(e))?;
            (size, probe.virtual_size, Vec::new())
        };
        let source_size = match self.len.filter(|_| !is_streamed) {
            Some(len) => len,
            None => self.received.clone().finish(self.len)?,
        };
        tracing::debug!(bytes = self.writer.written(), "the source is read");
        self.writer.finish().map_err(pushing)?;
        let file = StoredFile { name, format, size, virtual_size };
        Ok(Produced { file, source_size, header, index: None })
    }

    fn refused(&self, error: dvcr_converter::Error) -> Error {
        let kind = match error.kind() {
            dvcr_converter::ErrorKind::Cancelled => ErrorKind::Cancelled,
            _ => ErrorKind::Image,
        };
        Error::with(kind, format!("{} is not an image that can be imported", self.opened.shown), error)
    }

    fn reading(&self, error: io::Error) -> Error {
        self.refused(dvcr_converter::Error::io("reading the image", error))
    }
}

fn pushing(error: io::Error) -> Error {
    Error::with(ErrorKind::Registry, "handing bytes to the upload", error)
}

/// Tells the async side how the file reaches its layer.
fn tell(tell_route: oneshot::Sender<Route>, route: Route) -> Result<()> {
    tell_route.send(route).map_err(|_| Error::new(ErrorKind::Cancelled, "the transfer was stopped"))
}

/// Waits for what the source thread produced.
async fn ended(thread: SourceThread) -> Result<Produced> {
    thread.await.map_err(|e| Error::with(ErrorKind::Source, "the source thread ended early", e))?
}

/// Makes the index of what is read.
struct Indexing<R> {
    reader: R,
    index: Builder,
}

impl<R: Read> Read for Indexing<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buf)?;
        self.index.update(&buf[..count]);
        Ok(count)
    }
}

/// 244 random bits, as two version 4 UUIDs have them.
fn staged_salt() -> [u8; STAGED_SALT_BYTES] {
    let mut salt = [0; STAGED_SALT_BYTES];
    for half in salt.chunks_exact_mut(STAGED_SALT_BYTES / 2) {
        half.copy_from_slice(Uuid::new_v4().as_bytes());
    }
    salt
}

fn empty(shown: &str) -> Error {
    Error::new(ErrorKind::Source, format!("{shown} is empty (0 bytes); there is no image to import"))
}

fn looks_like_html(head: &[u8]) -> bool {
    let start = head.trim_ascii_start();
    let begins = |tag: &[u8]| start.get(..tag.len()).is_some_and(|s| s.eq_ignore_ascii_case(tag));
    begins(b"<!doctype html") || begins(b"<html") || begins(b"<head") || begins(b"<?xml") || begins(b"<!--")
}
