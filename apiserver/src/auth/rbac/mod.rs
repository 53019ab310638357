//! What somebody may: rules of roles, reached through bindings (Kubernetes documentation, "Using RBAC Authorization").
//!
//! ```text
//!   Role, ClusterRole, RoleBinding, ClusterRoleBinding ──> Rbac ──snapshot──> Policy ──> authorize, rules, escalation
//!                                                          (fed by a watch)
//! ```
//!
//! A policy is indexed by subject and namespace: a request tries the rules that are bound to its user and its groups, and none else.
//! There is no rule that forbids: what nothing allows is refused.

mod escalation;
#[cfg(test)]
mod oracle;
mod policy;
mod rule;
#[cfg(test)]
mod tests;
mod validate;

use std::borrow::Cow;
use std::sync::{Arc, PoisonError, RwLock};

pub use policy::Policy;
pub use rule::Rule;
pub use validate::{default, validate};

use super::user::User;
use crate::field::quote;
use crate::object::Object;
use crate::status::{Details, Reason, Status};

/// API group of the RBAC kinds.
pub const GROUP: &str = "rbac.authorization.k8s.io";

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// Objects of the API. What does not apply is empty: a list has no name, a ClusterRole no namespace.
    Resource { group: &'a str, resource: &'a str, subresource: &'a str, namespace: &'a str, name: &'a str },
    /// Anything else, by its path.
    Path(&'a str),
}

impl Target<'_> {
    fn namespace(&self) -> &str {
        match self {
            Self::Resource { namespace, .. } => namespace,
            Self::Path(_) => "",
        }
    }
}

/// Whether a request is allowed, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    /// The binding that allows it, or what kept bindings from being tried; empty if nobody has an opinion.
    pub reason: String,
}

/// What happened to an object of the RBAC kinds.
#[derive(Clone, Copy, Debug)]
pub enum Change<'a> {
    /// It was made or changed, or was there from the beginning.
    Put(&'a Object),
    /// It was deleted.
    Delete(&'a Object),
}

/// The policy of now, which many read while one changes it.
#[derive(Debug, Default)]
pub struct Rbac(RwLock<Arc<Policy>>);

impl Rbac {
    /// The policy as it is now. What changes later is not in it.
    pub fn snapshot(&self) -> Arc<Policy> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes changes over. All of one call become visible together; objects of other kinds are none of its business.
    pub fn apply<'a>(&self, changes: impl IntoIterator<Item = Change<'a>>) {
        let mut policy = self.0.write().unwrap_or_else(PoisonError::into_inner);
        // A copy is made only while somebody holds a snapshot.
        Arc::make_mut(&mut policy).apply(changes);
    }
}

/// The answer to who may not, with the reason of the decision.
pub fn forbidden(user: &User, verb: &str, target: &Target<'_>, reason: &str) -> Status {
    let who = quote(&user.name);
    let (group, resource, name, what) = match target {
        Target::Path(path) => ("", "", "", format!("User {who} cannot {verb} path {}", quote(path))),
        Target::Resource { group, resource, subresource, namespace, name } => {
            let whole = match *subresource {
                "" => Cow::Borrowed(*resource),
                sub => Cow::Owned(format!("{resource}/{sub}")),
            };
            let place = match *namespace {
                "" => "at the cluster scope".to_owned(),
                namespace => format!("in the namespace {}", quote(namespace)),
            };
            let (whole, in_group) = (quote(&whole), quote(group));
            (
                *group,
                *resource,
                *name,
                format!("User {who} cannot {verb} resource {whole} in API group {in_group} {place}"),
            )
        }
    };
    // Browsers take for HTML what looks like it.
    let mut what = what.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    if !reason.is_empty() {
        what = format!("{what}: {reason}");
    }
    forbidden_object(group, resource, name, &what)
}

/// The answer to a request for an object that may not be done, for a reason.
pub(super) fn forbidden_object(group: &str, resource: &str, name: &str, why: &str) -> Status {
    let whole = match group {
        "" => resource.to_owned(),
        group => format!("{resource}.{group}"),
    };
    let message = match (whole.as_str(), name) {
        ("", _) => format!("forbidden: {why}"),
        (whole, "") => format!("{whole} is forbidden: {why}"),
        (whole, name) => format!("{whole} {} is forbidden: {why}", quote(name)),
    };
    let details = Details {
        name: name.to_owned(),
        group: group.to_owned(),
        kind: resource.to_owned(),
        ..Details::default()
    };
    Status { details: Box::new(details), ..Status::new(Reason::Forbidden, message) }
}

/// Quotes texts as Kubernetes' messages do with lists.
fn quote_list(texts: &[String]) -> String {
    format!("[{}]", texts.iter().map(|text| quote(text)).collect::<Vec<_>>().join(" "))
}
