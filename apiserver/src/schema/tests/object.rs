use serde_json::{Value, json};

use super::{schema, texts};
use crate::{schema::Schema, status::Cause};

#[track_caller]
fn assert_errors(schema: &Schema, object: Value, expected: &[&str]) {
    assert_eq!(texts(&schema.validate(&object, None)), expected);
}

#[test]
fn unknown_fields_are_removed_and_named() {
    let schema = schema(json!({
        "spec": {"type": "object", "properties": {
            "known": {"type": "string"},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true,
                "properties": {"strict": {"type": "object"}}},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "list": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}},
            "template": {"type": "object", "x-kubernetes-embedded-resource": true,
                "x-kubernetes-preserve-unknown-fields": true},
        }},
    }));
    let mut object = json!({
        "apiVersion": "a/v1", "kind": "K", "metadata": {"name": "n", "labels": {"l": "1"}, "extra": 1},
        "spec": {
            "known": "a", "foo": 1, "labels": {"x": "y"},
            "free": {"any": {"thing": 1}, "strict": {"gone": 1}},
            "list": [{"a": "b"}, {"b": 1}],
            "template": {"apiVersion": "v1", "kind": "P", "metadata": {"name": "m", "bad": 1}, "spec": {"x": 1}},
        },
        "status": {},
    });
    let warnings = schema.prune(&mut object);
    assert_eq!(
        warnings,
        [
            "unknown field \"metadata.extra\"",
            "unknown field \"spec.foo\"",
            "unknown field \"spec.free.strict.gone\"",
            "unknown field \"spec.list[1].b\"",
            "unknown field \"spec.template.metadata.bad\"",
            "unknown field \"status\"",
        ]
    );
    assert_eq!(
        object,
        json!({
            "apiVersion": "a/v1", "kind": "K", "metadata": {"name": "n", "labels": {"l": "1"}},
            "spec": {
                "known": "a", "labels": {"x": "y"}, "free": {"any": {"thing": 1}, "strict": {}},
                "list": [{"a": "b"}, {}],
                "template": {"apiVersion": "v1", "kind": "P", "metadata": {"name": "m"}, "spec": {"x": 1}},
            },
        })
    );
}

#[test]
fn what_is_preserved_of_a_list_is_preserved_of_its_items() {
    let schema = schema(json!({
        "list": {"type": "array", "x-kubernetes-preserve-unknown-fields": true,
            "items": {"type": "object", "properties": {"strict": {"type": "object"}}}},
        "any": {"type": "object", "additionalProperties": true},
    }));
    let mut object =
        json!({"list": [{"kept": {"a": 1}, "strict": {"gone": 1}}], "any": {"a": {"gone": 1}, "b": 1}});
    assert_eq!(
        schema.prune(&mut object),
        ["unknown field \"any.a.gone\"", "unknown field \"list[0].strict.gone\""]
    );
    assert_eq!(object, json!({"list": [{"kept": {"a": 1}, "strict": {}}], "any": {"a": {}, "b": 1}}));
}

#[test]
fn what_is_missing_is_filled_and_nulls_that_may_not_be_are_removed() {
    let schema = schema(json!({
        "spec": {"type": "object", "default": {}, "properties": {
            "size": {"type": "integer", "default": 1},
            "name": {"type": "string"},
            "maybe": {"type": "string", "nullable": true, "default": "d"},
            "list": {"type": "array", "items": {"type": "object", "properties": {"p": {"type": "string", "default": "TCP"}}}},
            "map": {"type": "object", "additionalProperties": {"type": "object", "properties": {"q": {"type": "integer", "default": 2}}}},
        }},
    }));
    let filled = |mut object: Value| {
        schema.default(&mut object);
        object
    };
    assert_eq!(filled(json!({})), json!({"spec": {"size": 1, "maybe": "d"}}));
    assert_eq!(
        filled(
            json!({"metadata": {"creationTimestamp": null, "name": "n"}, "spec": {"size": null, "name": null, "maybe": null, "list": [{}], "map": {"k": {}}}})
        ),
        json!({"metadata": {"name": "n"}, "spec": {"size": 1, "maybe": null, "list": [{"p": "TCP"}], "map": {"k": {"q": 2}}}})
    );
}

