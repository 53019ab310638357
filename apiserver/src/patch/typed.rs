//! Values beside their schema: which fields they have, what differs between two of them, how one is merged into another.
//!
//! | schema | how it merges |
//! | --- | --- |
//! | a scalar, an atomic list, an atomic map | as a whole: one field |
//! | any other map | key by key; keys that are not declared are fields of their own |
//! | a list that is a set, or has keys | item by item |
//! | nothing is known | maps key by key, everything else as a whole |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use serde_json::Value;

use super::fields::{Element, Ordered, Set, Slot, compare as order};
use crate::object::Object;
use crate::schema::{ListType, Node, Patch, Type};

/// The schema of one value, as far as there is one.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    node: Option<&'a Node>,
    /// It has `apiVersion`, `kind` and `metadata`, which schemas of custom resources leave out.
    is_object: bool,
}

/// How a value is divided into fields.
#[derive(Clone, Copy)]
enum Shape<'a> {
    Whole,
    Map,
    Set,
    List(&'a [String]),
}

impl<'a> View<'a> {
    /// The schema of an object with metadata.
    pub fn of(node: &'a Node) -> Self {
        Self { node: Some(node), is_object: true }
    }

    fn below(node: Option<&'a Node>) -> Self {
        Self { node, is_object: node.is_some_and(|node| node.is_embedded) }
    }

    fn shape(self, value: &Value) -> Shape<'a> {
        match (value, self.node) {
            (Value::Object(_), None) => Shape::Map,
            (Value::Object(_), Some(node))
                if !node.is_atomic && matches!(node.r#type, Type::Object | Type::Any) =>
            {
                Shape::Map
            }
            (Value::Array(_), Some(node)) => match &node.list {
                ListType::Atomic => Shape::Whole,
                ListType::Set => Shape::Set,
                ListType::Map(keys) => Shape::List(keys),
            },
            _ => Shape::Whole,
        }
    }

    /// The schema of the field `key`, and whether it is declared; `None` if there is no such field.
    fn field(self, key: &str) -> Option<(Self, bool)> {
        let declared = self.node.and_then(|node| node.properties.get(key));
        if self.is_object {
            match key {
                "metadata" if declared.is_none_or(|node| node.properties.is_empty()) => {
                    return Some((Self::below(Some(&METADATA)), true));
                }
                "apiVersion" | "kind" => return Some((Self::below(declared), true)),
                _ => {}
            }
        }
        match (declared, self.node) {
            (Some(node), _) => Some((Self::below(Some(node)), true)),
            (None, Some(node)) if node.additional.is_some() => {
                Some((Self::below(node.additional.as_deref()), false))
            }
            (None, Some(node)) if !node.preserves_unknown && !node.properties.is_empty() => None,
            _ => Some((Self::below(None), false)),
        }
    }

    /// The same, where a field that is not known is treated as one of a map without a schema.
    pub fn any_field(self, key: &str) -> (Self, bool) {
        self.field(key).unwrap_or((Self::below(None), false))
    }

    /// What a strategic merge patch does to it.
    pub fn patch(self) -> Option<&'a Patch> {
        self.node.map(|node| &node.patch)
    }

    pub fn items(self) -> Self {
        Self::below(self.node.and_then(|node| node.items.as_deref()))
    }

    /// How the item of a list is told from others.
    fn element(self, shape: Shape<'_>, item: &Value) -> Result<Element, String> {
        let Shape::List(keys) = shape else {
            return match item {
                Value::Object(_) => {
                    Err("associative list without keys has an element that's a map type".to_owned())
                }
                Value::Array(_) => Err("not supported: associative list with lists as elements".to_owned()),
                Value::Null => {
                    Err("associative list without keys has an element that's an explicit null".to_owned())
                }
                scalar => Ok(Element::Value(Ordered(scalar.clone()))),
            };
        };
        let fields = match item {
            Value::Object(fields) => fields,
            Value::Null => return Err("associative list with keys may not have a null element".to_owned()),
            _ => return Err("associative list with keys may not have non-map elements".to_owned()),
        };
        let items = self.node.and_then(|node| node.items.as_deref());
        let default = |key: &String| items?.properties.get(key)?.default.as_ref();
        let value =
            |key: &String| Some((key.clone(), Ordered(fields.get(key).or_else(|| default(key))?.clone())));
        let found: BTreeMap<String, Ordered> = keys.iter().filter_map(value).collect();
        if found.is_empty() {
            return Err(format!(
                "associative list with keys has an element that omits all key fields {keys:?} (and doesn't have default values for any key fields)"
            ));
        }
        Ok(Element::Key(found))
    }
}

