//! A disk from an image in a registry: a raw file, a block device, or a qcow2 file.
//!
//! ```text
//!  plain layer ──> ranges, several workers ──────────────┐
//!  compressed layer or file ──┬─ raw, iso: one stream ───┼──> converter ──> target
//!                             └─ qcow2: ForwardReader ───┘
//! ```

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use dvcr_converter::convert::{Options, stream_to_image, stream_to_raw, to_image, to_raw};
use dvcr_converter::format::{self, Format, Image};
use dvcr_converter::forward::{ForwardReader, measure};
use dvcr_converter::io::ReadAt;
use dvcr_converter::limits::Limits;
use dvcr_converter::local::{self, RawTarget};
use dvcr_converter::plain::{self, PlainReader};
use dvcr_converter::progress::Progress;
use dvcr_converter::sink::ImageTarget;
use dvcr_converter::{qcow2, wrapper};
use dvcr_image::{ClientOptions, DiskImage, Reference, Repository};
use serde::Serialize;

use crate::{Error, ErrorKind, Result};

/// First bytes of a stored file that tell whether it is compressed.
const MAGIC_BYTES: u64 = 16;

/// What to write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetFormat {
    /// The bytes of the disk, sparse where the target can be.
    #[default]
    Raw,
    /// A qcow2 version 3 file with uncompressed clusters.
    Qcow2,
}

impl fmt::Display for TargetFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

impl FromStr for TargetFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            other => {
                let text = format!("disks are written as raw or qcow2, not as {other:?}");
                Err(Error::new(ErrorKind::Invalid, text))
            }
        }
    }
}

/// Which disk to make.
#[derive(Clone, Debug)]
pub struct PopulateRequest {
    /// The image.
    pub reference: Reference,
    /// A file, replaced when the disk is complete, or a block device.
    pub target: PathBuf,
    /// Bytes of the new disk, rounded up to whole sectors of 512, and never less than the image's virtual size. If not
    /// given it is that size, or, for raw on a block device, the device's, so that nothing old stays behind the disk.
    pub size: Option<u64>,
    /// Most bytes that the image's disk may have, where the target could take more.
    pub size_max: Option<u64>,
    /// What to write.
    pub format: TargetFormat,
    /// Threads that read and decode; by default one per core, from 2 to 8.
    pub workers: Option<usize>,
    /// Permission bits of the file; by default those of the file that is replaced, or the usual ones. A block device keeps
    /// its own.
    pub mode: Option<u32>,
    /// How to talk to the registry.
    pub client: ClientOptions,
    /// Bounds for the image.
    pub limits: Limits,
}

/// What was made.
#[derive(Clone, Debug, Serialize)]
pub struct PopulateSummary {
    /// The image, as it was asked for.
    pub reference: String,
    /// Digest of its manifest.
    pub digest: String,
    /// Where the disk is.
    pub target: PathBuf,
    /// Format of the file in the image.
    pub source_format: String,
    /// What was written.
    pub format: String,
    /// Bytes of the new disk.
    pub virtual_size: u64,
    /// Bytes written to the target as data.
    pub written_bytes: u64,
    /// From the first request to the synced target.
    pub seconds: f64,
}

