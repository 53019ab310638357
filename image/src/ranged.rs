//! A blob, or a file inside it, read at random by blocking threads.
//!
//! ```text
//!  reader ──> blocks (1 MiB, a bounded number) <── requests: long ranges, several at a time, block by block as they come
//!    └─ wants some: ahead says what else to ask for       └─ of a file with an index: verified by the first who reads it
//! ```

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use bytes::Bytes;
use dvcr_client::digest::Digest;
use dvcr_client::{Error, ErrorKind, Repository, Result};
use dvcr_converter::io::ReadAt;
use tokio::runtime::Handle;

use crate::blocks::{BLOCK_BYTES, Block, Blocks, State};
use crate::index::Index;

/// A blob whose bytes are fetched by ranges when they are asked for; safe to share between threads.
///
/// Reads block on the runtime and must not be made on its own async threads. Who reads forward finds the bytes there
/// already; at most 64 MiB are kept, and 1 MiB for each thread that reads at the same time.
#[derive(Clone)]
pub struct RangedBlob(Ranged);

/// The bytes of a blob from `start`, in blocks.
#[derive(Clone)]
struct Ranged {
    shared: Arc<Shared>,
    runtime: Handle,
}

struct Shared {
    repository: Repository,
    digest: Digest,
    /// Where the file begins in the blob, and its length.
    start: u64,
    len: u64,
    index: Option<Arc<Index>>,
    blocks: Mutex<Blocks>,
    changed: Condvar,
}

impl RangedBlob {
    /// Prepares to read a blob of `size` bytes; `runtime` does the requests.
    pub fn new(repository: Repository, digest: Digest, size: u64, runtime: Handle) -> Self {
        Self(Ranged::new(repository, digest, 0..size, None, runtime))
    }

    /// Fills `buf` from `offset`, which must lie inside the blob with all of `buf`.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read(buf, offset)
    }

    /// Length of the blob, bytes.
    pub fn size(&self) -> u64 {
        self.0.shared.len
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

/// A part of a blob: the file inside an uncompressed layer. With an index, every byte it hands out is verified.
#[derive(Clone)]
pub struct Window(Ranged);

impl Window {
    /// The `len` bytes of `blob` from `offset`, which must lie inside it, as they come.
    pub fn new(blob: &RangedBlob, offset: u64, len: u64) -> Result<Self> {
        Self::open(blob, offset, len, None)
    }

    /// The file of `index` in `blob` from `offset`; it must lie inside it. A read of a chunk that does not have its digest,
    /// nor has it when it is asked for again, fails with [`ErrorKind::Mismatch`].
    pub fn verified(blob: &RangedBlob, offset: u64, index: Arc<Index>) -> Result<Self> {
        Self::open(blob, offset, index.file_bytes(), Some(index))
    }

    fn open(blob: &RangedBlob, offset: u64, len: u64, index: Option<Arc<Index>>) -> Result<Self> {
        let Some(end) = offset.checked_add(len).filter(|end| *end <= blob.size()) else {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("a file of {len} bytes at {offset} does not fit a layer of {} bytes", blob.size()),
            ));
        };
        let shared = &blob.0.shared;
        let (repository, digest) = (shared.repository.clone(), shared.digest.clone());
        Ok(Self(Ranged::new(repository, digest, offset..end, index, blob.0.runtime.clone())))
    }
}

impl ReadAt for Window {
    fn len(&self) -> u64 {
        self.0.shared.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.len()) {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(self.0.read(buf, offset)?)
    }
}

