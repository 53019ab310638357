//! Compression of the blocks of an image file.

use libdeflater::{CompressionLvl, Compressor};

use crate::io::Compression;
use crate::{Error, ErrorKind, Result};

/// libdeflate's levels that make no more bytes of a disk than qemu does: with bare deflate that uses a window of 4 KiB,
/// with a zlib header one of 32 KiB, both at zlib's level 6. Ours go back 32 KiB in either;
/// `docs/formats/qcow2.md` says who reads that.
const DEFLATE_LEVEL: i32 = 2;
const ZLIB_LEVEL: i32 = 5;

/// The zstd library's own default, and what qemu uses: the levels below lose more bytes than they save time.
const ZSTD_LEVEL: i32 = 3;

/// A block is stored compressed when that saves at least one part in so many: less is not worth decoding. qemu keeps
/// whatever is smaller at all, and what it makes is not to be smaller than ours.
const SAVED_PART_MIN: usize = 128;

/// The compressor of one worker.
pub(crate) enum Encoder {
    None,
    Deflate(Compressor),
    Zlib(Compressor),
    Zstd(zstd::zstd_safe::CCtx<'static>),
}

impl Encoder {
    pub(crate) fn new(compression: Compression) -> Result<Self> {
        Ok(match compression {
            Compression::None => Encoder::None,
            Compression::Deflate => Encoder::Deflate(libdeflate(DEFLATE_LEVEL)?),
            Compression::Zlib => Encoder::Zlib(libdeflate(ZLIB_LEVEL)?),
            Compression::Zstd => Encoder::Zstd(zstd()?),
        })
    }

    /// Compresses one block into the front of `out`, which is as long as the block, and returns the number of
    /// bytes; `None` if the block is better stored as it is.
    pub(crate) fn encode(&mut self, block: &[u8], out: &mut [u8]) -> Option<usize> {
        let out = out.get_mut(..block.len() - block.len() / SAVED_PART_MIN)?;
        // Each fails when `out` is too short, which is the answer.
        match self {
            Encoder::None => None,
            Encoder::Deflate(compressor) => compressor.deflate_compress(block, out).ok(),
            Encoder::Zlib(compressor) => compressor.zlib_compress(block, out).ok(),
            Encoder::Zstd(cctx) => cctx.compress2(out, block).ok(),
        }
    }
}

fn libdeflate(level: i32) -> Result<Compressor> {
    let level = CompressionLvl::new(level).map_err(|_| setup_failed("deflate"))?;
    Ok(Compressor::new(level))
}

fn zstd() -> Result<zstd::zstd_safe::CCtx<'static>> {
    use zstd::zstd_safe::{CCtx, CParameter};
    let mut cctx = CCtx::try_create().ok_or_else(|| setup_failed("zstd"))?;
    cctx.set_parameter(CParameter::CompressionLevel(ZSTD_LEVEL)).map_err(|_| setup_failed("zstd"))?;
    Ok(cctx)
}

fn setup_failed(what: &str) -> Error {
    Error::new(ErrorKind::Io, format!("setting up the {what} encoder failed"))
}
