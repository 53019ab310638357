//! The whole transfer again: long enough to outlast a registry that is started again, or a network that is mended.

use std::future::Future;
use std::time::Duration;

use dvcr_converter::progress::Progress;
use dvcr_importer::{Error, ErrorKind, cancelled};
use rand::Rng;
use tokio::time::timeout;

/// Times that a transfer is tried.
pub const ATTEMPTS_MAX: u32 = 20;
/// Wait before the second attempt; each further one is three times as long.
const WAIT_FIRST_MS: u64 = 1_000;
const WAIT_FACTOR: u64 = 3;
/// Longest wait.
const WAIT_MS_MAX: u64 = 60_000;
/// How much longer a wait may be by chance, so that many workers do not come back at once.
const JITTER: f64 = 0.1;

/// Tells whether the same request may succeed later: nothing it says is wrong, and nobody refused it for good.
pub fn may_pass(error: &Error) -> bool {
    use ErrorKind::{Registry, Source};
    matches!(error.kind(), Source | Registry) && error.is_passing()
}

/// Wait after the attempt of this number, the first is 1; between the wait itself and a tenth more, by `chance` from 0 to 1.
fn wait(attempt: u32, chance: f64) -> Duration {
    let factor = WAIT_FACTOR.saturating_pow(attempt.saturating_sub(1));
    let wait = WAIT_FIRST_MS.saturating_mul(factor).min(WAIT_MS_MAX);
    Duration::from_millis(wait).mul_f64(1.0 + JITTER * chance)
}

/// Runs `transfer` until it succeeds, fails for good, has been tried [`ATTEMPTS_MAX`] times, or is cancelled through `progress`.
///
/// # Errors
/// That of the last attempt.
pub async fn run<T, F>(progress: &Progress, mut transfer: impl FnMut() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let mut attempt = 1;
    loop {
        match transfer().await {
            Err(error) if attempt < ATTEMPTS_MAX && may_pass(&error) => {
                let wait = wait(attempt, rand::rng().random());
                tracing::warn!(%error, attempt, wait_ms = wait.as_millis() as u64, "the transfer is tried again");
                if timeout(wait, cancelled(progress)).await.is_ok() {
                    return Err(error);
                }
                attempt += 1;
            }
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_waits_grow_to_a_minute_and_make_a_quarter_of_an_hour() {
        let seconds = |attempt| wait(attempt, 0.0).as_secs();
        assert_eq!([1, 2, 3, 4, 5, 6, 19].map(seconds), [1, 3, 9, 27, 60, 60, 60]);
        let all: u64 = (1..ATTEMPTS_MAX).map(seconds).sum();
        assert_eq!(all, 940);
        assert_eq!(wait(5, 1.0), Duration::from_secs(66));
    }
}
