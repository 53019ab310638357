//! Requests and their answers.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use dvcr_converter::io::ReadAt;
use dvcr_converter::local::FileSource;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufWriter, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::super::ZEROS;
use super::super::connection::Stream;
use super::super::wire;
use super::handshake::Terms;
use super::wrong;

/// What is read and sent at a time, bytes.
const PIECE_BYTES: u32 = 1 << 20;
/// Pieces that are read ahead for one connection.
const PIECES_WAITING_MAX: usize = 4;
/// Shortest read by somebody who copies the disk, and does not come back for the same, bytes: it need not stay in the page cache.
const COPIED_BYTES_MIN: usize = 64 << 10;
/// Most extents in one answer.
const EXTENTS_MAX: usize = 4096;
/// Longest time without a request, milliseconds.
const IDLE_TIMEOUT_MS: u64 = 600_000;
/// Longest time for a piece to be sent, milliseconds.
const SEND_TIMEOUT_MS: u64 = 60_000;
/// Bytes of small answers that are sent together.
const BUFFER_BYTES: usize = 16 << 10;

/// A part of an answer.
struct Piece {
    cookie: u64,
    /// Whether it is the first of its answer, and the last.
    is_first: bool,
    is_last: bool,
    content: Content,
}

enum Content {
    Data(JoinHandle<io::Result<Vec<Part>>>),
    Status(JoinHandle<Vec<u8>>),
    Nothing,
    Refused(u32),
}

/// A run of what was asked for.
enum Part {
    Data(u64, Vec<u8>),
    Hole(u64, u32),
}

/// Answers requests until the client leaves.
pub(super) async fn transmit(stream: Box<dyn Stream>, disk: Arc<FileSource>, terms: Terms) -> io::Result<()> {
    let (reader, writer) = tokio::io::split(stream);
    let (pieces, waiting) = mpsc::channel(PIECES_WAITING_MAX);
    let answers =
        Answers { writer: BufWriter::with_capacity(BUFFER_BYTES, writer), terms, is_refused: false };
    tokio::try_join!(take_requests(reader, disk, terms, pieces), answers.send(waiting)).map(drop)
}

/// Begins to read what is asked for, as far ahead as there is room in `pieces`.
async fn take_requests(
    mut reader: ReadHalf<Box<dyn Stream>>,
    disk: Arc<FileSource>,
    terms: Terms,
    pieces: mpsc::Sender<Piece>,
) -> io::Result<()> {
    let mut bytes = [0; wire::REQUEST_BYTES];
    loop {
        let idle = Duration::from_millis(IDLE_TIMEOUT_MS);
        match timeout(idle, reader.read_exact(&mut bytes)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(wrong(format!("asks nothing for {} s", idle.as_secs()))),
        }
        let request = wire::parse_request(&bytes).ok_or_else(|| wrong("sends no request"))?;
        let whole = |content| Piece { cookie: request.cookie, is_first: true, is_last: true, content };
        let (start, len) = (request.offset, request.len);
        let fits = len > 0 && start.checked_add(len.into()).is_some_and(|end| end <= disk.len());
        let piece = match request.command {
            wire::CMD_DISC => return Ok(()),
            // Its data would have to be read to find the next request.
            wire::CMD_WRITE => return Err(wrong("writes to what can only be read")),
            wire::CMD_READ => match check_read(&request, fits, terms) {
                Some(error) => whole(Content::Refused(error)),
                None => {
                    if !read_ahead(&disk, &request, terms, &pieces).await {
                        return Ok(());
                    }
                    continue;
                }
            },
            wire::CMD_BLOCK_STATUS if terms.has_status && fits => {
                let (disk, only_one) = (disk.clone(), request.flags & wire::FLAG_REQ_ONE != 0);
                whole(Content::Status(tokio::task::spawn_blocking(move || {
                    status(&disk, start, len, if only_one { 1 } else { EXTENTS_MAX })
                })))
            }
            wire::CMD_FLUSH => whole(Content::Nothing),
            wire::CMD_TRIM | wire::CMD_WRITE_ZEROES => whole(Content::Refused(wire::EPERM)),
            _ => whole(Content::Refused(wire::EINVAL)),
        };
        if pieces.send(piece).await.is_err() {
            return Ok(());
        }
    }
}

/// The error of a read that cannot be served.
fn check_read(request: &wire::Request, fits: bool, terms: Terms) -> Option<u32> {
    let is_whole = request.flags & wire::FLAG_DF != 0;
    if !fits || request.len > wire::REQUEST_BYTES_MAX || is_whole && !terms.is_structured {
        return Some(wire::EINVAL);
    }
    // One chunk would have to be held as a whole (protocol, NBD_CMD_FLAG_DF).
    (is_whole && request.len > PIECE_BYTES).then_some(wire::EOVERFLOW)
}

/// Begins to read the pieces of a request; tells whether somebody takes them.
async fn read_ahead(
    disk: &Arc<FileSource>,
    request: &wire::Request,
    terms: Terms,
    pieces: &mpsc::Sender<Piece>,
) -> bool {
    let may_skip = terms.is_structured && request.flags & wire::FLAG_DF == 0;
    let mut done = 0;
    while done < request.len {
        let (start, len) = (request.offset + u64::from(done), PIECE_BYTES.min(request.len - done));
        let is_first = done == 0;
        done += len;
        // First the place, then the memory.
        let Ok(place) = pieces.reserve().await else { return false };
        let disk = disk.clone();
        let read = tokio::task::spawn_blocking(move || read(&disk, start, len, may_skip));
        let is_last = done == request.len;
        place.send(Piece { cookie: request.cookie, is_first, is_last, content: Content::Data(read) });
    }
    true
}

