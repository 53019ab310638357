//! `dvcr registry`.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Subcommand;
use dvcr_registry::{
    Auth, Collected, Collection, Config, Htpasswd, Outcome, Registry, Rules, Schedule, Task, control, parse_time,
};
use indicatif::ProgressBar;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use super::Output;
use crate::size::Human;
use crate::work::{self, Signals};

/// How often a line tells how far a task is, where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Serves an OCI registry from a directory, in the layout of CNCF distribution
///
/// On a loopback address anybody is served; elsewhere the registry wants to know who may use it. SIGUSR1 collects
/// garbage.
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
    Gc(Gc),
}

#[derive(Debug, clap::Args)]
struct Serve {
    /// Directory that holds the registry's data; made if it is not there
    #[arg(long, value_name = "DIR", required = true)]
    root: Option<PathBuf>,

    /// Address and port to listen on; port 0 takes a free one, which the log tells
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5000")]
    listen: SocketAddr,

    /// File of users and bcrypt hashes, as `htpasswd -B` writes it; every request then needs one of them
    #[arg(long, value_name = "FILE")]
    htpasswd: Option<PathBuf>,

    /// Serve anybody, on any address
    #[arg(long, conflicts_with = "htpasswd")]
    allow_anonymous: bool,

    /// When garbage is collected: five fields of cron, in UTC, or `off`
    #[arg(long, value_name = "CRON", default_value = "0 2 * * *", value_parser = schedule)]
    gc_schedule: MaybeSchedule,

    #[command(flatten)]
    collection: CollectionArgs,
}

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
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        Some(Command::Gc(gc)) => collect(gc),
        None => serve(args.serve),
    }
}

fn serve(args: Serve) -> anyhow::Result<()> {
    let root = args.root.context("the argument --root is missing")?;
    let mut config = Config::new(&root);
    args.collection.apply(&mut config)?;
    config.collection.schedule = args.gc_schedule;
    config.auth = match &args.htpasswd {
        Some(file) => Auth::Htpasswd(Htpasswd::load(file)?),
        None if args.allow_anonymous || args.listen.ip().is_loopback() => Auth::Anonymous,
        None => bail!(
            "{} is not a loopback address: name the users with --htpasswd FILE, or serve anybody with \
             --allow-anonymous",
            args.listen
        ),
    };
    work::runtime()?.block_on(async {
        let mut signals = Signals::listen()?;
        let mut wanted = signal(SignalKind::user_defined1()).context("cannot listen for SIGUSR1")?;
        let registry = Registry::open(config)?;
        let listener = TcpListener::bind(args.listen)
            .await
            .with_context(|| format!("cannot listen on {}", args.listen))?;
        tracing::info!(addr = %listener.local_addr()?, root = %root.display(), "listening");
        let collector = registry.clone();
        let ended = async {
            loop {
                tokio::select! {
                    signal = signals.next() => {
                        tracing::info!(?signal, "ending");
                        return;
                    }
                    Some(()) = wanted.recv() => collector.collect_in_background(),
                }
            }
        };
        Ok(dvcr_registry::serve(listener, registry, ended).await?)
    })
}

fn collect(args: Gc) -> anyhow::Result<()> {
    let mut config = Config::new(&args.root);
    args.collection.apply(&mut config)?;
    let Outcome::Collected(done) = perform(config, &Task::Collect { dry_run: args.dry_run })?;
    match args.output {
        Output::Human => print!("{}", human(&done)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&done)?),
    }
    Ok(())
}

/// Does a task, and shows on standard error how far it is.
fn perform(config: Config, task: &Task) -> anyhow::Result<Outcome> {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
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

/// Reads a schedule; `off` is none.
fn schedule(text: &str) -> Result<Option<Schedule>, String> {
    match text {
        "off" => Ok(None),
        _ => text.parse().map(Some),
    }
}
