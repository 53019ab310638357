//! Questions about what somebody may, as objects: the reviews of authorization.k8s.io/v1, and who one is (authentication.k8s.io/v1).
//!
//! Each is a function from the object that was posted to the object that is answered. Nothing is kept.

use serde_json::{Map, Value, json};

use super::rbac::{Policy, Rule, Target};
use super::token::time;
use super::user::{User, extra_of};
use crate::field::{FieldError, invalid};
use crate::object::{self, Object};
use crate::status::{Result, Status};

const GROUP: &str = "authorization.k8s.io";

/// Answers a `SubjectAccessReview`: whether the user and the groups in it may do something.
///
/// # Errors
/// `Invalid` for a question that cannot be answered, `BadRequest` for one that cannot be read.
pub fn subject_access_review(review: &Object, policy: &Policy) -> Result<Object> {
    let question = Question::read(review)?;
    let mut causes = question.causes();
    causes.extend(question.causes_of_subject());
    causes.extend(metadata_cause(review, &[], "must be empty"));
    finish(review, "SubjectAccessReview", causes)?;
    Ok(question.answer(review, &question.subject(), policy))
}

/// Answers a `LocalSubjectAccessReview`, which asks about one namespace.
///
/// # Errors
/// As of [`subject_access_review`], and for a question about another namespace.
pub fn local_subject_access_review(review: &Object, namespace: &str, policy: &Policy) -> Result<Object> {
    let question = Question::read(review)?;
    let mut causes = question.causes();
    causes.extend(question.causes_of_subject());
    causes.extend(metadata_cause(review, &["namespace"], "must be empty except for namespace"));
    let own = object::namespace(review).unwrap_or_default();
    if question.resource.is_some_and(|resource| text(resource, "namespace") != own) {
        let asked = question.resource.map(|resource| text(resource, "namespace")).unwrap_or_default();
        causes.push(FieldError::invalid(
            "spec.resourceAttributes.namespace",
            asked,
            "must match metadata.namespace",
        ));
    }
    if let Some(path) = question.path {
        causes.push(FieldError::invalid(
            "spec.nonResourceAttributes",
            path.clone(),
            "disallowed on this kind of request",
        ));
    }
    finish(review, "LocalSubjectAccessReview", causes)?;
    if own != namespace {
        return Err(Status::bad_request(format!(
            "spec.resourceAttributes.namespace must match namespace: {namespace}"
        )));
    }
    Ok(question.answer(review, &question.subject(), policy))
}

/// Answers a `SelfSubjectAccessReview`: whether whoever asks may do something.
///
/// # Errors
/// As of [`subject_access_review`].
pub fn self_subject_access_review(review: &Object, user: &User, policy: &Policy) -> Result<Object> {
    let question = Question::read(review)?;
    let mut causes = question.causes();
    causes.extend(metadata_cause(review, &[], "must be empty"));
    finish(review, "SelfSubjectAccessReview", causes)?;
    Ok(question.answer(review, user, policy))
}

/// Answers a `SelfSubjectRulesReview`: all that whoever asks may do in a namespace.
///
/// # Errors
/// `BadRequest` without a namespace.
pub fn self_subject_rules_review(review: &Object, user: &User, policy: &Policy) -> Result<Object> {
    let namespace = object::text(review, &["spec", "namespace"]).unwrap_or_default();
    if namespace.is_empty() {
        return Err(Status::bad_request("no namespace on request"));
    }
    let (rules, missing) = policy.rules_for(user, namespace);
    let lists = |rule: &Rule, kept: &[&str]| {
        let mut rule = rule.to_json();
        rule.retain(|key, _| kept.contains(&key.as_str()));
        Value::Object(rule)
    };
    let resources = rules.iter().filter(|rule| !rule.resources.is_empty());
    let paths = rules.iter().filter(|rule| !rule.non_resource_urls.is_empty());
    let mut status = Map::new();
    let resources = resources.map(|rule| lists(rule, &["verbs", "apiGroups", "resources", "resourceNames"]));
    status.insert("resourceRules".to_owned(), resources.collect());
    status.insert(
        "nonResourceRules".to_owned(),
        paths.map(|rule| lists(rule, &["verbs", "nonResourceURLs"])).collect(),
    );
    status.insert("incomplete".to_owned(), json!(false));
    if !missing.is_empty() {
        status.insert("evaluationError".to_owned(), json!(missing.trim_start_matches("RBAC: ")));
    }
    Ok(object_of(review, [("metadata", json!({})), ("spec", json!({})), ("status", Value::Object(status))]))
}

/// Answers a `SelfSubjectReview`: who asks. `now` is in seconds since 1970.
pub fn self_subject_review(review: &Object, user: &User, now: i64) -> Object {
    let metadata = json!({"creationTimestamp": time(now)});
    object_of(review, [("metadata", metadata), ("status", json!({"userInfo": user.to_info()}))])
}

/// The fields of a question.
struct Question<'a> {
    spec: &'a Object,
    resource: Option<&'a Object>,
    path: Option<&'a Object>,
}

