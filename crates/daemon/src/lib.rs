//! The daemon: configuration, listeners, and the gRPC services over an engine.
//!
//! Purpose: read flags and `buildkitd.toml`, wire the engine up, and serve it to BuildKit's clients.
//!
//! Non-goals: no build logic, no terminal.
//!
//! Invariants: what a configuration asks for is honoured or refused by name; only this crate maps the engine's errors to
//! gRPC statuses; no client can end the process.
//!
//! Start at [`flags::Flags`].
#![forbid(unsafe_code)]

pub mod config;
pub mod flags;
