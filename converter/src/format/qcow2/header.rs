//! The header and its extensions.

use super::{
    CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, L1_BYTES_MAX, LAZY_REFCOUNTS, REFCOUNT_TABLE_BYTES_MAX,
    compression_type, incompatible,
};
use crate::error::{corrupt, limit, unsupported};
use crate::format::SECTOR_BYTES;
use crate::limits::Limits;
use crate::{Error, ErrorKind, Result};

use super::options::Compression;

const MAGIC: &[u8] = b"QFI\xfb";
const V2_HEADER_BYTES: usize = 72;
const V3_HEADER_BYTES_MIN: usize = 104;

/// Longest name of a backing file.
const BACKING_NAME_BYTES_MAX: usize = 1023;

/// Header extensions looked through for one; qemu writes five kinds.
const EXTENSIONS_MAX: usize = 64;

const EXTENSION_END: u32 = 0;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
const FEATURE_NAME_ENTRY_BYTES: usize = 48;

/// Autoclear feature bit: the bitmaps are as valid as the rest.
const AUTOCLEAR_BITMAPS: u64 = 1;

/// A validated header: what readers need, and what people ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Bytes a guest sees; a multiple of 512.
    pub virtual_size: u64,
    /// The cluster size as a power of two, 9 to 21.
    pub cluster_bits: u32,
    /// How compressed clusters are compressed; never [`Compression::None`].
    pub compression: Compression,
    /// Clusters have 32 subclusters.
    pub extended_l2: bool,
    /// The image was not closed cleanly: its reference counts may be wrong, its data is whole.
    pub dirty: bool,
    /// A program marked the image corrupt; it is read as far as that goes.
    pub corrupt: bool,
    /// Reference counts may be written lazily.
    pub lazy_refcounts: bool,
    /// Bits of one reference count.
    pub refcount_bits: u32,
    /// Internal snapshots; their disks are not read.
    pub snapshots: u32,
    /// Where the table of snapshots is, bytes; checked by nobody before it is read.
    pub snapshots_offset: u64,
    /// Where the refcount table is, bytes; a multiple of the cluster size, inside the file.
    pub refcount_table_offset: u64,
    /// Length of the refcount table.
    pub refcount_table_clusters: u32,
    /// Where the directory of persistent bitmaps is, and its length, bytes; checked by nobody before it is read.
    pub bitmap_directory: Option<(u64, u64)>,
    /// Where the active L1 table is, bytes; a multiple of the cluster size.
    pub l1_offset: u64,
    /// L1 entries that the virtual size needs.
    pub l1_entries: u64,
    /// L1 entries that the file has; as many or more.
    pub l1_stored_entries: u64,
}

/// Whether `head` begins a qcow2 file of version 2 or 3.
pub(super) fn recognises(head: &[u8]) -> bool {
    head.starts_with(MAGIC) && matches!(be32(head, 4), Some(2 | 3))
}

impl Header {
    /// Parses and validates the header at the start of `head`; `file_bytes` is the length of the file, if known.
    ///
    /// Fails with [`ErrorKind::ForeignFile`] for a backing or external data file, [`ErrorKind::Unsupported`] for
    /// encryption and unknown incompatible features, [`ErrorKind::Limit`] for sizes out of bounds and
    /// [`ErrorKind::Corrupt`] for the rest.
    pub(super) fn parse(head: &[u8], file_bytes: Option<u64>, limits: &Limits) -> Result<Self> {
        let fields = Fields::read(head).ok_or_else(|| corrupt("the qcow2 header is cut short"))?;
        let version = fields.version;
        if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&fields.cluster_bits) {
            return Err(corrupt(format!(
                "qcow2 cluster_bits is {}, not between {CLUSTER_BITS_MIN} and {CLUSTER_BITS_MAX}",
                fields.cluster_bits
            )));
        }
        let cluster_size = 1u64 << fields.cluster_bits;
        if version == 3
            && (fields.header_bytes < V3_HEADER_BYTES_MIN as u64 || fields.header_bytes > cluster_size)
        {
            return Err(corrupt(format!("qcow2 header_length is {}", fields.header_bytes)));
        }
        refuse_foreign(&fields, head)?;
        refuse_unsupported(&fields, head)?;

