//! The bounds around a decoder, and the kind that its failures get.

use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::Wrapper;
use crate::limits::Limits;
use crate::{Error, ErrorKind};

/// Decoded bytes below which the expansion ratio is not looked at.
const RATIO_GRACE_BYTES: u64 = 64 << 20;

/// What a decoder took from its source.
#[derive(Default)]
pub(super) struct Taken {
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
pub(super) struct Counted<R> {
    inner: R,
    taken: Arc<Taken>,
}

impl<R> Counted<R> {
    pub(super) fn new(inner: R) -> (Self, Arc<Taken>) {
        let taken = Arc::new(Taken::default());
        (Self { inner, taken: taken.clone() }, taken)
    }
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

/// The file around all wrappers: what is inside is held against its size, lest two wrappers square the ratio of one.
#[derive(Clone)]
pub(super) struct Origin {
    taken: Arc<Taken>,
    ratio_max: u64,
}

impl Origin {
    /// The origin of a `wrapper` that takes from `taken` and that may be inside others.
    pub(super) fn of(wrapper: Wrapper, taken: &Arc<Taken>, limits: &Limits, outer: Option<Self>) -> Self {
        let own = match wrapper {
            Wrapper::Bzip2 => limits.bzip2_expansion_ratio_max,
            Wrapper::Gzip | Wrapper::Xz | Wrapper::Zstd | Wrapper::Lz4 => limits.expansion_ratio_max,
        };
        match outer {
            None => Self { taken: taken.clone(), ratio_max: own },
            Some(outer) => Self { ratio_max: outer.ratio_max.max(own), ..outer },
        }
    }
}

/// Stops a decoder at the bounds and gives its failures a kind.
pub(super) struct Bounded<'a> {
    /// Gone once it failed: nothing that it says later is the file's.
    inner: Option<Box<dyn Read + Send + 'a>>,
    wrapper: Wrapper,
    taken: Arc<Taken>,
    bytes_out: u64,
    bytes_out_max: u64,
    origin: Origin,
    memory_bytes_max: u64,
    begun: Instant,
    wall_time_max: Duration,
}

impl<'a> Bounded<'a> {
    pub(super) fn new(
        inner: Box<dyn Read + Send + 'a>,
        wrapper: Wrapper,
        taken: Arc<Taken>,
        limits: &Limits,
        origin: Origin,
    ) -> Self {
        Self {
            inner: Some(inner),
            wrapper,
            taken,
            bytes_out: 0,
            bytes_out_max: limits.decoded_bytes_max,
            origin,
            memory_bytes_max: limits.decoder_memory_bytes_max,
            begun: Instant::now(),
            wall_time_max: limits.wall_time_max,
        }
    }

    /// Holds the bounds against `n` more bytes.
    fn count(&mut self, n: usize) -> Result<(), Error> {
        let wrapper = self.wrapper;
        self.bytes_out = self.bytes_out.saturating_add(n as u64);
        if self.bytes_out > self.bytes_out_max {
            let message = format!("the {wrapper} stream holds more than {} bytes", self.bytes_out_max);
            return Err(Error::new(ErrorKind::Limit, message));
        }
        // A place far inside is reached in one long read, where nobody asks the work's progress.
        if self.begun.elapsed() > self.wall_time_max {
            let seconds = self.wall_time_max.as_secs_f64();
            let message = format!("decoding the {wrapper} stream takes longer than the limit of {seconds} s");
            return Err(Error::new(ErrorKind::Limit, message));
        }
        let ratio_max = self.origin.ratio_max;
        let bytes_in = self.origin.taken.bytes.load(Ordering::Relaxed);
        if self.bytes_out > RATIO_GRACE_BYTES && self.bytes_out > bytes_in.saturating_mul(ratio_max) {
            let message = format!(
                "the {wrapper} stream expands more than {ratio_max} times ({bytes_in} bytes became {}): it looks like \
                 a decompression bomb",
                self.bytes_out
            );
            return Err(Error::new(ErrorKind::Limit, message));
        }
        Ok(())
    }

    fn explain(&self, error: std::io::Error) -> std::io::Error {
        use std::io::ErrorKind as Io;
        // The source's own failures, among them those of an outer wrapper, pass unchanged.
        if let Some(failure) = self.taken.failure().take() {
            return failure;
        }
        let inner = error.get_ref();
        if inner.is_some_and(|e| e.is::<Error>()) {
            return error;
        }
        let wrapper = self.wrapper;
        let lzma = inner.and_then(|e| e.downcast_ref::<liblzma::stream::Error>());
        // The zstd crate reports by message only; the texts are those of its error table.
        if matches!(lzma, Some(liblzma::stream::Error::MemLimit))
            || error.to_string().contains("requires too much memory")
        {
            return too_much_memory(wrapper, self.memory_bytes_max).into();
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

/// The error of a stream whose decoder would need more memory than it gets.
pub(super) fn too_much_memory(wrapper: Wrapper, bytes_max: u64) -> Error {
    let message = format!(
        "the {wrapper} stream needs more than {bytes_max} bytes of memory to decode; compress it with a smaller \
         dictionary, window or block"
    );
    Error::new(ErrorKind::Limit, message)
}

impl Read for Bounded<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let Some(inner) = &mut self.inner else {
            let message = format!("the {} stream could not be read before", self.wrapper);
            return Err(Error::new(ErrorKind::Corrupt, message).into());
        };
        let read = match inner.read(buf) {
            Ok(n) => self.count(n).map(|()| n).map_err(Into::into),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => return Err(e),
            Err(e) => Err(self.explain(e)),
        };
        if read.is_err() {
            self.inner = None;
        }
        read
    }
}
