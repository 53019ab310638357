//! gz (RFC 1952): members one after another, each with a CRC-32 and its length modulo 2^32.

use std::io::BufRead;

use flate2::bufread::GzDecoder;

use super::members::{Member, Members};

/// Decodes all members of `input`.
pub(super) fn decoder<R: BufRead>(input: R) -> Members<GzDecoder<R>> {
    Members::new(input)
}

impl<R: BufRead> Member for GzDecoder<R> {
    type Source = R;
    const MAGIC: u8 = 0x1f;
    fn into_source(self) -> R {
        self.into_inner()
    }
    fn start(source: R) -> Self {
        Self::new(source)
    }
}
