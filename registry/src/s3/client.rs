//! The client of one bucket.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aws_config::meta::region::RegionProviderChain;
use aws_config::provider_config::ProviderConfig;
use aws_config::{BehaviorVersion, Region};
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::{
    Builder, RequestChecksumCalculation, ResponseChecksumValidation, SharedHttpClient,
    StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::types::ServerSideEncryption;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::io::AsyncReadExt;

use super::attempt::Call;
use super::clock::{Clock, ServerTime};
use super::credentials::Source;
use super::error::{Error, Failure, Kind, Place, Result};
use super::multipart::COPY_BYTES_MAX;
use super::settings::{Encryption, Settings};

/// Largest file of certificates, bytes.
const CA_BYTES_MAX: u64 = 1 << 20;
/// What stores that are not Amazon's mostly call the only region they have.
const REGION: &str = "us-east-1";
/// How long a connection rests before it is closed; shorter than servers give it.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// A bucket, or a directory in it. Clones are the same client.
#[derive(Clone, Debug)]
pub(crate) struct Client(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    s3: aws_sdk_s3::Client,
    settings: Settings,
    clock: Arc<Clock>,
    copy_bytes_max: u64,
}

impl Client {
    /// Reads what is needed of files and of the environment; the store is not asked yet.
    ///
    /// # Errors
    /// [`Kind::Other`] with what is wrong in the settings.
    pub(crate) async fn open(settings: Settings) -> Result<Self> {
        Self::open_with(settings, COPY_BYTES_MAX).await
    }

    /// Opens one whose largest copy in one piece is smaller.
    pub(super) async fn open_with(settings: Settings, copy_bytes_max: u64) -> Result<Self> {
        let place = || Place { bucket: settings.bucket.clone(), key: String::new() };
        let bad = |why: BoxError| Error::new(Kind::Other, "use", place(), why);
        settings.check().map_err(|why| bad(why.into()))?;
        let http = http_client(&settings).await.map_err(bad)?;
        let provider = ProviderConfig::default().with_http_client(http.clone());
        let loader = aws_config::defaults(BehaviorVersion::latest()).http_client(http);
        let loader = match (&settings.region, &settings.endpoint) {
            (Some(region), _) => loader.region(Region::new(region.clone())),
            // The chain would ask the instance, which a machine that is none waits for in vain.
            (None, Some(_)) => {
                let environment = aws_config::environment::EnvironmentVariableRegionProvider::new();
                loader.region(RegionProviderChain::first_try(environment).or_else(Region::new(REGION)))
            }
            (None, None) => loader,
        };
        let source = Source::of(&settings);
        let is_anonymous = source == Source::Anonymous;
        let shared = source.put_into(loader, &provider).load().await;
        if shared.region().is_none() {
            return Err(bad("the region is not known; write it in `region`, or set AWS_REGION".into()));
        }
        let clock = Arc::new(Clock::default());
        let mut config = Builder::from(&shared)
            .force_path_style(settings.is_path_style())
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            // Time-outs, repetition and the server's clock are ours.
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .retry_config(RetryConfig::disabled())
            .disable_clock_skew_correction(true)
            .time_source(SharedClock(Arc::clone(&clock)));
        if let Some(endpoint) = &settings.endpoint {
            config = config.endpoint_url(endpoint);
        }
        if is_anonymous {
            config = config.allow_no_auth();
        }
        let s3 = aws_sdk_s3::Client::from_conf(config.build());
        Ok(Self(Arc::new(Inner { s3, settings, clock, copy_bytes_max })))
    }

    /// Returns the server's time; asks for it, if there has been no answer yet.
    pub(crate) async fn server_now(&self) -> Result<ServerTime> {
        if let Some(time) = self.0.clock.now() {
            return Ok(time);
        }
        let call = Call::new(self, "ask for the time of", "");
        call.value(|| async {
            let request = self.s3().head_bucket().bucket(self.bucket());
            let answer = request.customize().config_override(call.config()).send().await;
            answer.map_err(|error| Failure::of(error, None))?;
            self.0.clock.now().ok_or_else(|| Failure::wrong("its answers have no Date"))
        })
        .await
    }

    /// Says what is wrong with an object, where the store itself has nothing to say.
    pub(crate) fn error(
        &self,
        kind: Kind,
        operation: &'static str,
        key: &str,
        why: impl Into<BoxError>,
    ) -> Error {
        Error::new(kind, operation, self.place(key), why.into())
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.0.settings
    }

    pub(super) fn s3(&self) -> &aws_sdk_s3::Client {
        &self.0.s3
    }

    pub(super) fn clock(&self) -> Arc<Clock> {
        Arc::clone(&self.0.clock)
    }

    pub(super) fn bucket(&self) -> &str {
        &self.0.settings.bucket
    }

    pub(super) fn copy_bytes_max(&self) -> u64 {
        self.0.copy_bytes_max
    }

    /// The key in the bucket of one below the root directory.
    pub(super) fn full(&self, key: &str) -> String {
        match self.0.settings.root() {
            "" => key.to_owned(),
            root => format!("{root}/{key}"),
        }
    }

    /// The key below the root directory of one in the bucket.
    pub(super) fn below<'k>(&self, full: &'k str) -> Option<&'k str> {
        match self.0.settings.root() {
            "" => Some(full),
            root => full.strip_prefix(root)?.strip_prefix('/'),
        }
    }

    pub(super) fn place(&self, key: &str) -> Place {
        Place { bucket: self.bucket().to_owned(), key: self.full(key) }
    }

    pub(super) fn encryption(&self) -> Option<ServerSideEncryption> {
        self.0.settings.encryption.map(|encryption| match encryption {
            Encryption::Aes256 => ServerSideEncryption::Aes256,
            Encryption::Kms => ServerSideEncryption::AwsKms,
        })
    }

    pub(super) fn kms_key(&self) -> Option<String> {
        self.0.settings.kms_key_id.clone()
    }

    pub(super) fn storage_class(&self) -> Option<aws_sdk_s3::types::StorageClass> {
        self.0.settings.storage_class.as_deref().map(Into::into)
    }
}

