//! zst (RFC 8878): frames one after another, decoded in parallel where they are of a modest size.
//!
//! ```text
//!            ┌ frames that fit: batches of them ──> threads ──> results in order ┐
//!  input ──> walk                                                                ├──> inner file
//!            └ any other frame: as a stream, once all before it are read ────────┘
//! ```
//!
//! The walk reads only the sizes in the headers of frames and blocks, which give the most that a frame can decode to.
//! Whatever is odd goes the streaming way, so that libzstd alone says what is wrong with a frame. With one worker all frames do.

use std::io::{self, BufRead, Read};

use zstd::stream::read::Decoder as Streaming;

use super::pool::Pool;

const FRAME_MAGIC: u32 = 0xfd2f_b528;

/// Skippable frames: the last four bits are free (section 3.1.2).
const SKIPPABLE_MAGIC: u32 = 0x184d_2a50;
const SKIPPABLE_MASK: u32 = 0xffff_fff0;

/// Longest header of a frame, with its magic number (section 3.1.1.1).
const FRAME_HEADER_BYTES_MAX: usize = 18;

/// Most bytes that a block decodes to, whatever its frame's window (section 3.1.1.2.4).
const BLOCK_BYTES_MAX: u64 = 128 << 10;

/// Bytes held by a batch of small frames that is decoded in one go.
const BATCH_BYTES: u64 = 1 << 20;

/// What part of the memory one batch may hold, compressed and decoded.
const BATCH_PART: u64 = 3;

/// Decodes all frames of a source.
pub(super) struct Decoder<R: BufRead> {
    /// Inside `stream` while there is one.
    input: Option<Replay<R>>,
    stream: Option<Streaming<'static, Replay<R>>>,
    pool: Pool<Batch, io::Result<Batch>>,
    workers: usize,
    next: Next,
    /// The batch being read from, and how far.
    current: Batch,
    at: usize,
    /// Buffers of batches that were read: fresh memory costs more than decoding into it.
    spare: Vec<Batch>,
    /// What all batches hold, spare ones included.
    held_bytes: u64,
    memory_bytes_max: u64,
}

/// What the walk found behind the submitted batches.
enum Next {
    Unknown,
    /// A frame for the streaming decoder.
    Stream,
    End,
    Failed(io::Error),
}

impl<R: BufRead> Decoder<R> {
    /// Makes a decoder with at most `workers` threads. Windows and batches are held inside `memory_bytes_max`; a frame
    /// that needs a larger window is an error.
    pub(super) fn new(input: R, memory_bytes_max: u64, workers: usize) -> io::Result<Self> {
        let input = Replay { ahead: Vec::new(), at: 0, inner: input, begun: false, singly: 0 };
        Ok(Self {
            input: Some(input),
            stream: None,
            pool: Pool::new(workers, Batch::decode),
            workers,
            next: Next::Unknown,
            current: Batch::default(),
            at: 0,
            spare: Vec::new(),
            held_bytes: 0,
            memory_bytes_max,
        })
    }

    /// The largest window allowed, as a power of two.
    fn window_log_max(&self) -> u32 {
        self.memory_bytes_max.max(1 << 10).ilog2().min(31)
    }

    /// Decodes the next frame as a stream.
    fn start_stream(&mut self) -> io::Result<()> {
        let Some(mut input) = self.input.take() else { return Ok(()) };
        // When libzstd has a header, it looks whether a whole frame lies where its last input began, and decodes that in another way:
        // which refuses some frames that the usual one takes, and may be another frame than the one with the header.
        input.singly = FRAME_HEADER_BYTES_MAX;
        self.spare = Vec::new();
        self.held_bytes = 0;
        let mut stream = Streaming::with_buffer(input)?;
        stream.window_log_max(self.window_log_max())?;
        self.stream = Some(stream.single_frame());
        Ok(())
    }

