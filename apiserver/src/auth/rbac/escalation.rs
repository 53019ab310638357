//! Nobody gives away what he does not hold (Kubernetes documentation, "Privilege escalation prevention and bootstrapping").

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::Value;

use super::{GROUP, Policy, Rule, Target, forbidden_object, quote_list};
use crate::auth::user::{MASTERS, User};
use crate::field::quote;
use crate::object::{self, Object};
use crate::status::{Details, Reason, Result, Status};

/// Most combinations of verb, group, resource and name that are compared one by one for a role.
const COMBINATIONS_MAX: usize = 100_000;
/// Most comparisons of a combination with a rule.
const COMPARISONS_MAX: usize = 10_000_000;
/// Most permissions that an answer lists.
const LISTED_MAX: usize = 100;

impl Policy {
    /// Checks that a user may make a Role or a ClusterRole, or turn `old` into it: it must hold all permissions in it, or `escalate`; with an
    /// `aggregationRule`, all there are.
    ///
    /// # Errors
    /// `Forbidden` with the permissions that are missing.
    pub fn may_write_role(&self, user: &User, role: &Object, old: Option<&Object>) -> Result<()> {
        let resource = match object::text(role, &["kind"]) {
            Some("Role") => "roles",
            _ => "clusterroles",
        };
        let namespace = object::namespace(role).unwrap_or_default();
        // Whoever makes one has no name of it in the request.
        let name = old.and_then(object::name).unwrap_or_default();
        let target = Target::Resource { group: GROUP, resource, subresource: "", namespace, name };
        if user.is_in(MASTERS)
            || same_but_for_collection(role, old)
            || self.authorize(user, "escalate", &target).allowed
        {
            return Ok(());
        }
        let refuse =
            |why: &str| forbidden_object(GROUP, resource, object::name(role).unwrap_or_default(), why);
        let rules = role.get("rules").and_then(Value::as_array).into_iter().flatten();
        let rules: Vec<Arc<Rule>> = rules.filter_map(Rule::from_json).map(Arc::new).collect();
        self.holds(user, namespace, &rules).map_err(|why| refuse(&why))?;
        let gathers = |role: &Object| match role
            .get("aggregationRule")
            .and_then(|rule| rule.get("clusterRoleSelectors"))
        {
            Some(Value::Array(selectors)) => !selectors.is_empty(),
            _ => false,
        };
        if resource == "clusterroles" && (gathers(role) || old.is_some_and(gathers)) {
            let all = || vec!["*".to_owned()];
            let everything = [
                Rule { verbs: all(), api_groups: all(), resources: all(), ..Rule::default() },
                Rule { verbs: all(), non_resource_urls: all(), ..Rule::default() },
            ];
            self.holds(user, namespace, &everything.map(Arc::new))
                .map_err(|_| refuse("must have cluster-admin privileges to use the aggregationRule"))?;
        }
        Ok(())
    }

    /// Checks that a user may make a RoleBinding or a ClusterRoleBinding, or turn `old` into it: it must hold all permissions of the role, or
    /// `bind` on it.
    ///
    /// # Errors
    /// `Forbidden` with the permissions that are missing; `NotFound` if there is no such role.
    pub fn may_write_binding(&self, user: &User, binding: &Object, old: Option<&Object>) -> Result<()> {
        if user.is_in(MASTERS) || same_but_for_collection(binding, old) {
            return Ok(());
        }
        let resource = match object::text(binding, &["kind"]) {
            Some("RoleBinding") => "rolebindings",
            _ => "clusterrolebindings",
        };
        let namespace = object::namespace(binding).unwrap_or_default();
        let text = |key: &str| object::text(binding, &["roleRef", key]).unwrap_or_default();
        let (kind, role) = (text("kind"), text("name"));
        let roles = match kind {
            "Role" => "roles",
            _ => "clusterroles",
        };
        let target =
            Target::Resource { group: GROUP, resource: roles, subresource: "", namespace, name: role };
        if matches!(kind, "Role" | "ClusterRole") && self.authorize(user, "bind", &target).allowed {
            return Ok(());
        }
        let rules = self.rules_of(kind, role, namespace).ok_or_else(|| {
            let kind = kind.to_ascii_lowercase();
            let message = format!("{kind}.{GROUP} {} not found", quote(role));
            let details =
                Details { name: role.to_owned(), group: GROUP.to_owned(), kind, ..Details::default() };
            Status { details: Box::new(details), ..Status::new(Reason::NotFound, message) }
        })?;
        let name = object::name(binding).unwrap_or_default();
        self.holds(user, namespace, &rules).map_err(|why| forbidden_object(GROUP, resource, name, &why))
    }

