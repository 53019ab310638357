//! What a session has come to, and how that is written in the bucket: JSON, in `_uploads/<id>/dvcr`.
//!
//! ```json
//! {"version": 1, "algorithm": "sha256", "hash": "<base64>", "offset": 33563649,
//!  "parts": {"key": "docker/registry/...", "upload": "<id>", "first": 16777216, "grow": true, "etags": ["...", "..."]},
//!  "tail": {"object": "tail-33563649-1c0f..."}, "note": "..."}
//! ```
//!
//! The hash is that of all bytes up to the offset, as Go saves it. The tail is what came behind the last whole part: a short one
//! lies in the state itself (`"bytes": "<base64>"`), so that a small blob costs no object besides it. ETags are those that the parts
//! had when they were acknowledged: one that was replaced since, by a replica that did not get its state through, is found out
//! by the store when the parts are put together.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::super::parts::Parts;
use crate::digest::{Algorithm, Hasher};
use crate::s3;

/// Longest state, bytes: ten thousand ETags of up to 200, and a tail.
pub(super) const STATE_BYTES_MAX: u64 = 4 << 20;
const VERSION: u32 = 1;

/// What a session has come to.
#[derive(Clone)]
pub(super) struct Progress {
    /// Has run over all bytes up to the offset.
    pub(super) hasher: Hasher,
    pub(super) offset: u64,
    pub(super) multipart: Option<Multipart>,
    /// The whole parts, by their numbers.
    pub(super) parts: Vec<s3::Part>,
    /// What came behind them; `None` if nothing did.
    pub(super) tail: Option<Tail>,
    /// What the client left with it.
    pub(super) note: Option<String>,
}

/// The multipart upload that has a session's whole parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Multipart {
    pub(super) upload: s3::Upload,
    pub(super) plan: Parts,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tail {
    Bytes(Bytes),
    /// The name of an object beside the state.
    Object(String),
}

impl Progress {
    pub(super) fn new(algorithm: Algorithm) -> Self {
        let hasher = Hasher::new(algorithm);
        Self { hasher, offset: 0, multipart: None, parts: Vec::new(), tail: None, note: None }
    }

    /// Where the last whole part ends, and the tail begins.
    pub(super) fn whole_bytes(&self) -> u64 {
        self.parts.iter().fold(0, |sum, part| sum.saturating_add(part.bytes))
    }

    pub(super) fn tail_bytes(&self) -> u64 {
        self.offset.saturating_sub(self.whole_bytes())
    }

    pub(super) fn write(&self) -> Result<Bytes, serde_json::Error> {
        let parts = self.multipart.as_ref().map(|Multipart { upload, plan }| WrittenParts {
            key: upload.key.clone(),
            upload: upload.id.clone(),
            first: plan.first,
            grow: plan.grow,
            etags: self.parts.iter().map(|part| part.etag.clone()).collect(),
        });
        let tail = self.tail.as_ref().map(|tail| match tail {
            Tail::Bytes(bytes) => WrittenTail::Bytes(BASE64_STANDARD.encode(bytes)),
            Tail::Object(name) => WrittenTail::Object(name.clone()),
        });
        let written = Written {
            version: VERSION,
            algorithm: self.hasher.algorithm().name().to_owned(),
            hash: BASE64_STANDARD.encode(self.hasher.save()),
            offset: self.offset,
            parts,
            tail,
            note: self.note.clone(),
        };
        serde_json::to_vec(&written).map(Bytes::from)
    }

    /// Reads what [`Self::write`] wrote; the error says what is wrong with it.
    pub(super) fn read(written: &[u8]) -> Result<Self, String> {
        let written: Written = serde_json::from_slice(written).map_err(|error| error.to_string())?;
        if written.version != VERSION {
            return Err(format!("it is of version {}, and {VERSION} is the one known here", written.version));
        }
        let algorithm = Algorithm::from_name(&written.algorithm).ok_or("its hash is not known")?;
        let hash = BASE64_STANDARD.decode(&written.hash).map_err(|error| error.to_string())?;
        let (hasher, hashed) = Hasher::restore(algorithm, &hash).ok_or("its hash state is none")?;
        if hashed != written.offset {
            return Err(format!("{hashed} bytes were hashed, and {} acknowledged", written.offset));
        }
        let tail = match written.tail {
            None => None,
            Some(WrittenTail::Object(name)) => Some(Tail::Object(name)),
            Some(WrittenTail::Bytes(text)) => {
                let bytes = BASE64_STANDARD.decode(text).map_err(|error| error.to_string())?;
                Some(Tail::Bytes(bytes.into()))
            }
        };
        let (multipart, parts) = match written.parts {
            None => (None, Vec::new()),
            Some(parts) => parts.read()?,
        };
        let read = Self { hasher, offset: written.offset, multipart, parts, tail, note: written.note };
        let whole = read.whole_bytes();
        let is_right = match &read.tail {
            None => whole == read.offset,
            Some(Tail::Object(_)) => whole < read.offset,
            Some(Tail::Bytes(bytes)) => whole.checked_add(bytes.len() as u64) == Some(read.offset),
        };
        let wrong = || format!("{whole} bytes in parts, and what is behind them, are not {}", read.offset);
        if is_right { Ok(read) } else { Err(wrong()) }
    }
}

