//! Where the tests of a store have one, the process that has it open, and what is pushed to it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use serde_json::json;
use tokio::runtime::Runtime;
use uuid::Uuid;

use crate::digest::{Algorithm, Digest};
use crate::model;
use crate::names::{Reference, RepoName, Tag};
use crate::rules::{Rules, Tags};
use crate::store::{ChangeError, Ending, Intake, Manifest, Removed, Session, Store};

/// A grace period in which nothing becomes garbage.
pub(super) const LONG: Duration = Duration::from_secs(3600);

/// Where a store has its content, however often it is opened.
pub(crate) struct Place(Box<dyn Fn(Duration) -> Arc<dyn Store>>);

impl Place {
    /// `open` opens the store with a grace period, as a process that has just started would. No other has it open.
    pub(crate) fn new(open: impl Fn(Duration) -> Arc<dyn Store> + 'static) -> Self {
        Self(Box::new(open))
    }

    pub(super) fn start(&self) -> Process {
        self.start_with(LONG)
    }

    pub(super) fn start_with(&self, grace: Duration) -> Process {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let entered = runtime.enter();
        let store = (self.0)(grace);
        drop(entered);
        Process { runtime, store }
    }
}

/// A process that has the store open. Dropped, it ends as one that is killed, but for what its threads are doing just then.
pub(crate) struct Process {
    // Dropped first: what it has begun on other threads has ended when the store is opened again.
    pub(super) runtime: Runtime,
    pub(super) store: Arc<dyn Store>,
}

impl Process {
    pub(crate) fn new(runtime: Runtime, store: Arc<dyn Store>) -> Self {
        Self { runtime, store }
    }

    pub(super) fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store)
    }

    pub(super) fn open(&self, repo: &RepoName, id: Uuid) -> Option<Box<dyn Session>> {
        self.store().open_upload(repo, id).unwrap()
    }

    pub(super) fn receive(&self, session: Box<dyn Session>, digest: Option<&Digest>) -> Box<dyn Intake> {
        let _entered = self.runtime.enter();
        session.receive(0, digest).unwrap()
    }

    pub(super) fn push(&self, intake: &mut dyn Intake, bytes: &[u8]) {
        for piece in bytes.chunks(150_000) {
            self.runtime.block_on(intake.push(Bytes::copy_from_slice(piece))).unwrap();
        }
    }

    pub(super) fn end(&self, intake: Box<dyn Intake>, ending: Ending) -> Box<dyn Session> {
        self.runtime.block_on(intake.end(ending)).unwrap()
    }

    /// Brings bytes by one request.
    pub(super) fn take(
        &self,
        session: Box<dyn Session>,
        bytes: &[u8],
        digest: Option<&Digest>,
        ending: Ending,
    ) -> Box<dyn Session> {
        let mut intake = self.receive(session, digest);
        self.push(&mut *intake, bytes);
        self.end(intake, ending)
    }

    /// Begins a session that another request goes on with, and brings it so many bytes.
    pub(crate) fn acknowledged(&self, repo: &RepoName, bytes: &[u8]) -> Uuid {
        let id = self.store.begin_upload(repo, Algorithm::Sha256).unwrap();
        let session = self.take(self.open(repo, id).unwrap(), bytes, None, Ending::Acknowledged);
        assert_eq!(session.offset(), bytes.len() as u64);
        id
    }

    /// Goes on with a session from where it is, and makes the blob of it.
    pub(crate) fn finish(&self, repo: &RepoName, id: Uuid, content: &[u8]) {
        let digest = sha256(content);
        let mut session = self.open(repo, id).unwrap();
        let rest = &content[usize::try_from(session.offset()).unwrap()..];
        if !rest.is_empty() {
            session = self.take(session, rest, Some(&digest), Ending::Committed);
        }
        let entered = self.runtime.enter();
        session.commit(&digest).unwrap();
        drop(entered);
        assert_eq!(self.read(repo, &digest).as_deref(), Some(content));
        assert!(self.open(repo, id).is_none(), "the session is still there");
    }

    /// Stores a blob by a session of one request.
    pub(crate) fn push_blob(&self, repo: &RepoName, content: &[u8]) -> Digest {
        let digest = sha256(content);
        let session = self.store().start_upload(repo, Algorithm::Sha256).unwrap();
        match session.is_fresh() && content.len() < 1000 {
            true => session.commit_small(content, &digest).unwrap(),
            false => self.take(session, content, Some(&digest), Ending::Committed).commit(&digest).unwrap(),
        }
        digest
    }

    pub(crate) fn read(&self, repo: &RepoName, digest: &Digest) -> Option<Vec<u8>> {
        let blob = self.store().open_blob(repo, digest).unwrap()?;
        let length = blob.length();
        Some(self.part(blob, 0, length))
    }

    pub(super) fn part(&self, blob: Box<dyn crate::store::Blob>, first: u64, end: u64) -> Vec<u8> {
        let pieces: Vec<Bytes> = self.runtime.block_on(blob.read(first, end).try_collect()).unwrap();
        pieces.concat()
    }

    pub(crate) fn put(&self, repo: &RepoName, bytes: &str, tags: &[&str]) -> Digest {
        put(&*self.store, repo, bytes, tags, &Rules::default()).unwrap()
    }

    pub(crate) fn tagged(&self, repo: &RepoName, tag: &str) -> Option<Digest> {
        let found = self.store.find_manifest(repo, &by_tag(tag)).unwrap();
        found.map(|manifest| manifest.digest)
    }

    pub(super) fn has_manifest(&self, repo: &RepoName, digest: &Digest) -> bool {
        self.store.find_manifest(repo, &Reference::Digest(digest.clone())).unwrap().is_some()
    }

    pub(super) fn tags(&self, repo: &RepoName) -> Vec<String> {
        self.store.tags(repo, None, usize::MAX).unwrap().unwrap_or_default().names
    }

    pub(super) fn remove(&self, repo: &RepoName, reference: Option<Reference>) -> Removed {
        self.store.remove(repo, reference.as_ref(), &Rules::default()).unwrap()
    }
}

