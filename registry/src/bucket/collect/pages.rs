//! What lies in the bucket, page by page: all repositories one after the other, and the keys of digests from many ends at a time.

use std::collections::BTreeMap;
use std::time::SystemTime;

use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};
use uuid::Uuid;

use super::super::Bucket;
use super::digest;
use crate::digest::{Algorithm, Digest};
use crate::names::{RepoName, Tag};
use crate::s3::{self, Head, Listing};

/// Lists of digests' keys that are asked for at a time.
const LISTS_AT_ONCE_MAX: usize = 16;
/// Comes behind all keys that go on behind a slash.
const BEHIND: char = '~';

/// What one request listed.
type Page = Vec<(String, Head)>;

/// What lies in a repository.
#[derive(Debug)]
pub(super) struct Repo {
    pub(super) name: RepoName,
    /// Its links to blobs.
    pub(super) layers: Vec<Entry>,
    /// Whether there are more of them than fit on a page, so that none are given.
    pub(super) has_more_layers: bool,
    /// Its links to manifests.
    pub(super) revisions: Vec<Entry>,
    /// Its tags, where they are wanted, and when each was pushed.
    pub(super) tags: Vec<(Tag, SystemTime)>,
    pub(super) has_tags: bool,
    pub(super) sessions: BTreeMap<Uuid, Session>,
}

/// A link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) digest: Digest,
    /// When it was placed, in whole seconds.
    pub(super) modified: SystemTime,
    pub(super) bytes: u64,
}

/// An upload session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Session {
    /// When anything of it was last written.
    pub(super) modified: SystemTime,
    pub(super) bytes: u64,
}

/// Goes through all repositories, in the order of their keys.
pub(super) struct Repos<'a, W> {
    bucket: &'a Bucket,
    base: String,
    wants_tags: W,
    next: Next,
    /// What the last page may have shown only a part of.
    open: Option<Repo>,
}

enum Next {
    First,
    Token(String),
    /// Behind a key, over what nobody wants to know.
    After(String),
    End,
}

impl Bucket {
    /// Lists all repositories; the tags of those of which `wants_tags` says so.
    pub(super) fn all_repos<W: Fn(&RepoName) -> bool>(&self, wants_tags: W) -> Repos<'_, W> {
        Repos { bucket: self, base: self.keys.repositories(), wants_tags, next: Next::First, open: None }
    }

    /// Lists all keys `<alg>/<hex>...` below a prefix, from many ends at a time if there are many.
    pub(super) fn digest_pages(&self, prefix: String) -> impl Stream<Item = s3::Result<Page>> {
        let first = async move {
            let page = self.client.list(Listing { prefix: &prefix, ..Listing::default() }, None).await?;
            let ends = match (page.next, page.objects.last()) {
                (Some(_), Some((last, _))) => ends(&prefix, last),
                _ => Vec::new(),
            };
            let rest = stream::iter(ends)
                .map(|(prefix, after)| self.client.pages(prefix, Some(after)))
                .flatten_unordered(LISTS_AT_ONCE_MAX);
            s3::Result::Ok(stream::iter([Ok(page.objects)]).chain(rest))
        };
        stream::once(first).try_flatten()
    }
}

/// Where lists begin that together show what is behind `last`, and what they are to leave out.
fn ends(prefix: &str, last: &str) -> Vec<(String, String)> {
    let of = |algorithm: Algorithm| {
        let digits = "0123456789abcdef".chars();
        digits.map(move |digit| format!("{prefix}{}/{digit}", algorithm.name()))
    };
    let all = Algorithm::ALL.into_iter().flat_map(of);
    // All keys below it may be listed already.
    let is_open = |end: &String| end.as_str() > last || last.starts_with(end.as_str());
    all.filter(is_open).map(|end| (end, last.to_owned())).collect()
}

