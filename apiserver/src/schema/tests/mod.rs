//! Promises of the module, one file each.

mod compile;
mod kinds;
mod object;
mod property;
mod rules;

use serde_json::Value;

use super::Schema;

/// The schema of an object that has `fields`.
#[track_caller]
fn schema(fields: Value) -> Schema {
    let schema = serde_json::json!({"type": "object", "properties": fields});
    Schema::compile(&schema).unwrap_or_else(|errors| panic!("{}", texts(&errors).join("\n")))
}

fn texts(errors: &[crate::field::FieldError]) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}