pub(crate) fn repo(name: &str) -> RepoName {
    RepoName::parse(name).unwrap()
}

pub(crate) fn tag(name: &str) -> Tag {
    Tag::parse(name).unwrap()
}

pub(crate) fn by_tag(name: &str) -> Reference {
    Reference::Tag(tag(name))
}

pub(crate) fn sha256(content: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, content)
}

/// Makes bytes that differ from place to place.
pub(crate) fn content(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761).max(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

/// An image manifest of a config and layers, whose bytes differ by `name`.
pub(crate) fn image(name: &str, config: &Digest, layers: &[Digest]) -> String {
    let descriptor = |digest: &Digest| json!({"mediaType": "x/y", "digest": digest.as_str(), "size": 1});
    let layers: Vec<_> = layers.iter().map(descriptor).collect();
    json!({
        "schemaVersion": 2, "mediaType": model::OCI_MANIFEST, "config": descriptor(config), "layers": layers,
        "annotations": {"name": name}
    })
    .to_string()
}

/// An index without manifests, whose bytes differ by `name`.
pub(crate) fn index(name: &str, subject: Option<&Digest>) -> String {
    let mut index = json!({
        "schemaVersion": 2, "mediaType": model::OCI_INDEX, "manifests": [], "annotations": {"name": name}
    });
    if let Some(subject) = subject {
        index["subject"] = json!({"mediaType": model::OCI_INDEX, "digest": subject.as_str(), "size": 1});
    }
    index.to_string()
}

/// A manifest as it is pushed.
pub(crate) fn manifest(bytes: &str) -> Manifest {
    let media_type = model::check(bytes.as_bytes(), None).unwrap().media_type.as_str().into();
    Manifest { digest: sha256(bytes.as_bytes()), bytes: Bytes::copy_from_slice(bytes.as_bytes()), media_type }
}

pub(crate) fn put(
    store: &dyn Store,
    repo: &RepoName,
    bytes: &str,
    tags: &[&str],
    rules: &Rules,
) -> Result<Digest, ChangeError> {
    accept(store, repo, bytes, tags, rules).map(|_| sha256(bytes.as_bytes()))
}

pub(super) fn accept(
    store: &dyn Store,
    repo: &RepoName,
    bytes: &str,
    tags: &[&str],
    rules: &Rules,
) -> Result<Vec<Digest>, ChangeError> {
    let checked = model::check(bytes.as_bytes(), None).unwrap();
    let tags: Vec<Tag> = tags.iter().map(|name| tag(name)).collect();
    store.accept_manifest(repo, manifest(bytes), &checked, &tags, rules)
}

pub(super) fn never_changing(tags: &str) -> Rules {
    let tags = Tags { repositories: "**".parse().unwrap(), tags: tags.parse().unwrap() };
    Rules { immutable: vec![tags], ..Rules::default() }
}
