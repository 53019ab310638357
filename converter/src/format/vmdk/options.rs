//! What kind of VMDK file to write.

use std::fmt;

use super::stream::StreamWriter;
use super::unsupported;
use super::write::SparseWriter;
use crate::Result;
use crate::format::{Format, options};
use crate::io::{CreateOptions, Sink, Writer};

/// The version of the virtual hardware, and of the tools in the guest, that qemu writes.
const HW_VERSION: u32 = 4;
const HW_VERSION_6: u32 = 6;
const TOOLS_VERSION: u32 = i32::MAX as u32;

/// How the disk lies in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Subformat {
    /// Grains as they are, tables before them: a disk that can be written to.
    #[default]
    MonolithicSparse,
    /// Compressed grains, tables after them: a file made from front to end, as OVA archives hold.
    StreamOptimized,
}

impl fmt::Display for Subformat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Subformat::MonolithicSparse => "monolithicSparse",
            Subformat::StreamOptimized => "streamOptimized",
        })
    }
}

/// The disk controller that VMware gives the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AdapterType {
    /// IDE.
    #[default]
    Ide,
    /// BusLogic SCSI.
    BusLogic,
    /// LSI Logic SCSI.
    LsiLogic,
    /// What old ESX servers call a SCSI controller.
    LegacyEsx,
}

impl AdapterType {
    const ALL: [AdapterType; 4] =
        [AdapterType::Ide, AdapterType::BusLogic, AdapterType::LsiLogic, AdapterType::LegacyEsx];
}

impl fmt::Display for AdapterType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            AdapterType::Ide => "ide",
            AdapterType::BusLogic => "buslogic",
            AdapterType::LsiLogic => "lsilogic",
            AdapterType::LegacyEsx => "legacyESX",
        })
    }
}

/// What kind of VMDK file to write: grains of 64 KiB, one extent, the descriptor inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// How the disk lies in the file.
    pub subformat: Subformat,
    /// The controller that the descriptor asks for.
    pub adapter_type: AdapterType,
    /// Version of the virtual hardware that the descriptor asks for.
    pub hw_version: u32,
    /// Version of VMware's tools that the descriptor tells.
    pub tools_version: u32,
}

impl Default for WriteOptions {
    /// monolithicSparse for an IDE controller, as qemu has it.
    fn default() -> Self {
        Self {
            subformat: Subformat::default(),
            adapter_type: AdapterType::default(),
            hw_version: HW_VERSION,
            tools_version: TOOLS_VERSION,
        }
    }
}

impl WriteOptions {
    /// Understands the options that `qemu-img convert -O vmdk` has for this; `compress` is its `-c`, which only
    /// streamOptimized can do.
    pub(super) fn parse(compress: bool, pairs: &[(&str, &str)]) -> Result<Self> {
        let mut read = Self::default();
        let mut subformat = None;
        for &(name, value) in pairs {
            match name {
                "subformat" => {
                    let known = [Subformat::MonolithicSparse, Subformat::StreamOptimized];
                    let found = known.into_iter().find(|known| known.to_string() == value);
                    let names = "monolithicSparse or streamOptimized: a disk is one file";
                    subformat = Some(found.ok_or_else(|| options::invalid(name, value, names))?);
                }
                "adapter_type" => {
                    let found = AdapterType::ALL.into_iter().find(|known| known.to_string() == value);
                    let names = "ide, buslogic, lsilogic or legacyESX";
                    read.adapter_type = found.ok_or_else(|| options::invalid(name, value, names))?;
                }
                "hwversion" => read.hw_version = number(name, value)?,
                "toolsversion" => read.tools_version = number(name, value)?,
                "compat6" if options::switch(name, value)? => read.hw_version = HW_VERSION_6,
                "compat6" => {}
                "zeroed_grain" if !options::switch(name, value)? => {}
                "zeroed_grain" => {
                    return Err(options::invalid(name, value, "off: grains of zeros are left out"));
                }
                _ => {
                    let known = "subformat, adapter_type, hwversion, toolsversion, compat6, zeroed_grain";
                    return Err(options::unknown(Format::Vmdk, name, known));
                }
            }
        }
        read.subformat = match (subformat, compress) {
            (Some(Subformat::MonolithicSparse), true) => {
                return Err(unsupported(
                    "VMDK monolithicSparse cannot be compressed; leave out the compression, or write \
                     subformat=streamOptimized",
                ));
            }
            (Some(subformat), _) => subformat,
            (None, true) => Subformat::StreamOptimized,
            (None, false) => Subformat::MonolithicSparse,
        };
        Ok(read)
    }
}

impl CreateOptions for WriteOptions {
    fn format(&self) -> Format {
        Format::Vmdk
    }

    fn create<'a>(&self, sink: &'a mut dyn Sink, virtual_size: Option<u64>) -> Result<Box<dyn Writer + 'a>> {
        let size = virtual_size
            .ok_or_else(|| unsupported("a VMDK file begins with the size of the disk, which is not known"))?;
        Ok(match self.subformat {
            Subformat::MonolithicSparse => Box::new(SparseWriter::new(sink, self, size)?),
            Subformat::StreamOptimized => Box::new(StreamWriter::new(sink, self, size)?),
        })
    }

    fn is_stream(&self) -> bool {
        self.subformat == Subformat::StreamOptimized
    }
}

fn number(name: &str, value: &str) -> Result<u32> {
    value.parse().map_err(|_| options::invalid(name, value, "a number"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn compression_means_a_stream() {
        let subformat =
            |compress, pairs: &[_]| WriteOptions::parse(compress, pairs).map(|read| read.subformat);
        let (sparse, stream) = (("subformat", "monolithicSparse"), ("subformat", "streamOptimized"));
        assert_eq!(subformat(false, &[]).unwrap(), Subformat::MonolithicSparse);
        assert_eq!(subformat(true, &[]).unwrap(), Subformat::StreamOptimized);
        assert_eq!(subformat(false, &[stream]).unwrap(), Subformat::StreamOptimized);
        assert_eq!(subformat(true, &[sparse]).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn unknown_options_and_values_are_told() {
        for (name, value) in [
            ("subformat", "monolithicFlat"),
            ("adapter_type", "nvme"),
            ("hwversion", "new"),
            ("zeroed_grain", "on"),
            ("compat6", "yes"),
            ("cluster_size", "64k"),
        ] {
            let error = WriteOptions::parse(false, &[(name, value)]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
