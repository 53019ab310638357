//! One rule of a role: what it lets do, and whether it covers another.

use serde_json::{Map, Value, json};

use super::Target;
use crate::object::Object;

/// Stands for everything.
const ALL: &str = "*";

/// A `PolicyRule` of rbac.authorization.k8s.io/v1.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    pub verbs: Vec<String>,
    pub api_groups: Vec<String>,
    pub resources: Vec<String>,
    pub resource_names: Vec<String>,
    pub non_resource_urls: Vec<String>,
}

impl Rule {
    /// Reads a rule; `None` if any of its lists is no list of strings, so that a name that cannot be read never makes a rule of all names.
    pub fn from_json(value: &Value) -> Option<Self> {
        let rule = value.as_object()?;
        Some(Self {
            verbs: strings(rule, "verbs")?,
            api_groups: strings(rule, "apiGroups")?,
            resources: strings(rule, "resources")?,
            resource_names: strings(rule, "resourceNames")?,
            non_resource_urls: strings(rule, "nonResourceURLs")?,
        })
    }

    /// Writes the rule as an object; what is empty is left out, but for the verbs.
    pub fn to_json(&self) -> Object {
        let mut rule = Map::new();
        rule.insert("verbs".to_owned(), json!(self.verbs));
        let lists = [
            ("apiGroups", &self.api_groups),
            ("resources", &self.resources),
            ("resourceNames", &self.resource_names),
            ("nonResourceURLs", &self.non_resource_urls),
        ];
        for (key, list) in lists.into_iter().filter(|(_, list)| !list.is_empty()) {
            rule.insert(key.to_owned(), json!(list));
        }
        rule
    }

    /// Whether the rule lets do this.
    pub fn allows(&self, verb: &str, target: &Target<'_>) -> bool {
        if !has(&self.verbs, verb) {
            return false;
        }
        match target {
            Target::Path(path) => self.non_resource_urls.iter().any(|url| url_covers(url, path)),
            Target::Resource { group, resource, subresource, name, .. } => {
                has(&self.api_groups, group)
                    && self.resources.iter().any(|one| resource_matches(one, resource, subresource))
                    && (self.resource_names.is_empty() || self.resource_names.iter().any(|one| one == name))
            }
        }
    }

    /// Whether the rule lets do all that another one does.
    pub fn covers(&self, other: &Self) -> bool {
        let all = |own: &[String], others: &[String]| others.iter().all(|one| has(own, one));
        let resource = |one: &String| {
            has(&self.resources, one)
                || one.split_once('/').is_some_and(|(_, sub)| {
                    self.resources.iter().any(|own| own.strip_prefix("*/").is_some_and(|own| own == sub))
                })
        };
        let names = self.resource_names.is_empty()
            || (!other.resource_names.is_empty()
                && other.resource_names.iter().all(|name| self.resource_names.contains(name)));
        all(&self.verbs, &other.verbs)
            && all(&self.api_groups, &other.api_groups)
            && other.resources.iter().all(resource)
            && names
            && other
                .non_resource_urls
                .iter()
                .all(|url| self.non_resource_urls.iter().any(|own| url_covers(own, url)))
    }

    /// How many combinations of one verb, group, resource and name, or of one verb and URL, the rule is.
    pub fn combinations(&self) -> usize {
        let resources = [self.api_groups.len(), self.resources.len(), self.resource_names.len().max(1)];
        let resources = resources.into_iter().fold(1_usize, usize::saturating_mul);
        resources.saturating_add(self.non_resource_urls.len()).saturating_mul(self.verbs.len())
    }

    /// Splits the rule into its combinations.
    pub fn split(&self) -> impl Iterator<Item = Self> {
        let one = |text: &String| vec![text.clone()];
        let names = move |names: &Vec<String>| match names.is_empty() {
            true => vec![Vec::new()],
            false => names.iter().map(one).collect(),
        };
        let resources = self.api_groups.iter().flat_map(move |group| {
            self.resources.iter().flat_map(move |resource| {
                names(&self.resource_names).into_iter().flat_map(move |resource_names| {
                    self.verbs.iter().map(move |verb| Self {
                        verbs: one(verb),
                        api_groups: one(group),
                        resources: one(resource),
                        resource_names: resource_names.clone(),
                        non_resource_urls: Vec::new(),
                    })
                })
            })
        });
        let urls = self.non_resource_urls.iter().flat_map(move |url| {
            self.verbs.iter().map(move |verb| Self {
                verbs: one(verb),
                non_resource_urls: one(url),
                ..Self::default()
            })
        });
        resources.chain(urls)
    }
}

/// A list of strings of an object; empty if there is none, `None` if it is something else.
fn strings(object: &Object, key: &str) -> Option<Vec<String>> {
    match object.get(key) {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(|one| one.as_str().map(str::to_owned)).collect(),
        Some(_) => None,
    }
}

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|one| one == ALL || one == wanted)
}

/// Whether a resource of a rule, such as `pods`, `pods/log`, `*/scale` or `*`, is the one of a request.
fn resource_matches(own: &str, resource: &str, subresource: &str) -> bool {
    if own == ALL {
        return true;
    }
    if subresource.is_empty() {
        return own == resource;
    }
    match own.strip_suffix(subresource).and_then(|before| before.strip_suffix('/')) {
        Some(before) => before == ALL || before == resource,
        None => false,
    }
}

/// Whether a URL of a rule, which may end in `*`, covers a path or another such URL.
fn url_covers(own: &str, path: &str) -> bool {
    own == ALL || own == path || (own.ends_with('*') && path.starts_with(own.trim_end_matches('*')))
}
