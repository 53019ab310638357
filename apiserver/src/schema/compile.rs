//! From a schema as it is written to the tree that objects are walked with.
//!
//! ```text
//!  openAPIV3Schema ──> nodes ──> rules ──> defaults ──> Schema
//!                      (shape)   (CEL)     (validated by what was made before)
//! ```
//!
//! Each step begins when those before found nothing wrong. What is structural is told in
//! <https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema>.

use serde_json::{Map, Value};

use super::{
    Checks, Limit, ListType, Node, Patch, Pattern, Type, format::Format, metadata, pattern, prune, rules,
    shape, validate,
};
use crate::field::{ERRORS_COUNT_MAX, FieldError, FieldReason, Path};

/// Deepest nesting of a schema.
pub const SCHEMA_DEPTH_MAX: usize = 64;
/// Most values that a schema describes.
pub const SCHEMA_NODES_MAX: usize = 100_000;
/// Most bytes of all expressions of a schema.
const EXPRESSIONS_BYTES_MAX: usize = 256 << 10;

/// Whose schema it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A CustomResourceDefinition's: everything is checked.
    Definition,
    /// A table of ours, that has patch strategies and quantities, and no rules.
    Core,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Root,
    Item,
    Field,
}

/// Compiles a schema.
///
/// # Errors
///
/// All that is wrong with it, by paths that begin with `path`.
pub fn compile(schema: &Value, path: &str, origin: Origin) -> Result<Node, Vec<FieldError>> {
    let mut compiler =
        Compiler { path: Path::new(path), errors: Vec::new(), count: 0, expression_bytes: 0, origin };
    let mut node = compiler.node(schema, Level::Root, 0);
    if origin == Origin::Core {
        return Ok(node);
    }
    if compiler.errors.is_empty() {
        compiler.shape(schema, 0, &shape::Scope::root());
    }
    if compiler.errors.is_empty() && has_rules(schema, 0) {
        let outcome = rules::on_deep_stack(|| compiler.rules(schema, &mut node, None));
        if let Err(error) = outcome {
            compiler.push(FieldError::new(FieldReason::Internal, path, None, error.to_string()));
        }
    }
    if compiler.errors.is_empty() {
        compiler.defaults(&node);
    }
    let mut errors = compiler.errors;
    if errors.is_empty() {
        return Ok(node);
    }
    errors.sort_by_cached_key(ToString::to_string);
    errors.dedup();
    Err(errors)
}

fn has_rules(schema: &Value, depth: usize) -> bool {
    let Some(schema) = schema.as_object().filter(|_| depth <= SCHEMA_DEPTH_MAX) else { return false };
    let below = |name: &str| schema.get(name).is_some_and(|schema| has_rules(schema, depth + 1));
    schema.contains_key("x-kubernetes-validations")
        || below("items")
        || below("additionalProperties")
        || properties(schema).any(|(_, schema)| has_rules(schema, depth + 1))
}

fn properties(schema: &Map<String, Value>) -> impl Iterator<Item = (&String, &Value)> {
    schema.get("properties").and_then(Value::as_object).into_iter().flatten()
}

pub(super) struct Compiler {
    pub(super) path: Path,
    pub(super) errors: Vec<FieldError>,
    count: usize,
    /// Bytes of all expressions.
    expression_bytes: usize,
    origin: Origin,
}

impl Compiler {
    pub(super) fn push(&mut self, error: FieldError) {
        if self.errors.len() < ERRORS_COUNT_MAX && self.origin == Origin::Definition {
            self.errors.push(error);
        }
    }

    /// An error of the field `name` of the schema at hand.
    pub(super) fn refuse(&mut self, reason: FieldReason, name: &str, value: Option<Value>, detail: &str) {
        let path = if name.is_empty() { self.path.as_str().to_owned() } else { self.path.child(name) };
        self.push(FieldError::new(reason, path, value, detail));
    }

