//! The schemas of the core kinds, from a table of ours.
//!
//! The table (`kinds/core.json`) is made of the OpenAPI documents of Kubernetes by `examples/core-kinds.rs`:
//!
//! | in the table | |
//! | --- | --- |
//! | `kinds` | the type of each kind, by `apiVersion/kind` |
//! | `types` | the fields of each type, which of them are required, and whether it merges as a whole |
//! | a field | a word for its type, or an object with the word (`is`) and what else is told of it |
//! | `string`, `int32`, `date-time`, `quantity`, `any`, ... | a type without fields |
//! | `#Name` | a type of the table |
//! | `[]word`, `{}word` | a list, a map |
//! | `list`, `keys`, `map` | how it is applied (`x-kubernetes-list-type` and so on) |
//! | `patch`, `key` | how a strategic patch merges it |
//!
//! Of what the documents call required, lists, numbers and booleans are left out: clients write them empty, and servers
//! take them so. Below `status` nothing is required. Defaults that are empty are none.

use std::{
    collections::BTreeMap,
    sync::{LazyLock, OnceLock},
};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Node, Schema};

static TABLE: LazyLock<Table> =
    LazyLock::new(|| match serde_json::from_str(include_str!("../kinds/core.json")) {
        Ok(table) => table,
        Err(error) => unreachable!("the table is ours, and read by a test: {error}"),
    });

/// The schemas that were asked for.
static SCHEMAS: LazyLock<BTreeMap<&str, OnceLock<Schema>>> =
    LazyLock::new(|| TABLE.kinds.keys().map(|kind| (kind.as_str(), OnceLock::new())).collect());

static METADATA: LazyLock<Schema> = LazyLock::new(|| TABLE.schema("ObjectMeta"));

/// The schema of a core kind, such as `v1`, `Pod`; `None` for a kind that is none.
pub fn core(api_version: &str, kind: &str) -> Option<&'static Schema> {
    let kind = format!("{api_version}/{kind}");
    let name = TABLE.kinds.get(&kind)?;
    Some(SCHEMAS.get(kind.as_str())?.get_or_init(|| TABLE.schema(name)))
}

/// `apiVersion` and `kind` of all core kinds, sorted.
pub fn core_kinds() -> impl Iterator<Item = (&'static str, &'static str)> {
    TABLE.kinds.keys().filter_map(|name| name.rsplit_once('/'))
}

/// The schema of `metadata`, which every object has.
pub fn metadata() -> &'static Node {
    METADATA.root()
}

#[derive(Deserialize)]
struct Table {
    kinds: BTreeMap<String, String>,
    types: BTreeMap<String, TableType>,
}

#[derive(Deserialize)]
struct TableType {
    #[serde(default)]
    required: Vec<String>,
    #[serde(default)]
    atomic: bool,
    fields: BTreeMap<String, Field>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Field {
    Word(String),
    More(More),
}

#[derive(Deserialize)]
struct More {
    is: String,
    default: Option<Value>,
    list: Option<String>,
    keys: Option<Vec<String>>,
    map: Option<String>,
    patch: Option<String>,
    key: Option<String>,
}

impl Table {
    fn schema(&self, name: &str) -> Schema {
        let mut schema = self.object(name, &mut Vec::new());
        if let Some(status) = schema.pointer_mut("/properties/status") {
            remove_required(status);
        }
        Schema::core(&schema)
    }

    /// The schema of a type; one that has itself within it is there whatever it is.
    fn object<'a>(&'a self, name: &'a str, within: &mut Vec<&'a str>) -> Value {
        let Some(found) = self.types.get(name).filter(|_| !within.contains(&name)) else {
            return self.word("any", within);
        };
        within.push(name);
        let fields: Map<String, Value> =
            found.fields.iter().map(|(name, field)| (name.clone(), self.field(field, within))).collect();
        within.pop();
        let mut schema = json!({"type": "object", "properties": fields, "required": found.required});
        if found.atomic {
            schema["x-kubernetes-map-type"] = json!("atomic");
        }
        schema
    }

    fn field<'a>(&'a self, field: &'a Field, within: &mut Vec<&'a str>) -> Value {
        let more = match field {
            Field::Word(word) => return self.word(word, within),
            Field::More(more) => more,
        };
        let mut schema = self.word(&more.is, within);
        for (keyword, value) in [
            ("default", more.default.clone()),
            ("x-kubernetes-list-type", more.list.as_ref().map(|list| json!(list))),
            ("x-kubernetes-list-map-keys", more.keys.as_ref().map(|keys| json!(keys))),
            ("x-kubernetes-map-type", more.map.as_ref().map(|map| json!(map))),
            ("x-kubernetes-patch-strategy", more.patch.as_ref().map(|patch| json!(patch))),
            ("x-kubernetes-patch-merge-key", more.key.as_ref().map(|key| json!(key))),
        ] {
            if let Some(value) = value {
                schema[keyword] = value;
            }
        }
        schema
    }

    fn word<'a>(&'a self, word: &'a str, within: &mut Vec<&'a str>) -> Value {
        if let Some(name) = word.strip_prefix('#') {
            return self.object(name, within);
        }
        if let Some(items) = word.strip_prefix("[]") {
            return json!({"type": "array", "items": self.word(items, within)});
        }
        if let Some(values) = word.strip_prefix("{}") {
            return json!({"type": "object", "additionalProperties": self.word(values, within)});
        }
        match word {
            "int32" | "int64" => json!({"type": "integer", "format": word}),
            "double" | "float" => json!({"type": "number", "format": word}),
            "int-or-string" => json!({"x-kubernetes-int-or-string": true}),
            "quantity" => json!({"format": "quantity"}),
            "any" => json!({"x-kubernetes-preserve-unknown-fields": true}),
            "string" | "boolean" | "integer" | "number" => json!({"type": word}),
            format => json!({"type": "string", "format": format}),
        }
    }
}

fn remove_required(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            if object.get("required").is_some_and(Value::is_array) {
                object.remove("required");
            }
            object.values_mut().for_each(remove_required);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_required),
        _ => {}
    }
}
