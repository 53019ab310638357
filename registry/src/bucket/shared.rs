//! Readings of small objects that all share who ask for the same at the same time.
//!
//! ```text
//!  ask ──> nobody reads it ──> read ─────────────────────────> the answer
//!   └────> somebody does ────> wait for the reading after it ──> the answer, or the turn to read for all who wait
//! ```
//!
//! A reading that had begun before one asked may have missed what was written until then. So its answer is for those alone who had
//! asked by then; who comes while it is under way waits for the next one. What everybody hears is as new as if it had asked alone, and
//! of a thousand who ask at once for what is wanted most, two or three reach the store. Nothing is kept.

use std::collections::HashMap;
use std::fmt;
use std::mem;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::lock;

/// How long one waits for others to read; then it reads for itself, so that a request that is held up holds up nobody else.
const WAIT: Duration = Duration::from_millis(500);

/// Readings that are under way, by the key of what is read.
pub(super) struct Shared<T>(Arc<Mutex<Readings<T>>>);

/// Each with those who came since it began.
type Readings<T> = HashMap<String, Vec<oneshot::Sender<Turn<T>>>>;

/// What one hears who has waited; nothing is to read for itself.
enum Turn<T> {
    Answer(T),
    Read(Reader<T>),
}

/// One who reads, for itself and for those who had asked when it began. Dropped without an answer, it leaves all who wait to themselves.
struct Reader<T> {
    readings: Arc<Mutex<Readings<T>>>,
    key: String,
    others: Vec<oneshot::Sender<Turn<T>>>,
    is_over: bool,
}

impl<T: Clone> Shared<T> {
    /// Reads an object, by `read` or together with others; the reading begins after this is called.
    ///
    /// # Errors
    /// Those of `read`, which are told to nobody else.
    pub(super) async fn read<E>(&self, key: &str, read: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let reader = match self.join(key) {
            Ok(reader) => reader,
            Err(turn) => match tokio::time::timeout(WAIT, turn).await {
                Ok(Ok(Turn::Answer(answer))) => return Ok(answer),
                Ok(Ok(Turn::Read(reader))) => {
                    // Those who just had their answer may be about to ask again, and then share this reading.
                    tokio::task::yield_now().await;
                    reader
                }
                // The reading failed, or takes too long.
                Ok(Err(_)) | Err(_) => return read.await,
            },
        };
        let answer = read.await?;
        reader.tell(&answer);
        Ok(answer)
    }

    /// Begins to read, or waits where somebody does.
    fn join(&self, key: &str) -> Result<Reader<T>, oneshot::Receiver<Turn<T>>> {
        let mut readings = lock(&self.0);
        if let Some(waiting) = readings.get_mut(key) {
            let (sender, turn) = oneshot::channel();
            waiting.push(sender);
            return Err(turn);
        }
        readings.insert(key.to_owned(), Vec::new());
        let (readings, key, others) = (Arc::clone(&self.0), key.to_owned(), Vec::new());
        Ok(Reader { readings, key, others, is_over: false })
    }
}

impl<T: Clone> Reader<T> {
    /// Tells the others, and has one of those who came since then read next.
    fn tell(mut self, answer: &T) {
        for other in mem::take(&mut self.others) {
            // Whoever has given up does not hear it.
            let _ = other.send(Turn::Answer(answer.clone()));
        }
        {
            let mut readings = lock(&self.readings);
            self.others = readings.get_mut(&self.key).map(mem::take).unwrap_or_default();
            if self.others.is_empty() {
                readings.remove(&self.key);
                self.is_over = true;
                return;
            }
        }
        let mut reader = self;
        while let Some(next) = reader.others.pop() {
            reader = match next.send(Turn::Read(reader)) {
                Err(Turn::Read(reader)) => reader,
                Ok(()) | Err(Turn::Answer(_)) => return,
            };
        }
    }
}

impl<T> Drop for Reader<T> {
    fn drop(&mut self) {
        if !self.is_over {
            // Taken out first: what is dropped with it wakes others.
            let waiting = lock(&self.readings).remove(&self.key);
            drop(waiting);
        }
    }
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shared({} readings)", lock(&self.0).len())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures_util::future::join_all;
    use tokio::sync::Semaphore;

    use super::*;

