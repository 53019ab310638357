//! Field selectors: comparisons of the few fields that a kind offers.

use std::borrow::Cow;
use std::collections::BTreeSet;

use serde_json::Value;

use super::meta::{Meta, find};
use super::{SELECTOR_BYTES_MAX, SELECTOR_TERMS_MAX, scalar_text};
use crate::field::{FieldError, quote};
use crate::object::Object;
use crate::schema::{Node, Type};
use crate::status::{Result, Status};

/// The most `selectableFields` of one version of a CustomResourceDefinition.
const SELECTABLE_FIELDS_MAX: usize = 8;

/// Comparisons of fields, all of which must hold. The default one selects everything.
///
/// Source: <https://kubernetes.io/docs/concepts/overview/working-with-objects/field-selectors/>.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector {
    terms: Vec<Term>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Term {
    field: Field,
    is_equal: bool,
    value: String,
}

/// The fields of one kind that a selector may name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelectableFields {
    fields: Vec<Field>,
    /// Kinds with no fields of their own answer an unknown one in another way.
    has_own: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Field {
    name: String,
    /// Where the value is; the first path at which there is one counts. Without a path it is always empty.
    paths: Vec<Vec<String>>,
    /// What the field is where it is absent.
    absent: &'static str,
}

impl Field {
    fn new(name: &str, paths: &[&str], absent: &'static str) -> Self {
        let keys = |path: &&str| path.split('.').map(str::to_owned).collect();
        Self { name: name.to_owned(), paths: paths.iter().map(keys).collect(), absent }
    }

    fn text(name: &str) -> Self {
        Self::new(name, &[name], "")
    }

    /// The first value at one of the paths that is not empty.
    fn in_text<'a>(&self, json: &'a [u8]) -> Result<Option<Cow<'a, str>>, serde_json::Error> {
        for path in &self.paths {
            let found = find(json, path)?.filter(|text| !text.is_empty());
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}

impl SelectableFields {
    /// Of a core kind, by its group and kind; `metadata.name` and `metadata.namespace` of every other one.
    pub fn of_kind(group: &str, kind: &str) -> Self {
        let names: &[&str] = match (group, kind) {
            ("", "Pod") => &[
                "spec.nodeName",
                "spec.restartPolicy",
                "spec.schedulerName",
                "spec.serviceAccountName",
                "status.phase",
                "status.nominatedNodeName",
            ],
            ("", "Secret") => &["type"],
            ("", "Namespace") => &["status.phase"],
            ("", "Service") => &["spec.clusterIP", "spec.type"],
            _ => &[],
        };
        let mut fields: Vec<_> = names.iter().copied().map(Field::text).collect();
        match (group, kind) {
            ("", "Pod") => fields.extend([
                // What clients of the first versions ask for.
                Field::new("spec.host", &["spec.nodeName"], ""),
                Field::new("spec.hostNetwork", &["spec.hostNetwork"], "false"),
                Field::new("status.podIP", &["status.podIPs.ip", "status.podIP"], ""),
                Field::new("status.podIPs", &[], ""),
            ]),
            ("" | "events.k8s.io", "Event") => fields.extend(event_fields(group)),
            ("", "Node") => fields.push(Field::new("spec.unschedulable", &["spec.unschedulable"], "false")),
            _ => {}
        }
        let has_own = !fields.is_empty();
        fields.push(Field::text("metadata.name"));
        if !matches!((group, kind), ("", "Namespace" | "Node")) {
            fields.push(Field::text("metadata.namespace"));
        }
        Self { fields, has_own }
    }

    /// Of a custom resource, by the checked paths of its `selectableFields`, such as `.spec.size`.
    pub fn of_custom(paths: &[String], is_namespaced: bool) -> Self {
        let mut fields = vec![Field::text("metadata.name")];
        if is_namespaced {
            fields.push(Field::text("metadata.namespace"));
        }
        fields.extend(paths.iter().map(|path| Field::text(path.strip_prefix('.').unwrap_or(path))));
        Self { fields, has_own: true }
    }

