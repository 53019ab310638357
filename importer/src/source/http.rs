//! An image published over HTTP: read once from front to back, and continued where a connection broke.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use dvcr_image::is_certificate_refused;
use percent_encoding::percent_decode_str;
use reqwest::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, IF_RANGE, LAST_MODIFIED,
    RANGE, RETRY_AFTER,
};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, StatusCode, Url};

use super::Place;
use crate::{Error, ErrorKind, Result};

/// Redirects followed for one request.
const REDIRECTS_MAX: usize = 10;
/// Attempts in a row that bring no byte before the transfer is given up.
const ATTEMPTS_MAX: u32 = 6;
/// Wait before the second attempt; it doubles from one to the next.
const BACKOFF_FIRST_MS: u64 = 250;
/// Longest wait between attempts, also where the server asks for more by Retry-After.
const BACKOFF_MAX_MS: u64 = 15_000;
const CONNECT_TIMEOUT_MS: u64 = 15_000;
/// Longest silence in the middle of a body.
const READ_IDLE_TIMEOUT_MS: u64 = 60_000;

/// A source opened for reading from its first byte.
pub struct HttpSource {
    client: Client,
    url: Url,
    credentials: Option<(String, Option<String>)>,
    /// Length in bytes, if the server told it.
    pub len: Option<u64>,
    /// Last path segment of the URL, percent-decoded; not yet fit for a file name.
    pub name: Option<String>,
    /// The body claims to be a web page.
    pub is_html: bool,
    /// Names this version of the resource; without one a broken transfer cannot be continued safely.
    validator: Option<String>,
    ranges: bool,
    position: u64,
    body: Option<Response>,
    attempts: u32,
}

