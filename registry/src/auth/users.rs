//! Who there is, and whether somebody is who they say.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::jwt::{Issuer, Key, Verifier, is_token, now};
use super::rules::{ADMIN, Credential, Identity, NODE_PULLER};
use super::{Auth, htpasswd};
use crate::{Error, Result, reload};

/// Verified credentials remembered, so that bcrypt and signatures cost once per client; when there are more all are
/// forgotten.
const VERIFIED_MAX: usize = 1024;
/// bcrypt runs at a time: it is slow on purpose, and must not take every core.
const VERIFICATIONS_MAX: usize = 2;
/// Largest htpasswd file, bytes.
const HTPASSWD_BYTES_MAX: u64 = 4 << 20;
/// Largest file with a password, bytes.
const PASSWORD_BYTES_MAX: u64 = 4 << 10;
/// Longest name of a user, bytes.
const USER_BYTES_MAX: usize = 255;

/// Everybody who may be let in, read from files.
pub(crate) struct Users {
    admin: Option<Secret>,
    node_puller: Option<Secret>,
    /// bcrypt hashes by name.
    htpasswd: HashMap<String, String>,
    /// Knows the tokens that come as passwords.
    tokens: Option<Verifier>,
    pub(super) issuer: Option<Issuer>,
    salt: Salt,
    /// By a salted hash of the credentials.
    verified: Mutex<HashMap<[u8; 32], Identity>>,
    verifications: Arc<Semaphore>,
}

/// Why credentials are not good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Credentials,
    /// A token of our own that has ended, or was never one.
    Bearer,
}

impl Users {
    /// Reads the files. `key` signs tokens of our own when no file has one; `None` if there are no such tokens.
    pub(super) fn load(auth: &Auth, key: Option<&Key>) -> Result<Self> {
        let salt = Salt(*uuid::Uuid::new_v4().as_bytes());
        let secret = |path: &Option<_>| path.as_deref().map(|path| password(path, &salt)).transpose();
        let issuer = match (&auth.bearer, key) {
            (Some(bearer), key) => match (&bearer.key, key) {
                (Some(path), _) => Some(Issuer::new(&Key::load(path)?)),
                (None, Some(key)) => Some(Issuer::new(key)),
                (None, None) => None,
            },
            (None, _) => None,
        };
        Ok(Self {
            admin: secret(&auth.admin_password)?,
            node_puller: secret(&auth.node_puller_password)?,
            htpasswd: auth.htpasswd.as_deref().map(hashes).transpose()?.unwrap_or_default(),
            tokens: auth.token_key.as_deref().map(Verifier::of_controller).transpose()?,
            issuer,
            salt,
            verified: Mutex::default(),
            verifications: Arc::new(Semaphore::new(VERIFICATIONS_MAX)),
        })
    }

    /// Checks the value of an `Authorization` header.
    pub(crate) async fn verify(self: &Arc<Self>, authorization: &[u8]) -> Result<Identity, Refused> {
        // What is remembered and looked up is a salted hash: its bytes tell nothing about the password, and neither
        // does the time the lookup takes.
        let key = self.salt.hash(authorization);
        let remembered = self.verified().get(&key).cloned();
        if let Some(who) = remembered {
            // Who has ended is turned away below, as everybody is who was never good.
            if !matches!(&who, Identity::Known(known) if known.expires.is_some_and(|end| end <= now())) {
                return Ok(who);
            }
            self.verified().remove(&key);
        }
        let text = std::str::from_utf8(authorization).map_err(|_| Refused::Credentials)?;
        let (scheme, credentials) = text.split_once(' ').ok_or(Refused::Credentials)?;
        let who = if scheme.eq_ignore_ascii_case("basic") {
            match basic(credentials.trim()).ok_or(Refused::Credentials)? {
                // What some clients send when they have none.
                (user, password) if user.is_empty() && password.is_empty() => return Ok(Identity::Anonymous),
                (user, password) => self.check(user, password).await.ok_or(Refused::Credentials)?,
            }
        } else if scheme.eq_ignore_ascii_case("bearer") {
            self.bearer(credentials.trim()).ok_or(Refused::Bearer)?
        } else {
            return Err(Refused::Credentials);
        };
        let mut verified = self.verified();
        if verified.len() >= VERIFIED_MAX {
            verified.clear();
        }
        verified.insert(key, who.clone());
        Ok(who)
    }

