//! The one binary: parses the command line, hands over to a room, shows progress, turns the outcome into an exit code.
//!
//! ```text
//! main ──> cmd::<command>::run ──> work::run (runtime, signals, progress bar) ──> a room's function
//! ```
//!
//! Exit codes: 0 done; 1 failed; 2 wrong usage; 130 and 143 stopped by SIGINT and SIGTERM. `check` and `compare` have
//! their own, told in their help.

mod cmd;
mod limits;
mod logging;
mod s3;
mod sandbox;
mod size;
mod source;
mod work;
mod worker;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = match cmd::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            worker::leave_usage(&error);
            // Nobody is left to be told where the standard streams are closed.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    logging::init(&cli.log);
    let failure_code = cli.command.failure_code();
    cmd::run(cli.command).unwrap_or_else(|error| work::report(&error, failure_code))
}
