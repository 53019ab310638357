//! Certificates that have expired, of an authority that is trusted.
#![allow(clippy::unwrap_used, reason = "test code: a failure is the report")]

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use std::fs;
use std::path::{Path, PathBuf};

/// An authority, and the files of a server that it vouches for, or did.
pub struct Tls {
    authority: CertifiedIssuer<'static, KeyPair>,
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl Tls {
    /// With a certificate that was good for a day, years ago.
    pub fn expired(dir: &Path) -> Result<Self> {
        let mut params = CertificateParams::new(vec![])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let file = |name| dir.join(name);
        let tls = Self { authority, ca: file("ca.pem"), cert: file("cert.pem"), key: file("key.pem") };
        fs::write(&tls.ca, tls.authority.pem())?;
        let mut params = Self::params()?;
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2020, 1, 2);
        tls.sign(params)?;
        Ok(tls)
    }

    /// Replaces the certificate by one that is good.
    pub fn renew(&self) -> Result<()> {
        self.sign(Self::params()?)
    }

    /// `0.0.0.0` leads to this machine as well, and is no loopback address, to which registries are spoken to without TLS.
    fn params() -> Result<CertificateParams> {
        Ok(CertificateParams::new(vec!["127.0.0.1".to_owned(), "0.0.0.0".to_owned()])?)
    }

    fn sign(&self, params: CertificateParams) -> Result<()> {
        let key = KeyPair::generate()?;
        fs::write(&self.cert, params.signed_by(&key, &self.authority)?.pem())?;
        Ok(fs::write(&self.key, key.serialize_pem())?)
    }
}
