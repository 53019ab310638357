use std::collections::BTreeSet;

use super::*;
use crate::auth::rbac::{Change, Policy, Rbac, Target};
use crate::auth::user::User;
use crate::object;

/// What each level may do with each resource: C create, R get, list and watch, U update and patch, D delete and deletecollection; Y the verbs
/// of sessions, N none of them.
const MATRIX: &str = "
| resource | User | PrivilegedUser | Editor | Admin | ClusterEditor | ClusterAdmin |
| virtualmachines, virtualdisks, virtualmachineblockdeviceattachments, virtualmachineipaddresses | R | R | CRUD | CRUD | CRUD | CRUD |
| virtualdisksnapshots, virtualmachinesnapshots | R | R | CRUD | CRUD | CRUD | CRUD |
| virtualimages | R | R | R | CRUD | CRUD | CRUD |
| clustervirtualimages, virtualmachineclasses | R | R | R | R | CRUD | CRUD |
| virtualmachineoperations | R | CR | CRUD | CRUD | CRUD | CRUD |
| virtualmachineipaddressleases | - | - | - | R | R | CRUD |
| virtualmachines/console, virtualmachines/vnc, virtualmachines/portforward | N | Y | Y | Y | Y | Y |
";
const VERBS: [(char, &[&str]); 4] = [
    ('C', &["create"]),
    ('R', &["get", "list", "watch"]),
    ('U', &["update", "patch"]),
    ('D', &["delete", "deletecollection"]),
];

fn policy(more: &[Object]) -> Policy {
    let rbac = Rbac::default();
    let objects = objects();
    rbac.apply(objects.iter().chain(more).map(Change::Put));
    (*rbac.snapshot()).clone()
}

fn user(name: &str, groups: &[&str]) -> User {
    User {
        name: name.to_owned(),
        groups: groups.iter().map(|group| (*group).to_owned()).collect(),
        ..User::default()
    }
}

/// Binds a role to a user of the same name, in a namespace or everywhere.
fn bound(role: &str, namespace: &str) -> Object {
    let mut object = binding(role, &[("User", role)]);
    if !namespace.is_empty() {
        object.insert("kind".to_owned(), json!("RoleBinding"));
        object.insert("metadata".to_owned(), json!({"name": role, "namespace": namespace}));
    }
    object
}

fn may(policy: &Policy, who: &User, verb: &str, group: &str, resource: &str, namespace: &str) -> bool {
    let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
    policy
        .authorize(who, verb, &Target::Resource { group, resource, subresource, namespace, name: "" })
        .allowed
}

#[test]
fn each_access_level_may_what_the_table_says_and_nothing_else() {
    let names: Vec<String> =
        LEVELS.iter().map(|(name, _)| format!("d8:user-authz:virtualization:{name}")).collect();
    let policy = policy(&names.iter().map(|name| bound(name, "")).collect::<Vec<_>>());
    let cells = |line: &'static str| line.trim_matches('|').split('|').map(str::trim).collect::<Vec<&str>>();
    let mut lines = MATRIX.lines().filter(|line| !line.is_empty()).map(cells);
    let header = lines.next().unwrap();
    assert_eq!(header[1..], LEVELS.map(|(_, level)| level));
    let mut asserted = 0;
    for line in lines {
        for resource in line[0].split(", ") {
            for (at, cell) in line[1..].iter().enumerate() {
                let who = user(&names[at], &[]);
                for (letter, verbs) in VERBS {
                    for verb in verbs {
                        let (group, expected) = match *cell {
                            "Y" => (SUBRESOURCES[0], SESSION_VERBS.contains(verb)),
                            "N" => (SUBRESOURCES[0], false),
                            letters => (VIRTUALIZATION[0], letters.contains(letter)),
                        };
                        let is = may(&policy, &who, verb, group, resource, "d");
                        assert_eq!(is, expected, "{} {verb} {resource}", header[at + 1]);
                        asserted += 1;
                    }
                }
                assert!(!may(&policy, &who, "escalate", VIRTUALIZATION[0], resource, "d"));
                assert!(!may(&policy, &who, "get", "", resource, "d"), "the group counts");
            }
        }
    }
    assert_eq!(asserted, 14 * 6 * 8, "a row or a column is missing");
}

#[test]
fn access_levels_are_known_by_their_annotation_and_each_covers_the_one_before() {
    let names: Vec<String> =
        LEVELS.iter().map(|(name, _)| format!("d8:user-authz:virtualization:{name}")).collect();
    let policy = policy(&[]);
    let all = objects();
    let mut before: BTreeSet<_> = BTreeSet::new();
    for (name, (_, level)) in names.iter().zip(LEVELS) {
        let role = all.iter().find(|role| object::name(role) == Some(name.as_str())).unwrap();
        assert_eq!(role["metadata"]["annotations"]["user-authz.deckhouse.io/access-level"], level);
        let rules: BTreeSet<_> = policy.cluster_role_rules(name).unwrap().into_iter().collect();
        assert!(rules.is_superset(&before) && rules.len() > before.len(), "{name}");
        before = rules;
    }
    let top = user(names.last().unwrap(), &[]);
    let policy = self::policy(&[bound(names.last().unwrap(), "")]);
    assert!(may(&policy, &top, "list", "kubevirt.io", "virtualmachineinstances", "d"));
    assert!(!may(&policy, &top, "delete", "kubevirt.io", "virtualmachineinstances", "d"));
    assert!(!may(&policy, &top, "get", "", "secrets", "d"));
}

