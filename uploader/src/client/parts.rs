//! A file as parts: read ahead on a thread, zeros as next to nothing, the rest compressed where that pays.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::{Error, Image};

/// What is read, compressed, or found to be zeros at a time, bytes.
const BLOCK_BYTES: usize = 1 << 20;
/// Most bytes of data in a part: what a broken connection costs.
pub(crate) const PART_DATA_BYTES_MAX: usize = 16 << 20;
/// Fewest, however slow the link is.
pub(crate) const PART_DATA_BYTES_MIN: usize = BLOCK_BYTES;
/// Most bytes of a part, zeros included.
const PART_BYTES_MAX: u64 = 1 << 30;
/// Parts that wait while one is sent.
const PARTS_WAITING_MAX: usize = 1;
/// As fast as it gets: the link is what is waited for.
const ZSTD_LEVEL: i32 = 1;

/// A part of the file.
pub(crate) struct Part {
    /// Bytes of the file.
    pub(crate) len: u64,
    pub(crate) body: Bytes,
    /// The body is `Content-Encoding: zstd`.
    pub(crate) is_coded: bool,
    /// What compressing brought.
    pub(crate) trial: Option<Trial>,
}

/// How data was compressed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trial {
    pub(crate) data: u64,
    pub(crate) coded: u64,
    pub(crate) time: Duration,
}

/// What the sender has learned, for the parts that are not made yet.
pub(crate) struct Manner {
    /// The server takes zstd.
    pub(crate) codes: bool,
    /// Compressing data pays.
    pub(crate) pays: AtomicBool,
    /// Bytes of data in a part.
    pub(crate) part_bytes: AtomicUsize,
}

/// Reads the file from `position` on, ahead of whoever sends; ends when the receiver is dropped.
pub(crate) fn read_ahead(
    image: Arc<Image>,
    position: u64,
    manner: Arc<Manner>,
) -> mpsc::Receiver<Result<Part, Error>> {
    let (parts, receiver) = mpsc::channel(PARTS_WAITING_MAX);
    tokio::task::spawn_blocking(move || {
        let mut reader = Reader { image, position, manner, zeros: Vec::new(), data_until: None };
        while reader.position < reader.image.len {
            let part = reader.part();
            let failed = part.is_err();
            if parts.blocking_send(part).is_err() || failed {
                return;
            }
        }
    });
    receiver
}

struct Reader {
    image: Arc<Image>,
    position: u64,
    manner: Arc<Manner>,
    /// A frame with a block of zeros.
    zeros: Vec<u8>,
    /// Where the data that the position is in ends, if that was asked.
    data_until: Option<u64>,
}

impl Reader {
    fn part(&mut self) -> Result<Part, Error> {
        let first = self.position;
        let data_max = self.manner.part_bytes.load(Ordering::Relaxed);
        let codes = self.manner.codes;
        let compresses = codes && self.manner.pays.load(Ordering::Relaxed);
        // Blocks of data as they are, until one has to be coded; then all of them are.
        let (mut plain, mut coded) = (Vec::new(), Vec::new());
        let mut is_coded = compresses;
        let mut trial = Trial { data: 0, coded: 0, time: Duration::ZERO };
        let failed = |source: io::Error| match source.kind() {
            // It was longer when it was opened.
            io::ErrorKind::UnexpectedEof => Error::Changed(self.image.path.clone()),
            _ => Error::File { path: self.image.path.clone(), source },
        };
        let mut block = Vec::new();
        while self.position < self.image.len
            && self.position - first < PART_BYTES_MAX
            && trial.data + plain.len() as u64 + block.len() as u64 <= data_max as u64
        {
            let count = (self.image.len - self.position).min(BLOCK_BYTES as u64);
            let is_zero = codes && count == BLOCK_BYTES as u64 && {
                let hole = is_hole(&self.image, self.position, count, &mut self.data_until);
                if !hole {
                    read(&self.image, self.position, count, &mut block).map_err(failed)?;
                }
                hole || is_zeros(&block)
            };
            if is_zero {
                if self.zeros.is_empty() {
                    self.zeros = zstd::bulk::compress(&vec![0; BLOCK_BYTES], ZSTD_LEVEL).map_err(failed)?;
                }
                if !is_coded {
                    is_coded = true;
                    compress(&plain, &mut coded, &mut trial).map_err(failed)?;
                    plain = Vec::new();
                }
                coded.extend_from_slice(&self.zeros);
            } else {
                if !codes || count < BLOCK_BYTES as u64 {
                    read(&self.image, self.position, count, &mut block).map_err(failed)?;
                }
                match is_coded {
                    true => compress(&block, &mut coded, &mut trial).map_err(failed)?,
                    false => plain.extend_from_slice(&block),
                }
            }
            block.clear();
            self.position += count;
        }
        if self.position == self.image.len && !self.image.is_unchanged() {
            return Err(Error::Changed(self.image.path.clone()));
        }
        let body = if is_coded { coded } else { plain };
        let trial = Some(trial).filter(|trial| trial.data > 0);
        Ok(Part { len: self.position - first, body: body.into(), is_coded, trial })
    }
}

