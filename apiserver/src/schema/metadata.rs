//! `apiVersion`, `kind` and `metadata`, which every object has, whatever its schema says.

use super::{Node, Type, kinds::metadata};

/// Puts into an object's schema what every object has.
pub fn insert(node: &mut Node) {
    node.is_embedded = true;
    for name in ["apiVersion", "kind"] {
        let text = Node { r#type: Type::String, ..Node::default() };
        node.properties.entry(name.to_owned()).or_insert(text);
    }
    let mut metadata = metadata().clone();
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
