//! What each fuzz target does with its input. `converter/tests/corpus.rs` does the same with every file of the corpus.
#![allow(dead_code, reason = "each target uses its own body")]

use std::io::Read;
use std::sync::Arc;

use dvcr_converter::format;
use dvcr_converter::io::ReadAt;
use dvcr_converter::limits::Limits;
use dvcr_converter::wrapper;

/// Most bytes of a disk read for one input.
const DISK_BYTES_MAX: u64 = 4 << 20;

/// Most extents asked for in one input.
const EXTENTS_MAX: usize = 256;

/// Opens the input as an image, walks its extents and reads from their starts.
pub fn qcow2_open_read(bytes: &[u8]) {
    let limits = Limits { virtual_size_max: 1 << 44, table_bytes_max: 1 << 20, ..Limits::default() };
    let Ok(image) = format::open(Arc::new(Bytes(bytes.to_vec())), &limits) else { return };
    let size = image.disk.virtual_size();
    let mut buf = vec![0; 100_000];
    let mut read = 0;
    let mut at = 0;
    for _ in 0..EXTENTS_MAX {
        if at >= size || read > DISK_BYTES_MAX {
            break;
        }
        let Ok(extent) = image.disk.extent_at(at) else { break };
        assert!(extent.start == at && extent.len > 0 && extent.end() <= size, "{extent:?}");
        let n = (size - at).min(buf.len() as u64);
        let buf = &mut buf[..n as usize];
        if image.disk.read_at(buf, at).is_ok() && !extent.is_data() {
            let zeros = extent.len.min(n) as usize;
            assert!(buf[..zeros].iter().all(|&b| b == 0), "{extent:?} is not zero");
        }
        read += n;
        at = extent.end();
    }
    // Past the end there is nothing, whatever the image says.
    assert!(image.disk.read_at(&mut [0; 512], size).is_err() || size == 0 || image.info.format.is_plain());
}

/// Probes the input with and without a known length.
pub fn probe(bytes: &[u8]) {
    let limits = Limits::default();
    for length in [None, Some(bytes.len() as u64), Some(u64::MAX)] {
        if let Ok(probe) = format::probe(bytes, length, &limits)
            && let Some(size) = probe.virtual_size
        {
            assert!(size <= limits.virtual_size_max && size % 512 == 0);
        }
    }
}

/// Peels the wrappers off the input and reads what is inside.
pub fn wrapper(bytes: &[u8]) {
    let limits =
        Limits { decoded_bytes_max: 4 << 20, decoder_memory_bytes_max: 8 << 20, ..Limits::default() };
    let Ok(unwrapped) = wrapper::unwrap(Box::new(bytes), &limits) else { return };
    let mut inner = unwrapped.reader.take(2 * limits.decoded_bytes_max);
    let mut out = Vec::new();
    if inner.read_to_end(&mut out).is_ok() {
        assert!(out.starts_with(&unwrapped.head));
        assert!(unwrapped.wrappers.is_empty() || out.len() as u64 <= limits.decoded_bytes_max);
    }
}

/// An image file in memory.
struct Bytes(Vec<u8>);

impl ReadAt for Bytes {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let bytes = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)?.get(..buf.len()));
        buf.copy_from_slice(bytes.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}
