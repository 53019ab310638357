//! A relay before an HTTP server that counts what passes, and treats it as a bad network or a sick server would.
//!
//! One request goes by each connection: heads are read, and bodies pass as they are, so that "behind so many bytes" is an exact
//! place. Bytes of bodies are counted, of both directions and of all connections together.

use anyhow::{Context, Result, anyhow};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes that pass at a time.
const PIECE_BYTES: usize = 16 << 10;
/// Longest head of a request or an answer, bytes.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Of an answer, the length of which is falsified: longer ones are images, shorter ones are what protocols say.
const FALSIFIED_BYTES_MIN: u64 = 1 << 20;
/// How much the system keeps of a connection in either direction, bytes: what is lost when one breaks.
const SOCKET_BUFFER_BYTES: usize = 64 << 10;
const HELD_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a client may take to close a connection that was answered.
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);

/// A request, for those who decide what becomes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requested {
    pub method: String,
    /// With the query.
    pub path: String,
}

/// An answer that the server never heard of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    pub header: (&'static str, String),
}

impl Reply {
    /// Tells a client to come back after so many seconds.
    pub fn later(status: u16, seconds: u32) -> Self {
        Self { status, header: ("Retry-After", seconds.to_string()) }
    }

    /// Sends a client to where it is.
    pub fn back_to(requested: &Requested) -> Self {
        Self { status: 307, header: ("Location", requested.path.clone()) }
    }
}

type Rule = Box<dyn FnMut(&Requested) -> Option<Reply> + Send>;

/// A running relay on a free port of 127.0.0.1; its connections end with it, or by themselves.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Relay {
    /// Stands before `server`.
    pub fn start(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("no free port on 127.0.0.1")?;
        let socket = socket2::SockRef::from(&listener);
        // Inherited by the connections.
        socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
        socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
        let address = listener.local_addr()?;
        let state = State {
            server,
            passed: 0,
            pushed: 0,
            cut: None,
            flip: None,
            limit: u64::MAX,
            held: 0,
            pace: None,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            rule: Mutex::new(Box::new(|_| None)),
            length_error: Mutex::new(0),
        });
        let accepting = Arc::downgrade(&shared);
        std::thread::Builder::new().name("relay".into()).spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Some(shared) = accepting.upgrade() else { return };
                std::thread::spawn(move || shared.serve(&client));
            }
        })?;
        Ok(Self { address, shared })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns `http://127.0.0.1:PORT/PATH`.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }

    /// Leads new connections to another server.
    pub fn lead_to(&self, server: SocketAddr) {
        self.shared.lock().server = server;
    }

    /// Returns how many bytes of bodies passed.
    pub fn passed(&self) -> u64 {
        self.shared.lock().passed
    }

    /// Returns how many of these were in requests.
    pub fn pushed(&self) -> u64 {
        self.shared.lock().pushed
    }

    /// Breaks the connection that carries the byte `position` of all that pass, before it. Once.
    pub fn cut_at(&self, position: u64) {
        self.shared.lock().cut = Some(position);
    }

    /// Tells whether a connection was broken as [`Relay::cut_at`] said.
    pub fn has_cut(&self) -> bool {
        self.shared.lock().cut.is_none()
    }

    /// Changes a bit of the byte `position` of all that pass. Once.
    pub fn flip_at(&self, position: u64) {
        self.shared.lock().flip = Some(position);
    }

    /// Lets no more than so many bytes pass in all, until [`Relay::release`].
    pub fn hold_at(&self, position: u64) {
        self.shared.lock().limit = position;
    }

    /// Waits until all passed that may, and more wants to.
    pub fn wait_held(&self) -> Result<()> {
        let state = self.shared.lock();
        let waited = self.shared.changed.wait_timeout_while(state, HELD_TIMEOUT, |state| state.held == 0);
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        match timeout.timed_out() {
            true => Err(anyhow!("nobody is held; {} bytes passed", state.passed)),
            false => Ok(()),
        }
    }

    pub fn release(&self) {
        self.shared.lock().limit = u64::MAX;
        self.shared.changed.notify_all();
    }

    /// Makes each connection as slow as so many bytes per second; `None` as quick as it can be.
    pub fn pace(&self, bytes_per_second: Option<u64>) {
        self.shared.lock().pace = bytes_per_second;
    }

    /// Answers what `rule` has a reply for; the server gets the rest.
    pub fn rule(&self, rule: impl FnMut(&Requested) -> Option<Reply> + Send + 'static) {
        *self.shared.rule.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(rule);
    }

    /// Adds so much to the length that is announced of images that are answered; their bodies stay as they are.
    pub fn falsify_length(&self, by: u64) {
        *self.shared.length_error.lock().unwrap_or_else(PoisonError::into_inner) = by;
    }
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    rule: Mutex<Rule>,
    length_error: Mutex<u64>,
}

