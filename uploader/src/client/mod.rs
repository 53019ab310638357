//! Uploads a file: by tus where that is spoken, so that a break costs a part; else by one PUT.
//!
//! ```text
//!   OPTIONS ── no tus ──> PUT
//!      └── tus ──> HEAD ── there is none ──> POST
//!                   │  └── how far it is ──┐   │
//!                   │                      v   v
//!                   └──── a break ───── PATCH, part by part ──> verdict
//! ```
//!
//! The upload's id is made of the file's identity and change time: whoever uploads the same file again, also after a crash,
//! goes on with the same upload, and nothing has to be remembered.

mod parts;
mod send;

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dvcr_converter::progress::Progress;
use http::{HeaderName, StatusCode};
use reqwest::{Certificate, Client, Identity, Response};
use rustix::fs::{SeekFrom, seek};
use serde_json::Value;
use sha2::{Digest, Sha256};
use url::{Host, Url};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long sent bytes may stay unacknowledged, after which the connection counts as broken.
const UNACKNOWLEDGED_TIMEOUT: Duration = Duration::from_secs(30);
/// How often it is looked whether the upload was cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(50);
/// Longest answer that is read, bytes.
const ANSWER_BYTES_MAX: usize = 64 << 10;

const TUS_RESUMABLE: HeaderName = HeaderName::from_static("tus-resumable");
const TUS_VERSION: HeaderName = HeaderName::from_static("tus-version");
const VERSION: &str = "1.0.0";

/// What to upload, and where to.
#[derive(Clone, Debug)]
pub struct UploadRequest {
    /// A file or a block device.
    pub file: PathBuf,
    /// The address, `http://` or `https://`; what is behind the host may be a secret.
    pub url: String,
    /// Accept any certificate.
    pub insecure: bool,
    /// Certificates (PEM) that are trusted besides those of the system.
    pub roots: Option<Vec<u8>>,
    /// Our own certificate and its private key (PEM).
    pub identity: Option<Vec<u8>>,
}

/// What was uploaded.
#[derive(Clone, Debug)]
pub struct Uploaded {
    /// What the server says of the image, if it does.
    pub summary: Option<Value>,
    /// Bytes of bodies that were sent.
    pub sent: u64,
}

/// Why an upload failed. No message has the address: its path may be a secret.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it was.
    #[error("{} changed while it was sent; upload it again", .0.display())]
    Changed(PathBuf),
    /// The server does not want it.
    #[error("the server answers {status}: {message}")]
    Refused {
        /// Its status.
        status: StatusCode,
        /// Its words.
        message: String,
    },
    /// The server is out of reach, for longer than is worth waiting.
    #[error("{what}")]
    Unreachable {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: reqwest::Error,
    },
    /// The server says what the protocol does not know.
    #[error("the server's answer makes no sense: {0}")]
    Protocol(&'static str),
    /// The caller asked to stop.
    #[error("interrupted")]
    Cancelled,
}

/// Uploads a file, and waits until the server has stored it. `progress` counts the file's bytes that the server has; its
/// phases are "upload" and "store".
///
/// # Errors
/// When the file cannot be read, the server refuses it, or is out of reach for long. Of a resumable upload the server keeps
/// what it has for a while; the same request goes on there.
pub async fn upload(request: UploadRequest, progress: Arc<Progress>) -> Result<Uploaded, Error> {
    tokio::select! {
        uploaded = run(&request, &progress) => uploaded,
        () = cancelled(&progress) => Err(Error::Cancelled),
    }
}

async fn cancelled(progress: &Progress) {
    while progress.check().is_ok() {
        tokio::time::sleep(CANCEL_POLL).await;
    }
}

async fn run(request: &UploadRequest, progress: &Arc<Progress>) -> Result<Uploaded, Error> {
    let url = address(&request.url)?;
    let path = request.file.clone();
    let image = tokio::task::spawn_blocking(move || Image::open(&path)).await;
    let image = Arc::new(image.map_err(|_| Error::Cancelled)??);
    if image.len == 0 {
        return Err(Error::Invalid(format!("{} is empty (0 bytes)", request.file.display())));
    }
    let client = client(request, &url)?;
    progress.set_total(image.len);
    progress.set_phase("upload");
    let mut sender = send::Sender::new(client, url, Arc::clone(&image), Arc::clone(progress));
    match sender.speaks_tus().await? {
        true => sender.by_parts().await,
        false => sender.at_once().await,
    }
}

