//! Sources: ops without inputs that bring bytes in. One module per scheme.

pub mod git;
pub mod http;
mod identifier;
pub mod image;
pub mod image_blob;
pub mod local;
pub mod oci_layout;
mod signature;

use oci::Digest;

pub(crate) use identifier::canonical;

/// Digest of a source's key, as BuildKit makes it (`buildkit.source.v0`).
pub(crate) fn key_digest(key: &str) -> Digest {
    Digest::sha256(format!("buildkit.source.v0:{key}").as_bytes())
}
