//! `dvcr registry`.

mod access;

use std::fmt;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Subcommand;
use dvcr_registry::inventory::{Inventory, Listed, Usage};
use dvcr_registry::{
    Collected, Collection, Config, Outcome, Pattern, Quota, Registry, Rules, Schedule, Task, control,
    parse_time,
};
use indicatif::ProgressBar;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use self::access::AccessArgs;
use super::Output;
use crate::size::Human;
use crate::work::{self, Signals};

/// How often a line tells how far a task is, where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Serves an OCI registry from a directory, in the layout of CNCF distribution
///
/// On a loopback address anybody is served over plain HTTP; elsewhere the registry wants to know who may use it, and a
/// certificate. SIGUSR1 collects garbage; SIGHUP reads the files with secrets and certificates again.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Debug, Subcommand)]
enum Command {
    Ls(Ls),
    Du(Du),
    Check(Check),
    Rm(Rm),
    Gc(Gc),
    Scrub(Scrub),
}

/// Where a command looks.
#[derive(Debug, clap::Args)]
struct Place {
    /// Directory that holds the registry's data
    #[arg(long, value_name = "DIR")]
    root: PathBuf,

    /// Repositories, as in `vi/*` or `vi/**`; all by default
    #[arg(value_name = "PATTERN")]
    repositories: Option<Pattern>,

    /// How to print the answer
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,
}

/// Lists tags: what they name, how much that is, when they were pushed
///
/// JSON is one object per line.
#[derive(Debug, clap::Args)]
struct Ls {
    #[command(flatten)]
    place: Place,

    /// Also manifests that no tag names
    #[arg(long)]
    untagged: bool,
}

/// Tells how much space repositories take, the largest first
///
/// A blob that several repositories have is stored once; OWN counts what only this one has.
#[derive(Debug, clap::Args)]
struct Du {
    #[command(flatten)]
    place: Place,
}

/// Checks that all is there that tags and manifests refer to
///
/// The content of blobs is not read. Exit codes: 0 sound, 1 it could not be checked, 2 something is missing or damaged.
#[derive(Debug, clap::Args)]
struct Check {
    #[command(flatten)]
    place: Place,
}

/// Deletes a tag, a manifest, or all of a repository
///
/// What only they needed is freed by the next collection of garbage.
#[derive(Debug, clap::Args)]
struct Rm {
    /// Directory that holds the registry's data
    #[arg(long, value_name = "DIR")]
    root: PathBuf,

    /// REPOSITORY:TAG, REPOSITORY@DIGEST, or with --all REPOSITORY
    #[arg(value_name = "REFERENCE")]
    reference: String,

    /// Delete all tags and manifests of the repository
    #[arg(long)]
    all: bool,
}

#[derive(Debug, clap::Args)]
struct Serve {
    /// Directory that holds the registry's data; made if it is not there
    #[arg(long, value_name = "DIR", required = true)]
    root: Option<PathBuf>,

    /// Address and port to listen on; port 0 takes a free one, which the log tells
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5000")]
    listen: SocketAddr,

    /// When garbage is collected: five fields of cron, in UTC, or `off`
    #[arg(long, value_name = "CRON", default_value = "0 2 * * *", value_parser = schedule)]
    gc_schedule: MaybeSchedule,

    /// Repositories whose manifests may refer to what is not there, such as `mirror/**`; may be given several times
    #[arg(long, value_name = "PATTERN")]
    allow_sparse_manifests: Vec<Pattern>,

    #[command(flatten)]
    collection: CollectionArgs,

    /// Bytes per second that are read again in the background to find damage, at most, or `off`
    #[arg(long, value_name = "SIZE", default_value = "8M", value_parser = scrub_rate)]
    scrub_rate: MaybeRate,

    /// Bytes that all repositories below a prefix may have, as in vi/ns1/=100G, or vi/*/=50G for each name in place of
    /// the star; the longest prefix counts; may be repeated
    #[arg(long, value_name = "PREFIX=SIZE", value_parser = quota)]
    quota: Vec<Quota>,