impl HttpSource {
    /// Requests `url` (http or https; `user:password@` becomes Basic authentication towards that host alone), from its
    /// first byte or from a place in a version of it that was open before.
    ///
    /// `insecure` accepts any TLS certificate, and redirects from https to http. Fails with [`ErrorKind::Source`] when
    /// the server cannot be reached, redirects without end, or answers anything but 200, and with
    /// [`ErrorKind::Changed`] when what is there now is another version, or cannot be read from that place.
    pub async fn open(url: &str, insecure: bool, at: Option<&Place>) -> Result<Self> {
        let mut url = Url::parse(url)
            .map_err(|error| Error::with(ErrorKind::Invalid, "the source is not a URL", error))?;
        if !matches!(url.scheme(), "http" | "https") {
            let context = format!("the source's scheme is '{}', it must be http or https", url.scheme());
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let credentials = take_credentials(&mut url);
        let client = Client::builder()
            .redirect(Policy::custom(move |attempt| {
                match refusal(attempt.previous(), attempt.url(), insecure) {
                    Some(refusal) => attempt.error(refusal),
                    None => attempt.follow(),
                }
            }))
            // The query, a token perhaps, is not the next server's to know.
            .referer(false)
            .connect_timeout(Duration::from_millis(CONNECT_TIMEOUT_MS))
            .read_timeout(Duration::from_millis(READ_IDLE_TIMEOUT_MS))
            .danger_accept_invalid_certs(insecure)
            .user_agent(concat!("dvcr/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| Error::with(ErrorKind::Source, "preparing the HTTP client", error))?;
        let name = url.path_segments().and_then(|mut segments| segments.next_back()).map(decoded);
        let mut source = Self {
            client,
            url,
            credentials,
            len: None,
            name: name.filter(|name| !name.is_empty()),
            is_html: false,
            validator: None,
            ranges: false,
            position: 0,
            body: None,
            attempts: 0,
        };
        if let Some(at) = at.filter(|at| at.position > 0) {
            let version = at.validator.split_once(' ').and_then(|(len, tag)| Some((len.parse().ok()?, tag)));
            let Some((len, tag)) = version.filter(|(len, _)| at.position <= *len) else {
                return Err(source.changed());
            };
            // A range behind the last byte is none: its own byte is asked for, and passed over.
            (source.len, source.validator) = (Some(len), Some(tag.to_owned()));
            source.position = at.position.min(len.saturating_sub(1));
        }
        let response = loop {
            match source.request().await {
                Ok(response) => break response,
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(error, wait)) => source.back_off(error, wait).await?,
            }
        };
        let headers = response.headers();
        source.ranges = text(headers, ACCEPT_RANGES).is_some_and(|units| units.eq_ignore_ascii_case("bytes"));
        if source.position > 0 {
            source.ranges = true;
            source.body = Some(response);
            let passed = at.is_some_and(|at| at.position > source.position);
            if passed {
                source.chunk().await?;
            }
            return Ok(source);
        }
        source.len = text(headers, CONTENT_LENGTH).and_then(|len| len.parse().ok());
        source.is_html = text(headers, CONTENT_TYPE).is_some_and(|kind| kind.starts_with("text/html"));
        source.validator = validator(headers);
        source.body = Some(response);
        if at.is_some_and(|at| Some(&at.validator) != source.version().as_ref()) {
            return Err(source.changed());
        }
        Ok(source)
    }

    /// Names this version of the resource, if it can be read on from the middle.
    pub fn version(&self) -> Option<String> {
        let (len, tag) = (self.len?, self.validator.as_ref()?);
        self.ranges.then(|| format!("{len} {tag}"))
    }

    /// Tells this version of the resource from others, whether it can be read on from the middle or not.
    pub fn fingerprint(&self) -> Option<String> {
        let tag = self.validator.as_ref()?;
        Some(self.len.map_or_else(|| tag.clone(), |len| format!("{len} {tag}")))
    }

    /// The URL without credentials and query, fit for messages.
    pub fn display_url(&self) -> String {
        shown(&self.url)
    }

    /// The next bytes in order; `None` at the end.
    ///
    /// A body that breaks is continued behind the last byte given out, as long as the server serves ranges and the
    /// resource is provably the same; a body shorter or longer than announced is an error, never an end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>> {
        loop {
            let Some(body) = &mut self.body else {
                match self.request().await {
                    Ok(response) => self.body = Some(response),
                    Err(Failure::Final(error)) => return Err(error),
                    Err(Failure::Passing(error, wait)) => self.back_off(error, wait).await?,
                }
                continue;
            };
            let broken = match body.chunk().await {
                Ok(Some(bytes)) if bytes.is_empty() => continue,
                Ok(Some(bytes)) => {
                    self.attempts = 0;
                    self.position = self.position.saturating_add(bytes.len() as u64);
                    return match self.len {
                        Some(len) if self.position > len => Err(self.wrong_length(len)),
                        _ => Ok(Some(bytes)),
                    };
                }
                Ok(None) => match self.len {
                    Some(len) if self.position < len => self.wrong_length(len),
                    _ => return Ok(None),
                },
                Err(error) => {
                    let context = format!("{} broke off after {} bytes", self.display_url(), self.position);
                    Error::with(ErrorKind::Source, context, error.without_url())
                }
            };
            self.body = None;
            if !self.ranges || self.validator.is_none() || self.len.is_none() {
                return Err(broken);
            }
            self.back_off(broken, None).await?;
        }
    }

    /// Requests the resource from [`Self::position`] on.
    async fn request(&self) -> Result<Response, Failure> {
        let mut request = self.client.get(self.url.clone());
        if let Some((user, password)) = &self.credentials {
            request = request.basic_auth(user, password.as_ref());
        }
        if self.position > 0 {
            request = request.header(RANGE, format!("bytes={}-", self.position));
            if let Some(validator) = &self.validator {
                request = request.header(IF_RANGE, validator);
            }
        }
        let response = request.send().await.map_err(|error| {
            let untrusted = is_certificate_refused(&error);
            let passing = !(error.is_redirect() || error.is_builder() || untrusted);
            let url = self.display_url();
            let context = match (error.is_redirect(), untrusted) {
                (true, _) => match refusal_of(&error) {
                    Some(refusal) => format!("{url} {refusal}"),
                    None => format!("{url} redirects to what is no address"),
                },
                (_, true) => {
                    format!("the certificate of {url} is not accepted; --insecure-source accepts any")
                }
                _ => format!("cannot reach {url}"),
            };
            let error = Error::with(ErrorKind::Source, context, error.without_url());
            if passing { Failure::Passing(error, None) } else { Failure::Final(error) }
        })?;
        let status = response.status();
        let refused = || {
            let advice = match status {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ": it wants credentials, or other ones",
                StatusCode::NOT_FOUND | StatusCode::GONE => ": there is no such file",
                _ => "",
            };
            Error::new(ErrorKind::Source, format!("{} answers {status}{advice}", self.display_url()))
        };
        match status {
            StatusCode::OK if self.position == 0 => Ok(response),
            StatusCode::PARTIAL_CONTENT if self.position > 0 => {
                // Not every server minds If-Range: what goes on must be what was begun.
                if validator(response.headers()) != self.validator {
                    return Err(Failure::Final(self.changed()));
                }
                match self.continues(response.headers()) {
                    true => Ok(response),
                    false => Err(Failure::Final(Error::new(
                        ErrorKind::Source,
                        format!("{} answers another range than was asked for", self.display_url()),
                    ))),
                }
            }
            StatusCode::OK => Err(Failure::Final(self.changed())),
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => {
                let wait = text(response.headers(), RETRY_AFTER).and_then(|seconds| seconds.parse().ok());
                Err(Failure::Passing(refused(), wait.map(Duration::from_secs)))
            }
            _ => Err(Failure::Final(refused())),
        }
    }

    /// Whether a 206 begins at the position, and is of a resource of the same length (RFC 9110, 14.4).
    fn continues(&self, headers: &HeaderMap) -> bool {
        let range = text(headers, CONTENT_RANGE).unwrap_or_default();
        let Some((bounds, total)) = range.strip_prefix("bytes ").and_then(|range| range.split_once('/'))
        else {
            return false;
        };
        let first = bounds.split_once('-').and_then(|(first, _)| first.parse().ok());
        first == Some(self.position) && (total == "*" || total.parse().ok() == self.len)
    }

    fn changed(&self) -> Error {
        Error::new(
            ErrorKind::Changed,
            format!(
                "{} changed, or lost its ranges, after {} bytes were read; start again",
                self.display_url(),
                self.position
            ),
        )
    }

    /// Waits before the next attempt, or gives up with `error`.
    async fn back_off(&mut self, error: Error, wanted: Option<Duration>) -> Result<()> {
        self.attempts += 1;
        if self.attempts >= ATTEMPTS_MAX {
            return Err(error);
        }
        let longest = Duration::from_millis(BACKOFF_MAX_MS);
        let doubled = Duration::from_millis(BACKOFF_FIRST_MS << (self.attempts - 1));
        let wait = wanted.unwrap_or(doubled).min(longest);
        tracing::warn!(attempt = self.attempts, wait_ms = wait.as_millis() as u64, %error, "source: trying again");
        tokio::time::sleep(wait).await;
        Ok(())
    }

    fn wrong_length(&self, announced: u64) -> Error {
        let context = format!(
            "{} sent {} bytes, its Content-Length announced {announced}",
            self.display_url(),
            self.position
        );
        Error::new(ErrorKind::Source, context)
    }
}

/// Why a request brought no body.
enum Failure {
    Final(Error),
    /// Worth another attempt, after this wait if the server named one.
    Passing(Error, Option<Duration>),
}

/// Why a redirect is not followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    TooMany,
    Downgrade,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany => write!(f, "redirects more than {REDIRECTS_MAX} times"),
            Self::Downgrade => f.write_str("redirects from https to http; --insecure-source allows that"),
        }
    }
}

