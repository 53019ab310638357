//! Whether an object is as its schema says.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Number, Value};

use super::{Checks, Limit, ListType, Node, Type, convert::key_of, format::Format, rules::Evaluation};
use crate::field::{ERRORS_COUNT_MAX, FieldError, FieldReason, Path, brief, quote};

const UNCHECKED: &str = "some validation rules were not checked because the object was invalid; \
                         correct the existing errors to complete validation";

const NO_QUANTITY: &str =
    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";

/// What is wrong with `new`, that replaces `old` if there is one.
///
/// What was invalid before and has not changed is not told, as long as its old place can be found: fields by their names,
/// items by the keys of their list.
pub fn validate(new: &Value, old: Option<&Value>, node: &Node) -> Vec<FieldError> {
    let mut validator = Validator { path: Path::default(), errors: Vec::new() };
    validator.value(new, old, node);
    validator.embedded(new, node, true);
    if !old.is_some_and(|old| has_list_errors(old, node)) {
        validator.lists(new, node);
    }
    let mut errors = validator.errors;
    if node.has_rules {
        if errors.iter().any(|error| is_blocking(error.reason)) {
            errors.push(FieldError::invalid("", Value::Null, UNCHECKED));
        } else {
            errors.extend(rules(new, old, node, Path::default()));
        }
    }
    errors
}

/// What is wrong with a value at a path: its checks, its lists and its rules.
pub fn validate_at(path: &str, new: &Value, node: &Node) -> Vec<FieldError> {
    let mut validator = Validator { path: Path::new(path), errors: Vec::new() };
    validator.value(new, None, node);
    validator.lists(new, node);
    let mut errors = validator.errors;
    if errors.is_empty() && node.has_rules {
        errors.extend(rules(new, Some(new), node, Path::new(path)));
        if errors.is_empty() {
            errors.extend(rules(new, None, node, Path::new(path)));
        }
    }
    errors
}

fn is_blocking(reason: FieldReason) -> bool {
    matches!(
        reason,
        FieldReason::NotSupported
            | FieldReason::Required
            | FieldReason::TooLong
            | FieldReason::TooMany
            | FieldReason::TypeInvalid
    )
}

fn has_list_errors(value: &Value, node: &Node) -> bool {
    let mut validator = Validator { path: Path::default(), errors: Vec::new() };
    validator.lists(value, node);
    !validator.errors.is_empty()
}

struct Validator {
    path: Path,
    errors: Vec<FieldError>,
}

impl Validator {
    fn push(&mut self, error: FieldError) {
        if self.errors.len() < ERRORS_COUNT_MAX {
            self.errors.push(error);
        }
    }

    fn invalid(&mut self, value: &Value, text: &str) {
        let path = self.path.as_str();
        let detail = if path.is_empty() { text.to_owned() } else { format!("{path} in body {text}") };
        self.push(FieldError::invalid(path, brief(value), detail));
    }

    fn value(&mut self, new: &Value, old: Option<&Value>, node: &Node) {
        if old == Some(new) || self.errors.len() >= ERRORS_COUNT_MAX {
            return;
        }
        if new.is_null() {
            if !(node.is_nullable || node.r#type == Type::Any) {
                self.wrong_type(node, "null");
            }
            if let Some(checks) = node.checks.as_ref().filter(|_| node.is_nullable) {
                self.known_values(new, checks);
            }
            return;
        }
        if !is_of_type(new, node.r#type) {
            return self.wrong_type(node, json_type(new));
        }
        if let Some(checks) = &node.checks {
            self.checks(new, checks, node);
        }
        match new {
            Value::Object(object) => {
                let old = old.and_then(Value::as_object);
                for (name, value) in object {
                    let Some(field) = node.field(name) else { continue };
                    let length = self.path.enter_child(name);
                    self.value(value, old.and_then(|old| old.get(name)), field);
                    self.path.leave(length);
                }
            }
            Value::Array(items) => {
                let Some(item_node) = &node.items else { return };
                let old = OldItems::new(node, old);
                for (index, item) in items.iter().enumerate() {
                    let length = self.path.enter_index(index);
                    self.value(item, old.of(item), item_node);
                    self.path.leave(length);
                }
            }
            _ => {}
        }
    }

