//! Takes the body of one request into a session.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::OnceCell;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::super::parts::{OBJECT_BYTES_MAX, Part, Parts};
use super::hashing::Hashing;
use super::state::{Multipart, Progress, Tail};
use super::{DATA, Home, PERMIT_BYTES, Upload};
use crate::digest::{Digest, Hasher};
use crate::s3::{self, Put};
use crate::store::{Ending, Error, Intake, Kind, Result, Session, Stopped, UploadError};

/// Parts of the usual size that one upload has in memory, at most; and so many that are under way.
pub(super) const PARTS_IN_MEMORY_MAX: u64 = 8;
const PARTS_UNDER_WAY_MAX: u64 = 4;
/// What a part's buffer grows by at first; then it doubles.
const BUFFER_BYTES_MIN: usize = 64 << 10;
/// What came behind the last whole part lies in the state up to so many bytes.
const INLINE_BYTES_MAX: usize = 64 << 10;

/// A session that bytes are coming into.
pub(super) struct Receiving {
    /// As it was when the request began.
    upload: Upload,
    plan: Parts,
    multipart: Arc<Begin>,
    hashing: Hashing,
    /// Bytes of the session, and of this request.
    offset: u64,
    /// The part that is being filled, and its bytes so far.
    part: Part,
    buffer: Vec<u8>,
    under_way: JoinSet<Result<s3::Part, UploadError>>,
    /// The parts of this request that the store has.
    done: Vec<s3::Part>,
    failed: Option<UploadError>,
}

impl Receiving {
    /// `length` is what the request announced, and 0 if it did not.
    pub(super) async fn begin(
        mut upload: Upload,
        length: u64,
        digest: Option<&Digest>,
    ) -> Result<Self, UploadError> {
        let rest = upload.load_rest().await?;
        let before = &upload.progress;
        let hasher = match digest.map(Digest::algorithm) {
            // All there is lies in memory, so the hash may be another.
            Some(algorithm) if algorithm != before.hasher.algorithm() && before.parts.is_empty() => {
                let mut hasher = Hasher::new(algorithm);
                hasher.update(&rest);
                hasher
            }
            _ => before.hasher.clone(),
        };
        let wished = upload.bucket.client.settings().part_size.0;
        let plan = match &before.multipart {
            Some(multipart) => multipart.plan,
            // A request that names the digest brings all there is to come.
            None => {
                let announced = digest.is_some() && length > 0;
                Parts::plan(announced.then(|| before.offset.saturating_add(length)), wished)
            }
        };
        let part = plan.at(before.whole_bytes()).ok_or_else(too_large)?;
        let multipart = Arc::new(Begin::new(&upload, plan, digest));
        let mut receiving = Self {
            plan,
            multipart,
            hashing: Hashing::new(upload.bucket.runtime.clone(), hasher),
            offset: before.offset,
            part,
            buffer: Vec::new(),
            under_way: JoinSet::new(),
            done: Vec::new(),
            failed: None,
            upload,
        };
        receiving.fill(&rest).await?;
        Ok(receiving)
    }

    /// Copies bytes into the buffer; a part that is full goes its way when there is more than it holds.
    async fn fill(&mut self, mut bytes: &[u8]) -> Result<(), UploadError> {
        while !bytes.is_empty() {
            let room = self.part.bytes.saturating_sub(self.buffer.len() as u64);
            if room == 0 {
                self.hand_over().await?;
                continue;
            }
            let now = bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX));
            let (now, later) = bytes.split_at(now);
            self.grow(now.len())?;
            self.buffer.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    /// Makes room in the buffer; it doubles up to the size of the part.
    fn grow(&mut self, more: usize) -> Result<(), UploadError> {
        if self.buffer.capacity() - self.buffer.len() >= more {
            return Ok(());
        }
        let most = usize::try_from(self.part.bytes).unwrap_or(usize::MAX);
        let wanted = self.buffer.capacity().saturating_mul(2).max(BUFFER_BYTES_MIN).min(most);
        let wanted = wanted.max(self.buffer.len().saturating_add(more));
        let grown = self.buffer.try_reserve_exact(wanted.saturating_sub(self.buffer.len()));
        Ok(grown.map_err(|error| Error::of(Kind::Unavailable, "there is no memory for a part", error))?)
    }