/// Metadata of every object, as far as its schema says how it merges.
static METADATA: LazyLock<Node> = LazyLock::new(|| {
    let scalar = |r#type| Node { r#type, ..Node::default() };
    let texts =
        || Node { r#type: Type::Object, additional: Some(Box::new(scalar(Type::String))), ..Node::default() };
    let list = |items, list, merge_key: Option<&str>| Node {
        r#type: Type::Array,
        items: Some(Box::new(items)),
        patch: Patch {
            merges: list != ListType::Atomic,
            merge_key: merge_key.map(str::to_owned),
            retains_keys: false,
        },
        list,
        ..Node::default()
    };
    let owner = ["apiVersion", "kind", "name", "uid", "controller", "blockOwnerDeletion"];
    let owner = Node {
        r#type: Type::Object,
        properties: owner.into_iter().map(|key| (key.to_owned(), Node::default())).collect(),
        is_atomic: true,
        ..Node::default()
    };
    let fields = [
        ("annotations", texts()),
        ("creationTimestamp", scalar(Type::String)),
        ("deletionGracePeriodSeconds", scalar(Type::Integer)),
        ("deletionTimestamp", scalar(Type::String)),
        ("finalizers", list(scalar(Type::String), ListType::Set, None)),
        ("generateName", scalar(Type::String)),
        ("generation", scalar(Type::Integer)),
        ("labels", texts()),
        ("managedFields", list(Node::default(), ListType::Atomic, None)),
        ("name", scalar(Type::String)),
        ("namespace", scalar(Type::String)),
        ("ownerReferences", list(owner, ListType::Map(vec!["uid".to_owned()]), Some("uid"))),
        ("resourceVersion", scalar(Type::String)),
        ("selfLink", scalar(Type::String)),
        ("uid", scalar(Type::String)),
    ];
    let properties = fields.into_iter().map(|(key, node)| (key.to_owned(), node)).collect();
    Node { r#type: Type::Object, properties, ..Node::default() }
});

/// Failures of one object that are told at once.
const FAILURES_MAX_COUNT: usize = 20;

/// Checks that a value can be merged: its fields are known, its maps and lists are such, no item of its lists is there twice.
pub(super) fn check(view: View<'_>, object: &Object) -> Result<(), String> {
    let mut failures = Failures::default();
    failures.check_fields(view, object);
    let told: Vec<String> = failures
        .0
        .into_iter()
        .map(|(path, why)| if path.is_empty() { why } else { path + ": " + &why })
        .collect();
    match told.as_slice() {
        [] => Ok(()),
        [one] => Err(one.clone()),
        _ => Err(format!("errors:\n  {}", told.join("\n  "))),
    }
}

/// Paths and what is wrong there. A path is made on the way back from a failure: most values have none.
#[derive(Default)]
struct Failures(Vec<(String, String)>);

impl Failures {
    fn tell(&mut self, why: impl Into<String>) {
        if self.0.len() < FAILURES_MAX_COUNT {
            self.0.push((String::new(), why.into()));
        }
    }

    /// Puts the step before all paths that were found since.
    fn below(&mut self, step: impl std::fmt::Display, check: impl FnOnce(&mut Self)) {
        let before = self.0.len();
        check(self);
        for (path, _) in &mut self.0[before..] {
            *path = format!("{step}{path}");
        }
    }

    fn check(&mut self, view: View<'_>, value: &Value) {
        let wants = view.node.map_or(Type::Any, |node| node.r#type);
        match value {
            Value::Null => {}
            Value::Object(fields) if matches!(wants, Type::Object | Type::Any) => {
                self.check_fields(view, fields)
            }
            Value::Array(items) if matches!(wants, Type::Array | Type::Any) => {
                self.check_items(view, view.shape(value), items)
            }
            Value::Object(_) => self.tell("expected no map, got one"),
            Value::Array(_) => self.tell("expected no list, got one"),
            Value::String(_) | Value::Number(_) | Value::Bool(_) => match wants {
                Type::Object => self.tell("expected map, got a scalar"),
                Type::Array => self.tell("expected list, got a scalar"),
                _ => {}
            },
        }
    }

    fn check_fields(&mut self, view: View<'_>, fields: &Object) {
        for (key, value) in fields {
            let step = Element::Field(key.clone());
            match view.field(key) {
                Some((view, _)) => self.below(step, |failures| failures.check(view, value)),
                None => self.below(step, |failures| failures.tell("field not declared in schema")),
            }
        }
    }

    fn check_items(&mut self, view: View<'_>, shape: Shape<'_>, items: &[Value]) {
        let mut seen = BTreeSet::new();
        for (index, item) in items.iter().enumerate() {
            let element = match shape {
                Shape::Whole => Element::Index(i64::try_from(index).unwrap_or(i64::MAX)),
                _ => match view.element(shape, item) {
                    Ok(element) => element,
                    // Without them, nothing in the list can be told from each other.
                    Err(why) => return self.tell(format!("element {index}: {why}")),
                },
            };
            self.below(&element, |failures| failures.check(view.items(), item));
            if seen.contains(&element) {
                self.tell(format!("duplicate entries for key {element}"));
            }
            seen.insert(element);
        }
    }
}

/// The fields that an object has.
pub(super) fn fields(view: View<'_>, object: &Object) -> Set {
    slots(view, object, false)
}

/// The fields that an object has, and all maps and lists that they are in.
pub(super) fn whole(view: View<'_>, object: &Object) -> Set {
    slots(view, object, true)
}

fn slots(view: View<'_>, fields: &Object, whole: bool) -> Set {
    let mut set = Set::default();
    for (key, value) in fields {
        let (view, is_declared) = view.any_field(key);
        let mut field = slot(view, value, whole);
        field.is_member |= !is_declared || value.is_null() || value.as_object().is_some_and(Object::is_empty);
        set.put(Element::Field(key.clone()), field);
    }
    set
}

/// The fields of a value below a place, and the place itself where it is a field, or if it is wanted as a `whole`.
fn slot(view: View<'_>, value: &Value, whole: bool) -> Slot {
    match (view.shape(value), value) {
        (Shape::Map, Value::Object(fields)) => Slot { is_member: whole, below: slots(view, fields, whole) },
        (Shape::Set | Shape::List(_), Value::Array(_)) => {
            let mut below = Set::default();
            for (element, items) in by_element(view, value) {
                let item = match items.as_slice() {
                    [item] => slot(view.items(), item, whole),
                    _ => Slot::default(),
                };
                below.put(element, Slot { is_member: true, ..item });
            }
            Slot { is_member: whole, below }
        }
        _ => Slot::member(),
    }
}

/// The items of a list that merges, by what tells them apart. Items that nothing does are left out: they were there before the schema.
fn by_element<'v>(view: View<'_>, value: &'v Value) -> BTreeMap<Element, Vec<&'v Value>> {
    let mut items: BTreeMap<Element, Vec<&Value>> = BTreeMap::new();
    let shape = view.shape(value);
    for item in value.as_array().map_or(&[][..], Vec::as_slice) {
        if let Ok(element) = view.element(shape, item) {
            items.entry(element).or_default().push(item);
        }
    }
    items
}

/// What differs between two values.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub removed: Set,
    pub modified: Set,
    pub added: Set,
}

#[derive(Default)]
struct Change {
    removed: Slot,
    modified: Slot,
    added: Slot,
}

impl Change {
    fn put(&mut self, element: &Element, change: Self) {
        self.removed.below.put(element.clone(), change.removed);
        self.modified.below.put(element.clone(), change.modified);
        self.added.below.put(element.clone(), change.added);
    }
}

/// What has to be done to `old` to make it `new`. The order of items is no difference.
pub(super) fn changes(view: View<'_>, old: &Object, new: &Object) -> Changes {
    let Change { removed, modified, added } = change_fields(view, old, new);
    Changes { removed: removed.below, modified: modified.below, added: added.below }
}

fn change_fields(view: View<'_>, old: &Object, new: &Object) -> Change {
    let mut all = Change::default();
    let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    for key in keys {
        let field = change(view.any_field(key).0, old.get(key), new.get(key));
        all.put(&Element::Field(key.clone()), field);
    }
    all
}

fn change(view: View<'_>, old: Option<&Value>, new: Option<&Value>) -> Change {
    let mut all = Change::default();
    let (old, new) = match (old, new) {
        (Some(old), Some(new)) => (old, new),
        (Some(old), None) => return Change { removed: slot(view, old, true), ..all },
        (None, Some(new)) => return Change { added: slot(view, new, true), ..all },
        (None, None) => return all,
    };
    match (view.shape(old), old, view.shape(new), new) {
        (Shape::Map, Value::Object(old), Shape::Map, Value::Object(new)) => {
            return change_fields(view, old, new);
        }
        (Shape::Set | Shape::List(_), Value::Array(_), Shape::Set | Shape::List(_), Value::Array(_)) => {
            let (old, new) = (by_element(view, old), by_element(view, new));
            let elements: BTreeSet<&Element> = old.keys().chain(new.keys()).collect();
            for element in elements {
                let items = |of: &BTreeMap<_, Vec<_>>| of.get(element).cloned().unwrap_or_default();
                all.put(element, change_items(view.items(), &items(&old), &items(&new)));
            }
        }
        (old_shape, _, new_shape, _) => {
            let is_whole = |shape, value: &Value| matches!(shape, Shape::Whole) && !value.is_null();
            let is_empty = |value: &Value| slot(view, value, false).below.is_empty();
            if order(old, new).is_ne() {
                let as_a_whole =
                    is_whole(old_shape, old) || is_whole(new_shape, new) || (is_empty(old) && is_empty(new));
                all.modified.is_member = as_a_whole;
                all.removed.below = slot(view, old, true).below;
                all.added.below = slot(view, new, true).below;
            }
        }
    }
    all
}

/// The same for items that nothing tells apart: more than one of them are a field as a whole.
fn change_items(view: View<'_>, old: &[&Value], new: &[&Value]) -> Change {
    let mut all = match (old, new) {
        ([] | [_], [] | [_]) => return change(view, old.first().copied(), new.first().copied()),
        ([old], _) => change(view, Some(old), None),
        (_, [new]) => change(view, None, Some(new)),
        _ => Change::default(),
    };
    match (old.len() > 1, new.len() > 1) {
        (true, true) => {
            let is_same =
                old.len() == new.len() && old.iter().zip(new).all(|(old, new)| order(old, new).is_eq());
            all.modified.is_member = !is_same;
        }
        (true, false) => all.removed.is_member = true,
        _ => all.added.is_member = true,
    }
    all
}

/// Merges an applied object into a live one. Items of lists come in the order of the applied ones, others stay between them.
pub(super) fn merge(view: View<'_>, live: &Object, applied: &Object) -> Object {
    let mut merged = live.clone();
    for (key, applied) in applied {
        let value = match live.get(key) {
            Some(live) => merge_value(view.any_field(key).0, live, applied),
            None => applied.clone(),
        };
        merged.insert(key.clone(), value);
    }
    merged
}

fn merge_value(view: View<'_>, live: &Value, applied: &Value) -> Value {
    match (view.shape(live), live, view.shape(applied), applied) {
        (Shape::Map, Value::Object(live), Shape::Map, Value::Object(applied)) => {
            Value::Object(merge(view, live, applied))
        }
        (Shape::Set | Shape::List(_), Value::Array(live), shape, Value::Array(applied)) => {
            Value::Array(merge_items(view, shape, live, applied))
        }
        // Null is an empty map or list: there is nothing in it to merge.
        (Shape::Map, Value::Object(fields), _, Value::Null) if !fields.is_empty() => live.clone(),
        (Shape::Set | Shape::List(_), Value::Array(items), _, Value::Null) if !items.is_empty() => {
            live.clone()
        }
        _ => applied.clone(),
    }
}

fn merge_items(view: View<'_>, shape: Shape<'_>, live: &[Value], applied: &[Value]) -> Vec<Value> {
    let element = |item: &Value| view.element(shape, item).ok();
    let live: Vec<(Option<Element>, &Value)> = live.iter().map(|item| (element(item), item)).collect();
    let applied: Vec<(Option<Element>, &Value)> = applied.iter().map(|item| (element(item), item)).collect();
    let mut live_items: BTreeMap<&Element, Vec<&Value>> = BTreeMap::new();
    for (element, item) in &live {
        if let Some(element) = element {
            live_items.entry(element).or_default().push(item);
        }
    }
    let applied_elements: BTreeSet<&Element> =
        applied.iter().filter_map(|(element, _)| element.as_ref()).collect();
    let is_applied = |element: &Option<Element>| {
        element.as_ref().is_some_and(|element| applied_elements.contains(element))
    };

    let mut shared = applied
        .iter()
        .filter_map(|(element, _)| element.as_ref())
        .filter(|element| live_items.contains_key(element));
    let mut next_shared = shared.next();
    let mut rest = live.iter().peekable();
    let mut merged = Vec::with_capacity(live.len().max(applied.len()));
    for (element, item) in &applied {
        // Live items stand before the applied one that they stood before.
        while let Some((live_element, live_item)) =
            rest.next_if(|(live, _)| !is_applied(live) || live.as_ref() != next_shared)
        {
            if !is_applied(live_element) {
                merged.push((*live_item).clone());
            }
        }
        let same = element.as_ref().and_then(|element| live_items.get(element)).map(Vec::as_slice);
        merged.push(match same {
            Some([live]) => merge_value(view.items(), live, item),
            _ => (*item).clone(),
        });
        if element.is_some() && element.as_ref() == next_shared {
            rest.next_if(|(live, _)| live == element);
            next_shared = shared.next();
        }
    }
    merged.extend(rest.filter(|(element, _)| !is_applied(element)).map(|(_, item)| (*item).clone()));
    merged
}

/// Takes fields out of an object. A map or list that nothing stays in is empty.
pub(super) fn remove(view: View<'_>, object: Object, doomed: &Set) -> Object {
    let keep = |(key, value): (String, Value)| match doomed.get(&Element::Field(key.clone())) {
        Some(slot) if slot.is_member => None,
        Some(slot) => {
            let view = view.any_field(&key).0;
            Some((key, remove_value(view, value, &slot.below)))
        }
        None => Some((key, value)),
    };
    object.into_iter().filter_map(keep).collect()
}

fn remove_value(view: View<'_>, value: Value, doomed: &Set) -> Value {
    let shape = view.shape(&value);
    match (shape, value) {
        (Shape::Map, Value::Object(fields)) => Value::Object(remove(view, fields, doomed)),
        (Shape::Set | Shape::List(_), Value::Array(items)) => {
            let keep = |item: Value| match view
                .element(shape, &item)
                .ok()
                .and_then(|element| doomed.get(&element))
            {
                Some(slot) if slot.is_member => None,
                Some(slot) => Some(remove_value(view.items(), item, &slot.below)),
                None => Some(item),
            };
            Value::Array(items.into_iter().filter_map(keep).collect())
        }
        (_, value) => value,
    }
}

/// Makes members of all declared fields that something of the set is below.
pub(super) fn with_declared(view: View<'_>, set: &Set) -> Set {
    let mut all = Set::default();
    for (element, slot) in set.slots() {
        let (below, is_declared) = match element {
            Element::Field(key) => view.any_field(key),
            _ => (view.items(), false),
        };
        let is_member = slot.is_member || (is_declared && !slot.below.is_empty());
        all.put(element.clone(), Slot { is_member, below: with_declared(below, &slot.below) });
    }
    all
}

/// A set that was made by an older schema: what is atomic now is owned as a whole by whoever owned something of it.
pub(super) fn reconcile(view: View<'_>, set: &Set) -> Set {
    let mut all = Set::default();
    for (element, slot) in set.slots() {
        let below = match element {
            Element::Field(key) => view.any_field(key).0,
            _ => view.items(),
        };
        let is_atomic =
            |node: &Node| node.is_atomic || (node.r#type == Type::Array && node.list == ListType::Atomic);
        let slot = match below.node {
            Some(node) if is_atomic(node) && !slot.below.is_empty() => Slot::member(),
            _ => Slot { is_member: slot.is_member, below: reconcile(below, &slot.below) },
        };
        all.put(element.clone(), slot);
    }
    all
}
