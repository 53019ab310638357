//! A disk as a source, `dvcr import FILE`, and as a target, `dvcr populate`.
#![allow(clippy::unwrap_used, reason = "test code: a failure is the report")]

use anyhow::Result;
use dvcr_tests::{Daemon, Registry, Reply, SmallDisk, TempDir, cmd, dvcr, run, temp_dir, utf8};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bench::{
    Bench, CHUNK_BYTES, Chance, Damage, END_TIMEOUT, Elsewhere, Image, assert_again, assert_cut, fail, image,
    importing, other_image, succeed,
};
use crate::tls::Tls;

/// A registry that has the image, and a volume to fill from it.
struct Volume {
    bench: Bench,
    dir: TempDir,
}

impl Volume {
    fn new() -> Result<Self> {
        let bench = Bench::new()?;
        run(&bench.import(utf8(&image().file))?)?;
        Ok(Self { bench, dir: temp_dir() })
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("disk.img")
    }

    fn populate(&self) -> Result<Command> {
        populating(&self.bench.reference(), &self.target())
    }

    fn populate_well(&self) -> Result<()> {
        run(&self.populate()?)?;
        image().assert_is(&self.target())?;
        assert_eq!(files_in(self.dir.path())?, ["disk.img"]);
        Ok(())
    }

    /// Makes the disk anew, and returns how many bytes were read for it.
    fn populate_counted(&self) -> Result<u64> {
        let before = self.bench.to.passed();
        self.populate_well()?;
        fs::remove_file(self.target())?;
        Ok(self.bench.to.passed() - before)
    }

    /// The bytes of the image's file that the relay is to let through from now on.
    fn at(&self, position: u64) -> u64 {
        self.bench.to.passed() + position
    }
}

fn populating(reference: &str, target: &Path) -> Result<Command> {
    let mut command = cmd(dvcr()?, ["populate", reference, utf8(target)]);
    command.env("NO_COLOR", "1");
    Ok(command)
}

fn files_in(dir: &Path) -> Result<Vec<String>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default())).collect()
}

fn import_well(bench: &Bench, file: &Path, image: &Image) -> Result<()> {
    run(&bench.import(utf8(file))?)?;
    bench.assert_right(image)
}

pub fn connection_cut() -> Result<()> {
    let mut chance = Chance::new();
    for _ in 0..2 {
        let bench = Bench::new()?;
        bench.to.cut_at(chance.below(image().size));
        import_well(&bench, &image().file, image())?;
        assert_cut(&bench.to);
        assert_again(bench.to.pushed(), image().size, image().hundredth());
    }
    // Debian's registry may not go on with an upload one request of which broke off; then the import begins anew.
    let elsewhere = Elsewhere::with(other_image())?;
    elsewhere.from.cut_at(chance.below(image().size));
    let told = run(&importing(utf8(&image().file), &elsewhere.reference("team/cut:1"))?)?;
    assert!(told.contains(&image().digest), "{told}");
    assert_cut(&elsewhere.from);
    assert_again(elsewhere.from.pushed(), image().size, image().size + image().hundredth());

    let volume = Volume::new()?;
    let whole = volume.populate_counted()?;
    volume.bench.to.cut_at(volume.at(chance.below(image().size)));
    let passed = volume.populate_counted()?;
    assert_cut(&volume.bench.to);
    assert_again(passed, whole, image().hundredth());
    Ok(())
}

pub fn registry_killed() -> Result<()> {
    let mut chance = Chance::new();
    let mut bench = Bench::new()?;
    bench.to.hold_at(chance.below(image().size));
    let mut import = Daemon::spawn(&bench.import(utf8(&image().file))?)?;
    bench.to.wait_held()?;
    bench.kill_registry()?;
    bench.assert_invisible(1)?;
    bench.to.release();
    succeed(&mut import)?;
    bench.assert_right(image())?;
    assert_again(bench.to.pushed(), image().size, CHUNK_BYTES + image().hundredth());

    let mut volume = Volume::new()?;
    volume.bench.to.hold_at(volume.at(chance.below(image().size)));
    let mut populate = Daemon::spawn(&volume.populate()?)?;
    volume.bench.to.wait_held()?;
    volume.bench.kill_registry()?;
    assert!(!volume.target().exists());
    volume.bench.to.release();
    succeed(&mut populate)?;
    image().assert_is(&volume.target())
}

pub fn importer_killed() -> Result<()> {
    let bench = Bench::new()?;
    bench.to.hold_at(image().size - (1 << 20));
    let mut import = Daemon::spawn(&bench.import(utf8(&image().file))?)?;
    bench.to.wait_held()?;
    bench.wait_acknowledged(2 * CHUNK_BYTES)?;
    import.kill9()?;
    bench.assert_invisible(1)?;
    bench.to.release();
    import_well(&bench, &image().file, image())?;
    assert_again(bench.to.pushed(), image().size, 2 * CHUNK_BYTES);

    let volume = Volume::new()?;
    volume.bench.to.hold_at(volume.at(image().size / 2));
    let mut populate = Daemon::spawn(&volume.populate()?)?;
    volume.bench.to.wait_held()?;
    populate.kill9()?;
    assert!(!volume.target().exists());
    volume.bench.to.release();
    volume.populate_well()
}

