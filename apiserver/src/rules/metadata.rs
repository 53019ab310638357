//! `metadata`: what a client says of an object, and what we say.
//!
//! ```text
//!  create: ours are cleared ─> name is there, or made ─> namespace of the path ─> uid, creationTimestamp, generation 1
//!  update: name, namespace, uid are the same ─> ours are those of the old object
//! ```

use aws_lc_rs::rand;
use serde_json::{Value, json};
use uuid::Uuid;

use super::names;
use crate::field::{FieldError, FieldReason};
use crate::object::{Object, metadata, metadata_mut, text};
use crate::status::{Reason, Result, Status};

/// Most bytes of all annotations together.
const ANNOTATIONS_BYTES_MAX: usize = 256 << 10;
/// Longest beginning of a name that is made, so that the whole is no longer than a label.
const GENERATE_NAME_BYTES_MAX: usize = 58;
/// What the made end of a name is of: no vowels, and nothing that looks like another.
const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_BYTES: usize = 5;
/// Finalizers of ours.
pub const ORPHAN: &str = "orphan";
pub const FOREGROUND: &str = "foregroundDeletion";

/// Where an object belongs.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// That of the request; empty for kinds of the cluster.
    pub namespace: &'a str,
    pub is_namespaced: bool,
    /// Tells what is wrong with a name of this kind.
    pub name_rule: fn(&str) -> Vec<String>,
}

/// An instant as objects have it: RFC 3339 in whole seconds.
pub fn timestamp(now: chrono::DateTime<chrono::Utc>) -> String {
    now.format("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Prepares the metadata of an object that is to be created; a name is made where only its beginning is given.
///
/// # Errors
/// [`Reason::BadRequest`] for the namespace of another request, or a resource version.
pub fn begin(object: &mut Object, place: Place<'_>, now: &str) -> Result<()> {
    settle_namespace(object, place)?;
    if text(object, &["metadata", "resourceVersion"]).is_some_and(|version| !version.is_empty()) {
        return Err(Status::bad_request("resourceVersion should not be set on objects to be created"));
    }
    let generated = match (text(object, &["metadata", "name"]), text(object, &["metadata", "generateName"])) {
        (None | Some(""), Some(base)) if !base.is_empty() => Some(generate(base)?),
        _ => None,
    };
    let metadata = metadata_mut(object);
    for ours in ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "resourceVersion"] {
        metadata.remove(ours);
    }
    if let Some(name) = generated {
        metadata.insert("name".into(), name.into());
    }
    metadata.insert("uid".into(), Uuid::new_v4().to_string().into());
    metadata.insert("creationTimestamp".into(), now.into());
    metadata.insert("generation".into(), 1.into());
    Ok(())
}

/// Prepares the metadata of an object that takes the place of `old`: what is ours stays as it was. An empty resource version is that of
/// `old`.
///
/// # Errors
/// [`Reason::BadRequest`] for the namespace of another request; [`Reason::Conflict`] for another uid or resource version than the
/// object has; `resource` is what it is called in messages.
pub fn carry(object: &mut Object, old: &Object, place: Place<'_>, resource: &str) -> Result<()> {
    settle_namespace(object, place)?;
    let name = text(old, &["metadata", "name"]).unwrap_or_default();
    let conflict = |why: String| {
        let told = format!("Operation cannot be fulfilled on {resource} {name:?}: {why}");
        Err(Status::new(Reason::Conflict, told))
    };
    let [old_uid, old_version] =
        ["uid", "resourceVersion"].map(|key| text(old, &["metadata", key]).unwrap_or_default());
    let given = |key: &str| text(object, &["metadata", key]).filter(|value| !value.is_empty());
    if let Some(uid) = given("uid").filter(|uid| *uid != old_uid) {
        return conflict(format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {old_uid}"
        ));
    }
    if given("resourceVersion").is_some_and(|version| version != old_version) {
        return conflict(
            "the object has been modified; please apply your changes to the latest version and try again"
                .into(),
        );
    }
    let old = metadata(old).cloned().unwrap_or_default();
    let metadata = metadata_mut(object);
    metadata.remove("selfLink");
    let ours = [
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
    ];
    for key in ours {
        match old.get(key) {
            Some(value) => metadata.insert(key.into(), value.clone()),
            None => metadata.remove(key),
        };
    }
    Ok(())
}

fn settle_namespace(object: &mut Object, place: Place<'_>) -> Result<()> {
    let metadata = metadata_mut(object);
    let given = metadata.get("namespace").and_then(Value::as_str).unwrap_or_default();
    if !place.is_namespaced {
        metadata.remove("namespace");
    } else if given.is_empty() {
        metadata.insert("namespace".into(), place.namespace.into());
    } else if given != place.namespace {
        let text = "the namespace of the provided object does not match the namespace sent on the request";
        return Err(Status::bad_request(text));
    }
    Ok(())
}

