//! `apiVersion`, `kind` and `metadata`, which every object has, whatever its schema says.

use std::sync::LazyLock;

use serde_json::json;

use super::{
    Node, Type,
    compile::{Origin, compile},
};

/// The schema of `metadata`.
static METADATA: LazyLock<Node> = LazyLock::new(|| {
    let text = json!({"type": "string"});
    let flag = json!({"type": "boolean"});
    let count = json!({"type": "integer", "format": "int64"});
    let time = json!({"type": "string", "format": "date-time"});
    let texts = json!({"type": "object", "additionalProperties": {"type": "string"}});
    let schema = json!({"type": "object", "properties": {
        "annotations": texts,
        "creationTimestamp": time,
        "deletionGracePeriodSeconds": count,
        "deletionTimestamp": time,
        "finalizers": {
            "type": "array",
            "items": text,
            "x-kubernetes-list-type": "set",
            "x-kubernetes-patch-strategy": "merge",
        },
        "generateName": text,
        "generation": count,
        "labels": texts,
        "managedFields": {"type": "array", "x-kubernetes-list-type": "atomic", "items": {"type": "object", "properties": {
            "apiVersion": text,
            "fieldsType": text,
            "fieldsV1": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            "manager": text,
            "operation": text,
            "subresource": text,
            "time": time,
        }}},
        "name": text,
        "namespace": text,
        "ownerReferences": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["apiVersion", "kind", "name", "uid"],
                "properties": {
                    "apiVersion": text,
                    "blockOwnerDeletion": flag,
                    "controller": flag,
                    "kind": text,
                    "name": text,
                    "uid": text,
                },
                "x-kubernetes-map-type": "atomic",
            },
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["uid"],
            "x-kubernetes-patch-strategy": "merge",
            "x-kubernetes-patch-merge-key": "uid",
        },
        "resourceVersion": text,
        "selfLink": text,
        "uid": text,
    }});
    // The table is ours: nothing in it is refused.
    compile(&schema, "", Origin::Core).unwrap_or_default()
});

/// The schema of `metadata`.
pub fn metadata() -> &'static Node {
    &METADATA
}

/// Puts into an object's schema what every object has.
pub(super) fn insert(node: &mut Node) {
    node.is_embedded = true;
    for name in ["apiVersion", "kind"] {
        let text = Node { r#type: Type::String, ..Node::default() };
        node.properties.entry(name.to_owned()).or_insert(text);
    }
    let mut metadata = METADATA.clone();
    if let Some(given) = node.properties.remove("metadata") {
        for (name, field) in given.properties {
            if let Some(known) = metadata.properties.get_mut(&name) {
                *known = field;
            }
        }
        metadata.checks = given.checks;
        metadata.default = given.default;
        metadata.is_nullable = given.is_nullable;
    }
    node.properties.insert("metadata".to_owned(), metadata);
}
