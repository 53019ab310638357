//! What a replica knows of collections, and how what places a link goes by it.
//!
//! ```text
//!  place ──> view ──none──────────────────────────────> act, signed with the time of the view
//!              └───a run is on──> claim ──> view anew ──> act: what is condemned is not there
//!                                  ^                       │
//!                                  └── another run ────────┴── too late: decide again
//! ```

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Mutex;
use uuid::Uuid;

use super::Bucket;
use super::condemned::{self, LIST_BYTES_MAX, List};
use super::run::Phase;
use crate::digest::Digest;
use crate::names::RepoName;
use crate::s3::{self, Kind, Validity};
use crate::store::{self, Error};

/// How often something is decided again whose requests came after their time.
const DECISIONS_MAX: u32 = 5;
/// How often the state is read again, or what is needed is claimed again, since the run has gone on meanwhile.
const LOOKS_MAX: u32 = 8;

/// What was last read of the state of the run. Who holds it reads for all who wait.
#[derive(Debug, Default)]
pub(super) struct Views(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    view: Option<View>,
    /// When the last reading began that failed.
    failed: Option<Instant>,
}

/// The state of the run at one time.
#[derive(Clone, Debug)]
pub(super) struct View {
    validity: Validity,
    /// When it was asked for.
    begun: Instant,
    phase: Phase,
    list: Arc<List>,
    /// Why nothing changes, if the registry moves.
    forbidden: Option<Arc<str>>,
}

impl View {
    /// That of the requests that are decided by it, and place a link.
    pub(super) fn validity(&self) -> Validity {
        self.validity
    }

    /// Whether the blob, or what this repository has of it, is about to be removed: then it is not there.
    pub(super) fn is_condemned(&self, repo: &RepoName, digest: &Digest) -> bool {
        self.list.has(repo, digest)
    }

    fn round(&self) -> Option<(Uuid, u32)> {
        match self.phase {
            Phase::Condemned { run, round } => Some((run, round)),
            Phase::None | Phase::Marking { .. } => None,
        }
    }
}

impl Bucket {
    /// Returns what is known of the run, or was a few seconds ago.
    pub(super) async fn view(&self) -> s3::Result<View> {
        self.view_since(None).await
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
        digests: &[Digest],
        act: impl AsyncFn(&View) -> s3::Result<T>,
    ) -> s3::Result<T> {
        let (mut count, mut since) = (1, None);
        loop {
            let view = self.view_to_place(digests, since).await?;
            match act(&view).await {
                Err(error) if error.kind() == Kind::Expired && count < DECISIONS_MAX => count += 1,
                done => return done,
            }
            since = Some(Instant::now());
        }
    }

    /// Waits until neither the blob nor what the repository has of it is condemned any more: it is removed by then, or was spared.
    /// When the replica that removes it has died, this one does so in its place.
    ///
    /// # Errors
    /// [`store::Kind::Unavailable`] when that takes too long.
    pub(super) async fn wait_until_removed(&self, repo: &RepoName, digest: &Digest) -> store::Result<()> {
        let begun = Instant::now();
        let mut view = self.view().await?;
        while view.is_condemned(repo, digest) {
            if begun.elapsed() > self.options.timing.patience() {
                let why =
                    "what is pushed is being collected, and that does not come to its end; push it again";
                return Err(Error::of(
                    store::Kind::Unavailable,
                    why,
                    std::io::ErrorKind::TimedOut.to_string(),
                ));
            }
            // A round that is on ends sooner, or its replica is not well.
            if begun.elapsed() > self.options.timing.validity {
                self.end_dead_round().await?;
            }
            tokio::time::sleep(self.options.timing.view_age / 4).await;
            view = self.view_since(Some(Instant::now())).await?;
        }
        Ok(())
    }

    /// Returns a view that is good to place links to the digests, claiming them if a run is on.
    async fn view_to_place(&self, digests: &[Digest], since: Option<Instant>) -> s3::Result<View> {
        let mut view = self.view_since(since).await?;
        for _ in 0..LOOKS_MAX {
            if let Some(why) = &view.forbidden
                && !self.frozen.is_ours()
            {
                return Err(self.client.error(
                    Kind::Unavailable,
                    "change what goes by",
                    &self.keys.moved(),
                    &**why,
                ));
            }
            let Some(run) = view.phase.run() else { return Ok(view) };
            if self.claims.were_there(run, digests, view.begun) {
                return Ok(view);
            }
            self.claim(run, digests).await?;
            view = self.view_since(Some(Instant::now())).await?;
        }
        let why = "one collection follows the other too fast for a claim";
        Err(self.client.error(Kind::Unavailable, "claim by", &self.keys.run(), why))
    }

    /// Returns a view that was asked for since then, or, without that, is young enough.
    async fn view_since(&self, since: Option<Instant>) -> s3::Result<View> {
        let asked = Instant::now();
        let mut known = self.views.0.lock().await;
        let is_good = |view: &&View| match since {
            Some(since) => view.begun >= since,
            None => view.begun.elapsed() < self.options.timing.view_age,
        };
        if let Some(view) = known.view.as_ref().filter(is_good) {
            return Ok(view.clone());
        }
        if known.failed.is_some_and(|begun| begun >= asked) {
            // Each of those who waited would wait for its own time-out else, one after the other.
            let why = "it could not be read just now";
            return Err(self.client.error(Kind::Unavailable, "get", &self.keys.run(), why));
        }
        let begun = Instant::now();
        match self.read_view(begun, known.view.as_ref()).await {
            Ok(view) => Ok(known.view.insert(view).clone()),
            Err(error) => {
                known.failed = Some(begun);
                Err(error)
            }
        }
    }

    async fn read_view(&self, begun: Instant, last: Option<&View>) -> s3::Result<View> {
        let from = self.client.server_now().await?.earliest;
        let validity = Validity { from, lasts: self.options.timing.validity };
        for _ in 0..LOOKS_MAX {
            let (run, note) = futures_util::try_join!(self.read_run(), self.read_moved())?;
            let forbidden: Option<Arc<str>> = note.and_then(|note| note.forbids(from)).map(Into::into);
            let phase = run.phase;
            let Phase::Condemned { run, round } = phase else {
                return Ok(View { validity, begun, phase, list: Arc::default(), forbidden });
            };
            // A round's list never changes.
            if let Some(last) = last.filter(|last| last.round() == Some((run, round))) {
                return Ok(View { validity, begun, phase, list: Arc::clone(&last.list), forbidden });
            }
            match self.read_condemned(run, round).await {
                Ok(all) => {
                    let list = Arc::new(all.iter().collect());
                    return Ok(View { validity, begun, phase, list, forbidden });
                }
                // The round was over between the two.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        let why = "one collection follows the other too fast for a look at it";
        Err(self.client.error(Kind::Unavailable, "get", &self.keys.run(), why))
    }

    /// Reads what a round condemns.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if the run is over.
    pub(super) async fn read_condemned(
        &self,
        run: Uuid,
        round: u32,
    ) -> s3::Result<Vec<condemned::Condemned>> {
        let key = self.keys.condemned(run, round);
        let object = self.client.get(&key, LIST_BYTES_MAX).await?;
        let all = std::str::from_utf8(&object.content).ok().and_then(condemned::read);
        let why = "it has lines that this version does not know; let all replicas be of one version";
        all.ok_or_else(|| self.client.error(Kind::Other, "understand", &key, why))
    }
}