    /// Free bytes that uploads leave; by default 1 GiB, or a twentieth of the volume if that is less
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse)]
    reserve_space: Option<u64>,

    /// Requests per second that one user, or one address where there are no users, may make; no bound by default
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    request_rate: Option<u32>,

    /// How long a client may take to send, or to read, the next 16 KiB of a body, such as 30s
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
    idle_timeout: Duration,

    /// Requests that bring content at a time; others wait 10 s and are then told to come again
    #[arg(long, value_name = "N", default_value_t = 40)]
    uploads_max: usize,

    /// Connections at a time; others wait
    #[arg(long, value_name = "N", default_value_t = 1024)]
    connections_max: usize,

    #[command(flatten)]
    access: AccessArgs,
}

/// As [`MaybeSchedule`].
type MaybeRate = Option<u64>;

/// Spelled so, a value of its own for the parser of arguments, and not one that may be left out.
type MaybeSchedule = Option<Schedule>;

/// Removes what no manifest needs any more, while the registry goes on
///
/// Works by way of the registry that serves the directory, or, if there is none, on the directory itself. Interrupted, it
/// leaves the rest for the next time.
#[derive(Debug, clap::Args)]
struct Gc {
    /// Directory that holds the registry's data
    #[arg(long, value_name = "DIR")]
    root: PathBuf,

    /// Only tell what would be removed
    #[arg(long)]
    dry_run: bool,

    /// How to print the answer
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,

    #[command(flatten)]
    collection: CollectionArgs,
}

/// Reads all blobs once and puts damaged ones aside, while the registry goes on
///
/// Clients are then told that a damaged blob is unknown, and the next push of it heals it. Works by way of the registry
/// that serves the directory, or, if there is none, on the directory itself. The registry's log names damaged
/// blobs and who has them. Exit codes: 0 sound, 1 not all could be read, 2 blobs are damaged.
#[derive(Debug, clap::Args)]
struct Scrub {
    /// Directory that holds the registry's data
    #[arg(long, value_name = "DIR")]
    root: PathBuf,

    /// Bytes read per second, at most, such as 100M
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse)]
    rate: Option<u64>,

    /// How to print the answer
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,
}

/// How garbage is collected; of a command only when nobody serves the directory.
#[derive(Debug, clap::Args)]
struct CollectionArgs {
    /// How long a blob may wait for the manifest that refers to it, such as 90s, 30m, 1h
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_time)]
    gc_grace: Duration,

    /// How long an upload may rest before it is given up, such as 12h, 7d
    #[arg(long, value_name = "TIME", default_value = "7d", value_parser = parse_time)]
    upload_age: Duration,

    /// File of rules about what is kept and what never changes (YAML; docs/garbage-collection.md)
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,

    /// Files that are removed per second, at most
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..))]
    gc_rate: u32,
}

impl CollectionArgs {
    /// Sets what is asked for; the schedule is none.
    fn apply(&self, config: &mut Config) -> anyhow::Result<()> {
        config.collection = Collection {
            schedule: None,
            grace: self.gc_grace,
            upload_age: self.upload_age,
            removals_per_second: self.gc_rate,
        };
        if let Some(file) = &self.rules {
            config.rules = rules(file)?;
        }
        Ok(())
    }
}

fn rules(file: &Path) -> anyhow::Result<Rules> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    serde_saphyr::from_str(&text).with_context(|| format!("{} holds no rules", file.display()))
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Some(Command::Ls(args)) => list(&args),
        Some(Command::Du(args)) => usage(&args.place),
        Some(Command::Check(args)) => return check(&args.place),
        Some(Command::Rm(args)) => remove(&args),
        Some(Command::Gc(args)) => collect(&args),
        Some(Command::Scrub(args)) => return search(&args),
        None => serve(args.serve),
    }
    .map(|()| ExitCode::SUCCESS)
}