    fn wrong_type(&mut self, node: &Node, found: &str) {
        let wanted = match node.r#type {
            Type::IntOrString => "integer,string",
            _ => super::rules::type_name(node),
        };
        let path = self.path.as_str();
        let place = if path.is_empty() { String::new() } else { format!("{path} in body ") };
        let detail = format!("{place}must be of type {wanted}: {}", quote(found));
        self.push(FieldError::new(FieldReason::TypeInvalid, path, Some(found.into()), detail));
    }

    fn checks(&mut self, value: &Value, checks: &Checks, node: &Node) {
        self.known_values(value, checks);
        if let Some(format) = checks.format.filter(|format| !format.permits(value)) {
            self.wrong_format(value, format, node);
        }
        match value {
            Value::String(text) => self.string(value, text, checks),
            Value::Number(number) => self.number(value, number, checks),
            Value::Array(items) => self.array(value, items, checks),
            Value::Object(object) => self.object(value, object, checks),
            _ => {}
        }
        self.combinations(value, checks);
    }

    fn known_values(&mut self, value: &Value, checks: &Checks) {
        if !checks.values.is_empty() && !checks.values.iter().any(|known| is_equal(known, value)) {
            let known: Vec<String> = checks.values.iter().map(plain).collect();
            self.push(FieldError::not_supported(self.path.as_str(), brief(value), &known));
        }
    }

    fn wrong_format(&mut self, value: &Value, format: Format, node: &Node) {
        let path = self.path.as_str().to_owned();
        match value {
            Value::String(text) if format == Format::Quantity => {
                self.push(FieldError::invalid(path, text.as_str(), NO_QUANTITY));
            }
            Value::String(text) => {
                let detail = format!("{path} in body must be of type {}: {}", format.name(), quote(text));
                self.push(FieldError::new(FieldReason::TypeInvalid, path, Some(brief(value)), detail));
            }
            _ => {
                let r#type = if node.r#type == Type::Integer { "integer" } else { "number" };
                let detail =
                    format!("Checked value must be of type {type} with format {} in {path}", format.name());
                // Such an error has no path of its own.
                self.push(FieldError::invalid("", "", detail));
            }
        }
    }

    fn string(&mut self, value: &Value, text: &str, checks: &Checks) {
        let length = text.chars().count() as u64;
        if let Some(max) = checks.length_max.filter(|max| length > *max) {
            self.push(FieldError::too_long(self.path.as_str(), max));
        }
        if let Some(min) = checks.length_min.filter(|min| length < *min) {
            self.invalid(value, &format!("should be at least {min} chars long"));
        }
        if let Some(pattern) = checks.pattern.as_ref().filter(|pattern| !pattern.regex.is_match(text)) {
            self.invalid(value, &format!("should match '{}'", pattern.text));
        }
    }

    fn number(&mut self, value: &Value, number: &Number, checks: &Checks) {
        if let Some(factor) = checks.multiple_of.as_ref().filter(|factor| !is_multiple(number, factor)) {
            self.invalid(value, &format!("should be a multiple of {}", shown(factor)));
        }
        if let Some(Limit { value: limit, is_exclusive }) = &checks.minimum {
            let order = compare(number, limit);
            if order.is_lt() || (*is_exclusive && order.is_eq()) {
                let words = if *is_exclusive { "greater than" } else { "greater than or equal to" };
                self.invalid(value, &format!("should be {words} {}", shown(limit)));
            }
        }
        if let Some(Limit { value: limit, is_exclusive }) = &checks.maximum {
            let order = compare(number, limit);
            if order.is_gt() || (*is_exclusive && order.is_eq()) {
                let words = if *is_exclusive { "less than" } else { "less than or equal to" };
                self.invalid(value, &format!("should be {words} {}", shown(limit)));
            }
        }
    }

    fn array(&mut self, value: &Value, items: &[Value], checks: &Checks) {
        let count = items.len() as u64;
        if let Some(min) = checks.items_min.filter(|min| count < *min) {
            let detail = format!("{} in body should have at least {min} items", self.path.as_str());
            self.push(FieldError::invalid(self.path.as_str(), count, detail));
        }
        if let Some(max) = checks.items_max.filter(|max| count > *max) {
            self.push(FieldError::too_many(self.path.as_str(), count, max));
        }
        if checks.is_unique {
            let mut seen = HashSet::new();
            if !items.iter().all(|item| seen.insert(item.to_string())) {
                self.invalid(value, "shouldn't contain duplicates");
            }
        }
    }

    fn object(&mut self, _: &Value, object: &Map<String, Value>, checks: &Checks) {
        let count = object.len() as u64;
        if let Some(min) = checks.properties_min.filter(|min| count < *min) {
            let detail = format!("{} in body should have at least {min} properties", self.path.as_str());
            self.push(FieldError::invalid(self.path.as_str(), count, detail));
        }
        if let Some(max) = checks.properties_max.filter(|max| count > *max) {
            self.push(FieldError::too_many(self.path.as_str(), count, max));
        }
        for name in checks.required.iter().filter(|name| !object.contains_key(*name)) {
            self.push(FieldError::required(self.path.child(name), ""));
        }
    }

    /// Errors of the schemas that are combined are found anew for each: they say why none fits.
    fn combinations(&mut self, value: &Value, checks: &Checks) {
        let path = quote(self.path.as_str());
        let told = |validator: &mut Self, detail: String| {
            validator.push(FieldError::invalid("", "", format!("{path} {detail}")));
        };
        if let Err(best) = self.best(value, &checks.any_of) {
            told(self, "must validate at least one schema (anyOf)".to_owned());
            self.extend(best);
        }
        if !checks.one_of.is_empty() {
            let results: Vec<_> = checks.one_of.iter().map(|node| self.errors_of(value, node)).collect();
            match results.iter().filter(|errors| errors.is_empty()).count() {
                1 => {}
                0 => {
                    told(self, "must validate one and only one schema (oneOf). Found none valid".to_owned());
                    self.extend(results.into_iter().next().unwrap_or_default());
                }
                count => {
                    told(
                        self,
                        format!(
                            "must validate one and only one schema (oneOf). Found {count} valid alternatives"
                        ),
                    );
                }
            }
        }
        if !checks.all_of.is_empty() {
            let mut valid = 0;
            for node in &checks.all_of {
                let errors = self.errors_of(value, node);
                if errors.is_empty() {
                    valid += 1;
                }
                self.extend(errors);
            }
            if valid != checks.all_of.len() {
                let none = if valid == 0 { ". None validated" } else { "" };
                told(self, format!("must validate all the schemas (allOf){none}"));
            }
        }
        if checks.not.as_ref().is_some_and(|not| self.errors_of(value, not).is_empty()) {
            told(self, "must not validate the schema (not)".to_owned());
        }
    }

    fn extend(&mut self, errors: Vec<FieldError>) {
        for error in errors {
            self.push(error);
        }
    }

    fn errors_of(&self, value: &Value, node: &Node) -> Vec<FieldError> {
        let mut inner = Validator { path: self.path.clone(), errors: Vec::new() };
        inner.value(value, None, node);
        inner.errors
    }

    /// Nothing if one of the schemas fits, or there is none; else the errors of the first.
    fn best(&self, value: &Value, nodes: &[Node]) -> Result<(), Vec<FieldError>> {
        if nodes.is_empty() {
            return Ok(());
        }
        let mut best = None;
        for node in nodes {
            let errors = self.errors_of(value, node);
            if errors.is_empty() {
                return Ok(());
            }
            best.get_or_insert(errors);
        }
        Err(best.unwrap_or_default())
    }

    /// Objects within the object say what they are.
    fn embedded(&mut self, value: &Value, node: &Node, is_root: bool) {
        match value {
            Value::Object(object) => {
                if node.is_embedded && !is_root {
                    for name in ["apiVersion", "kind"] {
                        match object.get(name) {
                            None => self.push(FieldError::required(self.path.child(name), "")),
                            Some(Value::String(text)) if text.is_empty() => {
                                self.push(FieldError::invalid(
                                    self.path.child(name),
                                    "",
                                    "must not be empty",
                                ));
                            }
                            Some(_) => {}
                        }
                    }
                }
                for (name, value) in object {
                    let Some(field) = node.field(name) else { continue };
                    let length = self.path.enter_child(name);
                    self.embedded(value, field, false);
                    self.path.leave(length);
                }
            }
            Value::Array(items) => {
                let Some(node) = &node.items else { return };
                for (index, item) in items.iter().enumerate() {
                    let length = self.path.enter_index(index);
                    self.embedded(item, node, false);
                    self.path.leave(length);
                }
            }
            _ => {}
        }
    }

    /// Items of sets, and the keys of items of maps, are there once.
    fn lists(&mut self, value: &Value, node: &Node) {
        match value {
            Value::Object(object) => {
                for (name, value) in object {
                    let length = match node.properties.contains_key(name) {
                        true => self.path.enter_child(name),
                        false => self.path.enter_key(name),
                    };
                    if let Some(field) = node.field(name) {
                        self.lists(value, field);
                    }
                    self.path.leave(length);
                }
            }
            Value::Array(items) => {
                match &node.list {
                    ListType::Atomic => {}
                    ListType::Set => self.unique(items.iter().map(Value::clone)),
                    ListType::Map(keys) => match items
                        .iter()
                        .position(|item| !(item.is_object() || item.is_null()))
                    {
                        Some(index) => {
                            let length = self.path.enter_index(index);
                            let detail = "must be an object for an array of list-type map";
                            self.push(FieldError::invalid(self.path.as_str(), brief(&items[index]), detail));
                            self.path.leave(length);
                        }
                        None => self.unique(items.iter().map(|item| Value::Object(key_of(item, keys)))),
                    },
                }
                let Some(node) = &node.items else { return };
                for (index, item) in items.iter().enumerate() {
                    let length = self.path.enter_index(index);
                    self.lists(item, node);
                    self.path.leave(length);
                }
            }
            _ => {}
        }
    }

    /// Tells what is there again, at its second place.
    fn unique(&mut self, values: impl Iterator<Item = Value>) {
        let mut seen: HashMap<String, usize> = HashMap::new();
        for (index, value) in values.enumerate() {
            let count = seen.entry(value.to_string()).or_default();
            *count += 1;
            if *count == 2 {
                let length = self.path.enter_index(index);
                self.push(FieldError::duplicate(self.path.as_str(), brief(&value)));
                self.path.leave(length);
            }
        }
    }
}

