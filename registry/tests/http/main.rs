//! The registry as its clients meet it: served on a socket, spoken to in HTTP, looked at on disk.
//!
//! The OCI conformance program, other registries and kill -9 are the business of `tests/tests/registry.rs`; here is what
//! they do not ask for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests: a test fails by a panic")]

mod access;
mod blobs;
mod collect;
mod drain;
mod errors;
mod events;
mod leftovers;
mod limits;
mod lists;
mod manifests;
mod metrics;
mod scrub;
mod support;
mod tls;
mod uploads;
