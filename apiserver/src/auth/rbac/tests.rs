use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

pub fn object(value: Value) -> Object {
    value.as_object().unwrap().clone()
}

pub fn meta(kind: &str, namespace: &str, name: &str, rest: Value) -> Object {
    let mut whole = object(
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": name}}),
    );
    if !namespace.is_empty() {
        whole["metadata"]["namespace"] = json!(namespace);
    }
    whole.extend(object(rest));
    whole
}

pub fn rule(verbs: &[&str], groups: &[&str], resources: &[&str]) -> Value {
    json!({"verbs": verbs, "apiGroups": groups, "resources": resources})
}

pub fn bind(namespace: &str, name: &str, role: (&str, &str), subject: Value) -> Object {
    let kind = if namespace.is_empty() { "ClusterRoleBinding" } else { "RoleBinding" };
    let role = json!({"apiGroup": GROUP, "kind": role.0, "name": role.1});
    meta(kind, namespace, name, json!({"roleRef": role, "subjects": [subject]}))
}

pub fn policy(objects: &[Object]) -> Policy {
    let mut policy = Policy::default();
    policy.apply(objects.iter().map(Change::Put));
    policy
}

pub fn user(name: &str, groups: &[&str]) -> User {
    User {
        name: name.to_owned(),
        groups: groups.iter().map(|group| (*group).to_owned()).collect(),
        ..User::default()
    }
}

pub fn on<'a>(group: &'a str, resource: &'a str, namespace: &'a str, name: &'a str) -> Target<'a> {
    let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
    Target::Resource { group, resource, subresource, namespace, name }
}

#[test]
fn who_may_not_is_told_as_kubernetes_tells_it() {
    let disk = on("virtualization.deckhouse.io", "virtualdisks", "d", "x");
    let status = forbidden(&user("u", &[]), "get", &disk, "");
    assert_eq!(
        status.message,
        "virtualdisks.virtualization.deckhouse.io \"x\" is forbidden: User \"u\" cannot get resource \"virtualdisks\" in API group \
         \"virtualization.deckhouse.io\" in the namespace \"d\""
    );
    assert_eq!(status.reason.code(), 403);
    assert_eq!((&*status.details.name, &*status.details.kind), ("x", "virtualdisks"));
    assert_eq!(status.details.group, "virtualization.deckhouse.io");
    let list = forbidden(&user("u", &[]), "list", &on("", "pods/log", "", ""), "RBAC: because");
    assert_eq!(
        list.message,
        "pods is forbidden: User \"u\" cannot list resource \"pods/log\" in API group \"\" at the cluster scope: RBAC: because"
    );
    let path = forbidden(&user("<u>\n\"", &[]), "get", &Target::Path("/metrics"), "");
    assert_eq!(path.message, "forbidden: User \"&lt;u&gt;\\n\\\"\" cannot get path \"/metrics\"");
}

