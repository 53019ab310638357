//! Random access to the virtual disk.

use std::sync::Arc;

use super::bat::{Bat, Place};
use super::guid_text;
use super::header::{HeaderSection, Regions};
use super::log;
use super::metadata::Metadata;
use crate::format::check_range;
use crate::io::{Details, Disk, Extent, ExtentKind, ReadAt, Value};
use crate::limits::Limits;
use crate::{Error, Result};

/// The virtual disk of a VHDX image.
pub(super) struct VhdxDisk {
    /// The file, with its log replayed.
    source: Arc<dyn ReadAt>,
    metadata: Metadata,
    bat: Bat,
    dirty: bool,
}

/// All that has to be known of a file before its BAT is looked at.
pub(super) struct Geometry {
    source: Arc<dyn ReadAt>,
    regions: Regions,
    pub(super) metadata: Metadata,
    dirty: bool,
}

impl Geometry {
    pub(super) fn read(mut source: Arc<dyn ReadAt>, limits: &Limits) -> Result<Self> {
        let mut section = HeaderSection::read(source.as_ref())?;
        let header = section.current_header()?;
        let dirty = header.log_guid().is_some();
        if let Some(guid) = header.log_guid() {
            source = log::replay(source, &header, guid, limits)?;
            // The log may have new region tables.
            section = HeaderSection::read(source.as_ref())?;
        }
        let regions = section.regions(header.log, source.len())?;
        let metadata = Metadata::read(source.as_ref(), regions.metadata, limits)?;
        Ok(Self { source, regions, metadata, dirty })
    }
}

impl VhdxDisk {
    pub(super) fn open(source: Arc<dyn ReadAt>, limits: &Limits) -> Result<Self> {
        let Geometry { source, regions, metadata, dirty } = Geometry::read(source, limits)?;
        let bat = Bat::load(source.as_ref(), regions, &metadata, limits)?;
        Ok(Self { source, metadata, bat, dirty })
    }

    fn read_stored(&self, buf: &mut [u8], host: u64) -> Result<()> {
        self.source
            .read_exact_at(buf, host)
            .map_err(|e| Error::io(format!("reading the image at file offset {host}"), e))
    }
}

impl Disk for VhdxDisk {
    fn virtual_size(&self) -> u64 {
        self.metadata.virtual_size
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let block_bytes = self.metadata.block_bytes;
        let size = self.metadata.virtual_size;
        let (block, skip) = (offset / block_bytes, offset % block_bytes);
        let mut places = self.bat.places(self.source.as_ref(), block)?;
        let place = places.next().unwrap_or(Ok(Place::Hole))?;
        let mut blocks = 1;
        for next in places {
            let continued = match (place, next?) {
                (Place::Stored(host), Place::Stored(next)) => next == host + blocks * block_bytes,
                (place, next) => place == next,
            };
            if !continued {
                break;
            }
            blocks += 1;
        }
        let len = ((block + blocks).saturating_mul(block_bytes).min(size)).saturating_sub(offset);
        let host = match place {
            Place::Hole => return Ok(Extent { start: offset, len, kind: ExtentKind::Hole, host: None }),
            Place::Zero => return Ok(Extent { start: offset, len, kind: ExtentKind::Zero, host: None }),
            Place::Stored(host) => host + skip,
        };
        // A block is large, and the file may have holes in it.
        let known = self.source.extent_at(host);
        let (len, kind) = match known.and_then(|known| Some((known.end().checked_sub(host)?, known.kind))) {
            Some((known_len, kind)) if known_len > 0 => (len.min(known_len), kind),
            _ => (len, ExtentKind::Data),
        };
        // What the log holds is not at its place in the file.
        let host = (kind == ExtentKind::Data && !self.dirty).then_some(host);
        Ok(Extent { start: offset, len, kind, host })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(buf, offset, self.metadata.virtual_size)?;
        let block_bytes = self.metadata.block_bytes;
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let mut places = self.bat.places(self.source.as_ref(), at / block_bytes)?;
            let place = places.next().unwrap_or(Ok(Place::Hole))?;
            let skip = at % block_bytes;
            let mut len = (block_bytes - skip).min(rest.len() as u64);
            // Neighbours are read together.
            while len < rest.len() as u64
                && let Some(next) = places.next()
            {
                match (place, next?) {
                    (Place::Stored(host), Place::Stored(next)) if next == host + skip + len => {}
                    (Place::Hole | Place::Zero, Place::Hole | Place::Zero) => {}
                    _ => break,
                }
                len = (len + block_bytes).min(rest.len() as u64);
            }
            let (here, others) = rest.split_at_mut(len as usize);
            match place {
                Place::Stored(host) => self.read_stored(here, host + skip)?,
                Place::Hole | Place::Zero => here.fill(0),
            }
            rest = others;
            at += len;
        }
        Ok(())
    }

    fn details(&self) -> Details {
        let metadata = &self.metadata;
        let specific: Vec<(&'static str, Value)> = vec![
            ("subformat", if metadata.fixed { "fixed" } else { "dynamic" }.into()),
            ("logical-sector-size", metadata.logical_sector_bytes.into()),
            ("physical-sector-size", metadata.physical_sector_bytes.into()),
            ("virtual-disk-id", guid_text(&metadata.disk_id).into()),
        ];
        Details { cluster_size: Some(metadata.block_bytes), dirty: Some(self.dirty), specific }
    }
}
