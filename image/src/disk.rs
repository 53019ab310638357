//! A disk in an image: published by us, found in anyone's.
//!
//! ```text
//!  manifest ──> layers, last first ──> plain tar: walk the headers by ranges ──> Window (random access)
//!                               └─> gz, zst, or no ranges: walk as a stream ──> DiskStream (forward, verified)
//!  config   ──> labels: does one of the layers hold an index of the disk? ──> the Window is verified too
//! ```

use std::io::{Cursor, Read};
use std::sync::{Arc, Mutex};

use bytes::{Buf, Bytes};
use dvcr_converter::limits::Limits;
use dvcr_converter::wrapper;
use oci_spec::image::{Descriptor, ImageConfiguration, ImageManifest};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::digest::{self, Digest, Hasher};
use crate::index::{self, Index};
use crate::layout::{self, DiskLabels};
use crate::merge::{self, Found, Hidden, Reach};
use crate::ranged::{RangedBlob, Window};
use crate::tar::{self, Forward, Source};
use crate::{Error, ErrorKind, Repository, Result, media_type};

/// Parts of a layer that may wait for their reader.
const PARTS_WAITING_MAX: usize = 16;
/// Longest configuration that is looked into, bytes.
const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// First bytes of a layer that tell its compression.
const MAGIC_BYTES: usize = 16;

/// Makes an image of a pushed layer, and of the index of its file if there is one, and gives it the tag `target`. Returns
/// the manifest's digest.
///
/// `layer` is an uncompressed tar of this crate's layout, already a blob of `repository`, with its length in bytes.
pub async fn publish(
    repository: &Repository,
    target: &str,
    labels: &DiskLabels,
    layer: layout::Layer<'_>,
    index: Option<&Index>,
) -> Result<Digest> {
    let index = match index {
        Some(index) => {
            let bytes = index.layer();
            let size = bytes.len() as u64;
            Some((repository.push_blob(bytes.into()).await?, size))
        }
        None => None,
    };
    let index = index.as_ref().map(|(digest, size)| (digest, *size));
    let config = layout::config(labels, layer.0, index.map(|(digest, _)| digest))?;
    let config_bytes = config.len() as u64;
    let config = repository.push_blob(config.into()).await?;
    let layers: Vec<_> = [layer].into_iter().chain(index).collect();
    let manifest = layout::manifest((&config, config_bytes), &layers)?;
    repository.put_manifest(target, manifest.into(), media_type::OCI_MANIFEST).await
}

/// The disk file found in an image.
#[derive(Clone, Debug)]
pub struct DiskImage {
    repository: Repository,
    manifest: Digest,
    layer: Layer,
    found: Found,
    seekable: bool,
    index: Option<Arc<Index>>,
    limits: Limits,
    runtime: Handle,
}

#[derive(Clone, Debug)]
struct Layer {
    digest: Digest,
    size: u64,
}

impl DiskImage {
    /// Finds the first regular file below `disk/` in the last layer that has one, in the image of a tag or digest;
    /// what the layers after it hide or remove does not count.
    ///
    /// An image without one is [`ErrorKind::NotFound`]. If the image's labels say that it has an index of this disk, that is
    /// read too, and one that is missing or malformed is [`ErrorKind::Corrupt`]; images of others have none. Costs a ranged read of either end for an image of our own
    /// layout; compressed layers are decoded up to the file, inside `limits`.
    pub async fn locate(repository: &Repository, target: &str, limits: &Limits) -> Result<Self> {
        let (manifest, image) = repository.image(target).await?;
        let runtime = Handle::current();
        let indexed = Indexed::of(repository, &image).await?;
        let mut hidden = Hidden::default();
        for descriptor in image.layers().iter().rev() {
            if !may_hold_files(descriptor) || indexed.is_index(descriptor) {
                continue;
            }
            let layer = Layer { digest: descriptor.digest().clone(), size: descriptor.size() };
            let search = Search {
                repository: repository.clone(),
                layer: layer.clone(),
                limits: limits.clone(),
                runtime: runtime.clone(),
            };
            let searching = tokio::task::spawn_blocking(move || {
                let outcome = search.run(&mut hidden);
                (outcome, hidden)
            });
            let (outcome, hidden_now) = searching.await.map_err(|e| {
                Error::with(ErrorKind::Unavailable, "the thread that reads a layer ended early", e)
            })?;
            hidden = hidden_now;
            if let Some((found, seekable)) = outcome? {
                // A stream is verified by its layer's digest.
                let index = if seekable { indexed.load(repository, &layer, &found).await? } else { None };
                return Ok(Self {
                    index,
                    repository: repository.clone(),
                    manifest: manifest.digest,
                    layer,
                    found,
                    seekable,
                    limits: limits.clone(),
                    runtime,
                });
            }
        }
        Err(Error::new(
            ErrorKind::NotFound,
            format!("image {target} of {repository:?} has no file below disk/ in any layer"),
        ))
    }

