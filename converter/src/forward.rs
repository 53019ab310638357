//! Random access over a stream that only runs forward: an image inside a wrapper.
//!
//! ```text
//!            passed              window          to come
//!  stream ───────────────────|▒▒▒▒▒▒▒▒▒▒▒▒▒|─────────────────>
//!            begin again         copy            read on
//! ```
//!
//! Images are mostly written, and read, in the order of the file: a window behind the front of the stream serves
//! the small steps back, and the few large ones begin the stream again.
//!
//! A stream verifies itself at its end, which one that was left behind never saw: its bytes count only once a later
//! stream has passed the same place with the same bytes.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::{Mutex, MutexGuard};

use sha2::{Digest as _, Sha256};

use crate::io::ReadAt;
use crate::progress::Progress;
use crate::{Error, ErrorKind};

/// Bytes behind the front of the stream that are kept.
const WINDOW_BYTES: u64 = 24 << 20;

/// Bytes taken from the stream at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// Times that a stream is begun again; each of them decodes all of it up to the place that is wanted.
const RESTARTS_MAX: u32 = 8;

/// Reads at any offset from a stream that `open` begins anew.
///
/// Reads at rising offsets cost one pass over the stream. Threads may share it, but they wait for each other, and
/// one that is far behind makes the stream begin again: use one worker.
pub struct ForwardReader<F> {
    len: u64,
    open: F,
    state: Mutex<State>,
}

struct State {
    /// `None` at its end, and after a failure.
    stream: Option<Box<dyn Read + Send>>,
    /// What was read last, from `start` to `end`; every chunk is full but the last one of the stream.
    window: VecDeque<Vec<u8>>,
    start: u64,
    end: u64,
    restarts: u32,
    /// Of the stream's bytes up to `end`.
    hasher: Sha256,
    /// Streams that no later one has confirmed yet; at most [`RESTARTS_MAX`].
    left: Vec<LeftBehind>,
}

/// How far a stream was read before another one began, and the hash of what it brought.
struct LeftBehind {
    end: u64,
    hash: [u8; 32],
}

