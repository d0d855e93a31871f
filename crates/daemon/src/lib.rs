//! The daemon: configuration, listeners, and the gRPC services over an engine.
//!
//! Purpose: read flags and `buildkitd.toml`, wire the engine up, and serve it to BuildKit's clients.
//!
//! Non-goals: no build logic, no terminal.
//!
//! Invariants: what a configuration asks for is honoured or refused by name; only this crate maps the engine's errors to
//! gRPC statuses; no client can end the process.
//!
//! Start at [`program::program`] for the daemon, at [`embedded::start`] for an engine within a client.
#![forbid(unsafe_code)]

pub mod caches;
pub mod collector;
pub mod config;
pub mod debug;
pub mod embedded;
pub mod flags;
pub mod listen;
pub mod log;
mod meta;
pub mod network;
pub mod program;
pub mod serve;
pub mod services;
pub mod sessions;
pub mod trace_socket;
pub mod verify;
pub mod wiring;
pub mod worker;

pub use executor::supervisor_main;
