//! What the cells share: two images, a registry behind a relay, and what is looked at afterwards.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test code: a failure is the report")]

use anyhow::{Context, Result, anyhow, ensure};
use dvcr_tests::{
    Daemon, PeerRegistry, Registry, Relay, Reply, S3Server, TempDir, assert_same_bytes, cmd, dvcr, fixture,
    qemu, run, temp_dir, utf8, wait_until,
};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Noise in each image, bytes; four chunks of 8 MiB.
const DATA_BYTES: usize = 32 << 20;
/// The same in those that are decoded or encoded on the way.
pub const LONGER_BYTES: usize = 48 << 20;
/// What every image is called, wherever it is.
pub const FILE_NAME: &str = "disk.qcow2";
/// The repository and the tag that images are brought to.
const NAME: &str = "vi/faults";
const TAG: &str = "1";
/// What a pusher sends at a time, and what is sent again when it, or a registry, is killed: that, and what it was about to do.
pub const CHUNK_BYTES: u64 = 8 * MIB;
/// What is kept at a time of a source that is decoded or encoded on the way.
pub const PIECE_BYTES: u64 = 16 * MIB;
/// Everything here ends by itself long before; what does not is the fault that is looked for.
pub const END_TIMEOUT: Duration = Duration::from_secs(100);

/// A disk image that is made once, and what an undisturbed import makes of it.
pub struct Image {
    pub file: PathBuf,
    pub size: u64,
    pub sha256: String,
    /// The digest of its manifest.
    pub digest: String,
    /// The same disk as a guest sees it.
    raw: PathBuf,
    pub virtual_bytes: u64,
}

/// The image of most tests.
pub fn image() -> &'static Image {
    static IMAGE: OnceLock<Image> = OnceLock::new();
    IMAGE.get_or_init(|| Image::make(64 * MIB).unwrap())
}

/// Another one, for what changes.
pub fn other_image() -> &'static Image {
    static IMAGE: OnceLock<Image> = OnceLock::new();
    IMAGE.get_or_init(|| Image::make(65 * MIB).unwrap())
}

/// One that is compressed as a whole, and one that is raw: they are decoded, or encoded, on the way.
pub fn images_on_the_way() -> [&'static Image; 2] {
    static IMAGES: [OnceLock<Image>; 2] = [const { OnceLock::new() }; 2];
    [
        IMAGES[0].get_or_init(|| Image::make_as(66 * MIB, LONGER_BYTES, Form::Gz).unwrap()),
        IMAGES[1].get_or_init(|| Image::make_as(67 * MIB, LONGER_BYTES, Form::Raw).unwrap()),
    ]
}

/// What an image is, whatever it is called.
#[derive(Clone, Copy, Debug)]
enum Form {
    Qcow2,
    Gz,
    Raw,
}

impl Image {
    fn make(virtual_bytes: u64) -> Result<Self> {
        Self::make_as(virtual_bytes, DATA_BYTES, Form::Qcow2)
    }

    fn make_as(virtual_bytes: u64, data_bytes: usize, form: Form) -> Result<Self> {
        let name = format!("faults-{virtual_bytes}-{data_bytes}-{form:?}");
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let (file, raw) = (dir.join(FILE_NAME), dir.join("disk.raw"));
        if !dir.exists() {
            // Appears as a whole, also for those who make it at the same time.
            let made = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
            let (file, raw) = (made.path().join(FILE_NAME), made.path().join("disk.raw"));
            fixture::noise_qcow2(&file, virtual_bytes, data_bytes)?;
            qemu::convert(&file, "qcow2", &raw, "raw")?;
            match form {
                Form::Qcow2 => {}
                Form::Raw => fs::copy(&raw, &file).map(drop)?,
                Form::Gz => {
                    run(&cmd("gzip", ["-1", utf8(&file)]))?;
                    fs::rename(made.path().join(format!("{FILE_NAME}.gz")), &file)?;
                }
            }
            let renamed = fs::rename(made.keep(), &dir);
            ensure!(renamed.is_ok() || file.is_file(), "cannot make {}: {renamed:?}", dir.display());
        }
        let (work, size) = (temp_dir(), file.metadata()?.len());
        let registry = Registry::start(&work.path().join("registry"))?;
        let sha256 = dvcr_tests::sha256_file(&file)?;
        let summary = run(&importing(utf8(&file), &registry.reference("undisturbed"))?)?;
        let summary: Value = serde_json::from_str(&summary)?;
        let digest = summary["digest"].as_str().context("a digest")?.to_owned();
        Ok(Self { file, size, sha256, digest, raw, virtual_bytes })
    }

