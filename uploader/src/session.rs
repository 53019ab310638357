//! One upload: who sends at the moment, how far it is, and what became of it.
//!
//! ```text
//!   begin ──> [ seat free ] <──> [ somebody sends ] ── all is in ──> [ storing ] ──> verdict
//!                  └── idle, ended, started over ──> discarded          (a failed import is one at any time)
//! ```
//!
//! Requests come and go while the import reads on: one that breaks leaves the seat to the next. Whoever knows the upload's
//! id takes the seat from a request that has not noticed yet that its client is gone.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use dvcr_converter::progress::Progress;
use dvcr_importer::source::feed::{FeedWriter, Refused};
use dvcr_importer::{Error, ErrorKind, ImportSummary};
use http::HeaderValue;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::body::Incoming;

/// Longest time in which a request brings less than [`BODY_PROGRESS_BYTES_MIN`], after which it gives up the seat.
const BODY_IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// What a body has to bring in that time, bytes, unless it ends before.
const BODY_PROGRESS_BYTES_MIN: u64 = 16 << 10;

/// What became of an upload.
pub(crate) type Verdict = Result<Arc<ImportSummary>, Arc<Error>>;

/// What is known of an upload when it begins.
#[derive(Clone, Debug)]
pub(crate) struct New {
    pub(crate) id: String,
    /// Bytes in all, if known.
    pub(crate) len: Option<u64>,
    /// What the image calls itself.
    pub(crate) name: Option<String>,
    /// `Upload-Metadata`, as it came.
    pub(crate) metadata: Option<HeaderValue>,
    /// Its client means to come back after a break.
    pub(crate) resumable: bool,
}

pub(crate) struct Session {
    pub(crate) id: String,
    pub(crate) name: Option<String>,
    pub(crate) metadata: Option<HeaderValue>,
    pub(crate) begun: DateTime<Utc>,
    /// Of its import.
    pub(crate) progress: Arc<Progress>,
    /// Its client means to come back after a break.
    pub(crate) resumable: AtomicBool,
    /// Nobody wants to know what becomes of it.
    pub(crate) discarded: AtomicBool,
    /// All bytes are in.
    ended: AtomicBool,
    len: Mutex<Option<u64>>,
    /// Position of the first byte that has not come.
    received: AtomicU64,
    /// Where bytes go; `None` once all are in.
    intake: tokio::sync::Mutex<Option<FeedWriter>>,
    /// Whose turn it is: whoever raises it displaces those before.
    turn: watch::Sender<u64>,
    touched: Mutex<Instant>,
    /// Longest time in which a request brings next to nothing.
    patience: Duration,
    verdict: watch::Receiver<Option<Verdict>>,
}

/// How a body ended.
#[derive(Debug)]
pub(crate) enum Poured {
    /// All of it is in.
    All,
    /// It broke off, or was damaged.
    Broke(String),
    /// It is longer than announced; what is too much was not taken.
    TooLong,
    /// Another request of the same upload took the seat.
    Displaced,
    /// The import has ended, and takes no more.
    Concluded,
}

impl Session {
    pub(crate) fn new(
        new: New,
        feed: FeedWriter,
        progress: Arc<Progress>,
        verdict: watch::Receiver<Option<Verdict>>,
        idle_timeout: Duration,
    ) -> Self {
        Self {
            progress,
            id: new.id,
            name: new.name,
            metadata: new.metadata,
            begun: Utc::now(),
            resumable: AtomicBool::new(new.resumable),
            discarded: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            len: Mutex::new(new.len),
            received: AtomicU64::new(0),
            intake: tokio::sync::Mutex::new(Some(feed)),
            turn: watch::channel(0).0,
            touched: Mutex::new(Instant::now()),
            patience: idle_timeout.min(BODY_IDLE_TIMEOUT),
            verdict,
        }
    }

    pub(crate) fn len(&self) -> Option<u64> {
        *lock(&self.len)
    }

    /// States the length; false if another is known, or more has come already.
    pub(crate) fn set_len(&self, stated: u64) -> bool {
        let mut len = lock(&self.len);
        if len.is_some_and(|len| len != stated) || stated < self.received() {
            return false;
        }
        *len = Some(stated);
        true
    }

    /// Bytes that have come.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// The position that its client goes on at. The last byte counts only when the image is durable: a client that asks, or
    /// sends it once more, waits for the verdict.
    pub(crate) fn offset(&self) -> u64 {
        match self.verdict.borrow().as_ref() {
            Some(Ok(_)) => self.received(),
            _ if self.len() == Some(self.received()) => self.received().saturating_sub(1),
            _ => self.received(),
        }
    }

    /// Whether all bytes are in, and the image is being stored.
    pub(crate) fn is_storing(&self) -> bool {
        self.ended.load(Ordering::SeqCst) && self.concluded().is_none()
    }

    /// Whether as much has come as was announced.
    pub(crate) fn is_whole(&self) -> bool {
        self.len() == Some(self.received())
    }

    /// Tells the import that all bytes are in, if the request that brought the last of them was lost before it could.
    pub(crate) async fn settle(&self) {
        if self.is_whole() && !self.ended.load(Ordering::SeqCst) {
            let seat = self.take().await;
            if self.is_whole() {
                seat.finish();
            }
        }
    }

