//! Garbage collection, by one replica at a time.

use std::sync::atomic::AtomicBool;

use super::Bucket;
use crate::store::collect::{Counts, Options};
use crate::store::{Error, Result};

impl Bucket {
    pub(super) async fn collect(
        &self,
        _options: &Options,
        _counts: &Counts,
        _stop: &AtomicBool,
    ) -> Result<Option<()>> {
        Err(Error::other("not built"))
    }
}