/// Adds data as frames of a block each: what decodes them may take them one by one.
fn compress(data: &[u8], coded: &mut Vec<u8>, trial: &mut Trial) -> io::Result<()> {
    let (begun, before) = (Instant::now(), coded.len());
    for block in data.chunks(BLOCK_BYTES) {
        coded.extend_from_slice(&zstd::bulk::compress(block, ZSTD_LEVEL)?);
    }
    trial.data += data.len() as u64;
    trial.coded += (coded.len() - before) as u64;
    trial.time += begun.elapsed();
    Ok(())
}

fn read(image: &Image, position: u64, count: u64, block: &mut Vec<u8>) -> io::Result<()> {
    block.resize(usize::try_from(count).map_err(io::Error::other)?, 0);
    image.file.read_exact_at(block, position)
}

fn is_zeros(block: &[u8]) -> bool {
    block.chunks(4096).all(|page| page.iter().fold(0, |any, byte| any | byte) == 0)
}

/// Whether the file has nothing but a hole there. `data_until` remembers where the data around a position ends.
fn is_hole(image: &Image, position: u64, count: u64, data_until: &mut Option<u64>) -> bool {
    if data_until.is_some_and(|until| position < until) {
        return false;
    }
    match seek(&image.file, SeekFrom::Data(position)) {
        // Nothing but a hole to the end.
        Err(Errno::NXIO) => true,
        Ok(data) if data >= position.saturating_add(count) => true,
        Ok(data) => {
            *data_until = seek(&image.file, SeekFrom::Hole(data)).ok();
            false
        }
        // A file system that cannot tell.
        Err(_) => {
            *data_until = Some(u64::MAX);
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    async fn parts(image: Image, codes: bool, pays: bool) -> Vec<Part> {
        let manner =
            Manner { codes, pays: AtomicBool::new(pays), part_bytes: AtomicUsize::new(PART_DATA_BYTES_MAX) };
        let mut receiver = read_ahead(Arc::new(image), 0, Arc::new(manner));
        let mut parts = Vec::new();
        while let Some(part) = receiver.recv().await {
            parts.push(part.unwrap());
        }
        parts
    }

    fn decoded(part: &Part) -> Vec<u8> {
        match part.is_coded {
            true => zstd::decode_all(&part.body[..]).unwrap(),
            false => part.body.to_vec(),
        }
    }

    #[tokio::test]
    async fn parts_are_the_file_and_holes_weigh_next_to_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let noise: Vec<u8> =
            (0..40u64 << 20).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
        let mut file = File::create(&path).unwrap();
        file.write_all(&noise[..20 << 20]).unwrap();
        file.set_len(2 << 30).unwrap();
        file.write_all_at(&noise[20 << 20..], (1 << 30) + 12345).unwrap();
        drop(file);
        for (codes, pays) in [(true, true), (true, false)] {
            let parts = parts(Image::open(&path).unwrap(), codes, pays).await;
            let wire: usize = parts.iter().map(|part| part.body.len()).sum();
            assert!(wire < 42 << 20, "{wire}");
            let whole = File::open(&path).unwrap();
            let (mut position, mut expected) = (0, Vec::new());
            for part in &parts {
                let found = decoded(part);
                assert_eq!(found.len() as u64, part.len);
                expected.resize(found.len(), 0);
                whole.read_exact_at(&mut expected, position).unwrap();
                assert!(found == expected, "the part at {position}");
                position += part.len;
            }
            assert_eq!(position, 2 << 30);
        }
        let small = dir.path().join("small");
        std::fs::write(&small, vec![0; 3 << 20]).unwrap();
        let parts = parts(Image::open(&small).unwrap(), false, true).await;
        assert!(parts.len() == 1 && !parts[0].is_coded && parts[0].body.len() == 3 << 20);
    }

    #[tokio::test]
    async fn a_file_that_changes_is_not_uploaded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let image = Image::open(&path).unwrap();
        let id = image.id.clone();
        File::options().append(true).open(&path).unwrap().write_all(b"more").unwrap();
        assert_ne!(Image::open(&path).unwrap().id, id);
        let manner =
            Manner { codes: false, pays: AtomicBool::new(false), part_bytes: AtomicUsize::new(1 << 20) };
        let mut receiver = read_ahead(Arc::new(image), 0, Arc::new(manner));
        assert!(matches!(receiver.recv().await, Some(Err(Error::Changed(_)))));
    }
}
