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

/// Label: digest of the layer whose disk the index is of. A layer that others put above it, or make of it, is another one.
pub const LABEL_INDEXED_LAYER: &str = "indexed-layer";
/// Label: digest of the layer that holds the index.
pub const LABEL_INDEX_LAYER: &str = "index-layer";

/// A layer of an image: its digest and its length in bytes.
pub type Layer<'a> = (&'a Digest, u64);

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

/// The configuration of an image of the layer `disk` and, if there is one, the layer `index`, both uncompressed tars; raw
/// JSON.
pub fn config(labels: &DiskLabels, disk: &Digest, index: Option<&Digest>) -> Result<Vec<u8>> {
    let mut texts = HashMap::from([
        (LABEL_SIZE.to_owned(), labels.size.to_string()),
        (LABEL_VIRTUAL_SIZE.to_owned(), labels.virtual_size.to_string()),
        (LABEL_FORMAT.to_owned(), labels.format.to_string()),
        (LABEL_EROFS.to_owned(), "true".to_owned()),
    ]);
    if let Some(index) = index {
        texts.insert(LABEL_INDEXED_LAYER.to_owned(), disk.to_string());
        texts.insert(LABEL_INDEX_LAYER.to_owned(), index.to_string());
    }
    let diff_ids: Vec<_> = [disk].into_iter().chain(index).map(ToString::to_string).collect();
    let build = || -> oci_spec::Result<_> {
        // One entry for each layer: tools count them.
        let entry = HistoryBuilder::default().created_by("dvcr import").build()?;
        ImageConfigurationBuilder::default()
            .architecture(Arch::Amd64)
            .os(Os::Linux)
            .config(ConfigBuilder::default().working_dir("/").labels(texts).build()?)
            .history(vec![entry; diff_ids.len()])
            .rootfs(RootFsBuilder::default().typ("layers").diff_ids(diff_ids).build()?)
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

/// The manifest of an image of one configuration and these layers; raw JSON.
pub fn manifest(config: Layer<'_>, layers: &[Layer<'_>]) -> Result<Vec<u8>> {
    let descriptor = |media_type: &str, (digest, size): Layer<'_>| {
        DescriptorBuilder::default()
            .media_type(MediaType::from(media_type))
            .digest(digest.clone())
            .size(size)
            .build()
    };
    let build = || -> oci_spec::Result<_> {
        let layers = layers.iter().map(|layer| descriptor(media_type::OCI_LAYER, *layer));
        ImageManifestBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(media_type::OCI_MANIFEST)
            .config(descriptor(media_type::OCI_CONFIG, config)?)
            .layers(layers.collect::<oci_spec::Result<Vec<_>>>()?)
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
        let bare = String::from_utf8(config(&labels, &layer, None).unwrap()).unwrap();
        let expected = format!(
            "{{\"architecture\":\"amd64\",\"config\":{{\"Labels\":{{\"erofs-compatible-layers\":\"true\",\
             \"source-image-format\":\"qcow2\",\"source-image-size\":\"10\",\"source-image-virtual-size\":\"1024\"}},\
             \"WorkingDir\":\"/\"}},\"history\":[{{\"created_by\":\"dvcr import\"}}],\"os\":\"linux\",\
             \"rootfs\":{{\"diff_ids\":[\"{layer}\"],\"type\":\"layers\"}}}}"
        );
        assert_eq!(bare, expected);
        let index = digest::sha256(b"index").unwrap();
        let config = String::from_utf8(config(&labels, &layer, Some(&index)).unwrap()).unwrap();
        let expected = format!(
            "{{\"architecture\":\"amd64\",\"config\":{{\"Labels\":{{\"erofs-compatible-layers\":\"true\",\
             \"index-layer\":\"{index}\",\"indexed-layer\":\"{layer}\",\
             \"source-image-format\":\"qcow2\",\"source-image-size\":\"10\",\"source-image-virtual-size\":\"1024\"}},\
             \"WorkingDir\":\"/\"}},\"history\":[{{\"created_by\":\"dvcr import\"}},{{\"created_by\":\"dvcr import\"}}],\
             \"os\":\"linux\",\"rootfs\":{{\"diff_ids\":[\"{layer}\",\"{index}\"],\"type\":\"layers\"}}}}"
        );
        assert_eq!(config, expected);
        assert_eq!(super::labels(config.as_bytes()), Some(labels));
        assert_eq!(super::labels(&config.as_bytes().to_ascii_uppercase()), None);
        let manifest = manifest((&layer, 5), &[(&layer, 6), (&index, 7)]).unwrap();
        let expected = format!(
            "{{\"config\":{{\"digest\":\"{layer}\",\"mediaType\":\"application/vnd.oci.image.config.v1+json\",\"size\":5}},\
             \"layers\":[{{\"digest\":\"{layer}\",\"mediaType\":\"application/vnd.oci.image.layer.v1.tar\",\"size\":6}},\
             {{\"digest\":\"{index}\",\"mediaType\":\"application/vnd.oci.image.layer.v1.tar\",\"size\":7}}],\
             \"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"schemaVersion\":2}}"
        );
        assert_eq!(String::from_utf8(manifest).unwrap(), expected);
    }
}
