//! Where image files go: a new file, written past the page cache, or a stream.

use std::collections::VecDeque;
use std::fmt;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use rustix::fs::OFlags;

use crate::buffer::{ALIGN_BYTES, AlignedBuf};
use crate::io::{Finished, Sink};
use crate::local::{DirectFile, Partial, Preallocation, allocate};
use crate::{Error, ErrorKind, Result};

/// Bytes written at a time.
const BUFFER_BYTES: usize = 2 << 20;

/// Writes in flight; more of them gain nothing on the devices measured.
const WRITERS: usize = 3;

/// Buffers on the way: one in the hands of each writer, one waiting for each.
const BUFFERS: usize = 2 * WRITERS;

/// A shorter run of zeros is written as data.
const HOLE_BYTES_MIN: u64 = 256 << 10;

/// Zeros handed to a stream at a time.
const ZEROS: &[u8] = &[0; 64 << 10];

/// An image file under construction. It has a temporary name until [`ImageTarget::finish`], and vanishes without it.
///
/// ```text
///  append ──> buffer (2 MiB) ──> queue ──> writer threads ──> file, past the page cache where that works
/// ```
pub struct ImageTarget {
    // Dropped first: nobody writes to the file when it is removed.
    writers: Writers,
    partial: Partial,
    preallocation: Preallocation,
    buffer: AlignedBuf,
    /// Where `buffer` belongs in the file, a multiple of [`ALIGN_BYTES`], and how much of it is filled.
    start: u64,
    filled: usize,
}

impl ImageTarget {
    /// Starts a file for `path`, which replaces an existing one when it is finished.
    pub fn create(path: &Path) -> Result<Self> {
        Self::create_with(path, Preallocation::Off)
    }

    /// Starts a file like [`ImageTarget::create`], which gets its room as told: [`Preallocation::Falloc`] in the end,
    /// when its length is known.
    pub fn create_with(path: &Path, preallocation: Preallocation) -> Result<Self> {
        let partial = Partial::create(path)?;
        let context = |e| Error::io(format!("opening {}", partial.temporary.display()), e);
        let buffered = partial.file.try_clone().map_err(context)?;
        // Not through a link that took the name meanwhile.
        let file = DirectFile::new(buffered, &partial.temporary, OFlags::NOFOLLOW);
        let name = partial.temporary.display().to_string();
        let writers = Writers::start(file, name)?;
        let buffer = AlignedBuf::new(BUFFER_BYTES)?;
        Ok(Self { writers, partial, preallocation, buffer, start: 0, filled: 0 })
    }

    /// Gives the file these permission bits when it is complete, instead of those of the file it replaces or the usual
    /// ones.
    pub fn set_mode(&mut self, mode: u32) -> Result<()> {
        self.partial.set_mode(mode)
    }

    /// Completes the file: it is on stable storage, and has its name, when this returns.
    pub fn finish(mut self, finished: &Finished) -> Result<()> {
        self.pad()?;
        self.push()?;
        self.writers.queue.wait_until_written(u64::MAX)?;
        let context = |e| Error::io(format!("syncing {}", self.partial.temporary.display()), e);
        // Makes a hole at the end, and takes away what the last buffer was padded with.
        self.partial.file.set_len(finished.file_bytes).map_err(context)?;
        if self.preallocation == Preallocation::Falloc {
            allocate(&self.partial.file, 0, finished.file_bytes, &self.partial.temporary)?;
        }
        self.partial.file.sync_data().map_err(context)?;
        drop(self.writers);
        self.partial.commit()
    }

    /// The place of the next byte.
    fn at(&self) -> u64 {
        self.start + self.filled as u64
    }

    /// Fills the buffer with zeros up to a multiple of [`ALIGN_BYTES`]; returns how many.
    fn pad(&mut self) -> Result<u64> {
        let end = self.filled.next_multiple_of(ALIGN_BYTES);
        self.buffer.first_mut(end)[self.filled..].fill(0);
        let padded = end - self.filled;
        self.filled = end;
        Ok(padded as u64)
    }

