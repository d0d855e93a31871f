//! The command line: `cooper` and, under its own name, `buildctl`.
//!
//! Purpose: turn arguments into requests, host the session services a build needs from its client, and show progress.
//!
//! Non-goals: nothing is built here; all work is asked of a daemon through [`api`].
//!
//! Invariants: secrets are read when a build asks for them and never printed; only this crate decides on exit codes.
//!
//! Start at [`run`].
#![forbid(unsafe_code)]

pub mod docker_config;
pub mod format;
pub mod progress;
pub mod spec;