    /// Checks `selectableFields` of a CustomResourceDefinition, a list at the path `base`, against the schema
    /// of the kind: what is wrong, with the texts of Kubernetes.
    pub fn check(paths: &[String], schema: &Node, base: &str) -> Vec<FieldError> {
        let mut errors = Vec::new();
        let mut seen: BTreeSet<&str> = BTreeSet::new();
        for (i, path) in paths.iter().enumerate() {
            let at = format!("{base}[{i}].jsonPath");
            if path.is_empty() {
                errors.push(FieldError::required(at, ""));
                continue;
            }
            let node = match node_at(path, schema) {
                Ok(node) => node,
                Err(error) => {
                    let text = format!("is an invalid path: {error}");
                    errors.push(FieldError::invalid(at, path.as_str(), text));
                    continue;
                }
            };
            if path == ".metadata" || path.starts_with(".metadata.") {
                let text = "must not point to fields in metadata";
                errors.push(FieldError::invalid(&at, path.as_str(), text));
            }
            if !matches!(node.r#type, Type::String | Type::Boolean | Type::Integer) {
                let text = "must point to a field of type string, boolean or integer. \
                    Enum string fields and strings with formats are allowed.";
                errors.push(FieldError::invalid(&at, path.as_str(), text));
            }
            if !seen.insert(path) {
                errors.push(FieldError::duplicate(at, path.as_str()));
            }
        }
        if seen.len() > SELECTABLE_FIELDS_MAX {
            errors.push(FieldError::too_many(base, seen.len() as u64, SELECTABLE_FIELDS_MAX as u64));
        }
        errors
    }

    fn get(&self, name: &str) -> Result<&Field> {
        self.fields.iter().find(|field| field.name == name).ok_or_else(|| {
            Status::bad_request(if self.has_own {
                format!("field label not supported: {name}")
            } else {
                format!(
                    r#"{} is not a known field selector: only "metadata.name", "metadata.namespace""#,
                    quote(name)
                )
            })
        })
    }
}

/// The two groups of events name the same fields in two ways; what is kept may be of either.
fn event_fields(group: &str) -> Vec<Field> {
    const REFERENCE: [&str; 7] =
        ["kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath"];
    const REPORTERS: [&str; 2] = ["reportingComponent", "reportingController"];
    let (reference, reporter) =
        if group.is_empty() { ("involvedObject", REPORTERS[0]) } else { ("regarding", REPORTERS[1]) };
    let mut fields = vec![Field::text("reason"), Field::text("type"), Field::new(reporter, &REPORTERS, "")];
    fields.extend(REFERENCE.map(|field| {
        let paths = [format!("involvedObject.{field}"), format!("regarding.{field}")];
        Field::new(&format!("{reference}.{field}"), &[&paths[0], &paths[1]], "")
    }));
    if group.is_empty() {
        let paths = ["source.component", "deprecatedSource.component", REPORTERS[0], REPORTERS[1]];
        fields.push(Field::new("source", &paths, ""));
    }
    fields
}

fn node_at<'a>(path: &str, schema: &'a Node) -> Result<&'a Node, String> {
    let Some(keys) = path.strip_prefix('.') else {
        return Err(if path.starts_with('[') {
            "array notation is not allowed".to_owned()
        } else {
            format!("expected [ or . but got: {}", path.split(['.', '[', ']']).next().unwrap_or_default())
        });
    };
    let mut node = schema;
    for key in keys.split('.') {
        if key.is_empty() {
            return Err("unexpected end of JSON path".to_owned());
        }
        if key.contains(['[', ']']) {
            return Err("array notation is not allowed".to_owned());
        }
        let below =
            if node.properties.is_empty() { node.additional.as_deref() } else { node.properties.get(key) };
        node = below.ok_or("does not refer to a valid field")?;
    }
    Ok(node)
}

impl FieldSelector {
    /// Reads the form of a query: `metadata.name=a,status.phase!=Running`. In values `\`, `,` and `=` are
    /// written with a `\` before them. The empty text selects everything.
    ///
    /// # Errors
    ///
    /// BadRequest, with the text of Kubernetes, for what cannot be read and for a field that the kind does
    /// not offer.
    pub fn parse(selector: &str, selectable: &SelectableFields) -> Result<Self> {
        if selector.len() > SELECTOR_BYTES_MAX {
            let message = format!(
                "a field selector of {} bytes: at most {SELECTOR_BYTES_MAX} are read",
                selector.len()
            );
            return Err(Status::bad_request(message));
        }
        let mut parts = split(selector);
        parts.retain(|part| !part.is_empty());
        if parts.len() > SELECTOR_TERMS_MAX {
            let message =
                format!("a field selector of {} terms: at most {SELECTOR_TERMS_MAX} are read", parts.len());
            return Err(Status::bad_request(message));
        }
        // Of several errors the one is told that Kubernetes tells: it looks at fields after it has read all
        // of the selector, in order.
        parts.sort_unstable();
        let mut comparisons = Vec::with_capacity(parts.len());
        for part in parts {
            let (name, is_equal, value) = comparison(part).ok_or_else(|| {
                Status::bad_request(format!("invalid selector: '{selector}'; can't understand '{part}'"))
            })?;
            comparisons.push((name, is_equal, unescape(value).map_err(Status::bad_request)?));
        }
        let terms = comparisons.into_iter().map(|(name, is_equal, value)| {
            let field = selectable.get(name)?.clone();
            Ok(Term { field, is_equal, value })
        });
        let terms = terms.collect::<Result<Vec<_>>>()?;
        Ok(Self { terms })
    }