impl Ranged {
    fn new(
        repository: Repository,
        digest: Digest,
        range: Range<u64>,
        index: Option<Arc<Index>>,
        runtime: Handle,
    ) -> Self {
        let shared = Shared {
            repository,
            digest,
            start: range.start,
            len: range.end - range.start,
            index,
            blocks: Mutex::default(),
            changed: Condvar::new(),
        };
        Self { shared: Arc::new(shared), runtime }
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let shared = &self.shared;
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= shared.len);
        let Some(end) = end else {
            let text = format!("blob {} ends at byte {}", shared.digest, shared.start + shared.len);
            return Err(Error::new(ErrorKind::Corrupt, text));
        };
        let mut position = offset;
        while position < end {
            let number = position / BLOCK_BYTES;
            let from = position % BLOCK_BYTES;
            let count = (BLOCK_BYTES - from).min(end - position) as usize;
            let block = self.block(number, end.div_ceil(BLOCK_BYTES), count as u64)?;
            let into = (position - offset) as usize;
            block.copy_to(&mut buf[into..into + count], from as usize);
            position += count as u64;
        }
        Ok(())
    }

    /// The block `number`, of which so many bytes are wanted, verified if there is an index; those after it, before `end`,
    /// are wanted next.
    fn block(&self, number: u64, end: u64, bytes: u64) -> Result<Block> {
        let shared = &self.shared;
        let mut blocks = shared.lock();
        // Now the last one to be dropped for others.
        blocks.touch(number);
        let count = shared.len.div_ceil(BLOCK_BYTES);
        let ranges = blocks.want(number, end, count);
        blocks = self.request(blocks, ranges);
        loop {
            let Some(slot) = blocks.touch(number) else {
                let ranges = blocks.want(number, number + 1, count);
                blocks = self.request(blocks, ranges);
                continue;
            };
            match &slot.state {
                State::Ready(block) => {
                    slot.read += bytes;
                    return Ok(block.clone());
                }
                State::Arrived(block) if shared.index.is_none() => {
                    let block = block.clone();
                    slot.state = State::Ready(block);
                }
                State::Arrived(block) => {
                    let block = block.clone();
                    slot.state = State::Checking;
                    drop(blocks);
                    let right = shared.is_right(number, &block);
                    blocks = shared.lock();
                    blocks = self.settle(blocks, number, right.then_some(block));
                }
                State::Failed(cause) => {
                    let cause = cause.clone();
                    // Whoever comes next asks for it anew.
                    blocks.forget(number);
                    let bytes = shared.block_bytes(number);
                    let context =
                        format!("reading bytes {}-{} of blob {}", bytes.start, bytes.end, shared.digest);
                    return Err(Error::with(cause.kind(), context, cause));
                }
                State::Loading | State::Checking => {
                    slot.waited_for = true;
                    blocks = shared.changed.wait(blocks).unwrap_or_else(|e| e.into_inner());
                }
            }
        }
    }

    /// Ends the checking of a block: `right` is its bytes, if they are. Others get a second chance.
    fn settle<'a>(
        &'a self,
        mut blocks: MutexGuard<'a, Blocks>,
        number: u64,
        right: Option<Block>,
    ) -> MutexGuard<'a, Blocks> {
        let shared = &self.shared;
        let Some(slot) = blocks.slot(number) else { return blocks };
        slot.state = match right {
            Some(block) => State::Ready(block),
            None if slot.again => State::Failed(Arc::new(shared.wrong(number))),
            None => {
                tracing::warn!(digest = %shared.digest, chunk = number, "a chunk is not what the index says; asking for it again");
                slot.again = true;
                slot.state = State::Loading;
                return self.request(blocks, std::iter::once(number..number + 1));
            }
        };
        if std::mem::take(&mut slot.waited_for) {
            shared.changed.notify_all();
        }
        blocks
    }

    /// Sends requests for blocks that are `Loading`, one for each range. The lock is let go meanwhile: a runtime that has
    /// ended drops them at once, and that is when their blocks fail.
    fn request<'a>(
        &'a self,
        blocks: MutexGuard<'a, Blocks>,
        ranges: impl IntoIterator<Item = Range<u64>>,
    ) -> MutexGuard<'a, Blocks> {
        let mut ranges = ranges.into_iter().peekable();
        if ranges.peek().is_none() {
            return blocks;
        }
        drop(blocks);
        for blocks in ranges {
            let request = Request { shared: self.shared.clone(), blocks, failure: None };
            self.runtime.spawn(request.run());
        }
        self.shared.lock()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Where a block lies in the blob.
    fn block_bytes(&self, number: u64) -> Range<u64> {
        let start = number * BLOCK_BYTES;
        self.start + start..self.start + (start + BLOCK_BYTES).min(self.len)
    }

    fn is_right(&self, number: u64, block: &Block) -> bool {
        let parts = block.parts().iter().map(|part| &**part);
        self.index.as_ref().is_none_or(|index| index.is_right(number, parts))
    }

    fn wrong(&self, number: u64) -> Error {
        let bytes = self.block_bytes(number);
        let text = format!(
            "chunk {number} of the disk file, bytes {}-{} of blob {}, is not what the image's index says, twice: the \
             registry's copy is damaged, or somebody on the way changes it; push the image again",
            bytes.start, bytes.end, self.digest
        );
        Error::new(ErrorKind::Mismatch, text)
    }

    /// Puts what became of a block into its place.
    fn arrive(&self, number: u64, state: State) {
        let mut blocks = self.lock();
        if let Some(slot) = blocks.slot(number)
            && matches!(slot.state, State::Loading)
        {
            slot.state = state;
            if std::mem::take(&mut slot.waited_for) {
                self.changed.notify_all();
            }
        }
    }
}

/// The blocks that one range request brings; each has its fate also when the runtime drops the task half-way.
struct Request {
    shared: Arc<Shared>,
    /// Those that have not come yet.
    blocks: Range<u64>,
    failure: Option<Error>,
}

impl Request {
    async fn run(mut self) {
        self.failure = self.receive().await.err();
    }

    async fn receive(&mut self) -> Result<()> {
        let shared = self.shared.clone();
        let start = shared.block_bytes(self.blocks.start).start;
        let end = shared.block_bytes(self.blocks.end - 1).end;
        let mut stream = shared.repository.blob_range(&shared.digest, start..end);
        let mut parts: Vec<Bytes> = Vec::new();
        let mut missing = block_len(&shared, self.blocks.start);
        while let Some(mut bytes) = stream.next().await? {
            while bytes.len() >= missing {
                parts.push(bytes.split_to(missing));
                let number = self.blocks.start;
                shared.arrive(number, State::Arrived(Block::new(std::mem::take(&mut parts))));
                self.blocks.start += 1;
                if self.blocks.is_empty() {
                    return Ok(());
                }
                missing = block_len(&shared, self.blocks.start);
            }
            missing -= bytes.len();
            if !bytes.is_empty() {
                parts.push(bytes);
            }
        }
        Ok(())
    }
}

fn block_len(shared: &Shared, number: u64) -> usize {
    let bytes = shared.block_bytes(number);
    (bytes.end - bytes.start) as usize
}

impl Drop for Request {
    fn drop(&mut self) {
        if self.blocks.is_empty() {
            return;
        }
        let stopped = || Error::new(ErrorKind::Unavailable, "the request was given up");
        let failure = Arc::new(self.failure.take().unwrap_or_else(stopped));
        for number in self.blocks.clone() {
            self.shared.arrive(number, State::Failed(failure.clone()));
        }
    }
}
