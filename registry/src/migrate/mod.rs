//! Moving a registry from one store into another while it serves, and keeping a second store like the first.
//!
//! ```text
//!  requests ──> served ──┬──> the store they see ── everything, then what changed ──> copy ──> the other store
//!                        │        ^ gate                         pass, crew
//!                        └────────┴── closed ── the rest ── note ── switch ── open
//! ```
//!
//! A copy is of content: blobs, manifests and tags come through the same methods that pushes come through, and so each blob is
//! hashed as it is written. When what is left to copy takes seconds, changes have to wait, the rest is copied, the source notes
//! where it has gone to, and everybody goes on with the target. `docs/registry-migrate.md` tells operators how.

mod copy;
mod crew;
mod mirror;
mod pass;
mod served;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) use mirror::{Mirror, Seen};
pub(crate) use served::Served;

use crate::lock;
use crate::store::{Error, Kind, Result, Store};
use copy::Copier;
use pass::Pass;
use served::{Change, Changes};

/// What has changed is copied as often before changes have to wait, at most.
const ROUNDS_MAX: u32 = 10;
/// Nobody needs to wait longer than this for what one more round would copy beforehand.
const SHORT: Duration = Duration::from_secs(2);
/// How long a freeze lasts that is not renewed, and how often it is.
const FREEZE: Duration = Duration::from_secs(60);
const FREEZE_RENEWAL: Duration = Duration::from_secs(15);
/// What is told by name of what is wrong.
const NAMED_MAX: usize = 5;

/// How a registry is moved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// Whether what the target has and the source has not is removed.
    pub(crate) prunes: bool,
    /// Whether the target is served in the end.
    pub(crate) switches: bool,
}

/// How far it is.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) copied: copy::Counts,
    phase: AtomicU8,
    /// How long changes had to wait, milliseconds.
    pub(crate) paused_ms: AtomicU64,
}

/// What is being done.
#[derive(Clone, Copy, Debug)]
enum Phase {
    Copying,
    CatchingUp,
    Verifying,
    Switching,
}

impl Counts {
    fn set(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Tells what is being done.
    pub(crate) fn phase(&self) -> &'static str {
        let phases = [Phase::Copying, Phase::CatchingUp, Phase::Verifying, Phase::Switching];
        match phases.into_iter().find(|phase| *phase as u8 == self.phase.load(Ordering::Relaxed)) {
            Some(Phase::CatchingUp) => "copying what has changed meanwhile",
            Some(Phase::Verifying) => "verifying",
            Some(Phase::Switching) => "switching, changes wait",
            Some(Phase::Copying) | None => "copying",
        }
    }
}

/// Copies all that is served to `to`, and has that served in its place. `place` is what operators know it by.
///
/// # Errors
/// When a store fails, something in the source is damaged, or the target has what the source has not. The source is served
/// then as before, and the same again goes on.
pub(crate) fn migrate(
    served: &Served,
    to: &Arc<dyn Store>,
    place: &str,
    options: Options,
    counts: &Counts,
    stop: &AtomicBool,
) -> Result<()> {
    if served.has_moved() {
        return Err(moved_before());
    }
    let from = served.current();
    let changes = served.observe();
    let copier = Copier::new(from, to, &counts.copied, stop);
    let pass = Pass { copier: &copier, looks_at_all: false, prunes: options.prunes };
    let mut extra = pass.everything()?;
    extra.extend(catch_up(pass, &changes, counts)?);
    refuse(pass, extra)?;
    // All that only the target has from here on has gone from the source meanwhile.
    let pass = Pass { prunes: true, ..pass };
    counts.set(Phase::Verifying);
    Pass { looks_at_all: true, ..pass }.everything()?;
    catch_up(pass, &changes, counts)?;
    refuse(pass, BTreeSet::new())?;
    if !options.switches {
        return Ok(());
    }
    counts.set(Phase::Switching);
    let begun = Instant::now();
    let switched = switch(served, place, pass, &changes);
    let paused = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    counts.paused_ms.store(paused, Ordering::Relaxed);
    switched
}

