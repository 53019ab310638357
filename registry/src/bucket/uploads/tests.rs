//! Uploads in a bucket, beyond what every store promises: several replicas, parts, a proxy that misbehaves.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dvcr_tests::{Asked, Fault, S3Proxy, S3Server, TempDir, temp_dir};
use futures_util::stream::TryStreamExt;
use proptest::prelude::*;
use tokio::runtime::Runtime;

use super::super::{Options, Timing};
use super::*;
use crate::s3::Settings;
use crate::s3::testing;
use crate::store::{Ending, Intake};
use crate::units::{Size, Time};

const MIB: usize = 1 << 20;
const PART_BYTES: usize = 5 * MIB;
/// How long something may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// A bucket that replicas share, whose parts are as small as they can be.
struct Fixture {
    settings: Settings,
    server: Arc<S3Server>,
    _keys: TempDir,
}

impl Fixture {
    async fn new() -> Self {
        tokio::task::spawn_blocking(Self::start).await.unwrap()
    }

    fn start() -> Self {
        let (server, keys) = (S3Server::shared_minio(), temp_dir());
        let mut settings = testing::settings(&server, &keys);
        settings.bucket = server.new_bucket().unwrap();
        settings.part_size = Size(PART_BYTES as u64);
        Self { settings, server, _keys: keys }
    }

    async fn replica(&self) -> Arc<Bucket> {
        open(self.settings.clone()).await
    }

    /// A replica whose requests go by way of a proxy, and are sent thrice at most.
    async fn through(&self, decide: impl FnMut(&Asked) -> Fault + Send + 'static) -> (Arc<Bucket>, S3Proxy) {
        let proxy = S3Proxy::start(self.server.address(), decide).unwrap();
        let settings = Settings {
            endpoint: Some(proxy.endpoint()),
            attempts: NonZeroU32::new(3).unwrap(),
            request_timeout: Time(Duration::from_secs(20)),
            ..self.settings.clone()
        };
        (open(settings).await, proxy)
    }
}

async fn open(settings: Settings) -> Arc<Bucket> {
    let options = Options { grace: Duration::from_secs(3600), timing: Timing::default() };
    Bucket::open(settings, options).await.unwrap()
}

fn repo() -> RepoName {
    RepoName::parse("a/b").unwrap()
}

fn sha256(content: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, content)
}

