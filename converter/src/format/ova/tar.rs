//! The members of a tar archive: where they are, not what they hold.

use super::{corrupt, limit, unsupported};
use crate::io::ReadAt;
use crate::{Error, Result};

/// The unit of an archive, bytes: headers take one, contents are filled up to whole ones.
const BLOCK_BYTES: usize = 512;

/// Most headers looked at, those of long names included. An OVA has some ten members.
const HEADERS_MAX: usize = 4096;

/// Longest name of a member, bytes.
const NAME_BYTES_MAX: usize = 1024;

/// Longest extended header that is read, bytes.
const EXTENSION_BYTES_MAX: u64 = 64 << 10;

/// A regular file in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) name: String,
    /// First byte of its content, and how many there are.
    pub(super) start: u64,
    pub(super) len: u64,
}

/// Walks the headers of an archive, in order, as far as it is asked to.
pub(super) struct Members<'a> {
    source: &'a dyn ReadAt,
    /// Bytes that the archive has; `source` may be only the beginning of it.
    archive_bytes: u64,
    at: u64,
    headers: usize,
}

impl<'a> Members<'a> {
    pub(super) fn new(source: &'a dyn ReadAt, archive_bytes: u64) -> Self {
        Self { source, archive_bytes, at: 0, headers: 0 }
    }

    /// The next regular file; `None` at the end of the archive.
    ///
    /// Fails with [`crate::ErrorKind::Corrupt`] if a header is damaged or its member ends beyond the archive, and with
    /// [`crate::ErrorKind::Limit`] if there are too many headers or too long ones.
    pub(super) fn next(&mut self) -> Result<Option<Member>> {
        let (mut long_name, mut long_size) = (None, None);
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            let extension = matches!(header.kind, b'x' | b'L');
            let len = if extension { header.size } else { long_size.take().unwrap_or(header.size) };
            let start = self.at;
            let end = start.checked_add(len).filter(|&end| end <= self.archive_bytes).ok_or_else(|| {
                corrupt(format!(
                    "the archive member {:?} of {len} bytes at {start} ends beyond the archive: it is cut short or \
                     damaged",
                    header.name
                ))
            })?;
            // The padding of the last member may be missing.
            self.at = end.checked_next_multiple_of(BLOCK_BYTES as u64).unwrap_or(u64::MAX);
            match header.kind {
                b'L' => {
                    let bytes = self.extension(start, len)?;
                    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
                    long_name = Some(name(&bytes[..end])?);
                }
                b'x' => {
                    let records = Records::parse(&self.extension(start, len)?)?;
                    long_name = records.path.or(long_name);
                    long_size = records.size.or(long_size);
                }
                b'0' | b'7' | 0 => {
                    let name = long_name.unwrap_or(header.name);
                    let name = name.strip_prefix("./").unwrap_or(&name).to_owned();
                    return Ok(Some(Member { name, start, len }));
                }
                b'S' => {
                    let text =
                        "the archive holds a sparse member, which is not read; pack it without --sparse";
                    return Err(unsupported(text));
                }
                // Folders, links and what else there is: no disks.
                _ => (long_name, long_size) = (None, None),
            }
        }
    }

    /// Reads the header at the current place and passes it; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>> {
        if self.at >= self.archive_bytes {
            return Ok(None);
        }
        self.headers += 1;
        if self.headers > HEADERS_MAX {
            return Err(limit(format!("the archive has more than {HEADERS_MAX} members")));
        }
        let mut block = [0; BLOCK_BYTES];
        let at = self.at;
        if self.archive_bytes - at < BLOCK_BYTES as u64 {
            return Err(corrupt(format!("the archive is cut short in a member's header, at {at}")));
        }
        self.source
            .read_exact_at(&mut block, at)
            .map_err(|e| Error::io(format!("reading an archive member's header at {at}"), e))?;
        if block == [0; BLOCK_BYTES] {
            return Ok(None);
        }
        self.at += BLOCK_BYTES as u64;
        let header = Header::parse(&block)?;
        header.map(Some).ok_or_else(|| corrupt(format!("the archive member's header at {at} is damaged")))
    }

    fn extension(&self, start: u64, len: u64) -> Result<Vec<u8>> {
        if len > EXTENSION_BYTES_MAX {
            return Err(limit(format!(
                "the archive has an extended header of {len} bytes, more than {EXTENSION_BYTES_MAX}"
            )));
        }
        let mut bytes = vec![0; len as usize];
        self.source
            .read_exact_at(&mut bytes, start)
            .map_err(|e| Error::io(format!("reading an archive's extended header at {start}"), e))?;
        Ok(bytes)
    }
}

