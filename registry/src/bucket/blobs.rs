//! Blobs: found, read, mounted, taken from a repository.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::links::Link;
use super::view::View;
use super::{Bucket, found};
use crate::digest::Digest;
use crate::names::RepoName;
use crate::s3::{self, Client, Head, Put, RangeBody};
use crate::store::{self, Error, Result};

/// Bytes of a blob that are asked for at the same time as its link, so that a small one is there with one round trip. What
/// one who wants another part has asked for in vain is no more than that.
const START_BYTES: u64 = 256 << 10;
/// What is written to see whether the bucket takes it.
const PROBE: &[u8] = b"dvcr\n";

/// A blob that was found.
#[derive(Debug)]
pub(super) struct Blob {
    client: Client,
    key: String,
    head: Head,
    /// Its first [`START_BYTES`], which are on their way.
    start: RangeBody,
}

/// What is seen of a blob that a repository may have.
pub(super) enum Seen {
    Absent,
    /// It stays for half of the grace period at least, and has so many bytes.
    Young(u64),
    /// It has to be claimed, under this digest, too.
    Old(Digest),
}

/// What a repository has of a blob.
struct Found {
    link: Link,
    bytes: u64,
}

impl Bucket {
    /// Finds a blob of a repository for one who will build on it.
    ///
    /// A link that was placed within half of the grace period is young enough. An older one is placed anew, unless it is condemned.
    pub(super) async fn claim_blob(&self, repo: &RepoName, digest: &Digest) -> Result<Option<u64>> {
        match self.see_blob(repo, digest).await? {
            Seen::Absent => Ok(None),
            Seen::Young(bytes) => Ok(Some(bytes)),
            // Only what was found is claimed: most of what clients ask for is not there.
            Seen::Old(target) => self.claim_old(repo, digest, target).await,
        }
    }

    /// Looks for a blob of a repository. Also for async threads.
    pub(super) async fn see_blob(&self, repo: &RepoName, digest: &Digest) -> Result<Seen> {
        match self.look_for(repo, digest).await? {
            None => Ok(Seen::Absent),
            Some(found) if self.is_young(found.link.modified).await? => Ok(Seen::Young(found.bytes)),
            Some(found) => Ok(Seen::Old(found.link.target)),
        }
    }

    /// Claims a blob whose link is old.
    pub(super) async fn claim_old(
        &self,
        repo: &RepoName,
        digest: &Digest,
        target: Digest,
    ) -> Result<Option<u64>> {
        let digests = [digest.clone(), target];
        let claimed = self.place(distinct(&digests), async |view| {
            let Some(found) = self.look_for(repo, digest).await? else { return Ok(None) };
            if [digest, &found.link.target].iter().any(|digest| view.is_condemned(repo, digest)) {
                return Ok(None);
            }
            let key = self.keys.layer_link(repo, digest);
            self.place_link(&key, &found.link.target, view.validity()).await?;
            Ok(Some(found.bytes))
        });
        Ok(claimed.await?)
    }

    /// Opens a blob of a repository, and begins to read it.
    ///
    /// It does not matter whether it is condemned: who reads, places no link.
    pub(super) async fn open_blob(
        self: &Arc<Self>,
        repo: &RepoName,
        digest: &Digest,
    ) -> Result<Option<Blob>> {
        let link = self.keys.layer_link(repo, digest);
        let (link, started) = tokio::try_join!(self.read_link_together(&link), self.start(digest))?;
        let Some(link) = link else { return Ok(None) };
        match link.target == *digest {
            true => Ok(started),
            false => Ok(self.start(&link.target).await?),
        }
    }

    /// Begins to read a blob, whoever has it.
    async fn start(&self, digest: &Digest) -> s3::Result<Option<Blob>> {
        let (client, key, asked) = (self.client.clone(), self.keys.blob(digest), Instant::now());
        let Some((head, start)) = found(client.get_start(&key, START_BYTES).await)? else {
            self.lengths.forget(digest);
            return Ok(None);
        };
        self.lengths.put(digest, head.bytes, asked);
        Ok(Some(Blob { client, key, head, start }))
    }

    /// Tells whether a repository has a blob that is stored under the digest it is called by.
    pub(super) async fn has_as_it_is_called(&self, repo: &RepoName, digest: &Digest) -> Result<bool> {
        let link = self.read_link_together(&self.keys.layer_link(repo, digest)).await?;
        Ok(link.is_some_and(|link| link.target == *digest))
    }

