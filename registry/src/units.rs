//! Sizes and times as people write them: in flags, and in files of settings.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes, with or without a binary unit: `10737418240`, `512M`, `512Mi`, `10G` (all powers of 1024, as qemu-img and
/// Kubernetes' `Gi` mean them).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// A time of whole seconds with its unit: `90s`, `30m`, `12h`, `7d`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub Duration);

/// Something that can be switched off, by the word `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrOff<T> {
    On(T),
    Off,
}

impl<T> OrOff<T> {
    /// Returns what is not off.
    pub fn on(self) -> Option<T> {
        match self {
            Self::On(value) => Some(value),
            Self::Off => None,
        }
    }
}

/// The units of sizes and their binary logarithms; the first of each is written, the others are read too.
const SIZE_UNITS: [(&[&str], u32); 5] = [
    (&["T", "Ti", "TiB"], 40),
    (&["G", "Gi", "GiB"], 30),
    (&["M", "Mi", "MiB"], 20),
    (&["K", "k", "Ki", "KiB"], 10),
    (&["", "B"], 0),
];

/// Longest time, 100 years of 365 days: one that can be added to any time of day without a thought.
const TIME_SECONDS_MAX: u64 = 100 * 365 * 86_400;

/// The units of times in seconds.
const TIME_UNITS: [(&str, u64); 4] = [("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = split(text);
        let Some((_, shift)) = SIZE_UNITS.iter().find(|(names, _)| names.contains(&unit)) else {
            return Err(format!("'{text}' is not a size: write bytes, or a number with K, M, G or T"));
        };
        let number: u64 = number
            .parse()
            .map_err(|_| format!("'{text}' is not a size: it must begin with a whole number"))?;
        let bytes = number.checked_mul(1 << shift);
        bytes.map(Self).ok_or_else(|| format!("'{text}' is larger than a disk can be (16 EiB)"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |shift: u32| self.0 > 0 && self.0.trailing_zeros() >= shift || shift == 0;
        match SIZE_UNITS.iter().find(|(_, shift)| fits(*shift)) {
            Some((names, shift)) => write!(f, "{}{}", self.0 >> shift, names[0]),
            None => write!(f, "{}", self.0),
        }
    }
}

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = split(text);
        let Some((_, seconds)) = TIME_UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(format!("'{text}' is not a time: write a whole number with s, m, h or d"));
        };
        let number: u64 = number
            .parse()
            .map_err(|_| format!("'{text}' is not a time: it must begin with a whole number"))?;
        let seconds = number.checked_mul(*seconds).filter(|seconds| *seconds <= TIME_SECONDS_MAX);
        let seconds = seconds.ok_or_else(|| format!("'{text}' is longer than 100 years"))?;
        Ok(Self(Duration::from_secs(seconds)))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        let fits = |unit: u64| seconds > 0 && seconds.is_multiple_of(unit);
        match TIME_UNITS.iter().find(|(_, unit)| fits(*unit)) {
            Some((name, unit)) => write!(f, "{}{name}", seconds / unit),
            None => write!(f, "{seconds}s"),
        }
    }
}

impl<T: FromStr<Err: fmt::Display>> FromStr for OrOff<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            _ => text.parse().map(Self::On).map_err(|error: T::Err| format!("{error}, or `off`")),
        }
    }
}

impl<T: fmt::Display> fmt::Display for OrOff<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::On(value) => value.fmt(f),
            Self::Off => f.write_str("off"),
        }
    }
}

/// Reads a value from its text, or from a number that needs no unit.
pub(crate) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: FromStr<Err: fmt::Display>,
    D: Deserializer<'de>,
{
    struct Text;

    impl Visitor<'_> for Text {
        type Value = String;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a text")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
            Ok(text.to_owned())
        }

        fn visit_u64<E: Error>(self, number: u64) -> Result<String, E> {
            Ok(number.to_string())
        }
    }

    deserializer.deserialize_str(Text)?.parse().map_err(D::Error::custom)
}

/// Gives types that are read from a text, and shown as one, this form in files.
macro_rules! as_text {
    ($([$($generic:tt)*] $type:ty),* $(,)?) => {$(
        impl<'de, $($generic)*> Deserialize<'de> for $type
        where
            $type: FromStr<Err: fmt::Display>,
        {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserialize(deserializer)
            }
        }

        impl<$($generic)*> Serialize for $type
        where
            $type: fmt::Display,
        {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )*};
}

as_text! {
    [] Size,
    [] Time,
    [T] OrOff<T>,
    [] crate::ExternalUrl,
    [] crate::Pattern,
    [] crate::Prefix,
    [] crate::Quota,
    [] crate::Schedule,
    [] crate::UpstreamAddress,
}

/// A number and its unit.
fn split(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        let parse = |text: &str| text.parse().map(|Size(bytes)| bytes);
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("10G"), Ok(10 << 30));
        assert_eq!(parse("512Mi"), Ok(512 << 20));
        for bad in ["1.5G", "", "G", "99999999999T", "1E", "-1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_have_a_unit() {
        let parse = |text: &str| text.parse().map(|Time(time)| time.as_secs());
        assert_eq!(parse("90s"), Ok(90));
        assert_eq!(parse("7d"), Ok(604_800));
        assert_eq!(parse("36500d"), Ok(TIME_SECONDS_MAX));
        for bad in ["", "90", "h", "1.5h", "1w", "36501d", "999999999999999999d"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_word_switches_off() {
        assert_eq!("off".parse(), Ok(OrOff::<Size>::Off));
        assert_eq!("8M".parse(), Ok(OrOff::On(Size(8 << 20))));
        assert!("of".parse::<OrOff<Size>>().unwrap_err().ends_with("or `off`"));
        assert_eq!(
            (OrOff::<Size>::Off.to_string(), OrOff::On(Size(1024)).to_string()),
            ("off".into(), "1K".into())
        );
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_again(number: u64, shift in 0_u32..64) {
            let size = Size(number >> shift);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
            let time = Time(Duration::from_secs((number >> shift) % (TIME_SECONDS_MAX + 1)));
            prop_assert_eq!(time.to_string().parse(), Ok(time));
            prop_assert_eq!(serde_json::from_str::<Size>(&serde_json::to_string(&size).unwrap()).unwrap(), size);
        }
    }
}
