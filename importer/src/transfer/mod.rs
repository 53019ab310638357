//! The disk at a source into an image: a few attempts, each of which goes on with what an earlier import left.
//!
//! ```text
//!  the session by the import's name
//!    nothing ─────────> source from its beginning ─┬─ stored as it comes ──> session ─> layer ─┐
//!    pieces of it ────> pieces, then the source  ──┴─ decoded, encoded ────> staged ──> layer ─┤
//!    a part of a layer ─> source from there on ──────────────────────────────> session ─> layer ─┤
//!    a whole layer ─────────────────────────────────────────────────────────────────────────────┴─> image
//! ```

mod layer;

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use dvcr_converter::progress::Progress;
use dvcr_image::digest::Digest;
use dvcr_image::{BlobWriter, CHUNK_BYTES, Repository, Upload, tar};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::checksum::Checksums;
use crate::chunks::{self, ChunkReader};
use crate::import::{ImportRequest, ImportSummary, Outcome};
use crate::keep::{self, Keeper, KeptReader};
use crate::produce::{Produced, Producer, Route, empty};
use crate::resume::{self, Begun, Kept, Mark, Note, Pushed, Rest};
use crate::source::{Opened, Place, Pump, Received};
use crate::{Error, ErrorKind, Result};

/// Times that an import begins anew because its source, or the registry, has changed under it.
const ATTEMPTS_MAX: u32 = 3;
/// Longest layer that is sent again when an import is killed between it and its manifest, bytes: as much as comes again of any
/// that is killed.
const LAYER_BYTES_SENT_AGAIN: u64 = 2 * CHUNK_BYTES as u64;

/// Makes an image of the disk at the source.
pub(crate) async fn transfer(
    request: &ImportRequest,
    repository: &Repository,
    progress: &Arc<Progress>,
) -> Result<ImportSummary> {
    Transfer { request, repository, progress, keeps: AtomicBool::new(true) }.run().await
}

struct Transfer<'a> {
    request: &'a ImportRequest,
    repository: &'a Repository,
    progress: &'a Arc<Progress>,
    /// Whether anything is kept of the source: not again where it was in the way.
    keeps: AtomicBool,
}

/// What there is to do.
enum Start {
    /// A source is to be read, from where it is opened.
    Source(Box<Reading>),
    /// The layer is there, of so many bytes, and told of by the session.
    Layer(Box<Upload>, Box<Pushed>, u64),
}

/// Where reading begins, or goes on.
struct Reading {
    opened: Opened,
    /// Of the first bytes of the source, where these are read by themselves.
    beginning: Option<Pump>,
    checksums: Checksums,
    session: Session,
}

/// What an import does with the session that goes by its name.
enum Session {
    /// It decides when it sees what the source is; an earlier one may have kept something of it.
    Open(Upload, Kept),
    /// It goes on with a layer.
    Layer(Box<BlobWriter>, Begun),
}

/// An image that is there.
struct Published {
    /// The digest of its manifest.
    manifest: Digest,
    /// Bytes a guest sees.
    virtual_size: u64,
    produced: Produced,
}

/// The session while the source thread finds out what the source is.
enum Held {
    Layer(BlobWriter),
    Keeper(Keeper),
}

type SourceThread = JoinHandle<Result<Produced>>;