    /// Whether a user holds all that rules give, in a namespace or, without one, in the whole cluster; else which not.
    fn holds(&self, user: &User, namespace: &str, rules: &[Arc<Rule>]) -> Result<(), String> {
        let (own, unresolved) = self.rules_for(user, namespace);
        let left: Vec<&Arc<Rule>> =
            rules.iter().filter(|rule| !own.iter().any(|own| own.covers(rule))).collect();
        let combinations = left.iter().fold(0_usize, |sum, rule| sum.saturating_add(rule.combinations()));
        if combinations > COMBINATIONS_MAX || combinations.saturating_mul(own.len()) > COMPARISONS_MAX {
            return Err(format!(
                "the role has {combinations} combinations of verb, API group, resource and name that no rule held by user {} covers as \
                 it stands, too many to compare; write fewer of them, or several roles",
                quote(&user.name)
            ));
        }
        let parts = left.iter().flat_map(|rule| rule.split());
        let missing: Vec<Rule> = parts.filter(|part| !own.iter().any(|own| own.covers(part))).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let mut message = format!(
            "user {} (groups={}) is attempting to grant RBAC permissions not currently held:\n{}",
            quote(&user.name),
            quote_list(&user.groups),
            describe(missing)
        );
        if !unresolved.is_empty() {
            message.push_str("; resolution errors: [");
            message.push_str(unresolved.trim_start_matches("RBAC: "));
            message.push(']');
        }
        Err(message)
    }
}

/// Whether nothing changes but what garbage collection needs.
fn same_but_for_collection(new: &Object, old: Option<&Object>) -> bool {
    let rest = |object: &Object| {
        let mut object = object.clone();
        let metadata = object::metadata_mut(&mut object);
        for key in ["ownerReferences", "finalizers", "managedFields", "resourceVersion"] {
            metadata.remove(key);
        }
        object
    };
    old.is_some_and(|old| rest(old) == rest(new))
}

/// Lists permissions, those that differ in the verb alone on one line.
fn describe(missing: Vec<Rule>) -> String {
    let mut lines: BTreeMap<Rule, Vec<String>> = BTreeMap::new();
    for mut rule in missing {
        let verbs = std::mem::take(&mut rule.verbs);
        match rule.non_resource_urls.is_empty() {
            true => lines.entry(rule).or_default().extend(verbs),
            false => drop(lines.insert(Rule { verbs: verbs.clone(), ..rule }, verbs)),
        }
    }
    let lines: BTreeSet<String> = lines
        .into_iter()
        .map(|(rule, verbs)| {
            let lists = [
                ("APIGroups", &rule.api_groups),
                ("Resources", &rule.resources),
                ("NonResourceURLs", &rule.non_resource_urls),
                ("ResourceNames", &rule.resource_names),
                ("Verbs", &verbs),
            ];
            let parts = lists.into_iter().filter(|(_, list)| !list.is_empty());
            let parts: Vec<String> = parts.map(|(key, list)| format!("{key}:{}", quote_list(list))).collect();
            format!("{{{}}}", parts.join(", "))
        })
        .collect();
    let more = lines.len().saturating_sub(LISTED_MAX);
    let mut lines: Vec<String> = lines.into_iter().take(LISTED_MAX).collect();
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests;
