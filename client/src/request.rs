//! One exchange with a registry: scheme, authorization, redirects, retries, and errors with the registry's own words.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use reqwest::Response;
use serde::Deserialize;
use tokio::sync::OnceCell;
use tokio_util::task::TaskTracker;
use url::{Host, Url};

use crate::auth::{Challenge, Credentials};
use crate::network::{Clients, Forbidden, Network, Proxies};
use crate::repository::{Access, ClientOptions};
use crate::{Error, ErrorKind, Reference, RegistryOptions, Result};

/// Longest wait for a connection, milliseconds.
const CONNECT_TIMEOUT_MS: u64 = 15_000;
/// Longest wait for an answer to begin once a request is sent, its body (at most one chunk) included, milliseconds.
pub(crate) const RESPONSE_TIMEOUT_MS: u64 = 120_000;
/// Longest wait for the next bytes of an answer, milliseconds.
pub(crate) const READ_IDLE_TIMEOUT_MS: u64 = 60_000;
/// Times that one request is tried while the registry is unavailable.
pub(crate) const ATTEMPTS_MAX: u32 = 6;
/// Wait before the second attempt, milliseconds; each further wait is twice as long.
const BACKOFF_FIRST_MS: u64 = 200;
/// Longest wait between attempts, milliseconds; a registry's `Retry-After` is followed up to it.
const BACKOFF_MS_MAX: u64 = 10_000;
/// Most redirects followed for one blob.
const REDIRECTS_MAX: usize = 5;
/// Longest JSON answer read (errors, tokens), bytes.
const ANSWER_BYTES_MAX: usize = 256 << 10;
/// How long a token without a stated lifetime is used, seconds (distribution token specification).
const TOKEN_LIFETIME_S: u64 = 60;
/// Longest time a token is used, seconds.
const TOKEN_LIFETIME_S_MAX: u64 = 24 * 3600;
/// A token is renewed this long before it ends, seconds.
const TOKEN_MARGIN_S: u64 = 10;
/// Tokens kept at a time; when there are more, all are fetched again.
const TOKENS_MAX: usize = 1024;
/// Longest part of a registry's own message that is shown, characters.
const MESSAGE_CHARS_MAX: usize = 300;

/// A body kept in memory, so that it can be sent again.
#[derive(Clone)]
pub(crate) struct Body {
    pub(crate) bytes: Bytes,
    pub(crate) media_type: String,
}

/// A request as it can be sent any number of times.
pub(crate) struct Outgoing<'a> {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Option<Body>,
    /// Longest wait for the answer, if not the usual one.
    pub(crate) timeout: Option<Duration>,
    access: Access,
    repository: &'a str,
    what: &'a str,
}

impl<'a> Outgoing<'a> {
    /// A request without headers and body; `what` begins error messages ("pushing a chunk to a/b").
    pub(crate) fn new(method: Method, url: Url, access: Access, repository: &'a str, what: &'a str) -> Self {
        Self { method, url, headers: HeaderMap::new(), body: None, timeout: None, access, repository, what }
    }

    /// Adds a header whose value this crate made, thus is always valid.
    pub(crate) fn header(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }

    pub(crate) fn body(mut self, body: Body) -> Self {
        self.body = Some(body);
        self
    }

    fn redirected(&self, url: Url) -> Self {
        let method = self.method.clone();
        let mut next = Outgoing::new(method, url, self.access, self.repository, self.what);
        next.headers = self.headers.clone();
        next
    }

    fn scope(&self) -> String {
        let actions = match self.access {
            Access::Pull => "pull",
            Access::Push => "pull,push",
            Access::Delete => "delete",
        };
        format!("repository:{}:{actions}", self.repository)
    }
}

