//! Formats of strings and numbers (`format`).

use std::net::{Ipv4Addr, Ipv6Addr};

use base64::Engine;
use serde_json::Value;

use super::Type;

/// A format that is checked. Those that are not known are as if they were not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Byte,
    Cidr,
    Date,
    DateTime,
    Double,
    Duration,
    Email,
    Float,
    HexColor,
    Hostname,
    Int32,
    Int64,
    Ipv4,
    Ipv6,
    LongName,
    Mac,
    Quantity,
    ShortName,
    Uri,
    /// Of this version, or of any with 0.
    Uuid(u8),
}

impl Format {
    /// The format of a name in a schema of a type; `None` for one that is not checked there.
    pub fn of(name: &str, r#type: Type) -> Option<Self> {
        match r#type {
            Type::String | Type::Any => Self::of_string(name),
            Type::Integer => match name {
                "int32" => Some(Self::Int32),
                "int64" => Some(Self::Int64),
                _ => None,
            },
            Type::Number => match name {
                "float" => Some(Self::Float),
                "double" => Some(Self::Double),
                _ => None,
            },
            _ => None,
        }
    }

    fn of_string(name: &str) -> Option<Self> {
        Some(match name.replace('-', "").as_str() {
            "byte" => Self::Byte,
            "cidr" => Self::Cidr,
            "date" => Self::Date,
            "datetime" => Self::DateTime,
            "duration" => Self::Duration,
            "email" => Self::Email,
            "hexcolor" => Self::HexColor,
            "hostname" => Self::Hostname,
            "ipv4" => Self::Ipv4,
            "ipv6" => Self::Ipv6,
            "k8slongname" => Self::LongName,
            "k8sshortname" => Self::ShortName,
            "mac" => Self::Mac,
            "uri" => Self::Uri,
            "uuid" => Self::Uuid(0),
            "uuid3" => Self::Uuid(3),
            "uuid4" => Self::Uuid(4),
            "uuid5" => Self::Uuid(5),
            _ => return None,
        })
    }

    /// The name, as messages tell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Byte => "byte",
            Self::Cidr => "cidr",
            Self::Date => "date",
            Self::DateTime => "date-time",
            Self::Double => "double",
            Self::Duration => "duration",
            Self::Email => "email",
            Self::Float => "float",
            Self::HexColor => "hexcolor",
            Self::Hostname => "hostname",
            Self::Int32 => "int32",
            Self::Int64 => "int64",
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
            Self::LongName => "k8s-long-name",
            Self::Mac => "mac",
            Self::Quantity => "quantity",
            Self::ShortName => "k8s-short-name",
            Self::Uri => "uri",
            Self::Uuid(3) => "uuid3",
            Self::Uuid(4) => "uuid4",
            Self::Uuid(5) => "uuid5",
            Self::Uuid(_) => "uuid",
        }
    }

    /// Whether a value has the format. What is of another kind than the format has none to fulfil.
    pub fn permits(self, value: &Value) -> bool {
        match (self, value) {
            (Self::Int32, Value::Number(number)) => match (number.as_i64(), number.as_f64()) {
                (Some(number), _) => i32::try_from(number).is_ok(),
                (None, Some(number)) => number >= f64::from(i32::MIN) && number <= f64::from(i32::MAX),
                _ => false,
            },
            (Self::Int64, Value::Number(number)) => {
                // 2^63 is the first that does not fit, and a double knows it exactly.
                const END: f64 = 9_223_372_036_854_775_808.0;
                number.is_i64() || number.as_f64().is_some_and(|number| (-END..END).contains(&number))
            }
            (Self::Float, Value::Number(number)) => {
                number.as_f64().is_some_and(|number| number.abs() <= f64::from(f32::MAX))
            }
            (Self::Quantity, Value::Number(_)) => true,
            (_, Value::String(text)) => self.permits_text(text),
            _ => true,
        }
    }

    fn permits_text(self, text: &str) -> bool {
        match self {
            Self::Byte => base64::engine::general_purpose::STANDARD.decode(text).is_ok(),
            Self::Cidr => is_cidr(text),
            Self::Date => is_date(text),
            Self::DateTime => is_date_time(text),
            Self::Duration => duration(text).is_some(),
            Self::Email => is_email(text),
            Self::HexColor => {
                let digits = text.strip_prefix('#').unwrap_or(text);
                matches!(digits.len(), 3 | 6) && is_hex(digits)
            }
            Self::Hostname => is_hostname(text),
            Self::Ipv4 => text.parse::<Ipv4Addr>().is_ok(),
            Self::Ipv6 => text.parse::<Ipv6Addr>().is_ok(),
            Self::LongName => text.len() <= 253 && text.split('.').all(is_name),
            Self::ShortName => text.len() <= 63 && is_name(text),
            Self::Mac => is_mac(text),
            Self::Quantity => is_quantity(text),
            Self::Uri => is_request_uri(text),
            Self::Uuid(version) => is_uuid(text, version),
            Self::Double | Self::Float | Self::Int32 | Self::Int64 => true,
        }
    }
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn is_name(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !text.is_empty() && text.bytes().all(is_inner) && !text.starts_with('-') && !text.ends_with('-')
}

