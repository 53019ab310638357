//! Many threads for many small tasks that wait for stores.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;

use tokio::runtime::Handle;

use crate::lock;
use crate::store::{Error, Result};

/// Threads.
const WORKERS: usize = 8;
/// Tasks that wait for one.
const WAITING_MAX: usize = 1024;

/// Tasks for the threads of [`work`].
pub(super) struct Tasks<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    waiting: VecDeque<T>,
    /// Those that threads are at.
    going: usize,
    /// Whether no more come but from tasks.
    is_fed: bool,
    failed: Option<Error>,
}

/// Has `act` done for all tasks that `feed` puts, and those that they offer themselves, by some threads at a time.
///
/// # Errors
/// The first one; tasks that wait then are dropped.
pub(super) fn work<T: Send>(
    feed: impl FnOnce(&Tasks<T>) -> Result<()>,
    act: impl Fn(&Tasks<T>, T) -> Result<()> + Sync,
) -> Result<()> {
    let tasks = Tasks {
        state: Mutex::new(State { waiting: VecDeque::new(), going: 0, is_fed: false, failed: None }),
        changed: Condvar::new(),
    };
    let handle = Handle::current();
    let fed = thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let _entered = handle.enter();
                while let Some(task) = tasks.next() {
                    // Says that it is over also if it panics.
                    let _going = Going(&tasks);
                    if let Err(error) = act(&tasks, task) {
                        tasks.fail(error);
                    }
                }
            });
        }
        let fed = feed(&tasks);
        lock(&tasks.state).is_fed = true;
        tasks.changed.notify_all();
        fed
    });
    let failed = tasks.state.into_inner().unwrap_or_else(PoisonError::into_inner).failed;
    failed.map_or(fed, Err)
}

impl<T> Tasks<T> {
    /// Puts a task for a thread, and waits until there is room.
    ///
    /// # Errors
    /// When one has failed.
    pub(super) fn put(&self, task: T) -> Result<()> {
        let is_full = |state: &mut State<T>| state.waiting.len() >= WAITING_MAX && state.failed.is_none();
        let waited = self.changed.wait_while(lock(&self.state), is_full);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.failed.is_some() {
            return Err(Error::other("stopped, as something else failed"));
        }
        state.waiting.push_back(task);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Gives a task to another thread, or back, if all have enough to do.
    pub(super) fn offer(&self, task: T) -> Option<T> {
        let mut state = lock(&self.state);
        if state.waiting.len() >= WAITING_MAX {
            return Some(task);
        }
        state.waiting.push_back(task);
        drop(state);
        self.changed.notify_all();
        None
    }

    fn next(&self) -> Option<T> {
        let is_idle = |state: &mut State<T>| state.waiting.is_empty() && (state.going > 0 || !state.is_fed);
        let waited = self.changed.wait_while(lock(&self.state), is_idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        let task = state.waiting.pop_front()?;
        state.going += 1;
        drop(state);
        self.changed.notify_all();
        Some(task)
    }

    fn fail(&self, error: Error) {
        let mut state = lock(&self.state);
        state.waiting.clear();
        state.failed.get_or_insert(error);
    }
}

struct Going<'a, T>(&'a Tasks<T>);

impl<T> Drop for Going<'_, T> {
    fn drop(&mut self) {
        lock(&self.0.state).going -= 1;
        self.0.changed.notify_all();
    }
}
