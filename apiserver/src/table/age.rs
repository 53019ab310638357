//! How long ago something was, as people read it.

use chrono::{DateTime, TimeDelta, Utc};

/// What stands for a time that is not known.
pub(super) const UNKNOWN: &str = "<unknown>";
/// What stands for a time that cannot be.
const INVALID: &str = "<invalid>";
/// The longest time that Kubernetes tells from longer ones (a signed number of nanoseconds).
const SECONDS_MAX: i64 = i64::MAX / 1_000_000_000;

/// Writes a duration with two or three significant figures: `5s`, `5m12s`, `3h`, `3d4h`, `2y10d`.
///
/// Up to two seconds before now is `0s`, as clocks differ; what is further in the future is `<invalid>`.
///
/// Source: the `AGE` of kubectl (`HumanDuration` in k8s.io/apimachinery).
pub fn human_duration(duration: TimeDelta) -> String {
    let seconds = duration.num_seconds().clamp(-SECONDS_MAX, SECONDS_MAX);
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    let (days, years) = (hours / 24, hours / 24 / 365);
    let two = |first: i64, unit: char, second: i64, smaller: char| match second {
        0 => format!("{first}{unit}"),
        second => format!("{first}{unit}{second}{smaller}"),
    };
    if seconds < -1 {
        INVALID.to_owned()
    } else if seconds < 0 {
        "0s".to_owned()
    } else if seconds < 120 {
        format!("{seconds}s")
    } else if minutes < 10 {
        two(minutes, 'm', seconds % 60, 's')
    } else if minutes < 180 {
        format!("{minutes}m")
    } else if hours < 8 {
        two(hours, 'h', minutes % 60, 'm')
    } else if hours < 48 {
        format!("{hours}h")
    } else if days < 8 {
        two(days, 'd', hours % 24, 'h')
    } else if days < 2 * 365 {
        format!("{days}d")
    } else if years < 8 {
        two(years, 'y', days % 365, 'd')
    } else {
        format!("{years}y")
    }
}

/// Writes how long before `now` a timestamp of an object is; the empty one is `<unknown>`, what is none is
/// `<invalid>`.
pub fn since(timestamp: &str, now: DateTime<Utc>) -> String {
    if timestamp.is_empty() || timestamp == "null" {
        return UNKNOWN.to_owned();
    }
    match DateTime::parse_from_rfc3339(timestamp) {
        Ok(time) => human_duration(now.signed_duration_since(time)),
        Err(_) => INVALID.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_kubernetes_writes_them() {
        const MINUTE: i64 = 60;
        const HOUR: i64 = 60 * MINUTE;
        const DAY: i64 = 24 * HOUR;
        for (seconds, text) in [
            (-2, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (5 * MINUTE + 12, "5m12s"),
            (10 * MINUTE - 1, "9m59s"),
            (10 * MINUTE + 1, "10m"),
            (3 * HOUR - 1, "179m"),
            (3 * HOUR, "3h"),
            (7 * HOUR + 59 * MINUTE, "7h59m"),
            (47 * HOUR, "47h"),
            (48 * HOUR, "2d"),
            (3 * DAY + 4 * HOUR, "3d4h"),
            (8 * DAY, "8d"),
            (729 * DAY, "729d"),
            (740 * DAY, "2y10d"),
            (8 * 365 * DAY, "8y"),
            (i64::MAX / 1000, "292y"),
        ] {
            assert_eq!(human_duration(TimeDelta::seconds(seconds)), text, "{seconds} s");
        }
        assert_eq!(human_duration(TimeDelta::milliseconds(-1999)), "0s");
    }

    #[test]
    fn a_timestamp_is_shown_by_how_long_ago_it_was() {
        let now = "2026-01-01T00:10:00Z".parse().unwrap();
        for (timestamp, text) in [
            ("2026-01-01T00:00:00Z", "10m"),
            ("2026-01-01T01:00:00.500000+01:00", "9m59s"),
            ("", "<unknown>"),
            ("yesterday", "<invalid>"),
            ("2027-01-01T00:00:00Z", "<invalid>"),
        ] {
            assert_eq!(since(timestamp, now), text, "{timestamp}");
        }
    }
}
