//! Content digests: computed over the raw bytes, never over a re-serialisation.

use std::str::FromStr;

pub use oci_spec::image::Digest;
use oci_spec::image::DigestAlgorithm;
use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::{Digest as _, Sha256, Sha512};

use crate::{Error, ErrorKind, Result};

/// A running digest of one of the registered algorithms.
#[derive(Clone, Debug)]
pub enum Hasher {
    /// The default of everything this crate writes.
    Sha256(Sha256),
    /// Read where others used it.
    Sha512(Sha512),
}

impl Hasher {
    /// Begins a SHA-256.
    pub fn sha256() -> Self {
        Self::Sha256(Sha256::new())
    }

    /// Begins the algorithm that `digest` was made with; others than sha256 and sha512 are unsupported.
    pub fn matching(digest: &Digest) -> Result<Self> {
        match digest.algorithm() {
            DigestAlgorithm::Sha256 => Ok(Self::sha256()),
            DigestAlgorithm::Sha512 => Ok(Self::Sha512(Sha512::new())),
            other => Err(Error::new(
                ErrorKind::Unsupported,
                format!("digest algorithm {other} of {digest} cannot be verified; sha256 and sha512 can"),
            )),
        }
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// The state of a SHA-256, for [`Hasher::restore_sha256`]; nothing of others.
    pub fn save_sha256(&self) -> Vec<u8> {
        match self {
            Self::Sha256(hasher) => hasher.serialize().to_vec(),
            Self::Sha512(_) => Vec::new(),
        }
    }

    /// Goes on with a SHA-256 that was saved; `None` if `state` is none.
    pub fn restore_sha256(state: &[u8]) -> Option<Self> {
        let state = SerializedState::<Sha256>::try_from(state).ok()?;
        Sha256::deserialize(&state).ok().map(Self::Sha256)
    }

    /// Ends the digest.
    pub fn finish(self) -> Result<Digest> {
        match self {
            Self::Sha256(hasher) => parse(&format!("sha256:{}", hex(&hasher.finalize()))),
            Self::Sha512(hasher) => parse(&format!("sha512:{}", hex(&hasher.finalize()))),
        }
    }
}

/// Computes the SHA-256 digest of `bytes`.
pub fn sha256(bytes: &[u8]) -> Result<Digest> {
    let mut hasher = Hasher::sha256();
    hasher.update(bytes);
    hasher.finish()
}

/// Fails with [`ErrorKind::Mismatch`] unless `bytes` have the digest `expected`; `what` names them.
pub fn verify(bytes: &[u8], expected: &Digest, what: &str) -> Result<()> {
    let mut hasher = Hasher::matching(expected)?;
    hasher.update(bytes);
    same(&hasher.finish()?, expected, what)
}

/// Fails with [`ErrorKind::Mismatch`] unless both digests are equal; `what` names the content.
pub fn same(computed: &Digest, expected: &Digest, what: &str) -> Result<()> {
    if computed == expected {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Mismatch,
        format!("{what} has digest {computed} instead of {expected}: it was damaged or replaced"),
    ))
}

/// Parses `algorithm:hex`.
pub fn parse(text: &str) -> Result<Digest> {
    Digest::from_str(text).map_err(|e| {
        Error::with(ErrorKind::Invalid, format!("{text:?} is not a digest such as sha256:<hex>"), e)
    })
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_standard() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256(b"").unwrap().as_ref(), empty);
        verify(b"", &parse(empty).unwrap(), "nothing").unwrap();
        let error = verify(b"x", &parse(empty).unwrap(), "x").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Mismatch);
    }

    #[test]
    fn an_unknown_algorithm_is_refused_by_name() {
        let digest = parse("md5+x:abcdef").unwrap();
        assert!(Hasher::matching(&digest).unwrap_err().to_string().contains("md5+x"));
    }
}
