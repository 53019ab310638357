//! The commands, one file each.

mod check;
mod clone;
mod compare;
mod convert;
mod import;
mod importer;
mod info;
mod map;
mod populate;
mod pvc_importer;
mod registry;
mod serve_nbd;
mod upload;
mod uploader;

use std::convert::Infallible;
use std::path::PathBuf;
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
    Import(Box<import::Args>),
    Populate(populate::Args),
    Clone(Box<clone::Args>),
    ServeNbd(serve_nbd::Args),
    Upload(upload::Args),
    Uploader(Box<uploader::Args>),
    Importer(Box<importer::Args>),
    PvcImporter(Box<pvc_importer::Args>),
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

/// A text that is never shown.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// The text, for whoever needs it.
    fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// As Go's `strconv.ParseBool`, which operators write for; an empty variable is one that is not set.
fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "" | "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("write true or false".to_owned()),
    }
}

/// A path that may be empty, as an empty variable is.
fn path(text: &str) -> Result<PathBuf, Infallible> {
    Ok(text.into())
}

/// Runs one command to its end; most succeed or fail, some have more to say by their exit code.
pub fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Check(args) => return check::run(args),
        Command::Compare(args) => return compare::run(args),
        Command::Registry(args) => return registry::run(*args),
        Command::Uploader(args) => return uploader::run(*args),
        Command::Upload(args) => upload::run(args),
        Command::Import(args) => import::run(*args),
        Command::Importer(args) => importer::run(*args),
        Command::PvcImporter(args) => pvc_importer::run(*args),
        Command::Populate(args) => populate::run(args),
        Command::Clone(args) => clone::run(*args),
        Command::ServeNbd(args) => serve_nbd::run(args),
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

    /// The pages are what operators write their pods by.
    #[test]
    fn every_variable_of_a_worker_has_its_row_in_the_docs() {
        let page = include_str!("../../../docs/worker.md");
        let section =
            |title: &str| page.split("\n## ").find(|part| part.lines().next() == Some(title)).unwrap();
        let common = section("All workers");
        let mut root = Cli::command();
        root.build();
        let upload = include_str!("../../../docs/upload.md");
        let (importer, pvc_importer) = (section("dvcr importer"), section("dvcr pvc-importer"));
        for (worker, docs) in [("importer", importer), ("pvc-importer", pvc_importer), ("uploader", upload)] {
            let command = root.find_subcommand(worker).unwrap();
            let own = command.get_arguments().filter(|arg| !arg.is_global_set() && arg.get_env().is_some());
            let mut seen = 0;
            for arg in own {
                let (flag, variable) = (arg.get_long().unwrap(), arg.get_env().unwrap().to_str().unwrap());
                let named = format!("`--{flag}`");
                let mut rows = docs.lines().chain(common.lines()).filter(|line| line.starts_with("| `--"));
                let row = rows.find(|row| row.contains(&named));
                let row = row.unwrap_or_else(|| panic!("--{flag} of {worker} is in no table"));
                assert!(row.contains(&format!("`{variable}`")), "{variable} is not in the row of --{flag}");
                if let [default] = arg.get_default_values() {
                    let default = default.to_str().unwrap();
                    assert!(default.is_empty() || row.contains(&format!("`{default}`")), "{flag}: {default}");
                }
                seen += 1;
            }
            assert!(seen > 15, "{worker}: {seen}");
        }
        for line in page.lines().chain(upload.lines()) {
            let Some(flag) = line.strip_prefix("| `--").and_then(|rest| rest.split_once('`')) else {
                continue;
            };
            let known = ["importer", "pvc-importer", "uploader", "upload"].iter().any(|name| {
                let mut arguments = root.find_subcommand(name).unwrap().get_arguments();
                arguments.any(|arg| arg.get_long() == Some(flag.0))
            });
            assert!(known, "--{} is in a table, and in no command", flag.0);
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
