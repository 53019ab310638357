use proptest::prelude::*;
use serde_json::json;

use super::*;

fn found(path: &str, value: &Value) -> Value {
    let path = JsonPath::compile(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let found: Value = path.evaluate(value).into_iter().cloned().collect();
    if let Value::Object(object) = value {
        let mut visits = VISITS_MAX;
        let in_place: Value =
            path.evaluate_in(object, Some(value), &mut visits).into_iter().cloned().collect();
        assert_eq!(in_place, found);
    }
    found
}

#[test]
fn paths_lead_where_kubernetes_leads_them() {
    let value = json!({
        "lists": [[1], [], [2]],
        "spec": {"a": 1, "b": {"c": "d"}, "list": [10, 20, 30], "null": null},
        "metadata": {"annotations": {"x.y/z": "dotted", "plain": "p"}},
        "status": {"conditions": [
            {"type": "Ready", "status": "True", "n": 3}, {"type": "Other", "status": "False", "n": 5, "deep": {"n": 1}}]},
    });
    for (path, expected) in [
        (".spec.a", json!([1])),
        (".spec.b.c", json!(["d"])),
        (".spec.none.c", json!([])),
        (".spec.a.c", json!([])),
        (".spec.null", json!([null])),
        (".spec.null.x", json!([])),
        (".spec.list[0]", json!([10])),
        (".spec.list[-1]", json!([30])),
        (".spec.list[3]", json!([])),
        (".spec.list[-4]", json!([])),
        (".spec.list[]", json!([10])),
        (".spec.list[*]", json!([10, 20, 30])),
        (".spec.list[1:]", json!([20, 30])),
        (".spec.list[:2]", json!([10, 20])),
        (".spec.list[0:3:2]", json!([10, 30])),
        (".spec.list[0:3:0]", json!([])),
        (".spec.list[2:1]", json!([])),
        (".spec.list[1:1]", json!([])),
        (".spec.list[0,2]", json!([10, 30])),
        (".spec.list.*", json!([10, 20, 30])),
        (".spec[0]", json!([])),
        (".metadata.annotations['x\\.y/z']", json!(["dotted"])),
        (".metadata.annotations.x\\.y/z", json!(["dotted"])),
        (".metadata.annotations['x.y/z']", json!([])),
        (".metadata.annotations.plain", json!(["p"])),
        (".status.conditions[?(@.type==\"Ready\")].status", json!(["True"])),
        (".status.conditions[?(@.type=='Ready')].status", json!(["True"])),
        (".status.conditions[?(@.type!=\"Ready\")].status", json!(["False"])),
        (".status.conditions[?(@.n>3)].type", json!(["Other"])),
        (".status.conditions[?(@.n >= 3)].type", json!(["Ready", "Other"])),
        (".status.conditions[?(@.deep)].type", json!(["Other"])),
        (".status.conditions[?(@.deep.n<=1)].type", json!(["Other"])),
        (".status.conditions[?(@.n==\"3\")].type", json!([])),
        (".status.conditions[?(@.n=3)].type", json!([])),
        (".status.conditions[*].type", json!(["Ready", "Other"])),
        ("..n", json!([3, 5, 1])),
        (".spec..c", json!(["d"])),
        ("$.spec.a", json!([1])),
        (".spec.a b", json!([])),
        (".", json!([])),
    ] {
        assert_eq!(found(path, &value), expected, "{path}");
    }
}

#[test]
fn what_is_no_path_is_refused() {
    for path in [
        ".a[",
        ".a[x]",
        ".a[1:2:3:4]",
        ".a['b",
        ".a[?(@.b",
        ".a[?(@.b)",
        ".a \"b",
        ".a}{.b",
        "....a",
        ".a[--1]",
        ".a\n.b",
    ] {
        assert!(JsonPath::compile(path).is_err(), "{path}");
    }
    assert!(JsonPath::compile(&".a".repeat(JSONPATH_BYTES_MAX)).is_err());
}

#[test]
fn an_evaluation_is_bounded() {
    let wide = json!({"a": vec![0; VISITS_MAX + 1]});
    assert_eq!(found(".a[*]", &wide), json!([]));
    assert_eq!(found("..b", &wide), json!([]));
    let some = json!({"a": vec![json!({"b": 1}); 200]});
    assert_eq!(found(".a[?(@.b==1)].b", &some).as_array().unwrap().len(), 200);
    // A union of unions of everything grows with each step, until it may not.
    let union = format!(".a{}", "[*,*,*,*]".repeat(20));
    let nested = (0..20).fold(json!(1), |value, _| json!([value, 1]));
    assert_eq!(found(&union, &json!({"a": nested})), json!([]));
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3..3i64).prop_map(Value::from),
        "[ab]".prop_map(Value::from)
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[ab]", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_text_is_compiled_and_evaluated_or_refused(
        path in "\\PC{0,30}|(\\.[ab*]?|\\.\\.|\\[(-?[0-3]|\\*|'[ab]'|:|0,1|\\?\\(@\\.[ab](==|<|!=|)(1|\"a\"|true|)\\))\\]){0,8}",
        value in value(),
    ) {
        if let Ok(path) = JsonPath::compile(&path) {
            prop_assert!(path.evaluate(&value).len() <= VISITS_MAX);
        }
    }

    #[test]
    fn fields_and_indices_lead_where_a_plain_walk_leads(steps in prop::collection::vec(prop_oneof!["[ab]".prop_map(Ok), (0..3usize).prop_map(Err)], 0..5), value in value()) {
        let text: String = steps.iter().map(|step| match step {
            Ok(field) => format!(".{field}"),
            Err(index) => format!("[{index}]"),
        }).collect();
        let plain = steps.iter().try_fold(&value, |at, step| match step {
            Ok(field) => at.get(field),
            Err(index) => at.get(index),
        });
        prop_assert_eq!(found(&text, &value), Value::from(plain.cloned().into_iter().collect::<Vec<_>>()), "{}", text);
    }
}
