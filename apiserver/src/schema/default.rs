//! What is missing is filled with the schema's defaults, and nulls that may not be are removed.

use serde_json::Value;

use super::Node;

/// Fills in defaults below `value`.
///
/// A null that the schema does not permit is what is missing: it is replaced by the default, or removed.
pub fn fill(value: &mut Value, node: &Node) {
    match value {
        Value::Object(object) => {
            object.retain(|name, value| {
                let Some(field) = node.field(name) else { return true };
                !value.is_null() || field.is_nullable || field.default.is_some()
            });
            for (name, field) in &node.properties {
                let Some(default) = &field.default else { continue };
                match object.get(name) {
                    Some(value) if !is_refused_null(value, field) => {}
                    _ => {
                        object.insert(name.clone(), default.clone());
                    }
                }
            }
            for (name, value) in object {
                if let Some(field) = node.field(name) {
                    replace_null(value, field);
                    fill(value, field);
                }
            }
        }
        Value::Array(items) => {
            let Some(node) = &node.items else { return };
            for item in items {
                replace_null(item, node);
                fill(item, node);
            }
        }
        _ => {}
    }
}

fn is_refused_null(value: &Value, node: &Node) -> bool {
    value.is_null() && !node.is_nullable
}

fn replace_null(value: &mut Value, node: &Node) {
    if let (true, Some(default)) = (is_refused_null(value, node), &node.default) {
        *value = default.clone();
    }
}
