//! Random access over a stream that only runs forward, for images whose layers are compressed by others.
//!
//! ```text
//!  stream:   passed        | window, kept         | not yet read
//!            ^ read again by reopening (bounded)   ^ read on
//! ```
//!
//! Tools write disk images mostly in order, so that reads go forward or a little back, and the window serves them.
//!
//! A stream verifies itself at its end, which one that was left behind never saw: its bytes count only once a later
//! stream has passed the same place with the same bytes.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::{Mutex, MutexGuard};

use dvcr_converter::io::ReadAt;
use sha2::{Digest as _, Sha256};

/// Bytes behind the front of the stream that stay readable.
const WINDOW_BYTES: usize = 24 << 20;
/// Bytes taken from the stream at once.
const CHUNK_BYTES: usize = 256 << 10;
/// Times that the stream is begun again before the image is called too scattered.
const REOPENINGS_MAX: u32 = 8;

/// A reader at any offset that moves one stream forward, and begins a new one to go far back.
pub struct ForwardReader<F> {
    len: u64,
    open: F,
    state: Mutex<State>,
}

struct State {
    stream: Box<dyn Read + Send>,
    /// Whole chunks but for the last of the stream; the first begins at `start`.
    window: VecDeque<Vec<u8>>,
    start: u64,
    end: u64,
    reopened: u32,
    /// Of the stream's bytes up to `end`.
    hasher: Sha256,
    /// Streams that no later one has confirmed yet; at most [`REOPENINGS_MAX`].
    left: Vec<LeftBehind>,
}

/// How far a stream was read before another one began, and the hash of what it brought.
struct LeftBehind {
    end: u64,
    hash: Hash,
}

type Hash = digest::Output<Sha256>;

impl<F> ForwardReader<F>
where
    F: Fn() -> io::Result<Box<dyn Read + Send>> + Send + Sync,
{
    /// Opens the stream of `len` bytes for the first time.
    pub fn new(len: u64, open: F) -> io::Result<Self> {
        let state = Mutex::new(State::new(open()?, 0, Vec::new()));
        Ok(Self { len, open, state })
    }

    /// Reads the stream to its end, so that whatever is checked there is checked, and all that was read before equals it.
    pub fn drain(&self) -> io::Result<()> {
        let mut state = self.lock();
        while state.advance()? {}
        if !state.left.is_empty() {
            return Err(changed(state.end));
        }
        match state.end == self.len {
            true => Ok(()),
            false => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the stream has {} bytes, announced were {}", state.end, self.len),
            )),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl<F> ReadAt for ForwardReader<F>
where
    F: Fn() -> io::Result<Box<dyn Read + Send>> + Send + Sync,
{
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut state = self.lock();
        if offset < state.start {
            if state.reopened == REOPENINGS_MAX {
                return Err(io::Error::other(format!(
                    "the image jumps back to offset {offset} too often to be read from a compressed layer; \
                     import it into a registry first (dvcr import docker://...), and populate from there"
                )));
            }
            let stream = (self.open)()?;
            let mut left = std::mem::take(&mut state.left);
            left.push(LeftBehind { end: state.end, hash: state.hasher.clone().finalize() });
            *state = State::new(stream, state.reopened + 1, left);
        }
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let copied = state.copy(buf, offset);
            buf = &mut buf[copied..];
            offset += copied as u64;
            if !buf.is_empty() && !state.advance()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }
}

impl State {
    fn new(stream: Box<dyn Read + Send>, reopened: u32, left: Vec<LeftBehind>) -> Self {
        Self { stream, window: VecDeque::new(), start: 0, end: 0, reopened, hasher: Sha256::new(), left }
    }

    /// Copies what the window has at `offset`, which is not before it.
    fn copy(&self, buf: &mut [u8], offset: u64) -> usize {
        let behind = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
        let (first, mut skip) = (behind / CHUNK_BYTES, behind % CHUNK_BYTES);
        let mut copied = 0;
        for chunk in self.window.iter().skip(first) {
            let bytes = chunk.get(skip..).unwrap_or_default();
            let len = bytes.len().min(buf.len() - copied);
            buf[copied..copied + len].copy_from_slice(&bytes[..len]);
            copied += len;
            skip = 0;
        }
        copied
    }