impl<F> ForwardReader<F>
where
    F: Fn() -> io::Result<Box<dyn Read + Send>> + Send + Sync,
{
    /// Begins the stream, which has `len` bytes, for the first time.
    pub fn new(len: u64, open: F) -> io::Result<Self> {
        let mut state = State::new(0, Vec::new());
        state.stream = Some(open()?);
        Ok(Self { len, open, state: Mutex::new(state) })
    }

    /// Reads the stream to its end, so that what is verified there is verified, and all that was read before equals it.
    ///
    /// Fails with [`io::ErrorKind::UnexpectedEof`] if it is shorter or longer than announced.
    pub fn drain(&self) -> io::Result<()> {
        let mut state = self.lock();
        while state.advance()? {}
        if !state.left.is_empty() {
            return Err(changed(state.end));
        }
        if state.end != self.len {
            let text = format!("the stream has {} bytes, not {} as announced", state.end, self.len);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl<F> ReadAt for ForwardReader<F>
where
    F: Fn() -> io::Result<Box<dyn Read + Send>> + Send + Sync,
{
    fn len(&self) -> u64 {
        self.len
    }

    fn is_forward_only(&self) -> bool {
        true
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut state = self.lock();
        if offset < state.start {
            if state.restarts == RESTARTS_MAX {
                let text = format!(
                    "the image goes back to file offset {offset} after {RESTARTS_MAX} passes: its parts are too \
                     scattered to be read compressed; decompress it, or import it into a registry, first"
                );
                return Err(Error::new(ErrorKind::Unsupported, text).into());
            }
            let mut left = std::mem::take(&mut state.left);
            left.push(LeftBehind { end: state.end, hash: state.hasher.clone().finalize().into() });
            // The old decoder frees its memory before the next one asks for some.
            *state = State::new(state.restarts + 1, left);
            state.stream = Some((self.open)()?);
        }
        let mut done = 0;
        while done < buf.len() {
            done += state.copy(&mut buf[done..], offset + done as u64);
            if done < buf.len() && !state.advance()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }
}

impl State {
    fn new(restarts: u32, left: Vec<LeftBehind>) -> Self {
        let window = VecDeque::new();
        Self { stream: None, window, start: 0, end: 0, restarts, hasher: Sha256::new(), left }
    }

    /// Copies what the window has of the bytes from `offset`, which is not before it; returns how many.
    fn copy(&self, buf: &mut [u8], offset: u64) -> usize {
        let Ok(ahead) = usize::try_from(offset - self.start) else { return 0 };
        let mut skip = ahead % CHUNK_BYTES;
        let mut done = 0;
        for chunk in self.window.range((ahead / CHUNK_BYTES).min(self.window.len())..) {
            let from = chunk.get(skip..).unwrap_or_default();
            let n = from.len().min(buf.len() - done);
            buf[done..done + n].copy_from_slice(&from[..n]);
            done += n;
            skip = 0;
            if done == buf.len() {
                break;
            }
        }
        done
    }

    /// Moves the window by the next chunk; false at the end of the stream.
    fn advance(&mut self) -> io::Result<bool> {
        let Some(mut stream) = self.stream.take() else { return Ok(false) };
        let mut chunk = Vec::new();
        if self.end - self.start >= WINDOW_BYTES
            && let Some(oldest) = self.window.pop_front()
        {
            self.start += oldest.len() as u64;
            chunk = oldest;
            chunk.clear();
        }
        chunk.reserve_exact(CHUNK_BYTES);
        let n = (&mut stream).take(CHUNK_BYTES as u64).read_to_end(&mut chunk)?;
        self.end += n as u64;
        self.hasher.update(&chunk);
        self.confirm()?;
        if n > 0 {
            self.window.push_back(chunk);
        }
        if n == CHUNK_BYTES {
            self.stream = Some(stream);
        }
        Ok(n > 0)
    }

    /// Holds the streams left behind against this one where it has come as far as they did. One that differs stays, so
    /// that the failure does.
    fn confirm(&mut self) -> io::Result<()> {
        if !self.left.iter().any(|left| left.end <= self.end) {
            return Ok(());
        }
        // Streams advance by the same steps, thus pass the very same places.
        let hash: [u8; 32] = self.hasher.clone().finalize().into();
        self.left.retain(|left| left.end != self.end || left.hash != hash);
        match self.left.iter().any(|left| left.end <= self.end) {
            true => Err(changed(self.end)),
            false => Ok(()),
        }
    }
}

/// Reads a stream to its end and returns how many bytes that were, for nothing else tells what a compressed file holds;
/// `each` is told of them as they come.
pub fn measure(
    mut reader: Box<dyn Read + Send + '_>,
    progress: &Progress,
    each: impl Fn(u64),
) -> crate::Result<u64> {
    progress.set_phase("measure");
    let mut buf = vec![0; CHUNK_BYTES];
    let mut bytes = 0u64;
    loop {
        progress.check()?;
        match reader.read(&mut buf) {
            Ok(0) => return Ok(bytes),
            Ok(n) => {
                bytes += n as u64;
                each(n as u64);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io(format!("decoding the image after {bytes} bytes"), e)),
        }
    }
}

fn changed(end: u64) -> io::Error {
    let text = format!(
        "the image differs from one reading to the next before byte {end}: it was changed meanwhile, or its source is not \
         to be trusted; start again"
    );
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn sample(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i / 3 % 253) as u8).collect()
    }

    fn boxed(stream: impl Read + Send + 'static) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(stream))
    }

    #[test]
    fn reads_at_any_offset_equal_the_stream() {
        let all = sample(WINDOW_BYTES as usize + 6 * CHUNK_BYTES + 777);
        let opened = AtomicU32::new(0);
        let reader = ForwardReader::new(all.len() as u64, || {
            opened.fetch_add(1, Ordering::Relaxed);
            boxed(io::Cursor::new(all.clone()))
        })
        .unwrap();
        let last = all.len() - 9;
        let read = |offset: usize, len: usize| {
            let mut buf = vec![0; len];
            reader.read_exact_at(&mut buf, offset as u64).unwrap();
            assert!(buf == all[offset..offset + len], "{len} bytes at {offset}");
        };
        for (offset, len) in
            [(0, 9), (CHUNK_BYTES - 4, 8), (0, 0), (2 * CHUNK_BYTES + 1, 900_000), (77, 50), (last, 9)]
        {
            read(offset, len);
        }
        assert_eq!(opened.load(Ordering::Relaxed), 1, "the window serves small steps back");
        read(1, 3);
        assert_eq!(opened.load(Ordering::Relaxed), 2);
        reader.drain().unwrap();
        let past = reader.read_exact_at(&mut [0; 10], last as u64).unwrap_err();
        assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_stream_that_was_left_behind_is_held_against_the_next() {
        let all = sample(WINDOW_BYTES as usize * 2);
        for at in [0, WINDOW_BYTES as usize, all.len() - 1] {
            let opened = AtomicU32::new(0);
            let reader = ForwardReader::new(all.len() as u64, || {
                let mut bytes = all.clone();
                if opened.fetch_add(1, Ordering::Relaxed) == 0 {
                    bytes[at] ^= 1;
                }
                boxed(io::Cursor::new(bytes))
            })
            .unwrap();
            reader.read_exact_at(&mut [0], all.len() as u64 - 1).unwrap();
            reader.read_exact_at(&mut [0], 0).unwrap();
            for _ in 0..2 {
                assert_eq!(reader.drain().unwrap_err().kind(), io::ErrorKind::InvalidData, "{at}");
            }
        }
    }

    #[test]
    fn memory_stays_inside_the_window() {
        let reader = ForwardReader::new(1 << 30, || boxed(io::repeat(7).take(1 << 30))).unwrap();
        reader.read_exact_at(&mut [0; 10], (1 << 30) - 10).unwrap();
        let state = reader.lock();
        let kept: usize = state.window.iter().map(Vec::capacity).sum();
        assert!(kept as u64 <= WINDOW_BYTES + CHUNK_BYTES as u64, "{kept}");
    }

    #[test]
    fn a_scattered_image_ends_in_advice_and_not_in_endless_passes() {
        let len = 2 * WINDOW_BYTES;
        let opened = AtomicU32::new(0);
        let reader = ForwardReader::new(len, || {
            opened.fetch_add(1, Ordering::Relaxed);
            boxed(io::repeat(7).take(len))
        })
        .unwrap();
        let error = (0..40)
            .find_map(|i| reader.read_exact_at(&mut [0], if i % 2 == 0 { len - 1 } else { 0 }).err())
            .unwrap();
        let error = Error::io("reading", error);
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(opened.load(Ordering::Relaxed), 1 + RESTARTS_MAX);
    }

    #[test]
    fn a_stream_of_another_length_is_told() {
        for len in [0u64, 10, 300_000, 1_000_000] {
            let reader = ForwardReader::new(500_000, move || boxed(io::repeat(7).take(len))).unwrap();
            assert_eq!(reader.drain().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn nothing_is_read_behind_a_failure() {
        struct FailsOnce(bool);
        impl Read for FailsOnce {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                if std::mem::replace(&mut self.0, true) {
                    buf.fill(1);
                    return Ok(buf.len());
                }
                Err(io::Error::other("broken"))
            }
        }
        let reader = ForwardReader::new(1 << 20, || boxed(FailsOnce(false))).unwrap();
        assert_eq!(reader.read_exact_at(&mut [0], 0).unwrap_err().to_string(), "broken");
        assert!(reader.read_exact_at(&mut [0], 0).is_err());
    }
}
