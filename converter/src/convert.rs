//! The engine: workers take ranges of a disk, decode or encode them, and hand them to the target.
//!
//! ```text
//!                 ┌─ worker: read, decode ─┐           ┌─ writer: write at its offset ─┐
//!  feed (ranges) ─┼─ worker: read, decode ─┼─ buffers ─┼─ writer: write at its offset ─┼─> raw target
//!                 └─ ...                  ─┘           └───────────────────────────────┘
//!                 ┌─ worker: read, compress, wait for its turn, put ─┐
//!  feed (ranges) ─┼─ worker: read, compress, wait for its turn, put ─┼─> the format's writer ──> sink
//!                 └─ ...                                            ─┘
//! ```
//!
//! The feed passes over holes and zeros, so that they cost nothing; a stream is read by whichever worker holds it. Writers
//! wait for the device, so that workers need not: with direct writes a core that waits is a core lost.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Condvar, Mutex, MutexGuard};

use crate::buffer::{ALIGN_BYTES, AlignedBuf};
use crate::format::SECTOR_BYTES;
use crate::io::{Block, Compression, CreateOptions, Disk, Extent, Finished, Sink, Writer};
use crate::local::RawTarget;
use crate::pack::Encoder;
use crate::progress::Progress;
use crate::zeros::is_zero;
use crate::{Error, ErrorKind, Result};

/// Most workers; more than that only add buffers.
const WORKERS_MAX: usize = 16;

/// Writes in flight to a raw target; more of them gain nothing on the devices measured.
const WRITERS: usize = 3;

/// Bounds of the unit of work, bytes.
const UNIT_BYTES_MIN: usize = 64 << 10;
const UNIT_BYTES_MAX: usize = 8 << 20;

/// Longest run of zeros handed to a target in one piece, so that an interruption is noticed.
pub(crate) const ZERO_BYTES_MAX: u64 = 1 << 30;

/// How the work is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Threads that read and code at the same time; 1 to 16, other values are brought into that range.
    pub workers: usize,
    /// Bytes of the virtual disk that a worker takes at a time; 64 KiB to 8 MiB, and when an image file is written a
    /// whole number of its blocks. A unit smaller than the source's compressed clusters decodes them more than once.
    pub unit_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        // The larger a direct write, the fewer small rests the block layer cuts off.
        Self { workers: cores.clamp(2, 8), unit_bytes: 2 << 20 }
    }
}

impl Options {
    pub(crate) fn workers(&self) -> usize {
        self.workers.clamp(1, WORKERS_MAX)
    }

    /// The unit as a whole number of `step`s, a power of two of at most 2 MiB.
    pub(crate) fn unit(&self, step: usize) -> usize {
        self.unit_bytes.clamp(UNIT_BYTES_MIN, UNIT_BYTES_MAX).next_multiple_of(step)
    }
}

/// What went to a raw target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Bytes written as data.
    pub data_bytes: u64,
    /// Bytes that are zero and were not written, or written as zeros without data.
    pub zero_bytes: u64,
}

/// Writes the whole disk to `target`, which is as large as the disk or larger; what lies beyond is made zero.
///
/// `progress` counts bytes of the target. The target is complete only after [`RawTarget::finish`].
pub fn to_raw(
    disk: &dyn Disk,
    target: &RawTarget,
    options: &Options,
    progress: &Progress,
) -> Result<Written> {
    let disk_bytes = disk.virtual_size();
    if target.size() < disk_bytes {
        return Err(Error::new(
            ErrorKind::Target,
            format!("the target of {} bytes is smaller than the disk of {disk_bytes} bytes", target.size()),
        ));
    }
    progress.set_total(target.size());
    let unit = options.unit(ALIGN_BYTES);
    let mut ranges = Ranges::new(disk, unit as u64);
    let written = write_raw(
        |_| ranges.next(),
        |buf, start| disk.read_at(buf, start),
        target,
        unit,
        options.workers(),
        progress,
    )?;
    fill_rest(target, disk_bytes, written, progress)
}

/// Writes the bytes of `raw`, a disk of unknown length, to `target`, which grows as far as it can.
///
/// The last sector is filled up with zeros, as qemu does with a raw file. `progress` counts bytes of the disk; its
/// total is left alone. Fails with [`ErrorKind::Target`] when the target cannot hold the disk.
pub fn stream_to_raw(
    raw: Box<dyn Read + Send + '_>,
    target: &RawTarget,
    options: &Options,
    progress: &Progress,
) -> Result<Written> {
    let unit = options.unit(ALIGN_BYTES);
    let mut stream = Stream { raw, at: 0, ended: false };
    let feed = |buf: &mut [u8]| {
        let range = stream.next(buf)?;
        target.grow(stream.at)?;
        Ok(range)
    };
    let written = write_raw(feed, |_, _| Ok(()), target, unit, options.workers(), progress)?;
    fill_rest(target, stream.at, written, progress)
}