    /// Sends a full part on its way, once there is room for another, and begins the next.
    async fn hand_over(&mut self) -> Result<(), UploadError> {
        let next = self.part.begin.saturating_add(self.part.bytes);
        let next = self.plan.at(next).filter(|_| next < OBJECT_BYTES_MAX).ok_or_else(too_large)?;
        let in_memory = PARTS_IN_MEMORY_MAX.saturating_mul(self.upload.bucket.client.settings().part_size.0);
        // One is being filled.
        let most = (in_memory / self.part.bytes).saturating_sub(1).clamp(1, PARTS_UNDER_WAY_MAX);
        while self.under_way.len() as u64 >= most {
            self.settle().await?;
        }
        let held = &self.upload.bucket.uploads;
        let permits = u32::try_from(self.part.bytes.div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX);
        let permits = Arc::clone(&held.permits).acquire_many_owned(permits.min(held.permits_max)).await;
        let content = Bytes::from(std::mem::take(&mut self.buffer));
        let (multipart, number) = (Arc::clone(&self.multipart), self.part.number);
        let work = async move {
            let part = multipart.put(number, content).await;
            drop(permits);
            part
        };
        self.under_way.spawn_on(work, &self.upload.bucket.runtime);
        self.part = next;
        Ok(())
    }

    /// Waits for one of the parts that are under way.
    async fn settle(&mut self) -> Result<(), UploadError> {
        let part = match self.under_way.join_next().await {
            None => return Ok(()),
            Some(part) => {
                part.map_err(|error| Error::of(Kind::Other, "the upload of a part did not end well", error))?
            }
        };
        self.done.push(part?);
        Ok(())
    }

    async fn take(&mut self, bytes: Bytes) -> Result<(), UploadError> {
        self.offset = self.offset.saturating_add(bytes.len() as u64);
        self.upload.room.reach(self.offset).await?;
        self.hashing.push(bytes.clone()).await?;
        self.fill(&bytes).await
    }

    /// Waits until all that came is taken in, and gives the session back.
    pub(super) async fn finish(mut self, ending: Ending) -> Result<Upload, UploadError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        if ending == Ending::TakenBack {
            if !self.under_way.is_empty() {
                self.multipart.get().await?;
            }
            self.under_way.shutdown().await;
            self.multipart.tell(&mut self.upload);
            return Ok(self.upload);
        }
        let is_full = self.buffer.len() as u64 == self.part.bytes;
        if is_full && ending != Ending::Committed {
            self.hand_over().await?;
        }
        while !self.under_way.is_empty() {
            self.settle().await?;
        }
        self.multipart.tell(&mut self.upload);
        let Self { mut upload, hashing, mut done, buffer, offset, .. } = self;
        done.sort_unstable_by_key(|part| part.number);
        let Progress { multipart, mut parts, note, .. } = upload.progress.clone();
        parts.append(&mut done);
        let hasher = hashing.finish().await?;
        let came = Progress { hasher, offset, multipart, parts, tail: None, note };
        let rest = Bytes::from(buffer);
        match ending {
            Ending::BrokenOff if !upload.is_known => {
                // Nobody can go on with it.
                upload.discard().await;
                upload.stored = None;
            }
            Ending::Acknowledged | Ending::BrokenOff => return upload.put_away(came, rest).await,
            Ending::Committed | Ending::TakenBack => {}
        }
        (upload.progress, upload.rest) = (came, Some(rest));
        Ok(upload)
    }
}

impl Upload {
    /// Puts away what a session has come to, and what is behind its last whole part.
    async fn put_away(mut self, mut progress: Progress, rest: Bytes) -> Result<Self, UploadError> {
        let home = &self.home;
        if rest.len() > INLINE_BYTES_MAX {
            // By a name that no other replica gives to what it put there.
            let name = format!("tail-{}-{}", progress.offset, Uuid::new_v4().simple());
            home.client.put(&home.key(&name), rest.clone(), Put::default()).await?;
            self.is_large = true;
            progress.tail = Some(Tail::Object(name));
        } else if !rest.is_empty() {
            progress.tail = Some(Tail::Bytes(rest.clone()));
        }
        let stored = home.put_state(&progress, self.stored.as_deref()).await;
        let old = match (&stored, &self.progress.tail, &progress.tail) {
            (Ok(_), Some(Tail::Object(old)), _) => Some(old),
            // Another replica is ahead.
            (Err(UploadError::Busy), _, Some(Tail::Object(new))) => Some(new),
            _ => None,
        };
        if let Some(name) = old
            && let Err(error) = home.client.delete(&home.key(name), None).await
        {
            tracing::warn!(repo = %home.repo, id = %home.id, %error, "a tail that was replaced was not removed");
        }
        self.stored = Some(stored?);
        self.room.keep(progress.offset);
        (self.progress, self.rest) = (progress, Some(rest));
        Ok(self)
    }
}

