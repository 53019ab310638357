//! Progress and cancellation of one piece of long work, shared with whoever shows it.

use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

/// Counters that workers raise and a display polls; also what stops the work: a switch, and the bounds of time and output.
///
/// `done` counts work already dealt with and does not go back but by [`Progress::restart`]; `total` is zero while unknown.
#[derive(Debug, Default)]
pub struct Progress {
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    skipped_bytes: AtomicU64,
    stored_bytes: AtomicU64,
    cancelled: AtomicBool,
    phase: Mutex<&'static str>,
    bounds: OnceLock<Bounds>,
}

#[derive(Debug)]
struct Bounds {
    begun: Instant,
    wall_time_max: Duration,
    output_bytes_max: u64,
}

impl Progress {
    /// Counts from zero again, for work that is tried anew as a whole. Bounds and the switch stay.
    pub fn restart(&self) {
        for counter in [&self.done_bytes, &self.total_bytes, &self.skipped_bytes, &self.stored_bytes] {
            counter.store(0, Ordering::Relaxed);
        }
    }

    /// Begins the time that [`Limits::wall_time_max`] gives, and bounds what is stored by [`Limits::output_bytes_max`].
    /// Only the first call counts; without one there is no bound.
    pub fn bound(&self, limits: &Limits) {
        let (wall_time_max, output_bytes_max) = (limits.wall_time_max, limits.output_bytes_max);
        self.bounds.get_or_init(|| Bounds { begun: Instant::now(), wall_time_max, output_bytes_max });
    }

    /// Adds `bytes` to what is done.
    pub fn advance(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// States that so many bytes are done in all; no fewer than before.
    pub fn reach(&self, bytes: u64) {
        self.done_bytes.fetch_max(bytes, Ordering::Relaxed);
    }

    /// States that so many bytes were done by somebody else before.
    pub fn skip_to(&self, bytes: u64) {
        let before = self.done_bytes.fetch_max(bytes, Ordering::Relaxed);
        self.skipped_bytes.fetch_add(bytes.saturating_sub(before), Ordering::Relaxed);
    }

    /// Bytes of what is done that were not done here, and tell nothing of the rate.
    pub fn skipped(&self) -> u64 {
        self.skipped_bytes.load(Ordering::Relaxed)
    }

    /// States the size of the whole work, bytes.
    pub fn set_total(&self, bytes: u64) {
        self.total_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Bytes done.
    pub fn done(&self) -> u64 {
        self.done_bytes.load(Ordering::Relaxed)
    }

    /// Bytes in all; zero while unknown.
    pub fn total(&self) -> u64 {
        self.total_bytes.load(Ordering::Relaxed)
    }

    /// Adds `bytes` of data to what the target stores; fails with [`ErrorKind::Limit`] if that is too much.
    pub fn store(&self, bytes: u64) -> Result<()> {
        let stored = self.stored_bytes.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        match self.bounds.get() {
            Some(bounds) if stored > bounds.output_bytes_max => Err(Error::new(
                ErrorKind::Limit,
                format!(
                    "the target would get more than the limit of {} bytes of data; raise the limit output-bytes if the \
                     image is trusted",
                    bounds.output_bytes_max
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Counts what is read through the returned reader as stored, and stops reading as [`Progress::check`] would.
    pub fn storing<'a>(&'a self, reader: impl Read + 'a) -> impl Read + 'a {
        Storing { progress: self, reader }
    }

    /// Names the step the work is in, one lower-case word or two ("transfer", "commit").
    pub fn set_phase(&self, phase: &'static str) {
        *self.phase.lock().unwrap_or_else(|e| e.into_inner()) = phase;
    }

    /// The step the work is in; empty before the first.
    pub fn phase(&self) -> &'static str {
        *self.phase.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Asks the work to stop at its next step.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Fails with [`ErrorKind::Cancelled`] once [`Progress::cancel`] was called, and with [`ErrorKind::Limit`] once the time
    /// is over; workers ask between steps.
    pub fn check(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Cancelled, "interrupted"));
        }
        match self.bounds.get() {
            Some(bounds) if bounds.begun.elapsed() > bounds.wall_time_max => Err(Error::new(
                ErrorKind::Limit,
                format!(
                    "the work took longer than the limit of {} s; raise the limit wall-time if the image is trusted",
                    bounds.wall_time_max.as_secs_f64()
                ),
            )),
            _ => Ok(()),
        }
    }
}

struct Storing<'a, R> {
    progress: &'a Progress,
    reader: R,
}

impl<R: Read> Read for Storing<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.progress.check()?;
        let n = self.reader.read(buf)?;
        self.progress.store(n as u64)?;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_of_time_and_output_end_the_work() {
        let progress = Progress::default();
        progress.store(u64::MAX).unwrap();
        let progress = Progress::default();
        progress.bound(&Limits { output_bytes_max: 10, ..Limits::default() });
        progress.check().unwrap();
        progress.store(10).unwrap();
        assert_eq!(progress.store(1).unwrap_err().kind(), ErrorKind::Limit);

        let progress = Progress::default();
        progress.bound(&Limits { wall_time_max: Duration::ZERO, ..Limits::default() });
        assert_eq!(progress.check().unwrap_err().kind(), ErrorKind::Limit);
        assert!(progress.storing(&b"disk"[..]).read(&mut [0]).is_err());
        progress.cancel();
        assert_eq!(progress.check().unwrap_err().kind(), ErrorKind::Cancelled);
    }
}