    /// Reads ahead and submits batches, as far as memory and workers go.
    fn submit(&mut self) -> io::Result<()> {
        if self.workers == 1 && matches!(self.next, Next::Unknown) {
            let Some(input) = &mut self.input else { return Ok(()) };
            self.next = if input.ahead()?.is_empty() { Next::End } else { Next::Stream };
        }
        while matches!(self.next, Next::Unknown) && self.pool.pending() <= self.workers {
            let bytes_max = self.memory_bytes_max / BATCH_PART;
            let Some(mut batch) = self.empty_batch(bytes_max) else { break };
            let walk = Walk { bytes_max, window_bytes_max: 1 << self.window_log_max() };
            let Some(input) = &mut self.input else { break };
            self.next = walk.gather(input, &mut batch);
            if !batch.stored.is_empty() {
                batch.held_bytes = batch.needs_bytes();
                self.held_bytes += batch.held_bytes;
                self.pool.submit(batch)?;
            }
        }
        Ok(())
    }

    /// Makes an empty batch that may come to hold `bytes_max`, of a spare one if it can; `None` if memory is short.
    fn empty_batch(&mut self, bytes_max: u64) -> Option<Batch> {
        loop {
            let spare = self.spare.pop();
            let Batch { held_bytes, stored, decoded, .. } = spare.unwrap_or_default();
            self.held_bytes -= held_bytes;
            if self.held_bytes + bytes_max.max(held_bytes) <= self.memory_bytes_max {
                return Some(Batch { stored, decoded, ..Batch::default() });
            }
            if held_bytes == 0 {
                return None;
            }
        }
    }

    fn recycle(&mut self) {
        let mut batch = std::mem::take(&mut self.current);
        self.at = 0;
        batch.stored.clear();
        batch.decoded.clear();
        if batch.held_bytes > 0 {
            self.spare.push(batch);
        }
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            let ready = self.current.decoded.get(self.at..).unwrap_or_default();
            if !ready.is_empty() {
                let n = ready.len().min(buf.len());
                buf[..n].copy_from_slice(&ready[..n]);
                self.at += n;
                return Ok(n);
            }
            if let Some(stream) = &mut self.stream {
                let n = stream.read(buf)?;
                if n > 0 {
                    return Ok(n);
                }
                self.input = self.stream.take().map(Streaming::finish);
                self.next = Next::Unknown;
            }
            self.recycle();
            self.submit()?;
            if let Some(batch) = self.pool.next() {
                self.current = batch??;
                continue;
            }
            match std::mem::replace(&mut self.next, Next::End) {
                Next::Stream => self.start_stream()?,
                Next::Failed(e) => return Err(e),
                Next::End if self.input.as_ref().is_none_or(|input| input.begun) => return Ok(0),
                Next::End => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "there is no frame")),
                // The walk leaves a batch, or says why not; an end that was not seen must not look like one.
                Next::Unknown => return Err(io::Error::other("the walk over the frames stopped")),
            }
        }
    }
}

/// Whole frames, and what they decode to.
#[derive(Default)]
struct Batch {
    stored: Vec<u8>,
    /// An upper bound of what `stored` decodes to.
    decoded_bytes_max: u64,
    decoded: Vec<u8>,
    /// What the decoder counts for it.
    held_bytes: u64,
}

impl Batch {
    fn needs_bytes(&self) -> u64 {
        self.stored.capacity() as u64 + self.decoded_bytes_max.max(self.decoded.capacity() as u64)
    }

    fn decode(mut self) -> io::Result<Self> {
        // The walk's bound makes it fit.
        let capacity = usize::try_from(self.decoded_bytes_max).map_err(io::Error::other)?;
        self.decoded.reserve_exact(capacity);
        zstd::bulk::Decompressor::new()?.decompress_to_buffer(&self.stored, &mut self.decoded)?;
        Ok(self)
    }
}

/// Finds where frames end.
struct Walk {
    /// Most that a batch may hold.
    bytes_max: u64,
    window_bytes_max: u64,
}

enum Found {
    Frame,
    Skippable,
    End,
    /// Too large, or not of the form known here.
    Odd,
}

