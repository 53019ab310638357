//! Fields that the schema does not know are removed.

use serde_json::Value;

use super::Node;
use crate::field::Path;

/// Most removed fields that are told.
const REMOVED_COUNT_MAX: usize = 100;

/// Removes what the schema does not know, and returns where it was, sorted; of very many the first.
pub fn prune(value: &mut Value, node: &Node) -> Vec<String> {
    let mut pruner = Pruner { path: Path::default(), removed: Vec::new() };
    pruner.value(value, node, node.preserves_unknown);
    pruner.removed.sort();
    pruner.removed
}

struct Pruner {
    path: Path,
    removed: Vec<String>,
}

impl Pruner {
    /// What is preserved of a list is preserved of its items.
    fn value(&mut self, value: &mut Value, node: &Node, preserves: bool) {
        match value {
            Value::Object(object) => {
                let is_known = |name: &str| preserves || node.field(name).is_some();
                let left = REMOVED_COUNT_MAX.saturating_sub(self.removed.len());
                for name in object.keys().filter(|name| !is_known(name)).take(left) {
                    self.removed.push(self.path.child(name));
                }
                object.retain(|name, _| is_known(name));
                for (name, value) in object {
                    let Some(field) = node.field(name) else { continue };
                    let length = self.path.enter_child(name);
                    self.value(value, field, field.preserves_unknown);
                    self.path.leave(length);
                }
            }
            Value::Array(items) => {
                let items_node = match &node.items {
                    Some(items) => items,
                    None if preserves => return,
                    // No list is known here: the items lose their fields as this value would.
                    None => node,
                };
                for (index, item) in items.iter_mut().enumerate() {
                    let length = self.path.enter_index(index);
                    self.value(item, items_node, preserves || items_node.preserves_unknown);
                    self.path.leave(length);
                }
            }
            _ => {}
        }
    }
}
