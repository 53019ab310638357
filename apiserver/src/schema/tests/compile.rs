use serde_json::{Value, json};

use super::texts;
use crate::schema::Schema;

#[track_caller]
fn assert_refused(schema: Value, expected: &[&str]) {
    let errors = Schema::compile(&schema).expect_err("it was taken");
    assert_eq!(texts(&errors), expected);
}

/// A schema with one field.
fn field(field: Value) -> Value {
    json!({"type": "object", "properties": {"f": field}})
}

const F: &str = "openAPIV3Schema.properties[f]";

#[test]
fn what_is_not_structural_is_refused_in_the_known_words() {
    assert_refused(json!({}), &["openAPIV3Schema.type: Required value: must not be empty at the root"]);
    assert_refused(
        json!({"type": "string"}),
        &["openAPIV3Schema.type: Invalid value: \"string\": must be object at the root"],
    );
    assert_refused(
        field(json!({})),
        &[&format!("{F}.type: Required value: must not be empty for specified object fields")],
    );
    assert_refused(
        field(json!({"type": "array"})),
        &[&format!("{F}.items: Required value: must be specified")],
    );
    assert_refused(
        field(json!({"type": "array", "items": {}})),
        &[&format!("{F}.items.type: Required value: must not be empty for specified array items")],
    );
    assert_refused(
        field(json!({"type": "object", "anyOf": [{"type": "object"}]})),
        &[&format!("{F}.anyOf[0].type: Forbidden: must be empty to be structural")],
    );
    assert_refused(
        field(json!({"type": "object", "anyOf": [{"properties": {"g": {"minLength": 1}}}]})),
        &[&format!("{F}.properties[g]: Required value: because it is defined in {F}.anyOf[0].properties[g]")],
    );
    assert_refused(
        field(json!({"type": "string", "pattern": "("})),
        &[&format!(
            "{F}.pattern: Invalid value: \"(\": must be a valid regular expression, but isn't: \
         error parsing regexp: `(` is no regular expression of RE2"
        )],
    );
    assert_refused(
        field(json!({"x-kubernetes-int-or-string": true, "x-kubernetes-preserve-unknown-fields": true})),
        &[&format!(
            "{F}.x-kubernetes-preserve-unknown-fields: Invalid value: true: \
             must be false if x-kubernetes-int-or-string is true"
        )],
    );
    assert_refused(
        json!({"type": "object", "properties": {"metadata": {"type": "object", "properties": {"labels": {"type": "object"}}}}}),
        &["openAPIV3Schema.properties[metadata]: Forbidden: \
           must not specify anything other than name and generateName, but metadata is implicitly specified"],
    );
    assert_refused(
        json!({"type": "object", "nullable": true}),
        &["openAPIV3Schema.nullable: Forbidden: nullable cannot be true at the root"],
    );
}

