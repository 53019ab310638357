//! What sources may be: schemes, hosts, registries and networks, decided before anything is sent.
//!
//! The decisions are pure; the two gates at the end put them into the way of every connection, after names are resolved
//! and for every redirect. `docs/import.md` describes the file.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use dvcr_image::{Forbidden, Gate, Reference};
use ipnet::IpNet;
use reqwest::Url;
use serde::Deserialize;
use url::Host;

use super::{Source, nbd};
use crate::checksum::Checksum;
use crate::{Error, ErrorKind, Result};

/// Networks of the machine itself, of those who run it, and of nobody: what a source on the internet is not in. (IANA's
/// registries of special-purpose addresses, RFC 6890, and what clouds answer on.)
const CLOSED: [(&str, &str); 27] = [
    ("0.0.0.0/8", "no host"),
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "shared by a carrier or a cluster"),
    ("127.0.0.0/8", "loopback"),
    ("168.63.129.16/32", "metadata of a cloud"),
    ("169.254.0.0/16", "link-local, metadata of clouds"),
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "protocol assignments"),
    ("192.0.2.0/24", "documentation"),
    ("192.88.99.0/24", "6to4 relays"),
    ("192.168.0.0/16", "private"),
    ("198.18.0.0/15", "benchmarks"),
    ("198.51.100.0/24", "documentation"),
    ("203.0.113.0/24", "documentation"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
    ("::/96", "no host, loopback"),
    ("::ffff:0:0:0/96", "translated IPv4"),
    ("64:ff9b:1::/48", "translated IPv4"),
    ("100::/64", "discarded"),
    ("2001::/32", "Teredo"),
    ("2001:db8::/32", "documentation"),
    ("3fff::/20", "documentation"),
    ("fc00::/7", "private, metadata of clouds"),
    ("fe80::/10", "link-local"),
    ("fec0::/10", "site-local"),
    ("ff00::/8", "multicast"),
];

/// What sources may be. What a policy does not name it allows, but for the networks that are closed to all sources
/// unless [`networks.allow`](Networks) opens them.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SourcePolicy {
    /// Schemes of sources, such as `https`, `docker`, `file`; all when absent.
    schemes: Option<Vec<String>>,
    /// Hosts of HTTP sources and of their redirects; all when absent.
    hosts: Option<Vec<HostPattern>>,
    /// Registries; when absent, those that `hosts` names.
    registries: Option<Vec<RegistryPattern>>,
    networks: Networks,
    /// Nothing is fetched without TLS.
    https_only: bool,
    /// A source is named with a checksum, or an image by its digest.
    checksum_required: bool,
}

/// Networks by their CIDRs. The longest that an address lies in decides, and `deny` where both have it; what is in
/// neither is judged by what is closed to all.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Networks {
    allow: Vec<Network>,
    deny: Vec<Network>,
}

impl SourcePolicy {
    /// Reads a policy in YAML; keys that are none are refused.
    pub fn parse(text: &str) -> Result<Self> {
        let policy: Option<Self> = serde_saphyr::from_str(text).map_err(|e| {
            Error::with(ErrorKind::Invalid, "the source policy cannot be read", e.to_string())
        })?;
        Ok(policy.unwrap_or_default())
    }

    /// Refuses a source by what it is called; where its name leads to, the gates see.
    pub(crate) fn admit(&self, source: &Source) -> Result<()> {
        match source {
            Source::Http(text) => match Url::parse(text) {
                Ok(url) => self.admit_http(&url).map_err(|why| refused(&super::http::shown(&url), why)),
                Err(error) => Err(Error::with(ErrorKind::Invalid, "the source is not a URL", error)),
            },
            Source::Image(reference) => {
                let admitted = self.admit_scheme("docker").and_then(|()| self.admit_registry(reference));
                admitted.map_err(|why| refused(&format!("docker://{reference}"), why))
            }
            // What it becomes over HTTP is judged like any other.
            Source::S3(object) => self.admit_scheme("s3").map_err(|why| refused(&object.to_string(), why)),
            Source::Nbd(address) => {
                let admitted = self.admit_scheme(address.scheme()).and_then(|()| self.admit_nbd(address));
                admitted.map_err(|why| refused(&address.to_string(), why))
            }
            Source::File(path) => {
                self.admit_scheme("file").map_err(|why| refused(&path.display().to_string(), why))
            }
            // Whoever takes uploads has decided that already.
            Source::Feed(_) => Ok(()),
        }
    }

