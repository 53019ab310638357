//! Compression of clusters.

use super::write::Compression;
use crate::{Error, ErrorKind, Result};

/// Like `gzip -6`; what qemu uses.
const ZLIB_LEVEL: u32 = 6;

/// qemu decodes zlib clusters with a window of 4 KiB, so no match may reach farther back.
const ZLIB_WINDOW_BITS: u8 = 12;

/// The zstd library's own default.
const ZSTD_LEVEL: i32 = 3;

/// A cluster is stored compressed when that saves at least one part in so many: less is not worth decoding.
const SAVED_PART_MIN: usize = 16;

/// The compressor of one worker.
pub(crate) enum Encoder {
    None,
    Zlib(flate2::Compress),
    Zstd(zstd::zstd_safe::CCtx<'static>),
}

impl Encoder {
    pub(crate) fn new(compression: Compression) -> Result<Self> {
        use zstd::zstd_safe;
        Ok(match compression {
            Compression::None => Encoder::None,
            Compression::Zlib => Encoder::Zlib(deflate()),
            Compression::Zstd => {
                let failed = || Error::new(ErrorKind::Io, "setting up the zstd encoder: out of memory");
                let mut cctx = zstd_safe::CCtx::try_create().ok_or_else(failed)?;
                cctx.set_parameter(zstd_safe::CParameter::CompressionLevel(ZSTD_LEVEL))
                    .map_err(|_| failed())?;
                Encoder::Zstd(cctx)
            }
        })
    }

    /// Compresses one cluster into the front of `out`, which is as long as the cluster, and returns the number of
    /// bytes; `None` if the cluster is better stored as it is.
    pub(crate) fn encode(&mut self, cluster: &[u8], out: &mut [u8]) -> Option<usize> {
        let out = out.get_mut(..cluster.len() - cluster.len() / SAVED_PART_MIN)?;
        match self {
            Encoder::None => None,
            Encoder::Zlib(stream) => {
                let status = stream.compress(cluster, out, flate2::FlushCompress::Finish);
                if let Ok(flate2::Status::StreamEnd) = status {
                    let bytes = stream.total_out() as usize;
                    stream.reset();
                    return Some(bytes);
                }
                // Not reset: zlib-rs 0.6 forgets to empty its output queue, and panics when that is full.
                *stream = deflate();
                None
            }
            // Fails when `out` is too short, which is the answer.
            Encoder::Zstd(cctx) => cctx.compress2(out, cluster).ok(),
        }
    }
}

fn deflate() -> flate2::Compress {
    flate2::Compress::new_with_window_bits(flate2::Compression::new(ZLIB_LEVEL), false, ZLIB_WINDOW_BITS)
}
