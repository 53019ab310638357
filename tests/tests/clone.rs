//! Volumes copied to volumes: on one file system, between several, and by NBD between nodes.
#![allow(clippy::unwrap_used, reason = "test code: a failure is the report")]

use anyhow::{Context, Result};
use dvcr_tests::{
    ControlGroup, Daemon, Filesystem, Gate, LoopDevice, TempDir, assert_same_bytes, cmd, dvcr, fixture, qemu,
    run, run_output, temp_dir, utf8,
};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 160 * MIB;
const DATA_BYTES: u64 = 24 * MIB;
const TIMEOUT: Duration = Duration::from_secs(120);

struct Setup {
    dir: TempDir,
    disk: PathBuf,
}

impl Setup {
    /// A sparse disk with data in three places, the last at its end.
    fn new() -> Result<Self> {
        let dir = temp_dir();
        let disk = dir.path().join("disk.raw");
        sample(&disk)?;
        Ok(Self { dir, disk })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn serve(&self, args: &[&str]) -> Result<(Daemon, SocketAddr)> {
        serve(&self.disk, args)
    }
}

fn sample(path: &Path) -> Result<()> {
    let file = File::create(path)?;
    file.set_len(DISK_BYTES)?;
    let mut noise = fixture::Noise::new(7);
    for at in [0, 70 * MIB + 4096, DISK_BYTES - DATA_BYTES / 3] {
        file.write_all_at(&noise.bytes(DATA_BYTES as usize / 3), at)?;
    }
    Ok(file.sync_all()?)
}

fn serve(disk: &Path, args: &[&str]) -> Result<(Daemon, SocketAddr)> {
    let command = cmd(dvcr()?, ["serve-nbd", utf8(disk), "--listen", "127.0.0.1:0"]);
    listening(&with(command, args))
}

fn listening(command: &Command) -> Result<(Daemon, SocketAddr)> {
    let mut server = Daemon::spawn(command)?;
    let address = server.wait_for_line(TIMEOUT, |line| {
        let address = line.contains("listening").then(|| line.split_once("addr=")).flatten()?.1;
        address.split('"').nth(1)?.parse().ok()
    })?;
    Ok((server, address))
}

fn with(mut command: Command, args: &[&str]) -> Command {
    command.args(args).env("NO_COLOR", "1");
    command
}

fn clone_command(source: &str, target: &Path, args: &[&str]) -> Result<Command> {
    Ok(with(cmd(dvcr()?, ["clone", "--output", "json", source, utf8(target)]), args))
}

fn clone(source: &str, target: &Path, args: &[&str]) -> Result<Value> {
    Ok(serde_json::from_str(&run(&clone_command(source, target, args)?)?)?)
}

fn clone_fails(source: &str, target: &Path, args: &[&str]) -> Result<String> {
    let output = run_output(&clone_command(source, target, args)?)?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    Ok(output.stderr)
}

fn allocated(path: &Path) -> Result<u64> {
    Ok(path.metadata()?.blocks() * 512)
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let names = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names: Vec<String> = names.collect::<Result<_>>()?;
    names.retain(|name| name != "lost+found");
    names.sort();
    Ok(names)
}

#[test]
fn a_file_is_copied_with_its_holes_the_shortest_way_that_there_is() -> Result<()> {
    let setup = Setup::new()?;
    let copy = setup.path("copy.raw");
    let done = clone(utf8(&setup.disk), &copy, &["--mode", "640"])?;
    assert_eq!(done["size"], DISK_BYTES);
    assert_same_bytes(&setup.disk, &copy, None)?;
    assert_eq!(copy.metadata()?.permissions().mode() & 0o777, 0o640);
    // Nothing is read and written where the kernel can do it, and it can on all that tests run on but FUSE.
    assert!(done["way"] == "copy-file-range" || done["way"] == "reflink", "{done}");
    assert!(allocated(&copy)? <= DATA_BYTES + MIB);
    assert_eq!(names(setup.dir.path())?, ["copy.raw", "disk.raw"]);

    let Some(other) = Filesystem::make(setup.dir.path(), "mkfs.xfs", 512 * MIB)? else {
        eprintln!("the rest is skipped: nothing can be mounted here");
        return Ok(());
    };
    let (far, near) = (other.path().join("far"), other.path().join("near"));
    let done = clone(utf8(&setup.disk), &far, &[])?;
    assert_eq!((&done["way"], &done["written_bytes"]), (&json!("read-write"), &json!(DATA_BYTES)));
    assert_same_bytes(&setup.disk, &far, None)?;
    assert!(allocated(&far)? <= DATA_BYTES + MIB);
    let done = clone(utf8(&far), &near, &[])?;
    assert_eq!((&done["way"], &done["written_bytes"]), (&json!("reflink"), &json!(0)));
    assert_same_bytes(&setup.disk, &near, None)?;
    assert_eq!(names(other.path())?, ["far", "near"]);
    Ok(())
}

#[test]
fn a_volume_larger_than_its_share_of_memory_is_copied_beside_the_page_cache() -> Result<()> {
    const SHARE_BYTES: u64 = 256 * MIB;
    let Some(group) = ControlGroup::create() else {
        eprintln!("skipped: control groups cannot be made here, or do not count memory");
        return Ok(());
    };
    drop(group);
    let dir = temp_dir();
    let (disk, copy) = (dir.path().join("disk.raw"), dir.path().join("copy.raw"));
    let mut noise = fixture::Noise::new(9);
    let file = File::create(&disk)?;
    for piece in 0..40 {
        file.write_all_at(&noise.bytes(16 << 20), piece * 16 * MIB)?;
    }
    file.sync_all()?;
    // Nothing of it is in the cache beforehand, where it would count as nobody's.
    run(&cmd("dd", [&format!("if={}", utf8(&disk)), "of=/dev/null", "iflag=nocache", "count=0"]))?;
    let served = ControlGroup::create().context("a control group")?;
    let server = served.inside(&cmd(dvcr()?, ["serve-nbd", utf8(&disk), "--listen", "127.0.0.1:0"]));
    let (_server, address) = listening(&with(server, &[]))?;
    for source in [utf8(&disk), &format!("nbd://{address}/")] {
        let group = ControlGroup::create().context("another control group")?;
        run(&group.inside(&clone_command(source, &copy, &[])?))?;
        let peak = group.peak()?;
        assert!(peak < SHARE_BYTES, "{source}: {} MiB in use", peak >> 20);
        assert_same_bytes(&disk, &copy, None)?;
        run(&cmd("dd", [&format!("if={}", utf8(&disk)), "of=/dev/null", "iflag=nocache", "count=0"]))?;
    }
    let peak = served.peak()?;
    assert!(peak < SHARE_BYTES, "the server: {} MiB in use", peak >> 20);
    Ok(())
}

#[test]
fn a_copy_has_every_byte_of_a_file_of_any_length() -> Result<()> {
    let setup = Setup::new()?;
    let (odd, copy) = (setup.path("disk.img"), setup.path("copy"));
    for length in [0, 1, 511, 4097, 3 * MIB - 1] {
        fs::write(&odd, fixture::Noise::new(length).bytes(length as usize))?;
        clone(utf8(setup.dir.path()), &copy, &[])?;
        assert_same_bytes(&odd, &copy, None).with_context(|| format!("{length} bytes"))?;
        let (_server, address) = serve(&odd, &[])?;
        clone(&format!("nbd://{address}/"), &copy, &[])?;
        assert_same_bytes(&odd, &copy, None).with_context(|| format!("{length} bytes by NBD"))?;
    }
    Ok(())
}

#[test]
fn devices_are_copied_to_devices_and_files_and_are_zero_behind_the_copy() -> Result<()> {
    let setup = Setup::new()?;
    let larger = setup.path("larger");
    fs::write(&larger, vec![7; (DISK_BYTES + 8 * MIB) as usize])?;
    let smaller = setup.path("smaller");
    fs::write(&smaller, vec![7; (DISK_BYTES - MIB) as usize])?;
    let devices =
        (LoopDevice::attach(&setup.disk), LoopDevice::attach(&larger), LoopDevice::attach(&smaller));
    let (Some(source), Some(target), Some(small)) = devices else {
        eprintln!("skipped: no loop devices here");
        return Ok(());
    };
    clone(utf8(source.path()), target.path(), &[])?;
    let expected = setup.path("expected");
    fs::copy(&setup.disk, &expected)?;
    File::options().write(true).open(&expected)?.set_len(DISK_BYTES + 8 * MIB)?;
    assert_same_bytes(&expected, target.path(), None)?;

    let file = setup.path("copy.raw");
    clone(utf8(source.path()), &file, &[])?;
    assert_same_bytes(&setup.disk, &file, None)?;
    assert!(allocated(&file)? <= DATA_BYTES + MIB, "zeros of a device become holes");

    let error = clone_fails(utf8(source.path()), small.path(), &[])?;
    assert!(
        error.contains(&DISK_BYTES.to_string()) && error.contains(&(DISK_BYTES - MIB).to_string()),
        "{error}"
    );
    assert_same_bytes(&smaller, small.path(), None)?;
    let error = clone_fails(utf8(&setup.disk), source.path(), &[])?;
    assert!(error.contains("same storage"), "{error}");
    Ok(())
}

#[test]
fn what_is_served_is_what_the_programs_of_others_read() -> Result<()> {
    let setup = Setup::new()?;
    let (mut server, address) = setup.serve(&[])?;
    let url = format!("nbd://{address}/any");
    let info: Value = serde_json::from_str(&run(&cmd("nbdinfo", ["--json", &url]))?)?;
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], DISK_BYTES);
    assert_eq!((&export["is_read_only"], &export["can_multi_conn"]), (&json!(true), &json!(true)));
    let listed: Value = serde_json::from_str(&run(&cmd("nbdinfo", ["--list", "--json", &url]))?)?;
    assert_eq!(listed["exports"].as_array().context("a list")?.len(), 1, "{listed}");
    let map: Value = serde_json::from_str(&run(&cmd("nbdinfo", ["--map", "--json", &url]))?)?;
    let holes = map.as_array().context("a map")?.iter().filter(|extent| extent["type"] == 3);
    let holes: u64 = holes.filter_map(|extent| extent["length"].as_u64()).sum();
    assert_eq!(holes, DISK_BYTES - DATA_BYTES, "{map}");
    let copy = setup.path("copy");
    run(&cmd("nbdcopy", [&url, utf8(&copy)]))?;
    assert_same_bytes(&setup.disk, &copy, None)?;
    run(&cmd("qemu-img", ["compare", "-f", "raw", "-F", "raw", utf8(&setup.disk), &url]))?;
    run(&cmd("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", &url, utf8(&setup.path("copy.qcow2"))]))?;
    qemu::assert_same_disk(&setup.disk, "raw", &setup.path("copy.qcow2"), "qcow2")?;
    // Nobody writes to it.
    let refused = run_output(&cmd("nbdcopy", [utf8(&copy), &url]))?;
    assert!(!refused.status.success(), "{refused:?}");
    assert!(server.terminate()?.success(), "{}", server.log());
    Ok(())
}

