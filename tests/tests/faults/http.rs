//! `dvcr import http://...`

use anyhow::{Context, Result};
use dvcr_tests::{Daemon, FileServer, Relay, Reply, SmallDisk, cmd, dvcr, run, utf8};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::bench::{
    Bench, CHUNK_BYTES, Chance, FILE_NAME, Image, PIECE_BYTES, assert_again, assert_cut, fail, image,
    images_on_the_way, importing, other_image, succeed, wait_for_trouble, wait_kept,
};
use crate::tls::Tls;

const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A server of the image, and a relay before it.
struct Web {
    bench: Bench,
    server: FileServer,
    from: Relay,
}

impl Web {
    fn new() -> Result<Self> {
        Self::before(Bench::new()?)
    }

    fn before(bench: Bench) -> Result<Self> {
        Self::of(bench, image())
    }

    fn of(bench: Bench, image: &Image) -> Result<Self> {
        image.copy_to(bench.dir.path())?;
        let server = FileServer::start(bench.dir.path())?;
        let from = Relay::start(server.address())?;
        Ok(Self { bench, server, from })
    }

    fn import(&self) -> Result<Command> {
        self.bench.import(&self.from.url(FILE_NAME))
    }

    fn start_import(&self) -> Result<Daemon> {
        Daemon::spawn(&self.import()?)
    }

    /// Imports again, now that nothing is in the way.
    fn import_well(&self, image: &Image) -> Result<()> {
        run(&self.import()?)?;
        self.bench.assert_right(image)
    }
}

pub fn connection_cut() -> Result<()> {
    let mut chance = Chance::new();
    for _ in 0..2 {
        let web = Web::new()?;
        web.from.cut_at(chance.below(image().size));
        web.import_well(image())?;
        assert_cut(&web.from);
        assert_again(web.from.passed(), image().size, image().hundredth());
    }
    Ok(())
}

pub fn server_killed() -> Result<()> {
    let mut web = Web::new()?;
    // In the second half, the rest may be in the system's buffers already, which a killed server does not take along.
    web.from.hold_at(Chance::new().below(image().size / 2));
    let mut import = web.start_import()?;
    web.from.wait_held()?;
    // The old one is gone when the new one is there.
    web.server = FileServer::start(web.bench.dir.path())?;
    web.from.lead_to("127.0.0.1:1".parse()?);
    web.from.release();
    wait_for_trouble(&mut import, "trying again")?;
    web.bench.assert_invisible(1)?;
    web.from.lead_to(web.server.address());
    succeed(&mut import)?;
    web.bench.assert_right(image())?;
    assert_again(web.from.passed(), image().size, image().hundredth());
    Ok(())
}

pub fn registry_killed() -> Result<()> {
    let mut web = Web::new()?;
    web.bench.to.hold_at(Chance::new().below(image().size));
    let mut import = web.start_import()?;
    web.bench.to.wait_held()?;
    web.bench.kill_registry()?;
    web.bench.assert_invisible(1)?;
    web.bench.to.release();
    succeed(&mut import)?;
    web.bench.assert_right(image())?;
    assert_again(web.from.passed(), image().size, image().hundredth());
    assert_again(web.bench.to.pushed(), image().size, CHUNK_BYTES + image().hundredth());
    // What was acknowledged outlasts the next power cut.
    web.bench.kill_registry()?;
    web.bench.assert_right(image())
}

pub fn importer_killed() -> Result<()> {
    for registry_too in [false, true] {
        let mut web = Web::new()?;
        web.from.hold_at(image().size - (1 << 20));
        let mut import = web.start_import()?;
        web.from.wait_held()?;
        web.bench.wait_acknowledged(3 * CHUNK_BYTES)?;
        import.kill9()?;
        if registry_too {
            web.bench.kill_registry()?;
        }
        web.bench.assert_invisible(1)?;
        web.from.release();
        web.import_well(image())?;
        // What the registry had not acknowledged, and the chunk before it.
        assert_again(web.from.passed(), image().size, 2 * CHUNK_BYTES + image().hundredth());
    }
    publishing_importer_killed()?;
    for image in images_on_the_way() {
        for is_in_bucket in [true, false] {
            keeping_importer_killed(image, is_in_bucket)?;
        }
    }
    Ok(())
}

