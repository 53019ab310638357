//! Who asks, and what they may: certificates, tokens, RBAC.
//!
//! ```text
//!   client certificate ──> pki::user_of ──┐
//!   bearer token ────────> token::Tokens ─┼─> User ──> user::impersonated ──> rbac::Policy::authorize ──> allowed, or Status 403
//!   nothing ─────────────> User::anonymous┘
//! ```

mod files;
pub mod kubeconfig;
pub mod pki;
pub mod rbac;
pub mod reviews;
pub mod roles;
pub mod token;
pub mod user;
