//! All roles and bindings, indexed by who they are for.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use serde_json::Value;

use super::{Change, Decision, GROUP, Rule, Target};
use crate::auth::user::{MASTERS, User, service_account_name};
use crate::field::quote;
use crate::object::{self, Object};

/// Most rules that an aggregated role gathers; those beyond are not in it.
const AGGREGATED_RULES_MAX: usize = 10_000;
/// Most different reasons why bindings could not be tried that one decision tells.
const REASONS_MAX: usize = 10;

/// The namespace of what has none.
const CLUSTER: &str = "";

/// What is known of who may what.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// By namespace, ClusterRoles without one, and name.
    roles: HashMap<String, HashMap<String, Arc<Role>>>,
    /// By namespace and name.
    bindings: HashMap<String, HashMap<String, Arc<Binding>>>,
    users: Index,
    groups: Index,
}

#[derive(Clone, Debug, Default)]
struct Role {
    rules: Vec<Arc<Rule>>,
    labels: BTreeMap<String, String>,
    /// Of a role that gathers those of others.
    aggregation: Option<Vec<Selector>>,
}

#[derive(Debug)]
struct Binding {
    namespace: String,
    name: String,
    role_kind: String,
    role_name: String,
    subjects: Vec<Subject>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Subject {
    User(String),
    Group(String),
    ServiceAccount { namespace: String, name: String },
}

/// The bindings of each subject, by namespace and their names.
#[derive(Clone, Debug, Default)]
struct Index(HashMap<String, HashMap<String, BTreeMap<String, Bound>>>);

/// A binding, and which of its subjects is meant.
#[derive(Clone, Debug)]
struct Bound {
    binding: Arc<Binding>,
    subject: usize,
}

impl Policy {
    /// Takes changes over.
    pub(super) fn apply<'a>(&mut self, changes: impl IntoIterator<Item = Change<'a>>) {
        let mut aggregate = false;
        for change in changes {
            let (object, put) = match change {
                Change::Put(object) => (object, true),
                Change::Delete(object) => (object, false),
            };
            let (Some(kind), Some(name)) = (object.get("kind").and_then(Value::as_str), object::name(object))
            else {
                continue;
            };
            let ours =
                object::text(object, &["apiVersion"]).is_some_and(|version| version.starts_with(GROUP));
            let namespace = match kind {
                "Role" | "RoleBinding" => object::namespace(object).unwrap_or_default(),
                _ => CLUSTER,
            };
            // Without its namespace it would be taken for one of the cluster's.
            let lost = namespace.is_empty() && matches!(kind, "Role" | "RoleBinding");
            match kind {
                _ if !ours || lost => {}
                "Role" | "ClusterRole" => {
                    aggregate |= kind == "ClusterRole";
                    let role = put.then(|| Role::from_object(object, kind == "ClusterRole"));
                    self.set_role(namespace, name, role);
                }
                "RoleBinding" | "ClusterRoleBinding" => {
                    let binding = put.then(|| Binding::from_object(object, namespace, name));
                    self.set_binding(namespace, name, binding);
                }
                _ => {}
            }
        }
        if aggregate {
            self.aggregate();
        }
    }

    fn set_role(&mut self, namespace: &str, name: &str, role: Option<Role>) {
        match role {
            Some(role) => {
                self.roles.entry(namespace.to_owned()).or_default().insert(name.to_owned(), Arc::new(role));
            }
            None => remove(&mut self.roles, namespace, name),
        }
    }

    fn set_binding(&mut self, namespace: &str, name: &str, binding: Option<Binding>) {
        if let Some(old) = self.bindings.get(namespace).and_then(|bindings| bindings.get(name)) {
            let old = Arc::clone(old);
            for subject in &old.subjects {
                let (index, key) = subject.key(&mut self.users, &mut self.groups);
                index.remove(&key, namespace, name);
            }
        }
        let Some(binding) = binding else { return remove(&mut self.bindings, namespace, name) };
        let binding = Arc::new(binding);
        for (at, subject) in binding.subjects.iter().enumerate() {
            let (index, key) = subject.key(&mut self.users, &mut self.groups);
            let bindings = index.0.entry(key).or_default().entry(namespace.to_owned()).or_default();
            bindings
                .entry(name.to_owned())
                .or_insert_with(|| Bound { binding: Arc::clone(&binding), subject: at });
        }
        self.bindings.entry(namespace.to_owned()).or_default().insert(name.to_owned(), binding);
    }

