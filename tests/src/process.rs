//! Child processes: started so that they cannot outlive us, waited for with a bound, killed on drop.

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

/// How long one helper program may run; the longest, building the Debian image, takes a few minutes.
const RUN_TIMEOUT: Duration = Duration::from_secs(20 * 60);
/// How long a daemon may take to end after SIGTERM.
const TERMINATE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a process may take to vanish after SIGKILL; one that hangs inside the kernel never does.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
const LOG_TAIL_LINES_MAX: usize = 400;

/// Builds a command line in one expression.
pub fn cmd<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

/// What a finished program left.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a program and returns its standard output; failing tells the command line and both outputs.
pub fn run(command: &Command) -> Result<String> {
    let output = run_output(command)?;
    if !output.status.success() {
        bail!(
            "{} failed: {}\n--- stdout\n{}\n--- stderr\n{}",
            command_line(command),
            output.status,
            output.stdout.trim_end(),
            output.stderr.trim_end()
        );
    }
    Ok(output.stdout)
}

/// Runs a program and returns what it left, whether it succeeded or not.
pub fn run_output(command: &Command) -> Result<Output> {
    let mut process = Process::spawn(command, [Stdio::null(), Stdio::piped(), Stdio::piped()])?;
    let stdout = read_in_background(process.child.stdout.take());
    let stderr = read_in_background(process.child.stderr.take());
    let status = process.wait(RUN_TIMEOUT)?;
    Ok(Output { status, stdout: process.text(&stdout)?, stderr: process.text(&stderr)? })
}

/// Runs a program that tells its progress on standard error to the user, and returns its standard output.
pub fn run_telling(command: &Command) -> Result<String> {
    let mut process = Process::spawn(command, [Stdio::null(), Stdio::piped(), Stdio::inherit()])?;
    let stdout = read_in_background(process.child.stdout.take());
    let status = process.wait(RUN_TIMEOUT)?;
    if !status.success() {
        bail!("{} failed: {status}", process.line);
    }
    process.text(&stdout)
}

/// Runs a program that talks to the user directly.
pub fn run_visible(command: &Command) -> Result<()> {
    let mut process = Process::spawn(command, [Stdio::null(), Stdio::inherit(), Stdio::inherit()])?;
    let status = process.wait(RUN_TIMEOUT)?;
    if !status.success() {
        bail!("{} failed: {status}", process.line);
    }
    Ok(())
}

/// Polls `predicate` until it is true; says `what` was awaited when `timeout` passes first.
pub fn wait_until(timeout: Duration, what: &str, mut predicate: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + timeout;
    while !predicate() {
        if interrupted() {
            bail!("interrupted while waiting for {what}");
        }
        if Instant::now() >= deadline {
            bail!("waited {} s in vain for {what}", timeout.as_secs());
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

/// Kills all children and lets no more start, so that whatever runs fails soon and cleans up behind itself.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::SeqCst);
    for pid in LIVE.lock().unwrap().iter() {
        let _ = kill_process(*pid, Signal::KILL);
    }
}

/// Tells whether [`interrupt`] was called.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// A program that runs in the background; its last lines of output are kept, and dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    log: Arc<Mutex<VecDeque<String>>>,
}

impl Daemon {
    /// Starts a program whose standard output and error go to the log.
    pub fn spawn(command: &Command) -> Result<Self> {
        let mut process = Process::spawn(command, [Stdio::null(), Stdio::piped(), Stdio::piped()])?;
        let log = Arc::default();
        keep_tail(process.child.stdout.take(), &log);
        keep_tail(process.child.stderr.take(), &log);
        Ok(Self { process, log })
    }

    pub fn id(&self) -> u32 {
        self.process.child.id()
    }

    /// Returns the newest lines of output, oldest first.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().iter().map(|line| format!("{line}\n")).collect()
    }

    /// Waits until `find` sees what it wants in a line of output; a program that ends first is an error with its log.
    pub fn wait_for_line<T>(&mut self, timeout: Duration, find: impl Fn(&str) -> Option<T>) -> Result<T> {
        self.wait_for(timeout, "its line of output", |daemon| {
            daemon.log.lock().unwrap().iter().find_map(|line| find(line))
        })
    }

    /// Polls until `probe` gives a value; a program that ends first is an error with its log.
    pub fn wait_for<T>(
        &mut self,
        timeout: Duration,
        what: &str,
        probe: impl Fn(&Self) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(found) = probe(self) {
                return Ok(found);
            }
            if let Some(status) = self.process.try_wait()? {
                bail!("{} ended ({status}) before {what}\n--- log\n{}", self.process.line, self.log());
            }
            if Instant::now() >= deadline {
                let seconds = timeout.as_secs();
                bail!("{}: no {what} in {seconds} s\n--- log\n{}", self.process.line, self.log());
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Tells whether the program still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    /// Waits until the program ends by itself; then the log has all that it said.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let status = self.process.wait(timeout)?;
        // The threads that read it hold the log. A grandchild may hold the pipes open for longer.
        let _ = wait_until(KILL_TIMEOUT, "its last words", || Arc::strong_count(&self.log) == 1);
        Ok(status)
    }

    /// Kills the program as a power cut would, without a chance to tidy up.
    pub fn kill9(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Asks the program to end (SIGTERM) and waits for it.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.process
            .wait(TERMINATE_TIMEOUT)
            .with_context(|| format!("SIGTERM did not end it; log:\n{}", self.log()))
    }

    /// Sends a signal, if the program has not ended.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        match Pid::from_raw(self.id().cast_signed()).filter(|_| self.process.ended.is_none()) {
            Some(pid) => kill_process(pid, signal)
                .with_context(|| format!("cannot send {signal:?} to {}", self.process.line)),
            None => Ok(()),
        }
    }
}