#[derive(Debug)]
struct State {
    server: SocketAddr,
    passed: u64,
    pushed: u64,
    cut: Option<u64>,
    flip: Option<u64>,
    limit: u64,
    held: usize,
    pace: Option<u64>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("state", &self.state).finish_non_exhaustive()
    }
}

/// In a request, or in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Push,
    Pull,
}

/// What may pass of a piece.
struct Grant {
    bytes: usize,
    /// The connection breaks behind it.
    breaks: bool,
    wait: Duration,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the beginning of `piece` pass, and waits while nothing may.
    fn grant(&self, piece: &mut [u8], way: Way) -> Grant {
        let mut state = self.lock();
        while state.passed >= state.limit {
            state.held += 1;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.held -= 1;
        }
        let begin = state.passed;
        let mut end = state.limit.min(begin + piece.len() as u64);
        let cut = state.cut.filter(|cut| *cut < end);
        if let Some(cut) = cut {
            state.cut = None;
            end = cut.max(begin);
        }
        let flip = state.flip.filter(|flip| (begin..end).contains(flip));
        if let Some(flip) = flip {
            state.flip = None;
            piece[(flip - begin) as usize] ^= 1;
        }
        state.passed = end;
        if way == Way::Push {
            state.pushed += end - begin;
        }
        let bytes = (end - begin) as usize;
        let wait =
            state.pace.map_or(Duration::ZERO, |pace| Duration::from_secs(1) * bytes as u32 / pace as u32);
        Grant { bytes, breaks: cut.is_some(), wait }
    }

    /// Passes on what comes until it ends; false if the connection broke on purpose, or `to` takes no more.
    fn pass(&self, mut from: &TcpStream, mut to: &TcpStream, first: Vec<u8>, way: Way) -> bool {
        let mut piece = vec![0; PIECE_BYTES];
        let mut next = first;
        loop {
            let mut passed = 0;
            while passed < next.len() {
                let Grant { bytes, breaks, wait } = self.grant(&mut next[passed..], way);
                if to.write_all(&next[passed..passed + bytes]).is_err() {
                    return false;
                }
                if breaks {
                    let _ = to.shutdown(Shutdown::Both);
                    let _ = from.shutdown(Shutdown::Both);
                    return false;
                }
                std::thread::sleep(wait);
                passed += bytes;
            }
            match from.read(&mut piece) {
                Ok(count @ 1..) => next = piece[..count].to_vec(),
                _ => return true,
            }
        }
    }

    fn serve(self: &Arc<Self>, client: &TcpStream) {
        let Some((head, first)) = read_head(client) else { return };
        let mut words = head.split(' ');
        let (Some(method), Some(path)) = (words.next(), words.next()) else { return };
        let requested = Requested { method: method.to_owned(), path: path.to_owned() };
        let reply = (self.rule.lock().unwrap_or_else(PoisonError::into_inner))(&requested);
        if let Some(reply) = reply {
            return self.answer(client, &head, first.len() as u64, &reply);
        }
        let server = self.lock().server;
        let Ok(server) = TcpStream::connect(server) else { return };
        let _ = socket2::SockRef::from(&server).set_send_buffer_size(SOCKET_BUFFER_BYTES);
        if (&server).write_all(closing(&head).as_bytes()).is_err() {
            return;
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                if let Some((head, first)) = read_head(&server) {
                    let by = *self.length_error.lock().unwrap_or_else(PoisonError::into_inner);
                    let head = falsified(&closing(&head), by);
                    let _ = (&*client).write_all(head.as_bytes());
                    self.pass(&server, client, first, Way::Pull);
                    let _ = client.set_read_timeout(Some(LINGER_TIMEOUT));
                    let _ = client.shutdown(Shutdown::Write);
                } else {
                    let _ = client.shutdown(Shutdown::Both);
                }
            });
            if self.pass(client, &server, first, Way::Push) {
                let _ = server.shutdown(Shutdown::Write);
            } else {
                // A server that answers before it has read all must be heard.
                drain(client, u64::MAX);
            }
        });
    }

    /// Answers in place of the server, when the request has come.
    fn answer(&self, mut client: &TcpStream, head: &str, come: u64, reply: &Reply) {
        let length = header(head, "content-length").and_then(|text| text.parse().ok()).unwrap_or(0u64);
        {
            let mut state = self.lock();
            state.passed += length;
            state.pushed += length;
        }
        drain(client, length.saturating_sub(come));
        let (name, value) = &reply.header;
        let status = reply.status;
        let text = format!(
            "HTTP/1.1 {status} Relay\r\n{name}: {value}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        let _ = client.write_all(text.as_bytes());
        let _ = client.shutdown(Shutdown::Write);
        let _ = client.set_read_timeout(Some(LINGER_TIMEOUT));
        drain(client, u64::MAX);
    }
}

