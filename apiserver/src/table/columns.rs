//! The columns of a kind: their definitions, and the cells of an object.

use std::borrow::Cow;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::age::since;
use super::cells::default_class;
use super::jsonpath::{JsonPath, VISITS_MAX};
use super::kinds::Kind;
use super::pod;
use crate::field::FieldError;
use crate::object::{self, Object};

/// What describes the first column.
const NAME: &str = "The name of the object, of which there is one in its namespace.";
/// What describes the column of the age.
const CREATED: &str = "When the object was made.";
/// The most bytes of a text in a cell. Longer ones are not shown.
const CELL_BYTES_MAX: usize = 64 << 10;

/// The columns of a kind.
#[derive(Clone, Debug)]
pub struct Columns {
    definitions: Vec<Definition>,
    cells: Cells,
}

#[derive(Clone, Debug)]
struct Definition {
    name: String,
    r#type: String,
    format: String,
    description: String,
    priority: i64,
}

#[derive(Clone, Debug)]
enum Cells {
    /// The name and the values at paths.
    Custom(Vec<JsonPath>),
    Core(Kind),
    /// Name and time of creation.
    Plain,
}

impl Columns {
    /// Of a custom resource, by `additionalPrinterColumns` of its version; without them the age is shown.
    ///
    /// A path that cannot be compiled ends the columns, as in Kubernetes: the definition is accepted
    /// nevertheless.
    pub fn of_custom(columns: &[Value]) -> Self {
        let mut definitions = vec![Definition::new("Name", "string", "name", NAME, 0)];
        if columns.is_empty() {
            definitions.push(Definition::new("Age", "date", "", CREATED, 0));
            let path = JsonPath::compile(".metadata.creationTimestamp");
            return Self { definitions, cells: Cells::Custom(path.into_iter().collect()) };
        }
        let mut paths = Vec::new();
        for column in columns {
            let text = |field: &str| column.get(field).and_then(Value::as_str).unwrap_or_default();
            let Ok(path) = JsonPath::compile(text("jsonPath")) else { break };
            paths.push(path);
            let description = match text("description") {
                "" => Cow::Owned(format!(
                    "Custom resource definition column (in JSONPath format): {}",
                    text("jsonPath")
                )),
                description => Cow::Borrowed(description),
            };
            let priority = column.get("priority").and_then(Value::as_i64).unwrap_or(0);
            definitions.push(Definition::new(
                text("name"),
                text("type"),
                text("format"),
                &description,
                priority,
            ));
        }
        Self { definitions, cells: Cells::Custom(paths) }
    }

    /// Of a core kind, as kubectl shows it; of any other one name and time of creation.
    pub fn of_kind(group: &str, kind: &str) -> Self {
        let mut definitions = Vec::new();
        let Some(kind) = Kind::of(group, kind) else {
            definitions.push(Definition::new("Name", "string", "name", NAME, 0));
            definitions.push(Definition::new("Created At", "date", "", CREATED, 0));
            return Self { definitions, cells: Cells::Plain };
        };
        for column in kind.columns() {
            let format = if column.name == "Name" { "name" } else { "" };
            let description = match column.name {
                "Name" => NAME,
                "Age" => CREATED,
                _ => column.description,
            };
            definitions.push(Definition::new(
                column.name,
                "string",
                format,
                description,
                i64::from(column.is_wide),
            ));
        }
        Self { definitions, cells: Cells::Core(kind) }
    }

    /// Checks `additionalPrinterColumns` of a CustomResourceDefinition, a list at the path `base`: what is
    /// wrong, with the texts of Kubernetes.
    pub fn check(columns: &[Value], base: &str) -> Vec<FieldError> {
        const TYPES: [&str; 5] = ["boolean", "date", "integer", "number", "string"];
        const FORMATS: [&str; 8] =
            ["byte", "date", "date-time", "double", "float", "int32", "int64", "password"];
        let mut errors = Vec::new();
        for (i, column) in columns.iter().enumerate() {
            let text = |field: &str| column.get(field).and_then(Value::as_str).unwrap_or_default();
            let at = |field: &str| format!("{base}[{i}].{field}");
            let one_of = |known: &[&str]| format!("must be one of {}", known.join(","));
            if text("name").is_empty() {
                errors.push(FieldError::required(at("name"), ""));
            }
            match text("type") {
                "" => errors.push(FieldError::required(at("type"), one_of(&TYPES))),
                other if TYPES.contains(&other) => {}
                other => errors.push(FieldError::invalid(at("type"), other, one_of(&TYPES))),
            }
            let format = text("format");
            if !format.is_empty() && !FORMATS.contains(&format) {
                errors.push(FieldError::invalid(at("format"), format, one_of(&FORMATS)));
            }
            match text("jsonPath") {
                "" => errors.push(FieldError::required(at("JSONPath"), "")),
                path if path.starts_with('.') => {}
                path => {
                    let text = "must be a simple json path starting with .";
                    errors.push(FieldError::invalid(at("JSONPath"), path, text));
                }
            }
        }
        errors
    }