#[test]
fn a_volume_of_another_node_comes_without_its_holes_and_goes_on_after_broken_connections() -> Result<()> {
    let setup = Setup::new()?;
    let (_server, address) = setup.serve(&[])?;
    let gate = Gate::to(address, u64::MAX)?;
    gate.cut_after(5 * MIB);
    let copy = setup.path("copy.raw");
    let done = clone(&format!("nbd://{}/", gate.address()), &copy, &[])?;
    assert_same_bytes(&setup.disk, &copy, None)?;
    assert!(gate.cuts() >= 3, "{} cuts", gate.cuts());
    assert_eq!((&done["way"], &done["written_bytes"]), (&json!("read-write"), &json!(DATA_BYTES)));
    // What was on its way when the connection broke comes again: at most what is asked for at a time.
    let most = DATA_BYTES + (gate.cuts() + 1) * 4 * MIB;
    assert!(gate.passed() <= most, "{} of {most} bytes", gate.passed());
    Ok(())
}

#[test]
fn the_servers_of_others_are_sources_too() -> Result<()> {
    let setup = Setup::new()?;
    let (socket, copy) = (setup.path("socket"), setup.path("copy.raw"));
    let url = format!("nbd+unix:///disk?socket={}", utf8(&socket));
    let nbdkit = with(cmd("nbdkit", ["-f", "-r", "-U", utf8(&socket), "file", utf8(&setup.disk)]), &[]);
    let qemu = ["--read-only", "--persistent", "--format", "raw", "--export-name", "disk", "--socket"];
    let qemu = with(cmd("qemu-nbd", qemu), &[utf8(&socket), utf8(&setup.disk)]);
    for command in [nbdkit, qemu] {
        // It is waited for, as a pod waits for another one.
        let mut waiting = Daemon::spawn(&clone_command(&url, &copy, &["--wait", "2m", "--log", "debug"])?)?;
        waiting.wait_for_line(TIMEOUT, |line| line.contains("is waited for").then_some(()))?;
        let mut server = Daemon::spawn(&command)?;
        assert!(waiting.wait(TIMEOUT)?.success(), "{}", waiting.log());
        assert_same_bytes(&setup.disk, &copy, None)?;
        fs::remove_file(&copy)?;
        server.kill9()?;
        let _ = fs::remove_file(&socket);
    }
    Ok(())
}

