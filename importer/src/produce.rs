//! The source thread of an import: from the bytes received to the chunks of a layer, or of what is staged.

use std::io::{self, Read, Write};
use std::sync::Arc;

use dvcr_converter::convert::{Options, stream_to_image};
use dvcr_converter::format::{self, Format};
use dvcr_converter::io::ReadAt;
use dvcr_converter::limits::Limits;
use dvcr_converter::plain::PlainReader;
use dvcr_converter::progress::Progress;
use dvcr_converter::sink::StreamTarget;
use dvcr_converter::{qcow2, wrapper};
use dvcr_image::index::{Builder, Index};
use dvcr_image::tar;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::chunks::ChunkWriter;
use crate::name::file_name;
use crate::random;
use crate::resume::{Mark, StoredFile};
use crate::source::{Opened, Received};
use crate::{Error, ErrorKind, Result};

/// Length of the random bytes that a blob begins with which is to be nobody else's.
pub(crate) const SALT_BYTES: usize = 32;

/// How the stored file reaches its layer; known once the first bytes are.
#[derive(Debug)]
pub(crate) enum Route {
    /// The chunks are the layer around this file.
    Straight(StoredFile),
    /// The chunks are the file, or all of it but its first cluster.
    Staged,
}

/// What the source thread tells at its end.
pub(crate) struct Produced {
    pub(crate) file: StoredFile,
    pub(crate) source_size: u64,
    /// The part of the file that goes before what was staged.
    pub(crate) header: Vec<u8>,
    /// Of a file that went straight into its layer, from its beginning; that of others is made when they are read back.
    pub(crate) index: Option<Index>,
    /// The end of a source that went straight into its layer.
    pub(crate) end: Option<Mark>,
}

/// The source thread: from received bytes to chunks.
pub(crate) struct Producer {
    pub(crate) received: Received,
    pub(crate) len: Option<u64>,
    /// The source's bytes in any order, unless something is to be verified that needs them in theirs.
    pub(crate) random: Option<Arc<dyn ReadAt>>,
    pub(crate) opened: Opened,
    /// Where that ends of the source which was kept by an earlier import: before, what cannot be decoded was damaged.
    pub(crate) kept_end: u64,
    /// Bytes of the layer that were produced before, and the file in it.
    pub(crate) resumed: Option<(u64, StoredFile)>,
    pub(crate) limits: Limits,
    pub(crate) progress: Arc<Progress>,
    /// The state of the source at its beginning.
    pub(crate) begin: Mark,
    pub(crate) writer: ChunkWriter,
}

impl Producer {
    pub(crate) fn run(mut self, tell_route: oneshot::Sender<Route>) -> Result<Produced> {
        let received = self.received.clone();
        let kept_end = self.kept_end;
        let (stamp, shown) = (self.opened.stamp.take(), self.opened.shown.clone());
        // What went wrong at the source explains whatever failed after it.
        let produced = match &self.resumed {
            Some((layer, file)) => {
                let (layer, file) = (*layer, file.clone());
                self.go_on(tell_route, layer, file)
            }
            None => self.produce(tell_route),
        };
        let produced = produced.map_err(|error| match received.failure() {
            Some(failure) => failure,
            None if error.kind() == ErrorKind::Image && received.position() < kept_end => {
                Error::with(ErrorKind::Changed, "what was kept of the source cannot be decoded", error)
            }
            None => error,
        });
        // What was made of two versions is of no use, and what failed for them no fault of the image.
        stamp.map_or(Ok(()), |stamp| stamp.verify(&shown)).and(produced)
    }

    /// Produces what is behind so many bytes of a layer, from a source that begins there.
    fn go_on(self, tell_route: oneshot::Sender<Route>, layer: u64, file: StoredFile) -> Result<Produced> {
        self.progress.set_total(file.size);
        tell(tell_route, Route::Straight(file.clone()))?;
        let received = self.received.clone();
        self.layer(Box::new(received), layer, file)
    }

    /// Hands over the layer around a file, from so many bytes on; `reader` begins where the file does, or goes on.
    fn layer(
        mut self,
        mut reader: Box<dyn Read + Send>,
        from: u64,
        mut file: StoredFile,
    ) -> Result<Produced> {
        let position = from.saturating_sub(tar::DATA_OFFSET);
        let received = self.received.clone();
        if from == 0 {
            let begin = tar::prefix(&file.name, file.size)
                .map_err(|e| Error::with(ErrorKind::Image, "making the layer's header", e))?;
            self.writer.mark(self.begin.clone());
            self.writer.write_all(&begin).map_err(pushing)?;
        }
        let mark = |taken: u64| received.mark(position + taken);
        let mut indexed = Indexing { reader: &mut reader, index: Builder::new() };
        let mut reader = self.progress.storing(&mut indexed);
        let read = self.writer.read_all(&mut reader, &mark).map_err(|e| self.reading(e))?;
        drop(reader);
        file.size = position.saturating_add(read);
        let end = mark(read);
        let source_size = self.received.clone().finish(self.len)?;
        self.writer.write_all(&tar::suffix(file.size)).map_err(pushing)?;
        self.writer.finish().map_err(pushing)?;
        let index = if from == 0 { indexed.index.finish() } else { None };
        Ok(Produced { file, source_size, header: Vec::new(), index, end })
    }

