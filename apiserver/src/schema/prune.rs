//! Fields that the schema does not know are removed.

use serde_json::Value;

use super::Node;

/// Removes what the schema does not know, and returns where it was, sorted.
pub fn prune(value: &mut Value, node: &Node) -> Vec<String> {
    let mut pruner = Pruner { path: String::new(), removed: Vec::new() };
    pruner.value(value, node);
    pruner.removed.sort();
    pruner.removed
}

struct Pruner {
    path: String,
    removed: Vec<String>,
}

impl Pruner {
    fn value(&mut self, value: &mut Value, node: &Node) {
        let length = self.path.len();
        match value {
            Value::Object(object) => {
                let is_known = |name: &str| node.preserves_unknown || node.field(name).is_some();
                for name in object.keys().filter(|name| !is_known(name)) {
                    let path = if length == 0 { name.clone() } else { format!("{}.{name}", self.path) };
                    self.removed.push(path);
                }
                object.retain(|name, _| is_known(name));
                for (name, value) in object {
                    let Some(field) = node.field(name) else { continue };
                    if length > 0 {
                        self.path.push('.');
                    }
                    self.path.push_str(name);
                    self.value(value, field);
                    self.path.truncate(length);
                }
            }
            Value::Array(items) => {
                let Some(node) = items_of(node) else { return };
                for (index, item) in items.iter_mut().enumerate() {
                    self.path.push_str(&format!("[{index}]"));
                    self.value(item, node);
                    self.path.truncate(length);
                }
            }
            _ => {}
        }
    }
}

/// The schema of the items; `None` if they are kept as they are.
fn items_of(node: &Node) -> Option<&Node> {
    match &node.items {
        Some(items) => Some(items),
        None if node.preserves_unknown => None,
        // A list where the schema knows none: the items lose their fields as this value would.
        None => Some(node),
    }
}
