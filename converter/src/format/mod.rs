//! Formats side by side: one module each, and the factory that probes.
//!
//! A new format adds a variant to [`Format`], a line to [`probe`] and [`open`], and a module with a
//! [`Disk`](crate::io::Disk).

mod foreign;
mod iso;
pub mod qcow2;
mod raw;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::io::{Disk, ReadAt};
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

/// First bytes of a file that are enough to probe it.
pub const PROBE_BYTES: usize = 128 * 1024;

/// The unit in which guests address disks, bytes; virtual sizes are multiples of it.
pub const SECTOR_BYTES: u64 = 512;

/// A disk image format that this crate reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The bytes of the disk themselves.
    Raw,
    /// A raw disk that holds an ISO 9660 or UDF file system.
    Iso,
    /// QEMU copy-on-write, version 2 and 3.
    Qcow2,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Format::Raw => "raw",
            Format::Iso => "iso",
            Format::Qcow2 => "qcow2",
        })
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "raw" => Ok(Format::Raw),
            "iso" => Ok(Format::Iso),
            "qcow2" => Ok(Format::Qcow2),
            other => Err(Error::new(
                ErrorKind::Unsupported,
                format!("unknown disk format {other:?}; known are raw, iso, qcow2"),
            )),
        }
    }
}

/// What the first bytes of a file tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The format.
    pub format: Format,
    /// Bytes a guest sees; `None` for a raw or iso file of unknown length.
    pub virtual_size: Option<u64>,
}

/// Recognises the format by the first [`PROBE_BYTES`] of a file (all of a shorter one) and validates its header.
///
/// `file_bytes` is the length of the file, if known. Everything unrecognised is raw, but for the formats known by
/// their magic and not readable yet: these are [`ErrorKind::Unsupported`], as are encryption and unknown
/// incompatible features; a backing or external data file is [`ErrorKind::ForeignFile`].
pub fn probe(head: &[u8], file_bytes: Option<u64>, limits: &Limits) -> Result<Probe> {
    if qcow2::recognises(head) {
        let header = qcow2::Header::parse(head, file_bytes, limits)?;
        return Ok(Probe { format: Format::Qcow2, virtual_size: Some(header.virtual_size) });
    }
    if let Some(name) = foreign::recognise(head) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the image is in format {name}, which cannot be read yet; convert it to qcow2 or raw first"
            ),
        ));
    }
    let format = if iso::recognises(head) { Format::Iso } else { Format::Raw };
    let virtual_size = file_bytes.map(|bytes| raw::virtual_size(bytes, limits)).transpose()?;
    Ok(Probe { format, virtual_size })
}

/// What is known of an open image.
#[derive(Clone, Debug)]
pub struct Info {
    /// The format.
    pub format: Format,
    /// Bytes a guest sees.
    pub virtual_size: u64,
    /// Length of the stored file, bytes.
    pub file_bytes: u64,
    /// What the qcow2 header says, for that format.
    pub qcow2: Option<qcow2::Header>,
}

/// An open image: what it is, and the disk inside it.
pub struct Image {
    /// What the image is.
    pub info: Info,
    /// The virtual disk.
    pub disk: Box<dyn Disk>,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("info", &self.info).finish_non_exhaustive()
    }
}

/// Probes and opens the image stored in `source`. Errors are those of [`probe`], and damaged tables.
pub fn open(source: Arc<dyn ReadAt>, limits: &Limits) -> Result<Image> {
    let file_bytes = source.len();
    let head_bytes = file_bytes.min(PROBE_BYTES as u64);
    let mut head = vec![0; head_bytes as usize];
    source.read_exact_at(&mut head, 0).map_err(|e| Error::io("reading the first bytes of the image", e))?;
    let probe = probe(&head, Some(file_bytes), limits)?;
    let (disk, qcow2): (Box<dyn Disk>, _) = match probe.format {
        Format::Raw | Format::Iso => (Box::new(raw::RawDisk::new(source, limits)?), None),
        Format::Qcow2 => {
            let header = qcow2::Header::parse(&head, Some(file_bytes), limits)?;
            (Box::new(qcow2::Qcow2Disk::open(source, &header, limits)?), Some(header))
        }
    };
    let info = Info { format: probe.format, virtual_size: disk.virtual_size(), file_bytes, qcow2 };
    Ok(Image { info, disk })
}
