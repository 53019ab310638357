//! Threads that do jobs at the same time and hand back what came of them in the order of the jobs.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{Builder, JoinHandle};

/// A few threads, started as jobs come and joined when this is dropped; jobs that wait by then are not done.
///
/// It bounds the threads, not the jobs: whoever submits them knows what each one holds.
pub(super) struct Pool<J, T> {
    shared: Arc<Shared<J, T>>,
    work: fn(J) -> T,
    threads: Vec<JoinHandle<()>>,
    threads_max: usize,
    /// Where the results of the submitted jobs will come, oldest first.
    results: VecDeque<Receiver<T>>,
}

struct Shared<J, T> {
    state: Mutex<State<J, T>>,
    changed: Condvar,
}

struct State<J, T> {
    jobs: VecDeque<(J, SyncSender<T>)>,
    idle: usize,
    closed: bool,
}

impl<J: Send + 'static, T: Send + 'static> Pool<J, T> {
    /// Makes a pool of at most `threads_max` threads that do `work`.
    pub(super) fn new(threads_max: usize, work: fn(J) -> T) -> Self {
        let state = State { jobs: VecDeque::new(), idle: 0, closed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        Self { shared, work, threads: Vec::new(), threads_max, results: VecDeque::new() }
    }

    /// Hands `job` to the next free thread. Fails when there is no thread and none can be started.
    pub(super) fn submit(&mut self, job: J) -> io::Result<()> {
        let (sender, result) = sync_channel(1);
        let mut state = self.shared.lock();
        state.jobs.push_back((job, sender));
        let busy = state.jobs.len() > state.idle;
        drop(state);
        self.shared.changed.notify_one();
        self.results.push_back(result);
        if busy && self.threads.len() < self.threads_max {
            let (shared, work) = (self.shared.clone(), self.work);
            match Builder::new().name("decode".into()).spawn(move || shared.run(work)) {
                Ok(thread) => self.threads.push(thread),
                // Fewer threads do it too.
                Err(_) if !self.threads.is_empty() => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Waits for the result of the oldest job; `None` when all are handed out.
    pub(super) fn next(&mut self) -> Option<io::Result<T>> {
        let result = self.results.pop_front()?;
        Some(result.recv().map_err(|_| io::Error::other("a decoding thread died")))
    }

    /// Jobs submitted whose results were not handed out.
    pub(super) fn pending(&self) -> usize {
        self.results.len()
    }
}

impl<J, T> Shared<J, T> {
    fn lock(&self) -> MutexGuard<'_, State<J, T>> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Does jobs until the pool is dropped.
    fn run(&self, work: fn(J) -> T) {
        let mut state = self.lock();
        while !state.closed {
            let Some((job, result)) = state.jobs.pop_front() else {
                state.idle += 1;
                state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
                state.idle -= 1;
                continue;
            };
            drop(state);
            // Nobody waits for it when the reader is gone.
            let _ = result.send(work(job));
            state = self.lock();
        }
    }
}

impl<J, T> Drop for Pool<J, T> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state.jobs.clear();
        drop(state);
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_jobs() {
        let mut pool =
            Pool::new(3, |n: u64| (0..n % 7 * 10_000).fold(n, |a, b| std::hint::black_box(a ^ b) ^ b));
        for round in 0..50 {
            for n in 0..20 {
                pool.submit(round * 20 + n).unwrap();
            }
            assert_eq!(pool.pending(), 20);
            for n in 0..20 {
                assert_eq!(pool.next().unwrap().unwrap(), round * 20 + n);
            }
            assert!(pool.next().is_none());
        }
        assert!(pool.threads.len() <= 3);
    }

    #[test]
    fn a_dropped_pool_holds_no_job_any_more() {
        let job = Arc::new(());
        for _ in 0..50 {
            let mut pool = Pool::new(2, |job: Arc<()>| job);
            for _ in 0..20 {
                pool.submit(job.clone()).unwrap();
            }
            drop(pool);
            assert_eq!(Arc::strong_count(&job), 1);
        }
    }

    #[test]
    fn a_job_that_panics_is_an_error_and_not_a_wait_for_ever() {
        let mut pool = Pool::new(1, |n: u8| 1 / n);
        pool.submit(0).unwrap();
        assert!(pool.next().unwrap().is_err());
    }
}