    /// Puts a copy of it, as a new file, into `dir`.
    pub fn copy_to(&self, dir: &Path) -> Result<PathBuf> {
        let (new, file) = (dir.join("new"), dir.join(FILE_NAME));
        fs::copy(&self.file, &new)?;
        fs::rename(new, &file)?;
        Ok(file)
    }

    /// What one cut may cost, bytes.
    pub fn hundredth(&self) -> u64 {
        self.size / 100
    }

    /// Checks that a file is the disk.
    pub fn assert_is(&self, disk: &Path) -> Result<()> {
        assert_same_bytes(&self.raw, disk, None)
    }
}

/// `dvcr import`.
pub fn importing(source: &str, destination: &str) -> Result<Command> {
    let mut command = cmd(dvcr()?, ["import", "--output", "json", source, destination]);
    command.env("NO_COLOR", "1");
    Ok(command)
}

/// A place for a fault: the same for the same seed, and different for every use of a test.
pub struct Chance(fixture::Noise);

impl Chance {
    pub fn new() -> Self {
        let seed = std::env::var("DVCR_FAULTS_SEED").ok().and_then(|text| text.parse().ok());
        let seed = seed.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            now.as_nanos() as u64
        });
        // Shown when the test fails.
        eprintln!("DVCR_FAULTS_SEED={seed}");
        Self(fixture::Noise::new(seed))
    }

    /// A position in so many bytes.
    pub fn below(&mut self, bytes: u64) -> u64 {
        let random: [u8; 8] = self.0.bytes(8).try_into().unwrap();
        u64::from_le_bytes(random) % bytes
    }
}

/// How a command ended that was not to succeed, or not yet.
pub struct Failed(pub String);

impl Failed {
    /// Checks that what was said has all of this in it.
    pub fn assert_names(&self, parts: &[&str]) {
        for part in parts {
            assert!(self.0.contains(part), "{part:?} is not named: {}", self.0);
        }
    }
}

/// Checks that the connection was broken that was to be.
pub fn assert_cut(relay: &Relay) {
    assert!(relay.has_cut(), "nothing was cut");
}

/// Runs a command that fails.
pub fn fail(command: &Command) -> Result<Failed> {
    let mut running = Daemon::spawn(command)?;
    let status = running.wait(END_TIMEOUT).with_context(|| running.log())?;
    ensure!(!status.success(), "it succeeded: {}", running.log());
    Ok(Failed(running.log()))
}

/// Waits until a program has ended well; returns what it said.
pub fn succeed(running: &mut Daemon) -> Result<String> {
    let status = running.wait(END_TIMEOUT).with_context(|| running.log())?;
    ensure!(status.success(), "{status}: {}", running.log());
    Ok(running.log())
}

/// Waits for the word of a program in trouble that it does not give up.
pub fn wait_for_trouble(running: &mut Daemon, word: &str) -> Result<()> {
    running.wait_for_line(END_TIMEOUT, |line| line.contains(word).then_some(()))
}

/// A registry that images are brought to, behind a relay.
pub struct Bench {
    pub dir: TempDir,
    pub registry: Registry,
    pub to: Relay,
    /// Runs as long as the registry does that is in it.
    _bucket: Option<Arc<S3Server>>,
}

impl Bench {
    pub fn new() -> Result<Self> {
        let dir = temp_dir();
        let registry = Registry::start(&dir.path().join("registry"))?;
        Self::with(dir, registry)
    }

    /// With the registry's directory somewhere else.
    pub fn on(root: &Path) -> Result<Self> {
        Self::with(temp_dir(), Registry::start(&root.join("registry"))?)
    }

    /// With a registry in a bucket.
    pub fn in_bucket() -> Result<Self> {
        let (dir, server) = (temp_dir(), S3Server::shared_minio());
        let bucket = server.new_bucket()?;
        let registry = Registry::start_in_bucket(
            &dir.path().join("registry"),
            (&server, &bucket, "/some/registry"),
            &["--gc-schedule", "off"],
        )?;
        Ok(Self { _bucket: Some(server), ..Self::with(dir, registry)? })
    }

    fn with(dir: TempDir, registry: Registry) -> Result<Self> {
        let to = Relay::start(registry.address())?;
        Ok(Self { dir, registry, to, _bucket: None })
    }

    /// Where images are brought to, by way of the relay.
    pub fn reference(&self) -> String {
        format!("{}/{NAME}:{TAG}", self.to.address())
    }

    pub fn import(&self, source: &str) -> Result<Command> {
        importing(source, &self.reference())
    }

