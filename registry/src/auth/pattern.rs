//! Which repositories a token is about.

use crate::names::RepoName;

/// One repository (`vi/team/disk`), all directly below a path (`vi/team/*`), or all that are below it at all (`vi/team/**`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Granted {
    One(RepoName),
    Children(RepoName),
    Below(RepoName),
}

impl Granted {
    /// Reads the name that a token grants: cleaned first, as one cleans a path. `None` if it can match no repository;
    /// `*` and `**` alone are such ones, so that all repositories are never granted by a slip.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (repos, name): (fn(RepoName) -> Self, _) = match name.rsplit_once('/') {
            Some((above, "*")) => (Self::Children, above),
            Some((above, "**")) => (Self::Below, above),
            _ => (Self::One, name),
        };
        RepoName::parse(&clean(name)).map(repos)
    }

    pub(crate) fn matches(&self, name: &RepoName) -> bool {
        let below = |above: &RepoName| name.as_str().strip_prefix(above.as_str())?.strip_prefix('/');
        match self {
            Self::One(one) => one == name,
            Self::Children(above) => below(above).is_some_and(|rest| !rest.contains('/')),
            Self::Below(above) => below(above).is_some(),
        }
    }
}

/// Resolves `.`, `..` and doubled slashes by the text alone. What leads above its root, or has one, is no repository's
/// name afterwards.
pub(super) fn clean(name: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." if kept.last().is_some_and(|last| *last != "..") => drop(kept.pop()),
            part => kept.push(part),
        }
    }
    let root = if name.starts_with('/') { "/" } else { "" };
    format!("{root}{}", kept.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> RepoName {
        RepoName::parse(text).unwrap()
    }

    #[test]
    fn names_of_grants_are_cleaned() {
        for (granted, matched) in [
            ("a", "a"),
            ("a/b", "a/b"),
            ("a/../b", "b"),
            ("a/./b//c/", "a/b/c"),
            ("./a", "a"),
            ("a/b/../../c", "c"),
            ("vi/x/../ns/*", "vi/ns/disk"),
        ] {
            assert!(Granted::parse(granted).unwrap().matches(&name(matched)), "{granted}");
        }
    }

    #[test]
    fn what_cannot_be_a_repository_grants_nothing() {
        let path = ["", ".", "..", "../a", "a/../..", "a/../../b", "/a", "//a", "A"];
        let stars = ["*", "**", "/*", "/**", "../*", "a/../*", "a*", "*/a", "a/*/b", "a/*/*", "a/***", "*/*"];
        for granted in path.iter().chain(&stars) {
            assert_eq!(Granted::parse(granted), None, "{granted}");
        }
    }

    #[test]
    fn a_path_with_a_star_covers_what_lies_below_it_and_nothing_else() {
        let (children, below) = (Granted::parse("vi/ns/*").unwrap(), Granted::parse("vi/ns/**").unwrap());
        assert!(children.matches(&name("vi/ns/a")) && below.matches(&name("vi/ns/a")));
        assert!(!children.matches(&name("vi/ns/a/b")) && below.matches(&name("vi/ns/a/b")));
        for beside in ["vi/ns", "vi/nsx/a", "vi/ns-x", "vd/ns/a", "vi", "x/vi/ns/a"] {
            assert!(!children.matches(&name(beside)) && !below.matches(&name(beside)), "{beside}");
        }
        let one = Granted::parse("vi/ns").unwrap();
        assert!(one.matches(&name("vi/ns")) && !one.matches(&name("vi/ns/a")));
    }
}
