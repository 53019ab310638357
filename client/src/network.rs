//! How connections are made: whom to trust, by way of which proxy, and where to at all.

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::Uri;
use hyper_util::client::proxy::matcher::Matcher;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{Certificate, Client, ClientBuilder, NoProxy, Proxy};
use url::Url;

use crate::{Error, ErrorKind, Result};

/// Decides where a client may go. Every URL is asked about, those of redirects and token services too, and every
/// address before it is connected to.
pub trait Gate: Send + Sync + fmt::Debug {
    /// Whether a request may be sent to `url`. A host that is an address is resolved by nobody: it is judged here.
    fn admit_url(&self, url: &Url) -> Result<(), Forbidden>;

    /// Whether `address`, which `host` has resolved to, may be connected to.
    fn admit_address(&self, host: &str, address: IpAddr) -> Result<(), Forbidden>;
}

/// Why a [`Gate`] lets nothing pass: the rule and the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forbidden(pub String);

impl fmt::Display for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Forbidden {}

impl Forbidden {
    /// The refusal behind an error of the HTTP client, if that is what it failed by.
    pub fn behind<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Self> {
        std::iter::successors(Some(error), |error| error.source()).find_map(|cause| cause.downcast_ref())
    }
}

/// What lies between a client and the others.
#[derive(Clone, Debug, Default)]
pub struct Network {
    /// Certificates (PEM) that are trusted besides those of the system.
    pub roots: Vec<u8>,
    /// Proxies; by default those that the environment names.
    pub proxies: Option<Proxies>,
    /// Who decides where connections may go; everywhere by default.
    pub gate: Option<Arc<dyn Gate>>,
}

/// The proxies for http and https, and the hosts that are reached without. `Debug` shows none: they have passwords.
#[derive(Clone)]
pub struct Proxies {
    http: Option<Url>,
    https: Option<Url>,
    except: String,
    matcher: Arc<Matcher>,
}

impl Proxies {
    /// No proxy for anything.
    pub fn none() -> Self {
        Self { http: None, https: None, except: String::new(), matcher: Arc::new(Matcher::builder().build()) }
    }

    /// The proxies of `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy`, or the same in capitals, as curl reads
    /// them; `env` looks up a variable.
    ///
    /// # Errors
    /// When a variable names no http or https proxy: going without it would be a surprise.
    pub fn from_env(env: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let text = |name: &str| {
            let value = env(name).or_else(|| env(&name.to_uppercase()));
            value.and_then(|value| value.into_string().ok()).unwrap_or_default()
        };
        let proxy = |name: &str| {
            let (mut name, mut value) = (name, text(name));
            if value.is_empty() {
                (name, value) = ("all_proxy", text("all_proxy"));
            }
            if value.is_empty() {
                return Ok(None);
            }
            let whole = if value.contains("://") { value } else { format!("http://{value}") };
            match Url::parse(&whole) {
                Ok(url) if matches!(url.scheme(), "http" | "https") => Ok(Some(url)),
                _ => {
                    let text = format!("the variable {name} names no proxy; write http://host:port");
                    Err(Error::new(ErrorKind::Invalid, text))
                }
            }
        };
        let (http, https, except) = (proxy("http_proxy")?, proxy("https_proxy")?, text("no_proxy"));
        let shown = |url: &Option<Url>| url.as_ref().map_or_else(String::new, |url| url.as_str().to_owned());
        let matcher = Matcher::builder().http(shown(&http)).https(shown(&https)).no(except.as_str()).build();
        Ok(Self { http, https, except, matcher: Arc::new(matcher) })
    }

    /// Whether requests to `url` go by way of a proxy.
    fn take(&self, url: &Url) -> bool {
        url.as_str().parse::<Uri>().is_ok_and(|uri| self.matcher.intercept(&uri).is_some())
    }

    fn is_none(&self) -> bool {
        self.http.is_none() && self.https.is_none()
    }

    fn apply(&self, mut builder: ClientBuilder) -> Result<ClientBuilder> {
        let except = NoProxy::from_string(&self.except);
        let proxies = [self.http.clone().map(Proxy::http), self.https.clone().map(Proxy::https)];
        for proxy in proxies.into_iter().flatten() {
            let proxy = proxy
                .map_err(|e| Error::with(ErrorKind::Invalid, "a proxy cannot be used", e.without_url()))?;
            builder = builder.proxy(proxy.no_proxy(except.clone()));
        }
        Ok(builder)
    }
}

