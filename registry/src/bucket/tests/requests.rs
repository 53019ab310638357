//! What each call of the API costs in requests to the store, and that what spares them hides nothing.

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream::TryStreamExt;
use serde_json::json;

use super::manifests::requests;
use super::*;
use crate::digest::{Algorithm, Digest};
use crate::model;
use crate::names::{Reference, RepoName};
use crate::store::conformance::{by_tag, repo};
use crate::store::{Blob as _, Manifest};

impl Opened {
    /// Puts a blob and its link where they belong.
    async fn blob(&self, repo: &RepoName, content: &[u8]) -> Digest {
        let (digest, keys) = (Digest::of(Algorithm::Sha256, content), &self.bucket.keys);
        self.object(&keys.blob(&digest), content).await;
        self.object(&keys.layer_link(repo, &digest), digest.as_str().as_bytes()).await;
        digest
    }

    /// Puts two blobs where they belong, and makes an image of them.
    async fn image(&self, repo: &RepoName) -> Manifest {
        let blob = async |media_type, content| {
            let digest = self.blob(repo, content).await;
            json!({"mediaType": media_type, "digest": digest.as_str(), "size": content.len()})
        };
        let config = blob("application/vnd.oci.image.config.v1+json", b"{}").await;
        let layer = blob("application/vnd.oci.image.layer.v1.tar", b"layer").await;
        let image = json!({
            "schemaVersion": 2, "mediaType": model::OCI_MANIFEST, "config": config, "layers": [layer]
        });
        let bytes = Bytes::from(image.to_string());
        let digest = Digest::of(Algorithm::Sha256, &bytes);
        Manifest { digest, bytes, media_type: model::OCI_MANIFEST.into() }
    }

    async fn claims(&self, repo: &RepoName, digest: &Digest) -> Option<u64> {
        let claimed = Arc::clone(&self.bucket).claim_without_blocking(repo.clone(), digest.clone());
        claimed.unwrap().await.unwrap()
    }

    async fn reads(&self, repo: &RepoName, digest: &Digest) -> Option<Vec<u8>> {
        let blob = Bucket::open_blob(&self.bucket, repo, digest).await.unwrap()?;
        let bytes = blob.length();
        let pieces: Vec<Bytes> = Box::new(blob).read(0, bytes).try_collect().await.unwrap();
        Some(pieces.concat())
    }

    async fn lose(&self, digest: &Digest) {
        self.bucket.client.delete(&self.bucket.keys.blob(digest), None).await.unwrap();
    }
}

#[tokio::test]
async fn a_head_of_a_blob_costs_one_request() {
    let opened = Opened::new(Opened::minio().await).await;
    let (r, digest) = (repo("r"), opened.blob(&repo("r"), b"blob").await);
    let (opened, proxy) = opened.counted().await;
    // Whether the repository has it, and how long it is.
    assert_eq!(requests(&proxy, opened.claims(&r, &digest)).await, (2, Some(4)));
    // Whether the repository has it is asked every time.
    assert_eq!(requests(&proxy, opened.claims(&r, &digest)).await, (1, Some(4)));
    assert_eq!(requests(&proxy, opened.claims(&repo("other"), &digest)).await, (1, None));
}

#[tokio::test]
async fn a_head_of_a_blob_whose_link_is_old_claims_it() {
    let opened = Opened::with_grace(Opened::minio().await, Duration::ZERO).await;
    let (r, digest) = (repo("r"), opened.blob(&repo("r"), b"blob").await);
    let link = async || opened.bucket.client.head(&opened.bucket.keys.layer_link(&r, &digest)).await.unwrap();
    let placed = link().await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while link().await.modified == placed.modified {
        assert_eq!(opened.claims(&r, &digest).await, Some(4));
        assert!(tokio::time::Instant::now() < deadline, "an old link is not placed anew");
    }
    assert_eq!(opened.claims(&repo("other"), &digest).await, None);
}

#[tokio::test]
async fn many_who_ask_for_the_same_at_once_cost_little_more_than_one() {
    let opened = Opened::new(Opened::minio().await).await;
    let r = repo("r");
    let image = opened.image(&r).await;
    opened.put(&r, &image, &["v1"]).await;
    let layer = Digest::of(Algorithm::Sha256, b"layer");
    let (opened, proxy) = opened.counted().await;
    let heads = join_all((0..50).map(|_| opened.claims(&r, &layer)));
    let (count, heads) = requests(&proxy, heads).await;
    assert!(heads.iter().all(|length| *length == Some(5)));
    // The reading of the first, and one for all the others; of the link, and of the data.
    assert!(count <= 4, "{count} requests");
    opened.tagged(&r, "v1").await.unwrap();
    let gets = join_all((0..50).map(|_| opened.tagged(&r, "v1")));
    let (count, gets) = requests(&proxy, gets).await;
    assert!(gets.iter().all(|digest| digest.as_ref() == Some(&image.digest)));
    assert!(count <= 4, "{count} requests");
}

#[tokio::test]
async fn a_get_of_a_blob_costs_two_requests_and_three_if_it_is_large() {
    let opened = Opened::new(Opened::minio().await).await;
    let (r, large) = (repo("r"), vec![7; 1 << 20]);
    let (of_small, of_large) = (opened.blob(&r, b"small").await, opened.blob(&r, &large).await);
    let (opened, proxy) = opened.counted().await;
    assert_eq!(requests(&proxy, opened.reads(&r, &of_small)).await, (2, Some(b"small".to_vec())));
    let (count, read) = requests(&proxy, opened.reads(&r, &of_large)).await;
    assert!((count, read.as_ref()) == (3, Some(&large)), "{count} requests");
}

