//! TLS: certificates from files, read again when they change, and what a client's certificate says.

use std::error::Error as StdError;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;
use webpki::EndEntityCert;

use crate::reload::{self, Reloaded};
use crate::{Error, Result};

/// Largest file with certificates or a key, bytes.
const PEM_BYTES_MAX: u64 = 1 << 20;
/// The protocol that is spoken inside.
const ALPN: &[u8] = b"http/1.1";
/// The name of a subject, 2.5.4.3.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

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

/// Returns the common name in a certificate that was verified; `None` if there is none, or more than one.
pub(crate) fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    name_of(EndEntityCert::try_from(certificate).ok()?.subject())
}

/// Finds the common name in a subject: sets of sequences of type and value.
fn name_of(subject: &[u8]) -> Option<String> {
    let mut names = Vec::new();
    let mut subject = Der(subject);
    while let Some((SET, set)) = subject.next() {
        let mut set = Der(set);
        while let Some((SEQUENCE, attribute)) = set.next() {
            let mut attribute = Der(attribute);
            if let (Some((OID, COMMON_NAME)), Some(value)) = (attribute.next(), attribute.next()) {
                names.push(value);
            }
        }
    }
    match names.as_slice() {
        [(UTF8_STRING | PRINTABLE_STRING | IA5_STRING, name)] if !name.is_empty() => {
            String::from_utf8(name.to_vec()).ok()
        }
        _ => None,
    }
}

const OID: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const IA5_STRING: u8 = 0x16;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;

/// Values one behind the other in DER.
struct Der<'a>(&'a [u8]);

impl<'a> Iterator for Der<'a> {
    type Item = (u8, &'a [u8]);

    /// The next tag and value; `None` at the end, and at what is malformed.
    fn next(&mut self) -> Option<Self::Item> {
        let (tag, rest) = self.0.split_first()?;
        let (first, rest) = rest.split_first()?;
        let (length, rest) = match first {
            0..=0x7f => (usize::from(*first), rest),
            0x81 => rest.split_first().map(|(length, rest)| (usize::from(*length), rest))?,
            0x82 => {
                let (length, rest) = rest.split_first_chunk::<2>()?;
                (usize::from(u16::from_be_bytes(*length)), rest)
            }
            _ => return None,
        };
        let (value, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((*tag, value))
    }
}

fn load(tls: &Tls) -> Result<TlsAcceptor> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let key = reload::read(&tls.key, PEM_BYTES_MAX)?;
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| unusable(&tls.key, error))?;
    let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(&tls.cert, error))?;
    let config = match &tls.client_ca {
        Some(path) => config.with_client_cert_verifier(clients(path, provider)?),
        None => config.with_no_client_auth(),
    };
    let mut config =
        config.with_single_cert(certificates(&tls.cert)?, key).map_err(|error| unusable(&tls.cert, error))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Who has no certificate is let in too: there are other credentials.
fn clients(
    path: &Path,
    provider: Arc<rustls::crypto::CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| unusable(path, error))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .allow_unauthenticated()
        .build()
        .map_err(|error| unusable(path, error))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = reload::read(path, PEM_BYTES_MAX)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|error| unusable(path, error))?;
    match found.is_empty() {
        true => Err(unusable(path, "it has no certificate in PEM")),
        false => Ok(found),
    }
}

fn unusable(path: &Path, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
    Error::Tls { path: path.to_owned(), source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn der(tag: u8, value: &[u8]) -> Vec<u8> {
        [&[tag, u8::try_from(value.len()).unwrap()], value].concat()
    }

    fn attribute(oid: &[u8], tag: u8, value: &[u8]) -> Vec<u8> {
        der(SET, &der(SEQUENCE, &[der(OID, oid), der(tag, value)].concat()))
    }

    #[test]
    fn a_subject_has_one_common_name_or_none() {
        let name = |tag, value: &str| attribute(COMMON_NAME, tag, value.as_bytes());
        let organization = attribute(&[0x55, 0x04, 0x0a], UTF8_STRING, b"admin");
        for (subject, found) in [
            (name(UTF8_STRING, "admin"), Some("admin")),
            (name(PRINTABLE_STRING, "node-7"), Some("node-7")),
            ([organization.clone(), name(UTF8_STRING, "x")].concat(), Some("x")),
            (organization.clone(), None),
            ([name(UTF8_STRING, "admin"), name(UTF8_STRING, "admin")].concat(), None),
            ([name(UTF8_STRING, "x"), organization].concat(), Some("x")),
            (name(UTF8_STRING, ""), None),
            // A BMPString.
            (name(0x1e, "a"), None),
            (attribute(COMMON_NAME, UTF8_STRING, b"\xff"), None),
            (Vec::new(), None),
            (vec![SET], None),
            (vec![SET, 0x82, 0xff, 0xff], None),
        ] {
            assert_eq!(name_of(&subject).as_deref(), found, "{subject:02x?}");
        }
        let whole = name(UTF8_STRING, "admin");
        for end in 0..whole.len() {
            assert_eq!(name_of(&whole[..end]), None);
        }
    }
}
