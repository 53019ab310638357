//! A Kubernetes-style API on an embedded store, for one machine.
//!
//! ```text
//!             who?            may they?      what kind?            how does it change?                 kept
//!  request ──> authenticate ──> authorize ──> resource ──┬─ get, list, watch ──> select ─────────────> store
//!              (auth)           (auth: RBAC)             └─ decode ─> patch ─> schema ─> admission ──> store ──> watchers
//!                                                                    (apply)  (default, prune, validate, CEL)
//!  answer <── negotiate <── object, list, Table, Status
//! ```
//!
//! Objects are JSON from the wire to the store. What a kind is, which fields it has and how lists of it merge, is data: the schemas of
//! CustomResourceDefinitions, and for the core kinds a table of the same form.

pub mod auth;
pub mod field;
pub mod kinds;
pub mod negotiate;
pub mod object;
pub mod patch;
pub mod quantity;
pub mod request;
pub mod rules;
pub mod schema;
pub mod select;
pub mod status;
pub mod store;
pub mod table;
