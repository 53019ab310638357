//! Commands that read images give up what they do not need, before they begin.

use anyhow::{Context, Result};
use dvcr_tests::{
    Daemon, FileServer, Registry, cmd, dvcr, fixture, qemu, run_output, temp_dir, utf8, wait_until,
};
use std::process::Command;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(120);

/// Checks that a process has given up its privileges, as far as the kernel has the means.
fn assert_confined(worker: &Daemon) -> Result<()> {
    let path = format!("/proc/{}/status", worker.id());
    let mut status = String::new();
    let has = |status: &str, name: &str, value: &str| {
        status.lines().any(|line| line.strip_prefix(name).is_some_and(|rest| rest.trim() == value))
    };
    wait_until(TIMEOUT, "no new privileges and a filter of system calls", || {
        status = std::fs::read_to_string(&path).unwrap_or_default();
        has(&status, "NoNewPrivs:", "1") && (has(&status, "Seccomp:", "2") || !status.contains("Seccomp:"))
    })
    .with_context(|| status.clone())
}

#[test]
fn an_import_and_a_populated_disk_are_made_without_privileges() -> Result<()> {
    let dir = temp_dir();
    let source = dir.path().join("disk.qcow2");
    fixture::noise_qcow2(&source, 256 << 20, 20 << 20)?;
    let server = FileServer::start(dir.path())?;
    let registry = Registry::start(&dir.path().join("registry"))?;
    let reference = registry.reference("vi/tests/disk:1");

    server.hold_after(source.metadata()?.len() / 2);
    let mut import = Daemon::spawn(&cmd(dvcr()?, ["import", &server.url("disk.qcow2"), &reference]))?;
    server.wait_held()?;
    assert_confined(&import)?;
    server.release();
    assert!(import.wait(TIMEOUT)?.success(), "{}", import.log());

    let disk = dir.path().join("made/disk.raw");
    std::fs::create_dir(dir.path().join("made"))?;
    registry.pause()?;
    let mut populate = Daemon::spawn(&cmd(dvcr()?, ["populate", &reference, utf8(&disk)]))?;
    assert_confined(&populate)?;
    registry.resume()?;
    assert!(populate.wait(TIMEOUT)?.success(), "{}", populate.log());
    qemu::assert_same_disk(&source, "qcow2", &disk, "raw")
}

#[test]
fn a_volume_is_served_without_privileges() -> Result<()> {
    let dir = temp_dir();
    let (disk, socket) = (dir.path().join("disk.raw"), dir.path().join("socket"));
    std::fs::write(&disk, fixture::Noise::new(1).bytes(1 << 20))?;
    let mut server = Daemon::spawn(&cmd(dvcr()?, ["serve-nbd", utf8(&disk), "--socket", utf8(&socket)]))?;
    server.wait_for_line(TIMEOUT, |line| line.contains("listening").then_some(()))?;
    assert_confined(&server)?;
    let copy = dir.path().join("copy.raw");
    let url = format!("nbd+unix:///?socket={}", utf8(&socket));
    dvcr_tests::run(&cmd("nbdcopy", [&url, utf8(&copy)]))?;
    dvcr_tests::assert_same_bytes(&disk, &copy, None)?;
    // The folder of the socket is all that it may write to: it takes the socket away with it.
    assert!(server.terminate()?.success(), "{}", server.log());
    assert!(!socket.exists());
    Ok(())
}

#[test]
fn every_command_that_reads_an_image_is_confined_unless_it_is_told_otherwise() -> Result<()> {
    let dir = temp_dir();
    let disk = dir.path().join("disk.qcow2");
    fixture::noise_qcow2(&disk, 16 << 20, 1 << 20)?;
    let (disk, made) = (utf8(&disk), dir.path().join("made.raw"));
    let commands: [&[&str]; 6] = [
        &["info", disk],
        &["map", disk],
        &["check", disk, "--data"],
        &["compare", disk, disk],
        &["convert", disk, utf8(&made)],
        &["convert", disk, "made-here.raw"],
    ];
    for args in commands {
        let run = |more: &[&str]| {
            let mut command: Command = cmd(dvcr()?, [&["--log", "debug"], args, more].concat());
            command.env("NO_COLOR", "1").current_dir(dir.path());
            run_output(&command)
        };
        let output = run(&[])?;
        assert!(output.status.success() && output.stderr.contains("confined"), "{args:?}: {}", output.stderr);
        let output = run(&["--no-sandbox"])?;
        assert!(
            output.status.success() && !output.stderr.contains("confined"),
            "{args:?}: {}",
            output.stderr
        );
    }
    qemu::assert_same_disk(std::path::Path::new(disk), "qcow2", &made, "raw")
}