    fn produce(mut self, tell_route: oneshot::Sender<Route>) -> Result<Produced> {
        let shown = self.opened.shown.clone();
        let unwrapped = wrapper::unwrap(Box::new(self.received.clone()), &self.limits);
        let unwrapped = unwrapped.map_err(|e| self.refused(e))?;
        if unwrapped.head.is_empty() {
            return Err(empty(&shown));
        }
        if let Some(advice) = self.opened.if_page.filter(|_| looks_like_html(&unwrapped.head)) {
            let text = format!("{shown} is a web page, not a disk image; {advice}");
            return Err(Error::new(ErrorKind::Source, text));
        }
        let stored_len = self.len.filter(|_| unwrapped.wrappers.is_empty());
        let probe = format::probe(&unwrapped.head, stored_len, &self.limits).map_err(|e| self.refused(e))?;
        let re_encoded = probe.format == Format::Raw;
        let format = if re_encoded { Format::Qcow2 } else { probe.format };
        let name = file_name(self.opened.name.as_deref(), &unwrapped.wrappers, format, re_encoded);

        let straight = stored_len.filter(|_| !re_encoded);
        if let Some(len) = self.len {
            let legs = if straight.is_some() { 1 } else { 2 };
            self.progress.set_total(len.saturating_mul(legs));
        }
        if let Some(size) = straight {
            let file = StoredFile { name, format, size, virtual_size: probe.virtual_size };
            self.received.keep(None);
            tell(tell_route, Route::Straight(file.clone()))?;
            return self.layer(unwrapped.reader, 0, file);
        }
        self.received.arm();
        tell(tell_route, Route::Staged)?;
        let mut reader = unwrapped.reader;
        self.writer.write_all(&salt()).map_err(pushing)?;
        let at_random = match self.random.take().filter(|_| re_encoded && unwrapped.wrappers.is_empty()) {
            Some(source) => random::open_raw(source, &self.limits).map_err(|e| self.refused(e))?,
            None => None,
        };
        let is_streamed = at_random.is_none();
        let (size, virtual_size, header) = if let Some(disk) = at_random {
            drop(reader);
            let form = qcow2::WriteOptions::default();
            let mut target = StreamTarget::new(&mut self.writer, form.cluster_size as usize);
            let finished = random::encode(disk, &mut target, &form, &self.limits, &self.progress);
            let header = finished.and_then(|finished| Ok((finished, target.finish()?)));
            let (finished, header) = header.map_err(|e| match e.kind() {
                dvcr_converter::ErrorKind::Io => Error::with(ErrorKind::Source, "reading the source", e),
                _ => self.refused(e),
            })?;
            (finished.file_bytes, Some(finished.virtual_size), header)
        } else if re_encoded {
            // Cancelling stops the reader; the counts of the conversion are not the source's.
            let uncounted = Progress::default();
            uncounted.bound(&self.limits);
            let form = qcow2::WriteOptions::default();
            let mut target = StreamTarget::new(&mut self.writer, form.cluster_size as usize);
            let disk = Box::new(PlainReader::new(reader));
            let finished = stream_to_image(disk, None, &mut target, &form, &Options::default(), &uncounted);
            let header = finished.and_then(|finished| Ok((finished, target.finish()?)));
            let (finished, header) = header.map_err(|e| self.refused(e))?;
            (finished.file_bytes, Some(finished.virtual_size), header)
        } else {
            let stored = self.writer.read_all(&mut self.progress.storing(&mut reader), &|_| None);
            let size = stored.map_err(|e| self.reading(e))?;
            drop(reader);
            // With its whole length known, the header is held against it.
            let probe =
                format::probe(&unwrapped.head, Some(size), &self.limits).map_err(|e| self.refused(e))?;
            (size, probe.virtual_size, Vec::new())
        };
        let source_size = match self.len.filter(|_| !is_streamed) {
            Some(len) => len,
            None => self.received.clone().finish(self.len)?,
        };
        tracing::debug!(bytes = self.writer.written(), "the source is read");
        self.writer.finish().map_err(pushing)?;
        let file = StoredFile { name, format, size, virtual_size };
        Ok(Produced { file, source_size, header, index: None, end: None })
    }

    fn refused(&self, error: dvcr_converter::Error) -> Error {
        let kind = match error.kind() {
            dvcr_converter::ErrorKind::Cancelled => ErrorKind::Cancelled,
            _ => ErrorKind::Image,
        };
        Error::with(kind, format!("{} is not an image that can be imported", self.opened.shown), error)
    }

    fn reading(&self, error: io::Error) -> Error {
        self.refused(dvcr_converter::Error::io("reading the image", error))
    }
}

fn pushing(error: io::Error) -> Error {
    Error::with(ErrorKind::Registry, "handing bytes to the upload", error)
}

/// Tells the async side how the file reaches its layer.
fn tell(tell_route: oneshot::Sender<Route>, route: Route) -> Result<()> {
    tell_route.send(route).map_err(|_| Error::new(ErrorKind::Cancelled, "the transfer was stopped"))
}

/// Makes the index of what is read.
pub(crate) struct Indexing<R> {
    pub(crate) reader: R,
    pub(crate) index: Builder,
}

impl<R: Read> Read for Indexing<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buf)?;
        self.index.update(&buf[..count]);
        Ok(count)
    }
}

/// 244 random bits, as two version 4 UUIDs have them.
pub(crate) fn salt() -> [u8; SALT_BYTES] {
    let mut salt = [0; SALT_BYTES];
    for half in salt.chunks_exact_mut(SALT_BYTES / 2) {
        half.copy_from_slice(Uuid::new_v4().as_bytes());
    }
    salt
}

pub(crate) fn empty(shown: &str) -> Error {
    Error::new(ErrorKind::Source, format!("{shown} is empty (0 bytes); there is no image to import"))
}

fn looks_like_html(head: &[u8]) -> bool {
    let start = head.trim_ascii_start();
    let begins = |tag: &[u8]| start.get(..tag.len()).is_some_and(|s| s.eq_ignore_ascii_case(tag));
    begins(b"<!doctype html") || begins(b"<html") || begins(b"<head") || begins(b"<?xml") || begins(b"<!--")
}
