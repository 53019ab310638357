//! The tar format, as far as a disk's layer needs it: writing our own layout, and walking the entries of anyone's.
//!
//! Written is POSIX pax, read is ustar, pax and the GNU long-name records (`docs/formats/disk-image.md`).

use std::io::{ErrorKind as Io, Read};

use crate::{Error, ErrorKind, Result};

/// Where the disk's first byte lies in a layer that this crate writes, bytes.
pub const DATA_OFFSET: u64 = 64 * 1024;
/// The directory that holds the disk.
pub const DISK_DIRECTORY: &str = "disk";
/// Longest file name written, bytes: `disk/` and the name fill the ustar name field.
pub const FILE_NAME_BYTES_MAX: usize = NAME_BYTES - DISK_DIRECTORY.len() - 1;

/// Owner and group of the entries; those of the reference's tools.
const OWNER_ID: u64 = 64_535;
const RECORD_BYTES: usize = 512;
const NAME_BYTES: usize = 100;
/// Largest size that the ustar field holds, bytes; past it a pax record tells the size.
const USTAR_SIZE_MAX: u64 = 0o77_777_777_777;
const END_RECORDS: usize = 2;
/// Bytes of the pax records: what lies between the three headers and the data.
const PAX_BYTES: usize = DATA_OFFSET as usize - 3 * RECORD_BYTES;

/// Largest pax or long-name record read, bytes.
const EXTENSION_BYTES_MAX: u64 = 1 << 20;
/// Most entries looked at in one layer.
const ENTRIES_MAX: u32 = 1 << 20;

/// The bytes of the layer before a disk of `size` bytes: exactly [`DATA_OFFSET`] of them.
///
/// `file_name` is a single path component; longer or non-ASCII ones are written as pax records.
pub fn prefix(file_name: &str, size: u64) -> Result<Vec<u8>> {
    let bad_name = file_name.is_empty()
        || matches!(file_name, "." | "..")
        || file_name.contains(|c: char| c == '/' || c.is_control())
        || file_name.len() > RECORD_BYTES;
    if bad_name {
        let text = format!("{file_name:?} cannot be a file's name in a layer");
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    let path = format!("{DISK_DIRECTORY}/{file_name}");
    let mut records = Vec::with_capacity(PAX_BYTES);
    if path.len() > NAME_BYTES || !path.is_ascii() {
        pax_record(&mut records, "path", &path);
    }
    if size > USTAR_SIZE_MAX {
        pax_record(&mut records, "size", &size.to_string());
    }
    pax_padding(&mut records, PAX_BYTES);

    let mut bytes = Vec::with_capacity(DATA_OFFSET as usize);
    bytes.extend(header(&format!("{DISK_DIRECTORY}/"), 0o755, 0, b'5'));
    // Outside of the directory, so that a tool without pax finds one file there all the same.
    bytes.extend(header("PaxHeaders.0/disk", 0o644, PAX_BYTES as u64, b'x'));
    bytes.extend(records);
    bytes.extend(header(&path, 0o644, size, b'0'));
    Ok(bytes)
}

/// The bytes of the layer after a disk of `size` bytes: padding and the end marker.
pub fn suffix(size: u64) -> Vec<u8> {
    vec![0; padding(size) as usize + END_RECORDS * RECORD_BYTES]
}

/// Length of the whole layer around a disk of `size` bytes; `None` past what 64 bits count.
pub fn layer_bytes(size: u64) -> Option<u64> {
    DATA_OFFSET.checked_add(size)?.checked_add(padding(size) + (END_RECORDS * RECORD_BYTES) as u64)
}

/// A whole tar of one file, `path`, in one directory; both names are short and ASCII.
pub(crate) fn small_file(path: &str, content: &[u8]) -> Vec<u8> {
    let size = content.len() as u64;
    let mut bytes = Vec::with_capacity(content.len() + (3 + END_RECORDS) * RECORD_BYTES);
    if let Some((directory, _)) = path.rsplit_once('/') {
        bytes.extend(header(&format!("{directory}/"), 0o755, 0, b'5'));
    }
    bytes.extend(header(path, 0o644, size, b'0'));
    bytes.extend(content);
    bytes.extend(suffix(size));
    bytes
}

/// What the search runs over: a tar read forward, cheap to skip in.
pub(crate) trait Source {
    /// Fills `buf` from the current position, or returns false if the tar ends exactly there.
    fn read(&mut self, buf: &mut [u8]) -> Result<bool>;
    /// Moves the position forward.
    fn skip(&mut self, bytes: u64) -> Result<()>;
}

/// A tar as a stream: skipping reads.
pub(crate) struct Forward<R>(pub(crate) R);

impl<R: Read> Source for Forward<R> {
    fn read(&mut self, buf: &mut [u8]) -> Result<bool> {
        let mut filled = 0;
        while filled < buf.len() {
            match self.0.read(&mut buf[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(cut_short()),
                Ok(count) => filled += count,
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(e) => return Err(unwrap_io("reading a layer", e)),
            }
        }
        Ok(true)
    }

    fn skip(&mut self, bytes: u64) -> Result<()> {
        let skipped = std::io::copy(&mut Read::by_ref(&mut self.0).take(bytes), &mut std::io::sink());
        if skipped.map_err(|e| unwrap_io("reading a layer", e))? < bytes {
            return Err(cut_short());
        }
        Ok(())
    }
}

/// Takes our own error out of an I/O error that carries one.
pub(crate) fn unwrap_io(context: &str, error: std::io::Error) -> Error {
    match error.downcast::<Error>() {
        Ok(ours) => ours,
        Err(other) => Error::with(ErrorKind::Corrupt, context, other),
    }
}

/// One file, directory or other thing in a tar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Without `.` and empty components; the root is the empty path.
    pub(crate) path: String,
    pub(crate) kind: Kind,
    /// Bytes of its data.
    pub(crate) size: u64,
    /// Whether the data is a map and parts of the file.
    pub(crate) sparse: bool,
    /// Where its data begins, bytes from where the walk began.
    pub(crate) offset: u64,
}

/// What an [`Entry`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    /// A link or a device.
    Other,
}

