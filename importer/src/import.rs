//! An image from a source into a registry; the crate's documentation has the picture.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dvcr_converter::convert::{Options, stream_to_image};
use dvcr_converter::format::{self, Format};
use dvcr_converter::limits::Limits;
use dvcr_converter::plain::PlainReader;
use dvcr_converter::progress::Progress;
use dvcr_converter::sink::StreamTarget;
use dvcr_converter::{qcow2, wrapper};
use dvcr_image::digest::{self, Digest, Hasher};
use dvcr_image::layout::DiskLabels;
use dvcr_image::{ClientOptions, Reference, Repository, tar};
use dvcr_image::{RangedBlob, Window};
use serde::Serialize;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::checksum::{Checksum, Checksums};
use crate::chunks::{self, ChunkWriter};
use crate::name::file_name;
use crate::source::{Opened, Received, Source, SourceOptions};
use crate::{Error, ErrorKind, Result};

/// How often a running import looks whether it was cancelled, milliseconds.
const CANCEL_POLL_MS: u64 = 50;
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
    /// Name of the stored file.
    pub file_name: String,
    /// Format of the stored file.
    pub format: String,
    /// Bytes a guest sees.
    pub virtual_size: u64,
    /// Bytes of the stored file.
    pub stored_size: u64,
    /// Bytes that the source sent.
    pub source_size: u64,
    /// From the first request to the tag.
    pub seconds: f64,
    /// Source bytes per second.
    pub bytes_per_second: u64,
}