    /// Takes one chunk from the stream; false at its end.
    fn advance(&mut self) -> io::Result<bool> {
        let mut chunk = match self.window.len() * CHUNK_BYTES >= WINDOW_BYTES {
            true => self.window.pop_front().unwrap_or_default(),
            false => Vec::with_capacity(CHUNK_BYTES),
        };
        self.start += chunk.len() as u64;
        chunk.clear();
        let read = (&mut self.stream).take(CHUNK_BYTES as u64).read_to_end(&mut chunk)?;
        self.end += read as u64;
        self.hasher.update(&chunk);
        self.confirm()?;
        if read > 0 {
            self.window.push_back(chunk);
        }
        Ok(read > 0)
    }

    /// Holds the streams left behind against this one where it has come as far as they did. One that differs stays, so
    /// that the failure does.
    fn confirm(&mut self) -> io::Result<()> {
        if !self.left.iter().any(|left| left.end <= self.end) {
            return Ok(());
        }
        // Streams advance by the same steps, thus pass the very same places.
        let hash = self.hasher.clone().finalize();
        self.left.retain(|left| left.end != self.end || left.hash != hash);
        match self.left.iter().any(|left| left.end <= self.end) {
            true => Err(changed(self.end)),
            false => Ok(()),
        }
    }
}

fn changed(end: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!(
            "the image differs from one reading to the next before byte {end}; its registry is not to be trusted"
        ),
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i / 7 % 251) as u8).collect()
    }

    #[test]
    fn reads_anywhere_equal_the_stream() {
        let all = bytes(WINDOW_BYTES + 5 * CHUNK_BYTES + 1234);
        let opened = AtomicU32::new(0);
        let reader = ForwardReader::new(all.len() as u64, || {
            opened.fetch_add(1, Ordering::Relaxed);
            Ok(Box::new(io::Cursor::new(all.clone())) as Box<dyn Read + Send>)
        })
        .unwrap();
        let far = all.len() - 10;
        for (offset, len) in
            [(0, 10), (CHUNK_BYTES - 5, 10), (3 * CHUNK_BYTES + 1, 700_000), (100, 50), (far, 10), (0, 4)]
        {
            let mut buf = vec![0; len];
            reader.read_exact_at(&mut buf, offset as u64).unwrap();
            assert!(buf == all[offset..offset + len], "{len} bytes at {offset}");
        }
        // The last read went back beyond the window, all others did not.
        assert_eq!(opened.load(Ordering::Relaxed), 2);
        reader.drain().unwrap();
        let past = reader.read_exact_at(&mut [0; 11], far as u64).unwrap_err();
        assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_stream_that_was_left_behind_is_held_against_the_next() {
        let all = bytes(WINDOW_BYTES * 2);
        let forged = |at: usize| {
            let mut forged = all.clone();
            forged[at] ^= 1;
            forged
        };
        let far = all.len() as u64 - 1;
        for at in [0, WINDOW_BYTES, all.len() - 1] {
            let opened = AtomicU32::new(0);
            let reader = ForwardReader::new(all.len() as u64, || {
                let first = opened.fetch_add(1, Ordering::Relaxed) == 0;
                let bytes = if first { forged(at) } else { all.clone() };
                Ok(Box::new(io::Cursor::new(bytes)) as Box<dyn Read + Send>)
            })
            .unwrap();
            reader.read_exact_at(&mut [0], far).unwrap();
            reader.read_exact_at(&mut [0], 0).unwrap();
            for _ in 0..2 {
                assert_eq!(reader.drain().unwrap_err().kind(), io::ErrorKind::InvalidData, "{at}");
            }
        }
    }

    #[test]
    fn a_scattered_image_ends_in_advice_not_in_endless_reading() {
        let all = bytes(WINDOW_BYTES * 2);
        let reader = ForwardReader::new(all.len() as u64, || {
            Ok(Box::new(io::Cursor::new(all.clone())) as Box<dyn Read + Send>)
        })
        .unwrap();
        let far = all.len() as u64 - 1;
        let read = |offset| reader.read_exact_at(&mut [0], offset);
        let error = (0..20).find_map(|i| read(if i % 2 == 0 { far } else { 0 }).err()).unwrap();
        assert!(error.to_string().contains("dvcr import"), "{error}");
    }
}
