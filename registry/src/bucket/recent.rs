//! What was seen of contents not long ago, so that not each who asks has the store look again.
//!
//! A content never changes under its digest, and is there as long as somebody has a link to it: who has just read such a link need not
//! look at the content as well. But an object may be lost, or be removed by a program that knows nothing of all this. That is noticed some
//! seconds later than it could be, as if it had been lost so much later.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::digest::Digest;
use crate::lock;

/// How long what was seen is taken for true.
const AGE_MAX: Duration = Duration::from_secs(10);
/// Contents that are remembered, of about 200 bytes each; when there are more, all are forgotten.
const REMEMBERED_MAX: usize = 20_000;

/// What was seen of contents, by their digests.
#[derive(Debug)]
pub(super) struct Recent<T>(Mutex<HashMap<Digest, (T, Instant)>>);

impl<T: Copy> Recent<T> {
    /// Returns what was seen, if that was not long ago. It says nothing of one to which nobody has a link.
    pub(super) fn get(&self, digest: &Digest) -> Option<T> {
        let seen = lock(&self.0).get(digest).copied();
        seen.and_then(|(seen, at)| (at.elapsed() < AGE_MAX).then_some(seen))
    }

    /// Remembers what was seen of a content, when it was looked for at `at` or was there ever since.
    pub(super) fn put(&self, digest: &Digest, seen: T, at: Instant) {
        let mut all = lock(&self.0);
        if all.len() >= REMEMBERED_MAX && !all.contains_key(digest) {
            all.clear();
        }
        all.insert(digest.clone(), (seen, at));
    }

    /// Forgets one that is not there, or not as it was.
    pub(super) fn forget(&self, digest: &Digest) {
        lock(&self.0).remove(digest);
    }
}

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;

    #[test]
    fn what_was_seen_long_ago_is_not_taken_for_true() {
        let (recent, digest) = (Recent::default(), Digest::of(Algorithm::Sha256, b""));
        let now = Instant::now();
        recent.put(&digest, 1, now);
        assert_eq!(recent.get(&digest), Some(1));
        recent.put(&digest, 2, now.checked_sub(AGE_MAX).unwrap());
        assert_eq!(recent.get(&digest), None);
        recent.put(&digest, 3, now);
        recent.forget(&digest);
        assert_eq!(recent.get(&digest), None);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let recent = Recent::default();
        for n in 0..=REMEMBERED_MAX {
            recent.put(&Digest::of(Algorithm::Sha256, &n.to_le_bytes()), (), Instant::now());
        }
        assert_eq!(lock(&recent.0).len(), 1);
    }
}
