use proptest::prelude::*;
use serde_json::json as value;

use super::*;
use crate::patch::depth;
use crate::patch::testing::{any_object, any_value, list_by, list_of, map_of, node, object, scalar};
use crate::schema::{ListType, Type};

/// Something like a Pod: a map, a set, an atomic list, a list by key with a list by key in it.
fn pod() -> Node {
    let text = || scalar(Type::String);
    let port = node([("containerPort", scalar(Type::Integer)), ("name", text())]);
    let container = node([
        ("name", text()),
        ("image", text()),
        ("args", list_of(text(), ListType::Atomic)),
        ("ports", list_by(["containerPort"], port)),
    ]);
    node([
        ("labels", map_of(text())),
        ("finalizers", list_of(text(), ListType::Set)),
        ("containers", list_by(["name"], container)),
        ("strategy", node([("type", text()), ("rolling", node([("max", scalar(Type::Integer))]))])),
    ])
}

fn patched(current: Value, patch: Value) -> Value {
    Value::Object(strategic(&pod(), &object(current), &object(patch)).unwrap())
}

fn refused(current: Value, patch: Value) -> String {
    strategic(&pod(), &object(current), &object(patch)).unwrap_err().message
}

#[test]
fn maps_merge_and_nulls_delete() {
    let current = value!({"labels": {"a": "1", "b": "2"}, "strategy": {"type": "x"}});
    let patch = value!({"labels": {"a": null, "c": "3", "no": null}, "strategy": null, "none": null});
    assert_eq!(patched(current, patch), value!({"labels": {"b": "2", "c": "3"}}));
}

#[test]
fn lists_merge_by_key_at_every_level_and_others_are_replaced() {
    let current = value!({"containers": [
        {"name": "a", "image": "1", "args": ["x", "y"], "ports": [{"containerPort": 80, "name": "web"}]},
        {"name": "b", "image": "1"},
    ]});
    let patch = value!({"containers": [
        {"name": "c", "image": "3"},
        {"name": "a", "args": ["z"], "ports": [{"containerPort": 443}, {"containerPort": 80, "name": null}]},
    ]});
    let after = value!({"containers": [
        {"name": "c", "image": "3"},
        {"name": "a", "image": "1", "args": ["z"], "ports": [{"containerPort": 443}, {"containerPort": 80}]},
        {"name": "b", "image": "1"},
    ]});
    assert_eq!(patched(current, patch), after);
}

#[test]
fn values_of_a_set_are_added_once() {
    assert_eq!(
        patched(value!({"finalizers": ["a", "b"]}), value!({"finalizers": ["b", "c", "c"]})),
        value!({"finalizers": ["a", "b", "c"]})
    );
}

#[test]
fn what_is_not_there_is_made_without_nulls_and_directives() {
    let patch = value!({
        "strategy": {"type": null, "rolling": {"max": 1, "$retainKeys": ["max"]}},
        "labels": {"$patch": "replace", "a": "1"},
        "containers": [{"name": "a", "image": null}, {"name": "b", "$patch": "delete"}],
        "$setElementOrder/containers": [{"name": "a"}],
        "$deleteFromPrimitiveList/finalizers": ["x"],
    });
    assert_eq!(
        patched(value!({}), patch),
        value!({"strategy": {"rolling": {"max": 1}}, "containers": [{"name": "a"}]})
    );
}

#[test]
fn directives_replace_and_delete_maps_and_items() {
    let current = value!({"labels": {"a": "1"}, "strategy": {"type": "x"}, "containers": [{"name": "a"}, {"name": "b", "image": "1"}]});
    let patch = value!({
        "labels": {"$patch": "replace", "b": "2"},
        "strategy": {"$patch": "delete"},
        "containers": [{"name": "a", "$patch": "delete"}, {"name": "none", "$patch": "delete"}],
    });
    let after = value!({"labels": {"b": "2"}, "strategy": {}, "containers": [{"name": "b", "image": "1"}]});
    assert_eq!(patched(current.clone(), patch), after);
    let replaced = patched(current, value!({"containers": [{"name": "c"}, {"$patch": "replace"}]}));
    assert_eq!(replaced["containers"], value!([{"name": "c"}]));
}

#[test]
fn retained_keys_are_all_that_stays_of_a_map() {
    let current = value!({"strategy": {"type": "RollingUpdate", "rolling": {"max": 1}}});
    let patch = value!({"strategy": {"$retainKeys": ["type"], "type": "Recreate"}});
    assert_eq!(patched(current.clone(), patch), value!({"strategy": {"type": "Recreate"}}));
    let unlisted = value!({"strategy": {"$retainKeys": ["rolling"], "type": "Recreate"}});
    assert_eq!(refused(current.clone(), unlisted), "invalid patch format of retainKeys");
    assert_eq!(
        refused(current, value!({"strategy": {"$retainKeys": "type"}})),
        "invalid patch format of retainKeys"
    );
}