impl Walk {
    /// Moves frames from `input` to `batch`, enough to be worth a thread's while.
    fn gather<R: BufRead>(&self, input: &mut Replay<R>, batch: &mut Batch) -> Next {
        loop {
            let (stored, decoded) = (batch.stored.len(), batch.decoded_bytes_max);
            match self.frame(input, batch) {
                Ok(Found::Frame) if batch.stored.len() as u64 + batch.decoded_bytes_max >= BATCH_BYTES => {
                    return Next::Unknown;
                }
                Ok(Found::Frame | Found::Skippable) => continue,
                Ok(Found::End) => return Next::End,
                Ok(Found::Odd) => {
                    input.unread(batch.stored.split_off(stored));
                    batch.decoded_bytes_max = decoded;
                    // A frame that does not fit with others may fit alone.
                    return if stored == 0 { Next::Stream } else { Next::Unknown };
                }
                Err(e) => {
                    batch.stored.truncate(stored);
                    batch.decoded_bytes_max = decoded;
                    return Next::Failed(e);
                }
            }
        }
    }

    /// Moves one frame to the end of `batch`; of an odd one the part that was looked at. Skippable frames are dropped.
    fn frame<R: BufRead>(&self, input: &mut Replay<R>, batch: &mut Batch) -> io::Result<Found> {
        if input.ahead()?.is_empty() {
            return Ok(Found::End);
        }
        let start = batch.stored.len();
        let Some(magic) = input.take(&mut batch.stored)? else { return Ok(Found::Odd) };
        let magic = u32::from_le_bytes(magic);
        if magic & SKIPPABLE_MASK == SKIPPABLE_MAGIC {
            let Some(len) = input.take(&mut batch.stored)? else { return Ok(Found::Odd) };
            batch.stored.truncate(start);
            input.skip(u32::from_le_bytes(len).into())?;
            return Ok(Found::Skippable);
        }
        if magic != FRAME_MAGIC {
            return Ok(Found::Odd);
        }
        let Some(header) = self.header(input, &mut batch.stored)? else { return Ok(Found::Odd) };
        let before = batch.decoded_bytes_max;
        let mut decoded = 0_u64;
        loop {
            let Some([a, b, c]) = input.take(&mut batch.stored)? else { return Ok(Found::Odd) };
            let block = u32::from_le_bytes([a, b, c, 0]);
            let (last, size) = (block & 1 == 1, u64::from(block >> 3));
            // Raw, repeated and compressed blocks; there is no fourth type (section 3.1.1.2.2).
            let (stored, most) = match (block >> 1) & 3 {
                0 => (size, size),
                1 => (1, size),
                // libzstd takes a compressed block of no bytes in a stream, and refuses it in a whole frame.
                2 if size > 0 => (size, header.block_bytes_max),
                _ => return Ok(Found::Odd),
            };
            decoded += most;
            batch.decoded_bytes_max = before + decoded.min(header.content_bytes.unwrap_or(u64::MAX));
            let rest = stored + if last { header.checksum_bytes } else { 0 };
            let held = batch.stored.len() as u64 + rest + batch.decoded_bytes_max;
            if stored.max(most) > header.block_bytes_max || held > self.bytes_max {
                return Ok(Found::Odd);
            }
            if !input.copy(rest, &mut batch.stored)? {
                return Ok(Found::Odd);
            }
            if last {
                return Ok(Found::Frame);
            }
        }
    }