/// Bytes that differ from place to place.
fn noise(length: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

async fn begun(bucket: &Arc<Bucket>) -> Uuid {
    bucket.begin_upload(&repo(), Algorithm::Sha256).await.unwrap()
}

async fn opened(bucket: &Arc<Bucket>, id: Uuid) -> Option<Upload> {
    bucket.open_upload(&repo(), id).await.unwrap()
}

/// Brings bytes by a request that does not end.
async fn bring(upload: Upload, bytes: &Bytes, digest: Option<&Digest>) -> Receiving {
    let mut receiving = Receiving::begin(upload, 0, digest).await.unwrap();
    for start in (0..bytes.len()).step_by(100_000) {
        let piece = bytes.slice(start..bytes.len().min(start + 100_000));
        receiving.push(piece).await.unwrap();
    }
    receiving
}

async fn take(
    upload: Upload,
    bytes: &Bytes,
    digest: Option<&Digest>,
    ending: Ending,
) -> Result<Upload, UploadError> {
    bring(upload, bytes, digest).await.finish(ending).await
}

async fn acknowledged(bucket: &Arc<Bucket>, bytes: &Bytes) -> Uuid {
    let id = begun(bucket).await;
    let upload = opened(bucket, id).await.unwrap();
    take(upload, bytes, None, Ending::Acknowledged).await.unwrap();
    id
}

/// Brings what is missing, and makes the blob.
async fn finish(bucket: &Arc<Bucket>, id: Uuid, content: &Bytes, digest: &Digest) -> Result<(), UploadError> {
    let mut upload = opened(bucket, id).await.unwrap();
    let rest = content.slice(usize::try_from(upload.offset()).unwrap()..);
    if !rest.is_empty() {
        upload = take(upload, &rest, Some(digest), Ending::Committed).await?;
    }
    upload.finish(digest).await
}

/// Checks that the blob is there, and nothing is left of any session.
async fn assert_stored(bucket: &Bucket, digest: &Digest, content: &Bytes) {
    let data = bucket.client.get(&bucket.keys.blob(digest), 64 << 20).await.unwrap().content;
    assert!(data == content, "{digest} has other bytes");
    let link = bucket.client.get(&bucket.keys.layer_link(&repo(), digest), 1000).await.unwrap().content;
    assert_eq!(link, digest.as_str());
    assert_eq!(left(bucket, digest).await, Vec::<String>::new());
}

/// What lies there of sessions, and multipart uploads to a blob's key.
async fn left(bucket: &Bucket, digest: &Digest) -> Vec<String> {
    let objects = bucket.client.pages(bucket.keys.uploads(&repo()), None).try_concat().await.unwrap();
    let uploads = bucket.client.uploads(&bucket.keys.blob(digest), None).await.unwrap().uploads;
    let objects = objects.into_iter().map(|(key, _)| key);
    objects.chain(uploads.into_iter().map(|(upload, _)| upload.key)).collect()
}

fn is_part(asked: &Asked) -> bool {
    asked.method == "PUT" && asked.path.contains("partNumber=")
}

fn is_completion(asked: &Asked) -> bool {
    asked.method == "POST" && asked.path.contains("uploadId=")
}

/// A fault for the first request of a kind, and none for others.
fn once(is_meant: fn(&Asked) -> bool, fault: Fault) -> impl FnMut(&Asked) -> Fault + Send + 'static {
    let mut fault = Some(fault);
    move |asked| if is_meant(asked) { fault.take().unwrap_or(Fault::None) } else { Fault::None }
}

