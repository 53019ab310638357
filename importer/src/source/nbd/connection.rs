//! One connection to an export: the handshake, and then requests that overlap.
//!
//! ```text
//!  ask ──> requests ──> server          one task sends, so that who gives up leaves no half of a request behind
//!   │                      │
//!   └── waiting[cookie] <──┘            one task reads: replies come in any order, in one piece or in chunks
//! ```
//!
//! A connection that fails once has failed for good: who waits on it is told, and makes another.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::tls::Tls;
use super::wire::{self, Fields, Head, broken};

/// Longest option reply that is read, bytes; ours are a few words, and a message for people.
const OPTION_REPLY_BYTES_MAX: u32 = 64 << 10;
/// Most replies to one option.
const OPTION_REPLIES_MAX: usize = 64;
/// Longest handshake, milliseconds.
const HANDSHAKE_TIMEOUT_MS: u64 = 30_000;
/// Longest wait for the answer to a request, milliseconds.
const REPLY_TIMEOUT_MS: u64 = 60_000;
/// Longest chunk of block status, bytes: as many extents as servers send at once.
const STATUS_BYTES_MAX: u32 = 8 + (8 << 20);
/// Longest error chunk, bytes.
const ERROR_BYTES_MAX: u32 = 4 << 10;
/// Requests that may wait to be sent.
const REQUESTS_WAITING_MAX: usize = 16;

/// A connection's bytes, with TLS or without.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What the server says of the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Export {
    /// Bytes.
    pub(super) size: u64,
    /// Unit of requests, bytes: a power of two.
    pub(super) block_bytes: u32,
    /// Longest request, bytes.
    pub(super) request_bytes_max: u32,
    /// Whether it tells where zeros are.
    pub(super) tells_zeros: bool,
}

/// Why a request has no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// The connection is gone, or useless; another one may serve.
    Lost(io::Error),
    /// The server's own word on this request.
    Refused(io::Error),
}

/// A run that reads as zeros, or does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) len: u64,
    pub(super) is_zero: bool,
}

enum Answer {
    Data(Vec<u8>),
    Status(Vec<Run>),
}

struct Pending {
    start: u64,
    /// What was asked for; the data that came, or nothing yet.
    wanted: Answer,
    filled: usize,
    failure: Option<Failure>,
    answer: oneshot::Sender<Result<Answer, Failure>>,
}

#[derive(Default)]
struct Waiting {
    by_cookie: HashMap<u64, Pending>,
    is_over: bool,
}

/// An open export; the server is told when it is dropped.
pub(super) struct Connection {
    pub(super) export: Export,
    requests: mpsc::Sender<[u8; wire::REQUEST_BYTES]>,
    waiting: Arc<Mutex<Waiting>>,
    cookie: AtomicU64,
    reader: AbortHandle,
}

impl Connection {
    /// Negotiates the export `name` over a fresh connection.
    pub(super) async fn open(stream: Box<dyn Stream>, tls: Option<&Tls>, name: &str) -> io::Result<Self> {
        let limit = Duration::from_millis(HANDSHAKE_TIMEOUT_MS);
        let negotiated = timeout(limit, negotiate(stream, tls, name)).await;
        let (stream, export, context) = negotiated.map_err(|_| {
            let seconds = limit.as_secs();
            io::Error::new(io::ErrorKind::TimedOut, format!("the NBD server says nothing for {seconds} s"))
        })??;
        let (reader, writer) = tokio::io::split(stream);
        let waiting: Arc<Mutex<Waiting>> = Arc::default();
        let (requests, to_send) = mpsc::channel(REQUESTS_WAITING_MAX);
        tokio::spawn(send_requests(writer, to_send));
        let task = tokio::spawn(read_replies(reader, waiting.clone(), context));
        let (cookie, reader) = (AtomicU64::new(0), task.abort_handle());
        Ok(Self { export, requests, waiting, cookie, reader })
    }

    /// Reads `len` bytes, which the caller keeps inside of the export and its bounds for requests.
    pub(super) async fn read(&self, offset: u64, len: u32) -> Result<Vec<u8>, Failure> {
        let wanted = Answer::Data(vec![0; len as usize]);
        match self.ask(wire::CMD_READ, offset, len, wanted).await? {
            Answer::Data(bytes) => Ok(bytes),
            Answer::Status(_) => Err(Failure::Lost(broken("answers a read with block status"))),
        }
    }

