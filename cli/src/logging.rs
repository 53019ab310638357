//! Structured logs on standard error.

use std::io::{IsTerminal, stderr};

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// How to log.
#[derive(Debug, clap::Args)]
pub struct Args {
    // Global arguments share their ids with every command, so these begin with `log_`.
    /// What to log: a level (error, warn, info, debug, trace) or per module, as in `info,dvcr_registry=debug`
    #[arg(
        id = "log_filter",
        long = "log",
        env = "DVCR_LOG",
        default_value = "info",
        value_name = "FILTER",
        global = true
    )]
    filter: String,

    /// One line of text, or one JSON object, per event
    #[arg(
        id = "log_format",
        long = "log-format",
        env = "DVCR_LOG_FORMAT",
        default_value = "text",
        value_name = "FORMAT",
        global = true
    )]
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Starts logging; a filter that cannot be parsed falls back to `info` and says so.
pub fn init(args: &Args) {
    let (filter, bad) = match EnvFilter::try_new(&args.filter) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    match args.format {
        Format::Text => logs.with_ansi(stderr().is_terminal()).init(),
        Format::Json => logs.json().init(),
    }
    if let Some(error) = bad {
        tracing::warn!(filter = args.filter, %error, "log filter not understood, logging at info");
    }
}
