//! The upload endpoint and its clients: ours, curl, tuspy, and requests made by hand.

mod refused;
mod relay;
mod resume;
mod support;
mod tus;

use anyhow::{Result, ensure};
use dvcr_tests::{cmd, dvcr, fixture::Noise, run, run_output, utf8};
use std::io::Write;
use support::{Answer, Bench, ByHand, curl, upload};

#[test]
fn a_plain_put_by_curl_is_stored_and_the_process_ends_with_0() -> Result<()> {
    let bench = Bench::new(3 << 20)?;
    let report = bench.dir.path().join("report");
    std::fs::write(&report, "")?;
    let mut uploader = bench.uploader(&["--termination-message", utf8(&report)])?;
    assert_eq!(curl(&[&format!("http://{}/healthz", uploader.health)])?.body, "OK");
    let probe = curl(&[&uploader.url()])?;
    assert_eq!((probe.status, probe.json()["state"].as_str()), (200, Some("waiting")));
    let stored = curl(&["-T", utf8(&bench.image), &uploader.url()])?;
    assert_eq!(stored.status, 200, "{stored:?}");
    assert!(stored.json()["digest"].as_str().unwrap_or_default().starts_with("sha256:"), "{stored:?}");
    assert_eq!(uploader.ended()?, Some(0));
    // The time of the upload, not that of the process, which waits before it and lingers behind it.
    let (told, report) = (stored.json(), std::fs::read_to_string(&report)?);
    let report: serde_json::Value = serde_json::from_str(&report)?;
    assert_eq!(report["average-speed"], told["bytes_per_second"], "{report} {told}");
    let seconds = report["duration"].as_f64().unwrap_or_default() / 1e9;
    assert!((seconds - told["seconds"].as_f64().unwrap_or_default()).abs() < 1e-6, "{report} {told}");
    bench.assert_stored()
}

#[test]
fn a_post_whose_length_is_not_told_is_stored() -> Result<()> {
    let bench = Bench::new(1 << 20)?;
    let mut uploader = bench.uploader(&[])?;
    let body = format!("@{}", utf8(&bench.image));
    let chunked = ["--data-binary", &body, "-H", "Transfer-Encoding: chunked", "-H", "Content-Type:"];
    let stored = curl(&[&chunked[..], &[&format!("{}?filename=machine.qcow2", uploader.url())]].concat())?;
    assert_eq!(
        (stored.status, stored.json()["file_name"].as_str()),
        (200, Some("machine.qcow2")),
        "{stored:?}"
    );
    assert_eq!(uploader.ended()?, Some(0));
    bench.assert_stored()
}

#[test]
fn what_is_no_upload_changes_nothing() -> Result<()> {
    let bench = Bench::new(1 << 20)?;
    let mut uploader = bench.uploader(&[])?;
    let url = uploader.url();
    for method in ["DELETE", "PATCH"] {
        assert_eq!(curl(&["-X", method, &url])?.status, 404, "{method}");
    }
    assert_eq!(curl(&["-I", &url])?.status, 404);
    assert_eq!(curl(&[&format!("{url}/more")])?.status, 404);
    let empty = curl(&["-X", "PUT", "-H", "Content-Length: 0", &url])?;
    assert!(empty.status == 400 && empty.body.contains("empty"), "{empty:?}");
    let coded = curl(&["-T", utf8(&bench.image), "-H", "Content-Encoding: br", &url])?;
    assert_eq!(coded.status, 415);
    assert_eq!(uploader.status()?["state"], "waiting");
    assert_eq!(curl(&["-T", utf8(&bench.image), &url])?.status, 200);
    assert_eq!(uploader.ended()?, Some(0));
    Ok(())
}

#[test]
fn a_second_upload_is_told_of_the_first() -> Result<()> {
    let bench = Bench::new(2 << 20)?;
    let mut uploader = bench.uploader(&[])?;
    let bytes = bench.bytes();
    let (front, back) = bytes.split_at(bytes.len() / 2);
    let length = format!("Content-Length: {}", bytes.len());
    let mut first = ByHand::begin(uploader.address, &["PUT /upload HTTP/1.1", &length])?;
    first.send(front)?;
    uploader.wait_status("half of the image", |status| status["received"] == front.len())?;
    let second = curl(&["-T", utf8(&bench.image), &uploader.url()])?;
    let told = second.json();
    assert_eq!((second.status, &told["state"]), (503, &"uploading".into()), "{second:?}");
    assert_eq!(
        (told["received"].as_u64(), told["total"].as_u64()),
        (Some(front.len() as u64), Some(bench.size))
    );
    assert!(told["since"].as_str().is_some_and(|since| since.ends_with('Z')), "{told}");
    let by_tus = run_output(&upload(&bench.image, &uploader.url())?)?;
    assert_eq!(by_tus.status.code(), Some(1));
    assert!(by_tus.stderr.contains("409") && by_tus.stderr.contains("another upload"), "{}", by_tus.stderr);
    first.send(back)?;
    assert_eq!(first.answer()?.status, 200);
    assert_eq!(uploader.ended()?, Some(0));
    bench.assert_stored()
}

