//! Compression around a whole image file: recognised by content, decoded as a stream, inside hard bounds.
//!
//! ```text
//!  source ──> count bytes in ──> decoder (gz xz zst bz2 lz4) ──> bound bytes out ──> inner file
//!             └──────────────────────── bounded ──────────────────────────────┘
//!                                   │ blocks, frames
//!                                   └──> worker threads, results in order
//! ```
//!
//! The source is read by whoever reads the inner file, and by nobody else: threads only decode what was read for
//! them. `docs/formats/wrappers.md` says what is relied on, format by format.

mod bounded;
mod bzip2;
mod gzip;
mod lz4;
mod members;
mod pool;
mod xz;
mod zstd;

use std::fmt;
use std::io::{BufReader, Cursor, Read};

use crate::format::PROBE_BYTES;
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};
use bounded::{Bounded, Counted, Origin};

/// Most threads that decode one wrapper; more than that only hold memory.
pub const WORKERS_MAX: usize = 16;

/// Bytes asked of the source at a time.
const INPUT_BYTES: usize = 128 * 1024;

/// Bytes that tell a wrapper from a disk; only one that begins with a long skippable frame needs more.
const MAGIC_BYTES: usize = 16;

/// Memory of the decoders whose need does not depend on the stream, rounded up.
const GZIP_MEMORY_BYTES: u64 = 1 << 20;
const BZIP2_MEMORY_BYTES: u64 = 8 << 20;

/// A compression format around a whole file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrapper {
    /// RFC 1952.
    Gzip,
    /// The .xz file format 1.2.
    Xz,
    /// RFC 8878.
    Zstd,
    /// bzip2.
    Bzip2,
    /// The LZ4 frame format 1.6, and its legacy frames.
    Lz4,
}

impl fmt::Display for Wrapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Wrapper::Gzip => "gz",
            Wrapper::Xz => "xz",
            Wrapper::Zstd => "zst",
            Wrapper::Bzip2 => "bz2",
            Wrapper::Lz4 => "lz4",
        })
    }
}

/// Recognises a wrapper by the first bytes of a file; sixteen are enough, but for a file that begins with a skippable
/// frame, which zst and lz4 share: where `head` does not reach the frame behind it, zst is assumed.
pub fn detect(head: &[u8]) -> Option<Wrapper> {
    match head {
        [0x1f, 0x8b, 0x08, ..] => Some(Wrapper::Gzip),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Wrapper::Xz),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Wrapper::Zstd),
        [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(behind_skippable_frames(head)),
        _ if bzip2::is_bzip2(head) => Some(Wrapper::Bzip2),
        _ if lz4::is_lz4(head) => Some(Wrapper::Lz4),
        _ => None,
    }
}

/// Tells whose frame follows the skippable ones; pzstd begins with one of twelve bytes.
fn behind_skippable_frames(mut head: &[u8]) -> Wrapper {
    while let [0x50..=0x5f, 0x2a, 0x4d, 0x18, a, b, c, d, rest @ ..] = head {
        let len = u32::from_le_bytes([*a, *b, *c, *d]);
        head = usize::try_from(len).ok().and_then(|len| rest.get(len..)).unwrap_or_default();
    }
    if lz4::is_lz4(head) { Wrapper::Lz4 } else { Wrapper::Zstd }
}

/// The threads that decode one wrapper when nobody says how many: one per core, up to eight.
pub fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(8)
}

/// Decodes `source`, every member or stream of it, inside `limits`, with [`default_workers`].
///
/// A reader's error carries an [`Error`] of kind [`ErrorKind::Limit`] when a bound was crossed, and of kind
/// [`ErrorKind::Corrupt`] when the stream is damaged or cut short; [`Error::io`] keeps that kind. An error of
/// `source` itself comes through as it is. What was read before an error is the beginning of the file, but the last
/// blocks before it may be missing.
pub fn decoder<'a>(
    wrapper: Wrapper,
    source: Box<dyn Read + Send + 'a>,
    limits: &Limits,
) -> Result<Box<dyn Read + Send + 'a>> {
    decoder_with(wrapper, source, limits, default_workers())
}

/// Does the same as [`decoder`] with up to `workers` threads, 1 to [`WORKERS_MAX`], which end with the reader.
///
/// Blocks of xz and frames of zst are decoded at the same time if they are of a modest size; all else is decoded by the
/// thread that reads.
pub fn decoder_with<'a>(
    wrapper: Wrapper,
    source: Box<dyn Read + Send + 'a>,
    limits: &Limits,
    workers: usize,
) -> Result<Box<dyn Read + Send + 'a>> {
    let (reader, _) = decode(wrapper, source, limits, workers, None)?;
    Ok(reader)
}

