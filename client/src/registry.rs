//! A registry by its address, rather than by the name of an image.

use std::sync::Arc;
use std::time::Duration;

use url::Url;

use crate::request::{ATTEMPTS_MAX, RESPONSE_TIMEOUT_MS, Transport};
use crate::{Credentials, Error, ErrorKind, Repository, Result};

/// How to talk to a registry that is named by its address.
#[derive(Clone, Debug)]
pub struct RegistryOptions {
    /// Whom to be.
    pub credentials: Option<Credentials>,
    /// Certificates (PEM) that are trusted besides those of the system.
    pub roots: Vec<u8>,
    /// Longest wait for an answer to begin.
    pub response_timeout: Duration,
    /// Times that one request is tried while the registry is unavailable.
    pub attempts_max: u32,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            credentials: None,
            roots: Vec::new(),
            response_timeout: Duration::from_millis(RESPONSE_TIMEOUT_MS),
            attempts_max: ATTEMPTS_MAX,
        }
    }
}

/// One registry, whose repositories share connections and tokens; cheap to clone.
#[derive(Clone)]
pub struct Registry {
    transport: Arc<Transport>,
}

impl Registry {
    /// Prepares to talk to the registry at `url`, `https://host[:port]`; nothing is sent yet. The address decides whether
    /// TLS is spoken: nothing falls back to plain HTTP, and only `http://` allows it for redirects and tokens.
    ///
    /// # Errors
    /// When `url` is no address of a registry, or the certificates cannot be read.
    pub fn open(url: &str, options: RegistryOptions) -> Result<Self> {
        let bad = |why: &str| {
            Error::new(
                ErrorKind::Invalid,
                format!("the address of a registry {why}; write https://host[:port] or http://host[:port]"),
            )
        };
        let url = Url::parse(url).map_err(|e| Error::with(ErrorKind::Invalid, "an address is no URL", e))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(bad("is not one of HTTP"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(bad("has a user; credentials are given by files"));
        }
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return Err(bad("has more than a host"));
        }
        Ok(Self { transport: Arc::new(Transport::at(url, options)?) })
    }

    /// One of its repositories.
    pub fn repository(&self, name: &str) -> Repository {
        Repository::new(Arc::clone(&self.transport), name)
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_scheme_and_a_host() {
        for good in ["https://r.example", "http://127.0.0.1:5000", "https://[::1]:5000/"] {
            Registry::open(good, RegistryOptions::default()).unwrap();
        }
        for bad in [
            "r.example",
            "ftp://r.example",
            "https://r.example/v2/",
            "https://user:secret@r.example",
            "https://r.example/?x=secret",
            "",
        ] {
            let error = Registry::open(bad, RegistryOptions::default()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        let roots = b"-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n".to_vec();
        let options = RegistryOptions { roots, ..RegistryOptions::default() };
        assert!(Registry::open("https://r.example", options).is_err());
    }
}