#[test]
fn a_wrong_checksum_is_told_and_ends_with_0() -> Result<()> {
    let bench = Bench::new(1 << 20)?;
    let wrong = format!("sha256:{}", "0".repeat(64));
    let mut uploader = bench.uploader(&["--checksums", &wrong])?;
    let refused = curl(&["-T", utf8(&bench.image), &uploader.url()])?;
    assert!(refused.status == 422 && refused.body.contains("checksum"), "{refused:?}");
    assert_eq!(uploader.ended()?, Some(0));
    assert!(uploader.daemon.log().contains(&wrong), "{}", uploader.daemon.log());
    bench.assert_nothing_stored()?;

    let right = format!("sha256:{}", dvcr_tests::sha256_file(&bench.image)?);
    let mut uploader = bench.uploader(&["--checksums", &right])?;
    run(&upload(&bench.image, &uploader.url())?)?;
    assert_eq!(uploader.ended()?, Some(0));
    bench.assert_stored()
}

#[test]
fn what_is_no_image_is_refused_with_the_reason_and_ends_with_1() -> Result<()> {
    let bench = Bench::new(1 << 20)?;
    let page = bench.dir.path().join("page");
    std::fs::write(&page, "<!DOCTYPE html><html>".repeat(200_000))?;
    let overlay = bench.dir.path().join("overlay.qcow2");
    run(&cmd(
        "qemu-img",
        ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", utf8(&bench.image), utf8(&overlay)],
    ))?;
    for (file, reason) in [(&page, "upload the image itself"), (&overlay, "backing")] {
        let mut uploader = bench.uploader(&[])?;
        let refused: Answer = curl(&["-T", utf8(file), &uploader.url()])?;
        assert!(refused.status == 422 && refused.body.contains(reason), "{refused:?}");
        assert_eq!(uploader.ended()?, Some(1));
        let mut uploader = bench.uploader(&[])?;
        let refused = run_output(&upload(file, &uploader.url())?)?;
        assert_eq!(refused.status.code(), Some(1));
        assert!(refused.stderr.contains(reason), "{}", refused.stderr);
        assert_eq!(uploader.ended()?, Some(1));
    }
    bench.assert_nothing_stored()
}

#[test]
fn a_registry_that_is_gone_is_no_fault_of_the_client_and_is_not_shown_to_it() -> Result<()> {
    let mut bench = Bench::new(1 << 20)?;
    let mut uploader = bench.uploader(&[])?;
    bench.registry.terminate()?;
    let failed = curl(&["-T", utf8(&bench.image), &uploader.url()])?;
    assert_eq!(failed.status, 500, "{failed:?}");
    assert!(!failed.body.contains("127.0.0.1"), "{failed:?}");
    assert_eq!(uploader.ended()?, Some(1));
    Ok(())
}

#[test]
fn a_clone_of_a_block_device_comes_in_snappys_frames() -> Result<()> {
    let bench = Bench::new(2 << 20)?;
    let mut uploader = bench.uploader(&[])?;
    let coded = bench.dir.path().join("disk.snappy");
    let mut encoder = snap::write::FrameEncoder::new(std::fs::File::create(&coded)?);
    encoder.write_all(&bench.bytes())?;
    encoder.into_inner()?;
    let stored = curl(&["-T", utf8(&coded), "-H", "x-cdi-content-type: blockdevice-clone", &uploader.url()])?;
    assert_eq!(stored.status, 200, "{stored:?}");
    assert_eq!(uploader.ended()?, Some(0));
    bench.assert_stored()
}

#[test]
fn an_upload_that_does_not_begin_in_time_ends_the_process() -> Result<()> {
    let bench = Bench::new(1 << 20)?;
    let mut uploader = bench.uploader(&["--start-timeout", "1s"])?;
    assert_eq!(uploader.ended()?, Some(1));
    assert!(uploader.daemon.log().contains("no upload began"), "{}", uploader.daemon.log());
    Ok(())
}

#[test]
fn an_upload_whose_client_stays_away_makes_room() -> Result<()> {
    let bench = Bench::new(1 << 20)?;
    let mut uploader = bench.uploader(&["--idle-timeout", "1s"])?;
    let head =
        ["POST /upload HTTP/1.1", "Tus-Resumable: 1.0.0", "Upload-Length: 1000000", "Content-Length: 0"];
    assert_eq!(ByHand::begin(uploader.address, &head)?.answer()?.status, 201);
    uploader.wait_status("the end of the upload", |status| status["state"] == "waiting")?;
    run(&upload(&bench.image, &uploader.url())?)?;
    assert_eq!(uploader.ended()?, Some(0));
    bench.assert_stored()
}

