//! A socket in the root directory by which commands on this machine ask a running registry for work.
//!
//! Whoever may open it may do everything: it belongs to the user that serves, and to nobody else. Lines of JSON:
//!
//! ```text
//! command                          registry
//!  {"collect":{"dry-run":true}} ──>
//!                               <── {"progress":"12 repositories, ..."}     every second
//!                               <── {"done":{"collected":{...}}}  or  {"failed":"why"}
//! ```
//!
//! The task stops when the command goes away.

use std::fs::{self, File, Permissions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::tasks::{Outcome, Task, Watch};
use crate::{Config, Error, Registry, Result};

/// Longest line, bytes.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Commands served at a time; more wait.
const COMMANDS_MAX: usize = 8;
/// How long a command may take to say what it wants.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a command hears how far its task is, and so also that the registry lives.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// How often a task in this process is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How long a registry may be silent.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    Progress(String),
    Done(Outcome),
    Failed(String),
}

/// Does `task` on a directory, or a bucket: by way of the registry that serves the directory, or, if there is none, in this
/// process, which for a bucket needs a runtime of several threads around it. Calls `progress` now and then, and has the task end
/// when `stop` is set. Blocks.
///
/// # Errors
/// When the task fails or is stopped, or the directory cannot be opened.
pub fn perform(
    config: Config,
    task: &Task,
    stop: &AtomicBool,
    mut progress: impl FnMut(&str),
) -> Result<Outcome> {
    if let Some(outcome) = ask(&config.root, task, stop, &mut progress)? {
        return Ok(outcome);
    }
    if config.bucket.is_none() && !config.root.is_dir() {
        let path = config.root;
        return Err(Error::Open { path, source: ErrorKind::NotFound.into() });
    }
    let registry = Registry::open(config)?;
    let watch = Watch::default();
    let runtime = tokio::runtime::Handle::try_current();
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            let _entered = runtime.as_ref().ok().map(tokio::runtime::Handle::enter);
            registry.perform(task, &watch)
        });
        while !work.is_finished() {
            std::thread::sleep(POLL_INTERVAL);
            if stop.load(Ordering::Relaxed) {
                watch.stop();
            }
            progress(&watch.progress());
        }
        work.join().unwrap_or_else(|_| Err(Error::Task { source: "its thread panicked".into() }))
    })
}

/// Asks the registry that serves `root` for `task`, and calls `progress` with what it tells meanwhile. Blocks. `None` if
/// nobody serves the directory.
///
/// # Errors
/// When the task fails, or the registry goes away.
fn ask(
    root: &Path,
    task: &Task,
    stop: &AtomicBool,
    progress: &mut impl FnMut(&str),
) -> Result<Option<Outcome>> {
    let gone = |source| Error::Control { source };
    let connect = || {
        let dir = File::open(root.join("dvcr"))?;
        let stream = StdStream::connect(short_path(&dir))?;
        stream.set_read_timeout(Some(SILENCE_TIMEOUT))?;
        Ok::<_, io::Error>(stream)
    };
    let mut stream = match connect() {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        stream => stream.map_err(gone)?,
    };
    stream.write_all(&line(task).map_err(gone)?).map_err(gone)?;
    let mut answers = BufReader::new(stream);
    loop {
        let mut text = String::new();
        answers.by_ref().take(LINE_BYTES_MAX).read_line(&mut text).map_err(gone)?;
        if text.is_empty() {
            return Err(gone(io::Error::new(ErrorKind::UnexpectedEof, "it went away before the end")));
        }
        match serde_json::from_str(&text).map_err(|error| gone(error.into()))? {
            // It stops when nobody listens any more.
            Line::Progress(_) if stop.load(Ordering::Relaxed) => return Err(Error::Stopped),
            Line::Progress(text) => progress(&text),
            Line::Done(outcome) => return Ok(Some(outcome)),
            Line::Failed(why) => return Err(Error::Refused { why }),
        }
    }
}

/// Listens in the root directory of a registry.
pub(crate) struct Control {
    listener: UnixListener,
    path: PathBuf,
}

impl Control {
    /// Takes the place of the socket that an earlier process left: the caller holds the directory's lock.
    pub(crate) fn listen(root: &Path) -> io::Result<Self> {
        let dir = File::open(root.join("dvcr"))?;
        let path = root.join("dvcr").join(SOCKET);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Nobody else gets in before the mode is set: it takes the directory's lock and our user to be here.
        let listener = UnixListener::bind(short_path(&dir))?;
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        Ok(Self { listener, path })
    }

    /// Serves commands for ever.
    pub(crate) async fn serve(self, registry: Registry) {
        let mut commands = JoinSet::new();
        loop {
            if commands.len() == COMMANDS_MAX {
                commands.join_next().await;
            }
            while commands.try_join_next().is_some() {}
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    commands.spawn(command(registry.clone(), stream));
                }
                Err(error) => {
                    tracing::error!(%error, "cannot accept commands");
                    tokio::time::sleep(PROGRESS_INTERVAL).await;
                }
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

const SOCKET: &str = "control";

/// The socket's path by way of the open directory: one by its name could be longer than a socket's may be.
fn short_path(dir: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))
}

/// Stops its task when it is dropped.
struct StopOnDrop(Watch);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

async fn command(registry: Registry, stream: UnixStream) {
    if let Err(error) = converse(registry, stream).await {
        tracing::debug!(%error, "a command went away");
    }
}

async fn converse(registry: Registry, mut stream: UnixStream) -> io::Result<()> {
    let (reader, mut writer) = stream.split();
    let mut reader = tokio::io::BufReader::new(reader);
    let mut text = String::new();
    timeout(ASK_TIMEOUT, (&mut reader).take(LINE_BYTES_MAX).read_line(&mut text)).await??;
    let task: Task = match serde_json::from_str(&text) {
        Ok(task) => task,
        Err(error) => {
            let why = format!("the command is not understood, it may be of another version: {error}");
            return writer.write_all(&line(&Line::Failed(why))?).await;
        }
    };
    let watch = Watch::default();
    let _stop = StopOnDrop(watch.clone());
    let mut work = {
        let (watch, task) = (watch.clone(), task.clone());
        tokio::task::spawn_blocking(move || registry.perform(&task, &watch))
    };
    let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
    let mut rest = [0];
    let last = loop {
        tokio::select! {
            done = &mut work => break match done {
                Ok(Ok(outcome)) => Line::Done(outcome),
                Ok(Err(error)) => Line::Failed(chain(&error)),
                Err(error) => Line::Failed(error.to_string()),
            },
            _ = ticks.tick() => writer.write_all(&line(&Line::Progress(watch.progress()))?).await?,
            // A command says nothing more, but for its end.
            read = reader.read(&mut rest) => if read? == 0 { return Ok(()) },
        }
    };
    writer.write_all(&line(&last)?).await
}

fn line(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(value)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