#[test]
fn values_are_deleted_from_a_list_of_them() {
    let current = value!({"finalizers": ["a", "b", "c"]});
    let patch = value!({"$deleteFromPrimitiveList/finalizers": ["a", "x"], "$setElementOrder/finalizers": ["c", "d", "b"], "finalizers": ["d"]});
    assert_eq!(patched(current.clone(), patch), value!({"finalizers": ["c", "d", "b"]}));
    let malformed = value!({"$deleteFromPrimitiveList": ["a"]});
    assert_eq!(refused(current, malformed), "invalid patch format of primitive list");
}

#[test]
fn the_order_is_that_of_the_patch_and_items_it_does_not_name_stay_between() {
    let current = value!({"containers": [{"name": "a"}, {"name": "server"}, {"name": "b"}]});
    let order = |names: [&str; 2]| names.map(|name| value!({"name": name}));
    let patch = value!({"$setElementOrder/containers": order(["b", "a"])});
    assert_eq!(
        patched(current.clone(), patch),
        value!({"containers": [{"name": "server"}, {"name": "b"}, {"name": "a"}]})
    );
    let patch = value!({"$setElementOrder/containers": order(["a", "c"]), "containers": [{"name": "c", "image": "1"}, {"name": "b", "$patch": "delete"}]});
    assert_eq!(
        patched(current.clone(), patch),
        value!({"containers": [{"name": "a"}, {"name": "c", "image": "1"}, {"name": "server"}]})
    );
    let against = value!({"$setElementOrder/containers": order(["a", "b"]), "containers": [{"name": "b"}, {"name": "a"}]});
    let told =
        "The order in patch list:\n[\"b\" \"a\"]\n doesn't match $setElementOrder list:\n[\"a\" \"b\"]\n";
    assert_eq!(refused(current.clone(), against), told);
    assert_eq!(
        refused(current, value!({"$setElementOrder/containers": "a"})),
        "invalid patch format of setElementOrder list"
    );
}

#[test]
fn what_cannot_be_merged_is_told() {
    let current = value!({"containers": [{"name": "a"}], "finalizers": ["a"]});
    for (patch, message) in [
        (
            value!({"containers": [{"image": "1"}]}),
            r#"map: [image] does not contain declared merge key: name"#,
        ),
        (value!({"containers": ["a"]}), "list element types are not identical: map and string"),
        (
            value!({"labels": {"$patch": "paint"}, "$patch": "merge"}),
            "unknown patch type: \"merge\" in map: [$patch labels]",
        ),
        (
            value!({"containers": [{"$patch": "merge", "name": "a"}]}),
            "merging lists cannot yet be specified in the patch",
        ),
        (value!({"containers": [{"$patch": 1, "name": "a"}]}), "unknown patch type: 1 in map: [$patch name]"),
    ] {
        let told = refused(current.clone(), patch);
        assert!(told.starts_with(message), "{told}");
    }
    let status =
        strategic(&pod(), &object(value!({"finalizers": [["a"]]})), &object(value!({"finalizers": ["b"]})))
            .unwrap_err();
    assert_eq!(
        (status.reason, status.message.as_str()),
        (Reason::Invalid, "lists of lists are not supported")
    );
}

#[test]
fn metadata_merges_as_that_of_every_object_where_the_schema_has_none() {
    let current = value!({"metadata": {"finalizers": ["a"], "ownerReferences": [{"uid": "1", "name": "x"}]}});
    let patch =
        value!({"metadata": {"finalizers": ["b"], "ownerReferences": [{"uid": "1", "$patch": "delete"}]}});
    assert_eq!(
        patched(current, patch),
        value!({"metadata": {"finalizers": ["b", "a"], "ownerReferences": []}})
    );
}

#[test]
fn fields_that_the_schema_does_not_know_merge_as_maps_and_replace_as_lists() {
    let after = patched(value!({"x": {"a": 1, "l": [1]}}), value!({"x": {"b": 2, "l": [2]}}));
    assert_eq!(after, value!({"x": {"a": 1, "b": 2, "l": [2]}}));
}

proptest! {
    #[test]
    fn an_empty_strategic_patch_changes_nothing(current in any_object()) {
        prop_assert_eq!(&strategic(&pod(), &current, &Object::new()).unwrap(), &current);
    }

    #[test]
    fn any_strategic_patch_is_done_or_refused(containers in any_value(), other in any_value(), patch in any_object(), list in any_value()) {
        let mut current = Object::new();
        current.insert("containers".to_owned(), containers);
        current.insert("finalizers".to_owned(), other);
        let mut patch = patch;
        patch.insert("containers".to_owned(), list.clone());
        patch.insert("$setElementOrder/finalizers".to_owned(), list);
        if let Ok(patched) = strategic(&pod(), &current, &patch) {
            prop_assert!(depth(&Value::Object(patched.clone())) <= depth(&Value::Object(current)).max(depth(&Value::Object(patch))));
        }
    }

    #[test]
    fn merging_the_same_items_again_changes_nothing(names in prop::collection::btree_set("[a-d]", 0..5), patch in prop::collection::btree_set("[a-f]", 0..5)) {
        let items = |names: &BTreeSet<String>| Value::from_iter(names.iter().rev().map(|name| value!({"name": name})));
        let patch = value!({"containers": items(&patch)});
        let once = patched(value!({"containers": items(&names)}), patch.clone());
        prop_assert_eq!(patched(once.clone(), patch), once);
    }
}
