//! Rules about repositories and tags by the patterns of their names: what is kept, and what never changes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::names::{RepoName, Tag};
use crate::units::Time;

/// A pattern of names: `*` stands for any characters but `/`, `**` for any characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(Box<str>),
    /// `*`
    Within,
    /// `**`
    Across,
}

impl Pattern {
    /// Whether a name is of this pattern. Takes time in proportion to the product of both lengths at most.
    pub fn matches(&self, name: &str) -> bool {
        // The positions in the name that the parts so far can reach.
        let mut reached = vec![false; name.len() + 1];
        reached[0] = true;
        for part in &self.0 {
            let mut next = vec![false; name.len() + 1];
            match part {
                Part::Text(text) => {
                    for at in (0..name.len()).filter(|at| reached[*at]) {
                        if name.as_bytes()[at..].starts_with(text.as_bytes()) {
                            next[at + text.len()] = true;
                        }
                    }
                }
                Part::Within | Part::Across => {
                    let mut open = false;
                    for (at, reached) in reached.iter().enumerate() {
                        let is_stopped = at > 0 && *part == Part::Within && name.as_bytes()[at - 1] == b'/';
                        open = *reached || open && !is_stopped;
                        next[at] = open;
                    }
                }
            }
            reached = next;
        }
        reached[name.len()]
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/*".contains(&byte);
        if text.is_empty() || text.len() > 255 || !text.bytes().all(is_known) {
            return Err(format!(
                "{text:?} is no pattern of names: use the characters of names, `*` for a part of a component, `**` for any"
            ));
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let end = rest.find('*').unwrap_or(rest.len());
            let stars = rest[end..].bytes().take_while(|byte| *byte == b'*').count();
            if end > 0 {
                parts.push(Part::Text(rest[..end].into()));
            }
            match stars {
                0 => {}
                1 => parts.push(Part::Within),
                _ => parts.push(Part::Across),
            }
            rest = &rest[end + stars..];
        }
        Ok(Self(parts))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|part| match part {
            Part::Text(text) => f.write_str(text),
            Part::Within => f.write_str("*"),
            Part::Across => f.write_str("**"),
        })
    }
}

/// Tags of repositories.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Tags {
    pub repositories: Pattern,
    #[serde(default = "any")]
    pub tags: Pattern,
}

fn any() -> Pattern {
    Pattern(vec![Part::Across])
}

/// What is kept of the repositories of a pattern. Of several rules the first that fits a repository counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Retention {
    pub repositories: Pattern,
    /// Tags of these patterns stay.
    #[serde(default)]
    pub keep_tags: Vec<Pattern>,
    /// So many others stay, those pushed last.
    pub keep_newest: Option<usize>,
    /// Others that were pushed within this time stay. Without this and `keep_newest` all tags stay.
    pub keep_younger: Option<Time>,
    /// Manifests that no tag names, and no manifest that stays refers to, go after this time; never without it.
    pub untagged_after: Option<Time>,
}

impl Retention {
    /// Whether any tag can go by this rule.
    pub(crate) fn limits_tags(&self) -> bool {
        self.keep_newest.is_some() || self.keep_younger.is_some()
    }
}

/// All rules of one registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Rules {
    pub retention: Vec<Retention>,
    /// What no retention takes.
    pub pinned: Vec<Tags>,
    /// Tags that never name anything else, and cannot be deleted, nor what they name; no retention takes them either.
    pub immutable: Vec<Tags>,
    /// Repositories whose manifests may refer to what is not there. Not in files of rules.
    #[serde(skip)]
    pub sparse_manifests: Vec<Pattern>,
}

impl Rules {
    /// Every key, as it is written in a file.
    pub const EXAMPLE: &str = r#"
# What is kept, what never changes. In patterns * stands for any characters but /, ** for any.
rules:
  # What is kept of a repository; the first rule that fits it counts. Without keep-newest and keep-younger all tags stay,
  # without untagged-after all manifests.
  retention:
    - repositories: ci/**
      # these stay
      keep-tags: [v*, latest]
      # of the others those pushed last
      keep-newest: 10
      # and those pushed within this time
      keep-younger: 30d
      # manifests without a tag go when nobody has touched them for so long
      untagged-after: 7d
  # No retention takes these tags, nor what they name.
  pinned:
    - repositories: golden/*
      tags: "**"
  # Pinned, and never changed nor deleted by anybody.
  immutable:
    - repositories: "**"
      tags: v*
"#;

    pub(crate) fn is_immutable(&self, repo: &RepoName, tag: &Tag) -> bool {
        fits(&self.immutable, repo, tag)
    }

    /// Whether any tag of a repository may be immutable.
    pub(crate) fn may_be_immutable(&self, repo: &RepoName) -> bool {
        self.immutable.iter().any(|tags| tags.repositories.matches(repo.as_str()))
    }

    pub(crate) fn is_pinned(&self, repo: &RepoName, tag: &Tag) -> bool {
        fits(&self.pinned, repo, tag) || self.is_immutable(repo, tag)
    }

    pub(crate) fn may_be_sparse(&self, repo: &RepoName) -> bool {
        self.sparse_manifests.iter().any(|repositories| repositories.matches(repo.as_str()))
    }

    pub(crate) fn retention_of(&self, repo: &RepoName) -> Option<&Retention> {
        self.retention.iter().find(|rule| rule.repositories.matches(repo.as_str()))
    }
}

fn fits(rules: &[Tags], repo: &RepoName, tag: &Tag) -> bool {
    rules.iter().any(|rule| rule.repositories.matches(repo.as_str()) && rule.tags.matches(tag.as_str()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn patterns_match_names() {
        for (pattern, good, bad) in [
            ("vi/*", &["vi/a", "vi/"][..], &["vi/a/b", "vi", "xvi/a"][..]),
            ("vi/**", &["vi/a", "vi/a/b"], &["vi", "vd/a"]),
            ("**", &["a", "a/b", ""], &[]),
            ("*/base", &["a/base"], &["a/b/base", "base"]),
            ("**/base", &["a/base", "a/b/base"], &["base", "a/based"]),
            ("v*.*-rc*", &["v1.2-rc", "v1.2-rc1"], &["v1-rc1", "1.2-rc"]),
            ("exact", &["exact"], &["exactly", "inexact"]),
            ("a*a", &["aa", "aba", "aaa"], &["a", "ab"]),
        ] {
            let parsed: Pattern = pattern.parse().unwrap();
            assert_eq!(parsed.to_string(), pattern);
            for name in good {
                assert!(parsed.matches(name), "{pattern} {name}");
            }
            for name in bad {
                assert!(!parsed.matches(name), "{pattern} {name}");
            }
        }
        for bad in ["", "a b", "ä", "a?", &"a".repeat(256)] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
    }

    /// What a pattern means, without any thought of time.
    fn matches(pattern: &[u8], name: &[u8]) -> bool {
        match pattern {
            [] => name.is_empty(),
            [b'*', b'*', rest @ ..] => (0..=name.len()).any(|at| matches(rest, &name[at..])),
            [b'*', rest @ ..] => (0..=name.len())
                .take_while(|at| *at == 0 || name[at - 1] != b'/')
                .any(|at| matches(rest, &name[at..])),
            [byte, rest @ ..] => name.first() == Some(byte) && matches(rest, &name[1..]),
        }
    }

    proptest! {
        #[test]
        fn patterns_mean_what_they_say(pattern in "[ab/*]{1,8}", name in "[ab/]{0,10}") {
            let parsed: Pattern = pattern.parse().unwrap();
            prop_assert_eq!(parsed.matches(&name), matches(parsed.to_string().as_bytes(), name.as_bytes()));
        }
    }

    #[test]
    fn rules_are_read_as_they_are_written() {
        let rules: Rules = serde_json::from_value(serde_json::json!({
            "retention": [{"repositories": "ci/**", "keep-tags": ["v*"], "keep-newest": 5, "untagged-after": "7d"}],
            "pinned": [{"repositories": "golden/*"}],
            "immutable": [{"repositories": "**", "tags": "v*"}],
        }))
        .unwrap();
        let (repo, tag) = (RepoName::parse("golden/a").unwrap(), |text| Tag::parse(text).unwrap());
        assert!(rules.is_pinned(&repo, &tag("any")) && !rules.is_immutable(&repo, &tag("any")));
        assert!(rules.is_immutable(&RepoName::parse("x").unwrap(), &tag("v1")));
        assert_eq!(rules.retention_of(&RepoName::parse("ci/a/b").unwrap()).unwrap().keep_newest, Some(5));
        assert_eq!(rules.retention_of(&repo), None);
        for bad in [r#"{"retain": []}"#, r#"{"retention": [{"repositories": "a", "untagged-after": "7"}]}"#] {
            assert!(serde_json::from_str::<Rules>(bad).is_err(), "{bad}");
        }
    }
}
