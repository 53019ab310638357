//! What holds for objects whatever their schema says.

pub mod metadata;
pub mod names;
