//! Which results a lost blob takes with it.

use std::collections::BTreeSet;

use cache::ImmutableRef;
use oci::Digest;

/// Whether a ref has a layer whose blob is among the lost ones and is not here.
pub(super) fn lacks(reference: &ImmutableRef, lost: &BTreeSet<Digest>) -> bool {
    reference.layer_chain().iter().any(|layer| {
        let mut blobs = layer.blobs().into_iter();
        blobs.any(|blob| lost.contains(&blob.digest)) && layer.is_blob_lazy()
    })
}
