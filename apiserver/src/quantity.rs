//! Quantities: numbers with a suffix, as capacities, requests and quotas are written (`100m`, `1536Mi`,
//! `1e3`).
//!
//! A quantity remembers which family of suffixes it was written with, and is written with the same one: as a
//! whole number with the largest suffix that loses nothing. It is exact down to 10⁻⁹; what is finer is
//! rounded away from zero.
//!
//! Source: <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

use serde_json::Value;

/// The longest text of a quantity that is read.
pub const QUANTITY_BYTES_MAX: usize = 128;
/// Units of the value in 1.
const NANO: i128 = 1_000_000_000;
/// The decimal exponent of one unit.
const NANO_EXPONENT: i32 = -9;
/// Significant digits up to which Kubernetes keeps a text as it was written, where it is canonical already.
const KEPT_DIGITS_MAX: i32 = 18;

/// A fixed-point number with the family of its suffix. Equal and ordered by value alone.
///
/// Its magnitude is below 1.7 × 10²⁹; a binary suffix caps it at 2⁶³ - 1, as in Kubernetes.
#[derive(Clone, Debug)]
pub struct Quantity {
    nanos: i128,
    format: Format,
    /// The text it was read from, where Kubernetes keeps that.
    text: Option<Box<str>>,
}

/// The family of a quantity's suffix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `12e6`.
    DecimalExponent,
    /// `12Mi`, powers of 1024.
    Binary,
    /// `12M`, powers of 1000.
    Decimal,
}

/// Why a text is no quantity; the messages are those of Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
    Form,
    #[error("unable to parse numeric part of quantity")]
    Number,
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

impl Quantity {
    /// Zero, which takes the family of what is added to it.
    pub const ZERO: Self = Self { nanos: 0, format: Format::Decimal, text: None };

    /// A whole number.
    pub fn new(value: i64, format: Format) -> Self {
        Self { nanos: i128::from(value) * NANO, format, text: None }
    }

    /// Reads a quantity out of an object: a string, spaces around it ignored, or a number.
    ///
    /// # Errors
    ///
    /// The value is neither, or no quantity.
    pub fn from_value(value: &Value) -> Result<Self, QuantityError> {
        match value {
            Value::String(text) => text.trim().parse(),
            Value::Number(number) => number.to_string().parse(),
            _ => Err(QuantityError::Form),
        }
    }

    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }

    pub fn is_negative(&self) -> bool {
        self.nanos < 0
    }

    /// The sum; `None` if it is out of bounds.
    pub fn checked_add(&self, other: &Self) -> Option<Self> {
        let format = if self.is_zero() { other.format } else { self.format };
        Some(Self { nanos: self.nanos.checked_add(other.nanos)?, format, text: None })
    }

    /// The difference; `None` if it is out of bounds.
    pub fn checked_sub(&self, other: &Self) -> Option<Self> {
        let format = if self.is_zero() { other.format } else { self.format };
        Some(Self { nanos: self.nanos.checked_sub(other.nanos)?, format, text: None })
    }

    /// The value as a whole number, rounded away from zero; `None` if it does not fit.
    pub fn value(&self) -> Option<i64> {
        let (whole, rest) = (self.nanos / NANO, self.nanos % NANO);
        i64::try_from(whole + rest.signum()).ok()
    }

    /// Mantissa and decimal exponent, a multiple of 3, the largest with which nothing is lost.
    fn decimal(&self, exponent_max: i32) -> (i128, i32) {
        let (mut mantissa, mut exponent) = (self.nanos, NANO_EXPONENT);
        while exponent < exponent_max && mantissa % 1000 == 0 {
            mantissa /= 1000;
            exponent += 3;
        }
        (mantissa, exponent)
    }
}

