//! An image published over HTTP: read from front to back, continued where a connection broke, and by more connections
//! where that brings more.
//!
//! ```text
//!  requester ──> answer ──> segment ─┐            one connection reads to the end; where another one helps, it begins
//!  requester ──> answer ──> segment ─┼─> chunk()  ahead of the first, which then stops there, and from there on
//!  requester ──> answer ──> segment ─┘            every connection takes the next piece of the same size
//! ```
//!
//! `pace` decides how many connections there are, `segment` keeps what came too early, `request` asks. Whatever happens
//! to the connections, the bytes come out in order, each once, or an error does.

mod options;
mod pace;
mod request;
mod segment;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{ACCEPT_RANGES, CONTENT_TYPE};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use self::pace::{CONNECTIONS_MAX, Pace, Tick};
use self::request::{Answer, Failure, Part, RETRY_AFTER_MS_MAX, Requester, Version, text, version};
use self::segment::{End, Segment, Traffic};
use super::{Place, SourceOptions};
use crate::{Error, ErrorKind, Result};

pub use options::HttpOptions;
pub(crate) use request::shown;

/// Attempts in a row that bring no byte before a transfer that has not begun is given up, and one that has.
const OPENING_ATTEMPTS_MAX: u32 = 6;
const ATTEMPTS_MAX: u32 = 10;
/// Wait before the second attempt; it doubles from one to the next, up to the longest.
const BACKOFF_FIRST_MS: u64 = 250;
const BACKOFF_MS_MAX: u64 = 15_000;
/// Segments at a time, each with at most [`Tuning::segment_bytes`] in memory: 64 MiB in all.
const SEGMENTS_MAX: usize = 16;

/// How a transfer is cut; tests cut smaller.
#[derive(Clone, Copy, Debug)]
struct Tuning {
    /// Bytes of a piece that one connection fetches, and that a segment keeps in memory at most.
    segment_bytes: u64,
    /// How far ahead of a connection that reads to the end a second one begins, bytes: so far that the first is not
    /// there yet when the second is answered.
    ahead_bytes: u64,
    /// How often the number of connections is thought over.
    tick: Duration,
    connections_max: usize,
    /// Wait before the second attempt.
    backoff_first: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            segment_bytes: 4 << 20,
            ahead_bytes: 16 << 20,
            tick: Duration::from_millis(500),
            connections_max: CONNECTIONS_MAX,
            backoff_first: Duration::from_millis(BACKOFF_FIRST_MS),
        }
    }
}

/// An HTTP source opened for reading.
pub struct HttpSource {
    requester: Arc<Requester>,
    tuning: Tuning,
    /// Length in bytes, if the server told it.
    pub len: Option<u64>,
    /// Last path segment of the URL, percent-decoded; not yet fit for a file name.
    pub name: Option<String>,
    /// The body claims to be a web page.
    pub is_html: bool,
    /// Without one, or without ranges, a broken transfer cannot be continued safely.
    version: Option<Version>,
    ranges: bool,
    /// In the order of their bytes; the first is being delivered.
    segments: VecDeque<Segment>,
    tasks: JoinSet<(u64, Event)>,
    /// A second connection is being tried beside the first, from this byte on.
    probe: Option<u64>,
    pace: Pace,
    traffic: Arc<Traffic>,
    /// Where the next segment begins.
    next: u64,
    /// Bytes delivered, with those before the place where the source was opened.
    position: u64,
    attempts: u32,
    received_at_failure: u64,
    not_before: Option<Instant>,
    watch: Watch,
}

/// What the current tick has seen.
struct Watch {
    begun: Instant,
    received: u64,
    waited: Duration,
    waiting_since: Option<Instant>,
}

/// What a task ends with.
enum Event {
    /// A segment's bytes ended.
    Ended(End),
    /// A segment was asked for in vain.
    Failed(Failure),
    /// The second connection has its answer, or none.
    Probed(Result<Answer, Failure>),
}

impl HttpSource {
    /// Requests `url` (http or https; `user:password@` becomes Basic authentication towards that origin alone), from its
    /// first byte or from a place in a version of it that was open before.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] when the server cannot be reached, redirects without end, or answers anything but 200;
    /// [`ErrorKind::Policy`] when the policy does not allow where it is; [`ErrorKind::Changed`] when what is there now
    /// is another version, or cannot be read from that place.
    pub(crate) async fn open(url: &str, options: &SourceOptions, at: Option<&Place>) -> Result<Self> {
        Self::open_tuned(url, options, at, Tuning::default()).await
    }

