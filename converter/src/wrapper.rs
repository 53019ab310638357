//! Compression around a whole image file: recognised by content, decoded as a stream, inside hard bounds.
//!
//! ```text
//!  source ──> count bytes in ──> decoder (gz xz zst bz2) ──> bound bytes out ──> inner file
//! ```

use std::fmt;
use std::io::{BufRead, BufReader, Cursor, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::format::PROBE_BYTES;
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

/// Most wrappers peeled off one file: a wrapper nested once.
pub const WRAPPERS_MAX: usize = 2;

/// Bytes asked of the source at a time.
const INPUT_BYTES: usize = 128 * 1024;

/// Decoded bytes below which the expansion ratio is not looked at.
const RATIO_GRACE_BYTES: u64 = 64 << 20;

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
}

impl fmt::Display for Wrapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Wrapper::Gzip => "gz",
            Wrapper::Xz => "xz",
            Wrapper::Zstd => "zst",
            Wrapper::Bzip2 => "bz2",
        })
    }
}

/// Recognises a wrapper by the first bytes of a file; ten bytes are enough.
pub fn detect(head: &[u8]) -> Option<Wrapper> {
    const BZIP2_BLOCK: [u8; 6] = [0x31, 0x41, 0x59, 0x26, 0x53, 0x59];
    const BZIP2_END: [u8; 6] = [0x17, 0x72, 0x45, 0x38, 0x50, 0x90];
    match head {
        [0x1f, 0x8b, 0x08, ..] => Some(Wrapper::Gzip),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Wrapper::Xz),
        // A frame, or the skippable frame that some writers (pzstd) put first.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Wrapper::Zstd),
        [b'B', b'Z', b'h', b'1'..=b'9', block @ ..]
            if block.starts_with(&BZIP2_BLOCK) || block.starts_with(&BZIP2_END) =>
        {
            Some(Wrapper::Bzip2)
        }
        _ => None,
    }
}

/// Decodes `source`, every member or stream of it, inside `limits`.
///
/// A reader's error carries an [`Error`] of kind [`ErrorKind::Limit`] when a bound was crossed, and of kind
/// [`ErrorKind::Corrupt`] when the stream is damaged or cut short; [`Error::io`] keeps that kind. An error of
/// `source` itself comes through as it is.
pub fn decoder<'a>(
    wrapper: Wrapper,
    source: Box<dyn Read + Send + 'a>,
    limits: &Limits,
) -> Result<Box<dyn Read + Send + 'a>> {
    let taken = Arc::new(Taken::default());
    let counted = Counted { inner: source, taken: taken.clone() };
    let input = BufReader::with_capacity(INPUT_BYTES, counted);
    let memory = limits.decoder_memory_bytes_max;
    let setup = |e: std::io::Error| Error::io(format!("setting up the {wrapper} decoder"), e);
    let inner: Box<dyn Read + Send + 'a> = match wrapper {
        Wrapper::Gzip => Box::new(Members::new(flate2::bufread::GzDecoder::new(input))),
        Wrapper::Bzip2 => Box::new(Members::new(bzip2::bufread::BzDecoder::new(input))),
        Wrapper::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(memory, liblzma::stream::CONCATENATED)
                .map_err(|e| setup(e.into()))?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(input, stream))
        }
        Wrapper::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input).map_err(setup)?;
            decoder.window_log_max(memory.max(1 << 10).ilog2().min(31)).map_err(setup)?;
            Box::new(decoder)
        }
    };
    Ok(Box::new(Bounded {
        inner,
        wrapper,
        taken,
        bytes_out: 0,
        bytes_out_max: limits.decoded_bytes_max,
        ratio_max: match wrapper {
            Wrapper::Bzip2 => limits.bzip2_expansion_ratio_max,
            Wrapper::Gzip | Wrapper::Xz | Wrapper::Zstd => limits.expansion_ratio_max,
        },
        memory_bytes_max: memory,
    }))
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

/// Peels at most [`WRAPPERS_MAX`] wrappers off `source`; one more is [`ErrorKind::Unsupported`].
///
/// All decoders together stay inside [`Limits::decoder_memory_bytes_max`]: the outer one gets two thirds of it, the
/// inner one what is left.
pub fn unwrap<'a>(source: Box<dyn Read + Send + 'a>, limits: &Limits) -> Result<Unwrapped<'a>> {
    let mut wrappers = Vec::new();
    let mut reader = source;
    let mut memory = limits.decoder_memory_bytes_max;
    loop {
        let mut head = Vec::with_capacity(PROBE_BYTES);
        Read::by_ref(&mut reader)
            .take(PROBE_BYTES as u64)
            .read_to_end(&mut head)
            .map_err(|e| Error::io("reading the first bytes of the image", e))?;
        reader = Box::new(Cursor::new(head.clone()).chain(reader));
        let Some(wrapper) = detect(&head) else {
            return Ok(Unwrapped { wrappers, head, reader });
        };
        if wrappers.len() == WRAPPERS_MAX {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the file is compressed more than {WRAPPERS_MAX} times ({wrapper} inside {wrappers:?}); decompress it first"
                ),
            ));
        }
        // What the outer decoder will use is not known before it has; two thirds let it read all of `xz -9`.
        let share = if wrappers.is_empty() { memory / 3 * 2 } else { memory };
        memory = memory.saturating_sub(match wrapper {
            Wrapper::Gzip => GZIP_MEMORY_BYTES,
            Wrapper::Bzip2 => BZIP2_MEMORY_BYTES,
            Wrapper::Xz | Wrapper::Zstd => share,
        });
        wrappers.push(wrapper);
        reader = decoder(wrapper, reader, &Limits { decoder_memory_bytes_max: share, ..limits.clone() })?;
    }
}

