//! Who may do what.
//!
//! ```text
//!  Authorization, client certificate ──> users ── htpasswd, jwt     who is it?
//!                                          │ Identity
//!                        route, method ──> rules ── pattern          may they?
//!                                          │ Decision
//!                                   200, 401 + challenges, 403
//!                  GET, POST /token ──> jwt                         a token for what they may
//! ```

mod htpasswd;
mod jwt;
mod pattern;
mod rules;
mod users;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, HOST, WWW_AUTHENTICATE};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, StatusCode, Uri};

use crate::Result;
use crate::api::error::{ApiError, Code};
use crate::api::route::Route;
use crate::names::RepoName;
use crate::reload::Reloaded;
use crate::rules::Pattern;

pub(crate) use self::jwt::SERVICE;
use self::jwt::{Access, Issued, Key};
pub(crate) use self::rules::Identity;
use self::rules::{Actions, Credential, Decision, Needs, allowed, authorize, may_list};
use self::users::{Refused, Users};

/// Where our tokens are got.
pub(crate) const TOKEN_PATH: &str = "/token";

const BASIC_CHALLENGE: HeaderValue = HeaderValue::from_static("Basic realm=\"dvcr\"");
const FORWARDED_PROTO: &str = "x-forwarded-proto";
const FORWARDED_HOST: &str = "x-forwarded-host";

/// Who may do what; the files are read again when they change.
#[derive(Clone, Debug, Default)]
pub struct Auth {
    /// File with the password of `admin`, who may do everything.
    pub admin_password: Option<PathBuf>,
    /// File with the password of `node-puller`, who may pull from every repository.
    pub node_puller_password: Option<PathBuf>,
    /// PEM file with the public key of those tokens that others use as passwords: ES256, with their rights inside.
    pub token_key: Option<PathBuf>,
    /// File of users and bcrypt hashes; they may do everything.
    pub htpasswd: Option<PathBuf>,
    /// Repositories that anybody may pull from.
    pub anonymous_pull: Vec<Pattern>,
    /// Tokens of our own for those who may do something; `None` is Basic alone.
    pub bearer: Option<Bearer>,
}

/// Tokens of our own.
#[derive(Clone, Debug, Default)]
pub struct Bearer {
    /// PEM file with the private key, P-256, that signs them; `None` is one made at start. Replicas need the same.
    pub key: Option<PathBuf>,
    /// What clients call the registry; `None` is what their `Host` header says.
    pub external_url: Option<ExternalUrl>,
    /// Whether `X-Forwarded-Proto` and `X-Forwarded-Host` are believed.
    pub trust_forwarded: bool,
}

/// How clients reach the registry: `https://registry.example:5000`, with a path if a proxy has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalUrl(String);

/// A text that is no address of a registry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not of the form https://host[:port][/path]")]
pub struct UrlError(String);

/// Lets in who may, and tells the others how.
#[derive(Debug)]
pub(crate) struct Guard {
    users: Reloaded<Users>,
    public: Vec<Pattern>,
    bearer: Option<Bearer>,
    /// Whether clients speak TLS to us.
    is_tls: bool,
}

/// Who a client's certificate says they are; put beside the requests of its connection.
#[derive(Clone, Debug)]
pub(crate) struct Peer(Identity);

impl Peer {
    pub(crate) fn new(name: &str) -> Self {
        Self(Identity::known(name, Credential::Certificate, None))
    }
}

impl Guard {
    /// Reads the files. Blocks.
    pub(crate) fn open(auth: Auth, is_tls: bool) -> Result<Self> {
        let (public, bearer) = (auth.anonymous_pull.clone(), auth.bearer.clone());
        let files = [&auth.admin_password, &auth.node_puller_password, &auth.token_key, &auth.htpasswd];
        let keys = bearer.iter().filter_map(|bearer| bearer.key.clone());
        let files = files.into_iter().flatten().cloned().chain(keys).collect();
        // One that is made here outlives the files.
        let key =
            bearer.as_ref().filter(|bearer| bearer.key.is_none()).map(|_| Key::generate()).transpose()?;
        let users = Reloaded::open("users and keys", files, move || Users::load(&auth, key.as_ref()))?;
        Ok(Self { users, public, bearer, is_tls })
    }