#[test]
fn a_rule_reaches_as_far_as_its_binding() {
    let policy = policy(&[
        meta("ClusterRole", "", "read", json!({"rules": [rule(&["get", "list"], &[""], &["pods"])]})),
        meta("Role", "a", "own", json!({"rules": [rule(&["*"], &["*"], &["*"])]})),
        bind("", "everywhere", ("ClusterRole", "read"), json!({"kind": "User", "name": "anna"})),
        bind("a", "here", ("ClusterRole", "read"), json!({"kind": "Group", "name": "dev"})),
        bind("a", "own", ("Role", "own"), json!({"kind": "ServiceAccount", "name": "robot"})),
        bind("b", "none", ("Role", "own"), json!({"kind": "User", "name": "bert"})),
    ]);
    let may = |user: &User, verb, target: &Target<'_>| policy.authorize(user, verb, target).allowed;
    let (anna, dev) = (user("anna", &[]), user("x", &["dev"]));
    assert!(may(&anna, "get", &on("", "pods", "a", "p")) && may(&anna, "list", &on("", "pods", "", "")));
    assert!(
        !may(&anna, "delete", &on("", "pods", "a", "p")) && !may(&anna, "get", &on("", "pods/log", "a", "p"))
    );
    assert!(may(&dev, "get", &on("", "pods", "a", "p")));
    assert!(!may(&dev, "get", &on("", "pods", "b", "p")) && !may(&dev, "list", &on("", "pods", "", "")));
    let robot = User::service_account("a", "robot", "1");
    assert!(
        may(&robot, "delete", &on("any", "thing/sub", "a", "p"))
            && !may(&robot, "get", &on("", "pods", "b", "p"))
    );
    assert!(!may(&user("dev", &[]), "get", &on("", "pods", "a", "p")), "a user is no group");
    let reason =
        |user: &User, namespace| policy.authorize(user, "get", &on("", "pods", namespace, "p")).reason;
    assert_eq!(
        reason(&anna, "b"),
        r#"RBAC: allowed by ClusterRoleBinding "everywhere" of ClusterRole "read" to User "anna""#
    );
    assert_eq!(
        reason(&dev, "a"),
        r#"RBAC: allowed by RoleBinding "here/a" of ClusterRole "read" to Group "dev""#
    );
    assert_eq!(
        reason(&robot, "a"),
        r#"RBAC: allowed by RoleBinding "own/a" of Role "own" to ServiceAccount "robot/a""#
    );
    assert_eq!(reason(&user("bert", &[]), "b"), r#"RBAC: role.rbac.authorization.k8s.io "own" not found"#);
    assert_eq!(reason(&user("nobody", &[]), "a"), "");
    assert!(may(&user("root", &["system:masters"]), "anything", &Target::Path("/x")));
}

#[test]
fn rules_match_subresources_names_and_paths() {
    let one = |value: Value| Rule::from_json(&value).unwrap();
    for (resources, asked, allowed) in [
        (json!(["pods"]), "pods", true),
        (json!(["pods"]), "pods/log", false),
        (json!(["pods/log"]), "pods/log", true),
        (json!(["pods/log"]), "pods", false),
        (json!(["*/log"]), "pods/log", true),
        (json!(["*/log"]), "pods", false),
        (json!(["*/log"]), "log", false),
        (json!(["*/g"]), "pods/log", false),
        (json!(["*"]), "pods/log", true),
        (json!(["pods/*"]), "pods/log", false),
    ] {
        let rule = one(json!({"verbs": ["get"], "apiGroups": [""], "resources": resources}));
        assert_eq!(rule.allows("get", &on("", asked, "d", "x")), allowed, "{resources} {asked}");
    }
    let named =
        one(json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["a", "b"]}));
    assert!(named.allows("get", &on("", "pods", "d", "b")));
    assert!(
        !named.allows("get", &on("", "pods", "d", "c")) && !named.allows("get", &on("", "pods", "d", ""))
    );
    for (url, path, allowed) in [
        ("/healthz", "/healthz", true),
        ("/healthz", "/healthz/etcd", false),
        ("/healthz/*", "/healthz/etcd", true),
        ("/healthz/*", "/healthz", false),
        ("*", "/any", true),
        ("/api*", "/apis", true),
    ] {
        let rule = one(json!({"verbs": ["get"], "nonResourceURLs": [url]}));
        assert_eq!(rule.allows("get", &Target::Path(path)), allowed, "{url} {path}");
        assert!(!rule.allows("get", &on("", "pods", "", "")));
    }
    // A list that cannot be read does not make a rule of all names.
    for broken in
        [json!({"resourceNames": [1]}), json!({"verbs": "get"}), json!({"resourceNames": {}}), json!([])]
    {
        assert_eq!(Rule::from_json(&broken), None);
    }
}

fn labelled(name: &str, labels: Value, rest: Value) -> Object {
    let mut role = meta("ClusterRole", "", name, rest);
    role["metadata"]["labels"] = labels;
    role
}

fn gathering(name: &str, labels: Value, selectors: Value) -> Object {
    // What is written in its rules is of no meaning.
    let own = json!([rule(&["own"], &["*"], &["*"])]);
    labelled(name, labels, json!({"aggregationRule": {"clusterRoleSelectors": selectors}, "rules": own}))
}

fn verbs(policy: &Policy, role: &str) -> Vec<String> {
    let mut verbs: Vec<String> =
        policy.cluster_role_rules(role).unwrap().iter().flat_map(|rule| rule.verbs.clone()).collect();
    verbs.sort();
    verbs
}

