//! What clients that are old, hurried or hostile get of the NBD server, byte by byte.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

use std::path::PathBuf;
use std::sync::Arc;

use dvcr_converter::local::FileSource;
use dvcr_importer::source::nbd::server::{Listener, serve};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

const SIZE: usize = 3 << 20;
const MAGIC: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
const READ: u16 = 0;

struct Server {
    socket: PathBuf,
    bytes: Vec<u8>,
    _dir: TempDir,
}

impl Server {
    /// Data, a hole, and data.
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (socket, disk) = (dir.path().join("socket"), dir.path().join("disk"));
        let mut bytes: Vec<u8> = (0..SIZE).map(|n| (n % 251) as u8).collect();
        bytes[1 << 20..2 << 20].fill(0);
        let file = std::fs::File::create(&disk).unwrap();
        file.set_len(SIZE as u64).unwrap();
        for at in [0, 2 << 20] {
            std::os::unix::fs::FileExt::write_all_at(&file, &bytes[at..at + (1 << 20)], at as u64).unwrap();
        }
        let listener = Listener::Unix(UnixListener::bind(&socket).unwrap());
        let source = Arc::new(FileSource::open(&disk).unwrap());
        tokio::spawn(serve(listener, source, None, std::future::pending()));
        Self { socket, bytes, _dir: dir }
    }

    async fn connect(&self, flags: u32) -> Client {
        let mut client = Client(UnixStream::connect(&self.socket).await.unwrap());
        assert_eq!(client.take(18).await, MAGIC);
        client.0.write_u32(flags).await.unwrap();
        client
    }

    /// A client that has the export by the oldest option.
    async fn plain(&self) -> Client {
        let mut client = self.connect(3).await;
        client.option(1, b"").await;
        assert_eq!(client.take(8).await, (SIZE as u64).to_be_bytes());
        client.take(2).await;
        client
    }
}

struct Client(UnixStream);

