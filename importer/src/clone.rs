//! A volume from another one, byte for byte: whatever it holds, a raw disk or a qcow2 file.
//!
//! ```text
//!  file on the same file system ──┬─ shared blocks (FICLONE)                nothing is copied
//!                                 └─ copy_file_range, extent by extent      inside of the kernel
//!  other file, device, nbd://   ──── read by several workers, written past the page cache
//! ```

use std::fmt;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dvcr_converter::convert::{Options, to_raw};
use dvcr_converter::io::{Disk, Extent, ExtentKind, ReadAt};
use dvcr_converter::local::{self, FileSource, RawTarget};
use dvcr_converter::progress::Progress;
use serde::Serialize;

use crate::source::{Source, SourceOptions, file, nbd};
use crate::{Error, ErrorKind, Result};

/// How often a source that is not there is looked for, milliseconds.
const LOOK_INTERVAL_MS: u64 = 500;

/// Which volume to copy, and where to.
#[derive(Clone, Debug)]
pub struct CloneRequest {
    /// A file, a folder with `disk.img`, a block device, or an NBD export.
    pub source: Source,
    /// A file, replaced when the copy is complete, or a block device of at least the source's size.
    pub target: PathBuf,
    /// Permission bits of a file; by default those of the file that is replaced, or the usual ones.
    pub mode: Option<u32>,
    /// How long to wait for a source that is not there yet.
    pub wait_max: Duration,
    /// How to reach an NBD export.
    pub source_options: SourceOptions,
}

/// How the bytes came to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// The file system shares the blocks of both.
    Reflink,
    /// The kernel copied them.
    CopyFileRange,
    /// They were read and written.
    ReadWrite,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reflink => "shared blocks",
            Self::CopyFileRange => "copied by the kernel",
            Self::ReadWrite => "copied",
        })
    }
}

/// What was copied.
#[derive(Clone, Debug, Serialize)]
pub struct CloneSummary {
    /// Where the source is.
    pub source: String,
    /// Where the copy is.
    pub target: PathBuf,
    /// Bytes of the source.
    pub size: u64,
    /// Bytes that were written to the target as data.
    pub written_bytes: u64,
    /// How they came there.
    pub way: Way,
    /// From the opened source to the synced target.
    pub seconds: f64,
}

/// Copies a volume. The target is complete and on stable storage when this succeeds, recognisably incomplete before.
///
/// `progress` counts bytes of the target. When the future is dropped the work is cancelled through `progress`.
///
/// # Errors
/// [`ErrorKind::Source`] when the source is not there in time or cannot be read, [`ErrorKind::Target`] when the target cannot take it.
pub async fn clone(request: CloneRequest, progress: Arc<Progress>) -> Result<CloneSummary> {
    let opened = tokio::select! {
        opened = appeared(&request, &progress) => opened?,
        error = crate::import::cancelled(&progress) => return Err(error),
    };
    progress.restart();
    progress.set_phase("transfer");
    let mut cancel = crate::populate::CancelOnDrop(Some(progress.clone()));
    let work = Work { request, progress, opened };
    let finished = tokio::task::spawn_blocking(move || work.run()).await;
    cancel.0 = None;
    finished.map_err(|e| Error::with(ErrorKind::Target, "the writing thread ended early", e))?
}

/// Waits for the source.
async fn appeared(request: &CloneRequest, progress: &Arc<Progress>) -> Result<Opened> {
    let deadline = Instant::now().checked_add(request.wait_max);
    loop {
        let error = match Opened::open(request, progress).await {
            Err(error) if is_not_there(&error) => error,
            outcome => return outcome,
        };
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(error);
        }
        progress.set_phase("wait");
        tracing::debug!(%error, "the source is waited for");
        tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
    }
}

/// Whether the source may appear: it could not be found or reached, and nobody said that it is wrong.
fn is_not_there(error: &Error) -> bool {
    use io::ErrorKind::{InvalidData, InvalidInput, PermissionDenied};
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<io::Error>());
    error.kind() == ErrorKind::Source
        && cause.is_some_and(|e| !matches!(e.kind(), InvalidData | InvalidInput | PermissionDenied))
        && !cause.is_some_and(|e| dvcr_image::is_certificate_refused(e) || dvcr_image::is_identity_refused(e))
}

/// A source that is there.
struct Opened {
    bytes: Arc<dyn ReadAt>,
    /// The same, where it is a file or a device.
    local: Option<(PathBuf, Arc<FileSource>)>,
}

