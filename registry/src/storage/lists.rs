//! Pages of tags, of digests and of repositories, in lexical order.
//!
//! A page takes memory for itself only, however many names there are. A page of repositories takes time for itself, and
//! for the names of those directories that it goes through: what lies before and behind it is not opened.

use std::collections::{BTreeSet, BinaryHeap};
use std::fs;
use std::path::Path;

use super::blobs::found;
use super::{Error, Result, Storage};
use crate::digest::Digest;
use crate::names::{RepoName, Tag};
use crate::store::{Content, Page};

/// Names of one directory that are held at a time, while a page of repositories is made.
const KEYS_MAX: usize = 2048;

impl Storage {
    /// Lists up to `limit` tags behind `after`; `None` if there is no such repository.
    pub(crate) fn tags(&self, repo: &RepoName, after: Option<&str>, limit: usize) -> Result<Option<Page>> {
        let dir = self.layout.tags(repo);
        let mut page = Page::default();
        let mut behind = after.unwrap_or_default().to_owned();
        loop {
            let mut names = Smallest::new(limit.saturating_add(1));
            let listed = each_dir(&dir, |name| {
                if name > behind.as_str() {
                    names.add(name);
                }
            })?;
            if !listed {
                return Ok(self.is_repo(repo).then_some(page));
            }
            let (names, all) = names.into_sorted();
            for name in names {
                // A tag that a killed process was about to make or delete names nothing.
                let named = match Tag::parse(&name) {
                    Some(tag) => self.names_manifest(repo, &tag)?,
                    None => false,
                };
                behind.clone_from(&name);
                if named && !page.add(name, limit) {
                    return Ok(Some(page));
                }
            }
            if all {
                return Ok(Some(page));
            }
        }
    }

    /// Lists up to `limit` digests of what a repository has of one kind, behind `after`.
    pub(crate) fn digests(
        &self,
        repo: &RepoName,
        of: Content,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Digest>> {
        let (mut listed, mut behind) = (Vec::new(), after.cloned());
        loop {
            let left = limit.saturating_sub(listed.len());
            let mut found = BTreeSet::new();
            let add = |digest: Digest| {
                let is_due = behind.as_ref().is_none_or(|behind| digest > *behind);
                if is_due && (found.len() < left || found.last().is_some_and(|last| digest < *last)) {
                    found.insert(digest);
                    if found.len() > left {
                        found.pop_last();
                    }
                }
                Ok(())
            };
            match of {
                Content::Blobs => self.each_layer(repo, add)?,
                Content::Manifests => self.each_revision(repo, add)?,
            }
            let is_all = found.len() < left;
            behind = found.last().cloned();
            // A blob that was taken from the repository leaves a directory without a link.
            listed.extend(
                found.into_iter().filter(|digest| {
                    of == Content::Manifests || self.layout.layer_link(repo, digest).exists()
                }),
            );
            if is_all || listed.len() >= limit {
                return Ok(listed);
            }
        }
    }

    /// Lists up to `limit` repositories behind `after`.
    pub(crate) fn repositories(&self, after: Option<&str>, limit: usize) -> Result<Page> {
        let mut page = Page::default();
        self.add_repositories(&self.layout.repositories(), "", after.unwrap_or_default(), limit, &mut page)?;
        Ok(page)
    }

    /// Adds the repositories of `dir`, whose names begin with `prefix`; returns whether there was room for all.
    ///
    /// Each name of a directory stands for two things: itself, and, with a slash behind it, all that is below. In this order the
    /// names come in theirs: `a`, `a-b`, `a/b`.
    fn add_repositories(
        &self,
        dir: &Path,
        prefix: &str,
        after: &str,
        limit: usize,
        page: &mut Page,
    ) -> Result<bool> {
        let mut done: Option<String> = None;
        loop {
            let mut keys = Smallest::new(KEYS_MAX);
            each_dir(dir, |name| {
                let itself = format!("{prefix}{name}");
                // What is no name of ours, the layout's own directories included, leads to no repository.
                if RepoName::parse(&itself).is_none() {
                    return;
                }
                let below = format!("{itself}/");
                let is_due = |key: &str| done.as_deref().is_none_or(|done| key > done);
                if itself.as_str() > after && is_due(&itself) {
                    keys.add(&itself);
                }
                if (below.as_str() > after || after.starts_with(&below)) && is_due(&below) {
                    keys.add(&below);
                }
            })?;
            let (keys, all) = keys.into_sorted();
            for key in &keys {
                let has_room = match key.strip_suffix('/') {
                    Some(name) => {
                        let dir = dir.join(name.strip_prefix(prefix).unwrap_or(name));
                        self.add_repositories(&dir, key, after, limit, page)?
                    }
                    None => match RepoName::parse(key) {
                        Some(repo) if self.is_repo(&repo) => page.add(key.clone(), limit),
                        _ => true,
                    },
                };
                if !has_room {
                    return Ok(false);
                }
            }
            if all {
                return Ok(true);
            }
            done = keys.into_iter().next_back();
        }
    }
}

/// Calls `visit` with the name of every directory in `dir`; returns whether it is there.
fn each_dir(dir: &Path, mut visit: impl FnMut(&str)) -> Result<bool> {
    let fail = |error| Error::at("cannot list", dir)(error);
    let Some(entries) = found(fs::read_dir(dir)).map_err(fail)? else { return Ok(false) };
    for entry in entries {
        let entry = entry.map_err(fail)?;
        if let Some(name) = entry.file_name().to_str()
            && entry.file_type().map_err(fail)?.is_dir()
        {
            visit(name);
        }
    }
    Ok(true)
}

/// Keeps the first of many names.
struct Smallest {
    max: usize,
    names: BinaryHeap<String>,
    all: bool,
}

impl Smallest {
    fn new(max: usize) -> Self {
        Self { max, names: BinaryHeap::new(), all: true }
    }

