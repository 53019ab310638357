//! Blobs: found, read, mounted, taken from a repository.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::BoxStream;

use super::Bucket;
use crate::digest::Digest;
use crate::names::RepoName;
use crate::store::{self, Error, Result};

/// A blob that was found.
pub(super) struct Blob {
    pub(super) length: u64,
}

impl Bucket {
    pub(super) async fn claim_blob(&self, _repo: &RepoName, _digest: &Digest) -> Result<Option<u64>> {
        Err(Error::other("not built"))
    }

    pub(super) async fn open_blob(
        self: &Arc<Self>,
        _repo: &RepoName,
        _digest: &Digest,
    ) -> Result<Option<Blob>> {
        Err(Error::other("not built"))
    }

    pub(super) async fn mount_blob(
        &self,
        _from: &RepoName,
        _to: &RepoName,
        _digest: &Digest,
    ) -> Result<Option<u64>> {
        Err(Error::other("not built"))
    }

    pub(super) async fn delete_blob(&self, _repo: &RepoName, _digest: &Digest) -> Result<bool> {
        Err(Error::other("not built"))
    }

    pub(super) async fn probe(&self) -> Result<()> {
        Err(Error::other("not built"))
    }
}

impl store::Blob for Blob {
    fn length(&self) -> u64 {
        self.length
    }

    fn read(self: Box<Self>, _first: u64, _end: u64) -> BoxStream<'static, io::Result<Bytes>> {
        Box::pin(futures_util::stream::empty())
    }
}
