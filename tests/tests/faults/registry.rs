//! `dvcr import docker://...`, from Debian's registry.

use anyhow::Result;
use dvcr_tests::{Daemon, Registry, Reply, SmallDisk, cmd, dvcr, run, utf8};
use std::process::Command;
use std::sync::OnceLock;

use crate::bench::{
    Bench, CHUNK_BYTES, Chance, Elsewhere, Image, assert_again, assert_cut, fail, image, importing,
    other_image, succeed,
};
use crate::tls::Tls;

/// A registry to bring the image to, and one that has it.
struct Pair {
    bench: Bench,
    elsewhere: Elsewhere,
}

impl Pair {
    fn new() -> Result<Self> {
        Self::before(Bench::new()?)
    }

    fn before(bench: Bench) -> Result<Self> {
        Ok(Self { bench, elsewhere: Elsewhere::with(image())? })
    }

    fn import(&self) -> Result<Command> {
        self.bench.import(&self.elsewhere.source())
    }

    fn start_import(&self) -> Result<Daemon> {
        Daemon::spawn(&self.import()?)
    }

    fn import_well(&self, image: &Image) -> Result<()> {
        run(&self.import()?)?;
        self.bench.assert_right(image)
    }
}

/// What an import reads of the other registry: the image, and some of it to see what it is.
fn undisturbed() -> Result<u64> {
    static BYTES: OnceLock<u64> = OnceLock::new();
    if let Some(bytes) = BYTES.get() {
        return Ok(*bytes);
    }
    let pair = Pair::new()?;
    pair.import_well(image())?;
    Ok(*BYTES.get_or_init(|| pair.elsewhere.from.passed()))
}

pub fn connection_cut() -> Result<()> {
    let mut chance = Chance::new();
    for _ in 0..2 {
        let pair = Pair::new()?;
        pair.elsewhere.from.cut_at(chance.below(image().size));
        pair.import_well(image())?;
        assert_cut(&pair.elsewhere.from);
        assert_again(pair.elsewhere.from.passed(), undisturbed()?, image().hundredth());
    }
    Ok(())
}

pub fn server_killed() -> Result<()> {
    let mut pair = Pair::new()?;
    pair.elsewhere.from.hold_at(Chance::new().below(image().size));
    let mut import = pair.start_import()?;
    pair.elsewhere.from.wait_held()?;
    pair.elsewhere.kill();
    pair.bench.assert_invisible(1)?;
    pair.elsewhere.restart()?;
    pair.elsewhere.from.release();
    succeed(&mut import)?;
    pair.bench.assert_right(image())?;
    assert_again(pair.elsewhere.from.passed(), undisturbed()?, image().hundredth());
    Ok(())
}

pub fn registry_killed() -> Result<()> {
    let mut pair = Pair::new()?;
    pair.bench.to.hold_at(Chance::new().below(image().size));
    let mut import = pair.start_import()?;
    pair.bench.to.wait_held()?;
    pair.bench.kill_registry()?;
    pair.bench.assert_invisible(1)?;
    pair.bench.to.release();
    succeed(&mut import)?;
    pair.bench.assert_right(image())?;
    assert_again(pair.elsewhere.from.passed(), undisturbed()?, image().hundredth());
    assert_again(pair.bench.to.pushed(), image().size, CHUNK_BYTES + image().hundredth());
    Ok(())
}

pub fn importer_killed() -> Result<()> {
    let pair = Pair::new()?;
    pair.elsewhere.from.hold_at(image().size - (1 << 20));
    let mut import = pair.start_import()?;
    pair.elsewhere.from.wait_held()?;
    pair.bench.wait_acknowledged(3 * CHUNK_BYTES)?;
    import.kill9()?;
    pair.bench.assert_invisible(1)?;
    pair.elsewhere.from.release();
    pair.import_well(image())?;
    assert_again(pair.elsewhere.from.passed(), undisturbed()?, 2 * CHUNK_BYTES + image().hundredth());
    Ok(())
}

