//! Work on whole local files: what one is, and another made from it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use crate::check::{self, Report};
use crate::compare::{self, Comparison};
use crate::convert::{self, Options};
use crate::format::{self, Format, Image, Info};
use crate::forward::{ForwardReader, measure};
use crate::io::{CreateOptions, Details, Disk, Finished, ReadAt, Sink};
use crate::limits::Limits;
use crate::local::{self, FileSource, Preallocation, RawTarget};
use crate::plain::PlainReader;
use crate::progress::Progress;
use crate::sink::{ImageTarget, StreamTarget};
use crate::wrapper::{self, Unwrapped, Wrapper};
use crate::{Error, ErrorKind, Result};

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

/// An image file, and which of its disks.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Where the file is.
    pub path: &'a Path,
    /// The disk of an archive, by its id or its file; the first one if there is no name.
    pub disk: Option<&'a str>,
}

impl<'a, P: AsRef<Path> + ?Sized> From<&'a P> for Input<'a> {
    fn from(path: &'a P) -> Self {
        Input { path: path.as_ref(), disk: None }
    }
}

/// What to make of an image.
pub enum Output {
    /// A sparse raw file, or a block device.
    Raw,
    /// A file in the format that these options are for.
    Image(Box<dyn CreateOptions>),
}

/// Where an image goes.
pub enum Destination<'a> {
    /// A file, new or replaced; for a raw disk also a block device.
    Path(&'a Path, Preallocation),
    /// A stream, such as standard output: for raw disks, and formats that are written from front to end.
    Stream(Box<dyn Write + Send + 'a>),
}

impl<'a, P: AsRef<Path> + ?Sized> From<&'a P> for Destination<'a> {
    fn from(path: &'a P) -> Self {
        Destination::Path(path.as_ref(), Preallocation::Off)
    }
}

/// What a conversion did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Converted {
    /// Format of the source, inside its wrappers.
    pub format: Format,
    /// Bytes a guest sees.
    pub virtual_size: u64,
    /// Bytes stored in the target: data of a raw disk, the length of an image file.
    pub stored_bytes: u64,
}

/// Tells what `input`, a path or an [`Input`], is. Of a wrapped raw disk only decoding all of it tells the size;
/// `progress` counts those bytes.
pub fn inspect<'a>(input: impl Into<Input<'a>>, limits: &Limits, progress: &Progress) -> Result<Inspection> {
    let input = input.into();
    let Input { path, disk: name } = input;
    progress.bound(limits);
    let source = FileSource::open(path)?;
    let (file_bytes, allocated_bytes) = (source.file_bytes(), source.allocated_bytes()?);
    let Unwrapped { wrappers, head, reader } = unwrap(path, limits)?;
    if wrappers.is_empty() {
        let info = format::open_member(Arc::new(source), name, limits)?.info;
        return Ok(Inspection { wrappers, info, allocated_bytes });
    }
    let format = format::probe(&head, None, limits)?.format;
    let info = if format.is_plain() {
        format::refuse_member(name)?;
        let mut disk = PlainReader::new(reader);
        let bytes = measure(Box::new(&mut disk), progress, |n| progress.advance(n))?;
        let virtual_size = format::probe(&head, Some(bytes), limits)?.virtual_size.unwrap_or(bytes);
        Info { format: disk.format(format), virtual_size, file_bytes, details: Details::default() }
    } else {
        drop(reader);
        Info { file_bytes, ..open(input, limits, progress)?.image.info }
    };
    Ok(Inspection { wrappers, info, allocated_bytes })
}

/// Converts `input`, a path or an [`Input`], to `output`, a path or a [`Destination`]. A file or block device is
/// complete and synced when this returns, and is not there (a block device: begins with zeros) otherwise.
///
/// A wrapped raw or iso image is converted as it is decoded. An image in another format is decoded several times: to
/// measure it, to read it in order, and again where it goes far back; one whose parts are so scattered that this
/// never ends is [`ErrorKind::Unsupported`]. An input that lies on the output device, and a destination that cannot take
/// the format, are [`ErrorKind::Target`].
pub fn convert<'a>(
    input: impl Into<Input<'a>>,
    output: impl Into<Destination<'a>>,
    kind: Output,
    options: &Options,
    limits: &Limits,
    progress: &Progress,
) -> Result<Converted> {
    let input = input.into();
    let Input { path, disk: name } = input;
    let target = Target::of(output.into(), kind, path)?;
    progress.bound(limits);
    progress.set_phase("convert");
    let Unwrapped { wrappers, head, reader } = unwrap(path, limits)?;
    if wrappers.is_empty() {
        drop(reader);
        let source = Arc::new(FileSource::open(path)?);
        let image = format::open_member(source.clone(), name, limits)?;
        return convert_image(&image, Some(&source), target, options, progress);
    }
    let format = format::probe(&head, None, limits)?.format;
    if !format.is_plain() {
        drop(reader);
        let opened = open(input, limits, progress)?;
        progress.set_phase("convert");
        return convert_image(&opened.image, None, target, &in_order_if(true, options), progress);
    }
    format::refuse_member(name)?;
    // Without the footer that makes it a fixed VHD, if it has one.
    let mut disk = PlainReader::new(reader);
    match target {
        Target::Raw(output, preallocation) => {
            let target = RawTarget::create_with(output, 0, preallocation)?;
            let written = convert::stream_to_raw(Box::new(&mut disk), &target, options, progress)?;
            finish_raw(target, disk.format(format), written.data_bytes, progress)
        }
        Target::Image(output, image) => {
            let size = if image.needs_size() {
                let bytes = measure(Box::new(disk), progress, |_| ())?;
                progress.set_phase("convert");
                disk = PlainReader::new(unwrap(path, limits)?.reader);
                format::probe(&head, Some(bytes), limits)?.virtual_size
            } else {
                None
            };
            let converted = write_image(output, format, progress, |sink| {
                let reader = Box::new(&mut disk);
                convert::stream_to_image(reader, size, sink, image.as_ref(), options, progress)
            })?;
            Ok(Converted { format: disk.format(format), ..converted })
        }
    }
}

