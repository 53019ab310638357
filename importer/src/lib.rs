//! Images from anywhere into a registry, and disks out of it.
//!
//! ```text
//!             source thread (blocking)                                   async side
//!  http, s3 ┐ ┌─────────────────────────────────────────────────┐  ┌────────────────────┐
//!  file, nbd├>│ checksums ─ unwrap ─ probe ─┬─ as it came ──────│──│─> hash, push ──────│──> layer
//!  image    ┘ │                             └─ raw -> qcow2 zstd│──│─> stage, assemble ─│──> layer
//!             └─────────────────────────────────────────────────┘  └────────────────────┘
//!  image of our making ──> mount, or stream blob by blob ──────────────────────────────────> the same image
//!  image ──> ranges (or a stream) ──> converter ──> raw file, block device or qcow2 file
//!  file, device, nbd ──> shared blocks, the kernel's copy, or the converter's writers ──> file or block device
//! ```
//!
//! The import is one pass over the source with bounded memory and nothing on the local disk. A layer begins with a
//! tar header that tells the file's length, and a qcow2 file begins with a header that is known last. What has its
//! length beforehand goes straight into its layer. Everything else (a compressed source, HTTP without a length, a
//! raw disk re-encoded) is **staged in the destination's own repository**: its bytes are pushed as a blob while they
//! come, then read back, verified, into the layer; the staged blob, which nothing refers to, is deleted as far as
//! the registry lets, and is any garbage collection's to take otherwise.
//!
//! An import that is killed is gone on with by the next one: `resume` tells how of a layer that was begun, `keep` of a source that is
//! slow and is decoded or encoded on the way.

pub mod checksum;
mod chunks;
mod clone;
mod copy;
mod decide;
mod error;
mod import;
mod keep;
mod name;
mod populate;
mod produce;
mod random;
mod readback;
mod refresh;
mod resume;
pub mod signature;
pub mod source;
mod transfer;

pub use clone::{CloneRequest, CloneSummary, clone};
pub use error::{Error, ErrorKind, Result};
pub use import::{ImportRequest, ImportSummary, Outcome, cancelled, import};
pub use populate::{PopulateRequest, PopulateSummary, TargetFormat, populate};
pub use source::http::HttpOptions;
pub use source::policy::SourcePolicy;
pub use source::{Source, SourceOptions};