fn serve(args: Serve) -> anyhow::Result<()> {
    let root = args.root.context("the argument --root is missing")?;
    let mut config = Config::new(&root);
    args.collection.apply(&mut config)?;
    config.collection.schedule = args.gc_schedule;
    config.rules.sparse_manifests.extend(args.allow_sparse_manifests);
    args.access.apply(args.listen, &mut config)?;
    config.scrub.rate = args.scrub_rate;
    config.limits.quotas = args.quota;
    config.limits.reserve_bytes = args.reserve_space;
    config.limits.request_rate = args.request_rate;
    config.limits.idle_timeout = args.idle_timeout;
    (config.uploads_max, config.connections_max) = (args.uploads_max, args.connections_max);
    work::runtime()?.block_on(async {
        let mut signals = Signals::listen()?;
        let mut wanted = signal(SignalKind::user_defined1()).context("cannot listen for SIGUSR1")?;
        let mut reread = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
        let registry = Registry::open(config)?;
        let listener = TcpListener::bind(args.listen)
            .await
            .with_context(|| format!("cannot listen on {}", args.listen))?;
        tracing::info!(addr = %listener.local_addr()?, root = %root.display(), "listening");
        let told = registry.clone();
        let ended = async {
            loop {
                tokio::select! {
                    signal = signals.next() => {
                        tracing::info!(?signal, "ending");
                        return;
                    }
                    Some(()) = wanted.recv() => told.collect_in_background(),
                    Some(()) = reread.recv() => {
                        let registry = told.clone();
                        // The log tells how it went.
                        let _ = tokio::task::spawn_blocking(move || registry.reload()).await;
                    }
                }
            }
        };
        Ok(dvcr_registry::serve(listener, registry, ended).await?)
    })
}

fn list(args: &Ls) -> anyhow::Result<()> {
    let Place { root, repositories, output } = &args.place;
    let inventory = Inventory::open(root)?;
    let mut out = BufWriter::new(io::stdout().lock());
    inventory.list(repositories.as_ref(), args.untagged, |listed| match output {
        Output::Json => writeln!(out, "{}", serde_json::to_string(&listed)?),
        Output::Human => {
            let Listed { repository, tag, digest, bytes, pushed, .. } = listed;
            let name = tag.map_or_else(|| repository.clone(), |tag| format!("{repository}:{tag}"));
            writeln!(out, "{:>10}  {}  {digest}  {name}", Human(bytes).to_string(), Utc(pushed))
        }
    })?;
    Ok(out.flush()?)
}

fn usage(place: &Place) -> anyhow::Result<()> {
    let usages = Inventory::open(&place.root)?.usage(place.repositories.as_ref())?;
    let mut out = BufWriter::new(io::stdout().lock());
    match place.output {
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&usages)?)?,
        Output::Human => {
            writeln!(out, "{:>10}  {:>10}  {:>8}  REPOSITORY", "BYTES", "OWN", "BLOBS")?;
            for Usage { repository, blobs, bytes, own_bytes } in &usages.repositories {
                let (bytes, own) = (Human(*bytes).to_string(), Human(*own_bytes).to_string());
                writeln!(out, "{bytes:>10}  {own:>10}  {blobs:>8}  {repository}")?;
            }
            let bytes = Human(usages.bytes).to_string();
            writeln!(out, "{bytes:>10}  {:>10}  {:>8}  all repositories, each blob once", "", usages.blobs)?;
        }
    }
    Ok(out.flush()?)
}

