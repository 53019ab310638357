//! The import worker as an operator runs it: told by the environment, without privileges, watched, and asked how it ended.
#![allow(clippy::unwrap_used, reason = "test code: a failure is the report")]

use anyhow::{Context, Result};
use dvcr_tests::{
    Daemon, FileServer, Registry, TempDir, cmd, dvcr, fixture, qemu, run, run_dvcr, run_output, temp_dir,
    utf8, wait_until,
};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

const DATA_BYTES: usize = 40 << 20;
const TIMEOUT: Duration = Duration::from_secs(120);

struct Pod {
    dir: TempDir,
    source: PathBuf,
    server: FileServer,
    registry: Registry,
}

impl Pod {
    fn new() -> Result<Self> {
        let dir = temp_dir();
        let source = dir.path().join("disk.qcow2");
        fixture::noise_qcow2(&source, 4 * DATA_BYTES as u64, DATA_BYTES)?;
        fs::write(dir.path().join("report"), "")?;
        let server = FileServer::start(dir.path())?;
        let registry = Registry::start(&dir.path().join("registry"))?;
        Ok(Self { dir, source, server, registry })
    }

    fn reference(&self) -> String {
        self.registry.reference("vi/ns/worker:uid")
    }

    fn command(&self, variables: &[(&str, &str)]) -> Result<Command> {
        let mut command = cmd(dvcr()?, ["importer", "-v=3"]);
        command
            .env("NO_COLOR", "1")
            .env("IMPORTER_SOURCE", "http")
            .env("IMPORTER_ENDPOINT", self.server.url("disk.qcow2"))
            .env("IMPORTER_CONTENTTYPE", "kubevirt")
            .env("IMPORTER_DESTINATION_ENDPOINT", self.reference())
            .env("DESTINATION_INSECURE_TLS", "false")
            .env("OWNER_UID", "11111111-2222")
            .env("METRICS_ADDRESS", "127.0.0.1:0")
            .env("TERMINATION_MESSAGE_PATH", self.dir.path().join("report"));
        command.envs(variables.iter().copied());
        Ok(command)
    }

    fn report(&self) -> Result<Value> {
        Ok(serde_json::from_str(&fs::read_to_string(self.dir.path().join("report"))?)?)
    }
}

#[test]
fn a_worker_is_told_by_its_environment_tells_its_progress_and_leaves_a_report() -> Result<()> {
    let pod = Pod::new()?;
    let size = pod.source.metadata()?.len();
    pod.server.hold_after(size / 2);
    let mut worker = Daemon::spawn(&pod.command(&[])?)?;
    let find = |line: &str| Some(line.split_once("address=")?.1.split_whitespace().next()?.to_owned());
    let metrics = worker.wait_for_line(TIMEOUT, |line| find(line).filter(|_| line.contains("metrics")))?;
    pod.server.wait_held()?;
    let url = format!("https://{metrics}/metrics");
    let mut text = String::new();
    wait_until(TIMEOUT, "half of the progress", || {
        text = run(&cmd("curl", ["-sSk", &url])).unwrap_or_default();
        let progress =
            text.lines().find_map(|line| line.strip_prefix("registry_progress{ownerUID=\"11111111-2222\"} "));
        progress
            .and_then(|share| share.parse::<f64>().ok())
            .is_some_and(|share| (40.0..51.0).contains(&share))
    })
    .with_context(|| text.clone())?;
    assert!(text.contains("dvcr_worker_phase{ownerUID=\"11111111-2222\",phase=\"transfer\"} 1"), "{text}");
    pod.server.release();
    assert!(worker.wait(TIMEOUT)?.success(), "{}", worker.log());

    let report = pod.report()?;
    assert_eq!(report["source-image-size"], size);
    assert_eq!(report["source-image-virtual-size"], 4 * DATA_BYTES);
    assert_eq!(report["source-image-format"], "qcow2");
    assert!(report["duration"].as_u64() > Some(0) && report["average-speed"].as_u64() > Some(0), "{report}");
    let disk = pod.dir.path().join("disk.raw");
    run_dvcr(&["populate", &pod.reference(), utf8(&disk)])?;
    qemu::assert_same_disk(&pod.source, "qcow2", &disk, "raw")
}

