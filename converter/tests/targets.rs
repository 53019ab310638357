//! Targets: complete and synced, or recognisably not there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{assert_same_bytes, noise, path, prose, qemu_img, temp_dir};
use dvcr_converter::convert::{self, Options};
use dvcr_converter::error::ErrorKind;
use dvcr_converter::file::{self, Destination, Output};
use dvcr_converter::io::{Disk, Extent, ExtentKind};
use dvcr_converter::limits::Limits;
use dvcr_converter::local::{self, Preallocation, RawTarget};
use dvcr_converter::progress::Progress;
use dvcr_converter::qcow2::WriteOptions;
use dvcr_converter::sink::{ImageTarget, StreamTarget};
use dvcr_converter::{Error, Result};

/// A disk of 24 MiB with data at its head, in the middle and, unaligned, at its end; returned as raw bytes too.
fn sample(dir: &Path) -> (std::path::PathBuf, Vec<u8>) {
    let mut disk = prose(1_500_000, 1);
    disk.resize(9 << 20, 0);
    disk.extend(noise(3 << 20, 2));
    disk.resize((24 << 20) - 512, 0);
    disk.extend(noise(512, 3));
    let (raw, image) = (dir.join("sample.raw"), dir.join("sample.qcow2"));
    std::fs::write(&raw, &disk).unwrap();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", path(&raw), path(&image)]);
    (image, disk)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_raw_file_is_sparse_and_replaces_the_old_one_only_when_complete() {
    let dir = temp_dir();
    let (image, disk) = sample(dir.path());
    let out = dir.path().join("out.raw");
    std::fs::write(&out, b"old").unwrap();

    let opened = common::open(&image).unwrap();
    let target = RawTarget::create(&out, opened.disk.virtual_size()).unwrap();
    convert::to_raw(opened.disk.as_ref(), &target, &Options::default(), &Progress::default()).unwrap();
    assert_eq!(std::fs::read(&out).unwrap(), b"old");
    assert!(names(dir.path()).contains(&".out.raw.dvcr-partial".to_owned()));
    target.finish().unwrap();

    assert!(std::fs::read(&out).unwrap() == disk);
    let allocated = std::fs::metadata(&out).unwrap().blocks() * 512;
    assert!(allocated < 6 << 20, "{allocated} bytes are allocated");
    assert_eq!(names(dir.path()), ["out.raw", "sample.qcow2", "sample.raw"]);
}

#[test]
fn a_larger_raw_file_is_zero_behind_the_disk() {
    let dir = temp_dir();
    let (image, mut disk) = sample(dir.path());
    let out = dir.path().join("out.raw");
    let opened = common::open(&image).unwrap();
    let target = RawTarget::create(&out, 40 << 20).unwrap();
    let written =
        convert::to_raw(opened.disk.as_ref(), &target, &Options::default(), &Progress::default()).unwrap();
    target.finish().unwrap();
    assert_eq!(written.data_bytes + written.zero_bytes, 40 << 20);
    disk.resize(40 << 20, 0);
    assert!(std::fs::read(&out).unwrap() == disk);
}

/// A disk whose reads fail from some offset on.
struct Failing(u64);

impl Disk for Failing {
    fn virtual_size(&self) -> u64 {
        64 << 20
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Ok(Extent { start: offset, len: self.virtual_size() - offset, kind: ExtentKind::Data, host: None })
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if offset >= self.0 {
            return Err(Error::new(ErrorKind::Corrupt, "the test disk ends here"));
        }
        buf.fill(1);
        Ok(())
    }
}

#[test]
fn a_failed_conversion_leaves_nothing_behind() {
    let dir = temp_dir();
    for workers in [1, 4] {
        let options = Options { workers, unit_bytes: 1 << 20 };
        let (raw, qcow2) = (dir.path().join("raw"), dir.path().join("qcow2"));
        let target = RawTarget::create(&raw, 64 << 20).unwrap();
        let error = convert::to_raw(&Failing(32 << 20), &target, &options, &Progress::default()).unwrap_err();
        assert_eq!(error.to_string(), "the test disk ends here");
        drop(target);

        let write = WriteOptions::default();
        let mut target = ImageTarget::create(&qcow2).unwrap();
        let result =
            convert::to_image(&Failing(32 << 20), &mut target, &write, &options, &Progress::default());
        assert_eq!(result.unwrap_err().to_string(), "the test disk ends here");
        drop(target);
        assert!(names(dir.path()).is_empty());
    }
}

/// A stream that fails once and goes on as if nothing had happened.
struct FailingOnce<'a> {
    read: u64,
    after_failure: &'a AtomicU64,
}

