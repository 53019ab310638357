//! What the registry reads of a manifest: media type, what it refers to, what refers to it.
//!
//! The types are those of the wire (image-spec 1.1 manifest.md and image-index.md, Docker schema 2); bytes are stored and
//! served exactly as they were pushed.

use std::collections::BTreeMap;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::digest::{Digest, DigestError};

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// What is not taken any more, but may lie in the directory.
const DOCKER_SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+json";
const DOCKER_SCHEMA_1_SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";
const OCI_ARTIFACT: &str = "application/vnd.oci.artifact.manifest.v1+json";

/// Layer types whose content need not be in the registry (image-spec layer.md; Docker's foreign layers).
const NONDISTRIBUTABLE_PREFIXES: [&str; 2] =
    ["application/vnd.oci.image.layer.nondistributable.", "application/vnd.docker.image.rootfs.foreign."];

const NONDISTRIBUTABLE_WARNING: &str = "non-distributable layers are deprecated and stay where they are; push them as ordinary layers to have them here";

/// The two shapes of manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Image,
    Index,
}

fn shape_of(media_type: &str) -> Option<Shape> {
    match media_type {
        OCI_MANIFEST | DOCKER_MANIFEST => Some(Shape::Image),
        OCI_INDEX | DOCKER_LIST => Some(Shape::Index),
        _ => None,
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    schema_version: Option<u64>,
    media_type: Option<String>,
    artifact_type: Option<String>,
    config: Option<WireDescriptor>,
    layers: Option<Vec<WireDescriptor>>,
    manifests: Option<Vec<WireDescriptor>>,
    /// Artifacts of image-spec 1.1-rc, which are not taken but may lie in the directory.
    blobs: Option<Vec<WireDescriptor>>,
    /// Docker schema 1, likewise.
    fs_layers: Option<Vec<WireLayer>>,
    signatures: Option<IgnoredAny>,
    subject: Option<WireDescriptor>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireLayer {
    blob_sum: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: Option<u64>,
}

impl Wire {
    fn media_type(&self) -> &str {
        match &self.media_type {
            Some(media_type) if !media_type.is_empty() => media_type,
            _ if self.schema_version == Some(1) && self.signatures.is_some() => DOCKER_SCHEMA_1_SIGNED,
            _ if self.schema_version == Some(1) => DOCKER_SCHEMA_1,
            _ if self.manifests.is_some() => OCI_INDEX,
            _ => OCI_MANIFEST,
        }
    }
}

/// A manifest that may be stored, once what it refers to is there.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Checked {
    pub(crate) media_type: String,
    /// Config and layers that must be in the repository.
    pub(crate) blobs: Vec<Digest>,
    /// Manifests that must be in the repository.
    pub(crate) manifests: Vec<Digest>,
    pub(crate) subject: Option<Digest>,
    /// What its author should know, though it is taken.
    pub(crate) warning: Option<&'static str>,
}

/// Why a manifest is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the manifest is not JSON of the expected shape: {0}")]
    Json(#[from] serde_json::Error),
    #[error("schemaVersion is {0:?}; only 2 is accepted")]
    SchemaVersion(Option<u64>),
    #[error("media type {0:?} is not accepted; push an OCI or Docker schema 2 manifest or index")]
    MediaType(String),
    #[error("the manifest says mediaType {inside:?} but Content-Type says {outside:?}")]
    MediaTypeMismatch { inside: String, outside: String },
    #[error("{0}")]
    Shape(&'static str),
    #[error("a descriptor's digest is wrong: {0}")]
    Digest(#[from] DigestError),
}

/// Checks the form of a manifest pushed with `content_type`.
pub(crate) fn check(bytes: &[u8], content_type: Option<&str>) -> Result<Checked, Refusal> {
    let wire: Wire = serde_json::from_slice(bytes)?;
    let outside = content_type.map(|value| value.split(';').next().unwrap_or_default().trim());
    // Some clients send no type, or that of any JSON: then the manifest's own counts.
    let outside = outside.filter(|value| !value.is_empty() && *value != "application/json");
    let media_type = match (&wire.media_type, outside) {
        (Some(inside), Some(outside)) if !inside.is_empty() && inside != outside => {
            let (inside, outside) = (inside.clone(), outside.to_owned());
            return Err(Refusal::MediaTypeMismatch { inside, outside });
        }
        (_, Some(outside)) => outside.to_owned(),
        (_, None) => wire.media_type().to_owned(),
    };
    let Some(shape) = shape_of(&media_type) else { return Err(Refusal::MediaType(media_type)) };
    if wire.schema_version != Some(2) {
        return Err(Refusal::SchemaVersion(wire.schema_version));
    }
    // One text must not be an image to one client and an index to another.
    if wire.manifests.is_some() && (wire.layers.is_some() || wire.config.is_some()) {
        return Err(Refusal::Shape(
            "the manifest has both manifests and layers or config; it must be one or the other",
        ));
    }
    let (mut blobs, mut manifests, mut warning) = (Vec::new(), Vec::new(), None);
    match shape {
        Shape::Image => {
            let Some(config) = &wire.config else { return Err(Refusal::Shape("the manifest has no config")) };
            let Some(layers) = &wire.layers else { return Err(Refusal::Shape("the manifest has no layers")) };
            blobs.push(config.digest.parse()?);
            for layer in layers {
                let digest = layer.digest.parse()?;
                match is_elsewhere(&layer.media_type) {
                    true => warning = Some(NONDISTRIBUTABLE_WARNING),
                    false => blobs.push(digest),
                }
            }
        }
        Shape::Index => {
            let Some(list) = &wire.manifests else {
                return Err(Refusal::Shape("the index has no manifests"));
            };
            for manifest in list {
                manifests.push(manifest.digest.parse()?);
            }
        }
    }
    for digests in [&mut blobs, &mut manifests] {
        digests.sort();
        digests.dedup();
    }
    // As it will be read back: only the text is stored.
    let media_type = wire.media_type().to_owned();
    let subject = wire.subject.map(|subject| subject.digest.parse()).transpose()?;
    Ok(Checked { media_type, blobs, manifests, subject, warning })
}

/// Whether the content of a layer need not be in the registry.
fn is_elsewhere(media_type: &str) -> bool {
    NONDISTRIBUTABLE_PREFIXES.iter().any(|prefix| media_type.starts_with(prefix))
}

/// Tells what those who pull a manifest of a kind should know of it.
pub(crate) fn deprecation(media_type: &str) -> Option<&'static str> {
    match media_type {
        DOCKER_SCHEMA_1 | DOCKER_SCHEMA_1_SIGNED => Some(
            "this image is of Docker schema 1, which clients cease to read; build it again, or convert it and push it",
        ),
        OCI_ARTIFACT => Some(
            "OCI artifact manifests did not become part of the specification; push an image manifest with artifactType",
        ),
        _ => None,
    }
}

/// Tells the media type of a stored manifest; one without `mediaType` is told by its fields.
pub(crate) fn media_type_of(bytes: &[u8]) -> String {
    match serde_json::from_slice::<Wire>(bytes) {
        Ok(wire) => wire.media_type().to_owned(),
        Err(_) => OCI_MANIFEST.to_owned(),
    }
}

/// What a manifest needs in its repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) digest: Digest,
    pub(crate) is_manifest: bool,
    /// Its length by the word of the manifest.
    pub(crate) bytes: Option<u64>,
}

/// Tells what a stored manifest needs in its repository; `None` if it is no JSON of the expected shape.
pub(crate) fn needs(bytes: &[u8]) -> Option<Vec<Need>> {
    let wire: Wire = serde_json::from_slice(bytes).ok()?;
    let blobs = wire.config.into_iter().chain(wire.layers.into_iter().flatten());
    let blobs = blobs.filter(|one| !is_elsewhere(&one.media_type)).map(|one| (one, false));
    let manifests = wire.manifests.into_iter().flatten().map(|one| (one, true));
    let need = |(one, is_manifest): (WireDescriptor, bool)| {
        Some(Need { digest: one.digest.parse().ok()?, is_manifest, bytes: one.size })
    };
    Some(blobs.chain(manifests).filter_map(need).collect())
}

/// Tells all that a stored manifest refers to and needs, of any generation; `None` if it is of none.
pub(crate) fn references(bytes: &[u8]) -> Option<Vec<Digest>> {
    let wire: Wire = serde_json::from_slice(bytes).ok()?;
    let lists = [wire.layers, wire.manifests, wire.blobs];
    if wire.config.is_none() && wire.fs_layers.is_none() && lists.iter().all(Option::is_none) {
        return None;
    }
    let descriptors = wire.config.into_iter().chain(lists.into_iter().flatten().flatten());
    let descriptors = descriptors.map(|one| one.digest);
    let layers = wire.fs_layers.into_iter().flatten().map(|one| one.blob_sum);
    // What is no digest names nothing that could be stored.
    Some(descriptors.chain(layers).filter_map(|digest| digest.parse().ok()).collect())
}

/// The manifests that a stored manifest is tied to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Links {
    pub(crate) manifests: Vec<Digest>,
    pub(crate) subject: Option<Digest>,
}

