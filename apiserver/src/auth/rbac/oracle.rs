//! The quick evaluation against a slow one: all bindings and all rules, one by one, as they are written.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::tests::{meta, on, user};
use super::*;

type Objects = BTreeMap<(String, String, String), Object>;

const NAMESPACES: [&str; 3] = ["", "a", "b"];
const VERBS: [&str; 3] = ["get", "delete", "*"];
const GROUPS: [&str; 3] = ["", "x", "*"];
const RESOURCES: [&str; 7] = ["pods", "pods/log", "disks", "disks/log", "*/log", "*", "pods/*"];
const NAMES: [&str; 2] = ["one", "two"];
const URLS: [&str; 4] = ["/x", "/x/*", "/x*", "*"];
const ROLES: [&str; 4] = ["r0", "r1", "r2", "r3"];

fn texts<'a>(value: &'a Value, key: &str) -> Vec<&'a str> {
    value.get(key).and_then(Value::as_array).into_iter().flatten().map(|one| one.as_str().unwrap()).collect()
}

/// What the documentation says of one rule.
fn rule_allows(rule: &Value, verb: &str, target: &Target<'_>) -> bool {
    let any = |key: &str, wanted: &[&str]| texts(rule, key).iter().any(|one| wanted.contains(one));
    if !any("verbs", &["*", verb]) {
        return false;
    }
    match target {
        Target::Path(path) => {
            texts(rule, "nonResourceURLs").into_iter().any(|url| match url.strip_suffix('*') {
                Some(start) => path.starts_with(start),
                None => url == *path,
            })
        }
        Target::Resource { group, resource, subresource, name, .. } => {
            let wanted = match *subresource {
                "" => vec!["*".to_owned(), (*resource).to_owned()],
                sub => vec!["*".to_owned(), format!("{resource}/{sub}"), format!("*/{sub}")],
            };
            let wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
            let names = texts(rule, "resourceNames");
            any("apiGroups", &["*", group])
                && any("resources", &wanted)
                && (names.is_empty() || names.contains(name))
        }
    }
}

/// The rules of all ClusterRoles, gathered until nothing changes any more.
fn cluster_rules(objects: &Objects) -> BTreeMap<String, BTreeSet<String>> {
    let roles: Vec<&Object> = objects.values().filter(|object| object["kind"] == "ClusterRole").collect();
    let name = |role: &Object| role["metadata"]["name"].as_str().unwrap().to_owned();
    let mut rules: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for role in &roles {
        let own = match role.contains_key("aggregationRule") {
            true => BTreeSet::new(),
            false => role["rules"].as_array().unwrap().iter().map(Value::to_string).collect(),
        };
        rules.insert(name(role), own);
    }
    loop {
        let before = rules.clone();
        for role in roles.iter().filter(|role| role.contains_key("aggregationRule")) {
            let selectors = role["aggregationRule"]["clusterRoleSelectors"].as_array().unwrap();
            for other in roles.iter().filter(|other| name(other) != name(role)) {
                let labels = other["metadata"]["labels"].as_object().unwrap();
                let chosen = selectors.iter().any(|selector| {
                    selector["matchLabels"]
                        .as_object()
                        .unwrap()
                        .iter()
                        .all(|(key, value)| labels.get(key) == Some(value))
                });
                if chosen {
                    let more = rules[&name(other)].clone();
                    rules.get_mut(&name(role)).unwrap().extend(more);
                }
            }
        }
        if rules == before {
            return rules;
        }
    }
}

