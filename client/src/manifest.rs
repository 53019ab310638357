//! Manifests: raw bytes with their digest, and the choice of one image out of an index.

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, HeaderName};
use http::{Method, StatusCode};
use oci_spec::image::{ImageIndex, ImageManifest};
use serde::Deserialize;

use crate::digest::{self, Digest};
use crate::media_type;
use crate::repository::{Access, Repository, fixed};
use crate::request::{Outgoing, header, read_bounded};
use crate::{Error, ErrorKind, Result};

/// Largest manifest read or written, bytes (distribution specification).
pub const MANIFEST_BYTES_MAX: usize = 4 << 20;
/// Most indexes inside indexes followed to an image.
const INDEX_DEPTH_MAX: usize = 2;

const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// A manifest as the registry holds it.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The raw bytes; the digest is over these.
    pub bytes: Bytes,
    /// What it is.
    pub media_type: String,
    /// Verified digest.
    pub digest: Digest,
}

impl Repository {
    /// Fetches the manifest of a tag or digest and verifies its digest.
    pub async fn manifest(&self, target: &str) -> Result<Manifest> {
        let what = format!("reading manifest {target} of {}", self.name);
        let url = self.url(&format!("manifests/{target}")).await?;
        let request = Outgoing::new(Method::GET, url, Access::Pull, &self.name, &what)
            .header(ACCEPT, &media_type::MANIFESTS.join(", "));
        let response = self.transport.send_following(&request).await?;
        if response.status() != StatusCode::OK {
            return Err(self.transport.refused(response, &what).await);
        }
        let announced = header(response.headers(), &DOCKER_CONTENT_DIGEST).map(digest::parse).transpose()?;
        let content_type = header(response.headers(), &CONTENT_TYPE).map(str::to_owned);
        let bytes = read_bounded(response, MANIFEST_BYTES_MAX).await?;
        let expected = if target.contains(':') { Some(digest::parse(target)?) } else { announced };
        let digest = match expected {
            Some(expected) => {
                digest::verify(&bytes, &expected, &format!("manifest {target} of {}", self.name))?;
                expected
            }
            None => digest::sha256(&bytes)?,
        };
        let media_type = manifest_type(content_type.as_deref(), &bytes, &what)?;
        Ok(Manifest { bytes: bytes.into(), media_type, digest })
    }

    /// The digest that a tag or digest stands for, or `None` if there is no such manifest.
    pub async fn manifest_digest(&self, target: &str) -> Result<Option<Digest>> {
        let what = format!("looking up manifest {target} of {}", self.name);
        let url = self.url(&format!("manifests/{target}")).await?;
        let request = Outgoing::new(Method::HEAD, url, Access::Pull, &self.name, &what)
            .header(ACCEPT, &media_type::MANIFESTS.join(", "));
        let response = self.transport.send_following(&request).await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(None),
            _ => return Err(self.transport.refused(response, &what).await),
        }
        match header(response.headers(), &DOCKER_CONTENT_DIGEST) {
            Some(text) => digest::parse(text).map(Some),
            None => Ok(Some(self.manifest(target).await?.digest)),
        }
    }

    /// Stores a manifest under a tag or its digest and returns the digest of its bytes.
    pub async fn put_manifest(&self, target: &str, bytes: Bytes, media_type: &str) -> Result<Digest> {
        let what = format!("storing manifest {target} in {}", self.name);
        let digest = digest::sha256(&bytes)?;
        let url = self.url(&format!("manifests/{target}")).await?;
        let request =
            Outgoing::new(Method::PUT, url, Access::Push, &self.name, &what).body(fixed(bytes, media_type));
        let response = self.transport.send_retrying(&request).await?;
        if !response.status().is_success() {
            return Err(self.transport.refused(response, &what).await);
        }
        if let Some(stored) = header(response.headers(), &DOCKER_CONTENT_DIGEST)
            && stored.starts_with("sha256:")
        {
            digest::same(&digest::parse(stored)?, &digest, &format!("the manifest stored in {}", self.name))?;
        }
        Ok(digest)
    }

    /// Fetches the image of a tag or digest; of an index, the one for linux and this machine's architecture.
    pub async fn image(&self, target: &str) -> Result<(Manifest, ImageManifest)> {
        let mut target = target.to_owned();
        for _ in 0..=INDEX_DEPTH_MAX {
            let manifest = self.manifest(&target).await?;
            let bad = |e| {
                let text = format!("manifest {target} of {} is malformed", self.name);
                Error::with(ErrorKind::Protocol, text, e)
            };
            if media_type::is_image(&manifest.media_type) {
                let image = serde_json::from_slice(&manifest.bytes).map_err(bad)?;
                return Ok((manifest, image));
            }
            if !media_type::is_index(&manifest.media_type) {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("{target} of {} is {:?}, not an image", self.name, manifest.media_type),
                ));
            }
            let index: ImageIndex = serde_json::from_slice(&manifest.bytes).map_err(bad)?;
            target = choose_platform(&index, architecture()).ok_or_else(|| {
                let text = format!("{target} of {} has no image for linux/{}", self.name, architecture());
                Error::new(ErrorKind::NotFound, format!("{text}; name the image by its digest"))
            })?;
        }
        Err(Error::new(ErrorKind::Unsupported, format!("{target} of {}: indexes nested too deep", self.name)))
    }
}