    /// Name of the file, without its directory.
    pub fn file_name(&self) -> &str {
        self.found.file_name()
    }

    /// Length of the stored file, bytes.
    pub fn size(&self) -> u64 {
        self.found.size
    }

    /// Digest of the image's manifest.
    pub fn manifest(&self) -> &Digest {
        &self.manifest
    }

    /// Whether what [`DiskImage::window`] gives is verified.
    pub fn is_indexed(&self) -> bool {
        self.index.is_some()
    }

    /// The layer that holds the file, and where in it the file begins, if the layer is a plain tar and the registry serves
    /// ranges.
    pub fn place(&self) -> Option<(&Digest, u64)> {
        self.seekable.then_some((&self.layer.digest, self.found.offset))
    }

    /// Random access to the file, if its layer is a plain tar and the registry serves ranges. What is read this way
    /// is verified by the image's index, if it has one, and not at all otherwise: no other digest covers a part of a layer.
    pub fn window(&self) -> Result<Option<Window>> {
        if !self.seekable {
            return Ok(None);
        }
        let blob = blob(&self.repository, &self.layer, &self.runtime);
        match &self.index {
            Some(index) => Window::verified(&blob, self.found.offset, index.clone()),
            None => Window::new(&blob, self.found.offset, self.found.size),
        }
        .map(Some)
    }

    /// Opens the file as a stream. Must not be read on the runtime's own async threads.
    ///
    /// The last read, the one that tells the end, reads the rest of the layer and fails with
    /// [`ErrorKind::Mismatch`] if the layer does not have its digest, with [`ErrorKind::Unsupported`] if a later
    /// entry of a compressed layer replaces the file.
    pub fn stream(&self) -> Result<DiskStream> {
        let raw = Raw::open(&self.repository, &self.layer, &self.runtime)?;
        let mut tar = Forward(decoded(&raw, &self.limits)?);
        tar.skip(self.found.offset)?;
        Ok(DiskStream { raw, tar: tar.0, found: self.found.clone(), left: self.found.size, end: End::Ahead })
    }
}

/// What an image's labels say of an index.
#[derive(Default)]
struct Indexed {
    /// The layer that it is of.
    of: String,
    /// The layer that holds it, as the labels have it and as the manifest has it.
    named: String,
    layer: Option<Layer>,
}

impl Indexed {
    /// Reads the labels; of a configuration that is none nothing is known.
    async fn of(repository: &Repository, image: &ImageManifest) -> Result<Self> {
        let config = image.config();
        if config.size() > CONFIG_BYTES_MAX {
            return Ok(Self::default());
        }
        let bytes = match whole_blob(repository, config.digest(), config.size()).await {
            Ok(bytes) => bytes,
            // Images of others need none.
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Mismatch) => {
                return Ok(Self::default());
            }
            Err(e) => return Err(e),
        };
        let labels = serde_json::from_slice::<ImageConfiguration>(&bytes).ok();
        let labels = labels.and_then(|config| config.config().as_ref()?.labels().clone()).unwrap_or_default();
        let (Some(of), Some(named)) =
            (labels.get(layout::LABEL_INDEXED_LAYER), labels.get(layout::LABEL_INDEX_LAYER))
        else {
            return Ok(Self::default());
        };
        let layer = image.layers().iter().find(|layer| layer.digest().as_ref() == named);
        let layer = layer.map(|layer| Layer { digest: layer.digest().clone(), size: layer.size() });
        Ok(Self { of: of.clone(), named: named.clone(), layer })
    }

    fn is_index(&self, descriptor: &Descriptor) -> bool {
        self.layer.as_ref().is_some_and(|layer| layer.digest == *descriptor.digest())
    }

    /// Reads the index, if it is of the disk that was found.
    async fn load(&self, repository: &Repository, disk: &Layer, found: &Found) -> Result<Option<Arc<Index>>> {
        if self.of != disk.digest.as_ref() {
            return Ok(None);
        }
        let corrupt = |what: String, cause: Option<Error>| {
            let text =
                format!("the image says that layer {} indexes its disk, {what}; import it again", self.named);
            match cause {
                Some(cause) => Error::with(cause.kind(), text, cause),
                None => Error::new(ErrorKind::Corrupt, text),
            }
        };
        let Some(layer) = &self.layer else {
            return Err(corrupt("but has no such layer".to_owned(), None));
        };
        if layer.size > index::LAYER_BYTES_MAX {
            let text = format!(
                "but it has {} bytes, and no index is longer than {}",
                layer.size,
                index::LAYER_BYTES_MAX
            );
            return Err(corrupt(text, None));
        }
        let bytes = whole_blob(repository, &layer.digest, layer.size).await?;
        let index =
            Index::from_layer(&bytes).map_err(|e| corrupt("which cannot be read".to_owned(), Some(e)))?;
        if index.file_bytes() != found.size {
            let text = format!(
                "but it is of a file of {} bytes, and the disk has {}",
                index.file_bytes(),
                found.size
            );
            return Err(corrupt(text, None));
        }
        Ok(Some(Arc::new(index)))
    }
}

