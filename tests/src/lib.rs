//! Harness of the end-to-end tests: it starts the real programs, and stops them whatever happens.
//!
//! ```text
//!            main_job (the demo, and the test of the same name)
//!           /      |          \               \
//!    fixture   FileServer   Registry           qemu (convert, compare, boot)
//!  (images)   (HTTP source) PeerRegistry      /
//!         |       Relay     S3Server          /
//!          \        |          |             /
//!           programs (where binaries are), process (start, log, kill, wait), ControlGroup (what memory they use),
//!           Gate (a way to a server that closes), LoopDevice and Filesystem (volumes)
//! ```
//!
//! Every child process dies with the test program, also when that one is killed: children are started through
//! `setpriv --pdeathsig KILL` from a thread that lives as long as the program. Nothing here waits without a bound.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a harness: a failure is the report"
)]

mod control_group;
mod file_server;
pub mod fixture;
mod gate;
mod main_job;
mod process;
mod programs;
pub mod qemu;
mod registry;
mod relay;
mod s3;
mod small_disk;
mod volume;

pub use control_group::ControlGroup;
pub use file_server::FileServer;
pub use gate::Gate;
pub use main_job::{Done, main_job};
pub use process::{
    Daemon, Output, cmd, interrupt, interrupted, run, run_output, run_telling, run_visible, wait_until,
};
pub use programs::{dvcr, tool, workspace};
pub use registry::{PeerRegistry, Registry};
pub use relay::{Relay, Reply, Requested};
pub use s3::{Asked, Chaos, Fault, S3Proxy, S3Server};
pub use small_disk::SmallDisk;
pub use tempfile::TempDir;
pub use volume::{Filesystem, LoopDevice};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::Path;

/// Makes an empty directory that is removed when it is dropped.
pub fn temp_dir() -> TempDir {
    tempfile::Builder::new()
        .prefix("dvcr-test-")
        .tempdir()
        .expect("no temporary directory; is TMPDIR writable?")
}

/// Returns a path as text for a command line; ours are all made of ASCII.
pub fn utf8(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8; is TMPDIR an odd one?")
}

/// Runs `dvcr` with the given arguments and returns its standard output.
pub fn run_dvcr(args: &[&str]) -> Result<String> {
    run(&cmd(dvcr()?, args))
}

/// Compares two files byte by byte, the first `bytes` of them or all.
pub fn assert_same_bytes(left: &Path, right: &Path, bytes: Option<u64>) -> Result<()> {
    let mut command = cmd("cmp", bytes.map(|bytes| format!("--bytes={bytes}")));
    run(command.arg(left).arg(right)).map(drop)
}

/// Computes the SHA-256 of a file as lower-case hex.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut block = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut block).with_context(|| format!("cannot read {}", path.display()))?;
        if n == 0 {
            return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hash.update(&block[..n]);
    }
}
