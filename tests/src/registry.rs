//! Registries under test: our own, and the peers it is compared with.

use crate::{Daemon, S3Server, cmd, dvcr, run, temp_dir, tool};
use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;
use tempfile::TempDir;

const START_TIMEOUT: Duration = Duration::from_secs(30);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a peer is started again when someone else took its port between choosing and binding.
const PEER_START_ATTEMPTS_MAX: u32 = 3;

/// A running `dvcr registry`; dropping it kills it and leaves its root directory to the caller.
#[derive(Debug)]
pub struct Registry {
    root: PathBuf,
    address: SocketAddr,
    args: Vec<String>,
    daemon: Daemon,
}

impl Registry {
    /// Starts the registry on a free port of 127.0.0.1, with its data in `root`.
    pub fn start(root: &Path) -> Result<Self> {
        Self::start_with(root, &[])
    }

    /// Starts the registry with further command line arguments.
    pub fn start_with(root: &Path, args: &[&str]) -> Result<Self> {
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        let (daemon, address) = launch(root, "127.0.0.1:0", &args)?;
        Ok(Self { root: root.to_owned(), address, args, daemon })
    }

    /// Starts a replica that serves a directory of a bucket, with what is its own in `root`.
    pub fn start_in_bucket(root: &Path, place: (&S3Server, &str, &str), args: &[&str]) -> Result<Self> {
        let config = Self::bucket_settings(root, place)?;
        let config = config.to_str().context("a path that is no UTF-8")?;
        Self::start_with(root, &[&["--config", config], args].concat())
    }

    /// Writes the file of settings of such a replica.
    pub fn bucket_settings(
        root: &Path,
        (server, bucket, directory): (&S3Server, &str, &str),
    ) -> Result<PathBuf> {
        std::fs::create_dir_all(root).with_context(|| format!("cannot make {}", root.display()))?;
        let file = |name: &str, text: &str| {
            let path = root.join(name);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            Ok::<_, anyhow::Error>(path)
        };
        let (access, secret) =
            (file("access-key", S3Server::ACCESS_KEY)?, file("secret-key", S3Server::SECRET_KEY)?);
        let config = serde_json::json!({"root": root, "bucket": {
            "bucket": bucket, "endpoint": server.endpoint(), "region": S3Server::REGION,
            "root-directory": directory, "access-key-file": access, "secret-key-file": secret,
        }});
        file("config.yml", &config.to_string())
    }

    /// Starts it again, after [`Registry::kill9`] or [`Registry::terminate`], on the same port and data.
    pub fn restart(&mut self) -> Result<()> {
        (self.daemon, _) = launch(&self.root, &self.address.to_string(), &self.args)?;
        Ok(())
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns `http://127.0.0.1:PORT`, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns `127.0.0.1:PORT/NAME`, for a name with a tag or digest.
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Returns the newest lines the registry logged.
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    /// Returns the process id, for those who look at its memory or time.
    pub fn id(&self) -> u32 {
        self.daemon.id()
    }

    /// Kills the registry without a chance to tidy up.
    pub fn kill9(&mut self) -> Result<()> {
        self.daemon.kill9()
    }

    /// Lets the registry stand still, with all it has begun, until [`Registry::resume`].
    pub fn pause(&self) -> Result<()> {
        self.daemon.signal(Signal::STOP)
    }

    /// Lets it go on.
    pub fn resume(&self) -> Result<()> {
        self.daemon.signal(Signal::CONT)
    }

    /// Asks the registry to end and waits for it.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.daemon.terminate()
    }
}

fn launch(root: &Path, listen: &str, args: &[String]) -> Result<(Daemon, SocketAddr)> {
    let mut command = cmd(dvcr()?, ["registry", "--root"]);
    // Colour codes would hide the address from the search below.
    command.arg(root).args(["--listen", listen]).args(args).env("NO_COLOR", "1");
    let mut daemon = Daemon::spawn(&command)?;
    let address =
        daemon.wait_for_line(START_TIMEOUT, listening_address).context("dvcr registry did not start")?;
    Ok((daemon, address))
}

/// Finds `addr=HOST:PORT` in the line that says the server listens.
fn listening_address(line: &str) -> Option<SocketAddr> {
    let (_, rest) = line.split_once("addr=").filter(|_| line.contains("listening"))?;
    rest.split_whitespace().next()?.trim_matches('"').parse().ok()
}

/// A running registry of somebody else, on a directory of its own choice or ours.
#[derive(Debug)]
pub struct PeerRegistry {
    address: SocketAddr,
    daemon: Daemon,
    _config: TempDir,
}

impl PeerRegistry {
    /// What the peers sign their upload tokens with.
    pub const SECRET: &str = "tests";

    /// Starts Debian's docker-registry (distribution 2.8), which `make tools` unpacks.
    pub fn debian(root: &Path) -> Result<Self> {
        Self::start(&tool("docker-registry")?, &in_directory(root)?, "")
    }

