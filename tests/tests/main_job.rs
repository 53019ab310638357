//! The demo as a proof: what it imports and populates is the source, bit by bit, and boots.

use anyhow::Result;
use dvcr_tests::{Daemon, assert_same_bytes, cmd, main_job, qemu, run, temp_dir, wait_until};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

const DEMO_STEP_TIMEOUT: Duration = Duration::from_secs(15 * 60);

#[test]
fn an_image_published_over_http_becomes_a_disk_that_boots() -> Result<()> {
    let done = main_job(true)?;
    println!("{}", done.table());
    let pristine = done.pristine.as_deref().expect("it was asked for");

    let dir = temp_dir();
    let expected = dir.path().join("expected.raw");
    qemu::convert(&done.source, "qcow2", &expected, "raw")?;
    let size = expected.metadata()?.len();
    assert_same_bytes(&expected, pristine, Some(size))?;
    assert_eq!(pristine.metadata()?.len(), size + done.growth_bytes);

    // The same by qemu's own reckoning, for which a larger disk must end in zeros.
    run(cmd("qemu-img", ["compare", "-f", "qcow2", "-F", "raw"]).arg(&done.source).arg(pristine))?;
    let allocated = |path: &Path| Ok::<_, std::io::Error>(path.metadata()?.blocks() * 512);
    let (ours, theirs) = (allocated(pristine)?, allocated(&expected)?);
    assert!(ours <= theirs + theirs / 10, "{ours} bytes allocated where qemu-img needs {theirs}");
    Ok(())
}

#[test]
fn a_demo_that_is_interrupted_leaves_nothing() -> Result<()> {
    let dir = temp_dir();
    let mut demo = Daemon::spawn(cmd(env!("CARGO_BIN_EXE_demo"), [""; 0]).env("TMPDIR", dir.path()))?;
    demo.wait_for_line(DEMO_STEP_TIMEOUT, |line| line.contains("== boot").then_some(()))?;
    let children = || run(&cmd("pgrep", ["--parent", &demo.id().to_string()])).unwrap_or_default();
    let pids: Vec<String> = children().lines().map(str::to_owned).collect();
    assert!(!pids.is_empty(), "the registry and the machine run");
    assert!(dir.path().read_dir()?.next().is_some(), "the disk is there");

    let status = demo.terminate()?;
    assert_eq!(status.code(), Some(130), "{}", demo.log());
    assert!(dir.path().read_dir()?.next().is_none(), "the temporary directory is empty again");
    wait_until(Duration::from_secs(10), "its processes to end", || {
        pids.iter().all(|pid| !Path::new("/proc").join(pid).exists())
    })
}
