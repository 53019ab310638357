//! What is asked for: a path and a query, taken apart.
//!
//! ```text
//!  GET /apis/G/V/namespaces/NS/RESOURCE/NAME/SUB?watch=1&...
//!   └───────────────> Target, verb <────────────┘ └─> Options
//! ```
//!
//! Nothing here knows which resources there are.

pub mod body;
mod options;
mod target;

pub use options::{DeleteOptions, DryRun, FieldValidation, ListOptions, Match, Propagation, WriteOptions};
pub use target::{Target, Verb, Where, target};
