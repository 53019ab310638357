//! The data of another registry, written by other people's clients, is served in place, cleaned, added to, and given back.
//!
//! ```text
//!  they serve: images, lists, indexes, a mount, a deletion, half an upload
//!    └──> we serve the directory: all is there, the upload goes on, deletion and garbage collection; we add the like
//!           └──> they serve it again: all is there, our upload goes on; their garbage collection, and all is there
//! ```

use crate::interchange::Half;
use crate::support::{
    Client, DOCKER_LIST, DOCKER_MANIFEST, Image, OCI_INDEX, descriptor, digest, eventually, image,
    layers as layers_of, noise,
};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use dvcr_tests::{PeerRegistry, Registry, cmd, dvcr, run, temp_dir, tool, utf8};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[tokio::test(flavor = "multi_thread")]
async fn debians_data_is_taken_over_and_given_back() -> Result<()> {
    take_over(PeerRegistry::debian, "docker-registry").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_data_of_distribution_v3_is_taken_over_and_given_back() -> Result<()> {
    take_over(PeerRegistry::distribution_v3, "registry").await
}

async fn take_over(start_peer: fn(&Path) -> Result<PeerRegistry>, program: &str) -> Result<()> {
    let dir = temp_dir();
    let root = dir.path().join("root");
    std::fs::create_dir(&root)?;
    let mut theirs = start_peer(&root)?;
    let client = Client::new(&theirs.url());
    let mut by_them = Pushed::push(&client, &theirs.reference("theirs"), dir.path(), 1).await?;
    by_them.check(&client, &theirs.reference(""), dir.path()).await?;
    let their_half = Half::push(&client, "theirs/half").await?;
    assert_has_hash_state(&root, &their_half)?;
    theirs.terminate()?;

    let mut ours = Registry::start_with(&root, &["--gc-grace", "1s", "--gc-schedule", "off"])?;
    let client = Client::new(&ours.url());
    by_them.check(&client, &ours.reference(""), dir.path()).await?;
    their_half.finish(&client).await?;
    by_them.delete_one_more(&client).await?;
    let gone: Vec<_> = by_them.deleted.iter().map(|digest| blob_path(&root, digest)).collect();
    eventually("our collection of what was deleted", async || {
        run(&cmd(dvcr()?, ["registry", "gc", "--root", utf8(&root)]))?;
        Ok(gone.iter().all(|path| !path.exists()))
    })
    .await?;
    by_them.check(&client, &ours.reference(""), dir.path()).await?;
    let mut by_us = Pushed::push(&client, &ours.reference("ours"), dir.path(), 2).await?;
    by_us.check(&client, &ours.reference(""), dir.path()).await?;
    let our_half = Half::push(&client, "ours/half").await?;
    assert_has_hash_state(&root, &our_half)?;
    ensure!(ours.terminate()?.success(), "{}", ours.log());

    let mut theirs = start_peer(&root)?;
    let client = Client::new(&theirs.url());
    by_them.check(&client, &theirs.reference(""), dir.path()).await?;
    by_us.check(&client, &theirs.reference(""), dir.path()).await?;
    our_half.finish_with_token(&client).await?;
    by_us.delete_one_more(&client).await?;
    theirs.terminate()?;

    let config = dir.path().join("collect.yml");
    let text = format!("version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\n", utf8(&root));
    std::fs::write(&config, text)?;
    run(cmd(tool(program)?, ["garbage-collect"]).arg(&config))?;
    for path in by_us.deleted.iter().map(|digest| blob_path(&root, digest)) {
        ensure!(!path.exists(), "{program} keeps {}", path.display());
    }
    let ours = Registry::start(&root)?;
    let client = Client::new(&ours.url());
    by_them.check(&client, &ours.reference(""), dir.path()).await?;
    by_us.check(&client, &ours.reference(""), dir.path()).await
}

/// What clients pushed below one prefix.
pub struct Pushed {
    /// The digests of all that is tagged, by `repository:tag`.
    tags: BTreeMap<String, String>,
    /// Manifests that are gone, with the blobs that only they had.
    pub deleted: Vec<String>,
    /// The image that is deleted next, with its layer.
    next: (String, [String; 2]),
    /// A repository, and the image in it whose blobs were mounted.
    mounted: (String, Image),
}

impl Pushed {
    pub async fn push(client: &Client, prefix: &str, dir: &Path, seed: u64) -> Result<Self> {
        let crane = |args: &[&str]| run(&cmd(tool("crane")?, args));
        let name = prefix.split_once('/').context("a reference")?.1;
        let mut tags: BTreeMap<String, String> = BTreeMap::new();
        let mut layers = BTreeMap::new();
        for (tag, base, n) in [
            ("docker", None, 0),
            ("oci", Some("--oci-empty-base"), 1),
            ("gone", None, 2),
            ("next", None, 3),
            ("second", None, 4),
        ] {
            let layer = layer(dir, seed * 10 + n)?;
            layers.insert(tag, digest(&Bytes::from(std::fs::read(&layer)?)));
            let mut append = cmd(tool("crane")?, ["append", "-f", utf8(&layer), "-t"]);
            run(append.arg(format!("{prefix}/app:{tag}")).args(base))?;
        }
        // Not by `crane index append`, whose descriptors have no platform: skopeo 1.9 does not copy such an index.
        for (tag, media_type, of) in
            [("list", DOCKER_LIST, ["docker", "second"]), ("index", OCI_INDEX, ["docker", "oci"])]
        {
            let mut manifests = Vec::new();
            for (of, architecture) in of.into_iter().zip(["amd64", "arm64"]) {
                let got = client.get(&format!("/v2/{name}/app/manifests/{of}")).await?.expect(200)?;
                let mut described = descriptor(got.header("content-type"), &got.body);
                described["platform"] = json!({"os": "linux", "architecture": architecture});
                manifests.push(described);
            }
            let list =
                json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests}).to_string();
            client.put_manifest(&format!("{name}/app"), tag, media_type, &list.into()).await?.expect(201)?;
        }
        for tag in ["docker", "oci", "list", "index"] {
            tags.insert(
                format!("{name}/app:{tag}"),
                crane(&["digest", &format!("{prefix}/app:{tag}")])?.trim().into(),
            );
        }
        // Between repositories crane mounts; skopeo brings the whole list by way of a directory.
        crane(&["copy", &format!("{prefix}/app:index"), &format!("{prefix}/copy:index")])?;
        tags.insert(format!("{name}/copy:index"), tags[&format!("{name}/app:index")].clone());
        let aside = dir.join(format!("aside-{seed}"));
        std::fs::create_dir(&aside)?;
        skopeo_copy(&format!("docker://{prefix}/app:list"), &format!("dir:{}", aside.display()))?;
        skopeo_copy(&format!("dir:{}", aside.display()), &format!("docker://{prefix}/skopeo:list"))?;
        tags.insert(format!("{name}/skopeo:list"), tags[&format!("{name}/app:list")].clone());

        let mounted = image(DOCKER_MANIFEST, &layers_of(seed, &[100_000, 10]));
        let (source, target) = (format!("{name}/source"), format!("{name}/mounted"));
        mounted.push(client, &source, "1").await?;
        for blob in &mounted.blobs {
            let mount = format!("/v2/{target}/blobs/uploads/?mount={}&from={source}", digest(blob));
            client.send("POST", &mount, &[], Bytes::new()).await?.expect(201)?;
        }
        client.put_manifest(&target, "1", DOCKER_MANIFEST, &mounted.manifest).await?.expect(201)?;
        tags.insert(format!("{target}:1"), mounted.digest());

        let doomed = async |tag: &str| -> Result<(String, [String; 2])> {
            let found =
                client.manifest_digest(&format!("{name}/app"), tag).await?.context("pushed just now")?;
            Ok((format!("/v2/{name}/app/manifests/{found}"), [found, layers[tag].clone()]))
        };
        let gone = doomed("gone").await?;
        client.delete(&gone.0).await?;
        Ok(Self { tags, deleted: gone.1.into(), next: doomed("next").await?, mounted: (target, mounted) })
    }

    pub async fn delete_one_more(&mut self, client: &Client) -> Result<()> {
        client.delete(&self.next.0).await?;
        self.deleted.extend(self.next.1.iter().cloned());
        Ok(())
    }

    /// Pulls everything with both clients, and sees that what is deleted cannot be pulled.
    pub async fn check(&self, client: &Client, registry: &str, dir: &Path) -> Result<()> {
        for (named, digest) in &self.tags {
            let copies = tempfile_in(dir)?;
            let found = run(&cmd(tool("crane")?, ["digest", &format!("{registry}{named}")]))?;
            assert_eq!(found.trim(), digest, "{named}");
            let layout = copies.path().join("crane");
            run(&cmd(
                tool("crane")?,
                ["pull", "--format=oci", &format!("{registry}{named}"), utf8(&layout)],
            ))?;
            // It checks all digests.
            let copy = copies.path().join("skopeo");
            std::fs::create_dir(&copy)?;
            skopeo_copy(&format!("docker://{registry}{named}"), &format!("dir:{}", copy.display()))?;
            let manifest = Bytes::from(std::fs::read(copy.join("manifest.json"))?);
            assert_eq!(crate::support::digest(&manifest), *digest, "{named}");
            let kind = [("list", DOCKER_LIST), ("index", OCI_INDEX)]
                .into_iter()
                .find(|(tag, _)| named.ends_with(tag));
            if let Some((_, media_type)) = kind {
                assert_eq!(serde_json::from_slice::<Value>(&manifest)?["mediaType"], media_type, "{named}");
            }
        }
        let (repo, image) = &self.mounted;
        image.check(client, repo).await?;
        let app = self.next.0.split("/manifests/").next().context("a path")?;
        for digest in self.deleted.iter().step_by(2) {
            client.get(&format!("{app}/manifests/{digest}")).await?.expect(404)?;
        }
        Ok(())
    }
}

