//! Claims: what somebody is about to build on, said to the run that is on.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::time::Instant;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use uuid::Uuid;

use super::Bucket;
use super::keys::digest_of;
use crate::digest::Digest;
use crate::lock;
use crate::s3::{self, Put};

/// Claims that are written at a time for one who pushes.
const AT_ONCE_MAX: usize = 16;
/// Claims of this replica that are remembered; when there are more, all are forgotten.
const REMEMBERED_MAX: usize = 100_000;

/// The claims that this replica has written in the last run it knew of, and when each was there.
#[derive(Debug, Default)]
pub(super) struct Claims(Mutex<Remembered>);

#[derive(Debug, Default)]
struct Remembered {
    run: Uuid,
    there: HashMap<Digest, Instant>,
}

impl Claims {
    /// Whether all were claimed in a run before `since`.
    pub(super) fn were_there(&self, run: Uuid, digests: &[Digest], since: Instant) -> bool {
        let remembered = lock(&self.0);
        let was_there = |digest| remembered.there.get(digest).is_some_and(|there| *there <= since);
        digests.is_empty() || remembered.run == run && digests.iter().all(was_there)
    }

    fn lacks(&self, run: Uuid, digests: &[Digest]) -> HashSet<Digest> {
        let remembered = lock(&self.0);
        let is_there = |digest| remembered.run == run && remembered.there.contains_key(digest);
        digests.iter().filter(|digest| !is_there(digest)).cloned().collect()
    }

    fn remember(&self, run: Uuid, digests: HashSet<Digest>) {
        let now = Instant::now();
        let mut remembered = lock(&self.0);
        if remembered.run != run || remembered.there.len() >= REMEMBERED_MAX {
            *remembered = Remembered { run, there: HashMap::new() };
        }
        remembered.there.extend(digests.into_iter().map(|digest| (digest, now)));
    }
}

impl Bucket {
    /// Claims what this replica has not claimed yet in the run.
    pub(super) async fn claim(&self, run: Uuid, digests: &[Digest]) -> s3::Result<()> {
        let lacks = self.claims.lacks(run, digests);
        let puts = lacks.iter().map(|digest| {
            let key = self.keys.claim(run, digest);
            async move { self.client.put(&key, Bytes::new(), Put::default()).await.map(drop) }
        });
        stream::iter(puts).buffer_unordered(AT_ONCE_MAX).try_collect::<()>().await?;
        self.claims.remember(run, lacks);
        Ok(())
    }

    /// Lists what is claimed in a run.
    pub(super) async fn claimed(&self, run: Uuid) -> s3::Result<HashSet<Digest>> {
        let prefix = self.keys.claims(run);
        let (mut claimed, mut pages) = (HashSet::new(), self.client.pages(&prefix, None));
        while let Some(page) = pages.try_next().await? {
            claimed.extend(page.iter().filter_map(|(key, _)| digest_of(key.strip_prefix(&prefix)?)));
        }
        Ok(claimed)
    }
}
