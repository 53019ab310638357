//! A certificate authority of our own: the server's certificate, and those of users.
//!
//! ```text
//!   FOLDER/ca.pem      certificate and key, made once; ten years
//!   FOLDER/server.pem  certificate and key of the server, made again a month before it ends, and for other names
//! ```
//!
//! Keys are ECDSA P-256. A user's certificate says who it is as Kubernetes reads it: the common name is the user, the organizations are
//! its groups (Kubernetes documentation, "Authenticating", X.509 client certificates).

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chrono::NaiveDateTime;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SigningKey, date_time_ymd,
};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};

use super::files;
use super::user::{AUTHENTICATED, User};

/// How long the authority's certificate is good.
const AUTHORITY_DAYS: u32 = 3650;
/// How long the server's certificate is good.
const SERVER_DAYS: u32 = 365;
/// How long before its end the server's certificate is made again.
const RENEW_DAYS: u32 = 30;
/// Certificates begin this long ago, for clients whose clock is behind.
const SKEW_SECS: u64 = 300;
/// Longest name of a user or a group in a certificate, bytes.
const NAME_BYTES_MAX: usize = 253;
/// Most groups in a certificate.
const GROUPS_MAX: usize = 64;
/// Seconds of a day.
const DAY_SECS: u64 = 86_400;

/// What goes wrong with certificates.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or the folder cannot be read or written.
    #[error("cannot keep certificates in {path}")]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file has something else in it.
    #[error(
        "{path} has no certificate with its key in PEM: {what}; put back the file that was there, or move it away to have a new one made (a new ca.pem makes new kubeconfigs necessary)"
    )]
    Content {
        /// Which one.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The authority is of no use any more.
    #[error(
        "the certificate of {path} has ended, or its end cannot be read; move the file away to have a new one made, and write new kubeconfigs"
    )]
    Ended {
        /// The file of the authority.
        path: PathBuf,
    },
    /// The authority cannot speak for the server.
    #[error("a certificate of {path} would not be accepted: {what}; is the clock right?")]
    Authority {
        /// The file of the authority.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A name that no certificate can have.
    #[error("{name:?} cannot be in a certificate: {what}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// A certificate cannot be made.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
}

/// A certificate and its private key, both in PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// `CERTIFICATE`.
    pub certificate: String,
    /// `PRIVATE KEY`, PKCS #8.
    pub key: String,
}

