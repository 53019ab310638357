//! The bytes of the NBD protocol that are used (`docs/formats/nbd.md`). All numbers are big-endian.

use std::io;
use std::ops::Range;

/// `NBDMAGIC`, the server's first bytes.
pub(super) const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: the server negotiates options, and so does every option that the client sends.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags: fixed newstyle, and no padding after an export's data.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

/// Transmission flags of an export.
pub(super) const HAS_FLAGS: u16 = 1;
pub(super) const READ_ONLY: u16 = 2;
pub(super) const SEND_FLUSH: u16 = 4;
pub(super) const SEND_DF: u16 = 1 << 7;
pub(super) const CAN_MULTI_CONN: u16 = 1 << 8;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(super) const OPT_STARTTLS: u32 = 5;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
/// Set in the type of every reply that is an error.
pub(super) const REP_ERROR: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUP: u32 = REP_ERROR | 1;
pub(super) const REP_ERR_INVALID: u32 = REP_ERROR | 3;
pub(super) const REP_ERR_POLICY: u32 = REP_ERROR | 2;
pub(super) const REP_ERR_TLS_REQD: u32 = REP_ERROR | 5;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_ERROR | 6;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// The metadata context that tells holes.
pub(super) const ALLOCATION: &str = "base:allocation";
/// What our server calls it.
pub(super) const CONTEXT_ID: u32 = 1;
/// Of an extent of it: takes no room; reads as zeros.
pub(super) const STATE_HOLE: u32 = 1;
pub(super) const STATE_ZERO: u32 = 2;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;

/// Of a request: the answer is to be in one piece; block status is to have one extent.
pub(super) const FLAG_DF: u16 = 1 << 2;
pub(super) const FLAG_REQ_ONE: u16 = 1 << 3;

pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_OFFSET_DATA: u16 = 1;
pub(super) const CHUNK_OFFSET_HOLE: u16 = 2;
pub(super) const CHUNK_BLOCK_STATUS: u16 = 5;
/// Set in the type of every chunk that is an error.
pub(super) const CHUNK_ERROR: u16 = 1 << 15;
const CHUNK_DONE: u16 = 1;

pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
pub(super) const EINVAL: u32 = 22;
pub(super) const EOVERFLOW: u32 = 75;
/// The server goes down, or does not want to go on.
pub(super) const ESHUTDOWN: u32 = 108;

/// Longest request without another word (protocol, "Block size constraints"), bytes.
pub(super) const REQUEST_BYTES_MAX: u32 = 32 << 20;

pub(super) const OPTION_REPLY_BYTES: usize = 20;
pub(super) const REQUEST_BYTES: usize = 28;
const SIMPLE_REPLY_BYTES: usize = 16;
/// The longer of the two kinds of replies.
pub(super) const CHUNK_BYTES: usize = 20;

/// A reply to `option` with its data.
pub(super) fn reply_to_option(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(length(data));
    bytes.extend(data);
    bytes
}

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
}

/// `None` if it does not begin as one.
pub(super) fn parse_request(bytes: &[u8; REQUEST_BYTES]) -> Option<Request> {
    let mut fields = Fields(bytes);
    (fields.u32().ok()? == REQUEST_MAGIC).then_some(())?;
    let (flags, command) = (fields.u16().ok()?, fields.u16().ok()?);
    let (cookie, offset, len) = (fields.u64().ok()?, fields.u64().ok()?, fields.u32().ok()?);
    Some(Request { flags, command, cookie, offset, len })
}

