//! Sources: ops without inputs that bring bytes in. One module per scheme.

pub mod git;
pub mod http;
pub mod image;
pub mod image_blob;
pub mod local;
pub mod oci_layout;

use oci::Digest;

/// Digest of a source's key, as BuildKit makes it (`buildkit.source.v0`).
pub(crate) fn key_digest(key: &str) -> Digest {
    Digest::sha256(format!("buildkit.source.v0:{key}").as_bytes())
}
