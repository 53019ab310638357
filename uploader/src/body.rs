//! What comes in a request's body: as it is, or decoded on a thread of its own.

use std::io::{self, Read};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, HttpBody};
use axum::extract::Request;
use bytes::{Buf, Bytes};
use futures_util::StreamExt;
use http::header::EXPECT;
use hyper::body::{Frame, SizeHint};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

/// Pieces that wait on either side of a decoder.
const PIECES_WAITING_MAX: usize = 4;
/// Bytes that a decoder gives out at a time, and the length of the pieces of a body in memory.
const PIECE_BYTES_MAX: usize = 256 << 10;
/// Largest window of a zstd frame, as a power of two: 8 MiB, what RFC 8878 (3.1.1.1.2) wants everybody to take.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;
/// How long and how much of a body that is not wanted is read all the same, so that its sender reads our answer rather than
/// finding the connection broken.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
const DRAIN_BYTES_MAX: u64 = 1 << 30;

/// How a body is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Coding {
    Identity,
    /// `Content-Encoding: zstd`, RFC 8878.
    Zstd,
    /// Snappy's framing format, as clones of block devices come.
    Snappy,
}

/// The decoded bytes of a body, piece by piece.
pub(crate) enum Incoming {
    Plain(BodyDataStream),
    Decoded(mpsc::Receiver<io::Result<Bytes>>),
    /// Already here.
    Whole(Bytes),
}

impl Incoming {
    pub(crate) fn new(body: Body, coding: Coding) -> Self {
        let body = body.into_data_stream();
        if coding == Coding::Identity {
            return Self::Plain(body);
        }
        let (raw, pieces) = mpsc::channel(PIECES_WAITING_MAX);
        let (decoded, incoming) = mpsc::channel(PIECES_WAITING_MAX);
        tokio::spawn(pass(body, raw));
        tokio::task::spawn_blocking(move || {
            if let Err(error) = decode(Pieces { pieces, piece: Bytes::new() }, coding, &decoded) {
                // Fails when nobody wants to know.
                let _ = decoded.blocking_send(Err(error));
            }
        });
        Self::Decoded(incoming)
    }

    /// The next piece; `None` is the end of a body that came whole. May be dropped while it waits.
    pub(crate) async fn next(&mut self) -> Option<io::Result<Bytes>> {
        match self {
            Self::Plain(body) => body.next().await.map(|piece| piece.map_err(io::Error::other)),
            Self::Decoded(pieces) => pieces.recv().await,
            Self::Whole(bytes) if bytes.is_empty() => None,
            Self::Whole(bytes) => Some(Ok(bytes.split_to(bytes.len().min(PIECE_BYTES_MAX)))),
        }
    }
}

/// A body whose rest is read on for a while when nobody wants it: a sender that finds the connection broken does not read our answer.
struct Patient {
    body: Option<Body>,
    /// Its sender waits to be asked for it, and has not been.
    waits: bool,
}

/// Gives a request's body patience, whatever becomes of it.
pub(crate) async fn patient(request: Request) -> Request {
    let waits = request.headers().contains_key(EXPECT);
    request.map(|body| Body::new(Patient { body: Some(body), waits }))
}

impl HttpBody for Patient {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.waits = false;
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(SizeHint::default, HttpBody::size_hint)
    }
}

impl Drop for Patient {
    fn drop(&mut self) {
        let rest = self.body.take().filter(|body| !self.waits && !body.is_end_stream());
        if let (Some(body), Ok(runtime)) = (rest, Handle::try_current()) {
            runtime.spawn(drain(body.into_data_stream()));
        }
    }
}

/// Reads what is left of a body, for a while.
async fn drain(mut body: BodyDataStream) {
    let deadline = Instant::now() + DRAIN_TIMEOUT;
    let mut left = DRAIN_BYTES_MAX;
    while let Ok(Some(Ok(piece))) = timeout_at(deadline, body.next()).await {
        left = left.saturating_sub(piece.len() as u64);
        if left == 0 {
            return;
        }
    }
}

/// Hands the pieces of a body to a decoder.
async fn pass(mut body: BodyDataStream, raw: mpsc::Sender<io::Result<Bytes>>) {
    while let Some(piece) = body.next().await {
        if raw.send(piece.map_err(io::Error::other)).await.is_err() {
            return;
        }
    }
}

fn decode(raw: Pieces, coding: Coding, decoded: &mpsc::Sender<io::Result<Bytes>>) -> io::Result<()> {
    let mut decoder: Box<dyn Read> = match coding {
        Coding::Identity => Box::new(raw),
        Coding::Zstd => {
            let mut decoder = zstd::Decoder::new(raw)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
        Coding::Snappy => Box::new(snap::read::FrameDecoder::new(raw)),
    };
    loop {
        let mut piece = Vec::with_capacity(PIECE_BYTES_MAX);
        (&mut decoder).take(PIECE_BYTES_MAX as u64).read_to_end(&mut piece)?;
        if piece.is_empty() || decoded.blocking_send(Ok(piece.into())).is_err() {
            return Ok(());
        }
    }
}

/// The pieces of a body as a blocking reader.
struct Pieces {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !buf.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let count = buf.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buf[..count]);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use futures_util::stream;

    use super::*;

    /// Sends a body in pieces, and collects what comes out.
    async fn decoded(body: &[u8], coding: Coding) -> io::Result<Vec<u8>> {
        let pieces: Vec<_> = body.chunks(1000).map(|piece| Ok::<_, io::Error>(piece.to_vec())).collect();
        let mut incoming = Incoming::new(Body::from_stream(stream::iter(pieces)), coding);
        let mut all = Vec::new();
        while let Some(piece) = incoming.next().await {
            all.extend_from_slice(&piece?);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn what_was_coded_is_decoded_and_what_is_cut_short_is_an_error() {
        let data: Vec<u8> = (0..1_000_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        // Two frames, one behind the other, are one body.
        let (front, back) = data.split_at(data.len() / 2);
        let zstd = [zstd::encode_all(front, 1).unwrap(), zstd::encode_all(back, 1).unwrap()].concat();
        let mut encoder = snap::write::FrameEncoder::new(Vec::new());
        encoder.write_all(&data).unwrap();
        let snappy = encoder.into_inner().unwrap();
        for (coded, coding) in [(&data, Coding::Identity), (&zstd, Coding::Zstd), (&snappy, Coding::Snappy)] {
            assert!(decoded(coded, coding).await.unwrap() == data, "{coding:?}");
            if coding != Coding::Identity {
                assert!(decoded(&coded[..coded.len() - 5], coding).await.is_err(), "{coding:?}");
                assert!(decoded(b"no such thing", coding).await.is_err(), "{coding:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_window_that_takes_much_memory_is_refused() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(27).unwrap();
        encoder.write_all(&[0; 1 << 20]).unwrap();
        let coded = encoder.finish().unwrap();
        assert!(decoded(&coded, Coding::Zstd).await.is_err());
    }
}