/// What a header says (POSIX.1-2017, pax, section "ustar Interchange Format").
struct Header {
    name: String,
    size: u64,
    kind: u8,
}

impl Header {
    /// `None` if the checksum or a number is wrong.
    fn parse(block: &[u8; BLOCK_BYTES]) -> Result<Option<Self>> {
        // The checksum's own field counts as eight spaces.
        let sum: u64 = block
            .iter()
            .enumerate()
            .map(|(i, &b)| u64::from(if (148..156).contains(&i) { b' ' } else { b }))
            .sum();
        if octal(&block[148..156]) != Some(sum) {
            return Ok(None);
        }
        let Some(size) = size(&block[124..136]) else { return Ok(None) };
        let text = |field: &[u8]| -> Result<String> {
            name(&field[..field.iter().position(|&b| b == 0).unwrap_or(field.len())])
        };
        let (prefix, last) = (text(&block[345..500])?, text(&block[..100])?);
        // GNU's older headers have other fields where the prefix is.
        let posix = &block[257..263] == b"ustar\0";
        let name = if posix && !prefix.is_empty() { format!("{prefix}/{last}") } else { last };
        Ok(Some(Self { name, size, kind: block[156] }))
    }
}

/// The records of an extended header that matter here.
#[derive(Default)]
struct Records {
    path: Option<String>,
    size: Option<u64>,
}

impl Records {
    /// Parses records of the form `LENGTH KEY=VALUE\n`, the length being that of the whole record.
    fn parse(mut bytes: &[u8]) -> Result<Self> {
        let damaged = || corrupt("an extended header of the archive is damaged");
        let mut records = Self::default();
        while !bytes.is_empty() && bytes.iter().any(|&b| b != 0) {
            let digits = bytes.iter().position(|&b| b == b' ').ok_or_else(damaged)?;
            let len =
                std::str::from_utf8(&bytes[..digits]).ok().and_then(|digits| digits.parse::<usize>().ok());
            let record = len.and_then(|len| bytes.get(digits + 1..len)).ok_or_else(damaged)?;
            bytes = &bytes[digits + 1 + record.len()..];
            let record = record.strip_suffix(b"\n").ok_or_else(damaged)?;
            let equals = record.iter().position(|&b| b == b'=').ok_or_else(damaged)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => records.path = Some(name(value)?),
                b"size" => {
                    let size = std::str::from_utf8(value).ok().and_then(|value| value.parse().ok());
                    records.size = Some(size.ok_or_else(damaged)?);
                }
                _ if key.starts_with(b"GNU.sparse.") => {
                    let text =
                        "the archive holds a sparse member, which is not read; pack it without --sparse";
                    return Err(unsupported(text));
                }
                _ => {}
            }
        }
        Ok(records)
    }
}

fn name(bytes: &[u8]) -> Result<String> {
    if bytes.len() > NAME_BYTES_MAX {
        return Err(limit(format!("the archive has a name of {} bytes", bytes.len())));
    }
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

/// A size: octal digits, or, with the highest bit set, a binary number (GNU).
fn size(field: &[u8]) -> Option<u64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 == 0 {
        return octal(field);
    }
    let (high, low) = rest.split_at(rest.len().checked_sub(8)?);
    if first != 0x80 || high.iter().any(|&b| b != 0) {
        return None;
    }
    low.first_chunk().map(|low| u64::from_be_bytes(*low))
}

fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?;
    let digits = text.trim_matches(['\0', ' ']);
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
}
