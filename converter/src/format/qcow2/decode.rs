//! Decompression of clusters.

use super::options::Compression;

/// Largest zstd window of a frame that is not decoded in one go: a cluster has 2 MiB at most.
const ZSTD_WINDOW_LOG_MAX: u32 = 22;

/// Decompressors and scratch space of one worker.
pub(super) struct Decoder {
    deflate: libdeflater::Decompressor,
    zstd: Option<zstd::zstd_safe::DCtx<'static>>,
    /// Bytes of several neighbouring clusters as read from the file.
    pub(super) stored: Vec<u8>,
    /// One decoded cluster of which only a part is wanted.
    pub(super) cluster: Vec<u8>,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self {
            deflate: libdeflater::Decompressor::new(),
            zstd: None,
            stored: Vec::new(),
            cluster: Vec::new(),
        }
    }

    /// Decodes the stream at the start of `stored` to exactly the cluster `out`; false if it is damaged.
    ///
    /// Whatever follows the stream is ignored, as the entry counts whole sectors.
    pub(super) fn decode(&mut self, compression: Compression, stored: &[u8], out: &mut [u8]) -> bool {
        match compression {
            Compression::None => false,
            Compression::Zlib => self.inflate(stored, out),
            Compression::Zstd => self.unzstd(stored, out),
        }
    }

    fn inflate(&mut self, stored: &[u8], out: &mut [u8]) -> bool {
        if self.deflate.deflate_decompress(stored, out).is_ok_and(|n| n == out.len()) {
            return true;
        }
        // qemu also takes a stream that fills the cluster without coming to its end.
        let mut stream = flate2::Decompress::new(false);
        let status = stream.decompress(stored, out, flate2::FlushDecompress::Finish);
        status.is_ok() && stream.total_out() == out.len() as u64
    }

    fn unzstd(&mut self, stored: &[u8], out: &mut [u8]) -> bool {
        use zstd::zstd_safe;
        let dctx = match &mut self.zstd {
            Some(dctx) => dctx,
            none => {
                let Some(mut dctx) = zstd_safe::DCtx::try_create() else { return false };
                if dctx.set_parameter(zstd_safe::DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX)).is_err() {
                    return false;
                }
                none.insert(dctx)
            }
        };
        if let Ok(frame_bytes) = zstd_safe::find_frame_compressed_size(stored)
            && let Some(frame) = stored.get(..frame_bytes)
            && dctx.decompress(out, frame).is_ok_and(|n| n == out.len())
        {
            return true;
        }
        // Several frames, which the format does not forbid.
        if dctx.reset(zstd_safe::ResetDirective::SessionOnly).is_err() {
            return false;
        }
        let bytes = out.len();
        let mut input = zstd_safe::InBuffer::around(stored);
        let mut output = zstd_safe::OutBuffer::around(out);
        // Up to the end of the last frame, checksum included, as qemu wants it.
        let mut missing = 1;
        while output.pos() < bytes || missing > 0 {
            let before = (input.pos(), output.pos(), missing);
            let Ok(hint) = dctx.decompress_stream(&mut output, &mut input) else { return false };
            missing = hint;
            if (input.pos(), output.pos(), missing) == before {
                return false;
            }
        }
        true
    }
}