fn skopeo_copy(from: &str, to: &str) -> Result<()> {
    let tls = ["--src-tls-verify=false", "--dest-tls-verify=false"];
    let mut copy = cmd("skopeo", ["copy", "-q", "--all", "--preserve-digests"]);
    run(copy.args(tls).args([from, to])).map(drop)
}

/// Makes a layer of its own.
fn layer(dir: &Path, seed: u64) -> Result<PathBuf> {
    let (content, layer) = (format!("content-{seed}"), dir.join(format!("layer-{seed}.tar")));
    std::fs::write(dir.join(&content), noise(150_000, seed))?;
    run(cmd("tar", ["-C", utf8(dir), "-cf"]).arg(&layer).arg(&content))?;
    Ok(layer)
}

fn tempfile_in(dir: &Path) -> Result<dvcr_tests::TempDir> {
    Ok(tempfile::tempdir_in(dir)?)
}

fn blob_path(root: &Path, digest: &str) -> PathBuf {
    let hex = digest.trim_start_matches("sha256:");
    root.join("docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
}

/// Checks that the hash lies beside the upload, so that it goes on without reading the data again.
fn assert_has_hash_state(root: &Path, half: &Half) -> Result<()> {
    let path = half.dir(root)?.join(format!("hashstates/sha256/{}", half.came()));
    ensure!(path.is_file(), "{} is missing", path.display());
    Ok(())
}
