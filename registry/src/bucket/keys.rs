//! What lies where in the bucket: the layout of a directory, as keys, and what only a bucket has.
//!
//! ```text
//! docker/registry/v2/...                       as in `storage::layout`, but that a session has:
//!   repositories/<name>/_uploads/<uuid>/dvcr       its state
//!   repositories/<name>/_uploads/<uuid>/tail-...   what came behind its last whole part, unless that is short
//!   repositories/<name>/_uploads/<uuid>/data       its parts, where the digest was not known when it began
//! dvcr/
//!   referrers/...                              as in a directory
//!   ready                                      written to see whether the bucket can be
//!   gc/run                                     the state of the collection
//!   gc/lease                                   who collects
//!   gc/<run>/condemned/<round>                 what a round is about to remove
//!   gc/<run>/claims/<alg>-<hex>                what somebody is about to build on
//!   quota/<prefix>/_ledger                     what a prefix of repositories has
//! ```

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::digest::Digest;
use crate::names::{RepoName, Tag};
use crate::storage::layout::{self, Layout};

/// Builds the keys of what lies below the root directory of a bucket.
#[derive(Clone, Debug)]
pub(super) struct Keys(Layout);

impl Default for Keys {
    fn default() -> Self {
        Self(Layout::new(Path::new("")))
    }
}

impl Keys {
    /// What all blobs' keys begin with.
    pub(super) fn blobs(&self) -> String {
        dir(self.0.blobs())
    }

    pub(super) fn blob(&self, digest: &Digest) -> String {
        key(self.0.blob(digest))
    }

    /// What the keys of all repositories begin with.
    pub(super) fn repositories(&self) -> String {
        dir(self.0.repositories())
    }

    /// What all keys of a repository begin with, and of those whose names go on with a slash.
    pub(super) fn repo(&self, repo: &RepoName) -> String {
        dir(self.0.repo(repo))
    }

    pub(super) fn layers(&self, repo: &RepoName) -> String {
        dir(self.0.layers(repo))
    }

    pub(super) fn layer_link(&self, repo: &RepoName, digest: &Digest) -> String {
        key(self.0.layer_link(repo, digest))
    }

    pub(super) fn revisions(&self, repo: &RepoName) -> String {
        dir(self.0.revisions(repo))
    }

    pub(super) fn revision_link(&self, repo: &RepoName, digest: &Digest) -> String {
        key(self.0.revision_link(repo, digest))
    }

    pub(super) fn tags(&self, repo: &RepoName) -> String {
        dir(self.0.tags(repo))
    }

    pub(super) fn tag(&self, repo: &RepoName, tag: &Tag) -> String {
        dir(self.0.tag(repo, tag))
    }

    pub(super) fn tag_current_link(&self, repo: &RepoName, tag: &Tag) -> String {
        key(self.0.tag_current_link(repo, tag))
    }

    pub(super) fn tag_index_link(&self, repo: &RepoName, tag: &Tag, digest: &Digest) -> String {
        key(layout::tag_index_link(&self.0.tag(repo, tag), digest))
    }

    /// What the keys of all sessions of a repository begin with.
    #[cfg(test)]
    pub(super) fn uploads(&self, repo: &RepoName) -> String {
        dir(self.0.uploads(repo))
    }

    /// What the keys of a session begin with.
    pub(super) fn upload(&self, repo: &RepoName, id: Uuid) -> String {
        dir(self.0.upload(repo, id))
    }

    /// What the keys of those that refer to a subject begin with.
    pub(super) fn referrers(&self, repo: &RepoName, subject: &Digest) -> String {
        dir(self.0.referrers(repo, subject))
    }

    /// What the keys of all in a repository that refer to a subject begin with.
    pub(super) fn all_referrers(&self, repo: &RepoName) -> String {
        format!("dvcr/referrers/{repo}/_subjects/")
    }

