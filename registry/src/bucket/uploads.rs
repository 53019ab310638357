//! Upload sessions: parts of a multipart upload, and a state that any replica goes on from.

use std::sync::Arc;

use uuid::Uuid;

use super::Bucket;
use crate::digest::{Algorithm, Digest};
use crate::names::RepoName;
use crate::store::{Error, Intake, Result, Session, UploadError};

/// The sessions that requests of this replica hold.
#[derive(Debug, Default)]
pub(super) struct Held {}

pub(super) struct Upload {
    bucket: Arc<Bucket>,
    id: Uuid,
}

impl Bucket {
    pub(super) async fn begin_upload(&self, _repo: &RepoName, _algorithm: Algorithm) -> Result<Uuid> {
        Err(Error::other("not built"))
    }

    pub(super) fn start_upload(bucket: Arc<Self>, _repo: &RepoName, _algorithm: Algorithm) -> Upload {
        Upload { bucket, id: Uuid::new_v4() }
    }

    pub(super) async fn open_upload(
        self: &Arc<Self>,
        _repo: &RepoName,
        _id: Uuid,
    ) -> Result<Option<Upload>, UploadError> {
        Err(Error::other("not built").into())
    }

    pub(super) async fn upload_offset(&self, _repo: &RepoName, _id: Uuid) -> Result<Option<u64>> {
        Err(Error::other("not built"))
    }
}

impl Session for Upload {
    fn id(&self) -> Uuid {
        self.id
    }

    fn offset(&self) -> u64 {
        0
    }

    fn is_fresh(&self) -> bool {
        true
    }

    fn admits_quickly(&self) -> bool {
        true
    }

    fn admit(&mut self, _length: Option<u64>, _digest: Option<&Digest>) -> Result<()> {
        Ok(())
    }

    fn receive(
        self: Box<Self>,
        _length: u64,
        _digest: Option<&Digest>,
    ) -> Result<Box<dyn Intake>, UploadError> {
        Err(Error::other("not built").into())
    }

    fn commit(self: Box<Self>, _expected: &Digest) -> Result<(), UploadError> {
        Err(Error::other("not built").into())
    }

    fn commit_small(self: Box<Self>, _body: &[u8], _expected: &Digest) -> Result<(), UploadError> {
        Err(Error::other("not built").into())
    }

    fn cancel(self: Box<Self>) -> Result<(), UploadError> {
        Err(Error::other("not built").into())
    }
}
