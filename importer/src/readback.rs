//! A blob of one's own, read back from the registry and held against its digest.

use std::io::{self, BufRead, Read};

use dvcr_image::digest::{self, Digest, Hasher};
use dvcr_image::{BlobStream, Error, ErrorKind, Repository, Result};
use tokio::runtime::Handle;

/// The bytes of a blob from some place on, in order. The last of them come once the whole blob was found to have its digest.
pub(crate) struct ReadBack {
    runtime: Handle,
    stream: BlobStream,
    hasher: Hasher,
    /// Bytes that come before the place.
    before: u64,
    /// Bytes of the blob that did not come.
    left: u64,
    bytes: bytes::Bytes,
}

impl ReadBack {
    /// Reads the blob `digest` of `size` bytes from byte `from` on, by the runtime that this is called in. Blocking; must not be
    /// read on its async threads.
    pub(crate) fn new(repository: &Repository, digest: &Digest, size: u64, from: u64) -> Result<Self> {
        Ok(Self {
            runtime: Handle::current(),
            stream: repository.blob(digest, size),
            hasher: Hasher::matching(digest)?,
            before: from,
            left: size,
            bytes: bytes::Bytes::new(),
        })
    }

    /// The next bytes that were not [consumed](BufRead::consume); none at the end.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] when the blob has not its digest, and those of [`BlobStream::next`].
    pub(crate) fn fill(&mut self) -> Result<&[u8]> {
        while self.bytes.is_empty() && self.left > 0 {
            let Some(mut bytes) = self.runtime.block_on(self.stream.next())? else {
                let text = format!("the blob {} ended early", self.stream.digest());
                return Err(Error::new(ErrorKind::Mismatch, text));
            };
            self.hasher.update(&bytes);
            let left = self.left.saturating_sub(bytes.len() as u64);
            if left == 0 {
                let found = self.hasher.clone().finish()?;
                digest::same(&found, self.stream.digest(), "what was read back from the registry")?;
            }
            self.left = left;
            let before = self.before.min(bytes.len() as u64);
            let _ = bytes.split_to(before as usize);
            self.before -= before;
            self.bytes = bytes;
        }
        Ok(&self.bytes)
    }
}

impl BufRead for ReadBack {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        Ok(self.fill()?)
    }

    fn consume(&mut self, count: usize) {
        let _ = self.bytes.split_to(count.min(self.bytes.len()));
    }
}

impl Read for ReadBack {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill()?;
        let count = buf.len().min(bytes.len());
        buf[..count].copy_from_slice(&bytes[..count]);
        self.consume(count);
        Ok(count)
    }
}