/// A walk over the entries of a tar.
pub(crate) struct Entries<'a, S> {
    source: &'a mut S,
    position: u64,
    /// What is left of the last entry, bytes.
    rest: u64,
    walked: u32,
}

impl<'a, S: Source> Entries<'a, S> {
    /// Begins at an entry's header.
    pub(crate) fn new(source: &'a mut S) -> Self {
        Self { source, position: 0, rest: 0, walked: 0 }
    }

    /// The next entry, with the source at its data; `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>> {
        let mut extensions = Extensions::default();
        loop {
            self.pass()?;
            let mut record = [0; RECORD_BYTES];
            if !self.source.read(&mut record)? || record.iter().all(|b| *b == 0) {
                return Ok(None);
            }
            if self.walked == ENTRIES_MAX {
                let text = format!("a layer has more than {ENTRIES_MAX} entries");
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
            self.walked += 1;
            let header = Header::parse(&record, self.position)?;
            self.position = advance(self.position, RECORD_BYTES as u64)?;
            if !is_extension(header.kind) {
                return self.entry(header, extensions).map(Some);
            }
            if header.size > EXTENSION_BYTES_MAX {
                let text = format!("an extended header of {} bytes", header.size);
                return Err(corrupt(self.position, &text));
            }
            let mut data = vec![0; header.size as usize];
            if header.size > 0 && !self.source.read(&mut data)? {
                return Err(cut_short());
            }
            self.position = advance(self.position, header.size)?;
            self.rest = padding(header.size);
            extensions.take_in(header.kind, &data, self.position)?;
        }
    }

    fn entry(&mut self, header: Header, extensions: Extensions) -> Result<Entry> {
        let size = extensions.size.unwrap_or(header.size);
        let path = extensions.path.unwrap_or(header.path);
        let kind = match header.kind {
            b'5' => Kind::Directory,
            // Older than the type of directories.
            _ if path.ends_with('/') => Kind::Directory,
            b'0' | 0 | b'7' | b'S' => Kind::File,
            _ => Kind::Other,
        };
        // Links and directories have no data whatever their size field says.
        let data = if matches!(header.kind, b'1'..=b'6') { 0 } else { size };
        let absurd = || corrupt(self.position, "an absurd size");
        self.rest = data.checked_add(padding(data)).ok_or_else(absurd)?;
        let sparse = extensions.sparse || header.kind == b'S';
        Ok(Entry { path: normal(&path), kind, size: data, sparse, offset: self.position })
    }

