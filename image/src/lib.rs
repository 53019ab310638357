//! Disks in OCI images: the layout, and the registry client that writes and reads it.
//!
//! ```text
//!   reference, auth ──> client::Repository ──────────────> any OCI registry
//!                          │ blobs, uploads, manifests
//!   tar, layout ──> disk: publish (ours) · DiskImage::locate (anyone's) ──> Window | DiskStream
//! ```
//!
//! The layout is described byte by byte in `docs/formats/disk-image.md`. Where the bytes come from, and what disk
//! format they are in, is not this crate's business.

pub mod auth;
pub mod client;
pub mod digest;
mod disk;
mod error;
pub mod layout;
pub mod media_type;
mod merge;
mod reference;
pub mod tar;

pub use auth::{AuthStore, Credentials};
pub use client::{ClientOptions, Repository};
pub use disk::{DiskImage, DiskStream, publish};
pub use error::{Error, ErrorKind, Result};
pub use reference::{DEFAULT_TAG, Reference};
