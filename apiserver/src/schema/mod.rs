//! What fields a kind has: structural schemas, their defaults, what they prune and what they refuse.

mod node;

pub use node::{ListType, Node, Patch, Type};
