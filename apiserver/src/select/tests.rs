use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;
use crate::field::FieldReason;
use crate::schema::{Node, Type};
use crate::status::{Cause, Reason};

fn pods() -> SelectableFields {
    SelectableFields::of_kind("", "Pod")
}

fn selected(selector: &str, labels: &[(&str, &str)]) -> bool {
    let selector = LabelSelector::parse(selector).unwrap_or_else(|error| panic!("{selector}: {error}"));
    selector.matches(|key| labels.iter().find(|label| label.0 == key).map(|label| label.1))
}

fn label_error(selector: &str) -> String {
    let error = LabelSelector::parse(selector).unwrap_err();
    assert_eq!(error.reason, Reason::BadRequest, "{selector}");
    error.message
}

#[test]
fn every_operator_of_label_selectors_selects_as_documented() {
    let labels = [("a", "b"), ("e", "x"), ("n", "7"), ("example.com/role", "")];
    for (selector, expected) in [
        ("", true),
        (" ", true),
        ("a=b", true),
        ("a==b", true),
        ("a = b , e=x", true),
        ("a=c", false),
        ("a!=b", false),
        ("a!=c", true),
        ("absent!=c", true),
        ("a", true),
        ("!a", false),
        ("!absent", true),
        ("absent", false),
        ("e in (x,y)", true),
        ("e in(y)", false),
        ("e notin (x,y)", false),
        ("e notin (y)", true),
        ("absent notin (y)", true),
        ("example.com/role", true),
        ("example.com/role=", true),
        ("example.com/role in ()", true),
        ("example.com/role in (,a)", true),
        ("a=", false),
        ("n>6", true),
        ("n>7", false),
        ("n<8", true),
        ("n<7", false),
        ("a>1", false),
        ("absent<1", false),
        ("a=b,c!=d,e in (x,y),!f,g notin (z)", true),
        ("in=in", false),
        ("notin notin (in,notin)", true),
    ] {
        assert_eq!(selected(selector, &labels), expected, "{selector}");
    }
}

#[test]
fn label_selectors_are_refused_with_the_texts_of_kubernetes() {
    for (selector, text) in [
        ("a,", "found '', expected: identifier after ','"),
        (",a", "found ',', expected: !, identifier, or 'end of string'"),
        ("a b", "unable to parse requirement: found 'b', expected: in, notin, =, ==, !=, gt, lt"),
        ("a in b", "unable to parse requirement: found 'b' expected: '('"),
        ("a in (", "unable to parse requirement: found '', expected: ',', ')' or identifier"),
        ("a in (b", "unable to parse requirement: found '', expected: ',' or ')'"),
        ("a in (b,", "unable to parse requirement: found '', expected: ',', or identifier"),
        ("a==,b=(", "unable to parse requirement: found '(', expected: identifier"),
        ("!a=b", "found '=', expected: ',' or 'end of string'"),
        ("!", "unable to parse requirement: found '', expected: identifier"),
        (
            "a>b",
            "unable to parse requirement: values[0]: Invalid value: \"b\": for 'Gt', 'Lt' operators, the value must be an integer",
        ),
        (
            "-a",
            "unable to parse requirement: <nil>: Invalid value: \"-a\": name part must consist of alphanumeric characters, '-', '_' or \
             '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for \
             validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')",
        ),
        (
            "a=-",
            "unable to parse requirement: values[0][a]: Invalid value: \"-\": a valid label must be an empty string or consist of \
             alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or \
             'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')",
        ),
    ] {
        assert_eq!(label_error(selector), text, "{selector}");
    }
    assert!(label_error("A.b/c").contains("prefix part a lowercase RFC 1123 subdomain"));
    assert!(label_error("/c").contains("prefix part must be non-empty"));
    assert!(label_error("a/b/c").contains("with an optional DNS subdomain prefix"));
    assert!(label_error(&"a".repeat(64)).contains("name part must be no more than 63 bytes"));
    assert!(label_error(&format!("a={}", "b".repeat(64))).contains("must be no more than 63 bytes"));
}

