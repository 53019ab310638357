//! An image of this project's own making from one registry into another: its blobs and its manifest as they are.
//!
//! ```text
//!  manifest ──> ours? ──> each blob: there already, else mounted, else streamed ──> look inside ──> manifest
//!                 └─ no: the disk in it is imported like any other
//! ```

use std::sync::Arc;
use std::time::Instant;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use bytes::{Bytes, BytesMut};
use dvcr_converter::format;
use dvcr_converter::progress::Progress;
use dvcr_image::digest::Digest;
use dvcr_image::layout::{self, DiskLabels};
use dvcr_image::{
    BlobStream, BlobWriter, CHUNK_BYTES, DiskImage, Manifest, RangedBlob, Reference, Repository, Window,
};
use dvcr_image::{media_type, tar};

use crate::import::{ImportRequest, ImportSummary, Outcome};
use crate::{Error, ErrorKind, Result};

/// Largest configuration that is read, bytes; ours have a few hundred.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Most layers that an image of ours has.
const LAYERS_MAX: usize = 4;

/// An image that can stay as it is.
struct Own {
    manifest: Manifest,
    file_name: String,
    labels: DiskLabels,
    /// The layers, of which the first holds the disk, then the configuration.
    blobs: Vec<(Digest, u64)>,
}

/// Copies the image `from` to the destination, and returns `None` if it has to be imported like a file: if it does not
/// have the layout that an import makes (`docs/formats/disk-image.md`), or labels that tell of another disk.
///
/// Nothing is decoded. Blobs that the destination has are not sent, those of another repository of its registry are
/// mounted where it allows that, and others are streamed, their digests verified before they are committed.
pub(crate) async fn copy(
    request: &ImportRequest,
    from: &Reference,
    to: &Repository,
    progress: &Arc<Progress>,
) -> Result<Option<ImportSummary>> {
    let begun = Instant::now();
    let ImportRequest { destination, source_options, .. } = request;
    let failed = |e| Error::with(ErrorKind::Source, format!("reading the source image {from}"), e);
    let source = Repository::open(from, &source_options.client()).map_err(failed)?;
    let Some(own) = recognise(&source, from, request).await.map_err(failed)? else { return Ok(None) };

    let mountable = from.endpoint() == destination.endpoint();
    let copier = Copier { request, source: &source, from, to, progress };
    progress.set_phase("transfer");
    progress.set_total(own.blobs.iter().map(|(_, size)| *size).fold(0, u64::saturating_add));
    let (mut received, mut resumed_bytes) = (0, 0);
    for (digest, size) in &own.blobs {
        let is_there = to.blob_size(digest).await.map_err(|e| copier.registry(e))? == Some(*size);
        if is_there || mountable && copier.mount(digest).await {
            progress.advance(*size);
        } else {
            let resumed = copier.stream(digest, *size).await?;
            received += size - resumed;
            resumed_bytes += resumed;
        }
    }
    if !copier.labels_are_true(&own).await? {
        tracing::warn!(image = %from, "the labels of the image tell of another disk, importing the disk itself");
        return Ok(None);
    }
    progress.set_phase("commit");
    let Manifest { bytes, media_type, .. } = own.manifest;
    let digest = to.put_manifest(destination.target(), bytes, &media_type).await;
    let digest = digest.map_err(|e| copier.registry(e))?;
    let seconds = begun.elapsed().as_secs_f64();
    Ok(Some(ImportSummary {
        reference: destination.to_string(),
        digest: digest.to_string(),
        outcome: Outcome::Copied,
        file_name: own.file_name,
        format: own.labels.format.to_string(),
        virtual_size: own.labels.virtual_size,
        stored_size: own.labels.size,
        source_size: received,
        resumed_bytes,
        seconds,
        bytes_per_second: (received as f64 / seconds.max(1e-9)) as u64,
    }))
}

