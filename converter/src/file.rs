//! Work on whole local files: what one is, and another made from it.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use crate::convert::{self, Options};
use crate::format::{self, Format, Info, SECTOR_BYTES};
use crate::limits::Limits;
use crate::local::{self, FileSource, Qcow2Target, RawTarget};
use crate::progress::Progress;
use crate::qcow2::WriteOptions;
use crate::wrapper::{self, Unwrapped, Wrapper};
use crate::{Error, ErrorKind, Result};

/// Decoded bytes asked for at a time when they are only counted.
const COUNT_BYTES: usize = 256 << 10;

/// What a local image file is.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// Compression around the image, outermost first.
    pub wrappers: Vec<Wrapper>,
    /// The image; `file_bytes` is the length of the file as it lies there, wrapped or not.
    pub info: Info,
    /// Bytes that the file occupies on its file system.
    pub allocated_bytes: u64,
}

/// What to make of an image.
#[derive(Clone, Copy, Debug)]
pub enum Output {
    /// A sparse raw file, or a block device.
    Raw,
    /// A qcow2 file.
    Qcow2(WriteOptions),
}

/// What a conversion did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Converted {
    /// Format of the source, inside its wrappers.
    pub format: Format,
    /// Bytes a guest sees.
    pub virtual_size: u64,
    /// Bytes stored in the target: data of a raw disk, the length of a qcow2 file.
    pub stored_bytes: u64,
}

/// Tells what the file at `path` is. Of a wrapped raw disk only decoding all of it tells the size; `progress`
/// counts those bytes.
pub fn inspect(path: &Path, limits: &Limits, progress: &Progress) -> Result<Inspection> {
    let source = FileSource::open(path)?;
    let (file_bytes, allocated_bytes) = (source.file_bytes(), source.allocated_bytes()?);
    let Unwrapped { wrappers, head, reader } = unwrap(path, limits)?;
    if wrappers.is_empty() {
        let info = format::open(Arc::new(source), limits)?.info;
        return Ok(Inspection { wrappers, info, allocated_bytes });
    }
    let probe = format::probe(&head, None, limits)?;
    let qcow2 = match probe.format {
        Format::Qcow2 => Some(crate::qcow2::Header::parse(&head, None, limits)?),
        Format::Raw | Format::Iso => None,
    };
    let virtual_size = match probe.virtual_size {
        Some(size) => size,
        None => count(reader, limits, progress)?,
    };
    let info = Info { format: probe.format, virtual_size, file_bytes, qcow2 };
    Ok(Inspection { wrappers, info, allocated_bytes })
}

/// Converts the image file `input` to `output`, which is complete and synced when this returns, and is not there
/// (a block device: begins with zeros) otherwise.
///
/// A wrapped raw or iso image is converted as it is decoded; a wrapped qcow2 image is [`ErrorKind::Unsupported`],
/// as its tables have to be read at random.
pub fn convert(
    input: &Path,
    output: &Path,
    kind: Output,
    options: &Options,
    limits: &Limits,
    progress: &Progress,
) -> Result<Converted> {
    progress.set_phase("convert");
    // A file is replaced by a new one, a device is overwritten while the source is read.
    if output.metadata().is_ok_and(|target| target.file_type().is_block_device()) {
        local::refuse_same_storage(input, output)?;
    }
    let Unwrapped { wrappers, head, reader } = unwrap(input, limits)?;
    if wrappers.is_empty() {
        drop(reader);
        let image = format::open(Arc::new(FileSource::open(input)?), limits)?;
        let (disk, format) = (image.disk.as_ref(), image.info.format);
        return match kind {
            Output::Raw => {
                let target = RawTarget::create(output, disk.virtual_size())?;
                let written = convert::to_raw(disk, &target, options, progress)?;
                finish_raw(target, format, written.data_bytes, progress)
            }
            Output::Qcow2(write) => {
                let mut target = Qcow2Target::create(output, write.cluster_size)?;
                let finished = convert::to_qcow2(disk, &mut target, &write, options, progress)?;
                finish_qcow2(target, format, &finished, progress)
            }
        };
    }
    let format = format::probe(&head, None, limits)?.format;
    if format == Format::Qcow2 {
        let wrapper = wrappers.last().map(Wrapper::to_string).unwrap_or_default();
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{} is a qcow2 image inside {wrapper}: its tables cannot be read out of order; decompress it first",
                input.display()
            ),
        ));
    }
    match kind {
        Output::Raw => {
            let target = RawTarget::create(output, 0)?;
            let written = convert::stream_to_raw(reader, &target, options, progress)?;
            finish_raw(target, format, written.data_bytes, progress)
        }
        Output::Qcow2(write) => {
            let mut target = Qcow2Target::create(output, write.cluster_size)?;
            let finished = convert::stream_to_qcow2(reader, &mut target, &write, options, progress)?;
            finish_qcow2(target, format, &finished, progress)
        }
    }
}

fn finish_raw(
    target: RawTarget,
    format: Format,
    stored_bytes: u64,
    progress: &Progress,
) -> Result<Converted> {
    progress.set_phase("sync");
    let virtual_size = target.size();
    target.finish()?;
    Ok(Converted { format, virtual_size, stored_bytes })
}

fn finish_qcow2(
    target: Qcow2Target,
    format: Format,
    finished: &crate::qcow2::Finished,
    progress: &Progress,
) -> Result<Converted> {
    progress.set_phase("sync");
    target.finish(finished)?;
    Ok(Converted { format, virtual_size: finished.virtual_size, stored_bytes: finished.file_bytes })
}

fn unwrap(path: &Path, limits: &Limits) -> Result<Unwrapped<'static>> {
    let file = File::open(path).map_err(|e| Error::io(format!("opening {}", path.display()), e))?;
    wrapper::unwrap(Box::new(file), limits)
}

fn count(mut reader: Box<dyn Read + Send + '_>, limits: &Limits, progress: &Progress) -> Result<u64> {
    progress.set_phase("measure");
    let mut buf = vec![0; COUNT_BYTES];
    let mut bytes = 0u64;
    loop {
        progress.check()?;
        match reader.read(&mut buf) {
            Ok(0) => break,
            Ok(n) => {
                bytes += n as u64;
                progress.advance(n as u64);
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io(format!("decoding the image after {bytes} bytes"), e)),
        }
    }
    bytes.checked_next_multiple_of(SECTOR_BYTES).filter(|&size| size <= limits.virtual_size_max).ok_or_else(
        || Error::new(ErrorKind::Limit, format!("a disk of {bytes} bytes is larger than the limit")),
    )
}
