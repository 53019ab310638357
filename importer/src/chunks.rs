//! Bytes of a blocking writer as chunks for an upload: one fills while another waits and a third is sent.

use std::io::{self, Read, Write};

use bytes::{Bytes, BytesMut};
use dvcr_image::{BlobWriter, CHUNK_BYTES};
use tokio::sync::mpsc;

use crate::resume::Mark;

/// Full chunks that wait for the upload.
const CHUNKS_WAITING_MAX: usize = 1;
/// Chunks that exist at once: filling, waiting, being sent. Bounds the memory of one transfer.
const CHUNKS_MAX: usize = CHUNKS_WAITING_MAX + 2;

/// A writer and the receiver of its chunks.
pub(crate) fn channel() -> (ChunkWriter, ChunkReader) {
    let (full, chunks) = mpsc::channel(CHUNKS_WAITING_MAX);
    let (empty, used) = std::sync::mpsc::sync_channel(CHUNKS_MAX);
    let buf = BytesMut::zeroed(CHUNK_BYTES);
    let writer = ChunkWriter { buf, filled: 0, written: 0, mark: None, full, used };
    (writer, ChunkReader { chunks, empty })
}

/// Fills chunks; blocks while the upload is behind, fails once it is gone.
pub(crate) struct ChunkWriter {
    /// Always of whole chunk length; memory is cleared once, not for every chunk.
    buf: BytesMut,
    filled: usize,
    written: u64,
    /// Where the chunk begins in the source, if something goes on from there.
    mark: Option<Mark>,
    full: mpsc::Sender<(Bytes, Option<Mark>)>,
    used: std::sync::mpsc::Receiver<BytesMut>,
}

impl ChunkWriter {
    /// Bytes taken so far.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Tells where in the source the chunk begins that is filled now.
    pub(crate) fn mark(&mut self, mark: Mark) {
        self.mark = Some(mark);
    }

    /// Bytes until the chunk is full.
    pub(crate) fn room(&self) -> usize {
        CHUNK_BYTES - self.filled
    }

    /// Forgets what is in the chunk that is filled now.
    pub(crate) fn forget(&mut self) {
        self.written -= self.filled as u64;
        self.filled = 0;
    }

    /// Takes everything that `reader` has, read right into the chunks; returns how much. `mark` tells, at the beginning of a
    /// chunk, where in the source that is; it gets the bytes that were taken by then.
    pub(crate) fn read_all(
        &mut self,
        reader: &mut dyn Read,
        mark: &dyn Fn(u64) -> Option<Mark>,
    ) -> io::Result<u64> {
        let before = self.written;
        loop {
            if self.filled == 0 {
                self.mark = mark(self.written - before);
            }
            match reader.read(&mut self.buf[self.filled..]) {
                Ok(0) => return Ok(self.written - before),
                Ok(count) => self.add(count)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Hands over the last, shorter chunk.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.send()
    }

    fn add(&mut self, count: usize) -> io::Result<()> {
        self.filled += count;
        self.written += count as u64;
        if self.filled == CHUNK_BYTES { self.send() } else { Ok(()) }
    }

    fn send(&mut self) -> io::Result<()> {
        if self.filled == 0 {
            return Ok(());
        }
        let next = self.used.try_recv().unwrap_or_else(|_| BytesMut::zeroed(CHUNK_BYTES));
        let mut chunk = std::mem::replace(&mut self.buf, next);
        chunk.truncate(self.filled);
        self.filled = 0;
        self.full
            .blocking_send((chunk.freeze(), self.mark.take()))
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for ChunkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(CHUNK_BYTES - self.filled);
        self.buf[self.filled..self.filled + count].copy_from_slice(&bytes[..count]);
        self.add(count)?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The chunks, in order.
pub(crate) struct ChunkReader {
    chunks: mpsc::Receiver<(Bytes, Option<Mark>)>,
    empty: std::sync::mpsc::SyncSender<BytesMut>,
}

impl ChunkReader {
    /// Pushes all chunks; `pushed` learns of the bytes of each. Returns when the writer finished, or vanished.
    ///
    /// `note` makes of a mark, and of where the blob is then, what is left with the chunk that begins there.
    pub(crate) async fn push_to(
        &mut self,
        blob: &mut BlobWriter,
        note: impl Fn(Mark, (u64, Vec<u8>)) -> Option<String>,
        mut pushed: impl FnMut(u64),
    ) -> dvcr_image::Result<()> {
        while let Some((chunk, mark)) = self.next().await {
            if let Some(note) = mark.and_then(|mark| note(mark, blob.state())) {
                blob.leave_note(note);
            }
            blob.push(chunk.clone()).await?;
            pushed(chunk.len() as u64);
            self.give_back(chunk);
        }
        Ok(())
    }

    /// The next chunk, and where it begins in the source if that was told; `None` when the writer finished, or vanished.
    pub(crate) async fn next(&mut self) -> Option<(Bytes, Option<Mark>)> {
        self.chunks.recv().await
    }

    /// Lets the memory of a chunk serve again. As good as always nobody else holds it any more.
    pub(crate) fn give_back(&self, chunk: Bytes) {
        if let Ok(buf) = chunk.try_into_mut()
            && buf.len() == CHUNK_BYTES
        {
            let _ = self.empty.try_send(buf);
        }
    }
}
