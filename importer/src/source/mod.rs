//! Where images come from: an opened source is a blocking reader, its length as far as known, and its name.

pub mod feed;
pub mod file;
pub mod http;
pub(crate) mod image;
pub mod nbd;
pub mod policy;
pub mod s3;

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::{Buf, Bytes};
use dvcr_converter::io::ReadAt;
use dvcr_converter::limits::Limits;
use dvcr_converter::progress::Progress;
use dvcr_image::{AuthStore, ClientOptions, Network, Proxies, Reference};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::checksum::{Checksum, Checksums};
use crate::keep::Tee;
use crate::resume::Mark;
use crate::{Error, ErrorKind, Result};
use feed::Feed;
use file::{FileSource, Stamp};
use http::{HttpOptions, HttpSource};
use policy::{RegistryGate, SourcePolicy};
use s3::S3Options;

use crate::signature::VerifyKey;

/// Pieces of a body that may wait for the source thread.
const PIECES_WAITING_MAX: usize = 16;

/// Where an image is, as people write it: `http(s)://...`, `docker://REF`, `s3://...`, `nbd://...`, else a path.
#[derive(Clone, PartialEq, Eq)]
pub enum Source {
    /// A URL; it may hold credentials.
    Http(String),
    /// An image in a registry.
    Image(Reference),
    /// An export of an NBD server.
    Nbd(nbd::Address),
    /// An object in an S3 bucket.
    S3(s3::Object),
    /// A file, a block device, or a folder with the file `disk.img`.
    File(PathBuf),
    /// What somebody pushes in while it is imported.
    Feed(Feed),
}

impl FromStr for Source {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once("://") {
            Some(("http" | "https", _)) => Ok(Self::Http(text.to_owned())),
            Some(("docker", rest)) => {
                let bad = |e| Error::with(ErrorKind::Invalid, "the source is no image in a registry", e);
                rest.parse().map(Self::Image).map_err(bad)
            }
            Some(("s3", _)) => text.parse().map(Self::S3),
            Some(("nbd" | "nbds" | "nbd+unix" | "nbds+unix", _)) => text.parse().map(Self::Nbd),
            Some((scheme, _)) if is_scheme(scheme) => {
                let text = format!(
                    "sources of scheme {scheme:?} are not read; write http://, https://, docker://, s3://, nbd:// or a path"
                );
                Err(Error::new(ErrorKind::Invalid, text))
            }
            _ if text.is_empty() => Err(Error::new(ErrorKind::Invalid, "the source is an empty text")),
            _ => Ok(Self::File(text.into())),
        }
    }
}

/// A URL without `user:password@`.
fn without_user(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    format!("{scheme}://{host}{path}")
}

/// What stands before `://` in a URL (RFC 3986, 3.1).
fn is_scheme(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
}

impl fmt::Debug for Source {
    /// Shows no URL: it may hold credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http(_) => f.write_str("Http(..)"),
            Self::Image(reference) => f.debug_tuple("Image").field(reference).finish(),
            Self::Nbd(address) => f.debug_tuple("Nbd").field(address).finish(),
            Self::S3(object) => f.debug_tuple("S3").field(object).finish(),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Feed(feed) => feed.fmt(f),
        }
    }
}

/// How to reach a source, and what it may be.
#[derive(Clone, Debug, Default)]
pub struct SourceOptions {
    /// Accept any TLS certificate, redirects from https to http, and plain HTTP of a source in a registry.
    pub insecure: bool,
    /// Credentials of a source in a registry.
    pub auth: AuthStore,
    /// What an HTTP source is told of who asks.
    pub http: HttpOptions,
    /// Certificates (PEM) that are trusted besides those of the system: of sources, and of proxies that look inside.
    pub roots: Vec<u8>,
    /// Proxies; by default those that the environment names.
    pub proxies: Option<Proxies>,
    /// What the source may be; anything by default.
    pub policy: Option<Arc<SourcePolicy>>,
    /// Where a source in a bucket is, and who reads it.
    pub s3: S3Options,
    /// The key that a source in a registry must be signed with.
    pub verify_key: Option<VerifyKey>,
}

impl SourceOptions {
    /// How to talk to a registry that the source is in, under the policy.
    pub(crate) fn client(&self) -> ClientOptions {
        let mut network = self.network();
        network.gate = self.policy.clone().map(|policy| Arc::new(RegistryGate(policy)) as _);
        ClientOptions { insecure: self.insecure, auth: self.auth.clone(), network }
    }