    /// Refuses a source that nobody vouches for, if the policy wants that somebody does.
    pub(crate) fn admit_checksums(&self, source: &Source, checksums: &[Checksum]) -> Result<()> {
        let pinned = matches!(source, Source::Image(reference) if reference.digest().is_some());
        if self.checksum_required && checksums.is_empty() && !pinned {
            let text = "the source policy requires a checksum (checksum_required); give one by --checksum, or name an \
                        image by its digest";
            return Err(Error::new(ErrorKind::Policy, text));
        }
        Ok(())
    }

    /// Whether sources may have this scheme.
    pub(crate) fn admit_scheme(&self, scheme: &str) -> Result<(), Forbidden> {
        match &self.schemes {
            Some(schemes) if !schemes.iter().any(|known| known == scheme) => Err(Forbidden(format!(
                "the source policy does not allow the scheme {scheme}; allow it under schemes"
            ))),
            _ => Ok(()),
        }
    }

    /// Whether an HTTP source, or a redirect of it, may be at `url`.
    fn admit_http(&self, url: &Url) -> Result<(), Forbidden> {
        self.admit_scheme(url.scheme())?;
        self.admit_transport(url)?;
        self.admit_host(url)
    }

    /// Whether a registry, its token service or its storage may be at `url`.
    fn admit_registry_url(&self, url: &Url) -> Result<(), Forbidden> {
        self.admit_transport(url)?;
        // A registry that is named may keep its blobs where it likes.
        if self.registries.is_none() { self.admit_host(url) } else { Ok(()) }
    }

    fn admit_registry(&self, reference: &Reference) -> Result<(), Forbidden> {
        match &self.registries {
            Some(registries) if !registries.iter().any(|known| known.contains(reference)) => {
                let (host, repository) = (reference.host(), reference.repository());
                Err(Forbidden(format!(
                    "the source policy does not allow {host}/{repository}; allow it under registries"
                )))
            }
            _ => Ok(()),
        }
    }

    /// What holds for every connection: TLS where the policy wants it, and no host that is a closed address.
    fn admit_transport(&self, url: &Url) -> Result<(), Forbidden> {
        if self.https_only && url.scheme() != "https" {
            let text =
                format!("the source policy allows nothing but https (https_only), not {}", url.scheme());
            return Err(Forbidden(text));
        }
        match url.host() {
            Some(Host::Ipv4(address)) => self.admit_address(address.into()),
            Some(Host::Ipv6(address)) => self.admit_address(address.into()),
            _ => Ok(()),
        }
    }

    /// Whether an export of an NBD server may be there; one behind a socket is this machine's own.
    fn admit_nbd(&self, address: &nbd::Address) -> Result<(), Forbidden> {
        if self.https_only && !address.is_secure() {
            return Err(Forbidden("the source policy allows nothing without TLS (https_only)".to_owned()));
        }
        address.host().map_or(Ok(()), |host| self.admit_name(host))
    }

    fn admit_host(&self, url: &Url) -> Result<(), Forbidden> {
        url.host_str().map_or(Ok(()), |host| self.admit_name(host))
    }

    fn admit_name(&self, host: &str) -> Result<(), Forbidden> {
        let Some(hosts) = &self.hosts else { return Ok(()) };
        match hosts.iter().any(|pattern| pattern.matches(host)) {
            true => Ok(()),
            false => Err(Forbidden(format!(
                "the source policy does not allow the host {host}; allow it under hosts"
            ))),
        }
    }

    /// Whether anything at `address` may be connected to. Addresses that carry an IPv4 address are judged by both.
    pub(crate) fn admit_address(&self, address: IpAddr) -> Result<(), Forbidden> {
        let inner = match address {
            // The same host by another spelling.
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => None,
            IpAddr::V6(v6) => carried(v6),
            IpAddr::V4(_) => None,
        };
        for judged in [Some(address.to_canonical()), inner.map(IpAddr::V4)].into_iter().flatten() {
            let Some((network, why)) = self.closed(judged) else { continue };
            let shown = if judged == address { judged.to_string() } else { format!("{address} ({judged})") };
            return Err(Forbidden(format!(
                "{shown} lies in {network}{why}, which the source policy does not allow; allow it under networks.allow"
            )));
        }
        Ok(())
    }

    /// The network that closes `address`, and what it is.
    fn closed(&self, address: IpAddr) -> Option<(IpNet, String)> {
        let longest = |networks: &[Network]| {
            let holding = networks.iter().filter(|network| network.0.contains(&address));
            holding.max_by_key(|network| network.0.prefix_len()).map(|network| network.0)
        };
        match (longest(&self.networks.allow), longest(&self.networks.deny)) {
            (Some(open), Some(closed)) if open.prefix_len() > closed.prefix_len() => None,
            (_, Some(closed)) => Some((closed, String::new())),
            (Some(_), None) => None,
            (None, None) => CLOSED.iter().find_map(|(network, why)| {
                let network: IpNet = network.parse().ok()?;
                network.contains(&address).then(|| (network, format!(" ({why})")))
            }),
        }
    }
}