#[tokio::test]
async fn a_manifest_takes_no_request_too_many() {
    let opened = Opened::new(Opened::minio().await).await;
    let r = repo("r");
    let image = opened.image(&r).await;
    let by_digest = Reference::Digest(image.digest.clone());
    let (opened, proxy) = opened.counted().await;
    // Two of each blob, the content, the link, and two of the tag.
    assert_eq!(requests(&proxy, opened.put(&r, &image, &["v1"])).await.0, 8);
    // The links of the blobs and of the manifest are looked at, and the tag is placed.
    assert_eq!(requests(&proxy, opened.put(&r, &image, &["v2"])).await.0, 5);
    // What the tag names, and whether it is there.
    for _ in 0..2 {
        let (count, found) = requests(&proxy, opened.tagged(&r, "v1")).await;
        assert_eq!((count, found.as_ref()), (2, Some(&image.digest)));
    }
    let (count, found) = requests(&proxy, opened.bucket.find_manifest(&r, &by_digest)).await;
    assert_eq!((count, found.unwrap().unwrap().bytes), (1, image.bytes.clone()));
    // And the content.
    let (other, proxy) = opened.counted().await;
    let (count, found) = requests(&proxy, other.tagged(&r, "v1")).await;
    assert_eq!((count, found), (3, Some(image.digest.clone())));
}

#[tokio::test]
async fn removals_take_no_request_too_many() {
    let opened = Opened::new(Opened::minio().await).await;
    let r = repo("r");
    let image = opened.image(&r).await;
    opened.put(&r, &image, &["v1", "v2"]).await;
    let (opened, proxy) = opened.counted().await;
    let layer = Digest::of(Algorithm::Sha256, b"layer");
    let (count, done) = requests(&proxy, opened.bucket.delete_blob(&r, &layer)).await;
    assert_eq!((count, done.unwrap()), (2, true));
    let v1 = by_tag("v1");
    let (count, removed) = requests(&proxy, opened.remove(&r, Some(v1))).await;
    assert!(count <= 5 && removed == 1, "{count} requests");
    let by_digest = Reference::Digest(image.digest.clone());
    let (count, removed) = requests(&proxy, opened.remove(&r, Some(by_digest))).await;
    assert!(count <= 12 && removed == 1, "{count} requests");
    assert_eq!(opened.tagged(&r, "v2").await, None);
}

#[tokio::test]
async fn what_another_replica_deleted_is_gone_for_whoever_asks_next() {
    let opened = Opened::new(Opened::minio().await).await;
    let other = opened.again().await;
    let (r, digest) = (repo("r"), opened.blob(&repo("r"), b"blob").await);
    for _ in 0..2 {
        assert_eq!(opened.claims(&r, &digest).await, Some(4));
        assert_eq!(opened.reads(&r, &digest).await.unwrap(), b"blob");
    }
    assert!(other.bucket.delete_blob(&r, &digest).await.unwrap());
    assert_eq!(opened.claims(&r, &digest).await, None);
    assert_eq!(opened.reads(&r, &digest).await, None);
}

#[tokio::test]
async fn a_blob_that_was_lost_is_not_there_once_that_was_seen() {
    let opened = Opened::new(Opened::minio().await).await;
    let (r, digest) = (repo("r"), opened.blob(&repo("r"), b"blob").await);
    assert_eq!(opened.claims(&r, &digest).await, Some(4));
    opened.lose(&digest).await;
    // Nobody is promised bytes that do not come.
    assert_eq!(opened.reads(&r, &digest).await, None);
    assert_eq!(opened.claims(&r, &digest).await, None);
    opened.blob(&r, b"blob").await;
    assert_eq!(opened.claims(&r, &digest).await, Some(4));
}

#[tokio::test]
async fn a_manifest_that_was_deleted_and_collected_elsewhere_is_pushed_again_whole() {
    let opened = Opened::new(Opened::minio().await).await;
    let other = opened.again().await;
    let r = repo("r");
    let image = opened.image(&r).await;
    opened.put(&r, &image, &["v1"]).await;
    let by_digest = Reference::Digest(image.digest.clone());
    assert_eq!(other.remove(&r, Some(by_digest)).await, 1);
    other.lose(&image.digest).await;
    opened.put(&r, &image, &["v1"]).await;
    assert_eq!(opened.again().await.tagged(&r, "v1").await, Some(image.digest));
}

#[tokio::test]
async fn a_manifest_that_is_pushed_again_is_new_again() {
    let opened = Opened::with_grace(Opened::minio().await, Duration::from_secs(2)).await;
    let r = repo("r");
    let image = opened.image(&r).await;
    opened.put(&r, &image, &["v1"]).await;
    let key = opened.bucket.keys.revision_link(&r, &image.digest);
    let modified = async || opened.bucket.client.head(&key).await.unwrap().modified;
    let placed = modified().await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while modified().await == placed {
        opened.put(&r, &image, &["v1"]).await;
        assert!(tokio::time::Instant::now() < deadline, "an old link is not placed anew");
    }
}
