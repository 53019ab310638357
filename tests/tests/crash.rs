//! Power cuts in the middle of an import: nothing half-done is visible, and trying again ends well.

use anyhow::Result;
use dvcr_tests::{
    Daemon, FileServer, Registry, TempDir, cmd, dvcr, fixture, qemu, run, run_dvcr, temp_dir, utf8,
    wait_until,
};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

const VIRTUAL_BYTES: u64 = 256 << 20;
const DATA_BYTES: usize = 48 << 20;
const NAME: &str = "vi/tests/disk";
const IMPORT_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// An import that stands still because its source sent only the first half of the image.
struct Halfway {
    dir: TempDir,
    source: PathBuf,
    server: FileServer,
    registry: Registry,
    import: Daemon,
}

impl Halfway {
    fn new() -> Result<Self> {
        let dir = temp_dir();
        let source = dir.path().join("disk.qcow2");
        fixture::noise_qcow2(&source, VIRTUAL_BYTES, DATA_BYTES)?;
        let server = FileServer::start(dir.path())?;
        let registry = Registry::start(&dir.path().join("registry"))?;
        server.hold_after(source.metadata()?.len() / 2);
        let import =
            Daemon::spawn(&cmd(dvcr()?, ["import", &server.url("disk.qcow2"), &registry.reference(&tag())]))?;
        server.wait_held()?;
        Ok(Self { dir, source, server, registry, import })
    }

    /// Asserts that nobody can see the image yet.
    fn assert_invisible(&self) -> Result<()> {
        let url = self.registry.url();
        let status =
            |path: String| run(&cmd("curl", ["-sS", "-o", "/dev/null", "-w", "%{http_code}", &path]));
        assert_eq!(status(format!("{url}/v2/{NAME}/manifests/1"))?, "404");
        let tags = run(&cmd("curl", ["-sS", &format!("{url}/v2/{NAME}/tags/list")]))?;
        assert!(!tags.contains("\"1\""), "{tags}");
        Ok(())
    }

    /// How much of the layer the registry has put away.
    fn acknowledged(&self) -> u64 {
        let uploads = format!("docker/registry/v2/repositories/{NAME}/_uploads");
        let sessions = fs::read_dir(self.registry.root().join(uploads)).into_iter().flatten().flatten();
        let states = sessions.flat_map(|session| fs::read_dir(session.path().join("hashstates/sha256")));
        let offsets = states.flatten().flatten().filter_map(|state| state.file_name().to_str()?.parse().ok());
        offsets.max().unwrap_or(0)
    }

    fn import_again(&self) -> Result<()> {
        run_dvcr(&["import", &self.server.url("disk.qcow2"), &self.registry.reference(&tag())]).map(drop)
    }

    /// Asserts that the image in the registry is the source.
    fn assert_complete(&self) -> Result<()> {
        let disk = self.dir.path().join("disk.raw");
        run_dvcr(&["populate", &self.registry.reference(&tag()), utf8(&disk)])?;
        qemu::assert_same_disk(&self.source, "qcow2", &disk, "raw")
    }
}

fn tag() -> String {
    format!("{NAME}:1")
}

#[test]
fn a_registry_killed_in_the_middle_of_an_import_takes_it_after_a_restart() -> Result<()> {
    let mut halfway = Halfway::new()?;
    halfway.assert_invisible()?;
    halfway.registry.kill9()?;
    halfway.registry.restart()?;
    halfway.assert_invisible()?;

    // The import meets the restarted registry and goes on, or gives up and is started again.
    halfway.server.release();
    if !halfway.import.wait(IMPORT_TIMEOUT)?.success() {
        halfway.assert_invisible()?;
        halfway.import_again()?;
    }
    halfway.assert_complete()
}

#[test]
fn an_importer_killed_in_the_middle_leaves_nothing_visible_and_the_next_one_goes_on() -> Result<()> {
    for registry_too in [false, true] {
        let mut halfway = Halfway::new()?;
        wait_until(IMPORT_TIMEOUT, "three chunks in the registry", || halfway.acknowledged() >= 24 << 20)?;
        halfway.import.kill9()?;
        if registry_too {
            halfway.registry.kill9()?;
            halfway.registry.restart()?;
        }
        halfway.assert_invisible()?;
        halfway.server.release();
        let before = halfway.server.bytes_sent();
        halfway.import_again()?;
        // Of the half that came, the last chunk comes again.
        let (again, len) = (halfway.server.bytes_sent() - before, halfway.source.metadata()?.len());
        assert!(again < len - (15 << 20), "{again} of {len} bytes came again");
        halfway.assert_complete()?;
    }
    Ok(())
}

#[test]
fn an_import_survives_a_registry_killed_after_its_success() -> Result<()> {
    let mut halfway = Halfway::new()?;
    halfway.server.release();
    assert!(halfway.import.wait(IMPORT_TIMEOUT)?.success(), "{}", halfway.import.log());
    halfway.registry.kill9()?;
    halfway.registry.restart()?;
    halfway.assert_complete()
}
