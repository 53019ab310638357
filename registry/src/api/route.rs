//! From a path to what is asked for.
//!
//! A repository name has any number of components, and may contain `blobs`, `manifests` or `tags` itself: paths are told
//! apart by their last components. They are percent-decoded first; what comes out must follow the grammars of
//! [`crate::names`] and [`crate::digest`], so no encoding leads out of a repository.

use http::Method;
use percent_encoding::percent_decode_str;
use uuid::Uuid;

use super::error::{ApiError, Code};
use crate::digest::Digest;
use crate::metrics::RouteLabel;
use crate::names::{Reference, ReferenceError, RepoName};

/// What a path below `/v2/` names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Base,
    Catalog,
    Blob(RepoName, Digest),
    Uploads(RepoName),
    Upload(RepoName, Uuid),
    Manifest(RepoName, Reference),
    Tags(RepoName),
    Referrers(RepoName, Digest),
}

impl Route {
    pub(crate) fn label(&self) -> RouteLabel {
        match self {
            Self::Base => RouteLabel::Base,
            Self::Catalog => RouteLabel::Catalog,
            Self::Blob(..) => RouteLabel::Blob,
            Self::Uploads(..) | Self::Upload(..) => RouteLabel::Upload,
            Self::Manifest(..) => RouteLabel::Manifest,
            Self::Tags(..) => RouteLabel::Tags,
            Self::Referrers(..) => RouteLabel::Referrers,
        }
    }

    /// The repository that is asked about.
    pub(crate) fn repo(&self) -> Option<&RepoName> {
        match self {
            Self::Base | Self::Catalog => None,
            Self::Blob(repo, _)
            | Self::Uploads(repo)
            | Self::Upload(repo, _)
            | Self::Manifest(repo, _)
            | Self::Tags(repo)
            | Self::Referrers(repo, _) => Some(repo),
        }
    }

    /// The same of another repository.
    pub(crate) fn of(self, repo: RepoName) -> Self {
        match self {
            Self::Base | Self::Catalog => self,
            Self::Blob(_, digest) => Self::Blob(repo, digest),
            Self::Uploads(_) => Self::Uploads(repo),
            Self::Upload(_, id) => Self::Upload(repo, id),
            Self::Manifest(_, reference) => Self::Manifest(repo, reference),
            Self::Tags(_) => Self::Tags(repo),
            Self::Referrers(_, digest) => Self::Referrers(repo, digest),
        }
    }

    /// Reads a path.
    ///
    /// # Errors
    /// 400 for a name, digest or tag against the grammar; 404 for what cannot exist or is no path of this API.
    pub(crate) fn parse(method: &Method, path: &str) -> Result<Self, ApiError> {
        let nowhere = || ApiError::not_found(Code::Unsupported, "this path is not part of the registry API");
        let path = percent_decode_str(path)
            .decode_utf8()
            .map_err(|_| ApiError::bad_request(Code::NameInvalid, "the path is not UTF-8"))?;
        let rest = match path.strip_prefix("/v2") {
            Some("" | "/") => return Ok(Self::Base),
            Some("/_catalog") => return Ok(Self::Catalog),
            Some(rest) => rest.strip_prefix('/').ok_or_else(nowhere)?,
            None => return Err(nowhere()),
        };
        let mut parts = rest.rsplitn(4, '/');
        let (last, before, third, fourth) = (parts.next(), parts.next(), parts.next(), parts.next());
        let (Some(last), Some(before)) = (last, before) else { return Err(nowhere()) };
        // What is left of the path before its last one, two or three components.
        let before_two = rest.len().checked_sub(last.len() + before.len() + 2).map(|end| &rest[..end]);
        let name = before_two.ok_or_else(nowhere)?;
        match (third, before, last) {
            (_, "manifests", reference) => {
                let repo = repo(name)?;
                match Reference::parse(reference) {
                    Ok(reference) => Ok(Self::Manifest(repo, reference)),
                    // No such tag can ever have been pushed: to those who look for it, it is unknown.
                    Err(error @ ReferenceError::Tag(_)) if *method != Method::PUT => {
                        Err(ApiError::not_found(Code::ManifestUnknown, error.to_string()))
                    }
                    Err(error) => Err(error.into()),
                }
            }
            (_, "referrers", digest) => Ok(Self::Referrers(repo(name)?, digest.parse()?)),
            (_, "tags", "list") => Ok(Self::Tags(repo(name)?)),
            (Some("blobs"), "uploads", "") => Ok(Self::Uploads(repo(fourth.ok_or_else(nowhere)?)?)),
            (Some("blobs"), "uploads", id) => {
                let repo = repo(fourth.ok_or_else(nowhere)?)?;
                let id = Uuid::try_parse(id).map_err(|_| upload_unknown())?;
                Ok(Self::Upload(repo, id))
            }
            (_, "blobs", "uploads") => Ok(Self::Uploads(repo(name)?)),
            (_, "blobs", digest) => Ok(Self::Blob(repo(name)?, digest.parse()?)),
            _ => Err(nowhere()),
        }
    }
}