    /// Whether no field is looked at.
    pub fn is_everything(&self) -> bool {
        self.terms.is_empty()
    }

    /// The one name that objects must have to be selected, if there is such: a list of it is a read of one
    /// object.
    pub fn name(&self) -> Option<&str> {
        let term = self.terms.iter().find(|term| term.is_equal && term.field.name == "metadata.name")?;
        Some(&term.value)
    }

    /// Whether the object with this JSON text is selected.
    ///
    /// # Errors
    ///
    /// What was read before the fields were found is not JSON.
    pub fn matches(&self, json: &[u8]) -> Result<bool, serde_json::Error> {
        self.all_hold(|field| field.in_text(json))
    }

    /// As `matches`, with `metadata` of the same text that was read once for many selectors.
    ///
    /// # Errors
    ///
    /// As of `matches`.
    pub fn matches_read(&self, meta: &Meta<'_>, json: &[u8]) -> Result<bool, serde_json::Error> {
        self.all_hold(|field| match field.name.as_str() {
            "metadata.name" => Ok(Some(Cow::Borrowed(&*meta.name))),
            "metadata.namespace" => Ok(Some(Cow::Borrowed(&*meta.namespace))),
            _ => field.in_text(json),
        })
    }

    fn all_hold<'a>(
        &self,
        found: impl Fn(&Field) -> Result<Option<Cow<'a, str>>, serde_json::Error>,
    ) -> Result<bool, serde_json::Error> {
        for term in &self.terms {
            if !term.holds(found(&term.field)?) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether an object that is at hand is selected.
    pub fn matches_object(&self, object: &Object) -> bool {
        self.terms.iter().all(|term| {
            let found = term
                .field
                .paths
                .iter()
                .find_map(|path| value_at(object, path).filter(|text| !text.is_empty()));
            term.holds(found.map(Cow::Owned))
        })
    }
}

impl Term {
    fn holds(&self, found: Option<Cow<'_, str>>) -> bool {
        (found.as_deref().unwrap_or(self.field.absent) == self.value) == self.is_equal
    }
}

/// As `find` does in the text: a list on the way is entered at its first item.
fn value_at(object: &Object, path: &[String]) -> Option<String> {
    let (first, rest) = path.split_first()?;
    let mut at = object.get(first)?;
    for key in rest {
        while let Value::Array(items) = at {
            at = items.first()?;
        }
        at = at.get(key)?;
    }
    scalar_text(at)
}

/// The parts between commas that no `\` stands before.
fn split(selector: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut is_escaped) = (0, false);
    for (i, c) in selector.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            ',' => {
                parts.push(&selector[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&selector[start..]);
    parts
}

fn comparison(part: &str) -> Option<(&str, bool, &str)> {
    let at = part.find('=')?;
    if let Some(name) = part[..at].strip_suffix('!') {
        return Some((name, false, &part[at + 1..]));
    }
    let value = &part[at + 1..];
    Some((&part[..at], true, value.strip_prefix('=').unwrap_or(value)))
}

fn unescape(value: &str) -> Result<String, String> {
    let mut text = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some(c @ ('\\' | ',' | '=')) => text.push(c),
                other => {
                    let other = other.map(String::from).unwrap_or_default();
                    return Err(format!("invalid field selector: invalid escape sequence: \\{other}"));
                }
            },
            // Kubernetes writes the number of the character.
            ',' | '=' => {
                return Err(format!(
                    "invalid field selector: unescaped character in value: {}",
                    u32::from(c)
                ));
            }
            c => text.push(c),
        }
    }
    Ok(text)
}
