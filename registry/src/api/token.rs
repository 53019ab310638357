//! The token endpoint, by GET as the token specification of CNCF distribution has it, and by POST as its OAuth2 one.

use std::time::Duration;

use axum::body::Body;
use chrono::{DateTime, SecondsFormat};
use form_urlencoded::parse;
use http::header::{AUTHORIZATION, CACHE_CONTROL};
use http::request::Parts;
use http::{HeaderValue, Method};
use http_body_util::{BodyExt, Limited};
use serde_json::json;

use super::error::{ApiError, Code};
use super::uploads::patiently;
use super::{Answer, json, not_allowed};
use crate::auth::{Guard, Identity, SERVICE, basic_header};

/// Largest form, bytes.
const FORM_BYTES_MAX: usize = 64 << 10;
/// How long it may take to come.
const FORM_TIMEOUT: Duration = Duration::from_secs(60);
/// Most scopes that one token is asked for.
const SCOPES_MAX: usize = 64;

/// What is asked for.
#[derive(Default)]
struct Wanted {
    service: Option<String>,
    scopes: Vec<String>,
    grant_type: Option<String>,
    user: Option<String>,
    password: Option<String>,
}

/// Gives a token to whom it may concern, and tells who that is, for the log.
pub(super) async fn answer(guard: &Guard, mut parts: Parts, body: Body) -> (Identity, Answer) {
    let wanted = match wanted(&parts, body).await {
        Ok(wanted) => wanted,
        Err(error) => return (Identity::Anonymous, Err(error)),
    };
    if let (Some(user), Some(password)) = (&wanted.user, &wanted.password) {
        parts.headers.insert(AUTHORIZATION, basic_header(user, password));
    }
    match guard.identify_for_token(&parts).await {
        Ok(who) => {
            let answer = issue(guard, &who, &wanted);
            (who, answer)
        }
        Err(error) => (Identity::Anonymous, Err(error)),
    }
}

async fn wanted(parts: &Parts, body: Body) -> Result<Wanted, ApiError> {
    let bad = |message: &str| ApiError::bad_request(Code::Unsupported, message);
    let wanted = match parts.method {
        Method::GET => Wanted::read(parts.uri.query().unwrap_or_default().as_bytes()),
        Method::POST => {
            let form = patiently(FORM_TIMEOUT, Limited::new(body, FORM_BYTES_MAX).collect()).await;
            let form = form.map_err(|reason| bad(&reason))?;
            let form = form.map_err(|_| bad("the form is longer than 64 KiB, or broke off"))?.to_bytes();
            let wanted = Wanted::read(&form);
            if wanted.grant_type.as_deref() != Some("password") {
                return Err(bad("only the grant_type \"password\" is supported"));
            }
            wanted
        }
        _ => return Err(not_allowed("GET, POST")),
    };
    if wanted.scopes.len() > SCOPES_MAX {
        return Err(bad("more than 64 scopes are asked for"));
    }
    if let Some(service) = wanted.service.as_deref().filter(|service| *service != SERVICE) {
        let shown: String = service.chars().take(100).collect();
        return Err(bad(&format!("the service here is {SERVICE:?}, not {shown:?}")));
    }
    Ok(wanted)
}

impl Wanted {
    fn read(form: &[u8]) -> Self {
        let mut wanted = Self::default();
        for (name, value) in parse(form).filter(|(_, value)| !value.is_empty()) {
            match &*name {
                "service" => wanted.service = Some(value.into_owned()),
                // One more than is allowed tells that there were too many.
                "scope" => {
                    let room = (SCOPES_MAX + 1).saturating_sub(wanted.scopes.len());
                    wanted.scopes.extend(
                        value.split(' ').filter(|scope| !scope.is_empty()).take(room).map(str::to_owned),
                    );
                }
                "grant_type" => wanted.grant_type = Some(value.into_owned()),
                "username" => wanted.user = Some(value.into_owned()),
                "password" => wanted.password = Some(value.into_owned()),
                _ => {}
            }
        }
        wanted
    }
}

fn issue(guard: &Guard, who: &Identity, wanted: &Wanted) -> Answer {
    let issued = guard.issue(who, wanted.scopes.iter().map(String::as_str))?;
    let at = i64::try_from(issued.at).ok().and_then(|at| DateTime::from_timestamp(at, 0)).unwrap_or_default();
    let body = json!({
        "token": issued.token,
        "access_token": issued.token,
        "token_type": "Bearer",
        "expires_in": issued.life_seconds,
        "issued_at": at.to_rfc3339_opts(SecondsFormat::Secs, true),
        "scope": wanted.scopes.join(" "),
    });
    let mut response = json(body.to_string());
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}
