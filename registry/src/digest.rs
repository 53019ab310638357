//! Content digests and hashers whose state can be put aside.
//!
//! A saved state is byte for byte what Go's `crypto/sha256` and `crypto/sha512` marshal, so that CNCF distribution
//! continues an upload that we began, and the other way round:
//!
//! ```text
//! "sha\x03" | 8 x u32 BE chaining value |  64 bytes of input not yet compressed, zero padded | u64 BE bytes hashed
//! "sha\x07" | 8 x u64 BE chaining value | 128 bytes of input not yet compressed, zero padded | u64 BE bytes hashed
//! ```

use std::fmt;
use std::str::FromStr;

use sha2::digest::Digest as _;
use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::{Sha256, Sha512};

/// A hash algorithm that content may be addressed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Algorithm {
    Sha256,
    Sha512,
}

impl Algorithm {
    pub(crate) const ALL: [Self; 2] = [Self::Sha256, Self::Sha512];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }

    fn hex_len(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

/// A digest as the image specification writes it: `algorithm:lower-case hex` (image-spec, descriptor.md).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Digest {
    algorithm: Algorithm,
    text: Box<str>,
}

impl Digest {
    /// Computes the digest of bytes in memory.
    pub(crate) fn of(algorithm: Algorithm, bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(bytes);
        hasher.finish()
    }

    pub(crate) fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    pub(crate) fn hex(&self) -> &str {
        &self.text[self.algorithm.name().len() + 1..]
    }

    fn from_raw(algorithm: Algorithm, raw: &[u8]) -> Self {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let mut text = String::with_capacity(algorithm.name().len() + 1 + raw.len() * 2);
        text.push_str(algorithm.name());
        text.push(':');
        for byte in raw {
            text.push(char::from(HEX[usize::from(byte >> 4)]));
            text.push(char::from(HEX[usize::from(byte & 15)]));
        }
        Self { algorithm, text: text.into() }
    }
}

/// Why a text is not a digest this registry can use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DigestError {
    #[error("{0:?} is not a digest; expected algorithm:hex, as in sha256:9f86d0...")]
    Malformed(String),
    #[error("digest algorithm {0:?} is not supported; use sha256 or sha512")]
    Algorithm(String),
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        // Only the beginning of a long text is told back.
        let shown = || text.chars().take(160).collect();
        let (name, hex) = text.split_once(':').ok_or_else(|| DigestError::Malformed(shown()))?;
        let algorithm = Algorithm::from_name(name);
        let Some(algorithm) = algorithm else {
            let plausible = !name.is_empty()
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+._-".contains(&b))
                && !hex.is_empty();
            return Err(match plausible {
                true => DigestError::Algorithm(name.chars().take(40).collect()),
                false => DigestError::Malformed(shown()),
            });
        };
        let well_formed = hex.len() == algorithm.hex_len()
            && hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        match well_formed {
            true => Ok(Self { algorithm, text: text.into() }),
            false => Err(DigestError::Malformed(shown())),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A running hash.
#[derive(Clone)]
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    pub(crate) fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self::Sha256(Sha256::new()),
            Algorithm::Sha512 => Self::Sha512(Sha512::new()),
        }
    }

    pub(crate) fn algorithm(&self) -> Algorithm {
        match self {
            Self::Sha256(_) => Algorithm::Sha256,
            Self::Sha512(_) => Algorithm::Sha512,
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Sha512(hash) => hash.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        match self {
            Self::Sha256(hash) => Digest::from_raw(Algorithm::Sha256, &hash.finalize()),
            Self::Sha512(hash) => Digest::from_raw(Algorithm::Sha512, &hash.finalize()),
        }
    }

    /// Saves the state in Go's format (see the module).
    pub(crate) fn save(&self) -> Vec<u8> {
        match self {
            Self::Sha256(hash) => Shape::SHA256.write_go(&hash.serialize()),
            Self::Sha512(hash) => Shape::SHA512.write_go(&hash.serialize()),
        }
    }

    /// Restores a saved state and tells how many bytes it has hashed; `None` if the bytes are not such a state.
    pub(crate) fn restore(algorithm: Algorithm, saved: &[u8]) -> Option<(Self, u64)> {
        match algorithm {
            Algorithm::Sha256 => {
                let (raw, hashed) = Shape::SHA256.read_go(saved)?;
                let raw = SerializedState::<Sha256>::try_from(raw.as_slice()).ok()?;
                Some((Self::Sha256(Sha256::deserialize(&raw).ok()?), hashed))
            }
            Algorithm::Sha512 => {
                let (raw, hashed) = Shape::SHA512.read_go(saved)?;
                let raw = SerializedState::<Sha512>::try_from(raw.as_slice()).ok()?;
                Some((Self::Sha512(Sha512::deserialize(&raw).ok()?), hashed))
            }
        }
    }
}

