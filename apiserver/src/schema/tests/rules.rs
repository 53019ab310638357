use serde_json::{Value, json};

use super::{schema, texts};
use crate::schema::Schema;

/// A schema of `spec`, with rules.
#[track_caller]
fn with_rules(properties: Value, rules: Value) -> Schema {
    schema(json!({"spec": {"type": "object", "properties": properties, "x-kubernetes-validations": rules}}))
}

#[track_caller]
fn errors(schema: &Schema, new: Value, old: Option<Value>) -> Vec<String> {
    let of = |spec: Value| json!({"spec": spec});
    texts(&schema.validate(&of(new), old.map(of).as_ref()))
}

#[test]
fn a_rule_that_fails_is_told_with_its_message_reason_and_path() {
    let schema = with_rules(
        json!({"min": {"type": "integer"}, "max": {"type": "integer"}}),
        json!([
            {"rule": "self.min <= self.max"},
            {"rule": "self.min >= 0", "message": "min is negative", "fieldPath": ".min", "reason": "FieldValueForbidden"},
            {"rule": "self.max < 100", "messageExpression": "'max is ' + string(self.max)", "fieldPath": ".max"},
        ]),
    );
    assert_eq!(errors(&schema, json!({"min": 1, "max": 2}), None), [""; 0]);
    assert_eq!(
        errors(&schema, json!({"min": 3, "max": 2}), None),
        ["spec: Invalid value: failed rule: self.min <= self.max",]
    );
    assert_eq!(
        errors(&schema, json!({"min": -1, "max": 200}), None),
        ["spec.min: Forbidden: min is negative", "spec.max: Invalid value: max is 200",]
    );
    assert_eq!(
        errors(&schema, json!({"max": 2}), None),
        [
            "spec: Invalid value: \"object\": no such key: min evaluating rule: self.min <= self.max",
            "spec: Invalid value: \"object\": no such key: min evaluating rule: min is negative",
        ]
    );
    assert_eq!(
        errors(&schema, json!({"min": "a", "max": 2}), None),
        [
            "spec.min: Invalid value: \"string\": spec.min in body must be of type integer: \"string\"",
            "<nil>: Invalid value: null: some validation rules were not checked because the object was invalid; \
         correct the existing errors to complete validation",
        ]
    );
}

#[test]
fn a_transition_rule_needs_an_old_value() {
    let schema = with_rules(
        json!({
            "name": {"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "is immutable"}]},
            "list": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
                "items": {"type": "object", "required": ["k"], "properties": {"k": {"type": "string"}, "v": {"type": "integer",
                    "x-kubernetes-validations": [{"rule": "self >= oldSelf"}]}}}},
        }),
        json!([{"rule": "!has(oldSelf.name) || has(self.name)", "message": "name cannot be removed"}]),
    );
    assert_eq!(errors(&schema, json!({"name": "a"}), None), [""; 0]);
    assert_eq!(errors(&schema, json!({"name": "a"}), Some(json!({}))), [""; 0]);
    assert_eq!(
        errors(&schema, json!({"name": "b"}), Some(json!({"name": "a"}))),
        ["spec.name: Invalid value: \"b\": is immutable",]
    );
    assert_eq!(
        errors(&schema, json!({}), Some(json!({"name": "a"}))),
        ["spec: Invalid value: name cannot be removed"]
    );
    let old = json!({"list": [{"k": "a", "v": 1}, {"k": "b", "v": 5}]});
    let new = json!({"list": [{"k": "b", "v": 4}, {"k": "a", "v": 2}, {"k": "c", "v": 0}]});
    assert_eq!(
        errors(&schema, new, Some(old)),
        ["spec.list[0].v: Invalid value: 4: failed rule: self >= oldSelf"]
    );
}