#[test]
fn an_invalid_value_is_told_in_the_known_words() {
    let schema =
        schema(json!({"spec": {"type": "object", "required": ["name"], "minProperties": 1, "properties": {
            "replicas": {"type": "integer", "minimum": 0, "maximum": 10, "format": "int32"},
            "odd": {"type": "number", "minimum": 1, "exclusiveMinimum": true, "multipleOf": 0.5},
            "name": {"type": "string", "minLength": 2, "maxLength": 4, "pattern": "^[a-z]"},
            "mode": {"type": "string", "enum": ["A", "B"]},
            "list": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
            "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 1},
            "port": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
            "flag": {"type": "boolean"},
            "at": {"type": "string", "format": "date-time"},
        }}}));
    let spec = |spec: Value| json!({"spec": spec});
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "replicas": 10, "odd": 1.5, "port": "http", "map": {"a": 1}})),
        &[],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "replicas": -1})),
        &["spec.replicas: Invalid value: -1: spec.replicas in body should be greater than or equal to 0"],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "replicas": 11})),
        &["spec.replicas: Invalid value: 11: spec.replicas in body should be less than or equal to 10"],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "replicas": "1"})),
        &[
            "spec.replicas: Invalid value: \"string\": spec.replicas in body must be of type integer: \"string\"",
        ],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "odd": 1})),
        &["spec.odd: Invalid value: 1: spec.odd in body should be greater than 1"],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "odd": 1.25})),
        &["spec.odd: Invalid value: 1.25: spec.odd in body should be a multiple of 0.5"],
    );
    assert_errors(&schema, spec(json!({"flag": true})), &["spec.name: Required value"]);
    assert_errors(
        &schema,
        json!({"spec": {}}),
        &[
            "spec: Invalid value: 0: spec in body should have at least 1 properties",
            "spec.name: Required value",
        ],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "abcde"})),
        &["spec.name: Too long: may not be more than 4 bytes"],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "\u{e9}\u{e9}"})),
        &["spec.name: Invalid value: \"\u{e9}\u{e9}\": spec.name in body should match '^[a-z]'"],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "a"})),
        &["spec.name: Invalid value: \"a\": spec.name in body should be at least 2 chars long"],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "mode": "C"})),
        &["spec.mode: Unsupported value: \"C\": supported values: \"A\", \"B\""],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "list": []})),
        &["spec.list: Invalid value: 0: spec.list in body should have at least 1 items"],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "list": ["a", "b", "c"]})),
        &["spec.list: Too many: 3: must have at most 2 items"],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "list": ["a", 1]})),
        &[
            "spec.list[1]: Invalid value: \"integer\": spec.list[1] in body must be of type string: \"integer\"",
        ],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "map": {"k": "v"}})),
        &["spec.map.k: Invalid value: \"string\": spec.map.k in body must be of type integer: \"string\""],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "port": 1.5})),
        &[
            "spec.port: Invalid value: \"number\": spec.port in body must be of type integer,string: \"number\"",
        ],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "flag": null})),
        &["spec.flag: Invalid value: \"null\": spec.flag in body must be of type boolean: \"null\""],
    );
    assert_errors(
        &schema,
        spec(json!({"name": "ab", "at": "now"})),
        &["spec.at: Invalid value: \"now\": spec.at in body must be of type date-time: \"now\""],
    );
    assert_errors(
        &schema,
        json!({"metadata": {"labels": {"a": 1}}}),
        &[
            "metadata.labels.a: Invalid value: \"integer\": metadata.labels.a in body must be of type string: \"integer\"",
        ],
    );
}

#[test]
fn a_null_is_one_of_the_known_values_or_none() {
    let schema = schema(json!({
        "a": {"type": "string", "nullable": true, "enum": ["A"]},
        "b": {"type": "string", "nullable": true, "enum": ["A", null]},
    }));
    assert_errors(&schema, json!({"a": "A", "b": null}), &[]);
    assert_errors(&schema, json!({"a": null}), &["a: Unsupported value: null: supported values: \"A\""]);
}

#[test]
fn schemas_combine() {
    let schema = schema(json!({"spec": {"type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "string"}, "c": {"type": "string"}},
        "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
        "not": {"required": ["c"]},
    }}));
    assert_errors(&schema, json!({"spec": {"a": "x"}}), &[]);
    assert_errors(
        &schema,
        json!({"spec": {}}),
        &[
            "<nil>: Invalid value: \"\": \"spec\" must validate one and only one schema (oneOf). Found none valid",
            "spec.a: Required value",
        ],
    );
    assert_errors(
        &schema,
        json!({"spec": {"a": "x", "b": "x"}}),
        &[
            "<nil>: Invalid value: \"\": \"spec\" must validate one and only one schema (oneOf). Found 2 valid alternatives",
        ],
    );
    assert_errors(
        &schema,
        json!({"spec": {"a": "x", "c": "x"}}),
        &["<nil>: Invalid value: \"\": \"spec\" must not validate the schema (not)"],
    );
}

