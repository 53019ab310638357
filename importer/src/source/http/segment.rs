//! A part of the source: what one connection after another reads into it, and what is taken out of it in order.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::request::Answer;

/// Bytes that came, and those that were passed on.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    received: AtomicU64,
    delivered: AtomicU64,
}

impl Traffic {
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    pub(super) fn delivered(&self) -> u64 {
        self.delivered.load(Ordering::Relaxed)
    }

    pub(super) fn deliver(&self, bytes: u64) {
        self.delivered.fetch_add(bytes, Ordering::Relaxed);
    }

    fn receive(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// How the reading of an answer ended.
#[derive(Debug)]
pub(super) enum End {
    /// At the segment's end.
    Complete,
    /// Behind the end that the answer announced.
    TooLong,
    /// Before it, at this byte.
    Broken(u64, Option<reqwest::Error>),
}

/// The side of a segment that is written to. What waits in it is bounded by its room.
pub(super) struct Queue {
    span: Mutex<Span>,
    sender: UnboundedSender<(Bytes, OwnedSemaphorePermit)>,
    room: Arc<Semaphore>,
    room_bytes: u32,
}

/// Where the next byte goes, and before which byte the segment ends, if that is known.
struct Span {
    position: u64,
    end: Option<u64>,
}

impl Queue {
    pub(super) fn span(&self) -> (u64, Option<u64>) {
        let span = self.lock();
        (span.position, span.end)
    }

    fn lock(&self) -> MutexGuard<'_, Span> {
        self.span.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what belongs to the segment; false at its end.
    async fn push(&self, mut bytes: Bytes) -> bool {
        let wanted = u32::try_from(bytes.len()).unwrap_or(u32::MAX).min(self.room_bytes);
        // Never closed; without room there is nobody who reads.
        let Ok(permit) = Arc::clone(&self.room).acquire_many_owned(wanted).await else { return false };
        let mut span = self.lock();
        if let Some(end) = span.end {
            let left = usize::try_from(end.saturating_sub(span.position)).unwrap_or(usize::MAX);
            bytes.truncate(left);
        }
        span.position = span.position.saturating_add(bytes.len() as u64);
        let goes_on = span.end != Some(span.position);
        drop(span);
        if !bytes.is_empty() {
            // A receiver that is gone took the whole source with it.
            let _ = self.sender.send((bytes, permit));
        }
        goes_on
    }

    /// Ends a segment whose end nobody told.
    fn finish(&self) {
        let mut span = self.lock();
        span.end = Some(span.position);
    }
}

/// Reads an answer into a segment, up to the end of either.
pub(super) async fn read(answer: Answer, queue: Arc<Queue>, traffic: Arc<Traffic>) -> End {
    let Answer { mut response, end: announced } = answer;
    let mut position = queue.span().0;
    loop {
        match response.chunk().await {
            Ok(Some(bytes)) => {
                traffic.receive(bytes.len() as u64);
                position = position.saturating_add(bytes.len() as u64);
                if announced.is_some_and(|end| position > end) {
                    return End::TooLong;
                }
                let goes_on = queue.push(bytes).await;
                if !goes_on && announced != Some(position) {
                    return End::Complete;
                }
            }
            Ok(None) => match (announced, queue.span()) {
                (_, (position, Some(end))) if position == end => return End::Complete,
                (None, (_, None)) => {
                    queue.finish();
                    return End::Complete;
                }
                (_, (position, _)) => return End::Broken(position, None),
            },
            Err(error) => {
                let (position, end) = queue.span();
                return match end == Some(position) {
                    true => End::Complete,
                    false => End::Broken(position, Some(error)),
                };
            }
        }
    }
}

/// The side that is read from.
pub(super) struct Segment {
    id: u64,
    queue: Arc<Queue>,
    receiver: UnboundedReceiver<(Bytes, OwnedSemaphorePermit)>,
    delivered_to: u64,
    reading: bool,
}

impl Segment {
    /// The bytes from `begin` to before `end`, of which `room_bytes` may wait to be taken.
    pub(super) fn new(begin: u64, end: Option<u64>, room_bytes: u64) -> Self {
        let (sender, receiver) = unbounded_channel();
        let room_bytes = u32::try_from(room_bytes).unwrap_or(u32::MAX).max(1);
        let room = Arc::new(Semaphore::new(room_bytes as usize));
        let span = Mutex::new(Span { position: begin, end });
        let queue = Arc::new(Queue { span, sender, room, room_bytes });
        Self { id: begin, queue, receiver, delivered_to: begin, reading: false }
    }

    /// Its first byte, which no other segment has.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn begin_reading(&mut self) -> (u64, Arc<Queue>) {
        self.reading = true;
        (self.id, Arc::clone(&self.queue))
    }

    pub(super) fn end_reading(&mut self) {
        self.reading = false;
    }

    /// Whether bytes are missing that nobody reads.
    pub(super) fn wants_reading(&self) -> bool {
        let (position, end) = self.queue.span();
        !self.reading && end != Some(position)
    }

    pub(super) fn is_delivered(&self) -> bool {
        self.queue.span().1 == Some(self.delivered_to)
    }

    pub(super) fn received_to(&self) -> u64 {
        self.queue.span().0
    }

    /// Whether it is being read to the end of the whole.
    pub(super) fn is_open(&self, len: u64) -> bool {
        self.reading && self.queue.span().1 == Some(len)
    }

    /// Lets it end before `end`, unless it is already behind that.
    pub(super) fn cut(&self, end: u64) -> bool {
        let mut span = self.queue.lock();
        let possible = span.position < end && span.end.is_some_and(|old| end < old);
        if possible {
            span.end = Some(end);
        }
        possible
    }

    /// The next bytes; waits for them. `None` never comes while the segment is there.
    pub(super) async fn next(&mut self) -> Option<Bytes> {
        let (bytes, _room) = self.receiver.recv().await?;
        self.delivered_to = self.delivered_to.saturating_add(bytes.len() as u64);
        Some(bytes)
    }
}
