//! Checksums over a source's bytes as they were received.

use std::fmt;
use std::str::FromStr;

use digest::Digest as _;
use digest::common::hazmat::{SerializableState, SerializedState};

use crate::{Error, ErrorKind, Result};

/// Checksums that one import may demand at most; each costs a pass over the bytes.
pub const CHECKSUMS_MAX: usize = 8;

/// A checksum algorithm, by the names that image publishers use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    Md5,
    Sha1,
    Sha256,
    Sha512,
    Streebog256,
    Streebog512,
}

impl Algorithm {
    /// Every algorithm, with its name.
    const ALL: [(&'static str, Algorithm); 6] = [
        ("md5", Algorithm::Md5),
        ("sha1", Algorithm::Sha1),
        ("sha256", Algorithm::Sha256),
        ("sha512", Algorithm::Sha512),
        ("streebog256", Algorithm::Streebog256),
        ("streebog512", Algorithm::Streebog512),
    ];

    /// Bytes of a digest.
    fn bytes(self) -> usize {
        match self {
            Algorithm::Md5 => 16,
            Algorithm::Sha1 => 20,
            Algorithm::Sha256 | Algorithm::Streebog256 => 32,
            Algorithm::Sha512 | Algorithm::Streebog512 => 64,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(_, algorithm)| algorithm == self).map_or("", |(name, _)| name);
        f.write_str(name)
    }
}

/// A checksum that the source must have; written `algorithm:hex`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksum {
    algorithm: Algorithm,
    /// Lower-case hexadecimal digits.
    expected: String,
}

impl FromStr for Checksum {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: String| Error::new(ErrorKind::Invalid, format!("checksum '{text}': {why}"));
        let (name, digits) = text.split_once(':').ok_or_else(|| bad("write it as algorithm:hex".into()))?;
        let Some((_, algorithm)) = Algorithm::ALL.iter().find(|(known, _)| known.eq_ignore_ascii_case(name))
        else {
            let known: Vec<_> = Algorithm::ALL.iter().map(|(name, _)| *name).collect();
            return Err(bad(format!("algorithm '{name}' is not one of {}", known.join(", "))));
        };
        let wanted = algorithm.bytes() * 2;
        if digits.len() != wanted || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(bad(format!(
                "{algorithm} has {wanted} hexadecimal digits, these are {}",
                digits.len()
            )));
        }
        Ok(Self { algorithm: *algorithm, expected: digits.to_ascii_lowercase() })
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm, self.expected)
    }
}

/// One running checksum.
#[derive(Clone)]
enum Running {
    Md5(md5::Md5),
    Sha1(sha1::Sha1),
    Sha256(sha2::Sha256),
    Sha512(sha2::Sha512),
    Streebog256(streebog::Streebog256),
    Streebog512(streebog::Streebog512),
}

/// Does the same with the hasher of whatever algorithm.
macro_rules! each {
    ($running:expr, $hasher:ident => $done:expr) => {
        match $running {
            Running::Md5($hasher) => $done,
            Running::Sha1($hasher) => $done,
            Running::Sha256($hasher) => $done,
            Running::Sha512($hasher) => $done,
            Running::Streebog256($hasher) => $done,
            Running::Streebog512($hasher) => $done,
        }
    };
}

impl Running {
    fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Md5 => Self::Md5(Default::default()),
            Algorithm::Sha1 => Self::Sha1(Default::default()),
            Algorithm::Sha256 => Self::Sha256(Default::default()),
            Algorithm::Sha512 => Self::Sha512(Default::default()),
            Algorithm::Streebog256 => Self::Streebog256(Default::default()),
            Algorithm::Streebog512 => Self::Streebog512(Default::default()),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        each!(self, hasher => hasher.update(bytes))
    }

    fn finish(self) -> Vec<u8> {
        each!(self, hasher => hasher.finalize().to_vec())
    }

    fn save(&self) -> Vec<u8> {
        each!(self, hasher => hasher.serialize().to_vec())
    }

    /// Takes over a state that [`Running::save`] told; false if it is none of this algorithm.
    fn restore(&mut self, state: &[u8]) -> bool {
        fn read<H: SerializableState>(state: &[u8]) -> Option<H> {
            let state = SerializedState::<H>::try_from(state).ok()?;
            H::deserialize(&state).ok()
        }
        each!(self, hasher => match read(state) {
            Some(restored) => {
                *hasher = restored;
                true
            }
            None => false,
        })
    }
}

/// Running checksums of one source.
#[derive(Clone)]
pub struct Checksums {
    running: Vec<(Checksum, Running)>,
}

