//! The rules: what each request needs, what each kind of credentials gives, and the verdict.
//!
//! ```text
//!  credentials ──verify──> Identity (name, rights) ──┐
//!                                                    ├── authorize ──> Allowed | Denied | Challenge
//!  route, method, query ──────────────────> Needs ───┘
//! ```

use std::fmt;
use std::sync::Arc;

use http::Method;

use super::pattern::Granted;
use crate::api::route::{self, Route, param};
use crate::names::RepoName;
use crate::rules::Pattern;

/// The user that may do everything.
pub(crate) const ADMIN: &str = "admin";
/// The user that may only pull.
pub(crate) const NODE_PULLER: &str = "node-puller";

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) enum Identity {
    /// Nobody is asked who they are.
    Anybody,
    /// Somebody without credentials, where others have them.
    Anonymous,
    Known(Arc<Known>),
}

/// Somebody whose credentials were verified.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) name: String,
    /// Seconds since 1970 when the credentials end, if they do.
    pub(crate) expires: Option<u64>,
    rights: Rights,
    /// Whether another token would help who lacks a right.
    pub(crate) is_bearer: bool,
    /// What showed it, for the audit log.
    how: &'static str,
}

/// How somebody showed who they are.
#[derive(Debug)]
pub(crate) enum Credential {
    Password,
    Certificate,
    /// A token of the controller's, which came as a password.
    Token(Vec<Grant>),
    /// A token that our own endpoint issued.
    Bearer(Vec<Grant>),
}

#[derive(Debug)]
enum Rights {
    Everything,
    /// Of every repository.
    Pull,
    Granted(Vec<Grant>),
}

/// What a token allows.
#[derive(Clone, Debug)]
pub(crate) enum Grant {
    Repository(Granted, Actions),
    Catalog,
}

/// A set of what can be done with a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Actions(u8);

impl Actions {
    pub(crate) const NONE: Self = Self(0);
    pub(crate) const PULL: Self = Self(1);
    pub(crate) const PUSH: Self = Self(2);
    pub(crate) const DELETE: Self = Self(4);
    pub(crate) const ALL: Self = Self(7);
    const NAMES: [(&str, Self); 3] = [("pull", Self::PULL), ("push", Self::PUSH), ("delete", Self::DELETE)];

    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Reads names; `*` is all of them, and those we do not know are none.
    pub(crate) fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let one = |name: &str| match name {
            "*" => Self::ALL,
            _ => {
                Self::NAMES.iter().find(|(known, _)| *known == name).map_or(Self::NONE, |(_, action)| *action)
            }
        };
        names.into_iter().map(one).fold(Self::NONE, Self::and)
    }

    pub(crate) fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.into_iter().filter(move |(_, action)| self.has(*action)).map(|(name, _)| name)
    }

    pub(crate) fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What a request needs.
#[derive(Debug)]
pub(crate) struct Needs<'a> {
    of: Need<'a>,
    /// Where a blob is mounted from, which is pulled.
    source: Option<RepoName>,
}

#[derive(Debug)]
enum Need<'a> {
    /// To be known.
    Nothing,
    Catalog,
    Repository(&'a RepoName, Actions),
}

impl<'a> Needs<'a> {
    /// Tells what a request needs. Every route has its rule here.
    pub(crate) fn of(route: &'a Route, method: &Method, query: Option<&str>) -> Self {
        let of = match route {
            Route::Base => Need::Nothing,
            Route::Catalog => Need::Catalog,
            Route::Blob(repo, _)
            | Route::Uploads(repo)
            | Route::Upload(repo, _)
            | Route::Manifest(repo, _)
            | Route::Tags(repo)
            | Route::Referrers(repo, _) => match *method {
                Method::GET | Method::HEAD => Need::Repository(repo, Actions::PULL),
                Method::POST | Method::PUT | Method::PATCH => {
                    Need::Repository(repo, Actions::PULL.and(Actions::PUSH))
                }
                Method::DELETE => Need::Repository(repo, Actions::DELETE),
                // The answer is that there is no such method.
                _ => Need::Nothing,
            },
        };
        let source = match (route, method) {
            // One that is no name of a repository is refused before anything is looked for.
            (Route::Uploads(_), &Method::POST) if param(query, "mount").is_some() => {
                param(query, "from").and_then(|from| route::repo(&from).ok())
            }
            _ => None,
        };
        Self { of, source }
    }