fn is_cidr(text: &str) -> bool {
    let Some((address, prefix)) = text.split_once('/') else { return false };
    let is_digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
    let Some(prefix) = prefix.parse::<u8>().ok().filter(|_| is_digits) else { return false };
    (address.parse::<Ipv4Addr>().is_ok() && prefix <= 32)
        || (address.parse::<Ipv6Addr>().is_ok() && prefix <= 128)
}

fn is_date(text: &str) -> bool {
    text.len() == 10 && chrono::NaiveDate::parse_from_str(text, "%Y-%m-%d").is_ok()
}

fn is_date_time(text: &str) -> bool {
    let has_shape = text.as_bytes().get(10).is_some_and(|byte| matches!(byte, b'T' | b't'));
    has_shape && chrono::DateTime::parse_from_rfc3339(text).is_ok()
}

/// A duration in nanoseconds, as Go writes it (`1h30m`, `-1.5s`) or with a word for the unit (`2 days`).
pub fn duration(text: &str) -> Option<i64> {
    let (is_negative, rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Some(0);
    }
    let nanos = go_duration(rest).or_else(|| worded_duration(rest))?;
    Some(if is_negative { -nanos } else { nanos })
}

fn go_duration(mut rest: &str) -> Option<i64> {
    let mut nanos = 0i64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|char: char| !(char.is_ascii_digit() || char == '.'))?;
        let (number, after) = rest.split_at(end);
        let end = after.find(|char: char| char.is_ascii_digit() || char == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let unit = match unit {
            "ns" => 1,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000i64,
            _ => return None,
        };
        let (whole, part) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && part.is_empty() {
            return None;
        }
        let whole = if whole.is_empty() { 0 } else { whole.parse::<i64>().ok()? };
        nanos = nanos.checked_add(whole.checked_mul(unit)?)?;
        if !part.is_empty() {
            let fraction: f64 = format!("0.{part}").parse().ok()?;
            // Below one unit, which is at most 3.6e12.
            nanos = nanos.checked_add((fraction * unit as f64) as i64)?;
        }
        rest = after;
    }
    Some(nanos)
}

fn worded_duration(text: &str) -> Option<i64> {
    let end = text.find(|char: char| !char.is_ascii_digit())?;
    let (number, unit) = text.split_at(end);
    let unit = unit.trim().to_ascii_lowercase();
    let unit = match unit.as_str() {
        unit if unit == "ns" || unit.starts_with("nano") => 1,
        unit if unit == "us" || unit.starts_with("micro") => 1_000,
        unit if unit == "ms" || unit.starts_with("milli") => 1_000_000,
        unit if unit == "s" || unit.starts_with("sec") => 1_000_000_000,
        unit if unit == "m" || unit.starts_with("min") => 60_000_000_000,
        unit if unit == "h" || unit == "hr" || unit.starts_with("hour") => 3_600_000_000_000,
        unit if unit == "d" || unit.starts_with("day") => 86_400_000_000_000,
        unit if unit == "w" || unit == "wk" || unit.starts_with("week") => 604_800_000_000_000i64,
        _ => return None,
    };
    number.parse::<i64>().ok()?.checked_mul(unit)
}

