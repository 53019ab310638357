//! `dvcr registry`.

mod settings;

use std::fmt;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Subcommand;
use dvcr_registry::inventory::{Inventory, Listed, Usage};
use dvcr_registry::{Collected, Config, Outcome, Pattern, Registry, Size, Task, Time, control};
use indicatif::ProgressBar;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use self::settings::{Given, Home, Settings};
use super::Output;
use crate::size::Human;
use crate::work::{self, Signals};

/// How often a line tells how far a task is, where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// How long a registry that has ended waits for threads that do not end.
const WIND_DOWN: Duration = Duration::from_secs(10);

/// Serves an OCI registry from a directory or an S3 bucket, in the layout of CNCF distribution
///
/// On a loopback address anybody is served over plain HTTP; elsewhere the registry wants to know who may use it, and a
/// certificate. SIGUSR1 collects garbage; SIGHUP reads the files with secrets and certificates again.
///
/// Every setting can also be a key of the file that --config names, and one with a single value a variable:
/// DVCR_REGISTRY_GC_GRACE for --gc-grace. A flag counts more than a variable, and that more than the file.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Given,
}

#[derive(Debug, Subcommand)]
enum Command {
    Ls(Ls),
    Du(Du),
    Check(Check),
    Rm(Rm),
    Gc(Gc),
    Scrub(Scrub),
    Migrate(Migrate),
}

/// Where a command looks.
#[derive(Debug, clap::Args)]
struct Place {
    #[command(flatten)]
    home: Home,

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

    /// Repositories where what is missing is no damage, such as `mirror/**`; by default as the settings have it
    #[arg(long, value_name = "PATTERN")]
    allow_sparse_manifests: Vec<Pattern>,
}

/// Deletes a tag, a manifest, or all of a repository
///
/// What only they needed is freed by the next collection of garbage.
#[derive(Debug, clap::Args)]
struct Rm {
    #[command(flatten)]
    home: Home,

    /// REPOSITORY:TAG, REPOSITORY@DIGEST, or with --all REPOSITORY
    #[arg(value_name = "REFERENCE")]
    reference: String,

    /// Delete all tags and manifests of the repository
    #[arg(long)]
    all: bool,
}

/// Removes what no manifest needs any more, while the registry goes on
///
/// Works by way of the registry that serves the directory, or, if there is none, on the directory itself. Interrupted, it
/// leaves the rest for the next time.
#[derive(Debug, clap::Args)]
struct Gc {
    #[command(flatten)]
    home: Home,

    /// Only tell what would be removed
    #[arg(long)]
    dry_run: bool,

    /// How to print the answer
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,

    /// How long a blob may wait for the manifest that refers to it; this and what follows only when nobody serves the
    /// directory, and by default as the settings have it
    #[arg(long, value_name = "TIME")]
    gc_grace: Option<Time>,

    /// How long an upload may rest before it is given up
    #[arg(long, value_name = "TIME")]
    upload_age: Option<Time>,

    /// Files that are removed per second, at most
    #[arg(long, value_name = "N")]
    gc_rate: Option<NonZeroU32>,
}

/// Reads all blobs once and puts damaged ones aside, while the registry goes on
///
/// Clients are then told that a damaged blob is unknown, and the next push of it heals it. Works by way of the registry
/// that serves the directory, or, if there is none, on the directory itself. The registry's log names damaged
/// blobs and who has them. Exit codes: 0 sound, 1 not all could be read, 2 blobs are damaged.
#[derive(Debug, clap::Args)]
struct Scrub {
    #[command(flatten)]
    home: Home,

    /// Bytes read per second, at most, such as 100M
    #[arg(long, value_name = "SIZE")]
    rate: Option<Size>,

    /// How to print the answer
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,
}

/// Copies a registry into another directory or bucket, while it goes on, and has it served from there
///
/// Works by way of the registry that serves --from on this machine, or, if there is none, itself. When all is copied and
/// compared, pushes and deletions wait for the moment that the last changes take, and the registry goes on with --to. Interrupted,
/// it changes nothing of what is served; the same again goes on where it was. --from is kept as it is, and not served any more;
/// start the registry with the settings of --to next time. docs/registry-migrate.md tells all.
#[derive(Debug, clap::Args)]
struct Migrate {
    /// Where the registry is: its file of settings, or its directory
    #[arg(long, value_name = "PLACE")]
    from: PathBuf,

    /// Where it goes: a file of settings, of which `root`, `bucket` and `single-replica` count, or a directory
    #[arg(long, value_name = "PLACE")]
    to: PathBuf,

    /// Copy and compare, but serve --from all the same
    #[arg(long)]
    copy_only: bool,

    /// Remove tags and manifests that --to has and --from has not
    #[arg(long)]
    prune: bool,

    /// How to print the answer
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Some(Command::Ls(args)) => list(&args),
        Some(Command::Du(args)) => usage(&args.place),
        Some(Command::Check(args)) => return check(&args),
        Some(Command::Rm(args)) => remove(&args),
        Some(Command::Gc(args)) => collect(&args),
        Some(Command::Scrub(args)) => return search(&args),
        Some(Command::Migrate(args)) => migrate(&args),
        None => serve(args.serve),
    }
    .map(|()| ExitCode::SUCCESS)
}