/// The items that a list had, found by the keys of those that it has.
struct OldItems<'a> {
    keys: &'a [String],
    items: HashMap<String, &'a Value>,
}

impl<'a> OldItems<'a> {
    fn new(node: &'a Node, old: Option<&'a Value>) -> Self {
        let (ListType::Map(keys), Some(Value::Array(items))) = (&node.list, old) else {
            return Self { keys: &[], items: HashMap::new() };
        };
        let items = items.iter().map(|item| (Value::Object(key_of(item, keys)).to_string(), item)).collect();
        Self { keys, items }
    }

    fn of(&self, item: &Value) -> Option<&'a Value> {
        if self.items.is_empty() {
            return None;
        }
        self.items.get(&Value::Object(key_of(item, self.keys)).to_string()).copied()
    }
}

fn rules(new: &Value, old: Option<&Value>, node: &Node, mut path: Path) -> Vec<FieldError> {
    let mut evaluation = Evaluation::new();
    walk_rules(&mut evaluation, &mut path, new, old, node);
    evaluation.errors
}

fn walk_rules(evaluation: &mut Evaluation, path: &mut Path, new: &Value, old: Option<&Value>, node: &Node) {
    if evaluation.is_over || !node.has_rules {
        return;
    }
    evaluation.rules(node, path.as_str(), new, old, old == Some(new));
    match new {
        Value::Object(object) => {
            let old = old.and_then(Value::as_object);
            for (name, value) in object {
                let Some(field) = node.field(name) else { continue };
                let length = match node.properties.contains_key(name) {
                    true => path.enter_child(name),
                    false => path.enter_key(name),
                };
                walk_rules(evaluation, path, value, old.and_then(|old| old.get(name)), field);
                path.leave(length);
            }
        }
        Value::Array(items) => {
            let Some(item_node) = &node.items else { return };
            let old = OldItems::new(node, old);
            for (index, item) in items.iter().enumerate() {
                let length = path.enter_index(index);
                walk_rules(evaluation, path, item, old.of(item), item_node);
                path.leave(length);
            }
        }
        _ => {}
    }
}

