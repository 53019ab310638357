//! A view of `metadata` that borrows from the JSON text of an object, and single fields found in such text.

use std::borrow::Cow;
use std::fmt;
use std::ops::Deref;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::SELECTOR_TERMS_MAX;

/// A string of a JSON text: borrowed unless it has escapes. `null` is the empty string.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Text<'a>(Cow<'a, str>);

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<'de: 'a, 'a> serde::Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Text::default())
            }
        }
        deserializer.deserialize_any(TextVisitor)
    }
}

/// The part of `metadata` that lists, watches and deletions look at.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Meta<'a> {
    #[serde(borrow)]
    pub name: Text<'a>,
    #[serde(borrow)]
    pub namespace: Text<'a>,
    #[serde(borrow)]
    pub uid: Text<'a>,
    #[serde(borrow)]
    pub resource_version: Text<'a>,
    #[serde(borrow)]
    pub creation_timestamp: Text<'a>,
    /// Empty if the object is not being deleted.
    #[serde(borrow)]
    pub deletion_timestamp: Text<'a>,
    #[serde(borrow)]
    labels: Labels<'a>,
}

impl<'a> Meta<'a> {
    /// Reads `metadata` of the object with this JSON text, and nothing behind it; all is empty if there is
    /// none.
    ///
    /// # Errors
    ///
    /// It is not the JSON of an object, or `metadata` has fields of other types.
    pub fn read(json: &'a [u8]) -> Result<Self, serde_json::Error> {
        let mut meta = None;
        let read = serde_json::Deserializer::from_slice(json).deserialize_map(MetaOf(&mut meta));
        match (meta, read) {
            // The visitor ends the reading with an error once it has what it is for.
            (Some(meta), _) => Ok(meta),
            (None, Ok(())) => Ok(Self::default()),
            (None, Err(error)) => Err(error),
        }
    }

    /// The value of a label.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.0.iter().find(|(name, _)| **name == *key).map(|(_, value)| &**value)
    }

    /// All labels, in the order of the text.
    pub fn labels(&self) -> impl Iterator<Item = (&str, &str)> {
        self.labels.0.iter().map(|(key, value)| (&**key, &**value))
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Labels<'a>(Vec<(Text<'a>, Text<'a>)>);

impl<'de: 'a, 'a> serde::Deserialize<'de> for Labels<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LabelsVisitor;
        impl<'de> Visitor<'de> for LabelsVisitor {
            type Value = Labels<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("labels")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut labels = Vec::new();
                while let Some(label) = map.next_entry()? {
                    labels.push(label);
                }
                Ok(Labels(labels))
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Labels::default())
            }
        }
        deserializer.deserialize_any(LabelsVisitor)
    }
}

/// Why the reading ends before the end: serde has no other way to leave the rest unread.
const FOUND: &str = "found";

struct MetaOf<'o, 'a>(&'o mut Option<Meta<'a>>);

impl<'de> Visitor<'de> for MetaOf<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(is_metadata) = map.next_key_seed(IsKey("metadata"))? {
            if is_metadata {
                *self.0 = Some(map.next_value::<Option<Meta<'de>>>()?.unwrap_or_default());
                return Err(A::Error::custom(FOUND));
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

/// Compares a key in place.
struct IsKey<'k>(&'k str);

impl<'de> DeserializeSeed<'de> for IsKey<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for IsKey<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<bool, E> {
        Ok(key == self.0)
    }
}

/// The scalar at a path of keys, as text; a list on the way is entered at its first item. `None` if there is
/// none.
pub(super) fn find<'a>(json: &'a [u8], path: &[String]) -> Result<Option<Cow<'a, str>>, serde_json::Error> {
    debug_assert!(path.len() <= SELECTOR_TERMS_MAX, "paths are those of kinds and of checked definitions");
    let mut place = Place { found: None, is_passed: false };
    let read = At { path, place: &mut place }.deserialize(&mut serde_json::Deserializer::from_slice(json));
    match read {
        Err(error) if !place.is_passed => Err(error),
        _ => Ok(place.found),
    }
}

struct Place<'a> {
    found: Option<Cow<'a, str>>,
    /// The path has been followed as far as it goes: what comes behind it changes nothing.
    is_passed: bool,
}

struct At<'p, 'o, 'a> {
    path: &'p [String],
    place: &'o mut Place<'a>,
}

impl<'a> At<'_, '_, 'a> {
    fn scalar(self, text: impl FnOnce() -> Cow<'a, str>) {
        if self.path.is_empty() {
            self.place.found = Some(text());
        }
    }
}

impl<'de> DeserializeSeed<'de> for At<'_, '_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for At<'_, '_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (key, rest) =
            self.path.split_first().map_or(("", None), |(key, rest)| (key.as_str(), Some(rest)));
        while let Some(is_key) = map.next_key_seed(IsKey(key))? {
            match rest {
                Some(path) if is_key => {
                    map.next_value_seed(At { path, place: &mut *self.place })?;
                    self.place.is_passed = true;
                    return Err(A::Error::custom(FOUND));
                }
                _ => map.next_value::<IgnoredAny>()?,
            };
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let first = At { path: self.path, place: &mut *self.place };
        if !first.path.is_empty() && items.next_element_seed(first)?.is_none() {
            return Ok(());
        }
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<(), E> {
        self.scalar(|| Cow::Borrowed(text));
        Ok(())
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.scalar(|| Cow::Owned(text.to_owned()));
        Ok(())
    }

    fn visit_bool<E>(self, flag: bool) -> Result<(), E> {
        self.scalar(|| Cow::Borrowed(if flag { "true" } else { "false" }));
        Ok(())
    }

    fn visit_i64<E>(self, number: i64) -> Result<(), E> {
        self.scalar(|| Cow::Owned(number.to_string()));
        Ok(())
    }

    fn visit_u64<E>(self, number: u64) -> Result<(), E> {
        self.scalar(|| Cow::Owned(number.to_string()));
        Ok(())
    }

    fn visit_f64<E>(self, number: f64) -> Result<(), E> {
        self.scalar(|| Cow::Owned(serde_json::Value::from(number).to_string()));
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}