#[test]
fn a_copy_that_is_stopped_or_killed_leaves_nothing_under_its_name_and_the_next_one_is_right() -> Result<()> {
    let setup = Setup::new()?;
    let (_server, address) = setup.serve(&[])?;
    let folder = setup.path("volume");
    fs::create_dir(&folder)?;
    let copy = folder.join("disk.img");
    for kill in [true, false] {
        let gate = Gate::to(address, DATA_BYTES / 2)?;
        let mut running = Daemon::spawn(&clone_command(&format!("nbd://{}/", gate.address()), &copy, &[])?)?;
        gate.wait_held();
        if kill {
            running.kill9()?;
            assert_eq!(names(&folder)?, [".disk.img.dvcr-partial"]);
        } else {
            assert_eq!(running.terminate()?.code(), Some(143), "{}", running.log());
            // Though the server is silent, it ends by itself rather than being dropped.
            assert!(!running.log().contains("before everything was cleaned up"), "{}", running.log());
            assert_eq!(names(&folder)?, [""; 0]);
        }
        clone(&format!("nbd://{address}/"), &copy, &[])?;
        assert_eq!(names(&folder)?, ["disk.img"]);
        assert_same_bytes(&setup.disk, &copy, None)?;
        fs::remove_file(&copy)?;
    }
    Ok(())
}

