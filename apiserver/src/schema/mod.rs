//! What fields a kind has: structural schemas, their defaults, what they prune and what they refuse.
//!
//! ```text
//!  openAPIV3Schema ─── compile ──> Schema
//!                                    │ root: Node, which apply and patch walk, too
//!                                    │
//!  object ─────> prune ────────> default ────────> validate ────────> store
//!                unknown fields   missing fields    types, checks,
//!                become warnings  and nulls         lists, rules in CEL
//! ```
//!
//! Both sides are hostile: a schema until it is compiled, an object until it is validated. Depth, size, regular expressions
//! and the cost of rules are bounded.

mod compile;
mod convert;
mod default;
mod format;
mod keywords;
mod kinds;
mod metadata;
mod meter;
mod node;
mod pattern;
mod prune;
mod rules;
mod shape;
#[cfg(test)]
mod tests;
mod types;
mod validate;

use serde_json::Value;

pub use compile::{SCHEMA_DEPTH_MAX, SCHEMA_NODES_MAX};
pub use format::{Format, is_quantity};
pub use kinds::{core, core_kinds, metadata};
pub use node::{Checks, Limit, ListType, Node, Patch, Pattern, Type};
pub use rules::{CALL_COST_MAX, OBJECT_COST_MAX, Rule};

use crate::field::{FieldError, quote};

/// The schema of a kind.
#[derive(Clone, Debug)]
pub struct Schema {
    root: Node,
}

impl Schema {
    /// Compiles `openAPIV3Schema` of a version of a CustomResourceDefinition.
    ///
    /// # Errors
    ///
    /// All that is wrong with it, by paths below `openAPIV3Schema`.
    pub fn compile(schema: &Value) -> Result<Self, Vec<FieldError>> {
        Self::compile_at("openAPIV3Schema", schema)
    }

    /// Compiles a schema that is at a path, such as `spec.versions[0].schema.openAPIV3Schema`. Errors as of [`Self::compile`].
    pub fn compile_at(path: &str, schema: &Value) -> Result<Self, Vec<FieldError>> {
        compile::compile(schema, path, compile::Origin::Definition).map(|root| Self { root })
    }

    /// Loads a schema of a core kind, which is not checked: it may have patch strategies and quantities.
    fn core(schema: &Value) -> Self {
        let root = compile::compile(schema, "", compile::Origin::Core).unwrap_or_default();
        Self { root }
    }

    /// The schema of the object.
    pub fn root(&self) -> &Node {
        &self.root
    }

    /// Removes what the schema does not know. Returns a warning for each: `unknown field "spec.foo"`.
    pub fn prune(&self, object: &mut Value) -> Vec<String> {
        let removed = prune::prune(object, &self.root);
        removed.iter().map(|path| format!("unknown field {}", quote(path))).collect()
    }

    /// Fills in what is missing, and removes nulls that may not be.
    pub fn default(&self, object: &mut Value) {
        default::fill(object, &self.root);
    }

    /// What is wrong with an object, that replaces `old` if there is one; empty if nothing is.
    ///
    /// What was invalid before and has not changed does not fail an update.
    pub fn validate(&self, new: &Value, old: Option<&Value>) -> Vec<FieldError> {
        validate::validate(new, old, &self.root)
    }
}