/// Makes the decoder of `source`, which is itself inside the wrappers that begin at `origin`, if any.
fn decode<'a>(
    wrapper: Wrapper,
    source: Box<dyn Read + Send + 'a>,
    limits: &Limits,
    workers: usize,
    origin: Option<Origin>,
) -> Result<(Box<dyn Read + Send + 'a>, Origin)> {
    let workers = workers.clamp(1, WORKERS_MAX);
    let (counted, taken) = Counted::new(source);
    let input = BufReader::with_capacity(INPUT_BYTES, counted);
    let memory = limits.decoder_memory_bytes_max;
    let setup = |e: std::io::Error| Error::io(format!("setting up the {wrapper} decoder"), e);
    let inner: Box<dyn Read + Send + 'a> = match wrapper {
        Wrapper::Gzip => Box::new(gzip::decoder(input)),
        Wrapper::Bzip2 => Box::new(bzip2::decoder(input)),
        Wrapper::Xz => Box::new(xz::Decoder::new(input, memory, workers).map_err(setup)?),
        Wrapper::Zstd => Box::new(zstd::Decoder::new(input, memory, workers).map_err(setup)?),
        Wrapper::Lz4 => Box::new(lz4::Decoder::new(input, memory)),
    };
    let origin = Origin::of(wrapper, &taken, limits, origin);
    Ok((Box::new(Bounded::new(inner, wrapper, taken, limits, origin.clone())), origin))
}

/// A file with its wrappers peeled off.
pub struct Unwrapped<'a> {
    /// The wrappers, outermost first; empty for a plain file.
    pub wrappers: Vec<Wrapper>,
    /// The first inner bytes: [`PROBE_BYTES`], or all of a shorter file.
    pub head: Vec<u8>,
    /// All inner bytes, `head` included.
    pub reader: Box<dyn Read + Send + 'a>,
}

impl fmt::Debug for Unwrapped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unwrapped").field("wrappers", &self.wrappers).finish_non_exhaustive()
    }
}

/// Peels at most [`Limits::chain_depth_max`] wrappers off `source`.
///
/// All decoders together stay inside [`Limits::decoder_memory_bytes_max`]. An outer one gets all of it when no wrapper
/// is inside, else two thirds, and the inner one what is left.
pub fn unwrap<'a>(source: Box<dyn Read + Send + 'a>, limits: &Limits) -> Result<Unwrapped<'a>> {
    unwrap_with(source, limits, default_workers())
}

/// Does the same as [`unwrap`] with up to `workers` threads for each wrapper, as [`decoder_with`].
pub fn unwrap_with<'a>(
    source: Box<dyn Read + Send + 'a>,
    limits: &Limits,
    workers: usize,
) -> Result<Unwrapped<'a>> {
    let mut wrappers = Vec::new();
    let mut reader = source;
    let mut memory = limits.decoder_memory_bytes_max;
    let mut origin = None;
    loop {
        let mut head = Vec::with_capacity(PROBE_BYTES);
        Read::by_ref(&mut reader)
            .take(PROBE_BYTES as u64)
            .read_to_end(&mut head)
            .map_err(|e| Error::io("reading the first bytes of the image", e))?;
        let Some(wrapper) = detect(&head) else {
            reader = Box::new(Cursor::new(head.clone()).chain(reader));
            return Ok(Unwrapped { wrappers, head, reader });
        };
        if wrappers.len() as u64 >= limits.chain_depth_max.into() {
            return Err(Error::new(
                ErrorKind::Limit,
                format!(
                    "the file is compressed more than {} times ({wrapper} inside {wrappers:?}); decompress it first",
                    limits.chain_depth_max
                ),
            ));
        }
        let may_be_nested = wrappers.len() as u64 + 1 < limits.chain_depth_max.into();
        let inner_limits = |memory| Limits { decoder_memory_bytes_max: memory, ..limits.clone() };
        // What the outer decoder will use is not known before it has; two thirds let it read all of `xz -9`.
        let share = match wrapper {
            Wrapper::Gzip => GZIP_MEMORY_BYTES.min(memory),
            Wrapper::Bzip2 => BZIP2_MEMORY_BYTES.min(memory),
            Wrapper::Lz4 => lz4::MEMORY_BYTES.min(memory),
            Wrapper::Xz | Wrapper::Zstd if wraps_a_disk(wrapper, &head, &inner_limits(memory)) => memory,
            Wrapper::Xz | Wrapper::Zstd if may_be_nested => memory / 3 * 2,
            Wrapper::Xz | Wrapper::Zstd => memory,
        };
        let source = Box::new(Cursor::new(head).chain(reader));
        let (inner, begun) = decode(wrapper, source, &inner_limits(share), workers, origin)?;
        (reader, origin) = (inner, Some(begun));
        memory -= share;
        wrappers.push(wrapper);
    }
}

/// Whether the first bytes inside show that no other wrapper follows.
fn wraps_a_disk(wrapper: Wrapper, head: &[u8], limits: &Limits) -> bool {
    let mut inner = Vec::with_capacity(MAGIC_BYTES);
    let Ok(decoder) = decoder_with(wrapper, Box::new(head), limits, 1) else { return false };
    let read = decoder.take(MAGIC_BYTES as u64).read_to_end(&mut inner);
    read.is_ok() && detect(&inner).is_none()
}
