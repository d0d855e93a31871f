//! Temporary and named holds on blobs.

use oci::Digest;

use crate::store::Store;

/// Holds blobs against garbage collection until dropped; does not survive a restart.
///
/// Take it *before* looking whether a blob exists or writing it: from then on the blob, if it is there, stays.
#[derive(Debug)]
pub struct Pin {
    store: Store,
    digests: Vec<Digest>,
}

impl Pin {
    /// Holds one more blob.
    pub fn add(&mut self, digest: Digest) {
        todo!()
    }

    /// Lists what is held.
    pub fn digests(&self) -> &[Digest] {
        &self.digests
    }
}
