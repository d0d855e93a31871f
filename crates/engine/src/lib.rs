//! Drives builds: jobs, ops, frontends; puts sources, exporters and caches together.
//!
//! Purpose: perform what the [`solver`] decides, and offer builds to the shells. [`driver`] owns the solver and turns its
//! effects into calls of [`op::Op`]; [`bridge`] is what a frontend may do within a build; [`solve`] takes a request from
//! its first vertex to its exported image; [`setup`] puts it all together. What a build is to all of its parts is in the
//! crate [`build`], of which shells see what they need here.
//!
//! Non-goals: no gRPC types, no terminal, no configuration files.
//!
//! Invariants: one task owns the solver; every effect is answered exactly once, also when it is cancelled; every result
//! is let go of when its vertex is; no lock is held across an await; every queue is bounded.
//!
//! Start at [`engine::Engine`].
#![forbid(unsafe_code)]

pub mod attestation;
pub mod bridge;
pub mod checksum;
pub mod driver;
pub mod engine;
pub(crate) mod explain;
pub mod frontend;
mod jobs;
pub mod op;
pub mod setup;
pub mod solve;
pub mod worker;

pub use ::{cache, content, executor, registry};
pub use ::build::{error, explanation, job, progress, session, trace, unlazy};
pub use ::dockerfile::SYNTAX_VERSION as DOCKERFILE_VERSION;
pub use ::source::forget_resolutions;
pub use engine::Engine;
pub use error::{BuildError, ErrorKind};