impl Opened {
    async fn open(request: &CloneRequest, progress: &Arc<Progress>) -> Result<Self> {
        request.source_options.admit(&request.source, &[])?;
        request.source_options.http.admit(&request.source)?;
        match &request.source {
            Source::Nbd(address) => {
                let export = nbd::open_random(address, &request.source_options).await?;
                Ok(Self { bytes: Arc::new(export.until_cancelled(progress.clone())), local: None })
            }
            Source::File(path) => {
                let path = path.clone();
                let opened = tokio::task::spawn_blocking(move || Self::open_file(&path)).await;
                opened.map_err(|e| Error::with(ErrorKind::Source, "opening the source", e))?
            }
            _ => {
                let text = "a volume is a file, a block device, or an NBD export (nbd://); images are taken by \
                            dvcr import, and made disks by dvcr populate";
                Err(Error::new(ErrorKind::Invalid, text))
            }
        }
    }

    fn open_file(path: &Path) -> Result<Self> {
        let opened = file::FileSource::open(path)?;
        let gone = || Error::new(ErrorKind::Source, format!("{} was replaced meanwhile", path.display()));
        let source = Arc::new(opened.random.ok_or_else(gone)?);
        Ok(Self { bytes: source.clone(), local: Some((opened.path, source)) })
    }
}

struct Work {
    request: CloneRequest,
    progress: Arc<Progress>,
    opened: Opened,
}

impl Work {
    fn run(self) -> Result<CloneSummary> {
        let begun = Instant::now();
        let target = &self.request.target;
        let (copied, size) = self.copy().map_err(|error| {
            use dvcr_converter::ErrorKind as Kind;
            let kind = match error.kind() {
                Kind::Cancelled => ErrorKind::Cancelled,
                Kind::Target => ErrorKind::Target,
                _ => ErrorKind::Source,
            };
            let text = format!("copying {} to {}", self.request.source.identity(), target.display());
            Error::with(kind, text, error)
        })?;
        Ok(CloneSummary {
            source: self.request.source.identity(),
            target: target.clone(),
            size,
            written_bytes: copied.1,
            way: copied.0,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    fn copy(&self) -> dvcr_converter::Result<((Way, u64), u64)> {
        let (path, progress) = (&self.request.target, &*self.progress);
        let is_device = path.metadata().is_ok_and(|target| target.file_type().is_block_device());
        let size = self.opened.bytes.len();
        if let Some((source, _)) = &self.opened.local {
            local::refuse_same_storage(source, path)?;
        }
        // All of a device, so that nothing old stays behind the copy.
        let capacity = if is_device { FileSource::open(path)?.file_bytes() } else { size };
        let mut target = RawTarget::create(path, size.max(capacity))?;
        if let Some(mode) = self.request.mode {
            target.set_mode(mode)?;
        }
        progress.set_total(target.size());
        let copied = match &self.opened.local {
            Some((_, source)) => self.copy_local(source, &target)?,
            None => None,
        };
        let copied = match copied {
            Some(copied) => copied,
            None => {
                // What the kernel had begun is written once more.
                progress.restart();
                let disk = Bytes(&self.opened);
                let written = to_raw(&disk, &target, &Options::default(), progress)?;
                (Way::ReadWrite, written.data_bytes)
            }
        };
        progress.check()?;
        progress.set_phase("commit");
        target.finish()?;
        Ok((copied, size))
    }

    /// Leaves it to the file system, or to the kernel; `None` where neither can do it.
    fn copy_local(
        &self,
        source: &FileSource,
        target: &RawTarget,
    ) -> dvcr_converter::Result<Option<(Way, u64)>> {
        let progress = &self.progress;
        if target.reflink(source)? {
            progress.advance(source.file_bytes());
            return Ok(Some((Way::Reflink, 0)));
        }
        let (mut at, mut written, end) = (0, 0, source.file_bytes());
        while at < end {
            // Without knowledge of holes, as of a device, zeros are better found by reading.
            let Some(extent) = source.extent_at(at) else { return Ok(None) };
            progress.check()?;
            let done = if extent.is_data() {
                let Some(copied) = target.copy_within_kernel(source, at, extent.len)? else {
                    return Ok(None);
                };
                progress.store(copied)?;
                written += copied;
                copied
            } else {
                extent.len
            };
            progress.advance(done);
            at += done;
        }
        Ok(Some((Way::CopyFileRange, written)))
    }
}

/// The bytes of a source as a disk, whatever they mean.
struct Bytes<'a>(&'a Opened);

impl Disk for Bytes<'_> {
    fn virtual_size(&self) -> u64 {
        self.0.bytes.len()
    }

    fn extent_at(&self, offset: u64) -> dvcr_converter::Result<Extent> {
        let whole = Extent {
            start: offset,
            len: self.virtual_size().saturating_sub(offset),
            kind: ExtentKind::Data,
            host: Some(offset),
        };
        Ok(self.0.bytes.extent_at(offset).unwrap_or(whole))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> dvcr_converter::Result<()> {
        let read = self.0.bytes.read_exact_at(buf, offset);
        read.map_err(|e| dvcr_converter::Error::io(format!("reading at offset {offset}"), e))?;
        // What is copied is not read again, and counts as memory of whoever read it.
        if let Some((_, file)) = &self.0.local {
            file.forget(offset, buf.len() as u64);
        }
        Ok(())
    }
}