impl fmt::Debug for Identity {
    /// Leaves the key out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// Who signs our certificates.
pub struct Authority {
    folder: PathBuf,
    certificate: CertificateDer<'static>,
    key: KeyPair,
}

impl fmt::Debug for Authority {
    /// Leaves the key out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl Authority {
    /// Opens the authority in a folder, which is made if it is missing, as the authority is. Blocks.
    ///
    /// # Errors
    /// When the folder cannot be written, or has something else in the authority's file.
    pub fn open(folder: &Path, now: SystemTime) -> Result<Self, Error> {
        files::private_folder(folder).map_err(|source| Error::File { path: folder.to_owned(), source })?;
        let path = folder.join("ca.pem");
        if let Some(text) = read(&path)? {
            let (certificate, key) = parse(&path, &text)?;
            // Not every client would tell.
            if end_of(&certificate).is_none_or(|end| end <= now) {
                return Err(Error::Ended { path });
            }
            return Ok(Self { folder: folder.to_owned(), certificate, key });
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params("dvcr certificate authority", now, days(AUTHORITY_DAYS));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let made = params.self_signed(&key)?;
        write(&path, &(made.pem() + &key.serialize_pem()))?;
        Ok(Self { folder: folder.to_owned(), certificate: made.der().clone(), key })
    }

    /// The authority's certificate in PEM, for clients.
    pub fn certificate(&self) -> String {
        pem("CERTIFICATE", &self.certificate)
    }

    /// The file that has the authority's certificate, and its key.
    pub fn path(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// Returns the file with the server's certificate and key for these names and addresses. What is there is kept while all of them are in it
    /// and it does not end within a month. Blocks.
    ///
    /// # Errors
    /// When a name is none, the file cannot be written, or the authority has ended.
    pub fn server(&self, names: &[&str], now: SystemTime) -> Result<PathBuf, Error> {
        let path = self.folder.join("server.pem");
        let accepted = |certificate: &CertificateDer<'_>, then: SystemTime| {
            names.iter().try_for_each(|name| self.accepts(certificate, name, then))
        };
        if let Some(text) = read(&path)?
            && let Ok((certificate, _)) = parse(&path, &text)
            && accepted(&certificate, now + days(RENEW_DAYS)).is_ok()
        {
            return Ok(path);
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params("dvcr", now, days(SERVER_DAYS));
        let name_of = |name: &&str| Error::Name {
            name: (*name).to_owned(),
            what: "it is no DNS name or address".to_owned(),
        };
        for name in names {
            ServerName::try_from(*name).map_err(|_| name_of(name))?;
            params.subject_alt_names.extend(CertificateParams::new([(*name).to_owned()])?.subject_alt_names);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let made = self.sign(&params, &key)?;
        accepted(made.der(), now)?;
        write(&path, &(made.pem() + &key.serialize_pem()))?;
        Ok(path)
    }

    /// Makes a certificate for a user, which is not kept here.
    ///
    /// # Errors
    /// When the user or a group cannot be in a certificate.
    pub fn client(
        &self,
        user: &str,
        groups: &[&str],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Identity, Error> {
        let refuse = |name: &str, what: String| Err(Error::Name { name: name.to_owned(), what });
        if groups.len() > GROUPS_MAX {
            return refuse(
                user,
                format!("it has {} groups, at most {GROUPS_MAX} are possible", groups.len()),
            );
        }
        for name in groups.iter().copied().chain([user]) {
            if name.is_empty() || name.len() > NAME_BYTES_MAX {
                return refuse(
                    name,
                    format!("it has {} bytes, 1 to {NAME_BYTES_MAX} are possible", name.len()),
                );
            }
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params(user, now, lifetime.min(days(AUTHORITY_DAYS)));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let made = self.sign(&params, &key)?;
        let certificate = match groups {
            [] => made.pem(),
            groups => pem("CERTIFICATE", &self.with_groups(made.der(), user, groups)?),
        };
        Ok(Identity { certificate, key: key.serialize_pem() })
    }

    fn sign(&self, params: &CertificateParams, key: &KeyPair) -> Result<Certificate, Error> {
        let name = dvcr_tls::common_name(&self.certificate).ok_or_else(|| Error::Content {
            path: self.path(),
            what: "the certificate's subject has no common name".to_owned(),
        })?;
        let mut issuer = CertificateParams::default();
        issuer.distinguished_name = common_name(&name);
        Ok(params.signed_by(key, &Issuer::from_params(&issuer, &self.key))?)
    }

    /// Puts another subject in a certificate and signs it again: rcgen's names have one value of each type.
    fn with_groups(&self, made: &[u8], user: &str, groups: &[&str]) -> Result<Vec<u8>, Error> {
        let attribute = |kind: u8, value: &str| {
            let value = [der(0x06, &[0x55, 0x04, kind]), der(0x0c, value.as_bytes())].concat();
            der(0x31, &der(0x30, &value))
        };
        let mut subject: Vec<u8> = groups.iter().flat_map(|group| attribute(10, group)).collect();
        subject.extend(attribute(3, user));
        let resigned = || {
            let (_, certificate, _) = split(made)?;
            let (_, inner, rest) = split(certificate)?;
            let (algorithm, _, _) = split(rest)?;
            // Version, serial number, algorithm, issuer, validity; then the subject.
            let mut after = inner;
            for _ in 0..5 {
                after = split(after)?.2;
            }
            let before = inner.get(..inner.len().checked_sub(after.len())?)?;
            let after = split(after)?.2;
            Some((der(0x30, &[before, &der(0x30, &subject), after].concat()), algorithm.to_vec()))
        };
        let (inner, algorithm) = resigned().ok_or(rcgen::Error::CouldNotParseCertificate)?;
        let signature = [&[0][..], &self.key.sign(&inner)?].concat();
        Ok(der(0x30, &[inner, algorithm, der(0x03, &signature)].concat()))
    }

    /// Whether a client that trusts us would accept a server's certificate for a name at a time.
    fn accepts(&self, certificate: &CertificateDer<'_>, name: &str, then: SystemTime) -> Result<(), Error> {
        let refuse = |what: String| Error::Authority { path: self.path(), what };
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).map_err(|error| refuse(error.to_string()))?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build();
        let verifier = verifier.map_err(|error| refuse(error.to_string()))?;
        let name = ServerName::try_from(name)
            .map_err(|error| Error::Name { name: name.to_owned(), what: error.to_string() })?;
        let then = UnixTime::since_unix_epoch(then.duration_since(UNIX_EPOCH).unwrap_or_default());
        let verified = verifier.verify_server_cert(certificate, &[], &name, &[], then);
        verified.map(drop).map_err(|error| refuse(error.to_string()))
    }
}

/// Opens a private key that is kept in a file of the folder; both are made if they are missing. Blocks.
pub(super) fn key(folder: &Path, file: &str) -> Result<KeyPair, Error> {
    files::private_folder(folder).map_err(|source| Error::File { path: folder.to_owned(), source })?;
    let path = folder.join(file);
    if let Some(text) = read(&path)? {
        return parse_key(&path, &text);
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    write(&path, &key.serialize_pem())?;
    Ok(key)
}

/// Returns the user that a certificate speaks for which was verified; `None` if it names none.
pub fn user_of(certificate: &CertificateDer<'_>) -> Option<User> {
    let mut groups = dvcr_tls::organizations(certificate)?;
    groups.push(AUTHENTICATED.to_owned());
    Some(User { name: dvcr_tls::common_name(certificate)?, groups, ..User::default() })
}

fn params(name: &str, now: SystemTime, lifetime: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    let now = date_time_ymd(1970, 1, 1) + now.duration_since(UNIX_EPOCH).unwrap_or_default();
    params.not_before = now - Duration::from_secs(SKEW_SECS);
    params.not_after = now + lifetime;
    params.use_authority_key_identifier_extension = true;
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}

fn days(days: u32) -> Duration {
    Duration::from_secs(DAY_SECS) * days
}

fn read(path: &Path) -> Result<Option<String>, Error> {
    files::read(path).map_err(|source| Error::File { path: path.to_owned(), source })
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    files::write(path, text).map_err(|source| Error::File { path: path.to_owned(), source })
}

/// Finds a certificate and the key that belongs to it.
fn parse(path: &Path, text: &str) -> Result<(CertificateDer<'static>, KeyPair), Error> {
    let refuse = |what: String| Error::Content { path: path.to_owned(), what };
    let certificate =
        CertificateDer::from_pem_slice(text.as_bytes()).map_err(|error| refuse(error.to_string()))?;
    let key = parse_key(path, text)?;
    let belongs =
        certificate.windows(key.public_key_raw().len()).any(|window| window == key.public_key_raw());
    match belongs {
        true => Ok((certificate, key)),
        false => Err(refuse("the key is another one's".to_owned())),
    }
}

fn parse_key(path: &Path, text: &str) -> Result<KeyPair, Error> {
    let refuse = |what: String| Error::Content { path: path.to_owned(), what };
    let key =
        PrivatePkcs8KeyDer::from_pem_slice(text.as_bytes()).map_err(|error| refuse(error.to_string()))?;
    KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ECDSA_P256_SHA256)
        .map_err(|error| refuse(error.to_string()))
}

/// When a certificate ends (RFC 5280, 4.1.2.5); `None` if it cannot be read.
fn end_of(certificate: &[u8]) -> Option<SystemTime> {
    let (_, certificate, _) = split(certificate)?;
    let (_, mut inner, _) = split(certificate)?;
    // Version, serial number, algorithm and issuer are before it.
    for _ in 0..4 {
        inner = split(inner)?.2;
    }
    let (_, validity, _) = split(inner)?;
    let (_, _, after) = split(validity)?;
    let (whole, end, _) = split(after)?;
    let end = std::str::from_utf8(end).ok()?;
    // A UTCTime has two digits of the year, 1950 to 2049.
    let century = match (whole.first()?, end.get(..2)?) {
        (0x17, year) if year >= "50" => "19",
        (0x17, _) => "20",
        _ => "",
    };
    let end = NaiveDateTime::parse_from_str(&format!("{century}{end}"), "%Y%m%d%H%M%SZ").ok()?;
    Some(UNIX_EPOCH + Duration::from_secs(u64::try_from(end.and_utc().timestamp()).ok()?))
}

/// Writes PEM (RFC 7468).
pub(super) fn pem(label: &str, bytes: &[u8]) -> String {
    let text = STANDARD.encode(bytes);
    let mut pem = format!("-----BEGIN {label}-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = after;
    }
    pem + &format!("-----END {label}-----\n")
}

/// Writes a value in DER (X.690, 8.1).
fn der(tag: u8, value: &[u8]) -> Vec<u8> {
    let length = value.len().to_be_bytes();
    let length = &length[length.iter().position(|byte| *byte != 0).unwrap_or(length.len() - 1)..];
    let mut whole = vec![tag];
    if value.len() >= 0x80 {
        whole.push(0x80 | length.len() as u8);
    }
    whole.extend_from_slice(length);
    whole.extend_from_slice(value);
    whole
}

/// Splits DER into the first value as it is written, its content, and what follows.
fn split(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (first, after) = bytes.get(1..)?.split_first()?;
    let (length, after) = match first {
        0..=0x7f => (usize::from(*first), after),
        0x81 => after.split_first().map(|(length, after)| (usize::from(*length), after))?,
        0x82 => {
            let (length, after) = after.split_first_chunk::<2>()?;
            (usize::from(u16::from_be_bytes(*length)), after)
        }
        _ => return None,
    };
    let (content, after) = after.split_at_checked(length)?;
    let whole = bytes.get(..bytes.len() - after.len())?;
    Some((whole, content, after))
}

#[cfg(test)]
mod tests;