#[test]
fn the_order_of_sets_and_maps_means_nothing() {
    let list = |r#type: &str, items: Value| {
        let mut schema = json!({"type": "array", "items": items, "x-kubernetes-list-type": r#type,
            "x-kubernetes-validations": [{"rule": "self == oldSelf"}]});
        if r#type == "map" {
            schema["x-kubernetes-list-map-keys"] = json!(["k"]);
        }
        schema
    };
    let item = json!({"type": "object", "required": ["k"], "properties": {"k": {"type": "string"}}});
    let schema = with_rules(
        json!({
            "set": list("set", json!({"type": "string"})), "map": list("map", item),
            "plain": list("atomic", json!({"type": "string"})),
        }),
        json!([]),
    );
    let old = json!({"set": ["a", "b"], "map": [{"k": "a"}, {"k": "b"}], "plain": ["a", "b"]});
    let new = json!({"set": ["b", "a"], "map": [{"k": "b"}, {"k": "a"}], "plain": ["b", "a"]});
    assert_eq!(
        errors(&schema, new, Some(old.clone())),
        ["spec.plain: Invalid value: failed rule: self == oldSelf"]
    );
    let new = json!({"set": ["b", "c"], "map": [{"k": "a"}], "plain": ["a", "b"]});
    assert_eq!(errors(&schema, new, Some(old)).len(), 2);
}

#[test]
fn an_optional_old_value_is_asked_for() {
    let schema = with_rules(
        json!({"n": {"type": "integer"}}),
        json!([{
            "rule": "oldSelf.hasValue() ? self.n >= oldSelf.value().n : self.n == 0", "optionalOldSelf": true,
        }]),
    );
    assert_eq!(errors(&schema, json!({"n": 0}), None), [""; 0]);
    assert_eq!(errors(&schema, json!({"n": 1}), None).len(), 1);
    assert_eq!(errors(&schema, json!({"n": 2}), Some(json!({"n": 1}))), [""; 0]);
    assert_eq!(errors(&schema, json!({"n": 0}), Some(json!({"n": 1}))).len(), 1);
}

#[test]
fn values_are_of_their_schemas_types() {
    let properties = json!({
        "at": {"type": "string", "format": "date-time"}, "for": {"type": "string", "format": "duration"},
        "data": {"type": "string", "format": "byte"}, "rate": {"type": "number"}, "my_field": {"type": "string"},
        "a-b": {"type": "string"}, "namespace": {"type": "string"}, "a.b/c": {"type": "integer"},
        "port": {"x-kubernetes-int-or-string": true}, "size": {"type": "string"}, "none": {"type": "string", "nullable": true},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
    });
    let object = json!({
        "at": "2026-01-01T00:00:00Z", "for": "90m", "data": "aGVsbG8=", "rate": 2, "my_field": "m", "a-b": "ab",
        "namespace": "ns", "a.b/c": 3, "port": 80, "size": "1Gi", "none": null, "labels": {"x.y/z": "l"},
    });
    for rule in [
        "self.at > timestamp('2025-01-01T00:00:00Z')",
        "self.__for__ == duration('1h30m')",
        "self.data == b'hello'",
        "self.rate / 4.0 == 0.5",
        "self.my_field == 'm' && self.a__dash__b == 'ab' && self.__namespace__ == 'ns' && self.a__dot__b__slash__c == 3",
        "self.port == 80",
        "quantity(self.size).isGreaterThan(quantity('500Mi'))",
        "!has(self.none)",
        "self.labels['x.y/z'] == 'l' && 'x.y/z' in self.labels && self.labels.all(k, k.size() == 5)",
        "self.my_field.matches('^[a-z]$') && self.my_field.replace('m', 'n') == 'n'",
        "self.labels.exists_one(k, self.labels[k] == 'l') && self.labels.map(k, k).size() == 1",
        "[1, 2, 3].filter(x, x > 1).map(x, x * 2) == [4, 6] && lists.range(3) == [0, 1, 2]",
        "dyn(self.rate) == 2.0 && self.rate > 1",
        "'\u{e9}'.size() == 1 && size(self.labels) == 1",
        "type(self.port) == int && type(self.size) != int",
        "self.size.indexOf('G') == 1 && self.size.lastIndexOf('G') == 1",
    ] {
        let schema = with_rules(properties.clone(), json!([{"rule": rule}]));
        assert_eq!(errors(&schema, object.clone(), None), [""; 0], "{rule}");
    }
}

#[test]
fn rules_see_the_name_of_the_object() {
    let schema = Schema::compile(&json!({"type": "object", "x-kubernetes-validations": [
        {"rule": "self.metadata.name.size() < 4", "message": "the name is too long"},
    ]}))
    .unwrap();
    let object = |name: &str| json!({"apiVersion": "a/v1", "kind": "K", "metadata": {"name": name}});
    assert_eq!(schema.validate(&object("abc"), None), []);
    assert_eq!(
        texts(&schema.validate(&object("abcd"), None)),
        ["<nil>: Invalid value: the name is too long"]
    );
    assert!(
        Schema::compile(
            &json!({"type": "object", "x-kubernetes-validations": [{"rule": "self.metadata.uid == ''"}]})
        )
        .is_err()
    );
}

