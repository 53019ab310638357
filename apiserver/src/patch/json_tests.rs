use proptest::prelude::*;
use serde_json::json as value;

use super::*;
use crate::patch::testing::{any_object, any_value, object};

fn done(current: Value, patch: Value) -> Value {
    Value::Object(json(&object(current), &patch).unwrap())
}

fn refused(current: Value, patch: Value) -> Status {
    json(&object(current), &patch).unwrap_err()
}

#[test]
fn every_operation_of_a_json_patch_does_what_the_rfc_says() {
    let before = value!({"a": 1, "list": ["x", "z"], "deep": {"b~c/d": true}});
    let patch = value!([
        {"op": "test", "path": "/deep/b~0c~1d", "value": true},
        {"op": "add", "path": "/list/1", "value": "y"},
        {"op": "add", "path": "/list/-", "value": "end"},
        {"op": "replace", "path": "/a", "value": {"n": null}},
        {"op": "copy", "from": "/list", "path": "/again"},
        {"op": "move", "from": "/deep/b~0c~1d", "path": "/moved"},
        {"op": "remove", "path": "/list/0"},
    ]);
    let after = value!({"a": {"n": null}, "list": ["y", "z", "end"], "again": ["x", "y", "z", "end"], "deep": {}, "moved": true});
    assert_eq!(done(before, patch), after);
}

#[test]
fn an_operation_that_cannot_be_done_is_invalid_and_says_which() {
    for (patch, cause) in [
        (
            value!([{"op": "test", "path": "/a", "value": 2}]),
            r#"operation 0 (test "/a"): value did not match"#,
        ),
        (
            value!([{"op": "test", "path": "/a", "value": 1}, {"op": "remove", "path": "/no"}]),
            r#"operation 1 (remove "/no"): path is invalid"#,
        ),
        (
            value!([{"op": "replace", "path": "/no", "value": 1}]),
            r#"operation 0 (replace "/no"): path is invalid"#,
        ),
        (
            value!([{"op": "add", "path": "/no/b", "value": 1}]),
            r#"operation 0 (add "/no/b"): path is invalid"#,
        ),
        (
            value!([{"op": "copy", "from": "/no", "path": "/b"}]),
            r#"operation 0 (copy "/b"): "from" path is invalid"#,
        ),
    ] {
        let status = refused(value!({"a": 1}), patch);
        assert_eq!(status.reason, Reason::Invalid);
        assert_eq!(status.message, "the server rejected our request due to an error in our request");
        assert_eq!(status.details.causes[0].message, cause);
    }
}

#[test]
fn a_field_that_is_not_there_can_be_tested_for_null() {
    assert_eq!(
        done(value!({"a": {}}), value!([{"op": "test", "path": "/a/b", "value": null}])),
        value!({"a": {}})
    );
    let elsewhere = value!([{"op": "test", "path": "/b/c", "value": null}]);
    assert_eq!(refused(value!({"a": {}}), elsewhere).reason, Reason::Invalid);
}

#[test]
fn what_is_no_json_patch_is_a_bad_request() {
    for patch in [
        value!({"op": "remove", "path": "/a"}),
        value!(7),
        value!([{"op": "paint", "path": "/a"}]),
        value!([{"op": "remove"}]),
        value!([{"op": "remove", "path": "a"}]),
    ] {
        assert_eq!(refused(value!({"a": 1}), patch.clone()).reason, Reason::BadRequest, "{patch}");
    }
    assert_eq!(
        refused(value!({"a": 1}), value!([{"op": "replace", "path": "", "value": []}])).reason,
        Reason::BadRequest
    );
}

