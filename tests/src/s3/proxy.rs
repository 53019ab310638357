//! A proxy before an S3 server that treats requests as a bad network, or a server under load, would.
//!
//! Requests go on with the `Host` they came with, so that their signatures hold.

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::EXPECT;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};

/// Largest body of a request, bytes; it is held in memory.
const REQUEST_BYTES_MAX: usize = 64 << 20;
/// How long a body rests before it is cut off.
const FLUSH_TIME: Duration = Duration::from_millis(20);

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Body = UnsyncBoxBody<Bytes, BoxError>;

/// What happens to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is served.
    None,
    /// It is served after a while.
    Delay(Duration),
    /// The connection is closed, and the server never hears of it.
    DropBefore,
    /// The server does what it is asked to, and the connection is closed in place of its answer.
    DropAfter,
    /// The server never hears of it; this status and this S3 error code are the answer.
    Answer(u16, &'static str),
    /// It is served, but the connection is closed after so many bytes of the answer's body.
    CutBody(u64),
    /// It is held up, and reaches the server after a while even if the client has given up, behind requests that came
    /// later.
    Hold(Duration),
}

/// A request, for those who decide what happens to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub method: Method,
    /// With the query.
    pub path: String,
}

/// Faults by chance; the same seed gives the same for the same sequence of requests.
#[derive(Clone, Debug)]
pub struct Chaos {
    pub seed: u64,
    /// Of a thousand requests, how many meet each of the six faults.
    pub each_per_mille: u64,
    /// How long requests are delayed or held.
    pub delay_ms: Range<u64>,
    /// Where bodies are cut, bytes.
    pub cut_bytes: Range<u64>,
}

impl Chaos {
    /// Returns what decides.
    pub fn decide(self) -> impl FnMut(&Asked) -> Fault + Send + 'static {
        const ANSWERS: [(u16, &str); 4] = [
            (500, "InternalError"),
            (503, "SlowDown"),
            (503, "ServiceUnavailable"),
            (429, "TooManyRequests"),
        ];
        let mut state = self.seed;
        // SplitMix64, which is enough to choose by.
        let mut random = move |range: &Range<u64>| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            range.start + (mixed ^ (mixed >> 31)) % (range.end - range.start).max(1)
        };
        move |_| {
            let choice = random(&(0..1000)) / self.each_per_mille.max(1);
            let delay = Duration::from_millis(random(&self.delay_ms));
            let cut = random(&self.cut_bytes);
            let (status, code) = ANSWERS[random(&(0..4)) as usize];
            match choice {
                0 => Fault::Delay(delay),
                1 => Fault::DropBefore,
                2 => Fault::DropAfter,
                3 => Fault::Answer(status, code),
                4 => Fault::CutBody(cut),
                5 => Fault::Hold(delay),
                _ => Fault::None,
            }
        }
    }
}

/// A running proxy; dropping it ends it.
#[derive(Debug)]
pub struct S3Proxy {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<(Asked, Fault)>>>,
    runtime: Option<Runtime>,
}