    fn add(&mut self, name: &str) {
        if self.names.len() == self.max {
            self.all = false;
            if self.names.peek().is_none_or(|last| name > last.as_str()) {
                return;
            }
            self.names.pop();
        }
        self.names.push(name.to_owned());
    }

    /// Returns the names in order, and whether they are all there were.
    fn into_sorted(self) -> (Vec<String>, bool) {
        (self.names.into_sorted_vec(), self.all)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::digest::Algorithm;
    use crate::storage::testing::storage;
    use crate::store::Manifest;

    fn make_repository(storage: &Storage, name: &str, kind: &str) {
        fs::create_dir_all(storage.layout.repositories().join(name).join(kind)).unwrap();
    }

    #[test]
    fn a_directory_of_more_names_than_are_held_is_listed_whole() {
        let (_root, storage) = storage();
        let names: BTreeSet<String> = (0..KEYS_MAX).map(|n| format!("n{}", n * 7919 % KEYS_MAX)).collect();
        names.iter().for_each(|name| make_repository(&storage, name, "_layers"));
        let page = storage.repositories(None, usize::MAX).unwrap();
        assert_eq!(page, Page { names: names.into_iter().collect(), more: false });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn pages_together_are_what_a_sorted_set_holds(
            names in proptest::collection::btree_set("[ab](-?[ab]|\\.b){0,1}(/[ab](-?b){0,1}){0,3}", 0..30),
            limit in 1..7usize,
            start in "[ab](-[ab])?(/[ab])?",
        ) {
            let (_root, storage) = storage();
            names.iter().for_each(|name| make_repository(&storage, name, "_manifests"));
            let mut after = Some(start.clone());
            let mut listed = Vec::new();
            loop {
                let page = storage.repositories(after.as_deref(), limit).unwrap();
                prop_assert!(page.names.len() <= limit);
                prop_assert!(!page.more || page.names.len() == limit);
                listed.extend(page.names.iter().cloned());
                match page.more {
                    true => after = page.names.last().cloned(),
                    false => break,
                }
            }
            prop_assert_eq!(listed, names.into_iter().filter(|name| *name > start).collect::<Vec<_>>());
        }
    }

    #[test]
    fn tags_that_name_nothing_are_passed_over_in_every_page() {
        let (_root, storage) = storage();
        let repo = RepoName::parse("r").unwrap();
        let bytes = bytes::Bytes::from_static(b"{}");
        let digest = Digest::of(Algorithm::Sha256, &bytes);
        for n in 0..20 {
            let tag = format!("t{n:02}");
            if n % 3 == 0 {
                fs::create_dir_all(storage.layout.tags(&repo).join(&tag).join("current")).unwrap();
                continue;
            }
            let manifest = Manifest { digest: digest.clone(), bytes: bytes.clone(), media_type: "x".into() };
            storage.put_manifest(&repo, manifest, &[Tag::parse(&tag).unwrap()], None).unwrap();
        }
        let page = storage.tags(&repo, Some("t02"), 3).unwrap().unwrap();
        assert_eq!(page, Page { names: ["t04", "t05", "t07"].map(String::from).to_vec(), more: true });
        let page = storage.tags(&repo, Some("t13"), 4).unwrap().unwrap();
        assert_eq!(
            page,
            Page { names: ["t14", "t16", "t17", "t19"].map(String::from).to_vec(), more: false }
        );
        assert!(storage.tags(&repo, Some("t19"), 1).unwrap().unwrap().names.is_empty());
    }
}
