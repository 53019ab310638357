//! Formats that are recognised, so that nobody takes them for raw disks, but not read.

/// Bytes of a VMDK descriptor looked through for its first line.
const DESCRIPTOR_HEAD_BYTES: usize = 512;

/// Names the format of a file that begins with `head`, if it is one of the known ones.
pub(super) fn recognise(head: &[u8]) -> Option<&'static str> {
    let starts = |magic: &[u8]| head.starts_with(magic);
    if starts(b"QFI\xfb") {
        // Versions 2 and 3 were taken before.
        return Some("qcow (version 1, or newer than 3)");
    }
    if starts(b"KDMV") || starts(b"COWD") || is_vmdk_descriptor(head) {
        return Some("vmdk");
    }
    if starts(b"QED\0") {
        return Some("qed");
    }
    if starts(b"LUKS\xba\xbe") {
        return Some("luks (an encrypted disk)");
    }
    if starts(b"WithoutFreeSpace") || starts(b"WithouFreSpacExt") {
        return Some("parallels");
    }
    None
}

/// The text file that describes a VMDK: its first line, after blank lines and other comments, is this comment.
fn is_vmdk_descriptor(head: &[u8]) -> bool {
    let text = &head[..head.len().min(DESCRIPTOR_HEAD_BYTES)];
    text.split(|&b| b == b'\n')
        .map(|line| line.trim_ascii())
        .take_while(|line| line.is_empty() || line.starts_with(b"#"))
        .any(|line| line.to_ascii_lowercase().starts_with(b"# disk descriptorfile"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_that_cannot_be_read_are_named() {
        assert_eq!(recognise(b"KDMV\x01\0\0\0"), Some("vmdk"));
        assert_eq!(recognise(b"\n# Disk DescriptorFile\r\nversion=1\n"), Some("vmdk"));
        assert_eq!(recognise(&[0; 4096]), None);
        assert_eq!(recognise(b""), None);
    }
}