#[derive(Serialize, Deserialize)]
struct Written {
    version: u32,
    algorithm: String,
    hash: String,
    offset: u64,
    parts: Option<WrittenParts>,
    tail: Option<WrittenTail>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct WrittenParts {
    key: String,
    upload: String,
    first: u64,
    grow: bool,
    etags: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum WrittenTail {
    Bytes(String),
    Object(String),
}

impl WrittenParts {
    fn read(self) -> Result<(Option<Multipart>, Vec<s3::Part>), String> {
        let plan = Parts { first: self.first, grow: self.grow };
        if !(s3::PART_BYTES_MIN..=s3::PART_BYTES_MAX).contains(&plan.first) {
            return Err(format!("its parts cannot have {} bytes", plan.first));
        }
        let (mut parts, mut begin) = (Vec::new(), 0_u64);
        for etag in self.etags {
            let part = plan.at(begin).ok_or("it has more parts than there can be")?;
            parts.push(s3::Part { number: part.number, bytes: part.bytes, etag });
            begin = begin.saturating_add(part.bytes);
        }
        let upload = s3::Upload { key: self.key, id: self.upload };
        Ok((Some(Multipart { upload, plan }), parts))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn progress(parts: usize, tail: &[u8], is_object: bool) -> Progress {
        let plan = Parts { first: s3::PART_BYTES_MIN, grow: true };
        let mut progress = Progress::new(Algorithm::Sha256);
        for n in 0..parts {
            let part = plan.at(progress.offset).unwrap();
            progress.parts.push(s3::Part {
                number: part.number,
                bytes: part.bytes,
                etag: format!("\"{n}\""),
            });
            progress.offset += part.bytes;
        }
        let upload = s3::Upload { key: "a/b".to_owned(), id: "c".to_owned() };
        progress.multipart = (parts > 0).then_some(Multipart { upload, plan });
        progress.offset += tail.len() as u64;
        progress.tail = match (tail, is_object) {
            ([], _) => None,
            (_, true) => Some(Tail::Object("tail-1".to_owned())),
            (_, false) => Some(Tail::Bytes(Bytes::copy_from_slice(tail))),
        };
        // As if so many bytes had been hashed.
        let mut saved = progress.hasher.save();
        let at = saved.len() - 8;
        saved[at..].copy_from_slice(&progress.offset.to_be_bytes());
        progress.hasher = Hasher::restore(Algorithm::Sha256, &saved).unwrap().0;
        progress
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            parts in prop_oneof![0_usize..5, 1990_usize..2010],
            tail in proptest::collection::vec(any::<u8>(), 0..200),
            is_object: bool,
        ) {
            let before = progress(parts, &tail, is_object);
            let after = Progress::read(&before.write().unwrap()).unwrap();
            prop_assert_eq!(after.offset, before.offset);
            prop_assert_eq!(after.hasher.save(), before.hasher.save());
            prop_assert_eq!((after.multipart, after.parts, after.tail), (before.multipart, before.parts, before.tail));
        }

        #[test]
        fn what_was_changed_is_refused_or_read_without_a_panic(at in 0_usize..700, byte: u8) {
            let mut written = progress(2, b"some bytes", false).write().unwrap().to_vec();
            if let Some(place) = written.get_mut(at) {
                *place = byte;
            }
            let _ = Progress::read(&written);
        }
    }

    #[test]
    fn a_state_that_contradicts_itself_is_refused() {
        let text = String::from_utf8(progress(2, b"some", false).write().unwrap().to_vec()).unwrap();
        for (from, to) in [
            ("\"version\":1", "\"version\":2"),
            ("\"offset\":10485764", "\"offset\":10485763"),
            ("\"sha256\"", "\"sha512\""),
            ("\"\\\"0\\\"\",", ""),
            ("\"bytes\":\"c29tZQ==\"", "\"bytes\":\"c29t\""),
            ("\"first\":5242880", "\"first\":0"),
        ] {
            let changed = text.replacen(from, to, 1);
            assert_ne!(text, changed, "{from}");
            assert!(Progress::read(changed.as_bytes()).is_err(), "{changed}");
        }
    }

    #[test]
    fn the_longest_state_is_read() {
        let mut progress = progress(10_000, &vec![7; 64 << 10], false);
        for part in &mut progress.parts {
            part.etag = "\"".repeat(150);
        }
        assert!((progress.write().unwrap().len() as u64) < STATE_BYTES_MAX);
    }
}