    /// Starts CNCF distribution v3, which `make tools` builds.
    pub fn distribution_v3(root: &Path) -> Result<Self> {
        Self::distribution_v3_with(root, "")
    }

    /// Starts CNCF distribution v3 with further sections of its configuration.
    pub fn distribution_v3_with(root: &Path, sections: &str) -> Result<Self> {
        Self::start(&tool("registry")?, &in_directory(root)?, sections)
    }

    /// Starts CNCF distribution v3 on a directory of a bucket.
    pub fn distribution_v3_in_bucket(server: &S3Server, bucket: &str, root: &str) -> Result<Self> {
        Self::start(&tool("registry")?, &in_bucket(server, bucket, root), "")
    }

    /// Has CNCF distribution v3 collect the garbage in a directory of a bucket, which nobody else may write meanwhile.
    pub fn collect_in_bucket(server: &S3Server, bucket: &str, root: &str) -> Result<String> {
        let config = temp_dir();
        let file = config.path().join("config.yml");
        let text = format!("version: 0.1\nstorage:\n{}", in_bucket(server, bucket, root));
        std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        let mut command = cmd(tool("registry")?, ["garbage-collect"]);
        run(command.arg(&file).env("OTEL_TRACES_EXPORTER", "none"))
    }

    fn start(program: &Path, storage: &str, sections: &str) -> Result<Self> {
        let mut attempt = 1;
        loop {
            match Self::try_start(program, storage, sections) {
                Err(error) if attempt < PEER_START_ATTEMPTS_MAX => {
                    attempt += 1;
                    eprintln!("starting {} again: {error:#}", program.display());
                }
                done => return done,
            }
        }
    }

    fn try_start(program: &Path, storage: &str, sections: &str) -> Result<Self> {
        let address = free_port()?;
        let config = temp_dir();
        let file = config.path().join("config.yml");
        // No health checks and no redirects: what is compared is storage and HTTP alone.
        let text = format!(
            "version: 0.1\nlog:\n  level: warn\n  accesslog:\n    disabled: true\nstorage:\n  delete:\n    enabled: true\n\
             {storage}http:\n  addr: {address}\n  secret: {secret}\n{sections}",
            secret = Self::SECRET,
        );
        std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        let mut command = Command::new(program);
        command.arg("serve").arg(&file).env("OTEL_TRACES_EXPORTER", "none");
        let mut daemon = Daemon::spawn(&command)?;
        daemon.wait_for(START_TIMEOUT, "an answer on /v2/", |_| {
            http_status(address, "/v2/").ok().filter(|status| *status == 200)
        })?;
        Ok(Self { address, daemon, _config: config })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns `http://127.0.0.1:PORT`, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns `127.0.0.1:PORT/NAME`, for a name with a tag or digest.
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    pub fn log(&self) -> String {
        self.daemon.log()
    }

    pub fn id(&self) -> u32 {
        self.daemon.id()
    }

    /// Asks the registry to end and waits for it.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.daemon.terminate()
    }
}

/// What distribution's file says of a directory that holds the data.
fn in_directory(root: &Path) -> Result<String> {
    Ok(format!("  filesystem:\n    rootdirectory: {}\n", serde_json::to_string(root)?))
}

/// What it says of a bucket.
fn in_bucket(server: &S3Server, bucket: &str, root: &str) -> String {
    format!(
        "  redirect:\n    disable: true\n  s3:\n    regionendpoint: {}\n    forcepathstyle: true\n    region: {}\n    \
         accesskey: {}\n    secretkey: {}\n    bucket: {bucket}\n    rootdirectory: {root}\n",
        server.endpoint(),
        S3Server::REGION,
        S3Server::ACCESS_KEY,
        S3Server::SECRET_KEY,
    )
}

pub(crate) fn free_port() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("no free port on 127.0.0.1")?;
    Ok(listener.local_addr()?)
}

/// Asks for a path and returns the status code of the answer.
pub(crate) fn http_status(address: SocketAddr, path: &str) -> Result<u16> {
    let mut stream = TcpStream::connect_timeout(&address, PROBE_TIMEOUT)?;
    stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut head = Vec::new();
    stream.take(64).read_to_end(&mut head)?;
    let head = String::from_utf8_lossy(&head);
    match head.split_whitespace().nth(1).and_then(|code| code.parse().ok()) {
        Some(code) => Ok(code),
        None => bail!("not an HTTP answer: {head:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_listening_line_tells_the_address() {
        let line = "2026-01-01T00:00:00Z  INFO dvcr: listening addr=127.0.0.1:4711 root=/tmp/x";
        assert_eq!(listening_address(line), Some("127.0.0.1:4711".parse().unwrap()));
        assert_eq!(listening_address("INFO connected addr=127.0.0.1:4711"), None);
    }

    #[test]
    fn debians_registry_starts_and_ends() {
        let root = temp_dir();
        let mut peer = PeerRegistry::debian(root.path()).unwrap();
        assert_eq!(http_status(peer.address(), "/v2/_catalog").unwrap(), 200);
        peer.terminate().unwrap();
    }
}
