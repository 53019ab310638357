//! The roles that every new store begins with: those of Kubernetes, those of our own parts, and the access levels.
//!
//! | who | role |
//! | --- | --- |
//! | group `system:masters` | `cluster-admin` |
//! | everybody | `system:public-info-viewer`; those who showed who they are also `system:discovery` and `system:basic-user` |
//! | [`CONTROLLER`] | `dvcr:controller` |
//! | group [`NODES`] | `dvcr:node` |
//!
//! `admin`, `edit` and `view` gather the rules of roles with the labels of Kubernetes, `rbac.authorization.k8s.io/aggregate-to-*`.

use serde_json::{Map, Value, json};

use super::rbac::GROUP as RBAC;
use super::user::{AUTHENTICATED, MASTERS, UNAUTHENTICATED};
use crate::object::Object;

/// The user that our controllers are.
pub const CONTROLLER: &str = "system:dvcr:controller";
/// The group of node agents; the user of each is `system:node:NAME`.
pub const NODES: &str = "system:nodes";
/// The access levels, from the lowest; each may all that the one before it may. Their roles are `d8:user-authz:virtualization:LEVEL`.
pub const LEVELS: [(&str, &str); 6] = [
    ("user", "User"),
    ("privileged-user", "PrivilegedUser"),
    ("editor", "Editor"),
    ("admin", "Admin"),
    ("cluster-editor", "ClusterEditor"),
    ("cluster-admin", "ClusterAdmin"),
];

const READ: &[&str] = &["get", "list", "watch"];
const CREATE: &[&str] = &["create"];
const WRITE: &[&str] = &["create", "update", "patch", "delete", "deletecollection"];
const ALL: &[&str] = &["*"];
/// Changes of what is there.
const UPDATE: &[&str] = &["update", "patch"];
const READ_UPDATE: &[&str] = &["get", "list", "watch", "update", "patch"];
const READ_WRITE: &[&str] =
    &["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"];

const CORE: &[&str] = &[""];
const EVENTS: &[&str] = &["", "events.k8s.io"];
const NETWORKING: &[&str] = &["networking.k8s.io"];
const SNAPSHOTS: &[&str] = &["snapshot.storage.k8s.io"];
const STORAGE: &[&str] = &["storage.k8s.io"];
const LEASES: &[&str] = &["coordination.k8s.io"];
const AUTHENTICATION: &[&str] = &["authentication.k8s.io"];
const AUTHORIZATION: &[&str] = &["authorization.k8s.io"];
const VIRTUALIZATION: &[&str] = &["virtualization.deckhouse.io"];
const SUBRESOURCES: &[&str] = &["subresources.virtualization.deckhouse.io"];
const KUBEVIRT: &[&str] = &["kubevirt.io", "cdi.kubevirt.io"];

/// What belongs to a virtual machine, in its namespace.
const MACHINES: &[&str] = &[
    "virtualmachines",
    "virtualdisks",
    "virtualmachineblockdeviceattachments",
    "virtualmachineipaddresses",
    "virtualdisksnapshots",
    "virtualmachinesnapshots",
];
const IMAGES: &[&str] = &["virtualimages"];
const OPERATIONS: &[&str] = &["virtualmachineoperations"];
/// What is of the cluster, and everybody may see.
const SHARED: &[&str] = &["clustervirtualimages", "virtualmachineclasses"];
const ADDRESS_LEASES: &[&str] = &["virtualmachineipaddressleases"];
const SESSIONS: &[&str] = &["virtualmachines/console", "virtualmachines/vnc", "virtualmachines/portforward"];
const SESSION_VERBS: &[&str] = &["get", "create", "update"];

