//! Keywords of a schema, read as the types that they have.

use serde_json::{Map, Number, Value};

use super::compile::Compiler;
use crate::field::FieldReason;

impl Compiler {
    pub(super) fn text<'a>(&mut self, schema: &'a Map<String, Value>, name: &str) -> &'a str {
        match schema.get(name) {
            None | Some(Value::Null) => "",
            Some(Value::String(text)) => text,
            Some(other) => {
                self.wrong_type(name, other, "string");
                ""
            }
        }
    }

    pub(super) fn flag(&mut self, schema: &Map<String, Value>, name: &str) -> bool {
        match schema.get(name) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(flag)) => *flag,
            Some(other) => {
                self.wrong_type(name, other, "boolean");
                false
            }
        }
    }

    pub(super) fn count_of(&mut self, schema: &Map<String, Value>, name: &str) -> Option<u64> {
        let value = schema.get(name).filter(|value| !value.is_null())?;
        // A negative bound is below all that there is.
        let count = value.as_u64().or_else(|| value.as_i64().map(|_| 0));
        if count.is_none() {
            self.wrong_type(name, value, "integer");
        }
        count
    }

    pub(super) fn number(&mut self, schema: &Map<String, Value>, name: &str) -> Option<Number> {
        match schema.get(name)? {
            Value::Number(number) => Some(number.clone()),
            Value::Null => None,
            other => {
                self.wrong_type(name, other, "number");
                None
            }
        }
    }

    pub(super) fn texts(&mut self, schema: &Map<String, Value>, name: &str) -> Vec<String> {
        let Some(value) = schema.get(name).filter(|value| !value.is_null()) else { return Vec::new() };
        let texts = value.as_array().map(|texts| texts.iter().map(|text| text.as_str().map(str::to_owned)));
        match texts.and_then(Iterator::collect::<Option<Vec<_>>>) {
            Some(texts) => texts,
            None => {
                self.wrong_type(name, value, "array of strings");
                Vec::new()
            }
        }
    }

    pub(super) fn schemas<'a>(&mut self, schema: &'a Map<String, Value>, name: &str) -> &'a [Value] {
        match schema.get(name) {
            None | Some(Value::Null) => &[],
            Some(Value::Array(schemas)) => schemas,
            Some(other) => {
                self.wrong_type(name, other, "array");
                &[]
            }
        }
    }

    pub(super) fn wrong_type(&mut self, name: &str, value: &Value, wanted: &str) {
        self.refuse(
            FieldReason::TypeInvalid,
            name,
            Some(value.clone()),
            &format!("must be of type {wanted}"),
        );
    }
}