    async fn open_tuned(
        url: &str,
        options: &SourceOptions,
        at: Option<&Place>,
        tuning: Tuning,
    ) -> Result<Self> {
        let requester = Arc::new(Requester::new(url, options)?);
        let mut part = None;
        if let Some(at) = at.filter(|at| at.position > 0) {
            let version = at
                .validator
                .split_once(' ')
                .and_then(|(len, tag)| Some(Version { len: len.parse().ok()?, tag: tag.to_owned() }));
            let Some(version) = version.filter(|version| at.position <= version.len) else {
                return Err(requester.changed(at.position));
            };
            // A range behind the last byte is none: its own byte is asked for, and passed over.
            part = Some(Part { from: at.position.min(version.len - 1), to: None, version });
        }
        let from = part.as_ref().map_or(0, |part| part.from);
        let mut source = Self {
            name: requester.name(),
            requester,
            tuning,
            len: None,
            is_html: false,
            version: None,
            ranges: false,
            segments: VecDeque::new(),
            tasks: JoinSet::new(),
            probe: None,
            pace: Pace::new(tuning.connections_max),
            traffic: Arc::default(),
            next: from,
            position: from,
            attempts: 0,
            received_at_failure: 0,
            not_before: None,
            watch: Watch { begun: Instant::now(), received: 0, waited: Duration::ZERO, waiting_since: None },
        };
        let answer = loop {
            match source.requester.get(part.as_ref()).await {
                Ok(answer) => break answer,
                Err(Failure::Passing(error, wait)) => {
                    source.back_off(error, wait, OPENING_ATTEMPTS_MAX)?;
                    source.rest().await;
                }
                Err(failure) => return Err(failure.into_error()),
            }
        };
        let headers = answer.response.headers();
        source.is_html = text(headers, CONTENT_TYPE).is_some_and(|kind| kind.starts_with("text/html"));
        match part {
            Some(part) => {
                (source.len, source.version, source.ranges) =
                    (Some(part.version.len), Some(part.version), true);
            }
            None => {
                source.len = answer.end;
                source.version = version(headers);
                source.ranges =
                    text(headers, ACCEPT_RANGES).is_some_and(|units| units.eq_ignore_ascii_case("bytes"));
            }
        }
        let changed = at.is_some_and(|at| Some(&at.validator) != source.version().as_ref());
        if changed {
            return Err(source.requester.changed(source.position));
        }
        source.add_segment(source.len);
        source.read(0, answer);
        if at.is_some_and(|at| at.position > from) {
            source.chunk().await?;
        }
        Ok(source)
    }

    /// Names this version of the resource, if it can be read on from the middle.
    pub fn version(&self) -> Option<String> {
        let Version { len, tag } = self.resumable()?;
        Some(format!("{len} {tag}"))
    }

    /// Tells this version of the resource from others, whether it can be read on from the middle or not.
    pub fn fingerprint(&self) -> Option<String> {
        let Version { len, tag } = self.version.as_ref()?;
        Some(format!("{len} {tag}"))
    }

    /// The URL without credentials and query, fit for messages.
    pub fn display_url(&self) -> String {
        self.requester.shown()
    }

    /// Bytes that connections brought, and those of them that were delivered: the rest came twice, or for nothing.
    pub fn traffic(&self) -> (u64, u64) {
        (self.traffic.received(), self.traffic.delivered())
    }

