//! S3 servers under test, each with a folder and a port of its own.
//!
//! MinIO is the main one: it checks signatures, their expiry, and conditions. moto is a second opinion on everything but
//! signatures, which it does not look at.

mod proxy;

pub use proxy::{Asked, Chaos, Fault, S3Proxy};

use crate::process::{Daemon, cmd, run};
use crate::programs::tool;
use crate::registry::{free_port, http_status};
use crate::temp_dir;
use anyhow::{Context, Result};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tempfile::TempDir;

const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How often MinIO is started again when someone else took its port between choosing and binding.
const START_ATTEMPTS_MAX: u32 = 3;

/// A running S3 server; dropping it kills it and removes what it held.
#[derive(Debug)]
pub struct S3Server {
    address: SocketAddr,
    tls: bool,
    daemon: Daemon,
    _dir: TempDir,
}

impl S3Server {
    pub const ACCESS_KEY: &str = "dvcr-tests";
    pub const SECRET_KEY: &str = "secret-of-the-tests";
    pub const REGION: &str = "us-east-1";

    /// Starts MinIO, which `make tools` builds.
    pub fn minio() -> Result<Self> {
        Self::start_minio(None)
    }

    /// Starts MinIO with a certificate for 127.0.0.1 and its key, in PEM.
    pub fn minio_tls(cert: &str, key: &str) -> Result<Self> {
        Self::start_minio(Some((cert, key)))
    }

    /// Starts moto, which `make tools` installs.
    pub fn moto() -> Result<Self> {
        let dir = temp_dir();
        let mut command = cmd(tool("moto_server")?, ["-H", "127.0.0.1", "-p", "0"]);
        command.current_dir(dir.path()).env("PYTHONUNBUFFERED", "1");
        let mut daemon = Daemon::spawn(&command)?;
        let address = daemon.wait_for_line(START_TIMEOUT, |line| {
            line.split_once("Running on http://")?.1.split_whitespace().next()?.parse().ok()
        })?;
        Ok(Self { address, tls: false, daemon, _dir: dir })
    }

    /// Returns the MinIO that the tests of this program that run now have in common.
    pub fn shared_minio() -> Arc<Self> {
        static SHARED: Mutex<Weak<S3Server>> = Mutex::new(Weak::new());
        shared(&SHARED, Self::minio)
    }

    /// Returns the moto that the tests of this program that run now have in common.
    pub fn shared_moto() -> Arc<Self> {
        static SHARED: Mutex<Weak<S3Server>> = Mutex::new(Weak::new());
        shared(&SHARED, Self::moto)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns `http://127.0.0.1:PORT`, or `https://`, without a slash at the end.
    pub fn endpoint(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.address)
    }

    /// Makes a bucket that no other test has, and returns its name.
    pub fn new_bucket(&self) -> Result<String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("bucket-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let user = format!("{}:{}", Self::ACCESS_KEY, Self::SECRET_KEY);
        let signature = format!("aws:amz:{}:s3", Self::REGION);
        let mut command = cmd("curl", ["-sSfk", "--retry", "3", "-X", "PUT", "--user", &user]);
        command.args(["--aws-sigv4", &signature, &format!("{}/{name}", self.endpoint())]);
        run(&command).with_context(|| format!("cannot make a bucket; log:\n{}", self.log()))?;
        Ok(name)
    }

    pub fn log(&self) -> String {
        self.daemon.log()
    }

    pub fn id(&self) -> u32 {
        self.daemon.id()
    }

    fn start_minio(tls: Option<(&str, &str)>) -> Result<Self> {
        let program = tool("minio")?;
        let mut attempt = 1;
        loop {
            match Self::try_start_minio(&program, tls) {
                Err(error) if attempt < START_ATTEMPTS_MAX => {
                    attempt += 1;
                    eprintln!("starting {} again: {error:#}", program.display());
                }
                done => return done,
            }
        }
    }

    fn try_start_minio(program: &Path, tls: Option<(&str, &str)>) -> Result<Self> {
        let address = free_port()?;
        let dir = temp_dir();
        let (data, certs) = (dir.path().join("data"), dir.path().join("certs"));
        std::fs::create_dir(&data).and_then(|()| std::fs::create_dir(&certs)).context("no folders")?;
        if let Some((cert, key)) = tls {
            std::fs::write(certs.join("public.crt"), cert).context("cannot write the certificate")?;
            std::fs::write(certs.join("private.key"), key).context("cannot write its key")?;
        }
        let mut command = cmd(program, ["server", "--address", &address.to_string(), "--certs-dir"]);
        command.arg(&certs).arg(&data);
        command.env("HOME", dir.path()).env("MINIO_BROWSER", "off").env("MINIO_UPDATE", "off");
        command.env("MINIO_ROOT_USER", Self::ACCESS_KEY).env("MINIO_ROOT_PASSWORD", Self::SECRET_KEY);
        // A key of its own for server-side encryption, so that it can be asked for.
        command.env("MINIO_KMS_SECRET_KEY", "tests:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=");
        let mut daemon = Daemon::spawn(&command)?;
        daemon.wait_for(START_TIMEOUT, "readiness", |_| is_ready(address, tls.is_some()).then_some(()))?;
        Ok(Self { address, tls: tls.is_some(), daemon, _dir: dir })
    }
}

fn shared(place: &Mutex<Weak<S3Server>>, start: fn() -> Result<S3Server>) -> Arc<S3Server> {
    let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
    place.upgrade().unwrap_or_else(|| {
        let server = Arc::new(start().expect("an S3 server"));
        *place = Arc::downgrade(&server);
        server
    })
}

fn is_ready(address: SocketAddr, tls: bool) -> bool {
    const PATH: &str = "/minio/health/ready";
    match tls {
        false => matches!(http_status(address, PATH), Ok(200)),
        true => run(&cmd("curl", ["-sfk", "--max-time", "5", &format!("https://{address}{PATH}")])).is_ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_lives_as_long_as_somebody_has_it_and_its_folder_too() {
        for start in [S3Server::minio, S3Server::moto] {
            let server = start().unwrap();
            let (id, dir) = (server.id(), server._dir.path().to_owned());
            assert_ne!(server.new_bucket().unwrap(), server.new_bucket().unwrap());
            drop(server);
            assert!(!Path::new(&format!("/proc/{id}")).exists() && !dir.exists());
        }
    }
}
