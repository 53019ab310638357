//! Disk image formats: what a file is, what the virtual disk inside it holds, and how to write another.
//!
//! ```text
//!            bytes                       virtual disk                      bytes
//!  ReadAt ──> format::probe/open ──> dyn Disk ──> convert (workers) ──> target: raw file or device,
//!  Read   ──> wrapper (gz xz zst bz2) ─────────────^                    qcow2 (file, or a stream)
//!                        └──> forward: ReadAt, for a qcow2 image in a wrapper
//! ```
//!
//! The core is synchronous and does no I/O but through [`io::ReadAt`], [`std::io::Read`] and [`std::io::Write`];
//! [`local`] is the one adapter that touches files and block devices. Nothing here opens a socket.

mod buffer;
pub mod convert;
pub mod error;
pub mod file;
pub mod format;
pub mod forward;
pub mod io;
pub mod limits;
pub mod local;
pub mod progress;
pub mod wrapper;
mod zeros;

pub use error::{Error, ErrorKind, Result};
pub use format::qcow2;
