//! A client of an S3 bucket as a registry needs it: few operations, each bounded, and honest about what became of a request.
//!
//! ```text
//!   Settings ──> Client ──┬── object     head, get, put, delete, list
//!   (settings,    │       ├── body       a range that goes on where it broke
//!    credentials) │       ├── multipart  uploads in parts, copies of any size
//!                 │       └── probe      what this store honours, told to people
//!                 │
//!                 └── attempt: one request to the wire, repeated while that helps
//!                      ├── wire    expiry of a request (Validity); the times at which it left and was answered
//!                      ├── clock   the server's time, from the `Date` of its answers
//!                      └── error   what an answer means, and what to do
//! ```
//!
//! Keys are given below the root directory of the settings, which only this room knows. Nothing is cached here. What is put
//! or deleted once may be so twice: a request whose answer is lost is sent again, and [`Error::is_uncertain`] says when
//! that leaves open what happened.

mod attempt;
mod body;
mod client;
mod clock;
mod credentials;
mod error;
mod multipart;
mod object;
mod probe;
mod settings;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod wire;

pub(crate) use body::RangeBody;
pub(crate) use client::Client;
pub(crate) use error::{Error, Kind, Result};
pub(crate) use multipart::{PART_BYTES_MAX, PART_BYTES_MIN, PARTS_MAX, Part, Upload};
pub(crate) use object::{Condition, DELETE_KEYS_MAX, Head, Listing, Put};
pub use settings::{Encryption, Settings};
pub(crate) use wire::Validity;
