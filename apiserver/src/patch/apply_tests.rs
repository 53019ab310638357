use proptest::prelude::*;
use serde_json::json as value;

use super::*;
use crate::patch::testing::{any_object, list_by, list_of, map_of, node, object, scalar};
use crate::schema::{ListType, Type};

/// Something like a Deployment, with a field for every way to merge.
fn deployment() -> Node {
    let text = || scalar(Type::String);
    let mut protocol = text();
    protocol.default = Some(value!("TCP"));
    let port = node([("port", scalar(Type::Integer)), ("protocol", protocol), ("name", text())]);
    let env = node([("name", text()), ("value", text())]);
    let container = node([
        ("name", text()),
        ("image", text()),
        ("env", list_by(["name"], env)),
        ("args", list_of(text(), ListType::Atomic)),
    ]);
    let mut selector = map_of(text());
    selector.is_atomic = true;
    let open = Node { preserves_unknown: true, r#type: Type::Object, ..Node::default() };
    let spec = node([
        ("replicas", scalar(Type::Integer)),
        ("paused", scalar(Type::Boolean)),
        ("selector", selector),
        ("containers", list_by(["name"], container)),
        ("ports", list_by(["port", "protocol"], port)),
        ("zones", list_of(text(), ListType::Set)),
        ("open", open),
    ]);
    node([
        ("metadata", Node { r#type: Type::Object, ..Node::default() }),
        ("spec", spec),
        ("status", node([("ready", scalar(Type::Integer))])),
    ])
}

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_700_000_000 + seconds, 0).unwrap()
}

/// A Deployment with this spec; with none if it is empty, which would be a field of its own.
fn with_spec(spec: Value) -> Object {
    let mut all = object(
        value!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "namespace": "n"}, "spec": spec}),
    );
    all.retain(|_, value| value != &value!({}));
    all
}

struct World {
    node: Node,
    live: Option<Object>,
    clock: i64,
}

impl World {
    fn new() -> Self {
        Self { node: deployment(), live: None, clock: 0 }
    }

    fn try_apply(&mut self, manager: &str, applied: &Object, force: bool) -> Result<()> {
        self.clock += 1;
        let (live, now) = (self.live.as_ref(), at(self.clock));
        let request = Apply {
            node: &self.node,
            live,
            applied,
            manager,
            force,
            api_version: "apps/v1",
            subresource: "",
            now,
        };
        self.live = Some(apply(request)?);
        Ok(())
    }

    fn apply(&mut self, manager: &str, spec: Value) -> &mut Self {
        self.try_apply(manager, &with_spec(spec), false).unwrap();
        self
    }

    fn update_object(&mut self, manager: &str, subresource: &str, new: Object) -> &mut Self {
        self.clock += 1;
        let now = at(self.clock);
        let request = Update {
            node: &self.node,
            live: self.live.as_ref(),
            manager,
            api_version: "apps/v1",
            subresource,
            now,
        };
        self.live = Some(track_update(request, new));
        self
    }

    /// Changes the live object by a merge patch.
    fn update(&mut self, manager: &str, patch: Value) -> &mut Self {
        let new = crate::patch::merge(self.object(), &patch).unwrap();
        self.update_object(manager, "", new)
    }

    fn object(&self) -> &Object {
        self.live.as_ref().unwrap()
    }

    fn spec(&self) -> &Value {
        &self.object()["spec"]
    }

    fn entries(&self) -> Vec<Value> {
        self.object()["metadata"].get("managedFields").and_then(Value::as_array).cloned().unwrap_or_default()
    }

    /// The paths that a manager owns.
    fn owned(&self, manager: &str) -> Vec<String> {
        let entries = self.entries().into_iter().filter(|entry| entry["manager"] == manager);
        entries.flat_map(|entry| Set::read(&entry["fieldsV1"]).unwrap().paths(usize::MAX)).collect()
    }
}