impl<W: Fn(&RepoName) -> bool> Repos<'_, W> {
    /// Returns those that the next page completes; `None` at the end.
    pub(super) async fn next(&mut self) -> s3::Result<Option<Vec<Repo>>> {
        let (token, after) = match &self.next {
            Next::First => (None, None),
            Next::Token(token) => (Some(token.clone()), None),
            Next::After(key) => (None, Some(key.clone())),
            Next::End => return Ok(None),
        };
        let listing = Listing { prefix: &self.base, start_after: after.as_deref(), ..Listing::default() };
        let page = self.bucket.client.list(listing, token.as_deref()).await?;
        let mut whole = Vec::new();
        let mut last = None;
        for (key, head) in &page.objects {
            last = None;
            let Some((name, rest)) = key.strip_prefix(&self.base).and_then(split) else { continue };
            if self.open.as_ref().is_none_or(|repo| repo.name != name) {
                whole.extend(self.open.take());
            }
            let repo = self.open.get_or_insert_with(|| Repo::new(name));
            last = repo.take(rest, head, &self.wants_tags);
        }
        self.next = match (page.next, &mut self.open, last) {
            (None, open, _) => {
                whole.extend(open.take());
                Next::End
            }
            (Some(_), Some(repo), Some(Part::Layers)) => {
                repo.layers = Vec::new();
                repo.has_more_layers = true;
                Next::After(format!("{}{BEHIND}", self.bucket.keys.layers(&repo.name)))
            }
            (Some(_), Some(repo), Some(Part::Tags)) if !(self.wants_tags)(&repo.name) => {
                Next::After(format!("{}{BEHIND}", self.bucket.keys.tags(&repo.name)))
            }
            (Some(token), ..) => Next::Token(token),
        };
        Ok(Some(whole))
    }
}

/// Which part of a repository a key is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Layers,
    Tags,
}

impl Repo {
    fn new(name: RepoName) -> Self {
        Self {
            name,
            layers: Vec::new(),
            has_more_layers: false,
            revisions: Vec::new(),
            tags: Vec::new(),
            has_tags: false,
            sessions: BTreeMap::new(),
        }
    }

    /// Takes note of a key, of which `rest` is what comes behind the name of the repository.
    fn take(&mut self, rest: &str, head: &Head, wants_tags: impl Fn(&RepoName) -> bool) -> Option<Part> {
        let entry = |digest| Entry { digest, modified: head.modified, bytes: head.bytes };
        match rest.split('/').collect::<Vec<_>>()[..] {
            ["_layers", algorithm, hex, "link"] => {
                if !self.has_more_layers {
                    self.layers.extend(digest(algorithm, hex).map(entry));
                }
                return Some(Part::Layers);
            }
            ["_manifests", "revisions", algorithm, hex, "link"] => {
                self.revisions.extend(digest(algorithm, hex).map(entry));
            }
            ["_manifests", "tags", tag, "current", "link"] => {
                self.has_tags = true;
                if wants_tags(&self.name) {
                    self.tags.extend(Tag::parse(tag).map(|tag| (tag, head.modified)));
                }
                return Some(Part::Tags);
            }
            ["_manifests", "tags", ..] => {
                self.has_tags = true;
                return Some(Part::Tags);
            }
            ["_uploads", id, ..] => {
                let Ok(id) = id.parse() else { return None };
                let session = Session { modified: head.modified, bytes: 0 };
                let session = self.sessions.entry(id).or_insert(session);
                session.modified = session.modified.max(head.modified);
                session.bytes = session.bytes.saturating_add(head.bytes);
            }
            _ => {}
        }
        None
    }
}

/// Parts the name of a repository from what lies in it.
fn split(key: &str) -> Option<(RepoName, &str)> {
    // No component of a name begins so.
    let (name, _) = key.split_once("/_")?;
    let rest = key.get(name.len().checked_add(1)?..)?;
    Some((RepoName::parse(name)?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_that_of_the_repository_before_its_first_component_of_the_layout() {
        let (name, rest) = split("vi/ns/disk/_layers/sha256/ab/link").unwrap();
        assert_eq!((name.as_str(), rest), ("vi/ns/disk", "_layers/sha256/ab/link"));
        for bad in ["vi/ns", "_layers/x", "A/_layers/x", "a//_layers/x", ""] {
            assert_eq!(split(bad), None, "{bad}");
        }
    }

    #[test]
    fn lists_from_many_ends_show_each_key_that_is_left_once() {
        let key = |n: u32| {
            let hex = Digest::of(Algorithm::Sha256, &n.to_be_bytes());
            format!("p/sha256/{}/link", hex.hex())
        };
        let mut keys: Vec<String> = (0..1000).map(key).collect();
        keys.extend((0..100).map(|n| format!("p/sha512/{}", Digest::of(Algorithm::Sha512, &[n]).hex())));
        keys.sort();
        for listed in [0, 1, 500, 999, 1000, 1050, 1099] {
            let last = &keys[listed];
            let mut shown: Vec<_> = Vec::new();
            for (prefix, after) in ends("p/", last) {
                shown.extend(keys.iter().filter(|key| key.starts_with(&prefix) && **key > after));
            }
            assert!(shown.into_iter().eq(&keys[listed + 1..]), "behind {listed}");
        }
    }
}