/// A name that begins with `base`.
fn generate(base: &str) -> Result<String> {
    let failed =
        |_| Status::new(Reason::InternalError, "Internal error occurred: no random bytes for a name");
    let mut name: String = base.chars().take(GENERATE_NAME_BYTES_MAX).collect();
    let mut random = [0_u8; 1];
    let end = name.len() + SUFFIX_BYTES;
    while name.len() < end {
        rand::fill(&mut random).map_err(failed)?;
        // Each letter is as likely as the others.
        let [byte] = random;
        let bound = u8::MAX - u8::MAX % ALPHABET.len() as u8;
        if byte < bound {
            name.push(char::from(ALPHABET[usize::from(byte) % ALPHABET.len()]));
        }
    }
    Ok(name)
}

/// What is wrong with the metadata of an object, against that of the object that it replaces, if it does.
pub fn check(object: &Object, old: Option<&Object>, place: Place<'_>) -> Vec<FieldError> {
    let mut wrong = Vec::new();
    let empty = Object::new();
    let metadata = metadata(object).unwrap_or(&empty);
    let given = |key: &str| metadata.get(key).and_then(Value::as_str).unwrap_or_default();
    if given("name").is_empty() {
        wrong.push(FieldError::required("metadata.name", "name or generateName is required"));
    } else {
        let mut told = (place.name_rule)(given("name"));
        if told.is_empty() {
            told = names::path_segment(given("name"));
        }
        wrong.extend(told.into_iter().map(|text| FieldError::invalid("metadata.name", given("name"), text)));
    }
    if place.is_namespaced {
        match given("namespace") {
            "" => wrong.push(FieldError::required("metadata.namespace", "")),
            name => {
                let told = names::dns_label(name).into_iter();
                wrong.extend(told.map(|text| FieldError::invalid("metadata.namespace", name, text)));
            }
        }
    }
    check_labels(metadata, &mut wrong);
    check_finalizers(metadata, old, &mut wrong);
    check_owners(metadata, &mut wrong);
    if let Some(old) = old {
        for key in ["name", "namespace"] {
            let before = text(old, &["metadata", key]).unwrap_or_default();
            if given(key) != before {
                wrong.push(FieldError::invalid(format!("metadata.{key}"), given(key), "field is immutable"));
            }
        }
    }
    wrong
}

fn check_labels(metadata: &Object, wrong: &mut Vec<FieldError>) {
    for (field, is_label) in [("labels", true), ("annotations", false)] {
        let path = format!("metadata.{field}");
        let mut bytes = 0_usize;
        for (key, value) in metadata.get(field).and_then(Value::as_object).into_iter().flatten() {
            let Some(value) = value.as_str() else {
                let text = format!("the value of {key:?} must be a string");
                wrong.push(FieldError::new(FieldReason::TypeInvalid, &path, Some(value.clone()), text));
                continue;
            };
            // The letters of an annotation's key may be of any case, also before the slash.
            let folded = if is_label { key.clone() } else { key.to_ascii_lowercase() };
            wrong.extend(
                names::label_key(&folded)
                    .into_iter()
                    .map(|text| FieldError::invalid(&path, key.as_str(), text)),
            );
            if is_label {
                wrong.extend(
                    names::label_value(value).into_iter().map(|text| FieldError::invalid(&path, value, text)),
                );
            }
            bytes = bytes.saturating_add(key.len()).saturating_add(value.len());
        }
        if !is_label && bytes > ANNOTATIONS_BYTES_MAX {
            wrong.push(FieldError::too_long(path, ANNOTATIONS_BYTES_MAX as u64));
        }
    }
}

