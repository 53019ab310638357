//! Formats side by side: a folder each, and the factory that probes.
//!
//! A new format is a folder with a [`Driver`], its `mod` line, and a line in [`formats!`](self).

mod blocks;
mod cache;
mod expansion;
mod foreign;
mod iso;
mod options;
mod ova;
mod pieces;
pub mod qcow2;
mod raw;
pub mod vdi;
mod vhdx;
pub mod vmdk;
pub mod vpc;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::check::{self, Report};
use crate::io::{CreateOptions, Details, Disk, ReadAt};
use crate::limits::Limits;
use crate::progress::Progress;
use crate::{Error, ErrorKind, Result};

/// First bytes of a file that are enough to probe it.
pub const PROBE_BYTES: usize = 128 * 1024;

/// Last bytes of a file that some formats are known by.
const TAIL_BYTES: u64 = 512;

/// The unit in which guests address disks, bytes; virtual sizes are multiples of it.
pub const SECTOR_BYTES: u64 = 512;

/// All that the rest of the crate knows of a format.
trait Driver: Sync {
    /// Whether a file is of this format. `head` has its first [`PROBE_BYTES`], or all of a shorter file; `tail` is
    /// `None` where only the beginning is known.
    fn recognises(&self, head: &[u8], tail: Option<Tail<'_>>) -> bool;

    /// Validates the header in `head` as far as it is there, and returns the bytes a guest sees, if it tells.
    /// `file_bytes` is the length of the file, if known.
    fn virtual_size(&self, head: &[u8], file_bytes: Option<u64>, limits: &Limits) -> Result<Option<u64>>;

    /// Whether a file of this format is an archive, whose disks have names.
    fn has_members(&self) -> bool {
        false
    }

    /// Opens the disk inside `source`, whose beginning is `head`. `member` names the wanted one of an archive, and nothing
    /// where there are no members.
    fn open(
        &self,
        source: Arc<dyn ReadAt>,
        head: &[u8],
        member: Option<&str>,
        limits: &Limits,
    ) -> Result<Box<dyn Disk>>;

    /// Checks the metadata of the file in `source`, whose beginning is `head`, and goes on behind damage as far as that
    /// makes sense; of an archive, those of the disk named `member`. Fails if it makes none at all, or a limit is crossed.
    ///
    /// By default all extents have to be inside the file, and none on another.
    fn check(
        &self,
        source: &Arc<dyn ReadAt>,
        head: &[u8],
        member: Option<&str>,
        limits: &Limits,
        report: &mut Report,
        progress: &Progress,
    ) -> Result<()> {
        let disk = self.open(source.clone(), head, member, limits)?;
        check::walk(disk.as_ref(), source.len(), limits, report, progress)
    }

    /// Understands the `options` to write this format with, names and values as `qemu-img convert -o` has them;
    /// `compress` is its `-c`. `None` if the format is not written.
    fn create_options(
        &self,
        compress: bool,
        options: &[(&str, &str)],
    ) -> Option<Result<Box<dyn CreateOptions>>> {
        let _ = (compress, options);
        None
    }
}

/// The end of a file.
#[derive(Clone, Copy, Debug)]
struct Tail<'a> {
    /// Its last 512 bytes, or all of a shorter file.
    bytes: &'a [u8],
    /// The length of the file.
    file_bytes: u64,
}

/// Declares the formats, in the order in which they are probed.
macro_rules! formats {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $driver:expr;)*) => {
        /// A disk image format that this crate reads.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Format {
            $($(#[$doc])* $variant,)*
        }

        impl Format {
            /// All formats.
            pub const ALL: &[Format] = &[$(Format::$variant),*];

            /// The name, as qemu has it.
            pub fn name(self) -> &'static str {
                match self {
                    $(Format::$variant => $name,)*
                }
            }

            fn driver(self) -> &'static dyn Driver {
                match self {
                    $(Format::$variant => &$driver,)*
                }
            }
        }
    };
}

formats! {
    /// QEMU copy-on-write, version 2 and 3.
    Qcow2 = "qcow2", qcow2::Driver;
    /// VirtualBox's disk image.
    Vdi = "vdi", vdi::Driver;
    /// VHD, of Virtual PC, Hyper-V and Azure. A fixed one is raw to those who only see its beginning.
    Vpc = "vpc", vpc::Driver;
    /// Hyper-V's second virtual hard disk, version 1.
    Vhdx = "vhdx", vhdx::Driver;
    /// VMware's disk, in one file: a sparse extent, a stream, or flat behind its descriptor.
    Vmdk = "vmdk", vmdk::Driver;
    /// A disk in an archive of a virtual machine.
    Ova = "ova", ova::Driver;
    /// A raw disk that holds an ISO 9660 or UDF file system.
    Iso = "iso", iso::Driver;
    /// The bytes of the disk themselves: whatever is nothing else.
    Raw = "raw", raw::Driver;
}

impl Format {
    /// Whether the file is the disk, so that a stream of it can be converted as it comes.
    pub fn is_plain(self) -> bool {
        matches!(self, Format::Raw | Format::Iso)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = Format::ALL.iter().find(|format| format.name() == name);
        known.copied().ok_or_else(|| {
            let names: Vec<_> = Format::ALL.iter().map(|format| format.name()).collect();
            let context = format!("unknown disk format {name:?}; known are {}", names.join(", "));
            Error::new(ErrorKind::Unsupported, context)
        })
    }
}