fn address(text: &str) -> Result<Url, Error> {
    let bad = || Error::Invalid("the address is no http:// or https:// URL".to_owned());
    let url = Url::parse(text).map_err(|_| bad())?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        _ => Err(bad()),
    }
}

fn client(request: &UploadRequest, url: &Url) -> Result<Client, Error> {
    let invalid = |what: &str, e: reqwest::Error| Error::Invalid(format!("{what}: {e}"));
    let mut builder = Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_user_timeout(UNACKNOWLEDGED_TIMEOUT)
        .tcp_keepalive(UNACKNOWLEDGED_TIMEOUT / 2)
        .https_only(url.scheme() == "https")
        .http1_only()
        .referer(false)
        .tls_danger_accept_invalid_certs(request.insecure)
        .user_agent(concat!("dvcr/", env!("CARGO_PKG_VERSION")));
    let is_loopback = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    };
    if is_loopback {
        builder = builder.no_proxy();
    }
    if let Some(roots) = &request.roots {
        let roots = Certificate::from_pem_bundle(roots);
        builder =
            builder.tls_certs_merge(roots.map_err(|e| invalid("the certificates to trust are no PEM", e))?);
    }
    if let Some(identity) = &request.identity {
        let identity = Identity::from_pem(identity);
        builder = builder.identity(identity.map_err(|e| invalid("our certificate and key are no PEM", e))?);
    }
    builder.build().map_err(|e| invalid("preparing the HTTP client", e))
}

/// The file that is uploaded.
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    /// Bytes; of a block device, its capacity.
    pub(crate) len: u64,
    /// Names this version of it to the server.
    pub(crate) id: String,
    pub(crate) name: Option<String>,
    /// Change time and length of a regular file.
    stamp: Option<(i64, i64, u64)>,
}

impl Image {
    fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::File { path: path.to_owned(), source };
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let text = format!("{} is neither a file nor a block device", path.display());
            return Err(Error::Invalid(text));
        }
        let file = File::open(path).map_err(failed)?;
        let len = seek(&file, SeekFrom::End(0)).map_err(|e| failed(e.into()))?;
        let metadata = file.metadata().map_err(failed)?;
        let stamp = stamp(&file, len).map_err(failed)?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let identity =
            format!("{}-{}-{}-{stamp:?}-{name:?}", metadata.dev(), metadata.ino(), metadata.rdev());
        let digest = Sha256::digest(identity);
        let id = digest[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { path: path.to_owned(), file, len, id, name, stamp })
    }

    /// Whether it is as it was when it was opened. Of a block device nobody knows.
    pub(crate) fn is_unchanged(&self) -> bool {
        stamp(&self.file, self.len).is_ok_and(|stamp| stamp == self.stamp)
    }
}

fn stamp(file: &File, len: u64) -> std::io::Result<Option<(i64, i64, u64)>> {
    let metadata = file.metadata()?;
    let len = if metadata.is_file() { metadata.len() } else { len };
    Ok(metadata.is_file().then(|| (metadata.mtime(), metadata.mtime_nsec(), len)))
}

/// Reads what a server says of what it refused.
async fn refused(response: Response) -> Error {
    let status = response.status();
    let text = answer(response).await;
    let json: Option<Value> = serde_json::from_str(&text).ok();
    let message = match &json {
        Some(told) => in_words(told),
        None if text.trim().is_empty() => status.canonical_reason().unwrap_or("no reason given").to_owned(),
        None => text.trim().chars().take(300).collect(),
    };
    Error::Refused { status, message }
}

/// The reason in our own server's words, and what it says of the upload that is in the way.
fn in_words(told: &Value) -> String {
    let mut message = told["error"].as_str().unwrap_or("no reason given").to_owned();
    if let (Some(received), Some(since)) = (told["received"].as_u64(), told["since"].as_str()) {
        let total = told["total"].as_u64().map(|total| format!(" of {total}")).unwrap_or_default();
        let name = told["name"].as_str().map(|name| format!("{name:?}, ")).unwrap_or_default();
        message += &format!(" ({name}{received}{total} bytes, since {since})");
    }
    message
}

/// The text of an answer, as far as it is short.
async fn answer(mut response: Response) -> String {
    let mut bytes = Vec::new();
    while let Ok(Some(piece)) = response.chunk().await {
        bytes.extend_from_slice(&piece);
        if bytes.len() >= ANSWER_BYTES_MAX {
            break;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Whether a server, or a proxy before it, is only out of order for a while.
fn is_passing(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 425 | 429 | 502 | 503 | 504)
}
