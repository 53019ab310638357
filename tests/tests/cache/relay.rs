//! Stands between a cache and its upstream: counts what is asked, and answers worse than the upstream would.
#![allow(clippy::unwrap_used, reason = "test code: a failure is the report")]

use anyhow::Result;
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, HOST, RANGE};
use axum::http::{Method, Response, StatusCode};
use bytes::Bytes;
use futures_util::stream;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

const PIECE_BYTES: usize = 64 << 10;

/// A request that came by.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: Method,
    pub path: String,
    pub range: Option<String>,
}

#[derive(Clone, Default)]
struct Manners {
    /// Answers everything with this status.
    status: Option<u16>,
    /// Breaks off the next body of a blob behind so many bytes.
    cut: Option<usize>,
    /// Changes the last byte of blobs.
    corrupts: bool,
}

#[derive(Clone)]
pub struct Relay {
    address: SocketAddr,
    upstream: String,
    http: reqwest::Client,
    asked: Arc<Mutex<Vec<Asked>>>,
    manners: Arc<Mutex<Manners>>,
    /// How many bytes of each blob may pass.
    gate: watch::Sender<usize>,
}

impl Relay {
    pub async fn start(upstream: &str) -> Result<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let relay = Self {
            address: listener.local_addr()?,
            upstream: upstream.to_owned(),
            http: reqwest::Client::new(),
            asked: Arc::default(),
            manners: Arc::default(),
            gate: watch::channel(usize::MAX).0,
        };
        let app = Router::new().fallback(pass).with_state(relay.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Ok(relay)
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Lets so many bytes of each blob pass, until the gate is moved again.
    pub fn hold_after(&self, bytes: usize) {
        self.gate.send_replace(bytes);
    }

    pub fn release(&self) {
        self.hold_after(usize::MAX);
    }

    pub fn answer_all_with(&self, status: Option<u16>) {
        self.manners.lock().unwrap().status = status;
    }

    pub fn cut_next_after(&self, bytes: usize) {
        self.manners.lock().unwrap().cut = Some(bytes);
    }

    pub fn corrupt(&self, corrupts: bool) {
        self.manners.lock().unwrap().corrupts = corrupts;
    }

    /// What was asked whose path has this in it.
    pub fn asked(&self, method: Method, part: &str) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|asked| asked.method == method && asked.path.contains(part)).cloned().collect()
    }

    pub fn asked_in_all(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

async fn pass(State(relay): State<Relay>, request: Request) -> Response<Body> {
    let (head, _) = request.into_parts();
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let range = head.headers.get(RANGE).and_then(|range| range.to_str().ok()).map(str::to_owned);
    relay.asked.lock().unwrap().push(Asked { method: head.method.clone(), path: path.clone(), range });
    let status = |status: u16| {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        response
    };
    let Manners { status: always, corrupts, .. } = relay.manners.lock().unwrap().clone();
    if let Some(always) = always {
        return status(always);
    }
    let mut onward = relay.http.request(head.method.clone(), format!("{}{path}", relay.upstream));
    for name in [ACCEPT, AUTHORIZATION, RANGE] {
        if let Some(value) = head.headers.get(&name) {
            onward = onward.header(name, value);
        }
    }
    // So that the token service that is named is reached by way of us, too.
    if let Some(host) = head.headers.get(HOST) {
        onward = onward.header(HOST, host);
    }
    let Ok(answer) = onward.send().await else { return status(502) };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = answer.status();
    *response.headers_mut() = answer.headers().clone();
    let is_blob = path.contains("/blobs/") && head.method == Method::GET && answer.status().is_success();
    let Ok(bytes) = answer.bytes().await else { return status(502) };
    if head.method == Method::HEAD {
        return response;
    }
    response.headers_mut().insert(CONTENT_LENGTH, bytes.len().into());
    let cut = is_blob.then(|| relay.manners.lock().unwrap().cut.take()).flatten();
    let mut bytes = bytes.to_vec();
    if let Some(last) = bytes.last_mut().filter(|_| corrupts && is_blob) {
        *last ^= 1;
    }
    let gate = match is_blob {
        true => relay.gate.subscribe(),
        false => watch::channel(usize::MAX).1,
    };
    *response.body_mut() = body(bytes.into(), gate, cut);
    response
}

/// Sends bytes as far as the gate lets them, and breaks off at `cut`.
fn body(bytes: Bytes, gate: watch::Receiver<usize>, cut: Option<usize>) -> Body {
    Body::from_stream(stream::unfold((bytes, gate, 0), move |(bytes, mut gate, sent)| async move {
        if cut.is_some_and(|cut| sent >= cut) {
            return Some((Err(std::io::Error::other("cut")), (bytes, gate, sent)));
        }
        if sent == bytes.len() {
            return None;
        }
        let end = bytes.len().min(sent + PIECE_BYTES);
        // Without a gatekeeper nothing is held.
        let _ = gate.wait_for(|open| end <= *open).await;
        Some((Ok(bytes.slice(sent..end)), (bytes, gate, end)))
    }))
}
