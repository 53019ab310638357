//! xz (.xz file format 1.2): streams of blocks, decoded in parallel where a block's header tells its sizes.

use std::io::{self, BufRead, Read};

use liblzma::stream::{Action, MtStreamBuilder, Status, Stream};

/// Streams are padded to this with zeros (section 2.2 of the format).
const PADDING_BYTES: u64 = 4;

/// Decodes all streams of a source.
pub(super) struct Decoder<R> {
    input: R,
    memory_bytes_max: u64,
    workers: usize,
    at: At,
}

/// Where the input stands.
enum At {
    Stream(Stream),
    /// Behind a stream and so many bytes of padding.
    Padding(u64),
}

impl<R: BufRead> Decoder<R> {
    /// Makes a decoder with at most `workers` threads that together hold at most `memory_bytes_max`. A block that
    /// needs more of it than its turn leaves is decoded by the reading thread; one that needs more than all is an error.
    pub(super) fn new(input: R, memory_bytes_max: u64, workers: usize) -> io::Result<Self> {
        let at = At::Stream(stream(memory_bytes_max, workers)?);
        Ok(Self { input, memory_bytes_max, workers, at })
    }
}

fn stream(memory_bytes_max: u64, workers: usize) -> io::Result<Stream> {
    if workers == 1 {
        return Ok(Stream::new_stream_decoder(memory_bytes_max, 0)?);
    }
    let workers = u32::try_from(workers).unwrap_or(1);
    let mut builder = MtStreamBuilder::new();
    builder.threads(workers).memlimit_threading(memory_bytes_max).memlimit_stop(memory_bytes_max);
    Ok(builder.decoder()?)
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            let ahead = self.input.fill_buf()?;
            match &mut self.at {
                At::Padding(padding) => {
                    let zeros = ahead.iter().take_while(|&&b| b == 0).count();
                    *padding += zeros as u64;
                    let next = ahead.len() > zeros;
                    if !next && zeros > 0 {
                        self.input.consume(zeros);
                        continue;
                    }
                    if *padding % PADDING_BYTES != 0 {
                        let text = "the padding behind a stream is no multiple of four bytes";
                        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                    }
                    if !next {
                        return Ok(0);
                    }
                    self.input.consume(zeros);
                    self.at = At::Stream(stream(self.memory_bytes_max, self.workers)?);
                }
                At::Stream(stream) => {
                    let ended = ahead.is_empty();
                    let (taken, given) = (stream.total_in(), stream.total_out());
                    let status = stream.process(ahead, buf, if ended { Action::Finish } else { Action::Run });
                    let (taken, given) = (stream.total_in() - taken, stream.total_out() - given);
                    self.input.consume(taken as usize);
                    match status? {
                        Status::StreamEnd => self.at = At::Padding(0),
                        // Twice in a row no progress was possible.
                        Status::MemNeeded if given == 0 => {
                            return Err(io::Error::new(
                                io::ErrorKind::UnexpectedEof,
                                "the stream is cut short",
                            ));
                        }
                        Status::Ok | Status::GetCheck | Status::MemNeeded => {}
                    }
                    if given > 0 {
                        return Ok(given as usize);
                    }
                }
            }
        }
    }
}
