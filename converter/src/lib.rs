//! Disk image formats: what a file is, what the virtual disk inside it holds, and how to write another.
//!
//! ```text
//!            bytes                       virtual disk                      bytes
//!  ReadAt ──> format::open ──> dyn Disk ──> convert (workers) ──> local: a raw file or device
//!  Read   ──> wrapper ───────────────────────^     └──> dyn Writer (a format) ──> sink: a file, a stream
//!                └──> forward: ReadAt, for an image in a wrapper
//!                            └──> map, check, compare: what is known of a disk
//! ```
//!
//! The core is synchronous and does no I/O but through [`io::ReadAt`], [`std::io::Read`] and [`io::Sink`]; [`local`] and
//! [`sink`] are the adapters that touch files and block devices. Nothing here opens a socket.

mod buffer;
pub mod check;
pub mod compare;
pub mod convert;
pub mod error;
pub mod file;
pub mod format;
pub mod forward;
pub mod io;
pub mod limits;
pub mod local;
pub mod map;
mod pack;
pub mod plain;
pub mod progress;
pub mod sink;
pub mod wrapper;
mod zeros;

pub use error::{Error, ErrorKind, Result};
pub use format::{qcow2, vdi, vmdk, vpc};