/// The head of a whole answer.
pub(super) fn simple(error: u32, cookie: u64) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// The head of a part of an answer that has `len` bytes of payload.
pub(super) fn chunk(kind: u16, is_done: bool, cookie: u64, len: u32) -> [u8; CHUNK_BYTES] {
    let mut bytes = [0; CHUNK_BYTES];
    bytes[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&(if is_done { CHUNK_DONE } else { 0 }).to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// What a server says that it is not to say.
pub(super) fn broken(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the NBD server {}", text.into()))
}

/// An option with its data.
pub(super) fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(length(data));
    bytes.extend(data);
    bytes
}

/// A name, and the information that is asked for besides what every export tells.
pub(super) fn go(name: &str) -> Vec<u8> {
    let mut data = length(name.as_bytes()).to_vec();
    data.extend(name.as_bytes());
    data.extend(1u16.to_be_bytes());
    data.extend(INFO_BLOCK_SIZE.to_be_bytes());
    data
}

/// A name, and the one metadata context that is wanted.
pub(super) fn set_meta_context(name: &str) -> Vec<u8> {
    let mut data = length(name.as_bytes()).to_vec();
    data.extend(name.as_bytes());
    data.extend(1u32.to_be_bytes());
    data.extend(length(ALLOCATION.as_bytes()));
    data.extend(ALLOCATION.as_bytes());
    data
}

/// Names and contexts are bounded far below what the field holds.
fn length(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes()
}

/// The type and the length of the reply to `option`.
pub(super) fn option_reply(head: &[u8; OPTION_REPLY_BYTES], option: u32) -> io::Result<(u32, u32)> {
    let mut fields = Fields(head);
    if fields.u64()? != OPTION_REPLY_MAGIC || fields.u32()? != option {
        return Err(broken(format!("does not answer option {option}")));
    }
    Ok((fields.u32()?, fields.u32()?))
}

/// A request without data.
pub(super) fn request(command: u16, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// How a reply begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// The whole answer; data follow if it answers a read that did not fail.
    Simple { cookie: u64, error: u32 },
    /// A part of it, followed by `len` bytes.
    Chunk { cookie: u64, kind: u16, done: bool, len: u32 },
}

/// Bytes of the reply that begins with `magic`, with these.
pub(super) fn head_bytes(magic: [u8; 4]) -> io::Result<usize> {
    match u32::from_be_bytes(magic) {
        SIMPLE_REPLY_MAGIC => Ok(SIMPLE_REPLY_BYTES),
        CHUNK_MAGIC => Ok(CHUNK_BYTES),
        other => Err(broken(format!("sends {other:#010x} where a reply begins"))),
    }
}

pub(super) fn head(bytes: &[u8]) -> io::Result<Head> {
    let mut fields = Fields(bytes);
    if fields.u32()? == SIMPLE_REPLY_MAGIC {
        let error = fields.u32()?;
        return Ok(Head::Simple { cookie: fields.u64()?, error });
    }
    let (flags, kind) = (fields.u16()?, fields.u16()?);
    Ok(Head::Chunk { cookie: fields.u64()?, kind, done: flags & CHUNK_DONE != 0, len: fields.u32()? })
}

/// Where in the answer to a read of `asked` bytes from `start` the `len` bytes from `offset` go.
pub(super) fn place(start: u64, asked: usize, offset: u64, len: u64) -> io::Result<Range<usize>> {
    let from = offset.checked_sub(start).and_then(|from| usize::try_from(from).ok());
    let range = from.and_then(|from| Some(from..from.checked_add(usize::try_from(len).ok()?)?));
    range.filter(|range| range.end <= asked).ok_or_else(|| {
        broken(format!("sends {len} bytes from {offset}, asked for were {asked} from {start}"))
    })
}

/// An error number of the protocol.
pub(super) fn errno(error: u32) -> &'static str {
    match error {
        EPERM => "not permitted",
        EIO => "input/output error",
        12 => "out of memory",
        EINVAL => "invalid request",
        28 => "no space",
        EOVERFLOW => "value too large",
        95 => "not supported",
        ESHUTDOWN => "shutting down",
        _ => "failed",
    }
}

/// Takes numbers off the front.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn u16(&mut self) -> io::Result<u16> {
        self.take().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> io::Result<u32> {
        self.take().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> io::Result<u64> {
        self.take().map(u64::from_be_bytes)
    }

    pub(super) fn bytes(&mut self, len: usize) -> io::Result<&[u8]> {
        let (bytes, rest) =
            self.0.split_at_checked(len).ok_or_else(|| broken("sends less than it announced"))?;
        self.0 = rest;
        Ok(bytes)
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let (number, rest) =
            self.0.split_first_chunk().ok_or_else(|| broken("sends less than it announced"))?;
        self.0 = rest;
        Ok(*number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_outside_of_a_request_is_not_taken() {
        assert_eq!(place(1000, 50, 1010, 40).unwrap(), 10..50);
        assert_eq!(place(1000, 50, 1000, 0).unwrap(), 0..0);
        for (offset, len) in [(999, 1), (1010, 41), (1050, 1), (u64::MAX, 1), (1000, u64::MAX)] {
            assert!(place(1000, 50, offset, len).is_err(), "{offset} {len}");
        }
    }

    #[test]
    fn a_reply_that_is_none_is_refused() {
        assert!(head_bytes(*b"NBDM").is_err());
        assert!(head(&CHUNK_MAGIC.to_be_bytes()).is_err());
        assert!(option_reply(&[0; OPTION_REPLY_BYTES], OPT_GO).is_err());
        let mut reply = [0; OPTION_REPLY_BYTES];
        reply[..8].copy_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        reply[11] = OPT_GO as u8;
        reply[15] = REP_ACK as u8;
        assert_eq!(option_reply(&reply, OPT_GO).unwrap(), (REP_ACK, 0));
        assert!(option_reply(&reply, OPT_STARTTLS).is_err());
    }
}