    /// Makes a URL by which whoever has it can get a blob of a repository from the store, for so long.
    pub(super) async fn locate_blob(
        &self,
        repo: &RepoName,
        digest: &Digest,
        lasts: Duration,
    ) -> Result<Option<String>> {
        let Some(found) = self.look_for(repo, digest).await? else { return Ok(None) };
        Ok(Some(self.client.presigned(&self.keys.blob(&found.link.target), lasts).await?))
    }

    /// Gives `to` a blob that `from` has; returns its length, `None` if `from` lacks it, or one of the two is about to lose it.
    ///
    /// What lies under another digest than it is called by is not given: it is uploaded then.
    ///
    /// # Errors
    /// Also when the quota of `to` leaves no room.
    pub(super) async fn mount_blob(
        &self,
        from: &RepoName,
        to: &RepoName,
        digest: &Digest,
    ) -> Result<Option<u64>> {
        let link = self.keys.layer_link(to, digest);
        let mut room = self.quotas.room(to, Uuid::new_v4(), 0);
        if room.is_bounded() {
            let data = found(self.client.head(&self.keys.blob(digest)).await)?;
            let Some(data) = data else { return Ok(None) };
            room.make_way(&link, data.bytes).await?;
        }
        let mounted = self.place(std::slice::from_ref(digest), async |view| {
            if view.is_condemned(from, digest) || view.is_condemned(to, digest) {
                return Ok(None);
            }
            let found = self.look_for(from, digest).await?;
            let Some(found) = found.filter(|found| found.link.target == *digest) else { return Ok(None) };
            self.place_link(&link, digest, view.validity()).await?;
            Ok(Some(found.bytes))
        });
        let mounted = mounted.await?;
        if mounted.is_some() {
            room.placed().await;
        }
        Ok(mounted)
    }

    /// Takes a blob from a repository; its bytes stay until they are collected. Returns whether it was there.
    ///
    /// Of two who take it at the same time, both may be told that it was. Whoever gives it to the repository at the same time may
    /// have come before; but the removal does not come later than its validity, also when its answer is lost.
    pub(super) async fn delete_blob(&self, repo: &RepoName, digest: &Digest) -> Result<bool> {
        let key = self.keys.layer_link(repo, digest);
        if found(self.client.head(&key).await)?.is_none() {
            return Ok(false);
        }
        self.place(&[], async |view| self.client.delete(&key, Some(view.validity())).await).await?;
        Ok(true)
    }

    /// Tells whether the bucket can be written and read just now.
    pub(super) async fn probe(&self) -> Result<()> {
        let key = self.keys.probe();
        self.client.put(&key, Bytes::from_static(PROBE), Put::default()).await?;
        // All replicas write the same.
        match self.client.get(&key, PROBE.len() as u64).await? {
            object if object.content == PROBE => Ok(()),
            _ => Err(Error::other("the bucket does not give back what was written")),
        }
    }

    /// Whether a repository has a blob, and is not about to lose it.
    pub(super) async fn has_blob(&self, repo: &RepoName, digest: &Digest, view: &View) -> s3::Result<bool> {
        let found = self.look_for(repo, digest).await?;
        Ok(found.is_some_and(|found| !view.is_condemned(repo, &found.link.target)))
    }

    /// Whether what was placed at that time, by the server's clock, stays for half of the grace period whoever needs it.
    pub(super) async fn is_young(&self, modified: SystemTime) -> s3::Result<bool> {
        let age = self.client.server_now().await?.latest.duration_since(modified);
        Ok(age.unwrap_or_default() < self.options.grace / 2)
    }

    /// Looks for a repository's link to a blob. A blob whose link is there is there itself, as long as nothing is lost; so its data may
    /// have been looked at some seconds ago.
    async fn look_for(&self, repo: &RepoName, digest: &Digest) -> s3::Result<Option<Found>> {
        let link = self.keys.layer_link(repo, digest);
        let (link, bytes) = tokio::try_join!(self.read_link_together(&link), self.length(digest))?;
        let Some(link) = link else { return Ok(None) };
        // Distribution lets the digest of one algorithm name a blob that is stored under another.
        let bytes = match link.target == *digest {
            true => bytes,
            false => self.length(&link.target).await?,
        };
        Ok(bytes.map(|bytes| Found { link, bytes }))
    }