        let typed = fields.incompatible & incompatible::COMPRESSION_TYPE != 0;
        let compression = match (fields.compression_type, typed) {
            (compression_type::ZLIB, false) => Compression::Zlib,
            (compression_type::ZSTD, true) => Compression::Zstd,
            (compression_type::ZLIB | compression_type::ZSTD, _) => {
                return Err(corrupt(format!(
                    "qcow2 compression type {} contradicts the incompatible feature bit 3, which is {}",
                    fields.compression_type,
                    u8::from(typed)
                )));
            }
            (other, _) => {
                return Err(unsupported(format!(
                    "qcow2 compression type {other} is not known (0 zlib, 1 zstd are)"
                )));
            }
        };
        let extended_l2 = fields.incompatible & incompatible::EXTENDED_L2 != 0;
        if extended_l2 && fields.cluster_bits < 14 {
            return Err(corrupt(format!(
                "qcow2 extended L2 entries need clusters of 16 KiB or more, these have {cluster_size} bytes"
            )));
        }
        if fields.refcount_order > 6 {
            return Err(corrupt(format!("qcow2 refcount_order is {}, above 6", fields.refcount_order)));
        }

        // Like qemu: a guest sees whole sectors only.
        let virtual_size = fields.size / SECTOR_BYTES * SECTOR_BYTES;
        if virtual_size > limits.virtual_size_max {
            return Err(limit(format!(
                "the virtual disk has {virtual_size} bytes, more than the limit of {}",
                limits.virtual_size_max
            )));
        }
        let l2_entry_bytes = if extended_l2 { 16 } else { 8 };
        // At most 2 MiB times 256 Ki entries: no overflow.
        let l2_reach = cluster_size * (cluster_size / l2_entry_bytes);
        let l1_entries = virtual_size.div_ceil(l2_reach);
        if u64::from(fields.l1_entries) < l1_entries {
            return Err(corrupt(format!(
                "the qcow2 L1 table has {} entries, the virtual disk of {virtual_size} bytes needs {l1_entries}",
                fields.l1_entries
            )));
        }
        let l1_bytes = u64::from(fields.l1_entries) * 8;
        if l1_bytes > L1_BYTES_MAX || l1_entries * 8 > limits.table_bytes_max {
            return Err(limit(format!("the qcow2 L1 table of {l1_bytes} bytes is too large")));
        }
        check_table("L1 table", fields.l1_offset, l1_bytes, cluster_size, file_bytes)?;
        let refcount_bytes = u64::from(fields.refcount_table_clusters) * cluster_size;
        if refcount_bytes > REFCOUNT_TABLE_BYTES_MAX {
            return Err(limit(format!("the qcow2 refcount table of {refcount_bytes} bytes is too large")));
        }
        // Not read here, so that it may be cut short; but a file that ends before it is not whole.
        check_table("refcount table", fields.refcount_table_offset, 1, cluster_size, file_bytes)?;

        Ok(Self {
            version,
            virtual_size,
            cluster_bits: fields.cluster_bits,
            compression,
            extended_l2,
            dirty: fields.incompatible & incompatible::DIRTY != 0,
            corrupt: fields.incompatible & incompatible::CORRUPT != 0,
            lazy_refcounts: fields.compatible & LAZY_REFCOUNTS != 0,
            refcount_bits: 1 << fields.refcount_order,
            snapshots: fields.snapshots,
            snapshots_offset: fields.snapshots_offset,
            refcount_table_offset: fields.refcount_table_offset,
            refcount_table_clusters: fields.refcount_table_clusters,
            bitmap_directory: bitmap_directory(head, &fields),
            l1_offset: fields.l1_offset,
            l1_entries,
            l1_stored_entries: u64::from(fields.l1_entries),
        })
    }

    /// Cluster size in bytes.
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }
}

/// The header as stored; version 2 files get the values that version 3 says they have.
struct Fields {
    version: u32,
    backing_offset: u64,
    backing_bytes: u32,
    cluster_bits: u32,
    size: u64,
    crypt_method: u32,
    l1_entries: u32,
    l1_offset: u64,
    refcount_table_offset: u64,
    refcount_table_clusters: u32,
    snapshots: u32,
    snapshots_offset: u64,
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_bytes: u64,
    compression_type: u8,
}

impl Fields {
    fn read(head: &[u8]) -> Option<Self> {
        let mut fields = Self {
            version: be32(head, 4)?,
            backing_offset: be64(head, 8)?,
            backing_bytes: be32(head, 16)?,
            cluster_bits: be32(head, 20)?,
            size: be64(head, 24)?,
            crypt_method: be32(head, 32)?,
            l1_entries: be32(head, 36)?,
            l1_offset: be64(head, 40)?,
            refcount_table_offset: be64(head, 48)?,
            refcount_table_clusters: be32(head, 56)?,
            snapshots: be32(head, 60)?,
            snapshots_offset: be64(head, 64)?,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_bytes: V2_HEADER_BYTES as u64,
            compression_type: compression_type::ZLIB,
        };
        head.get(..V2_HEADER_BYTES)?;
        if fields.version >= 3 {
            fields.incompatible = be64(head, 72)?;
            fields.compatible = be64(head, 80)?;
            fields.autoclear = be64(head, 88)?;
            fields.refcount_order = be32(head, 96)?;
            fields.header_bytes = u64::from(be32(head, 100)?);
            if fields.header_bytes > V3_HEADER_BYTES_MIN as u64 {
                fields.compression_type = *head.get(V3_HEADER_BYTES_MIN)?;
            }
        }
        Some(fields)
    }
}