/// A local image file, to be read at random.
pub struct Opened {
    /// Compression around the image, outermost first.
    pub wrappers: Vec<Wrapper>,
    /// The image inside.
    pub image: Image,
}

/// Opens `input`, a path or an [`Input`]. A file in wrappers is decoded once to measure it, and again as it is read: in
/// order, or it is begun again and again.
pub fn open<'a>(input: impl Into<Input<'a>>, limits: &Limits, progress: &Progress) -> Result<Opened> {
    let Input { path, disk } = input.into();
    let Source { wrappers, bytes, .. } = open_source(path, limits, progress)?;
    let image = format::open_member(bytes, disk, &limits.inside(wrappers.len()))?;
    Ok(Opened { wrappers, image })
}

/// Checks `input`, a path or an [`Input`]: its metadata, and `with_data` also that all data can be read and decoded.
///
/// Fails only if nothing can be told. `progress` counts bytes of the disk when its data is read.
pub fn check<'a>(
    input: impl Into<Input<'a>>,
    with_data: bool,
    options: &Options,
    limits: &Limits,
    progress: &Progress,
) -> Result<(Format, Report)> {
    let Input { path, disk } = input.into();
    let Source { wrappers, bytes, is_fixed_vhd } = open_source(path, limits, progress)?;
    progress.set_phase("check");
    let limits = limits.inside(wrappers.len());
    let (format, mut report) = format::check(&bytes, disk, &limits, progress)?;
    if with_data {
        progress.set_phase("read");
        match format::open_member(bytes, disk, &limits) {
            Ok(image) => {
                let options = in_order_if(!wrappers.is_empty(), options);
                check::read_data(image.disk.as_ref(), &mut report, &options, progress)?;
            }
            // Damage that the check of the metadata has counted, or went on behind.
            Err(e) if e.kind() == ErrorKind::Corrupt && report.corruptions > 0 => {}
            Err(e) => report.failure(e)?,
        }
    }
    Ok((if is_fixed_vhd { Format::Vpc } else { format }, report))
}

/// Compares the disks of two inputs; see [`compare::compare`]. If they differ in size and `strict` is set, that is all
/// that is told.
pub fn compare<'a>(
    inputs: [impl Into<Input<'a>>; 2],
    strict: bool,
    options: &Options,
    limits: &Limits,
    progress: &Progress,
) -> Result<Comparison> {
    let [a, b] = inputs;
    let (a, b) = (open(a, limits, progress)?, open(b, limits, progress)?);
    let disks = [a.image.disk.as_ref(), b.image.disk.as_ref()];
    let virtual_sizes = disks.map(Disk::virtual_size);
    if strict && virtual_sizes[0] != virtual_sizes[1] {
        return Ok(Comparison { virtual_sizes, first_difference: None });
    }
    progress.set_phase("compare");
    let wrapped = !a.wrappers.is_empty() || !b.wrappers.is_empty();
    compare::compare(disks, &in_order_if(wrapped, options), progress)
}

/// One worker where a second would pull a stream to and fro.
fn in_order_if(wrapped: bool, options: &Options) -> Options {
    if wrapped { Options { workers: 1, ..*options } } else { *options }
}

/// The bytes of an image, inside its wrappers.
struct Source {
    wrappers: Vec<Wrapper>,
    bytes: Arc<dyn ReadAt>,
    /// Whether they are a disk whose footer was left out, so that they look raw.
    is_fixed_vhd: bool,
}

fn open_source(path: &Path, limits: &Limits, progress: &Progress) -> Result<Source> {
    progress.bound(limits);
    let source = FileSource::open(path)?;
    let Unwrapped { wrappers, reader, .. } = unwrap(path, limits)?;
    if wrappers.is_empty() {
        return Ok(Source { wrappers, bytes: Arc::new(source), is_fixed_vhd: false });
    }
    open_stream(path, wrappers, reader, limits, progress)
}

