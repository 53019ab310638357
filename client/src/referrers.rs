//! What refers to a manifest: signatures, attestations and the like (distribution specification, "Listing Referrers").

use http::header::ACCEPT;
use http::{Method, StatusCode};
use oci_spec::image::{Descriptor, ImageIndex};

use crate::digest::Digest;
use crate::manifest::MANIFEST_BYTES_MAX;
use crate::media_type;
use crate::repository::{Access, Repository};
use crate::request::{Outgoing, read_bounded};
use crate::{Error, ErrorKind, Result};

impl Repository {
    /// Lists the manifests of `artifact_type` whose subject is `digest`, as far as they stand on the first page of the answer.
    /// A registry without that list is asked for the tag that clients keep in its place.
    pub async fn referrers(&self, digest: &Digest, artifact_type: &str) -> Result<Vec<Descriptor>> {
        let what = format!("looking up what refers to {digest} of {}", self.name);
        let mut url = self.url(&format!("referrers/{digest}")).await?;
        url.query_pairs_mut().append_pair("artifactType", artifact_type);
        let request = Outgoing::new(Method::GET, url, Access::Pull, &self.name, &what)
            .header(ACCEPT, media_type::OCI_INDEX);
        let response = self.transport.send_following(&request).await?;
        let bytes = match response.status() {
            StatusCode::OK => read_bounded(response, MANIFEST_BYTES_MAX).await?.into(),
            // Registries that do not know the list say so in several ways.
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::BAD_REQUEST => {
                match self.manifest(&digest.as_ref().replace(':', "-")).await {
                    Ok(manifest) => manifest.bytes,
                    Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
                    Err(error) => return Err(error),
                }
            }
            _ => return Err(self.transport.refused(response, &what).await),
        };
        let index: ImageIndex = serde_json::from_slice(&bytes)
            .map_err(|e| Error::with(ErrorKind::Protocol, format!("{what}: the answer is no index"), e))?;
        let is_wanted = |entry: &&Descriptor| {
            entry.artifact_type().as_ref().is_some_and(|kind| kind.to_string() == artifact_type)
        };
        Ok(index.manifests().iter().filter(is_wanted).cloned().collect())
    }
}