#[test]
fn only_clients_with_the_right_certificate_upload() -> Result<()> {
    let bench = Bench::new(1 << 20)?;
    let dir = bench.dir.path();
    let openssl =
        |args: &str| run(cmd("openssl", args.split(' ').collect::<Vec<_>>()).current_dir(dir)).map(drop);
    for (ca, name) in [("ca", "server"), ("ca", "uploads"), ("ca", "other"), ("foreign", "stranger")] {
        if !dir.join(format!("{ca}.pem")).exists() {
            openssl(&format!(
                "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={ca} -keyout {ca}.key -out {ca}.pem"
            ))?;
        }
        std::fs::write(dir.join("ext"), "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")?;
        openssl(&format!("req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"))?;
        openssl(&format!(
            "x509 -req -in {name}.csr -CA {ca}.pem -CAkey {ca}.key -CAcreateserial -days 2 -extfile ext -out {name}.pem"
        ))?;
    }
    let path = |name: &str| utf8(&dir.join(name)).to_owned();
    let (cert, key, ca) = (path("server.pem"), path("server.key"), path("ca.pem"));
    let args = ["--server-cert", &cert, "--server-key", &key, "--client-ca", &ca, "--client-name", "uploads"];
    let terms = ["--tls-min-version", "VersionTLS13", "--tls-ciphers", "TLS_AES_128_GCM_SHA256"];
    let mut uploader = bench.uploader(&[&args[..], &terms[..]].concat())?;
    let url = uploader.url().replace("http:", "https:");
    assert_eq!(curl(&[&format!("http://{}/healthz", uploader.health)])?.body, "OK");
    let attempt = |name: Option<&str>, trust: bool| {
        let mut command = upload(&bench.image, &url)?;
        if trust {
            command.args(["--cacert", &ca]);
        }
        if let Some(name) = name {
            command.args(["--cert", &path(&format!("{name}.pem")), "--key", &path(&format!("{name}.key"))]);
        }
        run_output(&command)
    };
    let other = attempt(Some("other"), true)?;
    assert!(
        other.status.code() == Some(1)
            && other.stderr.contains("401")
            && other.stderr.contains("not that of the client"),
        "{}",
        other.stderr
    );
    let nameless = attempt(None, true)?;
    let told = &nameless.stderr;
    assert!(
        nameless.status.code() == Some(1) && told.contains("--cert") && !told.contains("again"),
        "{told}"
    );
    let import = ["import", &url, &bench.reference(), "--source-ca", &ca];
    let told = run_output(&cmd(dvcr()?, import))?.stderr;
    assert!(told.contains("--source-cert") && !told.contains("again"), "{told}");
    let untrusted = attempt(Some("uploads"), false)?;
    assert!(
        untrusted.status.code() == Some(1) && untrusted.stderr.contains("--cacert"),
        "{}",
        untrusted.stderr
    );
    for refused in [
        &["--cacert", &ca][..],
        &["--cacert", &ca, "--cert", &path("stranger.pem"), "--key", &path("stranger.key")],
    ] {
        assert!(curl(&[refused, &[&url]].concat()).is_err(), "{refused:?}");
    }
    assert!(
        curl(&[
            "--cacert",
            &ca,
            "--tls-max",
            "1.2",
            "--cert",
            &path("uploads.pem"),
            "--key",
            &path("uploads.key"),
            &url
        ])
        .is_err()
    );
    let done = attempt(Some("uploads"), true)?;
    ensure!(done.status.success(), "{}", done.stderr);
    assert_eq!(uploader.ended()?, Some(0));
    bench.assert_stored()
}

#[test]
fn a_sparse_disk_costs_its_data_on_the_wire() -> Result<()> {
    let bench = Bench::new(1 << 20)?;
    let disk = bench.dir.path().join("sparse.img");
    let file = std::fs::File::create(&disk)?;
    file.set_len(3 << 30)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &Noise::new(7).bytes(2 << 20), (1 << 30) + 4096)?;
    let mut uploader = bench.uploader(&[])?;
    let relay = relay::Relay::start(uploader.address);
    let told = run(&upload(&disk, &relay.url())?)?;
    assert!(told.contains("\"sha256:"), "{told}");
    assert!(relay.sent() < 5 << 20, "{} bytes for 2 MiB of data", relay.sent());
    assert_eq!(uploader.ended()?, Some(0));
    bench.assert_stored_as(&disk, "raw")
}