    /// Tells the length of a blob, if it is there, or was some seconds ago.
    pub(super) async fn length(&self, digest: &Digest) -> s3::Result<Option<u64>> {
        if let Some(bytes) = self.lengths.get(digest) {
            return Ok(Some(bytes));
        }
        let asked = Instant::now();
        let head = self.look_together(&self.keys.blob(digest)).await?;
        if let Some(head) = &head {
            self.lengths.put(digest, head.bytes, asked);
        }
        Ok(head.map(|head| head.bytes))
    }
}

/// One of two that are the same, else both.
fn distinct(digests: &[Digest; 2]) -> &[Digest] {
    match digests {
        [one, other] if one == other => std::slice::from_ref(one),
        both => both,
    }
}

impl store::Blob for Blob {
    fn length(&self) -> u64 {
        self.head.bytes
    }

    fn read(self: Box<Self>, first: u64, end: u64) -> BoxStream<'static, io::Result<Bytes>> {
        let reading = Reading::new(*self, first, end);
        Box::pin(stream::unfold(reading, async |mut reading| {
            let bytes = reading.next().await.transpose()?;
            Some((bytes, reading))
        }))
    }
}

/// A part of a blob as it comes: first what of its start is of use, then the rest, which is asked for at the same time.
struct Reading {
    client: Client,
    key: String,
    etag: String,
    /// What is still to come.
    range: Range<u64>,
    start: Option<RangeBody>,
    rest: Rest,
}

enum Rest {
    /// It has not been asked for, and is behind what came of the start.
    Unasked(Range<u64>),
    Asked(JoinHandle<s3::Result<RangeBody>>),
    Coming(RangeBody),
}

impl Reading {
    fn new(blob: Blob, first: u64, end: u64) -> Self {
        let Blob { client, key, head, start } = blob;
        let start = (first == 0).then_some(start);
        let rest = start.as_ref().map_or(first, |start| start.remaining().min(end))..end;
        Self { client, key, etag: head.etag, range: first..end, start, rest: Rest::Unasked(rest) }
    }

