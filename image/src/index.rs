//! The index of a stored file: a digest of each of its chunks, so that a part of it is verified without the rest.
//!
//! ```text
//!  the file's bytes ──> Builder ──> Index ──> a small layer of the image ──> Index ──> Window: verified ranges
//! ```
//!
//! The digests are those of the stored bytes, whatever their format: `docs/decisions/0005-an-index-of-stored-chunks.md`
//! tells why, `docs/formats/disk-image.md` the bytes.

use std::fmt;
use std::io::Cursor;

use crate::tar::{self, Entries, Forward, Kind};
use crate::{Error, ErrorKind, Result};

/// Bytes of the stored file under one digest.
pub const CHUNK_BYTES: u64 = 1 << 20;
/// Longest file that gets an index, bytes; its index takes 64 MiB, here and wherever the image is read.
pub const FILE_BYTES_MAX: u64 = 2 << 40;
/// Where the index lies in its layer.
pub const PATH: &str = "dvcr/index";

const MAGIC: [u8; 8] = *b"DVCRIDX\n";
const VERSION: u32 = 1;
/// Number of BLAKE3 with 256 bits of output.
const BLAKE3_256: u32 = 1;
const HEADER_BYTES: usize = 64;
const DIGEST_BYTES: usize = blake3::OUT_LEN;
/// Longest index layer that is read: that of the longest file, and the tar around it.
pub(crate) const LAYER_BYTES_MAX: u64 =
    FILE_BYTES_MAX / CHUNK_BYTES * DIGEST_BYTES as u64 + HEADER_BYTES as u64 + (64 << 10);

/// Makes the index of a file from its bytes in order.
pub struct Builder {
    file_bytes: u64,
    digests: Vec<u8>,
    hasher: blake3::Hasher,
    /// Bytes of the chunk that is not full yet.
    filled: u64,
}

impl Builder {
    /// Begins at the start of the file.
    pub fn new() -> Self {
        Self { file_bytes: 0, digests: Vec::new(), hasher: blake3::Hasher::new(), filled: 0 }
    }

    /// Adds bytes of the file.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.file_bytes = self.file_bytes.saturating_add(bytes.len() as u64);
        if self.file_bytes > FILE_BYTES_MAX {
            self.digests = Vec::new();
            return;
        }
        while !bytes.is_empty() {
            let count = (CHUNK_BYTES - self.filled).min(bytes.len() as u64) as usize;
            let (chunk, rest) = bytes.split_at(count);
            self.hasher.update(chunk);
            self.filled += count as u64;
            if self.filled == CHUNK_BYTES {
                self.end_chunk();
            }
            bytes = rest;
        }
    }

    /// The index; `None` of a file of more than [`FILE_BYTES_MAX`] bytes.
    pub fn finish(mut self) -> Option<Index> {
        if self.file_bytes > FILE_BYTES_MAX {
            return None;
        }
        if self.filled > 0 {
            self.end_chunk();
        }
        Some(Index { file_bytes: self.file_bytes, digests: self.digests })
    }

    fn end_chunk(&mut self) {
        self.digests.extend(self.hasher.finalize().as_bytes());
        self.hasher.reset();
        self.filled = 0;
    }
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

/// The digests of a file's chunks.
#[derive(Clone, PartialEq, Eq)]
pub struct Index {
    file_bytes: u64,
    digests: Vec<u8>,
}

impl Index {
    /// Length of the file, bytes.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Number of chunks; the last one may be shorter than the others.
    pub fn chunks(&self) -> u64 {
        (self.digests.len() / DIGEST_BYTES) as u64
    }

    /// Whether `parts`, one after the other, are the bytes of a chunk.
    pub fn is_right<'a>(&self, chunk: u64, parts: impl IntoIterator<Item = &'a [u8]>) -> bool {
        let start = usize::try_from(chunk).ok().and_then(|chunk| chunk.checked_mul(DIGEST_BYTES));
        let Some(expected) = start.and_then(|start| self.digests.get(start..)?.get(..DIGEST_BYTES)) else {
            return false;
        };
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(part);
        }
        hasher.finalize().as_bytes() == expected
    }

    /// The bytes of the file `dvcr/index`.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.digests.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(BLAKE3_256.to_le_bytes());
        for number in [CHUNK_BYTES, self.file_bytes, self.chunks()] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.resize(HEADER_BYTES, 0);
        bytes.extend(&self.digests);
        bytes
    }

    /// Reads what [`Index::encode`] wrote; anything else is [`ErrorKind::Corrupt`], and a later version or another way to
    /// hash [`ErrorKind::Unsupported`].
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let malformed = |what: String| Error::new(ErrorKind::Corrupt, format!("the disk's index {what}"));
        let Some((header, digests)) = bytes.split_at_checked(HEADER_BYTES) else {
            return Err(malformed(format!("has {} bytes, fewer than its header", bytes.len())));
        };
        if header[..8] != MAGIC {
            return Err(malformed("does not begin as one".to_owned()));
        }
        let small = |at: usize| header[at..at + 4].iter().rev().fold(0, |n, b| n << 8 | u32::from(*b));
        let large = |at: usize| header[at..at + 8].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
        let (version, algorithm, chunk_bytes) = (small(8), small(12), large(16));
        if (version, algorithm, chunk_bytes) != (VERSION, BLAKE3_256, CHUNK_BYTES) {
            let text = format!(
                "the disk's index has version {version}, digest {algorithm} and chunks of {chunk_bytes} bytes; this \
                 program reads version {VERSION}, digest {BLAKE3_256}, chunks of {CHUNK_BYTES}: use a newer one"
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let (file_bytes, chunks) = (large(24), large(32));
        if file_bytes > FILE_BYTES_MAX || chunks != file_bytes.div_ceil(CHUNK_BYTES) {
            return Err(malformed(format!("tells of {chunks} chunks in a file of {file_bytes} bytes")));
        }
        if digests.len() as u64 != chunks * DIGEST_BYTES as u64 {
            return Err(malformed(format!("has {} bytes of digests for {chunks} chunks", digests.len())));
        }
        if header[40..].iter().any(|b| *b != 0) {
            return Err(malformed("says more than this version knows of".to_owned()));
        }
        Ok(Self { file_bytes, digests: digests.to_vec() })
    }

    /// The bytes of a layer, an uncompressed tar, that has nothing but the index.
    pub fn layer(&self) -> Vec<u8> {
        tar::small_file(PATH, &self.encode())
    }

    /// Finds the index in the bytes of its layer; a layer without one is [`ErrorKind::Corrupt`].
    pub fn from_layer(layer: &[u8]) -> Result<Self> {
        let mut source = Forward(Cursor::new(layer));
        let mut entries = Entries::new(&mut source);
        while let Some(entry) = entries.next()? {
            if entry.path != PATH || entry.kind != Kind::File || entry.sparse {
                continue;
            }
            let bytes =
                usize::try_from(entry.offset).ok().and_then(|start| layer.get(start..)).and_then(|rest| {
                    let len = usize::try_from(entry.size).ok()?;
                    rest.get(..len)
                });
            let cut = || Error::new(ErrorKind::Corrupt, format!("the layer ends before its file {PATH}"));
            return Self::decode(bytes.ok_or_else(cut)?);
        }
        Err(Error::new(ErrorKind::Corrupt, format!("the layer has no file {PATH}")))
    }
}