#[test]
fn a_rule_that_costs_too_much_ends_with_an_error() {
    let properties = json!({"l": {"type": "array", "items": {"type": "string"}}, "t": {"type": "string"}});
    let text = "a".repeat(40_000);
    let list: Vec<Value> = (0..2000).map(|n| json!(format!("item {n}"))).collect();
    for rule in [
        "self.l.all(a, self.l.all(b, self.l.all(c, a != b || b != c || true)))",
        "self.l.exists(a, self.l.exists(b, self.l.exists(c, false)) || true) || true",
        "lists.range(1000000000).size() > 0",
        "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'.replace('', self.l.join('')).replace('i', self.l.join('')).size() > 0",
        "[self.l].map(x, x + x).map(x, x + x).map(x, x + x).map(x, x + x).map(x, x + x).map(x, x + x).map(x, x + x)\
         .map(x, x + x).map(x, x + x).map(x, x + x).map(x, x + x).map(x, x + x).map(x, x + x).size() > 0",
        "self.t.indexOf(self.t) > 0",
        "sets.contains(self.l, self.l) && self.l.distinct().size() > 0",
    ] {
        let schema = with_rules(properties.clone(), json!([{"rule": rule}, {"rule": "false"}]));
        let errors = errors(&schema, json!({"l": list, "t": text}), None);
        assert_eq!(errors.len(), 1, "{rule}: {errors:?}");
        assert!(
            errors[0].contains("no further validation rules will be run due to call cost exceeds limit"),
            "{errors:?}"
        );
    }
}

#[test]
fn all_rules_of_an_object_share_a_budget() {
    let rule = "lists.range(200).all(a, lists.range(200).all(b, true))";
    let schema = with_rules(
        json!({"l": {"type": "array", "items": {"type": "string",
        "x-kubernetes-validations": [{"rule": rule}]}}}),
        json!([]),
    );
    let list: Vec<Value> = (0..400).map(|n| json!(n.to_string())).collect();
    let errors = errors(&schema, json!({"l": list}), None);
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(
        errors[0].ends_with("due to running out of cost budget, no further validation rules will be run"),
        "{errors:?}"
    );
}

#[test]
fn a_fault_of_a_rule_is_an_error_of_the_rule() {
    let properties = json!({"t": {"type": "string", "format": "date-time"}, "n": {"type": "integer"}, "l": {"type": "array", "items": {"type": "integer"}}});
    for rule in [
        "self.n / 0 == 1",
        "self.n % 0 == 1",
        "self.l[5] == 1",
        "self.n + 9223372036854775807 > 0",
        "self.t + duration('2000000h') + duration('2000000h') + duration('2000000h') > self.t && 1 / 0 == 1",
        "'a'.matches('(') == true",
        "-9223372036854775808 / -1 > self.n && self.l[9] == 1",
        "'abc'.substring(2, 1) == '' && self.l[9] == 1",
        "int('x') == 1",
        "'%d'.format(['x']) == '' && self.l[9] == 1",
    ] {
        let schema = with_rules(properties.clone(), json!([{"rule": rule}]));
        let errors = errors(&schema, json!({"t": "9999-01-01T00:00:00Z", "n": 1, "l": [1]}), None);
        assert_eq!(errors.len(), 1, "{rule}: {errors:?}");
    }
}

#[test]
fn the_deepest_expression_that_compiles_is_evaluated_on_a_small_stack() {
    let deepest = (1..200).rev().find_map(|count| {
        let rule = format!("{} > 0", vec!["self.n"; count].join(" + "));
        let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "x-kubernetes-validations": [{"rule": rule}]});
        Schema::compile(&schema).ok()
    });
    let schema = deepest.unwrap();
    let thread = std::thread::Builder::new().stack_size(1 << 20);
    let errors = thread.spawn(move || schema.validate(&json!({"n": 1}), None)).unwrap().join().unwrap();
    assert_eq!(errors, []);
}
