//! A TCP relay before the uploader, that counts what passes and breaks connections where it is told to.
#![allow(clippy::unwrap_used, reason = "test code: a failure is the report")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Bytes that pass at a time.
const PIECE_BYTES: usize = 64 << 10;
const HELD_TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Default)]
struct State {
    /// Bytes that clients sent, of all connections.
    sent: u64,
    /// Where connections break, in bytes sent, the next one last.
    cuts: Vec<u64>,
    /// No more than so many bytes pass.
    limit: Option<u64>,
    /// Connections that wait for the limit to be lifted.
    held: usize,
    /// Answers are not passed on, and break their connection, once so many bytes were sent.
    answers_cut_from: Option<u64>,
    upstream: Option<SocketAddr>,
}

/// Stands between clients and an uploader.
#[derive(Clone)]
pub struct Relay {
    address: SocketAddr,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl Relay {
    pub fn start(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Self { address: listener.local_addr().unwrap(), state: Arc::default() };
        relay.lead_to(upstream);
        let accepting = relay.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let relay = accepting.clone();
                std::thread::spawn(move || relay.pass(client));
            }
        });
        relay
    }

    /// Leads new connections there.
    pub fn lead_to(&self, upstream: SocketAddr) {
        self.state.0.lock().unwrap().upstream = Some(upstream);
    }

    pub fn url(&self) -> String {
        format!("http://{}/upload", self.address)
    }

    /// Bytes that clients sent.
    pub fn sent(&self) -> u64 {
        self.state.0.lock().unwrap().sent
    }

    /// Breaks connections when so many bytes were sent in all.
    pub fn cut_at(&self, cuts: &[u64]) {
        let mut cuts = cuts.to_vec();
        cuts.sort_by(|a, b| b.cmp(a));
        self.state.0.lock().unwrap().cuts = cuts;
    }

    /// Breaks the first connection that an answer comes on after so many bytes.
    pub fn cut_next_answer_after(&self, sent: u64) {
        self.state.0.lock().unwrap().answers_cut_from = Some(sent);
    }

    /// Lets no more than so many bytes pass.
    pub fn hold_after(&self, bytes: u64) {
        self.state.0.lock().unwrap().limit = Some(bytes);
    }

    /// Waits until a client has sent all that may pass, and wants to send more.
    pub fn wait_held(&self) {
        let (state, changed) = &*self.state;
        let waiting =
            changed.wait_timeout_while(state.lock().unwrap(), HELD_TIMEOUT, |state| state.held == 0);
        let (state, timeout) = waiting.unwrap();
        assert!(!timeout.timed_out(), "nobody is held; {} bytes were sent", state.sent);
    }

    pub fn release(&self) {
        self.state.0.lock().unwrap().limit = None;
        self.state.1.notify_all();
    }

    /// How many of these bytes may pass, and whether the connection breaks behind them.
    fn grant(&self, wanted: usize) -> (usize, bool) {
        let (state, changed) = &*self.state;
        let mut state = state.lock().unwrap();
        let room = loop {
            let room = state.limit.map_or(u64::MAX, |limit| limit.saturating_sub(state.sent));
            if room > 0 {
                break room;
            }
            state.held += 1;
            changed.notify_all();
            state = changed.wait(state).unwrap();
            state.held -= 1;
        };
        let mut granted = room.min(wanted as u64);
        let mut breaks = false;
        if let Some(cut) = state.cuts.last().copied().filter(|cut| state.sent + granted >= *cut) {
            state.cuts.pop();
            granted = cut.saturating_sub(state.sent);
            breaks = true;
        }
        state.sent += granted;
        (granted as usize, breaks)
    }

    fn pass(&self, client: TcpStream) {
        let upstream = self.state.0.lock().unwrap().upstream.unwrap();
        let Ok(server) = TcpStream::connect(upstream) else { return };
        let end = |client: &TcpStream, server: &TcpStream| {
            let _ = client.shutdown(Shutdown::Both);
            let _ = server.shutdown(Shutdown::Both);
        };
        let (relay, from, to) = (self.clone(), server.try_clone().unwrap(), client.try_clone().unwrap());
        let answers = std::thread::spawn(move || {
            let mut piece = vec![0; PIECE_BYTES];
            while let Ok(count @ 1..) = (&from).read(&mut piece) {
                let mut state = relay.state.0.lock().unwrap();
                if state.answers_cut_from.is_some_and(|from| state.sent >= from) {
                    state.answers_cut_from = None;
                    break;
                }
                drop(state);
                if (&to).write_all(&piece[..count]).is_err() {
                    break;
                }
            }
            end(&to, &from);
        });
        let mut piece = vec![0; PIECE_BYTES];
        'all: while let Ok(count @ 1..) = (&client).read(&mut piece) {
            let mut passed = 0;
            while passed < count {
                let (granted, breaks) = self.grant(count - passed);
                if (&server).write_all(&piece[passed..passed + granted]).is_err() || breaks {
                    break 'all;
                }
                passed += granted;
            }
        }
        end(&client, &server);
        let _ = answers.join();
    }
}
