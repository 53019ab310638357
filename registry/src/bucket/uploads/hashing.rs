//! Runs a hash over bytes as they come, on other threads than those that bring them.

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::digest::Hasher;
use crate::store::{Error, Kind};

/// Bytes, and pieces, that are hashed in one go; as many more may wait for it.
const BATCH_BYTES: usize = 1 << 20;
const BATCH_PIECES: usize = 1024;

/// A hash that is being run.
pub(super) struct Hashing {
    runtime: Handle,
    /// `None` while a thread has it.
    hasher: Option<Hasher>,
    running: Option<JoinHandle<Hasher>>,
    batch: Vec<Bytes>,
    batch_bytes: usize,
}

impl Hashing {
    pub(super) fn new(runtime: Handle, hasher: Hasher) -> Self {
        Self { runtime, hasher: Some(hasher), running: None, batch: Vec::new(), batch_bytes: 0 }
    }

    /// Takes bytes in, waiting while those before them are hashed.
    ///
    /// # Errors
    /// When a thread did not end well.
    pub(super) async fn push(&mut self, bytes: Bytes) -> Result<(), Error> {
        self.batch_bytes = self.batch_bytes.saturating_add(bytes.len());
        self.batch.push(bytes);
        match self.batch_bytes >= BATCH_BYTES || self.batch.len() >= BATCH_PIECES {
            true => self.hash().await,
            false => Ok(()),
        }
    }

    /// Waits until everything is hashed.
    ///
    /// # Errors
    /// When a thread did not end well.
    pub(super) async fn finish(mut self) -> Result<Hasher, Error> {
        self.hash().await?;
        self.idle().await
    }

    /// Has the batch hashed, once the one before is.
    async fn hash(&mut self) -> Result<(), Error> {
        let mut hasher = self.idle().await?;
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        if batch.is_empty() {
            self.hasher = Some(hasher);
            return Ok(());
        }
        self.running = Some(self.runtime.spawn_blocking(move || {
            batch.iter().for_each(|bytes| hasher.update(bytes));
            hasher
        }));
        Ok(())
    }

    /// Waits until no thread has the hash.
    async fn idle(&mut self) -> Result<Hasher, Error> {
        if let Some(running) = &mut self.running {
            let hasher = running.await;
            self.running = None;
            self.hasher = Some(
                hasher
                    .map_err(|error| Error::of(Kind::Other, "the hashing thread did not end well", error))?,
            );
        }
        self.hasher.take().ok_or_else(|| Error::other("the hash of an upload was lost"))
    }
}