fn is_email(text: &str) -> bool {
    let address = match text.strip_suffix('>') {
        Some(text) => match text.split_once('<') {
            Some((_, address)) => address,
            None => return false,
        },
        None => text,
    };
    let Some((local, domain)) = address.rsplit_once('@') else { return false };
    let is_atom = |atom: &str| {
        let is_part = |char: char| {
            char.is_ascii_alphanumeric() || !char.is_ascii() || "!#$%&'*+-/=?^_`{|}~".contains(char)
        };
        !atom.is_empty() && atom.chars().all(is_part)
    };
    local.split('.').all(is_atom) && domain.split('.').all(is_atom)
}

fn is_hostname(text: &str) -> bool {
    let is_letter = |char: char| char.is_alphabetic() || (!char.is_ascii() && !char.is_whitespace());
    let is_label = |label: &str| {
        let is_part = |char: char| char.is_ascii_digit() || is_letter(char) || char == '-';
        let is_edge = |char: Option<char>| char.is_some_and(|char| char != '-');
        let chars = || label.chars();
        label.len() <= 63 && chars().all(is_part) && is_edge(chars().next()) && is_edge(chars().next_back())
    };
    // The last label ends with two letters at least, as every top-level domain does.
    text.len() <= 255
        && text.split('.').all(is_label)
        && text.chars().rev().take(2).filter(|char| is_letter(*char)).count() == 2
}

fn is_mac(text: &str) -> bool {
    let (separator, digits) = match (text.contains(':'), text.contains('-'), text.contains('.')) {
        (true, false, false) => (':', 2),
        (false, true, false) => ('-', 2),
        (false, false, true) => ('.', 4),
        _ => return false,
    };
    let groups: Vec<&str> = text.split(separator).collect();
    matches!(groups.len() * digits, 12 | 16 | 40)
        && groups.iter().all(|group| group.len() == digits && is_hex(group))
}