/// The clock as the SDK asks for it.
#[derive(Debug)]
struct SharedClock(Arc<Clock>);

impl aws_smithy_async::time::TimeSource for SharedClock {
    fn now(&self) -> std::time::SystemTime {
        aws_smithy_async::time::TimeSource::now(&*self.0)
    }
}

async fn http_client(settings: &Settings) -> Result<SharedHttpClient, BoxError> {
    // The SDK expects roots of the system where it is to look for them; a store without TLS needs none.
    let mut roots = TrustStore::empty().with_native_roots(settings.is_tls());
    if let Some(file) = &settings.ca_file {
        roots = roots.with_pem_certificate(certificates(file).await?);
    }
    let context = TlsContext::builder().with_trust_store(roots).build()?;
    let builder = aws_smithy_http_client::Builder::new().tls_provider(Provider::Rustls(CryptoMode::AwsLc));
    Ok(builder.tls_context(context).pool_idle_timeout(POOL_IDLE_TIMEOUT).build_https())
}

/// Reads certificates, and sees that they are some.
async fn certificates(path: &Path) -> Result<Vec<u8>, BoxError> {
    let bad = |why: &dyn std::fmt::Display| format!("cannot use {} as ca-file: {why}", path.display());
    let file = tokio::fs::File::open(path).await.map_err(|error| bad(&error))?;
    let mut pem = Vec::new();
    file.take(CA_BYTES_MAX).read_to_end(&mut pem).await.map_err(|error| bad(&error))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| bad(&error))?;
        roots.add(certificate).map_err(|error| bad(&error))?;
    }
    if roots.is_empty() {
        return Err(bad(&"there is no certificate (PEM) in it").into());
    }
    Ok(pem)
}