    /// Asks for the runs from `offset` on, inside the next `len` bytes; at least one comes, the last may reach further.
    pub(super) async fn status(&self, offset: u64, len: u32) -> Result<Vec<Run>, Failure> {
        match self.ask(wire::CMD_BLOCK_STATUS, offset, len, Answer::Status(Vec::new())).await? {
            Answer::Status(runs) if !runs.is_empty() => Ok(runs),
            _ => Err(Failure::Lost(broken("answers block status without an extent"))),
        }
    }

    async fn ask(&self, command: u16, offset: u64, len: u32, wanted: Answer) -> Result<Answer, Failure> {
        let cookie = self.cookie.fetch_add(1, Ordering::Relaxed);
        let (tell, answer) = oneshot::channel();
        {
            let mut waiting = lock(&self.waiting);
            if waiting.is_over {
                return Err(Failure::Lost(io::ErrorKind::NotConnected.into()));
            }
            let pending = Pending { start: offset, wanted, filled: 0, failure: None, answer: tell };
            waiting.by_cookie.insert(cookie, pending);
        }
        let request = wire::request(command, cookie, offset, len);
        let exchange = async {
            let sent = self.requests.send(request).await;
            sent.map_err(|_| Failure::Lost(io::ErrorKind::BrokenPipe.into()))?;
            answer.await.unwrap_or_else(|_| Err(Failure::Lost(io::ErrorKind::ConnectionReset.into())))
        };
        let limit = Duration::from_millis(REPLY_TIMEOUT_MS);
        timeout(limit, exchange).await.unwrap_or_else(|_| {
            let text = format!("the NBD server does not answer within {} s", limit.as_secs());
            Err(Failure::Lost(io::Error::new(io::ErrorKind::TimedOut, text)))
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(|e| e.into_inner())
}

/// Sends requests until nobody makes any, then says goodbye. What cannot be sent is missed by who waits for the reply.
async fn send_requests(
    mut writer: WriteHalf<Box<dyn Stream>>,
    mut requests: mpsc::Receiver<[u8; wire::REQUEST_BYTES]>,
) {
    while let Some(request) = requests.recv().await {
        if writer.write_all(&request).await.is_err() || writer.flush().await.is_err() {
            return;
        }
    }
    // The server is free to be gone already.
    let _ = writer.write_all(&wire::request(wire::CMD_DISC, 0, 0, 0)).await;
    let _ = writer.shutdown().await;
}

/// Serves replies until there are no more; then nobody is left waiting.
async fn read_replies(
    mut reader: ReadHalf<Box<dyn Stream>>,
    waiting: Arc<Mutex<Waiting>>,
    context: Option<u32>,
) {
    let error = loop {
        if let Err(error) = read_reply(&mut reader, &waiting, context).await {
            break error;
        }
    };
    let mut waiting = lock(&waiting);
    waiting.is_over = true;
    for (_, pending) in waiting.by_cookie.drain() {
        pending.lost(&error);
    }
}

impl Pending {
    fn lost(self, error: &io::Error) {
        let again = io::Error::new(error.kind(), error.to_string());
        // Whoever asked may have given up.
        let _ = self.answer.send(Err(Failure::Lost(again)));
    }
}

async fn read_reply(
    reader: &mut ReadHalf<Box<dyn Stream>>,
    waiting: &Mutex<Waiting>,
    context: Option<u32>,
) -> io::Result<()> {
    let mut bytes = [0; wire::CHUNK_BYTES];
    reader.read_exact(&mut bytes[..4]).await?;
    let magic = [bytes[0], bytes[1], bytes[2], bytes[3]];
    let len = wire::head_bytes(magic)?;
    reader.read_exact(&mut bytes[4..len]).await?;
    let head = wire::head(&bytes[..len])?;
    let (Head::Simple { cookie, .. } | Head::Chunk { cookie, .. }) = head;
    let taken = lock(waiting).by_cookie.remove(&cookie);
    let mut pending = taken.ok_or_else(|| broken("answers what was not asked"))?;
    match take_in(reader, &mut pending, head, context).await {
        Ok(false) => {
            lock(waiting).by_cookie.insert(cookie, pending);
        }
        Ok(true) => {
            let outcome = pending.failure.map_or(Ok(pending.wanted), Err);
            let _ = pending.answer.send(outcome);
        }
        Err(error) => {
            pending.lost(&error);
            return Err(error);
        }
    }
    Ok(())
}

/// Takes in one reply; returns whether it was the last of its answer.
async fn take_in(
    reader: &mut ReadHalf<Box<dyn Stream>>,
    pending: &mut Pending,
    head: Head,
    context: Option<u32>,
) -> io::Result<bool> {
    let done = match head {
        Head::Simple { error: 0, .. } => {
            let Answer::Data(bytes) = &mut pending.wanted else {
                return Err(broken("answers block status without an extent"));
            };
            reader.read_exact(bytes).await?;
            pending.filled = bytes.len();
            true
        }
        Head::Simple { error, .. } => {
            pending.failure = Some(refusal(error, ""));
            true
        }
        Head::Chunk { kind, done, len, .. } => {
            read_chunk(reader, pending, kind, len, context).await?;
            done
        }
    };
    match &pending.wanted {
        Answer::Data(bytes) if done && pending.failure.is_none() && pending.filled != bytes.len() => {
            Err(broken(format!("sends {} of {} bytes that were asked for", pending.filled, bytes.len())))
        }
        _ => Ok(done),
    }
}

/// Takes in one chunk of an answer, whose payload has `len` bytes.
async fn read_chunk(
    reader: &mut ReadHalf<Box<dyn Stream>>,
    pending: &mut Pending,
    kind: u16,
    len: u32,
    context: Option<u32>,
) -> io::Result<()> {
    let start = pending.start;
    match (kind, &mut pending.wanted) {
        (wire::CHUNK_NONE, _) if len == 0 => {}
        (wire::CHUNK_OFFSET_DATA, Answer::Data(bytes)) => {
            let offset = reader.read_u64().await?;
            let data = len.checked_sub(8).ok_or_else(|| broken("sends a chunk too short for its offset"))?;
            let place = wire::place(start, bytes.len(), offset, data.into())?;
            reader.read_exact(&mut bytes[place]).await?;
            pending.filled += data as usize;
        }
        (wire::CHUNK_OFFSET_HOLE, Answer::Data(bytes)) if len == 12 => {
            let (offset, hole) = (reader.read_u64().await?, reader.read_u32().await?);
            let place = wire::place(start, bytes.len(), offset, hole.into())?;
            bytes[place].fill(0);
            pending.filled += hole as usize;
        }
        (wire::CHUNK_BLOCK_STATUS, Answer::Status(runs)) if len <= STATUS_BYTES_MAX => {
            let payload = read_payload(reader, len).await?;
            let mut fields = Fields(&payload);
            if Some(fields.u32()?) != context || !runs.is_empty() {
                return Err(broken("tells block status that was not asked for"));
            }
            while !fields.0.is_empty() {
                let (len, flags) = (u64::from(fields.u32()?), fields.u32()?);
                if len == 0 {
                    return Err(broken("tells of an extent without length"));
                }
                runs.push(Run { len, is_zero: flags & wire::STATE_ZERO != 0 });
            }
        }
        (kind, _) if kind & wire::CHUNK_ERROR != 0 && len <= ERROR_BYTES_MAX => {
            let payload = read_payload(reader, len).await?;
            let mut fields = Fields(&payload);
            let (error, message) = (fields.u32()?, usize::from(fields.u16()?));
            let message = fields.0.get(..message).ok_or_else(|| broken("sends less than it announced"))?;
            pending.failure = Some(refusal(error, &printable(message)));
        }
        (kind, _) => return Err(broken(format!("sends a chunk of type {kind} and {len} bytes"))),
    }
    // Data that come twice are no answer, and must not make one reply endless.
    match &pending.wanted {
        Answer::Data(bytes) if pending.filled > bytes.len() => Err(broken("sends more than was asked for")),
        _ => Ok(()),
    }
}

/// `len` is bounded by the caller.
async fn read_payload(reader: &mut (impl AsyncRead + Unpin), len: u32) -> io::Result<Vec<u8>> {
    let mut payload = vec![0; len as usize];
    reader.read_exact(&mut payload).await?;
    Ok(payload)
}

fn refusal(error: u32, message: &str) -> Failure {
    let text = format!("the NBD server answers: {} (error {error}) {message}", wire::errno(error));
    let why = io::Error::other(text.trim_end().to_owned());
    match error {
        wire::ESHUTDOWN => Failure::Lost(why),
        _ => Failure::Refused(why),
    }
}

/// A message of the server, as far as people shall see it.
fn printable(message: &[u8]) -> String {
    let text = String::from_utf8_lossy(message);
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// The handshake up to the transmission; the second is the id of the context that tells zeros.
async fn negotiate(
    mut stream: Box<dyn Stream>,
    tls: Option<&Tls>,
    name: &str,
) -> io::Result<(Box<dyn Stream>, Export, Option<u32>)> {
    if stream.read_u64().await? != wire::MAGIC || stream.read_u64().await? != wire::OPTION_MAGIC {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "there is no NBD server with options (newstyle) at that address",
        ));
    }
    let offered = stream.read_u16().await?;
    if offered & wire::FIXED_NEWSTYLE == 0 {
        return Err(broken("is too old: it does not offer the fixed newstyle handshake"));
    }
    let flags = offered & (wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
    stream.write_u32(flags.into()).await?;
    if let Some(tls) = tls {
        haggle(&mut stream, wire::OPT_STARTTLS, &[], |_, _| Ok(()))
            .await?
            .map_err(|refused| broken(format!("refuses TLS ({}); nbd:// asks for none", refused.text())))?;
        stream = tls.start(stream).await?;
    }
    let structured = haggle(&mut stream, wire::OPT_STRUCTURED_REPLY, &[], |_, _| Ok(())).await?;
    if let Err(Refused { kind: wire::REP_ERR_TLS_REQD, .. }) = structured {
        return Err(broken("wants TLS; write nbds:// in place of nbd://"));
    }
    let mut context = None;
    if structured.is_ok() {
        let wanted = wire::set_meta_context(name);
        // Without it nothing but the knowledge of zeros is missing.
        let _ = haggle(&mut stream, wire::OPT_SET_META_CONTEXT, &wanted, |kind, mut fields| {
            if kind == wire::REP_META_CONTEXT {
                let id = fields.u32()?;
                context = (fields.0 == wire::ALLOCATION.as_bytes()).then_some(id);
            }
            Ok(())
        })
        .await?;
    }
    let (mut size, mut block_bytes, mut request_bytes_max) = (None, 1, wire::REQUEST_BYTES_MAX);
    let wanted = wire::go(name);
    let went = haggle(&mut stream, wire::OPT_GO, &wanted, |kind, mut fields| {
        if kind != wire::REP_INFO {
            return Ok(());
        }
        match fields.u16()? {
            wire::INFO_EXPORT => size = Some(fields.u64()?),
            wire::INFO_BLOCK_SIZE => {
                block_bytes = fields.u32()?;
                let _preferred = fields.u32()?;
                request_bytes_max = fields.u32()?;
            }
            _ => {}
        }
        Ok(())
    });
    went.await?.map_err(|refused| match refused.kind {
        wire::REP_ERR_UNKNOWN => broken(format!("has no export {name:?}")),
        wire::REP_ERR_TLS_REQD => broken("wants TLS; write nbds:// in place of nbd://"),
        wire::REP_ERR_POLICY => broken(format!("does not give export {name:?} to this client")),
        _ => broken(format!("does not open export {name:?} ({})", refused.text())),
    })?;
    let size = size.ok_or_else(|| broken("does not tell the size of the export"))?;
    if !block_bytes.is_power_of_two() || block_bytes > 64 << 10 || request_bytes_max < block_bytes {
        return Err(broken(format!("wants requests of {block_bytes} to {request_bytes_max} bytes")));
    }
    let export = Export { size, block_bytes, request_bytes_max, tells_zeros: context.is_some() };
    Ok((stream, export, context))
}

/// An option that the server does not take.
struct Refused {
    kind: u32,
    message: String,
}

impl Refused {
    fn text(&self) -> String {
        let number = self.kind & !wire::REP_ERROR;
        format!("error {number}{}{}", if self.message.is_empty() { "" } else { ": " }, self.message)
    }
}

/// Sends one option, and hands its replies, but for the last, to `take`.
async fn haggle(
    stream: &mut Box<dyn Stream>,
    option: u32,
    data: &[u8],
    mut take: impl FnMut(u32, Fields<'_>) -> io::Result<()>,
) -> io::Result<Result<(), Refused>> {
    stream.write_all(&wire::option(option, data)).await?;
    stream.flush().await?;
    for _ in 0..OPTION_REPLIES_MAX {
        let mut head = [0; wire::OPTION_REPLY_BYTES];
        stream.read_exact(&mut head).await?;
        let (kind, len) = wire::option_reply(&head, option)?;
        if len > OPTION_REPLY_BYTES_MAX {
            return Err(broken(format!("answers option {option} with {len} bytes")));
        }
        let data = read_payload(stream, len).await?;
        match kind {
            wire::REP_ACK => return Ok(Ok(())),
            _ if kind & wire::REP_ERROR != 0 => {
                return Ok(Err(Refused { kind, message: printable(&data) }));
            }
            _ => take(kind, Fields(&data))?,
        }
    }
    Err(broken(format!("answers option {option} without end")))
}
