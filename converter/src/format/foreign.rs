//! Formats that are recognised, so that nobody takes them for raw disks, but not read.

/// Names the format of a file that begins with `head`, if it is one of the known ones.
pub(super) fn recognise(head: &[u8]) -> Option<&'static str> {
    let starts = |magic: &[u8]| head.starts_with(magic);
    if starts(b"QFI\xfb") {
        // Versions 2 and 3 were taken before.
        return Some("qcow (version 1, or newer than 3)");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_that_cannot_be_read_are_named() {
        assert_eq!(recognise(b"QED\0\x01\0\0\0"), Some("qed"));
        assert_eq!(recognise(&[0; 4096]), None);
        assert_eq!(recognise(b""), None);
    }
}