    /// Gathers the rules of aggregated roles anew. One that is chosen by another one gives it what it gathers itself; a circle of them
    /// gathers what all of its members do.
    fn aggregate(&mut self) {
        let Some(roles) = self.roles.get_mut(CLUSTER) else { return };
        let gathering: Vec<String> = roles
            .iter()
            .filter(|(_, role)| role.aggregation.is_some())
            .map(|(name, _)| name.clone())
            .collect();
        let mut by_name: Vec<(&String, &Arc<Role>)> = roles.iter().collect();
        by_name.sort_by_key(|(name, _)| *name);
        let chosen: HashMap<&str, Vec<(&str, &Arc<Role>)>> = gathering
            .iter()
            .filter_map(|name| {
                let selectors = roles.get(name)?.aggregation.as_ref()?;
                let fits = |role: &Role| selectors.iter().any(|selector| selector.matches(&role.labels));
                let others = by_name.iter().filter(|(other, role)| *other != name && fits(role));
                Some((name.as_str(), others.map(|(other, role)| (other.as_str(), *role)).collect()))
            })
            .collect();
        let mut gathered: Vec<(String, Vec<Arc<Rule>>)> = Vec::new();
        for name in &gathering {
            let (mut seen, mut known) = (HashSet::from([name.as_str()]), HashSet::new());
            let mut rules: Vec<Arc<Rule>> = Vec::new();
            let mut left = vec![name.as_str()];
            while let Some(next) = left.pop() {
                for (other, role) in chosen.get(next).into_iter().flatten() {
                    match role.aggregation {
                        Some(_) if seen.insert(*other) => left.push(*other),
                        Some(_) => {}
                        None => rules
                            .extend(role.rules.iter().filter(|rule| known.insert(Arc::clone(rule))).cloned()),
                    }
                }
            }
            if rules.len() > AGGREGATED_RULES_MAX {
                tracing::warn!(
                    role = name.as_str(),
                    rules = rules.len(),
                    kept = AGGREGATED_RULES_MAX,
                    "an aggregated ClusterRole has more rules than are kept; those beyond are not granted by it"
                );
                rules.truncate(AGGREGATED_RULES_MAX);
            }
            gathered.push((name.clone(), rules));
        }
        for (name, rules) in gathered {
            if let Some(role) = roles.get_mut(&name) {
                Arc::make_mut(role).rules = rules;
            }
        }
    }

    /// The rules of a ClusterRole, with those it gathers: what is written in the `rules` of an aggregated one. `None` if there is no such role.
    pub fn cluster_role_rules(&self, name: &str) -> Option<Vec<Arc<Rule>>> {
        Some(self.roles.get(CLUSTER)?.get(name)?.rules.clone())
    }

    /// The names of ClusterRoles that gather the rules of others.
    pub fn aggregated_roles(&self) -> Vec<&str> {
        let roles = self.roles.get(CLUSTER).into_iter().flatten();
        let mut names: Vec<&str> =
            roles.filter(|(_, role)| role.aggregation.is_some()).map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        names
    }

    /// Decides whether a user may do this.
    pub fn authorize(&self, user: &User, verb: &str, target: &Target<'_>) -> Decision {
        if user.is_in(MASTERS) {
            return Decision { allowed: true, reason: String::new() };
        }
        let mut missing = BTreeSet::new();
        for bound in self.bound(user, target.namespace()) {
            match self.role_of(&bound.binding) {
                Some(role) if role.rules.iter().any(|rule| rule.allows(verb, target)) => {
                    return Decision {
                        allowed: true,
                        reason: format!("RBAC: allowed by {}", bound.describe()),
                    };
                }
                Some(_) => {}
                None if missing.len() < REASONS_MAX => {
                    missing.insert(bound.binding.missing());
                }
                None => {}
            }
        }
        Decision { allowed: false, reason: reason_of(&missing) }
    }

