//! Strategic merge patch: a merge patch whose lists merge by their keys, with directives for what merging cannot say.
//!
//! | in the patch | what it does |
//! | --- | --- |
//! | `key: null` | deletes the field |
//! | `$patch: replace` in a map | the rest of the map takes the place of the one that is there |
//! | `$patch: delete` in a map | empties the map; in an item of a list that merges, deletes the items with its key |
//! | `- $patch: replace` in a list that merges | the other items take the place of those that are there |
//! | `$retainKeys: [...]` in a map | deletes the fields that are not listed |
//! | `$deleteFromPrimitiveList/key: [...]` | deletes these values of the list `key` |
//! | `$setElementOrder/key: [...]` | the order of the list `key`, of its values or of maps with its merge key |
//!
//! Items that the patch does not name stay where they are among those that it does. Documented in `strategic-merge-patch.md` of
//! Kubernetes' community pages.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::check_depth;
use super::typed::View;
use crate::object::Object;
use crate::schema::Node;
use crate::status::{Reason, Result, Status};

const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList";
const ELEMENT_ORDER: &str = "$setElementOrder";

const BAD_ORDER: &str = "invalid patch format of setElementOrder list";
const BAD_DELETION: &str = "invalid patch format of primitive list";
const BAD_RETAIN_KEYS: &str = "invalid patch format of retainKeys";

/// Applies a strategic merge patch to an object of a core kind. Fields that the schema does not know merge as maps, or replace.
///
/// # Errors
/// `BadRequest` for directives that cannot be understood and items without their merge key, `Invalid` for lists in lists that merge.
pub fn strategic(node: &Node, current: &Object, patch: &Object) -> Result<Object> {
    patch.values().try_for_each(check_depth)?;
    merge_map(View::of(node), current.clone(), patch)
}

fn merge_map(view: View<'_>, mut current: Object, patch: &Object) -> Result<Object> {
    match patch.get(DIRECTIVE) {
        None => {}
        Some(Value::String(directive)) if directive == "replace" => return Ok(clean_map(patch)),
        Some(Value::String(directive)) if directive == "delete" => return Ok(Map::new()),
        Some(other) => return Err(unknown_directive(other, patch)),
    }
    if let Some(keys) = patch.get(RETAIN_KEYS) {
        retain_keys(&mut current, patch, keys)?;
    }
    let mut ordered = BTreeSet::new();
    for (directive, order) in patch {
        let Some(key) = key_of(directive, ELEMENT_ORDER, BAD_ORDER)? else { continue };
        let order = order.as_array().ok_or_else(|| Status::bad_request(BAD_ORDER))?;
        set_order(view.any_field(key).0, &mut current, key, patch.get(key), order)?;
        ordered.insert(key);
    }
    for (key, value) in patch {
        if let Some(key) = key_of(key, DELETE_FROM, BAD_DELETION)? {
            let doomed = value.as_array().ok_or_else(|| Status::bad_request(BAD_DELETION))?;
            if let Some(Value::Array(items)) = current.get_mut(key) {
                let doomed: BTreeSet<String> = doomed.iter().map(Value::to_string).collect();
                items.retain(|item| !doomed.contains(&item.to_string()));
            }
            continue;
        }
        if is_directive(key) || ordered.contains(key.as_str()) {
            continue;
        }
        let view = view.any_field(key).0;
        let merged = match (current.remove(key), value) {
            (_, Value::Null) => None,
            (Some(Value::Object(current)), Value::Object(patch)) => {
                Some(Value::Object(merge_map(view, current, patch)?))
            }
            (Some(Value::Array(current)), Value::Array(patch)) => {
                Some(Value::Array(merge_list(view, current, patch)?))
            }
            (_, value) => clean(value),
        };
        if let Some(merged) = merged {
            current.insert(key.clone(), merged);
        }
    }
    Ok(current)
}

/// The key in `<directive>/<key>`, if this is that directive.
fn key_of<'a>(name: &'a str, directive: &str, malformed: &str) -> Result<Option<&'a str>> {
    match name.strip_prefix(directive) {
        None => Ok(None),
        Some(rest) => rest.strip_prefix('/').map(Some).ok_or_else(|| Status::bad_request(malformed)),
    }
}

fn is_directive(key: &str) -> bool {
    key == DIRECTIVE || key == RETAIN_KEYS || key.starts_with(DELETE_FROM) || key.starts_with(ELEMENT_ORDER)
}

