use serde_json::json;

use super::*;
use crate::auth::rbac::tests::{bind, meta, policy, rule, user};

fn role(namespace: &str, rules: Value) -> Object {
    meta(if namespace.is_empty() { "ClusterRole" } else { "Role" }, namespace, "new", json!({"rules": rules}))
}

/// `anna` reads pods everywhere and does all with disks in `a`; she may write roles there.
fn given(more: &[Object]) -> Policy {
    let anna = || json!({"kind": "User", "name": "anna"});
    let own = [
        meta(
            "ClusterRole",
            "",
            "read",
            json!({"rules": [rule(&["get"], &[""], &["pods"]), rule(&["list"], &[""], &["pods"])]}),
        ),
        meta("ClusterRole", "", "disks", json!({"rules": [rule(&["*"], &["v"], &["disks", "*/scale"])]})),
        bind("", "read", ("ClusterRole", "read"), anna()),
        bind("a", "disks", ("ClusterRole", "disks"), anna()),
    ];
    policy(&[&own[..], more].concat())
}

fn anna() -> User {
    user("anna", &["dev", "ops"])
}

#[test]
fn a_role_may_have_what_its_writer_holds() {
    let policy = given(&[]);
    for (namespace, rules, allowed) in [
        ("", json!([]), true),
        // Two rules of hers cover it together.
        ("", json!([rule(&["get", "list"], &[""], &["pods"])]), true),
        ("a", json!([rule(&["get", "list"], &[""], &["pods"]), rule(&["delete"], &["v"], &["disks"])]), true),
        ("a", json!([rule(&["get"], &["v"], &["disks/scale"])]), true),
        ("a", json!([rule(&["get"], &["v"], &["disks/status"])]), false),
        ("b", json!([rule(&["delete"], &["v"], &["disks"])]), false),
        ("", json!([rule(&["delete"], &["v"], &["disks"])]), false),
        ("", json!([rule(&["*"], &[""], &["pods"])]), false),
        (
            "",
            json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["x"]}]),
            true,
        ),
        ("", json!([{"verbs": ["get"], "nonResourceURLs": ["/metrics"]}]), false),
    ] {
        let may = policy.may_write_role(&anna(), &role(namespace, rules.clone()), None);
        assert_eq!(may.is_ok(), allowed, "{namespace} {rules}");
    }
}

#[test]
fn what_is_missing_is_told_as_kubernetes_tells_it() {
    let rules = json!([
        rule(&["get", "delete", "patch"], &[""], &["pods"]),
        {"verbs": ["get"], "apiGroups": [""], "resources": ["secrets"], "resourceNames": ["x", "y"]},
        {"verbs": ["get"], "nonResourceURLs": ["/metrics"]},
    ]);
    let status = given(&[]).may_write_role(&anna(), &role("a", rules), None).unwrap_err();
    assert_eq!(status.reason.code(), 403);
    assert_eq!(
        status.message,
        "roles.rbac.authorization.k8s.io \"new\" is forbidden: user \"anna\" (groups=[\"dev\" \"ops\"]) is attempting to grant RBAC \
         permissions not currently held:\n\
         {APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"delete\" \"patch\"]}\n\
         {APIGroups:[\"\"], Resources:[\"secrets\"], ResourceNames:[\"x\"], Verbs:[\"get\"]}\n\
         {APIGroups:[\"\"], Resources:[\"secrets\"], ResourceNames:[\"y\"], Verbs:[\"get\"]}\n\
         {NonResourceURLs:[\"/metrics\"], Verbs:[\"get\"]}"
    );
    assert_eq!((&*status.details.kind, &*status.details.name), ("roles", "new"));
}

#[test]
fn masters_and_those_who_may_escalate_or_bind_give_what_they_like() {
    let all = json!([rule(&["*"], &["*"], &["*"])]);
    let power = |verb: &str, resource: &str| {
        let rule = rule(&[verb], &[GROUP], &[resource]);
        let power = meta("ClusterRole", "", "power", json!({"rules": [rule]}));
        given(&[power, bind("a", "power", ("ClusterRole", "power"), json!({"kind": "Group", "name": "dev"}))])
    };
    let escalate = power("escalate", "roles");
    escalate.may_write_role(&anna(), &role("a", all.clone()), None).unwrap();
    escalate.may_write_role(&anna(), &role("b", all.clone()), None).unwrap_err();
    escalate.may_write_role(&anna(), &role("", all.clone()), None).unwrap_err();
    given(&[]).may_write_role(&user("root", &[MASTERS]), &role("", all), None).unwrap();
    let to = |namespace: &str| {
        bind(namespace, "new", ("ClusterRole", "power"), json!({"kind": "User", "name": "bert"}))
    };
    let may_bind = power("bind", "clusterroles");
    may_bind.may_write_binding(&anna(), &to("a"), None).unwrap();
    may_bind.may_write_binding(&anna(), &to("b"), None).unwrap_err();
    may_bind.may_write_binding(&anna(), &to(""), None).unwrap_err();
    may_bind.may_write_binding(&user("root", &[MASTERS]), &to(""), None).unwrap();
}

