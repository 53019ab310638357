//! A confined process does its work and nothing else. Each case runs in a process of its own, which is confined for good.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use dvcr_worker::sandbox::Sandbox;

/// Names the directory of the case that a child process is to run.
const CHILD: &str = "DVCR_TEST_SANDBOX";

/// Runs the test `name` of this file again, in a process that is told so.
fn in_a_child(name: &str, case: impl FnOnce(&Path)) {
    if let Some(dir) = std::env::var_os(CHILD) {
        return case(&PathBuf::from(dir));
    }
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("mine")).unwrap();
    fs::write(dir.path().join("target"), "old").unwrap();
    fs::write(dir.path().join("other"), "old").unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", name, "--nocapture"]).env(CHILD, dir.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    assert_eq!(fs::read_to_string(dir.path().join("other")).unwrap(), "old");
}

#[test]
fn a_confined_process_writes_where_it_may_and_nowhere_else() {
    in_a_child("a_confined_process_writes_where_it_may_and_nowhere_else", |dir| {
        let writable = vec![dir.join("mine"), dir.join("target"), dir.join("not there")];
        let entered = Sandbox { writable, ..Sandbox::default() }.enter().unwrap();
        if !entered.landlock {
            return;
        }
        fs::write(dir.join("mine/new"), "new").unwrap();
        fs::rename(dir.join("mine/new"), dir.join("mine/renamed")).unwrap();
        fs::remove_file(dir.join("mine/renamed")).unwrap();
        fs::write(dir.join("target"), "new").unwrap();
        assert_eq!(fs::read_to_string(dir.join("other")).unwrap(), "old");
        for refused in [
            fs::write(dir.join("other"), "new"),
            fs::write(dir.join("new"), "new"),
            fs::remove_file(dir.join("other")),
            fs::create_dir(dir.join("new")),
        ] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::PermissionDenied);
        }
    });
}

#[test]
fn a_confined_process_starts_no_programs_and_makes_no_namespaces() {
    in_a_child("a_confined_process_starts_no_programs_and_makes_no_namespaces", |_| {
        let entered = Sandbox::default().enter().unwrap();
        if entered.landlock || entered.seccomp {
            let refused = Command::new("/bin/true").status().unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
        }
        if entered.seccomp {
            assert!(fs::read_to_string("/proc/self/status").unwrap().contains("Seccomp:\t2"));
        }
        assert!(fs::read_to_string("/proc/self/status").unwrap().contains("NoNewPrivs:\t1"));
        // What it needs still works: threads, sockets, names.
        std::thread::spawn(|| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).join().unwrap();
    });
}

#[test]
fn limits_are_lowered_and_never_raised() {
    in_a_child("limits_are_lowered_and_never_raised", |_| {
        let sandbox = |address_space, cpu| Sandbox {
            address_space_bytes_max: Some(address_space),
            cpu_seconds_max: Some(cpu),
            ..Sandbox::default()
        };
        sandbox(8 << 30, 1000).enter().unwrap();
        sandbox(16 << 30, 2000).enter().unwrap();
        let limits = fs::read_to_string("/proc/self/limits").unwrap();
        let of = |name: &str| limits.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        assert!(of("Max address space").contains(&(8u64 << 30).to_string()), "{limits}");
        assert!(of("Max cpu time").contains(" 1000 "), "{limits}");
        assert!(of("Max core file size").contains(" 0 "), "{limits}");
    });
}