/// Tells the manifests that a stored manifest is tied to; `None` if it is no JSON of the expected shape.
pub(crate) fn links(bytes: &[u8]) -> Option<Links> {
    let wire: Wire = serde_json::from_slice(bytes).ok()?;
    let manifests = wire.manifests.into_iter().flatten().filter_map(|one| one.digest.parse().ok()).collect();
    let subject = wire.subject.and_then(|subject| subject.digest.parse().ok());
    Some(Links { manifests, subject })
}

/// Tells what a stored manifest refers to as its subject.
pub(crate) fn subject_of(bytes: &[u8]) -> Option<Digest> {
    links(bytes)?.subject
}

/// A referrer as the referrers API lists it (distribution-spec 1.1, "Listing Referrers").
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Referrer {
    media_type: String,
    digest: String,
    size: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) artifact_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<BTreeMap<String, String>>,
}

/// Describes a stored manifest to those who look for referrers; `None` if it cannot be read.
pub(crate) fn referrer(digest: &Digest, bytes: &[u8]) -> Option<Referrer> {
    let wire: Wire = serde_json::from_slice(bytes).ok()?;
    let media_type = wire.media_type().to_owned();
    let given = wire.artifact_type.filter(|given| !given.is_empty());
    let artifact_type = given.or_else(|| wire.config.map(|config| config.media_type));
    Some(Referrer {
        media_type,
        digest: digest.to_string(),
        size: bytes.len(),
        artifact_type: artifact_type.filter(|given| !given.is_empty()),
        annotations: wire.annotations,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::digest::Algorithm;

    fn digest(of: &str) -> Digest {
        Digest::of(Algorithm::Sha256, of.as_bytes())
    }

    fn image() -> Value {
        json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/x", "digest": digest("c").as_str(), "size": 1},
            "layers": [
                {"mediaType": "application/y", "digest": digest("l").as_str(), "size": 1},
                {"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
                 "digest": digest("foreign").as_str(), "size": 1, "urls": ["http://x"]},
            ],
        })
    }

    fn checked(value: &Value, content_type: Option<&str>) -> Result<Checked, Refusal> {
        check(value.to_string().as_bytes(), content_type)
    }

    #[test]
    fn foreign_layers_need_not_be_here() {
        let checked =
            checked(&image(), Some("application/vnd.oci.image.manifest.v1+json; charset=utf-8")).unwrap();
        let mut blobs = vec![digest("c"), digest("l")];
        blobs.sort();
        assert_eq!(checked.blobs, blobs);
        assert_eq!(checked.media_type, OCI_MANIFEST);
    }

    #[test]
    fn contradictions_are_refused() {
        let with = |key: &str, value: Value| {
            let mut image = image();
            image[key] = value;
            image
        };
        assert!(matches!(checked(&image(), Some(OCI_INDEX)), Err(Refusal::MediaTypeMismatch { .. })));
        assert!(matches!(
            checked(&with("schemaVersion", json!(1)), None),
            Err(Refusal::SchemaVersion(Some(1)))
        ));
        assert!(matches!(checked(&with("manifests", json!([])), None), Err(Refusal::Shape(_))));
        assert!(matches!(checked(&with("config", json!({"digest": "x"})), None), Err(Refusal::Digest(_))));
        assert!(matches!(checked(&with("layers", json!(null)), None), Err(Refusal::Shape(_))));
        assert!(matches!(checked(&with("mediaType", json!("text/plain")), None), Err(Refusal::MediaType(_))));
        assert!(matches!(check(b"[]", None), Err(Refusal::Json(_))));
        let deep = "[".repeat(100_000);
        assert!(matches!(check(deep.as_bytes(), None), Err(Refusal::Json(_))));
    }

    #[test]
    fn a_manifest_without_a_type_is_told_by_its_fields() {
        assert_eq!(media_type_of(br#"{"schemaVersion":2,"manifests":[]}"#), OCI_INDEX);
        assert_eq!(media_type_of(br#"{"schemaVersion":2,"layers":[]}"#), OCI_MANIFEST);
        assert_eq!(media_type_of(br#"{"schemaVersion":1,"fsLayers":[]}"#), DOCKER_SCHEMA_1);
        let signed = br#"{"schemaVersion":1,"fsLayers":[],"signatures":[{"protected":"x"}]}"#;
        assert_eq!(media_type_of(signed), DOCKER_SCHEMA_1_SIGNED);
    }

    #[test]
    fn the_artifact_type_falls_back_to_the_config() {
        let bytes = image().to_string();
        let referrer = referrer(&digest("x"), bytes.as_bytes()).unwrap();
        assert_eq!(referrer.artifact_type.as_deref(), Some("application/x"));
    }
}
