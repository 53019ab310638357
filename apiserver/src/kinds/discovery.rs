//! What kinds there are, told to clients: `/api`, `/apis`, `/apis/GROUP/VERSION`, and all in one (aggregated discovery, KEP-3352).

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{GroupVersionKind, Names};
use crate::request::Verb;

/// A version's name taken apart: stable before beta before alpha, later before earlier (Kubernetes, "Version priority").
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Priority<'a> {
    Named(std::cmp::Reverse<&'a str>),
    Numbered(u8, u64, u64),
}

fn priority(version: &str) -> Priority<'_> {
    let numbered = || {
        let rest = version.strip_prefix('v')?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (major, rest) = rest.split_at(digits);
        let number = |text: &str| text.parse::<u64>().ok().filter(|n| *n > 0 && !text.starts_with('+'));
        let major = number(major)?;
        match rest {
            "" => Some(Priority::Numbered(2, major, 0)),
            rest => match (rest.strip_prefix("beta"), rest.strip_prefix("alpha")) {
                (Some(minor), _) => Some(Priority::Numbered(1, major, number(minor)?)),
                (_, Some(minor)) => Some(Priority::Numbered(0, major, number(minor)?)),
                _ => None,
            },
        }
    };
    numbered().unwrap_or(Priority::Named(std::cmp::Reverse(version)))
}

/// Orders versions of a group, the preferred one first.
pub fn compare_versions(one: &str, other: &str) -> Ordering {
    priority(other).cmp(&priority(one))
}

/// All kinds by group and version, each group's preferred version first.
#[derive(Clone, Debug, Default)]
pub struct Discovery {
    groups: BTreeMap<String, Vec<(String, Vec<Names>)>>,
}

impl Discovery {
    /// Sorts kinds.
    pub fn new(kinds: impl IntoIterator<Item = Names>) -> Self {
        let mut groups = BTreeMap::<String, Vec<(String, Vec<Names>)>>::new();
        for names in kinds {
            let versions = groups.entry(names.gvk.group.clone()).or_default();
            match versions.iter_mut().find(|(version, _)| *version == names.gvk.version) {
                Some((_, kinds)) => kinds.push(names),
                None => versions.push((names.gvk.version.clone(), vec![names])),
            }
        }
        for versions in groups.values_mut() {
            versions.sort_by(|(one, _), (other, _)| compare_versions(one, other));
            for (_, kinds) in versions {
                kinds.sort_by(|one, other| one.plural.cmp(&other.plural));
            }
        }
        Self { groups }
    }

    /// `/api`: APIVersions.
    pub fn legacy(&self) -> Value {
        let versions: Vec<_> =
            self.groups.get("").into_iter().flatten().map(|(version, _)| version).collect();
        json!({ "kind": "APIVersions", "versions": versions, "serverAddressByClientCIDRs": [] })
    }

    /// `/apis`: APIGroupList.
    pub fn groups(&self) -> Value {
        let named = self.groups.iter().filter(|(group, _)| !group.is_empty());
        let groups: Vec<_> = named.map(|(group, versions)| told_group(group, versions)).collect();
        json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups })
    }

    /// `/apis/GROUP`: APIGroup; `None` if there is no such group.
    pub fn group(&self, group: &str) -> Option<Value> {
        let mut told = told_group(group, self.groups.get(group).filter(|_| !group.is_empty())?);
        (told["kind"], told["apiVersion"]) = ("APIGroup".into(), "v1".into());
        Some(told)
    }

    /// `/api/v1`, `/apis/GROUP/VERSION`: APIResourceList; `None` if there is no such version.
    pub fn resources(&self, group: &str, version: &str) -> Option<Value> {
        let (_, kinds) = self.groups.get(group)?.iter().find(|(known, _)| known == version)?;
        let mut resources = Vec::new();
        for names in kinds {
            let mut told = json!({
                "name": names.plural,
                "singularName": names.singular,
                "namespaced": names.is_namespaced,
                "kind": names.gvk.kind,
                "verbs": verbs(names.verbs),
            });
            add_names(&mut told, names);
            resources.push(told);
            for part in &names.subresources {
                let mut told = json!({
                    "name": format!("{}/{}", names.plural, part.name),
                    "singularName": "",
                    "namespaced": names.is_namespaced,
                    "kind": part.kind.as_ref().map_or(&names.gvk.kind, |other| &other.kind),
                    "verbs": verbs(part.verbs),
                });
                if let Some(other) = part.kind.as_ref().filter(|other| other.group != names.gvk.group) {
                    (told["group"], told["version"]) =
                        (other.group.as_str().into(), other.version.as_str().into());
                }
                resources.push(told);
            }
        }
        let group_version = GroupVersionKind::new(group, version, "").api_version();
        Some(json!({
            "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources,
        }))
    }

    /// All in one, APIGroupDiscoveryList of apidiscovery.k8s.io/v2: `/api` tells of the core group, `/apis` of all others.
    pub fn aggregated(&self, legacy: bool) -> Value {
        let items = self.groups.iter().filter(|(group, _)| group.is_empty() == legacy);
        let items: Vec<_> = items.map(|(group, versions)| told_aggregated(group, versions)).collect();
        json!({
            "kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items,
        })
    }
}