    /// Without a gate, which each kind of source has its own of.
    fn network(&self) -> Network {
        Network { roots: self.roots.clone(), proxies: self.proxies.clone(), gate: None }
    }

    /// Refuses a source that the policy does not allow, or that nobody vouches for where it wants that somebody does.
    pub(crate) fn admit(&self, source: &Source, checksums: &[Checksum]) -> Result<()> {
        match &self.policy {
            Some(policy) => {
                policy.admit(source)?;
                policy.admit_checksums(source, checksums)
            }
            None => Ok(()),
        }
    }
}

/// A place in one version of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Bytes before it.
    pub(crate) position: u64,
    /// [`Opened::validator`] of that version.
    pub(crate) validator: String,
}

/// A source that can be read on.
pub(crate) struct Opened {
    /// Blocking; must not be read on the runtime's async threads. Begins at the place that was asked for.
    pub(crate) reader: Box<dyn Read + Send>,
    /// The same bytes for whoever need not have them in order, where reading them at random costs no more.
    pub(crate) random: Option<Arc<dyn ReadAt>>,
    /// Bytes of the whole source, if known beforehand.
    pub(crate) len: Option<u64>,
    /// Names this version of the source: another process that finds the same can go on in the middle. `None` where nothing
    /// tells versions apart, or nothing but the beginning can be asked for.
    pub(crate) validator: Option<String>,
    /// What the source calls itself.
    pub(crate) name: Option<String>,
    /// What to do if this is a web page, where it may be one.
    pub(crate) if_page: Option<&'static str>,
    /// The source without secrets, for messages.
    pub(crate) shown: String,
    /// Tells at the end whether it is still the file that was opened.
    pub(crate) stamp: Option<Stamp>,
    /// Stops what runs in the background when the opened source goes away.
    pub(crate) pump: Option<Pump>,
}

/// Ends a background task when dropped.
pub(crate) struct Pump(AbortHandle);

impl Drop for Pump {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Source {
    /// What the source goes by, wherever it is asked for: without what proves who asks, and what changes with each asking.
    pub(crate) fn identity(&self) -> String {
        match self {
            Self::Http(url) => url.split(['?', '#']).next().map(without_user).unwrap_or_default(),
            Self::Image(reference) => format!("docker://{}/{}", reference.host(), reference.repository()),
            Self::Nbd(address) => address.to_string(),
            Self::S3(object) => object.to_string(),
            Self::File(path) => path.display().to_string(),
            Self::Feed(feed) => format!("upload:{}", feed.id()),
        }
    }

    /// Whether its bytes come from far away: reading them again costs more than reading them from the registry.
    pub(crate) fn is_far(&self) -> bool {
        matches!(self, Self::Http(_) | Self::S3(_) | Self::Feed(_))
    }

    /// Whether it can be opened more than once.
    pub(crate) fn opens_again(&self) -> bool {
        !matches!(self, Self::Feed(_))
    }

    /// Bytes that are stored of a source, where that can be told before it is opened.
    pub(crate) fn stored_bytes(&self) -> Option<u64> {
        match self {
            Self::Feed(feed) => feed.stored_bytes(),
            _ => None,
        }
    }

    /// What tells this version of the source from others, `None` if nothing does.
    pub(crate) async fn version(&self, options: &SourceOptions) -> Result<Option<String>> {
        match self {
            Self::Http(url) => Ok(HttpSource::open(url, options, None).await?.fingerprint()),
            Self::S3(object) => {
                let url = object.url(&options.s3)?;
                Ok(HttpSource::open(&url, options, None).await?.fingerprint())
            }
            Self::Image(reference) => Ok(reference.digest().map(ToString::to_string)),
            Self::Nbd(_) | Self::Feed(_) => Ok(None),
            Self::File(path) => {
                let path = path.clone();
                let opened = tokio::task::spawn_blocking(move || FileSource::open(&path)).await;
                let opened = opened.map_err(|e| Error::with(ErrorKind::Source, "opening the source", e))?;
                Ok(opened?.version)
            }
        }
    }