#[test]
fn a_binding_may_give_a_role_whose_rules_its_writer_holds() {
    let policy = given(&[]);
    let to = |namespace: &str, role: &str| {
        bind(namespace, "new", ("ClusterRole", role), json!({"kind": "User", "name": "bert"}))
    };
    policy.may_write_binding(&anna(), &to("", "read"), None).unwrap();
    policy.may_write_binding(&anna(), &to("a", "disks"), None).unwrap();
    let status = policy.may_write_binding(&anna(), &to("", "disks"), None).unwrap_err();
    assert!(
        status
            .message
            .starts_with("clusterrolebindings.rbac.authorization.k8s.io \"new\" is forbidden: user \"anna\"")
    );
    let status = policy.may_write_binding(&anna(), &to("a", "gone"), None).unwrap_err();
    assert_eq!(status.message, "clusterrole.rbac.authorization.k8s.io \"gone\" not found");
    assert_eq!(status.reason.code(), 404);
}

#[test]
fn to_gather_rules_of_others_takes_all_rights() {
    let mut gathering = role("", json!([]));
    gathering.insert("aggregationRule".to_owned(), json!({"clusterRoleSelectors": [{}]}));
    let status = given(&[]).may_write_role(&anna(), &gathering, None).unwrap_err();
    assert!(
        status.message.ends_with("must have cluster-admin privileges to use the aggregationRule"),
        "{}",
        status.message
    );
    // Neither may what gathers be turned into something else.
    given(&[]).may_write_role(&anna(), &role("", json!([])), Some(&gathering)).unwrap_err();
    let all = json!({"rules": [rule(&["*"], &["*"], &["*"]), {"verbs": ["*"], "nonResourceURLs": ["*"]}]});
    let admin = bind("", "admin", ("ClusterRole", "all"), json!({"kind": "User", "name": "admin"}));
    let policy = given(&[meta("ClusterRole", "", "all", all), admin]);
    policy.may_write_role(&user("admin", &[]), &gathering, None).unwrap();
}

#[test]
fn finalizers_and_owners_may_change_in_what_one_does_not_hold() {
    let old = role("", json!([rule(&["*"], &["*"], &["*"])]));
    let mut new = old.clone();
    new["metadata"]["finalizers"] = json!(["x"]);
    new["metadata"]["ownerReferences"] = json!([{"uid": "1"}]);
    given(&[]).may_write_role(&anna(), &new, Some(&old)).unwrap();
    new["metadata"]["labels"] = json!({"a": "b"});
    given(&[]).may_write_role(&anna(), &new, Some(&old)).unwrap_err();
    let old = bind("", "b", ("ClusterRole", "disks"), json!({"kind": "User", "name": "bert"}));
    given(&[]).may_write_binding(&anna(), &old, Some(&old)).unwrap();
}

#[test]
fn a_role_of_a_thousand_millions_of_combinations_is_refused_before_they_are_compared() {
    let many = |what: &str| (0..1000).map(|at| format!("{what}{at}")).collect::<Vec<_>>();
    let huge = json!([{"verbs": many("v"), "apiGroups": many("g"), "resources": many("r")}]);
    let status = given(&[]).may_write_role(&anna(), &role("", huge.clone()), None).unwrap_err();
    assert!(
        status.message.contains("1000000000 combinations") && status.message.len() < 1000,
        "{}",
        status.message
    );
    // A rule that covers it as it stands needs no comparison.
    let all = meta("ClusterRole", "", "all", json!({"rules": [rule(&["*"], &["*"], &["*"])]}));
    let policy =
        given(&[all, bind("", "all", ("ClusterRole", "all"), json!({"kind": "User", "name": "anna"}))]);
    policy.may_write_role(&anna(), &role("", huge), None).unwrap();
}

#[test]
fn an_answer_lists_a_bounded_number_of_permissions() {
    let rules: Vec<Value> = (0..500).map(|at| rule(&["get"], &[&format!("g{at}")], &["x"])).collect();
    let status = given(&[]).may_write_role(&anna(), &role("", json!(rules)), None).unwrap_err();
    assert_eq!(status.message.lines().count(), 1 + LISTED_MAX + 1);
    assert!(status.message.ends_with("and 400 more"));
}
