//! Objects without what is theirs alone: PartialObjectMetadata and lists of it.

use serde_json::Value;

use crate::object::Object;

/// The object's `metadata` as a PartialObjectMetadata of this version of `meta.k8s.io`.
pub fn partial(object: &Object, version: &str) -> Object {
    let metadata = object.get("metadata").filter(|metadata| metadata.is_object()).cloned();
    let mut partial = head("PartialObjectMetadata", version);
    partial.insert("metadata".to_owned(), metadata.unwrap_or_else(|| Value::Object(Object::new())));
    partial
}

/// A PartialObjectMetadataList of objects; `metadata` is that of their list.
pub fn partial_list(objects: &[Object], metadata: &Object, version: &str) -> Object {
    let mut list = head("PartialObjectMetadataList", version);
    list.insert("metadata".to_owned(), Value::Object(list_metadata(metadata)));
    list.insert(
        "items".to_owned(),
        objects.iter().map(|object| Value::Object(partial(object, version))).collect(),
    );
    list
}

/// The part of a list's or an object's `metadata` that a list has.
pub(super) fn list_metadata(metadata: &Object) -> Object {
    const FIELDS: [&str; 3] = ["continue", "remainingItemCount", "resourceVersion"];
    metadata
        .iter()
        .filter(|(key, _)| FIELDS.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn head(kind: &str, version: &str) -> Object {
    let mut head = Object::new();
    head.insert("kind".to_owned(), Value::from(kind));
    head.insert("apiVersion".to_owned(), Value::from(format!("meta.k8s.io/{version}")));
    head
}