    pub(crate) fn concluded(&self) -> Option<Verdict> {
        self.verdict.borrow().clone()
    }

    /// Waits for what becomes of it.
    pub(crate) async fn verdict(&self) -> Verdict {
        let mut verdict = self.verdict.clone();
        let given = verdict.wait_for(Option::is_some).await.map(|given| given.clone());
        match given {
            Ok(Some(verdict)) => verdict,
            _ => Err(Arc::new(Error::new(ErrorKind::Cancelled, "the uploader ends"))),
        }
    }

    /// How long nothing has come, and nobody has asked; `None` while somebody sends, or the image is being stored.
    pub(crate) fn idle(&self) -> Option<Duration> {
        let intake = self.intake.try_lock().ok()?;
        intake.as_ref().map(|_| lock(&self.touched).elapsed())
    }

    pub(crate) fn touch(&self) {
        *lock(&self.touched) = Instant::now();
    }

    /// Whether a request has the seat.
    pub(crate) fn is_taken(&self) -> bool {
        self.intake.try_lock().is_err()
    }

    /// Takes the seat if it is free.
    pub(crate) fn try_take(&self) -> Option<Seat<'_>> {
        let intake = self.intake.try_lock().ok()?;
        let turn = self.turn.subscribe();
        let mine = *turn.borrow();
        Some(Seat { session: self, intake, turn, mine })
    }

    /// Takes the seat from whoever has it.
    pub(crate) async fn take(&self) -> Seat<'_> {
        let mut mine = 0;
        self.turn.send_modify(|turn| {
            *turn += 1;
            mine = *turn;
        });
        let turn = self.turn.subscribe();
        let intake = self.intake.lock().await;
        Seat { session: self, intake, turn, mine }
    }

    /// Makes the import fail, unless all bytes are in.
    pub(crate) async fn fail(&self, why: Error) {
        let feed = self.take().await.release();
        if let Some(feed) = feed {
            feed.fail(why).await;
        }
    }
}

/// The right to send, and where the bytes go.
pub(crate) struct Seat<'a> {
    pub(crate) session: &'a Session,
    intake: tokio::sync::MutexGuard<'a, Option<FeedWriter>>,
    turn: watch::Receiver<u64>,
    mine: u64,
}

impl Seat<'_> {
    /// Gives up the end that bytes are put in, if not all are in.
    pub(crate) fn release(&mut self) -> Option<FeedWriter> {
        self.intake.take()
    }

    /// Waits until the import has begun, and tells where.
    pub(crate) async fn begin(&mut self) -> Result<u64, Refused> {
        let feed = self.intake.as_mut().ok_or(Refused)?;
        let position = feed.begin().await?;
        self.session.received.store(position, Ordering::Relaxed);
        Ok(position)
    }

    /// Hands the bytes of a body to the import; at most up to position `end`, if there is one.
    pub(crate) async fn pour(&mut self, incoming: &mut Incoming, end: Option<u64>) -> Poured {
        let session = self.session;
        session.touch();
        let mine = self.mine;
        let mut verdict = session.verdict.clone();
        let displaced = self.turn.wait_for(|turn| *turn != mine);
        let concluded = verdict.wait_for(Option::is_some);
        let Some(feed) = self.intake.as_mut() else { return Poured::Concluded };
        let limit = session.patience;
        let pouring = async {
            let (mut until, mut came) = (Instant::now() + limit, 0_u64);
            loop {
                // What kept us from asking is not the client's fault.
                if came >= BODY_PROGRESS_BYTES_MIN || until <= Instant::now() {
                    (until, came) = (Instant::now() + limit, 0);
                }
                let piece = match timeout_at(until, incoming.next()).await {
                    Ok(Some(Ok(piece))) => piece,
                    Ok(None) => return Poured::All,
                    Ok(Some(Err(error))) => return Poured::Broke(chain(&error)),
                    Err(_) => {
                        let (bytes, seconds) = (BODY_PROGRESS_BYTES_MIN, limit.as_secs_f32());
                        return Poured::Broke(format!("less than {bytes} bytes came in {seconds} s"));
                    }
                };
                if piece.is_empty() {
                    continue;
                }
                came = came.saturating_add(piece.len() as u64);
                let behind = feed.position().saturating_add(piece.len() as u64);
                if end.is_some_and(|end| behind > end) {
                    return Poured::TooLong;
                }
                if let Err(Refused) = send(session, feed, piece).await {
                    return Poured::Concluded;
                }
            }
        };
        tokio::select! {
            // An import that has ended takes the seat as well: then its verdict is there.
            biased;
            _ = concluded => Poured::Concluded,
            _ = displaced => Poured::Displaced,
            poured = pouring => poured,
        }
    }

    /// Tells the import that all bytes are in. Without an announced length, what has come is it.
    pub(crate) fn finish(mut self) {
        self.session.set_len(self.session.received());
        if let Some(feed) = self.intake.take() {
            self.session.ended.store(true, Ordering::SeqCst);
            // A task of its own: it is not stopped where the request is. An import that has ended has its verdict.
            tokio::spawn(feed.end());
        }
    }
}

async fn send(session: &Session, feed: &mut FeedWriter, piece: Bytes) -> Result<(), Refused> {
    feed.send(piece).await?;
    session.received.store(feed.position(), Ordering::Relaxed);
    session.touch();
    Ok(())
}

/// An error with its causes in one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
