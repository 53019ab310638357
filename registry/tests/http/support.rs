//! What the tests share: a registry on a socket, requests, and things to push.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dvcr_registry::{BucketSettings, Config, Registry, serve};
use dvcr_tests::S3Server;
use http::HeaderMap;
use serde_json::{Value, json};
use sha2::{Digest, Sha256, Sha512};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

const POLL_TIMEOUT: Duration = Duration::from_secs(20);
const POLL_INTERVAL: Duration = Duration::from_millis(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Whether the registries of these tests have their content in a bucket: the tests of `bucket/` are those of `http/`.
pub const IN_BUCKET: bool = matches!(env!("CARGO_CRATE_NAME").as_bytes(), b"bucket");

/// A registry that serves a directory of its own, `root` inside a temporary one, or a bucket of its own.
pub struct Served {
    pub address: SocketAddr,
    place: Place,
    client: reqwest::Client,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<dvcr_registry::Result<()>>,
}

/// Where a registry has its content, whether it is served or not: a directory, and a bucket on a server that lives as long.
pub struct Place {
    dir: TempDir,
    server: Option<Arc<S3Server>>,
}

impl From<TempDir> for Place {
    fn from(dir: TempDir) -> Self {
        Self { dir, server: None }
    }
}

impl Deref for Place {
    type Target = TempDir;

    fn deref(&self) -> &TempDir {
        &self.dir
    }
}

impl Served {
    pub async fn new() -> Self {
        Self::open(tempfile::tempdir().unwrap()).await
    }

    pub async fn open(place: impl Into<Place>) -> Self {
        Self::open_with(place, |_| ()).await
    }

    pub async fn open_with(place: impl Into<Place>, change: impl FnOnce(&mut Config)) -> Self {
        let mut place = place.into();
        let mut config = Config::new(place.path().join("root"));
        change(&mut config);
        let open = move || {
            if IN_BUCKET {
                let server = place.server.get_or_insert_with(S3Server::shared_minio);
                config.bucket = Some(bucket(server, place.dir.path()));
            }
            (Registry::open(config), place)
        };
        let (registry, place) = tokio::task::spawn_blocking(open).await.unwrap();
        let registry = registry.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(serve(listener, registry, async {
            let _ = stopped.await;
        }));
        let client = reqwest::Client::builder().timeout(ANSWER_TIMEOUT).build().unwrap();
        Self { address, place, client, stop: Some(stop), task }
    }

    /// Asks it to end.
    pub fn stop(&mut self) {
        self.stop = None;
    }

    /// Ends in order and gives the directory back.
    pub async fn close(self) -> Place {
        drop((self.stop, self.client));
        self.task.await.unwrap().unwrap();
        self.place
    }

    /// The directory around the root.
    pub fn dir(&self) -> &Path {
        self.place.path()
    }

    /// A path in distribution's part of the directory.
    pub fn path(&self, below: &str) -> PathBuf {
        v2(self.dir()).join(below)
    }

    /// Asks without a body.
    pub async fn ask(&self, method: &str, path: &str) -> Reply {
        self.send(method, path, &[], Bytes::new()).await
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.ask("GET", path).await
    }

    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<reqwest::Body>,
    ) -> Reply {
        let url = format!("http://{}{path}", self.address);
        let mut request = self.client.request(method.parse().unwrap(), url).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Reply { status, headers, body: response.bytes().await.unwrap() }
    }

    /// Begins an upload and returns its path.
    pub async fn begin(&self, repo: &str) -> String {
        self.ask("POST", &format!("/v2/{repo}/blobs/uploads/")).await.expect(202).location()
    }

    /// Pushes a blob, digest by sha256, and returns its digest.
    pub async fn push_blob(&self, repo: &str, bytes: &[u8]) -> String {
        let digest = sha256(bytes);
        let path = format!("/v2/{repo}/blobs/uploads/?digest={digest}");
        self.send("POST", &path, &[], bytes.to_vec()).await.expect(201);
        digest
    }

    /// Pushes a manifest and returns its sha256 digest.
    pub async fn push_manifest(&self, repo: &str, reference: &str, manifest: &Value) -> String {
        let (media_type, bytes) = (manifest["mediaType"].as_str().unwrap(), manifest.to_string());
        let path = format!("/v2/{repo}/manifests/{reference}");
        self.send("PUT", &path, &[("content-type", media_type)], bytes.clone()).await.expect(201);
        sha256(bytes.as_bytes())
    }

    /// Pushes an image with one layer, and a tag; returns its manifest's digest.
    pub async fn push_image(&self, repo: &str, tag: &str, seed: u64) -> String {
        let (config, layer) = (b"{}".as_slice(), noise(1000, seed));
        self.push_blob(repo, config).await;
        self.push_blob(repo, &layer).await;
        self.push_manifest(repo, tag, &image(OCI_MANIFEST, config, &[&layer])).await
    }

    /// Reads a counter or gauge.
    pub async fn metric(&self, name: &str) -> u64 {
        let text = self.get("/metrics").await.expect(200).text();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0, |value| value.parse().unwrap())
    }
}