    /// A number that grows, and readings of it that take as long as they are let.
    #[derive(Default)]
    struct Object {
        value: AtomicU64,
        readings: AtomicU64,
        begun: Semaphores,
    }

    struct Semaphores {
        begin: Semaphore,
        end: Semaphore,
    }

    impl Default for Semaphores {
        fn default() -> Self {
            Self { begin: Semaphore::new(0), end: Semaphore::new(0) }
        }
    }

    impl Object {
        async fn read(&self) -> Result<u64, ()> {
            self.readings.fetch_add(1, Ordering::SeqCst);
            let value = self.value.load(Ordering::SeqCst);
            self.begun.begin.add_permits(1);
            self.begun.end.acquire().await.unwrap().forget();
            Ok(value)
        }
    }

    async fn until_waiting(shared: &Shared<u64>, count: usize) {
        while lock(&shared.0).get("k").map_or(0, Vec::len) < count {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn nobody_hears_what_was_read_before_it_asked_and_all_who_wait_share_one_reading() {
        let (shared, object) = (Arc::new(Shared::<u64>::default()), Arc::new(Object::default()));
        let ask = || {
            let (shared, object) = (Arc::clone(&shared), Arc::clone(&object));
            tokio::spawn(async move { shared.read("k", object.read()).await.unwrap() })
        };
        let first = ask();
        object.begun.begin.acquire().await.unwrap().forget();
        // What is written now, the reading that is under way has missed.
        object.value.store(1, Ordering::SeqCst);
        let others: Vec<_> = (0..100).map(|_| ask()).collect();
        until_waiting(&shared, others.len()).await;
        object.begun.end.add_permits(2);
        assert_eq!(first.await.unwrap(), 0);
        for other in others {
            assert_eq!(other.await.unwrap(), 1);
        }
        assert_eq!(object.readings.load(Ordering::SeqCst), 2);
        assert!(lock(&shared.0).is_empty());
    }

    #[tokio::test]
    async fn a_reading_that_fails_or_is_given_up_leaves_the_others_to_themselves() {
        for gives_up in [false, true] {
            let shared = Arc::new(Shared::<u64>::default());
            let end = Arc::new(Semaphore::new(0));
            let first = tokio::spawn({
                let (shared, end) = (Arc::clone(&shared), Arc::clone(&end));
                async move {
                    let fail = async {
                        end.acquire().await.unwrap().forget();
                        Err::<u64, ()>(())
                    };
                    shared.read("k", fail).await
                }
            });
            while lock(&shared.0).is_empty() {
                tokio::task::yield_now().await;
            }
            let others = (0..10).map(|n| shared.read("k", async move { Ok::<_, ()>(n) }));
            let end_first = async {
                until_waiting(&shared, 10).await;
                match gives_up {
                    true => first.abort(),
                    false => end.add_permits(1),
                }
            };
            let (answers, ()) = tokio::join!(join_all(others), end_first);
            assert!(answers.iter().all(Result::is_ok));
            assert!(lock(&shared.0).is_empty());
        }
    }

    #[tokio::test]
    async fn who_gave_up_while_it_waited_keeps_nobody_waiting() {
        let (shared, object) = (Arc::new(Shared::<u64>::default()), Arc::new(Object::default()));
        let ask = || {
            let (shared, object) = (Arc::clone(&shared), Arc::clone(&object));
            tokio::spawn(async move { shared.read("k", object.read()).await.unwrap() })
        };
        let first = ask();
        object.begun.begin.acquire().await.unwrap().forget();
        let stays = ask();
        until_waiting(&shared, 1).await;
        let goes: Vec<_> = (0..3).map(|_| ask()).collect();
        until_waiting(&shared, 4).await;
        for one in goes {
            one.abort();
            assert!(one.await.is_err());
        }
        object.begun.end.add_permits(2);
        first.await.unwrap();
        stays.await.unwrap();
        assert!(lock(&shared.0).is_empty());
    }

    #[tokio::test]
    async fn a_reading_that_is_held_up_holds_up_nobody_else_for_long() {
        let shared = Shared::<u64>::default();
        let held_up = std::future::pending::<Result<u64, ()>>();
        let mut first = std::pin::pin!(shared.read("k", held_up));
        assert!(futures_util::poll!(&mut first).is_pending());
        assert_eq!(shared.read("k", async { Ok::<_, ()>(1) }).await, Ok(1));
    }
}
