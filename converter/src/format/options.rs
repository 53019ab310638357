//! Reading the values of `-o name=value` options, for every format alike.

use crate::format::Format;
use crate::{Error, ErrorKind, Result};

/// Parses a number of bytes with an optional binary unit: `65536`, `64k`, `64K`, `2M`, `1G`, `1T`.
pub(super) fn size(name: &str, value: &str) -> Result<u64> {
    let digits = value.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &value[digits.len()..] {
        "" => Some(0),
        unit => {
            ["k", "m", "g", "t"].iter().position(|u| unit.eq_ignore_ascii_case(u)).map(|at| 10 * (at + 1))
        }
    };
    let bytes = digits.parse::<u64>().ok().zip(shift).and_then(|(n, shift)| n.checked_mul(1 << shift));
    bytes.ok_or_else(|| invalid(name, value, "a number of bytes, as in 65536 or 64K"))
}

/// Parses `on` and `off`.
pub(super) fn switch(name: &str, value: &str) -> Result<bool> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(invalid(name, value, "on or off")),
    }
}

/// The error for a value that is none of those that `name` takes.
pub(super) fn invalid(name: &str, value: &str, known: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("option {name}={value} is not {known}"))
}

/// The error for an option that `format` does not have.
pub(super) fn unknown(format: Format, name: &str, known: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("format {format} has no option {name:?}; it has {known}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_writes_them() {
        for (value, bytes) in
            [("0", 0), ("512", 512), ("64k", 65536), ("64K", 65536), ("2M", 2 << 20), ("1T", 1 << 40)]
        {
            assert_eq!(size("cluster_size", value).unwrap(), bytes, "{value}");
        }
        for value in ["", "K", "1X", "-1", "1.5M", "99999999T", "1 K", "0x10", "é"] {
            assert!(size("cluster_size", value).is_err(), "{value}");
        }
    }
}