#[test]
fn a_configuration_that_is_applied_to_nothing_makes_the_object() {
    let mut world = World::new();
    world.apply("a", value!({"replicas": 1, "selector": {"x": "y"}, "zones": ["1"]}));
    let fields = value!({"f:spec": {"f:replicas": {}, "f:selector": {}, "f:zones": {"v:\"1\"": {}}}});
    let entry = value!({
        "manager": "a", "operation": "Apply", "apiVersion": "apps/v1", "time": "2023-11-14T22:13:21Z",
        "fieldsType": "FieldsV1", "fieldsV1": fields,
    });
    let mut expected = with_spec(value!({"replicas": 1, "selector": {"x": "y"}, "zones": ["1"]}));
    expected["metadata"]["managedFields"] = value!([entry]);
    assert_eq!(world.object(), &expected);
}

#[test]
fn maps_lists_and_sets_are_owned_as_their_schema_divides_them() {
    let mut world = World::new();
    let mut applied = with_spec(value!({
        "containers": [{"name": "a", "image": "1", "args": ["x"], "env": [{"name": "E", "value": "1"}]}],
        "ports": [{"port": 80}],
        "open": {"deep": {"x": 1, "list": [1]}, "empty": {}},
        "paused": null,
    }));
    applied["metadata"]["labels"] = value!({"app": "d"});
    applied["metadata"]["finalizers"] = value!(["f"]);
    applied["metadata"]["ownerReferences"] = value!([{"uid": "u", "name": "o"}]);
    world.try_apply("a", &applied, false).unwrap();
    let expected = value!({
        "f:metadata": {
            "f:finalizers": {"v:\"f\"": {}},
            "f:labels": {"f:app": {}},
            "f:ownerReferences": {"k:{\"uid\":\"u\"}": {}},
        },
        "f:spec": {
            "f:containers": {"k:{\"name\":\"a\"}": {
                ".": {}, "f:name": {}, "f:image": {}, "f:args": {},
                "f:env": {"k:{\"name\":\"E\"}": {".": {}, "f:name": {}, "f:value": {}}},
            }},
            "f:ports": {"k:{\"port\":80,\"protocol\":\"TCP\"}": {".": {}, "f:port": {}}},
            "f:open": {"f:deep": {".": {}, "f:list": {}, "f:x": {}}, "f:empty": {}},
            "f:paused": {},
        },
    });
    assert_eq!(world.entries()[0]["fieldsV1"], expected);
}

#[test]
fn what_is_applied_no_more_is_removed_and_nothing_else() {
    let mut world = World::new();
    world.apply("a", value!({"replicas": 1, "paused": true, "containers": [{"name": "a", "image": "1"}, {"name": "b"}], "zones": ["1", "2"]}));
    world.update("other", value!({"spec": {"open": {"x": 1}}}));
    world.apply("a", value!({"paused": true, "containers": [{"name": "a"}], "zones": ["2"]}));
    assert_eq!(
        world.spec(),
        &value!({"paused": true, "containers": [{"name": "a"}], "zones": ["2"], "open": {"x": 1}})
    );
    world.apply("a", value!({"paused": true}));
    assert_eq!(world.spec(), &value!({"paused": true, "open": {"x": 1}}));
}

#[test]
fn what_somebody_else_wants_stays_when_one_applies_it_no_more() {
    let mut world = World::new();
    world.apply(
        "a",
        value!({"replicas": 1, "zones": ["1", "2"], "containers": [{"name": "a", "image": "1"}]}),
    );
    world.apply(
        "b",
        value!({"replicas": 1, "zones": ["2"], "containers": [{"name": "a", "env": [{"name": "E"}]}]}),
    );
    world.apply("a", value!({}));
    assert_eq!(
        world.spec(),
        &value!({"replicas": 1, "zones": ["2"], "containers": [{"name": "a", "env": [{"name": "E"}]}]})
    );
    assert!(world.owned("a").is_empty());
}

#[test]
fn a_list_that_somebody_made_empty_stays_when_what_others_put_into_it_goes() {
    let mut world = World::new();
    world.update_object("a", "", with_spec(value!({"zones": [], "open": {}})));
    world.apply("b", value!({"zones": ["1"], "open": {"x": 1}, "paused": true}));
    world.apply("b", value!({"paused": true}));
    assert_eq!(world.spec(), &value!({"zones": [], "open": {}, "paused": true}));
    assert_eq!(world.owned("a"), [".spec", ".spec.open", ".spec.zones"]);
}