/// Where things are in a state of the `sha2` crate, which is
/// `8 words LE | blocks compressed, LE, of two words | u8 bytes waiting | those bytes, zero padded to block - 1`.
struct Shape {
    magic: &'static [u8; 4],
    word: usize,
    block: usize,
}

impl Shape {
    const SHA256: Self = Self { magic: b"sha\x03", word: 4, block: 64 };
    const SHA512: Self = Self { magic: b"sha\x07", word: 8, block: 128 };

    fn write_go(&self, raw: &[u8]) -> Vec<u8> {
        let (words, rest) = raw.split_at(8 * self.word);
        let (blocks, rest) = rest.split_at(2 * self.word);
        let waiting = usize::from(rest[0]);
        let mut saved = self.magic.to_vec();
        for word in words.chunks(self.word) {
            saved.extend(word.iter().rev());
        }
        saved.extend_from_slice(&rest[1..]);
        saved.push(0);
        let blocks = blocks.iter().rev().fold(0u64, |value, byte| (value << 8) | u64::from(*byte));
        let hashed = blocks.wrapping_mul(self.block as u64).wrapping_add(waiting as u64);
        saved.extend_from_slice(&hashed.to_be_bytes());
        saved
    }

    fn read_go(&self, saved: &[u8]) -> Option<(Vec<u8>, u64)> {
        let rest = saved.strip_prefix(self.magic)?;
        let (words, rest) = rest.split_at_checked(8 * self.word)?;
        let (block, hashed) = rest.split_at_checked(self.block)?;
        let hashed = u64::from_be_bytes(hashed.try_into().ok()?);
        let waiting = usize::try_from(hashed % self.block as u64).ok()?;
        let mut raw = Vec::with_capacity(10 * self.word + self.block);
        for word in words.chunks(self.word) {
            raw.extend(word.iter().rev());
        }
        let blocks = u128::from(hashed / self.block as u64).to_le_bytes();
        raw.extend_from_slice(&blocks[..2 * self.word]);
        raw.push(u8::try_from(waiting).ok()?);
        // Go leaves what it compressed earlier behind the waiting bytes; the crate wants zeros there.
        raw.extend_from_slice(&block[..waiting]);
        raw.resize(10 * self.word + self.block, 0);
        Some((raw, hashed))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_canonical_digests_of_known_algorithms_parse() {
        let good = format!("sha256:{}", "a".repeat(64));
        assert_eq!(good.parse::<Digest>().unwrap().hex(), "a".repeat(64));
        assert!(format!("sha512:{}", "0".repeat(128)).parse::<Digest>().is_ok());
        for bad in [
            "",
            "sha256",
            "sha256:",
            "sha256:totallywrong",
            "SHA256:aa",
            ":aa",
            "../sha256:aa",
            &good.to_uppercase(),
            &good[..70],
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
        assert!(matches!("sha384:abcd".parse::<Digest>(), Err(DigestError::Algorithm(_))));
    }

    #[test]
    fn a_saved_state_is_what_go_marshals() {
        // The state of Go's sha256.New() after Write("abc"): initial chaining value, the block so far, the length.
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(b"abc");
        let saved = hasher.save();
        assert_eq!(saved.len(), 108);
        assert_eq!(&saved[..12], b"sha\x03\x6a\x09\xe6\x67\xbb\x67\xae\x85");
        assert_eq!(&saved[36..40], b"abc\0");
        assert_eq!(&saved[100..], &3u64.to_be_bytes());
        assert_eq!(Hasher::new(Algorithm::Sha512).save().len(), 204);
    }

    proptest! {
        #[test]
        fn a_restored_hasher_ends_in_the_same_digest(
            first in proptest::collection::vec(any::<u8>(), 0..700),
            second in proptest::collection::vec(any::<u8>(), 0..700),
        ) {
            for algorithm in Algorithm::ALL {
                let mut hasher = Hasher::new(algorithm);
                hasher.update(&first);
                let (mut restored, hashed) = Hasher::restore(algorithm, &hasher.save()).unwrap();
                prop_assert_eq!(hashed, first.len() as u64);
                restored.update(&second);
                let whole = [first.as_slice(), second.as_slice()].concat();
                prop_assert_eq!(restored.finish(), Digest::of(algorithm, &whole));
            }
        }

        #[test]
        fn any_bytes_are_refused_or_restored_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..210)) {
            for algorithm in Algorithm::ALL {
                let _ = Hasher::restore(algorithm, &bytes);
            }
        }
    }
}
