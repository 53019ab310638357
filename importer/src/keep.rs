//! What is kept of a source while it is decoded or encoded on the way, so that another process need not read it again.
//!
//! ```text
//!  source     |── from ──|── piece ──|── piece ──|── chunk ──|─ on its way ─|
//!                 |           |           |           └ tee: copies what is received
//!                 |           └───────────┴ blobs in the destination's repository, listed by the note of the import's session
//!                 └ came so quickly that it is read again
//!
//!  next one   |─ source ─|────── pieces, verified ───|── source, kept from here on ──────────────>  decoder, encoder
//! ```
//!
//! Nothing goes on with what a decoder and an encoder have in their memory, so the next import decodes all bytes again, most of
//! them read back from the registry, which is near. Keeping begins when reading the rest is expected to take long
//! ([`ImportRequest::keep_after`](crate::ImportRequest::keep_after)), and then goes on. A piece begins with random bytes: it is nobody
//! else's, so it can be deleted. Nothing refers to it; it lives as long as somebody asks for it within the registry's grace
//! period (docs/garbage-collection.md), as the keeper does.
//!
//! Keeping fails for itself alone: what is kept is dropped then, and the import goes on.

use std::convert::Infallible;
use std::io::{self, BufRead, Read, Write};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dvcr_image::digest::Digest;
use dvcr_image::{BlobWriter, CHUNK_BYTES, Repository, Upload};
use tokio::sync::Mutex;
use tokio::time::{Interval, MissedTickBehavior};

use crate::chunks::{self, ChunkReader, ChunkWriter};
use crate::produce::{SALT_BYTES, salt};
use crate::readback::ReadBack;
use crate::resume::{Kept, Mark, Note, Rest};
use crate::source::{Opened, Source};
use crate::{Error, ErrorKind, Result};

/// Most pieces that are kept; what comes behind them is not. As many as a note has room for.
pub(crate) const PIECES_MAX: usize = 112;
/// Longest name of a source's version that a note has room for, bytes.
pub(crate) const VALIDATOR_BYTES_MAX: usize = 512;
/// Shortest piece, and that of a source whose length is not known, bytes; both are whole chunks.
const PIECE_BYTES_MIN: u64 = 16 << 20;
const PIECE_BYTES_OF_UNKNOWN: u64 = 64 << 20;
/// How many times the length of a source there has to be room for: the pieces, what is staged, and the layer.
const ROOM_FACTOR: u64 = 3;
/// How often the registry is asked for the pieces, so that it does not collect them, milliseconds. The shortest grace that this
/// suffices for is three times as long.
const TOUCH_INTERVAL_MS: u64 = 10 * 60 * 1_000;
/// Longest wait for a piece that the registry is about to make when the import ends, milliseconds.
const COMMIT_TIMEOUT_MS: u64 = 10_000;

/// Whether the rest of a source is to take so long that what has come of it is kept; `elapsed` is how long `received` bytes took.
fn is_worth_it(elapsed: Duration, received: u64, len: Option<u64>, keep_after: Duration) -> bool {
    let Some(len) = len else { return elapsed >= keep_after };
    let rest = u128::from(len.saturating_sub(received));
    let rest_ms = elapsed.as_millis().saturating_mul(rest) / u128::from(received.max(1));
    rest_ms >= keep_after.as_millis()
}

/// How long the pieces of a source are, bytes.
pub(crate) fn piece_bytes(len: Option<u64>) -> u64 {
    let chunk = CHUNK_BYTES as u64;
    match len {
        None => PIECE_BYTES_OF_UNKNOWN,
        Some(len) => {
            let share = len.div_ceil(PIECES_MAX as u64).div_ceil(chunk).saturating_mul(chunk);
            share.max(PIECE_BYTES_MIN)
        }
    }
}

/// The source thread's end: copies what is received, once it is worth it.
pub(crate) struct Tee {
    writer: ChunkWriter,
    keep_after: Duration,
    /// Bytes of the whole source.
    len: Option<u64>,
    /// Whether a beginning that came quickly can be read again from the source.
    may_begin_late: bool,
    begun: Instant,
    /// Where in the source the next byte is that was not seen.
    next: u64,
    /// Whether somebody takes the chunks.
    is_armed: bool,
    is_on: bool,
}

impl Tee {
    /// Copies from the beginning, or from wherever it is worth it.
    pub(crate) fn new(
        writer: ChunkWriter,
        keep_after: Duration,
        len: Option<u64>,
        may_begin_late: bool,
    ) -> Self {
        let begun = Instant::now();
        Self { writer, keep_after, len, may_begin_late, begun, next: 0, is_armed: false, is_on: false }
    }

