//! Work on a registry beside its requests: on a schedule, or because somebody asks for it.
//!
//! ```text
//!  schedule ──┐
//!  signal ────┼──> Registry::perform ──> store; storage for a search for damage
//!  control ───┘     (blocks)             a socket in the root directory, see control.rs; or the command opens the
//!                                        directory itself when nobody serves it
//! ```

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use croner::Cron;
use serde::{Deserialize, Serialize};

use crate::names::{Reference, RepoName};
use crate::place::Opened;
use crate::storage::Storage;
use crate::storage::scrub::{self, Pass};
use crate::store::ChangeError;
use crate::store::collect::{Counts, Options};
use crate::{Error, Limits, Place, Registry, Result, migrate};

/// Pause before a schedule is looked at again that has no next time.
const NEVER_PAUSE: Duration = Duration::from_secs(86_400);
/// Pause before a search for damage goes on that failed.
const FAILURE_PAUSE: Duration = Duration::from_secs(3600);
/// Pause between two searches for damage, at least.
const SCRUB_PAUSE_MIN: Duration = Duration::from_millis(100);

/// Something to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Task {
    /// Removes garbage, or only tells what would be removed.
    Collect {
        #[serde(default)]
        dry_run: bool,
    },
    /// Deletes a tag, a manifest by its digest, or, without a reference, all of a repository.
    Remove { repository: String, reference: Option<String> },
    /// Copies all into another place, and has that served.
    Migrate {
        to: Box<Place>,
        /// Whether what is there alone is removed.
        #[serde(default)]
        prune: bool,
        /// Whether this place is served all the same.
        #[serde(default)]
        copy_only: bool,
    },
    /// Reads all blobs, and puts those aside that are damaged.
    Scrub {
        /// Bytes per second, at most.
        #[serde(default)]
        rate: Option<u64>,
    },
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Collected(Collected),
    /// So many tags or manifests are gone.
    Removed(u64),
    Scrubbed(Scrubbed),
    Migrated(Migrated),
}

/// What a registry that was moved has copied.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Migrated {
    /// Where it is now, or was only copied to.
    pub to: String,
    /// Whether it is served from there.
    pub switched: bool,
    /// What was not there before.
    pub manifests: u64,
    pub tags: u64,
    pub blobs: u64,
    /// Bytes that were read, also of blobs that were copied by pieces.
    pub bytes: u64,
    /// Tags and manifests that only the target had.
    pub removed: u64,
    /// How long changes had to wait.
    pub paused_seconds: f64,
    pub seconds: f64,
}

/// What a search for damage has found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Scrubbed {
    pub blobs: u64,
    pub bytes: u64,
    /// Blobs that are damaged and were put aside.
    pub damaged: u64,
    pub seconds: f64,
}

/// What a collection has found and removed; a dry run has removed nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Collected {
    pub dry_run: bool,
    /// Repositories, manifests and blobs that were looked at.
    pub repositories: u64,
    pub manifests: u64,
    pub blobs: u64,
    /// Tags and manifests that the rules do not keep.
    pub removed_tags: u64,
    pub removed_manifests: u64,
    /// Links of repositories to blobs that none of their manifests refers to.
    pub removed_links: u64,
    /// Blobs that no repository has.
    pub removed_blobs: u64,
    /// Uploads in which nothing happened for long.
    pub removed_uploads: u64,
    /// Repositories that had nothing any more.
    pub removed_repositories: u64,
    /// Bytes of the removed blobs and uploads.
    pub freed_bytes: u64,
    pub seconds: f64,
}

/// Shared by the one who does a task and those who watch it.
#[derive(Clone, Debug, Default)]
pub struct Watch(Arc<Watched>);

#[derive(Debug, Default)]
struct Watched {
    stop: Arc<AtomicBool>,
    task: OnceLock<Task>,
    counts: Counts,
    scrubbed: scrub::Counts,
    moved: migrate::Counts,
    begun: OnceLock<Instant>,
}

impl Watch {
    /// Asks the task to end soon.
    pub fn stop(&self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }

    /// Watches another task, which the same request ends.
    fn another(&self) -> Self {
        Self(Arc::new(Watched { stop: Arc::clone(&self.0.stop), ..Watched::default() }))
    }