pub fn disk_full() -> Result<()> {
    let disk = SmallDisk::new(20 << 20)?;
    let pair = Pair::before(Bench::on(disk.path())?)?;
    fail(&pair.import()?)?.assert_names(&["507", "disk is full"]);
    pair.bench.assert_invisible(1)?;
    disk.grow(200 << 20)?;
    pair.import_well(image())
}

pub fn slow_link() -> Result<()> {
    let pair = Pair::new()?;
    pair.elsewhere.from.pace(Some(12 << 20));
    pair.import_well(image())?;
    assert_again(pair.elsewhere.from.passed(), undisturbed()?, image().hundredth());
    Ok(())
}

pub fn wrong_length() -> Result<()> {
    let pair = Pair::new()?;
    pair.elsewhere.from.falsify_length(1000);
    fail(&pair.import()?)?.assert_names(&["bytes, the manifest says"]);
    pair.bench.assert_invisible(0)?;
    pair.elsewhere.from.falsify_length(0);
    pair.import_well(image())
}

pub fn wrong_checksum() -> Result<()> {
    let pair = Pair::new()?;
    let demanded = format!("sha256:{}", other_image().sha256);
    let mut import = pair.import()?;
    fail(import.args(["--checksum", &demanded]))?.assert_names(&["checksum", &demanded, &image().sha256]);
    pair.bench.assert_invisible(0)?;

    // What the other registry's disk has damaged.
    let damage = pair.elsewhere.damage(65_536 + Chance::new().below(image().size - 65_536))?;
    fail(&pair.import()?)?.assert_names(&["digest", "sha256:"]);
    pair.bench.assert_invisible(0)?;
    damage.mend()?;
    pair.import_well(image())
}

pub fn changed_in_the_middle() -> Result<()> {
    let pair = Pair::new()?;
    pair.elsewhere.from.hold_at(Chance::new().below(image().size));
    let mut import = pair.start_import()?;
    pair.elsewhere.from.wait_held()?;
    pair.elsewhere.now(other_image())?;
    pair.elsewhere.from.release();
    succeed(&mut import)?;
    // What the tag stood for when the import began.
    pair.bench.assert_right(image())?;
    pair.import_well(other_image())
}

pub fn certificate_expired() -> Result<()> {
    let bench = Bench::new()?;
    let tls = Tls::expired(bench.dir.path())?;
    let mut theirs = serve(&bench, &tls)?;
    let port = theirs.address().port();
    let tag = format!("0.0.0.0:{port}/team/disk:1");
    run(cmd(dvcr()?, ["import", "--insecure"]).arg(&image().file).arg(&tag))?;
    let mut import = importing(&format!("docker://{tag}"), &bench.reference())?;
    import.arg("--source-ca").arg(&tls.ca);
    fail(&import)?.assert_names(&["certificate", "expired"]);
    bench.assert_invisible(0)?;
    tls.renew()?;
    theirs.terminate()?;
    theirs.restart()?;
    run(&import)?;
    bench.assert_right(image())
}

fn serve(bench: &Bench, tls: &Tls) -> Result<Registry> {
    let args = ["--tls-cert", utf8(&tls.cert), "--tls-key", utf8(&tls.key)];
    Registry::start_with(&bench.dir.path().join("theirs"), &args)
}

pub fn redirect_loop() -> Result<()> {
    let pair = Pair::new()?;
    pair.elsewhere
        .from
        .rule(|requested| requested.path.contains("/blobs/").then(|| Reply::back_to(requested)));
    fail(&pair.import()?)?.assert_names(&["more than 5 redirects"]);
    pair.bench.assert_invisible(0)?;
    pair.elsewhere.from.rule(|_| None);
    pair.import_well(image())
}

pub fn come_back_later() -> Result<()> {
    let pair = Pair::new()?;
    let (mut manifests, mut blobs) = (0, 0);
    pair.elsewhere.from.rule(move |requested| {
        let (asked, status) = match requested.path.contains("/manifests/") {
            true => (&mut manifests, 503),
            false => (&mut blobs, 429),
        };
        *asked += 1;
        (*asked == 1).then(|| Reply::later(status, 1))
    });
    pair.import_well(image())?;
    assert_again(pair.elsewhere.from.passed(), undisturbed()?, image().hundredth());
    Ok(())
}
