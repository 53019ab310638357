//! Finding zeros fast.

/// Bytes compared in one step; also the finest grain at which zeros are looked for.
pub const BLOCK_BYTES: usize = 4096;

static ZERO_BLOCK: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// Whether every byte of `bytes` is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // A comparison with known zeros becomes memcmp, the fastest loop at hand; it stops at the first difference.
    bytes.chunks(BLOCK_BYTES).all(|block| ZERO_BLOCK.get(..block.len()) == Some(block))
}

/// A run of blocks that are all zero or all not; `start..end` are bytes of the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub start: usize,
    pub end: usize,
    pub zero: bool,
}

/// Splits `bytes` into runs of zero and non-zero blocks of [`BLOCK_BYTES`]; a zero run shorter than
/// `zero_bytes_min` counts as data.
pub fn runs(bytes: &[u8], zero_bytes_min: usize) -> impl Iterator<Item = Run> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= bytes.len() {
            return None;
        }
        let start = at;
        let zero_until = zero_end(bytes, start);
        if zero_until - start >= zero_bytes_min || zero_until == bytes.len() && zero_until > start {
            at = zero_until;
            return Some(Run { start, end: at, zero: true });
        }
        at = zero_until;
        while at < bytes.len() {
            let zeros = zero_end(bytes, at);
            if zeros - at >= zero_bytes_min {
                break;
            }
            // Past the short zero run, if any, and the data block that ended it.
            at = zeros.saturating_add(BLOCK_BYTES).min(bytes.len());
        }
        Some(Run { start, end: at, zero: false })
    })
}

/// End of the zero blocks that begin at `start`, a multiple of [`BLOCK_BYTES`]; `start` itself if there are none.
fn zero_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start;
    for block in bytes[start..].chunks(BLOCK_BYTES) {
        if ZERO_BLOCK.get(..block.len()) != Some(block) {
            break;
        }
        at += block.len();
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_the_buffer_and_tell_zeros_from_data() {
        let mut bytes = vec![0u8; 10 * BLOCK_BYTES + 100];
        bytes[2 * BLOCK_BYTES + 7] = 1;
        bytes[4 * BLOCK_BYTES] = 1;
        let found: Vec<_> = runs(&bytes, BLOCK_BYTES).map(|r| (r.start, r.end, r.zero)).collect();
        let b = BLOCK_BYTES;
        assert_eq!(
            found,
            [
                (0, 2 * b, true),
                (2 * b, 3 * b, false),
                (3 * b, 4 * b, true),
                (4 * b, 5 * b, false),
                (5 * b, 10 * b + 100, true)
            ]
        );
        let merged: Vec<_> = runs(&bytes, 2 * b).map(|r| (r.start, r.end, r.zero)).collect();
        assert_eq!(merged, [(0, 2 * b, true), (2 * b, 5 * b, false), (5 * b, 10 * b + 100, true)]);
        assert!(runs(&[], b).next().is_none());
    }

    #[test]
    fn is_zero_sees_a_single_byte_anywhere() {
        for at in [0, 1, 4095, 4096, 8191, 9000] {
            let mut bytes = vec![0u8; 9001];
            assert!(is_zero(&bytes));
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
        }
    }
}