/// The connection pool and the authorization state of one registry.
pub(crate) struct Transport {
    clients: Clients,
    endpoint: String,
    loopback: bool,
    insecure: bool,
    /// Whether the address itself says that there is no TLS.
    plain: bool,
    /// Whether errors tell of the flags and files that could help.
    advises: bool,
    response_timeout: Duration,
    pub(crate) attempts_max: u32,
    base: OnceCell<Url>,
    credentials: Option<Credentials>,
    auth: Mutex<AuthState>,
    pub(crate) cleanup: TaskTracker,
}

#[derive(Default)]
struct AuthState {
    challenge: Option<Challenge>,
    tokens: HashMap<String, Token>,
}

struct Token {
    header: HeaderValue,
    expires: Instant,
}

impl Transport {
    pub(crate) fn new(reference: &Reference, options: &ClientOptions) -> Result<Self> {
        let mut network = options.network.clone();
        if reference.is_loopback() {
            network.proxies = Some(Proxies::none());
        }
        let base = || http_client().tls_danger_accept_invalid_certs(options.insecure);
        Ok(Self {
            clients: Clients::new(&network, base)?,
            endpoint: reference.endpoint().to_owned(),
            loopback: reference.is_loopback(),
            insecure: options.insecure,
            plain: false,
            advises: true,
            response_timeout: Duration::from_millis(RESPONSE_TIMEOUT_MS),
            attempts_max: ATTEMPTS_MAX,
            base: OnceCell::new(),
            credentials: options.auth.find(reference).cloned(),
            auth: Mutex::default(),
            cleanup: TaskTracker::new(),
        })
    }

    /// Talks to the registry at `url`, which ends behind the host.
    pub(crate) fn at(url: Url, options: RegistryOptions) -> Result<Self> {
        let loopback = is_loopback(&url);
        let proxies = loopback.then(Proxies::none);
        let network = Network { roots: options.roots, proxies, gate: None };
        Ok(Self {
            clients: Clients::new(&network, http_client)?,
            endpoint: url.authority().to_owned(),
            loopback,
            insecure: false,
            plain: url.scheme() == "http",
            advises: false,
            response_timeout: options.response_timeout,
            attempts_max: options.attempts_max.max(1),
            base: OnceCell::new_with(Some(url)),
            credentials: options.credentials,
            auth: Mutex::default(),
            cleanup: TaskTracker::new(),
        })
    }

    /// The absolute URL of `path`, which follows the registry's root.
    pub(crate) async fn url(&self, path: &str) -> Result<Url> {
        let base = self.base.get_or_try_init(|| self.choose_base()).await?;
        base.join(path).map_err(|e| Error::with(ErrorKind::Invalid, format!("{path:?} makes no URL"), e))
    }