#[test]
fn a_copy_is_made_by_a_worker_too() -> Result<()> {
    let setup = Setup::new()?;
    let (copy, report) = (setup.path("copy.raw"), setup.path("report"));
    fs::write(&report, "")?;
    let (_server, address) = setup.serve(&[])?;
    let gate = Gate::to(address, DATA_BYTES / 2)?;
    let mut command =
        clone_command(&format!("nbd://{}/", gate.address()), &copy, &["--worker", "--mode", "660"])?;
    command
        .env("OWNER_UID", "u-1")
        .env("METRICS_ADDRESS", "127.0.0.1:0")
        .env("TERMINATION_MESSAGE_PATH", &report);
    let mut worker = Daemon::spawn(&command)?;
    let find = |line: &str| Some(line.split_once("address=")?.1.split_whitespace().next()?.to_owned());
    let metrics = worker.wait_for_line(TIMEOUT, |line| find(line).filter(|_| line.contains("metrics")))?;
    gate.wait_held();
    let text = run(&cmd("curl", ["-sSk", &format!("https://{metrics}/metrics")]))?;
    assert!(text.contains("kubevirt_cdi_import_progress_total{ownerUID=\"u-1\"}"), "{text}");
    gate.open();
    assert!(worker.wait(TIMEOUT)?.success(), "{}", worker.log());
    assert_same_bytes(&setup.disk, &copy, None)?;
    assert_eq!(copy.metadata()?.permissions().mode() & 0o777, 0o660);
    assert!(fs::read_to_string(&report)?.contains("Import Complete"));

    let mut command = clone_command(utf8(&setup.path("missing")), &copy, &["--worker", "--wait", "0"])?;
    command.env("METRICS_ADDRESS", "127.0.0.1:0").env("TERMINATION_MESSAGE_PATH", &report);
    assert_eq!(run_output(&command)?.status.code(), Some(1));
    let told = fs::read_to_string(&report)?;
    assert!(told.starts_with("Unable to process data: ") && told.contains("missing"), "{told}");
    Ok(())
}

