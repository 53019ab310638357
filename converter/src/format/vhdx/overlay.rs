//! A file as it is once its log is replayed, without a write to it.

use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;
use std::sync::Arc;

use super::LOG_SECTOR_BYTES;
use crate::io::{Extent, ExtentKind, ReadAt};

/// One sector of new content.
pub(super) type Sector = Box<[u8; LOG_SECTOR_BYTES]>;

/// The bytes of `inner` under patches. The later patch hides the earlier one.
pub(super) struct Overlay {
    inner: Arc<dyn ReadAt>,
    len: u64,
    /// By their first byte; they do not overlap. One without a sector is zeros of any length.
    patches: BTreeMap<u64, Patch>,
}

struct Patch {
    end: u64,
    sector: Option<Sector>,
}

impl Overlay {
    pub(super) fn new(inner: Arc<dyn ReadAt>) -> Self {
        let len = inner.len();
        Self { inner, len, patches: BTreeMap::new() }
    }

    /// Makes the file at least `len` bytes long; what it did not have reads as zeros.
    pub(super) fn extend(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    /// Puts a sector at `start`, a multiple of [`LOG_SECTOR_BYTES`]; `None` if no file reaches that far.
    pub(super) fn put_sector(&mut self, start: u64, sector: Sector) -> Option<()> {
        self.put(start, LOG_SECTOR_BYTES as u64, Some(sector))
    }

    /// Puts `len` zeros at `start`, both multiples of [`LOG_SECTOR_BYTES`]; `None` if no file reaches that far.
    pub(super) fn put_zeros(&mut self, start: u64, len: u64) -> Option<()> {
        self.put(start, len, None)
    }

    fn put(&mut self, start: u64, len: u64, sector: Option<Sector>) -> Option<()> {
        let end = start.checked_add(len)?;
        if len == 0 {
            return Some(());
        }
        self.extend(end);
        // Sectors are aligned: only zeros can begin before this patch and reach into it.
        if let Some((_, before)) = self.patches.range_mut(..start).next_back()
            && before.end > start
        {
            let rest = std::mem::replace(&mut before.end, start);
            if rest > end {
                self.patches.insert(end, Patch { end: rest, sector: None });
            }
        }
        while let Some((&hidden, _)) = self.patches.range(start..end).next() {
            if let Some(patch) = self.patches.remove(&hidden)
                && patch.end > end
            {
                self.patches.insert(end, Patch { end: patch.end, sector: None });
            }
        }
        self.patches.insert(start, Patch { end, sector });
        Some(())
    }

    /// The patch that covers `offset`, and where the next one begins.
    fn around(&self, offset: u64) -> (Option<(u64, &Patch)>, u64) {
        let here = self.patches.range(..=offset).next_back().filter(|(_, patch)| patch.end > offset);
        let next = self.patches.range((Bound::Excluded(offset), Bound::Unbounded)).next();
        (here.map(|(start, patch)| (*start, patch)), next.map_or(u64::MAX, |(start, _)| *start))
    }
}

impl ReadAt for Overlay {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.len);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let stored = self.inner.len().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (stored, beyond) = buf.split_at_mut(stored);
        beyond.fill(0);
        if !stored.is_empty() {
            self.inner.read_exact_at(stored, offset)?;
        }
        let first = self.around(offset).0.map_or(offset, |(start, _)| start);
        for (&start, patch) in self.patches.range(first..end) {
            let from = start.max(offset);
            let into = &mut buf[(from - offset) as usize..(patch.end.min(end) - offset) as usize];
            match &patch.sector {
                Some(sector) => {
                    let skip = (from - start) as usize;
                    into.copy_from_slice(&sector[skip..skip + into.len()]);
                }
                None => into.fill(0),
            }
        }
        Ok(())
    }

    fn is_forward_only(&self) -> bool {
        self.inner.is_forward_only()
    }

    fn extent_at(&self, offset: u64) -> Option<Extent> {
        let (here, next) = self.around(offset);
        let (kind, end) = match here {
            Some((_, patch)) => {
                let kind = if patch.sector.is_some() { ExtentKind::Data } else { ExtentKind::Hole };
                (kind, patch.end)
            }
            None if offset >= self.inner.len() => (ExtentKind::Hole, next),
            None => match self.inner.extent_at(offset) {
                Some(extent) => (extent.kind, extent.end().min(next)),
                None => (ExtentKind::Data, self.inner.len().min(next)),
            },
        };
        let len = end.min(self.len).checked_sub(offset).filter(|len| *len > 0)?;
        Some(Extent { start: offset, len, kind, host: None })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Bytes(Vec<u8>);

    impl ReadAt for Bytes {
        fn len(&self) -> u64 {
            self.0.len() as u64
        }

        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            let at = offset as usize;
            buf.copy_from_slice(self.0.get(at..at + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }
    }

    const S: usize = LOG_SECTOR_BYTES;

    proptest! {
        #[test]
        fn an_overlay_reads_as_a_file_that_was_written_to(
            sectors in 1usize..12,
            patches in proptest::collection::vec((0u64..16, 0u64..6, any::<bool>(), 1u8..), 0..24),
            reads in proptest::collection::vec((0.0..1.0f64, 0.0..1.0f64), 1..12),
        ) {
            let mut model = vec![0xee; sectors * S - 700];
            let mut overlay = Overlay::new(Arc::new(Bytes(model.clone())));
            for (at, len, zeros, value) in patches {
                let len = if zeros { len } else { 1 };
                let (start, end) = (at as usize * S, (at + len) as usize * S);
                if len > 0 && model.len() < end {
                    model.resize(end, 0);
                }
                model.get_mut(start..end).unwrap_or_default().fill(if zeros { 0 } else { value });
                if zeros {
                    overlay.put_zeros(start as u64, len * S as u64).unwrap();
                } else {
                    overlay.put_sector(start as u64, Box::new([value; S])).unwrap();
                }
            }
            prop_assert_eq!(overlay.len(), model.len() as u64);
            for (at, len) in reads {
                let at = (at * model.len() as f64) as usize;
                let len = (len * (model.len() - at) as f64) as usize;
                let mut buf = vec![1; len];
                overlay.read_exact_at(&mut buf, at as u64).unwrap();
                prop_assert!(buf == model[at..at + len]);
            }
            let mut at = 0;
            while at < model.len() as u64 {
                let extent = overlay.extent_at(at).unwrap();
                prop_assert!(extent.start == at && extent.len > 0 && extent.end() <= overlay.len());
                let bytes = &model[at as usize..extent.end() as usize];
                prop_assert!(extent.is_data() || bytes.iter().all(|&b| b == 0), "{:?}", extent);
                at = extent.end();
            }
            prop_assert!(overlay.read_exact_at(&mut [0; 2], overlay.len() - 1).is_err());
        }
    }

    #[test]
    fn patches_that_no_file_can_have_are_refused() {
        let mut overlay = Overlay::new(Arc::new(Bytes(vec![0; S])));
        assert!(overlay.put_zeros(u64::MAX - 4095, 8192).is_none());
        assert_eq!(overlay.len(), S as u64);
    }
}