/// Reads and forgets so many bytes.
fn drain(mut from: &TcpStream, bytes: u64) {
    let mut piece = vec![0; PIECE_BYTES];
    let mut left = bytes;
    while left > 0 {
        let room = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        match from.read(&mut piece[..room]) {
            Ok(count @ 1..) => left -= count as u64,
            _ => return,
        }
    }
}

/// Reads a head with the empty line behind it, and what came of the body with it.
fn read_head(mut from: &TcpStream) -> Option<(String, Vec<u8>)> {
    let (mut bytes, mut piece) = (Vec::new(), vec![0; PIECE_BYTES]);
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let body = bytes.split_off(end + 4);
            return Some((String::from_utf8(bytes).ok()?, body));
        }
        let count = from.read(&mut piece).ok().filter(|count| *count > 0 && bytes.len() < HEAD_BYTES_MAX)?;
        bytes.extend_from_slice(&piece[..count]);
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// The head with each line as `change` makes it.
fn with_lines(head: &str, change: impl Fn(&str) -> Option<String>) -> String {
    let lines = head.split("\r\n").take_while(|line| !line.is_empty());
    lines.filter_map(change).map(|line| line + "\r\n").collect::<String>() + "\r\n"
}

/// The same head of a connection that ends behind its body.
fn closing(head: &str) -> String {
    let is_connection = |line: &str| line.to_ascii_lowercase().starts_with("connection:");
    let head = with_lines(head, |line| (!is_connection(line)).then(|| line.to_owned()));
    head[..head.len() - 2].to_owned() + "Connection: close\r\n\r\n"
}

/// The same head with another length of a long body.
fn falsified(head: &str, by: u64) -> String {
    with_lines(head, |line| {
        let length = header(line, "content-length").and_then(|text| text.parse::<u64>().ok());
        Some(match length.filter(|length| *length >= FALSIFIED_BYTES_MIN) {
            Some(length) => format!("Content-Length: {}", length + by),
            None => line.to_owned(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FileServer, cmd, run, run_output, temp_dir};

    #[test]
    fn what_passes_is_counted_and_broken_at_the_byte() {
        let dir = temp_dir();
        let data = crate::fixture::Noise::new(1).bytes(3 << 20);
        std::fs::write(dir.path().join("data"), &data).unwrap();
        let server = FileServer::start(dir.path()).unwrap();
        let relay = Relay::start(server.address()).unwrap();
        let target = dir.path().join("copy");
        let curl = cmd("curl", ["-sS", "-f", "-o", target.to_str().unwrap(), &relay.url("data")]);
        run(&curl).unwrap();
        assert_eq!((relay.passed(), std::fs::read(&target).unwrap() == data), (3 << 20, true));

        relay.cut_at((3 << 20) + 1_000_001);
        assert!(!run_output(&curl).unwrap().status.success());
        assert_eq!((relay.passed(), relay.has_cut()), ((3 << 20) + 1_000_001, true));
        assert!(std::fs::read(&target).unwrap() == data[..1_000_001]);

        relay.flip_at(relay.passed() + 5);
        run(&curl).unwrap();
        let differing =
            std::fs::read(&target).unwrap().into_iter().zip(&data).filter(|(a, b)| a != *b).count();
        assert_eq!(differing, 1);

        relay.falsify_length(10);
        assert!(!run_output(&curl).unwrap().status.success());
        let mut first = true;
        relay.falsify_length(0);
        relay.rule(move |_| std::mem::take(&mut first).then(|| Reply::later(503, 1)));
        assert!(run_output(&curl).unwrap().stderr.contains("503"));
        run(&curl).unwrap();
        relay.rule(|requested| Some(Reply::back_to(requested)));
        let told = run_output(&cmd("curl", ["-sSL", &relay.url("data")])).unwrap();
        assert!(told.stderr.contains("redirects"), "{}", told.stderr);
    }
}
