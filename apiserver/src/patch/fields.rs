//! Sets of fields: what a manager of an object owns, as `FieldsV1` writes it (KEP-555).
//!
//! ```text
//! {"f:metadata":{"f:labels":{".":{},"f:app":{}}},          the map of labels, and one label
//!  "f:spec":{"f:ports":{"k:{\"port\":80}":{".":{}}},       an item of a list, by its key
//!            "f:finalizers":{"v:\"x\"":{}}}}               a value of a list that is a set
//! ```

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value};

/// A JSON value that has an order: numbers by what they are worth, then strings, booleans, lists, maps and null.
#[derive(Clone, Debug)]
pub(super) struct Ordered(pub Value);

impl Ord for Ordered {
    fn cmp(&self, other: &Self) -> Ordering {
        compare(&self.0, &other.0)
    }
}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Ordered {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Ordered {}

/// Orders JSON values; 1 and 1.0 are the same.
pub(super) fn compare(left: &Value, right: &Value) -> Ordering {
    let rank = |value: &Value| match value {
        Value::Number(_) => 0,
        Value::String(_) => 1,
        Value::Bool(_) => 2,
        Value::Array(_) => 3,
        Value::Object(_) => 4,
        Value::Null => 5,
    };
    match (left, right) {
        (Value::Number(left), Value::Number(right)) => {
            let integer = |n: &serde_json::Number| n.as_i64().map(i128::from).or(n.as_u64().map(i128::from));
            let float = |n: &serde_json::Number| n.as_f64().unwrap_or_default();
            match (integer(left), integer(right)) {
                (Some(left), Some(right)) => left.cmp(&right),
                (None, None) => float(left).total_cmp(&float(right)),
                // Where they round to the same, the float is an integer, and all of it counts.
                (Some(exact), None) => {
                    (exact as f64).total_cmp(&float(right)).then_with(|| exact.cmp(&(float(right) as i128)))
                }
                (None, Some(exact)) => {
                    float(left).total_cmp(&(exact as f64)).then_with(|| (float(left) as i128).cmp(&exact))
                }
            }
        }
        (Value::String(left), Value::String(right)) => left.cmp(right),
        (Value::Bool(left), Value::Bool(right)) => left.cmp(right),
        (Value::Array(left), Value::Array(right)) => {
            let items = left.iter().zip(right).map(|(left, right)| compare(left, right));
            items.fold(Ordering::Equal, Ordering::then).then(left.len().cmp(&right.len()))
        }
        (Value::Object(left), Value::Object(right)) => {
            let fields = left
                .iter()
                .zip(right)
                .map(|(left, right)| left.0.cmp(right.0).then_with(|| compare(left.1, right.1)));
            fields.fold(Ordering::Equal, Ordering::then).then(left.len().cmp(&right.len()))
        }
        _ => rank(left).cmp(&rank(right)),
    }
}

/// One step on the way to a field. The order of the variants is the one in which they are written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Element {
    /// The field of a map (`f:`).
    Field(String),
    /// The item of a list that has these values under these keys (`k:`).
    Key(BTreeMap<String, Ordered>),
    /// The item of a list that is this value (`v:`).
    Value(Ordered),
    /// The item of a list at this place (`i:`).
    Index(i64),
}

impl Element {
    /// Reads a key of `FieldsV1`. `None` is of a kind that is not known, which a later version may write.
    fn parse(text: &str) -> Result<Option<Self>, String> {
        let Some((kind, rest)) = text.split_once(':').filter(|(kind, _)| kind.len() == 1) else {
            return Err(format!("{text:?} has no kind and colon at its beginning, as in \"f:name\""));
        };
        let malformed = |why: serde_json::Error| format!("{text:?}: {why}");
        Ok(match kind {
            "f" => Some(Self::Field(rest.to_owned())),
            "k" => {
                let keys: Map<String, Value> = serde_json::from_str(rest).map_err(malformed)?;
                Some(Self::Key(keys.into_iter().map(|(key, value)| (key, Ordered(value))).collect()))
            }
            "v" => Some(Self::Value(Ordered(serde_json::from_str(rest).map_err(malformed)?))),
            "i" => Some(Self::Index(rest.parse().map_err(|_| format!("{text:?} has no number"))?)),
            _ => None,
        })
    }

    fn encode(&self) -> String {
        match self {
            Self::Field(name) => format!("f:{name}"),
            Self::Key(keys) => {
                let field = |(key, value): (&String, &Ordered)| {
                    format!("{}:{}", Value::from(key.as_str()), scalar(&value.0))
                };
                let fields: Vec<String> = keys.iter().map(field).collect();
                format!("k:{{{}}}", fields.join(","))
            }
            Self::Value(value) => format!("v:{}", scalar(&value.0)),
            Self::Index(index) => format!("i:{index}"),
        }
    }
}

/// A value as Go writes it: what HTML has a meaning for is escaped, and a float that is an integer has no point.
fn scalar(value: &Value) -> String {
    /// Beyond this not every integer is a float.
    const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
    if let Some(number) =
        value.as_f64().filter(|number| value.is_f64() && number.fract() == 0.0 && number.abs() < EXACT_MAX)
    {
        return format!("{number:.0}");
    }
    let mut text = String::new();
    for c in value.to_string().chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => text += &format!("\\u{:04x}", u32::from(c)),
            _ => text.push(c),
        }
    }
    text
}

