//! The vocabulary of container images: digests, references, platforms, descriptors, manifests and image configurations.
//!
//! Purpose: parse and print these values exactly as the Docker and BuildKit ecosystem does, because their text and
//! their bytes are identity there. The shared language of file patterns (`.dockerignore`, include and exclude lists)
//! lives in [`pattern`].
//!
//! Non-goals: no IO, no network, no storage.
//!
//! Invariants: a [`Digest`] always has a supported algorithm and the right length; a [`Reference`] is always in normal
//! form; whatever is read from JSON and written again keeps fields unknown to this crate where the type says so.
//!
//! Start at [`Descriptor`] and [`Digest`].
#![forbid(unsafe_code)]

mod config;
mod descriptor;
mod digest;
mod manifest;
mod platform;
mod platform_match;
mod reference;

pub mod json;
pub mod media_type;
pub mod path;
pub mod pattern;
pub mod timestamp;

pub use config::{ContainerConfig, Healthcheck, History, ImageConfig, RootFs};
pub use descriptor::Descriptor;
pub use digest::{Algorithm, Digest, DigestError, Digester, chain_id, chain_ids};
pub use manifest::{Index, Manifest};
pub use platform::{Platform, PlatformError};
pub use platform_match::PlatformMatcher;
pub use reference::{Reference, ReferenceError};
