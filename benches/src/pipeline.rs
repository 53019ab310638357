//! From a registry to a disk: the image is there, and a synced raw file is wanted.
//!
//! The peers read the bare file by HTTP from the same registry, where it is a blob of its own: they know no layers. All are served
//! by ours, and then by Debian's.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::converter::{SHARE_OF, SLOW_SHARE, make_sources, measure, success, version};
use crate::registry::Server;
use crate::relay::Relay;
use crate::table::{Against, Better, Table};

/// The long line: half a round trip, and the rate.
const FAR_DELAY: Duration = Duration::from_millis(10);
const FAR_BYTES_PER_SECOND: f64 = 100e6;

/// Rows, and the files of the converter's suite that they are of.
const SOURCES: [(&str, &str); 2] = [("qcow2 plain", "plain.qcow2"), ("qcow2 zlib", "zlib.qcow2")];

const OURS: &str = "dvcr";
/// What the rows are called whose image comes from there.
const FROM_DEBIAN: &str = ", from docker-registry 2.8";
const CURL: &str = "curl of the stored blob";

/// What runs.
pub struct Programs {
    pub dvcr: PathBuf,
    pub qemu_img: PathBuf,
    pub debian: PathBuf,
}

/// Runs every row and prints tables of seconds, CPU seconds and peak memory.
pub fn run(programs: &Programs, content: &Path, dir: &Path, rounds: usize, only: &str) -> anyhow::Result<()> {
    let Programs { dvcr, qemu_img, debian } = programs;
    ensure!(dvcr.exists(), "{} is not there: cargo build --release", dvcr.display());
    let version = version(qemu_img)?;
    let sources = dir.join("sources");
    make_sources(qemu_img, content, &sources, |file| SOURCES.iter().any(|(_, wanted)| *wanted == file))?;
    let work = tempfile::tempdir_in(dir)?;
    let root = |name: &str| -> anyhow::Result<PathBuf> {
        let root = work.path().join(name);
        std::fs::create_dir(&root)?;
        Ok(root)
    };
    let ours = Server::start("dvcr", dvcr, &root("ours")?)?;
    let theirs = if debian.exists() {
        Some(Server::start("docker-registry", debian, &root("theirs")?)?)
    } else {
        eprintln!("{} is not there; going on without it", debian.display());
        None
    };
    let images: Vec<Image> = SOURCES
        .iter()
        .map(|(row, file)| Image::push(dvcr, row, &sources.join(file), &ours, theirs.as_ref()))
        .collect::<anyhow::Result<_>>()?;
    let far = Relay::start(ours.addr, FAR_DELAY, FAR_BYTES_PER_SECOND)?;
    let (out, scratch) = (work.path().join("out"), work.path().join("scratch"));
    let place = Place { programs, out: &out, scratch: &scratch };
    let servers: Vec<(&str, SocketAddr)> = std::iter::once(("", ours.addr))
        .chain(theirs.iter().map(|server| (FROM_DEBIAN, server.addr)))
        .collect();
    let rows: Vec<(String, &Image, SocketAddr)> = images
        .iter()
        .flat_map(|image| {
            servers.iter().map(move |(from, addr)| (format!("{}{from}", image.row), image, *addr))
        })
        .collect();
    let mut tables = [Table::default(), Table::default(), Table::default()];
    let mut far_table = Table::default();
    for round in 0..rounds {
        let slow_too = round < (rounds * SLOW_SHARE).div_ceil(SHARE_OF);
        for (row, image, server) in rows.iter().filter(|(row, ..)| row.contains(only)) {
            let mut contest = place.contest(image, *server);
            let first = round % contest.len();
            contest.rotate_left(first);
            for (name, slow, mut command) in contest {
                // Debian's registry takes minutes to serve the ranges that some of them ask for.
                let once = name != OURS && *server != ours.addr;
                if slow && !slow_too || once && round > 0 {
                    continue;
                }
                eprintln!("round {} of {rounds}: {row}: {name}", round + 1);
                // What nobody has read for a minute or two is not in the page cache any more: all find it there.
                image.warm(*server, name == OURS)?;
                let sample = measure(&mut command, &out).with_context(|| name.to_owned())?;
                let values = [sample.seconds, sample.cpu_seconds, sample.rss_mib];
                for (table, value) in tables.iter_mut().zip(values) {
                    table.add(row, Better::Lower, name, value);
                }
                let _ = std::fs::remove_file(&scratch);
            }
        }
        for image in images.iter().filter(|image| format!("{} far", image.row).contains(only)) {
            for name in [OURS, CURL] {
                eprintln!("round {} of {rounds}: {} far: {name}", round + 1, image.row);
                let seconds = match name {
                    CURL => {
                        let begun = Instant::now();
                        success(Command::new("curl").args(["-sf", "-o", "/dev/null", &image.url(far.addr)]))?;
                        begun.elapsed().as_secs_f64()
                    }
                    _ => measure(&mut place.populate(image, far.addr), &out)?.seconds,
                };
                far_table.add(image.row, Better::Lower, name, seconds);
            }
        }
    }
    println!(
        "{rounds} rounds (the slowest in {SLOW_SHARE} of {SHARE_OF}, the peers that docker-registry serves in one); {version}\n"
    );
    let titles =
        ["Seconds until the raw file is on the disk", "CPU seconds, user and system", "Peak RSS, MiB"];
    for (title, table) in titles.iter().zip(&tables) {
        println!("{title}:\n");
        table.print(Against::Each);
        println!();
    }
    println!(
        "Seconds over a line of {} ms round trip and {} MB/s:\n",
        2 * FAR_DELAY.as_millis(),
        FAR_BYTES_PER_SECOND / 1e6
    );
    far_table.print(Against::Each);
    Ok(())
}

