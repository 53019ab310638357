//! The disk in an image of a registry, as a source.

use dvcr_converter::limits::Limits;
use dvcr_image::{ClientOptions, DiskImage, Reference, Repository};

use super::{Opened, Place, changed};
use crate::{Error, ErrorKind, Result};

/// The digest that `reference` stands for now: whatever its tag is given to from here on, one image is verified, compared and
/// imported.
pub(crate) async fn pinned(reference: &Reference, options: &ClientOptions) -> Result<Reference> {
    if reference.digest().is_some() {
        return Ok(reference.clone());
    }
    let failed = |e| Error::with(ErrorKind::Source, format!("looking up the source image {reference}"), e);
    let repository = Repository::open(reference, options).map_err(failed)?;
    match repository.manifest_digest(reference.target()).await.map_err(failed)? {
        Some(digest) => Ok(reference.clone().with_digest(digest)),
        None => {
            let text = format!("there is no image {reference}; look at the name, and at who may read it");
            Err(Error::new(ErrorKind::Source, text))
        }
    }
}

/// Opens the disk of an image. No layer can be gone on with in the middle: its digest is over all of it, and the
/// state of that is not the reader's to keep.
pub(super) async fn open(
    reference: &Reference,
    options: &ClientOptions,
    limits: &Limits,
    at: Option<&Place>,
) -> Result<Opened> {
    let shown = reference.to_string();
    let failed = |e| Error::with(ErrorKind::Source, format!("reading the source image {shown}"), e);
    if at.is_some() {
        return Err(changed(&shown));
    }
    let repository = Repository::open(reference, options).map_err(failed)?;
    let disk = DiskImage::locate(&repository, reference.target(), limits).await.map_err(failed)?;
    let (len, name) = (Some(disk.size()), Some(disk.file_name().to_owned()));
    let opened = tokio::task::spawn_blocking(move || disk.stream()).await;
    let stream =
        opened.map_err(|e| Error::with(ErrorKind::Source, "opening the source", e))?.map_err(failed)?;
    let reader = Box::new(stream);
    Ok(Opened {
        reader,
        random: None,
        len,
        validator: None,
        name,
        if_page: None,
        shown,
        stamp: None,
        pump: None,
    })
}
