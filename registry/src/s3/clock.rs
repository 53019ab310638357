//! What time it is at the server.
//!
//! Each answer has a `Date`, cut to the second: when the server wrote it, between the moment its request left and the moment
//! it came, its clock was in that second. So each answer bounds the difference between the server's clock and one of ours;
//! the bounds of many answers together are much narrower than a second.
//!
//! Ours is the one that counts from the start of the machine, also while it is suspended: nobody sets it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_smithy_async::time::TimeSource;
use rustix::time::{ClockId, clock_gettime};

/// What two clocks drift apart at most, millionths: each may be pushed by 500 while it is set by NTP.
const DRIFT_PPM_MAX: i64 = 1000;
const MICROS: i64 = 1_000_000;

/// The server's clock, by what its answers told.
#[derive(Debug, Default)]
pub(super) struct Clock(Mutex<Option<Bounds>>);

/// The server's time: no earlier than one, and no later than the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ServerTime {
    pub earliest: SystemTime,
    pub latest: SystemTime,
}

/// What the server's clock is ahead of ours, microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bounds {
    /// Our time when they were right.
    at: Moment,
    least: i64,
    most: i64,
}

/// Microseconds since the machine started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(i64);

impl Moment {
    pub(super) fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        Self(now.tv_sec.saturating_mul(MICROS).saturating_add(now.tv_nsec / 1000))
    }
}

impl Clock {
    /// Takes note of an answer: its `Date` in seconds since 1970, and when its request left and it came.
    pub(super) fn note(&self, date: i64, sent: Moment, received: Moment) {
        let date = date.saturating_mul(MICROS);
        let told = Bounds {
            at: received,
            least: date.saturating_sub(received.0),
            most: date.saturating_add(MICROS).saturating_sub(sent.0),
        };
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Some(known.map_or(told, |known| known.and(told)));
    }

    /// Returns the server's time; `None` before the first answer.
    pub(super) fn now(&self) -> Option<ServerTime> {
        let now = Moment::now();
        let known = (*self.0.lock().unwrap_or_else(PoisonError::into_inner))?.later(now);
        Some(ServerTime {
            earliest: at(now.0.saturating_add(known.least)),
            latest: at(now.0.saturating_add(known.most)),
        })
    }
}

/// Requests are signed by the server's clock as soon as it is known, so that a wrong one of this machine does no harm.
impl TimeSource for Clock {
    fn now(&self) -> SystemTime {
        Self::now(self).map_or_else(SystemTime::now, |time| time.earliest)
    }
}

impl Bounds {
    /// What they are at a later moment.
    fn later(self, at: Moment) -> Self {
        let passed = at.0.saturating_sub(self.at.0).max(0);
        let drift = passed.saturating_mul(DRIFT_PPM_MAX) / MICROS;
        Self { at, least: self.least.saturating_sub(drift), most: self.most.saturating_add(drift) }
    }

    /// What both say together.
    fn and(self, told: Self) -> Self {
        let at = self.at.max(told.at);
        let (known, told) = (self.later(at), told.later(at));
        let both = Self { at, least: known.least.max(told.least), most: known.most.min(told.most) };
        if both.least <= both.most {
            return both;
        }
        // The clock was set, or several servers with different clocks answer: each of them may be the next.
        let either = Self { at, least: known.least.min(told.least), most: known.most.max(told.most) };
        let apart_ms = (both.least - both.most) / 1000;
        tracing::warn!(apart_ms, "the answers of the store disagree about the time");
        either
    }
}

/// A time in microseconds since 1970.
fn at(micros: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DATE: i64 = 1_800_000_000;

    #[test]
    fn nothing_is_said_before_the_first_answer_and_little_after_it() {
        let clock = Clock::default();
        assert_eq!(clock.now(), None);
        let now = Moment::now();
        clock.note(DATE, now, now);
        let time = clock.now().unwrap();
        assert!(time.earliest >= at(DATE * MICROS) && time.latest >= at((DATE + 1) * MICROS));
        assert!(time.latest.duration_since(time.earliest).unwrap() < Duration::from_millis(1100));
    }

    #[test]
    fn a_clock_that_was_set_is_believed_with_the_second_answer() {
        let bounds = |date: i64, ours: i64| Bounds {
            at: Moment(ours),
            least: date * MICROS - ours,
            most: (date + 1) * MICROS - ours,
        };
        let known = bounds(DATE, 0).and(bounds(DATE - 3600, MICROS));
        assert!(known.most - known.least > 3600 * MICROS, "both may be true: {known:?}");
        let known = known.and(bounds(DATE - 3599, 2 * MICROS));
        assert!(known.most - known.least < 2 * MICROS, "{known:?}");
    }

    proptest! {
        #[test]
        fn the_bounds_always_hold_the_truth(
            ahead in 0_i64..1 << 50,
            steps in prop::collection::vec((1_i64..5_000_000, 0_i64..2_000_000, 0_i64..2_000_000, -900_i64..900), 1..50),
        ) {
            let (mut ours, mut theirs) = (1_i64, 1 + ahead);
            let mut known: Option<Bounds> = None;
            for (rest, there, back, ppm) in steps {
                let walk = |micros: i64| (micros, micros + micros * ppm / MICROS);
                for part in [rest, there] {
                    let (our_part, their_part) = walk(part);
                    ours += our_part;
                    theirs += their_part;
                }
                let (sent, date) = (ours - there, theirs / MICROS);
                let (our_part, their_part) = walk(back);
                ours += our_part;
                theirs += their_part;
                let date = date * MICROS;
                let told = Bounds { at: Moment(ours), least: date - ours, most: date + MICROS - sent };
                // The drift while the request was under way is no more than a thousandth of it.
                let told = Bounds { least: told.least - 4000, most: told.most + 4000, ..told };
                known = Some(known.map_or(told, |known| known.and(told)));
                let Bounds { least, most, .. } = known.unwrap();
                prop_assert!(least <= theirs - ours && theirs - ours <= most);
            }
        }
    }
}