fn serve(given: Given) -> anyhow::Result<()> {
    let is_to_print = given.is_to_print();
    let settings = given.settle()?;
    if is_to_print {
        print!("{}", settings.print()?);
        return settings.check();
    }
    let listen = settings.listen;
    let config = settings.config()?;
    let root = config.root.clone();
    let runtime = work::runtime()?;
    let served = runtime.block_on(async {
        let mut signals = Signals::listen()?;
        let mut wanted = signal(SignalKind::user_defined1()).context("cannot listen for SIGUSR1")?;
        let mut reread = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
        let bucket = config.bucket.as_ref().map(|bucket| bucket.bucket.clone());
        let registry = Registry::open(config)?;
        let listener =
            TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
        tracing::info!(addr = %listener.local_addr()?, root = %root.display(), bucket, "listening");
        let told = registry.clone();
        let ended = async {
            loop {
                tokio::select! {
                    signal = signals.next() => {
                        tracing::info!(signal = signal.name(), "ending");
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
    });
    // What still waits for a disk or a bucket that does not answer has nothing to lose.
    runtime.shutdown_timeout(WIND_DOWN);
    served
}

fn list(args: &Ls) -> anyhow::Result<()> {
    let Place { home, repositories, output } = &args.place;
    let inventory = Inventory::open(&home.directory()?)?;
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
    let usages = Inventory::open(&place.home.directory()?)?.usage(place.repositories.as_ref())?;
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

fn check(args: &Check) -> anyhow::Result<ExitCode> {
    let mut settings = args.place.home.settings()?;
    if !args.allow_sparse_manifests.is_empty() {
        settings.allow_sparse_manifests.clone_from(&args.allow_sparse_manifests);
    }
    let inventory = Inventory::open(&settings.directory()?)?;
    let found = inventory.check(args.place.repositories.as_ref(), &settings.rules())?;
    match args.place.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&found)?),
        Output::Human => {
            found.messages.iter().for_each(|message| println!("{message}"));
            println!(
                "{} repositories, {} tags, {} manifests: {} missing, {} damaged, {} allowed gaps, {} tags name nothing",
                found.repositories,
                found.tags,
                found.manifests,
                found.missing,
                found.damaged,
                found.gaps,
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
    match perform(args.home.settings()?.upkeep()?, &Task::Remove { repository, reference })? {
        Outcome::Removed(0) => bail!("{text} is not there"),
        _ => Ok(()),
    }
}

fn collect(args: &Gc) -> anyhow::Result<()> {
    let mut settings = args.home.settings()?;
    settings.gc_grace = args.gc_grace.unwrap_or(settings.gc_grace);
    settings.upload_age = args.upload_age.unwrap_or(settings.upload_age);
    settings.gc_rate = args.gc_rate.unwrap_or(settings.gc_rate);
    let done = match perform(settings.upkeep()?, &Task::Collect { dry_run: args.dry_run })? {
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
    let done = match perform(
        args.home.settings()?.upkeep()?,
        &Task::Scrub { rate: args.rate.map(|Size(rate)| rate) },
    )? {
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

/// Moves a registry.
fn migrate(args: &Migrate) -> anyhow::Result<()> {
    let mut from = Settings::of_place(&args.from)?;
    let to =
        Settings::of_place(&args.to)?.place().with_context(|| format!("of --to {}", args.to.display()))?;
    if from.clone().place()?.to_string() == to.to_string() {
        bail!("--from and --to are both {to}");
    }
    // Of a bucket that is not served on this machine: what a replica has for itself is needed for as long as this takes.
    let own = tempfile::tempdir().context("cannot make a directory for what is needed meanwhile")?;
    if from.bucket.is_some() {
        from.root.get_or_insert_with(|| own.path().to_owned());
    }
    let task = Task::Migrate { to: Box::new(to), prune: args.prune, copy_only: args.copy_only };
    let done = match perform(from.upkeep()?, &task)? {
        Outcome::Migrated(done) => done,
        other => bail!("the registry gave the answer to another question: {other:?}"),
    };
    match args.output {
        Output::Human => {
            println!(
                "copied {} manifests, {} tags and {} blobs, {}, in {:.1} s, and removed {}",
                done.manifests,
                done.tags,
                done.blobs,
                Human(done.bytes),
                done.seconds,
                done.removed
            );
            match done.switched {
                true => println!(
                    "the registry is in {} now; changes waited for {:.1} s. Start it with the settings of that from now on",
                    done.to, done.paused_seconds
                ),
                false => println!("{} is like the registry, which is served as before", done.to),
            }
        }
        Output::Json => println!("{}", serde_json::to_string_pretty(&done)?),
    }
    Ok(())
}

/// Does a task, and shows on standard error how far it is.
fn perform(config: Config, task: &Task) -> anyhow::Result<Outcome> {
    let bar = if io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    let mut told = Instant::now();
    let runtime = work::runtime()?;
    let _entered = runtime.enter();
    let stop = Arc::<AtomicBool>::default();
    let (mut signals, stopped) = (Signals::listen()?, Arc::clone(&stop));
    runtime.spawn(async move {
        signals.next().await;
        stopped.store(true, Ordering::Relaxed);
    });
    let outcome = control::perform(config, task, &stop, |progress| {
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
