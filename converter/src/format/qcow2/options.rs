//! What kind of qcow2 file to write.

use std::fmt;
use std::str::FromStr;

use super::write::Qcow2Writer;
use super::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN};
use crate::format::{Format, options};
use crate::io::{CreateOptions, Sink, Writer};
use crate::{Error, ErrorKind, Result};

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Stored as they are.
    None,
    /// Raw deflate streams.
    Zlib,
    /// One zstd frame per cluster.
    #[default]
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Compression::None => "none",
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        })
    }
}

impl FromStr for Compression {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "none" => Ok(Compression::None),
            "zlib" => Ok(Compression::Zlib),
            "zstd" => Ok(Compression::Zstd),
            other => Err(Error::new(
                ErrorKind::Unsupported,
                format!("unknown compression {other:?}; known are none, zlib, zstd"),
            )),
        }
    }
}

/// Which clusters get their place before a guest writes to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Only those that are not zero.
    #[default]
    Off,
    /// All, so that the tables never change again; those that are zero are holes of the file.
    Metadata,
}

/// What kind of qcow2 file to write: version 3, reference counts of 16 bits that are always right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// Bytes; a power of two from 512 to 2 Mi.
    pub cluster_size: u32,
    /// How clusters are compressed; one that does not shrink is stored as it is.
    pub compression: Compression,
    /// Which clusters get their place before a guest writes to them; all of them only without compression.
    pub preallocation: Preallocation,
    /// The virtual disk is made at least this large, bytes.
    pub virtual_size_min: u64,
}

impl Default for WriteOptions {
    /// 64 KiB clusters, zstd.
    fn default() -> Self {
        Self {
            cluster_size: 64 << 10,
            compression: Compression::default(),
            preallocation: Preallocation::Off,
            virtual_size_min: 0,
        }
    }
}

impl WriteOptions {
    /// Understands the options that `qemu-img convert -O qcow2` has for this; `compress` is its `-c`.
    pub(super) fn parse(compress: bool, pairs: &[(&str, &str)]) -> Result<Self> {
        let mut read = Self { compression: Compression::Zlib, ..Self::default() };
        for &(name, value) in pairs {
            match name {
                "cluster_size" => {
                    // Too large for its type is too large for qcow2, and refused there with a reason.
                    read.cluster_size = u32::try_from(options::size(name, value)?).unwrap_or(u32::MAX);
                }
                "compression_type" => read.compression = value.parse()?,
                "preallocation" => {
                    read.preallocation = match value {
                        "off" => Preallocation::Off,
                        "metadata" => Preallocation::Metadata,
                        _ => return Err(options::invalid(name, value, "off or metadata")),
                    }
                }
                "lazy_refcounts" if !options::switch(name, value)? => {}
                "lazy_refcounts" => {
                    return Err(options::invalid(name, value, "off: counts are always right"));
                }
                "compat" if matches!(value, "1.1" | "v3") => {}
                "compat" => return Err(options::invalid(name, value, "1.1, the version that is written")),
                _ => {
                    let known = "cluster_size, compression_type, preallocation, lazy_refcounts, compat";
                    return Err(options::unknown(Format::Qcow2, name, known));
                }
            }
        }
        if !compress {
            read.compression = Compression::None;
        } else if read.preallocation != Preallocation::Off {
            let text = "compressed clusters have no place in advance; leave out the compression or the preallocation";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        read.cluster_bits()?;
        Ok(read)
    }

    /// The cluster size as a power of two; fails with [`ErrorKind::Unsupported`] if it is none that qcow2 allows.
    pub(super) fn cluster_bits(&self) -> Result<u32> {
        let bits = self.cluster_size.checked_ilog2().unwrap_or(0);
        if !self.cluster_size.is_power_of_two() || !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("cluster size {} is not a power of two from 512 to 2097152 bytes", self.cluster_size),
            ));
        }
        Ok(bits)
    }
}

impl CreateOptions for WriteOptions {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn create<'a>(&self, sink: &'a mut dyn Sink, virtual_size: Option<u64>) -> Result<Box<dyn Writer + 'a>> {
        Ok(Box::new(Qcow2Writer::new(sink, self, virtual_size)?))
    }

    fn needs_size(&self) -> bool {
        false
    }
}