pub fn disk_full() -> Result<()> {
    let disk = SmallDisk::new(20 << 20)?;
    let volume = Volume::new()?;
    let target = disk.path().join("disk.img");
    let populate = populating(&volume.bench.reference(), &target)?;
    fail(&populate)?.assert_names(&["bytes are free where", utf8(&target), "missing"]);
    assert_eq!(files_in(disk.path())?, [""; 0]);
    disk.grow(200 << 20)?;
    run(&populate)?;
    image().assert_is(&target)
}

pub fn slow_link() -> Result<()> {
    let volume = Volume::new()?;
    let whole = volume.populate_counted()?;
    volume.bench.to.pace(Some(12 << 20));
    assert_again(volume.populate_counted()?, whole, image().hundredth());
    let bench = Bench::new()?;
    bench.to.pace(Some(12 << 20));
    import_well(&bench, &image().file, image())?;
    assert_again(bench.to.pushed(), image().size, image().hundredth());
    Ok(())
}

pub fn wrong_length() -> Result<()> {
    // A volume that is too short for the disk.
    let volume = Volume::new()?;
    let (is, asked) = (image().virtual_bytes.to_string(), (image().virtual_bytes - 512).to_string());
    fail(volume.populate()?.args(["--size", &asked]))?.assert_names(&[&is, &asked]);
    assert_eq!(files_in(volume.dir.path())?, [""; 0]);
    volume.populate_well()
}

pub fn wrong_checksum() -> Result<()> {
    let bench = Bench::new()?;
    let demanded = format!("sha256:{}", other_image().sha256);
    let mut import = bench.import(utf8(&image().file))?;
    fail(import.args(["--checksum", &demanded]))?.assert_names(&["checksum", &demanded, &image().sha256]);
    bench.assert_invisible(0)?;
    // What is pushed has the digest that is announced, or is no blob.
    let mut chance = Chance::new();
    bench.to.flip_at(bench.to.passed() + chance.below(image().size));
    fail(&bench.import(utf8(&image().file))?)?.assert_names(&["DIGEST_INVALID"]);
    bench.assert_invisible(0)?;
    import_well(&bench, &image().file, image())?;

    let volume = Volume::new()?;
    // A bit that changed on the way is asked for again, one that stays wrong is not written.
    volume.bench.to.flip_at(volume.at((2 << 20) + chance.below(image().size / 2)));
    let mut populate = Daemon::spawn(&volume.populate()?)?;
    assert!(succeed(&mut populate)?.contains("asking for it again"), "{}", populate.log());
    image().assert_is(&volume.target())?;
    fs::remove_file(volume.target())?;
    let position = (1 << 20) + chance.below(image().size / 2);
    let damage = Damage::to_layer(volume.bench.registry.root(), position)?;
    fail(&volume.populate()?)?.assert_names(&["the index says"]);
    assert_eq!(files_in(volume.dir.path())?, [""; 0]);
    damage.mend()?;
    volume.populate_well()
}

pub fn changed_in_the_middle() -> Result<()> {
    let bench = Bench::new()?;
    let file = image().copy_to(bench.dir.path())?;
    // Three chunks are read ahead, and the image has more.
    bench.to.hold_at(Chance::new().below(CHUNK_BYTES));
    let mut import = Daemon::spawn(&bench.import(utf8(&file))?)?;
    bench.to.wait_held()?;
    fs::write(&file, fs::read(&other_image().file)?)?;
    bench.to.release();
    // Begun anew, with what is there now.
    assert!(succeed(&mut import)?.contains("begins anew"), "{}", import.log());
    bench.assert_right(other_image())
}

pub fn certificate_expired() -> Result<()> {
    let dir = temp_dir();
    let tls = Tls::expired(dir.path())?;
    let args = ["--tls-cert", utf8(&tls.cert), "--tls-key", utf8(&tls.key)];
    let mut registry = Registry::start_with(&dir.path().join("registry"), &args)?;
    let reference = format!("0.0.0.0:{}/vi/faults:1", registry.address().port());
    let target = dir.path().join("disk.raw");
    let mut commands =
        [cmd(dvcr()?, ["import", utf8(&image().file), &reference]), populating(&reference, &target)?];
    for command in &mut commands {
        fail(command.env("SSL_CERT_FILE", &tls.ca))?.assert_names(&["certificate", "expired"]);
    }
    assert!(!target.exists());
    tls.renew()?;
    registry.terminate()?;
    registry.restart()?;
    for command in &commands {
        run(command)?;
    }
    image().assert_is(&target)
}

pub fn come_back_later() -> Result<()> {
    let bench = Bench::new()?;
    let (mut chunks, mut others) = (0, 0);
    bench.to.rule(move |requested| {
        let (asked, status) = match &*requested.method {
            "PATCH" => (&mut chunks, 429),
            _ => (&mut others, 503),
        };
        *asked += 1;
        (*asked == 1).then(|| Reply::later(status, 1))
    });
    import_well(&bench, &image().file, image())?;
    // The chunk that was not wanted.
    assert_again(bench.to.pushed(), image().size, CHUNK_BYTES + image().hundredth());

    let mut asked = 0;
    bench.to.rule(move |_| {
        asked += 1;
        (asked <= 2).then(|| Reply::later(429, 1))
    });
    let target = bench.dir.path().join("disk.raw");
    let mut populate = Daemon::spawn(&populating(&bench.reference(), &target)?)?;
    assert!(populate.wait(END_TIMEOUT)?.success(), "{}", populate.log());
    image().assert_is(&target)
}
