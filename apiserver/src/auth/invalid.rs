//! Objects against their rules: `Status` 422, in the words of Kubernetes.

use serde_json::Value;

use super::rbac::quote;
use crate::status::{Cause, Details, Reason, Status};

/// Most fields that an answer tells of.
const CAUSES_MAX: usize = 100;

/// A field against a rule.
pub(super) fn field(path: &str, value: &Value, why: &str) -> Cause {
    let value = match value {
        Value::String(text) => quote(text),
        other => other.to_string(),
    };
    let message = format!("Invalid value: {value}: {why}");
    Cause { reason: "FieldValueInvalid".to_owned(), message, field: path.to_owned() }
}

/// A field that has to be there.
pub(super) fn required(path: &str, why: &str) -> Cause {
    let message = match why {
        "" => "Required value".to_owned(),
        why => format!("Required value: {why}"),
    };
    Cause { reason: "FieldValueRequired".to_owned(), message, field: path.to_owned() }
}

/// A field with none of the values there are.
pub(super) fn unsupported(path: &str, value: &str, known: &[&str]) -> Cause {
    let known: Vec<String> = known.iter().map(|one| quote(one)).collect();
    let message = format!("Unsupported value: {}: supported values: {}", quote(value), known.join(", "));
    Cause { reason: "FieldValueNotSupported".to_owned(), message, field: path.to_owned() }
}

/// The answer to an object with such fields.
pub(super) fn invalid(group: &str, kind: &str, name: &str, mut causes: Vec<Cause>) -> Status {
    causes.truncate(CAUSES_MAX);
    let mut whys: Vec<String> =
        causes.iter().map(|cause| format!("{}: {}", cause.field, cause.message)).collect();
    whys.dedup();
    let why = match whys.as_slice() {
        [one] => one.clone(),
        more => format!("[{}]", more.join(", ")),
    };
    let message = format!("{kind}.{group} {} is invalid: {why}", quote(name));
    let (name, group, kind) = (name.to_owned(), group.to_owned(), kind.to_owned());
    let details = Details { name, group, kind, causes, ..Details::default() };
    Status { details: Box::new(details), ..Status::new(Reason::Invalid, message) }
}