/// All rules of a user in a namespace.
fn rules_of(objects: &Objects, who: &User, namespace: &str) -> BTreeSet<String> {
    let cluster = cluster_rules(objects);
    let mut all = BTreeSet::new();
    for ((kind, place, _), binding) in objects {
        if !kind.ends_with("Binding") || !(place.is_empty() || place == namespace) {
            continue;
        }
        let applies = binding["subjects"].as_array().unwrap().iter().any(|subject| {
            let name = subject["name"].as_str().unwrap();
            match subject["kind"].as_str().unwrap() {
                "User" => who.name == name,
                "Group" => who.groups.iter().any(|group| group == name),
                _ => {
                    let own = subject["namespace"].as_str().unwrap_or(place);
                    !own.is_empty() && who.name == format!("system:serviceaccount:{own}:{name}")
                }
            }
        });
        if !applies {
            continue;
        }
        let role = binding["roleRef"]["name"].as_str().unwrap();
        if binding["roleRef"]["kind"] == "ClusterRole" {
            all.extend(cluster.get(role).cloned().unwrap_or_default());
        } else if let Some(role) = objects.get(&("Role".to_owned(), place.clone(), role.to_owned())) {
            all.extend(role["rules"].as_array().unwrap().iter().map(Value::to_string));
        }
    }
    all
}

fn some(of: &'static [&'static str]) -> impl Strategy<Value = Vec<&'static str>> {
    prop::sample::subsequence(of, 0..=of.len())
}

fn rules() -> impl Strategy<Value = Vec<Value>> {
    let resources = (some(&VERBS), some(&GROUPS), some(&RESOURCES), some(&NAMES)).prop_map(|(verbs, groups, resources, names)| {
        json!({"verbs": verbs, "apiGroups": groups, "resources": resources, "resourceNames": names})
    });
    let urls = (some(&VERBS), some(&URLS))
        .prop_map(|(verbs, urls)| json!({"verbs": verbs, "nonResourceURLs": urls}));
    prop::collection::vec(prop_oneof![3 => resources, 1 => urls], 0..3)
}

fn objects() -> impl Strategy<Value = Object> {
    let label = || prop::sample::select(vec!["", "p", "q"]);
    let place = || prop::sample::select(NAMESPACES[1..].to_vec());
    let name = || prop::sample::select(ROLES.to_vec());
    let cluster_role =
        (name(), rules(), label(), prop::option::of(label())).prop_map(|(name, rules, label, gathers)| {
            let mut role = meta("ClusterRole", "", name, json!({"rules": rules}));
            role["metadata"]["labels"] = json!({ "l": label });
            if let Some(gathers) = gathers {
                let selector = json!({"matchLabels": {"l": gathers}});
                role.insert("aggregationRule".to_owned(), json!({"clusterRoleSelectors": [selector]}));
            }
            role
        });
    let role = (place(), name(), rules())
        .prop_map(|(place, name, rules)| meta("Role", place, name, json!({"rules": rules})));
    let subject = (
        prop::sample::select(vec!["User", "Group", "ServiceAccount"]),
        prop::sample::select(vec!["u", "g", "s"]),
        prop::option::of(place()),
    );
    let subject = subject.prop_map(|(kind, name, place)| match (kind, place) {
        ("ServiceAccount", Some(place)) => json!({"kind": kind, "name": name, "namespace": place}),
        _ => json!({"kind": kind, "name": name}),
    });
    let names = prop::sample::select(vec!["b0", "b1", "b2", "b3", "b4"]);
    let kinds = prop::sample::select(vec!["Role", "ClusterRole"]);
    let places = prop::sample::select(NAMESPACES.to_vec());
    let subjects = prop::collection::vec(subject, 0..3);
    let binding = (places, names, kinds, name(), subjects).prop_map(|(place, name, kind, role, subjects)| {
        let whole = if place.is_empty() { "ClusterRoleBinding" } else { "RoleBinding" };
        meta(whole, place, name, json!({"roleRef": {"kind": kind, "name": role}, "subjects": subjects}))
    });
    prop_oneof![2 => cluster_role, 1 => role, 3 => binding]
}

/// Makes a policy by steps, and the objects that are left after them.
fn played(steps: Vec<(Object, bool)>) -> (Policy, Objects) {
    let (rbac, mut left) = (Rbac::default(), Objects::new());
    for (object, put) in steps {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let key = (
            text(&object["kind"]),
            text(&object["metadata"]["namespace"]),
            text(&object["metadata"]["name"]),
        );
        match put {
            true => rbac.apply([Change::Put(&object)]),
            false => rbac.apply([Change::Delete(&object)]),
        }
        match put {
            true => drop(left.insert(key, object)),
            false => drop(left.remove(&key)),
        }
    }
    ((*rbac.snapshot()).clone(), left)
}