    /// The `scope` that a client has to ask a token for; empty if any token will do.
    pub(crate) fn scope(&self) -> String {
        let scope = match &self.of {
            Need::Nothing => String::new(),
            Need::Catalog => "registry:catalog:*".to_owned(),
            Need::Repository(repo, actions) => {
                format!("repository:{repo}:{}", actions.names().collect::<Vec<_>>().join(","))
            }
        };
        match &self.source {
            Some(source) => format!("{scope} repository:{source}:pull"),
            None => scope,
        }
    }
}

/// What is to be done with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    Allowed,
    /// 403: who asks is known, and may not.
    Denied,
    /// 401: with (other) credentials it could be.
    Challenge,
}

/// Decides whether `who` may do what `needs` tells; `public` are the repositories that anybody may pull from.
pub(crate) fn authorize(who: &Identity, needs: &Needs, public: &[Pattern]) -> Decision {
    let may = |repo, actions| allowed(who, repo, actions, public).has(actions);
    let allowed = match &needs.of {
        Need::Nothing => !matches!(who, Identity::Anonymous),
        Need::Catalog => may_list(who),
        Need::Repository(repo, actions) => may(repo, *actions),
    };
    if allowed && needs.source.as_ref().is_none_or(|source| may(source, Actions::PULL)) {
        return Decision::Allowed;
    }
    match who {
        Identity::Known(known) if !known.is_bearer => Decision::Denied,
        _ => Decision::Challenge,
    }
}

/// Tells which of `actions` somebody may do with a repository.
pub(crate) fn allowed(who: &Identity, repo: &RepoName, actions: Actions, public: &[Pattern]) -> Actions {
    let own = match who {
        Identity::Anybody => Actions::ALL,
        Identity::Anonymous => Actions::NONE,
        Identity::Known(known) => match &known.rights {
            Rights::Everything => Actions::ALL,
            Rights::Pull => Actions::PULL,
            Rights::Granted(grants) => grants.iter().fold(Actions::NONE, |sum, grant| match grant {
                Grant::Repository(granted, actions) if granted.matches(repo) => sum.and(*actions),
                _ => sum,
            }),
        },
    };
    let is_open = actions.has(Actions::PULL) && !own.has(Actions::PULL);
    let is_public = is_open && public.iter().any(|pattern| pattern.matches(repo.as_str()));
    let own = if is_public { own.and(Actions::PULL) } else { own };
    Actions(own.0 & actions.0)
}

/// Tells whether somebody may see the names of all repositories.
pub(crate) fn may_list(who: &Identity) -> bool {
    match who {
        Identity::Anybody => true,
        Identity::Anonymous => false,
        Identity::Known(known) => match &known.rights {
            Rights::Everything => true,
            Rights::Pull => false,
            Rights::Granted(grants) => grants.iter().any(|grant| matches!(grant, Grant::Catalog)),
        },
    }
}

impl Identity {
    /// Tells who somebody is whose credentials are good. What they may do follows from these and the name alone.
    pub(crate) fn known(name: impl Into<String>, credential: Credential, expires: Option<u64>) -> Self {
        let name = name.into();
        let is_bearer = matches!(credential, Credential::Bearer(_));
        let how = match credential {
            Credential::Password => "password",
            Credential::Certificate => "certificate",
            Credential::Token(_) => "token",
            Credential::Bearer(_) => "bearer",
        };
        let rights = match (credential, name.as_str()) {
            (Credential::Password, NODE_PULLER) => Rights::Pull,
            (Credential::Password, _) | (Credential::Certificate, ADMIN) => Rights::Everything,
            (Credential::Certificate, _) => Rights::Pull,
            (Credential::Token(grants) | Credential::Bearer(grants), _) => Rights::Granted(grants),
        };
        Self::Known(Arc::new(Known { name, expires, rights, is_bearer, how }))
    }

    /// The name, for the log.
    pub(crate) fn name(&self) -> Option<&str> {
        match self {
            Self::Anybody | Self::Anonymous => None,
            Self::Known(known) => Some(&known.name),
        }
    }

    /// How they showed who they are, for the audit log.
    pub(crate) fn how(&self) -> &'static str {
        match self {
            Self::Anybody => "none",
            Self::Anonymous => "anonymous",
            Self::Known(known) => known.how,
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name().unwrap_or("-"))
    }
}
