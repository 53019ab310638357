//! What roles and bindings have to be, beyond the schemas of their kinds.

use serde_json::{Value, json};

use super::GROUP;
use crate::field::{FieldError, invalid};
use crate::object::{self, Object};
use crate::rules::names::path_segment;
use crate::status::Result;

/// Fills in the API groups of a binding's role and subjects.
pub fn default(object: &mut Object) {
    if !object::text(object, &["kind"]).is_some_and(|kind| kind.ends_with("Binding")) {
        return;
    }
    let set = |part: &mut Value| {
        if let Value::Object(part) = part
            && object::text(part, &["apiGroup"]).unwrap_or_default().is_empty()
            && object::text(part, &["kind"]) != Some("ServiceAccount")
        {
            part.insert("apiGroup".to_owned(), json!(GROUP));
        }
    };
    if let Some(role) = object.get_mut("roleRef") {
        set(role);
    }
    if let Some(Value::Array(subjects)) = object.get_mut("subjects") {
        subjects.iter_mut().for_each(set);
    }
}

/// Checks a role or a binding that is to be made, or that `old` is to be turned into.
///
/// # Errors
/// `Invalid` with all that is wrong, in the words of Kubernetes.
pub fn validate(object: &Object, old: Option<&Object>) -> Result<()> {
    let kind = object::text(object, &["kind"]).unwrap_or_default();
    let name = object::name(object).unwrap_or_default();
    let mut causes = Vec::new();
    for why in path_segment(name) {
        causes.push(FieldError::invalid("metadata.name", name, why));
    }
    match kind {
        "Role" | "ClusterRole" => role(object, kind == "Role", &mut causes),
        "RoleBinding" | "ClusterRoleBinding" => binding(object, old, kind == "RoleBinding", &mut causes),
        _ => {}
    }
    match causes.is_empty() {
        true => Ok(()),
        false => Err(invalid(GROUP, kind, name, causes)),
    }
}

fn role(object: &Object, namespaced: bool, causes: &mut Vec<FieldError>) {
    for (at, rule) in object.get("rules").and_then(Value::as_array).into_iter().flatten().enumerate() {
        let has = |key: &str| rule.get(key).and_then(Value::as_array).is_some_and(|list| !list.is_empty());
        let at = |key: &str| format!("rules[{at}].{key}");
        if !has("verbs") {
            causes.push(FieldError::required(at("verbs"), "verbs must contain at least one value"));
        }
        if has("nonResourceURLs") {
            let urls = rule.get("nonResourceURLs").cloned().unwrap_or_default();
            if namespaced {
                let why = "namespaced rules cannot apply to non-resource URLs";
                causes.push(FieldError::invalid(at("nonResourceURLs"), urls.clone(), why));
            }
            if has("apiGroups") || has("resources") || has("resourceNames") {
                let why = "rules cannot apply to both regular resources and non-resource URLs";
                causes.push(FieldError::invalid(at("nonResourceURLs"), urls, why));
            }
            continue;
        }
        if !has("apiGroups") {
            causes.push(FieldError::required(
                at("apiGroups"),
                "resource rules must supply at least one api group",
            ));
        }
        if !has("resources") {
            causes.push(FieldError::required(
                at("resources"),
                "resource rules must supply at least one resource",
            ));
        }
    }
    if let (false, Some(Value::Object(aggregation))) = (namespaced, object.get("aggregationRule")) {
        let selectors = aggregation.get("clusterRoleSelectors").and_then(Value::as_array);
        if selectors.is_none_or(Vec::is_empty) {
            let why = "at least one clusterRoleSelector required if aggregationRule is non-nil";
            causes.push(FieldError::required("aggregationRule.clusterRoleSelectors", why));
        }
    }
}

