//! A bucket on real servers, MinIO and moto, held to what every store promises.

use std::sync::Arc;
use std::time::Duration;

use dvcr_tests::{S3Server, temp_dir};
use tokio::runtime::Handle;

use super::{Bucket, Options, Timing};
use crate::s3::testing;
use crate::store::Store;
use crate::store::conformance::{Place, conformance};

/// Short, so that collections in tests wait little; the store's clock counts seconds.
const TIMING: Timing = Timing {
    validity: Duration::from_secs(2),
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
        let options = Options { grace, timing: TIMING };
        let store: Arc<dyn Store> =
            Handle::current().block_on(Bucket::open(settings.clone(), options)).unwrap();
        store
    })
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
