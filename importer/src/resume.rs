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
//!
//! That is the kind of an import whose source is stored as it comes. The session of one that is decoded or encoded on the way has
//! nothing of the image in it: its note lists the pieces of the source that are kept beside (see [`crate::keep`]). When the registry
//! has made a layer of a session, another one by the same name says which, until a manifest names it.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use bytes::Bytes;
use dvcr_converter::format::Format;
use dvcr_image::Upload;
use dvcr_image::digest::{self, Digest};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::checksum::Checksums;
use crate::source::Place;

const VERSION: u32 = 2;
/// What a note is sent with, which needs a body. An upload of one byte is reported as one of none.
const NOTE_BODY: &[u8; 4] = b"note";

/// What an import leaves for the next one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Note {
    version: u32,
    /// The version of the source.
    pub(crate) validator: String,
    #[serde(flatten)]
    pub(crate) rest: Rest,
}

/// What there is to go on with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Rest {
    /// A layer, in the session itself.
    Layer(Begun),
    /// Bytes of the source, in blobs.
    Pieces(Kept),
    /// A whole layer, in a blob.
    Pushed(Pushed),
}

/// Where in a layer another process goes on, and what it need not find out again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Begun {
    /// Bytes of the layer before the place, and the state of their hash.
    pub(crate) layer: u64,
    hash: String,
    #[serde(flatten)]
    pub(crate) mark: Mark,
    #[serde(flatten)]
    pub(crate) file: StoredFile,
}

/// A layer that no manifest names yet, and what need not be found out again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pushed {
    pub(crate) digest: Digest,
    /// The end of the source.
    #[serde(flatten)]
    pub(crate) end: Mark,
    #[serde(flatten)]
    pub(crate) file: StoredFile,
}

/// What is kept of a source: all pieces have the same length, and follow each other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    /// Bytes of the source before the first piece.
    pub(crate) from: u64,
    /// Bytes of the source in each piece.
    pub(crate) piece_bytes: u64,
    #[serde(with = "digest_bytes")]
    pub(crate) pieces: Vec<Digest>,
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
    pub(crate) fn new(validator: &str, rest: Rest) -> Self {
        Self { version: VERSION, validator: validator.to_owned(), rest }
    }

    /// Leaves it with a session that nothing but notes comes to.
    pub(crate) async fn leave(&self, journal: &mut Upload) -> dvcr_image::Result<()> {
        if let Some(text) = self.write() {
            journal.leave_note(text);
        }
        journal.append(Bytes::from_static(NOTE_BODY)).await
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

    /// The beginning of the version of the source.
    pub(crate) fn version_of_source(&self) -> Place {
        Place { position: 0, validator: self.validator.clone() }
    }
}

impl Begun {
    /// Begins again at `mark`, which is where `layer` bytes of the layer end.
    pub(crate) fn new(layer: (u64, Vec<u8>), mark: Mark, file: StoredFile) -> Self {
        let (layer, hash) = (layer.0, BASE64_URL_SAFE_NO_PAD.encode(layer.1));
        Self { layer, hash, mark, file }
    }

    /// The state of the layer's hash.
    pub(crate) fn hash(&self) -> Option<Vec<u8>> {
        BASE64_URL_SAFE_NO_PAD.decode(&self.hash).ok()
    }
}

impl Kept {
    /// Bytes of the source that are in pieces.
    pub(crate) fn bytes(&self) -> u64 {
        self.piece_bytes.saturating_mul(self.pieces.len() as u64)
    }

    /// Where in the source the pieces end.
    pub(crate) fn end(&self) -> u64 {
        self.from.saturating_add(self.bytes())
    }
}

impl Mark {
    /// A place alone.
    pub(crate) fn at(position: u64) -> Self {
        Self { position, checksums: Vec::new() }
    }

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
    append_hex("import-", &digest)
}

