//! Turns a session into a blob.

use std::cell::Cell;
use std::mem;
use std::time::Instant;

use bytes::Bytes;

use super::super::quota::Room;
use super::super::{Bucket, found};
use super::state::Multipart;
use super::{CONTENT_TYPE, DATA, Upload};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::s3::{self, Condition, Put};
use crate::store::{Error, Kind, Result, UploadError};

/// How often a commit waits for a collection to be through with the blob.
const WAITS_MAX: u32 = 3;

impl Upload {
    /// Turns a fresh session, and a body, into a blob.
    pub(in crate::bucket) async fn store(
        mut self,
        body: Bytes,
        expected: &Digest,
    ) -> Result<(), UploadError> {
        self.rest = Some(body);
        self.commit_rest(expected, Digest::of).await
    }

    /// Turns the session into a blob.
    pub(super) async fn finish(mut self, expected: &Digest) -> Result<(), UploadError> {
        self.load_rest().await?;
        if !self.progress.parts.is_empty() {
            return self.commit_parts(expected).await;
        }
        let hasher = self.progress.hasher.clone();
        let hash = |algorithm, rest: &[u8]| match hasher.algorithm() == algorithm {
            true => hasher.finish(),
            false => Digest::of(algorithm, rest),
        };
        self.commit_rest(expected, hash).await
    }

    /// Puts a blob that is in memory.
    async fn commit_rest(
        mut self,
        expected: &Digest,
        hash: impl FnOnce(Algorithm, &[u8]) -> Digest,
    ) -> Result<(), UploadError> {
        let content = self.rest.clone().unwrap_or_default();
        let actual = hash(expected.algorithm(), &content);
        self.check(actual, expected).await?;
        let length = content.len() as u64;
        let room = mem::take(&mut self.room);
        self.place(&Source::new(&self, Content::Memory(content), expected, length), room).await
    }

    /// Has the parts put together, and the last one with them.
    async fn commit_parts(mut self, expected: &Digest) -> Result<(), UploadError> {
        let Some(Multipart { upload, plan }) = self.progress.multipart.clone() else {
            return Err(self.home.damaged("it has parts and no upload".to_owned()).into());
        };
        let is_hashed = self.progress.hasher.algorithm() == expected.algorithm();
        if is_hashed {
            self.check(self.progress.hasher.clone().finish(), expected).await?;
        }
        // What was not hashed yet does not come to be at a blob's key.
        let is_in_place = is_hashed && upload.key == self.home.keys.blob(expected);
        let is_beside = upload.key == self.home.key(DATA);
        if !is_in_place && !is_beside {
            self.discard().await;
            let why = format!("its parts are to become {}", upload.key);
            let what = format!("the upload was begun as another blob than {expected}; it has to begin anew");
            return Err(Error::of(Kind::Unavailable, what, why).into());
        }
        let rest = self.rest.take().unwrap_or_default();
        if !rest.is_empty() {
            let part = plan.at(self.progress.whole_bytes());
            let part = part.ok_or_else(|| self.home.damaged("it has too many parts".to_owned()))?;
            match self.home.client.upload_part(&upload, part.number, rest).await {
                Ok(part) => self.progress.parts.push(part),
                Err(error) if error.is_not_found() => {
                    return Err(self.home.lacks(self.stored.as_deref(), error).await);
                }
                Err(error) => return Err(error.into()),
            }
        }
        let length = self.progress.whole_bytes();
        let room = mem::take(&mut self.room);
        let content = if is_in_place { Content::Parts(upload) } else { Content::Beside(upload) };
        let source = Source::new(&self, content, expected, length);
        if !is_hashed {
            if !source.put_together().await? {
                return Err(self.lost(expected).await);
            }
            self.check(source.read_again().await?, expected).await?;
        }
        self.place(&source, room).await
    }

    /// Ends the session if its content is another.
    async fn check(&self, actual: Digest, expected: &Digest) -> Result<(), UploadError> {
        if actual == *expected {
            return Ok(());
        }
        self.discard().await;
        Err(UploadError::Digest { actual })
    }

    /// Places the blob and the repository's link to it, and removes the session.
    async fn place(&self, source: &Source<'_>, mut room: Room) -> Result<(), UploadError> {
        let Source { bucket, expected, length, .. } = source;
        let repo = &self.home.repo;
        let link = bucket.keys.layer_link(repo, expected);
        room.make_way(&link, *length).await?;
        // With nothing beside it, the state is removed while the link is placed. What has parts stays until they are a blob.
        let is_removed = Cell::new(self.stored.is_none());
        let remove = async || {
            if !is_removed.replace(true) {
                self.discard().await;
            }
        };
        for _ in 0..WAITS_MAX {
            let placed = bucket.place(std::slice::from_ref(*expected), async |view| {
                if view.is_condemned(repo, expected) {
                    return Ok(Placed::Condemned);
                }
                if !source.bring().await? {
                    return Ok(Placed::Lost);
                }
                let placed = bucket.place_link(&link, expected, view.validity());
                match self.is_large {
                    true => placed.await?,
                    false => tokio::join!(placed, remove()).0?,
                }
                Ok(Placed::Done)
            });
            match placed.await? {
                Placed::Done => {
                    bucket.lengths.put(expected, *length, Instant::now());
                    tokio::join!(remove(), room.placed());
                    return Ok(());
                }
                Placed::Lost => return Err(self.lost(expected).await),
                Placed::Condemned => bucket.wait_until_removed(repo, expected).await?,
            }
        }
        Err(Error::of(Kind::Unavailable, "the blob is being collected all the time", expected.to_string())
            .into())
    }

