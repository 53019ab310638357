//! Work that is done once for all who want it, and what was found a moment ago.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};

use crate::lock;

/// Work that any number may wait for; `None` if it panicked.
type Flight<V> = Shared<BoxFuture<'static, Option<V>>>;

/// What is being worked on, by its key.
pub(super) struct Flights<K, V> {
    running: Arc<Mutex<HashMap<K, Flight<V>>>>,
}

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self { running: Arc::default() }
    }
}

impl<K, V> Flights<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Joins the work on `key`, or begins it; it goes on when nobody waits any more.
    pub(super) async fn join<F>(&self, key: K, work: impl FnOnce() -> F) -> Option<V>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let flight = {
            let mut running = lock(&self.running);
            match running.get(&key) {
                Some(flight) => flight.clone(),
                None => {
                    let work = work();
                    let leave = Leave { running: Arc::clone(&self.running), key: key.clone() };
                    // It leaves the list, for which it needs the lock, after it was put there.
                    let task = tokio::spawn(async move {
                        let _leave = leave;
                        work.await
                    });
                    let flight = async move { task.await.ok() }.boxed().shared();
                    running.insert(key, flight.clone());
                    flight
                }
            }
        };
        flight.await
    }
}

impl<K, V> fmt::Debug for Flights<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flights").finish_non_exhaustive()
    }
}

/// Takes work off the list however it ends.
struct Leave<K: Eq + Hash, V> {
    running: Arc<Mutex<HashMap<K, V>>>,
    key: K,
}

impl<K: Eq + Hash, V> Drop for Leave<K, V> {
    fn drop(&mut self) {
        lock(&self.running).remove(&self.key);
    }
}

/// What was noted within a time; a bounded number.
#[derive(Debug)]
pub(super) struct Recent<K> {
    noted: Mutex<HashMap<K, Instant>>,
    age_max: Duration,
    entries_max: usize,
}

impl<K: Eq + Hash> Recent<K> {
    pub(super) fn new(age_max: Duration, entries_max: usize) -> Self {
        Self { noted: Mutex::default(), age_max, entries_max }
    }

    pub(super) fn note(&self, key: K) {
        let mut noted = lock(&self.noted);
        if noted.len() >= self.entries_max {
            noted.retain(|_, at| at.elapsed() < self.age_max);
        }
        // To forget costs a question to the upstream, no more.
        if noted.len() >= self.entries_max {
            noted.clear();
        }
        noted.insert(key, Instant::now());
    }

    pub(super) fn has(&self, key: &K) -> bool {
        lock(&self.noted).get(key).is_some_and(|at| at.elapsed() < self.age_max)
    }

    pub(super) fn forget(&self, key: &K) {
        lock(&self.noted).remove(key);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn many_who_want_the_same_at_a_time_have_it_done_once() {
        let flights = Flights::<u8, usize>::default();
        let (done, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let one = || {
            let (done, gate) = (Arc::clone(&done), Arc::clone(&gate));
            flights.join(1, move || async move {
                gate.notified().await;
                done.fetch_add(1, Ordering::Relaxed) + 1
            })
        };
        let all = futures_util::future::join_all((0..20).map(|_| one()));
        let (all, ()) = tokio::join!(all, async {
            tokio::task::yield_now().await;
            gate.notify_one();
        });
        assert_eq!(all, vec![Some(1); 20]);
        gate.notify_one();
        assert_eq!(one().await, Some(2));
    }

    #[tokio::test]
    async fn work_that_panics_holds_nobody_up() {
        let flights = Flights::<u8, ()>::default();
        let panics = || async { panic!("as it should") };
        assert_eq!(flights.join(1, panics).await, None);
        assert_eq!(flights.join(1, || async {}).await, Some(()));
    }

    #[test]
    fn what_is_noted_is_bounded_in_time_and_number() {
        let recent = Recent::new(Duration::from_secs(3600), 4);
        (0..4).for_each(|n| recent.note(n));
        assert!(recent.has(&3));
        recent.note(4);
        assert!(recent.has(&4) && !recent.has(&3));
        recent.forget(&4);
        assert!(!recent.has(&4));
        let old = Recent::new(Duration::ZERO, 4);
        old.note(1);
        assert!(!old.has(&1));
    }
}