/// Between the layer and the manifest.
fn publishing_importer_killed() -> Result<()> {
    #[derive(PartialEq)]
    enum Then {
        Same,
        Collected,
        Changed,
    }
    for then in [Then::Same, Then::Collected, Then::Changed] {
        let mut web = Web::new()?;
        let checksum = |image: &Image| format!("--checksum=sha256:{}", image.sha256);
        let mut import = Daemon::spawn(web.import()?.arg(checksum(image())))?;
        web.bench.wait_to_publish(&mut import)?;
        import.kill9()?;
        web.bench.kill_registry()?;
        web.bench.assert_untagged()?;
        web.bench.take_manifests();
        let (read, pushed) = (web.from.passed(), web.bench.to.pushed());
        let mut image = image();
        match then {
            Then::Same => {}
            Then::Collected => web.bench.remove_layers()?,
            Then::Changed => {
                image = other_image();
                image.copy_to(web.bench.dir.path())?;
            }
        }
        let told = succeed(&mut Daemon::spawn(web.import()?.arg(checksum(image)))?)?;
        web.bench.assert_right(image)?;
        let (read, pushed) = (web.from.passed() - read, web.bench.to.pushed() - pushed);
        match then {
            Then::Same => {
                assert!(told.contains("the layer is there"), "{}", told);
                assert_again(image.size + read, image.size, image.hundredth());
                assert_again(image.size + pushed, image.size, image.hundredth());
            }
            Then::Collected | Then::Changed => {
                assert!(told.contains("begins anew"), "{}", told);
                assert_again(read, image.size, image.hundredth());
            }
        }
    }
    Ok(())
}

/// Of what is decoded or encoded on the way, pieces are kept.
fn keeping_importer_killed(image: &Image, is_in_bucket: bool) -> Result<()> {
    let mut web = match is_in_bucket {
        true => Web::of(Bench::in_bucket()?, image)?,
        false => Web::of(Bench::new()?, image)?,
    };
    web.from.hold_at(image.size - (1 << 20));
    let mut command = web.import()?;
    let mut import = Daemon::spawn(command.args(["--keep-after", "0s", "--log", "debug"]))?;
    web.from.wait_held().with_context(|| import.log())?;
    wait_kept(&mut import, image).with_context(|| import.log())?;
    import.kill9()?;
    let mut unnoted = 0;
    if !is_in_bucket {
        web.bench.kill_registry()?;
        unnoted = web.bench.unnoted_pieces(&import.log())?;
    }
    web.bench.assert_untagged()?;
    web.from.release();
    // The checksum is over what both have brought.
    command.args(["--checksum", &format!("sha256:{}", image.sha256)]);
    let mut again = Daemon::spawn(&command)?;
    assert!(succeed(&mut again)?.contains("goes on where it was"), "{}", again.log());
    web.bench.assert_published(image)?;
    if !is_in_bucket {
        web.bench.assert_no_pieces_but(unnoted)?;
    }
    // What was not a whole piece yet, and what was in buffers on the way.
    assert_again(web.from.passed(), image.size, PIECE_BYTES + image.hundredth());
    Ok(())
}

pub fn disk_full() -> Result<()> {
    let disk = SmallDisk::new(20 << 20)?;
    let web = Web::before(Bench::on(disk.path())?)?;
    fail(&web.import()?)?.assert_names(&["507", "disk is full"]);
    web.bench.assert_invisible(1)?;
    disk.grow(200 << 20)?;
    web.import_well(image())
}

pub fn slow_link() -> Result<()> {
    let web = Web::new()?;
    web.from.pace(Some(12 << 20));
    web.import_well(image())?;
    assert_again(web.from.passed(), image().size, image().hundredth());
    Ok(())
}

pub fn wrong_length() -> Result<()> {
    let web = Web::new()?;
    web.from.falsify_length(1000);
    let announced = (image().size + 1000).to_string();
    for ranges in [true, false] {
        web.server.set_ranges(ranges);
        let failed = fail(&web.import()?)?;
        match ranges {
            true => failed.assert_names(&["changed"]),
            false => failed.assert_names(&["broke off", &announced]),
        }
        web.bench.assert_invisible(usize::from(!ranges))?;
    }
    web.from.falsify_length(0);
    web.import_well(image())
}