    /// Reads the files again if one changed, or anyway. Blocks.
    pub(crate) fn refresh(&self, force: bool) {
        self.users.refresh(force);
    }

    /// Whether there is [`TOKEN_PATH`].
    pub(crate) fn issues_tokens(&self) -> bool {
        self.bearer.is_some()
    }

    /// Finds out who asks.
    ///
    /// # Errors
    /// 401 for credentials that are not good, also where none are needed.
    pub(crate) async fn identify(&self, parts: &Parts) -> Result<Identity, ApiError> {
        let verified = match parts.headers.get(AUTHORIZATION) {
            Some(authorization) => self.users.get().verify(authorization.as_bytes()).await,
            None => Ok(Identity::Anonymous),
        };
        match verified {
            Ok(Identity::Anonymous) => {
                let peer = parts.extensions.get::<Peer>();
                Ok(peer.map_or(Identity::Anonymous, |peer| peer.0.clone()))
            }
            Ok(who) => Ok(who),
            Err(Refused::Credentials) => {
                Err(self.challenge(parts, "the user name or the password is wrong", None))
            }
            Err(Refused::Bearer) => {
                Err(self.challenge(parts, "the token has ended or is none of ours", Some("invalid_token")))
            }
        }
    }

    /// Finds out who wants a token.
    ///
    /// # Errors
    /// 401 for everybody to whom a token would be of no use, and for those who come with one.
    pub(crate) async fn identify_for_token(&self, parts: &Parts) -> Result<Identity, ApiError> {
        match self.identify(parts).await? {
            Identity::Known(known) if known.is_bearer => {
                Err(self.challenge(parts, "a token is given for a name and a password", None))
            }
            Identity::Anonymous if self.public.is_empty() => {
                Err(self.challenge(parts, "user name and password are needed", None))
            }
            who => Ok(who),
        }
    }

    /// Makes a token for that part of what is asked for that `who` may do. Scopes that cannot be read are passed over.
    ///
    /// # Errors
    /// 500 when it cannot be signed.
    pub(crate) fn issue<'a>(
        &self,
        who: &Identity,
        scopes: impl Iterator<Item = &'a str>,
    ) -> Result<Issued, ApiError> {
        let access: Vec<Access> = scopes.filter_map(|scope| self.access(who, scope)).collect();
        let expires = match who {
            Identity::Known(known) => known.expires,
            Identity::Anybody | Identity::Anonymous => None,
        };
        let users = self.users.get();
        let issuer = users
            .issuer
            .as_ref()
            .ok_or_else(|| ApiError::not_found(Code::Unsupported, "no tokens are issued here"))?;
        issuer
            .issue(who.name().unwrap_or_default(), &access, expires)
            .map_err(|error| ApiError::internal(&error))
    }

    /// Reads `type:name:action,action` and cuts it down to what `who` may do.
    fn access(&self, who: &Identity, scope: &str) -> Option<Access> {
        let (kind, rest) = scope.split_once(':')?;
        let (name, actions) = rest.rsplit_once(':')?;
        let actions: Vec<String> = match (kind, name) {
            ("repository", name) => {
                let wanted = Actions::of(actions.split(','));
                allowed(who, &RepoName::parse(name)?, wanted, &self.public)
                    .names()
                    .map(str::to_owned)
                    .collect()
            }
            ("registry", "catalog") if may_list(who) && actions.split(',').any(|action| action == "*") => {
                vec!["*".to_owned()]
            }
            _ => return None,
        };
        let (kind, name) = (kind.to_owned(), name.to_owned());
        (!actions.is_empty()).then_some(Access { kind, name, actions: Some(actions) })
    }

    /// Lets a request pass, or not.
    ///
    /// # Errors
    /// 401 or 403.
    pub(crate) fn authorize(&self, who: &Identity, route: &Route, parts: &Parts) -> Result<(), ApiError> {
        let needs = Needs::of(route, &parts.method, parts.uri.query());
        match authorize(who, &needs, &self.public) {
            Decision::Allowed => Ok(()),
            Decision::Denied => Err(ApiError::denied(format!("{who} may not do this here"))),
            Decision::Challenge => {
                let why = matches!(who, Identity::Known(_)).then_some("insufficient_scope");
                Err(self.challenge(parts, "credentials with the right to do this are needed", why))
            }
        }
    }

    /// Asks for credentials, without telling whether what was asked for is there.
    pub(crate) fn challenge(&self, parts: &Parts, message: &str, why: Option<&str>) -> ApiError {
        let error = ApiError::new(StatusCode::UNAUTHORIZED, Code::Unauthorized, message);
        if parts.uri.path() == TOKEN_PATH {
            return error.with(WWW_AUTHENTICATE, BASIC_CHALLENGE);
        }
        let route = Route::parse(&parts.method, parts.uri.path());
        let is_base = matches!(route, Ok(Route::Base));
        let scope = route.ok().map(|route| Needs::of(&route, &parts.method, parts.uri.query()).scope());
        let bearer = self.bearer_challenge(parts, &scope.unwrap_or_default(), why);
        // docs/registry.md tells why it is these, in this order.
        let basic = (bearer.is_none() || !is_base || self.public.is_empty()).then_some(BASIC_CHALLENGE);
        basic.into_iter().chain(bearer).fold(error, |error, value| error.with(WWW_AUTHENTICATE, value))
    }

    fn bearer_challenge(&self, parts: &Parts, scope: &str, why: Option<&str>) -> Option<HeaderValue> {
        let bearer = self.bearer.as_ref()?;
        let base = base_url(Some(bearer), self.is_tls, &parts.headers)?;
        let mut text = format!("Bearer realm=\"{base}{TOKEN_PATH}\",service=\"{SERVICE}\"");
        if !scope.is_empty() {
            text += &format!(",scope=\"{scope}\"");
        }
        if let Some(why) = why {
            text += &format!(",error=\"{why}\"");
        }
        HeaderValue::try_from(text).ok()
    }
}

