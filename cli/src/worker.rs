//! What the commands have in common that an operator runs as pods.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use dvcr_converter::progress::Progress;
use dvcr_importer::ImportSummary;
use dvcr_worker::metrics::{Family, Metrics, Server};
use dvcr_worker::termination::{self, Report, nanoseconds};

use crate::sandbox;

/// The commands that operators run.
const WORKERS: [&str; 3] = ["importer", "uploader", "pvc-importer"];

/// Metrics, the message at the end, and the sandbox.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Args {
    /// UID of the object that the work is for; metrics carry it
    #[arg(long, env = "OWNER_UID", default_value = "", value_name = "UID", hide_default_value = true)]
    owner_uid: String,

    /// Where /metrics is served, by HTTPS with a certificate that is made at the start
    #[arg(long, env = "METRICS_ADDRESS", default_value = "0.0.0.0:8443", value_name = "ADDRESS:PORT")]
    metrics_address: SocketAddr,

    /// The file that the outcome is written to
    #[arg(long, env = "TERMINATION_MESSAGE_PATH", default_value = termination::PATH, value_name = "FILE")]
    termination_message: PathBuf,

    #[command(flatten)]
    sandbox: sandbox::Args,
}

impl Args {
    /// Gives up all privileges that the work does not need. To be called before there are other threads.
    pub fn confine(&self, writable: &[&Path]) -> anyhow::Result<()> {
        let own = [self.termination_message.as_path(), Path::new("/tmp")];
        let writable: Vec<&Path> = own.into_iter().chain(writable.iter().copied()).collect();
        if let Some(entered) = self.sandbox.enter(&writable)? {
            tracing::info!(landlock = entered.landlock, seccomp = entered.seccomp, "confined");
        }
        Ok(())
    }

    /// Serves the metrics of `progress` as long as the answer lives.
    pub async fn serve(
        &self,
        family: Family,
        progress: Arc<Progress>,
    ) -> anyhow::Result<(Arc<Metrics>, Server)> {
        let metrics = Metrics::new(family, &self.owner_uid, progress);
        let address = self.metrics_address;
        let server = Server::start(address, Arc::clone(&metrics)).await;
        let server = server.with_context(|| format!("cannot serve metrics at {address}"))?;
        tracing::info!(address = %server.address(), "metrics are served");
        Ok((metrics, server))
    }

    /// Leaves a message for whoever reads the pod's status.
    pub fn leave(&self, message: &str) {
        termination::leave(&self.termination_message, message);
    }
}

/// Leaves a message where a worker was told what it cannot understand: whoever runs it by variables reads nothing else.
pub fn leave_usage(error: &clap::Error) {
    let command = std::env::args().find(|arg| WORKERS.contains(&arg.as_str()));
    let Some(command) = command.filter(|_| error.use_stderr()) else { return };
    let text = error.render().to_string();
    let what = text.split("\n\n").next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    let what = what.trim_start_matches("error: ");
    let message = match command.as_str() {
        "pvc-importer" => termination::unable_to_process(what),
        _ => Report::failure(what).text(),
    };
    let path = std::env::var_os("TERMINATION_MESSAGE_PATH").map_or(termination::PATH.into(), PathBuf::from);
    termination::leave(&path, &message);
}

/// What is told of an image that is stored, which took so long.
pub fn report(summary: &ImportSummary, average_speed: u64, elapsed: Duration) -> Report {
    Report {
        // Of what was mounted nothing came, and yet it is as large as it is.
        source_image_size: if summary.source_size == 0 { summary.stored_size } else { summary.source_size },
        source_image_virtual_size: summary.virtual_size,
        source_image_format: summary.format.clone(),
        average_speed,
        duration: nanoseconds(elapsed),
        ..Report::default()
    }
}

/// An error and what caused it, in one line.
pub fn chain(error: &anyhow::Error) -> String {
    let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
    causes.join(": ")
}
