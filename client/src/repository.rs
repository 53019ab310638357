//! One repository of one registry.

use std::sync::Arc;
use std::time::Duration;

use http::{Method, StatusCode};
use url::Url;

use crate::auth::AuthStore;
use crate::digest::Digest;
use crate::network::Network;
use crate::request::{self, Body, Outgoing, Transport};
use crate::upload::Upload;
use crate::{Error, ErrorKind, Reference, Result};

/// Longest wait for what a dropped upload or staged blob leaves to clean up, milliseconds.
const SETTLE_TIMEOUT_MS: u64 = 5_000;

/// How to talk to registries.
#[derive(Clone, Debug, Default)]
pub struct ClientOptions {
    /// Do not verify certificates, and fall back to plain HTTP where TLS is not spoken. Loopback hosts are always
    /// spoken to in plain HTTP and need no such permission.
    pub insecure: bool,
    /// Whom to be.
    pub auth: AuthStore,
    /// Whom to trust, by way of which proxy, and where to. A loopback host needs no proxy.
    pub network: Network,
}

/// What a request wants to do with the repository; names the token scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    Pull,
    Push,
    Delete,
}

/// One repository of one registry; cheap to clone.
#[derive(Clone)]
pub struct Repository {
    pub(crate) transport: Arc<Transport>,
    pub(crate) name: Arc<str>,
}

impl Repository {
    /// Prepares to talk to the repository of `reference`; nothing is sent yet.
    pub fn open(reference: &Reference, options: &ClientOptions) -> Result<Self> {
        let transport = Transport::new(reference, options)?;
        Ok(Self::new(Arc::new(transport), reference.repository()))
    }

    pub(crate) fn new(transport: Arc<Transport>, name: &str) -> Self {
        Self { transport, name: name.into() }
    }

    /// Length of a blob in bytes, or `None` if the repository does not have it.
    pub async fn blob_size(&self, digest: &Digest) -> Result<Option<u64>> {
        let what = format!("looking up blob {digest} in {}", self.name);
        let url = self.url(&format!("blobs/{digest}")).await?;
        let request = Outgoing::new(Method::HEAD, url, Access::Pull, &self.name, &what);
        let response = self.transport.send_following(&request).await?;
        match response.status() {
            StatusCode::OK => match request::content_length(response.headers()) {
                Some(size) => Ok(Some(size)),
                None => Err(Error::new(ErrorKind::Protocol, format!("{what}: the answer tells no length"))),
            },
            StatusCode::NOT_FOUND => Ok(None),
            _ => Err(self.transport.refused(response, &what).await),
        }
    }

    /// Makes a blob of repository `from` on the same registry a blob of this one without moving it. Returns false
    /// when the registry does not do it; the blob then has to be pushed.
    pub async fn mount(&self, digest: &Digest, from: &str) -> Result<bool> {
        let what = format!("mounting blob {digest} from {from} into {}", self.name);
        let mut url = self.url("blobs/uploads/").await?;
        url.query_pairs_mut().append_pair("mount", digest.as_ref()).append_pair("from", from);
        let request = Outgoing::new(Method::POST, url, Access::Push, &self.name, &what);
        let response = self.transport.send_retrying(&request).await?;
        match response.status() {
            StatusCode::CREATED => Ok(true),
            StatusCode::ACCEPTED => {
                // The registry opened an upload session instead; it must not linger.
                drop(Upload::adopt(self.clone(), &response, what)?);
                Ok(false)
            }
            _ => Err(self.transport.refused(response, &what).await),
        }
    }

    /// Deletes a blob of the repository. Registries may refuse: [`ErrorKind::Protocol`] for 405.
    pub async fn delete_blob(&self, digest: &Digest) -> Result<()> {
        let what = format!("deleting blob {digest} of {}", self.name);
        let url = self.url(&format!("blobs/{digest}")).await?;
        let request = Outgoing::new(Method::DELETE, url, Access::Delete, &self.name, &what);
        let response = self.transport.send(&request).await?;
        if response.status().is_success() {
            return Ok(());
        }
        Err(self.transport.refused(response, &what).await)
    }

    /// Waits until what dropped uploads left behind is cleaned up, at most a few seconds.
    pub async fn settle(&self) {
        self.transport.cleanup.close();
        let limit = Duration::from_millis(SETTLE_TIMEOUT_MS);
        // What could not be cleaned up is the registry's to expire.
        let _ = tokio::time::timeout(limit, self.transport.cleanup.wait()).await;
        self.transport.cleanup.reopen();
    }

    /// Deletes `digest` in the background, as far as the registry lets; [`Repository::settle`] waits for it.
    pub fn discard_blob(&self, digest: Digest) {
        let repository = self.clone();
        self.clean_up(async move {
            if let Err(error) = repository.delete_blob(&digest).await {
                tracing::debug!(%error, "a staged blob stays for the registry's garbage collection");
            }
        });
    }

    /// Runs `work` in the background; without a runtime around there is nobody to run it.
    pub(crate) fn clean_up(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            self.transport.cleanup.spawn_on(work, &runtime);
        }
    }

    pub(crate) async fn url(&self, path: &str) -> Result<Url> {
        self.transport.url(&format!("v2/{}/{path}", self.name)).await
    }
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Repository").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A request's body that can be sent again.
pub(crate) fn fixed(bytes: bytes::Bytes, media_type: &str) -> Body {
    Body { bytes, media_type: media_type.to_owned() }
}
