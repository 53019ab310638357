//! Byte sizes as people write and read them.

use std::fmt;

/// Parses bytes with an optional binary suffix: `10737418240`, `512M`, `512Mi`, `10G`, `1T` (all powers of 1024, as
/// qemu-img and Kubernetes' `Gi` mean them).
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix {
        "" | "B" => 0,
        "K" | "k" | "Ki" | "KiB" => 10,
        "M" | "Mi" | "MiB" => 20,
        "G" | "Gi" | "GiB" => 30,
        "T" | "Ti" | "TiB" => 40,
        _ => return Err(format!("'{text}' is not a size: write bytes, or a number with K, M, G or T")),
    };
    let number: u64 =
        number.parse().map_err(|_| format!("'{text}' is not a size: it must begin with a whole number"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is larger than a disk can be (16 EiB)"))
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
    fn sizes_are_powers_of_1024() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("10G"), Ok(10 << 30));
        assert_eq!(parse("512Mi"), Ok(512 << 20));
        assert!(parse("1.5G").is_err());
        assert!(parse("").is_err());
        assert!(parse("99999999999T").is_err());
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(Human(1023).to_string(), "1023 B");
        assert_eq!(Human(1 << 20).to_string(), "1.0 MiB");
        assert_eq!(Human((1 << 30) - 1).to_string(), "1.0 GiB");
        assert_eq!(Human(u64::MAX).to_string(), "16.0 EiB");
    }
}