    /// Returns the next bytes, `None` at the end.
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let left = usize::try_from(self.range.end.saturating_sub(self.range.start)).unwrap_or(usize::MAX);
        if left == 0 {
            return Ok(None);
        }
        self.ask();
        let bytes = match &mut self.start {
            Some(start) => start.next().await.map_err(io::Error::other)?,
            None => None,
        };
        let bytes = match bytes {
            Some(bytes) => Some(bytes),
            None => {
                self.start = None;
                self.rest().await.map_err(io::Error::other)?
            }
        };
        let Some(mut bytes) = bytes else {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{left} bytes of a blob did not come"),
            ));
        };
        bytes.truncate(left);
        self.range.start = self.range.start.saturating_add(bytes.len() as u64);
        Ok(Some(bytes))
    }

    /// Asks for the rest, if there is any.
    fn ask(&mut self) {
        if let Rest::Unasked(range) = &self.rest
            && !range.is_empty()
        {
            let (client, key, etag, range) =
                (self.client.clone(), self.key.clone(), self.etag.clone(), range.clone());
            self.rest =
                Rest::Asked(tokio::spawn(async move { client.get_range(&key, range, Some(&etag)).await }));
        }
    }

    async fn rest(&mut self) -> Result<Option<Bytes>> {
        if let Rest::Asked(asked) = &mut self.rest {
            let body = asked.await.map_err(|error| Error::new("cannot read a blob", error.into()))??;
            self.rest = Rest::Coming(body);
        }
        match &mut self.rest {
            Rest::Coming(body) => Ok(body.next().await?),
            Rest::Unasked(_) | Rest::Asked(_) => Ok(None),
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if let Rest::Asked(asked) = &self.rest {
            asked.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use dvcr_tests::{Fault, S3Proxy};
    use futures_util::TryStreamExt;

    use super::super::tests::Opened;
    use super::*;
    use crate::digest::Algorithm;
    use crate::store::Blob as _;

    impl Opened {
        /// Puts a blob and its link where they belong.
        async fn put_blob(&self, repo: &RepoName, content: &Bytes) -> Digest {
            let digest = Digest::of(Algorithm::Sha256, content);
            let bucket = &self.bucket;
            bucket.client.put(&bucket.keys.blob(&digest), content.clone(), Put::default()).await.unwrap();
            let validity = bucket.view().await.unwrap().validity();
            bucket.place_link(&bucket.keys.layer_link(repo, &digest), &digest, validity).await.unwrap();
            digest
        }

        async fn read(&self, repo: &RepoName, digest: &Digest, first: u64, end: u64) -> io::Result<Vec<u8>> {
            let blob = self.bucket.open_blob(repo, digest).await.unwrap().unwrap();
            let pieces: Vec<Bytes> = Box::new(blob).read(first, end).try_collect().await?;
            Ok(pieces.concat())
        }
    }

    fn repo(name: &str) -> RepoName {
        RepoName::parse(name).unwrap()
    }

    /// Bytes that differ from place to place.
    fn content(length: u32) -> Bytes {
        (0..length / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
    }

    #[tokio::test]
    async fn every_part_of_a_blob_is_read_wherever_its_start_ends() {
        for server in Opened::servers().await {
            let opened = Opened::new(server).await;
            let start = START_BYTES;
            for length in [0, 4, start - 4, start, start + 4, 3 * start] {
                let content = content(length as u32);
                let digest = opened.put_blob(&repo("r"), &content).await;
                let parts = [(0, length), (0, 1), (0, start), (0, start + 1), (1, length), (start, length)];
                for (first, end) in parts.into_iter().filter(|(first, end)| first <= end && *end <= length) {
                    let read = opened.read(&repo("r"), &digest, first, end).await.unwrap();
                    assert!(read == content[first as usize..end as usize], "{first} to {end} of {length}");
                }
            }
        }
    }

    #[tokio::test]
    async fn a_digest_of_another_algorithm_may_name_a_blob() {
        let opened = Opened::new(Opened::minio().await).await;
        let content = content(1000);
        let stored = opened.put_blob(&repo("other"), &content).await;
        let (r, bucket) = (repo("r"), &opened.bucket);
        let called = Digest::of(Algorithm::Sha512, &content);
        let validity = bucket.view().await.unwrap().validity();
        bucket.place_link(&bucket.keys.layer_link(&r, &called), &stored, validity).await.unwrap();
        assert_eq!(bucket.claim_blob(&r, &called).await.unwrap(), Some(1000));
        assert!(opened.read(&r, &called, 0, 1000).await.unwrap() == content);
    }

    #[tokio::test]
    async fn an_old_link_counts_as_new_when_it_is_claimed() {
        let opened = Opened::with_grace(Opened::minio().await, Duration::from_secs(2)).await;
        let (r, bucket) = (repo("r"), &opened.bucket);
        let digest = opened.put_blob(&r, &content(40)).await;
        let key = bucket.keys.layer_link(&r, &digest);
        let modified = async || bucket.client.head(&key).await.unwrap().modified;
        let placed = modified().await;
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        while modified().await == placed {
            assert_eq!(bucket.claim_blob(&r, &digest).await.unwrap(), Some(40));
            assert!(tokio::time::Instant::now() < deadline, "an old link is not placed anew");
        }
    }

    #[tokio::test]
    async fn a_blob_whose_reading_breaks_off_for_good_does_not_end_short() {
        let server = Opened::minio().await;
        let opened = Opened::new(Arc::clone(&server)).await;
        let content = content(3 * START_BYTES as u32);
        let digest = opened.put_blob(&repo("r"), &content).await;
        for (cut, is_read) in [(1 << 20, true), (START_BYTES + 70_000, true), (100_000, true), (1000, false)]
        {
            let decide = move |asked: &dvcr_tests::Asked| match asked.path.contains("/data") {
                true => Fault::CutBody(cut),
                false => Fault::None,
            };
            let proxy = S3Proxy::start(server.address(), decide).unwrap();
            let through = opened.through(&proxy).await;
            match through.read(&repo("r"), &digest, 0, content.len() as u64).await {
                Ok(read) => assert!(is_read && read == content, "cut behind {cut} bytes"),
                Err(error) => assert!(!is_read, "cut behind {cut} bytes: {error}"),
            }
        }
    }

    #[tokio::test]
    async fn a_bucket_that_cannot_be_written_is_told_from_one_that_can() {
        let opened = Opened::new(Opened::minio().await).await;
        opened.bucket.probe().await.unwrap();
        let refuse = |asked: &dvcr_tests::Asked| match asked.method.as_str() {
            "PUT" => Fault::Answer(403, "AccessDenied"),
            _ => Fault::None,
        };
        let proxy = S3Proxy::start(opened.server.address(), refuse).unwrap();
        assert!(opened.through(&proxy).await.bucket.probe().await.is_err());
    }
}
