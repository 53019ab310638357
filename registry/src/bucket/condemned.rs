//! What a round of the collection is about to remove, as the list that everybody reads.
//!
//! Each line is one thing: `blob <digest>`, `layer <digest> <repository>`, `manifest <digest> <repository> [subject]`,
//! `tag <tag> <repository>`.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::str::FromStr;

use crate::digest::{Algorithm, Digest};
use crate::names::{RepoName, Tag};

/// Things that one round condemns.
pub(super) const ROUND_ENTRIES_MAX: usize = 10_000;
/// Largest list, bytes: a line is no longer than 540.
pub(super) const LIST_BYTES_MAX: u64 = 6 << 20;

/// Something that is about to be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Condemned {
    /// The bytes, which no repository has.
    Blob(Digest),
    /// The repository's link to a blob.
    Layer { repo: RepoName, digest: Digest },
    /// The repository's link to a manifest, and the entry among those that refer to its subject.
    Manifest { repo: RepoName, digest: Digest, subject: Option<Digest> },
    /// What a tag names, and has named.
    Tag { repo: RepoName, tag: Tag },
}

impl Condemned {
    /// What it is claimed by.
    pub(super) fn claim(&self) -> Digest {
        match self {
            Self::Blob(digest) | Self::Layer { digest, .. } | Self::Manifest { digest, .. } => digest.clone(),
            Self::Tag { repo, tag } => claim_of(repo, tag),
        }
    }

    fn repo(&self) -> Option<&RepoName> {
        match self {
            Self::Blob(_) => None,
            Self::Layer { repo, .. } | Self::Manifest { repo, .. } | Self::Tag { repo, .. } => Some(repo),
        }
    }
}

/// What a tag is claimed by, as if it was a digest: whoever places it claims this, too.
pub(super) fn claim_of(repo: &RepoName, tag: &Tag) -> Digest {
    Digest::of(Algorithm::Sha256, format!("tag {tag} {repo}").as_bytes())
}

/// What a replica knows to be condemned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct List {
    blobs: HashSet<Digest>,
    of_repos: HashMap<RepoName, HashSet<Digest>>,
}

impl List {
    pub(super) fn has(&self, repo: &RepoName, digest: &Digest) -> bool {
        self.blobs.contains(digest) || self.of_repos.get(repo).is_some_and(|of_repo| of_repo.contains(digest))
    }
}

impl<'a> FromIterator<&'a Condemned> for List {
    fn from_iter<I: IntoIterator<Item = &'a Condemned>>(all: I) -> Self {
        let mut list = Self::default();
        for one in all {
            match one.repo() {
                None => list.blobs.insert(one.claim()),
                Some(repo) => list.of_repos.entry(repo.clone()).or_default().insert(one.claim()),
            };
        }
        list
    }
}

/// Writes a list.
pub(super) fn write<'a>(all: impl Iterator<Item = &'a Condemned>) -> String {
    let mut text = String::new();
    for one in all {
        text.push_str(&one.to_string());
        text.push('\n');
    }
    text
}

/// Reads a list; `None` if it is none of ours.
pub(super) fn read(text: &str) -> Option<Vec<Condemned>> {
    text.lines().map(|line| line.parse().ok()).collect()
}

impl fmt::Display for Condemned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blob(digest) => write!(f, "blob {digest}"),
            Self::Layer { repo, digest } => write!(f, "layer {digest} {repo}"),
            Self::Manifest { repo, digest, subject: None } => write!(f, "manifest {digest} {repo}"),
            Self::Manifest { repo, digest, subject: Some(subject) } => {
                write!(f, "manifest {digest} {repo} {subject}")
            }
            Self::Tag { repo, tag } => write!(f, "tag {tag} {repo}"),
        }
    }
}

impl FromStr for Condemned {
    type Err = ();

    fn from_str(line: &str) -> Result<Self, ()> {
        let digest = |text: &str| text.parse::<Digest>().map_err(drop);
        let repo = |text: &str| RepoName::parse(text).ok_or(());
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["blob", blob] => Ok(Self::Blob(digest(blob)?)),
            ["layer", layer, of] => Ok(Self::Layer { repo: repo(of)?, digest: digest(layer)? }),
            ["manifest", manifest, of] => {
                Ok(Self::Manifest { repo: repo(of)?, digest: digest(manifest)?, subject: None })
            }
            ["manifest", manifest, of, subject] => {
                let subject = Some(digest(subject)?);
                Ok(Self::Manifest { repo: repo(of)?, digest: digest(manifest)?, subject })
            }
            ["tag", tag, of] => Ok(Self::Tag { repo: repo(of)?, tag: Tag::parse(tag).ok_or(())? }),
            _ => Err(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_as_it_was_written_and_tells_what_is_about_to_go() {
        let (a, b) = (RepoName::parse("a").unwrap(), RepoName::parse("a/b").unwrap());
        let of = |text: &str| Digest::of(Algorithm::Sha512, text.as_bytes());
        let tag = Tag::parse("v1.0").unwrap();
        let all = [
            Condemned::Blob(of("blob")),
            Condemned::Layer { repo: a.clone(), digest: of("layer") },
            Condemned::Manifest { repo: a.clone(), digest: of("manifest"), subject: None },
            Condemned::Manifest { repo: b.clone(), digest: of("signature"), subject: Some(of("manifest")) },
            Condemned::Tag { repo: b.clone(), tag: tag.clone() },
        ];
        let text = write(all.iter());
        assert_eq!(read(&text).unwrap(), all);
        let list: List = all.iter().collect();
        for (repo, digest, is_condemned) in [
            (&a, of("blob"), true),
            (&b, of("blob"), true),
            (&a, of("layer"), true),
            (&b, of("layer"), false),
            (&b, of("signature"), true),
            (&b, claim_of(&b, &tag), true),
            (&a, claim_of(&b, &tag), false),
            (&a, claim_of(&a, &tag), false),
        ] {
            assert_eq!(list.has(repo, &digest), is_condemned, "{repo} {digest}");
        }
        for bad in ["blob", "blob sha256:0", "layer a", "tag v1 A", "other x y", ""] {
            assert_eq!(read(&format!("{bad}\n")), None, "{bad}");
        }
    }

    #[test]
    fn the_largest_list_has_room() {
        let repo = RepoName::parse(&format!("{}/{}", "a".repeat(127), "b".repeat(127))).unwrap();
        let digest = Digest::of(Algorithm::Sha512, b"");
        let one = Condemned::Manifest { repo, digest: digest.clone(), subject: Some(digest) };
        let bytes = write([&one].into_iter()).len() * ROUND_ENTRIES_MAX;
        assert!(bytes as u64 <= LIST_BYTES_MAX, "{bytes}");
    }
}