fn check(place: &Place) -> anyhow::Result<ExitCode> {
    let found = Inventory::open(&place.root)?.check(place.repositories.as_ref())?;
    match place.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&found)?),
        Output::Human => {
            found.messages.iter().for_each(|message| println!("{message}"));
            println!(
                "{} repositories, {} tags, {} manifests: {} missing, {} damaged, {} tags name nothing",
                found.repositories,
                found.tags,
                found.manifests,
                found.missing,
                found.damaged,
                found.empty_tags
            );
        }
    }
    Ok(if found.is_sound() { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

fn remove(args: &Rm) -> anyhow::Result<()> {
    let text = args.reference.as_str();
    let (repository, reference) = match (text.split_once('@'), text.rsplit_once(':')) {
        (Some((repository, digest)), _) => (repository, Some(digest)),
        (None, Some((repository, tag))) => (repository, Some(tag)),
        (None, None) => (text, None),
    };
    if args.all != reference.is_none() {
        bail!("name a tag or a digest, as in REPOSITORY:TAG, or a REPOSITORY with --all");
    }
    let (repository, reference) = (repository.to_owned(), reference.map(str::to_owned));
    match perform(Config::new(&args.root), &Task::Remove { repository, reference })? {
        Outcome::Removed(0) => bail!("{text} is not there"),
        _ => Ok(()),
    }
}

fn collect(args: &Gc) -> anyhow::Result<()> {
    let mut config = Config::new(&args.root);
    args.collection.apply(&mut config)?;
    let done = match perform(config, &Task::Collect { dry_run: args.dry_run })? {
        Outcome::Collected(done) => done,
        other => bail!("the registry gave the answer to another question: {other:?}"),
    };
    match args.output {
        Output::Human => print!("{}", human(&done)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&done)?),
    }
    Ok(())
}

/// Looks for damage.
fn search(args: &Scrub) -> anyhow::Result<ExitCode> {
    let done = match perform(Config::new(&args.root), &Task::Scrub { rate: args.rate })? {
        Outcome::Scrubbed(done) => done,
        other => bail!("the registry gave the answer to another question: {other:?}"),
    };
    match args.output {
        Output::Human => println!(
            "read {} blobs of {} in {:.1} s; {} are damaged",
            done.blobs,
            Human(done.bytes),
            done.seconds,
            done.damaged
        ),
        Output::Json => println!("{}", serde_json::to_string_pretty(&done)?),
    }
    Ok(if done.damaged == 0 { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

/// Does a task, and shows on standard error how far it is.
fn perform(config: Config, task: &Task) -> anyhow::Result<Outcome> {
    let bar = if io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    let mut told = Instant::now();
    let outcome = control::perform(config, task, |progress| {
        bar.set_message(progress.to_owned());
        bar.tick();
        if bar.is_hidden() && told.elapsed() >= LINE_INTERVAL {
            eprintln!("{progress}");
            told = Instant::now();
        }
    });
    bar.finish_and_clear();
    Ok(outcome?)
}

fn human(done: &Collected) -> String {
    format!(
        "{} {} tags, {} manifests, {} blobs and {} uploads of {} in {:.1} s; looked at {} repositories, {} manifests and \
         {} blobs\n",
        if done.dry_run { "would remove" } else { "removed" },
        done.removed_tags,
        done.removed_manifests,
        done.removed_blobs,
        done.removed_uploads,
        Human(done.freed_bytes),
        done.seconds,
        done.repositories,
        done.manifests,
        done.blobs,
    )
}

/// Seconds since 1970, shown as a date and time in UTC.
struct Utc(u64);

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time =
            i64::try_from(self.0).ok().and_then(|seconds| chrono::DateTime::from_timestamp(seconds, 0));
        match time {
            Some(time) => write!(f, "{}", time.format("%Y-%m-%d %H:%M")),
            None => f.write_str("-"),
        }
    }
}

fn quota(text: &str) -> Result<Quota, String> {
    let (prefix, size) = text.split_once('=').ok_or("write a prefix and a size, as in vi/ns1/=100G")?;
    Ok(Quota { prefix: prefix.parse()?, bytes: crate::size::parse(size)? })
}

/// Reads a rate; `off` is none.
fn scrub_rate(text: &str) -> Result<Option<u64>, String> {
    match text {
        "off" => Ok(None),
        _ => match crate::size::parse(text)? {
            0 => Err("a rate of 0 never ends; write `off`".to_owned()),
            rate => Ok(Some(rate)),
        },
    }
}

/// Reads a schedule; `off` is none.
fn schedule(text: &str) -> Result<Option<Schedule>, String> {
    match text {
        "off" => Ok(None),
        _ => text.parse().map(Some),
    }
}
