//! One way through all that two stores have, or through what has changed.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::sync::Mutex;

use super::copy::Copier;
use super::crew::{self, Tasks};
use super::served::{Change, Noted};
use crate::digest::Digest;
use crate::lock;
use crate::names::{Reference, RepoName, Tag};
use crate::store::{Content, Result, Store};

/// Names of one page of a list.
const PAGE_MAX: usize = 1000;
/// Things that the target has and the source has not, of which it is remembered.
const EXTRA_MAX: usize = 100_000;

/// What a pass does.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub(super) copier: &'a Copier<'a>,
    /// Whether also that is looked at which both have: that its length, or its content, is the same.
    pub(super) looks_at_all: bool,
    /// Whether what the target alone has is removed, and not only told.
    pub(super) prunes: bool,
}

enum Task {
    Repository(RepoName),
    Change(Change),
    Remove(RepoName, Reference),
}

impl Pass<'_> {
    /// Goes through everything, and returns the first of what the target has and the source has not, unless it is removed.
    pub(super) fn everything(self) -> Result<BTreeSet<Change>> {
        let extra = Mutex::default();
        let Copier { from, to, counts, .. } = *self.copier;
        crew::work(
            |tasks| {
                let repositories = |store: &dyn Store, after: Option<&RepoName>| {
                    let page = store.repositories(after.map(RepoName::as_str), PAGE_MAX)?;
                    let names = page.names.iter().filter_map(|name| RepoName::parse(name)).collect();
                    Ok((names, page.more))
                };
                merge(
                    |after| repositories(&**from, after),
                    |after| repositories(&**to, after),
                    |repo, of| match of {
                        Of::Target => tasks.put(Task::Repository(repo)),
                        Of::Source | Of::Both => {
                            counts.repositories.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            tasks.put(Task::Repository(repo))
                        }
                    },
                )
            },
            |tasks, task| self.act(tasks, task, &extra),
        )?;
        Ok(extra.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Goes through what has changed.
    pub(super) fn changes(self, noted: &Noted) -> Result<()> {
        // A manifest that goes takes its tags along, so those that have moved come behind.
        let kinds: [fn(&Change) -> bool; 4] = [
            |change| matches!(change, Change::Blob(..)),
            |change| matches!(change, Change::Manifest(..)),
            |change| matches!(change, Change::Repository(_)),
            |change| matches!(change, Change::Tag(..)),
        ];
        for is_of in kinds {
            let pass = Pass { looks_at_all: false, prunes: true, ..self };
            let extra = Mutex::default();
            crew::work(
                |tasks| {
                    noted.changes.iter().filter(|change| is_of(change)).try_for_each(|change| {
                        tasks.put(match change {
                            Change::Repository(repo) => Task::Repository(repo.clone()),
                            change => Task::Change(change.clone()),
                        })
                    })
                },
                |tasks, task| pass.act(tasks, task, &extra),
            )?;
        }
        Ok(())
    }

    fn act(self, tasks: &Tasks<Task>, task: Task, extra: &Mutex<BTreeSet<Change>>) -> Result<()> {
        self.copier.check()?;
        match task {
            Task::Repository(repo) => self.repository(tasks, &repo, extra),
            Task::Change(change) => self.copier.change(&change),
            // It may have come since the lists were read.
            Task::Remove(repo, reference) => match self.copier.from.find_manifest(&repo, &reference)? {
                Some(_) => Ok(()),
                None => self.copier.remove(&repo, &reference),
            },
        }
    }

    fn repository(self, tasks: &Tasks<Task>, repo: &RepoName, extra: &Mutex<BTreeSet<Change>>) -> Result<()> {
        let Copier { from, to, .. } = *self.copier;
        // Whoever lists goes on listing as long as others have nothing to do.
        let give = |task| match tasks.offer(task) {
            Some(task) => self.act(tasks, task, extra),
            None => Ok(()),
        };
        let surplus = |reference: Reference| match self.prunes {
            true => give(Task::Remove(repo.clone(), reference)),
            false => {
                found(
                    extra,
                    match reference {
                        Reference::Tag(tag) => Change::Tag(repo.clone(), tag),
                        Reference::Digest(digest) => Change::Manifest(repo.clone(), digest),
                    },
                );
                Ok(())
            }
        };
        for of in [Content::Manifests, Content::Blobs] {
            let digests = |store: &dyn Store, after: Option<&Digest>| {
                let digests = store.digests(repo, of, after, PAGE_MAX)?;
                let more = digests.len() == PAGE_MAX;
                Ok((digests, more))
            };
            merge(
                |after| digests(&**from, after),
                |after| digests(&**to, after),
                |digest, whose| match (whose, of) {
                    (Of::Both, _) if !self.looks_at_all => Ok(()),
                    (Of::Source | Of::Both, Content::Manifests) => {
                        give(Task::Change(Change::Manifest(repo.clone(), digest)))
                    }
                    (Of::Source | Of::Both, Content::Blobs) => {
                        match self.copier.is_placed(repo, &digest) && !self.looks_at_all {
                            true => Ok(()),
                            false => give(Task::Change(Change::Blob(repo.clone(), digest))),
                        }
                    }
                    (Of::Target, Content::Manifests) => surplus(Reference::Digest(digest)),
                    // Nobody refers to it: it is garbage there.
                    (Of::Target, Content::Blobs) => Ok(()),
                },
            )?;
        }
        let tags = |store: &dyn Store, after: Option<&Tag>| {
            let page = store.tags(repo, after.map(Tag::as_str), PAGE_MAX)?.unwrap_or_default();
            let names = page.names.iter().filter_map(|name| Tag::parse(name)).collect();
            Ok((names, page.more))
        };
        merge(
            |after| tags(&**from, after),
            |after| tags(&**to, after),
            |tag, whose| match whose {
                Of::Target => surplus(Reference::Tag(tag)),
                Of::Source | Of::Both => give(Task::Change(Change::Tag(repo.clone(), tag))),
            },
        )
    }

    /// Looks once more at what the target has and the source did not have, when what has changed since is copied.
    pub(super) fn still_extra(self, extra: BTreeSet<Change>) -> Result<Vec<String>> {
        let Copier { from, to, .. } = *self.copier;
        let mut names = Vec::new();
        for extra in extra {
            let (name, repo, reference) = match extra {
                Change::Tag(repo, tag) => (format!("{repo}:{tag}"), repo, Reference::Tag(tag)),
                Change::Manifest(repo, digest) => {
                    (format!("{repo}@{digest}"), repo, Reference::Digest(digest))
                }
                Change::Blob(..) | Change::Repository(_) => continue,
            };
            if to.find_manifest(&repo, &reference)?.is_some()
                && from.find_manifest(&repo, &reference)?.is_none()
            {
                names.push(name);
            }
        }
        Ok(names)
    }
}

fn found(extra: &Mutex<BTreeSet<Change>>, change: Change) {
    let mut extra = lock(extra);
    if extra.len() < EXTRA_MAX {
        extra.insert(change);
    }
}

/// Who has something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    Source,
    Target,
    Both,
}

