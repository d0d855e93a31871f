//! Sources: ops without inputs that bring bytes in. One module per scheme.
//!
//! Purpose: pin what a source names (an image's manifest, a commit, a file's checksum), key it as BuildKit does, and make a
//! ref of it. What can wait is not fetched: an image is a lazy ref until [`image::fetch::BlobFetcher`] is asked for its bytes.
//!
//! Non-goals: policies, which are applied before a source is made; which worker runs it.
//!
//! Invariants: what is fetched is checked against its digest before it is seen; a name from outside is never joined to a
//! path; credentials come from the clients of the builds at hand and are neither stored nor shown; what a tag or a branch
//! means is asked once per build.
//!
//! Start at [`image::ImageOp`] and [`image::Images`].
#![forbid(unsafe_code)]

pub mod git;
pub mod http;
mod identifier;
pub mod image;
pub mod image_blob;
pub mod local;
pub mod oci_layout;
mod percent;
mod resolution;
mod signature;

use oci::Digest;

pub use identifier::canonical;
pub use resolution::forget_resolutions;

/// Digest of a source's key, as BuildKit makes it (`buildkit.source.v0`).
pub(crate) fn key_digest(key: &str) -> Digest {
    Digest::sha256(format!("buildkit.source.v0:{key}").as_bytes())
}
