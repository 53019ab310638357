//! Long work: a runtime, a progress display, and a clean end on SIGINT and SIGTERM.

use std::fmt;
use std::future::Future;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use dvcr_converter::progress::Progress;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::size::Human;

/// How long interrupted work may take to put things in order before it is dropped.
const WIND_DOWN_MS: u64 = 10_000;
/// How often a terminal's bar is redrawn.
const BAR_INTERVAL_MS: u64 = 100;
/// How often a line is written where there is no terminal.
const LINE_INTERVAL_MS: u64 = 5_000;

/// The error of work that a signal stopped.
#[derive(Debug)]
pub struct Interrupted {
    signal: SignalKind,
    /// Whether the work was dropped before it came to its own end.
    dropped: bool,
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.dropped {
            false => "interrupted; run the same command to go on, or start again",
            true => {
                "interrupted before everything was cleaned up; run the same command to go on, or start again"
            }
        })
    }
}

impl Interrupted {
    /// The name of the signal.
    pub fn name(&self) -> &'static str {
        if self.signal == SignalKind::terminate() { "SIGTERM" } else { "SIGINT" }
    }
}

impl std::error::Error for Interrupted {}

/// The context of an argument that could not be understood; without its text, which may hold a password.
#[derive(Debug)]
pub struct Usage(pub &'static str);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the argument {} is not valid, see --help", self.0)
    }
}

/// Runs `work` on a new runtime, shows its progress under `title`, and stops it on SIGINT or SIGTERM: first by asking
/// through [`Progress::cancel`], then, after [`WIND_DOWN_MS`] or a second signal, by dropping it. Work that was past
/// stopping and succeeds all the same is a success.
pub fn run<T, F>(title: &str, work: impl FnOnce(Arc<Progress>) -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    supervise(Some(title), work)
}

/// Runs `work` like [`run`], but shows nothing: for work that prints its answer as it goes.
pub fn run_quietly<T, F>(work: impl FnOnce(Arc<Progress>) -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    supervise(None, work)
}

fn supervise<T, F>(title: Option<&str>, work: impl FnOnce(Arc<Progress>) -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    let runtime = runtime()?;
    let progress = Arc::new(Progress::default());
    let display = title.map(|title| Display::start(title, progress.clone()));
    let result = runtime.block_on(async {
        let mut signals = Signals::listen()?;
        let mut work = std::pin::pin!(work(progress.clone()));
        let mut interrupted = tokio::select! {
            result = &mut work => return result,
            interrupted = signals.next() => interrupted,
        };
        progress.cancel();
        tokio::select! {
            result = &mut work => {
                if result.is_ok() {
                    return result;
                }
            }
            _ = signals.next() => interrupted.dropped = true,
            _ = tokio::time::sleep(Duration::from_millis(WIND_DOWN_MS)) => interrupted.dropped = true,
        }
        Err(interrupted.into())
    });
    if let Some(display) = display {
        display.end(result.is_ok());
    }
    // Blocking threads notice the cancellation on their own; they must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_millis(WIND_DOWN_MS / 10));
    result
}

/// Makes the runtime every command uses.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")
}

/// SIGINT and SIGTERM, caught from the moment of [`Signals::listen`] on.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Begins to catch; needs a runtime around it.
    pub fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("listening for SIGINT")?,
            terminate: signal(SignalKind::terminate()).context("listening for SIGTERM")?,
        })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) -> Interrupted {
        tokio::select! {
            _ = self.interrupt.recv() => Interrupted { signal: SignalKind::interrupt(), dropped: false },
            _ = self.terminate.recv() => Interrupted { signal: SignalKind::terminate(), dropped: false },
        }
    }
}

/// Prints an error with its chain of causes and gives the exit code that belongs to it: `failure_code`, unless it has
/// another reason than the work itself.
pub fn report(error: &anyhow::Error, failure_code: u8) -> ExitCode {
    eprintln!("dvcr: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  because: {cause}");
    }
    if error.is::<Usage>() {
        return ExitCode::from(2);
    }
    match error.downcast_ref::<Interrupted>() {
        Some(Interrupted { signal, .. }) if *signal == SignalKind::terminate() => ExitCode::from(143),
        Some(_) => ExitCode::from(130),
        None => ExitCode::from(failure_code),
    }
}

