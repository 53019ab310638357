//! Pages of tags and of repositories.

use super::Bucket;
use crate::names::RepoName;
use crate::store::{Error, Page, Result};

impl Bucket {
    pub(super) async fn tags(
        &self,
        _repo: &RepoName,
        _after: Option<&str>,
        _limit: usize,
    ) -> Result<Option<Page>> {
        Err(Error::other("not built"))
    }

    pub(super) async fn repositories(&self, _after: Option<&str>, _limit: usize) -> Result<Page> {
        Err(Error::other("not built"))
    }
}
