//! What the fuzz targets of the wrappers do.

use std::io::Read;

use dvcr_converter::limits::Limits;
use dvcr_converter::wrapper::{self, Wrapper};

/// Peels the wrappers off the input and reads what is inside.
pub fn nested(bytes: &[u8]) {
    let limits = wrapper_limits();
    let Ok(unwrapped) = wrapper::unwrap(Box::new(bytes), &limits) else { return };
    let mut inner = unwrapped.reader.take(2 * limits.decoded_bytes_max);
    let mut out = Vec::new();
    if inner.read_to_end(&mut out).is_ok() {
        assert!(out.starts_with(&unwrapped.head));
        assert!(unwrapped.wrappers.is_empty() || out.len() as u64 <= limits.decoded_bytes_max);
    }
}

/// Decodes a file of gz.
pub fn gz(bytes: &[u8]) {
    decode(Wrapper::Gzip, bytes);
}

/// Decodes a file of xz.
pub fn xz(bytes: &[u8]) {
    decode(Wrapper::Xz, bytes);
}

/// Decodes a file of zst.
pub fn zst(bytes: &[u8]) {
    decode(Wrapper::Zstd, bytes);
}

/// Decodes a file of bz2.
pub fn bz2(bytes: &[u8]) {
    decode(Wrapper::Bzip2, bytes);
}

/// Decodes a file of lz4.
pub fn lz4(bytes: &[u8]) {
    decode(Wrapper::Lz4, bytes);
}

/// Decodes the input by one thread, by several, and from a source that gives one byte at a time: all agree.
///
/// The threads are joined when their reader is dropped, so that none outlives an input; which of them does what
/// differs from run to run, the outcome does not.
fn decode(wrapper: Wrapper, bytes: &[u8]) {
    // What has no magic comes to no decoder.
    if bytes.is_empty() {
        return;
    }
    let limits = wrapper_limits();
    let read = |source: Box<dyn Read + Send>, workers| {
        let mut decoder = wrapper::decoder_with(wrapper, source, &limits, workers).ok()?;
        let mut out = Vec::new();
        decoder.read_to_end(&mut out).ok()?;
        assert!(out.len() as u64 <= limits.decoded_bytes_max);
        Some(out)
    };
    let owned = || std::io::Cursor::new(bytes.to_vec());
    let one = read(Box::new(owned()), 1);
    assert!(read(Box::new(owned()), 3) == one, "several threads disagree");
    assert!(read(Box::new(Bytewise(owned())), 2) == one, "a source of single bytes disagrees");
}

fn wrapper_limits() -> Limits {
    Limits { decoded_bytes_max: 4 << 20, decoder_memory_bytes_max: 24 << 20, ..Limits::default() }
}

struct Bytewise<R>(R);

impl<R: Read> Read for Bytewise<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = buf.len().min(1);
        self.0.read(&mut buf[..n])
    }
}
