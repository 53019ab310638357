//! Remembers of which version of a source a tag was made, so that nothing is done while both are the same.
//!
//! ```text
//!  TAG          the image: decided by the disk and its name alone, whatever the source was
//!  TAG.source   a note: the digest of that image, and a hash of source and validators
//! ```
//!
//! The note is an OCI manifest without content, two annotations: any registry keeps it, and a garbage collection treats
//! it like any tag. Why not in the image itself: docs/decisions/0006-what-a-refresh-remembers.md.

use std::collections::BTreeMap;

use dvcr_image::digest::{self, Digest};
use dvcr_image::{Manifest, Repository, media_type};
use serde::{Deserialize, Serialize};

use crate::checksum::Checksum;
use crate::{Error, ErrorKind, Result};

/// What the tag of a note ends with.
const SUFFIX: &str = ".source";
/// Longest tag that a note can stand beside, bytes.
const TAG_BYTES_MAX: usize = 128 - SUFFIX.len();
/// The artifact type of a note.
const NOTE: &str = "application/vnd.dvcr.source.v1+json";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const IMAGE: &str = "source-image-digest";
const VALIDATOR: &str = "source-image-validator";

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Note {
    annotations: BTreeMap<String, String>,
    artifact_type: String,
    config: Empty,
    layers: Vec<Empty>,
    media_type: String,
    schema_version: u32,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Empty {
    digest: String,
    media_type: String,
    size: u64,
}

/// What is compared from one import to the next.
pub(crate) struct Refresh<'a> {
    repository: &'a Repository,
    target: &'a str,
    /// The image that the tag names now.
    pub(crate) current: Option<Digest>,
    noted: Option<BTreeMap<String, String>>,
}

impl<'a> Refresh<'a> {
    /// Looks up the tag `target` and its note.
    pub(crate) async fn begin(repository: &'a Repository, target: &'a str) -> Result<Self> {
        if target.len() > TAG_BYTES_MAX {
            let text = format!(
                "the tag {target:?} has {} bytes; what is compared next time is kept under a longer one, so it can have \
                 at most {TAG_BYTES_MAX}",
                target.len()
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let failed = |e| Error::with(ErrorKind::Registry, format!("looking up the tag {target}"), e);
        let current = repository.manifest_digest(target).await.map_err(failed)?;
        let noted = match repository.manifest(&format!("{target}{SUFFIX}")).await {
            Ok(Manifest { bytes, .. }) => serde_json::from_slice::<Note>(&bytes).ok(),
            Err(error) if error.kind() == dvcr_image::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        let noted = noted.filter(|note| note.artifact_type == NOTE).map(|note| note.annotations);
        Ok(Self { repository, target, current, noted })
    }

    /// Whether the tag names what was made of that very version of the source.
    pub(crate) fn is_same(&self, validator: &str) -> bool {
        let noted = |key: &str| self.noted.as_ref().and_then(|note| note.get(key)).map(String::as_str);
        let current = self.current.as_ref().map(|digest| digest.as_ref());
        current.is_some() && noted(IMAGE) == current && noted(VALIDATOR) == Some(validator)
    }

    /// Keeps in mind that the tag names `image` now, made of that version.
    pub(crate) async fn remember(&self, image: &str, validator: &str) -> Result<()> {
        if self.noted.as_ref().is_some_and(|note| {
            note.get(IMAGE).map(String::as_str) == Some(image)
                && note.get(VALIDATOR).map(String::as_str) == Some(validator)
        }) {
            return Ok(());
        }
        let failed = |e| Error::with(ErrorKind::Registry, "noting the version of the source", e);
        let empty = self.repository.push_blob("{}".into()).await.map_err(failed)?;
        let empty = Empty { digest: empty.to_string(), media_type: EMPTY.into(), size: 2 };
        let note = Note {
            annotations: [(IMAGE, image), (VALIDATOR, validator)].map(|(k, v)| (k.into(), v.into())).into(),
            artifact_type: NOTE.into(),
            config: empty.clone(),
            layers: vec![empty],
            media_type: media_type::OCI_MANIFEST.into(),
            schema_version: 2,
        };
        let note = serde_json::to_vec(&note)
            .map_err(|e| Error::with(ErrorKind::Registry, "noting the version of the source", e))?;
        let tag = format!("{}{SUFFIX}", self.target);
        let put = self.repository.put_manifest(&tag, note.into(), media_type::OCI_MANIFEST).await;
        put.map(drop).map_err(failed)
    }
}

/// One hash of all that decides what an import makes: the source by its name, its validators, and the checksums that were
/// demanded, so that one more is not passed over.
pub(crate) fn validator(source: &str, version: &str, checksums: &[Checksum]) -> Result<String> {
    let mut parts = vec![source.to_owned(), version.to_owned()];
    let mut sums: Vec<String> = checksums.iter().map(Checksum::to_string).collect();
    sums.sort();
    parts.extend(sums);
    let bytes = serde_json::to_vec(&parts)
        .map_err(|e| Error::with(ErrorKind::Source, "hashing the version of the source", e))?;
    let hash = digest::sha256(&bytes);
    hash.map(|hash| hash.to_string())
        .map_err(|e| Error::with(ErrorKind::Source, "hashing the version of the source", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_decides_an_import_is_in_the_hash() {
        let sum = |text: &str| -> Vec<Checksum> { vec![text.parse().unwrap()] };
        let (md5, other) = ("md5:900150983cd24fb0d6963f7d28e17f72", "md5:900150983cd24fb0d6963f7d28e17f73");
        let all = [
            validator("https://h/a?token=s3cret", "\"v1\"", &[]).unwrap(),
            validator("https://h/a", "\"v1\"", &[]).unwrap(),
            validator("https://h/a", "\"v2\"", &[]).unwrap(),
            validator("https://h/a\"v1\"", "", &[]).unwrap(),
            validator("https://h/a", "\"v1\"", &sum(md5)).unwrap(),
            validator("https://h/a", "\"v1\"", &sum(other)).unwrap(),
        ];
        let different: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len());
        assert!(all.iter().all(|hash| hash.starts_with("sha256:") && !hash.contains("s3cret")));
        let two = [sum(md5), sum(other)].concat();
        let turned = [sum(other), sum(md5)].concat();
        assert_eq!(validator("a", "b", &two).unwrap(), validator("a", "b", &turned).unwrap());
    }
}
