//! The engine through its public face: whole builds on a real store, with registries and clients of the test's own.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod builds;
mod cache_damage;
mod cache_forms;
mod cache_merges;
mod cache_shapes;
mod decisions;
mod estargz_export;
mod image_export;
mod image_source;
mod nested_builds;
mod object_cache;
mod remote_cache;
mod world;
