//! Where the programs under test and their peers are.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// Returns the root of the source tree.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_path_buf()
}

/// Finds the built `dvcr`: `$DVCR_BIN`, or the one of the same profile beside the running test.
pub fn dvcr() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("DVCR_BIN") {
        let path = PathBuf::from(path);
        if !path.is_file() {
            bail!("DVCR_BIN names {}, which is not a file; unset it, or build that file", path.display());
        }
        return Ok(path);
    }
    let own = std::env::current_exe().context("the running program has no path")?;
    // target/<profile>/deps/<test>-<hash> for tests, target/<profile>/<name> for binaries.
    own.ancestors().skip(1).take(2).map(|dir| dir.join("dvcr")).find(|path| path.is_file()).with_context(
        || format!("no dvcr binary beside {}; run `cargo build --workspace` first", own.display()),
    )
}

/// Finds a peer or checker that `make tools` builds: `crane`, `oras`, `helm`, `cosign`, `containerd` and `ctr` (Debian's),
/// `registry` (CNCF distribution v3), `docker-registry` (Debian's, 2.8), `minio`, `moto_server` or `conformance.test`.
pub fn tool(name: &str) -> Result<PathBuf> {
    let path = workspace().join(".cache/tools/bin").join(name);
    if !path.is_file() {
        bail!("{} is missing; run `make tools` first", path.display());
    }
    Ok(path)
}