    /// Goes on copying behind so many bytes.
    pub(crate) fn behind(self, next: u64) -> Self {
        Self { next, is_on: true, ..self }
    }

    /// Tells that from now on somebody takes the chunks.
    pub(crate) fn arm(&mut self) {
        self.is_armed = true;
    }

    /// Takes what was received, which begins at `at`. False when no more is wanted. Blocks while the keeper is behind.
    pub(crate) fn take(&mut self, at: u64, bytes: &[u8]) -> bool {
        let seen = usize::try_from(self.next.saturating_sub(at)).unwrap_or(usize::MAX);
        let mut bytes = &bytes[seen.min(bytes.len())..];
        while !bytes.is_empty() {
            let room = self.writer.room();
            let (part, rest) = bytes.split_at(bytes.len().min(room));
            self.next = self.next.saturating_add(part.len() as u64);
            bytes = rest;
            if part.len() == room {
                // The chunk in hand counts: what is slow from its beginning is kept from its beginning.
                let was_on = self.is_on;
                self.is_on |= is_worth_it(self.begun.elapsed(), self.next, self.len, self.keep_after);
                self.is_on &= self.is_armed;
                if !self.is_on && (was_on || !self.may_begin_late) {
                    return false;
                }
                if !self.is_on {
                    self.writer.forget();
                    continue;
                }
                self.writer.mark(Mark::at(self.next.saturating_sub(CHUNK_BYTES as u64)));
            }
            if self.writer.write_all(part).is_err() {
                return false;
            }
        }
        true
    }
}

/// The async side: pushes pieces, and notes them.
pub(crate) struct Keeper {
    repository: Repository,
    /// The session that goes by the import's name, with the note; `None` once keeping has failed.
    journal: Option<Upload>,
    validator: Option<String>,
    len: Option<u64>,
    /// Where a tee's chunks come out, if anything is to be kept.
    chunks: Option<ChunkReader>,
    kept: Kept,
    /// Whether a piece was begun.
    has_begun: bool,
    /// Held while the registry makes a piece and its note.
    committing: Arc<Mutex<()>>,
}

impl Keeper {
    /// Goes on behind what is kept of a source. Where `keep_after` is given, and the source and the registry are such that it can
    /// be, what comes of it is kept too: then there is a tee to copy it.
    pub(crate) fn new(
        repository: Repository,
        journal: Upload,
        mut kept: Kept,
        source: &Source,
        opened: &Opened,
        keep_after: Option<Duration>,
    ) -> (Self, Option<Tee>) {
        let validator = opened.validator.clone().filter(|validator| validator.len() <= VALIDATOR_BYTES_MAX);
        let can_be_kept = journal.keeps_notes() && validator.is_some() && source.is_far();
        let len = opened.len;
        let (mut chunks, mut tee) = (None, None);
        if let Some(keep_after) = keep_after.filter(|_| can_be_kept) {
            let (writer, reader) = chunks::channel();
            let new = Tee::new(writer, keep_after, len, source.opens_again());
            (chunks, tee) = match kept.pieces.is_empty() {
                true => (Some(reader), Some(new)),
                false => (Some(reader), Some(new.behind(kept.end()))),
            };
        }
        if kept.pieces.is_empty() {
            kept.piece_bytes = piece_bytes(len);
        }
        let committing = Arc::default();
        let (journal, has_begun) = (Some(journal), false);
        (Self { repository, journal, validator, len, chunks, kept, has_begun, committing }, tee)
    }

    /// Gives the session up for a layer, as nothing need be kept of a source that is stored as it comes.
    ///
    /// # Errors
    /// [`ErrorKind::Changed`] if something was kept; it is removed.
    pub(crate) async fn into_layer(mut self) -> Result<BlobWriter> {
        if self.kept.pieces.is_empty()
            && let Some(session) = self.journal.take()
        {
            return Ok(session.into());
        }
        self.forget().await;
        let text = "what is kept of the source was kept by another version of this program";
        Err(Error::new(ErrorKind::Changed, text))
    }

    /// Ends with an import: what is kept stays for the next one, unless that cannot go on with it.
    pub(crate) async fn end<T>(mut self, outcome: &Result<T>) {
        let is_left = |error: &Error| !error.kind().spoils() && error.kind() != ErrorKind::Full;
        if !outcome.as_ref().err().is_some_and(is_left) {
            self.forget().await;
        }
    }