    /// Hands the buffer on and begins another.
    fn push(&mut self) -> Result<()> {
        if self.filled == 0 {
            return Ok(());
        }
        let empty = self.writers.queue.take_empty()?;
        let buf = std::mem::replace(&mut self.buffer, empty);
        self.writers.queue.push(Chunk { buf, start: self.start, len: self.filled });
        self.start += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    fn fill(&mut self, len: usize, with: impl Fn(&mut [u8], usize)) -> Result<()> {
        let mut done = 0;
        while done < len {
            let n = (BUFFER_BYTES - self.filled).min(len - done);
            with(&mut self.buffer.first_mut(self.filled + n)[self.filled..], done);
            self.filled += n;
            done += n;
            if self.filled == BUFFER_BYTES {
                self.push()?;
            }
        }
        Ok(())
    }
}

impl Sink for ImageTarget {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.fill(bytes.len(), |into, from| into.copy_from_slice(&bytes[from..from + into.len()]))
    }

    fn append_zeros(&mut self, len: u64) -> Result<()> {
        let mut left = len;
        if left >= HOLE_BYTES_MIN && self.preallocation != Preallocation::Full {
            left -= self.pad()?;
            self.push()?;
            let hole = left / ALIGN_BYTES as u64 * ALIGN_BYTES as u64;
            self.start = self.start.checked_add(hole).ok_or_else(|| {
                Error::new(ErrorKind::Limit, format!("a file cannot grow by {len} bytes at {}", self.start))
            })?;
            left -= hole;
        }
        while left > 0 {
            let n = left.min(BUFFER_BYTES as u64);
            self.fill(n as usize, |into, _| into.fill(0))?;
            left -= n;
        }
        Ok(())
    }

    fn rewrite(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let end = offset + bytes.len() as u64;
        debug_assert!(end <= self.at(), "{end} is beyond what was appended");
        let gone = self.start.saturating_sub(offset).min(bytes.len() as u64) as usize;
        let (gone, here) = bytes.split_at(gone);
        if !here.is_empty() {
            let at = (offset + gone.len() as u64 - self.start) as usize;
            self.buffer.first_mut(at + here.len())[at..].copy_from_slice(here);
        }
        if gone.is_empty() {
            return Ok(());
        }
        self.writers.queue.wait_until_written(offset + gone.len() as u64)?;
        let context = |e| Error::io(format!("writing {}", self.partial.temporary.display()), e);
        self.partial.file.write_all_at(gone, offset).map_err(context)
    }
}

impl fmt::Debug for ImageTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageTarget").field("partial", &self.partial).field("at", &self.at()).finish()
    }
}

/// The threads that write; they end when this is dropped.
struct Writers {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

impl Writers {
    fn start(file: DirectFile, name: String) -> Result<Self> {
        let file = Arc::new((file, name));
        let mut writers = Self { queue: Arc::default(), threads: Vec::new() };
        for _ in 0..WRITERS {
            let (queue, file) = (writers.queue.clone(), file.clone());
            let thread = std::thread::Builder::new().spawn(move || queue.work(&file.0, &file.1));
            writers.threads.push(thread.map_err(|e| Error::io("starting a thread that writes", e))?);
        }
        Ok(writers)
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.queue.update(|state| state.stopped = true);
        for thread in self.threads.drain(..) {
            // One that panicked has told so itself.
            let _ = thread.join();
        }
    }
}

/// Full buffers on their way to the writers, and empty ones back.
#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    full: VecDeque<Chunk>,
    /// Where the chunks in the writers' hands begin.
    in_flight: Vec<u64>,
    empty: Vec<AlignedBuf>,
    /// Buffers made so far.
    made: usize,
    failure: Option<Error>,
    failed: bool,
    stopped: bool,
}

struct Chunk {
    buf: AlignedBuf,
    start: u64,
    len: usize,
}

