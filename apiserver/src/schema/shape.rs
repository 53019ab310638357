//! What a definition's schema may not say, beyond being structural.

use serde_json::{Map, Value};

use super::{
    Node,
    compile::{Compiler, SCHEMA_DEPTH_MAX},
    rules::Source,
};
use crate::field::{FieldError, FieldReason};

const TYPES: [&str; 6] = ["array", "boolean", "integer", "number", "object", "string"];

/// Keywords that no definition's schema has.
const UNSUPPORTED: [&str; 6] =
    ["$ref", "additionalItems", "definitions", "dependencies", "id", "patternProperties"];

const REASONS: [FieldReason; 4] =
    [FieldReason::Duplicate, FieldReason::Forbidden, FieldReason::Invalid, FieldReason::Required];

/// Where in a schema it is.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    is_root: bool,
    /// Within `metadata` of an object.
    is_metadata: bool,
    /// Why there may be no default.
    no_default: Option<&'a str>,
}

impl Scope<'_> {
    pub fn root() -> Self {
        Self { is_root: true, is_metadata: false, no_default: None }
    }
}

impl Compiler {
    /// Refuses keywords and combinations of them. The nesting is bounded by who came before.
    pub(super) fn shape(&mut self, schema: &Value, depth: usize, scope: &Scope<'_>) {
        let Some(schema) = schema.as_object().filter(|_| depth <= SCHEMA_DEPTH_MAX) else { return };
        self.keywords(schema, scope);
        self.list_type(schema);
        self.map_type(schema);
        self.rule_shapes(schema);
        let is_embedded = schema.get("x-kubernetes-embedded-resource") == Some(&Value::Bool(true));
        let properties = schema.get("properties").and_then(Value::as_object);
        for (name, schema) in properties.into_iter().flatten() {
            let mut below = Scope { is_root: false, ..*scope };
            if (scope.is_root || is_embedded) && matches!(name.as_str(), "apiVersion" | "kind" | "metadata") {
                below.is_metadata = true;
                if scope.is_root {
                    below.no_default = Some(match name.as_str() {
                        "apiVersion" => "in top-level apiVersion",
                        "kind" => "in top-level kind",
                        _ => "in top-level metadata",
                    });
                }
            }
            let length = self.path.enter_child("properties");
            self.path.enter_key(name);
            self.shape(schema, depth + 1, &below);
            self.path.leave(length);
        }
        if let Some(values) = schema.get("additionalProperties") {
            let mut below = Scope { is_root: false, ..*scope };
            if scope.is_metadata {
                below.no_default = Some("inside additionalProperties applying to object metadata");
            }
            self.shape_at("additionalProperties", values, depth, &below);
        }
        let below = Scope { is_root: false, ..*scope };
        for name in ["items", "not"] {
            if let Some(schema) = schema.get(name) {
                self.shape_at(name, schema, depth, &below);
            }
        }
        for name in ["allOf", "anyOf", "oneOf"] {
            let schemas = schema.get(name).and_then(Value::as_array);
            for (index, schema) in schemas.into_iter().flatten().enumerate() {
                self.shape_at(&format!("{name}[{index}]"), schema, depth, &below);
            }
        }
    }

    fn shape_at(&mut self, name: &str, schema: &Value, depth: usize, scope: &Scope<'_>) {
        let length = self.path.enter_child(name);
        self.shape(schema, depth + 1, scope);
        self.path.leave(length);
    }

