//! HTTP sources against a server that does what a test tells it to, connection by connection.

mod access;
mod transfer;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use super::*;

/// Longest that anything in a test takes; only a test that fails gets there.
const TEST_TIMEOUT: Duration = Duration::from_secs(120);

/// Cut small, so that a few MiB have many pieces.
fn small() -> Tuning {
    Tuning {
        segment_bytes: 64 << 10,
        ahead_bytes: 128 << 10,
        tick: Duration::from_millis(10),
        connections_max: CONNECTIONS_MAX,
        backoff_first: Duration::from_millis(1),
    }
}

/// A request as the server sees it.
#[derive(Clone, Debug)]
struct Asked {
    /// Number of the request, from 0.
    n: usize,
    /// Connections that are open.
    open: usize,
    path: String,
    /// In lower case, with all headers.
    head: String,
    /// First byte, and the last one if it was named.
    range: Option<(u64, Option<u64>)>,
    /// The client showed a certificate.
    certified: bool,
}

impl Asked {
    fn has(&self, header: &str) -> bool {
        self.head.contains(header)
    }
}

/// What the server answers.
#[derive(Clone, Debug)]
struct Reply {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Bytes,
    /// The announced length, if not that of the body; `None` in it sends chunks.
    length: Option<Option<u64>>,
    /// Close the connection after so many bytes of the body.
    cut: Option<usize>,
    /// Before the byte of that number, wait until so many requests came.
    company: Option<(usize, usize)>,
    /// Bytes per millisecond.
    rate: Option<usize>,
}

impl Reply {
    fn status(status: &'static str) -> Self {
        let body = Bytes::new();
        Self { status, headers: Vec::new(), body, length: None, cut: None, company: None, rate: None }
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn redirect(location: impl Into<String>) -> Self {
        Self::status("302 Found").with("location", location)
    }

    /// The file, or the part that was asked for, as a server does that does everything right.
    fn file(asked: &Asked, body: &Bytes, etag: &str) -> Self {
        let total = body.len() as u64;
        let same = !asked.has("if-range:") || asked.has(&format!("if-range: {}", etag.to_lowercase()));
        let mut reply = match asked.range.filter(|(first, _)| same && *first < total) {
            Some((first, last)) => {
                let last = last.unwrap_or(u64::MAX).min(total - 1);
                let mut reply = Self::status("206 Partial Content")
                    .with("content-range", format!("bytes {first}-{last}/{total}"));
                reply.body = body.slice(first as usize..=last as usize);
                reply
            }
            None => Self { body: body.clone(), ..Self::status("200 OK") },
        };
        reply = reply.with("accept-ranges", "bytes");
        if etag.is_empty() { reply } else { reply.with("etag", etag) }
    }
}

/// A server, and what it has seen.
struct Server {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    peak: Arc<AtomicUsize>,
    scheme: &'static str,
}

impl Server {
    async fn start(handler: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::listen(None, handler).await
    }

