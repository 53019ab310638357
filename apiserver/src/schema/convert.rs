//! Values as CEL sees them.

use std::{collections::HashMap, sync::Arc};

use base64::Engine;
use kube_cel::cel::{
    Value as Cel,
    objects::{Key, Map},
};
use serde_json::{Map as Object, Value};

use super::{
    ListType, Node, Type,
    format::{self, Format},
    meter::Budget,
};

/// Words of the language that no field can be called by.
const RESERVED: [&str; 21] = [
    "as",
    "break",
    "const",
    "continue",
    "else",
    "false",
    "for",
    "function",
    "if",
    "import",
    "in",
    "let",
    "loop",
    "namespace",
    "null",
    "package",
    "return",
    "true",
    "var",
    "void",
    "while",
];

/// The name of a field in an expression; `None` for one that cannot be written there.
pub fn escaped(name: &str) -> Option<String> {
    if RESERVED.contains(&name) {
        return Some(format!("__{name}__"));
    }
    let is_begin = |char: char| char.is_ascii_alphabetic() || matches!(char, '_' | '-' | '.' | '/');
    let is_part = |char: char| is_begin(char) || char.is_ascii_digit();
    if !name.starts_with(is_begin) || !name.chars().all(is_part) {
        return None;
    }
    let name = name.replace("__", "__underscores__").replace('.', "__dot__");
    Some(name.replace('-', "__dash__").replace('/', "__slash__"))
}

/// A value as its schema says it is; without a schema, as it is.
///
/// It ends with nothing where the budget does: whoever calls looks there.
pub fn to_cel(value: &Value, node: Option<&Node>, budget: &Budget) -> Cel {
    if !budget.spend(1) {
        return Cel::Null;
    }
    match value {
        Value::Null => Cel::Null,
        Value::Bool(bool) => Cel::Bool(*bool),
        Value::Number(number) => {
            let is_double = node.is_some_and(|node| node.r#type == Type::Number);
            let is_integer =
                node.is_some_and(|node| matches!(node.r#type, Type::Integer | Type::IntOrString));
            match (number.as_i64(), number.as_f64()) {
                (Some(integer), _) if !is_double => Cel::Int(integer),
                // A JSON number such as 3.0 is an integer, too; one that does not fit is cut to what does.
                (None, Some(double)) if is_integer && double.fract() == 0.0 => Cel::Int(double as i64),
                (_, Some(double)) => Cel::Float(double),
                _ => Cel::Null,
            }
        }
        Value::String(text) => string(text, node),
        Value::Array(items) => {
            let node = node.and_then(|node| node.items.as_deref());
            Cel::List(Arc::new(items.iter().map(|item| to_cel(item, node, budget)).collect()))
        }
        Value::Object(object) => Cel::Map(Map { map: Arc::new(fields(object, node, budget)) }),
    }
}

/// The old value, with the items of its sets and maps in the order of the new one: there the order means nothing, and values
/// that differ by it alone are equal.
pub fn aligned(old: &Value, new: &Value, node: &Node) -> Value {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            let value = |(name, old): (&String, &Value)| {
                let value = match (new.get(name), node.field(name)) {
                    (Some(new), Some(field)) => aligned(old, new, field),
                    _ => old.clone(),
                };
                (name.clone(), value)
            };
            Value::Object(old.iter().map(value).collect())
        }
        (Value::Array(old), Value::Array(new)) => {
            let Some(items) = &node.items else { return Value::Array(old.clone()) };
            let keys = match &node.list {
                ListType::Atomic => return Value::Array(old.clone()),
                ListType::Set => None,
                ListType::Map(keys) => Some(keys),
            };
            let key = |item: &Value| match keys {
                None => item.to_string(),
                Some(keys) => Value::Object(key_of(item, keys)).to_string(),
            };
            let places: HashMap<String, (usize, &Value)> =
                new.iter().enumerate().map(|(place, item)| (key(item), (place, item))).collect();
            let mut placed: Vec<(usize, Value)> = old
                .iter()
                .map(|old| match places.get(&key(old)) {
                    Some((place, new)) => (*place, aligned(old, new, items)),
                    None => (usize::MAX, old.clone()),
                })
                .collect();
            placed.sort_by_key(|(place, _)| *place);
            Value::Array(placed.into_iter().map(|(_, item)| item).collect())
        }
        _ => old.clone(),
    }
}

/// The fields of an item that its list knows it by.
pub fn key_of(item: &Value, keys: &[String]) -> Object<String, Value> {
    let value = |key: &String| Some((key.clone(), item.get(key)?.clone()));
    keys.iter().filter_map(value).collect()
}

fn string(text: &str, node: Option<&Node>) -> Cel {
    let format =
        node.filter(|node| node.r#type == Type::String).and_then(|node| node.checks.as_ref()?.format);
    let converted = match format {
        Some(Format::DateTime) => chrono::DateTime::parse_from_rfc3339(text).ok().map(Cel::Timestamp),
        Some(Format::Date) => {
            chrono::DateTime::parse_from_rfc3339(&format!("{text}T00:00:00Z")).ok().map(Cel::Timestamp)
        }
        Some(Format::Duration) => {
            format::duration(text).map(|nanos| Cel::Duration(chrono::Duration::nanoseconds(nanos)))
        }
        Some(Format::Byte) => base64::engine::general_purpose::STANDARD
            .decode(text)
            .ok()
            .map(|bytes| Cel::Bytes(Arc::new(bytes))),
        _ => None,
    };
    converted.unwrap_or_else(|| Cel::String(Arc::new(text.to_owned())))
}

/// A null is as if the field were not there, unless the map has keys of its own.
fn fields(object: &Object<String, Value>, node: Option<&Node>, budget: &Budget) -> HashMap<Key, Cel> {
    let mut map = HashMap::with_capacity(object.len());
    let Some(node) = node.filter(|node| !node.properties.is_empty()) else {
        let values = node.and_then(|node| node.additional.as_deref());
        for (name, value) in object {
            map.insert(Key::String(Arc::new(name.clone())), to_cel(value, values, budget));
        }
        return map;
    };
    for (name, value) in object.iter().filter(|(_, value)| !value.is_null()) {
        let field = match node.field(name) {
            Some(field) => Some(field),
            None if node.preserves_unknown => None,
            None => continue,
        };
        if let Some(escaped) = escaped(name) {
            map.insert(Key::String(Arc::new(escaped)), to_cel(value, field, budget));
        }
    }
    map
}