/// The canonical text, or the text it was read from where Kubernetes keeps that.
impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DECIMAL_SUFFIXES: [&str; 10] = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];
        const BINARY_SUFFIXES: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
        if let Some(text) = &self.text {
            return f.write_str(text);
        }
        if self.is_zero() {
            return f.write_str("0");
        }
        match self.format {
            Format::Binary
                if self.nanos % NANO == 0 && self.nanos.unsigned_abs() >= 1024 * NANO.unsigned_abs() =>
            {
                let (mut mantissa, mut power) = (self.nanos / NANO, 0);
                while power + 1 < BINARY_SUFFIXES.len() && mantissa % 1024 == 0 {
                    mantissa /= 1024;
                    power += 1;
                }
                write!(f, "{mantissa}{}", BINARY_SUFFIXES[power])
            }
            Format::Binary | Format::Decimal => {
                let (mantissa, exponent) = self.decimal(18);
                let suffix = usize::try_from((exponent - NANO_EXPONENT) / 3).ok();
                let suffix =
                    suffix.and_then(|index| DECIMAL_SUFFIXES.get(index)).copied().unwrap_or_default();
                write!(f, "{mantissa}{suffix}")
            }
            Format::DecimalExponent => match self.decimal(i32::MAX) {
                (mantissa, 0) => write!(f, "{mantissa}"),
                (mantissa, exponent) => write!(f, "{mantissa}e{exponent}"),
            },
        }
    }
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        if text.is_empty() || text.len() > QUANTITY_BYTES_MAX {
            return Err(QuantityError::Form);
        }
        let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
        let number_end = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (whole, rest) = unsigned.split_at(number_end(unsigned));
        let (fraction, suffix) = match rest.strip_prefix('.') {
            Some(rest) => rest.split_at(number_end(rest)),
            None => ("", rest),
        };
        let (format, scale) = read_suffix(suffix)?;
        let has_digits = !whole.is_empty() || !fraction.is_empty();
        let trimmed = whole.trim_start_matches('0');
        let whole = if trimmed.is_empty() { "0" } else { trimmed };
        let units = Units::read(whole, fraction, scale)?;
        // A few forms without a digit are zero in Kubernetes.
        if !has_digits && !units.is_small {
            return Err(QuantityError::Number);
        }
        let is_kept = units.is_kept(scale, whole, fraction);
        let mut nanos = units.nanos;
        let mut format = format;
        if format == Format::Binary {
            nanos = nanos.min(i128::from(i64::MAX) * NANO);
            // Of a fraction below 1 the binary suffix would be lost in any case.
            if !is_kept && (1..NANO).contains(&nanos) {
                format = Format::Decimal;
            }
        }
        if text.starts_with('-') {
            nanos = -nanos;
        }
        Ok(Self { nanos, format, text: is_kept.then(|| text.into()) })
    }
}

/// What a suffix multiplies by.
#[derive(Clone, Copy)]
enum Scale {
    /// A power of 10.
    Ten(i32),
    /// A power of 2.
    Two(u32),
}

fn read_suffix(suffix: &str) -> Result<(Format, Scale), QuantityError> {
    let decimal = |exponent| Ok((Format::Decimal, Scale::Ten(exponent)));
    let binary = |exponent| Ok((Format::Binary, Scale::Two(exponent)));
    let letters = suffix.trim_start_matches(|c| "eEinumkKMGTP".contains(c));
    let digits = letters.strip_prefix(['+', '-']).unwrap_or(letters);
    if !digits.bytes().all(|c| c.is_ascii_digit()) {
        return Err(QuantityError::Form);
    }
    match suffix {
        "" => decimal(0),
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(10),
        "Mi" => binary(20),
        "Gi" => binary(30),
        "Ti" => binary(40),
        "Pi" => binary(50),
        "Ei" => binary(60),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E']).ok_or(QuantityError::Suffix)?;
            let exponent = exponent.parse().map_err(|_| QuantityError::Suffix)?;
            Ok((Format::DecimalExponent, Scale::Ten(exponent)))
        }
    }
}

/// A magnitude on its way to nanos.
struct Units {
    nanos: i128,
    /// All digits were read without rounding and there are few of them.
    is_small: bool,
}

impl Units {
    fn read(whole: &str, fraction: &str, scale: Scale) -> Result<Self, QuantityError> {
        let length = |text: &str| i32::try_from(text.len()).unwrap_or(i32::MAX);
        let digits_len = length(whole).saturating_add(length(fraction));
        let is_small = match scale {
            Scale::Ten(exponent) => {
                digits_len <= KEPT_DIGITS_MAX && exponent.saturating_sub(length(fraction)) >= NANO_EXPONENT
            }
            Scale::Two(exponent) => {
                fraction.is_empty() && digits_len.saturating_add(binary_digits(exponent)) <= 14
            }
        };
        let significant = format!("{whole}{fraction}");
        let significant = significant.trim_start_matches('0');
        if significant.is_empty() {
            return Ok(Self { nanos: 0, is_small });
        }
        // The text is bounded: so is what a number of its digits needs, except for what the bounds of the
        // type refuse.
        let nanos = match scale {
            Scale::Ten(exponent) => {
                let shift = exponent.saturating_sub(length(fraction)).saturating_sub(NANO_EXPONENT);
                shifted(significant, shift)?
            }
            Scale::Two(exponent) => binary(significant, length(fraction), 1_i128 << exponent)?,
        };
        Ok(Self { nanos, is_small })
    }

