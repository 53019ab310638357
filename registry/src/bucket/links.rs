//! Links: small objects whose content is the text of a digest, as distribution writes them.

use std::time::SystemTime;

use bytes::Bytes;

use super::{Bucket, found};
use crate::digest::Digest;
use crate::s3::{self, Condition, Head, Put, Validity};

/// Longest link that is read; a sha512 digest takes 135 bytes.
const LINK_BYTES_MAX: u64 = 256;

/// A link that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) target: Digest,
    /// When it was placed, by the server's clock, in whole seconds.
    pub(super) modified: SystemTime,
    pub(super) etag: String,
}

impl Bucket {
    /// Reads a link; one that holds no digest counts as absent.
    pub(super) async fn read_link(&self, key: &str) -> s3::Result<Option<Link>> {
        let Some(object) = found(self.client.get(key, LINK_BYTES_MAX).await)? else { return Ok(None) };
        match String::from_utf8_lossy(&object.content).trim_end().parse() {
            Ok(target) => Ok(Some(Link { target, modified: object.modified, etag: object.etag })),
            Err(error) => {
                tracing::warn!(key, %error, "a link holds no digest and is passed over");
                Ok(None)
            }
        }
    }

    /// Reads a link, together with others who ask for it at the same time.
    pub(super) async fn read_link_together(&self, key: &str) -> s3::Result<Option<Link>> {
        self.links.read(key, self.read_link(key)).await
    }

    /// Looks at an object, if it is there, together with others who ask for it at the same time.
    pub(super) async fn look_together(&self, key: &str) -> s3::Result<Option<Head>> {
        self.heads.read(key, async { found(self.client.head(key).await) }).await
    }

    /// Places a link, in place of the one that was there.
    pub(super) async fn place_link(&self, key: &str, target: &Digest, validity: Validity) -> s3::Result<()> {
        self.place_link_if(key, target, None, validity).await
    }

    /// Places a link where the condition holds.
    pub(super) async fn place_link_if(
        &self,
        key: &str,
        target: &Digest,
        condition: Option<Condition>,
        validity: Validity,
    ) -> s3::Result<()> {
        let put = Put { condition, ..Put::default() }.valid(validity);
        self.client.put(key, Bytes::copy_from_slice(target.as_str().as_bytes()), put).await.map(drop)
    }
}