/// What the client calls us; `None` if it does not say.
pub(crate) fn base_url(bearer: Option<&Bearer>, is_tls: bool, headers: &HeaderMap) -> Option<String> {
    if let Some(url) = bearer.and_then(|bearer| bearer.external_url.as_ref()) {
        return Some(url.0.clone());
    }
    // Of a chain of proxies, the first speaks with the client.
    let first = |name: &str| headers.get(name)?.to_str().ok()?.split(',').next().map(str::trim);
    let is_trusted = bearer.is_some_and(|bearer| bearer.trust_forwarded);
    let forwarded = |name| first(name).filter(|_| is_trusted);
    let scheme = forwarded(FORWARDED_PROTO).filter(|scheme| ["http", "https"].contains(scheme));
    let scheme = scheme.unwrap_or(if is_tls { "https" } else { "http" });
    let host = forwarded(FORWARDED_HOST).or_else(|| first(HOST.as_str())).filter(|host| is_host(host))?;
    Some(format!("{scheme}://{host}"))
}

/// The value of a header that brings a name and a password.
pub(crate) fn basic_header(user: &str, password: &str) -> HeaderValue {
    let text = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
    // The alphabet of base64 has nothing that a header cannot hold.
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("Basic"))
}

/// Whether a text can stand where a URL has its host; no more than that.
fn is_host(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte);
    !text.is_empty() && text.len() <= 300 && text.bytes().all(plain)
}

impl FromStr for ExternalUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let bad = || UrlError(text.chars().take(300).collect());
        let url: Uri = text.parse().map_err(|_| bad())?;
        let scheme = url.scheme_str().filter(|scheme| ["http", "https"].contains(scheme));
        let host = url.authority().map(|host| host.as_str()).filter(|host| is_host(host));
        let (scheme, host) = scheme.zip(host).ok_or_else(bad)?;
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/.-_~".contains(&byte);
        if url.query().is_some() || text.contains('#') || !url.path().bytes().all(is_plain) {
            return Err(bad());
        }
        Ok(Self(format!("{scheme}://{host}{}", url.path().trim_end_matches('/'))))
    }
}

impl fmt::Display for ExternalUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests;