    fn is_stopped(&self) -> bool {
        self.0.stop.load(Ordering::Relaxed)
    }

    /// Tells in a few words how far the task is.
    pub fn progress(&self) -> String {
        let Watched { counts, scrubbed, moved, begun, task, .. } = &*self.0;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        if let Some(Task::Scrub { .. }) = task.get() {
            let [blobs, bytes, damaged] = [&scrubbed.blobs, &scrubbed.bytes, &scrubbed.damaged].map(get);
            return format!("{blobs} blobs, {bytes} bytes; {damaged} are damaged");
        }
        if let Some(Task::Migrate { .. }) = task.get() {
            let copied = &moved.copied;
            let mib = get(&copied.bytes) as f64 / f64::from(1 << 20);
            let seconds = begun.get().map_or(0.0, |begun| begun.elapsed().as_secs_f64());
            return format!(
                "{}: looked at {} repositories; copied {} manifests, {} tags, {} blobs, {mib:.1} MiB, {:.1} MiB/s",
                moved.phase(),
                get(&copied.repositories),
                get(&copied.manifests),
                get(&copied.tags),
                get(&copied.blobs),
                mib / seconds.max(0.001),
            );
        }
        format!(
            "{} repositories, {} manifests, {} blobs; {} blobs and {} bytes are garbage",
            get(&counts.repositories),
            get(&counts.manifests),
            get(&counts.blobs),
            get(&counts.removed_blobs),
            get(&counts.freed_bytes)
        )
    }
}

/// When something is done, as five fields of cron in UTC; see crontab(5).
#[derive(Clone, Debug)]
pub struct Schedule {
    text: String,
    cron: Cron,
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let cron =
            text.parse().map_err(|error| format!("{text:?} is no schedule such as `0 2 * * *`: {error}"))?;
        Ok(Self { text: text.to_owned(), cron })
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Schedule {
    /// How long it is until the next time; `None` if there is none.
    fn until_next(&self) -> Option<Duration> {
        let now = chrono::Utc::now();
        let next = self.cron.find_next_occurrence(&now, false).ok()?;
        (next - now).to_std().ok()
    }
}

impl Registry {
    /// Does a task to its end. Blocks.
    ///
    /// # Errors
    /// When the task is running already, is stopped, or the filesystem fails.
    pub fn perform(&self, task: &Task, watch: &Watch) -> Result<Outcome> {
        let _ = watch.0.task.set(task.clone());
        let _ = watch.0.begun.set(Instant::now());
        match task {
            Task::Collect { dry_run } => self.collect(*dry_run, watch).map(Outcome::Collected),
            Task::Migrate { to, prune, copy_only } => {
                self.migrate(to, *prune, *copy_only, watch).map(Outcome::Migrated)
            }
            Task::Scrub { rate } => self.scrub(*rate, watch).map(Outcome::Scrubbed),
            Task::Remove { repository, reference } => {
                self.remove(repository, reference.as_deref()).map(Outcome::Removed)
            }
        }
    }

    fn migrate(&self, to: &Place, prunes: bool, copy_only: bool, watch: &Watch) -> Result<Migrated> {
        let invalid = |why: &str| Error::Invalid { why: why.to_owned() };
        if self.app.cache.is_some() && !copy_only {
            return Err(invalid(
                "what is fetched from upstreams belongs to this directory: end without `upstream` and `cache`, or say --copy-only",
            ));
        }
        let begun = Instant::now();
        let Watched { stop, moved, .. } = &*watch.0;
        let failed = |source| Error::Task { source: Box::new(source) };
        // What a replica of the target keeps on its disk belongs to where that is started.
        let limits = Limits { read_cache_bytes: None, ..self.limits.clone() };
        let Opened { store, .. } = to.open(self.collection.grace, &limits)?;
        let place = to.to_string();
        let options = migrate::Options { prunes, switches: !copy_only };
        migrate::migrate(&self.served, &store, &place, options, moved, stop).map_err(failed)?;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let copied = &moved.copied;
        let done = Migrated {
            to: place,
            switched: !copy_only,
            manifests: get(&copied.manifests),
            tags: get(&copied.tags),
            blobs: get(&copied.blobs),
            bytes: get(&copied.bytes),
            removed: get(&copied.removed),
            paused_seconds: get(&moved.paused_ms) as f64 / 1000.0,
            seconds: begun.elapsed().as_secs_f64(),
        };
        tracing::info!(
            to = done.to,
            switched = done.switched,
            blobs = done.blobs,
            bytes = done.bytes,
            paused_seconds = done.paused_seconds,
            seconds = done.seconds,
            "the registry is copied"
        );
        Ok(done)
    }