/// The finalizers of an object.
pub fn finalizers(metadata: &Object) -> impl Iterator<Item = &str> {
    metadata.get("finalizers").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

fn check_finalizers(new: &Object, old: Option<&Object>, wrong: &mut Vec<FieldError>) {
    const FIELD: &str = "metadata.finalizers";
    for finalizer in finalizers(new) {
        wrong.extend(
            names::label_key(finalizer).into_iter().map(|text| FieldError::invalid(FIELD, finalizer, text)),
        );
    }
    let has = |name: &str| finalizers(new).any(|finalizer| finalizer == name);
    if has(ORPHAN) && has(FOREGROUND) {
        let told: Vec<_> = finalizers(new).collect();
        let text = format!("finalizer {ORPHAN} and {FOREGROUND} cannot be both set");
        wrong.push(FieldError::invalid(FIELD, told, text));
    }
    let Some(old) = old.and_then(metadata).filter(|old| old.contains_key("deletionTimestamp")) else {
        return;
    };
    let added: Vec<_> =
        finalizers(new).filter(|finalizer| finalizers(old).all(|known| known != *finalizer)).collect();
    if !added.is_empty() {
        let text = format!(
            "no new finalizers can be added if the object is being deleted, found new finalizers {}",
            json!(added)
        );
        wrong.push(FieldError::forbidden(FIELD, text));
    }
}

fn check_owners(metadata: &Object, wrong: &mut Vec<FieldError>) {
    let mut controller: Option<String> = None;
    let owners = metadata.get("ownerReferences").and_then(Value::as_array).into_iter().flatten();
    for (index, owner) in owners.enumerate() {
        let path = format!("metadata.ownerReferences[{index}]");
        let given = |key: &str| owner.get(key).and_then(Value::as_str).unwrap_or_default();
        for key in ["apiVersion", "kind", "name", "uid"] {
            if given(key).is_empty() {
                wrong.push(FieldError::required(format!("{path}.{key}"), "must not be empty"));
            }
        }
        if given("apiVersion").matches('/').count() > 1 || given("apiVersion").ends_with('/') {
            let text = "must be <group>/<version> or <version>";
            wrong.push(FieldError::invalid(format!("{path}.apiVersion"), given("apiVersion"), text));
        }
        if (given("apiVersion"), given("kind")) == ("v1", "Event") {
            let text = "/v1, Kind=Event is disallowed from being an owner";
            wrong.push(FieldError::invalid(path, owner.clone(), text));
        }
        if owner.get("controller").and_then(Value::as_bool) == Some(true) {
            let this = format!("{}/{}", given("kind"), given("name"));
            match &controller {
                None => controller = Some(this),
                Some(first) => {
                    let text = format!(
                        "Only one reference can have Controller set to true. Found \"true\" in references \
                         for {first} and {this}"
                    );
                    wrong.push(FieldError::invalid("metadata.ownerReferences", owner.clone(), text));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-01-02T03:04:05Z";
    const PLACE: Place<'static> =
        Place { namespace: "d", is_namespaced: true, name_rule: names::dns_subdomain };
    const CLUSTER: Place<'static> =
        Place { namespace: "", is_namespaced: false, name_rule: names::path_segment };

    fn object(metadata: Value) -> Object {
        json!({ "metadata": metadata }).as_object().unwrap().clone()
    }

    fn begun(metadata: Value) -> Object {
        let mut object = object(metadata);
        begin(&mut object, PLACE, NOW).unwrap();
        object
    }

    /// Fields and reasons of what is wrong.
    fn told(object: &Object, old: Option<&Object>) -> Vec<(String, String)> {
        check(object, old, PLACE)
            .into_iter()
            .map(|error| (error.path, error.reason.as_str().to_owned()))
            .collect()
    }

    #[test]
    fn an_object_begins_with_what_is_ours_made_anew() {
        let given = json!({"name": "a", "uid": "mine", "creationTimestamp": "1999-01-01T00:00:00Z", "generation": 7,
            "deletionTimestamp": "1999-01-01T00:00:00Z", "selfLink": "/x", "resourceVersion": ""});
        let (one, other) = (begun(given.clone()), begun(given));
        assert_eq!(text(&one, &["metadata", "namespace"]), Some("d"));
        assert_eq!(text(&one, &["metadata", "creationTimestamp"]), Some(NOW));
        assert_eq!(one["metadata"]["generation"], 1);
        assert_ne!(one["metadata"]["uid"], other["metadata"]["uid"]);
        for gone in ["deletionTimestamp", "selfLink", "resourceVersion"] {
            assert_eq!(one["metadata"].get(gone), None, "{gone}");
        }
        assert_eq!(told(&one, None), []);
        let mut of_cluster = object(json!({"name": "system:x", "namespace": "d"}));
        begin(&mut of_cluster, CLUSTER, NOW).unwrap();
        assert_eq!(text(&of_cluster, &["metadata", "namespace"]), None);
        assert_eq!(check(&of_cluster, None, CLUSTER), []);
    }

    #[test]
    fn a_name_is_made_from_its_beginning() {
        let names: Vec<_> = (0..2).map(|_| begun(json!({"generateName": "disk-"}))).collect();
        let [one, other] = [0, 1].map(|n| text(&names[n], &["metadata", "name"]).unwrap());
        assert!(one.starts_with("disk-") && one.len() == 10 && one != other, "{one} {other}");
        let long = begun(json!({"generateName": "a".repeat(100)}));
        assert_eq!(text(&long, &["metadata", "name"]).unwrap().len(), 63);
        assert_eq!(text(&begun(json!({"name": "b", "generateName": "c"})), &["metadata", "name"]), Some("b"));
    }

    #[test]
    fn what_belongs_elsewhere_or_has_a_version_is_not_created() {
        for given in [json!({"name": "a", "namespace": "e"}), json!({"name": "a", "resourceVersion": "5"})] {
            let error = begin(&mut object(given), PLACE, NOW).unwrap_err();
            assert_eq!(error.reason, Reason::BadRequest, "{error}");
        }
    }

    #[test]
    fn an_update_keeps_what_is_ours_and_refuses_what_was_meant_for_another() {
        let mut old = begun(json!({"name": "a", "labels": {"x": "1"}}));
        metadata_mut(&mut old).insert("resourceVersion".into(), "9".into());
        let given = json!({"name": "a", "labels": {"x": "2"}, "creationTimestamp": "1999-01-01T00:00:00Z", "generation": 7,
            "deletionTimestamp": "1999-01-01T00:00:00Z"});
        let mut new = object(given);
        carry(&mut new, &old, PLACE, "things").unwrap();
        let mut expected = old.clone();
        expected["metadata"]["labels"]["x"] = "2".into();
        assert_eq!(new, expected);
        for (key, value) in [("uid", "other"), ("resourceVersion", "8")] {
            let mut new = object(json!({"name": "a", key: value}));
            let error = carry(&mut new, &old, PLACE, "things").unwrap_err();
            assert_eq!(error.reason, Reason::Conflict);
            assert!(error.message.starts_with("Operation cannot be fulfilled on things \"a\": "), "{error}");
        }
        assert_eq!(told(&object(json!({"name": "b", "namespace": "d"})), Some(&old))[0].0, "metadata.name");
    }

    #[test]
    fn what_is_wrong_is_told_by_its_field() {
        for (given, field, reason) in [
            (json!({}), "metadata.name", "FieldValueRequired"),
            (json!({"name": "A"}), "metadata.name", "FieldValueInvalid"),
            (json!({"name": "a", "labels": {"-": "1"}}), "metadata.labels", "FieldValueInvalid"),
            (json!({"name": "a", "labels": {"a": "-"}}), "metadata.labels", "FieldValueInvalid"),
            (json!({"name": "a", "labels": {"a": 1}}), "metadata.labels", "FieldValueTypeInvalid"),
            (json!({"name": "a", "annotations": {"-": ""}}), "metadata.annotations", "FieldValueInvalid"),
            (
                json!({"name": "a", "annotations": {"a": "x".repeat(ANNOTATIONS_BYTES_MAX)}}),
                "metadata.annotations",
                "FieldValueTooLong",
            ),
            (json!({"name": "a", "finalizers": ["a b"]}), "metadata.finalizers", "FieldValueInvalid"),
            (
                json!({"name": "a", "finalizers": [ORPHAN, FOREGROUND]}),
                "metadata.finalizers",
                "FieldValueInvalid",
            ),
            (
                json!({"name": "a", "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p"}]}),
                "metadata.ownerReferences[0].uid",
                "FieldValueRequired",
            ),
            (
                json!({"name": "a", "ownerReferences": [{"apiVersion": "v1", "kind": "Event", "name": "p", "uid": "u"}]}),
                "metadata.ownerReferences[0]",
                "FieldValueInvalid",
            ),
        ] {
            assert_eq!(told(&begun(given.clone()), None), [(field.to_owned(), reason.to_owned())], "{given}");
        }
        assert_eq!(
            told(&begun(json!({"name": "a", "annotations": {"Example.COM/A": "any, text"}})), None),
            []
        );
        let owner = |name: &str| json!({"apiVersion": "g/v1", "kind": "A", "name": name, "uid": name, "controller": true});
        let two = begun(json!({"name": "a", "ownerReferences": [owner("x"), owner("y")]}));
        assert_eq!(told(&two, None).len(), 1);
    }

    #[test]
    fn an_object_that_is_being_deleted_gets_no_more_finalizers() {
        let mut old = begun(json!({"name": "a", "finalizers": ["x/a", "x/b"]}));
        metadata_mut(&mut old).insert("deletionTimestamp".into(), NOW.into());
        let with = |finalizers: &[&str]| {
            let mut new = old.clone();
            new["metadata"]["finalizers"] = json!(finalizers);
            told(&new, Some(&old))
        };
        assert_eq!(with(&["x/b"]), []);
        assert_eq!(
            with(&["x/b", "x/c"]),
            [("metadata.finalizers".to_owned(), "FieldValueForbidden".to_owned())]
        );
    }
}