fn moved_before() -> Error {
    let what = "the registry was moved since it was started";
    Error::of(Kind::Other, what, "start it with its new settings first")
}

/// Copies what has changed, until what is left takes a moment; returns what the target has and the source has not.
fn catch_up(pass: Pass<'_>, changes: &Changes, counts: &Counts) -> Result<BTreeSet<Change>> {
    let mut extra = BTreeSet::new();
    for _ in 0..ROUNDS_MAX {
        if changes.pending().0 == 0 {
            break;
        }
        counts.set(Phase::CatchingUp);
        let begun = Instant::now();
        extra.extend(copy_changes(pass, changes)?);
        if begun.elapsed() < SHORT {
            break;
        }
    }
    Ok(extra)
}

/// Copies what has changed up to now.
fn copy_changes(pass: Pass<'_>, changes: &Changes) -> Result<BTreeSet<Change>> {
    let noted = changes.take();
    let done = match noted.is_all {
        true => pass.everything(),
        false => pass.changes(&noted).map(|()| BTreeSet::new()),
    };
    if done.is_err() {
        changes.put_back(noted);
    }
    done
}

/// Tells what keeps a copy from being one.
fn refuse(pass: Pass<'_>, extra: BTreeSet<Change>) -> Result<()> {
    let damaged = pass.copier.damaged();
    if !damaged.is_empty() {
        let named = damaged.iter().map(|(digest, repo)| format!("{digest} of {repo}"));
        let what = format!("{} blobs of the source are damaged: {}", damaged.len(), some(named));
        return Err(Error::of(
            Kind::Other,
            what,
            "push them again, or delete what refers to them, and go on",
        ));
    }
    let extra = pass.still_extra(extra)?;
    if !extra.is_empty() {
        let count = extra.len();
        let what = format!(
            "the target has {count} tags and manifests that the source has not: {}",
            some(extra.into_iter())
        );
        return Err(Error::of(
            Kind::Other,
            what,
            "say --prune to have them removed, or choose an empty target",
        ));
    }
    Ok(())
}

/// The first of many names.
fn some(names: impl Iterator<Item = String>) -> String {
    names.take(NAMED_MAX).collect::<Vec<_>>().join(", ")
}

/// Has changes wait, copies the rest, and goes over to the target.
fn switch(served: &Served, place: &str, pass: Pass<'_>, changes: &Changes) -> Result<()> {
    let Copier { from, to, .. } = *pass.copier;
    let closed = served.close_gate()?;
    from.freeze(FREEZE)?;
    let moved = kept_frozen(pass.copier, || {
        if from.is_remote() {
            // Others may have served it, too.
            pass.everything()?;
        }
        copy_changes(pass, changes)?;
        refuse(pass, BTreeSet::new())
    });
    let moved = moved.and_then(|()| {
        to.note_moved(None)?;
        from.note_moved(Some(place))
    });
    match moved {
        Ok(()) => served.switch(&closed, Arc::clone(to)),
        Err(error) => {
            // It would end by itself, too.
            if let Err(error) = from.note_moved(None) {
                tracing::warn!(%error, "changes wait for another minute");
            }
            Err(error)
        }
    }
}

/// Renews the freeze of the source while `work` goes on; if it cannot be renewed, the work ends.
fn kept_frozen(copier: &Copier<'_>, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let (is_over, over) = (Mutex::new(false), Condvar::new());
    let done = thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                let waited = over.wait_timeout_while(lock(&is_over), FREEZE_RENEWAL, |is_over| !*is_over);
                if *waited.unwrap_or_else(PoisonError::into_inner).0 {
                    return;
                }
                if let Err(error) = copier.from.freeze(FREEZE) {
                    copier.halt(error);
                    return;
                }
            }
        });
        let done = work();
        *lock(&is_over) = true;
        over.notify_all();
        done
    });
    copier.take_halt().map_or(done, Err)
}

#[cfg(test)]
mod tests;
