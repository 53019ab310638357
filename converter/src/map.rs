//! Which runs of a virtual disk are stored, and where, as `qemu-img map` tells it.

use crate::Result;
use crate::format::Image;
use crate::io::{Extent, ExtentKind};

/// A run of the virtual disk that is stored in one way; the names are those of `qemu-img map --output=json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First byte on the virtual disk.
    pub start: u64,
    /// Bytes; never zero.
    pub len: u64,
    /// Whether the image says anything about it: false where nothing was ever written.
    pub present: bool,
    /// Whether it reads as zeros, as far as that is known without reading.
    pub zero: bool,
    /// Whether its bytes are stored.
    pub data: bool,
    /// Whether they have to be decoded.
    pub compressed: bool,
    /// Where its first byte is in the file, the others following, if that is so.
    pub offset: Option<u64>,
}

impl Run {
    /// First byte after the run.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// In a file that is the disk itself (`plain`) a hole, too, is a part of it.
    fn of(extent: Extent, plain: bool) -> Self {
        let Extent { start, len, kind, host } = extent;
        Self {
            start,
            len,
            present: plain || kind != ExtentKind::Hole,
            zero: !extent.is_data(),
            data: extent.is_data(),
            compressed: kind == ExtentKind::Compressed,
            offset: if plain { Some(start) } else { host },
        }
    }

    fn continues_with(&self, next: &Run) -> bool {
        let follows = match (self.offset, next.offset) {
            (Some(offset), Some(next)) => offset.checked_add(self.len) == Some(next),
            (None, None) => true,
            _ => false,
        };
        let kind = |run: &Run| (run.present, run.zero, run.data, run.compressed);
        follows && self.end() == next.start && kind(self) == kind(next)
    }
}

/// Walks the whole disk; runs are as long as they can be. After an error there is no more.
pub fn runs(image: &Image) -> impl Iterator<Item = Result<Run>> + '_ {
    let (disk, plain) = (image.disk.as_ref(), image.info.format.is_plain());
    let mut pending: Option<Run> = None;
    let mut failure = None;
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < disk.virtual_size() && failure.is_none() {
            match disk.extent_at(at) {
                Ok(extent) => {
                    let next = Run::of(extent, plain);
                    at = next.end();
                    match &mut pending {
                        Some(run) if run.continues_with(&next) => run.len += next.len,
                        pending => {
                            if let Some(run) = pending.replace(next) {
                                return Some(Ok(run));
                            }
                        }
                    }
                }
                Err(e) => failure = Some(e),
            }
        }
        if let Some(run) = pending.take() {
            return Some(Ok(run));
        }
        at = disk.virtual_size();
        failure.take().map(Err)
    })
}
