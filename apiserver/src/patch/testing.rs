//! Objects for the tests of patches.

use proptest::prelude::*;
use serde_json::Value;

use crate::object::Object;
use crate::schema::{ListType, Node, Patch, Type};

/// A JSON object from what `json!` makes.
pub(super) fn object(value: Value) -> Object {
    match value {
        Value::Object(object) => object,
        other => panic!("{other} is no object"),
    }
}

fn any_scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3i64..4).prop_map(Value::from),
        Just(Value::from(0.5)),
        "[a-c]{0,2}".prop_map(Value::from),
    ]
}

/// Any JSON of few keys, so that those of two values meet.
pub(super) fn any_value() -> impl Strategy<Value = Value> {
    let key = prop::sample::select(vec![
        "a",
        "b",
        "c",
        "name",
        "$patch",
        "$setElementOrder/a",
        "$deleteFromPrimitiveList/b",
    ]);
    any_scalar().prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key.clone().prop_map(str::to_owned), inner, 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// Any object, of the values of `any_value`.
pub(super) fn any_object() -> impl Strategy<Value = Object> {
    let key = prop::sample::select(vec!["a", "b", "c", "name"]).prop_map(str::to_owned);
    prop::collection::btree_map(key, any_value(), 0..4).prop_map(|fields| fields.into_iter().collect())
}

/// The schema of an object with these fields.
pub(super) fn node<const N: usize>(properties: [(&str, Node); N]) -> Node {
    let properties = properties.into_iter().map(|(key, node)| (key.to_owned(), node)).collect();
    Node { r#type: Type::Object, properties, ..Node::default() }
}

/// The schema of one scalar.
pub(super) fn scalar(r#type: Type) -> Node {
    Node { r#type, ..Node::default() }
}

/// The schema of a map from any key to such values.
pub(super) fn map_of(value: Node) -> Node {
    Node { r#type: Type::Object, additional: Some(Box::new(value)), ..Node::default() }
}

/// The schema of a list, which strategic merge patches merge unless it is atomic.
pub(super) fn list_of(items: Node, list: ListType) -> Node {
    let merge_key = match &list {
        ListType::Map(keys) => keys.first().cloned(),
        _ => None,
    };
    let patch = Patch { merges: list != ListType::Atomic, merge_key, retains_keys: false };
    Node { r#type: Type::Array, items: Some(Box::new(items)), list, patch, ..Node::default() }
}

/// The schema of a list that merges by the values of these keys.
pub(super) fn list_by<const N: usize>(keys: [&str; N], items: Node) -> Node {
    list_of(items, ListType::Map(keys.map(str::to_owned).to_vec()))
}