impl std::io::Read for FailingOnce<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        match self.read {
            0..4_000_000 => {}
            4_000_000..5_000_000 => {
                self.read = 5_000_000;
                return Err(std::io::Error::other("the stream broke"));
            }
            _ => _ = self.after_failure.fetch_add(1, Ordering::Relaxed),
        }
        let n = buf.len().min(100_000);
        buf[..n].fill(1);
        self.read += n as u64;
        Ok(n)
    }
}

#[test]
fn a_broken_stream_is_not_read_again() {
    let dir = temp_dir();
    let options = Options { workers: 8, unit_bytes: 64 << 10 };
    for _ in 0..20 {
        let after_failure = AtomicU64::new(0);
        let stream = || Box::new(FailingOnce { read: 0, after_failure: &after_failure });
        let target = RawTarget::create(&dir.path().join("raw"), 0).unwrap();
        let error = convert::stream_to_raw(stream(), &target, &options, &Progress::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io, "{error}");
        let write = WriteOptions::default();
        let mut sink = StreamTarget::new(std::io::sink(), write.cluster_size as usize);
        let progress = Progress::default();
        let error = convert::stream_to_image(stream(), None, &mut sink, &write, &options, &progress);
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(after_failure.into_inner(), 0);
    }
}

/// Says to the test below that it runs in a process that cannot make threads.
const WITHOUT_THREADS: &str = "DVCR_TEST_WITHOUT_THREADS";

#[test]
fn a_thread_that_cannot_be_started_ends_the_conversion() {
    if std::env::var_os(WITHOUT_THREADS).is_some() {
        let dir = temp_dir();
        let target = RawTarget::create(&dir.path().join("raw"), 64 << 20).unwrap();
        let options = Options { workers: 4, ..Options::default() };
        let disk = Failing(u64::MAX);
        let error = convert::to_raw(&disk, &target, &options, &Progress::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io, "{error}");
        let write = WriteOptions::default();
        let mut sink = StreamTarget::new(std::io::sink(), write.cluster_size as usize);
        let error = convert::to_image(&disk, &mut sink, &write, &options, &Progress::default());
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Io);
        return;
    }
    // No address space holds a stack of this size, so that every thread fails to start.
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_thread_that_cannot_be_started_ends_the_conversion", "--test-threads=1"])
        .env(WITHOUT_THREADS, "1")
        .env("RUST_MIN_STACK", (1u64 << 56).to_string())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the conversion waits for a thread that is not there");
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
}

#[test]
fn a_cancelled_conversion_says_so() {
    let dir = temp_dir();
    let progress = Progress::default();
    progress.cancel();
    let target = RawTarget::create(&dir.path().join("raw"), 64 << 20).unwrap();
    let error = convert::to_raw(&Failing(u64::MAX), &target, &Options::default(), &progress).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}

#[test]
fn progress_ends_at_its_total_and_never_goes_back() {
    let dir = temp_dir();
    let (image, _) = sample(dir.path());
    let opened = common::open(&image).unwrap();
    let progress = Progress::default();
    let target = RawTarget::create(&dir.path().join("raw"), 30 << 20).unwrap();
    convert::to_raw(opened.disk.as_ref(), &target, &Options::default(), &progress).unwrap();
    assert_eq!((progress.done(), progress.total()), (30 << 20, 30 << 20));
}

