//! Where everything lies below the root directory.
//!
//! ```text
//! docker/registry/v2/                          shared with CNCF distribution, byte for byte
//!   blobs/<alg>/<2 hex>/<hex>/data             content, immutable
//!   repositories/<name>/
//!     _layers/<alg>/<hex>/link                 the repository has the blob
//!     _manifests/revisions/<alg>/<hex>/link    the repository has the manifest
//!     _manifests/tags/<tag>/current/link       what the tag names
//!     _manifests/tags/<tag>/index/<alg>/<hex>/link  what it named before
//!     _uploads/<uuid>/                         an upload session: data, startedat, hashstates/<alg>/<offset>,
//!                                              and ours alone: boot
//! dvcr/                                        ours alone; all but `lock` and `moved` can be rebuilt or thrown away; with `events` go webhooks' events
//!   lock                                       held by the process that serves the directory
//!   tmp/                                       files on their way to their place; emptied at start
//!   referrers/<name>/_subjects/<alg>/<hex>/<alg>-<hex>  empty files: subject / manifest that refers to it
//!   quarantine/<alg>/<hex>                     damaged content, taken from its place
//!   scrub                                      how far the search for damage is
//!   moved                                      where the content has gone to, when it is not served from here any more
//!   cached                                     prefixes of the repositories that are fetched from elsewhere
//!   events/<name>/                             what a webhook is still to be told
//! ```

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::digest::Digest;
use crate::names::{RepoName, Tag};

/// Builds the paths of one root directory.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    root: PathBuf,
    v2: PathBuf,
}

impl Layout {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), v2: root.join("docker/registry/v2") }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("dvcr/lock")
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.root.join("dvcr/tmp")
    }

    pub(crate) fn quarantine(&self) -> PathBuf {
        self.root.join("dvcr/quarantine")
    }

    pub(crate) fn quarantined(&self, digest: &Digest) -> PathBuf {
        join(&self.root, &["dvcr/quarantine", digest.algorithm().name(), digest.hex()])
    }

    pub(crate) fn cached(&self) -> PathBuf {
        self.root.join("dvcr/cached")
    }

    pub(crate) fn moved(&self) -> PathBuf {
        self.root.join("dvcr/moved")
    }

    pub(crate) fn scrub_cursor(&self) -> PathBuf {
        self.root.join("dvcr/scrub")
    }

    pub(crate) fn events(&self) -> PathBuf {
        self.root.join("dvcr/events")
    }

    /// What a replica keeps of a bucket.
    pub(crate) fn read_cache(&self) -> PathBuf {
        self.root.join("dvcr/read-cache")
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.v2.join("blobs")
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        join(&self.v2, &["blobs", digest.algorithm().name(), &hex[..2], hex, "data"])
    }

    pub(crate) fn repositories(&self) -> PathBuf {
        self.v2.join("repositories")
    }

    pub(crate) fn repo(&self, repo: &RepoName) -> PathBuf {
        join(&self.v2, &["repositories", repo.as_str()])
    }

    pub(crate) fn layers(&self, repo: &RepoName) -> PathBuf {
        join(&self.v2, &["repositories", repo.as_str(), "_layers"])
    }

    pub(crate) fn layer_link(&self, repo: &RepoName, digest: &Digest) -> PathBuf {
        let (alg, hex) = (digest.algorithm().name(), digest.hex());
        join(&self.v2, &["repositories", repo.as_str(), "_layers", alg, hex, "link"])
    }

    pub(crate) fn revisions(&self, repo: &RepoName) -> PathBuf {
        join(&self.v2, &["repositories", repo.as_str(), "_manifests/revisions"])
    }

    pub(crate) fn revision_link(&self, repo: &RepoName, digest: &Digest) -> PathBuf {
        let (alg, hex) = (digest.algorithm().name(), digest.hex());
        join(&self.v2, &["repositories", repo.as_str(), "_manifests/revisions", alg, hex, "link"])
    }

    pub(crate) fn tags(&self, repo: &RepoName) -> PathBuf {
        join(&self.v2, &["repositories", repo.as_str(), "_manifests/tags"])
    }

    pub(crate) fn tag(&self, repo: &RepoName, tag: &Tag) -> PathBuf {
        join(&self.v2, &["repositories", repo.as_str(), "_manifests/tags", tag.as_str()])
    }

    pub(crate) fn tag_current_link(&self, repo: &RepoName, tag: &Tag) -> PathBuf {
        join(&self.v2, &["repositories", repo.as_str(), "_manifests/tags", tag.as_str(), "current/link"])
    }

    pub(crate) fn uploads(&self, repo: &RepoName) -> PathBuf {
        join(&self.v2, &["repositories", repo.as_str(), "_uploads"])
    }

    pub(crate) fn upload(&self, repo: &RepoName, id: Uuid) -> PathBuf {
        let mut buffer = Uuid::encode_buffer();
        let id: &str = id.hyphenated().encode_lower(&mut buffer);
        join(&self.v2, &["repositories", repo.as_str(), "_uploads", id])
    }

    pub(crate) fn referrers(&self, repo: &RepoName, subject: &Digest) -> PathBuf {
        let (alg, hex) = (subject.algorithm().name(), subject.hex());
        join(&self.root, &["dvcr/referrers", repo.as_str(), "_subjects", alg, hex])
    }

    pub(crate) fn referrer(&self, repo: &RepoName, subject: &Digest, referrer: &Digest) -> PathBuf {
        let name = format!("{}-{}", referrer.algorithm().name(), referrer.hex());
        self.referrers(repo, subject).join(name)
    }
}

/// The path of a link inside a tag's directory, below `index/`.
pub(crate) fn tag_index_link(tag_dir: &Path, digest: &Digest) -> PathBuf {
    join(tag_dir, &["index", digest.algorithm().name(), digest.hex(), "link"])
}

/// Joins with one allocation; paths are built several times per request.
fn join(base: &Path, parts: &[&str]) -> PathBuf {
    let length = parts.iter().map(|part| part.len() + 1).sum::<usize>();
    let mut path = PathBuf::with_capacity(base.as_os_str().len() + length);
    path.push(base);
    path.extend(parts);
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_distribution() {
        let layout = Layout::new(Path::new("/r"));
        let repo = RepoName::parse("vi/ns/disk").unwrap();
        let hex = "ab".repeat(32);
        let digest: Digest = format!("sha256:{hex}").parse().unwrap();
        let tag = Tag::parse("v1").unwrap();
        let v2 = "/r/docker/registry/v2";
        let of_repo = format!("{v2}/repositories/vi/ns/disk");
        for (path, expected) in [
            (layout.blob(&digest), format!("{v2}/blobs/sha256/ab/{hex}/data")),
            (layout.layer_link(&repo, &digest), format!("{of_repo}/_layers/sha256/{hex}/link")),
            (
                layout.revision_link(&repo, &digest),
                format!("{of_repo}/_manifests/revisions/sha256/{hex}/link"),
            ),
            (layout.tag_current_link(&repo, &tag), format!("{of_repo}/_manifests/tags/v1/current/link")),
            (
                tag_index_link(&layout.tag(&repo, &tag), &digest),
                format!("{of_repo}/_manifests/tags/v1/index/sha256/{hex}/link"),
            ),
            (
                layout.upload(&repo, Uuid::nil()),
                format!("{of_repo}/_uploads/00000000-0000-0000-0000-000000000000"),
            ),
        ] {
            assert_eq!(path, PathBuf::from(expected));
        }
    }
}