fn refuse_foreign(fields: &Fields, head: &[u8]) -> Result<()> {
    // qemu takes an empty name for no backing file.
    if fields.backing_offset != 0 && fields.backing_bytes != 0 {
        let name = usize::try_from(fields.backing_offset)
            .ok()
            .and_then(|at| head.get(at..)?.get(..(fields.backing_bytes as usize).min(BACKING_NAME_BYTES_MAX)))
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .unwrap_or_default();
        return Err(Error::new(
            ErrorKind::ForeignFile,
            format!(
                "the qcow2 image is an overlay of backing file {name:?}; flatten it with `qemu-img convert` first"
            ),
        ));
    }
    if fields.incompatible & incompatible::DATA_FILE != 0 {
        return Err(Error::new(
            ErrorKind::ForeignFile,
            "the qcow2 image keeps its data in an external data file; join them with `qemu-img convert` first",
        ));
    }
    Ok(())
}

fn refuse_unsupported(fields: &Fields, head: &[u8]) -> Result<()> {
    if fields.crypt_method != 0 {
        let method = match fields.crypt_method {
            1 => "AES".to_owned(),
            2 => "LUKS".to_owned(),
            other => format!("method {other}"),
        };
        return Err(unsupported(format!("the qcow2 image is encrypted ({method}); decrypt it first")));
    }
    let unknown = fields.incompatible & !incompatible::KNOWN;
    if unknown != 0 {
        let bit = unknown.trailing_zeros();
        let name = feature_name(head, fields, bit).map(|name| format!(" ({name:?})")).unwrap_or_default();
        return Err(unsupported(format!(
            "the qcow2 image needs the unknown incompatible feature bit {bit}{name}"
        )));
    }
    Ok(())
}

/// The name that the image itself gives to an incompatible feature bit.
fn feature_name(head: &[u8], fields: &Fields, bit: u32) -> Option<String> {
    let names = extension(head, fields, EXTENSION_FEATURE_NAMES)?;
    let mut entries = names.chunks_exact(FEATURE_NAME_ENTRY_BYTES);
    let entry = entries.find(|entry| entry[0] == 0 && u32::from(entry[1]) == bit)?;
    let name = entry[2..].split(|&b| b == 0).next()?;
    Some(String::from_utf8_lossy(name).into_owned())
}

/// Where the directory of bitmaps is, if the image says that they are valid.
fn bitmap_directory(head: &[u8], fields: &Fields) -> Option<(u64, u64)> {
    if fields.autoclear & AUTOCLEAR_BITMAPS == 0 {
        return None;
    }
    let body = extension(head, fields, EXTENSION_BITMAPS)?;
    (be32(body, 0)? > 0).then_some((be64(body, 16)?, be64(body, 8)?))
}

/// The body of the first header extension of one kind.
fn extension<'a>(head: &'a [u8], fields: &Fields, wanted: u32) -> Option<&'a [u8]> {
    let mut at = usize::try_from(fields.header_bytes).ok()?;
    for _ in 0..EXTENSIONS_MAX {
        let kind = be32(head, at)?;
        let bytes = be32(head, at.checked_add(4)?)? as usize;
        let body = head.get(at.checked_add(8)?..)?.get(..bytes)?;
        match kind {
            EXTENSION_END => return None,
            _ if kind == wanted => return Some(body),
            _ => at = at.checked_add(8)?.checked_add(bytes.checked_next_multiple_of(8)?)?,
        }
    }
    None
}

fn check_table(
    what: &str,
    offset: u64,
    bytes: u64,
    cluster_size: u64,
    file_bytes: Option<u64>,
) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    if offset == 0 || !offset.is_multiple_of(cluster_size) {
        return Err(corrupt(format!("the qcow2 {what} is at offset {offset}, not at a cluster boundary")));
    }
    let end = offset.checked_add(bytes);
    match (end, file_bytes) {
        (None, _) => Err(corrupt(format!("the qcow2 {what} is at offset {offset}, beyond any file"))),
        (Some(end), Some(file_bytes)) if end > file_bytes => Err(corrupt(format!(
            "the qcow2 {what} ends at offset {end}, beyond the end of the file of {file_bytes} bytes: the file is cut short or damaged"
        ))),
        _ => Ok(()),
    }
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_be_bytes(*b))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|b| u64::from_be_bytes(*b))
}
