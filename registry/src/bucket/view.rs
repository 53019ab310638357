//! What a replica knows of collections, and how what places a link goes by it.

use crate::digest::Digest;
use crate::names::RepoName;
use crate::s3::{self, Kind, Validity};
use crate::store::Result;

use super::Bucket;

/// How often something is decided again whose requests came after their time.
const DECISIONS_MAX: u32 = 5;

/// What was last read of the state of the run.
#[derive(Debug, Default)]
pub(super) struct Views {}

/// The state of the run at one time.
#[derive(Clone, Debug)]
pub(super) struct View {
    validity: Validity,
}

impl View {
    /// That of the requests that are decided by it, and place a link.
    pub(super) fn validity(&self) -> Validity {
        self.validity
    }

    /// Whether the blob, or this repository's link to it, is about to be removed: then it is not there.
    pub(super) fn is_condemned(&self, _repo: &RepoName, _digest: &Digest) -> bool {
        false
    }
}

impl Bucket {
    /// Returns what is known of the run, or was a few seconds ago.
    pub(super) async fn view(&self) -> s3::Result<View> {
        let now = self.client.server_now().await?;
        Ok(View { validity: Validity { from: now.earliest, lasts: self.options.timing.validity } })
    }

    /// Decides, and places links to blobs of these digests. While a run is on they are claimed first.
    ///
    /// `act` does so by the view that it gets, and signs the requests that place links with its validity; when one of them comes too
    /// late, it is called again with another view.
    ///
    /// # Errors
    /// Those of `act`; when it comes too late every time.
    pub(super) async fn place<T>(
        &self,
        _digests: &[Digest],
        act: impl AsyncFn(&View) -> s3::Result<T>,
    ) -> s3::Result<T> {
        let mut count = 1;
        loop {
            let view = self.view().await?;
            match act(&view).await {
                Err(error) if error.kind() == Kind::Expired && count < DECISIONS_MAX => count += 1,
                done => return done,
            }
        }
    }

    /// Waits until the link and the blob are not condemned any more: they are removed by then, or were spared.
    pub(super) async fn wait_until_removed(&self, _repo: &RepoName, _digest: &Digest) -> Result<()> {
        Ok(())
    }
}