/// Writes the whole disk to `sink` as an image file.
///
/// `progress` counts bytes of the virtual disk.
pub fn to_image(
    disk: &dyn Disk,
    sink: &mut dyn Sink,
    image: &dyn CreateOptions,
    options: &Options,
    progress: &Progress,
) -> Result<Finished> {
    let virtual_size = disk.virtual_size();
    let mut writer = image.create(sink, Some(virtual_size))?;
    progress.set_total(virtual_size);
    let unit = options.unit(writer.block_bytes());
    let mut ranges = Ranges::new(disk, unit as u64);
    let fill = |buf: &mut [u8], start| disk.read_at(buf, start);
    encode(|_| ranges.next(), fill, writer.as_mut(), unit, options.workers(), progress)?;
    writer.finish(virtual_size)
}

/// Writes the bytes of `raw`, a disk of `virtual_size` bytes or of unknown length, to `sink` like [`to_image`].
///
/// Zero blocks are not stored, and the last sector is filled up with zeros, as qemu does with a raw file.
/// `progress` counts bytes of the disk; its total is left alone.
pub fn stream_to_image(
    raw: Box<dyn Read + Send + '_>,
    virtual_size: Option<u64>,
    sink: &mut dyn Sink,
    image: &dyn CreateOptions,
    options: &Options,
    progress: &Progress,
) -> Result<Finished> {
    let mut writer = image.create(sink, virtual_size)?;
    let unit = options.unit(writer.block_bytes());
    let mut stream = Stream { raw, at: 0, ended: false };
    let feed = |buf: &mut [u8]| stream.next(buf);
    encode(feed, |_, _| Ok(()), writer.as_mut(), unit, options.workers(), progress)?;
    let size = stream.at;
    if virtual_size.is_some_and(|announced| announced != size) {
        let announced = virtual_size.unwrap_or(0);
        let context =
            format!("the disk has {size} bytes, not {announced} as announced: it was changed meanwhile");
        return Err(Error::new(ErrorKind::Corrupt, context));
    }
    writer.finish(size)
}

/// Makes zero what lies between the end of the disk and the end of the target.
fn fill_rest(
    target: &RawTarget,
    disk_bytes: u64,
    mut written: Written,
    progress: &Progress,
) -> Result<Written> {
    let mut at = disk_bytes;
    while at < target.size() {
        progress.check()?;
        let len = (target.size() - at).min(ZERO_BYTES_MAX);
        target.write_zeros(at, len)?;
        written.zero_bytes += len;
        progress.advance(len);
        at += len;
    }
    Ok(written)
}

/// A piece of work.
pub(crate) enum Range {
    Zero { start: u64, len: u64 },
    Data { start: u64, len: usize },
}

/// Walks the extents of a disk and cuts them on a grid of units.
pub(crate) struct Ranges<'a> {
    disk: &'a dyn Disk,
    unit: u64,
    at: u64,
    extent: Option<Extent>,
}

impl<'a> Ranges<'a> {
    pub(crate) fn new(disk: &'a dyn Disk, unit: u64) -> Self {
        Self { disk, unit, at: 0, extent: None }
    }

    /// Goes on behind `error` as if there was data up to the end of the unit; fails with one that is no damage.
    pub(crate) fn next_in_spite_of(&mut self, error: Error) -> Result<Option<Range>> {
        if !matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io) {
            return Err(error);
        }
        Ok(self.next_data())
    }

    pub(crate) fn next(&mut self) -> Result<Option<Range>> {
        let size = self.disk.virtual_size();
        if self.at >= size {
            return Ok(None);
        }
        let extent = match self.extent {
            Some(extent) if extent.end() > self.at => extent,
            _ => *self.extent.insert(self.disk.extent_at(self.at)?),
        };
        let start = self.at;
        if !extent.is_data() {
            // Zeros end on the grid too; a short rest is read with the data after it.
            let end = if extent.end() >= size { size } else { extent.end() / self.unit * self.unit };
            if end > start {
                let len = (end - start).min(ZERO_BYTES_MAX / self.unit * self.unit);
                self.at = start + len;
                return Ok(Some(Range::Zero { start, len }));
            }
        }
        Ok(self.next_data())
    }

    /// The rest of a unit: holes inside it read as zeros, and one request for all costs less than one per extent.
    fn next_data(&mut self) -> Option<Range> {
        let start = self.at;
        self.at = (start / self.unit + 1).saturating_mul(self.unit).min(self.disk.virtual_size());
        Some(Range::Data { start, len: (self.at - start) as usize })
    }
}

