//! Temporary holds on blobs.

use oci::Digest;

use crate::db::After;
use crate::store::Store;

/// Holds blobs against garbage collection until dropped; does not survive a restart.
///
/// Take it *before* looking whether a blob exists or writing it: from then on the blob, if it is there, stays. When it is
/// dropped, blobs that neither a ref nor a name nor another pin holds are deleted.
#[derive(Debug)]
pub struct Pin {
    store: Store,
    digests: Vec<Digest>,
}

impl Pin {
    pub(crate) fn new(store: Store) -> Self {
        Self {
            store,
            digests: Vec::new(),
        }
    }

    /// Holds one more blob.
    pub fn add(&mut self, digest: Digest) {
        self.store.shared.state().pin(&digest);
        self.digests.push(digest);
    }

    /// Lists what is held.
    pub fn digests(&self) -> &[Digest] {
        &self.digests
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.store.shared.change(|state, transaction| {
            for digest in &self.digests {
                if state.unpin(digest) {
                    transaction.after.push(After::DeleteBlob(*digest));
                }
            }
        });
    }
}
