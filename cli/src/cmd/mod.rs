//! The commands, one file each.

mod check;
mod compare;
mod convert;
mod import;
mod info;
mod map;
mod populate;
mod registry;
mod upload;
mod uploader;

use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use crate::logging;

/// Takes virtual machine images from anywhere, keeps them in an OCI registry, turns them into bootable disks.
#[derive(Debug, Parser)]
#[command(name = "dvcr", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    pub log: logging::Args,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Registry(Box<registry::Args>),
    Import(import::Args),
    Populate(populate::Args),
    Upload(upload::Args),
    Uploader(Box<uploader::Args>),
    Info(info::Args),
    Map(map::Args),
    Check(check::Args),
    Compare(compare::Args),
    Convert(convert::Args),
}

impl Command {
    /// The exit code that says that the command failed.
    pub fn failure_code(&self) -> u8 {
        match self {
            // 1 is the answer that the disks differ.
            Command::Compare(_) => 2,
            _ => 1,
        }
    }
}

/// How a command prints its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Human,
    Json,
}

/// Runs one command to its end; most succeed or fail, some have more to say by their exit code.
pub fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Check(args) => return check::run(args),
        Command::Compare(args) => return compare::run(args),
        Command::Registry(args) => return registry::run(*args),
        Command::Uploader(args) => return uploader::run(*args),
        Command::Upload(args) => upload::run(args),
        Command::Import(args) => import::run(args),
        Command::Populate(args) => populate::run(args),
        Command::Info(args) => info::run(args),
        Command::Map(args) => map::run(args),
        Command::Convert(args) => convert::run(args),
    }
    .map(|()| ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// A global argument and a command's own that share an id would be taken for each other.
    #[test]
    fn no_command_reuses_the_id_of_a_global_argument() {
        let root = Cli::command();
        for sub in root.get_subcommands() {
            for arg in sub.get_arguments() {
                let taken = root.get_arguments().any(|global| global.get_id() == arg.get_id());
                assert!(!taken, "{} {}", sub.get_name(), arg.get_id());
            }
        }
    }

    /// The help people see is kept in `snapshots/`; `INSTA_UPDATE=always cargo test -p dvcr` renews it.
    #[test]
    fn help_texts_are_the_snapshots() {
        let mut root = Cli::command();
        root.build();
        insta::assert_snapshot!("dvcr", root.render_long_help());
        for sub in root.get_subcommands_mut().filter(|sub| sub.get_name() != "help") {
            insta::assert_snapshot!(format!("dvcr-{}", sub.get_name()), sub.render_long_help());
            for part in sub.clone().get_subcommands_mut().filter(|part| part.get_name() != "help") {
                let name = format!("dvcr-{}-{}", sub.get_name(), part.get_name());
                insta::assert_snapshot!(name, part.render_long_help());
            }
        }
    }
}
