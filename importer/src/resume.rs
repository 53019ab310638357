//! What an import leaves with its upload session, so that another process goes on with it.
//!
//! ```text
//!  source   |──────── read ────────|─ on its way ─|
//!  layer    |── header ─|───────── sent ──────────|── chunk ──|
//!                       ^          ^ the registry acknowledged so much
//!                       └ the last note was made at the beginning of a chunk: there the hash and the checksums begin again
//! ```
//!
//! The note is found by the destination and the source (see [`session_name`]), and holds only for the version of the source that it
//! names. Between it and what the registry has lie a chunk or two, which are read again from the source.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use dvcr_converter::format::Format;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::checksum::Checksums;
use crate::source::Place;

const VERSION: u32 = 1;

/// Where another process goes on, and what it need not find out again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Note {
    version: u32,
    /// The version of the source.
    pub(crate) validator: String,
    /// Bytes of the layer before the place, and the state of their hash.
    pub(crate) layer: u64,
    hash: String,
    #[serde(flatten)]
    pub(crate) mark: Mark,
    #[serde(flatten)]
    pub(crate) file: StoredFile,
}

/// The state of the source at a place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    /// Bytes of the source before the place.
    pub(crate) position: u64,
    /// The checksums demanded, and their states.
    checksums: Vec<(String, String)>,
}

/// What was found out of the file that is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredFile {
    pub(crate) name: String,
    #[serde(with = "format_name")]
    pub(crate) format: Format,
    /// Bytes of it.
    pub(crate) size: u64,
    /// Bytes a guest sees, if its beginning told.
    pub(crate) virtual_size: Option<u64>,
}

impl Note {
    /// Makes a note of `mark`, which is where `layer` bytes of the layer end.
    pub(crate) fn new(validator: &str, layer: (u64, Vec<u8>), mark: Mark, file: StoredFile) -> Self {
        let (layer, hash) = (layer.0, BASE64_URL_SAFE_NO_PAD.encode(layer.1));
        Self { version: VERSION, validator: validator.to_owned(), layer, hash, mark, file }
    }

    /// The text that is left with the session: JSON in base64, as a file's name may have any character.
    pub(crate) fn write(&self) -> Option<String> {
        serde_json::to_vec(self).ok().map(|json| BASE64_URL_SAFE_NO_PAD.encode(json))
    }

    /// Reads what [`Note::write`] wrote; `None` if it is none, or of another version of this program.
    pub(crate) fn read(text: &str) -> Option<Self> {
        let json = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
        serde_json::from_slice(&json).ok().filter(|note: &Self| note.version == VERSION)
    }

    /// The state of the layer's hash.
    pub(crate) fn hash(&self) -> Option<Vec<u8>> {
        BASE64_URL_SAFE_NO_PAD.decode(&self.hash).ok()
    }

    pub(crate) fn place(&self) -> Place {
        Place { position: self.mark.position, validator: self.validator.clone() }
    }
}

impl Mark {
    pub(crate) fn new(position: u64, checksums: &Checksums) -> Self {
        let encode = |(demanded, state)| (demanded, BASE64_URL_SAFE_NO_PAD.encode::<Vec<u8>>(state));
        Self { position, checksums: checksums.save().into_iter().map(encode).collect() }
    }

    /// Brings `checksums` to the place; false if these are not the ones that were demanded.
    pub(crate) fn restore(&self, checksums: &mut Checksums) -> bool {
        let decode = |(demanded, state): &(String, String)| {
            Some((demanded.clone(), BASE64_URL_SAFE_NO_PAD.decode(state).ok()?))
        };
        let saved: Option<Vec<_>> = self.checksums.iter().map(decode).collect();
        saved.is_some_and(|saved| checksums.restore(&saved))
    }
}

/// The name of the session by which `source` comes to the tag `target`.
pub(crate) fn session_name(target: &str, source: &str) -> String {
    let digest = Sha256::new().chain_update(target).chain_update([0]).chain_update(source).finalize();
    digest.iter().fold(String::from("import-"), |name, byte| name + &format!("{byte:02x}"))
}

mod format_name {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::Format;

    pub(super) fn serialize<S: Serializer>(format: &Format, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(format)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Format, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_read_as_it_was_written_and_fits_a_header() {
        let demanded = ["sha512", "sha256", "md5", "sha1"].map(|name| {
            let digits = match name {
                "sha512" => 128,
                "sha256" => 64,
                "md5" => 32,
                _ => 40,
            };
            format!("{name}:{}", "0".repeat(digits)).parse().unwrap()
        });
        let mut checksums = Checksums::new(&demanded).unwrap();
        checksums.update(b"some bytes");
        let file =
            StoredFile {
                name: "ж".repeat(47), format: Format::Qcow2, size: 12, virtual_size: Some(1 << 40)
            };
        let note = Note::new("12 \"v1\"", (65_546, vec![7; 105]), Mark::new(10, &checksums), file);
        let text = note.write().unwrap();
        assert!(text.len() <= 8192 && text.bytes().all(|b| b.is_ascii_graphic()), "{}", text.len());
        let read = Note::read(&text).unwrap();
        assert_eq!(read, note);
        assert_eq!((read.hash().unwrap(), read.place().position), (vec![7; 105], 10));
        let mut others = Checksums::new(&demanded).unwrap();
        assert!(read.mark.restore(&mut others));
        assert_eq!(others.save(), checksums.save());
        assert_eq!(Note::read("none"), None);
        assert_eq!(Note::read(""), None);
    }

    #[test]
    fn a_session_has_a_name_of_its_own_for_each_source_and_target() {
        let names = [("a", "b"), ("ab", ""), ("", "ab"), ("a", "c")].map(|(t, s)| session_name(t, s));
        assert!(names.iter().all(|name| name.len() == 71));
        for (n, name) in names.iter().enumerate() {
            assert!(!names[n + 1..].contains(name));
        }
    }
}
