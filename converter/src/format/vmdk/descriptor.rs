//! The text that describes a disk, and the extents it consists of.

use super::{DESCRIPTOR_BYTES_MAX, corrupt, foreign, limit};
use crate::Result;

/// Bytes of a file looked through for the first line of a descriptor.
const FIRST_LINE_BYTES: usize = 512;

/// The parent of a disk that has none.
const NO_PARENT: u32 = u32::MAX;

/// Characters of a name from the descriptor that a message shows.
const NAME_CHARS_MAX: usize = 100;

/// What a descriptor says, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) cid: Option<u32>,
    pub(super) parent_cid: Option<u32>,
    pub(super) parent_hint: Option<String>,
    pub(super) create_type: Option<String>,
    pub(super) extents: Vec<ExtentLine>,
}

/// One line of the section "Extent description".
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExtentLine {
    pub(super) sectors: u64,
    /// `SPARSE`, `FLAT`, ...
    pub(super) kind: String,
    pub(super) file: String,
    /// First sector in that file.
    pub(super) offset: Option<u64>,
}

/// Whether a file is a descriptor and nothing else: its first line, after blank lines and other comments, says so.
pub(super) fn is_descriptor(head: &[u8]) -> bool {
    let text = &head[..head.len().min(FIRST_LINE_BYTES)];
    text.split(|&b| b == b'\n')
        .map(|line| line.trim_ascii())
        .take_while(|line| line.is_empty() || line.starts_with(b"#"))
        .any(|line| line.to_ascii_lowercase().starts_with(b"# disk descriptorfile"))
}

/// The descriptor at the start of `bytes`: it ends at the first zero byte, or with the file.
///
/// Fails with [`crate::ErrorKind::Limit`] if it goes on beyond [`DESCRIPTOR_BYTES_MAX`].
pub(super) fn text(bytes: &[u8]) -> Result<&[u8]> {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    match bytes.get(..end) {
        Some(text) if end as u64 <= DESCRIPTOR_BYTES_MAX => Ok(text),
        _ => Err(limit(format!("the VMDK descriptor is longer than {DESCRIPTOR_BYTES_MAX} bytes"))),
    }
}

impl Descriptor {
    /// Parses a descriptor. Lines that are not understood are passed over: there are many kinds.
    pub(super) fn parse(text: &[u8]) -> Result<Self> {
        let text = String::from_utf8_lossy(text);
        let mut read = Self::default();
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(extent) = ExtentLine::parse(line)? {
                read.extents.push(extent);
                continue;
            }
            let Some((name, value)) = line.split_once('=') else { continue };
            let value = value.trim().trim_matches('"');
            match name.trim().to_ascii_lowercase().as_str() {
                "cid" => read.cid = Some(hex(name, value)?),
                "parentcid" => read.parent_cid = Some(hex(name, value)?),
                "parentfilenamehint" => read.parent_hint = Some(value.to_owned()),
                "createtype" => read.create_type = Some(value.to_owned()),
                _ => {}
            }
        }
        Ok(read)
    }

    /// The only extent, `None` if the descriptor names none.
    ///
    /// Fails with [`crate::ErrorKind::ForeignFile`] if the disk has a parent, or extents in several files.
    pub(super) fn only_extent(&self) -> Result<Option<&ExtentLine>> {
        if let Some(hint) = self.parent_hint.as_deref().filter(|hint| !hint.is_empty()) {
            return Err(foreign(format!(
                "the VMDK disk is the difference to another one, {}; flatten it first: qemu-img convert",
                shown(hint)
            )));
        }
        if let Some(parent) = self.parent_cid.filter(|&parent| parent != NO_PARENT) {
            return Err(foreign(format!(
                "the VMDK disk is the difference to another one, with the content id {parent:08x}; flatten it \
                 first: qemu-img convert"
            )));
        }
        match self.extents.as_slice() {
            [] => Ok(None),
            [extent] => Ok(Some(extent)),
            [first, ..] => Err(foreign(format!(
                "the VMDK disk consists of {} extents in other files, the first in {}; join them into one file \
                 first: qemu-img convert",
                self.extents.len(),
                shown(&first.file)
            ))),
        }
    }
}

