//! Byte sizes as people write and read them.

use std::fmt;

use dvcr_registry::Size;

/// Parses bytes with an optional binary suffix: `10737418240`, `512M`, `512Mi`, `10G`, `1T` (all powers of 1024, as
/// qemu-img and Kubernetes' `Gi` mean them).
pub fn parse(text: &str) -> Result<u64, String> {
    text.parse().map(|Size(bytes)| bytes)
}

/// Displays bytes with a binary unit and one decimal: `1.8 GiB`.
pub struct Human(pub u64);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = UNITS[0];
        for next in &UNITS[1..] {
            if value < 1023.95 {
                break;
            }
            value /= 1024.0;
            unit = next;
        }
        write!(f, "{value:.1} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(Human(1023).to_string(), "1023 B");
        assert_eq!(Human(1 << 20).to_string(), "1.0 MiB");
        assert_eq!(Human((1 << 30) - 1).to_string(), "1.0 GiB");
        assert_eq!(Human(u64::MAX).to_string(), "16.0 EiB");
    }
}