#[test]
fn aggregated_roles_follow_the_roles_they_choose() {
    let plain = |name: &str, labels: Value| {
        labelled(name, labels, json!({"rules": [rule(&[name], &[""], &["pods"])]}))
    };
    let rbac = Rbac::default();
    let put = |role: &Object| rbac.apply([Change::Put(role)]);
    put(&gathering(
        "all",
        json!({}),
        json!([{"matchLabels": {"to": "all"}}, {"matchLabels": {"to": "more"}}]),
    ));
    put(&plain("one", json!({"to": "all"})));
    put(&plain("two", json!({"to": "more", "kind": "x"})));
    put(&plain("three", json!({"to": "none"})));
    assert_eq!(verbs(&rbac.snapshot(), "all"), ["one", "two"]);
    put(&plain("three", json!({"to": "all"})));
    let before = rbac.snapshot();
    rbac.apply([Change::Delete(&plain("one", json!({})))]);
    assert_eq!(verbs(&rbac.snapshot(), "all"), ["three", "two"]);
    assert_eq!(verbs(&before, "all"), ["one", "three", "two"], "a snapshot does not change");
    for (selector, chosen) in [
        (json!({}), vec!["three", "two"]),
        (json!({"matchExpressions": [{"key": "kind", "operator": "Exists"}]}), vec!["two"]),
        (json!({"matchExpressions": [{"key": "kind", "operator": "DoesNotExist"}]}), vec!["three"]),
        (
            json!({"matchExpressions": [{"key": "to", "operator": "In", "values": ["more", "x"]}]}),
            vec!["two"],
        ),
        (json!({"matchExpressions": [{"key": "kind", "operator": "NotIn", "values": ["x"]}]}), vec!["three"]),
        (
            json!({"matchLabels": {"to": "more"}, "matchExpressions": [{"key": "kind", "operator": "DoesNotExist"}]}),
            vec![],
        ),
        (json!({"matchExpressions": [{"key": "to", "operator": "Near"}]}), vec![]),
        (json!({"matchLabels": {"to": 1}}), vec![]),
    ] {
        put(&gathering("all", json!({}), json!([selector])));
        assert_eq!(verbs(&rbac.snapshot(), "all"), chosen, "{selector}");
    }
}

#[test]
fn roles_that_gather_each_other_in_a_circle_have_the_same_rules() {
    let next = |at: usize| json!([{"matchLabels": {"circle": (at % 50).to_string()}}]);
    let mut objects: Vec<Object> = (0..50)
        .map(|at| gathering(&format!("r{at}"), json!({"circle": at.to_string()}), next(at + 1)))
        .collect();
    let seed = json!({"rules": [rule(&["get"], &[""], &["pods"])]});
    objects.push(labelled("seed", json!({"circle": "7"}), seed));
    // One that chooses all, itself too.
    objects.push(gathering("self", json!({"circle": "9"}), json!([{}])));
    let policy = policy(&objects);
    for at in 0..50 {
        assert_eq!(verbs(&policy, &format!("r{at}")), ["get"]);
    }
    assert_eq!(verbs(&policy, "self"), ["get"]);
}

#[test]
fn an_aggregated_role_has_a_bounded_number_of_rules() {
    let many: Vec<Value> = (0..10_001).map(|at| rule(&[&format!("v{at}")], &[""], &["pods"])).collect();
    let many = labelled("many", json!({"to": "all"}), json!({"rules": many}));
    let policy = policy(&[many, gathering("all", json!({}), json!([{"matchLabels": {"to": "all"}}]))]);
    assert_eq!(policy.cluster_role_rules("many").unwrap().len(), 10_001);
    assert_eq!(policy.cluster_role_rules("all").unwrap().len(), 10_000);
}