/// The bucket that belongs to a directory, on a server that the tests of a process share.
fn bucket(server: &S3Server, dir: &Path) -> BucketSettings {
    let name = dir.join("bucket");
    if !name.exists() {
        std::fs::write(&name, server.new_bucket().unwrap()).unwrap();
    }
    let secret = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        Some(path)
    };
    BucketSettings {
        bucket: std::fs::read_to_string(name).unwrap(),
        endpoint: Some(server.endpoint()),
        access_key_file: secret("access-key", S3Server::ACCESS_KEY),
        secret_key_file: secret("secret-key", S3Server::SECRET_KEY),
        ..BucketSettings::default()
    }
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{:?} {}", self.headers, self.text());
        self
    }

    /// Expects an error answer of the specification's form.
    #[track_caller]
    pub fn expect_error(self, status: u16, code: &str) -> Self {
        let reply = self.expect(status);
        assert_eq!(reply.header("content-type"), "application/json");
        let error = &reply.json()["errors"][0];
        assert_eq!(error["code"], code, "{error}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
        reply
    }

    /// The value of a header; empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    #[track_caller]
    pub fn location(&self) -> String {
        let location = self.header("location");
        assert!(location.starts_with("/v2/"), "{location:?}");
        location.to_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A request written by hand: with a path no client would send, or cut off.
pub struct Raw(TcpStream);

impl Raw {
    /// Connects and sends a head, to which `Host` and `Connection: close` are added.
    pub async fn start(address: SocketAddr, line: &str, headers: &[(&str, &str)]) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut head = format!("{line} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all((head + "\r\n").as_bytes()).await.unwrap();
        Self(stream)
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    /// Waits for the answer.
    pub async fn finish(mut self) -> Reply {
        let mut bytes = Vec::new();
        // A server that refuses a head too long may reset the connection behind its answer.
        let _ = tokio::time::timeout(ANSWER_TIMEOUT, self.0.read_to_end(&mut bytes)).await.unwrap();
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("an answer with a head");
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines.map(|line| line.split_once(": ").unwrap());
        let headers: HeaderMap =
            headers.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        Reply { status, headers, body: bytes.split_off(end + 4).into() }
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

pub fn sha512(bytes: &[u8]) -> String {
    format!("sha512:{}", hex(&Sha512::digest(bytes)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A digest as the directories of the layout spell it, `algorithm/hex`.
pub fn link_dir(digest: &str) -> String {
    digest.replacen(':', "/", 1)
}

/// Where a blob's content lies below `docker/registry/v2`.
pub fn blob_path(digest: &str) -> String {
    let (algorithm, hex) = digest.split_once(':').unwrap();
    format!("blobs/{algorithm}/{}/{hex}/data", &hex[..2])
}

pub fn v2(dir: &Path) -> PathBuf {
    dir.join("root/docker/registry/v2")
}

/// A descriptor of a content.
pub fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": sha256(bytes), "size": bytes.len()})
}

/// An image manifest of one of the two image types.
pub fn image(media_type: &str, config: &[u8], layers: &[&[u8]]) -> Value {
    let (config_type, layer_type) = match media_type {
        DOCKER_MANIFEST => {
            ("application/vnd.docker.container.image.v1+json", "application/vnd.docker.image.rootfs.diff.tar")
        }
        _ => ("application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar"),
    };
    let layers: Vec<_> = layers.iter().map(|layer| descriptor(layer_type, layer)).collect();
    json!({"schemaVersion": 2, "mediaType": media_type, "config": descriptor(config_type, config), "layers": layers})
}

/// An index of one of the two types.
pub fn index(media_type: &str, manifests: &[&Value]) -> Value {
    let of = |manifest: &&Value| {
        descriptor(manifest["mediaType"].as_str().unwrap(), manifest.to_string().as_bytes())
    };
    let manifests: Vec<_> = manifests.iter().map(of).collect();
    json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests})
}

/// Bytes without a pattern.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()[0]
    };
    (0..length).map(next).collect()
}

/// All files below a directory, with their content; directories and sockets do not count.
pub fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.is_file() {
            found.insert(path.clone(), std::fs::read(&path).unwrap());
        }
    }
    found
}

/// Polls until the work gives a value.
pub async fn eventually<T>(what: &str, mut work: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + POLL_TIMEOUT;
    loop {
        if let Some(value) = work().await {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// A manifest that refers to another.
pub fn referrer(subject: &Value, artifact_type: Option<&str>, note: &str) -> Value {
    let mut manifest = image(OCI_MANIFEST, b"{}", &[]);
    manifest["subject"] = descriptor(OCI_MANIFEST, subject.to_string().as_bytes());
    manifest["annotations"] = json!({"note": note});
    if let Some(artifact_type) = artifact_type {
        manifest["artifactType"] = json!(artifact_type);
    }
    manifest
}