    /// What to say when the parts are gone, and the blob is not there.
    async fn lost(&self, expected: &Digest) -> UploadError {
        self.discard().await;
        let why = "the parts of an upload are gone, or others than it was told; it has to begin anew";
        Error::of(Kind::Unavailable, why, expected.to_string()).into()
    }
}

enum Placed {
    Done,
    Condemned,
    /// The content is not there any more.
    Lost,
}

/// What a blob is made of.
enum Content {
    Memory(Bytes),
    /// A multipart upload to the key of the blob.
    Parts(s3::Upload),
    /// A multipart upload to the session's own key.
    Beside(s3::Upload),
}

/// Brings a blob's content to its key, as often as it is needed there.
struct Source<'a> {
    bucket: &'a Bucket,
    session: &'a Upload,
    content: Content,
    expected: &'a Digest,
    key: String,
    length: u64,
    is_put_together: Cell<bool>,
    was_brought: Cell<bool>,
}

impl<'a> Source<'a> {
    fn new(session: &'a Upload, content: Content, expected: &'a Digest, length: u64) -> Self {
        let (bucket, key) = (&*session.bucket, session.home.keys.blob(expected));
        let (is_put_together, was_brought) = Default::default();
        Self { bucket, session, content, expected, key, length, is_put_together, was_brought }
    }

    /// Sees to it that the blob is at its key; `false` if the content is lost.
    ///
    /// What is there already stays as it is, for those who are reading it.
    async fn bring(&self) -> s3::Result<bool> {
        if self.was_brought.replace(true) && self.is_there().await? {
            return Ok(true);
        }
        match &self.content {
            Content::Memory(content) => self.put(content).await,
            Content::Parts(_) => self.put_together().await,
            Content::Beside(_) => {
                let brought = self.is_there().await? || self.put_together().await? && self.copy().await?;
                // Another replica may have done it, and removed the session.
                Ok(brought || self.is_there().await?)
            }
        }
    }

    async fn is_there(&self) -> s3::Result<bool> {
        self.has_all(&self.key).await
    }

    async fn has_all(&self, key: &str) -> s3::Result<bool> {
        let head = found(self.bucket.client.head(key).await)?;
        Ok(head.is_some_and(|head| head.bytes == self.length))
    }

    async fn put(&self, content: &Bytes) -> s3::Result<bool> {
        let client = &self.bucket.client;
        let sha256 = (self.expected.algorithm() == Algorithm::Sha256).then(|| self.expected.hex().to_owned());
        let put = |put: Put| {
            let put = Put { content_type: Some(CONTENT_TYPE), sha256: sha256.clone(), ..put };
            client.put(&self.key, content.clone(), put)
        };
        match put(Put::new()).await {
            Err(error) if error.kind() == s3::Kind::Precondition => {
                if !self.is_there().await? {
                    tracing::warn!(
                        key = self.key,
                        "what is there has another length than the blob: it is replaced"
                    );
                    put(Put::default()).await?;
                }
                Ok(true)
            }
            done => done.map(|_| true),
        }
    }

    /// Makes an object of the parts, once; `false` if they are gone, or others.
    async fn put_together(&self) -> s3::Result<bool> {
        let upload = match &self.content {
            Content::Parts(upload) | Content::Beside(upload) => upload,
            Content::Memory(_) => return Ok(true),
        };
        if self.is_put_together.get() {
            return self.has_all(&upload.key).await;
        }
        let (client, parts) = (&self.bucket.client, &self.session.progress.parts);
        let complete = |condition| client.complete_upload(upload, parts, condition, None);
        let done = match complete(Some(Condition::Absent)).await {
            Err(error) if error.kind() == s3::Kind::Precondition => {
                if self.has_all(&upload.key).await? {
                    // Its parts go with the session.
                    return Ok(true);
                }
                tracing::warn!(
                    key = upload.key,
                    "what is there has another length than the blob: it is replaced"
                );
                complete(None).await
            }
            done => done,
        };
        match done {
            // By this very call, or by a replica that was held up.
            Err(error) if error.is_not_found() => {
                let has_all = self.has_all(&upload.key).await?;
                self.is_put_together.set(has_all);
                Ok(has_all)
            }
            Err(error) => Err(error),
            Ok(_) => {
                self.is_put_together.set(true);
                Ok(true)
            }
        }
    }

    /// Copies the session's own object; `false` if it is gone.
    async fn copy(&self) -> s3::Result<bool> {
        let data = self.session.home.key(DATA);
        match self.bucket.client.copy(&data, &self.key, None).await {
            Err(error) if error.is_not_found() => Ok(false),
            done => done.map(|_| true),
        }
    }

    /// Runs another hash than the session did over all of it.
    async fn read_again(&self) -> s3::Result<Digest> {
        let data = self.session.home.key(DATA);
        let mut body = self.bucket.client.get_range(&data, 0..self.length, None).await?;
        let mut hasher = Hasher::new(self.expected.algorithm());
        while let Some(bytes) = body.next().await? {
            hasher.update(&bytes);
        }
        Ok(hasher.finish())
    }
}