#[test]
fn odd_names_mean_themselves_and_nobody_else() {
    let everything = json!({"rules": [rule(&["*"], &["*"], &["*"])]});
    let role = ("ClusterRole", "all");
    let objects = [
        meta("ClusterRole", "", "all", everything.clone()),
        // Without its namespace a Role is none of the cluster's.
        meta("Role", "", "lost", everything),
        bind("", "star", role, json!({"kind": "User", "name": "*"})),
        bind("", "empty", role, json!({"kind": "Group", "name": ""})),
        bind("", "missing", role, json!({"kind": "User"})),
        bind("", "homeless", role, json!({"kind": "ServiceAccount", "name": "robot"})),
        bind("", "kind", role, json!({"kind": "user", "name": "anna"})),
        bind("", "lost", ("Role", "lost"), json!({"kind": "User", "name": "anna"})),
        meta(
            "RoleBinding",
            "",
            "lost",
            json!({
                "roleRef": {"kind": "ClusterRole", "name": "all"}, "subjects": [{"kind": "User", "name": "anna"}],
            }),
        ),
        bind("a", "long", role, json!({"kind": "User", "name": "ü".repeat(100_000)})),
    ];
    let policy = policy(&objects);
    let may = |user: &User| policy.authorize(user, "get", &on("", "pods", "a", "")).allowed;
    assert!(!may(&user("anna", &[])) && !may(&user("", &["robot"])));
    assert!(!may(&user("system:serviceaccount::robot", &[])));
    assert!(may(&user("*", &[])) && may(&user("x", &[""])) && may(&user(&"ü".repeat(100_000), &[])));
}

#[test]
fn a_binding_that_changes_or_goes_takes_its_subjects_along() {
    let rbac = Rbac::default();
    let subjects = |names: &[&str]| {
        let subjects: Vec<Value> = names.iter().map(|name| json!({"kind": "User", "name": name})).collect();
        let role = json!({"kind": "ClusterRole", "name": "all"});
        meta("ClusterRoleBinding", "", "b", json!({"roleRef": role, "subjects": subjects}))
    };
    rbac.apply([Change::Put(&meta(
        "ClusterRole",
        "",
        "all",
        json!({"rules": [rule(&["*"], &["*"], &["*"])]}),
    ))]);
    let may =
        |name: &str| rbac.snapshot().authorize(&user(name, &[]), "get", &on("", "pods", "", "")).allowed;
    rbac.apply([Change::Put(&subjects(&["anna", "bert", "anna"]))]);
    assert!(may("anna") && may("bert") && !may("carl"));
    rbac.apply([Change::Put(&subjects(&["carl", "bert"]))]);
    assert!(!may("anna") && may("bert") && may("carl"));
    rbac.apply([Change::Delete(&subjects(&[]))]);
    assert!(!may("anna") && !may("bert") && !may("carl"));
    let deleted = meta("ClusterRole", "", "all", json!({}));
    rbac.apply([Change::Delete(&deleted), Change::Delete(&deleted)]);
    assert_eq!(
        format!("{:?}", rbac.snapshot()),
        format!("{:?}", Policy::default()),
        "nothing is left behind"
    );
}

/// Any JSON, with the keys and the kinds that mean something.
fn json_values() -> impl Strategy<Value = Value> {
    let words = ["ClusterRole", "RoleBinding", "Group", "a", "*", "", "In", GROUP];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(Value::from),
        prop::sample::select(words.to_vec()).prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    let keys = [
        "metadata",
        "name",
        "namespace",
        "labels",
        "kind",
        "rules",
        "subjects",
        "roleRef",
        "aggregationRule",
        "verbs",
        "clusterRoleSelectors",
        "matchLabels",
        "matchExpressions",
        "operator",
        "key",
        "values",
        "resources",
        "x",
    ];
    leaf.prop_recursive(5, 64, 6, move |inner| {
        let keys = prop::sample::select(keys.to_vec()).prop_map(str::to_owned);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(keys, inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn no_object_makes_a_policy_panic_or_leaves_a_trace_when_it_is_deleted(
        kind in prop::sample::select(vec!["Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding", "Pod"]),
        fields in prop::collection::btree_map("rules|subjects|roleRef|aggregationRule|metadata", json_values(), 0..5),
    ) {
        let mut object = meta(kind, "a", "b", json!({}));
        object.extend(fields);
        let mut policy = Policy::default();
        policy.apply([Change::Put(&object)]);
        let _ = policy.authorize(&user("a", &["a", ""]), "get", &on("", "a", "a", "a"));
        let _ = policy.may_write_role(&user("a", &[]), &object, None);
        let _ = policy.may_write_binding(&user("a", &[]), &object, None);
        policy.apply([Change::Delete(&object)]);
        prop_assert_eq!(format!("{policy:?}"), format!("{:?}", Policy::default()));
    }
}
