//! What an HTTP source wants to know of who asks.

use std::fmt;
use std::sync::Arc;

use dvcr_image::Credentials;
use reqwest::Identity;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use crate::source::Source;
use crate::{Error, ErrorKind, Result};

/// Headers that say how the transfer goes, which is decided here.
const RESERVED: [&str; 12] = [
    "accept-encoding",
    "connection",
    "content-length",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "range",
    "te",
    "transfer-encoding",
];

/// Headers and a certificate for the origin that is asked for; no redirect to another origin takes them along.
///
/// `Debug` shows no values.
#[derive(Clone, Debug, Default)]
pub struct HttpOptions {
    headers: HeaderMap,
    identity: Option<ClientCertificate>,
}

/// A certificate of ours with its key; `Debug` shows neither.
#[derive(Clone)]
struct ClientCertificate {
    http: Identity,
    key: Arc<CertifiedKey>,
}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientCertificate(..)")
    }
}

impl HttpOptions {
    /// Adds headers from lines `Name: value`; empty lines and those that begin with `#` are passed over.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], with the number of the line and without its text.
    pub fn add_headers(&mut self, text: &str) -> Result<()> {
        for (n, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let bad = |why: &str| {
                Error::new(ErrorKind::Invalid, format!("line {} of the source's headers {why}", n + 1))
            };
            let Some((name, value)) = line.split_once(':') else {
                return Err(bad("is not of the form `Name: value`"));
            };
            let name: HeaderName = name.parse().map_err(|_| bad("has a name that no header can have"))?;
            if RESERVED.contains(&name.as_str()) {
                return Err(bad(&format!("is a {name} header, which the transfer itself sets")));
            }
            if name == AUTHORIZATION {
                self.authorize(value.trim())?;
                continue;
            }
            let value = secret(value.trim()).ok_or_else(|| bad("has a value that no header can have"))?;
            self.headers.append(name, value);
        }
        Ok(())
    }

    /// Sends a user name and a password, `user:password` (RFC 7617).
    pub fn set_basic(&mut self, user_and_password: &str) -> Result<()> {
        let Some((username, password)) = user_and_password.split_once(':') else {
            let text = "the source's credentials are not of the form user:password";
            return Err(Error::new(ErrorKind::Invalid, text));
        };
        let credentials = Credentials { username: username.to_owned(), password: password.to_owned() };
        self.authorize(&credentials.basic())
    }

    /// Sends a bearer token (RFC 6750).
    pub fn set_bearer(&mut self, token: &str) -> Result<()> {
        self.authorize(&format!("Bearer {token}"))
    }

    /// Presents a certificate, PEM with its chain, whose key is `key`, PEM too; to an `nbds` source as well.
    pub fn set_identity(&mut self, certificate: &[u8], key: &[u8]) -> Result<()> {
        let text =
            "the source's client certificate and key cannot be used; both are PEM, and belong to each other";
        let pem = [certificate, b"\n", key].concat();
        let http = Identity::from_pem(&pem);
        let http = http.map_err(|e| Error::with(ErrorKind::Invalid, text, e.without_url()))?;
        let chain: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificate).collect();
        let chain = chain.map_err(|e| Error::with(ErrorKind::Invalid, text, e))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| Error::with(ErrorKind::Invalid, text, e))?;
        let key = CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider());
        let key = Arc::new(key.map_err(|e| Error::with(ErrorKind::Invalid, text, e))?);
        self.identity = Some(ClientCertificate { http, key });
        Ok(())
    }

    /// Refuses to be given for a source that has no use for it: who gives it expects that it is shown.
    pub(crate) fn admit(&self, source: &Source) -> Result<()> {
        let fits = match source {
            Source::Http(_) => true,
            Source::Nbd(address) => self.headers.is_empty() && (self.identity.is_none() || address.tls()),
            _ => self.is_empty(),
        };
        if fits {
            return Ok(());
        }
        let text = "headers and tokens of the source are for http and https alone, client certificates for https and nbds";
        Err(Error::new(ErrorKind::Invalid, text))
    }

    /// Whether nothing was given.
    pub fn is_empty(&self) -> bool {
        self.headers.is_empty() && self.identity.is_none()
    }

    pub(super) fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    pub(super) fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref().map(|identity| &identity.http)
    }

    /// The certificate, for who speaks TLS otherwise than by HTTP.
    pub(crate) fn certified_key(&self) -> Option<&Arc<CertifiedKey>> {
        self.identity.as_ref().map(|identity| &identity.key)
    }

    fn authorize(&mut self, value: &str) -> Result<()> {
        if self.headers.contains_key(AUTHORIZATION) {
            let text = "the source is given credentials twice; give Basic, a bearer token or an Authorization header, \
                        in one place";
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let value = secret(value).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, "the source's credentials hold characters that no header can")
        })?;
        self.headers.insert(AUTHORIZATION, value);
        Ok(())
    }
}

fn secret(value: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(value).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_from_lines_and_hide_their_values() {
        let mut options = HttpOptions::default();
        options
            .add_headers("# for the mirror\nX-Token: s3cret: with colon\r\n\nAuthorization: Bearer t0ken\n")
            .unwrap();
        assert_eq!(options.headers()["x-token"], "s3cret: with colon");
        assert_eq!(options.headers()[AUTHORIZATION], "Bearer t0ken");
        let shown = format!("{options:?}");
        assert!(!shown.contains("s3cret") && !shown.contains("t0ken"), "{shown}");
    }

    #[test]
    fn a_wrong_line_is_named_and_not_shown() {
        for bad in
            ["s3cret", "X s3cret: a", "X-A: s3cret\u{1}", "Range: bytes=0-", "Host: s3cret", ": s3cret"]
        {
            let error = HttpOptions::default().add_headers(&format!("X-Good: 1\n{bad}\n")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains("line 2"), "{error}");
            assert!(!error.to_string().contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn credentials_are_given_once() {
        let mut options = HttpOptions::default();
        options.set_basic("alice:s3cret").unwrap();
        assert_eq!(options.headers()[AUTHORIZATION], "Basic YWxpY2U6czNjcmV0");
        for error in
            [options.set_bearer("x").unwrap_err(), options.add_headers("authorization: x").unwrap_err()]
        {
            assert!(error.to_string().contains("twice"), "{error}");
        }
        assert!(HttpOptions::default().set_basic("s3cret").is_err());
        assert!(HttpOptions::default().set_bearer("a\nb").is_err());
    }
}
