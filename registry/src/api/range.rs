//! Byte ranges: of a blob that is read (RFC 9110, 14.1.2) and of a chunk that is pushed (distribution-spec).

/// Which part of a content a request gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Selected {
    /// All of it: no range, one that is not understood, or several, which may be ignored.
    Whole,
    /// The bytes from the first up to but not including the second offset; never empty.
    Part(u64, u64),
    /// No byte of it: 416.
    Nothing,
}

/// Reads a `Range` header for a content of `length` bytes.
pub(crate) fn select(header: Option<&str>, length: u64) -> Selected {
    let Some((unit, ranges)) = header.and_then(|header| header.split_once('=')) else {
        return Selected::Whole;
    };
    let Some((first, last)) = ranges.trim().split_once('-') else { return Selected::Whole };
    if !unit.trim().eq_ignore_ascii_case("bytes") || ranges.contains(',') {
        return Selected::Whole;
    }
    match (number(first), number(last)) {
        (Some(Some(first)), Some(last)) => match last {
            // RFC 9110 lets such a range be ignored or rejected (14.2); a client is better told of its mistake.
            Some(last) if last < first => Selected::Nothing,
            _ if first >= length => Selected::Nothing,
            // The end is exclusive, and a last byte beyond the content means its end.
            last => Selected::Part(first, last.map_or(length, |last| last.saturating_add(1).min(length))),
        },
        (Some(None), Some(Some(suffix))) => match (suffix, length) {
            (0, _) | (_, 0) => Selected::Nothing,
            _ => Selected::Part(length - suffix.min(length), length),
        },
        _ => Selected::Whole,
    }
}

/// Reads the `Content-Range` of a chunk, `first-last`; also in the form of RFC 9110, `bytes first-last/any`.
///
/// Returns the first offset and the length; `None` if it is neither.
pub(crate) fn chunk(header: &str) -> Option<(u64, u64)> {
    let range = header.trim();
    let range = range.strip_prefix("bytes ").unwrap_or(range);
    let range = range.split('/').next().unwrap_or(range);
    let (first, last) = range.split_once('-')?;
    let (first, last) = (number(first)??, number(last)??);
    let length = last.checked_sub(first)?.checked_add(1)?;
    Some((first, length))
}

/// Reads digits; the inner `None` is an empty text, the outer anything else. More than fits counts as the largest.
fn number(text: &str) -> Option<Option<u64>> {
    let text = text.trim();
    if text.is_empty() {
        return Some(None);
    }
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| Some(text.parse().unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Says byte by byte, and in wide numbers, what a range selects.
    fn oracle(first: Option<u128>, last: Option<u128>, length: u64) -> Selected {
        let selected: Vec<u64> = (0..length)
            .filter(|at| {
                let at = u128::from(*at);
                match (first, last) {
                    (Some(first), last) => at >= first && last.is_none_or(|last| at <= last),
                    (None, Some(suffix)) => at + suffix >= u128::from(length),
                    (None, None) => false,
                }
            })
            .collect();
        match (first, last) {
            (None, None) => Selected::Whole,
            _ => match (selected.first(), selected.last()) {
                (Some(first), Some(last)) => Selected::Part(*first, last + 1),
                _ => Selected::Nothing,
            },
        }
    }

    proptest! {
        #[test]
        fn a_range_selects_what_the_oracle_says(
            first in proptest::option::of(prop_oneof![0u128..40, Just(u128::from(u64::MAX)), Just(u128::MAX)]),
            last in proptest::option::of(prop_oneof![0u128..40, Just(u128::from(u64::MAX)), Just(u128::MAX)]),
            length in 0u64..40,
        ) {
            let text = |n: Option<u128>| n.map_or(String::new(), |n| n.to_string());
            let header = format!("bytes={}-{}", text(first), text(last));
            // Beyond 64 bits all numbers are alike: far behind the end.
            let wide = |n: Option<u128>| n.map(|n| n.min(u128::from(u64::MAX)));
            prop_assert_eq!(select(Some(&header), length), oracle(wide(first), wide(last), length));
        }

        #[test]
        fn any_header_is_read_without_a_panic(header in "\\PC{0,40}", length in any::<u64>()) {
            if let Selected::Part(first, end) = select(Some(&header), length) {
                prop_assert!(first < end && end <= length);
            }
            let _ = chunk(&header);
        }
    }

    #[test]
    fn what_is_not_one_byte_range_selects_everything() {
        for header in
            ["", "bytes", "bytes=", "bytes=a-b", "bytes=0-1,3-4", "lines=0-1", "bytes=-", "bytes=+1-2"]
        {
            assert_eq!(select(Some(header), 10), Selected::Whole, "{header}");
        }
        assert_eq!(select(None, 10), Selected::Whole);
    }

    #[test]
    fn chunks_come_in_two_forms() {
        assert_eq!(chunk("0-9"), Some((0, 10)));
        assert_eq!(chunk("bytes 5-5/*"), Some((5, 1)));
        for bad in ["", "-", "5", "5-", "-5", "5-4", "a-b", "0-18446744073709551615"] {
            assert_eq!(chunk(bad), None, "{bad}");
        }
    }
}