fn users() -> Vec<User> {
    vec![
        user("u", &[]),
        user("s", &["g"]),
        user("g", &["u", "g", "g"]),
        User::service_account("a", "s", ""),
        User::service_account("b", "u", ""),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_index_decides_as_all_rules_tried_one_by_one(
        steps in prop::collection::vec((objects(), prop::bool::weighted(0.8)), 0..25),
    ) {
        let (policy, left) = played(steps);
        for who in users() {
            let own = rules_of(&left, &who, "");
            let own: Vec<Value> = own.iter().map(|rule| serde_json::from_str(rule).unwrap()).collect();
            for namespace in NAMESPACES {
                let expected = rules_of(&left, &who, namespace);
                let (found, _) = policy.rules_for(&who, namespace);
                // What is empty is left out, and no test makes two rules of that.
                let plain = |rule: &Value| Rule::from_json(rule).unwrap();
                let rules: Vec<Value> = expected.iter().map(|rule| serde_json::from_str(rule).unwrap()).collect();
                let expected: BTreeSet<Rule> = rules.iter().map(plain).collect();
                let found: BTreeSet<Rule> = found.iter().map(|rule| (**rule).clone()).collect();
                prop_assert_eq!(expected, found);
                for verb in VERBS {
                    for (group, resource) in [("", "pods"), ("x", "pods/log"), ("", "disks"), ("y", "disks/log"), ("", "*")] {
                        for name in ["", "one"] {
                            let target = on(group, resource, namespace, name);
                            let expected = rules.iter().any(|rule| rule_allows(rule, verb, &target));
                            prop_assert_eq!(policy.authorize(&who, verb, &target).allowed, expected);
                        }
                    }
                    for path in ["/x", "/x/y", "/xy", "/"] {
                        let target = Target::Path(path);
                        let expected = own.iter().any(|rule| rule_allows(rule, verb, &target));
                        prop_assert_eq!(policy.authorize(&who, verb, &target).allowed, expected);
                    }
                }
            }
        }
    }

    #[test]
    fn who_may_write_a_role_could_do_all_that_it_gives(own in rules(), given in rules()) {
        let bind = json!({"roleRef": {"kind": "ClusterRole", "name": "own"}, "subjects": [{"kind": "User", "name": "u"}]});
        let (policy, _) = played(vec![
            (meta("ClusterRole", "", "own", json!({"rules": own})), true),
            (meta("ClusterRoleBinding", "", "b", bind), true),
        ]);
        let who = user("u", &[]);
        let written = policy.may_write_role(&who, &meta("ClusterRole", "", "new", json!({"rules": given})), None);
        let part_missing = given.iter().map(|rule| Rule::from_json(rule).unwrap()).any(|rule| {
            rule.split().any(|part| !own.iter().any(|own| Rule::from_json(own).unwrap().covers(&part)))
        });
        let escalates = policy.authorize(&who, "escalate", &on(GROUP, "clusterroles", "", "")).allowed;
        prop_assert_eq!(written.is_ok(), !part_missing || escalates);
        if written.is_err() || escalates {
            return Ok(());
        }
        for verb in VERBS {
            for group in ["", "x", "y", "*"] {
                for resource in ["pods", "pods/log", "disks", "disks/log", "other", "other/log", "other/x", "*"] {
                    for name in ["", "one", "two", "three"] {
                        let target = on(group, resource, "a", name);
                        if given.iter().any(|rule| rule_allows(rule, verb, &target)) {
                            prop_assert!(policy.authorize(&who, verb, &target).allowed, "{} {:?}", verb, target);
                        }
                    }
                }
            }
            for path in ["/x", "/x/y", "/xy", "/", "*"] {
                if given.iter().any(|rule| rule_allows(rule, verb, &Target::Path(path))) {
                    prop_assert!(policy.authorize(&who, verb, &Target::Path(path)).allowed, "{} {}", verb, path);
                }
            }
        }
    }
}