    /// The value of `columnDefinitions`.
    pub fn definitions(&self) -> Value {
        let definitions = self.definitions.iter().map(|column| {
            json!({
                "name": column.name,
                "type": column.r#type,
                "format": column.format,
                "description": column.description,
                "priority": column.priority,
            })
        });
        definitions.collect()
    }

    /// The place in a list of the object that is marked there: the StorageClass that is the default.
    pub(super) fn marked(&self, objects: &[Object]) -> Option<usize> {
        match self.cells {
            Cells::Core(Kind::StorageClass) => default_class(objects),
            _ => None,
        }
    }

    /// What tells that a row is about something that has ended.
    pub(super) fn condition(&self, object: &Object) -> Option<Value> {
        match self.cells {
            Cells::Core(Kind::Pod) => pod::condition(object),
            _ => None,
        }
    }

    /// The cells of an object.
    pub(super) fn cells(&self, object: &Object, is_marked: bool, now: DateTime<Utc>) -> Vec<Value> {
        let name = object::name(object).unwrap_or_default();
        match &self.cells {
            Cells::Core(kind) => kind.cells(object, is_marked, now),
            Cells::Plain => {
                let created = object::text(object, &["metadata", "creationTimestamp"]).unwrap_or_default();
                vec![Value::from(name), Value::from(created)]
            }
            Cells::Custom(paths) => {
                let needs_whole = !paths.iter().all(JsonPath::begins_with_field);
                let whole = needs_whole.then(|| Value::Object(object.clone()));
                let mut visits = VISITS_MAX;
                let values = paths.iter().zip(self.definitions.iter().skip(1));
                let values = values.map(|(path, column)| {
                    let found = path.evaluate_in(object, whole.as_ref(), &mut visits);
                    found.first().map_or(Value::Null, |value| custom_cell(&column.r#type, value, now))
                });
                std::iter::once(Value::from(name)).chain(values).collect()
            }
        }
    }
}

impl Definition {
    fn new(name: &str, r#type: &str, format: &str, description: &str, priority: i64) -> Self {
        let [name, r#type, format, description] = [name, r#type, format, description].map(str::to_owned);
        Self { name, r#type, format, description, priority }
    }
}

/// The value of a custom column; `null` for what is not of the column's type.
fn custom_cell(r#type: &str, value: &Value, now: DateTime<Utc>) -> Value {
    match (r#type, value) {
        ("string", value) => shown(value).map_or(Value::Null, Value::from),
        ("integer", Value::Number(number)) => {
            // A cast of what is out of bounds saturates.
            number
                .as_i64()
                .or_else(|| number.as_f64().map(|number| number as i64))
                .map_or(Value::Null, Value::from)
        }
        ("number", Value::Number(number)) => Value::Number(number.clone()),
        ("boolean", Value::Bool(flag)) => Value::from(*flag),
        ("date", Value::String(time)) => Value::from(since(time, now)),
        _ => Value::Null,
    }
}

/// A value as text; `None` if it is too long for a cell.
fn shown(value: &Value) -> Option<String> {
    let text = match value {
        Value::Null => "<no value>".to_owned(),
        Value::Bool(flag) => flag.to_string(),
        Value::String(text) => text.clone(),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (None, None, Some(number)) => float(number),
            _ => number.to_string(),
        },
        // Kubernetes writes JSON that can stand in HTML.
        Value::Array(_) | Value::Object(_) => {
            value.to_string().replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
        }
    };
    (text.len() <= CELL_BYTES_MAX).then_some(text)
}

/// A number that is not whole, with an exponent of two digits where it is large or small, as Kubernetes
/// writes it.
fn float(number: f64) -> String {
    let scientific = format!("{number:e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else { return scientific };
    match exponent.parse::<i32>() {
        Ok(exponent @ (21.. | ..-4)) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
        }
        _ => number.to_string(),
    }
}