/// Returns all of them: ClusterRoles, then ClusterRoleBindings.
pub fn objects() -> Vec<Object> {
    let mut roles = kubernetes();
    roles.extend(aggregated());
    roles.extend([role("dvcr:controller", &[], controller()), role("dvcr:node", &[], node())]);
    roles.extend(levels());
    roles.extend([
        binding("cluster-admin", &[("Group", MASTERS)]),
        binding("system:basic-user", &[("Group", AUTHENTICATED)]),
        binding("system:discovery", &[("Group", AUTHENTICATED)]),
        binding("system:public-info-viewer", &[("Group", AUTHENTICATED), ("Group", UNAUTHENTICATED)]),
        binding("dvcr:controller", &[("User", CONTROLLER)]),
        binding("dvcr:node", &[("Group", NODES)]),
    ]);
    roles
}

/// Roles of Kubernetes that are for everybody, and the one for everything.
fn kubernetes() -> Vec<Object> {
    let public = ["/healthz", "/livez", "/readyz", "/version", "/version/"];
    let discovery = ["/api", "/api/*", "/apis", "/apis/*", "/openapi", "/openapi/*"];
    let mut reviews =
        vec![rule(CREATE, AUTHORIZATION, &["selfsubjectaccessreviews", "selfsubjectrulesreviews"])];
    reviews.push(rule(CREATE, AUTHENTICATION, &["selfsubjectreviews"]));
    vec![
        role("cluster-admin", &[], vec![rule(ALL, ALL, ALL), urls(ALL, ALL)]),
        role("system:basic-user", &[], reviews),
        role("system:discovery", &[], vec![urls(&["get"], &[&public[..], &discovery].concat())]),
        role("system:public-info-viewer", &[], vec![urls(&["get"], &public)]),
    ]
}

/// The roles for namespaces, and what they gather.
fn aggregated() -> Vec<Object> {
    let gathers = |name: &str, part_of: &[&str]| {
        let mut whole = role(name, part_of, Vec::new());
        let selector = json!({"matchLabels": {aggregate_to(name): "true"}});
        whole.insert("aggregationRule".to_owned(), json!({"clusterRoleSelectors": [selector]}));
        whole
    };
    let namespaced = [MACHINES, IMAGES, OPERATIONS].concat();
    vec![
        gathers("admin", &[]),
        gathers("edit", &["admin"]),
        gathers("view", &["edit"]),
        role(
            "system:aggregate-to-admin",
            &["admin"],
            vec![
                rule(CREATE, AUTHORIZATION, &["localsubjectaccessreviews"]),
                rule(READ_WRITE, &[RBAC], &["roles", "rolebindings"]),
            ],
        ),
        role(
            "system:aggregate-to-edit",
            &["edit"],
            vec![
                // What is in a secret is not for those who only view.
                rule(READ, CORE, &["secrets"]),
                rule(&["impersonate"], CORE, &["serviceaccounts"]),
                rule(
                    WRITE,
                    CORE,
                    &[
                        "configmaps",
                        "persistentvolumeclaims",
                        "pods",
                        "secrets",
                        "serviceaccounts",
                        "services",
                    ],
                ),
                rule(CREATE, CORE, &["serviceaccounts/token"]),
                rule(WRITE, EVENTS, &["events"]),
                rule(WRITE, NETWORKING, &["ingresses", "networkpolicies"]),
                rule(READ_WRITE, LEASES, &["leases"]),
                rule(WRITE, SNAPSHOTS, &["volumesnapshots"]),
            ],
        ),
        role(
            "system:aggregate-to-view",
            &["view"],
            vec![
                rule(
                    READ,
                    CORE,
                    &[
                        "configmaps",
                        "namespaces",
                        "namespaces/status",
                        "persistentvolumeclaims",
                        "persistentvolumeclaims/status",
                        "pods",
                        "pods/log",
                        "pods/status",
                        "resourcequotas",
                        "resourcequotas/status",
                        "serviceaccounts",
                        "services",
                        "services/status",
                    ],
                ),
                rule(READ, EVENTS, &["events"]),
                rule(READ, NETWORKING, &["ingresses", "ingresses/status", "networkpolicies"]),
                rule(READ, SNAPSHOTS, &["volumesnapshots"]),
            ],
        ),
        role(
            "dvcr:aggregate-to-edit",
            &["edit"],
            vec![rule(WRITE, VIRTUALIZATION, &namespaced), rule(SESSION_VERBS, SUBRESOURCES, SESSIONS)],
        ),
        role(
            "dvcr:aggregate-to-view",
            &["view"],
            vec![rule(READ, VIRTUALIZATION, &namespaced), rule(READ, VIRTUALIZATION, SHARED)],
        ),
    ]
}