/// The step as people read it: `.name`, `[key="value"]`, `[="value"]`, `[0]`.
impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Field(name) => write!(f, ".{name}"),
            Self::Key(keys) => {
                let keys: Vec<String> =
                    keys.iter().map(|(key, value)| format!("{key}={}", value.0)).collect();
                write!(f, "[{}]", keys.join(","))
            }
            Self::Value(value) => write!(f, "[={}]", value.0),
            Self::Index(index) => write!(f, "[{index}]"),
        }
    }
}

/// What a set has at one place: the place itself, and places below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Slot {
    pub is_member: bool,
    pub below: Set,
}

impl Slot {
    pub fn member() -> Self {
        Self { is_member: true, below: Set::default() }
    }

    pub fn is_empty(&self) -> bool {
        !self.is_member && self.below.is_empty()
    }
}

/// A set of paths to fields. No slot of it is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Set(BTreeMap<Element, Slot>);

impl Set {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn get(&self, element: &Element) -> Option<&Slot> {
        self.0.get(element)
    }

    pub fn slots(&self) -> impl Iterator<Item = (&Element, &Slot)> {
        self.0.iter()
    }

    /// Puts a slot in its place, unless there is nothing in it.
    pub fn put(&mut self, element: Element, slot: Slot) {
        if !slot.is_empty() {
            self.0.insert(element, slot);
        }
    }

    /// Adds all paths of another set.
    pub fn add(&mut self, other: Self) {
        for (element, slot) in other.0 {
            let here = self.0.entry(element).or_default();
            here.is_member |= slot.is_member;
            here.below.add(slot.below);
        }
    }

    pub fn union(&self, other: &Self) -> Self {
        let mut union = self.clone();
        union.add(other.clone());
        union
    }

    pub fn intersection(&self, other: &Self) -> Self {
        self.only(other, true)
    }

    pub fn difference(&self, other: &Self) -> Self {
        self.only(other, false)
    }

    /// The paths that the other set has, or that it does not have.
    fn only(&self, other: &Self, has: bool) -> Self {
        let nothing = Slot::default();
        let mut only = Self::default();
        for (element, slot) in &self.0 {
            let other = other.0.get(element).unwrap_or(&nothing);
            let is_member = slot.is_member && other.is_member == has;
            only.put(element.clone(), Slot { is_member, below: slot.below.only(&other.below, has) });
        }
        only
    }

    /// Number of paths.
    pub fn len(&self) -> usize {
        self.0.values().map(|slot| usize::from(slot.is_member) + slot.below.len()).sum()
    }

    /// The paths as people read them: of every map first its members, then what is below them. They end before the first that does not fit
    /// into so many bytes: a long key is in all paths below it.
    pub fn paths(&self, mut bytes_max: usize) -> Vec<String> {
        fn collect(set: &Set, before: &str, left: &mut usize, paths: &mut Vec<String>) {
            for (element, _) in set.slots().filter(|(_, slot)| slot.is_member) {
                let path = format!("{before}{element}");
                *left = left.saturating_sub(path.len());
                if *left == 0 {
                    return;
                }
                paths.push(path);
            }
            for (element, slot) in set.slots().filter(|(_, slot)| !slot.below.is_empty()) {
                if *left == 0 {
                    return;
                }
                collect(&slot.below, &format!("{before}{element}"), left, paths);
            }
        }
        let mut paths = Vec::new();
        collect(self, "", &mut bytes_max, &mut paths);
        paths
    }

    /// Reads `FieldsV1`.
    pub fn read(fields: &Value) -> Result<Self, String> {
        Ok(Self::read_slot(fields)?.below)
    }

    fn read_slot(fields: &Value) -> Result<Slot, String> {
        let empty = Map::new();
        let fields = match fields {
            Value::Object(fields) => fields,
            Value::Null => &empty,
            other => return Err(format!("fields are objects, not {other}")),
        };
        let mut slot = Slot::default();
        for (key, below) in fields {
            if key == "." {
                slot.is_member = true;
            } else if let Some(element) = Element::parse(key)? {
                slot.below.put(element, Self::read_slot(below)?);
            }
        }
        slot.is_member |= slot.below.is_empty();
        Ok(slot)
    }
}

/// Written as `FieldsV1`, in the order of Kubernetes.
impl Serialize for Set {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Body { set: self, has_itself: false }.serialize(serializer)
    }
}

struct Body<'a> {
    set: &'a Set,
    has_itself: bool,
}

impl Serialize for Body<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if self.has_itself {
            map.serialize_entry(".", &Map::new())?;
        }
        for (element, slot) in self.set.slots() {
            let has_itself = slot.is_member && !slot.below.is_empty();
            map.serialize_entry(&element.encode(), &Body { set: &slot.below, has_itself })?;
        }
        map.end()
    }
}

#[cfg(test)]
#[path = "fields_tests.rs"]
mod tests;