fn retain_keys(current: &mut Object, patch: &Object, keys: &Value) -> Result<()> {
    let malformed = || Status::bad_request(BAD_RETAIN_KEYS);
    let keys = keys.as_array().ok_or_else(malformed)?;
    let keys: BTreeSet<&str> = keys.iter().filter_map(Value::as_str).collect();
    let mut set = patch.iter().filter(|(key, value)| !value.is_null() && !is_directive(key));
    if set.any(|(key, _)| !keys.contains(key.as_str())) {
        return Err(malformed());
    }
    current.retain(|key, _| keys.contains(key.as_str()));
    Ok(())
}

/// How the items of a list are told from each other: by the value of a key, or by what they are.
fn identity(item: &Value, key: Option<&str>) -> Result<String> {
    let Some(key) = key else { return Ok(item.to_string()) };
    let map = item.as_object().ok_or_else(|| Status::bad_request("expected a map, but received none"))?;
    let value = map.get(key);
    let missing =
        || Status::bad_request(format!("map: {} does not contain declared merge key: {key}", keys_of(map)));
    value.map(Value::to_string).ok_or_else(missing)
}

/// The place of every item; of equal ones, the first.
fn places(items: &[Value], key: Option<&str>) -> Result<BTreeMap<String, usize>> {
    let mut places = BTreeMap::new();
    for (index, item) in items.iter().enumerate() {
        places.entry(identity(item, key)?).or_insert(index);
    }
    Ok(places)
}

fn merge_list(view: View<'_>, current: Vec<Value>, patch: &[Value]) -> Result<Vec<Value>> {
    let Some(strategy) = view.patch().filter(|patch| patch.merges) else {
        return Ok(patch.iter().filter_map(clean).collect());
    };
    if current.is_empty() && patch.is_empty() {
        return Ok(current);
    }
    if !are_maps(&current, patch)? {
        let mut merged = current.clone();
        merged.extend_from_slice(patch);
        let mut seen = BTreeSet::new();
        merged.retain(|item| seen.insert(item.to_string()));
        return arrange(merged, patch, &current, None);
    }
    let Some(key) = strategy.merge_key.as_deref() else {
        return Err(Status::bad_request("cannot merge lists without merge key"));
    };

    let mut doomed = BTreeSet::new();
    let mut items = Vec::new();
    let mut replaces = false;
    for item in patch {
        let Value::Object(map) = item else { continue };
        match map.get(DIRECTIVE) {
            None => items.push(item.clone()),
            Some(Value::String(directive)) if directive == "delete" => {
                doomed.insert(identity(item, Some(key))?);
            }
            Some(Value::String(directive)) if directive == "replace" => replaces = true,
            Some(Value::String(directive)) if directive == "merge" => {
                return Err(Status::bad_request("merging lists cannot yet be specified in the patch"));
            }
            Some(other) => return Err(unknown_directive(other, map)),
        }
    }
    if replaces {
        return Ok(items.iter().filter_map(clean).collect());
    }
    let mut merged = Vec::with_capacity(current.len() + items.len());
    for item in current {
        if !doomed.contains(&identity(&item, Some(key))?) {
            merged.push(item);
        }
    }
    let server = merged.clone();
    let mut places = places(&merged, Some(key))?;
    for item in &items {
        let identity = identity(item, Some(key))?;
        match (places.get(&identity), item) {
            (Some(&place), Value::Object(patch)) => {
                if let Value::Object(current) = merged[place].take() {
                    merged[place] = Value::Object(merge_map(view.items(), current, patch)?);
                }
            }
            _ => {
                places.insert(identity, merged.len());
                merged.extend(clean(item));
            }
        }
    }
    arrange(merged, &items, &server, Some(key))
}

/// Whether the items that shall merge are maps; they are all of one type.
fn are_maps(current: &[Value], patch: &[Value]) -> Result<bool> {
    let type_of = |item: &Value| match item {
        Value::Object(_) => "map",
        Value::Array(_) => "list",
        Value::String(_) => "string",
        Value::Number(_) => "number",
        Value::Bool(_) => "boolean",
        Value::Null => "null",
    };
    let mut types = current.iter().chain(patch).map(type_of);
    let first = types.next().unwrap_or("string");
    if first == "list" {
        return Err(Status::new(Reason::Invalid, "lists of lists are not supported"));
    }
    match types.find(|other| *other != first) {
        None => Ok(first == "map"),
        Some(other) => {
            Err(Status::bad_request(format!("list element types are not identical: {first} and {other}")))
        }
    }
}

