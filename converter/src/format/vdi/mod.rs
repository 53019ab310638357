//! VirtualBox disk images, version 1.1; the bytes are described in `docs/formats/vdi.md`.
//!
//! ```text
//!  header (512 bytes) ── block map ── blocks of 1 MiB, in any order
//! ```

mod header;
mod write;

use std::sync::Arc;

pub use write::VdiOptions;

use super::Tail;
use super::blocks::BlockDisk;
use crate::Result;
use crate::io::{CreateOptions, Disk, ReadAt};
use crate::limits::Limits;
use header::{HEADER_BYTES, Header};

pub(super) struct Driver;

impl super::Driver for Driver {
    fn recognises(&self, head: &[u8], _tail: Option<Tail<'_>>) -> bool {
        header::recognises(head)
    }

    fn virtual_size(&self, head: &[u8], _file_bytes: Option<u64>, limits: &Limits) -> Result<Option<u64>> {
        Ok(Some(Header::parse(head, limits)?.virtual_size))
    }

    fn open(
        &self,
        source: Arc<dyn ReadAt>,
        head: &[u8],
        _member: Option<&str>,
        limits: &Limits,
    ) -> Result<Box<dyn Disk>> {
        let layout = Header::parse(head, limits)?.layout();
        let reserved = [("header", 0, HEADER_BYTES as u64)];
        Ok(Box::new(BlockDisk::open(source, layout, &reserved, limits)?))
    }

    fn create_options(
        &self,
        compress: bool,
        options: &[(&str, &str)],
    ) -> Option<Result<Box<dyn CreateOptions>>> {
        Some(VdiOptions::parse(compress, options).map(|options| Box::new(options) as _))
    }
}