#[test]
fn strangers_learn_what_is_public_and_users_the_rest_about_the_api_and_themselves() {
    let policy = policy(&[]);
    let anonymous = User::anonymous();
    let somebody = user("u", &[AUTHENTICATED]);
    let path = |who: &User, path: &str| policy.authorize(who, "get", &Target::Path(path)).allowed;
    for public in ["/healthz", "/readyz", "/livez", "/version"] {
        assert!(path(&anonymous, public) && path(&somebody, public), "{public}");
        assert!(!policy.authorize(&anonymous, "post", &Target::Path(public)).allowed);
    }
    for known in ["/api", "/api/v1", "/apis", "/apis/x/v1", "/openapi/v3", "/openapi/v3/apis/x"] {
        assert!(!path(&anonymous, known) && path(&somebody, known), "{known}");
    }
    for closed in ["/metrics", "/logs", "/", "/healthz/log"] {
        assert!(!path(&anonymous, closed) && !path(&somebody, closed), "{closed}");
    }
    let reviews = [
        ("authorization.k8s.io", "selfsubjectaccessreviews"),
        ("authorization.k8s.io", "selfsubjectrulesreviews"),
        ("authentication.k8s.io", "selfsubjectreviews"),
    ];
    for (group, resource) in reviews {
        assert!(may(&policy, &somebody, "create", group, resource, ""));
        assert!(!may(&policy, &anonymous, "create", group, resource, ""));
    }
    assert!(!may(&policy, &somebody, "create", "authorization.k8s.io", "subjectaccessreviews", ""));
    assert!(!may(&policy, &somebody, "list", "", "namespaces", ""));
}

#[test]
fn view_edit_and_admin_gather_their_rules_and_stay_in_their_namespace() {
    let policy = policy(&["view", "edit", "admin"].map(|role| bound(role, "d")));
    let [view, edit, admin] = ["view", "edit", "admin"].map(|name| user(name, &[]));
    let disks = (VIRTUALIZATION[0], "virtualdisks");
    for (verb, (group, resource), [by_view, by_edit, by_admin]) in [
        ("get", ("", "pods"), [true, true, true]),
        ("get", ("", "pods/log"), [true, true, true]),
        ("delete", ("", "pods"), [false, true, true]),
        ("get", ("", "secrets"), [false, true, true]),
        ("create", ("", "serviceaccounts/token"), [false, true, true]),
        ("create", ("", "resourcequotas"), [false, false, false]),
        ("update", ("", "pods/status"), [false, false, false]),
        ("watch", disks, [true, true, true]),
        ("create", disks, [false, true, true]),
        ("create", (SUBRESOURCES[0], "virtualmachines/console"), [false, true, true]),
        ("create", (RBAC, "rolebindings"), [false, false, true]),
        ("create", ("authorization.k8s.io", "localsubjectaccessreviews"), [false, false, true]),
        ("escalate", (RBAC, "roles"), [false, false, false]),
    ] {
        for (who, expected) in [(&view, by_view), (&edit, by_edit), (&admin, by_admin)] {
            assert_eq!(
                may(&policy, who, verb, group, resource, "d"),
                expected,
                "{} {verb} {resource}",
                who.name
            );
            assert!(
                !may(&policy, who, verb, group, resource, "e")
                    && !may(&policy, who, verb, group, resource, "")
            );
        }
    }
    assert_eq!(policy.aggregated_roles(), ["admin", "edit", "view"]);
}

#[test]
fn masters_our_controllers_and_our_nodes_may_their_work() {
    let policy = policy(&[]);
    let controller = user(CONTROLLER, &[AUTHENTICATED]);
    let node = user("system:node:n", &[NODES, AUTHENTICATED]);
    assert!(may(&policy, &controller, "create", "", "pods", "d"));
    assert!(may(&policy, &controller, "patch", VIRTUALIZATION[0], "virtualdisks/status", "d"));
    assert!(!may(&policy, &controller, "create", RBAC, "clusterrolebindings", ""));
    assert!(
        may(&policy, &node, "patch", "", "pods/status", "d")
            && may(&policy, &node, "create", "", "nodes", "")
    );
    assert!(
        !may(&policy, &node, "create", "", "pods", "d") && !may(&policy, &node, "create", "", "secrets", "d")
    );
    let rules = policy.rules_for(&user("root", &[MASTERS]), "d").0;
    assert_eq!(rules.len(), 2, "a master is told that it may everything");
}

#[test]
fn no_two_objects_have_the_same_name_and_each_binding_finds_its_role() {
    let all = objects();
    let mut seen = BTreeSet::new();
    for one in &all {
        assert!(seen.insert((one["kind"].as_str().unwrap(), object::name(one).unwrap())));
    }
    for (kind, name) in &seen {
        assert!(*kind == "ClusterRole" || seen.contains(&("ClusterRole", name)), "{name}");
    }
}
