use proptest::prelude::*;
use serde_json::{Map, Value, json};

use crate::schema::Schema;

/// Schemas as a definition may have them.
fn schema() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        (any::<bool>(), option(0..9i64)).prop_map(|(nullable, minimum)| {
            let mut schema = json!({"type": "integer", "nullable": nullable});
            if let Some(minimum) = minimum {
                schema["minimum"] = json!(minimum);
                schema["default"] = json!(minimum);
            }
            schema
        }),
        (any::<bool>(), option(0..3u64)).prop_map(|(nullable, min)| {
            let mut schema = json!({"type": "string", "nullable": nullable});
            if let Some(min) = min {
                schema["minLength"] = json!(min);
                schema["default"] = json!("a".repeat(3));
            }
            schema
        }),
        Just(json!({"type": "boolean"})),
        Just(json!({"x-kubernetes-int-or-string": true})),
        Just(json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})),
    ];
    leaf.prop_recursive(4, 40, 4, |inner| {
        prop_oneof![
            (prop::collection::btree_map("[a-c]", inner.clone(), 0..4), any::<bool>(), any::<bool>())
                .prop_map(|(properties, preserves, has_default)| {
                    let mut schema = json!({"type": "object", "properties": properties});
                    if preserves {
                        schema["x-kubernetes-preserve-unknown-fields"] = json!(true);
                    }
                    if has_default {
                        schema["default"] = json!({});
                    }
                    schema
                }),
            inner.clone().prop_map(|values| json!({"type": "object", "additionalProperties": values})),
            inner.prop_map(|items| json!({"type": "array", "items": items})),
        ]
    })
    .prop_map(|schema| json!({"type": "object", "properties": {"spec": schema}}))
}

fn option<S: Strategy>(strategy: S) -> impl Strategy<Value = Option<S::Value>> {
    prop::option::of(strategy)
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-5..20i64).prop_map(Value::from),
        "[a-c]{0,4}".prop_map(Value::from),
        (0..40u8).prop_map(|n| json!(f64::from(n) / 4.0)),
    ];
    leaf.prop_recursive(5, 60, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-d]", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

/// Anything at all in the place of a schema.
fn noise() -> impl Strategy<Value = Value> {
    let words = prop::sample::select(vec![
        "type",
        "object",
        "array",
        "string",
        "properties",
        "items",
        "additionalProperties",
        "default",
        "enum",
        "pattern",
        "required",
        "nullable",
        "allOf",
        "anyOf",
        "oneOf",
        "not",
        "metadata",
        "kind",
        "x-kubernetes-validations",
        "rule",
        "x-kubernetes-list-type",
        "map",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-int-or-string",
        "minimum",
        "[",
        "self",
        "x-kubernetes-embedded-resource",
        "x-kubernetes-preserve-unknown-fields",
        "fieldPath",
        ".a['b']",
        "self.a == oldSelf",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|number| json!(number)),
        words.clone().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 60, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((words.clone(), inner), 0..5).prop_map(|entries| {
                Value::Object(entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
            }),
        ]
    })
}

proptest! {
    #[test]
    fn to_prune_and_to_fill_twice_is_as_once(schema in schema(), spec in value()) {
        let Ok(schema) = Schema::compile(&schema) else { return Ok(()) };
        let mut once = json!({"spec": spec});
        schema.prune(&mut once);
        schema.default(&mut once);
        let mut twice = once.clone();
        prop_assert_eq!(schema.prune(&mut twice), Vec::<String>::new());
        prop_assert_eq!(&twice, &once);
        schema.default(&mut twice);
        prop_assert_eq!(&twice, &once);
    }

    #[test]
    fn a_valid_object_stays_valid(schema in schema(), spec in value()) {
        let Ok(schema) = Schema::compile(&schema) else { return Ok(()) };
        let mut object = json!({"spec": spec});
        if schema.validate(&object, None).is_empty() {
            schema.prune(&mut object);
            schema.default(&mut object);
            prop_assert_eq!(schema.validate(&object, None), []);
        }
        prop_assert_eq!(schema.validate(&object, Some(&object)), []);
    }

    #[test]
    fn what_comes_is_answered(schema in noise(), object in value()) {
        let schema = json!({"type": "object", "properties": {"spec": schema}});
        if let Ok(schema) = Schema::compile(&schema) {
            let mut object = json!({"spec": object});
            schema.validate(&object, None);
            schema.prune(&mut object);
            schema.default(&mut object);
            schema.validate(&object, Some(&json!({"spec": {}})));
        }
    }
}
