//! Disks in OCI images: how they lie there, written and read through the client of registries.
//!
//! ```text
//!   dvcr-client: Reference, Repository ───────────────────> any OCI registry
//!                  │ blobs, uploads, manifests; ranged: random access for blocking readers
//!   tar, layout, index ──> disk: publish (ours) · DiskImage::locate (anyone's) ──> Window | DiskStream
//!   ranged <── blocks: what is here · ahead: what to ask for before it is wanted
//! ```
//!
//! The layout is described byte by byte in `docs/formats/disk-image.md`. Where the bytes come from, and what disk
//! format they are in, is not this crate's business. What those who work with images need of the client is told again
//! here.

mod ahead;
mod blocks;
mod disk;
pub mod index;
pub mod layout;
mod merge;
mod ranged;
pub mod tar;

pub use disk::{DiskImage, DiskStream, publish};
pub use dvcr_client::{
    AuthStore, BlobStream, BlobWriter, CHUNK_BYTES, ClientOptions, Clients, Credentials, DEFAULT_TAG,
    Descriptor, Error, ErrorKind, Forbidden, Gate, Manifest, Network, Proxies, Reference, Repository, Result,
    Upload, auth, digest, is_certificate_refused, is_identity_refused, media_type,
};
pub use ranged::{RangedBlob, Window};
