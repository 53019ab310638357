//! The kinds that Kubernetes has, as far as controllers, workers and people touch them here.

use super::{ASKED, GroupVersionKind, KEPT, Names, PART, Subresource};
use crate::request::Verb;

/// A namespace is deleted by its name alone.
const NAMESPACE: &[Verb] =
    &[Verb::Create, Verb::Delete, Verb::Get, Verb::List, Verb::Patch, Verb::Update, Verb::Watch];

/// One line: kind, plural, namespaced, short names, categories, subresources. What ends with `?` is asked, not kept.
type Row = (&'static str, &'static str, bool, &'static str, &'static str, &'static str);

const TABLE: &[(&str, &str, &[Row])] = &[
    (
        "",
        "v1",
        &[
            ("ConfigMap", "configmaps", true, "cm", "", ""),
            ("Event", "events", true, "ev", "", ""),
            ("Namespace", "namespaces", false, "ns", "", "finalize status"),
            ("Node", "nodes", false, "no", "", "status"),
            ("PersistentVolumeClaim", "persistentvolumeclaims", true, "pvc", "", "status"),
            ("PersistentVolume", "persistentvolumes", false, "pv", "", "status"),
            ("Pod", "pods", true, "po", "all", "binding eviction log status"),
            ("ResourceQuota", "resourcequotas", true, "quota", "", "status"),
            ("Secret", "secrets", true, "", "", ""),
            ("ServiceAccount", "serviceaccounts", true, "sa", "", "token"),
            ("Service", "services", true, "svc", "all", "status"),
        ],
    ),
    (
        "apiextensions.k8s.io",
        "v1",
        &[(
            "CustomResourceDefinition",
            "customresourcedefinitions",
            false,
            "crd crds",
            "api-extensions",
            "status",
        )],
    ),
    (
        "authentication.k8s.io",
        "v1",
        &[
            ("SelfSubjectReview", "selfsubjectreviews?", false, "", "", ""),
            ("TokenReview", "tokenreviews?", false, "", "", ""),
        ],
    ),
    (
        "authorization.k8s.io",
        "v1",
        &[
            ("LocalSubjectAccessReview", "localsubjectaccessreviews?", true, "", "", ""),
            ("SelfSubjectAccessReview", "selfsubjectaccessreviews?", false, "", "", ""),
            ("SelfSubjectRulesReview", "selfsubjectrulesreviews?", false, "", "", ""),
            ("SubjectAccessReview", "subjectaccessreviews?", false, "", "", ""),
        ],
    ),
    ("coordination.k8s.io", "v1", &[("Lease", "leases", true, "", "", "")]),
    ("events.k8s.io", "v1", &[("Event", "events", true, "ev", "", "")]),
    (
        "networking.k8s.io",
        "v1",
        &[
            ("Ingress", "ingresses", true, "ing", "", "status"),
            ("NetworkPolicy", "networkpolicies", true, "netpol", "", ""),
        ],
    ),
    (
        "rbac.authorization.k8s.io",
        "v1",
        &[
            ("ClusterRoleBinding", "clusterrolebindings", false, "", "", ""),
            ("ClusterRole", "clusterroles", false, "", "", ""),
            ("RoleBinding", "rolebindings", true, "", "", ""),
            ("Role", "roles", true, "", "", ""),
        ],
    ),
    ("storage.k8s.io", "v1", &[("StorageClass", "storageclasses", false, "sc", "", "")]),
];

/// The core kinds.
pub fn core() -> Vec<Names> {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let mut all = Vec::new();
    for (group, version, rows) in TABLE {
        for (kind, plural, is_namespaced, short_names, categories, subresources) in *rows {
            let (plural, verbs) = match (plural.strip_suffix('?'), *kind) {
                (Some(plural), _) => (plural, ASKED),
                (None, "Namespace") => (*plural, NAMESPACE),
                (None, _) => (*plural, KEPT),
            };
            all.push(Names {
                gvk: GroupVersionKind::new(group, version, kind),
                plural: plural.to_owned(),
                singular: kind.to_ascii_lowercase(),
                short_names: words(short_names),
                categories: words(categories),
                is_namespaced: *is_namespaced,
                verbs,
                subresources: subresources.split_whitespace().map(subresource).collect(),
            });
        }
    }
    all
}

fn subresource(name: &str) -> Subresource {
    let of = |verbs, group: &str, version: &str, kind: &str| Subresource {
        name: name.to_owned(),
        verbs,
        kind: Some(GroupVersionKind::new(group, version, kind)),
    };
    match name {
        "binding" => of(ASKED, "", "v1", "Binding"),
        "eviction" => of(ASKED, "policy", "v1", "Eviction"),
        "token" => of(ASKED, "authentication.k8s.io", "v1", "TokenRequest"),
        _ => {
            let verbs = match name {
                "log" => &[Verb::Get][..],
                "finalize" => &[Verb::Update],
                _ => PART,
            };
            Subresource { name: name.to_owned(), verbs, kind: None }
        }
    }
}
