//! Into a registry: a file by HTTP, an image of another registry; and from HTTP through the registry to a raw disk.
//!
//! Every run has an empty registry to go into. The source is a registry too: it serves the bare file by HTTP.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use crate::converter::{make_sources, measure, version};
use crate::pipeline::{Image, put_blob};
use crate::registry::Fresh;
use crate::table::{Against, Better, Table};

/// Images, and the files of the converter's suite that they are of.
const SOURCES: [(&str, &str); 2] = [("qcow2 plain", "plain.qcow2"), ("qcow2 zlib", "zlib.qcow2")];

const OURS: &str = "dvcr";

/// Runs every row and prints tables of seconds, CPU seconds and peak memory of the clients.
pub fn run(
    dvcr: &Path,
    qemu_img: &Path,
    content: &Path,
    dir: &Path,
    rounds: usize,
    only: &str,
) -> anyhow::Result<()> {
    ensure!(dvcr.exists(), "{} is not there: cargo build --release", dvcr.display());
    let version = version(qemu_img)?;
    let sources = dir.join("sources");
    make_sources(qemu_img, content, &sources, |file| SOURCES.iter().any(|(_, wanted)| *wanted == file))?;
    let source = Fresh::start("dvcr", dvcr, dir)?;
    let images: Vec<Image> = SOURCES
        .iter()
        .map(|(row, file)| Image::push(dvcr, row, &sources.join(file), &source.server, None))
        .collect::<anyhow::Result<_>>()?;
    let work = tempfile::tempdir_in(dir)?;
    let (out, scratch) = (work.path().join("out"), work.path().join("scratch"));
    let place = Place { dvcr, qemu_img, source: &source, out, scratch };
    let mut tables = [Table::default(), Table::default(), Table::default()];
    for round in 0..rounds {
        for (row, mut contest) in images.iter().flat_map(|image| place.rows(image)) {
            if !row.contains(only) {
                continue;
            }
            let first = round % contest.len();
            contest.rotate_left(first);
            for (name, script) in contest {
                eprintln!("round {} of {rounds}: {row}: {name}", round + 1);
                let destination = Fresh::start("dvcr", dvcr, dir)?;
                // What goes into a registry leaves this empty; the registry has synced what it acknowledged.
                std::fs::File::create(&place.out)?;
                let mut command = Command::new("sh");
                command.args(["-ec", &script]).env("TO", destination.server.addr.to_string());
                let sample = measure(&mut command, &place.out).with_context(|| name.to_owned())?;
                let values = [sample.seconds, sample.cpu_seconds, sample.rss_mib];
                for (table, value) in tables.iter_mut().zip(values) {
                    table.add(&row, Better::Lower, name, value);
                }
                let _ = std::fs::remove_file(&place.scratch);
            }
        }
    }
    println!("{rounds} rounds; {version}\n");
    let titles = [
        "Seconds until the registry has acknowledged the image, or the raw file is on the disk",
        "CPU seconds of the clients, user and system",
        "Peak RSS of the clients, MiB",
    ];
    for (title, table) in titles.iter().zip(&tables) {
        println!("{title}:\n");
        table.print(Against::Each);
        println!();
    }
    Ok(())
}

struct Place<'a> {
    dvcr: &'a Path,
    qemu_img: &'a Path,
    source: &'a Fresh,
    out: PathBuf,
    scratch: PathBuf,
}

/// Who competes, and its script; `$TO` is the registry to go into. The first is us.
type Contest = Vec<(&'static str, String)>;

impl Place<'_> {
    fn rows(&self, image: &Image) -> Vec<(String, Contest)> {
        let (dvcr, qemu_img) = (self.dvcr.display(), self.qemu_img.display());
        let (out, scratch) = (self.out.display(), self.scratch.display());
        let from = self.source.server.addr;
        let url = image.url(from);
        let stored = format!("{from}/{}:1", image.name);
        let by_http = vec![
            (OURS, format!("'{dvcr}' import '{url}' $TO/x:1")),
            (
                "curl, sha256sum, curl -T",
                format!(
                    "curl -sf -o '{scratch}' '{url}'; digest=$(sha256sum '{scratch}' | cut -d' ' -f1); {}",
                    put_blob("$TO", &scratch.to_string())
                ),
            ),
        ];
        let by_registry = vec![
            (OURS, format!("'{dvcr}' import docker://{stored} $TO/x:1")),
            (
                "skopeo copy",
                format!(
                    "skopeo copy --src-tls-verify=false --dest-tls-verify=false docker://{stored} docker://$TO/x:1"
                ),
            ),
        ];
        let to_disk = vec![
            (OURS, format!("'{dvcr}' import '{url}' $TO/x:1; '{dvcr}' populate $TO/x:1 '{out}'")),
            (
                "scratch, qemu-img -t writeback",
                format!(
                    "curl -sf -o '{scratch}' '{url}'; sync '{scratch}'; \
                     '{qemu_img}' convert -f qcow2 -t writeback -m 1 -O raw '{scratch}' '{out}'"
                ),
            ),
        ];
        let row = |what: &str, contest| (format!("{}, {what}", image.row), contest);
        vec![
            row("http to registry", by_http),
            row("registry to registry", by_registry),
            row("http to raw disk", to_disk),
        ]
    }
}
