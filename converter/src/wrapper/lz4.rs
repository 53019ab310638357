//! lz4 (LZ4 frame format 1.6.4): frames one after another, skippable ones between them, and legacy frames.
//!
//! Every checksum and length that a frame carries is held against its content. Legacy frames carry none, and end
//! where the next frame or the end of the file is.

use std::hash::Hasher as _;
use std::io::{self, BufRead, Read};
use std::ops::Range;

use lz4_flex::block::{decompress_into, decompress_into_with_dict};
use twox_hash::XxHash32;

use super::Wrapper;
use super::bounded::too_much_memory;
use crate::{Error, ErrorKind};

const FRAME_MAGIC: u32 = 0x184d_2204;
const LEGACY_MAGIC: u32 = 0x184c_2102;
/// Skippable frames: the last four bits are free.
const SKIPPABLE_MAGIC: u32 = 0x184d_2a50;
const SKIPPABLE_MASK: u32 = 0xffff_fff0;

/// Most bytes that a block of a legacy frame decodes to.
const LEGACY_BLOCK_BYTES: usize = 8 << 20;

/// Bytes behind which no match reaches.
const WINDOW_BYTES: usize = 64 << 10;

/// What a block's size says of a block that is stored as it is.
const STORED_BIT: u32 = 1 << 31;

/// Most memory that a decoder uses: a legacy block, compressed and decoded, and what it keeps besides.
pub(super) const MEMORY_BYTES: u64 = 17 << 20;

/// Recognises a frame, legacy ones included, by its first eight bytes; not by a skippable one.
pub(super) fn is_lz4(head: &[u8]) -> bool {
    match head {
        // The version is 01 and its reserved bit is zero, and so are those around the block size.
        [0x04, 0x22, 0x4d, 0x18, flags, block, ..] => flags & 0xc2 == 0x40 && block & 0x8f == 0,
        // Nothing, compressed.
        [0x02, 0x21, 0x4c, 0x18] => true,
        [0x02, 0x21, 0x4c, 0x18, a, b, c, d, ..] => legacy_block(u32::from_le_bytes([*a, *b, *c, *d])),
        _ => false,
    }
}

/// Whether this may be the size of a legacy frame's block; else it is the magic number of what follows the frame.
fn legacy_block(size: u32) -> bool {
    (1..=most_stored(LEGACY_BLOCK_BYTES)).contains(&(size as usize))
}

/// Most bytes that `len` bytes become when they cannot be compressed.
const fn most_stored(len: usize) -> usize {
    len + len / 255 + 16
}

/// Decodes all frames of a source.
pub(super) struct Decoder<R> {
    input: R,
    memory_bytes_max: u64,
    frame: Option<Frame>,
    stored: Vec<u8>,
    decoded: Vec<u8>,
    /// Whether there was a frame at all.
    begun: bool,
    /// What of `decoded` is still to be read.
    ready: Range<usize>,
    /// The last bytes of the frame before this block, if its blocks are linked.
    window: Vec<u8>,
}

enum Frame {
    Legacy,
    Modern(Modern),
}

/// What a frame announces, and what was seen of its content.
struct Modern {
    block_bytes_max: usize,
    linked: bool,
    block_checksums: bool,
    content_bytes: Option<u64>,
    decoded_bytes: u64,
    content_hash: Option<XxHash32>,
}

impl<R: BufRead> Decoder<R> {
    /// Makes a decoder; a frame whose blocks do not fit in `memory_bytes_max` is an error.
    pub(super) fn new(input: R, memory_bytes_max: u64) -> Self {
        Self {
            input,
            memory_bytes_max,
            frame: None,
            stored: Vec::new(),
            decoded: Vec::new(),
            begun: false,
            ready: 0..0,
            window: Vec::new(),
        }
    }