    /// Whether Kubernetes writes the quantity as it was read, rather than in its canonical form.
    fn is_kept(&self, scale: Scale, whole: &str, fraction: &str) -> bool {
        let ends_in_zeros = || format!("{whole}{fraction}").ends_with("000");
        self.is_small
            && match scale {
                Scale::Ten(exponent) => {
                    let places = i32::try_from(fraction.len()).unwrap_or(i32::MAX);
                    !whole.starts_with('0') && (exponent - places) % 3 == 0 && !ends_in_zeros()
                }
                Scale::Two(_) => whole.parse::<i64>().is_ok_and(|number| number % 8 != 0),
            }
    }
}

/// About how many decimal digits a power of two has.
fn binary_digits(exponent: u32) -> i32 {
    i32::try_from(exponent * 3 / 10).unwrap_or(i32::MAX)
}

/// The digits times 10 to the power of `shift`, rounded up.
fn shifted(digits: &str, shift: i32) -> Result<i128, QuantityError> {
    if let Ok(zeros) = usize::try_from(shift) {
        if zeros > QUANTITY_BYTES_MAX {
            return Err(QuantityError::Number);
        }
        return format!("{digits}{}", "0".repeat(zeros)).parse().map_err(|_| QuantityError::Number);
    }
    let cut = usize::try_from(shift.unsigned_abs()).unwrap_or(usize::MAX);
    let Some(kept) = digits.len().checked_sub(cut) else { return Ok(1) };
    let (kept, lost) = digits.split_at(kept);
    let number: i128 = if kept.is_empty() { 0 } else { kept.parse().map_err(|_| QuantityError::Number)? };
    Ok(number + i128::from(lost.bytes().any(|c| c != b'0')))
}