    fn keywords(&mut self, schema: &Map<String, Value>, scope: &Scope<'_>) {
        use FieldReason::{Forbidden, Invalid};
        match self.text(schema, "type") {
            "null" => {
                let detail = "type cannot be set to null, use nullable as an alternative";
                self.refuse(Forbidden, "type", None, detail);
            }
            "" => {}
            name if !TYPES.contains(&name) => {
                let path = self.path.child("type");
                self.push(FieldError::not_supported(path, name, &TYPES));
            }
            _ => {}
        }
        for name in
            UNSUPPORTED.into_iter().filter(|name| schema.get(*name).is_some_and(|value| !value.is_null()))
        {
            self.refuse(Forbidden, name, None, &format!("{name} is not supported"));
        }
        let has_default = schema.get("default").is_some_and(|default| !default.is_null());
        if let (true, Some(reason)) = (has_default, scope.no_default) {
            self.refuse(Forbidden, "default", None, &format!("must not be set {reason}"));
        }
        if scope.is_metadata && schema.get("x-kubernetes-embedded-resource") == Some(&Value::Bool(true)) {
            let detail = "must not be used inside of resource meta";
            self.refuse(Forbidden, "x-kubernetes-embedded-resource", None, detail);
        }
        if schema.get("uniqueItems") == Some(&Value::Bool(true)) {
            let detail = "uniqueItems cannot be set to true since the runtime complexity becomes quadratic";
            self.refuse(Forbidden, "uniqueItems", None, detail);
        }
        let has_properties =
            schema.get("properties").and_then(Value::as_object).is_some_and(|map| !map.is_empty());
        let additional = schema.get("additionalProperties").filter(|value| !value.is_null());
        if has_properties && additional.is_some_and(|additional| *additional != Value::Bool(true)) {
            let detail = "additionalProperties and properties are mutual exclusive";
            self.refuse(Forbidden, "additionalProperties", None, detail);
        }
        if schema.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(false)) {
            let name = "x-kubernetes-preserve-unknown-fields";
            self.refuse(Invalid, name, Some(false.into()), "must be true or undefined");
        }
    }

    /// Says that a type is not the one that a keyword needs.
    fn needs_type(&mut self, schema: &Map<String, Value>, wanted: &str, why: &str) -> bool {
        let detail = format!("must be {wanted} if {why}");
        match self.text(schema, "type") {
            name if name == wanted => return true,
            "" => self.refuse(FieldReason::Required, "type", None, &detail),
            name => self.refuse(FieldReason::Invalid, "type", Some(name.into()), &detail),
        }
        false
    }

    fn map_type(&mut self, schema: &Map<String, Value>) {
        let name = self.text(schema, "x-kubernetes-map-type");
        if name.is_empty() {
            return;
        }
        self.needs_type(schema, "object", "x-kubernetes-map-type is specified");
        if !matches!(name, "atomic" | "granular") {
            let path = self.path.child("x-kubernetes-map-type");
            self.push(FieldError::not_supported(path, name, &["atomic", "granular"]));
        }
    }

    fn list_type(&mut self, schema: &Map<String, Value>) {
        use FieldReason::{Invalid, Required};
        let name = self.text(schema, "x-kubernetes-list-type").to_owned();
        let keys = self.texts(schema, "x-kubernetes-list-map-keys");
        if !name.is_empty() {
            self.needs_type(schema, "array", "x-kubernetes-list-type is specified");
            if !matches!(name.as_str(), "atomic" | "set" | "map") {
                let path = self.path.child("x-kubernetes-list-type");
                self.push(FieldError::not_supported(path, name.as_str(), &["atomic", "set", "map"]));
            }
        }
        if !keys.is_empty() && name != "map" {
            let detail = "must be map if x-kubernetes-list-map-keys is non-empty";
            match name.as_str() {
                "" => self.refuse(Required, "x-kubernetes-list-type", None, detail),
                name => self.refuse(Invalid, "x-kubernetes-list-type", Some(name.into()), detail),
            }
        }
        let items = schema.get("items").and_then(Value::as_object);
        let is_nullable = items.is_some_and(|items| items.get("nullable") == Some(&Value::Bool(true)));
        if is_nullable && matches!(name.as_str(), "set" | "map") {
            let detail = format!("cannot be nullable when x-kubernetes-list-type is {name}");
            self.refuse(FieldReason::Forbidden, "items.nullable", None, &detail);
        }
        match name.as_str() {
            "set" => self.set_items(items),
            "map" => self.map_items(items, &keys),
            _ => {}
        }
    }

    fn set_items(&mut self, items: Option<&Map<String, Value>>) {
        let Some(items) = items else { return };
        let text = |name: &str| items.get(name).and_then(Value::as_str);
        let detail = "must be atomic as item of a list with x-kubernetes-list-type=set";
        let (name, given) = match text("type") {
            Some("array") => {
                ("items.x-kubernetes-list-type", text("x-kubernetes-list-type").or(Some("atomic")))
            }
            Some("object") => ("items.x-kubernetes-map-type", text("x-kubernetes-map-type")),
            _ => return,
        };
        if given != Some("atomic") {
            self.refuse(FieldReason::Invalid, name, Some(given.map_or(Value::Null, Value::from)), detail);
        }
    }

    fn map_items(&mut self, items: Option<&Map<String, Value>>, keys: &[String]) {
        use FieldReason::{Forbidden, Invalid, Required};
        if keys.is_empty() {
            let detail = "must not be empty if x-kubernetes-list-type is map";
            self.refuse(Required, "x-kubernetes-list-map-keys", None, detail);
        }
        let Some(items) = items else {
            return self.refuse(
                Required,
                "items",
                None,
                "must have a schema if x-kubernetes-list-type is map",
            );
        };
        let r#type = items.get("type").and_then(Value::as_str).unwrap_or_default();
        if r#type != "object" {
            let detail = "must be object if parent array's x-kubernetes-list-type is map";
            return self.refuse(Invalid, "items.type", Some(r#type.into()), detail);
        }
        let properties = items.get("properties").and_then(Value::as_object);
        let required = items.get("required").and_then(Value::as_array);
        for (index, key) in keys.iter().enumerate() {
            let shown = || Some(Value::from(keys.to_vec()));
            if keys.iter().take(index).any(|before| before == key) {
                let detail = "must not contain duplicate entries";
                self.refuse(Invalid, "x-kubernetes-list-map-keys", shown(), detail);
            }
            let Some(field) = properties.and_then(|properties| properties.get(key)) else {
                let detail = "entries must all be names of item properties";
                self.refuse(Invalid, "x-kubernetes-list-map-keys", shown(), detail);
                continue;
            };
            if matches!(field.get("type").and_then(Value::as_str), Some("array" | "object")) {
                let detail = "must be a scalar type if parent array's x-kubernetes-list-type is map";
                let name = format!("items.properties[{key}].type");
                self.refuse(Invalid, &name, Some(r#type.into()), detail);
            }
            let is_required = required.is_some_and(|required| required.iter().any(|name| name == key));
            let has_default = field.get("default").is_some_and(|default| !default.is_null());
            if !is_required && !has_default {
                let detail = "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property";
                self.refuse(Required, &format!("items.properties[{key}].default"), None, detail);
            }
            if field.get("nullable") == Some(&Value::Bool(true)) {
                let detail = "this property is in x-kubernetes-list-map-keys, so it cannot be nullable";
                self.refuse(Forbidden, &format!("items.properties[{key}].nullable"), None, detail);
            }
        }
    }

    fn rule_shapes(&mut self, schema: &Map<String, Value>) {
        use FieldReason::{Invalid, Required};
        let rules = match schema.get("x-kubernetes-validations") {
            None | Some(Value::Null) => return,
            Some(Value::Array(rules)) => rules,
            Some(other) => {
                let detail = "must be of type array";
                return self.refuse(
                    FieldReason::TypeInvalid,
                    "x-kubernetes-validations",
                    Some(other.clone()),
                    detail,
                );
            }
        };
        for (index, rule) in rules.iter().enumerate() {
            let length = self.path.enter_child("x-kubernetes-validations");
            self.path.enter_index(index);
            match rule.as_object() {
                None => {
                    self.refuse(FieldReason::TypeInvalid, "", Some(rule.clone()), "must be of type object")
                }
                Some(rule) => {
                    let text = self.text(rule, "rule").trim().to_owned();
                    let given = self.text(rule, "message").to_owned();
                    let message = given.trim();
                    if text.is_empty() {
                        self.refuse(Required, "rule", None, "rule is not specified");
                    } else if !given.is_empty() && message.is_empty() {
                        let detail = "must be non-empty if specified";
                        self.refuse(Invalid, "message", Some(given.as_str().into()), detail);
                    } else if message.contains('\n') {
                        let detail = "must not contain line breaks";
                        self.refuse(Invalid, "message", Some(given.as_str().into()), detail);
                    } else if text.contains('\n') && message.is_empty() {
                        let detail = "message must be specified if rule contains line breaks";
                        self.refuse(Required, "message", None, detail);
                    }
                    let given = self.text(rule, "messageExpression");
                    if !given.is_empty() && given.trim().is_empty() {
                        let detail = "messageExpression must be non-empty if specified";
                        self.refuse(Required, "messageExpression", None, detail);
                    }
                    let given = self.text(rule, "reason");
                    if !given.is_empty() && reason(given).is_none() {
                        let path = self.path.child("reason");
                        let known = REASONS.map(FieldReason::as_str);
                        self.push(FieldError::not_supported(path, given, &known));
                    }
                    self.flag(rule, "optionalOldSelf");
                }
            }
            self.path.leave(length);
        }
    }

    /// The rules of a schema, with their places; what is wrong with their paths is told.
    pub(super) fn rule_sources(&mut self, schema: &Map<String, Value>, node: &Node) -> Vec<(usize, Source)> {
        let mut sources = Vec::new();
        let rules = schema.get("x-kubernetes-validations").and_then(Value::as_array);
        for (index, rule) in rules.into_iter().flatten().enumerate() {
            let Some(rule) = rule.as_object() else { continue };
            let given = self.text(rule, "fieldPath").to_owned();
            let field_path = match given.as_str() {
                "" => None,
                path => {
                    let found = field_path(path.trim(), node);
                    if found.is_none() {
                        let length = self.path.enter_child("x-kubernetes-validations");
                        self.path.enter_index(index);
                        let detail = match path {
                            path if path.trim().is_empty() => "must be non-empty if specified",
                            path if path.contains('\n') => "must not contain line breaks",
                            _ => "must be a valid path",
                        };
                        self.refuse(FieldReason::Invalid, "fieldPath", Some(path.into()), detail);
                        self.path.leave(length);
                    }
                    found
                }
            };
            let source = Source {
                rule: self.text(rule, "rule").to_owned(),
                message: self.text(rule, "message").to_owned(),
                message_expression: self.text(rule, "messageExpression").to_owned(),
                reason: reason(self.text(rule, "reason")),
                field_path,
                optional_old_self: rule.get("optionalOldSelf").and_then(Value::as_bool),
            };
            sources.push((index, source));
        }
        sources
    }
}

fn reason(name: &str) -> Option<FieldReason> {
    REASONS.into_iter().find(|reason| reason.as_str() == name)
}

/// A path such as `.a.b['c']` that leads to a field of the schema, as paths of errors are written.
fn field_path(text: &str, node: &Node) -> Option<String> {
    let mut path = String::new();
    let mut node = node;
    let mut rest = text;
    while !rest.is_empty() {
        let (name, after) = if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[', ']']).unwrap_or(after.len());
            (after[..end].to_owned(), &after[end..])
        } else {
            let (name, after) = rest.strip_prefix("['")?.split_once("']")?;
            (name.replace("\\'", "'").replace("\\\\", "\\"), after)
        };
        if let Some(field) = node.properties.get(&name) {
            if !path.is_empty() {
                path.push('.');
            }
            path.push_str(&name);
            node = field;
        } else {
            node = node.additional.as_deref().filter(|_| node.properties.is_empty())?;
            path.push_str(&format!("[{name}]"));
        }
        rest = after;
    }
    (!path.is_empty()).then_some(path)
}
