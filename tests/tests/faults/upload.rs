//! `dvcr upload` to `dvcr uploader`.
#![allow(clippy::unwrap_used, reason = "test code: a failure is the report")]

use anyhow::{Context, Result};
use dvcr_tests::{Daemon, Relay, Reply, SmallDisk, cmd, dvcr, fixture, run, run_output, utf8, wait_until};
use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bench::{
    Bench, CHUNK_BYTES, Chance, END_TIMEOUT, Image, LONGER_BYTES, PIECE_BYTES, assert_again, assert_cut,
    fail, image, images_on_the_way, other_image, succeed, wait_for_trouble,
};
use crate::tls::Tls;

/// A running `dvcr uploader`.
struct Uploader {
    daemon: Daemon,
    address: SocketAddr,
}

impl Uploader {
    fn start(bench: &Bench, args: &[&str]) -> Result<Self> {
        let mut command = cmd(dvcr()?, ["uploader", "--listen-address", "127.0.0.1", "--listen-port", "0"]);
        command.args(["--healthz-port", "0", "--metrics-address", "127.0.0.1:0"]);
        command.args(["--destination-endpoint", &bench.reference()]).args(args).env("NO_COLOR", "1");
        let mut daemon = Daemon::spawn(&command)?;
        let address = daemon.wait_for_line(END_TIMEOUT, |line| {
            let (_, rest) = line.split_once(" addr=").filter(|_| line.contains("listening"))?;
            rest.split_whitespace().next()?.parse().ok()
        });
        Ok(Self { daemon, address: address.context("dvcr uploader did not start")? })
    }

    /// Waits for its end, and checks that it has stored what was uploaded, or that nobody is to send it again.
    fn assert_ended(&mut self) -> Result<()> {
        succeed(&mut self.daemon).map(drop)
    }
}

/// A file to upload, and an uploader behind a relay.
struct Desk {
    bench: Bench,
    file: PathBuf,
    uploader: Uploader,
    relay: Relay,
}

impl Desk {
    fn new() -> Result<Self> {
        Self::before(Bench::new()?, &[])
    }

    fn before(bench: Bench, args: &[&str]) -> Result<Self> {
        Self::of(bench, args, image())
    }

    fn of(bench: Bench, args: &[&str], image: &Image) -> Result<Self> {
        let file = image.copy_to(bench.dir.path())?;
        let uploader = Uploader::start(&bench, args)?;
        let relay = Relay::start(uploader.address)?;
        Ok(Self { bench, file, uploader, relay })
    }

    /// Puts another uploader in the place of the one that is there.
    fn replace_uploader(&mut self, args: &[&str]) -> Result<()> {
        self.uploader.daemon.kill9()?;
        self.uploader = Uploader::start(&self.bench, args)?;
        self.relay.lead_to(self.uploader.address);
        Ok(())
    }

    fn upload(&self) -> Result<Command> {
        uploading(&self.file, &self.relay.url("upload"))
    }

    fn start_upload(&self) -> Result<Daemon> {
        Daemon::spawn(&self.upload()?)
    }

    /// Waits until an upload has ended well; returns what it said.
    fn succeed(&self, upload: &mut Daemon) -> Result<String> {
        succeed(upload).with_context(|| format!("the uploader: {}", self.uploader.daemon.log()))
    }

    fn assert_right(&mut self, image: &Image) -> Result<()> {
        self.uploader.assert_ended()?;
        self.bench.assert_right(image)
    }

    fn upload_well(&mut self, image: &Image) -> Result<()> {
        run(&self.upload()?)?;
        self.assert_right(image)
    }
}

fn uploading(file: &Path, url: &str) -> Result<Command> {
    let mut command = cmd(dvcr()?, ["upload", utf8(file), url]);
    command.env("NO_COLOR", "1");
    Ok(command)
}

pub fn connection_cut() -> Result<()> {
    let mut chance = Chance::new();
    for _ in 0..2 {
        let mut desk = Desk::new()?;
        desk.relay.cut_at(chance.below(image().size));
        desk.upload_well(image())?;
        assert_cut(&desk.relay);
        assert_again(desk.relay.pushed(), image().size, image().hundredth());
    }
    Ok(())
}

pub fn server_killed() -> Result<()> {
    let mut desk = Desk::new()?;
    desk.relay.hold_at(image().size - (1 << 20));
    let mut upload = desk.start_upload()?;
    desk.relay.wait_held()?;
    desk.bench.wait_acknowledged(2 * CHUNK_BYTES)?;
    desk.replace_uploader(&[])?;
    desk.bench.assert_invisible(1)?;
    desk.relay.release();
    desk.succeed(&mut upload)?;
    desk.assert_right(image())?;
    // What the registry had not acknowledged, and the chunk before it.
    assert_again(desk.relay.pushed(), image().size, 3 * CHUNK_BYTES);
    publishing_server_killed()?;
    images_on_the_way().into_iter().try_for_each(keeping_server_killed)
}

