//! One request for a part of an HTTP source: who is asked, where redirects may lead, and what counts as an answer.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use dvcr_image::{Clients, Credentials, Forbidden, Network, is_certificate_refused, is_identity_refused};
use percent_encoding::percent_decode_str;
use reqwest::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, IF_RANGE, LAST_MODIFIED,
    LOCATION, RANGE, RETRY_AFTER,
};
use reqwest::{Client, ClientBuilder, Response, StatusCode, Url};

use crate::source::SourceOptions;
use crate::source::policy::HttpGate;
use crate::{Error, ErrorKind, Result};

/// Redirects followed for one request.
const REDIRECTS_MAX: usize = 10;
const CONNECT_TIMEOUT_MS: u64 = 15_000;
/// Longest silence in the middle of a body, and before an answer.
const READ_IDLE_TIMEOUT_MS: u64 = 60_000;
/// Longest wait that a server may ask for by Retry-After; one that wants more is not asked again.
pub(super) const RETRY_AFTER_MS_MAX: u64 = 300_000;

/// What tells one version of the resource from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Version {
    /// Bytes of the whole resource.
    pub(super) len: u64,
    /// A strong entity tag, else the time of the last change (RFC 9110, 13.1.5).
    pub(super) tag: String,
}

/// A part of one version: from a byte to before another, or to the end.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) from: u64,
    pub(super) to: Option<u64>,
    pub(super) version: Version,
}

/// An answer that is what was asked for.
pub(super) struct Answer {
    pub(super) response: Response,
    /// Where its body ends in the resource, if it told.
    pub(super) end: Option<u64>,
}

/// Why a request brought no body.
#[derive(Debug)]
pub(super) enum Failure {
    Final(Error),
    /// The whole resource came where a part was asked for: it changed, or is not served in parts.
    NoPart(Error),
    /// Worth another attempt, after this wait if the server named one.
    Passing(Error, Option<Duration>),
}

impl Failure {
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Final(error) | Self::NoPart(error) | Self::Passing(error, _) => error,
        }
    }
}

/// Where a request goes. Away from home there are no credentials, and no way back to them.
#[derive(Clone)]
struct Stop {
    url: Url,
    at_home: bool,
}

/// Asks for an HTTP source, or for parts of it.
pub(super) struct Requester {
    url: Url,
    insecure: bool,
    headers: HeaderMap,
    /// With the client certificate, and without.
    home: Clients,
    abroad: Clients,
    /// Where redirects led: further parts are asked for there, as long as it answers.
    found: Mutex<Option<Stop>>,
}