impl<'a> Question<'a> {
    fn read(review: &'a Object) -> Result<Self> {
        let empty_spec = || Status::bad_request("spec: Required value");
        let spec = review.get("spec").and_then(Value::as_object).ok_or_else(empty_spec)?;
        let part = |key: &str| match spec.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(part)) => {
                let strings = part.iter().filter(|(key, _)| !key.ends_with("Selector"));
                match strings.into_iter().find(|(_, value)| !value.is_string() && !value.is_null()) {
                    Some((at, value)) => Err(Status::bad_request(format!(
                        "spec.{key}.{at}: Invalid value: {value}: it has to be a string"
                    ))),
                    None => Ok(Some(part)),
                }
            }
            Some(_) => Err(Status::bad_request(format!("spec.{key}: it has to be an object"))),
        };
        Ok(Self { spec, resource: part("resourceAttributes")?, path: part("nonResourceAttributes")? })
    }

    fn causes(&self) -> Vec<FieldError> {
        let mut causes = Vec::new();
        if self.resource.is_some() == self.path.is_some() {
            let why = "exactly one of nonResourceAttributes or resourceAttributes must be specified";
            causes.push(FieldError::invalid(
                "spec",
                self.path.cloned().map_or(Value::Null, Value::Object),
                why,
            ));
        }
        for key in ["fieldSelector", "labelSelector"] {
            let Some(Value::Object(selector)) = self.resource.and_then(|resource| resource.get(key)) else {
                continue;
            };
            let at = format!("spec.resourceAttributes.{key}");
            let raw = text(selector, "rawSelector");
            let requirements =
                selector.get("requirements").and_then(Value::as_array).is_some_and(|all| !all.is_empty());
            if !raw.is_empty() && requirements {
                let why = "may not specified at the same time as requirements";
                causes.push(FieldError::invalid(format!("{at}.rawSelector"), raw, why));
            }
            if raw.is_empty() && !requirements {
                let why = format!("when {at} is specified, requirements or rawSelector is required");
                causes.push(FieldError::required(format!("{at}.requirements"), &why));
            }
        }
        causes
    }

    fn causes_of_subject(&self) -> Option<FieldError> {
        let subject = self.subject();
        let nobody = subject.name.is_empty() && subject.groups.is_empty();
        nobody
            .then(|| FieldError::invalid("spec.user", "", "at least one of user or group must be specified"))
    }

    /// Whom the question is about.
    fn subject(&self) -> User {
        let groups = self.spec.get("groups").and_then(Value::as_array).into_iter().flatten();
        User {
            name: text(self.spec, "user").to_owned(),
            uid: text(self.spec, "uid").to_owned(),
            groups: groups.filter_map(Value::as_str).map(str::to_owned).collect(),
            extra: extra_of(self.spec.get("extra")),
        }
    }

    fn answer(&self, review: &Object, user: &User, policy: &Policy) -> Object {
        let of = |key: &str| self.resource.map(|resource| text(resource, key)).unwrap_or_default();
        let (verb, target) = match self.path {
            Some(path) => (text(path, "verb"), Target::Path(text(path, "path"))),
            None => {
                let [group, resource, subresource] = ["group", "resource", "subresource"].map(of);
                let [namespace, name] = ["namespace", "name"].map(of);
                (of("verb"), Target::Resource { group, resource, subresource, namespace, name })
            }
        };
        let decision = policy.authorize(user, verb, &target);
        let mut status = Map::new();
        status.insert("allowed".to_owned(), json!(decision.allowed));
        if !decision.reason.is_empty() {
            status.insert("reason".to_owned(), json!(decision.reason));
        }
        let mut answer = review.clone();
        answer.insert("status".to_owned(), Value::Object(status));
        answer
    }
}

/// A review is no object that is kept, and has no metadata but what is allowed.
fn metadata_cause(review: &Object, allowed: &[&str], why: &str) -> Option<FieldError> {
    let metadata = review.get("metadata")?;
    let empty = match metadata {
        Value::Null => true,
        Value::Object(metadata) => metadata.iter().all(|(key, value)| {
            let nothing = match value {
                Value::Null => true,
                Value::String(text) => text.is_empty(),
                Value::Object(all) => all.is_empty(),
                Value::Array(all) => all.is_empty(),
                _ => false,
            };
            nothing || key == "managedFields" || allowed.contains(&key.as_str())
        }),
        _ => false,
    };
    (!empty).then(|| FieldError::invalid("metadata", metadata.clone(), why))
}

fn finish(review: &Object, kind: &str, causes: Vec<FieldError>) -> Result<()> {
    match causes.is_empty() {
        true => Ok(()),
        false => Err(invalid(GROUP, kind, object::name(review).unwrap_or_default(), causes)),
    }
}

fn text<'a>(object: &'a Object, key: &str) -> &'a str {
    object.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// An object of the same version and kind with other fields.
fn object_of<const N: usize>(review: &Object, fields: [(&str, Value); N]) -> Object {
    let kept = review.iter().filter(|(key, _)| matches!(key.as_str(), "apiVersion" | "kind"));
    let kept = kept.map(|(key, value)| (key.clone(), value.clone()));
    kept.chain(fields.map(|(key, value)| (key.to_owned(), value))).collect()
}

#[cfg(test)]
mod tests;
