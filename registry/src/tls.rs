//! TLS: certificates from files, read again when they change.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use dvcr_tls::{Clients, Terms};
use tokio_rustls::TlsAcceptor;

use crate::reload::Reloaded;
use crate::{Error, Result};

/// How TLS is spoken; the files are read again when they change.
#[derive(Clone, Debug)]
pub struct Tls {
    /// PEM file with our certificate and those between it and its root.
    pub cert: PathBuf,
    /// PEM file with its private key.
    pub key: PathBuf,
    /// PEM file with the roots that clients' certificates come from; the common name of one is its user. `None` asks for
    /// no certificates.
    pub client_ca: Option<PathBuf>,
}

/// Makes TLS connections of those that come in.
pub(crate) struct Acceptors(Reloaded<TlsAcceptor>);

impl Acceptors {
    /// Reads the files. Blocks.
    pub(crate) fn open(tls: Tls) -> Result<Self> {
        let files = [Some(&tls.cert), Some(&tls.key), tls.client_ca.as_ref()];
        let files = files.into_iter().flatten().cloned().collect();
        Reloaded::open("certificates", files, move || load(&tls)).map(Self)
    }

    /// Returns what new connections are accepted with.
    pub(crate) fn get(&self) -> Arc<TlsAcceptor> {
        self.0.get()
    }

    /// Reads the files again if one changed, or anyway. Blocks.
    pub(crate) fn refresh(&self, force: bool) {
        self.0.refresh(force);
    }
}

impl fmt::Debug for Acceptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who has no certificate is let in too: there are other credentials.
fn load(tls: &Tls) -> Result<TlsAcceptor> {
    let clients = tls.client_ca.as_deref().map_or(Clients::Any, Clients::Asked);
    dvcr_tls::acceptor(&tls.cert, &tls.key, clients, &Terms::default()).map_err(|error| match error {
        dvcr_tls::Error::File { path, source } => Error::Tls { path, source },
        other => Error::Invalid { why: other.to_string() },
    })
}