/// What a decoder took from its source.
#[derive(Default)]
struct Taken {
    bytes: AtomicU64,
    /// The source's own error, on its way past the decoder, which might wrap it or take it for damage.
    failure: Mutex<Option<std::io::Error>>,
}

impl Taken {
    fn failure(&self) -> MutexGuard<'_, Option<std::io::Error>> {
        self.failure.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Notes what a decoder takes from its source.
struct Counted<R> {
    inner: R,
    taken: Arc<Taken>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        match self.inner.read(buf) {
            Ok(n) => {
                self.taken.bytes.fetch_add(n as u64, Ordering::Relaxed);
                Ok(n)
            }
            // No failure: whoever sees it reads again.
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => Err(e),
            Err(e) => {
                *self.taken.failure() = Some(e);
                Err(std::io::Error::other("the source of the compressed stream failed"))
            }
        }
    }
}

/// Stops a decoder at the bounds and gives its failures a kind.
struct Bounded<'a> {
    inner: Box<dyn Read + Send + 'a>,
    wrapper: Wrapper,
    taken: Arc<Taken>,
    bytes_out: u64,
    bytes_out_max: u64,
    ratio_max: u64,
    memory_bytes_max: u64,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buf).map_err(|e| self.explain(e))?;
        self.bytes_out = self.bytes_out.saturating_add(n as u64);
        if self.bytes_out > self.bytes_out_max {
            let message = format!("the {} stream holds more than {} bytes", self.wrapper, self.bytes_out_max);
            return Err(Error::new(ErrorKind::Limit, message).into());
        }
        let bytes_in = self.taken.bytes.load(Ordering::Relaxed);
        if self.bytes_out > RATIO_GRACE_BYTES && self.bytes_out > bytes_in.saturating_mul(self.ratio_max) {
            let message = format!(
                "the {} stream expands more than {} times ({bytes_in} bytes became {}): it looks like a \
                 decompression bomb",
                self.wrapper, self.ratio_max, self.bytes_out
            );
            return Err(Error::new(ErrorKind::Limit, message).into());
        }
        Ok(n)
    }
}

impl Bounded<'_> {
    fn explain(&self, error: std::io::Error) -> std::io::Error {
        use std::io::ErrorKind as Io;
        // The source's own failures, among them those of an outer wrapper, pass unchanged.
        if let Some(failure) = self.taken.failure().take() {
            return failure;
        }
        let wrapper = self.wrapper;
        let text = error.to_string();
        let lzma = error.get_ref().and_then(|e| e.downcast_ref::<liblzma::stream::Error>());
        // The zstd crate reports by message only; the texts are those of its error table.
        if matches!(lzma, Some(liblzma::stream::Error::MemLimit)) || text.contains("requires too much memory")
        {
            let message = format!(
                "the {wrapper} stream needs more than {} bytes of memory to decode; compress it with a smaller \
                 dictionary or window",
                self.memory_bytes_max
            );
            return Error::new(ErrorKind::Limit, message).into();
        }
        let corrupt = matches!(error.kind(), Io::InvalidData | Io::InvalidInput | Io::UnexpectedEof)
            || lzma.is_some()
            || (error.raw_os_error().is_none() && error.kind() == Io::Other);
        if !corrupt {
            return error;
        }
        let message = format!("the {wrapper} stream is damaged or cut short after {} bytes", self.bytes_out);
        Error::with(ErrorKind::Corrupt, message, error).into()
    }
}

/// A decoder of one member that can begin the next one on the same source.
trait Member: Read + Sized {
    type Source: BufRead;
    const MAGIC: &'static [u8];
    fn into_source(self) -> Self::Source;
    fn start(source: Self::Source) -> Self;
}

impl<R: BufRead> Member for flate2::bufread::GzDecoder<R> {
    type Source = R;
    const MAGIC: &'static [u8] = &[0x1f, 0x8b];
    fn into_source(self) -> R {
        self.into_inner()
    }
    fn start(source: R) -> Self {
        Self::new(source)
    }
}

impl<R: BufRead> Member for bzip2::bufread::BzDecoder<R> {
    type Source = R;
    const MAGIC: &'static [u8] = b"BZ";
    fn into_source(self) -> R {
        self.into_inner()
    }
    fn start(source: R) -> Self {
        Self::new(source)
    }
}

/// Reads member after member. Zeros after the last one are padding, as for gzip on tapes; anything else there is
/// an error, so that a damaged member header does not silently shorten the image.
struct Members<M: Member> {
    member: Option<M>,
}

impl<M: Member> Members<M> {
    fn new(first: M) -> Self {
        Self { member: Some(first) }
    }

    /// Moves to the next member; false at the end of the source.
    fn advance(&mut self) -> std::io::Result<bool> {
        let Some(member) = self.member.take() else { return Ok(false) };
        let mut source = member.into_source();
        let ahead = source.fill_buf()?;
        let Some(&first) = ahead.first() else { return Ok(false) };
        if M::MAGIC.first() == Some(&first) {
            self.member = Some(M::start(source));
            return Ok(true);
        }
        loop {
            let ahead = source.fill_buf()?;
            if ahead.is_empty() {
                return Ok(false);
            }
            if !crate::zeros::is_zero(ahead) {
                return Err(std::io::Error::new(
                    std::io::ErrorKind::InvalidData,
                    "garbage after the last member",
                ));
            }
            let n = ahead.len();
            source.consume(n);
        }
    }
}

impl<M: Member> Read for Members<M> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        while let Some(member) = &mut self.member {
            let n = member.read(buf)?;
            if n > 0 {
                return Ok(n);
            }
            if !self.advance()? {
                break;
            }
        }
        Ok(0)
    }
}
