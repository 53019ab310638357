//! A structural schema, as a tree that others walk beside an object.

use std::collections::BTreeMap;

use regex::Regex;
use serde_json::{Number, Value};

use super::{format::Format, rules::Rule};

/// What a value may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Type {
    Object,
    Array,
    String,
    Integer,
    Number,
    Boolean,
    /// An integer or a string (`x-kubernetes-int-or-string`).
    IntOrString,
    /// Anything: no type is given.
    #[default]
    Any,
}

/// How a list merges (`x-kubernetes-list-type`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ListType {
    /// As a whole.
    #[default]
    Atomic,
    /// By its values, which are scalars.
    Set,
    /// By the values that its items have under these keys.
    Map(Vec<String>),
}

/// What a strategic merge patch does to a field (`x-kubernetes-patch-strategy`, `x-kubernetes-patch-merge-key`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patch {
    /// Items of the list are merged, by this key where there is one.
    pub merges: bool,
    pub merge_key: Option<String>,
    /// Of a map, keys that the patch does not list are removed.
    pub retains_keys: bool,
}

/// The schema of one value.
#[derive(Clone, Debug, Default)]
pub struct Node {
    pub r#type: Type,
    /// Fields of an object.
    pub properties: BTreeMap<String, Node>,
    /// Values of an object under any other key.
    pub additional: Option<Box<Node>>,
    /// Items of an array.
    pub items: Option<Box<Node>>,
    pub list: ListType,
    /// An object that merges as a whole (`x-kubernetes-map-type: atomic`).
    pub is_atomic: bool,
    pub patch: Patch,
    pub preserves_unknown: bool,
    /// An object with `apiVersion`, `kind` and `metadata` of its own.
    pub is_embedded: bool,
    pub is_nullable: bool,
    pub default: Option<Value>,
    /// What a value of the type has to fulfil; `None` if nothing.
    pub checks: Option<Box<Checks>>,
    /// Rules in CEL (`x-kubernetes-validations`).
    pub rules: Vec<Rule>,
    /// Whether there are rules here or below: what has none is not walked for them.
    pub has_rules: bool,
}

impl Node {
    /// The schema of a field of this object; `None` if it knows none of that name.
    pub fn field(&self, name: &str) -> Option<&Node> {
        self.properties.get(name).or(self.additional.as_deref())
    }
}

/// What a value has to fulfil beside its type.
#[derive(Clone, Debug, Default)]
pub struct Checks {
    pub format: Option<Format>,
    pub values: Vec<Value>,
    pub pattern: Option<Pattern>,
    pub minimum: Option<Limit>,
    pub maximum: Option<Limit>,
    pub multiple_of: Option<Number>,
    /// In characters.
    pub length_min: Option<u64>,
    pub length_max: Option<u64>,
    pub items_min: Option<u64>,
    pub items_max: Option<u64>,
    pub is_unique: bool,
    pub properties_min: Option<u64>,
    pub properties_max: Option<u64>,
    pub required: Vec<String>,
    pub all_of: Vec<Node>,
    pub any_of: Vec<Node>,
    pub one_of: Vec<Node>,
    pub not: Option<Box<Node>>,
}

/// A bound of a number.
#[derive(Clone, Debug)]
pub struct Limit {
    pub value: Number,
    pub is_exclusive: bool,
}

/// A regular expression beside its text.
#[derive(Clone, Debug)]
pub struct Pattern {
    pub text: String,
    pub regex: Regex,
}
