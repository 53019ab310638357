//! How our servers speak TLS: certificates from files, and what a client's certificate says.
//!
//! ```text
//!   PEM files, Clients, Terms ──> acceptor ──> connections
//!   a verified certificate ──> common_name, organizations ──> who it is, and which groups it is in
//! ```
//!
//! Who wants files to be read again when they change makes a new acceptor.

mod name;

use std::error::Error as StdError;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion, version};
use tokio_rustls::TlsAcceptor;

pub use name::{common_name, organizations};

/// Largest file with certificates or a key, bytes.
const PEM_BYTES_MAX: u64 = 1 << 20;
/// The protocol that is spoken inside.
const ALPN: &[u8] = b"http/1.1";

/// What makes a server's TLS impossible.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that cannot be used.
    #[error("cannot use {path} for TLS")]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// A cipher suite that is not there.
    #[error("there is no cipher suite {name}; there are {known}")]
    Cipher {
        /// What was asked for.
        name: String,
        /// All there are, by their IANA names.
        known: String,
    },
    /// A version that is not there, or has none of the cipher suites.
    #[error("{what}; write VersionTLS12 or VersionTLS13, and cipher suites that go with it")]
    Version {
        /// What is wrong.
        what: String,
    },
}

/// Which clients are let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients<'a> {
    /// Anybody; no certificates are asked for.
    Any,
    /// Anybody; a certificate that is shown comes from one of the roots in this PEM file.
    Asked(&'a Path),
    /// Those with a certificate from one of the roots in this PEM file.
    Required(&'a Path),
}

/// Which versions and cipher suites are spoken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// The oldest version: `VersionTLS12` or `VersionTLS13`, as Kubernetes writes them, or `1.2` or `1.3`. Empty is 1.2.
    pub min_version: String,
    /// Cipher suites by their IANA names; empty are all that are safe.
    pub ciphers: Vec<String>,
}

/// Makes what accepts connections, of the certificate chain and the private key in two PEM files. Blocks.
///
/// # Errors
/// When a file cannot be read or used, or the terms are not there.
pub fn acceptor(cert: &Path, key: &Path, clients: Clients<'_>, terms: &Terms) -> Result<TlsAcceptor, Error> {
    let provider = Arc::new(provider(terms)?);
    let private = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|error| unusable(key, error))?;
    let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&versions(&terms.min_version)?)
        .map_err(|error| Error::Version { what: error.to_string() })?;
    let verifier = |path: &Path| {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(path)? {
            roots.add(certificate).map_err(|error| unusable(path, error))?;
        }
        Ok(WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)))
    };
    let config = match clients {
        Clients::Any => config.with_no_client_auth(),
        Clients::Asked(path) => {
            let verifier = verifier(path)?.allow_unauthenticated().build();
            config.with_client_cert_verifier(verifier.map_err(|error| unusable(path, error))?)
        }
        Clients::Required(path) => {
            let verifier = verifier(path)?.build();
            config.with_client_cert_verifier(verifier.map_err(|error| unusable(path, error))?)
        }
    };
    let config = config.with_single_cert(certificates(cert)?, private);
    let mut config = config.map_err(|error| unusable(cert, error))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn provider(terms: &Terms) -> Result<CryptoProvider, Error> {
    let mut provider = aws_lc_rs::default_provider();
    if terms.ciphers.is_empty() {
        return Ok(provider);
    }
    // rustls calls those of TLS 1.3 TLS13_..., which IANA calls TLS_...
    let iana =
        |suite: &rustls::SupportedCipherSuite| format!("{:?}", suite.suite()).replace("TLS13_", "TLS_");
    let known: Vec<String> = provider.cipher_suites.iter().map(iana).collect();
    if let Some(name) = terms.ciphers.iter().find(|name| !known.contains(name)) {
        return Err(Error::Cipher { name: name.clone(), known: known.join(", ") });
    }
    provider.cipher_suites.retain(|suite| terms.ciphers.contains(&iana(suite)));
    Ok(provider)
}

fn versions(min: &str) -> Result<Vec<&'static SupportedProtocolVersion>, Error> {
    match min {
        "" | "VersionTLS12" | "1.2" => Ok(vec![&version::TLS13, &version::TLS12]),
        "VersionTLS13" | "1.3" => Ok(vec![&version::TLS13]),
        other => Err(Error::Version { what: format!("TLS version {other:?} is not spoken") }),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let bytes = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|error| unusable(path, error))?;
    match found.is_empty() {
        true => Err(unusable(path, "it has no certificate in PEM")),
        false => Ok(found),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?.take(PEM_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > PEM_BYTES_MAX {
            let message = format!("it has more than {PEM_BYTES_MAX} bytes");
            return Err(io::Error::new(ErrorKind::FileTooLarge, message));
        }
        Ok(bytes)
    };
    read().map_err(|error| unusable(path, error))
}

fn unusable(path: &Path, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
    Error::File { path: path.to_owned(), source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_are_those_of_kubernetes_and_unknown_ones_are_named() {
        assert_eq!(versions("VersionTLS13").unwrap().len(), 1);
        assert!(versions("VersionTLS11").unwrap_err().to_string().contains("VersionTLS11"));
        let terms = |name: &str| Terms { ciphers: vec![name.to_owned()], ..Terms::default() };
        let one = provider(&terms("TLS_AES_128_GCM_SHA256")).unwrap();
        assert_eq!(one.cipher_suites.len(), 1);
        let error = provider(&terms("TLS_RSA_WITH_RC4_128_SHA")).unwrap_err().to_string();
        assert!(error.contains("RC4") && error.contains("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"), "{error}");
    }
}