    async fn listen(
        tls: Option<TlsAcceptor>,
        handler: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (asked, peak) = (Arc::default(), Arc::new(AtomicUsize::new(0)));
        let scheme = if tls.is_some() { "https" } else { "http" };
        let site = Arc::new(Site {
            handler: Box::new(handler),
            asked: Arc::clone(&asked),
            open: AtomicUsize::new(0),
            requests: watch::channel(0).0,
        });
        let peak_seen = Arc::clone(&peak);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (site, tls) = (Arc::clone(&site), tls.clone());
                let open = site.open.fetch_add(1, Ordering::SeqCst) + 1;
                peak_seen.fetch_max(open, Ordering::SeqCst);
                tokio::spawn(async move {
                    match tls {
                        None => site.talk(socket, false).await,
                        Some(tls) => {
                            if let Ok(socket) = tls.accept(socket).await {
                                let certified = socket.get_ref().1.peer_certificates().is_some();
                                site.talk(socket, certified).await;
                            }
                        }
                    }
                    site.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { address, asked, peak, scheme }
    }

    fn url(&self, path: &str) -> String {
        format!("{}://{}/{path}", self.scheme, self.address)
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// Most connections at a time.
    fn peak(&self) -> usize {
        self.peak.load(Ordering::SeqCst)
    }
}

struct Site {
    handler: Box<dyn Fn(&Asked) -> Reply + Send + Sync>,
    asked: Arc<Mutex<Vec<Asked>>>,
    open: AtomicUsize,
    requests: watch::Sender<usize>,
}

impl Site {
    async fn talk(&self, mut socket: impl AsyncRead + AsyncWrite + Unpin, certified: bool) {
        loop {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match socket.read_u8().await {
                    Ok(byte) => head.push(byte),
                    Err(_) => return,
                }
            }
            let head = String::from_utf8(head).unwrap();
            let path = head.split(' ').nth(1).unwrap().to_owned();
            let head = head.to_lowercase();
            let range = head.split_once("\r\nrange: bytes=").map(|(_, rest)| {
                let (first, last) = rest.lines().next().unwrap().split_once('-').unwrap();
                (first.parse().unwrap(), last.parse().ok())
            });
            let asked = {
                let mut all = self.asked.lock().unwrap();
                let (n, open) = (all.len(), self.open.load(Ordering::SeqCst));
                all.push(Asked { n, open, path, head, range, certified });
                all.last().unwrap().clone()
            };
            self.requests.send_modify(|requests| *requests += 1);
            let reply = (self.handler)(&asked);
            if self.send(&mut socket, &reply).await.is_none() {
                let _ = socket.shutdown().await;
                return;
            }
        }
    }

    /// `None` when the connection is over.
    async fn send(&self, socket: &mut (impl AsyncWrite + Unpin), reply: &Reply) -> Option<()> {
        let chunked = reply.length == Some(None);
        let mut head = format!("HTTP/1.1 {}\r\n", reply.status);
        for (name, value) in &reply.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &match reply.length {
            Some(None) => "transfer-encoding: chunked\r\n\r\n".to_owned(),
            Some(Some(length)) => format!("content-length: {length}\r\n\r\n"),
            None => format!("content-length: {}\r\n\r\n", reply.body.len()),
        };
        socket.write_all(head.as_bytes()).await.ok()?;
        let mut sent = 0;
        while sent < reply.body.len() {
            let mut piece = 16 << 10;
            if let Some((before, requests)) = reply.company {
                if sent >= before {
                    self.requests.subscribe().wait_for(|seen| *seen >= requests).await.ok()?;
                } else {
                    piece = piece.min(before - sent);
                }
            }
            if let Some(cut) = reply.cut {
                piece = piece.min(cut - sent);
                if piece == 0 {
                    socket.flush().await.ok()?;
                    return None;
                }
            }
            if let Some(rate) = reply.rate {
                piece = piece.min(rate);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let bytes = reply.body.slice(sent..reply.body.len().min(sent + piece));
            if chunked {
                socket.write_all(format!("{:x}\r\n", bytes.len()).as_bytes()).await.ok()?;
            }
            socket.write_all(&bytes).await.ok()?;
            if chunked {
                socket.write_all(b"\r\n").await.ok()?;
            }
            sent += bytes.len();
        }
        if chunked {
            socket.write_all(b"0\r\n\r\n").await.ok()?;
        }
        socket.flush().await.ok()?;
        // Who announced something else than was sent has to end here.
        matches!(reply.length, None | Some(None)).then_some(())
    }
}

/// Who signs the certificates of a test.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> Vec<u8> {
        self.0.pem().into_bytes()
    }

    /// Certificate and key for the address of the tests, in PEM.
    fn sign(&self, change: impl Fn(&mut CertificateParams)) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params =
            CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
        change(&mut params);
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    /// A server with this certificate, that takes certificates of clients too.
    fn acceptor(&self, (certificate, key): &(String, String)) -> TlsAcceptor {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&self.pem()).unwrap()).unwrap();
        let clients = WebPkiClientVerifier::builder(Arc::new(roots)).allow_unauthenticated().build().unwrap();
        let config = ServerConfig::builder().with_client_cert_verifier(clients).with_single_cert(
            vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
            PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
        );
        TlsAcceptor::from(Arc::new(config.unwrap()))
    }
}

/// Bytes without a pattern that a wrong offset could hide behind.
fn noise(len: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect::<Vec<_>>()
        .into()
}

async fn open(url: &str) -> Result<HttpSource> {
    HttpSource::open_tuned(url, &SourceOptions::default(), None, small()).await
}

/// Everything that a source gives, up to its end or its error.
async fn read(source: &mut HttpSource) -> (Vec<u8>, Result<()>) {
    let mut all = Vec::new();
    let reading = async {
        loop {
            match source.chunk().await {
                Ok(Some(bytes)) => all.extend_from_slice(&bytes),
                Ok(None) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    };
    let outcome = tokio::time::timeout(TEST_TIMEOUT, reading).await.expect("the source goes on for ever");
    (all, outcome)
}

fn chain(error: &Error) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