/// Goes through two lists that come in order, by pages: what is behind a name, and whether there is more.
fn merge<T: Ord + Clone>(
    source: impl FnMut(Option<&T>) -> Result<(Vec<T>, bool)>,
    target: impl FnMut(Option<&T>) -> Result<(Vec<T>, bool)>,
    mut visit: impl FnMut(T, Of) -> Result<()>,
) -> Result<()> {
    let (mut source, mut target) = (all(source).peekable(), all(target).peekable());
    loop {
        let order = match (source.peek(), target.peek()) {
            (None, None) => return Ok(()),
            (Some(Ok(one)), Some(Ok(other))) => one.cmp(other),
            (Some(_), None) | (Some(Err(_)), _) => Ordering::Less,
            (None, Some(_)) | (_, Some(Err(_))) => Ordering::Greater,
        };
        let (one, of) = match order {
            Ordering::Less => (source.next(), Of::Source),
            Ordering::Greater => (target.next(), Of::Target),
            Ordering::Equal => {
                target.next();
                (source.next(), Of::Both)
            }
        };
        if let Some(one) = one {
            visit(one?, of)?;
        }
    }
}

fn all<T: Clone>(
    mut list: impl FnMut(Option<&T>) -> Result<(Vec<T>, bool)>,
) -> impl Iterator<Item = Result<T>> {
    let (mut page, mut more) = (Vec::new().into_iter(), true);
    let mut last = None;
    std::iter::from_fn(move || {
        loop {
            if let Some(one) = page.next() {
                last = Some(T::clone(&one));
                return Some(Ok(one));
            }
            if !more {
                return None;
            }
            match list(last.as_ref()) {
                Ok((next, goes_on)) => {
                    // A list that says so and brings nothing would be asked for ever.
                    more = goes_on && !next.is_empty();
                    page = next.into_iter();
                }
                Err(error) => {
                    more = false;
                    return Some(Err(error));
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn pages(of: &BTreeSet<u8>, after: Option<&u8>, limit: usize) -> (Vec<u8>, bool) {
        let mut rest = of.iter().filter(|one| after.is_none_or(|after| *one > after)).copied();
        let page: Vec<u8> = rest.by_ref().take(limit).collect();
        (page, rest.next().is_some())
    }

    proptest! {
        #[test]
        fn two_lists_are_gone_through_as_sets(
            one in proptest::collection::btree_set(0..40_u8, 0..30),
            other in proptest::collection::btree_set(0..40_u8, 0..30),
            limit in 1..9_usize,
        ) {
            let mut seen = Vec::new();
            let visit = |name, of| {
                seen.push((name, of));
                Ok(())
            };
            merge(|after| Ok(pages(&one, after, limit)), |after| Ok(pages(&other, after, limit)), visit).unwrap();
            let of = |name: &u8| match (one.contains(name), other.contains(name)) {
                (true, true) => Of::Both,
                (true, false) => Of::Source,
                (false, _) => Of::Target,
            };
            let expected: Vec<_> = one.union(&other).map(|name| (*name, of(name))).collect();
            prop_assert_eq!(seen, expected);
        }
    }

    #[test]
    fn a_list_that_fails_ends_the_way_through_both() {
        let fails = |_: Option<&u8>| Err(crate::store::Error::other("gone"));
        for broken_first in [true, false] {
            let whole = |after: Option<&u8>| Ok(pages(&(0..9).collect(), after, 2));
            let merged = match broken_first {
                true => merge(fails, whole, |_, _| Ok(())),
                false => merge(whole, fails, |_, _| Ok(())),
            };
            merged.unwrap_err();
        }
    }
}
