use super::*;
use crate::auth::rbac::{Change, Rbac};

/// A policy in which `boss` may impersonate what these rules say.
fn policy(rules: Value) -> std::sync::Arc<Policy> {
    let version = "rbac.authorization.k8s.io/v1";
    let role =
        json!({"apiVersion": version, "kind": "ClusterRole", "metadata": {"name": "r"}, "rules": rules});
    let bind = json!({
        "apiVersion": version, "kind": "ClusterRoleBinding", "metadata": {"name": "b"},
        "roleRef": {"kind": "ClusterRole", "name": "r"}, "subjects": [{"kind": "User", "name": "boss"}],
    });
    let rbac = Rbac::default();
    rbac.apply([role.as_object().unwrap(), bind.as_object().unwrap()].map(Change::Put));
    rbac.snapshot()
}

fn boss() -> User {
    User { name: "boss".to_owned(), groups: vec![AUTHENTICATED.to_owned()], ..User::default() }
}

fn everything() -> std::sync::Arc<Policy> {
    policy(json!([{"verbs": ["impersonate"], "apiGroups": ["*"], "resources": ["*"]}]))
}

#[test]
fn who_names_nobody_stays_who_he_is() {
    assert_eq!(impersonated(&boss(), [("Accept", "x"), ("Authorization", "y")], &everything()), Ok(None));
}

#[test]
fn an_impersonated_user_has_the_groups_that_are_named_and_that_all_have() {
    let as_whom = |headers: &[(&str, &str)]| {
        impersonated(&boss(), headers.iter().copied(), &everything()).unwrap().unwrap()
    };
    let anna = as_whom(&[("Impersonate-User", "anna")]);
    assert_eq!((anna.name.as_str(), anna.groups), ("anna", vec![AUTHENTICATED.to_owned()]));
    let anna = as_whom(&[
        ("impersonate-user", "anna"),
        ("Impersonate-Group", "dev"),
        ("IMPERSONATE-GROUP", "ops"),
        ("Impersonate-Uid", "7"),
        ("Impersonate-Extra-Acme.com%2Fproject", "x"),
        ("Impersonate-Extra-acme.com%2fproject", "y"),
        ("Impersonate-Extra-Bad%zz", "z"),
    ]);
    assert_eq!(anna.groups, ["dev", "ops", AUTHENTICATED]);
    assert_eq!(anna.uid, "7");
    assert_eq!(anna.extra["acme.com/project"], ["x", "y"]);
    assert_eq!(anna.extra["bad%zz"], ["z"]);
    let robot = as_whom(&[("Impersonate-User", "system:serviceaccount:d:robot")]);
    assert_eq!(robot, User::service_account("d", "robot", ""));
    let unknown = as_whom(&[("Impersonate-User", "x"), ("Impersonate-Group", UNAUTHENTICATED)]);
    assert_eq!(unknown.groups, [UNAUTHENTICATED]);
    assert_eq!(as_whom(&[("Impersonate-User", ANONYMOUS)]), User::anonymous());
}

#[test]
fn each_attribute_has_to_be_allowed() {
    let rule = |resource: &str, names: Value| {
        let group =
            if resource.starts_with("user") && resource != "users" { "authentication.k8s.io" } else { "" };
        json!({"verbs": ["impersonate"], "apiGroups": [group], "resources": [resource], "resourceNames": names})
    };
    let policy = policy(json!([
        rule("users", json!(["anna"])),
        rule("groups", json!(["dev"])),
        rule("userextras/scopes", json!(["view"])),
        {"verbs": ["impersonate"], "apiGroups": [""], "resources": ["serviceaccounts"], "resourceNames": ["robot"]},
    ]));
    let refused = |headers: &[(&str, &str)]| match impersonated(&boss(), headers.iter().copied(), &policy) {
        Ok(_) => String::new(),
        Err(status) => {
            assert_eq!(status.reason.code(), 403);
            status.message
        }
    };
    let anna = ("Impersonate-User", "anna");
    assert_eq!(refused(&[anna, ("Impersonate-Group", "dev"), ("Impersonate-Extra-Scopes", "view")]), "");
    assert_eq!(refused(&[("Impersonate-User", "system:serviceaccount:d:robot")]), "");
    assert_eq!(
        refused(&[("Impersonate-User", "bert")]),
        "users \"bert\" is forbidden: User \"boss\" cannot impersonate resource \"users\" in API group \"\" at the cluster scope"
    );
    assert!(
        refused(&[anna, ("Impersonate-Group", "system:masters")])
            .starts_with("groups \"system:masters\" is forbidden")
    );
    assert!(refused(&[anna, ("Impersonate-Extra-Scopes", "edit")]).contains("userextras/scopes"));
    assert!(
        refused(&[anna, ("Impersonate-Uid", "1")])
            .starts_with("uids.authentication.k8s.io \"1\" is forbidden")
    );
    assert!(
        refused(&[("Impersonate-User", "system:serviceaccount:d:other")]).contains("in the namespace \"d\"")
    );
    // What only looks like a service account is a user.
    assert!(refused(&[("Impersonate-User", "system:serviceaccount:d:Robot")]).starts_with("users "));
}

#[test]
fn attributes_without_a_user_and_floods_of_them_are_bad_requests() {
    let code = |headers: &[(&str, &str)]| {
        impersonated(&boss(), headers.iter().copied(), &everything()).unwrap_err().reason.code()
    };
    for header in ["Impersonate-Group", "Impersonate-Uid", "Impersonate-Extra-X"] {
        assert_eq!(code(&[(header, "x")]), 400);
    }
    let flood = vec![("Impersonate-Group", "g"); IMPERSONATED_MAX];
    assert_eq!(code(&[&[("Impersonate-User", "u")], flood.as_slice()].concat()), 400);
}