/// Between the layer and the manifest.
fn publishing_server_killed() -> Result<()> {
    let mut desk = Desk::new()?;
    let mut upload = desk.start_upload()?;
    desk.bench.wait_to_publish(&mut upload)?;
    let pushed = desk.relay.pushed();
    desk.relay.lead_to("127.0.0.1:1".parse()?);
    desk.uploader.daemon.kill9()?;
    desk.bench.take_manifests();
    desk.replace_uploader(&[])?;
    desk.succeed(&mut upload)?;
    desk.assert_right(image())?;
    assert_again(image().size + desk.relay.pushed() - pushed, image().size, image().hundredth());
    Ok(())
}

/// Of what is decoded or encoded on the way, pieces are kept.
fn keeping_server_killed(image: &Image) -> Result<()> {
    let args = ["--keep-after", "0s", "--log", "debug"];
    let mut desk = Desk::of(Bench::new()?, &args, image)?;
    // What is not sent of the raw one are zeros.
    desk.relay.hold_at(LONGER_BYTES as u64 - (1 << 20));
    let mut upload = desk.start_upload()?;
    desk.relay.wait_held()?;
    desk.uploader.daemon.wait_for_line(END_TIMEOUT, |line| {
        let (_, end) = line.split_once("end=").filter(|_| line.contains("is kept"))?;
        let end: u64 = end.split_whitespace().next()?.parse().ok()?;
        (end >= 2 * PIECE_BYTES).then_some(())
    })?;
    let log = desk.uploader.daemon.log();
    desk.replace_uploader(&args)?;
    let unnoted = desk.bench.unnoted_pieces(&log)?;
    desk.bench.assert_untagged()?;
    desk.relay.release();
    let told = desk.succeed(&mut upload)?;
    assert!(desk.uploader.daemon.log().contains("goes on where it was"), "{told}");
    desk.uploader.assert_ended()?;
    desk.bench.assert_published(image)?;
    desk.bench.assert_no_pieces_but(unnoted)?;
    // What was not a whole piece yet, and a part of the client's.
    assert_again(desk.relay.pushed(), LONGER_BYTES as u64, PIECE_BYTES + CHUNK_BYTES);
    Ok(())
}

pub fn registry_killed() -> Result<()> {
    // Before anything came to it, and anywhere.
    for position in [0, Chance::new().below(image().size)] {
        let mut desk = Desk::new()?;
        desk.bench.to.hold_at(position);
        let mut upload = desk.start_upload()?;
        desk.bench.to.wait_held()?;
        desk.bench.kill_registry()?;
        desk.bench.assert_invisible(1)?;
        desk.bench.to.release();
        desk.succeed(&mut upload)?;
        desk.assert_right(image())?;
        assert_again(desk.relay.pushed(), image().size, image().hundredth());
        assert_again(desk.bench.to.pushed(), image().size, CHUNK_BYTES + image().hundredth());
    }
    Ok(())
}

pub fn importer_killed() -> Result<()> {
    let mut desk = Desk::new()?;
    desk.relay.hold_at(Chance::new().below(image().size));
    let mut upload = desk.start_upload()?;
    desk.relay.wait_held()?;
    upload.kill9()?;
    desk.bench.assert_invisible(1)?;
    desk.relay.release();
    desk.upload_well(image())?;
    // What was in the buffers of the machines between.
    assert_again(desk.relay.pushed(), image().size, CHUNK_BYTES / 4);
    Ok(())
}

pub fn disk_full() -> Result<()> {
    let disk = SmallDisk::new(20 << 20)?;
    let mut desk = Desk::before(Bench::on(disk.path())?, &[])?;
    fail(&desk.upload()?)?.assert_names(&["disk is full", "missing"]);
    wait_for_trouble(&mut desk.uploader.daemon, "disk is full")?;
    desk.bench.assert_invisible(1)?;
    disk.grow(200 << 20)?;
    desk.replace_uploader(&[])?;
    desk.upload_well(image())
}

pub fn slow_link() -> Result<()> {
    let mut desk = Desk::new()?;
    desk.relay.pace(Some(12 << 20));
    desk.upload_well(image())?;
    assert_again(desk.relay.pushed(), image().size, image().hundredth());
    Ok(())
}