/// What our controllers do.
fn controller() -> Vec<Value> {
    vec![
        rule(ALL, VIRTUALIZATION, ALL),
        rule(ALL, SUBRESOURCES, ALL),
        rule(ALL, KUBEVIRT, ALL),
        rule(ALL, &["subresources.kubevirt.io"], ALL),
        rule(
            READ_WRITE,
            CORE,
            &["configmaps", "persistentvolumeclaims", "pods", "secrets", "serviceaccounts", "services"],
        ),
        rule(
            READ,
            CORE,
            &[
                "namespaces",
                "nodes",
                "persistentvolumeclaims/status",
                "pods/log",
                "pods/status",
                "resourcequotas",
            ],
        ),
        rule(READ_UPDATE, CORE, &["persistentvolumes"]),
        rule(&["create", "update", "patch"], EVENTS, &["events"]),
        rule(READ_WRITE, NETWORKING, &["ingresses", "networkpolicies"]),
        rule(READ_WRITE, LEASES, &["leases"]),
        rule(READ, STORAGE, &["storageclasses", "volumeattachments"]),
        rule(READ_WRITE, SNAPSHOTS, &["volumesnapshots"]),
        rule(READ, SNAPSHOTS, &["volumesnapshotclasses", "volumesnapshotcontents"]),
        rule(READ, &["apiextensions.k8s.io"], &["customresourcedefinitions"]),
        rule(CREATE, AUTHENTICATION, &["tokenreviews"]),
        rule(CREATE, AUTHORIZATION, &["subjectaccessreviews"]),
    ]
}

/// What the agent of a node does: Pods, the volumes of the storage class `local`, and instances of virtual machines.
fn node() -> Vec<Value> {
    vec![
        rule(&["get", "list", "watch", "create", "update", "patch"], CORE, &["nodes"]),
        rule(
            UPDATE,
            CORE,
            &["nodes/status", "persistentvolumeclaims/status", "persistentvolumes/status", "pods/status"],
        ),
        rule(&["get", "list", "watch", "delete"], CORE, &["pods"]),
        rule(CREATE, CORE, &["bindings", "pods/binding", "serviceaccounts/token"]),
        rule(READ, CORE, &["configmaps", "namespaces", "secrets", "serviceaccounts", "services"]),
        rule(READ_UPDATE, CORE, &["persistentvolumeclaims"]),
        rule(READ_WRITE, CORE, &["persistentvolumes"]),
        rule(&["create", "update", "patch"], EVENTS, &["events"]),
        rule(READ_WRITE, LEASES, &["leases"]),
        rule(READ, STORAGE, &["storageclasses"]),
        rule(READ_UPDATE, SNAPSHOTS, &["volumesnapshots"]),
        rule(READ, SNAPSHOTS, &["volumesnapshotclasses"]),
        rule(READ_WRITE, SNAPSHOTS, &["volumesnapshotcontents"]),
        rule(UPDATE, SNAPSHOTS, &["volumesnapshotcontents/status", "volumesnapshots/status"]),
        rule(READ_UPDATE, KUBEVIRT, &["virtualmachineinstances", "virtualmachineinstancemigrations"]),
        rule(
            UPDATE,
            KUBEVIRT,
            &["virtualmachineinstances/status", "virtualmachineinstancemigrations/status"],
        ),
        rule(CREATE, AUTHENTICATION, &["tokenreviews"]),
        rule(CREATE, AUTHORIZATION, &["localsubjectaccessreviews", "subjectaccessreviews"]),
    ]
}