    /// Opens the source at its first byte, or at a place in a version of it that was open before.
    ///
    /// # Errors
    /// [`ErrorKind::Policy`] when the policy does not allow it, or where it leads to; [`ErrorKind::Changed`] when it is
    /// another version now, or does not let itself be read from there.
    pub(crate) async fn open(
        &self,
        options: &SourceOptions,
        limits: &Limits,
        at: Option<&Place>,
    ) -> Result<Opened> {
        options.http.admit(self)?;
        match self {
            Self::Http(url) => open_http(url, options, at).await,
            Self::Image(reference) => image::open(reference, &options.client(), limits, at).await,
            Self::Nbd(address) => nbd::open(address, options, at).await,
            Self::S3(object) => open_http(&object.url(&options.s3)?, options, at).await,
            Self::File(path) => {
                let (path, at) = (path.clone(), at.cloned());
                let opened = tokio::task::spawn_blocking(move || open_file(&path, at.as_ref())).await;
                opened.map_err(|e| Error::with(ErrorKind::Source, "opening the source", e))?
            }
            Self::Feed(feed) => feed.open(at),
        }
    }
}

/// The error of a source that is not what was begun.
fn changed(shown: &str) -> Error {
    let text = format!("{shown} is another version than the one that was begun, or cannot be gone on with");
    Error::new(ErrorKind::Changed, text)
}

fn open_file(path: &Path, at: Option<&Place>) -> Result<Opened> {
    let source = FileSource::open(path)?;
    let shown = path.display().to_string();
    let failed = |e| Error::with(ErrorKind::Source, format!("cannot read {shown}"), e);
    let stamp = source.stamp().map_err(failed)?;
    let FileSource { mut file, random, len, name, version, .. } = source;
    if let Some(at) = at {
        if version.as_ref() != Some(&at.validator) || at.position > len {
            return Err(changed(&shown));
        }
        file.seek(SeekFrom::Start(at.position)).map_err(failed)?;
    }
    Ok(Opened {
        reader: Box::new(file),
        random: random.map(|random| Arc::new(random) as _),
        len: Some(len),
        validator: version,
        name,
        if_page: None,
        shown,
        stamp,
        pump: None,
    })
}

async fn open_http(url: &str, options: &SourceOptions, at: Option<&Place>) -> Result<Opened> {
    let mut source = HttpSource::open(url, options, at).await?;
    let (len, name, shown) = (source.len, source.name.clone(), source.display_url());
    let if_page = source.is_html.then_some("use the address of the file itself");
    let validator = source.version();
    let (sender, pieces) = mpsc::channel(PIECES_WAITING_MAX);
    let pump = tokio::spawn(async move {
        loop {
            let piece = source.chunk().await;
            let last = !matches!(piece, Ok(Some(_)));
            // A reader that went away wants no more.
            if sender.send(piece).await.is_err() || last {
                return;
            }
        }
    });
    let reader = Box::new(Pieces::of_task(pieces));
    let pump = Some(Pump(pump.abort_handle()));
    Ok(Opened { reader, random: None, len, validator, name, if_page, shown, stamp: None, pump })
}

/// Pieces that somebody sends, as a blocking reader. Only `Ok(None)` is the end; a sender that vanished is a failure.
struct Pieces {
    pieces: mpsc::Receiver<Result<Option<Bytes>>>,
    piece: Bytes,
    ended: bool,
    /// What it means that the sender has vanished.
    vanished: (ErrorKind, &'static str),
}

impl Pieces {
    /// Of a task that ends before its time when the transfer is stopped.
    fn of_task(pieces: mpsc::Receiver<Result<Option<Bytes>>>) -> Self {
        Self::new(pieces, (ErrorKind::Cancelled, "the transfer was stopped"))
    }

