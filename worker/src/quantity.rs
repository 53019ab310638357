//! Sizes as Kubernetes writes them (its API reference, `Quantity`): `10Gi`, `1.5G`, `1e9`, `10737418240`.

/// Digits of a number that are read; more say nothing of a size.
const DIGITS_MAX: usize = 27;

/// Reads a quantity as bytes; a part of a byte counts as one.
///
/// # Errors
/// What is wrong with `text`: it is no quantity, or more than 2^64 - 1 bytes.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = |why: &str| format!("{text:?} {why}; write a size such as 10Gi, 1.5G or 10737418240");
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = [whole, fraction].concat();
    if digits.is_empty() || fraction.contains('.') {
        return Err(wrong("is no size"));
    }
    if digits.len() > DIGITS_MAX {
        return Err(wrong("has too many digits"));
    }
    let digits: u128 = digits.parse().map_err(|_| wrong("is no size"))?;
    let (base, exponent) = scale(suffix).ok_or_else(|| wrong("has a suffix that is none"))?;
    let too_much = || wrong("is more than a disk can have");
    let power = |base: u128, exponent: u32| base.checked_pow(exponent).ok_or_else(too_much);
    let parts = u32::try_from(fraction.len()).map_err(|_| too_much())?;
    let times = power(base, exponent.max(0).unsigned_abs())?;
    let over = power(10, parts)?.checked_mul(power(base, exponent.min(0).unsigned_abs())?);
    let bytes = digits.checked_mul(times).zip(over).map(|(all, over)| all.div_ceil(over));
    bytes.and_then(|bytes| u64::try_from(bytes).ok()).ok_or_else(too_much)
}

/// What a suffix multiplies by: a base and its exponent.
fn scale(suffix: &str) -> Option<(u128, i32)> {
    Some(match suffix {
        "n" => (1000, -3),
        "u" => (1000, -2),
        "m" => (1000, -1),
        "" => (1000, 0),
        "k" => (1000, 1),
        "M" => (1000, 2),
        "G" => (1000, 3),
        "T" => (1000, 4),
        "P" => (1000, 5),
        "E" => (1000, 6),
        "Ki" => (1024, 1),
        "Mi" => (1024, 2),
        "Gi" => (1024, 3),
        "Ti" => (1024, 4),
        "Pi" => (1024, 5),
        "Ei" => (1024, 6),
        _ => (10, suffix.strip_prefix(['e', 'E'])?.parse().ok()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_what_kubernetes_means_by_it() {
        for (text, bytes) in [
            ("0", 0),
            ("10737418240", 10 << 30),
            ("10Gi", 10 << 30),
            ("10G", 10_000_000_000),
            ("1.5Gi", 3 << 29),
            (".5Ki", 512),
            ("5.Ki", 5 << 10),
            ("1e9", 1_000_000_000),
            ("1E3", 1000),
            ("1E", 1_000_000_000_000_000_000),
            ("12e-1", 2),
            ("1500m", 2),
            ("0.3", 1),
            ("15.99999Ei", 18_446_732_544_494_505_548),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for bad in
            ["", "Gi", "-1", "1 Gi", "1.2.3", ".", "10gi", "10GiB", "1e", "1e1.5", "16Ei", "1e99", "1e-99"]
                .into_iter()
                .chain(["0x10", "9999999999999999999999999999"])
        {
            assert!(parse(bad).is_err_and(|why| why.contains(bad)), "{bad}");
        }
    }
}
