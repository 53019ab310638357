//! Tokens of service accounts (KEP-1205): signed by us, good for a time, and only while what they are bound to exists.
//!
//! ```text
//!   TokenRequest ──> request ──> JWT ──> verify ──> User
//!                                └─────> review ──> TokenReview
//! ```
//!
//! A token is a JWT (RFC 7519) signed with ES256; the key is `service-accounts.pem` in the folder of the certificates. What it says is checked
//! against the objects at each use, so that it ends with its service account, Pod or Secret.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, SecondsFormat};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use rcgen::PublicKeyData;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::pki;
use super::user::{User, service_account_name};
use crate::field::{FieldError, invalid, quote};
use crate::object::{self, Object};
use crate::status::{Details, Reason, Result, Status};

/// Shortest life of a token, seconds.
const LIFE_SECS_MIN: i64 = 600;
/// Longest life of a token, seconds: whoever asks for more is given this.
const LIFE_SECS_MAX: i64 = 365 * 24 * 3600;
/// Longest life that may be asked for, seconds.
const ASKED_SECS_MAX: i64 = 1 << 32;
/// Life of a token for which none is asked, seconds.
const LIFE_SECS: i64 = 3600;
/// How far clocks may differ, seconds.
const LEEWAY_SECS: i64 = 60;
/// Largest token, bytes.
const TOKEN_BYTES_MAX: usize = 16 << 10;
/// Most audiences of a token.
const AUDIENCES_MAX: usize = 64;

const GROUP: &str = "authentication.k8s.io";

/// Finds an object by resource (`serviceaccounts`, `pods`, `secrets`, `nodes`), namespace and name.
pub type Lookup<'a> = dyn Fn(&str, &str, &str) -> Result<Option<Arc<Object>>> + 'a;

/// Makes and verifies tokens.
pub struct Tokens {
    issuer: String,
    /// Those who are meant if a token or a review names nobody: the server.
    audiences: Vec<String>,
    signing: EncodingKey,
    verifying: DecodingKey,
    key_id: String,
}

impl fmt::Debug for Tokens {
    /// Leaves the key out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens")
            .field("issuer", &self.issuer)
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

/// What a token is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    pub user: User,
    /// Those of the wanted audiences that the token is meant for.
    pub audiences: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Claims {
    aud: Vec<String>,
    exp: i64,
    iat: i64,
    iss: String,
    jti: String,
    #[serde(rename = "kubernetes.io")]
    bound: Bound,
    nbf: i64,
    sub: String,
}

#[derive(Serialize, Deserialize)]
struct Bound {
    namespace: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<Reference>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod: Option<Reference>,
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<Reference>,
    serviceaccount: Reference,
}

#[derive(Serialize, Deserialize)]
struct Reference {
    name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    uid: String,
}

impl Tokens {
    /// Opens the key in a folder, which is made if it is missing. Blocks.
    ///
    /// # Errors
    /// When the folder cannot be written, or has something else in the key's file.
    pub fn open(folder: &Path, issuer: &str, audiences: Vec<String>) -> Result<Self, pki::Error> {
        let key = pki::key(folder, "service-accounts.pem")?;
        Ok(Self {
            issuer: issuer.to_owned(),
            audiences,
            signing: EncodingKey::from_ec_der(key.serialized_der()),
            verifying: DecodingKey::from_ec_der(key.public_key_raw()),
            key_id: URL_SAFE_NO_PAD.encode(digest(&SHA256, &key.subject_public_key_info())),
        })
    }