    /// Leaves the last entry behind.
    fn pass(&mut self) -> Result<()> {
        let rest = std::mem::take(&mut self.rest);
        self.source.skip(rest)?;
        self.position = advance(self.position, rest)?;
        Ok(())
    }
}

fn normal(path: &str) -> String {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    parts.join("/")
}

struct Header {
    path: String,
    size: u64,
    kind: u8,
}

impl Header {
    fn parse(record: &[u8; RECORD_BYTES], position: u64) -> Result<Self> {
        let stored = number(&record[148..156]);
        let sum = |signed: bool| -> i64 {
            let value = |b: u8| if signed { i64::from(b as i8) } else { i64::from(b) };
            let blank = |at: usize, b: u8| if (148..156).contains(&at) { b' ' } else { b };
            record.iter().enumerate().map(|(at, b)| value(blank(at, *b))).sum()
        };
        let matches = |signed| stored.is_some_and(|stored| i64::try_from(stored) == Ok(sum(signed)));
        if !matches(false) && !matches(true) {
            return Err(corrupt(position, "a header with a wrong checksum"));
        }
        let size = number(&record[124..136]).ok_or_else(|| corrupt(position, "a malformed size"))?;
        let name = text(&record[..NAME_BYTES]);
        let prefix = if &record[257..263] == b"ustar\0" { text(&record[345..500]) } else { String::new() };
        let path = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
        Ok(Self { path, size, kind: record[156] })
    }
}

/// What extended headers say about the entry after them.
#[derive(Default)]
struct Extensions {
    path: Option<String>,
    size: Option<u64>,
    sparse: bool,
}

impl Extensions {
    fn take_in(&mut self, kind: u8, data: &[u8], position: u64) -> Result<()> {
        match kind {
            b'L' => self.path = Some(text(data)),
            b'x' | b'X' => {
                for (key, value) in pax_records(data) {
                    match key {
                        b"path" => self.path = Some(text(value)),
                        b"size" => {
                            let size = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
                            self.size = Some(size.ok_or_else(|| corrupt(position, "a malformed pax size"))?);
                        }
                        key if key.starts_with(b"GNU.sparse.") => self.sparse = true,
                        _ => {}
                    }
                }
            }
            // A long link name, or global records: nothing of use.
            _ => {}
        }
        Ok(())
    }
}

fn is_extension(kind: u8) -> bool {
    matches!(kind, b'L' | b'K' | b'x' | b'X' | b'g')
}

/// Splits `LENGTH key=value\n` records; a malformed one ends them.
fn pax_records(mut data: &[u8]) -> Vec<(&[u8], &[u8])> {
    let mut records = Vec::new();
    loop {
        let digits = data.iter().take_while(|b| b.is_ascii_digit()).count();
        let length = std::str::from_utf8(&data[..digits]).ok().and_then(|v| v.parse::<usize>().ok());
        let Some(record) = length.and_then(|length| data.get(..length)) else { return records };
        let Some(body) = record.get(digits + 1..).and_then(|body| body.strip_suffix(b"\n")) else {
            return records;
        };
        let Some(equals) = body.iter().position(|b| *b == b'=') else { return records };
        records.push((&body[..equals], &body[equals + 1..]));
        data = &data[record.len()..];
    }
}

/// An octal field, or a base-256 one (GNU).
fn number(field: &[u8]) -> Option<u64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        return rest.iter().try_fold(u64::from(first & 0x7f), |value, byte| {
            value.checked_mul(256)?.checked_add(u64::from(*byte))
        });
    }
    let digits = field.iter().skip_while(|b| **b == b' ').take_while(|b| !matches!(b, 0 | b' '));
    digits.into_iter().try_fold(0u64, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
        value.checked_mul(8)?.checked_add(u64::from(digit))
    })
}

fn text(field: &[u8]) -> String {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

/// Zeros after the data of an entry of `size` bytes.
pub(crate) fn padding(size: u64) -> u64 {
    (RECORD_BYTES as u64 - size % RECORD_BYTES as u64) % RECORD_BYTES as u64
}

fn advance(position: u64, bytes: u64) -> Result<u64> {
    position.checked_add(bytes).ok_or_else(|| corrupt(position, "an absurd size"))
}

fn corrupt(position: u64, what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("a layer is no valid tar: {what} at byte {position}"))
}