pub fn wrong_length() -> Result<()> {
    let mut desk = Desk::new()?;
    // A plain PUT that ends before what it announced.
    let mut stream = TcpStream::connect(desk.uploader.address)?;
    let length = image().size + 1000;
    write!(stream, "PUT /upload HTTP/1.1\r\nHost: uploader\r\nContent-Length: {length}\r\n\r\n")?;
    stream.write_all(&std::fs::read(&desk.file)?)?;
    stream.shutdown(Shutdown::Write)?;
    let url = format!("http://{}/upload", desk.uploader.address);
    let state = || run(&cmd("curl", ["-sS", &url])).unwrap_or_default();
    let received = format!("\"received\":{},\"", image().size);
    wait_until(END_TIMEOUT, "all that came", || state().replace(' ', "").contains(&received))
        .with_context(state)?;
    assert!(state().contains(&length.to_string()), "{}", state());
    desk.bench.assert_invisible(1)?;
    drop(stream);
    let mut told = String::new();
    wait_until(END_TIMEOUT, "a free seat", || {
        let answer = run_output(&cmd("curl", ["-sS", "-T", utf8(&desk.file), &url]));
        told = answer.map(|output| output.stdout).unwrap_or_default();
        !told.contains("under way")
    })?;
    assert!(told.contains(&image().digest), "{told}");
    desk.assert_right(image())
}

pub fn wrong_checksum() -> Result<()> {
    let (wrong, right) = [other_image(), image()].map(|image| format!("sha256:{}", image.sha256)).into();
    let mut desk = Desk::before(Bench::new()?, &["--checksums", &wrong])?;
    fail(&desk.upload()?)?.assert_names(&["422", "checksum", &wrong, &image().sha256]);
    // It is not started again for what cannot become right.
    desk.uploader.assert_ended()?;
    desk.bench.assert_invisible(0)?;

    desk.replace_uploader(&["--checksums", &right])?;
    desk.relay.flip_at(desk.relay.passed() + (1 << 20) + Chance::new().below(image().size / 2));
    fail(&desk.upload()?)?.assert_names(&["422", "checksum", &right]);
    desk.uploader.assert_ended()?;
    desk.bench.assert_invisible(0)?;

    desk.replace_uploader(&["--checksums", &right])?;
    desk.upload_well(image())
}

pub fn changed_in_the_middle() -> Result<()> {
    let mut desk = Desk::new()?;
    // Longer than what is read ahead.
    let more = fixture::Noise::new(1).bytes(64 << 20);
    std::fs::File::options().append(true).open(&desk.file)?.write_all(&more)?;
    desk.relay.hold_at(Chance::new().below(4 << 20));
    let mut upload = desk.start_upload()?;
    desk.relay.wait_held()?;
    std::fs::write(&desk.file, std::fs::read(&other_image().file)?)?;
    desk.relay.release();
    assert_eq!(upload.wait(END_TIMEOUT)?.code(), Some(1), "{}", upload.log());
    assert!(upload.log().contains("changed while it was sent; upload it again"), "{}", upload.log());
    desk.bench.assert_invisible(1)?;
    desk.upload_well(other_image())
}

pub fn certificate_expired() -> Result<()> {
    let bench = Bench::new()?;
    let tls = Tls::expired(bench.dir.path())?;
    let args = ["--server-cert", utf8(&tls.cert), "--server-key", utf8(&tls.key)];
    let mut desk = Desk::before(bench, &args)?;
    let upload = |desk: &Desk| -> Result<Command> {
        let mut command = uploading(&desk.file, &format!("https://{}/upload", desk.uploader.address))?;
        command.arg("--cacert").arg(&tls.ca);
        Ok(command)
    };
    fail(&upload(&desk)?)?.assert_names(&["certificate", "expired"]);
    desk.bench.assert_invisible(0)?;
    tls.renew()?;
    desk.replace_uploader(&args)?;
    run(&upload(&desk)?)?;
    desk.assert_right(image())
}

pub fn redirect_loop() -> Result<()> {
    let mut desk = Desk::new()?;
    desk.relay.rule(|requested| Some(Reply::back_to(requested)));
    fail(&desk.upload()?)?.assert_names(&["too many redirects"]);
    desk.bench.assert_invisible(0)?;
    desk.relay.rule(|_| None);
    desk.upload_well(image())
}

pub fn come_back_later() -> Result<()> {
    let mut desk = Desk::new()?;
    let (mut parts, mut others) = (0, 0);
    desk.relay.rule(move |requested| {
        let (asked, status) = match &*requested.method {
            "PATCH" => (&mut parts, 503),
            _ => (&mut others, 429),
        };
        *asked += 1;
        (*asked == 1).then(|| Reply::later(status, 1))
    });
    let mut upload = desk.start_upload()?;
    let told = desk.succeed(&mut upload)?;
    assert_eq!(told.matches("wait_ms=1000").count(), 2, "{told}");
    desk.assert_right(image())
}