fn append_hex(begin: &str, bytes: &[u8]) -> String {
    bytes.iter().fold(begin.to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

/// SHA-256 digests as one text in base64: in hexadecimal digits they would not fit a note.
mod digest_bytes {
    use serde::ser::Error as _;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::{BASE64_URL_SAFE_NO_PAD, Digest, Engine, append_hex, digest};

    const BYTES: usize = 32;

    pub(super) fn serialize<S: Serializer>(digests: &[Digest], serializer: S) -> Result<S::Ok, S::Error> {
        let mut bytes = Vec::with_capacity(digests.len() * BYTES);
        for digest in digests {
            let digits = digest.as_ref().strip_prefix("sha256:").filter(|digits| digits.is_ascii());
            let digits = digits.ok_or_else(|| S::Error::custom("a digest that is not sha256"))?;
            for at in (0..digits.len()).step_by(2) {
                let byte = digits.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
                bytes.push(byte.ok_or_else(|| S::Error::custom("a digest that is not hexadecimal"))?);
            }
        }
        serializer.serialize_str(&BASE64_URL_SAFE_NO_PAD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Digest>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).map_err(D::Error::custom)?;
        if bytes.len() % BYTES != 0 {
            return Err(D::Error::custom("digests that are cut off"));
        }
        let parse = |bytes: &[u8]| digest::parse(&append_hex("sha256:", bytes)).map_err(D::Error::custom);
        bytes.chunks_exact(BYTES).map(parse).collect()
    }
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
    use crate::keep;

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
        let begun = Begun::new((65_546, vec![7; 105]), Mark::new(10, &checksums), file);
        let note = Note::new("12 \"v1\"", Rest::Layer(begun));
        let text = note.write().unwrap();
        assert!(text.len() <= 8192 && text.bytes().all(|b| b.is_ascii_graphic()), "{}", text.len());
        let read = Note::read(&text).unwrap();
        assert_eq!(read, note);
        let Rest::Layer(begun) = read.rest else { panic!("{text}") };
        assert_eq!((begun.hash().unwrap(), begun.mark.position), (vec![7; 105], 10));
        let mut others = Checksums::new(&demanded).unwrap();
        assert!(begun.mark.restore(&mut others));
        assert_eq!(others.save(), checksums.save());
    }

    #[test]
    fn the_longest_list_of_pieces_fits_a_header_and_is_read_as_it_was_written() {
        let pieces = (0..keep::PIECES_MAX).map(|n| digest::sha256(&n.to_le_bytes()).unwrap());
        let kept = Kept { from: u64::MAX, piece_bytes: u64::MAX, pieces: pieces.collect() };
        // Each of these takes two bytes in JSON.
        let validator = "\\".repeat(keep::VALIDATOR_BYTES_MAX);
        let note = Note::new(&validator, Rest::Pieces(kept));
        let text = note.write().unwrap();
        assert!(text.len() <= 8192 && text.bytes().all(|b| b.is_ascii_graphic()), "{}", text.len());
        assert_eq!(Note::read(&text).unwrap(), note);
    }

    #[test]
    fn a_note_of_a_whole_layer_is_read_as_it_was_written() {
        let checksums = Checksums::new(&[format!("md5:{}", "0".repeat(32)).parse().unwrap()]).unwrap();
        let file = StoredFile { name: "a.qcow2".into(), format: Format::Qcow2, size: 1, virtual_size: None };
        let digest = digest::sha256(b"a layer").unwrap();
        let note = Note::new("v", Rest::Pushed(Pushed { digest, end: Mark::new(1, &checksums), file }));
        assert_eq!(Note::read(&note.write().unwrap()).unwrap(), note);
    }

    #[test]
    fn what_is_no_note_or_of_another_kind_or_version_is_not_read() {
        let json = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
        let kept = r#""validator":"v","from":0,"piece_bytes":1,"pieces":"""#;
        assert!(Note::read(&json(&format!(r#"{{"version":{VERSION},"kind":"pieces",{kept}}}"#))).is_some());
        for (version, kind) in [(VERSION + 1, "pieces"), (VERSION, "others")] {
            let text = json(&format!(r#"{{"version":{version},"kind":"{kind}",{kept}}}"#));
            assert_eq!(Note::read(&text), None, "{kind} {version}");
        }
        let cut = kept.replace(r#""pieces":"""#, r#""pieces":"AAAA""#);
        assert_eq!(Note::read(&json(&format!(r#"{{"version":{VERSION},"kind":"pieces",{cut}}}"#))), None);
        assert_eq!((Note::read("none"), Note::read("")), (None, None));
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