fn cut_short() -> Error {
    Error::new(ErrorKind::Corrupt, "a layer ends in the middle of a tar entry")
}

/// A ustar header; fields that do not fit are told by pax records.
fn header(path: &str, mode: u64, size: u64, kind: u8) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    let ascii: Vec<u8> = path.bytes().map(|b| if b.is_ascii() { b } else { b'_' }).take(NAME_BYTES).collect();
    record[..ascii.len()].copy_from_slice(&ascii);
    octal(&mut record[100..108], mode);
    octal(&mut record[108..116], OWNER_ID);
    octal(&mut record[116..124], OWNER_ID);
    if size <= USTAR_SIZE_MAX {
        octal(&mut record[124..136], size);
    } else {
        // Readers without pax know the base-256 form; those with pax ignore the field.
        record[124] = 0x80;
        record[128..136].copy_from_slice(&size.to_be_bytes());
    }
    // One fixed time makes the layer's digest a function of the disk alone.
    octal(&mut record[136..148], 0);
    record[148..156].fill(b' ');
    record[156] = kind;
    record[257..265].copy_from_slice(b"ustar\x0000");
    octal(&mut record[329..337], 0);
    octal(&mut record[337..345], 0);
    let sum: u64 = record.iter().map(|b| u64::from(*b)).sum();
    octal(&mut record[148..155], sum);
    record
}

/// Zero-padded octal digits and a closing NUL.
fn octal(field: &mut [u8], mut value: u64) {
    let digits = field.len() - 1;
    field[digits] = 0;
    for digit in field[..digits].iter_mut().rev() {
        *digit = b'0' + (value % 8) as u8;
        value /= 8;
    }
}

fn pax_record(records: &mut Vec<u8>, key: &str, value: &str) {
    let rest = key.len() + value.len() + 3;
    // The length counts its own digits.
    let length = (1..).map(|digits| rest + digits).find(|length| length.to_string().len() + rest == *length);
    records.extend(format!("{} {key}={value}\n", length.unwrap_or(rest)).bytes());
}

