use serde_json::{Value, json};

use super::*;

fn object(value: Value) -> Object {
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

fn rule(verbs: &[&str], groups: &[&str], resources: &[&str]) -> Value {
    json!({"verbs": verbs, "apiGroups": groups, "resources": resources})
}

fn bind(namespace: &str, name: &str, role: (&str, &str), subject: Value) -> Object {
    let kind = if namespace.is_empty() { "ClusterRoleBinding" } else { "RoleBinding" };
    let role = json!({"apiGroup": GROUP, "kind": role.0, "name": role.1});
    meta(kind, namespace, name, json!({"roleRef": role, "subjects": [subject]}))
}

fn policy(objects: &[Object]) -> Policy {
    let mut policy = Policy::default();
    policy.apply(objects.iter().map(Change::Put));
    policy
}

fn user(name: &str, groups: &[&str]) -> User {
    User {
        name: name.to_owned(),
        groups: groups.iter().map(|group| (*group).to_owned()).collect(),
        ..User::default()
    }
}

fn on<'a>(group: &'a str, resource: &'a str, namespace: &'a str, name: &'a str) -> Target<'a> {
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