/// A child process that is killed when dropped.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) child: Child,
    pub(crate) line: String,
    ended: Option<ExitStatus>,
}

impl Process {
    pub(crate) fn spawn(command: &Command, stdio: [Stdio; 3]) -> Result<Self> {
        let line = command_line(command);
        let wrapped = die_with_parent(command, stdio);
        // PDEATHSIG follows the thread that forks, not the process: so one lasting thread starts all children.
        let (reply, answer) = mpsc::channel();
        spawner()
            .lock()
            .unwrap()
            .send((wrapped, reply))
            .map_err(|_| anyhow!("the spawning thread is gone"))?;
        let child = answer.recv().context("the spawning thread is gone")?;
        let child = child.with_context(|| format!("cannot start {line}; is it installed? (`make deps`)"))?;
        Ok(Self { child, line, ended: None })
    }

    pub(crate) fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            // The lock keeps `interrupt` from signalling a number that has just been given back to the system.
            let mut live = LIVE.lock().unwrap();
            self.ended = self.child.try_wait().with_context(|| format!("cannot wait for {}", self.line))?;
            if self.ended.is_some() {
                live.retain(|pid| *pid != pid_of(&self.child));
            }
        }
        Ok(self.ended)
    }

    pub(crate) fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{} still runs after {} s", self.line, timeout.as_secs());
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Returns what a finished process wrote; a grandchild that still holds the pipe is an error.
    fn text(&self, pipe: &mpsc::Receiver<Vec<u8>>) -> Result<String> {
        let bytes = pipe
            .recv_timeout(KILL_TIMEOUT)
            .map_err(|_| anyhow!("{} ended but its output is still held open", self.line))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub(crate) fn kill(&mut self) -> Result<()> {
        if self.try_wait()?.is_none() {
            self.child.kill().with_context(|| format!("cannot kill {}", self.line))?;
            self.wait(KILL_TIMEOUT)?;
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static LIVE: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

type SpawnRequest = (Command, mpsc::Sender<std::io::Result<Child>>);

fn spawner() -> &'static Mutex<mpsc::Sender<SpawnRequest>> {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<SpawnRequest>>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<SpawnRequest>();
        std::thread::spawn(move || {
            for (mut command, reply) in requests {
                let mut live = LIVE.lock().unwrap();
                let child = match interrupted() {
                    true => Err(std::io::Error::from(std::io::ErrorKind::Interrupted)),
                    false => command.spawn(),
                };
                live.extend(child.as_ref().ok().map(pid_of));
                drop(live);
                let _ = reply.send(child);
            }
        });
        Mutex::new(sender)
    })
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Wraps a command so that the kernel kills it when we die.
fn die_with_parent(command: &Command, stdio: [Stdio; 3]) -> Command {
    let mut wrapped = cmd("setpriv", ["--pdeathsig", "KILL", "--"]);
    wrapped.arg(command.get_program()).args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        wrapped.current_dir(dir);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    let [stdin, stdout, stderr] = stdio;
    wrapped.stdin(stdin).stdout(stdout).stderr(stderr);
    wrapped
}

fn command_line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

fn read_in_background(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        let _ = sender.send(bytes);
    });
    receiver
}

fn keep_tail(pipe: Option<impl Read + Send + 'static>, log: &Arc<Mutex<VecDeque<String>>>) {
    let Some(pipe) = pipe else { return };
    let log = Arc::clone(log);
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while matches!(pipe.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            let mut log = log.lock().unwrap();
            if log.len() == LOG_TAIL_LINES_MAX {
                log.pop_front();
            }
            log.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
            line.clear();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_shows_its_command_line_and_outputs() {
        let error = run(&cmd("sh", ["-c", "echo to-out; echo to-err >&2; exit 3"])).unwrap_err().to_string();
        for part in ["sh -c", "exit status: 3", "to-out", "to-err"] {
            assert!(error.contains(part), "{part} is not in {error}");
        }
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let mut daemon =
            std::thread::spawn(|| Daemon::spawn(&cmd("sh", ["-c", "echo up; exec sleep 600"])).unwrap())
                .join()
                .unwrap();
        daemon.wait_for_line(Duration::from_secs(10), |line| (line == "up").then_some(())).unwrap();
        assert!(daemon.is_running());
        daemon.kill9().unwrap();
        assert!(!daemon.is_running());
    }
}