/// Makes a disk. The target is complete and on stable storage when this succeeds, recognisably incomplete before.
///
/// `progress` counts bytes of the disk, from zero. When the future is dropped the work is cancelled through `progress`.
pub async fn populate(mut request: PopulateRequest, progress: Arc<Progress>) -> Result<PopulateSummary> {
    let begun = Instant::now();
    if let Some(size) = request.size {
        let rounded = size.checked_next_multiple_of(format::SECTOR_BYTES);
        let too_large =
            || Error::new(ErrorKind::Target, format!("no disk has {size} bytes; ask for a smaller size"));
        request.size = Some(rounded.ok_or_else(too_large)?);
    }
    progress.restart();
    progress.bound(&request.limits);
    progress.set_phase("transfer");
    let registry = {
        let shown = request.reference.to_string();
        move |e| Error::with(ErrorKind::Registry, format!("reading image {shown}"), e)
    };
    let repository = Repository::open(&request.reference, &request.client).map_err(&registry)?;
    let located = DiskImage::locate(&repository, request.reference.target(), &request.limits);
    let disk = tokio::select! {
        located = located => located.map_err(&registry)?,
        error = crate::import::cancelled(&progress) => return Err(error),
    };
    let mut cancel = CancelOnDrop(Some(progress.clone()));
    let digest = disk.manifest().to_string();
    let mut work = Work { disk, request, progress, capacity: 0 };
    let finished = tokio::task::spawn_blocking(move || work.run().map(|made| (made, work.request))).await;
    cancel.0 = None;
    let (made, request) =
        finished.map_err(|e| Error::with(ErrorKind::Target, "the writing thread ended early", e))??;
    Ok(PopulateSummary {
        reference: request.reference.to_string(),
        digest,
        target: request.target,
        source_format: made.source.to_string(),
        format: request.format.to_string(),
        virtual_size: made.virtual_size,
        written_bytes: made.written_bytes,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// Stops the writing thread when nobody waits for it any more.
pub(crate) struct CancelOnDrop(pub(crate) Option<Arc<Progress>>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(progress) = &self.0 {
            progress.cancel();
        }
    }
}

struct Work {
    disk: DiskImage,
    request: PopulateRequest,
    progress: Arc<Progress>,
    /// Bytes of a target whose size is fixed, zero of others.
    capacity: u64,
}

struct Made {
    source: Format,
    virtual_size: u64,
    written_bytes: u64,
}

impl Work {
    fn run(&mut self) -> Result<Made> {
        if self.request.format == TargetFormat::Raw {
            self.capacity = device_bytes(&self.request.target)?;
        }
        let window = self.disk.window().map_err(|e| self.reading(e))?;
        if let Some(window) = window {
            let mut head = vec![0; window.len().min(MAGIC_BYTES) as usize];
            window.read_exact_at(&mut head, 0).map_err(|e| self.reading(e))?;
            if wrapper::detect(&head).is_none() {
                let image =
                    format::open(Arc::new(window), &self.request.limits).map_err(|e| self.converting(e))?;
                // A volume that is too small for the disk is told of before one that is too small for its data.
                self.final_size(image.info.virtual_size)?;
                self.require_room(&image)?;
                return self.write(&image, &self.options(), || Ok(()));
            }
        }
        let limits = &self.request.limits;
        let stream = self.disk.stream().map_err(|e| self.reading(e))?;
        let unwrapped = wrapper::unwrap(Box::new(stream), limits).map_err(|e| self.converting(e))?;
        let probe = format::probe(&unwrapped.head, None, limits).map_err(|e| self.converting(e))?;
        let depth = unwrapped.wrappers.len();
        let plain_len = unwrapped.wrappers.is_empty().then(|| self.disk.size());
        if probe.format.is_plain() {
            return self.write_stream(probe.format, plain_len, unwrapped.reader);
        }
        let len = match plain_len {
            Some(len) => {
                drop(unwrapped);
                len
            }
            // Nothing tells the length of a compressed file but decoding it.
            None => {
                let len = measure(unwrapped.reader, &self.progress, |_| ());
                let len = len.map_err(|e| self.converting(e))?;
                self.progress.set_phase("transfer");
                len
            }
        };
        let (disk, limits) = (self.disk.clone(), self.request.limits.clone());
        let open = move || -> io::Result<Box<dyn Read + Send>> {
            Ok(wrapper::unwrap(Box::new(disk.stream()?), &limits)?.reader)
        };
        let source = Arc::new(ForwardReader::new(len, open).map_err(|e| self.reading(e))?);
        let limits = self.request.limits.inside(depth);
        let image = format::open(source.clone(), &limits).map_err(|e| self.converting(e))?;
        // A second worker would only pull the stream to and fro.
        let options = Options { workers: 1, ..Options::default() };
        self.write(&image, &options, || source.drain())
    }

    /// Writes a disk that is read at random. `verify` has the last word before the target is complete.
    fn write(&self, image: &Image, options: &Options, verify: impl Fn() -> io::Result<()>) -> Result<Made> {
        let virtual_size = image.info.virtual_size;
        let size = self.final_size(virtual_size)?;
        let written_bytes = match self.request.format {
            TargetFormat::Raw => {
                let raw = self.create_raw(size)?;
                let written =
                    to_raw(&*image.disk, &raw, options, &self.progress).map_err(|e| self.converting(e))?;
                verify().map_err(|e| self.reading(e))?;
                self.commit_raw(raw)?;
                written.data_bytes
            }
            TargetFormat::Qcow2 => {
                let mut file = self.create_image()?;
                let finished = to_image(&*image.disk, &mut file, &qcow2_form(size), options, &self.progress)
                    .map_err(|e| self.converting(e))?;
                verify().map_err(|e| self.reading(e))?;
                self.progress.set_phase("commit");
                file.finish(&finished).map_err(|e| self.converting(e))?;
                finished.file_bytes
            }
        };
        Ok(Made { source: image.info.format, virtual_size: size, written_bytes })
    }

    /// Refuses a disk whose data the target's filesystem has no room for, before any of it is transferred. What is stored without
    /// tables, or inside compression, tells by its end alone how much of it is data.
    fn require_room(&self, image: &Image) -> Result<()> {
        let target = &self.request.target;
        let Some(free) = local::free_bytes(target).filter(|free| *free < image.info.virtual_size) else {
            return Ok(());
        };
        if image.info.format.is_plain() {
            return Ok(());
        }
        let (mut at, mut data) = (0, 0_u64);
        while at < image.info.virtual_size {
            self.progress.check().map_err(Error::stopped)?;
            let extent = image.disk.extent_at(at).map_err(|e| self.converting(e))?;
            if extent.is_data() {
                data = data.saturating_add(extent.end().saturating_sub(at));
            }
            at = extent.end();
        }
        if data <= free {
            return Ok(());
        }
        let text = format!(
            "the disk has {data} bytes of data, and {free} bytes are free where {} would be: {} are missing",
            target.display(),
            data - free
        );
        Err(Error::new(ErrorKind::Target, text))
    }

    /// Writes a raw disk that comes as a stream; its end is where the layer's digest is verified.
    fn write_stream(&self, source: Format, len: Option<u64>, reader: Box<dyn Read + Send>) -> Result<Made> {
        let wanted = match len {
            Some(len) => {
                self.progress.set_total(len);
                // The disk may turn out to be a fixed VHD; the target grows if it is not.
                let len = len.saturating_sub(plain::HELD_BYTES).next_multiple_of(format::SECTOR_BYTES);
                self.final_size(len)?
            }
            None => self.request.size.unwrap_or(self.capacity),
        };
        let options = self.options();
        let mut disk = PlainReader::new(reader);
        let reader = Box::new(&mut disk);
        match self.request.format {
            TargetFormat::Raw => {
                let raw = self.create_raw(wanted)?;
                let written =
                    stream_to_raw(reader, &raw, &options, &self.progress).map_err(|e| self.converting(e))?;
                let size = self.grown_size(wanted, raw.size())?;
                self.commit_raw(raw)?;
                Ok(Made {
                    source: disk.format(source),
                    virtual_size: size,
                    written_bytes: written.data_bytes,
                })
            }
            TargetFormat::Qcow2 => {
                let mut file = self.create_image()?;
                let form = qcow2_form(wanted);
                let finished = stream_to_image(reader, None, &mut file, &form, &options, &self.progress)
                    .map_err(|e| self.converting(e))?;
                let size = self.grown_size(wanted, finished.virtual_size)?;
                self.progress.set_phase("commit");
                file.finish(&finished).map_err(|e| self.converting(e))?;
                Ok(Made {
                    source: disk.format(source),
                    virtual_size: size,
                    written_bytes: finished.file_bytes,
                })
            }
        }
    }

    fn create_raw(&self, size: u64) -> Result<RawTarget> {
        let mut raw = RawTarget::create(&self.request.target, size).map_err(|e| self.converting(e))?;
        if let Some(mode) = self.request.mode {
            raw.set_mode(mode).map_err(|e| self.converting(e))?;
        }
        Ok(raw)
    }

    fn create_image(&self) -> Result<ImageTarget> {
        let mut file = ImageTarget::create(&self.request.target).map_err(|e| self.converting(e))?;
        if let Some(mode) = self.request.mode {
            file.set_mode(mode).map_err(|e| self.converting(e))?;
        }
        Ok(file)
    }

    fn commit_raw(&self, raw: RawTarget) -> Result<()> {
        self.progress.set_phase("commit");
        raw.finish().map_err(|e| self.converting(e))
    }

    fn final_size(&self, virtual_size: u64) -> Result<u64> {
        let Some(max) = self.request.size_max.filter(|max| virtual_size > *max) else {
            return final_size(self.request.size, self.capacity, virtual_size);
        };
        let text =
            format!("the disk has {virtual_size} bytes, and may have {max} here; make room for all of it");
        Err(Error::new(ErrorKind::TooLarge, text))
    }

    /// The size of a target that was begun with `wanted` bytes and grew with the stream, if that was longer.
    fn grown_size(&self, wanted: u64, size: u64) -> Result<u64> {
        if size > wanted { self.final_size(size) } else { Ok(wanted) }
    }

    fn options(&self) -> Options {
        let usual = Options::default();
        Options { workers: self.request.workers.unwrap_or(usual.workers), ..usual }
    }

    fn reading(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        Error::with(ErrorKind::Registry, format!("reading image {}", self.request.reference), error)
    }

    fn converting(&self, error: dvcr_converter::Error) -> Error {
        use dvcr_converter::ErrorKind as Kind;
        let kind = match error.kind() {
            Kind::Cancelled => ErrorKind::Cancelled,
            Kind::Target => ErrorKind::Target,
            Kind::Io => ErrorKind::Registry,
            _ => ErrorKind::Image,
        };
        let (from, to) = (&self.request.reference, self.request.target.display());
        Error::with(kind, format!("making {to} from image {from}"), error)
    }
}

/// The size asked for, which must hold the disk, else all of a target of fixed `capacity`. A target that is too small for
/// the disk is refused when it is opened for writing.
fn final_size(asked: Option<u64>, capacity: u64, virtual_size: u64) -> Result<u64> {
    match asked {
        Some(size) if size < virtual_size => Err(Error::new(
            ErrorKind::TooLarge,
            format!(
                "the disk has {virtual_size} bytes and cannot be made {size} bytes small; ask for a size of \
                 {virtual_size} or more"
            ),
        )),
        Some(size) => Ok(size),
        None => Ok(virtual_size.max(capacity)),
    }
}

/// Bytes of the block device at `path`; zero of what is none.
fn device_bytes(path: &Path) -> Result<u64> {
    if !std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device()) {
        return Ok(0);
    }
    let bytes = File::open(path).and_then(|mut device| device.seek(SeekFrom::End(0)));
    bytes.map_err(|e| {
        Error::with(ErrorKind::Target, format!("finding the size of the device {}", path.display()), e)
    })
}

/// A disk in use is written to: its clusters are not compressed.
fn qcow2_form(size: u64) -> qcow2::WriteOptions {
    qcow2::WriteOptions {
        compression: qcow2::Compression::None,
        virtual_size_min: size,
        ..qcow2::WriteOptions::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_size_the_disk_fills_a_block_device() {
        assert_eq!(final_size(None, 1 << 20, 4096).unwrap(), 1 << 20);
        assert_eq!(final_size(None, 0, 4096).unwrap(), 4096);
        // Told to be too small by whoever opens it.
        assert_eq!(final_size(None, 512, 4096).unwrap(), 4096);
        assert_eq!(final_size(Some(8192), 1 << 20, 4096).unwrap(), 8192);
        assert_eq!(device_bytes(Path::new("/dev/null")).unwrap(), 0);
    }
}