impl Queue {
    /// Returns an empty buffer as soon as there is one.
    fn take_empty(&self) -> Result<AlignedBuf> {
        self.wait(|state| {
            if state.empty.is_empty() && state.made < BUFFERS {
                state.made += 1;
                return Some(AlignedBuf::new(BUFFER_BYTES));
            }
            state.empty.pop().map(Ok)
        })?
    }

    fn push(&self, chunk: Chunk) {
        self.update(|state| state.full.push_back(chunk));
    }

    /// Waits until all that was pushed of the file before `end` is written.
    fn wait_until_written(&self, end: u64) -> Result<()> {
        self.wait(|state| {
            let mut pending =
                state.full.iter().map(|chunk| chunk.start).chain(state.in_flight.iter().copied());
            (!pending.any(|start| start < end)).then_some(())
        })
    }

    /// Waits until `take` finds what it looks for; fails when a writer has.
    fn wait<R>(&self, take: impl Fn(&mut State) -> Option<R>) -> Result<R> {
        let mut state = self.lock();
        loop {
            if state.failed {
                let gone = || Error::new(ErrorKind::Io, "the file could not be written");
                return Err(state.failure.take().unwrap_or_else(gone));
            }
            if let Some(taken) = take(&mut state) {
                return Ok(taken);
            }
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// What each writer does, until it is told to stop.
    fn work(&self, file: &DirectFile, name: &str) {
        let mut state = self.lock();
        loop {
            if state.stopped || state.failed {
                return;
            }
            let Some(Chunk { buf, start, len }) = state.full.pop_front() else {
                state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
                continue;
            };
            state.in_flight.push(start);
            drop(state);
            let written = file.write_all_at(buf.first(len), start);
            state = self.lock();
            state.in_flight.retain(|other| *other != start);
            state.empty.push(buf);
            if let Err(e) = written {
                state.failed = true;
                state.failure = Some(Error::io(format!("writing {name} at offset {start}"), e));
            }
            self.changed.notify_all();
        }
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// An image file that goes down a stream. Its first bytes may be kept back, as they are known last.
pub struct StreamTarget<W: Write> {
    out: BufWriter<W>,
    head: Vec<u8>,
    at: u64,
}

impl<W: Write> StreamTarget<W> {
    /// Sends all but the first `head_bytes` to `out`.
    pub fn new(out: W, head_bytes: usize) -> Self {
        Self { out: BufWriter::with_capacity(1 << 20, out), head: vec![0; head_bytes], at: 0 }
    }

    /// Sends what is left, and returns the first bytes.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.out.flush().map_err(failed)?;
        Ok(self.head)
    }

    fn append_all(&mut self, bytes: &[u8]) -> Result<()> {
        let kept = (self.head.len() as u64).saturating_sub(self.at).min(bytes.len() as u64) as usize;
        let (kept, rest) = bytes.split_at(kept);
        if !kept.is_empty() {
            let at = self.at as usize;
            self.head[at..at + kept.len()].copy_from_slice(kept);
        }
        self.out.write_all(rest).map_err(failed)?;
        self.at += bytes.len() as u64;
        Ok(())
    }
}

impl<W: Write + Send> Sink for StreamTarget<W> {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.append_all(bytes)
    }

    fn append_zeros(&mut self, len: u64) -> Result<()> {
        let mut left = len;
        while left > 0 {
            let n = left.min(ZEROS.len() as u64);
            self.append_all(&ZEROS[..n as usize])?;
            left -= n;
        }
        Ok(())
    }

    fn rewrite(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let place =
            usize::try_from(offset).ok().and_then(|at| self.head.get_mut(at..)?.get_mut(..bytes.len()));
        match place {
            Some(place) => place.copy_from_slice(bytes),
            None => {
                let context = "this format is not written from front to end, so that a stream cannot take it; \
                               name a file";
                return Err(Error::new(ErrorKind::Target, context));
            }
        }
        Ok(())
    }
}

fn failed(e: std::io::Error) -> Error {
    Error::io("writing the image", e)
}
