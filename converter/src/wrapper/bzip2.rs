//! bz2: streams one after another, each of blocks of up to 900 kB with a CRC-32.

use std::io::BufRead;

use bzip2::bufread::BzDecoder;

use super::members::{Member, Members};

/// First bytes of a block, and of the end of a stream without any.
const BLOCK_MAGIC: [u8; 6] = [0x31, 0x41, 0x59, 0x26, 0x53, 0x59];
const END_MAGIC: [u8; 6] = [0x17, 0x72, 0x45, 0x38, 0x50, 0x90];

/// Recognises a stream by its first ten bytes.
pub(super) fn is_bzip2(head: &[u8]) -> bool {
    match head {
        [b'B', b'Z', b'h', b'1'..=b'9', rest @ ..] => {
            rest.starts_with(&BLOCK_MAGIC) || rest.starts_with(&END_MAGIC)
        }
        _ => false,
    }
}

/// Decodes all streams of `input`.
pub(super) fn decoder<R: BufRead>(input: R) -> Members<BzDecoder<R>> {
    Members::new(input)
}

impl<R: BufRead> Member for BzDecoder<R> {
    type Source = R;
    const MAGIC: u8 = b'B';
    fn into_source(self) -> R {
        self.into_inner()
    }
    fn start(source: R) -> Self {
        Self::new(source)
    }
}
