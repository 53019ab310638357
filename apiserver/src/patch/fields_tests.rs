use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::json as value;

use super::*;

const ALL: usize = usize::MAX;

fn parse(text: &str) -> Set {
    Set::read(&serde_json::from_str(text).unwrap()).unwrap()
}

fn text(set: &Set) -> String {
    serde_json::to_string(set).unwrap()
}

#[test]
fn a_set_is_written_in_the_order_of_kubernetes() {
    // Fields before items; items by their numbers as numbers, which as text stand the other way round.
    let written = concat!(
        r#"{"f:a":{".":{},"f:b":{}},"f:list":{"k:{\"port\":80}":{".":{},"f:name":{}},"#,
        r#""k:{\"port\":443,\"protocol\":\"TCP\"}":{}},"f:set":{"v:9":{},"v:10":{},"v:\"a\"":{},"v:true":{}},"i:2":{},"i:10":{}}"#
    );
    let read = parse(written);
    assert_eq!(text(&read), written);
    assert_eq!(parse(&serde_json::to_string(&serde_json::to_value(&read).unwrap()).unwrap()), read);
}

#[test]
fn values_are_escaped_as_go_does() {
    let set = parse(r#"{"v:\"<a&b>\"":{},"v:2.0":{},"f:<b>":{}}"#);
    assert_eq!(text(&set), r#"{"f:<b>":{},"v:2":{},"v:\"\\u003ca\\u0026b\\u003e\"":{}}"#);
}

#[test]
fn what_is_unknown_is_passed_over_and_what_is_malformed_is_told() {
    assert_eq!(parse(r#"{"z:new":{},"f:a":{"z:new":{}}}"#), parse(r#"{"f:a":{}}"#));
    assert_eq!(parse(r#"{"f:a":null}"#), parse(r#"{"f:a":{".":{}}}"#));
    for malformed in [
        r#"{"a":{}}"#,
        r#"{"ff:a":{}}"#,
        r#"{"k:1":{}}"#,
        r#"{"v:":{}}"#,
        r#"{"i:x":{}}"#,
        r#"{"f:a":1}"#,
        "[]",
    ] {
        assert!(Set::read(&serde_json::from_str(malformed).unwrap()).is_err(), "{malformed}");
    }
}

#[test]
fn paths_are_told_as_kubernetes_tells_them() {
    let set = parse(
        r#"{"f:spec":{"f:replicas":{},"f:list":{"k:{\"name\":\"a\",\"port\":1}":{"f:x":{}}},"f:set":{"v:5":{}}},"f:z":{"i:3":{}}}"#,
    );
    assert_eq!(
        set.paths(ALL),
        [".spec.replicas", r#".spec.list[name="a",port=1].x"#, ".spec.set[=5]", ".z[3]"]
    );
}

#[test]
fn paths_are_as_long_as_allowed_and_no_longer() {
    let set = parse(r#"{"f:long":{"f:a":{},"f:b":{},"f:c":{"f:d":{}}},"f:x":{}}"#);
    assert_eq!(set.paths(ALL), [".x", ".long.a", ".long.b", ".long.c.d"]);
    assert_eq!(set.paths(10), [".x", ".long.a"]);
    assert_eq!((set.paths(1), set.len()), (vec![], 4));
}

#[test]
fn numbers_are_ordered_by_what_they_are_worth() {
    let ascending = [
        value!(-1),
        value!(0.5),
        value!(1),
        value!(9_007_199_254_740_993_i64),
        value!(1e300),
        value!("a"),
        value!(null),
    ];
    for pair in ascending.windows(2) {
        assert_eq!(compare(&pair[0], &pair[1]), Ordering::Less, "{pair:?}");
        assert_eq!(compare(&pair[1], &pair[0]), Ordering::Greater);
    }
    assert_eq!(compare(&value!(1), &value!(1.0)), Ordering::Equal);
    assert_eq!(
        compare(&value!(9_007_199_254_740_993_i64), &value!(9_007_199_254_740_992.0)),
        Ordering::Greater
    );
}

fn any_element() -> impl Strategy<Value = Element> {
    let scalar = || {
        prop_oneof![
            any::<i64>().prop_map(Value::from),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(|n| Value::from(f64::from(n) / 8.0)),
            "\\PC{0,3}".prop_map(Value::from),
        ]
        .prop_map(Ordered)
    };
    prop_oneof![
        "\\PC{0,3}".prop_map(Element::Field),
        "[a-c]".prop_map(Element::Field),
        prop::collection::btree_map("[a-c]", scalar(), 1..3).prop_map(Element::Key),
        scalar().prop_map(Element::Value),
        (0i64..3).prop_map(Element::Index),
    ]
}

fn any_set() -> impl Strategy<Value = Set> {
    let leaf = Just(Slot::member());
    let slot = leaf.prop_recursive(4, 30, 5, |inner| {
        (any::<bool>(), prop::collection::btree_map(any_element(), inner, 1..5))
            .prop_map(|(is_member, below)| Slot { is_member, below: Set(below) })
    });
    prop::collection::btree_map(any_element(), slot, 0..5).prop_map(Set)
}

proptest! {
    #[test]
    fn a_set_that_is_written_and_read_is_the_same(set in any_set()) {
        prop_assert_eq!(&parse(&text(&set)), &set);
        prop_assert_eq!(&Set::read(&serde_json::to_value(&set).unwrap()).unwrap(), &set);
    }

    #[test]
    fn sets_combine_as_sets_of_paths(left in any_set(), right in any_set()) {
        let paths = |set: &Set| set.paths(ALL).into_iter().collect::<BTreeSet<String>>();
        let both: BTreeSet<String> = paths(&left).union(&paths(&right)).cloned().collect();
        prop_assert_eq!(paths(&left.union(&right)), both);
        prop_assert_eq!(left.difference(&right).union(&left.intersection(&right)), left.clone());
        prop_assert!(left.difference(&right).intersection(&right).is_empty());
        prop_assert_eq!(left.union(&right), right.union(&left));
        prop_assert_eq!(left.union(&right).len() + left.intersection(&right).len(), left.len() + right.len());
    }
}