/// A disk that is read in order only.
struct Stream<'a> {
    raw: Box<dyn Read + Send + 'a>,
    at: u64,
    ended: bool,
}

impl Stream<'_> {
    /// Fills `buf` with the next unit, the end of the disk with zeros up to a whole sector.
    fn next(&mut self, buf: &mut [u8]) -> Result<Option<Range>> {
        let start = self.at;
        let mut len = 0;
        while !self.ended && len < buf.len() {
            match self.raw.read(&mut buf[len..]) {
                Ok(0) => self.ended = true,
                Ok(n) => len += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => {
                    // What comes after a failure is nobody's disk.
                    self.ended = true;
                    return Err(Error::io(format!("reading the disk at offset {}", start + len as u64), e));
                }
            }
        }
        if len == 0 {
            return Ok(None);
        }
        let whole = len.next_multiple_of(SECTOR_BYTES as usize);
        buf[len..whole].fill(0);
        self.at = start + whole as u64;
        if is_zero(&buf[..whole]) {
            return Ok(Some(Range::Zero { start, len: whole as u64 }));
        }
        Ok(Some(Range::Data { start, len: whole }))
    }
}

/// Buffers on their way from the workers to the writers and back; their number bounds what is in flight.
struct Buffers {
    free: Vec<AlignedBuf>,
    filled: VecDeque<Filled>,
    /// Workers that may still fill one.
    workers: usize,
}

struct Filled {
    buf: AlignedBuf,
    start: u64,
    len: usize,
}

/// Runs workers and writers that write what `feed` hands out, in any order. `fill` reads a range that `feed` has not read.
fn write_raw(
    feed: impl FnMut(&mut [u8]) -> Result<Option<Range>> + Send,
    fill: impl Fn(&mut [u8], u64) -> Result<()> + Sync,
    target: &RawTarget,
    unit: usize,
    workers: usize,
    progress: &Progress,
) -> Result<Written> {
    let feed = Mutex::new(feed);
    let written = Mutex::new(Written::default());
    let count = |data: u64, len: u64| {
        progress.store(data)?;
        let mut written = lock(&written);
        written.data_bytes += data;
        written.zero_bytes += len - data;
        progress.advance(len);
        Ok::<_, Error>(())
    };
    let work = |team: &Team<Buffers>| {
        while let Some(mut buf) = team.wait(|buffers| buffers.free.pop()) {
            progress.check()?;
            let range = lock(&feed)(buf.first_mut(unit))?;
            match range {
                None => break,
                Some(Range::Zero { start, len }) => {
                    target.write_zeros(start, len)?;
                    count(0, len)?;
                    team.update(|buffers| buffers.free.push(buf));
                }
                Some(Range::Data { start, len }) => {
                    fill(buf.first_mut(len), start)?;
                    team.update(|buffers| buffers.filled.push_back(Filled { buf, start, len }));
                }
            }
        }
        team.update(|buffers| buffers.workers -= 1);
        Ok(())
    };
    let write = |team: &Team<Buffers>| {
        let next = |buffers: &mut Buffers| match buffers.filled.pop_front() {
            None if buffers.workers > 0 => None,
            filled => Some(filled),
        };
        while let Some(Filled { buf, start, len }) = team.wait(next).flatten() {
            progress.check()?;
            count(target.write_sparse(buf.first(len), start)?, len as u64)?;
            team.update(|buffers| buffers.free.push(buf));
        }
        Ok(())
    };
    // One buffer in the hands of each thread, and one waiting for each writer.
    let free: Result<_> = (0..workers + 2 * WRITERS).map(|_| AlignedBuf::new(unit)).collect();
    let team = Team::new(Buffers { free: free?, filled: VecDeque::new(), workers });
    run_team(&team, workers + WRITERS, |n| if n < workers { work(&team) } else { write(&team) })?;
    Ok(written.into_inner().unwrap_or_else(|e| e.into_inner()))
}

