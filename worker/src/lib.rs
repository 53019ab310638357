//! What a transfer owes the operator that runs it as a pod: metrics while it goes on, retries when it fails in passing, and a
//! message when it ends.
//!
//! ```text
//!  command line, environment ──> a transfer (dvcr-importer) <── retry: the same again, which goes on where it was
//!                                     │ Progress                     │ outcome
//!                                     v                              v
//!                        metrics: https://:8443/metrics     termination: /dev/termination-log
//! ```
//!
//! Names, labels, ports and texts are those that operators, dashboards and scripts know already (docs/worker.md).

pub mod metrics;
pub mod quantity;
pub mod retry;
pub mod sandbox;
pub mod termination;
pub mod volume;
