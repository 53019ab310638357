//! The image around a disk: labels, configuration and manifest (`docs/formats/disk-image.md`).

use std::collections::HashMap;

use dvcr_converter::format::Format;
use oci_spec::image::{
    Arch, ConfigBuilder, DescriptorBuilder, HistoryBuilder, ImageConfiguration, ImageConfigurationBuilder,
    ImageManifestBuilder, MediaType, Os, RootFsBuilder, SCHEMA_VERSION,
};

use crate::digest::Digest;
use crate::{Error, ErrorKind, Result, media_type};

/// Label: length of the stored file, decimal bytes.
pub const LABEL_SIZE: &str = "source-image-size";
/// Label: bytes a guest sees, decimal.
pub const LABEL_VIRTUAL_SIZE: &str = "source-image-virtual-size";
/// Label: format of the stored file.
pub const LABEL_FORMAT: &str = "source-image-format";
/// Label, always `true`: the layer ends with a complete end marker, as EROFS snapshotters need it.
pub const LABEL_EROFS: &str = "erofs-compatible-layers";

/// What an image says about the disk in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskLabels {
    /// Length of the stored file, bytes.
    pub size: u64,
    /// Bytes a guest sees.
    pub virtual_size: u64,
    /// Format of the stored file.
    pub format: Format,
}

/// The configuration of an image whose only layer is `layer`, an uncompressed tar; raw JSON.
pub fn config(labels: &DiskLabels, layer: &Digest) -> Result<Vec<u8>> {
    let labels = HashMap::from([
        (LABEL_SIZE.to_owned(), labels.size.to_string()),
        (LABEL_VIRTUAL_SIZE.to_owned(), labels.virtual_size.to_string()),
        (LABEL_FORMAT.to_owned(), labels.format.to_string()),
        (LABEL_EROFS.to_owned(), "true".to_owned()),
    ]);
    let build = || -> oci_spec::Result<_> {
        ImageConfigurationBuilder::default()
            .architecture(Arch::Amd64)
            .os(Os::Linux)
            .config(ConfigBuilder::default().working_dir("/").labels(labels).build()?)
            .rootfs(RootFsBuilder::default().typ("layers").diff_ids(vec![layer.to_string()]).build()?)
            .history(vec![HistoryBuilder::default().created_by("dvcr import").build()?])
            .build()
    };
    let config =
        build().map_err(|e| Error::with(ErrorKind::Invalid, "building the image configuration", e))?;
    // Through a Value, whose maps are sorted: the same disk gives the same digest.
    to_json(&config)
}

/// What the labels of a configuration, raw JSON, say of the disk; `None` if they are not those of [`config`].
pub fn labels(config: &[u8]) -> Option<DiskLabels> {
    let config: ImageConfiguration = serde_json::from_slice(config).ok()?;
    let labels = config.config().as_ref()?.labels().as_ref()?;
    Some(DiskLabels {
        size: labels.get(LABEL_SIZE)?.parse().ok()?,
        virtual_size: labels.get(LABEL_VIRTUAL_SIZE)?.parse().ok()?,
        format: labels.get(LABEL_FORMAT)?.parse().ok()?,
    })
}

/// The manifest of an image of one configuration and one layer, each with its length in bytes; raw JSON.
pub fn manifest(config: (&Digest, u64), layer: (&Digest, u64)) -> Result<Vec<u8>> {
    let descriptor = |media_type: &str, (digest, size): (&Digest, u64)| {
        DescriptorBuilder::default()
            .media_type(MediaType::from(media_type))
            .digest(digest.clone())
            .size(size)
            .build()
    };
    let build = || -> oci_spec::Result<_> {
        ImageManifestBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(media_type::OCI_MANIFEST)
            .config(descriptor(media_type::OCI_CONFIG, config)?)
            .layers(vec![descriptor(media_type::OCI_LAYER, layer)?])
            .build()
    };
    let manifest = build().map_err(|e| Error::with(ErrorKind::Invalid, "building the manifest", e))?;
    to_json(&manifest)
}

fn to_json(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_value(value)
        .and_then(|value| serde_json::to_vec(&value))
        .map_err(|e| Error::with(ErrorKind::Invalid, "writing JSON", e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest;

    #[test]
    fn configuration_and_manifest_are_the_documented_bytes() {
        let layer = digest::sha256(b"layer").unwrap();
        let labels = DiskLabels { size: 10, virtual_size: 1024, format: Format::Qcow2 };
        let config = String::from_utf8(config(&labels, &layer).unwrap()).unwrap();
        let expected = format!(
            "{{\"architecture\":\"amd64\",\"config\":{{\"Labels\":{{\"erofs-compatible-layers\":\"true\",\
             \"source-image-format\":\"qcow2\",\"source-image-size\":\"10\",\"source-image-virtual-size\":\"1024\"}},\
             \"WorkingDir\":\"/\"}},\"history\":[{{\"created_by\":\"dvcr import\"}}],\"os\":\"linux\",\
             \"rootfs\":{{\"diff_ids\":[\"{layer}\"],\"type\":\"layers\"}}}}"
        );
        assert_eq!(config, expected);
        assert_eq!(super::labels(config.as_bytes()), Some(labels));
        assert_eq!(super::labels(&config.as_bytes().to_ascii_uppercase()), None);
        let manifest = manifest((&layer, 5), (&layer, 6)).unwrap();
        let expected = format!(
            "{{\"config\":{{\"digest\":\"{layer}\",\"mediaType\":\"application/vnd.oci.image.config.v1+json\",\"size\":5}},\
             \"layers\":[{{\"digest\":\"{layer}\",\"mediaType\":\"application/vnd.oci.image.layer.v1.tar\",\"size\":6}}],\
             \"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"schemaVersion\":2}}"
        );
        assert_eq!(String::from_utf8(manifest).unwrap(), expected);
    }
}