    /// Answers a `TokenRequest` for a service account. `now` is in seconds since 1970.
    ///
    /// # Errors
    /// `Invalid` for a life out of bounds or a name of another account, `BadRequest` for what no token can be bound to, `NotFound` and
    /// `Conflict` for an object that is not there, or not the one that is meant.
    pub fn request(
        &self,
        request: &Object,
        account: &Object,
        lookup: &Lookup<'_>,
        now: i64,
    ) -> Result<Object> {
        let [namespace, name, uid] =
            [object::namespace, object::name, object::uid].map(|of| of(account).unwrap_or_default());
        let refuse = |path: &str, value: Value, why: &str| {
            Err(invalid(GROUP, "TokenRequest", name, vec![FieldError::invalid(path, value, why)]))
        };
        for (path, asked, own, what) in [
            ("metadata.name", object::name(request), name, "name"),
            ("metadata.namespace", object::namespace(request), namespace, "namespace"),
        ] {
            if let Some(asked) = asked.filter(|asked| !asked.is_empty() && *asked != own) {
                return refuse(
                    path,
                    json!(asked),
                    &format!("must match the service account {what} if specified"),
                );
            }
        }
        if let Some(asked) = object::uid(request).filter(|asked| !asked.is_empty() && *asked != uid) {
            let why = format!(
                "the UID in the token request ({asked}) does not match the UID of the service account ({uid})"
            );
            return Err(conflict("TokenRequest", GROUP, name, &why));
        }
        let empty = Map::new();
        let spec = request.get("spec").and_then(Value::as_object).unwrap_or(&empty);
        let asked = match spec.get("expirationSeconds") {
            None | Some(Value::Null) => LIFE_SECS,
            Some(value) => value.as_i64().ok_or_else(|| {
                Status::bad_request(format!("spec.expirationSeconds: {value} is no whole number of seconds"))
            })?,
        };
        if asked < LIFE_SECS_MIN {
            return refuse(
                "spec.expirationSeconds",
                json!(asked),
                "may not specify a duration less than 10 minutes",
            );
        }
        if asked > ASKED_SECS_MAX {
            return refuse(
                "spec.expirationSeconds",
                json!(asked),
                "may not specify a duration larger than 2^32 seconds",
            );
        }
        let life = asked.min(LIFE_SECS_MAX);
        let audiences = match audiences(spec)? {
            none if none.is_empty() => self.audiences.clone(),
            some => some,
        };
        let mut bound = Bound {
            namespace: namespace.to_owned(),
            serviceaccount: Reference { name: name.to_owned(), uid: uid.to_owned() },
            pod: None,
            secret: None,
            node: None,
        };
        let reference = spec.get("boundObjectRef").and_then(Value::as_object);
        if let Some(reference) = reference {
            bind(&mut bound, reference, lookup)?;
        }
        let claims = Claims {
            aud: audiences.clone(),
            exp: now.saturating_add(life),
            iat: now,
            nbf: now,
            iss: self.issuer.clone(),
            jti: uuid::Uuid::new_v4().to_string(),
            sub: service_account_name(namespace, name),
            bound,
        };
        let header = Header { kid: Some(self.key_id.clone()), ..Header::new(Algorithm::ES256) };
        let token = encode(&header, &claims, &self.signing)
            .map_err(|error| Status::internal("a token cannot be signed", &error))?;
        let mut answer = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "metadata": {"name": name, "namespace": namespace, "uid": uid, "creationTimestamp": time(now)},
            "spec": {"audiences": audiences, "expirationSeconds": life},
            "status": {"token": token, "expirationTimestamp": time(claims.exp)},
        });
        if let Some(reference) = reference {
            answer["spec"]["boundObjectRef"] = json!(reference);
        }
        match answer {
            Value::Object(answer) => Ok(answer),
            _ => Ok(Map::new()),
        }
    }

    /// Verifies a token for some audiences, the server itself if there are none. `now` is in seconds since 1970.
    ///
    /// # Errors
    /// Why it is not good, without any part of it; `Unauthorized`, or what the lookup says.
    pub fn verify(&self, token: &str, wanted: &[String], lookup: &Lookup<'_>, now: i64) -> Result<Verified> {
        let refuse = |why: String| Status::new(Reason::Unauthorized, why);
        let not_ours = || refuse("invalid bearer token".to_owned());
        if token.len() > TOKEN_BYTES_MAX {
            return Err(not_ours());
        }
        let mut validation = Validation::new(Algorithm::ES256);
        // Its clock is not ours, and audiences have to be told.
        validation.validate_exp = false;
        validation.validate_aud = false;
        validation.set_required_spec_claims(&["iss"]);
        validation.set_issuer(&[&self.issuer]);
        let claims = decode::<Claims>(token, &self.verifying, &validation).map_err(|_| not_ours())?.claims;
        let wanted = if wanted.is_empty() { &self.audiences } else { wanted };
        let audiences: Vec<String> = wanted.iter().filter(|one| claims.aud.contains(one)).cloned().collect();
        if audiences.is_empty() {
            let list = |all: &[String]| all.iter().map(|one| quote(one)).collect::<Vec<_>>().join(" ");
            let (own, wanted) = (list(&claims.aud), list(wanted));
            return Err(refuse(format!(
                "token audiences [{own}] is invalid for the target audiences [{wanted}]"
            )));
        }
        if now.saturating_sub(LEEWAY_SECS) > claims.exp {
            return Err(refuse("service account token has expired".to_owned()));
        }
        if now.saturating_add(LEEWAY_SECS) < claims.nbf {
            return Err(refuse("service account token is not valid yet".to_owned()));
        }
        if now.saturating_add(LEEWAY_SECS) < claims.iat {
            return Err(refuse("service account token is issued in the future".to_owned()));
        }
        let bound = claims.bound;
        let account = &bound.serviceaccount;
        let found = lookup("serviceaccounts", &bound.namespace, &account.name)?
            .ok_or_else(|| refuse(format!("serviceaccounts {} not found", quote(&account.name))))?;
        let uid = object::uid(&found).unwrap_or_default();
        if uid != account.uid {
            return Err(refuse(format!(
                "service account UID ({uid}) does not match claim ({})",
                account.uid
            )));
        }
        if is_deleted(&found, now) {
            return Err(refuse(format!(
                "service account {}/{} has been deleted",
                bound.namespace, account.name
            )));
        }
        // The node of a token for a Pod is told, and not looked for.
        let node = if bound.pod.is_none() { bound.node.as_ref() } else { None };
        for (resource, namespace, reference) in [
            ("secrets", bound.namespace.as_str(), bound.secret.as_ref()),
            ("pods", bound.namespace.as_str(), bound.pod.as_ref()),
            ("nodes", "", node),
        ] {
            let Some(reference) = reference else { continue };
            let found = lookup(resource, namespace, &reference.name)?;
            let good = |object: &Arc<Object>| {
                object::uid(object) == Some(&*reference.uid) && !is_deleted(object, now)
            };
            if !found.as_ref().is_some_and(good) {
                return Err(refuse("service account token has been invalidated".to_owned()));
            }
        }
        let mut user = User::service_account(&bound.namespace, &account.name, &account.uid);
        let mut tell = |key: &str, value: &str| {
            if !value.is_empty() {
                user.extra.insert(format!("authentication.kubernetes.io/{key}"), vec![value.to_owned()]);
            }
        };
        tell("credential-id", &format!("JTI={}", claims.jti));
        if let Some(pod) = &bound.pod {
            tell("pod-name", &pod.name);
            tell("pod-uid", &pod.uid);
        }
        if let Some(node) = &bound.node {
            tell("node-name", &node.name);
            tell("node-uid", &node.uid);
        }
        Ok(Verified { user, audiences })
    }

    /// Answers a `TokenReview`. `now` is in seconds since 1970.
    ///
    /// # Errors
    /// `BadRequest` without a token, and what the lookup says.
    pub fn review(&self, review: &Object, lookup: &Lookup<'_>, now: i64) -> Result<Object> {
        let empty = Map::new();
        let spec = review.get("spec").and_then(Value::as_object).unwrap_or(&empty);
        let token = spec.get("token").and_then(Value::as_str).unwrap_or_default();
        if token.is_empty() {
            return Err(Status::bad_request("token is required for TokenReview in authentication"));
        }
        let status = match self.verify(token, &audiences(spec)?, lookup, now) {
            Ok(Verified { user, audiences }) => {
                json!({"authenticated": true, "user": user.to_info(), "audiences": audiences})
            }
            Err(refusal) if refusal.reason != Reason::Unauthorized => return Err(refusal),
            Err(refusal) if refusal.message == "invalid bearer token" => {
                json!({"user": {}, "error": refusal.message})
            }
            Err(refusal) => {
                json!({"user": {}, "error": format!("[invalid bearer token, {}]", refusal.message)})
            }
        };
        let mut answer = review.clone();
        answer.insert("status".to_owned(), status);
        Ok(answer)
    }
}

