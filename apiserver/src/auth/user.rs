//! Who asks.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::rbac::{Policy, Target, forbidden};
use crate::object::Object;
use crate::status::{Result, Status};

/// The user that shows nothing.
pub const ANONYMOUS: &str = "system:anonymous";
/// The group of all who showed who they are.
pub const AUTHENTICATED: &str = "system:authenticated";
/// The group of those who showed nothing.
pub const UNAUTHENTICATED: &str = "system:unauthenticated";
/// The group that may everything, whatever the roles say.
pub const MASTERS: &str = "system:masters";
/// The group of all service accounts.
pub const SERVICE_ACCOUNTS: &str = "system:serviceaccounts";
/// What the user names of service accounts begin with.
const SERVICE_ACCOUNT: &str = "system:serviceaccount:";
/// Most attributes that one request impersonates.
const IMPERSONATED_MAX: usize = 256;
/// What the headers of extra attributes begin with, in lower case.
const EXTRA_HEADER: &str = "impersonate-extra-";

/// Somebody who asks, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub name: String,
    /// Empty if there is none: people's certificates have none.
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// Nobody in particular.
    pub fn anonymous() -> Self {
        Self { name: ANONYMOUS.to_owned(), groups: vec![UNAUTHENTICATED.to_owned()], ..Self::default() }
    }

    /// A service account, with the groups that all of them are in.
    pub fn service_account(namespace: &str, name: &str, uid: &str) -> Self {
        Self {
            name: service_account_name(namespace, name),
            uid: uid.to_owned(),
            groups: service_account_groups(namespace).into_iter().chain([AUTHENTICATED.to_owned()]).collect(),
            extra: BTreeMap::new(),
        }
    }

    pub fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|one| one == group)
    }

    /// As `UserInfo` of authentication.k8s.io/v1; what is empty is left out.
    pub fn to_info(&self) -> Object {
        let mut info = Map::new();
        if !self.name.is_empty() {
            info.insert("username".to_owned(), json!(self.name));
        }
        if !self.uid.is_empty() {
            info.insert("uid".to_owned(), json!(self.uid));
        }
        if !self.groups.is_empty() {
            info.insert("groups".to_owned(), json!(self.groups));
        }
        if !self.extra.is_empty() {
            info.insert("extra".to_owned(), json!(self.extra));
        }
        info
    }
}

/// The user name of a service account.
pub fn service_account_name(namespace: &str, name: &str) -> String {
    format!("{SERVICE_ACCOUNT}{namespace}:{name}")
}

fn service_account_groups(namespace: &str) -> Vec<String> {
    vec![SERVICE_ACCOUNTS.to_owned(), format!("{SERVICE_ACCOUNTS}:{namespace}")]
}

/// Namespace and name of a service account from its user name.
fn split_service_account(user: &str) -> Option<(&str, &str)> {
    let (namespace, name) = user.strip_prefix(SERVICE_ACCOUNT)?.split_once(':')?;
    let label = |text: &str, dots: bool| {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || (dots && c == '.');
        let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        text.chars().all(inner) && text.starts_with(edge) && text.ends_with(edge)
    };
    (label(namespace, false) && namespace.len() <= 63 && label(name, true) && name.len() <= 253)
        .then_some((namespace, name))
}

/// Returns the user that a request is made as: its own, or the one that its `Impersonate-*` headers name, if it may `impersonate` each of
/// the attributes (Kubernetes documentation, "Authenticating", user impersonation). Names of headers are compared in any case.
///
/// # Errors
/// `BadRequest` for attributes without a user, or too many of them; `Forbidden` for what may not be impersonated.
pub fn impersonated<'a>(
    user: &User,
    headers: impl IntoIterator<Item = (&'a str, &'a str)>,
    policy: &Policy,
) -> Result<Option<User>> {
    let mut asked = User::default();
    let mut count = 0_usize;
    for (header, value) in headers {
        let header = header.to_ascii_lowercase();
        match header.as_str() {
            // As the first of several headers counts for one that has a single value.
            "impersonate-user" if asked.name.is_empty() => value.clone_into(&mut asked.name),
            "impersonate-uid" if asked.uid.is_empty() => value.clone_into(&mut asked.uid),
            "impersonate-group" => asked.groups.push(value.to_owned()),
            other => match other.strip_prefix(EXTRA_HEADER) {
                Some(key) => asked.extra.entry(unescaped(key)).or_default().push(value.to_owned()),
                None => continue,
            },
        }
        count += 1;
    }
    if count > IMPERSONATED_MAX {
        let message = format!("{count} headers that impersonate, at most {IMPERSONATED_MAX} are possible");
        return Err(Status::bad_request(message));
    }
    if asked.name.is_empty() {
        return match asked == User::default() {
            true => Ok(None),
            false => Err(Status::bad_request(
                "requested impersonation of groups, a UID or extra attributes without impersonating a user",
            )),
        };
    }
    let may = |group: &str, resource: &str, subresource: &str, namespace: &str, name: &str| {
        let target = Target::Resource { group, resource, subresource, namespace, name };
        let decision = policy.authorize(user, "impersonate", &target);
        match decision.allowed {
            true => Ok(()),
            false => Err(forbidden(user, "impersonate", &target, &decision.reason)),
        }
    };
    let own_groups = asked.groups.clone();
    match split_service_account(&asked.name) {
        Some((namespace, name)) => {
            may("", "serviceaccounts", "", namespace, name)?;
            if asked.groups.is_empty() {
                asked.groups = service_account_groups(namespace);
            }
        }
        None => may("", "users", "", "", &asked.name)?,
    }
    for group in &own_groups {
        may("", "groups", "", "", group)?;
    }
    for (key, values) in &asked.extra {
        for value in values {
            may("authentication.k8s.io", "userextras", key, "", value)?;
        }
    }
    if !asked.uid.is_empty() {
        may("authentication.k8s.io", "uids", "", "", &asked.uid)?;
    }
    if asked.name == ANONYMOUS {
        if !asked.is_in(UNAUTHENTICATED) {
            asked.groups.push(UNAUTHENTICATED.to_owned());
        }
    } else if !asked.is_in(AUTHENTICATED) && !asked.is_in(UNAUTHENTICATED) {
        asked.groups.push(AUTHENTICATED.to_owned());
    }
    Ok(Some(asked))
}

/// Decodes `%XX` in the name of a header; what is malformed stays as it is.
fn unescaped(key: &str) -> String {
    let mut bytes = Vec::with_capacity(key.len());
    let mut rest = key.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = |byte: u8| char::from(byte).to_digit(16);
        match (first, after) {
            (b'%', [high, low, after @ ..]) => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => {
                    bytes.push((high * 16 + low) as u8);
                    rest = after;
                }
                _ => return key.to_owned(),
            },
            (b'%', _) => return key.to_owned(),
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).unwrap_or_else(|_| key.to_owned())
}

/// Reads the attributes of a user from fields of an object, as `SubjectAccessReview` has them.
pub(super) fn extra_of(value: Option<&Value>) -> BTreeMap<String, Vec<String>> {
    let Some(Value::Object(extra)) = value else { return BTreeMap::new() };
    let values = |value: &Value| match value {
        Value::Array(values) => values.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    };
    extra.iter().map(|(key, value)| (key.clone(), values(value))).collect()
}

#[cfg(test)]
mod tests;
