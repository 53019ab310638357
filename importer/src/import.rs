//! An image from a source into a registry; the crate's documentation has the picture.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use dvcr_converter::limits::Limits;
use dvcr_converter::progress::Progress;
use dvcr_image::{ClientOptions, Reference, Repository};
use serde::Serialize;

use crate::checksum::Checksum;
use crate::decide;
use crate::source::{Source, SourceOptions};
use crate::{Error, ErrorKind, Result};

/// How often a running import looks whether it was cancelled, milliseconds.
const CANCEL_POLL_MS: u64 = 50;

/// What to import, and where to.
#[derive(Clone, Debug)]
pub struct ImportRequest {
    /// Where the image is.
    pub source: Source,
    /// The tag it gets; a reference with a digest is refused.
    pub destination: Reference,
    /// Checksums of the source's bytes as received; all must match before anything is published.
    pub checksums: Vec<Checksum>,
    /// How to reach the source.
    pub source_options: SourceOptions,
    /// How to talk to the destination.
    pub client: ClientOptions,
    /// Do nothing if the tag names what was made of the very version of the source that is there now.
    pub if_changed: bool,
    /// Keep what comes of a source that is decoded or encoded on the way when the rest is expected to take so long, so that the next
    /// import need not read it again if this one is killed. The registry has it meanwhile; see docs/import.md.
    pub keep_after: Duration,
    /// Bounds for the image.
    pub limits: Limits,
}

/// What was imported.
#[derive(Clone, Debug, Serialize)]
pub struct ImportSummary {
    /// The tag that was given.
    pub reference: String,
    /// Digest of the manifest.
    pub digest: String,
    /// How it came there.
    pub outcome: Outcome,
    /// Name of the stored file.
    pub file_name: String,
    /// Format of the stored file.
    pub format: String,
    /// Bytes a guest sees.
    pub virtual_size: u64,
    /// Bytes of the stored file.
    pub stored_size: u64,
    /// Bytes of the source.
    pub source_size: u64,
    /// Bytes of it that an earlier import, which was broken off, had brought.
    pub resumed_bytes: u64,
    /// From the first request to the tag.
    pub seconds: f64,
    /// Bytes received per second.
    pub bytes_per_second: u64,
}

/// How an image came to be under its tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The disk was read from the source, and an image made of it.
    Imported,
    /// The source is an image of the same making, and was copied as it is.
    Copied,
    /// The source may have changed, and was imported, but the image is the one that the tag had before.
    SameContent,
    /// The source has not changed since the tag was made of it, and nothing was done.
    Unchanged,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Imported => "imported",
            Self::Copied => "copied, as it is",
            Self::SameContent => "the same content as before",
            Self::Unchanged => "the source has not changed, nothing was done",
        })
    }
}

/// Imports an image. Nothing is published unless all of it is right.
///
/// `progress` passes the phases "transfer", for some sources "assemble", and "commit". It counts the source's bytes;
/// with "assemble" the total is twice these and the second half counts the layer's bytes in proportion, so that the
/// share never goes back. The total is zero while the source's length is unknown.
///
/// When the future is dropped, or [`Progress::cancel`] is called, the transfer ends at once, and staged blobs are cleaned up as
/// far as the registry answers within a few seconds. So are open uploads, but for one that the same request, from this process or
/// another, goes on with: that of a source that is stored as it comes, and whose version can be told.
pub async fn import(request: ImportRequest, progress: Arc<Progress>) -> Result<ImportSummary> {
    if let Some(digest) = request.destination.digest() {
        let text =
            format!("the destination names the digest {digest}, which only its content decides; name a tag");
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    request.source_options.admit(&request.source, &request.checksums)?;
    let repository = Repository::open(&request.destination, &request.client)
        .map_err(|e| Error::with(ErrorKind::Registry, "preparing the registry client", e))?;
    progress.bound(&request.limits);
    let outcome = tokio::select! {
        outcome = decide::run(&request, &repository, &progress) => outcome,
        error = cancelled(&progress) => Err(error),
    };
    repository.settle().await;
    outcome
}

/// Waits until somebody cancels, or the time is over.
pub async fn cancelled(progress: &Progress) -> Error {
    loop {
        if let Err(stopped) = progress.check() {
            return Error::stopped(stopped);
        }
        tokio::time::sleep(Duration::from_millis(CANCEL_POLL_MS)).await;
    }
}