/// Looks whether the image is one that an import made: nothing compressed, all labels there, and the disk at its
/// place in the first layer, with the very bytes around it that this version writes.
async fn recognise(
    source: &Repository,
    from: &Reference,
    request: &ImportRequest,
) -> dvcr_image::Result<Option<Own>> {
    let (manifest, image) = source.image(from.target()).await?;
    let (config, layers) = (image.config(), image.layers());
    let Some(first) = layers.first() else { return Ok(None) };
    let is_ours = manifest.media_type == media_type::OCI_MANIFEST
        && config.media_type().to_string() == media_type::OCI_CONFIG
        && config.size() <= CONFIG_BYTES_MAX
        && layers.len() <= LAYERS_MAX
        && layers.iter().all(|layer| layer.media_type().to_string() == media_type::OCI_LAYER)
        // What is pushed is hashed by this algorithm.
        && layers.iter().chain([config]).all(|blob| blob.digest().as_ref().starts_with("sha256:"));
    if !is_ours {
        return Ok(None);
    }
    let bytes = source.small_blob(config.digest(), config.size()).await?;
    let Some(labels) = layout::labels(&bytes) else { return Ok(None) };
    let disk = DiskImage::locate(source, manifest.digest.as_ref(), &request.limits).await?;
    let has_layout = disk.place() == Some((first.digest(), tar::DATA_OFFSET))
        && disk.size() == labels.size
        && tar::layer_bytes(labels.size) == Some(first.size());
    let Some(prefix) = tar::prefix(disk.file_name(), labels.size).ok().filter(|_| has_layout) else {
        return Ok(None);
    };
    let mut begin = source.blob_range(first.digest(), 0..tar::DATA_OFFSET);
    let mut position = 0;
    while let Some(bytes) = begin.next().await? {
        if prefix.get(position..position + bytes.len()) != Some(&bytes[..]) {
            return Ok(None);
        }
        position += bytes.len();
    }
    let blobs = layers.iter().chain([config]);
    let blobs = blobs.map(|blob| (blob.digest().clone(), blob.size())).collect();
    Ok(Some(Own { manifest, file_name: disk.file_name().to_owned(), labels, blobs }))
}

struct Copier<'a> {
    request: &'a ImportRequest,
    source: &'a Repository,
    from: &'a Reference,
    to: &'a Repository,
    progress: &'a Arc<Progress>,
}

