//! How garbage is collected, and what came of it.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use crate::rules::Rules;

/// How a collection is run.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// What of the repositories is kept.
    pub(crate) rules: Arc<Rules>,
    /// Uploads in which nothing happened for so long are given up.
    pub(crate) upload_age: Duration,
    /// Only tells what would be removed.
    pub(crate) dry_run: bool,
    /// Files removed per second, at most.
    pub(crate) removals_per_second: u32,
}

/// What a collection found and removed; the dry run only found it.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) repositories: AtomicU64,
    pub(crate) manifests: AtomicU64,
    pub(crate) blobs: AtomicU64,
    pub(crate) removed_tags: AtomicU64,
    pub(crate) removed_manifests: AtomicU64,
    pub(crate) removed_links: AtomicU64,
    pub(crate) removed_blobs: AtomicU64,
    pub(crate) removed_uploads: AtomicU64,
    /// Bytes of the removed blobs and uploads.
    pub(crate) freed_bytes: AtomicU64,
    pub(crate) removed_repositories: AtomicU64,
}