/// Opens what is inside `wrappers` by `reader`. Decodes it once to measure it; it is then read in order, and begun again
/// where a reader goes far back.
fn open_stream(
    path: &Path,
    wrappers: Vec<Wrapper>,
    reader: Box<dyn Read + Send>,
    limits: &Limits,
    progress: &Progress,
) -> Result<Source> {
    // Only decoding it tells the length, and that the wrapper is whole to its end. A fixed VHD is the disk before its
    // footer: nobody looks for one at the end of a stream.
    let mut disk = PlainReader::new(reader);
    let file_bytes = measure(Box::new(&mut disk), progress, |_| ())?;
    let is_fixed_vhd = disk.format(Format::Raw) == Format::Vpc;
    let (owned, stream_limits) = (path.to_owned(), limits.clone());
    let open = move || -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(PlainReader::new(unwrap(&owned, &stream_limits)?.reader)))
    };
    let bytes = ForwardReader::new(file_bytes, open)
        .map_err(|e| Error::io(format!("opening {}", path.display()), e))?;
    Ok(Source { wrappers, bytes: Arc::new(bytes), is_fixed_vhd })
}

/// What to write, and where: the pairs that go together.
enum Target<'a> {
    /// A raw file or block device, written at random.
    Raw(&'a Path, Preallocation),
    Image(Destination<'a>, Box<dyn CreateOptions>),
}

impl<'a> Target<'a> {
    fn of(output: Destination<'a>, kind: Output, input: &Path) -> Result<Self> {
        let refused = |text: String| Err(Error::new(ErrorKind::Target, text));
        match (output, kind) {
            (Destination::Stream(out), Output::Raw) => {
                let raw = format::create_options(Format::Raw, false, &[])?;
                Ok(Target::Image(Destination::Stream(out), raw))
            }
            (Destination::Stream(_), Output::Image(image)) if !image.is_stream() => refused(format!(
                "{} with these options is not written from front to end, so that a stream cannot take it; name a file",
                image.format()
            )),
            (output @ Destination::Stream(_), Output::Image(image)) => Ok(Target::Image(output, image)),
            (Destination::Path(path, preallocation), kind) => {
                let device = path.metadata().is_ok_and(|target| target.file_type().is_block_device());
                match kind {
                    // A file is replaced by a new one, a device is overwritten while the source is read.
                    Output::Raw if device => local::refuse_same_storage(input, path)?,
                    Output::Raw => {}
                    Output::Image(image) if device => {
                        return refused(format!(
                            "{} is a block device: a guest would see the bytes of the {} file there and not its disk; \
                             write raw, or name a file",
                            path.display(),
                            image.format()
                        ));
                    }
                    Output::Image(image) => {
                        return Ok(Target::Image(Destination::Path(path, preallocation), image));
                    }
                }
                Ok(Target::Raw(path, preallocation))
            }
        }
    }
}

/// Converts an image that is read at random; `file` is the one that it is, if it is not wrapped.
fn convert_image(
    image: &Image,
    file: Option<&FileSource>,
    target: Target<'_>,
    options: &Options,
    progress: &Progress,
) -> Result<Converted> {
    let (disk, format) = (image.disk.as_ref(), image.info.format);
    match target {
        Target::Raw(output, preallocation) => {
            let target = RawTarget::create_with(output, disk.virtual_size(), preallocation)?;
            if let Some(file) = file.filter(|_| format.is_plain())
                && target.reflink(file)?
            {
                progress.set_total(disk.virtual_size());
                progress.advance(disk.virtual_size());
                return finish_raw(target, format, file.allocated_bytes()?, progress);
            }
            let written = convert::to_raw(disk, &target, options, progress)?;
            finish_raw(target, format, written.data_bytes, progress)
        }
        Target::Image(output, image) => write_image(output, format, progress, |sink| {
            convert::to_image(disk, sink, image.as_ref(), options, progress)
        }),
    }
}

/// Lets `write` fill what the image goes to, and completes it. `format` is that of the source.
fn write_image(
    output: Destination<'_>,
    format: Format,
    progress: &Progress,
    write: impl FnOnce(&mut dyn Sink) -> Result<Finished>,
) -> Result<Converted> {
    let finished = match output {
        Destination::Path(path, preallocation) => {
            let mut target = ImageTarget::create_with(path, preallocation)?;
            let finished = write(&mut target)?;
            progress.set_phase("sync");
            target.finish(&finished)?;
            finished
        }
        Destination::Stream(out) => {
            let mut target = StreamTarget::new(out, 0);
            let finished = write(&mut target)?;
            target.finish()?;
            finished
        }
    };
    Ok(Converted { format, virtual_size: finished.virtual_size, stored_bytes: finished.file_bytes })
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

fn unwrap(path: &Path, limits: &Limits) -> Result<Unwrapped<'static>> {
    let file = File::open(path).map_err(|e| Error::io(format!("opening {}", path.display()), e))?;
    wrapper::unwrap(Box::new(file), limits)
}