#[test]
fn two_writers_of_one_file_do_not_meet() {
    let dir = temp_dir();
    let out = dir.path().join("raw");
    let first = RawTarget::create(&out, 1 << 20).unwrap();
    let error = RawTarget::create(&out, 1 << 20).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Target, "{error}");
    first.finish().unwrap();
    assert_eq!(std::fs::metadata(&out).unwrap().len(), 1 << 20);
}

#[test]
fn a_file_left_by_a_killed_process_is_taken_over() {
    let dir = temp_dir();
    std::fs::write(dir.path().join(".raw.dvcr-partial"), noise(2 << 20, 9)).unwrap();
    RawTarget::create(&dir.path().join("raw"), 1 << 20).unwrap().finish().unwrap();
    assert!(std::fs::read(dir.path().join("raw")).unwrap() == vec![0; 1 << 20]);
}

#[test]
fn a_link_in_place_of_the_temporary_file_is_not_followed() {
    let dir = temp_dir();
    let victim = dir.path().join("victim");
    std::fs::write(&victim, b"untouched").unwrap();
    std::os::unix::fs::symlink(&victim, dir.path().join(".raw.dvcr-partial")).unwrap();
    let error = RawTarget::create(&dir.path().join("raw"), 1 << 20).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    assert_eq!(std::fs::read(&victim).unwrap(), b"untouched");
}

#[test]
fn a_replaced_file_keeps_its_mode() {
    let dir = temp_dir();
    let out = dir.path().join("raw");
    for mode in [0o600, 0o640, 0o444] {
        std::fs::write(&out, b"old").unwrap();
        std::fs::set_permissions(&out, std::fs::Permissions::from_mode(mode)).unwrap();
        let target = RawTarget::create(&out, 1 << 20).unwrap();
        let partial = std::fs::metadata(dir.path().join(".raw.dvcr-partial")).unwrap();
        assert_eq!(partial.mode() & 0o777, mode | 0o600, "no wider before it is complete");
        target.finish().unwrap();
        assert_eq!(std::fs::metadata(&out).unwrap().mode() & 0o777, mode);
        std::fs::remove_file(&out).unwrap();
    }
}

#[test]
fn storage_with_old_bytes_is_overwritten_and_begins_with_zeros_until_the_end() {
    let dir = temp_dir();
    let (image, mut disk) = sample(dir.path());
    let device = dir.path().join("device");
    let old = noise(32 << 20, 11);
    std::fs::write(&device, &old).unwrap();

    let opened = common::open(&image).unwrap();
    let target = RawTarget::in_place(&device, 28 << 20).unwrap();
    assert!(std::fs::read(&device).unwrap()[..1 << 20].iter().all(|&b| b == 0));
    convert::to_raw(opened.disk.as_ref(), &target, &Options::default(), &Progress::default()).unwrap();
    let incomplete = std::fs::read(&device).unwrap();
    assert!(incomplete[..1 << 20].iter().all(|&b| b == 0));
    assert!(incomplete[1 << 20..disk.len()] == disk[1 << 20..]);
    target.finish().unwrap();

    // The disk, zeros up to the size asked for, and behind that what was there.
    disk.resize(28 << 20, 0);
    disk.extend(&old[28 << 20..]);
    assert!(std::fs::read(&device).unwrap() == disk);
}

#[test]
fn storage_that_is_too_small_is_refused_with_both_sizes() {
    let dir = temp_dir();
    let device = dir.path().join("device");
    std::fs::write(&device, vec![7; 1 << 20]).unwrap();
    let error = RawTarget::in_place(&device, 2 << 20).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Target);
    assert!(error.to_string().contains("1048576") && error.to_string().contains("2097152"), "{error}");
    assert!(std::fs::read(&device).unwrap() == vec![7; 1 << 20], "a refused device is not touched");
}

#[test]
fn targets_that_are_no_disks_are_refused() {
    let dir = temp_dir();
    for target in [dir.path(), Path::new("/dev/null"), Path::new("/")] {
        assert_eq!(RawTarget::create(target, 512).unwrap_err().kind(), ErrorKind::Target, "{target:?}");
    }
}

