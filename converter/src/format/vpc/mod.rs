//! Virtual PC and Hyper-V disks (VHD), which qemu calls `vpc`; the bytes are described in `docs/formats/vhd.md`.
//!
//! ```text
//!  fixed     disk ── footer
//!  dynamic   copy of the footer ── dynamic header ── block allocation table ── [sector bitmap, block] ... ── footer
//! ```

mod dynamic;
mod fixed;
mod footer;
mod write;

use std::sync::Arc;

pub use write::{Subformat, VhdOptions};

use super::Tail;
use crate::io::{CreateOptions, Disk, ReadAt};
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};
use footer::{FOOTER_BYTES, Footer, Kind};

pub(super) struct Driver;

impl super::Driver for Driver {
    fn recognises(&self, head: &[u8], tail: Option<Tail<'_>>) -> bool {
        head.starts_with(footer::COOKIE)
            || tail.is_some_and(|tail| match Footer::parse(tail.bytes) {
                Some(footer) if footer.kind == Kind::Dynamic => dynamic::is_headed(head, &footer),
                Some(footer) => footer.is_of_fixed(tail.file_bytes),
                None => false,
            })
    }

    fn virtual_size(&self, head: &[u8], _file_bytes: Option<u64>, limits: &Limits) -> Result<Option<u64>> {
        let footer =
            Footer::parse(head).ok_or_else(|| damaged("the copy of its footer at the beginning is"))?;
        if footer.kind == Kind::Fixed {
            return Err(misplaced());
        }
        footer.refuse_others()?;
        footer.virtual_size(limits).map(Some)
    }

    fn open(
        &self,
        source: Arc<dyn ReadAt>,
        head: &[u8],
        _member: Option<&str>,
        limits: &Limits,
    ) -> Result<Box<dyn Disk>> {
        let first = Footer::parse(head);
        if let Some(footer) = first.as_ref().filter(|footer| footer.kind != Kind::Fixed) {
            footer.refuse_others()?;
            return Ok(Box::new(dynamic::open(source, head, footer, limits)?));
        }
        // Where there is no good copy at the beginning, the original at the end counts.
        let file_bytes = source.len();
        let mut tail = vec![0; file_bytes.min(FOOTER_BYTES as u64) as usize];
        let tail_at = file_bytes - tail.len() as u64;
        source
            .read_exact_at(&mut tail, tail_at)
            .map_err(|e| Error::io("reading the VHD footer at the end of the file", e))?;
        match Footer::parse(&tail) {
            Some(footer) if footer.kind == Kind::Fixed => {
                if !footer.is_of_fixed(file_bytes) {
                    return Err(damaged(
                        "its footer is of a fixed disk that does not end with it, and the copy is",
                    ));
                }
                Ok(Box::new(fixed::open(source, &footer, limits)?))
            }
            Some(footer) => {
                footer.refuse_others()?;
                Ok(Box::new(dynamic::open(source, head, &footer, limits)?))
            }
            None if first.is_some() => Err(misplaced()),
            None => Err(damaged("both the footer at the end and its copy at the beginning are")),
        }
    }

    fn create_options(
        &self,
        compress: bool,
        options: &[(&str, &str)],
    ) -> Option<Result<Box<dyn CreateOptions>>> {
        Some(VhdOptions::parse(compress, options).map(|options| Box::new(options) as _))
    }
}

/// Whether the last [`FOOTER_TAIL_BYTES`] bytes of a file of `file_bytes` make it a fixed VHD.
pub(crate) fn is_fixed_footer(tail: &[u8], file_bytes: u64) -> bool {
    Footer::parse(tail).is_some_and(|footer| footer.is_of_fixed(file_bytes))
}

/// Bytes of the footer of a fixed VHD.
pub(crate) const FOOTER_TAIL_BYTES: usize = FOOTER_BYTES;

fn damaged(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the VHD image is damaged: {what} without a valid checksum"))
}

fn misplaced() -> Error {
    let text =
        "the VHD image is damaged: it begins with the footer of a fixed disk, which belongs to the end";
    Error::new(ErrorKind::Corrupt, text)
}