/// Imports an image. Nothing is published unless all of it is right.
///
/// `progress` passes the phases "transfer", for some sources "assemble", and "commit". It counts the source's bytes;
/// with "assemble" the total is twice these and the second half counts the layer's bytes in proportion, so that the
/// share never goes back. The total is zero while the source's length is unknown.
///
/// When the future is dropped, or [`Progress::cancel`] is called, the transfer ends at once, and open uploads and
/// staged blobs are cleaned up as far as the registry answers within a few seconds.
pub async fn import(request: ImportRequest, progress: Arc<Progress>) -> Result<ImportSummary> {
    if let Some(digest) = request.destination.digest() {
        let text =
            format!("the destination names the digest {digest}, which only its content decides; name a tag");
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    request.source_options.admit_checksums(&request.source, &request.checksums)?;
    let repository = Repository::open(&request.destination, &request.client)
        .map_err(|e| Error::with(ErrorKind::Registry, "preparing the registry client", e))?;
    progress.bound(&request.limits);
    let transfer = Transfer { request: &request, repository: &repository, progress: &progress };
    let outcome = tokio::select! {
        outcome = transfer.run() => outcome,
        error = cancelled(&progress) => Err(error),
    };
    repository.settle().await;
    outcome
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// The chunks are the layer.
    Straight,
    /// The chunks are the file, or all of it but its first cluster.
    Staged,
}

/// What the source thread tells at its end.
struct Produced {
    /// Bytes of the stored file, and its format.
    size: u64,
    format: Format,
    /// Bytes a guest sees; `None` if the beginning of the file does not tell.
    virtual_size: Option<u64>,
    file_name: String,
    source_size: u64,
    /// The part of the file that goes before what was staged.
    header: Vec<u8>,
}

impl Transfer<'_> {
    async fn run(&self) -> Result<ImportSummary> {
        let begun = Instant::now();
        let ImportRequest { source, source_options, limits, .. } = self.request;
        let checksums = Checksums::new(&self.request.checksums)?;
        self.progress.set_phase("transfer");
        let mut opened = source.open(source_options, limits, None).await?;
        // Lives as long as this future: when it is dropped, the source thread is not left waiting.
        let _pump = opened.pump.take();
        if opened.len == Some(0) {
            return Err(empty(&opened.shown));
        }

        let (writer, mut chunks) = chunks::channel();
        let (tell_route, route) = oneshot::channel();
        let producer = Producer {
            len: opened.len,
            received: Received::new(
                std::mem::replace(&mut opened.reader, Box::new(io::empty())),
                checksums,
                self.progress.clone(),
            ),
            opened,
            limits: limits.clone(),
            progress: self.progress.clone(),
            writer,
        };
        let thread = tokio::task::spawn_blocking(move || producer.run(tell_route));
        let ended = |e| Error::with(ErrorKind::Source, "the source thread ended early", e);

        let (layer, produced) = match route.await {
            // The source thread failed before it knew.
            Err(_) => (None, thread.await.map_err(ended)??),
            Ok(Route::Straight) => {
                let mut blob = self.repository.start_blob().await.map_err(|e| self.registry(e))?;
                chunks.push_to(&mut blob, |_| {}).await.map_err(|e| self.registry(e))?;
                let produced = thread.await.map_err(ended)??;
                self.progress.set_phase("commit");
                (Some(blob.finish().await.map_err(|e| self.registry(e))?), produced)
            }
            Ok(Route::Staged) => {
                let mut blob = self.repository.start_blob().await.map_err(|e| self.registry(e))?;
                chunks.push_to(&mut blob, |_| {}).await.map_err(|e| self.registry(e))?;
                let produced = thread.await.map_err(ended)??;
                let (digest, size) = blob.finish().await.map_err(|e| self.registry(e))?;
                let staged = Staged { repository: self.repository.clone(), digest, size };
                self.progress.set_phase("assemble");
                (Some(self.assemble(&staged, &produced).await?), produced)
            }
        };
        let Some((digest, size)) = layer else {
            return Err(Error::new(ErrorKind::Source, "the source thread ended without a word"));
        };
        self.progress.set_phase("commit");
        let virtual_size = match produced.virtual_size {
            Some(virtual_size) => virtual_size,
            None => self.look_inside(&digest, size, &produced).await?,
        };
        let labels = DiskLabels { size: produced.size, virtual_size, format: produced.format };
        let target = self.request.destination.target();
        let manifest = dvcr_image::publish(self.repository, target, &labels, (&digest, size));
        let manifest = manifest.await.map_err(|e| self.registry(e))?;
        let seconds = begun.elapsed().as_secs_f64();
        Ok(ImportSummary {
            reference: self.request.destination.to_string(),
            digest: manifest.to_string(),
            file_name: produced.file_name,
            format: produced.format.to_string(),
            virtual_size,
            stored_size: produced.size,
            source_size: produced.source_size,
            seconds,
            bytes_per_second: (produced.source_size as f64 / seconds.max(1e-9)) as u64,
        })
    }

    /// Reads the staged blob back into a layer, without its salt.
    async fn assemble(&self, staged: &Staged, produced: &Produced) -> Result<(Digest, u64)> {
        let size = produced.size;
        let mut begin = tar::prefix(&produced.file_name, size).map_err(|e| self.registry(e))?;
        begin.extend(&produced.header);
        let end = tar::suffix(size);
        let whole = (begin.len() + end.len()) as u64 + staged.size.saturating_sub(STAGED_SALT_BYTES as u64);
        let mut share = Share::new(self.progress, produced.source_size, whole);

        let (mut writer, mut chunks) = chunks::channel();
        let mut stream = self.repository.blob(&staged.digest, staged.size);
        let mut hasher = Hasher::matching(&staged.digest).map_err(|e| self.registry(e))?;
        let expected = staged.digest.clone();
        let runtime = tokio::runtime::Handle::current();
        let thread = tokio::task::spawn_blocking(move || -> io::Result<()> {
            writer.write_all(&begin)?;
            let mut salt_left = STAGED_SALT_BYTES;
            while let Some(mut bytes) = runtime.block_on(stream.next())? {
                hasher.update(&bytes);
                let salt = bytes.split_to(salt_left.min(bytes.len()));
                salt_left -= salt.len();
                writer.write_all(&bytes)?;
            }
            digest::same(&hasher.finish()?, &expected, "what was staged in the registry")?;
            writer.write_all(&end)?;
            writer.finish()
        });

        let mut layer = self.repository.start_blob().await.map_err(|e| self.registry(e))?;
        chunks.push_to(&mut layer, |bytes| share.advance(bytes)).await.map_err(|e| self.registry(e))?;
        let read = thread
            .await
            .map_err(|e| Error::with(ErrorKind::Registry, "the assembling thread ended early", e))?;
        read.map_err(|e| {
            Error::with(ErrorKind::Registry, "reading back what was staged in the registry", e)
        })?;
        self.progress.set_phase("commit");
        layer.finish().await.map_err(|e| self.registry(e))
    }

    /// Opens the image where it lies now, in a layer that nobody refers to yet, and returns the bytes a guest sees. A
    /// layer that is refused is left to the registry's garbage collection, for it may be in another image too.
    async fn look_inside(&self, layer: &Digest, layer_bytes: u64, produced: &Produced) -> Result<u64> {
        let begin = tar::prefix(&produced.file_name, produced.size).map_err(|e| self.registry(e))?;
        let runtime = tokio::runtime::Handle::current();
        let blob = RangedBlob::new(self.repository.clone(), layer.clone(), layer_bytes, runtime);
        let window = Window::new(blob, begin.len() as u64, produced.size).map_err(|e| self.registry(e))?;
        let limits = self.request.limits.clone();
        let opened = tokio::task::spawn_blocking(move || format::open(Arc::new(window), &limits)).await;
        let opened = opened
            .map_err(|e| Error::with(ErrorKind::Registry, "the thread that looks inside ended early", e))?;
        let refused = |e| {
            let text = format!("{} is not an image that can be imported", produced.file_name);
            Error::with(ErrorKind::Image, text, e)
        };
        opened.map(|image| image.info.virtual_size).map_err(refused)
    }

    fn registry(&self, error: dvcr_image::Error) -> Error {
        Error::with(ErrorKind::Registry, format!("importing into {}", self.request.destination), error)
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

/// Counts `part` bytes of progress while `whole` bytes of work are done.
struct Share<'a> {
    progress: &'a Progress,
    part: u64,
    whole: u64,
    worked: u64,
    counted: u64,
}

impl<'a> Share<'a> {
    fn new(progress: &'a Progress, part: u64, whole: u64) -> Self {
        if progress.total() == 0 {
            progress.set_total(progress.done().saturating_add(part));
        }
        Self { progress, part, whole, worked: 0, counted: 0 }
    }

    fn advance(&mut self, bytes: u64) {
        self.worked = (self.worked + bytes).min(self.whole);
        let due = u128::from(self.part) * u128::from(self.worked) / u128::from(self.whole.max(1));
        let due = u64::try_from(due).unwrap_or(self.part);
        self.progress.advance(due - self.counted);
        self.counted = due;
    }
}

/// The source thread: from received bytes to chunks.
struct Producer {
    received: Received,
    len: Option<u64>,
    opened: Opened,
    limits: Limits,
    progress: Arc<Progress>,
    writer: ChunkWriter,
}

impl Producer {
    fn run(self, tell_route: oneshot::Sender<Route>) -> Result<Produced> {
        let received = self.received.clone();
        // What went wrong at the source explains whatever failed after it.
        self.produce(tell_route).map_err(|error| received.failure().unwrap_or(error))
    }

    fn produce(mut self, tell_route: oneshot::Sender<Route>) -> Result<Produced> {
        let shown = self.opened.shown.clone();
        let image = |e: dvcr_converter::Error| {
            let kind = match e.kind() {
                dvcr_converter::ErrorKind::Cancelled => ErrorKind::Cancelled,
                _ => ErrorKind::Image,
            };
            Error::with(kind, format!("{shown} is not an image that can be imported"), e)
        };
        let unwrapped = wrapper::unwrap(Box::new(self.received.clone()), &self.limits).map_err(image)?;
        if unwrapped.head.is_empty() {
            return Err(empty(&shown));
        }
        if self.opened.is_html && looks_like_html(&unwrapped.head) {
            let text = format!("{shown} is a web page, not a disk image; use the address of the file itself");
            return Err(Error::new(ErrorKind::Source, text));
        }
        let stored_len = self.len.filter(|_| unwrapped.wrappers.is_empty());
        let probe = format::probe(&unwrapped.head, stored_len, &self.limits).map_err(image)?;
        let re_encoded = probe.format == Format::Raw;
        let stored_format = if re_encoded { Format::Qcow2 } else { probe.format };
        let file_name =
            file_name(self.opened.name.as_deref(), &unwrapped.wrappers, stored_format, re_encoded);

        let straight = stored_len.filter(|_| !re_encoded);
        if let Some(len) = self.len {
            let legs = if straight.is_some() { 1 } else { 2 };
            self.progress.set_total(len.saturating_mul(legs));
        }
        let route = if straight.is_some() { Route::Straight } else { Route::Staged };
        if tell_route.send(route).is_err() {
            return Err(Error::new(ErrorKind::Cancelled, "the transfer was stopped"));
        }
        let mut reader = unwrapped.reader;
        let pushing = |e| Error::with(ErrorKind::Registry, "handing bytes to the upload", e);
        if route == Route::Staged {
            self.writer.write_all(&staged_salt()).map_err(pushing)?;
        }
        let reading = |e: io::Error| image(dvcr_converter::Error::io("reading the image", e));

        let (size, virtual_size, header) = if re_encoded {
            // Cancelling stops the reader; the counts of the conversion are not the source's.
            let uncounted = Progress::default();
            uncounted.bound(&self.limits);
            let form = qcow2::WriteOptions::default();
            let mut target = StreamTarget::new(&mut self.writer, form.cluster_size as usize);
            let disk = Box::new(PlainReader::new(reader));
            let finished = stream_to_image(disk, None, &mut target, &form, &Options::default(), &uncounted);
            let finished = finished.map_err(image)?;
            (finished.file_bytes, Some(finished.virtual_size), target.finish().map_err(image)?)
        } else {
            if let Some(len) = straight {
                let begin = tar::prefix(&file_name, len)
                    .map_err(|e| Error::with(ErrorKind::Image, "making the layer's header", e))?;
                self.writer.write_all(&begin).map_err(pushing)?;
            }
            let size = self.writer.read_all(&mut self.progress.storing(&mut reader)).map_err(reading)?;
            drop(reader);
            // With its whole length known, the header is held against it.
            let probe = format::probe(&unwrapped.head, Some(size), &self.limits).map_err(image)?;
            (size, probe.virtual_size, Vec::new())
        };
        let source_size = self.received.clone().finish(self.len)?;
        if straight.is_some() {
            self.writer.write_all(&tar::suffix(size)).map_err(pushing)?;
        }
        tracing::debug!(bytes = self.writer.written(), ?route, "the source is read");
        self.writer.finish().map_err(pushing)?;
        Ok(Produced { size, format: stored_format, virtual_size, file_name, source_size, header })
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
