//! Raw disks as they come down a stream, and the fixed VHD among them, which only its end gives away.

use std::io::{self, Read};

use crate::format::Format;
use crate::format::vpc::{FOOTER_TAIL_BYTES, is_fixed_footer};

/// Bytes held back until the end of the stream.
pub const HELD_BYTES: u64 = FOOTER_TAIL_BYTES as u64;

/// Room for reads of a few bytes.
const SMALL_BYTES: usize = 8 << 10;

/// Reads a disk whose stored bytes are those of the disk, without the footer that makes the stream a fixed VHD.
///
/// The last 512 bytes are held back until the end tells whether they are a footer, with a valid checksum and the size
/// of just what came before. The disk of a stream is all of that, also where [`crate::format::open`] ends it, as
/// qemu does, with the last whole cylinder.
#[derive(Debug)]
pub struct PlainReader<R> {
    inner: R,
    /// Bytes that `inner` gave so far.
    bytes: u64,
    /// The last of them.
    held: Vec<u8>,
    /// What a small read left over, from `ready_at` on.
    ready: Vec<u8>,
    ready_at: usize,
    ended: bool,
    is_vpc: bool,
}

impl<R: Read> PlainReader<R> {
    /// Reads the disk in `inner`, which nothing has been taken from.
    pub fn new(inner: R) -> Self {
        let held = Vec::with_capacity(FOOTER_TAIL_BYTES);
        Self { inner, bytes: 0, held, ready: Vec::new(), ready_at: 0, ended: false, is_vpc: false }
    }

    /// The format, `probed` by the first bytes, in the light of what was read since; certain at the end.
    pub fn format(&self, probed: Format) -> Format {
        if self.is_vpc { Format::Vpc } else { probed }
    }

    /// Fills `buf`, which is longer than a footer; 0 only at the end.
    fn advance(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.ended {
            return Ok(0);
        }
        let mut filled = self.held.len();
        buf[..filled].copy_from_slice(&self.held);
        let mut result = Ok(1);
        while filled <= FOOTER_TAIL_BYTES && matches!(result, Ok(1..)) {
            result = self.inner.read(&mut buf[filled..]);
            let n = *result.as_ref().unwrap_or(&0);
            filled += n;
            self.bytes += n as u64;
        }
        let ready = filled.saturating_sub(FOOTER_TAIL_BYTES);
        self.held.clear();
        self.held.extend(&buf[ready..filled]);
        if result? > 0 {
            return Ok(ready);
        }
        self.ended = true;
        self.is_vpc = is_fixed_footer(&self.held, self.bytes);
        Ok(if self.is_vpc { 0 } else { filled })
    }
}

impl<R: Read> Read for PlainReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.ready_at == self.ready.len() {
            if buf.len() > FOOTER_TAIL_BYTES {
                return self.advance(buf);
            }
            let mut ready = std::mem::take(&mut self.ready);
            self.ready_at = 0;
            ready.resize(SMALL_BYTES, 0);
            let n = self.advance(&mut ready)?;
            ready.truncate(n);
            self.ready = ready;
        }
        let left = &self.ready[self.ready_at..];
        let n = left.len().min(buf.len());
        buf[..n].copy_from_slice(&left[..n]);
        self.ready_at += n;
        Ok(n)
    }
}