#[test]
fn a_worker_that_fails_says_why_and_does_not_try_in_vain() -> Result<()> {
    let pod = Pod::new()?;
    let wrong = format!("md5:{}", "0".repeat(32));
    let missing = pod.server.url("nothing.qcow2");
    for (variables, part) in [
        (&[("IMPORTER_CHECKSUMS", wrong.as_str())][..], "checksum"),
        (&[("IMPORTER_ENDPOINT", missing.as_str())], "404"),
        (&[("IMPORTER_ENDPOINT", "")], "IMPORTER_ENDPOINT"),
        (&[("IMPORTER_SOURCE", "registry"), ("IMPORTER_ENDPOINT", "docker://127.0.0.1:1/a")], "127.0.0.1:1"),
    ] {
        // A port where nobody listens is tried for a quarter of an hour; here it is enough that it is tried again.
        let mut worker = Daemon::spawn(&pod.command(variables)?)?;
        if part == "127.0.0.1:1" {
            worker.wait_for_line(TIMEOUT, |line| line.contains("is tried again").then_some(()))?;
            assert_eq!(worker.terminate()?.code(), Some(143), "{}", worker.log());
            // It ends by itself, in the midst of its wait, rather than being dropped.
            assert!(!worker.log().contains("before everything was cleaned up"), "{}", worker.log());
            continue;
        }
        assert_eq!(worker.wait(TIMEOUT)?.code(), Some(1), "{part}: {}", worker.log());
        let message = pod.report()?["error-message"].as_str().unwrap_or_default().to_owned();
        assert!(message.contains(part), "{part}: {message}");
        assert!(!worker.log().contains("is tried again"), "{part}");
    }
    Ok(())
}

#[test]
fn settings_that_no_worker_can_use_are_told_in_the_report_too() -> Result<()> {
    let pod = Pod::new()?;
    let told = |variables: &[(&str, &str)]| -> Result<String> {
        let output = run_output(&pod.command(variables)?)?;
        assert_eq!(output.status.code(), Some(2), "{}", output.stderr);
        Ok(pod.report()?["error-message"].as_str().unwrap_or_default().to_owned())
    };
    let message = told(&[("IMPORTER_SOURCE", "block")])?;
    assert!(message.contains("'block'") && message.contains("blockDevice"), "{message}");
    let message = told(&[("METRICS_ADDRESS", "somewhere")])?;
    assert!(message.contains("'somewhere'") && !message.contains('\n'), "{message}");

    let mut command = cmd(dvcr()?, ["pvc-importer", "--endpoint", "docker://r.example/a"]);
    command.env("IMPORTER_IMAGE_SIZE", "much");
    let output = run_output(command.env("TERMINATION_MESSAGE_PATH", pod.dir.path().join("report")))?;
    assert_eq!(output.status.code(), Some(2), "{}", output.stderr);
    let report = fs::read_to_string(pod.dir.path().join("report"))?;
    assert!(report.starts_with("Unable to process data: ") && report.contains("\"much\""), "{report}");
    Ok(())
}

#[test]
fn an_image_that_is_mounted_has_its_size_in_the_report() -> Result<()> {
    let pod = Pod::new()?;
    let first = pod.registry.reference("vi/ns/first:1");
    run_dvcr(&["import", utf8(&pod.source), &first])?;
    let command = pod.command(&[("IMPORTER_SOURCE", "dvcr"), ("IMPORTER_ENDPOINT", first.as_str())])?;
    run(&command)?;
    let report = pod.report()?;
    assert_eq!(report["source-image-size"], pod.source.metadata()?.len(), "{report}");
    Ok(())
}

#[test]
fn a_worker_reads_a_volume_and_needs_no_privileges() -> Result<()> {
    let pod = Pod::new()?;
    let volume = pod.dir.path().join("volume");
    fs::create_dir(&volume)?;
    fs::rename(&pod.source, volume.join("disk.img"))?;
    let variables = [("IMPORTER_SOURCE", "filesystem"), ("IMPORTER_FILESYSTEM", utf8(&volume))];
    let mut inner = pod.command(&variables)?;
    // As an operator's pods run: uid 64535, no capabilities, nothing to write to but the report.
    let program = pod.dir.path().join("dvcr");
    fs::copy(dvcr()?, &program)?;
    run(&cmd(
        "chmod",
        ["a+rX", utf8(pod.dir.path()), utf8(&volume), utf8(&volume.join("disk.img")), utf8(&program)],
    ))?;
    run(&cmd("chmod", ["a+rw", utf8(&pod.dir.path().join("report"))]))?;
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid=64535",
        "--regid=64535",
        "--clear-groups",
        "--bounding-set=-all",
        "--no-new-privs",
        "--",
    ]);
    command.arg(&program).args(inner.get_args());
    command.envs(inner.get_envs().filter_map(|(key, value)| Some((key, value?))));
    inner = command;
    let mut worker = Daemon::spawn(&inner)?;
    assert!(worker.wait(TIMEOUT)?.success(), "{}", worker.log());
    assert!(worker.log().contains("confined"), "{}", worker.log());
    assert_eq!(pod.report()?["source-image-format"], "qcow2");
    Ok(())
}