/// Puts the items in the order of `order`, those that it does not have between them as they are on the server: whatever stood before an
/// item of the order, stands before it.
fn arrange(items: Vec<Value>, order: &[Value], server: &[Value], key: Option<&str>) -> Result<Vec<Value>> {
    let (order, server) = (places(order, key)?, places(server, key)?);
    let mut named = Vec::new();
    let mut others = Vec::new();
    for item in items {
        let identity = identity(&item, key)?;
        let on_server = server.get(&identity).copied();
        match order.get(&identity) {
            Some(&place) => named.push((place, on_server, item)),
            None => others.push((on_server, item)),
        }
    }
    named.sort_by_key(|(place, ..)| *place);
    others.sort_by_key(|(on_server, _)| *on_server);
    let mut arranged = Vec::with_capacity(named.len() + others.len());
    let mut others = others.into_iter().peekable();
    for (_, on_server, item) in named {
        let is_before =
            |other: &(Option<usize>, Value)| other.0.is_some() && on_server.is_some() && other.0 < on_server;
        while let Some((_, other)) = others.next_if(is_before) {
            arranged.push(other);
        }
        arranged.push(item);
    }
    arranged.extend(others.map(|(_, item)| item));
    Ok(arranged)
}

/// Merges the list `key` and puts it in order.
fn set_order(
    view: View<'_>,
    current: &mut Object,
    key: &str,
    patch: Option<&Value>,
    order: &[Value],
) -> Result<()> {
    let not_a_list = || Status::bad_request(format!("{key}: expected a list, but received none"));
    let merge_key = view.patch().and_then(|patch| patch.merge_key.as_deref());
    let patch = match patch {
        None => None,
        Some(Value::Array(items)) => Some(items.as_slice()),
        Some(_) => return Err(not_a_list()),
    };
    if let Some(patch) = patch {
        check_order(patch, order, merge_key)?;
    }
    let server = match current.get(key) {
        None => None,
        Some(Value::Array(items)) => Some(items.clone()),
        Some(_) => return Err(not_a_list()),
    };
    let merged = match (&server, patch) {
        (None, None) => return Ok(()),
        (Some(server), None) => server.clone(),
        (None, Some(patch)) => patch.iter().filter_map(clean).collect(),
        (Some(server), Some(patch)) => merge_list(view, server.clone(), patch)?,
    };
    let arranged = arrange(merged, order, &server.unwrap_or_default(), merge_key)?;
    current.insert(key.to_owned(), Value::Array(arranged));
    Ok(())
}

/// The items of a patch stand in the order that the patch demands.
fn check_order(patch: &[Value], order: &[Value], key: Option<&str>) -> Result<()> {
    if order.is_empty() {
        return Ok(());
    }
    let mut left = order.iter();
    for item in patch {
        if item.as_object().is_some_and(|map| map.contains_key(DIRECTIVE)) {
            continue;
        }
        let identity_of_item = identity(item, key)?;
        loop {
            let Some(next) = left.next() else {
                let list = |items: &[Value]| {
                    let known = items.iter().filter_map(|item| identity(item, key).ok());
                    known.collect::<Vec<_>>().join(" ")
                };
                let (patch, order) = (list(patch), list(order));
                let message = format!(
                    "The order in patch list:\n[{patch}]\n doesn't match {ELEMENT_ORDER} list:\n[{order}]\n"
                );
                return Err(Status::bad_request(message));
            };
            if identity(next, key)? == identity_of_item {
                break;
            }
        }
    }
    Ok(())
}

fn unknown_directive(directive: &Value, map: &Object) -> Status {
    Status::bad_request(format!("unknown patch type: {directive} in map: {}", keys_of(map)))
}

/// The keys of a map; its values may be secret.
fn keys_of(map: &Object) -> String {
    format!("[{}]", map.keys().map(String::as_str).collect::<Vec<_>>().join(" "))
}

/// What of a patch is to be stored where nothing was: no nulls, no directives; nothing of a map that is one.
fn clean(value: &Value) -> Option<Value> {
    match value {
        Value::Object(map) if map.contains_key(DIRECTIVE) => None,
        Value::Object(map) => Some(Value::Object(clean_map(map))),
        Value::Array(items) => Some(Value::Array(items.iter().filter_map(clean).collect())),
        other => Some(other.clone()),
    }
}

fn clean_map(map: &Object) -> Object {
    let kept = map.iter().filter(|(key, value)| !is_directive(key) && !value.is_null());
    kept.filter_map(|(key, value)| Some((key.clone(), clean(value)?))).collect()
}

#[cfg(test)]
#[path = "strategic_tests.rs"]
mod tests;