    fn node(&mut self, schema: &Value, level: Level, depth: usize) -> Node {
        self.count += 1;
        let Some(schema) = schema.as_object() else {
            self.wrong_type("", schema, "object");
            return Node::default();
        };
        if depth > SCHEMA_DEPTH_MAX || self.count > SCHEMA_NODES_MAX {
            let detail = format!(
                "a schema is nested at most {SCHEMA_DEPTH_MAX} deep, and describes at most {SCHEMA_NODES_MAX} values"
            );
            self.refuse(FieldReason::Forbidden, "", None, &detail);
            return Node::default();
        }
        let is_int_or_string = self.flag(schema, "x-kubernetes-int-or-string");
        let mut node = Node {
            r#type: self.r#type(schema, is_int_or_string),
            is_nullable: self.flag(schema, "nullable"),
            preserves_unknown: self.flag(schema, "x-kubernetes-preserve-unknown-fields"),
            is_embedded: self.flag(schema, "x-kubernetes-embedded-resource"),
            is_atomic: self.text(schema, "x-kubernetes-map-type") == "atomic",
            default: schema.get("default").filter(|default| !default.is_null()).cloned(),
            list: match self.text(schema, "x-kubernetes-list-type") {
                "set" => ListType::Set,
                "map" => ListType::Map(self.texts(schema, "x-kubernetes-list-map-keys")),
                _ => ListType::Atomic,
            },
            ..Node::default()
        };
        if self.origin == Origin::Core {
            node.patch = patch(schema);
        }
        self.children(schema, level, depth, &mut node);
        self.invariants(schema, level, &node);
        let mut checks = self.checks(schema, node.r#type);
        let place = self.path.clone();
        self.combinations(schema, &node, &place, &mut checks, depth);
        node.checks = boxed(checks);
        if self.origin == Origin::Definition && (level == Level::Root || node.is_embedded) {
            metadata::insert(&mut node);
        }
        node
    }

    fn r#type(&mut self, schema: &Map<String, Value>, is_int_or_string: bool) -> Type {
        if is_int_or_string {
            return Type::IntOrString;
        }
        match self.text(schema, "type") {
            "object" => Type::Object,
            "array" => Type::Array,
            "string" => Type::String,
            "integer" => Type::Integer,
            "number" => Type::Number,
            "boolean" => Type::Boolean,
            _ => Type::Any,
        }
    }

    fn children(&mut self, schema: &Map<String, Value>, level: Level, depth: usize, node: &mut Node) {
        match schema.get("properties") {
            None | Some(Value::Null) => {}
            Some(Value::Object(properties)) => {
                for (name, schema) in properties {
                    let length = self.path.enter_child("properties");
                    self.path.enter_key(name);
                    node.properties.insert(name.clone(), self.node(schema, Level::Field, depth + 1));
                    self.path.leave(length);
                }
            }
            Some(other) => self.wrong_type("properties", other, "object"),
        }
        match schema.get("additionalProperties") {
            None | Some(Value::Null | Value::Bool(false)) => {}
            Some(Value::Bool(true)) => node.additional = Some(Box::default()),
            Some(schema) => {
                let length = self.path.enter_child("additionalProperties");
                node.additional = Some(Box::new(self.node(schema, Level::Field, depth + 1)));
                self.path.leave(length);
            }
        }
        if level == Level::Root && schema.get("additionalProperties").is_some_and(|schema| !schema.is_null())
        {
            self.refuse(FieldReason::Forbidden, "additionalProperties", None, "must not be used at the root");
        }
        match schema.get("items") {
            None | Some(Value::Null) => {}
            Some(Value::Array(_)) => {
                let detail = "items must be a schema object and not an array";
                self.refuse(FieldReason::Forbidden, "items", None, detail);
            }
            Some(schema) => {
                let length = self.path.enter_child("items");
                node.items = Some(Box::new(self.node(schema, Level::Item, depth + 1)));
                self.path.leave(length);
            }
        }
    }

