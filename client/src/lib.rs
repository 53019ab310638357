//! A client of OCI registries: one repository of one registry, over the distribution API.
//!
//! ```text
//!   reference, auth ──┐
//!   a URL ──> Registry ──> Repository ──> request (authorization, redirects, retries) ──> network (roots, proxies, gate)
//!                            ├─ manifest: get, put, platform selection
//!                            ├─ blob: reading, continued where a connection broke
//!                            └─ upload: chunks, each kept until the registry acknowledged it
//! ```
//!
//! What the content is, and where it goes, is not this crate's business: images of disks are that of `dvcr-image`, and
//! `dvcr-registry` fetches with it what it keeps for others.

pub mod auth;
mod blob;
pub mod digest;
mod error;
mod manifest;
pub mod media_type;
mod network;
mod reference;
mod referrers;
mod registry;
mod repository;
mod request;
mod upload;

pub use auth::{AuthStore, Credentials};
pub use blob::BlobStream;
pub use error::{Error, ErrorKind, Result};
pub use oci_spec::image::Descriptor;

pub use manifest::{MANIFEST_BYTES_MAX, Manifest};
pub use network::{Clients, Forbidden, Gate, Network, Proxies};
pub use reference::{DEFAULT_TAG, Reference};
pub use registry::{Registry, RegistryOptions};
pub use repository::{ClientOptions, Repository};
pub use request::{is_certificate_refused, is_identity_refused};
pub use upload::{BlobWriter, CHUNK_BYTES, Upload};
