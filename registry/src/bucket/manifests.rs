//! Manifests and tags: read, accepted, removed; and who refers to a manifest.

use std::ops::ControlFlow;

use super::Bucket;
use crate::digest::Digest;
use crate::model::Checked;
use crate::names::{Reference, RepoName, Tag};
use crate::rules::Rules;
use crate::store::{ChangeError, Error, Manifest, Removed, Result};

impl Bucket {
    pub(super) async fn find_manifest(
        &self,
        _repo: &RepoName,
        _reference: &Reference,
    ) -> Result<Option<Manifest>> {
        Err(Error::other("not built"))
    }

    pub(super) async fn accept_manifest(
        &self,
        _repo: &RepoName,
        _manifest: &Manifest,
        _checked: &Checked,
        _tags: &[Tag],
        _rules: &Rules,
    ) -> Result<Vec<Digest>, ChangeError> {
        Err(Error::other("not built").into())
    }

    pub(super) async fn remove(
        &self,
        _repo: &RepoName,
        _reference: Option<&Reference>,
        _rules: &Rules,
    ) -> Result<Removed, ChangeError> {
        Err(Error::other("not built").into())
    }

    pub(super) async fn referrers(
        &self,
        _repo: &RepoName,
        _subject: &Digest,
        _after: Option<&Digest>,
        _visit: &mut dyn FnMut(&Manifest) -> ControlFlow<()>,
    ) -> Result<()> {
        Err(Error::other("not built"))
    }
}
