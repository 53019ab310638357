//! `dvcr upload`.

use std::path::PathBuf;

use anyhow::Context;
use dvcr_uploader::client::{UploadRequest, upload};

use crate::size::Human;
use crate::source::read;
use crate::work;

/// Uploads a disk image to `dvcr uploader`, or whatever takes images by tus or PUT
///
/// With tus, the upload goes on by itself where a connection broke, and where another run of the same command was
/// stopped. Zeros and holes are not sent, and the rest is compressed where that is faster. What the server says of the
/// stored image goes to standard output, progress to standard error.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A file or a block device
    file: PathBuf,

    // A text, because clap shows what it cannot parse, and the path may be a secret.
    /// Where to: an http(s) URL
    url: String,

    /// Accept any certificate of the server
    #[arg(long)]
    insecure: bool,

    /// Certificates (PEM) that are trusted besides those of the system
    #[arg(long, value_name = "FILE")]
    cacert: Option<PathBuf>,

    /// Our own certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,

    /// Private key (PEM) of our certificate
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let pem = |path: &PathBuf| read(path);
    let roots = args.cacert.as_ref().map(pem).transpose()?;
    let identity = match args.cert.iter().zip(&args.key).next() {
        Some((cert, key)) => Some([pem(cert)?, b"\n".to_vec(), pem(key)?].concat()),
        None => None,
    };
    let title = args.file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let request = UploadRequest { file: args.file, url: args.url, insecure: args.insecure, roots, identity };
    let done = work::run(&title, |progress| async move { Ok(upload(request, progress).await?) })?;
    tracing::debug!(sent = %Human(done.sent), "uploaded");
    match done.summary {
        Some(summary) => {
            println!("{}", serde_json::to_string_pretty(&summary).context("printing the summary")?);
        }
        None => println!("uploaded"),
    }
    Ok(())
}