/// A thread that shows progress on standard error: a bar on a terminal, lines elsewhere.
struct Display {
    stop: Sender<bool>,
    thread: JoinHandle<()>,
}

impl Display {
    fn start(title: &str, progress: Arc<Progress>) -> Self {
        let (stop, stopped) = channel();
        let title = title.to_owned();
        let thread = std::thread::spawn(move || {
            if std::io::stderr().is_terminal() {
                draw_bar(&title, &progress, &stopped);
            } else {
                write_lines(&title, &progress, &stopped);
            }
        });
        Self { stop, thread }
    }

    fn end(self, ok: bool) {
        // Either call fails only when the thread is gone already, and then there is nothing left to show.
        let _ = self.stop.send(ok);
        let _ = self.thread.join();
    }
}

fn draw_bar(title: &str, progress: &Progress, stopped: &Receiver<bool>) {
    // Nothing is drawn before the template is set: the bar's own would fill the line.
    let bar = ProgressBar::new(0).with_prefix(title.to_owned());
    let known =
        "{prefix} {msg:10} [{bar:30}] {percent:>3}% {bytes} of {total_bytes}, {bytes_per_sec}, ETA {eta}";
    let unknown = "{prefix} {msg:10} {spinner} {bytes}, {bytes_per_sec}, {elapsed}";
    let mut total_shown = None;
    loop {
        let total = progress.total();
        if total_shown != Some(total) {
            total_shown = Some(total);
            let template = if total == 0 { unknown } else { known };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_length(total.max(1));
        }
        bar.set_message(progress.phase());
        bar.set_position(if total == 0 { progress.done() } else { progress.done().min(total) });
        bar.tick();
        match stopped.recv_timeout(Duration::from_millis(BAR_INTERVAL_MS)) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(_) | Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    bar.finish_and_clear();
}

fn write_lines(title: &str, progress: &Progress, stopped: &Receiver<bool>) {
    let begun = Instant::now();
    loop {
        match stopped.recv_timeout(Duration::from_millis(LINE_INTERVAL_MS)) {
            Err(RecvTimeoutError::Timeout) => eprintln!("{}", line(title, progress, begun.elapsed())),
            Ok(true) => {
                return eprintln!("{title}: done, {} in {:.1?}", Human(progress.done()), begun.elapsed());
            }
            Ok(false) | Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn line(title: &str, progress: &Progress, elapsed: Duration) -> String {
    let (phase, done, total) = (progress.phase(), progress.done(), progress.total());
    let here = done.saturating_sub(progress.skipped());
    let per_second = here as f64 / elapsed.as_secs_f64().max(0.001);
    let mut line = format!("{title}: {phase} {}", Human(done));
    if total > 0 {
        let share = 100.0 * done.min(total) as f64 / total as f64;
        line += &format!(" of {} ({share:.1}%)", Human(total));
    }
    line += &format!(", {}/s", Human(per_second as u64));
    if total > done && per_second >= 1.0 {
        line += &format!(", ETA {:.0} s", (total - done) as f64 / per_second);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_phase_bytes_share_rate_and_eta() {
        let progress = Progress::default();
        progress.set_phase("transfer");
        progress.set_total(4 << 20);
        progress.advance(1 << 20);
        let text = line("debian", &progress, Duration::from_secs(1));
        assert_eq!(text, "debian: transfer 1.0 MiB of 4.0 MiB (25.0%), 1.0 MiB/s, ETA 3 s");
    }

    #[test]
    fn a_signal_stops_work_unless_it_succeeds_all_the_same() {
        // One test: a signal reaches all that listen in this process.
        let outcome = run("test", |progress| async move {
            terminated(&progress).await?;
            anyhow::bail!("stopped half-way")
        });
        let outcome: anyhow::Result<()> = outcome;
        assert!(outcome.unwrap_err().is::<Interrupted>());
        let outcome = run("test", |progress| async move {
            terminated(&progress).await?;
            Ok("published")
        });
        assert_eq!(outcome.unwrap(), "published");
    }

    /// Sends SIGTERM to this process and waits until the work is asked to stop.
    async fn terminated(progress: &Progress) -> anyhow::Result<()> {
        let me = std::process::id().to_string();
        let kill = std::process::Command::new("kill").args(["-TERM", &me]).status()?;
        anyhow::ensure!(kill.success());
        while progress.check().is_ok() {
            tokio::task::yield_now().await;
        }
        Ok(())
    }
}
