//! Writes the table of the core kinds' fields, from the OpenAPI documents of a Kubernetes release.
//!
//! ```sh
//! cargo run -p dvcr-apiserver --example core-kinds -- KUBERNETES/api/openapi-spec/v3 >apiserver/src/kinds/core.json
//! ```
//!
//! What the table says is told where it is read: `schema/kinds.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    io::Write,
    path::Path,
};

use serde_json::{Map, Value, json};

/// The documents, and the kinds that are taken from each.
const KINDS: [(&str, &[&str]); 9] = [
    (
        "api__v1",
        &[
            "ConfigMap",
            "Event",
            "Namespace",
            "Node",
            "PersistentVolume",
            "PersistentVolumeClaim",
            "Pod",
            "ResourceQuota",
            "Secret",
            "Service",
            "ServiceAccount",
            "TokenRequest",
        ],
    ),
    ("apis__apiextensions.k8s.io__v1", &["CustomResourceDefinition"]),
    ("apis__authentication.k8s.io__v1", &["SelfSubjectReview", "TokenReview"]),
    (
        "apis__authorization.k8s.io__v1",
        &[
            "LocalSubjectAccessReview",
            "SelfSubjectAccessReview",
            "SelfSubjectRulesReview",
            "SubjectAccessReview",
        ],
    ),
    ("apis__coordination.k8s.io__v1", &["Lease"]),
    ("apis__events.k8s.io__v1", &["Event"]),
    ("apis__networking.k8s.io__v1", &["Ingress", "NetworkPolicy"]),
    ("apis__rbac.authorization.k8s.io__v1", &["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"]),
    ("apis__storage.k8s.io__v1", &["StorageClass"]),
];

/// Lists that are required, and empty as little as missing.
const REQUIRED_LISTS: [(&str, &str); 1] = [("PodSpec", "containers")];
/// What the documents call required, but the server fills in, or takes to be empty.
const NOT_REQUIRED: [(&str, &str); 2] = [("RoleRef", "apiGroup"), ("NetworkPolicySpec", "podSelector")];

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("the folder of the OpenAPI v3 documents is missing")?;
    let mut schemas = BTreeMap::new();
    let mut kinds = Map::new();
    for (document, wanted) in KINDS {
        let text = std::fs::read_to_string(Path::new(&folder).join(format!("{document}_openapi.json")))?;
        let mut document: Value = serde_json::from_str(&text)?;
        let found: BTreeMap<String, Value> =
            serde_json::from_value(document["components"]["schemas"].take())?;
        for (id, schema) in &found {
            let group_kinds = schema["x-kubernetes-group-version-kind"].as_array();
            for group_kind in group_kinds.into_iter().flatten() {
                let text = |name: &str| group_kind[name].as_str().unwrap_or_default();
                // Kinds of other groups are in the document where they are parts, or options.
                if !wanted.contains(&text("kind")) || !schema["properties"]["metadata"].is_object() {
                    continue;
                }
                let version = match text("group") {
                    "" => text("version").to_owned(),
                    group => format!("{group}/{}", text("version")),
                };
                kinds.insert(format!("{version}/{}", text("kind")), json!(id));
            }
        }
        schemas.extend(found);
    }
    let mut table = Table { schemas, names: BTreeMap::new() };
    table.name(&kinds);
    let types: Map<String, Value> =
        table.names.iter().map(|(id, name)| (name.clone(), table.object(name, &table.schemas[id]))).collect();
    let kinds: Map<String, Value> = kinds
        .into_iter()
        .map(|(kind, id)| (kind, json!(table.names[id.as_str().unwrap_or_default()])))
        .collect();
    let mut output = std::io::stdout().lock();
    writeln!(output, "{{\"kinds\":{},\"types\":{{", Value::Object(kinds))?;
    // A type a line, so that a new release is a difference that can be read.
    for (index, (name, schema)) in types.iter().enumerate() {
        let end = if index + 1 == types.len() { "" } else { "," };
        writeln!(output, "{}:{schema}{end}", json!(name))?;
    }
    writeln!(output, "}}}}")?;
    Ok(())
}

struct Table {
    schemas: BTreeMap<String, Value>,
    /// The short names of the types that the kinds have, by their long ones.
    names: BTreeMap<String, String>,
}

impl Table {
    /// Finds the types that the kinds have, and names them by the last part; where two are alike, by the group, too.
    fn name(&mut self, kinds: &Map<String, Value>) {
        let mut found = BTreeSet::new();
        let mut next: Vec<String> = kinds.values().filter_map(|id| id.as_str().map(str::to_owned)).collect();
        while let Some(id) = next.pop() {
            if scalar(&id).is_none() && found.insert(id.clone()) {
                references(&self.schemas[&id], &mut next);
            }
        }
        let last = |id: &str| id.rsplit('.').next().unwrap_or_default().to_owned();
        for id in &found {
            let is_alone = found.iter().filter(|other| last(other) == last(id)).count() == 1;
            let group = id.rsplit('.').nth(2).unwrap_or_default();
            let name = if is_alone { last(id) } else { format!("{group}.{}", last(id)) };
            self.names.insert(id.clone(), name);
        }
    }

