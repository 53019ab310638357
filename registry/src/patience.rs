//! A connection whose client must read what it asked for.
//!
//! What is written waits in the kernel until the client takes it. One that takes less than a little in the time it is given
//! is cut off, so that it holds neither the connection nor what is being read for it.

use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// Bytes that a client has to send, or to take, in the time that it is given.
pub(crate) const PROGRESS_BYTES_MIN: u64 = 16 << 10;

/// A stream that fails when its peer reads too slowly.
#[derive(Debug)]
pub(crate) struct Patient<S> {
    stream: S,
    limit: Duration,
    /// Set while the peer has not taken all that it was given.
    wait: Option<Pin<Box<Sleep>>>,
    /// Bytes taken since the wait began.
    taken: u64,
}

impl<S> Patient<S> {
    pub(crate) fn new(stream: S, limit: Duration) -> Self {
        Self { stream, limit, wait: None, taken: 0 }
    }

    /// Notes what became of a write.
    fn judge(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(written) => {
                self.taken = self.taken.saturating_add(written.as_ref().map_or(0, |bytes| *bytes as u64));
                Poll::Ready(written)
            }
            Poll::Pending => {
                let limit = self.limit;
                let fresh = self.wait.is_none();
                let wait = self.wait.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + limit)));
                if fresh {
                    self.taken = 0;
                } else if self.taken >= PROGRESS_BYTES_MIN {
                    self.taken = 0;
                    wait.as_mut().reset(Instant::now() + limit);
                }
                ready!(wait.as_mut().poll(context));
                let why = format!("the client took less than {PROGRESS_BYTES_MIN} bytes in {limit:?}");
                Poll::Ready(Err(io::Error::new(ErrorKind::TimedOut, why)))
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.judge(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.judge(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        if flushed.is_ready() {
            // The peer has been given all there is.
            self.wait = None;
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn a_peer_that_reads_nothing_or_a_trickle_is_cut_off() {
        for step in [0, 1] {
            let (ours, mut theirs) = duplex(64);
            let mut patient = Patient::new(ours, Duration::from_millis(200));
            let reading = tokio::spawn(async move {
                let mut some = vec![0; step];
                loop {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    let _ = theirs.read(&mut some).await;
                }
            });
            let error = patient.write_all(&vec![0; 1 << 20]).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{step}");
            reading.abort();
        }
    }

    #[tokio::test]
    async fn a_peer_that_reads_slowly_and_one_that_rests_between_answers_are_served() {
        let limit = Duration::from_millis(500);
        let (ours, mut theirs) = duplex(64 << 10);
        let mut patient = Patient::new(ours, limit);
        let reading = tokio::spawn(async move {
            let (mut all, mut some) = (0, vec![0; 64 << 10]);
            while let Ok(read @ 1..) = theirs.read(&mut some).await {
                all += read;
                tokio::time::sleep(limit / 10).await;
            }
            all
        });
        for _ in 0..2 {
            patient.write_all(&vec![0; 1 << 20]).await.unwrap();
            patient.flush().await.unwrap();
            tokio::time::sleep(limit * 2).await;
        }
        drop(patient);
        assert_eq!(reading.await.unwrap(), 2 << 20);
    }
}
