//! Files that are one compressed member after another: gz and bz2.

use std::io::{self, BufRead, Read};

/// A decoder of one member that can begin the next one on the same source.
pub(super) trait Member: Read + Sized {
    type Source: BufRead;
    /// First byte of every member.
    const MAGIC: u8;
    fn into_source(self) -> Self::Source;
    fn start(source: Self::Source) -> Self;
}

/// Reads member after member. Zeros after the last one are padding, as for gzip on tapes; anything else there is
/// an error, so that a damaged member header does not silently shorten the image.
pub(super) struct Members<M: Member> {
    at: At<M>,
}

/// Where the source stands.
enum At<M: Member> {
    Member(M),
    Between(M::Source),
    Padding(M::Source),
    End,
}

impl<M: Member> Members<M> {
    pub(super) fn new(source: M::Source) -> Self {
        Self { at: At::Member(M::start(source)) }
    }
}

impl<M: Member> Read for Members<M> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            // Each step either leaves `at` in its new state, or an error that is no interruption ends the reading.
            match &mut self.at {
                At::Member(member) => match member.read(buf)? {
                    0 => self.step(|at| match at {
                        At::Member(member) => At::Between(member.into_source()),
                        other => other,
                    }),
                    n => return Ok(n),
                },
                At::Between(source) => {
                    let first = source.fill_buf()?.first().copied();
                    self.step(|at| match (at, first) {
                        (At::Between(_), None) => At::End,
                        (At::Between(source), Some(first)) if first == M::MAGIC => {
                            At::Member(M::start(source))
                        }
                        (At::Between(source), Some(_)) => At::Padding(source),
                        (other, _) => other,
                    });
                }
                At::Padding(source) => {
                    let ahead = source.fill_buf()?;
                    let n = ahead.len();
                    if n == 0 {
                        self.at = At::End;
                    } else if crate::zeros::is_zero(ahead) {
                        source.consume(n);
                    } else {
                        return Err(io::Error::new(
                            io::ErrorKind::InvalidData,
                            "garbage after the last member",
                        ));
                    }
                }
                At::End => return Ok(0),
            }
        }
    }
}

impl<M: Member> Members<M> {
    fn step(&mut self, next: impl FnOnce(At<M>) -> At<M>) {
        self.at = next(std::mem::replace(&mut self.at, At::End));
    }
}
