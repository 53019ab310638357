//! The OVF envelope: which files of an archive are disks.

use std::str;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use super::{corrupt, foreign, limit, unsupported};
use crate::Result;

/// Largest envelope that is read, bytes.
pub(super) const ENVELOPE_BYTES_MAX: u64 = 4 << 20;

/// Deepest nesting of elements.
const DEPTH_MAX: usize = 64;

/// Most attributes looked at in one element, and most files and disks.
const ATTRIBUTES_MAX: usize = 64;
const ENTRIES_MAX: usize = 1024;

/// Disks that a message lists.
const LISTED_MAX: usize = 16;

/// What an envelope says of disks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Envelope {
    files: Vec<FileEntry>,
    disks: Vec<DiskEntry>,
}

/// An element `References/File`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FileEntry {
    id: String,
    pub(super) href: String,
    compression: Option<String>,
    chunked: bool,
}

/// An element `DiskSection/Disk`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DiskEntry {
    pub(super) id: String,
    /// The file; a disk without one is empty.
    file: Option<String>,
    parent: Option<String>,
    format: String,
}

impl DiskEntry {
    /// Whether the disk is said to be a VMDK.
    pub(super) fn is_vmdk(&self) -> bool {
        self.format.to_ascii_lowercase().contains("vmdk")
    }
}

impl Envelope {
    /// Parses an envelope (DSP0243). Names are compared without their namespaces. Entities are never expanded.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let text = str::from_utf8(bytes).map_err(|_| corrupt("the OVF envelope is not UTF-8"))?;
        let mut reader = Reader::from_str(text.trim_start_matches('\u{feff}'));
        let mut path: Vec<String> = Vec::new();
        let mut read = Self::default();
        loop {
            let event = reader.read_event().map_err(|e| {
                corrupt(format!("the OVF envelope is damaged at byte {}: {e}", reader.error_position()))
            })?;
            match event {
                Event::Start(element) => {
                    read.element(&path, &element)?;
                    if path.len() == DEPTH_MAX {
                        return Err(limit(format!(
                            "the OVF envelope is nested deeper than {DEPTH_MAX} elements"
                        )));
                    }
                    path.push(local_name(&element));
                }
                Event::Empty(element) => read.element(&path, &element)?,
                Event::End(_) => _ = path.pop(),
                Event::DocType(_) => {
                    return Err(unsupported("the OVF envelope has a document type, which is not read"));
                }
                Event::Eof if path.is_empty() => return Ok(read),
                Event::Eof => return Err(corrupt("the OVF envelope is cut short")),
                _ => {}
            }
        }
    }

    /// The disk that is called `name`, by its id or its file, or the first one; and its file.
    ///
    /// Fails with [`crate::ErrorKind::Unsupported`] if there is no such disk, or its file has to be decompressed or put
    /// together first, and with [`crate::ErrorKind::ForeignFile`] if it is the difference to another disk.
    pub(super) fn choose(&self, name: Option<&str>) -> Result<(&DiskEntry, &FileEntry)> {
        let wanted = |disk: &DiskEntry, href: &str| match name {
            Some(name) => disk.id == name || href == name,
            None => true,
        };
        let found = self.stored().find(|(disk, file)| wanted(disk, &file.href));
        let Some((disk, file)) = found else {
            return Err(unsupported(match name {
                Some(name) => format!("the archive has no disk named {name:?}; it has {}", self.listed()),
                None => "the archive's OVF envelope names no disk with a file".to_owned(),
            }));
        };
        if let Some(parent) = &disk.parent {
            return Err(foreign(format!(
                "the disk {:?} is the difference to another one, {parent:?}",
                disk.id
            )));
        }
        if let Some(compression) = &file.compression {
            return Err(unsupported(format!(
                "the archive member {:?} is compressed ({compression}); unpack the archive, decompress the member and \
                 convert that",
                file.href
            )));
        }
        if file.chunked {
            return Err(unsupported(format!(
                "the archive member {:?} is split into chunks; unpack the archive and join them",
                file.href
            )));
        }
        Ok((disk, file))
    }

    /// Disks that have a file, in order.
    pub(super) fn stored(&self) -> impl Iterator<Item = (&DiskEntry, &FileEntry)> {
        self.disks.iter().filter_map(|disk| {
            let id = disk.file.as_deref()?;
            Some((disk, self.files.iter().find(|file| file.id == id)?))
        })
    }

    fn listed(&self) -> String {
        let mut names: Vec<_> = self
            .stored()
            .map(|(disk, file)| format!("{:?} ({:?})", file.href, disk.id))
            .take(LISTED_MAX)
            .collect();
        let more = self.stored().count() - names.len();
        if more > 0 {
            names.push(format!("{more} more"));
        }
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    }

    /// Notes an element below `path`, if it is a file or a disk.
    fn element(&mut self, path: &[String], element: &BytesStart<'_>) -> Result<()> {
        let [_, section] = path else { return Ok(()) };
        let name = local_name(element);
        match (section.as_str(), name.as_str()) {
            ("References", "File") => {
                let mut file = FileEntry::default();
                attributes(element, |name, value| match name {
                    "id" => file.id = value,
                    "href" => file.href = value,
                    "compression" if !matches!(value.as_str(), "" | "identity") => {
                        file.compression = Some(value)
                    }
                    "chunkSize" => file.chunked = true,
                    _ => {}
                })?;
                self.files.push(file);
            }
            ("DiskSection", "Disk") => {
                let mut disk = DiskEntry::default();
                attributes(element, |name, value| match name {
                    "diskId" => disk.id = value,
                    "fileRef" => disk.file = Some(value),
                    "parentRef" => disk.parent = Some(value),
                    "format" => disk.format = value,
                    _ => {}
                })?;
                self.disks.push(disk);
            }
            _ => {}
        }
        if self.files.len().max(self.disks.len()) > ENTRIES_MAX {
            return Err(limit(format!("the OVF envelope names more than {ENTRIES_MAX} files or disks")));
        }
        Ok(())
    }
}

fn local_name(element: &BytesStart<'_>) -> String {
    element.local_name().as_ref().to_owned()
}

/// Calls `each` with the attributes of an element.
fn attributes(element: &BytesStart<'_>, mut each: impl FnMut(&str, String)) -> Result<()> {
    // The reader's own check for doubles takes time that grows with the square of their number.
    for (i, attribute) in element.attributes().with_checks(false).enumerate() {
        if i == ATTRIBUTES_MAX {
            return Err(limit(format!(
                "an element of the OVF envelope has more than {ATTRIBUTES_MAX} attributes"
            )));
        }
        let damaged = |e| corrupt(format!("the OVF envelope has a damaged attribute: {e}"));
        let attribute = attribute.map_err(|e| damaged(e.to_string()))?;
        let value = attribute
            .normalized_value(quick_xml::XmlVersion::Explicit1_0)
            .map_err(|e| damaged(e.to_string()))?;
        each(attribute.key.local_name().as_ref(), value.into_owned());
    }
    Ok(())
}