/// What the first bytes of a file tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The format.
    pub format: Format,
    /// Bytes a guest sees; `None` where the head does not tell, as for a raw file of unknown length.
    pub virtual_size: Option<u64>,
}

/// Recognises the format by the first [`PROBE_BYTES`] of a file (all of a shorter one) and validates its header.
///
/// `file_bytes` is the length of the file, if known. Everything unrecognised is raw, but for the formats known by
/// their magic and not readable: these are [`ErrorKind::Unsupported`], as are encryption and unknown incompatible
/// features; an image that names another file is [`ErrorKind::ForeignFile`].
pub fn probe(head: &[u8], file_bytes: Option<u64>, limits: &Limits) -> Result<Probe> {
    let format = recognise(head, None)?;
    Ok(Probe { format, virtual_size: format.driver().virtual_size(head, file_bytes, limits)? })
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
    /// What else its header says.
    pub details: Details,
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
    open_member(source, None, limits)
}

/// Opens like [`open`] the disk named `member` of an archive; the first one if no name is given.
pub fn open_member(source: Arc<dyn ReadAt>, member: Option<&str>, limits: &Limits) -> Result<Image> {
    let (head, format) = recognise_source(source.as_ref(), member)?;
    let file_bytes = source.len();
    let disk = format.driver().open(source, &head, member, limits)?;
    let info = Info { format, virtual_size: disk.virtual_size(), file_bytes, details: disk.details() };
    Ok(Image { info, disk })
}

/// Checks the image stored in `source`, or the disk named `member` of an archive: all of its metadata, and no data.
///
/// Damage is counted and not an error. A raw disk has nothing to be checked.
pub fn check(
    source: &Arc<dyn ReadAt>,
    member: Option<&str>,
    limits: &Limits,
    progress: &Progress,
) -> Result<(Format, Report)> {
    let (head, format) = recognise_source(source.as_ref(), member)?;
    let mut report = Report::default();
    if !format.is_plain()
        && let Err(e) = format.driver().check(source, &head, member, limits, &mut report, progress)
    {
        // Too damaged to go on is damaged.
        report.failure(e)?;
    }
    Ok((format, report))
}

/// Understands the options to write `format` with, as `qemu-img convert -o` names them; `compress` is its `-c`.
///
/// Fails with [`ErrorKind::Unsupported`] for a format that is not written, and for options that it does not have.
pub fn create_options(
    format: Format,
    compress: bool,
    options: &[(&str, &str)],
) -> Result<Box<dyn CreateOptions>> {
    format.driver().create_options(compress, options).unwrap_or_else(|| {
        Err(Error::new(ErrorKind::Unsupported, format!("format {format} is read, but not written")))
    })
}

/// Reads the beginning of a file and tells its format by that, and by its end. Refuses the name of a member where there
/// are none.
fn recognise_source(source: &dyn ReadAt, member: Option<&str>) -> Result<(Vec<u8>, Format)> {
    let file_bytes = source.len();
    let mut head = vec![0; file_bytes.min(PROBE_BYTES as u64) as usize];
    source.read_exact_at(&mut head, 0).map_err(|e| Error::io("reading the first bytes of the image", e))?;
    let mut tail = vec![0; file_bytes.min(TAIL_BYTES) as usize];
    // Asking for the end of a stream would pass all of it.
    let tail = match source.is_forward_only() {
        true => None,
        false => {
            let at = file_bytes - tail.len() as u64;
            source
                .read_exact_at(&mut tail, at)
                .map_err(|e| Error::io("reading the last bytes of the image", e))?;
            Some(Tail { bytes: &tail, file_bytes })
        }
    };
    let format = recognise(&head, tail)?;
    if !format.driver().has_members() {
        refuse_member(member)?;
    }
    Ok((head, format))
}

fn recognise(head: &[u8], tail: Option<Tail<'_>>) -> Result<Format> {
    let format = Format::ALL.iter().find(|format| format.driver().recognises(head, tail));
    match (format, foreign::recognise(head)) {
        (None | Some(Format::Raw), Some(name)) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("the image is in format {name}, which cannot be read; convert it to qcow2 or raw first"),
        )),
        (format, _) => Ok(format.copied().unwrap_or(Format::Raw)),
    }
}

/// Fails unless `buf` has its place at `offset` of a disk of `virtual_size` bytes.
fn check_range(buf: &[u8], offset: u64, virtual_size: u64) -> Result<()> {
    match offset.checked_add(buf.len() as u64) {
        Some(end) if end <= virtual_size => Ok(()),
        _ => Err(Error::new(
            ErrorKind::Io,
            format!("{} bytes at offset {offset} are beyond the end of the disk", buf.len()),
        )),
    }
}

/// Refuses the name of a member where there are none.
pub(crate) fn refuse_member(member: Option<&str>) -> Result<()> {
    match member {
        None => Ok(()),
        Some(name) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("the image is no archive and has no disk named {name:?}; leave the name out"),
        )),
    }
}