impl ExtentLine {
    /// Parses `ACCESS SECTORS TYPE "FILE" OFFSET`; `None` if the line is none of that kind.
    fn parse(line: &str) -> Result<Option<Self>> {
        let Some((access, rest)) = line.split_once(char::is_whitespace) else { return Ok(None) };
        if !["RW", "RDONLY", "NOACCESS"].contains(&access) {
            return Ok(None);
        }
        let damaged = || corrupt(format!("the VMDK descriptor has the damaged extent line {}", shown(line)));
        let (description, rest) = rest.split_once('"').unwrap_or((rest, ""));
        let (file, rest) = rest.split_once('"').unwrap_or((rest, ""));
        let mut words = description.split_whitespace();
        let sectors = words.next().and_then(|word| word.parse().ok()).ok_or_else(damaged)?;
        let kind = words.next().ok_or_else(damaged)?.to_ascii_uppercase();
        let offset = match rest.split_whitespace().next() {
            Some(word) => Some(word.parse().map_err(|_| damaged())?),
            None => None,
        };
        Ok(Some(Self { sectors, kind, file: file.to_owned(), offset }))
    }

    /// The error for an extent that is not in this file.
    pub(super) fn refused(&self) -> crate::Error {
        foreign(format!(
            "the VMDK descriptor places the disk's {} extent in another file, {}; join them into one file first: \
             qemu-img convert",
            shown(&self.kind),
            shown(&self.file)
        ))
    }
}

fn hex(name: &str, value: &str) -> Result<u32> {
    u32::from_str_radix(value, 16)
        .map_err(|_| corrupt(format!("the VMDK descriptor has the damaged {name}={}", shown(value))))
}

/// A text from the descriptor as a message shows it: quoted, and not longer than a line.
fn shown(text: &str) -> String {
    match text.char_indices().nth(NAME_CHARS_MAX) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    const TEXT: &str = "# Disk DescriptorFile\r\nversion=1\r\nCID=1234abcd\r\nparentCID=ffffffff\r\n\
        createType=\"monolithicSparse\"\r\n\r\n# Extent description\r\nRW 2048 SPARSE \"a disk.vmdk\"\r\n\
        ddb.adapterType = \"ide\"\r\n";

    #[test]
    fn a_descriptor_is_understood() {
        let read = Descriptor::parse(TEXT.as_bytes()).unwrap();
        assert_eq!(read.cid, Some(0x1234_abcd));
        assert_eq!(read.create_type.as_deref(), Some("monolithicSparse"));
        let extent = read.only_extent().unwrap().unwrap();
        assert_eq!((extent.sectors, extent.kind.as_str(), extent.offset), (2048, "SPARSE", None));
        assert_eq!(extent.file, "a disk.vmdk");
        assert!(is_descriptor(TEXT.as_bytes()));
        assert!(is_descriptor(b"\n# Disk DescriptorFile\r\nversion=1\n"));
        assert!(!is_descriptor(b"version=1\n# Disk DescriptorFile"));
    }

    #[test]
    fn parents_and_further_extents_are_refused() {
        for (line, says) in [
            ("parentCID=1234\n", "00001234"),
            ("parentFileNameHint=\"base.vmdk\"\n", "base.vmdk"),
            ("RW 1 FLAT \"/dev/sda\" 0\n", "2 extents"),
        ] {
            let text = format!("{TEXT}{line}");
            let error = Descriptor::parse(text.as_bytes()).unwrap().only_extent().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ForeignFile);
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn damaged_lines_are_told_and_long_names_are_cut() {
        for line in
            ["RW", "RW x FLAT \"a\"", "RW 1", "RW 1 FLAT \"a\" b", "CID=zz", "RW 99999999999999999999 FLAT"]
        {
            match Descriptor::parse(line.as_bytes()) {
                Ok(read) => assert_eq!(read, Descriptor::default(), "{line}"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt),
            }
        }
        let long = format!("RW 1 FLAT \"{}\"", "ж".repeat(5000));
        let error = Descriptor::parse(long.as_bytes()).unwrap().extents[0].refused();
        assert!(error.to_string().len() < 500, "{error}");
    }

    #[test]
    fn a_descriptor_ends_at_a_zero_byte_and_is_bounded() {
        assert_eq!(text(b"abc\0def").unwrap(), b"abc");
        assert_eq!(text(b"abc").unwrap(), b"abc");
        let long = vec![b'\n'; DESCRIPTOR_BYTES_MAX as usize + 1];
        assert_eq!(text(&long).unwrap_err().kind(), ErrorKind::Limit);
    }
}
