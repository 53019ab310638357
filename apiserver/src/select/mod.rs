//! What a list, a watch or a deletion of many selects: by labels and by fields.
//!
//! A selector is read once for a request and tried on the JSON text of each object, from which only what it
//! asks for is read: a list of 100,000 objects, or an event that 200 watchers try, builds no object that it
//! does not send.

mod fields;
mod labels;
mod meta;
#[cfg(test)]
mod tests;

use serde_json::Value;

pub use fields::{FieldSelector, SelectableFields};
pub use labels::LabelSelector;
pub use meta::{Meta, Text};

use crate::object::Object;
use crate::status::Result;

/// The longest selector that is read. Longer ones are 400.
pub const SELECTOR_BYTES_MAX: usize = 64 << 10;
/// The most terms of one selector. Each is tried on each object.
pub const SELECTOR_TERMS_MAX: usize = 256;

/// Both selectors of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    pub labels: LabelSelector,
    pub fields: FieldSelector,
}

impl Selection {
    /// Reads `labelSelector` and `fieldSelector` of a query; an empty one selects everything.
    ///
    /// # Errors
    ///
    /// BadRequest, with the text of Kubernetes, for what cannot be read and for a field that the kind does
    /// not offer.
    pub fn parse(labels: &str, fields: &str, selectable: &SelectableFields) -> Result<Self> {
        Ok(Self { labels: LabelSelector::parse(labels)?, fields: FieldSelector::parse(fields, selectable)? })
    }

    /// Whether every object is selected.
    pub fn is_everything(&self) -> bool {
        self.labels.is_everything() && self.fields.is_everything()
    }

    /// Whether the object with this JSON text is selected.
    ///
    /// # Errors
    ///
    /// What was read before the selection was clear is not the JSON of an object.
    pub fn matches(&self, json: &[u8]) -> Result<bool, serde_json::Error> {
        if self.labels.is_everything() {
            return self.fields.matches(json);
        }
        self.matches_read(&Meta::read(json)?, json)
    }

    /// As `matches`, with `metadata` of the same text that was read once for many selections.
    ///
    /// # Errors
    ///
    /// As of `matches`.
    pub fn matches_read(&self, meta: &Meta<'_>, json: &[u8]) -> Result<bool, serde_json::Error> {
        Ok(self.labels.matches(|key| meta.label(key)) && self.fields.matches_read(meta, json)?)
    }

    /// Whether an object that is at hand is selected.
    pub fn matches_object(&self, object: &Object) -> bool {
        let labels = object.get("metadata").and_then(|metadata| metadata.get("labels"));
        self.labels.matches(|key| labels?.get(key)?.as_str()) && self.fields.matches_object(object)
    }
}

/// One scalar as Kubernetes compares it with the value of a field selector; lists and objects are none.
fn scalar_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}
