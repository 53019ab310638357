//! TLS: a certificate that nobody vouches for is refused at once, with the way out, and taken when the user says so.

use anyhow::{Context, Result};
use dvcr_tests::{Daemon, Registry, cmd, dvcr, fixture, qemu, run, run_dvcr, run_output, temp_dir, utf8};
use std::path::Path;
use std::time::Duration;

const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Serves the files of `dir` over HTTPS with a certificate of its own making; returns the address.
fn serve_tls(dir: &Path) -> Result<(Daemon, String)> {
    let (key, cert) = (dir.join("key.pem"), dir.join("cert.pem"));
    let mut request = cmd("openssl", ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]);
    run(request.args(["-subj", "/CN=localhost", "-keyout"]).arg(&key).arg("-out").arg(&cert))?;
    let mut command = cmd("openssl", ["s_server", "-WWW", "-accept", "127.0.0.1:0", "-key", "key.pem"]);
    command.args(["-cert", "cert.pem"]).current_dir(dir);
    let mut daemon = Daemon::spawn(&command)?;
    let port = daemon
        .wait_for_line(START_TIMEOUT, |line| line.strip_prefix("ACCEPT 127.0.0.1:")?.parse::<u16>().ok())
        .context("openssl s_server does not say where it listens")?;
    Ok((daemon, format!("https://127.0.0.1:{port}")))
}

#[test]
fn a_source_with_an_unknown_certificate_is_refused_at_once_unless_allowed() -> Result<()> {
    let dir = temp_dir();
    let source = dir.path().join("disk.qcow2");
    fixture::noise_qcow2(&source, 32 << 20, 3 << 20)?;
    let (_server, url) = serve_tls(dir.path())?;
    let registry = Registry::start(&dir.path().join("registry"))?;
    let (url, reference) = (format!("{url}/disk.qcow2"), registry.reference("vi/tls:1"));

    let refused = run_output(&cmd(dvcr()?, ["import", &url, &reference]))?;
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("certificate") && refused.stderr.contains("--insecure-source"));
    assert!(!refused.stderr.contains("trying again"), "{}", refused.stderr);

    run_dvcr(&["import", &url, &reference, "--insecure-source"])?;
    let disk = dir.path().join("disk.raw");
    run_dvcr(&["populate", &reference, utf8(&disk)])?;
    qemu::assert_same_disk(&source, "qcow2", &disk, "raw")
}
