//! How many connections a transfer is worth: decided from what came in each tick, without clock or network.
//!
//! ```text
//!            the reader waits for bytes          more by a clear share: kept
//!  measuring ──────────────────────────> settling ──> trying ──┬───────────> measuring
//!      ^                                                       └ else: one less, and a rest before the next trial,
//!      └────────────────────────────────────────────────────────┘ twice as long each time
//! ```
//!
//! When the rate falls, one less is tried in the same way, and kept as long as it costs nothing. While the reader is
//! what limits, nothing is tried, and connections that nobody needs are given back.

use std::time::Duration;

/// Most connections of one transfer.
pub(super) const CONNECTIONS_MAX: usize = 8;
/// Ticks over which a rate is taken.
const MEASURE_TICKS: u32 = 4;
/// Ticks that a new connection has to come up to its speed.
const SETTLE_TICKS: u32 = 2;
/// Ticks that the reader limits before a connection is given back.
const SLACK_TICKS: u32 = 20;
/// Ticks of rest after a first trial that failed; twice as many after the next.
const REST_TICKS_FIRST: u32 = 16;
const REST_TICKS_MAX: u32 = 600;
/// The share of a tick that the reader waits for bytes when it is the source that limits, percent.
const WAITING_MIN_PERCENT: u128 = 50;
/// A trial is kept that brings this share of what one more equal connection would bring, percent.
const GAIN_MIN_PERCENT: u64 = 40;
/// A rate of this share of what was good once has fallen, percent.
const FALLEN_PERCENT: u64 = 50;
/// A connection is given back that leaves this share of the rate, percent.
const LEFT_MIN_PERCENT: u64 = 95;

/// What happened in one tick.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tick {
    pub(super) elapsed: Duration,
    /// Bytes that all connections brought.
    pub(super) received: u64,
    /// How long of it the reader waited for bytes.
    pub(super) waited: Duration,
}

/// The number of connections, and why.
#[derive(Debug)]
pub(super) struct Pace {
    connections: usize,
    connections_max: usize,
    phase: Phase,
    ticks: u32,
    received: u64,
    elapsed: Duration,
    /// Bytes per second when the number was last found good.
    good: u64,
    rest: u32,
    rest_next: u32,
    slack: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Measuring,
    /// A trial begins.
    Settling(Trial),
    Trying(Trial),
}

/// A connection more or less, and the rate before, bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trial {
    More(u64),
    Less(u64),
}

impl Pace {
    pub(super) fn new(connections_max: usize) -> Self {
        Self {
            connections: 1,
            connections_max: connections_max.clamp(1, CONNECTIONS_MAX),
            phase: Phase::Measuring,
            ticks: 0,
            received: 0,
            elapsed: Duration::ZERO,
            good: 0,
            rest: 0,
            rest_next: REST_TICKS_FIRST,
            slack: 0,
        }
    }

    /// Connections that the transfer should have now.
    pub(super) fn connections(&self) -> usize {
        self.connections
    }

    /// Takes note of a tick.
    pub(super) fn tick(&mut self, tick: Tick) {
        let waits = tick.waited.as_nanos() * 100 >= tick.elapsed.as_nanos() * WAITING_MIN_PERCENT;
        if !waits {
            return self.reader_limits();
        }
        self.slack = self.slack.saturating_sub(1);
        self.rest = self.rest.saturating_sub(1);
        self.ticks += 1;
        self.received = self.received.saturating_add(tick.received);
        self.elapsed += tick.elapsed;
        match self.phase {
            Phase::Settling(trial) if self.ticks >= SETTLE_TICKS => self.enter(Phase::Trying(trial)),
            Phase::Settling(_) => {}
            _ if self.ticks < MEASURE_TICKS => {}
            Phase::Measuring => self.measured(self.rate()),
            Phase::Trying(Trial::More(before)) => self.tried_more(before, self.rate()),
            Phase::Trying(Trial::Less(before)) => self.tried_less(before, self.rate()),
        }
    }