fn is_unavailable(done: Result<(), UploadError>) -> bool {
    matches!(done, Err(UploadError::Store(error)) if error.kind() == Kind::Unavailable)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_replica_goes_on_when_the_first_went_without_a_word() {
    let fixture = Fixture::new().await;
    let content = noise(17 * MIB + 5, 1);
    let digest = sha256(&content);
    for known in [None, Some(&digest)] {
        let (a, b) = (fixture.replica().await, fixture.replica().await);
        let id = begun(&a).await;
        let upload = opened(&a, id).await.unwrap();
        take(upload, &content.slice(..7 * MIB), known, Ending::Acknowledged).await.unwrap();
        let upload = opened(&a, id).await.unwrap();
        let receiving = bring(upload, &content.slice(7 * MIB..16 * MIB), known).await;
        // It stands still, and another goes on.
        assert_eq!(b.upload_offset(&repo(), id).await.unwrap(), Some(7 << 20));
        finish(&b, id, &content, &digest).await.unwrap();
        assert_stored(&b, &digest, &content).await;
        let late = receiving.finish(Ending::Acknowledged).await.err();
        assert!(matches!(late, Some(UploadError::Busy)), "{late:?}");
        b.client.delete(&b.keys.blob(&digest), None).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_replicas_on_one_session_one_is_told_so_and_nothing_is_corrupt() {
    let fixture = Fixture::new().await;
    let (a, b) = (fixture.replica().await, fixture.replica().await);
    let content = noise(17 * MIB, 2);
    let (digest, other) = (sha256(&content), noise(6 * MIB, 3));
    let right = content.slice(6 * MIB..12 * MIB);

    // What the loser brought is replaced by what the winner brought.
    let id = acknowledged(&a, &content.slice(..6 * MIB)).await;
    let (winner, loser) = (opened(&a, id).await.unwrap(), opened(&b, id).await.unwrap());
    let multipart = loser.progress.multipart.clone().unwrap();
    let loser = bring(loser, &other, None).await;
    let deadline = Instant::now() + PATIENCE;
    while testing::count_parts(&a.client, &multipart.upload).await < 2 {
        assert!(Instant::now() < deadline, "the second part never comes");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    take(winner, &right, None, Ending::Acknowledged).await.unwrap();
    assert!(matches!(loser.finish(Ending::Acknowledged).await, Err(UploadError::Busy)));
    finish(&b, id, &content, &digest).await.unwrap();
    assert_stored(&b, &digest, &content).await;
    a.client.delete(&a.keys.blob(&digest), None).await.unwrap();

    // The other way round the upload is lost, and says so.
    let id = acknowledged(&a, &content.slice(..6 * MIB)).await;
    let (winner, loser) = (opened(&a, id).await.unwrap(), opened(&b, id).await.unwrap());
    let mut loser = Receiving::begin(loser, 0, None).await.unwrap();
    let late = opened(&fixture.replica().await, id).await.unwrap();
    take(winner, &right, None, Ending::Acknowledged).await.unwrap();
    loser.push(other).await.unwrap();
    assert!(matches!(loser.finish(Ending::Acknowledged).await, Err(UploadError::Busy)));
    assert!(matches!(Receiving::begin(late, 0, None).await, Err(UploadError::Busy)));
    assert!(is_unavailable(finish(&a, id, &content, &digest).await));
    assert!(opened(&b, id).await.is_none());
    assert!(a.client.head(&a.keys.blob(&digest)).await.unwrap_err().is_not_found());
    assert_eq!(left(&a, &digest).await, Vec::<String>::new());

    // Nor do two multipart uploads come of one session.
    let id = begun(&a).await;
    let (first, second) = (opened(&a, id).await.unwrap(), opened(&b, id).await.unwrap());
    take(first, &content.slice(..6 * MIB), None, Ending::Acknowledged).await.unwrap();
    let mut second = Receiving::begin(second, 0, None).await.unwrap();
    let _ = second.push(content.slice(..11 * MIB)).await;
    assert!(matches!(second.finish(Ending::Acknowledged).await, Err(UploadError::Busy)));
    finish(&b, id, &content, &digest).await.unwrap();
    assert_stored(&b, &digest, &content).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_that_fails_is_sent_again_and_a_store_that_fails_for_long_is_told() {
    let fixture = Fixture::new().await;
    let content = noise(12 * MIB, 4);
    let digest = sha256(&content);
    for fault in [Fault::Answer(503, "SlowDown"), Fault::DropBefore, Fault::DropAfter] {
        let (bucket, _proxy) = fixture.through(once(is_part, fault)).await;
        let id = begun(&bucket).await;
        finish(&bucket, id, &content, &digest).await.unwrap();
        assert_stored(&bucket, &digest, &content).await;
        bucket.client.delete(&bucket.keys.blob(&digest), None).await.unwrap();
    }
    let refuse = |asked: &Asked| if is_part(asked) { Fault::Answer(503, "SlowDown") } else { Fault::None };
    let (bucket, _proxy) = fixture.through(refuse).await;
    let id = acknowledged(&bucket, &content.slice(..4 * MIB)).await;
    let upload = opened(&bucket, id).await.unwrap();
    let mut receiving = Receiving::begin(upload, 0, None).await.unwrap();
    let mut is_stopped = false;
    for start in (4 * MIB..11 * MIB).step_by(MIB) {
        is_stopped |= receiving.push(content.slice(start..start + MIB)).await.is_err();
    }
    let ended = receiving.finish(if is_stopped { Ending::TakenBack } else { Ending::Acknowledged }).await;
    assert!(is_unavailable(ended.map(drop)));
    let bucket = fixture.replica().await;
    assert_eq!(bucket.upload_offset(&repo(), id).await.unwrap(), Some(4 << 20));
    finish(&bucket, id, &content, &digest).await.unwrap();
    assert_stored(&bucket, &digest, &content).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_whose_end_was_not_answered_has_ended_all_the_same() {
    let fixture = Fixture::new().await;
    let content = noise(12 * MIB, 5);
    let digest = sha256(&content);
    let is_copy = |asked: &Asked| asked.method == "PUT" && asked.path.contains("/blobs/sha256/");
    for (known, is_meant) in
        [(true, is_completion as fn(&Asked) -> bool), (false, is_completion), (false, is_copy)]
    {
        let (bucket, proxy) = fixture.through(once(is_meant, Fault::DropAfter)).await;
        let id = begun(&bucket).await;
        let upload = opened(&bucket, id).await.unwrap();
        let known = known.then_some(&digest);
        take(upload, &content.slice(..11 * MIB), known, Ending::Acknowledged).await.unwrap();
        finish(&bucket, id, &content, &digest).await.unwrap();
        assert!(proxy.seen().iter().any(|(_, fault)| *fault == Fault::DropAfter));
        assert_stored(&bucket, &digest, &content).await;
        bucket.client.delete(&bucket.keys.blob(&digest), None).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_stands_still_is_brought_no_more_than_memory_allows() {
    let fixture = Fixture::new().await;
    let stand = |asked: &Asked| if is_part(asked) { Fault::Delay(PATIENCE) } else { Fault::None };
    let (bucket, proxy) = fixture.through(stand).await;
    let id = begun(&bucket).await;
    let upload = opened(&bucket, id).await.unwrap();
    let mut receiving = Receiving::begin(upload, 0, None).await.unwrap();
    let brought = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&brought);
    let pushing = tokio::spawn(async move {
        let piece = noise(MIB, 6);
        while receiving.push(piece.clone()).await.is_ok() {
            count.fetch_add(MIB as u64, Ordering::Relaxed);
        }
    });
    let deadline = Instant::now() + PATIENCE;
    let full = 5 * PART_BYTES as u64;
    while proxy.seen().iter().filter(|(asked, _)| is_part(asked)).count() < 4
        || brought.load(Ordering::Relaxed) < full
    {
        assert!(Instant::now() < deadline, "it never brings what it may");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Four parts are under way, one is full: it waits.
    assert_eq!(brought.load(Ordering::Relaxed), full);
    assert_eq!(proxy.seen().iter().filter(|(asked, _)| is_part(asked)).count(), 4);
    pushing.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_get_their_blob_by_another_hash_than_was_run() {
    let fixture = Fixture::new().await;
    let bucket = fixture.replica().await;
    let content = noise(13 * MIB, 7);
    let digest = Digest::of(Algorithm::Sha512, &content);
    let id = acknowledged(&bucket, &content.slice(..11 * MIB)).await;
    finish(&bucket, id, &content, &digest).await.unwrap();
    assert_stored(&bucket, &digest, &content).await;
    // What lies in memory is hashed again there.
    let id = acknowledged(&bucket, &content.slice(..4 * MIB)).await;
    bucket.client.delete(&bucket.keys.blob(&digest), None).await.unwrap();
    finish(&bucket, id, &content, &digest).await.unwrap();
    assert_stored(&bucket, &digest, &content).await;

    let id = acknowledged(&bucket, &content.slice(..11 * MIB)).await;
    let wrong = Digest::of(Algorithm::Sha512, b"another");
    let refused = finish(&bucket, id, &content, &wrong).await;
    assert!(matches!(refused, Err(UploadError::Digest { actual }) if actual == digest));
    assert_eq!(left(&bucket, &wrong).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_that_is_there_stays_as_it_is() {
    let fixture = Fixture::new().await;
    let bucket = fixture.replica().await;
    for content in [noise(1000, 8), noise(12 * MIB, 8)] {
        let digest = sha256(&content);
        let mut heads = Vec::new();
        // By way of the session's own key, and of the blob's.
        for known in [None, None, Some(&digest)] {
            let id = begun(&bucket).await;
            let upload = opened(&bucket, id).await.unwrap();
            take(upload, &content, known, Ending::Acknowledged).await.unwrap();
            finish(&bucket, id, &content, &digest).await.unwrap();
            assert_stored(&bucket, &digest, &content).await;
            heads.push(bucket.client.head(&bucket.keys.blob(&digest)).await.unwrap());
        }
        assert!(heads.iter().all(|head| *head == heads[0]), "{heads:?}");
        // What cannot be it is replaced.
        let key = bucket.keys.blob(&digest);
        for known in [None, Some(&digest)] {
            bucket.client.put(&key, Bytes::from_static(b"damaged"), Put::default()).await.unwrap();
            let upload = opened(&bucket, begun(&bucket).await).await.unwrap();
            let upload = take(upload, &content, known, Ending::Committed).await.unwrap();
            upload.finish(&digest).await.unwrap();
            assert_stored(&bucket, &digest, &content).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn content_in_parts_that_is_another_leaves_nothing() {
    let fixture = Fixture::new().await;
    let bucket = fixture.replica().await;
    let content = noise(12 * MIB, 9);
    let wrong = sha256(b"what was said");
    for known in [None, Some(&wrong)] {
        let upload = Bucket::start_upload(Arc::clone(&bucket), &repo(), Algorithm::Sha256);
        let upload = take(upload, &content, known, Ending::Committed).await.unwrap();
        let refused = upload.finish(&wrong).await;
        assert!(matches!(refused, Err(UploadError::Digest { actual }) if actual == sha256(&content)));
        assert!(bucket.client.head(&bucket.keys.blob(&wrong)).await.unwrap_err().is_not_found());
        assert_eq!(left(&bucket, &wrong).await, Vec::<String>::new());
    }
    // Parts that were to become one blob do not become another.
    let digest = sha256(&content);
    let id = begun(&bucket).await;
    let upload = opened(&bucket, id).await.unwrap();
    take(upload, &content, Some(&wrong), Ending::BrokenOff).await.unwrap();
    assert!(is_unavailable(finish(&bucket, id, &content, &digest).await));
    assert!(opened(&bucket, id).await.is_none());
    assert_eq!(left(&bucket, &wrong).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_can_go_on_with_is_not_kept() {
    let fixture = Fixture::new().await;
    let bucket = fixture.replica().await;
    let content = noise(11 * MIB, 10);
    let digest = sha256(&content);
    // A body that broke off, in a session whose id nobody was told.
    let upload = Bucket::start_upload(Arc::clone(&bucket), &repo(), Algorithm::Sha256);
    take(upload, &content, Some(&digest), Ending::BrokenOff).await.unwrap();
    assert_eq!(left(&bucket, &digest).await, Vec::<String>::new());
    // What a collection gives up; one that is held stays.
    let id = acknowledged(&bucket, &content).await;
    let held = opened(&bucket, id).await.unwrap();
    assert!(!bucket.give_up_upload(&repo(), id).await.unwrap());
    drop(held);
    assert!(bucket.give_up_upload(&repo(), id).await.unwrap());
    assert!(opened(&bucket, id).await.is_none());
    assert_eq!(left(&bucket, &digest).await, Vec::<String>::new());
    // Parts that somebody has tidied away.
    let id = acknowledged(&bucket, &content).await;
    let upload = opened(&bucket, id).await.unwrap();
    let multipart = upload.progress.multipart.clone().unwrap();
    bucket.client.abort_upload(&multipart.upload).await.unwrap();
    let mut receiving = Receiving::begin(upload, 0, None).await.unwrap();
    // One part: of several that fail at once, the second may find the session gone, and take it for another replica's.
    let _ = receiving.push(content.slice(..6 * MIB)).await;
    assert!(is_unavailable(receiving.finish(Ending::Acknowledged).await.map(drop)));
    assert!(opened(&bucket, id).await.is_none(), "it has to begin anew");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_blob_costs_two_requests_and_a_session_three_more() {
    let fixture = Fixture::new().await;
    let (bucket, proxy) = fixture.through(|_| Fault::None).await;
    let asked = |from: usize| {
        let seen = proxy.seen().into_iter().skip(from);
        let is_look = |path: &str| ["/dvcr/gc/", "/dvcr/moved"].iter().any(|look| path.contains(look));
        let seen = seen.filter(|(asked, _)| !is_look(&asked.path));
        seen.map(|(asked, _)| asked.method.to_string()).collect::<Vec<_>>()
    };
    let content = Bytes::from_static(b"small");
    let before = proxy.seen().len();
    let upload = Bucket::start_upload(Arc::clone(&bucket), &repo(), Algorithm::Sha256);
    upload.store(content.clone(), &sha256(&content)).await.unwrap();
    assert_eq!(asked(before), ["PUT", "PUT"]);

    let content = noise(60_000, 11);
    let before = proxy.seen().len();
    let upload = opened(&bucket, begun(&bucket).await).await.unwrap();
    upload.store(content.clone(), &sha256(&content)).await.unwrap();
    let mut session = asked(before);
    session[3..].sort();
    assert_eq!(session, ["PUT", "GET", "PUT", "DELETE", "PUT"]);

    // As clients do that bring all by PATCH: one more to read the state, and one to write it.
    let content = noise(60_000, 12);
    let before = proxy.seen().len();
    let id = acknowledged(&bucket, &content).await;
    finish(&bucket, id, &content, &sha256(&content)).await.unwrap();
    assert_eq!(asked(before).len(), 7);
}

/// What one request brings, and how it ends.
#[derive(Clone, Debug)]
struct Request {
    bytes: usize,
    ending: Option<Ending>,
    knows: bool,
    replica: usize,
}

fn request() -> impl Strategy<Value = Request> {
    let near = (0_usize..3, -2_i64..3).prop_map(|(parts, off)| {
        usize::try_from(i64::try_from(parts * PART_BYTES).unwrap() + off).unwrap_or(0)
    });
    let bytes = prop_oneof![near, 0_usize..70_000, 0_usize..7 * MIB];
    let ending = prop_oneof![
        4 => Just(Some(Ending::Acknowledged)),
        1 => Just(Some(Ending::BrokenOff)),
        1 => Just(Some(Ending::TakenBack)),
        1 => Just(Some(Ending::Committed)),
        1 => Just(None),
    ];
    (bytes, ending, any::<bool>(), 0_usize..2).prop_map(|(bytes, ending, knows, replica)| Request {
        bytes,
        ending,
        knows,
        replica,
    })
}

#[test]
fn whatever_the_chunks_are_the_blob_is_what_came() {
    let runtime = Runtime::new().unwrap();
    let fixture = Fixture::start();
    let replicas = runtime.block_on(async { [fixture.replica().await, fixture.replica().await] });
    let cases = proptest::collection::vec(request(), 0..5);
    let config = ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(requests in cases, rest in 0_usize..6 * MIB, seed: u64)| {
        let content = noise(requests.iter().map(|request| request.bytes).sum::<usize>() + rest, seed);
        let digest = sha256(&content);
        runtime.block_on(async {
            let id = begun(&replicas[0]).await;
            let mut offset = 0;
            for request in requests {
                let bucket = &replicas[request.replica];
                let body = content.slice(offset..offset + request.bytes);
                let known = request.knows.then_some(&digest);
                loop {
                    let upload = opened(bucket, id).await.unwrap();
                    assert_eq!(upload.offset(), offset as u64);
                    let receiving = bring(upload, &body, known).await;
                    let Some(ending) = request.ending else { break };
                    match receiving.finish(ending).await {
                        Ok(_) if matches!(ending, Ending::Acknowledged | Ending::BrokenOff) => offset += request.bytes,
                        Ok(_) => {}
                        // One that went without a word before may still do its last thing.
                        Err(UploadError::Busy) => continue,
                        Err(error) => panic!("{error:?}"),
                    }
                    break;
                }
                assert_eq!(bucket.upload_offset(&repo(), id).await.unwrap(), Some(offset as u64));
            }
            while let Err(error) = finish(&replicas[1], id, &content, &digest).await {
                assert!(matches!(error, UploadError::Busy), "{error:?}");
            }
            assert_stored(&replicas[0], &digest, &content).await;
            replicas[0].client.delete(&replicas[0].keys.blob(&digest), None).await.unwrap();
        });
    });
}