/// The digits, of which the last `places` are a fraction, times `factor`, in nanos, rounded up, at most what
/// fits.
fn binary(digits: &str, places: i32, factor: i128) -> Result<i128, QuantityError> {
    let cap = i128::from(i64::MAX) * NANO;
    let places = usize::try_from(places).map_err(|_| QuantityError::Number)?;
    let (whole, fraction) = digits.split_at(digits.len().saturating_sub(places));
    let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().unwrap_or(i128::MAX) };
    let Some(whole) = whole.checked_mul(factor).and_then(|whole| whole.checked_mul(NANO)) else {
        return Ok(cap);
    };
    // Long multiplication, digit by digit from the last: the carry stays below the factor in nanos.
    let unit = factor.checked_mul(NANO).ok_or(QuantityError::Number)?;
    let leading = places.saturating_sub(fraction.len());
    let (mut below, mut is_lost) = (0_i128, false);
    for digit in fraction.bytes().rev().chain(std::iter::repeat_n(b'0', leading)) {
        let sum = i128::from(digit - b'0') * unit + below;
        is_lost |= sum % 10 != 0;
        below = sum / 10;
    }
    Ok(whole.saturating_add(below).saturating_add(i128::from(is_lost)).min(cap))
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl Hash for Quantity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.nanos.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Quantity {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn quantities_are_written_as_kubernetes_writes_them() {
        for (text, written) in [
            ("0", "0"),
            ("00", "0"),
            ("-0", "0"),
            ("0Ki", "0"),
            ("100m", "100m"),
            ("1.5", "1500m"),
            ("1.5Gi", "1536Mi"),
            ("1e3", "1e3"),
            ("1E3", "1E3"),
            ("12e1", "120"),
            ("1000", "1k"),
            ("1000m", "1"),
            ("1024Ki", "1Mi"),
            ("2048", "2048"),
            ("1000Ki", "1000Ki"),
            ("1023", "1023"),
            ("0.5Ki", "512"),
            ("1Ei", "1Ei"),
            ("16Ei", "9223372036854775807"),
            ("-16Ei", "-9223372036854775807"),
            ("0.1n", "1n"),
            ("-0.1n", "-1n"),
            ("1.0000000001", "1000000001n"),
            ("0.0000000001Ki", "103n"),
            ("5", "5"),
            ("-5M", "-5M"),
            ("1.500", "1.500"),
            ("+1", "+1"),
            ("1000000k", "1G"),
            ("123456789012345678901", "123456789012345678901"),
            (".5", "500m"),
            ("1e-30", "1e-9"),
            ("2e28", "20e27"),
        ] {
            assert_eq!(read(text).to_string(), written, "{text}");
        }
    }

    #[test]
    fn what_is_no_quantity_is_refused_with_the_texts_of_kubernetes() {
        for (text, error) in [
            ("", QuantityError::Form),
            ("a", QuantityError::Form),
            ("1 Ki", QuantityError::Form),
            ("1.2.3", QuantityError::Form),
            ("1Kb", QuantityError::Form),
            ("1ki", QuantityError::Suffix),
            ("1K", QuantityError::Suffix),
            ("1e", QuantityError::Suffix),
            ("1+5", QuantityError::Suffix),
            ("1e99999999999", QuantityError::Suffix),
            ("1e30", QuantityError::Number),
            ("Pi", QuantityError::Number),
        ] {
            assert_eq!(text.parse::<Quantity>(), Err(error), "{text}");
        }
        assert_eq!("1".repeat(QUANTITY_BYTES_MAX + 1).parse::<Quantity>(), Err(QuantityError::Form));
        assert_eq!(Quantity::from_value(&json!(1500)).unwrap(), read("1500"));
        assert_eq!(Quantity::from_value(&json!(" 1.5 ")).unwrap(), read("1.5"));
        assert!(Quantity::from_value(&json!(null)).is_err());
    }

    #[test]
    fn sums_keep_the_family_of_the_first_that_is_not_zero() {
        let sum = |a: &str, b: &str| read(a).checked_add(&read(b)).unwrap().to_string();
        assert_eq!(sum("1Gi", "512Mi"), "1536Mi");
        assert_eq!(sum("0", "1Gi"), "1Gi");
        assert_eq!(sum("1Gi", "1"), "1073741825");
        assert_eq!(sum("500m", "500m"), "1");
        assert_eq!(read("1Gi").checked_sub(&read("1Gi")).unwrap().to_string(), "0");
        assert_eq!(read("-1.5").value(), Some(-2));
        assert_eq!(read("1.5").value(), Some(2));
        assert_eq!(read("10E").value(), None);
        let most = Quantity { nanos: i128::MAX, format: Format::Decimal, text: None };
        assert!(most.checked_add(&read("1")).is_none());
        assert!(read("-1") < read("0") && read("1k") < read("1Ki") && read("1e3") == read("1k"));
    }

    /// A quantity as a fraction of whole numbers, read in the plainest way.
    fn rational(sign: &str, whole: u32, fraction: &str, suffix: &str) -> (i128, i128) {
        let denominator = 10_i128.pow(u32::try_from(fraction.len()).unwrap());
        let numerator = i128::from(whole) * denominator + fraction.parse::<i128>().unwrap_or(0);
        let numerator = if sign == "-" { -numerator } else { numerator };
        match suffix {
            "n" => (numerator, denominator * 1_000_000_000),
            "m" => (numerator, denominator * 1000),
            "k" => (numerator * 1000, denominator),
            "e6" => (numerator * 1_000_000, denominator),
            "Ki" => (numerator * 1024, denominator),
            "Mi" => (numerator * 1024 * 1024, denominator),
            _ => (numerator, denominator),
        }
    }

    fn parts() -> impl Strategy<Value = (String, u32, String, String)> {
        let suffix = prop::sample::select(vec!["", "m", "k", "e6", "Ki", "Mi"]).prop_map(str::to_owned);
        ("[+-]?", any::<u32>(), "[0-9]{0,6}", suffix)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn quantities_are_ordered_as_the_rationals_that_they_are(a in parts(), b in parts()) {
            let text = |(sign, whole, fraction, suffix): &(String, u32, String, String)| format!("{sign}{whole}.{fraction}{suffix}");
            let (left, right) = (rational(&a.0, a.1, &a.2, &a.3), rational(&b.0, b.1, &b.2, &b.3));
            prop_assert_eq!(read(&text(&a)).cmp(&read(&text(&b))), (left.0 * right.1).cmp(&(right.0 * left.1)));
        }

        #[test]
        fn what_is_written_reads_as_the_same(text in "[+-]?[0-9]{1,20}(\\.[0-9]{0,12})?(|n|u|m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi|Ei|e-?[0-9]|E[0-9])") {
            if let Ok(quantity) = text.parse::<Quantity>() {
                let written = quantity.to_string();
                prop_assert_eq!(&read(&written), &quantity, "{} is written as {}", text, written);
                let canonical = Quantity { text: None, ..quantity.clone() }.to_string();
                prop_assert_eq!(&read(&canonical), &quantity, "{} is written as {}", text, canonical);
                prop_assert_eq!(read(&canonical).to_string(), canonical);
            }
        }

        #[test]
        fn any_text_is_read_as_a_quantity_or_refused(text in "\\PC{0,20}|[+-]?[0-9.]{0,140}[eEinumkKMGTP]{0,3}[-+]?[0-9]{0,12}") {
            let _ = text.parse::<Quantity>();
        }
    }
}