#[test]
fn an_item_that_nobody_wants_any_more_goes_with_what_others_added_to_it() {
    let mut world = World::new();
    world.apply("a", value!({"containers": [{"name": "a"}, {"name": "b"}]}));
    world.update("b", value!({"spec": {"containers": [{"name": "a"}, {"name": "b", "image": "1"}]}}));
    assert_eq!(world.owned("b"), [r#".spec.containers[name="b"].image"#]);
    world.apply("a", value!({"containers": [{"name": "a"}]}));
    assert_eq!(world.spec()["containers"], value!([{"name": "a"}]));
    assert!(world.owned("b").is_empty());
}

#[test]
fn a_change_of_what_another_owns_is_a_conflict() {
    let mut world = World::new();
    world.apply("a", value!({"replicas": 1, "paused": true}));
    world.update("scaler", value!({"spec": {"replicas": 5}}));
    assert_eq!(world.owned("a"), [".spec.paused"]);

    let one = world.try_apply("a", &with_spec(value!({"replicas": 2, "paused": true})), false).unwrap_err();
    assert_eq!(one.reason.code(), 409);
    assert_eq!(
        one.message,
        "Apply failed with 1 conflict: conflict with \"scaler\" using apps/v1: .spec.replicas"
    );
    let cause = Cause {
        reason: "FieldManagerConflict".to_owned(),
        message: "conflict with \"scaler\" using apps/v1".to_owned(),
        field: ".spec.replicas".to_owned(),
    };
    assert_eq!(one.details.causes, [cause]);

    world.apply("b", value!({"zones": ["1"], "paused": true}));
    let more = world.try_apply("c", &with_spec(value!({"replicas": 2, "paused": false})), false).unwrap_err();
    assert_eq!(
        more.message,
        "Apply failed with 3 conflicts: conflicts with \"a\":\n- .spec.paused\nconflicts with \"b\":\n- .spec.paused\n\
         conflicts with \"scaler\" using apps/v1:\n- .spec.replicas"
    );
}

#[test]
fn more_conflicts_than_an_answer_holds_are_counted() {
    let mut world = World::new();
    let open =
        |value: usize| Value::from_iter((0..5_000).map(|key| (format!("key-{key:05}"), value!(value))));
    world.apply("a", value!({"open": open(1)}));
    let status = world.try_apply("b", &with_spec(value!({"open": open(2)})), false).unwrap_err();
    assert!(
        status
            .message
            .starts_with("Apply failed with 5000 conflicts: conflicts with \"a\":\n- .spec.open.key-00000\n")
    );
    assert!(status.message.len() < 2 * CONFLICTS_MAX_BYTES && status.details.causes.len() > 1_000);
}

#[test]
fn managers_without_number_are_merged_into_the_last_ten() {
    let mut world = World::new();
    world.update_object("creator", "", with_spec(value!({"replicas": 1})));
    let entry = |index: usize| {
        let fields = value!({"f:spec": {"f:open": {format!("f:k{index}"): {}}}});
        value!({"manager": format!("m{index}"), "operation": "Update", "apiVersion": "apps/v1", "fieldsType": "FieldsV1", "fieldsV1": fields})
    };
    let entries: Vec<Value> = (0..20_000).map(entry).collect();
    world.update("b", value!({"metadata": {"managedFields": entries}, "spec": {"replicas": 2}}));
    assert_eq!(world.entries().len(), 10);
    assert_eq!(world.owned("ancient-changes").len(), 19_992);
}

#[test]
fn force_takes_over_and_the_same_value_is_shared() {
    let mut world = World::new();
    world.apply("a", value!({"replicas": 1, "paused": true}));
    world.apply("b", value!({"replicas": 1}));
    assert_eq!(
        (world.owned("a"), world.owned("b")),
        (vec![".spec.paused".into(), ".spec.replicas".into()], vec![".spec.replicas".into()])
    );
    world.try_apply("c", &with_spec(value!({"replicas": 3})), true).unwrap();
    assert_eq!(world.spec(), &value!({"replicas": 3, "paused": true}));
    assert_eq!(
        (world.owned("a"), world.owned("b"), world.owned("c")),
        (vec![".spec.paused".into()], vec![], vec![".spec.replicas".into()])
    );
}

#[test]
fn atomic_maps_and_lists_are_taken_as_a_whole() {
    let mut world = World::new();
    world.apply("a", value!({"selector": {"x": "1"}, "containers": [{"name": "a", "args": ["1", "2"]}]}));
    let other = with_spec(value!({"selector": {"y": "1"}}));
    let status = world.try_apply("b", &other, false).unwrap_err();
    assert_eq!(status.message, "Apply failed with 1 conflict: conflict with \"a\": .spec.selector");
    world.try_apply("b", &other, true).unwrap();
    assert_eq!(world.spec()["selector"], value!({"y": "1"}));
    world.apply("a", value!({"containers": [{"name": "a", "args": ["3"]}]}));
    assert_eq!(world.spec(), &value!({"selector": {"y": "1"}, "containers": [{"name": "a", "args": ["3"]}]}));
}

#[test]
fn items_come_in_the_order_that_is_applied_with_those_of_others_between() {
    let mut world = World::new();
    let named = |names: &str| Value::from_iter(names.chars().map(|name| value!({"name": name.to_string()})));
    world.apply("a", value!({"containers": named("abc")}));
    world.apply("b", value!({"containers": named("dx")}));
    assert_eq!(world.spec()["containers"], named("abcdx"));
    world.apply("a", value!({"containers": named("cabe")}));
    assert_eq!(world.spec()["containers"], named("cdxabe"));
    world.apply("a", value!({"containers": named("ec")}));
    assert_eq!(world.spec()["containers"], named("dxec"));
}

#[test]
fn an_update_takes_what_it_changes_and_only_that() {
    let mut world = World::new();
    world.update_object("creator", "", with_spec(value!({"replicas": 1, "zones": ["1"], "open": {"x": 1}})));
    let zones =
        [".spec", ".spec.open", ".spec.replicas", ".spec.zones", ".spec.open.x", ".spec.zones[=\"1\"]"];
    assert_eq!(world.owned("creator"), zones);
    world.update("editor", value!({"spec": {"replicas": 2, "zones": ["1", "2"], "open": {"x": null}}}));
    assert_eq!(world.owned("creator"), [".spec", ".spec.open", ".spec.zones", ".spec.zones[=\"1\"]"]);
    assert_eq!(world.owned("editor"), [".spec.replicas", ".spec.zones[=\"2\"]"]);
    world.update("", value!({"spec": {"paused": true}}));
    assert_eq!(world.owned("unknown"), [".spec.paused"]);
}

#[test]
fn times_change_with_what_a_manager_does_and_not_without() {
    let mut world = World::new();
    world.apply("a", value!({"replicas": 1})).update("b", value!({"spec": {"paused": true}}));
    let before = world.object().clone();
    world
        .apply("a", value!({"replicas": 1}))
        .update("b", value!({}))
        .update("c", value!({"metadata": {"resourceVersion": "7", "uid": "u"}}));
    assert_eq!(world.object()["metadata"]["managedFields"], before["metadata"]["managedFields"]);
    world.apply("a", value!({"replicas": 2}));
    let times: Vec<Value> = world.entries().iter().map(|entry| entry["time"].clone()).collect();
    assert_eq!(times, [value!("2023-11-14T22:13:26Z"), value!("2023-11-14T22:13:22Z")]);
}

#[test]
fn a_subresource_has_an_entry_of_its_own_and_cannot_write_managed_fields() {
    let mut world = World::new();
    world.apply("a", value!({"replicas": 1}));
    let mut new = world.object().clone();
    new.insert("status".to_owned(), value!({"ready": 1}));
    new["metadata"]["managedFields"] = value!([{}]);
    world.update_object("a", "status", new);
    let entries = world.entries();
    assert_eq!(entries.len(), 2);
    assert_eq!(
        (&entries[1]["operation"], &entries[1]["subresource"]),
        (&value!("Update"), &value!("status"))
    );
    assert_eq!(entries[1]["fieldsV1"], value!({"f:status": {".": {}, "f:ready": {}}}));
    let request = with_spec(value!({}));
    let mut request = request;
    request.insert("status".to_owned(), value!({"ready": 2}));
    let status = world.try_apply("b", &request, false).unwrap_err();
    assert_eq!(
        status.message,
        "Apply failed with 1 conflict: conflict with \"a\" with subresource \"status\" using apps/v1: .status.ready"
    );
}

#[test]
fn an_object_that_nobody_tracked_belongs_to_a_manager_of_before_when_first_applied() {
    let mut world = World::new();
    world.live = Some(with_spec(value!({"replicas": 1})));
    world.update("b", value!({"spec": {"paused": true}}));
    assert!(world.entries().is_empty());
    let status = world.try_apply("a", &with_spec(value!({"replicas": 2})), false).unwrap_err();
    assert_eq!(
        status.message,
        "Apply failed with 1 conflict: conflict with \"before-first-apply\" using apps/v1: .spec.replicas"
    );
    world.apply("a", value!({"replicas": 1}));
    assert_eq!(world.owned("a"), [".spec.replicas"]);
    assert_eq!(world.owned("before-first-apply"), [".spec", ".spec.paused", ".spec.replicas"]);
}

#[test]
fn an_empty_entry_clears_who_owns_what_and_a_request_can_set_it() {
    let mut world = World::new();
    world.apply("a", value!({"replicas": 1}));
    let entries = value!([{"manager": "m", "operation": "Update", "apiVersion": "apps/v1", "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {"f:paused": {}}}}]);
    world.update("b", value!({"metadata": {"managedFields": entries}}));
    assert_eq!((world.owned("a"), world.owned("m")), (vec![], vec![".spec.paused".to_owned()]));
    world.update("b", value!({"metadata": {"managedFields": null}, "spec": {"replicas": 2}}));
    assert_eq!(
        (world.owned("b"), world.owned("m")),
        (vec![".spec.replicas".to_owned()], vec![".spec.paused".to_owned()])
    );
    world.update("b", value!({"metadata": {"managedFields": [{"manager": "broken"}]}}));
    assert_eq!(world.owned("m"), [".spec.paused"]);
    let mut emptied = World { node: deployment(), live: world.live.clone(), clock: 9 };
    world.update("b", value!({"metadata": {"managedFields": [{}]}, "spec": {"replicas": 3}}));
    emptied.update("b", value!({"metadata": {"managedFields": []}}));
    assert!(world.entries().is_empty() && emptied.entries().is_empty());
}

#[test]
fn the_oldest_updates_are_merged_when_there_are_more_than_ten() {
    let mut world = World::new();
    world.apply("applier", value!({"replicas": 1}));
    for index in 0..13 {
        world.update(&format!("m{index}"), value!({"spec": {"open": {format!("k{index:02}"): 1}}}));
    }
    let managers: Vec<String> =
        world.entries().iter().map(|entry| entry["manager"].as_str().unwrap().to_owned()).collect();
    let expected = ["applier", "ancient-changes", "m4", "m5", "m6", "m7", "m8", "m9", "m10", "m11", "m12"];
    assert_eq!(managers, expected);
    let ancient = [".spec.open", ".spec.open.k00", ".spec.open.k01", ".spec.open.k02", ".spec.open.k03"];
    assert_eq!(world.owned("ancient-changes"), ancient);
}

#[test]
fn kubectl_has_no_conflict_with_what_it_applied_on_the_client_s_side() {
    let annotated = |spec: Value| {
        let mut object = with_spec(spec.clone());
        let last = with_spec(spec);
        object["metadata"]["annotations"] = value!({LAST_APPLIED: serde_json::to_string(&last).unwrap()});
        object
    };
    let mut world = World::new();
    world.update_object("kubectl-client-side-apply", "", annotated(value!({"replicas": 1, "paused": true})));
    let applied = with_spec(value!({"replicas": 2, "paused": true}));
    assert_eq!(world.try_apply("somebody", &applied, false).unwrap_err().reason, Reason::Conflict);
    world.try_apply("kubectl", &applied, false).unwrap();
    assert_eq!(world.spec(), &value!({"replicas": 2, "paused": true}));
    let kept = world.object()["metadata"]["annotations"][LAST_APPLIED].as_str().unwrap().to_owned();
    assert_eq!(kept, serde_json::to_string(&applied).unwrap() + "\n");

    // What another has changed since is a conflict all the same.
    world.update_object("kubectl-client-side-apply", "", annotated(value!({"replicas": 1, "paused": false})));
    world.update("scaler", value!({"spec": {"replicas": 9}}));
    let status =
        world.try_apply("kubectl", &with_spec(value!({"replicas": 3, "paused": true})), false).unwrap_err();
    assert_eq!(
        status.message,
        "Apply failed with 1 conflict: conflict with \"scaler\" using apps/v1: .spec.replicas"
    );
}

#[test]
fn a_configuration_that_cannot_be_merged_is_told_with_its_place() {
    let place = "failed to create typed patch object (n/d; apps/v1, Kind=Deployment): ";
    for (spec, why) in [
        (value!({"no": 1}), ".spec.no: field not declared in schema"),
        (value!({"zones": ["1", "1"]}), ".spec.zones: duplicate entries for key [=\"1\"]"),
        (
            value!({"containers": [{"name": "a"}, {"name": "a"}]}),
            ".spec.containers: duplicate entries for key [name=\"a\"]",
        ),
        (
            value!({"ports": [{"port": 1}, {"port": 1, "protocol": "TCP"}]}),
            ".spec.ports: duplicate entries for key [port=1,protocol=\"TCP\"]",
        ),
        (
            value!({"containers": [{"image": "a"}]}),
            ".spec.containers: element 0: associative list with keys has an element that omits all key fields [\"name\"] (and doesn't have default values for any key fields)",
        ),
        (
            value!({"zones": [[]]}),
            ".spec.zones: element 0: not supported: associative list with lists as elements",
        ),
        (value!({"zones": "1"}), ".spec.zones: expected list, got a scalar"),
        (
            value!({"containers": {"a": 1}, "paused": [1]}),
            "errors:\n  .spec.containers: expected no map, got one\n  .spec.paused: expected no list, got one",
        ),
    ] {
        let status = World::new().try_apply("a", &with_spec(spec), false).unwrap_err();
        assert_eq!((status.reason, status.message), (Reason::BadRequest, format!("{place}{why}")));
    }
    let mut managed = with_spec(value!({}));
    managed["metadata"]["managedFields"] = value!([]);
    assert_eq!(
        World::new().try_apply("a", &managed, false).unwrap_err().message,
        "metadata.managedFields must be nil"
    );
    let mut version = with_spec(value!({}));
    version["apiVersion"] = value!("apps/v2");
    assert_eq!(
        World::new().try_apply("a", &version, false).unwrap_err().message,
        "Incorrect version specified in apply patch. Specified patch version: apps/v2, expected: apps/v1"
    );
}

#[test]
fn what_became_atomic_is_owned_as_a_whole_by_who_owned_of_it() {
    let mut world = World::new();
    world.node.properties.get_mut("spec").unwrap().properties.get_mut("selector").unwrap().is_atomic = false;
    world.apply("a", value!({"selector": {"x": "1"}}));
    assert_eq!(world.owned("a"), [".spec.selector.x"]);
    world.node = deployment();
    world.update("b", value!({"spec": {"paused": true}}));
    assert_eq!(world.owned("a"), [".spec.selector"]);
}

fn any_spec() -> impl Strategy<Value = Value> {
    let name = || prop::sample::select(vec!["a", "b", "c"]);
    let env = prop::collection::btree_map(name(), "[x-y]", 1..3).prop_map(|env| {
        Value::from_iter(env.into_iter().map(|(name, text)| value!({"name": name, "value": text})))
    });
    let container = (
        prop::option::of("[x-y]"),
        prop::option::of(env),
        prop::option::of(prop::collection::vec("[x-y]", 1..3)),
    );
    let containers = prop::collection::btree_map(name(), container, 1..4).prop_map(|containers| {
        Value::from_iter(containers.into_iter().map(|(name, (image, env, args))| {
            let mut container = object(value!({"name": name, "image": image, "env": env, "args": args}));
            container.retain(|_, value| !value.is_null());
            container
        }))
    });
    let zones = prop::collection::btree_set("[x-z]", 1..3).prop_map(Value::from_iter);
    let selector =
        prop::collection::btree_map(name().prop_map(str::to_owned), "[x-y]", 1..3).prop_map(Value::from_iter);
    let open = prop::collection::btree_map(
        name().prop_map(str::to_owned),
        prop_oneof![Just(value!(1)), Just(value!({"d": {"e": 2}})), Just(value!([1]))],
        1..3,
    )
    .prop_map(Value::from_iter);
    let fields = (
        prop::option::of(0..3),
        prop::option::of(containers),
        prop::option::of(zones),
        prop::option::of(selector),
        prop::option::of(open),
    );
    fields.prop_map(|(replicas, containers, zones, selector, open)| {
        let mut spec = object(value!({"replicas": replicas, "containers": containers, "zones": zones, "selector": selector, "open": open}));
        spec.retain(|_, value| !value.is_null());
        Value::Object(spec)
    })
}

/// The live object without who owns what, its lists in an order of their own.
fn unordered(world: &World) -> Value {
    fn sort(value: &mut Value) {
        match value {
            Value::Object(fields) => fields.values_mut().for_each(sort),
            Value::Array(items) => {
                items.iter_mut().for_each(sort);
                items.sort_by_key(Value::to_string);
            }
            _ => {}
        }
    }
    let mut object = Value::Object(without_managed_fields(world.object()));
    sort(&mut object);
    object
}

proptest! {
    #[test]
    fn applying_the_same_twice_changes_nothing(live in any_spec(), first in any_spec(), second in any_spec()) {
        let mut world = World::new();
        world.update_object("creator", "", with_spec(live));
        for spec in [first, second] {
            world.try_apply("a", &with_spec(spec.clone()), true).unwrap();
            let once = world.object().clone();
            world.try_apply("a", &with_spec(spec), true).unwrap();
            prop_assert_eq!(world.object(), &once);
        }
    }

    #[test]
    fn what_a_sole_manager_applies_is_all_there_is(first in any_spec(), second in any_spec()) {
        let mut world = World::new();
        world.apply("a", first).apply("a", second.clone());
        let mut of_second = World::new();
        of_second.apply("a", second);
        prop_assert_eq!(unordered(&world), unordered(&of_second));
        prop_assert_eq!(world.owned("a"), of_second.owned("a"));
    }

    #[test]
    fn what_one_applies_and_omits_again_leaves_what_others_have(others in any_spec(), spec in any_spec()) {
        let mut world = World::new();
        world.apply("b", others.clone());
        let before = unordered(&world);
        if world.try_apply("a", &with_spec(spec), false).is_ok() {
            world.apply("a", value!({}));
            prop_assert_eq!(unordered(&world), before);
            prop_assert_eq!(world.owned("a"), Vec::<String>::new());
        }
    }

    #[test]
    fn whoever_applies_owns_what_it_applied(live in any_spec(), spec in any_spec()) {
        let mut world = World::new();
        world.update_object("b", "", with_spec(live));
        world.try_apply("a", &with_spec(spec.clone()), true).unwrap();
        let view = View::of(&world.node);
        let has = fields(view, world.object());
        let owns = without_system_fields(&fields(view, &with_spec(spec)));
        prop_assert!(owns.difference(&has).is_empty());
        prop_assert_eq!(owns.paths(usize::MAX), world.owned("a"));
    }

    #[test]
    fn anything_is_applied_and_tracked_without_a_panic(live in any_object(), new in any_object(), spec in any_object(), patch in any_object()) {
        let mut world = World::new();
        world.update_object("a", "", live).update_object("b", "", new).update("c", Value::Object(patch.clone()));
        let mut applied = with_spec(Value::Object(spec));
        let _ = world.try_apply("d", &applied, true);
        applied.insert("spec".to_owned(), value!({"open": patch}));
        prop_assert!(world.try_apply("d", &applied, true).is_ok());
        prop_assert!(world.try_apply("d", &applied, false).is_ok());
    }
}
