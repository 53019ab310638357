//! What the tests share: images to push, and a thin client.

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use sha2::{Digest, Sha256, Sha512};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

const STATE_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// An image: config and layers, and the manifest that names them.
pub struct Image {
    pub media_type: &'static str,
    pub blobs: Vec<Bytes>,
    pub manifest: Bytes,
}

pub fn image(media_type: &'static str, layers: &[Bytes]) -> Image {
    let diff_ids: Vec<_> = layers.iter().map(digest).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = Bytes::from(config.to_string());
    let (config_type, layer_type) = match media_type {
        DOCKER_MANIFEST => {
            ("application/vnd.docker.container.image.v1+json", "application/vnd.docker.image.rootfs.diff.tar")
        }
        _ => ("application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar"),
    };
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": descriptor(config_type, &config),
        "layers": layers.iter().map(|layer| descriptor(layer_type, layer)).collect::<Vec<_>>(),
    });
    let blobs = layers.iter().cloned().chain([config]).collect();
    Image { media_type, blobs, manifest: manifest.to_string().into() }
}

impl Image {
    pub fn digest(&self) -> String {
        digest(&self.manifest)
    }

    pub async fn push(&self, client: &Client, repo: &str, tag: &str) -> Result<()> {
        for (blob, way) in self.blobs.iter().zip(0..) {
            client.push_blob_some_way(repo, blob, way).await?;
        }
        client.put_manifest(repo, tag, self.media_type, &self.manifest).await?.expect(201).map(drop)
    }

    /// Checks that everything can be pulled by digest and has its content.
    pub async fn check(&self, client: &Client, repo: &str) -> Result<()> {
        let got = client.get(&format!("/v2/{repo}/manifests/{}", self.digest())).await?.expect(200)?;
        assert_eq!(got.body, self.manifest);
        assert_eq!(got.header("content-type"), self.media_type);
        for blob in &self.blobs {
            let path = format!("/v2/{repo}/blobs/{}", digest(blob));
            assert!(client.get(&path).await?.expect(200)?.body == blob, "{path}");
        }
        Ok(())
    }
}

pub fn layers(seed: u64, lengths: &[usize]) -> Vec<Bytes> {
    lengths.iter().zip(seed * 1000..).map(|(length, seed)| noise(*length, seed)).collect()
}

pub fn descriptor(media_type: &str, bytes: &Bytes) -> Value {
    descriptor_of(media_type, digest(bytes), bytes)
}

pub fn descriptor_of(media_type: &str, digest: String, bytes: &Bytes) -> Value {
    json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
}

pub fn digest(bytes: &Bytes) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