    fn object(&self, name: &str, schema: &Value) -> Value {
        let mut output = Map::new();
        let properties = schema["properties"].as_object();
        let fields: Map<String, Value> = properties
            .into_iter()
            .flatten()
            .map(|(name, schema)| (name.clone(), self.field(schema)))
            .collect();
        let is_required = |field: &&Value| {
            let field = field.as_str().unwrap_or_default();
            let is_list = schema["properties"][field]["type"] == "array";
            let is_other = matches!(
                schema["properties"][field]["type"].as_str(),
                Some("boolean" | "integer" | "number")
            );
            REQUIRED_LISTS.contains(&(name, field))
                || !(is_list || is_other || NOT_REQUIRED.contains(&(name, field)))
        };
        let required: Vec<&Value> =
            schema["required"].as_array().into_iter().flatten().filter(is_required).collect();
        if !required.is_empty() {
            output.insert("required".to_owned(), json!(required));
        }
        if schema["x-kubernetes-map-type"] == "atomic" {
            output.insert("atomic".to_owned(), json!(true));
        }
        output.insert("fields".to_owned(), Value::Object(fields));
        Value::Object(output)
    }

    fn field(&self, schema: &Value) -> Value {
        let base = self.base(schema);
        let mut more = Map::new();
        let default = &schema["default"];
        if !(default.is_null()
            || *default == json!({})
            || *default == json!("")
            || *default == json!(0)
            || *default == json!(false))
        {
            more.insert("default".to_owned(), default.clone());
        }
        for (name, keyword) in [
            ("list", "x-kubernetes-list-type"),
            ("keys", "x-kubernetes-list-map-keys"),
            ("patch", "x-kubernetes-patch-strategy"),
            ("key", "x-kubernetes-patch-merge-key"),
            ("map", "x-kubernetes-map-type"),
        ] {
            // A list is atomic where nothing else is told.
            let is_told =
                !schema[keyword].is_null() && (name, &schema[keyword]) != ("list", &json!("atomic"));
            if is_told {
                more.insert(name.to_owned(), schema[keyword].clone());
            }
        }
        if more.is_empty() {
            return base;
        }
        more.insert("is".to_owned(), base);
        Value::Object(more)
    }

    /// The type: a word, `#` with a type of the table, `[]` with what a list has, `{}` with what a map has.
    fn base(&self, schema: &Value) -> Value {
        let reference = schema["$ref"].as_str().or_else(|| schema["allOf"][0]["$ref"].as_str());
        if let Some(reference) = reference {
            let id = reference.rsplit('/').next().unwrap_or_default();
            return match scalar(id) {
                Some(word) => json!(word),
                None => json!(format!("#{}", self.names[id])),
            };
        }
        let text = |schema: &Value| self.base(schema).as_str().unwrap_or_default().to_owned();
        match (schema["type"].as_str(), schema["format"].as_str()) {
            (Some("array"), _) => json!(format!("[]{}", text(&schema["items"]))),
            (Some("object"), _) if schema["additionalProperties"].is_object() => {
                json!(format!("{{}}{}", text(&schema["additionalProperties"])))
            }
            (Some("integer" | "string" | "number"), Some(format)) => json!(format),
            (Some("object") | None, _) => json!("any"),
            (Some(other), _) => json!(other),
        }
    }
}

/// The word for a type that has no fields of its own.
fn scalar(id: &str) -> Option<&'static str> {
    Some(match id.rsplit('.').next().unwrap_or_default() {
        "Quantity" => "quantity",
        "IntOrString" => "int-or-string",
        "Time" | "MicroTime" => "date-time",
        "FieldsV1" | "RawExtension" | "CustomResourceSubresourceStatus" | "JSON" => "any",
        "JSONSchemaPropsOrArray" | "JSONSchemaPropsOrBool" | "JSONSchemaPropsOrStringArray" => "any",
        _ => return None,
    })
}

/// The types that a schema speaks of.
fn references(schema: &Value, found: &mut Vec<String>) {
    match schema {
        Value::Object(object) => {
            if let Some(reference) = object.get("$ref").and_then(Value::as_str) {
                found.push(reference.rsplit('/').next().unwrap_or_default().to_owned());
            }
            object.values().for_each(|value| references(value, found));
        }
        Value::Array(items) => items.iter().for_each(|item| references(item, found)),
        _ => {}
    }
}
