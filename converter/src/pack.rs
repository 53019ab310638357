//! Compression of the blocks of an image file.

use crate::io::Compression;
use crate::{Error, ErrorKind, Result};

/// Like `gzip -6`; what qemu uses.
const ZLIB_LEVEL: u32 = 6;

/// The window that qemu writes qcow2 blocks with, and the one that RFC 1950 calls for.
const DEFLATE_WINDOW_BITS: u8 = 12;
const ZLIB_WINDOW_BITS: u8 = 15;

/// The zstd library's own default.
const ZSTD_LEVEL: i32 = 3;

/// A block is stored compressed when that saves at least one part in so many: less is not worth decoding.
const SAVED_PART_MIN: usize = 16;

/// The compressor of one worker.
pub(crate) enum Encoder {
    None,
    /// With a zlib header, or bare.
    Deflate(flate2::Compress, bool),
    Zstd(zstd::zstd_safe::CCtx<'static>),
}

impl Encoder {
    pub(crate) fn new(compression: Compression) -> Result<Self> {
        use zstd::zstd_safe;
        Ok(match compression {
            Compression::None => Encoder::None,
            Compression::Deflate => Encoder::Deflate(deflate(false), false),
            Compression::Zlib => Encoder::Deflate(deflate(true), true),
            Compression::Zstd => {
                let failed = || Error::new(ErrorKind::Io, "setting up the zstd encoder: out of memory");
                let mut cctx = zstd_safe::CCtx::try_create().ok_or_else(failed)?;
                cctx.set_parameter(zstd_safe::CParameter::CompressionLevel(ZSTD_LEVEL))
                    .map_err(|_| failed())?;
                Encoder::Zstd(cctx)
            }
        })
    }

    /// Compresses one block into the front of `out`, which is as long as the block, and returns the number of
    /// bytes; `None` if the block is better stored as it is.
    pub(crate) fn encode(&mut self, block: &[u8], out: &mut [u8]) -> Option<usize> {
        let out = out.get_mut(..block.len() - block.len() / SAVED_PART_MIN)?;
        match self {
            Encoder::None => None,
            Encoder::Deflate(stream, header) => {
                let status = stream.compress(block, out, flate2::FlushCompress::Finish);
                if let Ok(flate2::Status::StreamEnd) = status {
                    let bytes = stream.total_out() as usize;
                    stream.reset();
                    return Some(bytes);
                }
                // Not reset: zlib-rs 0.6 forgets to empty its output queue, and panics when that is full.
                *stream = deflate(*header);
                None
            }
            // Fails when `out` is too short, which is the answer.
            Encoder::Zstd(cctx) => cctx.compress2(out, block).ok(),
        }
    }
}

fn deflate(header: bool) -> flate2::Compress {
    let window_bits = if header { ZLIB_WINDOW_BITS } else { DEFLATE_WINDOW_BITS };
    flate2::Compress::new_with_window_bits(flate2::Compression::new(ZLIB_LEVEL), header, window_bits)
}
