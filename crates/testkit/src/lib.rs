//! Fixtures for tests: images built in memory, and a registry and object stores that run in the test's own process and can
//! misbehave.
//!
//! Start at [`registry::Registry`], [`objects::Objects`] and [`image::ImageBuilder`]. Nothing here is for use outside tests: it panics where a
//! test should fail.
//!
//! Non-goals: speed, completeness of the distribution API, TLS.
//!
//! Invariants: fixtures are deterministic (same calls, same digests); a registry ends with its handle.
#![forbid(unsafe_code)]

pub mod image;
pub mod objects;
pub mod registry;
