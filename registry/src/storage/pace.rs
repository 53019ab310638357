//! Keeps work in the background to so much per second.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a pause may last before it looks whether it is to stop; what was not used for longer is lost.
const STEP: Duration = Duration::from_millis(100);

/// A rate, in whatever units the work is counted.
#[derive(Debug)]
pub(crate) struct Pace {
    per_second: Option<u64>,
    next: Instant,
}

impl Pace {
    /// `None` is no bound.
    pub(crate) fn new(per_second: Option<u64>) -> Self {
        Self { per_second, next: Instant::now() }
    }

    /// Returns until when so many units may take, from now on.
    pub(crate) fn take(&mut self, units: u64) -> Instant {
        let now = Instant::now();
        let Some(rate) = self.per_second else { return now };
        let earliest = now.checked_sub(STEP).unwrap_or(now);
        self.next = self.next.max(earliest) + Duration::from_secs_f64(units as f64 / rate.max(1) as f64);
        self.next
    }

    /// Pauses as long as so many units may take; returns whether the work is to stop.
    pub(super) fn spend(&mut self, units: u64, stop: &AtomicBool) -> bool {
        let stopped = || stop.load(Ordering::Relaxed);
        self.take(units);
        while let Some(left) = self.next.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
        {
            if stopped() {
                break;
            }
            std::thread::sleep(left.min(STEP));
        }
        stopped()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_a_pause_ends_when_it_is_stopped() {
        let stop = AtomicBool::new(false);
        let begun = Instant::now();
        let mut pace = Pace::new(Some(1 << 20));
        for _ in 0..8 {
            assert!(!pace.spend(64 << 10, &stop));
        }
        assert!(begun.elapsed() >= Duration::from_millis(500));
        stop.store(true, Ordering::Relaxed);
        assert!(pace.spend(1 << 40, &stop));
    }
}
