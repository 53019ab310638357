//! Registries for the tests: Debian's as a process, ours inside the test, and stubs that misbehave.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "test helpers; not every test file uses all"
)]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use axum::Router;
use bytes::Bytes;
use dvcr_client::{AuthStore, ClientOptions, Credentials, Reference, Repository, digest, media_type};
use serde_json::json;
use tempfile::TempDir;

const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Debian's docker-registry on a free port, with htpasswd users if any; gone when dropped.
pub struct DebianRegistry {
    pub address: SocketAddr,
    pub dir: TempDir,
    child: Child,
}

impl DebianRegistry {
    pub fn start(user: Option<(&str, &str)>) -> Self {
        for _ in 0..5 {
            if let Some(registry) = Self::try_start(user) {
                return registry;
            }
        }
        panic!("docker-registry does not start; is the package docker-registry installed?");
    }

    fn try_start(user: Option<(&str, &str)>) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        // Its port may be taken by somebody else before it binds; then it ends, and another try is made.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let root = dir.path().display();
        let auth = user.map_or(String::new(), |(name, password)| {
            let line = format!("{name}:{}\n", bcrypt::hash(password, 4).unwrap().replacen("$2b$", "$2y$", 1));
            std::fs::write(dir.path().join("htpasswd"), line).unwrap();
            format!("auth: {{htpasswd: {{realm: test, path: {root}/htpasswd}}}}\n")
        });
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {root}/data}}, delete: \
             {{enabled: true}}}}\nhttp: {{addr: '{address}'}}\n{auth}"
        );
        let path = dir.path().join("config.yml");
        std::fs::write(&path, config).unwrap();
        let mut child = Command::new(docker_registry())
            .arg("serve")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let deadline = Instant::now() + START_TIMEOUT;
        while Instant::now() < deadline && child.try_wait().unwrap().is_none() {
            if TcpStream::connect(address).is_ok() {
                return Some(Self { address, dir, child });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = child.kill();
        let _ = child.wait();
        None
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }
}

/// Debian's registry, where `make tools` puts it, or as it is installed.
fn docker_registry() -> PathBuf {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/tools/bin/docker-registry");
    if unpacked.is_file() { unpacked } else { "docker-registry".into() }
}

impl Drop for DebianRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves `router` inside the test.
pub async fn serve(router: Router) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

/// Our registry, inside the test.
pub async fn our_registry(root: &Path) -> SocketAddr {
    let config = dvcr_registry::Config::new(root);
    let registry = tokio::task::spawn_blocking(move || dvcr_registry::Registry::open(config)).await.unwrap();
    serve(registry.unwrap().router()).await
}

pub fn open(address: SocketAddr, name: &str) -> Repository {
    open_as(address, name, None)
}

pub fn open_as(address: SocketAddr, name: &str, user: Option<(&str, &str)>) -> Repository {
    let reference: Reference = format!("{address}/{name}").parse().unwrap();
    let auth = user.map_or_else(AuthStore::default, |(username, password)| {
        let credentials = Credentials { username: username.into(), password: password.into() };
        AuthStore::single(reference.host(), credentials)
    });
    Repository::open(&reference, &ClientOptions { auth, ..ClientOptions::default() }).unwrap()
}

/// Pushes an image of ready-made layers under the tag `latest`.
pub async fn push_image(
    repository: &Repository,
    manifest_type: &str,
    layers: &[(&str, Vec<u8>)],
) -> digest::Digest {
    let config =
        b"{\"architecture\":\"amd64\",\"os\":\"linux\",\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[]}}";
    let config_digest = repository.push_blob(Bytes::from_static(config)).await.unwrap();
    let mut entries = Vec::new();
    for (kind, bytes) in layers {
        let digest = repository.push_blob(bytes.clone().into()).await.unwrap();
        entries.push(json!({"mediaType": kind, "digest": digest.to_string(), "size": bytes.len()}));
    }
    let manifest = json!({
        "schemaVersion": 2, "mediaType": manifest_type,
        "config": {"mediaType": media_type::OCI_CONFIG, "digest": config_digest.to_string(), "size": config.len()},
        "layers": entries,
    });
    let bytes = serde_json::to_vec(&manifest).unwrap();
    repository.put_manifest("latest", bytes.into(), manifest_type).await.unwrap()
}

/// Bytes without a pattern that compression or a wrong offset could hide behind.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}