    /// All rules that hold for a user in a namespace, and why some may be missing.
    pub fn rules_for(&self, user: &User, namespace: &str) -> (Vec<Arc<Rule>>, String) {
        let (mut rules, mut missing, mut seen) = (Vec::new(), BTreeSet::new(), HashSet::new());
        for bound in self.bound(user, namespace) {
            if !seen.insert(Arc::as_ptr(&bound.binding)) {
                continue;
            }
            match self.role_of(&bound.binding) {
                Some(role) => rules.extend(role.rules.iter().cloned()),
                None if missing.len() < REASONS_MAX => {
                    missing.insert(bound.binding.missing());
                }
                None => {}
            }
        }
        (rules, reason_of(&missing))
    }

    /// The rules of the role that a binding in a namespace names.
    pub(super) fn rules_of(&self, kind: &str, name: &str, namespace: &str) -> Option<Vec<Arc<Rule>>> {
        Some(self.role(kind, name, namespace)?.rules.clone())
    }

    /// The bindings of a user: those of the cluster, then those of the namespace.
    fn bound<'a>(&'a self, user: &'a User, namespace: &'a str) -> impl Iterator<Item = &'a Bound> {
        let places = [Some(CLUSTER), Some(namespace).filter(|namespace| *namespace != CLUSTER)];
        places.into_iter().flatten().flat_map(move |place| {
            let groups = user.groups.iter().flat_map(move |group| self.groups.get(group, place));
            self.users.get(&user.name, place).chain(groups)
        })
    }

    fn role_of(&self, binding: &Binding) -> Option<&Arc<Role>> {
        self.role(&binding.role_kind, &binding.role_name, &binding.namespace)
    }

    fn role(&self, kind: &str, name: &str, namespace: &str) -> Option<&Arc<Role>> {
        match kind {
            "ClusterRole" => self.roles.get(CLUSTER)?.get(name),
            "Role" if namespace != CLUSTER => self.roles.get(namespace)?.get(name),
            _ => None,
        }
    }
}

fn remove<T>(all: &mut HashMap<String, HashMap<String, T>>, namespace: &str, name: &str) {
    if let Some(some) = all.get_mut(namespace) {
        some.remove(name);
        if some.is_empty() {
            all.remove(namespace);
        }
    }
}

fn reason_of(missing: &BTreeSet<String>) -> String {
    let all: Vec<&str> = missing.iter().map(String::as_str).collect();
    match all.as_slice() {
        [] => String::new(),
        [one] => format!("RBAC: {one}"),
        more => format!("RBAC: [{}]", more.join(", ")),
    }
}

impl Role {
    fn from_object(object: &Object, cluster: bool) -> Self {
        let rules = object.get("rules").and_then(Value::as_array).into_iter().flatten();
        let mut role = Self {
            rules: rules.filter_map(Rule::from_json).map(Arc::new).collect(),
            labels: texts(object::metadata(object).and_then(|metadata| metadata.get("labels"))),
            aggregation: None,
        };
        if let (true, Some(Value::Object(aggregation))) = (cluster, object.get("aggregationRule")) {
            let selectors =
                aggregation.get("clusterRoleSelectors").and_then(Value::as_array).into_iter().flatten();
            role.aggregation = Some(selectors.filter_map(Selector::from_json).collect());
            // They are what was gathered when it was written.
            role.rules.clear();
        }
        role
    }
}

impl Binding {
    fn from_object(object: &Object, namespace: &str, name: &str) -> Self {
        let subjects = object.get("subjects").and_then(Value::as_array).into_iter().flatten();
        let text = |path: &[&str]| object::text(object, path).unwrap_or_default().to_owned();
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            role_kind: text(&["roleRef", "kind"]),
            role_name: text(&["roleRef", "name"]),
            subjects: subjects.filter_map(|subject| Subject::from_json(subject, namespace)).collect(),
        }
    }

    /// Why the role of the binding gives nothing.
    fn missing(&self) -> String {
        match self.role_kind.as_str() {
            kind @ ("Role" | "ClusterRole") => {
                format!("{}.{GROUP} {} not found", kind.to_ascii_lowercase(), quote(&self.role_name))
            }
            kind => format!("unsupported role reference kind: {}", quote(kind)),
        }
    }
}

