//! The registry as its clients meet it, with its content in an S3 bucket: the tests of `http/` that do not look at a disk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests: a test fails by a panic")]
#![allow(dead_code, reason = "some of what they share is of a directory alone")]

#[path = "../http/blobs.rs"]
mod blobs;
#[path = "../http/drain.rs"]
mod drain;
#[path = "../http/lists.rs"]
mod lists;
#[path = "../http/manifests.rs"]
mod manifests;
mod read_cache;
mod redirect;
#[path = "../http/support.rs"]
mod support;
#[path = "../http/uploads.rs"]
mod uploads;
