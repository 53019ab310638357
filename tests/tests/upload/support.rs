//! A running uploader, and clients of it.
#![allow(clippy::unwrap_used, reason = "test code: a failure is the report")]

use anyhow::{Context, Result, ensure};
use dvcr_tests::{
    Daemon, Output, Registry, TempDir, cmd, dvcr, fixture, qemu, run_dvcr, run_output, temp_dir, utf8,
};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const START_TIMEOUT: Duration = Duration::from_secs(30);
pub const END_TIMEOUT: Duration = Duration::from_secs(120);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// A registry, an uploader that stores in it, and an image to upload.
pub struct Bench {
    pub dir: TempDir,
    pub registry: Registry,
    pub image: PathBuf,
    pub size: u64,
}

impl Bench {
    /// With an image of so many bytes of noise.
    pub fn new(data_bytes: usize) -> Result<Self> {
        let dir = temp_dir();
        let image = dir.path().join("disk.qcow2");
        fixture::noise_qcow2(&image, 4 * data_bytes as u64, data_bytes)?;
        let registry = Registry::start(&dir.path().join("registry"))?;
        let size = std::fs::metadata(&image)?.len();
        Ok(Self { dir, registry, image, size })
    }

    pub fn reference(&self) -> String {
        self.registry.reference("vi/up:1")
    }

    pub fn uploader(&self, args: &[&str]) -> Result<Uploader> {
        Uploader::start(&self.reference(), args)
    }

    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.image).unwrap()
    }

    /// Checks that the registry has the image, whole.
    pub fn assert_stored(&self) -> Result<()> {
        self.assert_stored_as(&self.image, "qcow2")
    }

    pub fn assert_stored_as(&self, image: &Path, format: &str) -> Result<()> {
        let disk = self.dir.path().join("stored.raw");
        run_dvcr(&["populate", &self.reference(), utf8(&disk)])?;
        qemu::assert_same_disk(image, format, &disk, "raw")
    }

    /// Checks that nothing was published.
    pub fn assert_nothing_stored(&self) -> Result<()> {
        let disk = self.dir.path().join("nothing.raw");
        let missing = run_output(&cmd(dvcr()?, ["populate", &self.reference(), utf8(&disk)]))?;
        ensure!(
            missing.status.code() == Some(1) && !disk.exists(),
            "something was stored: {}",
            missing.stdout
        );
        Ok(())
    }
}

/// A running `dvcr uploader`.
pub struct Uploader {
    pub daemon: Daemon,
    pub address: SocketAddr,
    pub health: SocketAddr,
}

impl Uploader {
    pub fn start(reference: &str, args: &[&str]) -> Result<Self> {
        let mut command = cmd(dvcr()?, ["uploader", "--listen-address", "127.0.0.1", "--listen-port", "0"]);
        command.args(["--healthz-port", "0", "--destination-endpoint", reference]);
        command.args(["--metrics-address", "127.0.0.1:0"]);
        let mut daemon = Daemon::spawn(command.args(args).env("NO_COLOR", "1"))?;
        let find = |line: &str, key: &str| -> Option<SocketAddr> {
            let (_, rest) = line.split_once(key).filter(|_| line.contains("listening"))?;
            rest.split_whitespace().next()?.parse().ok()
        };
        let both = daemon
            .wait_for_line(START_TIMEOUT, |line| Some((find(line, " addr=")?, find(line, "healthz=")?)));
        let (address, health) = both.context("dvcr uploader did not start")?;
        Ok(Self { daemon, address, health })
    }

    pub fn url(&self) -> String {
        format!("http://{}/upload", self.address)
    }

    /// Waits for the end, and returns the exit code.
    pub fn ended(&mut self) -> Result<Option<i32>> {
        let status = self.daemon.wait(END_TIMEOUT);
        Ok(status.with_context(|| format!("log:\n{}", self.daemon.log()))?.code())
    }

    /// What GET says of the upload.
    pub fn status(&self) -> Result<Value> {
        Ok(curl(&[&self.url()])?.json())
    }

    /// Waits until GET says what is wanted.
    pub fn wait_status(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = Value::Null;
        dvcr_tests::wait_until(END_TIMEOUT, what, || {
            last = self.status().unwrap_or_default();
            wanted(&last)
        })
        .with_context(|| format!("last seen: {last}"))?;
        Ok(last)
    }
}

/// An answer as curl shows it.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }

    /// The value of a header, by its lower-case name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// Runs curl and returns the last answer.
pub fn curl(args: &[&str]) -> Result<Answer> {
    let mut command = cmd("curl", ["-sS", "--noproxy", "*", "--max-time", "120", "-D", "-"]);
    let Output { status, stdout, stderr } = run_output(command.args(args))?;
    answer_in(&stdout).with_context(|| format!("curl {args:?}: {status}\n{stdout}\n{stderr}"))
}

/// Finds the last answer in what curl shows; those before it are interim ones.
fn answer_in(text: &str) -> Option<Answer> {
    let start = text.rfind("HTTP/1.1 ")?;
    let (headers, body) = text[start..].split_once("\r\n\r\n")?;
    let status = headers.split_whitespace().nth(1)?.parse().ok()?;
    Some(Answer { status, headers: headers.to_owned(), body: body.to_owned() })
}

/// A request that is sent by hand, as far as the test wants.
pub struct ByHand(TcpStream);

impl ByHand {
    pub fn begin(address: SocketAddr, head: &[&str]) -> Result<Self> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        write!(stream, "{}\r\nHost: {address}\r\n\r\n", head.join("\r\n"))?;
        Ok(Self(stream))
    }

    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.0.write_all(bytes)?)
    }

    /// The same connection, for another thread to send on.
    pub fn sender(&self) -> Result<TcpStream> {
        Ok(self.0.try_clone()?)
    }

    /// Everything that comes until the connection ends.
    pub fn read_to_end(&mut self, all: &mut Vec<u8>) -> Result<()> {
        self.0.read_to_end(all)?;
        Ok(())
    }

    pub fn answer(mut self) -> Result<Answer> {
        let mut bytes = Vec::new();
        let mut piece = [0; 4096];
        loop {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let answer = answer_in(&text);
            let length = answer.as_ref().and_then(|a| a.header("content-length")?.parse::<usize>().ok());
            if let Some(answer) = answer.filter(|answer| Some(answer.body.len()) >= length) {
                return Ok(answer);
            }
            let count = self.0.read(&mut piece)?;
            ensure!(count > 0, "the connection ended: {text}");
            bytes.extend_from_slice(&piece[..count]);
        }
    }
}

/// A `dvcr upload` command.
pub fn upload(file: &Path, url: &str) -> Result<Command> {
    let mut command = cmd(dvcr()?, ["upload", utf8(file), url]);
    command.env("NO_COLOR", "1");
    Ok(command)
}