    /// Resolves a `Location`. A registry behind a TLS proxy may call itself http: it is still reached by https. Other
    /// plain HTTP needs `insecure`, unless this machine talks to itself.
    pub(crate) fn resolve(&self, from: &Url, location: &str) -> Result<Url> {
        let bad = |why: &str| {
            Error::new(
                ErrorKind::Protocol,
                format!("{} sent an upload or redirect location {why}", self.endpoint),
            )
        };
        let mut url = from.join(location).map_err(|_| bad("that is no URL"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(bad("that is not HTTP"));
        }
        if from.scheme() == "https" && url.scheme() == "http" {
            let same_name = url.host_str() == from.host_str();
            if same_name && (url.port() == from.port() || url.port().is_none()) {
                url.set_scheme("https").map_err(|()| bad("that is no URL"))?;
                if url.port().is_none() {
                    url.set_port(from.port()).map_err(|()| bad("that is no URL"))?;
                }
            }
        }
        let stays_here = from.scheme() == "http" && (self.plain || is_loopback(&url));
        if url.scheme() == "http" && !self.insecure && !stays_here {
            return Err(bad(match self.advises {
                true => "without TLS; allow it with --insecure",
                false => "without TLS",
            }));
        }
        Ok(url)
    }

    /// Sends a request and follows redirects, as blobs have them; other origins get no `Authorization`.
    pub(crate) async fn send_following(&self, request: &Outgoing<'_>) -> Result<Response> {
        let mut response = self.send_retrying(request).await?;
        for _ in 0..REDIRECTS_MAX {
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let location = header(response.headers(), &LOCATION).ok_or_else(|| {
                Error::new(ErrorKind::Protocol, format!("{}: a redirect without a location", request.what))
            })?;
            let url = self.resolve(response.url(), location)?;
            response = self.send_retrying(&request.redirected(url)).await?;
        }
        Err(Error::new(ErrorKind::Protocol, format!("{}: more than {REDIRECTS_MAX} redirects", request.what)))
    }

    /// Sends a request that may be repeated, until the registry is available.
    pub(crate) async fn send_retrying(&self, request: &Outgoing<'_>) -> Result<Response> {
        let mut attempt = 1;
        loop {
            let outcome = self.send(request).await;
            let retry_after = match &outcome {
                Ok(response) if is_transient(response.status()) => retry_after(response.headers()),
                Err(error) if error.kind() == ErrorKind::Unavailable => None,
                _ => return outcome,
            };
            if attempt >= self.attempts_max {
                return outcome;
            }
            tracing::debug!(what = request.what, attempt, "the registry is unavailable, trying again");
            back_off(attempt, retry_after).await;
            attempt += 1;
        }
    }

    /// Sends a request once; a 401 is answered once with what the registry asks for.
    pub(crate) async fn send(&self, request: &Outgoing<'_>) -> Result<Response> {
        // Credentials and tokens belong to the registry's own origin and go nowhere else.
        let is_ours = self.base.get().is_some_and(|base| base.origin() == request.url.origin());
        if !is_ours {
            return self.exchange(request, None).await;
        }
        let scope = request.scope();
        let authorization = self.authorization(&scope, request.what).await?;
        let response = self.exchange(request, authorization.as_ref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let values = response.headers().get_all(WWW_AUTHENTICATE);
        let challenge = Challenge::parse(values.iter().filter_map(|value| value.to_str().ok()));
        let refused_basic = authorization.is_some_and(|value| value.as_bytes().starts_with(b"Basic"));
        match (challenge, &self.credentials) {
            (Some(Challenge::Basic), Some(_)) if !refused_basic => self.remember(Challenge::Basic),
            (Some(bearer @ Challenge::Bearer { .. }), _) => {
                self.remember(bearer.clone());
                self.fetch_token(&bearer, &scope, request.what).await?;
            }
            _ => return Ok(response),
        }
        drop(response);
        let authorization = self.authorization(&scope, request.what).await?;
        self.exchange(request, authorization.as_ref()).await
    }

    /// Turns an unwanted answer into an error with the registry's own code and message.
    pub(crate) async fn refused(&self, response: Response, what: &str) -> Error {
        let status = response.status();
        let kind = match status.as_u16() {
            401 => ErrorKind::Unauthorized,
            403 => ErrorKind::Denied,
            404 => ErrorKind::NotFound,
            408 | 425 | 429 | 500..=599 => ErrorKind::Unavailable,
            _ => ErrorKind::Protocol,
        };
        let origin = response.url().origin().ascii_serialization();
        let body = read_bounded(response, ANSWER_BYTES_MAX).await.unwrap_or_default();
        let mut text = format!("{what}: {origin} answered {status}");
        let told = RegistryError::first(&body);
        if status == StatusCode::INSUFFICIENT_STORAGE || told.as_ref().is_some_and(RegistryError::is_quota) {
            // Whoever shows it to others can tell it from what was said to whom.
            let why = told.map_or_else(|| "it has no room".to_owned(), |told| printable(&told.message));
            return Error::with(ErrorKind::Full, text, why);
        }
        if let Some(told) = told {
            let message = printable(&format!("{}: {}", told.code, told.message));
            text += &format!(" ({})", message.trim_end_matches([':', ' ']));
        }
        match kind {
            ErrorKind::Unauthorized if self.credentials.is_some() => {
                text += "; the credentials were not accepted"
            }
            ErrorKind::Unauthorized if self.advises => {
                text += "; give credentials by --authfile or docker/podman login"
            }
            _ => {}
        }
        Error::new(kind, text)
    }

    /// Decides between TLS and plain HTTP, asking the registry only if `insecure` leaves both open.
    async fn choose_base(&self) -> Result<Url> {
        let url = |scheme: &str| {
            Url::parse(&format!("{scheme}://{}/", self.endpoint)).map_err(|e| {
                Error::with(ErrorKind::Invalid, format!("{:?} is no registry host", self.endpoint), e)
            })
        };
        if self.loopback {
            return url("http");
        }
        let tls = url("https")?;
        if self.insecure {
            let root = tls.join("v2/").unwrap_or_else(|_| tls.clone());
            let ping = self.client(&root, "looking for TLS")?.get(root).send();
            let ping = tokio::time::timeout(Duration::from_millis(RESPONSE_TIMEOUT_MS), ping).await;
            if !matches!(ping, Ok(Ok(_))) {
                tracing::warn!(registry = %self.endpoint, "no TLS there, going on in plain HTTP");
                return url("http");
            }
        }
        Ok(tls)
    }

    /// The connections for `url`, if the gate lets a request go there.
    fn client(&self, url: &Url, what: &str) -> Result<&reqwest::Client> {
        self.clients.for_url(url).map_err(|why| forbidden(what, &why))
    }

    async fn exchange(
        &self,
        request: &Outgoing<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response> {
        let client = self.client(&request.url, request.what)?;
        let mut builder = client.request(request.method.clone(), request.url.clone());
        builder = builder.headers(request.headers.clone());
        if let Some(value) = authorization {
            builder = builder.header(AUTHORIZATION, value);
        }
        match &request.body {
            Some(body) => builder = builder.header(CONTENT_TYPE, &body.media_type).body(body.bytes.clone()),
            // Some servers insist on a length where a body could be.
            None if request.method != Method::GET && request.method != Method::HEAD => {
                builder = builder.header(CONTENT_LENGTH, 0);
            }
            None => {}
        }
        let origin = request.url.origin().ascii_serialization();
        let timeout = request.timeout.unwrap_or(self.response_timeout);
        match tokio::time::timeout(timeout, builder.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) if is_certificate_refused(&error) => {
                let mut context = format!("{}: the certificate of {origin} is not accepted", request.what);
                if self.advises {
                    context += "; --insecure accepts any";
                }
                Err(Error::with(ErrorKind::Untrusted, context, error.without_url()))
            }
            Ok(Err(error)) if is_identity_refused(&error) => {
                let context = format!(
                    "{}: {origin} wants a certificate of its client, and registries are shown none",
                    request.what
                );
                Err(Error::with(ErrorKind::Untrusted, context, error.without_url()))
            }
            Ok(Err(error)) => {
                if let Some(why) = Forbidden::behind(&error) {
                    return Err(forbidden(request.what, why));
                }
                let context = format!("{}: no answer from {origin}", request.what);
                Err(Error::with(ErrorKind::Unavailable, context, error.without_url()))
            }
            Err(_) => {
                let seconds = timeout.as_secs();
                let context = format!("{}: no answer from {origin} within {seconds} s", request.what);
                Err(Error::new(ErrorKind::Unavailable, context))
            }
        }
    }

    /// The header for `scope`, as far as is known what the registry wants.
    async fn authorization(&self, scope: &str, what: &str) -> Result<Option<HeaderValue>> {
        let challenge = {
            let state = self.state();
            match &state.challenge {
                None => return Ok(None),
                Some(Challenge::Basic) => None,
                Some(bearer) => match state.tokens.get(scope) {
                    Some(token) if token.expires > Instant::now() => return Ok(Some(token.header.clone())),
                    _ => Some(bearer.clone()),
                },
            }
        };
        match challenge {
            None => Ok(self.credentials.as_ref().and_then(|c| secret_header(&c.basic()))),
            Some(Challenge::Bearer { realm, service, .. }) => {
                // The scope of the remembered challenge was another request's.
                let bearer = Challenge::Bearer { realm, service, scope: None };
                self.fetch_token(&bearer, scope, what).await.map(Some)
            }
            Some(Challenge::Basic) => Ok(None),
        }
    }

    /// Gets a token from the realm that the registry names (distribution token specification). The realm is where
    /// the credentials are meant to go; it must be as well protected as the registry itself.
    async fn fetch_token(&self, challenge: &Challenge, scope: &str, what: &str) -> Result<HeaderValue> {
        let Challenge::Bearer { realm, service, scope: asked } = challenge else {
            return Err(Error::new(ErrorKind::Protocol, format!("{what}: no token service was named")));
        };
        let mut url = Url::parse(realm)
            .map_err(|e| Error::with(ErrorKind::Protocol, format!("{what}: token service {realm:?}"), e))?;
        let registry_is_plain = self.base.get().is_some_and(|base| base.scheme() == "http");
        if url.scheme() != "https"
            && !(registry_is_plain && (self.insecure || self.plain || is_loopback(&url)))
        {
            let text =
                format!("{what}: token service {realm:?} is without TLS, no credentials are sent there");
            return Err(Error::new(ErrorKind::Protocol, text));
        }
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = service {
                query.append_pair("service", service);
            }
            query.append_pair("scope", asked.as_deref().unwrap_or(scope));
        }
        let what = format!("{what}: asking for a token");
        let request = Outgoing::new(Method::GET, url, Access::Pull, "", &what);
        let basic = self.credentials.as_ref().and_then(|c| secret_header(&c.basic()));
        let mut attempt = 1;
        let response = loop {
            match self.exchange(&request, basic.as_ref()).await {
                Ok(response) if is_transient(response.status()) && attempt < self.attempts_max => {}
                Err(error) if error.kind() == ErrorKind::Unavailable && attempt < self.attempts_max => {}
                outcome => break outcome?,
            }
            back_off(attempt, None).await;
            attempt += 1;
        };
        if !response.status().is_success() {
            return Err(self.refused(response, &what).await);
        }
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
            expires_in: Option<u64>,
        }
        let bad = || Error::new(ErrorKind::Protocol, format!("{what}: the answer holds no token"));
        let answer = read_bounded(response, ANSWER_BYTES_MAX).await?;
        let answer: Answer = serde_json::from_slice(&answer).map_err(|_| bad())?;
        let token = answer.token.or(answer.access_token).ok_or_else(bad)?;
        let header = secret_header(&format!("Bearer {token}")).ok_or_else(bad)?;
        let lifetime =
            answer.expires_in.unwrap_or(TOKEN_LIFETIME_S).clamp(TOKEN_LIFETIME_S, TOKEN_LIFETIME_S_MAX);
        let expires = Instant::now() + Duration::from_secs(lifetime - TOKEN_MARGIN_S);
        let mut state = self.state();
        if state.tokens.len() >= TOKENS_MAX {
            state.tokens.clear();
        }
        state.tokens.insert(scope.to_owned(), Token { header: header.clone(), expires });
        Ok(header)
    }

