//! Where images come from.

pub mod file;
pub mod http;
