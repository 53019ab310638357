//! Measures `dvcr` beside its peers: the same work, on the same disk, in one run, interleaved round by round.
//!
//! ```text
//! registry.rs   servers (dvcr, CNCF distribution v3, Debian's docker-registry) x rows (push, pull, ...)
//! bucket.rs     dvcr and CNCF distribution v3 in a bucket of MinIO x the same rows, and lists and garbage
//! scale.rs      the same servers on directories of few and of many blobs
//! converter.rs  converters (dvcr, qemu-img) x rows (each format -> raw, qcow2 -> each format)
//! import.rs     into a registry (dvcr, curl, skopeo), and from HTTP to a raw file (dvcr, scratch and qemu-img)
//! pipeline.rs   from a registry to a raw file (dvcr, scratch and qemu-img, nbdkit) x rows (plain, zlib), near and far
//! relay.rs      the far end of a long line
//! memory.rs     what writing a large disk adds to the memory of a control group
//! http.rs       a load maker on plain sockets, cheaper than any server it measures
//! table.rs      medians, spread and ratios as Markdown
//! ```
//!
//! It prints tables and judges nothing; `benches/RESULTS.md` keeps the ones worth keeping.

mod bucket;
mod converter;
mod http;
mod import;
mod memory;
mod pipeline;
mod registry;
mod relay;
mod scale;
mod table;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Cli {
    /// The dvcr binary to measure; build it with --release
    #[arg(long, default_value = "target/release/dvcr")]
    dvcr: PathBuf,
    /// Folder on the disk to measure; a new folder is made inside it and removed at the end
    #[arg(long, default_value = ".cache/bench")]
    dir: PathBuf,
    /// Rounds per row; the table shows medians
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Subcommand)]
enum Suite {
    /// Push, pull, chunked push, manifest GET, blob HEAD, 4 KiB blobs
    Registry {
        /// CNCF distribution v3's `registry` program
        #[arg(long, default_value = ".cache/tools/bin/registry")]
        distribution: PathBuf,
        /// Debian's docker-registry
        #[arg(long, default_value = ".cache/tools/bin/docker-registry")]
        debian: PathBuf,
        /// MiB of the large blob
        #[arg(long, default_value_t = 1024)]
        blob_mib: usize,
    },
    /// The same in a bucket of MinIO, and: pushes at once, a list of tags, garbage
    RegistryBucket {
        /// CNCF distribution v3's `registry` program
        #[arg(long, default_value = ".cache/tools/bin/registry")]
        distribution: PathBuf,
        /// The S3 server
        #[arg(long, default_value = ".cache/tools/bin/minio")]
        minio: PathBuf,
        /// MiB of the large blob
        #[arg(long, default_value_t = 1024)]
        blob_mib: usize,
        /// Tags of the repository that is listed
        #[arg(long, default_value_t = 10_000)]
        tags: usize,
        /// Blobs that are collected; 0 leaves that out
        #[arg(long, default_value_t = 100_000)]
        garbage: usize,
    },
    /// Start, requests and garbage collection with few and with many blobs
    RegistryScale {
        /// CNCF distribution v3's `registry` program
        #[arg(long, default_value = ".cache/tools/bin/registry")]
        distribution: PathBuf,
        /// Blobs of a directory; a million take 17 GB, 6 million inodes and some minutes to make
        #[arg(long, value_delimiter = ',', default_value = "1000,1000000")]
        blobs: Vec<usize>,
    },
    /// Disk images to raw and back
    Converter {
        /// Folder whose files fill the test disk
        #[arg(long, default_value = "/usr")]
        content: PathBuf,
        /// The qemu-img to compete with; tools/qemu10.sh makes the default
        #[arg(long, default_value = ".cache/tools/bin/qemu-img-10")]
        qemu_img: PathBuf,
        /// Run only the rows whose names contain this
        #[arg(long, default_value = "")]
        only: String,
    },
    /// Into a registry by HTTP and from another registry, and from HTTP to a raw file, beside curl, skopeo and qemu-img
    Import {
        /// Folder whose files fill the test disk
        #[arg(long, default_value = "/usr")]
        content: PathBuf,
        /// The qemu-img to compete with; tools/qemu10.sh makes the default
        #[arg(long, default_value = ".cache/tools/bin/qemu-img-10")]
        qemu_img: PathBuf,
        /// Run only the rows whose names contain this
        #[arg(long, default_value = "")]
        only: String,
    },
    /// From a registry to a synced raw file, beside scratch and qemu-img, nbdkit and curl
    Pipeline {
        /// Folder whose files fill the test disk
        #[arg(long, default_value = "/usr")]
        content: PathBuf,
        /// The qemu-img to compete with; tools/qemu10.sh makes the default
        #[arg(long, default_value = ".cache/tools/bin/qemu-img-10")]
        qemu_img: PathBuf,
        /// Debian's docker-registry
        #[arg(long, default_value = ".cache/tools/bin/docker-registry")]
        debian: PathBuf,
        /// Run only the rows whose names contain this: plain, zlib, far
        #[arg(long, default_value = "")]
        only: String,
    },
    /// What writing a disk adds to the memory of a control group, the page cache included; needs root
    PipelineMemory {
        /// GiB of the disk, all of it data; three times as much is needed for a while
        #[arg(long, default_value_t = 10)]
        gib: u64,
        /// An empty block device to write to as well, which loses what it has
        #[arg(long)]
        device: Option<PathBuf>,
    },
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    std::fs::create_dir_all(&cli.dir)?;
    let dir = std::fs::canonicalize(&cli.dir)?;
    // Where version 10 cannot be had, the machine's own has to do.
    let own_if_none =
        |qemu_img: PathBuf| if qemu_img.exists() { qemu_img } else { PathBuf::from("qemu-img") };
    match cli.suite {
        Suite::Registry { distribution, debian, blob_mib } => {
            registry::run(&cli.dvcr, &distribution, &debian, &dir, cli.rounds, blob_mib << 20)
        }
        Suite::RegistryBucket { distribution, minio, blob_mib, tags, garbage } => {
            let amounts = bucket::Amounts { rounds: cli.rounds, blob_bytes: blob_mib << 20, tags, garbage };
            bucket::run(&cli.dvcr, &distribution, &minio, &dir, &amounts)
        }
        Suite::RegistryScale { distribution, blobs } => scale::run(&cli.dvcr, &distribution, &dir, &blobs),
        Suite::Converter { content, qemu_img, only } => {
            converter::run(&cli.dvcr, &own_if_none(qemu_img), &content, &dir, cli.rounds, &only)
        }
        Suite::Import { content, qemu_img, only } => {
            import::run(&cli.dvcr, &own_if_none(qemu_img), &content, &dir, cli.rounds, &only)
        }
        Suite::Pipeline { content, qemu_img, debian, only } => {
            let programs = pipeline::Programs { dvcr: cli.dvcr, qemu_img: own_if_none(qemu_img), debian };
            pipeline::run(&programs, &content, &dir, cli.rounds, &only)
        }
        Suite::PipelineMemory { gib, device } => memory::run(&cli.dvcr, &dir, gib, device.as_deref()),
    }
}
