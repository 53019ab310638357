//! Reading a range of a disk whose bytes lie here and there in a file: in few requests, in the order of the file.

use std::sync::Mutex;

use super::expansion::{Expansion, Stored};
use crate::io::ReadAt;
use crate::{Error, Result};

/// Stored ranges at most this far apart are read at once: over a network a request costs more than the gap.
const GAP_BYTES_MAX: u64 = 64 << 10;

/// Most bytes read at once for several pieces.
const GROUP_BYTES_MAX: u64 = 4 << 20;

/// A part of a request that is stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece<C> {
    /// First byte in the request's buffer.
    pub(super) at: usize,
    /// Bytes of the request; never zero.
    pub(super) len: usize,
    /// First byte in the file.
    pub(super) host: u64,
    /// Bytes in the file, which has them; as many as `len` if they are not coded.
    pub(super) stored: u64,
    /// How to decode them, if they are coded.
    pub(super) code: Option<C>,
}

/// The stored parts of a request.
#[derive(Debug)]
pub(super) struct Pieces<C>(Vec<Piece<C>>);

impl<C> Pieces<C> {
    pub(super) fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds a piece. One that continues the last one in the file as well as in the buffer becomes a part of it.
    pub(super) fn push(&mut self, piece: Piece<C>) {
        match self.0.last_mut() {
            Some(last) if last.continues_with(&piece) => {
                last.len += piece.len;
                last.stored += piece.stored;
            }
            _ => self.0.push(piece),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Notes that these are read for the disk from `start` to `end`; fails with [`crate::ErrorKind::Limit`] if too few bytes
    /// of the file are too much of the disk.
    pub(super) fn record(&self, expansion: &Expansion, start: u64, end: u64) -> Result<()> {
        let stored = |piece: &Piece<C>| Stored {
            host: piece.host,
            bytes: piece.stored,
            disk_bytes: piece.len as u64,
            packed: piece.code.is_some(),
        };
        expansion.record(start, end, self.0.iter().map(stored))
    }

    /// Fills the pieces' places in `buf`: neighbours in the file are read with one request, and `decode` puts the
    /// stored bytes of a coded piece into its place. `scratch` is memory to be used again.
    pub(super) fn read(
        mut self,
        source: &dyn ReadAt,
        buf: &mut [u8],
        scratch: &mut Vec<u8>,
        mut decode: impl FnMut(&Piece<C>, &C, &[u8], &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.0.sort_unstable_by_key(|piece| piece.host);
        let mut rest = self.0.as_slice();
        while let Some(first) = rest.first() {
            let start = first.host;
            let mut end = first.end();
            let members = 1 + rest[1..]
                .iter()
                .take_while(|piece| {
                    let near = piece.host <= end.saturating_add(GAP_BYTES_MAX);
                    let fits = piece.end().max(end) - start <= GROUP_BYTES_MAX;
                    if near && fits {
                        end = end.max(piece.end());
                    }
                    near && fits
                })
                .count();
            let (group, others) = rest.split_at(members);
            rest = others;
            let failed = |e| Error::io(format!("reading the image at file offset {start}"), e);
            if let [Piece { code: None, at, len, .. }] = *group {
                source.read_exact_at(&mut buf[at..at + len], start).map_err(failed)?;
                continue;
            }
            let bytes = (end - start) as usize;
            if scratch.len() < bytes {
                scratch.resize(bytes, 0);
            }
            source.read_exact_at(&mut scratch[..bytes], start).map_err(failed)?;
            for piece in group {
                let from = (piece.host - start) as usize;
                let from = &scratch[from..from + piece.stored as usize];
                let into = &mut buf[piece.at..piece.at + piece.len];
                match &piece.code {
                    None => into.copy_from_slice(from),
                    Some(code) => decode(piece, code, from, into)?,
                }
            }
        }
        Ok(())
    }
}

impl<C> Piece<C> {
    fn end(&self) -> u64 {
        self.host + self.stored
    }

    fn continues_with(&self, next: &Piece<C>) -> bool {
        self.code.is_none() && next.code.is_none() && self.end() == next.host && self.at + self.len == next.at
    }
}

/// Things that one thread uses at a time; there are never more than threads that ask at once.
pub(super) struct Pool<T>(Mutex<Vec<T>>);

impl<T> Pool<T> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Lends one that nobody uses, or a new one.
    pub(super) fn with<R>(&self, make: impl FnOnce() -> T, work: impl FnOnce(&mut T) -> R) -> R {
        let pool = || self.0.lock().unwrap_or_else(|e| e.into_inner());
        let taken = pool().pop();
        let mut thing = taken.unwrap_or_else(make);
        let result = work(&mut thing);
        pool().push(thing);
        result
    }
}