impl Requester {
    /// Prepares requests for `url`; `user:password@` in it becomes Basic authentication.
    pub(super) fn new(url: &str, options: &SourceOptions) -> Result<Self> {
        let mut url =
            Url::parse(url).map_err(|e| Error::with(ErrorKind::Invalid, "the source is not a URL", e))?;
        if !matches!(url.scheme(), "http" | "https") {
            let context = format!("the source's scheme is '{}', it must be http or https", url.scheme());
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let mut http = options.http.clone();
        if let Some(credentials) = take_credentials(&mut url) {
            http.set_basic(&format!("{}:{}", credentials.username, credentials.password))?;
        }
        let mut network = options.network();
        network.gate = options.policy.clone().map(|policy| Arc::new(HttpGate(policy)) as _);
        let clients = |network: &Network, base: &dyn Fn() -> ClientBuilder| {
            let clients = Clients::new(network, base);
            clients.map_err(|e| Error::with(ErrorKind::Invalid, "preparing the HTTP client", e))
        };
        let base = || base(options.insecure);
        let abroad = clients(&network, &base)?;
        let home = match http.identity() {
            Some(identity) => clients(&network, &|| base().identity(identity.clone()))?,
            None => abroad.clone(),
        };
        let headers = http.headers().clone();
        Ok(Self { url, insecure: options.insecure, headers, home, abroad, found: Mutex::new(None) })
    }

    /// The URL without credentials and query, fit for messages.
    pub(super) fn shown(&self) -> String {
        shown(&self.url)
    }

    /// Last path segment of the URL, percent-decoded.
    pub(super) fn name(&self) -> Option<String> {
        let segment = self.url.path_segments().and_then(|mut segments| segments.next_back());
        segment.map(decoded).filter(|name| !name.is_empty())
    }

    /// Asks for the whole resource, or for a part of a version of it.
    pub(super) async fn get(&self, part: Option<&Part>) -> Result<Answer, Failure> {
        let home = Stop { url: self.url.clone(), at_home: true };
        let found = self.found().clone();
        let Some(stop) = found else { return self.follow(home, part).await };
        let outcome = self.follow(stop, part).await;
        match outcome {
            Ok(answer) => Ok(answer),
            // What was found by redirects may move or end; what it was found by is asked again.
            Err(failure) => {
                *self.found() = None;
                match failure {
                    Failure::Passing(..) => Err(failure),
                    Failure::Final(_) | Failure::NoPart(_) => self.follow(home, part).await,
                }
            }
        }
    }

    async fn follow(&self, mut stop: Stop, part: Option<&Part>) -> Result<Answer, Failure> {
        for redirects in 0..=REDIRECTS_MAX {
            let response = self.send(&stop, part).await?;
            let Some(location) = redirect(&response) else {
                let answer = self.judge(response, part, &stop)?;
                if redirects > 0 {
                    *self.found() = Some(stop);
                }
                return Ok(answer);
            };
            stop = self.next(&stop, location).map_err(Failure::Final)?;
        }
        let text = format!("{} redirects more than {REDIRECTS_MAX} times", self.shown());
        Err(Failure::Final(Error::new(ErrorKind::Source, text)))
    }

    /// Judges a redirect; the policy judges where it leads when it is followed.
    fn next(&self, from: &Stop, location: &str) -> Result<Stop> {
        let refused = |why: &str| Error::new(ErrorKind::Source, format!("{} {why}", self.shown()));
        let mut url = from.url.join(location).map_err(|_| refused("redirects to what is no address"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(refused(&format!(
                "redirects to the scheme '{}', it must be http or https",
                url.scheme()
            )));
        }
        if from.url.scheme() == "https" && url.scheme() == "http" && !self.insecure {
            return Err(refused("redirects from https to http; --insecure-source allows that"));
        }
        // Nobody's credentials but those that the user gave.
        let _ = take_credentials(&mut url);
        let at_home = from.at_home && url.origin() == self.url.origin();
        Ok(Stop { url, at_home })
    }

    async fn send(&self, stop: &Stop, part: Option<&Part>) -> Result<Response, Failure> {
        let clients = if stop.at_home { &self.home } else { &self.abroad };
        let client = clients.for_url(&stop.url).map_err(|why| self.forbidden(&why, stop))?;
        let mut request = client.get(stop.url.clone());
        if stop.at_home {
            request = request.headers(self.headers.clone());
        }
        if let Some(Part { from, to, version }) = part {
            let last = to.map_or_else(String::new, |to| to.saturating_sub(1).to_string());
            request = request.header(RANGE, format!("bytes={from}-{last}")).header(IF_RANGE, &version.tag);
        }
        request.send().await.map_err(|error| {
            if let Some(why) = Forbidden::behind(&error) {
                return self.forbidden(why, stop);
            }
            let shown = self.shown();
            let origin = stop.url.origin().ascii_serialization();
            let (untrusted, unknown) = (is_certificate_refused(&error), is_identity_refused(&error));
            let context = if untrusted {
                format!(
                    "the certificate of {origin} is not accepted; --source-ca names whom to trust, --insecure-source accepts any"
                )
            } else if unknown {
                format!("{origin} wants a certificate of its client that it trusts; --source-cert and --source-key name one")
            } else if stop.url == self.url {
                format!("cannot reach {shown}")
            } else {
                format!("cannot reach {origin}, where {shown} leads")
            };
            let passing = !(error.is_builder() || untrusted || unknown);
            let error = Error::with(ErrorKind::Source, context, error.without_url());
            if passing { Failure::Passing(error, None) } else { Failure::Final(error) }
        })
    }

    /// Takes an answer for what was asked, or tells what is wrong with it.
    fn judge(&self, response: Response, part: Option<&Part>, stop: &Stop) -> Result<Answer, Failure> {
        let status = response.status();
        let answers = |advice: &str| {
            Error::new(ErrorKind::Source, format!("{} answers {status}{advice}", self.shown()))
        };
        match (status, part) {
            (StatusCode::OK, None) => {
                let end = length(response.headers());
                Ok(Answer { response, end })
            }
            (StatusCode::PARTIAL_CONTENT, Some(part)) => {
                let end = self.continues(response.headers(), part)?;
                Ok(Answer { response, end: Some(end) })
            }
            // A part behind the end of what is there now; or all of it, in place of the part.
            (StatusCode::OK | StatusCode::RANGE_NOT_SATISFIABLE, Some(part)) => {
                Err(Failure::NoPart(self.changed(part.from)))
            }
            (
                StatusCode::REQUEST_TIMEOUT
                | StatusCode::TOO_MANY_REQUESTS
                | StatusCode::BAD_GATEWAY
                | StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::GATEWAY_TIMEOUT,
                _,
            ) => {
                let wait = text(response.headers(), RETRY_AFTER)
                    .and_then(|value| retry_after(value, SystemTime::now()));
                let advice = match wait {
                    Some(wait) if wait > Duration::from_millis(RETRY_AFTER_MS_MAX) => format!(
                        " and wants to be left alone for {} s (Retry-After), longer than {} s; try again then",
                        wait.as_secs(),
                        RETRY_AFTER_MS_MAX / 1000
                    ),
                    _ => String::new(),
                };
                Err(Failure::Passing(answers(&advice), wait))
            }
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => {
                let credentials = self.headers.contains_key(AUTHORIZATION);
                Err(Failure::Final(answers(match (stop.at_home, credentials) {
                    (false, true) => {
                        ": it redirects to another host, which gets no credentials; name the file where it is"
                    }
                    _ => ": it wants credentials, or other ones",
                })))
            }
            (StatusCode::NOT_FOUND | StatusCode::GONE, _) => {
                Err(Failure::Final(answers(": there is no such file")))
            }
            _ => Err(Failure::Final(answers(""))),
        }
    }

    /// Checks that a 206 is of the part that was asked for, or of its beginning, and of the same version; returns where
    /// it ends (RFC 9110, 14.4 and 15.3.7).
    fn continues(&self, headers: &HeaderMap, part: &Part) -> Result<u64, Failure> {
        let Part { from, to, version } = part;
        // Not every server minds If-Range: what goes on must be what was begun. The time of the last change may be left
        // out where If-Range has it; an entity tag may not.
        let same = match validator(headers) {
            Some(tag) => tag == version.tag,
            None => !version.tag.starts_with('"'),
        };
        let range = text(headers, CONTENT_RANGE).and_then(content_range);
        let total = range.and_then(|(_, _, total)| total);
        if !same || total.is_some_and(|total| total != version.len) {
            return Err(Failure::Final(self.changed(*from)));
        }
        let limit = to.unwrap_or(version.len);
        match range {
            Some((first, last, _)) if first == *from && last >= first && last < limit => {
                let announced = length(headers);
                match announced.is_none_or(|bytes| bytes == last - first + 1) {
                    true => Ok(last + 1),
                    false => Err(Failure::Final(self.other_range(part))),
                }
            }
            _ => Err(Failure::Final(self.other_range(part))),
        }
    }

    fn other_range(&self, part: &Part) -> Error {
        let text =
            format!("{} answers another range than was asked for, from byte {}", self.shown(), part.from);
        Error::new(ErrorKind::Source, text)
    }

    pub(super) fn changed(&self, position: u64) -> Error {
        let text = format!(
            "{} changed, or lost its ranges, after {position} bytes were read; start again",
            self.shown()
        );
        Error::new(ErrorKind::Changed, text)
    }

    fn forbidden(&self, why: &Forbidden, stop: &Stop) -> Failure {
        let mut text = format!("source {}: ", self.shown());
        if stop.url != self.url {
            text += &format!("it leads to {}: ", shown(&stop.url));
        }
        Failure::Final(Error::new(ErrorKind::Policy, format!("{text}{why}")))
    }

    fn found(&self) -> std::sync::MutexGuard<'_, Option<Stop>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection per request at a time: the connections are what is counted, and what servers limit.
fn base(insecure: bool) -> ClientBuilder {
    Client::builder()
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(Duration::from_millis(CONNECT_TIMEOUT_MS))
        .read_timeout(Duration::from_millis(READ_IDLE_TIMEOUT_MS))
        .tcp_nodelay(true)
        .danger_accept_invalid_certs(insecure)
        .user_agent(concat!("dvcr/", env!("CARGO_PKG_VERSION")))
}

/// Where an answer sends to, if it is a redirect.
fn redirect(response: &Response) -> Option<&str> {
    let redirects = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
    text(response.headers(), LOCATION).filter(|_| redirects)
}

fn take_credentials(url: &mut Url) -> Option<Credentials> {
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    let (username, password) = (decoded(url.username()), url.password().map(decoded).unwrap_or_default());
    // Fails only for URLs without a host, which http and https do not have.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    Some(Credentials { username, password })
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

/// The version that an answer with the whole resource is of, if it can be told from others.
pub(super) fn version(headers: &HeaderMap) -> Option<Version> {
    Some(Version { len: length(headers)?, tag: validator(headers)? })
}

fn validator(headers: &HeaderMap) -> Option<String> {
    let strong = text(headers, ETAG).filter(|tag| !tag.starts_with("W/"));
    strong.or_else(|| text(headers, LAST_MODIFIED)).map(str::to_owned)
}

fn length(headers: &HeaderMap) -> Option<u64> {
    text(headers, CONTENT_LENGTH)?.parse().ok()
}

pub(super) fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// First and last byte and the total of `bytes 0-9/10`; a total may be unknown.
fn content_range(value: &str) -> Option<(u64, u64, Option<u64>)> {
    let (bounds, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = bounds.split_once('-')?;
    let total = match total {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    Some((first.trim().parse().ok()?, last.trim().parse().ok()?, total))
}

/// Seconds, or a date (RFC 9110, 10.2.3); one that is over is no wait.
fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    match value.trim().parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => {
            let date = httpdate::parse_http_date(value.trim()).ok()?;
            Some(date.duration_since(now).unwrap_or_default())
        }
    }
}

/// Query and fragment may hold a signature or a token.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    let _ = take_credentials(&mut url);
    url.set_query(None);
    url.set_fragment(None);
    url.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requester(url: &str, insecure: bool) -> Requester {
        Requester::new(url, &SourceOptions { insecure, ..SourceOptions::default() }).unwrap()
    }

    fn home(requester: &Requester) -> Stop {
        Stop { url: requester.url.clone(), at_home: true }
    }

    #[test]
    fn a_redirect_from_https_to_http_needs_a_permission() {
        let secure = requester("https://h/a", false);
        assert!(secure.next(&home(&secure), "http://h/a").is_err());
        assert!(secure.next(&home(&secure), "https://i/a").is_ok());
        let insecure = requester("https://h/a", true);
        assert!(insecure.next(&home(&insecure), "http://h/a").is_ok());
        let plain = requester("http://h/a", false);
        for good in ["https://h/a", "http://h/b", "/c", "d"] {
            assert!(plain.next(&home(&plain), good).is_ok(), "{good}");
        }
        for bad in ["ftp://h/a", "file:///etc/passwd", "http://", "https://[::"] {
            assert_eq!(plain.next(&home(&plain), bad).err().unwrap().kind(), ErrorKind::Source, "{bad}");
        }
    }

    #[test]
    fn who_left_the_first_origin_is_not_at_home_any_more() {
        let requester = requester("https://h/a", false);
        let here = requester.next(&home(&requester), "/b").unwrap();
        assert!(here.at_home);
        assert!(requester.next(&here, "https://h:443/c").unwrap().at_home);
        for abroad in ["https://h:444/", "https://i/", "https://user@i/", "https://h.i/"] {
            let away = requester.next(&here, abroad).unwrap();
            assert!(!away.at_home && away.url.username().is_empty(), "{abroad}");
            assert!(!requester.next(&away, "https://h/a").unwrap().at_home);
        }
    }

    #[test]
    fn what_a_server_asks_to_wait_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (value, seconds) in [
            ("7", Some(7)),
            (" 0 ", Some(0)),
            ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
            ("Sunday, 06-Nov-94 08:50:37 GMT", Some(60)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
        ] {
            assert_eq!(retry_after(value, now), seconds.map(Duration::from_secs), "{value}");
        }
    }

    #[test]
    fn a_content_range_is_read_whole_or_not_at_all() {
        assert_eq!(content_range("bytes 0-9/10"), Some((0, 9, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, 9, None)));
        for bad in ["bytes */10", "bytes 0-9", "0-9/10", "bytes 0-/10", "bytes a-b/c", "bytes 0-9/x", ""] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }
}