impl Copier<'_> {
    /// Whether the registry made its own blob one of the destination. If it does not want to, it is sent.
    async fn mount(&self, digest: &Digest) -> bool {
        let mounted = self.to.mount(digest, self.from.repository()).await;
        mounted.unwrap_or_else(|error| {
            tracing::debug!(%digest, %error, "a blob could not be mounted, copying it");
            false
        })
    }

    /// Streams a blob; either side goes on where it broke off, and so does the next copy if this one ends early. Returns the
    /// bytes that were there already.
    async fn stream(&self, digest: &Digest, size: u64) -> Result<u64> {
        let name = format!("copy-{}", digest.digest());
        let (upload, note) =
            self.to.return_to_upload(&name, Some(size)).await.map_err(|e| self.registry(e))?;
        let note = note.map(|text| read_note(&text).filter(|(position, _)| *position <= size));
        let (mut blob, begun) = match note {
            None => (BlobWriter::from(upload), 0),
            Some(Some((position, state))) => {
                let blob = BlobWriter::resume(upload, position, &state).map_err(|e| self.registry(e))?;
                tracing::info!(%digest, position, "the copy of a blob goes on where it was");
                self.progress.skip_to(self.progress.done().saturating_add(position));
                (blob, position)
            }
            Some(None) => {
                upload.cancel().await;
                (self.to.start_blob().await.map_err(|e| self.registry(e))?, 0)
            }
        };
        let mut stream = match begun {
            0 => self.source.blob(digest, size),
            _ => self.source.blob_range(digest, begun..size),
        };
        match self.pass_on(&mut stream, &mut blob).await {
            Ok(()) => {}
            Err(error) => {
                // What a damaged source sent, or one that cannot be gone on with, is of no use to the next.
                if !is_passing(&error) {
                    blob.cancel().await;
                }
                return Err(error);
            }
        }
        blob.finish_as(digest).await.map_err(|e| match e.kind() {
            dvcr_image::ErrorKind::Mismatch => self.reading(digest, e),
            _ => self.registry(e),
        })?;
        Ok(begun)
    }

    /// Sends chunk after chunk; while one is sent, the next is received.
    async fn pass_on(&self, stream: &mut BlobStream, blob: &mut BlobWriter) -> Result<()> {
        let mut chunk = self.chunk(stream).await?;
        while !chunk.is_empty() {
            let received = chunk.len() as u64;
            if let Some(note) = write_note(&blob.state()) {
                blob.leave_note(note);
            }
            let (sent, next) = tokio::join!(blob.push(chunk), self.chunk(stream));
            sent.map_err(|e| self.registry(e))?;
            self.progress.advance(received);
            chunk = next?;
        }
        Ok(())
    }

    /// The next bytes of a blob, as many as are sent at a time; none at its end.
    async fn chunk(&self, stream: &mut BlobStream) -> Result<Bytes> {
        // The last bytes may reach a little further.
        let mut chunk = BytesMut::with_capacity(CHUNK_BYTES + (CHUNK_BYTES >> 4));
        while chunk.len() < CHUNK_BYTES {
            self.progress.check().map_err(Error::stopped)?;
            match stream.next().await {
                Ok(Some(bytes)) => chunk.extend_from_slice(&bytes),
                Ok(None) => break,
                Err(error) => return Err(self.reading(stream.digest(), error)),
            }
        }
        self.progress.store(chunk.len() as u64).map_err(Error::stopped)?;
        Ok(chunk.freeze())
    }

    fn reading(&self, digest: &Digest, error: dvcr_image::Error) -> Error {
        Error::with(ErrorKind::Source, format!("copying blob {digest} of {}", self.from), error)
    }

    /// Opens the disk where it lies now, verified, and holds it against what the labels say.
    async fn labels_are_true(&self, own: &Own) -> Result<bool> {
        let Some((layer, layer_bytes)) = own.blobs.first().cloned() else { return Ok(false) };
        let runtime = tokio::runtime::Handle::current();
        let blob = RangedBlob::new(self.to.clone(), layer, layer_bytes, runtime);
        let window = Window::new(&blob, tar::DATA_OFFSET, own.labels.size).map_err(|e| self.registry(e))?;
        let limits = self.request.limits.clone();
        let opened = tokio::task::spawn_blocking(move || format::open(Arc::new(window), &limits)).await;
        let opened = opened
            .map_err(|e| Error::with(ErrorKind::Registry, "the thread that looks inside ended early", e))?;
        let refused = |e| {
            let text = format!("{} of {} is not an image that can be imported", own.file_name, self.from);
            Error::with(ErrorKind::Image, text, e)
        };
        let info = opened.map_err(refused)?.info;
        Ok(info.format == own.labels.format && info.virtual_size == own.labels.virtual_size)
    }

    fn registry(&self, error: dvcr_image::Error) -> Error {
        Error::storing(format!("copying to {}", self.request.destination), error)
    }
}

/// Whether a later attempt can go on with what the registry has.
fn is_passing(error: &Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<dvcr_image::Error>());
    matches!(error.kind(), ErrorKind::Cancelled)
        || cause.is_some_and(|cause| {
            matches!(cause.kind(), dvcr_image::ErrorKind::Unavailable | dvcr_image::ErrorKind::Full)
        })
}

/// What is left with a session: where its next chunk begins, and the state of the hash there.
fn write_note(state: &(u64, Vec<u8>)) -> Option<String> {
    serde_json::to_vec(state).ok().map(|json| BASE64_URL_SAFE_NO_PAD.encode(json))
}

fn read_note(text: &str) -> Option<(u64, Vec<u8>)> {
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(text).ok()?).ok()
}