/// A loop device, where this machine allows one; the code path is the one of the tests above.
struct LoopDevice(String);

impl LoopDevice {
    fn attach(file: &Path) -> Option<Self> {
        let output =
            std::process::Command::new("losetup").args(["--find", "--show", path(file)]).output().ok()?;
        output.status.success().then(|| Self(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
    }
}

/// A file system of its own, where this machine allows one.
struct Mounted(std::path::PathBuf);

impl Mounted {
    /// `mkfs` is the program that makes it.
    fn make(dir: &Path, mkfs: &str) -> Option<Self> {
        let (storage, at) = (dir.join("storage"), dir.join("mounted"));
        std::fs::File::create(&storage).unwrap().set_len(512 << 20).unwrap();
        std::fs::create_dir(&at).unwrap();
        common::run(mkfs, &["-q", path(&storage)]);
        let mut mount = std::process::Command::new("mount");
        let status = mount.args(["-o", "loop", path(&storage), path(&at)]).status().ok()?;
        status.success().then_some(Self(at))
    }

    fn free_bytes(&self) -> u64 {
        rustix::fs::sync();
        let space = rustix::fs::statvfs(&self.0).unwrap();
        space.f_bfree * space.f_frsize
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        common::run("umount", &[path(&self.0)]);
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        common::run("losetup", &["--detach", &self.0]);
    }
}

#[test]
fn a_block_device_holds_the_disk() {
    let dir = temp_dir();
    let (image, disk) = sample(dir.path());
    let backing = dir.path().join("backing");
    std::fs::write(&backing, noise(24 << 20, 13)).unwrap();
    let Some(device) = LoopDevice::attach(&backing) else {
        eprintln!("no loop devices here: the in-place tests on files stand for this one");
        return;
    };
    common::to_raw(&image, Path::new(&device.0), &Options::default()).unwrap();

    let convert = |output: Output, preallocation| {
        let to = Destination::Path(Path::new(&device.0), preallocation);
        let (limits, progress) = (Limits::default(), Progress::default());
        file::convert(&image, to, output, &Options::default(), &limits, &progress)
    };
    let qcow2 = || Output::Image(Box::new(WriteOptions::default()));
    let refused = [(qcow2(), Preallocation::Off), (Output::Raw, Preallocation::Full)];
    for (output, preallocation) in refused {
        assert_eq!(convert(output, preallocation).unwrap_err().kind(), ErrorKind::Target);
    }
    drop(device);
    assert!(std::fs::read(&backing).unwrap() == disk);
    // Zeros were unmapped and not written: the file behind the device has holes there.
    assert!(allocated_bytes(&backing) < 8 << 20, "{} bytes are allocated", allocated_bytes(&backing));
}

#[test]
fn a_partition_lies_on_its_disk_and_a_disk_on_its_file() {
    let dir = temp_dir();
    let backing = dir.path().join("backing");
    std::fs::File::create(&backing).unwrap().set_len(16 << 20).unwrap();
    let script = dir.path().join("script");
    std::fs::write(&script, "start=2048, size=4096\nstart=8192, size=4096\n").unwrap();
    common::run("sh", &["-c", &format!("sfdisk -q {} < {}", path(&backing), path(&script))]);
    let Some(device) = LoopDevice::attach(&backing) else {
        eprintln!("no loop devices here: the check on files stands for this one");
        return;
    };
    common::run("partx", &["--add", &device.0]);
    let whole = Path::new(&device.0);
    let nodes = [1, 2].map(|n| {
        let name = format!("{}p{n}", whole.file_name().unwrap().to_str().unwrap());
        let number = std::fs::read_to_string(format!("/sys/class/block/{name}/dev")).unwrap();
        let (major, minor) = number.trim().split_once(':').unwrap();
        let node = dir.path().join(&name);
        common::run("mknod", &[path(&node), "b", major, minor]);
        node
    });
    for (source, target) in [
        (whole, nodes[0].as_path()),
        (&nodes[1], whole),
        (&nodes[0], &nodes[0]),
        (&backing, whole),
        (&backing, &nodes[1]),
    ] {
        let error = local::refuse_same_storage(source, target).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Target, "{source:?} {target:?}");
    }
    local::refuse_same_storage(&nodes[0], &nodes[1]).unwrap();
    local::refuse_same_storage(&script, whole).unwrap();
    common::run("partx", &["--delete", &device.0]);
}

#[test]
fn a_raw_file_shares_its_blocks_with_the_copy_where_the_file_system_can() {
    let dir = temp_dir();
    let Some(mounted) = Mounted::make(dir.path(), "mkfs.xfs") else {
        eprintln!("nothing can be mounted here: a copy on any file system stands for this one");
        return;
    };
    let (raw, out) = (mounted.0.join("raw"), mounted.0.join("out"));
    let mut disk = noise((40 << 20) + 100, 17);
    std::fs::write(&raw, &disk).unwrap();
    disk.resize(disk.len().next_multiple_of(512), 0);
    let before = mounted.free_bytes();
    let (limits, progress) = (Limits::default(), Progress::default());
    let convert = |preallocation| {
        let to = Destination::Path(&out, preallocation);
        file::convert(&raw, to, Output::Raw, &Options::default(), &limits, &progress).unwrap();
        assert!(std::fs::read(&out).unwrap() == disk);
        before.saturating_sub(mounted.free_bytes())
    };
    assert!(convert(Preallocation::Off) < 4 << 20);
    assert_eq!((progress.done(), progress.total()), (disk.len() as u64, disk.len() as u64));
    assert!(convert(Preallocation::Falloc) >= 40 << 20, "its own room was asked for");
}

fn allocated_bytes(file: &Path) -> u64 {
    std::fs::metadata(file).unwrap().blocks() * 512
}

#[test]
fn a_file_gets_its_room_when_it_is_asked_for() {
    let dir = temp_dir();
    let (image, disk) = sample(dir.path());
    let (raw, out) = (dir.path().join("sample.raw"), dir.path().join("out"));
    let packed = dir.path().join("raw.gz");
    std::fs::write(&packed, common::pipe(&["gzip", "-1"], &disk)).unwrap();
    let size = disk.len() as u64;
    let convert = |input: &Path, output: Output, preallocation| {
        let to = Destination::Path(&out, preallocation);
        let (limits, progress) = (Limits::default(), Progress::default());
        file::convert(input, to, output, &Options::default(), &limits, &progress).unwrap()
    };
    for preallocation in [Preallocation::Falloc, Preallocation::Full] {
        for input in [&image, &raw, &packed] {
            convert(input, Output::Raw, preallocation);
            assert!(std::fs::read(&out).unwrap() == disk);
            assert!(allocated_bytes(&out) >= size, "{preallocation:?} {input:?}: {}", allocated_bytes(&out));
        }
        let write = WriteOptions {
            compression: dvcr_converter::qcow2::Compression::None,
            preallocation: dvcr_converter::qcow2::Preallocation::Metadata,
            ..WriteOptions::default()
        };
        let made = convert(&image, Output::Image(Box::new(write)), preallocation);
        common::assert_sound_and_equal(&out, &raw, "raw");
        assert!(made.stored_bytes > size);
        assert!(allocated_bytes(&out) >= made.stored_bytes, "{preallocation:?}: {}", allocated_bytes(&out));
    }
}

#[test]
fn a_stream_gets_the_whole_disk_in_order() {
    let dir = temp_dir();
    let (image, disk) = sample(dir.path());
    // Its last sector is cut, and filled up with zeros.
    let (raw, packed) = (dir.path().join("cut.raw"), dir.path().join("cut.raw.gz"));
    std::fs::write(&raw, &disk[..disk.len() - 100]).unwrap();
    std::fs::write(&packed, common::pipe(&["gzip", "-1"], &disk[..disk.len() - 100])).unwrap();
    let mut cut = disk.clone();
    cut[disk.len() - 100..].fill(0);
    for (input, expected) in [(&image, &disk), (&raw, &cut), (&packed, &cut)] {
        for workers in [1, 4] {
            let mut out = Vec::new();
            let (limits, progress) = (Limits::default(), Progress::default());
            let options = Options { workers, ..Options::default() };
            let to = Destination::Stream(Box::new(&mut out));
            let made = file::convert(input, to, Output::Raw, &options, &limits, &progress).unwrap();
            assert!(&out == expected, "{input:?}");
            assert_eq!((made.virtual_size, made.stored_bytes), (out.len() as u64, out.len() as u64));
        }
    }
}

#[test]
fn a_stream_refuses_what_is_not_written_in_order_before_anything_is_read() {
    let missing = Path::new("/nonexistent/image");
    let to = Destination::Stream(Box::new(std::io::sink()));
    let output = Output::Image(Box::new(WriteOptions::default()));
    let (limits, progress) = (Limits::default(), Progress::default());
    let error = file::convert(missing, to, output, &Options::default(), &limits, &progress).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Target, "{error}");
}