    /// Takes a frame's header behind the magic number (section 3.1.1.1); `None` if the frame is not one for a batch.
    fn header<R: BufRead>(&self, input: &mut Replay<R>, stored: &mut Vec<u8>) -> io::Result<Option<Header>> {
        let Some([descriptor]) = input.take(stored)? else { return Ok(None) };
        let (single_segment, reserved, dictionary) =
            (descriptor & 0x20 != 0, descriptor & 0x08 != 0, descriptor & 0x03 != 0);
        if reserved || dictionary {
            return Ok(None);
        }
        let mut window = None;
        if !single_segment {
            let Some([byte]) = input.take(stored)? else { return Ok(None) };
            let base = 1_u64 << (10 + (byte >> 3));
            window = Some(base + base / 8 * u64::from(byte & 7));
        }
        let content = match descriptor >> 6 {
            0 if single_segment => input.take::<1>(stored)?.map(|[n]| Some(n.into())),
            0 => Some(None),
            1 => input.take(stored)?.map(|n| Some(u64::from(u16::from_le_bytes(n)) + 256)),
            2 => input.take(stored)?.map(|n| Some(u32::from_le_bytes(n).into())),
            _ => input.take(stored)?.map(|n| Some(u64::from_le_bytes(n))),
        };
        let Some(content_bytes) = content else { return Ok(None) };
        // A frame of a single segment has its content for a window.
        let Some(window) = window.or(content_bytes) else { return Ok(None) };
        if window > self.window_bytes_max || content_bytes.is_some_and(|n| n > self.bytes_max) {
            return Ok(None);
        }
        Ok(Some(Header {
            block_bytes_max: window.min(BLOCK_BYTES_MAX),
            content_bytes,
            checksum_bytes: if descriptor & 0x04 != 0 { 4 } else { 0 },
        }))
    }
}

/// What the header of a frame tells of its blocks.
struct Header {
    block_bytes_max: u64,
    content_bytes: Option<u64>,
    checksum_bytes: u64,
}

/// A source that bytes can be given back to.
struct Replay<R> {
    /// Read before `inner`, from `at` on.
    ahead: Vec<u8>,
    at: usize,
    inner: R,
    /// Whether anything was read at all.
    begun: bool,
    /// How many of the next bytes come one by one.
    singly: usize,
}

impl<R: BufRead> Replay<R> {
    /// Gives back the bytes that were read last.
    fn unread(&mut self, mut bytes: Vec<u8>) {
        bytes.extend_from_slice(self.ahead.get(self.at..).unwrap_or_default());
        self.ahead = bytes;
        self.at = 0;
    }

    /// The next bytes; none at the end.
    fn ahead(&mut self) -> io::Result<&[u8]> {
        loop {
            match self.fill_buf() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
                // An end is not buffered: asking again may be interrupted again.
                Ok([]) => return Ok(&[]),
                Ok(_) => break,
            }
        }
        self.fill_buf()
    }

    /// Moves `len` bytes to the end of `out`, or what there is; tells whether it was all.
    fn copy(&mut self, len: u64, out: &mut Vec<u8>) -> io::Result<bool> {
        let mut left = len;
        while left > 0 {
            let ahead = self.ahead()?;
            let n = ahead.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            if n == 0 {
                return Ok(false);
            }
            out.extend_from_slice(&ahead[..n]);
            self.consume(n);
            left -= n as u64;
        }
        Ok(true)
    }

    /// Does the same with `N` bytes and returns them.
    fn take<const N: usize>(&mut self, out: &mut Vec<u8>) -> io::Result<Option<[u8; N]>> {
        if !self.copy(N as u64, out)? {
            return Ok(None);
        }
        Ok(out.last_chunk().copied())
    }

    fn skip(&mut self, len: u64) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            let n = self.ahead()?.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            if n == 0 {
                let text = "a skippable frame is cut short";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
            }
            self.consume(n);
            left -= n as u64;
        }
        Ok(())
    }
}

impl<R: BufRead> Read for Replay<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let ahead = self.fill_buf()?;
        let n = ahead.len().min(buf.len());
        buf[..n].copy_from_slice(&ahead[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl<R: BufRead> BufRead for Replay<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let bytes = match self.ahead.get(self.at..) {
            Some(ahead) if !ahead.is_empty() => ahead,
            _ => self.inner.fill_buf()?,
        };
        Ok(if self.singly > 0 { &bytes[..bytes.len().min(1)] } else { bytes })
    }

    fn consume(&mut self, n: usize) {
        self.begun |= n > 0;
        self.singly = self.singly.saturating_sub(n);
        if self.ahead.is_empty() {
            return self.inner.consume(n);
        }
        self.at += n;
        if self.at >= self.ahead.len() {
            self.ahead = Vec::new();
            self.at = 0;
        }
    }
}
