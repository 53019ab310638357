//! What a pull-through cache is told.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::names::RepoName;
use crate::units::{Size, Time};

/// How long a tag is served without asking its upstream, if nothing else is said.
const TAG_FRESHNESS: Time = Time(Duration::from_secs(300));

/// Registries whose content is fetched when somebody asks for it, and kept for the next.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Cache {
    pub upstreams: Vec<Upstream>,
}

/// A registry whose repositories appear below a prefix of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Upstream {
    /// The beginning of the names of the repositories that are fetched: whole components, and `/` at the end.
    pub prefix: String,
    /// `https://host[:port]`; `http://` is the only way to do without TLS.
    pub url: String,
    /// What the upstream has in place of `prefix`; empty, or whole components and `/` at the end.
    #[serde(default)]
    pub remote_prefix: String,
    /// Names that clients may give this upstream by the parameter `ns`, in place of the prefix.
    #[serde(default)]
    pub ns: Vec<String>,
    /// Who we are there; goes with `password_file`.
    pub username: Option<String>,
    pub password_file: Option<PathBuf>,
    /// Credentials in the form of docker's `config.json`; a `username` counts more.
    pub auth_file: Option<PathBuf>,
    /// Certificates (PEM) that are trusted besides those of the system.
    pub ca_file: Option<PathBuf>,
    /// How long a tag is served without asking the upstream whether it still names the same.
    #[serde(default = "tag_freshness")]
    pub tag_freshness: Time,
    /// Bytes that are kept, at most; `None` keeps everything.
    pub bytes_max: Option<Size>,
}

fn tag_freshness() -> Time {
    TAG_FRESHNESS
}

impl Cache {
    /// Every key, as it is written in a file.
    pub const EXAMPLE: &str = r#"
# Registries whose content is fetched when somebody asks for it, and kept; nobody pushes there.
cache:
  upstreams:
      # the repositories whose names begin so
    - prefix: docker.io/
      # http:// is the only way to do without TLS
      url: https://registry-1.docker.io
      # what the upstream has in place of the prefix
      remote-prefix: ""
      # what containerd may call it (?ns=)
      ns: [docker.io]
      # who we are there: a user and a file with the password, or else a file of docker's form (config.json)
      username: robot
      password-file: /etc/dvcr/docker.io
      auth-file: /etc/dvcr/config.json
      # trusted besides the roots of the system
      ca-file: /etc/dvcr/ca.pem
      # how long a tag is served without asking
      tag-freshness: 5m
      # what is kept at most
      bytes-max: 100G
"#;
}

impl Upstream {
    /// An upstream of which nothing else is said.
    pub fn new(prefix: impl Into<String>, url: impl Into<String>) -> Self {
        Self {
            prefix: prefix.into(),
            url: url.into(),
            remote_prefix: String::new(),
            ns: Vec::new(),
            username: None,
            password_file: None,
            auth_file: None,
            ca_file: None,
            tag_freshness: TAG_FRESHNESS,
            bytes_max: None,
        }
    }

    /// Says what is wrong with the names.
    pub(super) fn check(&self) -> Result<(), String> {
        let is_prefix =
            |text: &str| text.strip_suffix('/').is_some_and(|name| RepoName::parse(name).is_some());
        if !is_prefix(&self.prefix) {
            return Err(format!(
                "{:?} is no prefix of an upstream: write whole components and `/`, as docker.io/",
                self.prefix
            ));
        }
        if !self.remote_prefix.is_empty() && !is_prefix(&self.remote_prefix) {
            return Err(format!(
                "{:?} is no prefix at an upstream: write nothing, or whole components and `/`, as library/",
                self.remote_prefix
            ));
        }
        if self.username.is_some() != self.password_file.is_some() {
            return Err(format!("the upstream of {} needs both username and password-file", self.prefix));
        }
        Ok(())
    }
}

/// An upstream of which nothing but the address is said: `PREFIX=URL`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamAddress {
    prefix: String,
    url: String,
}

impl From<UpstreamAddress> for Upstream {
    fn from(UpstreamAddress { prefix, url }: UpstreamAddress) -> Self {
        Self::new(prefix, url)
    }
}

impl fmt::Display for UpstreamAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.prefix, self.url)
    }
}

impl FromStr for UpstreamAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (prefix, url) = text.split_once('=').ok_or_else(|| {
            format!("{text:?} is no upstream: write a prefix and an address, as docker.io/=https://registry-1.docker.io")
        })?;
        Upstream::new(prefix, url).check()?;
        Ok(Self { prefix: prefix.to_owned(), url: url.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstreams_are_whole_components() {
        let text = "docker.io/=https://registry-1.docker.io";
        let address: UpstreamAddress = text.parse().unwrap();
        assert_eq!(address.to_string(), text);
        let upstream = Upstream::from(address);
        assert_eq!(upstream, Upstream::new("docker.io/", "https://registry-1.docker.io"));
        for bad in ["docker.io", "docker.io=https://x", "/=https://x", "a//=https://x", "A/=https://x"] {
            assert!(bad.parse::<UpstreamAddress>().is_err(), "{bad}");
        }
        for (field, value) in [("remote_prefix", "library"), ("username", "robot")] {
            let mut upstream = upstream.clone();
            match field {
                "remote_prefix" => upstream.remote_prefix = value.to_owned(),
                _ => upstream.username = Some(value.to_owned()),
            }
            assert!(upstream.check().is_err(), "{field}");
        }
    }

    #[test]
    fn a_section_is_read_as_it_is_written() {
        let cache: Cache = serde_json::from_value(serde_json::json!({
            "upstreams": [{"prefix": "a/", "url": "https://a.example", "tag-freshness": "90s", "bytes-max": "10G"}],
        }))
        .unwrap();
        let expected = Upstream {
            tag_freshness: Time(Duration::from_secs(90)),
            bytes_max: Some(Size(10 << 30)),
            ..Upstream::new("a/", "https://a.example")
        };
        assert_eq!(cache.upstreams, [expected]);
        assert!(serde_json::from_str::<Cache>(r#"{"upstreams": [{"prefix": "a/"}]}"#).is_err());
        assert!(serde_json::from_str::<Cache>(r#"{"upstream": []}"#).is_err());
    }
}