    /// What a structural schema has, and has not.
    fn invariants(&mut self, schema: &Map<String, Value>, level: Level, node: &Node) {
        use FieldReason::{Forbidden, Invalid, Required};
        let r#type = self.text(schema, "type").to_owned();
        let has_additional = schema.get("additionalProperties").is_some_and(|schema| !schema.is_null());
        if r#type == "array" && node.items.is_none() {
            self.refuse(Required, "items", None, "must be specified");
        }
        let is_int_or_string = node.r#type == Type::IntOrString;
        if is_int_or_string && node.preserves_unknown {
            let detail = "must be false if x-kubernetes-int-or-string is true";
            self.refuse(Invalid, "x-kubernetes-preserve-unknown-fields", Some(true.into()), detail);
        }
        if is_int_or_string && node.is_embedded {
            let detail = "must be false if x-kubernetes-int-or-string is true";
            self.refuse(Invalid, "x-kubernetes-embedded-resource", Some(true.into()), detail);
        }
        if node.is_embedded && r#type != "object" {
            let detail = "must be object if x-kubernetes-embedded-resource is true";
            match r#type.as_str() {
                "" => self.refuse(Required, "type", None, detail),
                other => self.refuse(Invalid, "type", Some(other.into()), detail),
            }
        } else if r#type.is_empty() && !is_int_or_string && !node.preserves_unknown {
            let detail = match level {
                Level::Root => "must not be empty at the root",
                Level::Item => "must not be empty for specified array items",
                Level::Field => "must not be empty for specified object fields",
            };
            self.refuse(Required, "type", None, detail);
        }
        if node.is_embedded && has_additional {
            let detail = "must not be used if x-kubernetes-embedded-resource is set";
            self.refuse(Forbidden, "additionalProperties", None, detail);
        }
        if level == Level::Root && !r#type.is_empty() && r#type != "object" {
            self.refuse(Invalid, "type", Some(r#type.as_str().into()), "must be object at the root");
        }
        if level == Level::Root && node.is_nullable {
            self.refuse(Forbidden, "nullable", None, "nullable cannot be true at the root");
        }
        if level == Level::Root || node.is_embedded {
            self.metadata(schema, level == Level::Root);
        }
        if node.is_embedded && !node.preserves_unknown && node.properties.is_empty() {
            let detail = "must not be empty if x-kubernetes-embedded-resource is true without x-kubernetes-preserve-unknown-fields";
            self.refuse(Required, "properties", None, detail);
        }
    }

    /// What a schema may say of `apiVersion`, `kind` and `metadata`, which every object has.
    fn metadata(&mut self, schema: &Map<String, Value>, is_root: bool) {
        for (name, wanted) in [("kind", "string"), ("apiVersion", "string"), ("metadata", "object")] {
            let Some((_, given)) = properties(schema).find(|(given, _)| *given == name) else { continue };
            let r#type = given.get("type").and_then(Value::as_str).unwrap_or_default();
            if r#type != wanted {
                let path = format!("properties[{name}].type");
                self.refuse(FieldReason::Invalid, &path, Some(r#type.into()), &format!("must be {wanted}"));
            }
            let Some(given) = given.as_object().filter(|_| is_root && name == "metadata") else { continue };
            let is_known = |(name, value): (&String, &Value)| match name.as_str() {
                "type" | "default" => true,
                "properties" => value.as_object().is_some_and(|fields| {
                    fields.keys().all(|name| matches!(name.as_str(), "name" | "generateName"))
                }),
                _ => value.is_null(),
            };
            if !given.iter().all(is_known) {
                let detail = "must not specify anything other than name and generateName, but metadata is implicitly specified";
                self.refuse(FieldReason::Forbidden, "properties[metadata]", None, detail);
            }
        }
    }

    fn checks(&mut self, schema: &Map<String, Value>, r#type: Type) -> Checks {
        let format = match self.text(schema, "format") {
            "quantity" if self.origin == Origin::Core => Some(Format::Quantity),
            name => Format::of(name, r#type),
        };
        let limit = |compiler: &mut Self, name: &str, exclusive: &str| {
            let is_exclusive = compiler.flag(schema, exclusive);
            compiler.number(schema, name).map(|value| Limit { value, is_exclusive })
        };
        Checks {
            format,
            values: self.schemas(schema, "enum").to_vec(),
            pattern: self.pattern(schema),
            minimum: limit(self, "minimum", "exclusiveMinimum"),
            maximum: limit(self, "maximum", "exclusiveMaximum"),
            multiple_of: self.number(schema, "multipleOf"),
            length_min: self.count_of(schema, "minLength"),
            length_max: self.count_of(schema, "maxLength"),
            items_min: self.count_of(schema, "minItems"),
            items_max: self.count_of(schema, "maxItems"),
            is_unique: self.flag(schema, "uniqueItems"),
            properties_min: self.count_of(schema, "minProperties"),
            properties_max: self.count_of(schema, "maxProperties"),
            required: self.texts(schema, "required"),
            ..Checks::default()
        }
    }

    fn pattern(&mut self, schema: &Map<String, Value>) -> Option<Pattern> {
        let text = self.text(schema, "pattern");
        if text.is_empty() {
            return None;
        }
        match pattern::compile(text) {
            Ok(regex) => Some(Pattern { text: text.to_owned(), regex }),
            Err(error) => {
                let detail = format!("must be a valid regular expression, but isn't: {error}");
                self.refuse(FieldReason::Invalid, "pattern", Some(text.into()), &detail);
                None
            }
        }
    }

    /// The schemas under `allOf`, `anyOf`, `oneOf` and `not`, of which the structure is `node`'s, at `place`.
    fn combinations(
        &mut self,
        schema: &Map<String, Value>,
        node: &Node,
        place: &Path,
        checks: &mut Checks,
        depth: usize,
    ) {
        for name in ["allOf", "anyOf", "oneOf"] {
            let mut nodes = Vec::new();
            for (index, schema) in self.schemas(schema, name).iter().enumerate() {
                let length = self.path.enter_child(name);
                self.path.enter_index(index);
                nodes.push(self.nested(schema, node, place, depth + 1));
                self.path.leave(length);
            }
            match name {
                "allOf" => checks.all_of = nodes,
                "anyOf" => checks.any_of = nodes,
                _ => checks.one_of = nodes,
            }
        }
        if let Some(schema) = schema.get("not").filter(|schema| !schema.is_null()) {
            let length = self.path.enter_child("not");
            checks.not = Some(Box::new(self.nested(schema, node, place, depth + 1)));
            self.path.leave(length);
        }
    }

    /// A schema that only restricts what the structure at `place` describes.
    fn nested(&mut self, schema: &Value, structure: &Node, place: &Path, depth: usize) -> Node {
        self.count += 1;
        let Some(schema) = schema.as_object() else {
            self.wrong_type("", schema, "object");
            return Node::default();
        };
        if depth > SCHEMA_DEPTH_MAX || self.count > SCHEMA_NODES_MAX {
            self.refuse(FieldReason::Forbidden, "", None, "a schema is nested too deep, or too large");
            return Node::default();
        }
        self.not_nested(schema, structure);
        let mut node = Node { r#type: self.r#type(schema, false), ..Node::default() };
        for (name, schema) in properties(schema) {
            let length = self.path.enter_child("properties");
            self.path.enter_key(name);
            match structure.properties.get(name) {
                Some(field) => {
                    let place = Path::new(&format!("{}[{name}]", place.child("properties")));
                    node.properties.insert(name.clone(), self.nested(schema, field, &place, depth + 1));
                }
                None => self.incomplete(&format!("{}[{name}]", place.child("properties"))),
            }
            self.path.leave(length);
        }
        if let Some(schema) = schema.get("items").filter(|schema| !schema.is_null()) {
            let length = self.path.enter_child("items");
            match &structure.items {
                Some(items) => {
                    let place = Path::new(&place.child("items"));
                    node.items = Some(Box::new(self.nested(schema, items, &place, depth + 1)));
                }
                None => self.incomplete(&place.child("items")),
            }
            self.path.leave(length);
        }
        // Formats, and the kind of a number, are of the structure's type.
        let mut checks = self.checks(schema, structure.r#type);
        self.combinations(schema, structure, place, &mut checks, depth);
        node.checks = boxed(checks);
        node
    }

    fn incomplete(&mut self, place: &str) {
        let detail = format!("because it is defined in {}", self.path.as_str());
        self.push(FieldError::required(place, detail));
    }

    /// Refuses what only a structure has.
    fn not_nested(&mut self, schema: &Map<String, Value>, structure: &Node) {
        let is_set = |name: &str| schema.get(name).is_some_and(|value| !is_nothing(value));
        // An integer or a string is written as the choice of its types, too.
        if is_set("type") && structure.r#type != Type::IntOrString {
            self.refuse(FieldReason::Forbidden, "type", None, "must be empty to be structural");
        }
        for (name, must) in [
            ("additionalProperties", "undefined"),
            ("default", "undefined"),
            ("title", "empty"),
            ("description", "empty"),
            ("nullable", "false"),
            ("x-kubernetes-preserve-unknown-fields", "false"),
            ("x-kubernetes-embedded-resource", "false"),
            ("x-kubernetes-int-or-string", "false"),
            ("x-kubernetes-list-map-keys", "empty"),
            ("x-kubernetes-list-type", "undefined"),
            ("x-kubernetes-map-type", "undefined"),
            ("x-kubernetes-validations", "empty"),
        ] {
            if is_set(name) {
                self.refuse(FieldReason::Forbidden, name, None, &format!("must be {must} to be structural"));
            }
        }
        if properties(schema).any(|(name, _)| name == "metadata") {
            let detail = "must not be specified in a nested context";
            self.refuse(FieldReason::Forbidden, "properties[metadata]", None, detail);
        }
    }

    /// Compiles the rules of a schema and below. `uncorrelated` is where old values cannot be found any more.
    fn rules(&mut self, schema: &Value, node: &mut Node, uncorrelated: Option<&str>) {
        let Some(schema) = schema.as_object() else { return };
        for (index, source) in self.rule_sources(schema, node) {
            let length = self.path.enter_child("x-kubernetes-validations");
            self.path.enter_index(index);
            self.expression_bytes += source.rule.len() + source.message_expression.len();
            if self.expression_bytes > EXPRESSIONS_BYTES_MAX {
                let detail =
                    format!("all expressions of a schema have at most {EXPRESSIONS_BYTES_MAX} bytes");
                self.refuse(FieldReason::Forbidden, "rule", None, &detail);
                self.path.leave(length);
                return;
            }
            match source.compile(node) {
                Ok(rule) => {
                    if let (true, Some(place)) = (rule.uses_old_self, uncorrelated) {
                        let detail = format!(
                            "oldSelf cannot be used on the uncorrelatable portion of the schema within {place}"
                        );
                        self.refuse(FieldReason::Invalid, "rule", Some(source.rule.into()), &detail);
                    } else if let (false, Some(optional)) = (rule.uses_old_self, source.optional_old_self) {
                        let detail = "may not be set if oldSelf is not used in rule";
                        self.refuse(FieldReason::Invalid, "optionalOldSelf", Some(optional.into()), detail);
                    }
                    node.rules.push(rule);
                }
                Err((name, detail)) => self.refuse(FieldReason::Invalid, name, Some(source.value()), &detail),
            }
            self.path.leave(length);
        }
        node.has_rules = !node.rules.is_empty();
        for (name, schema) in properties(schema) {
            let Some(field) = node.properties.get_mut(name) else { continue };
            let length = self.path.enter_child("properties");
            self.path.enter_key(name);
            self.rules(schema, field, uncorrelated);
            self.path.leave(length);
            node.has_rules |= field.has_rules;
        }
        if let (Some(schema), Some(field)) = (schema.get("additionalProperties"), &mut node.additional) {
            let length = self.path.enter_child("additionalProperties");
            self.rules(schema, field, uncorrelated);
            self.path.leave(length);
            node.has_rules |= field.has_rules;
        }
        if let (Some(schema), Some(items)) = (schema.get("items"), &mut node.items) {
            let here = self.path.as_str().to_owned();
            let here = match &node.list {
                ListType::Map(_) => uncorrelated,
                _ => uncorrelated.or(Some(&here)),
            };
            let length = self.path.enter_child("items");
            self.rules(schema, items, here);
            self.path.leave(length);
            node.has_rules |= items.has_rules;
        }
    }

    /// Checks that defaults are what the schema says itself.
    fn defaults(&mut self, node: &Node) {
        if let Some(default) = &node.default {
            let mut pruned = default.clone();
            prune::prune(&mut pruned, node);
            if pruned != *default {
                self.refuse(
                    FieldReason::Invalid,
                    "default",
                    Some(default.clone()),
                    "must not have unknown fields",
                );
            }
            let errors = validate::validate_at(&self.path.child("default"), default, node);
            errors.into_iter().for_each(|error| self.push(error));
        }
        for (name, field) in &node.properties {
            let length = self.path.enter_child("properties");
            self.path.enter_key(name);
            self.defaults(field);
            self.path.leave(length);
        }
        for (name, below) in [("additionalProperties", &node.additional), ("items", &node.items)] {
            let Some(below) = below else { continue };
            let length = self.path.enter_child(name);
            self.defaults(below);
            self.path.leave(length);
        }
    }
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

fn patch(schema: &Map<String, Value>) -> Patch {
    let text = |name: &str| schema.get(name).and_then(Value::as_str).unwrap_or_default();
    let strategies = text("x-kubernetes-patch-strategy");
    let merge_key = text("x-kubernetes-patch-merge-key");
    Patch {
        merges: strategies.split(',').any(|strategy| strategy == "merge"),
        merge_key: (!merge_key.is_empty()).then(|| merge_key.to_owned()),
        retains_keys: strategies.split(',').any(|strategy| strategy == "retainKeys"),
    }
}

/// Nothing for checks that check nothing.
fn boxed(checks: Checks) -> Option<Box<Checks>> {
    let Checks {
        format,
        values,
        pattern,
        minimum,
        maximum,
        multiple_of,
        length_min,
        length_max,
        items_min,
        items_max,
        is_unique,
        properties_min,
        properties_max,
        required,
        all_of,
        any_of,
        one_of,
        not,
    } = &checks;
    let is_empty = format.is_none()
        && values.is_empty()
        && pattern.is_none()
        && minimum.is_none()
        && maximum.is_none()
        && multiple_of.is_none()
        && !is_unique
        && [length_min, length_max, items_min, items_max, properties_min, properties_max]
            .iter()
            .all(|x| x.is_none())
        && required.is_empty()
        && all_of.is_empty()
        && any_of.is_empty()
        && one_of.is_empty()
        && not.is_none();
    (!is_empty).then(|| Box::new(checks))
}
