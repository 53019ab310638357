//! Page-aligned buffers, reused, and bounded in number.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What O_DIRECT wants of memory, file offset and length; 4096 suits every device in use.
pub(crate) const ALIGN_BYTES: usize = 4096;

/// Hands out buffers of one size.
#[derive(Debug)]
pub(crate) struct Pool {
    buffer_bytes: usize,
    idle_max: usize,
    idle: Mutex<Vec<Vec<u8>>>,
    permits: Arc<Semaphore>,
}

impl Pool {
    /// At most `buffers_max` buffers are out at a time, and at most `idle_max` are kept when they come back.
    pub(crate) fn new(buffer_bytes: usize, buffers_max: usize, idle_max: usize) -> Arc<Self> {
        Arc::new(Self {
            buffer_bytes,
            idle_max,
            idle: Mutex::default(),
            permits: Arc::new(Semaphore::new(buffers_max)),
        })
    }

    /// Waits for a buffer of the bounded number.
    pub(crate) async fn get(self: &Arc<Self>) -> Buffer {
        // The semaphore is never closed; without a permit the buffer would merely go uncounted.
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok();
        self.make(permit)
    }

    /// Takes a buffer of the bounded number if one is free.
    pub(crate) fn try_get(self: &Arc<Self>) -> Option<Buffer> {
        let permit = Arc::clone(&self.permits).try_acquire_owned().ok()?;
        Some(self.make(Some(permit)))
    }

    /// Takes a buffer outside the bounded number, for a caller whose own number is bounded.
    pub(crate) fn get_extra(self: &Arc<Self>) -> Buffer {
        self.make(None)
    }

    fn make(self: &Arc<Self>, permit: Option<OwnedSemaphorePermit>) -> Buffer {
        let idle = self.idle().pop();
        let memory = idle.unwrap_or_else(|| vec![0; self.buffer_bytes + ALIGN_BYTES]);
        let skip = memory.as_ptr().align_offset(ALIGN_BYTES).min(ALIGN_BYTES);
        Buffer { memory, skip, length: self.buffer_bytes, pool: Arc::clone(self), _permit: permit }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer that goes back to its pool when dropped; it begins on a multiple of [`ALIGN_BYTES`].
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: Vec<u8>,
    skip: usize,
    length: usize,
    pool: Arc<Pool>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Buffer {
    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.skip..self.skip + self.length]
    }

    /// Shortens what [`AsRef`] shows; the buffer comes back in full length.
    pub(crate) fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.memory[self.skip..self.skip + self.length]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut idle = self.pool.idle();
        if idle.len() < self.pool.idle_max {
            idle.push(std::mem::take(&mut self.memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn buffers_are_aligned_reused_and_counted() {
        let pool = Pool::new(1 << 16, 2, 1);
        let mut one = pool.get().await;
        one.truncate(10);
        let two = pool.try_get().unwrap();
        assert_eq!((one.as_ref().len(), two.as_ref().len()), (10, 1 << 16));
        assert_eq!(two.as_ref().as_ptr().align_offset(ALIGN_BYTES), 0);
        assert!(pool.try_get().is_none());
        drop((one, two));
        assert_eq!(pool.idle().len(), 1);
        assert_eq!(pool.try_get().unwrap().len(), 1 << 16);
    }
}