    /// The registry dies as by a power cut, and comes back.
    pub fn kill_registry(&mut self) -> Result<()> {
        self.registry.kill9()?;
        self.registry.restart()
    }

    /// Checks that the tag is what an undisturbed import makes of `image`, that a disk comes out of it, and that no session is left.
    pub fn assert_right(&self, image: &Image) -> Result<()> {
        assert_eq!(self.sessions(), 0, "sessions are left");
        self.assert_published(image)
    }

    /// How many pieces were made that their keeper, which is killed by now, had not noted by the time of this log: they are the garbage
    /// collection's.
    pub fn unnoted_pieces(&self, log: &str) -> Result<usize> {
        Ok(self.blobs()?.saturating_sub(log.matches("a piece of the source is kept").count()))
    }

    /// Checks that no blobs are left but those of the image, its layer, its config and its index, and pieces that nobody knows of.
    pub fn assert_no_pieces_but(&self, unnoted: usize) -> Result<()> {
        let blobs = self.blobs()?;
        assert!(blobs <= 3 + unnoted, "{blobs} blobs are left, and {unnoted} were not noted");
        Ok(())
    }

    fn blobs(&self) -> Result<usize> {
        let layers = self.repository().join("_layers/sha256");
        let linked = |entry: &fs::DirEntry| entry.path().join("link").exists();
        Ok(fs::read_dir(layers)?.flatten().filter(linked).count())
    }

    /// Checks that the tag is what an undisturbed import makes of `image`, and that a disk comes out of it.
    pub fn assert_published(&self, image: &Image) -> Result<()> {
        assert_eq!(self.tagged()?.as_deref(), Some(&*image.digest));
        let disk = self.dir.path().join("checked.raw");
        let reference = self.registry.reference(&format!("{NAME}:{TAG}"));
        run(&cmd(dvcr()?, ["populate", &reference, utf8(&disk)]))?;
        image.assert_is(&disk)?;
        Ok(fs::remove_file(disk)?)
    }

    /// Checks that nobody can see anything, and that no more than so many sessions are left to be gone on with.
    pub fn assert_invisible(&self, sessions_max: usize) -> Result<()> {
        assert_eq!(self.tagged()?, None);
        let tags = run(&cmd("curl", ["-sS", &format!("{}/v2/{NAME}/tags/list", self.registry.url())]))?;
        assert!(!tags.contains(&format!("\"{TAG}\"")), "{tags}");
        assert!(self.sessions() <= sessions_max, "{} sessions are left", self.sessions());
        let layers = fs::read_dir(self.repository().join("_layers/sha256"));
        assert_eq!(layers.map_or(0, Iterator::count), 0, "blobs are left");
        Ok(())
    }

    /// Checks that nobody can see anything of an image that is decoded or encoded on the way.
    pub fn assert_untagged(&self) -> Result<()> {
        assert_eq!(self.tagged()?, None);
        Ok(())
    }

    /// The digest that the tag has.
    fn tagged(&self) -> Result<Option<String>> {
        let url = format!("{}/v2/{NAME}/manifests/{TAG}", self.registry.url());
        let head = run(&cmd("curl", ["-sS", "-I", "-H", "Accept: */*", &url]))?.to_ascii_lowercase();
        let status = head.split(' ').nth(1).context("a status")?;
        ensure!(["200", "404"].contains(&status), "{head}");
        let digest = head.lines().find_map(|line| line.strip_prefix("docker-content-digest: "));
        Ok(digest.map(|digest| digest.trim().to_owned()))
    }

    fn repository(&self) -> PathBuf {
        self.registry.root().join("docker/registry/v2/repositories").join(NAME)
    }

    fn sessions(&self) -> usize {
        fs::read_dir(self.repository().join("_uploads")).map_or(0, Iterator::count)
    }

    /// Has nothing published until [`Bench::take_manifests`], and waits until something was to be: then its layer is there.
    pub fn wait_to_publish(&self, running: &mut Daemon) -> Result<()> {
        let (tell, told) = std::sync::mpsc::channel();
        self.to.rule(move |requested| {
            let is_manifest = requested.method == "PUT" && requested.path.contains("/manifests/");
            if is_manifest {
                let _ = tell.send(());
            }
            is_manifest.then(|| Reply::later(503, 10))
        });
        told.recv_timeout(END_TIMEOUT).with_context(|| running.log())
    }

    pub fn take_manifests(&self) {
        self.to.rule(|_| None);
    }

