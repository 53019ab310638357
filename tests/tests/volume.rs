//! The worker that fills volumes as an operator runs it: told by the environment, confined, killed, and out of room.
#![allow(clippy::unwrap_used, reason = "test code: a failure is the report")]

use anyhow::{Context, Result};
use dvcr_tests::{
    Daemon, Filesystem, Gate, LoopDevice, Registry, TempDir, assert_same_bytes, cmd, dvcr, fixture, qemu,
    run, run_dvcr, run_output, temp_dir, utf8, wait_until,
};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const VIRTUAL_BYTES: u64 = 160 * MIB;
const DATA_BYTES: usize = 40 << 20;
const TIMEOUT: Duration = Duration::from_secs(120);

/// An image in a registry, and what the pod of a worker has.
struct Pod {
    dir: TempDir,
    source: PathBuf,
    registry: Registry,
}

impl Pod {
    fn new() -> Result<Self> {
        let dir = temp_dir();
        let source = dir.path().join("disk.qcow2");
        fixture::noise_qcow2(&source, VIRTUAL_BYTES, DATA_BYTES)?;
        fs::write(dir.path().join("report"), "")?;
        fs::create_dir(dir.path().join("data"))?;
        let registry = Registry::start(&dir.path().join("registry"))?;
        run_dvcr(&["import", utf8(&source), &registry.reference("vi/ns/image:uid")])?;
        Ok(Self { dir, source, registry })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The folder that the volume is mounted at.
    fn data(&self) -> PathBuf {
        self.path("data")
    }

    fn command(&self, variables: &[(&str, &str)]) -> Result<Command> {
        self.command_for(&self.data(), self.registry.address(), variables)
    }

    fn command_for(&self, data: &Path, registry: SocketAddr, variables: &[(&str, &str)]) -> Result<Command> {
        let (device, file) = (self.path("block-volume"), data.join("disk.img"));
        let volume = ["pvc-importer", "-v=3", "--block-device", utf8(&device), "--file", utf8(&file)];
        let mut command = cmd(dvcr()?, volume);
        command
            .env("NO_COLOR", "1")
            .env("IMPORTER_SOURCE", "registry")
            .env("IMPORTER_ENDPOINT", format!("docker://{registry}/vi/ns/image:uid"))
            .env("IMPORTER_CONTENTTYPE", "kubevirt")
            .env("IMPORTER_IMAGE_SIZE", "200Mi")
            .env("IMPORTER_QEMU_CONVERT_THREADS", "1")
            .env("IMPORTER_DIRECT_TRANSFER", "true")
            .env("FILESYSTEM_OVERHEAD", "0")
            .env("INSECURE_TLS", "false")
            .env("OWNER_UID", "11111111-2222")
            .env("METRICS_ADDRESS", "127.0.0.1:0")
            .env("TERMINATION_MESSAGE_PATH", self.path("report"));
        command.envs(variables.iter().copied());
        Ok(command)
    }

    fn fill(&self, variables: &[(&str, &str)]) -> Result<()> {
        let mut worker = Daemon::spawn(&self.command(variables)?)?;
        self.assert_filled(&mut worker)
    }

    fn assert_filled(&self, worker: &mut Daemon) -> Result<()> {
        assert!(worker.wait(TIMEOUT)?.success(), "{}", worker.log());
        let report: Value = serde_json::from_str(&self.report()?)?;
        assert_eq!(report, json!({"preallocationApplied": false, "message": "Import Complete"}));
        Ok(())
    }

    fn assert_fails(&self, worker: &mut Daemon, part: &str) -> Result<()> {
        assert_eq!(worker.wait(TIMEOUT)?.code(), Some(1), "{}", worker.log());
        let report = self.report()?;
        assert!(report.starts_with("Unable to process data: ") && report.contains(part), "{report}");
        Ok(())
    }

    fn report(&self) -> Result<String> {
        Ok(fs::read_to_string(self.path("report"))?)
    }

    fn assert_holds(&self, data: &Path, virtual_bytes: u64) -> Result<()> {
        let disk = data.join("disk.img");
        qemu::qemu_img(&["check", "-f", "qcow2", utf8(&disk)])?;
        assert_eq!(qemu::virtual_size(&disk, "qcow2")?, virtual_bytes);
        // A longer disk is the same if what is behind is zero.
        let formats = ["compare", "-f", "qcow2", "-F", "qcow2"];
        qemu::qemu_img(&[&formats[..], &[utf8(&self.source), utf8(&disk)]].concat()).map(drop)
    }
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let names = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names: Vec<String> = names.collect::<Result<_>>()?;
    names.retain(|name| name != "lost+found");
    names.sort();
    Ok(names)
}

#[test]
fn a_filesystem_gets_a_qcow2_disk_of_the_size_that_was_asked_for() -> Result<()> {
    let pod = Pod::new()?;
    for (size, bytes) in [("1.5Gi", 3 << 29), ("200M", 200_000_000), ("167772160", VIRTUAL_BYTES)] {
        pod.fill(&[("IMPORTER_IMAGE_SIZE", size)])?;
        pod.assert_holds(&pod.data(), bytes)?;
        assert_eq!(names(&pod.data())?, ["disk.img"]);
        assert_eq!(pod.data().join("disk.img").metadata()?.permissions().mode() & 0o777, 0o660);
    }
    Ok(())
}

#[test]
fn a_disk_is_no_larger_than_the_room_that_its_filesystem_has() -> Result<()> {
    let pod = Pod::new()?;
    let Some(volume) = Filesystem::make(pod.dir.path(), "mkfs.ext4", 512 * MIB)? else {
        eprintln!("skipped: nothing can be mounted here");
        return Ok(());
    };
    let large = [("IMPORTER_IMAGE_SIZE", "10Gi"), ("FILESYSTEM_OVERHEAD", "0.1")];
    let mut sizes = Vec::new();
    // The second finds the disk of the first, as a pod that is started again would.
    for _ in 0..2 {
        let mut worker = Daemon::spawn(&pod.command_for(volume.path(), pod.registry.address(), &large)?)?;
        pod.assert_filled(&mut worker)?;
        let size = qemu::virtual_size(&volume.path().join("disk.img"), "qcow2")?;
        pod.assert_holds(volume.path(), size)?;
        sizes.push(size);
    }
    assert!(sizes[0] > VIRTUAL_BYTES && sizes[0] < 512 * MIB * 9 / 10, "{sizes:?}");
    assert!(sizes[0].abs_diff(sizes[1]) < MIB, "{sizes:?}");
    let tight = [("IMPORTER_IMAGE_SIZE", "10Gi"), ("FILESYSTEM_OVERHEAD", "0.8")];
    let mut worker = Daemon::spawn(&pod.command_for(volume.path(), pod.registry.address(), &tight)?)?;
    pod.assert_fails(&mut worker, "A larger PVC is required")
}

#[test]
fn a_block_device_gets_a_raw_disk_and_zeros_behind_it() -> Result<()> {
    let pod = Pod::new()?;
    let backing = pod.path("backing");
    let bytes = VIRTUAL_BYTES + 16 * MIB;
    fs::write(&backing, vec![7; bytes as usize])?;
    let Some(device) = LoopDevice::attach(&backing) else {
        eprintln!("skipped: no loop devices here");
        return Ok(());
    };
    std::os::unix::fs::symlink(device.path(), pod.path("block-volume"))?;
    pod.fill(&[])?;
    let expected = pod.path("expected.raw");
    qemu::convert(&pod.source, "qcow2", &expected, "raw")?;
    File::options().write(true).open(&expected)?.set_len(bytes)?;
    assert_same_bytes(&expected, device.path(), None)?;
    assert_eq!(names(&pod.data())?, [""; 0], "there was no need of the filesystem");
    // What was asked for counts, also where the device is larger.
    let mut worker = Daemon::spawn(&pod.command(&[("IMPORTER_IMAGE_SIZE", "100Mi")])?)?;
    pod.assert_fails(&mut worker, "A larger PVC is required")?;
    assert_same_bytes(&expected, device.path(), None)
}

#[test]
fn an_image_that_is_too_large_is_refused_with_both_sizes_before_anything_is_written() -> Result<()> {
    let pod = Pod::new()?;
    let mut worker = Daemon::spawn(&pod.command(&[("IMPORTER_IMAGE_SIZE", "100Mi")])?)?;
    pod.assert_fails(&mut worker, "A larger PVC is required")?;
    let report = pod.report()?;
    assert!(report.contains(&VIRTUAL_BYTES.to_string()), "{report}");
    assert!(report.contains(&(100 * MIB).to_string()), "{report}");
    assert_eq!(names(&pod.data())?, [""; 0]);
    Ok(())
}

#[test]
fn a_worker_that_was_killed_leaves_no_disk_and_the_next_one_makes_it() -> Result<()> {
    let pod = Pod::new()?;
    let gate = Gate::to(pod.registry.address(), DATA_BYTES as u64 / 2)?;
    let mut worker = Daemon::spawn(&pod.command_for(&pod.data(), gate.address(), &[])?)?;
    let find = |line: &str| Some(line.split_once("address=")?.1.split_whitespace().next()?.to_owned());
    let metrics = worker.wait_for_line(TIMEOUT, |line| find(line).filter(|_| line.contains("metrics")))?;
    gate.wait_held();
    let url = format!("https://{metrics}/metrics");
    let mut text = String::new();
    wait_until(TIMEOUT, "some progress", || {
        text = run(&cmd("curl", ["-sSk", &url])).unwrap_or_default();
        let name = "kubevirt_cdi_import_progress_total{ownerUID=\"11111111-2222\"} ";
        let share = text.lines().find_map(|line| line.strip_prefix(name));
        share.and_then(|share| share.parse::<f64>().ok()).is_some_and(|share| (1.0..100.0).contains(&share))
    })
    .with_context(|| text.clone())?;
    worker.kill9()?;
    let left = names(&pod.data())?;
    assert!(left.len() == 1 && left[0] != "disk.img", "{left:?}");
    pod.fill(&[])?;
    assert_eq!(names(&pod.data())?, ["disk.img"]);
    pod.assert_holds(&pod.data(), 200 * MIB)
}

#[test]
fn a_registry_that_is_away_for_a_while_is_waited_for() -> Result<()> {
    let pod = Pod::new()?;
    let gate = Gate::to(pod.registry.address(), u64::MAX)?;
    gate.cut_after(0);
    let mut worker = Daemon::spawn(&pod.command_for(&pod.data(), gate.address(), &[])?)?;
    worker.wait_for_line(TIMEOUT, |line| line.contains("is tried again").then_some(()))?;
    gate.open();
    pod.assert_filled(&mut worker)?;
    pod.assert_holds(&pod.data(), 200 * MIB)
}

#[test]
fn a_volume_that_is_full_in_the_middle_is_told_of_and_holds_no_half_of_a_disk() -> Result<()> {
    let pod = Pod::new()?;
    let Some(volume) = Filesystem::make(pod.dir.path(), "mkfs.ext4", 256 * MIB)? else {
        eprintln!("skipped: nothing can be mounted here");
        return Ok(());
    };
    let gate = Gate::to(pod.registry.address(), 8 * MIB)?;
    let mut worker = Daemon::spawn(&pod.command_for(volume.path(), gate.address(), &[])?)?;
    gate.wait_held();
    // Somebody else takes the room that was there at the beginning.
    let space = run(&cmd("stat", ["-f", "-c", "%a %S", utf8(volume.path())]))?;
    let (blocks, bytes) = space.trim().split_once(' ').context(space.clone())?;
    let taken = (blocks.parse::<u64>()? * bytes.parse::<u64>()?).saturating_sub(4 * MIB);
    run(&cmd("fallocate", ["-l", &taken.to_string(), utf8(&volume.path().join("other"))]))?;
    gate.open();
    pod.assert_fails(&mut worker, "No space left on device")?;
    assert!(!worker.log().contains("is tried again"), "{}", worker.log());
    assert_eq!(names(volume.path())?, ["other"]);
    Ok(())
}

#[test]
fn a_worker_that_fills_a_volume_needs_no_privileges_and_no_root_to_write_to() -> Result<()> {
    let pod = Pod::new()?;
    let inner = pod.command(&[])?;
    let program = pod.path("dvcr");
    fs::copy(dvcr()?, &program)?;
    run(&cmd("chmod", ["a+rX", utf8(pod.dir.path()), utf8(&program)]))?;
    run(&cmd("chmod", ["a+rwX", utf8(&pod.path("report")), utf8(&pod.data())]))?;
    // Nothing can be written to but the volume and the report: the root is read-only.
    let script = "mount --bind \"$1\" \"$1\"; mount --bind \"$2\" \"$2\"; shift 2
        mount -o remount,bind,ro /; if touch /x 2>&-; then exit 9; fi; exec \"$@\"";
    let (data, report) = (pod.data(), pod.path("report"));
    let mut command = cmd("unshare", ["--mount", "sh", "-ec", script, "sh", utf8(&data), utf8(&report)]);
    let unprivileged = ["setpriv", "--reuid=64535", "--regid=64535", "--clear-groups", "--bounding-set=-all"];
    command.args(unprivileged).args(["--no-new-privs", "--"]);
    command.arg(&program).args(inner.get_args());
    command.envs(inner.get_envs().filter_map(|(key, value)| Some((key, value?))));
    let mut worker = Daemon::spawn(&command)?;
    pod.assert_filled(&mut worker)?;
    assert!(worker.log().contains("confined"), "{}", worker.log());
    pod.assert_holds(&pod.data(), 200 * MIB)
}

#[test]
fn a_registry_that_wants_to_know_who_asks_is_told_by_a_file_or_by_variables() -> Result<()> {
    let secrets = temp_dir();
    let (password, auth) = (secrets.path().join("password"), secrets.path().join(".dockerconfigjson"));
    fs::write(&password, "s3cret-of-admin\n")?;
    let login = |host: &str| json!({"auths": {host: {"username": "admin", "password": "s3cret-of-admin"}}});
    let registry =
        Registry::start_with(&secrets.path().join("first"), &["--admin-password-file", utf8(&password)])?;
    fs::write(&auth, login(&registry.address().to_string()).to_string())?;
    let source = secrets.path().join("disk.qcow2");
    fixture::noise_qcow2(&source, VIRTUAL_BYTES, DATA_BYTES)?;
    run_dvcr(&["import", utf8(&source), &registry.reference("vi/ns/image:uid"), "--authfile", utf8(&auth)])?;
    let pod = Pod::new()?;
    let right = ("IMPORTER_SECRET_KEY", "s3cret-of-admin");
    let wrong = ("IMPORTER_SECRET_KEY", "s3cret-of-nobody");
    let by_variables = ("IMPORTER_ACCESS_KEY_ID", "admin");
    for (variables, is_right) in [
        (vec![("IMPORTER_AUTH_CONFIG", utf8(&auth))], true),
        (vec![by_variables, right], true),
        (vec![by_variables, wrong], false),
        (vec![("DOCKER_CONFIG", "/nowhere")], false),
    ] {
        let mut worker = Daemon::spawn(&pod.command_for(&pod.data(), registry.address(), &variables)?)?;
        match is_right {
            true => pod.assert_filled(&mut worker)?,
            false => pod.assert_fails(&mut worker, "vi/ns/image")?,
        }
        let told = pod.report()? + &worker.log();
        assert!(!told.contains("s3cret"), "{told}");
    }
    Ok(())
}

/// The way back: what a machine has written on its volume becomes an image.
#[test]
fn a_disk_of_a_volume_becomes_an_image_of_either_kind_of_volume() -> Result<()> {
    let pod = Pod::new()?;
    pod.fill(&[])?;
    let backing = pod.path("backing");
    File::create(&backing)?.set_len(VIRTUAL_BYTES)?;
    let device = LoopDevice::attach(&backing);
    let mut volumes = vec![("filesystem", "--filesystem", pod.data())];
    match &device {
        Some(device) => {
            std::os::unix::fs::symlink(device.path(), pod.path("block-volume"))?;
            pod.fill(&[])?;
            volumes.push(("blockDevice", "--block-device", pod.path("block-volume")));
        }
        None => eprintln!("no loop devices here: the filesystem stands for them"),
    }
    for (kind, flag, place) in volumes {
        let reference = pod.registry.reference(&format!("vi/ns/{}:1", kind.to_lowercase()));
        let mut importer = cmd(dvcr()?, ["importer", flag, utf8(&place)]);
        importer
            .env("IMPORTER_SOURCE", kind)
            .env("IMPORTER_DESTINATION_ENDPOINT", &reference)
            .env("METRICS_ADDRESS", "127.0.0.1:0")
            .env("TERMINATION_MESSAGE_PATH", pod.path("report"));
        run(&importer)?;
        let report: Value = serde_json::from_str(&pod.report()?)?;
        assert_eq!(report["source-image-format"], "qcow2", "{kind}: {report}");
        let again = pod.path("again.qcow2");
        run_dvcr(&["populate", "--format", "qcow2", &reference, utf8(&again)])?;
        let formats = ["compare", "-f", "qcow2", "-F", "qcow2"];
        qemu::qemu_img(&[&formats[..], &[utf8(&pod.source), utf8(&again)]].concat())?;
    }
    Ok(())
}

#[test]
fn a_worker_is_told_what_is_wrong_with_its_variables() -> Result<()> {
    let pod = Pod::new()?;
    for (variable, value, part) in [
        ("IMPORTER_IMAGE_SIZE", "much", "much"),
        ("IMPORTER_SOURCE", "http", "registry"),
        ("IMPORTER_CONTENTTYPE", "archive", "kubevirt"),
        ("FILESYSTEM_OVERHEAD", "2", "from 0"),
        ("IMPORTER_ENDPOINT", "docker://UPPER", "--endpoint"),
    ] {
        let output = run_output(&pod.command(&[(variable, value)])?)?;
        assert_eq!(output.status.code(), Some(2), "{variable}: {}", output.stderr);
        assert!(output.stderr.contains(part), "{variable}: {}", output.stderr);
    }
    let missing = format!("docker://{}/vi/ns/nothing:1", pod.registry.address());
    let mut worker = Daemon::spawn(&pod.command(&[("IMPORTER_ENDPOINT", &missing)])?)?;
    pod.assert_fails(&mut worker, "vi/ns/nothing")?;
    assert_eq!(names(&pod.data())?, [""; 0]);
    Ok(())
}