pub fn digest_512(bytes: &Bytes) -> String {
    format!("sha512:{}", hex(&Sha512::digest(bytes)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes without a pattern.
pub fn noise(length: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

/// Adds the digest to a session's location, which has a query of its own with the others.
pub fn with_digest(session: &str, digest: &str) -> String {
    let mark = if session.contains('?') { '&' } else { '?' };
    format!("{session}{mark}digest={digest}")
}

/// Polls until the work says yes.
pub async fn eventually(what: &str, mut work: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + STATE_TIMEOUT;
    while !work().await? {
        if Instant::now() >= deadline {
            bail!("waited {} s in vain for {what}", STATE_TIMEOUT.as_secs());
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

#[derive(Clone)]
pub struct Client {
    pub http: reqwest::Client,
    url: String,
}

pub struct Reply {
    request: String,
    pub status: u16,
    headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub fn expect(self, status: u16) -> Result<Self> {
        if self.status != status {
            bail!(
                "{} is {}, not {status}: {}",
                self.request,
                self.status,
                String::from_utf8_lossy(&self.body)
            );
        }
        Ok(self)
    }

    /// The value of a header; empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

impl Reply {
    /// All values of a header.
    pub fn headers(&self, name: &str) -> Vec<&str> {
        self.headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect()
    }
}

impl Client {
    pub fn new(url: &str) -> Self {
        Self { http: reqwest::Client::new(), url: url.to_owned() }
    }

    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<reqwest::Body>,
    ) -> Result<Reply> {
        // The others' locations are whole URLs.
        let url = if path.starts_with('/') { format!("{}{path}", self.url) } else { path.to_owned() };
        let mut request = self.http.request(method.parse()?, url).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Ok(Reply { request: format!("{method} {path}"), status, headers, body: response.bytes().await? })
    }

    pub async fn get(&self, path: &str) -> Result<Reply> {
        // Distribution answers by what is accepted.
        let accept = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST].join(", ");
        self.send("GET", path, &[("accept", &accept)], Bytes::new()).await
    }

    pub async fn delete(&self, path: &str) -> Result<()> {
        self.send("DELETE", path, &[], Bytes::new()).await?.expect(202).map(drop)
    }

    pub async fn tags(&self, repo: &str) -> Result<Vec<String>> {
        let reply = self.get(&format!("/v2/{repo}/tags/list")).await?.expect(200)?;
        let list: Value = serde_json::from_slice(&reply.body)?;
        let mut tags: Vec<String> = serde_json::from_value(list["tags"].clone())?;
        // Distribution 2.8 lists them in the order of its directory.
        tags.sort_unstable();
        Ok(tags)
    }

    pub async fn manifest_digest(&self, repo: &str, reference: &str) -> Result<Option<String>> {
        let reply = self.get(&format!("/v2/{repo}/manifests/{reference}")).await?;
        if reply.status == 404 {
            return Ok(None);
        }
        Ok(Some(reply.expect(200)?.header("docker-content-digest").to_owned()))
    }

    pub async fn put_manifest(
        &self,
        repo: &str,
        tag: &str,
        media_type: &str,
        bytes: &Bytes,
    ) -> Result<Reply> {
        let path = format!("/v2/{repo}/manifests/{tag}");
        self.send("PUT", &path, &[("content-type", media_type)], bytes.clone()).await
    }

    /// Begins an upload and returns where it goes on.
    pub async fn begin(&self, repo: &str) -> Result<String> {
        let path = format!("/v2/{repo}/blobs/uploads/");
        let begun = self.send("POST", &path, &[], Bytes::new()).await?.expect(202)?;
        Ok(begun.header("location").to_owned())
    }

    pub async fn patch(&self, session: &str, first: usize, chunk: Bytes) -> Result<Reply> {
        let range = format!("{first}-{}", first + chunk.len() - 1);
        let headers = [("content-range", range.as_str()), ("content-type", "application/octet-stream")];
        self.send("PATCH", session, &headers, chunk).await
    }

    /// Streams what is sent through a channel, for as long as it is open.
    pub fn patch_slowly(
        &self,
        session: &str,
    ) -> (mpsc::Sender<Bytes>, impl Future<Output = Result<Reply>> + Send + use<>) {
        let (sender, receiver) = mpsc::channel::<Bytes>(4);
        let pieces = futures_util::stream::unfold(receiver, async |mut receiver| {
            let piece = receiver.recv().await?;
            Some((Ok::<_, std::io::Error>(piece), receiver))
        });
        let (client, session) = (self.clone(), session.to_owned());
        (sender, async move { client.send("PATCH", &session, &[], reqwest::Body::wrap_stream(pieces)).await })
    }

    /// How many bytes of an upload the registry has.
    pub async fn offset(&self, session: &str) -> Result<usize> {
        let state = self.get(session).await?.expect(204)?;
        match state.header("range") {
            "0-0" => Ok(0),
            range => Ok(range.strip_prefix("0-").context("a range")?.parse::<usize>()? + 1),
        }
    }

    /// Sends the rest of an upload, ends it, and compares what is pulled.
    pub async fn finish(&self, session: &str, came: usize, bytes: &Bytes) -> Result<()> {
        let put = format!("{session}?digest={}", digest(bytes));
        let reply = self.send("PUT", &put, &[], bytes.slice(came..)).await?.expect(201)?;
        let pulled = self.get(reply.header("location")).await?.expect(200)?;
        ensure!(pulled.body == bytes, "{session} ended in other bytes");
        Ok(())
    }

    pub async fn push_blob_as(&self, repo: &str, digest: &str, bytes: &Bytes) -> Result<Reply> {
        let session = self.begin(repo).await?;
        let headers = [("content-type", "application/octet-stream")];
        self.send("PUT", &with_digest(&session, digest), &headers, bytes.clone()).await
    }

    /// Pushes a blob in one of the ways there are.
    pub async fn push_blob_some_way(&self, repo: &str, bytes: &Bytes, way: u8) -> Result<()> {
        let digest = digest(bytes);
        if way.is_multiple_of(2) || bytes.len() < 2 {
            return self.push_blob_as(repo, &digest, bytes).await?.expect(201).map(drop);
        }
        let mut session = self.begin(repo).await?;
        let mut came = 0;
        for chunk in bytes.chunks(bytes.len().div_ceil(usize::from(way % 3) + 1)) {
            let patched = self.patch(&session, came, bytes.slice_ref(chunk)).await?.expect(202)?;
            session = patched.header("location").to_owned();
            came += chunk.len();
        }
        self.send("PUT", &with_digest(&session, &digest), &[], Bytes::new()).await?.expect(201).map(drop)
    }
}