pub(crate) fn upload_unknown() -> ApiError {
    ApiError::not_found(
        Code::BlobUploadUnknown,
        "there is no such upload; it was finished, cancelled or never begun",
    )
}

/// Reads a repository name, from a path or a query.
pub(crate) fn repo(name: &str) -> Result<RepoName, ApiError> {
    RepoName::parse(name).ok_or_else(|| {
        let shown: String = name.chars().take(300).collect();
        ApiError::bad_request(
            Code::NameInvalid,
            format!(
                "{shown:?} is not a repository name; use up to 255 lower-case letters, digits, and `/`, `.`, `_`, `-` \
                 between them"
            ),
        )
    })
}

/// Finds a parameter of a query and decodes it; one with an empty value counts as absent.
pub(crate) fn param(query: Option<&str>, name: &str) -> Option<String> {
    params(query, name).next()
}

/// Finds all parameters of a name. Those that nobody asks for are let be.
pub(crate) fn params<'a>(query: Option<&'a str>, name: &'a str) -> impl Iterator<Item = String> + 'a {
    let pairs = query.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    let values = pairs.filter(move |(key, value)| *key == name && !value.is_empty()).map(|(_, value)| value);
    values.map(|value| percent_decode_str(&value.replace('+', " ")).decode_utf8_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(path: &str) -> Result<Route, ApiError> {
        Route::parse(&Method::GET, path)
    }

    fn name(name: &str) -> RepoName {
        RepoName::parse(name).unwrap()
    }

    #[test]
    fn paths_are_told_apart_from_their_end() {
        let digest: Digest = format!("sha256:{}", "a".repeat(64)).parse().unwrap();
        let id = Uuid::new_v4();
        let latest = || Reference::parse("latest").unwrap();
        for (path, route) in [
            ("/v2".to_owned(), Route::Base),
            ("/v2/".to_owned(), Route::Base),
            ("/v2/_catalog".to_owned(), Route::Catalog),
            (format!("/v2/a/b/blobs/{digest}"), Route::Blob(name("a/b"), digest.clone())),
            (
                format!("/v2/a/blobs/{}", digest.as_str().replace(':', "%3A")),
                Route::Blob(name("a"), digest.clone()),
            ),
            ("/v2/a/blobs/uploads/".to_owned(), Route::Uploads(name("a"))),
            ("/v2/a/blobs/uploads".to_owned(), Route::Uploads(name("a"))),
            (format!("/v2/a/blobs/uploads/{id}"), Route::Upload(name("a"), id)),
            (format!("/v2/a%2Fb/blobs/uploads/{id}"), Route::Upload(name("a/b"), id)),
            ("/v2/a/manifests/latest".to_owned(), Route::Manifest(name("a"), latest())),
            (
                "/v2/x/blobs/uploads/manifests/latest".to_owned(),
                Route::Manifest(name("x/blobs/uploads"), latest()),
            ),
            ("/v2/manifests/manifests/latest".to_owned(), Route::Manifest(name("manifests"), latest())),
            ("/v2/a/manifests/tags/list".to_owned(), Route::Tags(name("a/manifests"))),
            ("/v2/tags/tags/list".to_owned(), Route::Tags(name("tags"))),
            (format!("/v2/blobs/blobs/{digest}"), Route::Blob(name("blobs"), digest.clone())),
            (format!("/v2/a/referrers/{digest}"), Route::Referrers(name("a"), digest.clone())),
        ] {
            assert_eq!(get(&path).unwrap(), route, "{path}");
        }
    }

    #[test]
    fn what_is_malformed_is_refused() {
        for path in [
            "/",
            "/v1/",
            "/v2x",
            "/v2/a",
            "/v2/manifests/x",
            "/v2/blobs/uploads/",
            "/v2//manifests/x",
            "/v2/A/manifests/x",
            "/v2/a/../b/manifests/x",
            "/v2/%2e%2e/manifests/x",
            "/v2/a/blobs/sha256:zz",
            "/v2/a/blobs/uploads/not-a-uuid",
            "/v2/a/manifests/sha256:zz",
            "/v2/%ff/tags/list",
            "/v2/_x/tags/list",
        ] {
            assert!(get(path).is_err(), "{path}");
        }
    }

    #[test]
    fn query_values_are_decoded() {
        let query = Some("n=5&last=a%2Bb&digest=sha256%3Aabc&empty=&mount");
        assert_eq!(param(query, "n").as_deref(), Some("5"));
        assert_eq!(param(query, "last").as_deref(), Some("a+b"));
        assert_eq!(param(query, "digest").as_deref(), Some("sha256:abc"));
        assert_eq!(param(query, "empty"), None);
        assert_eq!(param(query, "mount"), None);
        assert_eq!(param(None, "n"), None);
        let several = Some("tag=a&ns=docker.io&tag=&tag=b%2e1&tag=a");
        assert_eq!(params(several, "tag").collect::<Vec<_>>(), ["a", "b.1", "a"]);
    }
}