    /// The server would not have one more: answered that it has enough, or let nobody in.
    pub(super) fn refused(&mut self) {
        self.step_back();
    }

    /// The server cannot be read by more than one connection.
    pub(super) fn only_one(&mut self) {
        (self.connections, self.connections_max) = (1, 1);
        self.enter(Phase::Measuring);
    }

    fn measured(&mut self, rate: u64) {
        if rate < percent(self.good, FALLEN_PERCENT) {
            self.good = rate;
            return self.try_less(rate);
        }
        self.good = self.good.max(rate);
        if self.rest == 0 && self.connections < self.connections_max {
            self.connections += 1;
            self.enter(Phase::Settling(Trial::More(rate)));
        } else {
            self.enter(Phase::Measuring);
        }
    }

    fn tried_more(&mut self, before: u64, rate: u64) {
        let others = (self.connections as u64).saturating_sub(1).max(1);
        if rate > before.saturating_add(percent(before, GAIN_MIN_PERCENT) / others) {
            self.good = rate;
            self.rest_next = REST_TICKS_FIRST;
            self.enter(Phase::Measuring);
        } else {
            self.good = before;
            self.step_back();
        }
    }

    fn try_less(&mut self, rate: u64) {
        if self.connections > 1 {
            self.connections -= 1;
            self.enter(Phase::Settling(Trial::Less(rate)));
        } else {
            self.enter(Phase::Measuring);
        }
    }

    fn tried_less(&mut self, before: u64, rate: u64) {
        if rate >= percent(before, LEFT_MIN_PERCENT) {
            self.good = rate;
            return self.try_less(rate);
        }
        self.good = before;
        self.connections = (self.connections + 1).min(self.connections_max);
        self.rest = REST_TICKS_FIRST;
        self.enter(Phase::Measuring);
    }

    fn step_back(&mut self) {
        self.connections = self.connections.saturating_sub(1).max(1);
        self.rest = self.rest_next;
        self.rest_next = self.rest_next.saturating_mul(2).min(REST_TICKS_MAX);
        self.enter(Phase::Measuring);
    }

    /// What came in such a tick tells nothing about the source.
    fn reader_limits(&mut self) {
        self.enter(Phase::Measuring);
        self.good = 0;
        self.slack += 1;
        if self.slack >= SLACK_TICKS {
            self.slack = 0;
            self.connections = self.connections.saturating_sub(1).max(1);
        }
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        (self.ticks, self.received, self.elapsed) = (0, 0, Duration::ZERO);
    }