/// A comment that makes the records `bytes` long.
fn pax_padding(records: &mut Vec<u8>, bytes: usize) {
    let length = bytes - records.len();
    let opening = format!("{length} comment=");
    records.extend(opening.bytes());
    records.resize(bytes - 1, b' ');
    records.push(b'\n');
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::merge::{Found, Hidden, Reach, find_disk};

    fn layer(name: &str, content: &[u8]) -> Vec<u8> {
        let size = content.len() as u64;
        let mut bytes = prefix(name, size).unwrap();
        bytes.extend(content);
        bytes.extend(suffix(size));
        bytes
    }

    fn find(bytes: &[u8]) -> Result<Option<Found>> {
        find_disk(&mut Forward(bytes), &mut Hidden::default(), Reach::FirstDisk)
    }

    pub(crate) fn entry(path: &str, content: &[u8], kind: u8) -> Vec<u8> {
        let mut bytes = header(path, 0o644, content.len() as u64, kind).to_vec();
        bytes.extend(content);
        bytes.resize(bytes.len() + padding(content.len() as u64) as usize, 0);
        bytes
    }

    #[test]
    fn the_prefix_is_the_documented_bytes() {
        let bytes = prefix("vm.qcow2", 1000).unwrap();
        assert_eq!(bytes.len() as u64, DATA_OFFSET);
        let field = |at: usize, text: &[u8]| assert_eq!(&bytes[at..at + text.len()], text, "at {at}");
        field(0, b"disk/\0");
        field(100, b"0000755\x000176027\x000176027\x0000000000000\x0000000000000\x00");
        assert_eq!(bytes[156], b'5');
        field(257, b"ustar\x0000");
        field(512, b"PaxHeaders.0/disk\0");
        field(512 + 124, b"00000175000\0");
        assert_eq!(bytes[512 + 156], b'x');
        field(1024, b"64000 comment= ");
        assert_eq!(&bytes[65022..65024], b" \n");
        field(65024, b"disk/vm.qcow2\0");
        field(65024 + 100, b"0000644\x000176027\x000176027\x0000000001750\x0000000000000\x00");
        assert_eq!(bytes[65024 + 156], b'0');
        assert_eq!(suffix(1000).len(), 24 + 1024);
        assert_eq!(layer_bytes(1000), Some(65536 + 1024 + 1024));
        assert_eq!(layer_bytes(u64::MAX), None);
    }

    #[test]
    fn large_sizes_and_long_names_are_pax_records() {
        for (name, size) in [("a".repeat(200), 5), ("имя.img".to_owned(), 5), ("x".to_owned(), 10 << 30)] {
            let bytes = prefix(&name, size).unwrap();
            assert_eq!(bytes.len() as u64, DATA_OFFSET);
            let found = find(&bytes).unwrap().unwrap();
            assert_eq!(found, Found { path: format!("disk/{name}"), size, offset: DATA_OFFSET });
        }
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in ["", ".", "..", "a/b", "a\nb", &"x".repeat(600)] {
            assert_eq!(prefix(name, 1).unwrap_err().kind(), ErrorKind::Invalid, "{name:?}");
        }
    }

    #[test]
    fn the_disk_is_found_among_other_entries() {
        let mut bytes = entry("etc/", b"", b'5');
        bytes.extend(entry("etc/disk", b"no", b'0'));
        bytes.extend(entry("disk/", b"", b'5'));
        bytes.extend(entry("disk/.wh.old.img", b"x", b'0'));
        bytes.extend(entry("disk/empty", b"", b'0'));
        bytes.extend(entry("disk/link", b"", b'2'));
        bytes.extend(entry("./disk/deep/vm.img", b"content", b'0'));
        let offset = bytes.len() as u64 - 512;
        let found = Found { path: "disk/deep/vm.img".into(), size: 7, offset };
        assert_eq!(find(&bytes).unwrap().unwrap(), found);
        assert_eq!(found.file_name(), "vm.img");
        assert_eq!(find(&entry("disk", b"file, no directory", b'0')).unwrap(), None);
        assert_eq!(find(&[]).unwrap(), None);
        assert_eq!(find(&[0; 1024]).unwrap(), None);
    }

    #[test]
    fn gnu_long_names_and_base_256_sizes_are_read() {
        let name = format!("./disk/{}.img", "n".repeat(150));
        let mut bytes = entry("././@LongLink", format!("{name}\0").as_bytes(), b'L');
        let mut big = header("./disk/nnn", 0o644, 20 << 30, b'0');
        big[257..265].copy_from_slice(b"ustar  \0");
        big[148..156].fill(b' ');
        let sum: u64 = big.iter().map(|b| u64::from(*b)).sum();
        octal(&mut big[148..155], sum);
        bytes.extend(big);
        let found = find(&bytes).unwrap().unwrap();
        assert_eq!((found.file_name().len(), found.size), (154, 20 << 30));
    }

    #[test]
    fn damage_is_an_error_with_its_place() {
        let mut bytes = layer("vm.img", b"content");
        bytes[65024] ^= 1;
        assert!(find(&bytes).unwrap_err().to_string().contains("at byte 65024"));
        let error = find(&layer("vm.img", b"content")[..65000]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let sparse =
            [entry("P", b"22 GNU.sparse.major=1\n", b'x'), entry("disk/vm.img", b"x", b'0')].concat();
        assert_eq!(find(&sparse).unwrap_err().kind(), ErrorKind::Unsupported);
        let huge = entry("P", b"30 size=18446744073709551615\n\n", b'x');
        let huge = [huge, entry("other", b"x", b'0')].concat();
        assert_eq!(find(&huge).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    proptest! {
        #[test]
        fn what_is_written_is_found(name in "[a-zA-Z0-9._ -]{1,120}", content in proptest::collection::vec(any::<u8>(), 1..2000)) {
            prop_assume!(name != "." && name != ".." && !name.starts_with(".wh."));
            let bytes = layer(&name, &content);
            prop_assert_eq!(Some(bytes.len() as u64), layer_bytes(content.len() as u64));
            let found = find(&bytes).unwrap().unwrap();
            prop_assert_eq!(found.file_name(), &name);
            let at = found.offset as usize;
            prop_assert_eq!(&bytes[at..at + content.len()], &content[..]);
        }

        #[test]
        fn no_damage_makes_the_search_panic(
            mut bytes in Just(layer("vm.img", b"content")), flips in proptest::collection::vec((any::<u16>(), any::<u8>()), 1..8)
        ) {
            for (at, value) in flips {
                bytes[usize::from(at)] = value;
            }
            let _ = find(&bytes);
        }
    }
}
