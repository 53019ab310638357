//! Settings of the servers that tests start, and what only tests ask them.

use std::time::Duration;

use dvcr_tests::{S3Server, TempDir};

use super::{Client, Settings, Upload};
use crate::units::Time;

/// Settings with a static key in files, and no bucket.
pub(crate) fn settings(server: &S3Server, keys: &TempDir) -> Settings {
    let file = |name: &str, text: &str| {
        let path = keys.path().join(name);
        std::fs::write(&path, format!("{text}\n")).unwrap();
        Some(path)
    };
    Settings {
        endpoint: Some(server.endpoint()),
        region: Some(S3Server::REGION.to_owned()),
        root_directory: "/some/root".to_owned(),
        access_key_file: file("access", S3Server::ACCESS_KEY),
        secret_key_file: file("secret", S3Server::SECRET_KEY),
        request_timeout: Time(Duration::from_secs(10)),
        ..Settings::default()
    }
}

/// Counts the parts that a store has of an upload, up to a thousand.
pub(crate) async fn count_parts(client: &Client, upload: &Upload) -> usize {
    let parts = client.s3().list_parts().bucket(client.bucket()).key(client.full(&upload.key));
    parts.upload_id(&upload.id).send().await.unwrap().parts().len()
}
