//! How an upload is cut into the parts of a multipart upload.
//!
//! S3 takes 10,000 parts of 5 MiB to 5 GiB each, the last one of any length, and some stores want all others to be equal. An
//! upload of known length has equal parts. One of unknown length begins with small ones, and each further thousand of
//! parts is twice as large as the one before:
//!
//! ```text
//!  part    1 ... 1000   1001 ... 2000   2001 ... 3000        8001 ...
//!  size      16 MiB         32 MiB          64 MiB     ...     4 GiB
//!  ends at 15.6 GiB       46.9 GiB         109 GiB           5 TiB at part 8284
//! ```

use crate::s3::{PART_BYTES_MAX, PART_BYTES_MIN, PARTS_MAX};

/// Bytes of an object, at most (S3).
pub(super) const OBJECT_BYTES_MAX: u64 = 5 << 40;
/// Parts of an announced length, at most; fewer than S3 takes, as a client may bring less at a time than it announced.
const PLANNED_PARTS_MAX: u64 = 9_000;
/// Sizes are multiples of it.
const UNIT_BYTES: u64 = 1 << 20;
/// Parts of one size.
const STEP_PARTS: u16 = 1_000;

/// The sizes of the parts of one upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parts {
    /// Bytes of the first part.
    pub(super) first: u64,
    /// Whether later parts are larger, as the length of the upload is not known.
    pub(super) grow: bool,
}

/// A part's place in its upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// 1 to [`PARTS_MAX`].
    pub(super) number: u16,
    /// Where it begins, in bytes.
    pub(super) begin: u64,
    /// Its bytes, unless it is the last one.
    pub(super) bytes: u64,
}

impl Parts {
    /// Plans an upload; `length` is what the client announced of the whole, and `bytes` the size of a part that is wished for.
    pub(super) fn plan(length: Option<u64>, bytes: u64) -> Self {
        let needed = length.unwrap_or(0).min(OBJECT_BYTES_MAX).div_ceil(PLANNED_PARTS_MAX);
        let first = bytes.clamp(PART_BYTES_MIN, PART_BYTES_MAX).max(needed).next_multiple_of(UNIT_BYTES);
        Self { first, grow: length.is_none() }
    }

    /// The part that has the byte at `offset`; `None` behind the last part that S3 takes.
    pub(super) fn at(self, offset: u64) -> Option<Part> {
        let (mut number, mut begin) = (1, 0u64);
        while number <= PARTS_MAX {
            let bytes = self.bytes_of(number);
            let nth = offset.checked_sub(begin)?.checked_div(bytes)?;
            if nth < STEP_PARTS.into() {
                let number = number.checked_add(u16::try_from(nth).ok()?)?;
                return Some(Part { number, begin: begin.checked_add(nth.checked_mul(bytes)?)?, bytes });
            }
            begin = begin.checked_add(bytes.checked_mul(STEP_PARTS.into())?)?;
            number += STEP_PARTS;
        }
        None
    }

    fn bytes_of(self, number: u16) -> u64 {
        let doublings = if self.grow { number.saturating_sub(1) / STEP_PARTS } else { 0 };
        self.first.saturating_mul(1 << doublings.min(10)).min(PART_BYTES_MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WISHED: u64 = 16 << 20;

    #[test]
    fn five_tebibytes_of_unknown_length_take_fewer_than_nine_thousand_parts() {
        let last = Parts::plan(None, WISHED).at(OBJECT_BYTES_MAX - 1).unwrap();
        assert!(last.number < 9_000, "{last:?}");
        assert_eq!((last.number, last.bytes), (8284, 4 << 30));
    }

    #[test]
    fn small_uploads_have_the_parts_that_are_wished_for() {
        let parts = Parts::plan(Some(1 << 30), WISHED);
        assert_eq!(parts.at(0), Some(Part { number: 1, begin: 0, bytes: WISHED }));
        assert_eq!(parts.at(WISHED), Some(Part { number: 2, begin: WISHED, bytes: WISHED }));
        assert_eq!(Parts::plan(None, 1).first, PART_BYTES_MIN);
    }

    proptest! {
        #[test]
        fn an_announced_length_has_equal_parts_that_s3_takes(length in 1..=OBJECT_BYTES_MAX) {
            let parts = Parts::plan(Some(length), WISHED);
            let last = parts.at(length - 1).unwrap();
            prop_assert!(u64::from(last.number) <= PLANNED_PARTS_MAX);
            prop_assert_eq!(last.bytes, parts.first);
        }

        #[test]
        fn parts_follow_each_other_without_a_gap(
            offset in 0..OBJECT_BYTES_MAX,
            first in PART_BYTES_MIN..1 << 30,
            grow: bool,
        ) {
            let parts = Parts { first, grow };
            if let Some(part) = parts.at(offset) {
                prop_assert!(part.begin <= offset && offset < part.begin + part.bytes);
                prop_assert_eq!(parts.at(part.begin), Some(part));
                if let Some(next) = parts.at(part.begin + part.bytes) {
                    prop_assert_eq!((next.number, next.begin), (part.number + 1, part.begin + part.bytes));
                }
            }
        }

        #[test]
        fn whatever_s3_takes_finds_its_part(length in 1..=OBJECT_BYTES_MAX) {
            prop_assert!(Parts::plan(None, WISHED).at(length - 1).is_some());
        }
    }
}