#[test]
fn keywords_that_no_definition_has_are_refused() {
    assert_refused(
        field(json!({"type": "string", "$ref": "#/x"})),
        &[&format!("{F}.$ref: Forbidden: $ref is not supported")],
    );
    assert_refused(
        field(json!({"type": "null"})),
        &[&format!("{F}.type: Forbidden: type cannot be set to null, use nullable as an alternative")],
    );
    assert_refused(
        field(json!({"type": "text"})),
        &[&format!(
            "{F}.type: Unsupported value: \"text\": supported values: \
         \"array\", \"boolean\", \"integer\", \"number\", \"object\", \"string\""
        )],
    );
    assert_refused(
        field(json!({"type": "array", "items": {"type": "string"}, "uniqueItems": true})),
        &[&format!(
            "{F}.uniqueItems: Forbidden: uniqueItems cannot be set to true since the runtime complexity becomes quadratic"
        )],
    );
    assert_refused(
        field(
            json!({"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "string"}}),
        ),
        &[&format!(
            "{F}.additionalProperties: Forbidden: additionalProperties and properties are mutual exclusive"
        )],
    );
    assert_refused(
        json!({"type": "object", "properties": {"kind": {"type": "string", "default": "K"}}}),
        &["openAPIV3Schema.properties[kind].default: Forbidden: must not be set in top-level kind"],
    );
    assert_refused(
        field(json!({"type": "object", "required": "a"})),
        &[&format!("{F}.required: Invalid value: \"a\": must be of type array of strings")],
    );
}

#[test]
fn the_keys_of_a_list_are_scalars_that_every_item_has() {
    let list = |items: Value| {
        field(json!({
            "type": "array", "items": items,
            "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
        }))
    };
    let item = json!({"type": "object", "properties": {"name": {"type": "string"}}});
    assert_refused(
        list(item),
        &[&format!(
            "{F}.items.properties[name].default: Required value: this property is in x-kubernetes-list-map-keys, \
         so it must have a default or be a required property"
        )],
    );
    let item = json!({"type": "object", "required": ["name"], "properties": {"name": {"type": "object"}}});
    assert_refused(
        list(item),
        &[&format!(
            "{F}.items.properties[name].type: Invalid value: \"object\": \
         must be a scalar type if parent array's x-kubernetes-list-type is map"
        )],
    );
    let item = json!({"type": "object", "properties": {"name": {"type": "string", "default": "a"}}});
    Schema::compile(&list(item)).unwrap();
    assert_refused(
        field(json!({"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "bag"})),
        &[&format!(
            "{F}.x-kubernetes-list-type: Unsupported value: \"bag\": supported values: \"atomic\", \"set\", \"map\""
        )],
    );
    assert_refused(
        field(json!({"type": "string", "x-kubernetes-map-type": "atomic"})),
        &[&format!(
            "{F}.type: Invalid value: \"string\": must be object if x-kubernetes-map-type is specified"
        )],
    );
}

#[test]
fn a_default_is_what_its_schema_permits() {
    assert_refused(
        field(json!({"type": "integer", "default": "a"})),
        &[&format!(
            "{F}.default: Invalid value: \"string\": {F}.default in body must be of type integer: \"string\""
        )],
    );
    assert_refused(
        field(json!({"type": "object", "default": {"a": 1}})),
        &[&format!("{F}.default: Invalid value: {{\"a\":1}}: must not have unknown fields")],
    );
    let rules = json!([{"rule": "self > 1"}]);
    assert_refused(
        field(json!({"type": "integer", "default": 1, "x-kubernetes-validations": rules})),
        &[&format!("{F}.default: Invalid value: 1: failed rule: self > 1")],
    );
}

#[test]
fn a_rule_that_does_not_compile_is_refused_with_its_place() {
    let refused = |rule: Value, expected: &str| {
        let schema = field(json!({
            "type": "object",
            "properties": {"a": {"type": "integer"}, "l": {"type": "array", "items": {"type": "string"}}},
            "x-kubernetes-validations": [rule],
        }));
        let errors = texts(&Schema::compile(&schema).expect_err("it was taken"));
        assert!(
            errors.len() == 1 && errors[0].starts_with(&format!("{F}.x-kubernetes-validations[0]")),
            "{errors:?}"
        );
        assert!(errors[0].ends_with(expected), "{errors:?} should end with {expected}");
    };
    refused(json!({"rule": "self.b == 1"}), "compilation failed: ERROR: undefined field 'b'");
    refused(json!({"rule": "self.a.b == 1"}), "type 'number' does not support field selection");
    refused(json!({"rule": "x == 1"}), "undeclared reference to 'x' (in container '')");
    refused(json!({"rule": "nothing(self.a)"}), "undeclared reference to 'nothing' (in container '')");
    refused(json!({"rule": "self.a.nothing()"}), "undeclared reference to 'nothing' (in container '')");
    refused(
        json!({"rule": "self.a"}),
        ".rule: Invalid value: {\"FieldPath\":\"\",\"Message\":\"\",\"MessageExpression\":\"\",\
        \"OptionalOldSelf\":null,\"Reason\":null,\"Rule\":\"self.a\"}: cel expression must evaluate to a bool",
    );
    refused(
        json!({"rule": "self.a == 'x'"}),
        "found no matching overload for '_==_' applied to '(number, string)'",
    );
    refused(
        json!({"rule": "self.l.all(x, x == 1)"}),
        "found no matching overload for '_==_' applied to '(string, number)'",
    );
    refused(json!({"rule": "Foo{a: 1} == self.a"}), "");
    refused(json!({"rule": " "}), "rule: Required value: rule is not specified");
    refused(json!({"rule": "true", "message": "a\nb"}), "must not contain line breaks");
    refused(json!({"rule": "true", "messageExpression": "1"}), "messageExpression must evaluate to a string");
    refused(json!({"rule": "true", "fieldPath": ".nothing"}), "must be a valid path");
    refused(
        json!({"rule": "true", "reason": "Because"}),
        "supported values: \"FieldValueDuplicate\", \
        \"FieldValueForbidden\", \"FieldValueInvalid\", \"FieldValueRequired\"",
    );
    refused(
        json!({"rule": "true", "optionalOldSelf": true}),
        "may not be set if oldSelf is not used in rule",
    );
}

#[test]
fn a_syntax_error_is_told_with_its_line() {
    let errors =
        Schema::compile(&json!({"type": "object", "x-kubernetes-validations": [{"rule": "true &&"}]}));
    let text = texts(&errors.expect_err("it was taken")).join("\n");
    assert!(text.contains("compilation failed: ERROR: <input>:1:"), "{text}");
    assert!(text.contains("\n | true &&\n | "), "{text}");
}

#[test]
fn old_values_of_items_without_keys_cannot_be_spoken_of() {
    let rules = json!([{"rule": "self == oldSelf"}]);
    assert_refused(
        field(json!({"type": "array", "items": {"type": "string", "x-kubernetes-validations": rules}})),
        &[&format!(
            "{F}.items.x-kubernetes-validations[0].rule: Invalid value: \"self == oldSelf\": \
             oldSelf cannot be used on the uncorrelatable portion of the schema within {F}"
        )],
    );
}

#[test]
fn a_hostile_schema_is_refused_and_ends() {
    let mut deep = json!({"type": "string"});
    for _ in 0..1000 {
        deep = json!({"type": "object", "properties": {"a": deep}});
    }
    assert!(Schema::compile(&deep).is_err());
    let mut deep = json!({"minLength": 1});
    for _ in 0..1000 {
        deep = json!({"not": deep});
    }
    assert!(Schema::compile(&field(json!({"type": "string", "not": deep}))).is_err());
    for rule in [
        "1+".repeat(8000) + "1 > 0",
        "(".repeat(8000),
        "-".repeat(8001) + "n > 0",
        "a.".repeat(8000) + "b",
        "[".repeat(5000),
        "self.all(x, ".repeat(1000),
    ] {
        let schema = json!({"type": "object", "x-kubernetes-validations": [{"rule": rule, "message": "m"}]});
        assert!(Schema::compile(&schema).is_err());
    }
    for value in [json!(null), json!(1), json!([]), json!({"type": 1, "properties": [], "items": 1})] {
        assert!(Schema::compile(&value).is_err());
    }
}