/// Whether a text is a quantity, such as `1`, `0.5`, `100m`, `10Gi`, `1e3`.
pub fn is_quantity(text: &str) -> bool {
    let text = text.strip_prefix(['+', '-']).unwrap_or(text);
    let end = text.find(|char: char| !(char.is_ascii_digit() || char == '.')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let is_number = number.bytes().any(|byte| byte.is_ascii_digit())
        && number.bytes().filter(|byte| *byte == b'.').count() <= 1;
    let is_exponent = || {
        let exponent = suffix.strip_prefix(['e', 'E']).unwrap_or_default();
        let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        !exponent.is_empty() && exponent.len() <= 9 && exponent.bytes().all(|byte| byte.is_ascii_digit())
    };
    let is_suffix = matches!(
        suffix,
        "" | "n" | "u" | "m" | "k" | "M" | "G" | "T" | "P" | "E" | "Ki" | "Mi" | "Gi" | "Ti" | "Pi" | "Ei"
    );
    is_number && (is_suffix || is_exponent())
}

fn is_request_uri(text: &str) -> bool {
    let is_plain = !text.bytes().any(|byte| byte.is_ascii_control() || byte == b' ');
    let mut escapes = text.split('%').skip(1);
    let is_escaped = escapes.all(|after| after.get(..2).is_some_and(is_hex));
    let has_scheme = text.split_once(':').is_some_and(|(scheme, rest)| {
        scheme.starts_with(|char: char| char.is_ascii_alphabetic())
            && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
            && !rest.is_empty()
    });
    is_plain && is_escaped && (text.starts_with('/') || has_scheme)
}

fn is_uuid(text: &str, version: u8) -> bool {
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
    let dashes: Vec<usize> =
        text.bytes().enumerate().filter(|(_, byte)| *byte == b'-').map(|(at, _)| at).collect();
    // Each dash may be there or not, in the place after 8, 12, 16 and 20 digits.
    let in_place = dashes.iter().enumerate().all(|(before, at)| matches!(at - before, 8 | 12 | 16 | 20));
    let is_version = version == 0 || digits.get(12) == Some(&(b'0' + version));
    let is_variant = version < 4 || digits.get(16).is_some_and(|digit| b"89abAB".contains(digit));
    digits.len() == 32 && digits.iter().all(u8::is_ascii_hexdigit) && in_place && is_version && is_variant
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Format, Type, duration};

    #[track_caller]
    fn assert_format(name: &str, valid: &[&str], invalid: &[&str]) {
        let format = Format::of(name, Type::String).unwrap();
        for text in valid {
            assert!(format.permits(&json!(text)), "{name}: {text}");
        }
        for text in invalid {
            assert!(!format.permits(&json!(text)), "{name}: {text}");
        }
    }

    #[test]
    fn a_format_permits_what_it_names_and_nothing_else() {
        assert_format("byte", &["", "aGk="], &["a", "a-b="]);
        assert_format("cidr", &["10.0.0.0/8", "fd00::/64"], &["10.0.0.0", "10.0.0.0/33", "10.0.0.0/+8"]);
        assert_format("date", &["2026-01-31"], &["2026-02-31", "2026-1-1"]);
        assert_format(
            "date-time",
            &["2026-01-31T10:00:00Z", "2026-01-31T10:00:00.5+02:00"],
            &["2026-01-31", "now"],
        );
        assert_format("datetime", &["2026-01-31T10:00:00Z"], &["2026-01-31 10:00:00Z"]);
        assert_format(
            "duration",
            &["1h30m", "-1.5s", "0", "22 ns", "2 days"],
            &["", "1", "h", "1x", "9999999999h"],
        );
        assert_format("email", &["a.b@c.d", "N <a@b>"], &["a", "@b", "a@", "a b@c"]);
        assert_format(
            "hostname",
            &["localhost", "a-b.example.com"],
            &["-a.com", "a..com", "a_b.com", "10.0.0.1"],
        );
        assert_format("ipv4", &["10.0.0.1"], &["10.0.0", "::1"]);
        assert_format("ipv6", &["::1"], &["10.0.0.1", "::g"]);
        assert_format("mac", &["00:11:22:33:44:55", "0011.2233.4455"], &["00:11:22", "zz:11:22:33:44:55"]);
        assert_format("uri", &["https://a/b", "/a", "mailto:x"], &["a", "", "/%zz", "ht tp://a"]);
        assert_format(
            "uuid",
            &["00000000-0000-0000-0000-000000000000"],
            &["0", "0000-00000000-0000-0000-000000000000"],
        );
        assert_format(
            "uuid4",
            &["7d444840-9dc0-41d1-b245-5ffdce74fad2"],
            &["7d444840-9dc0-11d1-b245-5ffdce74fad2"],
        );
        assert_format("k8s-short-name", &["a-b"], &["a.b", "-a", ""]);
        assert_format("k8s-long-name", &["a-b.c"], &["a..b"]);
        assert_format("hexcolor", &["#fff", "00ff00"], &["#ff"]);
    }

    #[test]
    fn a_number_fits_its_format() {
        assert!(Format::Int32.permits(&json!(2_147_483_647)));
        assert!(!Format::Int32.permits(&json!(2_147_483_648i64)));
        assert!(Format::Int64.permits(&json!(i64::MAX)));
        assert!(!Format::Int64.permits(&json!(u64::MAX)));
        assert!(!Format::Float.permits(&json!(1e300)));
    }

    #[test]
    fn a_quantity_is_a_number_with_a_suffix() {
        for text in ["1", "0.5", "100m", "10Gi", "1e3", "-1k", ".5", "1E"] {
            assert!(Format::Quantity.permits(&json!(text)), "{text}");
        }
        for text in ["", "Gi", "1GiB", "1.2.3", "1e", "a", "1 Gi"] {
            assert!(!Format::Quantity.permits(&json!(text)), "{text}");
        }
    }

    #[test]
    fn a_duration_is_in_nanoseconds() {
        assert_eq!(duration("1h1m1.5s"), Some(3_661_500_000_000));
        assert_eq!(duration("-2us"), Some(-2_000));
        assert_eq!(duration("3 hours"), Some(10_800_000_000_000));
    }
}
