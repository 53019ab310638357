//! One directory, served by us and by others in turn: what either writes, the other serves.

use crate::support::{
    Client, DOCKER_MANIFEST, Image, OCI_INDEX, OCI_MANIFEST, descriptor, digest, digest_512, image, layers,
    noise,
};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use dvcr_tests::{PeerRegistry, Registry, cmd, run, temp_dir, tool, utf8};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

type StartPeer = fn(&Path) -> Result<PeerRegistry>;

#[tokio::test(flavor = "multi_thread")]
async fn debians_registry_and_ours_serve_each_others_directory() -> Result<()> {
    interchange(PeerRegistry::debian).await
}

#[tokio::test(flavor = "multi_thread")]
async fn distribution_v3_and_ours_serve_each_others_directory() -> Result<()> {
    interchange(PeerRegistry::distribution_v3).await
}

async fn interchange(start_peer: StartPeer) -> Result<()> {
    let dir = temp_dir();
    let root = dir.path().join("root");
    let mut ours = Registry::start(&root)?;
    let by_us = Content::push(&Client::new(&ours.url()), "team/ours", 1).await?;
    by_us.check(&Client::new(&ours.url()), &ours.reference("team/ours"), &dir.path().join("a")).await?;
    let [half, other_half] = [
        Half::push(&Client::new(&ours.url()), "team/half").await?,
        Half::push(&Client::new(&ours.url()), "team/other-half").await?,
    ];
    ensure!(ours.terminate()?.success(), "{}", ours.log());

    let mut theirs = start_peer(&root)?;
    let at_theirs = Client::new(&theirs.url());
    by_us.check(&at_theirs, &theirs.reference("team/ours"), &dir.path().join("b")).await?;
    let by_them = Content::push(&at_theirs, "team/theirs", 2).await?;
    let their_half = Half::push(&at_theirs, "team/their-half").await?;
    other_half.finish_with_token(&at_theirs).await?;
    theirs.terminate()?;

    ours.restart()?;
    let at_ours = Client::new(&ours.url());
    by_them.check(&at_ours, &ours.reference("team/theirs"), &dir.path().join("c")).await?;
    by_us.check(&at_ours, &ours.reference("team/ours"), &dir.path().join("d")).await?;
    half.finish(&at_ours).await?;
    their_half.finish(&at_ours).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_either_registry_changes_the_other_sees() -> Result<()> {
    const REPO: &str = "team/app";
    for start_peer in [PeerRegistry::debian as StartPeer, PeerRegistry::distribution_v3] {
        let dir = temp_dir();
        let mut ours = Registry::start(dir.path())?;
        let client = Client::new(&ours.url());
        let [one, two, three, four] =
            [1, 2, 3, 4].map(|seed| image(OCI_MANIFEST, &layers(seed, &[1000, 70_000])));
        one.push(&client, REPO, "latest").await?;
        one.push(&client, REPO, "stays").await?;
        two.push(&client, REPO, "doomed").await?;
        // Looked at, so that whatever may be remembered is.
        for tag in ["latest", "stays", "doomed"] {
            client.manifest_digest(REPO, tag).await?.context("pushed just now")?;
        }
        ours.terminate()?;

        // They move a tag, make one, and delete a manifest with its tag.
        let mut theirs = start_peer(dir.path())?;
        let peer = Client::new(&theirs.url());
        assert_eq!(peer.manifest_digest(REPO, "latest").await?, Some(one.digest()));
        three.push(&peer, REPO, "latest").await?;
        three.push(&peer, REPO, "theirs").await?;
        peer.delete(&format!("/v2/{REPO}/manifests/{}", two.digest())).await?;
        theirs.terminate()?;

        ours.restart()?;
        assert_eq!(client.tags(REPO).await?, ["latest", "stays", "theirs"]);
        for (tag, image) in [("latest", &three), ("stays", &one), ("theirs", &three)] {
            assert_eq!(client.manifest_digest(REPO, tag).await?, Some(image.digest()), "{tag}");
            image.check(&client, REPO).await?;
        }
        for gone in ["doomed", &two.digest()] {
            assert_eq!(client.manifest_digest(REPO, gone).await?, None, "{gone}");
        }

        // We move it back, make one of ours, and delete a tag alone; they see it while we still run.
        one.push(&client, REPO, "latest").await?;
        four.push(&client, REPO, "ours").await?;
        client.delete(&format!("/v2/{REPO}/manifests/theirs")).await?;
        let theirs = start_peer(dir.path())?;
        let peer = Client::new(&theirs.url());
        assert_eq!(peer.tags(REPO).await?, ["latest", "ours", "stays"]);
        for (tag, image) in [("latest", &one), ("ours", &four), ("stays", &one)] {
            assert_eq!(peer.manifest_digest(REPO, tag).await?, Some(image.digest()), "{tag}");
            image.check(&peer, REPO).await?;
        }
        assert_eq!(peer.manifest_digest(REPO, "theirs").await?, None);
        three.check(&peer, REPO).await?;
        // What changes under a running reader is seen at once, both ways.
        two.push(&client, REPO, "latest").await?;
        assert_eq!(peer.manifest_digest(REPO, "latest").await?, Some(two.digest()));
        four.push(&peer, REPO, "latest").await?;
        assert_eq!(client.manifest_digest(REPO, "latest").await?, Some(four.digest()));
        peer.delete(&format!("/v2/{REPO}/manifests/{}", four.digest())).await?;
        assert_eq!(client.manifest_digest(REPO, &four.digest()).await?, None);
        assert_eq!(client.tags(REPO).await?, ["stays"]);
    }
    Ok(())
}

/// Images of both kinds, an index over them, and blobs by sha512 where the registry takes them.
struct Content {
    repo: String,
    tags: BTreeMap<&'static str, Bytes>,
    images: [Image; 2],
    sha512: Vec<Bytes>,
}

impl Content {
    async fn push(client: &Client, repo: &str, seed: u64) -> Result<Self> {
        let layers = layers(seed, &[1, 512, 70_000, 3_000_000]);
        let images = [image(OCI_MANIFEST, &layers), image(DOCKER_MANIFEST, &layers[1..])];
        let mut tags = BTreeMap::new();
        for (image, names) in images.iter().zip([["oci", "v1.0-rc_1"], ["docker", "UPPER"]]) {
            for tag in names {
                image.push(client, repo, tag).await?;
                tags.insert(tag, image.manifest.clone());
            }
        }
        let descriptors = images.iter().zip(["amd64", "arm64"]).map(|(image, architecture)| {
            let mut descriptor = descriptor(image.media_type, &image.manifest);
            descriptor["platform"] = json!({"architecture": architecture, "os": "linux"});
            descriptor
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": descriptors.collect::<Vec<_>>(),
        });
        let index = Bytes::from(serde_json::to_vec_pretty(&index)?);
        client.put_manifest(repo, "index", OCI_INDEX, &index).await?.expect(201)?;
        tags.insert("index", index);
        let mut sha512 = Vec::new();
        for length in [100, 200_000] {
            let bytes = noise(length, seed + 100);
            if client.push_blob_as(repo, &digest_512(&bytes), &bytes).await?.status == 201 {
                sha512.push(bytes);
            }
        }
        // Ours does; the others may.
        ensure!(seed != 1 || sha512.len() == 2, "sha512 is refused");
        Ok(Self { repo: repo.to_owned(), tags, images, sha512 })
    }

    /// Pulls everything, by HTTP and by other people's clients.
    async fn check(&self, client: &Client, reference: &str, dir: &Path) -> Result<()> {
        let mut tags: Vec<_> = self.tags.keys().copied().collect();
        tags.sort_unstable();
        assert_eq!(client.tags(&self.repo).await?, tags);
        for (tag, manifest) in &self.tags {
            assert_eq!(client.manifest_digest(&self.repo, tag).await?, Some(digest(manifest)), "{tag}");
            let got = client.get(&format!("/v2/{}/manifests/{tag}", self.repo)).await?.expect(200)?;
            assert_eq!(got.body, manifest, "{tag}");
        }
        for image in &self.images {
            image.check(client, &self.repo).await?;
        }
        for bytes in &self.sha512 {
            let path = format!("/v2/{}/blobs/{}", self.repo, digest_512(bytes));
            assert!(client.get(&path).await?.expect(200)?.body == bytes, "{path}");
        }
        let crane = |args: &[&str]| run(&cmd(tool("crane")?, args));
        for (tag, manifest) in &self.tags {
            let named = format!("{reference}:{tag}");
            assert_eq!(crane(&["digest", &named])?.trim(), digest(manifest));
            let copy = dir.join(tag);
            let source = format!("docker://{named}");
            let target = format!("dir:{}", copy.display());
            std::fs::create_dir_all(&copy)?;
            run(&cmd(
                "skopeo",
                [
                    "copy",
                    "-q",
                    "--all",
                    "--preserve-digests",
                    "--src-tls-verify=false",
                    source.as_str(),
                    &target,
                ],
            ))?;
            assert_eq!(std::fs::read(copy.join("manifest.json"))?, *manifest, "{tag}");
            // It checks digests as it copies, and names the files by them.
            let images = self.images.iter().filter(|image| *tag == "index" || image.manifest == *manifest);
            for blob in images.flat_map(|image| image.blobs.iter()) {
                let file = copy.join(&digest(blob)["sha256:".len()..]);
                assert!(std::fs::read(&file)? == *blob, "{}", file.display());
            }
        }
        let layout = dir.join("crane");
        crane(&["pull", "--format=oci", &format!("{reference}:index"), utf8(&layout)])?;
        Ok(())
    }
}

/// An upload that is half done.
pub struct Half {
    repo: String,
    session: String,
    bytes: Bytes,
    came: usize,
}

impl Half {
    pub async fn push(client: &Client, repo: &str) -> Result<Self> {
        let bytes = noise(1_500_000, 9);
        let session = client.begin(repo).await?;
        let came = 1_000_001;
        let patched = client.patch(&session, 0, bytes.slice(..came)).await?.expect(202)?;
        let session = patched.header("location").to_owned();
        // The others' sessions carry a token of their own in the query, which is not for us.
        let path = session.split('?').next().unwrap_or_default();
        let path = path.find("/v2/").map_or(path, |at| &path[at..]).to_owned();
        Ok(Self { repo: repo.to_owned(), session: path, bytes, came })
    }

    /// How many bytes were acknowledged.
    pub fn came(&self) -> usize {
        self.came
    }

    /// Returns its directory.
    pub fn dir(&self, root: &Path) -> Result<PathBuf> {
        let id = self.session.rsplit('/').next().context("the session's id")?;
        Ok(root.join("docker/registry/v2/repositories").join(&self.repo).join("_uploads").join(id))
    }

    pub async fn finish(self, client: &Client) -> Result<()> {
        assert_eq!(client.offset(&self.session).await?, self.came);
        client.finish(&self.session, self.came, &self.bytes).await
    }

    /// Ends it at one of the others, who believe a session's offset only from a token that they signed.
    pub async fn finish_with_token(self, client: &Client) -> Result<()> {
        let id = self.session.rsplit('/').next().context("the session's id")?;
        let state = json!({
            "Name": self.repo,
            "UUID": id,
            "Offset": self.came,
            "StartedAt": "2026-01-01T00:00:00Z",
        })
        .to_string();
        let mac = hmac_sha256(PeerRegistry::SECRET.as_bytes(), state.as_bytes());
        let token = base64_url(&[mac.as_slice(), state.as_bytes()].concat());
        let put = format!("{}?_state={token}&digest={}", self.session, digest(&self.bytes));
        let headers = [("content-type", "application/octet-stream")];
        let rest = self.bytes.slice(self.came..);
        let done = client.send("PUT", &put, &headers, rest).await?.expect(201)?;
        let pulled = client.get(done.header("location")).await?.expect(200)?;
        ensure!(pulled.body == self.bytes, "{} ended in other bytes", self.session);
        Ok(())
    }
}

/// HMAC (RFC 2104) with a key that fits a block.
fn hmac_sha256(key: &[u8], message: &[u8]) -> Vec<u8> {
    let padded = |pad: u8| {
        let mut block = [pad; 64];
        block.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
        block
    };
    let inner = Sha256::new().chain_update(padded(0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(padded(0x5c)).chain_update(inner).finalize().to_vec()
}

/// Base 64 with the alphabet for URLs (RFC 4648, 5), padded.
fn base64_url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits =
            group.iter().fold(0, |bits, byte| bits << 8 | usize::from(*byte)) << (8 * (3 - group.len()));
        let digits = [18, 12, 6, 0].map(|shift| char::from(ALPHABET[bits >> shift & 63]));
        text.extend(&digits[..group.len() + 1]);
        text.extend(std::iter::repeat_n('=', 3 - group.len()));
    }
    text
}
