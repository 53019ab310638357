//! The grammar of repository names, tags and references (distribution-spec 1.1, "Pulling manifests").

use std::fmt;

use crate::digest::{Digest, DigestError};

const NAME_BYTES_MAX: usize = 255;
const TAG_BYTES_MAX: usize = 128;

/// A repository name: components of lower-case letters and digits, parted by `.`, `_`, `__` or dashes, joined by `/`.
///
/// No component can begin with a dot, a dash or an underscore: joined to a path, a name never leaves its directory and
/// never meets one of the layout's own (`_layers`, `_manifests`, `_uploads`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RepoName(Box<str>);

impl RepoName {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let valid = text.len() <= NAME_BYTES_MAX && text.split('/').all(is_component);
        valid.then(|| Self(text.into()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RepoName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A tag: a word character, then up to 127 word characters, dots and dashes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Tag(Box<str>);

impl Tag {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let valid = text.len() <= TAG_BYTES_MAX
            && text.bytes().next().is_some_and(word)
            && text.bytes().all(|byte| word(byte) || byte == b'.' || byte == b'-');
        valid.then(|| Self(text.into()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What names a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Reference {
    Tag(Tag),
    Digest(Digest),
}

/// Why a text names no manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReferenceError {
    #[error(
        "{0:?} is not a tag; use up to 128 letters, digits, `_`, `.` and `-`, not beginning with `.` or `-`"
    )]
    Tag(String),
    #[error(transparent)]
    Digest(DigestError),
}

impl Reference {
    /// Reads a tag, or, when it has a colon, a digest.
    pub(crate) fn parse(text: &str) -> Result<Self, ReferenceError> {
        if text.contains(':') {
            return text.parse().map(Self::Digest).map_err(ReferenceError::Digest);
        }
        Tag::parse(text).map(Self::Tag).ok_or_else(|| ReferenceError::tag(text))
    }
}

impl ReferenceError {
    /// Says that a text, of which the beginning is shown, is no tag.
    pub(crate) fn tag(text: &str) -> Self {
        Self::Tag(text.chars().take(160).collect())
    }
}

fn is_component(text: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    let mut at = 0;
    loop {
        let word = bytes[at..].iter().take_while(|byte| alphanumeric(**byte)).count();
        if word == 0 {
            return false;
        }
        at += word;
        let separator = bytes[at..].iter().take_while(|byte| b"._-".contains(byte)).count();
        match &bytes[at..at + separator] {
            [] => return at == bytes.len(),
            [b'.'] | [b'_'] | [b'_', b'_'] => {}
            dashes if dashes.iter().all(|byte| *byte == b'-') => {}
            _ => return false,
        }
        at += separator;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_grammar() {
        let long = format!("{}/{}", "a".repeat(127), "b".repeat(127));
        for good in [
            "a",
            "0",
            "a/b/c/d/e",
            "a.b",
            "a_b",
            "a__b",
            "a-b",
            "a---b",
            "vd/ns/disk-1",
            "v2/blobs/uploads",
            &long,
        ] {
            assert!(RepoName::parse(good).is_some(), "{good}");
        }
        for bad in [
            "",
            "/",
            "a/",
            "/a",
            "a//b",
            "A",
            "a.",
            ".a",
            "..",
            "a..b",
            "a___b",
            "a_-b",
            "-a",
            "a-",
            "_layers",
            "a/_uploads",
            "a/../b",
            "a b",
            "ä",
            "a\0",
            &format!("{long}x"),
        ] {
            assert!(RepoName::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn tags_and_digests_are_told_apart() {
        let long = "x".repeat(128);
        for good in ["latest", "_", "V1.0-rc_1", &long] {
            assert!(matches!(Reference::parse(good), Ok(Reference::Tag(_))), "{good}");
        }
        for bad in ["", ".hidden", "-x", "a/b", "a b", &format!("{long}x")] {
            assert!(matches!(Reference::parse(bad), Err(ReferenceError::Tag(_))), "{bad}");
        }
        let digest = format!("sha256:{}", "0".repeat(64));
        assert!(matches!(Reference::parse(&digest), Ok(Reference::Digest(_))));
        assert!(matches!(Reference::parse("sha256:0"), Err(ReferenceError::Digest(_))));
    }
}
