//! The JSON text of an object, with its resource version inside.

use bytes::Bytes;
use serde_json::Value;

use super::Error;
use crate::object::Object;

/// The largest text of an object, as the largest body that Kubernetes takes.
pub const TEXT_BYTES_MAX: usize = 3 << 20;

/// The most digits that a revision has.
const DIGITS_MAX: usize = 20;

/// The text of an object that is to be written, without the digits of its resource version, which the commit puts in.
#[derive(Clone)]
pub struct Draft {
    text: Vec<u8>,
    /// Where the digits go.
    at: usize,
}

impl Draft {
    /// The text of an object. Whatever resource version it has is left out.
    ///
    /// # Errors
    /// [`Error::TooLarge`] beyond [`TEXT_BYTES_MAX`].
    pub fn new(object: &Object) -> Result<Self, Error> {
        let empty = Object::new();
        let metadata = object.get("metadata").and_then(Value::as_object).unwrap_or(&empty);
        let mut text = Vec::with_capacity(1024);
        let mut at = 0;
        text.push(b'{');
        for (key, value) in with_key(object, "metadata") {
            begin(&mut text, key)?;
            let Some(value) = value else {
                text.push(b'{');
                for (key, value) in with_key(metadata, "resourceVersion") {
                    begin(&mut text, key)?;
                    match value {
                        Some(value) => json(&mut text, value)?,
                        None => {
                            text.push(b'"');
                            at = text.len();
                            text.push(b'"');
                        }
                    }
                }
                text.push(b'}');
                continue;
            };
            json(&mut text, value)?;
        }
        text.push(b'}');
        if text.len() > TEXT_BYTES_MAX - DIGITS_MAX {
            return Err(Error::TooLarge { bytes: text.len(), limit: TEXT_BYTES_MAX - DIGITS_MAX });
        }
        Ok(Self { text, at })
    }

    /// Bytes of the text, without the digits.
    pub fn bytes(&self) -> usize {
        self.text.len()
    }

    /// The text at this revision.
    pub(super) fn at_revision(mut self, revision: u64) -> Text {
        let digits = revision.to_string();
        self.text.splice(self.at..self.at, digits.bytes());
        Text { json: self.text.into(), at: self.at, revision }
    }
}

/// The members of an object in order, with one of that name, given as `None`, in its place whether or not there is one.
fn with_key<'a>(object: &'a Object, name: &'a str) -> impl Iterator<Item = (&'a str, Option<&'a Value>)> {
    let before = object.iter().take_while(move |(key, _)| key.as_str() < name);
    let after =
        object.iter().skip_while(move |(key, _)| key.as_str() < name).filter(move |(key, _)| *key != name);
    let some = |(key, value): (&'a String, &'a Value)| (key.as_str(), Some(value));
    before.map(some).chain([(name, None)]).chain(after.map(some))
}

fn begin(text: &mut Vec<u8>, key: &str) -> Result<(), Error> {
    if text.last() != Some(&b'{') {
        text.push(b',');
    }
    json(text, key)?;
    text.push(b':');
    Ok(())
}

fn json<T: serde::Serialize + ?Sized>(text: &mut Vec<u8>, value: &T) -> Result<(), Error> {
    serde_json::to_writer(text, value)
        .map_err(|error| Error::Damaged(format!("an object that is no JSON: {error}")))
}

/// The text of an object at one of its revisions. A clone shares the bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Text {
    json: Bytes,
    /// Where the digits of the revision begin.
    at: usize,
    revision: u64,
}

impl Text {
    /// The JSON, which has the revision as its `metadata.resourceVersion`.
    pub fn json(&self) -> &Bytes {
        &self.json
    }

    /// The revision of the write that made it.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The same object with another resource version: what was deleted is told with the revision of its deletion.
    pub fn with_revision(&self, revision: u64) -> Bytes {
        let digits = revision.to_string();
        let behind = self.at + digits_of(self.revision);
        let mut text = Vec::with_capacity(self.json.len() + DIGITS_MAX);
        text.extend_from_slice(&self.json[..self.at]);
        text.extend_from_slice(digits.as_bytes());
        text.extend_from_slice(&self.json[behind..]);
        text.into()
    }

    /// Bytes of the stored form.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.json.len() as u64 + HEAD as u64
    }

    /// The stored form: the place of the digits, 4 bytes little-endian, and the JSON.
    pub(super) fn stored(&self) -> Vec<u8> {
        let mut stored = Vec::with_capacity(HEAD + self.json.len());
        self.store(&mut stored);
        stored
    }

    /// Appends the stored form.
    pub(super) fn store(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&(self.at as u32).to_le_bytes());
        to.extend_from_slice(&self.json);
    }

    /// The text of this revision from its stored form, whose JSON `keep` makes bytes of.
    pub(super) fn from_stored(
        revision: u64,
        stored: &[u8],
        keep: impl FnOnce(&[u8]) -> Bytes,
    ) -> Result<Self, Error> {
        let damaged = || Error::Damaged(format!("the text of revision {revision}"));
        let (at, json) = stored.split_first_chunk::<HEAD>().ok_or_else(damaged)?;
        let at = u32::from_le_bytes(*at) as usize;
        let behind = at.checked_add(digits_of(revision)).ok_or_else(damaged)?;
        if behind > json.len() {
            return Err(damaged());
        }
        Ok(Self { json: keep(json), at, revision })
    }
}

impl std::fmt::Debug for Text {
    // What an object says may be a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Text({} bytes at {})", self.json.len(), self.revision)
    }
}

impl std::fmt::Debug for Draft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Draft({} bytes)", self.text.len())
    }
}

/// Bytes before the JSON in the stored form.
const HEAD: usize = 4;

fn digits_of(revision: u64) -> usize {
    revision.checked_ilog10().map_or(1, |log| log as usize + 1)
}
