//! What every object has: `apiVersion`, `kind` and `metadata`, read and written in place.

use serde_json::{Map, Value};

/// A JSON object, as all of the API's objects are.
pub type Object = Map<String, Value>;

/// The string at a path of keys; `None` if there is none, or something else.
pub fn text<'a>(object: &'a Object, path: &[&str]) -> Option<&'a str> {
    let (last, before) = path.split_last()?;
    let mut at = object;
    for key in before {
        at = at.get(*key)?.as_object()?;
    }
    at.get(*last)?.as_str()
}

/// `metadata`, if the object has one.
pub fn metadata(object: &Object) -> Option<&Object> {
    object.get("metadata")?.as_object()
}

/// `metadata`, made if there is none, and put in the place of what is no object.
pub fn metadata_mut(object: &mut Object) -> &mut Object {
    let metadata = object.entry("metadata").or_insert_with(|| Value::Object(Map::new()));
    if !metadata.is_object() {
        *metadata = Value::Object(Map::new());
    }
    match metadata {
        Value::Object(metadata) => metadata,
        _ => unreachable!("it was made an object above"),
    }
}

/// `metadata.name`.
pub fn name(object: &Object) -> Option<&str> {
    text(object, &["metadata", "name"])
}

/// `metadata.namespace`.
pub fn namespace(object: &Object) -> Option<&str> {
    text(object, &["metadata", "namespace"])
}

/// `metadata.uid`.
pub fn uid(object: &Object) -> Option<&str> {
    text(object, &["metadata", "uid"])
}

/// `metadata.resourceVersion` as a number; `None` if there is none, or it is not one of ours.
pub fn resource_version(object: &Object) -> Option<u64> {
    text(object, &["metadata", "resourceVersion"])?.parse().ok()
}