    /// Keeps the mirror like what is served; never ends.
    pub(crate) async fn keep_mirror(self) {
        if let Some(mirror) = self.mirror.clone() {
            let (served, stop) = (Arc::clone(&self.served), Arc::clone(&self.background.0.stop));
            // Should it panic, the log tells, and its metrics stand still.
            let _ = tokio::task::spawn_blocking(move || mirror.run(&served, &stop)).await;
        }
        std::future::pending().await
    }

    fn remove(&self, repository: &str, reference: Option<&str>) -> Result<u64> {
        let invalid = |why: String| Error::Invalid { why };
        let repo = RepoName::parse(repository)
            .ok_or_else(|| invalid(format!("{repository:?} is not the name of a repository")))?;
        let reference =
            reference.map(Reference::parse).transpose().map_err(|error| invalid(error.to_string()))?;
        let removed = self.app.store.remove(&repo, reference.as_ref(), &self.app.rules);
        removed.map(|removed| removed.count).map_err(|error| match error {
            ChangeError::Immutable { tag, .. } => {
                invalid(format!("the tag {tag} of {repo} is immutable; change the rules first"))
            }
            error => Error::Task { source: Box::new(error) },
        })
    }

    fn scrub(&self, rate: Option<u64>, watch: &Watch) -> Result<Scrubbed> {
        let Some(directory) = &self.directory else {
            let why = "a bucket's content is not read for damage: its store does that, and each blob is checked as it is read";
            return Err(Error::Invalid { why: why.to_owned() });
        };
        self.refuse_moved()?;
        let begun = Instant::now();
        let Watched { stop, scrubbed, .. } = &*watch.0;
        let done = directory.scrub(&Pass { rate, counts: scrubbed, stop });
        done.map_err(|error| Error::Task { source: Box::new(error) })?;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (blobs, bytes, damaged) = (get(&scrubbed.blobs), get(&scrubbed.bytes), get(&scrubbed.damaged));
        Ok(Scrubbed { blobs, bytes, damaged, seconds: begun.elapsed().as_secs_f64() })
    }

    /// Fails when the directory is not what is served any more.
    fn refuse_moved(&self) -> Result<()> {
        match self.served.has_moved() {
            true => Err(Error::Invalid {
                why: "the registry was moved: start it with its new settings".to_owned(),
            }),
            false => Ok(()),
        }
    }

    fn collect(&self, dry_run: bool, watch: &Watch) -> Result<Collected> {
        let begun = Instant::now();
        let options = Options {
            rules: Arc::clone(&self.app.rules),
            upload_age: self.collection.upload_age,
            dry_run,
            removals_per_second: self.collection.removals_per_second,
        };
        let Watched { stop, counts, .. } = &*watch.0;
        let done = self.app.store.collect(&options, counts, stop);
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let collected = Collected {
            dry_run,
            repositories: get(&counts.repositories),
            manifests: get(&counts.manifests),
            blobs: get(&counts.blobs),
            removed_tags: get(&counts.removed_tags),
            removed_manifests: get(&counts.removed_manifests),
            removed_links: get(&counts.removed_links),
            removed_blobs: get(&counts.removed_blobs),
            removed_uploads: get(&counts.removed_uploads),
            removed_repositories: get(&counts.removed_repositories),
            freed_bytes: get(&counts.freed_bytes),
            seconds: begun.elapsed().as_secs_f64(),
        };
        // One that finds another running has not been one.
        if !dry_run && !matches!(done, Ok(None)) {
            self.app.metrics.collected(&collected, done.is_ok());
        }
        match done {
            Ok(Some(())) => Ok(collected),
            Ok(None) => Err(Error::Busy { what: "a collection" }),
            Err(error) => Err(Error::Task { source: Box::new(error) }),
        }
    }