/// This machine's architecture in the image specification's words.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The digest of the image for linux on `architecture`; of an index with a single image, that one.
fn choose_platform(index: &ImageIndex, architecture: &str) -> Option<String> {
    let fits = |os: &str, arch: &str| os == "linux" && arch == architecture;
    let images = || {
        index.manifests().iter().filter(|entry| {
            let kind = entry.media_type().to_string();
            // Attestations are listed as images for the platform unknown/unknown.
            let unknown = entry.platform().as_ref().is_some_and(|p| p.os().to_string() == "unknown");
            (media_type::is_image(&kind) || media_type::is_index(&kind)) && !unknown
        })
    };
    let fitting = images().find(|entry| {
        entry.platform().as_ref().is_some_and(|p| fits(&p.os().to_string(), &p.architecture().to_string()))
    });
    let only = || images().next().filter(|_| images().count() == 1);
    fitting.or_else(only).map(|entry| entry.digest().to_string())
}

/// The media type: the header's if it is one of ours, else what the manifest says of itself.
fn manifest_type(header: Option<&str>, bytes: &[u8], what: &str) -> Result<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Peek {
        media_type: Option<String>,
        manifests: Option<serde::de::IgnoredAny>,
        layers: Option<serde::de::IgnoredAny>,
    }
    let header = header.and_then(|value| value.split(';').next()).map(str::trim).unwrap_or_default();
    if media_type::MANIFESTS.contains(&header) {
        return Ok(header.to_owned());
    }
    let peek: Peek = serde_json::from_slice(bytes)
        .map_err(|e| Error::with(ErrorKind::Protocol, format!("{what}: the answer is not a manifest"), e))?;
    Ok(match peek {
        Peek { media_type: Some(kind), .. } => kind,
        Peek { manifests: Some(_), .. } => media_type::OCI_INDEX.to_owned(),
        Peek { layers: Some(_), .. } => media_type::OCI_MANIFEST.to_owned(),
        _ => header.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(platforms: &[(&str, &str)]) -> ImageIndex {
        let entries: Vec<_> = platforms
            .iter()
            .enumerate()
            .map(|(n, (os, arch))| {
                serde_json::json!({
                    "mediaType": media_type::OCI_MANIFEST, "size": 1, "digest": format!("sha256:{:064x}", n),
                    "platform": {"os": os, "architecture": arch},
                })
            })
            .collect();
        serde_json::from_value(serde_json::json!({"schemaVersion": 2, "manifests": entries})).unwrap()
    }

    #[test]
    fn the_image_of_the_platform_is_chosen() {
        let two = index(&[("linux", "arm64"), ("linux", "amd64")]);
        assert!(choose_platform(&two, "amd64").unwrap().ends_with('1'));
        assert!(choose_platform(&two, "arm64").unwrap().ends_with('0'));
        assert_eq!(choose_platform(&two, "riscv64"), None);
        let attested = index(&[("linux", "s390x"), ("unknown", "unknown")]);
        assert!(choose_platform(&attested, "amd64").unwrap().ends_with('0'));
    }

    #[test]
    fn a_manifest_without_a_useful_header_tells_its_own_type() {
        let of = |bytes: &[u8]| manifest_type(Some("text/plain"), bytes, "test").unwrap();
        assert_eq!(of(b"{\"mediaType\": \"x/y\"}"), "x/y");
        assert_eq!(of(b"{\"manifests\": []}"), media_type::OCI_INDEX);
        assert_eq!(of(b"{\"layers\": []}"), media_type::OCI_MANIFEST);
        let docker = Some("application/vnd.docker.distribution.manifest.v2+json; charset=utf-8");
        assert_eq!(manifest_type(docker, b"{}", "test").unwrap(), media_type::DOCKER_MANIFEST);
        assert!(manifest_type(None, b"<html>", "test").is_err());
    }
}