/// A script that puts `file`, whose SHA-256 is in `$digest`, into a registry as a blob.
pub(crate) fn put_blob(registry: &str, file: &str) -> String {
    format!(
        "location=$(curl -sf -X POST -D - -o /dev/null http://{registry}/v2/bare/blobs/uploads/ | tr -d '\\r' | \
         sed -n 's/^[Ll]ocation: //p'); case $location in /*) location=http://{registry}$location;; esac; \
         case $location in *\\?*) location=\"$location&\";; *) location=\"$location?\";; esac; \
         curl -sf -T '{file}' \"${{location}}digest=sha256:$digest\""
    )
}

/// One file in the registries: as an image, and as a bare blob.
pub(crate) struct Image {
    pub(crate) row: &'static str,
    pub(crate) name: String,
    digest: String,
    /// The digest of the layer that the file is in, the same in each registry.
    layer: String,
}

impl Image {
    pub(crate) fn push(
        dvcr: &Path,
        row: &'static str,
        file: &Path,
        ours: &Server,
        theirs: Option<&Server>,
    ) -> anyhow::Result<Self> {
        let name = file.file_stem().and_then(|name| name.to_str()).context("a name")?.to_owned();
        eprintln!("importing {name}");
        for server in [Some(ours), theirs].into_iter().flatten() {
            success(Command::new(dvcr).arg("import").arg(file).arg(format!("{}/{name}:1", server.addr)))?;
        }
        let sum = Command::new("sha256sum").arg(file).output()?;
        let sum = String::from_utf8(sum.stdout)?;
        let sum = sum.split_whitespace().next().context("a checksum")?;
        let digest = format!("sha256:{sum}");
        for server in [Some(ours), theirs].into_iter().flatten() {
            let put = put_blob(&server.addr.to_string(), &file.display().to_string());
            success(Command::new("sh").args(["-ec", &format!("digest={sum}; {put}")]))?;
        }
        let manifest = Command::new("curl")
            .args(["-sf", &format!("http://{}/v2/{name}/manifests/1", ours.addr)])
            .output()?;
        let manifest: serde_json::Value = serde_json::from_slice(&manifest.stdout).context("a manifest")?;
        let layer = manifest["layers"][0]["digest"].as_str().context("a layer")?.to_owned();
        Ok(Self { row, name, digest, layer })
    }

    /// Reads what is fetched next: a layer of the image, or the bare file.
    fn warm(&self, server: SocketAddr, as_image: bool) -> anyhow::Result<()> {
        let url = match as_image {
            true => format!("http://{server}/v2/{}/blobs/{}", self.name, self.layer),
            false => self.url(server),
        };
        success(Command::new("curl").args(["-sf", "-o", "/dev/null", &url]))
    }

    /// Where the bare file is.
    pub(crate) fn url(&self, server: SocketAddr) -> String {
        format!("http://{server}/v2/bare/blobs/{}", self.digest)
    }
}

struct Place<'a> {
    programs: &'a Programs,
    out: &'a Path,
    scratch: &'a Path,
}

impl Place<'_> {
    fn populate(&self, image: &Image, server: SocketAddr) -> Command {
        let mut command = Command::new(&self.programs.dvcr);
        command.arg("populate").arg(format!("{server}/{}:1", image.name)).arg(self.out);
        command
    }

    /// Who competes, whether it takes long, and what it runs. The first is us.
    fn contest(&self, image: &Image, server: SocketAddr) -> Vec<(&'static str, bool, Command)> {
        let slow = image.row.contains("zlib");
        let url = image.url(server);
        let mut contest = vec![(OURS, false, self.populate(image, server))];
        let qemu_img = self.programs.qemu_img.display();
        let (out, scratch) = (self.out.display(), self.scratch.display());
        let nbdkit = format!("nbdkit -U - -r -f --filter=readahead --filter=retry curl url={url} --run");
        let ways = [
            (
                "scratch, qemu-img -t writeback",
                format!(
                    "curl -sf -o '{scratch}' {url} && sync '{scratch}' && \
                     '{qemu_img}' convert -f qcow2 -t writeback -m 1 -O raw '{scratch}' '{out}'"
                ),
            ),
            (
                "nbdkit, qemu-img -t writeback",
                format!("{nbdkit} \"'{qemu_img}' convert -f qcow2 -t writeback -O raw \\$uri '{out}'\""),
            ),
            (
                "nbdkit, qemu-img -t none",
                format!("{nbdkit} \"'{qemu_img}' convert -f qcow2 -t none -O raw \\$uri '{out}'\""),
            ),
            (
                "nbdkit, qemu-nbd, nbdcopy",
                format!(
                    "{nbdkit} \"qemu-nbd -r -t -e 8 -f qcow2 --fork --pid-file='{scratch}' -k '{scratch}.sock' \\$uri; \
                     truncate -s \\$(nbdinfo --size 'nbd+unix:///?socket={scratch}.sock') '{out}'; \
                     nbdcopy --flush --destination-is-zero 'nbd+unix:///?socket={scratch}.sock' '{out}'; \
                     result=\\$?; kill \\$(cat '{scratch}'); exit \\$result\""
                ),
            ),
        ];
        contest.extend(ways.into_iter().map(|(name, script)| {
            let mut command = Command::new("sh");
            command.args(["-ec", &script]);
            (name, slow || name.starts_with("scratch"), command)
        }));
        contest
    }
}