    /// Keeps what comes, as long as `work` lasts.
    pub(crate) async fn beside<T>(&mut self, work: impl Future<Output = T>) -> T {
        let committing = Arc::clone(&self.committing);
        let mut keeping = pin!(self.run());
        let done = tokio::select! {
            biased;
            done = work => done,
            never = &mut keeping => match never {},
        };
        // It is known then, and can be removed.
        let made = async {
            tokio::select! {
                biased;
                _ = committing.lock() => {}
                never = &mut keeping => match never {},
            }
        };
        if tokio::time::timeout(Duration::from_millis(COMMIT_TIMEOUT_MS), made).await.is_err() {
            tracing::debug!("a piece of the source stays for the registry's garbage collection");
        }
        done
    }

    /// Whether anything was kept, and took room.
    pub(crate) fn has_kept(&self) -> bool {
        self.has_begun || !self.kept.pieces.is_empty()
    }

    /// Removes what is kept, and the session: it is of no use any more.
    async fn forget(&mut self) {
        forget(&self.repository, self.journal.take(), &std::mem::take(&mut self.kept.pieces)).await;
    }

    async fn run(&mut self) -> Infallible {
        let mut ticks = tokio::time::interval(Duration::from_millis(TOUCH_INTERVAL_MS));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failure = self.keep(&mut ticks).await.err();
        loop {
            if let Some(error) = failure.take() {
                let why = error.kind();
                tracing::warn!(%error, ?why, "no more is kept of the source: if this import is killed, the next begins anew");
                self.forget().await;
            }
            ticks.tick().await;
            failure = self.touch().await.err();
        }
    }

    /// Makes pieces of the chunks, until there are no more, or pieces enough.
    async fn keep(&mut self, ticks: &mut Interval) -> dvcr_image::Result<()> {
        // Gone with this call, which tells the source thread that no more is wanted.
        let Some(mut chunks) = self.chunks.take() else { return Ok(()) };
        let mut piece: Option<BlobWriter> = None;
        let mut piece_bytes = 0_u64;
        while self.kept.pieces.len() < PIECES_MAX {
            let next = tokio::select! {
                next = chunks.next() => next,
                _ = ticks.tick() => {
                    self.touch().await?;
                    continue;
                }
            };
            let Some((chunk, mark)) = next else { return Ok(()) };
            let mut blob = match piece.take() {
                Some(blob) => blob,
                None => self.begin_piece(mark).await?,
            };
            piece_bytes = piece_bytes.saturating_add(chunk.len() as u64);
            blob.push(chunk.clone()).await?;
            chunks.give_back(chunk);
            if piece_bytes < self.kept.piece_bytes {
                piece = Some(blob);
                continue;
            }
            piece_bytes = 0;
            let committing = Arc::clone(&self.committing);
            let _committing = committing.lock().await;
            self.kept.pieces.push(blob.finish().await?.0);
            self.note().await?;
            tracing::debug!(end = self.kept.end(), "a piece of the source is kept");
        }
        tracing::info!(end = self.kept.end(), "enough is kept of the source");
        Ok(())
    }

    async fn begin_piece(&mut self, mark: Option<Mark>) -> dvcr_image::Result<BlobWriter> {
        if self.kept.pieces.is_empty() {
            self.kept.from = mark.map_or(0, |mark| mark.position);
            if let (Some(journal), Some(len)) = (&self.journal, self.len) {
                journal.announce(len.saturating_mul(ROOM_FACTOR)).await?;
            }
            let (from, piece_bytes) = (self.kept.from, self.kept.piece_bytes);
            tracing::info!(
                from,
                piece_bytes,
                "the source is slow: what comes of it is kept in the registry meanwhile"
            );
        }
        self.has_begun = true;
        let mut blob = self.repository.start_blob().await?;
        blob.push(Bytes::copy_from_slice(&salt())).await?;
        Ok(blob)
    }

    /// Tells whoever comes next what is kept.
    async fn note(&mut self) -> dvcr_image::Result<()> {
        let Some(journal) = &mut self.journal else { return Ok(()) };
        let validator = self.validator.as_deref().unwrap_or_default();
        Note::new(validator, Rest::Pieces(self.kept.clone())).leave(journal).await
    }