fn json_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn is_of_type(value: &Value, r#type: Type) -> bool {
    let is_integer = || match value {
        Value::Number(number) => {
            !number.is_f64() || number.as_f64().is_some_and(|number| number.fract() == 0.0)
        }
        _ => false,
    };
    match r#type {
        Type::Any => true,
        Type::Object => value.is_object(),
        Type::Array => value.is_array(),
        Type::String => value.is_string(),
        Type::Boolean => value.is_boolean(),
        Type::Number => value.is_number(),
        Type::Integer => is_integer(),
        Type::IntOrString => value.is_string() || is_integer(),
    }
}

/// Whether two values are the same; numbers are by what they are worth.
fn is_equal(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::Number(left), Value::Number(right)) => compare(left, right).is_eq(),
        (left, right) => left == right,
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        value => value.to_string(),
    }
}

/// A limit without the fraction that it does not have.
fn shown(number: &Number) -> String {
    match number.as_f64() {
        Some(double) if number.is_f64() && double.fract() == 0.0 && double.abs() < 1e15 => {
            format!("{double:.0}")
        }
        _ => number.to_string(),
    }
}

fn compare(left: &Number, right: &Number) -> std::cmp::Ordering {
    let integers = |number: &Number| number.as_i64().map(i128::from).or(number.as_u64().map(i128::from));
    match (integers(left), integers(right)) {
        (Some(left), Some(right)) => left.cmp(&right),
        _ => {
            let (left, right) = (left.as_f64().unwrap_or(f64::NAN), right.as_f64().unwrap_or(f64::NAN));
            left.partial_cmp(&right).unwrap_or(std::cmp::Ordering::Equal)
        }
    }
}

fn is_multiple(number: &Number, factor: &Number) -> bool {
    let integers = |number: &Number| number.as_i64().map(i128::from).or(number.as_u64().map(i128::from));
    match (integers(number), integers(factor)) {
        (Some(_), Some(0)) => false,
        (Some(number), Some(factor)) => number % factor == 0,
        _ => {
            let quotient = number.as_f64().unwrap_or(f64::NAN) / factor.as_f64().unwrap_or(f64::NAN);
            quotient.is_finite() && quotient.fract() == 0.0
        }
    }
}
