//! References to images: `[docker://]host[:port]/repository[:tag][@digest]`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::digest::{self, Digest};
use crate::{Error, ErrorKind, Result};

/// Longest repository name with its host, bytes; what DVCR's tools and other registries accept.
pub const REPOSITORY_BYTES_MAX: usize = 255;
/// Longest tag, bytes (distribution specification).
pub const TAG_BYTES_MAX: usize = 128;
/// The tag meant when a reference names neither tag nor digest.
pub const DEFAULT_TAG: &str = "latest";

const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_ENDPOINT: &str = "registry-1.docker.io";

/// Where an image is.
///
/// The first component is a host when it holds a dot or a colon or is `localhost`; everything else is a name on
/// Docker Hub, where a name of one component lies under `library/`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// The host with its port, as it was written; `docker.io` for Docker Hub.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The host with its port that answers the API: the same but for Docker Hub.
    pub fn endpoint(&self) -> &str {
        if self.host == DOCKER_HUB { DOCKER_HUB_ENDPOINT } else { &self.host }
    }

    /// The repository's name, without the host.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if one was written.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was written.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What to ask the registry for: the digest, else the tag, else `latest`.
    pub fn target(&self) -> &str {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.as_ref(),
            (None, Some(tag)) => tag,
            (None, None) => DEFAULT_TAG,
        }
    }

    /// The same with `digest`, which is asked for from then on in place of the tag.
    pub fn with_digest(self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self }
    }

    /// Whether the host is this machine, which is spoken to in plain HTTP.
    pub fn is_loopback(&self) -> bool {
        let name = match self.host.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or(rest),
            None => self.host.split(':').next().unwrap_or(&self.host),
        };
        name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        match (&self.tag, &self.digest) {
            (None, None) => write!(f, ":{DEFAULT_TAG}")?,
            (Some(tag), _) => write!(f, ":{tag}")?,
            (None, Some(_)) => {}
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: String| {
            let shown = without_user(text);
            Error::new(
                ErrorKind::Invalid,
                format!("{shown:?} is not an image reference ({why}); write host[:port]/repository[:tag]"),
            )
        };
        let rest = text.strip_prefix("docker://").unwrap_or(text);
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => {
                (rest, Some(digest::parse(digest).map_err(|_| bad("what follows @ is not a digest".into()))?))
            }
            None => (rest, None),
        };
        let (host, path) = match rest.split_once('/') {
            Some((host, path)) if is_host(host) => (host, path),
            _ => (DOCKER_HUB, rest),
        };
        if !valid_host(host) {
            return Err(bad(format!("host {host:?} is malformed")));
        }
        let host = if host == "index.docker.io" || host == DOCKER_HUB_ENDPOINT { DOCKER_HUB } else { host };
        let (path, tag) = match path.rsplit_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (path, None),
        };
        if let Some(tag) = tag.filter(|tag| !valid_tag(tag)) {
            return Err(bad(format!("tag {tag:?} is malformed")));
        }
        if !path.split('/').all(valid_component) {
            return Err(bad(format!(
                "repository {path:?} must be lower-case letters, digits and single separators, in parts joined by /"
            )));
        }
        let repository = if host == DOCKER_HUB && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        if host.len() + 1 + repository.len() > REPOSITORY_BYTES_MAX {
            return Err(bad(format!("host and repository are longer than {REPOSITORY_BYTES_MAX} bytes")));
        }
        Ok(Self { host: host.to_owned(), repository, tag: tag.map(str::to_owned), digest })
    }
}

/// The part of a malformed reference that may come back in a message: a password may be left of an `@`, unless it is
/// the one before a digest.
fn without_user(text: &str) -> &str {
    let name = match text.rsplit_once('@') {
        Some((name, digest)) if digest::parse(digest).is_ok() => name,
        _ => text,
    };
    name.rfind('@').map_or(text, |at| &text[at + 1..])
}

fn is_host(component: &str) -> bool {
    component == "localhost"
        || component.contains(['.', ':', '['])
        || component.chars().any(char::is_uppercase)
}

/// `name[:port]` or `[IPv6][:port]`.
fn valid_host(host: &str) -> bool {
    let (name_is_good, port) = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) => (address.parse::<std::net::Ipv6Addr>().is_ok(), port),
            None => return false,
        },
        None => {
            let (name, port) = host.find(':').map_or((host, ""), |at| host.split_at(at));
            (name.split('.').all(valid_host_label), port)
        }
    };
    name_is_good
        && (port.is_empty() || port.strip_prefix(':').is_some_and(|p| p.parse::<u16>().is_ok_and(|p| p > 0)))
}