    /// Takes one step: the beginning of a frame, a block, or the end of a frame. False at the end of the file.
    fn advance(&mut self) -> io::Result<bool> {
        match self.frame.take() {
            None if ended(&mut self.input)? => {
                if !self.begun {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "there is no frame"));
                }
                return Ok(false);
            }
            None => {
                let magic = u32::from_le_bytes(take(&mut self.input)?);
                self.begin(magic)?;
            }
            Some(Frame::Legacy) if ended(&mut self.input)? => return Ok(false),
            Some(Frame::Legacy) => {
                let size = u32::from_le_bytes(take(&mut self.input)?);
                if !legacy_block(size) {
                    self.begin(size)?;
                    return Ok(true);
                }
                let stored = read_into(&mut self.input, &mut self.stored, size as usize)?;
                let decoded = room(&mut self.decoded, LEGACY_BLOCK_BYTES);
                self.ready = 0..decompress_into(stored, decoded).map_err(damaged)?;
                self.frame = Some(Frame::Legacy);
            }
            Some(Frame::Modern(frame)) => self.block(frame)?,
        }
        Ok(true)
    }

    /// Begins the frame behind `magic`, or skips it.
    fn begin(&mut self, magic: u32) -> io::Result<()> {
        self.begun = true;
        if magic & SKIPPABLE_MASK == SKIPPABLE_MAGIC {
            let len = u64::from(u32::from_le_bytes(take(&mut self.input)?));
            if io::copy(&mut Read::by_ref(&mut self.input).take(len), &mut io::sink())? != len {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "a skippable frame is cut short"));
            }
            return Ok(());
        }
        let (frame, block_bytes) = match magic {
            LEGACY_MAGIC => (Frame::Legacy, LEGACY_BLOCK_BYTES),
            FRAME_MAGIC => {
                let frame = Modern::read(&mut self.input)?;
                let block_bytes = frame.block_bytes_max;
                (Frame::Modern(frame), block_bytes)
            }
            _ => return Err(damaged(format!("a frame cannot begin with the magic number {magic:#010x}"))),
        };
        // A block, compressed and decoded.
        if (most_stored(block_bytes) + block_bytes) as u64 > self.memory_bytes_max {
            return Err(too_much_memory(Wrapper::Lz4, self.memory_bytes_max).into());
        }
        self.window.clear();
        self.frame = Some(frame);
        Ok(())
    }

    /// Decodes the next block of `frame`, or ends it.
    fn block(&mut self, mut frame: Modern) -> io::Result<()> {
        let size = u32::from_le_bytes(take(&mut self.input)?);
        if size == 0 {
            return frame.end(&mut self.input);
        }
        let (len, as_it_is) = ((size & !STORED_BIT) as usize, size & STORED_BIT != 0);
        if len > frame.block_bytes_max {
            let text = format!("a block of {len} bytes in a frame of blocks of {}", frame.block_bytes_max);
            return Err(damaged(text));
        }
        let stored = read_into(&mut self.input, &mut self.stored, len)?;
        if frame.block_checksums {
            let expected = u32::from_le_bytes(take(&mut self.input)?);
            if XxHash32::oneshot(0, stored) != expected {
                return Err(damaged("the checksum of a block is wrong"));
            }
        }
        let decoded_bytes = if as_it_is {
            std::mem::swap(&mut self.stored, &mut self.decoded);
            len
        } else {
            let decoded = room(&mut self.decoded, frame.block_bytes_max);
            if self.window.is_empty() {
                decompress_into(stored, decoded).map_err(damaged)?
            } else {
                decompress_into_with_dict(stored, decoded, &self.window).map_err(damaged)?
            }
        };
        self.ready = 0..decoded_bytes;
        let decoded = &self.decoded[..decoded_bytes];
        frame.decoded_bytes += decoded_bytes as u64;
        if let Some(hash) = &mut frame.content_hash {
            hash.write(decoded);
        }
        if frame.linked {
            let kept = WINDOW_BYTES.saturating_sub(decoded_bytes).min(self.window.len());
            self.window.drain(..self.window.len() - kept);
            self.window.extend_from_slice(&decoded[decoded_bytes.saturating_sub(WINDOW_BYTES)..]);
        }
        self.frame = Some(Frame::Modern(frame));
        Ok(())
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        while self.ready.is_empty() {
            if !self.advance()? {
                return Ok(0);
            }
        }
        let n = self.ready.len().min(buf.len());
        buf[..n].copy_from_slice(&self.decoded[self.ready.start..self.ready.start + n]);
        self.ready.start += n;
        Ok(n)
    }
}

impl Modern {
    /// Reads the descriptor of a frame, behind its magic number.
    fn read<R: BufRead>(input: &mut R) -> io::Result<Self> {
        let mut descriptor = Vec::with_capacity(14);
        let [flags, block] = take(input)?;
        descriptor.extend([flags, block]);
        if flags & 0xc2 != 0x40 || block & 0x8f != 0 {
            let text = format!("the frame descriptor {flags:#04x} {block:#04x} is of no known version");
            return Err(damaged(text));
        }
        let block_bytes_max = match block >> 4 {
            code @ 4..=7 => 1 << (8 + 2 * u32::from(code)),
            code => return Err(damaged(format!("a frame of block size {code}; 4 to 7 are defined"))),
        };
        let mut content_bytes = None;
        if flags & 0x08 != 0 {
            let bytes: [u8; 8] = take(input)?;
            descriptor.extend(bytes);
            content_bytes = Some(u64::from_le_bytes(bytes));
        }
        let mut dictionary = None;
        if flags & 0x01 != 0 {
            let bytes: [u8; 4] = take(input)?;
            descriptor.extend(bytes);
            dictionary = Some(u32::from_le_bytes(bytes));
        }
        let [checksum] = take(input)?;
        if checksum != (XxHash32::oneshot(0, &descriptor) >> 8) as u8 {
            return Err(damaged("the checksum of a frame descriptor is wrong"));
        }
        if let Some(id) = dictionary {
            let text = format!(
                "the lz4 stream was compressed with dictionary {id}, which it does not hold; decompress it first"
            );
            return Err(Error::new(ErrorKind::Unsupported, text).into());
        }
        Ok(Self {
            block_bytes_max,
            linked: flags & 0x20 == 0,
            block_checksums: flags & 0x10 != 0,
            content_bytes,
            decoded_bytes: 0,
            content_hash: (flags & 0x04 != 0).then(|| XxHash32::with_seed(0)),
        })
    }

    /// Holds what the frame said of its content against what it was.
    fn end<R: BufRead>(self, input: &mut R) -> io::Result<()> {
        if let Some(announced) = self.content_bytes
            && announced != self.decoded_bytes
        {
            let text = format!("a frame of {} bytes announced {announced}", self.decoded_bytes);
            return Err(damaged(text));
        }
        if let Some(hash) = self.content_hash
            && hash.finish_32() != u32::from_le_bytes(take(input)?)
        {
            return Err(damaged("the checksum of a frame's content is wrong"));
        }
        Ok(())
    }
}

fn damaged(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Whether nothing is left to read.
fn ended<R: BufRead>(input: &mut R) -> io::Result<bool> {
    loop {
        match input.fill_buf() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            ahead => return Ok(ahead?.is_empty()),
        }
    }
}

fn take<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The first `len` bytes of `buf`, which grows if it must and never shrinks.
fn room(buf: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buf.len() < len {
        buf.resize(len, 0);
    }
    &mut buf[..len]
}

fn read_into<'a>(input: &mut impl Read, buf: &'a mut Vec<u8>, len: usize) -> io::Result<&'a [u8]> {
    let buf = room(buf, len);
    input.read_exact(buf)?;
    Ok(buf)
}