    fn new(pieces: mpsc::Receiver<Result<Option<Bytes>>>, vanished: (ErrorKind, &'static str)) -> Self {
        Self { pieces, piece: Bytes::new(), ended: false, vanished }
    }
}

impl Read for Pieces {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.ended && !buf.is_empty() {
            match self.pieces.blocking_recv() {
                Some(Ok(Some(piece))) => self.piece = piece,
                Some(Ok(None)) => self.ended = true,
                Some(Err(error)) => return Err(error.into()),
                None => return Err(Error::new(self.vanished.0, self.vanished.1).into()),
            }
        }
        let count = buf.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buf[..count]);
        Ok(count)
    }
}

/// The bytes of a source as they were received: counted, summed, and able to stop. Decoders own one handle, the
/// pipeline another, to read what they leave and to get the verdict.
#[derive(Clone)]
pub(crate) struct Received(Arc<Mutex<State>>);

struct State {
    reader: Box<dyn Read + Send>,
    checksums: Option<Checksums>,
    progress: Arc<Progress>,
    bytes: u64,
    /// Copies what is received, if it is to be kept.
    tee: Option<Tee>,
    /// The source's own failure: decoders wrap it beyond recognition.
    failure: Option<Error>,
}

impl Received {
    /// `position` is where `reader` begins, and `checksums` are at.
    pub(crate) fn new(
        reader: Box<dyn Read + Send>,
        position: u64,
        checksums: Checksums,
        progress: Arc<Progress>,
    ) -> Self {
        progress.skip_to(position);
        let checksums = Some(checksums);
        let state = State { reader, checksums, progress, bytes: position, tee: None, failure: None };
        Self(Arc::new(Mutex::new(state)))
    }

    /// Has what is received copied from now on, or not any more.
    pub(crate) fn keep(&self, tee: Option<Tee>) {
        self.lock().tee = tee;
    }

    /// Tells that whoever keeps what is received is there now.
    pub(crate) fn arm(&self) {
        if let Some(tee) = &mut self.lock().tee {
            tee.arm();
        }
    }

    /// Bytes that were received, with those before the place where it was opened.
    pub(crate) fn position(&self) -> u64 {
        self.lock().bytes
    }

    /// Marks the place, if it is behind so many bytes of the source.
    pub(crate) fn mark(&self, position: u64) -> Option<Mark> {
        let state = self.lock();
        let checksums = state.checksums.as_ref().filter(|_| state.bytes == position)?;
        Some(Mark::new(position, checksums))
    }

    /// What the source failed with, if it did.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.lock().failure.take()
    }

    /// Reads what a decoder left, and passes judgement: length and checksums. Returns the length in bytes.
    pub(crate) fn finish(mut self, announced: Option<u64>) -> Result<u64> {
        let rest = io::copy(&mut self, &mut io::sink());
        if let Some(error) = self.failure() {
            return Err(error);
        }
        rest.map_err(|e| Error::with(ErrorKind::Source, "reading the source", e))?;
        let mut state = self.lock();
        if let Some(announced) = announced.filter(|announced| *announced != state.bytes) {
            let text = format!("the source has {} bytes, {announced} were announced", state.bytes);
            return Err(Error::new(ErrorKind::Source, text));
        }
        if let Some(checksums) = state.checksums.take() {
            checksums.verify()?;
        }
        Ok(state.bytes)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Read for Received {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if let Err(stopped) = state.progress.check() {
            state.failure = Some(Error::stopped(stopped));
            return Err(io::Error::other("interrupted"));
        }
        let count = match state.reader.read(buf) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                state.failure = Some(match error.downcast::<Error>() {
                    Ok(ours) => ours,
                    Err(other) => Error::with(ErrorKind::Source, "reading the source", other),
                });
                return Err(io::Error::other("the source failed"));
            }
        };
        if let Some(checksums) = &mut state.checksums {
            checksums.update(&buf[..count]);
        }
        if let Some(tee) = &mut state.tee
            && !tee.take(state.bytes, &buf[..count])
        {
            state.tee = None;
        }
        state.bytes += count as u64;
        state.progress.reach(state.bytes);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_what_its_scheme_says() {
        assert_eq!("http://h/a.img".parse::<Source>().unwrap(), Source::Http("http://h/a.img".into()));
        assert_eq!(
            "docker://r.example/a".parse::<Source>().unwrap(),
            Source::Image("r.example/a".parse().unwrap())
        );
        assert_eq!("a/b.img".parse::<Source>().unwrap(), Source::File("a/b.img".into()));
        for bad in ["ftp://u:secret@h/a", "svn+ssh://u:secret@h/a", "docker://u:secret@h/r", "docker://R", ""]
        {
            let error = bad.parse::<Source>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}");
            assert!(!format!("{error:?}").contains("secret"), "{error:?}");
        }
        let signed: Source = "https://user:p@ss@h:1/a%20b?signature=x#y".parse().unwrap();
        assert_eq!(signed.identity(), "https://h:1/a%20b");
        let secret = "https://user:secret@h/a".parse::<Source>().unwrap();
        assert!(!format!("{secret:?}").contains("secret"));
    }
}