impl Checksums {
    /// Begins; fails when more than [`CHECKSUMS_MAX`] are demanded.
    pub fn new(demanded: &[Checksum]) -> Result<Self> {
        if demanded.len() > CHECKSUMS_MAX {
            let context = format!("{} checksums demanded, at most {CHECKSUMS_MAX} can be", demanded.len());
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let running = demanded.iter().map(|one| (one.clone(), Running::new(one.algorithm))).collect();
        Ok(Self { running })
    }

    /// The checksums that are demanded, each with its state, for [`Checksums::restore`].
    pub fn save(&self) -> Vec<(String, Vec<u8>)> {
        self.running.iter().map(|(demanded, running)| (demanded.to_string(), running.save())).collect()
    }

    /// Goes on where [`Checksums::save`] was called; false, and nothing is of use, if other checksums were demanded there.
    pub fn restore(&mut self, saved: &[(String, Vec<u8>)]) -> bool {
        saved.len() == self.running.len()
            && self.running.iter_mut().zip(saved).all(|((demanded, running), (name, state))| {
                demanded.to_string() == *name && running.restore(state)
            })
    }

    /// Adds bytes in the order they came.
    pub fn update(&mut self, bytes: &[u8]) {
        for (_, hasher) in &mut self.running {
            hasher.update(bytes);
        }
    }

    /// Ends; fails with [`ErrorKind::Checksum`] when any does not match.
    pub fn verify(self) -> Result<()> {
        for (demanded, hasher) in self.running {
            let found: String = hasher.finish().iter().map(|byte| format!("{byte:02x}")).collect();
            if found != demanded.expected {
                let algorithm = demanded.algorithm;
                let context = format!(
                    "the source's checksum is {algorithm}:{found}, demanded was {demanded}: it is another file, or \
                     damaged on the way"
                );
                return Err(Error::new(ErrorKind::Checksum, context));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Digests of "abc": RFC 1321, FIPS 180-4 and, for Streebog, the 63-byte message M1 of RFC 6986.
    #[test]
    fn every_algorithm_agrees_with_its_standard() {
        let m1: &[u8] = b"012345678901234567890123456789012345678901234567890123456789012";
        let known: [(&str, &[u8]); 6] = [
            ("md5:900150983cd24fb0d6963f7d28e17f72", b"abc"),
            ("sha1:a9993e364706816aba3e25717850c26c9cd0d89d", b"abc"),
            ("SHA256:BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD", b"abc"),
            (
                "sha512:ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
                b"abc",
            ),
            ("streebog256:9d151eefd8590b89daa6ba6cb74af9275dd051026bb149a452fd84e5e57b5500", m1),
            (
                "streebog512:1b54d01a4af5b9d5cc3d86d68d285462b19abc2475222f35c085122be4ba1ffa00ad30f8767b3a82384c6574f024c311e2a481332b08ef7f41797891c1646f48",
                m1,
            ),
        ];
        for (text, message) in known {
            let mut checksums = Checksums::new(&[text.parse().unwrap()]).unwrap();
            let (first, second) = message.split_at(1);
            checksums.update(first);
            // Another process goes on.
            let saved = checksums.save();
            let mut checksums = Checksums::new(&[text.parse().unwrap()]).unwrap();
            assert!(checksums.restore(&saved), "{text}");
            checksums.update(second);
            checksums.verify().unwrap_or_else(|error| panic!("{error}"));
        }
    }

    #[test]
    fn a_state_is_taken_over_for_the_same_checksums_only() {
        let demanded =
            ["md5:900150983cd24fb0d6963f7d28e17f72", "sha1:a9993e364706816aba3e25717850c26c9cd0d89d"];
        let demanded: Vec<Checksum> = demanded.iter().map(|text| text.parse().unwrap()).collect();
        let saved = Checksums::new(&demanded).unwrap().save();
        assert!(Checksums::new(&demanded).unwrap().restore(&saved));
        assert!(!Checksums::new(&demanded[..1]).unwrap().restore(&saved));
        assert!(!Checksums::new(&demanded).unwrap().restore(&[]));
        let mut torn = saved.clone();
        torn[1].1.pop();
        assert!(!Checksums::new(&demanded).unwrap().restore(&torn));
    }

    #[test]
    fn one_wrong_checksum_among_right_ones_fails() {
        let demanded =
            ["md5:900150983cd24fb0d6963f7d28e17f72", "sha1:0000000000000000000000000000000000000000"];
        let demanded: Vec<Checksum> = demanded.iter().map(|text| text.parse().unwrap()).collect();
        let mut checksums = Checksums::new(&demanded).unwrap();
        checksums.update(b"abc");
        assert_eq!(checksums.verify().unwrap_err().kind(), ErrorKind::Checksum);
    }

    #[test]
    fn malformed_checksums_say_what_is_wrong() {
        for (text, part) in [
            ("abc", "algorithm:hex"),
            ("crc32:00", "not one of"),
            ("md5:00", "32"),
            ("md5:zz", "hexadecimal"),
        ] {
            let error = text.parse::<Checksum>().unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