    fn remember(&self, challenge: Challenge) {
        self.state().challenge = Some(challenge);
    }

    fn state(&self) -> std::sync::MutexGuard<'_, AuthState> {
        self.auth.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// What both ways to name a registry want of a client.
fn http_client() -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .user_agent(concat!("dvcr/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_millis(CONNECT_TIMEOUT_MS))
        .redirect(reqwest::redirect::Policy::none())
        .http1_only()
        .tcp_nodelay(true)
}

fn forbidden(what: &str, why: &Forbidden) -> Error {
    Error::new(ErrorKind::Forbidden, format!("{what}: {why}"))
}

/// Whether the host is this machine.
fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// Whether trying the same later may help.
pub(crate) fn is_transient(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// Whether a request failed because of the server's TLS certificate, which trying again does not change.
pub fn is_certificate_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    // By rustls's words: its error types reach us only behind those of the HTTP client.
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.into_iter().any(|cause| cause.to_string().starts_with("invalid peer certificate"))
}

/// Whether a request failed because the server wants a certificate of its client, or another one, which trying again does not change.
pub fn is_identity_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    // Alerts by which servers say so (RFC 8446, 6.2), in rustls's words.
    const ALERTS: [&str; 8] = [
        "CertificateRequired",
        "BadCertificate",
        "UnsupportedCertificate",
        "CertificateRevoked",
        "CertificateExpired",
        "CertificateUnknown",
        "UnknownCA",
        "AccessDenied",
    ];
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.into_iter().any(|cause| {
        let text = cause.to_string();
        text.strip_prefix("received fatal alert: ").is_some_and(|alert| ALERTS.contains(&alert))
    })
}

/// Waits before attempt `attempt + 1`.
pub(crate) async fn back_off(attempt: u32, asked: Option<Duration>) {
    let doubled = BACKOFF_FIRST_MS << attempt.saturating_sub(1).min(16);
    let wait = asked.unwrap_or(Duration::from_millis(doubled)).min(Duration::from_millis(BACKOFF_MS_MAX));
    tokio::time::sleep(wait).await;
}

/// A header's value as text.
pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// The `Content-Length`; of a HEAD answer too, where the body itself is empty.
pub(crate) fn content_length(headers: &HeaderMap) -> Option<u64> {
    header(headers, &CONTENT_LENGTH)?.parse().ok()
}

/// Reads a whole answer of at most `bytes_max`.
pub(crate) async fn read_bounded(mut response: Response, bytes_max: usize) -> Result<Vec<u8>> {
    let origin = response.url().origin().ascii_serialization();
    let mut body = Vec::new();
    while let Some(chunk) = next_chunk(&mut response).await? {
        if body.len() + chunk.len() > bytes_max {
            return Err(Error::new(
                ErrorKind::Protocol,
                format!("an answer of {origin} is longer than {bytes_max} bytes"),
            ));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The next bytes of an answer; fails with [`ErrorKind::Unavailable`] when they stop coming.
pub(crate) async fn next_chunk(response: &mut Response) -> Result<Option<Bytes>> {
    let limit = Duration::from_millis(READ_IDLE_TIMEOUT_MS);
    match tokio::time::timeout(limit, response.chunk()).await {
        Ok(Ok(chunk)) => Ok(chunk),
        Ok(Err(error)) => {
            let origin = response.url().origin().ascii_serialization();
            Err(Error::with(
                ErrorKind::Unavailable,
                format!("{origin} broke off its answer"),
                error.without_url(),
            ))
        }
        Err(_) => {
            let origin = response.url().origin().ascii_serialization();
            let seconds = limit.as_secs();
            Err(Error::new(ErrorKind::Unavailable, format!("{origin} sent nothing for {seconds} s")))
        }
    }
}

pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    header(headers, &RETRY_AFTER)?.parse().ok().map(Duration::from_secs)
}

fn secret_header(value: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(value).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// What a registry says of a failure (distribution-spec 1.1, "Error Codes").
#[derive(Deserialize)]
struct RegistryError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    detail: serde_json::Value,
}

impl RegistryError {
    fn first(body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Errors {
            errors: Vec<RegistryError>,
        }
        let errors: Errors = serde_json::from_slice(body).ok()?;
        errors.errors.into_iter().next()
    }

    /// Whether it is a quota of our registry that is used up (docs/registry-limits.md).
    fn is_quota(&self) -> bool {
        self.code == "DENIED" && self.detail.get("limit").is_some() && self.detail.get("used").is_some()
    }
}

/// A text of somebody else's, as it can be shown.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MESSAGE_CHARS_MAX).collect()
}