impl Intake for Receiving {
    fn push(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), Stopped>> {
        Box::pin(async move {
            if self.failed.is_none() {
                self.failed = self.take(bytes).await.err();
            }
            if self.failed.is_none() { Ok(()) } else { Err(Stopped) }
        })
    }

    fn end(self: Box<Self>, ending: Ending) -> BoxFuture<'static, Result<Box<dyn Session>, UploadError>> {
        Box::pin(async move {
            let upload = self.finish(ending).await?;
            Ok(Box::new(upload) as Box<dyn Session>)
        })
    }
}

/// The multipart upload of a session, which is begun when the first part asks for it.
struct Begin {
    home: Home,
    key: String,
    plan: Parts,
    /// What the state says by then, and its ETag.
    before: Progress,
    stored: Option<String>,
    begun: OnceCell<Begun>,
}

struct Begun {
    upload: s3::Upload,
    /// The ETag of the state that names it.
    stored: String,
}

impl Begin {
    fn new(upload: &Upload, plan: Parts, digest: Option<&Digest>) -> Self {
        let Upload { home, progress, stored, .. } = upload;
        let begun = progress.multipart.as_ref().zip(stored.clone());
        let begun = begun.map(|(multipart, stored)| Begun { upload: multipart.upload.clone(), stored });
        Self {
            key: digest.map_or_else(|| home.key(DATA), |digest| home.keys.blob(digest)),
            home: home.clone(),
            plan,
            before: progress.clone(),
            stored: stored.clone(),
            begun: OnceCell::new_with(begun),
        }
    }

    async fn put(self: &Arc<Self>, number: u16, content: Bytes) -> Result<s3::Part, UploadError> {
        let Begun { upload, stored } = self.get().await?;
        match self.home.client.upload_part(upload, number, content).await {
            Err(error) if error.is_not_found() => Err(self.home.lacks(Some(stored), error).await),
            done => Ok(done?),
        }
    }

    async fn get(self: &Arc<Self>) -> Result<&Begun, UploadError> {
        let begin = async || {
            // On its own, as it would be half done if the part that asks for it were given up.
            let this = Arc::clone(self);
            let begun = tokio::spawn(async move { this.begin().await }).await;
            begun.map_err(|error| {
                Error::of(Kind::Other, "the beginning of an upload did not end well", error)
            })?
        };
        self.begun.get_or_try_init(begin).await
    }

    /// Begins it, and sees that it is found again before anything is in it.
    async fn begin(&self) -> Result<Begun, UploadError> {
        let upload = self.home.client.create_upload(&self.key, Some(super::CONTENT_TYPE)).await?;
        let multipart = Some(Multipart { upload: upload.clone(), plan: self.plan });
        let progress = Progress { multipart, ..self.before.clone() };
        match self.home.put_state(&progress, self.stored.as_deref()).await {
            Ok(stored) => Ok(Begun { upload, stored }),
            Err(error) => {
                // What is not known to have failed may have named it.
                if matches!(error, UploadError::Busy)
                    && let Err(error) = self.home.client.abort_upload(&upload).await
                {
                    tracing::warn!(key = upload.key, %error, "an upload without a session was not given up");
                }
                Err(error)
            }
        }
    }

    /// Tells the session of what was begun for it.
    fn tell(&self, session: &mut Upload) {
        if let Some(Begun { upload, stored }) = self.begun.get() {
            session.progress.multipart = Some(Multipart { upload: upload.clone(), plan: self.plan });
            session.stored = Some(stored.clone());
            session.is_large = true;
        }
    }
}

fn too_large() -> UploadError {
    let why = format!("an object has {OBJECT_BYTES_MAX} bytes at most");
    UploadError::Store(Error::of(Kind::Full, "the bucket takes no more of an upload", why))
}