#[test]
fn storage_is_not_written_over_while_it_is_read() {
    let dir = temp_dir();
    let (image, link, other) = (dir.path().join("image"), dir.path().join("link"), dir.path().join("other"));
    std::fs::write(&image, noise(1 << 20, 1)).unwrap();
    std::fs::write(&other, noise(1 << 20, 2)).unwrap();
    std::fs::hard_link(&image, &link).unwrap();
    for same in [&image, &link] {
        let error = local::refuse_same_storage(&image, same).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Target, "{error}");
    }
    local::refuse_same_storage(&image, &other).unwrap();
    local::refuse_same_storage(&image, &dir.path().join("new")).unwrap();

    let Some(device) = LoopDevice::attach(&image) else {
        eprintln!("no loop devices here: the check on files stands for this one");
        return;
    };
    // Another node of the same device.
    let node = dir.path().join("node");
    let rdev = std::fs::metadata(&device.0).unwrap().rdev();
    let (major, minor) = (rustix::fs::major(rdev).to_string(), rustix::fs::minor(rdev).to_string());
    common::run("mknod", &[path(&node), "b", &major, &minor]);
    let convert = |to: &Path| {
        let (limits, progress) = (Limits::default(), Progress::default());
        file::convert(Path::new(&device.0), to, Output::Raw, &Options::default(), &limits, &progress)
    };
    for to in [Path::new(&device.0), &node] {
        assert_eq!(convert(to).unwrap_err().kind(), ErrorKind::Target);
    }
    drop(device);
    assert!(std::fs::read(&image).unwrap() == noise(1 << 20, 1));
}