fn read(disk: &FileSource, start: u64, len: u32, may_skip: bool) -> io::Result<Vec<Part>> {
    let (mut parts, mut at, end) = (Vec::new(), start, start + u64::from(len));
    while at < end {
        let extent = disk.extent_at(at).filter(|_| may_skip);
        let to = extent.map_or(end, |extent| extent.end().min(end));
        let n = (to - at) as u32;
        if extent.is_some_and(|extent| !extent.is_data()) {
            parts.push(Part::Hole(at, n));
        } else {
            let mut data = vec![0; n as usize];
            disk.read_exact_at(&mut data, at)?;
            if data.len() >= COPIED_BYTES_MIN {
                disk.forget(at, n.into());
            }
            let is_zero = may_skip && data == ZEROS[..data.len()];
            parts.push(if is_zero { Part::Hole(at, n) } else { Part::Data(at, data) });
        }
        at = to;
    }
    Ok(parts)
}

/// The payload of block status: the runs from `start` on, inside of `len` bytes.
fn status(disk: &FileSource, start: u64, len: u32, extents_max: usize) -> Vec<u8> {
    let mut payload = wire::CONTEXT_ID.to_be_bytes().to_vec();
    let (mut at, end, mut extents) = (start, start + u64::from(len), 0);
    while at < end && extents < extents_max {
        let extent = disk.extent_at(at);
        let to = extent.map_or(end, |extent| extent.end().min(end));
        let is_hole = extent.is_some_and(|extent| !extent.is_data());
        let state = if is_hole { wire::STATE_HOLE | wire::STATE_ZERO } else { 0 };
        payload.extend(((to - at) as u32).to_be_bytes());
        payload.extend(state.to_be_bytes());
        (at, extents) = (to, extents + 1);
    }
    payload
}

struct Answers {
    writer: BufWriter<WriteHalf<Box<dyn Stream>>>,
    terms: Terms,
    /// Whether the present answer has ended with an error before its last piece.
    is_refused: bool,
}

impl Answers {
    async fn send(mut self, mut pieces: mpsc::Receiver<Piece>) -> io::Result<()> {
        let limit = Duration::from_millis(SEND_TIMEOUT_MS);
        while let Some(piece) = pieces.recv().await {
            let Piece { cookie, is_first, is_last, content } = piece;
            let content = match content {
                Content::Data(read) => read.await.map_err(io::Error::other)?.map_or_else(
                    |error| {
                        tracing::error!(%error, "the disk cannot be read");
                        Err(wire::EIO)
                    },
                    Ok,
                ),
                Content::Status(told) => {
                    let payload = told.await.map_err(io::Error::other)?;
                    let head = wire::chunk(wire::CHUNK_BLOCK_STATUS, true, cookie, payload.len() as u32);
                    timeout(limit, self.put(&[&head, &payload])).await??;
                    continue;
                }
                Content::Nothing => Ok(Vec::new()),
                Content::Refused(error) => Err(error),
            };
            let sent = async {
                match self.terms.is_structured {
                    true => self.send_chunks(cookie, is_last, content).await,
                    false => self.send_simple(cookie, is_first, content).await,
                }
            };
            timeout(limit, sent).await??;
        }
        self.writer.shutdown().await
    }

    async fn send_chunks(
        &mut self,
        cookie: u64,
        is_last: bool,
        content: Result<Vec<Part>, u32>,
    ) -> io::Result<()> {
        let parts = match content {
            Ok(parts) => parts,
            Err(error) => {
                let head = wire::chunk(wire::CHUNK_ERROR | 1, is_last, cookie, 6);
                return self.put(&[&head, &error.to_be_bytes(), &[0; 2]]).await;
            }
        };
        if parts.is_empty() {
            return self.put(&[&wire::chunk(wire::CHUNK_NONE, true, cookie, 0)]).await;
        }
        let count = parts.len();
        for (n, part) in parts.into_iter().enumerate() {
            let is_done = is_last && n + 1 == count;
            match part {
                Part::Data(offset, data) => {
                    let head = wire::chunk(wire::CHUNK_OFFSET_DATA, is_done, cookie, 8 + data.len() as u32);
                    self.put(&[&head, &offset.to_be_bytes(), &data]).await?;
                }
                Part::Hole(offset, len) => {
                    let head = wire::chunk(wire::CHUNK_OFFSET_HOLE, is_done, cookie, 12);
                    self.put(&[&head, &offset.to_be_bytes(), &len.to_be_bytes()]).await?;
                }
            }
        }
        Ok(())
    }

    async fn send_simple(
        &mut self,
        cookie: u64,
        is_first: bool,
        content: Result<Vec<Part>, u32>,
    ) -> io::Result<()> {
        match content {
            Err(error) if is_first => {
                self.is_refused = true;
                self.put(&[&wire::simple(error, cookie)]).await
            }
            _ if self.is_refused && !is_first => Ok(()),
            // The answer was begun as a good one.
            Err(_) => Err(io::Error::other("the disk cannot be read")),
            Ok(parts) => {
                self.is_refused = false;
                if is_first {
                    self.writer.write_all(&wire::simple(0, cookie)).await?;
                }
                for part in &parts {
                    // There are no others where there are no chunks.
                    if let Part::Data(_, data) = part {
                        self.writer.write_all(data).await?;
                    }
                }
                self.writer.flush().await
            }
        }
    }

    async fn put(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        for part in parts {
            self.writer.write_all(part).await?;
        }
        self.writer.flush().await
    }
}
