//! From a layer, or from what is staged for one, to the image.

use std::io::{self, BufRead, Write};
use std::sync::Arc;

use dvcr_converter::format;
use dvcr_converter::progress::Progress;
use dvcr_image::digest::Digest;
use dvcr_image::index::{Builder, Index};
use dvcr_image::layout::DiskLabels;
use dvcr_image::{RangedBlob, Repository, Upload, Window, tar};

use super::{Published, SourceThread, Transfer, ended};
use crate::chunks::{self, ChunkReader};
use crate::produce::{Indexing, Produced, SALT_BYTES};
use crate::readback::ReadBack;
use crate::resume::StoredFile;
use crate::{Error, ErrorKind, Result};

impl Transfer<'_> {
    /// Makes the image by way of a staged blob.
    pub(super) async fn stage(&self, mut chunks: ChunkReader, thread: SourceThread) -> Result<Published> {
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

    /// Makes the image of a layer that went straight there; if the index of it is not known whole, it is made first. With it ends the
    /// `journal` that tells of the layer, unless the next import can go on by it.
    pub(super) async fn conclude(
        &self,
        layer: &(Digest, u64),
        mut produced: Produced,
        is_indexed: bool,
        journal: Option<Upload>,
    ) -> Result<Published> {
        let publishing = async {
            if !is_indexed {
                produced.index = self.index_again(layer, produced.file.size).await?;
            }
            self.publish(layer, produced).await
        };
        let outcome = publishing.await;
        if let Some(journal) = journal
            && outcome.as_ref().err().is_none_or(|error| error.kind().spoils())
        {
            journal.cancel().await;
        }
        outcome
    }

    /// Makes the image.
    async fn publish(&self, layer: &(Digest, u64), produced: Produced) -> Result<Published> {
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
        Ok(Published { manifest, virtual_size, produced })
    }

    /// Reads a layer back and makes the index of the file in it: of one that several processes have pushed, none has seen
    /// all. The layer is held against its digest, so that the index is of what was pushed.
    async fn index_again(&self, layer: &(Digest, u64), file_bytes: u64) -> Result<Option<Index>> {
        let (digest, size) = layer;
        let read_back = ReadBack::new(self.repository, digest, *size, tar::DATA_OFFSET);
        let mut read_back = read_back.map_err(|e| self.registry(e))?;
        let thread = tokio::task::spawn_blocking(move || -> dvcr_image::Result<Option<Index>> {
            let (mut index, mut left) = (Builder::new(), file_bytes);
            loop {
                let bytes = read_back.fill()?;
                if bytes.is_empty() {
                    return Ok(index.finish());
                }
                let of_file = left.min(bytes.len() as u64);
                index.update(&bytes[..of_file as usize]);
                left -= of_file;
                let count = bytes.len();
                read_back.consume(count);
            }
        });
        let read = thread
            .await
            .map_err(|e| Error::with(ErrorKind::Registry, "the thread that reads a layer ended early", e))?;
        read.map_err(|e| self.lost(e, true))
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
        let read_back = ReadBack::new(self.repository, &staged.digest, staged.size, SALT_BYTES as u64);
        let reader = read_back.map_err(|e| self.registry(e))?;
        let thread = tokio::task::spawn_blocking(move || -> io::Result<Option<Index>> {
            writer.write_all(&begin)?;
            let mut indexed = Indexing { reader, index };
            writer.read_all(&mut indexed, &|_| None)?;
            writer.write_all(&end)?;
            writer.finish()?;
            Ok(indexed.index.finish())
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
