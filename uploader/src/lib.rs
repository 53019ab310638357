//! An endpoint that one disk image is uploaded to, and the client that goes with it.
//!
//! ```text
//!            server: connections, TLS, the end
//!              │
//!            api ──┬── whole    PUT or POST with all of it        ┐
//!                  ├── ranged   PUT with Content-Range            ├──> app, session ──> feed ──> dvcr-importer
//!                  └── tus      the tus protocol, version 1.0     ┘       │
//!                        │                                                └── one upload at a time, and its verdict
//!                      body     as it is, or decoded
//!
//!            client   a file by tus, in parts, resumed; else by one PUT
//! ```
//!
//! What is promised: an upload is acknowledged as a whole only when the image is durable in the registry; one that broke off
//! goes on where it was; a second one is told of the first. `docs/upload.md` has the requests and answers.

mod answer;
mod api;
mod app;
mod body;
pub mod client;
mod ranged;
mod server;
mod session;
mod tus;

use std::sync::Arc;
use std::time::Duration;

use dvcr_converter::limits::Limits;
use dvcr_image::{ClientOptions, Reference};
use dvcr_importer::ImportSummary;
use dvcr_importer::checksum::Checksum;

pub use server::{Listeners, Tls, serve};

/// Where an upload goes, and how long it is waited for.
#[derive(Clone, Debug)]
pub struct Config {
    /// The tag that the image gets.
    pub destination: Reference,
    /// Checksums of the uploaded bytes; all must match before anything is published.
    pub checksums: Vec<Checksum>,
    /// How to talk to the destination.
    pub client: ClientOptions,
    /// Bounds for the image.
    pub limits: Limits,
    /// How long an upload may take to begin; `None` is for ever.
    pub start_timeout: Option<Duration>,
    /// How long the client of a broken upload may stay away.
    pub idle_timeout: Duration,
    /// See [`dvcr_importer::ImportRequest::keep_after`].
    pub keep_after: Duration,
}

/// Why the service ended.
#[derive(Debug)]
pub enum Outcome {
    /// The image is durable.
    Done(Arc<ImportSummary>),
    /// The upload was refused, or could not be stored.
    Failed(Arc<dvcr_importer::Error>),
    /// No upload began in time.
    NotStarted(Duration),
    /// The caller asked for it.
    Stopped,
}