fn binding(object: &Object, old: Option<&Object>, namespaced: bool, causes: &mut Vec<FieldError>) {
    let text = |key: &str| object::text(object, &["roleRef", key]).unwrap_or_default();
    if text("apiGroup") != GROUP {
        causes.push(FieldError::not_supported("roleRef.apiGroup", text("apiGroup"), &[GROUP]));
    }
    let kinds: &[&str] = if namespaced { &["Role", "ClusterRole"] } else { &["ClusterRole"] };
    if !kinds.contains(&text("kind")) {
        causes.push(FieldError::not_supported("roleRef.kind", text("kind"), kinds));
    }
    if text("name").is_empty() {
        causes.push(FieldError::required("roleRef.name", ""));
    }
    for why in path_segment(text("name")) {
        causes.push(FieldError::invalid("roleRef.name", text("name"), why));
    }
    for (at, subject) in object.get("subjects").and_then(Value::as_array).into_iter().flatten().enumerate() {
        let text = |key: &str| subject.get(key).and_then(Value::as_str).unwrap_or_default();
        let at = |key: &str| format!("subjects[{at}].{key}");
        if text("name").is_empty() {
            causes.push(FieldError::required(at("name"), ""));
        }
        let group = match text("kind") {
            "ServiceAccount" => {
                if !namespaced && text("namespace").is_empty() {
                    causes.push(FieldError::required(at("namespace"), ""));
                }
                ""
            }
            "User" | "Group" => GROUP,
            other => {
                causes.push(FieldError::not_supported(
                    at("kind"),
                    other,
                    &["ServiceAccount", "User", "Group"],
                ));
                continue;
            }
        };
        if text("apiGroup") != group {
            causes.push(FieldError::not_supported(at("apiGroup"), text("apiGroup"), &[group]));
        }
    }
    // Who could change it would turn a binding that others look after into another one.
    let of = |object: &Object| object.get("roleRef").cloned().unwrap_or_default();
    if old.is_some_and(|old| of(old) != of(object)) {
        causes.push(FieldError::invalid("roleRef", of(object), "field is immutable"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::rbac::tests::{bind, meta, rule};

    fn causes(object: &Object, old: Option<&Object>) -> Vec<String> {
        match validate(object, old) {
            Ok(()) => Vec::new(),
            Err(status) => {
                assert_eq!(status.reason.code(), 422);
                status
                    .details
                    .causes
                    .iter()
                    .map(|cause| format!("{}: {}", cause.field, cause.message))
                    .collect()
            }
        }
    }

    #[test]
    fn roles_are_refused_in_the_words_of_kubernetes() {
        let of = |kind: &str, rules: Value| causes(&meta(kind, "", "r", json!({"rules": rules})), None);
        assert_eq!(of("Role", json!([rule(&["get"], &[""], &["pods"])])), Vec::<String>::new());
        assert_eq!(
            of("Role", json!([rule(&["get"], &[""], &["pods"]), {}])),
            [
                "rules[1].verbs: Required value: verbs must contain at least one value",
                "rules[1].apiGroups: Required value: resource rules must supply at least one api group",
                "rules[1].resources: Required value: resource rules must supply at least one resource",
            ]
        );
        let urls = json!([{"verbs": ["get"], "nonResourceURLs": ["/x"]}]);
        assert_eq!(of("ClusterRole", urls.clone()), Vec::<String>::new());
        let why = r#"rules[0].nonResourceURLs: Invalid value: ["/x"]: namespaced rules cannot apply to non-resource URLs"#;
        assert_eq!(of("Role", urls), [why]);
        let both = json!([{"verbs": ["get"], "nonResourceURLs": ["/x"], "resources": ["pods"]}]);
        let why = "rules cannot apply to both regular resources and non-resource URLs";
        assert!(of("ClusterRole", both)[0].ends_with(why));
        let gathering = meta("ClusterRole", "", "a/b", json!({"aggregationRule": {}}));
        assert_eq!(
            validate(&gathering, None).unwrap_err().message,
            "ClusterRole.rbac.authorization.k8s.io \"a/b\" is invalid: [metadata.name: Invalid value: \"a/b\": may not contain '/', \
             aggregationRule.clusterRoleSelectors: Required value: at least one clusterRoleSelector required if aggregationRule is \
             non-nil]"
        );
    }

    #[test]
    fn bindings_are_completed_and_refused_in_the_words_of_kubernetes() {
        let mut good = bind("a", "b", ("Role", "d8:x"), json!({"kind": "User", "name": "u"}));
        good["roleRef"]["apiGroup"] = json!("");
        default(&mut good);
        assert_eq!(
            (&good["roleRef"]["apiGroup"], &good["subjects"][0]["apiGroup"]),
            (&json!(GROUP), &json!(GROUP))
        );
        assert_eq!(causes(&good, Some(&good)), Vec::<String>::new());
        let mut account = bind("", "b", ("ClusterRole", "x"), json!({"kind": "ServiceAccount", "name": "s"}));
        default(&mut account);
        assert_eq!(account["subjects"][0].get("apiGroup"), None);
        assert_eq!(causes(&account, None), ["subjects[0].namespace: Required value"]);
        let mut other = good.clone();
        other["roleRef"]["name"] = json!("y");
        assert!(causes(&other, Some(&good))[0].ends_with("field is immutable"));
        let wrong = bind("", "b", ("Role", ""), json!({"kind": "Robot"}));
        assert_eq!(
            causes(&wrong, None),
            [
                "roleRef.kind: Unsupported value: \"Role\": supported values: \"ClusterRole\"",
                "roleRef.name: Required value",
                "subjects[0].name: Required value",
                "subjects[0].kind: Unsupported value: \"Robot\": supported values: \"ServiceAccount\", \"User\", \"Group\"",
            ]
        );
    }
}