    /// Collects garbage now, in the background, and logs what became of it.
    pub fn collect_in_background(&self) {
        let registry = self.clone();
        tokio::task::spawn_blocking(move || registry.collect_and_log());
    }

    fn collect_and_log(&self) {
        match self.collect(false, &self.background.another()) {
            Ok(done) => tracing::info!(
                blobs = done.blobs,
                removed_tags = done.removed_tags,
                removed_manifests = done.removed_manifests,
                removed_blobs = done.removed_blobs,
                removed_links = done.removed_links,
                removed_uploads = done.removed_uploads,
                freed_bytes = done.freed_bytes,
                seconds = done.seconds,
                "garbage collected"
            ),
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "garbage is not collected")
            }
        }
    }

    /// Reads all blobs again and again, to find damage; never ends.
    pub(crate) async fn keep_scrubbing(self) {
        let (Some(rate), Some(directory)) = (self.scrub.rate, self.directory.clone()) else {
            return std::future::pending().await;
        };
        tokio::time::sleep(self.scrub.delay).await;
        loop {
            let running = Arc::clone(&self.scrubbing).lock_owned().await;
            let (registry, directory) = (self.clone(), Arc::clone(&directory));
            let pause = tokio::task::spawn_blocking(move || {
                let pause = registry.scrub_and_log(&directory, rate);
                // Whoever waits for its end may then open the directory.
                drop((registry, directory));
                drop(running);
                pause
            });
            tokio::time::sleep(pause.await.unwrap_or(FAILURE_PAUSE)).await;
        }
    }

    /// Goes on with the search for damage and returns how long it is until the next.
    fn scrub_and_log(&self, directory: &Storage, rate: u64) -> Duration {
        if self.served.has_moved() {
            return NEVER_PAUSE;
        }
        let watch = self.background.another();
        let Watched { stop, scrubbed, .. } = &*watch.0;
        let pass = Pass { rate: Some(rate), counts: scrubbed, stop };
        match directory.scrub_on(&pass, self.scrub.period) {
            Ok(pause) => {
                let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
                let (blobs, damaged) = (get(&scrubbed.blobs), get(&scrubbed.damaged));
                if blobs > 0 {
                    tracing::info!(
                        blobs,
                        bytes = get(&scrubbed.bytes),
                        damaged,
                        "all blobs have been read for damage"
                    );
                }
                // Not at once again, even when a pass takes longer than the period.
                pause.max(SCRUB_PAUSE_MIN)
            }
            Err(_) if watch.is_stopped() => FAILURE_PAUSE,
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "blobs cannot be read for damage");
                FAILURE_PAUSE
            }
        }
    }

    /// Waits for the end of a search for damage that was told to stop.
    pub(crate) async fn scrubbing_ended(&self) {
        let _ended = self.scrubbing.lock().await;
    }

    /// Collects garbage whenever its time has come; never ends.
    pub(crate) async fn keep_schedule(self) {
        let Some(schedule) = self.collection.schedule.clone() else { return std::future::pending().await };
        loop {
            match schedule.until_next() {
                Some(pause) => {
                    // The clock may be set meanwhile, so that it is asked again before the time has come.
                    tokio::time::sleep(pause.min(NEVER_PAUSE)).await;
                    if pause <= NEVER_PAUSE {
                        let registry = self.clone();
                        let _ = tokio::task::spawn_blocking(move || registry.collect_and_log()).await;
                    }
                }
                None => tokio::time::sleep(NEVER_PAUSE).await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_are_those_of_cron() {
        let nightly: Schedule = "0 2 * * *".parse().unwrap();
        assert!(nightly.until_next().unwrap() <= Duration::from_secs(86_400));
        assert_eq!(nightly.to_string(), "0 2 * * *");
        let never: Schedule = "0 0 31 2 *".parse().unwrap();
        assert!(never.until_next().is_none_or(|pause| pause > NEVER_PAUSE));
        for bad in ["", "every night", "61 * * * *", "* * * *"] {
            assert!(bad.parse::<Schedule>().is_err(), "{bad}");
        }
    }
}