    /// What the keys of all ledgers of quotas begin with.
    pub(super) fn ledgers(&self) -> String {
        "dvcr/quota/".to_owned()
    }

    /// The ledger of a prefix of repositories, which ends with a slash. No component of a name begins as it does.
    pub(super) fn ledger(&self, prefix: &str) -> String {
        format!("dvcr/quota/{prefix}_ledger")
    }

    /// The prefix whose ledger it is.
    pub(super) fn prefix_of_ledger<'k>(&self, key: &'k str) -> Option<&'k str> {
        key.strip_prefix("dvcr/quota/")?.strip_suffix("_ledger")
    }

    pub(super) fn referrer(&self, repo: &RepoName, subject: &Digest, referrer: &Digest) -> String {
        key(self.0.referrer(repo, subject, referrer))
    }

    /// What all keys of collections begin with.
    pub(super) fn collections(&self) -> String {
        "dvcr/gc/".to_owned()
    }

    /// The state of the run.
    pub(super) fn run(&self) -> String {
        "dvcr/gc/run".to_owned()
    }

    pub(super) fn lease(&self) -> String {
        "dvcr/gc/lease".to_owned()
    }

    /// What the keys of a run begin with.
    pub(super) fn of_run(&self, run: Uuid) -> String {
        format!("dvcr/gc/{}/", run.hyphenated())
    }

    /// The list of what a round condemns.
    pub(super) fn condemned(&self, run: Uuid, round: u32) -> String {
        format!("{}condemned/{round}", self.of_run(run))
    }

    /// What the keys of a run's claims begin with.
    pub(super) fn claims(&self, run: Uuid) -> String {
        format!("{}claims/", self.of_run(run))
    }

    pub(super) fn claim(&self, run: Uuid, digest: &Digest) -> String {
        self.claims(run) + &name_of(digest)
    }

    /// The note that the content goes elsewhere.
    pub(super) fn moved(&self) -> String {
        "dvcr/moved".to_owned()
    }

    /// What is written to see whether the bucket can be.
    pub(super) fn probe(&self) -> String {
        "dvcr/ready".to_owned()
    }
}

/// Names a digest where it is one component: `<alg>-<hex>`.
pub(super) fn name_of(digest: &Digest) -> String {
    format!("{}-{}", digest.algorithm().name(), digest.hex())
}

/// Reads what [`name_of`] wrote.
pub(super) fn digest_of(name: &str) -> Option<Digest> {
    let (algorithm, hex) = name.split_once('-')?;
    format!("{algorithm}:{hex}").parse().ok()
}

/// The path as it is: all its parts have passed a grammar that is within UTF-8.
fn key(path: PathBuf) -> String {
    path.into_os_string().into_string().unwrap_or_else(|path| path.to_string_lossy().into_owned())
}

/// What the keys below a path begin with.
fn dir(path: PathBuf) -> String {
    let mut key = key(path);
    key.push('/');
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_distribution_below_its_root_directory() {
        let (keys, repo) = (Keys::default(), RepoName::parse("vi/ns/disk").unwrap());
        let hex = "ab".repeat(32);
        let digest: Digest = format!("sha256:{hex}").parse().unwrap();
        assert_eq!(keys.blob(&digest), format!("docker/registry/v2/blobs/sha256/ab/{hex}/data"));
        let tag = keys.tag_current_link(&repo, &Tag::parse("v1").unwrap());
        assert_eq!(tag, "docker/registry/v2/repositories/vi/ns/disk/_manifests/tags/v1/current/link");
        assert_eq!(keys.repositories(), "docker/registry/v2/repositories/");
        assert_eq!(digest_of(&name_of(&digest)), Some(digest.clone()));
        for bad in [digest.as_str(), "sha256-", "sha256-ab", &format!("md5-{}", &hex[..32])] {
            assert_eq!(digest_of(bad), None, "{bad}");
        }
        assert!(keys.referrer(&repo, &digest, &digest).starts_with(&keys.all_referrers(&repo)));
    }
}
