//! One bucket, served by us and by CNCF distribution at the same time: what either writes, the other serves.

use crate::interchange::Half;
use crate::support::{Client, OCI_MANIFEST, digest, image, layers};
use crate::takeover::Pushed;
use anyhow::{Result, ensure};
use bytes::Bytes;
use dvcr_tests::{PeerRegistry, Registry, S3Server, TempDir, temp_dir};
use serde_json::Value;
use std::sync::Arc;

const ROOT: &str = "/some/registry";

/// Both registries on one bucket.
struct Shared {
    server: Arc<S3Server>,
    bucket: String,
    ours: Registry,
    theirs: PeerRegistry,
    dir: TempDir,
}

impl Shared {
    fn start() -> Result<Self> {
        let (server, dir) = (S3Server::shared_minio(), temp_dir());
        let bucket = server.new_bucket()?;
        let place = (&*server, &*bucket, ROOT);
        let ours = Registry::start_in_bucket(&dir.path().join("ours"), place, &["--gc-schedule", "off"])?;
        let theirs = PeerRegistry::distribution_v3_in_bucket(&server, &bucket, ROOT)?;
        Ok(Self { server, bucket, ours, theirs, dir })
    }

    fn clients(&self) -> [Client; 2] {
        [Client::new(&self.ours.url()), Client::new(&self.theirs.url())]
    }

    /// Pulls everything from both.
    async fn check(&self, pushed: &Pushed) -> Result<()> {
        let [ours, theirs] = self.clients();
        pushed.check(&ours, &self.ours.reference(""), self.dir.path()).await?;
        pushed.check(&theirs, &self.theirs.reference(""), self.dir.path()).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bucket_of_distribution_v3_is_taken_over_and_given_back() -> Result<()> {
    let mut shared = Shared::start()?;
    let [at_ours, at_theirs] = shared.clients();
    let dir = shared.dir.path();
    let mut by_them = Pushed::push(&at_theirs, &shared.theirs.reference("theirs"), dir, 1).await?;
    let mut by_us = Pushed::push(&at_ours, &shared.ours.reference("ours"), dir, 2).await?;
    shared.check(&by_them).await?;
    shared.check(&by_us).await?;
    let half = Half::push(&at_ours, "ours/half").await?;
    let catalog = async |client: &Client| -> Result<Value> {
        Ok(serde_json::from_slice(&client.get("/v2/_catalog?n=100").await?.expect(200)?.body)?)
    };
    assert_eq!(catalog(&at_ours).await?, catalog(&at_theirs).await?);

    // Each deletes of what the other wrote.
    by_them.delete_one_more(&at_ours).await?;
    by_us.delete_one_more(&at_theirs).await?;
    shared.check(&by_them).await?;
    shared.check(&by_us).await?;

    ensure!(shared.ours.terminate()?.success(), "{}", shared.ours.log());
    shared.theirs.terminate()?;
    PeerRegistry::collect_in_bucket(&shared.server, &shared.bucket, ROOT)?;
    shared.ours.restart()?;
    shared.theirs = PeerRegistry::distribution_v3_in_bucket(&shared.server, &shared.bucket, ROOT)?;
    shared.check(&by_them).await?;
    shared.check(&by_us).await?;
    // The manifests that are gone, and the layers that only they had.
    for (pushed, repo) in [(&by_them, "theirs/app"), (&by_us, "ours/app")] {
        for gone in &pushed.deleted {
            for client in shared.clients() {
                client
                    .send("HEAD", &format!("/v2/{repo}/blobs/{gone}"), &[], Bytes::new())
                    .await?
                    .expect(404)?;
            }
        }
    }
    half.finish(&at_ours).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_either_registry_changes_in_a_bucket_the_other_sees_at_once() -> Result<()> {
    const REPO: &str = "team/app";
    let shared = Shared::start()?;
    let [a, b] = shared.clients();
    let seeds = [1, 2, 3, 4];
    let [one, two, three, four] = seeds.map(|seed| image(OCI_MANIFEST, &layers(seed, &[1000, 70_000])));
    for (writer, reader) in [(&a, &b), (&b, &a)] {
        one.push(writer, REPO, "latest").await?;
        one.push(writer, REPO, "v1").await?;
        assert_eq!(reader.manifest_digest(REPO, "latest").await?, Some(one.digest()));
        one.check(reader, REPO).await?;
        two.push(reader, REPO, "latest").await?;
        three.push(reader, REPO, "v1-rc.1").await?;
        four.push(writer, REPO, "v10").await?;
        assert_eq!(writer.manifest_digest(REPO, "latest").await?, Some(two.digest()));
        for client in [writer, reader] {
            assert_eq!(client.tags(REPO).await?, ["latest", "v1", "v1-rc.1", "v10"]);
        }

        // A blob of the other's, mounted; then a tag, and a manifest with its tags, of the other's.
        let mount = format!("/v2/team/copy/blobs/uploads/?mount={}&from={REPO}", digest(&three.blobs[0]));
        writer.send("POST", &mount, &[], Bytes::new()).await?.expect(201)?;
        let copy = format!("/v2/team/copy/blobs/{}", digest(&three.blobs[0]));
        assert!(reader.get(&copy).await?.expect(200)?.body == three.blobs[0]);
        reader.delete(&format!("/v2/{REPO}/manifests/{}", one.digest())).await?;
        writer.delete(&format!("/v2/{REPO}/manifests/{}", three.digest())).await?;
        for client in [writer, reader] {
            assert_eq!(client.tags(REPO).await?, ["latest", "v10"]);
            assert_eq!(client.manifest_digest(REPO, &one.digest()).await?, None);
            assert_eq!(client.manifest_digest(REPO, "v1-rc.1").await?, None);
            four.check(client, REPO).await?;
        }
    }
    Ok(())
}
