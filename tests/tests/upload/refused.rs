//! What is refused, and that the client reads why: no room, slow senders, servers that do not speak tus.

use anyhow::{Context, Result, ensure};
use dvcr_tests::{FileServer, Registry, cmd, dvcr, run_output, temp_dir, utf8};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::Duration;

use crate::support::{Bench, ByHand, curl, upload};

const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes of content that a registry has received since it began.
fn received(registry: &Registry) -> Result<u64> {
    let metrics = curl(&[&format!("{}/metrics", registry.url())])?.body;
    let value = metrics.lines().find_map(|line| line.strip_prefix("dvcr_registry_received_bytes_total "));
    Ok(value.context("no such metric")?.trim().parse()?)
}

#[test]
fn an_image_that_the_registry_has_no_room_for_is_refused_before_it_is_sent() -> Result<()> {
    let mut bench = Bench::new(6 << 20)?;
    let image = utf8(&bench.image).to_owned();
    // The layer around the file.
    let more = bench.size.next_multiple_of(512) + (64 << 10) + 1024;
    for (flag, value, parts) in [
        ("--quota", "vi/=1M", [format!("{more} more"), "may have 1048576 bytes".to_owned()]),
        (
            "--reserve-space",
            "4000T",
            [format!("{more} bytes more"), "4398046511104000 are reserved".to_owned()],
        ),
    ] {
        bench.registry = Registry::start_with(&bench.dir.path().join(&flag[2..]), &[flag, value])?;
        let told = |text: &str| {
            let has = parts.iter().all(|part| text.contains(part)) && text.contains("missing");
            ensure!(has && !text.contains("because: 127.0.0.1"), "{text}");
            Ok(())
        };
        // Each lingers for its client a while: all of them at the same time.
        let mut ending = Vec::new();
        // It waits to be asked for the body, and is not.
        let uploader = bench.uploader(&[])?;
        let head = format!("PUT /upload?filename=disk.qcow2 HTTP/1.1\r\nContent-Length: {}", bench.size);
        let mut asked = ByHand::begin(uploader.address, &[&head, "Expect: 100-continue"])?;
        let mut answer = Vec::new();
        asked.read_to_end(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
        told(&answer)?;
        assert!(!answer.contains("127.0.0.1"), "{answer}");
        ending.push(uploader);

        // Without a name its first bytes tell what it is.
        let uploader = bench.uploader(&[])?;
        let refused = curl(&["-T", &image, &uploader.url()])?;
        assert_eq!(refused.status, 413, "{refused:?}");
        told(&refused.body)?;
        ending.push(uploader);

        // `disk.qcow2`, as tus writes it.
        let uploader = bench.uploader(&[])?;
        let (length, name) =
            (format!("Upload-Length: {}", bench.size), "Upload-Metadata: filename ZGlzay5xY293Mg==");
        let tus = ["-X", "POST", "-H", "Tus-Resumable: 1.0.0", "-H", &length, "-H", name, &uploader.url()];
        let refused = curl(&tus)?;
        assert_eq!(refused.status, 413, "{refused:?}");
        told(&refused.body)?;
        ending.push(uploader);

        let uploader = bench.uploader(&[])?;
        let refused = run_output(&upload(&bench.image, &uploader.url())?)?;
        assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
        told(&refused.stderr)?;
        ending.push(uploader);

        let server = FileServer::start(bench.dir.path())?;
        let stock = bench_copy(&bench)?;
        for source in
            [image.clone(), server.url("disk.qcow2"), format!("docker://{}", stock.reference("vi/up:1"))]
        {
            let refused = run_output(&cmd(dvcr()?, ["import", &source, &bench.reference()]))?;
            assert_eq!(refused.status.code(), Some(1), "{source}");
            told(&refused.stderr).with_context(|| source.clone())?;
        }
        for mut uploader in ending {
            assert_eq!(uploader.ended()?, Some(1));
        }
        assert_eq!(received(&bench.registry)?, 0);
    }
    Ok(())
}

/// A registry that has the image.
fn bench_copy(bench: &Bench) -> Result<Registry> {
    let stock = Registry::start(&bench.dir.path().join("stock"))?;
    dvcr_tests::run_dvcr(&["import", utf8(&bench.image), &stock.reference("vi/up:1")])?;
    Ok(stock)
}

#[test]
fn who_sends_next_to_nothing_is_cut_off_and_the_place_is_free() -> Result<()> {
    let bench = Bench::new(1 << 20)?;
    let mut uploader = bench.uploader(&["--idle-timeout", "1s"])?;
    // Byte after byte of a head that never ends.
    let mut head = TcpStream::connect(uploader.address)?;
    head.set_read_timeout(Some(READ_TIMEOUT))?;
    let mut dripping = head.try_clone()?;
    let drip = std::thread::spawn(move || {
        let _ = dripping.write_all(b"PUT /upload HTTP/1.1\r\nX: ");
        while dripping.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let mut rest = Vec::new();
    // The end, or the reset that bytes on their way to a closed connection make.
    let _ = head.read_to_end(&mut rest);
    drop(head);
    drip.join().ok().context("the sender of the head")?;
    assert_eq!(uploader.status()?["state"], "waiting");

    // And of a body.
    let length = format!("Content-Length: {}", bench.size);
    let body = ByHand::begin(uploader.address, &["PUT /upload HTTP/1.1", &length])?;
    let mut dripping = body.sender()?;
    let drip = std::thread::spawn(move || {
        while dripping.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let answer = body.answer()?;
    assert!(answer.status == 400 && answer.body.contains("less than 16384 bytes came in 1 s"), "{answer:?}");
    drip.join().ok().context("the sender of the body")?;
    assert_eq!(curl(&["-T", utf8(&bench.image), &uploader.url()])?.status, 200);
    assert_eq!(uploader.ended()?, Some(0));
    bench.assert_stored()
}

/// As the uploader of CDI's family answers: PUT and POST take the file, GET says that it is there, and nothing else is known. What is
/// put is sent to `taken`; a client may ask and put by different connections.
fn plain_server(listener: TcpListener, taken: mpsc::Sender<Vec<u8>>) {
    for stream in listener.incoming().map_while(Result::ok) {
        let taken = taken.clone();
        std::thread::spawn(move || serve_plainly(stream, &taken));
    }
}

fn serve_plainly(stream: TcpStream, taken: &mpsc::Sender<Vec<u8>>) -> Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut line, mut length, mut method) = (String::new(), 0_u64, None);
        while reader.read_line(&mut line)? > 2 {
            method = method.or_else(|| line.split(' ').next().map(str::to_owned));
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
            line.clear();
        }
        let Some(method) = method else { return Ok(()) };
        let mut body = Vec::new();
        (&mut reader).take(length).read_to_end(&mut body)?;
        let is_taken = method == "PUT";
        let status = if is_taken { "200 OK" } else { "404 Not Found" };
        if is_taken {
            taken.send(body)?;
        }
        write!(reader.get_mut(), "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n")?;
    }
}

#[test]
fn a_server_that_does_not_speak_tus_gets_one_plain_put() -> Result<()> {
    let dir = temp_dir();
    let file = dir.path().join("disk.img");
    std::fs::write(&file, dvcr_tests::fixture::Noise::new(3).bytes(5 << 20))?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/upload", listener.local_addr()?);
    let (sender, taken) = mpsc::channel();
    std::thread::spawn(move || plain_server(listener, sender));
    let done = run_output(&upload(&file, &url)?)?;
    assert!(done.status.success() && done.stdout.contains("uploaded"), "{}", done.stderr);
    let taken = taken.try_recv()?;
    ensure!(taken == std::fs::read(&file)?, "{} bytes came", taken.len());
    Ok(())
}