    /// Bytes per second since the phase began.
    fn rate(&self) -> u64 {
        let nanos = self.elapsed.as_nanos().max(1);
        u64::try_from(u128::from(self.received) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
    }
}

fn percent(rate: u64, share: u64) -> u64 {
    rate / 100 * share
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    /// A server and a reader with limits, bytes per second.
    struct Model {
        each: u64,
        all: u64,
        reader: u64,
    }

    impl Model {
        fn tick(&self, connections: usize) -> Tick {
            let source = self.all.min(self.each * connections as u64);
            let rate = source.min(self.reader);
            // A reader that could take twice as much waits half of the time.
            let waited = 1.0 - rate as f64 / self.reader as f64;
            let elapsed = Duration::from_millis(500);
            Tick { elapsed, received: rate / 2, waited: elapsed.mul_f64(waited) }
        }

        /// The numbers of connections in each of so many ticks.
        fn run(&self, pace: &mut Pace, ticks: usize) -> Vec<usize> {
            (0..ticks)
                .map(|_| {
                    pace.tick(self.tick(pace.connections()));
                    pace.connections()
                })
                .collect()
        }
    }

    fn share(numbers: &[usize], of: impl Fn(usize) -> bool) -> f64 {
        numbers.iter().filter(|number| of(**number)).count() as f64 / numbers.len() as f64
    }

    #[test]
    fn a_server_that_limits_each_connection_gets_as_many_as_may_be() {
        let model = Model { each: 10 * MB, all: u64::MAX, reader: 1000 * MB };
        let mut pace = Pace::new(CONNECTIONS_MAX);
        let numbers = model.run(&mut pace, 100);
        assert!(numbers.windows(2).all(|pair| pair[1] <= pair[0] + 1), "{numbers:?}");
        assert_eq!(pace.connections(), CONNECTIONS_MAX);
        let mut pace = Pace::new(3);
        model.run(&mut pace, 100);
        assert_eq!(pace.connections(), 3);
    }

    #[test]
    fn a_link_that_one_connection_fills_is_left_to_one() {
        let model = Model { each: 100 * MB, all: 100 * MB, reader: 1000 * MB };
        let numbers = model.run(&mut Pace::new(CONNECTIONS_MAX), 2000);
        assert!(numbers.iter().all(|number| *number <= 2), "{numbers:?}");
        assert!(share(&numbers, |number| number > 1) < 0.05, "trials become rare");
    }

    #[test]
    fn connections_are_added_until_the_link_is_full_and_no_more() {
        let model = Model { each: 10 * MB, all: 35 * MB, reader: 1000 * MB };
        let mut pace = Pace::new(CONNECTIONS_MAX);
        model.run(&mut pace, 50);
        let numbers = model.run(&mut pace, 2000);
        assert!(share(&numbers, |number| number == 4) > 0.9, "{numbers:?}");
    }

    #[test]
    fn a_slow_reader_is_never_given_more_connections() {
        for reader in [MB, 5 * MB, 15 * MB] {
            let model = Model { each: 10 * MB, all: u64::MAX, reader };
            let numbers = model.run(&mut Pace::new(CONNECTIONS_MAX), 1000);
            assert!(numbers.iter().all(|number| *number == 1), "{reader}: {numbers:?}");
        }
    }

    #[test]
    fn what_the_reader_does_not_need_any_more_is_given_back() {
        let mut pace = Pace::new(CONNECTIONS_MAX);
        Model { each: 10 * MB, all: u64::MAX, reader: 1000 * MB }.run(&mut pace, 100);
        assert_eq!(pace.connections(), CONNECTIONS_MAX);
        Model { each: 10 * MB, all: u64::MAX, reader: 5 * MB }.run(&mut pace, 1000);
        assert_eq!(pace.connections(), 1);
    }

    #[test]
    fn a_server_that_slows_down_under_many_connections_gets_fewer() {
        let mut pace = Pace::new(CONNECTIONS_MAX);
        Model { each: 10 * MB, all: u64::MAX, reader: 1000 * MB }.run(&mut pace, 100);
        // Each connection over three costs more than it brings.
        for _ in 0..2000 {
            let n = pace.connections() as u64;
            let rate = if n <= 3 { 10 * n } else { 30 / (n - 2) } * MB;
            pace.tick(Model { each: rate, all: rate, reader: 1000 * MB }.tick(1));
        }
        assert!((2..=4).contains(&pace.connections()), "{}", pace.connections());
    }

    #[test]
    fn a_refusal_costs_one_connection_and_a_rest() {
        let model = Model { each: 10 * MB, all: u64::MAX, reader: 1000 * MB };
        let mut pace = Pace::new(CONNECTIONS_MAX);
        // A server that lets in two.
        let mut refusals = 0;
        for _ in 0..1000 {
            pace.tick(model.tick(pace.connections().min(2)));
            if pace.connections() > 2 {
                pace.refused();
                refusals += 1;
            }
        }
        assert_eq!(pace.connections(), 2);
        assert!(refusals < 10, "{refusals}");
        pace.only_one();
        model.run(&mut pace, 100);
        assert_eq!(pace.connections(), 1);
        pace.refused();
        assert_eq!(pace.connections(), 1, "the last one stays");
    }
}