    /// The next bytes in order; `None` at the end.
    ///
    /// What breaks is continued behind the last byte that came, as long as the server serves ranges and the resource is
    /// provably the same; a body shorter or longer than announced is an error, never an end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>> {
        self.watch.waiting_since = Some(Instant::now());
        let outcome = self.next_bytes().await;
        if let Some(since) = self.watch.waiting_since.take() {
            self.watch.waited += since.elapsed();
        }
        outcome
    }

    async fn next_bytes(&mut self) -> Result<Option<Bytes>> {
        loop {
            self.tick();
            while let Some(ended) = self.tasks.try_join_next() {
                self.ended(ended)?;
            }
            while self.segments.front().is_some_and(Segment::is_delivered) {
                self.segments.pop_front();
            }
            if self.segments.is_empty() && self.len.is_none_or(|len| self.next >= len) {
                let (received, delivered) = self.traffic();
                tracing::debug!(received, delivered, "source: read to its end");
                return Ok(None);
            }
            self.start();
            let wake = self.wake();
            let front = self.segments.front_mut();
            let bytes = async {
                match front {
                    Some(front) => front.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                Some(bytes) = bytes => {
                    self.position = self.position.saturating_add(bytes.len() as u64);
                    self.traffic.deliver(bytes.len() as u64);
                    return Ok(Some(bytes));
                }
                Some(ended) = self.tasks.join_next() => self.ended(ended)?,
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// Gives work to as many connections as there should be.
    fn start(&mut self) {
        if self.not_before.is_some_and(|instant| instant > Instant::now()) {
            return;
        }
        self.not_before = None;
        // A task is a connection.
        let mut free = self.pace.connections().saturating_sub(self.tasks.len());
        for n in 0..self.segments.len() {
            if free == 0 {
                return;
            }
            if self.segments[n].wants_reading() {
                free -= 1;
                self.request(n);
            }
        }
        let Some(len) = self.len else { return };
        if free > 0 && self.next >= len && self.segments.len() < SEGMENTS_MAX {
            return self.probe();
        }
        while free > 0 && self.next < len && self.segments.len() < SEGMENTS_MAX {
            free -= 1;
            // The only one reads on as long as it is the only one.
            let alone = self.pace.connections() == 1;
            let end = if alone { len } else { len.min(self.next.saturating_add(self.tuning.segment_bytes)) };
            self.add_segment(Some(end));
            self.request(self.segments.len() - 1);
        }
    }

    /// Tries a second connection, ahead of the one that reads to the end.
    fn probe(&mut self) {
        let (Some(version), None, Some(last)) = (self.resumable(), self.probe, self.segments.back()) else {
            return;
        };
        let begin = last.received_to().saturating_add(self.tuning.ahead_bytes);
        let end = begin.saturating_add(self.tuning.segment_bytes);
        if end > version.len || !last.is_open(version.len) {
            return;
        }
        let part = Part { from: begin, to: Some(end), version: version.clone() };
        let requester = Arc::clone(&self.requester);
        self.probe = Some(begin);
        self.tasks.spawn(async move { (0, Event::Probed(requester.get(Some(&part)).await)) });
    }

    /// Asks for what a segment lacks.
    fn request(&mut self, n: usize) {
        let (Some(version), Some(segment)) = (self.resumable().cloned(), self.segments.get_mut(n)) else {
            return;
        };
        let (id, queue) = segment.begin_reading();
        let (from, end) = queue.span();
        let to = end.filter(|end| *end < version.len);
        let (requester, traffic) = (Arc::clone(&self.requester), Arc::clone(&self.traffic));
        self.tasks.spawn(async move {
            let answer = match requester.get(Some(&Part { from, to, version })).await {
                Ok(answer) => answer,
                Err(failure) => return (id, Event::Failed(failure)),
            };
            (id, Event::Ended(segment::read(answer, queue, traffic).await))
        });
    }

    /// Reads an answer into a segment.
    fn read(&mut self, n: usize, answer: Answer) {
        let Some(segment) = self.segments.get_mut(n) else { return };
        let (id, queue) = segment.begin_reading();
        let traffic = Arc::clone(&self.traffic);
        self.tasks.spawn(async move { (id, Event::Ended(segment::read(answer, queue, traffic).await)) });
    }

    fn ended(&mut self, task: Result<(u64, Event), JoinError>) -> Result<()> {
        let (id, event) =
            task.map_err(|e| Error::with(ErrorKind::Source, "a reading task ended early", e))?;
        let segment = self.segments.iter_mut().find(|segment| segment.id() == id);
        match event {
            Event::Probed(outcome) => {
                self.probed(outcome);
                Ok(())
            }
            Event::Ended(end) => {
                if let Some(segment) = segment {
                    segment.end_reading();
                }
                match end {
                    End::Complete => Ok(()),
                    End::TooLong => {
                        let text = format!("{} sends more bytes than it announced", self.display_url());
                        Err(Error::new(ErrorKind::Source, text))
                    }
                    End::Broken(position, cause) => self.broken(position, cause),
                }
            }
            Event::Failed(failure) => {
                if let Some(segment) = segment {
                    segment.end_reading();
                }
                match failure {
                    Failure::Passing(error, wait) => {
                        self.pace.refused();
                        self.back_off(error, wait, ATTEMPTS_MAX)
                    }
                    failure => Err(failure.into_error()),
                }
            }
        }
    }

    /// The second connection was answered: from there on the first one stops, if it is not already behind that.
    fn probed(&mut self, outcome: Result<Answer, Failure>) {
        let Some(begin) = self.probe.take() else { return };
        match outcome {
            Ok(answer) => {
                let Some(end) = answer.end else { return };
                if self.segments.back().is_some_and(|last| last.cut(begin)) {
                    self.next = begin;
                    self.add_segment(Some(end));
                    self.read(self.segments.len() - 1, answer);
                } else {
                    self.tuning.ahead_bytes = self.tuning.ahead_bytes.saturating_mul(2);
                }
            }
            Err(Failure::Passing(error, _)) => {
                tracing::debug!(%error, "source: no second connection for now");
                self.pace.refused();
            }
            Err(failure) => {
                let error = failure.into_error();
                tracing::debug!(%error, "source: one connection and no more");
                self.pace.only_one();
            }
        }
    }

    /// A body ended before its end.
    fn broken(&mut self, position: u64, cause: Option<reqwest::Error>) -> Result<()> {
        let shown = self.display_url();
        let len = self.len.map_or_else(|| "more".to_owned(), |len| len.to_string());
        let text = format!("{shown} broke off after {position} bytes, its length was announced as {len}");
        let error = match cause {
            Some(cause) => Error::with(ErrorKind::Source, text, cause.without_url()),
            None => Error::new(ErrorKind::Source, text),
        };
        match self.resumable() {
            Some(_) => self.back_off(error, None, ATTEMPTS_MAX),
            None => Err(error),
        }
    }

    /// Lets nothing begin for a while, or gives up with `error` when too many attempts brought no byte.
    fn back_off(&mut self, error: Error, wanted: Option<Duration>, attempts_max: u32) -> Result<()> {
        if wanted.is_some_and(|wait| wait > Duration::from_millis(RETRY_AFTER_MS_MAX)) {
            if self.tasks.is_empty() {
                return Err(error.passing());
            }
            // Those that were let in may finish.
            self.pace.only_one();
            return Ok(());
        }
        let received = self.traffic.received();
        if received > self.received_at_failure {
            (self.attempts, self.received_at_failure) = (0, received);
        }
        self.attempts += 1;
        if self.attempts >= attempts_max {
            return Err(error.passing());
        }
        let doubled = self.tuning.backoff_first.saturating_mul(1 << (self.attempts - 1).min(16));
        let doubled = doubled.min(Duration::from_millis(BACKOFF_MS_MAX));
        let wait = wanted.unwrap_or(doubled);
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let cause = &error as &(dyn std::error::Error + 'static);
        tracing::warn!(attempt = self.attempts, wait_ms, error = cause, "source: trying again");
        self.not_before = Some(Instant::now() + wait);
        Ok(())
    }

    async fn rest(&mut self) {
        if let Some(instant) = self.not_before.take() {
            tokio::time::sleep_until(instant).await;
        }
    }

    fn tick(&mut self) {
        let (now, watch) = (Instant::now(), &mut self.watch);
        let elapsed = now.duration_since(watch.begun);
        if elapsed < self.tuning.tick {
            return;
        }
        if let Some(since) = watch.waiting_since.replace(now) {
            watch.waited += now.duration_since(since);
        }
        let received = self.traffic.received();
        self.pace.tick(Tick { elapsed, received: received - watch.received, waited: watch.waited });
        *watch = Watch { begun: now, received, waited: Duration::ZERO, waiting_since: Some(now) };
    }

    /// When there is something to do even if nothing comes.
    fn wake(&self) -> Instant {
        let tick = self.watch.begun + self.tuning.tick;
        self.not_before.map_or(tick, |instant| instant.min(tick))
    }

    fn add_segment(&mut self, end: Option<u64>) {
        let segment = Segment::new(self.next, end, self.tuning.segment_bytes);
        self.segments.push_back(segment);
        self.next = end.unwrap_or(u64::MAX);
    }

    fn resumable(&self) -> Option<&Version> {
        self.version.as_ref().filter(|_| self.ranges)
    }
}