    /// Removes all layers that no manifest names, as garbage collection does.
    pub fn remove_layers(&self) -> Result<()> {
        for layer in fs::read_dir(self.repository().join("_layers/sha256"))?.flatten() {
            let digest = layer.file_name().into_string().map_err(|name| anyhow!("{name:?} is no digest"))?;
            let url = format!("{}/v2/{NAME}/blobs/sha256:{digest}", self.registry.url());
            run(&cmd("curl", ["-sS", "-f", "-X", "DELETE", &url]))?;
        }
        Ok(())
    }

    /// Waits until the registry has put away so many bytes of what is pushed.
    pub fn wait_acknowledged(&self, bytes: u64) -> Result<()> {
        wait_until(END_TIMEOUT, "chunks in the registry", || {
            let sessions = fs::read_dir(self.repository().join("_uploads")).into_iter().flatten().flatten();
            let states = sessions.flat_map(|session| fs::read_dir(session.path().join("hashstates/sha256")));
            let offsets = states
                .flatten()
                .flatten()
                .filter_map(|state| state.file_name().to_str()?.parse::<u64>().ok());
            offsets.max().unwrap_or(0) >= bytes
        })
    }
}

/// Waits until a program that tells all (`--log debug`) has kept as much of an image as it can, if all but the last MiB came.
pub fn wait_kept(running: &mut Daemon, image: &Image) -> Result<()> {
    let end = (image.size - MIB) / PIECE_BYTES * PIECE_BYTES;
    let word = format!("end={end}");
    running
        .wait_for_line(END_TIMEOUT, |line| (line.contains("is kept") && line.contains(&word)).then_some(()))
}

/// Checks that so many bytes passed, where `undisturbed` ones do else, and at most `again_max` were among them that had passed
/// before.
pub fn assert_again(passed: u64, undisturbed: u64, again_max: u64) {
    // Zeros are not always sent.
    assert!(
        passed >= undisturbed - undisturbed / 50,
        "only {passed} bytes passed, undisturbed it is {undisturbed}"
    );
    let again = passed.saturating_sub(undisturbed);
    // For docs/faults.md, with --nocapture.
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    eprintln!("{test}: {again} of {undisturbed} bytes passed again");
    assert!(again <= again_max, "{again} of {undisturbed} bytes passed again, at most {again_max} may");
}

/// Debian's registry with an image in it, behind a relay.
pub struct Elsewhere {
    root: TempDir,
    registry: Option<PeerRegistry>,
    pub from: Relay,
}

impl Elsewhere {
    pub fn with(image: &Image) -> Result<Self> {
        let root = temp_dir();
        let registry = PeerRegistry::debian(root.path())?;
        let from = Relay::start(registry.address())?;
        let elsewhere = Self { root, registry: Some(registry), from };
        elsewhere.now(image)?;
        Ok(elsewhere)
    }

    /// Gives the tag to an image.
    pub fn now(&self, image: &Image) -> Result<()> {
        let registry = self.registry.as_ref().context("a running registry")?;
        run(&importing(utf8(&image.file), &registry.reference("team/disk:1"))?).map(drop)
    }

    pub fn source(&self) -> String {
        format!("docker://{}", self.reference("team/disk:1"))
    }

    /// An image there, by way of the relay.
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.from.address())
    }

    /// The registry dies, as by a power cut.
    pub fn kill(&mut self) {
        self.registry = None;
    }

    pub fn restart(&mut self) -> Result<()> {
        let registry = PeerRegistry::debian(self.root.path())?;
        self.from.lead_to(registry.address());
        self.registry = Some(registry);
        Ok(())
    }

    /// Damages the layer with the disk.
    pub fn damage(&self, position: u64) -> Result<Damage> {
        Damage::to_layer(self.root.path(), position)
    }
}

/// A bit of a layer with a disk that a registry's disk has damaged, until it is mended.
pub struct Damage {
    file: fs::File,
    position: u64,
    byte: u8,
}

impl Damage {
    /// Of the layer in the registry's directory, the only large file there is.
    pub fn to_layer(root: &Path, position: u64) -> Result<Self> {
        let blobs = root.join("docker/registry/v2/blobs/sha256");
        let found = run(&cmd("find", [utf8(&blobs), "-name", "data", "-size", "+16M"]))?;
        let path = found.lines().next().context("a layer")?;
        let file = fs::File::options().read(true).write(true).open(path)?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, position)?;
        file.write_all_at(&[byte[0] ^ 1], position)?;
        Ok(Self { file, position, byte: byte[0] })
    }

    pub fn mend(self) -> Result<()> {
        Ok(self.file.write_all_at(&[self.byte], self.position)?)
    }
}
