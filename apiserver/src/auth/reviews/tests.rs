use super::*;
use crate::auth::rbac::Change;

fn object(value: Value) -> Object {
    value.as_object().unwrap().clone()
}

/// `anna` reads pods in `a`, and the group `ops` the metrics.
fn policy() -> Policy {
    let version = "rbac.authorization.k8s.io/v1";
    let role = |name: &str, rules: Value| {
        object(
            json!({"apiVersion": version, "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules}),
        )
    };
    let bind = |kind: &str, metadata: Value, role: &str, subject: Value| {
        let role = json!({"kind": "ClusterRole", "name": role});
        object(
            json!({"apiVersion": version, "kind": kind, "metadata": metadata, "roleRef": role, "subjects": [subject]}),
        )
    };
    let pods =
        json!([{"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["x"]}]);
    let objects = [
        role("read", pods),
        role("metrics", json!([{"verbs": ["get"], "nonResourceURLs": ["/metrics"]}])),
        bind(
            "RoleBinding",
            json!({"name": "r", "namespace": "a"}),
            "read",
            json!({"kind": "User", "name": "anna"}),
        ),
        bind(
            "RoleBinding",
            json!({"name": "g", "namespace": "b"}),
            "gone",
            json!({"kind": "User", "name": "anna"}),
        ),
        bind("ClusterRoleBinding", json!({"name": "m"}), "metrics", json!({"kind": "Group", "name": "ops"})),
    ];
    let rbac = crate::auth::rbac::Rbac::default();
    rbac.apply(objects.iter().map(Change::Put));
    (*rbac.snapshot()).clone()
}

fn review(kind: &str, spec: Value) -> Object {
    object(json!({"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec}))
}

fn anna() -> User {
    User { name: "anna".to_owned(), groups: vec!["ops".to_owned()], ..User::default() }
}

#[test]
fn a_subject_access_review_answers_for_the_user_and_the_groups_in_it() {
    let pods = json!({"verb": "get", "resource": "pods", "namespace": "a", "name": "x"});
    let asked = review("SubjectAccessReview", json!({"user": "anna", "resourceAttributes": pods}));
    let answer = subject_access_review(&asked, &policy()).unwrap();
    assert_eq!(
        answer["status"],
        json!({"allowed": true, "reason": r#"RBAC: allowed by RoleBinding "r/a" of ClusterRole "read" to User "anna""#})
    );
    assert_eq!((&answer["kind"], &answer["spec"]), (&asked["kind"], &asked["spec"]));
    let elsewhere =
        json!({"user": "anna", "resourceAttributes": {"verb": "get", "resource": "pods", "namespace": "b"}});
    let answer = subject_access_review(&review("SubjectAccessReview", elsewhere), &policy()).unwrap();
    let missing = r#"RBAC: clusterrole.rbac.authorization.k8s.io "gone" not found"#;
    assert_eq!(answer["status"], json!({"allowed": false, "reason": missing}));
    let metrics = json!({"groups": ["ops"], "nonResourceAttributes": {"verb": "get", "path": "/metrics"}});
    let answer = subject_access_review(&review("SubjectAccessReview", metrics), &policy()).unwrap();
    assert_eq!(answer["status"]["allowed"], true);
}

#[test]
fn a_question_against_the_rules_is_invalid_in_the_words_of_kubernetes() {
    let resource = json!({"verb": "get", "resource": "pods", "namespace": "a"});
    let both = json!({"user": "u", "resourceAttributes": resource, "nonResourceAttributes": {"verb": "get", "path": "/x"}});
    let one = "exactly one of nonResourceAttributes or resourceAttributes must be specified";
    let ask =
        |spec: Value| subject_access_review(&review("SubjectAccessReview", spec), &policy()).unwrap_err();
    let nothing = ask(json!({"user": "u"}));
    assert_eq!(nothing.reason.code(), 422);
    let whole =
        format!("SubjectAccessReview.authorization.k8s.io \"\" is invalid: spec: Invalid value: null: {one}");
    assert_eq!(nothing.message, whole);
    assert_eq!(nothing.details.causes[0].field, "spec");
    assert!(ask(both).message.ends_with(one));
    assert_eq!(
        ask(json!({"resourceAttributes": resource})).details.causes[0].message,
        "Invalid value: \"\": at least one of user or group must be specified"
    );
    let selector = json!({"user": "u", "resourceAttributes": {"resource": "pods", "labelSelector": {}}});
    assert_eq!(ask(selector).details.causes[0].field, "spec.resourceAttributes.labelSelector.requirements");
    assert_eq!(ask(json!({"user": "u", "resourceAttributes": {"verb": 1}})).reason.code(), 400);
    assert_eq!(ask(json!({"user": "u", "resourceAttributes": []})).reason.code(), 400);
    let mut named = review("SelfSubjectAccessReview", json!({"resourceAttributes": resource}));
    named.insert("metadata".to_owned(), json!({"creationTimestamp": null, "labels": {}}));
    self_subject_access_review(&named, &anna(), &policy()).unwrap();
    named.insert("metadata".to_owned(), json!({"name": "n"}));
    let status = self_subject_access_review(&named, &anna(), &policy()).unwrap_err();
    assert_eq!(status.details.causes[0].message, "Invalid value: {\"name\":\"n\"}: must be empty");
}

#[test]
fn a_local_review_is_about_its_own_namespace() {
    let asked = |asked: &str| {
        let resource = json!({"verb": "get", "resource": "pods", "name": "x", "namespace": asked});
        let mut review =
            review("LocalSubjectAccessReview", json!({"user": "anna", "resourceAttributes": resource}));
        review.insert("metadata".to_owned(), json!({"namespace": "a"}));
        review
    };
    assert_eq!(local_subject_access_review(&asked("a"), "a", &policy()).unwrap()["status"]["allowed"], true);
    assert_eq!(local_subject_access_review(&asked("a"), "b", &policy()).unwrap_err().reason.code(), 400);
    let status = local_subject_access_review(&asked("b"), "a", &policy()).unwrap_err();
    assert_eq!(status.details.causes[0].message, "Invalid value: \"b\": must match metadata.namespace");
    let path = json!({"user": "anna", "nonResourceAttributes": {"verb": "get", "path": "/x"}});
    let status =
        local_subject_access_review(&review("LocalSubjectAccessReview", path), "", &policy()).unwrap_err();
    assert!(status.message.contains("disallowed on this kind of request"), "{}", status.message);
}

#[test]
fn reviews_of_oneself_tell_what_one_may_and_who_one_is() {
    let resource = json!({"verb": "list", "resource": "pods", "namespace": "a"});
    let asked = review("SelfSubjectAccessReview", json!({"resourceAttributes": resource}));
    // A list has no name, and the rule is about one.
    assert_eq!(
        self_subject_access_review(&asked, &anna(), &policy()).unwrap()["status"],
        json!({"allowed": false})
    );
    let rules = |namespace: &str| {
        let asked = review("SelfSubjectRulesReview", json!({"namespace": namespace}));
        self_subject_rules_review(&asked, &anna(), &policy())
    };
    let metrics = json!([{"verbs": ["get"], "nonResourceURLs": ["/metrics"]}]);
    let pods =
        json!([{"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["x"]}]);
    let answer = rules("a").unwrap();
    assert_eq!(answer["kind"], "SelfSubjectRulesReview");
    assert_eq!(
        answer["status"],
        json!({"resourceRules": pods, "nonResourceRules": metrics, "incomplete": false})
    );
    let missing = r#"clusterrole.rbac.authorization.k8s.io "gone" not found"#;
    assert_eq!(rules("b").unwrap()["status"]["evaluationError"], missing);
    assert_eq!(rules("").unwrap_err().message, "no namespace on request");
    let who = object(
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview", "spec": {"x": 1}}),
    );
    assert_eq!(
        Value::Object(self_subject_review(&who, &anna(), 0)),
        json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview",
            "metadata": {"creationTimestamp": "1970-01-01T00:00:00Z"},
            "status": {"userInfo": {"username": "anna", "groups": ["ops"]}},
        })
    );
}