impl fmt::Debug for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (file_bytes, chunks) = (self.file_bytes, self.chunks());
        f.debug_struct("Index").field("file_bytes", &file_bytes).field("chunks", &chunks).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn index_of(bytes: &[u8], step: usize) -> Index {
        let mut builder = Builder::new();
        for part in bytes.chunks(step) {
            builder.update(part);
        }
        builder.finish().unwrap()
    }

    #[test]
    fn the_index_is_the_documented_bytes() {
        let chunk = CHUNK_BYTES as usize;
        let file = vec![7; chunk + 3];
        let bytes = index_of(&file, 1000).encode();
        assert_eq!(bytes.len(), 64 + 2 * 32);
        assert_eq!(&bytes[..16], b"DVCRIDX\n\x01\0\0\0\x01\0\0\0");
        assert_eq!(&bytes[16..24], &[0, 0, 16, 0, 0, 0, 0, 0]);
        assert_eq!(&bytes[24..32], &[3, 0, 16, 0, 0, 0, 0, 0]);
        assert_eq!(&bytes[32..40], &[2, 0, 0, 0, 0, 0, 0, 0]);
        assert!(bytes[40..64].iter().all(|b| *b == 0));
        assert_eq!(&bytes[64..96], blake3::hash(&file[..chunk]).as_bytes());
        assert_eq!(&bytes[96..], blake3::hash(&file[chunk..]).as_bytes());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn the_way_the_bytes_come_makes_no_difference_and_every_change_is_seen(
            len in 0usize..(3 << 20),
            step in 1usize..(2 << 20),
            flip in any::<proptest::sample::Index>(),
        ) {
            let step = step.max(4096);
            let mut file: Vec<u8> = (0..len).map(|n| (n * 31 % 251) as u8).collect();
            let index = index_of(&file, step);
            prop_assert_eq!(&index, &index_of(&file, usize::MAX >> 1));
            prop_assert_eq!(&Index::from_layer(&index.layer()).unwrap(), &index);
            prop_assert_eq!(index.chunks(), file.len().div_ceil(CHUNK_BYTES as usize) as u64);
            for (n, chunk) in file.chunks(CHUNK_BYTES as usize).enumerate() {
                let (a, b) = chunk.split_at(chunk.len() / 3);
                prop_assert!(index.is_right(n as u64, [a, b]));
            }
            prop_assert!(!index.is_right(index.chunks(), [&[][..]]));
            if len > 0 {
                let at = flip.index(len);
                file[at] ^= 1;
                let n = at / CHUNK_BYTES as usize;
                let chunk = file.chunks(CHUNK_BYTES as usize).nth(n).unwrap();
                prop_assert!(!index.is_right(n as u64, [chunk]));
            }
        }
    }

    #[test]
    fn a_malformed_index_is_refused_with_its_reason() {
        let good = index_of(&[1; 5000], 5000).encode();
        let changed = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            Index::decode(&bytes).unwrap_err()
        };
        assert_eq!(changed(0, b'X').kind(), ErrorKind::Corrupt);
        for at in [8, 12, 18] {
            assert_eq!(changed(at, 9).kind(), ErrorKind::Unsupported, "byte {at}");
        }
        for at in [26, 31, 32, 39, 63] {
            assert_eq!(changed(at, 0x7f).kind(), ErrorKind::Corrupt, "byte {at}");
        }
        for len in 0..good.len() {
            assert_eq!(Index::decode(&good[..len]).unwrap_err().kind(), ErrorKind::Corrupt, "{len} bytes");
        }
        let error = Index::from_layer(&tar::small_file("dvcr/other", &good)).unwrap_err();
        assert!(error.to_string().contains(PATH), "{error}");
        let layer = index_of(&[1; 5000], 5000).layer();
        for len in [0, 100, 512, 1100] {
            assert!(Index::from_layer(&layer[..len]).is_err(), "{len} bytes");
        }
    }
}
