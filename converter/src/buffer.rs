//! Buffers that direct I/O accepts.

/// What the memory, offset and length of direct I/O must be multiples of, bytes; enough for every common device.
pub const ALIGN_BYTES: usize = 4096;

/// A zero-filled buffer whose first byte lies at a multiple of [`ALIGN_BYTES`] in memory.
pub struct AlignedBuf {
    // Never grows, so that the bytes stay where they are.
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// Allocates `len` bytes.
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + ALIGN_BYTES];
        // Only a hint to direct I/O: a wrong answer costs the fast path, not safety.
        let start = bytes.as_ptr().align_offset(ALIGN_BYTES).min(ALIGN_BYTES);
        Self { bytes, start, len }
    }

    /// The first `len` bytes, at most all.
    pub fn first(&self, len: usize) -> &[u8] {
        &self.bytes[self.start..self.start + len.min(self.len)]
    }

    /// The first `len` bytes, at most all.
    pub fn first_mut(&mut self, len: usize) -> &mut [u8] {
        let len = len.min(self.len);
        &mut self.bytes[self.start..self.start + len]
    }
}