    /// Asks the registry for the pieces, which keeps them from being collected.
    async fn touch(&self) -> dvcr_image::Result<()> {
        match missing(&self.repository, &self.kept).await? {
            None => Ok(()),
            Some(piece) => {
                let text = format!("the piece {piece} is gone");
                Err(dvcr_image::Error::new(dvcr_image::ErrorKind::NotFound, text))
            }
        }
    }
}

/// The first piece that the repository does not have as it was kept.
pub(crate) async fn missing<'a>(
    repository: &Repository,
    kept: &'a Kept,
) -> dvcr_image::Result<Option<&'a Digest>> {
    let expected = kept.piece_bytes.saturating_add(SALT_BYTES as u64);
    for piece in &kept.pieces {
        if repository.blob_size(piece).await? != Some(expected) {
            return Ok(Some(piece));
        }
    }
    Ok(None)
}

/// Removes pieces, in the background, and before them the session that lists them.
pub(crate) async fn forget(repository: &Repository, journal: Option<Upload>, pieces: &[Digest]) {
    if let Some(journal) = journal {
        journal.cancel().await;
    }
    for piece in pieces {
        repository.discard_blob(piece.clone());
    }
}

/// The pieces one after the other, each verified before its last byte is passed on.
pub(crate) struct KeptReader {
    pieces: std::vec::IntoIter<ReadBack>,
    current: Option<ReadBack>,
}

impl KeptReader {
    /// Reads by the runtime that this is called in. Blocking; must not be read on its async threads.
    pub(crate) fn new(repository: &Repository, kept: &Kept) -> dvcr_image::Result<Self> {
        let salt = SALT_BYTES as u64;
        let size = kept.piece_bytes.saturating_add(salt);
        let pieces = kept.pieces.iter().map(|piece| ReadBack::new(repository, piece, size, salt));
        let pieces: Vec<_> = pieces.collect::<dvcr_image::Result<_>>()?;
        Ok(Self { pieces: pieces.into_iter(), current: None })
    }

    /// Reads on in the piece that has bytes left, or in the next one.
    fn read_on(&mut self, buf: &mut [u8]) -> dvcr_image::Result<usize> {
        loop {
            if let Some(piece) = &mut self.current {
                let bytes = piece.fill()?;
                let count = buf.len().min(bytes.len());
                if count > 0 {
                    buf[..count].copy_from_slice(&bytes[..count]);
                    piece.consume(count);
                    return Ok(count);
                }
            }
            self.current = self.pieces.next();
            if self.current.is_none() {
                return Ok(0);
            }
        }
    }
}

impl Read for KeptReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        Ok(self.read_on(buf).map_err(unusable)?)
    }
}