impl Subject {
    fn from_json(value: &Value, binding_namespace: &str) -> Option<Self> {
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        let name = text("name")?.to_owned();
        match text("kind")? {
            "User" => Some(Self::User(name)),
            "Group" => Some(Self::Group(name)),
            "ServiceAccount" => {
                let own = text("namespace").filter(|namespace| !namespace.is_empty());
                let namespace = own.unwrap_or(binding_namespace).to_owned();
                (!namespace.is_empty()).then_some(Self::ServiceAccount { namespace, name })
            }
            _ => None,
        }
    }

    /// Which index it is in, and under what: service accounts are users by another name.
    fn key<'a>(&self, users: &'a mut Index, groups: &'a mut Index) -> (&'a mut Index, String) {
        match self {
            Self::User(name) => (users, name.clone()),
            Self::Group(name) => (groups, name.clone()),
            Self::ServiceAccount { namespace, name } => (users, service_account_name(namespace, name)),
        }
    }
}

impl Index {
    fn get(&self, subject: &str, namespace: &str) -> impl Iterator<Item = &Bound> {
        self.0.get(subject).and_then(|places| places.get(namespace)).into_iter().flat_map(BTreeMap::values)
    }

    fn remove(&mut self, subject: &str, namespace: &str, name: &str) {
        let Some(places) = self.0.get_mut(subject) else { return };
        if let Some(bindings) = places.get_mut(namespace) {
            bindings.remove(name);
            if bindings.is_empty() {
                places.remove(namespace);
            }
        }
        if places.is_empty() {
            self.0.remove(subject);
        }
    }
}

impl Bound {
    fn describe(&self) -> String {
        let Binding { namespace, name, role_kind, role_name, subjects } = &*self.binding;
        let subject = match subjects.get(self.subject) {
            Some(Subject::User(name)) => format!("User {}", quote(name)),
            Some(Subject::Group(name)) => format!("Group {}", quote(name)),
            Some(Subject::ServiceAccount { namespace, name }) => {
                format!("ServiceAccount {}", quote(&format!("{name}/{namespace}")))
            }
            None => String::new(),
        };
        let (kind, name) = match namespace.as_str() {
            CLUSTER => ("ClusterRoleBinding", quote(name)),
            namespace => ("RoleBinding", quote(&format!("{name}/{namespace}"))),
        };
        format!("{kind} {name} of {role_kind} {} to {subject}", quote(role_name))
    }
}

/// A label selector.
#[derive(Clone, Debug)]
struct Selector {
    equal: BTreeMap<String, String>,
    expressions: Vec<(String, Operator, Vec<String>)>,
}

#[derive(Clone, Copy, Debug)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl Selector {
    /// Reads a selector; `None` if any part of it cannot be read, as it would choose more than was meant.
    fn from_json(value: &Value) -> Option<Self> {
        let selector = value.as_object()?;
        let equal = match selector.get("matchLabels") {
            None | Some(Value::Null) => BTreeMap::new(),
            Some(Value::Object(labels)) => labels
                .iter()
                .map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
                .collect::<Option<_>>()?,
            Some(_) => return None,
        };
        let expressions = match selector.get("matchExpressions") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(expressions)) => expressions.iter().map(expression).collect::<Option<_>>()?,
            Some(_) => return None,
        };
        Some(Self { equal, expressions })
    }

    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.equal.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.expressions.iter().all(|(key, operator, values)| match (operator, labels.get(key)) {
                (Operator::In, found) => found.is_some_and(|value| values.contains(value)),
                (Operator::NotIn, found) => found.is_none_or(|value| !values.contains(value)),
                (Operator::Exists, found) => found.is_some(),
                (Operator::DoesNotExist, found) => found.is_none(),
            })
    }
}

fn expression(value: &Value) -> Option<(String, Operator, Vec<String>)> {
    let values = match value.get("values") {
        None | Some(Value::Null) => Vec::new(),
        Some(values) => {
            values.as_array()?.iter().map(|one| one.as_str().map(str::to_owned)).collect::<Option<_>>()?
        }
    };
    let operator = match value.get("operator")?.as_str()? {
        "In" => Operator::In,
        "NotIn" => Operator::NotIn,
        "Exists" => Operator::Exists,
        "DoesNotExist" => Operator::DoesNotExist,
        _ => return None,
    };
    Some((value.get("key")?.as_str()?.to_owned(), operator, values))
}

fn texts(value: Option<&Value>) -> BTreeMap<String, String> {
    let texts = value.and_then(Value::as_object).into_iter().flatten();
    texts.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}