#[test]
fn the_object_form_of_a_label_selector_selects_as_the_text_does() {
    let selector = json!({"matchLabels": {"a": "b"}, "matchExpressions": [
        {"key": "e", "operator": "In", "values": ["y", "x"]}, {"key": "f", "operator": "DoesNotExist"},
        {"key": "g", "operator": "NotIn", "values": ["z"]}, {"key": "h", "operator": "Exists"}]});
    let selector = LabelSelector::from_object(&selector).unwrap();
    assert_eq!(selector.to_string(), "a=b,e in (x,y),!f,g notin (z),h");
    assert_eq!(LabelSelector::parse(&selector.to_string()).unwrap(), selector);
    assert!(LabelSelector::from_object(&json!({})).unwrap().is_everything());
    for (selector, text) in [
        (
            json!({"matchExpressions": [{"key": "a", "operator": "Gt"}]}),
            "\"Gt\" is not a valid label selector operator",
        ),
        (
            json!({"matchExpressions": [{"key": "a", "operator": "In"}]}),
            "values: Invalid value: []: for 'in', 'notin' operators, values set can't be empty",
        ),
        (
            json!({"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}),
            "values: Invalid value: [\"b\"]: values set must be empty for exists and does not exist",
        ),
    ] {
        assert_eq!(LabelSelector::from_object(&selector).unwrap_err().message, text);
    }
}

#[test]
fn selectors_beyond_their_bounds_are_refused() {
    assert!(label_error(&"a".repeat(SELECTOR_BYTES_MAX + 1)).contains("at most 65536"));
    assert!(label_error(&vec!["a"; SELECTOR_TERMS_MAX + 1].join(",")).contains("at most 256"));
    assert!(LabelSelector::parse(&vec!["a"; SELECTOR_TERMS_MAX].join(",")).is_ok());
    let terms = vec!["metadata.name=a"; SELECTOR_TERMS_MAX + 1].join(",");
    assert!(FieldSelector::parse(&terms, &pods()).unwrap_err().message.contains("256"));
    assert!(
        FieldSelector::parse(&"a".repeat(SELECTOR_BYTES_MAX + 1), &pods())
            .unwrap_err()
            .message
            .contains("65536")
    );
}

#[test]
fn metadata_is_read_without_the_rest_of_the_object() {
    let json = br#"{"apiVersion":"v1","metadata":{"annotations":{"a":"\n"},"deletionTimestamp":"2026-01-01T00:00:00Z","labels":{"a":"b","c\u0041":"\u0042"},
        "managedFields":[{}],"name":"n","namespace":"s","resourceVersion":"7","uid":null},"spec":{"not json"#;
    let meta = Meta::read(json).unwrap();
    assert_eq!((&*meta.name, &*meta.namespace, &*meta.resource_version, &*meta.uid), ("n", "s", "7", ""));
    assert_eq!(&*meta.deletion_timestamp, "2026-01-01T00:00:00Z");
    assert_eq!((meta.label("a"), meta.label("cA"), meta.label("c")), (Some("b"), Some("B"), None));
    assert_eq!(meta.labels().count(), 2);
    assert_eq!(Meta::read(b"{}").unwrap(), Meta::default());
    assert_eq!(Meta::read(br#"{"metadata":null}"#).unwrap(), Meta::default());
    assert_eq!(Meta::read(br#"{"metadata":{"labels":null}}"#).unwrap(), Meta::default());
    for bad in [&b"[]"[..], b"{", b"", br#"{"metadata":7}"#, br#"{"metadata":{"labels":{"a":7}}}"#] {
        assert!(Meta::read(bad).is_err(), "{}", String::from_utf8_lossy(bad));
    }
}

fn by_fields(selector: &str, fields: &SelectableFields, object: &Value) -> bool {
    let selector =
        FieldSelector::parse(selector, fields).unwrap_or_else(|error| panic!("{selector}: {error}"));
    let text = object.to_string();
    let from_text = selector.matches(text.as_bytes()).unwrap();
    let meta = Meta::read(text.as_bytes()).unwrap();
    assert_eq!(selector.matches_read(&meta, text.as_bytes()).unwrap(), from_text);
    assert_eq!(selector.matches_object(object.as_object().unwrap()), from_text, "text and object disagree");
    from_text
}

#[test]
fn the_fields_of_the_core_kinds_are_selected_by() {
    let pod = json!({"metadata": {"name": "a", "namespace": "n"}, "spec": {"nodeName": "x", "hostNetwork": true, "restartPolicy": "Never"},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "::1"}], "podIP": "ignored"}});
    for (selector, expected) in [
        ("", true),
        ("metadata.name=a", true),
        ("metadata.name==a,metadata.namespace=n", true),
        ("metadata.name!=a", false),
        ("spec.nodeName=x,spec.host=x", true),
        ("spec.hostNetwork=true", true),
        ("spec.schedulerName=", true),
        ("spec.restartPolicy!=Never", false),
        ("status.phase=Running,status.podIP=10.0.0.1", true),
        ("status.podIPs=10.0.0.1", false),
        ("status.nominatedNodeName!=", false),
    ] {
        assert_eq!(by_fields(selector, &pods(), &pod), expected, "{selector}");
    }
    assert!(by_fields("spec.hostNetwork=false", &pods(), &json!({"spec": {}})));
    let nodes = SelectableFields::of_kind("", "Node");
    assert!(by_fields("spec.unschedulable=false", &nodes, &json!({"spec": {}})));
    assert!(by_fields("spec.unschedulable=true", &nodes, &json!({"spec": {"unschedulable": true}})));
    let events = SelectableFields::of_kind("", "Event");
    let event = json!({"involvedObject": {"kind": "Pod", "name": "a,b"}, "reason": "R", "reportingComponent": "c", "source": {}});
    assert!(by_fields(
        "involvedObject.kind=Pod,involvedObject.name=a\\,b,reason=R,source=c,type=",
        &events,
        &event
    ));
    let new_events = SelectableFields::of_kind("events.k8s.io", "Event");
    assert!(by_fields("regarding.kind=Pod,reportingController=c,regarding.uid=", &new_events, &event));
    assert!(by_fields("involvedObject.name=x", &events, &json!({"regarding": {"name": "x"}})));
    assert!(FieldSelector::parse("source=c", &new_events).is_err());
    assert!(by_fields("status.podIP=10.0.0.9", &pods(), &json!({"status": {"podIP": "10.0.0.9"}})));
    assert!(by_fields("type=Opaque", &SelectableFields::of_kind("", "Secret"), &json!({"type": "Opaque"})));
    assert!(by_fields(
        "status.phase=Active",
        &SelectableFields::of_kind("", "Namespace"),
        &json!({"status": {"phase": "Active"}})
    ));
}

#[test]
fn a_field_that_a_kind_does_not_offer_is_refused() {
    let error = |selector: &str, group, kind| {
        let error = FieldSelector::parse(selector, &SelectableFields::of_kind(group, kind)).unwrap_err();
        assert_eq!(error.reason, Reason::BadRequest);
        error.message
    };
    assert_eq!(error("spec.a=b", "", "Pod"), "field label not supported: spec.a");
    assert_eq!(error("metadata.namespace=b", "", "Node"), "field label not supported: metadata.namespace");
    assert_eq!(
        error("spec.a=b", "", "ConfigMap"),
        "\"spec.a\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\""
    );
    assert_eq!(error("a", "", "Pod"), "invalid selector: 'a'; can't understand 'a'");
    assert_eq!(error("spec.x=b,b,a", "", "Pod"), "invalid selector: 'spec.x=b,b,a'; can't understand 'a'");
    assert_eq!(
        error("metadata.name=a=b", "", "Pod"),
        "invalid field selector: unescaped character in value: 61"
    );
    assert_eq!(error("metadata.name=\\a", "", "Pod"), "invalid field selector: invalid escape sequence: \\a");
    assert_eq!(error("metadata.name=\\", "", "Pod"), "invalid field selector: invalid escape sequence: \\");
}

#[test]
fn the_selectable_fields_of_a_definition_are_checked_and_selected_by() {
    let leaf = |r#type| Node { r#type, ..Node::default() };
    let object = |properties: Vec<(&str, Node)>| Node {
        r#type: Type::Object,
        properties: properties.into_iter().map(|(name, node)| (name.to_owned(), node)).collect(),
        ..Node::default()
    };
    let spec =
        object(vec![("size", leaf(Type::Integer)), ("list", leaf(Type::Array)), ("on", leaf(Type::Boolean))]);
    let schema = object(vec![("spec", spec), ("metadata", object(vec![("name", leaf(Type::String))]))]);
    let check = |paths: &[&str]| {
        let paths: Vec<_> = paths.iter().map(|&path| path.to_owned()).collect();
        SelectableFields::check(&paths, &schema, "spec.selectableFields")
    };
    assert_eq!(check(&[".spec.size", ".spec.on"]), []);
    for (path, reason, message) in [
        ("", "FieldValueRequired", "Required value"),
        (
            "spec",
            "FieldValueInvalid",
            "Invalid value: \"spec\": is an invalid path: expected [ or . but got: spec",
        ),
        (
            ".spec.none",
            "FieldValueInvalid",
            "Invalid value: \".spec.none\": is an invalid path: does not refer to a valid field",
        ),
        (
            ".spec.",
            "FieldValueInvalid",
            "Invalid value: \".spec.\": is an invalid path: unexpected end of JSON path",
        ),
        (
            ".spec.list[0]",
            "FieldValueInvalid",
            "Invalid value: \".spec.list[0]\": is an invalid path: array notation is not allowed",
        ),
        (
            ".spec.list",
            "FieldValueInvalid",
            "Invalid value: \".spec.list\": must point to a field of type string, boolean or integer. Enum string fields and strings \
             with formats are allowed.",
        ),
        (
            ".metadata.name",
            "FieldValueInvalid",
            "Invalid value: \".metadata.name\": must not point to fields in metadata",
        ),
    ] {
        let field = "spec.selectableFields[0].jsonPath".to_owned();
        let told: Vec<_> = check(&[path]).iter().map(Cause::from).collect();
        assert_eq!(told, [Cause { reason: reason.to_owned(), message: message.to_owned(), field }]);
    }
    let twice = check(&[".spec.on", ".spec.on"]);
    assert_eq!(twice[0].reason, FieldReason::Duplicate);
    assert_eq!(twice[0].body(), "Duplicate value: \".spec.on\"");
    let fields = SelectableFields::of_custom(&[".spec.size".to_owned(), ".spec.on".to_owned()], true);
    let custom = json!({"metadata": {"name": "a", "namespace": "n"}, "spec": {"size": 7, "on": false}});
    assert!(by_fields("spec.size=7,spec.on=false,metadata.namespace=n", &fields, &custom));
    assert!(by_fields("spec.size=,spec.on!=false", &fields, &json!({})));
    let message = FieldSelector::parse("spec.other=1", &fields).unwrap_err().message;
    assert_eq!(message, "field label not supported: spec.other");
    assert_eq!(FieldSelector::parse("metadata.name=a", &fields).unwrap().name(), Some("a"));
    assert_eq!(FieldSelector::parse("metadata.name!=a", &fields).unwrap().name(), None);
}

/// One requirement, as its text and as what it means.
type Term = (String, Box<dyn Fn(&BTreeMap<String, String>) -> bool>);

fn term() -> impl Strategy<Value = (usize, String, Vec<String>)> {
    (0..9usize, "[a-d]", prop::collection::vec("[x-z]|[0-9]|", 1..4))
}

fn meaning((operator, key, values): (usize, String, Vec<String>)) -> Term {
    let value = values[0].clone();
    let number = value.parse::<i64>().unwrap_or(3);
    let list = values.join(", ");
    let label = |labels: &BTreeMap<String, String>, key: &str| {
        labels.get(key).and_then(|label| label.parse::<i64>().ok())
    };
    match operator {
        0 => (format!("{key}={value}"), Box::new(move |labels| labels.get(&key) == Some(&value))),
        1 => (format!("{key} =={value}"), Box::new(move |labels| labels.get(&key) == Some(&value))),
        2 => (format!("{key}!= {value}"), Box::new(move |labels| labels.get(&key) != Some(&value))),
        3 => (
            format!("{key} in ({list})"),
            Box::new(move |labels| labels.get(&key).is_some_and(|l| values.contains(l))),
        ),
        4 => (
            format!("{key} notin({list})"),
            Box::new(move |labels| !labels.get(&key).is_some_and(|l| values.contains(l))),
        ),
        5 => (key.clone(), Box::new(move |labels| labels.contains_key(&key))),
        6 => (format!("! {key}"), Box::new(move |labels| !labels.contains_key(&key))),
        7 => (
            format!("{key}>{number}"),
            Box::new(move |labels| label(labels, &key).is_some_and(|l| l > number)),
        ),
        _ => (
            format!("{key}<{number}"),
            Box::new(move |labels| label(labels, &key).is_some_and(|l| l < number)),
        ),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn label_selectors_select_as_a_naive_reading_of_their_terms_does(
        terms in prop::collection::vec(term(), 0..5),
        labels in prop::collection::btree_map("[a-d]", "[x-z]|[0-9]|", 0..5),
    ) {
        let terms: Vec<Term> = terms.into_iter().map(meaning).collect();
        let text = terms.iter().map(|term| term.0.as_str()).collect::<Vec<_>>().join(" ,");
        let expected = terms.iter().all(|term| (term.1)(&labels));
        let selection = Selection::parse(&text, "", &pods()).unwrap();
        let object = json!({"spec": {}, "metadata": {"name": "a", "labels": labels}});
        prop_assert_eq!(selection.matches(object.to_string().as_bytes()).unwrap(), expected, "{}", text);
        prop_assert_eq!(selection.matches_object(object.as_object().unwrap()), expected);
        // Its canonical text says the same.
        prop_assert_eq!(&LabelSelector::parse(&selection.labels.to_string()).unwrap(), &selection.labels);
    }

    #[test]
    fn field_selectors_select_as_a_naive_reading_of_their_terms_does(
        terms in prop::collection::vec((prop::sample::select(vec!["metadata.name", "spec.nodeName", "status.phase"]), any::<bool>(), "[ab,=\\\\]{0,2}"), 0..4),
        values in prop::collection::btree_map(prop::sample::select(vec!["metadata.name", "spec.nodeName", "status.phase"]), "[ab,=\\\\]{0,2}", 0..4),
    ) {
        let escape = |value: &str| value.replace('\\', "\\\\").replace(',', "\\,").replace('=', "\\=");
        let text = terms.iter().map(|(field, is_equal, value)| format!("{field}{}{}", if *is_equal { "=" } else { "!=" }, escape(value)));
        let text = text.collect::<Vec<_>>().join(",");
        let mut object = json!({});
        for (path, value) in &values {
            let (parent, key) = path.split_once('.').unwrap();
            object[parent][key] = Value::from(value.as_str());
        }
        let naive = terms.iter().all(|(field, is_equal, value)| {
            (values.get(field).map_or("", String::as_str) == value) == *is_equal
        });
        prop_assert_eq!(by_fields(&text, &pods(), &object), naive, "{}", text);
    }

    #[test]
    fn any_text_is_read_as_a_selector_or_refused(text in "\\PC{0,40}|[a-c=!<>(),. \\\\/in]{0,40}") {
        if let Ok(selector) = LabelSelector::parse(&text) {
            prop_assert_eq!(&LabelSelector::parse(&selector.to_string()).unwrap(), &selector);
        }
        let _ = FieldSelector::parse(&text, &pods());
    }

    #[test]
    fn any_bytes_are_read_as_an_object_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        let selection = Selection::parse("a=b", "spec.nodeName=a", &pods()).unwrap();
        let _ = selection.matches(&bytes);
    }

    #[test]
    fn metadata_reads_as_from_the_whole_object(labels in prop::collection::btree_map("\\PC{0,8}", "\\PC{0,8}", 0..5), name in "\\PC{0,8}") {
        let object = json!({"kind": "A", "metadata": {"labels": labels, "name": name, "x": [{}]}, "spec": {}}).to_string();
        let meta = Meta::read(object.as_bytes()).unwrap();
        prop_assert_eq!(&*meta.name, name.as_str());
        let read: Map<String, Value> = meta.labels().map(|(key, value)| (key.to_owned(), Value::from(value))).collect();
        prop_assert_eq!(Value::Object(read), json!(labels));
    }
}