#[test]
fn a_file_can_be_converted_onto_itself() {
    let dir = temp_dir();
    let (image, disk) = sample(dir.path());
    let (limits, progress) = (Limits::default(), Progress::default());
    file::convert(&image, &image, Output::Raw, &Options::default(), &limits, &progress).unwrap();
    assert!(std::fs::read(&image).unwrap() == disk);
}

#[test]
fn a_raw_file_with_holes_is_copied_with_holes() {
    let dir = temp_dir();
    let raw = dir.path().join("in.raw");
    let file = std::fs::File::create(&raw).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &noise(1 << 20, 5), 700 << 20).unwrap();
    file.set_len((1 << 30) + 100).unwrap();
    let out = dir.path().join("out.raw");
    common::to_raw(&raw, &out, &Options::default()).unwrap();
    assert_eq!(std::fs::metadata(&out).unwrap().len(), (1 << 30) + 512);
    assert!(std::fs::metadata(&out).unwrap().blocks() * 512 <= 3 << 20);
    file.set_len((1 << 30) + 512).unwrap();
    assert_same_bytes(&raw, &out);
    let extent = common::open(&raw).unwrap().disk.extent_at(0).unwrap();
    assert_eq!(extent, Extent { start: 0, len: 700 << 20, kind: ExtentKind::Hole, host: None });
}
