//! What kind of VHDX file to write.

use super::write::VhdxWriter;
use super::{BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, MIB};
use crate::format::{Format, options};
use crate::io::{CreateOptions, Sink, Writer};
use crate::{Error, ErrorKind, Result};

/// What kind of VHDX file to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WriteOptions {
    /// Bytes of a payload block; zero to choose them by the size of the disk.
    block_bytes: u64,
    /// Whether every block gets its place.
    pub(super) fixed: bool,
    /// Bytes of the log, a multiple of 1 MiB.
    pub(super) log_bytes: u32,
    /// Whether a block that is not stored is told to be zero, or never to have been written.
    pub(super) state_zero: bool,
}

impl WriteOptions {
    /// Understands the options that `qemu-img convert -O vhdx` has.
    pub(super) fn parse(compress: bool, pairs: &[(&str, &str)]) -> Result<Self> {
        let mut read = Self { block_bytes: 0, fixed: false, log_bytes: MIB as u32, state_zero: true };
        for &(name, value) in pairs {
            match name {
                "subformat" => {
                    read.fixed = match value {
                        "dynamic" => false,
                        "fixed" => true,
                        _ => return Err(options::invalid(name, value, "dynamic or fixed")),
                    }
                }
                "block_size" => {
                    let bytes = options::size(name, value)?;
                    let known =
                        bytes.is_power_of_two() && (BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&bytes);
                    if bytes != 0 && !known {
                        let known = "0, or a power of two from 1M to 256M";
                        return Err(options::invalid(name, value, known));
                    }
                    read.block_bytes = bytes;
                }
                "log_size" => {
                    let bytes = options::size(name, value)?.max(MIB).checked_next_multiple_of(MIB);
                    let bytes = bytes.and_then(|bytes| u32::try_from(bytes).ok());
                    read.log_bytes =
                        bytes.ok_or_else(|| options::invalid(name, value, "a size below 4G, as in 1M"))?;
                }
                "block_state_zero" => read.state_zero = options::switch(name, value)?,
                _ => {
                    let known = "subformat, block_size, log_size, block_state_zero";
                    return Err(options::unknown(Format::Vhdx, name, known));
                }
            }
        }
        if compress {
            let text = "format vhdx has no compression; leave it out, or write qcow2";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        Ok(read)
    }

    /// Bytes of a payload block of a disk of `virtual_size`: what was asked for, or what qemu chooses.
    pub(super) fn block_bytes(&self, virtual_size: u64) -> u64 {
        match self.block_bytes {
            0 if virtual_size > 32 << 40 => 64 << 20,
            0 if virtual_size > 100 << 30 => 32 << 20,
            0 if virtual_size > 1 << 30 => 16 << 20,
            0 => 8 << 20,
            chosen => chosen,
        }
    }
}

impl CreateOptions for WriteOptions {
    fn format(&self) -> Format {
        Format::Vhdx
    }

    fn create<'a>(&self, sink: &'a mut dyn Sink, virtual_size: Option<u64>) -> Result<Box<dyn Writer + 'a>> {
        let unknown =
            || Error::new(ErrorKind::Unsupported, "a VHDX file needs the size of its disk in advance");
        Ok(Box::new(VhdxWriter::new(sink, self, virtual_size.ok_or_else(unknown)?)?))
    }
}