impl S3Proxy {
    /// Starts one on a free port of 127.0.0.1, in threads of its own.
    pub fn start(server: SocketAddr, decide: impl FnMut(&Asked) -> Fault + Send + 'static) -> Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").context("no free port on 127.0.0.1")?;
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let seen = Arc::default();
        let rules = Arc::new(Rules { server, decide: Mutex::new(Box::new(decide)), seen: Arc::clone(&seen) });
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener");
            while let Ok((stream, _)) = listener.accept().await {
                let rules = Arc::clone(&rules);
                tokio::spawn(async move {
                    let service = service_fn(|request| Arc::clone(&rules).serve(request));
                    // A connection that is closed on purpose ends with an error.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Ok(Self { address, seen, runtime: Some(runtime) })
    }

    /// Returns `http://127.0.0.1:PORT`, without a slash at the end.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns all requests so far, and what happened to them.
    pub fn seen(&self) -> Vec<(Asked, Fault)> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for S3Proxy {
    fn drop(&mut self) {
        // Waiting for it is not allowed inside of another runtime.
        self.runtime.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

/// What chooses a fault for each request.
type Decide = Box<dyn FnMut(&Asked) -> Fault + Send>;

struct Rules {
    server: SocketAddr,
    decide: Mutex<Decide>,
    seen: Arc<Mutex<Vec<(Asked, Fault)>>>,
}

impl Rules {
    async fn serve(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Body>, BoxError> {
        let (head, body) = request.into_parts();
        let body = Limited::new(body, REQUEST_BYTES_MAX).collect().await?.to_bytes();
        let mut request = Request::from_parts(head, Full::new(body));
        // It was met when the body was read.
        request.headers_mut().remove(EXPECT);
        let asked = Asked { method: request.method().clone(), path: request.uri().to_string() };
        let fault = (self.decide.lock().unwrap_or_else(PoisonError::into_inner))(&asked);
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).push((asked, fault));
        match fault {
            Fault::None => self.forward(request).await,
            Fault::Delay(time) => {
                tokio::time::sleep(time).await;
                self.forward(request).await
            }
            Fault::DropBefore => Err("dropped before the server".into()),
            Fault::DropAfter => {
                // Spawned, since a client that goes away would end it otherwise.
                let answer =
                    tokio::spawn(async move { self.forward(request).await?.collect().await.map(drop) });
                answer.await??;
                Err("dropped behind the server".into())
            }
            Fault::Answer(status, code) => {
                let text = format!("<Error><Code>{code}</Code><Message>The proxy says so.</Message></Error>");
                let answer = Response::builder().status(status).header("content-type", "application/xml");
                Ok(answer.body(whole(Bytes::from(text)))?)
            }
            Fault::CutBody(bytes) => Ok(self.forward(request).await?.map(|body| cut(body, bytes))),
            Fault::Hold(time) => {
                let answer = tokio::spawn(async move {
                    tokio::time::sleep(time).await;
                    self.forward(request).await
                });
                answer.await?
            }
        }
    }

    /// Sends a request on, by a connection of its own.
    async fn forward(&self, request: Request<Full<Bytes>>) -> Result<Response<Body>, BoxError> {
        let stream = TcpStream::connect(self.server).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let answer = sender.send_request(request).await?;
        Ok(answer.map(|body| body.map_err(BoxError::from).boxed_unsync()))
    }
}

fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(BoxError::from).boxed_unsync()
}

/// The beginning of a body, and then an error, which closes the connection.
fn cut(body: Body, bytes: u64) -> Body {
    let left = usize::try_from(bytes).unwrap_or(usize::MAX);
    let frames = futures_util::stream::unfold(Some((body, left)), async |state| {
        let (mut body, left) = state?;
        match body.frame().await? {
            Ok(frame) => {
                let Ok(mut data) = frame.into_data() else { return None };
                if data.len() <= left {
                    let left = left - data.len();
                    return Some((Ok(Frame::data(data)), Some((body, left))));
                }
                data.truncate(left);
                Some((Ok(Frame::data(data)), Some((broken(), 0))))
            }
            Err(error) => Some((Err(error), None)),
        }
    });
    StreamBody::new(Box::pin(frames)).boxed_unsync()
}

/// A body that is nothing but an error.
fn broken() -> Body {
    let error = futures_util::stream::once(async {
        // What is before it is written to the connection only while there is nothing else to do.
        tokio::time::sleep(FLUSH_TIME).await;
        Err(BoxError::from("cut off"))
    });
    StreamBody::new(Box::pin(error)).boxed_unsync()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_is_the_same_for_the_same_seed_and_meets_every_fault() {
        let faults = || {
            let chaos = Chaos { seed: 7, each_per_mille: 50, delay_ms: 0..10, cut_bytes: 0..10 };
            let mut decide = chaos.decide();
            let asked = Asked { method: Method::GET, path: "/".to_owned() };
            (0..1000).map(|_| decide(&asked)).collect::<Vec<_>>()
        };
        let found = faults();
        assert_eq!(found, faults());
        let kinds = found.iter().map(std::mem::discriminant).collect::<std::collections::HashSet<_>>();
        assert_eq!(kinds.len(), 7);
        let served = found.iter().filter(|fault| **fault == Fault::None).count();
        assert!((600..800).contains(&served), "{served}");
    }
}