/// The access levels. Each role has all of its rules, so that one binding is enough.
fn levels() -> Vec<Object> {
    let all = |lists: &[&[&'static str]]| lists.concat();
    let added: [Vec<Value>; LEVELS.len()] = [
        vec![rule(READ, VIRTUALIZATION, &all(&[MACHINES, IMAGES, OPERATIONS, SHARED]))],
        vec![rule(CREATE, VIRTUALIZATION, OPERATIONS), rule(SESSION_VERBS, SUBRESOURCES, SESSIONS)],
        vec![rule(WRITE, VIRTUALIZATION, &all(&[MACHINES, OPERATIONS]))],
        vec![rule(WRITE, VIRTUALIZATION, IMAGES), rule(READ, VIRTUALIZATION, ADDRESS_LEASES)],
        vec![rule(WRITE, VIRTUALIZATION, SHARED)],
        vec![
            rule(WRITE, VIRTUALIZATION, ADDRESS_LEASES),
            rule(READ, &["kubevirt.io", "cdi.kubevirt.io", "internal.virtualization.deckhouse.io"], ALL),
        ],
    ];
    let mut rules = Vec::new();
    let roles = LEVELS.iter().zip(added).map(|((name, level), added)| {
        rules.extend(added);
        let mut whole = role(&format!("d8:user-authz:virtualization:{name}"), &[], rules.clone());
        whole.insert("metadata".to_owned(), {
            let mut metadata = whole.get("metadata").cloned().unwrap_or_default();
            metadata["annotations"]["user-authz.deckhouse.io/access-level"] = json!(level);
            metadata
        });
        whole
    });
    roles.collect()
}

fn aggregate_to(role: &str) -> String {
    format!("{RBAC}/aggregate-to-{role}")
}

fn role(name: &str, part_of: &[&str], rules: Vec<Value>) -> Object {
    let labels = part_of.iter().map(|role| (aggregate_to(role), json!("true")));
    let mut object = bootstrap("ClusterRole", name, labels.collect());
    object.insert("rules".to_owned(), json!(rules));
    object
}

/// A binding to the role of the same name.
fn binding(name: &str, subjects: &[(&str, &str)]) -> Object {
    let mut object = bootstrap("ClusterRoleBinding", name, Map::new());
    object.insert("roleRef".to_owned(), json!({"apiGroup": RBAC, "kind": "ClusterRole", "name": name}));
    let subjects = subjects.iter().map(|(kind, name)| json!({"apiGroup": RBAC, "kind": kind, "name": name}));
    object.insert("subjects".to_owned(), subjects.collect());
    object
}

/// An object that is put in a new store, marked as Kubernetes marks its own.
fn bootstrap(kind: &str, name: &str, mut labels: Object) -> Object {
    labels.insert("kubernetes.io/bootstrapping".to_owned(), json!("rbac-defaults"));
    let annotations = json!({"rbac.authorization.kubernetes.io/autoupdate": "true"});
    let mut object = Map::new();
    object.insert("apiVersion".to_owned(), json!(format!("{RBAC}/v1")));
    object.insert("kind".to_owned(), json!(kind));
    object.insert("metadata".to_owned(), json!({"name": name, "labels": labels, "annotations": annotations}));
    object
}

fn rule(verbs: &[&str], groups: &[&str], resources: &[&str]) -> Value {
    json!({"verbs": verbs, "apiGroups": groups, "resources": resources})
}

fn urls(verbs: &[&str], urls: &[&str]) -> Value {
    json!({"verbs": verbs, "nonResourceURLs": urls})
}

#[cfg(test)]
mod tests;