    /// Checks a name and a password.
    async fn check(self: &Arc<Self>, user: String, password: String) -> Option<Identity> {
        if user.is_empty() || user.len() > USER_BYTES_MAX {
            return None;
        }
        let own = match user.as_str() {
            ADMIN => self.admin.as_ref(),
            NODE_PULLER => self.node_puller.as_ref(),
            _ => None,
        };
        if let Some(secret) = own {
            let good = secret.is(&self.salt, password.as_bytes());
            return good.then(|| Identity::known(user, Credential::Password, None));
        }
        let is_listed = self.htpasswd.contains_key(&user);
        if let Some(tokens) = &self.tokens
            && !is_listed
            && ![ADMIN, NODE_PULLER].contains(&user.as_str())
            && is_token(&password)
        {
            let token = tokens.verify(&password)?;
            return Some(Identity::known(user, Credential::Token(token.grants), Some(token.expires)));
        }
        if self.htpasswd.is_empty() {
            return None;
        }
        let permit = Arc::clone(&self.verifications).acquire_owned().await.ok()?;
        let users = Arc::clone(self);
        let work = tokio::task::spawn_blocking(move || {
            let hash = users.htpasswd.get(&user).map_or(htpasswd::NOBODY, String::as_str);
            let matches = bcrypt::verify(&password, hash).unwrap_or(false);
            drop(permit);
            (matches && is_listed).then(|| Identity::known(user, Credential::Password, None))
        });
        work.await.ok()?
    }

    fn bearer(&self, token: &str) -> Option<Identity> {
        let token = self.issuer.as_ref()?.verifier.verify(token)?;
        // Nobody's token knows no more than what anybody may.
        let name =
            token.subject.filter(|subject| !subject.is_empty()).unwrap_or_else(|| "anonymous".to_owned());
        Some(Identity::known(name, Credential::Bearer(token.grants), Some(token.expires)))
    }

    #[cfg(test)]
    pub(super) fn remembered(&self) -> usize {
        self.verified().len()
    }

    fn verified(&self) -> MutexGuard<'_, HashMap<[u8; 32], Identity>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Users").field("htpasswd", &self.htpasswd.len()).finish_non_exhaustive()
    }
}

/// What hashes of this process are mixed with.
struct Salt([u8; 16]);

impl Salt {
    fn hash(&self, bytes: &[u8]) -> [u8; 32] {
        Sha256::new().chain_update(self.0).chain_update(bytes).finalize().into()
    }
}

/// A salted hash of a password.
struct Secret([u8; 32]);

impl Secret {
    fn is(&self, salt: &Salt, password: &[u8]) -> bool {
        verify_slices_are_equal(&self.0, &salt.hash(password)).is_ok()
    }
}

/// Reads a file that holds a password, with or without a line's end behind it.
fn password(path: &Path, salt: &Salt) -> Result<Secret> {
    let bytes = reload::read(path, PASSWORD_BYTES_MAX)?;
    let line = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    let password = line.strip_suffix(b"\r").unwrap_or(line);
    if password.is_empty() || password.contains(&b'\n') {
        return Err(Error::Secret { path: path.to_owned(), why: "holds no password on one line" });
    }
    Ok(Secret(salt.hash(password)))
}

fn hashes(path: &Path) -> Result<HashMap<String, String>> {
    let bytes = reload::read(path, HTPASSWD_BYTES_MAX)?;
    let text = String::from_utf8(bytes)
        .map_err(|_| Error::Secret { path: path.to_owned(), why: "is not in UTF-8" })?;
    htpasswd::parse(&text).map_err(|(line, why)| Error::Htpasswd { path: path.to_owned(), line, why })
}

fn basic(credentials: &str) -> Option<(String, String)> {
    let decoded = String::from_utf8(STANDARD.decode(credentials).ok()?).ok()?;
    let (user, password) = decoded.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}