pub fn wrong_checksum() -> Result<()> {
    let web = Web::new()?;
    let mut wrong = web.import()?;
    let demanded = format!("sha256:{}", other_image().sha256);
    fail(wrong.args(["--checksum", &demanded]))?.assert_names(&["checksum", &image().sha256, &demanded]);
    web.bench.assert_invisible(0)?;
    // A bit that changed on the way is noticed like another file.
    let demanded = format!("sha256:{}", image().sha256);
    let mut right = web.import()?;
    web.from.flip_at(web.from.passed() + Chance::new().below(image().size));
    fail(right.args(["--checksum", &demanded]))?.assert_names(&["checksum", &demanded]);
    web.bench.assert_invisible(0)?;
    run(&right)?;
    web.bench.assert_right(image())
}

pub fn changed_in_the_middle() -> Result<()> {
    let web = Web::new()?;
    let middle = image().size / 2;
    web.from.hold_at(middle);
    let mut import = web.start_import()?;
    web.from.wait_held()?;
    other_image().copy_to(web.bench.dir.path())?;
    web.from.cut_at(middle);
    web.from.release();
    // Begun anew, with what is there now.
    assert!(succeed(&mut import)?.contains("begins anew"), "{}", import.log());
    web.bench.assert_right(other_image())
}

pub fn certificate_expired() -> Result<()> {
    let bench = Bench::new()?;
    let tls = Tls::expired(bench.dir.path())?;
    image().copy_to(bench.dir.path())?;
    let import = |url: &str| -> Result<Command> {
        let mut command = importing(&format!("{url}/{FILE_NAME}"), &bench.reference())?;
        command.arg("--source-ca").arg(&tls.ca);
        Ok(command)
    };
    let (_server, url) = serve_tls(bench.dir.path(), &tls)?;
    let failed = fail(&import(&url)?)?;
    failed.assert_names(&["certificate", "expired"]);
    assert!(!failed.0.contains("trying again"), "{}", failed.0);
    // A worker, which is patient, does not try in vain either.
    let trusted = bench.dir.path().join("trusted");
    std::fs::create_dir(&trusted)?;
    std::fs::copy(&tls.ca, trusted.join("ca.pem"))?;
    let mut worker = cmd(dvcr()?, ["importer", "--source", "http", "--metrics-address", "127.0.0.1:0"]);
    worker.args(["--endpoint", &format!("{url}/{FILE_NAME}"), "--destination-endpoint", &bench.reference()]);
    let failed = fail(worker.arg("--cert-dir").arg(&trusted))?;
    failed.assert_names(&["certificate", "expired"]);
    assert!(!failed.0.contains("tried again"), "{}", failed.0);
    bench.assert_invisible(0)?;
    tls.renew()?;
    let (_server, url) = serve_tls(bench.dir.path(), &tls)?;
    run(&import(&url)?)?;
    bench.assert_right(image())
}

/// Serves the files of `dir` over HTTPS; returns the address.
fn serve_tls(dir: &Path, tls: &Tls) -> Result<(Daemon, String)> {
    let mut command = cmd("openssl", ["s_server", "-WWW", "-accept", "127.0.0.1:0"]);
    command.args(["-cert", utf8(&tls.cert), "-key", utf8(&tls.key)]).current_dir(dir);
    let mut daemon = Daemon::spawn(&command)?;
    let port = daemon
        .wait_for_line(START_TIMEOUT, |line| line.strip_prefix("ACCEPT 127.0.0.1:")?.parse::<u16>().ok());
    let port = port.context("openssl s_server does not say where it listens")?;
    Ok((daemon, format!("https://127.0.0.1:{port}")))
}

pub fn redirect_loop() -> Result<()> {
    let web = Web::new()?;
    web.from.rule(|requested| Some(Reply::back_to(requested)));
    fail(&web.import()?)?.assert_names(&["redirects more than 10 times"]);
    web.bench.assert_invisible(0)?;
    web.from.rule(|_| None);
    web.import_well(image())
}

pub fn come_back_later() -> Result<()> {
    let web = Web::new()?;
    // At the beginning, and where a broken transfer wants to go on.
    let asked = AtomicU32::new(0);
    web.from.rule(move |_| match asked.fetch_add(1, Ordering::Relaxed) {
        0 => Some(Reply::later(503, 1)),
        2 => Some(Reply::later(429, 1)),
        _ => None,
    });
    web.from.cut_at(Chance::new().below(image().size));
    let mut import = web.start_import()?;
    let told = succeed(&mut import)?;
    assert_eq!(told.matches("wait_ms=1000").count(), 2, "{told}");
    web.bench.assert_right(image())?;
    assert_cut(&web.from);
    assert_again(web.from.passed(), image().size, image().hundredth());
    Ok(())
}