#[test]
fn a_json_patch_is_bounded_in_operations_copies_moves_and_depth() {
    let many = Value::Array(vec![value!({"op": "test", "path": "/a", "value": 1}); OPERATIONS_MAX_COUNT + 1]);
    let status = refused(value!({"a": 1}), many);
    assert_eq!(status.reason.code(), 413);
    assert_eq!(
        status.message,
        "Request entity too large: The allowed maximum operations in a JSON patch is 10000, got 10001"
    );

    // Every copy doubles the list.
    let doubling = Value::Array(vec![value!({"op": "copy", "from": "/a", "path": "/a/-"}); 100]);
    assert_eq!(refused(value!({"a": ["some text"]}), doubling).reason.code(), 413);

    let at_the_head =
        Value::Array(vec![value!({"op": "add", "path": "/a/0", "value": 1}); OPERATIONS_MAX_COUNT]);
    assert_eq!(refused(value!({"a": vec![1; 20_000]}), at_the_head).reason.code(), 413);

    let deeper: Vec<Value> =
        (1..200).map(|level| value!({"op": "add", "path": "/a".repeat(level), "value": {}})).collect();
    assert_eq!(refused(value!({}), Value::Array(deeper)).reason, Reason::BadRequest);
    let into_itself: Vec<Value> =
        (0..200).map(|_| value!({"op": "copy", "from": "/a", "path": "/a/a"})).collect();
    assert_eq!(refused(value!({"a": {}}), Value::Array(into_itself)).reason, Reason::BadRequest);
}

#[test]
fn a_merge_patch_merges_objects_deletes_by_null_and_replaces_the_rest() {
    for (current, patch, after) in [
        (value!({"a": "b"}), value!({"a": "c"}), value!({"a": "c"})),
        (value!({"a": "b", "b": 1}), value!({"a": null, "no": null}), value!({"b": 1})),
        (value!({"a": ["b"]}), value!({"a": "c"}), value!({"a": "c"})),
        (value!({"a": "c"}), value!({"a": ["b", null]}), value!({"a": ["b", null]})),
        (
            value!({"a": {"b": "c", "d": 1}}),
            value!({"a": {"b": "d", "c": null}}),
            value!({"a": {"b": "d", "d": 1}}),
        ),
        (value!({"a": [1]}), value!({"a": {"b": {"c": null, "d": {}}}}), value!({"a": {"b": {"d": {}}}})),
    ] {
        assert_eq!(Value::Object(merge(&object(current), &patch).unwrap()), after);
    }
    let status = merge(&Object::new(), &value!([1])).unwrap_err();
    assert_eq!((status.reason, status.message.as_str()), (Reason::BadRequest, "Invalid JSON Patch"));
}

fn any_operation() -> impl Strategy<Value = Value> {
    let path = prop::collection::vec(prop::sample::select(vec!["a", "b", "c", "0", "1", "-", "~1"]), 0..5)
        .prop_map(|keys| keys.iter().fold(String::new(), |path, key| path + "/" + key));
    let name = prop::sample::select(vec!["add", "remove", "replace", "move", "copy", "test"]);
    (name, path.clone(), path, any_value())
        .prop_map(|(op, path, from, value)| value!({"op": op, "path": path, "from": from, "value": value}))
}

proptest! {
    #[test]
    fn a_merge_patch_is_what_another_implementation_makes_of_it(current in any_object(), patch in any_object()) {
        let mut expected = Value::Object(current.clone());
        let patch = Value::Object(patch);
        json_patch::merge(&mut expected, &patch);
        prop_assert_eq!(Value::Object(merge(&current, &patch).unwrap()), expected);
    }

    #[test]
    fn an_empty_patch_changes_nothing(current in any_object()) {
        prop_assert_eq!(&merge(&current, &value!({})).unwrap(), &current);
        prop_assert_eq!(&json(&current, &value!([])).unwrap(), &current);
    }

    #[test]
    fn any_json_patch_is_done_or_refused_and_leaves_what_can_be_read_again(
        current in any_object(),
        operations in prop::collection::vec(any_operation(), 0..30),
    ) {
        if let Ok(patched) = json(&current, &Value::Array(operations)) {
            let text = serde_json::to_string(&patched).unwrap();
            prop_assert_eq!(serde_json::from_str::<Object>(&text).unwrap(), patched);
        }
    }
}
