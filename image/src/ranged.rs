//! A blob read at random by blocking threads, through a small cache with read-ahead.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use bytes::Bytes;
use dvcr_converter::io::ReadAt;
use tokio::runtime::Handle;

use dvcr_client::digest::Digest;
use dvcr_client::{Error, ErrorKind, Repository, Result};

/// Unit of the cache, and of requests for anything smaller, bytes.
const BLOCK_BYTES: u64 = 1 << 20;
/// Most blocks kept: bounds the memory of one open blob.
const BLOCKS_MAX: usize = 24;
/// Blocks asked for ahead of a reader that goes forward.
const READ_AHEAD_BLOCKS: u64 = 3;

/// A blob whose bytes are fetched by ranges when they are asked for; safe to share between threads.
///
/// Reads block on the runtime and must not be made on its own async threads. Reads of a block (1 MiB) or more go
/// straight to the registry.
#[derive(Clone)]
pub struct RangedBlob {
    shared: Arc<Shared>,
    runtime: Handle,
}

struct Shared {
    repository: Repository,
    digest: Digest,
    size: u64,
    cache: Mutex<Cache>,
    arrived: Condvar,
}

#[derive(Default)]
struct Cache {
    slots: HashMap<u64, Slot>,
    clock: u64,
}

enum Slot {
    Loading,
    Ready { bytes: Bytes, used: u64 },
}

impl RangedBlob {
    /// Prepares to read a blob of `size` bytes; `runtime` does the requests.
    pub fn new(repository: Repository, digest: Digest, size: u64, runtime: Handle) -> Self {
        let shared = Shared { repository, digest, size, cache: Mutex::default(), arrived: Condvar::new() };
        Self { shared: Arc::new(shared), runtime }
    }

    /// Fills `buf` from `offset`, which must lie inside the blob with all of `buf`.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.shared.size);
        let Some(end) = end else {
            let text = format!("blob {} ends at byte {}", self.shared.digest, self.shared.size);
            return Err(Error::new(ErrorKind::Corrupt, text));
        };
        if buf.len() as u64 >= BLOCK_BYTES {
            return self.runtime.block_on(self.shared.fetch(buf, offset));
        }
        let mut position = offset;
        while position < end {
            let number = position / BLOCK_BYTES;
            let block = self.block(number)?;
            let from = (position % BLOCK_BYTES) as usize;
            let count = (block.len() - from).min((end - position) as usize);
            let into = (position - offset) as usize;
            buf[into..into + count].copy_from_slice(&block[from..from + count]);
            position += count as u64;
        }
        Ok(())
    }

    /// Length of the blob, bytes.
    pub fn size(&self) -> u64 {
        self.shared.size
    }

    fn block(&self, number: u64) -> Result<Bytes> {
        let mut cache = self.shared.cache();
        loop {
            match cache.touch(number) {
                Some(Slot::Ready { bytes, .. }) => return Ok(bytes.clone()),
                Some(Slot::Loading) => {
                    cache = self.shared.arrived.wait(cache).unwrap_or_else(|e| e.into_inner());
                }
                None => break,
            }
        }
        cache.slots.insert(number, Slot::Loading);
        let forward = number.checked_sub(1).is_some_and(|before| cache.slots.contains_key(&before));
        if forward {
            self.read_ahead(&mut cache, number);
        }
        drop(cache);
        let loaded = self.runtime.block_on(self.shared.load(number));
        self.shared.settle(number, loaded.as_ref().ok().cloned());
        loaded
    }

    fn read_ahead(&self, cache: &mut Cache, number: u64) {
        for ahead in number + 1..=number + READ_AHEAD_BLOCKS {
            // The size is the manifest's word, up to 2^64 - 1.
            let start = ahead.checked_mul(BLOCK_BYTES);
            if start.is_none_or(|start| start >= self.shared.size) || cache.slots.contains_key(&ahead) {
                continue;
            }
            cache.slots.insert(ahead, Slot::Loading);
            let loading = Loading { shared: self.shared.clone(), number: ahead, loaded: None };
            self.runtime.spawn(loading.run());
        }
    }
}

impl Shared {
    async fn load(&self, number: u64) -> Result<Bytes> {
        let start = number * BLOCK_BYTES;
        let mut block = vec![0; (self.size - start).min(BLOCK_BYTES) as usize];
        self.fetch(&mut block, start).await?;
        Ok(block.into())
    }

    async fn fetch(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut stream = self.repository.blob_range(&self.digest, offset..offset + buf.len() as u64);
        let mut filled = 0;
        while let Some(bytes) = stream.next().await? {
            buf[filled..filled + bytes.len()].copy_from_slice(&bytes);
            filled += bytes.len();
        }
        Ok(())
    }

    /// Ends the loading of a block: with its bytes, or without, so that the next reader tries itself.
    fn settle(&self, number: u64, loaded: Option<Bytes>) {
        let mut cache = self.cache();
        match loaded {
            Some(bytes) => {
                let used = cache.tick();
                cache.slots.insert(number, Slot::Ready { bytes, used });
                cache.evict();
            }
            None => {
                cache.slots.remove(&number);
            }
        }
        self.arrived.notify_all();
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A block read ahead: settled also when the runtime drops the task half-way.
struct Loading {
    shared: Arc<Shared>,
    number: u64,
    loaded: Option<Bytes>,
}

impl Loading {
    async fn run(mut self) {
        // A failure is met again, and reported, by the reader that needs the block.
        let loaded = self.shared.load(self.number).await.ok();
        let _ = std::mem::replace(&mut self.loaded, loaded);
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        self.shared.settle(self.number, self.loaded.take());
    }
}

impl Cache {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn touch(&mut self, number: u64) -> Option<&Slot> {
        let now = self.tick();
        let slot = self.slots.get_mut(&number)?;
        if let Slot::Ready { used, .. } = slot {
            *used = now;
        }
        Some(slot)
    }

    /// Drops the blocks that were not used for longest.
    fn evict(&mut self) {
        while self.slots.len() > BLOCKS_MAX {
            let used = |slot: &Slot| match slot {
                Slot::Ready { used, .. } => Some(*used),
                Slot::Loading => None,
            };
            let oldest = self.slots.iter().filter_map(|(n, slot)| Some((used(slot)?, *n))).min();
            match oldest {
                Some((_, number)) => self.slots.remove(&number),
                None => return,
            };
        }
    }
}

impl ReadAt for RangedBlob {
    fn len(&self) -> u64 {
        self.size()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        Ok(self.read(buf, offset)?)
    }
}

/// A part of a blob: the file inside an uncompressed layer.
#[derive(Clone)]
pub struct Window {
    blob: RangedBlob,
    offset: u64,
    len: u64,
}

impl Window {
    /// The `len` bytes of `blob` from `offset`; they must lie inside it.
    pub fn new(blob: RangedBlob, offset: u64, len: u64) -> Result<Self> {
        if offset.checked_add(len).is_none_or(|end| end > blob.size()) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("a file of {len} bytes at {offset} does not fit a layer of {} bytes", blob.size()),
            ));
        }
        Ok(Self { blob, offset, len })
    }
}

impl ReadAt for Window {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.len) {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(self.blob.read(buf, self.offset + offset)?)
    }
}