fn valid_host_label(label: &str) -> bool {
    !label.is_empty()
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
fn valid_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= TAG_BYTES_MAX
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn valid_component(component: &str) -> bool {
    let plain = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let edges = bytes.first().is_some_and(plain) && bytes.last().is_some_and(plain);
    edges
        && bytes.split(plain).all(|separator| {
            matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-')
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Reference {
        text.parse().unwrap()
    }

    #[test]
    fn short_names_are_those_of_docker_hub() {
        assert_eq!(parse("debian").to_string(), "docker.io/library/debian:latest");
        assert_eq!(parse("docker://debian:12").to_string(), "docker.io/library/debian:12");
        assert_eq!(parse("index.docker.io/a/b").to_string(), "docker.io/a/b:latest");
        assert_eq!(parse("debian").endpoint(), "registry-1.docker.io");
        assert_eq!(parse("localhost/a").repository(), "a");
        assert_eq!(parse("r.example:5000/a/b:1").endpoint(), "r.example:5000");
    }

    #[test]
    fn a_digest_wins_over_a_tag() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        let both = parse(&format!("r.example/a:1@{digest}"));
        assert_eq!((both.target(), both.tag()), (digest.as_str(), Some("1")));
        assert_eq!(parse("r.example/a").target(), "latest");
    }

    #[test]
    fn only_this_machine_is_loopback() {
        for text in
            ["localhost/a", "localhost:5000/a", "127.0.0.1:1/a", "127.9.9.9/a", "[::1]:5000/a", "[::1]/a"]
        {
            assert!(parse(text).is_loopback(), "{text}");
        }
        for text in ["localhost.example/a", "128.0.0.1:5000/a", "[::2]/a", "127.example.com/a", "debian"] {
            assert!(!parse(text).is_loopback(), "{text}");
        }
    }

    #[test]
    fn malformed_references_are_refused_without_showing_a_password() {
        let long = format!("r.example/{}", "a".repeat(REPOSITORY_BYTES_MAX));
        let long_tag = format!("r.example/a:{}", "t".repeat(TAG_BYTES_MAX + 1));
        for text in [
            "",
            "/",
            "r.example/",
            "r.example/A",
            "r.example/a//b",
            "r.example/a..b",
            "r.example/a___b",
            "r.example/-a",
            "r.example/a:",
            "r.example/a:-x",
            "r.example/a@sha256:12",
            "r.example:0/a",
            "r.example:x/a",
            "[::1/a",
            "r..example/a",
            "a b",
            "r.example/a\n",
            &long,
            &long_tag,
        ] {
            assert_eq!(text.parse::<Reference>().unwrap_err().kind(), ErrorKind::Invalid, "{text:?}");
        }
        let digest = format!("sha256:{}", "ab".repeat(32));
        for text in [
            "user:secret@r.example/a".to_owned(),
            "docker://user:secret@r.example/a".to_owned(),
            "user:sec/ret/secret@r.example/a".to_owned(),
            "user@secret@r.example/a".to_owned(),
            format!("docker://user:secret@r.example/a@{digest}"),
        ] {
            let error = text.parse::<Reference>().unwrap_err();
            assert!(!error.to_string().contains("secret"), "{error}");
            assert!(error.to_string().contains("r.example/a"), "{error}");
        }
        let error = format!("r.example/A@{digest}").parse::<Reference>().unwrap_err();
        assert!(error.to_string().contains("r.example/A@sha256:"), "{error}");
    }

    proptest! {
        #[test]
        fn every_well_formed_reference_survives_a_round_trip(
            host in "(localhost|[a-z0-9]{1,8}(\\.[a-z0-9]{1,8}){1,2})(:[1-9][0-9]{0,3})?",
            repository in "[a-z0-9]{1,6}((\\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}(/[a-z0-9]{1,6}){0,3}",
            tag in proptest::option::of("[a-zA-Z0-9_][a-zA-Z0-9._-]{0,20}"),
            digest in proptest::option::of("sha256:[0-9a-f]{64}"),
        ) {
            let mut text = format!("{host}/{repository}");
            if let Some(tag) = &tag { text += &format!(":{tag}"); }
            if let Some(digest) = &digest { text += &format!("@{digest}"); }
            let reference = parse(&text);
            prop_assert_eq!(reference.host(), host);
            prop_assert_eq!(reference.repository(), repository);
            prop_assert_eq!(reference.tag(), tag.as_deref());
            let shown = parse(&reference.to_string());
            prop_assert_eq!(shown.target(), reference.target());
            prop_assert_eq!(parse(&format!("docker://{text}")), reference);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,60}") {
            let _ = text.parse::<Reference>();
        }
    }
}