fn refused(shown: &str, why: Forbidden) -> Error {
    Error::new(ErrorKind::Policy, format!("source {shown}: {why}"))
}

/// The IPv4 address in one of NAT64 (RFC 6052) or 6to4 (RFC 3056), where the packets end.
fn carried(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let o = address.octets();
    match address.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, _, _] => Some(Ipv4Addr::new(o[12], o[13], o[14], o[15])),
        [0x2002, ..] => Some(Ipv4Addr::new(o[2], o[3], o[4], o[5])),
        _ => None,
    }
}

/// A network by its CIDR; an address alone is a network of one.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
struct Network(IpNet);

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        let network = network.map_err(|_| format!("{text:?} is no network; write 10.0.0.0/8 or fd00::/8"))?;
        if network.trunc() != network {
            return Err(format!("{text:?} has bits behind its prefix; write {}", network.trunc()));
        }
        Ok(Self(network))
    }
}

/// A host, or by `*.` all that end like this.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
enum HostPattern {
    Exact(String),
    Below(String),
}

impl HostPattern {
    fn matches(&self, host: &str) -> bool {
        let host = host.strip_suffix('.').unwrap_or(host);
        match self {
            Self::Exact(name) => host.eq_ignore_ascii_case(name),
            Self::Below(suffix) => {
                let begin = host.to_ascii_lowercase().strip_suffix(suffix).map(str::len);
                begin.is_some_and(|len| len > 1 && host.as_bytes()[len - 1] == b'.')
            }
        }
    }
}

impl FromStr for HostPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (below, name) = match text.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, text),
        };
        let bad =
            || format!("{text:?} is no host; write host.example, *.example or an address, without a port");
        if name.contains('*') {
            return Err(bad());
        }
        match (Host::parse(name).map_err(|_| bad())?, below) {
            (host, false) => Ok(Self::Exact(host.to_string())),
            (Host::Domain(name), true) => Ok(Self::Below(name)),
            _ => Err(bad()),
        }
    }
}

impl TryFrom<String> for HostPattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// `host[:port]`, or with a path all repositories below it, and the one of that name.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
struct RegistryPattern {
    host: String,
    path: Option<String>,
}

impl RegistryPattern {
    fn contains(&self, reference: &Reference) -> bool {
        let inside = |path: &str| {
            let rest = reference.repository().strip_prefix(path);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        reference.host().eq_ignore_ascii_case(&self.host) && self.path.as_deref().is_none_or(inside)
    }
}

impl TryFrom<String> for RegistryPattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (host, path) = match text.split_once('/') {
            Some((host, path)) => (host, Some(path.trim_end_matches('/').to_owned())),
            None => (text.as_str(), None),
        };
        let is_bad = |part: &str| part.is_empty() || part.contains([' ', '*', '@']);
        if text.contains("//") || is_bad(host) || path.as_deref().is_some_and(is_bad) {
            return Err(format!(
                "{text:?} is no registry; write registry.example:5000 or registry.example/team"
            ));
        }
        Ok(Self { host: host.to_owned(), path })
    }
}

/// The policy in the way of an HTTP source.
pub(crate) struct HttpGate(pub(crate) Arc<SourcePolicy>);

/// The policy in the way of a source in a registry.
pub(crate) struct RegistryGate(pub(crate) Arc<SourcePolicy>);

impl Gate for HttpGate {
    fn admit_url(&self, url: &Url) -> Result<(), Forbidden> {
        self.0.admit_http(url)
    }

    fn admit_address(&self, host: &str, address: IpAddr) -> Result<(), Forbidden> {
        self.0.admit_address(address).map_err(|why| Forbidden(format!("{host}: {why}")))
    }
}

impl Gate for RegistryGate {
    fn admit_url(&self, url: &Url) -> Result<(), Forbidden> {
        self.0.admit_registry_url(url)
    }

    fn admit_address(&self, host: &str, address: IpAddr) -> Result<(), Forbidden> {
        self.0.admit_address(address).map_err(|why| Forbidden(format!("{host}: {why}")))
    }
}

impl fmt::Debug for HttpGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HttpGate(..)")
    }
}

impl fmt::Debug for RegistryGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegistryGate(..)")
    }
}

#[cfg(test)]
mod tests;