/// Binds a token to the object that a request names.
fn bind(bound: &mut Bound, reference: &Object, lookup: &Lookup<'_>) -> Result<()> {
    let text = |key: &str| reference.get(key).and_then(Value::as_str).unwrap_or_default();
    let (version, kind, name) = (text("apiVersion"), text("kind"), text("name"));
    let (resource, namespace) = match (version, kind) {
        ("v1" | "", "Pod") => ("pods", bound.namespace.as_str()),
        ("v1" | "", "Secret") => ("secrets", bound.namespace.as_str()),
        ("v1" | "", "Node") => ("nodes", ""),
        _ => {
            let (group, version) = version.split_once('/').unwrap_or(("", version));
            let what = format!("{group}/{version}, Kind={kind}");
            return Err(Status::bad_request(format!("cannot bind token to object of type {what}")));
        }
    };
    let find = |resource: &str, namespace: &str, name: &str| lookup(resource, namespace, name);
    let found = find(resource, namespace, name)?.ok_or_else(|| {
        let details = Details { name: name.to_owned(), kind: resource.to_owned(), ..Details::default() };
        let message = format!("{resource} {} not found", quote(name));
        Status { details: Box::new(details), ..Status::new(Reason::NotFound, message) }
    })?;
    let uid = object::uid(&found).unwrap_or_default();
    let wanted = text("uid");
    if !wanted.is_empty() && wanted != uid {
        let why = format!(
            "the UID in the bound object reference ({wanted}) does not match the UID in record. The object might have been deleted and \
             then recreated"
        );
        return Err(conflict(kind, "", name, &why));
    }
    let made = Reference { name: name.to_owned(), uid: uid.to_owned() };
    match resource {
        "secrets" => bound.secret = Some(made),
        "nodes" => bound.node = Some(made),
        _ => {
            let account = &bound.serviceaccount.name;
            if object::text(&found, &["spec", "serviceAccountName"]) != Some(account) {
                return Err(Status::bad_request(format!(
                    "cannot bind token for serviceaccount {} to pod running with different serviceaccount name.",
                    quote(account)
                )));
            }
            bound.pod = Some(made);
            if let Some(node) = object::text(&found, &["spec", "nodeName"]).filter(|node| !node.is_empty()) {
                let uid =
                    find("nodes", "", node)?.as_deref().and_then(object::uid).unwrap_or_default().to_owned();
                bound.node = Some(Reference { name: node.to_owned(), uid });
            }
        }
    }
    Ok(())
}

