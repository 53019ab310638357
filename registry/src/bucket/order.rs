//! Pages of names in lexical order, made of keys in the order of their bytes.
//!
//! The key of a name goes on with a slash, and `-` and `.` are less than that: a bucket lists `a-b/...` before `a/...`. So what comes
//! is held until nothing less can come, which are the beginnings of its name: of `a-b.c` that is `a` and `a-b`. Where they are
//! few they are asked for, so that a page of a large list takes a small part of it.

use std::collections::BTreeSet;

use futures_util::future::try_join_all;

use crate::names::{RepoName, Tag};
use crate::store::Page;

/// Names that are asked for at the same time, so that no more need be listed.
const DOUBTS_MAX: usize = 16;
/// Longest name, bytes; what is longer is cut before it goes into a request.
const NAME_BYTES_MAX: usize = 255;

/// What is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    /// A tag has keys `<tag>/...`.
    Tags,
    /// A repository has keys `<name>/_...`, behind those of repositories below it that begin with a digit.
    Repositories,
}

/// A part of a list.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) names: Vec<String>,
    /// Behind which position the list goes on; all names with a key up to there have come. `None` is the end.
    pub(super) next: Option<String>,
}

impl Names {
    /// Makes the page of up to `limit` names behind `after`.
    ///
    /// `list` gives what has keys behind a position, in the order of the keys; `exists` tells whether there is one of a name.
    pub(super) async fn page<E>(
        self,
        after: &str,
        limit: usize,
        list: impl AsyncFn(&str) -> Result<Listed, E>,
        exists: impl AsyncFn(&str) -> Result<bool, E>,
    ) -> Result<Page, E> {
        let wanted = limit.saturating_add(1);
        let mut found = BTreeSet::new();
        let mut position = start(after).to_owned();
        loop {
            let Listed { names, next } = list(&position).await?;
            found.extend(names.into_iter().filter(|name| name.as_str() > after));
            while found.len() > wanted {
                found.pop_last();
            }
            // A store that does not go on would be asked for ever.
            let Some(next) = next.filter(|next| *next > position) else { break };
            position = next;
            if found.len() < wanted {
                continue;
            }
            let Some(doubts) = self.doubts(&found, after, &position) else { continue };
            let asked = doubts.into_iter().map(async |name| Ok((exists(&name).await?, name)));
            let there = try_join_all(asked).await?.into_iter().filter(|(is_there, _)| *is_there);
            found.extend(there.map(|(_, name)| name));
            break;
        }
        let mut page = Page::default();
        let _ = found.into_iter().try_for_each(|name| page.add(name, limit).then_some(()).ok_or(()));
        Ok(page)
    }

    /// Returns what may still come, though it belongs between the names that were found; `None` if that is too much to ask for.
    fn doubts(self, found: &BTreeSet<String>, after: &str, position: &str) -> Option<BTreeSet<String>> {
        let mut doubts = BTreeSet::new();
        for lesser in found.iter().flat_map(|name| self.lesser(name)) {
            if lesser > after && !self.is_passed(lesser, position) && !found.contains(lesser) {
                doubts.insert(lesser.to_owned());
                if doubts.len() > DOUBTS_MAX {
                    return None;
                }
            }
        }
        Some(doubts)
    }

    /// The names that are less than this one, and whose keys come later.
    fn lesser(self, name: &str) -> impl Iterator<Item = &str> {
        let ends = name.char_indices().skip(1).filter(move |(at, char)| match (self, char) {
            (_, '-' | '.') => true,
            (Self::Repositories, '/') => name[at + 1..].starts_with(|next: char| next.is_ascii_digit()),
            _ => false,
        });
        ends.map(|(at, _)| &name[..at]).filter(move |name| match self {
            Self::Tags => Tag::parse(name).is_some(),
            Self::Repositories => RepoName::parse(name).is_some(),
        })
    }

    /// Whether a name would have come, if there were one, before the list reached a position.
    fn is_passed(self, name: &str, position: &str) -> bool {
        let first_key = match self {
            Self::Tags => format!("{name}/"),
            Self::Repositories => format!("{name}/_"),
        };
        first_key.as_str() <= position
    }
}

