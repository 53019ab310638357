//! A line with a delay and a rate: what is sent in at one end comes out at the other so much later, and no faster.
//!
//! It stands for a long line where the kernel has no netem. Connections share the rate, one for each direction; a
//! connection's first bytes come a round trip later, as its handshake would take that long.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Bytes that travel together.
const PART_BYTES: usize = 64 << 10;
/// Parts on the line in one direction of a connection: more than the line holds, so that it is never idle for want of them.
const PARTS_MAX: usize = 128;

/// The near end of a line to a server.
pub struct Relay {
    pub addr: SocketAddr,
}

/// One direction of a line.
struct Line {
    delay: Duration,
    bytes_per_second: f64,
    /// When everything that was sent so far has passed the narrow place.
    free: Mutex<Instant>,
}

impl Relay {
    /// Leads to `server`; every byte takes `delay` each way. Lives as long as the program.
    pub fn start(server: SocketAddr, delay: Duration, bytes_per_second: f64) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let addr = listener.local_addr()?;
        let line = || Arc::new(Line { delay, bytes_per_second, free: Mutex::new(Instant::now()) });
        let (there, back) = (line(), line());
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(server) else { continue };
                let ends = (near.try_clone(), far.try_clone());
                let (Ok(near_again), Ok(far_again)) = ends else { continue };
                let _ = (near.set_nodelay(true), far.set_nodelay(true));
                carry(near, far, there.clone(), delay * 2);
                carry(far_again, near_again, back.clone(), Duration::ZERO);
            }
        });
        Ok(Self { addr })
    }
}

fn carry(mut from: TcpStream, to: TcpStream, line: Arc<Line>, handshake: Duration) {
    let (sender, parts) = sync_channel(PARTS_MAX);
    let opened = Instant::now() + handshake;
    let sending = line.clone();
    std::thread::spawn(move || {
        let mut buf = vec![0; PART_BYTES];
        while let Ok(count @ 1..) = from.read(&mut buf) {
            let due = sending.pass(count).max(opened + sending.delay);
            if sender.send((due, buf[..count].to_vec())).is_err() {
                return;
            }
        }
    });
    std::thread::spawn(move || deliver(&parts, to));
}

fn deliver(parts: &Receiver<(Instant, Vec<u8>)>, mut to: TcpStream) {
    while let Ok((due, bytes)) = parts.recv() {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&bytes).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

impl Line {
    /// When bytes that are sent now come out.
    fn pass(&self, bytes: usize) -> Instant {
        let mut free = self.free.lock().unwrap_or_else(|e| e.into_inner());
        let took = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
        *free = (*free).max(Instant::now()) + took;
        *free + self.delay
    }
}