/// Runs workers that compress what `feed` hands out and put it into `writer` in that order.
fn encode(
    feed: impl FnMut(&mut [u8]) -> Result<Option<Range>> + Send,
    fill: impl Fn(&mut [u8], u64) -> Result<()> + Sync,
    writer: &mut dyn Writer,
    unit: usize,
    workers: usize,
    progress: &Progress,
) -> Result<()> {
    let (block_bytes, compression) = (writer.block_bytes(), writer.compression());
    // The feed numbers its ranges; the writer takes them in that order.
    let feed = Mutex::new((0u64, feed));
    let writer = Mutex::new(writer);
    let team = Team::new(0u64);
    run_team(&team, workers, |_| {
        let mut encoder = Encoder::new(compression)?;
        // One block of slack: the last one of a disk is filled up with zeros.
        let mut buf = vec![0; unit + block_bytes];
        let mut packed = vec![0; if compression == Compression::None { 0 } else { unit }];
        let mut blocks: Vec<(usize, Option<usize>)> = Vec::with_capacity(unit / block_bytes);
        while !team.stopped() {
            progress.check()?;
            let (turn, start, len) = {
                let mut feed = lock(&feed);
                let turn = feed.0;
                match (feed.1)(&mut buf[..unit])? {
                    None => break,
                    Some(Range::Zero { len, .. }) => {
                        progress.advance(len);
                        continue;
                    }
                    Some(Range::Data { start, len }) => {
                        feed.0 += 1;
                        (turn, start, len)
                    }
                }
            };
            fill(&mut buf[..len], start)?;
            let whole = len.next_multiple_of(block_bytes);
            buf[len..whole].fill(0);

            blocks.clear();
            for (i, block) in buf[..whole].chunks_exact(block_bytes).enumerate() {
                if !is_zero(block) {
                    let packed = packed.get_mut(i * block_bytes..(i + 1) * block_bytes).unwrap_or_default();
                    blocks.push((i, encoder.encode(block, packed)));
                }
            }

            if team.wait(|now| (*now == turn).then_some(())).is_none() {
                break;
            }
            let mut writer = lock(&writer);
            let first = start / block_bytes as u64;
            for &(i, compressed) in &blocks {
                let at = i * block_bytes;
                let block = match compressed {
                    Some(bytes) => Block::Packed(&packed[at..at + bytes]),
                    None => Block::Plain(&buf[at..at + block_bytes]),
                };
                progress.store(compressed.unwrap_or(block_bytes) as u64)?;
                writer.put(first + i as u64, block)?;
            }
            drop(writer);
            team.update(|now| *now += 1);
            progress.advance(len as u64);
        }
        Ok(())
    })
}

/// What the threads of one piece of work share, and whether they are to stop.
pub(crate) struct Team<T> {
    state: Mutex<TeamState<T>>,
    changed: Condvar,
}

struct TeamState<T> {
    shared: T,
    stopped: bool,
    failure: Option<Error>,
}

impl<T> Team<T> {
    pub(crate) fn new(shared: T) -> Self {
        let state = TeamState { shared, stopped: false, failure: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(crate) fn stopped(&self) -> bool {
        lock(&self.state).stopped
    }

    /// Waits until `take` finds what it looks for; `None` when the work has stopped.
    fn wait<R>(&self, take: impl Fn(&mut T) -> Option<R>) -> Option<R> {
        let mut state = lock(&self.state);
        while !state.stopped {
            if let Some(taken) = take(&mut state.shared) {
                return Some(taken);
            }
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        None
    }

    fn update(&self, change: impl FnOnce(&mut T)) {
        change(&mut lock(&self.state).shared);
        self.changed.notify_all();
    }

    /// Stops everybody; the first failure is the one that is told.
    fn stop(&self, failure: Option<Error>) {
        let mut state = lock(&self.state);
        state.stopped = true;
        if state.failure.is_none() {
            state.failure = failure;
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// Stops the team when one of it leaves by a panic, so that the others do not wait for ever.
struct StopOnUnwind<'a, T>(&'a Team<T>);

impl<T> Drop for StopOnUnwind<'_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop(None);
        }
    }
}

/// Runs `work` on so many threads, the caller's among them, each with its number; returns the first failure.
pub(crate) fn run_team<T: Send>(
    team: &Team<T>,
    threads: usize,
    work: impl Fn(usize) -> Result<()> + Sync,
) -> Result<()> {
    let run = |n| {
        let _guard = StopOnUnwind(team);
        if let Err(failure) = work(n) {
            team.stop(Some(failure));
        }
    };
    std::thread::scope(|scope| {
        for n in 1..threads {
            if let Err(e) = std::thread::Builder::new().spawn_scoped(scope, move || run(n)) {
                // Fewer would wait for each other: a team needs its writers.
                team.stop(Some(Error::io(format!("starting thread {n} of {threads}"), e)));
                break;
            }
        }
        run(0);
    });
    let failure = lock(&team.state).failure.take();
    failure.map_or(Ok(()), Err)
}

pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