/// The position that what comes behind `after` has its keys behind; `after` is from outside, and may be no name at all.
fn start(after: &str) -> &str {
    let is_of_names = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-/".contains(byte);
    let length = after.bytes().take(NAME_BYTES_MAX).take_while(|byte| is_of_names(byte)).count();
    &after[..length]
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::convert::Infallible;
    use std::ops::Bound;

    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    /// Keys as a bucket has them, listed in pages of so many.
    struct Keys {
        of: Names,
        keys: BTreeSet<String>,
        page: usize,
        asked: Cell<usize>,
    }

    impl Keys {
        fn new(of: Names, names: &BTreeSet<String>, page: usize) -> Self {
            let ends: &[&str] = match of {
                Names::Tags => &["/current/link", "/index/sha256/ab/link"],
                Names::Repositories => &["/_layers/sha256/ab/link", "/_manifests/tags/a/current/link"],
            };
            let keys = names.iter().flat_map(|name| ends.iter().map(move |end| format!("{name}{end}")));
            Self { of, keys: keys.collect(), page, asked: Cell::default() }
        }

        fn list(&self, position: &str) -> Listed {
            self.asked.set(self.asked.get() + 1);
            let mut behind = self.keys.range::<str, _>((Bound::Excluded(position), Bound::Unbounded));
            let mut listed = Listed::default();
            for key in behind.by_ref().take(self.page) {
                let (end, behind) = match self.of {
                    Names::Tags => ("/", "0"),
                    Names::Repositories => ("/_", "/`"),
                };
                let name = key.split_once(end).unwrap().0;
                listed.names.push(name.to_owned());
                listed.next = Some(format!("{name}{behind}"));
            }
            if behind.next().is_none() {
                listed.next = None;
            }
            listed
        }

        fn page(&self, after: &str, limit: usize) -> Page {
            let list = async |position: &str| Ok::<_, Infallible>(self.list(position));
            let exists = async |name: &str| {
                self.asked.set(self.asked.get() + 1);
                Ok(self.keys.iter().any(|key| {
                    key.strip_prefix(name)
                        .is_some_and(|rest| rest.starts_with("/_") || rest.starts_with("/current"))
                }))
            };
            self.of.page(after, limit, list, exists).now_or_never().unwrap().unwrap()
        }
    }

    fn assert_pages(keys: &Keys, names: &BTreeSet<String>, limit: usize, start: &str) {
        let mut after = start.to_owned();
        let mut listed = Vec::new();
        loop {
            let page = keys.page(&after, limit);
            assert!(page.names.len() == limit || !page.more);
            listed.extend(page.names.iter().cloned());
            match page.names.last() {
                Some(last) if page.more => after.clone_from(last),
                _ => break,
            }
        }
        let expected: Vec<_> = names.iter().filter(|name| name.as_str() > start).cloned().collect();
        assert_eq!(listed, expected);
    }

    proptest! {
        #[test]
        fn pages_of_repositories_are_what_a_sorted_set_holds(
            names in proptest::collection::btree_set("[a1](-{1,2}[a1]|\\.1){0,2}(/[a1](-?[a1]|\\.a|__1){0,2}){0,3}", 0..40),
            (limit, page) in (1..9usize, 1..20usize),
            start in "([a1]([-./][a1]){0,3}|[ -~é]{0,4})",
        ) {
            assert_pages(&Keys::new(Names::Repositories, &names, page), &names, limit, &start);
        }

        #[test]
        fn pages_of_tags_are_what_a_sorted_set_holds(
            names in proptest::collection::btree_set("[a1_]([-.]{0,2}[aB1_]){0,4}[-.]?", 0..60),
            (limit, page) in (1..9usize, 1..20usize),
            start in "([a1]([-.][aB1]){0,3}|[ -~é]{0,4})",
        ) {
            assert_pages(&Keys::new(Names::Tags, &names, page), &names, limit, &start);
        }
    }

    #[test]
    fn a_page_of_many_tags_takes_few_requests() {
        let names: BTreeSet<String> = (0..20_000).map(|n| format!("build-{}.{n}", n % 7)).collect();
        let keys = Keys::new(Names::Tags, &names, 1000);
        for after in ["", "build-3.9999"] {
            keys.asked.set(0);
            assert_eq!(keys.page(after, 100).names.len(), 100);
            assert!(keys.asked.get() <= 10, "{} requests", keys.asked.get());
        }
        keys.asked.set(0);
        assert_eq!(keys.page("", usize::MAX).names.len(), names.len());
        // Each has two keys, which a list with a delimiter does not show.
        assert!(keys.asked.get() <= 40, "{} requests", keys.asked.get());
    }
}