#[test]
fn items_of_sets_and_keys_of_maps_are_there_once() {
    let schema = schema(json!({
        "set": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set"},
        "map": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
            "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "v": {"type": "integer"}}}},
    }));
    assert_errors(&schema, json!({"set": ["a", "b", "a", "a"]}), &["set[2]: Duplicate value: \"a\""]);
    let twice = json!({"map": [{"name": "a", "v": 1}, {"name": "a", "v": 2}]});
    assert_errors(&schema, twice.clone(), &["map[1]: Duplicate value: {\"name\":\"a\"}"]);
    let mut changed = twice.clone();
    changed["map"][0]["v"] = json!(3);
    assert_eq!(schema.validate(&changed, Some(&twice)), [], "it was so before");
}

#[test]
fn what_was_invalid_and_has_not_changed_does_not_fail_an_update() {
    let schema = schema(json!({"spec": {"type": "object", "properties": {
        "n": {"type": "integer", "minimum": 5}, "m": {"type": "integer", "minimum": 5},
        "list": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
            "items": {"type": "object", "required": ["k"], "properties": {
                "k": {"type": "string"},
                "v": {"type": "integer", "minimum": 5, "x-kubernetes-validations": [{"rule": "self != 1"}]}}}},
        "plain": {"type": "array", "items": {"type": "integer", "minimum": 5}},
    }}}));
    let old =
        json!({"spec": {"n": 1, "m": 9, "list": [{"k": "a", "v": 1}, {"k": "b", "v": 2}], "plain": [1]}});
    let new =
        json!({"spec": {"n": 1, "m": 8, "list": [{"k": "b", "v": 2}, {"k": "a", "v": 1}], "plain": [1]}});
    assert_eq!(schema.validate(&new, Some(&old)), []);
    let new = json!({"spec": {"n": 2, "m": 9, "plain": [1, 6]}});
    assert_eq!(
        texts(&schema.validate(&new, Some(&old))),
        [
            "spec.n: Invalid value: 2: spec.n in body should be greater than or equal to 5",
            "spec.plain[0]: Invalid value: 1: spec.plain[0] in body should be greater than or equal to 5",
        ]
    );
}

#[test]
fn an_object_within_an_object_says_what_it_is() {
    let schema = schema(json!({
        "template": {"type": "object", "x-kubernetes-embedded-resource": true, "x-kubernetes-preserve-unknown-fields": true},
    }));
    assert_errors(&schema, json!({"template": {"apiVersion": "v1", "kind": "Pod"}}), &[]);
    assert_errors(
        &schema,
        json!({"template": {"kind": ""}}),
        &["template.apiVersion: Required value", "template.kind: Invalid value: \"\": must not be empty"],
    );
}

#[test]
fn an_error_does_not_grow_with_the_object() {
    let schema =
        schema(json!({"o": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 1},
        "enum": [{}]}, "s": {"type": "string", "pattern": "^b"}}));
    let many: serde_json::Map<String, Value> = (0..10_000).map(|n| (n.to_string(), json!("long"))).collect();
    let errors = schema.validate(&json!({"o": many, "s": "a".repeat(1 << 20)}), None);
    assert!(errors.len() <= crate::field::ERRORS_COUNT_MAX);
    assert!(texts(&errors).iter().all(|text| text.len() < 5000));
    let many: serde_json::Map<String, Value> = (0..10_000).map(|n| (n.to_string(), json!(1))).collect();
    let mut object = json!({"o": {"n".repeat(1 << 20): "long"}, "x": 1, "more": many});
    object.as_object_mut().unwrap().extend((0..1000).map(|n| (format!("{n}"), json!(1))));
    let removed = schema.prune(&mut object);
    assert!(removed.len() <= 100 && removed.iter().all(|text| text.len() < 5000));
    assert_eq!(object.as_object().unwrap().len(), 1);
    assert!(texts(&schema.validate(&object, None)).iter().all(|text| text.len() < 5000));
}

#[test]
fn an_error_becomes_a_cause() {
    let schema = schema(json!({"n": {"type": "integer", "minimum": 0}}));
    let errors = schema.validate(&json!({"n": -1}), None);
    let causes: Vec<Cause> = errors.iter().map(Cause::from).collect();
    assert_eq!(
        causes,
        [Cause {
            reason: "FieldValueInvalid".to_owned(),
            message: "Invalid value: -1: n in body should be greater than or equal to 0".to_owned(),
            field: "n".to_owned(),
        }]
    );
}
