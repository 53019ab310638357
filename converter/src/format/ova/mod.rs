//! OVA: a tar archive of an OVF envelope and the disks it names; see `docs/formats/ova.md`.
//!
//! ```text
//!  tar (headers) ──> envelope (which members are disks) ──> window ──> the disk's own format
//! ```

mod envelope;
mod tar;
mod window;

use std::sync::Arc;

use super::{SECTOR_BYTES, Tail};
use crate::error::{corrupt, foreign, limit, unsupported};
use crate::format::check_range;
use crate::io::{Details, Disk, Extent, ReadAt, Value};
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result, wrapper};
use envelope::{DiskEntry, ENVELOPE_BYTES_MAX, Envelope, FileEntry};
use tar::{Member, Members};
use window::{Head, Window};

pub(super) struct Driver;

impl super::Driver for Driver {
    fn recognises(&self, head: &[u8], _tail: Option<Tail<'_>>) -> bool {
        recognises(head)
    }

    fn virtual_size(&self, _head: &[u8], _file_bytes: Option<u64>, _limits: &Limits) -> Result<Option<u64>> {
        // The disk comes somewhere behind.
        Ok(None)
    }

    fn has_members(&self) -> bool {
        true
    }

    fn open(
        &self,
        source: Arc<dyn ReadAt>,
        _head: &[u8],
        member: Option<&str>,
        limits: &Limits,
    ) -> Result<Box<dyn Disk>> {
        let mut archive = Archive::new(source.as_ref());
        let envelope = archive
            .find(is_envelope)?
            .ok_or_else(|| corrupt("the archive has no OVF envelope, so that nothing tells its disks"))?;
        if envelope.len > ENVELOPE_BYTES_MAX {
            return Err(limit(format!(
                "the OVF envelope of {} bytes is longer than {ENVELOPE_BYTES_MAX} bytes",
                envelope.len
            )));
        }
        let mut bytes = vec![0; envelope.len as usize];
        source
            .read_exact_at(&mut bytes, envelope.start)
            .map_err(|e| Error::io("reading the OVF envelope", e))?;
        let envelope = Envelope::parse(&bytes)?;
        drop(bytes);
        let (disk, file) = envelope.choose(member)?;
        let found = archive.find(|name| name == file.href)?.ok_or_else(|| missing(disk, file))?;
        open_disk(source, disk, found, &envelope, limits)
    }
}

/// Whether a tar archive begins here, and an envelope is among its first members.
fn recognises(head: &[u8]) -> bool {
    let source = Head(head);
    let mut members = Members::new(&source, u64::MAX);
    while let Ok(Some(member)) = members.next() {
        if is_envelope(&member.name) {
            return true;
        }
    }
    false
}

fn is_envelope(name: &str) -> bool {
    name.len()
        .checked_sub(4)
        .and_then(|at| name.get(at..))
        .is_some_and(|end| end.eq_ignore_ascii_case(".ovf"))
}

/// An archive that is walked no further than needed: a stream would pass all of it.
struct Archive<'a> {
    members: Members<'a>,
    seen: Vec<Member>,
}

impl<'a> Archive<'a> {
    fn new(source: &'a dyn ReadAt) -> Self {
        Self { members: Members::new(source, source.len()), seen: Vec::new() }
    }

    /// The first member whose name is wanted.
    fn find(&mut self, wanted: impl Fn(&str) -> bool) -> Result<Option<Member>> {
        if let Some(member) = self.seen.iter().find(|member| wanted(&member.name)) {
            return Ok(Some(member.clone()));
        }
        while let Some(member) = self.members.next()? {
            self.seen.push(member.clone());
            if wanted(&member.name) {
                return Ok(Some(member));
            }
        }
        Ok(None)
    }
}

/// Opens the disk in `member` as what it is.
fn open_disk(
    source: Arc<dyn ReadAt>,
    entry: &DiskEntry,
    member: Member,
    envelope: &Envelope,
    limits: &Limits,
) -> Result<Box<dyn Disk>> {
    if limits.chain_depth_max == 0 {
        return Err(limit(
            "the image is in too many wrappers and archives, one inside the other; unpack it first",
        ));
    }
    let window: Arc<dyn ReadAt> = Arc::new(Window::new(source, member.start, member.len));
    let mut head = vec![0; member.len.min(super::PROBE_BYTES as u64) as usize];
    window
        .read_exact_at(&mut head, 0)
        .map_err(|e| Error::io(format!("reading the archive member {:?}", member.name), e))?;
    if recognises(&head) {
        return Err(unsupported(format!(
            "the archive member {:?} is an archive itself; unpack it",
            member.name
        )));
    }
    if let Some(wrapper) = wrapper::detect(&head) {
        return Err(unsupported(format!(
            "the archive member {:?} is compressed ({wrapper}); unpack the archive, decompress the member and convert \
             that",
            member.name
        )));
    }
    let image = super::open(window, &limits.inside(1))?;
    if entry.is_vmdk() && image.info.format != super::Format::Vmdk {
        return Err(corrupt(format!(
            "the archive member {:?} is said to be vmdk, but is {}",
            member.name, image.info.format
        )));
    }
    let disks = envelope.stored().map(|(disk, file)| {
        vec![("id", Value::Text(disk.id.clone())), ("file", Value::Text(file.href.clone()))]
    });
    let mut specific = vec![
        ("disk", Value::Text(entry.id.clone())),
        ("file", Value::Text(member.name.clone())),
        ("disk-format", image.info.format.name().into()),
        ("disks", Value::List(disks.collect())),
    ];
    specific.extend(image.info.details.specific);
    let details = Details { specific, ..image.info.details };
    Ok(Box::new(OvaDisk { disk: image.disk, start: member.start, len: member.len, details }))
}

/// The error for a file that is named but is no member.
fn missing(disk: &DiskEntry, file: &FileEntry) -> Error {
    let (id, href) = (&disk.id, &file.href);
    if href.contains("://") || href.starts_with('/') || href.split('/').any(|part| part == "..") {
        return Error::new(
            ErrorKind::ForeignFile,
            format!(
                "the OVF envelope places the disk {id:?} outside the archive, at {href:?}; fetch that file itself"
            ),
        );
    }
    corrupt(format!(
        "the archive has no member {href:?}, where the disk {id:?} is said to be: it is cut short"
    ))
}

/// A disk in an archive.
struct OvaDisk {
    disk: Box<dyn Disk>,
    /// First byte of its file in the archive, and the length of that.
    start: u64,
    len: u64,
    details: Details,
}

impl Disk for OvaDisk {
    fn virtual_size(&self) -> u64 {
        self.disk.virtual_size()
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let extent = self.disk.extent_at(offset)?;
        let Some(host) = extent.host else { return Ok(extent) };
        // Behind the last byte of a file that ends within a sector is the next member, not the zeros that are read.
        let stored = self.len.saturating_sub(host);
        let whole = stored / SECTOR_BYTES * SECTOR_BYTES;
        Ok(match (stored < extent.len, whole) {
            (true, 0) => Extent { host: None, ..extent },
            (true, _) => Extent { len: whole, host: Some(self.start + host), ..extent },
            (false, _) => Extent { host: Some(self.start + host), ..extent },
        })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        // A raw disk reads as zeros there.
        check_range(buf, offset, self.disk.virtual_size())?;
        self.disk.read_at(buf, offset)
    }

    fn details(&self) -> Details {
        self.details.clone()
    }
}