impl Transfer<'_> {
    /// Begins anew, a few times, when what was begun cannot be gone on with.
    async fn run(&self) -> Result<ImportSummary> {
        let begun = Instant::now();
        let mut attempt = 1;
        loop {
            match self.attempt(begun).await {
                Err(error) if error.kind() == ErrorKind::Changed && attempt < ATTEMPTS_MAX => {
                    tracing::warn!(%error, attempt, "the import begins anew");
                    attempt += 1;
                }
                outcome => return outcome,
            }
        }
    }

    async fn attempt(&self, begun: Instant) -> Result<ImportSummary> {
        self.progress.set_phase("transfer");
        let (published, resumed_bytes) = match self.start().await? {
            Start::Source(reading) => self.read(*reading).await?,
            Start::Layer(journal, pushed, size) => self.publish_layer(*journal, *pushed, size).await?,
        };
        let Published { manifest, virtual_size, produced } = published;
        let seconds = begun.elapsed().as_secs_f64();
        let received = produced.source_size - resumed_bytes;
        Ok(ImportSummary {
            reference: self.request.destination.to_string(),
            digest: manifest.to_string(),
            outcome: Outcome::Imported,
            file_name: produced.file.name,
            format: produced.file.format.to_string(),
            virtual_size,
            stored_size: produced.file.size,
            source_size: produced.source_size,
            resumed_bytes,
            seconds,
            bytes_per_second: (received as f64 / seconds.max(1e-9)) as u64,
        })
    }

    /// Makes the image of what is read; returns it, and how many bytes of the source an earlier import had brought.
    async fn read(&self, reading: Reading) -> Result<(Published, u64)> {
        let Reading { mut opened, beginning, checksums, session } = reading;
        // Live as long as this future: when it is dropped, the source thread is not left waiting.
        let _pumps = (beginning, opened.pump.take());
        if opened.len == Some(0) {
            return Err(empty(&opened.shown));
        }
        let validator = opened.validator.clone();
        let (position, resumed_bytes, kept_end) = match &session {
            Session::Layer(_, begun) => (begun.mark.position, begun.mark.position, 0),
            Session::Open(_, kept) => (0, kept.bytes(), kept.end()),
        };
        let reader = std::mem::replace(&mut opened.reader, Box::new(io::empty()));
        let begin = Mark::new(position, &checksums);
        self.progress.skip_to(resumed_bytes);
        let received = Received::new(reader, position, checksums, self.progress.clone());
        let (held, resumed) = match session {
            Session::Layer(blob, begun) => (Held::Layer(*blob), Some((begun.layer, begun.file))),
            Session::Open(session, kept) => {
                let keep_after = self.keeps.load(Ordering::Relaxed).then_some(self.request.keep_after);
                let (repository, source) = (self.repository.clone(), &self.request.source);
                let (keeper, tee) = Keeper::new(repository, session, kept, source, &opened, keep_after);
                received.keep(tee);
                (Held::Keeper(keeper), None)
            }
        };
        let (writer, mut chunks) = chunks::channel();
        let (tell_route, route) = oneshot::channel();
        let is_plain = self.request.checksums.is_empty();
        let producer = Producer {
            len: opened.len,
            random: opened.random.take().filter(|_| is_plain),
            received,
            opened,
            kept_end,
            resumed,
            limits: self.request.limits.clone(),
            progress: self.progress.clone(),
            begin,
            writer,
        };
        let thread = tokio::task::spawn_blocking(move || producer.run(tell_route));

        let published = match (route.await, held) {
            (Ok(Route::Straight(file)), held) => {
                let (blob, is_resumed) = match held {
                    Held::Layer(blob) => (blob, true),
                    Held::Keeper(keeper) => (keeper.into_layer().await?, false),
                };
                if let Some(bytes) = tar::layer_bytes(file.size) {
                    blob.announce(bytes).await.map_err(|e| self.registry(e))?;
                }
                let note = |mark: Mark, layer| {
                    let begun = Begun::new(layer, mark, file.clone());
                    Note::new(validator.as_deref()?, Rest::Layer(begun)).write()
                };
                let keeps_notes = blob.keeps_notes();
                let (layer, mut produced) =
                    self.push_layer(blob, &mut chunks, note, thread, is_resumed).await?;
                let mut journal = None;
                if let (true, Some(validator), Some(end)) = (keeps_notes, &validator, produced.end.take()) {
                    let pushed = Pushed { digest: layer.0.clone(), end, file: produced.file.clone() };
                    journal = self.tell_of(&layer, Note::new(validator, Rest::Pushed(pushed))).await;
                }
                self.conclude(&layer, produced, !is_resumed, journal).await?
            }
            (Ok(Route::Staged), Held::Keeper(keeper)) => self.stage_and_keep(chunks, thread, keeper).await?,
            // The source thread failed before it knew.
            (_, held) => {
                let error = ended(thread).await.err();
                let outcome = Err(error.unwrap_or_else(|| {
                    Error::new(ErrorKind::Source, "the source thread ended without a word")
                }));
                if let Held::Keeper(keeper) = held {
                    keeper.end(&outcome).await;
                }
                return outcome;
            }
        };
        Ok((published, resumed_bytes))
    }

    /// Leaves word of a layer that no manifest names yet, for the import that follows if this one is killed. Without it, that one sends
    /// the layer again.
    async fn tell_of(&self, layer: &(Digest, u64), note: Note) -> Option<Upload> {
        if layer.1 <= LAYER_BYTES_SENT_AGAIN {
            return None;
        }
        let leaving = async {
            let (mut journal, of_another) =
                self.repository.return_to_upload(&self.session_name(), None).await?;
            if of_another.is_some() {
                return Ok(None);
            }
            note.leave(&mut journal).await?;
            Ok::<_, dvcr_image::Error>(Some(journal))
        };
        leaving.await.unwrap_or_else(|error| {
            tracing::debug!(%error, "the registry was not told of a layer that is whole");
            None
        })
    }

    /// Makes the image of a layer that an earlier import has brought.
    async fn publish_layer(&self, journal: Upload, pushed: Pushed, size: u64) -> Result<(Published, u64)> {
        let Pushed { digest, end, file } = pushed;
        self.progress.set_total(end.position);
        self.progress.skip_to(end.position);
        self.progress.set_phase("commit");
        let produced =
            Produced { file, source_size: end.position, header: Vec::new(), index: None, end: None };
        let published = self.conclude(&(digest, size), produced, false, Some(journal)).await?;
        Ok((published, end.position))
    }

    /// Opens the session that goes by this import's name, and the source at the place that fits it.
    ///
    /// # Errors
    /// [`ErrorKind::Changed`] when what an earlier process left is of no use; it is gone then.
    async fn start(&self) -> Result<Start> {
        let ImportRequest { source, source_options, limits, .. } = self.request;
        let checksums = Checksums::new(&self.request.checksums)?;
        let bytes = source.stored_bytes().and_then(tar::layer_bytes);
        let upload = self.repository.return_to_upload(&self.session_name(), bytes).await;
        let (upload, text) = upload.map_err(|e| self.registry(e))?;
        let Some(text) = text else {
            let opened = source.open(source_options, limits, None).await?;
            let session = Session::Open(upload, Kept::default());
            return Ok(Start::Source(Box::new(Reading { opened, beginning: None, checksums, session })));
        };
        match Note::read(&text).map(|note| (note.version_of_source(), note.rest)) {
            Some((version, Rest::Layer(begun))) => self.go_on(upload, version, begun, checksums).await,
            Some((version, Rest::Pieces(kept))) => self.go_on_behind(upload, version, kept, checksums).await,
            Some((version, Rest::Pushed(pushed))) => {
                self.go_on_with(upload, version, pushed, checksums).await
            }
            None => Err(unusable(upload).await),
        }
    }

    /// The name of the session that an earlier import left.
    fn session_name(&self) -> String {
        resume::session_name(self.request.destination.target(), &self.request.source.identity())
    }

    /// Goes on with a whole layer, if the source is still what it was made of.
    async fn go_on_with(
        &self,
        journal: Upload,
        version: Place,
        pushed: Pushed,
        mut checksums: Checksums,
    ) -> Result<Start> {
        if !pushed.end.restore(&mut checksums) {
            return Err(unusable(journal).await);
        }
        let there = self.repository.blob_size(&pushed.digest).await.map_err(|e| self.registry(e))?;
        let Some(size) = there.filter(|_| there == tar::layer_bytes(pushed.file.size)) else {
            journal.cancel().await;
            let text = format!("the registry does not have the layer any more, {}", pushed.digest);
            return Err(Error::new(ErrorKind::Changed, text));
        };
        let place = Place { position: pushed.end.position, ..version };
        let verified = self.open(place).await.and_then(|_| checksums.verify());
        match verified {
            Err(error) if error.kind().spoils() => {
                journal.cancel().await;
                return Err(error);
            }
            verified => verified?,
        }
        tracing::info!(layer = %pushed.digest, "the import goes on where it was: the layer is there");
        Ok(Start::Layer(Box::new(journal), Box::new(pushed), size))
    }

    /// Goes on with a layer.
    async fn go_on(
        &self,
        upload: Upload,
        version: Place,
        begun: Begun,
        mut checksums: Checksums,
    ) -> Result<Start> {
        let there = upload.offset();
        let position = begun.mark.position;
        let fits = position == begun.layer.saturating_sub(tar::DATA_OFFSET);
        let Some(hash) = begun.hash().filter(|_| fits && begun.mark.restore(&mut checksums)) else {
            return Err(unusable(upload).await);
        };
        let opened = match self.open(Place { position, ..version }).await {
            Err(error) if error.kind() == ErrorKind::Changed => {
                upload.cancel().await;
                return Err(error);
            }
            opened => opened?,
        };
        let blob = BlobWriter::resume(upload, begun.layer, &hash).map_err(|e| self.lost(e, true))?;
        let read_again = there.saturating_sub(begun.layer);
        tracing::info!(position, read_again, "the import goes on where it was");
        let session = Session::Layer(Box::new(blob), begun);
        Ok(Start::Source(Box::new(Reading { opened, beginning: None, checksums, session })))
    }

    /// Goes on behind what is kept of the source, which is read back before that.
    async fn go_on_behind(
        &self,
        upload: Upload,
        version: Place,
        kept: Kept,
        checksums: Checksums,
    ) -> Result<Start> {
        match self.open_behind(version, &kept).await {
            Ok((opened, beginning)) => {
                let (position, read_again) = (kept.end(), kept.from);
                tracing::info!(position, read_again, "the import goes on where it was");
                let session = Session::Open(upload, kept);
                Ok(Start::Source(Box::new(Reading { opened, beginning, checksums, session })))
            }
            Err(error) => {
                if error.kind() == ErrorKind::Changed {
                    keep::forget(self.repository, Some(upload), &kept.pieces).await;
                }
                Err(error)
            }
        }
    }

    /// Opens the source as a whole: its beginning, what is kept, and the rest.
    async fn open_behind(&self, version: Place, kept: &Kept) -> Result<(Opened, Option<Pump>)> {
        let missing = keep::missing(self.repository, kept).await.map_err(|e| self.registry(e))?;
        if let Some(piece) = missing {
            let text = format!("the registry does not have any more what was kept of the source, {piece}");
            return Err(Error::new(ErrorKind::Changed, text));
        }
        let mut opened = self.open(Place { position: kept.end(), ..version.clone() }).await?;
        let rest = std::mem::replace(&mut opened.reader, Box::new(io::empty()));
        let pieces = KeptReader::new(self.repository, kept).map_err(|e| self.registry(e))?;
        if kept.from == 0 {
            opened.reader = Box::new(pieces.chain(rest));
            return Ok((opened, None));
        }
        let beginning = self.open(Place { position: 0, ..version }).await?;
        opened.reader = Box::new(beginning.reader.take(kept.from).chain(pieces).chain(rest));
        Ok((opened, beginning.pump))
    }

    async fn open(&self, at: Place) -> Result<Opened> {
        let ImportRequest { source, source_options, limits, .. } = self.request;
        source.open(source_options, limits, Some(&at)).await
    }

    /// Makes the image by way of a staged blob, while what comes of the source is kept for the next import.
    async fn stage_and_keep(
        &self,
        chunks: ChunkReader,
        thread: SourceThread,
        mut keeper: Keeper,
    ) -> Result<Published> {
        let outcome = keeper.beside(self.stage(chunks, thread)).await;
        let is_full = outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Full);
        let took_room = is_full && keeper.has_kept() && self.request.source.opens_again();
        keeper.end(&outcome).await;
        match outcome {
            Err(error) if took_room => {
                self.keeps.store(false, Ordering::Relaxed);
                self.repository.settle().await;
                let text = "the registry has no room for the image beside what was kept of the source";
                Err(Error::with(ErrorKind::Changed, text, error))
            }
            outcome => outcome,
        }
    }

    /// Pushes the layer as it is produced. What it had come to stays with the registry when this fails, unless it is of no use.
    async fn push_layer(
        &self,
        mut blob: BlobWriter,
        chunks: &mut ChunkReader,
        note: impl Fn(Mark, (u64, Vec<u8>)) -> Option<String>,
        thread: SourceThread,
        resumed: bool,
    ) -> Result<((Digest, u64), Produced)> {
        let pushed = chunks.push_to(&mut blob, note, |_| {}).await.map_err(|e| self.lost(e, resumed));
        // A source that failed explains why there were no more chunks.
        let produced = match pushed {
            Ok(()) => ended(thread).await,
            Err(error) => Err(error),
        };
        let produced = match produced {
            Ok(produced) => produced,
            Err(error) => {
                if error.kind().spoils() {
                    blob.cancel().await;
                }
                return Err(error);
            }
        };
        self.progress.set_phase("commit");
        let layer = blob.finish().await.map_err(|e| self.lost(e, resumed))?;
        Ok((layer, produced))
    }

    /// The error of a session that failed: [`ErrorKind::Changed`] if the registry does not have what it had.
    fn lost(&self, error: dvcr_image::Error, resumed: bool) -> Error {
        use dvcr_image::ErrorKind::{Mismatch, NotFound, Protocol};
        let kind = error.kind();
        if kind != NotFound && !(resumed && matches!(kind, Mismatch | Protocol)) {
            return self.registry(error);
        }
        let text = format!("the registry lost what it had of {}", self.request.destination);
        Error::with(ErrorKind::Changed, text, error)
    }

    fn registry(&self, error: dvcr_image::Error) -> Error {
        Error::storing(format!("importing into {}", self.request.destination), error)
    }
}

/// The error of a note that nothing can be done with; its session is gone.
async fn unusable(upload: Upload) -> Error {
    upload.cancel().await;
    let text = "what was begun had other checksums demanded, or was begun by another version of this program";
    Error::new(ErrorKind::Changed, text)
}

/// Waits for what the source thread produced.
async fn ended(thread: SourceThread) -> Result<Produced> {
    thread.await.map_err(|e| Error::with(ErrorKind::Source, "the source thread ended early", e))?
}
