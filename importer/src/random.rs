//! A raw disk that need not be read as a stream: holes cost nothing, and several workers read.

use std::sync::Arc;

use dvcr_converter::Result;
use dvcr_converter::convert::{Options, to_image};
use dvcr_converter::format::{self, Format};
use dvcr_converter::io::{CreateOptions, Disk, Extent, Finished, ReadAt, Sink};
use dvcr_converter::limits::Limits;
use dvcr_converter::progress::Progress;

/// Opens the raw disk whose bytes are `source`; `None` if its end makes something else of it, such as a fixed VHD, which
/// only a stream takes as a whole.
pub(crate) fn open_raw(source: Arc<dyn ReadAt>, limits: &Limits) -> Result<Option<Box<dyn Disk>>> {
    let image = format::open(source, limits)?;
    Ok((image.info.format == Format::Raw).then_some(image.disk))
}

/// Writes `disk` to `sink` as an image file. `progress` counts the bytes of the disk up to the furthest that was reached.
pub(crate) fn encode(
    disk: Box<dyn Disk>,
    sink: &mut dyn Sink,
    form: &dyn CreateOptions,
    limits: &Limits,
    progress: &Progress,
) -> Result<Finished> {
    let watched = Watched { disk, progress };
    // The counts of the conversion are not the source's.
    let uncounted = Progress::default();
    uncounted.bound(limits);
    let finished = to_image(&watched, sink, form, &Options::default(), &uncounted)?;
    progress.reach(watched.virtual_size());
    Ok(finished)
}

struct Watched<'a> {
    disk: Box<dyn Disk>,
    progress: &'a Progress,
}

impl Disk for Watched<'_> {
    fn virtual_size(&self) -> u64 {
        self.disk.virtual_size()
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.progress.check()?;
        self.progress.reach(offset);
        self.disk.extent_at(offset)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.progress.check()?;
        self.disk.read_at(buf, offset)?;
        self.progress.reach(offset.saturating_add(buf.len() as u64));
        Ok(())
    }
}
