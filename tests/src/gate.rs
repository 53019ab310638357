//! A way to a server that can be closed in the middle.

use anyhow::Result;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

/// Passes connections on to a server, and the server's bytes back as far as it is open. It lives as long as the test program.
#[derive(Clone, Debug)]
pub struct Gate {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Bytes of the server that may still pass; the connections that want more wait.
    left: u64,
    waiting: usize,
    /// What is passed at once before the connection is cut, if connections are.
    cut_after: Option<u64>,
    cuts: u64,
    passed: u64,
}

impl Gate {
    /// Lets `left` bytes of the server pass, and holds what comes then.
    pub fn to(server: SocketAddr, left: u64) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = State { left, waiting: 0, cut_after: None, cuts: 0, passed: 0 };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let gate = Self { address, shared: shared.clone() };
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = shared.clone();
                // A connection that breaks is one that is over.
                thread::spawn(move || {
                    let _ = shared.connect(&client, server);
                    let _ = client.shutdown(Shutdown::Both);
                });
            }
        });
        Ok(gate)
    }

    /// Where clients go instead of to the server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until a connection waits for the gate to open.
    pub fn wait_held(&self) {
        let state = self.shared.lock();
        drop(self.shared.changed.wait_while(state, |state| state.waiting == 0));
    }

    /// Lets everything pass, and cuts no more connections.
    pub fn open(&self) {
        let mut state = self.shared.lock();
        (state.left, state.cut_after) = (u64::MAX, None);
        self.shared.changed.notify_all();
    }

    /// Cuts each connection after so many bytes of the server, from now on.
    pub fn cut_after(&self, bytes: u64) {
        self.shared.lock().cut_after = Some(bytes);
    }

    /// Connections that were cut so far.
    pub fn cuts(&self) -> u64 {
        self.shared.lock().cuts
    }

    /// Bytes of the server that passed so far.
    pub fn passed(&self) -> u64 {
        self.shared.lock().passed
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connect(&self, client: &TcpStream, server: SocketAddr) -> std::io::Result<()> {
        let server = TcpStream::connect(server)?;
        let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
        thread::spawn(move || {
            let _ = std::io::copy(&mut from_client, &mut to_server);
            let _ = to_server.shutdown(Shutdown::Both);
        });
        self.pass(server, client)
    }

    fn pass(&self, mut server: TcpStream, mut client: &TcpStream) -> std::io::Result<()> {
        let mut buf = vec![0; 16 << 10];
        let mut sent = 0;
        loop {
            let n = server.read(&mut buf)?;
            if n == 0 {
                return Ok(());
            }
            let mut state = self.lock();
            state.waiting += 1;
            self.changed.notify_all();
            state = self
                .changed
                .wait_while(state, |state| state.left < n as u64)
                .unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
            if state.cut_after.is_some_and(|most| sent + n as u64 > most) {
                state.cuts += 1;
                return server.shutdown(Shutdown::Both);
            }
            state.left -= if state.left == u64::MAX { 0 } else { n as u64 };
            state.passed += n as u64;
            drop(state);
            sent += n as u64;
            client.write_all(&buf[..n])?;
        }
    }
}
