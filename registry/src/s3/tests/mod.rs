//! The client against real servers: MinIO, and moto.

mod conditions;
mod faults;
mod identity;
mod operations;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dvcr_tests::{S3Server, TempDir, temp_dir};

use super::testing::settings;
use super::*;
use crate::units::Time;

/// A client of a bucket of its own, and what it needs to live.
struct Fixture {
    client: Client,
    settings: Settings,
    server: Arc<S3Server>,
    is_moto: bool,
    _keys: TempDir,
}

impl Fixture {
    async fn new(server: Arc<S3Server>) -> Self {
        let keys = temp_dir();
        let mut settings = settings(&server, &keys);
        settings.bucket = server.new_bucket().unwrap();
        let client = Client::open(settings.clone()).await.unwrap();
        Self { client, settings, server, is_moto: false, _keys: keys }
    }

    async fn minio() -> Self {
        Self::new(tokio::task::spawn_blocking(S3Server::shared_minio).await.unwrap()).await
    }

    async fn moto() -> Self {
        let server = tokio::task::spawn_blocking(S3Server::shared_moto).await.unwrap();
        Self { is_moto: true, ..Self::new(server).await }
    }

    async fn both() -> [Self; 2] {
        [Self::minio().await, Self::moto().await]
    }

    async fn put(&self, key: &str, content: &[u8]) -> String {
        self.client.put(key, Bytes::copy_from_slice(content), Put::default()).await.unwrap()
    }

    async fn content(&self, key: &str) -> Bytes {
        self.client.get(key, 64 << 20).await.unwrap().content
    }
}

/// Bytes without a pattern.
fn noise(length: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()[0]
    };
    (0..length).map(next).collect()
}

async fn read_all(mut body: RangeBody) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(chunk) = body.next().await? {
        all.extend_from_slice(&chunk);
    }
    assert_eq!(body.remaining(), 0);
    Ok(all)
}