/// Reads a small blob, and verifies it.
async fn whole_blob(repository: &Repository, digest: &Digest, size: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut stream = repository.blob(digest, size);
    while let Some(part) = stream.next().await? {
        bytes.extend_from_slice(&part);
    }
    digest::verify(&bytes, digest, &format!("blob {digest}"))?;
    Ok(bytes)
}

/// Attestations, signatures and the like are no file systems.
fn may_hold_files(descriptor: &Descriptor) -> bool {
    descriptor.media_type().to_string().contains("tar")
}

fn blob(repository: &Repository, layer: &Layer, runtime: &Handle) -> RangedBlob {
    RangedBlob::new(repository.clone(), layer.digest.clone(), layer.size, runtime.clone())
}

struct Search {
    repository: Repository,
    layer: Layer,
    limits: Limits,
    runtime: Handle,
}

impl Search {
    /// The disk, and whether it can be read at random.
    fn run(&self, hidden: &mut Hidden) -> Result<Option<(Found, bool)>> {
        let blob = blob(&self.repository, &self.layer, &self.runtime);
        let mut head = vec![0; blob.size().min(MAGIC_BYTES as u64) as usize];
        let seekable = match blob.read(&mut head, 0) {
            Ok(()) => wrapper::detect(&head).is_none(),
            Err(error) if error.kind() == ErrorKind::Unsupported => false,
            Err(error) => return Err(error),
        };
        let found = if seekable {
            merge::find_disk(&mut Ranged { blob, position: 0 }, hidden, Reach::Whole)
        } else {
            let raw = Raw::open(&self.repository, &self.layer, &self.runtime)?;
            let tar = decoded(&raw, &self.limits)?;
            merge::find_disk(&mut Forward(tar), hidden, Reach::FirstDisk)
        };
        let place =
            |e: Error| Error::with(e.kind(), format!("looking for a disk in layer {}", self.layer.digest), e);
        Ok(found.map_err(place)?.map(|found| (found, seekable)))
    }
}

/// A tar read by ranges: skipping costs nothing.
struct Ranged {
    blob: RangedBlob,
    position: u64,
}

impl Source for Ranged {
    fn read(&mut self, buf: &mut [u8]) -> Result<bool> {
        if self.position >= self.blob.size() {
            return Ok(false);
        }
        self.blob.read(buf, self.position)?;
        self.position += buf.len() as u64;
        Ok(true)
    }

    fn skip(&mut self, bytes: u64) -> Result<()> {
        self.position = self.position.saturating_add(bytes);
        Ok(())
    }
}

/// The file's bytes in order; see [`DiskImage::stream`].
pub struct DiskStream {
    raw: SharedRaw,
    tar: Box<dyn Read + Send>,
    found: Found,
    left: u64,
    end: End,
}

/// What is known of the layer behind the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Ahead,
    /// Reading it failed, or it replaces the file.
    Refused,
    /// It leaves the file alone, and the digest is right.
    Verified,
}

