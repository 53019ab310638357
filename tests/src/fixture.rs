//! Real disk images to work on.

use crate::{cmd, run_telling, workspace};
use anyhow::{Context, Result, bail};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Returns the bootable Debian image (qcow2), building it when the cache has none.
pub fn debian_image() -> Result<PathBuf> {
    let path = run_telling(&cmd(workspace().join("fixtures/debian-image.sh"), [""; 0]))?;
    Ok(PathBuf::from(path.trim_end()))
}

/// Returns GRUB's rescue CD, a bootable ISO 9660 image from Debian's grub-rescue-pc.
pub fn rescue_iso() -> Result<PathBuf> {
    let path = PathBuf::from("/usr/lib/grub-rescue/grub-rescue-cdrom.iso");
    if !path.is_file() {
        bail!("{} is missing; run `make deps` (package grub-rescue-pc)", path.display());
    }
    Ok(path)
}

/// A reproducible generator of bytes that do not compress.
#[derive(Debug, Clone)]
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// Makes `length` bytes.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            // xorshift64*: quick, and no compressor finds its period.
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            bytes.extend_from_slice(&self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

/// Writes a qcow2 image of `virtual_bytes` that holds `data_bytes` of noise in two pieces, zeros elsewhere.
///
/// Small enough to run many of, large enough to be caught in the middle.
pub fn noise_qcow2(path: &Path, virtual_bytes: u64, data_bytes: usize) -> Result<()> {
    let raw = path.with_extension("noise-raw");
    {
        let file = std::fs::File::create(&raw).with_context(|| format!("cannot create {}", raw.display()))?;
        file.set_len(virtual_bytes)?;
        let data = Noise::new(virtual_bytes).bytes(data_bytes);
        let (head, tail) = data.split_at(data_bytes / 2);
        file.write_all_at(head, 0)?;
        file.write_all_at(tail, virtual_bytes - tail.len() as u64)?;
    }
    crate::qemu::convert(&raw, "raw", path, "qcow2")?;
    std::fs::remove_file(&raw)?;
    Ok(())
}