fn audiences(spec: &Object) -> Result<Vec<String>> {
    let refuse = |what: &str| Status::bad_request(format!("spec.audiences: {what}"));
    let audiences: Vec<String> = match spec.get("audiences") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(all)) => all
            .iter()
            .map(|one| one.as_str().map(str::to_owned))
            .collect::<Option<_>>()
            .ok_or_else(|| refuse("they are strings"))?,
        Some(_) => return Err(refuse("it is a list of strings")),
    };
    match audiences.len() > AUDIENCES_MAX {
        true => Err(refuse(&format!("there are {}, at most {AUDIENCES_MAX} are possible", audiences.len()))),
        false => Ok(audiences),
    }
}

fn conflict(resource: &str, group: &str, name: &str, why: &str) -> Status {
    let whole = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
    let message = format!("Operation cannot be fulfilled on {whole} {}: {why}", quote(name));
    let (name, group, kind) = (name.to_owned(), group.to_owned(), resource.to_owned());
    let details = Details { name, group, kind, ..Details::default() };
    Status { details: Box::new(details), ..Status::new(Reason::Conflict, message) }
}

/// Whether an object was deleted, and only waits for its finalizers.
fn is_deleted(object: &Object, now: i64) -> bool {
    let when = object::text(object, &["metadata", "deletionTimestamp"]);
    when.is_some_and(|when| match DateTime::parse_from_rfc3339(when) {
        Ok(when) => when.timestamp() < now.saturating_sub(LEEWAY_SECS),
        // Whoever cannot tell when assumes the worst.
        Err(_) => true,
    })
}

/// A time as objects have it.
pub(super) fn time(at: i64) -> String {
    let at = DateTime::from_timestamp(at, 0).unwrap_or_default();
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

#[cfg(test)]
mod tests;
