//! JSON patch (RFC 6902) and JSON merge patch (RFC 7386).

use json_patch::PatchOperation;
use serde_json::{Map, Value};

use super::{DEPTH_MAX_LEVELS, check_depth, depth, too_deep};
use crate::object::Object;
use crate::status::{Cause, Reason, Result, Status};

/// Operations of one JSON patch, as in Kubernetes.
const OPERATIONS_MAX_COUNT: usize = 10_000;
/// What all `copy` operations of one JSON patch may copy.
const COPIES_MAX_BYTES: usize = 3 << 20;
/// Items of lists that all operations of one JSON patch may move: an insertion at the head of a list moves all of them.
const MOVES_MAX_ITEMS: usize = 100_000_000;

/// Applies a JSON patch, a list of operations, to an object.
///
/// # Errors
/// `BadRequest` for what is no JSON patch, `RequestEntityTooLarge` beyond the limits, `Invalid` where an operation cannot be done, which a
/// cause tells.
pub fn json(current: &Object, patch: &Value) -> Result<Object> {
    check_depth(patch)?;
    let count = patch.as_array().map_or(0, Vec::len);
    if count > OPERATIONS_MAX_COUNT {
        return Err(too_large(format!(
            "The allowed maximum operations in a JSON patch is {OPERATIONS_MAX_COUNT}, got {count}"
        )));
    }
    let json_patch::Patch(operations) = serde::Deserialize::deserialize(patch)
        .map_err(|e: serde_json::Error| Status::bad_request(e.to_string()))?;

    let mut document = Value::Object(current.clone());
    let mut limits = Limits { levels: depth(&document), copied_bytes: 0, moved_items: 0 };
    for (index, operation) in operations.iter().enumerate() {
        limits.check(&document, operation)?;
        if is_test_of_absence(&document, operation) {
            continue;
        }
        json_patch::patch_unsafe(&mut document, std::slice::from_ref(operation))
            .map_err(|error| rejected(index, operation, &error.kind))?;
    }
    match document {
        Value::Object(object) => Ok(object),
        _ => Err(Status::bad_request("the JSON patch leaves no object, which is what it has to leave")),
    }
}

/// Whether an operation tests a field that is not there for null, which holds in Kubernetes.
fn is_test_of_absence(document: &Value, operation: &PatchOperation) -> bool {
    let PatchOperation::Test(test) = operation else { return false };
    let parent = test.path.parent().and_then(|parent| parent.resolve(document).ok());
    test.value.is_null() && parent.is_some_and(Value::is_object) && test.path.resolve(document).is_err()
}

/// Applies a JSON merge patch to an object: its nulls delete, its objects merge, anything else replaces.
///
/// # Errors
/// `BadRequest` for a patch that is no object.
pub fn merge(current: &Object, patch: &Value) -> Result<Object> {
    let Value::Object(patch) = patch else { return Err(Status::bad_request("Invalid JSON Patch")) };
    patch.values().try_for_each(check_depth)?;
    let mut merged = current.clone();
    merge_into(&mut merged, patch);
    Ok(merged)
}

fn merge_into(target: &mut Object, patch: &Object) {
    for (key, value) in patch {
        match value {
            Value::Null => {
                target.remove(key);
            }
            Value::Object(patch) => {
                let field = target.entry(key.clone()).or_insert(Value::Null);
                let mut merged = match field.take() {
                    Value::Object(fields) => fields,
                    _ => Map::new(),
                };
                merge_into(&mut merged, patch);
                *field = Value::Object(merged);
            }
            _ => {
                target.insert(key.clone(), value.clone());
            }
        }
    }
}

/// What the operations of a patch have made so far.
struct Limits {
    /// No level of the document is deeper than this.
    levels: usize,
    copied_bytes: usize,
    moved_items: usize,
}

impl Limits {
    fn check(&mut self, document: &Value, operation: &PatchOperation) -> Result<()> {
        let levels_of = |pointer: &json_patch::jsonptr::Pointer| pointer.as_str().matches('/').count();
        let path = operation.path();
        let mut places = vec![path];
        let levels = match operation {
            PatchOperation::Add(add) => levels_of(path) + depth(&add.value),
            PatchOperation::Replace(replace) => levels_of(path) + depth(&replace.value),
            PatchOperation::Move(from) => {
                places.push(&from.from);
                (self.levels + levels_of(path)).saturating_sub(levels_of(&from.from))
            }
            PatchOperation::Copy(from) => {
                let copied = from.from.resolve(document).ok().map_or(0, bytes);
                self.copied_bytes = self.copied_bytes.saturating_add(copied);
                (self.levels + levels_of(path)).saturating_sub(levels_of(&from.from))
            }
            PatchOperation::Remove(_) | PatchOperation::Test(_) => 0,
        };
        for place in places {
            let list =
                place.parent().and_then(|parent| parent.resolve(document).ok()).and_then(Value::as_array);
            self.moved_items = self.moved_items.saturating_add(list.map_or(0, Vec::len));
        }
        self.levels = self.levels.max(levels);
        if self.levels > DEPTH_MAX_LEVELS {
            return Err(too_deep());
        }
        if self.copied_bytes > COPIES_MAX_BYTES {
            return Err(too_large(format!(
                "the copies of a JSON patch may be {COPIES_MAX_BYTES} bytes in all"
            )));
        }
        if self.moved_items > MOVES_MAX_ITEMS {
            return Err(too_large(format!(
                "the operations of a JSON patch may move {MOVES_MAX_ITEMS} items of lists"
            )));
        }
        Ok(())
    }
}

/// About the bytes of a value as JSON.
fn bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len() + 2,
        Value::Array(items) => 2 + items.iter().map(|item| bytes(item) + 1).sum::<usize>(),
        Value::Object(fields) => {
            2 + fields.iter().map(|(key, value)| key.len() + 4 + bytes(value)).sum::<usize>()
        }
        _ => 5,
    }
}

fn too_large(limit: String) -> Status {
    Status::new(Reason::RequestEntityTooLarge, format!("Request entity too large: {limit}"))
}

fn rejected(index: usize, operation: &PatchOperation, why: &json_patch::PatchErrorKind) -> Status {
    let name = match operation {
        PatchOperation::Add(_) => "add",
        PatchOperation::Remove(_) => "remove",
        PatchOperation::Replace(_) => "replace",
        PatchOperation::Move(_) => "move",
        PatchOperation::Copy(_) => "copy",
        PatchOperation::Test(_) => "test",
    };
    let mut status =
        Status::new(Reason::Invalid, "the server rejected our request due to an error in our request");
    status.details.causes.push(Cause {
        reason: "FieldValueInvalid".to_owned(),
        message: format!("operation {index} ({name} {:?}): {why}", operation.path().as_str()),
        field: "patch".to_owned(),
    });
    status
}

#[cfg(test)]
#[path = "json_tests.rs"]
mod tests;
