//! A bucket on real servers, MinIO and moto, held to what every store promises.

mod manifests;
mod replicas;
mod requests;

use std::sync::Arc;
use std::time::Duration;

use dvcr_tests::{S3Proxy, S3Server, TempDir, temp_dir};
use tokio::runtime::Handle;

use super::{Bucket, Options, Timing};
use crate::s3::{Settings, testing};
use crate::store::Store;
use crate::store::conformance::{Place, conformance};
use crate::units::Time;

/// Short, so that collections in tests wait little; the store's clock counts seconds.
const TIMING: Timing = Timing {
    validity: Duration::from_secs(3),
    view_age: Duration::from_millis(200),
    lease: Duration::from_secs(5),
};

/// A bucket of its own, opened anew by each process of a test.
fn place(server: &Arc<S3Server>) -> Place {
    let keys = temp_dir();
    let mut settings = testing::settings(server, &keys);
    settings.bucket = server.new_bucket().unwrap();
    let server = Arc::clone(server);
    Place::new(move |grace| {
        let _lives = (&server, &keys);
        // Nobody dies while it collects here: a slow server is not to be taken for one who does.
        let timing = Timing { lease: Duration::from_secs(60), ..TIMING };
        let options = Options { grace, timing };
        let store: Arc<dyn Store> =
            Handle::current().block_on(Bucket::open(settings.clone(), options)).unwrap();
        store
    })
}

/// One bucket, opened in the runtime of a test.
pub(super) struct Opened {
    pub(super) bucket: Arc<Bucket>,
    pub(super) server: Arc<S3Server>,
    settings: Settings,
    keys: Arc<TempDir>,
}

impl Opened {
    pub(super) async fn minio() -> Arc<S3Server> {
        tokio::task::spawn_blocking(S3Server::shared_minio).await.unwrap()
    }

    pub(super) async fn servers() -> [Arc<S3Server>; 2] {
        [Self::minio().await, tokio::task::spawn_blocking(S3Server::shared_moto).await.unwrap()]
    }

    /// Makes a bucket, whose garbage stays for an hour.
    pub(super) async fn new(server: Arc<S3Server>) -> Self {
        Self::with_grace(server, Duration::from_secs(3600)).await
    }

    pub(super) async fn with_grace(server: Arc<S3Server>, grace: Duration) -> Self {
        let keys = Arc::new(temp_dir());
        let mut settings = testing::settings(&server, &keys);
        settings.bucket = server.new_bucket().unwrap();
        let bucket = Bucket::open(settings.clone(), Options { grace, timing: TIMING }).await.unwrap();
        Self { bucket, server, settings, keys }
    }

    /// Opens the same bucket once more, as another replica.
    pub(super) async fn again(&self) -> Self {
        self.open(self.settings.clone()).await
    }

    /// Opens the same bucket once more, by way of a proxy.
    pub(super) async fn through(&self, proxy: &S3Proxy) -> Self {
        self.open(Settings { endpoint: Some(proxy.endpoint()), ..self.settings.clone() }).await
    }

    /// As [`Self::through`], with so much patience for each request.
    pub(super) async fn hastily_through(&self, proxy: &S3Proxy, request_timeout: Duration) -> Self {
        let endpoint = Some(proxy.endpoint());
        let request_timeout = Time(request_timeout);
        self.open(Settings { endpoint, request_timeout, ..self.settings.clone() }).await
    }

    async fn open(&self, settings: Settings) -> Self {
        let bucket = Bucket::open(settings.clone(), self.bucket.options).await.unwrap();
        Self { bucket, server: Arc::clone(&self.server), settings, keys: Arc::clone(&self.keys) }
    }
}

mod minio {
    use super::*;

    fn bucket() -> Place {
        place(&S3Server::shared_minio())
    }

    conformance!(bucket);
}

mod moto {
    use super::*;

    fn bucket() -> Place {
        place(&S3Server::shared_moto())
    }

    conformance!(bucket);
}
