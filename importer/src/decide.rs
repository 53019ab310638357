//! What is done about a source before anything of it is transferred, and after.
//!
//! ```text
//!  image: tag ──> digest ──> signature ─┐                        ┌─ an image of ours ──> copy ──────┐
//!  anything else ───────────────────────┴─> version ──> changed? ┴─ anything else ──> transfer ─────┴─> note
//!                                                          └─ no: nothing
//! ```

use std::sync::Arc;
use std::time::Instant;

use dvcr_converter::progress::Progress;
use dvcr_image::{DiskImage, Repository, layout};

use crate::copy::copy;
use crate::import::{ImportRequest, ImportSummary, Outcome};
use crate::refresh::{self, Refresh};
use crate::signature;
use crate::source::{Source, image};
use crate::transfer::transfer;
use crate::{Error, ErrorKind, Result};

/// Imports as is asked for, as far as there is something to import.
pub(crate) async fn run(
    request: &ImportRequest,
    to: &Repository,
    progress: &Arc<Progress>,
) -> Result<ImportSummary> {
    let begun = Instant::now();
    let mut request = request.clone();
    if let Source::Image(reference) = &mut request.source {
        *reference = image::pinned(reference, &request.source_options.client()).await?;
    }
    verify(&request).await?;
    let target = request.destination.target().to_owned();
    let (mut refresh, mut version) = (None, None);
    if request.if_changed {
        let compared = refresh.insert(Refresh::begin(to, &target).await?);
        if let Some(told) = request.source.version(&request.source_options).await? {
            let now = refresh::validator(&request.source.identity(), &told, &request.checksums)?;
            if compared.is_same(&now) {
                return unchanged(&request, to, begun).await;
            }
            version = Some(now);
        }
    }
    let mut copied = None;
    // Checksums are over the disk's file, which only those see who read it.
    if let Source::Image(reference) = &request.source
        && request.checksums.is_empty()
    {
        copied = copy(&request, reference, to, progress).await?;
    }
    let mut summary = match copied {
        Some(summary) => summary,
        None => transfer(&request, to, progress).await?,
    };
    if let Some(refresh) = &refresh {
        if refresh.current.as_ref().is_some_and(|before| before.as_ref() == summary.digest) {
            summary.outcome = Outcome::SameContent;
        }
        // The image is there, whether it will be found unchanged the next time or not.
        if let Some(version) = version
            && let Err(error) = refresh.remember(&summary.digest, &version).await
        {
            tracing::warn!(%error, "the version of the source could not be noted; the next import will not know it");
        }
    }
    Ok(summary)
}

async fn verify(request: &ImportRequest) -> Result<()> {
    let Some(key) = &request.source_options.verify_key else { return Ok(()) };
    let Source::Image(image) = &request.source else {
        let text = "only images in registries have signatures that can be verified; demand a checksum of this source";
        return Err(Error::new(ErrorKind::Invalid, text));
    };
    let failed = |e| Error::with(ErrorKind::Source, format!("reading the signatures of {image}"), e);
    let repository = Repository::open(image, &request.source_options.client()).map_err(failed)?;
    match image.digest() {
        Some(digest) => signature::verify(&repository, image, digest, key).await,
        None => Err(Error::new(ErrorKind::Source, format!("{image} stands for no digest"))),
    }
}

/// Tells of the image that is there.
async fn unchanged(request: &ImportRequest, to: &Repository, begun: Instant) -> Result<ImportSummary> {
    let destination = &request.destination;
    let failed =
        |e| Error::with(ErrorKind::Registry, format!("looking at what {destination} names already"), e);
    let disk = DiskImage::locate(to, destination.target(), &request.limits).await.map_err(failed)?;
    let (manifest, image) = to.image(disk.manifest().as_ref()).await.map_err(failed)?;
    let config = to.small_blob(image.config().digest(), image.config().size()).await.map_err(failed)?;
    let labels = layout::labels(&config).ok_or_else(|| {
        let text = format!("{destination} names an image that no import made; import without --if-changed");
        Error::new(ErrorKind::Registry, text)
    })?;
    Ok(ImportSummary {
        reference: destination.to_string(),
        digest: manifest.digest.to_string(),
        outcome: Outcome::Unchanged,
        file_name: disk.file_name().to_owned(),
        format: labels.format.to_string(),
        virtual_size: labels.virtual_size,
        stored_size: labels.size,
        source_size: 0,
        resumed_bytes: 0,
        seconds: begun.elapsed().as_secs_f64(),
        bytes_per_second: 0,
    })
}