/// The error of pieces that cannot be read: [`ErrorKind::Changed`] if they are not what was kept.
fn unusable(error: dvcr_image::Error) -> Error {
    use dvcr_image::ErrorKind::{Mismatch, NotFound};
    let text = "reading back what was kept of the source in the registry";
    match error.kind() {
        Mismatch | NotFound => Error::with(ErrorKind::Changed, text, error),
        _ => Error::storing(text, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = CHUNK_BYTES as u64;

    #[test]
    fn a_source_is_kept_when_reading_the_rest_takes_long() {
        let seconds = Duration::from_secs;
        for (elapsed, received, len, keep_after, kept) in [
            // 10 bytes a second, 900 to come: 90 s.
            (seconds(10), 100, Some(1000), seconds(60), true),
            (seconds(10), 100, Some(1000), seconds(91), false),
            (seconds(10), 900, Some(1000), seconds(60), false),
            // Unknown, and it has lasted so long.
            (seconds(59), 100, None, seconds(60), false),
            (seconds(60), 100, None, seconds(60), true),
            // At once, and never.
            (seconds(0), 1, Some(1), seconds(0), true),
            (seconds(0), 1, None, seconds(0), true),
            (Duration::MAX, 1, Some(u64::MAX), Duration::MAX, true),
            (seconds(1 << 30), 1, Some(1 << 30), Duration::MAX, false),
            (seconds(1), 2000, Some(1000), seconds(1), false),
        ] {
            let found = is_worth_it(elapsed, received, len, keep_after);
            assert_eq!(found, kept, "{elapsed:?} {received} {len:?} {keep_after:?}");
        }
    }

    #[test]
    fn a_piece_is_a_hundredth_in_whole_chunks_and_the_list_of_them_is_bounded() {
        for len in [0, 1, 40 << 20, 1 << 30, 10 << 30, (3 << 40) + 1, u64::MAX / 2] {
            let piece = piece_bytes(Some(len));
            assert!(piece >= PIECE_BYTES_MIN && piece.is_multiple_of(CHUNK), "{len}: {piece}");
            assert!(len / piece <= PIECES_MAX as u64, "{len}: {piece}");
            assert!(
                piece == PIECE_BYTES_MIN || piece < len / PIECES_MAX as u64 + 2 * CHUNK,
                "{len}: {piece}"
            );
        }
        assert_eq!(piece_bytes(None) % CHUNK, 0);
        assert_eq!(piece_bytes(Some(u64::MAX)) % CHUNK, 0);
    }

    /// What a tee copies of `len` bytes that come in parts of 3 MB: where each chunk begins, and its bytes.
    fn copied(tee: impl FnOnce(ChunkWriter) -> Tee, len: usize) -> (Vec<u64>, Vec<u8>) {
        let (writer, mut chunks) = chunks::channel();
        let reading = std::thread::spawn(move || {
            let (mut begins, mut all) = (Vec::new(), Vec::new());
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            while let Some((chunk, mark)) = runtime.block_on(chunks.next()) {
                begins.push(mark.unwrap().position);
                all.extend_from_slice(&chunk);
                chunks.give_back(chunk);
            }
            (begins, all)
        });
        let mut tee = tee(writer);
        tee.arm();
        let bytes = source(len);
        for (n, part) in bytes.chunks(3_000_000).enumerate() {
            if !tee.take(n as u64 * 3_000_000, part) {
                break;
            }
        }
        drop(tee);
        reading.join().unwrap()
    }

    fn source(len: usize) -> Vec<u8> {
        (0..len as u32).flat_map(|n| (n / 7).to_le_bytes()).take(len).collect()
    }

    #[test]
    fn whole_chunks_are_copied_from_the_beginning_or_from_behind_what_is_there() {
        let (len, whole) = (5 * CHUNK_BYTES + 77, 5 * CHUNK_BYTES);
        let at_once = |writer| Tee::new(writer, Duration::ZERO, Some(len as u64), false);
        let (begins, all) = copied(at_once, len);
        assert_eq!(begins, (0..5).map(|n| n * CHUNK).collect::<Vec<_>>());
        assert!(all == source(len)[..whole]);

        let never = |writer, late| Tee::new(writer, Duration::MAX, Some(len as u64), late);
        let (begins, all) = copied(|writer| never(writer, false).behind(2 * CHUNK), len);
        assert_eq!(begins, [2 * CHUNK, 3 * CHUNK, 4 * CHUNK]);
        assert!(all == source(len)[2 * CHUNK_BYTES..whole]);

        for late in [true, false] {
            assert!(copied(|writer| never(writer, late), len).0.is_empty());
        }
    }

    #[test]
    fn before_anybody_takes_chunks_none_is_waited_with() {
        let bytes = source(3 * CHUNK_BYTES);
        let tee = |late| Tee::new(chunks::channel().0, Duration::ZERO, None, late);
        assert!(tee(true).take(0, &bytes));
        assert!(!tee(false).take(0, &bytes));
        assert!(!tee(true).behind(CHUNK).take(0, &bytes));
    }

    #[test]
    fn a_source_that_becomes_slow_is_kept_from_there_unless_it_cannot_be_read_again() {
        let len = 4 * CHUNK_BYTES;
        for (late, expected) in [(true, vec![2 * CHUNK, 3 * CHUNK]), (false, vec![])] {
            let (writer, mut chunks) = chunks::channel();
            let mut tee = Tee::new(writer, Duration::from_secs(3600), Some(len as u64), late);
            tee.arm();
            let bytes = source(len);
            assert_eq!(tee.take(0, &bytes[..2 * CHUNK_BYTES + 5]), late);
            // As if it had come since yesterday.
            tee.begun = tee.begun.checked_sub(Duration::from_secs(86_400)).unwrap();
            if late {
                assert!(tee.take(2 * CHUNK + 5, &bytes[2 * CHUNK_BYTES + 5..3 * CHUNK_BYTES]));
            }
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let mut begins = Vec::new();
            let rest = std::thread::spawn(move || {
                if late {
                    assert!(tee.take(3 * CHUNK, &bytes[3 * CHUNK_BYTES..]));
                }
            });
            while let Some((chunk, mark)) = runtime.block_on(chunks.next()) {
                let begin = mark.unwrap().position;
                assert!(chunk == source(len)[begin as usize..][..CHUNK_BYTES]);
                begins.push(begin);
            }
            rest.join().unwrap();
            assert_eq!(begins, expected);
        }
    }
}