impl fmt::Debug for Proxies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proxies(..)")
    }
}

/// The connections made under one [`Network`]; cheap to clone.
///
/// Two pools: what goes by way of a proxy asks for the proxy's own address alone, and a gate has no say about that;
/// everything else resolves names through the gate.
#[derive(Clone)]
pub struct Clients {
    direct: Client,
    proxied: Option<(Proxies, Client)>,
    gate: Option<Arc<dyn Gate>>,
}

impl Clients {
    /// Makes both pools out of what `base` begins.
    ///
    /// # Errors
    /// When the roots are no certificates, or a proxy is no proxy.
    pub fn new(network: &Network, base: impl Fn() -> ClientBuilder) -> Result<Self> {
        let roots = Certificate::from_pem_bundle(&network.roots)
            .map_err(|e| Error::with(ErrorKind::Invalid, "the certificates to trust are no PEM", e))?;
        let build = |builder: ClientBuilder| {
            let built = builder.tls_certs_merge(roots.clone()).build();
            built.map_err(|e| Error::with(ErrorKind::Unavailable, "setting up the HTTP client", e))
        };
        let mut direct = base().no_proxy();
        if let Some(gate) = &network.gate {
            direct = direct.dns_resolver(GatedResolver(Arc::clone(gate)));
        }
        let proxies = match &network.proxies {
            Some(proxies) => proxies.clone(),
            None => Proxies::from_env(|name| std::env::var_os(name))?,
        };
        let proxied = match proxies.is_none() {
            true => None,
            false => Some(build(proxies.apply(base().no_proxy())?)?).map(|client| (proxies, client)),
        };
        Ok(Self { direct: build(direct)?, proxied, gate: network.gate.clone() })
    }

    /// The pool for requests to `url`, if they may be sent at all.
    pub fn for_url(&self, url: &Url) -> Result<&Client, Forbidden> {
        if let Some(gate) = &self.gate {
            gate.admit_url(url)?;
        }
        Ok(match &self.proxied {
            Some((proxies, client)) if proxies.take(url) => client,
            _ => &self.direct,
        })
    }
}

/// Resolves names as the system does, and leaves out what the gate does not admit.
struct GatedResolver(Arc<dyn Gate>);

impl Resolve for GatedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let gate = Arc::clone(&self.0);
        Box::pin(async move {
            let host = name.as_str();
            let (mut admitted, mut forbidden) = (Vec::<SocketAddr>::new(), None);
            for address in tokio::net::lookup_host((host, 0)).await? {
                match gate.admit_address(host, address.ip()) {
                    Ok(()) => admitted.push(address),
                    Err(why) => forbidden = Some(why),
                }
            }
            match forbidden {
                Some(why) if admitted.is_empty() => Err(why.into()),
                _ => Ok(Box::new(admitted.into_iter()) as Addrs),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(env: &[(&str, &str)]) -> Result<Proxies> {
        Proxies::from_env(|name| {
            env.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        })
    }

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[test]
    fn proxies_are_those_of_the_variables() {
        let none = proxies(&[]).unwrap();
        assert!(none.is_none() && !none.take(&url("http://h/")));
        let one =
            proxies(&[("http_proxy", "proxy.example:3128"), ("NO_PROXY", "in.example, 10.0.0.0/8")]).unwrap();
        assert!(one.take(&url("http://h.example/a")));
        for without in
            ["https://h.example/", "http://in.example/", "http://a.in.example/", "http://10.1.2.3/"]
        {
            assert!(!one.take(&url(without)), "{without}");
        }
        let all =
            proxies(&[("ALL_PROXY", "https://user:secret@p.example"), ("http_proxy", "http://q")]).unwrap();
        assert!(all.take(&url("https://h.example/")));
        assert_eq!(all.http.as_ref().unwrap().host_str(), Some("q"));
        assert!(!format!("{all:?}").contains("secret"));
    }

    #[test]
    fn a_variable_that_names_no_proxy_is_an_error_without_its_password() {
        for bad in ["socks5://user:secret@h", "http://", "user:secret@", "ftp://user:secret@h"] {
            let error = proxies(&[("https_proxy", bad)]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}");
            assert!(error.to_string().contains("https_proxy"), "{error}");
            assert!(!format!("{error:?}").contains("secret"), "{error:?}");
        }
    }
}