impl std::error::Error for Refusal {}

/// Judges a redirect; `previous` begins with the address that was asked for.
fn refusal(previous: &[Url], next: &Url, insecure: bool) -> Option<Refusal> {
    let was_secure = previous.last().is_some_and(|url| url.scheme() == "https");
    if previous.len() > REDIRECTS_MAX {
        Some(Refusal::TooMany)
    } else if was_secure && next.scheme() != "https" && !insecure {
        Some(Refusal::Downgrade)
    } else {
        None
    }
}

/// The refusal behind an error of the HTTP client.
fn refusal_of(error: &(dyn std::error::Error + 'static)) -> Option<Refusal> {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.find_map(|cause| cause.downcast_ref().copied())
}

fn take_credentials(url: &mut Url) -> Option<(String, Option<String>)> {
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    let credentials = (decoded(url.username()), url.password().map(decoded));
    // Fails only for URLs without a host, which http and https do not have.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    Some(credentials)
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

/// A strong entity tag, else the time of the last change (RFC 9110, 13.1.5).
fn validator(headers: &HeaderMap) -> Option<String> {
    let strong = text(headers, ETAG).filter(|tag| !tag.starts_with("W/"));
    strong.or_else(|| text(headers, LAST_MODIFIED)).map(str::to_owned)
}

fn text(headers: &HeaderMap, name: reqwest::header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Query and fragment may hold a signature or a token.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    url.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[test]
    fn a_redirect_from_https_to_http_needs_a_permission() {
        let (plain, secure) = (url("http://h/a"), url("https://h/a"));
        let from = |from: &Url, to: &Url, insecure| refusal(std::slice::from_ref(from), to, insecure);
        assert_eq!(from(&secure, &plain, false), Some(Refusal::Downgrade));
        assert_eq!(from(&secure, &plain, true), None);
        for (one, other) in [(&plain, &secure), (&plain, &plain), (&secure, &secure)] {
            assert_eq!(from(one, other, false), None);
        }
    }

    #[test]
    fn ten_redirects_are_followed_and_no_more() {
        let plain = url("http://h/a");
        assert_eq!(refusal(&vec![plain.clone(); REDIRECTS_MAX], &plain, false), None);
        assert_eq!(refusal(&vec![plain.clone(); REDIRECTS_MAX + 1], &plain, true), Some(Refusal::TooMany));
    }
}