fn told_group(group: &str, versions: &[(String, Vec<Names>)]) -> Value {
    let told = |version: &String| json!({ "groupVersion": format!("{group}/{version}"), "version": version });
    let versions: Vec<_> = versions.iter().map(|(version, _)| told(version)).collect();
    json!({ "name": group, "preferredVersion": versions.first(), "versions": versions })
}

fn told_aggregated(group: &str, versions: &[(String, Vec<Names>)]) -> Value {
    let mut told = Vec::new();
    for (version, kinds) in versions {
        let resources: Vec<_> = kinds.iter().map(told_resource).collect();
        told.push(json!({ "version": version, "freshness": "Current", "resources": resources }));
    }
    let metadata = if group.is_empty() { json!({}) } else { json!({ "name": group }) };
    json!({ "metadata": metadata, "versions": told })
}

fn told_resource(names: &Names) -> Value {
    let kind = |of: &GroupVersionKind| {
        // What is not told is the same as that of the version it stands below.
        let (group, version) = match of.group == names.gvk.group && of.version == names.gvk.version {
            true => ("", ""),
            false => (of.group.as_str(), of.version.as_str()),
        };
        json!({ "group": group, "version": version, "kind": of.kind })
    };
    let mut told = json!({
        "resource": names.plural,
        "singularResource": names.singular,
        "scope": if names.is_namespaced { "Namespaced" } else { "Cluster" },
        "responseKind": kind(&names.gvk),
        "verbs": verbs(names.verbs),
    });
    add_names(&mut told, names);
    if !names.subresources.is_empty() {
        let parts = names.subresources.iter().map(|part| {
            let of = part.kind.as_ref().unwrap_or(&names.gvk);
            json!({ "subresource": part.name, "responseKind": kind(of), "verbs": verbs(part.verbs) })
        });
        told["subresources"] = parts.collect();
    }
    told
}

fn add_names(told: &mut Value, names: &Names) {
    if !names.short_names.is_empty() {
        told["shortNames"] = json!(names.short_names);
    }
    if !names.categories.is_empty() {
        told["categories"] = json!(names.categories);
    }
}

fn verbs(verbs: &[Verb]) -> Vec<&'static str> {
    verbs.iter().map(|verb| verb.name()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::core;
    use super::*;

    #[test]
    fn versions_are_in_the_order_of_their_priority() {
        let mut versions = [
            "v1alpha1",
            "foo10",
            "v2",
            "v11beta2",
            "v10",
            "v3beta1",
            "v1",
            "foo1",
            "v12alpha1",
            "v11alpha2",
            "v10beta3",
        ];
        versions.sort_by(|one, other| compare_versions(one, other));
        assert_eq!(
            versions,
            [
                "v10",
                "v2",
                "v1",
                "v11beta2",
                "v10beta3",
                "v3beta1",
                "v12alpha1",
                "v11alpha2",
                "v1alpha1",
                "foo1",
                "foo10"
            ]
        );
    }

    #[test]
    fn the_core_kinds_are_told_in_every_form() {
        let discovery = Discovery::new(core());
        assert_eq!(discovery.legacy()["versions"], json!(["v1"]));
        let groups = discovery.groups();
        let names: Vec<_> =
            groups["groups"].as_array().unwrap().iter().map(|g| g["name"].as_str().unwrap()).collect();
        assert!(!names.contains(&"") && names.contains(&"rbac.authorization.k8s.io"), "{names:?}");
        assert_eq!(
            discovery.group("storage.k8s.io").unwrap()["preferredVersion"]["groupVersion"],
            "storage.k8s.io/v1"
        );
        assert_eq!((discovery.group(""), discovery.group("none")), (None, None));

        let core = discovery.resources("", "v1").unwrap();
        assert_eq!(core["groupVersion"], "v1");
        let find = |name: &str| {
            core["resources"].as_array().unwrap().iter().find(|r| r["name"] == name).unwrap().clone()
        };
        assert_eq!(find("pods")["shortNames"], json!(["po"]));
        assert_eq!(find("pods/log")["verbs"], json!(["get"]));
        let token = find("serviceaccounts/token");
        assert_eq!(
            (&token["group"], &token["kind"]),
            (&json!("authentication.k8s.io"), &json!("TokenRequest"))
        );
        assert!(
            find("namespaces")["verbs"].as_array().unwrap().iter().all(|verb| verb != "deletecollection")
        );
        assert_eq!(discovery.resources("", "v2"), None);

        let (legacy, named) = (discovery.aggregated(true), discovery.aggregated(false));
        assert_eq!(legacy["items"].as_array().unwrap().len(), 1);
        assert_eq!(named["items"].as_array().unwrap().len(), names.len());
        let reviews = named["items"]
            .as_array()
            .unwrap()
            .iter()
            .find(|i| i["metadata"]["name"] == "authorization.k8s.io")
            .unwrap();
        let review = &reviews["versions"][0]["resources"][0];
        assert_eq!(
            (&review["resource"], &review["scope"]),
            (&json!("localsubjectaccessreviews"), &json!("Namespaced"))
        );
        assert_eq!(review["verbs"], json!(["create"]));
    }
}