impl Client {
    async fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    async fn option(&mut self, option: u32, data: &[u8]) {
        let head = [&b"IHAVEOPT"[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes()].concat();
        self.send(&[&head, data].concat()).await;
    }

    /// Type and data of a reply.
    async fn replied(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(self.0.read_u64().await.unwrap(), 0x0003_e889_0455_65a9);
        assert_eq!(self.0.read_u32().await.unwrap(), option);
        let (kind, len) = (self.0.read_u32().await.unwrap(), self.0.read_u32().await.unwrap());
        (kind, self.take(len as usize).await)
    }

    async fn request(&mut self, flags: u16, command: u16, cookie: u64, offset: u64, len: u32) {
        let magic = 0x2560_9513_u32.to_be_bytes();
        let head = [&magic[..], &flags.to_be_bytes(), &command.to_be_bytes(), &cookie.to_be_bytes()].concat();
        self.send(&[&head[..], &offset.to_be_bytes(), &len.to_be_bytes()].concat()).await;
    }

    /// The error of a simple reply.
    async fn simple(&mut self, cookie: u64) -> u32 {
        assert_eq!(self.0.read_u32().await.unwrap(), 0x6744_6698);
        let error = self.0.read_u32().await.unwrap();
        assert_eq!(self.0.read_u64().await.unwrap(), cookie);
        error
    }

    /// Flags, type and payload of a chunk.
    async fn chunk(&mut self, cookie: u64) -> (u16, u16, Vec<u8>) {
        assert_eq!(self.0.read_u32().await.unwrap(), 0x668e_33ef);
        let (flags, kind) = (self.0.read_u16().await.unwrap(), self.0.read_u16().await.unwrap());
        assert_eq!(self.0.read_u64().await.unwrap(), cookie);
        let len = self.0.read_u32().await.unwrap();
        (flags, kind, self.take(len as usize).await)
    }

    /// Whether the server has left, without another byte.
    async fn is_left(&mut self) -> bool {
        !matches!(self.0.read(&mut [0]).await, Ok(1..))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_clients_are_served_by_simple_replies() {
    let server = Server::start();
    let mut client = server.connect(1).await;
    client.option(1, b"whatever").await;
    assert_eq!(client.take(8).await, (SIZE as u64).to_be_bytes());
    let flags = client.0.read_u16().await.unwrap();
    assert_eq!(flags & 3, 3, "flags are there, and it can only be read");
    assert_eq!(client.take(124).await, [0; 124]);
    client.request(0, READ, 5, 100, SIZE as u32 - 200).await;
    assert_eq!(client.simple(5).await, 0);
    assert!(client.take(SIZE - 200).await == server.bytes[100..SIZE - 100]);
    client.request(0, 3, 6, 0, 0).await;
    assert_eq!(client.simple(6).await, 0, "flush");
    client.request(0, 2, 7, 0, 0).await;
    assert!(client.is_left().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_tell_holes_and_one_chunk_is_had_by_asking() {
    let server = Server::start();
    let mut client = server.connect(3).await;
    client.option(8, b"").await;
    assert_eq!(client.replied(8).await, (1, vec![]));
    let queries = [&[0; 4][..], &1u32.to_be_bytes(), &15u32.to_be_bytes(), b"base:allocation"].concat();
    client.option(10, &queries).await;
    assert_eq!(client.replied(10).await, (4, [&1u32.to_be_bytes()[..], b"base:allocation"].concat()));
    assert_eq!(client.replied(10).await.0, 1);
    client.option(7, &[0; 6]).await;
    assert_eq!(client.replied(7).await.1[..10], [&[0; 2][..], &(SIZE as u64).to_be_bytes()].concat());
    assert_eq!(client.replied(7).await.1[..2], [0, 3]);
    assert_eq!(client.replied(7).await.0, 1);

    client.request(0, READ, 1, 0, SIZE as u32).await;
    let (mut disk, mut holes) = (vec![9; SIZE], 0);
    loop {
        let (flags, kind, payload) = client.chunk(1).await;
        let at = u64::from_be_bytes(payload[..8].try_into().unwrap()) as usize;
        match kind {
            1 => disk[at..at + payload.len() - 8].copy_from_slice(&payload[8..]),
            2 => {
                let len = u32::from_be_bytes(payload[8..].try_into().unwrap()) as usize;
                disk[at..at + len].fill(0);
                holes += len;
            }
            other => panic!("chunk {other}"),
        }
        if flags & 1 != 0 {
            break;
        }
    }
    assert!(disk == server.bytes);
    assert_eq!(holes, 1 << 20);

    // One piece of data though there is a hole in it, and no more than may be held.
    client.request(1 << 2, READ, 2, (1 << 20) - 10, 1 << 20).await;
    let (flags, kind, payload) = client.chunk(2).await;
    assert_eq!((flags, kind), (1, 1));
    assert!(payload[8..] == server.bytes[(1 << 20) - 10..][..1 << 20]);
    client.request(1 << 2, READ, 3, 0, 2 << 20).await;
    let (flags, kind, payload) = client.chunk(3).await;
    assert_eq!((flags, kind, &payload[..4]), (1, 0x8001, &75u32.to_be_bytes()[..]));

    let status = |extents: &[(u32, u32)]| {
        let extents =
            extents.iter().flat_map(|(len, state)| [len.to_be_bytes(), state.to_be_bytes()].concat());
        [1u32.to_be_bytes().to_vec(), extents.collect()].concat()
    };
    client.request(0, 7, 4, 0, SIZE as u32).await;
    let all = status(&[(1 << 20, 0), (1 << 20, 3), (1 << 20, 0)]);
    assert_eq!(client.chunk(4).await, (1, 5, all));
    client.request(1 << 3, 7, 5, (1 << 20) + 512, SIZE as u32 / 2).await;
    assert_eq!(client.chunk(5).await, (1, 5, status(&[((1 << 20) - 512, 3)])));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_outside_of_the_disk_is_refused_and_the_next_request_is_served() {
    let server = Server::start();
    let mut client = server.plain().await;
    let size = SIZE as u64;
    for (command, offset, len, error) in [
        (READ, size, 1, 22),
        (READ, size - 10, 11, 22),
        (READ, u64::MAX, 2, 22),
        (READ, 0, 0, 22),
        (READ, 0, u32::MAX, 22),
        (7, 0, 512, 22),
        (4, 0, 512, 1),
        (6, 0, 512, 1),
        (99, 0, 512, 22),
    ] {
        client.request(0, command, 8, offset, len).await;
        assert_eq!(client.simple(8).await, error, "command {command}, {len} bytes at {offset}");
    }
    client.request(1 << 2, READ, 9, 0, 10).await;
    assert_eq!(client.simple(9).await, 22, "one chunk, where there are none");
    client.request(0, READ, 10, size - 10, 10).await;
    assert_eq!(client.simple(10).await, 0);
    assert!(client.take(10).await == server.bytes[SIZE - 10..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn options_that_are_wrong_are_refused_or_the_client_is_left() {
    let server = Server::start();
    let mut client = server.connect(3).await;
    let unsupported = 1 << 31 | 1;
    let invalid = 1 << 31 | 3;
    let far = [&[0; 4][..], &u32::MAX.to_be_bytes()].concat();
    for (option, data, error) in [
        (5, &b""[..], unsupported),
        (77, b"what", unsupported),
        (3, b"x", invalid),
        (8, b"x", invalid),
        (10, &[0; 8], invalid),
        (7, b"", invalid),
        (7, &[0, 0, 0, 9, b'x', 0, 0], invalid),
        (7, &[0, 0, 0, 0, 0, 5], invalid),
        (7, &[0, 0, 0, 0, 0, 0, 1], invalid),
    ] {
        client.option(option, data).await;
        assert_eq!(client.replied(option).await.0, error, "{option} {data:?}");
    }
    client.option(8, b"").await;
    assert_eq!(client.replied(8).await.0, 1);
    client.option(10, &far).await;
    assert_eq!(client.replied(10).await.0, invalid, "queries without end");
    client.option(2, b"").await;
    assert_eq!(client.replied(2).await.0, 1);
    assert!(client.is_left().await);

    let mut many = server.connect(3).await;
    for _ in 0..64 {
        many.option(77, b"").await;
        many.replied(77).await;
    }
    assert!(many.is_left().await);
    assert!(server.connect(1 << 7).await.is_left().await, "flags that were not offered");
    let long = [&b"IHAVEOPT"[..], &7u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat();
    for wrong in [&long[..], &[0; 16]] {
        let mut client = server.connect(3).await;
        client.send(wrong).await;
        assert!(client.is_left().await, "{wrong:?}");
    }
    for garbage in [true, false] {
        let mut client = server.plain().await;
        match garbage {
            true => client.send(&[0; 28]).await,
            false => client.request(0, 1, 1, 0, 512).await,
        }
        assert!(client.is_left().await, "garbage {garbage}, else a write");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_are_served_at_a_time_than_there_is_memory_for() {
    let server = Server::start();
    let mut clients = Vec::new();
    for _ in 0..16 {
        clients.push(server.plain().await);
    }
    let mut next = UnixStream::connect(&server.socket).await.unwrap();
    // Who is served still is, and the next one's turn comes when one of them leaves.
    for client in &mut clients {
        client.request(0, READ, 1, 0, 10).await;
        assert_eq!(client.simple(1).await, 0);
        client.take(10).await;
    }
    assert!(next.try_read(&mut [0]).is_err(), "nothing has come for the one who waits");
    drop(clients.pop());
    let mut hello = [0; 18];
    next.read_exact(&mut hello).await.unwrap();
    assert_eq!(hello, MAGIC);
}