impl DiskStream {
    /// Reads what is behind the file.
    fn verify(&mut self) -> std::io::Result<()> {
        let padding = tar::padding(self.found.size);
        std::io::copy(&mut Read::by_ref(&mut self.tar).take(padding), &mut std::io::sink())?;
        merge::refuse_another(&mut Forward(&mut self.tar), &self.found.path)?;
        std::io::copy(&mut self.tar, &mut std::io::sink())?;
        std::io::copy(&mut self.raw, &mut std::io::sink())?;
        Ok(())
    }
}

impl Read for DiskStream {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let wanted = buf.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if wanted == 0 {
            if self.end == End::Refused {
                return Err(Error::new(ErrorKind::Corrupt, "the layer was found to be bad before").into());
            }
            if self.end == End::Ahead {
                self.end = End::Refused;
                self.verify()?;
                self.end = End::Verified;
            }
            return Ok(0);
        }
        let count = self.tar.read(&mut buf[..wanted])?;
        if count == 0 {
            return Err(Error::new(ErrorKind::Corrupt, "the layer ends before the disk in it").into());
        }
        self.left -= count as u64;
        Ok(count)
    }
}

/// Undoes the layer's compression, whatever its media type says, in a third of the memory for decoders: a disk that is
/// compressed itself needs the rest.
fn decoded(raw: &SharedRaw, limits: &Limits) -> Result<Box<dyn Read + Send>> {
    let mut raw = raw.clone();
    let mut head = Vec::with_capacity(MAGIC_BYTES);
    let read = Read::by_ref(&mut raw).take(MAGIC_BYTES as u64).read_to_end(&mut head);
    read.map_err(|e| tar::unwrap_io("reading a layer", e))?;
    let compression = wrapper::detect(&head);
    let whole = Box::new(Read::chain(Cursor::new(head), raw));
    let limits = Limits { decoder_memory_bytes_max: limits.decoder_memory_bytes_max / 3, ..limits.clone() };
    match compression {
        None => Ok(whole),
        Some(wrapper) => wrapper::decoder(wrapper, whole, &limits)
            .map_err(|e| Error::with(ErrorKind::Corrupt, "opening a compressed layer", e)),
    }
}

/// The bytes of a layer's blob as they come, hashed on the way; shared by a decoder and whoever drains the rest.
#[derive(Clone)]
struct SharedRaw(Arc<Mutex<Raw>>);

struct Raw {
    parts: mpsc::Receiver<Result<Bytes>>,
    part: Bytes,
    expected: Digest,
    /// Gone once the digest was compared.
    hasher: Option<Hasher>,
    /// Whether a read failed; no later one may look like the end.
    failed: bool,
}

impl Raw {
    fn open(repository: &Repository, layer: &Layer, runtime: &Handle) -> Result<SharedRaw> {
        let hasher = Some(Hasher::matching(&layer.digest)?);
        let mut stream = repository.blob(&layer.digest, layer.size);
        let (sender, parts) = mpsc::channel(PARTS_WAITING_MAX);
        runtime.spawn(async move {
            loop {
                let part = stream.next().await.transpose();
                let Some(part) = part else { return };
                let failed = part.is_err();
                // A reader that went away wants no more.
                if sender.send(part).await.is_err() || failed {
                    return;
                }
            }
        });
        let raw = Self { parts, part: Bytes::new(), expected: layer.digest.clone(), hasher, failed: false };
        Ok(SharedRaw(Arc::new(Mutex::new(raw))))
    }

    /// Makes `part` the next bytes; false at the verified end. Fails for good once it failed.
    fn advance(&mut self) -> Result<bool> {
        if self.failed {
            let text = format!("layer {} could not be read and verified before", self.expected);
            return Err(Error::new(ErrorKind::Mismatch, text));
        }
        let outcome = self.receive();
        self.failed = outcome.is_err();
        outcome
    }

    fn receive(&mut self) -> Result<bool> {
        while self.part.is_empty() {
            match self.parts.blocking_recv() {
                Some(part) => {
                    self.part = part?;
                    if let Some(hasher) = &mut self.hasher {
                        hasher.update(&self.part);
                    }
                }
                None => {
                    if let Some(hasher) = self.hasher.take() {
                        digest::same(&hasher.finish()?, &self.expected, "a layer")?;
                    }
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

impl Read for SharedRaw {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let mut raw = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if buf.is_empty() || !raw.advance()? {
            return Ok(0);
        }
        let count = buf.len().min(raw.part.len());
        raw.part.copy_to_slice(&mut buf[..count]);
        Ok(count)
    }
}
