//! How a request changes an object: JSON patch, merge patch, strategic merge patch, server-side apply.
//!
//! ```text
//!  application/json-patch+json             ──> json       ──┐
//!  application/merge-patch+json            ──> merge      ──┼──> the new object ──> track_update ──> who changed what
//!  application/strategic-merge-patch+json  ──> strategic  ──┘                       (metadata.managedFields)
//!  application/apply-patch+yaml            ──> apply      ──> the new object, its managedFields with it
//! ```
//!
//! Pure functions on JSON: what they know of a kind is its [`Node`](crate::schema::Node). Defaults, pruning and validation come after them.

mod apply;
mod fields;
mod format;
mod json;
mod managed;
mod strategic;
#[cfg(test)]
mod testing;
mod typed;

pub use apply::{Apply, Update, apply, track_update};
pub use format::{Format, manager_of};
pub use json::{json, merge};
pub use strategic::strategic;

use serde_json::Value;

use crate::status::{Result, Status};

/// Levels of lists and maps that a patch, and an object after it, may have: less than the 127 that `serde_json` reads, so that
/// whatever is written can be read again, and recursion is bounded.
const DEPTH_MAX_LEVELS: usize = 120;

/// The levels of lists and maps in a value; more than `DEPTH_MAX_LEVELS` are not counted.
fn depth(value: &Value) -> usize {
    fn below(value: &Value, left: usize) -> usize {
        let deepest = |depths: &mut dyn Iterator<Item = usize>| 1 + depths.max().unwrap_or(0);
        match value {
            _ if left == 0 => 0,
            Value::Array(items) => deepest(&mut items.iter().map(|item| below(item, left - 1))),
            Value::Object(fields) => deepest(&mut fields.values().map(|field| below(field, left - 1))),
            _ => 0,
        }
    }
    below(value, DEPTH_MAX_LEVELS + 1)
}

fn check_depth(patch: &Value) -> Result<()> {
    match depth(patch) {
        levels if levels > DEPTH_MAX_LEVELS => Err(too_deep()),
        _ => Ok(()),
    }
}

fn too_deep() -> Status {
    Status::bad_request(format!("the patch makes more than {DEPTH_MAX_LEVELS} levels of lists and maps"))
}