#[test]
fn what_is_served_with_tls_is_not_served_without() -> Result<()> {
    let setup = Setup::new()?;
    let (key, cert, ca) = (setup.path("key.pem"), setup.path("cert.pem"), setup.path("ca-cert.pem"));
    let openssl = |args: &str| run(cmd("openssl", args.split(' ')).current_dir(setup.dir.path()));
    openssl("req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca-cert.pem")?;
    fs::write(setup.path("ext"), "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")?;
    openssl("req -newkey rsa:2048 -nodes -subj /CN=node -keyout key.pem -out csr.pem")?;
    let sign = "x509 -req -in csr.pem -CA ca-cert.pem -CAkey ca.key -CAcreateserial";
    openssl(&format!("{sign} -days 2 -extfile ext -out cert.pem"))?;
    let tls = ["--tls-cert", utf8(&cert), "--tls-key", utf8(&key)];
    let (_server, address) = setup.serve(&tls)?;
    let copy = setup.path("copy.raw");
    clone(&format!("nbds://{address}/"), &copy, &["--insecure-source"])?;
    assert_same_bytes(&setup.disk, &copy, None)?;
    let error = clone_fails(&format!("nbd://{address}/"), &copy, &[])?;
    assert!(error.contains("nbds://"), "{error}");
    let error = clone_fails(&format!("nbds://{address}/"), &copy, &[])?;
    assert!(error.contains("--insecure-source"), "{error}");
    fs::remove_file(&copy)?;
    clone(&format!("nbds://{address}/"), &copy, &["--source-ca", utf8(&ca)])?;
    assert_same_bytes(&setup.disk, &copy, None)?;
    // Another program takes the certificate for what it is.
    let url = format!("nbds://{address}/?tls-certificates={}", utf8(setup.dir.path()));
    assert_eq!(run(&cmd("nbdinfo", ["--size", &url]))?.trim(), DISK_BYTES.to_string());

    let (_strict, address) = setup.serve(&[&tls[..], &["--client-ca", utf8(&ca)]].concat())?;
    let (url, other) = (format!("nbds://{address}/"), setup.path("other"));
    let error = clone_fails(&url, &other, &["--insecure-source"])?;
    assert!(error.contains("--source-cert") && !error.contains("again") && !other.exists(), "{error}");
    let ours = ["--source-ca", utf8(&ca), "--source-cert", utf8(&cert), "--source-key", utf8(&key)];
    clone(&url, &other, &ours)?;
    assert_same_bytes(&setup.disk, &other, None)?;
    // A certificate that nobody would see, and one with another's key.
    let error = clone_fails(&url.replace("nbds", "nbd"), &other, &ours)?;
    assert!(error.contains("nbds"), "{error}");
    run(&cmd("openssl", ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", utf8(&key)]))?;
    let error = clone_fails(&url, &other, &ours)?;
    assert!(error.contains("cert.pem and ") && error.contains("belong to each other"), "{error}");
    Ok(())
}

#[test]
fn a_terminal_shows_a_bar_and_all_else_gets_lines() -> Result<()> {
    let setup = Setup::new()?;
    let line = run_output(&clone_command(utf8(&setup.disk), &setup.path("copy.raw"), &[])?)?.stderr;
    assert!(line.contains("copy.raw: done, ") && !line.contains('['), "{line}");
    let command =
        format!("{} clone {} {}", utf8(&dvcr()?), utf8(&setup.disk), utf8(&setup.path("again.raw")));
    let shown = run(&cmd("script", ["-qec", &command, "/dev/null"]))?;
    // The template's bar is made of `=`; the one that a bar has without a template would fill the terminal.
    assert!(shown.contains("again.raw") && !shown.contains('█') && !shown.contains("done, "), "{shown}");
    Ok(())
}

#[test]
fn what_is_no_volume_is_refused_with_a_word_why() -> Result<()> {
    let setup = Setup::new()?;
    let copy = setup.path("copy");
    for (source, part) in [
        ("docker://r.example/a", "dvcr populate"),
        ("/dev/zero", "neither a regular file nor a block device"),
        ("/no/such/file", "/no/such/file"),
    ] {
        let error = clone_fails(source, &copy, &[])?;
        assert!(error.contains(part), "{source}: {error}");
    }
    let output = run_output(&clone_command("ftp://u:s3cret@h/a", &copy, &[])?)?;
    assert_eq!(output.status.code(), Some(2));
    assert!(!output.stderr.contains("s3cret"), "{}", output.stderr);
    let error = clone_fails(utf8(&setup.disk), Path::new("/dev/null"), &[])?;
    assert!(error.contains("/dev/null"), "{error}");
    let error = clone_fails(utf8(&setup.disk), &setup.disk, &[])?;
    assert!(error.contains("same storage"), "{error}");
    Ok(())
}
